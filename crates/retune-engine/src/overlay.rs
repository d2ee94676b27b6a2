//! What stands on a frozen model, in one normal form: weights and vectors trained in the base's place, low-rank terms, scales of what linears
//! read and write, and what precedes every row.
//!
//! A method of fine-tuning lowers itself into an overlay; the engine computes the overlay and knows no method. Every trainable value lies
//! in the flat vector of [`ParamLayout`]; an overlay says where.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use arrayvec::ArrayVec;

use crate::model::{LinearId, Model, Norm, Stack, SubLayer, VectorId, padded};
use crate::params::ParamLayout;
use crate::pass::Prelude;
use crate::spec::ModelSpec;

/// Everything that stands on a model.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    pub layout: ParamLayout,
    /// What is changed of the token embedding.
    pub table: Option<Range<usize>>,
    /// What is changed of learned positions.
    pub positions: Option<Range<usize>>,
    /// Rows of the token embedding trained in the base's place.
    pub table_rows: Option<TokenRows>,
    /// Rows of the head's weight trained in the base's place. The rows of a tied head are the token embedding's where they are to stay so.
    pub head_rows: Option<TokenRows>,
    /// What is added to the rows that are looked up in the token embedding; a tied head does not read it.
    pub table_term: Option<TableTerm>,
    /// What is added to learned positions.
    pub positions_term: Option<TableTerm>,
    /// By [`LinearId`]; as many as the model has.
    pub linears: Vec<Change>,
    /// Norm weights, biases and biases by distance trained in the base's place, by [`VectorId`]; as many as the model has.
    pub vectors: Vec<Option<Range<usize>>>,
    /// Inputs of the first block before those of each row's tokens; the encoder's, where there is one.
    pub virtual_tokens: Option<VirtualTokens>,
    /// Keys and values of each attention before those of each row's tokens.
    pub prefix: Option<Prefix>,
}

/// Some rows of a matrix that has one for each token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRows {
    /// The tokens, each once.
    pub ids: Arc<[u32]>,
    /// Where their rows lie in the flat vector, `[ids.len(), hidden_size]`.
    pub rows: Range<usize>,
}

/// The term `scale · A[row]·Bᵀ` on a row that is looked up in a table (Hu et al. 2021): A `[rows of the table, r]`, B `[hidden_size, r]`. With
/// magnitudes the row is then multiplied by `m / ‖W + scale·A·Bᵀ‖`, the norm being that of each column of the table (Liu et al. 2024); no
/// gradient flows through it, and a column of zeros stays zero.
#[derive(Clone, Debug, PartialEq)]
pub struct TableTerm {
    pub a: Range<usize>,
    pub b: Range<usize>,
    pub r: usize,
    pub scale: f32,
    /// m, `[hidden_size]`.
    pub magnitudes: Option<Range<usize>>,
}

/// Tokens that are no text (Lester et al. 2021): their rows stand in the place of looked-up and scaled rows of the table. Learned positions
/// are added to them, and a norm after the table normalises them, as they do with any.
#[derive(Clone, Debug, PartialEq)]
pub struct VirtualTokens {
    /// Where the rows lie in the flat vector, `[count, hidden_size]`.
    pub rows: Range<usize>,
    pub count: usize,
}

/// Keys and values that every query of a row may look at (Li and Liang 2021). They are taken as they are, neither normalised nor rotated.
/// They stand at the positions `0..count`, by which a window and a bias by distance count them. Attentions of an encoder and those to its
/// output have none.
#[derive(Clone, Debug, PartialEq)]
pub struct Prefix {
    /// Where they lie in the flat vector: `[count, W]`, W being [`ModelSpec::key_value_width`]. A row has the attentions one after the other,
    /// of each its keys, head by head, and then its values.
    pub values: Range<usize>,
    pub count: usize,
    /// For each attention in turn the number of the one in whose place its keys and values lie: two may read the same. Each has its own
    /// where this is empty.
    pub places: Vec<usize>,
}

/// Most low-rank terms on one linear.
pub const MOST_TERMS: usize = 2;

/// What stands on one linear: `y = o ⊙ ((i ⊙ x)·Wᵀ + Σ terms of i ⊙ x + b)`, or as the [`OutputScale`] says.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// A weight `[out, in]` in the base's place.
    pub weight: Option<Range<usize>>,
    pub low_rank: ArrayVec<LowRank, MOST_TERMS>,
    /// A factor for each input feature, `[in]`.
    pub input_scale: Option<Range<usize>>,
    pub output_scale: Option<OutputScale>,
    /// What is added to the output beside the base's bias; not together with an output scale.
    pub offset: Option<Offset>,
}

/// A vector `scale · b` that is added to each output, `[out]`, whether the base has a bias or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Offset {
    pub place: Range<usize>,
    pub scale: f32,
}

