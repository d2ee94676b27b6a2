//! The frozen base: a spec and its matrices, which stay in their storage. Immutable, and shared by all who run it.

use retune_kernels::attention::{self, Scores};
use retune_kernels::heads::HeadLayout;
use retune_kernels::int8::Rounding;
use retune_quant::Matrix;

use crate::spec::{self, Mix, ModelSpec, NormKind, Order, Positions, QueryScale};

/// Where a model's tensors come from.
pub trait Weights {
    type Error;

    /// A tensor by its name in the spec, a linear's weight as `[out, in]`, a vector as `[1, n]`.
    ///
    /// # Errors
    /// A tensor that is missing or cannot be read.
    fn tensor(&self, name: &str) -> Result<Matrix, Self::Error>;
}

/// A linear's number: its place in [`ModelSpec::linears`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinearId(pub usize);

/// A norm weight's or a bias's number: its place in the order of the forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VectorId(pub usize);

/// A model in memory.
pub struct Model {
    pub spec: ModelSpec,
    /// The token embedding, `[vocab_size, hidden_size]`.
    pub(crate) table: Matrix,
    /// Learned positions, `[context, hidden_size]`.
    pub(crate) positions: Option<Matrix>,
    pub(crate) table_norm: Option<Norm>,
    pub(crate) encoder: Option<Stack>,
    pub(crate) decoder: Stack,
    pub(crate) head: LinearId,
    pub(crate) linears: Vec<Linear>,
    /// Norm weights, biases and biases by distance, decoded.
    pub(crate) vectors: Vec<Vec<f32>>,
    /// Where the keys and the values of a prefix lie in rows that hold those of all attentions, for each of them.
    pub(crate) prefix_places: Vec<[HeadLayout; 2]>,
    names: Vec<String>,
}

/// Sub-layers one after the other, ready to run.
pub(crate) struct Stack {
    /// In the order of the forward.
    pub sub_layers: Vec<SubLayer>,
    pub norm: Norm,
    /// The biases of attentions that take theirs from buckets.
    pub buckets: Option<Buckets>,
}

/// Biases by distance and their table `[count, heads]`.
pub(crate) struct Buckets {
    pub table: VectorId,
    pub spec: spec::Buckets,
}

impl Stack {
    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.sub_layers.last().map_or(0, |s| s.block + 1)
    }

    /// Sub-layers of the largest block.
    pub fn places(&self) -> usize {
        self.sub_layers.iter().map(|s| s.place + 1).max().unwrap_or(0)
    }
}

/// A frozen linear.
pub struct Linear {
    /// The module.
    pub name: String,
    /// `[out, in]`
    pub weight: Matrix,
    pub bias: Option<VectorId>,
    /// How the gradient of its output is rounded where it is computed in 8 bits.
    pub gradient_rounding: Rounding,
}

impl Linear {
    /// Output features.
    pub fn rows(&self) -> usize {
        self.weight.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.weight.cols()
    }
}

/// A norm with its vectors.
pub(crate) struct Norm {
    pub weight: VectorId,
    pub bias: Option<VectorId>,
    pub kind: NormKind,
    pub eps: f32,
}

impl Norm {
    /// The vectors it has.
    pub fn vectors(&self) -> impl Iterator<Item = VectorId> {
        [self.weight].into_iter().chain(self.bias)
    }
}

/// A sub-layer, ready to run.
pub(crate) struct SubLayer {
    /// The block it is part of, and its place there.
    pub block: usize,
    pub place: usize,
    pub norm: Norm,
    pub inputs: Vec<LinearId>,
    /// Elements from one row of the inputs' outputs, side by side, to the next.
    pub inner: usize,
    pub middle: Middle,
    pub output: LinearId,
    pub post_norm: Option<Norm>,
}

/// What stands between inputs and output.
pub(crate) enum Middle {
    Attention(Box<Attention>),
    Activation { function: spec::Function, gated: bool, width: usize },
}

