//! `retune train`: a run, from its file to an adapter (or a fine-tuned model) and what it gained.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use retune_adapter::{AdapterFile, BaseModules, Full, Method, Texts, initial_params};
use retune_engine::calibrate::{Choice, Integers};
use retune_engine::compute::Compute;
use retune_engine::generate::{Generation, Sampling};
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_engine::params::ParamLayout;
use retune_engine::spec::ModelSpec;
use retune_formats::atomic;
use retune_kernels::parallel;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{self, ExportType, MergeOptions};
use retune_train::calibration;
use retune_train::data::{Example, Names};
use retune_train::run_config::{Int8Copy, ReportTo, RunConfig};
use retune_train::schedule::Schedule;
use retune_train::state::{self, Progress as RunProgress};
use retune_train::trainer::{Observer, Outcome, Passes, Trained, Trainer, schedule};
use serde_json::{Value, json};

use super::data::problems;
use super::{merge, print_json};
use crate::args::TrainArgs;
use crate::figures::Figures;
use crate::memory::{self, human};
use crate::memory_plan::{Planned, RunMemory};
use crate::parity::{Parity, Sample, Side};
use crate::progress::{Progress, Shown, watch_interrupts};
use crate::report::{Report, command, print_stopped};
use crate::run_data::{RunData, row_hash, rows_hash};
use crate::run_folder::{CONFIG_HASH, ROWS_HASHES, RowHashes, RunFolder};
use crate::session::{self, Base};
use crate::{End, compute, fetch, storage};

/// Held-out rows answered by the base and by the adapted model at the end.
const SAMPLES: usize = 3;
const SAMPLE_TOKENS: usize = 48;

/// Everything of a run that does not change while it trains.
struct Run<'a> {
    /// When the program was asked for it.
    start: Instant,
    args: &'a TrainArgs,
    config: RunConfig,
    folder: RunFolder,
    base: Base,
    data: RunData,
    method: Arc<dyn Method>,
    /// The adapter to start from.
    initial: Option<AdapterFile>,
    /// What `run.json` says.
    record: Value,
    rows: RowHashes,
}

