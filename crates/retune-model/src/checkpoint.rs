//! A model on disk, Hugging Face directory or GGUF file, under one set of names: those of transformers.
//!
//! Opening maps the files and reads their headers; every tensor that the spec needs must be there in the right shape, and none may be
//! there that the spec does not know: leaving it out would run another model. What llama.cpp stores otherwise is undone here, so that
//! nobody else has to know: rows of q and k in pairs of rotary dimensions, BLOOM's q, k and v one after the other, Gemma's norms with the
//! 1 added.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;
use retune_engine::spec::{Linear, ModelSpec, Module, NormKind, Order};
use retune_formats::bitsandbytes::{self, QuantizedWeight};
use retune_formats::files::{map_file, read_json, zeros};
use retune_formats::gguf::{Gguf, Metadata, TensorInfo};
use retune_formats::safetensors::{self, Dtype, RawTensor};
use retune_formats::weights::{matrix, rows_and_cols};
use retune_kernels::PanelSource;
use retune_quant::{Format, Matrix, SharedBytes};
use retune_text::tokenizer::Tokenizer;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::families::{self, Description, Family, TokenIds};
use crate::translate::{HEAD, Translation};

pub(crate) const CONFIG: &str = "config.json";
/// Values decoded at a time when all weights are looked through: 256 KB per thread.
const CHECK_VALUES: usize = 1 << 16;

/// Bytes read of all weights before what is in memory of them is given back: looking through a model larger than memory takes no more.
pub(crate) const READ_AT_ONCE: usize = 1 << 28;

/// What models that see pictures have besides the text model.
const VISION: [&str; 4] =
    ["vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."];
/// What stands before a text model's names where it is part of another model.
const WRAPPER: &str = "language_model.";

/// Where a checkpoint comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointKind {
    HuggingFace,
    Gguf,
}

/// A model on disk, opened: what it computes, and its tensors, which stay in the files until they are used.
pub struct Checkpoint {
    pub spec: ModelSpec,
    pub family: &'static Family,
    /// The tokens that begin, end and pad a text, as the configuration says.
    pub tokens: TokenIds,
    path: PathBuf,
    files: Vec<PathBuf>,
    file_bytes: u64,
    notes: Vec<String>,
    tensors: BTreeMap<String, StoredTensor>,
    source: Source,
}

enum Source {
    HuggingFace { config_json: Value },
    Gguf { file: Gguf, config_json: Value, extra: Vec<usize> },
}

struct StoredTensor {
    /// As in the file; more than one part where scales are stored apart.
    parts: Vec<SharedBytes>,
    /// As in the file.
    storage: &'static str,
    /// As the spec has it: in transformers' row order, a linear's weight as `[out, in]`.
    matrix: Matrix,
    /// What the matrix is read from, where that is not the parts.
    held: Vec<SharedBytes>,
}

impl Checkpoint {
    /// Opens a Hugging Face model directory, a `.gguf` file, or a directory with one `.gguf` file and no other weights.
    ///
    /// # Errors
    /// Files that cannot be read, are damaged or truncated; models that are not supported; tensors that are missing, of another shape
    /// than the configuration says, or not part of such a model.
    pub fn open(path: &Path) -> Result<Checkpoint, Error> {
        let found = std::fs::metadata(path).map_err(|error| Error::Io { path: path.to_owned(), error })?;
        if found.is_dir() {
            if path.join(CONFIG).is_file() && safetensors::is_in(path) {
                return Self::open_hugging_face(path);
            }
            return Self::open_gguf(&only_gguf_in(path)?);
        }
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if matches!(extension, "safetensors" | "bin" | "pt" | "pth" | "json") {
            let reason =
                format!("a .{extension} file is only part of one; give the directory that holds it, or a .gguf file");
            return Err(Error::NotAModel { path: path.to_owned(), reason });
        }
        Self::open_gguf(path)
    }

    fn open_hugging_face(dir: &Path) -> Result<Checkpoint, Error> {
        let config_path = dir.join(CONFIG);
        let config_json = read_json(&config_path)?;
        let description = families::describe(&config_json).map_err(|error| error.at(&config_path))?;
        let weights = safetensors::open(dir)?;
        let mut files = Files { prefix: description.family.prefix, tensors: weights.tensors };
        let Description { family, mut spec, tokens } = description;
        let tensors = files.read(&mut spec).map_err(|error| error.at(dir))?;
        let source = Source::HuggingFace { config_json };
        let (path, file_bytes, notes) = (dir.to_owned(), weights.file_bytes, files.notes());
        let files = [vec![config_path], weights.files].concat();
        Ok(Checkpoint { spec, family, tokens, path, files, file_bytes, notes, tensors, source })
    }

    /// A model of whose directory nothing but `config.json` is needed, with zeros for weights, which take no memory: for plans. They are of the
    /// type that the configuration names, bf16 where it names none.
    ///
    /// # Errors
    /// A configuration that cannot be read or is none of a supported model; weights larger than the system has addresses for.
    pub fn without_weights(dir: &Path) -> Result<Checkpoint, Error> {
        let config_path = dir.join(CONFIG);
        let config_json = read_json(&config_path)?;
        let description = families::describe(&config_json).map_err(|error| error.at(&config_path))?;
        let Description { family, mut spec, tokens } = description;
        let text = families::text_config(&config_json);
        let (dtype, format) = match text.get("dtype").or_else(|| text.get("torch_dtype")).and_then(Value::as_str) {
            Some("float32") => (Dtype::F32, Format::F32),
            Some("float16") => (Dtype::F16, Format::F16),
            _ => (Dtype::BF16, Format::BF16),
        };
        let shapes: Vec<(String, Vec<usize>)> = spec.tensors();
        let bytes = |(_, shape): &(String, Vec<usize>)| {
            let values = shape.iter().try_fold(1usize, |values, &size| values.checked_mul(size));
            values.and_then(|values| values.checked_mul(format.block_bytes())).unwrap_or(usize::MAX)
        };
        let io = |error| Error::Io { path: config_path.clone(), error };
        let zeros = zeros(shapes.iter().map(bytes).max().unwrap_or(0)).map_err(io)?;
        let file_bytes = shapes.iter().map(|tensor| bytes(tensor) as u64).sum();
        let raw = |tensor: (String, Vec<usize>)| {
            let bytes = zeros.slice(0..bytes(&tensor)).unwrap_or_else(|| zeros.clone());
            (tensor.0, RawTensor { dtype, shape: tensor.1, bytes })
        };
        let mut files = Files { prefix: family.prefix, tensors: shapes.into_iter().map(raw).collect() };
        let tensors = files.read(&mut spec).map_err(|error| error.at(dir))?;
        let (path, files, source) = (dir.to_owned(), vec![config_path], Source::HuggingFace { config_json });
        Ok(Checkpoint { spec, family, tokens, path, files, file_bytes, notes: Vec::new(), tensors, source })
    }

