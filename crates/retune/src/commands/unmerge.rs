//! `retune unmerge`: an adapter taken out of a model again that it was merged into.

use anyhow::{Context, Result};
use retune_adapter::AdapterFile;
use retune_model::unmerge::inverse;

use super::merge::{report, write};
use crate::args::UnmergeArgs;
use crate::fetch;
use crate::session::{self, Base};

/// Writes the model without the adapter, panel by panel.
pub fn run(args: &UnmergeArgs) -> Result<()> {
    let merged = Base::open(&fetch::resolve(&args.model)?)?;
    let folder = session::adapter_folder(&args.adapter)?;
    let adapter = AdapterFile::read(&folder)?;
    if let Some(record) = session::provenance(&folder)? {
        session::check_tokens(&merged, &folder, &record)?;
    }
    let unmerge = || -> Result<_> {
        let overlay = adapter.lower(&merged.checkpoint.spec)?;
        let params = adapter.params(&overlay)?;
        write(&merged, &inverse(&overlay)?, &params, &args.written)
    };
    let written = unmerge().with_context(|| format!("{} cannot be taken out of {}", folder.display(), args.model))?;
    report("unmerged model", &written, &args.written)
}
