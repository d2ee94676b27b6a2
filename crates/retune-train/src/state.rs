//! Checkpoints of a run: everything that is needed to go on and end with the same bytes.
//!
//! A checkpoint is one safetensors file, `checkpoints/step-00000050.safetensors`: parameters and what the optimizer keeps, and the progress as
//! JSON in its metadata. It appears under its name only when it is whole; the newest few are kept. The parameters with the best held-out loss
//! are kept beside them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use retune_formats::safetensors::{Tensor, Values, stage};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::optimizer::{Optimizer, StateMut};

const PARAMETERS: &str = "parameters";
const PROGRESS: &str = "progress";
const BEST: &str = "best.safetensors";
const START: &str = "start.safetensors";

/// How far a run has come. No times and no speeds: two runs of the same configuration have the same progress.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    pub total_steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Held-out loss before the first step.
    pub initial_loss: Option<f64>,
    /// The latest held-out loss.
    pub last_loss: Option<f64>,
    pub best_loss: Option<f64>,
    pub best_step: u64,
    /// How many of the latest scores were no better than the best before each, by what early stopping asks of them; nothing else counts them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub scores_without_gain: u64,
    /// Whether scoring the held-out rows after this step was interrupted. It is not written where it is false, so that a run that was
    /// interrupted ends with the bytes of one that was not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub owes_score: bool,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

