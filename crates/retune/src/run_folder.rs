//! The output folder of a run: its files, who may write there, and what is refused.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use retune_adapter::MethodInfo;
use retune_adapter::files::{CONFIG_FILE, WEIGHTS_FILE};
use retune_formats::{atomic, tensorboard};
use retune_model::export;
use retune_train::run_config::RunConfig;
use retune_train::state;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::TrainArgs;
use crate::card;
use crate::figures::Figures;
use crate::session::PROVENANCE;

/// The key of run.json under which a hash of the base's configuration stands.
pub const CONFIG_HASH: &str = "base_config_hash";

/// The keys of run.json under which hashes of the rows stand.
pub const ROWS_HASHES: [&str; 2] = ["train_rows_hash", "eval_rows_hash"];
/// What else run.json has hashes of, in words.
const HASHED: [(&str, &str); 3] = [
    ("base_content_hash", "the weights of the model"),
    (CONFIG_HASH, "the model's configuration"),
    ("adapter_init_hash", "the adapter of adapter_init"),
];

/// A hash of each row that is trained on and that is held out, in the tokens that it is to the model: to say how many have changed.
#[derive(Serialize, Deserialize)]
pub struct RowHashes {
    pub train: Vec<u32>,
    pub eval: Vec<u32>,
}