/// Trains; `threads` says that the command line chose their number already.
pub fn run(args: &TrainArgs, threads: Option<usize>) -> Result<End> {
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

fn start(args: &TrainArgs, mut config: RunConfig, start: Instant) -> Result<End> {
    let path = fetch::resolve_or_fetch(&config.model, &|message| note!("{message}"))?;
    let mut base = Base::open(&path)?;
    base.check_finite()?;
    let data = RunData::load(&config, base.tokenizer()?, &base.checkpoint.spec)?;
    if let Some(directory) = &config.adapter_init {
        let theirs = storage::trained_on(&base, directory)?;
        if theirs != config.base.storage {
            let [theirs, ours] = [theirs, config.base.storage].map(|storage| json!(storage));
            note!(
                "! adapter_init was trained on a base held as {theirs}, and this run holds it as {ours} (base.storage)"
            );
        }
    }
    // What takes long comes after everything that can be wrong with the data.
    storage::hold(&mut base, config.base.storage)?;
    let initial = match &config.adapter_init {
        Some(directory) => Some(session::adapted(&base, directory)?.2),
        None => None,
    };
    let given = config.adapter.as_ref().map(|settings| settings.0.clone());
    let method = given.or_else(|| initial.as_ref().map(|file| file.method.clone())).unwrap_or_else(|| Arc::new(Full));
    if let Some(file) = &initial {
        let theirs = file.method.info();
        if *theirs != *config.method {
            bail!(
                "adapter_init is an adapter of method {}, this run trains with method {}; set method to {0}, or leave adapter_init out",
                theirs.name,
                config.method.name
            );
        }
        if let Some(setting) = method.start_settings().first() {
            bail!(
                "adapter.{setting} says how an adapter starts, and adapter_init gives one that has started; remove one of them"
            );
        }
    }
    config.training.learning_rate.get_or_insert(method.learning_rate());
    let mut record = serde_json::to_value(&config)?;
    if let Some(record) = record.as_object_mut() {
        // Neither threads nor a copy in 8 bits change a byte of the result, and how that is written none of the run.
        record.remove("threads");
        record.remove("export");
        if let Some(base) = record.get_mut("base").and_then(Value::as_object_mut) {
            base.remove("int8_copy");
        }
    }
    record["retune"] = json!(env!("CARGO_PKG_VERSION"));
    record["adapter"] = method.settings()?;
    record["adapter_init_hash"] = json!(initial.as_ref().map(tensors_hash));
    record["base_content_hash"] = json!(base.content_hash());
    record[CONFIG_HASH] = json!(text_hash(&base.checkpoint.config_json().to_string()));
    let [train_hash, eval_hash] = ROWS_HASHES;
    record[train_hash] = json!(rows_hash(&data.train.examples));
    record[eval_hash] = json!(data.eval.as_ref().map(|eval| rows_hash(&eval.examples)));
    let hashes = |examples: &[Example]| examples.iter().map(row_hash).collect();
    let held_out = data.eval.as_ref().map_or(&[][..], |eval| &eval.examples);
    let rows = RowHashes { train: hashes(&data.train.examples), eval: hashes(held_out) };
    record["isa"] = json!(retune_kernels::isa::isa().to_string());
    let bits = retune_kernels::isa::int8_isa().bits();
    if bits != 8 && config.method.saves_adapter() && compute::limit(config.base.compute).is_some() {
        record["int8_bits"] = json!(bits);
    }
    let folder = RunFolder { root: config.output_dir.clone() };
    Run { start, args, config, folder, base, data, method, initial, record, rows }.train()
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

fn text_hash(text: &str) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Refuses to go on from an adapter that means other things by the same tensors.
fn refuse_other_settings(spec: &ModelSpec, ours: &Overlay, theirs: &Overlay) -> Result<()> {
    let of_linears = spec.linears().zip(ours.linears.iter().zip(&theirs.linears)).filter_map(|(linear, changes)| {
        let (Some(ours), Some(theirs)) = (changes.0.low_rank.first(), changes.1.low_rank.first()) else { return None };
        Some((linear.name.as_str(), ours.scale, theirs.scale))
    });
    let tables = [(&ours.table_term, &theirs.table_term), (&ours.positions_term, &theirs.positions_term)];
    let of_tables = tables.into_iter().filter_map(|terms| match terms {
        (Some(ours), Some(theirs)) => Some(("a table", ours.scale, theirs.scale)),
        _ => None,
    });
    if let Some((name, ours, theirs)) = of_linears.chain(of_tables).find(|(_, ours, theirs)| ours != theirs) {
        bail!(
            "it scales {name} by {theirs}, the run by {ours}; give the run the same lora_alpha, r and use_rslora, or leave `adapter` out to take \
             them from there"
        );
    }
    for (ours, theirs) in [(&ours.table_rows, &theirs.table_rows), (&ours.head_rows, &theirs.head_rows)] {
        if let (Some(ours), Some(theirs)) = (ours, theirs)
            && ours.ids != theirs.ids
        {
            bail!(
                "its rows are those of the tokens {:?}, the run's of {:?}; give the run the same trainable_token_indices, or leave `adapter` out",
                theirs.ids,
                ours.ids
            );
        }
    }
    Ok(())
}

/// Refuses more before each row than the model's context holds.
fn refuse_long_prelude(spec: &ModelSpec, overlay: &Overlay) -> Result<()> {
    let (context, before) = (spec.context, overlay.prelude(spec).len());
    if before >= context {
        bail!(
            "adapter.num_virtual_tokens is {before}, and the model's context of {context} tokens has no room for a row after them; lower it, 20 are \
             usual"
        );
    }
    Ok(())
}

impl Run<'_> {
    fn train(&self) -> Result<End> {
        let Run { config, folder, data, .. } = self;
        let model = self.base.checkpoint.model()?;
        let mut overlay = self.overlay()?;
        let mut latent = self.method.reparameterisation(&model.spec, config.training.seed);
        if latent.is_some() && self.initial.is_some() {
            bail!(
                "adapter_init: the network that computes the rows of method {} is not in an adapter's file, so that it cannot be trained further; \
                 start without adapter_init",
                self.method.info().name
            );
        }
        let layout = latent.as_ref().map_or(&overlay.layout, |(map, _)| map.layout()).clone();
        session::refuse_long_rows(&model.spec, &overlay, &data.train.examples, "data.max_length")?;
        let held_out = data.eval.as_ref().map_or(&[][..], |eval| &eval.examples);
        session::refuse_long_rows(&model.spec, &overlay, held_out, "data.max_length")?;
        self.check_warmup()?;
        if let (Some(patience), true) = (config.training.early_stopping_patience, held_out.is_empty()) {
            bail!(
                "training.early_stopping_patience is {patience}, and no row is held out to stop by: set data.eval, or a larger data.eval_fraction, \
                 or remove the key"
            );
        }
        self.print_start(&model, &overlay, layout.len())?;
        let params = self.first_params(&model, &mut overlay)?;
        refuse_long_prelude(&model.spec, &overlay)?;
        let mut memory = self.check_memory(&model, &overlay, &layout, self.computes_int8())?;
        let _lock = folder.prepare(&self.record, &self.rows, config, self.args)?;
        if self.method.keeps_start() && state::list(&folder.checkpoints())?.is_empty() {
            state::write_start(&folder.checkpoints(), &params)?;
        }
        let (compute, choices) = self.choose_compute(&model, &overlay, &params, memory.integers)?;
        let int8 = compute.uses_int8();
        if int8 != self.computes_int8() {
            memory = self.check_memory(&model, &overlay, &layout, int8)?;
        }
        watch_interrupts()?;

        let eval = data.eval.as_ref().map_or(&[][..], |e| &e.examples);
        let training = &config.training;
        // Steps do not read what is kept in 8 bits from the files any more.
        self.base.checkpoint.release();
        let passes = self.choose_passes(&model, &overlay, int8)?;
        folder.write_figures(&Figures {
            command: command(),
            steps: schedule(&config.training, data.train.examples.len()).total_steps as u64,
            base_parameters: model.spec.parameters() as u64,
            trainable_parameters: layout.len() as u64,
            memory: memory.plan,
            pass_tokens: memory.tokens,
            train: data.train.report.clone(),
            eval: data.eval.as_ref().map(|eval| eval.report.clone()),
        })?;
        let trained = Trained { model: &model, overlay: &overlay, compute: &compute };
        let mut trainer =
            Trainer::new(trained, training, passes, config.data.shuffle, &data.train.examples, eval, params);
        if let Some((map, latent)) = &mut latent {
            trainer = trainer.through(&**map, std::mem::take(latent));
        }
        if self.args.resume {
            self.take_up(&mut trainer)?;
        }
        let shown = Shown { chart: !self.args.json, tensorboard: training.report_to == ReportTo::Tensorboard };
        let mut progress = Progress::new(folder, &trainer.progress, shown)?;
        if trainer.progress.initial_loss.is_none() && !eval.is_empty() {
            match trainer.score_untrained(&progress)? {
                Some(mut evaluation) => {
                    // What was trained before may be better than all that steps make of it.
                    if self.initial.is_some() {
                        trainer.take_start_as_best(&folder.checkpoints())?;
                        evaluation.best = true;
                    }
                    progress.evaluation(&evaluation)?;
                }
                None => {
                    progress.finish();
                    print_stopped(&self.args.run, &trainer.progress);
                    return Ok(End::Interrupted);
                }
            }
        }
        let first_step = trainer.progress.step;
        let outcome = trainer.run(&folder.checkpoints(), &mut progress)?;
        progress.finish();
        if let Outcome::Interrupted { .. } = outcome {
            print_stopped(&self.args.run, &trainer.progress);
            return Ok(End::Interrupted);
        }
        let progress = trainer.progress.clone();
        let mut params = std::mem::take(&mut trainer.params);
        drop(trainer);
        if progress.best_loss.is_some() && progress.best_step != progress.step {
            state::read_best(&folder.checkpoints(), progress.best_step, &mut params)?;
        }
        if let Some((map, _)) = &latent {
            let trained = std::mem::replace(&mut params, vec![0.0; overlay.layout.len()]);
            map.forward(&trained, &mut params);
        }
        let (out, saved) = self.write_result(&overlay, &params, &progress, &choices)?;
        let rounded = self.rounded(Side { model: &model, overlay: &overlay, params: &params }, eval, &out)?;
        let samples = self.samples(&model, &overlay, &params, eval)?;
        let report = Report {
            config,
            method: &*self.method,
            saved: &*saved,
            data,
            resumed: self.args.resume,
            has_trained: progress.step > first_step,
            goes_on: self.initial.is_some(),
            trained: layout.len(),
            progress: &progress,
            result: &out,
            rounded,
            samples: &samples,
            choices: &choices,
            seconds: self.start.elapsed().as_secs_f64(),
        };
        report.write_card()?;
        let outcome = report.to_json();
        folder.write_outcome(&outcome, report.has_trained)?;
        if self.args.json {
            print_json(&outcome)?
        } else {
            report.print()?
        }
        Ok(End::Done)
    }

    /// What is to be trained on the model.
    fn overlay(&self) -> Result<Overlay> {
        let spec = &self.base.checkpoint.spec;
        match (&self.config.adapter, &self.initial) {
            // What lies on disk is taken as peft takes it.
            (None, Some(file)) => Ok(file.lower_for_training(spec)?),
            // The texts begin with the key; its section is known here.
            _ => self.method.lower(spec, true).map_err(|error| anyhow!("adapter.{error}")),
        }
    }

    /// The first parameters of what is trained.
    fn first_params(&self, model: &Model, overlay: &mut Overlay) -> Result<Vec<f32>> {
        let Run { config, base, .. } = self;
        let checkpoint = &base.checkpoint;
        if let (Some(file), Some(directory)) = (&self.initial, &config.adapter_init) {
            let of_another =
                || format!("{} was made with another `adapter` than this run asks for", directory.display());
            refuse_other_settings(&model.spec, overlay, &file.lower(&model.spec)?).with_context(of_another)?;
            return file.params(overlay).with_context(of_another);
        }
        if let Some(first) = self.kept_start(overlay)? {
            self.method.keep_start(overlay, &first);
            return Ok(first);
        }
        let texts =
            Texts { tokenize: &|text| base.tokenize(text), keys_and_values: &|ids| Base::keys_and_values(model, ids) };
        Ok(initial_params(&*self.method, &model.spec, overlay, checkpoint, &texts, config.training.seed)?)
    }

    /// The first parameters of a run that goes on, where its adapter keeps them: on another machine they could be others.
    fn kept_start(&self, overlay: &Overlay) -> Result<Option<Vec<f32>>> {
        let checkpoints = self.folder.checkpoints();
        if !self.args.resume || !self.method.keeps_start() || state::list(&checkpoints)?.is_empty() {
            return Ok(None);
        }
        // Another configuration is named as such before its file is found to be of another size.
        self.folder.check_same(&self.record, &self.rows, &self.config)?;
        let mut first = vec![0.0; overlay.layout.len()];
        if state::read_start(&checkpoints, &mut first)?.is_none() {
            bail!(
                "start.safetensors is missing in {}: the run's adapter stands on what it started from. Restore it, or start anew with --overwrite",
                checkpoints.display()
            );
        }
        Ok(Some(first))
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
    fn choose_passes(&self, model: &Model, overlay: &Overlay, int8: bool) -> Result<Passes> {
        let (path, passes) = (self.folder.passes(), self.planned(model, overlay, &overlay.layout, int8).passes());
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
    fn choose_compute(
        &self,
        model: &Model,
        overlay: &Overlay,
        params: &[f32],
        integers: Integers,
    ) -> Result<(Compute, Vec<Choice>)> {
        let path = self.folder.calibration();
        let (compute, choices) = if self.decided(&path)? {
            let choices = calibration::read(&path)?;
            let compute = if self.computes_int8() {
                let computed =
                    Compute::from_choices(model, overlay, &choices, integers).map_err(retune_train::Error::from);
                if computed.is_err() && choices.is_empty() {
                    bail!(
                        "{} is of a run in f32, this one computes in int8: go on where that run began, or start anew with --overwrite",
                        path.display()
                    );
                }
                computed?
            } else if choices.is_empty() {
                Compute::default()
            } else {
                bail!("{} is of a run in int8, this one computes in f32; start anew with --overwrite", path.display());
            };
            (compute, choices)
        } else {
            let pass = compute::calibration_pass(&overlay.prelude(&model.spec), &self.data.train.examples);
            let (compute, choices) = match self.config.method.saves_adapter() {
                true => compute::choose(model, overlay, params, self.config.base.compute, integers, &pass, true),
                false => Default::default(),
            };
            calibration::write(&path, &choices)?;
            (compute, choices)
        };
        let mut label = "compute ";
        for line in compute::describe(&choices) {
            note!("{label} {line}");
            label = "        ";
        }
        Ok((compute, choices))
    }

    /// The type in which a whole model is written.
    fn export_dtype(&self) -> Result<ExportType> {
        let given = self.config.export.dtype.given();
        Ok(given.map_or_else(|| ExportType::of(&self.base.checkpoint), Ok)?)
    }

    fn print_start(&self, model: &Model, overlay: &Overlay, trained: usize) -> Result<()> {
        let Run { config, data, .. } = self;
        let base = model.spec.parameters();
        let share = 100.0 * trained as f64 / base as f64;
        note!("model    {} ({:.1} M parameters)", config.model, base as f64 / 1e6);
        note!("         {}", self.base.checkpoint.path().display());
        if let Some(line) = storage::describe(&self.base.checkpoint, config.base.storage) {
            note!("         {line}");
        }
        note!("training {trained} parameters ({share:.2}%)");
        if !config.method.saves_adapter() {
            let dtype = self.export_dtype()?;
            let why = match (config.export.dtype.given(), self.base.checkpoint.table_storage()?) {
                (None, storage) if !storage.eq_ignore_ascii_case(&dtype.to_string()) => {
                    format!(", since the base is in {storage}, which trained weights cannot stay in (export.dtype)")
                }
                _ => String::new(),
            };
            note!("         written as {dtype}{why}");
        }
        let report = &data.train.report;
        note!("data     {} rows, {} tokens, {} of them trained", report.examples, report.tokens, report.trained_tokens);
        for problem in problems(report, &Names::KEYS) {
            note!("         ! {problem}");
        }
        if let Some(eval) = &data.eval {
            note!("held out {} rows, {} tokens scored", eval.report.examples, eval.report.trained_tokens);
            for problem in problems(&eval.report, &Names::KEYS) {
                note!("         ! {problem}");
            }
        }
        let before = overlay.prelude(&model.spec).len();
        if let Some(context) = model.spec.context_limit().filter(|context| report.longest + before > *context) {
            let with = if before > 0 { format!(" after {before} that are put before each row") } else { String::new() };
            note!("         ! the longest row has {} tokens{with}, the model's context is {context}", report.longest);
        }
        Ok(())
    }

    /// Whether the base is to be computed in 8 bits, as far as errors allow.
    fn computes_int8(&self) -> bool {
        self.config.method.saves_adapter() && compute::limit(self.config.base.compute).is_some()
    }

    /// The run, as far as what it takes depends on it.
    fn planned<'a>(
        &'a self,
        model: &'a Model,
        overlay: &'a Overlay,
        layout: &'a ParamLayout,
        int8: bool,
    ) -> Planned<'a> {
        let Run { config, method, data, .. } = self;
        let checkpoint = &self.base.checkpoint;
        let is_quantized = !config.base.storage.is_as_is();
        let held_bytes = if is_quantized { checkpoint.held_bytes() } else { checkpoint.file_bytes() };
        let eval = data.eval.as_ref().map_or(&[][..], |eval| &eval.examples);
        let train = &data.train.examples;
        let free = memory::available();
        Planned { config, method: &**method, model, overlay, layout, held_bytes, int8, train, eval, free }
    }

    /// Says what the run will take with its base in 8 bits or in f32, and warns when that is more than is free. What becomes of the base's
    /// integers goes by that.
    fn check_memory(&self, model: &Model, overlay: &Overlay, layout: &ParamLayout, int8: bool) -> Result<RunMemory> {
        let planned = self.planned(model, overlay, layout, int8);
        let memory = planned.memory();
        note!("memory   {}", memory.line(if self.config.method.saves_adapter() { "adapter" } else { "model" }));
        if int8 && memory.integers == Integers::Remade {
            let why = match self.config.base.int8_copy {
                Int8Copy::Auto => "a copy of them does not fit into what is free; base.int8_copy: always keeps one",
                _ => "base.int8_copy: never",
            };
            note!("         the linears' 8 bits are made again in every product ({why})");
        }
        if let Some(available) = memory::available().filter(|available| memory.total() > *available) {
            note!("         ! only {} are free: {}", human(available), planned.ways()?.join(", or "));
        }
        Ok(memory)
    }

    /// Goes on from the newest checkpoint, if there is one yet.
    fn take_up(&self, trainer: &mut Trainer) -> Result<()> {
        match state::list(&self.folder.checkpoints())?.last() {
            Some(checkpoint) => {
                trainer.resume(checkpoint)?;
                // A kill may have come between a checkpoint and the end of the one that it replaces.
                state::keep_newest(&self.folder.checkpoints(), self.config.training.save_total_limit)?;
                note!("going on after step {}", trainer.progress.step);
            }
            None => note!("no checkpoint yet: starting from the beginning"),
        }
        Ok(())
    }

    /// Refuses a warm-up that leaves no step a learning rate, and says where the whole run is one.
    fn check_warmup(&self) -> Result<()> {
        let training = &self.config.training;
        let Schedule { warmup_steps, total_steps, .. } = schedule(training, self.data.train.examples.len());
        if warmup_steps < total_steps {
            return Ok(());
        }
        if total_steps == 1 {
            bail!(
                "training.warmup_steps is {warmup_steps}, and the run has one step: its learning rate would be 0, and nothing would be trained; \
                 set it to 0, or train for more steps"
            );
        }
        let highest = (total_steps - 1) as f64 / warmup_steps as f64 * training.peak_learning_rate();
        note!(
            "         ! training.warmup_steps is {warmup_steps}, and the run has {total_steps} steps: the learning rate rises to {highest:.2e} and \
             the run ends"
        );
        Ok(())
    }

    /// Writes the adapter or the whole model, and beside it where it comes from; returns its folder, and the method as it is saved.
    fn write_result(
        &self,
        overlay: &Overlay,
        params: &[f32],
        progress: &RunProgress,
        choices: &[Choice],
    ) -> Result<(PathBuf, Arc<dyn Method>)> {
        let Run { config, base, folder, .. } = self;
        let (checkpoint, tokenizer) = (&base.checkpoint, base.tokenizer()?);
        let out = folder.result(&config.method);
        let mut saved = self.method.clone();
        if !config.method.saves_adapter() {
            // Beside the final name first: an earlier model goes only when this one is whole.
            let partial = folder.partial_model();
            folder.remove_leftovers();
            let options = MergeOptions { dtype: self.export_dtype()?, ..MergeOptions::default() };
            if let Some(note) = export::scale_note(checkpoint, options.dtype) {
                note!("! {note}");
            }
            export::write(checkpoint, overlay, params, &partial, &options, &mut |_, _| {}).with_context(|| {
                let way = "to write it otherwise go on with --resume --set export.dtype=f32";
                format!(
                    "the trained model cannot be written as {}; its weights are in the checkpoints, {way}",
                    options.dtype
                )
            })?;
            folder.replace_model()?;
        } else {
            let file = AdapterFile::of(&self.method, Some(config.model.clone()), overlay, params);
            file.write(&out, &BaseModules::of(&checkpoint.spec))?;
            saved = file.method;
        }
        let mut provenance = json!({
            "run": self.record,
            "tokenizer_hash": tokenizer.content_hash(),
            "chat_template_hash": tokenizer.chat_template().map(|t| t.hash()),
            "compute": compute::summary(choices),
            "steps": progress.step,
            "taken_from_step": if progress.best_loss.is_some() { progress.best_step } else { progress.step },
            "held_out_loss_before": progress.initial_loss,
            "held_out_loss_after": progress.best_loss,
        });
        if progress.step < progress.total_steps {
            provenance["planned_steps"] = json!(progress.total_steps);
        }
        atomic::write(&out.join(session::PROVENANCE), format!("{provenance:#}\n").as_bytes())?;
        Ok((out, saved))
    }

    /// How far a whole model is from the trained one where it was rounded when it was written.
    fn rounded(&self, trained: Side<'_>, eval: &[Example], out: &Path) -> Result<Option<(ExportType, Parity)>> {
        let dtype = self.export_dtype()?;
        if self.config.method.saves_adapter() || dtype == ExportType::F32 {
            return Ok(None);
        }
        let sample = Sample::of_held_out(&self.base, eval)?;
        Ok(Some((dtype, merge::parity(&sample, trained, &Checkpoint::open(out)?)?)))
    }

    /// Answers to a few held-out rows by the base and by what was trained.
    fn samples(&self, model: &Model, overlay: &Overlay, params: &[f32], eval: &[Example]) -> Result<Vec<Value>> {
        let nothing = Overlay::empty(model);
        let tokenizer = self.base.tokenizer()?;
        let stop = tokenizer.eos_token_ids();
        let mut samples = Vec::new();
        // A row trained from its start has no prompt to answer, unless an encoder reads that.
        let answered = eval.iter().filter_map(|example| {
            let first = example.trained.iter().position(|&t| t)?;
            let prompt = if model.spec.encoder.is_some() { &example.source[..] } else { &example.ids[..first] };
            (prompt.len() >= 2).then_some((example, first, prompt))
        });
        for (example, first, prompt) in answered.take(SAMPLES) {
            let last = example.trained[first..].iter().position(|&t| !t).map_or(example.ids.len(), |n| first + n);
            let answer = |overlay: &Overlay, params: &[f32]| {
                let mut generation = Generation::new(model, overlay, params, Sampling::GREEDY);
                // Beyond the last learned position there is nothing to generate.
                let most = overlay.most_tokens(&model.spec);
                let most = most.map_or(SAMPLE_TOKENS, |most| most.saturating_sub(prompt.len()));
                let ids = generation.run(prompt, SAMPLE_TOKENS.min(most), stop, |_| true);
                tokenizer.decode(&ids, true).trim().to_owned()
            };
            samples.push(json!({
                "row": example.row + 1,
                "reference": tokenizer.decode(&example.ids[first..last], true).trim(),
                "base": answer(&nothing, &[]),
                "trained": answer(overlay, params),
            }));
        }
        Ok(samples)
    }
}
