//! Products with few rows, as generation needs them: each weight is read once and never packed.

use crate::multiversion;
use crate::panel::PanelSource;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use crate::vector::dot;

/// Largest number of rows for which reading the weight once beats packing it.
pub const MAX_ROWS: usize = 4;
/// Weight rows decoded at a time.
const ROWS: usize = 16;

multiversion! {
    fn dots(x: &[f32], k: usize, weights: &[f32], y: SharedMut<'_>, n: usize, first: usize) {
        for (i, w) in weights.chunks_exact(k).enumerate() {
            for (row, x) in x.chunks_exact(k).enumerate() {
                // SAFETY: one element, owned by the piece that owns this weight row.
                unsafe { y.slice(row * n + first + i, 1)[0] = dot(x, w) };
            }
        }
    }
}

/// Writes `x·Wᵀ` to `y: [m, n]` for `x: [m, k]` of few rows and a weight `W: [n, k]`.
pub fn forward(x: &[f32], weight: &dyn PanelSource, y: &mut [f32]) {
    let (n, k) = (weight.rows(), weight.cols());
    let y = SharedMut::new(y);
    parallel::for_each(n.div_ceil(ROWS), |piece| {
        let first = piece * ROWS;
        let rows = ROWS.min(n - first);
        if let Some(values) = weight.as_f32() {
            dots(x, k, &values[first * k..(first + rows) * k], y, n, first);
        } else {
            scratch::with(Purpose::Panel, rows * k, |decoded| {
                weight.panel_f32(first..first + rows, 0..k, decoded);
                dots(x, k, decoded, y, n, first);
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::F32Panel;
    use crate::testing::{random, relative_error};

    #[test]
    fn equals_the_plain_product() {
        for (m, n, k) in [(1, 1, 1), (1, 50, 33), (4, 17, 130)] {
            let (x, w) = (random(1, m * k), random(2, n * k));
            let mut y = vec![0.0; m * n];
            forward(&x, &F32Panel::new(&w, k), &mut y);
            let mut expected = Vec::new();
            for row in x.chunks(k) {
                expected.extend(
                    w.chunks(k).map(|w| row.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()),
                );
            }
            assert!(relative_error(&y, &expected) < 1e-6);
        }
    }
}
