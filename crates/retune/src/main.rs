//! The `retune` program: reads the command line and hands over to one command.

#[macro_use]
mod output;

mod args;
mod commands;
mod compute;
mod fetch;
mod memory;
mod progress;
mod run_data;
mod session;

use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use args::{Cli, Command};
use clap::Parser;
use retune_kernels::allocator::Aligned;
use retune_kernels::parallel;
use retune_train::run_config::MOST_THREADS;

#[global_allocator]
static ALLOCATOR: Aligned = Aligned;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough (`retune inspect … | head`) is no failure.
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            note!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    retune_kernels::isa::from_env().map_err(|error| anyhow!(error))?;
    let threads = match cli.threads {
        Some(n) if (1..=MOST_THREADS).contains(&n) => n,
        Some(n) => bail!("--threads is {n}; expected 1 to {MOST_THREADS}"),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    // The commands run inside the pool, so that the calling thread is one of its workers; the others wait for it awake.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let command = || match &cli.command {
        Command::Train(args) => commands::train::run(args, cli.threads),
        Command::Generate(args) => commands::generate::run(args),
        Command::Merge(args) => commands::merge::run(args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Data(args) => commands::data::run(args),
        Command::Fetch(args) => commands::fetch::run(args),
        Command::Tokenize(args) => commands::tokenize::run(args),
        Command::Logits(args) => commands::logits::run(args),
        Command::Bench(command) => commands::bench::run(command),
        Command::Schema => commands::schema::run(),
    };
    pool.install(|| parallel::awake(command))
}
