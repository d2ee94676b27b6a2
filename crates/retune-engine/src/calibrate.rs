//! Which linears of a model are computed in 8 bits, and how: measured on rows of the run's own data, decided by a fixed rule.
//!
//! One pass in f32 shows each frozen linear its input and the gradient of its output. From the input's largest value in each channel, and
//! the weight's, come factors that move the range of outlier channels into the weight (Xiao et al. 2022, SmoothQuant, equation 4). That helps
//! the forward, and harms the backward, which has no such outliers but the same weight. The largest channels can be multiplied in f32
//! instead, which harms nothing but costs time. Of a few combinations the one is taken whose larger error of the two is
//! smallest: taking the cheapest of those within 2% was tried, and moved the losses of the first three steps of a real run by 1 to 3%, where
//! this moves them by less than 0.5%. A linear whose error is over the limit all the same stays in f32.
//! Nothing is timed, so that a run decides the same again.

use std::sync::{Arc, Mutex, PoisonError};

use retune_kernels::F32Panel;
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::int8::{Int8Matrix, Int8Rows, column_maxima};
use serde::{Deserialize, Serialize};

use crate::compute::{Compute, Watch};
use crate::model::{Linear, LinearId, Model};
use crate::overlay::Overlay;
use crate::pass::Pass;
use crate::row_norms::RowNorms;
use crate::run::Run;
use crate::saved::Saving;
use crate::workspace::Workspace;

/// The largest relative error, forward or backward, of a linear that is computed in 8 bits when it is ours to choose.
pub const ERROR_LIMIT: f64 = 0.06;
/// What is tried: an exponent, 0 for no smoothing, and a number of outlier channels.
const TRIED: [(f32, usize); 4] = [(0.0, 0), (0.5, 0), (0.0, MOST_OUTLIERS), (0.3, MOST_OUTLIERS)];
const MOST_OUTLIERS: usize = 16;
/// Rows of a pass on which errors are measured.
const SAMPLE: usize = 64;
/// Factors beyond this say nothing but that a channel is dead.
const WIDEST: f32 = 1e4;

/// What becomes of the integers of weights in 8 bits. The results are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Integers {
    /// They stay in memory, a byte for each value of the base beside the base itself.
    Kept,
    /// Each product makes those it packs again, out of the base as it is stored.
    Remade,
}

/// How one linear is computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Its name in the model.
    pub name: String,
    /// Whether in 8 bits; in f32 otherwise.
    pub int8: bool,
    /// SmoothQuant's exponent; 0 for no smoothing.
    pub exponent: f32,
    /// Input channels multiplied in f32.
    pub outliers: Vec<u32>,
    /// Relative error of the output in 8 bits, and of the input's gradient where it was computed.
    pub forward_error: f64,
    pub backward_error: Option<f64>,
    /// What the input's channels are multiplied by before they are quantized.
    #[serde(skip)]
    pub factors: Option<Vec<f32>>,
}

/// Choices that do not fit a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("it says nothing of {name}")]
    Missing { name: String },
    #[error("{name} has another number of channels")]
    Channels { name: String },
    #[error("the outliers of {name} do not ascend")]
    Outliers { name: String },
    #[error("{count} of its linears are not in the model")]
    Unknown { count: usize },
}

/// What is known of one linear during a calibration: a choice for each entry of [`TRIED`].
type Candidates = Vec<Choice>;

/// Errors measured during a pass, by [`LinearId`].
#[derive(Default)]
struct Measured {
    linears: Vec<Candidates>,
    /// Of the weight in 8 bits that was tried last.
    memory: Vec<i8>,
}

/// Measures each linear that may be computed in 8 bits, the first time it is seen: a head sees a pass in several blocks.
struct Calibration {
    measured: Arc<Mutex<Measured>>,
    /// By [`LinearId`].
    is_candidate: Vec<bool>,
}