/// The term `scale · drop(x)·Aᵀ·Bᵀ` (Hu et al. 2021): A `[r, in]` and B `[out, r]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    pub a: Factor,
    pub b: Factor,
    pub r: usize,
    pub scale: f32,
    /// Probability that an element of the input is dropped before A.
    pub dropout: f32,
    /// Key of the linear's dropout masks.
    pub key: u64,
}

/// One matrix of a low-rank term.
#[derive(Clone, Debug, PartialEq)]
pub enum Factor {
    /// A place in the flat vector.
    Trained(Range<usize>),
    /// Rows of a place in the flat vector, so many times one after the other.
    Repeated(Range<usize>, usize),
    /// Values that stay as they are.
    Frozen(Arc<[f32]>),
}

/// A factor for each output feature, `[out]` in the flat vector.
#[derive(Clone, Debug, PartialEq)]
pub enum OutputScale {
    /// `o ⊙ (x·Wᵀ + terms + b)` (Liu et al. 2022).
    Plain(Range<usize>),
    /// `m / ‖W + Σ s·B·A‖ ⊙ (x·Wᵀ + terms) + b`, the norm being that of each row (Liu et al. 2024). No gradient flows through the norm
    /// (their section 4.3). A row of zeros has no direction: it stays zero whatever its m.
    OverNorm(Range<usize>),
}

impl Factor {
    /// Its values, where `params` is the flat vector.
    pub fn values<'a>(&'a self, params: &'a [f32]) -> Cow<'a, [f32]> {
        match self {
            Self::Trained(range) => Cow::Borrowed(&params[range.clone()]),
            Self::Repeated(range, times) => Cow::Owned(params[range.clone()].repeat(*times)),
            Self::Frozen(values) => Cow::Borrowed(values),
        }
    }

    /// Its place in the flat vector, where it is trained.
    pub fn trained(&self) -> Option<&Range<usize>> {
        match self {
            Self::Trained(range) | Self::Repeated(range, _) => Some(range),
            Self::Frozen(_) => None,
        }
    }
}

impl OutputScale {
    /// The factors' place in the flat vector.
    pub fn range(&self) -> &Range<usize> {
        match self {
            Self::Plain(range) | Self::OverNorm(range) => range,
        }
    }
}

impl Change {
    /// Rank of the low-rank terms together; 0 without one.
    pub fn rank(&self) -> usize {
        self.low_rank.iter().map(|term| term.r).sum()
    }

    /// Whether anything of it is trained.
    pub fn is_trained(&self) -> bool {
        let is_trained = |term: &LowRank| term.a.trained().is_some() || term.b.trained().is_some();
        self.weight.is_some()
            || self.input_scale.is_some()
            || self.output_scale.is_some()
            || self.offset.is_some()
            || self.low_rank.iter().any(is_trained)
    }

    /// Whether it does no more than add to the base's outputs.
    pub(crate) fn only_adds(&self) -> bool {
        self.weight.is_none() && self.input_scale.is_none() && self.output_scale.is_none()
    }

    /// Whether it leaves the linear as it is.
    pub fn is_empty(&self) -> bool {
        !self.is_trained() && self.low_rank.is_empty()
    }
}

impl Overlay {
    /// One that changes nothing of `model`.
    pub fn empty(model: &Model) -> Self {
        Self::of_sizes(model.linears.len(), model.vectors.len())
    }

    /// One that changes nothing of a model with these numbers of linears and vectors.
    pub fn of_sizes(linears: usize, vectors: usize) -> Self {
        Self { linears: vec![Change::default(); linears], vectors: vec![None; vectors], ..Self::default() }
    }

    /// Whether it changes linears alone, and what precedes each row: then a pass can have other overlays on other tokens.
    pub fn stands_beside_others(&self) -> bool {
        let Self { layout: _, table, positions, table_rows, head_rows, table_term, positions_term, vectors, .. } = self;
        let of_tables = [table, positions].into_iter().any(Option::is_some)
            || [table_rows, head_rows].into_iter().any(Option::is_some)
            || [table_term, positions_term].into_iter().any(Option::is_some);
        !of_tables && vectors.iter().all(Option::is_none)
    }

    /// What it puts before each row of a model of this spec.
    pub fn prelude(&self, spec: &ModelSpec) -> Prelude {
        let first = spec.vocab_size as u32;
        let virtual_ids = self.virtual_tokens.as_ref().map(|tokens| first..first + tokens.count as u32);
        let prefix = self.prefix.as_ref().map_or(0, |prefix| prefix.count);
        let decoder_start = spec.encoder.as_ref().map(|encoder| encoder.decoder_start);
        Prelude { virtual_ids: virtual_ids.unwrap_or_default(), prefix, decoder_start }
    }

    /// The most tokens a row of a model of this spec may have, after what this puts before it; no limit but sense where positions are not
    /// learned.
    pub fn most_tokens(&self, spec: &ModelSpec) -> Option<usize> {
        Some(spec.most_positions()?.saturating_sub(self.prelude(spec).len()))
    }

    /// What stands on a linear.
    pub fn change(&self, linear: LinearId) -> &Change {
        &self.linears[linear.0]
    }