    fn open_gguf(path: &Path) -> Result<Checkpoint, Error> {
        Self::from_gguf_bytes(path, map_file(path)?).map_err(|error| error.at(path))
    }

    fn from_gguf_bytes(path: &Path, bytes: SharedBytes) -> Result<Checkpoint, Error> {
        let file_bytes = bytes.len() as u64;
        let file = Gguf::parse(bytes)?;
        let translation = Translation::of(&file)?;
        let description = families::describe(&translation.config).map_err(|error| translation.name_key(error))?;
        let Description { family, mut spec, tokens } = description;
        // What a configuration says of it need not be about the head: T5's is about the scale.
        spec.head.tied &= file.tensor(HEAD).is_none();
        let tensors = gguf_tensors(&file, &translation, &spec)?;
        let is_extra = |&at: &usize| translation.reads(&file.tensors[at].name) || is_unused(&file.tensors[at].name);
        let extra = (0..file.tensors.len()).filter(is_extra).collect();
        let Translation { config: config_json, notes, .. } = translation;
        let source = Source::Gguf { file, config_json, extra };
        let (path, files) = (path.to_owned(), vec![path.to_owned()]);
        Ok(Checkpoint { spec, family, tokens, path, files, file_bytes, notes, tensors, source })
    }

    /// A tensor by its name in transformers, for example "model.layers.0.self_attn.q_proj.weight": `[rows, cols]` in
    /// transformers' order, a linear's as `[out, in]` however the files hold it, a vector of n values as `[1, n]`. Copies no weights.
    ///
    /// # Errors
    /// A name that the model does not have.
    pub fn tensor(&self, name: &str) -> Result<Matrix, Error> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.matrix.clone()),
            None => Err(Error::UnknownTensor { tensor: name.to_owned() }),
        }
    }

    /// The weight of a linear of the spec, `[out, in]`; of a head that is tied to the table that of the table.
    ///
    /// # Errors
    /// A linear that the model does not have.
    pub fn weight_of(&self, linear: &Linear) -> Result<Matrix, Error> {
        let is_tied_head = self.spec.head.tied && linear.name == self.spec.head.linear.name;
        let module = if is_tied_head { &self.spec.table.name } else { &linear.name };
        self.tensor(&format!("{module}.weight"))
    }

    /// How the token embedding is stored, which tells the type of a model's weights: vectors may be in more bits than the rest.
    ///
    /// # Errors
    /// A model without it.
    pub fn table_storage(&self) -> Result<&'static str, Error> {
        Ok(self.tensor(&table_of(&self.spec))?.storage())
    }

    /// Whether the model has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The names of the model's tensors in alphabetical order. A tied model has no `lm_head.weight`, even if its files do.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The directory, or the `.gguf` file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that say what the model computes: its configuration and its weights.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// What the files do not say or what of them is not used, for whoever runs the model to know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Puts other matrices, of the same shapes, in the place of those of these names: what the files hold is held otherwise. The content's hash
    /// stays that of the files.
    ///
    /// # Errors
    /// A name that the model does not have.
    pub fn replace(&mut self, weights: BTreeMap<String, QuantizedWeight>) -> Result<(), Error> {
        for (name, weight) in weights {
            let Some(tensor) = self.tensors.get_mut(&name) else { return Err(Error::UnknownTensor { tensor: name }) };
            (tensor.matrix, tensor.held) = (weight.matrix, weight.parts);
        }
        Ok(())
    }

    /// Bytes that the model's tensors take as they are held.
    pub fn held_bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.matrix.bytes_len() as u64).sum()
    }

    /// Whether it is a directory or a file.
    pub fn kind(&self) -> CheckpointKind {
        match self.source {
            Source::HuggingFace { .. } => CheckpointKind::HuggingFace,
            Source::Gguf { .. } => CheckpointKind::Gguf,
        }
    }

    /// Gives back the memory of the weight files, which are mapped: what is used again is read again.
    pub fn release(&self) {
        self.tensors.values().flat_map(|tensor| tensor.parts.iter().chain(&tensor.held)).for_each(SharedBytes::release);
    }

    /// Total size of the weight files.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The tokenizer that comes with the model.
    ///
    /// # Errors
    /// One that is missing, damaged or not supported.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        let tokenizer = match &self.source {
            Source::HuggingFace { .. } => Tokenizer::from_dir(&self.path)?,
            Source::Gguf { file, .. } => Tokenizer::from_gguf(&file.metadata).map_err(|error| error.at(&self.path))?,
        };
        Ok(tokenizer.with_rows(self.spec.vocab_size))
    }

    /// The configuration as it was read: the directory's own, or what a GGUF header says in its words.
    pub fn config_json(&self) -> &Value {
        match &self.source {
            Source::HuggingFace { config_json } | Source::Gguf { config_json, .. } => config_json,
        }
    }

    /// The `config.json` to write beside a merged model: the directory's own, its part for text where there are others, or one made
    /// from the GGUF header.
    ///
    /// # Errors
    /// A GGUF model with rotary factors that transformers cannot express.
    pub fn hf_config_json(&self) -> Result<Value, Error> {
        match &self.source {
            Source::HuggingFace { config_json } => Ok(families::text_config(config_json)),
            Source::Gguf { config_json, .. } => Translation::hf_config(config_json),
        }
    }

    /// The name under which a tensor of the spec is written beside [`Self::hf_config_json`].
    pub fn exported_name(&self, name: &str) -> String {
        match name.strip_prefix(families::VISION_PREFIX) {
            Some(inner) => format!("model.{inner}"),
            None => name.to_owned(),
        }
    }

    /// The header of the GGUF file that the model is.
    pub(crate) fn gguf_metadata(&self) -> Option<&Metadata> {
        match &self.source {
            Source::Gguf { file, .. } => Some(&file.metadata),
            Source::HuggingFace { .. } => None,
        }
    }

    /// The names of the tensors of the GGUF file that the model is, in its order.
    pub(crate) fn gguf_names(&self) -> impl Iterator<Item = &str> {
        let file = match &self.source {
            Source::Gguf { file, .. } => Some(file),
            Source::HuggingFace { .. } => None,
        };
        file.into_iter().flat_map(|file| &file.tensors).map(|tensor| tensor.name.as_str())
    }

    /// The tensors of the GGUF file that the model is which are no weights of it: factors on the rotation.
    pub(crate) fn gguf_factors(&self) -> Option<Vec<&TensorInfo>> {
        match &self.source {
            Source::Gguf { file, extra, .. } => Some(extra.iter().map(|&at| &file.tensors[at]).collect()),
            Source::HuggingFace { .. } => None,
        }
    }

    /// A tensor's bytes in the GGUF file that the model is, if they are of this format and nothing else is held in its place.
    pub(crate) fn gguf_bytes(&self, name: &str, format: Format) -> Option<SharedBytes> {
        let is_own = |stored: &&StoredTensor| self.gguf_metadata().is_some() && stored.held.is_empty();
        let stored = self.tensors.get(name).filter(is_own)?;
        stored.parts.first().filter(|_| stored.storage == format.name()).cloned()
    }

    /// SHA-256, in hexadecimal, over the stored bytes of all tensors in name order, with names, formats and shapes. The same
    /// for the same weights however they are spread over shards; another for every other storage of them.
    pub fn content_hash(&self) -> String {
        let tensors: Vec<(&String, &StoredTensor)> = self.tensors.iter().collect();
        let digest = |tensor: &StoredTensor| -> [u8; 32] {
            tensor.parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(&part[..])).finalize().into()
        };
        let mut digests: Vec<[u8; 32]> = Vec::with_capacity(tensors.len());
        let bytes_of = |tensor: &StoredTensor| tensor.parts.iter().map(|part| part.len()).sum::<usize>();
        let mut rest = &tensors[..];
        while !rest.is_empty() {
            let mut read = 0;
            let fits = rest.iter().take_while(|(_, tensor)| {
                read += bytes_of(tensor);
                read <= READ_AT_ONCE
            });
            let (group, after) = rest.split_at(fits.count().max(1));
            digests.par_extend(group.par_iter().map(|(_, tensor)| digest(tensor)));
            rest = after;
            if !rest.is_empty() {
                self.release();
            }
        }
        let mut whole = Sha256::new();
        for ((name, tensor), digest) in tensors.iter().zip(&digests) {
            let (rows, cols) = (tensor.matrix.rows(), tensor.matrix.cols());
            whole.update(format!("{name}\0{}\0{rows}\0{cols}\0", tensor.storage));
            whole.update(digest);
        }
        format!("{:x}", whole.finalize())
    }

    /// Decodes every tensor and looks for NaN and infinities.
    ///
    /// # Errors
    /// The first such value in name order, whatever the number of threads.
    pub fn check_finite(&self) -> Result<(), Error> {
        let panels: Vec<(&str, &Matrix, Range<usize>)> = self
            .tensors
            .iter()
            .flat_map(|(name, tensor)| {
                let matrix = &tensor.matrix;
                let step = (CHECK_VALUES / matrix.cols().max(1)).max(1);
                let starts = (0..matrix.rows()).step_by(step);
                starts.map(move |start| (name.as_str(), matrix, start..(start + step).min(matrix.rows())))
            })
            .collect();
        let groups = panels.chunks(READ_AT_ONCE / size_of::<f32>() / CHECK_VALUES);
        for (number, group) in groups.enumerate() {
            if number > 0 {
                self.release();
            }
            let bad = group
                .par_iter()
                .map_init(Vec::new, |buffer, (name, matrix, rows)| first_not_finite(name, matrix, rows, buffer))
                .find_map_first(|bad| bad);
            if let Some(error) = bad {
                return Err(error.at(&self.path));
            }
        }
        Ok(())
    }
}

