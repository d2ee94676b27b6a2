//! Data files to rows: JSON lines, a JSON array, CSV with a header line; four formats of rows, told by their columns.
//!
//! Nothing is guessed past what the columns say: a row that does not fit is an error with its line.

use std::fmt;
use std::path::{Path, PathBuf};

use retune_text::chat_template::Message;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::names::Names;
use crate::error::{Error, describe, nearest, quoted};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    Messages,
    PromptCompletion,
    Alpaca,
    InputOutput,
    Text,
}

impl DataFormat {
    fn chosen(self) -> Option<RowFormat> {
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
    const ALL: [RowFormat; 5] =
        [RowFormat::Messages, RowFormat::PromptCompletion, RowFormat::Alpaca, RowFormat::InputOutput, RowFormat::Text];

    /// The columns without which a row is not of this format.
    fn required(self) -> &'static [&'static str] {
        match self {
            RowFormat::Messages => &["messages"],
            RowFormat::PromptCompletion => &["prompt", "completion"],
            RowFormat::Alpaca => &["instruction", "output"],
            RowFormat::InputOutput => &["input", "output"],
            RowFormat::Text => &["text"],
        }
    }

    /// Whether this format reads the column.
    fn reads(self, column: &str) -> bool {
        self.required().contains(&column) || (self == RowFormat::Alpaca && column == "input")
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
}

impl ColumnMap {
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

    fn entries(&self) -> [(&'static str, Option<&str>); 7] {
        [
            ("messages", self.messages.as_deref()),
            ("prompt", self.prompt.as_deref()),
            ("completion", self.completion.as_deref()),
            ("instruction", self.instruction.as_deref()),
            ("input", self.input.as_deref()),
            ("output", self.output.as_deref()),
            ("text", self.text.as_deref()),
        ]
    }

    /// The file's name for a column.
    fn name<'a>(&'a self, column: &'a str) -> &'a str {
        self.entries().into_iter().find(|(known, _)| *known == column).and_then(|(_, name)| name).unwrap_or(column)
    }

    fn is_mapped(&self, column: &str) -> bool {
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

/// The rows of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct DataFile {
    pub path: PathBuf,
    /// The format that was asked for or detected.
    pub format: RowFormat,
    /// In the file's order.
    pub rows: Vec<Row>,
}

/// One row of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its number among the file's rows, from 0.
    pub index: usize,
    /// The line it starts on, from 1.
    pub line: usize,
    pub text: RowText,
}

/// What a row says. Rows with equal texts are duplicates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RowText {
    Chat(Vec<Message>),
    PromptCompletion { prompt: String, completion: String },
    Instruction { instruction: String, input: String, output: String },
    Text(String),
}

impl RowText {
    /// Whether an answer of the row, or its whole text, is empty or blank.
    pub fn has_empty_answer(&self) -> bool {
        match self {
            RowText::Text(text) => text.trim().is_empty(),
            _ => self.answers().iter().any(|answer| answer.trim().is_empty()),
        }
    }

    /// All that the row says, as plain text, without the words that a template puts around it.
    pub fn plain_text(&self) -> String {
        let with_ends = |pieces: &[&str]| -> String {
            let pieces = pieces.iter().filter(|piece| !piece.is_empty());
            pieces.flat_map(|piece| [piece, "\n"]).collect()
        };
        match self {
            RowText::Chat(messages) => {
                messages.iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")
            }
            RowText::PromptCompletion { prompt, completion } => format!("{prompt}{completion}"),
            RowText::Instruction { instruction, input, output } => with_ends(&[instruction, input, output]),
            RowText::Text(text) => text.clone(),
        }
    }

    /// What the row asks first, as plain text, or the text that it is; `None` of a conversation in which no user speaks.
    pub fn question(&self) -> Option<String> {
        Some(match self {
            RowText::Chat(messages) => messages.iter().find(|message| message.role == "user")?.content.clone(),
            RowText::PromptCompletion { prompt, .. } => prompt.clone(),
            RowText::Instruction { instruction, input, .. } => format!("{instruction} {input}"),
            RowText::Text(text) => text.clone(),
        })
    }

