//! Reader of GGUF files, versions 2 and 3 (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>); their writer is in `write.rs`.
//!
//! Works on the bytes of the whole file, normally a memory map, and copies none of the tensors nor the long metadata arrays.
//! Every file is treated as hostile: each length is checked against what is left of the file before anything is allocated or
//! sliced, and everything is checked while parsing, so that what [`Gguf::parse`] returns can be used without further care.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use retune_quant::{Format, SharedBytes};

use crate::error::Error;

pub mod write;

const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml's GGML_MAX_DIMS.
const MAX_DIMENSIONS: u32 = 4;
/// Arrays of arrays are legal but used by no known model; deeper ones are an attack on the stack.
const MAX_NESTING: usize = 4;
/// Smallest possible sizes of a metadata entry (key length, type, one byte) and of a tensor's entry (name length, number of
/// dimensions, one dimension, type, offset): they bound the counts that a file of a given size can hold.
const MIN_ENTRY_BYTES: usize = 8 + 4 + 1;
const MIN_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// A parsed GGUF file.
pub struct Gguf {
    /// Format version, 2 or 3.
    pub version: u32,
    /// The key-value pairs of the header.
    pub metadata: Metadata,
    /// The tensors in file order; names are unique.
    pub tensors: Vec<TensorInfo>,
}

/// A tensor of a GGUF file.
pub struct TensorInfo {
    pub name: String,
    /// Sizes in GGUF's order, fastest-varying first: a matrix of `rows` x `cols` has `[cols, rows]`. None is zero.
    pub dims: Vec<usize>,
    pub format: Format,
    /// Exactly the tensor's bytes.
    pub bytes: SharedBytes,
}

impl TensorInfo {
    /// Sizes in the usual order, slowest-varying first: `[rows, cols]`, or `[n]`.
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().rev().copied().collect()
    }
}

impl Gguf {
    /// Parses the bytes of a whole file.
    ///
    /// # Errors
    /// Anything that is not a complete little-endian GGUF v2 or v3 file, a tensor type that cannot be decoded, and
    /// one part of a split model.
    pub fn parse(bytes: SharedBytes) -> Result<Gguf, Error> {
        let mut reader = Reader { bytes: &bytes[..], at: 0 };
        let (version, tensor_count, entry_count) = read_header(&mut reader)?;
        let (entries, places) = read_entries(&mut reader, entry_count)?;
        let metadata = Metadata { entries, places, bytes: bytes.clone() };
        if let Some(count) = metadata.get_u64("split.count")?.filter(|&count| count > 1) {
            return Err(Error::GgufSplit { count });
        }
        let alignment = metadata.get_u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() {
            return Err(header_error(format!("an alignment of {alignment}"), "a power of two"));
        }
        let placements = read_placements(&mut reader, tensor_count)?;
        let data_start = (reader.at as u64)
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| header_error(format!("an alignment of {alignment}"), "one smaller than the file"))?;
        let tensors =
            placements.into_iter().map(|p| p.locate(&bytes, data_start, alignment)).collect::<Result<Vec<_>, _>>()?;
        Ok(Gguf { version, metadata, tensors })
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

/// Version, number of tensors, number of metadata entries.
fn read_header(reader: &mut Reader) -> Result<(u32, u64, u64), Error> {
    let magic: [u8; 4] = reader.array("the magic number")?;
    if &magic != b"GGUF" {
        return Err(Error::GgufMagic { found: magic.escape_ascii().to_string() });
    }
    let version = reader.u32("the version")?;
    if matches!(version.swap_bytes(), 1..=3) {
        return Err(Error::GgufBigEndian);
    }
    if !matches!(version, 2 | 3) {
        return Err(Error::GgufVersion { found: version });
    }
    let tensor_count = reader.u64("the number of tensors")?;
    let entry_count = reader.u64("the number of metadata entries")?;
    reader.check_count("the list of tensors", tensor_count, MIN_TENSOR_BYTES)?;
    reader.check_count("the metadata", entry_count, MIN_ENTRY_BYTES)?;
    Ok((version, tensor_count, entry_count))
}

/// The values, and where in the file each stands with its type.
type Entries = (BTreeMap<String, Value>, Vec<(String, Range<usize>)>);

fn read_entries(reader: &mut Reader, count: u64) -> Result<Entries, Error> {
    let mut entries = BTreeMap::new();
    let mut places = Vec::new();
    for _ in 0..count {
        let key = reader.string("a metadata key")?.to_owned();
        let start = reader.at;
        let kind = ValueType::from_id(reader.u32(&key)?, &key)?;
        let value = read_value(reader, kind, &key, 0)?;
        if entries.contains_key(&key) {
            return Err(header_error(format!("metadata key {key:?} twice"), "every key once"));
        }
        places.push((key.clone(), start..reader.at));
        entries.insert(key, value);
    }
    Ok((entries, places))
}

fn read_placements(reader: &mut Reader, count: u64) -> Result<Vec<Placement>, Error> {
    let mut placements = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..count {
        let name = reader.string("a tensor name")?.to_owned();
        if !names.insert(name.clone()) {
            return Err(header_error(format!("tensor {name} twice"), "every tensor once"));
        }
        let dimensions = reader.u32(&name)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(header_error(format!("tensor {name} with {dimensions} dimensions"), "1 to 4"));
        }
        let dims = (0..dimensions).map(|_| reader.u64(&name)).collect::<Result<Vec<_>, _>>()?;
        let kind = reader.u32(&name)?;
        let offset = reader.u64(&name)?;
        placements.push(Placement { name, dims, kind, offset });
    }
    Ok(placements)
}

