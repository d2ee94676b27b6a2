//! Gated activations `h = f(gate) ⊙ up` (Shazeer 2020, "GLU Variants Improve Transformer"). A gate and an up of F elements lie side by side
//! in a row, `inner: [T, 2F]`.

use crate::activation::{Activation, Function, by_function};
use crate::bf16::{rounded, widened};
use crate::multiversion;
use crate::parallel::{self, SharedMut};

/// About how many elements of the output are a parallel piece.
const PIECE: usize = 1 << 14;

/// Elements from one row of the inputs to the next, for as many rows as there are outputs.
fn row_of(inner: usize, outputs: usize, width: usize) -> usize {
    inner / (outputs / width.max(1)).max(1)
}

// The loops work on one row at a time: what is written and read are arguments of their own, which the compiler knows to lie apart. Split out
// of a row inside a loop they would not be vectorised.

#[inline(always)]
fn values<A: Activation, const FMA: bool>(gate: &[f32], up: &[f32], h: &mut [f32]) {
    for ((h, &e), &u) in h.iter_mut().zip(gate).zip(up) {
        *h = A::value::<FMA>(e) * u;
    }
}

#[inline(always)]
fn values_and_rounded<A: Activation, const FMA: bool>(
    gate: &[f32],
    up: &[f32],
    h: &mut [f32],
    kept_gate: &mut [u16],
    kept_up: &mut [u16],
) {
    for ((((h, &e), &u), kept_e), kept_u) in h.iter_mut().zip(gate).zip(up).zip(kept_gate).zip(kept_up) {
        *h = A::value::<FMA>(e) * u;
        *kept_e = rounded(e);
        *kept_u = rounded(u);
    }
}

multiversion! {
    fn forward_row(gate: &[f32], up: &[f32], function: Function, h: &mut [f32]) {
        by_function!(function, values, gate, up, h)
    }
}

multiversion! {
    fn forward_and_round_row(gate: &[f32], up: &[f32], function: Function, h: &mut [f32], kept_gate: &mut [u16], kept_up: &mut [u16]) {
        by_function!(function, values_and_rounded, gate, up, h, kept_gate, kept_up)
    }
}

/// Calls `f` with the first row and the number of rows of each piece.
fn for_each_rows(tokens: usize, width: usize, f: impl Fn(usize, usize) + Sync) {
    let rows = (PIECE / width.max(1)).max(1);
    parallel::for_each(tokens.div_ceil(rows), |piece| f(piece * rows, rows.min(tokens - piece * rows)));
}

/// Writes `h: [T, width]` from `inner: [T, 2 · width]`, whose rows may be longer, and this rounded to bfloat16 to `kept`, where it lasts for the backward.
pub fn forward(inner: &[f32], width: usize, function: Function, h: &mut [f32], kept: Option<&mut [u16]>) {
    debug_assert!(inner.len() >= 2 * h.len() && kept.iter().all(|kept| kept.len() == inner.len()));
    let (tokens, stride) = (h.len() / width.max(1), row_of(inner.len(), h.len(), width));
    let (h, kept) = (SharedMut::new(h), kept.map(SharedMut::new));
    for_each_rows(tokens, width, |row, n| {
        let (start, len) = (row * stride, n * stride);
        // SAFETY: pieces are disjoint.
        let (h, kept) = unsafe { (h.slice(row * width, n * width), kept.map(|kept| kept.slice(start, len))) };
        let rows = inner[start..start + len].chunks_exact(stride).zip(h.chunks_exact_mut(width));
        match kept {
            None => rows.for_each(|(inner, h)| forward_row(&inner[..width], &inner[width..2 * width], function, h)),
            Some(kept) => {
                for ((inner, h), kept) in rows.zip(kept.chunks_exact_mut(stride)) {
                    let (kept_gate, kept_up) = kept[..2 * width].split_at_mut(width);
                    forward_and_round_row(&inner[..width], &inner[width..2 * width], function, h, kept_gate, kept_up);
                }
            }
        }
    });
}

/// The gradients of a gate and an up, and the output again.
#[inline(always)]
fn gradient<A: Activation, const FMA: bool>(e: f32, u: f32, g: f32) -> (f32, f32, f32) {
    let (de, activated) = A::gradient::<FMA>(e, g * u);
    (de, g * activated, activated * u)
}

#[inline(always)]
fn gradients<A: Activation, const FMA: bool>(gate: &mut [f32], up: &mut [f32], dh: &mut [f32]) {
    for ((e, u), g) in gate.iter_mut().zip(up).zip(dh) {
        (*e, *u, *g) = gradient::<A, FMA>(*e, *u, *g);
    }
}

#[inline(always)]
fn rounded_gradients<A: Activation, const FMA: bool>(
    kept_gate: &[u16],
    kept_up: &[u16],
    gate: &mut [f32],
    up: &mut [f32],
    dh: &mut [f32],
) {
    for ((((e, u), g), kept_e), kept_u) in gate.iter_mut().zip(up).zip(dh).zip(kept_gate).zip(kept_up) {
        (*e, *u, *g) = gradient::<A, FMA>(widened(*kept_e), widened(*kept_u), *g);
    }
}

multiversion! {
    fn backward_row(gate: &mut [f32], up: &mut [f32], function: Function, dh: &mut [f32]) {
        by_function!(function, gradients, gate, up, dh)
    }
}

multiversion! {
    fn rounded_backward_row(kept_gate: &[u16], kept_up: &[u16], gate: &mut [f32], up: &mut [f32], function: Function, dh: &mut [f32]) {
        by_function!(function, rounded_gradients, kept_gate, kept_up, gate, up, dh)
    }
}

