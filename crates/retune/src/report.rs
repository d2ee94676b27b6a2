//! What a run says at its end: what it gained, where its result is, and what to do next.

use std::fs;
use std::path::Path;

use anyhow::Result;
use retune_adapter::Method;
use retune_engine::calibrate::Choice;
use retune_model::export::ExportType;
use retune_train::data::{Names, RowFormat, RowText, read_rows};
use retune_train::run_config::{DataConfig, RunConfig};
use retune_train::state::Progress;
use serde_json::{Value, json};

use crate::args::RunFile;
use crate::card::{CARD, Card, plain};
use crate::compute;
use crate::memory::{self, human};
use crate::parity::Parity;
use crate::run_data::RunData;

/// What there is to say of a run that has ended.
pub struct Report<'a> {
    pub config: &'a RunConfig,
    pub method: &'a dyn Method,
    /// The same as the files hold it.
    pub saved: &'a dyn Method,
    pub data: &'a RunData,
    /// Whether an earlier part of the run is not in the time.
    pub resumed: bool,
    /// Whether any step was in the time: a run that had ended already has none.
    pub has_trained: bool,
    /// Whether it began from an adapter.
    pub goes_on: bool,
    /// Number of trained parameters.
    pub trained: usize,
    pub progress: &'a Progress,
    /// The folder of the adapter or of the model.
    pub result: &'a Path,
    /// The type that the model was rounded to when it was written, and how far it is from the trained one since.
    pub rounded: Option<(ExportType, Parity)>,
    /// Answers to held-out rows.
    pub samples: &'a [Value],
    pub choices: &'a [Choice],
    /// How long this part of the run took.
    pub seconds: f64,
}

