//! What was found out about a model's files by reading all of them, kept so that the next command need not read them again.
//!
//! A stamp is a small JSON file in a folder of the cache. It is named after the files' canonical paths and holds their sizes and times of
//! change: where one of them differs, it says nothing. A stamp only saves time, so that one that cannot be read or written is no error.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::atomic;

/// Changes with what a stamp means: other programs' stamps are not believed.
const VERSION: u32 = 1;

/// What is known of the files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Whether every weight is a finite number.
    pub finite: bool,
    /// The hash of the weights.
    pub content_hash: Option<String>,
}

/// The place of the stamp of some files, and the files as they were when the place was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StampFile {
    path: PathBuf,
    files: Vec<FileState>,
}

/// A file by what changes with its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileState {
    path: String,
    bytes: u64,
    modified_ns: u64,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    files: Vec<FileState>,
    #[serde(flatten)]
    stamp: Stamp,
}

impl FileState {
    fn of(path: &Path) -> Option<Self> {
        let path = fs::canonicalize(path).ok()?;
        let metadata = fs::metadata(&path).ok()?;
        let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(Self {
            path: path.into_os_string().into_string().ok()?,
            bytes: metadata.len(),
            modified_ns: modified.as_nanos().try_into().ok()?,
        })
    }
}

impl StampFile {
    /// The stamp of these files, in `folder`; `None` where the system does not tell what a stamp needs to know of them.
    pub fn of(folder: &Path, files: &[PathBuf]) -> Option<Self> {
        let files: Vec<FileState> = files.iter().map(|path| FileState::of(path)).collect::<Option<_>>()?;
        let paths = files.iter().fold(Sha256::new(), |hash, file| hash.chain_update(&file.path).chain_update([0]));
        Some(Self { path: folder.join(format!("{:x}.json", paths.finalize())), files })
    }

    /// The name of these files in the cache: it follows from their paths, and not from what they hold.
    pub fn name(&self) -> &str {
        self.path.file_stem().and_then(OsStr::to_str).unwrap_or_default()
    }

    /// What is known of the files; nothing where they have changed since it was written.
    pub fn read(&self) -> Stamp {
        let text = fs::read(&self.path).unwrap_or_default();
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) if record.version == VERSION && record.files == self.files => record.stamp,
            _ => Stamp::default(),
        }
    }

    /// Writes what was found out, if that is possible, and if the files are still those that were looked at.
    pub fn write(&self, stamp: &Stamp) {
        let is_same = |file: &FileState| FileState::of(Path::new(&file.path)).as_ref() == Some(file);
        if !self.files.iter().all(is_same) {
            return;
        }
        let record = Record { version: VERSION, files: self.files.clone(), stamp: stamp.clone() };
        let Ok(text) = serde_json::to_vec_pretty(&record) else { return };
        if let Some(folder) = self.path.parent() {
            // What fails here fails again below.
            let _ = fs::create_dir_all(folder);
        }
        // A stamp that cannot be written saves no time, and does no harm.
        let _ = atomic::write(&self.path, &text);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::*;

    fn stamp() -> Stamp {
        Stamp { finite: true, content_hash: Some("abc".to_owned()) }
    }

    #[test]
    fn a_stamp_holds_until_a_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, files) = (dir.path().join("cache/stamps"), ["a", "b"].map(|name| dir.path().join(name)));
        files.iter().for_each(|path| fs::write(path, "1234").unwrap());
        let of = |files: &[PathBuf]| StampFile::of(&folder, files).unwrap();
        let all = of(&files);
        assert_eq!(all.read(), Stamp::default());
        all.write(&stamp());
        assert_eq!((all.read(), of(&files).read()), (stamp(), stamp()));
        assert_eq!(of(&files[..1]).read(), Stamp::default(), "other files");
        // By another way to the same files.
        assert_eq!(of(&["a", "b"].map(|name| dir.path().join("cache/..").join(name))).read(), stamp());

        let file = File::options().write(true).open(&files[1]).unwrap();
        let before = file.metadata().unwrap().modified().unwrap();
        file.set_modified(before + Duration::from_nanos(1)).unwrap();
        assert_eq!(of(&files).read(), Stamp::default(), "another time");
        // What was looked at is not what is there any more.
        all.write(&stamp());
        file.set_modified(before).unwrap();
        assert_eq!(of(&files).read(), stamp());
        file.set_len(3).unwrap();
        file.set_modified(before).unwrap();
        assert_eq!(of(&files).read(), Stamp::default(), "another size");
        fs::remove_file(&files[1]).unwrap();
        assert_eq!(StampFile::of(&folder, &files), None);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn a_stamp_that_is_damaged_or_cannot_be_written_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = [dir.path().join("file")];
        fs::write(&file[0], "1234").unwrap();
        let place = StampFile::of(dir.path(), &file).unwrap();
        place.write(&stamp());
        let text = fs::read_to_string(&place.path).unwrap();
        for changed in ["", "{", "[]", &text[..text.len() / 2], &text.replace("\"version\": 1", "\"version\": 2")] {
            fs::write(&place.path, changed).unwrap();
            assert_eq!(place.read(), Stamp::default(), "{changed}");
        }
        // A file stands where the folder would be.
        let nowhere = StampFile::of(&file[0], &file).unwrap();
        nowhere.write(&stamp());
        assert_eq!(nowhere.read(), Stamp::default());
    }
}
