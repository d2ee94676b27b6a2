//! One pass through a model with what stands on it, forward and backward through its sub-layers.

use std::ops::Range;

use retune_kernels::F32Panel;

use crate::compute::Compute;
use crate::generate::Continued;
use crate::linear::Weight;
use crate::model::{LinearId, Model, Stack, VectorId};
use crate::overlay::Overlay;
use crate::pass::Pass;
use crate::row_norms::RowNorms;
use crate::saved::{Saving, Tokens};
use crate::sub_layer::{Kept, fill_segments};
use crate::workspace::{Activations, Temporary, Workspace};

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
    /// What stands on the linears for runs of the tokens, where it is not the same for all: then `overlay` is an empty one. Together they are
    /// all tokens of the pass, in order. Not with a backward.
    pub parts: &'a [Part<'a>],
}

/// What stands on a model's linears for some tokens of a pass.
#[derive(Clone)]
pub struct Part<'a> {
    pub tokens: Range<usize>,
    pub overlay: &'a Overlay,
    pub params: &'a [f32],
    pub norms: &'a RowNorms,
}

/// Where the activations of a pass stopped being numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// Whether in the encoder.
    pub in_encoder: bool,
    /// The first block whose input is not finite; the number of blocks stands for the output of the last.
    pub block: usize,
    /// The row of the data set.
    pub row: u64,
}

impl<'a> Run<'a> {
    /// The same on the sources of the pass, which an encoder reads.
    pub(crate) fn of_source(&self) -> Option<Self> {
        self.pass.source.as_deref().map(|pass| Self { pass, ..*self })
    }

    /// The same with what stands on some of the tokens alone, for functions that are given no others.
    pub(crate) fn of_part(&self, part: &Part<'a>) -> Self {
        let Part { overlay, params, norms, .. } = *part;
        Self { overlay, params, norms, parts: &[], ..*self }
    }

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
    pub(crate) fn forward(&self, workspace: &mut Workspace, backward: bool, cache: Option<Continued>) {
        let (model, pass) = (self.model, self.pass);
        // A cache holds what precedes the pass.
        let is_right = cache.is_some() || pass.made_for() == self.overlay.prelude(&model.spec);
        assert!(is_right, "the pass was not made for this overlay: {:?}", pass.made_for());
        let tokens = Tokens { own: pass.tokens(), source: pass.source_tokens() };
        let source = self.of_source();
        let positions = pass.longest().max(source.map_or(0, |source| source.pass.longest()));
        workspace.reserve(model, self.overlay, tokens, positions, backward);
        let Workspace { saving, encoder, decoder, temporary, .. } = workspace;
        if let (Some(stack), Some(source)) = (&model.encoder, source) {
            source.up(stack, encoder, *saving, temporary, backward, None);
            let len = tokens.source * model.spec.hidden_size;
            let last = &encoder.last(stack, *saving, backward)[..len];
            stack.norm.forward(source, last, &mut temporary.memory[..len]);
        }
        self.up(&model.decoder, decoder, *saving, temporary, backward, cache);
    }

    /// The forward of a stack on the rows of the pass.
    fn up(
        &self,
        stack: &Stack,
        activations: &mut Activations,
        saving: Saving,
        temporary: &mut Temporary,
        backward: bool,
        mut cache: Option<Continued>,
    ) {
        let tokens = self.pass.tokens();
        let d = self.model.spec.hidden_size;
        let first = Activations::input(stack, saving, 0, backward);
        self.embed(&mut activations.x[first][..tokens * d], temporary);
        fill_segments(self.pass, temporary);
        if let Some(buckets) = &stack.buckets {
            temporary.distances.fill(*self, buckets, self.pass.longest(), backward);
        }
        let mut attentions = 0;
        for (s, sub_layer) in stack.sub_layers.iter().enumerate() {
            let input = |s| Activations::input(stack, saving, s, backward);
            let (from, to, place) = (input(s), input(s + 1), Activations::place(stack, saving, s, backward));
            let Activations { x, saved, rounded, .. } = activations;
            let rounded = if backward { rounded.get_mut(s) } else { None };
            let kept = Kept { saved: &mut saved[place], rounded };
            // Input and output are two different buffers of `x`.
            let mut output = std::mem::take(&mut x[to]);
            let cache = match (&mut cache, sub_layer.attention()) {
                (Some(Continued { cache, texts }), Some(_)) => {
                    attentions += 1;
                    cache.get_mut(attentions - 1).map(|cache| Continued { cache, texts })
                }
                _ => None,
            };
            let (input, y) = (&x[from][..tokens * d], Some(&mut output[..tokens * d]));
            sub_layer.forward(*self, input, kept, temporary, y, cache);
            x[to] = output;
        }
    }

