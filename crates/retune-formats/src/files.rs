//! Opening the files of a model: memory maps for weights, bounded reads for JSON.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapOptions};
use retune_quant::{ByteOwner, SharedBytes};
use serde_json::Value;

use crate::error::Error;

/// The largest JSON files in use, shard indexes and tokenizers, stay far below this.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// A file mapped into memory, read-only.
struct MappedFile(Mmap);

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl ByteOwner for MappedFile {
    fn release(&self) {
        // SAFETY: pages of a map that is never written are read from the file again when they are next touched.
        // Advice: where it is not taken the memory just stays in use.
        #[cfg(unix)]
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

/// Maps a whole file into memory, read-only.
///
/// # Errors
/// A file that cannot be opened, and anything but a regular file.
pub fn map_file(path: &Path) -> Result<SharedBytes, Error> {
    let io = |error| Error::Read { path: path.to_owned(), error };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::NotAModel { path: path.to_owned(), reason: "it is not a regular file".to_owned() });
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is never written through. Should another process change the file meanwhile, the bytes change under us:
    // they are read as numbers, or checked again where they are read as text, and every pattern is a valid number.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(SharedBytes::new(Arc::new(MappedFile(map))))
}

/// Memory of zeros, read-only, of which nothing is in use until it is read.
struct Zeros(Mmap);

impl AsRef<[u8]> for Zeros {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl ByteOwner for Zeros {
    fn release(&self) {}
}

/// As many zeros, which take no memory as long as nobody reads them: what stands for weights that are not there.
///
/// # Errors
/// More than the system has addresses for.
pub fn zeros(len: usize) -> std::io::Result<SharedBytes> {
    let map = MmapOptions::new().len(len.max(1)).no_reserve_swap().map_anon()?.make_read_only()?;
    Ok(SharedBytes::new(Arc::new(Zeros(map))))
}

/// Reads and parses a JSON file.
///
/// # Errors
/// A file that cannot be read, is larger than any JSON file in use, or is no JSON; the file is named.
pub fn read_json(path: &Path) -> Result<Value, Error> {
    let io = |error| Error::Read { path: path.to_owned(), error };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > MAX_JSON_BYTES {
        return Err(Error::FileTooLarge { bytes, limit: MAX_JSON_BYTES }.at(path));
    }
    let text = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&text).map_err(|error| Error::Json { error }.at(path))
}
