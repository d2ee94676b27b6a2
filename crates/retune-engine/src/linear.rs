//! A group of linears that read the same input, with what stands on them: `y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + b`, forward and backward.
//!
//! Outputs of a group lie side by side in one buffer. A low-rank term rides in the same product as the weight, and a group has one product
//! for the gradient of its input.

use arrayvec::ArrayVec;
use retune_kernels::dropout::{self, DropoutKey};
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::int8::Int8Rows;
use retune_kernels::{F32Panel, PanelSource, matvec, vector};
use retune_quant::Matrix;

use crate::model::LinearId;
use crate::overlay::LowRank;
use crate::profile::{Operation, span};
use crate::run::Run;

/// Most linears that read the same input (q, k and v).
const MOST_INPUTS: usize = 3;

/// Buffers that a linear's forward and backward need beside what is saved.
#[derive(Default)]
pub(crate) struct LinearScratch {
    dropped: Vec<f32>,
    low_rank: Vec<f32>,
    /// The A of linears that share an input one below the other, or what is added to their gradients.
    stacked: Vec<f32>,
    b_gradient: Vec<f32>,
    quantized: [Int8Rows; MOST_INPUTS],
}

impl LinearScratch {
    /// Rows in 8 bits for a gradient that is quantized where it comes into being.
    pub fn quantized(&mut self) -> &mut Int8Rows {
        let [rows, ..] = &mut self.quantized;
        rows
    }
}

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// A weight: the base's in its storage, or a place in the flat vector.
pub(crate) enum Weight<'a> {
    Frozen(&'a Matrix),
    Trained(F32Panel<'a>),
}

impl Weight<'_> {
    /// The matrix behind the interface that kernels take.
    pub fn panel(&self) -> &dyn PanelSource {
        match self {
            Weight::Frozen(matrix) => *matrix,
            Weight::Trained(panel) => panel,
        }
    }
}

/// Where the outputs of a group go.
pub(crate) enum To<'a> {
    /// Side by side, in the group's order, from the beginning of each row: as many rows as the input has.
    Columns(&'a mut [f32]),
    /// One linear's output plus an addend of the same shape.
    Sum(&'a mut [f32], &'a [f32]),
}

/// What a group read: its input `x: [T, in]`, and the `u: [T, Σ r]` its forward kept.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub x: &'a [f32],
    pub u: &'a [f32],
}

/// The low-rank terms of a group in parts whose terms read the same input, with the column at which each part begins in `[T, Σ r]`: one
/// part of all, or a part for each where dropout gives each an input of its own. Parts without terms are left out.
fn parts<'a>(run: Run<'a>, group: &'a [LinearId]) -> impl Iterator<Item = (usize, &'a [LinearId])> {
    let drops = |term: &LowRank| term.dropout > 0.0;
    let terms = group.iter().filter_map(move |&id| run.overlay.change(id).low_rank.as_ref());
    let drops = run.step.is_some() && terms.into_iter().any(drops);
    let size = if drops { 1 } else { group.len().max(1) };
    let mut next = 0;
    group.chunks(size).filter_map(move |part| {
        let rank = run.overlay.ranks(part);
        let first = next;
        next += rank;
        (rank > 0).then_some((first, part))
    })
}

/// The low-rank terms of linears.
fn terms<'a>(run: Run<'a>, linears: &'a [LinearId]) -> impl Iterator<Item = &'a LowRank> {
    linears.iter().filter_map(move |&id| run.overlay.change(id).low_rank.as_ref())
}

/// Writes the input with its dropped elements zero and the others divided by 1 − p. A mask is keyed by the row, so it does not depend
/// on what else is in the pass; rows with dropout share no tokens.
fn drop_elements(run: Run, term: &LowRank, x: &[f32], features: usize, to: &mut [f32]) {
    let Some(step) = run.step else { return };
    for sequence in &run.pass.sequences {
        let range = sequence.tokens.start * features..sequence.tokens.end * features;
        let key = DropoutKey { seed: step.seed, step: step.step, row: sequence.row, module: term.key };
        dropout::apply(&x[range.clone()], &mut to[range], key, 0, term.dropout);
    }
}

