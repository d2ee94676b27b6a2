//! Weights that bitsandbytes stores in 4 or 8 bits, as a Hugging Face directory holds them: reading them, and their tensors to be written.
//!
//! In 4 bits, the tensor `X.weight` holds packed indices then. Beside it lie `X.weight.absmax`, `X.weight.quant_map` and a description in JSON, stored as
//! bytes, whose name ends with the code: `X.weight.quant_state.bitsandbytes__nf4` or `..__fp4`. Double quantization adds
//! `X.weight.nested_absmax` and `X.weight.nested_quant_map`. The names are those of `QuantState.as_dict` in bitsandbytes' `functional.py`;
//! [`FourBit`] says what the numbers mean.
//!
//! In 8 bits (LLM.int8()) the weight is of signed bytes, and beside `X.weight` lie `X.SCB`, the greatest magnitude of each row, and perhaps
//! `X.weight_format`, which says that rows are rows.

use std::collections::BTreeMap;

use ::safetensors::Dtype;
use retune_kernels::PanelSource;
use retune_quant::dynamic::dynamic_map;
use retune_quant::encode::{self, NestedAbsmax};
use retune_quant::{Absmax, Encoding, FourBit, Int8Rows, Matrix, QuantType, SharedBytes};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::safetensors::RawTensor;
use crate::weights::{matrix, rows_and_cols};

/// What follows a weight's name in that of its description, before the code.
const DESCRIPTION: &str = ".quant_state.bitsandbytes__";
/// What `weight_format` says of rows that are rows.
const ROW_FORMAT: u8 = 0;
/// A description has about 200.
const MAX_DESCRIPTION_BYTES: usize = 1 << 16;
/// The type in which bitsandbytes computes the block magnitudes of double quantization.
const NESTED_DTYPE: &str = "float32";

/// The longest number that JSON has for an f64: a description is as long as one with it, so that it is known before the number is.
const LONGEST_NUMBER: f64 = -2.225_073_858_507_201_4e-308;
/// The tensors of a weight take a multiple of this together, so that those of the next lie at multiples of their values' size.
const ALIGNMENT: usize = 8;

/// The description of a weight.
#[derive(Deserialize, Serialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    /// In which type bitsandbytes returns the values; nothing that is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<serde_json::Value>,
    shape: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f64>,
}

/// A weight in 4 or 8 bits.
pub struct QuantizedWeight {
    pub matrix: Matrix,
    /// The bytes of all tensors it consists of, always in the same order.
    pub parts: Vec<SharedBytes>,
}

/// A weight that is to be written.
pub struct EncodedWeight {
    pub encoding: Encoding,
    /// `[out, in]`
    pub shape: [usize; 2],
    /// In which type bitsandbytes is to return the values, in PyTorch's words.
    pub dtype: &'static str,
    /// Two codes of 4 bits a byte, or one of 8.
    pub codes: Vec<u8>,
    /// The greatest magnitude of each block, or of each row.
    pub absmax: Vec<f32>,
}

