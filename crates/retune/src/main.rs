//! The `retune` program: reads the command line and hands over to one command.

mod args;
mod commands;
mod fetch;
mod memory;
mod progress;
mod run_data;
mod session;

use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use args::{Cli, Command};
use clap::Parser;

fn main() -> ExitCode {
    end_quietly_on_closed_pipes();
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    retune_kernels::isa::from_env().map_err(|error| anyhow!(error))?;
    let threads = match cli.threads {
        Some(0) => bail!("--threads is 0; expected at least 1"),
        Some(n) => n,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    // The commands run inside the pool, so that the calling thread is one of its workers.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(|| match &cli.command {
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
        Command::Schema => {
            commands::schema::run();
            Ok(())
        }
    })
}

/// A reader that has seen enough (`retune inspect … | head`) ends the program as it ends others, instead of failing a print.
#[cfg(unix)]
fn end_quietly_on_closed_pipes() {
    // SAFETY: called before any thread is started, with a disposition that is always valid.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

#[cfg(not(unix))]
fn end_quietly_on_closed_pipes() {}
