//! `retune merge`: an adapter merged into its base.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use retune_adapter::AdapterFile;
use retune_engine::overlay::Overlay;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{self, GgufType, MergeOptions, MergeReport};
use retune_train::run_config::Storage;
use serde_json::{Value, json};

use super::print_json;
use crate::args::{MergeArgs, WrittenModel};
use crate::memory::human;
use crate::parity::{Parity, Sample, Side};
use crate::progress::bytes_bar;
use crate::session::{self, Base};
use crate::{fetch, storage};

/// Writes the merged model, panel by panel.
pub fn run(args: &MergeArgs) -> Result<()> {
    let folder = session::adapter_folder(&args.adapter)?;
    let bases = Bases::open(&args.model, Some(&folder), args.storage)?;
    let adapter = AdapterFile::read(&folder)?;
    session::check_provenance(&bases.into, &folder)?;
    let merge = || -> Result<_> {
        let overlay = adapter.lower(&bases.into.checkpoint.spec)?;
        let params = adapter.params(&overlay)?;
        adapter.check_base_weights(&bases.into.checkpoint)?;
        let sample = Sample::of(&bases.into, Some(&folder), args.written.data.as_deref())?;
        write(&Merging::of(&bases, &overlay, &params, &sample), &args.written)
    };
    let written = merge().with_context(|| format!("{} cannot be merged into {}", folder.display(), args.model))?;
    report("merged model", &written, &args.written)
}

/// The base that an adapter is merged into, and the one that it was trained on, which differ in how linears are held.
pub(super) struct Bases {
    pub into: Base,
    trained_on: Option<Base>,
    /// The base's own weights, where it is neither.
    own: Option<Base>,
}

impl Bases {
    /// Opens a base, held as is asked for or else as when the adapter was trained on it.
    ///
    /// # Errors
    /// A model or an adapter's record that cannot be read.
    pub fn open(model: &str, adapter: Option<&Path>, asked: Option<Storage>) -> Result<Self> {
        let path = fetch::resolve(model)?;
        let mut into = Base::open(&path)?;
        let trained = adapter.map_or(Ok(Storage::AsIs), |adapter| storage::trained_on(&into, adapter))?;
        let held = storage::under(&into, adapter, asked)?;
        let again = |storage: Storage| -> Result<Base> {
            let mut base = Base::again(&path)?;
            storage::hold(&mut base, storage)?;
            Ok(base)
        };
        if trained != held {
            note!(
                "! the adapter is merged into other weights than it was trained on: what is written is compared with the model that was trained"
            );
        }
        let trained_on = (trained != held).then(|| again(trained)).transpose()?;
        let own = (trained == held && !held.is_as_is()).then(|| again(Storage::AsIs)).transpose()?;
        storage::hold(&mut into, held)?;
        Ok(Self { into, trained_on, own })
    }
}

/// What is to be written: a base with what stands on it.
#[derive(Clone, Copy)]
pub(super) struct Merging<'a> {
    base: &'a Base,
    overlay: &'a Overlay,
    params: &'a [f32],
    /// The same adapter on other weights: those it was trained on, which what is written is held against, and the base's own, into which it
    /// could be merged instead.
    trained_on: Option<&'a Base>,
    own: Option<&'a Base>,
    sample: &'a Sample,
}

impl<'a> Merging<'a> {
    /// What stands on one base alone.
    pub fn new(base: &'a Base, overlay: &'a Overlay, params: &'a [f32], sample: &'a Sample) -> Self {
        Self { base, overlay, params, trained_on: None, own: None, sample }
    }

    pub fn of(bases: &'a Bases, overlay: &'a Overlay, params: &'a [f32], sample: &'a Sample) -> Self {
        let (trained_on, own) = (bases.trained_on.as_ref(), bases.own.as_ref());
        Self { trained_on, own, ..Self::new(&bases.into, overlay, params, sample) }
    }
}

