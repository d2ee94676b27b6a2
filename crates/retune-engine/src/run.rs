//! One pass through a model with what stands on it, forward and backward through its sub-layers.

use std::ops::Range;

use retune_kernels::F32Panel;

use crate::compute::Compute;
use crate::generate::Cache;
use crate::linear::Weight;
use crate::model::{LinearId, Model, VectorId};
use crate::overlay::Overlay;
use crate::pass::Pass;
use crate::row_norms::RowNorms;
use crate::saved::Saving;
use crate::sub_layer::{Kept, fill_segments};
use crate::workspace::Workspace;

/// A step of training, which dropout masks depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub seed: u64,
    pub step: u64,
}

/// What is run: a model, what stands on it, in what arithmetic, on which tokens.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub model: &'a Model,
    pub overlay: &'a Overlay,
    /// The flat vector that the overlay's places are in.
    pub params: &'a [f32],
    /// The norms that output scales stand over, of these parameters.
    pub norms: &'a RowNorms,
    pub compute: &'a Compute,
    pub pass: &'a Pass,
    /// The step that dropout is of; none applies without.
    pub step: Option<Step>,
}

impl<'a> Run<'a> {
    /// A linear's weight: the base's, or what is trained in its place.
    pub(crate) fn weight(&self, id: LinearId) -> Weight<'a> {
        match &self.overlay.change(id).weight {
            Some(range) => Weight::Trained(F32Panel::new(&self.params[range.clone()], self.model.linear(id).cols())),
            None => Weight::Frozen(&self.model.linear(id).weight),
        }
    }

    /// A norm weight or bias: the base's, or what is trained in its place.
    pub(crate) fn vector(&self, id: VectorId) -> &'a [f32] {
        match &self.overlay.vectors[id.0] {
            Some(range) => &self.params[range.clone()],
            None => &self.model.vectors[id.0],
        }
    }

    /// The places of vectors in the gradient, for those that are trained.
    pub(crate) fn vector_gradients<'g, const N: usize>(
        &self,
        ids: [VectorId; N],
        grads: &'g mut [f32],
    ) -> [Option<&'g mut [f32]>; N] {
        let ranges: [Option<Range<usize>>; N] = ids.map(|id| self.overlay.vectors[id.0].clone());
        let (mut rest, mut taken) = (grads, 0);
        // Vectors of one module lie one after the other.
        ranges.map(|range| {
            let range = range?;
            let (place, others) = std::mem::take(&mut rest).split_at_mut(range.end - taken);
            (rest, taken) = (others, range.end);
            let len = place.len();
            Some(&mut place[len - range.len()..])
        })
    }

    /// The summed loss over the labels of the pass, in nats; each label's own is left in [`Workspace::losses`].
    ///
    /// # Panics
    /// When the pass's prelude is not the overlay's.
    pub fn loss(&self, workspace: &mut Workspace) -> f64 {
        self.forward(workspace, false, None);
        self.head_pass(None, workspace)
    }

    /// The summed loss over the labels of the pass; its gradient is added to `grads`.
    ///
    /// # Panics
    /// When dropout applies and rows share tokens: each row has masks of its own. When the pass's prelude is not the overlay's.
    pub fn loss_and_gradient(&self, grads: &mut [f32], workspace: &mut Workspace) -> f64 {
        let drops = self.step.is_some() && self.overlay.has_dropout();
        assert!(!(drops && self.pass.is_shared()), "rows with dropout cannot share tokens");
        self.forward(workspace, true, None);
        let loss = self.head_pass(Some(grads), workspace);
        self.backward(grads, workspace);
        loss
    }

    /// Logits `[tokens.len(), V]` of the given tokens of the pass.
    ///
    /// # Panics
    /// When the pass's prelude is not the overlay's.
    pub fn logits(&self, tokens: &[u32], workspace: &mut Workspace) -> Vec<f32> {
        self.forward(workspace, false, None);
        let mut logits = vec![0.0; tokens.len() * self.model.spec.vocab_size];
        self.last_logits(tokens, workspace, &mut logits);
        logits
    }

    /// Runs the sub-layers; afterwards the last one's output is in the workspace. With `backward` what the backward reads is kept.
    pub(crate) fn forward(&self, workspace: &mut Workspace, backward: bool, mut cache: Option<&mut [Cache]>) {
        let (model, pass) = (self.model, self.pass);
        // A cache holds what precedes the pass.
        let is_right = cache.is_some() || pass.prelude == self.overlay.prelude(&model.spec);
        assert!(is_right, "the pass was not made for this overlay: {:?}", pass.prelude);
        let tokens = pass.tokens();
        let positions = pass.positions.iter().max().map_or(0, |&p| p as usize + 1);
        workspace.reserve(model, self.overlay, tokens, positions, backward);
        let d = model.spec.hidden_size;
        let first = workspace.input(model, 0, backward);
        self.embed(&mut workspace.x[first][..tokens * d], &mut workspace.temporary);
        fill_segments(pass, &mut workspace.temporary.segments);
        let mut attentions = 0;
        for (s, sub_layer) in model.sub_layers.iter().enumerate() {
            let (from, to) = (workspace.input(model, s, backward), workspace.input(model, s + 1, backward));
            let place = workspace.place(model, s, backward);
            let Workspace { x, saved, rounded, temporary, rotations, .. } = workspace;
            let rounded = if backward { rounded.get_mut(s) } else { None };
            let kept = Kept { saved: &mut saved[place], rounded };
            // Input and output are two different buffers of `x`.
            let mut output = std::mem::take(&mut x[to]);
            let cache = match (&mut cache, sub_layer.attention()) {
                (Some(caches), Some(_)) => {
                    attentions += 1;
                    caches.get_mut(attentions - 1)
                }
                _ => None,
            };
            let (input, y) = (&x[from][..tokens * d], Some(&mut output[..tokens * d]));
            sub_layer.forward(*self, input, kept, temporary, rotations, y, cache);
            x[to] = output;
        }
    }

    /// Runs the backward from the gradient of the last output in the workspace down to the lowest sub-layer with something to train.
    fn backward(&self, grads: &mut [f32], workspace: &mut Workspace) {
        let model = self.model;
        let Some(lowest) = self.overlay.lowest_sub_layer(model) else { return };
        let (d, tokens) = (model.spec.hidden_size, self.pass.tokens());
        let trains_embedding = self.overlay.trains_embedding(model);
        let mut restored = None;
        for (s, sub_layer) in model.sub_layers.iter().enumerate().skip(lowest).rev() {
            if workspace.saving == Saving::BlockInputs && restored != Some(sub_layer.block) {
                self.run_block_again(sub_layer.block, workspace);
                restored = Some(sub_layer.block);
            }
            let (input, place) = (workspace.input(model, s, true), workspace.place(model, s, true));
            let Workspace { x, saved, rounded, temporary, rotations, .. } = workspace;
            let kept = Kept { saved: &mut saved[place], rounded: rounded.get_mut(s) };
            let needs_input = s > lowest || trains_embedding;
            sub_layer.backward(*self, grads, &mut x[input][..tokens * d], kept, temporary, rotations, needs_input);
        }
        self.embed_backward(grads, &mut workspace.temporary);
    }

    /// Runs a block's sub-layers again from its kept input, for what their backward reads.
    fn run_block_again(&self, block: usize, workspace: &mut Workspace) {
        let model = self.model;
        let len = self.pass.tokens() * model.spec.hidden_size;
        let of_block = |s: &usize| model.sub_layers[*s].block == block;
        for s in (0..model.sub_layers.len()).filter(of_block) {
            let sub_layer = &model.sub_layers[s];
            let has_next = model.sub_layers.get(s + 1).is_some_and(|next| next.block == block);
            let (from, place) = (workspace.input(model, s, true), workspace.place(model, s, true));
            let to = workspace.input(model, s + 1, true);
            let Workspace { x, saved, temporary, rotations, .. } = workspace;
            let kept = Kept { saved: &mut saved[place], rounded: None };
            // The block's own output is not needed again.
            let mut output = if has_next { std::mem::take(&mut x[to]) } else { Vec::new() };
            let y = has_next.then(|| &mut output[..len]);
            sub_layer.forward(*self, &x[from][..len], kept, temporary, rotations, y, None);
            if has_next {
                x[to] = output;
            }
        }
    }

    /// The first block whose input is not finite in the activations kept of the pass, and the row of the data set it happens in; the
    /// number of blocks stands for the output of the last. For saying where a NaN came from.
    pub fn first_non_finite_block(&self, workspace: &Workspace) -> Option<(usize, u64)> {
        let d = self.model.spec.hidden_size;
        let blocks = if workspace.saving == Saving::None { 0 } else { self.model.spec.blocks.len() + 1 };
        for b in 0..blocks {
            let is_bad = |t: &usize| !workspace.block_input_is_finite(self.model, b, t * d..(t + 1) * d);
            if let Some(token) = (0..self.pass.tokens()).find(is_bad) {
                return Some((b, self.pass.sequence_of(token).map_or(0, |s| s.row)));
            }
        }
        None
    }
}