    /// The answers of the row; none of a text, which is learnt whole.
    pub fn answers(&self) -> Vec<&str> {
        match self {
            RowText::Chat(messages) => {
                let answers = messages.iter().filter(|message| message.role == "assistant");
                answers.map(|message| message.content.as_str()).collect()
            }
            RowText::PromptCompletion { completion: answer, .. } | RowText::Instruction { output: answer, .. } => {
                vec![answer.as_str()]
            }
            RowText::Text(_) => Vec::new(),
        }
    }

    /// The row with another last answer, in the place of the words of its own, and nothing after it; `None` of a row without answers.
    pub fn with_answer(&self, answer: &str) -> Option<RowText> {
        let instead_of = |own: &str| match own.split_once(own.trim()) {
            Some((before, after)) => format!("{before}{answer}{after}"),
            None => answer.to_owned(),
        };
        Some(match self {
            RowText::Chat(messages) => {
                let last = messages.iter().rposition(|message| message.role == "assistant")?;
                let mut turns = messages.get(..=last)?.to_vec();
                let turn = turns.last_mut()?;
                turn.content = instead_of(&turn.content);
                RowText::Chat(turns)
            }
            RowText::PromptCompletion { prompt, completion } => {
                RowText::PromptCompletion { prompt: prompt.clone(), completion: instead_of(completion) }
            }
            RowText::Instruction { instruction, input, output } => RowText::Instruction {
                instruction: instruction.clone(),
                input: input.clone(),
                output: instead_of(output),
            },
            RowText::Text(_) => return None,
        })
    }

    /// What the last answer answers, in pieces; `None` where nobody asks anything.
    pub(super) fn prompt(&self) -> Option<Vec<&str>> {
        let pieces: Vec<&str> = match self {
            RowText::Chat(messages) => {
                let last = messages.iter().rposition(|message| message.role == "assistant")?;
                let before = messages.get(..last).unwrap_or_default();
                if before.iter().all(|message| message.role == "system") {
                    return None;
                }
                before.iter().flat_map(|message| [message.role.as_str(), message.content.as_str()]).collect()
            }
            RowText::PromptCompletion { prompt, .. } => vec![prompt.as_str()],
            RowText::Instruction { instruction, input, .. } => vec![instruction.as_str(), input.as_str()],
            RowText::Text(_) => return None,
        };
        pieces.iter().any(|piece| !piece.trim().is_empty()).then_some(pieces)
    }
}

/// Reads a `.jsonl`, `.json` or `.csv` file. Blank lines are skipped; a JSON file may be an array or hold an object a line.
///
/// # Errors
/// A file that cannot be read or parsed, a column that is missing or of a wrong type, rows of different formats: each with
/// the line. They call settings as `names` says.
pub fn read_rows(path: &Path, format: DataFormat, columns: &ColumnMap, names: &Names) -> Result<DataFile, Error> {
    let reader = Reader { path, columns, names };
    let records = reader.records()?;
    let first = records.first().ok_or_else(|| Error::NoRows { path: path.to_owned() })?;
    let detected = match format.chosen() {
        Some(format) => format,
        None => reader.detect(first)?,
    };
    // `input` may be left out of a row, but a name that no row has is a mistake.
    let is_input = |record: &Record| record.fields.contains_key(columns.name("input"));
    if detected == RowFormat::Alpaca && columns.is_mapped("input") && !records.iter().any(is_input) {
        return Err(reader.missing(first, columns.name("input")));
    }
    let rows = records.iter().enumerate().map(|(index, record)| {
        let text = reader.row(record, detected, format == DataFormat::Auto)?;
        Ok(Row { index, line: record.line, text })
    });
    Ok(DataFile { path: path.to_owned(), format: detected, rows: rows.collect::<Result<_, Error>>()? })
}

/// The texts in columns of a `.jsonl`, `.json` or `.csv` file, row by row; of numbers and truth values what the file says.
///
/// # Errors
/// As [`read_rows`].
pub fn read_columns<const N: usize>(path: &Path, columns: [&str; N]) -> Result<Vec<[String; N]>, Error> {
    let reader = Reader { path, columns: &ColumnMap::default(), names: &Names::KEYS };
    let records = reader.records()?;
    if records.is_empty() {
        return Err(Error::NoRows { path: path.to_owned() });
    }
    let row = |record: &Record| {
        let mut texts = columns.map(|_| String::new());
        for (text, column) in texts.iter_mut().zip(columns) {
            *text = reader.any_text(record, column)?;
        }
        Ok(texts)
    };
    records.iter().map(row).collect()
}

/// A row as the file has it.
struct Record {
    line: usize,
    fields: Map<String, Value>,
}

/// What errors and columns need to be told.
struct Reader<'a> {
    path: &'a Path,
    columns: &'a ColumnMap,
    names: &'a Names,
}

