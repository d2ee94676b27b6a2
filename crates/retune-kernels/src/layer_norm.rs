//! Layer normalisation: `y = (x − mean) · r · w + b` with `r = 1 / sqrt(variance + eps)`, the variance being the mean of the squared
//! differences (Ba et al. 2016).

use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use crate::vector::{add_column_sums, dot, sum};

/// Writes x − mean to `centred` and returns the mean and r. The mean is taken off before squares are summed, so that a large mean costs no digits.
#[inline(always)]
fn centre(x: &[f32], eps: f32, centred: &mut [f32]) -> [f32; 2] {
    let d = x.len() as f32;
    let mean = sum(x) / d;
    for (c, x) in centred.iter_mut().zip(x) {
        *c = x - mean;
    }
    [mean, 1.0 / (dot(centred, centred) / d + eps).sqrt()]
}

multiversion! {
    fn forward_rows(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
        let d = weight.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let [_, r] = centre(x, eps, y);
            for ((y, w), b) in y.iter_mut().zip(weight).zip(bias) {
                *y = *y * r * w + b;
            }
        }
    }
}

/// Writes the normalised rows of `x: [T, D]` to `y: [T, D]`; `weight` and `bias`: `[D]`.
pub fn forward(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let d = weight.len();
    let rows = parallel::chunk_rows(x.len() / d, 8);
    let len = x.len();
    debug_assert!(len == y.len() && bias.len() == d);
    let shared = SharedMut::new(y);
    parallel::for_each(len.div_ceil(rows * d), |piece| {
        let start = piece * rows * d;
        let n = (rows * d).min(len - start);
        // SAFETY: pieces are disjoint.
        forward_rows(&x[start..start + n], weight, bias, eps, unsafe { shared.slice(start, n) });
    });
}

multiversion! {
    /// `dx += r · (s − mean(s) − x̂ · mean(s ⊙ x̂))` with s = dy ⊙ w and x̂ = (x − mean) · r. Writes the means and r of the rows.
    fn backward_rows(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], moments: &mut [f32], memory: &mut [f32]) {
        let d = weight.len();
        let (centred, scaled) = memory.split_at_mut(d);
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(moments.as_chunks_mut::<2>().0);
        for (((x, dy), dx), moments) in rows {
            *moments = centre(x, eps, centred);
            let [_, r] = *moments;
            for ((scaled, g), w) in scaled.iter_mut().zip(dy).zip(weight) {
                *scaled = g * w;
            }
            let mean = sum(scaled) / d as f32;
            let factor = r * r * (dot(scaled, centred) / d as f32);
            for ((dx, c), scaled) in dx.iter_mut().zip(centred.iter()).zip(scaled.iter()) {
                *dx += r * (scaled - mean - c * factor);
            }
        }
    }
}

multiversion! {
    fn weight_columns(x: &[f32], dy: &[f32], moments: &[f32], d: usize, start: usize, dw: &mut [f32]) {
        let end = start + dw.len();
        for ((x, g), [mean, r]) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(moments.as_chunks::<2>().0) {
            for ((dw, x), g) in dw.iter_mut().zip(&x[start..end]).zip(&g[start..end]) {
                *dw += g * ((x - mean) * r);
            }
        }
    }
}

