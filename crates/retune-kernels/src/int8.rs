//! Weights and rows of activations in 8 bits, for products of integers.
//!
//! A frozen weight `W[n, k]` is kept as `r[n] · Q[n, k] · c[k]` with Q in [−127, 127] ([−63, 63] where products are of 7 bits), one copy for both directions. The forward quantizes
//! `c ⊙ x` by rows, and r scales the columns of the result; the input gradient quantizes `r ⊙ g` by rows, and c scales the columns.
//! r is what each row of W needs; c is free: taken from calibration it moves the range of outlier channels from the activations into the
//! weight (Xiao et al. 2022, SmoothQuant), at no cost at run time. What is too large for that, a few channels, is left out of the integers
//! in the forward and multiplied in f32 (Dettmers et al. 2022, LLM.int8()).
//!
//! A contraction is cut into runs of at most about [`RUN`] elements, each with a scale of its own for each row of activations: an outlier
//! spoils the resolution of its run alone, and sums of products stay far from the limits of 32 bits.

use std::ops::Range;
use std::sync::Arc;

use crate::isa::int8_isa;
use crate::multiversion;
use crate::panel::PanelSource;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};

/// Rows of a weight that lie together.
pub(crate) const PANEL: usize = 64;
/// Bytes of a panel's rows for four columns.
pub(crate) const GROUP: usize = 4 * PANEL;
/// About how many elements share a scale. The 576 inputs of a small model are one run: two cost 1 to 4% of a step.
const RUN: usize = 640;
/// Below this a row counts as zero: the inverse of its scale could overflow.
const SMALLEST: f32 = 1e-30;
/// 1.5 · 2²³: adding it rounds to an integer and leaves that integer in the low bits.
const ROUND: f32 = 12_582_912.0;

/// The runs of a contraction of `len` elements: equal but for the last, and starting at multiples of [`PANEL`].
pub(crate) fn runs(len: usize) -> impl Iterator<Item = Range<usize>> {
    let run = run_len(len);
    (0..len).step_by(run).map(move |start| start..(start + run).min(len))
}

fn run_len(len: usize) -> usize {
    len.div_ceil(len.div_ceil(RUN).max(1)).next_multiple_of(PANEL).max(PANEL)
}

/// Elements from one row of activations to the next: an odd number of cache lines, so that the rows of a tile do not fall into the same
/// few sets of the cache.
fn row_stride(cols: usize) -> usize {
    (cols.div_ceil(PANEL) | 1) * PANEL
}

fn run_count(len: usize) -> usize {
    len.div_ceil(run_len(len))
}

multiversion! {
    /// The largest magnitude. Compared as integers, whose order is that of positive floats and puts NaN above all of them.
    fn largest(x: &[f32]) -> f32 {
        let mut bits = 0u32;
        for v in x {
            bits = bits.max(v.to_bits() & 0x7fff_ffff);
        }
        f32::from_bits(bits)
    }
}

multiversion! {
    fn round_to(x: &[f32], inverse: f32, offset: u8, to: &mut [u8]) {
        for (to, v) in to.iter_mut().zip(x) {
            *to = (v * inverse + ROUND).to_bits().wrapping_add(u32::from(offset)) as u8;
        }
    }
}

multiversion! {
    /// Rounds up or down with the probability that makes the mean exact. What decides is a hash of the value itself: no state, no seed, and
    /// the same result wherever the value stands.
    fn dither_to(x: &[f32], inverse: f32, offset: u8, to: &mut [u8]) {
        let largest = f32::from(offset - 1);
        for (to, v) in to.iter_mut().zip(x) {
            let hash = v.to_bits().wrapping_mul(0x9E37_79B1);
            let hash = (hash ^ (hash >> 15)).wrapping_mul(0x85EB_CA77);
            // In [1, 2).
            let uniform = f32::from_bits(0x3f80_0000 | (hash >> 9));
            // The largest value lies on the edge of the range: it must not be pushed over it.
            let dithered = v * inverse + (uniform - 1.5);
            let inside = if dithered > largest { largest } else { dithered };
            *to = (inside + ROUND).to_bits().wrapping_add(u32::from(offset)) as u8;
        }
    }
}

multiversion! {
    fn multiply(x: &[f32], factors: &[f32], to: &mut [f32]) {
        for ((to, v), f) in to.iter_mut().zip(x).zip(factors) {
            *to = v * f;
        }
    }
}

/// How values become integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest.
    Nearest,
    /// Up or down at random, right in the mean. For sums over many values most of which are far below the scale, as the probabilities of
    /// a vocabulary: rounded to the nearest they would all vanish, in every row alike.
    Stochastic,
}

/// The scale of values of which `most` is the largest magnitude, and its inverse; NaN for values that are not finite, so that they are
/// noticed further on.
fn scale_of(most: f32) -> (f32, f32) {
    let largest = int8_isa().largest();
    match most {
        _ if !most.is_finite() => (f32::NAN, 0.0),
        _ if most < SMALLEST => (0.0, 0.0),
        _ => (most / largest, largest / most),
    }
}

