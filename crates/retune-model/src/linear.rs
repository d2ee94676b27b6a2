//! A linear layer of the model with its adapter: `y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + b`, forward and backward.
//!
//! The low-rank term rides in the same product as the weight, and linears that share an input share one product for its gradient.

use std::ops::Range;
use std::sync::Arc;

use arrayvec::ArrayVec;
use retune_adapter::dropout::{self, DropoutKey};
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::int8::{Int8Matrix, Int8Rows, Rounding};
use retune_kernels::{matvec, vector};

use crate::calibration::Calibration;
use crate::params::{Vector, Weight};
use crate::pass::Sequence;
use crate::profile::{Operation, span};

/// Most linears that read the same input (q, k and v).
const MAX_BRANCHES: usize = 3;

/// A low-rank adapter on a linear (Hu et al. 2021): A `[r, in]` and B `[out, r]` in the flat vector.
#[derive(Clone, Debug)]
pub struct Lora {
    pub a: Range<usize>,
    pub b: Range<usize>,
    pub r: usize,
    /// alpha / r, or alpha / sqrt(r) for rsLoRA.
    pub scaling: f32,
    /// Probability that an element of the input is dropped before A.
    pub dropout: f32,
    /// Key of this module's dropout masks.
    pub module: u64,
}

/// A linear `[out_features, in_features]` of the model.
#[derive(Clone)]
pub struct Linear {
    /// Its name in the model, `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub in_features: usize,
    pub out_features: usize,
    pub weight: Weight,
    pub bias: Option<Vector>,
    pub lora: Option<Lora>,
    /// The frozen weight in 8 bits, where products are computed with that.
    pub int8: Option<Arc<Int8Matrix>>,
    /// How the gradient of its output is rounded there.
    pub gradient_rounding: Rounding,
}

/// What a step's dropout masks depend on beside the module and the element.
#[derive(Clone, Copy)]
pub struct Dropout<'a> {
    pub seed: u64,
    pub step: u64,
    pub sequences: &'a [Sequence],
}

impl Dropout<'_> {
    /// Writes the input with its dropped elements zero and the others divided by 1 − p. A mask is keyed by the row, so it does not depend
    /// on what else is in the pass.
    fn apply(&self, lora: &Lora, x: &[f32], features: usize, out: &mut [f32]) {
        for sequence in self.sequences {
            debug_assert_eq!(sequence.tokens.len(), sequence.whole.len(), "rows with dropout share no tokens");
            let range = sequence.tokens.start * features..sequence.tokens.end * features;
            let key = DropoutKey { seed: self.seed, step: self.step, row: sequence.row, module: lora.module };
            dropout::apply(&x[range.clone()], &mut out[range], key, 0, lora.dropout);
        }
    }
}

