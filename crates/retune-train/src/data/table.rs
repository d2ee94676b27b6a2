//! Tables to rows: a header line, then a row a line, in CSV with commas, semicolons, tabs or vertical bars.

use std::path::Path;

use serde_json::Value;

use super::read::Record;
use crate::error::Error;

const CSV: &str = "a header line with the columns' names, then as many fields in every row";
/// What separates columns, in the order of preference; a comma where the header has none of them.
const SEPARATORS: [u8; 4] = [b',', b'\t', b';', b'|'];

/// The rows of a table. `separator` is what the file's name says of it.
///
/// # Errors
/// A header that names a column twice; the first row that `on_bad_row` does not take.
pub(super) fn records(
    path: &Path,
    text: &str,
    separator: Option<u8>,
    on_bad_row: &mut dyn FnMut(Error) -> Result<(), Error>,
) -> Result<Vec<Record>, Error> {
    let syntax = |line: usize, cause: String| Error::Syntax { path: path.to_owned(), line, cause, expected: CSV };
    let error = |error: csv::Error| {
        let line = error.position().map_or(1, |position| position.line() as usize);
        syntax(line, error.to_string())
    };
    let mut reader = csv::ReaderBuilder::new().delimiter(separator_of(text, separator)).from_reader(text.as_bytes());
    let header = reader.headers().map_err(error)?.clone();
    for (at, name) in header.iter().enumerate() {
        if header.iter().take(at).any(|earlier| earlier == name) {
            return Err(syntax(1, format!("the column {name:?} is there twice")));
        }
    }
    let mut records = Vec::new();
    for record in reader.records() {
        match record {
            Ok(record) => {
                let line = record.position().map_or(1, |position| position.line() as usize);
                let fields = header.iter().zip(&record).map(|(name, field)| (name.to_owned(), Value::from(field)));
                records.push(Record { line, fields: fields.collect() });
            }
            Err(found) => on_bad_row(error(found))?,
        }
    }
    Ok(records)
}

/// The separator that the header has: the one of the file's name if it is there, else the first of all.
fn separator_of(text: &str, named: Option<u8>) -> u8 {
    let mut is_quoted = false;
    let header: Vec<u8> = text
        .bytes()
        .take_while(|&byte| byte != b'\n')
        .filter(|&byte| {
            is_quoted ^= byte == b'"';
            !is_quoted
        })
        .collect();
    let mut candidates = named.into_iter().chain(SEPARATORS);
    candidates.find(|separator| header.contains(separator)).unwrap_or(b',')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_tells_the_separator() {
        for (header, named, expected) in [
            ("a,b;c", None, b','),
            ("a;b", None, b';'),
            ("a\tb;c\n1,2", None, b'\t'),
            ("\"a,b\";c", None, b';'),
            ("a|b", None, b'|'),
            ("text", None, b','),
            ("a\tb,c", Some(b'\t'), b'\t'),
            ("a,b", Some(b'\t'), b','),
        ] {
            assert_eq!(separator_of(header, named), expected, "{header:?}");
        }
    }
}
