//! What a model computes, as data: the engine runs any of these and knows no family.
//!
//! Names are transformers', so that the tensors a file must have, the modules an adapter may target, the keys of an adapter's file and an
//! export's tensors are all one walk over the same description.

use std::borrow::Cow;

pub use retune_kernels::activation::Function;

/// A transformer: a decoder alone, or one that looks at what an encoder makes of another text.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family's name: transformers' `model_type`.
    pub family: &'static str,
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Most positions the model was made for.
    pub context: usize,
    pub table: Table,
    pub encoder: Option<Encoder>,
    pub decoder: Stack,
    /// The rotations that attentions refer to by their number.
    pub ropes: Vec<Rope>,
    pub head: Head,
}

/// Blocks one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Stack {
    pub blocks: Vec<Block>,
    /// The norm after the last block.
    pub norm: Norm,
    /// The biases of attentions with [`Positions::Buckets`].
    pub buckets: Option<Buckets>,
}

/// What reads the text that the decoder answers. Its rows come from the same table, and the decoder's [`Mix::Cross`] looks at its normalised
/// output.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoder {
    pub stack: Stack,
    /// The id that stands before what the decoder writes.
    pub decoder_start: u32,
}

/// Biases on the scores by query head and distance, one for each bucket of distances (Raffel et al. 2020, section 2.1).
#[derive(Clone, Debug, PartialEq)]
pub struct Buckets {
    /// The module; its weight is `[count, heads]`.
    pub name: String,
    pub count: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Distances from here on fall into the last bucket.
    pub max_distance: usize,
    /// Whether keys after the query have buckets of their own, half of them; otherwise they fall into that of the query itself.
    pub bidirectional: bool,
}

/// The token embedding and what is done to its rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// The module; its weight is `[vocab_size, hidden_size]`.
    pub name: String,
    /// Factor on the rows as they are looked up; a tied head reads them without it.
    pub scale: f32,
    /// The module of learned positions, `[context, hidden_size]`, that are added.
    pub positions: Option<String>,
    /// The norm after that.
    pub norm: Option<Norm>,
}

/// Sub-layers whose activations are kept or computed again together: an attention and an MLP.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    pub sub_layers: Vec<SubLayer>,
}

/// `y = x + post_norm(mix(norm(x)·Wᵢᵀ)·Wₒᵀ)`: every attention and every MLP of every family.
#[derive(Clone, Debug, PartialEq)]
pub struct SubLayer {
    pub norm: Norm,
    /// The linears that read the norm's output. Their outputs lie side by side, in this order.
    pub inputs: Vec<Linear>,
    pub mix: Mix,
    pub output: Linear,
    pub post_norm: Option<Norm>,
}

/// What stands between a sub-layer's inputs and its output.
#[derive(Clone, Debug, PartialEq)]
pub enum Mix {
    Attention(Attention),
    Cross(CrossAttention),
    /// `f(x)`, or `f(gate) ⊙ up` where gated: the gate's columns come first.
    Activation {
        function: Function,
        gated: bool,
    },
}

/// Attention of all queries to all of the encoder's output, without positions.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossAttention {
    /// Number of heads, of queries as of keys and values.
    pub heads: usize,
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// The linears that make keys and values of the encoder's output.
    pub memory: [Linear; 2],
}

/// Attention with grouped heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Number of query heads.
    pub queries: usize,
    /// Number of key and value heads; each serves `queries / keys` query heads.
    pub keys: usize,
    pub head_dim: usize,
    pub order: Order,
    /// Norms over each head of the queries and of the keys, before rotation.
    pub qk_norm: Option<[Norm; 2]>,
    pub positions: Positions,
    /// Whether a query sees nothing that follows it; it sees the whole row otherwise.
    pub causal: bool,
    /// How many positions back a query sees, itself included; all of them otherwise. Only where it is causal.
    pub window: Option<usize>,
    /// Factor on the scores.
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Factor on rotated queries that grows with their position.
    pub query_scale: Option<QueryScale>,
}

/// `1 + beta · ln(1 + ⌊position / original⌋)`: attention that stays sharp beyond the length a model was first trained at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScale {
    pub beta: f32,
    pub original: usize,
}

impl QueryScale {
    /// The factor at a position.
    pub fn at(&self, position: u32) -> f32 {
        1.0 + self.beta * ((1 + position as usize / self.original) as f32).ln()
    }
}

/// Where queries, keys and values lie in a row of the inputs' output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// All queries, all keys, all values.
    Planes,
    /// Query, key and value of each head in turn.
    Heads,
}

