//! The one error type of this crate. A variant per cause; each text says what was found, what was expected and what to do.

use std::path::{Path, PathBuf};

use retune_quant::Format;

/// Everything that can go wrong while reading or writing a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("cannot read {}: {error}", .path.display())]
    Io { path: PathBuf, error: std::io::Error },

    /// Another error, with the file it was found in.
    #[error("{}: {error}", .path.display())]
    InFile { path: PathBuf, error: Box<Error> },

    /// The path holds nothing that can be read as a model.
    #[error("{} is not a model that can be read: {reason}", .path.display())]
    NotAModel { path: PathBuf, reason: String },

    /// A JSON file that does not parse.
    #[error("not valid JSON: {error}; the file is damaged: download it again")]
    Json { error: serde_json::Error },

    /// An element type of a tensor that cannot be read as a weight.
    #[error(
        "tensor {tensor} is stored as {dtype}; weights must be F32, F16 or BF16: use the model's unquantized files or a GGUF file"
    )]
    TensorType { tensor: String, dtype: String },

    /// A field of config.json (or its GGUF counterpart) with an impossible value.
    #[error("{field} is {found}, expected {expected}; correct the model's configuration or download it again")]
    ConfigField { field: String, found: String, expected: String },

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

    /// A tensor that the described model has no use for: running without it would be another model.
    #[error(
        "tensor {tensor} has no place in a {family} model of this configuration, and leaving it out would run another model; weights and configuration belong to different models, or the model is of a kind that is not supported"
    )]
    UnexpectedTensor { tensor: String, family: &'static str },

    /// A model whose head is neither in the files nor the table.
    #[error(
        "tensor {head} is missing, and the configuration says tie_word_embeddings false; the download is incomplete, or tie_word_embeddings should be true"
    )]
    HeadMissing { head: String },

    /// A tensor asked for by a name that the model does not have.
    #[error("the model has no tensor {tensor}")]
    UnknownTensor { tensor: String },

    /// A tensor whose stored bytes were refused.
    #[error("tensor {tensor}: {error}")]
    Tensor { tensor: String, error: retune_quant::Error },

    /// A weight that is NaN or infinite.
    #[error(
        "tensor {tensor} holds {value} at row {row}, column {column}; every weight must be finite: the file is damaged or its training diverged, use another copy"
    )]
    NotFinite { tensor: String, row: usize, column: usize, value: f32 },

    /// The operating system refused to write a file.
    #[error("cannot write {}: {error}", .path.display())]
    Write { path: PathBuf, error: std::io::Error },

    /// A file that is damaged, or cannot be read or written.
    #[error(transparent)]
    Formats(#[from] retune_formats::Error),

    /// The tokenizer or the chat template of a model.
    #[error(transparent)]
    Text(#[from] retune_text::Error),

    /// A directory to write a model into that holds something already.
    #[error("{} is not empty; the result gets a directory of its own: give another name, or remove this one first", .dir.display())]
    OutputNotEmpty { dir: PathBuf },

    /// A model out of which an adapter cannot be taken.
    #[error(
        "{tensor} was trained whole, and the merged model no longer has its original values: take the base that the adapter was merged into"
    )]
    Irreversible { tensor: String },

    /// An adapter that scales, and does not only add.
    #[error(
        "the weights were multiplied by {tensor}, and dividing by it again would not give the original ones: take the base that the adapter \
         was merged into"
    )]
    IrreversibleScale { tensor: String },

    /// A bias that the merged model has no place for.
    #[error(
        "the adapter adds a bias to {module} (lora_bias), which has none in this model, and a merged one could not hold it: keep the adapter \
         beside its base, and give both (--adapter)"
    )]
    NoBias { module: String },

    /// What stands before the tokens, and not on a weight.
    #[error(
        "a soft prompt or a prefix stands before the tokens, and no weight can hold it: keep the adapter beside its base, and give both \
         (--adapter)"
    )]
    SoftPrompt,

    /// A weight that is to be quantized and is.
    #[error(
        "tensor {tensor} is stored as {found} already, and quantizing it again would only add an error: take the model as it is, or quantize \
         its unquantized files"
    )]
    QuantizedAlready { tensor: String, found: &'static str },

    /// A file of quantized weights that is not what it should be.
    #[error("it does not hold the model's quantized weights: {reason}")]
    Quantized { reason: String },

    /// A weight beyond the range of the type it is to be written as.
    #[error(
        "tensor {tensor} would hold {value} at row {row}, column {column}, which {} cannot represent; write f32, or bf16, whose range is nearly the same",
        .format.name().to_lowercase()
    )]
    OutOfRange { tensor: String, row: usize, column: usize, value: f32, format: Format },

    /// A model that llama.cpp's files cannot say.
    #[error("a GGUF file cannot hold this model: {what}; merge into a directory instead, for programs that read those")]
    NoGguf { what: String },
}

impl Error {
    /// This error with the file it was found in.
    pub(crate) fn at(self, path: &Path) -> Error {
        Error::InFile { path: path.to_owned(), error: Box::new(self) }
    }
}