/// The tensors of a directory that no part of the model has taken yet.
struct Files {
    prefix: &'static str,
    tensors: BTreeMap<String, RawTensor>,
}

impl Files {
    /// Takes the model's tensors out, and sets in the spec what the files decide: whether the head is the table, and how far the factor on
    /// the table's rows is rounded.
    fn read(&mut self, spec: &mut ModelSpec) -> Result<BTreeMap<String, StoredTensor>, Error> {
        self.decide_head(spec);
        self.drop_tables_of_stacks(spec);
        let mut tensors = BTreeMap::new();
        let mut missing = Vec::new();
        for module in spec.modules() {
            let is_transposed = matches!(module, Module::Linear(Linear { transposed: true, .. }));
            for (name, shape) in module.tensors() {
                let Some((stored_name, raw)) = self.take(&name) else {
                    missing.push(name);
                    continue;
                };
                let tensor = self.tensor(&stored_name, &shape, raw, is_transposed)?;
                tensors.insert(name, tensor);
            }
        }
        if missing == [weight_of(&spec.head.linear.name)] {
            return Err(Error::HeadMissing { head: missing.remove(0) });
        }
        refuse_missing(&missing)?;
        if let Some(name) = self.tensors.keys().find(|name| !self.may_be_left(name)) {
            return Err(Error::UnexpectedTensor { tensor: name.clone(), family: spec.family });
        }
        // As transformers rounds it, to the type of the table.
        match tensors.get(&table_of(spec)).map(|table| table.storage) {
            Some(storage) if storage == Format::BF16.name() => {
                spec.table.scale = bf16::from_f32(spec.table.scale).to_f32();
            }
            Some(storage) if storage == Format::F16.name() => {
                spec.table.scale = f16::from_f32(spec.table.scale).to_f32();
            }
            _ => {}
        }
        Ok(tensors)
    }

    /// Whether the head is the table is for the files to say: a head of its own in them is used whatever the configuration says, and a
    /// lone one is the table as well.
    fn decide_head(&mut self, spec: &mut ModelSpec) {
        let (table, head) = (table_of(spec), weight_of(&spec.head.linear.name));
        let stored = |name: &str| Some((self.name_of(name)?, self.tensors.get(&self.name_of(name)?)?));
        match (stored(&table), stored(&head)) {
            (None, Some((name, _))) if spec.head.tied => {
                if let Some(raw) = self.tensors.remove(&name) {
                    self.tensors.insert(table, raw);
                }
            }
            (Some((_, ours)), Some((name, theirs))) if spec.head.tied => {
                if is_copy(ours, theirs) {
                    self.tensors.remove(&name);
                } else {
                    spec.head.tied = false;
                }
            }
            _ => {}
        }
    }

    /// T5's encoder and decoder read the same table, of which files may hold a copy for each.
    fn drop_tables_of_stacks(&mut self, spec: &ModelSpec) {
        let Some(table) = self.tensors.get(&table_of(spec)).filter(|_| spec.encoder.is_some()) else { return };
        let copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"];
        let is_dropped = |name: &&str| self.tensors.get(*name).is_some_and(|copy| is_copy(table, copy));
        for name in copies.into_iter().filter(is_dropped).collect::<Vec<_>>() {
            self.tensors.remove(name);
        }
    }

    /// The name under which the files hold a tensor.
    fn name_of(&self, name: &str) -> Option<String> {
        let inner = name.strip_prefix(self.prefix);
        let is_wrapped = self.prefix.ends_with(WRAPPER);
        let candidates = [
            Some(name.to_owned()),
            inner.map(str::to_owned),
            inner.filter(|_| is_wrapped).map(|inner| format!("{WRAPPER}model.{inner}")),
            inner.filter(|_| is_wrapped).map(|inner| format!("model.{inner}")),
            (inner.is_none() || !is_wrapped).then(|| format!("{WRAPPER}{name}")),
        ];
        candidates.into_iter().flatten().find(|name| self.tensors.contains_key(name))
    }

