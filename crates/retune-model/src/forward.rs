//! The forward pass through the layers.

use retune_kernels::attention::{self, Segment};
use retune_kernels::gemm::Out;
use retune_kernels::{F32Panel, bf16, embedding, rms_norm, rope, swiglu};

use crate::generate::LayerCache;
use crate::linear::{self, Dropout};
use crate::model::{Layer, Model};
use crate::pass::Pass;
use crate::profile::{Operation, span};
use crate::workspace::{LayerSaved, RoundedLayer, Temporary, Workspace, grow};

/// What all layers of a pass share.
pub(crate) struct Context<'a> {
    pub model: &'a Model,
    pub params: &'a [f32],
    pub pass: &'a Pass,
    pub rope: &'a rope::Table,
    pub dropout: Option<Dropout<'a>>,
}

/// Where a layer leaves what its backward reads.
pub(crate) struct Kept<'a> {
    pub saved: &'a mut LayerSaved,
    /// The same rounded, where that is what lasts.
    pub rounded: Option<&'a mut RoundedLayer>,
}

impl Model {
    /// Runs the layers; afterwards the last one's output is in the workspace. With `backward` what the backward reads is kept, and dropout
    /// applies.
    pub(crate) fn forward_layers(
        &self,
        params: &[f32],
        pass: &Pass,
        dropout: Option<Dropout>,
        workspace: &mut Workspace,
        backward: bool,
        mut cache: Option<&mut [LayerCache]>,
    ) {
        let tokens = pass.tokens();
        let positions = pass.positions.iter().max().map_or(0, |&p| p as usize + 1);
        workspace.reserve(self, tokens, positions, backward);
        let d = self.config.hidden_size;
        let first = workspace.input(0, backward);
        {
            let _span = span(Operation::Embedding);
            let table = self.embedding.source(params);
            embedding::forward(table.panel(), &pass.ids, &mut workspace.x[first][..tokens * d]);
        }
        fill_segments(pass, &mut workspace.temporary.segments);
        for (l, layer) in self.layers.iter().enumerate() {
            let (from, to) = (workspace.input(l, backward), workspace.input(l + 1, backward));
            let saved = workspace.saved(l, backward);
            let Workspace { x, layers, rounded, temporary, rope, .. } = workspace;
            let context = Context { model: self, params, pass, rope, dropout };
            let rounded = if backward { rounded.get_mut(l) } else { None };
            let kept = Kept { saved: &mut layers[saved], rounded };
            // Input and output are two different buffers of `x`.
            let mut output = std::mem::take(&mut x[to]);
            let cache = cache.as_mut().map(|c| &mut c[l]);
            let input = &x[from][..tokens * d];
            layer.forward(&context, input, kept, temporary, Some(&mut output[..tokens * d]), cache);
            x[to] = output;
        }
    }
}

pub(crate) fn fill_segments(pass: &Pass, segments: &mut Vec<Segment>) {
    segments.clear();
    segments.extend(pass.sequences.iter().map(|s| Segment { queries: s.tokens.clone(), keys: s.whole.clone() }));
}

/// Keys or values of the rows laid whole, `[Σ row, width]`, from those of the pass's tokens, `[T, width]`.
pub(crate) fn whole_rows<'a>(pass: &Pass, tokens: &'a [f32], width: usize, memory: &'a mut Vec<f32>) -> &'a [f32] {
    if !pass.is_shared() {
        return tokens;
    }
    let len = pass.row_tokens() * width;
    grow(memory, len);
    embedding::forward(&F32Panel::new(tokens, width), &pass.places, &mut memory[..len]);
    &memory[..len]
}

