//! The errors of this crate: one variant per cause, each saying what was found, what was expected and what to do.

use std::path::PathBuf;

use crate::method::METHODS;

/// Everything that can be wrong with a LoRA configuration or an adapter on disk.
///
/// What is wrong in a configuration begins with the key, so that whoever knows its section or file can put that before it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the configuration is out of its range, or two values contradict each other.
    #[error("{field}: {problem}")]
    Config { field: &'static str, problem: String },

    /// A pattern of the configuration does not compile, or is too costly to run.
    #[error(
        "{field}: `{pattern}` cannot be used as a regular expression (Python's dialect): {reason}; correct or simplify it"
    )]
    Pattern { field: &'static str, pattern: String, reason: String },

    /// The configuration selects no module at all.
    #[error(
        "target_modules: {asked} selects no linear module of this model. {reason} Modules that can be targeted: {available}"
    )]
    NoTarget { asked: String, reason: String, available: String },

    /// One entry of the configuration matches no module.
    #[error("{field}: `{entry}` matches no module of this model. {advice} Modules of this model: {available}")]
    UnknownModule { field: &'static str, entry: String, advice: String, available: String },

    /// A pattern never counts: those before it match first.
    #[error(
        "{field}: `{entry}` has no effect: the first pattern that matches a module counts, and those before it leave none \
         (`{earlier}` takes `{module}`). Put `{entry}` before `{earlier}`, or remove it"
    )]
    ShadowedPattern { field: &'static str, entry: String, earlier: String, module: String },

    /// No module has a bias that the configuration would train.
    #[error("bias: {bias} has no effect: {reason}. {advice}")]
    NoBias { bias: &'static str, reason: String, advice: &'static str },

    /// A module would be trained whole and adapted at the same time.
    #[error(
        "modules_to_save: `{entry}` also matches `{module}`, which target_modules adapts; a module is either saved whole or adapted: \
         name the modules to save more precisely, or take this one out of target_modules"
    )]
    SavedAndAdapted { entry: String, module: String },

    /// A file of the adapter is not there.
    #[error("{path} does not exist. {advice}")]
    MissingFile { path: PathBuf, advice: &'static str },

    /// `adapter_config.json` is not JSON.
    #[error("{path} is not valid JSON: {error}. Copy or save the adapter again")]
    Json { path: PathBuf, error: serde_json::Error },

    /// What a method starts from cannot be read of the base.
    #[error("{0}")]
    Base(String),

    /// Settings that JSON cannot hold.
    #[error("the adapter's settings cannot be written as JSON: {0}")]
    Settings(#[from] serde_json::Error),

    /// A key of `adapter_config.json` has a value that cannot be used.
    #[error("{path}: `{key}`: {problem}")]
    AdapterConfig { path: PathBuf, key: String, problem: String },

    /// The adapter is of another method.
    #[error(
        "{path}: peft_type is {found}; those that can be loaded are {}. Use one of these, or merge this adapter with PEFT",
        peft_types()
    )]
    PeftType { path: PathBuf, found: String },

    /// The tensor file is damaged or is not safetensors.
    #[error("{path} is not a valid safetensors file: {reason}. Download or save the adapter again")]
    Safetensors { path: PathBuf, reason: String },

    /// A tensor has a number type that adapters do not use.
    #[error("{path}: tensor `{name}` is of type {found}; expected F32, F16 or BF16. Save the adapter in one of these")]
    TensorType { path: PathBuf, name: String, found: String },

    /// Two keys of the file mean the same tensor.
    #[error("{path}: the keys `{first}` and `{second}` mean the same tensor; keep one adapter per file")]
    DuplicateTensor { path: PathBuf, first: String, second: String },

    /// A tensor does not fit the base model.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}. {advice}")]
    Shape { name: String, found: Vec<usize>, expected: Vec<usize>, advice: String },

    /// A tensor holds another number of values than its shape says.
    #[error("tensor `{name}` has shape {shape:?} but holds {found} values. Save the adapter again")]
    Length { name: String, shape: Vec<usize>, found: usize },

    /// A tensor holds a NaN or an infinity.
    #[error(
        "tensor `{name}` holds {value} at element {index}; an adapter must be finite: take an earlier checkpoint, or train with a lower learning rate"
    )]
    NotFinite { name: String, index: usize, value: f32 },

    /// The file lacks tensors that its configuration promises for this model.
    #[error(
        "the adapter lacks {keys}. Either the file is incomplete, or this adapter was made for another model: check base_model_name_or_path"
    )]
    MissingTensors { keys: String },

    /// The head of a model that has none of its own.
    #[error(
        "modules_to_save names {head}, but this model's head is its embedding table (tie_word_embeddings); take {head} out of modules_to_save"
    )]
    TiedHeadSaved { head: String },

    /// Dropout where it is not applied.
    #[error("{field} is not applied to an adapter on lm_head; set it to 0, or take lm_head out of target_modules")]
    HeadDropout { field: &'static str },

    /// A trainable tensor that the adapter's file lacks.
    #[error("the adapter has no tensor {name}; its file and its configuration do not belong together: save it again")]
    TensorMissing { name: String },

    /// A tensor of the adapter with another shape than the base needs.
    #[error(
        "the adapter's tensor {name} has the shape {found:?}, this base needs {expected:?}: it was made for another model"
    )]
    TensorShape { name: String, found: Vec<usize>, expected: Vec<usize> },

    /// A tensor of the adapter that nothing of the model uses.
    #[error(
        "the adapter's tensor {name} belongs to nothing in this model: it was made for another model, or by an unknown method"
    )]
    TensorUnknown { name: String },

    /// The file holds another weight of the base than the base has.
    #[error(
        "the adapter holds `{name}`, which is not this base's own {module}: PEFT would load it over the base's; use the base it was saved \
         with, or save the adapter with save_embedding_layers=False"
    )]
    OtherBaseWeight { name: String, module: String },

    /// The file holds tensors that have no place in this model.
    #[error("the adapter holds {keys}, which have no place in this model. {advice}")]
    UnexpectedTensors { keys: String, advice: &'static str },

    /// A setting of a combination, or the adapters themselves, cannot be used.
    #[error("{setting} {problem}")]
    Combination { setting: &'static str, problem: String },

    /// Ranks that differ where A and B of several adapters are added up.
    #[error(
        "{module} has rank {rank} in {first} and rank {other} in {second}, and this kind adds up their A and B; take exact, cat, or a kind \
         that ends in svd"
    )]
    CombinedRanks { module: String, first: String, rank: usize, second: String, other: usize },

    /// An adapter with more than low-rank changes.
    #[error(
        "{adapter} holds {what}, which cannot be combined: only low-rank changes add up; merge this adapter into its base instead"
    )]
    NotCombinable { adapter: String, what: String },

    /// More than changes of weights that low-rank terms hold.
    #[error("it holds {what}: that is no low-rank change of a weight")]
    NotLowRank { what: String },

    /// How much of a change is to be kept cannot be used.
    #[error("{setting} is {found}; expected {expected}")]
    Kept { setting: &'static str, found: f64, expected: String },

    /// A matrix without a singular value decomposition.
    #[error(
        "a matrix of {rows} rows and {cols} columns has no singular value decomposition: its values are too large, or too far apart"
    )]
    Decomposition { rows: usize, cols: usize },

    /// A file that is damaged, or cannot be read or written.
    #[error(transparent)]
    Formats(#[from] retune_formats::Error),
}

/// PEFT's names of the methods there are.
fn peft_types() -> String {
    METHODS.iter().filter_map(|method| method.peft_type).collect::<Vec<_>>().join(", ")
}