/// How an attention knows positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Not at all, or from the table.
    None,
    /// Queries and keys are rotated by the spec's rotation of this number.
    Rope(usize),
    /// A bias on the scores, linear in the distance, with a slope for each head (Press et al. 2021, ALiBi).
    Alibi,
    /// A bias on the scores from the stack's [`Buckets`]. Not with a cap on the scores.
    Buckets,
}

/// A linear whose weight is `[rows, cols]`, `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// The module.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    pub bias: bool,
    /// Whether files hold the weight as `[in, out]`.
    pub transposed: bool,
}

/// A norm over `width` values.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// The module.
    pub name: String,
    pub width: usize,
    pub eps: f32,
    pub kind: NormKind,
}

/// What a norm computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) ⊙ w` (Zhang and Sennrich 2019).
    Rms,
    /// `x / rms(x) ⊙ (1 + w)`.
    RmsPlusOne,
    /// `(x − mean) / deviation ⊙ w + b` (Ba et al. 2016).
    Layer,
}

/// From the last hidden states to logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    pub linear: Linear,
    /// Whether its weight is the table's.
    pub tied: bool,
    /// Factor on the normalised hidden states that it reads.
    pub scale: f32,
    /// Logits become `cap · tanh(logit / cap)`.
    pub soft_cap: Option<f32>,
}

/// A rotation of the first `2 · frequencies.len()` dimensions of each head (Su et al. 2021), in halves.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle, in radians, by which one position turns each pair of dimensions.
    pub frequencies: Vec<f64>,
    /// Factor on cosines and sines.
    pub factor: f32,
    /// What holds for longer rows.
    pub long: Option<LongRope>,
}

/// Other frequencies for rows of more than `beyond` tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    pub beyond: usize,
    pub frequencies: LongFrequencies,
}

/// How the frequencies of long rows are found.
#[derive(Clone, Debug, PartialEq)]
pub enum LongFrequencies {
    /// These for all of them.
    Fixed(Vec<f64>),
    /// `theta` grows with the row's length ("dynamic" NTK scaling): `theta · (factor · length / beyond − (factor − 1))^(d / (d − 2))`.
    Dynamic { theta: f64, factor: f64 },
}

impl Linear {
    /// One without a bias, stored as `[out, in]`.
    pub fn new(name: impl Into<String>, rows: usize, cols: usize) -> Self {
        Self { name: name.into(), rows, cols, bias: false, transposed: false }
    }

    /// The same with or without a bias.
    pub fn biased(self, bias: bool) -> Self {
        Self { bias, ..self }
    }

    /// The same stored as `[in, out]`.
    pub fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }
}

impl Norm {
    /// `x / rms(x) ⊙ w`.
    pub fn rms(name: impl Into<String>, width: usize, eps: f32) -> Self {
        Self { name: name.into(), width, eps, kind: NormKind::Rms }
    }

    /// `x / rms(x) ⊙ (1 + w)`.
    pub fn rms_plus_one(name: impl Into<String>, width: usize, eps: f32) -> Self {
        Self { kind: NormKind::RmsPlusOne, ..Self::rms(name, width, eps) }
    }

    /// `(x − mean) / deviation ⊙ w + b`.
    pub fn layer(name: impl Into<String>, width: usize, eps: f32) -> Self {
        Self { kind: NormKind::Layer, ..Self::rms(name, width, eps) }
    }

    /// Whether it has a bias.
    pub fn has_bias(&self) -> bool {
        self.kind == NormKind::Layer
    }
}

impl Attention {
    /// Values that a token has in the keys and values together.
    pub fn key_value_width(&self) -> usize {
        2 * self.keys * self.head_dim
    }
}

impl SubLayer {
    /// Columns of the inputs' output, side by side.
    pub fn inner(&self) -> usize {
        self.inputs.iter().map(|linear| linear.rows).sum()
    }

    /// Its attention to the row itself, if it is one.
    pub fn attention(&self) -> Option<&Attention> {
        match &self.mix {
            Mix::Attention(attention) => Some(attention),
            Mix::Cross(_) | Mix::Activation { .. } => None,
        }
    }

    /// The linears that read the encoder's output.
    pub fn memory(&self) -> &[Linear] {
        match &self.mix {
            Mix::Cross(cross) => &cross.memory,
            Mix::Attention(_) | Mix::Activation { .. } => &[],
        }
    }

    /// Its linears, in the order of the forward.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.inputs.iter().chain(self.memory()).chain([&self.output])
    }
}

impl Stack {
    /// One whose attentions have no biases from buckets.
    pub fn new(blocks: Vec<Block>, norm: Norm) -> Self {
        Self { blocks, norm, buckets: None }
    }

    /// All sub-layers, in the order of the forward.
    pub fn sub_layers(&self) -> impl Iterator<Item = &SubLayer> {
        self.blocks.iter().flat_map(|block| &block.sub_layers)
    }

