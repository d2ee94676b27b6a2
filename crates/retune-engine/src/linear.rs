//! A group of linears that read the same input, with what stands on them: `y = o ⊙ (x'·Wᵀ + Σ s·drop(x')·Aᵀ·Bᵀ + b)` with `x' = i ⊙ x`,
//! forward and backward.
//!
//! Outputs of a group lie side by side in one buffer. Low-rank terms ride in the same product as the weight, and a group has one product
//! for the gradient of its input. A linear without scales pays for none: its product goes straight to the outputs.

use std::borrow::Cow;

use arrayvec::ArrayVec;
use retune_kernels::column_scale::{self, Onto, Rows, RowsMut, Scale, Unscaled};
use retune_kernels::dropout::{self, DropoutKey};
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::int8::Int8Rows;
use retune_kernels::{F32Panel, PanelSource, matvec, vector};
use retune_quant::Matrix;

use crate::model::LinearId;
use crate::overlay::{LowRank, MOST_TERMS, Offset, OutputScale};
use crate::profile::{Operation, span};
use crate::run::{Part, Run};

/// Most linears that read the same input (q, k and v).
const MOST_INPUTS: usize = 3;

/// Buffers that a linear's forward and backward need beside what is saved.
#[derive(Default)]
pub(crate) struct LinearScratch {
    dropped: Vec<f32>,
    /// The input times an input scale.
    scaled: Vec<f32>,
    /// The gradients of scaled inputs before their scale, one group's linears after each other, `[T, in]` each.
    scaled_gradients: Vec<f32>,
    low_rank: Vec<f32>,
    /// The A of linears that share an input one below the other, or what is added to their gradients.
    stacked: Vec<f32>,
    b_gradient: Vec<f32>,
    /// A bias times an output scale, an offset times its scale, or the gradient of what an output is multiplied by.
    row: Vec<f32>,
    /// Projections, and outputs before output scales, of a part of the tokens that has an overlay of its own.
    of_part: [Vec<f32>; 2],
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
    /// Nowhere: the group is run for what its backward reads.
    Nowhere,
    /// Side by side, in the group's order, from the beginning of each row: as many rows as the input has.
    Columns(&'a mut [f32]),
    /// One linear's output plus an addend of the same shape.
    Sum(&'a mut [f32], &'a [f32]),
}

/// Where a group leaves what its backward reads.
pub(crate) struct Keep<'a> {
    /// The low-rank projections `[T, Σ r]`.
    pub u: &'a mut [f32],
    /// The outputs before output scales, [`Overlay::unscaled`](crate::overlay::Overlay::unscaled) elements a token.
    pub unscaled: &'a mut [f32],
    /// The same rounded, where that is what lasts.
    pub rounded: Option<&'a mut [u16]>,
}

/// What a group read: its input `x: [T, in]`, and the `u: [T, Σ r]` its forward kept.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub x: &'a [f32],
    pub u: &'a [f32],
}

/// A low-rank term of a group.
#[derive(Clone, Copy)]
struct Placed<'a> {
    id: LinearId,
    term: &'a LowRank,
    /// Its first column in `[T, Σ r]`.
    column: usize,
}

/// The low-rank terms of a group, in the order of their columns.
fn terms<'a>(run: Run<'a>, group: &'a [LinearId]) -> ArrayVec<Placed<'a>, { MOST_INPUTS * MOST_TERMS }> {
    let of = move |&id: &'a LinearId| run.overlay.change(id).low_rank.iter().map(move |term| (id, term));
    let mut next = 0;
    let place = |(id, term): (LinearId, &'a LowRank)| {
        let column = next;
        next += term.r;
        Placed { id, term, column }
    };
    group.iter().flat_map(of).map(place).collect()
}

/// Whether a term's input loses elements in this run.
fn drops(run: Run, term: &LowRank) -> bool {
    run.step.is_some() && term.dropout > 0.0
}