impl Watch for Calibration {
    fn input(&mut self, id: LinearId, linear: &Linear, x: &[f32]) {
        let measured = &mut *self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        let Measured { linears, memory } = measured;
        if !self.is_candidate[id.0] || !linears[id.0].is_empty() {
            return;
        }
        let matrix = &linear.weight;
        let (k, n) = (linear.cols(), linear.rows());
        let rows = sample(x, k, k);
        let m = rows.len() / k;
        let (mut expected, mut y) = (vec![0.0; m * n], vec![0.0; m * n]);
        gemm(m, n, &[Term::new(k, MatRef::rows(&rows, k), Rhs::Transposed(matrix))], Out::set(&mut expected, n));
        let (inputs, weights) = (column_maxima(&F32Panel::new(x, k)), column_maxima(matrix));
        let mut quantized = Int8Rows::default();
        for (exponent, count) in TRIED {
            let outliers = largest(&inputs, count);
            let factors = (exponent > 0.0).then(|| smoothing(&inputs, &weights, exponent));
            let weight = Int8Matrix::in_memory(std::mem::take(memory), matrix, factors.as_deref(), &outliers);
            quantized.quantize_input(&rows, &weight);
            gemm(m, n, &[Term::int8(&quantized, &weight)], Out::set(&mut y, n));
            *memory = weight.into_memory();
            let forward_error = relative_error(&y, &expected, n);
            let name = linear.name.clone();
            linears[id.0].push(Choice {
                name,
                int8: true,
                exponent,
                outliers,
                forward_error,
                backward_error: None,
                factors,
            });
        }
    }

    fn gradient(&mut self, id: LinearId, linear: &Linear, g: &[f32], row: usize) {
        let measured = &mut *self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        let Measured { linears, memory } = measured;
        let candidates = &mut linears[id.0];
        if candidates.is_empty() || candidates.iter().any(|choice| choice.backward_error.is_some()) {
            return;
        }
        let matrix = &linear.weight;
        let (k, n) = (linear.cols(), linear.rows());
        let rows = sample(g, n, row);
        let m = rows.len() / n;
        let (mut expected, mut dx) = (vec![0.0; m * k], vec![0.0; m * k]);
        gemm(m, k, &[Term::new(n, MatRef::rows(&rows, n), Rhs::Plain(matrix))], Out::set(&mut expected, k));
        let mut quantized = Int8Rows::default();
        for choice in candidates {
            let factors = choice.factors.as_deref();
            let weight = Int8Matrix::in_memory(std::mem::take(memory), matrix, factors, &choice.outliers);
            quantized.quantize_gradient(&rows, n, m, &weight, linear.gradient_rounding);
            gemm(m, k, &[Term::int8_plain(&quantized, &weight)], Out::set(&mut dx, k));
            *memory = weight.into_memory();
            choice.backward_error = Some(relative_error(&dx, &expected, k));
        }
    }
}

impl Choice {
    /// That of a linear of which nothing is known: f32.
    fn unmeasured(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            int8: false,
            exponent: 0.0,
            outliers: Vec::new(),
            forward_error: 0.0,
            backward_error: None,
            factors: None,
        }
    }

    /// The larger error of the two directions.
    fn error(&self) -> f64 {
        self.forward_error.max(self.backward_error.unwrap_or(0.0))
    }
}

/// Some rows of `width` values that start `row` elements apart, evenly spread.
fn sample(x: &[f32], width: usize, row: usize) -> Vec<f32> {
    let rows = x.len().div_ceil(row);
    let taken = rows.min(SAMPLE);
    (0..taken).flat_map(|i| &x[i * rows / taken * row..][..width]).copied().collect()
}

/// The channels with the largest values, in ascending order; none where that would be most of them.
fn largest(inputs: &[f32], count: usize) -> Vec<u32> {
    let mut channels: Vec<u32> = (0..inputs.len() as u32).collect();
    if 8 * count > channels.len() {
        return Vec::new();
    }
    channels.sort_by(|&a, &b| inputs[b as usize].total_cmp(&inputs[a as usize]));
    channels.truncate(count);
    channels.sort_unstable();
    channels
}

/// SmoothQuant's factors for the input: `max|w|^(1 − exponent) / max|x|^exponent` for each channel.
fn smoothing(inputs: &[f32], weights: &[f32], exponent: f32) -> Vec<f32> {
    let factor = |(x, w): (&f32, &f32)| {
        let factor = w.powf(1.0 - exponent) / x.powf(exponent);
        if factor > 1.0 / WIDEST && factor < WIDEST { factor } else { 1.0 }
    };
    inputs.iter().zip(weights).map(factor).collect()
}

