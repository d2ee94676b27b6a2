//! `retune train`: a run, from its file to an adapter (or a fine-tuned model) and what it gained.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use retune_adapter::{AdapterFile, LoraConfig, atomic};
use retune_model::adapter::{AdapterPlan, linear_modules};
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{self, MergeOptions};
use retune_model::generate::{Generation, Sampling};
use retune_model::model::{Model, Trainable};
use retune_model::tokenizer::Tokenizer;
use retune_model::workspace::{Keep, Workspace};
use retune_train::data::Example;
use retune_train::run_config::{ActivationCheckpointing, Method, RunConfig};
use retune_train::state::{self, Progress as RunProgress};
use retune_train::trainer::{Outcome, Trainer};
use serde_json::{Value, json};

use super::data::problems;
use super::print_json;
use crate::args::TrainArgs;
use crate::memory::{self, human};
use crate::progress::{Progress, watch_interrupts};
use crate::run_data::RunData;
use crate::{fetch, session};

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

    fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    fn result(&self, method: Method) -> PathBuf {
        self.root.join(if method == Method::Full { "model" } else { "adapter" })
    }

    /// Makes the folder ready for a run that starts (or, with `resume`, goes on): refuses to mix runs.
    fn prepare(&self, run: &Value, args: &TrainArgs) -> Result<()> {
        let root = self.root.display();
        if args.overwrite {
            for path in [self.checkpoints(), self.result(Method::Lora), self.result(Method::Full)] {
                if path.exists() {
                    fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
                }
            }
            for path in [self.config(), self.metrics()] {
                if path.exists() {
                    fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
                }
            }
        }
        let is_empty = fs::read_dir(&self.root).map_or(true, |mut entries| entries.next().is_none());
        if self.config().exists() {
            if !args.resume {
                bail!(
                    "{root} holds a run already: go on with --resume, start anew with --overwrite, or set another output_dir"
                );
            }
            let text = fs::read_to_string(self.config()).with_context(|| format!("cannot read {root}/run.json"))?;
            let earlier: Value = serde_json::from_str(&text)
                .with_context(|| format!("{root}/run.json is damaged; start anew with --overwrite"))?;
            if let Some(difference) = first_difference("", &earlier, run) {
                bail!(
                    "the run in {root} was started with another configuration: {difference}. Restore it, start anew with --overwrite, or set another output_dir"
                );
            }
            return Ok(());
        }
        if !is_empty && !args.overwrite && !args.resume {
            bail!(
                "{root} exists and is not empty: set another output_dir, or use --overwrite to put the run among its files"
            );
        }
        fs::create_dir_all(&self.root).with_context(|| format!("cannot create {root}"))?;
        atomic::write(&self.config(), format!("{run:#}\n").as_bytes())?;
        Ok(())
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
        (a, b) => Some(format!("{key} was {a}, now it is {b}")),
    }
}

/// Everything of a run that does not change while it trains.
struct Run<'a> {
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
    let config = RunConfig::load(&args.run.path, &args.run.overrides)?;
    match (threads, config.threads) {
        (None, Some(n)) => rayon::ThreadPoolBuilder::new().num_threads(n).build()?.install(|| start(args, config)),
        _ => start(args, config),
    }
}

