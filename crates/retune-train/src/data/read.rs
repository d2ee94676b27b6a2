//! Data files to rows: JSON, tables and Parquet, packed or not; five formats of rows, told by their columns.
//!
//! Nothing in a row is dropped in silence: what is not read, and could matter, is counted or refused.

use std::path::{Path, PathBuf};

use retune_text::chat_template::{Conversation, Message};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::columns::{ColumnMap, DataFormat, LEAST_SIMILAR, Layout, RowFormat, Taken, Unknown};
use super::dataset::RowCount;
use super::files::{self, Content, Files};
use super::json::{Json, list_in_text};
use super::messages::{Found, Wrong, messages, says_something};
use super::names::Names;
use super::row::{Row, RowText};
use super::table;
use crate::error::{Error, describe, nearest, quoted};

/// What is done with a row that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// An error, which names the row's line and what is wrong with it.
    #[default]
    Stop,
    /// Left out, and counted in the data report.
    Skip,
}

impl OnBadRow {
    /// Whether it is the default.
    pub fn is_stop(&self) -> bool {
        *self == OnBadRow::Stop
    }
}

/// What is done with columns, and keys of messages, that nothing reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UnknownColumns {
    /// Those that would change what is learnt are refused; the others are counted in the data report.
    #[default]
    Auto,
    /// All are refused.
    Refuse,
    /// All are counted in the data report.
    Note,
}

impl UnknownColumns {
    /// Whether it is the default.
    pub fn is_auto(&self) -> bool {
        *self == UnknownColumns::Auto
    }
}

/// How files of rows are read.
#[derive(Debug, Clone, Copy)]
pub struct ReadOptions<'a> {
    pub format: DataFormat,
    pub columns: &'a ColumnMap,
    pub unknown_columns: UnknownColumns,
    pub on_bad_row: OnBadRow,
    /// What messages call these.
    pub names: &'a Names,
}

impl ReadOptions<'static> {
    /// Everything told by the columns, which have their usual names.
    pub const AUTO: ReadOptions<'static> = ReadOptions {
        format: DataFormat::Auto,
        columns: &ColumnMap::USUAL,
        unknown_columns: UnknownColumns::Auto,
        on_bad_row: OnBadRow::Stop,
        names: &Names::KEYS,
    };
}

/// The rows of a data file, or of several.
#[derive(Debug, Clone, PartialEq)]
pub struct DataFile {
    /// What was read, as [`Files`] shows it.
    pub path: PathBuf,
    /// The format that was asked for or detected.
    pub format: RowFormat,
    /// In the order of the files.
    pub rows: Vec<Row>,
    /// Of several files which, each with the index of its first row.
    pub files: Vec<(PathBuf, usize)>,
    pub reading: Reading,
}

impl DataFile {
    /// Rows of one file, of whose reading there is nothing to say.
    pub fn new(path: impl Into<PathBuf>, format: RowFormat, rows: Vec<Row>) -> Self {
        DataFile { path: path.into(), format, rows, files: Vec::new(), reading: Reading::default() }
    }

    /// The file that a row is from.
    pub fn file_of(&self, row: &Row) -> &Path {
        let file = self.files.iter().rev().find(|(_, first)| *first <= row.index);
        file.map_or(&self.path, |(path, _)| path)
    }
}

/// What there is to say of the reading of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reading {
    /// Columns that were taken for those that the format reads.
    pub taken: Vec<Taken>,
    /// Columns that hold something and are not read.
    pub columns_not_read: Vec<Counted>,
    /// Keys of messages that hold something and are not read.
    pub keys_not_read: Vec<Counted>,
    /// Roles that are none of the usual ones: their turns are given to the chat template as they are, and not learnt.
    pub other_roles: Vec<Counted>,
    /// Rows left out because they cannot be read.
    pub skipped: RowCount,
    /// What is wrong with the first of them.
    pub first_skipped: Option<String>,
}

/// A name and the rows in which it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    pub name: String,
    pub rows: RowCount,
}

impl Reading {
    /// Counts a row that is left out.
    pub(super) fn skip(&mut self, line: usize, error: &Error) {
        self.skipped.add(line);
        self.first_skipped.get_or_insert_with(|| error.to_string());
    }
}

