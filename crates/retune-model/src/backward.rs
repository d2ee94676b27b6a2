//! The head, its loss, and the backward pass through the layers.

use retune_kernels::attention::{self, Saved};
use retune_kernels::gemm::Out;
use retune_kernels::{bf16, cross_entropy, embedding, rms_norm, rope, swiglu, vector};

use crate::forward::{Context, Kept, whole_rows};
use crate::linear::{self, Branch, Dropout, Input};
use crate::model::{Layer, Model};
use crate::pass::{Label, Pass};
use crate::profile::{Operation, span};
use crate::workspace::{HeadBuffers, Keep, Temporary, Workspace, grow};

impl Model {
    /// The summed loss over the labels of a pass, in nats; each label's own is left in [`Workspace::losses`].
    pub fn loss(&self, params: &[f32], pass: &Pass, workspace: &mut Workspace) -> f64 {
        self.forward_layers(params, pass, None, workspace, false, None);
        self.head_pass(params, None, pass, workspace, false)
    }

    /// The summed loss over the labels of a pass; its gradient is added to `grads`. With `dropout` the adapters' dropout applies.
    pub fn loss_and_gradient(
        &self,
        params: &[f32],
        grads: &mut [f32],
        pass: &Pass,
        dropout: Option<Dropout>,
        workspace: &mut Workspace,
    ) -> f64 {
        self.forward_layers(params, pass, dropout, workspace, true, None);
        let loss = self.head_pass(params, Some(grads), pass, workspace, true);
        self.backward_layers(params, grads, pass, dropout, workspace);
        loss
    }

    /// Logits `[tokens.len(), V]` of the given tokens of a pass.
    pub fn logits(&self, params: &[f32], pass: &Pass, tokens: &[u32], workspace: &mut Workspace) -> Vec<f32> {
        self.forward_layers(params, pass, None, workspace, false, None);
        let mut logits = vec![0.0; tokens.len() * self.config.vocab_size];
        self.last_logits(params, tokens, workspace, &mut logits);
        logits
    }

    /// Logits of tokens of the pass whose layers were run last without backward.
    pub(crate) fn last_logits(&self, params: &[f32], tokens: &[u32], workspace: &mut Workspace, logits: &mut [f32]) {
        let last = workspace.input(self.layers.len(), false);
        let Workspace { x, temporary, head, .. } = workspace;
        let rows = tokens.len();
        self.gather_normalised(params, tokens.iter().copied(), rows, &x[last], head);
        grow(&mut head.u, rows * self.head.rank());
        let (d, v) = (self.config.hidden_size, self.config.vocab_size);
        let _span = span(Operation::Head);
        let norm = &head.norm[..rows * d];
        let out = [(&self.head, Out::set(&mut *logits, v))];
        linear::forward(out, params, norm, &mut head.u, None, &mut temporary.linear);
    }

    /// Copies rows of the last layer's output together and normalises them.
    fn gather_normalised(
        &self,
        params: &[f32],
        tokens: impl Iterator<Item = u32>,
        rows: usize,
        x: &[f32],
        head: &mut HeadBuffers,
    ) {
        let d = self.config.hidden_size;
        grow(&mut head.rows, rows * d);
        grow(&mut head.norm, rows * d);
        for (row, token) in head.rows.chunks_exact_mut(d).zip(tokens) {
            let at = token as usize * d;
            row.copy_from_slice(&x[at..at + d]);
        }
        let _span = span(Operation::Norm);
        let (rows, norm) = (&head.rows[..rows * d], &mut head.norm[..rows * d]);
        rms_norm::forward(rows, self.norm.values(params), self.config.rms_norm_eps, norm);
    }

