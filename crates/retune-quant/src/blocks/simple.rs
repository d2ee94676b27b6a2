//! Blocks of 32 values with one scale d and perhaps one offset m, both in half precision: y = d (q - bias) or y = d q + m.
//!
//! The low nibbles of the 16 bytes of quants are values 0 to 15, the high nibbles 16 to 31. Where there are fifth bits, bit i
//! of a 32-bit word belongs to value i.

use super::{Block, Encode, f16_at, fill, put_f16};

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Q8_0;

/// Bytes: d 0..2, nibbles 2..18.
impl Block<18, 32> for Q4_0 {
    #[inline(always)]
    fn decode(src: &[u8; 18], dst: &mut [f32; 32]) {
        let (d, quants) = (f16_at(src, 0), &src[2..]);
        let (low, high) = dst.split_at_mut(16);
        fill(low, |i| d * ((i32::from(quants[i] & 15) - 8) as f32));
        fill(high, |i| d * ((i32::from(quants[i] >> 4) - 8) as f32));
    }
}

/// Bytes: d 0..2, m 2..4, nibbles 4..20.
impl Block<20, 32> for Q4_1 {
    #[inline(always)]
    fn decode(src: &[u8; 20], dst: &mut [f32; 32]) {
        let (d, m, quants) = (f16_at(src, 0), f16_at(src, 2), &src[4..]);
        let (low, high) = dst.split_at_mut(16);
        fill(low, |i| d * f32::from(quants[i] & 15) + m);
        fill(high, |i| d * f32::from(quants[i] >> 4) + m);
    }
}

/// Bytes: d 0..2, fifth bits 2..6, nibbles 6..22.
impl Block<22, 32> for Q5_0 {
    #[inline(always)]
    fn decode(src: &[u8; 22], dst: &mut [f32; 32]) {
        let (d, quants) = (f16_at(src, 0), &src[6..]);
        let fifths = i32::from_le_bytes([src[2], src[3], src[4], src[5]]);
        let fifth = |i: usize| ((fifths >> i) & 1) << 4;
        let (low, high) = dst.split_at_mut(16);
        fill(low, |i| d * ((i32::from(quants[i] & 15) | fifth(i)) - 16) as f32);
        fill(high, |i| d * ((i32::from(quants[i] >> 4) | fifth(i + 16)) - 16) as f32);
    }
}

/// Bytes: d 0..2, m 2..4, fifth bits 4..8, nibbles 8..24.
impl Block<24, 32> for Q5_1 {
    #[inline(always)]
    fn decode(src: &[u8; 24], dst: &mut [f32; 32]) {
        let (d, m, quants) = (f16_at(src, 0), f16_at(src, 2), &src[8..]);
        let fifths = i32::from_le_bytes([src[4], src[5], src[6], src[7]]);
        let fifth = |i: usize| ((fifths >> i) & 1) << 4;
        let (low, high) = dst.split_at_mut(16);
        fill(low, |i| d * (i32::from(quants[i] & 15) | fifth(i)) as f32 + m);
        fill(high, |i| d * (i32::from(quants[i] >> 4) | fifth(i + 16)) as f32 + m);
    }
}

/// Bytes: d 0..2, signed bytes 2..34.
impl Block<34, 32> for Q8_0 {
    #[inline(always)]
    fn decode(src: &[u8; 34], dst: &mut [f32; 32]) {
        let (d, quants) = (f16_at(src, 0), &src[2..]);
        fill(dst, |i| f32::from(quants[i] as i8) * d);
    }
}

/// The value of the greatest magnitude, the first of several.
fn extreme(src: &[f32; 32]) -> f32 {
    src.iter().fold(src[0], |extreme, &value| if value.abs() > extreme.abs() { value } else { extreme })
}

