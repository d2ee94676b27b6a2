//! How the base's linears are held: what `base.storage` and `--storage` ask for, done to a base and put into words.
//!
//! What was quantized is kept in a file of the cache, which the next start maps. It is named after the base's files and believed only while
//! neither they nor it have changed since it was written: a stamp of all of them together says so. One that is damaged, or belongs to files
//! that were there before, is made anew.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use retune_formats::bitsandbytes::QuantizedWeight;
use retune_formats::stamp::{Stamp, StampFile};
use retune_model::checkpoint::Checkpoint;
use retune_model::quantize;
use retune_quant::Encoding;
use retune_train::run_config::Storage;

use crate::args::{NO_ADAPTER, NamedAdapter};
use crate::fetch;
use crate::memory::human;
use crate::progress::bytes_bar;
use crate::session::{self, Base, STAMPS};

/// Where quantized bases are kept, within the cache. No model's folder begins with a dot.
const QUANTIZED: &str = ".quantized";

/// What is asked for, or else what the adapter was trained on, if that was this very base: said, since nobody asked.
///
/// # Errors
/// A damaged record beside the adapter.
pub fn under(base: &Base, adapter: Option<&Path>, asked: Option<Storage>) -> Result<Storage> {
    under_each(base, adapter.into_iter(), asked)
}

/// As [`under`], of adapters that may not have been trained on the same: then the base is taken as it is, with a warning.
///
/// # Errors
/// A damaged record beside an adapter.
pub fn under_all(base: &Base, adapters: &[NamedAdapter], asked: Option<Storage>) -> Result<Storage> {
    let adapters = adapters.iter().filter(|adapter| adapter.name != NO_ADAPTER);
    under_each(base, adapters.map(|adapter| adapter.path.as_path()), asked)
}

fn under_each<'a>(base: &Base, adapters: impl Iterator<Item = &'a Path>, asked: Option<Storage>) -> Result<Storage> {
    if let Some(asked) = asked {
        return Ok(asked);
    }
    let mut storages = adapters.map(|adapter| trained_on(base, adapter)).collect::<Result<Vec<_>>>()?;
    storages.dedup();
    match storages[..] {
        [] => Ok(Storage::AsIs),
        [storage] => {
            if let Some(encoding) = storage.encoding() {
                note!(
                    "the base's linears are held as {encoding}, as when the adapter was trained; --storage as-is takes them as they are"
                );
            }
            Ok(storage)
        }
        _ => {
            note!(
                "! the adapters were trained on a base that was held in several ways: it is taken as it is; --storage chooses another"
            );
            Ok(Storage::AsIs)
        }
    }
}

/// How this base was held when an adapter was trained on it; as it is, where that was another base or nothing is known.
///
/// # Errors
/// A damaged record beside it.
pub fn trained_on(base: &Base, adapter: &Path) -> Result<Storage> {
    let adapter = &session::find_adapter(adapter)?;
    let Some(record) = session::provenance(adapter)? else { return Ok(Storage::AsIs) };
    let Some(trained_on) = record["run"]["base"].get("storage") else { return Ok(Storage::AsIs) };
    let storage: Storage = serde_json::from_value(trained_on.clone()).with_context(|| {
        format!(
            "{} says that its base was held as {trained_on}, which is unknown",
            adapter.join(session::PROVENANCE).display()
        )
    })?;
    let is_its_base = record["run"]["base_content_hash"].as_str() == Some(base.content_hash().as_str());
    Ok(if is_its_base { storage } else { Storage::AsIs })
}

/// Holds the base's linears in another storage.
///
/// # Errors
/// Weights that are not finite, and weights that are quantized already.
pub fn hold(base: &mut Base, storage: Storage) -> Result<()> {
    let Some(encoding) = storage.encoding() else { return Ok(()) };
    base.check_finite()?;
    let checkpoint = &base.checkpoint;
    let held_by = |held: &str| format!("the base cannot be held as {held}");
    quantize::weights(checkpoint).with_context(|| held_by(&encoding.to_string()))?;
    let kept = match Kept::of(checkpoint, encoding) {
        Some(kept) => kept.weights(checkpoint, encoding)?,
        None => None,
    };
    let weights = match kept {
        Some(weights) => weights,
        None => with_bar(|progress| quantize::in_memory(checkpoint, encoding, progress))?,
    };
    base.checkpoint.replace(weights)?;
    Ok(())
}

