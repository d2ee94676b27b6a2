//! Quantizing a model's linears as bitsandbytes does: for a base that is held so, kept in a file that later starts map, and for a model in
//! a directory that transformers loads.
//!
//! The linears are those that transformers quantizes by default: all but the head, and but those that a family names. The table, positions,
//! norms and biases stay as they are. A weight is decoded, quantized and written after the other, so that never more than one of them is in
//! memory beside what of the files is mapped.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use retune_engine::spec::Module;
use retune_formats::atomic::{self, Draft, Folder, Staged};
use retune_formats::bitsandbytes::{self, EncodedWeight, Part, QuantizedWeight};
use retune_formats::files::map_file;
use retune_formats::safetensors::{self, Header, INDEX, RawTensor};
use retune_formats::weights::rows_and_cols;
use retune_kernels::PanelSource;
use retune_quant::{Encoding, Int8Rows, Matrix, QuantType, SharedBytes, encode, encode_row};
use serde_json::{Value, json};

use crate::checkpoint::{CONFIG, Checkpoint, READ_AT_ONCE};
use crate::error::Error;
use crate::export::{self, ExportType, GENERATION_CONFIG};

/// Rows that a thread quantizes at a time: so many are whole blocks, whatever their length.
const ROWS: usize = encode::BLOCKSIZE;
/// Values of other tensors that are written at a time.
const PANEL_VALUES: usize = 1 << 20;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizeReport {
    /// Number of weight files.
    pub shards: usize,
    /// Their total size.
    pub bytes: u64,
    /// Number of linears that were quantized.
    pub linears: usize,
    /// Bits that a parameter of these takes, with all that belongs to it.
    pub bits_per_parameter: f64,
}

/// The names of the weights that are quantized.
///
/// # Errors
/// A weight that is quantized already, by bitsandbytes.
pub fn weights(checkpoint: &Checkpoint) -> Result<Vec<String>, Error> {
    let is_kept = |name: &str| {
        let part = name.rsplit_once('.').map_or(name, |(_, part)| part);
        name == checkpoint.spec.head.linear.name || checkpoint.family.unquantized.contains(&part)
    };
    let linears = checkpoint.spec.linears().filter(|linear| !is_kept(&linear.name));
    let names = linears.map(|linear| {
        let tensor = format!("{}.weight", linear.name);
        let weight = checkpoint.tensor(&tensor)?;
        if is_quantized(&weight) {
            return Err(Error::QuantizedAlready { tensor, found: weight.storage() });
        }
        Ok(tensor)
    });
    names.collect()
}

/// Bytes that a model's tensors would take with its linears held in an encoding, and those of the file that keeps these.
///
/// # Errors
/// As [`weights`].
pub fn planned_bytes(checkpoint: &Checkpoint, encoding: Encoding) -> Result<[u64; 2], Error> {
    let items = quantized(checkpoint, encoding, ExportType::F32)?;
    let sum = |of: &dyn Fn(&Item) -> u64| items.iter().map(of).sum::<u64>();
    let now = sum(&|item| item.matrix.bytes_len() as u64);
    let then = sum(&|item| encoding.bytes_for(item.matrix.rows(), item.matrix.cols()) as u64);
    Ok([checkpoint.held_bytes() - now + then, sum(&Item::bytes)])
}

/// Whether a weight is in one of bitsandbytes' storages.
pub fn is_quantized(weight: &Matrix) -> bool {
    [QuantType::NF4.name(), QuantType::FP4.name(), Int8Rows::NAME].contains(&weight.storage())
}

