//! What the forward keeps for the backward: one list of widths, from which buffers, the memory plan and the floors of a benchmark follow.

use retune_kernels::bf16;
use serde::{Deserialize, Serialize};

use crate::model::{Middle, Model, Stack, SubLayer};
use crate::overlay::Overlay;
use crate::profile::{Operation, span};

/// What is kept of the activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Saving {
    /// All that the backward reads.
    #[serde(rename = "activations")]
    Full,
    /// The same, rounded to bfloat16.
    #[serde(rename = "rounded_activations")]
    Bf16,
    /// The input of each block alone; the backward runs the block again (`activation_checkpointing: layer`).
    #[serde(rename = "inputs")]
    BlockInputs,
    /// Nothing: for scoring and generation.
    #[serde(rename = "nothing")]
    None,
}

/// Values that a token keeps of a sub-layer. Norms and activations are computed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Widths {
    /// The sub-layer's input.
    pub x: usize,
    /// The inputs' outputs side by side: after rotation, or before the norm of queries and keys where they have one.
    pub inner: usize,
    /// The attention's output; an activation is computed again.
    pub mixed: usize,
    /// The log-sum-exp of each query's scores. It is never rounded, since an exponential is taken of it.
    pub lse: usize,
    /// The output linear's output, where a norm follows it.
    pub raw_output: usize,
    /// Keys and values of the encoder's output, for each token of the sources.
    pub memory: usize,
    /// The low-rank projections of the inputs, of the output, and of the linears on the encoder's output, for each token of the sources.
    pub u: [usize; GROUPS],
    /// Outputs of the same before their scale: what has become 0 does not say what it was.
    pub unscaled: [usize; GROUPS],
}

/// The groups of linears of a sub-layer that read the same: its inputs, its output, and what reads the encoder's output.
pub(crate) const GROUPS: usize = 3;
pub(crate) const INPUTS: usize = 0;
pub(crate) const OUTPUT: usize = 1;
pub(crate) const MEMORY: usize = 2;

impl Widths {
    /// Those of one sub-layer.
    pub fn of(model: &Model, overlay: &Overlay, sub_layer: &SubLayer) -> Self {
        let d = model.spec.hidden_size;
        let (mixed, lse) = match &sub_layer.middle {
            Middle::Attention(attention) => (sub_layer.mixed(), attention.scores.queries),
            Middle::Activation { .. } => (0, 0),
        };
        let output = [sub_layer.output];
        let groups = [&sub_layer.inputs[..], &output, sub_layer.memory_linears()];
        Self {
            x: d,
            inner: sub_layer.inner,
            mixed,
            lse,
            raw_output: if sub_layer.post_norm.is_some() { d } else { 0 },
            memory: sub_layer.memory().map_or(0, |memory| memory.row),
            u: groups.map(|group| overlay.ranks(group)),
            unscaled: groups.map(|group| overlay.unscaled(model, group)),
        }
    }

    /// Widths that hold either of two.
    pub fn max(self, other: Self) -> Self {
        Self {
            x: self.x.max(other.x),
            inner: self.inner.max(other.inner),
            mixed: self.mixed.max(other.mixed),
            lse: self.lse.max(other.lse),
            raw_output: self.raw_output.max(other.raw_output),
            memory: self.memory.max(other.memory),
            u: std::array::from_fn(|group| self.u[group].max(other.u[group])),
            unscaled: std::array::from_fn(|group| self.unscaled[group].max(other.unscaled[group])),
        }
    }

    /// Values that may be rounded, but for the input.
    pub fn rounded(&self) -> usize {
        let of_groups = |widths: [usize; GROUPS]| widths[INPUTS] + widths[OUTPUT];
        self.inner + self.mixed + self.raw_output + of_groups(self.u) + of_groups(self.unscaled)
    }

    /// Values that a token of the sources keeps and that may be rounded.
    pub fn rounded_memory(&self) -> usize {
        self.memory + self.u[MEMORY] + self.unscaled[MEMORY]
    }

    /// Widths of the buffers that all of a stack's sub-layers of this place in their blocks share, in a workspace that keeps nothing.
    pub fn shared(model: &Model, overlay: &Overlay, stack: &Stack, place: usize) -> Self {
        let of_place = stack.sub_layers.iter().filter(|sub_layer| sub_layer.place == place);
        of_place.map(|sub_layer| Self::of(model, overlay, sub_layer)).fold(Self::default(), Self::max)
    }
}

/// What is kept of one sub-layer, by the names of [`Widths`]; T tokens. The input lies elsewhere where it is not rounded: it is the output
/// of the sub-layer before.
#[derive(Default)]
pub(crate) struct Saved<T = f32> {
    pub inner: Vec<T>,
    pub mixed: Vec<T>,
    pub lse: Vec<f32>,
    pub raw_output: Vec<T>,
    pub memory: Vec<T>,
    pub u: [Vec<T>; GROUPS],
    pub unscaled: [Vec<T>; GROUPS],
}

/// How many rows the buffers of a sub-layer hold: tokens of the pass, and of its sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tokens {
    pub own: usize,
    pub source: usize,
}

impl Tokens {
    /// The rows of a group's buffers.
    pub fn of_group(self, group: usize) -> usize {
        if group == MEMORY { self.source } else { self.own }
    }
}

/// A sub-layer's input and what it saved, rounded to bfloat16 where they come into being.
#[derive(Default)]
pub(crate) struct Rounded {
    pub x: Vec<u16>,
    pub saved: Saved<u16>,
}

impl<T: Copy + Default> Saved<T> {
    /// Makes every buffer hold as many tokens.
    pub fn reserve(&mut self, widths: Widths, tokens: Tokens) {
        grow(&mut self.inner, tokens.own * widths.inner);
        grow(&mut self.mixed, tokens.own * widths.mixed);
        grow(&mut self.lse, tokens.own * widths.lse);
        grow(&mut self.raw_output, tokens.own * widths.raw_output);
        grow(&mut self.memory, tokens.source * widths.memory);
        for group in 0..GROUPS {
            grow(&mut self.u[group], tokens.of_group(group) * widths.u[group]);
            grow(&mut self.unscaled[group], tokens.of_group(group) * widths.unscaled[group]);
        }
    }
}

/// Grows a buffer to `len` elements, so that its pages are taken only as they are used.
pub(crate) fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        // The old memory goes before the new is taken.
        *buffer = Vec::new();
        *buffer = vec![T::default(); len];
    }
}

/// Rounds what was computed to where it lasts, if it does.
pub(crate) fn keep(x: &[f32], to: Option<&mut Vec<u16>>) {
    if let Some(to) = to {
        let _span = span(Operation::SavedActivations);
        bf16::round(x, &mut to[..x.len()]);
    }
}

/// Puts back what was kept rounded, where it was.
pub(crate) fn restore(x: &mut [f32], from: Option<&Vec<u16>>) {
    if let Some(from) = from {
        let _span = span(Operation::SavedActivations);
        bf16::widen(&from[..x.len()], x);
    }
}
