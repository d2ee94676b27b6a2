//! The memory of a pass: what the forward keeps for the backward, and the buffers both work in. It is allocated for the largest pass and
//! reused, so a steady step allocates nothing.

use std::ops::Range;

use retune_kernels::attention::{self, Segment};
use retune_kernels::{bf16, rope};
use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::linear::{self, LinearScratch};
use crate::model::{Layer, Model};
use crate::pass::PassSize;

/// Most bytes of logits that exist at once: the head works through the label tokens in blocks of rows. In f32 each block decodes and packs
/// the whole head, so blocks are large; in 8 bits the head lies ready, and smaller ones cost nothing (where rows are
/// scored, which is in f32, there is one of each).
const LOGITS_BYTES: usize = 104 << 20;
const INT8_LOGITS_BYTES: usize = 52 << 20;

/// What is kept of each layer's activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// All that the backward reads.
    Activations,
    /// The same, rounded to bfloat16.
    RoundedActivations,
    /// The layer's input alone; the backward reruns the layer (`activation_checkpointing: layer`).
    Inputs,
    /// Nothing: for evaluation and generation.
    Nothing,
}

/// What the backward of a layer reads beside its input; T tokens, D hidden, F intermediate, Q = heads · head_dim, K = key heads ·
/// head_dim. Norms are recomputed.
#[derive(Default)]
pub struct LayerSaved<T = f32> {
    /// Queries after rotation, `[T, Q]`.
    pub q: Vec<T>,
    /// Keys after rotation, `[T, K]`.
    pub k: Vec<T>,
    /// Values, `[T, K]`.
    pub v: Vec<T>,
    /// Attention output before the output projection, `[T, Q]`.
    pub attention: Vec<T>,
    /// Log-sum-exp of each query's scores, `[T, heads]`; never rounded, since an exponential is taken of it.
    pub lse: Vec<f32>,
    /// Residual stream after attention, `[T, D]`.
    pub residual: Vec<T>,
    /// `[T, F]`
    pub gate: Vec<T>,
    /// `[T, F]`
    pub up: Vec<T>,
    /// The adapters' inputs projected by A, `[T, Σ r]`: for each of `Layer::SHARED_INPUTS`.
    pub u: [Vec<T>; 4],
}

impl<T: Copy + Default> LayerSaved<T> {
    /// Makes every buffer hold `tokens` tokens, with adapters of these ranks.
    fn reserve(&mut self, c: &ModelConfig, tokens: usize, ranks: [usize; 4]) {
        let (wide, narrow) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        grow(&mut self.q, tokens * wide);
        grow(&mut self.k, tokens * narrow);
        grow(&mut self.v, tokens * narrow);
        grow(&mut self.attention, tokens * wide);
        grow(&mut self.lse, tokens * c.num_attention_heads);
        grow(&mut self.residual, tokens * c.hidden_size);
        grow(&mut self.gate, tokens * c.intermediate_size);
        grow(&mut self.up, tokens * c.intermediate_size);
        for (u, ranks) in self.u.iter_mut().zip(ranks) {
            grow(u, tokens * ranks);
        }
    }
}

/// A layer's input and what it saved, rounded to bfloat16 where they come into being.
#[derive(Default)]
pub struct RoundedLayer {
    /// `[T, D]`
    pub x: Vec<u16>,
    pub saved: LayerSaved<u16>,
}

/// Buffers that hold nothing between layers.
#[derive(Default)]
pub struct Temporary {
    /// A norm's output, `[T, D]`.
    pub norm: Vec<f32>,
    /// The activation's output or its gradient, `[T, F]`.
    pub hidden: Vec<f32>,
    /// Gradient of the residual stream, `[T, D]`.
    pub dx: Vec<f32>,
    /// Gradient of a norm's output, `[T, D]`.
    pub dnorm: Vec<f32>,
    /// `[T, Q]`
    pub dattention: Vec<f32>,
    /// `[T, Q]`
    pub dq: Vec<f32>,
    /// `[T, K]`
    pub dk: Vec<f32>,
    /// `[T, K]`
    pub dv: Vec<f32>,
    /// Keys and values of the rows laid whole, where rows share tokens, and their gradients, `[Σ row, K]` each.
    pub whole: [Vec<f32>; 2],
    pub dwhole: [Vec<f32>; 2],
    pub linear: LinearScratch,
    pub segments: Vec<Segment>,
}