/// A run of a row, or of that times `factors` in the buffer.
fn scaled<'b>(row: &'b [f32], run: Range<usize>, factors: Option<&[f32]>, buffer: &'b mut [f32]) -> &'b [f32] {
    let Some(factors) = factors else { return &row[run] };
    let buffer = &mut buffer[..run.len()];
    multiply(&row[run.clone()], &factors[run], buffer);
    buffer
}

/// Writes v / scale, rounded, plus the offset, and returns the scale.
fn quantize(x: &[f32], rounding: Rounding, to: &mut [u8]) -> f32 {
    let (scale, inverse) = scale_of(largest(x));
    let offset = int8_isa().offset();
    match rounding {
        Rounding::Nearest => round_to(x, inverse, offset, to),
        Rounding::Stochastic => dither_to(x, inverse, offset, to),
    }
    scale
}

/// Rows of activations or gradients `[T, k]`, quantized by row and run.
#[derive(Default)]
pub struct Int8Rows {
    /// [T, stride], with the offset.
    values: Vec<u8>,
    /// [T, runs]
    scales: Vec<f32>,
    /// The channels that are multiplied in f32, [T, outliers].
    outliers: Vec<f32>,
    rows: usize,
    cols: usize,
}

fn grow<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) {
    if buffer.len() < len {
        buffer.resize(len, value);
    }
}

impl Int8Rows {
    /// Quantizes the inputs `x: [T, cols]` of a weight, on all threads. The memory is reused by the next call.
    pub fn quantize_input(&mut self, x: &[f32], weight: &Int8Matrix) {
        let count = weight.outliers.len();
        grow(&mut self.outliers, x.len() / weight.cols * count, 0.0);
        let mut outliers = std::mem::take(&mut self.outliers);
        let shared = SharedMut::new(&mut outliers);
        let (cols, factors) = (weight.cols, weight.input_factors.as_deref());
        let begin = |row: usize| {
            let x = &x[row * cols..][..cols];
            // SAFETY: one piece, its rows.
            let to = unsafe { shared.slice(row * count, count) };
            to.iter_mut().zip(&weight.outliers).for_each(|(to, &channel)| *to = x[channel as usize]);
            x
        };
        self.quantize(x.len() / cols, cols, Rounding::Nearest, begin, |x, run, buffer| {
            (scaled(x, run, factors, buffer), 1.0)
        });
        self.outliers = outliers;
    }

    /// Quantizes the gradients of a weight's output: in each of `rows` rows, which begin `row` elements apart in `g`, the first elements.
    pub fn quantize_gradient(&mut self, g: &[f32], row: usize, rows: usize, weight: &Int8Matrix, rounding: Rounding) {
        let begin = |index: usize| &g[index * row..][..weight.rows];
        self.quantize_gradient_runs(rows, weight, rounding, begin, |g, run, _| (&g[run], 1.0));
    }

    /// The same of gradients that come into being here: `begin` looks at a row, `values` then gives its runs, in the buffer or from elsewhere,
    /// and what each is multiplied by.
    pub(crate) fn quantize_gradient_runs<S>(
        &mut self,
        rows: usize,
        weight: &Int8Matrix,
        rounding: Rounding,
        begin: impl Fn(usize) -> S + Sync,
        values: impl for<'b> Fn(&'b S, Range<usize>, &'b mut [f32]) -> (&'b [f32], f32) + Sync,
    ) {
        let factors = &weight.row_scales[..weight.rows];
        self.quantize(rows, weight.rows, rounding, begin, |row, run, buffer| {
            let (buffer, scaled) = buffer.split_at_mut(run.len());
            let (values, weight) = values(row, run.clone(), buffer);
            if weight != 0.0 {
                multiply(values, &factors[run.clone()], &mut scaled[..run.len()]);
            }
            (&scaled[..run.len()], weight)
        });
    }

    /// Quantizes `rows` rows of `cols` values, on all threads: `begin` looks at a row, `values` gives one run of it after the other, with a
    /// buffer of two runs at hand, and what it is multiplied by. A run stays in the first-level cache from where its values come into being until they are integers.
    fn quantize<S>(
        &mut self,
        rows: usize,
        cols: usize,
        rounding: Rounding,
        begin: impl Fn(usize) -> S + Sync,
        values: impl for<'b> Fn(&'b S, Range<usize>, &'b mut [f32]) -> (&'b [f32], f32) + Sync,
    ) {
        let (stride, runs) = (row_stride(cols), run_count(cols));
        (self.rows, self.cols) = (rows, cols);
        grow(&mut self.values, rows * stride, int8_isa().offset());
        grow(&mut self.scales, rows * runs, 0.0);
        let (integers, scales) = (SharedMut::new(&mut self.values), SharedMut::new(&mut self.scales));
        let chunk = parallel::chunk_rows(rows, 8);
        parallel::for_each(rows.div_ceil(chunk), |piece| {
            scratch::with(Purpose::Row, 2 * run_len(cols), |buffer| {
                for row in piece * chunk..((piece + 1) * chunk).min(rows) {
                    let state = begin(row);
                    // SAFETY: one piece, its rows.
                    let (to, scales) = unsafe { (integers.slice(row * stride, cols), scales.slice(row * runs, runs)) };
                    for (run, scale) in self::runs(cols).zip(scales) {
                        let (values, weight) = values(&state, run.clone(), buffer);
                        // What is left out has whatever integers were there before, times 0.
                        *scale = if weight == 0.0 { 0.0 } else { weight * quantize(values, rounding, &mut to[run]) };
                    }
                }
            });
        });
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of the contraction.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        row_stride(self.cols)
    }

    /// The outlier channels `[T, count]`.
    pub(crate) fn outliers(&self, count: usize) -> &[f32] {
        &self.outliers[..self.rows * count]
    }

    /// The rows from `row` on, from column `col` on.
    pub(crate) fn values(&self, row: usize, col: usize) -> &[u8] {
        &self.values[row * self.stride() + col..self.rows * self.stride()]
    }

    /// The scales of the rows from `row` on for a run, and elements from one to the next.
    pub(crate) fn scales(&self, row: usize, run: usize) -> (&[f32], usize) {
        let runs = run_count(self.cols);
        (&self.scales[row * runs + run..self.rows * runs], runs)
    }
}

