//! What the columns of a file mean: formats of rows, the names of their columns, and what other programs call them.
//!
//! Nothing is guessed past what the columns say: where two columns could be the answer, neither is taken.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::names::Names;
use crate::error::{Error, nearest, quoted};

/// What the rows of a data file hold, as a configuration says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum), value(rename_all = "snake_case"))]
pub enum DataFormat {
    /// Told by the columns of the first row.
    #[default]
    Auto,
    /// Conversations: a column `messages`, a list of {role, content}. Every assistant turn is trained.
    Messages,
    /// Columns `prompt` and `completion`, joined as they are; the completion is trained.
    PromptCompletion,
    /// Columns `instruction`, `output` and perhaps `input`, put through the chat template; the output is trained.
    Alpaca,
    /// Columns `input` and `output`, joined as they are or, with an encoder, read and answered; the output is trained.
    InputOutput,
    /// A column `text`, all of which is trained.
    Text,
}

/// What the rows of a data file hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    Messages,
    PromptCompletion,
    Alpaca,
    InputOutput,
    Text,
}

impl DataFormat {
    pub(super) fn chosen(self) -> Option<RowFormat> {
        match self {
            DataFormat::Auto => None,
            DataFormat::Messages => Some(RowFormat::Messages),
            DataFormat::PromptCompletion => Some(RowFormat::PromptCompletion),
            DataFormat::Alpaca => Some(RowFormat::Alpaca),
            DataFormat::InputOutput => Some(RowFormat::InputOutput),
            DataFormat::Text => Some(RowFormat::Text),
        }
    }
}

impl RowFormat {
    /// In the order in which they are tried: alpaca files often have a column `text` besides, which repeats the others.
    pub(super) const ALL: [RowFormat; 5] =
        [RowFormat::Messages, RowFormat::PromptCompletion, RowFormat::Alpaca, RowFormat::InputOutput, RowFormat::Text];

    /// The columns without which a row is not of this format.
    pub(super) fn required(self) -> &'static [&'static str] {
        match self {
            RowFormat::Messages => &["messages"],
            RowFormat::PromptCompletion => &["prompt", "completion"],
            RowFormat::Alpaca => &["instruction", "output"],
            RowFormat::InputOutput => &["input", "output"],
            RowFormat::Text => &["text"],
        }
    }

    /// The columns that a row of this format may have besides.
    pub(super) fn optional(self) -> &'static [&'static str] {
        match self {
            // Of prompts that are lists of messages.
            RowFormat::Messages | RowFormat::PromptCompletion => &["system", "tools"],
            RowFormat::Alpaca => &["input", "system", "tools", "history"],
            RowFormat::InputOutput | RowFormat::Text => &[],
        }
    }

    /// Whether this format reads the column.
    fn reads(self, column: &str) -> bool {
        self.required().contains(&column) || self.optional().contains(&column)
    }
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RowFormat::Messages => "messages",
            RowFormat::PromptCompletion => "prompt_completion",
            RowFormat::Alpaca => "alpaca",
            RowFormat::InputOutput => "input_output",
            RowFormat::Text => "text",
        })
    }
}

/// The names of a file's columns where they are not the usual ones.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ColumnMap {
    /// The file's name for the column `messages`.
    pub messages: Option<String>,
    /// The file's name for the column `prompt`.
    pub prompt: Option<String>,
    /// The file's name for the column `completion`.
    pub completion: Option<String>,
    /// The file's name for the column `instruction`.
    pub instruction: Option<String>,
    /// The file's name for the column `input`.
    pub input: Option<String>,
    /// The file's name for the column `output`.
    pub output: Option<String>,
    /// The file's name for the column `text`.
    pub text: Option<String>,
    /// The file's name for the column `system`, the text of a system turn before the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// The file's name for the column `tools`, what the chat template is told of functions that can be called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<String>,
    /// The file's name for the column `history`, earlier turns of an instruction as pairs of question and answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub history: Option<String>,
}

impl ColumnMap {
    /// All columns have their usual names.
    pub const USUAL: ColumnMap = ColumnMap {
        messages: None,
        prompt: None,
        completion: None,
        instruction: None,
        input: None,
        output: None,
        text: None,
        system: None,
        tools: None,
        history: None,
    };