impl Report<'_> {
    /// What it says to a program.
    pub fn to_json(&self) -> Value {
        json!({
            "output": self.result,
            "bytes": folder_size(self.result),
            "trainable_parameters": self.trained,
            "steps": self.progress.step,
            "planned_steps": self.progress.total_steps,
            "stopped_early": self.stopped_early(),
            "tokens": self.progress.tokens,
            "held_out_loss_before": self.progress.initial_loss,
            "held_out_loss_after": self.progress.best_loss,
            "held_out_loss_last": self.progress.last_loss,
            "best_step": self.progress.best_step,
            "seconds": self.seconds,
            "compute": compute::summary(self.choices),
            "storage": self.config.base.storage,
            "peak_rss_bytes": memory::peak_resident(),
            "dtype": self.rounded.as_ref().map(|(dtype, _)| dtype.to_string()),
            "parity": self.rounded.as_ref().map(|(_, parity)| parity.json()),
            "samples": self.samples,
        })
    }

    /// Where and why the run ended before its last step, where it did.
    fn stopped_early(&self) -> Option<String> {
        let Progress { step, total_steps, scores_without_gain, best_step, .. } = *self.progress;
        let threshold = self.config.training.early_stopping_threshold;
        let by = if threshold > 0.0 { format!(" by more than {threshold}") } else { String::new() };
        let scores = match scores_without_gain {
            1 => "the last held-out score was not".to_owned(),
            count => format!("none of the last {count} held-out scores was"),
        };
        (step < total_steps).then(|| {
            format!(
                "stopped early at step {step} of {total_steps} because {scores} lower than the best before it{by} (the best is that of step \
                 {best_step}; training.early_stopping_patience)"
            )
        })
    }

    /// Prints it for a person.
    pub fn print(&self) -> Result<()> {
        outln!();
        if let Some(sentence) = self.stopped_early() {
            outln!("{sentence}");
        }
        if let (Some(before), Some(after)) = (self.progress.initial_loss, self.progress.best_loss) {
            outln!("held-out loss  {before:.4} before, {after:.4} after");
            if self.goes_on && self.progress.best_step == 0 {
                outln!(
                    "             ! no step made it better: what is saved is the adapter that the run began from; lower training.learning_rate, or \
                     look at the data (retune data)"
                );
            } else if after > before {
                outln!(
                    "             ! it is worse than before: lower training.learning_rate, or look at the data (retune data)"
                );
            }
        }
        for sample in self.samples {
            let text = |key: &str| sample[key].as_str().unwrap_or_default().replace('\n', " ");
            outln!("\n  held-out row {}", sample["row"]);
            outln!("    reference  {}", text("reference"));
            outln!("    base       {}", text("base"));
            outln!("    trained    {}", text("trained"));
        }
        let what = if self.config.method.saves_adapter() { "adapter" } else { "model  " };
        let peak = memory::peak_resident().map_or_else(|| "unknown".to_owned(), human);
        outln!("\n{what}        {} ({})", self.result.display(), human(folder_size(self.result)));
        if let Some((dtype, parity)) = &self.rounded {
            parity.print("rounded", &format!("to {dtype} and read back"))?;
        }
        outln!("took           {:.0} s, peak memory {peak}", self.seconds);
        outln!("\nNext:");
        for line in next_commands(self.config, self.method.is_soft_prompt(), self.result, &program()) {
            outln!("  {line}");
        }
        outln!("  {} report {}", program(), shell_word(&self.config.output_dir.to_string_lossy()));
        Ok(())
    }

    /// Writes the model card beside an adapter, with what is known of the run.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write_card(&self) -> Result<()> {
        if !self.config.method.saves_adapter() {
            return Ok(());
        }
        // What the card says of a run that had ended is known no better now.
        if !self.has_trained && self.result.join(CARD).exists() {
            return Ok(());
        }
        let Self { config, data, progress, .. } = self;
        let (training, train) = (&config.training, &data.train.report);
        let mut rows = vec![
            ("trained parameters", self.trained.to_string()),
            ("data", format!("`{}`", config.data.train.names())),
            (
                "rows",
                format!("{} with {} tokens, {} of them trained", train.examples, train.tokens, train.trained_tokens),
            ),
            (
                "steps",
                format!(
                    "{} of {} rows{}",
                    progress.step,
                    training.batch_size * training.gradient_accumulation_steps,
                    if progress.step < progress.total_steps {
                        format!(", {} were planned", progress.total_steps)
                    } else {
                        String::new()
                    }
                ),
            ),
            ("tokens trained on", progress.tokens.to_string()),
            (
                "learning rate",
                format!(
                    "{} at most ({})",
                    training.peak_learning_rate(),
                    json!(training.lr_scheduler_type).as_str().unwrap_or_default()
                ),
            ),
            ("seed", training.seed.to_string()),
        ];
        if let (Some(eval), Some(before), Some(after)) = (&data.eval, progress.initial_loss, progress.best_loss) {
            let of = match &config.data.eval {
                Some(files) => format!("`{}`, {} rows", files.names(), eval.report.examples),
                None => format!("{} rows", eval.report.examples),
            };
            rows.push(("held out", of));
            rows.push(("held-out loss before", format!("{before:.4}")));
            rows.push(("held-out loss after", format!("{after:.4}, at step {}", progress.best_step)));
        }
        let arithmetic = compute::summary(self.choices);
        rows.push(("the base's products", arithmetic["arithmetic"].as_str().unwrap_or_default().to_owned()));
        if let Some(encoding) = config.base.storage.encoding() {
            rows.push(("the base's linears", format!("held as {encoding}")));
        }
        let trained = self.method.settings()?;
        let saved = self.saved.settings()?;
        let others = trained.as_object().into_iter().flatten().filter(|(key, value)| saved.get(*key) != Some(*value));
        let others: Vec<String> = others.map(|(key, value)| format!("`{key}` {}", plain(value))).collect();
        if !others.is_empty() {
            rows.push(("trained as", others.join(", ")));
        }
        if self.has_trained {
            let part = if self.resumed { ", since the run was last resumed" } else { "" };
            rows.push(("seconds", format!("{:.0}{part}", self.seconds)));
            if let Some(peak) = memory::peak_resident() {
                rows.push(("peak memory", human(peak)));
            }
        }
        let summary = format!("It was trained on `{}`, with the settings below.", config.data.train.names());
        Card { method: self.saved, base_model: Some(&config.model), summary, rows }.write(self.result)
    }
}