    fn modules(&self) -> impl Iterator<Item = Module<'_>> {
        fn of_sub_layer(sub_layer: &SubLayer) -> impl Iterator<Item = Module<'_>> {
            let SubLayer { norm, inputs, output, post_norm, .. } = sub_layer;
            let qk_norm = sub_layer.attention().and_then(|attention| attention.qk_norm.as_ref());
            let before = [Module::Norm(norm)].into_iter().chain(inputs.iter().map(Module::Linear));
            let middle = qk_norm.into_iter().flatten().map(Module::Norm);
            let memory = sub_layer.memory().iter().map(Module::Linear);
            let after = [Module::Linear(output)].into_iter().chain(post_norm.iter().map(Module::Norm));
            before.chain(middle).chain(memory).chain(after)
        }
        let buckets = self.buckets.iter().map(Module::Buckets);
        buckets.chain(self.sub_layers().flat_map(of_sub_layer)).chain([Module::Norm(&self.norm)])
    }
}

impl Buckets {
    /// The bucket of a key that stands `distance` positions after the query (Raffel et al. 2020; the logarithm in f32, as transformers
    /// computes it): half of the buckets hold one distance each, the others lie on a logarithmic scale.
    pub fn bucket(&self, distance: isize) -> usize {
        let (count, first) = match self.bidirectional {
            true => (self.count / 2, if distance > 0 { self.count / 2 } else { 0 }),
            false => (self.count, 0),
        };
        let distance = if self.bidirectional { distance.unsigned_abs() } else { distance.min(0).unsigned_abs() };
        let exact = count / 2;
        if distance < exact {
            return first + distance;
        }
        let exact = exact.max(1);
        let range = (self.max_distance as f64 / exact as f64).ln() as f32;
        let beyond = (distance as f32 / exact as f32).ln() / range * (count - exact) as f32;
        first + (exact + beyond as usize).min(count - 1)
    }
}

impl Rope {
    /// One whose frequencies hold for rows of any length.
    pub fn new(frequencies: Vec<f64>) -> Self {
        Self { frequencies, factor: 1.0, long: None }
    }

    /// The frequencies for a row of `length` tokens; borrowed where they are given.
    pub fn frequencies_at(&self, length: usize) -> Cow<'_, [f64]> {
        match &self.long {
            Some(long) if length > long.beyond => match &long.frequencies {
                LongFrequencies::Fixed(frequencies) => Cow::Borrowed(frequencies),
                LongFrequencies::Dynamic { theta, factor } => {
                    let d = 2 * self.frequencies.len();
                    let stretch = factor * length as f64 / long.beyond as f64 - (factor - 1.0);
                    let theta = theta * stretch.powf(d as f64 / (d as f64 - 2.0));
                    Cow::Owned(frequencies(theta, d))
                }
            },
            _ => Cow::Borrowed(&self.frequencies),
        }
    }
}

/// The `d / 2` frequencies `theta^(−2i / d)`, every intermediate result rounded to f32 as transformers computes them: at position 2,000
/// the rounding of a frequency shows in the fourth digit of the angle.
pub fn frequencies(theta: f64, d: usize) -> Vec<f64> {
    let frequency = |i: usize| 1.0 / theta.powf(f64::from((2 * i) as f32 / d as f32)) as f32;
    (0..d / 2).map(|i| f64::from(frequency(i))).collect()
}

/// A module that holds tensors, in the order of [`ModelSpec::modules`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Module<'a> {
    /// The token embedding `[vocab_size, hidden_size]`, or learned positions `[context, hidden_size]`.
    Embedding {
        name: &'a str,
        rows: usize,
        cols: usize,
    },
    Norm(&'a Norm),
    Linear(&'a Linear),
    /// Biases by distance, `[count, heads]`.
    Buckets(&'a Buckets),
}

impl<'a> Module<'a> {
    /// Its name in the model.
    pub fn name(&self) -> &'a str {
        match self {
            Module::Embedding { name, .. } => name,
            Module::Norm(norm) => &norm.name,
            Module::Linear(linear) => &linear.name,
            Module::Buckets(buckets) => &buckets.name,
        }
    }

    /// Whether a tensor of this shape is a matrix: the table, learned positions, or a linear's weight. All others are numbered as vectors,
    /// and used decoded.
    pub fn is_matrix(&self, shape: &[usize]) -> bool {
        shape.len() > 1 && !matches!(self, Module::Buckets(_))
    }

    /// Names and shapes of its tensors, as transformers' files hold them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let weight = |shape| (format!("{}.weight", self.name()), shape);
        let bias = |len: usize| (format!("{}.bias", self.name()), vec![len]);
        match *self {
            Module::Embedding { rows, cols, .. } => vec![weight(vec![rows, cols])],
            Module::Buckets(buckets) => vec![weight(vec![buckets.count, buckets.heads])],
            Module::Norm(norm) => {
                [weight(vec![norm.width])].into_iter().chain(norm.has_bias().then(|| bias(norm.width))).collect()
            }
            Module::Linear(linear) => {
                let shape = if linear.transposed { [linear.cols, linear.rows] } else { [linear.rows, linear.cols] };
                [weight(shape.to_vec())].into_iter().chain(linear.bias.then(|| bias(linear.rows))).collect()
            }
        }
    }
}