/// A file's text, without the byte order mark some editors begin it with.
///
/// # Errors
/// A file that cannot be read; one that is not UTF-8, with the line.
pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = std::fs::read(path).map_err(|error| Error::Read { path: path.to_owned(), error })?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let before = error.as_bytes().iter().take(offset);
        let line = 1 + before.filter(|&&byte| byte == b'\n').count();
        Error::NotUtf8 { path: path.to_owned(), line, offset }
    })?;
    if text.starts_with('\u{FEFF}') {
        text.drain(..'\u{FEFF}'.len_utf8());
    }
    Ok(text)
}

impl Reader<'_> {
    /// The rows of the file.
    fn records(&self) -> Result<Vec<Record>, Error> {
        let extension = self.path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        match extension.to_ascii_lowercase().as_str() {
            "jsonl" | "ndjson" | "json" => self.json(&read_text(self.path)?),
            "csv" => self.csv(&read_text(self.path)?),
            _ => Err(Error::FileKind { path: self.path.to_owned() }),
        }
    }

    fn json(&self, text: &str) -> Result<Vec<Record>, Error> {
        if text.trim_start().starts_with('[') { self.json_array(text) } else { self.json_lines(text) }
    }

    fn json_lines(&self, text: &str) -> Result<Vec<Record>, Error> {
        let mut records = Vec::new();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value = serde_json::from_str(line).map_err(|error| self.json_error(index + 1, &error))?;
            records.push(self.record(index + 1, value)?);
        }
        Ok(records)
    }

    /// Row by row, so that every row has its line.
    fn json_array(&self, text: &str) -> Result<Vec<Record>, Error> {
        let mut records = Vec::new();
        let mut line = 1;
        let mut rest = skip_space(text, &mut line);
        rest = skip_space(rest.strip_prefix('[').unwrap_or(rest), &mut line);
        let mut closed = rest.strip_prefix(']');
        while closed.is_none() {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let value = match values.next() {
                Some(Ok(value)) => value,
                Some(Err(error)) => return Err(self.json_error(line, &error)),
                None => return Err(self.syntax(line, "the array ends without `]`".to_owned(), JSON)),
            };
            let (row, after) = rest.split_at_checked(values.byte_offset()).unwrap_or((rest, ""));
            records.push(self.record(line, value)?);
            line += newlines(row);
            rest = skip_space(after, &mut line);
            closed = rest.strip_prefix(']');
            if closed.is_none() {
                rest = match rest.strip_prefix(',') {
                    Some(after) => skip_space(after, &mut line),
                    None => return Err(self.syntax(line, "a row is not followed by `,` or `]`".to_owned(), JSON)),
                };
            }
        }
        if !skip_space(closed.unwrap_or_default(), &mut line).is_empty() {
            return Err(self.syntax(line, "something follows the array".to_owned(), JSON));
        }
        Ok(records)
    }

    fn record(&self, line: usize, value: Value) -> Result<Record, Error> {
        match value {
            Value::Object(fields) => Ok(Record { line, fields }),
            other => Err(self.syntax(line, format!("the row is {}", describe(&other)), JSON)),
        }
    }

    /// An error of the parser, which counts lines from `line` on.
    fn json_error(&self, line: usize, error: &serde_json::Error) -> Error {
        let text = error.to_string();
        // The parser appends its own line, which is of no use where it was given one line of many.
        let cause = text.split(" at line ").next().unwrap_or(&text);
        self.syntax(line + error.line().saturating_sub(1), format!("{cause} (column {})", error.column()), JSON)
    }

    fn csv(&self, text: &str) -> Result<Vec<Record>, Error> {
        let error = |error: csv::Error| {
            let line = error.position().map_or(1, |position| position.line() as usize);
            self.syntax(line, error.to_string(), CSV)
        };
        let mut reader = csv::ReaderBuilder::new().from_reader(text.as_bytes());
        let header = reader.headers().map_err(error)?.clone();
        if let (1, Some(line)) = (header.len(), text.lines().next())
            && let Some((other, name)) = SEPARATORS.iter().find(|(other, _)| line.contains(*other))
        {
            let columns = line.split(*other).count();
            return Err(self.syntax(
                1,
                format!("there is no comma, but {columns} columns separated by {name}"),
                CSV_WITH_COMMAS,
            ));
        }
        for (at, name) in header.iter().enumerate() {
            if header.iter().take(at).any(|earlier| earlier == name) {
                return Err(self.syntax(1, format!("the column {name:?} is there twice"), CSV));
            }
        }
        let mut records = Vec::new();
        for record in reader.records() {
            let record = record.map_err(error)?;
            let line = record.position().map_or(1, |position| position.line() as usize);
            let fields = header.iter().zip(&record).map(|(name, field)| (name.to_owned(), Value::from(field)));
            records.push(Record { line, fields: fields.collect() });
        }
        Ok(records)
    }

    fn syntax(&self, line: usize, cause: String, expected: &'static str) -> Error {
        Error::Syntax { path: self.path.to_owned(), line, cause, expected }
    }

    fn fits(&self, record: &Record, format: RowFormat) -> bool {
        let is_read = |name: &str| format.required().iter().any(|column| self.columns.name(column) == name);
        // Beside an input, another text may be what is to be done with it.
        let is_alone = || record.fields.iter().all(|(name, value)| !value.is_string() || is_read(name));
        let has_all = format.required().iter().all(|column| record.fields.contains_key(self.columns.name(column)));
        has_all && (format != RowFormat::InputOutput || is_alone())
    }

    /// The first format whose columns the record has. Where columns are mapped, only the formats that read them count: with a
    /// misspelt mapping nothing else may be trained on instead.
    fn detect(&self, record: &Record) -> Result<RowFormat, Error> {
        let mapped = |format: &RowFormat| {
            self.columns.entries().iter().any(|(column, name)| name.is_some() && format.reads(column))
        };
        let any_mapped = RowFormat::ALL.iter().any(mapped);
        let candidates: Vec<RowFormat> =
            RowFormat::ALL.into_iter().filter(|format| !any_mapped || mapped(format)).collect();
        if let Some(format) = candidates.iter().find(|format| self.fits(record, **format)) {
            return Ok(*format);
        }
        let names = |format: &RowFormat| {
            let names: Vec<&str> = format.required().iter().map(|column| self.columns.name(column)).collect();
            format!("{format}: {}", names.join(" and "))
        };
        let wanted = candidates.iter().flat_map(|format| format.required()).map(|column| self.columns.name(column));
        let keys = || record.fields.keys().map(String::as_str);
        let closest = wanted
            .filter_map(|wanted| nearest(wanted, keys()).map(|(found, similarity)| (wanted, found, similarity)))
            .filter(|(_, _, similarity)| *similarity < 1.0)
            .reduce(|best, next| if next.2 > best.2 { next } else { best });
        Err(Error::UnknownFormat {
            path: self.path.to_owned(),
            line: record.line,
            found: quoted(keys()),
            expected: candidates.iter().map(names).collect::<Vec<_>>().join("; or "),
            advice: match closest {
                Some((wanted, found, _)) => {
                    format!("Give the columns' names in {}; {found:?} is nearest to {wanted:?}", self.names.columns)
                }
                None => format!("Give the columns' names in {}", self.names.columns),
            },
        })
    }

    fn row(&self, record: &Record, format: RowFormat, detected: bool) -> Result<RowText, Error> {
        if detected && !self.fits(record, format) {
            let other = RowFormat::ALL.into_iter().find(|other| self.fits(record, *other));
            if let Some(found) = other {
                return Err(Error::MixedFormats {
                    path: self.path.to_owned(),
                    line: record.line,
                    expected: format,
                    found,
                });
            }
        }
        Ok(match format {
            RowFormat::Messages => RowText::Chat(self.messages(record)?),
            RowFormat::PromptCompletion => RowText::PromptCompletion {
                prompt: self.string(record, "prompt")?,
                completion: self.string(record, "completion")?,
            },
            RowFormat::InputOutput => RowText::PromptCompletion {
                prompt: self.string(record, "input")?,
                completion: self.string(record, "output")?,
            },
            RowFormat::Alpaca => RowText::Instruction {
                instruction: self.string(record, "instruction")?,
                input: match record.fields.get(self.columns.name("input")) {
                    None | Some(Value::Null) => String::new(),
                    Some(_) => self.string(record, "input")?,
                },
                output: self.string(record, "output")?,
            },
            RowFormat::Text => RowText::Text(self.string(record, "text")?),
        })
    }

    fn value<'r>(&self, record: &'r Record, column: &str) -> Result<&'r Value, Error> {
        let name = self.columns.name(column);
        record.fields.get(name).ok_or_else(|| self.missing(record, name))
    }

    fn missing(&self, record: &Record, column: &str) -> Error {
        let advice = match nearest(column, record.fields.keys().map(String::as_str)) {
            Some((found, _)) => {
                let Names { columns, format, .. } = self.names;
                format!("The nearest is {found:?}: name it in {columns}, or choose another {format}")
            }
            None => "Every row needs it".to_owned(),
        };
        self.missing_column(record, column, advice)
    }

    fn missing_column(&self, record: &Record, column: &str, advice: String) -> Error {
        Error::MissingColumn {
            path: self.path.to_owned(),
            line: record.line,
            column: column.to_owned(),
            found: quoted(record.fields.keys().map(String::as_str)),
            advice,
        }
    }

    fn column_type(&self, record: &Record, column: String, found: String, expected: &'static str) -> Error {
        Error::ColumnType { path: self.path.to_owned(), line: record.line, column, found, expected }
    }

    fn string(&self, record: &Record, column: &str) -> Result<String, Error> {
        match self.value(record, column)? {
            Value::String(text) => Ok(text.clone()),
            other => {
                let name = self.columns.name(column).to_owned();
                Err(self.column_type(record, name, describe(other), "a text, in quotation marks"))
            }
        }
    }

    /// A column of this name as text, whatever single value it holds.
    fn any_text(&self, record: &Record, column: &str) -> Result<String, Error> {
        match record.fields.get(column) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
            Some(other) => Err(self.column_type(record, column.to_owned(), describe(other), "a text or a number")),
            None => {
                let nearest = nearest(column, record.fields.keys().map(String::as_str));
                let advice = nearest.map_or_else(String::new, |(found, _)| format!("Did you mean {found:?}?"));
                Err(self.missing_column(record, column, advice))
            }
        }
    }

    fn messages(&self, record: &Record) -> Result<Vec<Message>, Error> {
        const LIST: &str = "a list of at least one {\"role\": …, \"content\": …}";
        let name = self.columns.name("messages");
        let value = self.value(record, "messages")?;
        let Some(list) = value.as_array().filter(|list| !list.is_empty()) else {
            return Err(self.column_type(record, name.to_owned(), describe(value), LIST));
        };
        list.iter().enumerate().map(|(at, message)| self.message(record, &format!("{name}[{at}]"), message)).collect()
    }

    fn message(&self, record: &Record, place: &str, message: &Value) -> Result<Message, Error> {
        /// Keys that change what is to be learnt.
        const REFUSED: [&str; 4] = ["tool_calls", "function_call", "tool_call_id", "weight"];
        let Some(fields) = message.as_object() else {
            let expected = "an object with the keys \"role\" and \"content\"";
            return Err(self.column_type(record, place.to_owned(), describe(message), expected));
        };
        if let Some(key) = REFUSED.into_iter().find(|key| fields.get(*key).is_some_and(|value| !value.is_null())) {
            let found = format!("set to {}", describe(fields.get(key).unwrap_or(&Value::Null)));
            let expected = "plain messages of role and content: this key is not supported";
            return Err(self.column_type(record, format!("{place}.{key}"), found, expected));
        }
        let text = |key: &str| match fields.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            other => {
                let found = other.map_or_else(
                    || format!("missing (the message has {})", quoted(fields.keys().map(String::as_str))),
                    describe,
                );
                Err(self.column_type(record, format!("{place}.{key}"), found, "a text, in quotation marks"))
            }
        };
        Ok(Message { role: text("role")?, content: text("content")? })
    }
}

