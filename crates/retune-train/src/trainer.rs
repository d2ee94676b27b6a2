//! The training loop: steps of one or several passes, evaluation, checkpoints, and where to stop.

use std::path::Path;
use std::time::Instant;

use retune_kernels::vector;
use retune_model::Dropout;
use retune_model::model::Model;
use retune_model::pass::{Pass, PassSize};
use retune_model::workspace::{Keep, Workspace};
use serde::{Deserialize, Serialize};

use crate::data::{Example, batches, order, steps_per_epoch};
use crate::error::Error;
use crate::optimizer::{AdamW, AdamWOptions};
use crate::run_config::{ActivationCheckpointing, SavedActivations, TrainingConfig};
use crate::schedule::{self, Schedule};
use crate::state::{self, Progress};

/// Tokens of a pass in f32 where none are given: a larger one decodes and packs the weights less often.
const TOKENS_PER_PASS: usize = 1280;
/// The same in 8 bits, where weights lie ready: a smaller one stays in the cache.
const INT8_TOKENS_PER_PASS: usize = 512;
/// Tokens of a pass's rows for each token of a pass at most: those that rows share are computed once, and attended to by each.
const ROW_TOKENS: usize = 4;
/// Planned bytes of activations above which passes are made smaller.
const MOST_ACTIVATIONS: usize = 2 << 30;

/// In what pieces a run computes, and what it keeps of each. It follows from the configuration, the model and the longest row by fixed rules,
/// so that a resumed run computes alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passes {
    /// Tokens of a pass at most.
    pub tokens: usize,
    pub keep: Keep,
    /// Whether rows of a pass share what they begin with in common.
    pub share_prefixes: bool,
}

impl Passes {
    /// Resolves what the configuration leaves open. `int8` says whether the base is computed in 8 bits.
    pub fn resolve(config: &TrainingConfig, model: &Model, int8: bool, longest: usize) -> Self {
        let rounded = match config.saved_activations {
            SavedActivations::Auto => int8,
            SavedActivations::F32 => false,
            SavedActivations::Bf16 => true,
        };
        let keep = match config.activation_checkpointing {
            ActivationCheckpointing::Layer => Keep::Inputs,
            ActivationCheckpointing::None if rounded => Keep::RoundedActivations,
            ActivationCheckpointing::None => Keep::Activations,
        };
        let mut tokens = if int8 { INT8_TOKENS_PER_PASS } else { TOKENS_PER_PASS };
        while tokens > longest
            && Workspace::planned_bytes(model, keep, int8, PassSize::dense(tokens)) > MOST_ACTIVATIONS
        {
            tokens /= 2;
        }
        let tokens = config.tokens_per_pass.unwrap_or(tokens).max(longest);
        // Dropout treats each row's tokens differently.
        Self { tokens, keep, share_prefixes: config.share_prefixes && !model.has_dropout() }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    pub total_steps: u64,
    /// Mean loss over the step's label tokens, in nats.
    pub loss: f64,
    /// Norm of the whole gradient, before clipping.
    pub gradient_norm: f64,
    pub learning_rate: f64,
    pub tokens: usize,
    pub label_tokens: usize,
    pub seconds: f64,
}

/// A held-out score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    pub step: u64,
    /// Mean loss over the label tokens, in nats.
    pub loss: f64,
    pub label_tokens: usize,
    /// Whether it is the best of the run so far.
    pub best: bool,
}

/// Who watches a run: the progress bar, the metrics file, tests.
pub trait Observer {
    /// A step is done.
    fn step(&mut self, report: &StepReport) -> Result<(), Error>;
    /// The held-out rows were scored.
    fn evaluation(&mut self, evaluation: &Evaluation) -> Result<(), Error>;
    /// Whether to stop after this step, with everything saved.
    fn interrupted(&self) -> bool;
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    Finished,
    /// Stopped at the observer's wish after this step; saved.
    Interrupted {
        step: u64,
    },
}