    /// Final norm, head and loss over the label tokens, a block of rows at a time; with `grads` also their backward, which leaves the
    /// gradient of the last layer's output in `dx`.
    fn head_pass(
        &self,
        params: &[f32],
        mut grads: Option<&mut [f32]>,
        pass: &Pass,
        workspace: &mut Workspace,
        backward: bool,
    ) -> f64 {
        let (d, v) = (self.config.hidden_size, self.config.vocab_size);
        let last = workspace.input(self.layers.len(), backward);
        let block = Workspace::head_rows(self, self.head.int8.is_some(), pass.labels.len());
        let Workspace { x, temporary, head, losses, .. } = workspace;
        losses.resize(pass.labels.len(), 0.0);
        if backward {
            temporary.dx[..pass.tokens() * d].fill(0.0);
        }
        for (labels, losses) in pass.labels.chunks(block).zip(losses.chunks_mut(block)) {
            let rows = labels.len();
            self.gather_normalised(params, labels.iter().map(|l| l.token), rows, &x[last], head);
            grow(&mut head.logits, block * v);
            grow(&mut head.u, block * self.head.rank());
            head.targets.clear();
            head.targets.extend(labels.iter().map(|l| l.target));
            {
                let _span = span(Operation::Head);
                let norm = &head.norm[..rows * d];
                let logits = &mut head.logits[..rows * v];
                let out = [(&self.head, Out::set(&mut *logits, v))];
                linear::forward(out, params, norm, &mut head.u, None, &mut temporary.linear);
                cross_entropy::forward_backward(logits, &head.targets, losses, backward);
            }
            if let Some(grads) = grads.as_deref_mut() {
                self.head_backward(params, grads, labels, head, temporary);
            }
        }
        losses.iter().map(|&l| f64::from(l)).sum()
    }

    fn head_backward(
        &self,
        params: &[f32],
        grads: &mut [f32],
        labels: &[Label],
        head: &mut HeadBuffers,
        temporary: &mut Temporary,
    ) {
        let (d, v) = (self.config.hidden_size, self.config.vocab_size);
        let rows = labels.len();
        let below = self.norm.is_trainable() || self.lowest_trainable_layer().is_some();
        grow(&mut head.dnorm, rows * d);
        grow(&mut head.drows, rows * d);
        let HeadBuffers { rows: inputs, norm, dnorm, drows, logits, targets, label_gradients, u } = head;
        {
            let _span = span(Operation::Head);
            let logits = &mut logits[..rows * v];
            // In 8 bits the label's own gradient, p − 1, is kept apart and exact: beside it small probabilities would round to 0, and where p
            // is close to 1 it would cancel against a rounded weight, the same way at every step.
            let measured = temporary.linear.calibration.is_some();
            let exact_labels = self.head.int8.is_some() || measured && !self.head.is_trainable();
            if exact_labels {
                grow(label_gradients, rows);
                let labels = logits.chunks_exact_mut(v).zip(&*targets).zip(&mut *label_gradients);
                labels.for_each(|((row, &target), gradient)| *gradient = std::mem::take(&mut row[target as usize]));
            }
            let branch = Branch { linear: &self.head, g: logits };
            let dx = below.then(|| &mut dnorm[..rows * d]);
            let input = Input { x: &norm[..rows * d], u };
            linear::backward(&[branch], params, grads, input, None, &mut temporary.linear, dx);
            if exact_labels && below {
                let weight = self.head.weight.source(params);
                embedding::add_scaled_rows(weight.panel(), targets, label_gradients, &mut dnorm[..rows * d]);
            }
        }
        if !below {
            return;
        }
        let _span = span(Operation::Norm);
        let drows = &mut drows[..rows * d];
        drows.fill(0.0);
        let weight = self.norm.values(params);
        let (inputs, dnorm) = (&inputs[..rows * d], &dnorm[..rows * d]);
        rms_norm::backward(inputs, weight, self.config.rms_norm_eps, dnorm, drows, self.norm.gradient(grads));
        for (label, row) in labels.iter().zip(drows.chunks_exact(d)) {
            let at = label.token as usize * d;
            // Several rows may read a token they share.
            vector::add(&mut temporary.dx[at..at + d], row);
        }
    }