/// Buffers of the head, for a block of R label tokens.
#[derive(Default)]
pub struct HeadBuffers {
    /// Rows of the last layer's output, `[R, D]`.
    pub rows: Vec<f32>,
    /// The same, normalised, `[R, D]`.
    pub norm: Vec<f32>,
    /// Gradient of `norm`, then of `rows`, `[R, D]` each.
    pub dnorm: Vec<f32>,
    pub drows: Vec<f32>,
    /// `[R, V]`
    pub logits: Vec<f32>,
    pub targets: Vec<u32>,
    /// The gradient of each label's own logit, `[R]`, in 8 bits.
    pub label_gradients: Vec<f32>,
    /// The adapter's projection, where the head has one, `[R, r]`.
    pub u: Vec<f32>,
}

/// Everything a pass works in.
pub struct Workspace {
    pub keep: Keep,
    /// Inputs of the layers and the output of the last, `[T, D]` each; two in turn when they are not kept, or kept rounded.
    pub x: Vec<Vec<f32>>,
    pub layers: Vec<LayerSaved>,
    pub rounded: Vec<RoundedLayer>,
    /// Tokens of the largest pass so far.
    most_tokens: usize,
    pub temporary: Temporary,
    pub head: HeadBuffers,
    pub rope: rope::Table,
    /// The loss of each label of the last pass.
    pub losses: Vec<f32>,
}

/// Grows a buffer to `len` elements, so that its pages are taken only as they are used.
pub(crate) fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        // The old memory goes before the new is taken.
        *buffer = Vec::new();
        *buffer = vec![T::default(); len];
    }
}

impl Workspace {
    /// An empty workspace; it grows to the largest pass it sees.
    pub fn new(model: &Model, keep: Keep) -> Self {
        Self::for_passes(model, keep, 0)
    }

    /// A workspace that is made for passes of `tokens` tokens when the first one comes.
    pub fn for_passes(model: &Model, keep: Keep, tokens: usize) -> Self {
        let layers = model.layers.len();
        let (inputs, saved) = match keep {
            Keep::Activations => (layers + 1, layers),
            Keep::Inputs => (layers + 1, 1),
            // The last layer's output is kept beside the two.
            Keep::RoundedActivations => (3, 1),
            Keep::Nothing => (2, 1),
        };
        let rounded = if keep == Keep::RoundedActivations { layers } else { 0 };
        Self {
            keep,
            x: (0..inputs).map(|_| Vec::new()).collect(),
            layers: (0..saved).map(|_| LayerSaved::default()).collect(),
            rounded: (0..rounded).map(|_| RoundedLayer::default()).collect(),
            most_tokens: tokens,
            temporary: Temporary::default(),
            head: HeadBuffers::default(),
            rope: rope::Table::new(model.config.rope.inverse_frequencies(model.config.head_dim)),
            losses: Vec::new(),
        }
    }

    /// Rows of logits that exist at once in a pass of `labels` labels: blocks of equal size.
    pub fn head_rows(model: &Model, int8: bool, labels: usize) -> usize {
        let most = Self::most_head_rows(model, int8);
        labels.div_ceil(labels.div_ceil(most).max(1)).max(1)
    }

    fn most_head_rows(model: &Model, int8: bool) -> usize {
        let bytes = if int8 { INT8_LOGITS_BYTES } else { LOGITS_BYTES };
        (bytes / (4 * model.config.vocab_size)).max(16)
    }

    /// Where the input of layer `l` is kept in a pass that will (`backward`) or will not be followed by its backward.
    pub(crate) fn input(&self, l: usize, backward: bool) -> usize {
        match self.keep {
            Keep::Activations | Keep::Inputs if backward => l,
            Keep::RoundedActivations if backward && l == self.rounded.len() => 2,
            _ => l % 2,
        }
    }

    /// Where what layer `l` saves is kept.
    pub(crate) fn saved(&self, l: usize, backward: bool) -> usize {
        if backward && self.keep == Keep::Activations { l } else { 0 }
    }