/// The terms in parts that read the same input: all that read the group's own together, and each alone that dropout or an input scale
/// gives one of its own.
fn parts<'p, 'a>(run: Run<'p>, terms: &'p [Placed<'a>]) -> impl Iterator<Item = &'p [Placed<'a>]> {
    let reads_own = move |of: &Placed| drops(run, of.term) || run.overlay.change(of.id).input_scale.is_some();
    terms.chunk_by(move |a, b| !reads_own(a) && !reads_own(b))
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

/// What a linear reads of the group's input `x: [T, in]`: the same, or that times its input scale.
fn scaled<'a>(run: Run, id: LinearId, x: &'a [f32], memory: &'a mut Vec<f32>) -> &'a [f32] {
    let Some(range) = &run.overlay.change(id).input_scale else { return x };
    let _span = span(Operation::Scale);
    let row = range.len();
    let (scaled, scale) = (sized(memory, x.len()), Scale { factors: &run.params[range.clone()], offsets: None });
    let to = RowsMut { data: &mut *scaled, row };
    column_scale::forward(Rows { data: x, row }, scale, x.len() / row, to, Onto::Nothing, None);
    scaled
}

/// What a part's terms read: what their linear reads, or what dropout leaves of it.
fn part_input<'a>(
    run: Run,
    of: &Placed,
    x: &'a [f32],
    in_scaled: &'a mut Vec<f32>,
    in_dropped: &'a mut Vec<f32>,
) -> &'a [f32] {
    let x = scaled(run, of.id, x, in_scaled);
    if !drops(run, of.term) {
        return x;
    }
    let dropped = sized(in_dropped, x.len());
    drop_elements(run, of.term, x, run.model.linear(of.id).cols(), dropped);
    dropped
}

/// Writes `u = drop(x')·Aᵀ: [T, Σ r]` of a group's low-rank terms, side by side, for its input `x: [T, in]`. The backward reads it.
fn project(run: Run, group: &[LinearId], x: &[f32], u: &mut [f32], scratch: &mut LinearScratch) {
    let _span = span(Operation::LowRank);
    let width = run.overlay.ranks(group);
    let LinearScratch { dropped, scaled, stacked, .. } = scratch;
    for part in parts(run, &terms(run, group)) {
        let k = run.model.linear(part[0].id).cols();
        let rank = part.iter().map(|of| of.term.r).sum();
        let x = part_input(run, &part[0], x, scaled, dropped);
        let stacked = sized(stacked, rank * k);
        let mut rest = &mut *stacked;
        for of in part {
            let (to, others) = rest.split_at_mut(of.term.r * k);
            to.copy_from_slice(&of.term.a.values(run.params));
            rest = others;
        }
        let a = Rhs::View(MatRef::rows(stacked, k).t());
        gemm(x.len() / k, rank, &[Term::new(k, MatRef::rows(x, k), a)], Out::set(&mut u[part[0].column..], width));
    }
}

/// Computes a group's outputs for its input `x: [T, in]`, and keeps what the backward reads.
pub(crate) fn forward(run: Run, group: &[LinearId], x: &[f32], mut to: To, keep: Keep, scratch: &mut LinearScratch) {
    let is_changed = |part: &Part| group.iter().any(|&id| !part.overlay.change(id).is_empty());
    if run.parts.iter().any(is_changed) {
        return forward_parts(run, group, x, to, scratch);
    }
    let Keep { u, unscaled, mut rounded } = keep;
    project(run, group, x, u, scratch);
    let Some(&first) = group.first() else { return };
    let tokens = x.len() / run.model.linear(first).cols();
    let u = MatRef::rows(u, run.overlay.ranks(group));
    let unscaled_row = run.overlay.unscaled(run.model, group);
    // Rows may be longer than the columns that are written.
    let row = match &to {
        To::Nowhere => 0,
        To::Columns(y) => y.len() / tokens.max(1),
        To::Sum(..) => run.model.linear(first).rows(),
    };
    let (mut column, mut first, mut first_unscaled) = (0, 0, 0);
    for &id in group {
        let (linear, change) = (run.model.linear(id), run.overlay.change(id));
        let (n, u) = (linear.rows(), u.from(0, column));
        if change.output_scale.is_some() {
            let z = &mut unscaled[first_unscaled..];
            product(run, id, x, u, scratch, Out::set(&mut *z, unscaled_row));
            let rounded = rounded.as_mut().map(|rounded| &mut rounded[first_unscaled..]);
            let z = Rows { data: z, row: unscaled_row };
            let (y, onto) = match &mut to {
                To::Nowhere => (None, Onto::Nothing),
                To::Columns(y) => (Some(&mut y[first..]), Onto::Nothing),
                To::Sum(y, addend) => (Some(&mut **y), Onto::Other(addend)),
            };
            if let Some(data) = y {
                scale_output(run, id, z, tokens, (RowsMut { data, row }, onto), rounded, &mut scratch.row);
            }
            first_unscaled += n;
        } else {
            let y = match &mut to {
                To::Nowhere => None,
                To::Columns(y) => Some(Out::set(&mut y[first..], row)),
                To::Sum(y, addend) => Some(Out::sum(y, row, addend)),
            };
            if let Some(y) = y {
                let y = product(run, id, x, u, scratch, y);
                if let Some(bias) = linear.bias {
                    let _span = span(Operation::Linear);
                    vector::add_bias(y, row, tokens, run.vector(bias));
                }
                if let Some(offset) = &change.offset {
                    let _span = span(Operation::Linear);
                    add_offset(run, offset, y, row, tokens, &mut scratch.row);
                }
            }
        }
        first += n;
        column += change.rank();
    }
}

/// The same where not the same stands on all tokens: the product with the base for all of them, then what low-rank terms and offsets add to
/// their own. Where a linear is scaled or its weight another, those tokens have a product of their own.
fn forward_parts(run: Run, group: &[LinearId], x: &[f32], mut to: To, scratch: &mut LinearScratch) {
    let Some(&first) = group.first() else { return };
    let k = run.model.linear(first).cols();
    let tokens = x.len() / k;
    let is_added = |part: &&Part| group.iter().all(|&id| part.overlay.change(id).only_adds());
    if run.parts.iter().any(|part| is_added(&part)) {
        let to = match &mut to {
            To::Nowhere => To::Nowhere,
            To::Columns(y) => To::Columns(y),
            To::Sum(y, addend) => To::Sum(y, addend),
        };
        let keep = Keep { u: &mut [], unscaled: &mut [], rounded: None };
        forward(Run { parts: &[], ..run }, group, x, to, keep, scratch);
    }
    let [mut u, mut unscaled] = std::mem::take(&mut scratch.of_part);
    for part in run.parts {
        let (own, rows) = (run.of_part(part), part.tokens.len());
        let x = &x[part.tokens.start * k..part.tokens.end * k];
        let u = sized(&mut u, rows * part.overlay.ranks(group));
        let of_rows = |len: usize| part.tokens.start * (len / tokens)..part.tokens.end * (len / tokens);
        if is_added(&part) {
            let (To::Columns(y) | To::Sum(y, _)) = &mut to else { continue };
            let range = of_rows(y.len());
            project(own, group, x, u, scratch);
            add_terms(own, group, u, &mut y[range], rows, scratch);
        } else {
            let unscaled = sized(&mut unscaled, rows * part.overlay.unscaled(run.model, group));
            let keep = Keep { u, unscaled, rounded: None };
            let to = match &mut to {
                To::Nowhere => To::Nowhere,
                To::Columns(y) => {
                    let range = of_rows(y.len());
                    To::Columns(&mut y[range])
                }
                To::Sum(y, addend) => {
                    let range = of_rows(y.len());
                    To::Sum(&mut y[range.clone()], &addend[range])
                }
            };
            forward(own, group, x, to, keep, scratch);
        }
    }
    scratch.of_part = [u, unscaled];
}

/// Adds low-rank terms, whose projections are `u: [T, Σ r]`, and offsets to outputs that the base has written.
fn add_terms(run: Run, group: &[LinearId], u: &[f32], y: &mut [f32], tokens: usize, scratch: &mut LinearScratch) {
    let _span = span(Operation::LowRank);
    let (row, width) = (y.len() / tokens.max(1), run.overlay.ranks(group));
    let (mut column, mut first) = (0, 0);
    for &id in group {
        let (n, change) = (run.model.linear(id).rows(), run.overlay.change(id));
        let of_b = change.low_rank.iter().map(|term| term.b.values(run.params));
        let values: ArrayVec<Cow<[f32]>, MOST_TERMS> = of_b.collect();
        let mut terms = ArrayVec::<Term, MOST_TERMS>::new();
        for (term, b) in change.low_rank.iter().zip(&values) {
            let b = Rhs::View(MatRef::rows(b, term.r).t());
            terms.push(Term::scaled(term.r, MatRef::rows(u, width).from(0, column), b, term.scale));
            column += term.r;
        }
        if !terms.is_empty() {
            gemm(tokens, n, &terms, Out::add(&mut y[first..], row));
        }
        if let Some(offset) = &change.offset {
            add_offset(run, offset, &mut y[first..], row, tokens, &mut scratch.row);
        }
        first += n;
    }
}

/// Adds an offset to each of a linear's outputs, which lie `row` elements apart.
fn add_offset(run: Run, offset: &Offset, y: &mut [f32], row: usize, tokens: usize, memory: &mut Vec<f32>) {
    let values = &run.params[offset.place.clone()];
    let scaled = sized(memory, values.len());
    scaled.iter_mut().zip(values).for_each(|(to, value)| *to = offset.scale * value);
    vector::add_bias(y, row, tokens, scaled);
}

/// Writes the product of what a linear reads with its weight, and its low-rank terms: all but output scale and bias.
fn product<'y>(run: Run, id: LinearId, x: &[f32], u: MatRef, scratch: &mut LinearScratch, y: Out<'y>) -> &'y mut [f32] {
    let linear = run.model.linear(id);
    let (k, n) = (linear.cols(), linear.rows());
    let tokens = x.len() / k;
    let LinearScratch { low_rank, scaled, quantized: [quantized, ..], .. } = scratch;
    let x = self::scaled(run, id, x, scaled);
    if let Some(mut watch) = run.compute.watch() {
        watch.input(id, linear, x);
    }
    let weight = run.weight(id);
    let added = &run.overlay.change(id).low_rank;
    let values: ArrayVec<Cow<[f32]>, MOST_TERMS> = added.iter().map(|term| term.b.values(run.params)).collect();
    let mut y = y;
    let mut terms = ArrayVec::<Term, { 1 + MOST_TERMS }>::new();
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
    let mut column = 0;
    for (term, b) in added.iter().zip(&values) {
        let b = Rhs::View(MatRef::rows(b, term.r).t());
        terms.push(Term::scaled(term.r, u.from(0, column), b, term.scale));
        column += term.r;
    }
    if terms.is_empty() { y.into_data() } else { gemm(tokens, n, &terms, y) }
}

