//! The last norm, the head and its loss over the label tokens, a block of rows at a time, forward and backward.

use retune_kernels::column_scale::Unscaled;
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::int8::Int8Matrix;
use retune_kernels::{cross_entropy, embedding, vector};

use crate::linear::{self, Gradient, Input, Keep, To};
use crate::model::Linear;
use crate::overlay::TokenRows;
use crate::pass::Label;
use crate::profile::{Operation, span};
use crate::run::Run;
use crate::saved::grow;
use crate::workspace::{HeadBuffers, Temporary, Workspace};

impl Run<'_> {
    /// Copies rows of the last block's output together and normalises them.
    fn gather_normalised(&self, tokens: impl Iterator<Item = u32>, rows: usize, x: &[f32], head: &mut HeadBuffers) {
        let d = self.model.spec.hidden_size;
        grow(&mut head.rows, rows * d);
        grow(&mut head.norm, rows * d);
        for (row, token) in head.rows.chunks_exact_mut(d).zip(tokens) {
            let at = token as usize * d;
            row.copy_from_slice(&x[at..at + d]);
        }
        let norm = &mut head.norm[..rows * d];
        self.model.decoder.norm.forward(*self, &head.rows[..rows * d], norm);
        self.scale_hidden(norm);
    }

    /// Multiplies normalised hidden states, or their gradient, by the head's factor.
    fn scale_hidden(&self, x: &mut [f32]) {
        let scale = self.model.spec.head.scale;
        if scale != 1.0 {
            vector::scale(x, scale);
        }
    }

    /// Makes room for what the head keeps of `rows` rows for its backward.
    fn grow_kept(&self, rows: usize, head: &mut HeadBuffers) {
        grow(&mut head.u, rows * self.overlay.ranks(&[self.model.head]));
        grow(&mut head.unscaled, rows * self.overlay.unscaled(self.model, &[self.model.head]));
    }

    /// Writes the logits `[tokens.len(), V]` of tokens of the pass whose layers were run last without backward.
    pub(crate) fn last_logits(&self, tokens: &[u32], workspace: &mut Workspace, logits: &mut [f32]) {
        let Workspace { saving, decoder, temporary, head, .. } = workspace;
        let last = decoder.last(&self.model.decoder, *saving, false);
        let rows = tokens.len();
        self.gather_normalised(tokens.iter().copied(), rows, last, head);
        self.grow_kept(rows, head);
        let _span = span(Operation::Head);
        let norm = &head.norm[..rows * self.model.spec.hidden_size];
        let keep = Keep { u: &mut head.u, unscaled: &mut head.unscaled, rounded: None };
        let to = To::Columns(&mut *logits);
        linear::forward(self.of_head(), &[self.model.head], norm, to, keep, &mut temporary.linear);
        self.replace_logits(norm, logits);
        if let Some(cap) = self.model.spec.head.soft_cap {
            cross_entropy::soft_cap(logits, cap);
        }
    }

    /// Sums the loss over the pass's labels; with `grads` also runs the backward, which leaves the gradient of the last block's output in
    /// `dx`.
    pub(crate) fn head_pass(&self, mut grads: Option<&mut [f32]>, workspace: &mut Workspace) -> f64 {
        let (pass, spec) = (self.pass, &self.model.spec);
        let (d, v) = (spec.hidden_size, spec.vocab_size);
        let backward = grads.is_some();
        let block = Workspace::head_rows(self.model, self.compute.head_in_int8(self.model), pass.labels.len());
        let Workspace { saving, decoder, temporary, head, losses, .. } = workspace;
        let last = decoder.last(&self.model.decoder, *saving, backward);
        losses.resize(pass.labels.len(), 0.0);
        if backward {
            temporary.dx[..pass.tokens() * d].fill(0.0);
        }
        for (labels, losses) in pass.labels.chunks(block).zip(losses.chunks_mut(block)) {
            let rows = labels.len();
            self.gather_normalised(labels.iter().map(|l| l.token), rows, last, head);
            grow(&mut head.logits, block * v);
            self.grow_kept(block, head);
            head.targets.clear();
            head.targets.extend(labels.iter().map(|l| l.target));
            {
                let _span = span(Operation::Head);
                let (norm, logits) = (&head.norm[..rows * d], &mut head.logits[..rows * v]);
                let to = To::Columns(&mut *logits);
                let keep = Keep { u: &mut head.u, unscaled: &mut head.unscaled, rounded: None };
                linear::forward(self.of_head(), &[self.model.head], norm, to, keep, &mut temporary.linear);
                self.replace_logits(norm, logits);
                match self.int8_head().filter(|_| backward) {
                    None => {
                        cross_entropy::forward_backward(logits, &head.targets, losses, backward, spec.head.soft_cap)
                    }
                    Some((linear, weight)) => {
                        grow(&mut head.label_gradients, rows);
                        let to = [losses, &mut head.label_gradients[..rows]];
                        let (cap, rounding) = (spec.head.soft_cap, linear.gradient_rounding);
                        let quantized = temporary.linear.quantized();
                        cross_entropy::forward_quantized(logits, &head.targets, to, cap, weight, quantized, rounding);
                    }
                }
            }
            if let Some(grads) = grads.as_deref_mut() {
                self.head_backward(grads, labels, head, temporary);
            }
        }
        losses.iter().map(|&l| f64::from(l)).sum()
    }

    /// Puts the logits of trained rows of the head, for its input `norm: [T, D]`, in the place of the base's.
    fn replace_logits(&self, norm: &[f32], logits: &mut [f32]) {
        let Some(TokenRows { ids, rows }) = &self.overlay.head_rows else { return };
        let (d, v, count) = (self.model.spec.hidden_size, self.model.spec.vocab_size, ids.len());
        let tokens = norm.len() / d;
        let trained = Rhs::View(MatRef::rows(&self.params[rows.clone()], d).t());
        let mut own = vec![0.0; tokens * count];
        gemm(tokens, count, &[Term::new(d, MatRef::rows(norm, d), trained)], Out::set(&mut own, count));
        let bias = self.model.linear(self.model.head).bias.map(|bias| self.vector(bias));
        for (logits, own) in logits.chunks_exact_mut(v).zip(own.chunks_exact(count)) {
            for (&id, own) in ids.iter().zip(own) {
                logits[id as usize] = own + bias.map_or(0.0, |bias| bias[id as usize]);
            }
        }
    }

    /// Takes the gradients of the logits of trained rows out of `logits: [T, V]`, `[T, count]`; nothing where there are none.
    fn take_gradients(&self, logits: &mut [f32]) -> Vec<f32> {
        let Some(TokenRows { ids, .. }) = &self.overlay.head_rows else { return Vec::new() };
        let rows = logits.chunks_exact_mut(self.model.spec.vocab_size);
        rows.flat_map(|row| ids.iter().map(|&id| std::mem::take(&mut row[id as usize]))).collect()
    }

    /// Adds what the gradients of trained rows' logits make of the gradients of these rows and of the head's input.
    fn rows_backward(&self, own: &[f32], norm: &[f32], dx: Option<&mut [f32]>, grads: &mut [f32]) {
        let Some(TokenRows { ids, rows }) = &self.overlay.head_rows else { return };
        let (d, count) = (self.model.spec.hidden_size, ids.len());
        let tokens = own.len() / count.max(1);
        let product = Term::new(tokens, MatRef::rows(own, count).t(), Rhs::View(MatRef::rows(norm, d)));
        gemm(count, d, &[product], Out::add(&mut grads[rows.clone()], d));
        if let Some(dx) = dx {
            let trained = Rhs::View(MatRef::rows(&self.params[rows.clone()], d));
            gemm(tokens, d, &[Term::new(count, MatRef::rows(own, count), trained)], Out::add(dx, d));
        }
    }

    fn head_backward(&self, grads: &mut [f32], labels: &[Label], head: &mut HeadBuffers, temporary: &mut Temporary) {
        let run = self.of_head();
        let (d, v) = (self.model.spec.hidden_size, self.model.spec.vocab_size);
        let rows = labels.len();
        let stack = &self.model.decoder;
        let below = self.overlay.trains_norm(&stack.norm) || self.overlay.lowest_sub_layer(self.model, stack).is_some();
        grow(&mut head.dnorm, rows * d);
        grow(&mut head.drows, rows * d);
        let HeadBuffers { rows: inputs, norm, dnorm, drows, logits, targets, label_gradients, u, unscaled } = head;
        {
            let _span = span(Operation::Head);
            let logits = &mut logits[..rows * v];
            let own = self.take_gradients(logits);
            // In 8 bits the label's own gradient, p − 1, is kept apart and exact: beside it small probabilities would round to 0, and where p
            // is close to 1 it would cancel against a rounded weight, the same way at every step.
            let is_measured = self.compute.watch.is_some() && !self.overlay.changes_linear(self.model, self.model.head);
            let exact_labels = self.compute.head_in_int8(self.model) || is_measured;
            if exact_labels && self.int8_head().is_none() {
                grow(label_gradients, rows);
                let labels = logits.chunks_exact_mut(v).zip(&*targets).zip(&mut *label_gradients);
                labels.for_each(|((row, &target), gradient)| *gradient = std::mem::take(&mut row[target as usize]));
            }
            let dx = below.then(|| &mut dnorm[..rows * d]);
            match (self.int8_head(), dx) {
                // The gradient is quantized already, and no parameter wants it.
                (Some((_, weight)), Some(dx)) => {
                    gemm(rows, d, &[Term::int8_plain(temporary.linear.quantized(), weight)], Out::set(dx, d));
                }
                (Some(_), None) => {}
                (None, dx) => {
                    let (group, kept) = (&[self.model.head], Unscaled::Exact(unscaled));
                    linear::unscale_gradients(run, group, None, logits, rows, kept, grads, &mut temporary.linear);
                    let gradient = Gradient { group, g: logits };
                    let input = Input { x: &norm[..rows * d], u };
                    linear::backward(run, gradient, grads, input, &mut temporary.linear, dx);
                }
            }
            if exact_labels && below {
                let weight = self.weight(self.model.head);
                embedding::add_scaled_rows(weight.panel(), targets, label_gradients, &mut dnorm[..rows * d]);
            }
            self.rows_backward(&own, &norm[..rows * d], below.then(|| &mut dnorm[..rows * d]), grads);
        }
        if !below {
            return;
        }
        let _span = span(Operation::Norm);
        let drows = &mut drows[..rows * d];
        drows.fill(0.0);
        self.scale_hidden(&mut dnorm[..rows * d]);
        self.model.decoder.norm.backward(*self, &inputs[..rows * d], &dnorm[..rows * d], drows, grads);
        for (label, row) in labels.iter().zip(drows.chunks_exact(d)) {
            let at = label.token as usize * d;
            // Several rows may read a token they share.
            vector::add(&mut temporary.dx[at..at + d], row);
        }
    }

    /// The head and its weight in 8 bits, where nothing else wants its output's gradient: that gradient is then quantized where it comes into
    /// being.
    fn int8_head(&self) -> Option<(&Linear, &Int8Matrix)> {
        let id = self.model.head;
        let wanted = self.overlay.changes_linear(self.model, id) || self.compute.watch.is_some();
        self.compute.int8(id).filter(|_| !wanted).map(|weight| (self.model.linear(id), weight))
    }

    /// The same run without dropout: the head's rows are label tokens, not the pass's.
    fn of_head(&self) -> Self {
        Self { step: None, ..*self }
    }
}
