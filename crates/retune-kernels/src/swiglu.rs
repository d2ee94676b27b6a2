//! The gated activation `h = silu(gate) ⊙ up` (Shazeer 2020, "GLU Variants Improve Transformer").

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

/// Writes `h: [T, F]` from `gate` and `up` of the same shape.
pub fn forward(gate: &[f32], up: &[f32], h: &mut [f32]) {
    let len = h.len();
    debug_assert!(gate.len() == len && up.len() == len);
    let shared = SharedMut::new(h);
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        forward_piece(&gate[start..start + n], &up[start..start + n], unsafe { shared.slice(start, n) });
    });
}

multiversion! {
    fn backward_piece(gate: &mut [f32], up: &mut [f32], dh: &mut [f32]) {
        for ((e, u), g) in gate.iter_mut().zip(up).zip(dh) {
            let sigma = 1.0 / (1.0 + exp::<FMA>(-*e));
            let silu = *e * sigma;
            let (du, de) = (*g * silu, *g * *u * sigma * (1.0 + *e * (1.0 - sigma)));
            *g = silu * *u;
            *u = du;
            *e = de;
        }
    }
}

/// Replaces `gate` and `up` by their gradients, and the gradient `dh` of the output by the output itself, which the caller needs next
/// and would otherwise recompute: one pass over three tensors of shape `[T, F]`.
pub fn backward(gate: &mut [f32], up: &mut [f32], dh: &mut [f32]) {
    let len = dh.len();
    debug_assert!(gate.len() == len && up.len() == len);
    let (gate, up, dh) = (SharedMut::new(gate), SharedMut::new(up), SharedMut::new(dh));
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        unsafe { backward_piece(gate.slice(start, n), up.slice(start, n), dh.slice(start, n)) };
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
            forward(&gate, &up, &mut h);
            let (e, u, g) = (to_f64(&gate), to_f64(&up), to_f64(&dh));
            let expected = reference(&e, &u);
            assert!(relative_error(&h, &expected) < 1e-6);
            let (mut de, mut du, mut again) = (gate.clone(), up.clone(), dh.clone());
            backward(&mut de, &mut du, &mut again);
            assert!(relative_error(&de, &numeric_gradient(&e, |e| dot(&reference(e, &u), &g))) < 1e-5);
            assert!(relative_error(&du, &numeric_gradient(&u, |u| dot(&reference(&e, u), &g))) < 1e-5);
            assert!(relative_error(&again, &expected) < 1e-6);
        }
    }

    #[test]
    fn large_gates_stay_finite() {
        let (gate, up) = (vec![-1e4, 1e4, -90.0, 90.0], vec![1.0; 4]);
        let mut h = vec![0.0; 4];
        forward(&gate, &up, &mut h);
        assert_eq!((h[1], h[3]), (1e4, 90.0));
        assert!(h[0].abs() < 1e-30 && h[2].abs() < 1e-30);
    }
}
