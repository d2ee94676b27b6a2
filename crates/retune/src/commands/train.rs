//! `retune train`: a run, from its file to an adapter (or a fine-tuned model) and what it gained.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use retune_adapter::{AdapterFile, LoraConfig};
use retune_formats::atomic;
use retune_kernels::parallel;
use retune_model::adapter::{AdapterPlan, linear_modules};
use retune_model::calibration::{self, Choice};
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{self, MergeOptions};
use retune_model::generate::{Generation, Sampling};
use retune_model::model::{Model, Trainable};
use retune_model::workspace::Workspace;
use retune_text::tokenizer::Tokenizer;
use retune_train::data::{Example, RowText, read_rows};
use retune_train::run_config::{ActivationCheckpointing, Method, RunConfig};
use retune_train::state::{self, Progress as RunProgress};
use retune_train::trainer::{Observer, Outcome, Passes, Trainer, largest_pass};
use serde_json::{Value, json};

use super::data::problems;
use super::print_json;
use crate::args::TrainArgs;
use crate::memory::{self, human};
use crate::progress::{Progress, watch_interrupts};
use crate::run_data::RunData;
use crate::{compute, fetch, session};

/// Held-out rows answered by the base and by the adapted model at the end.
const SAMPLES: usize = 3;
const SAMPLE_TOKENS: usize = 48;
/// What the program takes beside weights, activations and optimizer: its own code, the tokenizer, the data.
const PROGRAM_BYTES: usize = 60 << 20;

/// The files of a run's output folder.
struct RunFolder {
    root: PathBuf,
}

impl RunFolder {
    fn config(&self) -> PathBuf {
        self.root.join("run.json")
    }

    fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// How each linear is computed.
    fn calibration(&self) -> PathBuf {
        self.root.join("calibration.safetensors")
    }

    /// In what pieces the run computes.
    fn passes(&self) -> PathBuf {
        self.root.join("passes.json")
    }

    fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    fn result(&self, method: Method) -> PathBuf {
        self.root.join(if method == Method::Full { "model" } else { "adapter" })
    }