/// An attention with the places of its heads in the inputs' output.
pub(crate) struct Attention {
    pub scores: Scores<'static>,
    pub q: HeadLayout,
    pub k: HeadLayout,
    pub v: HeadLayout,
    /// Where keys and values come from, if not from the inputs.
    pub memory: Option<Memory>,
    /// Its number among the attentions that a prefix precedes, in [`Model::prefix_places`].
    pub number: Option<usize>,
    /// The biases by distance, from the stack's buckets.
    pub buckets: Option<VectorId>,
    pub qk_norm: Option<[Norm; 2]>,
    /// The spec's rotation that queries and keys are turned by.
    pub rope: Option<usize>,
    /// Factor on queries after that.
    pub query_scale: Option<QueryScale>,
}

/// The linears that make keys and values of the encoder's output; `k` and `v` say where in their output these lie.
pub(crate) struct Memory {
    pub linears: Vec<LinearId>,
    /// Elements from one row of their outputs, side by side, to the next.
    pub row: usize,
}

impl SubLayer {
    /// The vectors whose gradient needs that of the mix's input.
    pub fn vectors_before_mix(&self) -> impl Iterator<Item = VectorId> {
        let qk_norm = match &self.middle {
            Middle::Attention(attention) => attention.qk_norm.as_ref().map_or(&[][..], |norms| &norms[..]),
            Middle::Activation { .. } => &[],
        };
        self.norm.vectors().chain(qk_norm.iter().flat_map(Norm::vectors))
    }

    /// Columns of the output's input.
    pub fn mixed(&self) -> usize {
        match &self.middle {
            Middle::Attention(attention) => attention.scores.queries * attention.scores.head_dim,
            Middle::Activation { width, .. } => *width,
        }
    }

    /// Its attention, if it is one.
    pub fn attention(&self) -> Option<&Attention> {
        match &self.middle {
            Middle::Attention(attention) => Some(attention),
            Middle::Activation { .. } => None,
        }
    }

    /// What it makes of the encoder's output, if it looks at that.
    pub fn memory(&self) -> Option<&Memory> {
        self.attention()?.memory.as_ref()
    }

    /// The linears that read the encoder's output.
    pub fn memory_linears(&self) -> &[LinearId] {
        self.memory().map_or(&[], |memory| &memory.linears)
    }
}

/// A row a cache line longer where rows would lie a multiple of half a page apart: all rows of a tile would fall into the same few sets of
/// the first-level cache.
pub(crate) fn padded(row: usize) -> usize {
    const HALF_PAGE: usize = 512;
    const LINE: usize = 16;
    if row > 0 && row.is_multiple_of(HALF_PAGE) { row + LINE } else { row }
}

/// Puts a model together, numbering linears and vectors in the order of the forward.
struct Builder<'a, W> {
    weights: &'a W,
    linears: Vec<Linear>,
    vectors: Vec<Vec<f32>>,
    names: Vec<String>,
    /// The biases by distance of the stack that is being built.
    buckets: Option<VectorId>,
    /// Whether a prefix precedes that stack's attentions.
    takes_prefix: bool,
    prefix_places: Vec<[HeadLayout; 2]>,
    /// Elements of a row that holds the keys and values of all of them, and where those of the next begin in it.
    key_value_width: usize,
    next_key: usize,
}

