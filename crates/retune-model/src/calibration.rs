//! Which linears of a model are computed in 8 bits, and how: measured on rows of the run's own data, decided by a fixed rule.
//!
//! One pass in f32 shows each frozen linear its input and the gradient of its output. From the input's largest value in each channel, and
//! the weight's, come factors that move the range of outlier channels into the weight (Xiao et al. 2022, SmoothQuant, equation 4). That helps
//! the forward, and harms the backward, which has no such outliers but the same weight. The largest channels can be multiplied in f32
//! instead, which harms nothing but costs time. Of a few combinations the one is taken whose larger error of the two is
//! smallest: taking the cheapest of those within 2% was tried, and moved the losses of the first three steps of a real run by 1 to 3%, where
//! this moves them by less than 0.5%. A linear whose error is over the limit all the same stays in f32.
//! Nothing is timed, so that a run decides the same again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_formats::atomic;
use retune_kernels::F32Panel;
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::int8::{Int8Matrix, Int8Rows, column_maxima};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::linear::Linear;
use crate::model::Model;
use crate::params::Weight;
use crate::pass::Pass;
use crate::workspace::{Keep, Workspace};

/// The largest relative error, forward or backward, of a linear that is computed in 8 bits when it is ours to choose.
pub const ERROR_LIMIT: f64 = 0.06;
/// What is tried: an exponent, 0 for no smoothing, and a number of outlier channels.
const TRIED: [(f32, usize); 4] = [(0.0, 0), (0.5, 0), (0.0, MOST_OUTLIERS), (0.3, MOST_OUTLIERS)];
const MOST_OUTLIERS: usize = 16;
/// Rows of a pass on which errors are measured.
const SAMPLE: usize = 64;
/// Factors beyond this say nothing but that a channel is dead.
const WIDEST: f32 = 1e4;
/// The key of the file's metadata under which the choices stand.
const METADATA: &str = "choices";

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

/// What is known of one linear during a calibration: a choice for each entry of [`TRIED`].
type Candidates = Vec<Choice>;

/// Errors measured during a pass.
#[derive(Default)]
pub(crate) struct Calibration {
    linears: BTreeMap<String, Candidates>,
    /// Of the weight in 8 bits that was tried last.
    memory: Vec<i8>,
}

impl Calibration {
    /// Measures a linear on its input `x: [T, in]`; the first time it is seen.
    pub(crate) fn forward(&mut self, linear: &Linear, x: &[f32]) {
        let Weight::Frozen(matrix) = &linear.weight else { return };
        if self.linears.contains_key(&linear.name) {
            return;
        }
        let (k, n) = (linear.in_features, linear.out_features);
        let rows = sample(x, k);
        let m = rows.len() / k;
        let (mut expected, mut y) = (vec![0.0; m * n], vec![0.0; m * n]);
        gemm(m, n, &[Term::new(k, MatRef::rows(&rows, k), Rhs::Transposed(matrix))], Out::set(&mut expected, n));
        let (inputs, weights) = (column_maxima(&F32Panel::new(x, k)), column_maxima(matrix));
        let mut quantized = Int8Rows::default();
        let mut candidates = Candidates::new();
        for (exponent, count) in TRIED {
            let outliers = largest(&inputs, count);
            let factors = (exponent > 0.0).then(|| smoothing(&inputs, &weights, exponent));
            let memory = std::mem::take(&mut self.memory);
            let weight = Int8Matrix::in_memory(memory, matrix, factors.as_deref(), &outliers);
            quantized.quantize_input(&rows, &weight);
            gemm(m, n, &[Term::int8(&quantized, &weight)], Out::set(&mut y, n));
            self.memory = weight.into_memory();
            let forward_error = relative_error(&y, &expected, n);
            let name = linear.name.clone();
            candidates.push(Choice {
                name,
                int8: true,
                exponent,
                outliers,
                forward_error,
                backward_error: None,
                factors,
            });
        }
        self.linears.insert(linear.name.clone(), candidates);
    }