/// Quantizes the linears in memory.
///
/// # Errors
/// As [`weights`].
pub fn in_memory(
    checkpoint: &Checkpoint,
    encoding: Encoding,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<BTreeMap<String, QuantizedWeight>, Error> {
    let items = quantized(checkpoint, encoding, ExportType::F32)?;
    let mut work = Work::new(checkpoint, &items, progress);
    let mut weights = BTreeMap::new();
    for item in &items {
        let parts = item.encode().into_parts(&item.name);
        let raw = |part: Part| {
            let bytes = SharedBytes::from_vec(part.bytes);
            (part.name, RawTensor { dtype: part.dtype, shape: part.shape, bytes })
        };
        let mut tensors: BTreeMap<String, RawTensor> = parts.into_iter().map(raw).collect();
        weights.insert(item.name.clone(), take(&item.name, &item.matrix, &mut tensors)?);
        work.read(&item.matrix);
    }
    Ok(weights)
}

/// Writes the quantized linears into a file of their own.
///
/// # Errors
/// As [`weights`], and what the system refuses; nothing is left behind then.
pub fn write_file(
    checkpoint: &Checkpoint,
    encoding: Encoding,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let items = quantized(checkpoint, encoding, ExportType::F32)?;
    let mut work = Work::new(checkpoint, &items, progress);
    Ok(work.stage(path, &items)?.commit()?)
}

/// The quantized linears of a file that [`write_file`] wrote, which is mapped.
///
/// # Errors
/// A file that cannot be read, is damaged, or holds something else.
pub fn read_file(
    checkpoint: &Checkpoint,
    encoding: Encoding,
    path: &Path,
) -> Result<BTreeMap<String, QuantizedWeight>, Error> {
    let read = || {
        let mut tensors = safetensors::parse(&map_file(path)?)?;
        let mut found = BTreeMap::new();
        for name in weights(checkpoint)? {
            let weight = take(&name, &checkpoint.tensor(&name)?, &mut tensors)?;
            if weight.matrix.storage() != storage_of(encoding) {
                let reason = format!("{name} is {}, expected {}", weight.matrix.storage(), storage_of(encoding));
                return Err(Error::Quantized { reason });
            }
            found.insert(name, weight);
        }
        match tensors.keys().next() {
            Some(other) => Err(Error::Quantized { reason: format!("{other} is none of them") }),
            None => Ok(found),
        }
    };
    read().map_err(|error: Error| error.at(path))
}

/// The name that matrices of an encoding have for their storage.
fn storage_of(encoding: Encoding) -> &'static str {
    match encoding {
        Encoding::FourBit { quant_type, .. } => quant_type.name(),
        Encoding::Int8 => Int8Rows::NAME,
    }
}

/// Takes the weight that stands for `matrix` out of the tensors of a file.
fn take(name: &str, matrix: &Matrix, tensors: &mut BTreeMap<String, RawTensor>) -> Result<QuantizedWeight, Error> {
    let missing = || Error::Quantized { reason: format!("{name} is missing") };
    let raw = tensors.remove(name).ok_or_else(missing)?;
    bitsandbytes::take_weight(name, &[matrix.rows(), matrix.cols()], &raw, tensors)?.ok_or_else(missing)
}