/// What the header says of one tensor, before it is held against the file.
struct Placement {
    name: String,
    dims: Vec<u64>,
    kind: u32,
    /// From the start of the data section.
    offset: u64,
}

impl Placement {
    fn locate(self, bytes: &SharedBytes, data_start: u64, alignment: u64) -> Result<TensorInfo, Error> {
        let Placement { name, dims, kind, offset } = self;
        let format = Format::from_ggml_type(kind).map_err(|error| Error::Tensor { tensor: name.clone(), error })?;
        let dims_error =
            || header_error(format!("tensor {name} with sizes {dims:?}"), "sizes whose product fits in memory");
        let sizes: Vec<usize> = dims
            .iter()
            .map(|&dim| usize::try_from(dim).ok().filter(|&dim| dim > 0))
            .collect::<Option<_>>()
            .ok_or_else(dims_error)?;
        let (&cols, outer) = sizes.split_first().ok_or_else(dims_error)?;
        let rows = outer.iter().try_fold(1usize, |rows, &dim| rows.checked_mul(dim)).ok_or_else(dims_error)?;
        if !cols.is_multiple_of(format.block_len()) {
            let expected = format!("a multiple of {}, as {format} needs", format.block_len());
            return Err(header_error(format!("tensor {name} with rows of {cols} values"), &expected));
        }
        let len = format.bytes_for(rows, cols).ok_or_else(dims_error)?;
        if !offset.is_multiple_of(alignment) {
            return Err(header_error(
                format!("tensor {name} at offset {offset}"),
                &format!("a multiple of {alignment}"),
            ));
        }
        let start = data_start.saturating_add(offset);
        let end = start.saturating_add(len as u64);
        let slice = match (usize::try_from(start), usize::try_from(end)) {
            (Ok(start), Ok(end)) => bytes.slice(start..end),
            _ => None,
        };
        match slice.filter(|slice| slice.len() == len) {
            Some(slice) => Ok(TensorInfo { name, dims: sizes, format, bytes: slice }),
            None => Err(Error::Truncated { what: format!("tensor {name}"), needs: end, has: bytes.len() as u64 }),
        }
    }
}

/// The key-value pairs of a GGUF header, with getters that convert between numeric types.
///
/// Every getter gives `Ok(None)` for a missing key and an error that names the key for a value that cannot be converted.
pub struct Metadata {
    entries: BTreeMap<String, Value>,
    /// Where each value stands with its type, in the order of the file.
    places: Vec<(String, Range<usize>)>,
    /// The whole file: arrays are decoded from it when asked for.
    bytes: SharedBytes,
}

impl Metadata {
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>, Error> {
        self.get(key, "an integer from 0 to 4294967295", |value| value.to_u64()?.try_into().ok())
    }

