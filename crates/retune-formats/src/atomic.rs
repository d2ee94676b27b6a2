//! Writing files and folders so that no half-written one is ever found under its final name: the bytes go to a temporary name in the same
//! directory, are flushed to the disk, and are renamed. What is added to line by line is here as well.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::fault::{self, Step};

/// Where a file or a folder lies while it is written.
pub fn temporary_of(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}.tmp", path.file_name().unwrap_or_default().to_string_lossy()))
}

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
        let temporary = temporary_of(&path);
        let file = fault::reach(Step::Create, &temporary).and_then(|()| File::create(&temporary));
        let file = file.map_err(io_error("write", &path))?;
        Ok(Self { file, staged: Staged { temporary, path, committed: false } })
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// [`Error::Io`], such as a full disk.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let path = &self.staged.path;
        fault::write(Step::Write, path, &mut self.file, bytes).map_err(io_error("write", path))
    }

    /// Flushes the whole file to the disk.
    ///
    /// # Errors
    /// As [`Draft::write_all`].
    pub fn finish(self) -> Result<Staged, Error> {
        let path = &self.staged.path;
        fault::reach(Step::Sync, path).and_then(|()| self.file.sync_all()).map_err(io_error("write", path))?;
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
    /// Writes these bytes, under a temporary name beside `path`.
    ///
    /// # Errors
    /// [`Error::NotAPlainFile`]; [`Error::Io`], such as a full disk. Nothing is left behind then.
    pub fn new(path: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let mut draft = Draft::create(path)?;
        draft.write_all(bytes)?;
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
        rename(&self.temporary, &self.path)?;
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
    Staged::new(path, bytes)?.commit()
}

/// Gives a file or a folder that is written and flushed its name.
///
/// # Errors
/// [`Error::Io`]; what had the name is untouched then.
pub fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fault::reach(Step::Rename, to).and_then(|()| fs::rename(from, to)).map_err(io_error("write", to))
}

/// A folder that is being written as a whole. Dropping it removes what was written.
///
/// A new one lies beside its final name until then. One that is there, and may be where another disk is mounted, has it within, and gets the
/// files one by one, the one without which it is nothing last.
#[derive(Debug)]
pub struct Folder {
    temporary: PathBuf,
    goal: PathBuf,
    last: &'static str,
    committed: bool,
}

impl Folder {
    /// Begins a folder that is to be at `path`; `last` is the file without which it is nothing. What an earlier try left goes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path, last: &'static str) -> Result<Self, Error> {
        let temporary = if path.exists() { path.join(".unfinished.tmp") } else { temporary_of(path) };
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(io_error("remove", &temporary))?;
        }
        let created = fault::reach(Step::Create, &temporary).and_then(|()| fs::create_dir_all(&temporary));
        created.map_err(io_error("create", &temporary))?;
        Ok(Self { temporary, goal: path.to_owned(), last, committed: false })
    }

    /// Where its files are to be written.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(mut self) -> Result<(), Error> {
        if self.temporary.parent() == Some(&self.goal) {
            let entries = fs::read_dir(&self.temporary).map_err(io_error("read", &self.temporary))?;
            let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
            names.sort_by_key(|name| name == self.last);
            for name in names {
                rename(&self.temporary.join(&name), &self.goal.join(&name))?;
            }
            return sync_directory(&self.temporary);
        }
        rename(&self.temporary, &self.goal)?;
        self.committed = true;
        sync_directory(&self.goal)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: the name is a temporary one, and the error that matters has been reported.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// A file that gets line after line at its end. A kill or a full disk may leave a part of the last one, which readers have to pass over.
#[derive(Debug)]
pub struct Lines {
    file: File,
    path: PathBuf,
}

impl Lines {
    /// Opens a file that may have lines.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file =
            fault::reach(Step::Create, path).and_then(|()| OpenOptions::new().create(true).append(true).open(path));
        Ok(Self { file: file.map_err(io_error("write", path))?, path: path.to_owned() })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// As [`Lines::open`].
    pub fn add(&mut self, line: &str) -> Result<(), Error> {
        let line = format!("{line}\n");
        fault::write(Step::Append, &self.path, &mut self.file, line.as_bytes()).map_err(io_error("write", &self.path))
    }
}

#[cfg(unix)]
fn sync_directory(path: &Path) -> Result<(), Error> {
    let Some(dir) = path.parent() else { return Ok(()) };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let synced = fault::reach(Step::SyncFolder, dir).and_then(|()| File::open(dir)?.sync_all());
    synced.map_err(io_error("write", dir))
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
    fn a_file_that_is_given_up_leaves_the_old_one_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write(&path, b"old").unwrap();
        let mut draft = Draft::create(&path).unwrap();
        draft.write_all(b"half of the ne").unwrap();
        drop(draft);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_is_there_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        for exists in [false, true] {
            let path = dir.path().join(format!("folder {exists}"));
            if exists {
                fs::create_dir(&path).unwrap();
            }
            let begin = || {
                let folder = Folder::create(&path, "last").unwrap();
                write(&folder.path().join("last"), b"1").unwrap();
                folder
            };
            // As a kill leaves it.
            std::mem::forget(begin());
            assert!(!path.join("last").exists());
            drop(begin());
            assert_eq!(path.exists(), exists);
            begin().commit().unwrap();
            assert_eq!(fs::read(path.join("last")).unwrap(), b"1");
            assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_no_plain_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(write(dir.path(), b"new"), Err(Error::NotAPlainFile { .. })));
        assert!(dir.path().is_dir());
    }
}
