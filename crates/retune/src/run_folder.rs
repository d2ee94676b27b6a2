//! The output folder of a run: its files, who may write there, and what is refused.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use retune_adapter::MethodInfo;
use retune_formats::atomic;
use retune_train::run_config::RunConfig;
use serde_json::Value;

use crate::args::TrainArgs;
use crate::card;

/// The key of run.json under which a hash of the base's configuration stands.
pub const CONFIG_HASH: &str = "base_config_hash";

/// The files of a run's output folder.
pub struct RunFolder {
    pub root: PathBuf,
}

impl RunFolder {
    fn config(&self) -> PathBuf {
        self.root.join("run.json")
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// How each linear is computed.
    pub fn calibration(&self) -> PathBuf {
        self.root.join("calibration.safetensors")
    }

    /// In what pieces the run computes.
    pub fn passes(&self) -> PathBuf {
        self.root.join("passes.json")
    }

    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// Where the result of a method goes.
    pub fn result(&self, method: &MethodInfo) -> PathBuf {
        self.root.join(if method.saves_adapter() { "adapter" } else { "model" })
    }

    /// What a run leaves beside its records.
    fn results(&self) -> [PathBuf; 3] {
        [self.checkpoints(), self.root.join("adapter"), self.root.join("model")]
    }

    /// Makes the folder ready for a run that starts (or, with `resume`, goes on) and keeps other processes out of it for as long as the
    /// result lives: refuses to mix runs.
    pub fn prepare(&self, run: &Value, config: &RunConfig, args: &TrainArgs) -> Result<Option<File>> {
        let root = self.root.display();
        if !self.holds_a_run() {
            self.check_free(args)?;
            fs::create_dir_all(&self.root).with_context(|| format!("cannot create {root}; set another output_dir"))?;
        }
        let lock = self.lock()?;
        // Asked again: before the lock another process may have begun a run here, and ended it.
        if self.holds_a_run() {
            if args.overwrite {
                self.clear(config)?;
            } else if args.resume {
                self.check_same(run)?;
                self.remove_leftovers();
                return Ok(lock);
            } else {
                bail!(
                    "{root} holds a run already: go on with --resume, start anew with --overwrite, or set another output_dir"
                );
            }
        }
        atomic::write(&self.config(), format!("{run:#}\n").as_bytes())?;
        Ok(lock)
    }

    /// Refuses a folder that is somebody else's.
    fn check_free(&self, args: &TrainArgs) -> Result<()> {
        let root = self.root.display();
        // What a kill at the very start can leave does not count.
        let mut entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let is_empty = entries.all(|entry| entry.file_name() == ".run.json.tmp");
        if !is_empty && !args.overwrite {
            bail!(
                "{root} exists and is not empty, but holds no run of retune's (run.json): set another output_dir, or use --overwrite to \
                 put the run among its files"
            );
        }
        // Without run.json these are somebody else's, whatever their names.
        let folders = self.results();
        if let Some(folder) = folders.iter().find(|folder| folder.exists()) {
            bail!(
                "{} is there, but {root} holds no run of retune's (run.json): move it, or set another output_dir",
                folder.display()
            );
        }
        Ok(())
    }

    /// Whether there is a run.json of retune's, damaged or not: another program's of that name says nothing of what lies beside it.
    fn holds_a_run(&self) -> bool {
        let text = fs::read(self.config()).unwrap_or_default();
        let strange = serde_json::from_slice(&text).is_ok_and(|value: Value| value.get("retune").is_none());
        self.config().exists() && !strange
    }

    /// Keeps other processes out. The folder itself is locked, for a file in it can be replaced while somebody holds the old one.
    pub fn lock(&self) -> Result<Option<File>> {
        // A system that opens no folders, or a file system without locks, keeps nobody out, and is no reason not to train.
        let Ok(folder) = File::open(&self.root) else { return Ok(None) };
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => {
                bail!("another retune is at work in {}: wait for it, or set another output_dir", self.root.display())
            }
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(folder)),
        }
    }

    /// Removes what the earlier run left, unless the new one reads from it.
    fn clear(&self, config: &RunConfig) -> Result<()> {
        let folders = self.results();
        let data = &config.data;
        let used =
            [Some(Path::new(&config.model)), config.adapter_init.as_deref(), Some(&*data.train), data.eval.as_deref()];
        let used: Vec<PathBuf> = used.into_iter().flatten().filter_map(|path| fs::canonicalize(path).ok()).collect();
        for folder in folders.iter().filter_map(|folder| fs::canonicalize(folder).ok()) {
            if used.iter().any(|path| path.starts_with(&folder)) {
                bail!(
                    "this run reads from {}, which --overwrite would delete: set another output_dir",
                    folder.display()
                );
            }
        }
        if let Some(card) = folders.iter().find_map(|folder| card::edited(folder)) {
            bail!("{} was edited, and --overwrite would delete it: move it, or set another output_dir", card.display());
        }
        self.remove_leftovers();
        for folder in folders.iter().filter(|folder| folder.exists()) {
            fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        for file in [self.metrics(), self.calibration(), self.passes(), self.config()] {
            if file.exists() {
                fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
            }
        }
        Ok(())
    }

    /// Refuses to go on with a run of another configuration than the one that is here.
    pub fn check_same(&self, run: &Value) -> Result<()> {
        let root = self.root.display();
        let text = fs::read_to_string(self.config()).with_context(|| format!("cannot read {root}/run.json"))?;
        let earlier: Value = serde_json::from_str(&text)
            .with_context(|| format!("{root}/run.json is damaged; start anew with --overwrite"))?;
        // Runs of earlier versions do not say it.
        let mut run = run.clone();
        if earlier.get(CONFIG_HASH).is_none()
            && let Some(run) = run.as_object_mut()
        {
            run.remove(CONFIG_HASH);
        }
        if let Some(difference) = first_difference("", &earlier, &run) {
            bail!(
                "the run in {root} was started with another configuration: {difference}. Restore it, start anew with --overwrite, \
                 or set another output_dir"
            );
        }
        Ok(())
    }

    pub fn partial_model(&self) -> PathBuf {
        self.root.join(".model.partial")
    }

    /// Removes what a kill in the middle of a write left. Best effort: it is in nobody's way.
    pub fn remove_leftovers(&self) {
        let _ = fs::remove_dir_all(self.partial_model());
        for entry in fs::read_dir(self.checkpoints()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(".tmp") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// The first key in which two configurations differ.
pub fn first_difference(key: &str, earlier: &Value, now: &Value) -> Option<String> {
    match (earlier, now) {
        (Value::Object(a), Value::Object(b)) => {
            let keys = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k)));
            keys.into_iter().find_map(|k| {
                let name = if key.is_empty() { k.clone() } else { format!("{key}.{k}") };
                first_difference(&name, a.get(k).unwrap_or(&Value::Null), b.get(k).unwrap_or(&Value::Null))
            })
        }
        (a, b) if a == b => None,
        (a, b) if key == "isa" => Some(format!(
            "it computed with {a}, now it would with {b}, whose last digits differ (RETUNE_ISA={} goes on where the machine can)",
            a.as_str().unwrap_or_default()
        )),
        (a, b) => Some(format!("{key} was {a}, now it is {b}")),
    }
}