/// A tensor of such a weight: its name, type, shape, and its bytes where they are known.
pub struct Part {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// The tensors of which the weight `name` will consist, without their bytes: what the header of a file needs.
pub fn layout(name: &str, encoding: Encoding, shape: [usize; 2], dtype: &'static str) -> Vec<Part> {
    let (values, rows) = (shape[0] * shape[1], shape[0]);
    let part = |suffix: &str, dtype, shape: &[usize]| Part {
        name: format!("{name}{suffix}"),
        dtype,
        shape: shape.to_vec(),
        bytes: Vec::new(),
    };
    let Encoding::FourBit { quant_type, double } = encoding else {
        let module = name.strip_suffix("weight").unwrap_or(name);
        let of_module =
            |suffix: &str, dtype, shape: &[usize]| Part { name: format!("{module}{suffix}"), ..part("", dtype, shape) };
        return vec![
            of_module("SCB", Dtype::F32, &[rows]),
            part("", Dtype::I8, &shape),
            of_module("weight_format", Dtype::U8, &[]),
        ];
    };
    let blocks = values.div_ceil(encode::BLOCKSIZE);
    let mut parts = vec![part(".quant_map", Dtype::F32, &[16])];
    if double {
        parts.push(part(".nested_quant_map", Dtype::F32, &[256]));
        parts.push(part(".nested_absmax", Dtype::F32, &[blocks.div_ceil(encode::NESTED_BLOCKSIZE)]));
    } else {
        parts.push(part(".absmax", Dtype::F32, &[blocks]));
    }
    parts.push(part("", Dtype::U8, &[values.div_ceil(2), 1]));
    if double {
        parts.push(part(".absmax", Dtype::U8, &[blocks]));
    }
    let others: usize = parts.iter().map(Part::len).sum();
    let longest = description(quant_type, shape, dtype, double.then_some(LONGEST_NUMBER)).len();
    let length = (others + longest).next_multiple_of(ALIGNMENT) - others;
    parts.push(part(&format!("{DESCRIPTION}{}", quant_type.key()), Dtype::U8, &[length]));
    parts
}

/// A description as JSON.
fn description(quant_type: QuantType, shape: [usize; 2], dtype: &str, offset: Option<f64>) -> String {
    let state = QuantState {
        quant_type: quant_type.key().to_owned(),
        blocksize: encode::BLOCKSIZE,
        dtype: Some(dtype.into()),
        shape: shape.to_vec(),
        nested_blocksize: offset.map(|_| encode::NESTED_BLOCKSIZE),
        nested_dtype: offset.map(|_| NESTED_DTYPE.to_owned()),
        nested_offset: offset,
    };
    serde_json::json!(state).to_string()
}

impl Part {
    /// Bytes it takes.
    pub fn len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    /// Whether it takes none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl EncodedWeight {
    /// The tensors it consists of, as [`layout`] has them, with their bytes.
    pub fn into_parts(self, name: &str) -> Vec<Part> {
        let mut parts = layout(name, self.encoding, self.shape, self.dtype);
        let mut put = |dtype, suffix: &str, bytes: Vec<u8>| {
            if let Some(part) = parts.iter_mut().find(|part| part.dtype == dtype && part.name.ends_with(suffix)) {
                part.bytes = bytes;
            }
        };
        match self.encoding {
            Encoding::Int8 => {
                put(Dtype::F32, "SCB", f32_bytes(&self.absmax));
                put(Dtype::I8, "", self.codes);
                put(Dtype::U8, "weight_format", vec![ROW_FORMAT]);
            }
            Encoding::FourBit { quant_type, double } => {
                put(Dtype::F32, ".quant_map", f32_bytes(&quant_type.code()));
                put(Dtype::U8, name, self.codes);
                let nested = double.then(|| NestedAbsmax::of(&self.absmax));
                let offset = nested.as_ref().map(|nested| f64::from(nested.offset));
                match nested {
                    None => put(Dtype::F32, ".absmax", f32_bytes(&self.absmax)),
                    Some(nested) => {
                        put(Dtype::F32, ".nested_quant_map", f32_bytes(&dynamic_map(true)));
                        put(Dtype::F32, ".nested_absmax", f32_bytes(&nested.scales));
                        put(Dtype::U8, ".absmax", nested.indices);
                    }
                }
                let description = description(quant_type, self.shape, self.dtype, offset);
                if let Some(part) = parts.last_mut() {
                    part.bytes = description.into_bytes();
                    part.bytes.resize(part.len(), b' ');
                }
            }
        }
        parts
    }
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The weight `name` of this `shape`, whose own tensor is `raw`. What else belongs to it is taken out of `tensors`. `None` when it is
/// not described there as one in 4 or 8 bits.
///
/// # Errors
/// Parts that are missing, damaged or of another size than the shape needs; codes and types that are not known.
pub fn take_weight(
    name: &str,
    shape: &[usize],
    raw: &RawTensor,
    tensors: &mut BTreeMap<String, RawTensor>,
) -> Result<Option<QuantizedWeight>, Error> {
    if raw.dtype == Dtype::I8 {
        return int8_weight(name, shape, raw, tensors);
    }
    let indices = &raw.bytes;
    let prefix = format!("{name}{DESCRIPTION}");
    let described = tensors.range(prefix.clone()..).next().map(|(key, _)| key);
    let Some(key) = described.filter(|key| key.starts_with(&prefix)).cloned() else { return Ok(None) };
    let mut parts = Parts { weight: name, tensors, taken: vec![indices.clone()] };
    let state = describe(&key, &parts.take(&key)?.bytes)?;
    if state.shape != shape {
        return Err(Error::TensorShape { tensor: name.to_owned(), found: state.shape, expected: shape.to_vec() });
    }
    let Some(quant_type) = QuantType::from_name(&state.quant_type) else {
        return Err(Error::Unsupported {
            what: "bitsandbytes' quant_type",
            found: format!("{:?} (in {key})", state.quant_type),
            supported: "nf4, fp4",
        });
    };
    let code = parts.table("quant_map")?;
    let absmax = parts.absmax(&state, &key)?;
    let (rows, cols) = rows_and_cols(shape);
    let matrix = FourBit::new(quant_type, state.blocksize, code, absmax, indices.clone())
        .and_then(|values| Matrix::from_four_bit(rows, cols, values))
        .map_err(|error| Error::Tensor { tensor: name.to_owned(), error })?;
    Ok(Some(QuantizedWeight { matrix, parts: parts.taken }))
}

/// A weight of signed bytes; `None` without the scales of its rows.
fn int8_weight(
    name: &str,
    shape: &[usize],
    raw: &RawTensor,
    tensors: &mut BTreeMap<String, RawTensor>,
) -> Result<Option<QuantizedWeight>, Error> {
    let module = name.strip_suffix("weight").unwrap_or(name);
    let (scales_key, format_key) = (format!("{module}SCB"), format!("{module}weight_format"));
    let Some(scales) = tensors.remove(&scales_key) else { return Ok(None) };
    if raw.shape != shape {
        return Err(Error::TensorShape { tensor: name.to_owned(), found: raw.shape.clone(), expected: shape.to_vec() });
    }
    if let Some(format) = tensors.remove(&format_key)
        && format.bytes[..] != [ROW_FORMAT]
    {
        return Err(Error::Unsupported {
            what: "bitsandbytes' weight_format",
            found: format!("{:?} (in {format_key})", &format.bytes[..]),
            supported: "0, rows as they are",
        });
    }
    let absmax = floats(&scales_key, &scales, None)?.to_f32();
    let (rows, cols) = rows_and_cols(shape);
    let matrix = Matrix::from_int8_rows(rows, cols, Int8Rows::new(raw.bytes.clone(), absmax));
    let matrix = matrix.map_err(|error| Error::Tensor { tensor: name.to_owned(), error })?;
    Ok(Some(QuantizedWeight { matrix, parts: vec![raw.bytes.clone(), scales.bytes] }))
}

fn describe(key: &str, json: &[u8]) -> Result<QuantState, Error> {
    let invalid = |reason: String| Error::QuantState { tensor: key.to_owned(), reason };
    if json.len() > MAX_DESCRIPTION_BYTES {
        return Err(invalid(format!("{} bytes, expected at most {MAX_DESCRIPTION_BYTES}", json.len())));
    }
    serde_json::from_slice(json).map_err(|error| invalid(error.to_string()))
}

/// The tensors that belong to one weight.
struct Parts<'a> {
    weight: &'a str,
    /// Those that nobody has taken yet, of all weights.
    tensors: &'a mut BTreeMap<String, RawTensor>,
    /// The bytes of those taken.
    taken: Vec<SharedBytes>,
}

impl Parts<'_> {
    fn take(&mut self, key: &str) -> Result<RawTensor, Error> {
        match self.tensors.remove(key) {
            Some(raw) => {
                self.taken.push(raw.bytes.clone());
                Ok(raw)
            }
            None => Err(Error::MissingTensors { count: 1, first: key.to_owned() }),
        }
    }