/// The root mean square over rows of `width` elements of ‖a − b‖ / ‖b‖. By rows, because a single one can be a thousand times as large as
/// the others (the first token of a sequence often is) and would hide what happens to them. Rows of zeros are left out.
fn relative_error(a: &[f32], b: &[f32], width: usize) -> f64 {
    let (mut sum, mut rows) = (0.0, 0);
    for (a, b) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
        let norm: f64 = b.iter().map(|&b| f64::from(b).powi(2)).sum();
        let difference: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a - b).powi(2)).sum();
        if norm != 0.0 {
            sum += difference / norm;
            rows += 1;
        }
    }
    let error = (sum / f64::from(rows.max(1))).sqrt();
    // What is not a number is larger than every limit but none.
    if error.is_finite() { error } else { f64::MAX }
}

/// The linears that can be computed in 8 bits: those whose weight is the base's. The loss is not quantized, so that a head on which
/// anything stands is left out.
fn candidates(model: &Model, overlay: &Overlay) -> Vec<LinearId> {
    let all = (0..model.linears.len()).map(LinearId);
    let is_candidate = |&id: &LinearId| {
        let is_changed_head = id == model.head && overlay.changes_linear(model, id);
        overlay.change(id).weight.is_none() && !is_changed_head
    };
    all.filter(is_candidate).collect()
}

impl Compute {
    /// Measures each linear on a pass of the run's own data, forward and, with `backward`, backward, and computes in 8 bits those whose
    /// errors are within `limit`.
    pub fn calibrate(
        model: &Model,
        overlay: &Overlay,
        params: &[f32],
        pass: &Pass,
        backward: bool,
        limit: f64,
        integers: Integers,
    ) -> (Self, Vec<Choice>) {
        let candidates = candidates(model, overlay);
        let mut is_candidate = vec![false; model.linears.len()];
        candidates.iter().for_each(|id| is_candidate[id.0] = true);
        let linears = vec![Candidates::new(); model.linears.len()];
        let measured = Arc::new(Mutex::new(Measured { linears, memory: Vec::new() }));
        let watched = Self::watched(Box::new(Calibration { measured: Arc::clone(&measured), is_candidate }));
        let norms = RowNorms::of(model, overlay, params);
        let run = Run { model, overlay, params, norms: &norms, compute: &watched, pass, step: None, parts: &[] };
        let mut workspace = Workspace::new(model, Saving::BlockInputs);
        if backward {
            run.loss_and_gradient(&mut vec![0.0; params.len()], &mut workspace);
        } else {
            run.loss(&mut workspace);
        }
        drop(workspace);
        let mut measured = measured.lock().unwrap_or_else(PoisonError::into_inner);
        let choose = |id: &LinearId| {
            let tried = std::mem::take(&mut measured.linears[id.0]).into_iter();
            match tried.min_by(|a, b| a.error().total_cmp(&b.error())) {
                Some(choice) => Choice { int8: choice.error() <= limit, ..choice },
                // The pass did not come by: a head where nothing is a label.
                None => Choice::unmeasured(&model.linear(*id).name),
            }
        };
        let choices: Vec<Choice> = candidates.iter().map(choose).collect();
        (Self::of_checked(model, &candidates, &choices, integers), choices)
    }

    /// Computes linears as an earlier calibration chose.
    ///
    /// # Errors
    /// Choices that are not of this model, or not of all its linears that can be computed in 8 bits.
    pub fn from_choices(
        model: &Model,
        overlay: &Overlay,
        choices: &[Choice],
        integers: Integers,
    ) -> Result<Self, Error> {
        let candidates = candidates(model, overlay);
        let mut ordered = Vec::with_capacity(candidates.len());
        for &id in &candidates {
            let linear = model.linear(id);
            let Some(choice) = choices.iter().find(|choice| choice.name == linear.name) else {
                return Err(Error::Missing { name: linear.name.clone() });
            };
            let outside = choice.outliers.iter().any(|&channel| channel as usize >= linear.cols());
            if outside || choice.factors.as_ref().is_some_and(|factors| factors.len() != linear.cols()) {
                return Err(Error::Channels { name: choice.name.clone() });
            }
            if !choice.outliers.is_sorted_by(|a, b| a < b) {
                return Err(Error::Outliers { name: choice.name.clone() });
            }
            ordered.push(choice.clone());
        }
        match choices.len() - ordered.len() {
            0 => Ok(Self::of_checked(model, &candidates, &ordered, integers)),
            count => Err(Error::Unknown { count }),
        }
    }

