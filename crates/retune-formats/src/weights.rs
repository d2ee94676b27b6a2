//! From the stored bytes of a tensor to a matrix.

use retune_quant::{Format, Matrix, SharedBytes};

use crate::error::Error;

/// The matrix `[rows, cols]` that a tensor's bytes hold. Copies nothing.
///
/// # Errors
/// A size that does not fit the bytes; the error names the tensor.
pub fn matrix(name: &str, format: Format, rows: usize, cols: usize, bytes: SharedBytes) -> Result<Matrix, Error> {
    Matrix::new(format, rows, cols, bytes).map_err(|error| Error::Tensor { tensor: name.to_owned(), error })
}

/// A vector is one row.
pub fn rows_and_cols(shape: &[usize]) -> (usize, usize) {
    match *shape {
        [rows, cols] => (rows, cols),
        _ => (1, shape.iter().product()),
    }
}
