//! `retune merge`: an adapter merged into its base.

use std::str::FromStr;

use anyhow::{Context, Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use retune_adapter::AdapterFile;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{ExportType, MergeOptions, merge};
use serde_json::json;

use super::print_json;
use crate::args::{Dtype, MergeArgs};
use crate::memory::human;
use crate::{fetch, session};

impl Dtype {
    fn export_type(self) -> Result<ExportType> {
        let name = match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        };
        ExportType::from_str(name).map_err(|error| anyhow!("{error}"))
    }
}

/// Writes the merged model, panel by panel.
pub fn run(args: &MergeArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&fetch::resolve(&args.model)?)?;
    let adapter = AdapterFile::read(&args.adapter)?;
    session::check_provenance(&checkpoint, &args.adapter)?;
    let options = MergeOptions { dtype: args.dtype.export_type()?, ..MergeOptions::default() };
    let bar = ProgressBar::new(1);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes}, {eta} left")?);
    let report = merge(&checkpoint, Some(&adapter), &args.out, &options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })
    .with_context(|| format!("{} cannot be merged into {}", args.adapter.display(), args.model))?;
    bar.finish_and_clear();
    if args.json {
        print_json(&json!({
            "out": args.out,
            "bytes": report.bytes,
            "shards": report.shards,
            "changed_modules": report.changed_modules,
            "largest_change": report.largest_change,
        }))?;
    } else {
        outln!("merged model  {}  ({} in {} file(s))", args.out.display(), human(report.bytes), report.shards);
        outln!(
            "changed       {} modules; the largest change is {:.2e} of the largest weight",
            report.changed_modules,
            report.largest_change
        );
        outln!("try           retune generate --model {} \"Hello\"", args.out.display());
    }
    Ok(())
}