    /// Whether `range` of the input of layer `l` of the last pass with a backward is finite; the number of layers stands for the output of
    /// the last.
    pub(crate) fn input_is_finite(&self, l: usize, range: std::ops::Range<usize>) -> bool {
        match self.rounded.get(l) {
            Some(rounded) => rounded.x[range].iter().all(|&v| bf16::is_finite(v)),
            None => self.x[self.input(l, true)][range].iter().all(|v| v.is_finite()),
        }
    }

    /// Makes every buffer hold a pass of `tokens` tokens up to `positions` long.
    pub(crate) fn reserve(&mut self, model: &Model, tokens: usize, positions: usize, backward: bool) {
        let c = &model.config;
        let (q, k) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        self.rope.grow(positions);
        let tokens = tokens.max(self.most_tokens);
        self.most_tokens = tokens;
        let (inputs, saved) = match (backward, self.keep) {
            (true, Keep::Activations) => (self.x.len(), self.layers.len()),
            (true, Keep::Inputs) => (self.x.len(), 1),
            (true, Keep::RoundedActivations) => (3, 1),
            _ => (2, 1),
        };
        self.x[..inputs].iter_mut().for_each(|x| grow(x, tokens * c.hidden_size));
        let ranks = |range: Range<usize>| {
            let of_layer = |layer: &Layer| linear::ranks(layer.linears()[range.clone()].iter().copied());
            model.layers.iter().map(of_layer).max().unwrap_or(0)
        };
        let ranks = Layer::SHARED_INPUTS.map(ranks);
        // A workspace with one saved layer serves all of them.
        self.layers[..saved].iter_mut().for_each(|saved| saved.reserve(c, tokens, ranks));
        if backward {
            for rounded in &mut self.rounded {
                grow(&mut rounded.x, tokens * c.hidden_size);
                rounded.saved.reserve(c, tokens, ranks);
            }
        }
        let t = &mut self.temporary;
        grow(&mut t.norm, tokens * c.hidden_size);
        grow(&mut t.hidden, tokens * c.intermediate_size);
        if backward {
            grow(&mut t.dx, tokens * c.hidden_size);
            grow(&mut t.dnorm, tokens * c.hidden_size);
            grow(&mut t.dattention, tokens * q);
            grow(&mut t.dq, tokens * q);
            grow(&mut t.dk, tokens * k);
            grow(&mut t.dv, tokens * k);
        }
    }

    /// Bytes that a training pass of this size will make the workspace take: the plan shown before training. `int8` says whether the
    /// base will be computed in 8 bits. Scratch memory of the kernels is included.
    pub fn planned_bytes(model: &Model, keep: Keep, int8: bool, size: PassSize) -> usize {
        let PassSize { tokens, row_tokens, labels, scored_labels, is_shared } = size;
        let c = &model.config;
        let (q, k) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let ranks: usize = model.layers.iter().map(|l| l.linears().iter().map(|l| l.rank()).sum::<usize>()).sum();
        let per_layer = 2 * q + 2 * k + d + 2 * f;
        let (heads, layers) = (c.num_attention_heads, model.layers.len());
        let one = per_layer + heads + ranks / layers.max(1);
        // Counted in halves of four bytes.
        let saved = match keep {
            Keep::Activations => 2 * (layers * (per_layer + heads + d) + ranks + d),
            Keep::RoundedActivations => layers * (per_layer + d + 2 * heads) + ranks + 2 * (one + 3 * d),
            Keep::Inputs => 2 * (one + (layers + 1) * d),
            Keep::Nothing => 2 * (one + 2 * d),
        };
        let temporary = 3 * d + f + 2 * q + 2 * k;
        let attention = row_tokens * attention::BACKWARD_SCRATCH * q;
        let whole = if is_shared { row_tokens * 4 * k } else { 0 };
        let int8 = int8 && !model.head.is_trainable();
        let rows = Self::most_head_rows(model, int8).min(labels);
        let scored_rows = Self::most_head_rows(model, false).min(scored_labels);
        let head = rows.max(scored_rows) * (4 * d + c.vocab_size);
        // In 8 bits the head's gradient is quantized beside the logits.
        let quantized = if int8 { rows * c.vocab_size / 4 } else { 0 };
        let dropped = if model.has_dropout() { 2 * tokens * f.max(q).max(d) } else { 0 };
        let packing = 3 << 20;
        2 * tokens * saved + 4 * (tokens * temporary + attention + whole + head + quantized + dropped + packing)
    }
}