pub(super) fn count(counts: &mut Vec<Counted>, name: &str, line: usize) {
    match counts.iter_mut().find(|counted| counted.name == name) {
        Some(counted) => counted.rows.add(line),
        None => {
            let mut rows = RowCount::default();
            rows.add(line);
            counts.push(Counted { name: name.to_owned(), rows });
        }
    }
}

/// Reads data files: `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, perhaps packed as `.gz` or `.zst`; or all of a folder, by name. Blank lines are
/// skipped; a JSON file may be an array or hold objects one after another.
///
/// # Errors
/// A file that cannot be read or parsed, a column that is missing or of a wrong type, rows of different formats: each with
/// the line. They call settings as `options.names` says.
pub fn read_rows(files: &Files, options: &ReadOptions) -> Result<DataFile, Error> {
    let mut reading = Reading::default();
    let mut sources = Vec::new();
    for path in files.paths() {
        for path in files::files_of(path)? {
            let records = records(&path, options.on_bad_row, &mut reading)?;
            sources.push((path, records));
        }
    }
    let path = PathBuf::from(files.to_string());
    let first = sources.iter().find_map(|(path, records)| Some((path, records.first()?)));
    let (first_path, first) = match (first, &reading.first_skipped) {
        (Some(first), _) => first,
        (None, Some(error)) => return Err(Error::AllSkipped { rows: reading.skipped.count, first: error.clone() }),
        (None, None) => return Err(Error::NoRows { path }),
    };
    let mut layout = Layout::of(&first.fields, options.format, options.columns).ok_or_else(|| {
        let ReadOptions { columns, names, .. } = *options;
        Unknown { path: first_path, line: first.line, fields: &first.fields, columns, names }.error()
    })?;
    let all = || sources.iter().flat_map(|(_, records)| records);
    for column in layout.format.optional() {
        let name = layout.columns.name(column).to_owned();
        let has = |record: &&Record| record.fields.contains_key(&name);
        if all().any(|record| has(&record)) {
            continue;
        }
        // A row may lack it, but a name that no row has is a mistake.
        if options.columns.is_mapped(column) {
            return Err(Reader { path: first_path, options, layout: &layout }.missing(first, &name));
        }
        all().any(|record| layout.adopt(column, &record.fields));
    }
    reading.taken.clone_from(&layout.taken);
    let are_several = sources.len() > 1 || sources.iter().any(|(source, _)| *source != path);
    let mut rows = Vec::new();
    let mut starts = Vec::new();
    for (path, records) in sources {
        if are_several {
            starts.push((path.clone(), rows.len()));
        }
        let reader = Reader { path: &path, options, layout: &layout };
        for record in records {
            match reader.row(&record, &mut reading) {
                Ok(text) => rows.push(Row { index: rows.len(), line: record.line, text }),
                Err(error @ Error::NotRead { .. }) => return Err(error),
                Err(error) if options.on_bad_row == OnBadRow::Skip => reading.skip(record.line, &error),
                Err(error) => return Err(error),
            }
        }
    }
    if rows.is_empty() {
        let first = reading.first_skipped.unwrap_or_default();
        return Err(Error::AllSkipped { rows: reading.skipped.count, first });
    }
    Ok(DataFile { path, format: layout.format, rows, files: starts, reading })
}

/// The texts in columns of a data file, row by row; of numbers and truth values what the file says.
///
/// # Errors
/// As [`read_rows`].
pub fn read_columns<const N: usize>(path: &Path, columns: [&str; N]) -> Result<Vec<[String; N]>, Error> {
    let records = records(path, OnBadRow::Stop, &mut Reading::default())?;
    if records.is_empty() {
        return Err(Error::NoRows { path: path.to_owned() });
    }
    let layout = Layout { format: RowFormat::Text, columns: ColumnMap::default(), taken: Vec::new() };
    let reader = Reader { path, options: &ReadOptions::AUTO, layout: &layout };
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
pub(super) struct Record {
    pub line: usize,
    pub fields: Map<String, Value>,
}

/// The rows of one file.
fn records(path: &Path, on_bad_row: OnBadRow, reading: &mut Reading) -> Result<Vec<Record>, Error> {
    let mut on_bad_row = |error: Error| {
        let line = match &error {
            Error::Syntax { line, .. } if on_bad_row == OnBadRow::Skip => *line,
            _ => return Err(error),
        };
        reading.skip(line, &error);
        Ok(())
    };
    match files::open(path)? {
        Content::Json(text) => Json { path, on_bad_row: &mut on_bad_row }.records(&text),
        Content::Table(text, separator) => table::records(path, &text, separator, &mut on_bad_row),
        #[cfg(feature = "parquet")]
        Content::Parquet => super::parquet::records(path),
        #[cfg(not(feature = "parquet"))]
        Content::Parquet => Err(Error::OtherFile {
            path: path.to_owned(),
            what: "Parquet, which this build cannot read",
            advice: "build with the feature `parquet`, or write the rows as .jsonl",
        }),
    }
}

/// Columns that are known to have no effect on what is learnt.
const WITHOUT_EFFECT: [&str; 7] = ["id", "_id", "idx", "index", "uuid", "__index_level_0__", "Unnamed: 0"];
/// Columns that say that there is more to a row than its text.
const MEDIA: [&str; 8] = ["image", "images", "video", "videos", "audio", "audios", "image_path", "pixel_values"];

/// What errors and columns need to be told.
struct Reader<'a> {
    path: &'a Path,
    options: &'a ReadOptions<'a>,
    layout: &'a Layout,
}

