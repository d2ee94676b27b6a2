//! The `retune` program: reads the command line and hands over to one command.

#[macro_use]
mod output;
mod parity;

mod args;
mod card;
mod chart;
mod commands;
mod comparison;
mod compute;
mod fetch;
mod figures;
mod memory;
mod memory_plan;
mod metrics;
mod page;
mod progress;
mod report;
mod run_data;
mod run_folder;
mod session;
mod storage;

use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use args::{Cli, Command};
use clap::Parser;
use retune_kernels::allocator::Aligned;
use retune_kernels::parallel;
use retune_train::run_config::MOST_THREADS;

/// What shells say of a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

#[global_allocator]
static ALLOCATOR: Aligned = Aligned;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(End::Done) => ExitCode::SUCCESS,
        Ok(End::Interrupted) => ExitCode::from(INTERRUPTED),
        // A reader that has seen enough (`retune inspect … | head`) is no failure.
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            note!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How a command ended that did not fail.
pub enum End {
    Done,
    /// Ctrl-C stopped it; what there was to save is saved.
    Interrupted,
}

fn run(cli: &Cli) -> Result<End> {
    retune_kernels::isa::from_env().map_err(|error| anyhow!(error))?;
    let threads = match cli.threads {
        Some(n) if (1..=MOST_THREADS).contains(&n) => n,
        Some(n) => bail!("--threads is {n}; expected 1 to {MOST_THREADS}"),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    // It computes nothing: the processes that it starts do.
    if let Command::Compare(args) = &cli.command {
        return commands::compare::run(args, cli.threads);
    }
    // The commands run inside the pool, so that the calling thread is one of its workers; the others wait for it awake.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let done = |()| End::Done;
    let command = || match &cli.command {
        Command::Train(args) => commands::train::run(args, cli.threads),
        Command::Generate(args) => commands::generate::run(args).map(done),
        Command::Chat(args) => commands::chat::run(args).map(done),
        Command::Merge(args) => commands::merge::run(args).map(done),
        Command::Quantize(args) => commands::quantize::run(args).map(done),
        Command::Unmerge(args) => commands::unmerge::run(args).map(done),
        Command::Combine(args) => commands::combine::run(args).map(done),
        Command::Export(args) => commands::export::run(args).map(done),
        Command::Convert(args) => commands::convert::run(args).map(done),
        Command::Eval(args) => commands::eval::run(args),
        Command::Inspect(args) => commands::inspect::run(args).map(done),
        Command::Data(args) => commands::data::run(args).map(done),
        Command::Plan(args) => commands::plan::run(args).map(done),
        Command::Fetch(args) => commands::fetch::run(args).map(done),
        Command::Tokenize(args) => commands::tokenize::run(args).map(done),
        Command::Logits(args) => commands::logits::run(args).map(done),
        Command::Bench(command) => commands::bench::run(command).map(done),
        Command::Schema(args) => commands::schema::run(args).map(done),
        // Handled above.
        Command::Compare(_) => Ok(End::Done),
        Command::Score(args) => commands::score::run(args).map(done),
        Command::Report(args) => commands::report::run(args).map(done),
    };
    pool.install(|| parallel::awake(command))
}
