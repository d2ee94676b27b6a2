//! The one error type of this crate. A variant per cause; each text says what was found, what was expected and what to do.

use std::path::PathBuf;

use serde_json::Value;

use crate::data::RowFormat;

/// Everything that can be wrong with a run's configuration and its data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file the operating system does not hand over.
    #[error("cannot read {}: {error}; give the path of a readable file", .path.display())]
    Read { path: PathBuf, error: std::io::Error },

    /// A file that is not text.
    #[error("{}, line {line}: byte {offset} of the file is not UTF-8; save the file as UTF-8", .path.display())]
    NotUtf8 { path: PathBuf, line: usize, offset: usize },

    /// A data file whose kind its name does not tell.
    #[error(
        "{} is not a data file by its name; expected one that ends in .jsonl, .json, .csv, .tsv or .parquet, perhaps with .gz or .zst behind it",
        .path.display()
    )]
    FileKind { path: PathBuf },

    /// A folder that is given as a data file.
    #[error(
        "the folder {} holds no data file; expected files that end in .jsonl, .json, .csv, .tsv or .parquet. Name one of them, or put them there",
        .path.display()
    )]
    EmptyFolder { path: PathBuf },

    /// A file of a kind that is not read, known by how it begins.
    #[error("{} is {what}; {advice}", .path.display())]
    OtherFile { path: PathBuf, what: &'static str, advice: &'static str },

    /// A packed file that cannot be unpacked.
    #[error("{} is packed with {what} and cannot be unpacked: {cause}; fetch it again", .path.display())]
    Unpack { path: PathBuf, what: &'static str, cause: String },

    /// A Parquet file that cannot be decoded.
    #[error("{} cannot be read as Parquet: {cause}; write it again, or as .jsonl", .path.display())]
    Parquet { path: PathBuf, cause: String },

    /// Something of a row that is not read, where reading it would change what is learnt.
    #[error("{}, line {line}: {what} {reason}; remove it{advice}", .path.display())]
    NotRead { path: PathBuf, line: usize, what: String, reason: &'static str, advice: String },

    /// Rows of which each says which of two answers is the better one.
    #[error(
        "{}, line {line}: these are preference rows, an answer that was chosen and one that was rejected, for methods such as DPO that there are none of \
         here; to learn the chosen answers alone, set {mapping}",
        .path.display()
    )]
    PreferenceRows { path: PathBuf, line: usize, mapping: String },

    /// Not one row is left of those that could not be read.
    #[error("none of the rows can be used, {rows} are left out as data.on_bad_row says. The first: {first}")]
    AllSkipped { rows: usize, first: String },

    /// A data file without a row.
    #[error("{} holds no rows; expected at least one", .path.display())]
    NoRows { path: PathBuf },

    /// A data file that does not parse.
    #[error("{}, line {line}: {cause}; expected {expected}", .path.display())]
    Syntax { path: PathBuf, line: usize, cause: String, expected: &'static str },

    /// The columns of the first row tell no format.
    #[error(
        "{}, line {line}: no known format has the columns {found}; expected {expected}. {advice}",
        .path.display()
    )]
    UnknownFormat { path: PathBuf, line: usize, found: String, expected: String, advice: String },

    /// A row without a column that its format needs.
    #[error("{}, line {line}: there is no column {column:?}, the columns are {found}. {advice}", .path.display())]
    MissingColumn { path: PathBuf, line: usize, column: String, found: String, advice: String },

    /// A row of another format than the rows before it.
    #[error(
        "{}, line {line}: this row has the columns of the format {found}, the rows before it those of {expected}; \
         put rows of different formats into different files",
        .path.display()
    )]
    MixedFormats { path: PathBuf, line: usize, expected: RowFormat, found: RowFormat },

    /// A column that holds something else than its format needs.
    #[error("{}, line {line}: column {column} is {found}; expected {expected}", .path.display())]
    ColumnType { path: PathBuf, line: usize, column: String, found: String, expected: &'static str },

    /// What is wrong with one row, and where the row is.
    #[error("{}, line {line}: {error}", .path.display())]
    InRow { path: PathBuf, line: usize, error: Box<Error> },

    /// Conversations for a model that has no form for them.
    #[error(
        "the model has no chat template, which conversations need; use an instruction-tuned model, add chat_template.jinja \
         to the model's directory, or give the data as prompt and completion"
    )]
    NoChatTemplate,

    /// A tokenizer without a token that ends an answer: a model trained with it would never stop.
    #[error(
        "the tokenizer has no end-of-sequence token, so a trained model would never stop; name one as eos_token in the \
         model's tokenizer_config.json"
    )]
    NoEosToken,

    /// A conversation with nothing to learn.
    #[error(
        "the conversation has no turn of the role \"assistant\", its roles are {roles}; remove the row or name the roles user and assistant"
    )]
    NoAssistantTurn { roles: String },

    /// A text for a model whose encoder reads one text and whose decoder writes another.
    #[error(
        "the model's encoder reads a text and its decoder answers it, but a row of plain text answers nothing; give the columns prompt and \
         completion, or input and output"
    )]
    TextWithoutSource,

    /// A conversation for such a model.
    #[error(
        "the model's encoder reads a text and its decoder answers it, so that a conversation is one question and its answer; its roles \
         are {roles}. Give a row for each answer, with what comes before it as the prompt"
    )]
    TurnsOfEncoder { roles: String },

    /// Prompts as targets of such a model.
    #[error(
        "prompts cannot be trained on with this model, whose encoder reads them and whose decoder writes answers alone; leave \
         data.train_on_prompt (or --whole-text) out"
    )]
    PromptOfEncoder,

    /// A chat template that does not let an assistant's turn be told from what is before it.
    #[error(
        "the chat template writes message {turn} differently when other messages stand around it, so the assistant's words cannot \
         be told from the prompt: {found}; give such conversations as prompt and completion, one row per answer, or change the template"
    )]
    TemplateNotIncremental { turn: usize, found: String },

    /// A chat template that does not end an assistant's turn with a token generation stops at.
    #[error(
        "the chat template ends the assistant's turn {turn} with {found:?}, in which there is no end token ({expected}), so a \
         trained model would never stop; name the turn's end as eos_token in tokenizer_config.json or in generation_config.json, or correct the template"
    )]
    TemplateWithoutEos { turn: usize, found: String, expected: String },

    /// A row longer than allowed, where that is to be an error.
    #[error(
        "the row has {tokens} tokens, {key} is {max_length}; raise it, shorten the row, or set data.overlong to truncate or drop"
    )]
    TooLong { tokens: usize, key: &'static str, max_length: usize },

    /// A data set in which no token is a target.
    #[error(
        "{}: none of the {rows} rows has a token to train on within {key} = {max_length}; raise it or shorten the prompts. \
         Line {line} has {tokens} tokens, the part to train between «»: {sample}",
        .path.display()
    )]
    NothingToTrain {
        path: PathBuf,
        rows: usize,
        key: &'static str,
        max_length: usize,
        line: usize,
        tokens: usize,
        sample: String,
    },

    /// A configuration that is not YAML.
    #[error("{origin} is not valid YAML: {cause}")]
    Yaml { origin: String, cause: String },

    /// An override that cannot be applied.
    #[error("the override {text:?} {problem}; expected KEY=VALUE, for example training.epochs=2")]
    Override { text: String, problem: String },

    /// A key that the configuration does not have.
    #[error("unknown key {key}{advice} Keys {place}: {known}")]
    UnknownKey { key: String, advice: String, place: String, known: String },

    /// A key without which there is no run.
    #[error("the key {key} is missing: {meaning}")]
    MissingKey { key: String, meaning: String },

    /// A value of the configuration with a wrong type or outside its range.
    #[error("{key} is {found}; expected {expected}. {advice}")]
    KeyValue { key: String, found: String, expected: String, advice: String },

    /// A configuration whose parts do not fit its types in a way not told apart above.
    #[error("the configuration cannot be read: {cause}; compare it with the schema")]
    Config { cause: String },

    /// The section `adapter` of the configuration.
    #[error("adapter.{0}")]
    AdapterConfig(retune_adapter::Error),

    /// What is wrong with a variant of a comparison's plan.
    #[error("variant {name:?}: {error}")]
    InVariant { name: String, error: Box<Error> },

    /// A loss that is no number. `row` counts from 0, the text from 1.
    #[error(
        "step {step}: the loss is not finite in row {number} of the training data, first at {layer}; start anew with a lower \
         training.learning_rate (--overwrite), or look at the row with `retune data RUN_FILE --rows {number}`",
        number = .row + 1
    )]
    NonFiniteLoss { step: u64, row: u64, layer: String },

    /// A held-out loss that is no number. `row` counts from 0, the text from 1.
    #[error(
        "the loss of held-out row {number} is not finite: the model has diverged or its weights are damaged; start anew with a \
         lower training.learning_rate (--overwrite), or use another copy of the model",
        number = .row + 1
    )]
    NonFiniteEvaluation { row: u64 },

    /// A gradient that is no number.
    #[error(
        "step {step}: the gradient of {tensor} is not finite though the loss is; start anew with a lower \
         training.learning_rate (--overwrite)"
    )]
    NonFiniteGradient { step: u64, tensor: String },

    /// A checkpoint that cannot be read.
    #[error("{} is damaged: {reason}; delete it to go on from the one before", .path.display())]
    CheckpointDamaged { path: PathBuf, reason: String },

    /// The first parameters of a run, which its adapter stands on, cannot be read.
    #[error(
        "{} is damaged: {reason}. The run's adapter stands on what it started from: restore the file, or start anew with --overwrite",
        .path.display()
    )]
    StartDamaged { path: PathBuf, reason: String },

    /// A checkpoint of a run with another model, adapter or length.
    #[error("{} belongs to another run: it holds {found}, this run has {expected}; use another output_dir", .path.display())]
    CheckpointOfAnotherRun { path: PathBuf, found: String, expected: String },

    /// The record of how linears are computed cannot be read, or does not fit.
    #[error(
        "the record of which layers are computed in int8 cannot be used: {cause}; restore it, or start anew with --overwrite"
    )]
    Calibration { cause: String },

    /// A checkpoint that cannot be put together.
    #[error("the checkpoint cannot be written: {error}")]
    Serialize { error: String },

    /// A file of the run that cannot be used.
    #[error("{}: {error}; see that the folder is there, writable and has room", .path.display())]
    Io { path: PathBuf, error: std::io::Error },

    /// A file of the run that cannot be written.
    #[error(transparent)]
    Formats(#[from] retune_formats::Error),

    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] retune_adapter::Error),

    /// A record of how linears are computed that is not of this model.
    #[error(
        "the record of which layers are computed in int8 cannot be used: {0}; restore it, or start anew with --overwrite"
    )]
    Choices(#[from] retune_engine::calibrate::Error),

    /// A tokenizer or a chat template.
    #[error(transparent)]
    Text(#[from] retune_text::Error),

    /// A model.
    #[error(transparent)]
    Model(#[from] retune_model::Error),
}

/// The candidate most similar to `name`, and how similar it is: from 0, nothing in common, to 1, equal.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<(&'a str, f64)> {
    candidates
        .into_iter()
        .map(|candidate| (candidate, strsim::normalized_damerau_levenshtein(name, candidate)))
        // The first of equals, so that the advice is the same every time.
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
}

/// A value as an error text names it, short whatever its size.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing (null)".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => format!("the text {:?}", shortened(text, 60)),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(map) => format!("an object with the keys {}", quoted(map.keys().map(String::as_str))),
    }
}

