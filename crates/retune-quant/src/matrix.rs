//! A matrix as it is stored, readable by panels.

use std::ops::Range;
use std::sync::Arc;

use retune_kernels::PanelSource;

use crate::blocks::{self, Stored};
use crate::bytes::{self, SharedBytes};
use crate::error::Error;
use crate::format::Format;
use crate::four_bit::{self, FourBit};
use crate::int8_rows::{self, Int8Rows};

/// A stored matrix `[rows, cols]`, row-major. A vector of n values is `[1, n]`. Cloning copies no values.
#[derive(Clone, Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    values: Values,
    row_map: Option<Arc<[u32]>>,
}

#[derive(Clone, Debug)]
enum Values {
    /// Each row is a sequence of whole blocks.
    Blocks { format: Format, row_bytes: usize, bytes: SharedBytes },
    /// Blocks do not end with a row, and their scales lie apart from them.
    FourBit(Arc<FourBit>),
    /// A byte a value, and a scale a row.
    Int8(Arc<Int8Rows>),
    /// Rows are the columns of this matrix.
    Transposed(Arc<Matrix>),
}

/// Rows and columns of a tile that is transposed at a time: 16 KB, which fit a first-level cache twice.
const TILE: usize = 64;

impl Matrix {
    /// The matrix that `bytes` are.
    ///
    /// # Errors
    /// When `cols` is no multiple of the format's block, or `bytes` are not exactly those of `rows` x `cols` values.
    pub fn new(format: Format, rows: usize, cols: usize, bytes: SharedBytes) -> Result<Self, Error> {
        if !cols.is_multiple_of(format.block_len()) {
            return Err(Error::RowLength { format, cols });
        }
        let sizes = format.bytes_for(1, cols).zip(format.bytes_for(rows, cols));
        let storage = format.name();
        let Some((row_bytes, expected)) = sizes else {
            return Err(Error::TooLarge { storage, rows, cols });
        };
        if bytes.len() != expected {
            return Err(Error::ByteCount { storage, rows, cols, expected, found: bytes.len() });
        }
        Ok(Self { rows, cols, values: Values::Blocks { format, row_bytes, bytes }, row_map: None })
    }

    /// The matrix of values in bitsandbytes' 4 bits.
    ///
    /// # Errors
    /// When they are not exactly `rows` x `cols` values.
    pub fn from_four_bit(rows: usize, cols: usize, values: FourBit) -> Result<Self, Error> {
        values.check_shape(rows, cols)?;
        Ok(Self { rows, cols, values: Values::FourBit(Arc::new(values)), row_map: None })
    }

    /// The matrix of values in LLM.int8()'s 8 bits.
    ///
    /// # Errors
    /// When they are not exactly `rows` x `cols` values, with a scale for each row.
    pub fn from_int8_rows(rows: usize, cols: usize, values: Int8Rows) -> Result<Self, Error> {
        values.check_shape(rows, cols)?;
        Ok(Self { rows, cols, values: Values::Int8(Arc::new(values)), row_map: None })
    }

    /// The matrix of `values`, which it keeps.
    ///
    /// # Panics
    /// Unless there are `rows` x `cols` values.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        assert_eq!(rows.checked_mul(cols), Some(values.len()), "values of a {rows} x {cols} matrix");
        let row_bytes = cols * size_of::<f32>();
        let values = Values::Blocks { format: Format::F32, row_bytes, bytes: SharedBytes::from_f32(values) };
        Self { rows, cols, values, row_map: None }
    }

    /// The same matrix with its rows in another order: row r is what was row `map[r]`. Nothing is copied.
    ///
    /// # Errors
    /// When the map has not one entry for each row, or one of them is no row.
    pub fn with_row_map(self, map: Arc<[u32]>) -> Result<Self, Error> {
        if map.len() != self.rows {
            return Err(Error::RowMapLength { expected: self.rows, found: map.len() });
        }
        if let Some((row, &stored)) = map.iter().enumerate().find(|&(_, &stored)| stored as usize >= self.rows) {
            return Err(Error::RowMapEntry { row, stored, rows: self.rows });
        }
        let row_map: Arc<[u32]> = match &self.row_map {
            Some(earlier) => map.iter().map(|&row| earlier[row as usize]).collect(),
            None => map,
        };
        Ok(Self { row_map: Some(row_map), ..self })
    }

    /// The transpose: rows are columns. Nothing is copied; a panel is decoded from the stored rows a tile at a time.
    pub fn transposed(self) -> Self {
        let (rows, cols) = (self.cols, self.rows);
        match self {
            Self { values: Values::Transposed(matrix), row_map: None, .. } => Arc::unwrap_or_clone(matrix),
            matrix => Self { rows, cols, values: Values::Transposed(Arc::new(matrix)), row_map: None },
        }
    }

    /// Number of rows (for a weight: output features).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (for a weight: input features).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The name of how the values are stored: a [`Format`]'s, "NF4", "FP4" or "INT8".
    pub fn storage(&self) -> &'static str {
        match &self.values {
            Values::Blocks { format, .. } => format.name(),
            Values::FourBit(values) => values.name(),
            Values::Int8(_) => Int8Rows::NAME,
            Values::Transposed(matrix) => matrix.storage(),
        }
    }

    /// Bytes the values take as they are stored.
    pub fn bytes_len(&self) -> usize {
        match &self.values {
            Values::Blocks { bytes, .. } => bytes.len(),
            Values::FourBit(values) => values.bytes_len(),
            Values::Int8(values) => values.bytes_len(),
            Values::Transposed(matrix) => matrix.bytes_len(),
        }
    }

    /// All values, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        self.panel_f32(0..self.rows, 0..self.cols, &mut values);
        values
    }
}

