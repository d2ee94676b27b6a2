//! The 4-bit storage of bitsandbytes: NF4 and FP4 (Dettmers et al. 2023, "QLoRA", section 3).
//!
//! All values of a matrix, row after row, are one sequence that is cut into blocks of `blocksize`, so that a block may begin in one row
//! and end in the next. A value is one of the 16 of `code` times the greatest magnitude of its block, `absmax`. Two indices into `code`
//! share a byte, the first in its high half. With double quantization the magnitudes are stored in 8 bits themselves ([`Absmax::nested`]).
//! The layout is that of `QuantState` and `dequantize_4bit` in bitsandbytes' `functional.py`. [`encode`](mod@encode) is the way there.

pub mod encode;

use std::ops::{Range, RangeInclusive};

use retune_kernels::multiversion;

use crate::bytes::SharedBytes;
use crate::error::Error;

/// Values of the smallest and of the largest block that bitsandbytes writes; between them all powers of two.
const BLOCKSIZES: RangeInclusive<usize> = 32..=4096;

/// The codes of bitsandbytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantType {
    /// Quantiles of the normal distribution.
    NF4,
    /// A sign, two bits of exponent, one of mantissa.
    FP4,
}

impl QuantType {
    /// The code of this name in a checkpoint, `nf4` or `fp4`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "nf4" => Some(QuantType::NF4),
            "fp4" => Some(QuantType::FP4),
            _ => None,
        }
    }

    /// The code's name as papers spell it.
    pub const fn name(self) -> &'static str {
        match self {
            QuantType::NF4 => "NF4",
            QuantType::FP4 => "FP4",
        }
    }

    /// The code's name in a checkpoint.
    pub const fn key(self) -> &'static str {
        match self {
            QuantType::NF4 => "nf4",
            QuantType::FP4 => "fp4",
        }
    }
}

/// The greatest magnitude of each block, as it is stored.
#[derive(Clone, Debug)]
pub struct Absmax(Magnitudes);

#[derive(Clone, Debug)]
enum Magnitudes {
    /// Little-endian f32, which may lie anywhere in a file.
    Plain(SharedBytes),
    /// `map[index]` times the magnitude of the index's own block, plus `offset`.
    Nested { indices: SharedBytes, map: Box<[f32; 256]>, scales: Vec<f32>, blocksize: usize, offset: f32 },
}

impl Absmax {
    /// Magnitudes in f32, one after the other, little-endian.
    ///
    /// # Errors
    /// Bytes that are no whole number of values.
    pub fn plain(bytes: SharedBytes) -> Result<Self, Error> {
        let (rows, cols, found) = (1, bytes.len() / size_of::<f32>(), bytes.len());
        let expected = cols * size_of::<f32>();
        if found != expected {
            return Err(Error::ByteCount { storage: "F32", rows, cols, expected, found });
        }
        Ok(Self(Magnitudes::Plain(bytes)))
    }

    /// Magnitudes of a matrix with double quantization: `map[index]` times the magnitude of the index's own block of `blocksize`, plus `offset`.
    ///
    /// # Errors
    /// A block size that bitsandbytes does not have, and another number of scales than blocks that `indices` make.
    pub fn nested(
        indices: SharedBytes,
        map: [f32; 256],
        scales: Vec<f32>,
        blocksize: usize,
        offset: f32,
    ) -> Result<Self, Error> {
        check_blocksize(blocksize)?;
        check_absmax(indices.len(), blocksize, scales.len())?;
        Ok(Self(Magnitudes::Nested { indices, map: Box::new(map), scales, blocksize, offset }))
    }

    /// Number of blocks.
    fn len(&self) -> usize {
        match &self.0 {
            Magnitudes::Plain(bytes) => bytes.len() / size_of::<f32>(),
            Magnitudes::Nested { indices, .. } => indices.len(),
        }
    }

    /// Bytes they take.
    fn bytes_len(&self) -> usize {
        match &self.0 {
            Magnitudes::Plain(bytes) => bytes.len(),
            Magnitudes::Nested { indices, scales, .. } => indices.len() + size_of_val(scales.as_slice()),
        }
    }
}