/// What to do with the result of a run: `result` is its folder, `program` what the program is called.
pub fn next_commands(config: &RunConfig, is_soft_prompt: bool, result: &Path, program: &str) -> Vec<String> {
    let path = shell_word(&result.to_string_lossy());
    let saves_adapter = config.method.saves_adapter();
    let model = match saves_adapter {
        false => format!("--model {path}"),
        true => format!("--model {} --adapter {path}", shell_word(&config.model)),
    };
    let question = first_question(&config.data).unwrap_or_else(|| shell_word("Once upon a time"));
    let mut commands = vec![format!("{program} generate {model} {question}"), format!("{program} inspect {path}")];
    match (saves_adapter, &config.data.eval) {
        (false, None) => {}
        (false, Some(eval)) => {
            let data = eval.paths().iter().map(|path| shell_word(&path.to_string_lossy()));
            commands.extend(data.map(|path| format!("{program} eval {model} --data {path}")));
        }
        // No weight can hold it.
        (true, _) if is_soft_prompt => {}
        (true, _) => {
            let merged = format!("{}-merged", config.output_dir.to_string_lossy());
            commands.push(format!("{program} merge {model} --out {}", shell_word(&merged)));
        }
    }
    commands
}

/// What the first held-out row asks, or the first row: something to try the result with, no longer than a line.
fn first_question(data: &DataConfig) -> Option<String> {
    const LONGEST: usize = 120;
    let path = data.eval.as_ref().unwrap_or(&data.train);
    let file = read_rows(path, &data.read_options(&Names::KEYS)).ok()?;
    let first = &file.rows.first()?.text;
    let text = first.question()?;
    // What was trained on as it stands is asked as it stands.
    let (flags, question) = match first {
        RowText::PromptCompletion { .. } if file.format == RowFormat::PromptCompletion => {
            ("--raw ", text.chars().take(LONGEST).collect())
        }
        _ => {
            let mut question = String::new();
            for word in text.split_whitespace() {
                if question.len() + word.len() >= LONGEST {
                    break;
                }
                question.push_str(if question.is_empty() { "" } else { " " });
                question.push_str(word);
            }
            ("", question)
        }
    };
    let ends = if question.starts_with('-') { "-- " } else { "" };
    (!question.is_empty()).then(|| format!("{flags}{ends}{}", shell_word(&question)))
}

/// Says where Ctrl-C stopped a run, and how to go on.
pub fn print_stopped(run: &RunFile, progress: &Progress) {
    let &Progress { step, total_steps, initial_loss, owes_score, .. } = progress;
    match step {
        0 if initial_loss.is_none() => {
            note!("stopped before the first step, while held-out rows were scored. Begin with:")
        }
        _ if owes_score => note!(
            "stopped after step {step} of {total_steps}; everything is saved, but its held-out rows are still to be scored. Go on with:"
        ),
        _ => note!("stopped after step {step} of {total_steps}; everything is saved. Go on with:"),
    }
    let file = shell_word(&run.path.to_string_lossy());
    let overrides: String = run.overrides.iter().map(|text| format!(" --set {}", shell_word(text))).collect();
    note!("  {} train {file}{overrides} --resume", program());
}

/// What this process was asked for, as a shell reads it, without what is said once.
pub fn command() -> String {
    let once = ["--overwrite", "--resume", "--json"];
    let words = std::env::args().skip(1).filter(|word| !once.contains(&word.as_str()));
    format!("retune {}", words.map(|word| shell_word(&word)).collect::<Vec<_>>().join(" "))
}

/// This program as it was called.
pub fn program() -> String {
    std::env::args().next().map_or_else(|| "retune".to_owned(), |name| shell_word(&name))
}

/// A word as a shell reads it.
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-=/:,+".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

fn folder_size(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter_map(|e| e.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
}