impl<W: Weights> Builder<'_, W> {
    fn vector(&mut self, name: String) -> Result<VectorId, W::Error> {
        self.vectors.push(self.weights.tensor(&name)?.to_f32());
        self.names.push(name);
        Ok(VectorId(self.vectors.len() - 1))
    }

    fn norm(&mut self, norm: &spec::Norm) -> Result<Norm, W::Error> {
        let weight = self.vector(format!("{}.weight", norm.name))?;
        let bias = norm.has_bias().then(|| self.vector(format!("{}.bias", norm.name))).transpose()?;
        Ok(Norm { weight, bias, kind: norm.kind, eps: norm.eps })
    }

    fn linear(&mut self, linear: &spec::Linear, weight: Matrix) -> Result<LinearId, W::Error> {
        let bias = linear.bias.then(|| self.vector(format!("{}.bias", linear.name))).transpose()?;
        self.linears.push(Linear { name: linear.name.clone(), weight, bias, gradient_rounding: Rounding::Nearest });
        Ok(LinearId(self.linears.len() - 1))
    }

    fn stored_linear(&mut self, linear: &spec::Linear) -> Result<LinearId, W::Error> {
        let weight = self.weights.tensor(&format!("{}.weight", linear.name))?;
        self.linear(linear, weight)
    }

    fn sub_layer(&mut self, block: usize, place: usize, s: &spec::SubLayer) -> Result<SubLayer, W::Error> {
        let norm = self.norm(&s.norm)?;
        let mut inputs = Vec::with_capacity(s.inputs.len());
        for linear in &s.inputs {
            inputs.push(self.stored_linear(linear)?);
        }
        let mut inner = padded(s.inner());
        let middle = match &s.mix {
            Mix::Attention(attention) => Middle::Attention(Box::new(self.attention(attention, inner)?)),
            Mix::Cross(cross) => Middle::Attention(Box::new(self.cross_attention(cross, inner)?)),
            Mix::Activation { function, gated: true } => {
                Middle::Activation { function: *function, gated: true, width: s.inner() / 2 }
            }
            Mix::Activation { function, gated: false } => {
                inner = s.inner();
                Middle::Activation { function: *function, gated: false, width: inner }
            }
        };
        let output = self.stored_linear(&s.output)?;
        let post_norm = s.post_norm.as_ref().map(|norm| self.norm(norm)).transpose()?;
        Ok(SubLayer { block, place, norm, inputs, inner, middle, output, post_norm })
    }

    fn attention(&mut self, a: &spec::Attention, row: usize) -> Result<Attention, W::Error> {
        let d = a.head_dim;
        let layout = |heads: usize, first: usize, head: usize| HeadLayout { row, first, head, heads, head_dim: d };
        let [q, k, v] = match a.order {
            Order::Planes => {
                [layout(a.queries, 0, d), layout(a.keys, a.queries * d, d), layout(a.keys, (a.queries + a.keys) * d, d)]
            }
            Order::Heads => [0, 1, 2].map(|part| layout(a.queries, part * d, 3 * d)),
        };
        let number = self.takes_prefix.then_some(self.prefix_places.len());
        if self.takes_prefix {
            let in_prefix = |first| HeadLayout { row: self.key_value_width, ..layout(a.keys, first, d) };
            self.prefix_places.push([0, a.keys * d].map(|first| in_prefix(self.next_key + first)));
            self.next_key += a.key_value_width();
        }
        let qk_norm = match &a.qk_norm {
            Some([q, k]) => Some([self.norm(q)?, self.norm(k)?]),
            None => None,
        };
        let rope = if let Positions::Rope(rope) = a.positions { Some(rope) } else { None };
        let buckets = self.buckets.filter(|_| a.positions == Positions::Buckets);
        let slopes = (a.positions == Positions::Alibi).then(|| attention::alibi_slopes(a.queries).into());
        let (causal, window, soft_cap) = (a.causal, a.window, a.soft_cap);
        let scores = Scores { causal, window, soft_cap, slopes, ..Scores::new(a.queries, a.keys, d, a.scale) };
        Ok(Attention { scores, q, k, v, memory: None, number, buckets, qk_norm, rope, query_scale: a.query_scale })
    }

    fn cross_attention(&mut self, a: &spec::CrossAttention, inner: usize) -> Result<Attention, W::Error> {
        let (heads, head_dim) = (a.heads, a.head_dim);
        let width = heads * head_dim;
        let row = padded(2 * width);
        let layout = |row, first| HeadLayout { row, first, head: head_dim, heads, head_dim };
        let mut linears = Vec::with_capacity(a.memory.len());
        for linear in &a.memory {
            linears.push(self.stored_linear(linear)?);
        }
        Ok(Attention {
            scores: Scores { causal: false, ..Scores::new(heads, heads, head_dim, a.scale) },
            q: layout(inner, 0),
            k: layout(row, 0),
            v: layout(row, width),
            memory: Some(Memory { linears, row }),
            number: None,
            buckets: None,
            qk_norm: None,
            rope: None,
            query_scale: None,
        })
    }

    fn stack(&mut self, stack: &spec::Stack, takes_prefix: bool) -> Result<Stack, W::Error> {
        let buckets = match &stack.buckets {
            Some(spec) => Some(Buckets { table: self.vector(format!("{}.weight", spec.name))?, spec: spec.clone() }),
            None => None,
        };
        (self.buckets, self.takes_prefix) = (buckets.as_ref().map(|buckets| buckets.table), takes_prefix);
        let mut sub_layers = Vec::new();
        for (block, of_block) in stack.blocks.iter().enumerate() {
            for (place, sub_layer) in of_block.sub_layers.iter().enumerate() {
                sub_layers.push(self.sub_layer(block, place, sub_layer)?);
            }
        }
        Ok(Stack { sub_layers, norm: self.norm(&stack.norm)?, buckets })
    }
}