    pub fn get_u64(&self, key: &str) -> Result<Option<u64>, Error> {
        self.get(key, "an integer of at least 0", Value::to_u64)
    }

    /// A number of any type.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.get(key, "a number", Value::to_f32)
    }

    /// A bool, or a number that is 0 or 1.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.get(key, "true or false", Value::to_bool)
    }

    pub fn get_str(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(value_error(key, other, "a string")),
        }
    }

    pub fn get_str_array(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::Array { element: ValueType::String, len, data }) => {
                let mut reader = self.array_reader(data);
                (0..*len).map(|_| reader.string(key)).collect::<Result<Vec<_>, _>>().map(Some)
            }
            Some(other) => Err(value_error(key, other, "an array of strings")),
        }
    }

    pub fn get_f32_array(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.get_array(key, "an array of numbers", Value::to_f32)
    }

    pub fn get_i32_array(&self, key: &str) -> Result<Option<Vec<i32>>, Error> {
        self.get_array(key, "an array of 32-bit integers", |value| value.to_integer()?.try_into().ok())
    }

    /// Bytes, which some writers call signed.
    pub fn get_u8_array(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        self.get_array(key, "an array of bytes", |value| match value.to_integer()? {
            byte @ -128..0 => Some(byte as i8 as u8),
            byte => byte.try_into().ok(),
        })
    }

    /// An array of integers; a single integer counts as an array of one. Layer sizes come in both spellings.
    pub fn get_u64_array(&self, key: &str) -> Result<Option<Vec<u64>>, Error> {
        match self.entries.get(key) {
            Some(Value::Array { .. }) => self.get_array(key, "an array of integers of at least 0", Value::to_u64),
            _ => Ok(self.get_u64(key)?.map(|value| vec![value])),
        }
    }

    /// Each key with its type and value as the file holds them, in its order.
    fn encoded(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.places.iter().map(|(key, place)| (key.as_str(), self.bytes.get(place.clone()).unwrap_or_default()))
    }

    fn get<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| value_error(key, value, expected)),
        }
    }

    fn get_array<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let (element, len, data) = match self.entries.get(key) {
            None => return Ok(None),
            Some(Value::Array { element, len, data }) => (*element, *len, data),
            Some(other) => return Err(value_error(key, other, expected)),
        };
        let mut reader = self.array_reader(data);
        let mut values = Vec::with_capacity(len);
        for _ in 0..len {
            let value = read_value(&mut reader, element, key, 1)?;
            values.push(convert(&value).ok_or_else(|| value_error(key, &value, expected))?);
        }
        Ok(Some(values))
    }

    fn array_reader(&self, data: &Range<usize>) -> Reader<'_> {
        Reader { bytes: self.bytes.get(data.clone()).unwrap_or_default(), at: 0 }
    }
}

/// A metadata value. Integers of every width share a variant, and so do both float types.
enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    /// `data` is where the elements lie in the file; they were checked when it was parsed.
    Array {
        element: ValueType,
        len: usize,
        data: Range<usize>,
    },
}

impl Value {
    /// Integers, and floats without a fraction.
    fn to_integer(&self) -> Option<i128> {
        match *self {
            Value::Integer(value) => Some(value),
            Value::Float(value) if value.fract() == 0.0 && value.abs() < 2f64.powi(53) => Some(value as i128),
            _ => None,
        }
    }

    fn to_u64(&self) -> Option<u64> {
        self.to_integer()?.try_into().ok()
    }

    fn to_f32(&self) -> Option<f32> {
        match *self {
            Value::Integer(value) => Some(value as f32),
            Value::Float(value) => Some(value as f32),
            _ => None,
        }
    }

    fn to_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(value) => Some(*value),
            other => match other.to_integer()? {
                0 => Some(false),
                1 => Some(true),
                _ => None,
            },
        }
    }

    fn describe(&self) -> String {
        match self {
            Value::Integer(value) => format!("the integer {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::Bool(value) => format!("the bool {value}"),
            Value::Text(text) => format!("the string {:?}", text.chars().take(40).collect::<String>()),
            Value::Array { element, len, .. } => format!("an array of {len} values of type {element:?}"),
        }
    }
}