/// Buffers that a linear's forward and backward need beside what is saved.
#[derive(Default)]
pub struct LinearScratch {
    dropped: Vec<f32>,
    low_rank: Vec<f32>,
    /// The A of linears that share an input one below the other, or what is added to their gradients.
    stacked: Vec<f32>,
    b_gradient: Vec<f32>,
    quantized: [Int8Rows; MAX_BRANCHES],
    /// Watches the inputs and gradients of the pass, when one is being made.
    pub(crate) calibration: Option<Box<Calibration>>,
}

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl Linear {
    /// Rank of its adapter; 0 without one.
    pub fn rank(&self) -> usize {
        self.lora.as_ref().map_or(0, |l| l.r)
    }

    /// Whether any of its own parameters is trained.
    pub fn is_trainable(&self) -> bool {
        self.lora.is_some() || self.weight.range().is_some() || self.bias.as_ref().is_some_and(Vector::is_trainable)
    }

    /// Computes `y` (overwritten or added to) for `x: [T, in]` and its part of the adapters' projection.
    fn forward(&self, params: &[f32], x: &[f32], u: MatRef, scratch: &mut LinearScratch, y: Out) {
        let (k, n) = (self.in_features, self.out_features);
        let tokens = x.len() / k;
        if let Some(calibration) = &mut scratch.calibration {
            calibration.forward(self, x);
        }
        let LinearScratch { low_rank, quantized: [quantized, ..], .. } = scratch;
        let source = self.weight.source(params);
        let mut y = y;
        let mut terms = ArrayVec::<Term, 2>::new();
        if let Some(weight) = &self.int8 {
            let _span = span(Operation::Quantize);
            quantized.quantize_input(x, weight);
            terms.push(Term::int8(quantized, weight));
        } else if tokens <= matvec::MAX_ROWS {
            let _span = span(Operation::Linear);
            // Too few rows to be worth packing the weight.
            let product = sized(low_rank, tokens * n);
            matvec::forward(x, source.panel(), product);
            y = y.plus(product);
        } else {
            terms.push(Term::new(k, MatRef::rows(x, k), Rhs::Transposed(source.panel())));
        }
        let _span = span(Operation::Linear);
        if let Some(lora) = &self.lora {
            let b = Rhs::View(MatRef::rows(&params[lora.b.clone()], lora.r).t());
            terms.push(Term::scaled(lora.r, u, b, lora.scaling));
        }
        let y = if terms.is_empty() { y.into_data() } else { gemm(tokens, n, &terms, y) };
        if let Some(bias) = &self.bias {
            vector::add_bias(&mut y[..tokens * n], bias.values(params));
        }
    }
}

/// Ranks of the adapters of linears together.
pub fn ranks<'a>(linears: impl IntoIterator<Item = &'a Linear>) -> usize {
    linears.into_iter().map(Linear::rank).sum()
}

/// Linears that share an input in parts for which the adapters' input is the same, and the first column of each in `[T, Σ r]`: all
/// together, but each alone where dropout gives each its own. Parts without adapters are left out.
fn parts<'a, 'b>(
    linears: &'a [&'b Linear],
    dropout: Option<&Dropout>,
) -> impl Iterator<Item = (usize, &'a [&'b Linear])> {
    let drops = dropout.is_some() && linears.iter().filter_map(|l| l.lora.as_ref()).any(|lora| lora.dropout > 0.0);
    let size = if drops { 1 } else { linears.len().max(1) };
    let mut next = 0;
    linears.chunks(size).filter_map(move |part| {
        let rank = ranks(part.iter().copied());
        let first = next;
        next += rank;
        (rank > 0).then_some((first, part))
    })
}

/// The adapters' input for a part: `x`, or what dropout leaves of it.
fn dropped<'a>(part: &[&Linear], x: &'a [f32], dropout: Option<&Dropout>, memory: &'a mut Vec<f32>) -> &'a [f32] {
    match (dropout, part) {
        (Some(dropout), [Linear { lora: Some(lora), in_features, .. }]) if lora.dropout > 0.0 => {
            let dropped = sized(memory, x.len());
            dropout.apply(lora, x, *in_features, dropped);
            dropped
        }
        _ => x,
    }
}

/// Writes the adapters' `u = drop(x)·Aᵀ: [T, Σ r]`, side by side for linears that share the input `x: [T, in]`. Their backward reads it.
pub fn project(
    linears: &[&Linear],
    params: &[f32],
    x: &[f32],
    u: &mut [f32],
    dropout: Option<&Dropout>,
    scratch: &mut LinearScratch,
) {
    let _span = span(Operation::LowRank);
    let width = ranks(linears.iter().copied());
    for (first, part) in parts(linears, dropout) {
        let (k, rank) = (part[0].in_features, ranks(part.iter().copied()));
        let x = dropped(part, x, dropout, &mut scratch.dropped);
        let stacked = sized(&mut scratch.stacked, rank * k);
        let mut rest = &mut *stacked;
        for lora in part.iter().filter_map(|linear| linear.lora.as_ref()) {
            let (to, others) = rest.split_at_mut(lora.a.len());
            to.copy_from_slice(&params[lora.a.clone()]);
            rest = others;
        }
        let a = Rhs::View(MatRef::rows(stacked, k).t());
        gemm(x.len() / k, rank, &[Term::new(k, MatRef::rows(x, k), a)], Out::set(&mut u[first..], width));
    }
}