/// Where the integers of a weight are. They lie in panels of [`PANEL`] rows; in each, for every four columns, the four values of one row
/// after the other. Rows and columns are filled up with zeros to whole panels.
enum Integers {
    /// All of them, in memory.
    Kept(Vec<i8>),
    /// Nowhere: every product makes those it packs from the weight, the same each time.
    Remade { weight: Arc<dyn PanelSource>, inverse_factors: Option<Vec<f32>> },
}

/// A frozen weight `[rows, cols]` in 8 bits.
pub struct Int8Matrix {
    rows: usize,
    cols: usize,
    values: Integers,
    /// r, filled up with zeros.
    row_scales: Vec<f32>,
    /// What a row is multiplied by to become integers, filled up with zeros.
    row_inverses: Vec<f32>,
    /// c, filled up with zeros.
    col_scales: Vec<f32>,
    /// What an input is multiplied by before it is quantized: c, and 0 for outliers. `None` for ones.
    input_factors: Option<Vec<f32>>,
    /// Columns that the forward multiplies in f32, and their values, [rows, outliers].
    outliers: Vec<u32>,
    outlier_weights: Vec<f32>,
    /// What the offset of the left operand adds to the sums of a row over a run of columns, negated: [runs, rows].
    row_offsets: Vec<i32>,
    /// The same of a column over a run of rows: [runs, cols].
    col_offsets: Vec<i32>,
}

impl Int8Matrix {
    /// Quantizes a weight, with the given factors of its columns, and some of these kept in f32 for the forward.
    pub fn new(weight: &dyn PanelSource, col_scales: Option<&[f32]>, outliers: &[u32]) -> Self {
        Self::in_memory(Vec::new(), weight, col_scales, outliers)
    }

    /// The same in the memory of another one: fresh memory costs more than quantizing.
    pub fn in_memory(
        mut values: Vec<i8>,
        weight: &dyn PanelSource,
        col_scales: Option<&[f32]>,
        outliers: &[u32],
    ) -> Self {
        let (rows, cols) = (weight.rows(), weight.cols());
        let (padded_rows, padded_cols) = (rows.next_multiple_of(PANEL), cols.next_multiple_of(PANEL));
        // All of it is overwritten.
        values.resize(padded_rows * padded_cols, 0);
        let (mut row_scales, mut row_inverses) = (vec![0.0; padded_rows], vec![0.0; padded_rows]);
        let mut row_offsets = vec![0; run_count(cols) * padded_rows];
        let mut padded_scales = vec![0.0; padded_cols];
        match col_scales {
            Some(scales) => padded_scales[..cols].copy_from_slice(scales),
            None => padded_scales[..cols].fill(1.0),
        }
        let inverse: Option<Vec<f32>> = col_scales.map(|scales| scales.iter().map(|c| 1.0 / c).collect());
        let mut outlier_weights = vec![0.0; rows * outliers.len()];
        // What the integers of a column add up to in each panel.
        let mut panel_sums = vec![0; padded_rows / PANEL * padded_cols];
        {
            let (values, sums) = (SharedMut::new(&mut values), SharedMut::new(&mut panel_sums));
            let (scales, offsets) = (SharedMut::new(&mut row_scales), SharedMut::new(&mut row_offsets));
            let inverses = SharedMut::new(&mut row_inverses);
            let split_off = SharedMut::new(&mut outlier_weights);
            parallel::for_each(padded_rows / PANEL, |panel| {
                let within = panel * PANEL..((panel + 1) * PANEL).min(rows);
                // SAFETY: one piece, one panel.
                let (values, sums) = unsafe {
                    (
                        values.slice(within.start * padded_cols, PANEL * padded_cols),
                        sums.slice(panel * padded_cols, padded_cols),
                    )
                };
                // Rows are quantized as they lie, and turned into groups when all are there.
                let stride = row_stride(cols);
                scratch::with_bytes(Purpose::PackedB, PANEL * stride, |integers| {
                    for (row, integers) in (within.start..).zip(integers.chunks_exact_mut(stride)) {
                        let integers = &mut integers[..padded_cols];
                        if row >= within.end {
                            integers.fill(0);
                            continue;
                        }
                        // SAFETY: one piece, the rows of its panel.
                        let (scale, row_inverse, split_off) = unsafe {
                            let split_off = split_off.slice(row * outliers.len(), outliers.len());
                            (scales.slice(row, 1), inverses.slice(row, 1), split_off)
                        };
                        (scale[0], row_inverse[0]) =
                            quantize_row(weight, row, inverse.as_deref(), integers, |decoded| {
                                let channels = split_off.iter_mut().zip(outliers);
                                channels.for_each(|(to, &channel)| *to = decoded[channel as usize]);
                            });
                        for (i, run) in runs(cols).enumerate() {
                            // SAFETY: as above.
                            unsafe { offsets.slice(i * padded_rows + row, 1)[0] = offset_of(sum(&integers[run])) };
                        }
                        add_to(sums, integers);
                    }
                    for (columns, to) in values.chunks_exact_mut(PANEL / 4 * GROUP).enumerate() {
                        to_groups(&integers[columns * PANEL..], stride, to);
                    }
                });
            });
        }
        let mut col_offsets = vec![0; run_count(rows) * padded_cols];
        for (run, offsets) in runs(rows).zip(col_offsets.chunks_exact_mut(padded_cols)) {
            for panel in run.start / PANEL..run.end.div_ceil(PANEL) {
                let sums = &panel_sums[panel * padded_cols..(panel + 1) * padded_cols];
                offsets.iter_mut().zip(sums).for_each(|(offset, &sum)| *offset += offset_of(sum));
            }
        }
        let input_factors = (col_scales.is_some() || !outliers.is_empty()).then(|| {
            let mut factors = padded_scales[..cols].to_vec();
            outliers.iter().for_each(|&channel| factors[channel as usize] = 0.0);
            factors
        });
        let (outliers, col_scales) = (outliers.to_vec(), padded_scales);
        Self {
            rows,
            cols,
            values: Integers::Kept(values),
            row_scales,
            row_inverses,
            col_scales,
            input_factors,
            outliers,
            outlier_weights,
            row_offsets,
            col_offsets,
        }
    }