    fn take(&mut self, name: &str) -> Option<(String, RawTensor)> {
        self.tensors.remove_entry(&self.name_of(name)?)
    }

    /// A tensor of this shape in its file; what else belongs to it is taken as well. One that is transposed is a linear's of `[in, out]`, but
    /// not where it is quantized: bitsandbytes has them all as `[out, in]`.
    fn tensor(
        &mut self,
        name: &str,
        shape: &[usize],
        raw: RawTensor,
        is_transposed: bool,
    ) -> Result<StoredTensor, Error> {
        let is_transposed = is_transposed && shape.len() == 2;
        let rows_first: Vec<usize> = if is_transposed { shape.iter().rev().copied().collect() } else { shape.to_vec() };
        // First, because packed indices may be stored as if they were floating-point numbers.
        if let Some(QuantizedWeight { matrix, parts }) =
            bitsandbytes::take_weight(name, &rows_first, &raw, &mut self.tensors)?
        {
            return Ok(StoredTensor { storage: matrix.storage(), parts, matrix, held: Vec::new() });
        }
        let Some(format) = raw.format() else {
            return Err(Error::TensorType { tensor: name.to_owned(), dtype: raw.dtype.to_string() });
        };
        check_shape(name, raw.shape, shape)?;
        let (rows, cols) = rows_and_cols(shape);
        let matrix = matrix(name, format, rows, cols, raw.bytes.clone())?;
        let matrix = if is_transposed { matrix.transposed() } else { matrix };
        Ok(StoredTensor { parts: vec![raw.bytes], storage: format.name(), matrix, held: Vec::new() })
    }

    /// Whether the model computes the same without a tensor: what sees pictures, frequencies that follow from the configuration, GPT-2's
    /// causal masks, and biases that T5's attention to the encoder does not read.
    fn may_be_left(&self, name: &str) -> bool {
        let is_mask = || name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
        name.ends_with(".rotary_emb.inv_freq")
            || (self.prefix == families::VISION_PREFIX && is_of_vision(name))
            || (self.prefix == "transformer." && is_mask())
            || name.ends_with(".EncDecAttention.relative_attention_bias.weight")
    }

    fn notes(&self) -> Vec<String> {
        let left = self.tensors.keys().filter(|name| is_of_vision(name)).count();
        let note = format!("what sees pictures is left out: {left} tensors of the vision tower and its projector");
        (left > 0).then_some(note).into_iter().collect()
    }
}

/// Whether two tensors are the same.
fn is_copy(a: &RawTensor, b: &RawTensor) -> bool {
    a.dtype == b.dtype && a.shape == b.shape && a.bytes[..] == b.bytes[..]
}

fn is_of_vision(name: &str) -> bool {
    VISION.iter().any(|prefix| name.starts_with(prefix))
}

fn weight_of(module: &str) -> String {
    format!("{module}.weight")
}

fn table_of(spec: &ModelSpec) -> String {
    weight_of(&spec.table.name)
}

/// The model's tensors in a GGUF file, as transformers has them.
fn gguf_tensors(
    file: &Gguf,
    translation: &Translation,
    spec: &ModelSpec,
) -> Result<BTreeMap<String, StoredTensor>, Error> {
    let mut unused: BTreeMap<&str, &TensorInfo> =
        file.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    unused.retain(|name, _| !translation.reads(name));
    let mut needed = Vec::new();
    let mut missing = Vec::new();
    for module in spec.modules() {
        // llama.cpp stores every linear as [out, in].
        let module = match module {
            Module::Linear(linear) => Stored::Linear(Linear { transposed: false, ..linear.clone() }),
            Module::Norm(norm) if norm.kind == NormKind::RmsPlusOne => Stored::PlusOne(module),
            other => Stored::Plain(other),
        };
        for (name, shape) in module.tensors() {
            let stored_name = translation.gguf.name(translation.family.prefix, &name).unwrap_or_default();
            match unused.remove(stored_name.as_str()) {
                Some(info) => {
                    check_shape(&info.name, info.shape(), &shape)?;
                    needed.push((name, info, matches!(module, Stored::PlusOne(_))));
                }
                None => missing.push(stored_name),
            }
        }
    }
    refuse_missing(&missing)?;
    if let Some(tensor) = unused.into_keys().find(|name| !is_unused(name)) {
        return Err(Error::UnexpectedTensor { tensor: tensor.to_owned(), family: spec.family });
    }

    // Only now are the numbers of heads known to fit the file, and safe to allocate by.
    let row_maps = row_maps(spec, translation.gguf.paired_rows);
    let mut tensors = BTreeMap::new();
    for (name, info, is_plus_one) in needed {
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        let tensor = gguf_tensor(info, row_maps.get(module), is_plus_one)?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// Whether a tensor of a GGUF file is one that nobody reads: frequencies that follow from the configuration, and biases that T5's attention
/// to the encoder does not read.
fn is_unused(name: &str) -> bool {
    [".attn_rot_embd.weight", ".cross_attn_rel_b.weight"].iter().any(|end| name.ends_with(end))
}

/// A module as llama.cpp stores it.
enum Stored<'a> {
    Linear(Linear),
    /// With 1 added to the weight.
    PlusOne(Module<'a>),
    Plain(Module<'a>),
}

impl Stored<'_> {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            Stored::Linear(linear) => Module::Linear(linear).tensors(),
            Stored::PlusOne(module) | Stored::Plain(module) => module.tensors(),
        }
    }
}

/// For each linear whose rows llama.cpp stores in another order, where each row is.
pub(crate) fn row_maps(spec: &ModelSpec, paired_rows: bool) -> BTreeMap<&str, Arc<[u32]>> {
    let mut shared: BTreeMap<(usize, usize), Arc<[u32]>> = BTreeMap::new();
    let mut maps = BTreeMap::new();
    for sub_layer in spec.sub_layers() {
        let Some(attention) = sub_layer.attention() else { continue };
        let d = attention.head_dim;
        let mut map = |linear: &'_ Linear, heads: usize, of: fn(usize, usize) -> Arc<[u32]>| {
            let map = shared.entry((heads, d)).or_insert_with(|| of(heads, d));
            (linear.rows == map.len()).then(|| Arc::clone(map))
        };
        let mapped: Vec<(&Linear, Option<Arc<[u32]>>)> = match (attention.order, sub_layer.inputs.as_slice()) {
            (Order::Heads, [linear]) => vec![(linear, map(linear, attention.queries, rows_of_heads))],
            (Order::Planes, [q, k, _]) if paired_rows => {
                vec![(q, map(q, attention.queries, interleaved_rows)), (k, map(k, attention.keys, interleaved_rows))]
            }
            _ => continue,
        };
        maps.extend(mapped.into_iter().filter_map(|(linear, map)| Some((linear.name.as_str(), map?))));
    }
    maps
}

