//! What the forward keeps for the backward: one list of widths, from which buffers, the memory plan and the floors of a benchmark follow.

use retune_kernels::bf16;
use serde::{Deserialize, Serialize};

use crate::model::{Middle, Model, SubLayer};
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
    /// The low-rank projections of the inputs and of the output.
    pub u: [usize; 2],
    /// Outputs of the inputs and of the output before their scale: what has become 0 does not say what it was.
    pub unscaled: [usize; 2],
}

impl Widths {
    /// Those of one sub-layer.
    pub fn of(model: &Model, overlay: &Overlay, sub_layer: &SubLayer) -> Self {
        let d = model.spec.hidden_size;
        let (mixed, lse) = match &sub_layer.middle {
            Middle::Attention(attention) => (sub_layer.mixed(), attention.scores.queries),
            Middle::Activation { .. } => (0, 0),
        };
        Self {
            x: d,
            inner: sub_layer.inner,
            mixed,
            lse,
            raw_output: if sub_layer.post_norm.is_some() { d } else { 0 },
            u: [overlay.ranks(&sub_layer.inputs), overlay.ranks(&[sub_layer.output])],
            unscaled: [overlay.unscaled(model, &sub_layer.inputs), overlay.unscaled(model, &[sub_layer.output])],
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
            u: [self.u[0].max(other.u[0]), self.u[1].max(other.u[1])],
            unscaled: [self.unscaled[0].max(other.unscaled[0]), self.unscaled[1].max(other.unscaled[1])],
        }
    }

    /// Values that may be rounded, but for the input.
    pub fn rounded(&self) -> usize {
        self.inner + self.mixed + self.raw_output + self.u[0] + self.u[1] + self.unscaled[0] + self.unscaled[1]
    }

    /// Widths of the buffers that all sub-layers of this place in their blocks share, in a workspace that keeps nothing.
    pub fn shared(model: &Model, overlay: &Overlay, place: usize) -> Self {
        let of_place = model.sub_layers.iter().filter(|sub_layer| sub_layer.place == place);
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
    pub u: [Vec<T>; 2],
    pub unscaled: [Vec<T>; 2],
}

/// A sub-layer's input and what it saved, rounded to bfloat16 where they come into being.
#[derive(Default)]
pub(crate) struct Rounded {
    pub x: Vec<u16>,
    pub saved: Saved<u16>,
}

impl<T: Copy + Default> Saved<T> {
    /// Makes every buffer hold `tokens` tokens.
    pub fn reserve(&mut self, widths: Widths, tokens: usize) {
        grow(&mut self.inner, tokens * widths.inner);
        grow(&mut self.mixed, tokens * widths.mixed);
        grow(&mut self.lse, tokens * widths.lse);
        grow(&mut self.raw_output, tokens * widths.raw_output);
        for (u, width) in self.u.iter_mut().zip(widths.u) {
            grow(u, tokens * width);
        }
        for (unscaled, width) in self.unscaled.iter_mut().zip(widths.unscaled) {
            grow(unscaled, tokens * width);
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
