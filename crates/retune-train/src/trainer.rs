//! The training loop: steps of one or several passes, evaluation, checkpoints, and where to stop.

use std::path::Path;
use std::time::Instant;

use retune_engine::compute::Compute;
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_engine::params::{ParamLayout, Reparameterisation};
use retune_engine::pass::{Pass, PassSize, Prelude, Sequence};
use retune_engine::row_norms::RowNorms;
use retune_engine::workspace::Workspace;
use retune_engine::{NonFinite, Run, Saving, Step};
use retune_kernels::vector;
use serde::{Deserialize, Serialize};

use crate::data::{Example, batches, order, steps_per_epoch};
use crate::error::Error;
use crate::optimizer::{Optimizer, Options};
use crate::run_config::{ActivationCheckpointing, SavedActivations, TrainingConfig};
use crate::schedule::{self, Schedule};
use crate::state::{self, Progress};

/// Tokens of a pass in f32 where none are given: a larger one decodes and packs the weights less often.
const TOKENS_PER_PASS: usize = 1280;
/// The same in 8 bits, where weights lie ready: a smaller one stays in the cache.
const INT8_TOKENS_PER_PASS: usize = 512;
/// Keys of a pass's rows for each token of a pass at most: those that rows share are computed once, and attended to by each.
const KEYS_PER_TOKEN: usize = 4;
/// Planned bytes of activations above which passes are made smaller.
const MOST_ACTIVATIONS: usize = 2 << 30;

/// In what pieces a run computes, and what it keeps of each. It follows from the configuration, the model and the longest row by fixed rules,
/// so that a resumed run computes alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passes {
    /// Tokens of a pass at most.
    pub tokens: usize,
    #[serde(rename = "keep")]
    pub saving: Saving,
    /// Whether rows of a pass share what they begin with in common.
    pub share_prefixes: bool,
}

impl Passes {
    /// Resolves what the configuration leaves open. `int8` says whether the base is computed in 8 bits, `longest` how many tokens the longest
    /// row has.
    pub fn resolve(config: &TrainingConfig, model: &Model, overlay: &Overlay, int8: bool, longest: usize) -> Self {
        let rounded = match config.saved_activations {
            SavedActivations::Auto => int8,
            SavedActivations::F32 => false,
            SavedActivations::Bf16 => true,
        };
        let saving = match config.activation_checkpointing {
            ActivationCheckpointing::Layer => Saving::BlockInputs,
            ActivationCheckpointing::None if rounded => Saving::Bf16,
            ActivationCheckpointing::None => Saving::Full,
        };
        let longest = longest + overlay.prelude(&model.spec).virtual_ids.len();
        let mut tokens = if int8 { INT8_TOKENS_PER_PASS } else { TOKENS_PER_PASS };
        while tokens > longest
            && Workspace::planned_bytes(model, overlay, saving, int8, PassSize::dense(tokens)) > MOST_ACTIVATIONS
        {
            tokens /= 2;
        }
        let tokens = config.tokens_per_pass.unwrap_or(tokens).max(longest);
        // Dropout treats each row's tokens differently, and so does a rotation that depends on the row's length.
        let share_prefixes = config.share_prefixes && !overlay.has_dropout() && model.spec.may_share_prefixes();
        Self { tokens, saving, share_prefixes }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    pub total_steps: u64,
    /// Epochs done.
    pub epoch: f64,
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
    /// Whether to stop, with everything saved. Asked after each step, and before each pass over the held-out rows.
    fn interrupted(&self) -> bool;
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// After its last step, or before it where [`Trainer::stops_early`].
    Finished,
    /// Stopped at the observer's wish after this step; saved. [`Progress::owes_score`] says whether the held-out rows are still to be
    /// scored.
    Interrupted { step: u64 },
}

/// What is trained: a model with what stands on it, and the arithmetic of its steps.
#[derive(Clone, Copy)]
pub struct Trained<'a> {
    pub model: &'a Model,
    pub overlay: &'a Overlay,
    pub compute: &'a Compute,
}