    /// Gives a column another name in the file; returns the one it had.
    ///
    /// # Errors
    /// A column that no format reads.
    pub fn set(&mut self, column: &str, name: &str, names: &Names) -> Result<Option<String>, Error> {
        let place = match column {
            "messages" => &mut self.messages,
            "prompt" => &mut self.prompt,
            "completion" => &mut self.completion,
            "instruction" => &mut self.instruction,
            "input" => &mut self.input,
            "output" => &mut self.output,
            "text" => &mut self.text,
            "system" => &mut self.system,
            "tools" => &mut self.tools,
            "history" => &mut self.history,
            _ => {
                let known = || self.entries().map(|(known, _)| known).into_iter();
                let nearest = nearest(column, known()).map_or("nothing", |(known, _)| known);
                return Err(Error::UnknownKey {
                    key: format!("{}{column}", names.column),
                    advice: format!("; did you mean {}{nearest}?", names.column),
                    place: format!("of {}", names.columns),
                    known: quoted(known()),
                });
            }
        };
        Ok(place.replace(name.to_owned()))
    }

    fn entries(&self) -> [(&'static str, Option<&str>); 10] {
        [
            ("messages", self.messages.as_deref()),
            ("prompt", self.prompt.as_deref()),
            ("completion", self.completion.as_deref()),
            ("instruction", self.instruction.as_deref()),
            ("input", self.input.as_deref()),
            ("output", self.output.as_deref()),
            ("text", self.text.as_deref()),
            ("system", self.system.as_deref()),
            ("tools", self.tools.as_deref()),
            ("history", self.history.as_deref()),
        ]
    }

    /// The file's name for a column.
    pub(super) fn name<'a>(&'a self, column: &'a str) -> &'a str {
        self.entries().into_iter().find(|(known, _)| *known == column).and_then(|(_, name)| name).unwrap_or(column)
    }

    pub(super) fn is_mapped(&self, column: &str) -> bool {
        self.entries().into_iter().any(|(known, name)| known == column && name.is_some())
    }

    /// A column that is given a name although the chosen format does not read it.
    pub(crate) fn not_read_by(&self, format: DataFormat) -> Option<&'static str> {
        let format = format.chosen()?;
        self.entries()
            .into_iter()
            .find(|(column, name)| name.is_some() && !format.reads(column))
            .map(|(column, _)| column)
    }
}

/// What other programs call a column, in lower case; of each the most usual first.
const SYNONYMS: [(&str, &[&str]); 6] = [
    ("messages", &["conversations", "conversation", "dialogue", "dialog", "chat", "turns", "message"]),
    ("instruction", &["question", "query", "problem", "prompt", "user", "human"]),
    ("input", &["context", "passage"]),
    (
        "output",
        &[
            "response",
            "answer",
            "completion",
            "solution",
            "reply",
            "assistant",
            "bot",
            "gpt",
            "target",
            "label",
            "summary",
            "highlights",
        ],
    ),
    ("system", &["system_prompt", "system_message"]),
    ("tools", &["functions"]),
];

/// Texts that are answered by the column beside them, a label or a summary, where nothing else says what is asked.
const ANSWERED: [&str; 6] = ["text", "sentence", "document", "article", "dialogue", "input"];
/// Names of a text that stands alone.
const ALONE: [&str; 5] = ["content", "document", "body", "article", "sentence"];

/// A column that was taken for one that a format reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Its name in the file.
    pub column: String,
    /// The column it was taken for.
    pub taken_as: String,
}

/// The format of a file's rows, and the file's names for its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub format: RowFormat,
    pub columns: ColumnMap,
    pub taken: Vec<Taken>,
}

type Fields = Map<String, Value>;

impl Layout {
    fn new(format: RowFormat, columns: &ColumnMap) -> Self {
        Layout { format, columns: columns.clone(), taken: Vec::new() }
    }

    /// What the columns of a row say, in a format that is told or not; nothing where they say nothing. Where columns are mapped,
    /// only the formats that read them count: with a misspelt mapping nothing else may be trained on instead.
    pub fn of(fields: &Fields, format: DataFormat, columns: &ColumnMap) -> Option<Layout> {
        if let Some(format) = format.chosen() {
            let mut layout = Layout::new(format, columns);
            for column in format.required() {
                layout.adopt(column, fields);
            }
            return Some(layout);
        }
        let candidates = columns.candidates();
        let fits = |format: &RowFormat| columns.fit(fields, *format);
        let exact = candidates.iter().copied().find(fits).map(|format| Layout::new(format, columns));
        if columns.is_any_mapped() {
            return exact;
        }
        match exact {
            Some(layout) if layout.format == RowFormat::Text && has_text(fields, &["label", "summary"]) => {
                // Of a text with its class or its summary beside it, what is to be learnt is the answer.
                Layout::answered(fields, &["text"], &["label", "summary"]).or(Some(layout))
            }
            Some(layout) => Some(layout),
            None => Layout::by_synonyms(fields, columns),
        }
    }