const JSON: &str = "one JSON object a line, or an array of objects";
const CSV: &str = "a header line with the columns' names, then as many fields in every row";
const CSV_WITH_COMMAS: &str = "commas between the columns; save it as a CSV file with commas";
/// What programs separate columns by that is no comma.
const SEPARATORS: [(char, &str); 3] = [(';', "semicolons"), ('\t', "tabs"), ('|', "vertical bars")];

fn newlines(text: &str) -> usize {
    text.bytes().filter(|&byte| byte == b'\n').count()
}

/// What follows the white space at the start; its lines are counted.
fn skip_space<'a>(text: &'a str, line: &mut usize) -> &'a str {
    let rest = text.trim_start();
    *line += newlines(text.strip_suffix(rest).unwrap_or_default());
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(
        name: &str,
        content: impl AsRef<[u8]>,
        format: DataFormat,
        columns: &ColumnMap,
    ) -> Result<DataFile, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_rows(&path, format, columns, &Names::KEYS)
    }

    fn read(name: &str, content: impl AsRef<[u8]>) -> Result<DataFile, Error> {
        read_as(name, content, DataFormat::Auto, &ColumnMap::default())
    }

    fn error(name: &str, content: impl AsRef<[u8]>) -> String {
        read(name, content).unwrap_err().to_string()
    }

    fn lines(file: &DataFile) -> Vec<usize> {
        file.rows.iter().map(|row| row.line).collect()
    }

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.to_owned(), content: content.to_owned() }
    }

    #[test]
    fn the_plain_text_leaves_nothing_out() {
        let chat = RowText::Chat(vec![message("system", "s"), message("user", "u"), message("assistant", "a")]);
        let instruction =
            |input: &str| RowText::Instruction { instruction: "do".into(), input: input.into(), output: "done".into() };
        let pair = RowText::PromptCompletion { prompt: "x ".into(), completion: "y".into() };
        let rows = [&chat, &instruction("in"), &instruction(""), &pair, &RowText::Text("t".into())];
        assert_eq!(rows.map(RowText::plain_text), ["s\nu\na", "do\nin\ndone\n", "do\ndone\n", "x y", "t"]);
        let questions = rows.map(|row| row.question().unwrap_or_default());
        assert_eq!(questions, ["u", "do in", "do ", "x ", "t"]);
        assert_eq!(RowText::Chat(vec![message("system", "s")]).question(), None);
    }

    #[test]
    fn another_answer_stands_where_the_last_one_stood() {
        let turns = [("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", " b\n"), ("user", "w")];
        let chat = RowText::Chat(turns.map(|(role, content)| message(role, content)).to_vec());
        let RowText::Chat(changed) = chat.with_answer("yes").unwrap() else { panic!("no conversation") };
        let contents: Vec<_> = changed.iter().map(|turn| turn.content.as_str()).collect();
        assert_eq!(contents, ["u", "a", "v", " yes\n"], "the white space is part of what the model learnt");
        let pair = |completion: &str| RowText::PromptCompletion { prompt: "x".into(), completion: completion.into() };
        assert_eq!(pair(" y z").with_answer("no"), Some(pair(" no")));
        assert_eq!(pair(" ").with_answer("no"), Some(pair("no ")));
        let instruction =
            |output: &str| RowText::Instruction { instruction: "do".into(), input: "in".into(), output: output.into() };
        assert_eq!(instruction("done").with_answer("no"), Some(instruction("no")));
        assert_eq!(RowText::Text("t".into()).with_answer("no"), None);
        assert_eq!(RowText::Chat(vec![message("user", "u")]).with_answer("no"), None);
    }

    #[test]
    fn the_columns_tell_the_format() {
        let chat = r#"{"messages": [{"role": "user", "content": "q", "id": 1}, {"role": "assistant", "content": "a"}], "id": 7}"#;
        let file = read("a.jsonl", chat).unwrap();
        assert_eq!(file.format, RowFormat::Messages);
        assert_eq!(file.rows[0].text, RowText::Chat(vec![message("user", "q"), message("assistant", "a")]));
        let file = read("a.jsonl", r#"{"completion": "c", "prompt": "p"}"#).unwrap();
        assert_eq!(file.rows[0].text, RowText::PromptCompletion { prompt: "p".into(), completion: "c".into() });
        let file = read("a.jsonl", r#"{"input": "p", "output": "c", "id": 7}"#).unwrap();
        assert_eq!(file.format, RowFormat::InputOutput);
        assert_eq!(file.rows[0].text, RowText::PromptCompletion { prompt: "p".into(), completion: "c".into() });
        let misspelt = error("a.jsonl", r#"{"instructions": "i", "input": "p", "output": "c"}"#);
        assert!(misspelt.contains("instructions"), "{misspelt}");
        let alpaca = concat!(
            r#"{"instruction": "i", "input": "n", "output": "o", "text": "i n o"}"#,
            "\n",
            r#"{"instruction": "i", "input": null, "output": "o"}"#,
            "\n",
            r#"{"instruction": "i", "output": "o"}"#
        );
        let file = read("a.jsonl", alpaca).unwrap();
        assert_eq!(file.format, RowFormat::Alpaca);
        let row =
            |input: &str| RowText::Instruction { instruction: "i".into(), input: input.into(), output: "o".into() };
        assert_eq!(file.rows.iter().map(|row| row.text.clone()).collect::<Vec<_>>(), [row("n"), row(""), row("")]);
        assert_eq!(read("a.jsonl", r#"{"text": "t"}"#).unwrap().rows[0].text, RowText::Text("t".into()));
        let asked =
            read_as("a.jsonl", alpaca.lines().next().unwrap(), DataFormat::Text, &ColumnMap::default()).unwrap();
        assert_eq!(asked.rows[0].text, RowText::Text("i n o".into()));
    }

    #[test]
    fn all_kinds_of_files_give_the_same_rows_with_their_lines() {
        let lines_file =
            read("a.jsonl", "\u{FEFF}\n{\"text\": \"a\"}\r\n\n  \n{\"text\": \"b, \\\"c\\\"\\nd\"}\n").unwrap();
        assert_eq!(lines(&lines_file), [2, 5]);
        let array = read("a.json", "\n[\n {\"text\":\n  \"a\"},\n\n {\"text\": \"b, \\\"c\\\"\\nd\"}]\n ").unwrap();
        assert_eq!(lines(&array), [3, 6]);
        let csv = read("a.CSV", "text\na\n\"b, \"\"c\"\"\nd\"\n").unwrap();
        assert_eq!(lines(&csv), [2, 3]);
        for file in [&array, &csv] {
            for (row, expected) in file.rows.iter().zip(&lines_file.rows) {
                assert_eq!((row.index, &row.text), (expected.index, &expected.text));
            }
        }
        assert_eq!(lines(&read("a.json", "{\"text\": \"a\"}\n{\"text\": \"b\"}").unwrap()), [1, 2]);
    }

    #[test]
    fn damaged_files_are_refused_with_the_line() {
        let broken = error("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \n");
        assert!(broken.contains("a.jsonl, line 3: EOF while parsing") && !broken.contains("at line 1"), "{broken}");
        assert!(error("a.jsonl", "{\"text\": \"a\"}\n[1]\n").contains("line 2: the row is a list of 1"));
        let array = error("a.json", "[{\"text\": \"a\"},\n{\"text\": \"b\"\n,}]");
        assert!(array.contains("line 3: ") && array.contains("column 2"), "{array}");
        assert!(error("a.json", "[{\"text\": \"a\"}\n{\"text\": \"b\"}]").contains("line 2: a row is not followed by"));
        assert!(error("a.json", "[{\"text\": \"a\"},\n").contains("line 2: the array ends without"));
        assert!(error("a.json", "[{\"text\": \"a\"}]\n]").contains("line 2: something follows the array"));
        assert!(error("a.json", "[1]").contains("line 1: "));
        assert!(error("a.csv", "prompt,completion\na,b\nc\n").contains("line 3: "));
        assert!(error("a.csv", "text,text\na,b\n").contains("\"text\" is there twice"));
        for name in ["a.jsonl", "a.json", "a.csv"] {
            let bytes = error(name, b"text\n{\"text\": \"\xC3\xA9 \xE9\"}\n");
            assert!(bytes.contains("line 2: byte 18 of the file is not UTF-8"), "{bytes}");
            assert!(error(name, "").contains("holds no rows"));
        }
        assert!(error("a.json", " [ ] ").contains("holds no rows"));
        assert!(error("a.csv", "text\n").contains("holds no rows"));
        assert!(error("a.parquet", "PAR1").contains(".jsonl, .json or .csv"));
        assert!(read_rows(Path::new("absent.jsonl"), DataFormat::Auto, &ColumnMap::default(), &Names::KEYS).is_err());
    }

    #[test]
    fn no_cut_or_garbled_file_panics() {
        let whole =
            "[{\"messages\": [{\"role\": \"user\", \"content\": \"é\\u00e9\"}]},\n{\"text\": \"𝄞\", \"n\": [1, null]}]";
        let mut state = 1u64;
        for length in 0..whole.len() {
            for name in ["a.json", "a.jsonl", "a.csv"] {
                let mut bytes = whole.as_bytes()[..length].to_vec();
                let _ = read(name, &bytes);
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                if let Some(byte) = bytes.get_mut((state >> 33) as usize % length.max(1)) {
                    *byte = (state >> 25) as u8;
                }
                let _ = read(name, &bytes);
            }
        }
    }

    #[test]
    fn columns_that_do_not_fit_are_named_with_the_nearest() {
        let unknown = error("a.jsonl", r#"{"promt": "p", "completion": "c"}"#);
        assert!(
            unknown.contains("\"promt\", \"completion\"") && unknown.contains("\"promt\" is nearest to \"prompt\""),
            "{unknown}"
        );
        let missing =
            error("a.jsonl", "{\"prompt\": \"p\", \"completion\": \"c\"}\n{\"prompt\": \"p\", \"complete\": \"c\"}");
        assert!(
            missing.contains("line 2: there is no column \"completion\"")
                && missing.contains("nearest is \"complete\""),
            "{missing}"
        );
        let mixed = error("a.jsonl", "{\"text\": \"t\"}\n{\"prompt\": \"p\", \"completion\": \"c\"}");
        assert!(
            mixed.contains("line 2") && mixed.contains("format prompt_completion") && mixed.contains("those of text"),
            "{mixed}"
        );
        let number = error("a.jsonl", "{\"text\": 5}");
        assert!(number.contains("column text is 5; expected a text"), "{number}");
        let empty = error("a.jsonl", r#"{"messages": []}"#);
        assert!(empty.contains("column messages is a list of 0"), "{empty}");
        let sharegpt = error("a.jsonl", r#"{"messages": [{"from": "human", "value": "v"}]}"#);
        assert!(sharegpt.contains("messages[0].role is missing (the message has \"from\", \"value\")"), "{sharegpt}");
        let tools = error("a.jsonl", r#"{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}"#);
        assert!(tools.contains("messages[0].tool_calls"), "{tools}");
    }

    #[test]
    fn mapped_columns_are_read_and_nothing_in_their_place() {
        let columns =
            ColumnMap { prompt: Some("question".into()), completion: Some("answer".into()), ..ColumnMap::default() };
        let row = r#"{"question": "q", "answer": "a", "text": "t", "messages": []}"#;
        let file = read_as("a.jsonl", row, DataFormat::Auto, &columns).unwrap();
        assert_eq!(file.rows[0].text, RowText::PromptCompletion { prompt: "q".into(), completion: "a".into() });
        let misspelt = r#"{"qestion": "q", "answer": "a", "text": "t"}"#;
        let error = read_as("a.jsonl", misspelt, DataFormat::Auto, &columns).unwrap_err().to_string();
        assert!(error.contains("\"qestion\" is nearest to \"question\""), "{error}");
        let columns = ColumnMap { input: Some("context".into()), ..ColumnMap::default() };
        let row = "{\"instruction\": \"i\", \"output\": \"o\"}\n";
        assert!(
            read_as("a.jsonl", row, DataFormat::Auto, &columns)
                .unwrap_err()
                .to_string()
                .contains("no column \"context\"")
        );
        let row = "{\"instruction\": \"i\", \"output\": \"o\"}\n{\"instruction\": \"i\", \"output\": \"o\", \"context\": \"c\"}";
        assert_eq!(read_as("a.jsonl", row, DataFormat::Auto, &columns).unwrap().rows.len(), 2);
        assert_eq!(columns.not_read_by(DataFormat::Text), Some("input"));
        assert_eq!(columns.not_read_by(DataFormat::Alpaca), None);
        assert_eq!(columns.not_read_by(DataFormat::Auto), None);
    }

    #[test]
    fn blank_answers_are_noticed() {
        assert!(RowText::Text(" \n".into()).has_empty_answer());
        assert!(RowText::Chat(vec![message("assistant", ""), message("assistant", "a")]).has_empty_answer());
        assert!(!RowText::Chat(vec![message("user", ""), message("assistant", "a")]).has_empty_answer());
        assert!(RowText::PromptCompletion { prompt: "p".into(), completion: "".into() }.has_empty_answer());
    }
}