/// Writes a linear's output from what it is before its output scale, and that rounded where it lasts so.
fn scale_output(
    run: Run,
    id: LinearId,
    z: Rows,
    tokens: usize,
    (y, onto): (RowsMut, Onto),
    rounded: Option<&mut [u16]>,
    memory: &mut Vec<f32>,
) {
    let _span = span(Operation::Scale);
    let bias = run.model.linear(id).bias.map(|bias| run.vector(bias));
    let (factors, offsets) = match &run.overlay.change(id).output_scale {
        None => return,
        Some(OutputScale::OverNorm(_)) => (run.norms.of_linear(id).0, bias),
        Some(OutputScale::Plain(range)) => {
            let factors = &run.params[range.clone()];
            let offsets = bias.map(|bias| {
                let offsets = sized(memory, bias.len());
                offsets.iter_mut().zip(bias).zip(factors).for_each(|((to, bias), factor)| *to = factor * bias);
                &*offsets
            });
            (factors, offsets)
        }
    };
    column_scale::forward(z, Scale { factors, offsets }, tokens, y, onto, rounded);
}

/// The gradient of a group's outputs, side by side from the beginning of each row: as many rows as the input has. Where outputs are scaled
/// it is that before the scale, which [`unscale_gradients`] makes.
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

/// Before a backward: turns the gradients of scaled outputs, in `dz` or else in `dy`, which then is one linear's, into those before the
/// scale, in `dz`, and adds those of the scales to `grads`. `z` is what the forward kept of the outputs.
#[allow(clippy::too_many_arguments)] // as the backward
pub(crate) fn unscale_gradients(
    run: Run,
    group: &[LinearId],
    dy: Option<&[f32]>,
    dz: &mut [f32],
    tokens: usize,
    z: Unscaled,
    grads: &mut [f32],
    scratch: &mut LinearScratch,
) {
    let _span = span(Operation::Scale);
    let (row, z_row) = (dz.len() / tokens.max(1), run.overlay.unscaled(run.model, group));
    let (mut first, mut first_unscaled) = (0, 0);
    for &id in group {
        let linear = run.model.linear(id);
        if let Some(scale) = &run.overlay.change(id).output_scale {
            let (dy, dz) = (dy.map(|dy| &dy[first..]), &mut dz[first..]);
            let z = match z {
                Unscaled::Exact(z) => Unscaled::Exact(&z[first_unscaled..]),
                Unscaled::Rounded(z) => Unscaled::Rounded(&z[first_unscaled..]),
            };
            match scale {
                OutputScale::Plain(range) => {
                    let (factors, bias) = (&run.params[range.clone()], linear.bias.map(|bias| run.vector(bias)));
                    let dz = RowsMut { data: dz, row };
                    column_scale::backward(dy, dz, z, z_row, factors, bias, tokens, &mut grads[range.clone()]);
                }
                OutputScale::OverNorm(range) => {
                    if let Some(bias) = linear.bias.and_then(|bias| run.overlay.vectors[bias.0].clone()) {
                        vector::add_column_sums(dy.unwrap_or(&*dz), row, tokens, &mut grads[bias]);
                    }
                    let (factors, inverse) = run.norms.of_linear(id);
                    let by_factor = sized(&mut scratch.row, factors.len());
                    by_factor.fill(0.0);
                    column_scale::backward(dy, RowsMut { data: dz, row }, z, z_row, factors, None, tokens, by_factor);
                    let gradients = grads[range.clone()].iter_mut().zip(by_factor).zip(inverse);
                    gradients.for_each(|((gradient, by_factor), inverse)| *gradient += *by_factor * inverse);
                }
            }
            first_unscaled += linear.rows();
        }
        first += linear.rows();
    }
}

