//! The output folder of a comparison, and what keeps two of them apart.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use retune_formats::atomic;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::run_folder::{RunFolder, first_difference};

/// The files of a comparison's output folder.
pub struct Folder {
    pub root: PathBuf,
}

impl Folder {
    /// What is compared: a comparison goes on only if it is asked for the same.
    fn plan(&self) -> PathBuf {
        self.root.join("plan.json")
    }

    /// What was decided from the state of the machine when it began.
    pub fn decided(&self) -> PathBuf {
        self.root.join("decided.json")
    }

    pub fn training_rows(&self) -> PathBuf {
        self.root.join("data/train.jsonl")
    }

    pub fn held_out_rows(&self) -> PathBuf {
        self.root.join("data/held-out.jsonl")
    }

    /// The text that every variant may forget.
    pub fn neutral_rows(&self) -> PathBuf {
        self.root.join("data/neutral.jsonl")
    }

    /// The output folder of a run.
    pub fn run(&self, slug: &str) -> PathBuf {
        self.root.join("runs").join(slug)
    }

    /// Its run file.
    pub fn run_file(&self, slug: &str) -> PathBuf {
        self.root.join("runs").join(format!("{slug}.run.json"))
    }

    /// What it said while it ran.
    pub fn log(&self, slug: &str) -> PathBuf {
        self.root.join("runs").join(format!("{slug}.log"))
    }

    /// What came of it: the run is finished when this file is there.
    pub fn record(&self, slug: &str) -> PathBuf {
        self.root.join("runs").join(format!("{slug}.result.json"))
    }

    pub fn predictions(&self, slug: &str) -> PathBuf {
        self.root.join("predictions").join(format!("{slug}.jsonl"))
    }

    /// What was made of the neutral text.
    pub fn neutral_predictions(&self, slug: &str) -> PathBuf {
        self.root.join("predictions/neutral").join(format!("{slug}.jsonl"))
    }

    pub fn results(&self) -> PathBuf {
        self.root.join("results.json")
    }

    pub fn csv(&self) -> PathBuf {
        self.root.join("results.csv")
    }

    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// Makes the folder ready, and keeps other processes out of it for as long as the result lives: refuses to mix comparisons, and to write among
    /// somebody else's files. `used` is what the comparison reads.
    pub fn prepare(&self, plan: &Value, overwrite: bool, used: &[&Path]) -> Result<Option<File>> {
        let root = self.root.display();
        let holds_one = self.plan().exists();
        if !holds_one {
            let mut entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
            if !entries.all(|entry| entry.file_name() == ".plan.json.tmp") {
                bail!(
                    "{root} exists and is not empty, but holds no comparison (plan.json): set another output_dir (--out)"
                );
            }
            fs::create_dir_all(&self.root)
                .with_context(|| format!("cannot create {root}; set another output_dir (--out)"))?;
        }
        let lock = RunFolder { root: self.root.clone() }.lock()?;
        if holds_one && overwrite {
            self.clear(used)?;
        }
        if self.plan().exists() {
            let earlier: Value = read_json(&self.plan())?;
            if let Some((_, difference)) = first_difference("", &earlier, plan) {
                bail!(
                    "{root} holds another comparison: {difference}. Restore that to go on with it, start anew with --overwrite, or set another \
                     output_dir (--out)"
                );
            }
            note!("going on with the comparison in {root}");
        }
        // Before anything else is there: without it the folder is somebody else's.
        write_json(&self.plan(), plan)?;
        for folder in ["data", "runs", "predictions/neutral"].map(|name| self.root.join(name)) {
            fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        Ok(lock)
    }

    /// Removes an earlier comparison, unless this one reads from it.
    fn clear(&self, used: &[&Path]) -> Result<()> {
        let root = self.root.canonicalize().unwrap_or_else(|_| self.root.clone());
        if used.iter().filter_map(|path| path.canonicalize().ok()).any(|path| path.starts_with(&root)) {
            bail!(
                "this comparison reads from {}, which --overwrite would delete: set another output_dir (--out)",
                root.display()
            );
        }
        for folder in ["data", "runs", "predictions"].map(|name| self.root.join(name)) {
            if folder.exists() {
                fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            }
        }
        for file in [self.decided(), self.results(), self.csv(), self.report(), self.plan()] {
            if file.exists() {
                fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
            }
        }
        Ok(())
    }
}

/// Reads a file of this folder.
///
/// # Errors
/// A file that is damaged or missing.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged; start anew with --overwrite", path.display()))
}

/// Writes one, whole or not at all.
///
/// # Errors
/// What the system refuses.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = format!("{:#}\n", serde_json::to_value(value)?);
    Ok(atomic::write(path, text.as_bytes())?)
}