    /// Whether a norm weight or bias is trained.
    pub fn trains_vector(&self, vector: VectorId) -> bool {
        self.vectors[vector.0].is_some()
    }

    /// Whether a linear, its bias included, is trained.
    pub fn trains_linear(&self, model: &Model, linear: LinearId) -> bool {
        let bias = model.linear(linear).bias;
        let rows = self.head_rows.is_some() && linear == model.head;
        rows || self.change(linear).is_trained() || bias.is_some_and(|bias| self.trains_vector(bias))
    }

    /// Whether a linear, its bias included, is another than the base's.
    pub fn changes_linear(&self, model: &Model, linear: LinearId) -> bool {
        !self.change(linear).is_empty() || self.trains_linear(model, linear)
    }

    /// Whether any parameter of what a sub-layer's mix reads is trained.
    pub(crate) fn trains_inputs(&self, model: &Model, sub_layer: &SubLayer) -> bool {
        sub_layer.vectors_before_mix().any(|vector| self.trains_vector(vector))
            || sub_layer.inputs.iter().any(|&linear| self.trains_linear(model, linear))
    }

    /// Whether a sub-layer's mix reads anything trained that is not computed from the sub-layer's input: a prefix, biases by distance, what
    /// linears make of the encoder's output, and that output itself.
    pub(crate) fn trains_mix(&self, model: &Model, sub_layer: &SubLayer) -> bool {
        let Some(attention) = sub_layer.attention() else { return false };
        (self.prefix.is_some() && attention.number.is_some())
            || attention.buckets.is_some_and(|buckets| self.trains_vector(buckets))
            || (attention.memory.is_some() && self.trains_encoder(model))
            || sub_layer.memory_linears().iter().any(|&linear| self.trains_linear(model, linear))
    }

    /// Whether anything that makes the encoder's output is trained.
    pub(crate) fn trains_encoder(&self, model: &Model) -> bool {
        model
            .encoder
            .as_ref()
            .is_some_and(|encoder| self.trains_norm(&encoder.norm) || self.lowest_sub_layer(model, encoder).is_some())
    }

    /// Whether a norm is trained.
    pub(crate) fn trains_norm(&self, norm: &Norm) -> bool {
        norm.vectors().any(|vector| self.trains_vector(vector))
    }

    /// Whether anything of a sub-layer is trained.
    pub(crate) fn trains_sub_layer(&self, model: &Model, sub_layer: &SubLayer) -> bool {
        self.trains_inputs(model, sub_layer)
            || self.trains_mix(model, sub_layer)
            || self.trains_linear(model, sub_layer.output)
            || sub_layer.post_norm.as_ref().is_some_and(|norm| self.trains_norm(norm))
    }

    /// Whether anything that makes a stack's first hidden states is trained.
    pub(crate) fn trains_embedding(&self, model: &Model, stack: &Stack) -> bool {
        // Virtual tokens are the encoder's, where there is one.
        let is_first = model.stacks().next().is_some_and(|first| std::ptr::eq(first, stack));
        let rows = [&self.table, &self.positions].into_iter().any(Option::is_some)
            || [&self.table_term, &self.positions_term].into_iter().any(Option::is_some)
            || self.table_rows.is_some();
        rows || (self.virtual_tokens.is_some() && is_first)
            || model.table_norm.as_ref().is_some_and(|norm| self.trains_norm(norm))
    }

    /// The lowest sub-layer of a stack that its backward must reach: below it nothing is trained. `None` where nothing before the last norm is.
    pub(crate) fn lowest_sub_layer(&self, model: &Model, stack: &Stack) -> Option<usize> {
        if self.trains_embedding(model, stack) && !stack.sub_layers.is_empty() {
            return Some(0);
        }
        stack.sub_layers.iter().position(|sub_layer| self.trains_sub_layer(model, sub_layer))
    }

    /// Whether low-rank terms drop elements of their input in training.
    pub fn has_dropout(&self) -> bool {
        self.linears.iter().flat_map(|change| &change.low_rank).any(|term| term.dropout > 0.0)
    }

    /// Ranks of low-rank terms together.
    pub(crate) fn ranks(&self, linears: &[LinearId]) -> usize {
        linears.iter().map(|&linear| self.change(linear).rank()).sum()
    }

    /// Elements from one row of the outputs before output scales, side by side, to the next; 0 where nothing is scaled.
    pub(crate) fn unscaled(&self, model: &Model, linears: &[LinearId]) -> usize {
        let is_scaled = |id: &&LinearId| self.change(**id).output_scale.is_some();
        padded(linears.iter().filter(is_scaled).map(|&id| model.linear(id).rows()).sum())
    }

    /// Input features of those of the linears that have an input scale, together.
    pub(crate) fn scaled_inputs(&self, model: &Model, linears: &[LinearId]) -> usize {
        let is_scaled = |id: &&LinearId| self.change(**id).input_scale.is_some();
        linears.iter().filter(is_scaled).map(|&id| model.linear(id).cols()).sum()
    }
}
