//! Writer of GGUF files, version 3, little-endian: a header that is put together in memory, and rules for the bytes that follow it.

use std::collections::BTreeMap;
use std::sync::Arc;

use retune_quant::Format;

use super::{DEFAULT_ALIGNMENT, Metadata, ValueType};

/// Keys that say how a file is laid out, not what it holds.
const LAYOUT: [&str; 4] = ["general.alignment", "split.no", "split.count", "split.tensors.count"];

/// A metadata value.
#[derive(Clone, Copy, Debug)]
pub enum Entry<'a> {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(&'a str),
    Texts(&'a [String]),
    I32s(&'a [i32]),
    F32s(&'a [f32]),
}

/// The header of a file to be written. After its bytes come the tensors' in the order in which they were added, each followed by its
/// [`padding`].
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// Key, and type and value as they are written.
    entries: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<usize>, Format)>,
}

impl Header {
    /// Sets a key, in its place where there is one.
    pub fn set(&mut self, key: &str, value: Entry<'_>) {
        let mut bytes = Vec::new();
        match value {
            Entry::U32(value) => scalar(&mut bytes, ValueType::U32, &value.to_le_bytes()),
            Entry::F32(value) => scalar(&mut bytes, ValueType::F32, &value.to_le_bytes()),
            Entry::Bool(value) => scalar(&mut bytes, ValueType::Bool, &[u8::from(value)]),
            Entry::Text(text) => {
                bytes.extend((ValueType::String as u32).to_le_bytes());
                string(&mut bytes, text);
            }
            Entry::Texts(texts) => {
                array(&mut bytes, ValueType::String, texts.len());
                texts.iter().for_each(|text| string(&mut bytes, text));
            }
            Entry::I32s(values) => {
                array(&mut bytes, ValueType::I32, values.len());
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Entry::F32s(values) => {
                array(&mut bytes, ValueType::F32, values.len());
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
        self.put(key, bytes);
    }

    /// Sets every key of another file as that has it, in its order, but for those that say how its bytes are laid out.
    pub fn copy(&mut self, metadata: &Metadata) {
        for (key, bytes) in metadata.encoded().filter(|(key, _)| !LAYOUT.contains(key)) {
            self.put(key, bytes.to_vec());
        }
    }

    fn put(&mut self, key: &str, bytes: Vec<u8>) {
        match self.entries.iter_mut().find(|(known, _)| known == key) {
            Some((_, value)) => *value = bytes,
            None => self.entries.push((key.to_owned(), bytes)),
        }
    }

    /// Adds a tensor, of these sizes in the usual order: `[rows, cols]`, or `[n]`.
    pub fn tensor(&mut self, name: &str, shape: &[usize], format: Format) {
        self.tensors.push((name.to_owned(), shape.to_vec(), format));
    }

    /// The bytes up to where the first tensor's begin.
    ///
    /// # Panics
    /// When a tensor's rows are not whole blocks of its format.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            string(&mut bytes, key);
            bytes.extend(value);
        }
        let mut offset = 0;
        for (name, shape, format) in &self.tensors {
            string(&mut bytes, name);
            bytes.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&dim| bytes.extend((dim as u64).to_le_bytes()));
            bytes.extend(format.ggml_type().to_le_bytes());
            bytes.extend(u64::to_le_bytes(offset));
            let len = tensor_bytes(shape, *format);
            offset += len + padding(len).len() as u64;
        }
        let pad = padding(bytes.len() as u64);
        bytes.extend(pad);
        bytes
    }
}

/// The linears of a model as its GGUF files have them: what stands on them is written in the same way.
#[derive(Clone, Debug)]
pub struct Linears {
    /// `general.architecture`.
    pub architecture: String,
    /// By the name that transformers has for the module.
    pub linears: BTreeMap<String, Stored>,
}

/// A linear in a GGUF file.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The name of its weight.
    pub weight: String,
    /// Where each of its rows stands, if not in its place.
    pub rows: Option<Arc<[u32]>>,
}

impl Stored {
    /// Where a row stands.
    pub fn place(&self, row: usize) -> usize {
        self.rows.as_ref().map_or(row, |rows| rows[row] as usize)
    }
}