    /// Makes the folder ready for a run that starts (or, with `resume`, goes on) and keeps other processes out of it for as long as the
    /// result lives: refuses to mix runs.
    fn prepare(&self, run: &Value, config: &RunConfig, args: &TrainArgs) -> Result<Option<File>> {
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
        let folders = [self.checkpoints(), self.result(Method::Lora), self.result(Method::Full)];
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
    fn lock(&self) -> Result<Option<File>> {
        // A system that opens no folders, or a file system without locks, keeps nobody out, and is no reason not to train.
        let Ok(folder) = File::open(&self.root) else { return Ok(None) };
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => {
                bail!("another retune is training in {}: wait for it, or set another output_dir", self.root.display())
            }
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(folder)),
        }
    }

    /// Removes what the earlier run left, unless the new one reads from it.
    fn clear(&self, config: &RunConfig) -> Result<()> {
        let folders = [self.checkpoints(), self.result(Method::Lora), self.result(Method::Full)];
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

    fn check_same(&self, run: &Value) -> Result<()> {
        let root = self.root.display();
        let text = fs::read_to_string(self.config()).with_context(|| format!("cannot read {root}/run.json"))?;
        let earlier: Value = serde_json::from_str(&text)
            .with_context(|| format!("{root}/run.json is damaged; start anew with --overwrite"))?;
        if let Some(difference) = first_difference("", &earlier, run) {
            bail!(
                "the run in {root} was started with another configuration: {difference}. Restore it, start anew with --overwrite, \
                 or set another output_dir"
            );
        }
        Ok(())
    }

    fn partial_model(&self) -> PathBuf {
        self.root.join(".model.partial")
    }

    /// Removes what a kill in the middle of a write left. Best effort: it is in nobody's way.
    fn remove_leftovers(&self) {
        let _ = fs::remove_dir_all(self.partial_model());
        for entry in fs::read_dir(self.checkpoints()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(".tmp") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// The first key in which two configurations differ.
fn first_difference(key: &str, earlier: &Value, now: &Value) -> Option<String> {
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

/// Everything of a run that does not change while it trains.
struct Run<'a> {
    /// When the program was asked for it.
    start: Instant,
    args: &'a TrainArgs,
    config: RunConfig,
    folder: RunFolder,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    data: RunData,
    /// The adapter's configuration; of no matter in full fine-tuning.
    adapter: LoraConfig,
    /// The adapter to start from.
    initial: Option<AdapterFile>,
    /// What `run.json` says.
    record: Value,
}

/// Trains; `threads` says that the command line chose their number already.
pub fn run(args: &TrainArgs, threads: Option<usize>) -> Result<()> {
    let begin = Instant::now();
    let config = RunConfig::load(&args.run.path, &args.run.overrides)?;
    match (threads, config.threads) {
        (None, Some(n)) => {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build()?;
            pool.install(|| parallel::awake(|| start(args, config, begin)))
        }
        _ => start(args, config, begin),
    }
}

fn start(args: &TrainArgs, config: RunConfig, start: Instant) -> Result<()> {
    let path = fetch::resolve_or_fetch(&config.model, &|message| note!("{message}"))?;
    let checkpoint = Checkpoint::open(&path)?;
    checkpoint.check_finite()?;
    let tokenizer = checkpoint.tokenizer()?;
    let data = RunData::load(&config, &tokenizer)?;
    let initial = match &config.adapter_init {
        Some(directory) => Some(session::adapted(&checkpoint, directory)?.2),
        None => None,
    };
    let adapter = config.adapter.clone().or_else(|| initial.as_ref().map(|file| file.config.clone()));
    let adapter = adapter.unwrap_or_default();
    let mut record = serde_json::to_value(&config)?;
    if let Some(record) = record.as_object_mut() {
        // The number of threads changes no byte of the result.
        record.remove("threads");
    }
    record["retune"] = json!(env!("CARGO_PKG_VERSION"));
    if config.method == Method::Lora {
        record["adapter"] = serde_json::to_value(&adapter)?;
    }
    record["adapter_init_hash"] = json!(initial.as_ref().map(tensors_hash));
    record["base_content_hash"] = json!(checkpoint.content_hash());
    record["train_rows_hash"] = json!(rows_hash(&data.train.examples));
    record["eval_rows_hash"] = json!(data.eval.as_ref().map(|eval| rows_hash(&eval.examples)));
    record["isa"] = json!(retune_kernels::isa::isa().to_string());
    let folder = RunFolder { root: config.output_dir.clone() };
    Run { start, args, config, folder, checkpoint, tokenizer, data, adapter, initial, record }.train()
}

/// A hash of an adapter's values.
fn tensors_hash(file: &AdapterFile) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for (name, (_, values)) in &file.tensors {
        hash.update(name.as_bytes());
        values.iter().for_each(|v| hash.update(v.to_le_bytes()));
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A hash of the tokens trained on and of which of them are targets.
fn rows_hash(examples: &[Example]) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for example in examples {
        hash.update((example.ids.len() as u64).to_le_bytes());
        example.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        example.trained.iter().for_each(|&trained| hash.update([u8::from(trained)]));
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Run<'_> {
    fn train(&self) -> Result<()> {
        let Run { config, folder, data, .. } = self;
        let (mut model, params) = self.model()?;
        self.print_start(&model);
        self.check_memory(&model, self.computes_int8())?;
        let _lock = folder.prepare(&self.record, config, self.args)?;
        let choices = self.choose_compute(&mut model, &params)?;
        let int8 = choices.iter().any(|choice| choice.int8);
        if int8 != self.computes_int8() {
            self.check_memory(&model, int8)?;
        }
        watch_interrupts()?;

        let eval = data.eval.as_ref().map_or(&[][..], |e| &e.examples);
        let training = &config.training;
        // Steps do not read what is kept in 8 bits from the files any more.
        self.checkpoint.release();
        let passes = self.choose_passes(&model, int8)?;
        let mut trainer =
            Trainer::new(&model, training, passes, config.data.shuffle, &data.train.examples, eval, params);
        if self.args.resume {
            self.take_up(&mut trainer)?;
        }
        let RunProgress { step, total_steps, .. } = trainer.progress;
        let mut progress = Progress::new(&folder.metrics(), step, total_steps)?;
        if trainer.progress.initial_loss.is_none() && !eval.is_empty() {
            progress.evaluation(&trainer.score_untrained()?)?;
        }
        let outcome = trainer.run(&folder.checkpoints(), &mut progress)?;
        progress.finish();
        if let Outcome::Interrupted { step } = outcome {
            let file = shell_word(&self.args.run.path.to_string_lossy());
            let overrides: String =
                self.args.run.overrides.iter().map(|o| format!(" --set {}", shell_word(o))).collect();
            note!("stopped after step {step} of {total_steps}; everything is saved. Go on with:");
            note!("  {} train {file}{overrides} --resume", program());
            std::process::exit(130);
        }
        let progress = trainer.progress.clone();
        let mut params = std::mem::take(&mut trainer.params);
        drop(trainer);
        if progress.best_loss.is_some() && progress.best_step != progress.total_steps {
            state::read_best(&folder.checkpoints(), progress.best_step, &mut params)?;
        }
        let out = self.write_result(&model, &params, &progress, &choices)?;
        let samples = self.samples(&model.in_f32(), &params, eval)?;
        self.report(&model, &progress, &out, &samples, &choices)
    }

    /// The model with what is to be trained, and its first parameters.
    fn model(&self) -> Result<(Model, Vec<f32>)> {
        let Run { config, checkpoint, .. } = self;
        let init = &self.adapter.init_lora_weights;
        let seed = config.training.seed;
        if config.method == Method::Full {
            let model = Model::load(checkpoint, Trainable::Everything)?;
            let params = model.initial_params(checkpoint, init, seed)?;
            return Ok((model, params));
        }
        let plan = match (&config.adapter, &self.initial) {
            // What lies on disk is taken as peft takes it.
            (None, Some(file)) => AdapterPlan::to_continue(file, checkpoint)?,
            // The texts begin with the key; its section is known here.
            _ => AdapterPlan::new(&self.adapter, checkpoint).map_err(|error| anyhow!("adapter.{error}"))?,
        };
        let model = Model::load(checkpoint, Trainable::Adapter(&plan))?;
        if let Some(file) = &self.initial {
            let theirs = AdapterPlan::for_file(file, checkpoint)?.targets;
            let scaling = |module: &str| plan.targets.iter().find(|t| t.module == module).map(|t| t.scaling);
            if let Some(theirs) = theirs.iter().find(|t| scaling(&t.module).is_some_and(|ours| ours != t.scaling)) {
                bail!(
                    "{} was made with another `adapter` than this run asks for: it scales {} by {}, the run by {}; give the run the same \
                     lora_alpha, r and use_rslora, or leave `adapter` out to take them from there",
                    config.adapter_init.as_deref().unwrap_or(Path::new("adapter_init")).display(),
                    theirs.module,
                    theirs.scaling,
                    scaling(&theirs.module).unwrap_or_default()
                );
            }
        }
        let params = match (&self.initial, &config.adapter_init) {
            (Some(file), Some(directory)) => model.params_from(&file.tensors).with_context(|| {
                format!("{} was made with another `adapter` than this run asks for", directory.display())
            })?,
            _ => model.initial_params(checkpoint, init, seed)?,
        };
        Ok((model, params))
    }

    /// Whether what was decided when the run began is to be read from this file again.
    fn decided(&self, path: &Path) -> Result<bool> {
        if self.args.resume && !path.exists() && !state::list(&self.folder.checkpoints())?.is_empty() {
            bail!(
                "{} is missing: it says how the run computes, and without it --resume could not go on with the same bytes. Restore it, or \
                 start anew with --overwrite",
                path.display()
            );
        }
        Ok(self.args.resume && path.exists())
    }

    /// Decides in what pieces the run computes: the same as when it began, or it does not go on.
    fn choose_passes(&self, model: &Model, int8: bool) -> Result<Passes> {
        let (path, passes) = (self.folder.passes(), self.passes(model, int8));
        if self.decided(&path)? {
            let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let decided: Passes = serde_json::from_slice(&text)
                .with_context(|| format!("{} is damaged; start anew with --overwrite", path.display()))?;
            if decided != passes {
                bail!(
                    "{} says {}, but this run computes with {}: the file was changed, or another version of retune wrote it; start anew \
                     with --overwrite",
                    path.display(),
                    json!(decided),
                    json!(passes)
                );
            }
            return Ok(passes);
        }
        atomic::write(&path, format!("{:#}\n", serde_json::to_value(passes)?).as_bytes())?;
        Ok(passes)
    }

    /// Decides how each linear is computed, or does as was decided when the run began.
    fn choose_compute(&self, model: &mut Model, params: &[f32]) -> Result<Vec<Choice>> {
        let path = self.folder.calibration();
        let choices = if self.decided(&path)? {
            let choices = calibration::read(&path)?;
            if self.computes_int8() {
                let computed = model.compute_as(&choices);
                if computed.is_err() && choices.is_empty() {
                    bail!(
                        "{} is of a run in f32, this one computes in int8: go on where that run began, or start anew with --overwrite",
                        path.display()
                    );
                }
                computed?;
            } else if !choices.is_empty() {
                bail!("{} is of a run in int8, this one computes in f32; start anew with --overwrite", path.display());
            }
            choices
        } else {
            let pass = compute::calibration_pass(&self.data.train.examples);
            let choices = match self.config.method {
                Method::Lora => compute::apply(model, params, self.config.base.compute, &pass, true)?,
                Method::Full => Vec::new(),
            };
            calibration::write(&path, &choices)?;
            choices
        };
        let mut label = "compute ";
        for line in compute::describe(&choices) {
            note!("{label} {line}");
            label = "        ";
        }
        Ok(choices)
    }

    fn print_start(&self, model: &Model) {
        let Run { config, data, .. } = self;
        let (trained, base) = (model.layout.len(), model.parameters());
        let share = 100.0 * trained as f64 / base as f64;
        note!("model    {} ({:.1} M parameters)", config.model, base as f64 / 1e6);
        note!("         {}", self.checkpoint.path().display());
        note!("training {trained} parameters ({share:.2}%)");
        let report = &data.train.report;
        note!("data     {} rows, {} tokens, {} of them trained", report.examples, report.tokens, report.trained_tokens);
        for problem in problems(report) {
            note!("         ! {problem}");
        }
        if let Some(eval) = &data.eval {
            note!("held out {} rows, {} tokens scored", eval.report.examples, eval.report.trained_tokens);
            for problem in problems(&eval.report) {
                note!("         ! {problem}");
            }
        }
        let context = model.config.max_position_embeddings;
        if report.longest > context {
            note!("         ! the longest row has {} tokens, the model's context is {context}", report.longest);
        }
    }

    /// Whether the base is to be computed in 8 bits, as far as errors allow.
    fn computes_int8(&self) -> bool {
        self.config.method == Method::Lora && compute::limit(self.config.base.compute).is_some()
    }

    fn longest_row(&self) -> usize {
        let eval = self.data.eval.iter().flat_map(|eval| &eval.examples);
        self.data.train.examples.iter().chain(eval).map(|e| e.ids.len()).max().unwrap_or(0)
    }

    fn passes(&self, model: &Model, int8: bool) -> Passes {
        Passes::resolve(&self.config.training, model, int8, self.longest_row())
    }

    /// Says what the run will take with its base in 8 bits or in f32, and warns when that is more than is free.
    fn check_memory(&self, model: &Model, int8: bool) -> Result<()> {
        let training = &self.config.training;
        let passes = self.passes(model, int8);
        let eval = self.data.eval.as_ref().map_or(&[][..], |eval| &eval.examples);
        let size = largest_pass(training, passes, self.config.data.shuffle, &self.data.train.examples, eval);
        let file = self.checkpoint.file_bytes() as usize;
        let (trained, optimizer) = (2 * 4 * model.layout.len(), 2 * 4 * model.layout.len());
        let activations = Workspace::planned_bytes(model, passes.keep, int8, size);
        let (base, quantized) = if int8 {
            // Scoring reads the whole file beside what the steps keep; without it only the calibration does, before their memory is in use.
            let kept = model.stored_bytes_beside_int8();
            let stored = if eval.is_empty() { kept.max(file.saturating_sub(activations + optimizer)) } else { file };
            (stored, model.planned_int8_bytes())
        } else {
            (file, 0)
        };
        let total = (base + quantized + trained + optimizer + activations + PROGRAM_BYTES) as u64;
        note!(
            "memory   {} planned: base {}, in int8 {}, {} with its gradient {}, optimizer {}, activations {} for passes of {} tokens",
            human(total),
            human(base as u64),
            human(quantized as u64),
            if self.config.method == Method::Full { "model" } else { "adapter" },
            human(trained as u64),
            human(optimizer as u64),
            human(activations as u64),
            size.tokens,
        );
        let Some(available) = memory::available() else { return Ok(()) };
        if total > available {
            let layer = training.activation_checkpointing == ActivationCheckpointing::Layer;
            let ways: Vec<&str> = [
                (!layer).then_some("set training.activation_checkpointing=layer"),
                Some("lower training.tokens_per_pass or data.max_length"),
                Some(if self.config.method == Method::Full {
                    "train an adapter (method: lora)"
                } else {
                    "lower adapter.r"
                }),
            ]
            .into_iter()
            .flatten()
            .collect();
            note!("         ! only {} are free: {}", human(available), ways.join(", or "));
        }
        Ok(())
    }

    /// Goes on from the newest checkpoint, if there is one yet.
    fn take_up(&self, trainer: &mut Trainer) -> Result<()> {
        match state::list(&self.folder.checkpoints())?.last() {
            Some(checkpoint) => {
                trainer.resume(checkpoint)?;
                note!("going on after step {}", trainer.progress.step);
            }
            None => note!("no checkpoint yet: starting from the beginning"),
        }
        Ok(())
    }

    /// Writes the adapter or the whole model, and beside it where it comes from; returns its folder.
    fn write_result(
        &self,
        model: &Model,
        params: &[f32],
        progress: &RunProgress,
        choices: &[Choice],
    ) -> Result<PathBuf> {
        let Run { config, checkpoint, folder, .. } = self;
        let out = folder.result(config.method);
        if config.method == Method::Full {
            // Beside the final name first: an earlier model goes only when this one is whole.
            let partial = folder.partial_model();
            folder.remove_leftovers();
            let tensor = |name: &str| {
                let param = model.layout.params().iter().find(|p| p.name == name)?;
                Some(&params[param.range.clone()])
            };
            export::write_model(checkpoint, &tensor, &partial, &MergeOptions::default(), &mut |_, _| {})?;
            if out.exists() {
                fs::remove_dir_all(&out).with_context(|| format!("cannot replace {}", out.display()))?;
            }
            fs::rename(&partial, &out).with_context(|| format!("cannot write {}", out.display()))?;
        } else {
            let file = AdapterFile {
                config: self.adapter.clone(),
                base_model: Some(config.model.clone()),
                tensors: model.tensors_of(params),
            };
            file.write(&out, &linear_modules(&checkpoint.linear_modules()))?;
        }
        let provenance = json!({
            "run": self.record,
            "tokenizer_hash": self.tokenizer.content_hash(),
            "chat_template_hash": self.tokenizer.chat_template().map(|t| t.hash()),
            "compute": compute::summary(choices),
            "steps": progress.total_steps,
            "taken_from_step": if progress.best_loss.is_some() { progress.best_step } else { progress.total_steps },
            "held_out_loss_before": progress.initial_loss,
            "held_out_loss_after": progress.best_loss,
        });
        atomic::write(&out.join("retune.json"), format!("{provenance:#}\n").as_bytes())?;
        Ok(out)
    }

    /// Answers to a few held-out rows by the base and by what was trained.
    fn samples(&self, model: &Model, params: &[f32], eval: &[Example]) -> Result<Vec<Value>> {
        let base = Model::load(&self.checkpoint, Trainable::Nothing)?;
        let stop = self.tokenizer.eos_token_ids();
        let mut samples = Vec::new();
        // A row trained from its start has no prompt to answer.
        let answered = eval.iter().filter_map(|example| {
            let first = example.trained.iter().position(|&t| t)?;
            (first >= 2).then_some((example, first))
        });
        for (example, first) in answered.take(SAMPLES) {
            let prompt = &example.ids[..first];
            let last = example.trained[first..].iter().position(|&t| !t).map_or(example.ids.len(), |n| first + n);
            let answer = |model: &Model, params: &[f32]| {
                let ids = Generation::new(model, params, Sampling::GREEDY).run(prompt, SAMPLE_TOKENS, stop, |_| true);
                self.tokenizer.decode(&ids, true).trim().to_owned()
            };
            samples.push(json!({
                "row": example.row + 1,
                "reference": self.tokenizer.decode(&example.ids[first..last], true).trim(),
                "base": answer(&base, &[]),
                "trained": answer(model, params),
            }));
        }
        Ok(samples)
    }

    #[allow(clippy::too_many_arguments)]
    fn report(
        &self,
        model: &Model,
        progress: &RunProgress,
        out: &Path,
        samples: &[Value],
        choices: &[Choice],
    ) -> Result<()> {
        let seconds = self.start.elapsed().as_secs_f64();
        let size = folder_size(out);
        if self.args.json {
            print_json(&json!({
                "output": out,
                "bytes": size,
                "trainable_parameters": model.layout.len(),
                "steps": progress.total_steps,
                "tokens": progress.tokens,
                "held_out_loss_before": progress.initial_loss,
                "held_out_loss_after": progress.best_loss,
                "held_out_loss_last": progress.last_loss,
                "best_step": progress.best_step,
                "seconds": seconds,
                "compute": compute::summary(choices),
                "peak_rss_bytes": memory::peak_resident(),
                "samples": samples,
            }))?;
            return Ok(());
        }
        outln!();
        if let (Some(before), Some(after)) = (progress.initial_loss, progress.best_loss) {
            outln!("held-out loss  {before:.4} before, {after:.4} after");
        }
        for sample in samples {
            let text = |key: &str| sample[key].as_str().unwrap_or_default().replace('\n', " ");
            outln!("\n  held-out row {}", sample["row"]);
            outln!("    reference  {}", text("reference"));
            outln!("    base       {}", text("base"));
            outln!("    trained    {}", text("trained"));
        }
        let what = if self.config.method == Method::Full { "model  " } else { "adapter" };
        let peak = memory::peak_resident().map_or_else(|| "unknown".to_owned(), human);
        outln!("\n{what}        {} ({})", out.display(), human(size));
        outln!("took           {seconds:.0} s, peak memory {peak}");
        let (program, path) = (program(), shell_word(&out.to_string_lossy()));
        let model = match self.config.method {
            Method::Full => format!("--model {path}"),
            Method::Lora => format!("--model {} --adapter {path}", shell_word(&self.config.model)),
        };
        let question = self.first_question().unwrap_or_else(|| "Once upon a time".to_owned());
        outln!("\nNext:");
        outln!("  {program} generate {model} {}", shell_word(&question));
        outln!("  {program} inspect {path}");
        match (self.config.method, &self.config.data.eval) {
            (Method::Full, None) => {}
            (Method::Full, Some(eval)) => {
                outln!("  {program} eval {model} --data {}", shell_word(&eval.to_string_lossy()));
            }
            (Method::Lora, _) => {
                let merged = format!("{}-merged", self.folder.root.to_string_lossy());
                outln!("  {program} merge {model} --out {}", shell_word(&merged));
            }
        }
        Ok(())
    }

    /// What the first held-out row asks, or the first row: something to try the result with, no longer than a line.
    fn first_question(&self) -> Option<String> {
        const LONGEST: usize = 120;
        let data = &self.config.data;
        let path = data.eval.as_ref().unwrap_or(&data.train);
        let file = read_rows(path, data.format, &data.columns).ok()?;
        let text = match &file.rows.first()?.text {
            RowText::Chat(messages) => messages.iter().find(|message| message.role == "user")?.content.clone(),
            RowText::PromptCompletion { prompt, .. } => prompt.clone(),
            RowText::Instruction { instruction, input, .. } => format!("{instruction} {input}"),
            RowText::Text(text) => text.clone(),
        };
        let mut question = String::new();
        for word in text.split_whitespace() {
            if question.len() + word.len() >= LONGEST {
                break;
            }
            question.push_str(if question.is_empty() { "" } else { " " });
            question.push_str(word);
        }
        Some(question).filter(|question| !question.is_empty())
    }
}

/// This program as it was called.
fn program() -> String {
    std::env::args().next().map_or_else(|| "retune".to_owned(), |name| shell_word(&name))
}

/// A word as a shell reads it.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-=/:,+".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

fn folder_size(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter_map(|e| e.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
}