fn write_file(path: &Path, tensors: &[(&str, Values<'_>)], progress: &Progress) -> Result<(), Error> {
    let text = serde_json::to_string(progress).map_err(|error| Error::Serialize { error: error.to_string() })?;
    let lengths: Vec<[usize; 1]> = tensors.iter().map(|(_, values)| [values.len()]).collect();
    let tensors = tensors.iter().zip(&lengths);
    let tensors: Vec<Tensor<'_>> =
        tensors.map(|((name, values), shape)| Tensor { name, shape, values: *values }).collect();
    Ok(stage(path, &[(PROGRESS, &text)], &tensors)?.commit()?)
}

/// Writes a checkpoint, of parameters and what the optimizer keeps, and removes all but the newest `keep`; returns its path.
///
/// # Errors
/// A file that cannot be written, such as on a full disk; older checkpoints are untouched then.
pub fn write(
    directory: &Path,
    progress: &Progress,
    params: &[f32],
    optimizer: &Optimizer,
    keep: usize,
) -> Result<PathBuf, Error> {
    let path = directory.join(format!("step-{:08}.safetensors", progress.step));
    let mut tensors = vec![(PARAMETERS, Values::F32(params))];
    tensors.extend(optimizer.state());
    create(directory)?;
    write_file(&path, &tensors, progress)?;
    keep_newest(directory, keep)?;
    Ok(path)
}

/// Removes all checkpoints but the newest `keep`.
///
/// # Errors
/// A file that cannot be removed.
pub fn keep_newest(directory: &Path, keep: usize) -> Result<(), Error> {
    for old in list(directory)?.iter().rev().skip(keep.max(1)) {
        fs::remove_file(old).map_err(|error| Error::Io { path: old.clone(), error })?;
    }
    Ok(())
}

/// Writes the parameters with the best held-out loss so far.
///
/// # Errors
/// As [`write`].
pub fn write_best(directory: &Path, progress: &Progress, params: &[f32]) -> Result<(), Error> {
    create(directory)?;
    write_file(&directory.join(BEST), &[(PARAMETERS, Values::F32(params))], progress)
}

/// Writes the first parameters, for a run whose adapter keeps them.
///
/// # Errors
/// As [`write`].
pub fn write_start(directory: &Path, params: &[f32]) -> Result<(), Error> {
    create(directory)?;
    write_file(&directory.join(START), &[(PARAMETERS, Values::F32(params))], &Progress::default())
}

/// Reads the first parameters of a run; nothing where none were written.
///
/// # Errors
/// As [`read`].
pub fn read_start(directory: &Path, params: &mut [f32]) -> Result<Option<()>, Error> {
    let path = directory.join(START);
    if !path.exists() {
        return Ok(None);
    }
    let mut read = || {
        let content = map(&path)?;
        let file = SafeTensors::deserialize(&content).map_err(|error| damaged(&path, error))?;
        read_into(&path, &file, PARAMETERS, StateMut::F32(params))
    };
    read().map(Some).map_err(|error| match error {
        Error::CheckpointDamaged { path, reason } => Error::StartDamaged { path, reason },
        other => other,
    })
}

/// Whether a file of a folder of checkpoints is one that is written here.
pub fn is_own(name: &str) -> bool {
    let is_step = name.starts_with("step-") && name.ends_with(".safetensors");
    is_step || [BEST, START].contains(&name)
}

fn create(directory: &Path) -> Result<(), Error> {
    fs::create_dir_all(directory).map_err(|error| Error::Io { path: directory.to_owned(), error })
}

/// The checkpoints in a directory, oldest first.
///
/// # Errors
/// A directory that cannot be read; one that is not there holds none.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::Io { path: directory.to_owned(), error }),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::Io { path: directory.to_owned(), error })?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.starts_with("step-") && name.ends_with(".safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// The step of a checkpoint, by its name.
pub fn step_of(path: &Path) -> Option<u64> {
    path.file_stem()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

fn damaged(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::CheckpointDamaged { path: path.to_owned(), reason: reason.to_string() }
}

fn read_into(path: &Path, file: &SafeTensors, name: &str, values: StateMut<'_>) -> Result<(), Error> {
    let tensor = file.tensor(name).map_err(|error| damaged(path, error))?;
    let (dtype, len, bytes) = match &values {
        StateMut::F32(values) => (Dtype::F32, values.len(), size_of_val(*values)),
        StateMut::U8(values) => (Dtype::U8, values.len(), values.len()),
    };
    if tensor.dtype() != dtype || tensor.data().len() != bytes {
        return Err(Error::CheckpointOfAnotherRun {
            path: path.to_owned(),
            found: format!("{} values of {:?} in {name}", tensor.shape().iter().product::<usize>(), tensor.dtype()),
            expected: format!("{len} of {dtype:?}"),
        });
    }
    match values {
        StateMut::U8(values) => values.copy_from_slice(tensor.data()),
        StateMut::F32(values) => {
            for (value, bytes) in values.iter_mut().zip(tensor.data().as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
    }
    Ok(())
}

/// Reads a checkpoint into parameters and an optimizer, which takes up the steps.
///
/// # Errors
/// A file that is damaged, or holds another number of parameters.
pub fn read(path: &Path, params: &mut [f32], optimizer: &mut Optimizer) -> Result<Progress, Error> {
    let content = map(path)?;
    let file = SafeTensors::deserialize(&content).map_err(|error| damaged(path, error))?;
    read_into(path, &file, PARAMETERS, StateMut::F32(params))?;
    for (name, values) in optimizer.state_mut() {
        read_into(path, &file, name, values)?;
    }
    let progress = read_progress(path, &content)?;
    optimizer.steps = progress.step;
    Ok(progress)
}

fn read_progress(path: &Path, content: &[u8]) -> Result<Progress, Error> {
    let (_, header) = SafeTensors::read_metadata(content).map_err(|error| damaged(path, error))?;
    let metadata = header.metadata().as_ref().and_then(|m| m.get(PROGRESS));
    let text = metadata.ok_or_else(|| damaged(path, "its progress is missing"))?;
    serde_json::from_str(text).map_err(|error| damaged(path, error))
}

/// Maps a checkpoint: a copy beside the vectors it is read into would take more memory than training does.
fn map(path: &Path) -> Result<Mmap, Error> {
    let io = |error| Error::Io { path: path.to_owned(), error };
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.len() == 0 {
        return Err(damaged(path, "it is empty"));
    }
    // SAFETY: a checkpoint gets its name when it is whole and is never written again, only removed; the run's folder is locked.
    unsafe { Mmap::map(&file) }.map_err(io)
}

/// Reads the parameters with the best held-out loss, which are to be those of step `step`.
///
/// # Errors
/// As [`read`]; parameters of another step.
pub fn read_best(directory: &Path, step: u64, params: &mut [f32]) -> Result<(), Error> {
    let path = directory.join(BEST);
    let content = map(&path)?;
    let file = SafeTensors::deserialize(&content).map_err(|error| damaged(&path, error))?;
    let found = read_progress(&path, &content)?.best_step;
    if found != step {
        return Err(damaged(&path, format!("it holds step {found}, where the run's best is step {step}")));
    }
    read_into(&path, &file, PARAMETERS, StateMut::F32(params))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::{OptimizerName, Options};
    use retune_engine::params::ParamLayout;

    /// An optimizer that has taken a step on a tensor of `len` values and one of 2, and the parameters that it left.
    fn stepped(name: OptimizerName, len: usize) -> (Optimizer, Vec<f32>) {
        let mut layout = ParamLayout::default();
        layout.add("a".into(), vec![len / 64, 64], None);
        layout.add("b".into(), vec![2], None);
        let options = Options { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
        let mut optimizer = Optimizer::new(name, options, &layout);
        let mut params = vec![0.5; layout.len()];
        let mut gradients: Vec<f32> = (0..layout.len()).map(|i| (i as f32).sin()).collect();
        optimizer.step(&layout, 0.1, 1.0, &mut gradients, &mut params);
        (optimizer, params)
    }

    #[test]
    fn checkpoints_round_trip_rotate_and_refuse_damage() {
        for name in [OptimizerName::Adamw, OptimizerName::Adamw8bit, OptimizerName::Adafactor] {
            let directory = tempfile::tempdir().unwrap();
            let (optimizer, p) = stepped(name, 8192);
            let mut progress = Progress { total_steps: 9, best_loss: Some(0.1 + 0.2), ..Progress::default() };
            for step in 1..=4 {
                progress.step = step;
                write(directory.path(), &progress, &p, &optimizer, 2).unwrap();
            }
            let kept = list(directory.path()).unwrap();
            assert_eq!(kept.len(), 2);
            let fresh = |len| (stepped(name, len).0, vec![0.0; len + 2]);
            let (mut back, mut params) = fresh(8192);
            for (_, values) in back.state_mut() {
                match values {
                    StateMut::F32(values) => values.fill(0.0),
                    StateMut::U8(values) => values.fill(0),
                }
            }
            assert_ne!(back.state().len(), 0);
            assert_eq!(read(&kept[1], &mut params, &mut back).unwrap(), progress);
            let expected = {
                let mut optimizer = optimizer.clone();
                optimizer.steps = 4;
                optimizer
            };
            assert_eq!((back, &params), (expected, &p));

            let (mut other, mut others) = fresh(8256);
            let error = read(&kept[1], &mut others, &mut other);
            assert!(matches!(error, Err(Error::CheckpointOfAnotherRun { .. })));
            let whole = fs::read(&kept[1]).unwrap();
            for len in [0, 7, 20, whole.len() - 1] {
                fs::write(&kept[1], &whole[..len]).unwrap();
                let (mut back, mut params) = fresh(8192);
                let result = read(&kept[1], &mut params, &mut back);
                assert!(matches!(result, Err(Error::CheckpointDamaged { .. })), "{len} bytes");
            }

            progress.best_step = 3;
            write_best(directory.path(), &progress, &p).unwrap();
            let mut best = vec![0.0; p.len()];
            assert!(matches!(read_best(directory.path(), 2, &mut best), Err(Error::CheckpointDamaged { .. })));
            read_best(directory.path(), 3, &mut best).unwrap();
            assert_eq!(best, p);
            assert_eq!(list(directory.path()).unwrap().len(), 2, "the best parameters are no checkpoint");
        }
    }
}