/// The input of a part's low-rank terms: `x`, or what dropout leaves of it.
fn dropped<'a>(run: Run, part: &[LinearId], x: &'a [f32], memory: &'a mut Vec<f32>) -> &'a [f32] {
    match part {
        [id] if run.step.is_some() => match &run.overlay.change(*id).low_rank {
            Some(term) if term.dropout > 0.0 => {
                let dropped = sized(memory, x.len());
                drop_elements(run, term, x, run.model.linear(*id).cols(), dropped);
                dropped
            }
            _ => x,
        },
        _ => x,
    }
}

/// Writes `u = drop(x)·Aᵀ: [T, Σ r]` of a group's low-rank terms, side by side, for its input `x: [T, in]`. The backward reads it.
pub(crate) fn project(run: Run, group: &[LinearId], x: &[f32], u: &mut [f32], scratch: &mut LinearScratch) {
    let _span = span(Operation::LowRank);
    let width = run.overlay.ranks(group);
    for (first, part) in parts(run, group) {
        let (k, rank) = (run.model.linear(part[0]).cols(), run.overlay.ranks(part));
        let x = dropped(run, part, x, &mut scratch.dropped);
        let stacked = sized(&mut scratch.stacked, rank * k);
        let mut rest = &mut *stacked;
        for term in terms(run, part) {
            let (to, others) = rest.split_at_mut(term.a.len());
            to.copy_from_slice(&run.params[term.a.clone()]);
            rest = others;
        }
        let a = Rhs::View(MatRef::rows(stacked, k).t());
        gemm(x.len() / k, rank, &[Term::new(k, MatRef::rows(x, k), a)], Out::set(&mut u[first..], width));
    }
}

/// Computes a group's outputs for its input `x: [T, in]`, and keeps the low-rank projections `u: [T, Σ r]`.
pub(crate) fn forward(run: Run, group: &[LinearId], x: &[f32], to: To, u: &mut [f32], scratch: &mut LinearScratch) {
    project(run, group, x, u, scratch);
    let u = MatRef::rows(u, run.overlay.ranks(group));
    let mut column = 0;
    match to {
        To::Sum(y, addend) => {
            let Some(&id) = group.first() else { return };
            let n = run.model.linear(id).rows();
            forward_one(run, id, x, u, scratch, Out::sum(y, n, addend), n);
        }
        To::Columns(y) => {
            let Some(&first) = group.first() else { return };
            // Rows may be longer than the columns that are written.
            let width = y.len() / (x.len() / run.model.linear(first).cols()).max(1);
            let mut first = 0;
            for &id in group {
                forward_one(run, id, x, u.from(0, column), scratch, Out::set(&mut y[first..], width), width);
                first += run.model.linear(id).rows();
                column += run.overlay.change(id).rank();
            }
        }
    }
}

/// Computes one linear into rows that start `row` elements apart.
fn forward_one(run: Run, id: LinearId, x: &[f32], u: MatRef, scratch: &mut LinearScratch, y: Out, row: usize) {
    let linear = run.model.linear(id);
    let (k, n) = (linear.cols(), linear.rows());
    let tokens = x.len() / k;
    if let Some(mut watch) = run.compute.watch() {
        watch.input(id, linear, x);
    }
    let LinearScratch { low_rank, quantized: [quantized, ..], .. } = scratch;
    let weight = run.weight(id);
    let mut y = y;
    let mut terms = ArrayVec::<Term, 2>::new();
    if let Some(weight) = run.compute.int8(id) {
        let _span = span(Operation::Quantize);
        quantized.quantize_input(x, weight);
        terms.push(Term::int8(quantized, weight));
    } else if tokens <= matvec::MAX_ROWS {
        let _span = span(Operation::Linear);
        // Too few rows to be worth packing the weight.
        let product = sized(low_rank, tokens * n);
        matvec::forward(x, weight.panel(), product);
        y = y.plus(product, n);
    } else {
        terms.push(Term::new(k, MatRef::rows(x, k), Rhs::Transposed(weight.panel())));
    }
    let _span = span(Operation::Linear);
    if let Some(term) = &run.overlay.change(id).low_rank {
        let b = Rhs::View(MatRef::rows(&run.params[term.b.clone()], term.r).t());
        terms.push(Term::scaled(term.r, u, b, term.scale));
    }
    let y = if terms.is_empty() { y.into_data() } else { gemm(tokens, n, &terms, y) };
    if let Some(bias) = linear.bias {
        vector::add_bias(y, row, tokens, run.vector(bias));
    }
}

