//! Dropout of an adapter's input. Whether an element is kept depends on (seed, step, row, module, element) alone, so that a rerun for
//! checkpointing, another distribution of rows over passes or machines, and a resumed run all draw the same mask.
//!
//! One 64-bit word decides two neighbouring elements. The instruction sets differ in speed only: the operations are exact.

use crate::multiversion;
use crate::random;

/// What a mask depends on besides the element's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// The row of the data set.
    pub row: u64,
    /// The module's number.
    pub module: u64,
}

impl DropoutKey {
    fn word(self) -> u64 {
        let key = random::derive(0, self.seed);
        let key = random::derive(key, self.step);
        let key = random::derive(key, self.row);
        random::derive(key, self.module)
    }
}

/// The number of a module in [`DropoutKey`]: a hash of its name, so that it does not depend on what else is adapted.
pub fn module_key(module: &str) -> u64 {
    random::hash(module)
}

/// Whether an element is kept, when elements are dropped with probability `p`.
///
/// # Panics
/// When `p` is not in [0, 1).
pub fn keep(key: DropoutKey, element: u64, p: f32) -> bool {
    kept(key.word(), element, threshold(p))
}

/// Writes x·mask/(1 − p) for the elements `first_element..` of the row; `out` is as long as `x`.
///
/// # Panics
/// When the lengths differ, or `p` is not in [0, 1).
pub fn apply(x: &[f32], out: &mut [f32], key: DropoutKey, first_element: u64, p: f32) {
    out.copy_from_slice(x);
    apply_in_place(out, key, first_element, p);
}

/// Turns x into x·mask/(1 − p), for the elements `first_element..` of the row.
///
/// # Panics
/// When `p` is not in [0, 1).
pub fn apply_in_place(x: &mut [f32], key: DropoutKey, first_element: u64, p: f32) {
    let threshold = threshold(p);
    if threshold == 0 {
        return;
    }
    let scale = (1.0 / (1.0 - f64::from(p))) as f32;
    let word = key.word();
    // A word decides an even element and the odd one after it: a lone odd element first.
    let (head, body) = x.split_at_mut((first_element % 2) as usize * usize::from(!x.is_empty()));
    for value in head.iter_mut() {
        *value = masked(*value, kept(word, first_element, threshold), scale);
    }
    let first_pair = first_element.div_ceil(2);
    mask(body, word, first_pair, threshold, scale);
}

multiversion! {
    /// Masks pairs of elements, the first of which is `2 * first_pair`. Blocks of fixed size, so that the compiler makes vectors of them.
    fn mask(x: &mut [f32], word: u64, first_pair: u64, threshold: u32, scale: f32) {
        const PAIRS: usize = 16;
        let mut pair = first_pair;
        let mut blocks = x.chunks_exact_mut(2 * PAIRS);
        for block in &mut blocks {
            let mut bits = [0u32; 2 * PAIRS];
            for i in 0..PAIRS {
                let drawn = random::at(word, pair.wrapping_add(i as u64));
                bits[2 * i] = drawn as u32;
                bits[2 * i + 1] = (drawn >> 32) as u32;
            }
            for (value, &bits) in block.iter_mut().zip(&bits) {
                *value = masked(*value, bits >= threshold, scale);
            }
            pair = pair.wrapping_add(PAIRS as u64);
        }
        let first = pair.wrapping_mul(2);
        for (i, value) in blocks.into_remainder().iter_mut().enumerate() {
            *value = masked(*value, kept(word, first.wrapping_add(i as u64), threshold), scale);
        }
    }
}

/// A dropped element is 0 even where x is not finite.
#[inline(always)]
fn masked(x: f32, kept: bool, scale: f32) -> f32 {
    if kept { x * scale } else { 0.0 }
}

#[inline(always)]
fn kept(word: u64, element: u64, threshold: u32) -> bool {
    let pair = random::at(word, element / 2);
    let bits = if element.is_multiple_of(2) { pair as u32 } else { (pair >> 32) as u32 };
    bits >= threshold
}