    fn by_synonyms(fields: &Fields, columns: &ColumnMap) -> Option<Layout> {
        let mut chat = Layout::new(RowFormat::Messages, columns);
        if chat.adopt("messages", fields) {
            return Some(chat);
        }
        let mut asked = Layout::new(RowFormat::Alpaca, columns);
        if asked.adopt("instruction", fields) && asked.adopt("output", fields) {
            return Some(asked);
        }
        let answers = synonyms("output");
        if let Some(layout) =
            Layout::answered(fields, &ANSWERED, answers).or_else(|| Layout::answered(fields, &["source"], &["target"]))
        {
            return Some(layout);
        }
        let mut texts = fields.iter().filter(|(_, value)| value.is_string()).map(|(name, _)| name);
        let only = texts.next().filter(|name| texts.next().is_none() && is_among(name, &ALONE))?;
        let mut alone = Layout::new(RowFormat::Text, columns);
        alone.take("text", only);
        Some(alone)
    }

    /// A text and what it is answered with, if there are one of each and no other text that could be the question.
    fn answered(fields: &Fields, texts: &[&str], answers: &[&str]) -> Option<Layout> {
        let text = only_text(fields, texts)?;
        let answer = only_text(fields, answers)?;
        let others =
            fields.iter().filter(|(name, value)| value.is_string() && *name != text && *name != answer).count();
        // Beside an input, another text may be what is to be done with it.
        if text == answer || (text.eq_ignore_ascii_case("input") && others > 0) {
            return None;
        }
        let mut layout = Layout::new(RowFormat::Alpaca, &ColumnMap::default());
        layout.take("instruction", text);
        layout.take("output", answer);
        Some(layout)
    }

    /// Takes the file's column that other programs call so for one that is not there; whether there is one in the end.
    pub fn adopt(&mut self, column: &'static str, fields: &Fields) -> bool {
        if fields.contains_key(self.columns.name(column)) {
            return true;
        }
        if self.columns.is_mapped(column) {
            return false;
        }
        let found = match column {
            "messages" => {
                let of_chats = |(name, value): &(&String, &Value)| is_among(name, synonyms(column)) && is_chat(value);
                let mut names = fields.iter().filter(of_chats).map(|(name, _)| name.as_str());
                names.next().filter(|_| names.next().is_none())
            }
            "tools" => fields.iter().find(|(name, _)| is_among(name, synonyms(column))).map(|(name, _)| name.as_str()),
            _ => only_text(fields, synonyms(column)),
        };
        let found = found.or_else(|| fields.keys().map(String::as_str).find(|name| name.eq_ignore_ascii_case(column)));
        // One column is not two.
        let is_taken = |name: &str| self.columns.entries().into_iter().any(|(_, taken)| taken == Some(name));
        let Some(found) = found.filter(|name| !is_taken(name)) else { return false };
        self.take(column, found);
        true
    }

    fn take(&mut self, column: &'static str, name: &str) {
        // Every column of SYNONYMS is one of the map's.
        if name != column && self.columns.set(column, name, &Names::KEYS).is_ok() {
            self.taken.push(Taken { column: name.to_owned(), taken_as: column.to_owned() });
        }
    }

    /// Whether the format reads the file's column of this name.
    pub fn reads(&self, name: &str) -> bool {
        let mut columns = self.format.required().iter().chain(self.format.optional());
        columns.any(|column| self.columns.name(column) == name)
    }
}

fn synonyms(column: &str) -> &'static [&'static str] {
    SYNONYMS.iter().find(|(known, _)| *known == column).map_or(&[], |(_, names)| names)
}

fn is_among(name: &str, names: &[&str]) -> bool {
    names.iter().any(|known| known.eq_ignore_ascii_case(name))
}

