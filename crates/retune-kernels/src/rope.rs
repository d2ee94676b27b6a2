//! Rotary position embedding in the half-split layout of transformers: pairs are `(i, i + head_dim / 2)` (Su et al. 2021).

use crate::multiversion;
use crate::parallel::{self, SharedMut};

/// Cosines and sines for positions `0..len`, each `[len, head_dim / 2]`.
pub struct Table {
    half: usize,
    frequencies: Vec<f64>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Table {
    /// An empty table for the inverse frequencies `[head_dim / 2]` (scaling already applied to them).
    pub fn new(frequencies: Vec<f64>) -> Self {
        Self { half: frequencies.len(), frequencies, cos: Vec::new(), sin: Vec::new() }
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
                self.cos.push(angle.cos() as f32);
                self.sin.push(angle.sin() as f32);
            }
        }
    }
}

multiversion! {
    fn rotate_rows(x: &mut [f32], positions: &[u32], cos: &[f32], sin: &[f32], half: usize, sign: f32) {
        let width = x.len() / positions.len().max(1);
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let at = position as usize * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            for head in row.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let (x, y, s) = (*a, *b, sign * s);
                    *a = x * c - y * s;
                    *b = y * c + x * s;
                }
            }
        }
    }
}

fn rotate(x: &mut [f32], positions: &[u32], table: &Table, sign: f32) {
    if positions.is_empty() {
        return;
    }
    let width = x.len() / positions.len();
    let rows = parallel::chunk_rows(positions.len(), 8);
    let shared = SharedMut::new(x);
    parallel::for_each(positions.len().div_ceil(rows), |piece| {
        let first = piece * rows;
        let n = rows.min(positions.len() - first);
        // SAFETY: pieces are disjoint.
        let x = unsafe { shared.slice(first * width, n * width) };
        rotate_rows(x, &positions[first..first + n], &table.cos, &table.sin, table.half, sign);
    });
}

/// Rotates the heads of `x: [T, heads · head_dim]` in place by each token's position; the table must hold every position.
pub fn forward(x: &mut [f32], positions: &[u32], table: &Table) {
    rotate(x, positions, table, 1.0);
}

/// Turns the gradient of rotated heads into the gradient of the heads before, in place: the rotation by −θ.
pub fn backward(dx: &mut [f32], positions: &[u32], table: &Table) {
    rotate(dx, positions, table, -1.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    fn reference(x: &[f64], positions: &[u32], frequencies: &[f64], heads: usize) -> Vec<f64> {
        let half = frequencies.len();
        let mut y = vec![0.0; x.len()];
        for (t, &position) in positions.iter().enumerate() {
            for head in 0..heads {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                    let at = (t * heads + head) * 2 * half + i;
                    y[at] = x[at] * cos - x[at + half] * sin;
                    y[at + half] = x[at + half] * cos + x[at] * sin;
                }
            }
        }
        y
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        for (heads, half) in [(1, 1), (3, 5), (2, 32)] {
            let positions = [0, 1, 2, 9, 0, 40];
            let frequencies: Vec<f64> = (0..half).map(|i| 100f64.powf(-(i as f64) / half as f64)).collect();
            let mut table = Table::new(frequencies.clone());
            table.grow(3);
            table.grow(41);
            assert_eq!(table.len(), 41);
            let n = positions.len() * heads * 2 * half;
            let (x, dy) = (random(1, n), random(2, n));
            let mut y = x.clone();
            forward(&mut y, &positions, &table);
            assert!(relative_error(&y, &reference(&to_f64(&x), &positions, &frequencies, heads)) < 1e-5);
            let mut dx = dy.clone();
            backward(&mut dx, &positions, &table);
            let expected =
                numeric_gradient(&to_f64(&x), |x| dot(&reference(x, &positions, &frequencies, heads), &to_f64(&dy)));
            assert!(relative_error(&dx, &expected) < 1e-5);
        }
    }
}
