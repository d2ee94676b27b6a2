//! The record of how a run's linears are computed, `calibration.safetensors`: SmoothQuant's factors, and the choices in its metadata.

use std::path::Path;

use retune_engine::calibrate::Choice;
use retune_formats::safetensors::{Tensor, Values, stage};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use crate::error::Error;

/// The key of the file's metadata under which the choices stand.
const METADATA: &str = "choices";

/// Writes the choices of a calibration.
///
/// # Errors
/// A file that cannot be written.
pub fn write(path: &Path, choices: &[Choice]) -> Result<(), Error> {
    let text = serde_json::to_string(choices).map_err(|error| Error::Serialize { error: error.to_string() })?;
    let mut factors: Vec<(&str, &[f32])> =
        choices.iter().filter_map(|c| Some((c.name.as_str(), c.factors.as_deref()?))).collect();
    factors.sort_unstable_by_key(|(name, _)| *name);
    let lengths: Vec<[usize; 1]> = factors.iter().map(|(_, values)| [values.len()]).collect();
    let tensors = factors.iter().zip(&lengths);
    let tensors: Vec<Tensor<'_>> =
        tensors.map(|((name, values), shape)| Tensor { name, shape, values: Values::F32(values) }).collect();
    Ok(stage(path, &[(METADATA, &text)], &tensors)?.commit()?)
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
