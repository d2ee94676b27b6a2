//! JSON files to rows: an object a line, objects one after another over as many lines as they like, or one array of objects.
//!
//! What people's files really have is read where it can mean one thing only (byte order marks in the middle, a comma after an
//! object, `NaN` as the value of a column); the rest is refused in words that name the cause.

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Map, Value};

use super::read::Record;
use crate::error::{Error, describe, quoted};

pub(super) const JSON: &str = "one JSON object a line, or an array of objects";

/// A file that is read, and what is done with a row that cannot be.
pub(super) struct Json<'a> {
    pub path: &'a Path,
    /// Takes the error of a row, or hands it back to stop the reading.
    pub on_bad_row: &'a mut dyn FnMut(Error) -> Result<(), Error>,
}

impl Json<'_> {
    pub fn records(&mut self, text: &str) -> Result<Vec<Record>, Error> {
        let text = &*without_nan(text);
        let is_array = text.trim_start_matches(is_blank).starts_with('[');
        let records = if is_array { self.array(text)? } else { self.lines(text)? };
        self.check_shape(&records)?;
        Ok(records)
    }

    /// A file that is one object with the rows inside is no row.
    fn check_shape(&self, records: &[Record]) -> Result<(), Error> {
        const HOLDERS: [&str; 9] =
            ["data", "rows", "train", "examples", "items", "instances", "records", "samples", "dataset"];
        let [record] = records else { return Ok(()) };
        let is_rows = |value: &Value| value.as_array().is_some_and(|list| list.first().is_some_and(Value::is_object));
        if let Some((key, _)) =
            record.fields.iter().find(|(key, value)| HOLDERS.contains(&key.as_str()) && is_rows(value))
        {
            let cause = format!("the file is one object, and its rows are the list under the key {key:?}");
            return Err(self.syntax(
                record.line,
                cause,
                "that list by itself: write what is between its [ and ], brackets included",
            ));
        }
        let is_column = |value: &Value| value.as_object().is_some_and(|map| map.contains_key("0"));
        if !record.fields.is_empty() && record.fields.values().all(is_column) {
            let cause =
                "the file is one object of columns, each with its rows by number, as pandas writes it".to_owned();
            return Err(self.syntax(
                record.line,
                cause,
                "one JSON object a line: df.to_json(path, orient=\"records\", lines=True)",
            ));
        }
        Ok(())
    }

    fn lines(&mut self, text: &str) -> Result<Vec<Record>, Error> {
        let mut records = Vec::new();
        let mut number = 0;
        let mut rest = text;
        while !rest.is_empty() {
            number += 1;
            let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
            let content = line.trim_matches(is_blank);
            if content.is_empty() {
                rest = after;
                continue;
            }
            match parse_line(content) {
                Ok(value) => match self.record(number, value) {
                    Ok(record) => records.push(record),
                    Err(error) => (self.on_bad_row)(error)?,
                },
                Err(error) => {
                    let spread = error.is_eof().then(|| first_value(rest)).flatten();
                    if let Some((value, length)) = spread {
                        records.push(self.record(number, value)?);
                        let (row, behind) = rest.split_at_checked(length).unwrap_or((rest, ""));
                        // What follows on the same line, a comma or the next object, is a line of its own to this loop.
                        number += newlines(row);
                        let behind = behind.trim_start_matches([' ', '\t', '\r']);
                        rest = behind.strip_prefix(',').unwrap_or(behind);
                        match rest.trim_start_matches([' ', '\t', '\r']).strip_prefix('\n') {
                            Some(next_line) => rest = next_line,
                            None => number -= 1,
                        }
                        continue;
                    }
                    let error = self.diagnose(number, content, &error);
                    (self.on_bad_row)(error)?;
                }
            }
            rest = after;
        }
        Ok(records)
    }

    /// Row by row, so that every row has its line.
    fn array(&mut self, text: &str) -> Result<Vec<Record>, Error> {
        let mut records = Vec::new();
        let mut line = 1;
        let mut rest = skip_space(text, &mut line);
        rest = skip_space(rest.strip_prefix('[').unwrap_or(rest), &mut line);
        let mut closed = rest.strip_prefix(']');
        while closed.is_none() {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let value = match values.next() {
                Some(Ok(value)) => value,
                Some(Err(error)) => {
                    let content = rest.lines().next().unwrap_or_default();
                    return Err(self.diagnose(line, content, &error));
                }
                None => return Err(self.syntax(line, "the array ends without `]`".to_owned(), JSON)),
            };
            let (row, after) = rest.split_at_checked(values.byte_offset()).unwrap_or((rest, ""));
            match self.record(line, value) {
                Ok(record) => records.push(record),
                Err(error) => (self.on_bad_row)(error)?,
            }
            line += newlines(row);
            rest = skip_space(after, &mut line);
            closed = rest.strip_prefix(']');
            if closed.is_none() {
                rest = match rest.strip_prefix(',') {
                    Some(after) => skip_space(after, &mut line),
                    None => return Err(self.syntax(line, "a row is not followed by `,` or `]`".to_owned(), JSON)),
                };
                // A comma after the last row, as JavaScript allows it.
                closed = rest.strip_prefix(']');
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

    /// What is wrong with a row, by the cause that a person can do something about. The parser counts lines from `line` on.
    fn diagnose(&self, line: usize, content: &str, error: &serde_json::Error) -> Error {
        if content.starts_with("version https://git-lfs") {
            let cause = "the file is a Git LFS pointer, not the data".to_owned();
            return self.syntax(line, cause, "the file itself: run `git lfs pull` where it was cloned");
        }
        if content.starts_with('<') {
            let cause = "this is HTML, perhaps the page around a download".to_owned();
            return self.syntax(line, cause, JSON);
        }
        if let Some(escape) = lone_surrogate(content) {
            let cause = format!("{escape} is half a character (an emoji cut in two by what wrote the file)");
            return self.syntax(line, cause, "whole characters: remove the half, or leave the row out");
        }
        let bare = |word: &&str| outside_strings(content).any(|(_, piece)| has_word(piece, word));
        let is_quoted_so = |piece: &str| ["{'", "['", ": '", ", '"].iter().any(|quote| piece.contains(quote));
        if outside_strings(content).any(|(_, piece)| is_quoted_so(piece)) || ["None", "True", "False"].iter().any(bare)
        {
            let cause = "the row is written as Python writes it, with ' for \" or with None, True or False".to_owned();
            return self.syntax(line, cause, "JSON: write rows with json.dumps(row)");
        }
        let text = error.to_string();
        // The parser appends its own line, which is of no use where it was given one line of many.
        let cause = text.split(" at line ").next().unwrap_or(&text);
        let cause = match cause {
            "trailing characters" => "something follows the object on its line".to_owned(),
            "control character (\\u0000-\\u001F) found while parsing a string" => {
                "a text goes on in the next line, or holds a tab or another control character, which JSON writes as \\n or \\t".to_owned()
            }
            _ => cause.to_owned(),
        };
        self.syntax(line + error.line().saturating_sub(1), format!("{cause} (column {})", error.column()), JSON)
    }

    fn syntax(&self, line: usize, cause: String, expected: &'static str) -> Error {
        Error::Syntax { path: self.path.to_owned(), line, cause, expected }
    }
}

/// White space, and the byte order marks that are left where files were put one after another.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || c == '\u{FEFF}'
}

/// The value of a line; a comma behind it can mean one thing only.
fn parse_line(line: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(line).or_else(|error| match line.strip_suffix(',') {
        Some(line) => serde_json::from_str(line).map_err(|_| error),
        None => Err(error),
    })
}

/// The first value of a text, an object over several lines, and how many bytes it takes.
fn first_value(text: &str) -> Option<(Value, usize)> {
    let parse = |text: &str| {
        let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        let value = values.next()?.ok()?;
        Some((value, values.byte_offset()))
    };
    let start = text.len() - text.trim_start_matches(is_blank).len();
    let (value, length) = parse(text.get(start..)?)?;
    value.is_object().then_some((value, start + length))
}

/// The pieces of a JSON text that stand outside its strings, each with where it starts. A string that is not closed ends with its line: what
/// follows is another row.
fn outside_strings(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = text.get(at..).filter(|rest| !rest.is_empty())?;
        let piece = rest.split('"').next().unwrap_or(rest);
        let start = at;
        at += piece.len() + 1;
        // Past the string that begins here.
        let mut escaped = false;
        let string = text.get(at..).unwrap_or_default();
        let end = string.bytes().position(|byte| {
            let ends = byte == b'\n' || (byte == b'"' && !escaped);
            escaped = byte == b'\\' && !escaped;
            ends
        });
        at += end.map_or(string.len(), |end| end + 1);
        Some((start, piece))
    })
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|piece| piece == word)
}