impl From<Vec<f32>> for Absmax {
    fn from(values: Vec<f32>) -> Self {
        Self(Magnitudes::Plain(SharedBytes::from_f32(values)))
    }
}

/// The same, looked up once for all the blocks of a panel.
#[derive(Clone, Copy)]
enum Lookup<'a> {
    Plain(&'a [[u8; 4]]),
    Nested { indices: &'a [u8], map: &'a [f32; 256], scales: &'a [f32], blocksize: usize, offset: f32 },
}

impl<'a> Lookup<'a> {
    fn of(absmax: &'a Absmax) -> Self {
        match &absmax.0 {
            Magnitudes::Plain(bytes) => Lookup::Plain(bytes.as_chunks().0),
            Magnitudes::Nested { indices, map, scales, blocksize, offset } => {
                Lookup::Nested { indices, map, scales, blocksize: *blocksize, offset: *offset }
            }
        }
    }

    #[inline(always)]
    fn block(self, block: usize) -> f32 {
        match self {
            Lookup::Plain(values) => f32::from_le_bytes(values[block]),
            Lookup::Nested { indices, map, scales, blocksize, offset } => {
                map[usize::from(indices[block])] * scales[block / blocksize] + offset
            }
        }
    }
}

/// Values in 4 bits, of a matrix whose shape [`Matrix::from_four_bit`](crate::Matrix::from_four_bit) gives.
#[derive(Debug)]
pub struct FourBit {
    quant_type: QuantType,
    blocksize: usize,
    /// The two values that each byte of indices stands for, before scaling: one look-up instead of two.
    pairs: [[f32; 2]; 256],
    absmax: Absmax,
    indices: SharedBytes,
}

impl FourBit {
    /// Values that are `code[index]` times the `absmax` of their block of `blocksize` values.
    ///
    /// # Errors
    /// A block size that bitsandbytes does not have.
    pub fn new(
        quant_type: QuantType,
        blocksize: usize,
        code: [f32; 16],
        absmax: Absmax,
        indices: SharedBytes,
    ) -> Result<Self, Error> {
        check_blocksize(blocksize)?;
        let pairs = std::array::from_fn(|byte| [code[byte >> 4], code[byte & 15]]);
        Ok(Self { quant_type, blocksize, pairs, absmax, indices })
    }

    /// The code's name.
    pub(crate) fn name(&self) -> &'static str {
        self.quant_type.name()
    }

    /// Bytes of indices and block magnitudes.
    pub(crate) fn bytes_len(&self) -> usize {
        self.indices.len() + self.absmax.bytes_len()
    }

    /// Refuses a shape that has not exactly these values.
    pub(crate) fn check_shape(&self, rows: usize, cols: usize) -> Result<(), Error> {
        let storage = self.name();
        let Some(values) = rows.checked_mul(cols) else {
            return Err(Error::TooLarge { storage, rows, cols });
        };
        let expected = values.div_ceil(2);
        if self.indices.len() != expected {
            return Err(Error::ByteCount { storage, rows, cols, expected, found: self.indices.len() });
        }
        check_absmax(values, self.blocksize, self.absmax.len())
    }
}

fn check_blocksize(blocksize: usize) -> Result<(), Error> {
    if BLOCKSIZES.contains(&blocksize) && blocksize.is_power_of_two() {
        return Ok(());
    }
    Err(Error::Blocksize { found: blocksize })
}

fn check_absmax(values: usize, blocksize: usize, found: usize) -> Result<(), Error> {
    let expected = values.div_ceil(blocksize);
    if found == expected {
        return Ok(());
    }
    Err(Error::AbsmaxCount { values, blocksize, expected, found })
}