/// Row p·d/2 + j of a head of d rows of queries or keys is stored at 2·j + p.
fn interleaved_rows(heads: usize, head_dim: usize) -> Arc<[u32]> {
    let half = head_dim / 2;
    // The configuration's check keeps heads · head_dim below 2^32.
    (0..heads)
        .flat_map(|head| (0..2).flat_map(move |p| (0..half).map(move |j| (head * head_dim + 2 * j + p) as u32)))
        .collect()
}

/// q, k and v of each head in turn are stored as all queries, all keys, all values.
fn rows_of_heads(heads: usize, head_dim: usize) -> Arc<[u32]> {
    (0..heads)
        .flat_map(|head| {
            (0..3).flat_map(move |part| (0..head_dim).map(move |i| ((part * heads + head) * head_dim + i) as u32))
        })
        .collect()
}

fn gguf_tensor(info: &TensorInfo, row_map: Option<&Arc<[u32]>>, is_plus_one: bool) -> Result<StoredTensor, Error> {
    let shape = info.shape();
    let (rows, cols) = rows_and_cols(&shape);
    let stored = matrix(&info.name, info.format, rows, cols, info.bytes.clone())?;
    let matrix = match row_map {
        None if is_plus_one => {
            let values: Vec<f32> = stored.to_f32().into_iter().map(|weight| weight - 1.0).collect();
            Matrix::from_f32(1, values.len(), values)
        }
        None => stored,
        // A bias: one row, whose values are what must be reordered.
        Some(map) if shape.len() == 1 => {
            let values = stored.to_f32();
            let reordered: Vec<f32> = map.iter().filter_map(|&at| values.get(at as usize).copied()).collect();
            Matrix::from_f32(1, reordered.len(), reordered)
        }
        Some(map) => {
            stored.with_row_map(Arc::clone(map)).map_err(|error| Error::Tensor { tensor: info.name.clone(), error })?
        }
    };
    Ok(StoredTensor { parts: vec![info.bytes.clone()], storage: info.format.name(), matrix, held: Vec::new() })
}

fn check_shape(name: &str, found: Vec<usize>, expected: &[usize]) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(Error::TensorShape { tensor: name.to_owned(), found, expected: expected.to_vec() })
}

fn refuse_missing(missing: &[String]) -> Result<(), Error> {
    if missing.is_empty() {
        return Ok(());
    }
    let first = missing.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
    Err(Error::MissingTensors { count: missing.len(), first })
}

fn first_not_finite(name: &str, matrix: &Matrix, rows: &Range<usize>, buffer: &mut Vec<f32>) -> Option<Error> {
    let cols = matrix.cols();
    buffer.resize(rows.len() * cols, 0.0);
    matrix.panel_f32(rows.clone(), 0..cols, buffer);
    let (at, &value) = buffer.iter().enumerate().find(|(_, value)| !value.is_finite())?;
    Some(Error::NotFinite { tensor: name.to_owned(), row: rows.start + at / cols, column: at % cols, value })
}