    /// Measures a linear on the gradient `g: [T, out]` of its output; the first time alone, as `forward`: a head sees a pass in several
    /// blocks.
    pub(crate) fn backward(&mut self, linear: &Linear, g: &[f32]) {
        let (Weight::Frozen(matrix), Some(candidates)) = (&linear.weight, self.linears.get_mut(&linear.name)) else {
            return;
        };
        if candidates.iter().any(|choice| choice.backward_error.is_some()) {
            return;
        }
        let (k, n) = (linear.in_features, linear.out_features);
        let rows = sample(g, n);
        let m = rows.len() / n;
        let (mut expected, mut dx) = (vec![0.0; m * k], vec![0.0; m * k]);
        gemm(m, k, &[Term::new(n, MatRef::rows(&rows, n), Rhs::Plain(matrix))], Out::set(&mut expected, k));
        let mut quantized = Int8Rows::default();
        for choice in candidates {
            let memory = std::mem::take(&mut self.memory);
            let weight = Int8Matrix::in_memory(memory, matrix, choice.factors.as_deref(), &choice.outliers);
            quantized.quantize_gradient(&rows, &weight, linear.gradient_rounding);
            gemm(m, k, &[Term::int8_plain(&quantized, &weight)], Out::set(&mut dx, k));
            self.memory = weight.into_memory();
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

/// Some rows of `x: [T, width]`, evenly spread.
fn sample(x: &[f32], width: usize) -> Vec<f32> {
    let rows = x.len() / width;
    let taken = rows.min(SAMPLE);
    (0..taken).flat_map(|i| &x[i * rows / taken * width..][..width]).copied().collect()
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

impl Model {
    /// Measures each frozen linear on a pass of the run's own data, forward and, with `backward`, backward, and from then on computes in
    /// 8 bits those whose errors are within `limit`. All of the model must be in f32 before.
    pub fn calibrate(&mut self, params: &[f32], pass: &Pass, backward: bool, limit: f64) -> Result<Vec<Choice>, Error> {
        let mut workspace = Workspace::new(self, Keep::Inputs);
        workspace.temporary.linear.calibration = Some(Box::default());
        if backward {
            self.loss_and_gradient(params, &mut vec![0.0; params.len()], pass, None, &mut workspace);
        } else {
            self.loss(params, pass, &mut workspace);
        }
        let mut linears = workspace.temporary.linear.calibration.take().unwrap_or_default().linears;
        drop(workspace);
        let mut choices = Vec::new();
        self.for_each_int8_linear(|linear| {
            let candidates = linears.remove(&linear.name).into_iter().flatten();
            let best = candidates.min_by(|a, b| a.error().total_cmp(&b.error()));
            choices.push(match best {
                Some(choice) => Choice { int8: choice.error() <= limit, ..choice },
                // The pass did not come by: a head where nothing is a label.
                None => Choice::unmeasured(&linear.name),
            });
            Ok(())
        })?;
        self.compute_as(&choices)?;
        Ok(choices)
    }

    /// Computes linears as an earlier calibration chose.
    ///
    /// # Errors
    /// Choices that are not of this model, or not of all its linears that can be computed in 8 bits.
    pub fn compute_as(&mut self, choices: &[Choice]) -> Result<(), Error> {
        let mut found = 0;
        self.for_each_int8_linear(|linear| {
            let Some(choice) = choices.iter().find(|choice| choice.name == linear.name) else {
                return Err(Error::Calibration { cause: format!("it says nothing of {}", linear.name) });
            };
            found += 1;
            let Weight::Frozen(matrix) = &linear.weight else { return Ok(()) };
            let outside = choice.outliers.iter().any(|&channel| channel as usize >= linear.in_features);
            if outside || choice.factors.as_ref().is_some_and(|factors| factors.len() != linear.in_features) {
                return Err(Error::Calibration { cause: format!("{} has another number of channels", choice.name) });
            }
            if !choice.outliers.is_sorted_by(|a, b| a < b) {
                return Err(Error::Calibration { cause: format!("the outliers of {} do not ascend", choice.name) });
            }
            linear.int8 =
                choice.int8.then(|| Arc::new(Int8Matrix::new(matrix, choice.factors.as_deref(), &choice.outliers)));
            Ok(())
        })?;
        match choices.len() - found {
            0 => Ok(()),
            n => Err(Error::Calibration { cause: format!("{n} of its linears are not in the model") }),
        }
    }

    /// The same model with all its linears in f32: as other software computes what was trained.
    pub fn in_f32(&self) -> Self {
        let mut model = self.clone();
        model.layers.iter_mut().flat_map(crate::model::Layer::linears_mut).for_each(|linear| linear.int8 = None);
        model.head.int8 = None;
        model
    }

    /// The linears that can be computed in 8 bits: those whose weight is frozen. The loss is not quantized, so that a head that trains
    /// anything of its own is left out.
    fn for_each_int8_linear(&mut self, mut f: impl FnMut(&mut Linear) -> Result<(), Error>) -> Result<(), Error> {
        let head = (!self.head.is_trainable()).then_some(&mut self.head);
        for linear in self.layers.iter_mut().flat_map(crate::model::Layer::linears_mut).chain(head) {
            if linear.weight.range().is_none() {
                f(linear)?;
            }
        }
        Ok(())
    }

    /// Bytes that the weights would take in 8 bits, if all were that can be.
    pub fn planned_int8_bytes(&self) -> usize {
        let head = (!self.head.is_trainable()).then_some(&self.head);
        let linears = self.layers.iter().flat_map(|layer| layer.linears()).chain(head);
        let frozen = linears.filter(|linear| linear.weight.range().is_none());
        frozen.map(|l| Int8Matrix::planned_bytes(l.out_features, l.in_features, MOST_OUTLIERS)).sum()
    }

    /// Bytes of the stored weights that a model in 8 bits still reads in every step.
    pub fn stored_bytes_beside_int8(&self) -> usize {
        match &self.embedding {
            Weight::Frozen(matrix) => matrix.bytes_len(),
            Weight::Trainable { .. } => 0,
        }
    }
}

/// Writes choices to a file: safetensors with the factors, the rest in its metadata.
///
/// # Errors
/// A file that cannot be written.
pub fn write(path: &Path, choices: &[Choice]) -> Result<(), Error> {
    let bytes = |factors: &[f32]| -> Vec<u8> { factors.iter().flat_map(|f| f.to_le_bytes()).collect() };
    let factors: Vec<(&str, Vec<u8>)> =
        choices.iter().filter_map(|c| Some((c.name.as_str(), bytes(c.factors.as_deref()?)))).collect();
    let failed = |error: String| Error::Write { path: path.to_owned(), error: std::io::Error::other(error) };
    let mut views = Vec::new();
    for (name, bytes) in &factors {
        let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes).map_err(|e| failed(e.to_string()))?;
        views.push((*name, view));
    }
    let text = serde_json::to_string(choices).map_err(|e| failed(e.to_string()))?;
    let metadata = std::collections::HashMap::from([(METADATA.to_owned(), text)]);
    let content = safetensors::serialize(views, Some(metadata)).map_err(|e| failed(e.to_string()))?;
    Ok(atomic::write(path, &content)?)
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// A file that cannot be read or is damaged.
pub fn read(path: &Path) -> Result<Vec<Choice>, Error> {
    let damaged = |cause: String| Error::Calibration { cause: format!("{} is damaged: {cause}", path.display()) };
    let content = std::fs::read(path)
        .map_err(|error| Error::Calibration { cause: format!("cannot read {}: {error}", path.display()) })?;
    let (_, header) = SafeTensors::read_metadata(&content).map_err(|e| damaged(e.to_string()))?;
    let tensors = SafeTensors::deserialize(&content).map_err(|e| damaged(e.to_string()))?;
    let text = header.metadata().as_ref().and_then(|m| m.get(METADATA));
    let text = text.ok_or_else(|| damaged("it has no choices".to_owned()))?;
    let mut choices: Vec<Choice> = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
    let smoothed = choices.iter().filter(|c| c.exponent > 0.0).count();
    if tensors.len() != smoothed {
        return Err(damaged(format!(
            "it has factors of {} linears, and {smoothed} are said to have some",
            tensors.len()
        )));
    }
    for choice in choices.iter_mut().filter(|c| c.exponent > 0.0) {
        let view = tensors.tensor(&choice.name).map_err(|e| damaged(e.to_string()))?;
        let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if view.dtype() != Dtype::F32 || !values.iter().all(|v| v.is_finite() && *v > 0.0) {
            return Err(damaged(format!("the factors of {} are not positive numbers in f32", choice.name)));
        }
        choice.factors = Some(values);
    }
    Ok(choices)
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
            in_features: IN,
            out_features: OUT,
            weight: Weight::Frozen(Matrix::new(Format::F32, OUT, IN, SharedBytes::from_vec(bytes)).unwrap()),
            bias: None,
            lora: None,
            int8: None,
            gradient_rounding: Rounding::Nearest,
        }
    }

    #[test]
    fn the_largest_channels_are_tried_in_f32_and_take_the_error_away() {
        let linear = linear();
        let mut x = values(2, 20 * IN);
        x.chunks_mut(IN).for_each(|row| large().iter().for_each(|&channel| row[channel as usize] *= 80.0));
        let mut calibration = Calibration::default();
        calibration.forward(&linear, &x);
        let candidates = &calibration.linears["linear"];
        for (choice, (_, count)) in candidates.iter().zip(TRIED) {
            assert_eq!(choice.outliers, if count == 0 { Vec::new() } else { large() });
        }
        let (plain, split) = (candidates[0].forward_error, candidates[2].forward_error);
        assert!(split < plain / 4.0, "{split} against {plain}");
    }

    #[test]
    fn a_linear_that_comes_by_again_is_not_measured_again() {
        let linear = linear();
        let mut calibration = Calibration::default();
        calibration.forward(&linear, &values(2, 20 * IN));
        calibration.backward(&linear, &values(3, 20 * OUT));
        let first = calibration.linears["linear"].clone();
        assert!(first.iter().all(|choice| choice.backward_error.is_some_and(|error| error > 0.0)));
        // As different as can be: one value alone is not zero.
        let alone = |len: usize| (0..20 * len).map(|i| f32::from(u8::from(i % len == 0))).collect::<Vec<f32>>();
        calibration.forward(&linear, &alone(IN));
        calibration.backward(&linear, &alone(OUT));
        assert_eq!(calibration.linears["linear"], first);
    }
}
