//! Encoding to Q4_K, Q5_K and Q6_K.
//!
//! Scale and offset of a part are searched as llama.cpp does: several trial scales around the one that the range of values gives, for each the
//! quants it rounds to, and for these the scale and offset of the least weighted squared error (a linear regression); the best trial is kept,
//! and those after it begin from its offset.
//! Then the parts' scales are themselves rounded, and the quants are chosen anew for what is stored.

use super::k_quants::{Q4K, Q5K, Q6K, scales_and_offsets};
use super::{Encode, f16_at, put_f16};

/// Below this a part of Q6_K counts as zero.
const NOTHING: f32 = 1e-15;

/// The trial scales of a search for a scale and an offset: the range of values into `steps + first + 0.1 i` for i up to `count`.
struct Trials {
    /// The greatest quant.
    steps: f32,
    first: f32,
    count: usize,
}

const FOUR_BITS: Trials = Trials { steps: 15.0, first: -1.0, count: 20 };
const FIVE_BITS: Trials = Trials { steps: 31.0, first: -0.5, count: 15 };

impl Trials {
    /// The scale and the offset, at least 0 and taken off, that a part of 32 values is encoded with.
    fn best(&self, x: &[f32; 32]) -> (f32, f32) {
        let mean = (x.iter().map(|x| x * x).sum::<f32>() / 32.0).sqrt();
        let weights = x.map(|x| mean + x.abs());
        let least = x.iter().copied().fold(0.0, f32::min);
        let greatest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if greatest == least {
            return (0.0, -least);
        }
        let sum_w: f32 = weights.iter().sum();
        let sum_x: f32 = weights.iter().zip(x).map(|(w, x)| w * x).sum();
        let quants = |steps: f32, least: f32| {
            let by = steps / (greatest - least);
            x.map(|x| (by * (x - least)).round_ties_even().clamp(0.0, self.steps))
        };
        let error = |quants: &[f32; 32], scale: f32, least: f32| -> f32 {
            let parts = quants.iter().zip(x).zip(&weights);
            parts.map(|((q, x), w)| w * (scale * q + least - x).powi(2)).sum()
        };
        let mut best = ((greatest - least) / self.steps, least);
        let mut best_error = error(&quants(self.steps, least), best.0, best.1);
        for trial in 0..=self.count {
            // From the best offset so far.
            let q = quants(self.first + 0.1 * trial as f32 + self.steps, best.1);
            let (mut sum_q, mut sum_qq, mut sum_xq) = (0.0, 0.0, 0.0);
            for ((q, x), w) in q.iter().zip(x).zip(&weights) {
                sum_q += w * q;
                sum_qq += w * q * q;
                sum_xq += w * q * x;
            }
            let determinant = sum_w * sum_qq - sum_q * sum_q;
            if determinant <= 0.0 {
                continue;
            }
            let mut scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
            let mut least = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
            if least > 0.0 {
                (scale, least) = (sum_xq / sum_qq, 0.0);
            }
            let error = error(&q, scale, least);
            if error < best_error {
                (best_error, best) = (error, (scale, least));
            }
        }
        (best.0, -best.1)
    }

    /// Writes d, dmin and the parts' scales and offsets into the first 16 bytes of a block, and gives the quants for them.
    fn encode<const BYTES: usize>(&self, src: &[f32; 256], dst: &mut [u8; BYTES]) -> [u8; 256] {
        let parts = src.as_chunks::<32>().0;
        let mut found = [(0.0f32, 0.0f32); 8];
        for (found, part) in found.iter_mut().zip(parts) {
            *found = self.best(part);
        }
        let scale = found.iter().fold(0.0, |most: f32, part| most.max(part.0));
        let offset = found.iter().fold(0.0, |most: f32, part| most.max(part.1));
        let to_63 = |value: f32, most: f32| match most {
            0.0 => 0,
            _ => (63.0 / most * value).round_ties_even().clamp(0.0, 63.0) as u8,
        };
        for (i, part) in found.iter().enumerate() {
            let (scale, offset) = (to_63(part.0, scale), to_63(part.1, offset));
            if i < 4 {
                (dst[4 + i], dst[8 + i]) = (scale, offset);
            } else {
                dst[8 + i] = scale & 15 | offset << 4;
                dst[i] |= scale >> 4 << 6;
                dst[4 + i] |= offset >> 4 << 6;
            }
        }
        put_f16(dst, 0, scale / 63.0);
        put_f16(dst, 2, offset / 63.0);
        let mut quants = [0; 256];
        let of_parts = quants.as_chunks_mut::<32>().0.iter_mut().zip(parts);
        for ((quants, part), (scale, offset)) in of_parts.zip(scales_and_offsets(dst)) {
            if scale != 0.0 {
                *quants = part.map(|x| ((x + offset) / scale).round_ties_even().clamp(0.0, self.steps) as u8);
            }
        }
        quants
    }
}