/// Names in quotation marks, with commas; "none" when there is none.
pub(crate) fn quoted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| format!("{:?}", shortened(name, 60))).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// At most `limit` characters of a text: its start and its end, with an ellipsis for what is between.
pub(crate) fn shortened(text: &str, limit: usize) -> String {
    let count = text.chars().count();
    if count <= limit {
        return text.to_owned();
    }
    let half = limit / 2;
    let start: String = text.chars().take(half).collect();
    let end: String = text.chars().skip(count - half).collect();
    format!("{start}…{end}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_nearest_name_is_the_one_meant() {
        let names = ["learning_rate", "lr_scheduler_type", "epochs"];
        assert_eq!(nearest("learning_rte", names).map(|found| found.0), Some("learning_rate"));
        assert_eq!(nearest("epoch", names).map(|found| found.0), Some("epochs"));
        assert_eq!(nearest("epochs", names).map(|found| found.1), Some(1.0));
        assert_eq!(nearest("x", []), None);
    }

    #[test]
    fn values_of_any_size_are_described_shortly() {
        assert_eq!(describe(&json!(0.5)), "0.5");
        assert_eq!(describe(&json!({"a": 1, "b": 2})), "an object with the keys \"a\", \"b\"");
        assert_eq!(describe(&json!([1, 2])), "a list of 2");
        assert!(describe(&json!("é".repeat(5000))).chars().count() < 100);
        assert_eq!(shortened("abcdefgh", 4), "ab…gh");
        assert_eq!(shortened("abcd", 4), "abcd");
    }
}