/// The gradient of a group's outputs, side by side from the beginning of each row: as many rows as the input has.
#[derive(Clone, Copy)]
pub(crate) struct Gradient<'a> {
    pub group: &'a [LinearId],
    pub g: &'a [f32],
}

impl<'a> Gradient<'a> {
    /// Elements from one row to the next.
    fn row(&self, tokens: usize) -> usize {
        self.g.len() / tokens.max(1)
    }

    /// Each linear with its columns of the gradient.
    fn columns(self, run: Run<'a>) -> impl Iterator<Item = (LinearId, &'a [f32])> {
        let mut first = 0;
        self.group.iter().map(move |&id| {
            let g = &self.g[first..];
            first += run.model.linear(id).rows();
            (id, g)
        })
    }
}

/// First part of a backward: `v = s·g·B: [T, Σ r]` of the low-rank terms, kept in `scratch` for the other two parts.
pub(crate) fn project_gradients(run: Run, gradient: Gradient, tokens: usize, scratch: &mut LinearScratch) {
    let (width, row) = (run.overlay.ranks(gradient.group), gradient.row(tokens));
    let v = sized(&mut scratch.low_rank, tokens * width);
    let mut first = 0;
    for (id, g) in gradient.columns(run) {
        let Some(term) = &run.overlay.change(id).low_rank else { continue };
        let _span = span(Operation::LowRank);
        let b = Rhs::View(MatRef::rows(&run.params[term.b.clone()], term.r));
        let product = Term::scaled(run.model.linear(id).rows(), MatRef::rows(g, row), b, term.scale);
        gemm(tokens, term.r, &[product], Out::set(&mut v[first..], width));
        first += term.r;
    }
}

/// Second part: adds the gradients of a group's parameters to `grads`.
pub(crate) fn parameter_gradients(
    run: Run,
    gradient: Gradient,
    grads: &mut [f32],
    Input { x, u }: Input,
    scratch: &mut LinearScratch,
) {
    let group = gradient.group;
    let Some(tokens) = group.first().map(|&id| x.len() / run.model.linear(id).cols()) else { return };
    let (width, row) = (run.overlay.ranks(group), gradient.row(tokens));
    let LinearScratch { dropped, low_rank, stacked, b_gradient, .. } = scratch;
    let v = MatRef::rows(low_rank, width);
    // dA += vᵀ·drop(x)
    for (first, part) in parts(run, group) {
        let _span = span(Operation::LowRank);
        let (k, rank) = (run.model.linear(part[0]).cols(), run.overlay.ranks(part));
        let x = self::dropped(run, part, x, dropped);
        let gradients = sized(stacked, rank * k);
        let product = Term::new(tokens, v.from(0, first).t(), Rhs::View(MatRef::rows(x, k)));
        let mut rest = &*gemm(rank, k, &[product], Out::set(gradients, k));
        for term in terms(run, part) {
            let (from, others) = rest.split_at(term.a.len());
            vector::add(&mut grads[term.a.clone()], from);
            rest = others;
        }
    }
    let u = MatRef::rows(u, width);
    let mut first = 0;
    for (id, g) in gradient.columns(run) {
        let linear = run.model.linear(id);
        let (k, n) = (linear.cols(), linear.rows());
        let change = run.overlay.change(id);
        if let Some(term) = &change.low_rank {
            let _span = span(Operation::LowRank);
            // dB += s·gᵀ·u; its transpose has few rows, so that g is read as it lies.
            let r = term.r;
            let transposed = sized(b_gradient, r * n);
            let product = Term::new(tokens, u.from(0, first).t(), Rhs::View(MatRef::rows(g, row)));
            gemm(r, n, &[product], Out::set(transposed, n));
            vector::add_transposed(&mut grads[term.b.clone()], transposed, r, term.scale);
            first += r;
        }
        if let Some(range) = &change.weight {
            let _span = span(Operation::WeightGradient);
            let product = Term::new(tokens, MatRef::rows(g, row).t(), Rhs::View(MatRef::rows(x, k)));
            gemm(n, k, &[product], Out::add(&mut grads[range.clone()], k));
        }
        if let Some(range) = linear.bias.and_then(|bias| run.overlay.vectors[bias.0].clone()) {
            vector::add_column_sums(g, row, tokens, &mut grads[range]);
        }
    }
}