impl<'a> Trained<'a> {
    /// A pass of it; the norms are those of the parameters.
    pub fn run(self, params: &'a [f32], norms: &'a RowNorms, pass: &'a Pass) -> Run<'a> {
        Run {
            model: self.model,
            overlay: self.overlay,
            params,
            norms,
            compute: self.compute,
            pass,
            step: None,
            parts: &[],
        }
    }
}

/// A run in memory.
pub struct Trainer<'a> {
    trained: Trained<'a>,
    latent: Option<Latent<'a>>,
    /// All in f32, for the held-out rows: what is trained will be used so.
    scoring: Compute,
    config: &'a TrainingConfig,
    passes: Passes,
    shuffle: bool,
    train: &'a [Example],
    eval: &'a [Example],
    /// What is optimised and saved: the vector that the overlay's places are in, or the latent one that it is computed from.
    pub params: Vec<f32>,
    /// Computed from the parameters when a step or a scoring begins.
    norms: RowNorms,
    /// The gradient of `params`; zeros between steps.
    grads: Vec<f32>,
    optimizer: Optimizer,
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

/// What the overlay reads where something else is trained.
struct Latent<'a> {
    map: &'a dyn Reparameterisation,
    /// The overlay's flat vector, computed from the parameters as they are.
    flat: Vec<f32>,
    /// Its gradient; zeros between steps.
    gradient: Vec<f32>,
}

/// Tokens of a step at most.
fn largest_step(prelude: &Prelude, config: &TrainingConfig, train: &[Example]) -> usize {
    let longest = train.iter().map(|example| prelude.virtual_ids.len() + example.longest()).max().unwrap_or(0);
    longest * config.batch_size * config.gradient_accumulation_steps
}

/// The optimizer of a run that has not begun.
fn optimizer(config: &TrainingConfig, layout: &ParamLayout) -> Optimizer {
    let options = Options {
        beta1: config.adam_beta1,
        beta2: config.adam_beta2,
        epsilon: config.adam_epsilon,
        weight_decay: config.weight_decay,
    };
    Optimizer::new(config.optim, options, layout)
}

/// Number of optimizer steps of a run over `rows` rows.
pub fn total_steps(config: &TrainingConfig, rows: usize) -> usize {
    let per_epoch = steps_per_epoch(rows, config.batch_size, config.gradient_accumulation_steps);
    schedule::total_steps(per_epoch, config.epochs, config.max_steps)
}

/// How the learning rate of a run over `rows` rows changes.
pub fn schedule(config: &TrainingConfig, rows: usize) -> Schedule {
    let total_steps = total_steps(config, rows);
    let warmup_steps = schedule::warmup_steps(total_steps, config.warmup_steps, config.warmup_ratio);
    Schedule { kind: config.lr_scheduler_type, warmup_steps, total_steps }
}

impl<'a> Trainer<'a> {
    /// A run that has not begun, from the given first parameters.
    pub fn new(
        trained: Trained<'a>,
        config: &'a TrainingConfig,
        passes: Passes,
        shuffle: bool,
        train: &'a [Example],
        eval: &'a [Example],
        params: Vec<f32>,
    ) -> Self {
        let schedule = schedule(config, train.len());
        let prelude = trained.overlay.prelude(&trained.model.spec);
        let workspace_tokens = passes.tokens.min(largest_step(&prelude, config, train));
        Self {
            trained,
            latent: None,
            scoring: Compute::default(),
            config,
            passes,
            shuffle,
            train,
            eval,
            grads: vec![0.0; params.len()],
            optimizer: optimizer(config, &trained.overlay.layout),
            params,
            norms: RowNorms::default(),
            workspace: Workspace::for_passes(trained.model, passes.saving, workspace_tokens),
            workspace_tokens,
            schedule,
            pass: Pass::new(prelude, passes.share_prefixes),
            rows: Vec::new(),
            epoch_order: None,
            progress: Progress { total_steps: schedule.total_steps as u64, ..Progress::default() },
        }
    }

    /// The same run, which trains `latent` instead of the parameters it was given: `map` computes those from it, once a step. Checkpoints hold
    /// the latent vector.
    pub fn through(mut self, map: &'a dyn Reparameterisation, latent: Vec<f32>) -> Self {
        let flat = std::mem::replace(&mut self.params, latent);
        self.grads = vec![0.0; self.params.len()];
        self.optimizer = optimizer(self.config, map.layout());
        self.latent = Some(Latent { map, gradient: vec![0.0; flat.len()], flat });
        self.expand();
        self
    }

    /// Computes what the overlay reads from the parameters as they are.
    fn expand(&mut self) {
        if let Some(latent) = &mut self.latent {
            latent.map.forward(&self.params, &mut latent.flat);
        }
    }