/// Adds the gradient with respect to `x: [T, D]` to `dx`, and those with respect to weight and bias to `dw` and `db: [D]` where they are
/// trained. `dy` is the gradient of the output; the residual stream's gradient is what `dx` holds already.
pub fn backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
    db: Option<&mut [f32]>,
) {
    const COLUMNS: usize = 64;
    let d = weight.len();
    let tokens = x.len() / d;
    let rows = parallel::chunk_rows(tokens, 8);
    scratch::with(Purpose::Row, 2 * tokens, |moments| {
        let (shared, all_moments) = (SharedMut::new(dx), SharedMut::new(moments));
        parallel::for_each(tokens.div_ceil(rows), |piece| {
            let first = piece * rows;
            let n = rows.min(tokens - first);
            let range = first * d..(first + n) * d;
            // SAFETY: pieces are disjoint.
            let (dx, moments) = unsafe { (shared.slice(first * d, n * d), all_moments.slice(2 * first, 2 * n)) };
            scratch::with(Purpose::Panel, 2 * d, |memory| {
                backward_rows(&x[range.clone()], weight, eps, &dy[range], dx, moments, memory);
            });
        });
        if let Some(dw) = dw {
            let shared = SharedMut::new(dw);
            parallel::for_each(d.div_ceil(COLUMNS), |piece| {
                let start = piece * COLUMNS;
                // SAFETY: pieces are disjoint.
                let dw = unsafe { shared.slice(start, COLUMNS.min(d - start)) };
                weight_columns(x, dy, moments, d, start, dw);
            });
        }
    });
    if let Some(db) = db {
        add_column_sums(dy, d, tokens, db);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    fn reference(x: &[f64], w: &[f64], b: &[f64], eps: f64) -> Vec<f64> {
        let d = w.len() as f64;
        let mut y = Vec::new();
        for row in x.chunks(w.len()) {
            let mean = row.iter().sum::<f64>() / d;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d;
            y.extend(row.iter().zip(w).zip(b).map(|((v, w), b)| (v - mean) / (variance + eps).sqrt() * w + b));
        }
        y
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        for (t, d, shift) in [(1, 1, 0.0), (3, 17, 0.5), (5, 32, 3.0), (70, 48, 0.0)] {
            let x: Vec<f32> = random(1, t * d).iter().map(|v| v + shift).collect();
            let (w, b, dy) = (random(2, d), random(5, d), random(3, t * d));
            let eps = 1e-5;
            let mut y = vec![0.0; t * d];
            forward(&x, &w, &b, eps, &mut y);
            let (x64, w64, b64, dy64) = (to_f64(&x), to_f64(&w), to_f64(&b), to_f64(&dy));
            let reference = |x: &[f64], w: &[f64], b: &[f64]| reference(x, w, b, f64::from(eps));
            assert!(relative_error(&y, &reference(&x64, &w64, &b64)) < 2e-6);

            let before = random(4, t * d);
            let (mut dx, mut dw, mut db) = (before.clone(), vec![0.5; d], vec![0.25; d]);
            backward(&x, &w, eps, &dy, &mut dx, Some(&mut dw), Some(&mut db));
            let by_x = numeric_gradient(&x64, |x| dot(&reference(x, &w64, &b64), &dy64));
            let expected: Vec<f64> = by_x.iter().zip(&before).map(|(g, b)| g + f64::from(*b)).collect();
            assert!(relative_error(&dx, &expected) < 1e-5, "dx {t} {d}");
            let by_w = numeric_gradient(&w64, |w| dot(&reference(&x64, w, &b64), &dy64));
            let expected: Vec<f64> = by_w.iter().map(|g| g + 0.5).collect();
            assert!(relative_error(&dw, &expected) < 1e-5, "dw {t} {d}");
            let by_b = numeric_gradient(&b64, |b| dot(&reference(&x64, &w64, b), &dy64));
            let expected: Vec<f64> = by_b.iter().map(|g| g + 0.25).collect();
            assert!(relative_error(&db, &expected) < 1e-5, "db {t} {d}");
            let mut alone = before.clone();
            backward(&x, &w, eps, &dy, &mut alone, None, None);
            assert!(alone == dx);
        }
    }

    #[test]
    fn a_large_mean_costs_no_digits() {
        let x: Vec<f32> = random(1, 256).iter().map(|v| v + 1000.0).collect();
        let (w, b) = (vec![1.0; 256], vec![0.0; 256]);
        let mut y = vec![0.0; 256];
        forward(&x, &w, &b, 1e-5, &mut y);
        assert!(relative_error(&y, &reference(&to_f64(&x), &to_f64(&w), &to_f64(&b), 1e-5)) < 1e-3);
    }
}
