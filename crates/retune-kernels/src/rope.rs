//! Rotary position embedding in the half-split layout of transformers: pairs are `(i, i + n / 2)` of the first n dimensions of a head,
//! usually all of them (Su et al. 2021).

use crate::heads::HeadLayout;
use crate::multiversion;
use crate::parallel::{self, SharedMut};

/// Cosines and sines for positions `0..len`, each `[len, half]`.
pub struct Table {
    /// Half the number of dimensions that are rotated.
    half: usize,
    frequencies: Vec<f64>,
    factor: f32,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Table {
    /// An empty table for the inverse frequencies `[half]` (scaling already applied to them). Cosines and sines are multiplied by `factor`,
    /// which is 1 but for rotations that are stretched to long contexts (Peng et al. 2023, YaRN).
    pub fn new(frequencies: Vec<f64>, factor: f32) -> Self {
        Self { half: frequencies.len(), frequencies, factor, cos: Vec::new(), sin: Vec::new() }
    }

    /// The inverse frequencies.
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Whether no position is held yet.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }

    /// Makes the table hold at least the positions `0..len`.
    pub fn grow(&mut self, len: usize) {
        for position in self.len()..len {
            for &frequency in &self.frequencies {
                // The angle is rounded to f32 as transformers computes it, so that long contexts agree as well.
                let angle = f64::from(position as f32 * frequency as f32);
                self.cos.push(angle.cos() as f32 * self.factor);
                self.sin.push(angle.sin() as f32 * self.factor);
            }
        }
    }
}

multiversion! {
    fn rotate_rows(x: &mut [f32], layout: &HeadLayout, positions: &[u32], cos: &[f32], sin: &[f32], half: usize, sign: f32) {
        for (row, &position) in x.chunks_exact_mut(layout.row).zip(positions) {
            let at = position as usize * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            for head in 0..layout.heads {
                let start = layout.at(0, head);
                let (first, second) = row[start..start + 2 * half].split_at_mut(half);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let (x, y, s) = (*a, *b, sign * s);
                    *a = x * c - y * s;
                    *b = y * c + x * s;
                }
            }
        }
    }
}

fn rotate(x: &mut [f32], layout: HeadLayout, positions: &[u32], table: &Table, sign: f32) {
    debug_assert!(2 * table.half <= layout.head_dim && x.len() >= positions.len() * layout.row);
    let rows = parallel::chunk_rows(positions.len(), 8);
    let shared = SharedMut::new(x);
    parallel::for_each(positions.len().div_ceil(rows), |piece| {
        let first = piece * rows;
        let n = rows.min(positions.len() - first);
        // SAFETY: pieces are disjoint.
        let x = unsafe { shared.slice(first * layout.row, n * layout.row) };
        rotate_rows(x, &layout, &positions[first..first + n], &table.cos, &table.sin, table.half, sign);
    });
}

/// Rotates the heads of the rows `x`, one for each position, in place. The table must hold every position; what else the rows hold is
/// left alone, and so are the dimensions of a head beyond those that the table has frequencies for.
pub fn forward(x: &mut [f32], layout: HeadLayout, positions: &[u32], table: &Table) {
    rotate(x, layout, positions, table, 1.0);
}

/// Turns the gradient of rotated heads into the gradient of the heads before, in place: the transpose, which is the rotation by −θ and
/// the same factor.
pub fn backward(dx: &mut [f32], layout: HeadLayout, positions: &[u32], table: &Table) {
    rotate(dx, layout, positions, table, -1.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    fn reference(x: &[f64], layout: HeadLayout, positions: &[u32], table: &Table) -> Vec<f64> {
        let half = table.frequencies().len();
        let mut y = x.to_vec();
        for (t, &position) in positions.iter().enumerate() {
            for head in 0..layout.heads {
                for (i, frequency) in table.frequencies().iter().enumerate() {
                    let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                    let (sin, cos) = (sin * f64::from(table.factor), cos * f64::from(table.factor));
                    let at = layout.at(t, head) + i;
                    y[at] = x[at] * cos - x[at + half] * sin;
                    y[at + half] = x[at + half] * cos + x[at] * sin;
                }
            }
        }
        y
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        let layouts = [
            HeadLayout::dense(1, 2),
            HeadLayout::dense(3, 10),
            HeadLayout::dense(2, 64),
            HeadLayout { row: 50, first: 3, head: 22, heads: 2, head_dim: 10 },
        ];
        // All dimensions of a head and, where there are several pairs, all but some; without a factor and with one.
        for (layout, (left, factor)) in layouts.into_iter().flat_map(|l| [(l, (0, 1.0)), (l, (4, 1.19))]) {
            let positions = [0, 1, 2, 9, 0, 40];
            let half = (layout.head_dim / 2 - left.min(layout.head_dim / 2 - 1)).max(1);
            let frequencies: Vec<f64> = (0..half).map(|i| 100f64.powf(-(i as f64) / half as f64)).collect();
            let mut table = Table::new(frequencies, factor);
            table.grow(3);
            table.grow(41);
            assert_eq!(table.len(), 41);
            let n = positions.len() * layout.row;
            let (x, dy) = (random(1, n), random(2, n));
            let mut y = x.clone();
            forward(&mut y, layout, &positions, &table);
            let expected = reference(&to_f64(&x), layout, &positions, &table);
            assert!(relative_error(&y, &expected) < 1e-5);
            // What is not rotated is not touched.
            assert!(expected.iter().zip(&x).zip(&y).all(|((e, x), y)| *e != f64::from(*x) || x == y));
            let mut dx = dy.clone();
            backward(&mut dx, layout, &positions, &table);
            let expected =
                numeric_gradient(&to_f64(&x), |x| dot(&reference(x, layout, &positions, &table), &to_f64(&dy)));
            assert!(relative_error(&dx, &expected) < 1e-5);
        }
    }
}
