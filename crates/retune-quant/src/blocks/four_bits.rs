//! Blocks whose quants are 4-bit indices into 16 values that are not evenly spaced: IQ4_NL and IQ4_XS have steps that grow with the magnitude,
//! MXFP4 the values of a floating-point number of 4 bits (E2M1, doubled) under a power of two.
//!
//! The low nibbles of 16 bytes of quants are 16 values, the high nibbles the 16 after them.

use super::{Block, f16_at, fill};

pub(super) struct IQ4NL;
pub(super) struct IQ4XS;
pub(super) struct MXFP4;

const GROWING: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The 32 values of 16 bytes of quants.
#[inline(always)]
fn look_up(values: &[i8; 16], scale: f32, quants: &[u8], dst: &mut [f32]) {
    let (low, high) = dst.split_at_mut(16);
    fill(low, |i| scale * f32::from(values[usize::from(quants[i] & 15)]));
    fill(high, |i| scale * f32::from(values[usize::from(quants[i] >> 4)]));
}

/// Bytes: d 0..2, nibbles 2..18.
impl Block<18, 32> for IQ4NL {
    #[inline(always)]
    fn decode(src: &[u8; 18], dst: &mut [f32; 32]) {
        look_up(&GROWING, f16_at(src, 0), &src[2..], dst);
    }
}

/// Bytes: d 0..2, high 2 bits of the 8 parts' scales 2..4, low 4 bits 4..8, nibbles 8..136.
impl Block<136, 256> for IQ4XS {
    #[inline(always)]
    fn decode(src: &[u8; 136], dst: &mut [f32; 256]) {
        let d = f16_at(src, 0);
        let highs = u16::from_le_bytes([src[2], src[3]]);
        let parts = dst.as_chunks_mut::<32>().0.iter_mut().zip(src[8..].as_chunks::<16>().0);
        for (part, (out, quants)) in parts.enumerate() {
            let low = (src[4 + part / 2] >> (part % 2 * 4)) & 15;
            let high = ((highs >> (2 * part)) & 3) as u8;
            look_up(&GROWING, d * ((i32::from(low | high << 4) - 32) as f32), quants, out);
        }
    }
}

/// Bytes: exponent 0..1, nibbles 1..17. The scale is half of 2^(exponent - 127), since the values are doubled.
impl Block<17, 32> for MXFP4 {
    #[inline(always)]
    fn decode(src: &[u8; 17], dst: &mut [f32; 32]) {
        let exponent = u32::from(src[0]);
        // The two least are subnormal.
        let bits = if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 };
        look_up(&E2M1, f32::from_bits(bits), &src[1..], dst);
    }
}