impl Reader<'_> {
    fn row(&self, record: &Record, reading: &mut Reading) -> Result<RowText, Error> {
        let format = self.layout.format;
        let columns = &self.layout.columns;
        if self.options.format == DataFormat::Auto && !columns.fit(&record.fields, format) {
            let usual = self.options.columns;
            if let Some(found) =
                RowFormat::ALL.into_iter().find(|other| usual.fit(&record.fields, *other) && *other != format)
            {
                return Err(Error::MixedFormats {
                    path: self.path.to_owned(),
                    line: record.line,
                    expected: format,
                    found,
                });
            }
        }
        let mut found = Found::default();
        let text = match format {
            RowFormat::Messages => {
                let value = self.value(record, "messages")?;
                let turns = self.messages(record, columns.name("messages"), value, &mut found)?;
                RowText::Chat(self.conversation(record, turns, &mut found)?)
            }
            RowFormat::PromptCompletion => self.prompt_and_completion(record, &mut found)?,
            RowFormat::InputOutput => RowText::PromptCompletion {
                prompt: self.string(record, "input")?,
                completion: self.string(record, "output")?,
            },
            RowFormat::Alpaca => self.instruction(record, &mut found)?,
            RowFormat::Text => RowText::Text(self.string(record, "text")?),
        };
        self.note(record, &text, found, reading)?;
        Ok(text)
    }

    fn messages(&self, record: &Record, place: &str, value: &Value, found: &mut Found) -> Result<Vec<Message>, Error> {
        messages(place, value, found)
            .map_err(|Wrong { place, found, expected }| self.column_type(record, place, found, expected))
    }

    /// Turns, with the text of a column `system` before them and what the template is told beside them.
    fn conversation(&self, record: &Record, mut turns: Vec<Message>, found: &mut Found) -> Result<Conversation, Error> {
        let name = self.layout.columns.name("system");
        if let Some(system) = self.optional_text(record, "system")? {
            match turns.first().filter(|turn| matches!(turn.role.as_str(), "system" | "developer")) {
                Some(turn) if turn.text() == system => {}
                Some(_) => {
                    found.changes.get_or_insert((
                        name.to_owned(),
                        "says something else than the system's turn that the messages begin with",
                    ));
                }
                None => turns.insert(0, Message::new("system", system)),
            }
        }
        let mut variables = Map::new();
        let name = self.layout.columns.name("tools");
        if let Some(value) = record.fields.get(name).filter(|value| says_something(value)) {
            let decoded = value.as_str().and_then(list_in_text);
            let tools = decoded.as_ref().unwrap_or(value);
            if !tools.is_array() {
                return Err(self.column_type(
                    record,
                    name.to_owned(),
                    describe(value),
                    "a list of functions, or the JSON text of one",
                ));
            }
            if says_something(tools) {
                variables.insert("tools".to_owned(), tools.clone());
            }
        }
        if let Some(value) = record.fields.get(VARIABLES).filter(|value| says_something(value)) {
            const EXPECTED: &str = "an object of variables for the chat template, or the JSON text of one, none of them messages or add_generation_prompt";
            let decoded = value.as_str().and_then(list_in_text);
            let others = decoded.as_ref().unwrap_or(value).as_object();
            let others = others.filter(|others| !RESERVED.iter().any(|name| others.contains_key(*name)));
            let Some(others) = others else {
                return Err(self.column_type(record, VARIABLES.to_owned(), describe(value), EXPECTED));
            };
            variables.extend(others.iter().map(|(name, value)| (name.clone(), value.clone())));
        }
        Ok(Conversation { messages: turns, variables })
    }

    /// Two texts; or, where one of them is a list of messages, a conversation of which the completion is learnt.
    fn prompt_and_completion(&self, record: &Record, found: &mut Found) -> Result<RowText, Error> {
        let [prompt, completion] = ["prompt", "completion"];
        let [asked, answered] = [self.value(record, prompt)?, self.value(record, completion)?];
        if !asked.is_array() && !answered.is_array() {
            return Ok(RowText::PromptCompletion {
                prompt: self.string(record, prompt)?,
                completion: self.string(record, completion)?,
            });
        }
        let mut turns = |column: &'static str, value: &Value, role: &str| match value {
            Value::Array(_) => self.messages(record, self.layout.columns.name(column), value, found),
            _ => Ok(vec![Message::new(role, self.string(record, column)?)]),
        };
        let mut all = turns(prompt, asked, "user")?;
        for turn in &mut all {
            turn.masked = turn.is_answer();
        }
        all.extend(turns(completion, answered, "assistant")?);
        Ok(RowText::Chat(self.conversation(record, all, found)?))
    }

    fn instruction(&self, record: &Record, found: &mut Found) -> Result<RowText, Error> {
        let instruction = self.string(record, "instruction")?;
        // A column `input` may be what is asked, with nothing beside it.
        let is_asked = self.layout.columns.name("input") == self.layout.columns.name("instruction");
        let input = if is_asked { None } else { self.optional_text(record, "input")? }.unwrap_or_default();
        let output = self.string(record, "output")?;
        let mut turns = Vec::new();
        let name = self.layout.columns.name("history");
        if let Some(value) = record.fields.get(name).filter(|value| says_something(value)) {
            let decoded = value.as_str().and_then(list_in_text);
            turns = self.history(record, name, decoded.as_ref().unwrap_or(value), found)?;
        }
        let beside = ["system", "tools"].map(|column| record.fields.get(self.layout.columns.name(column)));
        let has_more = beside.into_iter().flatten().any(says_something)
            || record.fields.get(VARIABLES).is_some_and(says_something);
        if turns.is_empty() && !has_more {
            return Ok(RowText::Instruction { instruction, input, output });
        }
        turns.extend(super::render::instruction_messages(&instruction, &input, &output));
        Ok(RowText::Chat(self.conversation(record, turns, found)?))
    }

    /// Earlier turns: pairs of what was asked and answered, or messages.
    fn history(&self, record: &Record, name: &str, value: &Value, found: &mut Found) -> Result<Vec<Message>, Error> {
        const PAIRS: &str = "a list of pairs [question, answer], or of messages";
        let wrong = |value: &Value| self.column_type(record, name.to_owned(), describe(value), PAIRS);
        let list = value.as_array().ok_or_else(|| wrong(value))?;
        if list.first().is_some_and(Value::is_object) {
            return self.messages(record, name, value, found);
        }
        let mut turns = Vec::new();
        for pair in list {
            let texts: Vec<&str> = pair.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let [asked, answered] = texts[..] else { return Err(wrong(pair)) };
            turns.extend([Message::new("user", asked), Message::new("assistant", answered)]);
        }
        Ok(turns)
    }

    /// Counts what the row holds that was not read, or refuses it.
    fn note(&self, record: &Record, text: &RowText, mut found: Found, reading: &mut Reading) -> Result<(), Error> {
        let is_chat = matches!(text, RowText::Chat(_));
        for (name, value) in record.fields.iter().filter(|(_, value)| says_something(value)) {
            let is_read = match name.as_str() {
                VARIABLES => is_chat,
                // Of two texts there is no conversation for them to stand in.
                _ if [self.layout.columns.name("system"), self.layout.columns.name("tools")]
                    .contains(&name.as_str()) =>
                {
                    is_chat && self.layout.reads(name)
                }
                name => self.layout.reads(name),
            };
            if is_read || WITHOUT_EFFECT.contains(&name.as_str()) {
                continue;
            }
            if let Some(reason) = self.reason(name, value) {
                found.changes.get_or_insert((name.clone(), reason));
            }
            count(&mut reading.columns_not_read, name, record.line);
            if self.options.unknown_columns == UnknownColumns::Refuse {
                found.changes.get_or_insert((name.clone(), "is not read"));
            }
        }
        for key in &found.keys {
            count(&mut reading.keys_not_read, key, record.line);
            if self.options.unknown_columns == UnknownColumns::Refuse {
                found.changes.get_or_insert((format!("the key {key}"), "is not read"));
            }
        }
        for role in &found.roles {
            count(&mut reading.other_roles, role, record.line);
        }
        match found.changes {
            Some((what, reason)) if self.options.unknown_columns != UnknownColumns::Note => Err(Error::NotRead {
                path: self.path.to_owned(),
                line: record.line,
                what,
                reason,
                advice: match self.options.names.unknown_columns {
                    Some(key) => format!(", or set {key}=note to learn the rest as it is"),
                    None => String::new(),
                },
            }),
            _ => Ok(()),
        }
    }

    /// Why something else would be learnt if the column were read; nothing where that is not known.
    fn reason(&self, name: &str, value: &Value) -> Option<&'static str> {
        let name = name.to_ascii_lowercase();
        match name.as_str() {
            _ if MEDIA.contains(&name.as_str()) => Some("holds what models here cannot read: they read text alone"),
            "system" | "system_prompt" | "tools" | "history" => {
                Some("is not read in rows of this format: give them as messages, or as instruction and output")
            }
            "label" if value.is_boolean() && self.layout.format == RowFormat::PromptCompletion => Some(
                "says which answers are good and which are bad, which is for a method of learning from preferences (KTO) that there is none of here",
            ),
            "weight" | "sample_weight" if value.as_f64().is_some_and(|weight| weight != 1.0) => {
                Some("weighs rows against each other, and all rows count the same here")
            }
            _ => None,
        }
    }

    fn value<'r>(&self, record: &'r Record, column: &str) -> Result<&'r Value, Error> {
        let name = self.layout.columns.name(column);
        record.fields.get(name).ok_or_else(|| self.missing(record, name))
    }

    fn missing(&self, record: &Record, column: &str) -> Error {
        let nearest = nearest(column, record.fields.keys().map(String::as_str));
        let advice = match nearest.filter(|(_, similarity)| *similarity >= LEAST_SIMILAR) {
            Some((found, _)) => {
                let Names { columns, format, .. } = self.options.names;
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
                let name = self.layout.columns.name(column).to_owned();
                let found = if other.is_null() {
                    "nothing (null, or a NaN where a text was missing)".to_owned()
                } else {
                    describe(other)
                };
                Err(self.column_type(record, name, found, "a text, in quotation marks"))
            }
        }
    }

    /// The text of a column that a row may do without; none where it is empty.
    fn optional_text(&self, record: &Record, column: &str) -> Result<Option<String>, Error> {
        match record.fields.get(self.layout.columns.name(column)) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.string(record, column).map(|text| Some(text).filter(|text| !text.is_empty())),
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
}

