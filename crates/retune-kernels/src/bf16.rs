//! Rounding values to bfloat16 and back, for what is kept from the forward to the backward.

use crate::multiversion;
use crate::parallel::{self, SharedMut};

/// Elements of a parallel piece.
const PIECE: usize = 1 << 15;

/// To the nearest, ties to even. A NaN must not round to an infinity: it keeps its upper half, made quiet.
#[inline(always)]
pub(crate) fn rounded(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }) as u16
}

#[inline(always)]
pub(crate) fn widened(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

multiversion! {
    fn round_piece(x: &[f32], to: &mut [u16]) {
        for (to, v) in to.iter_mut().zip(x) {
            *to = rounded(*v);
        }
    }
}

multiversion! {
    fn widen_piece(x: &[u16], to: &mut [f32]) {
        for (to, v) in to.iter_mut().zip(x) {
            *to = widened(*v);
        }
    }
}

/// Rounds `x` to `to`, of the same length, on all threads.
pub fn round(x: &[f32], to: &mut [u16]) {
    debug_assert_eq!(x.len(), to.len());
    let len = x.len();
    let shared = SharedMut::new(to);
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        round_piece(&x[start..start + n], unsafe { shared.slice(start, n) });
    });
}

/// Widens `x` to `to`, of the same length, on all threads.
pub fn widen(x: &[u16], to: &mut [f32]) {
    debug_assert_eq!(x.len(), to.len());
    let len = x.len();
    let shared = SharedMut::new(to);
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        widen_piece(&x[start..start + n], unsafe { shared.slice(start, n) });
    });
}

multiversion! {
    fn round_both_piece(x: &mut [f32], to: &mut [u16]) {
        for (v, to) in x.iter_mut().zip(to) {
            *to = rounded(*v);
            *v = widened(*to);
        }
    }
}

/// Rounds `x` to `to`, of the same length, and where it is, on all threads.
pub fn round_both(x: &mut [f32], to: &mut [u16]) {
    debug_assert_eq!(x.len(), to.len());
    let len = x.len();
    let (x, to) = (SharedMut::new(x), SharedMut::new(to));
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        unsafe { round_both_piece(x.slice(start, n), to.slice(start, n)) };
    });
}

/// Whether a value is neither infinite nor NaN.
pub fn is_finite(value: u16) -> bool {
    value & 0x7f80 != 0x7f80
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn rounds_as_the_half_crate_does_and_back() {
        let mut x = random(1, 70_000);
        x.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1.0 + 1.0 / 256.0, 1e-40]);
        let mut rounded = vec![0; x.len()];
        round(&x, &mut rounded);
        let expected: Vec<u16> = x.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
        assert!(rounded == expected);
        let mut back = vec![0.0; x.len()];
        widen(&rounded, &mut back);
        let mut again = vec![0; x.len()];
        round_both(&mut x, &mut again);
        assert!(x == back && again == expected);
        assert!(back.iter().zip(&expected).all(|(v, e)| *v == half::bf16::from_bits(*e).to_f32()));
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let x = [f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff), f32::INFINITY, 1e38];
        let (mut rounded, mut back) = ([0; 5], [0.0; 5]);
        round(&x, &mut rounded);
        widen(&rounded, &mut back);
        assert!(back[..3].iter().all(|v| v.is_nan()) && back[3] == f32::INFINITY);
        assert_eq!(rounded.map(is_finite), [false, false, false, false, true]);
    }
}
