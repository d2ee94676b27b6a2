//! safetensors files: one reader, one writer, and the weights of a model directory (`model.safetensors`, or the shards that
//! `model.safetensors.index.json` lists).
//!
//! The `safetensors` crate checks each header that is read (offsets, overlaps, overflows); here the header is held against the
//! size of the file and the shards against their index. The files are memory-mapped and nothing is copied. Headers are written
//! here, because the crate wants every tensor in memory; their bytes are the same.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

pub use ::safetensors::Dtype;
use ::safetensors::tensor::Metadata;
use retune_quant::{Format, SharedBytes};
use serde_json::{Map, Value, json};

use crate::atomic::{Draft, Staged};
use crate::error::Error;
use crate::files::{map_file, read_json};
use crate::weights::matrix;

/// The file that holds a model's weights where one does.
pub const SINGLE: &str = "model.safetensors";
/// The file that lists the shards of a model's weights.
pub const INDEX: &str = "model.safetensors.index.json";
/// Bytes of the little-endian header length that a file starts with.
const LENGTH_BYTES: usize = 8;
/// As the reference implementation has it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The tensors of a model directory, by name.
pub struct Safetensors {
    pub tensors: BTreeMap<String, RawTensor>,
    /// What was opened: the weights, and the index where they are in shards.
    pub files: Vec<PathBuf>,
    /// Total size of the weights.
    pub file_bytes: u64,
}

/// A tensor as stored: row-major, of any element type.
pub struct RawTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Exactly the tensor's bytes.
    pub bytes: SharedBytes,
}

impl RawTensor {
    /// The format of a floating-point weight; `None` for every other element type.
    pub fn format(&self) -> Option<Format> {
        match self.dtype {
            Dtype::F32 => Some(Format::F32),
            Dtype::F16 => Some(Format::F16),
            Dtype::BF16 => Some(Format::BF16),
            _ => None,
        }
    }

    /// The values of a floating-point tensor in row-major order.
    ///
    /// # Errors
    /// Another element type; `name` is what the error calls the tensor.
    pub fn to_f32(&self, name: &str) -> Result<Vec<f32>, Error> {
        let Some(format) = self.format() else {
            return Err(Error::TensorType { tensor: name.to_owned(), dtype: self.dtype.to_string() });
        };
        match self.bytes.len() / format.block_bytes() {
            0 => Ok(Vec::new()),
            len => Ok(matrix(name, format, 1, len, self.bytes.clone())?.to_f32()),
        }
    }
}

/// Whether a directory holds safetensors weights under the names that are read.
pub fn is_in(dir: &Path) -> bool {
    dir.join(SINGLE).is_file() || dir.join(INDEX).is_file()
}

/// Opens the weights of a model directory; the single file is preferred, as transformers does.
///
/// # Errors
/// Files that cannot be read, damaged or truncated ones (named), and an index that does not fit its shards.
pub fn open(dir: &Path) -> Result<Safetensors, Error> {
    let single = dir.join(SINGLE);
    if single.is_file() {
        let bytes = map_file(&single)?;
        let tensors = parse(&bytes).map_err(|error| error.at(&single))?;
        return Ok(Safetensors { tensors, file_bytes: bytes.len() as u64, files: vec![single] });
    }
    let index_path = dir.join(INDEX);
    let index = read_json(&index_path)?;
    open_shards(dir, &index).map_err(|error| match error {
        error @ Error::ShardIndex { .. } => error.at(&index_path),
        error => error,
    })
}

fn open_shards(dir: &Path, index: &Value) -> Result<Safetensors, Error> {
    let index_error = |reason: String| Error::ShardIndex { reason };
    let Some(weight_map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(index_error("has no \"weight_map\"".to_owned()));
    };
    let mut names_of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, shard) in weight_map {
        match shard.as_str() {
            // A plain file name: nothing outside of the directory is opened.
            Some(shard) if Path::new(shard).file_name() == Some(OsStr::new(shard)) => {
                names_of.entry(shard).or_default().push(name);
            }
            _ => return Err(index_error(format!("says {name} is in {shard}, expected the name of a file beside it"))),
        }
    }
    let mut all = Safetensors { tensors: BTreeMap::new(), file_bytes: 0, files: vec![dir.join(INDEX)] };
    for (shard, names) in names_of {
        let path = dir.join(shard);
        if !path.is_file() {
            return Err(index_error(format!("names {shard}, which is not there")));
        }
        let bytes = map_file(&path)?;
        all.file_bytes += bytes.len() as u64;
        let mut tensors = parse(&bytes).map_err(|error| error.at(&path))?;
        for name in names {
            let tensor = tensors
                .remove(name)
                .ok_or_else(|| index_error(format!("says {name} is in {shard}, where it is not")))?;
            all.tensors.insert(name.to_owned(), tensor);
        }
        all.files.push(path);
    }
    Ok(all)
}

