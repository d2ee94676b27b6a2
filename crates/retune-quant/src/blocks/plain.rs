//! Floating-point values as they are: a block is one value.

use half::{bf16, f16};

use super::{Block, Encode};

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;

impl Block<4, 1> for F32 {
    #[inline(always)]
    fn decode(src: &[u8; 4], dst: &mut [f32; 1]) {
        *dst = [f32::from_le_bytes(*src)];
    }
}

impl Block<2, 1> for F16 {
    #[inline(always)]
    fn decode(src: &[u8; 2], dst: &mut [f32; 1]) {
        *dst = [f16_to_f32(u16::from_le_bytes(*src))];
    }
}

impl Block<2, 1> for BF16 {
    #[inline(always)]
    fn decode(src: &[u8; 2], dst: &mut [f32; 1]) {
        *dst = [f32::from_bits(u32::from(u16::from_le_bytes(*src)) << 16)];
    }
}

impl Encode<4, 1> for F32 {
    fn encode(src: &[f32; 1], dst: &mut [u8; 4]) {
        *dst = src[0].to_le_bytes();
    }
}

/// To the nearest, ties to even.
impl Encode<2, 1> for F16 {
    fn encode(src: &[f32; 1], dst: &mut [u8; 2]) {
        *dst = f16::from_f32(src[0]).to_le_bytes();
    }
}

/// To the nearest, ties to even.
impl Encode<2, 1> for BF16 {
    fn encode(src: &[f32; 1], dst: &mut [u8; 2]) {
        *dst = bf16::from_f32(src[0]).to_le_bytes();
    }
}

/// The value of a half-precision number, exactly, in selects that vectorise (a library's function may not inline).
///
/// Exponent and mantissa move to their places in an f32 and the exponent is rebased from 15 to 127. An infinity or NaN needs
/// 112 more to reach the top exponent again. A subnormal is read as 2^-14 (1 + m/1024), from which the 2^-14 is taken.
#[inline(always)]
pub(super) fn f16_to_f32(half: u16) -> f32 {
    const REBASE: u32 = (127 - 15) << 23;
    const TOP: u32 = 0x7C00 << 13;
    let half = u32::from(half);
    let magnitude = (half & 0x7FFF) << 13;
    let rebased = magnitude + REBASE;
    let subnormal = (f32::from_bits(rebased + (1 << 23)) - f32::from_bits(REBASE + (1 << 23))).to_bits();
    let bits = match magnitude & TOP {
        0 => subnormal,
        TOP => rebased + REBASE,
        _ => rebased,
    };
    f32::from_bits(bits | (half & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_precision_number_is_exact() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32_const());
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "{bits:#06x}: {ours} {theirs}"
            );
        }
    }

    #[test]
    fn plain_values_are_little_endian() {
        let mut value = [0.0];
        F32::decode(&[0x00, 0x00, 0x20, 0xC0], &mut value);
        assert_eq!(value, [-2.5]);
        F16::decode(&[0x00, 0xC1], &mut value);
        assert_eq!(value, [-2.5]);
        BF16::decode(&[0x20, 0xC0], &mut value);
        assert_eq!(value, [-2.5]);
    }
}
