//! A run's configuration: as a user writes it ([`RawRunConfig`], YAML) and checked, with every default filled in ([`RunConfig`]).
//!
//! The descriptions of the keys are the documentation: they become the JSON schema, against which the file is checked first.
//! A checked configuration written out is itself a valid file that reads back as the same one, so a resumed run decides nothing
//! anew.

pub(crate) mod method;
mod synonyms;
pub(crate) mod tree;

use std::path::{Path, PathBuf};

use retune_adapter::{MethodInfo, by_name};
use retune_model::export::ExportType;
use retune_quant::Encoding;
use schemars::{JsonSchema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::{
    ColumnMap, DataFormat, EncodeOptions, Files, Names, OnBadRow, Overlong, ReadOptions, UnknownColumns, read_text,
};
use crate::error::Error;
use crate::optimizer::OptimizerName;
use crate::schedule::SchedulerType;
pub use method::{MethodName, Settings};

/// More threads or tokens than any machine or model has: what is above is a slip.
pub const MOST_THREADS: usize = 4096;
const MOST_TOKENS: usize = 1 << 24;

/// A fine-tuning run. Relative paths are relative to the directory the run is started in.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RawRunConfig {
    /// The base model: a Hugging Face model directory, a GGUF file, or a Hub id (owner/name or owner/name/file.gguf).
    pub model: String,
    /// The directory that the run writes to: the adapter or the model, checkpoints, metrics.
    pub output_dir: PathBuf,
    /// What is trained.
    #[serde(default)]
    pub method: MethodName,
    /// The settings of the method, in PEFT's terms; its defaults when absent. Not with method full.
    #[serde(default)]
    pub adapter: Option<Value>,
    /// The directory of a PEFT adapter to go on from. Without the section adapter, that adapter's own configuration is used.
    #[serde(default)]
    pub adapter_init: Option<PathBuf>,
    /// How the frozen base model is computed.
    #[serde(default)]
    pub base: BaseConfig,
    /// What is learnt from.
    pub data: DataConfig,
    /// How long, how fast and in what pieces is learnt.
    #[serde(default)]
    pub training: TrainingConfig,
    /// How a fully fine-tuned model is written. An adapter is always f32.
    #[serde(default)]
    pub export: ExportConfig,
    /// Threads to compute with; all of the machine when absent. The result does not depend on it.
    #[serde(default)]
    pub threads: Option<usize>,
}

/// How the frozen base model is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BaseConfig {
    /// The arithmetic of the products with the base model's weights in training. Held-out rows are always scored in f32, as other software
    /// will compute what was trained.
    pub compute: Compute,
    /// Whether what is computed in 8 bits is kept in memory in those, a byte a parameter beside the base as it is stored. It changes no result.
    #[serde(skip_serializing_if = "Int8Copy::is_auto")]
    pub int8_copy: Int8Copy,
    /// How the base model's linears are held in memory, all but the head. Embeddings, norms and biases stay as they are.
    #[serde(skip_serializing_if = "Storage::is_as_is")]
    pub storage: Storage,
}

/// Whether weights that are computed in 8 bits have a copy in those.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum), value(rename_all = "snake_case"))]
pub enum Int8Copy {
    /// Where all that the run takes fits into the memory that is free.
    #[default]
    Auto,
    /// A copy: the fastest.
    Always,
    /// None: each product makes the 8 bits again from the base as it is stored, which takes some time and no memory.
    Never,
}

impl Int8Copy {
    /// Whether nothing is asked for.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// How the base model's linears are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum), value(rename_all = "kebab-case"))]
pub enum Storage {
    /// As the model's files have them, which are mapped.
    #[default]
    AsIs,
    /// In NF4 as bitsandbytes has it, quantized when the run starts: 4.5 bits a parameter.
    Nf4,
    /// In NF4 with double quantization, as QLoRA has it: 4.13 bits a parameter.
    Nf4Double,
    /// In FP4 as bitsandbytes has it: 4.5 bits a parameter.
    Fp4,
    /// In 8 bits a row, as LLM.int8() has it.
    Int8,
}

impl Storage {
    /// What weights are quantized to; nothing where they are left as they are.
    pub fn encoding(self) -> Option<Encoding> {
        match self {
            Storage::AsIs => None,
            Storage::Nf4 => Some(Encoding::NF4),
            Storage::Nf4Double => Some(Encoding::NF4_DOUBLE),
            Storage::Fp4 => Some(Encoding::FP4),
            Storage::Int8 => Some(Encoding::Int8),
        }
    }

    /// Whether weights are left as they are.
    pub fn is_as_is(&self) -> bool {
        *self == Storage::AsIs
    }
}

/// How a fully fine-tuned model is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExportConfig {
    /// The type of its weights on the disk. They are trained in f32 whatever it is, and rounded to the nearest when they are written.
    pub dtype: ExportDtype,
}

impl ExportConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The type of the weights of a written model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExportDtype {
    /// The base model's own; f32 where that is quantized, which leaves no type that trained weights could keep.
    #[default]
    Auto,
    /// 32-bit floating point, as they were trained.
    F32,
    /// bfloat16: half the size, 8 bits of precision.
    Bf16,
    /// 16-bit floating point: half the size, 11 bits of precision, values up to 65504.
    F16,
}

impl ExportDtype {
    /// The type that is asked for, if it is not to be the base model's.
    pub fn given(self) -> Option<ExportType> {
        match self {
            ExportDtype::Auto => None,
            ExportDtype::F32 => Some(ExportType::F32),
            ExportDtype::Bf16 => Some(ExportType::BF16),
            ExportDtype::F16 => Some(ExportType::F16),
        }
    }
}