impl Matrix {
    /// Writes the panel `rows` x `cols` of the transpose, whose rows are this matrix's columns.
    fn transposed_panel(&self, rows: Range<usize>, cols: Range<usize>, dst: &mut [f32]) {
        let mut tile = [0.0f32; TILE * TILE];
        let width = cols.len();
        for first_row in rows.clone().step_by(TILE) {
            let of_rows = first_row..(first_row + TILE).min(rows.end);
            let height = of_rows.len();
            let at_row = (first_row - rows.start) * width;
            for first_col in cols.clone().step_by(TILE) {
                let of_cols = first_col..(first_col + TILE).min(cols.end);
                let at_col = first_col - cols.start;
                let tile = &mut tile[..of_cols.len() * height];
                self.panel_f32(of_cols.clone(), of_rows.clone(), tile);
                for (row, out) in dst[at_row..].chunks_mut(width).take(height).enumerate() {
                    for (out, values) in out[at_col..at_col + of_cols.len()].iter_mut().zip(tile.chunks_exact(height)) {
                        *out = values[row];
                    }
                }
            }
        }
    }
}

impl PanelSource for Matrix {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    /// # Panics
    /// When the panel is not inside the matrix, or `dst` has not its size.
    fn panel_f32(&self, rows: Range<usize>, cols: Range<usize>, dst: &mut [f32]) {
        assert!(
            rows.end <= self.rows && cols.end <= self.cols,
            "panel {rows:?} x {cols:?} of a {} x {} matrix",
            self.rows,
            self.cols
        );
        assert_eq!(dst.len(), rows.len() * cols.len(), "elements for the panel {rows:?} x {cols:?}");
        if dst.is_empty() {
            return;
        }
        let row_map = self.row_map.as_deref();
        match &self.values {
            Values::Blocks { format, row_bytes, bytes } => {
                let stored = Stored { bytes, row_bytes: *row_bytes, row_map };
                blocks::decode_panel(*format, stored, rows, cols, dst);
            }
            Values::FourBit(values) => four_bit::decode_panel(values, self.cols, row_map, rows, cols, dst),
            Values::Int8(values) => int8_rows::decode_panel(values, self.cols, row_map, rows, cols, dst),
            Values::Transposed(matrix) => match row_map {
                None => matrix.transposed_panel(rows, cols, dst),
                Some(map) => {
                    for (&row, out) in map[rows].iter().zip(dst.chunks_exact_mut(cols.len())) {
                        let row = row as usize;
                        matrix.panel_f32(cols.clone(), row..row + 1, out);
                    }
                }
            },
        }
    }

    fn block_cols(&self) -> usize {
        match &self.values {
            Values::Blocks { format, .. } => format.block_len(),
            // Every value is decoded by itself.
            Values::FourBit(_) | Values::Int8(_) | Values::Transposed(_) => 1,
        }
    }

