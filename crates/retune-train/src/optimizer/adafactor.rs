//! Adafactor (Shazeer and Stern 2018) without a first moment, as transformers' `Adafactor` computes it with `relative_step` and
//! `scale_parameter` off: of a matrix's squared gradients it keeps the means of rows and of columns (their section 3), a decay that grows
//! with the steps (7.2), and updates whose root mean square is at most 1 (6).

use retune_engine::params::{Param, ParamLayout};
use retune_formats::safetensors::Values;
use retune_kernels::parallel::{self, SharedMut};

use super::{StateMut, Step};

/// What is added to squares.
const EPSILON: f32 = 1e-30;
/// How the decay grows: `1 − step^(−0.8)`.
const DECAY: f64 = -0.8;
/// Most root mean square of an update.
const CLIP: f64 = 1.0;
/// Rows of a matrix that are worked on at a time.
const ROWS: usize = 16;
/// Elements that are changed at a time.
const PIECE: usize = 1 << 15;

/// The running means of squared gradients: of matrices those of rows and of columns, of vectors all, tensor after tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Adafactor {
    rows: Vec<f32>,
    columns: Vec<f32>,
    squares: Vec<f32>,
}

/// Rows and columns of a tensor, as it lies in the flat vector; nothing for a vector.
fn matrix(param: &Param) -> Option<[usize; 2]> {
    match param.shape[..] {
        [rows, columns] if param.transposed => Some([columns, rows]),
        [rows, columns] => Some([rows, columns]),
        _ => None,
    }
}

/// Bytes of what is kept of a tensor.
pub(super) fn state_bytes(param: &Param) -> usize {
    4 * matrix(param).map_or(param.range.len(), |[rows, columns]| rows + columns)
}

impl Adafactor {
    /// Means of zero.
    pub fn new(layout: &ParamLayout) -> Self {
        let shapes = || layout.params().iter().filter_map(matrix);
        let vectors = layout.params().iter().filter(|param| matrix(param).is_none());
        Self {
            rows: vec![0.0; shapes().map(|[rows, _]| rows).sum()],
            columns: vec![0.0; shapes().map(|[_, columns]| columns).sum()],
            squares: vec![0.0; vectors.map(|param| param.range.len()).sum()],
        }
    }

    pub fn step(&mut self, layout: &ParamLayout, step: Step, gradients: &mut [f32], parameters: &mut [f32]) {
        let beta = 1.0 - (step.number as f64).powf(DECAY);
        let (keep, gain) = (beta as f32, (1.0 - beta) as f32);
        let [mut row, mut column, mut square] = [0; 3];
        for param in layout.params() {
            let (g, p) = (&mut gradients[param.range.clone()], &mut parameters[param.range.clone()]);
            let learning_rate = step.learning_rate * param.rate;
            let decay = if param.decay { (learning_rate * step.options.weight_decay) as f32 } else { 0.0 };
            let change = match matrix(param) {
                Some([rows, columns]) => {
                    let of_rows = &mut self.rows[row..row + rows];
                    let of_columns = &mut self.columns[column..column + columns];
                    (row, column) = (row + rows, column + columns);
                    running_means(g, step.scale, of_rows, of_columns, [keep, gain]);
                    divide_by_means(g, step.scale, of_rows, of_columns)
                }
                None => {
                    let squares = &mut self.squares[square..square + g.len()];
                    square += g.len();
                    for (g, mean) in g.iter_mut().zip(&mut *squares) {
                        *g *= step.scale;
                        *mean = keep * *mean + gain * (*g * *g + EPSILON);
                        *g /= mean.sqrt();
                    }
                    g.iter().map(|g| f64::from(*g) * f64::from(*g)).sum()
                }
            };
            let size = (change / g.len().max(1) as f64).sqrt();
            let rate = (learning_rate / (size / CLIP).max(1.0)) as f32;
            let (g, p, len) = (SharedMut::new(g), SharedMut::new(p), param.range.len());
            parallel::for_each(len.div_ceil(PIECE), |piece| {
                let (start, n) = (piece * PIECE, PIECE.min(len - piece * PIECE));
                // SAFETY: pieces are disjoint.
                let (g, p) = unsafe { (g.slice(start, n), p.slice(start, n)) };
                for (p, g) in p.iter_mut().zip(g) {
                    *p -= decay * *p;
                    *p -= rate * *g;
                    *g = 0.0;
                }
            });
        }
    }

    pub fn state(&self) -> Vec<(&'static str, Values<'_>)> {
        let Self { rows, columns, squares } = self;
        vec![("rows", Values::F32(rows)), ("columns", Values::F32(columns)), ("squares", Values::F32(squares))]
    }

    pub fn state_mut(&mut self) -> Vec<(&'static str, StateMut<'_>)> {
        let Self { rows, columns, squares } = self;
        vec![("rows", StateMut::F32(rows)), ("columns", StateMut::F32(columns)), ("squares", StateMut::F32(squares))]
    }
}

/// Takes a matrix's squared gradients into the means of its rows and columns. Sums over columns are made of those of fixed runs of rows, in
/// order, so that they do not depend on the number of threads.
fn running_means(g: &[f32], scale: f32, rows: &mut [f32], columns: &mut [f32], [keep, gain]: [f32; 2]) {
    let (n, m) = (rows.len(), columns.len());
    let mut sums = vec![0.0; n.div_ceil(ROWS) * m];
    {
        let (rows, sums) = (SharedMut::new(rows), SharedMut::new(&mut sums));
        parallel::for_each(n.div_ceil(ROWS), |piece| {
            let first = piece * ROWS;
            let count = ROWS.min(n - first);
            // SAFETY: each piece has its own rows and sums.
            let (rows, sums) = unsafe { (rows.slice(first, count), sums.slice(piece * m, m)) };
            for (row, g) in rows.iter_mut().zip(g[first * m..].chunks_exact(m)) {
                let mut total = 0.0f64;
                for (sum, g) in sums.iter_mut().zip(g) {
                    let square = scale * g * (scale * g) + EPSILON;
                    *sum += square;
                    total += f64::from(square);
                }
                *row = keep * *row + gain * (total / m as f64) as f32;
            }
        });
    }
    for (c, column) in columns.iter_mut().enumerate() {
        let total: f64 = sums.iter().skip(c).step_by(m).map(|sum| f64::from(*sum)).sum();
        *column = keep * *column + gain * (total / n as f64) as f32;
    }
}

/// Turns a matrix's gradients into its update before it is clipped, `g / √(r·c / mean r)`; returns the sum of its squares.
fn divide_by_means(g: &mut [f32], scale: f32, rows: &[f32], columns: &[f32]) -> f64 {
    let (n, m) = (rows.len(), columns.len());
    let mean = rows.iter().map(|row| f64::from(*row)).sum::<f64>() / n as f64;
    let of_columns: Vec<f32> = columns.iter().map(|column| 1.0 / column.sqrt()).collect();
    let mut squares = vec![0.0; n];
    {
        let (g, squares) = (SharedMut::new(g), SharedMut::new(&mut squares));
        parallel::for_each(n, |row| {
            let of_row = scale / (f64::from(rows[row]) / mean).sqrt() as f32;
            // SAFETY: each piece has its own row.
            let (g, square) = unsafe { (g.slice(row * m, m), &mut squares.slice(row, 1)[0]) };
            for (g, of_column) in g.iter_mut().zip(&of_columns) {
                *g *= of_row * of_column;
                *square += f64::from(*g) * f64::from(*g);
            }
        });
    }
    squares.iter().sum()
}