impl Model {
    /// Puts a model together from its tensors. Matrices stay in their storage.
    ///
    /// # Errors
    /// A tensor that is missing or cannot be read.
    pub fn load<W: Weights>(spec: ModelSpec, weights: &W) -> Result<Self, W::Error> {
        let mut b = Builder {
            weights,
            linears: Vec::new(),
            vectors: Vec::new(),
            names: Vec::new(),
            buckets: None,
            takes_prefix: false,
            prefix_places: Vec::new(),
            key_value_width: spec.key_value_width(),
            next_key: 0,
        };
        let table = weights.tensor(&format!("{}.weight", spec.table.name))?;
        let positions = match &spec.table.positions {
            Some(name) => Some(weights.tensor(&format!("{name}.weight"))?),
            None => None,
        };
        let table_norm = spec.table.norm.as_ref().map(|norm| b.norm(norm)).transpose()?;
        let encoder = spec.encoder.as_ref().map(|encoder| b.stack(&encoder.stack, false)).transpose()?;
        let decoder = b.stack(&spec.decoder, true)?;
        let head = match spec.head.tied {
            true => b.linear(&spec.head.linear, table.clone())?,
            false => b.stored_linear(&spec.head.linear)?,
        };
        // The gradient of the logits is a vocabulary of small probabilities.
        b.linears[head.0].gradient_rounding = Rounding::Stochastic;
        let Builder { linears, vectors, prefix_places, names, .. } = b;
        Ok(Self { spec, table, positions, table_norm, encoder, decoder, head, linears, vectors, prefix_places, names })
    }

    /// The encoder, if there is one, and the decoder.
    pub(crate) fn stacks(&self) -> impl Iterator<Item = &Stack> {
        self.encoder.iter().chain([&self.decoder])
    }

    /// All sub-layers in the order of the forward.
    pub(crate) fn sub_layers(&self) -> impl Iterator<Item = &SubLayer> {
        self.stacks().flat_map(|stack| &stack.sub_layers)
    }

    /// A linear by its number.
    pub fn linear(&self, linear: LinearId) -> &Linear {
        &self.linears[linear.0]
    }

    /// The linears, in the order of their numbers, the head last.
    pub fn linears(&self) -> &[Linear] {
        &self.linears
    }

    /// The names of the norm weights and biases, in the order of their numbers.
    pub fn vector_names(&self) -> &[String] {
        &self.names
    }

    /// Bytes of the stored token embedding, which every pass reads rows of.
    pub fn table_bytes(&self) -> usize {
        self.table.bytes_len()
    }
}