/// The tensors of one file, given all its bytes.
///
/// # Errors
/// A header that is damaged or contradicts the size of the file.
pub fn parse(bytes: &SharedBytes) -> Result<BTreeMap<String, RawTensor>, Error> {
    let has = bytes.len() as u64;
    let truncated = |what: &str, needs| Error::Truncated { what: what.to_owned(), needs, has };
    let invalid = |reason: String| Error::SafetensorsHeader { reason };

    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(truncated("the header length", LENGTH_BYTES as u64));
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(invalid(format!("a length of {header_bytes} bytes, expected at most {MAX_HEADER_BYTES}")));
    }
    let data_start = LENGTH_BYTES + header_bytes as usize;
    let header = rest.get(..header_bytes as usize).ok_or_else(|| truncated("the header", data_start as u64))?;
    // Not SafeTensors::read_metadata: its sum of header and data can overflow, and it does not tell a truncated file apart.
    let metadata: Metadata = serde_json::from_slice(header).map_err(|error| invalid(error.to_string()))?;
    let needs = (data_start as u64).saturating_add(metadata.data_len() as u64);
    if needs > has {
        return Err(truncated("the last tensor", needs));
    }
    if needs < has {
        return Err(invalid(format!("the tensors end at byte {needs}, but the file has {has} bytes")));
    }

    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let slice = bytes
            .slice(data_start.saturating_add(start)..data_start.saturating_add(end))
            .ok_or_else(|| invalid(format!("tensor {name} lies outside of the file")))?;
        tensors.insert(name, RawTensor { dtype: info.dtype, shape: info.shape.clone(), bytes: slice });
    }
    Ok(tensors)
}

/// What a file starts with: the length of the header, and the header. Tensors follow in the order in which it names them.
pub struct Header {
    bytes: Vec<u8>,
    data_bytes: u64,
}

impl Header {
    /// The header of a file with this metadata and these tensors: name, type of the elements, shape. Names are unique.
    pub fn new<'a>(
        metadata: &[(&str, &str)],
        tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize])>,
    ) -> Header {
        let mut entries = Map::new();
        if !metadata.is_empty() {
            let pairs = metadata.iter().map(|&(key, value)| (key.to_owned(), value.into()));
            entries.insert("__metadata__".to_owned(), Value::Object(pairs.collect()));
        }
        let mut start = 0;
        for (name, dtype, shape) in tensors {
            let bits = shape.iter().product::<usize>() as u64 * dtype.bitsize() as u64;
            let end = start + bits / 8;
            let entry = json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, end]});
            entries.insert(name.to_owned(), entry);
            start = end;
        }
        let mut text = Value::Object(entries).to_string().into_bytes();
        // Values lie at multiples of their size then, for readers that map the file.
        text.resize(text.len().next_multiple_of(LENGTH_BYTES), b' ');
        let bytes = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        Header { bytes, data_bytes: start }
    }

    /// The bytes that the file starts with.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.len() as u64 + self.data_bytes
    }
}

/// A tensor that lies in memory as a whole.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub shape: &'a [usize],
    pub values: Values<'a>,
}