/// Whether a file of this name is one that a run writes.
type IsOwn = fn(&str) -> bool;

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

    /// What rows the run began with.
    fn rows(&self) -> PathBuf {
        self.root.join("row_hashes.json")
    }

    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// What it knew of itself when it began.
    fn figures_file(&self) -> PathBuf {
        self.root.join("figures.json")
    }

    /// What came of it, as `train --json` prints it: the run is finished when this file is there.
    fn outcome_file(&self) -> PathBuf {
        self.root.join("result.json")
    }

    /// The page about it.
    pub fn page(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// Writes what is known when it begins.
    pub fn write_figures(&self, figures: &Figures) -> Result<()> {
        write_json(&self.figures_file(), figures)
    }

    /// What was known when it began; nothing of a run of an earlier version.
    pub fn figures(&self) -> Result<Option<Figures>> {
        read_json(&self.figures_file())
    }

    /// Writes what came of it. What is known of a run that took no step is known no better than when it took them.
    pub fn write_outcome(&self, outcome: &Value, has_trained: bool) -> Result<()> {
        let path = self.outcome_file();
        if has_trained || !path.exists() { write_json(&path, outcome) } else { Ok(()) }
    }

    /// What came of it; nothing where it has not ended.
    pub fn outcome(&self) -> Result<Option<Value>> {
        read_json(&self.outcome_file())
    }

    /// Its configuration and what stands beside that in its record; nothing where this is no run's folder.
    pub fn record(&self) -> Result<Option<Value>> {
        read_json(&self.config())
    }

    /// Whether another process is at work in it.
    pub fn is_busy(&self) -> bool {
        self.root.is_dir() && self.lock().is_err()
    }

    /// TensorBoard's event files.
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// Where the result of a method goes.
    pub fn result(&self, method: &MethodInfo) -> PathBuf {
        self.root.join(if method.saves_adapter() { "adapter" } else { "model" })
    }

    /// Whether a run's record lies in it.
    pub fn is_run(&self) -> bool {
        self.config().is_file()
    }

    /// Where a run writes an adapter, and where a model.
    pub fn written(&self) -> [PathBuf; 2] {
        ["adapter", "model"].map(|name| self.root.join(name))
    }

    /// What a run leaves beside its records: folders, and which of their files are a run's.
    fn results(&self) -> [(PathBuf, IsOwn); 3] {
        let [adapter, model] = self.written();
        let is_of_adapter = |name: &str| [CONFIG_FILE, WEIGHTS_FILE, PROVENANCE, card::CARD].contains(&name);
        let is_of_model = |name: &str| export::is_own(name) || name == PROVENANCE;
        [(self.checkpoints(), state::is_own), (adapter, is_of_adapter), (model, is_of_model)]
    }

    /// Makes the folder ready for a run that starts (or, with `resume`, goes on) and keeps other processes out of it for as long as the
    /// result lives: refuses to mix runs.
    pub fn prepare(&self, run: &Value, rows: &RowHashes, config: &RunConfig, args: &TrainArgs) -> Result<Option<File>> {
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
                self.check_same(run, rows, config)?;
                self.remove_leftovers();
                // A kill may have come between the two records.
                if !self.rows().exists() {
                    self.write_rows(rows)?;
                }
                return Ok(lock);
            } else {
                bail!(
                    "{root} holds a run already: go on with --resume, start anew with --overwrite, or set another output_dir"
                );
            }
        }
        if args.resume {
            note!("! {root} holds no run to go on with: this is a new one");
        }
        atomic::write(&self.config(), format!("{run:#}\n").as_bytes())?;
        self.write_rows(rows)?;
        Ok(lock)
    }

    fn write_rows(&self, rows: &RowHashes) -> Result<()> {
        Ok(atomic::write(&self.rows(), serde_json::to_string(rows)?.as_bytes())?)
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
        if let Some((folder, _)) = folders.iter().find(|(folder, _)| folder.exists()) {
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

    /// Removes what the earlier run left, unless the new one reads from it. What is none of its files stays.
    fn clear(&self, config: &RunConfig) -> Result<()> {
        let folders = self.results();
        let data = &config.data;
        let used = [Some(Path::new(&config.model)), config.adapter_init.as_deref()].into_iter().flatten();
        let used: Vec<PathBuf> =
            used.chain(data.files().map(PathBuf::as_path)).filter_map(|path| fs::canonicalize(path).ok()).collect();
        for folder in folders.iter().filter_map(|(folder, _)| fs::canonicalize(folder).ok()) {
            if used.iter().any(|path| path.starts_with(&folder)) {
                bail!(
                    "this run reads from {}, which --overwrite would delete: set another output_dir",
                    folder.display()
                );
            }
        }
        if let Some(card) = folders.iter().find_map(|(folder, _)| card::edited(folder)) {
            bail!("{} was edited, and --overwrite would delete it: move it, or set another output_dir", card.display());
        }
        let [_, results @ ..] = &folders;
        if let Some((folder, _)) = results.iter().find(|(folder, is_own)| is_of_others(folder, *is_own)) {
            bail!(
                "{} was not written by the run that --overwrite would replace: move it, or set another output_dir",
                folder.display()
            );
        }
        self.remove_leftovers();
        for (folder, is_own) in &folders {
            let others = remove_own(folder, *is_own)?;
            if !others.is_empty() {
                let (folder, others) = (folder.display(), others.join(", "));
                note!("! {folder} holds what the run did not write, which is left there: {others}");
            }
        }
        remove_own(&self.tensorboard(), tensorboard::is_own)?;
        let own = [
            self.metrics(),
            self.calibration(),
            self.passes(),
            self.rows(),
            self.figures_file(),
            self.outcome_file(),
            self.page(),
            self.config(),
        ];
        for file in own {
            if file.exists() {
                fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
            }
        }
        Ok(())
    }

    /// Refuses to go on with a run of another configuration than the one that is here.
    pub fn check_same(&self, run: &Value, rows: &RowHashes, config: &RunConfig) -> Result<()> {
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
        if let Some((key, difference)) = first_difference("", &earlier, &run) {
            if let Some(which) = ROWS_HASHES.iter().position(|name| *name == key) {
                bail!("{}", self.other_rows(which, rows, config));
            }
            let hashed = HASHED.iter().find(|(name, _)| *name == key);
            let difference = hashed.map_or(difference, |(_, what)| format!("{what} changed"));
            bail!(
                "the run in {root} was started with another configuration: {difference}. Restore it, start anew with --overwrite, \
                 or set another output_dir"
            );
        }
        Ok(())
    }

    /// Says that the rows to train on (`which` is 0) or held out (1) are others than when the run began, and how many.
    fn other_rows(&self, which: usize, rows: &RowHashes, config: &RunConfig) -> String {
        let (path, what) = match (which, &config.data.eval) {
            (0, _) => (&config.data.train, "rows to train on"),
            (_, Some(path)) => (path, "held-out rows"),
            (_, None) => (&config.data.train, "held-out rows"),
        };
        let now = [&rows.train, &rows.eval][which];
        let earlier = fs::read(self.rows()).ok().and_then(|text| serde_json::from_slice::<RowHashes>(&text).ok());
        let earlier = earlier.map(|RowHashes { train, eval }| if which == 0 { train } else { eval });
        let counted = earlier.map_or_else(String::new, |earlier| {
            let (new, gone) = (missing_from(&earlier, now), missing_from(now, &earlier));
            let (then, now) = (earlier.len(), now.len());
            match (new, gone) {
                (0, 0) => format!(": the same {now}, in another order"),
                _ => format!(": {new} are new and {gone} are gone ({then} then, {now} now)"),
            }
        });
        format!(
            "{} has other {what} than when the run in {} began{counted}. Restore the file, start anew with --overwrite, or set another \
             output_dir",
            path,
            self.root.display()
        )
    }

    /// Puts the model that was written beside in the place of the one that is there, and keeps what is none of a model's files.
    pub fn replace_model(&self) -> Result<()> {
        let ([_, model], partial) = (self.written(), self.partial_model());
        remove_own(&model, self.results()[2].1)?;
        if !model.exists() {
            return Ok(atomic::rename(&partial, &model)?);
        }
        let mut names: Vec<_> = fs::read_dir(&partial)?.flatten().map(|entry| entry.file_name()).collect();
        // A folder without it is no model.
        names.sort_by_key(|name| name == "config.json");
        for name in names {
            atomic::rename(&partial.join(&name), &model.join(&name))?;
        }
        fs::remove_dir(&partial).with_context(|| format!("cannot remove {}", partial.display()))
    }

    pub fn partial_model(&self) -> PathBuf {
        self.root.join(".model.partial")
    }

    /// Removes what a kill in the middle of a write left. Best effort: it is in nobody's way.
    pub fn remove_leftovers(&self) {
        let partial = self.partial_model();
        for folder in [atomic::temporary_of(&partial), partial] {
            let _ = fs::remove_dir_all(folder);
        }
        for entry in fs::read_dir(self.checkpoints()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(".tmp") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Reads a file of a run's folder; nothing where it is not there.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let found = serde_json::from_slice(&text);
    found.map(Some).with_context(|| format!("{} is damaged; start the run anew with --overwrite", path.display()))
}

/// Writes one, whole or not at all.
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    Ok(atomic::write(path, format!("{:#}\n", serde_json::to_value(value)?).as_bytes())?)
}

/// Whether a folder holds files such as a run's, and not its record, which a run leaves beside its result and nothing else does.
fn is_of_others(folder: &Path, is_own: IsOwn) -> bool {
    let mut entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let record = fs::read(folder.join(PROVENANCE)).unwrap_or_default();
    let is_run = |record: Value| record.pointer("/run/output_dir").is_some();
    entries.any(|entry| is_own(&entry.file_name().to_string_lossy()))
        && !serde_json::from_slice(&record).is_ok_and(is_run)
}

/// Removes a folder's files that are a run's, and the folder where nothing else is in it. Returns the names of what is left.
fn remove_own(folder: &Path, is_own: IsOwn) -> Result<Vec<String>> {
    let mut others = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.with_context(|| format!("cannot read {}", folder.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_leftover = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp")).is_some_and(is_own);
        if path.is_file() && (is_own(&name) || is_leftover) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        } else {
            others.push(name);
        }
    }
    // A link to a folder stays, with nothing in it.
    if others.is_empty() && folder.exists() && !folder.is_symlink() {
        fs::remove_dir(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    others.sort();
    Ok(others)
}

/// How many of `rows` are not among `others`; a row that is there twice is sought twice.
fn missing_from(others: &[u32], rows: &[u32]) -> usize {
    let mut left: BTreeMap<u32, usize> = BTreeMap::new();
    others.iter().for_each(|row| *left.entry(*row).or_default() += 1);
    let is_missing = |row: &&u32| match left.get_mut(row) {
        Some(count) if *count > 0 => {
            *count -= 1;
            false
        }
        _ => true,
    };
    rows.iter().filter(is_missing).count()
}

/// The first key in which two configurations differ, and how.
pub fn first_difference(key: &str, earlier: &Value, now: &Value) -> Option<(String, String)> {
    match (earlier, now) {
        (Value::Object(a), Value::Object(b)) => {
            let keys = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k)));
            keys.into_iter().find_map(|k| {
                let name = if key.is_empty() { k.clone() } else { format!("{key}.{k}") };
                first_difference(&name, a.get(k).unwrap_or(&Value::Null), b.get(k).unwrap_or(&Value::Null))
            })
        }
        (a, b) if a == b => None,
        (a, b) if key == "isa" => Some((
            key.to_owned(),
            format!(
                "it computed with {a}, now it would with {b}, whose last digits differ (RETUNE_ISA={} goes on where the machine can)",
                a.as_str().unwrap_or_default()
            ),
        )),
        (a, b) => Some((key.to_owned(), format!("{key} was {a}, now it is {b}"))),
    }
}