    /// Its memory, for another one.
    pub fn into_memory(self) -> Vec<i8> {
        match self.values {
            Integers::Kept(values) => values,
            Integers::Remade { .. } => Vec::new(),
        }
    }

    /// The same weight without its integers, which every product then makes again from `weight`, what this one was made of: as much less
    /// memory, for the time of decoding the weight once a product. And the memory they had, for another one.
    ///
    /// # Panics
    /// When `weight` has another shape.
    pub fn remade(mut self, weight: Arc<dyn PanelSource>) -> (Self, Vec<i8>) {
        assert_eq!((weight.rows(), weight.cols()), (self.rows, self.cols), "another weight");
        let has_factors = self.col_scales[..self.cols].iter().any(|&c| c != 1.0);
        let inverse_factors = has_factors.then(|| self.col_scales[..self.cols].iter().map(|c| 1.0 / c).collect());
        match std::mem::replace(&mut self.values, Integers::Remade { weight, inverse_factors }) {
            Integers::Kept(values) => (self, values),
            Integers::Remade { .. } => (self, Vec::new()),
        }
    }

    /// Number of rows (output features).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (input features).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that a weight of this shape takes, with this many columns in f32: those of its integers, and all others.
    pub fn planned_bytes(rows: usize, cols: usize, outliers: usize) -> (usize, usize) {
        let (padded_rows, padded_cols) = (rows.next_multiple_of(PANEL), cols.next_multiple_of(PANEL));
        let scales = padded_rows * (2 + run_count(cols)) + padded_cols * (3 + run_count(rows));
        (padded_rows * padded_cols, 4 * (scales + rows * outliers))
    }

    /// How many columns are multiplied in f32 in the forward, and their values `[rows, count]`.
    pub(crate) fn outliers(&self) -> (usize, &[f32]) {
        (self.outliers.len(), &self.outlier_weights)
    }

    /// How many columns are multiplied in f32 in the forward.
    pub fn outlier_count(&self) -> usize {
        self.outliers.len()
    }