impl Encode<144, 256> for Q4K {
    fn encode(src: &[f32; 256], dst: &mut [u8; 144]) {
        *dst = [0; 144];
        let quants = FOUR_BITS.encode(src, dst);
        pack_nibbles(&quants, &mut dst[16..]);
    }
}

impl Encode<176, 256> for Q5K {
    fn encode(src: &[f32; 256], dst: &mut [u8; 176]) {
        *dst = [0; 176];
        let quants = FIVE_BITS.encode(src, dst);
        for (plane, part) in quants.as_chunks::<32>().0.iter().enumerate() {
            for (fifths, quant) in dst[16..48].iter_mut().zip(part) {
                *fifths |= quant >> 4 << plane;
            }
        }
        pack_nibbles(&quants, &mut dst[48..]);
    }
}

/// Of each 64 quants the first 32 are low nibbles, the others high ones.
fn pack_nibbles(quants: &[u8; 256], dst: &mut [u8]) {
    for (bytes, quants) in dst.as_chunks_mut::<32>().0.iter_mut().zip(quants.as_chunks::<64>().0) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = quants[i] & 15 | quants[i + 32] << 4;
        }
    }
}

impl Encode<210, 256> for Q6K {
    fn encode(src: &[f32; 256], dst: &mut [u8; 210]) {
        *dst = [0; 210];
        let parts = src.as_chunks::<16>().0;
        let mut scales = [0.0; 16];
        for (scale, part) in scales.iter_mut().zip(parts) {
            *scale = symmetric_scale(part);
        }
        let most = scales.iter().fold(0.0, |most: f32, scale| if scale.abs() > most.abs() { *scale } else { most });
        if most.abs() < NOTHING {
            return;
        }
        let by = -128.0 / most;
        put_f16(dst, 208, 1.0 / by);
        let d = f16_at(dst, 208);
        for (part, (scale, x)) in scales.iter().zip(parts).enumerate() {
            let stored = (by * scale).round_ties_even().clamp(-128.0, 127.0);
            dst[192 + part] = stored as i8 as u8;
            let scale = d * stored;
            // What is stored is 32 more than the quant.
            let quants = x.map(|x| match scale {
                0.0 => 32,
                scale => ((x / scale).round_ties_even().clamp(-32.0, 31.0) + 32.0) as u8,
            });
            let low = part / 8 * 64 + part % 4 * 16;
            let high = 128 + part / 8 * 32 + part % 2 * 16;
            for (i, q) in quants.into_iter().enumerate() {
                dst[low + i] |= (q & 15) << (part / 4 % 2 * 4);
                dst[high + i] |= q >> 4 << (part / 2 % 4 * 2);
            }
        }
    }
}

/// The scale that a part of Q6_K is encoded with, of the sign of minus its extreme value. Large values weigh more: by their squares.
fn symmetric_scale(x: &[f32; 16]) -> f32 {
    let extreme = x.iter().fold(0.0, |extreme: f32, &x| if x.abs() > extreme.abs() { x } else { extreme });
    if extreme.abs() < NOTHING {
        return 0.0;
    }
    let (mut best_scale, mut best) = (0.0, 0.0);
    // The plain scale first, then those around it.
    for trial in std::iter::once(0).chain((-9..=9).filter(|&trial| trial != 0)) {
        let by = -(32.0 + 0.1 * trial as f32) / extreme;
        let (mut sum_xq, mut sum_qq) = (0.0f32, 0.0f32);
        for &x in x {
            let q = (by * x).round_ties_even().clamp(-32.0, 31.0);
            sum_xq += x * x * x * q;
            sum_qq += x * x * q * q;
        }
        if sum_qq > 0.0 && sum_xq * sum_xq > best * sum_qq {
            best_scale = sum_xq / sum_qq;
            best = best_scale * sum_xq;
        }
    }
    best_scale
}
