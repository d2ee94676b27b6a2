//! Writing a model: a base with an adapter merged into it, or a model whose weights were trained. A Hugging Face directory here, a GGUF file in
//! `gguf.rs`.
//!
//! A tensor is decoded, changed, rounded and written a panel of rows at a time, so that memory does not grow with the model (GPT-2's
//! transposed weights are panels of their own). Files get
//! their names once all of them are on the disk, `config.json` last: a directory without it is no model to anyone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;
use retune_engine::overlay::{Change, Overlay, TableTerm, TokenRows};
use retune_engine::row_norms::column_factors;
use retune_engine::spec::{ModelSpec, Module};
use retune_formats::atomic::{self, Draft, Folder, Staged};
use retune_formats::safetensors::{Dtype, Header, INDEX, SINGLE};
use retune_kernels::PanelSource;
use retune_quant::{Format, Matrix, SharedBytes};
use retune_text::tokenizer::{FILES, Tokenizer};
use serde_json::{Map, Value, json};

use crate::checkpoint::{CONFIG, Checkpoint, CheckpointKind};
use crate::error::Error;
use crate::families;
use crate::merge::{merge_bias, merge_rows, merge_table_rows};

mod gguf;
mod gguf_header;

pub use gguf::{GgufType, WrittenGguf, gguf_linears, write_gguf};

pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";

/// Values of a panel. It exists three times, before and after the change and as bytes: 12 MB.
const PANEL_VALUES: usize = 1 << 20;
/// Values that one thread takes of a panel at a time.
const PIECE_VALUES: usize = 1 << 14;

/// How the values of a written model are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum), value(rename_all = "lower"))]
pub enum ExportType {
    #[default]
    F32,
    BF16,
    F16,
}

impl ExportType {
    /// The type of a model's weights, as that of its table tells: norms may be in more bits than the rest. f32 of a table that is stored in
    /// blocks: the bits of a block's codes are none of a number of its own.
    ///
    /// # Errors
    /// A model without its table.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, Error> {
        Ok(match checkpoint.table_storage()? {
            name if name == Format::BF16.name() => ExportType::BF16,
            name if name == Format::F16.name() => ExportType::F16,
            _ => ExportType::F32,
        })
    }

    /// Bytes of so many values.
    pub fn bytes_for(self, values: u64) -> u64 {
        let format = self.format();
        values / format.block_len() as u64 * format.block_bytes() as u64
    }

    /// The type in a safetensors header.
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            ExportType::F32 => Dtype::F32,
            ExportType::BF16 => Dtype::BF16,
            ExportType::F16 => Dtype::F16,
        }
    }

    /// How a value is stored.
    pub(crate) fn format(self) -> Format {
        match self {
            ExportType::F32 => Format::F32,
            ExportType::BF16 => Format::BF16,
            ExportType::F16 => Format::F16,
        }
    }

    /// The name in `config.json`.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            ExportType::F32 => "float32",
            ExportType::BF16 => "bfloat16",
            ExportType::F16 => "float16",
        }
    }

    /// A value rounded to this type.
    fn rounded(self, value: f32) -> f32 {
        match self {
            ExportType::F32 => value,
            ExportType::BF16 => bf16::from_f32(value).to_f32(),
            ExportType::F16 => f16::from_f32(value).to_f32(),
        }
    }
}

/// Whether a value is finite and stays so when it is stored. What has scales has them in half precision.
pub(crate) fn holds(format: Format, value: f32) -> bool {
    // Half a step beyond the greatest value is where rounding gives infinity.
    let limit = match format {
        Format::F32 => f32::INFINITY,
        Format::BF16 => f32::from_bits(0x7F7F_8000),
        _ => 65520.0,
    };
    value.abs() < limit
}

/// Stores values, which are whole blocks; `bytes` has their size.
pub(crate) fn encode(format: Format, values: &[f32], bytes: &mut [u8]) {
    let piece = PIECE_VALUES.next_multiple_of(format.block_len());
    let piece_bytes = piece / format.block_len() * format.block_bytes();
    let pieces = bytes.par_chunks_mut(piece_bytes).zip(values.par_chunks(piece));
    pieces.for_each(|(bytes, values)| {
        let is_written = format.encode_row(values, bytes);
        debug_assert!(is_written, "{format} is only read");
    });
}

impl fmt::Display for ExportType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExportType::F32 => "f32",
            ExportType::BF16 => "bf16",
            ExportType::F16 => "f16",
        })
    }
}