/// An element is kept when 32 random bits reach this.
fn threshold(p: f32) -> u32 {
    assert!((0.0..1.0).contains(&p), "a dropout probability of {p} is not in [0, 1)");
    (f64::from(p) * 4_294_967_296.0).round() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: DropoutKey = DropoutKey { seed: 1, step: 2, row: 3, module: 4 };

    fn mask_of(key: DropoutKey, n: usize, p: f32) -> Vec<bool> {
        let mut out = vec![0.0; n];
        apply(&vec![1.0; n], &mut out, key, 0, p);
        out.iter().map(|&v| v != 0.0).collect()
    }

    /// Share of places where two masks agree; (1 − p)² + p² when they are independent.
    fn agreement(a: &[bool], b: &[bool]) -> f64 {
        a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
    }

    #[test]
    fn elements_are_dropped_at_the_rate_and_the_rest_scaled() {
        for p in [0.05f32, 0.1, 0.5, 0.9] {
            let n = 200_000;
            let mut out = vec![0.0; n];
            apply(&vec![3.0; n], &mut out, KEY, 0, p);
            let dropped = out.iter().filter(|&&v| v == 0.0).count() as f64 / n as f64;
            assert!((dropped - f64::from(p)).abs() < 0.005, "{p}: {dropped}");
            let scaled = 3.0 * (1.0 / (1.0 - f64::from(p))) as f32;
            assert!(out.iter().all(|&v| v == 0.0 || v == scaled));
        }
    }

    #[test]
    fn every_part_of_the_key_and_every_distance_draws_anew() {
        let n = 100_000;
        let p = 0.5;
        let base = mask_of(KEY, n, p);
        let others = [
            DropoutKey { seed: 2, ..KEY },
            DropoutKey { step: 3, ..KEY },
            DropoutKey { row: 4, ..KEY },
            DropoutKey { module: 5, ..KEY },
            DropoutKey { step: 3, row: 2, ..KEY },
            DropoutKey { row: 4, module: 3, ..KEY },
        ];
        for other in others {
            let share = agreement(&base, &mask_of(other, n, p));
            assert!((share - 0.5).abs() < 0.01, "{other:?}: {share}");
        }
        for distance in [1, 2, 3, 4, 32, 64, 576] {
            let share = agreement(&base[distance..], &base);
            assert!((share - 0.5).abs() < 0.01, "{distance}: {share}");
        }
    }

    #[test]
    fn small_keys_give_unbiased_masks() {
        // One element of many small keys, as steps and rows are.
        let mut kept_count = 0;
        for step in 0..100 {
            for row in 0..100 {
                let key = DropoutKey { seed: 0, step, row, module: 0 };
                kept_count += usize::from(keep(key, 0, 0.5));
            }
        }
        assert!((4_800..5_200).contains(&kept_count), "{kept_count}");
    }

    #[test]
    fn any_cut_gives_the_same_mask() {
        let whole = mask_of(KEY, 301, 0.3);
        for (element, &expected) in whole.iter().enumerate() {
            assert_eq!(keep(KEY, element as u64, 0.3), expected);
        }
        for start in [0, 1, 2, 7, 32, 33, 300, 301] {
            for end in [start, (start + 1).min(301), (start + 40).min(301), 301] {
                let mut part = vec![1.0; end - start];
                apply_in_place(&mut part, KEY, start as u64, 0.3);
                let part: Vec<bool> = part.iter().map(|&v| v != 0.0).collect();
                assert_eq!(part, whole[start..end], "{start}..{end}");
            }
        }
    }

    #[test]
    fn the_vector_code_is_the_plain_code() {
        let mut plain = vec![1.5; 1_000];
        mask(&mut plain, KEY.word(), 0, threshold(0.2), 1.25);
        let mut detected = vec![1.5; 1_000];
        apply_in_place(&mut detected, KEY, 0, 0.2);
        assert_eq!(plain, detected);
    }

    #[test]
    fn no_dropout_is_the_identity_and_infinities_are_dropped_too() {
        let x = [1.0, f32::INFINITY, f32::NAN];
        let mut out = [0.0; 3];
        apply(&x, &mut out, KEY, 0, 0.0);
        assert_eq!(out.map(f32::to_bits), x.map(f32::to_bits));
        let mut many = vec![f32::INFINITY; 1_000];
        apply_in_place(&mut many, KEY, 0, 0.5);
        assert!(many.iter().all(|v| *v == 0.0 || *v == f32::INFINITY));
    }
}
