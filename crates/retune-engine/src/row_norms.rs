//! Norms of the rows of changed weights, `‖W + Σ s·B·A‖`, that output scales stand over, and of the columns of changed tables.
//!
//! They depend on parameters and not on tokens, so that they are computed once a step, not once a pass. With D = Σ s·B·A a row's square is
//! `‖W‖² + D·(2·W + D)ᵀ`: of a frozen weight the first term is always the same, and the others follow from one product of the A's with the
//! weight, about as many tokens of a forward as the terms have ranks. With a D of zeros the norm is that of W to the last bit.

use std::ops::Range;

use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::{F32Panel, PanelSource, row_squares};
use retune_quant::Matrix;

use crate::model::{LinearId, Model};
use crate::overlay::{Change, OutputScale, Overlay, TableTerm};
use crate::profile::{Operation, span};

/// The norms of all linears and tables whose magnitudes stand over them, for one state of the flat vector.
#[derive(Default)]
pub struct RowNorms {
    /// By [`LinearId`]; shorter than the model's linears where nothing needs a norm.
    linears: Vec<Option<Norms>>,
    /// Of the token embedding.
    table: Option<Norms>,
    /// Of learned positions.
    positions: Option<Norms>,
    scratch: Scratch,
}

/// Those of one linear, `[out]` each, or of one table, `[hidden_size]` each.
#[derive(Default)]
pub(crate) struct Norms {
    /// ‖W‖² of each row of a frozen weight.
    squares: Vec<f64>,
    /// 1 / ‖W + D‖; 0 where that is 0.
    pub inverse: Vec<f32>,
    /// m / ‖W + D‖; 0 where that is 0.
    pub factors: Vec<f32>,
}

impl Norms {
    /// Those of ‖W + D‖² and of magnitudes.
    fn set(&mut self, squares: &[f64], magnitudes: &[f32]) {
        self.inverse.clear();
        self.factors.clear();
        for (square, m) in squares.iter().zip(magnitudes) {
            let norm = norm(*square);
            let over = |m: f32| if norm == 0.0 { 0.0 } else { m / norm };
            self.inverse.push(over(1.0));
            self.factors.push(over(*m));
        }
    }
}

/// Buffers that are reused from step to step.
#[derive(Default)]
struct Scratch {
    /// The A of all terms one below the other, `[R, in]`.
    a: Vec<f32>,
    /// s·B of all terms side by side, transposed, `[R, out]`.
    b: Vec<f32>,
    /// A·Aᵀ, `[R, R]`.
    gram: Vec<f32>,
    /// A·(2·W + D)ᵀ, `[R, out]`.
    products: Vec<f32>,
    squares: Vec<f64>,
}

impl RowNorms {
    /// Those of an overlay whose parameters are `params`.
    pub fn of(model: &Model, overlay: &Overlay, params: &[f32]) -> Self {
        let mut norms = Self::default();
        norms.refresh(model, overlay, params);
        norms
    }

    /// Computes them again, for other values of the parameters of the same overlay.
    pub fn refresh(&mut self, model: &Model, overlay: &Overlay, params: &[f32]) {
        let Self { linears, table, positions, scratch } = self;
        let tables = [
            (Some(&model.table), &overlay.table_term, table),
            (model.positions.as_ref(), &overlay.positions_term, positions),
        ];
        for (matrix, term, norms) in tables {
            let Some((matrix, term, magnitudes)) = with_magnitudes(matrix, term) else { continue };
            let _span = span(Operation::Scale);
            let norms = norms.get_or_insert_default();
            scratch.fill_table(matrix, term, params, &mut norms.squares);
            norms.set(&scratch.squares, &params[magnitudes]);
        }
        let is_over_norm = |change: &Change| matches!(change.output_scale, Some(OutputScale::OverNorm(_)));
        if !overlay.linears.iter().any(is_over_norm) {
            return;
        }
        let _span = span(Operation::Scale);
        linears.resize_with(overlay.linears.len(), || None);
        for (id, change) in overlay.linears.iter().enumerate() {
            let Some(OutputScale::OverNorm(magnitudes)) = &change.output_scale else { continue };
            let linear = model.linear(LinearId(id));
            let norms = linears[id].get_or_insert_default();
            scratch.fill(&linear.weight, change, params, &mut norms.squares);
            norms.set(&scratch.squares, &params[magnitudes.clone()]);
        }
    }

    /// What a linear's output is multiplied by, and the inverse norms alone.
    ///
    /// # Panics
    /// When the norms are not those of the overlay that is run.
    pub(crate) fn of_linear(&self, id: LinearId) -> (&[f32], &[f32]) {
        let norms = self.linears.get(id.0).and_then(Option::as_ref);
        let Norms { inverse, factors, .. } = norms.expect("norms of another overlay");
        (factors, inverse)
    }

    /// Those of the token embedding, where its term has magnitudes.
    pub(crate) fn of_table(&self) -> Option<&Norms> {
        self.table.as_ref()
    }

    /// Those of learned positions, where their term has magnitudes.
    pub(crate) fn of_positions(&self) -> Option<&Norms> {
        self.positions.as_ref()
    }
}