/// The arithmetic of the products with the base model's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum), value(rename_all = "snake_case"))]
pub enum Compute {
    /// 8-bit integers (of 7 bits on AVX2) where the machine multiplies them clearly faster than f32 and the error measured on the run's own
    /// data is small, layer by layer; f32 elsewhere.
    #[default]
    Auto,
    /// 32-bit floating point.
    F32,
    /// 8-bit integers wherever a weight is frozen, whatever the error.
    Int8,
}

/// What is learnt from, and how rows become tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The file of training rows: .jsonl, .json, .csv, .tsv or .parquet, perhaps packed (.gz, .zst); or a folder of such files, or a list of these.
    pub train: Files,
    /// The file of held-out rows, or a folder of them, never trained on. When absent, `eval_fraction` of the training file is held out.
    #[serde(default)]
    pub eval: Option<Files>,
    /// The part of the training file that is held out when `eval` is absent, at least 0 and below 1; 0 for none. Equal rows are kept on one side.
    #[serde(default = "default_eval_fraction")]
    pub eval_fraction: f64,
    /// How many of the held-out rows are scored, the first ones; all when absent.
    #[serde(default)]
    pub eval_limit: Option<usize>,
    /// What the rows hold; told by their columns when auto.
    #[serde(default)]
    pub format: DataFormat,
    /// The names of the file's columns, where they are not the usual ones.
    #[serde(default)]
    pub columns: ColumnMap,
    /// What is done with columns, and keys of messages, that are not read.
    #[serde(default, skip_serializing_if = "UnknownColumns::is_auto")]
    pub unknown_columns: UnknownColumns,
    /// What is done with a row that cannot be read.
    #[serde(default, skip_serializing_if = "OnBadRow::is_stop")]
    pub on_bad_row: OnBadRow,
    /// Tokens of a row at most.
    #[serde(default = "default_max_length")]
    pub max_length: usize,
    /// What is done with longer rows.
    #[serde(default)]
    pub overlong: Overlong,
    /// Whether the prompts are learnt too, not the answers alone.
    #[serde(default)]
    pub train_on_prompt: bool,
    /// Whether every epoch takes the rows in another order, which depends on the seed; the file's order otherwise.
    #[serde(default = "default_shuffle")]
    pub shuffle: bool,
}

fn default_eval_fraction() -> f64 {
    0.05
}

fn default_max_length() -> usize {
    1024
}

fn default_shuffle() -> bool {
    true
}

impl DataConfig {
    /// A file of rows with every key left to its default.
    pub fn new(train: Files) -> Self {
        DataConfig {
            train,
            eval: None,
            eval_fraction: default_eval_fraction(),
            eval_limit: None,
            format: DataFormat::default(),
            columns: ColumnMap::default(),
            unknown_columns: UnknownColumns::default(),
            on_bad_row: OnBadRow::default(),
            max_length: default_max_length(),
            overlong: Overlong::default(),
            train_on_prompt: false,
            shuffle: default_shuffle(),
        }
    }

    /// The files and folders that rows are read from.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.train).chain(&self.eval).flat_map(Files::paths)
    }

    /// How rows become examples of a model with or without an encoder; messages call settings as `names` says.
    pub fn encode_options(&self, has_encoder: bool, names: &Names) -> EncodeOptions {
        let DataConfig { max_length, overlong, on_bad_row, train_on_prompt, .. } = *self;
        EncodeOptions { max_length, overlong, on_bad_row, train_on_prompt, has_encoder, names: *names }
    }

    /// How files of rows are read; messages call settings as `names` says.
    pub fn read_options<'a>(&'a self, names: &'a Names) -> ReadOptions<'a> {
        let DataConfig { format, columns, unknown_columns, on_bad_row, .. } = self;
        ReadOptions { format: *format, columns, unknown_columns: *unknown_columns, on_bad_row: *on_bad_row, names }
    }

    /// Checks ranges and contradictions.
    ///
    /// # Errors
    /// A value out of range, or a column's name that is of no use, each with what it is called.
    pub fn check(&self, names: &Names) -> Result<(), Error> {
        check_files(names.rows, &self.train, "Name the file of training rows")?;
        if let Some(eval) = &self.eval {
            check_files("data.eval", eval, "Name the file of held-out rows")?;
        }
        let fraction = self.eval_fraction;
        require(
            (0.0..1.0).contains(&fraction),
            "data.eval_fraction",
            fraction,
            "at least 0 and below 1",
            "0.05 holds out a twentieth",
        )?;
        if let Some(limit) = self.eval_limit {
            require(limit > 0, "data.eval_limit", limit, "at least 1", "Remove the key to score all held-out rows")?;
        }
        let length = self.max_length;
        let expected = format!("2 to {MOST_TOKENS}");
        require((2..=MOST_TOKENS).contains(&length), names.max_length, length, &expected, "1024 is usual")?;
        if let Some(column) = self.columns.not_read_by(self.format) {
            return require(
                false,
                &format!("{}{column}", names.column),
                "given",
                &format!("no name for a column that the chosen {} does not read", names.format),
                &format!("Remove it, or choose another {}", names.format),
            );
        }
        Ok(())
    }
}

