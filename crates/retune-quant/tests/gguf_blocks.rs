//! Decoding against the `gguf` Python package, bit for bit (`goldens/make_gguf.py` makes the file), and panels against it.

use std::ops::Range;
use std::sync::Arc;

use retune_kernels::PanelSource;
use retune_quant::{Format, Matrix, SharedBytes};
use safetensors::SafeTensors;

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/gguf_blocks.safetensors");

/// The stored matrix of a format, and the bits of the values it must have.
struct Golden {
    format: Format,
    matrix: Matrix,
    bits: Vec<u32>,
}

impl Golden {
    fn bits(&self, rows: Range<usize>, cols: Range<usize>) -> Vec<u32> {
        let row = |r: usize| &self.bits[r * self.matrix.cols()..][cols.clone()];
        rows.flat_map(|r| row(r).to_vec()).collect()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn panel(matrix: &Matrix, rows: Range<usize>, cols: Range<usize>) -> Vec<u32> {
    let mut values = vec![f32::NAN; rows.len() * cols.len()];
    matrix.panel_f32(rows, cols, &mut values);
    bits(&values)
}

/// All formats but F32, which the package does not change.
fn goldens() -> Vec<Golden> {
    let file = std::fs::read(GOLDENS).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let formats = Format::ALL.into_iter().filter(|&format| format != Format::F32);
    formats
        .map(|format| {
            let stored = tensors.tensor(&format!("{format}.bytes")).unwrap();
            let values = tensors.tensor(&format!("{format}.values")).unwrap();
            let [rows, cols] = *values.shape() else { panic!("{format}: shape {:?}", values.shape()) };
            let bytes = SharedBytes::from_vec(stored.data().to_vec());
            let (words, rest) = values.data().as_chunks::<4>();
            assert!(rest.is_empty());
            Golden {
                format,
                matrix: Matrix::new(format, rows, cols, bytes).unwrap(),
                bits: words.iter().map(|&word| u32::from_le_bytes(word)).collect(),
            }
        })
        .collect()
}

#[test]
fn every_value_has_the_bits_of_the_reference() {
    for golden in goldens() {
        assert_eq!(bits(&golden.matrix.to_f32()), golden.bits, "{}", golden.format);
        assert_eq!(golden.matrix.storage(), golden.format.name());
    }
}

#[test]
fn rows_decode_alone() {
    let file = std::fs::read(GOLDENS).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    for golden in goldens() {
        let (format, cols) = (golden.format, golden.matrix.cols());
        let stored = tensors.tensor(&format!("{format}.bytes")).unwrap();
        let mut values = vec![0.0; cols];
        for (r, row) in stored.data().chunks_exact(format.bytes_for(1, cols).unwrap()).enumerate() {
            format.decode_row(row, &mut values);
            assert_eq!(bits(&values), golden.bits(r..r + 1, 0..cols), "{format} row {r}");
        }
    }
}

#[test]
fn any_panel_is_that_part_of_the_whole() {
    let mut state = 1u64;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    for golden in goldens() {
        let (format, rows, cols) = (golden.format, golden.matrix.rows(), golden.matrix.cols());
        let block = format.block_len();
        let mut ranges = vec![(0..rows, 0..cols), (0..rows, block..2 * block), (1..2, 0..1), (0..2, cols - 1..cols)];
        ranges.push((0..rows, block - 1..block + 1));
        ranges.push((rows..rows, 0..cols));
        for _ in 0..300 {
            let (r, c) = (below(rows), below(cols));
            ranges.push((r..r + 1 + below(rows - r), c..c + below(cols - c + 1)));
        }
        for (r, c) in ranges {
            let got = panel(&golden.matrix, r.clone(), c.clone());
            assert_eq!(got, golden.bits(r.clone(), c.clone()), "{format} rows {r:?} columns {c:?}");
        }
    }
}

#[test]
fn a_row_map_moves_whole_rows() {
    for golden in goldens() {
        let (rows, cols) = (golden.matrix.rows(), golden.matrix.cols());
        let map: Arc<[u32]> = (0..rows as u32).rev().collect();
        let mapped = golden.matrix.clone().with_row_map(map).unwrap();
        for r in 0..rows {
            let stored = rows - 1 - r;
            assert_eq!(panel(&mapped, r..r + 1, 3..cols - 2), golden.bits(stored..stored + 1, 3..cols - 2));
        }
        assert_eq!(mapped.bytes_len(), golden.matrix.bytes_len());
    }
}