    fn key(&self, part: &str) -> String {
        format!("{}.{part}", self.weight)
    }

    /// A part that is a table of N numbers.
    fn table<const N: usize>(&mut self, part: &str) -> Result<[f32; N], Error> {
        let key = self.key(part);
        let raw = self.take(&key)?;
        let mut values = [0.0; N];
        floats(&key, &raw, Some(N))?.panel_f32(0..1, 0..N, &mut values);
        Ok(values)
    }

    /// The magnitude of each block.
    fn absmax(&mut self, state: &QuantState, description: &str) -> Result<Absmax, Error> {
        let key = self.key("absmax");
        let raw = self.take(&key)?;
        match raw.dtype {
            Dtype::U8 => {}
            Dtype::F32 => {
                let absmax = Absmax::plain(raw.bytes);
                return absmax.map_err(|error| Error::Tensor { tensor: key, error });
            }
            _ => return Ok(floats(&key, &raw, None)?.to_f32().into()),
        }
        let (Some(blocksize), Some(offset), Some(dtype)) =
            (state.nested_blocksize, state.nested_offset, &state.nested_dtype)
        else {
            let reason =
                "nested_blocksize, nested_offset or nested_dtype is missing, though absmax is stored in 8 bits";
            return Err(Error::QuantState { tensor: description.to_owned(), reason: reason.to_owned() });
        };
        if dtype != NESTED_DTYPE {
            let found = format!("{dtype:?} (in {description})");
            return Err(Error::Unsupported { what: "bitsandbytes' nested_dtype", found, supported: NESTED_DTYPE });
        }
        let map = self.table("nested_quant_map")?;
        let nested_key = self.key("nested_absmax");
        let nested = self.take(&nested_key)?;
        let scales = floats(&nested_key, &nested, None)?.to_f32();
        Absmax::nested(raw.bytes, map, scales, blocksize, offset as f32)
            .map_err(|error| Error::Tensor { tensor: key, error })
    }
}