/// Computes the outputs of linears that share the input `x: [T, in]`, and keeps the adapters' projections `u: [T, Σ r]`.
pub fn forward<const N: usize>(
    linears: [(&Linear, Out); N],
    params: &[f32],
    x: &[f32],
    u: &mut [f32],
    dropout: Option<&Dropout>,
    scratch: &mut LinearScratch,
) {
    let shared = linears.each_ref().map(|(linear, _)| *linear);
    project(&shared, params, x, u, dropout, scratch);
    let u = MatRef::rows(u, ranks(shared));
    let mut first = 0;
    for (linear, y) in linears {
        linear.forward(params, x, u.from(0, first), scratch, y);
        first += linear.rank();
    }
}

/// One linear of a backward, with the gradient `g: [T, out]` of its output.
pub struct Branch<'a> {
    pub linear: &'a Linear,
    pub g: &'a [f32],
}

/// What linears that share an input read: it, `x: [T, in]`, and the `u: [T, Σ r]` their forward kept.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub x: &'a [f32],
    pub u: &'a [f32],
}

fn linears<'a>(branches: &[Branch<'a>]) -> ArrayVec<&'a Linear, MAX_BRANCHES> {
    branches.iter().map(|branch| branch.linear).collect()
}

/// First part of a backward: the adapters' `v = s·g·B: [T, Σ r]`, kept in `scratch` for the other two parts.
pub fn project_gradients(branches: &[Branch], params: &[f32], tokens: usize, scratch: &mut LinearScratch) {
    let width = ranks(linears(branches));
    let v = sized(&mut scratch.low_rank, tokens * width);
    let mut first = 0;
    for Branch { linear, g } in branches {
        let Some(lora) = &linear.lora else { continue };
        let _span = span(Operation::LowRank);
        let b = Rhs::View(MatRef::rows(&params[lora.b.clone()], lora.r));
        let n = linear.out_features;
        let term = Term::scaled(n, MatRef::rows(g, n), b, lora.scaling);
        gemm(tokens, lora.r, &[term], Out::set(&mut v[first..], width));
        first += lora.r;
    }
}

/// Second part: adds the parameter gradients of linears that share an input to `grads`.
pub fn parameter_gradients(
    branches: &[Branch],
    grads: &mut [f32],
    Input { x, u }: Input,
    dropout: Option<&Dropout>,
    scratch: &mut LinearScratch,
) {
    let linears = linears(branches);
    let Some(tokens) = linears.first().map(|linear| x.len() / linear.in_features) else { return };
    let width = ranks(linears.iter().copied());
    let LinearScratch { dropped, low_rank, stacked, b_gradient, .. } = scratch;
    let v = MatRef::rows(low_rank, width);
    // dA += vᵀ·drop(x)
    for (first, part) in parts(&linears, dropout) {
        let _span = span(Operation::LowRank);
        let (k, rank) = (part[0].in_features, ranks(part.iter().copied()));
        let x = self::dropped(part, x, dropout, dropped);
        let gradients = sized(stacked, rank * k);
        let term = Term::new(tokens, v.from(0, first).t(), Rhs::View(MatRef::rows(x, k)));
        let mut rest = &*gemm(rank, k, &[term], Out::set(gradients, k));
        for lora in part.iter().filter_map(|linear| linear.lora.as_ref()) {
            let (from, others) = rest.split_at(lora.a.len());
            vector::add(&mut grads[lora.a.clone()], from);
            rest = others;
        }
    }
    let u = MatRef::rows(u, width);
    let mut first = 0;
    for Branch { linear, g } in branches {
        let (k, n) = (linear.in_features, linear.out_features);
        if let Some(lora) = &linear.lora {
            let _span = span(Operation::LowRank);
            // dB += s·gᵀ·u; its transpose has few rows, so that g is read as it lies.
            let r = lora.r;
            let transposed = sized(b_gradient, r * n);
            let term = Term::new(tokens, u.from(0, first).t(), Rhs::View(MatRef::rows(g, n)));
            gemm(r, n, &[term], Out::set(transposed, n));
            vector::add_transposed(&mut grads[lora.b.clone()], transposed, r, lora.scaling);
            first += r;
        }
        if let Some(range) = linear.weight.range() {
            let _span = span(Operation::WeightGradient);
            let term = Term::new(tokens, MatRef::rows(g, n).t(), Rhs::View(MatRef::rows(x, k)));
            gemm(n, k, &[term], Out::add(&mut grads[range], k));
        }
        if let Some(db) = linear.bias.as_ref().and_then(|b| b.gradient(grads)) {
            vector::add_column_sums(&g[..tokens * n], db);
        }
    }
}

