//! Blocks of 32 values with one scale d and perhaps one offset m, both in half precision: y = d (q - bias) or y = d q + m.
//!
//! The low nibbles of the 16 bytes of quants are values 0 to 15, the high nibbles 16 to 31. Where there are fifth bits, bit i
//! of a 32-bit word belongs to value i.

use super::{Block, f16_at, fill};

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
