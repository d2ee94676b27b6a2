//! What is run for a variant of a comparison, and what is kept of it.

use std::fs;
use std::path::Path;

use anyhow::Result;
use retune_train::data::{ColumnMap, DataFormat, Files, steps_per_epoch};
use retune_train::plan::{Kind, Plan, Variant, slug};
use retune_train::run_config::{DataConfig, RunConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::child::{self, Ended};
use super::decide::Decided;
use super::folder::{Folder, read_json, write_json};
use super::neutral;
use super::rows::Rows;
use crate::memory_plan::MemoryPlan;
use crate::metrics::{self, Point};
use crate::run_folder::RunFolder;

/// The part of the training rows by which a run chooses among its checkpoints: what it is scored by in the end must not. Not of few rows,
/// where so few of them would choose by chance.
const VALIDATION: f64 = 0.05;
const LEAST_VALIDATION_ROWS: usize = 10;
const MOST_VALIDATION_ROWS: usize = 50;
/// How often a run scores those rows, where its plan does not say.
const VALIDATIONS: usize = 4;

/// A variant with a seed.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    pub variant: &'a Variant,
    pub seed: u64,
    /// Its name in file names.
    pub slug: String,
}

impl<'a> Job<'a> {
    /// All runs of a plan, the base first.
    pub fn all(variants: &[&'a Variant]) -> Vec<Self> {
        let of = |variant: &&'a Variant| {
            let variant = *variant;
            let job = move |seed: &u64| Job { variant, seed: *seed, slug: format!("{}-{seed}", slug(&variant.name)) };
            variant.seeds.iter().map(job).collect::<Vec<_>>()
        };
        variants.iter().flat_map(of).collect()
    }

    pub fn trains(&self) -> bool {
        matches!(self.variant.kind, Kind::Trained(_))
    }

    /// What people call it.
    pub fn title(&self) -> String {
        match self.variant.kind {
            Kind::Base => self.variant.name.clone(),
            _ => format!("{}, seed {}", self.variant.name, self.seed),
        }
    }
}

/// What is known of a finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    pub name: String,
    pub seed: u64,
    pub scores: Scores,
    /// Nothing where nothing is trained.
    pub training: Option<Training>,
}

/// How a run's held-out rows were scored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// The mean loss of a label token.
    pub loss: f64,
    pub perplexity: f64,
    pub rows: u64,
    pub label_tokens: u64,
    /// Of the likeliest label, where answers are labels.
    pub accuracy: Option<f64>,
    pub macro_f1: Option<f64>,
    /// Of the answers, where rows were answered.
    pub rouge_l: Option<f64>,
    pub exact_match: Option<f64>,
    /// On the neutral text; nothing where the weights are the base's, but for the base itself.
    #[serde(default)]
    pub neutral_loss: Option<f64>,
    /// Of the whole evaluation.
    pub seconds: f64,
}

/// What training took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    pub trainable_parameters: u64,
    /// Of the file that holds what was trained.
    pub bytes: u64,
    pub steps: u64,
    /// The step that the result is of.
    pub best_step: u64,
    pub tokens: u64,
    /// How the base was computed.
    pub compute: Value,
    /// The most memory that the process had.
    pub peak_rss_bytes: Option<u64>,
    /// What was planned of it, part by part.
    #[serde(default)]
    pub memory: MemoryPlan,
    /// In steps alone, whatever interrupted them.
    pub seconds: f64,
    pub curve: Vec<Point>,
}

/// How a job ended.
pub enum Outcome {
    Done(Box<RunRecord>),
    Failed(String),
    Interrupted,
}

/// All that runs have in common.
pub struct Runner<'a> {
    pub plan: &'a Plan,
    pub folder: &'a Folder,
    pub rows: &'a Rows,
    pub decided: &'a Decided,
    /// Tokens that the model was made for.
    pub context: usize,
    /// Whether the model reads texts as they are, of which it may forget some.
    pub reads_texts: bool,
    /// As the command line says.
    pub threads: Option<usize>,
}

