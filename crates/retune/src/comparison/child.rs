//! A run of this program as a process of its own: its peak memory is its own, and what it dies of is no reason to stop.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use retune_formats::atomic::Lines;
use serde_json::Value;

use crate::INTERRUPTED;
use crate::progress::interrupted;

/// How often Ctrl-C is looked for.
const PATIENCE: Duration = Duration::from_millis(50);

/// How a run ended.
pub enum Ended {
    /// With this on its standard output.
    Done(Value),
    /// With this error.
    Failed(String),
    /// By Ctrl-C, with what it had saved.
    Interrupted,
}

/// Runs this program to its end, with what it says appended to a log and told line by line. Ctrl-C is passed on to it.
///
/// # Errors
/// A program that cannot be started, a log that cannot be written.
pub fn run(args: &[String], log: &Path, mut said: impl FnMut(&str)) -> Result<Ended> {
    let program = std::env::current_exe().context("cannot find this program's file, which runs are started from")?;
    let mut log = Lines::open(log)?;
    log.add(&format!("$ retune {}", args.join(" ")))?;
    let mut command = Command::new(&program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    tie(&mut command);
    let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;

    let mut stdout = child.stdout.take();
    let output = thread::spawn(move || {
        let mut bytes = Vec::new();
        // What cannot be read is told by what is missing.
        let _ = stdout.as_mut().map(|stdout| stdout.read_to_end(&mut bytes));
        bytes
    });
    let (sender, receiver) = mpsc::channel();
    let stderr = child.stderr.take();
    thread::spawn(move || {
        for line in stderr.into_iter().flat_map(|stderr| BufReader::new(stderr).split(b'\n')).map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    let (mut told, mut last, mut error) = (false, String::new(), None);
    loop {
        match receiver.recv_timeout(PATIENCE) {
            Ok(line) => {
                log.add(&line)?;
                said(&line);
                if let Some(text) = line.strip_prefix("error: ") {
                    error = Some(text.to_owned());
                }
                if !line.trim().is_empty() {
                    last = line;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if interrupted() && !told {
            told = true;
            interrupt(&child);
        }
    }
    let status = child.wait().context("cannot wait for a run")?;
    let output = output.join().unwrap_or_default();
    if status.success() {
        let found = serde_json::from_slice(&output);
        return Ok(found.map_or_else(|error| Ended::Failed(format!("its result cannot be read: {error}")), Ended::Done));
    }
    if interrupted() && (status.code() == Some(INTERRUPTED.into()) || status.code().is_none()) {
        return Ok(Ended::Interrupted);
    }
    // What a signal ended said nothing of it: most often the system ran out of memory.
    let killed =
        || format!("it was ended from outside ({status}), as systems do that run out of memory; it last said: {last}");
    Ok(Ended::Failed(
        error.unwrap_or_else(|| if status.code().is_none() { killed() } else { format!("{status}: {last}") }),
    ))
}

/// Keeps a terminal's Ctrl-C from reaching the process twice, and lets it end with this one.
#[cfg(unix)]
fn tie(command: &mut Command) {
    use std::os::unix::process::CommandExt;

    command.process_group(0);
    #[cfg(target_os = "linux")]
    // SAFETY: prctl is a system call that allocates nothing and takes no lock, so it may run between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

#[cfg(not(unix))]
fn tie(_: &mut Command) {}

#[cfg(unix)]
fn interrupt(child: &Child) {
    // SAFETY: kill has no conditions on memory, and the child has not been waited for, so the number is still its own.
    unsafe {
        libc::kill(child.id() as libc::pid_t, libc::SIGINT);
    }
}

/// A console's Ctrl-C has reached it.
#[cfg(not(unix))]
fn interrupt(_: &Child) {}
