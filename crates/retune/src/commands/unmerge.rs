//! `retune unmerge`: an adapter taken out of a model again that it was merged into.

use anyhow::{Context, Result};
use retune_adapter::AdapterFile;
use retune_model::unmerge::inverse;
use retune_train::run_config::Storage;
use serde_json::json;

use super::merge::{Merging, report, write};
use crate::args::UnmergeArgs;
use crate::fetch;
use crate::parity::Sample;
use crate::session::{self, Base};

/// Writes the model without the adapter, panel by panel.
pub fn run(args: &UnmergeArgs) -> Result<()> {
    let merged = Base::open(&fetch::resolve(&args.model)?)?;
    let folder = session::adapter_folder(&args.adapter)?;
    let adapter = AdapterFile::read(&folder)?;
    if let Some(record) = session::provenance(&folder)? {
        session::check_tokens(&merged, &folder, &record)?;
        if let Some(storage) = record.pointer("/run/base/storage").filter(|storage| **storage != json!(Storage::AsIs)) {
            note!(
                "! the adapter was trained on a base held as {}, into which it is merged unless `merge` is told --storage as-is: what comes \
                 back are those weights, not the base's own",
                storage.as_str().unwrap_or_default()
            );
        }
    }
    let unmerge = || -> Result<_> {
        let overlay = adapter.lower(&merged.checkpoint.spec)?;
        let params = adapter.params(&overlay)?;
        let without = inverse(&overlay)?;
        let sample = Sample::of(&merged, Some(&folder), args.written.data.as_deref())?;
        write(&Merging::new(&merged, &without, &params, &sample), &args.written)
    };
    let written = unmerge().with_context(|| format!("{} cannot be taken out of {}", folder.display(), args.model))?;
    report("unmerged model", &written, &args.written)
}