/// A column of further variables for the chat template.
pub(super) const VARIABLES: &str = "chat_template_kwargs";
/// Variables that are the row's own, by which it is known what is learnt.
const RESERVED: [&str; 2] = ["messages", "add_generation_prompt"];

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
        read_rows(&Files::from(&path), &ReadOptions { format, columns, ..ReadOptions::AUTO })
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
        Message::new(role, content)
    }

    #[test]
    fn the_columns_tell_the_format() {
        let chat = r#"{"messages": [{"role": "user", "content": "q", "id": 1}, {"role": "assistant", "content": "a"}], "id": 7}"#;
        let file = read("a.jsonl", chat).unwrap();
        assert_eq!(file.format, RowFormat::Messages);
        assert_eq!(file.rows[0].text, RowText::Chat(vec![message("user", "q"), message("assistant", "a")].into()));
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
        assert!(error("a.txt", "text").contains(".jsonl, .json, .csv, .tsv or .parquet"));
        assert!(read_rows(&Files::from("absent.jsonl"), &ReadOptions::AUTO).is_err());
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
        let nobody = error("a.jsonl", r#"{"messages": [{"speaker": "human", "value": "v"}]}"#);
        assert!(nobody.contains("messages[0].role is missing (the message has \"speaker\", \"value\")"), "{nobody}");
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
}