    fn backward_layers(
        &self,
        params: &[f32],
        grads: &mut [f32],
        pass: &Pass,
        dropout: Option<Dropout>,
        workspace: &mut Workspace,
    ) {
        // Nothing trainable needs a gradient below the lowest layer with something to train.
        let Some(lowest) = self.lowest_trainable_layer() else { return };
        let (d, tokens) = (self.config.hidden_size, pass.tokens());
        let embedding_range = self.embedding.range();
        for (l, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            let (input, saved) = (workspace.input(l, true), workspace.saved(l, true));
            let Workspace { x, layers, rounded, temporary, rope, keep, .. } = workspace;
            let context = Context { model: self, params, pass, rope, dropout };
            let x = &mut x[input][..tokens * d];
            let saved = &mut layers[saved];
            if *keep == Keep::Inputs {
                layer.forward(&context, x, Kept { saved, rounded: None }, temporary, None, None);
            }
            let needs_input = l > lowest || embedding_range.is_some();
            let kept = Kept { saved, rounded: rounded.get_mut(l) };
            layer.backward(&context, grads, x, kept, temporary, needs_input);
        }
        if let Some(range) = embedding_range {
            let _span = span(Operation::Embedding);
            embedding::backward(&pass.ids, &workspace.temporary.dx[..tokens * d], d, &mut grads[range]);
        }
    }

    /// The first layer whose input is not finite in the activations kept of a pass, and the row of the data set it happens in; the
    /// number of layers stands for the output of the last. For saying where a NaN came from.
    pub fn first_non_finite_layer(&self, pass: &Pass, workspace: &Workspace) -> Option<(usize, u64)> {
        let d = self.config.hidden_size;
        let layers = if workspace.keep == Keep::Nothing { 0 } else { self.layers.len() + 1 };
        for l in 0..layers {
            let token = (0..pass.tokens()).find(|t| !workspace.input_is_finite(l, t * d..(t + 1) * d));
            if let Some(token) = token {
                return Some((l, pass.sequence_of(token).map_or(0, |s| s.row)));
            }
        }
        None
    }
}

