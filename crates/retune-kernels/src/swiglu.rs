//! The gated activation `h = silu(gate) ⊙ up` (Shazeer 2020, "GLU Variants Improve Transformer").

use crate::bf16::{rounded, widened};
use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::vector::exp;

const PIECE: usize = 1 << 14;

multiversion! {
    fn forward_piece(gate: &[f32], up: &[f32], h: &mut [f32]) {
        for ((h, &e), &u) in h.iter_mut().zip(gate).zip(up) {
            *h = e / (1.0 + exp::<FMA>(-e)) * u;
        }
    }
}

multiversion! {
    fn forward_and_round_piece(gate: &[f32], up: &[f32], h: &mut [f32], kept_gate: &mut [u16], kept_up: &mut [u16]) {
        for ((((h, &e), &u), kept_e), kept_u) in h.iter_mut().zip(gate).zip(up).zip(kept_gate).zip(kept_up) {
            *h = e / (1.0 + exp::<FMA>(-e)) * u;
            *kept_e = rounded(e);
            *kept_u = rounded(u);
        }
    }
}

/// Writes `h: [T, F]` from `gate` and `up` of the same shape, and these rounded to bfloat16 to `kept`, where they last for the backward.
pub fn forward(gate: &[f32], up: &[f32], h: &mut [f32], kept: Option<[&mut [u16]; 2]>) {
    let len = h.len();
    debug_assert!(gate.len() == len && up.len() == len);
    debug_assert!(kept.iter().flatten().all(|kept| kept.len() == len));
    let (h, kept) = (SharedMut::new(h), kept.map(|kept| kept.map(SharedMut::new)));
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        let (gate, up) = (&gate[start..start + n], &up[start..start + n]);
        // SAFETY: pieces are disjoint.
        unsafe {
            match &kept {
                None => forward_piece(gate, up, h.slice(start, n)),
                Some([kept_gate, kept_up]) => {
                    let (kept_gate, kept_up) = (kept_gate.slice(start, n), kept_up.slice(start, n));
                    forward_and_round_piece(gate, up, h.slice(start, n), kept_gate, kept_up);
                }
            }
        }
    });
}

/// The gradients of a gate and an up, and the output again.
#[inline(always)]
fn gradients<const FMA: bool>(e: f32, u: f32, g: f32) -> (f32, f32, f32) {
    let sigma = 1.0 / (1.0 + exp::<FMA>(-e));
    let silu = e * sigma;
    (g * u * sigma * (1.0 + e * (1.0 - sigma)), g * silu, silu * u)
}

multiversion! {
    fn backward_piece(gate: &mut [f32], up: &mut [f32], dh: &mut [f32]) {
        for ((e, u), g) in gate.iter_mut().zip(up).zip(dh) {
            (*e, *u, *g) = gradients::<FMA>(*e, *u, *g);
        }
    }
}

multiversion! {
    fn rounded_backward_piece(kept_gate: &[u16], kept_up: &[u16], gate: &mut [f32], up: &mut [f32], dh: &mut [f32]) {
        for ((((e, u), g), kept_e), kept_u) in gate.iter_mut().zip(up).zip(dh).zip(kept_gate).zip(kept_up) {
            (*e, *u, *g) = gradients::<FMA>(widened(*kept_e), widened(*kept_u), *g);
        }
    }
}

/// Replaces `gate` and `up` by their gradients, and the gradient `dh` of the output by the output itself, which the caller needs next
/// and would otherwise recompute: one pass over three tensors of shape `[T, F]`. With `kept`, what the forward rounded, that is read
/// in place of `gate` and `up`.
pub fn backward(gate: &mut [f32], up: &mut [f32], dh: &mut [f32], kept: Option<[&[u16]; 2]>) {
    let len = dh.len();
    debug_assert!(gate.len() == len && up.len() == len);
    debug_assert!(kept.iter().flatten().all(|kept| kept.len() == len));
    let (gate, up, dh) = (SharedMut::new(gate), SharedMut::new(up), SharedMut::new(dh));
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        let (gate, up, dh) = unsafe { (gate.slice(start, n), up.slice(start, n), dh.slice(start, n)) };
        match kept.map(|kept| kept.map(|kept| &kept[start..start + n])) {
            None => backward_piece(gate, up, dh),
            Some([kept_gate, kept_up]) => rounded_backward_piece(kept_gate, kept_up, gate, up, dh),
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    fn reference(gate: &[f64], up: &[f64]) -> Vec<f64> {
        gate.iter().zip(up).map(|(e, u)| e / (1.0 + (-e).exp()) * u).collect()
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        for n in [1, 7, 100] {
            let gate: Vec<f32> = random(1, n).iter().map(|v| v * 6.0).collect();
            let (up, dh) = (random(2, n), random(3, n));
            let mut h = vec![0.0; n];
            forward(&gate, &up, &mut h, None);
            let (e, u, g) = (to_f64(&gate), to_f64(&up), to_f64(&dh));
            let expected = reference(&e, &u);
            assert!(relative_error(&h, &expected) < 1e-6);
            let (mut de, mut du, mut again) = (gate.clone(), up.clone(), dh.clone());
            backward(&mut de, &mut du, &mut again, None);
            assert!(relative_error(&de, &numeric_gradient(&e, |e| dot(&reference(e, &u), &g))) < 1e-5);
            assert!(relative_error(&du, &numeric_gradient(&u, |u| dot(&reference(&e, u), &g))) < 1e-5);
            assert!(relative_error(&again, &expected) < 1e-6);
        }
    }

    #[test]
    fn what_is_kept_rounded_is_what_the_backward_reads() {
        let n = PIECE + 7;
        let (gate, up, dh) = (random(1, n), random(2, n), random(3, n));
        let (mut h, mut plain, mut kept) = (vec![0.0; n], vec![0.0; n], [vec![0; n], vec![0; n]]);
        forward(&gate, &up, &mut plain, None);
        forward(&gate, &up, &mut h, Some(kept.each_mut().map(|kept| &mut kept[..])));
        assert!(h == plain);
        let expected = [&gate, &up].map(|x| x.iter().map(|&v| rounded(v)).collect::<Vec<_>>());
        assert!(kept == expected);
        let [mut e, mut u] = kept.each_ref().map(|kept| kept.iter().map(|&v| widened(v)).collect::<Vec<f32>>());
        let mut again = dh.clone();
        backward(&mut e, &mut u, &mut again, None);
        let (mut de, mut du, mut dh) = (vec![f32::NAN; n], vec![f32::NAN; n], dh);
        backward(&mut de, &mut du, &mut dh, Some(kept.each_ref().map(|kept| &kept[..])));
        assert!((de, du, dh) == (e, u, again));
    }

    #[test]
    fn large_gates_stay_finite() {
        let (gate, up) = (vec![-1e4, 1e4, -90.0, 90.0], vec![1.0; 4]);
        let mut h = vec![0.0; 4];
        forward(&gate, &up, &mut h, None);
        assert_eq!((h[1], h[3]), (1e4, 90.0));
        assert!(h[0].abs() < 1e-30 && h[2].abs() < 1e-30);
    }
}
