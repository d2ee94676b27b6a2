//! Decoding of stored rows to f32.
//!
//! One file holds one family of formats, and a format is one function from the bytes of a block to its values. The order
//! of operations is that of the `gguf` Python package (`gguf/quants.py`) and nothing is fused, so that values are the same
//! to the last bit on every instruction set. Decoding runs inside the packing of a matrix multiplication: the format is
//! looked at once for a panel, and all below is inlined into a copy for each instruction set that the compiler vectorises.
//!
//! The other way, a format that is written is a second function, from the values of a block to its bytes.

mod four_bits;
mod k_encode;
mod k_quants;
mod plain;
mod simple;

use std::ops::Range;

use half::f16;
use retune_kernels::multiversion;

use crate::format::Format;
use four_bits::{IQ4NL, IQ4XS, MXFP4};
use k_quants::{Q2K, Q3K, Q4K, Q5K, Q6K};
use plain::{BF16, F16, F32, f16_to_f32};
use simple::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};

/// A format whose blocks are `LEN` values in `BYTES` bytes.
trait Block<const BYTES: usize, const LEN: usize> {
    fn decode(src: &[u8; BYTES], dst: &mut [f32; LEN]);
}

/// A format that is written, too.
trait Encode<const BYTES: usize, const LEN: usize>: Block<BYTES, LEN> {
    fn encode(src: &[f32; LEN], dst: &mut [u8; BYTES]);
}

/// Encodes whole blocks of `src` as `format`; false, and nothing done, where that is only read.
pub(crate) fn encode(format: Format, src: &[f32], dst: &mut [u8]) -> bool {
    match format {
        Format::F32 => encode_blocks::<F32, _, _>(src, dst),
        Format::F16 => encode_blocks::<F16, _, _>(src, dst),
        Format::BF16 => encode_blocks::<BF16, _, _>(src, dst),
        Format::Q4_0 => encode_blocks::<Q4_0, _, _>(src, dst),
        Format::Q4_1 => encode_blocks::<Q4_1, _, _>(src, dst),
        Format::Q5_0 => encode_blocks::<Q5_0, _, _>(src, dst),
        Format::Q5_1 => encode_blocks::<Q5_1, _, _>(src, dst),
        Format::Q8_0 => encode_blocks::<Q8_0, _, _>(src, dst),
        Format::Q4K => encode_blocks::<Q4K, _, _>(src, dst),
        Format::Q5K => encode_blocks::<Q5K, _, _>(src, dst),
        Format::Q6K => encode_blocks::<Q6K, _, _>(src, dst),
        Format::Q2K | Format::Q3K | Format::IQ4NL | Format::IQ4XS | Format::MXFP4 => return false,
    }
    true
}

fn encode_blocks<B: Encode<BYTES, LEN>, const BYTES: usize, const LEN: usize>(src: &[f32], dst: &mut [u8]) {
    for (dst, src) in dst.as_chunks_mut::<BYTES>().0.iter_mut().zip(src.as_chunks::<LEN>().0) {
        B::encode(src, dst);
    }
}

/// Rows of blocks laid end to end.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'a> {
    pub bytes: &'a [u8],
    pub row_bytes: usize,
    /// Where row r is stored, if not at r.
    pub row_map: Option<&'a [u32]>,
}

impl<'a> Stored<'a> {
    #[inline(always)]
    fn row(&self, row: usize) -> &'a [u8] {
        let stored = self.row_map.map_or(row, |map| map[row] as usize);
        &self.bytes[stored * self.row_bytes..][..self.row_bytes]
    }
}