/// How a model is written.
#[derive(Clone, Copy, Debug)]
pub struct MergeOptions {
    pub dtype: ExportType,
    /// A file of weights ends before the tensor that would make it larger; a tensor is never cut.
    pub max_shard_bytes: u64,
}

impl Default for MergeOptions {
    /// Unrounded, in files of 2 GB.
    fn default() -> Self {
        Self { dtype: ExportType::F32, max_shard_bytes: 2_000_000_000 }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeReport {
    /// Number of weight files.
    pub shards: usize,
    /// Their total size.
    pub bytes: u64,
    /// The largest max |ΔW| / max |W| of a tensor, before rounding. Tensors that were all zero are left out.
    pub largest_change: f32,
    /// Number of modules in which any value has changed, before rounding.
    pub changed_modules: usize,
}

/// Writes a model with what stands on it merged into its weights, into a directory that transformers and [`Checkpoint::open`] load.
/// The same input gives the same bytes. `progress` is told the bytes of weights written so far, and how many there will be.
///
/// A tied model stays tied unless only one of embeddings and head is changed; then both are written.
///
/// # Errors
/// A directory that is not empty, a soft prompt, a base without tokenizer, values that are not finite or beyond the range
/// of the type, and what the system refuses. Nothing is left behind then, but for files that already have their names in a folder that was there.
pub fn write(
    checkpoint: &Checkpoint,
    overlay: &Overlay,
    params: &[f32],
    out_dir: &Path,
    options: &MergeOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MergeReport, Error> {
    refuse_occupied(out_dir)?;
    refuse_unmergeable(&checkpoint.spec, overlay)?;
    let tied = checkpoint.spec.head.tied && !unties(&checkpoint.spec, overlay);
    let tokenizer = checkpoint.tokenizer()?;
    let export = Export {
        shards: into_shards(
            tensors(checkpoint, &edits(checkpoint, overlay, params)?, tied, options.dtype.format())?,
            options,
        ),
        generation_config: generation_config(checkpoint, &tokenizer)?,
        tokenizer,
        config: config_json(checkpoint, options.dtype, tied)?,
    };
    let folder = Folder::create(out_dir, CONFIG)?;
    let report = export.write(folder.path(), progress)?;
    folder.commit()?;
    Ok(report)
}

/// What is to be said where embeddings will be multiplied by another number once the model is written as `dtype`: transformers rounds the
/// factor to the type of the weights.
pub fn scale_note(checkpoint: &Checkpoint, dtype: ExportType) -> Option<String> {
    let exact = families::describe(checkpoint.config_json()).ok()?.spec.table.scale;
    let (ours, written) = (checkpoint.spec.table.scale, dtype.rounded(exact));
    (ours != written).then(|| {
        format!(
            "this base multiplies its embeddings by {ours}, as transformers does for the type it is stored in; written as {dtype} they will \
             be multiplied by {written}: write that type to have the same model"
        )
    })
}

/// Refuses what no weight can hold.
fn refuse_unmergeable(spec: &ModelSpec, overlay: &Overlay) -> Result<(), Error> {
    if overlay.virtual_tokens.is_some() || overlay.prefix.is_some() {
        return Err(Error::SoftPrompt);
    }
    let mut changes = spec.linears().zip(&overlay.linears);
    match changes.find(|(linear, change)| change.offset.is_some() && !linear.bias) {
        Some((linear, _)) => Err(Error::NoBias { module: linear.name.clone() }),
        None => Ok(()),
    }
}

/// Whether table and head of a tied model differ under an overlay.
fn unties(spec: &ModelSpec, overlay: &Overlay) -> bool {
    let Some((_, head)) = spec.linears().zip(&overlay.linears).last() else { return false };
    stands_beside(head)
        || head.weight != overlay.table
        || overlay.head_rows != overlay.table_rows
        || overlay.table_term.is_some()
}

/// Whether anything of a change stands beside the weight, not in its place.
fn stands_beside(change: &Change) -> bool {
    !change.low_rank.is_empty()
        || change.input_scale.is_some()
        || change.output_scale.is_some()
        || change.offset.is_some()
}

/// What becomes of a tensor of the base.
#[derive(Clone)]
enum Edit<'a> {
    Nothing,
    /// Other values, as many.
    Replaced(&'a [f32]),
    /// A linear's weight with what stands on it.
    Weight {
        change: &'a Change,
        params: &'a [f32],
    },
    /// A linear's bias with what stands on the linear, the base's or one trained in its place.
    Bias {
        trained: Option<&'a [f32]>,
        change: &'a Change,
        params: &'a [f32],
    },
    /// A table in which some rows are others, or to which a low-rank term is added, whose columns may be multiplied by factors then.
    Table {
        rows: Option<&'a TokenRows>,
        term: Option<&'a TableTerm>,
        factors: Option<Arc<[f32]>>,
        params: &'a [f32],
    },
}

/// The edits by the names of the tensors.
type Edits<'a> = BTreeMap<String, Edit<'a>>;

fn weight_of(module: &str) -> String {
    format!("{module}.weight")
}

/// What an overlay changes.
fn edits<'a>(checkpoint: &Checkpoint, overlay: &'a Overlay, params: &'a [f32]) -> Result<Edits<'a>, Error> {
    let spec = &checkpoint.spec;
    let mut edits = Edits::new();
    for param in overlay.layout.params() {
        if let Some(base) = &param.base {
            edits.insert(base.clone(), Edit::Replaced(&params[param.range.clone()]));
        }
    }
    let head = &spec.head.linear.name;
    for (name, rows, term) in [
        (Some(&spec.table.name), overlay.table_rows.as_ref(), overlay.table_term.as_ref()),
        (spec.table.positions.as_ref(), None, overlay.positions_term.as_ref()),
        (Some(head), overlay.head_rows.as_ref(), None),
    ] {
        if let Some(name) = name.filter(|_| rows.is_some() || term.is_some()) {
            let name = weight_of(name);
            let factors = match term.filter(|term| term.magnitudes.is_some()) {
                Some(term) => column_factors(&checkpoint.tensor(&name)?, term, params).map(Arc::from),
                None => None,
            };
            edits.insert(name, Edit::Table { rows, term, factors, params });
        }
    }
    for (linear, change) in spec.linears().zip(&overlay.linears).filter(|(_, change)| stands_beside(change)) {
        edits.insert(weight_of(&linear.name), Edit::Weight { change, params });
        if linear.bias {
            let name = format!("{}.bias", linear.name);
            let trained = match edits.get(&name) {
                Some(Edit::Replaced(values)) => Some(*values),
                _ => None,
            };
            edits.insert(name, Edit::Bias { trained, change, params });
        }
    }
    Ok(edits)
}

/// A tensor to be written.
struct Tensor<'a> {
    /// Its module.
    module: String,
    name: String,
    /// As it is written: `[rows, cols]`, `[cols, rows]` where it is transposed, or `[cols]`.
    shape: Vec<usize>,
    base: Matrix,
    edit: Edit<'a>,
    format: Format,
    arranged: Arranged,
}

/// How the values of a tensor are arranged in the file.
#[derive(Clone)]
enum Arranged {
    /// As the spec has them.
    Plainly,
    /// As `[in, out]`.
    Transposed,
    /// Row r stands where this says; in a vector, value r.
    Rows(Arc<[u32]>),
    /// With 1 added.
    PlusOne,
    /// As the source's file has them, whose bytes these are.
    AsStored(SharedBytes),
}

impl Tensor<'_> {
    fn bytes(&self) -> u64 {
        let values = self.base.rows() * self.base.cols();
        (values / self.format.block_len() * self.format.block_bytes()) as u64
    }

    /// For each row of the file, which row of the tensor it is; nothing where they are in the tensor's order.
    fn order(&self) -> Option<Vec<u32>> {
        let Arranged::Rows(places) = &self.arranged else { return None };
        let mut order = vec![0; places.len()];
        places.iter().zip(0..).for_each(|(&place, row)| order[place as usize] = row);
        (self.base.rows() > 1).then_some(order)
    }

    /// Decodes `rows` into `values`, [rows.len(), cols], and of a tensor that is changed the base's into `base`.
    fn decode(&self, rows: Range<usize>, base: &mut [f32], values: &mut [f32]) -> Magnitude {
        let cols = self.base.cols();
        match &self.edit {
            Edit::Nothing => {
                self.base.panel_f32(rows, 0..cols, values);
                return Magnitude::default();
            }
            Edit::Replaced(new) => {
                self.base.panel_f32(rows.clone(), 0..cols, base);
                values.copy_from_slice(&new[rows.start * cols..rows.end * cols]);
            }
            Edit::Weight { change, params } => {
                self.base.panel_f32(rows.clone(), 0..cols, base);
                values.copy_from_slice(base);
                merge_rows(change, params, cols, self.base.rows(), rows, values);
            }
            Edit::Table { rows: replaced, term, factors, params } => {
                self.base.panel_f32(rows.clone(), 0..cols, base);
                values.copy_from_slice(base);
                let term = term.map(|term| (term, factors.as_deref()));
                merge_table_rows(*replaced, term, params, cols, rows, values);
            }
            Edit::Bias { trained, change, params } => {
                self.base.panel_f32(rows, 0..cols, base);
                values.copy_from_slice(trained.unwrap_or(base));
                merge_bias(change, params, values);
            }
        }
        base.iter().zip(values.iter()).fold(Magnitude::default(), |largest, (base, value)| {
            largest.max(Magnitude { weight: base.abs(), change: (value - base).abs() })
        })
    }
}

/// max |W| and max |ΔW|.
#[derive(Clone, Copy, Default)]
struct Magnitude {
    weight: f32,
    change: f32,
}

impl Magnitude {
    fn max(self, other: Self) -> Self {
        Self { weight: self.weight.max(other.weight), change: self.change.max(other.change) }
    }
}

/// Everything that will be in the directory.
struct Export<'a> {
    /// The tensors of each weight file, in the order of their names.
    shards: Vec<Vec<Tensor<'a>>>,
    tokenizer: Tokenizer,
    generation_config: Vec<u8>,
    config: Vec<u8>,
}