impl ModelSpec {
    /// All modules that hold tensors, in the order of the forward. A tied head's weight is the table's; the head is not listed then.
    pub fn modules(&self) -> Vec<Module<'_>> {
        let mut modules =
            vec![Module::Embedding { name: &self.table.name, rows: self.vocab_size, cols: self.hidden_size }];
        if let Some(name) = &self.table.positions {
            modules.push(Module::Embedding { name, rows: self.context, cols: self.hidden_size });
        }
        modules.extend(self.table.norm.iter().map(Module::Norm));
        modules.extend(self.stacks().flat_map(Stack::modules));
        if !self.head.tied {
            modules.push(Module::Linear(&self.head.linear));
        }
        modules
    }

    /// Names and shapes of all tensors, as transformers' files hold them: what a checkpoint must have and an export writes.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.modules().iter().flat_map(Module::tensors).collect()
    }

    /// The linears in the order of the forward, the head last: a linear's place here is its number everywhere.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.sub_layers().flat_map(SubLayer::linears).chain([&self.head.linear])
    }

    /// Names of the norm weights, biases and biases by distance in the order of the forward: a vector's place here is its number everywhere.
    pub fn vectors(&self) -> Vec<String> {
        let of_module = |module: Module<'_>| {
            let tensors = module.tensors().into_iter();
            tensors.filter(|(_, shape)| !module.is_matrix(shape)).map(|(name, _)| name).collect::<Vec<_>>()
        };
        self.modules().into_iter().flat_map(of_module).collect()
    }

    /// The encoder, if there is one, and the decoder.
    pub fn stacks(&self) -> impl Iterator<Item = &Stack> {
        self.encoder.iter().map(|encoder| &encoder.stack).chain([&self.decoder])
    }

    /// All sub-layers, in the order of the forward.
    pub fn sub_layers(&self) -> impl Iterator<Item = &SubLayer> {
        self.stacks().flat_map(Stack::sub_layers)
    }

    /// Gives every module another name.
    pub fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let of_norm = |norm: &mut Norm| norm.name = name(&norm.name);
        let of_linear = |linear: &mut Linear| linear.name = name(&linear.name);
        self.table.name = name(&self.table.name);
        self.table.positions = self.table.positions.as_deref().map(name);
        self.table.norm.iter_mut().for_each(of_norm);
        for stack in self.encoder.iter_mut().map(|encoder| &mut encoder.stack).chain([&mut self.decoder]) {
            for sub_layer in stack.blocks.iter_mut().flat_map(|block| &mut block.sub_layers) {
                of_norm(&mut sub_layer.norm);
                sub_layer.inputs.iter_mut().chain([&mut sub_layer.output]).for_each(of_linear);
                match &mut sub_layer.mix {
                    Mix::Attention(attention) => attention.qk_norm.iter_mut().flatten().for_each(of_norm),
                    Mix::Cross(cross) => cross.memory.iter_mut().for_each(of_linear),
                    Mix::Activation { .. } => {}
                }
                sub_layer.post_norm.iter_mut().for_each(of_norm);
            }
            if let Some(buckets) = &mut stack.buckets {
                buckets.name = name(&buckets.name);
            }
            of_norm(&mut stack.norm);
        }
        of_linear(&mut self.head.linear);
    }

    /// The most tokens a row may have; no limit but sense where positions are not learned.
    pub fn most_positions(&self) -> Option<usize> {
        self.table.positions.as_ref().map(|_| self.context)
    }

    /// The most tokens that the model was made for; none where all long distances count the same.
    pub fn context_limit(&self) -> Option<usize> {
        self.decoder.buckets.is_none().then_some(self.context)
    }

    /// Values that a token has in the keys and values of all attentions of the decoder to its own row together.
    pub fn key_value_width(&self) -> usize {
        self.decoder.sub_layers().filter_map(SubLayer::attention).map(Attention::key_value_width).sum()
    }

    /// Whether rows of a pass may have tokens in common: not where a rotation depends on the row's length, nor where each row answers another
    /// text.
    pub fn may_share_prefixes(&self) -> bool {
        self.ropes.iter().all(|rope| rope.long.is_none()) && self.encoder.is_none()
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}
