//! Parquet files to rows, as pandas, polars and datasets write them.
//!
//! Rows become the values that the same rows have in JSON. A column of JSON text that the file declares as such, by its type
//! or in what datasets writes about its features, is the value it stands for: what is learnt are texts, not their quotation marks.

use std::fs::File;
use std::path::Path;

use parquet::basic::LogicalType;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::read::Record;
use crate::error::{Error, shortened};

/// The rows of a Parquet file; they are numbered as lines are, from 1.
///
/// # Errors
/// A file that cannot be decoded.
pub(super) fn records(path: &Path) -> Result<Vec<Record>, Error> {
    // The crate has assertions that damaged files reach.
    std::panic::catch_unwind(|| decoded(path)).unwrap_or_else(|_| {
        Err(Error::Parquet { path: path.to_owned(), cause: "its pages are not what its header says".to_owned() })
    })
}

fn decoded(path: &Path) -> Result<Vec<Record>, Error> {
    let damaged = |error: parquet::errors::ParquetError| Error::Parquet {
        path: path.to_owned(),
        cause: shortened(&error.to_string(), 200),
    };
    let file = File::open(path).map_err(|error| Error::Read { path: path.to_owned(), error })?;
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    let metadata = reader.metadata().file_metadata();
    let features = metadata.key_value_metadata().into_iter().flatten();
    let features = features.filter(|entry| entry.key == "huggingface").find_map(|entry| {
        let about: Value = serde_json::from_str(entry.value.as_deref()?).ok()?;
        about.pointer("/info/features").cloned()
    });
    let schema = metadata.schema();
    let mut records = Vec::with_capacity(usize::try_from(metadata.num_rows()).unwrap_or(0).min(1 << 24));
    for (index, row) in reader.get_row_iter(None).map_err(damaged)?.enumerate() {
        let columns = row.map_err(damaged)?.into_columns();
        let value = |(name, field): (String, Field)| {
            let column = Column { of: child(schema, &name), feature: features.as_ref().and_then(|all| all.get(&name)) };
            let value = column.value(field);
            (name, value)
        };
        records.push(Record { line: index + 1, fields: columns.into_iter().map(value).collect() });
    }
    Ok(records)
}

fn child<'a>(group: &'a Type, name: &str) -> Option<&'a Type> {
    group
        .is_group()
        .then(|| group.get_fields().iter().find(|field| field.name() == name))
        .flatten()
        .map(|field| &**field)
}

/// What the file says of a value: its type in the schema, and its feature as datasets describes it.
#[derive(Clone, Copy)]
struct Column<'a> {
    of: Option<&'a Type>,
    feature: Option<&'a Value>,
}

impl Column<'_> {
    fn is_json(&self) -> bool {
        let by_type = self.of.is_some_and(|of| of.get_basic_info().logical_type_ref() == Some(&LogicalType::Json));
        by_type || self.feature.and_then(|feature| feature.get("_type")).and_then(Value::as_str) == Some("Json")
    }

    /// What the elements of a list are.
    fn element(&self) -> Column<'_> {
        let repeated = self.of.filter(|of| of.is_group()).and_then(|of| of.get_fields().first());
        let of = repeated.map(|repeated| match &**repeated {
            // The middle one of three levels.
            group if group.is_group() && group.get_fields().len() == 1 => {
                group.get_fields().first().map_or(group, |inner| &**inner)
            }
            other => other,
        });
        let feature = self.feature.and_then(|feature| feature.get("feature").or_else(|| feature.get(0)));
        Column { of, feature }
    }

    fn value(&self, field: Field) -> Value {
        let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
        match field {
            Field::Null => Value::Null,
            Field::Bool(value) => value.into(),
            Field::Byte(value) => value.into(),
            Field::Short(value) => value.into(),
            Field::Int(value) => self.class(value.into()),
            Field::Long(value) => self.class(value),
            Field::UByte(value) => value.into(),
            Field::UShort(value) => value.into(),
            Field::UInt(value) => value.into(),
            Field::ULong(value) => value.into(),
            Field::Float(value) => float(value.into()),
            Field::Double(value) => float(value),
            Field::Str(text) if self.is_json() => serde_json::from_str(&text).unwrap_or(Value::String(text)),
            Field::Str(text) => text.into(),
            Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
                Ok(text) => text.into(),
                // It is there all the same, and is counted or refused.
                Err(_) => serde_json::json!({ "bytes": bytes.data().len() }),
            },
            Field::Group(row) => {
                // A struct has all its keys in every row; one that holds nothing is one that the row did not have.
                let entries = row.into_columns().into_iter().map(|(name, field)| {
                    let of = self.of.and_then(|group| child(group, &name));
                    let value = Column { of, feature: self.feature.and_then(|all| all.get(&name)) }.value(field);
                    (name, value)
                });
                entries.filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>().into()
            }
            Field::ListInternal(list) => {
                let element = self.element();
                list.elements().iter().map(|field| element.value(field.clone())).collect::<Vec<_>>().into()
            }
            Field::MapInternal(map) => {
                let unknown = Column { of: None, feature: None };
                let key = |field: &Field| match unknown.value(field.clone()) {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
                let entries = map.entries().iter().map(|(name, field)| (key(name), unknown.value(field.clone())));
                entries.collect::<Map<_, _>>().into()
            }
            other => other.to_string().into(),
        }
    }

    /// A whole number, or the class it is the number of.
    fn class(&self, number: i64) -> Value {
        let names = self.feature.and_then(|feature| feature.get("names")).and_then(Value::as_array);
        let name = names.and_then(|names| names.get(usize::try_from(number).ok()?)).filter(|name| name.is_string());
        name.cloned().unwrap_or_else(|| number.into())
    }
}