    /// `choices` are those of `candidates`, in their order.
    fn of_checked(model: &Model, candidates: &[LinearId], choices: &[Choice], integers: Integers) -> Self {
        let mut int8 = vec![None; model.linears.len()];
        let mut memory = Vec::new();
        for (id, choice) in candidates.iter().zip(choices).filter(|(_, choice)| choice.int8) {
            let matrix = &model.linear(*id).weight;
            let factors = choice.factors.as_deref();
            let weight = Int8Matrix::in_memory(std::mem::take(&mut memory), matrix, factors, &choice.outliers);
            int8[id.0] = Some(Arc::new(match integers {
                Integers::Kept => weight,
                Integers::Remade => {
                    let remade;
                    (remade, memory) = weight.remade(Arc::new(matrix.clone()));
                    remade
                }
            }));
        }
        Self { int8, watch: None }
    }

    /// Bytes that the weights would take in 8 bits, if all were that can be.
    pub fn planned_int8_bytes(model: &Model, overlay: &Overlay, integers: Integers) -> usize {
        let linears = candidates(model, overlay).into_iter().map(|id| model.linear(id));
        let bytes = linears.map(|l| Int8Matrix::planned_bytes(l.rows(), l.cols(), MOST_OUTLIERS));
        match integers {
            Integers::Kept => bytes.map(|(integers, others)| integers + others).sum(),
            // The largest is whole while its scales are sought.
            Integers::Remade => {
                let (most, others) = bytes.fold((0, 0), |(most, sum), (bytes, others)| (most.max(bytes), sum + others));
                most + others
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_kernels::int8::Rounding;
    use retune_quant::{Format, Matrix, SharedBytes};

    const IN: usize = 256;
    const OUT: usize = 64;
    /// As many channels as are multiplied in f32, spread over the input.
    fn large() -> Vec<u32> {
        (3..IN as u32).step_by(IN / MOST_OUTLIERS).collect()
    }

    /// Values in [−1, 1], always the same.
    fn values(seed: u32, len: usize) -> Vec<f32> {
        let hash = |i: u32| (i + seed).wrapping_mul(0x9E37_79B1) ^ (i + seed).wrapping_mul(0x85EB_CA77) >> 13;
        (0..len as u32).map(|i| (hash(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn linear() -> Linear {
        let bytes = values(1, OUT * IN).into_iter().flat_map(f32::to_le_bytes).collect();
        Linear {
            name: "linear".to_owned(),
            weight: Matrix::new(Format::F32, OUT, IN, SharedBytes::from_vec(bytes)).unwrap(),
            bias: None,
            gradient_rounding: Rounding::Nearest,
        }
    }

    fn calibration() -> (Calibration, Arc<Mutex<Measured>>) {
        let measured = Arc::new(Mutex::new(Measured { linears: vec![Candidates::new()], memory: Vec::new() }));
        (Calibration { measured: Arc::clone(&measured), is_candidate: vec![true] }, measured)
    }

    #[test]
    fn the_largest_channels_are_tried_in_f32_and_take_the_error_away() {
        let linear = linear();
        let mut x = values(2, 20 * IN);
        x.chunks_mut(IN).for_each(|row| large().iter().for_each(|&channel| row[channel as usize] *= 80.0));
        let (mut calibration, measured) = calibration();
        calibration.input(LinearId(0), &linear, &x);
        let candidates = measured.lock().unwrap().linears[0].clone();
        for (choice, (_, count)) in candidates.iter().zip(TRIED) {
            assert_eq!(choice.outliers, if count == 0 { Vec::new() } else { large() });
        }
        let (plain, split) = (candidates[0].forward_error, candidates[2].forward_error);
        assert!(split < plain / 4.0, "{split} against {plain}");
    }

    #[test]
    fn a_linear_that_comes_by_again_is_not_measured_again() {
        let linear = linear();
        let (mut calibration, measured) = calibration();
        calibration.input(LinearId(0), &linear, &values(2, 20 * IN));
        calibration.gradient(LinearId(0), &linear, &values(3, 20 * OUT), OUT);
        let first = measured.lock().unwrap().linears[0].clone();
        assert!(first.iter().all(|choice| choice.backward_error.is_some_and(|error| error > 0.0)));
        // As different as can be: one value alone is not zero.
        let alone = |len: usize| (0..20 * len).map(|i| f32::from(u8::from(i % len == 0))).collect::<Vec<f32>>();
        calibration.input(LinearId(0), &linear, &alone(IN));
        calibration.gradient(LinearId(0), &linear, &alone(OUT), OUT);
        assert_eq!(measured.lock().unwrap().linears[0], first);
    }
}