/// Writes a model with its linears quantized, into a directory that transformers and [`Checkpoint::open`] load. `dtype` is the type of all
/// other tensors; when absent that of the table, or f32 where that is stored in blocks. A file of weights ends before the tensor that would
/// make it larger than `max_shard_bytes`. `progress` is told the bytes of weights quantized so far, and how many there will be.
///
/// # Errors
/// As [`weights`]; a directory that is not empty, a base without tokenizer, values beyond the range of the type, and what the system refuses.
/// Nothing is left behind then, but for files that already have their names in a folder that was there.
pub fn write(
    checkpoint: &Checkpoint,
    encoding: Encoding,
    dtype: Option<ExportType>,
    max_shard_bytes: u64,
    out_dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<QuantizeReport, Error> {
    export::refuse_occupied(out_dir)?;
    let tokenizer = checkpoint.tokenizer()?;
    let dtype = dtype.map_or_else(|| ExportType::of(checkpoint), Ok)?;
    let mut items = quantized(checkpoint, encoding, dtype)?;
    let linears = items.len();
    let bytes: u64 = items.iter().map(Item::bytes).sum();
    let parameters: usize = items.iter().map(|item| item.matrix.rows() * item.matrix.cols()).sum();
    items.extend(others(checkpoint, &items, dtype)?);
    for item in &mut items {
        item.name = checkpoint.exported_name(&item.name);
    }
    let generation_config = export::generation_config(checkpoint, &tokenizer)?;
    let config = config_json(checkpoint, encoding, dtype)?;

    let folder = Folder::create(out_dir, CONFIG)?;
    let place = |name: &str| folder.path().join(name);
    let mut work = Work::new(checkpoint, &items, progress);
    let shards = into_shards(&items, max_shard_bytes);
    let names = export::shard_names(shards.len());
    for (name, shard) in names.iter().zip(&shards) {
        work.stage(&place(name), shard)?.commit()?;
    }
    atomic::write(&place(GENERATION_CONFIG), &generation_config)?;
    if names.len() > 1 {
        atomic::write(&place(INDEX), &index(&names, &shards)?)?;
    }
    atomic::write(&place(CONFIG), &config)?;
    tokenizer.save(folder.path())?;
    let (shards, bytes_written) = (shards.len(), work.written);
    folder.commit()?;
    let bits_per_parameter = 8.0 * bytes as f64 / parameters.max(1) as f64;
    Ok(QuantizeReport { shards, bytes: bytes_written, linears, bits_per_parameter })
}

/// The base's `config.json`, with what transformers is to know of the storage.
fn config_json(checkpoint: &Checkpoint, encoding: Encoding, dtype: ExportType) -> Result<Vec<u8>, Error> {
    let config = export::config_json(checkpoint, dtype, checkpoint.spec.head.tied)?;
    let mut config: Value = serde_json::from_slice(&config).map_err(|error| Error::Json { error })?;
    let in_4_bits = matches!(encoding, Encoding::FourBit { .. });
    let mut settings = json!({
        "_load_in_4bit": in_4_bits, "_load_in_8bit": !in_4_bits,
        "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null, "llm_int8_threshold": 6.0,
        "load_in_4bit": in_4_bits, "load_in_8bit": !in_4_bits, "quant_method": "bitsandbytes",
    });
    if let Encoding::FourBit { quant_type, double } = encoding {
        settings["bnb_4bit_compute_dtype"] = dtype.torch_name().into();
        settings["bnb_4bit_quant_storage"] = "uint8".into();
        settings["bnb_4bit_quant_type"] = quant_type.key().into();
        settings["bnb_4bit_use_double_quant"] = double.into();
    }
    config["quantization_config"] = settings;
    export::pretty(&config)
}

/// A tensor that is to be written.
struct Item {
    name: String,
    /// `[rows, cols]` as it is written.
    matrix: Matrix,
    /// As it is written.
    shape: Vec<usize>,
    /// How it is quantized; otherwise it is written in its type.
    encoding: Option<Encoding>,
    dtype: ExportType,
}

/// The linears that are quantized.
fn quantized(checkpoint: &Checkpoint, encoding: Encoding, dtype: ExportType) -> Result<Vec<Item>, Error> {
    let item = |name: String| {
        let matrix = checkpoint.tensor(&name)?;
        let shape = vec![matrix.rows(), matrix.cols()];
        Ok(Item { name, matrix, shape, encoding: Some(encoding), dtype })
    };
    weights(checkpoint)?.into_iter().map(item).collect()
}

/// The tensors beside these.
fn others(checkpoint: &Checkpoint, items: &[Item], dtype: ExportType) -> Result<Vec<Item>, Error> {
    let mut others = Vec::new();
    for module in checkpoint.spec.modules() {
        let is_transposed = matches!(module, Module::Linear(linear) if linear.transposed);
        for (name, shape) in module.tensors() {
            if items.iter().any(|item| item.name == name) {
                continue;
            }
            let matrix = checkpoint.tensor(&name)?;
            let matrix = if is_transposed && shape.len() == 2 { matrix.transposed() } else { matrix };
            others.push(Item { name, matrix, shape, encoding: None, dtype });
        }
    }
    Ok(others)
}

impl Item {
    /// The tensors it becomes, without their bytes.
    fn layout(&self) -> Vec<Part> {
        match self.encoding {
            Some(encoding) => {
                let shape = [self.matrix.rows(), self.matrix.cols()];
                bitsandbytes::layout(&self.name, encoding, shape, self.dtype.torch_name())
            }
            None => {
                let (name, shape) = (self.name.clone(), self.shape.clone());
                vec![Part { name, dtype: self.dtype.dtype(), shape, bytes: Vec::new() }]
            }
        }
    }

    fn bytes(&self) -> u64 {
        self.layout().iter().map(|part| part.len() as u64).sum()
    }

    /// The weight, quantized.
    fn encode(&self) -> EncodedWeight {
        let encoding = self.encoding.unwrap_or(Encoding::Int8);
        let (rows, cols) = (self.matrix.rows(), self.matrix.cols());
        let (codes, absmax) = match encoding {
            Encoding::FourBit { quant_type, .. } => four_bit(&self.matrix, quant_type),
            Encoding::Int8 => int8(&self.matrix),
        };
        EncodedWeight { encoding, shape: [rows, cols], dtype: self.dtype.torch_name(), codes, absmax }
    }
}

fn four_bit(matrix: &Matrix, quant_type: QuantType) -> (Vec<u8>, Vec<f32>) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let values = rows * cols;
    let (mut codes, mut absmax) = (vec![0; values.div_ceil(2)], vec![0.0; values.div_ceil(encode::BLOCKSIZE)]);
    let per_piece = (ROWS * cols).max(1);
    let pieces = codes.par_chunks_mut((per_piece / 2).max(1)).zip(absmax.par_chunks_mut(cols.max(1))).enumerate();
    pieces.for_each_init(Vec::new, |buffer: &mut Vec<f32>, (piece, (codes, absmax))| {
        let of_rows = piece * ROWS..((piece + 1) * ROWS).min(rows);
        buffer.resize(of_rows.len() * cols, 0.0);
        matrix.panel_f32(of_rows, 0..cols, buffer);
        encode::four_bit(quant_type, buffer, codes, absmax);
    });
    (codes, absmax)
}