fn reciprocal(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Packs 32 quants of up to 5 bits: the low nibbles of `quants`, and the fifth bits that are left over.
fn pack(q: impl Fn(usize) -> u8, quants: &mut [u8]) -> u32 {
    let mut fifths = 0;
    for (i, byte) in quants.iter_mut().enumerate() {
        let (low, high) = (q(i), q(i + 16));
        *byte = low & 15 | high << 4;
        fifths |= u32::from(low >> 4) << i | u32::from(high >> 4) << (i + 16);
    }
    fifths
}

/// The least value, and what the range of values is divided into `steps` by.
fn offset_and_step(src: &[f32; 32], steps: f32) -> (f32, f32) {
    let least = src.iter().copied().fold(f32::INFINITY, f32::min);
    let greatest = src.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (least, (greatest - least) / steps)
}

// Codes are those of the `gguf` Python package, so the order of operations is its own.

impl Encode<18, 32> for Q4_0 {
    fn encode(src: &[f32; 32], dst: &mut [u8; 18]) {
        let d = extreme(src) / -8.0;
        let by = reciprocal(d);
        put_f16(dst, 0, d);
        pack(|i| ((src[i] * by + 8.5) as u8).min(15), &mut dst[2..]);
    }
}

impl Encode<20, 32> for Q4_1 {
    fn encode(src: &[f32; 32], dst: &mut [u8; 20]) {
        let (m, d) = offset_and_step(src, 15.0);
        let by = reciprocal(d);
        put_f16(dst, 0, d);
        put_f16(dst, 2, m);
        pack(|i| (((src[i] - m) * by + 0.5) as u8).min(15), &mut dst[4..]);
    }
}

impl Encode<22, 32> for Q5_0 {
    fn encode(src: &[f32; 32], dst: &mut [u8; 22]) {
        let d = extreme(src) / -16.0;
        let by = reciprocal(d);
        put_f16(dst, 0, d);
        let fifths = pack(|i| ((src[i] * by + 16.5) as u8).min(31), &mut dst[6..]);
        dst[2..6].copy_from_slice(&fifths.to_le_bytes());
    }
}

impl Encode<24, 32> for Q5_1 {
    fn encode(src: &[f32; 32], dst: &mut [u8; 24]) {
        let (m, d) = offset_and_step(src, 31.0);
        let by = reciprocal(d);
        put_f16(dst, 0, d);
        put_f16(dst, 2, m);
        let fifths = pack(|i| (((src[i] - m) * by + 0.5) as u8).min(31), &mut dst[8..]);
        dst[4..8].copy_from_slice(&fifths.to_le_bytes());
    }
}

impl Encode<34, 32> for Q8_0 {
    fn encode(src: &[f32; 32], dst: &mut [u8; 34]) {
        let d = extreme(src).abs() / 127.0;
        let by = reciprocal(d);
        put_f16(dst, 0, d);
        for (byte, value) in dst[2..].iter_mut().zip(src) {
            *byte = (value * by).round() as i8 as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One byte of nibbles (low 1, high 15) for values 3 and 19, all others zero, and the fifth bit of value 19.
    fn block<const N: usize>(halves: &[u16], quants: usize, fifth: Option<usize>) -> [u8; N] {
        let mut src = [0; N];
        for (i, half) in halves.iter().enumerate() {
            src[2 * i..2 * i + 2].copy_from_slice(&half.to_le_bytes());
        }
        src[quants + 3] = 0xF1;
        if let Some(at) = fifth {
            src[at + 2] = 1 << 3;
        }
        src
    }

    const TWO: u16 = 0x4000;
    const MINUS_ONE: u16 = 0xBC00;

    #[test]
    fn nibbles_and_fifth_bits_reach_their_values() {
        let mut y = [0.0; 32];
        Q4_0::decode(&block(&[TWO], 2, None), &mut y);
        assert_eq!((y[0], y[3], y[19], y[31]), (-16.0, -14.0, 14.0, -16.0));
        Q4_1::decode(&block(&[TWO, MINUS_ONE], 4, None), &mut y);
        assert_eq!((y[0], y[3], y[19], y[31]), (-1.0, 1.0, 29.0, -1.0));
        Q5_0::decode(&block(&[TWO], 6, Some(2)), &mut y);
        assert_eq!((y[0], y[3], y[19], y[31]), (-32.0, -30.0, 30.0, -32.0));
        Q5_1::decode(&block(&[TWO, MINUS_ONE], 8, Some(4)), &mut y);
        assert_eq!((y[0], y[3], y[19], y[31]), (-1.0, 1.0, 61.0, -1.0));
    }

    #[test]
    fn bytes_are_signed() {
        let mut src = [0; 34];
        src[..2].copy_from_slice(&TWO.to_le_bytes());
        (src[2], src[33]) = (0x80, 0x7F);
        let mut y = [0.0; 32];
        Q8_0::decode(&src, &mut y);
        assert_eq!((y[0], y[1], y[31]), (-256.0, 0.0, 254.0));
    }
}