    /// Runs the backward from the gradient of the last output in the workspace down to the lowest sub-layers with something to train: those of
    /// the decoder, where the gradients of the encoder's output add up, then those of the encoder.
    fn backward(&self, grads: &mut [f32], workspace: &mut Workspace) {
        let Workspace { saving, encoder, decoder, temporary, .. } = workspace;
        let source = self.model.encoder.as_ref().zip(self.of_source());
        let source = source.filter(|_| self.overlay.trains_encoder(self.model));
        let len = self.pass.source_tokens() * self.model.spec.hidden_size;
        if source.is_some() {
            temporary.dmemory[..len].fill(0.0);
        }
        self.down(&self.model.decoder, decoder, *saving, temporary, grads);
        if let Some((stack, source)) = source {
            let Temporary { dx, dmemory, .. } = temporary;
            dx[..len].fill(0.0);
            let last = &encoder.last(stack, *saving, true)[..len];
            stack.norm.backward(source, last, &dmemory[..len], &mut dx[..len], grads);
            fill_segments(source.pass, temporary);
            source.down(stack, encoder, *saving, temporary, grads);
        }
    }

    /// The backward of a stack from the gradient of its last output in `temporary.dx`.
    fn down(
        &self,
        stack: &Stack,
        activations: &mut Activations,
        saving: Saving,
        temporary: &mut Temporary,
        grads: &mut [f32],
    ) {
        let Some(lowest) = self.overlay.lowest_sub_layer(self.model, stack) else { return };
        let (d, tokens) = (self.model.spec.hidden_size, self.pass.tokens());
        let trains_embedding = self.overlay.trains_embedding(self.model, stack);
        if let Some(buckets) = &stack.buckets {
            temporary.distances.fill(*self, buckets, self.pass.longest(), true);
        }
        let mut restored = None;
        for (s, sub_layer) in stack.sub_layers.iter().enumerate().skip(lowest).rev() {
            if saving == Saving::BlockInputs && restored != Some(sub_layer.block) {
                self.run_block_again(stack, sub_layer.block, activations, temporary);
                restored = Some(sub_layer.block);
            }
            let (input, place) =
                (Activations::input(stack, saving, s, true), Activations::place(stack, saving, s, true));
            let Activations { x, saved, rounded, .. } = activations;
            let kept = Kept { saved: &mut saved[place], rounded: rounded.get_mut(s) };
            let needs_input = s > lowest || trains_embedding;
            sub_layer.backward(*self, grads, &mut x[input][..tokens * d], kept, temporary, needs_input);
        }
        if let Some(buckets) = &stack.buckets {
            temporary.distances.backward(*self, buckets, grads);
        }
        if trains_embedding {
            self.embed_backward(grads, temporary);
        }
    }

    /// Runs a block's sub-layers again from its kept input, for what their backward reads.
    fn run_block_again(&self, stack: &Stack, block: usize, activations: &mut Activations, temporary: &mut Temporary) {
        let len = self.pass.tokens() * self.model.spec.hidden_size;
        let input = |s| Activations::input(stack, Saving::BlockInputs, s, true);
        let of_block = |s: &usize| stack.sub_layers[*s].block == block;
        for s in (0..stack.sub_layers.len()).filter(of_block) {
            let sub_layer = &stack.sub_layers[s];
            let has_next = stack.sub_layers.get(s + 1).is_some_and(|next| next.block == block);
            let (from, to, place) = (input(s), input(s + 1), Activations::place(stack, Saving::BlockInputs, s, true));
            let Activations { x, saved, .. } = activations;
            let kept = Kept { saved: &mut saved[place], rounded: None };
            // The block's own output is not needed again.
            let mut output = if has_next { std::mem::take(&mut x[to]) } else { Vec::new() };
            let y = has_next.then(|| &mut output[..len]);
            sub_layer.forward(*self, &x[from][..len], kept, temporary, y, None);
            if has_next {
                x[to] = output;
            }
        }
    }

    /// The first block whose input is not finite in the activations kept of the pass. For saying where a NaN came from.
    pub fn first_non_finite_block(&self, workspace: &Workspace) -> Option<NonFinite> {
        let encoder = self.model.encoder.as_ref().zip(self.of_source());
        let in_encoder = encoder
            .and_then(|(stack, source)| source.first_in_stack(stack, &workspace.encoder, workspace.saving))
            .map(|(block, row)| NonFinite { in_encoder: true, block, row });
        in_encoder.or_else(|| {
            let (block, row) = self.first_in_stack(&self.model.decoder, &workspace.decoder, workspace.saving)?;
            Some(NonFinite { in_encoder: false, block, row })
        })
    }

    fn first_in_stack(&self, stack: &Stack, activations: &Activations, saving: Saving) -> Option<(usize, u64)> {
        let d = self.model.spec.hidden_size;
        let blocks = if saving == Saving::None { 0 } else { stack.blocks() + 1 };
        for b in 0..blocks {
            let is_bad = |t: &usize| !activations.block_input_is_finite(stack, saving, b, t * d..(t + 1) * d);
            if let Some(token) = (0..self.pass.tokens()).find(is_bad) {
                return Some((b, self.pass.sequence_of(token).map_or(0, |s| s.row)));
            }
        }
        None
    }
}