/// First part of a backward: `v = s·g·B: [T, Σ r]` of the low-rank terms, kept in `scratch` for the other two parts.
pub(crate) fn project_gradients(run: Run, gradient: Gradient, tokens: usize, scratch: &mut LinearScratch) {
    let (width, row) = (run.overlay.ranks(gradient.group), gradient.row(tokens));
    let v = sized(&mut scratch.low_rank, tokens * width);
    let mut first = 0;
    for (id, g) in gradient.columns(run) {
        for term in &run.overlay.change(id).low_rank {
            let _span = span(Operation::LowRank);
            let values = term.b.values(run.params);
            let b = Rhs::View(MatRef::rows(&values, term.r));
            let product = Term::scaled(run.model.linear(id).rows(), MatRef::rows(g, row), b, term.scale);
            gemm(tokens, term.r, &[product], Out::set(&mut v[first..], width));
            first += term.r;
        }
    }
}

/// Whether the gradient of a group's input is to be computed even where nothing below is trained: an input scale's follows from it.
pub(crate) fn needs_input_gradient(run: Run, group: &[LinearId]) -> bool {
    group.iter().any(|&id| run.overlay.change(id).input_scale.is_some())
}

/// A low-rank term's share of the gradient of its input, `v·A`.
fn input_term<'a>(of: &Placed<'_>, a: &'a [f32], v: MatRef<'a>, k: usize) -> Term<'a> {
    Term::new(of.term.r, v.from(0, of.column), Rhs::View(MatRef::rows(a, k)))
}

