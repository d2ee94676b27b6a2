//! Root mean square normalisation: `y = x · r · w` with `r = 1 / sqrt(mean(x²) + eps)` (Zhang and Sennrich 2019), over rows or over each
//! head of them. Some families store w − 1: the weight in use is `offset + weight`.

use crate::heads::{Heads, HeadsMut};
use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use crate::vector::dot;

/// An offset that leaves every weight as it is where it is 0: −0 + w is w, zeros' signs included.
fn exact(offset: f32) -> f32 {
    if offset == 0.0 { -0.0 } else { offset }
}

#[inline(always)]
fn forward_row(x: &[f32], weight: &[f32], offset: f32, eps: f32, y: &mut [f32]) {
    let r = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * r * (offset + w);
    }
}

multiversion! {
    fn forward_rows(x: &[f32], weight: &[f32], offset: f32, eps: f32, y: &mut [f32]) {
        let d = weight.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            forward_row(x, weight, offset, eps, y);
        }
    }
}

/// Writes the normalised rows of `x: [T, D]` to `y: [T, D]`; `weight: [D]`.
pub fn forward(x: &[f32], weight: &[f32], offset: f32, eps: f32, y: &mut [f32]) {
    let (d, offset) = (weight.len(), exact(offset));
    let rows = parallel::chunk_rows(x.len() / d, 8);
    let len = x.len();
    debug_assert_eq!(len, y.len());
    let shared = SharedMut::new(y);
    parallel::for_each(len.div_ceil(rows * d), |piece| {
        let start = piece * rows * d;
        let n = (rows * d).min(len - start);
        // SAFETY: pieces are disjoint.
        forward_rows(&x[start..start + n], weight, offset, eps, unsafe { shared.slice(start, n) });
    });
}

/// Writes the gradient of a row in terms of the values before, times the weight, to `scaled`; returns r and what x is multiplied by.
#[inline(always)]
fn row_gradient(x: &[f32], weight: &[f32], offset: f32, eps: f32, dy: &[f32], scaled: &mut [f32]) -> (f32, f32) {
    let d = x.len() as f32;
    let r = 1.0 / (dot(x, x) / d + eps).sqrt();
    // Two sweeps over a row that stays in the first-level cache: dy ⊙ w, then its product with x.
    for ((scaled, g), w) in scaled.iter_mut().zip(dy).zip(weight) {
        *scaled = g * (offset + w);
    }
    (r, r * r * (dot(scaled, x) / d))
}

