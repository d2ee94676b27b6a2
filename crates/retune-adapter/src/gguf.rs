//! A LoRA as a GGUF file beside the base's, as llama.cpp's `convert_lora_to_gguf.py` writes it and `--lora` reads it.
//!
//! llama.cpp scales a module's B·A by the file's one alpha over that module's rank. What rsLoRA and patterns of alphas say otherwise goes into
//! that alpha where it is the same for all modules, and into B elsewhere. Rows of B are ordered as the base's rows are; A and B of a module
//! whose weight transformers stores as `[in, out]` are those of `[out, in]`, which the converter swaps.

use std::path::Path;

use retune_formats::atomic::Draft;
use retune_formats::files::map_file;
use retune_formats::gguf::write::{Entry, Header, Linears, padding, tensor_bytes};
use retune_formats::gguf::{Gguf, TensorInfo};
use retune_quant::Format;

use crate::delta::{Deltas, LoraDelta};
use crate::error::Error;

const ALPHA: &str = "adapter.lora.alpha";
const PARTS: [&str; 2] = ["lora_a", "lora_b"];

/// Writes changes of the linears of a base.
///
/// # Errors
/// A module that the base's files have no matrix for; what the system refuses.
pub fn write_lora(path: &Path, base: &Linears, deltas: &Deltas) -> Result<(), Error> {
    let mut header = Header::default();
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let alpha = alpha(deltas);
    header.set("general.architecture", Entry::Text(&base.architecture));
    header.set("general.type", Entry::Text("adapter"));
    header.set("adapter.type", Entry::Text("lora"));
    header.set("general.name", Entry::Text(&name));
    header.set(ALPHA, Entry::F32(alpha));
    header.set("general.quantization_version", Entry::U32(2));
    let mut tensors = Vec::new();
    for (module, delta) in deltas {
        let Some(stored) = base.linears.get(module) else {
            let what = format!(
                "a change of {module}, of which a GGUF file has no matrix of its own (a head that is the table is none)"
            );
            return Err(Error::NotLowRank { what });
        };
        let factor = delta.scale * delta.r as f32 / alpha;
        let mut b = vec![0.0; delta.b.len()];
        for (row, values) in delta.b.chunks_exact(delta.r).enumerate() {
            let to = &mut b[stored.place(row) * delta.r..][..delta.r];
            to.iter_mut().zip(values).for_each(|(to, value)| *to = value * factor);
        }
        let shapes = [[delta.r, delta.in_features], [delta.out_features, delta.r]];
        for ((part, shape), values) in PARTS.into_iter().zip(shapes).zip([delta.a.clone(), b]) {
            header.tensor(&format!("{}.{part}", stored.weight), &shape, Format::F32);
            tensors.push((shape, values));
        }
    }
    let mut draft = Draft::create(path)?;
    draft.write_all(&header.bytes())?;
    for (shape, values) in tensors {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        draft.write_all(&bytes)?;
        draft.write_all(padding(tensor_bytes(&shape, Format::F32)))?;
    }
    Ok(draft.finish()?.commit()?)
}

/// The alpha that makes most factors on B one. Of 0, llama.cpp would take no account.
fn alpha(deltas: &Deltas) -> f32 {
    let alphas = deltas.values().map(|delta| delta.scale * delta.r as f32);
    let alpha = alphas.clone().next().filter(|&first| first != 0.0 && alphas.into_iter().all(|alpha| alpha == first));
    alpha.unwrap_or(1.0)
}

/// Reads the changes of the linears of a base back, as llama.cpp applies them.
///
/// # Errors
/// A file that is damaged, or for another base.
pub fn read_lora(path: &Path, base: &Linears) -> Result<Deltas, Error> {
    let file = Gguf::parse(map_file(path)?)?;
    let alpha = file.metadata.get_f32(ALPHA)?.unwrap_or(0.0);
    let mut deltas = Deltas::new();
    for (module, stored) in &base.linears {
        let [a, b] = PARTS.map(|part| file.tensor(&format!("{}.{part}", stored.weight)));
        let (Some(a), Some(b)) = (a, b) else { continue };
        let (&[r, in_features], &[out_features, columns]) = (a.shape().as_slice(), b.shape().as_slice()) else {
            return Err(Error::TensorUnknown { name: a.name.clone() });
        };
        if columns != r || stored.rows.as_ref().is_some_and(|rows| rows.len() != out_features) {
            return Err(Error::TensorShape { name: b.name.clone(), found: b.shape(), expected: vec![out_features, r] });
        }
        let (a, in_file) = (values(a), values(b));
        let b = (0..out_features).flat_map(|row| in_file[stored.place(row) * r..][..r].to_vec()).collect();
        let scale = if alpha == 0.0 { 1.0 } else { alpha / r as f32 };
        deltas.insert(module.clone(), LoraDelta { r, in_features, out_features, scale, a, b });
    }
    Ok(deltas)
}

fn values(info: &TensorInfo) -> Vec<f32> {
    let mut values = vec![0.0; info.dims.iter().product()];
    info.format.decode_row(&info.bytes, &mut values);
    values
}