    fn as_f32(&self) -> Option<&[f32]> {
        match &self.values {
            Values::Blocks { format: Format::F32, bytes, .. } if self.row_map.is_none() => bytes::as_f32(bytes),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 3 x 4 matrix whose value at row r, column c is 10 r + c.
    fn example() -> Matrix {
        let values = (0..3).flat_map(|r| (0..4).map(move |c| (10 * r + c) as f32)).collect();
        Matrix::from_f32(3, 4, values)
    }

    fn panel(matrix: &Matrix, rows: Range<usize>, cols: Range<usize>) -> Vec<f32> {
        let mut dst = vec![f32::NAN; rows.len() * cols.len()];
        matrix.panel_f32(rows, cols, &mut dst);
        dst
    }

    #[test]
    fn panels_are_dense() {
        assert_eq!(panel(&example(), 1..3, 1..3), [11.0, 12.0, 21.0, 22.0]);
        assert_eq!(panel(&example(), 2..3, 3..4), [23.0]);
        assert!(panel(&example(), 3..3, 0..4).is_empty());
        assert!(panel(&example(), 0..3, 4..4).is_empty());
    }

    #[test]
    #[should_panic(expected = "panel 2..4 x 0..4 of a 3 x 4 matrix")]
    fn a_panel_beyond_the_last_row_is_refused() {
        panel(&example(), 2..4, 0..4);
    }

    #[test]
    fn a_row_map_reorders_and_composes() {
        let mapped = example().with_row_map(Arc::from([2, 0, 1])).unwrap();
        assert_eq!(panel(&mapped, 0..3, 0..1), [20.0, 0.0, 10.0]);
        assert_eq!(mapped.as_f32(), None);
        let back = mapped.with_row_map(Arc::from([1, 2, 0])).unwrap();
        assert_eq!(back.to_f32(), example().to_f32());
    }

    #[test]
    fn a_transpose_gives_columns_as_rows() {
        let transposed = example().transposed();
        assert_eq!((transposed.rows(), transposed.cols(), transposed.as_f32()), (4, 3, None));
        assert_eq!(panel(&transposed, 1..3, 0..3), [1.0, 11.0, 21.0, 2.0, 12.0, 22.0]);
        assert_eq!(panel(&transposed, 3..4, 1..2), [13.0]);
        assert_eq!(transposed.clone().transposed().to_f32(), example().to_f32());
        let mapped = transposed.clone().with_row_map(Arc::from([3, 0, 1, 2])).unwrap();
        assert_eq!(panel(&mapped, 0..2, 1..3), [13.0, 23.0, 10.0, 20.0]);
        assert_eq!(panel(&mapped.transposed(), 1..2, 0..4), [13.0, 10.0, 11.0, 12.0]);
        let of_mapped = example().with_row_map(Arc::from([2, 0, 1])).unwrap().transposed();
        assert_eq!(panel(&of_mapped, 0..1, 0..3), [20.0, 0.0, 10.0]);
    }

    #[test]
    fn panels_of_a_transpose_of_several_tiles_are_those_of_its_values() {
        let (rows, cols) = (150, 200);
        let bytes = |seed: usize, i: usize| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) as u8;
        for format in [Format::F32, Format::BF16, Format::Q8_0] {
            let cols = cols / 32 * 32;
            let len = format.bytes_for(rows, cols).unwrap();
            // Exponents of all ones would be no numbers.
            let stored = (0..len).map(|i| bytes(7, i) & 0x3F).collect();
            let matrix = Matrix::new(format, rows, cols, SharedBytes::from_vec(stored)).unwrap();
            let (values, transposed) = (matrix.to_f32(), matrix.transposed());
            for (of_rows, of_cols) in [(0..cols, 0..rows), (63..130, 1..150), (5..6, 60..70), (64..128, 64..128)] {
                let expected: Vec<f32> = of_rows
                    .clone()
                    .flat_map(|r| of_cols.clone().map(move |c| (r, c)))
                    .map(|(r, c)| values[c * cols + r])
                    .collect();
                assert_eq!(panel(&transposed, of_rows, of_cols), expected, "{format}");
            }
            assert_eq!(transposed.storage(), format.name());
        }
    }

    #[test]
    fn a_row_map_that_does_not_fit_is_an_error() {
        let short = example().with_row_map(Arc::from([0, 1])).unwrap_err();
        assert_eq!(short, Error::RowMapLength { expected: 3, found: 2 });
        let outside = example().with_row_map(Arc::from([0, 3, 1])).unwrap_err();
        assert_eq!(outside, Error::RowMapEntry { row: 1, stored: 3, rows: 3 });
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let new =
            |format, rows, cols, n| Matrix::new(format, rows, cols, SharedBytes::from_vec(vec![0; n])).unwrap_err();
        assert_eq!(new(Format::Q4_0, 2, 33, 36), Error::RowLength { format: Format::Q4_0, cols: 33 });
        for found in [35, 37, 0] {
            assert_eq!(
                new(Format::Q4_0, 2, 32, found),
                Error::ByteCount { storage: "Q4_0", rows: 2, cols: 32, expected: 36, found }
            );
        }
        let rows = usize::MAX / 8;
        assert_eq!(new(Format::F32, rows, 64, 0), Error::TooLarge { storage: "F32", rows, cols: 64 });
        let message = new(Format::Q6K, 1, 100, 0).to_string();
        assert!(message.contains("100") && message.contains("Q6_K") && message.contains("256"), "{message}");
    }

    #[test]
    fn f32_is_borrowed_only_where_it_is_aligned() {
        assert_eq!(example().as_f32().is_some(), cfg!(target_endian = "little"));
        let values = example().to_f32();
        let mut shifted = vec![0u8; 4 * values.len() + 4];
        // The address is made odd by hand: where a vector begins is the allocator's choice.
        let start = 1 + shifted.as_ptr().align_offset(4) % 4;
        for (bytes, value) in shifted[start..].chunks_exact_mut(4).zip(&values) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        let bytes = SharedBytes::from_vec(shifted).slice(start..start + 4 * values.len()).unwrap();
        let matrix = Matrix::new(Format::F32, 3, 4, bytes).unwrap();
        assert_eq!(matrix.as_f32(), None);
        assert_eq!(matrix.to_f32(), values);
    }
}