/// How long, how fast and in what pieces is learnt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingConfig {
    /// How many times the training rows are gone through; need not be whole.
    pub epochs: f64,
    /// Steps of the run, in place of `epochs`.
    pub max_steps: Option<usize>,
    /// Rows of a batch. The last batch of an epoch may be smaller.
    pub batch_size: usize,
    /// Batches whose gradients make one step. The loss is the mean over all label tokens of the step.
    pub gradient_accumulation_steps: usize,
    /// The peak learning rate. When absent the method's own: 2e-4 for LoRA and 2e-5 for full fine-tuning.
    pub learning_rate: Option<f64>,
    /// How the learning rate goes on after the warm-up.
    pub lr_scheduler_type: SchedulerType,
    /// Steps in which the learning rate rises from 0; in place of `warmup_ratio`.
    pub warmup_steps: Option<usize>,
    /// The part of all steps in which the learning rate rises from 0, rounded up.
    pub warmup_ratio: f64,
    /// The optimizer: `adamw`; `adamw_8bit`, with moments in 8 bits, a quarter of its memory; or `adafactor`, next to none, which has no first
    /// moment.
    #[serde(skip_serializing_if = "OptimizerName::is_default")]
    pub optim: OptimizerName,
    /// Decoupled weight decay, on matrices alone.
    pub weight_decay: f64,
    /// AdamW's decay of the mean of gradients.
    pub adam_beta1: f64,
    /// AdamW's decay of the mean of squared gradients.
    pub adam_beta2: f64,
    /// AdamW's term that keeps it from dividing by 0.
    pub adam_epsilon: f64,
    /// The norm that a step's gradient is clipped to; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Steps from one evaluation on the held-out rows to the next; at the end of every epoch when absent.
    pub eval_steps: Option<usize>,
    /// Ends the run before its last step when so many scores of the held-out rows in a row were no better than the best before them. The
    /// learning rate goes on as planned for the whole run until then. Never when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<usize>,
    /// How much lower than the best before it a held-out loss must be to count as better, with `early_stopping_patience`.
    #[serde(skip_serializing_if = "is_zero")]
    pub early_stopping_threshold: f64,
    /// Steps from one checkpoint to the next. The end of the run is always saved.
    pub save_steps: usize,
    /// Checkpoints kept, the latest ones.
    pub save_total_limit: usize,
    /// Where the numbers of every step go beside `metrics.jsonl`.
    #[serde(skip_serializing_if = "ReportTo::is_none")]
    pub report_to: ReportTo,
    /// The seed of everything random: initial weights, order of the rows, the held-out part, dropout.
    pub seed: u64,
    /// Tokens computed at once; memory grows with it, the result does not depend on it beyond rounding. When absent 512 where the base is
    /// computed in int8 and 1280 in f32, fewer where activations would take more than 2 GB, and always enough for the longest row.
    pub tokens_per_pass: Option<usize>,
    /// Whether tokens that rows of a pass begin with in common (the system prompt, the instruction) are computed once for all of them. The
    /// result does not depend on it beyond rounding. Without effect where `adapter.lora_dropout` is set, which treats each row differently.
    pub share_prefixes: bool,
    /// How activations are kept from the forward to the backward pass.
    pub saved_activations: SavedActivations,
    /// What is computed anew in the backward pass to save memory.
    pub activation_checkpointing: ActivationCheckpointing,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        TrainingConfig {
            epochs: 1.0,
            max_steps: None,
            batch_size: 8,
            gradient_accumulation_steps: 1,
            learning_rate: None,
            lr_scheduler_type: SchedulerType::Cosine,
            warmup_steps: None,
            warmup_ratio: 0.03,
            optim: OptimizerName::Adamw,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            eval_steps: None,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            save_steps: 50,
            save_total_limit: 2,
            report_to: ReportTo::None,
            seed: 42,
            tokens_per_pass: None,
            share_prefixes: true,
            saved_activations: SavedActivations::Auto,
            activation_checkpointing: ActivationCheckpointing::None,
        }
    }
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// Where the numbers of every step go beside `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReportTo {
    /// Nowhere.
    #[default]
    None,
    /// To event files in the folder `tensorboard` of the output folder, under transformers' names: `tensorboard --logdir` draws them.
    Tensorboard,
}

impl ReportTo {
    fn is_none(&self) -> bool {
        *self == ReportTo::None
    }
}

/// How activations are kept from the forward to the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SavedActivations {
    /// bf16 where the base is computed in int8, f32 elsewhere.
    #[default]
    Auto,
    /// As they were computed.
    F32,
    /// Rounded, in half the memory.
    Bf16,
}

/// What is computed anew in the backward pass to save memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActivationCheckpointing {
    /// Norms and products only.
    #[default]
    None,
    /// Every layer, from its input: the least memory, about a third more time.
    Layer,
}

/// A checked configuration, in which what depends on the method is decided. Its fields are those of [`RawRunConfig`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunConfig {
    pub model: String,
    pub output_dir: PathBuf,
    pub method: MethodName,
    /// `None` for full fine-tuning, and where the configuration of the adapter at `adapter_init` is to be used.
    pub adapter: Option<Settings>,
    pub adapter_init: Option<PathBuf>,
    pub base: BaseConfig,
    pub data: DataConfig,
    pub training: TrainingConfig,
    #[serde(skip_serializing_if = "ExportConfig::is_default")]
    pub export: ExportConfig,
    pub threads: Option<usize>,
}

impl RunConfig {
    /// Reads and checks a YAML (or JSON) file, with overrides of the form `training.epochs=2`.
    ///
    /// # Errors
    /// A file that cannot be read, is not UTF-8 or not YAML; an unknown key, a wrong type, a value out of range: each with the key's path.
    pub fn load(path: &Path, overrides: &[String]) -> Result<RunConfig, Error> {
        RunConfig::parse(&read_text(path)?, &path.display().to_string(), overrides)
    }