multiversion! {
    fn backward_rows(
        x: &[f32],
        weight: &[f32],
        offset: f32,
        eps: f32,
        dy: &[f32],
        dx: &mut [f32],
        inverse: &mut [f32],
        scaled: &mut [f32],
    ) {
        let d = weight.len();
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(inverse);
        for (((x, dy), dx), inverse) in rows {
            let (r, factor) = row_gradient(x, weight, offset, eps, dy, scaled);
            *inverse = r;
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
pub fn backward(x: &[f32], weight: &[f32], offset: f32, eps: f32, dy: &[f32], dx: &mut [f32], dw: Option<&mut [f32]>) {
    const COLUMNS: usize = 64;
    let (d, offset) = (weight.len(), exact(offset));
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
                backward_rows(&x[range.clone()], weight, offset, eps, &dy[range], dx, inverse, scaled);
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

multiversion! {
    fn forward_head(x: &[f32], weight: &[f32], offset: f32, eps: f32, y: &mut [f32]) {
        forward_row(x, weight, offset, eps, y);
    }
}

/// Writes each head of the rows of `x`, normalised, to the same head of `to`; `weight: [head_dim]`.
pub fn heads_forward(x: Heads, weight: &[f32], offset: f32, eps: f32, to: HeadsMut) {
    let (tokens, offset) = (x.rows(), exact(offset));
    debug_assert!([x.layout, to.layout()].iter().all(|l| l.head_dim == weight.len() && l.heads == x.layout.heads));
    let rows = parallel::chunk_rows(tokens, 8);
    parallel::for_each(tokens.div_ceil(rows), |piece| {
        for row in piece * rows..((piece + 1) * rows).min(tokens) {
            for head in 0..x.layout.heads {
                // SAFETY: one piece, its rows.
                forward_head(x.head(row, head), weight, offset, eps, unsafe { to.head(row, head) });
            }
        }
    });
}

multiversion! {
    /// Replaces the gradient of a head's output by that of its input, and adds the weight's to `dw`.
    fn backward_head(
        x: &[f32],
        weight: &[f32],
        offset: f32,
        eps: f32,
        gradient: &mut [f32],
        scaled: &mut [f32],
        dw: Option<&mut [f32]>,
    ) {
        let (r, factor) = row_gradient(x, weight, offset, eps, gradient, scaled);
        if let Some(dw) = dw {
            for ((dw, g), x) in dw.iter_mut().zip(gradient.iter()).zip(x) {
                *dw += g * (x * r);
            }
        }
        for ((g, x), scaled) in gradient.iter_mut().zip(x).zip(scaled.iter()) {
            *g = r * (scaled - x * factor);
        }
    }
}

multiversion! {
    fn add_row(to: &mut [f32], from: &[f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t += f;
        }
    }
}

/// Replaces the gradients with respect to the normalised heads, which `gradients` holds, by those with respect to the heads of `x`, and adds
/// the one with respect to the weight to `dw: [head_dim]` where it is trained.
pub fn heads_backward(x: Heads, weight: &[f32], offset: f32, eps: f32, gradients: HeadsMut, dw: Option<&mut [f32]>) {
    /// Rows of a piece; fixed, so that the sums of `dw` have one order.
    const ROWS: usize = 32;
    let (d, tokens, offset) = (weight.len(), x.rows(), exact(offset));
    debug_assert!([x.layout, gradients.layout()].iter().all(|l| l.head_dim == d && l.heads == x.layout.heads));
    let pieces = tokens.div_ceil(ROWS);
    scratch::with(Purpose::Row, if dw.is_some() { pieces * d } else { 0 }, |sums| {
        let shared = SharedMut::new(sums);
        parallel::for_each(pieces, |piece| {
            // SAFETY: one piece, its sum.
            let mut sum = dw.is_some().then(|| unsafe { shared.slice(piece * d, d) });
            sum.iter_mut().for_each(|sum| sum.fill(0.0));
            scratch::with(Purpose::Panel, d, |scaled| {
                for row in piece * ROWS..((piece + 1) * ROWS).min(tokens) {
                    for head in 0..x.layout.heads {
                        // SAFETY: one piece, its rows.
                        let gradient = unsafe { gradients.head(row, head) };
                        backward_head(x.head(row, head), weight, offset, eps, gradient, scaled, sum.as_deref_mut());
                    }
                }
            });
        });
        if let Some(dw) = dw {
            sums.chunks_exact(d).for_each(|sum| add_row(dw, sum));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heads::HeadLayout;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    fn reference(x: &[f64], w: &[f64], offset: f64, eps: f64) -> Vec<f64> {
        let d = w.len();
        let mut y = Vec::new();
        for row in x.chunks(d) {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / d as f64;
            y.extend(row.iter().zip(w).map(|(v, w)| v / (mean + eps).sqrt() * (offset + w)));
        }
        y
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        for (t, d, offset) in [(1, 1, 0.0), (3, 17, 1.0), (5, 32, 0.0), (70, 48, 1.0)] {
            let (x, w, dy) = (random(1, t * d), random(2, d), random(3, t * d));
            let eps = 1e-5;
            let mut y = vec![0.0; t * d];
            forward(&x, &w, offset, eps, &mut y);
            let (x64, w64, dy64) = (to_f64(&x), to_f64(&w), to_f64(&dy));
            let reference = |x: &[f64], w: &[f64]| reference(x, w, f64::from(offset), f64::from(eps));
            assert!(relative_error(&y, &reference(&x64, &w64)) < 1e-6);

            let before = random(4, t * d);
            let (mut dx, mut dw) = (before.clone(), vec![0.5; d]);
            backward(&x, &w, offset, eps, &dy, &mut dx, Some(&mut dw));
            let by_x = numeric_gradient(&x64, |x| dot(&reference(x, &w64), &dy64));
            let expected: Vec<f64> = by_x.iter().zip(&before).map(|(g, b)| g + f64::from(*b)).collect();
            assert!(relative_error(&dx, &expected) < 1e-5, "dx {t} {d}");
            let by_w = numeric_gradient(&w64, |w| dot(&reference(&x64, w), &dy64));
            let expected: Vec<f64> = by_w.iter().map(|g| g + 0.5).collect();
            assert!(relative_error(&dw, &expected) < 1e-5, "dw {t} {d}");
        }
    }

    #[test]
    fn an_offset_of_zero_keeps_the_sign_of_zeros() {
        let mut y = [1.0; 2];
        forward(&[1.0, 1.0], &[-0.0, 0.0], 0.0, 1e-5, &mut y);
        assert_eq!(y.map(f32::to_bits), [-0.0, 0.0].map(f32::to_bits));
    }

    #[test]
    fn heads_are_normalised_as_rows_are() {
        for (t, heads, d) in [(3, 2, 5), (70, 3, 16)] {
            let from = HeadLayout { row: 3 * heads * d + 2, first: 2, head: 3 * d, heads, head_dim: d };
            let to = HeadLayout { row: heads * d + 5, first: 1, head: d, heads, head_dim: d };
            let (data, w, offset, eps) = (random(1, t * from.row), random(2, d), 1.0, 1e-5);
            let x = Heads::new(&data, from);
            let taken = |data: &[f32], layout| -> Vec<f32> {
                let heads = Heads::new(data, layout);
                (0..t).flat_map(|t| (0..layout.heads).flat_map(move |h| heads.head(t, h).to_vec())).collect()
            };
            let rows = taken(&data, from);
            let mut expected = vec![0.0; rows.len()];
            forward(&rows, &w, offset, eps, &mut expected);
            let mut y = vec![f32::NAN; t * to.row];
            heads_forward(x, &w, offset, eps, HeadsMut::new(&mut y, to));
            assert!(taken(&y, to) == expected);
            assert_eq!(y.iter().filter(|v| v.is_nan()).count(), 5 * t);

            let dy = random(3, t * to.row);
            let (mut dx, mut dw) = (vec![0.0; rows.len()], vec![0.5; d]);
            backward(&rows, &w, offset, eps, &taken(&dy, to), &mut dx, Some(&mut dw));
            let run = |threads: usize, own_dw: Option<&mut [f32]>| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut gradients = dy.clone();
                pool.install(|| heads_backward(x, &w, offset, eps, HeadsMut::new(&mut gradients, to), own_dw));
                taken(&gradients, to)
            };
            let mut own_dw = [vec![0.5; d], vec![0.5; d]];
            let [one, three] = &mut own_dw;
            assert!(run(1, Some(one)) == dx && run(3, Some(three)) == dx && run(2, None) == dx);
            assert!(own_dw[0] == own_dw[1]);
            assert!(relative_error(&own_dw[0], &to_f64(&dw)) < 1e-5);
        }
    }
}
