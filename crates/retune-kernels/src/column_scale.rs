//! Scaling of columns: `y = f ⊙ z + b` in every row, with one element of f and of b for each column.
//!
//! Rows may be parts of longer ones; a view says how far apart they begin.

use crate::bf16::{rounded, widened};
use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};

/// What a row of columns is multiplied by, and what is added to that.
#[derive(Clone, Copy)]
pub struct Scale<'a> {
    /// `[n]`
    pub factors: &'a [f32],
    /// `[n]`, zeros where there are none.
    pub offsets: Option<&'a [f32]>,
}

/// Rows that begin `row` elements apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub row: usize,
}

/// Rows to be written that begin `row` elements apart.
pub struct RowsMut<'a> {
    pub data: &'a mut [f32],
    pub row: usize,
}

/// What was scaled, as it is kept for the backward.
#[derive(Clone, Copy)]
pub enum Unscaled<'a> {
    Exact(&'a [f32]),
    /// Rounded to bfloat16.
    Rounded(&'a [u16]),
}

/// What the scaled rows are added to.
#[derive(Clone, Copy)]
pub enum Onto<'a> {
    Nothing,
    /// What is in their place.
    Itself,
    /// Rows that begin as far apart as those that are written.
    Other(&'a [f32]),
}

multiversion! {
    fn scale_row(z: &[f32], factors: &[f32], y: &mut [f32]) {
        for ((y, z), f) in y.iter_mut().zip(z).zip(factors) {
            *y = f * z;
        }
    }
}

multiversion! {
    fn scale_and_add_row(z: &[f32], factors: &[f32], y: &mut [f32]) {
        for ((y, z), f) in y.iter_mut().zip(z).zip(factors) {
            *y += f * z;
        }
    }
}

multiversion! {
    fn scale_in_place(y: &mut [f32], factors: &[f32]) {
        for (y, f) in y.iter_mut().zip(factors) {
            *y *= f;
        }
    }
}

multiversion! {
    fn add_row(to: &mut [f32], from: &[f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    }
}

multiversion! {
    fn round_row(z: &[f32], to: &mut [u16]) {
        for (to, z) in to.iter_mut().zip(z) {
            *to = rounded(*z);
        }
    }
}

multiversion! {
    fn add_products(a: &[f32], b: &[f32], sum: &mut [f32]) {
        for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
}

multiversion! {
    fn add_rounded_products(a: &[f32], b: &[u16], sum: &mut [f32]) {
        for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
            *sum += a * widened(*b);
        }
    }
}

/// Writes `y: [T, n]`, plus what it is added to, from `z: [T, n]`; with `kept`, as long as `z`, also z rounded to bfloat16.
pub fn forward(z: Rows, scale: Scale, tokens: usize, y: RowsMut, onto: Onto, kept: Option<&mut [u16]>) {
    let n = scale.factors.len();
    let (row, y, kept) = (y.row, SharedMut::new(y.data), kept.map(SharedMut::new));
    let rows = parallel::chunk_rows(tokens, 8);
    parallel::for_each(tokens.div_ceil(rows), |piece| {
        for token in piece * rows..((piece + 1) * rows).min(tokens) {
            let from = &z.data[token * z.row..][..n];
            // SAFETY: pieces are disjoint rows.
            let y = unsafe { y.slice(token * row, n) };
            match onto {
                Onto::Itself => scale_and_add_row(from, scale.factors, y),
                Onto::Nothing | Onto::Other(_) => scale_row(from, scale.factors, y),
            }
            // In the order in which a product that is not scaled adds them.
            if let Onto::Other(addend) = onto {
                add_row(y, &addend[token * row..][..n]);
            }
            if let Some(offsets) = scale.offsets {
                add_row(y, offsets);
            }
            if let Some(kept) = &kept {
                // SAFETY: as above.
                round_row(from, unsafe { kept.slice(token * z.row, n) });
            }
        }
    });
}

/// Adds up what `add` puts for each row into a sum of `n` columns, and adds that to `to: [n]`. The order of the sums does not depend on the
/// number of threads.
fn sum_rows(tokens: usize, to: &mut [f32], add: impl Fn(usize, &mut [f32]) + Sync) {
    /// Rows of a piece; fixed, so that the sums have one order.
    const ROWS: usize = 32;
    const COLUMNS: usize = 512;
    let n = to.len();
    let pieces = tokens.div_ceil(ROWS);
    scratch::with(Purpose::Row, pieces * n, |sums| {
        let shared = SharedMut::new(sums);
        parallel::for_each(pieces, |piece| {
            // SAFETY: one piece, its sum.
            let sum = unsafe { shared.slice(piece * n, n) };
            sum.fill(0.0);
            (piece * ROWS..((piece + 1) * ROWS).min(tokens)).for_each(|token| add(token, sum));
        });
        let (sums, to) = (&*sums, SharedMut::new(to));
        parallel::for_each(n.div_ceil(COLUMNS), |piece| {
            let start = piece * COLUMNS;
            let width = COLUMNS.min(n - start);
            // SAFETY: pieces are disjoint.
            let to = unsafe { to.slice(start, width) };
            sums.chunks_exact(n).for_each(|sum| add_row(to, &sum[start..start + width]));
        });
    });
}

/// Writes the gradient of what was scaled, `dz = f ⊙ dy: [T, n]`, and adds that of the factors, `Σ dy ⊙ (z + c)`, to `df: [n]`, where c is
/// what was added to z before it was scaled (`shift`). `dy` is read from where `dz` is written if it is not given; both have the rows of
/// `dz`. `z_row` is how far apart the rows of `z` begin.
#[allow(clippy::too_many_arguments)] // two operands with their rows, two results
pub fn backward(
    dy: Option<&[f32]>,
    dz: RowsMut,
    z: Unscaled,
    z_row: usize,
    factors: &[f32],
    shift: Option<&[f32]>,
    tokens: usize,
    df: &mut [f32],
) {
    let n = factors.len();
    let (row, dz) = (dz.row, SharedMut::new(dz.data));
    sum_rows(tokens, df, |token, sum| {
        // SAFETY: each row is one token's.
        let dz = unsafe { dz.slice(token * row, n) };
        let dy_of_token = dy.map(|dy| &dy[token * row..][..n]);
        let g = dy_of_token.unwrap_or(&*dz);
        match z {
            Unscaled::Exact(z) => add_products(g, &z[token * z_row..][..n], sum),
            Unscaled::Rounded(z) => add_rounded_products(g, &z[token * z_row..][..n], sum),
        }
        if let Some(shift) = shift {
            add_products(g, shift, sum);
        }
        match dy_of_token {
            Some(dy) => scale_row(dy, factors, dz),
            None => scale_in_place(dz, factors),
        }
    });
}

/// Adds `Σ a ⊙ b` over the rows of `a` and `b`, `[T, n]` both, to `to: [n]`.
pub fn add_column_products(a: &[f32], b: &[f32], tokens: usize, to: &mut [f32]) {
    let n = to.len();
    sum_rows(tokens, to, |token, sum| {
        let range = token * n..(token + 1) * n;
        add_products(&a[range.clone()], &b[range], sum);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    /// `f ⊙ (z + shift) + b`, dense.
    fn reference(z: &[f64], f: &[f64], shift: &[f64], b: &[f64]) -> Vec<f64> {
        z.iter().enumerate().map(|(i, z)| f[i % f.len()] * (z + shift[i % f.len()]) + b[i % f.len()]).collect()
    }

    /// The first `n` elements of each row.
    fn dense(data: &[f32], row: usize, n: usize) -> Vec<f32> {
        data.chunks(row).flat_map(|row| &row[..n]).copied().collect()
    }

    #[test]
    fn forward_equals_the_reference_and_touches_nothing_else() {
        for (tokens, n, z_row, y_row) in [(1, 1, 1, 1), (3, 17, 20, 17), (70, 33, 33, 49), (300, 600, 602, 601)] {
            let (z, f, b) = (random(1, tokens * z_row), random(2, n), random(3, n));
            let (before, addend) = (random(4, tokens * y_row), random(5, tokens * y_row));
            let zeros = vec![0.0; n];
            for (offsets, onto) in [
                (None, Onto::Nothing),
                (Some(&b[..]), Onto::Nothing),
                (Some(&b[..]), Onto::Itself),
                (Some(&b[..]), Onto::Other(&addend)),
            ] {
                let (mut y, mut kept) = (before.clone(), vec![7; tokens * z_row]);
                let scale = Scale { factors: &f, offsets };
                let to = RowsMut { data: &mut y, row: y_row };
                forward(Rows { data: &z, row: z_row }, scale, tokens, to, onto, Some(&mut kept));
                let b64 = to_f64(offsets.unwrap_or(&zeros));
                let mut expected = reference(&to_f64(&dense(&z, z_row, n)), &to_f64(&f), &to_f64(&zeros), &b64);
                let added = match onto {
                    Onto::Nothing => vec![0.0; tokens * n],
                    Onto::Itself => dense(&before, y_row, n),
                    Onto::Other(addend) => dense(addend, y_row, n),
                };
                expected.iter_mut().zip(added).for_each(|(e, a)| *e += f64::from(a));
                assert!(relative_error(&dense(&y, y_row, n), &expected) < 1e-6);
                for (i, (y, before)) in y.iter().zip(&before).enumerate() {
                    assert!(i % y_row < n || y == before, "what is beside the columns has changed");
                }
                for (i, (kept, z)) in kept.iter().zip(&z).enumerate() {
                    assert_eq!(*kept, if i % z_row < n { rounded(*z) } else { 7 });
                }
            }
        }
    }

    #[test]
    fn backward_equals_the_reference_in_place_or_not_and_rounded_or_not() {
        for (tokens, n, z_row, row) in [(1, 1, 1, 1), (5, 17, 20, 18), (70, 33, 33, 49)] {
            let (z, f, shift) = (random(1, tokens * z_row), random(2, n), random(3, n));
            let dy = random(4, tokens * row);
            let (g, f64s) = (to_f64(&dense(&dy, row, n)), to_f64(&f));
            let kept: Vec<u16> = z.iter().map(|&z| rounded(z)).collect();
            let widened: Vec<f32> = kept.iter().map(|&z| widened(z)).collect();
            for (unscaled, exact) in [(Unscaled::Exact(&z), &z), (Unscaled::Rounded(&kept), &widened)] {
                let (z64, zeros) = (to_f64(&dense(exact, z_row, n)), vec![0.0; n]);
                for shift in [None, Some(&shift[..])] {
                    let s64 = shift.map_or(zeros.clone(), to_f64);
                    let by_z = numeric_gradient(&z64, |z| dot(&reference(z, &f64s, &s64, &zeros), &g));
                    let by_f = numeric_gradient(&f64s, |f| dot(&reference(&z64, f, &s64, &zeros), &g));
                    let by_f: Vec<f64> = by_f.iter().map(|g| g + 0.5).collect();
                    for in_place in [false, true] {
                        let mut dz = if in_place { dy.clone() } else { random(6, dy.len()) };
                        let (before, mut df) = (dz.clone(), vec![0.5; n]);
                        let from = (!in_place).then_some(&dy[..]);
                        backward(from, RowsMut { data: &mut dz, row }, unscaled, z_row, &f, shift, tokens, &mut df);
                        assert!(relative_error(&dense(&dz, row, n), &by_z) < 1e-6);
                        assert!(relative_error(&df, &by_f) < 1e-5);
                        let beside = |(i, (dz, before)): (usize, (&f32, &f32))| i % row < n || dz == before;
                        assert!(dz.iter().zip(&before).enumerate().all(beside));
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_columns_are_summed_over_rows() {
        let (tokens, n) = (77, 600);
        let (a, b, mut to) = (random(1, tokens * n), random(2, tokens * n), random(3, n));
        let mut expected = to_f64(&to);
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            expected[i % n] += f64::from(*a) * f64::from(*b);
        }
        add_column_products(&a, &b, tokens, &mut to);
        assert!(relative_error(&to, &expected) < 1e-6);
    }
}
