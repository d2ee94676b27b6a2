//! What a training step must do at the least, by kind of operation: the floor that a benchmark holds its times against.

use crate::compute::Compute;
use crate::model::{LinearId, Middle, Model};
use crate::overlay::{LowRank, OutputScale, Overlay};
use crate::profile::{OPERATIONS, Operation};
use crate::saved::{Saving, Widths};

/// The work of one kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Multiplications and additions of matrix products in f32.
    pub f32_operations: f64,
    /// The same in 8 bits.
    pub int8_operations: f64,
    /// Bytes read and written, everything once, of tensors of a pass: a cache may hold them.
    pub bytes: f64,
    /// The same of what no cache holds.
    pub streamed_bytes: f64,
}

/// Work by kind of operation, of a model with what stands on it.
struct Tally<'a> {
    work: [Work; OPERATIONS.len()],
    model: &'a Model,
    overlay: &'a Overlay,
    compute: &'a Compute,
}

impl Tally<'_> {
    fn of(&mut self, operation: Operation) -> &mut Work {
        &mut self.work[operation as usize]
    }

    fn sizes(&self, id: LinearId) -> (f64, f64, f64) {
        let linear = self.model.linear(id);
        (linear.cols() as f64, linear.rows() as f64, self.overlay.change(id).rank() as f64)
    }

    /// A product with a linear's weight.
    fn product(&mut self, operation: Operation, id: LinearId, tokens: f64) {
        let (k, n, _) = self.sizes(id);
        let operations = 2.0 * tokens * k * n;
        let in_int8 = self.compute.int8(id).is_some();
        let work = self.of(operation);
        *(if in_int8 { &mut work.int8_operations } else { &mut work.f32_operations }) += operations;
    }

    /// Rows of `width` values made 8-bit integers for a linear.
    fn quantize(&mut self, id: LinearId, tokens: f64, width: f64) {
        if self.compute.int8(id).is_some() {
            self.of(Operation::Quantize).bytes += 5.0 * tokens * width;
        }
    }

    fn forward(&mut self, id: LinearId, tokens: f64) {
        let (k, n, r) = self.sizes(id);
        self.product(Operation::Linear, id, tokens);
        self.quantize(id, tokens, k);
        self.project(id, tokens);
        // Of the low-rank term and of the channels that are not in 8 bits.
        let rank = r + self.compute.int8(id).map_or(0, |weight| weight.outlier_count()) as f64;
        self.of(Operation::Linear).f32_operations += 2.0 * tokens * rank * n;
        let change = self.overlay.change(id);
        let scaled = f64::from(u8::from(change.input_scale.is_some())) * k
            + f64::from(u8::from(change.output_scale.is_some())) * n;
        // One read, one written.
        self.of(Operation::Scale).bytes += 8.0 * tokens * scaled;
    }

    fn project(&mut self, id: LinearId, tokens: f64) {
        let (k, _, r) = self.sizes(id);
        self.of(Operation::LowRank).f32_operations += 2.0 * tokens * r * k;
    }

    /// `input`: whether the gradient of the linear's input is needed.
    fn backward(&mut self, id: LinearId, tokens: f64, input: bool) {
        let (k, n, r) = self.sizes(id);
        let change = self.overlay.change(id);
        let input = input || change.input_scale.is_some();
        if input {
            self.product(Operation::Linear, id, tokens);
            self.quantize(id, tokens, n);
        }
        let ranks = |is_trained: &dyn Fn(&LowRank) -> bool| -> f64 {
            change.low_rank.iter().filter(|term| is_trained(term)).map(|term| term.r as f64).sum()
        };
        let (a, b) = (ranks(&|term| term.a.trained().is_some()), ranks(&|term| term.b.trained().is_some()));
        // v = g·B, dB = gᵀ·u, dA = vᵀ·x; v·A is part of the input's gradient.
        self.of(Operation::LowRank).f32_operations += 2.0 * tokens * (r * n + b * n + a * k);
        self.of(Operation::Linear).f32_operations += if input { 2.0 * tokens * r * k } else { 0.0 };
        if change.weight.is_some() {
            self.of(Operation::WeightGradient).f32_operations += 2.0 * tokens * k * n;
        }
        // Gradient and unscaled output read, gradient written; of an input its gradient is read twice, before and after what it was is known.
        let output = if change.output_scale.is_some() { 12.0 * n } else { 0.0 };
        let scaled_input = if change.input_scale.is_some() { 16.0 * k } else { 0.0 };
        self.of(Operation::Scale).bytes += tokens * (output + scaled_input);
    }

    /// The norms under output scales, once a step: the terms' A with the weight.
    fn row_norms(&mut self, id: LinearId) {
        let (k, n, r) = self.sizes(id);
        if matches!(self.overlay.change(id).output_scale, Some(OutputScale::OverNorm(_))) {
            self.of(Operation::Scale).f32_operations += 2.0 * r * k * n;
        }
    }
}

