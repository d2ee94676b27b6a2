//! `retune merge`: an adapter merged into its base.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use retune_adapter::AdapterFile;
use retune_engine::overlay::Overlay;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{self, GgufType, MergeOptions, MergeReport};
use serde_json::{Value, json};

use super::parity::{Parity, Side};
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

/// A model that was written.
pub(super) struct Written {
    report: MergeReport,
    /// Of a GGUF file, the type.
    kind: Option<GgufType>,
    parity: Parity,
}

/// Whether a path is that of a GGUF file.
pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// Writes a base with what stands on it, behind a bar of progress, and runs what was written.
pub(super) fn write(base: &Base, overlay: &Overlay, params: &[f32], to: &WrittenModel) -> Result<Written> {
    let out = to.out.display();
    match (is_gguf(&to.out), to.dtype, to.kind) {
        (true, Some(_), _) => bail!("--dtype is for a folder, and {out} is a GGUF file: give --type"),
        (false, _, Some(_)) => bail!("--type is for a GGUF file: give --dtype, or an --out that ends in .gguf"),
        (true, None, kind) => write_gguf(base, overlay, params, &to.out, kind),
        (false, dtype, None) => {
            let dtype = dtype.unwrap_or_default();
            if let Some(note) = export::scale_note(&base.checkpoint, dtype) {
                note!("! {note}");
            }
            let options = MergeOptions { dtype, ..MergeOptions::default() };
            let report = behind_bar(|progress| {
                Ok(export::write(&base.checkpoint, overlay, params, &to.out, &options, progress)?)
            })?;
            Ok(Written { report, kind: None, parity: parity(base, overlay, params, &to.out)? })
        }
    }
}

/// Writes it as a GGUF file, of the type that keeps the weights nearly as they are where none is given.
pub(super) fn write_gguf(
    base: &Base,
    overlay: &Overlay,
    params: &[f32],
    path: &Path,
    kind: Option<GgufType>,
) -> Result<Written> {
    if path.exists() {
        bail!("{} is there already: give another --out, or remove it first", path.display());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let kind = kind.unwrap_or_else(|| GgufType::of(&base.checkpoint));
    let written =
        behind_bar(|progress| Ok(export::write_gguf(&base.checkpoint, overlay, params, path, kind, progress)?))?;
    for note in &written.notes {
        note!("! {note}");
    }
    Ok(Written { report: written.report, kind: Some(kind), parity: parity(base, overlay, params, path)? })
}

fn behind_bar<T>(write: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<T>) -> Result<T> {
    let bar = bytes_bar()?;
    let written = write(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(written)
}

/// Holds what was written against what it was made of.
fn parity(base: &Base, overlay: &Overlay, params: &[f32], path: &Path) -> Result<Parity> {
    let [ours, theirs] = [base.checkpoint.model()?, Checkpoint::open(path)?.model()?];
    let nothing = Overlay::empty(&theirs);
    let ours = Side { model: &ours, overlay, params };
    Parity::of(base.tokenizer()?, ours, Side { model: &theirs, overlay: &nothing, params: &[] })
}

impl Written {
    pub fn json(&self, out: &Path) -> Value {
        let Self { report, kind, parity } = self;
        json!({
            "out": out,
            "type": kind.map(|kind| kind.to_string()),
            "bytes": report.bytes,
            "shards": report.shards,
            "changed_modules": report.changed_modules,
            "largest_change": report.largest_change,
            "parity": parity.json(),
        })
    }
}

/// Says what was written.
pub(super) fn report(what: &str, written: &Written, to: &WrittenModel) -> Result<()> {
    if to.json {
        return print_json(&written.json(&to.out));
    }
    print(what, written, &to.out)?;
    outln!("try           retune generate --model {} \"Hello\"", to.out.display());
    Ok(())
}

/// The lines about it.
pub(super) fn print(what: &str, written: &Written, path: &Path) -> Result<()> {
    let Written { report, kind, parity } = written;
    let kind = kind.map_or_else(String::new, |kind| format!(", {kind}"));
    outln!("{what:<13} {}  ({} in {} file(s){kind})", path.display(), human(report.bytes), report.shards);
    outln!(
        "changed       {} modules; the largest change is {:.2e} of the largest weight",
        report.changed_modules,
        report.largest_change
    );
    outln!("parity        {}", parity.line());
    Ok(())
}
