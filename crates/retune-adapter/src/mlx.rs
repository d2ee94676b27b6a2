//! A LoRA as mlx-lm keeps it: `adapters.safetensors` with A as `[in, r]` and B as `[r, out]` under the names of the model's modules, and
//! `adapter_config.json` with one rank and one scale for all.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use retune_formats::atomic::{Staged, io_error};
use retune_formats::safetensors::{self, Tensor, Values};
use retune_quant::SharedBytes;
use serde_json::{Value, json};

use crate::convert::{Conversion, Kept};
use crate::delta::{Deltas, LoraDelta};
use crate::error::Error;
use crate::files::CONFIG_FILE;

/// Name of the tensors' file.
pub const WEIGHTS_FILE: &str = "adapters.safetensors";

/// What stands before the number of a layer in the names of modules of models that mlx-lm has with Llama's names.
const LAYERS: &str = "model.layers.";

/// Writes changes of a model of `layers` layers into a directory, which is made if need be.
///
/// # Errors
/// A module outside of the layers, which mlx-lm adapts alone; what the system refuses.
pub fn write(dir: &Path, layers: usize, base_model: Option<&str>, deltas: &Deltas) -> Result<(), Error> {
    let kept = deltas.iter().map(|(module, delta)| Ok((module.clone(), Kept::of_terms(delta.clone(), None)?)));
    let conversion = Conversion::of(kept.collect::<Result<_, Error>>()?);
    let mut keys = BTreeSet::new();
    let mut tensors = Vec::new();
    for (module, kept) in &conversion.modules {
        let key = module.strip_prefix(LAYERS).and_then(|inner| Some(inner.split_once('.')?.1));
        let Some(key) = key else {
            return Err(Error::NotLowRank {
                what: format!("a change of {module}, which is in no layer by mlx-lm's names"),
            });
        };
        keys.insert(key);
        let LoraDelta { r, in_features, out_features, a, b, .. } = kept.delta.clone().padded(conversion.r);
        tensors.push((format!("{module}.lora_a"), vec![in_features, r], transposed(&a, in_features)));
        tensors.push((format!("{module}.lora_b"), vec![r, out_features], transposed(&b, r)));
    }
    let config = json!({
        "fine_tune_type": "lora",
        "model": base_model,
        "num_layers": layers,
        "lora_parameters": { "rank": conversion.r, "scale": 1.0, "dropout": 0.0, "keys": keys },
    });
    let tensors: Vec<Tensor<'_>> =
        tensors.iter().map(|(name, shape, values)| Tensor { name, shape, values: Values::F32(values) }).collect();
    fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    let weights = safetensors::stage(&dir.join(WEIGHTS_FILE), &[("format", "mlx")], &tensors)?;
    let config = Staged::new(&dir.join(CONFIG_FILE), format!("{config:#}\n").as_bytes())?;
    weights.commit()?;
    Ok(config.commit()?)
}

/// Reads the changes back.
///
/// # Errors
/// Files that are damaged.
pub fn read(dir: &Path) -> Result<Deltas, Error> {
    let config: Value = retune_formats::files::read_json(&dir.join(CONFIG_FILE))?;
    let scale = config["lora_parameters"]["scale"].as_f64().unwrap_or(1.0) as f32;
    let path = dir.join(WEIGHTS_FILE);
    let bytes = fs::read(&path).map_err(io_error("read", &path))?;
    let file = safetensors::parse(&SharedBytes::from_vec(bytes))?;
    let mut deltas = Deltas::new();
    for (key, a) in &file {
        let Some(module) = key.strip_suffix(".lora_a") else { continue };
        let key_b = format!("{module}.lora_b");
        let Some(b) = file.get(&key_b) else { return Err(Error::TensorMissing { name: key_b }) };
        let (&[in_features, r], &[rank, out_features]) = (a.shape.as_slice(), b.shape.as_slice()) else {
            return Err(Error::TensorUnknown { name: key.clone() });
        };
        if rank != r {
            return Err(Error::TensorShape { name: key_b, found: b.shape.clone(), expected: vec![r, out_features] });
        }
        let (a, b) = (transposed(&a.to_f32(key)?, r), transposed(&b.to_f32(&key_b)?, out_features));
        deltas.insert(module.to_owned(), LoraDelta { r, in_features, out_features, scale, a, b });
    }
    Ok(deltas)
}

/// The transpose of a matrix with this many columns.
fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols.max(1);
    (0..cols).flat_map(|j| (0..rows).map(move |i| values[i * cols + j])).collect()
}
