//! A model on disk, Hugging Face directory or GGUF file, under one set of names: those of transformers.
//!
//! Opening maps the files and reads their headers; every tensor that the configuration needs must be there in the right
//! shape. llama.cpp stores the rows of q and k in another order than transformers (pairs of rotary dimensions side by side
//! instead of in two halves); the order is undone here, so nobody else has to know.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use retune_formats::bitsandbytes::{self, FourBitWeight};
use retune_formats::files::{map_file, read_json};
use retune_formats::gguf::{Gguf, Metadata, TensorInfo};
use retune_formats::safetensors::{self, RawTensor};
use retune_formats::weights::{matrix, rows_and_cols};
use retune_kernels::PanelSource;
use retune_quant::{Matrix, SharedBytes};
use retune_text::tokenizer::Tokenizer;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::config::ModelConfig;
use crate::error::Error;

pub(crate) const CONFIG: &str = "config.json";
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// Half of the largest head imaginable.
const MAX_ROPE_FACTORS: usize = 1 << 16;
/// Values decoded at a time when all weights are looked through: 256 KB per thread.
const CHECK_VALUES: usize = 1 << 16;

/// Modules outside of the layers: transformers' name, llama.cpp's name.
const OUTER_NAMES: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// Modules of a layer, transformers' name after `model.layers.N.` and llama.cpp's after `blk.N.`.
const LAYER_NAMES: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Where a checkpoint comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointKind {
    HuggingFace,
    Gguf,
}

/// A model on disk, opened: its configuration and its tensors, which stay in the files until they are used.
pub struct Checkpoint {
    pub config: ModelConfig,
    path: PathBuf,
    file_bytes: u64,
    tensors: BTreeMap<String, StoredTensor>,
    source: Source,
}

enum Source {
    HuggingFace { config_json: Value },
    Gguf { metadata: Metadata },
}

struct StoredTensor {
    /// As in the file; more than one part where scales are stored apart.
    parts: Vec<SharedBytes>,
    /// As in the file.
    storage: &'static str,
    /// In transformers' row order.
    matrix: Matrix,
}