    /// As [`RunConfig::load`], from text; `origin` is what errors call it.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<RunConfig, Error> {
        let mut tree = tree::parse(text, origin)?;
        if tree.is_null() {
            tree = Value::Object(Map::new());
        }
        for text in overrides {
            tree::set(&mut tree, text)?;
        }
        RunConfig::from_tree(tree)
    }

    /// As [`RunConfig::load`], from the keys and values of a file.
    pub(crate) fn from_tree(tree: Value) -> Result<RunConfig, Error> {
        // Which settings there are is the method's to say; a method that is none is told with the other keys.
        let method = tree.get("method").and_then(Value::as_str).map(by_name);
        tree::Schema::new(&schema(Some(method.flatten().unwrap_or(MethodName::default().0)))).check(&tree)?;
        let raw: RawRunConfig =
            serde_json::from_value(tree).map_err(|error| Error::Config { cause: error.to_string() })?;
        raw.check()
    }
}

/// The JSON schema of the configuration file, for editors and as a reference.
pub fn json_schema() -> String {
    format!("{:#}", schema(None))
}

/// The schema with the settings of one method, or of all.
fn schema(method: Option<&MethodInfo>) -> Value {
    let mut generator = SchemaGenerator::default();
    let settings = method::settings_schema(method, &mut generator);
    let mut schema = generator.into_root_schema_for::<RawRunConfig>().to_value();
    if let Some(adapter) = schema.pointer_mut("/properties/adapter").and_then(Value::as_object_mut) {
        let mut rest = std::mem::take(adapter);
        adapter.insert("anyOf".to_owned(), settings);
        adapter.append(&mut rest);
    }
    schema
}

impl RawRunConfig {
    /// Checks ranges and contradictions and fills in what depends on other keys.
    pub fn check(self) -> Result<RunConfig, Error> {
        let RawRunConfig { model, output_dir, method, adapter, adapter_init, base, data, training, export, threads } =
            self;
        require(
            !model.trim().is_empty(),
            "model",
            "empty",
            "a path or a Hub id",
            "Name a Hugging Face model directory, a GGUF file, or a Hub id (owner/name)",
        )?;
        check_path("output_dir", &output_dir, "Name the directory to write to")?;
        let adapter = check_adapter(method, adapter, adapter_init.as_deref())?;
        data.check(&Names::KEYS)?;
        require(
            method.saves_adapter() || base.compute != Compute::Int8,
            "base.compute",
            "int8 with method full",
            "f32 or auto",
            "Weights that are trained are computed in f32; int8 is for the frozen base of an adapter",
        )?;
        require(
            method.saves_adapter() || base.storage.is_as_is(),
            "base.storage",
            "a quantized one with method full",
            "as-is",
            "Weights that are trained are not quantized; quantize the frozen base of an adapter",
        )?;
        require(
            !method.saves_adapter() || export.is_default(),
            "export.dtype",
            "given with a method that saves an adapter",
            "no export",
            "Adapters are f32; the type of a model with the adapter in it is for retune merge --dtype",
        )?;
        if let Some(threads) = threads {
            let expected = format!("1 to {MOST_THREADS}");
            require(
                (1..=MOST_THREADS).contains(&threads),
                "threads",
                threads,
                &expected,
                "Remove the key to use all of the machine",
            )?;
        }
        // An adapter that is trained further brings its settings with it, and what they say of the rate.
        let rate = match (&adapter, &adapter_init) {
            (Some(settings), _) => Some(settings.learning_rate()),
            (None, Some(_)) => None,
            (None, None) => Some(method.learning_rate),
        };
        let training = training.check(rate, &data)?;
        Ok(RunConfig { model, output_dir, method, adapter, adapter_init, base, data, training, export, threads })
    }
}

fn check_adapter(method: MethodName, adapter: Option<Value>, init: Option<&Path>) -> Result<Option<Settings>, Error> {
    const ADVICE: &str = "Remove it, or choose another method";
    if !method.saves_adapter() {
        let with = format!("given with method {}", method.name);
        require(adapter.is_none(), "adapter", &with, "no adapter", ADVICE)?;
        require(init.is_none(), "adapter_init", &with, "no adapter", ADVICE)?;
        return Ok(None);
    }
    if let Some(path) = init {
        check_path("adapter_init", path, "Name the directory of an adapter")?;
    }
    if adapter.is_none() && init.is_some() {
        return Ok(None);
    }
    let settings = adapter.unwrap_or_else(|| Value::Object(Map::new()));
    let adapter = (method.read)(settings).map_err(|error| Error::Config { cause: format!("adapter: {error}") })?;
    adapter.check().map_err(Error::AdapterConfig)?;
    Ok(Some(Settings(adapter)))
}

impl TrainingConfig {
    /// The peak learning rate: the one that is given, which a checked configuration has but for an adapter that is trained further, or the default method's.
    pub fn peak_learning_rate(&self) -> f64 {
        self.learning_rate.unwrap_or(MethodName::default().learning_rate)
    }

    /// Checks ranges and contradictions, and takes the method's learning rate where none is given.
    fn check(self, default_rate: Option<f64>, data: &DataConfig) -> Result<TrainingConfig, Error> {
        let learning_rate = self.learning_rate.or(default_rate);
        self.check_steps()?;
        self.check_early_stopping(data)?;
        self.check_optimizer(learning_rate.unwrap_or(MethodName::default().learning_rate))?;
        let key = "training.tokens_per_pass";
        if let Some(tokens) = self.tokens_per_pass {
            require(tokens <= MOST_TOKENS, key, tokens, &format!("at most {MOST_TOKENS}"), "1024 is usual")?;
            require(
                tokens >= data.max_length,
                key,
                tokens,
                &format!("at least data.max_length, which is {}", data.max_length),
                "A row is computed in one pass: raise it or lower data.max_length",
            )?;
        }
        Ok(TrainingConfig { learning_rate, ..self })
    }

