//! Root mean square normalisation: `y = x · r · w` with `r = 1 / sqrt(mean(x²) + eps)` (Zhang and Sennrich 2019).

use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use crate::vector::dot;

multiversion! {
    fn forward_rows(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let d = weight.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let r = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * r * w;
            }
        }
    }
}

/// Writes the normalised rows of `x: [T, D]` to `y: [T, D]`; `weight: [D]`.
pub fn forward(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let d = weight.len();
    let rows = parallel::chunk_rows(x.len() / d, 8);
    let len = x.len();
    debug_assert_eq!(len, y.len());
    let shared = SharedMut::new(y);
    parallel::for_each(len.div_ceil(rows * d), |piece| {
        let start = piece * rows * d;
        let n = (rows * d).min(len - start);
        // SAFETY: pieces are disjoint.
        forward_rows(&x[start..start + n], weight, eps, unsafe { shared.slice(start, n) });
    });
}

multiversion! {
    fn backward_rows(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], inverse: &mut [f32], scaled: &mut [f32]) {
        let d = weight.len();
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(inverse);
        for (((x, dy), dx), inverse) in rows {
            let r = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
            *inverse = r;
            // Two sweeps over a row that stays in the first-level cache: dy ⊙ w, then its product with x.
            for ((scaled, g), w) in scaled.iter_mut().zip(dy).zip(weight) {
                *scaled = g * w;
            }
            let factor = r * r * (dot(scaled, x) / d as f32);
            for ((dx, x), scaled) in dx.iter_mut().zip(x).zip(scaled.iter()) {
                *dx += r * (scaled - x * factor);
            }
        }
    }
}

multiversion! {
    fn weight_columns(x: &[f32], dy: &[f32], inverse: &[f32], d: usize, start: usize, dw: &mut [f32]) {
        let end = start + dw.len();
        for ((x, g), r) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(inverse) {
            for ((dw, x), g) in dw.iter_mut().zip(&x[start..end]).zip(&g[start..end]) {
                *dw += g * (x * r);
            }
        }
    }
}

/// Adds the gradient with respect to `x: [T, D]` to `dx`, and the one with respect to the weight to `dw: [D]` where it is trained. `dy`
/// is the gradient of the output; the residual stream's gradient is what `dx` holds already.
pub fn backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dw: Option<&mut [f32]>) {
    const COLUMNS: usize = 64;
    let d = weight.len();
    let tokens = x.len() / d;
    let rows = parallel::chunk_rows(tokens, 8);
    scratch::with(Purpose::Row, tokens, |inverse| {
        let (shared, inverses) = (SharedMut::new(dx), SharedMut::new(inverse));
        parallel::for_each(tokens.div_ceil(rows), |piece| {
            let first = piece * rows;
            let n = rows.min(tokens - first);
            let range = first * d..(first + n) * d;
            // SAFETY: pieces are disjoint.
            let (dx, inverse) = unsafe { (shared.slice(first * d, n * d), inverses.slice(first, n)) };
            scratch::with(Purpose::Panel, d, |scaled| {
                backward_rows(&x[range.clone()], weight, eps, &dy[range], dx, inverse, scaled);
            });
        });
        if let Some(dw) = dw {
            let shared = SharedMut::new(dw);
            parallel::for_each(d.div_ceil(COLUMNS), |piece| {
                let start = piece * COLUMNS;
                // SAFETY: pieces are disjoint.
                let dw = unsafe { shared.slice(start, COLUMNS.min(d - start)) };
                weight_columns(x, dy, inverse, d, start, dw);
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    fn reference(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
        let d = w.len();
        let mut y = Vec::new();
        for row in x.chunks(d) {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / d as f64;
            y.extend(row.iter().zip(w).map(|(v, w)| v / (mean + eps).sqrt() * w));
        }
        y
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        for (t, d) in [(1, 1), (3, 17), (5, 32), (70, 48)] {
            let (x, w, dy) = (random(1, t * d), random(2, d), random(3, t * d));
            let eps = 1e-5;
            let mut y = vec![0.0; t * d];
            forward(&x, &w, eps, &mut y);
            let (x64, w64, dy64) = (to_f64(&x), to_f64(&w), to_f64(&dy));
            assert!(relative_error(&y, &reference(&x64, &w64, f64::from(eps))) < 1e-6);

            let before = random(4, t * d);
            let (mut dx, mut dw) = (before.clone(), vec![0.5; d]);
            backward(&x, &w, eps, &dy, &mut dx, Some(&mut dw));
            let by_x = numeric_gradient(&x64, |x| dot(&reference(x, &w64, f64::from(eps)), &dy64));
            let expected: Vec<f64> = by_x.iter().zip(&before).map(|(g, b)| g + f64::from(*b)).collect();
            assert!(relative_error(&dx, &expected) < 1e-5, "dx {t} {d}");
            let by_w = numeric_gradient(&w64, |w| dot(&reference(&x64, w, f64::from(eps)), &dy64));
            let expected: Vec<f64> = by_w.iter().map(|g| g + 0.5).collect();
            assert!(relative_error(&dw, &expected) < 1e-5, "dw {t} {d}");
        }
    }
}