    /// The vector that the overlay's places are in, as the parameters make it.
    pub fn flat(&self) -> &[f32] {
        self.latent.as_ref().map_or(&self.params, |latent| &latent.flat)
    }

    /// Names and places of what is optimised.
    fn layout(&self) -> &'a ParamLayout {
        match &self.latent {
            Some(latent) => latent.map.layout(),
            None => &self.trained.overlay.layout,
        }
    }

    /// Takes up a run where a checkpoint left it.
    ///
    /// # Errors
    /// A checkpoint that cannot be read or belongs to another run.
    pub fn resume(&mut self, checkpoint: &Path) -> Result<(), Error> {
        let progress = state::read(checkpoint, &mut self.params, &mut self.optimizer)?;
        if progress.total_steps != self.progress.total_steps {
            return Err(Error::CheckpointOfAnotherRun {
                path: checkpoint.to_owned(),
                found: format!("a run of {} steps", progress.total_steps),
                expected: format!("{} steps", self.progress.total_steps),
            });
        }
        self.progress = progress;
        self.expand();
        Ok(())
    }

    /// Runs to the end, or until the observer interrupts. Checkpoints go to `directory`, each under its final name only when it is whole.
    ///
    /// A score that was interrupted is begun anew by the resumed run, so that it is that of the whole held-out data.
    ///
    /// # Errors
    /// A loss or gradient that is not finite; a checkpoint that cannot be written (what was saved before stays).
    pub fn run(&mut self, directory: &Path, observer: &mut dyn Observer) -> Result<Outcome, Error> {
        if self.progress.owes_score {
            if !self.score_step(directory, observer)? {
                return Ok(Outcome::Interrupted { step: self.progress.step });
            }
            // The checkpoint that owed the score holds it from now on.
            self.save(directory)?;
        }
        while self.progress.step < self.progress.total_steps && !self.stops_early() {
            let report = self.step()?;
            observer.step(&report)?;
            let step = self.progress.step;
            let last = step == self.progress.total_steps;
            self.progress.owes_score = !self.eval.is_empty() && (last || self.evaluates_after(step));
            let scored = !self.progress.owes_score || self.score_step(directory, observer)?;
            let interrupted = !scored || observer.interrupted();
            let ends = last || self.stops_early();
            if ends || interrupted || step.is_multiple_of(self.config.save_steps as u64) {
                self.save(directory)?;
            }
            if interrupted && !(ends && scored) {
                return Ok(Outcome::Interrupted { step });
            }
        }
        Ok(Outcome::Finished)
    }

    /// Whether as many scores of the held-out rows in a row as the run has patience for were no better than the best before them.
    ///
    /// What counts as better is transformers' `EarlyStoppingCallback`'s to say: lower than the best so far by more than the threshold, where
    /// the best so far is the lowest of all, whether it was better by that much or not.
    pub fn stops_early(&self) -> bool {
        let patience = self.config.early_stopping_patience;
        patience.is_some_and(|patience| self.progress.scores_without_gain >= patience as u64)
    }

    /// Scores the held-out rows after a step, and keeps the parameters if they are the best so far. Returns false where the observer
    /// interrupts: nothing has changed then.
    fn score_step(&mut self, directory: &Path, observer: &mut dyn Observer) -> Result<bool, Error> {
        let Some((loss, label_tokens)) = self.score(observer)? else { return Ok(false) };
        let evaluation = self.record_score(loss, label_tokens);
        if evaluation.best {
            state::write_best(directory, &self.progress, &self.params)?;
        }
        observer.evaluation(&evaluation)?;
        Ok(true)
    }

    fn save(&self, directory: &Path) -> Result<(), Error> {
        state::write(directory, &self.progress, &self.params, &self.optimizer, self.config.save_total_limit)?;
        Ok(())
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
        let params = self.latent.as_ref().map_or(&self.params, |latent| &latent.flat);
        self.norms.refresh(self.trained.model, self.trained.overlay, params);
        let (mut loss, mut tokens, mut label_tokens) = (0.0, 0, 0);
        let mut next = 0;
        while next < self.rows.len() {
            next = fill_pass(&mut self.pass, self.train, &self.rows, next, self.passes.tokens);
            let step = Some(Step { seed: self.config.seed, step: index });
            let (params, grads) = match &mut self.latent {
                None => (&self.params, &mut self.grads),
                Some(latent) => (&latent.flat, &mut latent.gradient),
            };
            let run = Run { step, ..self.trained.run(params, &self.norms, &self.pass) };
            let sum = run.loss_and_gradient(grads, &mut self.workspace);
            if !sum.is_finite() {
                return Err(self.non_finite_loss(index + 1));
            }
            loss += sum;
            tokens += self.pass.row_tokens() + self.pass.source.as_ref().map_or(0, |source| source.row_tokens());
            label_tokens += self.pass.labels.len();
        }
        if let Some(Latent { map, gradient, .. }) = &mut self.latent {
            map.backward(&self.params, gradient, &mut self.grads);
            gradient.fill(0.0);
        }
        let divisor = label_tokens.max(1) as f64;
        let gradient_norm = vector::sum_squares(&self.grads).sqrt() / divisor;
        if !gradient_norm.is_finite() {
            // The backward runs from the last tensor to the first: what comes before the cause is spoilt by it.
            let tensor = self.grads.iter().rposition(|g| !g.is_finite()).and_then(|i| self.layout().at(i));
            let tensor = tensor.map_or_else(|| "the whole gradient".to_owned(), |p| p.name.clone());
            return Err(Error::NonFiniteGradient { step: index + 1, tensor });
        }
        let limit = self.config.max_grad_norm;
        let clip = if limit > 0.0 { (limit / (gradient_norm + 1e-6)).min(1.0) } else { 1.0 };
        let learning_rate = self.config.peak_learning_rate() * self.schedule.factor(index as usize);
        let scale = (clip / divisor) as f32;
        self.optimizer.step(self.layout(), learning_rate, scale, &mut self.grads, &mut self.params);
        self.expand();
        self.progress.step += 1;
        self.progress.tokens += tokens as u64;
        Ok(StepReport {
            step: self.progress.step,
            total_steps: self.progress.total_steps,
            epoch: self.progress.step as f64 / self.steps_per_epoch() as f64,
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
        let place = self.trained.run(self.flat(), &self.norms, &self.pass).first_non_finite_block(&self.workspace);
        let (layer, row) = match place {
            Some(NonFinite { block: 0, row, .. }) => ("the token embedding".to_owned(), row),
            Some(NonFinite { block, row, in_encoder: true }) => (format!("layer {} of the encoder", block - 1), row),
            Some(NonFinite { block, row, in_encoder: false }) => (format!("layer {}", block - 1), row),
            None => ("the output head".to_owned(), row),
        };
        Error::NonFiniteLoss { step, row, layer }
    }

    /// Scores the held-out rows before the first step, for comparison; `None` where the observer interrupts.
    ///
    /// # Errors
    /// A loss that is not finite.
    pub fn score_untrained(&mut self, observer: &dyn Observer) -> Result<Option<Evaluation>, Error> {
        let Some((loss, label_tokens)) = self.score(observer)? else { return Ok(None) };
        self.progress.initial_loss = Some(loss);
        Ok(Some(Evaluation { step: 0, loss, label_tokens, best: false }))
    }

    /// Lets the parameters of the start, whose held-out rows were scored, be the best so far: where they are those of an adapter that was
    /// trained before, steps may make it worse.
    ///
    /// # Errors
    /// As [`state::write_best`].
    pub fn take_start_as_best(&mut self, directory: &Path) -> Result<(), Error> {
        self.progress.best_loss = self.progress.initial_loss;
        self.progress.best_step = self.progress.step;
        state::write_best(directory, &self.progress, &self.params)
    }

    /// The mean held-out loss and the number of label tokens; `None` where the observer interrupts.
    fn score(&mut self, observer: &dyn Observer) -> Result<Option<(f64, usize)>, Error> {
        let scored = Trained { compute: &self.scoring, ..self.trained };
        let params = self.latent.as_ref().map_or(&self.params, |latent| &latent.flat);
        self.norms.refresh(scored.model, scored.overlay, params);
        let rows: Vec<usize> = (0..self.eval.len()).collect();
        let (mut sum, mut labels, mut next) = (0.0, 0, 0);
        while next < rows.len() {
            if observer.interrupted() {
                return Ok(None);
            }
            next = fill_pass(&mut self.pass, self.eval, &rows, next, self.workspace_tokens);
            let params = self.latent.as_ref().map_or(&self.params, |latent| &latent.flat);
            sum += loss_of_pass(scored.run(params, &self.norms, &self.pass), &mut self.workspace)?;
            labels += self.pass.labels.len();
        }
        Ok(Some((sum / labels.max(1) as f64, labels)))
    }

    /// Takes the held-out loss of the current parameters into the progress.
    fn record_score(&mut self, loss: f64, label_tokens: usize) -> Evaluation {
        let gain = self.progress.best_loss.map_or(f64::INFINITY, |best| best - loss);
        if self.config.early_stopping_patience.is_some() {
            let is_gain = gain > self.config.early_stopping_threshold;
            self.progress.scores_without_gain = if is_gain { 0 } else { self.progress.scores_without_gain + 1 };
        }
        let best = gain > 0.0;
        if best {
            self.progress.best_loss = Some(loss);
            self.progress.best_step = self.progress.step;
        }
        self.progress.last_loss = Some(loss);
        self.progress.owes_score = false;
        Evaluation { step: self.progress.step, loss, label_tokens, best }
    }
}

/// Fills a pass with the rows `rows[next..]` as long as they, and their sources, fit `limit` tokens, at least one; returns where the next pass
/// starts.
pub fn fill_pass(pass: &mut Pass, examples: &[Example], rows: &[usize], next: usize, limit: usize) -> usize {
    pass.clear();
    let mut end = next;
    for example in rows[next..].iter().map(|&row| &examples[row]) {
        let fits = pass.tokens() + pass.own_tokens(&example.ids) <= limit
            && pass.source_tokens() + pass.own_source_tokens(&example.source) <= limit
            && pass.keys() + pass.row_keys(&example.ids) <= KEYS_PER_TOKEN * limit;
        if end > next && !fits {
            break;
        }
        pass.push_answer(example.row as u64, &example.source, &example.ids, &example.trained);
        end += 1;
    }
    end
}

/// Epochs in another order each that are looked through for their largest pass.
const EPOCHS_LOOKED_THROUGH: usize = 3;

/// What holds every pass of a run, scoring included, whose rows come after `prelude`.
///
/// It is exact where the run has few epochs or all have the same order. For more epochs it is a bound that holds for every order of the
/// rows, so that the work does not grow with the number of epochs: see [`PassBound`].
pub fn largest_pass(
    prelude: &Prelude,
    config: &TrainingConfig,
    passes: Passes,
    shuffle: bool,
    train: &[Example],
    eval: &[Example],
) -> PassSize {
    let mut pass = Pass::new(prelude.clone(), passes.share_prefixes);
    let mut largest = |examples: &[Example], rows: &[usize], limit: usize| {
        let (mut largest, mut next) = (PassSize::default(), 0);
        while next < rows.len() {
            next = fill_pass(&mut pass, examples, rows, next, limit);
            largest = largest.max(pass.size());
        }
        largest
    };
    let scored: Vec<usize> = (0..eval.len()).collect();
    let limit = passes.tokens.min(largest_step(prelude, config, train));
    let scored = largest(eval, &scored, limit);
    let mut size = PassSize { labels: 0, scored_labels: scored.labels, ..scored };
    let TrainingConfig { batch_size, gradient_accumulation_steps, seed, .. } = *config;
    let per_epoch = steps_per_epoch(train.len(), batch_size, gradient_accumulation_steps).max(1);
    let total = total_steps(config, train.len());
    // Without shuffling every epoch is like the first, which has the most steps.
    let epochs = if shuffle { total.div_ceil(per_epoch) } else { total.div_ceil(per_epoch).min(1) };
    if epochs > EPOCHS_LOOKED_THROUGH {
        let rows = batch_size.saturating_mul(gradient_accumulation_steps);
        let bound = PassBound { prelude, rows, tokens: passes.tokens, share_prefixes: passes.share_prefixes };
        return size.max(bound.over(train));
    }
    for epoch in 0..epochs {
        let rows = order(seed, epoch, train.len(), shuffle);
        let steps = batches(&rows, batch_size, gradient_accumulation_steps);
        for step in steps.take(total - epoch * per_epoch) {
            size = size.max(largest(train, step, passes.tokens));
        }
    }
    size
}

/// What no pass of a step exceeds, whatever the order of the rows.
///
/// [`fill_pass`] takes rows of one step, so that a pass has no more rows than a step, and no more tokens or labels than the longest rows
/// of that number. It takes a further row only within its limits, of tokens that are computed and of keys; a first row alone may exceed them,
/// and the longest row is the bound then. There are no more labels than keys.
struct PassBound<'a> {
    prelude: &'a Prelude,
    /// Rows of a step.
    rows: usize,
    /// Tokens of a pass that are computed.
    tokens: usize,
    share_prefixes: bool,
}