/// A run in memory.
pub struct Trainer<'a> {
    model: &'a Model,
    /// The same in f32, for the held-out rows: what is trained will be used so.
    scored: Model,
    config: &'a TrainingConfig,
    passes: Passes,
    shuffle: bool,
    train: &'a [Example],
    eval: &'a [Example],
    pub params: Vec<f32>,
    /// Zeros between steps.
    grads: Vec<f32>,
    optimizer: AdamW,
    workspace: Workspace,
    /// Tokens that the workspace is made for: passes that are scored hold no more.
    workspace_tokens: usize,
    schedule: Schedule,
    pass: Pass,
    /// Rows of the current step.
    rows: Vec<usize>,
    /// The current epoch and its order.
    epoch_order: Option<(usize, Vec<usize>)>,
    pub progress: Progress,
}

/// Tokens of a step at most.
fn largest_step(config: &TrainingConfig, train: &[Example]) -> usize {
    let longest = train.iter().map(|example| example.ids.len()).max().unwrap_or(0);
    longest * config.batch_size * config.gradient_accumulation_steps
}

/// Number of optimizer steps of a run over `rows` rows.
pub fn total_steps(config: &TrainingConfig, rows: usize) -> usize {
    let per_epoch = steps_per_epoch(rows, config.batch_size, config.gradient_accumulation_steps);
    schedule::total_steps(per_epoch, config.epochs, config.max_steps)
}

impl<'a> Trainer<'a> {
    /// A run that has not begun, from the given first parameters.
    pub fn new(
        model: &'a Model,
        config: &'a TrainingConfig,
        passes: Passes,
        shuffle: bool,
        train: &'a [Example],
        eval: &'a [Example],
        params: Vec<f32>,
    ) -> Self {
        let options = AdamWOptions {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
        };
        let total = total_steps(config, train.len());
        let warmup_steps = schedule::warmup_steps(total, config.warmup_steps, config.warmup_ratio);
        let workspace_tokens = passes.tokens.min(largest_step(config, train));
        let schedule = Schedule { kind: config.lr_scheduler_type, warmup_steps, total_steps: total };
        Self {
            model,
            scored: model.in_f32(),
            config,
            passes,
            shuffle,
            train,
            eval,
            grads: vec![0.0; params.len()],
            optimizer: AdamW::new(options, params.len()),
            params,
            workspace: Workspace::for_passes(model, passes.keep, workspace_tokens),
            workspace_tokens,
            schedule,
            pass: Pass::sharing_prefixes(passes.share_prefixes),
            rows: Vec::new(),
            epoch_order: None,
            progress: Progress { total_steps: total as u64, ..Progress::default() },
        }
    }

    /// Takes up a run where a checkpoint left it.
    ///
    /// # Errors
    /// A checkpoint that cannot be read or belongs to another run.
    pub fn resume(&mut self, checkpoint: &Path) -> Result<(), Error> {
        let progress =
            state::read(checkpoint, [&mut self.params, &mut self.optimizer.first, &mut self.optimizer.second])?;
        if progress.total_steps != self.progress.total_steps {
            return Err(Error::CheckpointOfAnotherRun {
                path: checkpoint.to_owned(),
                found: format!("a run of {} steps", progress.total_steps),
                expected: format!("{} steps", self.progress.total_steps),
            });
        }
        self.optimizer.steps = progress.step;
        self.progress = progress;
        Ok(())
    }

    /// Runs to the end, or until the observer interrupts. Checkpoints go to `directory`, each under its final name only when it is whole.
    ///
    /// # Errors
    /// A loss or gradient that is not finite; a checkpoint that cannot be written (what was saved before stays).
    pub fn run(&mut self, directory: &Path, observer: &mut dyn Observer) -> Result<Outcome, Error> {
        while self.progress.step < self.progress.total_steps {
            let report = self.step()?;
            observer.step(&report)?;
            let step = self.progress.step;
            let last = step == self.progress.total_steps;
            if !self.eval.is_empty() && (last || self.evaluates_after(step)) {
                let evaluation = self.evaluate()?;
                if evaluation.best {
                    state::write_best(directory, &self.progress, &self.params)?;
                }
                observer.evaluation(&evaluation)?;
            }
            let interrupted = observer.interrupted();
            if last || interrupted || step.is_multiple_of(self.config.save_steps as u64) {
                let tensors = [&self.params[..], &self.optimizer.first, &self.optimizer.second];
                state::write(directory, &self.progress, tensors, self.config.save_total_limit)?;
            }
            if interrupted && !last {
                return Ok(Outcome::Interrupted { step });
            }
        }
        Ok(Outcome::Finished)
    }

