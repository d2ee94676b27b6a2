//! Every number that a comparison has to tell.

use anyhow::Result;
use retune_eval::bootstrap::{CONFIDENCE, Difference, RESAMPLES};
use retune_train::data::DataReport;
use retune_train::plan::{BASE, Kind, Plan, Variant};
use serde::Serialize;
use serde_json::{Value, json};

use super::answer::{self, Answer};
use super::decide::Decided;
use super::folder::Folder;
use super::rows::Rows;
use super::runs::{Job, RunRecord, Training};
use super::scores::{self, Flips, Measure, RowScores};
use crate::run_folder::RunFolder;

/// Where a comparison comes from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Provenance {
    pub retune: &'static str,
    /// The instruction set that kernels use.
    pub isa: String,
    pub threads: usize,
    pub model: String,
    pub base_content_hash: String,
    pub base_parameters: usize,
    pub base_bytes: u64,
    /// What repeats it.
    pub command: String,
}

/// A run that did not end well.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Failure {
    pub name: String,
    pub seed: u64,
    pub error: String,
}

/// What is known of a variant; numbers are means over its seeds where nothing else is said.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub name: String,
    pub method: Option<&'static str>,
    /// The settings of its adapter and of its training, as in a run file.
    pub settings: Value,
    pub loss: f64,
    pub perplexity: f64,
    pub accuracy: Option<f64>,
    pub macro_f1: Option<f64>,
    pub rouge_l: Option<f64>,
    pub exact_match: Option<f64>,
    /// What each has more than the base.
    pub loss_against_base: Option<Difference>,
    pub accuracy_against_base: Option<Difference>,
    pub rouge_l_against_base: Option<Difference>,
    /// And than full fine-tuning.
    pub loss_against_full: Option<Difference>,
    /// The part of full fine-tuning's gain in loss that it reaches.
    pub share_of_full_gain: Option<f64>,
    /// And than the variant of the least loss.
    pub loss_against_best: Option<Difference>,
    /// And than the one that the answer names.
    pub loss_against_chosen: Option<Difference>,
    /// On the neutral text, and what that is more than the base's: what was forgotten.
    pub neutral_loss: Option<f64>,
    pub neutral_against_base: Option<Difference>,
    pub flips_against_base: Option<Flips>,
    pub flips_against_full: Option<Flips>,
    pub trainable_parameters: u64,
    pub bytes: u64,
    /// The most of all seeds.
    pub peak_rss_bytes: Option<u64>,
    /// Of training.
    pub seconds: f64,
    pub runs: Vec<RunRecord>,
    /// What it made of each row.
    #[serde(skip)]
    pub rows: RowScores,
    /// And of each passage of the neutral text.
    #[serde(skip)]
    neutral: RowScores,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    pub answer: Answer,
    pub data: Rows,
    pub variants: Vec<Summary>,
    pub failed: Vec<Failure>,
    /// What is in the training rows, as the first run that trained on them found it.
    pub training_data: Option<DataReport>,
    pub decided: Decided,
    /// What row by row is called better or worse by.
    pub flips_by: &'static str,
    pub bootstrap: Value,
    pub provenance: Provenance,
}

impl Summary {
    /// Whether anything is trained.
    pub fn trains(&self) -> bool {
        self.method.is_some()
    }

    /// Whether every weight is.
    pub fn is_full(&self) -> bool {
        self.method == Some("full")
    }

