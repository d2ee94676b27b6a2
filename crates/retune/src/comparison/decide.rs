//! What a comparison decides by the machine when it begins, and keeps to when it goes on: what is left out, and how many steps fit into the
//! minutes given.

use anyhow::{Result, bail};
use retune_train::data::steps_per_epoch;
use retune_train::plan::{Kind, Plan, Variant};
use serde::{Deserialize, Serialize};

use super::child::Ended;
use super::folder::write_json;
use super::rows::Rows;
use super::runs::{Job, RunRecord, Runner};
use crate::memory::{self, human};

/// Longest answer where a plan does not say, in tokens.
const MAX_NEW_TOKENS: usize = 64;
/// Steps of a variant that are timed; the first is not counted, in which buffers are made.
const TIMED_STEPS: usize = 4;
/// The part of the time that is not planned with.
const RESERVE: f64 = 0.05;
/// Steps below which a result says little.
const FEW_STEPS: usize = 20;

/// What was decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decided {
    pub left_out: Vec<LeftOut>,
    /// Longest answer to a held-out row, where rows are answered.
    pub max_new_tokens: Option<usize>,
    /// Steps of every run, where minutes are given.
    pub steps: Option<usize>,
    /// What that was decided by.
    pub timings: Vec<Timing>,
}

/// A variant that is not run, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeftOut {
    pub name: String,
    pub reason: String,
}

/// How long a variant takes here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    pub name: String,
    /// Beside its steps: to start, and to write its result.
    pub other_seconds: f64,
    pub step_seconds: f64,
}

impl Decided {
    /// What can be decided before anything is run. `base_bytes` is the size of the model's files, `parameters` how many it has.
    pub fn first(plan: &Plan, rows: &Rows, base_bytes: u64, parameters: usize) -> Self {
        let mut left_out = Vec::new();
        for variant in plan.variants.iter().filter(|_| plan.usual) {
            let reason = match &variant.kind {
                Kind::Examples(_) if !rows.take_examples(plan) => Some("the rows have no answers to show".to_owned()),
                Kind::Trained(config) if !config.method.saves_adapter() => too_large(base_bytes, parameters),
                _ => None,
            };
            left_out.extend(reason.map(|reason| LeftOut { name: variant.name.clone(), reason }));
        }
        let answers = rows.labels.is_none() && rows.has_answers && plan.minutes.is_none();
        let max_new_tokens = match plan.generate {
            Some(generate) => Some(generate.max_new_tokens).filter(|tokens| *tokens > 0),
            None => answers.then_some(MAX_NEW_TOKENS),
        };
        Self { left_out, max_new_tokens, ..Self::default() }
    }

    /// The variants that are run.
    pub fn variants<'a>(&self, plan: &'a Plan) -> Vec<&'a Variant> {
        let is_run = |variant: &&Variant| !self.left_out.iter().any(|left_out| left_out.name == variant.name);
        plan.variants.iter().filter(is_run).collect()
    }
}

/// Why every weight of a model cannot be trained here, if so: each takes its value, its gradient and two means in f32, beside the file.
fn too_large(base_bytes: u64, parameters: usize) -> Option<String> {
    let least = base_bytes + 16 * parameters as u64;
    let free = memory::available()?;
    (least > free).then(|| format!("it needs {} of memory at least, and {} are free", human(least), human(free)))
}

/// Times a few steps of each variant and decides how many fit into what is left of the minutes. `scored` is what came of the runs that train
/// nothing, `spent` the seconds that have gone. `None` after Ctrl-C.
///
/// # Errors
/// Variants of which none can be trained.
pub fn steps_in_time(
    runner: &Runner,
    jobs: &[Job],
    minutes: f64,
    scored: &[RunRecord],
    begin: std::time::Instant,
    mut told: impl FnMut(&str),
) -> Result<Option<Decided>> {
    let mut decided = runner.decided.clone();
    let (mut fixed, mut per_step, mut cap) = (0.0, 0.0, usize::MAX);
    // What scoring takes after training, as far as the base's tells.
    let scoring = scored.iter().map(|record| record.scores.seconds).fold(0.0, f64::max);
    let mut failures = Vec::new();
    for variant in decided.variants(runner.plan) {
        let Kind::Trained(config) = &variant.kind else { continue };
        let Some(job) = jobs.iter().find(|job| job.variant.name == variant.name) else { continue };
        told(&format!("timing {}", variant.name));
        let (all, steps) = match runner.time(job, config, TIMED_STEPS)? {
            Ok(found) => found,
            Err(Ended::Interrupted) => return Ok(None),
            // Its own run will say so.
            Err(Ended::Failed(error)) => {
                failures.push(format!("{}: {error}", variant.name));
                continue;
            }
            Err(Ended::Done(_)) => continue,
        };
        let counted = steps.get(1..).unwrap_or_default();
        let step_seconds = counted.iter().sum::<f64>() / counted.len().max(1) as f64;
        let other_seconds = (all - steps.iter().sum::<f64>()).max(0.0);
        decided.timings.push(Timing { name: variant.name.clone(), other_seconds, step_seconds });
        let seeds = variant.seeds.len() as f64;
        // Its validation rows are scored five times, and are fewer than the held-out ones.
        fixed += seeds * (other_seconds + 2.0 * scoring);
        per_step += seeds * step_seconds;
        let training = &config.training;
        let epoch =
            steps_per_epoch(runner.rows.training_rows, training.batch_size, training.gradient_accumulation_steps);
        let asked = training.max_steps.unwrap_or((training.epochs * epoch as f64).ceil() as usize);
        cap = cap.min(asked.max(1));
    }
    if per_step == 0.0 {
        bail!("no variant can be trained: {}", failures.join("; "));
    }
    let left = minutes * 60.0 * (1.0 - RESERVE) - begin.elapsed().as_secs_f64() - fixed;
    let fit = (left / per_step).floor().max(1.0) as usize;
    decided.steps = Some(fit.min(cap));
    write_json(&runner.folder.decided(), &decided)?;
    if fit < FEW_STEPS && fit < cap {
        note!(
            "! {minutes} minutes are little: {fit} steps for each run; with fewer variants or more minutes the result would say more"
        );
    }
    Ok(Some(decided))
}