    fn check_steps(&self) -> Result<(), Error> {
        /// Rows of a step and steps of a run: above is a slip.
        const MOST: usize = 1 << 31;
        let epochs = self.epochs;
        require(
            epochs > 0.0 && epochs <= 1e6,
            "training.epochs",
            epochs,
            "above 0 and at most 1000000",
            "1 to 3 are usual",
        )?;
        let counts = [
            ("max_steps", self.max_steps, "Remove the key to train for training.epochs"),
            ("batch_size", Some(self.batch_size), "8 is usual"),
            ("gradient_accumulation_steps", Some(self.gradient_accumulation_steps), "1 is usual"),
            ("eval_steps", self.eval_steps, "Remove the key to evaluate at the end of every epoch"),
            (
                "early_stopping_patience",
                self.early_stopping_patience,
                "3 is usual; remove the key to train to the end whatever the held-out loss",
            ),
            ("save_steps", Some(self.save_steps), "For no checkpoints but the last, give more than the run has steps"),
            ("save_total_limit", Some(self.save_total_limit), "One checkpoint is needed to resume from"),
        ];
        for (key, count, advice) in counts {
            if let Some(count) = count {
                require(
                    (1..=MOST).contains(&count),
                    &format!("training.{key}"),
                    count,
                    &format!("1 to {MOST}"),
                    advice,
                )?;
            }
        }
        let rows = self.batch_size.checked_mul(self.gradient_accumulation_steps);
        require(
            rows.is_some_and(|rows| rows <= MOST),
            "training.batch_size",
            self.batch_size,
            "fewer rows in a step",
            "training.batch_size times training.gradient_accumulation_steps is too large",
        )
    }

    fn check_early_stopping(&self, data: &DataConfig) -> Result<(), Error> {
        let (patience, threshold) = (self.early_stopping_patience, self.early_stopping_threshold);
        let key = "training.early_stopping_threshold";
        let size = 0.0..f64::INFINITY;
        require(size.contains(&threshold), key, threshold, "at least 0", "0 takes every gain for one")?;
        let Some(patience) = patience else {
            let advice =
                "Set it to the number of scores without a gain after which the run ends, or remove the threshold";
            return require(threshold == 0.0, key, threshold, "a training.early_stopping_patience with it", advice);
        };
        require(
            data.eval.is_some() || data.eval_fraction > 0.0,
            "training.early_stopping_patience",
            patience,
            "held-out rows to stop by",
            "Set data.eval or data.eval_fraction, or remove the key",
        )
    }

    /// The same for a run without held-out rows, which has nothing to stop by.
    pub fn without_early_stopping(self) -> TrainingConfig {
        TrainingConfig { early_stopping_patience: None, early_stopping_threshold: 0.0, ..self }
    }

    fn check_optimizer(&self, learning_rate: f64) -> Result<(), Error> {
        let part = 0.0..1.0;
        let size = 0.0..f64::INFINITY;
        let advice = "Usual are 2e-4 for LoRA and 2e-5 for full fine-tuning";
        require(
            size.contains(&learning_rate) && learning_rate > 0.0,
            "training.learning_rate",
            learning_rate,
            "above 0",
            advice,
        )?;
        let ratio = self.warmup_ratio;
        require((0.0..=1.0).contains(&ratio), "training.warmup_ratio", ratio, "0 to 1", "0.03 is usual")?;
        let decay = self.weight_decay;
        require(size.contains(&decay), "training.weight_decay", decay, "at least 0", "0 to 0.1 are usual")?;
        let norm = self.max_grad_norm;
        require(
            size.contains(&norm),
            "training.max_grad_norm",
            norm,
            "at least 0",
            "1 is usual, 0 switches clipping off",
        )?;
        require(
            self.activation_checkpointing == ActivationCheckpointing::None
                || self.saved_activations != SavedActivations::Bf16,
            "training.saved_activations",
            "bf16",
            "auto or f32 with training.activation_checkpointing: layer",
            "layers are run again from inputs kept in f32, so that nothing else is saved",
        )?;
        let (beta1, beta2) = (self.adam_beta1, self.adam_beta2);
        let usual = Self::default();
        if self.optim == OptimizerName::Adafactor {
            for (key, value, default) in [
                ("training.adam_beta1", beta1, usual.adam_beta1),
                ("training.adam_beta2", beta2, usual.adam_beta2),
                ("training.adam_epsilon", self.adam_epsilon, usual.adam_epsilon),
            ] {
                let advice = "Adafactor has none: its decay grows with the steps";
                require(value == default, key, value, "nothing with training.optim: adafactor", advice)?;
            }
        }
        require(
            part.contains(&beta1) && (beta1 as f32) < 1.0,
            "training.adam_beta1",
            beta1,
            "at least 0 and below 1",
            "0.9 is usual",
        )?;
        require(
            part.contains(&beta2) && (beta2 as f32) < 1.0,
            "training.adam_beta2",
            beta2,
            "at least 0 and below 1",
            "0.999 is usual",
        )?;
        let epsilon = self.adam_epsilon;
        require(
            size.contains(&epsilon) && epsilon as f32 > 0.0,
            "training.adam_epsilon",
            epsilon,
            "above 0",
            "1e-8 is usual",
        )
    }
}

fn check_path(key: &str, path: &Path, advice: &str) -> Result<(), Error> {
    require(!path.as_os_str().is_empty(), key, "empty", "a path", advice)
}

fn check_files(key: &str, files: &Files, advice: &str) -> Result<(), Error> {
    require(!files.paths().is_empty(), key, "an empty list", "a path", advice)?;
    files.paths().iter().try_for_each(|path| check_path(key, path, advice))
}