/// The text with `null` for the numbers that JSON has no way to write, which Python writes all the same.
fn without_nan(text: &str) -> Cow<'_, str> {
    const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !text.contains("NaN") && !text.contains("Infinity") {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for (start, piece) in outside_strings(text) {
        out.push_str(text.get(done..start).unwrap_or_default());
        let replaced = NUMBERS.iter().fold(piece.to_owned(), |piece, number| piece.replace(number, "null"));
        out.push_str(&replaced);
        done = start + piece.len();
    }
    out.push_str(text.get(done..).unwrap_or_default());
    if out == text { Cow::Borrowed(text) } else { Cow::Owned(out) }
}

/// The first escape that is half of a pair, as `\ud83d` without its second half.
fn lone_surrogate(text: &str) -> Option<&str> {
    let unit = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if bytes.get(at) != Some(&b'\\') {
            at += 1;
            continue;
        }
        match unit(at) {
            Some(0xD800..=0xDBFF) if matches!(unit(at + 6), Some(0xDC00..=0xDFFF)) => at += 12,
            Some(0xD800..=0xDFFF) => return text.get(at..at + 6),
            // The backslash and what it escapes.
            _ => at += 2,
        }
    }
    None
}

fn newlines(text: &str) -> usize {
    text.bytes().filter(|&byte| byte == b'\n').count()
}

/// What follows the white space at the start; its lines are counted.
fn skip_space<'a>(text: &'a str, line: &mut usize) -> &'a str {
    let rest = text.trim_start_matches(is_blank);
    *line += newlines(text.strip_suffix(rest).unwrap_or_default());
    rest
}

/// The value of a text that is JSON with a list in it: what a table, which has no lists, holds for one.
pub(super) fn list_in_text(text: &str) -> Option<Value> {
    let text = text.trim();
    if !text.starts_with('[') && !text.starts_with('{') {
        return None;
    }
    serde_json::from_str(text).ok()
}

/// The keys of an object, in quotation marks.
pub(super) fn keys(fields: &Map<String, Value>) -> String {
    quoted(fields.keys().map(String::as_str))
}