impl Layer {
    /// Turns the gradient of the layer's output, in `temporary.dx: [T, D]`, into that of its input, and adds the gradients of what is
    /// trained to `grads`. What the forward saved is used up. What it kept rounded is put back in its place as it is needed, `x: [T, D]` too; gate
    /// and up are read as they were kept.
    fn backward(
        &self,
        context: &Context,
        grads: &mut [f32],
        x: &mut [f32],
        Kept { saved, rounded }: Kept,
        temporary: &mut Temporary,
        needs_input: bool,
    ) {
        let Context { model, params, pass, rope, ref dropout } = *context;
        let c = &model.config;
        let (d, f, tokens, eps) = (c.hidden_size, c.intermediate_size, pass.tokens(), c.rms_norm_eps);
        let (wide, narrow) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let dropout = dropout.as_ref();
        let Temporary { norm, hidden, dx, dnorm, dattention, dq, dk, dv, linear: scratch, segments, whole, dwhole } =
            temporary;
        let (norm, dx, dnorm) = (&mut norm[..tokens * d], &mut dx[..tokens * d], &mut dnorm[..tokens * d]);
        let rounded = rounded.as_deref();
        if let Some(rounded) = rounded {
            for ((u, from), shared) in saved.u.iter_mut().zip(&rounded.saved.u).zip(Self::SHARED_INPUTS) {
                let ranks = linear::ranks(self.linears()[shared].iter().copied());
                restore(&mut u[..tokens * ranks], Some(from));
            }
        }
        let [u_qkv, u_o, u_gate_up, u_down] = &saved.u;

        // MLP: dx is the gradient of the down projection's output as well as of the residual stream.
        let hidden = &mut hidden[..tokens * f];
        let (gate, up) = (&mut saved.gate[..tokens * f], &mut saved.up[..tokens * f]);
        let branch = [Branch { linear: &self.down, g: dx }];
        linear::project_gradients(&branch, params, tokens, scratch);
        linear::input_gradient(&branch, params, tokens, dropout, scratch, hidden);
        {
            let _span = span(Operation::Activation);
            let kept = rounded.map(|rounded| [&rounded.saved.gate[..tokens * f], &rounded.saved.up[..tokens * f]]);
            swiglu::backward(gate, up, hidden, kept);
        }
        // The activation has just been recomputed into the place of its gradient.
        linear::parameter_gradients(&branch, grads, Input { x: hidden, u: u_down }, dropout, scratch);
        let below = needs_input || self.trains_attention();
        let further = below || self.post_norm.is_trainable();
        if !further && !self.gate.is_trainable() && !self.up.is_trainable() {
            return;
        }
        let residual = &mut saved.residual[..tokens * d];
        restore(residual, rounded.map(|rounded| &rounded.saved.residual));
        let residual = &*residual;
        {
            let _span = span(Operation::Norm);
            rms_norm::forward(residual, self.post_norm.values(params), eps, norm);
        }
        let branches = [Branch { linear: &self.gate, g: gate }, Branch { linear: &self.up, g: up }];
        let input = Input { x: norm, u: u_gate_up };
        linear::backward(&branches, params, grads, input, dropout, scratch, further.then_some(&mut *dnorm));
        if !further {
            return;
        }
        {
            let _span = span(Operation::Norm);
            let weight = self.post_norm.values(params);
            rms_norm::backward(residual, weight, eps, dnorm, dx, self.post_norm.gradient(grads));
        }
        if !below {
            return;
        }

        // Attention.
        let further = needs_input || self.trains_attention_input();
        let attention = &mut saved.attention[..tokens * wide];
        restore(attention, rounded.map(|rounded| &rounded.saved.attention));
        let attention = &*attention;
        let dattention = &mut dattention[..tokens * wide];
        let branch = Branch { linear: &self.o, g: dx };
        let to_attention = further.then_some(&mut *dattention);
        let input = Input { x: attention, u: u_o };
        linear::backward(&[branch], params, grads, input, dropout, scratch, to_attention);
        if !further {
            return;
        }
        let (dq, dk, dv) = (&mut dq[..tokens * wide], &mut dk[..tokens * narrow], &mut dv[..tokens * narrow]);
        if let Some(rounded) = rounded {
            restore(&mut saved.q[..tokens * wide], Some(&rounded.saved.q));
            restore(&mut saved.k[..tokens * narrow], Some(&rounded.saved.k));
            restore(&mut saved.v[..tokens * narrow], Some(&rounded.saved.v));
            let lse = &mut saved.lse[..tokens * c.num_attention_heads];
            lse.copy_from_slice(&rounded.saved.lse[..lse.len()]);
        }
        {
            let _span = span(Operation::AttentionBackward);
            let [keys, values] = whole;
            let k = whole_rows(pass, &saved.k[..tokens * narrow], narrow, keys);
            let v = whole_rows(pass, &saved.v[..tokens * narrow], narrow, values);
            let saved = Saved { q: &saved.q, k, v, out: attention, lse: &saved.lse };
            if pass.is_shared() {
                let len = pass.row_tokens() * narrow;
                dwhole.iter_mut().for_each(|gradient| grow(gradient, len));
                let [whole_dk, whole_dv] = dwhole.each_mut().map(|gradient| &mut gradient[..len]);
                attention::backward(&model.heads, segments, &saved, dattention, dq, whole_dk, whole_dv);
                for (sum, whole) in [(&mut *dk, whole_dk), (&mut *dv, whole_dv)] {
                    sum.fill(0.0);
                    embedding::backward(&pass.places, whole, narrow, sum);
                }
            } else {
                attention::backward(&model.heads, segments, &saved, dattention, dq, dk, dv);
            }
        }
        {
            let _span = span(Operation::Rope);
            rope::backward(dq, &pass.positions, rope);
            rope::backward(dk, &pass.positions, rope);
        }
        restore(x, rounded.map(|rounded| &rounded.x));
        let x = &*x;
        {
            let _span = span(Operation::Norm);
            rms_norm::forward(x, self.input_norm.values(params), eps, norm);
        }
        let branches =
            [Branch { linear: &self.q, g: dq }, Branch { linear: &self.k, g: dk }, Branch { linear: &self.v, g: dv }];
        let input = needs_input || self.input_norm.is_trainable();
        let to_norm = input.then_some(&mut *dnorm);
        let shared = Input { x: norm, u: u_qkv };
        linear::backward(&branches, params, grads, shared, dropout, scratch, to_norm);
        if input {
            let _span = span(Operation::Norm);
            let weight = self.input_norm.values(params);
            rms_norm::backward(x, weight, eps, dnorm, dx, self.input_norm.gradient(grads));
        }
    }
}

/// Puts back what was kept rounded, where it was.
fn restore(x: &mut [f32], from: Option<&Vec<u16>>) {
    if let Some(from) = from {
        let _span = span(Operation::SavedActivations);
        bf16::widen(&from[..x.len()], x);
    }
}