impl Checkpoint {
    /// Opens a Hugging Face model directory, a `.gguf` file, or a directory with one `.gguf` file and no other weights.
    ///
    /// Errors: files that cannot be read, are damaged or truncated; models that are not supported; tensors that are missing
    /// or of another shape than the configuration says.
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
        let config = ModelConfig::from_hf_json(&config_json).map_err(|error| error.at(&config_path))?;
        let mut weights = safetensors::open(dir)?;
        let mut tensors = BTreeMap::new();
        let mut missing = Vec::new();
        for (name, shape) in expected_tensors(&config) {
            match weights.tensors.remove(&name) {
                Some(raw) => {
                    let tensor = hugging_face_tensor(&name, &shape, raw, &mut weights.tensors);
                    let tensor = tensor.map_err(|error| error.at(dir))?;
                    tensors.insert(name, tensor);
                }
                None => missing.push(name),
            }
        }
        refuse_missing(&missing).map_err(|error| error.at(dir))?;
        let source = Source::HuggingFace { config_json };
        Ok(Checkpoint { config, path: dir.to_owned(), file_bytes: weights.file_bytes, tensors, source })
    }

    fn open_gguf(path: &Path) -> Result<Checkpoint, Error> {
        Self::from_gguf_bytes(path, map_file(path)?).map_err(|error| error.at(path))
    }

    fn from_gguf_bytes(path: &Path, bytes: SharedBytes) -> Result<Checkpoint, Error> {
        let file_bytes = bytes.len() as u64;
        let file = Gguf::parse(bytes)?;
        let mut unused: BTreeMap<&str, &TensorInfo> =
            file.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let rope_factors = match unused.remove(ROPE_FACTORS) {
            Some(info) => Some(rope_factors_of(info)?),
            None => None,
        };
        let config = ModelConfig::from_gguf(&file, rope_factors)?;

        let mut needed = Vec::new();
        let mut missing = Vec::new();
        for (name, shape) in expected_tensors(&config) {
            let stored_name = gguf_name(&name).unwrap_or_default();
            match unused.remove(stored_name.as_str()) {
                Some(info) => {
                    check_shape(&info.name, info.shape(), &shape)?;
                    needed.push((name, info));
                }
                None => missing.push(stored_name),
            }
        }
        refuse_missing(&missing)?;
        if let Some(tensor) = unused.into_keys().find(|name| !name.ends_with(".attn_rot_embd.weight")) {
            return Err(Error::UnexpectedTensor { tensor: tensor.to_owned() });
        }

        // Only now are the numbers of heads known to fit the file, and safe to allocate by.
        let query_rows = interleaved_rows(config.num_attention_heads, config.head_dim);
        let key_rows = interleaved_rows(config.num_key_value_heads, config.head_dim);
        let mut tensors = BTreeMap::new();
        for (name, info) in needed {
            let row_map = if name.contains(".q_proj.") {
                Some(&query_rows)
            } else if name.contains(".k_proj.") {
                Some(&key_rows)
            } else {
                None
            };
            tensors.insert(name, gguf_tensor(info, row_map)?);
        }
        let source = Source::Gguf { metadata: file.metadata };
        Ok(Checkpoint { config, path: path.to_owned(), file_bytes, tensors, source })
    }

    /// A tensor by its name in transformers, for example "model.layers.0.self_attn.q_proj.weight": `[rows, cols]` in
    /// transformers' order, a vector of n values as `[1, n]`. Copies no weights.
    ///
    /// Errors: a name that the model does not have.
    pub fn tensor(&self, name: &str) -> Result<Matrix, Error> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.matrix.clone()),
            None => Err(Error::UnknownTensor { tensor: name.to_owned() }),
        }
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

    pub fn kind(&self) -> CheckpointKind {
        match self.source {
            Source::HuggingFace { .. } => CheckpointKind::HuggingFace,
            Source::Gguf { .. } => CheckpointKind::Gguf,
        }
    }

    /// Gives back the memory of the weight files, which are mapped: what is used again is read again.
    pub fn release(&self) {
        self.tensors.values().flat_map(|tensor| &tensor.parts).for_each(SharedBytes::release);
    }

    /// Total size of the weight files.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The tokenizer that comes with the model.
    ///
    /// Errors: one that is missing, damaged or not supported.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        let tokenizer = match &self.source {
            Source::HuggingFace { .. } => Tokenizer::from_dir(&self.path)?,
            Source::Gguf { metadata } => Tokenizer::from_gguf(metadata).map_err(|error| error.at(&self.path))?,
        };
        Ok(tokenizer.with_rows(self.config.vocab_size))
    }

    /// The `config.json` to write beside a merged model: the directory's own, or one made from the GGUF header.
    ///
    /// Errors: a GGUF model with rotary factors that transformers cannot express.
    pub fn hf_config_json(&self) -> Result<Value, Error> {
        match &self.source {
            Source::HuggingFace { config_json } => Ok(config_json.clone()),
            Source::Gguf { .. } => self.config.to_hf_json(),
        }
    }

    /// SHA-256, in hexadecimal, over the stored bytes of all tensors in name order, with names, formats and shapes. The same
    /// for the same weights however they are spread over shards; another for every other storage of them.
    pub fn content_hash(&self) -> String {
        let tensors: Vec<(&String, &StoredTensor)> = self.tensors.iter().collect();
        let digest = |tensor: &StoredTensor| -> [u8; 32] {
            tensor.parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(&part[..])).finalize().into()
        };
        let digests: Vec<[u8; 32]> = tensors.par_iter().map(|(_, tensor)| digest(tensor)).collect();
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
    /// Errors: the first such value in name order, whatever the number of threads.
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
        let bad = panels
            .par_iter()
            .map_init(Vec::new, |buffer, (name, matrix, rows)| first_not_finite(name, matrix, rows, buffer))
            .find_map_first(|bad| bad);
        match bad {
            Some(error) => Err(error.at(&self.path)),
            None => Ok(()),
        }
    }

    /// The linear modules an adapter could be put on, layers ascending, each q, k, v, o, gate, up, down, then the head:
    /// (module, input features, output features, has a bias, is the output head).
    pub fn linear_modules(&self) -> Vec<(String, usize, usize, bool, bool)> {
        let config = &self.config;
        let mut modules = Vec::new();
        for layer in 0..config.num_hidden_layers {
            for linear in layer_linears(config) {
                let module = format!("model.layers.{layer}.{}", linear.name);
                modules.push((module, linear.cols, linear.rows, linear.has_bias, false));
            }
        }
        modules.push(("lm_head".to_owned(), config.hidden_size, config.vocab_size, false, true));
        modules
    }
}

