//! Faults on purpose, for the tests: the n-th step of writing files fails as on a full disk or in a read-only folder, or ends the program as
//! a kill does.
//!
//! `RETUNE_FAULT` says which: `full:7` (from the 7th step on there is no room), `read-only:7` (the 7th step alone is refused), `kill:7`, or
//! `none`, which only counts. Each step that is reached is then told on standard error. It is a variable and not an argument of functions since what
//! is tested are whole runs of the program, and it is looked at by builds with debug assertions alone: a release holds none of it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// A step of writing a file or a folder.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Create,
    Write,
    Append,
    Sync,
    Rename,
    SyncFolder,
}

/// Fails where a fault is due at this step.
pub(crate) fn reach(step: Step, path: &Path) -> io::Result<()> {
    due(step, path, || Ok(()))
}

/// Writes bytes; where a fault is due, half of them.
pub(crate) fn write(step: Step, path: &Path, file: &mut File, bytes: &[u8]) -> io::Result<()> {
    due(step, path, || file.write_all(&bytes[..bytes.len() / 2]))?;
    file.write_all(bytes)
}

#[cfg(not(debug_assertions))]
fn due(_: Step, _: &Path, _: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    Ok(())
}

#[cfg(debug_assertions)]
fn due(step: Step, path: &Path, half: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    static PLANNED: LazyLock<Option<(String, usize)>> = LazyLock::new(|| {
        let planned = std::env::var("RETUNE_FAULT").ok()?;
        let (kind, at) = planned.split_once(':').unwrap_or((&planned, "0"));
        Some((kind.to_owned(), at.parse().ok()?))
    });
    static REACHED: AtomicUsize = AtomicUsize::new(0);

    let Some((kind, at)) = &*PLANNED else { return Ok(()) };
    let number = REACHED.fetch_add(1, Ordering::SeqCst) + 1;
    eprintln!("step {number} of writing: {step:?} {}", path.display());
    let error = match kind.as_str() {
        "full" if number >= *at => Some(io::ErrorKind::StorageFull),
        "read-only" if number == *at => Some(io::ErrorKind::ReadOnlyFilesystem),
        "kill" if number == *at => None,
        _ => return Ok(()),
    };
    eprintln!("fault at step {number}");
    half()?;
    match error {
        Some(error) => Err(error.into()),
        None => std::process::exit(137), // no destructor runs
    }
}