impl PassBound<'_> {
    fn over(&self, train: &[Example]) -> PassSize {
        let Prelude { virtual_ids, prefix, .. } = self.prelude;
        // Where there is an encoder, virtual tokens stand before what it reads.
        let before = if self.prelude.decoder_start.is_some() { 0 } else { virtual_ids.len() };
        let mut lengths: Vec<usize> = train.iter().map(|example| before + example.ids.len()).collect();
        let mut sources: Vec<usize> = train.iter().map(|example| virtual_ids.len() + example.source.len()).collect();
        let mut labels: Vec<usize> = train.iter().map(Example::trained_tokens).collect();
        let largest = |values: &mut Vec<usize>| -> usize {
            values.sort_unstable_by(|a, b| b.cmp(a));
            values.iter().take(self.rows).sum()
        };
        let (longest, of_labels) = (largest(&mut lengths), largest(&mut labels));
        let one = lengths.first().copied().unwrap_or(0);
        let is_shared = self.share_prefixes && any_share_a_prefix(self.prelude, train);
        let tokens = longest.min(self.tokens.max(one));
        let prefixes = prefix * self.rows.min(train.len());
        let of_rows = prefixes + if is_shared { longest } else { tokens };
        let keys = of_rows.min((KEYS_PER_TOKEN * self.tokens).max(prefix + one));
        let source = largest(&mut sources).min(self.tokens.max(sources.first().copied().unwrap_or(0)));
        let source_tokens = if self.prelude.decoder_start.is_some() { source } else { 0 };
        PassSize { tokens, keys, labels: of_labels.min(keys), scored_labels: 0, is_shared, source_tokens }
    }
}