/// Second part: writes the gradient of the group's input, `dx: [T, in]` if it is asked for, as one product with a term for each weight and
/// each A. The gradients of what linears with an input scale read, before that scale, are kept in `scratch` for the third part.
pub(crate) fn input_gradient(
    run: Run,
    gradient: Gradient,
    tokens: usize,
    scratch: &mut LinearScratch,
    mut dx: Option<&mut [f32]>,
) {
    let Some(k) = gradient.group.first().map(|&id| run.model.linear(id).cols()) else { return };
    let row = gradient.row(tokens);
    let LinearScratch { dropped, scaled_gradients, low_rank, quantized, .. } = scratch;
    let is_wanted = dx.is_some();
    let input_scale = |id: LinearId| run.overlay.change(id).input_scale.clone();
    for ((id, g), rows) in gradient.columns(run).zip(&mut *quantized) {
        if !is_wanted && input_scale(id).is_none() {
            continue;
        }
        let linear = run.model.linear(id);
        if let Some(mut watch) = run.compute.watch() {
            watch.gradient(id, linear, &g[..(tokens - 1) * row + linear.rows()], row);
        }
        if let Some(weight) = run.compute.int8(id) {
            let _span = span(Operation::Quantize);
            rows.quantize_gradient(g, row, tokens, weight, linear.gradient_rounding);
        }
    }
    let terms = terms(run, gradient.group);
    let v = MatRef::rows(low_rank, run.overlay.ranks(gradient.group));
    let values: ArrayVec<Cow<[f32]>, { MOST_INPUTS * MOST_TERMS }> =
        terms.iter().map(|of| of.term.a.values(run.params)).collect();
    let weights: ArrayVec<Weight, MOST_INPUTS> = gradient.group.iter().map(|&id| run.weight(id)).collect();
    // One product for the linears of `which`, to be written to `dx`. It says whether there are any.
    let mut product = |which: &dyn Fn(LinearId) -> bool, dx: &mut [f32]| {
        let mut products = ArrayVec::<Term, { (1 + MOST_TERMS) * MOST_INPUTS }>::new();
        for (((id, g), weight), rows) in gradient.columns(run).zip(&weights).zip(&*quantized) {
            if which(id) {
                products.push(match run.compute.int8(id) {
                    Some(weight) => Term::int8_plain(rows, weight),
                    None => Term::new(run.model.linear(id).rows(), MatRef::rows(g, row), Rhs::Plain(weight.panel())),
                });
                let undropped = terms.iter().zip(&values).filter(|(of, _)| of.id == id && !drops(run, of.term));
                products.extend(undropped.map(|(of, a)| input_term(of, a, v, k)));
            }
        }
        if products.is_empty() {
            return false;
        }
        let _span = span(Operation::Linear);
        gemm(tokens, k, &products, Out::set(&mut *dx, k));
        // With dropout a low-rank term's share of the gradient passes through the mask on its way: dx += mask ⊙ (v·A).
        for (of, a) in terms.iter().zip(&values).filter(|(of, _)| which(of.id) && drops(run, of.term)) {
            let (raw, masked) = sized(dropped, 2 * tokens * k).split_at_mut(tokens * k);
            gemm(tokens, k, &[input_term(of, a, v, k)], Out::set(raw, k));
            drop_elements(run, of.term, raw, k, masked);
            vector::add(&mut dx[..tokens * k], masked);
        }
        true
    };
    let mut is_set = match &mut dx {
        Some(dx) => product(&|id| input_scale(id).is_none(), dx),
        None => false,
    };
    let count = run.overlay.scaled_inputs(run.model, gradient.group) / k;
    let mut apart = sized(scaled_gradients, tokens * k * count).chunks_exact_mut((tokens * k).max(1));
    for &id in gradient.group {
        let Some(range) = input_scale(id) else { continue };
        let Some(apart) = apart.next() else { return };
        product(&|other| other == id, apart);
        if let Some(dx) = dx.as_deref_mut() {
            let _span = span(Operation::Scale);
            let scale = Scale { factors: &run.params[range], offsets: None };
            let onto = if is_set { Onto::Itself } else { Onto::Nothing };
            let to = RowsMut { data: dx, row: k };
            column_scale::forward(Rows { data: apart, row: k }, scale, tokens, to, onto, None);
            is_set = true;
        }
    }
}

