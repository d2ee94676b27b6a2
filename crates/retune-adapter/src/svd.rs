//! Decompositions of matrices, and the low-rank factors that are cut from them.
//!
//! They are computed in f64 on one thread: whoever has many matrices gives each thread its own, and no result depends on how many there are.

use faer::{Mat, MatRef};
use retune_kernels::random;

use crate::error::Error;

/// The decomposition M = U·S·Vᵀ of a matrix `[rows, cols]`.
pub struct Svd {
    /// `[rows, k]`.
    u: Mat<f64>,
    /// `[cols, k]`.
    v: Mat<f64>,
    singular_values: Vec<f64>,
}

impl Svd {
    /// Of a matrix, row-major.
    ///
    /// # Errors
    /// Values that are not finite; an iteration that does not converge.
    ///
    /// # Panics
    /// When the length does not fit.
    pub fn of_matrix(rows: usize, cols: usize, values: &[f32]) -> Result<Self, Error> {
        Self::of(matrix(rows, cols, values).as_ref())
    }

    /// Of the product of `left` `[rows, r]` and `right` `[r, cols]`, row-major. The product itself is not made: each factor is orthogonalised
    /// (QR), and what is decomposed is `[r, r]`.
    ///
    /// # Errors
    /// As [`Svd::of_matrix`].
    ///
    /// # Panics
    /// When a length does not fit.
    pub fn of_product(rows: usize, cols: usize, r: usize, left: &[f32], right: &[f32]) -> Result<Self, Error> {
        let left = matrix(rows, r, left).qr();
        let right = matrix(r, cols, right).transpose().to_owned().qr();
        let core = Self::of((left.thin_R() * right.thin_R().transpose()).as_ref())?;
        Ok(Self {
            u: left.compute_thin_Q() * core.u,
            v: right.compute_thin_Q() * core.v,
            singular_values: core.singular_values,
        })
    }

    /// The first `rank` singular values and vectors of a matrix, nearly: a random subspace, turned towards them by `iterations` passes over the
    /// matrix and its transpose (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    ///
    /// # Errors
    /// As [`Svd::of_matrix`].
    ///
    /// # Panics
    /// When the length does not fit.
    pub fn randomised(
        rows: usize,
        cols: usize,
        values: &[f32],
        rank: usize,
        iterations: usize,
        seed: u64,
    ) -> Result<Self, Error> {
        let matrix = matrix(rows, cols, values);
        let rank = rank.min(rows).min(cols);
        let basis = |of: Mat<f64>| of.qr().compute_thin_Q();
        let start = Mat::from_fn(cols, rank, |i, j| random::normal(seed, (i * rank + j) as u64));
        let mut left = basis(&matrix * start);
        for _ in 0..iterations {
            let right = basis(matrix.transpose() * &left);
            left = basis(&matrix * right);
        }
        let core = Self::of((left.transpose() * &matrix).as_ref())?;
        Ok(Self { u: left * core.u, v: core.v, singular_values: core.singular_values })
    }

    fn of(matrix: MatRef<'_, f64>) -> Result<Self, Error> {
        let failed = || Error::Decomposition { rows: matrix.nrows(), cols: matrix.ncols() };
        if !matrix.is_all_finite() {
            return Err(failed());
        }
        let svd = matrix.thin_svd().map_err(|_| failed())?;
        let singular_values = svd.S().column_vector().iter().copied().collect();
        Ok(Self { u: svd.U().to_owned(), v: svd.V().to_owned(), singular_values })
    }

    /// The singular values, largest first: as many as the matrix (or the product's rank) can have.
    pub fn singular_values(&self) -> &[f64] {
        &self.singular_values
    }

    /// The factors U·S^½ `[rows, rank]` and S^½·Vᵀ `[rank, cols]`, row-major, of the nearest matrix of this rank (Eckart and Young 1936).
    /// Where the rank is higher than there are singular values, the rest is zero.
    pub fn factors(&self, rank: usize) -> (Vec<f32>, Vec<f32>) {
        let root = |k: usize| self.singular_values.get(k).map_or(0.0, |value| value.sqrt());
        let scaled =
            |of: &Mat<f64>, i: usize, k: usize| if k < of.ncols() { (of[(i, k)] * root(k)) as f32 } else { 0.0 };
        let (rows, cols) = (self.u.nrows(), self.v.nrows());
        let left = (0..rows * rank).map(|at| scaled(&self.u, at / rank, at % rank));
        let right = (0..rank * cols).map(|at| scaled(&self.v, at % cols, at / cols));
        (left.collect(), right.collect())
    }
}

/// The first `rank` columns of Q `[rows, rank]` and rows of R `[rank, cols]`, row-major, of a matrix's QR decomposition. Where the rank is higher
/// than the matrix's, the rest is zero.
///
/// # Errors
/// Values that are not finite.
///
/// # Panics
/// When the length does not fit.
pub fn qr_factors(rows: usize, cols: usize, values: &[f32], rank: usize) -> Result<(Vec<f32>, Vec<f32>), Error> {
    let matrix = matrix(rows, cols, values);
    if !matrix.is_all_finite() {
        return Err(Error::Decomposition { rows, cols });
    }
    let qr = matrix.qr();
    let (q, r) = (qr.compute_thin_Q(), qr.thin_R());
    let most = rows.min(cols);
    let left = (0..rows * rank).map(|at| if at % rank < most { q[(at / rank, at % rank)] as f32 } else { 0.0 });
    let right = (0..rank * cols).map(|at| if at / cols < most { r[(at / cols, at % cols)] as f32 } else { 0.0 });
    Ok((left.collect(), right.collect()))
}

