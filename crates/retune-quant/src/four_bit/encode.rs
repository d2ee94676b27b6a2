//! Putting values into 4 bits, with the numbers that bitsandbytes 0.50.2 gives on a CPU.
//!
//! There the 4-bit codes come from its `default` backend, which is PyTorch: the values of a whole block are multiplied by the reciprocal of
//! their greatest magnitude, those of a shorter last block are divided by it, and a magnitude below 1e-38 counts as 1e-38 (of a shorter last
//! block it is also stored so, zeros included). A value takes the code below it where it lies in the middle of two. Double quantization is
//! C++: 8-bit codes are looked up at one of 65,536 places, and are for that not always the nearest.

use std::array;

use retune_kernels::multiversion;

use super::QuantType;
use crate::dynamic::dynamic_map;

/// Values of a block.
pub const BLOCKSIZE: usize = 64;
/// Magnitudes of a block of double quantization.
pub const NESTED_BLOCKSIZE: usize = 256;

/// What magnitudes are divided by at least.
const LEAST: f32 = 1e-38;
/// Places at which the 8-bit code is looked up.
const PLACES: usize = 1 << 16;

/// The values that NF4's codes stand for.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
/// The values of FP4's codes, before the largest is made 1.
const FP4: [f32; 16] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0];
/// FP4's codes in the order of their values; a zero is the code 0.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

impl QuantType {
    /// The values that the codes stand for.
    pub fn code(self) -> [f32; 16] {
        match self {
            QuantType::NF4 => NF4,
            QuantType::FP4 => FP4.map(|value| value / 12.0),
        }
    }

    /// The codes in the order of their values.
    fn order(self) -> [u8; 16] {
        match self {
            QuantType::NF4 => array::from_fn(|code| code as u8),
            QuantType::FP4 => FP4_ORDER,
        }
    }
}

/// Puts values that begin with a block into codes of 4 bits, two in a byte, and the greatest magnitude of each block into `absmax`. Only the
/// end of a matrix may be less than a block. Values must be finite.
///
/// # Panics
/// Unless `indices` has `values.len()` / 2 bytes and `absmax` a value for each block, both rounded up.
pub fn four_bit(quant_type: QuantType, values: &[f32], indices: &mut [u8], absmax: &mut [f32]) {
    assert_eq!(indices.len(), values.len().div_ceil(2), "bytes of codes");
    assert_eq!(absmax.len(), values.len().div_ceil(BLOCKSIZE), "block magnitudes");
    let (code, order) = (quant_type.code(), quant_type.order());
    let sorted = order.map(|index| code[usize::from(index)]);
    let bounds = array::from_fn(|i| (sorted[i] + sorted[i + 1]) / 2.0);
    encode_blocks(&bounds, &order, values, indices, absmax);
}

multiversion! {
    fn encode_blocks(
        bounds: &[f32; 15],
        order: &[u8; 16],
        values: &[f32],
        indices: &mut [u8],
        absmax: &mut [f32],
    ) {
        let (whole, rest) = values.as_chunks::<BLOCKSIZE>();
        let (bytes, bytes_of_rest) = indices.split_at_mut(whole.len() * BLOCKSIZE / 2);
        for ((block, bytes), absmax) in whole.iter().zip(bytes.as_chunks_mut::<{ BLOCKSIZE / 2 }>().0).zip(&mut *absmax) {
            *absmax = greatest(block);
            let reciprocal = 1.0 / absmax.max(LEAST);
            let scaled: [f32; BLOCKSIZE] = array::from_fn(|i| block[i] * reciprocal);
            let codes = codes(bounds, &scaled);
            for (byte, pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
                *byte = order[usize::from(pair[0])] << 4 | order[usize::from(pair[1])];
            }
        }
        if let Some(absmax) = absmax.get_mut(whole.len()) {
            *absmax = greatest(rest).max(LEAST);
            // What fills the last byte is a zero.
            let mut scaled = [0.0; BLOCKSIZE];
            scaled.iter_mut().zip(rest).for_each(|(scaled, value)| *scaled = value / *absmax);
            let codes = codes(bounds, &scaled);
            for (byte, pair) in bytes_of_rest.iter_mut().zip(codes.as_chunks::<2>().0) {
                *byte = order[usize::from(pair[0])] << 4 | order[usize::from(pair[1])];
            }
        }
    }
}

#[inline(always)]
fn greatest(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane = lane.max(value.abs()));
    }
    rest.iter().map(|value| value.abs()).chain(lanes).fold(0.0, f32::max)
}

/// For each value the number of bounds below it. A value beyond 1 by rounding is no other code than 1.
#[inline(always)]
fn codes(bounds: &[f32; 15], scaled: &[f32; BLOCKSIZE]) -> [u8; BLOCKSIZE] {
    let mut below = [0i32; BLOCKSIZE];
    for bound in bounds {
        below.iter_mut().zip(scaled).for_each(|(below, value)| *below += i32::from(value > bound));
    }
    below.map(|below| below as u8)
}

/// Block magnitudes in 8 bits: double quantization.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedAbsmax {
    pub indices: Vec<u8>,
    /// The greatest magnitude of each block of indices.
    pub scales: Vec<f32>,
    /// What is added to all.
    pub offset: f32,
}

impl NestedAbsmax {
    /// As bitsandbytes has them, but for the offset: the mean is summed up in f64 here, in another order there.
    pub fn of(absmax: &[f32]) -> Self {
        let sum: f64 = absmax.iter().copied().map(f64::from).sum();
        Self::around((sum / absmax.len().max(1) as f64) as f32, absmax)
    }

    /// The magnitudes less `offset` in 8 bits.
    pub fn around(offset: f32, absmax: &[f32]) -> Self {
        let map = dynamic_map(true);
        let middles: [f32; 255] = array::from_fn(|i| 0.5 * (map[i] + map[i + 1]));
        let mut nested = NestedAbsmax { indices: Vec::with_capacity(absmax.len()), scales: Vec::new(), offset };
        for block in absmax.chunks(NESTED_BLOCKSIZE) {
            let greatest = block.iter().map(|value| (value - offset).abs()).fold(0.0, f32::max);
            nested.scales.push(greatest);
            let reciprocal = 1.0 / greatest;
            let codes = block.iter().map(|value| match greatest {
                0.0 => 0,
                _ => dynamic_code(&middles, (value - offset) * reciprocal),
            });
            nested.indices.extend(codes);
        }
        nested
    }
}

/// The code of a value from -1 to 1, found by way of the nearest of the places.
fn dynamic_code(middles: &[f32; 255], value: f32) -> u8 {
    // A value that is no number, where the reciprocal is infinite, takes the first place.
    let place = ((value.clamp(-1.0, 1.0) + 1.0) * 0.5 * (PLACES - 1) as f32 + 0.5) as u16;
    let value = -1.0 + 2.0 * f32::from(place) / (PLACES - 1) as f32;
    middles.partition_point(|middle| *middle < value) as u8
}
