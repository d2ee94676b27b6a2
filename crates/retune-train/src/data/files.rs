//! The bytes of data files: which files a path means, what is packed, and in what form the rows lie there.
//!
//! The content decides, not the name, where it can: a file is gzip, zstd or Parquet by how it begins.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Files of rows, or folders of such files: mostly one, or several whose rows are read one after another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "OneOrMany", into = "OneOrMany")]
#[schemars(with = "OneOrMany")]
pub struct Files(Vec<PathBuf>);

/// As a configuration says it.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum OneOrMany {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

impl From<OneOrMany> for Files {
    fn from(files: OneOrMany) -> Self {
        match files {
            OneOrMany::One(path) => Files(vec![path]),
            OneOrMany::Many(paths) => Files(paths),
        }
    }
}

impl From<Files> for OneOrMany {
    fn from(Files(mut paths): Files) -> Self {
        match (paths.pop(), paths.is_empty()) {
            (Some(path), true) => OneOrMany::One(path),
            (last, _) => OneOrMany::Many(paths.into_iter().chain(last).collect()),
        }
    }
}

impl<P: AsRef<Path> + ?Sized> From<&P> for Files {
    fn from(path: &P) -> Self {
        Files(vec![path.as_ref().to_owned()])
    }
}

impl Files {
    /// The files and folders as they were given.
    pub fn paths(&self) -> &[PathBuf] {
        &self.0
    }

    /// Their names, without the folders they are in.
    pub fn names(&self) -> String {
        let name =
            |path: &PathBuf| path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        self.0.iter().map(name).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, path) in self.0.iter().enumerate() {
            write!(f, "{}{}", if at > 0 { ", " } else { "" }, path.display())?;
        }
        Ok(())
    }
}

/// How rows lie in a file, as its name tells.
#[derive(Clone, Copy)]
enum Kind {
    Json,
    /// With the separator that the name tells.
    Table(Option<u8>),
    Parquet,
}

/// What a data file's name may end in, with or without `.gz` or `.zst` behind it.
const EXTENSIONS: [(&str, Kind); 7] = [
    ("jsonl", Kind::Json),
    ("ndjson", Kind::Json),
    ("json", Kind::Json),
    ("csv", Kind::Table(None)),
    ("tsv", Kind::Table(Some(b'\t'))),
    ("tab", Kind::Table(Some(b'\t'))),
    ("parquet", Kind::Parquet),
];

fn kind_of_name(path: &Path) -> Option<Kind> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = [".gz", ".zst"].iter().find_map(|packed| name.strip_suffix(packed)).unwrap_or(&name);
    let (_, extension) = name.rsplit_once('.')?;
    EXTENSIONS.iter().find(|(known, _)| *known == extension).map(|(_, kind)| *kind)
}

/// The files that a path means: itself, or the data files in the folder that it is, by name.
///
/// # Errors
/// A folder that cannot be read or holds no data file.
pub(super) fn files_of(path: &Path) -> Result<Vec<PathBuf>, Error> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let unreadable = |error| Error::Read { path: path.to_owned(), error };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        let is_hidden = file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(['.', '_']));
        if file.is_file() && !is_hidden && kind_of_name(&file).is_some() {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::EmptyFolder { path: path.to_owned() });
    }
    Ok(files)
}

/// What a data file holds, unpacked.
pub(super) enum Content {
    Json(String),
    /// With the separator that the name tells.
    Table(String, Option<u8>),
    /// Which is read piece by piece.
    Parquet,
}

