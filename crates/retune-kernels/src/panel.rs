//! How kernels read a matrix whose storage they do not know.

use std::ops::Range;

/// A matrix `[rows, cols]` that can be decoded to f32 by panels, whatever its storage. A weight of the frozen base is one of these, so
/// it is never expanded as a whole.
pub trait PanelSource: Send + Sync {
    /// Number of rows (for a weight: output features).
    fn rows(&self) -> usize;

    /// Number of columns (for a weight: input features).
    fn cols(&self) -> usize;

    /// Writes the panel `rows` × `cols`, row-major and dense, into `dst` of exactly that many elements. Any range inside the matrix is
    /// legal; whole rows and ranges aligned to the storage's blocks are fast.
    fn panel_f32(&self, rows: Range<usize>, cols: Range<usize>, dst: &mut [f32]);

    /// Number of columns that are stored as one block: panels cut at its multiples decode nothing twice.
    fn block_cols(&self) -> usize {
        1
    }

    /// The whole matrix as one row-major slice, when it is stored that way.
    fn as_f32(&self) -> Option<&[f32]> {
        None
    }
}

/// A matrix of f32 values that somebody else owns: a trainable weight, or a test's.
#[derive(Clone, Copy)]
pub struct F32Panel<'a> {
    values: &'a [f32],
    cols: usize,
}

impl<'a> F32Panel<'a> {
    /// Views `values` as rows of `cols` elements.
    pub fn new(values: &'a [f32], cols: usize) -> Self {
        debug_assert_eq!(values.len() % cols.max(1), 0);
        Self { values, cols }
    }
}

impl PanelSource for F32Panel<'_> {
    fn rows(&self) -> usize {
        self.values.len() / self.cols.max(1)
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn panel_f32(&self, rows: Range<usize>, cols: Range<usize>, dst: &mut [f32]) {
        for (row, out) in rows.zip(dst.chunks_exact_mut(cols.len())) {
            let start = row * self.cols;
            out.copy_from_slice(&self.values[start + cols.start..start + cols.end]);
        }
    }

    fn as_f32(&self) -> Option<&[f32]> {
        Some(self.values)
    }
}