multiversion! {
    /// Decodes the panel `rows` x `cols` of a matrix with rows of `row_len` values into `dst`, row-major. The panel must lie inside the
    /// matrix and have columns. Row r is stored at `row_map[r]`, if there is a map.
    pub(crate) fn decode_panel(
        stored: &FourBit,
        row_len: usize,
        row_map: Option<&[u32]>,
        rows: Range<usize>,
        cols: Range<usize>,
        dst: &mut [f32],
    ) {
        let (indices, absmax): (&[u8], _) = (&stored.indices, Lookup::of(&stored.absmax));
        for (row, out) in rows.zip(dst.chunks_exact_mut(cols.len())) {
            let row = row_map.map_or(row, |map| map[row] as usize);
            decode_values(stored, indices, absmax, row * row_len + cols.start, out);
        }
    }
}

/// Decodes `dst.len()` values from number `start` of the whole matrix on, block by block.
#[inline(always)]
fn decode_values(stored: &FourBit, indices: &[u8], absmax: Lookup<'_>, start: usize, dst: &mut [f32]) {
    let (mut at, mut dst) = (start, dst);
    while !dst.is_empty() {
        let n = dst.len().min(stored.blocksize - at % stored.blocksize);
        let (block, rest) = dst.split_at_mut(n);
        decode_block(&stored.pairs, indices, at, absmax.block(at / stored.blocksize), block);
        at += n;
        dst = rest;
    }
}