/// Third part: adds the gradients of a group's parameters to `grads`.
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
    let LinearScratch { dropped, scaled, scaled_gradients, low_rank, stacked, b_gradient, row: memory, .. } = scratch;
    let v = MatRef::rows(low_rank, width);
    let terms = terms(run, group);
    // dA += vᵀ·drop(x')
    for part in parts(run, &terms) {
        let is_trained = |of: &Placed| of.term.a.trained().is_some();
        if !part.iter().any(is_trained) {
            continue;
        }
        let _span = span(Operation::LowRank);
        let k = run.model.linear(part[0].id).cols();
        let x = part_input(run, &part[0], x, scaled, dropped);
        for part in part.chunk_by(|a, b| is_trained(a) == is_trained(b)).filter(|part| is_trained(&part[0])) {
            let rank = part.iter().map(|of| of.term.r).sum();
            let gradients = sized(stacked, rank * k);
            let product = Term::new(tokens, v.from(0, part[0].column).t(), Rhs::View(MatRef::rows(x, k)));
            let mut rest = &*gemm(rank, k, &[product], Out::set(gradients, k));
            for range in part.iter().filter_map(|of| of.term.a.trained()) {
                let (from, others) = rest.split_at(range.len());
                vector::add(&mut grads[range.clone()], from);
                rest = others;
            }
        }
    }
    let u = MatRef::rows(u, width);
    let mut terms = terms.iter().peekable();
    let mut scaled_gradients = scaled_gradients.chunks_exact(x.len().max(1));
    for (id, g) in gradient.columns(run) {
        let linear = run.model.linear(id);
        let (k, n) = (linear.cols(), linear.rows());
        let change = run.overlay.change(id);
        while let Some(Placed { term, column, .. }) = terms.next_if(|of| of.id == id) {
            let Some(range) = term.b.trained() else { continue };
            let _span = span(Operation::LowRank);
            // dB += s·gᵀ·u; its transpose has few rows, so that g is read as it lies.
            let r = term.r;
            let transposed = sized(b_gradient, r * n);
            let product = Term::new(tokens, u.from(0, *column).t(), Rhs::View(MatRef::rows(g, row)));
            gemm(r, n, &[product], Out::set(transposed, n));
            vector::add_transposed(&mut grads[range.clone()], transposed, r, term.scale);
        }
        if let Some(range) = &change.weight {
            let x = self::scaled(run, id, x, scaled);
            let _span = span(Operation::WeightGradient);
            let product = Term::new(tokens, MatRef::rows(g, row).t(), Rhs::View(MatRef::rows(x, k)));
            gemm(n, k, &[product], Out::add(&mut grads[range.clone()], k));
        }
        // That of a bias outside the output's scale was added when the gradient was still that of the output.
        let is_outside = matches!(change.output_scale, Some(OutputScale::OverNorm(_)));
        let bias = linear.bias.filter(|_| !is_outside);
        if let Some(range) = bias.and_then(|bias| run.overlay.vectors[bias.0].clone()) {
            vector::add_column_sums(g, row, tokens, &mut grads[range]);
        }
        if let Some(Offset { place, scale }) = &change.offset {
            let sums = sized(memory, n);
            sums.fill(0.0);
            vector::add_column_sums(g, row, tokens, sums);
            grads[place.clone()].iter_mut().zip(sums).for_each(|(gradient, sum)| *gradient += scale * *sum);
        }
        if let Some(range) = &change.input_scale
            && let Some(before) = scaled_gradients.next()
        {
            let _span = span(Operation::Scale);
            column_scale::add_column_products(before, x, tokens, &mut grads[range.clone()]);
        }
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
    if dx.is_some() || needs_input_gradient(run, gradient.group) {
        input_gradient(run, gradient, tokens, scratch, dx);
    }
    parameter_gradients(run, gradient, grads, input, scratch);
}