impl Runner<'_> {
    /// What came of a job that was finished earlier.
    pub fn finished(&self, job: &Job) -> Result<Option<RunRecord>> {
        let path = self.folder.record(&job.slug);
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }

    /// Runs a job to its end, goes on with it where it was stopped.
    ///
    /// # Errors
    /// What has nothing to do with the job: a full disk.
    pub fn perform(&self, job: &Job, mut said: impl FnMut(&str)) -> Result<Outcome> {
        let model = self.plan.model.clone();
        let (of, training) = match &job.variant.kind {
            Kind::Trained(config) => {
                let report = match self.train(job, self.run_config(job, config), &mut said)? {
                    Ended::Done(report) => report,
                    Ended::Failed(error) => return Ok(Outcome::Failed(error)),
                    Ended::Interrupted => return Ok(Outcome::Interrupted),
                };
                let training = self.training(job, &report)?;
                let result = report["output"].as_str().unwrap_or_default().to_owned();
                let of = match config.method.saves_adapter() {
                    true => vec!["--model".to_owned(), model, "--adapter".to_owned(), result],
                    false => vec!["--model".to_owned(), result],
                };
                (of, Some(training))
            }
            Kind::Examples(count) => {
                let file = self.folder.training_rows().display().to_string();
                let mut of = vec!["--model".to_owned(), model, "--examples".to_owned(), count.to_string()];
                of.extend(["--examples-from".to_owned(), file, "--seed".to_owned(), job.seed.to_string()]);
                (of, None)
            }
            Kind::Base => (vec!["--model".to_owned(), model], None),
        };
        let begin = std::time::Instant::now();
        let ended = self.evaluate(job, of.clone(), &mut said)?;
        let neutral = match &ended {
            Ended::Done(_) if self.reads_texts && !matches!(job.variant.kind, Kind::Examples(_)) => {
                self.evaluate_neutral(job, of, &mut said)?
            }
            _ => Ended::Done(Value::Null),
        };
        let (found, neutral) = match (ended, neutral) {
            (Ended::Done(found), Ended::Done(neutral)) => (found, neutral["loss"].as_f64()),
            (Ended::Failed(error), _) | (_, Ended::Failed(error)) => return Ok(Outcome::Failed(error)),
            (Ended::Interrupted, _) | (_, Ended::Interrupted) => return Ok(Outcome::Interrupted),
        };
        if found["loss"].as_f64().is_none() {
            return Ok(Outcome::Failed("no held-out row was scored".to_owned()));
        }
        let scores = scores(&found, neutral, begin.elapsed().as_secs_f64(), self.rows.labels.is_some());
        let record = RunRecord { name: job.variant.name.clone(), seed: job.seed, scores, training };
        write_json(&self.folder.record(&job.slug), &record)?;
        // Nobody goes on with a finished run; full fine-tuning leaves three times its model there.
        let _ = fs::remove_dir_all(self.folder.run(&job.slug).join("checkpoints"));
        Ok(Outcome::Done(Box::new(record)))
    }

    /// The arguments that begin every run.
    fn arguments(&self, command: &str) -> Vec<String> {
        let threads = self.threads.or(self.plan.threads);
        let threads = threads.map(|threads| ["--threads".to_owned(), threads.to_string()]);
        threads.into_iter().flatten().chain([command.to_owned()]).collect()
    }

    fn train(&self, job: &Job, config: RunConfig, said: impl FnMut(&str)) -> Result<Ended> {
        let file = self.folder.run_file(&job.slug);
        write_json(&file, &config)?;
        let mut args = self.arguments("train");
        args.extend([file.display().to_string(), "--resume".to_owned(), "--json".to_owned()]);
        child::run(&args, &self.folder.log(&job.slug), said)
    }

    /// The run file of a job.
    fn run_config(&self, job: &Job, of_variant: &RunConfig) -> RunConfig {
        let rows = self.rows.training_rows;
        let validates = rows as f64 * VALIDATION >= LEAST_VALIDATION_ROWS as f64;
        let mut config = RunConfig {
            output_dir: self.folder.run(&job.slug),
            data: DataConfig {
                train: Files::from(&self.folder.training_rows()),
                eval: None,
                eval_fraction: if validates { VALIDATION } else { 0.0 },
                eval_limit: Some(MOST_VALIDATION_ROWS),
                // They are written with the usual columns.
                format: DataFormat::Auto,
                columns: ColumnMap::default(),
                ..self.plan.data.clone()
            },
            // Told by the command line.
            threads: None,
            ..of_variant.clone()
        };
        if !validates {
            config.training = config.training.without_early_stopping();
        }
        let training = &mut config.training;
        training.seed = job.seed;
        training.max_steps = self.decided.steps.or(training.max_steps);
        let epoch = steps_per_epoch(rows, training.batch_size, training.gradient_accumulation_steps);
        let steps = training.max_steps.unwrap_or((training.epochs * epoch as f64).ceil() as usize);
        training.eval_steps.get_or_insert(steps.div_ceil(VALIDATIONS).max(1));
        config
    }

    /// Times a few steps of a variant, without any scoring: the seconds of the whole process, and those of its steps.
    pub fn time(&self, job: &Job, config: &RunConfig, steps: usize) -> Result<Result<(f64, Vec<f64>), Ended>> {
        let probe = Job { slug: format!("{}-timing", job.slug), ..job.clone() };
        let mut config = self.run_config(&probe, config);
        config.training = config.training.without_early_stopping();
        (config.data.eval_fraction, config.training.max_steps) = (0.0, Some(steps));
        let folder = self.folder.run(&probe.slug);
        // What a kill left of it is of no use.
        let _ = fs::remove_dir_all(&folder);
        let begin = std::time::Instant::now();
        let ended = self.train(&probe, config, |_| {})?;
        let seconds = begin.elapsed().as_secs_f64();
        let lines = metrics::read(&RunFolder { root: folder.clone() }.metrics()).unwrap_or_default();
        let _ = fs::remove_dir_all(&folder);
        Ok(match ended {
            Ended::Done(_) => Ok((seconds, lines.iter().filter_map(|line| line["seconds"].as_f64()).collect())),
            other => Err(other),
        })
    }

    fn evaluate(&self, job: &Job, of: Vec<String>, said: impl FnMut(&str)) -> Result<Ended> {
        let data = &self.plan.data;
        let length = match job.variant.kind {
            // The examples before a row come on top of it.
            Kind::Examples(count) => data.max_length.saturating_mul(count + 1).min(self.context.max(data.max_length)),
            _ => data.max_length,
        };
        let mut args = self.arguments("eval");
        args.extend(of);
        let file = |path: &Path| path.display().to_string();
        args.extend(["--data".to_owned(), file(&self.folder.held_out_rows())]);
        args.extend(["--predictions".to_owned(), file(&self.folder.predictions(&job.slug))]);
        args.extend(["--max-length".to_owned(), length.to_string(), "--json".to_owned()]);
        if data.train_on_prompt {
            args.push("--whole-text".to_owned());
        }
        if let Some(labels) = &self.rows.labels {
            args.push(format!("--labels={}", labels.join(",")));
        }
        if let Some(tokens) = self.decided.max_new_tokens {
            args.extend(["--generate".to_owned(), "--max-new-tokens".to_owned(), tokens.to_string()]);
        }
        child::run(&args, &self.folder.log(&job.slug), said)
    }

    /// Scores the neutral text.
    fn evaluate_neutral(&self, job: &Job, of: Vec<String>, said: impl FnMut(&str)) -> Result<Ended> {
        let mut args = self.arguments("eval");
        args.extend(of);
        let length = neutral::MAX_LENGTH.min(self.context);
        let file = |path: &Path| path.display().to_string();
        args.extend(["--data".to_owned(), file(&self.folder.neutral_rows())]);
        args.extend(["--predictions".to_owned(), file(&self.folder.neutral_predictions(&job.slug))]);
        args.extend(["--max-length".to_owned(), length.to_string(), "--json".to_owned()]);
        child::run(&args, &self.folder.log(&job.slug), said)
    }

    /// What a run's report and its metrics say.
    fn training(&self, job: &Job, report: &Value) -> Result<Training> {
        let number = |key: &str| report[key].as_u64().unwrap_or_default();
        let run = RunFolder { root: self.folder.run(&job.slug) };
        let curve = metrics::curve(&metrics::read(&run.metrics())?);
        Ok(Training {
            trainable_parameters: number("trainable_parameters"),
            bytes: weight_bytes(Path::new(report["output"].as_str().unwrap_or_default())),
            steps: number("steps"),
            best_step: if report["held_out_loss_after"].is_null() { number("steps") } else { number("best_step") },
            tokens: number("tokens"),
            compute: report["compute"].clone(),
            peak_rss_bytes: report["peak_rss_bytes"].as_u64(),
            memory: run.figures()?.map(|figures| figures.memory).unwrap_or_default(),
            seconds: curve.last().map_or(0.0, |point| point.seconds),
            curve,
        })
    }
}

fn scores(found: &Value, neutral_loss: Option<f64>, seconds: f64, has_labels: bool) -> Scores {
    let number = |place: &str| found.pointer(place).and_then(Value::as_f64);
    let count = |key: &str| found[key].as_u64().unwrap_or_default();
    let of_labels = |place: &str| number(place).filter(|_| has_labels);
    Scores {
        loss: number("/loss").unwrap_or(f64::NAN),
        perplexity: number("/perplexity").unwrap_or(f64::NAN),
        rows: count("rows"),
        label_tokens: count("label_tokens"),
        accuracy: of_labels("/by_likelihood/accuracy"),
        macro_f1: of_labels("/by_likelihood/macro_f1"),
        rouge_l: number("/generated/rougeL/fmeasure"),
        exact_match: number("/generated/exact_match"),
        neutral_loss,
        seconds,
    }
}

/// What the weights in a folder take, without the texts beside them.
fn weight_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let weights = entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "safetensors"));
    weights.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}