/// Decodes values of one block: perhaps the second of a byte, then whole bytes, perhaps the first of a byte.
#[inline(always)]
fn decode_block(pairs: &[[f32; 2]; 256], indices: &[u8], at: usize, absmax: f32, dst: &mut [f32]) {
    let (second, dst) = dst.split_at_mut(usize::from(!at.is_multiple_of(2)).min(dst.len()));
    if let [value] = second {
        *value = pairs[usize::from(indices[at / 2])][1] * absmax;
    }
    let bytes = &indices[at.div_ceil(2)..];
    let (whole, last) = dst.as_chunks_mut::<2>();
    for (out, &byte) in whole.iter_mut().zip(bytes) {
        let [first, second] = pairs[usize::from(byte)];
        *out = [first * absmax, second * absmax];
    }
    if let ([last], Some(&byte)) = (last, bytes.get(whole.len())) {
        *last = pairs[usize::from(byte)][0] * absmax;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use retune_kernels::PanelSource;

    use super::*;
    use crate::matrix::Matrix;

    const BLOCKSIZE: usize = 32;

    /// Value number i of `count` has the index 7 i mod 16, and block b the magnitude 100^b.
    fn example(count: usize) -> FourBit {
        let index = |i: usize| (7 * i % 16) as u8;
        let bytes = (0..count).step_by(2).map(|i| index(i) << 4 | index(i + 1)).collect();
        let code = std::array::from_fn(|index| index as f32 - 5.0);
        let absmax: Vec<f32> = (0..count.div_ceil(BLOCKSIZE)).map(|block| 100f32.powi(block as i32)).collect();
        FourBit::new(QuantType::NF4, BLOCKSIZE, code, absmax.into(), SharedBytes::from_vec(bytes)).unwrap()
    }

    fn value(i: usize) -> f32 {
        ((7 * i % 16) as f32 - 5.0) * 100f32.powi((i / BLOCKSIZE) as i32)
    }

    #[test]
    fn the_first_index_of_a_byte_is_in_its_high_half() {
        let code = std::array::from_fn(|index| index as f32);
        let bytes = SharedBytes::from_vec(vec![0x1F, 0xA0]);
        let values = FourBit::new(QuantType::FP4, 64, code, vec![0.5].into(), bytes).unwrap();
        let matrix = Matrix::from_four_bit(1, 3, values).unwrap();
        assert_eq!(matrix.to_f32(), [0.5, 7.5, 5.0]);
        assert_eq!((matrix.storage(), matrix.bytes_len()), ("FP4", 6));
    }

    #[test]
    fn blocks_go_on_from_row_to_row_in_every_panel() {
        for (rows, cols) in [(3, 31), (3, 30), (2, 64), (5, 9), (1, 1)] {
            let matrix = Matrix::from_four_bit(rows, cols, example(rows * cols)).unwrap();
            for (first, start) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
                for (last, end) in (first + 1..=rows).flat_map(|row| (start + 1..=cols).map(move |col| (row, col))) {
                    let mut panel = vec![f32::NAN; (last - first) * (end - start)];
                    matrix.panel_f32(first..last, start..end, &mut panel);
                    let expected = (first..last).flat_map(|row| (start..end).map(move |col| value(row * cols + col)));
                    assert!(panel.iter().copied().eq(expected), "{rows} x {cols}: {first}..{last} x {start}..{end}");
                }
            }
        }
    }

    #[test]
    fn a_row_map_moves_rows_that_are_no_whole_blocks() {
        let matrix = Matrix::from_four_bit(3, 31, example(93)).unwrap();
        let mapped = matrix.clone().with_row_map(Arc::from([2, 0, 1])).unwrap();
        let mut row = vec![0.0; 31];
        for (mapped_row, stored_row) in [(0, 2), (1, 0), (2, 1)] {
            mapped.panel_f32(mapped_row..mapped_row + 1, 0..31, &mut row);
            assert_eq!(row, matrix.to_f32()[31 * stored_row..31 * (stored_row + 1)]);
        }
        assert_eq!(mapped.as_f32(), None);
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let refused = |rows, cols| Matrix::from_four_bit(rows, cols, example(93)).unwrap_err();
        let (storage, found) = ("NF4", 47);
        assert_eq!(refused(3, 32), Error::ByteCount { storage, rows: 3, cols: 32, expected: 48, found });
        assert_eq!(refused(0, 31), Error::ByteCount { storage, rows: 0, cols: 31, expected: 0, found });
        assert_eq!(refused(usize::MAX, 2), Error::TooLarge { storage, rows: usize::MAX, cols: 2 });
        let FourBit { blocksize, pairs, indices, .. } = example(93);
        let short = FourBit { quant_type: QuantType::NF4, blocksize, pairs, absmax: vec![1.0; 2].into(), indices };
        let expected = Error::AbsmaxCount { values: 93, blocksize, expected: 3, found: 2 };
        assert_eq!(Matrix::from_four_bit(3, 31, short).unwrap_err(), expected);
        for found in [0, 1, 16, 48, 8192, usize::MAX] {
            let bytes = SharedBytes::from_vec(vec![0; 8]);
            let values = FourBit::new(QuantType::NF4, found, [0.0; 16], vec![1.0].into(), bytes);
            assert_eq!(values.unwrap_err(), Error::Blocksize { found });
            let nested = Absmax::nested(SharedBytes::from_vec(vec![0]), [0.0; 256], vec![1.0], found, 0.0);
            assert_eq!(nested.unwrap_err(), Error::Blocksize { found });
        }
    }

    #[test]
    fn magnitudes_of_magnitudes_go_by_their_own_blocks() {
        let map: [f32; 256] = std::array::from_fn(|index| index as f32);
        let nested = |scales| Absmax::nested(SharedBytes::from_vec((0..65).collect()), map, scales, 32, 0.5);
        let absmax = nested(vec![1.0, -10.0, 100.0]).unwrap();
        assert_eq!((absmax.len(), absmax.bytes_len()), (65, 65 + 12));
        let lookup = Lookup::of(&absmax);
        assert_eq!([31, 32, 64].map(|block| lookup.block(block)), [31.5, -319.5, 6400.5]);
        let error = nested(vec![1.0, 2.0]).unwrap_err();
        assert_eq!(error, Error::AbsmaxCount { values: 65, blocksize: 32, expected: 3, found: 2 });
        let error = Absmax::plain(SharedBytes::from_vec(vec![0; 7])).unwrap_err();
        assert!(matches!(error, Error::ByteCount { expected: 4, found: 7, .. }));
    }

    #[test]
    fn names_are_those_of_a_checkpoint() {
        assert_eq!(QuantType::from_name("nf4"), Some(QuantType::NF4));
        assert_eq!(QuantType::from_name("fp4"), Some(QuantType::FP4));
        assert_eq!(QuantType::from_name("NF4"), None);
        assert_eq!(
            [QuantType::NF4, QuantType::FP4].map(|code| QuantType::from_name(code.key())),
            [Some(QuantType::NF4), Some(QuantType::FP4)]
        );
    }
}