/// The values of a tensor, as many as its shape says.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    F32(&'a [f32]),
    I64(&'a [i64]),
    U8(&'a [u8]),
}

impl Values<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Values::F32(_) => Dtype::F32,
            Values::I64(_) => Dtype::I64,
            Values::U8(_) => Dtype::U8,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::I64(values) => values.len(),
            Values::U8(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn write(&self, draft: &mut Draft) -> Result<(), Error> {
        match self {
            Values::F32(values) => write_values(values, f32::to_le_bytes, draft),
            Values::I64(values) => write_values(values, i64::to_le_bytes, draft),
            Values::U8(values) => draft.write_all(values),
        }
    }
}

/// Encodes a few thousand values at a time: a copy of all of them could be the largest allocation of a run.
fn write_values<T: Copy, const N: usize>(
    values: &[T],
    encode: impl Fn(T) -> [u8; N],
    draft: &mut Draft,
) -> Result<(), Error> {
    let mut bytes = Vec::new();
    for piece in values.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(piece.iter().flat_map(|&value| encode(value)));
        draft.write_all(&bytes)?;
    }
    Ok(())
}

/// Writes a file of tensors in the given order, under a temporary name. Names are unique.
///
/// # Errors
/// As [`Staged::new`].
pub fn stage(path: &Path, metadata: &[(&str, &str)], tensors: &[Tensor<'_>]) -> Result<Staged, Error> {
    let header = Header::new(metadata, tensors.iter().map(|tensor| (tensor.name, tensor.values.dtype(), tensor.shape)));
    let mut draft = Draft::create(path)?;
    draft.write_all(header.bytes())?;
    tensors.iter().try_for_each(|tensor| tensor.values.write(&mut draft))?;
    draft.finish()
}

#[cfg(any(test, feature = "testing"))]
pub mod testing {
    //! Writes safetensors bytes by hand, valid or not.

    /// A file of this header and data.
    pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    /// A file of f32 tensors.
    pub fn f32_file(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, shape, values) in tensors {
            let start = data.len();
            data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            let offsets = [start, data.len()];
            header.insert(name.clone(), serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": offsets}));
        }
        file(&serde_json::Value::Object(header).to_string(), &data)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{f32_file, file};
    use super::*;

    fn example() -> Vec<u8> {
        f32_file(&[
            ("a.weight".to_owned(), vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            ("b.bias".to_owned(), vec![2], vec![-1.0, 0.5]),
        ])
    }

    fn parse_bytes(bytes: Vec<u8>) -> Result<BTreeMap<String, RawTensor>, Error> {
        parse(&SharedBytes::from_vec(bytes))
    }

    fn error(bytes: Vec<u8>) -> String {
        parse_bytes(bytes).err().expect("must be refused").to_string()
    }

    #[test]
    fn reads_tensors() {
        let tensors = parse_bytes(example()).unwrap();
        assert_eq!(tensors.len(), 2);
        assert_eq!(tensors["a.weight"].shape, [2, 3]);
        assert_eq!(tensors["a.weight"].format(), Some(Format::F32));
        assert_eq!(tensors["b.bias"].bytes[4..], 0.5f32.to_le_bytes());
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = example();
        for len in 0..bytes.len() {
            assert!(parse_bytes(bytes[..len].to_vec()).is_err(), "{len} of {} bytes", bytes.len());
        }
        assert!(error(bytes[..bytes.len() - 1].to_vec()).contains("truncated"));
        assert!(error([&bytes[..], &[0]].concat()).contains("end at byte"));
    }

    #[test]
    fn no_changed_bit_of_the_header_panics() {
        let bytes = example();
        let header = bytes.len() - 32;
        for bit in 0..header * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let _ = parse_bytes(changed);
        }
    }

    #[test]
    fn impossible_headers_are_refused() {
        let one = |shape: &str, end: u64| {
            error(file(&format!(r#"{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#), &[0; 8]))
        };
        one("[4294967296,4294967296]", 8);
        one("[2305843009213693952]", 8);
        one("[3]", 8);
        assert!(one("[4611686018427387900]", 18446744073709551600).contains("header"));
        assert!(error(file("{", &[])).contains("header"));
        assert!(error(u64::MAX.to_le_bytes().to_vec()).contains("at most"));
        assert!(error((1u64 << 20).to_le_bytes().to_vec()).contains("truncated"));
        // Eight tensors whose total is just below 2^64 bytes.
        let size = (1u64 << 61) - 1;
        let entries: Vec<String> = (0..8)
            .map(|i| {
                format!(r#""{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{},{}]}}"#, i * size, (i + 1) * size)
            })
            .collect();
        assert!(error(file(&format!("{{{}}}", entries.join(",")), &[0; 8])).contains("truncated"));
    }

    #[test]
    fn written_bytes_are_those_of_the_safetensors_crate() {
        use ::safetensors::tensor::TensorView;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let written = |metadata: &[(&str, &str)], tensors: &[Tensor<'_>]| {
            stage(&path, metadata, tensors).unwrap().commit().unwrap();
            std::fs::read(&path).unwrap()
        };
        let floats: Vec<f32> = (0..40_000).map(|i| i as f32 / 7.0).collect();
        let bytes: Vec<u8> = floats.iter().flat_map(|value| value.to_le_bytes()).collect();
        let a = Tensor { name: "a \"é\"", shape: &[200, 200], values: Values::F32(&floats) };
        let b = Tensor { name: "b", shape: &[0], values: Values::F32(&[]) };
        let views = [
            ("b", TensorView::new(Dtype::F32, vec![0], &[]).unwrap()),
            (a.name, TensorView::new(Dtype::F32, vec![200, 200], &bytes).unwrap()),
        ];
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let theirs = ::safetensors::serialize(views, Some(metadata)).unwrap();
        assert_eq!(written(&[("format", "pt")], &[a, b]), theirs);

        let view =
            TensorView::new(Dtype::I64, vec![1, 2], &[1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]);
        let theirs = ::safetensors::serialize([("ids", view.unwrap())], None).unwrap();
        let ids = Tensor { name: "ids", shape: &[1, 2], values: Values::I64(&[1, -1]) };
        assert_eq!(written(&[], &[ids]), theirs);
        let header = Header::new(&[], [("ids", Dtype::I64, &[1, 2][..])]);
        assert_eq!((header.file_bytes(), header.bytes()), (theirs.len() as u64, &theirs[..theirs.len() - 16]));
    }

    #[test]
    fn floating_point_tensors_are_decoded_and_others_refused() {
        let bytes = file(
            r#"{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}"#,
            &[0x80, 0x3F, 0, 0xC0, 7],
        );
        let tensors = parse_bytes(bytes).unwrap();
        assert_eq!(tensors["x"].to_f32("x").unwrap(), [1.0, -2.0]);
        assert!(tensors["y"].to_f32("y").unwrap_err().to_string().contains("tensor y is stored as U8"));
    }

    #[test]
    fn integers_have_no_format() {
        let bytes = file(r#"{"x":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, &[0; 8]);
        assert_eq!(parse_bytes(bytes).unwrap()["x"].format(), None);
    }

    #[test]
    fn shards_are_read_and_their_index_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let index = |map: &str| std::fs::write(dir.path().join(INDEX), format!(r#"{{"weight_map":{map}}}"#)).unwrap();
        let open_error = || open(dir.path()).err().expect("must be refused").to_string();
        std::fs::write(dir.path().join("one.safetensors"), example()).unwrap();
        let two = f32_file(&[("c".to_owned(), vec![1], vec![9.0])]);
        std::fs::write(dir.path().join("two.safetensors"), &two).unwrap();

        index(r#"{"a.weight":"one.safetensors","b.bias":"one.safetensors","c":"two.safetensors"}"#);
        let opened = open(dir.path()).unwrap();
        assert_eq!(opened.tensors.keys().collect::<Vec<_>>(), ["a.weight", "b.bias", "c"]);
        assert_eq!(opened.file_bytes, (example().len() + two.len()) as u64);

        index(r#"{"c":"three.safetensors"}"#);
        assert!(open_error().contains("three.safetensors"));
        index(r#"{"d":"two.safetensors"}"#);
        assert!(open_error().contains("where it is not"));
        for outside in ["../two.safetensors", "/two.safetensors", "..", ""] {
            index(&format!(r#"{{"c":"{outside}"}}"#));
            assert!(open_error().contains("beside it"), "{outside}");
        }
        std::fs::write(dir.path().join(INDEX), "[]").unwrap();
        assert!(open_error().contains("weight_map"));

        index(r#"{"c":"two.safetensors"}"#);
        std::fs::write(dir.path().join("two.safetensors"), &two[..two.len() - 2]).unwrap();
        let text = open_error();
        assert!(text.contains("two.safetensors") && text.contains("truncated"), "{text}");
    }
}