/// Type tags of metadata values, in the order of their numbers in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    fn from_id(id: u32, key: &str) -> Result<ValueType, Error> {
        use ValueType::*;
        const IN_ORDER: [ValueType; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        IN_ORDER
            .get(id as usize)
            .copied()
            .ok_or_else(|| header_error(format!("value type {id} of metadata {key:?}"), "0 to 12"))
    }

    /// Bytes of one value; of strings and arrays the least they can have.
    fn min_bytes(self) -> usize {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => 1,
            U16 | I16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 | String => 8,
            Array => 4 + 8,
        }
    }
}

fn read_value(reader: &mut Reader, kind: ValueType, key: &str, nesting: usize) -> Result<Value, Error> {
    Ok(match kind {
        ValueType::U8 => Value::Integer(u8::from_le_bytes(reader.array(key)?).into()),
        ValueType::I8 => Value::Integer(i8::from_le_bytes(reader.array(key)?).into()),
        ValueType::U16 => Value::Integer(u16::from_le_bytes(reader.array(key)?).into()),
        ValueType::I16 => Value::Integer(i16::from_le_bytes(reader.array(key)?).into()),
        ValueType::U32 => Value::Integer(u32::from_le_bytes(reader.array(key)?).into()),
        ValueType::I32 => Value::Integer(i32::from_le_bytes(reader.array(key)?).into()),
        ValueType::U64 => Value::Integer(u64::from_le_bytes(reader.array(key)?).into()),
        ValueType::I64 => Value::Integer(i64::from_le_bytes(reader.array(key)?).into()),
        ValueType::F32 => Value::Float(f32::from_le_bytes(reader.array(key)?).into()),
        ValueType::F64 => Value::Float(f64::from_le_bytes(reader.array(key)?)),
        ValueType::Bool => match reader.array::<1>(key)? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => return Err(header_error(format!("{other} as the bool {key:?}"), "0 or 1")),
        },
        ValueType::String => Value::Text(reader.string(key)?.to_owned()),
        ValueType::Array => read_array(reader, key, nesting)?,
    })
}

/// Checks an array and remembers where it lies.
fn read_array(reader: &mut Reader, key: &str, nesting: usize) -> Result<Value, Error> {
    if nesting >= MAX_NESTING {
        return Err(header_error(
            format!("metadata {key:?} with arrays in arrays"),
            &format!("at most {MAX_NESTING} levels"),
        ));
    }
    let element = ValueType::from_id(reader.u32(key)?, key)?;
    let count = reader.u64(key)?;
    let len = reader.check_count(key, count, element.min_bytes())?;
    let start = reader.at;
    match element {
        ValueType::String => {
            for _ in 0..len {
                reader.string(key)?;
            }
        }
        ValueType::Array => {
            for _ in 0..len {
                read_array(reader, key, nesting + 1)?;
            }
        }
        fixed => {
            reader.take(count.saturating_mul(fixed.min_bytes() as u64), key)?;
        }
    }
    Ok(Value::Array { element, len, data: start..reader.at })
}

fn header_error(found: String, expected: &str) -> Error {
    Error::GgufHeader { found, expected: expected.to_owned() }
}

fn value_error(key: &str, value: &Value, expected: &'static str) -> Error {
    Error::GgufValue { key: key.to_owned(), found: value.describe(), expected }
}