    /// The weight that the quantized values stand for, `[rows, cols]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        let width = self.padded_cols();
        let mut panel = vec![0; PANEL * width];
        for (first, rows) in (0..).step_by(PANEL).zip(values.chunks_mut(PANEL * self.cols)) {
            self.integers(first, 0..width, &mut panel);
            for ((row, to), r) in rows.chunks_exact_mut(self.cols).enumerate().zip(&self.row_scales[first..]) {
                for ((col, to), c) in to.iter_mut().enumerate().zip(&self.col_scales) {
                    *to = r * f32::from(panel[col / 4 * GROUP + row * 4 + col % 4]) * c;
                }
            }
        }
        values
    }

    fn padded_cols(&self) -> usize {
        self.cols.next_multiple_of(PANEL)
    }

    /// The right operand of `x·Wᵀ` for the panel of rows that holds `row`, from column `col` on, where it lies ready: groups of [`GROUP`]
    /// bytes. `None` where it has to be made, by [`Self::integers`].
    pub(crate) fn kept_rows(&self, row: usize, col: usize) -> Option<&[i8]> {
        let Integers::Kept(values) = &self.values else { return None };
        let panel = PANEL * self.padded_cols();
        let start = row / PANEL * panel;
        Some(&values[start + col / 4 * GROUP..start + panel])
    }

    /// Whether all integers are in memory.
    pub fn is_kept(&self) -> bool {
        matches!(self.values, Integers::Kept(_))
    }

    /// Writes the integers of the panel of rows that starts at `row`, columns `cols`, which start at a panel and are filled up to whole ones:
    /// groups of [`GROUP`] bytes, the right operand of `x·Wᵀ`.
    pub(crate) fn integers(&self, row: usize, cols: Range<usize>, to: &mut [i8]) {
        let Integers::Remade { weight, inverse_factors } = &self.values else {
            if let Some(kept) = self.kept_rows(row, cols.start) {
                to.copy_from_slice(&kept[..to.len()]);
            }
            return;
        };
        let cols = cols.start..cols.end.min(self.cols);
        let inverse = inverse_factors.as_ref().map(|factors| &factors[cols.clone()]);
        let stride = row_stride(cols.len());
        scratch::with_bytes(Purpose::Row, PANEL * stride, |integers| {
            scratch::with(Purpose::Panel, 2 * cols.len(), |memory| {
                let (decoded, scaled) = memory.split_at_mut(cols.len());
                for (row, integers) in (row..row + PANEL).zip(integers.chunks_exact_mut(stride)) {
                    let (values, padding) = integers.split_at_mut(cols.len());
                    padding.fill(0);
                    if row >= self.rows {
                        values.fill(0);
                        continue;
                    }
                    weight.panel_f32(row..row + 1, cols.clone(), decoded);
                    round_signed(divided(decoded, inverse, scaled), self.row_inverses[row], values);
                }
            });
            for (columns, to) in to.chunks_exact_mut(PANEL / 4 * GROUP).enumerate() {
                to_groups(&integers[columns * PANEL..], stride, to);
            }
        });
    }

    /// The factors of the result's columns from `row` on, and what a sum over the run starts with, for `x·Wᵀ`.
    pub(crate) fn rows_epilogue(&self, row: usize, run: usize) -> (&[f32], &[i32]) {
        (&self.row_scales[row..], &self.row_offsets[run * self.row_scales.len() + row..])
    }

    /// The same for `g·W`, columns in the place of rows.
    pub(crate) fn cols_epilogue(&self, col: usize, run: usize) -> (&[f32], &[i32]) {
        (&self.col_scales[col..], &self.col_offsets[run * self.padded_cols() + col..])
    }

    /// Writes the right operand of `g·W` for the rows `rows` and the panels of the columns `cols`, both starting at a panel: for each panel of
    /// columns `panel` bytes, in which for every four rows come the four values of one column after the other, filled up to whole panels.
    pub(crate) fn cols_panels(&self, rows: Range<usize>, cols: Range<usize>, panel: usize, to: &mut [i8]) {
        const BLOCK: usize = PANEL / 4 * GROUP;
        for (place, row) in rows.step_by(PANEL).enumerate() {
            let mut turn = |integers: &[i8]| {
                for (from, to) in integers.chunks_exact(BLOCK).zip(to.chunks_exact_mut(panel)) {
                    transpose(from, &mut to[place * BLOCK..][..BLOCK]);
                }
            };
            let len = cols.len().next_multiple_of(PANEL) / 4 * GROUP;
            match self.kept_rows(row, cols.start) {
                Some(kept) => turn(&kept[..len]),
                None => scratch::with_bytes(Purpose::Integers, len, |made| {
                    self.integers(row, cols.clone(), made);
                    turn(made);
                }),
            }
        }
    }
}

/// The largest magnitude in each column of a matrix.
pub fn column_maxima(matrix: &dyn PanelSource) -> Vec<f32> {
    /// A multiple of every storage's blocks.
    const COLUMNS: usize = 256;
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut maxima = vec![0.0; cols];
    let shared = SharedMut::new(&mut maxima);
    parallel::for_each(cols.div_ceil(COLUMNS), |piece| {
        let columns = piece * COLUMNS..((piece + 1) * COLUMNS).min(cols);
        let width = columns.len();
        // SAFETY: pieces are disjoint.
        let maxima = unsafe { shared.slice(columns.start, width) };
        for first in (0..rows).step_by(PANEL) {
            let last = (first + PANEL).min(rows);
            scratch::with(Purpose::Panel, (last - first) * width, |decoded| {
                matrix.panel_f32(first..last, columns.clone(), decoded);
                decoded.chunks_exact(width).for_each(|row| raise(maxima, row));
            });
        }
    });
    maxima
}

multiversion! {
    fn raise(maxima: &mut [f32], row: &[f32]) {
        for (most, v) in maxima.iter_mut().zip(row) {
            *most = if v.abs() > *most { v.abs() } else { *most };
        }
    }
}

/// A row of a weight times the inverse of its columns' factors, in the buffer where there are any.
fn divided<'b>(row: &'b [f32], inverse: Option<&[f32]>, buffer: &'b mut [f32]) -> &'b [f32] {
    let Some(inverse) = inverse else { return row };
    multiply(row, inverse, buffer);
    buffer
}

