//! `retune schema`: the JSON Schema of run files and of plans.

use anyhow::Result;
use retune_train::{plan, run_config};

use crate::args::{SchemaArgs, SchemaOf};

/// Prints it.
pub fn run(args: &SchemaArgs) -> Result<()> {
    let schema = match args.of {
        SchemaOf::Run => run_config::json_schema(),
        SchemaOf::Plan => plan::json_schema(),
    };
    outln!("{schema}");
    Ok(())
}