/// A place in the file. `at` never exceeds the number of bytes.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], Error> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        match end.and_then(|end| self.bytes.get(self.at..end)) {
            Some(slice) => {
                self.at += slice.len();
                Ok(slice)
            }
            None => Err(self.truncated(what, len)),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<&'a str, Error> {
        let len = self.u64(what)?;
        let start = self.at;
        std::str::from_utf8(self.take(len, what)?)
            .map_err(|_| header_error(format!("bytes that are not text at byte {start} ({what})"), "UTF-8"))
    }

    /// Fails when `count` items of at least `min_bytes` each cannot be in the rest of the file.
    fn check_count(&self, what: &str, count: u64, min_bytes: usize) -> Result<usize, Error> {
        let room = (self.bytes.len() - self.at) / min_bytes;
        match usize::try_from(count) {
            Ok(count) if count <= room => Ok(count),
            _ => Err(self.truncated(what, count.saturating_mul(min_bytes as u64))),
        }
    }

    fn truncated(&self, what: &str, len: u64) -> Error {
        let needs = (self.at as u64).saturating_add(len);
        Error::Truncated { what: what.to_owned(), needs, has: self.bytes.len() as u64 }
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod testing {
    //! Writes GGUF bytes by hand, valid or not.

    #[derive(Clone, Default)]
    pub struct GgufBytes {
        entries: Vec<u8>,
        entry_count: u64,
        tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    }

    fn put_str(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    impl GgufBytes {
        /// An entry of any type, its value already encoded.
        pub fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
            put_str(&mut self.entries, key);
            self.entries.extend(kind.to_le_bytes());
            self.entries.extend(value);
            self.entry_count += 1;
            self
        }

        pub fn u32(self, key: &str, value: u32) -> Self {
            self.entry(key, 4, &value.to_le_bytes())
        }

        pub fn f32(self, key: &str, value: f32) -> Self {
            self.entry(key, 6, &value.to_le_bytes())
        }

        pub fn bool(self, key: &str, value: bool) -> Self {
            self.entry(key, 7, &[u8::from(value)])
        }

        pub fn str(self, key: &str, value: &str) -> Self {
            let mut bytes = Vec::new();
            put_str(&mut bytes, value);
            self.entry(key, 8, &bytes)
        }

        pub fn str_array(self, key: &str, values: &[&str]) -> Self {
            let mut bytes = 8u32.to_le_bytes().to_vec();
            bytes.extend((values.len() as u64).to_le_bytes());
            for value in values {
                put_str(&mut bytes, value);
            }
            self.entry(key, 9, &bytes)
        }

        pub fn i32_array(self, key: &str, values: &[i32]) -> Self {
            self.array(key, 5, values.iter().map(|value| value.to_le_bytes()))
        }

        pub fn f32_array(self, key: &str, values: &[f32]) -> Self {
            self.array(key, 6, values.iter().map(|value| value.to_le_bytes()))
        }

        fn array(self, key: &str, kind: u32, values: impl ExactSizeIterator<Item = [u8; 4]>) -> Self {
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend((values.len() as u64).to_le_bytes());
            bytes.extend(values.flatten());
            self.entry(key, 9, &bytes)
        }

        /// `dims` in GGUF's order.
        pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: &[u8]) -> Self {
            self.tensors.push((name.to_owned(), dims.to_vec(), kind, data.to_vec()));
            self
        }

        pub fn f32_tensor(self, name: &str, dims: &[u64], values: &[f32]) -> Self {
            let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            self.tensor(name, dims, 0, &data)
        }

        pub fn without_tensor(mut self, name: &str) -> Self {
            self.tensors.retain(|tensor| tensor.0 != name);
            self
        }

        /// The header alone, up to the padding before the data.
        pub fn header(&self) -> Vec<u8> {
            let mut out = b"GGUF".to_vec();
            out.extend(3u32.to_le_bytes());
            out.extend((self.tensors.len() as u64).to_le_bytes());
            out.extend(self.entry_count.to_le_bytes());
            out.extend(&self.entries);
            let mut offset = 0u64;
            for (name, dims, kind, data) in &self.tensors {
                put_str(&mut out, name);
                out.extend((dims.len() as u32).to_le_bytes());
                for dim in dims {
                    out.extend(dim.to_le_bytes());
                }
                out.extend(kind.to_le_bytes());
                out.extend(offset.to_le_bytes());
                offset += (data.len() as u64).next_multiple_of(32);
            }
            out
        }

        /// The whole file; nothing follows the last tensor's bytes.
        pub fn build(&self) -> Vec<u8> {
            let mut out = self.header();
            for (.., data) in &self.tensors {
                out.resize(out.len().next_multiple_of(32), 0);
                out.extend(data);
            }
            out
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::GgufBytes;
    use super::*;

    fn parse(bytes: Vec<u8>) -> Result<Gguf, Error> {
        Gguf::parse(SharedBytes::from_vec(bytes))
    }

    fn error(bytes: Vec<u8>) -> String {
        parse(bytes).err().expect("must be refused").to_string()
    }

    fn example() -> GgufBytes {
        GgufBytes::default()
            .str("general.architecture", "llama")
            .u32("llama.block_count", 2)
            .entry("a.u8", 0, &[7])
            .entry("a.i8", 1, &[0xff])
            .entry("a.u16", 2, &513u16.to_le_bytes())
            .entry("a.i64", 11, &3i64.to_le_bytes())
            .entry("a.f64", 12, &2.5f64.to_le_bytes())
            .entry("a.bool", 7, &[1])
            .f32("a.f32", 10000.0)
            .str_array("a.tokens", &["<s>", "é", ""])
            .entry(
                "a.scores",
                9,
                &[&6u32.to_le_bytes()[..], &2u64.to_le_bytes(), &1f32.to_le_bytes(), &(-2f32).to_le_bytes()].concat(),
            )
            .entry(
                "a.types",
                9,
                &[&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &1i32.to_le_bytes(), &(-1i32).to_le_bytes()].concat(),
            )
            .entry(
                "a.nested",
                9,
                &[&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &0u32.to_le_bytes(), &1u64.to_le_bytes(), &[5]]
                    .concat(),
            )
            .f32_tensor("norm", &[3], &[1.0, 2.0, 3.0])
            .f32_tensor("matrix", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
            .tensor("blocks", &[32, 2], 8, &[1; 68])
    }

    #[test]
    fn reads_every_value_type_and_converts_numbers() {
        let file = parse(example().build()).unwrap();
        let metadata = &file.metadata;
        assert_eq!(file.version, 3);
        assert_eq!(metadata.get_str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(metadata.get_u32("llama.block_count").unwrap(), Some(2));
        assert_eq!(metadata.get_u64("a.u8").unwrap(), Some(7));
        assert_eq!(metadata.get_u32("a.u16").unwrap(), Some(513));
        assert_eq!(metadata.get_u64("a.i64").unwrap(), Some(3));
        assert_eq!(metadata.get_u64("a.f32").unwrap(), Some(10000));
        assert_eq!(metadata.get_f32("a.f64").unwrap(), Some(2.5));
        assert_eq!(metadata.get_f32("a.i8").unwrap(), Some(-1.0));
        assert_eq!(metadata.get_bool("a.bool").unwrap(), Some(true));
        assert_eq!(metadata.get_str_array("a.tokens").unwrap(), Some(vec!["<s>", "é", ""]));
        assert_eq!(metadata.get_f32_array("a.scores").unwrap(), Some(vec![1.0, -2.0]));
        assert_eq!(metadata.get_i32_array("a.types").unwrap(), Some(vec![1, -1]));
        assert_eq!(metadata.get_u64_array("llama.block_count").unwrap(), Some(vec![2]));
        assert_eq!(metadata.get_u32("missing").unwrap(), None);
        assert!(metadata.entries.contains_key("a.nested"));
        assert_eq!(metadata.entries.len(), 13);
    }

    #[test]
    fn a_value_of_another_type_is_an_error_that_names_the_key() {
        let file = parse(example().build()).unwrap();
        let text = file.metadata.get_u32("a.i8").err().unwrap().to_string();
        assert!(text.contains("a.i8") && text.contains("-1"), "{text}");
        assert!(file.metadata.get_u32("a.f64").is_err());
        assert!(file.metadata.get_bool("a.u8").is_err());
        assert!(file.metadata.get_str("a.tokens").is_err());
        assert!(file.metadata.get_str_array("a.types").is_err());
        assert!(file.metadata.get_f32_array("a.tokens").is_err());
        assert!(file.metadata.get_u64_array("a.types").is_err());
        assert!(file.metadata.get_i32_array("a.nested").is_err());
    }

    #[test]
    fn locates_tensors() {
        let file = parse(example().build()).unwrap();
        let matrix = file.tensor("matrix").unwrap();
        assert_eq!((matrix.shape(), matrix.format), (vec![3, 2], Format::F32));
        assert_eq!(matrix.bytes[..4], 1f32.to_le_bytes());
        assert_eq!(matrix.bytes.len(), 24);
        let blocks = file.tensor("blocks").unwrap();
        assert_eq!((blocks.format, blocks.bytes.len()), (Format::Q8_0, 68));
        assert!(file.tensor("other").is_none());
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = example().build();
        for len in 0..bytes.len() {
            assert!(parse(bytes[..len].to_vec()).is_err(), "{len} of {} bytes", bytes.len());
        }
    }

    #[test]
    fn no_changed_bit_of_the_header_panics() {
        let bytes = example().build();
        for bit in 0..example().header().len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            if let Ok(file) = parse(changed) {
                for key in file.metadata.entries.keys() {
                    let _ = file.metadata.get_str_array(key);
                    let _ = file.metadata.get_f32_array(key);
                    let _ = file.metadata.get_u64_array(key);
                    let _ = file.metadata.get_bool(key);
                }
            }
        }
    }

    #[test]
    fn no_random_bytes_panic() {
        let mut state = 1u64;
        let mut next = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        let bytes = example().build();
        for _ in 0..2000 {
            let mut changed = bytes.clone();
            for _ in 0..1 + next() % 8 {
                let at = 8 + next() % (bytes.len() - 8);
                changed[at] = [0, 0xff, 0x80, 1][next() % 4];
            }
            let _ = parse(changed);
        }
    }

    #[test]
    fn other_files_and_versions_are_named() {
        assert!(error(b"PK\x03\x04 a zip file, 24 bytes".to_vec()).contains("PK"));
        let mut old = example().build();
        old[4] = 1;
        assert!(error(old).contains("version 1"));
        let mut big = example().build();
        big[4..8].copy_from_slice(&3u32.to_be_bytes());
        assert!(error(big).contains("big-endian"));
        let text = error(example().entry("split.count", 2, &3u16.to_le_bytes()).build());
        assert!(text.contains("3 parts") && text.contains("--merge"), "{text}");
    }

    #[test]
    fn huge_counts_are_refused_before_allocating() {
        for at in [8, 16] {
            let mut bytes = example().build();
            bytes[at..at + 8].copy_from_slice(&(1u64 << 60).to_le_bytes());
            let text = error(bytes);
            assert!(text.contains("truncated"), "{text}");
        }
        for kind in [0u32, 8, 9, 12] {
            let array = [&kind.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
            assert!(error(GgufBytes::default().entry("huge", 9, &array).build()).contains("huge"));
        }
        assert!(error(GgufBytes::default().entry("text", 8, &u64::MAX.to_le_bytes()).build()).contains("text"));
    }

    #[test]
    fn deep_arrays_are_refused() {
        let mut value = Vec::new();
        for _ in 0..10_000 {
            value.extend(9u32.to_le_bytes());
            value.extend(1u64.to_le_bytes());
        }
        assert!(error(GgufBytes::default().entry("deep", 9, &value).build()).contains("arrays in arrays"));
    }

    #[test]
    fn impossible_tensors_are_refused() {
        let tensor = |dims: &[u64], kind| error(GgufBytes::default().tensor("x", dims, kind, &[0; 64]).build());
        assert!(tensor(&[1 << 40, 1 << 40], 0).contains("sizes"));
        assert!(tensor(&[1 << 62], 0).contains('x'));
        assert!(tensor(&[0, 4], 0).contains("sizes"));
        assert!(tensor(&[], 0).contains("0 dimensions"));
        assert!(tensor(&[1; 5], 0).contains("5 dimensions"));
        assert!(tensor(&[33], 8).contains("multiple of 32"));
        assert!(tensor(&[17], 0).contains("truncated"));
        assert!(tensor(&[16], 9999).contains('x'));
    }

    #[test]
    fn repeated_names_bad_text_and_bad_alignment_are_refused() {
        assert!(error(example().u32("a.u8", 1).build()).contains("twice"));
        assert!(error(example().f32_tensor("norm", &[1], &[0.0]).build()).contains("twice"));
        assert!(error(example().entry("text", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).build()).contains("UTF-8"));
        assert!(error(example().entry("flag", 7, &[2]).build()).contains("flag"));
        assert!(error(example().entry("odd", 13, &[2]).build()).contains("13"));
        for alignment in [0, 3] {
            assert!(error(example().u32("general.alignment", alignment).build()).contains("power of two"));
        }
        assert!(parse(example().entry("general.alignment", 10, &(1u64 << 63).to_le_bytes()).build()).is_err());
    }
}