/// A linear module of a layer; its weight is `[rows, cols]`.
struct LayerLinear {
    /// After `model.layers.N.`
    name: &'static str,
    rows: usize,
    cols: usize,
    has_bias: bool,
}

fn layer_linears(config: &ModelConfig) -> [LayerLinear; 7] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (query, key_value) = (config.query_size(), config.key_value_size());
    let attention = |name, rows, cols| LayerLinear { name, rows, cols, has_bias: config.attention_bias };
    let mlp = |name, rows, cols| LayerLinear { name, rows, cols, has_bias: config.mlp_bias };
    [
        attention("self_attn.q_proj", query, hidden),
        attention("self_attn.k_proj", key_value, hidden),
        attention("self_attn.v_proj", key_value, hidden),
        attention("self_attn.o_proj", hidden, query),
        mlp("mlp.gate_proj", inner, hidden),
        mlp("mlp.up_proj", inner, hidden),
        mlp("mlp.down_proj", hidden, inner),
    ]
}

/// Names and shapes of the tensors a model of this configuration consists of, in the order transformers declares them.
/// Norms and biases have one dimension. A tied head is not listed.
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..config.num_hidden_layers {
        for linear in layer_linears(config) {
            let module = format!("model.layers.{layer}.{}", linear.name);
            tensors.push((format!("{module}.weight"), vec![linear.rows, linear.cols]));
            if linear.has_bias {
                tensors.push((format!("{module}.bias"), vec![linear.rows]));
            }
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{norm}.weight"), vec![hidden]));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    }
    tensors
}

/// llama.cpp's name of a tensor that transformers names so: "model.layers.3.mlp.up_proj.weight" is "blk.3.ffn_up.weight".
pub fn gguf_name(name: &str) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    let find = |names: &[(&'static str, &'static str)], module: &str| {
        names.iter().find(|(theirs, _)| *theirs == module).map(|&(_, stored)| stored)
    };
    if let Some(stored) = find(&OUTER_NAMES, module) {
        return Some(format!("{stored}.{kind}"));
    }
    let (layer, inner) = module.strip_prefix("model.layers.")?.split_once('.')?;
    find(&LAYER_NAMES, inner).map(|stored| format!("blk.{layer}.{stored}.{kind}"))
}

/// Where llama.cpp stores each row of a q or k projection: row p·d/2 + j of a head of d rows is stored at 2·j + p.
fn interleaved_rows(heads: usize, head_dim: usize) -> Arc<[u32]> {
    let half = head_dim / 2;
    // The configuration's check keeps heads · head_dim below 2^32.
    (0..heads)
        .flat_map(|head| (0..2).flat_map(move |p| (0..half).map(move |j| (head * head_dim + 2 * j + p) as u32)))
        .collect()
}

/// A tensor of a directory; what else belongs to it is taken out of `others`.
fn hugging_face_tensor(
    name: &str,
    shape: &[usize],
    raw: RawTensor,
    others: &mut BTreeMap<String, RawTensor>,
) -> Result<StoredTensor, Error> {
    // First, because packed indices may be stored as if they were floating-point numbers.
    if let Some(FourBitWeight { matrix, parts }) = bitsandbytes::take_weight(name, shape, &raw.bytes, others)? {
        return Ok(StoredTensor { storage: matrix.storage(), parts, matrix });
    }
    let Some(format) = raw.format() else {
        return Err(Error::TensorType { tensor: name.to_owned(), dtype: raw.dtype.to_string() });
    };
    check_shape(name, raw.shape, shape)?;
    let (rows, cols) = rows_and_cols(shape);
    let matrix = matrix(name, format, rows, cols, raw.bytes.clone())?;
    Ok(StoredTensor { parts: vec![raw.bytes], storage: format.name(), matrix })
}

