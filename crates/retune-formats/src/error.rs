//! The one error type of this crate. A variant per cause; each text says what was found, what was expected and what to do.

use std::path::{Path, PathBuf};

/// Everything that can go wrong while reading or writing a file of one of the formats.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read a file.
    #[error("cannot read {}: {error}", .path.display())]
    Read { path: PathBuf, error: std::io::Error },

    /// The operating system refused something else with a file.
    #[error("cannot {action} {}: {error}; check the path, its permissions and the room on the disk", .path.display())]
    Io { action: &'static str, path: PathBuf, error: std::io::Error },

    /// A rename would replace what is no plain file.
    #[error("cannot write {}: it exists and is no plain file; give another name", .path.display())]
    NotAPlainFile { path: PathBuf },

    /// Another error, with the file it was found in.
    #[error("{}: {error}", .path.display())]
    InFile { path: PathBuf, error: Box<Error> },

    /// The path holds nothing that can be read as a model.
    #[error("{} is not a model that can be read: {reason}", .path.display())]
    NotAModel { path: PathBuf, reason: String },

    /// A JSON file that does not parse.
    #[error("not valid JSON: {error}; the file is damaged: download it again")]
    Json { error: serde_json::Error },

    /// A file that is larger than anything of its kind.
    #[error(
        "{bytes} bytes, where at most {limit} are expected of such a file; it is damaged or something else: download it again"
    )]
    FileTooLarge { bytes: u64, limit: u64 },

    /// A file shorter than its own header says.
    #[error("{what} ends at byte {needs} but the file has {has} bytes: it is truncated or damaged; download it again")]
    Truncated { what: String, needs: u64, has: u64 },

    /// A GGUF file that does not start with its magic number.
    #[error(
        "not a GGUF file: it starts with \"{found}\" instead of \"GGUF\"; give a .gguf file or a Hugging Face model directory"
    )]
    GgufMagic { found: String },

    /// A GGUF version this crate cannot read.
    #[error(
        "GGUF version {found} is not supported, only 2 and 3 are; convert the model again with a current llama.cpp"
    )]
    GgufVersion { found: u32 },

    /// A GGUF file written for big-endian machines.
    #[error(
        "a big-endian GGUF file; only little-endian ones are supported: convert the model again without --bigendian"
    )]
    GgufBigEndian,

    /// One part of a model that is split over several GGUF files.
    #[error(
        "one of {count} parts of a split GGUF model, which are not read; join them first: llama-gguf-split --merge <first part> <output>"
    )]
    GgufSplit { count: u64 },

    /// A GGUF header that contradicts itself or the format.
    #[error("invalid GGUF header: {found}, expected {expected}; the file is damaged: download or convert it again")]
    GgufHeader { found: String, expected: String },

    /// A metadata key with a value of another type than its meaning needs.
    #[error(
        "GGUF metadata {key:?} holds {found}, expected {expected}; convert the model again with a current llama.cpp"
    )]
    GgufValue { key: String, found: String, expected: &'static str },

    /// A metadata key the model cannot do without.
    #[error("GGUF metadata {key:?} is missing; convert the model again with a current llama.cpp")]
    GgufMissingKey { key: String },

    /// A safetensors header that does not parse or contradicts itself.
    #[error("invalid safetensors header: {reason}; the file is damaged: download it again")]
    SafetensorsHeader { reason: String },

    /// An element type of a tensor that cannot be read as a weight.
    #[error(
        "tensor {tensor} is stored as {dtype}; weights must be F32, F16 or BF16: use the model's unquantized files or a GGUF file"
    )]
    TensorType { tensor: String, dtype: String },

    /// The description of a weight in 4 bits that does not parse or lacks something.
    #[error(
        "tensor {tensor}, which describes a weight stored by bitsandbytes, is not valid: {reason}; the file is damaged or of an unknown version of bitsandbytes: download it again, or use the model's unquantized files"
    )]
    QuantState { tensor: String, reason: String },

    /// A shard index that does not fit the files beside it.
    #[error("the shard index {reason}; download the model again, with all its files")]
    ShardIndex { reason: String },

    /// Something well-formed that is not implemented.
    #[error("{what} {found} is not supported; supported: {supported}")]
    Unsupported { what: &'static str, found: String, supported: &'static str },

    /// Tensors the configuration needs are not in the files.
    #[error(
        "{count} tensor(s) that the configuration needs are missing, first of them {first}; the download is incomplete or the configuration belongs to another model"
    )]
    MissingTensors { count: usize, first: String },

    /// A tensor whose shape contradicts the configuration.
    #[error(
        "tensor {tensor} has shape {found:?}, the configuration needs {expected:?}; weights and configuration belong to different models"
    )]
    TensorShape { tensor: String, found: Vec<usize>, expected: Vec<usize> },

    /// A tensor whose stored bytes were refused.
    #[error("tensor {tensor}: {error}")]
    Tensor { tensor: String, error: retune_quant::Error },
}

impl Error {
    /// This error with the file it was found in.
    pub fn at(self, path: &Path) -> Error {
        Error::InFile { path: path.to_owned(), error: Box::new(self) }
    }
}
