//! Blocks of 256 values in parts of 16 or 32, whose scales (and offsets) are small integers times one half-precision number.
//!
//! The parts' factors are computed first, then y = scale q - offset or y = scale q. Quants of few bits lie in planes: a
//! plane of 32 or 64 bytes holds its first values in the lowest bits, the next 32 or 64 in the bits above, and so on.

use super::{Block, f16_at, fill};

pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

/// Bytes: scales and offsets (4 bits each) 0..16, quants (2 bits) 16..80, d 80..82, dmin 82..84.
impl Block<84, 256> for Q2K {
    #[inline(always)]
    fn decode(src: &[u8; 84], dst: &mut [f32; 256]) {
        let (scales, quants) = (&src[..16], &src[16..80]);
        let (d, dmin) = (f16_at(src, 80), f16_at(src, 82));
        for (part, (out, &packed)) in dst.as_chunks_mut::<16>().0.iter_mut().zip(scales).enumerate() {
            let scale = d * f32::from(packed & 15);
            let offset = dmin * f32::from(packed >> 4);
            let plane = &quants[part / 8 * 32 + part % 2 * 16..][..16];
            let shift = part / 2 % 4 * 2;
            fill(out, |i| scale * f32::from((plane[i] >> shift) & 3) - offset);
        }
    }
}

/// Bytes: third bits 0..32 (set: no 4 is taken off), quants (2 bits) 32..96, scales (6 bits) 96..108, d 108..110.
impl Block<110, 256> for Q3K {
    #[inline(always)]
    fn decode(src: &[u8; 110], dst: &mut [f32; 256]) {
        let (thirds, quants, packed) = (&src[..32], &src[32..96], &src[96..108]);
        let d = f16_at(src, 108);
        for (part, out) in dst.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let low = (packed[part % 8] >> (part / 8 * 4)) & 15;
            let high = (packed[8 + part % 4] >> (part / 4 * 2)) & 3;
            let scale = d * ((i32::from(low | high << 4) - 32) as f32);
            let plane = &quants[part / 8 * 32 + part % 2 * 16..][..16];
            let third = &thirds[part % 2 * 16..][..16];
            let (shift, bit) = (part / 2 % 4 * 2, part / 2);
            fill(out, |i| {
                let q = (plane[i] >> shift) & 3 | ((third[i] >> bit) & 1) << 2;
                scale * ((i32::from(q) - 4) as f32)
            });
        }
    }
}

/// Bytes: d 0..2, dmin 2..4, scales and offsets 4..16, quants (4 bits) 16..144.
impl Block<144, 256> for Q4K {
    #[inline(always)]
    fn decode(src: &[u8; 144], dst: &mut [f32; 256]) {
        let factors = scales_and_offsets(src);
        let planes = src[16..].as_chunks::<32>().0;
        for (i, (out, plane)) in dst.as_chunks_mut::<64>().0.iter_mut().zip(planes).enumerate() {
            let (low, high) = out.split_at_mut(32);
            let (scale, offset) = factors[2 * i];
            fill(low, |i| scale * f32::from(plane[i] & 15) - offset);
            let (scale, offset) = factors[2 * i + 1];
            fill(high, |i| scale * f32::from(plane[i] >> 4) - offset);
        }
    }
}

/// Bytes: d 0..2, dmin 2..4, scales and offsets 4..16, fifth bits 16..48, quants (4 bits) 48..176.
impl Block<176, 256> for Q5K {
    #[inline(always)]
    fn decode(src: &[u8; 176], dst: &mut [f32; 256]) {
        let factors = scales_and_offsets(src);
        let fifths = &src[16..48];
        let planes = src[48..].as_chunks::<32>().0;
        for (i, (out, plane)) in dst.as_chunks_mut::<64>().0.iter_mut().zip(planes).enumerate() {
            let (low, high) = out.split_at_mut(32);
            let (scale, offset) = factors[2 * i];
            fill(low, |j| scale * f32::from(plane[j] & 15 | ((fifths[j] >> (2 * i)) & 1) << 4) - offset);
            let (scale, offset) = factors[2 * i + 1];
            fill(high, |j| scale * f32::from(plane[j] >> 4 | ((fifths[j] >> (2 * i + 1)) & 1) << 4) - offset);
        }
    }
}

/// Bytes: low 4 bits 0..128, high 2 bits 128..192, scales (signed bytes) 192..208, d 208..210.
impl Block<210, 256> for Q6K {
    #[inline(always)]
    fn decode(src: &[u8; 210], dst: &mut [f32; 256]) {
        let (lows, highs, scales) = (&src[..128], &src[128..192], &src[192..208]);
        let d = f16_at(src, 208);
        for (part, (out, &scale)) in dst.as_chunks_mut::<16>().0.iter_mut().zip(scales).enumerate() {
            let scale = d * f32::from(scale as i8);
            let low = &lows[part / 8 * 64 + part % 4 * 16..][..16];
            let high = &highs[part / 8 * 32 + part % 2 * 16..][..16];
            let (low_shift, high_shift) = (part / 4 % 2 * 4, part / 2 % 4 * 2);
            fill(out, |i| {
                let q = (low[i] >> low_shift) & 15 | ((high[i] >> high_shift) & 3) << 4;
                scale * ((i32::from(q) - 32) as f32)
            });
        }
    }
}

/// Scale and offset of each of the 8 parts of a Q4_K or Q5_K block, whose first 16 bytes hold d, dmin and 6 bits for each:
/// those of parts 0 to 3 whole, and in what is left the low 4 and the high 2 bits of parts 4 to 7.
#[inline(always)]
pub(super) fn scales_and_offsets<const BYTES: usize>(src: &[u8; BYTES]) -> [(f32, f32); 8] {
    let (d, dmin) = (f16_at(src, 0), f16_at(src, 2));
    let packed = &src[4..16];
    let mut factors = [(0.0, 0.0); 8];
    for i in 0..4 {
        let (scale, offset, low) = (packed[i], packed[i + 4], packed[i + 8]);
        factors[i] = (d * f32::from(scale & 63), dmin * f32::from(offset & 63));
        factors[i + 4] = (d * f32::from(low & 15 | (scale >> 6) << 4), dmin * f32::from(low >> 4 | (offset >> 6) << 4));
    }
    factors
}