fn int8(matrix: &Matrix) -> (Vec<u8>, Vec<f32>) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let (mut codes, mut absmax) = (vec![0; rows * cols], vec![0.0; rows]);
    let of_rows = codes.par_chunks_mut(cols.max(1)).zip(absmax.par_iter_mut()).enumerate();
    of_rows.for_each_init(Vec::new, |buffer: &mut Vec<f32>, (row, (codes, absmax))| {
        buffer.resize(cols, 0.0);
        matrix.panel_f32(row..row + 1, 0..cols, buffer);
        *absmax = encode_row(buffer, codes);
    });
    (codes, absmax)
}

fn into_shards(items: &[Item], max_bytes: u64) -> Vec<&[Item]> {
    let (mut shards, mut start, mut filled) = (Vec::new(), 0, 0);
    for (at, item) in items.iter().enumerate() {
        let bytes = item.bytes();
        if at > start && filled + bytes > max_bytes {
            shards.push(&items[start..at]);
            (start, filled) = (at, 0);
        }
        filled += bytes;
    }
    shards.push(&items[start..]);
    shards
}

/// The content of `model.safetensors.index.json`.
fn index(names: &[String], shards: &[&[Item]]) -> Result<Vec<u8>, Error> {
    let parts = || names.iter().zip(shards).flat_map(|(file, shard)| shard.iter().map(move |item| (file, item)));
    let places: BTreeMap<String, &str> =
        parts().flat_map(|(file, item)| item.layout().into_iter().map(|part| (part.name, file.as_str()))).collect();
    let total: u64 = parts().map(|(_, item)| item.bytes()).sum();
    export::pretty(&json!({"metadata": {"total_size": total}, "weight_map": places}))
}

/// What has been read, written and told.
struct Work<'a> {
    checkpoint: &'a Checkpoint,
    progress: &'a mut dyn FnMut(u64, u64),
    /// Values decoded, and to decode.
    done: u64,
    total: u64,
    /// Bytes read since the files' memory was given back.
    held: usize,
    /// Bytes written.
    written: u64,
}

impl<'a> Work<'a> {
    fn new(checkpoint: &'a Checkpoint, items: &[Item], progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        let total = items.iter().map(|item| item.matrix.bytes_len() as u64).sum();
        Self { checkpoint, progress, done: 0, total, held: 0, written: 0 }
    }

    /// Takes note of a matrix that was read.
    fn read(&mut self, matrix: &Matrix) {
        self.done += matrix.bytes_len() as u64;
        (self.progress)(self.done, self.total);
        self.held += matrix.bytes_len();
        if self.held > READ_AT_ONCE {
            self.checkpoint.release();
            self.held = 0;
        }
    }

    /// Writes a file of tensors under a temporary name.
    fn stage(&mut self, path: &Path, items: &[Item]) -> Result<Staged, Error> {
        let parts: Vec<Part> = items.iter().flat_map(Item::layout).collect();
        let header = Header::new(
            &[("format", "pt")],
            parts.iter().map(|part| (part.name.as_str(), part.dtype, &part.shape[..])),
        );
        self.written += header.file_bytes();
        let mut draft = Draft::create(path)?;
        draft.write_all(header.bytes())?;
        for item in items {
            match item.encoding {
                Some(_) => {
                    let parts = item.encode().into_parts(&item.name);
                    parts.iter().try_for_each(|part| draft.write_all(&part.bytes))?;
                }
                None => write_plain(item, &mut draft)?,
            }
            self.read(&item.matrix);
        }
        Ok(draft.finish()?)
    }
}

/// Writes a tensor in its type, a panel of rows after the other.
fn write_plain(item: &Item, draft: &mut Draft) -> Result<(), Error> {
    let (rows, cols) = rows_and_cols(&item.shape);
    let panel_rows = (PANEL_VALUES / cols.max(1)).max(1);
    let (mut values, mut bytes) = (Vec::new(), Vec::new());
    let format = item.dtype.format();
    for start in (0..rows).step_by(panel_rows) {
        let of_rows = start..(start + panel_rows).min(rows);
        values.resize(of_rows.len() * cols, 0.0);
        item.matrix.panel_f32(of_rows, 0..cols, &mut values);
        if let Some(at) = values.iter().position(|value| !export::holds(format, *value)) {
            let (row, column, value) = (start + at / cols, at % cols, values[at]);
            return Err(Error::OutOfRange { tensor: item.name.clone(), row, column, value, format });
        }
        bytes.resize(values.len() * format.block_bytes(), 0);
        export::encode(format, &values, &mut bytes);
        draft.write_all(&bytes)?;
    }
    Ok(())
}