/// Bytes of a tensor.
///
/// # Panics
/// When its rows are not whole blocks.
pub fn tensor_bytes(shape: &[usize], format: Format) -> u64 {
    let cols = shape.last().copied().unwrap_or(1);
    let rows = shape.iter().rev().skip(1).product();
    format.bytes_for(rows, cols).unwrap_or_else(|| panic!("{shape:?} is no shape for {format}")) as u64
}

/// What stands between `len` bytes and what follows them.
pub fn padding(len: u64) -> &'static [u8] {
    const ZEROS: [u8; DEFAULT_ALIGNMENT as usize] = [0; DEFAULT_ALIGNMENT as usize];
    &ZEROS[..(len.next_multiple_of(DEFAULT_ALIGNMENT) - len) as usize]
}

fn scalar(bytes: &mut Vec<u8>, kind: ValueType, value: &[u8]) {
    bytes.extend((kind as u32).to_le_bytes());
    bytes.extend(value);
}

fn array(bytes: &mut Vec<u8>, element: ValueType, len: usize) {
    bytes.extend((ValueType::Array as u32).to_le_bytes());
    bytes.extend((element as u32).to_le_bytes());
    bytes.extend((len as u64).to_le_bytes());
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use retune_quant::SharedBytes;

    use super::*;
    use crate::gguf::Gguf;

    fn parse(header: &Header, tensors: &[&[u8]]) -> Gguf {
        let mut bytes = header.bytes();
        for tensor in tensors {
            bytes.extend(*tensor);
            bytes.extend(padding(tensor.len() as u64));
        }
        Gguf::parse(SharedBytes::from_vec(bytes)).unwrap()
    }

    fn example() -> Header {
        let mut header = Header::default();
        header.set("general.architecture", Entry::Text("llama"));
        header.set("a.u32", Entry::U32(7));
        header.set("a.f32", Entry::F32(-0.5));
        header.set("a.bool", Entry::Bool(true));
        header.set("a.texts", Entry::Texts(&["<s>".to_owned(), "é".to_owned(), String::new()]));
        header.set("a.i32s", Entry::I32s(&[1, -1]));
        header.set("a.f32s", Entry::F32s(&[1.0, 2.5, 3.0]));
        header
    }

    #[test]
    fn what_is_written_is_read() {
        let mut header = example();
        header.tensor("norm", &[3], Format::F32);
        header.tensor("blocks", &[2, 32], Format::Q8_0);
        let file = parse(&header, &[&[1; 12], &[2; 68]]);
        let metadata = &file.metadata;
        assert_eq!(file.version, 3);
        assert_eq!(metadata.get_str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(metadata.get_u32("a.u32").unwrap(), Some(7));
        assert_eq!(metadata.get_f32("a.f32").unwrap(), Some(-0.5));
        assert_eq!(metadata.get_bool("a.bool").unwrap(), Some(true));
        assert_eq!(metadata.get_str_array("a.texts").unwrap(), Some(vec!["<s>", "é", ""]));
        assert_eq!(metadata.get_i32_array("a.i32s").unwrap(), Some(vec![1, -1]));
        assert_eq!(metadata.get_f32_array("a.f32s").unwrap(), Some(vec![1.0, 2.5, 3.0]));
        let blocks = file.tensor("blocks").unwrap();
        assert_eq!((blocks.shape(), blocks.format, &blocks.bytes[..]), (vec![2, 32], Format::Q8_0, &[2u8; 68][..]));
    }

    #[test]
    fn a_copied_header_has_the_bytes_of_the_original_and_what_is_set_stands_in_its_place() {
        let header = example();
        let mut copy = Header::default();
        copy.copy(&parse(&header, &[]).metadata);
        assert_eq!(copy.bytes(), header.bytes());
        copy.set("a.f32", Entry::F32(2.0));
        copy.set("general.alignment", Entry::U32(32));
        let changed = parse(&copy, &[]);
        assert_eq!(changed.metadata.get_f32("a.f32").unwrap(), Some(2.0));
        let mut again = Header::default();
        again.copy(&changed.metadata);
        assert_eq!(again.entries.len(), header.entries.len(), "how bytes are laid out is not copied");
        let keys = |header: &Header| header.entries.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>();
        assert_eq!(keys(&again), keys(&header));
    }
}