/// Whether a file of a model's folder is one that is written here.
pub fn is_own(name: &str) -> bool {
    let is_shard = name.starts_with("model-") && name.ends_with(".safetensors");
    is_shard || [SINGLE, INDEX, CONFIG, GENERATION_CONFIG].contains(&name) || FILES.contains(&name)
}

/// Refuses a folder that holds something.
///
/// # Errors
/// [`Error::OutputNotEmpty`], or what the system refuses.
pub fn refuse_occupied(dir: &Path) -> Result<(), Error> {
    // What a write that was killed left under a temporary name does not count, and is written over.
    let is_leftover = |name: &str| name.starts_with('.') && name.ends_with(".tmp");
    let counts = |entry: &fs::DirEntry| !is_leftover(&entry.file_name().to_string_lossy());
    match fs::read_dir(dir).map(|entries| !entries.flatten().any(|entry| counts(&entry))) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::OutputNotEmpty { dir: dir.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::Write { path: dir.to_owned(), error }),
    }
}

/// The tensors to write, in the order of their names.
fn tensors<'a>(
    checkpoint: &Checkpoint,
    edits: &Edits<'a>,
    tied: bool,
    format: Format,
) -> Result<Vec<Tensor<'a>>, Error> {
    let spec = &checkpoint.spec;
    let mut modules = spec.modules();
    if spec.head.tied && !tied {
        modules.push(Module::Linear(&spec.head.linear));
    }
    let (table, head) = (weight_of(&spec.table.name), weight_of(&spec.head.linear.name));
    let mut tensors = Vec::new();
    for module in modules {
        let is_transposed = matches!(module, Module::Linear(linear) if linear.transposed);
        for (name, shape) in module.tensors() {
            let base = checkpoint.tensor(if name == head && spec.head.tied { &table } else { &name })?;
            let edit = edits.get(&name).cloned().unwrap_or(Edit::Nothing);
            let arranged = if is_transposed && shape.len() == 2 { Arranged::Transposed } else { Arranged::Plainly };
            let (module, name) = (module.name().to_owned(), checkpoint.exported_name(&name));
            tensors.push(Tensor { module, name, shape, base, edit, format, arranged });
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn into_shards<'a>(tensors: Vec<Tensor<'a>>, options: &MergeOptions) -> Vec<Vec<Tensor<'a>>> {
    let mut shards: Vec<Vec<Tensor<'a>>> = Vec::new();
    let mut filled = 0u64;
    for tensor in tensors {
        let bytes = tensor.bytes();
        match shards.last_mut() {
            Some(shard) if filled + bytes <= options.max_shard_bytes => {
                filled += bytes;
                shard.push(tensor);
            }
            _ => {
                filled = bytes;
                shards.push(vec![tensor]);
            }
        }
    }
    shards
}

