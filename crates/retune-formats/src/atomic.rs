//! Writing files so that no half-written one is ever found under its final name: the bytes go to a temporary name in the same
//! directory, are flushed to the disk, and are renamed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// A file that is being written, piece by piece, under a temporary name. Dropping it removes it.
#[derive(Debug)]
pub struct Draft {
    file: File,
    staged: Staged,
}

impl Draft {
    /// Begins a file that is to be at `path`.
    ///
    /// # Errors
    /// [`Error::NotAPlainFile`]; [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self, Error> {
        if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(Error::NotAPlainFile { path: path.to_owned() });
        }
        // A link is followed: the file it points to is replaced, not the link.
        let path = match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_symlink() => fs::canonicalize(path).map_err(io_error("write", path))?,
            _ => path.to_owned(),
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.tmp"));
        let file = File::create(&temporary).map_err(io_error("write", &path))?;
        Ok(Self { file, staged: Staged { temporary, path, committed: false } })
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// [`Error::Io`], such as a full disk.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(io_error("write", &self.staged.path))
    }

    /// Flushes the whole file to the disk.
    ///
    /// # Errors
    /// As [`Draft::write_all`].
    pub fn finish(self) -> Result<Staged, Error> {
        self.file.sync_all().map_err(io_error("write", &self.staged.path))?;
        Ok(self.staged)
    }
}

/// A file that is written and flushed, but not yet under its name. Dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    temporary: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl Staged {
    /// Writes what `fill` gives, under a temporary name beside `path`.
    ///
    /// # Errors
    /// [`Error::NotAPlainFile`]; [`Error::Io`], such as a full disk. Nothing is left behind then.
    pub fn new(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<Self, Error> {
        let mut draft = Draft::create(path)?;
        fill(&mut draft.file).map_err(io_error("write", &draft.staged.path))?;
        draft.finish()
    }

    /// Where the file is until it gets its name, to be looked at before.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives the file its name, replacing what had it.
    ///
    /// # Errors
    /// [`Error::Io`]; the old file is untouched then.
    pub fn commit(mut self) -> Result<(), Error> {
        fs::rename(&self.temporary, &self.path).map_err(io_error("write", &self.path))?;
        self.committed = true;
        sync_directory(&self.path)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: the name is a temporary one, and the error that matters has been reported.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole file.
///
/// # Errors
/// As [`Staged::new`] and [`Staged::commit`].
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    Staged::new(path, |file| file.write_all(bytes))?.commit()
}

#[cfg(unix)]
fn sync_directory(path: &Path) -> Result<(), Error> {
    let Some(dir) = path.parent() else { return Ok(()) };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("write", dir))
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> Result<(), Error> {
    Ok(()) // elsewhere a directory cannot be opened, and a rename needs no flush
}

/// Makes the error of a refused `action` on a file from the system's.
pub fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |error| Error::Io { action, path, error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write(&path, b"old").unwrap();
        let full = |file: &mut File| {
            file.write_all(b"half of the ne")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        };
        assert!(matches!(Staged::new(&path, full), Err(Error::Io { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_plain_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(write(dir.path(), b"new"), Err(Error::NotAPlainFile { .. })));
        assert!(dir.path().is_dir());
    }
}