/// The one `.gguf` file of a directory that is no complete Hugging Face model; otherwise an error that says what is amiss.
fn only_gguf_in(dir: &Path) -> Result<PathBuf, Error> {
    let io = |error| Error::Io { path: dir.to_owned(), error };
    let mut ggufs = Vec::new();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        names.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            ggufs.push(path);
        }
    }
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    let has_like = |start: &str, end: &str| names.iter().any(|name| name.starts_with(start) && name.ends_with(end));
    let reason = if ggufs.len() > 1 {
        format!("it holds {} .gguf files; give one of them by its own path", ggufs.len())
    } else if let Some(only) = ggufs.pop() {
        return Ok(only);
    } else if has("adapter_config.json") {
        "it holds an adapter; give the base model the adapter belongs to".to_owned()
    } else if has_like("pytorch_model", ".bin") && !safetensors::is_in(dir) {
        "its weights are in pytorch_model.bin, which can run code when read; save it as safetensors with transformers: \
         AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
            .to_owned()
    } else if safetensors::is_in(dir) {
        "config.json is missing; download it to the same directory".to_owned()
    } else if has(CONFIG) {
        "it has config.json but neither model.safetensors nor model.safetensors.index.json; download the weights"
            .to_owned()
    } else {
        "expected config.json with model.safetensors, or a .gguf file".to_owned()
    };
    Err(Error::NotAModel { path: dir.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use retune_formats::gguf::testing::GgufBytes;
    use retune_formats::safetensors::testing::{f32_file, file};

    type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

    fn config_json() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 3, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "attention_bias": true,
            "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        })
    }

    fn spec_of(config: &Value) -> ModelSpec {
        families::describe(config).unwrap().spec
    }

    /// Every value of every tensor is another number.
    fn tensors(config: &Value) -> Tensors {
        let mut next = 0.0;
        spec_of(config)
            .tensors()
            .into_iter()
            .map(|(name, shape)| {
                let count: usize = shape.iter().product();
                let mut values = Vec::new();
                for _ in 0..count {
                    next += 0.5f32;
                    values.push(next);
                }
                (name, shape, values)
            })
            .collect()
    }

    fn write_model(dir: &Path, config: &Value, tensors: &Tensors) {
        std::fs::write(dir.join(CONFIG), config.to_string()).unwrap();
        std::fs::write(dir.join("model.safetensors"), f32_file(tensors)).unwrap();
    }

    fn open_error(path: &Path) -> String {
        Checkpoint::open(path).err().expect("must be refused").to_string()
    }

    /// Rows of q and k as llama.cpp's converter orders them.
    fn permuted(values: &[f32], heads: usize, cols: usize) -> Vec<f32> {
        let head_dim = values.len() / heads / cols;
        let mut stored = Vec::new();
        for head in 0..heads {
            for j in 0..head_dim / 2 {
                for p in 0..2 {
                    let row = head * head_dim + p * head_dim / 2 + j;
                    stored.extend(&values[row * cols..(row + 1) * cols]);
                }
            }
        }
        stored
    }

    fn gguf(tensors: &Tensors) -> GgufBytes {
        let mut bytes = GgufBytes::default()
            .str("general.architecture", "llama")
            .u32("llama.block_count", 2)
            .u32("llama.context_length", 16)
            .u32("llama.embedding_length", 4)
            .u32("llama.feed_forward_length", 6)
            .u32("llama.attention.head_count", 2)
            .u32("llama.attention.head_count_kv", 1)
            .u32("llama.attention.key_length", 6)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        for (name, shape, values) in tensors {
            let cols = if shape.len() == 2 { shape[1] } else { 1 };
            let stored = match name {
                name if name.contains("q_proj") => permuted(values, 2, cols),
                name if name.contains("k_proj") => permuted(values, 1, cols),
                _ => values.clone(),
            };
            let dims: Vec<u64> = shape.iter().rev().map(|&dim| dim as u64).collect();
            let gguf = families::FAMILIES[0].gguf.as_ref().unwrap();
            bytes = bytes.f32_tensor(&gguf.name("model.", name).unwrap(), &dims, &stored);
        }
        bytes
    }

    fn from_bytes(bytes: Vec<u8>) -> Result<Checkpoint, Error> {
        Checkpoint::from_gguf_bytes(Path::new("model.gguf"), SharedBytes::from_vec(bytes))
    }

    fn gguf_error(bytes: &GgufBytes) -> String {
        from_bytes(bytes.build()).err().expect("must be refused").to_string()
    }

    #[test]
    fn both_kinds_of_file_give_the_same_tensors() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = tensors(&config_json());
        write_model(dir.path(), &config_json(), &tensors);
        let theirs = Checkpoint::open(dir.path()).unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, gguf(&tensors).build()).unwrap();
        let ours = Checkpoint::open(&path).unwrap();
        assert_eq!((theirs.kind(), ours.kind()), (CheckpointKind::HuggingFace, CheckpointKind::Gguf));
        for (name, shape, values) in &tensors {
            for checkpoint in [&theirs, &ours] {
                let matrix = checkpoint.tensor(name).unwrap();
                assert_eq!((matrix.rows(), matrix.cols()), rows_and_cols(shape), "{name}");
                assert_eq!(&matrix.to_f32(), values, "{name}");
            }
        }
        assert!(theirs.names().eq(ours.names()));
        assert_eq!(theirs.names().count(), tensors.len());
        assert!(theirs.has("lm_head.weight") && !theirs.has("lm_head.bias"));
        assert_eq!(ours.file_bytes(), std::fs::metadata(&path).unwrap().len());
        assert!(theirs.tensor("model.layers.2.mlp.up_proj.weight").is_err());
        assert_eq!(ours.spec, theirs.spec);
        assert_eq!(
            (spec_of(&ours.hf_config_json().unwrap()), theirs.hf_config_json().unwrap()),
            (theirs.spec, config_json())
        );
    }

    /// What llama.cpp's converter makes of a tensor: linears as [out, in], BLOOM's q, k, v one after the other, 1 added to Gemma's norms.
    fn converted(spec: &ModelSpec, name: &str, shape: &[usize], values: &[f32]) -> (Vec<usize>, Vec<f32>) {
        let module = name.rsplit_once('.').unwrap().0;
        let module = spec.modules().into_iter().find(|other| other.name() == module);
        let cols = shape.get(1).copied().unwrap_or(1);
        match module.unwrap() {
            Module::Linear(linear) if linear.transposed && shape.len() == 2 => {
                let stored = (0..cols).flat_map(|j| (0..shape[0]).map(move |i| values[i * cols + j])).collect();
                (vec![shape[1], shape[0]], stored)
            }
            Module::Linear(linear) if linear.name.ends_with("query_key_value") => {
                let (heads, d) = (2, linear.rows / 6);
                let rows =
                    (0..3).flat_map(|part| (0..heads).flat_map(move |h| (0..d).map(move |i| (h * 3 + part) * d + i)));
                (shape.to_vec(), rows.flat_map(|row| values[row * cols..(row + 1) * cols].to_vec()).collect())
            }
            Module::Norm(norm) if norm.kind == NormKind::RmsPlusOne => {
                (shape.to_vec(), values.iter().map(|value| value + 1.0).collect())
            }
            _ => (shape.to_vec(), values.to_vec()),
        }
    }

    #[test]
    fn what_llama_cpp_stores_otherwise_is_undone() {
        let gemma = json!({"model_type": "gemma", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 3});
        let common = |bytes: GgufBytes, architecture: &str| {
            let key = |name: &str| format!("{architecture}.{name}");
            let bytes = bytes.str("general.architecture", architecture).u32(&key("block_count"), 2);
            let bytes = bytes.u32(&key("context_length"), 16).u32(&key("embedding_length"), 4);
            let bytes = bytes.u32(&key("attention.head_count"), 2).f32(&key("attention.layer_norm_epsilon"), 1e-5);
            bytes.u32(&key("feed_forward_length"), if architecture == "gemma" { 6 } else { 16 })
        };
        for (config, keys) in [
            (
                json!({"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 3}),
                common(GgufBytes::default(), "gpt2"),
            ),
            (
                json!({"model_type": "bloom", "hidden_size": 4, "n_head": 2, "n_layer": 2, "vocab_size": 3}),
                common(GgufBytes::default(), "bloom"),
            ),
            (
                gemma,
                common(GgufBytes::default(), "gemma")
                    .u32("gemma.attention.head_count_kv", 1)
                    .u32("gemma.attention.key_length", 6)
                    .f32("gemma.attention.layer_norm_rms_epsilon", 1e-6),
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (spec, tensors) = (spec_of(&config), tensors(&config));
            write_model(dir.path(), &config, &tensors);
            let theirs = Checkpoint::open(dir.path()).unwrap();
            let (prefix, gguf) = (theirs.family.prefix, theirs.family.gguf.as_ref().unwrap());
            let mut bytes = keys;
            for (name, shape, values) in &tensors {
                let (shape, values) = converted(&spec, name, shape, values);
                let dims: Vec<u64> = shape.iter().rev().map(|&dim| dim as u64).collect();
                bytes = bytes.f32_tensor(&gguf.name(prefix, name).unwrap(), &dims, &values);
            }
            let ours = from_bytes(bytes.build()).unwrap();
            assert!(theirs.names().eq(ours.names()));
            for name in theirs.names() {
                let (theirs, ours) = (theirs.tensor(name).unwrap(), ours.tensor(name).unwrap());
                assert_eq!((theirs.rows(), theirs.cols()), (ours.rows(), ours.cols()), "{name}");
                assert_eq!(theirs.to_f32(), ours.to_f32(), "{name}");
            }
            assert_eq!(spec_of(&ours.hf_config_json().unwrap()), ours.spec);
        }
    }

    #[test]
    fn a_linear_stored_as_in_out_comes_out_as_out_in() {
        let dir = tempfile::tempdir().unwrap();
        let config =
            json!({"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 5, "vocab_size": 3});
        let tensors = tensors(&config);
        write_model(dir.path(), &config, &tensors);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let (name, shape, values) = tensors.iter().find(|tensor| tensor.0.ends_with("c_attn.weight")).unwrap();
        let matrix = checkpoint.tensor(name).unwrap();
        assert_eq!((shape.as_slice(), matrix.rows(), matrix.cols()), (&[4, 12][..], 12, 4));
        let transposed: Vec<f32> = (0..12).flat_map(|j| (0..4).map(move |i| values[i * 12 + j])).collect();
        assert_eq!(matrix.to_f32(), transposed);
    }

    #[test]
    fn rope_factors_are_read_and_are_no_tensor_of_the_model() {
        let with = |factors: &[f32]| {
            from_bytes(gguf(&tensors(&config_json())).f32_tensor("rope_freqs.weight", &[3], factors).build()).unwrap()
        };
        let checkpoint = with(&[1.0, 2.0, 4.0]);
        let plain = spec_of(&config_json()).ropes.remove(0).frequencies;
        let expected: Vec<f64> =
            plain.iter().zip([1.0f32, 2.0, 4.0]).map(|(plain, by)| f64::from(*plain as f32 / by)).collect();
        assert_eq!(checkpoint.spec.ropes[0].frequencies, expected);
        assert!(!checkpoint.has("rope_freqs.weight"));
        assert!(checkpoint.hf_config_json().unwrap_err().to_string().contains("rotary factors"));
        assert_eq!(with(&[2.0; 3]).hf_config_json().unwrap()["rope_scaling"]["rope_type"], "linear");
    }

    #[test]
    fn the_files_decide_whether_the_head_is_the_table() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config_json();
        let untied = tensors(&config);
        config["tie_word_embeddings"] = json!(true);
        let (table, head) = ("model.embed_tokens.weight", "lm_head.weight");
        let without = |name: &str| -> Tensors { untied.iter().filter(|tensor| tensor.0 != name).cloned().collect() };
        let open = |config: &Value, tensors: &Tensors| {
            write_model(dir.path(), config, tensors);
            Checkpoint::open(dir.path())
        };
        let own = open(&config, &untied).unwrap();
        assert!(!own.spec.head.tied && own.has(head));
        assert_ne!(own.tensor(head).unwrap().to_f32(), own.tensor(table).unwrap().to_f32());
        let mut copied = untied.clone();
        let values = copied.iter().find(|tensor| tensor.0 == table).unwrap().2.clone();
        copied.iter_mut().find(|tensor| tensor.0 == head).unwrap().2 = values.clone();
        let copy = open(&config, &copied).unwrap();
        assert!(copy.spec.head.tied && !copy.has(head));
        let lone = open(&config, &without(table)).unwrap();
        assert!(lone.spec.head.tied && !lone.has(head));
        assert_eq!(lone.tensor(table).unwrap().to_f32(), untied.iter().find(|tensor| tensor.0 == head).unwrap().2);
        assert!(open(&config, &without(head)).unwrap().spec.head.tied);
        let text = open(&config_json(), &without(head)).err().unwrap().to_string();
        assert!(text.contains("lm_head.weight is missing") && text.contains("tie_word_embeddings"), "{text}");
        assert!(open(&config_json(), &without(table)).err().unwrap().to_string().contains(table));

        let tied = from_bytes(gguf(&untied).without_tensor("output.weight").build()).unwrap();
        assert!(tied.spec.head.tied && !tied.has(head));
    }

    #[test]
    fn names_may_lack_the_prefix_or_have_another_models_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let open = |config: &Value, tensors: &Tensors, rename: &dyn Fn(&str) -> String| {
            let renamed =
                tensors.iter().map(|(name, shape, values)| (rename(name), shape.clone(), values.clone())).collect();
            write_model(dir.path(), config, &renamed);
            Checkpoint::open(dir.path()).unwrap()
        };
        let llama = tensors(&config_json());
        let bare = open(&config_json(), &llama, &|name| name.strip_prefix("model.").unwrap_or(name).to_owned());
        let gpt2_config =
            json!({"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 5, "vocab_size": 3});
        let gpt2 = tensors(&gpt2_config);
        let bare_gpt2 = open(&gpt2_config, &gpt2, &|name| name.strip_prefix("transformer.").unwrap_or(name).to_owned());
        for (checkpoint, tensors) in [(bare, llama), (bare_gpt2, gpt2)] {
            assert_eq!(checkpoint.names().count(), tensors.len());
            assert!(tensors.iter().all(|tensor| checkpoint.has(&tensor.0)));
        }

        let text = json!({"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 3});
        let wrapped = json!({"model_type": "gemma3", "text_config": text, "vision_config": {}});
        let mut all = tensors(&wrapped);
        all.push(("model.language_model.vision".to_owned(), vec![2], vec![0.0; 2]));
        let old = |name: &str| match name.strip_prefix("model.language_model.") {
            Some("vision") => "vision_tower.a.weight".to_owned(),
            Some(inner) => format!("language_model.model.{inner}"),
            None => format!("language_model.{name}"),
        };
        let new = |name: &str| name.replace("model.language_model.vision", "model.multi_modal_projector.a.weight");
        for rename in [&old as &dyn Fn(&str) -> String, &new] {
            let checkpoint = open(&wrapped, &all, rename);
            assert_eq!(checkpoint.names().count(), all.len() - 1);
            assert!(checkpoint.notes()[0].contains("1 tensors of the vision tower"), "{:?}", checkpoint.notes());
            let name = "model.language_model.layers.0.mlp.up_proj.weight";
            assert!(checkpoint.has(name));
            assert_eq!(checkpoint.exported_name(name), "model.layers.0.mlp.up_proj.weight");
            assert_eq!(checkpoint.exported_name("lm_head.weight"), "lm_head.weight");
            let exported = spec_of(&checkpoint.hf_config_json().unwrap());
            let names: Vec<String> = checkpoint.names().map(|name| checkpoint.exported_name(name)).collect();
            assert!(exported.tensors().iter().all(|(name, _)| names.contains(name)));
        }
    }

    #[test]
    fn tensors_without_a_place_are_refused_but_for_known_ones() {
        let dir = tempfile::tempdir().unwrap();
        let with = |config: &Value, name: &str| {
            let mut all = tensors(config);
            all.push((name.to_owned(), vec![2], vec![0.0; 2]));
            write_model(dir.path(), config, &all);
            Checkpoint::open(dir.path()).map(|checkpoint| checkpoint.has(name)).map_err(|error| error.to_string())
        };
        let llama = config_json();
        assert_eq!(with(&llama, "model.layers.0.self_attn.rotary_emb.inv_freq"), Ok(false));
        for name in [
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.2.mlp.up_proj.weight",
            "vision_tower.x",
            "model.layers.0.mlp.up_proj.bias",
            "h.0.attn.bias",
        ] {
            let text = with(&llama, name).unwrap_err();
            assert!(text.contains(name) && text.contains("no place in a llama model"), "{text}");
        }
        let gpt2 =
            json!({"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 5, "vocab_size": 3});
        for name in ["h.0.attn.bias", "transformer.h.0.attn.masked_bias"] {
            assert_eq!(with(&gpt2, name), Ok(false));
        }
    }

    #[test]
    fn a_rounded_table_rounds_the_factor_on_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"model_type": "gemma", "hidden_size": 40, "intermediate_size": 6, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 3});
        for (dtype, expected) in
            [("F32", 40f32.sqrt()), ("BF16", 6.3125), ("F16", f16::from_f32(40f32.sqrt()).to_f32())]
        {
            let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
            for (name, shape) in spec_of(&config).tensors() {
                let (count, bytes) = (shape.iter().product::<usize>(), if dtype == "F32" { 4 } else { 2 });
                let start = data.len();
                data.resize(start + count * bytes, 0u8);
                header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
            }
            std::fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
            std::fs::write(dir.path().join("model.safetensors"), file(&Value::Object(header).to_string(), &data))
                .unwrap();
            assert_eq!(Checkpoint::open(dir.path()).unwrap().spec.table.scale, expected, "{dtype}");
        }
    }

    #[test]
    fn missing_misshapen_and_unknown_tensors_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let all = tensors(&config_json());
        let without = all.iter().filter(|tensor| !tensor.0.contains("layers.1.mlp")).cloned().collect();
        write_model(dir.path(), &config_json(), &without);
        let text = open_error(dir.path());
        assert!(text.contains("3 tensor(s)") && text.contains("model.layers.1.mlp.gate_proj.weight"), "{text}");

        let mut wide = config_json();
        wide["intermediate_size"] = json!(7);
        write_model(dir.path(), &wide, &all);
        let text = open_error(dir.path());
        assert!(text.contains("[6, 4]") && text.contains("[7, 4]") && text.contains("gate_proj"), "{text}");

        assert!(gguf_error(&gguf(&all).without_tensor("blk.1.attn_v.weight")).contains("blk.1.attn_v.weight"));
        assert!(
            gguf_error(&gguf(&all).f32_tensor("blk.0.attn_q_norm.weight", &[6], &[0.0; 6])).contains("attn_q_norm")
        );
        let heads = gguf(&all).u32("llama.vocab_size", 3).without_tensor("blk.0.attn_q.weight");
        let heads = heads.f32_tensor("blk.0.attn_q.weight", &[4, 4], &[0.0; 16]);
        assert!(gguf_error(&heads).contains("[12, 4]"));
    }

    #[test]
    fn integer_weights_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let header = r#"{"model.embed_tokens.weight":{"dtype":"I32","shape":[3,4],"data_offsets":[0,48]}}"#;
        std::fs::write(dir.path().join(CONFIG), config_json().to_string()).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), file(header, &[0; 48])).unwrap();
        let text = open_error(dir.path());
        assert!(text.contains("I32") && text.contains("model.embed_tokens.weight"), "{text}");
    }

    #[test]
    fn every_truncation_of_a_gguf_model_is_refused() {
        let bytes = gguf(&tensors(&config_json())).build();
        assert!(from_bytes(bytes.clone()).is_ok());
        for len in 0..bytes.len() {
            assert!(from_bytes(bytes[..len].to_vec()).is_err(), "{len} of {} bytes", bytes.len());
        }
    }

    #[test]
    fn no_changed_bit_of_a_gguf_header_panics() {
        let model = gguf(&tensors(&config_json()));
        let bytes = model.build();
        for bit in 0..model.header().len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            if let Ok(checkpoint) = from_bytes(changed) {
                let _ = checkpoint.check_finite();
                let _ = checkpoint.hf_config_json();
            }
        }
    }

    #[test]
    fn weights_that_are_not_finite_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut all = tensors(&config_json());
        write_model(dir.path(), &config_json(), &all);
        assert!(Checkpoint::open(dir.path()).unwrap().check_finite().is_ok());
        let bad = all.iter_mut().find(|tensor| tensor.0 == "model.layers.1.self_attn.q_proj.weight").unwrap();
        bad.2[9] = f32::NEG_INFINITY;
        bad.2[10] = f32::NAN;
        let last = all.iter_mut().find(|tensor| tensor.0 == "model.norm.weight").unwrap();
        last.2[0] = f32::NAN;
        write_model(dir.path(), &config_json(), &all);
        let text = Checkpoint::open(dir.path()).unwrap().check_finite().unwrap_err().to_string();
        assert!(text.contains("model.layers.1.self_attn.q_proj.weight holds -inf at row 2, column 1"), "{text}");
        let stored = from_bytes(gguf(&all).build()).unwrap();
        let of_gguf = stored.check_finite().unwrap_err().to_string();
        assert_eq!(of_gguf.split_once(": ").unwrap().1, text.split_once(": ").unwrap().1);
    }

    #[test]
    fn the_hash_is_that_of_the_weights_however_they_are_sharded() {
        let dir = tempfile::tempdir().unwrap();
        let mut all = tensors(&config_json());
        write_model(dir.path(), &config_json(), &all);
        let whole = Checkpoint::open(dir.path()).unwrap().content_hash();
        assert_eq!(whole.len(), 64);

        let sharded = tempfile::tempdir().unwrap();
        let (one, two) = all.split_at(5);
        std::fs::write(sharded.path().join(CONFIG), config_json().to_string()).unwrap();
        std::fs::write(sharded.path().join("1.safetensors"), f32_file(one)).unwrap();
        std::fs::write(sharded.path().join("2.safetensors"), f32_file(two)).unwrap();
        let mut map = json!({});
        for (file, part) in [("1.safetensors", one), ("2.safetensors", two)] {
            for tensor in part {
                map[&tensor.0] = json!(file);
            }
        }
        let index = json!({"metadata": {}, "weight_map": map});
        std::fs::write(sharded.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        assert_eq!(Checkpoint::open(sharded.path()).unwrap().content_hash(), whole);

        all[3].2[0] += 1.0;
        write_model(dir.path(), &config_json(), &all);
        assert_ne!(Checkpoint::open(dir.path()).unwrap().content_hash(), whole);
    }

    #[test]
    fn directories_without_a_complete_model_get_advice() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        assert!(open_error(dir.path()).contains("expected config.json"));
        put("adapter_config.json", b"{}");
        assert!(open_error(dir.path()).contains("base model"));
        std::fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
        put(CONFIG, config_json().to_string().as_bytes());
        assert!(open_error(dir.path()).contains("neither model.safetensors"));
        put("pytorch_model.bin", b"");
        assert!(open_error(dir.path()).contains("save_pretrained"));
        put("a.gguf", &gguf(&tensors(&config_json())).build());
        let only = Checkpoint::open(dir.path()).unwrap();
        assert_eq!((only.kind(), only.path()), (CheckpointKind::Gguf, dir.path().join("a.gguf").as_path()));
        put("b.gguf", b"");
        assert!(open_error(dir.path()).contains("2 .gguf files"));
        put("model.safetensors", b"");
        let text = open_error(dir.path());
        assert!(text.contains("model.safetensors") && text.contains("truncated"), "{text}");
        assert!(open_error(&dir.path().join("model.safetensors")).contains("directory that holds it"));
        assert!(open_error(&dir.path().join("b.gguf")).contains("truncated"));
        assert!(open_error(&dir.path().join("missing.gguf")).contains("missing.gguf"));
    }
}
