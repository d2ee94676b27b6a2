//! `retune merge`: an adapter merged into its base.

use anyhow::{Context, Result};
use retune_adapter::AdapterFile;
use retune_engine::overlay::Overlay;
use retune_model::export::{self, MergeOptions, MergeReport};
use serde_json::json;

use super::print_json;
use crate::args::{MergeArgs, WrittenModel};
use crate::memory::human;
use crate::progress::bytes_bar;
use crate::session::{self, Base};
use crate::{fetch, storage};

/// Writes the merged model, panel by panel.
pub fn run(args: &MergeArgs) -> Result<()> {
    let mut base = Base::open(&fetch::resolve(&args.model)?)?;
    let folder = session::adapter_folder(&args.adapter)?;
    let adapter = AdapterFile::read(&folder)?;
    session::check_provenance(&base, &folder)?;
    let held = storage::under(&base, Some(&folder), args.storage)?;
    storage::hold(&mut base, held)?;
    let merge = || -> Result<_> {
        let overlay = adapter.lower(&base.checkpoint.spec)?;
        let params = adapter.params(&overlay)?;
        adapter.check_base_weights(&base.checkpoint)?;
        write(&base, &overlay, &params, &args.written)
    };
    let written = merge().with_context(|| format!("{} cannot be merged into {}", folder.display(), args.model))?;
    report("merged model", &written, &args.written)
}

/// Writes a base with what stands on it, behind a bar of progress.
pub(super) fn write(base: &Base, overlay: &Overlay, params: &[f32], to: &WrittenModel) -> Result<MergeReport> {
    if let Some(note) = export::scale_note(&base.checkpoint, to.dtype) {
        note!("! {note}");
    }
    let bar = bytes_bar()?;
    let options = MergeOptions { dtype: to.dtype, ..MergeOptions::default() };
    let report = export::write(&base.checkpoint, overlay, params, &to.out, &options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(report)
}

/// Says what was written.
pub(super) fn report(what: &str, report: &MergeReport, to: &WrittenModel) -> Result<()> {
    if to.json {
        return print_json(&json!({
            "out": to.out,
            "bytes": report.bytes,
            "shards": report.shards,
            "changed_modules": report.changed_modules,
            "largest_change": report.largest_change,
        }));
    }
    outln!("{what:<13} {}  ({} in {} file(s))", to.out.display(), human(report.bytes), report.shards);
    outln!(
        "changed       {} modules; the largest change is {:.2e} of the largest weight",
        report.changed_modules,
        report.largest_change
    );
    outln!("try           retune generate --model {} \"Hello\"", to.out.display());
    Ok(())
}