/// The source's `config.json`, made true of what is written.
pub(crate) fn config_json(checkpoint: &Checkpoint, dtype: ExportType, tied: bool) -> Result<Vec<u8>, Error> {
    let mut config = checkpoint.hf_config_json()?;
    if let Some(fields) = config.as_object_mut() {
        // However the base is stored, what is written is plain numbers.
        fields.shift_remove("quantization_config");
        fields.insert("tie_word_embeddings".to_owned(), tied.into());
        if checkpoint.spec.encoder.is_some() {
            // Where this is missing the other key decides it as well.
            fields.insert("scale_decoder_outputs".to_owned(), (checkpoint.spec.head.scale != 1.0).into());
        }
        // transformers 5 says "dtype" and reads both; earlier versions know the other only.
        let spelled: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| fields.contains_key(*key)).collect();
        let keys = if spelled.is_empty() { vec!["torch_dtype"] } else { spelled };
        for key in keys {
            fields.insert(key.to_owned(), dtype.torch_name().into());
        }
    }
    pretty(&config)
}

/// The source's file, or the tokens that begin, end and pad a text.
pub(crate) fn generation_config(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Vec<u8>, Error> {
    if checkpoint.kind() == CheckpointKind::HuggingFace {
        let path = checkpoint.path().join(GENERATION_CONFIG);
        if path.is_file() {
            return fs::read(&path).map_err(|error| Error::Io { path, error });
        }
    }
    let mut fields = Map::new();
    if let Some(bos) = tokenizer.bos_token_id().or(checkpoint.tokens.bos) {
        fields.insert("bos_token_id".to_owned(), bos.into());
    }
    let ends = match tokenizer.eos_token_ids() {
        [] => &checkpoint.tokens.eos,
        ends => ends,
    };
    match ends {
        [] => None,
        [one] => fields.insert("eos_token_id".to_owned(), json!(one)),
        several => fields.insert("eos_token_id".to_owned(), json!(several)),
    };
    if let Some(encoder) = &checkpoint.spec.encoder {
        // With this file there, transformers does not look for it in config.json.
        fields.insert("decoder_start_token_id".to_owned(), encoder.decoder_start.into());
        fields.extend(checkpoint.tokens.pad.map(|pad| ("pad_token_id".to_owned(), pad.into())));
    }
    pretty(&Value::Object(fields))
}

pub(crate) fn pretty(json: &Value) -> Result<Vec<u8>, Error> {
    let mut text = serde_json::to_vec_pretty(json).map_err(|error| Error::Json { error })?;
    text.push(b'\n');
    Ok(text)
}

impl Export<'_> {
    fn write(&self, dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<MergeReport, Error> {
        let total = self.shards.iter().flatten().map(Tensor::bytes).sum();
        let mut writer = TensorWriter::new(total, progress);
        let names = shard_names(self.shards.len());
        for (name, shard) in names.iter().zip(&self.shards) {
            writer.stage(&dir.join(name), shard)?.commit()?;
        }
        atomic::write(&dir.join(GENERATION_CONFIG), &self.generation_config)?;
        if names.len() > 1 {
            atomic::write(&dir.join(INDEX), &self.index(&names, total)?)?;
        }
        atomic::write(&dir.join(CONFIG), &self.config)?;
        self.tokenizer.save(dir)?;
        Ok(writer.report(names.len()))
    }

    /// The content of `model.safetensors.index.json`.
    fn index(&self, names: &[String], total: u64) -> Result<Vec<u8>, Error> {
        let places: BTreeMap<&str, &str> = names
            .iter()
            .zip(&self.shards)
            .flat_map(|(file, shard)| shard.iter().map(|tensor| (tensor.name.as_str(), file.as_str())))
            .collect();
        pretty(&json!({"metadata": {"total_size": total}, "weight_map": places}))
    }
}

pub(crate) fn shard_names(count: usize) -> Vec<String> {
    match count {
        1 => vec![SINGLE.to_owned()],
        _ => (1..=count).map(|number| format!("model-{number:05}-of-{count:05}.safetensors")).collect(),
    }
}

/// Writes tensors one after the other, and keeps account.
struct TensorWriter<'a> {
    /// Bytes of tensors written, and to write.
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    /// A panel of the base, the same panel changed, and encoded.
    base: Vec<f32>,
    values: Vec<f32>,
    encoded: Vec<u8>,
    header_bytes: u64,
    largest_change: f32,
    changed: BTreeSet<String>,
}