/// Third part: writes the gradient of the group's input, `dx: [T, in]`, as one product with a term for each weight and each A.
pub(crate) fn input_gradient(run: Run, gradient: Gradient, tokens: usize, scratch: &mut LinearScratch, dx: &mut [f32]) {
    let Some(k) = gradient.group.first().map(|&id| run.model.linear(id).cols()) else { return };
    let row = gradient.row(tokens);
    let LinearScratch { dropped, low_rank, quantized, .. } = scratch;
    for ((id, g), rows) in gradient.columns(run).zip(&mut *quantized) {
        let linear = run.model.linear(id);
        if let Some(mut watch) = run.compute.watch() {
            watch.gradient(id, linear, &g[..(tokens - 1) * row + linear.rows()], row);
        }
        if let Some(weight) = run.compute.int8(id) {
            let _span = span(Operation::Quantize);
            rows.quantize_gradient(g, row, tokens, weight, linear.gradient_rounding);
        }
    }
    let _span = span(Operation::Linear);
    let weights: ArrayVec<Weight, MOST_INPUTS> = gradient.group.iter().map(|&id| run.weight(id)).collect();
    let mut products = ArrayVec::<Term, { 2 * MOST_INPUTS }>::new();
    let v = MatRef::rows(low_rank, run.overlay.ranks(gradient.group));
    let drops = |term: &LowRank| run.step.is_some() && term.dropout > 0.0;
    let mut column = 0;
    for (((id, g), weight), rows) in gradient.columns(run).zip(&weights).zip(&*quantized) {
        products.push(match run.compute.int8(id) {
            Some(weight) => Term::int8_plain(rows, weight),
            None => Term::new(run.model.linear(id).rows(), MatRef::rows(g, row), Rhs::Plain(weight.panel())),
        });
        if let Some(term) = &run.overlay.change(id).low_rank {
            if !drops(term) {
                let a = Rhs::View(MatRef::rows(&run.params[term.a.clone()], k));
                products.push(Term::new(term.r, v.from(0, column), a));
            }
            column += term.r;
        }
    }
    gemm(tokens, k, &products, Out::set(&mut *dx, k));
    // With dropout a low-rank term's share of the gradient passes through the mask on its way: dx += mask ⊙ (v·A).
    let mut column = 0;
    for term in terms(run, gradient.group) {
        if drops(term) {
            let (raw, masked) = sized(dropped, 2 * tokens * k).split_at_mut(tokens * k);
            let a = Rhs::View(MatRef::rows(&run.params[term.a.clone()], k));
            gemm(tokens, k, &[Term::new(term.r, v.from(0, column), a)], Out::set(raw, k));
            drop_elements(run, term, raw, k, masked);
            vector::add(&mut dx[..tokens * k], masked);
        }
        column += term.r;
    }
}

/// All three parts, for an input that is at hand: adds the parameter gradients to `grads` and writes the input's gradient where it is
/// asked for.
pub(crate) fn backward(
    run: Run,
    gradient: Gradient,
    grads: &mut [f32],
    input: Input,
    scratch: &mut LinearScratch,
    dx: Option<&mut [f32]>,
) {
    let Some(&first) = gradient.group.first() else { return };
    let tokens = input.x.len() / run.model.linear(first).cols();
    project_gradients(run, gradient, tokens, scratch);
    parameter_gradients(run, gradient, grads, input, scratch);
    if let Some(dx) = dx {
        input_gradient(run, gradient, tokens, scratch, dx);
    }
}