fn require(holds: bool, key: &str, found: impl ToString, expected: &str, advice: &str) -> Result<(), Error> {
    if holds {
        return Ok(());
    }
    let (key, found) = (key.to_owned(), found.to_string());
    Err(Error::KeyValue { key, found, expected: expected.to_owned(), advice: advice.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_adapter::LoraConfig;

    const LEAST: &str = "model: m\noutput_dir: out\ndata:\n  train: rows.jsonl\n";

    fn parse(overrides: &[&str]) -> Result<RunConfig, Error> {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        RunConfig::parse(LEAST, "run.yaml", &overrides)
    }

    /// The settings of a run with LoRA.
    fn lora(config: &RunConfig) -> LoraConfig {
        serde_json::from_value(serde_json::to_value(&config.adapter).unwrap()).unwrap()
    }

    fn error(overrides: &[&str]) -> String {
        parse(overrides).unwrap_err().to_string()
    }

    #[test]
    fn the_least_file_gets_the_documented_defaults() {
        let config = parse(&[]).unwrap();
        assert_eq!((config.method, config.base.compute, config.threads), (MethodName::default(), Compute::Auto, None));
        assert_eq!(lora(&config), LoraConfig::default());
        assert_eq!(config.adapter_init, None);
        let DataConfig {
            train,
            eval,
            eval_fraction,
            eval_limit,
            format,
            columns,
            unknown_columns,
            on_bad_row,
            max_length,
            overlong,
            train_on_prompt,
            shuffle,
        } = config.data;
        assert_eq!((unknown_columns, on_bad_row), (UnknownColumns::Auto, OnBadRow::Stop));
        assert_eq!((train, eval, eval_fraction, eval_limit), (Files::from("rows.jsonl"), None, 0.05, None));
        assert_eq!((format, columns), (DataFormat::Auto, ColumnMap::default()));
        assert_eq!((max_length, overlong, train_on_prompt, shuffle), (1024, Overlong::Truncate, false, true));
        let training = config.training;
        assert_eq!((training.epochs, training.max_steps, training.batch_size), (1.0, None, 8));
        assert_eq!((training.learning_rate, training.lr_scheduler_type), (Some(2e-4), SchedulerType::Cosine));
        assert_eq!((training.warmup_steps, training.warmup_ratio, training.weight_decay), (None, 0.03, 0.0));
        assert_eq!((training.adam_beta1, training.adam_beta2, training.adam_epsilon), (0.9, 0.999, 1e-8));
        assert_eq!((training.max_grad_norm, training.eval_steps), (1.0, None));
        assert_eq!((training.save_steps, training.save_total_limit, training.seed), (50, 2, 42));
        assert_eq!((training.gradient_accumulation_steps, training.tokens_per_pass), (1, None));
        assert_eq!(training.activation_checkpointing, ActivationCheckpointing::None);
    }

    #[test]
    fn a_whole_file_is_read() {
        let text = r#"
# A run.
model: models/smollm2
output_dir: runs/one
adapter:
  r: 8
  target_modules: [q_proj, v_proj]
  rank_pattern: {"layers.0.self_attn.q_proj": 4}
data:
  train: rows.csv
  format: prompt_completion
  columns: {prompt: question, completion: answer}
  max_length: 2048
  overlong: drop
training:
  epochs: 2
  learning_rate: 1e-3
  lr_scheduler_type: linear
  activation_checkpointing: layer
threads: 2
"#;
        let config =
            RunConfig::parse(text, "run.yaml", &["training.epochs=0.5".to_owned(), "adapter.lora_alpha=16".to_owned()])
                .unwrap();
        let adapter = lora(&config);
        assert_eq!((adapter.r, adapter.lora_alpha), (8, 16.0));
        assert_eq!(config.data.columns.completion.as_deref(), Some("answer"));
        assert_eq!((config.training.epochs, config.training.learning_rate), (0.5, Some(1e-3)));
        assert_eq!(config.training.tokens_per_pass, None);
        assert_eq!((config.data.overlong, config.threads), (Overlong::Drop, Some(2)));
    }

    #[test]
    fn a_checked_configuration_reads_back_as_itself() {
        let cases: [&[&str]; 5] = [
            &[],
            &["method=full", "training.warmup_steps=0"],
            &["method=full", "export.dtype=bf16"],
            &["adapter_init=runs/a/adapter"],
            &[
                "adapter={r: 4, layers_to_transform: [1, 2], target_modules: [q_proj], alpha_pattern: {q_proj: 0.1}}",
                "data.eval=e.csv",
                "training.early_stopping_patience=3",
                "training.early_stopping_threshold=0.01",
                "training.report_to=tensorboard",
            ],
        ];
        for overrides in cases {
            let config = parse(overrides).unwrap();
            let written = serde_json::to_string_pretty(&config).unwrap();
            assert_eq!(RunConfig::parse(&written, "config.json", &[]).unwrap(), config, "{written}");
        }
    }

    #[test]
    fn what_depends_on_the_method_is_decided_by_it() {
        let full = parse(&["method=full"]).unwrap();
        assert_eq!((full.training.learning_rate, full.adapter), (Some(2e-5), None));
        assert_eq!(parse(&["method=full", "training.learning_rate=1e-5"]).unwrap().training.learning_rate, Some(1e-5));
        assert!(error(&["method=full", "adapter.r=8"]).contains("adapter is given with method full"));
        assert!(error(&["method=full", "adapter_init=a"]).contains("adapter_init is given with method full"));
        assert_eq!(parse(&["adapter_init=a"]).unwrap().adapter, None);
        assert_eq!(lora(&parse(&["adapter_init=a", "adapter.r=8"]).unwrap()).r, 8);
    }

    #[test]
    fn data_is_checked_in_the_callers_words() {
        const FLAGS: Names = Names {
            rows: "--data",
            columns: "--columns",
            column: "--columns ",
            format: "--format",
            max_length: "--max-length",
            overlong: None,
            unknown_columns: None,
        };
        let new = || DataConfig::new(Files::from("rows.jsonl"));
        assert_eq!(new(), parse(&[]).unwrap().data, "what is left out has the documented defaults");
        let error = |data: DataConfig| data.check(&FLAGS).unwrap_err().to_string();
        let short = error(DataConfig { max_length: 1, ..new() });
        assert!(short.starts_with("--max-length is 1; expected 2 to"), "{short}");
        assert!(error(DataConfig::new(Files::from(""))).starts_with("--data is empty; expected a path"));
        let mut columns = ColumnMap::default();
        assert_eq!(columns.set("prompt", "query", &FLAGS).unwrap(), None);
        assert_eq!(columns.set("prompt", "question", &FLAGS).unwrap().as_deref(), Some("query"));
        assert_eq!(columns.prompt.as_deref(), Some("question"));
        let unread = error(DataConfig { columns: columns.clone(), format: DataFormat::Text, ..new() });
        assert!(
            unread.starts_with("--columns prompt is given; expected no name for a column that the chosen --format"),
            "{unread}"
        );
        assert!(unread.ends_with("choose another --format"), "{unread}");
        let unknown = columns.set("promt", "q", &FLAGS).unwrap_err().to_string();
        assert!(
            unknown.starts_with("unknown key --columns promt; did you mean --columns prompt? Keys of --columns:"),
            "{unknown}"
        );
        // Every column can be set, and each is its own.
        for column in
            ["messages", "prompt", "completion", "instruction", "input", "output", "text", "system", "tools", "history"]
        {
            let mut one = ColumnMap::default();
            one.set(column, "name", &FLAGS).unwrap();
            assert_eq!(serde_json::to_value(&one).unwrap()[column], "name");
        }
    }

    #[test]
    fn the_record_of_a_run_reads_as_it_always_did() {
        // What run.json held before training keys stood in one struct.
        let text = r#"{"model":"m","output_dir":"out","method":"full","adapter":null,"adapter_init":null,"base":{"compute":"auto"},
            "data":{"train":"rows.jsonl","eval":null,"eval_fraction":0.05,"eval_limit":null,"format":"auto","columns":{"messages":null,
            "prompt":null,"completion":null,"instruction":null,"input":null,"output":null,"text":null},"max_length":1024,
            "overlong":"truncate","train_on_prompt":false,"shuffle":true},"training":{"epochs":1.0,"max_steps":null,"batch_size":8,
            "gradient_accumulation_steps":1,"learning_rate":2e-05,"lr_scheduler_type":"cosine","warmup_steps":null,"warmup_ratio":0.03,
            "weight_decay":0.0,"adam_beta1":0.9,"adam_beta2":0.999,"adam_epsilon":1e-08,"max_grad_norm":1.0,"eval_steps":null,
            "save_steps":50,"save_total_limit":2,"seed":42,"tokens_per_pass":null,"share_prefixes":true,"saved_activations":"auto",
            "activation_checkpointing":"none"},"threads":null}"#;
        let record: Value = serde_json::from_str(text).unwrap();
        let now = serde_json::to_value(parse(&["method=full"]).unwrap()).unwrap();
        assert_eq!(now, record);
        let keys = |value: &Value| value["training"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&now), keys(&record), "the order of the keys");
        assert_eq!(RunConfig::parse(text, "run.json", &[]).unwrap(), parse(&["method=full"]).unwrap());
    }

    #[test]
    fn mistakes_are_named_by_the_keys_path() {
        let unknown = error(&["training.learning_rte=1"]);
        assert!(
            unknown.contains("unknown key training.learning_rte; did you mean training.learning_rate?"),
            "{unknown}"
        );
        assert!(error(&["learning_rate=1"]).contains("did you mean training.learning_rate?"));
        assert!(error(&["adapter.lora_r=1"]).contains("unknown key adapter.lora_r"));
        assert!(error(&["adapter.target_module=[q_proj]"]).contains("did you mean adapter.target_modules?"));
        assert!(
            error(&["training.batch_size=eight"])
                .contains("training.batch_size is the text \"eight\"; expected a whole number")
        );
        assert!(error(&["training.batch_size=1.5"]).contains("expected a whole number"));
        assert!(error(&["training.seed=-1"]).contains("training.seed is -1; expected a number of at least 0"));
        assert!(
            error(&["data.train_on_prompt=yes"])
                .contains("data.train_on_prompt is the text \"yes\"; expected true or false")
        );
        assert!(
            error(&["training.lr_scheduler_type=cosin"])
                .contains("one of linear, cosine, constant. Did you mean cosine?")
        );
        assert!(error(&["training.report_to=wandb"]).contains("one of none, tensorboard"));
        assert!(error(&["base.compute=int4"]).contains("base.compute is the text \"int4\"; expected"));
        assert!(error(&["base.compute=int8", "method=full"]).contains("frozen base"));
        assert!(
            error(&["base.storage=nf4", "method=full"]).contains("base.storage is a quantized one with method full")
        );
        assert!(error(&["export.dtype=int8", "method=full"]).contains("export.dtype is the text \"int8\"; expected"));
        assert!(error(&["export.dtype=f16"]).contains("export.dtype is given with a method that saves an adapter"));
        assert!(error(&["base.storage=int4"]).contains("base.storage is the text \"int4\"; expected"));
        assert!(error(&["adapter.target_modules=5"]).contains("adapter.target_modules is 5"));
        assert!(error(&["adapter.rank_pattern={a: x}"]).contains("adapter.rank_pattern.a is the text \"x\""));
        assert!(error(&["training="]).contains("training is nothing (null); expected a section with keys"));
        let missing = RunConfig::parse("", "run.yaml", &[]).unwrap_err().to_string();
        assert!(missing.contains("the key model is missing: The base model"), "{missing}");
        assert!(missing.contains("Hub id"), "{missing}");
        let missing = RunConfig::parse("model: m\noutput_dir: o\ndata: {}", "run.yaml", &[]).unwrap_err().to_string();
        assert!(missing.contains("the key data.train is missing: The file of training rows"), "{missing}");
        assert!(
            RunConfig::parse("- a", "run.yaml", &[]).unwrap_err().to_string().contains("expected a section with keys")
        );
        assert!(RunConfig::load(Path::new("absent.yaml"), &[]).unwrap_err().to_string().contains("absent.yaml"));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (setting, expected) in [
            ("model=''", "model is empty; expected a path or a Hub id"),
            ("output_dir=''", "output_dir is empty"),
            ("data.train=''", "data.train is empty"),
            ("adapter.r=0", "adapter.r: a rank of 0"),
            ("adapter.lora_dropout=1", "adapter.lora_dropout"),
            ("data.eval_fraction=1", "data.eval_fraction is 1;"),
            ("data.eval_fraction=-0.1", "data.eval_fraction is -0.1;"),
            ("data.max_length=1", "data.max_length is 1; expected 2 to"),
            ("training.epochs=0", "training.epochs is 0; expected above 0"),
            ("training.max_steps=0", "training.max_steps is 0; expected 1 to 2147483648. Remove the key"),
            ("training.batch_size=0", "training.batch_size is 0"),
            ("training.gradient_accumulation_steps=0", "training.gradient_accumulation_steps is 0"),
            ("training.eval_steps=0", "training.eval_steps is 0"),
            ("training.save_steps=0", "training.save_steps is 0"),
            ("training.early_stopping_patience=0", "training.early_stopping_patience is 0; expected 1 to"),
            ("training.early_stopping_threshold=-1", "training.early_stopping_threshold is -1; expected at least 0"),
            (
                "training.early_stopping_threshold=0.1",
                "training.early_stopping_threshold is 0.1; expected a training.early_stopping_patience with it",
            ),
            ("training.save_total_limit=0", "training.save_total_limit is 0"),
            ("training.learning_rate=0", "training.learning_rate is 0; expected above 0"),
            ("training.warmup_ratio=1.5", "training.warmup_ratio is 1.5; expected 0 to 1"),
            ("training.weight_decay=-1", "training.weight_decay is -1"),
            ("training.adam_beta1=1", "training.adam_beta1 is 1"),
            ("training.adam_beta2=1", "training.adam_beta2 is 1"),
            ("training.adam_epsilon=0", "training.adam_epsilon is 0"),
            ("training.max_grad_norm=-1", "training.max_grad_norm is -1"),
            (
                "training.tokens_per_pass=512",
                "training.tokens_per_pass is 512; expected at least data.max_length, which is 1024",
            ),
            ("training.learning_rate=.inf", "not valid YAML"),
            ("threads=0", "threads is 0; expected 1 to"),
        ] {
            let error = error(&[setting]);
            assert!(error.contains(expected), "{setting}: {error}");
        }
        let without_rows = error(&["training.early_stopping_patience=2", "data.eval_fraction=0"]);
        assert!(without_rows.contains("patience is 2; expected held-out rows to stop by"), "{without_rows}");
        let stopped = ["training.early_stopping_patience=2", "training.early_stopping_threshold=0.1"];
        assert_eq!(parse(&stopped).unwrap().training.without_early_stopping(), parse(&[]).unwrap().training);
        let product = error(&["training.batch_size=1000000000", "training.gradient_accumulation_steps=1000000000"]);
        assert!(product.contains("is too large"), "{product}");
        let saved = |kind: &str| {
            parse(&[&format!("training.saved_activations={kind}"), "training.activation_checkpointing=layer"])
        };
        assert!(saved("auto").is_ok() && saved("f32").is_ok());
        let saved = saved("bf16").unwrap_err().to_string();
        assert!(saved.contains("training.saved_activations is bf16; expected auto or f32 with"), "{saved}");
        let column = error(&["data.format=text", "data.columns.prompt=question"]);
        assert!(column.contains("data.columns.prompt is given"), "{column}");
        assert_eq!(parse(&["training.max_grad_norm=0"]).unwrap().training.max_grad_norm, 0.0);
    }

    #[test]
    fn a_file_that_is_not_utf8_is_refused_with_what_to_do() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"model: m\noutput_dir: caf\xe9\n").unwrap();
        let error = RunConfig::load(file.path(), &[]).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("save the file as UTF-8"), "{error}");
    }

    #[test]
    fn every_key_is_described() {
        let schema: Value = serde_json::from_str(&json_schema()).unwrap();
        let definitions = schema["$defs"].as_object().unwrap().iter();
        let mut described = 0;
        for (name, definition) in
            definitions.map(|(name, definition)| (name.as_str(), definition)).chain([("RawRunConfig", &schema)])
        {
            for (key, property) in definition["properties"].as_object().into_iter().flatten() {
                assert!(
                    property["description"].as_str().is_some_and(|text| text.len() > 10),
                    "{name}.{key} has no description"
                );
                described += 1;
            }
        }
        assert!(described > 50, "{described}");
    }

    #[test]
    fn the_schema_in_the_repository_is_this_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../schema/run_config.schema.json");
        let stored = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            stored.trim_end() == json_schema(),
            "the keys changed: run `retune schema > schema/run_config.schema.json` and commit it"
        );
    }
}