/// Replaces `inner: [T, 2 · width]` by its gradient, and the gradient `dh: [T, width]` of the output by the output itself, which the caller
/// needs next and would otherwise recompute: one pass over all of them. With `kept`, what the forward rounded, that is read in place of
/// `inner`.
pub fn backward(inner: &mut [f32], width: usize, function: Function, dh: &mut [f32], kept: Option<&[u16]>) {
    debug_assert!(inner.len() >= 2 * dh.len() && kept.iter().all(|kept| kept.len() == inner.len()));
    let (tokens, stride) = (dh.len() / width.max(1), row_of(inner.len(), dh.len(), width));
    let (inner, dh) = (SharedMut::new(inner), SharedMut::new(dh));
    for_each_rows(tokens, width, |row, n| {
        let (start, len) = (row * stride, n * stride);
        // SAFETY: pieces are disjoint.
        let (inner, dh) = unsafe { (inner.slice(start, len), dh.slice(row * width, n * width)) };
        let rows = inner.chunks_exact_mut(stride).zip(dh.chunks_exact_mut(width));
        match kept {
            None => {
                for (inner, dh) in rows {
                    let (gate, up) = inner[..2 * width].split_at_mut(width);
                    backward_row(gate, up, function, dh);
                }
            }
            Some(kept) => {
                for ((inner, dh), kept) in rows.zip(kept[start..start + len].chunks_exact(stride)) {
                    let (gate, up) = inner[..2 * width].split_at_mut(width);
                    rounded_backward_row(&kept[..width], &kept[width..2 * width], gate, up, function, dh);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::tests::{FUNCTIONS, reference};
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    #[test]
    fn forward_and_backward_equal_the_reference() {
        for (function, (tokens, width)) in FUNCTIONS.into_iter().flat_map(|f| [(1, 1), (3, 7), (4, 50)].map(|s| (f, s)))
        {
            let n = tokens * width;
            let inner: Vec<f32> = random(1, 2 * n).iter().map(|v| v * 4.0).collect();
            let dh = random(3, n);
            let mut h = vec![0.0; n];
            forward(&inner, width, function, &mut h, None);
            let expected = |inner: &[f64]| -> Vec<f64> {
                let row =
                    |row: &[f64]| (0..width).map(|i| reference(function, row[i]) * row[width + i]).collect::<Vec<_>>();
                inner.chunks(2 * width).flat_map(row).collect()
            };
            let (x, g) = (to_f64(&inner), to_f64(&dh));
            assert!(relative_error(&h, &expected(&x)) < 1e-6, "{function:?}");
            let (mut dinner, mut again) = (inner.clone(), dh.clone());
            backward(&mut dinner, width, function, &mut again, None);
            let by_inner = numeric_gradient(&x, |x| dot(&expected(x), &g));
            assert!(relative_error(&dinner, &by_inner) < 1e-5, "{function:?}");
            assert!(relative_error(&again, &expected(&x)) < 1e-6, "{function:?}");
        }
    }

    #[test]
    fn what_is_kept_rounded_is_what_the_backward_reads() {
        for function in FUNCTIONS {
            let (tokens, width) = (5, PIECE / 2 - 3);
            let n = tokens * width;
            let (inner, dh) = (random(1, 2 * n), random(3, n));
            let (mut h, mut plain, mut kept) = (vec![0.0; n], vec![0.0; n], vec![0; 2 * n]);
            forward(&inner, width, function, &mut plain, None);
            forward(&inner, width, function, &mut h, Some(&mut kept));
            assert!(h == plain && kept == inner.iter().map(|&v| rounded(v)).collect::<Vec<_>>());
            let (mut expected, mut again) = (kept.iter().map(|&v| widened(v)).collect::<Vec<f32>>(), dh.clone());
            backward(&mut expected, width, function, &mut again, None);
            let (mut dinner, mut own) = (vec![f32::NAN; 2 * n], dh);
            backward(&mut dinner, width, function, &mut own, Some(&kept));
            assert!(dinner == expected && own == again);
        }
    }

    #[test]
    fn rows_may_be_longer_than_what_is_read() {
        let (tokens, width, row) = (300, 70, 2 * 70 + 16);
        let (inner, dh) = (random(1, tokens * row), random(2, tokens * width));
        let dense: Vec<f32> = inner.chunks(row).flat_map(|row| &row[..2 * width]).copied().collect();
        let (mut h, mut expected) = (vec![0.0; tokens * width], vec![0.0; tokens * width]);
        forward(&inner, width, Function::Silu, &mut h, None);
        forward(&dense, width, Function::Silu, &mut expected, None);
        assert_eq!(h, expected);
        let (mut dinner, mut ddense, mut again, mut once) = (inner.clone(), dense, dh.clone(), dh);
        backward(&mut dinner, width, Function::Silu, &mut again, None);
        backward(&mut ddense, width, Function::Silu, &mut once, None);
        assert_eq!(again, once);
        for ((ours, before), theirs) in dinner.chunks(row).zip(inner.chunks(row)).zip(ddense.chunks(2 * width)) {
            assert_eq!(&ours[..2 * width], theirs);
            assert_eq!(ours[2 * width..], before[2 * width..]);
        }
    }

    #[test]
    fn large_gates_stay_finite() {
        let inner = [-1e4, 1e4, -90.0, 90.0, 1.0, 1.0, 1.0, 1.0];
        let mut h = vec![0.0; 4];
        forward(&inner, 4, Function::Silu, &mut h, None);
        assert_eq!((h[1], h[3]), (1e4, 90.0));
        assert!(h[0].abs() < 1e-30 && h[2].abs() < 1e-30);
    }
}