/// Whether any two rows would share what they begin with. In the order of their ids rows that begin alike are neighbours.
fn any_share_a_prefix(prelude: &Prelude, examples: &[Example]) -> bool {
    if prelude.decoder_start.is_some() {
        return false;
    }
    let mut sorted: Vec<&Example> = examples.iter().collect();
    sorted.sort_unstable_by(|a, b| a.ids.cmp(&b.ids));
    let mut pass = Pass::new(prelude.clone(), true);
    let mut shares = |first: &Example, second: &Example| {
        pass.clear();
        pass.push(0, &first.ids, &first.trained);
        pass.own_tokens(&second.ids) < prelude.virtual_ids.len() + second.ids.len()
    };
    sorted.windows(2).any(|pair| shares(pair[0], pair[1]) || shares(pair[1], pair[0]))
}

/// The loss of one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowLoss {
    /// The row's number in its file.
    pub row: usize,
    /// Summed over its label tokens, in nats.
    pub loss: f64,
    pub label_tokens: usize,
}

/// The summed loss over the label tokens of `examples`, and their number, pass by pass in `pass`. `done` is told the loss of each row of a
/// pass, in the order of the examples, and says whether to go on to the next.
///
/// # Errors
/// A loss that is not finite, with its row.
pub fn held_out_loss(
    scored: Trained,
    params: &[f32],
    examples: &[Example],
    tokens_per_pass: usize,
    pass: &mut Pass,
    workspace: &mut Workspace,
    mut done: impl FnMut(&[RowLoss]) -> bool,
) -> Result<(f64, usize), Error> {
    let norms = RowNorms::of(scored.model, scored.overlay, params);
    let rows: Vec<usize> = (0..examples.len()).collect();
    let (mut sum, mut labels, mut next) = (0.0, 0, 0);
    while next < rows.len() {
        next = fill_pass(pass, examples, &rows, next, tokens_per_pass);
        sum += loss_of_pass(scored.run(params, &norms, pass), workspace)?;
        labels += pass.labels.len();
        let of_row = |sequence: &Sequence| {
            let losses = &workspace.losses[sequence.labels.clone()];
            let loss = losses.iter().map(|&loss| f64::from(loss)).sum();
            RowLoss { row: sequence.row as usize, loss, label_tokens: losses.len() }
        };
        if !done(&pass.sequences.iter().map(of_row).collect::<Vec<_>>()) {
            break;
        }
    }
    Ok((sum, labels))
}