    fn steps_per_epoch(&self) -> usize {
        steps_per_epoch(self.train.len(), self.config.batch_size, self.config.gradient_accumulation_steps).max(1)
    }

    fn evaluates_after(&self, step: u64) -> bool {
        match self.config.eval_steps {
            Some(every) => step.is_multiple_of(every as u64),
            None => step.is_multiple_of(self.steps_per_epoch() as u64),
        }
    }

    /// Takes one optimizer step.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, with the step, the row and the layer.
    pub fn step(&mut self) -> Result<StepReport, Error> {
        let start = Instant::now();
        let index = self.progress.step;
        self.choose_rows(index as usize);
        let (mut loss, mut tokens, mut label_tokens) = (0.0, 0, 0);
        let mut next = 0;
        while next < self.rows.len() {
            next = fill_pass(&mut self.pass, self.train, &self.rows, next, self.passes.tokens);
            let sequences = &self.pass.sequences;
            let dropout = Dropout { seed: self.config.seed, step: index, sequences };
            let (params, grads) = (&self.params, &mut self.grads);
            let sum = self.model.loss_and_gradient(params, grads, &self.pass, Some(dropout), &mut self.workspace);
            if !sum.is_finite() {
                return Err(self.non_finite_loss(index + 1));
            }
            loss += sum;
            tokens += self.pass.row_tokens();
            label_tokens += self.pass.labels.len();
        }
        let divisor = label_tokens.max(1) as f64;
        let gradient_norm = vector::sum_squares(&self.grads).sqrt() / divisor;
        if !gradient_norm.is_finite() {
            // The backward runs from the last tensor to the first: what comes before the cause is spoilt by it.
            let tensor = self.grads.iter().rposition(|g| !g.is_finite()).and_then(|i| self.model.layout.at(i));
            let tensor = tensor.map_or_else(|| "the whole gradient".to_owned(), |p| p.name.clone());
            return Err(Error::NonFiniteGradient { step: index + 1, tensor });
        }
        let limit = self.config.max_grad_norm;
        let clip = if limit > 0.0 { (limit / (gradient_norm + 1e-6)).min(1.0) } else { 1.0 };
        let learning_rate = self.config.learning_rate * self.schedule.factor(index as usize);
        let scale = (clip / divisor) as f32;
        self.optimizer.step(&self.model.layout, learning_rate, scale, &mut self.grads, &mut self.params);
        self.progress.step += 1;
        self.progress.tokens += tokens as u64;
        Ok(StepReport {
            step: self.progress.step,
            total_steps: self.progress.total_steps,
            loss: loss / divisor,
            gradient_norm,
            learning_rate,
            tokens,
            label_tokens,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// The rows of step `index`: consecutive in the epoch's order, the last step of an epoch taking what is left.
    fn choose_rows(&mut self, index: usize) {
        let epoch = index / self.steps_per_epoch();
        if self.epoch_order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.epoch_order = Some((epoch, order(self.config.seed, epoch, self.train.len(), self.shuffle)));
        }
        let Some((_, rows)) = &self.epoch_order else { return };
        let TrainingConfig { batch_size, gradient_accumulation_steps, .. } = *self.config;
        let step = batches(rows, batch_size, gradient_accumulation_steps).nth(index % self.steps_per_epoch());
        self.rows.clear();
        self.rows.extend_from_slice(step.unwrap_or_default());
    }

    fn non_finite_loss(&self, step: u64) -> Error {
        let bad = self.workspace.losses.iter().position(|l| !l.is_finite());
        let row = bad.and_then(|i| self.pass.sequence_of_label(i)).map_or(0, |s| s.row);
        let place = self.model.first_non_finite_layer(&self.pass, &self.workspace);
        let layers = self.model.layers.len();
        let (layer, row) = match place {
            Some((0, row)) => ("the token embedding".to_owned(), row),
            Some((l, row)) if l <= layers => (format!("layer {}", l - 1), row),
            _ => ("the output head".to_owned(), row),
        };
        Error::NonFiniteLoss { step, row, layer }
    }

    /// Scores the held-out rows before the first step, for comparison.
    ///
    /// # Errors
    /// A loss that is not finite.
    pub fn score_untrained(&mut self) -> Result<Evaluation, Error> {
        let (loss, label_tokens) = self.score()?;
        self.progress.initial_loss = Some(loss);
        Ok(Evaluation { step: 0, loss, label_tokens, best: false })
    }

    fn score(&mut self) -> Result<(f64, usize), Error> {
        let (limit, pass, workspace) = (self.workspace_tokens, &mut self.pass, &mut self.workspace);
        let (sum, labels) = held_out_loss(&self.scored, &self.params, self.eval, limit, pass, workspace, |_| {})?;
        Ok((sum / labels.max(1) as f64, labels))
    }

    /// Scores the held-out rows with the current parameters.
    fn evaluate(&mut self) -> Result<Evaluation, Error> {
        let (loss, label_tokens) = self.score()?;
        let best = self.progress.best_loss.is_none_or(|best| loss < best);
        if best {
            self.progress.best_loss = Some(loss);
            self.progress.best_step = self.progress.step;
        }
        self.progress.last_loss = Some(loss);
        Ok(Evaluation { step: self.progress.step, loss, label_tokens, best })
    }
}

/// Fills a pass with the rows `rows[next..]` as long as they fit `limit` tokens, at least one; returns where the next pass starts.
pub fn fill_pass(pass: &mut Pass, examples: &[Example], rows: &[usize], next: usize, limit: usize) -> usize {
    pass.clear();
    let mut end = next;
    for example in rows[next..].iter().map(|&row| &examples[row]) {
        let fits = pass.tokens() + pass.own_tokens(&example.ids) <= limit
            && pass.row_tokens() + example.ids.len() <= ROW_TOKENS * limit;
        if end > next && !fits {
            break;
        }
        pass.push(example.row as u64, &example.ids, &example.trained);
        end += 1;
    }
    end
}

/// What holds every pass of a run, scoring included.
pub fn largest_pass(
    config: &TrainingConfig,
    passes: Passes,
    shuffle: bool,
    train: &[Example],
    eval: &[Example],
) -> PassSize {
    let mut pass = Pass::sharing_prefixes(passes.share_prefixes);
    let mut largest = |examples: &[Example], rows: &[usize], limit: usize| {
        let (mut largest, mut next) = (PassSize::default(), 0);
        while next < rows.len() {
            next = fill_pass(&mut pass, examples, rows, next, limit);
            largest = largest.max(pass.size());
        }
        largest
    };
    let scored: Vec<usize> = (0..eval.len()).collect();
    let limit = passes.tokens.min(largest_step(config, train));
    let scored = largest(eval, &scored, limit);
    let mut size = PassSize { labels: 0, scored_labels: scored.labels, ..scored };
    let TrainingConfig { batch_size, gradient_accumulation_steps, seed, .. } = *config;
    let per_epoch = steps_per_epoch(train.len(), batch_size, gradient_accumulation_steps).max(1);
    let total = total_steps(config, train.len());
    for epoch in 0..total.div_ceil(per_epoch) {
        let rows = order(seed, epoch, train.len(), shuffle);
        let steps = batches(&rows, batch_size, gradient_accumulation_steps);
        for step in steps.take(total - epoch * per_epoch) {
            size = size.max(largest(train, step, passes.tokens));
        }
    }
    size
}

/// The summed loss over the label tokens of `examples`, and their number, pass by pass in `pass`. `done` is told the number of examples
/// scored so far.
///
/// # Errors
/// A loss that is not finite, with its row.
pub fn held_out_loss(
    model: &Model,
    params: &[f32],
    examples: &[Example],
    tokens_per_pass: usize,
    pass: &mut Pass,
    workspace: &mut Workspace,
    mut done: impl FnMut(usize),
) -> Result<(f64, usize), Error> {
    let rows: Vec<usize> = (0..examples.len()).collect();
    let (mut sum, mut labels, mut next) = (0.0, 0, 0);
    while next < rows.len() {
        next = fill_pass(pass, examples, &rows, next, tokens_per_pass);
        let loss = model.loss(params, pass, workspace);
        if !loss.is_finite() {
            let label = workspace.losses.iter().position(|l| !l.is_finite());
            let row = label.and_then(|i| pass.sequence_of_label(i)).map_or(0, |s| s.row);
            return Err(Error::NonFiniteEvaluation { row });
        }
        sum += loss;
        labels += pass.labels.len();
        done(next);
    }
    Ok((sum, labels))
}