/// Opens a data file.
///
/// # Errors
/// A file that cannot be read or unpacked; one of a kind that is not read, by its content or its name.
pub(super) fn open(path: &Path) -> Result<Content, Error> {
    let unreadable = |error| Error::Read { path: path.to_owned(), error };
    let mut begin = Vec::new();
    File::open(path).and_then(|file| file.take(4).read_to_end(&mut begin)).map_err(unreadable)?;
    if begin == b"PAR1" {
        return Ok(Content::Parquet);
    }
    let bytes = unpacked(path, std::fs::read(path).map_err(unreadable)?)?;
    if let Some(&(_, what, advice)) = OTHERS.iter().find(|(begins, ..)| bytes.starts_with(begins)) {
        return Err(Error::OtherFile { path: path.to_owned(), what, advice });
    }
    match kind_of_name(path) {
        Some(Kind::Parquet) => Err(Error::OtherFile {
            path: path.to_owned(),
            what: "no Parquet file, whatever its name says, or one that is cut off",
            advice: "fetch it again, or name it by what it is",
        }),
        Some(Kind::Json) => Ok(Content::Json(text(path, bytes)?)),
        Some(Kind::Table(separator)) => Ok(Content::Table(text(path, bytes)?, separator)),
        None => Err(Error::FileKind { path: path.to_owned() }),
    }
}

/// Kinds of files that are known by how they begin, and what to do with them.
const OTHERS: [(&[u8], &str, &str); 8] = [
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet (.xlsx)", "unpack it, or save the spreadsheet as CSV"),
    (b"BZh", "packed with bzip2", "unpack it with `bunzip2`"),
    (b"\xFD7zXZ\x00", "packed with xz", "unpack it with `unxz`"),
    (
        b"ARROW1",
        "an Arrow file, as `save_to_disk` of datasets makes it",
        "write it with `ds.to_parquet(path)` or `ds.to_json(path)`",
    ),
    (
        b"\xFF\xFF\xFF\xFF",
        "an Arrow stream, as datasets keeps in its cache",
        "write it with `ds.to_parquet(path)` or `ds.to_json(path)`",
    ),
    (b"SQLite format 3\0", "an SQLite database", "export the table as CSV"),
    (b"\x80\x04", "a Python pickle", "write the rows with `json.dumps`, one a line"),
    (b"%PDF", "a PDF document", "give rows of text: .jsonl, .csv or .parquet"),
];

/// What gzip or zstd packed; other bytes as they are.
fn unpacked(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
    let damaged = |what: &'static str| {
        move |error: std::io::Error| Error::Unpack { path: path.to_owned(), what, cause: error.to_string() }
    };
    let mut out = Vec::new();
    if bytes.starts_with(&[0x1F, 0x8B]) {
        flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut out).map_err(damaged("gzip"))?;
    } else if bytes.starts_with(&[0x28, 0xB5, 0x2F, 0xFD]) {
        // A file may be several frames one after another.
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let frame = ruzstd::decoding::StreamingDecoder::new(&mut rest).map_err(std::io::Error::other);
            frame.and_then(|mut frame| frame.read_to_end(&mut out)).map_err(damaged("zstd"))?;
        }
    } else {
        return Ok(bytes);
    }
    Ok(out)
}

/// Bytes as text, without the byte order mark some editors begin it with.
///
/// # Errors
/// Bytes that are not UTF-8, with the line.
fn text(path: &Path, bytes: Vec<u8>) -> Result<String, Error> {
    if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
        return Err(Error::OtherFile {
            path: path.to_owned(),
            what: "UTF-16, as Windows programs call Unicode text",
            advice: "save it as UTF-8",
        });
    }
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let before = error.as_bytes().iter().take(offset);
        let line = 1 + before.filter(|&&byte| byte == b'\n').count();
        Error::NotUtf8 { path: path.to_owned(), line, offset }
    })?;
    if text.starts_with('\u{FEFF}') {
        text.drain(..'\u{FEFF}'.len_utf8());
    }
    Ok(text)
}

/// A text file that is no data file.
///
/// # Errors
/// A file that cannot be read; one that is not UTF-8, with the line.
pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = std::fs::read(path).map_err(|error| Error::Read { path: path.to_owned(), error })?;
    text(path, bytes)
}