/// Quantizes one row of a weight into integers, filled up with zeros, and shows its values to `also`; returns its scale and the inverse.
fn quantize_row(
    weight: &dyn PanelSource,
    row: usize,
    inverse: Option<&[f32]>,
    integers: &mut [i8],
    also: impl FnOnce(&[f32]),
) -> (f32, f32) {
    let cols = weight.cols();
    scratch::with(Purpose::Panel, 2 * cols, |memory| {
        let (decoded, scaled) = memory.split_at_mut(cols);
        weight.panel_f32(row..row + 1, 0..cols, decoded);
        also(decoded);
        let values = divided(decoded, inverse, scaled);
        // The scale is the whole row's: both directions use it.
        let (scale, inverse) = scale_of(largest(values));
        let (to, padding) = integers.split_at_mut(cols);
        round_signed(values, inverse, to);
        padding.fill(0);
        (scale, inverse)
    })
}

/// What the offset of the left operand adds to a sum of products with integers that add up to `sum`, negated.
fn offset_of(sum: i32) -> i32 {
    -i32::from(int8_isa().offset()) * sum
}

multiversion! {
    fn round_signed(x: &[f32], inverse: f32, to: &mut [i8]) {
        for (to, v) in to.iter_mut().zip(x) {
            *to = (v * inverse + ROUND).to_bits() as i8;
        }
    }
}

multiversion! {
    fn sum(values: &[i8]) -> i32 {
        values.iter().map(|&v| i32::from(v)).sum()
    }
}

multiversion! {
    fn add_to(sums: &mut [i32], values: &[i8]) {
        for (sum, &v) in sums.iter_mut().zip(values) {
            *sum += i32::from(v);
        }
    }
}

/// Turns 64 columns of [64 rows][`stride` columns] into [16 groups of four columns][64 rows][4 columns].
fn to_groups(rows: &[i8], stride: usize, to: &mut [i8]) {
    let (from, to) = (rows.as_chunks::<4>().0, to.as_chunks_mut::<4>().0);
    for (group, to) in to.chunks_exact_mut(PANEL).enumerate() {
        for (row, to) in to.iter_mut().enumerate() {
            *to = from[row * (stride / 4) + group];
        }
    }
}

