//! Printing that can fail: a result that cannot be written is an error, a message that cannot be written is no reason to stop.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Writes to standard output.
///
/// # Errors
/// A closed pipe, a full disk.
pub fn write(text: Arguments) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_fmt(text).and_then(|()| stdout.flush()).context("cannot write to standard output")
}

/// Writes a line to standard error, if that is possible.
pub fn message(text: Arguments) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Refuses to write a result over something that it is made of: a file, or a file of a folder.
///
/// # Errors
/// The file that is read.
pub fn refuse_source(out: &Path, sources: &[&Path]) -> Result<()> {
    let Ok(out) = out.canonicalize() else { return Ok(()) };
    for source in sources {
        if source.canonicalize().is_ok_and(|source| out.starts_with(&source)) {
            bail!("{} is what this reads: give the result another name", out.display());
        }
    }
    Ok(())
}

/// Refuses a file for a result whose folder is not there, before the result is computed.
///
/// # Errors
/// The folder.
pub fn refuse_missing_folder(out: &Path) -> Result<()> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder.filter(|folder| !folder.is_dir()) {
        Some(folder) => {
            bail!("{} cannot be written: there is no folder {}; make it first", out.display(), folder.display())
        }
        None => Ok(()),
    }
}

/// Whether an error says that nobody reads the output any more.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// As `println!`, in a function that returns a `Result`.
macro_rules! outln {
    () => { $crate::output::write(format_args!("\n"))? };
    ($($text:tt)*) => { $crate::output::write(format_args!("{}\n", format_args!($($text)*)))? };
}

/// As `print!`, in a function that returns a `Result`.
macro_rules! out {
    ($($text:tt)*) => { $crate::output::write(format_args!($($text)*))? };
}

/// As `eprintln!`, but never a panic.
macro_rules! note {
    ($($text:tt)*) => { $crate::output::message(format_args!($($text)*)) };
}