impl Layer {
    /// Runs the layer on `x: [T, D]` and fills `kept`; writes the layer's output unless it is only rerun for its backward.
    pub(crate) fn forward(
        &self,
        context: &Context,
        x: &[f32],
        Kept { saved, mut rounded }: Kept,
        temporary: &mut Temporary,
        output: Option<&mut [f32]>,
        cache: Option<&mut LayerCache>,
    ) {
        let Context { model, params, pass, rope, ref dropout } = *context;
        let c = &model.config;
        let (d, f, tokens) = (c.hidden_size, c.intermediate_size, pass.tokens());
        let (wide, narrow) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let dropout = dropout.as_ref();
        let norm = &mut temporary.norm[..tokens * d];
        let scratch = &mut temporary.linear;
        let [u_qkv, u_o, u_gate_up, u_down] = &mut saved.u;
        // What lasts is rounded where it comes into being: it is in the cache then.
        keep(x, rounded.as_mut().map(|rounded| &mut rounded.x));
        {
            let _span = span(Operation::Norm);
            rms_norm::forward(x, self.input_norm.values(params), c.rms_norm_eps, norm);
        }
        let q = &mut saved.q[..tokens * wide];
        let k = &mut saved.k[..tokens * narrow];
        let v = &mut saved.v[..tokens * narrow];
        let qkv = [
            (&self.q, Out::set(&mut *q, wide)),
            (&self.k, Out::set(&mut *k, narrow)),
            (&self.v, Out::set(&mut *v, narrow)),
        ];
        linear::forward(qkv, params, norm, u_qkv, dropout, scratch);
        {
            let _span = span(Operation::Rope);
            rope::forward(q, &pass.positions, rope);
            rope::forward(k, &pass.positions, rope);
        }
        if let Some(rounded) = &mut rounded {
            // The backward computes the probabilities again from the kept queries and keys, and their gradient from the kept values: they must
            // be those that the log-sum-exp and the output are of.
            let _span = span(Operation::SavedActivations);
            for (x, to) in
                [(&mut *q, &mut rounded.saved.q), (&mut *k, &mut rounded.saved.k), (&mut *v, &mut rounded.saved.v)]
            {
                bf16::round_both(x, &mut to[..x.len()]);
            }
        }
        {
            let _span = span(Operation::Attention);
            let out = &mut saved.attention[..tokens * wide];
            let lse = &mut saved.lse[..tokens * c.num_attention_heads];
            match cache {
                None => {
                    let [keys, values] = &mut temporary.whole;
                    let (keys, values) = (whole_rows(pass, k, narrow, keys), whole_rows(pass, v, narrow, values));
                    attention::forward(&model.heads, &temporary.segments, q, keys, values, out, lse);
                }
                Some(cache) => {
                    cache.append(k, v);
                    let segment = Segment { queries: 0..tokens, keys: 0..cache.keys.len() / narrow };
                    attention::forward(&model.heads, &[segment], q, &cache.keys, &cache.values, out, lse);
                }
            }
        }
        let attention = &saved.attention[..tokens * wide];
        keep(attention, rounded.as_mut().map(|rounded| &mut rounded.saved.attention));
        if let Some(rounded) = &mut rounded {
            let lse = &saved.lse[..tokens * c.num_attention_heads];
            rounded.saved.lse[..lse.len()].copy_from_slice(lse);
        }
        let residual = &mut saved.residual[..tokens * d];
        let o = [(&self.o, Out::sum(&mut *residual, d, x))];
        linear::forward(o, params, attention, u_o, dropout, scratch);
        keep(residual, rounded.as_mut().map(|rounded| &mut rounded.saved.residual));
        {
            let _span = span(Operation::Norm);
            rms_norm::forward(residual, self.post_norm.values(params), c.rms_norm_eps, norm);
        }
        let gate = &mut saved.gate[..tokens * f];
        let up = &mut saved.up[..tokens * f];
        let gate_up = [(&self.gate, Out::set(&mut *gate, f)), (&self.up, Out::set(&mut *up, f))];
        linear::forward(gate_up, params, norm, u_gate_up, dropout, scratch);
        // Even a rerun without output needs the adapter's projection of the activation for the backward.
        if output.is_none() && self.down.lora.is_none() {
            return;
        }
        let hidden = &mut temporary.hidden[..tokens * f];
        {
            let _span = span(Operation::Activation);
            let kept = rounded
                .as_mut()
                .map(|rounded| [&mut rounded.saved.gate[..tokens * f], &mut rounded.saved.up[..tokens * f]]);
            swiglu::forward(gate, up, hidden, kept);
        }
        match output {
            Some(output) => {
                let down = [(&self.down, Out::sum(output, d, residual))];
                linear::forward(down, params, hidden, u_down, dropout, scratch);
            }
            None => linear::project(&[&self.down], params, hidden, u_down, dropout, scratch),
        }
        if let Some(rounded) = rounded {
            for ((u, to), shared) in saved.u.iter().zip(&mut rounded.saved.u).zip(Self::SHARED_INPUTS) {
                let ranks = linear::ranks(self.linears()[shared].iter().copied());
                keep(&u[..tokens * ranks], Some(to));
            }
        }
    }
}

/// Rounds what was computed to where it lasts, if it does.
fn keep(x: &[f32], to: Option<&mut Vec<u16>>) {
    if let Some(to) = to {
        let _span = span(Operation::SavedActivations);
        bf16::round(x, &mut to[..x.len()]);
    }
}