    /// The losses of its seeds, the least and the most.
    pub fn loss_range(&self) -> (f64, f64) {
        let losses = self.runs.iter().map(|run| run.scores.loss);
        losses.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| (low.min(loss), high.max(loss)))
    }

    /// Of a variant's finished runs; `None` where there are none.
    fn of(variant: &Variant, records: &[RunRecord], folder: &Folder) -> Result<Option<Self>> {
        let runs: Vec<RunRecord> = records.iter().filter(|record| record.name == variant.name).cloned().collect();
        if runs.is_empty() {
            return Ok(None);
        }
        let jobs = Job::all(&[variant]);
        let jobs = || jobs.iter().filter(|job| runs.iter().any(|run| run.seed == job.seed));
        let rows = scores::read(&jobs().map(|job| folder.predictions(&job.slug)).collect::<Vec<_>>())?;
        let neutral = match runs.iter().all(|run| run.scores.neutral_loss.is_some()) {
            true => scores::read(&jobs().map(|job| folder.neutral_predictions(&job.slug)).collect::<Vec<_>>())?,
            false => RowScores::new(),
        };
        let count = runs.len() as f64;
        let mean = |value: &dyn Fn(&RunRecord) -> Option<f64>| {
            let values: Option<Vec<f64>> = runs.iter().map(value).collect();
            values.map(|values| values.iter().sum::<f64>() / count)
        };
        let trainings = || runs.iter().filter_map(|run| run.training.as_ref());
        let loss = mean(&|run| Some(run.scores.loss)).unwrap_or(f64::NAN);
        let (method, settings) = match &variant.kind {
            Kind::Trained(config) => {
                let settings = json!({ "adapter": config.adapter, "training": config.training, "base": config.base });
                (Some(config.method.name), settings)
            }
            Kind::Examples(count) => (None, json!({ "examples": count })),
            Kind::Base => (None, json!({})),
        };
        Ok(Some(Self {
            name: variant.name.clone(),
            method,
            settings,
            loss,
            perplexity: loss.exp(),
            accuracy: mean(&|run| run.scores.accuracy),
            macro_f1: mean(&|run| run.scores.macro_f1),
            rouge_l: mean(&|run| run.scores.rouge_l),
            exact_match: mean(&|run| run.scores.exact_match),
            loss_against_base: None,
            accuracy_against_base: None,
            rouge_l_against_base: None,
            loss_against_full: None,
            share_of_full_gain: None,
            loss_against_best: None,
            loss_against_chosen: None,
            neutral_loss: mean(&|run| run.scores.neutral_loss),
            neutral_against_base: None,
            flips_against_base: None,
            flips_against_full: None,
            trainable_parameters: trainings().map(|of| of.trainable_parameters).max().unwrap_or(0),
            bytes: trainings().map(|of| of.bytes).max().unwrap_or(0),
            peak_rss_bytes: trainings().filter_map(|of| of.peak_rss_bytes).max(),
            seconds: trainings().map(|of: &Training| of.seconds).sum::<f64>() / count,
            runs,
            rows,
            neutral,
        }))
    }

    fn compare(&mut self, others: &Others) {
        let Others { base, full, best, measure } = others;
        if let Some(base) = base.as_ref().filter(|base| base.name != self.name && !self.neutral.is_empty()) {
            self.neutral_against_base = scores::difference(Measure::Loss, &base.neutral, &self.neutral);
        }
        let than = |other: &Option<Of>, measure| {
            let other = other.as_ref().filter(|other| other.name != self.name)?;
            scores::difference(measure, &other.rows, &self.rows)
        };
        self.loss_against_base = than(base, Measure::Loss);
        self.accuracy_against_base = than(base, Measure::Accuracy);
        self.rouge_l_against_base = than(base, Measure::RougeL);
        self.loss_against_full = than(full, Measure::Loss);
        self.loss_against_best = than(best, Measure::Loss);
        let flips = |other: &Option<Of>| {
            let other = other.as_ref().filter(|other| other.name != self.name)?;
            Some(scores::flips(*measure, &other.rows, &self.rows))
        };
        (self.flips_against_base, self.flips_against_full) = (flips(base), flips(full));
        if let (Some(base), Some(full)) = (base, full) {
            let gain = base.loss - full.loss;
            let is_other = self.trains() && self.name != full.name;
            self.share_of_full_gain = (is_other && gain > 0.0).then(|| (base.loss - self.loss) / gain);
        }
    }
}

/// What the others are compared with.
struct Of {
    name: String,
    loss: f64,
    rows: RowScores,
    neutral: RowScores,
}

struct Others {
    base: Option<Of>,
    full: Option<Of>,
    best: Option<Of>,
    measure: Measure,
}

impl Results {
    /// Of all finished runs.
    ///
    /// # Errors
    /// Files of predictions that are gone.
    pub fn of(
        plan: &Plan,
        folder: &Folder,
        data: &Rows,
        decided: &Decided,
        records: &[RunRecord],
        failed: Vec<Failure>,
        provenance: Provenance,
    ) -> Result<Self> {
        let mut variants = Vec::new();
        for variant in decided.variants(plan) {
            variants.extend(Summary::of(variant, records, folder)?);
        }
        let of = |summary: &Summary| Of {
            name: summary.name.clone(),
            loss: summary.loss,
            rows: summary.rows.clone(),
            neutral: summary.neutral.clone(),
        };
        let base = variants.iter().find(|summary| summary.name == BASE).map(of);
        let full = variants.iter().find(|summary| summary.is_full()).map(of);
        let best = variants.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).map(of);
        let measure = base.as_ref().map_or(Measure::Loss, |base| Measure::of_flips(&base.rows));
        let others = Others { base, full, best, measure };
        variants.iter_mut().for_each(|summary| summary.compare(&others));
        let chosen = answer::choose(&variants).map(|(_, chosen)| of(chosen));
        for summary in &mut variants {
            let other = chosen.as_ref().filter(|chosen| chosen.name != summary.name);
            summary.loss_against_chosen =
                other.and_then(|chosen| scores::difference(Measure::Loss, &chosen.rows, &summary.rows));
        }
        let answer = answer::of(&variants, decided, data, &failed);
        let jobs = Job::all(&decided.variants(plan));
        let trained = jobs.iter().find(|job| job.trains() && folder.record(&job.slug).exists());
        let figures = trained.map(|job| RunFolder { root: folder.run(&job.slug) }.figures()).transpose()?.flatten();
        Ok(Self {
            answer,
            data: data.clone(),
            variants,
            failed,
            training_data: figures.map(|figures| figures.train),
            decided: decided.clone(),
            flips_by: measure.in_words(),
            bootstrap: json!({ "confidence": CONFIDENCE, "draws": RESAMPLES, "kind": "paired, percentile" }),
            provenance,
        })
    }

    /// The variant that the answer names.
    pub fn chosen(&self) -> Option<&Summary> {
        self.variants.iter().find(|summary| summary.name == self.answer.variant)
    }

    pub fn base(&self) -> Option<&Summary> {
        self.variants.iter().find(|summary| summary.name == BASE)
    }

    pub fn full(&self) -> Option<&Summary> {
        self.variants.iter().find(|summary| summary.is_full())
    }
}
