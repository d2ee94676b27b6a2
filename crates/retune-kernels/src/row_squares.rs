//! The sum of squares of each row of a weight, whatever its storage: of its norm.

use crate::panel::PanelSource;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use crate::vector::sum_squares;

/// Rows decoded at a time.
const ROWS: usize = 16;

/// Writes `Σ w²` over each row of `weight: [n, k]` to `squares: [n]`.
pub fn forward(weight: &dyn PanelSource, squares: &mut [f64]) {
    let (n, k) = (weight.rows(), weight.cols());
    debug_assert_eq!(squares.len(), n);
    let squares = SharedMut::new(squares);
    parallel::for_each(n.div_ceil(ROWS), |piece| {
        let first = piece * ROWS;
        let rows = ROWS.min(n - first);
        scratch::with(Purpose::Panel, rows * k, |decoded| {
            weight.panel_f32(first..first + rows, 0..k, decoded);
            // SAFETY: pieces are disjoint.
            let squares = unsafe { squares.slice(first, rows) };
            for (square, row) in squares.iter_mut().zip(decoded.chunks_exact(k)) {
                *square = sum_squares(row);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::F32Panel;
    use crate::testing::random;

    #[test]
    fn each_row_has_its_own() {
        for (n, k) in [(1, 1), (16, 5), (37, 130)] {
            let w = random(1, n * k);
            let mut squares = vec![f64::NAN; n];
            forward(&F32Panel::new(&w, k), &mut squares);
            for (row, square) in w.chunks(k).zip(squares) {
                let expected: f64 = row.iter().map(|&w| f64::from(w).powi(2)).sum();
                assert!((square - expected).abs() < 1e-9);
            }
        }
    }
}