fn matrix(rows: usize, cols: usize, values: &[f32]) -> Mat<f64> {
    assert_eq!(values.len(), rows * cols, "a matrix [{rows}, {cols}]");
    Mat::from_fn(rows, cols, |i, j| f64::from(values[i * cols + j]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_kernels::random;

    fn values(count: usize, seed: u64) -> Vec<f32> {
        (0..count).map(|i| random::symmetric(random::at(seed, i as u64))).collect()
    }

    fn product(rows: usize, cols: usize, r: usize, left: &[f32], right: &[f32]) -> Vec<f32> {
        let at = |i: usize, j: usize| {
            (0..r).map(|k| f64::from(left[i * r + k]) * f64::from(right[k * cols + j])).sum::<f64>()
        };
        (0..rows * cols).map(|place| at(place / cols, place % cols) as f32).collect()
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    }

    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (7, 5, 3), (5, 7, 3), (40, 33, 8), (20, 64, 20), (6, 9, 24), (9, 6, 24)];

    #[test]
    fn all_singular_values_together_are_the_matrix() {
        for (rows, cols, r) in SHAPES {
            let (left, right) = (values(rows * r, 1), values(r * cols, 2));
            let whole = product(rows, cols, r, &left, &right);
            let size = distance(&whole, &vec![0.0; whole.len()]);
            let of_matrix = Svd::of_matrix(rows, cols, &whole).unwrap();
            let of_product = Svd::of_product(rows, cols, r, &left, &right).unwrap();
            for (svd, rank) in [(&of_matrix, rows.min(cols)), (&of_product, r), (&of_matrix, 70)] {
                let (left, right) = svd.factors(rank);
                assert_eq!((left.len(), right.len()), (rows * rank, rank * cols));
                let again = product(rows, cols, rank, &left, &right);
                assert!(distance(&again, &whole) < 1e-6 * size, "{rows} × {cols}");
            }
            let pairs = of_matrix.singular_values().iter().zip(of_product.singular_values());
            assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-5 * size), "{rows} × {cols}");
            assert!(of_matrix.singular_values().is_sorted_by(|a, b| a >= b));
        }
    }

    #[test]
    fn a_truncated_matrix_lies_as_far_away_as_the_singular_values_left_out() {
        let (rows, cols, r) = (30, 50, 12);
        let (left, right) = (values(rows * r, 3), values(r * cols, 4));
        let whole = product(rows, cols, r, &left, &right);
        for svd in [Svd::of_matrix(rows, cols, &whole), Svd::of_product(rows, cols, r, &left, &right)] {
            let svd = svd.unwrap();
            for rank in [1, 5, 11] {
                let left_out = svd.singular_values()[rank..].iter().map(|value| value.powi(2)).sum::<f64>().sqrt();
                let (left, right) = svd.factors(rank);
                let away = distance(&product(rows, cols, rank, &left, &right), &whole);
                assert!((away - left_out).abs() < 1e-5 * left_out, "{rank}: {away}, {left_out}");
            }
        }
    }

    #[test]
    fn a_randomised_decomposition_comes_near_and_nearer_with_iterations() {
        let (rows, cols, r) = (60, 40, 30);
        let (left, right) = (values(rows * r, 5), values(r * cols, 6));
        let whole = product(rows, cols, r, &left, &right);
        let away = |svd: &Svd| {
            let (left, right) = svd.factors(8);
            distance(&product(rows, cols, 8, &left, &right), &whole)
        };
        let exact = away(&Svd::of_matrix(rows, cols, &whole).unwrap());
        let [none, few, many] =
            [0, 2, 16].map(|n| away(&Svd::randomised(rows, cols, &whole, 8, n, 7).unwrap()) / exact);
        assert!((1.0 - 1e-6..1.01).contains(&many) && few < none && many <= few, "{none} {few} {many}");
    }

    #[test]
    fn the_first_of_q_and_r_leave_a_remainder_that_they_are_orthogonal_to() {
        for (rows, cols, rank) in [(12, 20, 5), (20, 12, 5), (6, 4, 4), (4, 6, 9)] {
            let whole = values(rows * cols, 8);
            let (q, r) = qr_factors(rows, cols, &whole, rank).unwrap();
            let taken = product(rows, cols, rank, &q, &r);
            let left: Vec<f32> = whole.iter().zip(&taken).map(|(a, b)| a - b).collect();
            for k in 0..rank.min(rows).min(cols) {
                let size: f32 = (0..rows).map(|i| q[i * rank + k].powi(2)).sum();
                assert!((size - 1.0).abs() < 1e-5);
                for j in 0..cols {
                    let dot: f32 = (0..rows).map(|i| q[i * rank + k] * left[i * cols + j]).sum();
                    assert!(dot.abs() < 1e-5, "{rows} × {cols}: {dot}");
                }
            }
            if rank >= rows.min(cols) {
                assert!(left.iter().all(|v| v.abs() < 1e-5));
            }
        }
    }

    #[test]
    fn zeros_have_no_singular_values_and_infinity_no_decomposition() {
        let svd = Svd::of_product(5, 4, 2, &[0.0; 10], &values(8, 1)).unwrap();
        assert_eq!(svd.singular_values(), [0.0, 0.0]);
        let (left, right) = svd.factors(2);
        assert!(left.iter().chain(&right).all(|value| *value == 0.0));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(Svd::of_matrix(2, 2, &[1.0, bad, 0.0, 1.0]).is_err());
        }
    }
}
