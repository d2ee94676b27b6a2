//! The 8-bit storage of LLM.int8() (Dettmers et al. 2022, section 3.1): a signed byte a value, and of each row the greatest magnitude, to which
//! 127 belongs. Numbers are those of bitsandbytes' `int8_vectorwise_quant` and `int8_vectorwise_dequant`.

use std::ops::Range;

use half::f16;
use retune_kernels::multiversion;

use crate::bytes::SharedBytes;
use crate::error::Error;

/// 1 / 127 as bitsandbytes writes it.
const STEP: f32 = 7.874_016e-3;

/// Values in 8 bits, of a matrix whose shape [`Matrix::from_int8_rows`](crate::Matrix::from_int8_rows) gives.
#[derive(Debug)]
pub struct Int8Rows {
    values: SharedBytes,
    /// The greatest magnitude of each row.
    absmax: Vec<f32>,
}

impl Int8Rows {
    /// What such storage is called.
    pub const NAME: &'static str = "INT8";

    /// Values that are `value / 127` times the `absmax` of their row.
    pub fn new(values: SharedBytes, absmax: Vec<f32>) -> Self {
        Self { values, absmax }
    }

    /// Bytes of values and scales.
    pub(crate) fn bytes_len(&self) -> usize {
        self.values.len() + size_of_val(self.absmax.as_slice())
    }

    /// Refuses a shape that has not exactly these values.
    pub(crate) fn check_shape(&self, rows: usize, cols: usize) -> Result<(), Error> {
        let storage = Self::NAME;
        let Some(expected) = rows.checked_mul(cols) else {
            return Err(Error::TooLarge { storage, rows, cols });
        };
        if self.values.len() != expected {
            return Err(Error::ByteCount { storage, rows, cols, expected, found: self.values.len() });
        }
        if self.absmax.len() != rows {
            return Err(Error::RowScales { expected: rows, found: self.absmax.len() });
        }
        Ok(())
    }
}

multiversion! {
    /// Decodes the panel `rows` x `cols` of a matrix with rows of `row_len` values into `dst`, row-major. The panel must lie inside the
    /// matrix and have columns. Row r is stored at `row_map[r]`, if there is a map.
    pub(crate) fn decode_panel(
        stored: &Int8Rows,
        row_len: usize,
        row_map: Option<&[u32]>,
        rows: Range<usize>,
        cols: Range<usize>,
        dst: &mut [f32],
    ) {
        let values: &[u8] = &stored.values;
        for (row, out) in rows.zip(dst.chunks_exact_mut(cols.len())) {
            let row = row_map.map_or(row, |map| map[row] as usize);
            let (bytes, absmax) = (&values[row * row_len + cols.start..][..cols.len()], stored.absmax[row]);
            for (out, &byte) in out.iter_mut().zip(bytes) {
                *out = f32::from(byte as i8) * absmax * STEP;
            }
        }
    }
}

/// Puts a row into bytes, and returns its greatest magnitude: both after the values are rounded to f16, as bitsandbytes does first. Values must
/// be finite; one beyond f16's range counts as its largest.
pub fn encode_row(row: &[f32], bytes: &mut [u8]) -> f32 {
    let rounded = |value: f32| f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_f32();
    let absmax = row.iter().map(|value| rounded(*value).abs()).fold(0.0, f32::max);
    // PyTorch divides a number by a tensor so.
    let factor = 1.0 / absmax * 127.0;
    for (byte, value) in bytes.iter_mut().zip(row) {
        let scaled = rounded(*value) * factor;
        // A row of zeros stays one: what is no number becomes 0.
        *byte = scaled.round_ties_even() as i8 as u8;
    }
    absmax
}