/// Turns [16 groups of four columns][64 rows][4 columns] into [16 groups of four rows][64 columns][4 rows].
fn transpose(from: &[i8], to: &mut [i8]) {
    let (Some(from), Some(to)) = (from.first_chunk::<4096>(), to.first_chunk_mut::<4096>()) else { return };
    #[cfg(target_arch = "x86_64")]
    if crate::isa::isa() != crate::isa::Isa::Portable {
        // SAFETY: the machine has AVX2.
        return unsafe { x86::transpose(from, to) };
    }
    for (cols, group) in from.as_chunks::<GROUP>().0.iter().enumerate() {
        for (row, four) in group.as_chunks::<4>().0.iter().enumerate() {
            for (col, &v) in four.iter().enumerate() {
                to[row / 4 * GROUP + (4 * cols + col) * 4 + row % 4] = v;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::GROUP;
    use std::arch::x86_64::*;

    /// Blocks of 4 × 4 bytes are transposed inside a vector and change places as a whole.
    #[target_feature(enable = "avx2")]
    pub fn transpose(from: &[i8; 4096], to: &mut [i8; 4096]) {
        let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for cols in 0..16 {
            for rows in 0..16 {
                // SAFETY: 16 × 16 blocks of 16 bytes fill both arrays.
                unsafe {
                    let block = _mm_loadu_si128(from.as_ptr().add(cols * GROUP + rows * 16).cast());
                    let block = _mm_shuffle_epi8(block, order);
                    _mm_storeu_si128(to.as_mut_ptr().add(rows * GROUP + cols * 16).cast(), block);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::{Out, Term, gemm};
    use crate::panel::F32Panel;
    use crate::testing::{random, relative_error};

    /// The exact product of what the two quantized operands stand for, from their integers.
    fn reference(rows: &Int8Rows, weight: &Int8Matrix, transposed: bool) -> Vec<f64> {
        let (n, k) = if transposed { (weight.rows, weight.cols) } else { (weight.cols, weight.rows) };
        let Integers::Kept(values) = &weight.values else { panic!("no integers") };
        let mut y = Vec::new();
        for t in 0..rows.rows {
            for j in 0..n {
                let mut sum = 0.0;
                for (r, run) in runs(k).enumerate() {
                    let dot: i64 = run
                        .map(|p| {
                            let (row, col) = if transposed { (j, p) } else { (p, j) };
                            let at = row / PANEL * PANEL * weight.padded_cols()
                                + col / 4 * GROUP
                                + row % PANEL * 4
                                + col % 4;
                            (i64::from(rows.values(t, p)[0]) - i64::from(int8_isa().offset())) * i64::from(values[at])
                        })
                        .sum();
                    sum += f64::from(rows.scales(t, r).0[0]) * dot as f64;
                }
                let scale = if transposed { weight.row_scales[j] } else { weight.col_scales[j] };
                y.push(sum * f64::from(scale));
            }
        }
        y
    }

    const SHAPES: [(usize, usize, usize); 9] = [
        (1, 1, 1),
        (5, 3, 2),
        (6, 64, 64),
        (7, 65, 17),
        (13, 16, 576),
        (100, 130, 33),
        (3, 300, 1030),
        (25, 1100, 2050),
        (257, 192, 96),
    ];

    #[test]
    fn products_equal_those_of_the_integers_in_both_directions() {
        for (m, n, k) in SHAPES {
            let w = random(2, n * k);
            let factors: Vec<f32> = random(3, k).iter().map(|v| 1.5 + v).collect();
            let weight = Int8Matrix::new(&F32Panel::new(&w, k), Some(&factors), &[]);
            let mut rows = Int8Rows::default();
            for (transposed, out, depth) in [(true, n, k), (false, k, n)] {
                let x = random(1, m * depth);
                let addend = random(4, m * out);
                if transposed {
                    rows.quantize_input(&x, &weight);
                } else {
                    rows.quantize_gradient(&x, n, m, &weight, Rounding::Nearest);
                }
                let term = if transposed { Term::int8(&rows, &weight) } else { Term::int8_plain(&rows, &weight) };
                let mut y = vec![f32::NAN; m * out];
                gemm(m, out, &[term], Out::set(&mut y, out));
                let expected = reference(&rows, &weight, transposed);
                let error = relative_error(&y, &expected);
                assert!(error < 1e-6, "{m} {n} {k} transposed {transposed}: {error}");
                gemm(m, out, &[term], Out::sum(&mut y, out, &addend));
                let expected: Vec<f64> = expected.iter().zip(&addend).map(|(e, a)| e + f64::from(*a)).collect();
                assert!(relative_error(&y, &expected) < 1e-6, "{m} {n} {k} transposed {transposed}, with an addend");
            }
        }
    }

    #[test]
    fn integers_that_are_made_again_give_the_same_products() {
        for (m, n, k) in SHAPES {
            let w: Arc<[f32]> = random(2, n * k).into();
            /// An own copy of the values, as the panels of a model are.
            struct Owned(Arc<[f32]>, usize);
            impl PanelSource for Owned {
                fn rows(&self) -> usize {
                    self.0.len() / self.1
                }
                fn cols(&self) -> usize {
                    self.1
                }
                fn panel_f32(&self, rows: Range<usize>, cols: Range<usize>, dst: &mut [f32]) {
                    F32Panel::new(&self.0, self.1).panel_f32(rows, cols, dst);
                }
            }
            let factors: Vec<f32> = random(3, k).iter().map(|v| 1.5 + v).collect();
            for (factors, outliers) in [(None, &[][..]), (Some(&factors[..]), &[0][..])] {
                let kept = Int8Matrix::new(&F32Panel::new(&w, k), factors, outliers);
                let again = Int8Matrix::new(&F32Panel::new(&w, k), factors, outliers);
                let (remade, memory) = again.remade(Arc::new(Owned(Arc::clone(&w), k)));
                assert!(kept.is_kept() && !remade.is_kept() && !memory.is_empty());
                assert_eq!(kept.to_f32(), remade.to_f32());
                for (transposed, out, depth) in [(true, n, k), (false, k, n)] {
                    let x = random(1, m * depth);
                    let product = |weight: &Int8Matrix| {
                        let mut rows = Int8Rows::default();
                        let mut y = vec![f32::NAN; m * out];
                        if transposed {
                            rows.quantize_input(&x, weight);
                            gemm(m, out, &[Term::int8(&rows, weight)], Out::set(&mut y, out));
                        } else {
                            rows.quantize_gradient(&x, n, m, weight, Rounding::Nearest);
                            gemm(m, out, &[Term::int8_plain(&rows, weight)], Out::set(&mut y, out));
                        }
                        y
                    };
                    assert!(product(&kept) == product(&remade), "{m} {n} {k} transposed {transposed}");
                }
            }
        }
    }

    #[test]
    fn gradients_may_be_columns_of_wider_rows() {
        let (m, n, k, row, first) = (13, 70, 40, 131, 9);
        let (w, wide) = (random(2, n * k), random(1, m * row));
        let weight = Int8Matrix::new(&F32Panel::new(&w, k), None, &[]);
        // The last row ends with the columns in question.
        let columns = &wide[first..(m - 1) * row + first + n];
        let dense: Vec<f32> = (0..m).flat_map(|t| columns[t * row..t * row + n].to_vec()).collect();
        for rounding in [Rounding::Nearest, Rounding::Stochastic] {
            let [mut y, mut expected] = [vec![0.0; m * k], vec![0.0; m * k]];
            for (g, apart, y) in [(columns, row, &mut y), (&dense[..], n, &mut expected)] {
                let mut rows = Int8Rows::default();
                rows.quantize_gradient(g, apart, m, &weight, rounding);
                assert_eq!((rows.rows(), rows.cols()), (m, n));
                gemm(m, k, &[Term::int8_plain(&rows, &weight)], Out::set(y, k));
            }
            assert!(y == expected);
        }
    }

    #[test]
    fn quantized_products_are_close_to_those_of_the_values() {
        let (m, n, k) = (40, 130, 600);
        let (x, w) = (random(1, m * k), random(2, n * k));
        let weight = Int8Matrix::new(&F32Panel::new(&w, k), None, &[]);
        // The step is as much larger as the range has fewer integers.
        let step = f64::from(127.0 / int8_isa().largest());
        assert!(relative_error(&weight.to_f32(), &crate::testing::to_f64(&w)) < 6e-3 * step);
        let mut rows = Int8Rows::default();
        rows.quantize_input(&x, &weight);
        let mut y = vec![0.0; m * n];
        gemm(m, n, &[Term::int8(&rows, &weight)], Out::set(&mut y, n));
        let mut expected = Vec::new();
        for row in x.chunks(k) {
            expected.extend(w.chunks(k).map(|w| row.iter().zip(w).map(|(a, b)| f64::from(a * b)).sum::<f64>()));
        }
        assert!(relative_error(&y, &expected) < 1e-2 * step);
    }

    #[test]
    fn stochastic_rounding_is_right_in_the_mean() {
        // One value near 1 sets the scale; the others are far below half of it.
        let k = RUN;
        let mut x: Vec<f32> = random(1, 40 * k).iter().map(|v| v.abs() * 2e-3).collect();
        x.chunks_mut(k).for_each(|row| row[5] = 0.9);
        let sum = |rounding| {
            let mut rows = Int8Rows::default();
            rows.quantize(x.len() / k, k, rounding, |row| &x[row * k..][..k], |x, run, _| (&x[run], 1.0));
            let row = |t: usize| {
                rows.values(t, 0)[..k].iter().map(|&v| f64::from(v) - f64::from(int8_isa().offset())).sum::<f64>()
            };
            (0..40).map(|t| f64::from(rows.scales(t, 0).0[0]) * row(t)).sum::<f64>()
        };
        let exact: f64 = x.iter().map(|&v| f64::from(v)).sum();
        assert!((sum(Rounding::Stochastic) - exact).abs() < 0.02 * exact, "{} for {exact}", sum(Rounding::Stochastic));
        assert!(sum(Rounding::Nearest) < 0.7 * exact, "the test needs values that round to 0");
    }

    #[test]
    fn the_largest_value_is_never_rounded_over_the_edge_of_the_range() {
        // Each is the largest of its run, and its hash decides which way it is pushed: some are pushed up by all but half a unit.
        let mut to = [0];
        for i in 0..2_000_000u32 {
            let x = [f32::from_bits(0x3c00_0000 + 0x95 * i % 0x80_0000)];
            quantize(&x, Rounding::Stochastic, &mut to);
            assert!(to[0] >= int8_isa().offset() + (int8_isa().offset() - 2), "{x:?}: {}", to[0]);
        }
    }

    #[test]
    fn column_maxima_are_those_of_the_magnitudes() {
        let (rows, cols) = (70, 300);
        let w = random(1, rows * cols);
        let expected: Vec<f32> =
            (0..cols).map(|c| (0..rows).map(|r| w[r * cols + c].abs()).fold(0.0, f32::max)).collect();
        assert_eq!(column_maxima(&F32Panel::new(&w, cols)), expected);
    }

    #[test]
    fn an_outlier_channel_is_moved_into_the_weight_or_split_off() {
        let (m, n, k) = (40, 64, 256);
        let (mut x, w) = (random(1, m * k), random(2, n * k));
        x.chunks_mut(k).for_each(|row| row[7] *= 60.0);
        let expected: Vec<f64> = x
            .chunks(k)
            .flat_map(|row| w.chunks(k).map(|w| row.iter().zip(w).map(|(a, b)| f64::from(a * b)).sum::<f64>()))
            .collect();
        // The inverse of what SmoothQuant multiplies the weight by.
        let mut factors = vec![1.0; k];
        factors[7] = 1.0 / 15.0;
        let error = |factors: Option<&[f32]>, outliers: &[u32]| {
            let weight = Int8Matrix::new(&F32Panel::new(&w, k), factors, outliers);
            let mut rows = Int8Rows::default();
            rows.quantize_input(&x, &weight);
            let mut y = vec![0.0; m * n];
            gemm(m, n, &[Term::int8(&rows, &weight)], Out::set(&mut y, n));
            relative_error(&y, &expected)
        };
        let (plain, smoothed) = (error(None, &[]), error(Some(&factors), &[]));
        assert!(smoothed < 0.5 * plain, "{smoothed} against {plain}");
        // With the channel in f32 nothing of it is left: the error is that of rows without an outlier.
        let split = error(None, &[7]);
        assert!(
            split < 0.5 * plain && split < 0.011 * f64::from(127.0 / int8_isa().largest()),
            "{split} against {plain}"
        );
    }

    #[test]
    fn values_that_are_not_finite_reach_the_result_and_zeros_stay_zero() {
        let (n, k) = (70, 40);
        let w = random(2, n * k);
        let weight = Int8Matrix::new(&F32Panel::new(&w, k), None, &[]);
        let mut x = random(1, 3 * k);
        x[3] = f32::NAN;
        x[k..2 * k].fill(0.0);
        x[2 * k + 5] = f32::INFINITY;
        let mut rows = Int8Rows::default();
        rows.quantize_input(&x, &weight);
        let mut y = vec![1.0; 3 * n];
        gemm(3, n, &[Term::int8(&rows, &weight)], Out::set(&mut y, n));
        assert!(y[..n].iter().chain(&y[2 * n..]).all(|v| v.is_nan()));
        assert!(y[n..2 * n].iter().all(|&v| v == 0.0));
    }
}