/// The work of a step of a decoder alone over sequences of these lengths, a label on all tokens but the first of each, in the order of
/// [`OPERATIONS`]. Nothing is shared between sequences: each has its own virtual tokens.
pub fn work_of_step(
    model: &Model,
    overlay: &Overlay,
    compute: &Compute,
    sequences: &[usize],
    saving: Saving,
) -> Vec<(&'static str, Work)> {
    let prelude = overlay.prelude(&model.spec);
    let computed = |n: &usize| prelude.virtual_ids.len() + n;
    let tokens = sequences.iter().map(computed).sum::<usize>() as f64;
    let labels = sequences.iter().map(|n| n.saturating_sub(1)).sum::<usize>() as f64;
    let (d, v) = (model.spec.hidden_size as f64, model.spec.vocab_size as f64);
    let stack = &model.decoder;
    let lowest = overlay.lowest_sub_layer(model, stack);
    let trains_embedding = overlay.trains_embedding(model, stack);
    let mut tally = Tally { work: [Work::default(); OPERATIONS.len()], model, overlay, compute };
    tally.of(Operation::Embedding).bytes += 8.0 * tokens * d;
    for (s, sub_layer) in stack.sub_layers.iter().enumerate() {
        let backward = lowest.is_some_and(|lowest| s >= lowest);
        let needs_input = lowest.is_some_and(|lowest| s > lowest) || trains_embedding;
        let to_inputs = needs_input || overlay.trains_inputs(model, sub_layer);
        let below = to_inputs || overlay.trains_mix(model, sub_layer);
        let is_last = stack.sub_layers.get(s + 1).is_none_or(|next| next.block != sub_layer.block);
        let norms = 1.0 + f64::from(u8::from(sub_layer.post_norm.is_some()));
        // What the middle reads and writes.
        let widths = Widths::of(model, overlay, sub_layer);
        let (inner, mixed) = (sub_layer.inner as f64, sub_layer.mixed() as f64);
        let middle = |tally: &mut Tally, is_backward: bool| match &sub_layer.middle {
            Middle::Attention(attention) => {
                let scores = &attention.scores;
                let window = scores.window.unwrap_or(usize::MAX);
                let seen = |n: usize| (1..=n).map(|i| (prelude.prefix + i).min(window)).sum::<usize>() as f64;
                let seen: f64 = sequences.iter().map(computed).map(seen).sum();
                let turned = ((scores.queries + scores.keys) * scores.head_dim) as f64;
                if attention.rope.is_some() {
                    tally.of(Operation::Rope).bytes += 8.0 * tokens * turned;
                }
                let (operation, products) =
                    if is_backward { (Operation::AttentionBackward, 10.0) } else { (Operation::Attention, 4.0) };
                tally.of(operation).f32_operations += products * seen * mixed;
            }
            Middle::Activation { .. } => {
                // Inputs read and output written; in the backward all of them read and written.
                let values = if is_backward { 2.0 * (inner + mixed) } else { inner + mixed };
                tally.of(Operation::Activation).bytes += 4.0 * tokens * values;
            }
        };
        // Once more in the backward where only the block's input is kept.
        let forwards = if backward && saving == Saving::BlockInputs { 2 } else { 1 };
        for again in 0..forwards {
            sub_layer.inputs.iter().for_each(|&id| tally.forward(id, tokens));
            // The block's output is not needed twice.
            let is_scaled = overlay.change(sub_layer.output).output_scale.is_some();
            if again == 0 || !is_last || sub_layer.post_norm.is_some() || is_scaled {
                tally.forward(sub_layer.output, tokens);
            } else {
                tally.project(sub_layer.output, tokens);
            }
            tally.of(Operation::Norm).bytes += norms * 8.0 * tokens * d;
            middle(&mut tally, false);
        }
        if !backward {
            continue;
        }
        tally.backward(sub_layer.output, tokens, below);
        if below {
            middle(&mut tally, true);
        }
        if !to_inputs {
            continue;
        }
        let to_norm = needs_input || sub_layer.norm.vectors().any(|vector| overlay.trains_vector(vector));
        sub_layer.inputs.iter().for_each(|&id| tally.backward(id, tokens, to_norm));
        // Recomputed, then the gradient: three read, one written.
        tally.of(Operation::Norm).bytes += norms * (8.0 + 16.0) * tokens * d;
        if saving == Saving::Bf16 {
            let is_attention = sub_layer.attention().is_some();
            // An activation itself writes its inputs rounded, and reads them so.
            let by_itself = if is_attention { 0.0 } else { inner };
            tally.of(Operation::Activation).bytes -= 4.0 * tokens * by_itself;
            tally.of(Operation::Activation).streamed_bytes += 4.0 * tokens * by_itself;
            // What is scaled is rounded as it is, and read so.
            let scaled = widths.unscaled.iter().sum::<usize>() as f64;
            tally.of(Operation::Scale).bytes -= 4.0 * tokens * scaled;
            tally.of(Operation::Scale).streamed_bytes += 4.0 * tokens * scaled;
            let values = (widths.x + widths.rounded()) as f64 - by_itself - scaled;
            // Queries, keys and values are rounded where they are as well.
            let in_place = if is_attention { inner } else { 0.0 };
            tally.of(Operation::SavedActivations).bytes += 8.0 * tokens * values + 4.0 * tokens * in_place;
            tally.of(Operation::SavedActivations).streamed_bytes += 4.0 * tokens * values;
        }
    }
    (0..model.linears.len()).for_each(|id| tally.row_norms(LinearId(id)));
    let gradients = if overlay.change(model.head).weight.is_some() { 3 } else { 2 };
    for _ in 0..gradients {
        tally.product(Operation::Head, model.head, labels);
    }
    // Logits become probabilities in place, then integers.
    let per_logit = if compute.head_in_int8(model) { 8.0 + 5.0 } else { 8.0 };
    tally.of(Operation::Head).streamed_bytes += per_logit * labels * v;
    // Parameter, gradient and two moments, read and written.
    tally.of(Operation::Optimizer).streamed_bytes += 32.0 * overlay.layout.len() as f64;
    OPERATIONS.iter().map(|&(operation, name)| (name, *tally.of(operation))).collect()
}