fn gguf_tensor(info: &TensorInfo, row_map: Option<&Arc<[u32]>>) -> Result<StoredTensor, Error> {
    let shape = info.shape();
    let (rows, cols) = rows_and_cols(&shape);
    let stored = matrix(&info.name, info.format, rows, cols, info.bytes.clone())?;
    let matrix = match row_map {
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
    Ok(StoredTensor { parts: vec![info.bytes.clone()], storage: info.format.name(), matrix })
}

fn rope_factors_of(info: &TensorInfo) -> Result<Vec<f32>, Error> {
    match *info.dims {
        [len] if len <= MAX_ROPE_FACTORS => Ok(matrix(&info.name, info.format, 1, len, info.bytes.clone())?.to_f32()),
        _ => Err(retune_formats::Error::GgufHeader {
            found: format!("tensor {} of shape {:?}", info.name, info.shape()),
            expected: "one factor for each pair of a head's dimensions".to_owned(),
        }
        .into()),
    }
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

    /// Every value of every tensor is another number.
    fn tensors(config: &Value) -> Tensors {
        let config = ModelConfig::from_hf_json(config).unwrap();
        let mut next = 0.0;
        expected_tensors(&config)
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
            bytes = bytes.f32_tensor(&gguf_name(name).unwrap(), &dims, &stored);
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
        let reread = ModelConfig::from_hf_json(&ours.hf_config_json().unwrap()).unwrap();
        assert_eq!((reread, theirs.hf_config_json().unwrap()), (ours.config.clone(), config_json()));
    }

    #[test]
    fn linear_modules_come_in_order() {
        let modules = from_bytes(gguf(&tensors(&config_json())).build()).unwrap().linear_modules();
        assert_eq!(modules.len(), 15);
        assert_eq!(modules[0], ("model.layers.0.self_attn.q_proj".to_owned(), 4, 12, true, false));
        assert_eq!(modules[13], ("model.layers.1.mlp.down_proj".to_owned(), 6, 4, false, false));
        assert_eq!(modules[14], ("lm_head".to_owned(), 4, 3, false, true));
    }

    #[test]
    fn rope_factors_are_read_and_are_no_tensor_of_the_model() {
        let bytes = gguf(&tensors(&config_json())).f32_tensor(ROPE_FACTORS, &[3], &[1.0, 2.0, 4.0]);
        let checkpoint = from_bytes(bytes.build()).unwrap();
        assert_eq!(checkpoint.config.rope.scaling, crate::config::RopeScaling::Factors(vec![1.0, 2.0, 4.0]));
        assert!(!checkpoint.has(ROPE_FACTORS));
    }

    #[test]
    fn a_tied_model_ignores_the_head_in_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config_json();
        let with_head = tensors(&config);
        config["tie_word_embeddings"] = json!(true);
        write_model(dir.path(), &config, &with_head);
        assert!(!Checkpoint::open(dir.path()).unwrap().has("lm_head.weight"));
        let tied = from_bytes(gguf(&with_head).without_tensor("output.weight").build()).unwrap();
        assert!(tied.config.tie_word_embeddings && !tied.has("lm_head.weight"));
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

    #[test]
    fn names_map_to_llama_cpp() {
        for (theirs, stored) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.12.self_attn.o_proj.bias", "blk.12.attn_output.bias"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("lm_head.weight", "output.weight"),
        ] {
            assert_eq!(gguf_name(theirs).as_deref(), Some(stored));
        }
        assert_eq!(gguf_name("model.layers.0.other.weight"), None);
        assert_eq!(gguf_name("weight"), None);
    }
}
