//! `retune schema`: the JSON Schema of run files.

use anyhow::Result;

/// Prints it.
pub fn run() -> Result<()> {
    outln!("{}", retune_train::run_config::json_schema());
    Ok(())
}