/// Runs what takes long behind a bar.
fn with_bar<T>(work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<T, retune_model::Error>) -> Result<T> {
    let bar = bytes_bar()?;
    let done = work(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(done?)
}

/// The place of a base that is kept.
struct Kept {
    path: PathBuf,
    stamps: PathBuf,
    /// The base's files, and how they were before they were read.
    files: Vec<PathBuf>,
    before: StampFile,
}

impl Kept {
    /// `None` where there is no cache, or the system does not tell when files change.
    fn of(checkpoint: &Checkpoint, encoding: Encoding) -> Option<Self> {
        let cache = fetch::cache_dir().ok()?;
        let (stamps, files) = (cache.join(STAMPS), checkpoint.files().to_vec());
        let before = StampFile::of(&stamps, &files)?;
        let path = cache.join(QUANTIZED).join(format!("{}-{encoding}.safetensors", before.name()));
        Some(Self { path, stamps, files, before })
    }

    /// The stamp of the base's files and of what is kept, together.
    fn stamp(&self) -> Option<StampFile> {
        StampFile::of(&self.stamps, &[&self.files[..], std::slice::from_ref(&self.path)].concat())
    }

    /// What is kept; where there is nothing that can be believed it is made first. `None` where nothing can be kept, which is no error.
    fn weights(
        &self,
        checkpoint: &Checkpoint,
        encoding: Encoding,
    ) -> Result<Option<BTreeMap<String, QuantizedWeight>>> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        if fs::create_dir_all(folder).is_err() {
            return Ok(None);
        }
        // Two programs that start at once would write the same file. A file system without locks lets them.
        let lock = File::open(folder).ok();
        if let Some(Err(TryLockError::WouldBlock)) = lock.as_ref().map(File::try_lock) {
            note!("waiting for another retune that quantizes a base");
        }
        let _held = lock.as_ref().filter(|folder| folder.lock().is_ok());
        let read = || quantize::read_file(checkpoint, encoding, &self.path);
        if self.stamp().is_some_and(|stamp| stamp.read().finite)
            && let Ok(weights) = read()
        {
            return Ok(Some(weights));
        }
        let written = with_bar(|progress| quantize::write_file(checkpoint, encoding, &self.path, progress));
        if let Err(error) = written {
            note!("! the quantized base cannot be kept, and will be quantized again next time: {error:#}");
            return Ok(None);
        }
        let size = fs::metadata(&self.path).map_or(0, |metadata| metadata.len());
        note!("quantized the base's linears to {encoding}, and keep them in {} ({})", self.path.display(), human(size));
        if StampFile::of(&self.stamps, &self.files).as_ref() == Some(&self.before)
            && let Some(stamp) = self.stamp()
        {
            stamp.write(&Stamp { finite: true, content_hash: None });
        }
        Ok(Some(read()?))
    }
}

/// What is held quantized, in a line; nothing where all is as in the files.
pub fn describe(checkpoint: &Checkpoint, storage: Storage) -> Option<String> {
    let encoding = storage.encoding()?;
    let weights =
        checkpoint.spec.linears().filter_map(|linear| checkpoint.tensor(&format!("{}.weight", linear.name)).ok());
    let weights: Vec<_> = weights.filter(quantize::is_quantized).collect();
    let bytes: usize = weights.iter().map(|weight| weight.bytes_len()).sum();
    let values: usize = weights.iter().map(|weight| weight.rows() * weight.cols()).sum();
    let bits = 8.0 * bytes as f64 / values.max(1) as f64;
    Some(format!("{} linears held as {encoding}: {bits:.2} bits a parameter, {}", weights.len(), human(bytes as u64)))
}