/// A model that was written.
pub(super) struct Written {
    report: MergeReport,
    /// Of a GGUF file, the type.
    kind: Option<GgufType>,
    parity: Parity,
    /// How far it would be with the base's own weights, where others were merged into.
    own_weights: Option<Parity>,
}

/// Whether a path is that of a GGUF file.
pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// Writes a base with what stands on it, behind a bar of progress, and runs what was written.
pub(super) fn write(merging: &Merging<'_>, to: &WrittenModel) -> Result<Written> {
    let out = to.out.display();
    match (is_gguf(&to.out), to.dtype, to.kind) {
        (true, Some(_), _) => bail!("--dtype is for a folder, and {out} is a GGUF file: give --type"),
        (false, _, Some(_)) => bail!("--type is for a GGUF file: give --dtype, or an --out that ends in .gguf"),
        (true, None, kind) => write_gguf(merging, &to.out, kind),
        (false, dtype, None) => {
            let dtype = dtype.unwrap_or_default();
            let &Merging { base, overlay, params, .. } = merging;
            if let Some(note) = export::scale_note(&base.checkpoint, dtype) {
                note!("! {note}");
            }
            let options = MergeOptions { dtype, ..MergeOptions::default() };
            let report = behind_bar(|progress| {
                Ok(export::write(&base.checkpoint, overlay, params, &to.out, &options, progress)?)
            })?;
            Written::read_back(report, None, merging, &to.out)
        }
    }
}

/// Writes it as a GGUF file, of the type that keeps the weights nearly as they are where none is given.
pub(super) fn write_gguf(merging: &Merging<'_>, path: &Path, kind: Option<GgufType>) -> Result<Written> {
    let &Merging { base, overlay, params, .. } = merging;
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
    Written::read_back(written.report, Some(kind), merging, path)
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

impl Written {
    /// Holds what was written against what it was made of.
    fn read_back(report: MergeReport, kind: Option<GgufType>, merging: &Merging<'_>, path: &Path) -> Result<Self> {
        let &Merging { base, overlay, params, trained_on, own, sample } = merging;
        let trained = trained_on.unwrap_or(base).checkpoint.model()?;
        let trained = Side { model: &trained, overlay, params };
        let parity = parity(sample, trained, &Checkpoint::open(path)?)?;
        let own = own.map(|own| own.checkpoint.model()).transpose()?;
        let own_weights = own.map(|model| Parity::of(sample, trained, Side { model: &model, overlay, params }));
        Ok(Self { report, kind, parity, own_weights })
    }

    pub fn json(&self, out: &Path) -> Value {
        let Self { report, kind, parity, own_weights } = self;
        json!({
            "out": out,
            "type": kind.map(|kind| kind.to_string()),
            "bytes": report.bytes,
            "shards": report.shards,
            "changed_modules": report.changed_modules,
            "largest_change": report.largest_change,
            "parity": parity.json(),
            "parity_as_is": own_weights.as_ref().map(Parity::json),
        })
    }
}

/// Holds a model that was written against what it was made of.
///
/// # Errors
/// A model that cannot be read.
pub(super) fn parity(sample: &Sample, trained: Side<'_>, written: &Checkpoint) -> Result<Parity> {
    let written = written.model()?;
    let nothing = Overlay::empty(&written);
    Ok(Parity::of(sample, trained, Side { model: &written, overlay: &nothing, params: &[] }))
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
    let Written { report, kind, parity, own_weights } = written;
    let kind = kind.map_or_else(String::new, |kind| format!(", {kind}"));
    outln!("{what:<13} {}  ({} in {} file(s){kind})", path.display(), human(report.bytes), report.shards);
    outln!(
        "changed       {} modules; the largest change is {:.2e} of the largest weight",
        report.changed_modules,
        report.largest_change
    );
    parity.print("parity", "read back")?;
    if let Some(own) = own_weights {
        own.print("or as-is", "on the base's own weights, unrounded (--storage as-is)")?;
    }
    Ok(())
}