/// The summed loss of a pass over held-out rows.
fn loss_of_pass(run: Run, workspace: &mut Workspace) -> Result<f64, Error> {
    let (pass, loss) = (run.pass, run.loss(workspace));
    if loss.is_finite() {
        return Ok(loss);
    }
    let label = workspace.losses.iter().position(|l| !l.is_finite());
    let row = label.and_then(|i| pass.sequence_of_label(i)).map_or(0, |s| s.row);
    Err(Error::NonFiniteEvaluation { row })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of different lengths, of which some begin alike.
    fn examples(alike: bool) -> Vec<Example> {
        let row = |row: usize| {
            let length = 10 + 7 * row % 31;
            let id = |i: usize| if alike && i < 9 && row.is_multiple_of(3) { i as u32 } else { (100 * row + i) as u32 };
            Example {
                row,
                source: vec![],
                ids: (0..length).map(id).collect(),
                trained: (0..length).map(|i| i > length / 2).collect(),
            }
        };
        (0..23).map(row).collect()
    }

    fn size(epochs: f64, passes: Passes, shuffle: bool, train: &[Example]) -> PassSize {
        let config = TrainingConfig { epochs, batch_size: 5, ..config() };
        largest_pass(&Prelude::default(), &config, passes, shuffle, train, &[])
    }

    fn config() -> TrainingConfig {
        let text = "model: m\noutput_dir: o\ndata: {train: t.jsonl}\n";
        crate::run_config::RunConfig::parse(text, "run.yaml", &[]).unwrap().training
    }

    #[test]
    fn the_bound_for_many_epochs_holds_every_order() {
        let preludes = [(0, 0), (0, 5), (3, 0), (9, 2)];
        let preludes =
            preludes.map(|(n, prefix)| Prelude { virtual_ids: 5000..5000 + n, prefix, ..Prelude::default() });
        let ways = [(41, true), (60, true), (60, false), (90, true), (1000, true)];
        for (alike, prelude) in [false, true].into_iter().flat_map(|alike| preludes.clone().map(|p| (alike, p))) {
            let train = examples(alike);
            let first = prelude.virtual_ids.len();
            for (tokens, share_prefixes) in ways {
                let tokens = tokens + first;
                let passes = Passes { tokens, saving: Saving::Full, share_prefixes };
                let largest = |epochs, seed| {
                    let config = TrainingConfig { epochs, batch_size: 5, seed, ..config() };
                    largest_pass(&prelude, &config, passes, true, &train, &[])
                };
                let bound = largest(1e6, 0);
                for seed in 0..100 {
                    let exact = largest(3.0, seed);
                    assert_eq!(exact.max(bound), bound, "{exact:?} is not within {bound:?}");
                }
                assert_eq!(bound.is_shared, (alike || first > 8) && share_prefixes);
                let longest: usize = 5 * train.iter().map(|e| prelude.len() + e.ids.len()).max().unwrap();
                assert!(bound.tokens <= tokens && bound.keys <= longest, "{bound:?}");
            }
        }
    }

    #[test]
    fn few_epochs_and_epochs_that_are_alike_are_looked_through() {
        let train = examples(true);
        let passes = Passes { tokens: 60, saving: Saving::Full, share_prefixes: true };
        assert_eq!(size(1e6, passes, false, &train), size(1.0, passes, false, &train));
        assert_eq!(
            size(2.0, passes, true, &train).max(size(3.0, passes, true, &train)),
            size(3.0, passes, true, &train)
        );
        assert_ne!(size(3.0, passes, true, &train), size(4.0, passes, true, &train), "the bound is no exact number");
    }

    #[test]
    fn a_prefix_counts_among_the_keys_of_a_pass() {
        let row = |row: usize| Example { row, source: vec![], ids: vec![row as u32; 10], trained: vec![true; 10] };
        let examples: Vec<Example> = (0..4).map(row).collect();
        let rows = |prefix: usize| {
            let mut pass = Pass::new(Prelude { prefix, ..Prelude::default() }, true);
            fill_pass(&mut pass, &examples, &[0, 1, 2, 3], 0, 40)
        };
        // Four times forty keys at most: two rows of sixty each.
        assert_eq!((rows(0), rows(30), rows(50)), (4, 4, 2));
    }
}