/// A table with a term that has magnitudes.
fn with_magnitudes<'a>(
    matrix: Option<&'a Matrix>,
    term: &'a Option<TableTerm>,
) -> Option<(&'a Matrix, &'a TableTerm, Range<usize>)> {
    let term = term.as_ref()?;
    Some((matrix?, term, term.magnitudes.clone()?))
}

/// The norm of each column of a table with the term on it, `‖W + s·A·Bᵀ‖`: what its magnitudes begin as.
pub fn column_norms(table: &Matrix, term: &TableTerm, params: &[f32]) -> Vec<f32> {
    let mut scratch = Scratch::default();
    scratch.fill_table(table, term, params, &mut Vec::new());
    scratch.squares.iter().map(|&square| norm(square)).collect()
}

/// What a table's columns are multiplied by, where its term has magnitudes.
pub fn column_factors(table: &Matrix, term: &TableTerm, params: &[f32]) -> Option<Vec<f32>> {
    let mut norms = Norms::default();
    let mut scratch = Scratch::default();
    scratch.fill_table(table, term, params, &mut norms.squares);
    norms.set(&scratch.squares, &params[term.magnitudes.clone()?]);
    Some(norms.factors)
}

/// The norm of each row of a weight `[out, in]` with what stands on it, `‖W + Σ s·B·A‖`: what an output scale over the norm begins as. A
/// weight of the change's own stands in the place of `weight`.
pub fn row_norms(weight: &dyn PanelSource, change: &Change, params: &[f32]) -> Vec<f32> {
    let mut scratch = Scratch::default();
    scratch.fill(weight, change, params, &mut Vec::new());
    scratch.squares.iter().map(|&square| norm(square)).collect()
}

/// A square that rounding has made negative is that of a row of zeros.
fn norm(square: f64) -> f32 {
    square.max(0.0).sqrt() as f32
}

impl Scratch {
    /// Fills `squares` with ‖W + D‖² of each row. `frozen` is ‖W‖² of a frozen weight, or empty and then filled.
    fn fill(&mut self, weight: &dyn PanelSource, change: &Change, params: &[f32], frozen: &mut Vec<f64>) {
        let (n, k, rank) = (weight.rows(), weight.cols(), change.rank());
        let own = change.weight.as_ref().map(|range| F32Panel::new(&params[range.clone()], k));
        let weight = own.as_ref().map_or(weight, |own| own);
        self.squares.resize(n, 0.0);
        if own.is_some() {
            row_squares::forward(weight, &mut self.squares);
        } else {
            if frozen.is_empty() {
                frozen.resize(n, 0.0);
                row_squares::forward(weight, frozen);
            }
            self.squares.copy_from_slice(frozen);
        }
        if rank == 0 {
            return;
        }
        let mut a = std::mem::take(&mut self.a);
        let b = &mut self.b;
        a.clear();
        b.clear();
        for term in &change.low_rank {
            a.extend_from_slice(&term.a.values(params));
            let values = term.b.values(params);
            (0..term.r).for_each(|j| b.extend((0..n).map(|row| term.scale * values[row * term.r + j])));
        }
        self.add(rank, k, MatRef::rows(&a, k), Rhs::Transposed(weight));
        self.a = a;
    }

    /// The same of each column of a table `[k, n]` with the term on it.
    fn fill_table(&mut self, table: &Matrix, term: &TableTerm, params: &[f32], frozen: &mut Vec<f64>) {
        let (k, n, r) = (table.rows(), table.cols(), term.r);
        if frozen.is_empty() {
            frozen.resize(n, 0.0);
            row_squares::forward(&table.clone().transposed(), frozen);
        }
        self.squares.clone_from(frozen);
        self.b.clear();
        let values = &params[term.b.clone()];
        (0..r).for_each(|j| self.b.extend((0..n).map(|row| term.scale * values[row * r + j])));
        self.add(r, k, MatRef::rows(&params[term.a.clone()], r).t(), Rhs::Plain(table));
    }

    /// Adds D·(2·W + D)ᵀ of each row to `squares`, for `a: [rank, k]` and the weight that `a` is multiplied with.
    fn add(&mut self, rank: usize, k: usize, a: MatRef, weight: Rhs) {
        let Self { b, gram, products, squares, .. } = self;
        let n = squares.len();
        gram.resize(rank * rank, 0.0);
        products.resize(rank * n, 0.0);
        gemm(rank, rank, &[Term::new(k, a, Rhs::View(a.t()))], Out::set(gram, rank));
        let terms =
            [Term::scaled(k, a, weight, 2.0), Term::new(rank, MatRef::rows(gram, rank), Rhs::View(MatRef::rows(b, n)))];
        gemm(rank, n, &terms, Out::set(products, n));
        for (b, products) in b.chunks_exact(n).zip(products.chunks_exact(n)) {
            for ((square, b), product) in squares.iter_mut().zip(b).zip(products) {
                *square += f64::from(*b) * f64::from(*product);
            }
        }
    }
}