fn start(args: &TrainArgs, config: RunConfig) -> Result<()> {
    let path = fetch::resolve_or_fetch(&config.model, &|message| eprintln!("{message}"))?;
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
    record["base_content_hash"] = json!(checkpoint.content_hash());
    record["train_rows_hash"] = json!(rows_hash(&data.train.examples));
    record["isa"] = json!(retune_kernels::isa::isa().to_string());
    let folder = RunFolder { root: config.output_dir.clone() };
    Run { args, config, folder, checkpoint, tokenizer, data, adapter, initial, record }.train()
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
        let (model, params) = self.model()?;
        self.print_start(&model);
        self.check_memory(&model)?;
        folder.prepare(&self.record, self.args)?;
        watch_interrupts()?;

        let eval = data.eval.as_ref().map_or(&[][..], |e| &e.examples);
        let training = &config.training;
        let mut trainer = Trainer::new(&model, training, config.data.shuffle, &data.train.examples, eval, params);
        if self.args.resume {
            self.take_up(&mut trainer)?;
        }
        let RunProgress { step, total_steps, .. } = trainer.progress;
        let mut progress = Progress::new(&folder.metrics(), step, total_steps)?;
        let start = Instant::now();
        if trainer.progress.initial_loss.is_none() && !eval.is_empty() {
            trainer.score_untrained();
            eprintln!("held-out loss before training: {:.4}", trainer.progress.initial_loss.unwrap_or(f64::NAN));
        }
        let outcome = trainer.run(&folder.checkpoints(), &mut progress)?;
        progress.finish();
        if let Outcome::Interrupted { step } = outcome {
            let file = self.args.run.path.display();
            eprintln!(
                "stopped after step {step} of {total_steps}; everything is saved. Go on with:\n  retune train {file} --resume"
            );
            std::process::exit(130);
        }
        let progress = trainer.progress.clone();
        let mut params = std::mem::take(&mut trainer.params);
        drop(trainer);
        if progress.best_loss.is_some() && progress.best_step != progress.total_steps {
            state::read_best(&folder.checkpoints(), &mut params)?;
        }
        let out = self.write_result(&model, &params, &progress)?;
        let samples = self.samples(&model, &params, eval)?;
        self.report(&model, &progress, &out, &samples, start.elapsed().as_secs_f64())
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
        let plan = AdapterPlan::new(&self.adapter, checkpoint)?;
        let model = Model::load(checkpoint, Trainable::Adapter(&plan))?;
        let params = match (&self.initial, &config.adapter_init) {
            (Some(file), Some(directory)) => model.params_from(&file.tensors).with_context(|| {
                format!("{} was made with another `adapter` than this run asks for", directory.display())
            })?,
            _ => model.initial_params(checkpoint, init, seed)?,
        };
        Ok((model, params))
    }

    fn print_start(&self, model: &Model) {
        let Run { config, data, .. } = self;
        let (trained, base) = (model.layout.len(), model.parameters());
        let share = 100.0 * trained as f64 / base as f64;
        eprintln!("model    {} ({:.1} M parameters)", config.model, base as f64 / 1e6);
        eprintln!("training {trained} parameters ({share:.2}%)");
        let report = &data.train.report;
        eprintln!(
            "data     {} rows, {} tokens, {} of them trained",
            report.examples, report.tokens, report.trained_tokens
        );
        for problem in problems(report) {
            eprintln!("         ! {problem}");
        }
    }

    /// Says what the run will take, and warns when that is more than is free.
    fn check_memory(&self, model: &Model) -> Result<()> {
        let training = &self.config.training;
        let rows = self.data.train.examples.iter();
        let longest = rows.clone().map(|e| e.ids.len()).max().unwrap_or(0);
        let per_step: usize = training.batch_size * training.gradient_accumulation_steps;
        let tokens = training.tokens_per_pass.min(longest * per_step).max(longest);
        let densest = rows.map(|e| e.trained_tokens() as f64 / e.ids.len().max(1) as f64).fold(0.0, f64::max);
        let labels = (densest * tokens as f64).ceil() as usize;
        let keep = match training.activation_checkpointing {
            ActivationCheckpointing::None => Keep::Activations,
            ActivationCheckpointing::Layer => Keep::Inputs,
        };
        let base = self.checkpoint.file_bytes() as usize;
        let trained = 4 * 4 * model.layout.len();
        let activations = Workspace::planned_bytes(model, keep, tokens, labels);
        let total = (base + trained + activations + PROGRAM_BYTES) as u64;
        eprintln!(
            "memory   {} planned: base {}, trained with optimizer {}, activations {} for passes of {tokens} tokens",
            human(total),
            human(base as u64),
            human(trained as u64),
            human(activations as u64),
        );
        let Some(available) = memory::available() else { return Ok(()) };
        if total > available {
            eprintln!(
                "         ! only {} are free: set training.activation_checkpointing=layer, or lower training.tokens_per_pass, \
                 data.max_length or adapter.r",
                human(available)
            );
        }
        Ok(())
    }

    /// Goes on from the newest checkpoint, if there is one yet.
    fn take_up(&self, trainer: &mut Trainer) -> Result<()> {
        match state::list(&self.folder.checkpoints())?.last() {
            Some(checkpoint) => {
                trainer.resume(checkpoint)?;
                eprintln!("going on after step {}", trainer.progress.step);
            }
            None => eprintln!("no checkpoint yet: starting from the beginning"),
        }
        Ok(())
    }

    /// Writes the adapter or the whole model, and beside it where it comes from; returns its folder.
    fn write_result(&self, model: &Model, params: &[f32], progress: &RunProgress) -> Result<PathBuf> {
        let Run { config, checkpoint, folder, .. } = self;
        let out = folder.result(config.method);
        if config.method == Method::Full {
            if out.exists() {
                fs::remove_dir_all(&out).with_context(|| format!("cannot replace {}", out.display()))?;
            }
            let tensor = |name: &str| {
                let param = model.layout.params().iter().find(|p| p.name == name)?;
                Some(&params[param.range.clone()])
            };
            export::write_model(checkpoint, &tensor, &out, &MergeOptions::default(), &mut |_, _| {})?;
        } else {
            let file = AdapterFile {
                config: self.adapter.clone(),
                base_model: Some(config.model.clone()),
                tensors: model.tensors_of(params),
            };
            file.write(&out, &linear_modules(&checkpoint.linear_modules()))?;
        }
        let provenance = json!({
            "retune": env!("CARGO_PKG_VERSION"),
            "run": self.record,
            "tokenizer_hash": self.tokenizer.content_hash(),
            "chat_template_hash": self.tokenizer.chat_template().map(|t| t.hash()),
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
        for example in eval.iter().take(SAMPLES) {
            let Some(first) = example.trained.iter().position(|&t| t) else { continue };
            let prompt = &example.ids[..first];
            if prompt.is_empty() {
                continue;
            }
            let last = example.trained[first..].iter().position(|&t| !t).map_or(example.ids.len(), |n| first + n);
            let answer = |model: &Model, params: &[f32]| {
                let ids = Generation::new(model, params, Sampling::GREEDY).run(prompt, SAMPLE_TOKENS, stop, |_| true);
                self.tokenizer.decode(&ids, true).trim().to_owned()
            };
            samples.push(json!({
                "row": example.row,
                "reference": self.tokenizer.decode(&example.ids[first..last], true).trim(),
                "base": answer(&base, &[]),
                "trained": answer(model, params),
            }));
        }
        Ok(samples)
    }

    fn report(&self, model: &Model, progress: &RunProgress, out: &Path, samples: &[Value], seconds: f64) -> Result<()> {
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
                "peak_rss_bytes": memory::peak_resident(),
                "samples": samples,
            }));
            return Ok(());
        }
        println!();
        if let (Some(before), Some(after)) = (progress.initial_loss, progress.best_loss) {
            println!("held-out loss  {before:.4} before, {after:.4} after");
        }
        for sample in samples {
            let text = |key: &str| sample[key].as_str().unwrap_or_default().replace('\n', " ");
            println!("\n  held-out row {}", sample["row"]);
            println!("    reference  {}", text("reference"));
            println!("    base       {}", text("base"));
            println!("    trained    {}", text("trained"));
        }
        let what = if self.config.method == Method::Full { "model  " } else { "adapter" };
        let peak = memory::peak_resident().map_or_else(|| "unknown".to_owned(), human);
        println!("\n{what}        {} ({})", out.display(), human(size));
        println!("took           {seconds:.0} s, peak memory {peak}");
        println!("\nNext:");
        let base = &self.config.model;
        if self.config.method == Method::Full {
            println!("  retune generate --model {} \"…\"", out.display());
            println!("  retune eval --model {} --data FILE", out.display());
            println!("  retune inspect {}", out.display());
        } else {
            println!("  retune generate --model {base} --adapter {} \"…\"", out.display());
            println!(
                "  retune merge --model {base} --adapter {} --out {}-merged",
                out.display(),
                self.folder.root.display()
            );
            println!("  retune inspect {}", out.display());
        }
        Ok(())
    }
}

fn folder_size(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter_map(|e| e.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
}