/// A tensor of floating-point numbers as one row, of `len` numbers if that is given.
fn floats(key: &str, raw: &RawTensor, len: Option<usize>) -> Result<Matrix, Error> {
    let Some(format) = raw.format() else {
        return Err(Error::TensorType { tensor: key.to_owned(), dtype: raw.dtype.to_string() });
    };
    let len = len.unwrap_or(raw.bytes.len() / format.block_bytes());
    matrix(key, format, 1, len, raw.bytes.clone())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NAME: &str = "w.weight";
    const KEY: &str = "w.weight.quant_state.bitsandbytes__nf4";
    const ROWS: usize = 3;
    const COLS: usize = 22;

    fn raw(dtype: Dtype, bytes: Vec<u8>) -> RawTensor {
        let shape = vec![bytes.len() * 8 / dtype.bitsize()];
        RawTensor { dtype, shape, bytes: SharedBytes::from_vec(bytes) }
    }

    fn f32s(values: &[f32]) -> RawTensor {
        raw(Dtype::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// 66 values in three blocks: value i has the code i mod 16, the blocks' magnitudes are 1, 10 and 100, and code c stands for c.
    struct Example {
        description: Value,
        indices: Vec<u8>,
        tensors: BTreeMap<String, RawTensor>,
    }

    impl Example {
        fn plain() -> Self {
            let code: Vec<f32> = (0..16u8).map(f32::from).collect();
            let parts = [("absmax", f32s(&[1.0, 10.0, 100.0])), ("quant_map", f32s(&code))];
            Self {
                description: json!({"quant_type": "nf4", "blocksize": 32, "dtype": "float16", "shape": [ROWS, COLS]}),
                indices: (0..66u8).step_by(2).map(|i| ((i % 16) << 4) | ((i + 1) % 16)).collect(),
                tensors: parts.map(|(part, raw)| (format!("{NAME}.{part}"), raw)).into(),
            }
        }

        /// The same values: 1 = 2 · 2 - 3, 10 = 6.5 · 2 - 3, 100 = 51.5 · 2 - 3.
        fn nested() -> Self {
            let mut example = Self::plain();
            let mut map = [0.0; 256];
            (map[0], map[7], map[255]) = (2.0, 6.5, 51.5);
            example.put("absmax", raw(Dtype::U8, vec![0, 7, 255]));
            example.put("nested_absmax", f32s(&[2.0]));
            example.put("nested_quant_map", f32s(&map));
            example.description["nested_blocksize"] = json!(256);
            example.description["nested_dtype"] = json!("float32");
            example.description["nested_offset"] = json!(-3.0);
            example
        }

        fn put(&mut self, part: &str, raw: RawTensor) {
            self.tensors.insert(format!("{NAME}.{part}"), raw);
        }

        fn describe(mut self, key: &str, value: Value) -> Self {
            self.description[key] = value;
            self
        }

        fn with(mut self, part: &str, raw: RawTensor) -> Self {
            self.put(part, raw);
            self
        }

        fn without(mut self, part: &str) -> Self {
            self.tensors.remove(&format!("{NAME}.{part}")).unwrap();
            self
        }

        fn read_as(mut self, key: &str, description: Vec<u8>) -> Result<Option<QuantizedWeight>, Error> {
            self.tensors.insert(key.to_owned(), raw(Dtype::U8, description));
            take_weight(NAME, &[ROWS, COLS], &raw(Dtype::U8, self.indices), &mut self.tensors)
        }

        fn read(self) -> Result<Option<QuantizedWeight>, Error> {
            let description = self.description.to_string().into_bytes();
            self.read_as(KEY, description)
        }

        fn refusal(self) -> String {
            self.read().err().expect("must be refused").to_string()
        }
    }

    #[test]
    fn single_and_double_quantization_are_read() {
        let expected: Vec<f32> = (0..66).map(|i| (i % 16) as f32 * [1.0, 10.0, 100.0][i / 32]).collect();
        for (example, parts) in [(Example::plain(), 4), (Example::nested(), 6)] {
            let weight = example.read().unwrap().unwrap();
            assert_eq!(weight.matrix.to_f32(), expected);
            assert_eq!((weight.matrix.rows(), weight.matrix.cols()), (ROWS, COLS));
            assert_eq!((weight.matrix.storage(), weight.parts.len()), ("NF4", parts));
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_as_long_as_its_layout() {
        let double = Encoding::NF4_DOUBLE;
        for (encoding, magnitude) in [
            (Encoding::NF4, 1.0),
            (double, 1.0),
            (double, 1e-38),
            (double, 0.0),
            (Encoding::FP4, 3e38),
            (Encoding::Int8, 2.0),
        ] {
            for shape in [[3usize, 22], [1, 1], [5, 64], [130, 150]] {
                let values = shape[0] * shape[1];
                let blocks = if encoding == Encoding::Int8 { shape[0] } else { values.div_ceil(encode::BLOCKSIZE) };
                let codes = if encoding == Encoding::Int8 { values } else { values.div_ceil(2) };
                let weight = EncodedWeight {
                    encoding,
                    shape,
                    dtype: "bfloat16",
                    codes: (0..codes).map(|i| (37 * i) as u8).collect(),
                    absmax: (0..blocks).map(|i| magnitude * ((1.0 + i as f32 / 3.0) / 200.0)).collect(),
                };
                let layout = layout(NAME, encoding, shape, "bfloat16");
                let parts = weight.into_parts(NAME);
                let facts = |part: &Part| (part.name.clone(), part.dtype, part.shape.clone());
                assert!(layout.iter().map(facts).eq(parts.iter().map(facts)));
                assert!(parts.iter().all(|part| part.bytes.len() == part.len()), "{encoding} {shape:?}");
                if encoding != Encoding::Int8 {
                    assert!(parts.iter().map(Part::len).sum::<usize>().is_multiple_of(ALIGNMENT));
                }
                let raw = |part: Part| {
                    (
                        part.name,
                        RawTensor { dtype: part.dtype, shape: part.shape, bytes: SharedBytes::from_vec(part.bytes) },
                    )
                };
                let mut tensors: BTreeMap<String, RawTensor> = parts.into_iter().map(raw).collect();
                let stored = tensors.remove(NAME).unwrap();
                let read = take_weight(NAME, &shape, &stored, &mut tensors).unwrap().unwrap();
                assert!(tensors.is_empty() && (read.matrix.rows(), read.matrix.cols()) == (shape[0], shape[1]));
                assert!(read.matrix.to_f32().iter().all(|value| value.is_finite()), "{encoding} {shape:?} {magnitude}");
            }
        }
    }

    #[test]
    fn signed_bytes_without_their_scales_are_no_weight() {
        let weight = |scales: Option<&[f32]>, format: Option<u8>| {
            let mut tensors = BTreeMap::new();
            scales.map(|scales| tensors.insert("w.SCB".to_owned(), f32s(scales)));
            format.map(|format| tensors.insert("w.weight_format".to_owned(), raw(Dtype::U8, vec![format])));
            let stored = RawTensor { shape: vec![2, 3], ..raw(Dtype::I8, vec![127, 0, 129, 1, 2, 254]) };
            take_weight("w.weight", &[2, 3], &stored, &mut tensors)
        };
        assert!(weight(None, Some(0)).unwrap().is_none());
        let read = weight(Some(&[127.0, 254.0]), None).unwrap().unwrap();
        let (values, expected) = (read.matrix.to_f32(), [127.0, 0.0, -127.0, 2.0, 4.0, -4.0]);
        assert!(values.iter().zip(expected).all(|(value, expected)| (value - expected).abs() < 1e-4), "{values:?}");
        assert_eq!((read.matrix.storage(), read.matrix.bytes_len()), ("INT8", 14));
        let text = |scales, format| weight(scales, format).err().unwrap().to_string();
        assert!(text(Some(&[1.0]), Some(0)).contains("1 row scales (SCB) for 2 rows"));
        assert!(text(Some(&[1.0, 2.0]), Some(1)).contains("weight_format [1]"));
    }

    #[test]
    fn a_weight_without_a_description_is_not_in_4_bits() {
        let mut tensors = Example::plain().tensors;
        tensors.insert("w.weight2.quant_state.bitsandbytes__nf4".to_owned(), raw(Dtype::U8, vec![0]));
        assert!(take_weight(NAME, &[ROWS, COLS], &raw(Dtype::U8, vec![0; 33]), &mut tensors).unwrap().is_none());
        assert_eq!(tensors.len(), 3);
    }

    #[test]
    fn parts_that_are_missing_or_of_another_size_or_type_are_named() {
        for part in ["absmax", "quant_map"] {
            let text = Example::plain().without(part).refusal();
            assert!(text.contains("missing") && text.contains(&format!("{NAME}.{part}")), "{text}");
        }
        for part in ["nested_absmax", "nested_quant_map"] {
            let text = Example::nested().without(part).refusal();
            assert!(text.contains("missing") && text.contains(&format!("{NAME}.{part}")), "{text}");
        }
        for length in [0, 15, 17] {
            let text = Example::plain().with("quant_map", f32s(&vec![0.0; length])).refusal();
            assert!(text.contains("w.weight.quant_map") && text.contains("takes 64 bytes"), "{text}");
        }
        for length in [0, 2, 4] {
            let text = Example::plain().with("absmax", f32s(&vec![1.0; length])).refusal();
            assert!(text.contains(NAME) && text.contains(&format!("{length} block magnitudes")), "{text}");
            let text = Example::nested().with("absmax", raw(Dtype::U8, vec![0; length])).refusal();
            assert!(text.contains("block magnitudes"), "{text}");
        }
        let text = Example::nested().with("nested_absmax", f32s(&[1.0, 2.0])).refusal();
        assert!(text.contains("w.weight.absmax") && text.contains("2 block magnitudes"), "{text}");
        let text = Example::plain().with("absmax", raw(Dtype::I32, vec![0; 12])).refusal();
        assert!(text.contains("w.weight.absmax") && text.contains("I32"), "{text}");
        for length in [0, 32, 34] {
            let mut example = Example::plain();
            example.indices.resize(length, 0);
            let text = example.refusal();
            assert!(text.contains("takes 33 bytes") && text.contains(&format!("{length} are there")), "{text}");
        }
    }

    #[test]
    fn descriptions_that_cannot_be_are_refused() {
        for (key, value, words) in [
            ("quant_type", json!("int4"), ["quant_type \"int4\"", "nf4, fp4"]),
            ("quant_type", json!(4), [KEY, "expected a string"]),
            ("blocksize", json!(0), ["blocks of 0 values", "from 32 to 4096"]),
            ("blocksize", json!(48), ["blocks of 48 values", "from 32 to 4096"]),
            ("blocksize", json!(1u64 << 63), ["blocks of 9223372036854775808", "from 32 to 4096"]),
            ("blocksize", json!(64), [NAME, "3 block magnitudes"]),
            ("blocksize", json!(-1), [KEY, "expected usize"]),
            ("shape", json!([COLS, ROWS]), ["[22, 3]", "[3, 22]"]),
            ("shape", json!([1u64 << 63, 1u64 << 63]), [NAME, "[3, 22]"]),
            ("shape", json!(null), [KEY, "expected a sequence"]),
        ] {
            let text = Example::plain().describe(key, value.clone()).refusal();
            assert!(words.iter().all(|word| text.contains(word)), "{key} {value}: {text}");
        }
        for (key, value, words) in [
            ("nested_blocksize", json!(0), ["blocks of 0 values", "from 32 to 4096"]),
            ("nested_blocksize", json!(null), [KEY, "is missing"]),
            ("nested_offset", json!(null), [KEY, "is missing"]),
            ("nested_dtype", json!("float16"), ["\"float16\"", "supported: float32"]),
        ] {
            let text = Example::nested().describe(key, value.clone()).refusal();
            assert!(words.iter().all(|word| text.contains(word)), "{key} {value}: {text}");
        }
        let text = Example::nested().read_as(KEY, br#"{"quant_type": "nf4", "blocksize": 32}"#.to_vec());
        assert!(text.err().unwrap().to_string().contains("missing field `shape`"));
        let text = Example::nested().read_as(KEY, vec![b' '; MAX_DESCRIPTION_BYTES + 1]);
        assert!(text.err().unwrap().to_string().contains("65537 bytes, expected at most 65536"));
        let other = "w.weight.quant_state.bitsandbytes__int4";
        let json = Example::plain().describe("quant_type", json!("int4")).description.to_string();
        let text = Example::plain().read_as(other, json.into_bytes()).err().unwrap().to_string();
        assert!(text.contains(other) && text.contains("supported: nf4, fp4"), "{text}");
    }

    #[test]
    fn no_cut_and_no_changed_bit_of_a_description_panics() {
        let whole = Example::nested().description.to_string().into_bytes();
        for length in 0..whole.len() {
            assert!(Example::nested().read_as(KEY, whole[..length].to_vec()).is_err(), "{length} bytes");
        }
        for bit in 0..whole.len() * 8 {
            let mut changed = whole.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            if let Ok(Some(weight)) = Example::nested().read_as(KEY, changed) {
                assert_eq!(weight.matrix.to_f32().len(), ROWS * COLS, "bit {bit}");
            }
        }
    }
}