impl<'a> TensorWriter<'a> {
    fn new(total: u64, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        Self {
            done: 0,
            total,
            progress,
            base: Vec::new(),
            values: Vec::new(),
            encoded: Vec::new(),
            header_bytes: 0,
            largest_change: 0.0,
            changed: BTreeSet::new(),
        }
    }

    fn report(&self, shards: usize) -> MergeReport {
        MergeReport {
            shards,
            bytes: self.header_bytes + self.done,
            largest_change: self.largest_change,
            changed_modules: self.changed.len(),
        }
    }

    /// A file of weights of a directory.
    fn stage(&mut self, path: &Path, shard: &[Tensor<'_>]) -> Result<Staged, Error> {
        let dtype = |format| match format {
            Format::F16 => Dtype::F16,
            Format::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        };
        let tensors = shard.iter().map(|tensor| (tensor.name.as_str(), dtype(tensor.format), tensor.shape.as_slice()));
        let header = Header::new(&[("format", "pt")], tensors);
        self.header_bytes += header.bytes().len() as u64;
        let mut draft = Draft::create(path)?;
        draft.write_all(header.bytes())?;
        for tensor in shard {
            self.write(tensor, &mut draft)?;
        }
        Ok(draft.finish()?)
    }

    fn write(&mut self, tensor: &Tensor<'_>, draft: &mut Draft) -> Result<(), Error> {
        let (rows, cols) = (tensor.base.rows(), tensor.base.cols());
        // Columns of a part are no part of the file; a vector is one row.
        let is_whole = matches!(tensor.arranged, Arranged::Transposed);
        let panel_rows = if is_whole { rows.max(1) } else { (PANEL_VALUES / cols.max(1)).max(1) };
        let order = tensor.order();
        let mut largest = Magnitude::default();
        for start in (0..rows).step_by(panel_rows) {
            let panel = start..(start + panel_rows).min(rows);
            largest = largest.max(self.decode(tensor, panel.clone(), order.as_deref()));
            self.check(tensor, panel, order.as_deref())?;
            // What stays as it is in the file is looked through, and copied below.
            if !matches!(tensor.arranged, Arranged::AsStored(_)) {
                self.arrange(tensor);
                let format = tensor.format;
                self.encoded.resize(self.values.len() / format.block_len() * format.block_bytes(), 0);
                encode(format, &self.values, &mut self.encoded);
                draft.write_all(&self.encoded)?;
                self.done += self.encoded.len() as u64;
                (self.progress)(self.done, self.total);
            }
        }
        if let Arranged::AsStored(bytes) = &tensor.arranged {
            draft.write_all(bytes)?;
            self.done += bytes.len() as u64;
            (self.progress)(self.done, self.total);
        }
        if largest.change > 0.0 {
            self.changed.insert(tensor.module.clone());
            if largest.weight > 0.0 {
                self.largest_change = self.largest_change.max(largest.change / largest.weight);
            }
        }
        Ok(())
    }

    /// Arranges the decoded panel as the file has it.
    fn arrange(&mut self, tensor: &Tensor<'_>) {
        let (rows, cols) = (tensor.base.rows(), tensor.base.cols());
        match &tensor.arranged {
            // Rows of a matrix were decoded in the file's order.
            Arranged::Plainly | Arranged::AsStored(_) => return,
            Arranged::Rows(_) if rows > 1 => return,
            Arranged::PlusOne => return self.values.iter_mut().for_each(|value| *value += 1.0),
            Arranged::Transposed => {
                let values = &self.values;
                self.base = (0..cols).flat_map(|j| (0..rows).map(move |i| values[i * cols + j])).collect();
            }
            // The values of a vector, which is a matrix of one row, are in that order.
            Arranged::Rows(places) => {
                for (&place, &value) in places.iter().zip(&self.values) {
                    self.base[place as usize] = value;
                }
            }
        }
        std::mem::swap(&mut self.base, &mut self.values);
    }

    /// Decodes `rows` of a tensor into `self.values`; with an order, the rows that it has at these places.
    fn decode(&mut self, tensor: &Tensor<'_>, rows: Range<usize>, order: Option<&[u32]>) -> Magnitude {
        let cols = tensor.base.cols().max(1);
        let piece_rows = (PIECE_VALUES / cols).max(1);
        self.base.resize(rows.len() * cols, 0.0);
        self.values.resize(rows.len() * cols, 0.0);
        let piece = piece_rows * cols;
        let pieces = self.base.par_chunks_mut(piece).zip(self.values.par_chunks_mut(piece)).enumerate();
        pieces
            .map(|(index, (base, values))| {
                let first = rows.start + index * piece_rows;
                let Some(order) = order else { return tensor.decode(first..first + values.len() / cols, base, values) };
                let rows = base.chunks_exact_mut(cols).zip(values.chunks_exact_mut(cols)).zip(&order[first..]);
                rows.fold(Magnitude::default(), |largest, ((base, values), &row)| {
                    largest.max(tensor.decode(row as usize..row as usize + 1, base, values))
                })
            })
            .reduce(Magnitude::default, Magnitude::max)
    }

    /// Refuses the first value of the panel that would not be written as a finite number.
    fn check(&self, tensor: &Tensor<'_>, rows: Range<usize>, order: Option<&[u32]>) -> Result<(), Error> {
        let format = tensor.format;
        let found = self.values.par_iter().enumerate().find_first(|(_, value)| !holds(format, **value));
        let Some((at, &value)) = found else { return Ok(()) };
        let cols = tensor.base.cols().max(1);
        let (tensor, row, column) = (tensor.name.clone(), rows.start + at / cols, at % cols);
        let row = order.map_or(row, |order| order[row] as usize);
        Err(if value.is_finite() {
            Error::OutOfRange { tensor, row, column, value, format }
        } else {
            Error::NotFinite { tensor, row, column, value }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use retune_engine::overlay::{Factor, LowRank};
    use safetensors::tensor::TensorView;

    use super::*;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// A low-rank term that is not trained.
    fn low_rank(r: usize, scale: f32, a: &[f32], b: &[f32]) -> Change {
        let (a, b) = (Factor::Frozen(a.into()), Factor::Frozen(b.into()));
        let mut change = Change::default();
        change.low_rank.push(LowRank { a, b, r, scale, dropout: 0.0, key: 0 });
        change
    }

    fn tensor<'a>(name: &str, shape: &[usize], values: &[f32], edit: Edit<'a>) -> Tensor<'a> {
        let (rows, cols) = if shape.len() == 2 { (shape[0], shape[1]) } else { (1, shape[0]) };
        Tensor {
            module: name.rsplit_once('.').map_or(name, |(module, _)| module).to_owned(),
            name: name.to_owned(),
            shape: shape.to_vec(),
            base: Matrix::from_f32(rows, cols, values.to_vec()),
            edit,
            format: Format::F32,
            arranged: Arranged::Plainly,
        }
    }

    /// The bytes of one file, and the report.
    fn written(tensors: Vec<Tensor<'_>>, dtype: ExportType) -> Result<(Vec<u8>, MergeReport), Error> {
        let tensors: Vec<_> = tensors.into_iter().map(|tensor| Tensor { format: dtype.format(), ..tensor }).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let total = tensors.iter().map(Tensor::bytes).sum();
        let mut last = (0, 0);
        let mut progress = |done, total| last = (done, total);
        let mut writer = TensorWriter::new(total, &mut progress);
        writer.stage(&path, &tensors)?.commit()?;
        let report = writer.report(1);
        assert_eq!(last, (total, total));
        Ok((fs::read(&path).unwrap(), report))
    }

    #[test]
    fn the_bytes_are_those_of_the_safetensors_crate() {
        let (a, b) = (numbers(6, 1), numbers(3, 2));
        let tensors =
            || vec![tensor("a.weight", &[2, 3], &a, Edit::Nothing), tensor("b.bias", &[3], &b, Edit::Nothing)];
        for (dtype, theirs) in
            [(ExportType::F32, Dtype::F32), (ExportType::BF16, Dtype::BF16), (ExportType::F16, Dtype::F16)]
        {
            let bytes = |values: &[f32]| -> Vec<u8> {
                let each = values.iter().map(|&value| match dtype {
                    ExportType::F32 => value.to_le_bytes().to_vec(),
                    ExportType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                    ExportType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                });
                each.flatten().collect()
            };
            let (a_bytes, b_bytes) = (bytes(&a), bytes(&b));
            let views = vec![
                ("b.bias", TensorView::new(theirs, vec![3], &b_bytes).unwrap()),
                ("a.weight", TensorView::new(theirs, vec![2, 3], &a_bytes).unwrap()),
            ];
            let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
            let expected = safetensors::serialize(views, Some(metadata)).unwrap();
            let (ours, report) = written(tensors(), dtype).unwrap();
            assert_eq!(ours, expected, "{dtype}");
            assert_eq!((report.bytes, report.changed_modules), (expected.len() as u64, 0));
        }
    }

    #[test]
    fn tensors_of_several_panels_are_merged_in_place() {
        let (rows, cols, r) = (2300, 500, 3);
        assert!(rows * cols > PANEL_VALUES && !(rows * cols).is_multiple_of(PANEL_VALUES));
        let (base, a, b) = (numbers(rows * cols, 1), numbers(r * cols, 2), numbers(rows * r, 3));
        let mut merged = base.clone();
        let change = low_rank(r, 0.25, &a, &b);
        merge_rows(&change, &[], cols, rows, 0..rows, &mut merged);
        let change = Edit::Weight { change: &change, params: &[] };
        let replaced = Edit::Replaced(&merged);
        let (bytes, report) = written(vec![tensor("x.weight", &[rows, cols], &base, change)], ExportType::F32).unwrap();
        let data = &bytes[bytes.len() - 4 * merged.len()..];
        assert!(data.chunks_exact(4).zip(&merged).all(|(bytes, value)| bytes == value.to_le_bytes()));
        let again = written(vec![tensor("x.weight", &[rows, cols], &base, replaced)], ExportType::F32).unwrap();
        assert_eq!((bytes, report), again);

        let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |largest, v| largest.max(v.abs()));
        let change = largest(&mut merged.iter().zip(&base).map(|(merged, base)| merged - base));
        assert_eq!(report.largest_change, change / largest(&mut base.iter().copied()));
        assert_eq!(report.changed_modules, 1);
    }

    #[test]
    fn a_module_counts_once_and_only_when_it_has_changed() {
        let (zero, one) = ([0.0; 4], [1.0; 4]);
        let nothing = low_rank(2, 1.0, &one, &zero);
        let tensors = vec![
            tensor("a.bias", &[4], &zero, Edit::Replaced(&one)),
            tensor("a.weight", &[2, 2], &one, Edit::Replaced(&zero)),
            tensor("b.weight", &[2, 2], &one, Edit::Replaced(&one)),
            tensor("c.weight", &[2, 2], &one, Edit::Weight { change: &nothing, params: &[] }),
        ];
        let (_, report) = written(tensors, ExportType::BF16).unwrap();
        assert_eq!((report.changed_modules, report.largest_change), (1, 1.0));
    }

    #[test]
    fn a_type_holds_what_it_rounds_to_a_finite_number() {
        let edges = [65504.0, 65519.996, 65520.0, 1e30, f32::MAX, f32::INFINITY, f32::NAN, 0.0, -65520.0];
        let near = [0x7F7F_7FFF, 0x7F7F_8000, 0x7F7F_8001].map(f32::from_bits);
        for value in edges.into_iter().chain(near) {
            assert_eq!(holds(Format::F16, value), f16::from_f32(value).is_finite(), "{value}");
            assert_eq!(holds(Format::BF16, value), bf16::from_f32(value).is_finite(), "{value}");
            assert_eq!(holds(Format::F32, value), value.is_finite(), "{value}");
        }
    }

    #[test]
    fn values_that_cannot_be_written_are_refused_by_place() {
        let values = [0.0, 0.0, 0.0, 0.0, 0.0, 7e4];
        let large = tensor("x.weight", &[2, 3], &values, Edit::Nothing);
        let message = written(vec![large], ExportType::F16).unwrap_err().to_string();
        assert!(message.contains("x.weight would hold 70000 at row 1, column 2, which f16 cannot"), "{message}");
        let change = low_rank(1, f32::MAX, &values[3..], &values[4..]);
        let overflow = tensor("x.weight", &[2, 3], &values, Edit::Weight { change: &change, params: &[] });
        let message = written(vec![overflow], ExportType::F32).unwrap_err().to_string();
        assert!(message.contains("x.weight holds inf at row 1, column 2"), "{message}");
    }

    #[test]
    fn shards_end_before_they_grow_too_large_and_cut_no_tensor() {
        let counts = |max_shard_bytes| -> Vec<usize> {
            let tensors = [2, 2, 9, 1, 2].map(|n| {
                let plain = tensor("x", &[n], &numbers(n, 1), Edit::Nothing);
                Tensor { format: Format::F16, ..plain }
            });
            let options = MergeOptions { dtype: ExportType::F16, max_shard_bytes };
            into_shards(tensors.into(), &options).iter().map(Vec::len).collect()
        };
        assert_eq!(counts(8), [2, 1, 2]);
        assert_eq!(counts(0), [1; 5]);
        assert_eq!(counts(u64::MAX), [5]);
        assert_eq!(shard_names(1), ["model.safetensors"]);
        assert_eq!(shard_names(2), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    }
}
