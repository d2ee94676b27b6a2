//! `retune merge`: an adapter merged into its base.

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use retune_adapter::AdapterFile;
use retune_model::export::{self, MergeOptions};
use serde_json::json;

use super::print_json;
use crate::args::MergeArgs;
use crate::fetch;
use crate::memory::human;
use crate::session::{self, Base};

/// Writes the merged model, panel by panel.
pub fn run(args: &MergeArgs) -> Result<()> {
    let base = Base::open(&fetch::resolve(&args.model)?)?;
    let adapter = AdapterFile::read(&args.adapter)?;
    session::check_provenance(&base, &args.adapter)?;
    let options = MergeOptions { dtype: args.dtype, ..MergeOptions::default() };
    if let Some(note) = export::scale_note(&base.checkpoint, args.dtype) {
        note!("! {note}");
    }
    let bar = ProgressBar::new(1);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes}, {eta} left")?);
    let merge = || -> Result<_> {
        let overlay = adapter.lower(&base.checkpoint.spec)?;
        let params = adapter.params(&overlay)?;
        adapter.check_base_weights(&base.checkpoint)?;
        Ok(export::write(&base.checkpoint, &overlay, &params, &args.out, &options, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?)
    };
    let report = merge().with_context(|| format!("{} cannot be merged into {}", args.adapter.display(), args.model))?;
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
