//! The memory of a pass: what the forward keeps for the backward, and the buffers both work in. It is allocated for the largest pass and
//! reused, so a steady step allocates nothing.

use retune_kernels::attention::Segment;
use retune_kernels::rope;

use crate::linear::LinearScratch;
use crate::model::Model;

/// Most bytes of logits that exist at once: the head works through the label tokens in blocks of rows. Each block reads and packs the
/// whole head, so blocks are as large as that allows.
const LOGITS_BYTES: usize = 104 << 20;

/// What is kept of each layer's activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All that the backward reads.
    Activations,
    /// The layer's input alone; the backward reruns the layer (`activation_checkpointing: layer`).
    Inputs,
    /// Nothing: for evaluation and generation.
    Nothing,
}

/// What the backward of a layer reads beside its input; T tokens, D hidden, F intermediate, Q = heads · head_dim, K = key heads ·
/// head_dim. Norms are recomputed.
#[derive(Default)]
pub struct LayerSaved {
    /// Queries after rotation, `[T, Q]`.
    pub q: Vec<f32>,
    /// Keys after rotation, `[T, K]`.
    pub k: Vec<f32>,
    /// Values, `[T, K]`.
    pub v: Vec<f32>,
    /// Attention output before the output projection, `[T, Q]`.
    pub attention: Vec<f32>,
    /// Log-sum-exp of each query's scores, `[T, heads]`.
    pub lse: Vec<f32>,
    /// Residual stream after attention, `[T, D]`.
    pub residual: Vec<f32>,
    /// `[T, F]`
    pub gate: Vec<f32>,
    /// `[T, F]`
    pub up: Vec<f32>,
    /// The adapters' inputs projected by A, `[T, r]`, in the order of [`crate::model::Layer::linears`].
    pub u: [Vec<f32>; 7],
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
    /// The adapter's projection, where the head has one, `[R, r]`.
    pub u: Vec<f32>,
}

/// Everything a pass works in.
pub struct Workspace {
    pub keep: Keep,
    /// Inputs of the layers and the output of the last, `[T, D]` each; two in turn when nothing is kept.
    pub x: Vec<Vec<f32>>,
    pub layers: Vec<LayerSaved>,
    pub temporary: Temporary,
    pub head: HeadBuffers,
    pub rope: rope::Table,
    /// The loss of each label of the last pass.
    pub losses: Vec<f32>,
}

/// Grows a buffer to `len` elements, so that its pages are taken only as they are used.
pub(crate) fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        // The old memory goes before the new is taken.
        *buffer = Vec::new();
        *buffer = vec![0.0; len];
    }
}

impl Workspace {
    /// An empty workspace; it grows to the largest pass it sees.
    pub fn new(model: &Model, keep: Keep) -> Self {
        let layers = model.layers.len();
        let (inputs, saved) = match keep {
            Keep::Activations => (layers + 1, layers),
            Keep::Inputs => (layers + 1, 1),
            Keep::Nothing => (2, 1),
        };
        Self {
            keep,
            x: (0..inputs).map(|_| Vec::new()).collect(),
            layers: (0..saved).map(|_| LayerSaved::default()).collect(),
            temporary: Temporary::default(),
            head: HeadBuffers::default(),
            rope: rope::Table::new(model.config.rope.inverse_frequencies(model.config.head_dim)),
            losses: Vec::new(),
        }
    }

    /// Rows of logits that exist at once in a pass of `labels` labels: blocks of equal size.
    pub fn head_rows(model: &Model, labels: usize) -> usize {
        let most = (LOGITS_BYTES / (4 * model.config.vocab_size)).max(16);
        labels.div_ceil(labels.div_ceil(most).max(1)).max(1)
    }

    /// Where the input of layer `l` is kept in a pass that will (`backward`) or will not be followed by its backward.
    pub(crate) fn input(&self, l: usize, backward: bool) -> usize {
        if backward && self.keep != Keep::Nothing { l } else { l % 2 }
    }

    /// Where what layer `l` saves is kept.
    pub(crate) fn saved(&self, l: usize, backward: bool) -> usize {
        if backward && self.keep == Keep::Activations { l } else { 0 }
    }

    /// Makes every buffer hold a pass of `tokens` tokens up to `positions` long.
    pub(crate) fn reserve(&mut self, model: &Model, tokens: usize, positions: usize, backward: bool) {
        let c = &model.config;
        let (q, k) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        self.rope.grow(positions);
        let (inputs, saved) = match (backward, self.keep) {
            (true, Keep::Activations) => (self.x.len(), self.layers.len()),
            (true, Keep::Inputs) => (self.x.len(), 1),
            _ => (2, 1),
        };
        self.x[..inputs].iter_mut().for_each(|x| grow(x, tokens * c.hidden_size));
        for (saved, layer) in self.layers[..saved].iter_mut().zip(&model.layers) {
            grow(&mut saved.q, tokens * q);
            grow(&mut saved.k, tokens * k);
            grow(&mut saved.v, tokens * k);
            grow(&mut saved.attention, tokens * q);
            grow(&mut saved.lse, tokens * c.num_attention_heads);
            grow(&mut saved.residual, tokens * c.hidden_size);
            grow(&mut saved.gate, tokens * c.intermediate_size);
            grow(&mut saved.up, tokens * c.intermediate_size);
            for (i, (u, linear)) in saved.u.iter_mut().zip(layer.linears()).enumerate() {
                // A workspace with one saved layer serves all of them.
                let rank = model.layers.iter().map(|l| l.linears()[i].rank()).max().unwrap_or(0);
                grow(u, tokens * rank.max(linear.rank()));
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

    /// Bytes that a training pass of `tokens` tokens with `labels` label tokens will make the workspace take: the plan shown before
    /// training. Scratch memory of the kernels is included.
    pub fn planned_bytes(model: &Model, keep: Keep, tokens: usize, labels: usize) -> usize {
        let c = &model.config;
        let (q, k) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let ranks: usize = model.layers.iter().map(|l| l.linears().iter().map(|l| l.rank()).sum::<usize>()).sum();
        let per_layer = 2 * q + 2 * k + c.num_attention_heads + d + 2 * f;
        let layers = model.layers.len();
        let saved = match keep {
            Keep::Activations => layers * per_layer + ranks,
            Keep::Inputs | Keep::Nothing => per_layer + ranks / layers.max(1),
        };
        let inputs = if keep == Keep::Nothing { 2 } else { layers + 1 };
        let temporary = 3 * d + f + 2 * q + 2 * k;
        let attention = 2 * q;
        let rows = Self::head_rows(model, labels);
        let head = rows * (4 * d + c.vocab_size);
        let packing = 3 << 20;
        4 * (tokens * (saved + inputs * d + temporary + attention) + head + packing)
    }
}
