//! One file per command: what it does with its arguments, and what it prints.

pub mod bench;
mod changes;
pub mod chat;
pub mod combine;
pub mod compare;
pub mod convert;
pub mod data;
pub mod eval;
pub mod export;
pub mod fetch;
pub mod generate;
pub mod inspect;
pub mod logits;
pub mod merge;
pub mod plan;
pub mod quantize;
pub mod report;
pub mod schema;
pub mod score;
pub mod tokenize;
pub mod train;
pub mod unmerge;

use std::io::Read;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The argument, or what standard input holds.
pub fn text_or_stdin(text: Option<&str>, what: &str) -> Result<String> {
    if let Some(text) = text {
        return Ok(text.to_owned());
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
    let Ok(text) = String::from_utf8(bytes) else { bail!("{what} on standard input is not UTF-8") };
    if text.is_empty() {
        bail!("no {what}: give it as an argument or on standard input");
    }
    Ok(text)
}

/// Prints a JSON value on one line.
pub fn print_json(value: &Value) -> Result<()> {
    outln!("{value}");
    Ok(())
}