/// Third part: the gradient `dx: [T, in]` of the shared input.
pub fn input_gradient(
    branches: &[Branch],
    params: &[f32],
    tokens: usize,
    dropout: Option<&Dropout>,
    scratch: &mut LinearScratch,
    dx: &mut [f32],
) {
    let Some(first) = branches.first() else { return };
    let k = first.linear.in_features;
    let LinearScratch { dropped, low_rank, quantized, calibration, .. } = scratch;
    for (Branch { linear, g }, rows) in branches.iter().zip(quantized.iter_mut()) {
        if let Some(calibration) = calibration {
            calibration.backward(linear, g);
        }
        if let Some(weight) = &linear.int8 {
            let _span = span(Operation::Quantize);
            rows.quantize_gradient(g, weight, linear.gradient_rounding);
        }
    }
    let _span = span(Operation::Linear);
    let sources: ArrayVec<_, MAX_BRANCHES> = branches.iter().map(|b| b.linear.weight.source(params)).collect();
    let mut terms = ArrayVec::<Term, { 2 * MAX_BRANCHES }>::new();
    let v = MatRef::rows(low_rank, ranks(self::linears(branches)));
    let mut column = 0;
    for ((Branch { linear, g }, source), rows) in branches.iter().zip(&sources).zip(&*quantized) {
        let n = linear.out_features;
        terms.push(match &linear.int8 {
            Some(weight) => Term::int8_plain(rows, weight),
            None => Term::new(n, MatRef::rows(g, n), Rhs::Plain(source.panel())),
        });
        if let Some(lora) = &linear.lora {
            if dropout.is_none() || lora.dropout == 0.0 {
                let a = Rhs::View(MatRef::rows(&params[lora.a.clone()], k));
                terms.push(Term::new(lora.r, v.from(0, column), a));
            }
            column += lora.r;
        }
    }
    gemm(tokens, k, &terms, Out::set(&mut *dx, k));
    let Some(dropout) = dropout else { return };
    // With dropout the adapter's share of the input gradient passes through the mask on its way: dx += mask ⊙ (v·A).
    let mut column = 0;
    for lora in branches.iter().filter_map(|b| b.linear.lora.as_ref()) {
        if lora.dropout > 0.0 {
            let (raw, masked) = sized(dropped, 2 * tokens * k).split_at_mut(tokens * k);
            let a = Rhs::View(MatRef::rows(&params[lora.a.clone()], k));
            gemm(tokens, k, &[Term::new(lora.r, v.from(0, column), a)], Out::set(raw, k));
            dropout.apply(lora, raw, k, masked);
            vector::add(&mut dx[..tokens * k], masked);
        }
        column += lora.r;
    }
}

/// All three parts, for an input that is at hand: adds the parameter gradients to `grads` and writes the input's gradient where it is
/// asked for.
pub fn backward(
    branches: &[Branch],
    params: &[f32],
    grads: &mut [f32],
    input: Input,
    dropout: Option<&Dropout>,
    scratch: &mut LinearScratch,
    dx: Option<&mut [f32]>,
) {
    let Some(first) = branches.first() else { return };
    let tokens = input.x.len() / first.linear.in_features;
    project_gradients(branches, params, tokens, scratch);
    parameter_gradients(branches, grads, input, dropout, scratch);
    if let Some(dx) = dx {
        input_gradient(branches, params, tokens, dropout, scratch, dx);
    }
}