multiversion! {
    /// Decodes the panel `rows` x `cols`, which must lie inside what is stored and have columns, into `dst`, row-major.
    pub(crate) fn decode_panel(format: Format, stored: Stored<'_>, rows: Range<usize>, cols: Range<usize>, dst: &mut [f32]) {
        match format {
            Format::F32 => decode_rows::<F32, _, _>(stored, rows, cols, dst),
            Format::F16 => decode_rows::<F16, _, _>(stored, rows, cols, dst),
            Format::BF16 => decode_rows::<BF16, _, _>(stored, rows, cols, dst),
            Format::Q4_0 => decode_rows::<Q4_0, _, _>(stored, rows, cols, dst),
            Format::Q4_1 => decode_rows::<Q4_1, _, _>(stored, rows, cols, dst),
            Format::Q5_0 => decode_rows::<Q5_0, _, _>(stored, rows, cols, dst),
            Format::Q5_1 => decode_rows::<Q5_1, _, _>(stored, rows, cols, dst),
            Format::Q8_0 => decode_rows::<Q8_0, _, _>(stored, rows, cols, dst),
            Format::Q2K => decode_rows::<Q2K, _, _>(stored, rows, cols, dst),
            Format::Q3K => decode_rows::<Q3K, _, _>(stored, rows, cols, dst),
            Format::Q4K => decode_rows::<Q4K, _, _>(stored, rows, cols, dst),
            Format::Q5K => decode_rows::<Q5K, _, _>(stored, rows, cols, dst),
            Format::Q6K => decode_rows::<Q6K, _, _>(stored, rows, cols, dst),
            Format::IQ4NL => decode_rows::<IQ4NL, _, _>(stored, rows, cols, dst),
            Format::IQ4XS => decode_rows::<IQ4XS, _, _>(stored, rows, cols, dst),
            Format::MXFP4 => decode_rows::<MXFP4, _, _>(stored, rows, cols, dst),
        }
    }
}

#[inline(always)]
fn decode_rows<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(
    stored: Stored<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
    dst: &mut [f32],
) {
    for (row, out) in rows.zip(dst.chunks_exact_mut(cols.len())) {
        decode_columns::<B, BYTES, LEN>(stored.row(row), cols.start, out);
    }
}

/// Decodes `dst.len()` values of a row from column `start` on: the rest of a block, whole blocks, the beginning of a block.
#[inline(always)]
fn decode_columns<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(
    row: &[u8],
    start: usize,
    dst: &mut [f32],
) {
    let (blocks, _) = row.as_chunks::<BYTES>();
    let mut blocks = &blocks[start / LEN..];
    let mut dst = dst;
    let skip = start % LEN;
    if skip > 0
        && let Some((block, rest)) = blocks.split_first()
    {
        let n = dst.len().min(LEN - skip);
        let (head, tail) = dst.split_at_mut(n);
        decode_part::<B, BYTES, LEN>(block, skip, head);
        blocks = rest;
        dst = tail;
    }
    let (whole, tail) = dst.as_chunks_mut::<LEN>();
    for (out, block) in whole.iter_mut().zip(blocks) {
        B::decode(block, out);
    }
    if !tail.is_empty()
        && let Some(block) = blocks.get(whole.len())
    {
        decode_part::<B, BYTES, LEN>(block, 0, tail);
    }
}

/// Writes `value(i)` for each i, 16 at a time: they fill a vector, or two or four.
///
/// The compiler would rather take a value of each of several blocks or parts at once, gathered and scattered at a fifth of the speed.
/// An assembly of no instructions is what a loop cannot be vectorised over; the 16 in a row can still be.
#[inline(always)]
fn fill(out: &mut [f32], value: impl Fn(usize) -> f32) {
    debug_assert!(out.len().is_multiple_of(16));
    for (first, vector) in (0..).step_by(16).zip(out.as_chunks_mut::<16>().0) {
        // All are read before one is written: what they are read from could be what is written, for all the compiler knows.
        let mut values = [0.0; 16];
        for (i, v) in values.iter_mut().enumerate() {
            *v = value(first + i);
        }
        *vector = values;
        // SAFETY: it does nothing.
        unsafe { std::arch::asm!("", options(nomem, nostack, preserves_flags)) };
    }
}

/// Decodes the values of one block from number `skip` on.
#[inline(always)]
fn decode_part<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(
    block: &[u8; BYTES],
    skip: usize,
    dst: &mut [f32],
) {
    let mut values = [0.0; LEN];
    B::decode(block, &mut values);
    dst.copy_from_slice(&values[skip..][..dst.len()]);
}

/// The half-precision number at byte `at` of a block.
#[inline(always)]
fn f16_at<const BYTES: usize>(src: &[u8; BYTES], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([src[at], src[at + 1]]))
}

/// Rounds a value to the half-precision number at byte `at` of a block.
fn put_f16<const BYTES: usize>(dst: &mut [u8; BYTES], at: usize, value: f32) {
    dst[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}