fn has_text(fields: &Fields, names: &[&str]) -> bool {
    let mut values = fields.iter().filter(|(name, _)| is_among(name, names)).map(|(_, value)| value.as_str());
    values.any(|text| text.is_some_and(|text| !text.is_empty()))
}

/// The column of a text that has one of these names, if there is one alone.
fn only_text<'a>(fields: &'a Fields, names: &[&str]) -> Option<&'a str> {
    let mut found = fields.iter().filter(|(name, value)| is_among(name, names) && value.is_string());
    let (name, _) = found.next()?;
    found.next().is_none().then_some(name)
}

/// A list of objects, or the text of one.
fn is_chat(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().all(Value::is_object) && !list.is_empty(),
        Value::String(text) => text.trim_start().starts_with('['),
        _ => false,
    }
}

/// What the first row of a file is, where its columns tell no format.
pub(super) struct Unknown<'a> {
    pub path: &'a std::path::Path,
    pub line: usize,
    pub fields: &'a Fields,
    pub columns: &'a ColumnMap,
    pub names: &'a Names,
}

impl Unknown<'_> {
    /// The error for it, with what the columns most likely are.
    pub fn error(&self) -> Error {
        let Unknown { path, line, fields, columns, names } = self;
        let keys = || fields.keys().map(String::as_str);
        let has = |name: &str| keys().any(|key| key.eq_ignore_ascii_case(name));
        if has("chosen") && has("rejected") && !columns.is_any_mapped() {
            let is_list = fields.get("chosen").is_some_and(Value::is_array);
            let mapping = if is_list { "messages=chosen" } else { "completion=chosen" };
            return Error::PreferenceRows {
                path: path.to_path_buf(),
                line: *line,
                mapping: format!("{}{mapping}", names.column),
            };
        }
        let candidates = columns.candidates();
        let expected = |format: &RowFormat| {
            let names: Vec<&str> = format.required().iter().map(|column| columns.name(column)).collect();
            format!("{format}: {}", names.join(" and "))
        };
        let wanted = candidates.iter().flat_map(|format| format.required()).map(|column| columns.name(column));
        let closest = wanted
            .filter_map(|wanted| nearest(wanted, keys()).map(|(found, similarity)| (wanted, found, similarity)))
            .filter(|(_, _, similarity)| (LEAST_SIMILAR..1.0).contains(similarity))
            .reduce(|best, next| if next.2 > best.2 { next } else { best });
        let several = ["instruction", "output"].into_iter().find_map(|column| {
            let names: Vec<&str> = keys().filter(|name| is_among(name, synonyms(column))).collect();
            (names.len() > 1).then(|| format!("{} could each be {column:?}", quoted(names)))
        });
        let advice = match (several, closest) {
            (Some(several), _) => format!("; {several}"),
            (None, Some((wanted, found, _))) => format!("; {found:?} is nearest to {wanted:?}"),
            (None, None) => String::new(),
        };
        Error::UnknownFormat {
            path: path.to_path_buf(),
            line: *line,
            found: quoted(keys()),
            expected: candidates.iter().map(expected).collect::<Vec<_>>().join("; or "),
            advice: format!("Give the columns' names in {}{advice}", names.columns),
        }
    }
}

/// Names that have less in common are not taken for each other.
pub(super) const LEAST_SIMILAR: f64 = 0.5;

impl ColumnMap {
    fn is_any_mapped(&self) -> bool {
        self.entries().iter().any(|(_, name)| name.is_some())
    }

    /// The formats that may be meant: where columns are mapped, those that need one of them.
    fn candidates(&self) -> Vec<RowFormat> {
        let mapped =
            |format: &RowFormat| self.entries().iter().any(|(column, name)| name.is_some() && format.reads(column));
        let any_mapped = RowFormat::ALL.iter().any(mapped);
        RowFormat::ALL.into_iter().filter(|format| !any_mapped || mapped(format)).collect()
    }

    /// Whether a row has the columns of a format.
    pub(super) fn fit(&self, fields: &Fields, format: RowFormat) -> bool {
        let is_read = |name: &str| format.required().iter().any(|column| self.name(column) == name);
        // Beside an input, another text may be what is to be done with it.
        let is_alone = || fields.iter().all(|(name, value)| !value.is_string() || is_read(name));
        let has_all = format.required().iter().all(|column| fields.contains_key(self.name(column)));
        has_all && (format != RowFormat::InputOutput || is_alone())
    }
}
