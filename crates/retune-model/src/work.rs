//! What a training step must do at the least, by kind of operation: the floor that a benchmark holds its times against.

use crate::linear::Linear;
use crate::model::Model;
use crate::profile::{OPERATIONS, Operation};
use crate::workspace::Keep;

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

/// Work by kind of operation.
struct Tally([Work; OPERATIONS.len()]);

impl Tally {
    fn of(&mut self, operation: Operation) -> &mut Work {
        &mut self.0[operation as usize]
    }

    /// A product with a linear's weight.
    fn product(&mut self, operation: Operation, linear: &Linear, tokens: f64) {
        let operations = 2.0 * tokens * (linear.in_features * linear.out_features) as f64;
        let work = self.of(operation);
        match &linear.int8 {
            Some(_) => work.int8_operations += operations,
            None => work.f32_operations += operations,
        }
    }

    /// Rows of `width` values made 8-bit integers for a linear.
    fn quantize(&mut self, linear: &Linear, tokens: f64, width: usize) {
        if linear.int8.is_some() {
            self.of(Operation::Quantize).bytes += 5.0 * tokens * width as f64;
        }
    }

    fn forward(&mut self, linear: &Linear, tokens: f64) {
        self.product(Operation::Linear, linear, tokens);
        self.quantize(linear, tokens, linear.in_features);
        self.project(linear, tokens);
        // Of the adapter and of the channels that are not in 8 bits.
        let rank = linear.rank() + linear.int8.as_ref().map_or(0, |weight| weight.outlier_count());
        self.of(Operation::Linear).f32_operations += 2.0 * tokens * (rank * linear.out_features) as f64;
    }

    fn project(&mut self, linear: &Linear, tokens: f64) {
        self.of(Operation::LowRank).f32_operations += 2.0 * tokens * (linear.rank() * linear.in_features) as f64;
    }

    /// `input`: whether the gradient of the linear's input is needed.
    fn backward(&mut self, linear: &Linear, tokens: f64, input: bool) {
        if input {
            self.product(Operation::Linear, linear, tokens);
            self.quantize(linear, tokens, linear.out_features);
        }
        let low_rank = 2.0 * tokens * linear.rank() as f64;
        let (k, n) = (linear.in_features as f64, linear.out_features as f64);
        // v = g·B, dB = gᵀ·u, dA = vᵀ·x; v·A is part of the input's gradient.
        self.of(Operation::LowRank).f32_operations += low_rank * (2.0 * n + k);
        self.of(Operation::Linear).f32_operations += if input { low_rank * k } else { 0.0 };
        if linear.weight.range().is_some() {
            self.of(Operation::WeightGradient).f32_operations += 2.0 * tokens * k * n;
        }
    }
}

impl Model {
    /// The work of a step over sequences of these lengths, a label on all tokens but the first of each, in the order of [`OPERATIONS`].
    pub fn work(&self, sequences: &[usize], keep: Keep) -> Vec<(&'static str, Work)> {
        let c = &self.config;
        let tokens = sequences.iter().sum::<usize>() as f64;
        let labels = sequences.iter().map(|n| n.saturating_sub(1)).sum::<usize>() as f64;
        let (d, f, v) = (c.hidden_size as f64, c.intermediate_size as f64, c.vocab_size as f64);
        let (q, k) = ((self.heads.queries * c.head_dim) as f64, (self.heads.keys * c.head_dim) as f64);
        let window = self.heads.window.unwrap_or(usize::MAX);
        let seen: f64 = sequences.iter().map(|&n| (1..=n).map(|i| i.min(window)).sum::<usize>() as f64).sum();
        let lowest = self.lowest_trainable_layer();

        let mut tally = Tally([Work::default(); OPERATIONS.len()]);
        tally.of(Operation::Embedding).bytes += 8.0 * tokens * d;
        for (l, layer) in self.layers.iter().enumerate() {
            let backward = lowest.is_some_and(|lowest| l >= lowest);
            let below = lowest.is_some_and(|lowest| l > lowest) || self.embedding.range().is_some();
            // Once more in the backward where only the layer's input is kept.
            let forwards = if backward && keep == Keep::Inputs { 2 } else { 1 };
            for again in 0..forwards {
                let [others @ .., down] = layer.linears();
                others.into_iter().for_each(|linear| tally.forward(linear, tokens));
                // The layer's output is not needed twice.
                if again == 0 {
                    tally.forward(down, tokens)
                } else {
                    tally.project(down, tokens)
                }
                tally.of(Operation::Norm).bytes += 2.0 * 8.0 * tokens * d;
                tally.of(Operation::Rope).bytes += 8.0 * tokens * (q + k);
                tally.of(Operation::Attention).f32_operations += 4.0 * seen * q;
                tally.of(Operation::Activation).bytes += 12.0 * tokens * f;
            }
            if !backward {
                continue;
            }
            for (i, linear) in layer.linears().into_iter().enumerate() {
                let reads_input = i < 3;
                tally.backward(linear, tokens, !reads_input || below || layer.input_norm.is_trainable());
            }
            // Recomputed, then the gradient: three read, one written.
            tally.of(Operation::Norm).bytes += 2.0 * (8.0 + 16.0) * tokens * d;
            tally.of(Operation::Rope).bytes += 8.0 * tokens * (q + k);
            tally.of(Operation::AttentionBackward).f32_operations += 10.0 * seen * q;
            if keep == Keep::RoundedActivations {
                // The activation itself writes its two inputs rounded, and reads them so.
                tally.of(Operation::Activation).bytes += 16.0 * tokens * f;
                tally.of(Operation::Activation).streamed_bytes += 8.0 * tokens * f;
                let ranks: usize = layer.linears().iter().map(|linear| linear.rank()).sum();
                let values = 2.0 * d + 2.0 * q + 2.0 * k + ranks as f64;
                // Queries, keys and values are rounded where they are as well.
                tally.of(Operation::SavedActivations).bytes += 8.0 * tokens * values + 4.0 * tokens * (q + 2.0 * k);
                tally.of(Operation::SavedActivations).streamed_bytes += 4.0 * tokens * values;
            } else {
                tally.of(Operation::Activation).bytes += 24.0 * tokens * f;
            }
        }
        let gradients = if self.head.weight.range().is_some() { 3 } else { 2 };
        for _ in 0..gradients {
            tally.product(Operation::Head, &self.head, labels);
        }
        // Logits become probabilities in place, then integers.
        let per_logit = if self.head.int8.is_some() { 8.0 + 5.0 } else { 8.0 };
        tally.of(Operation::Head).streamed_bytes += per_logit * labels * v;
        // Parameter, gradient and two moments, read and written.
        tally.of(Operation::Optimizer).streamed_bytes += 32.0 * self.layout.len() as f64;
        OPERATIONS.iter().map(|&(operation, name)| (name, *tally.of(operation))).collect()
    }
}
