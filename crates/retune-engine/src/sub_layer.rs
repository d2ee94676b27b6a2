//! The one form of a sub-layer, `y = x + post_norm(mix(norm(x)·Wᵢᵀ)·Wₒᵀ)`, forward and backward.

use std::ops::Range;

use retune_kernels::attention::{self, Scores, Segment};
use retune_kernels::column_scale::Unscaled;
use retune_kernels::heads::{HeadLayout, Heads, HeadsMut};
use retune_kernels::{activation, bf16, glu, rows, vector};

use crate::distances::Biases;
use crate::generate::{Cache, Continued};
use crate::linear::{self, Gradient, Input, Keep, To};
use crate::model::{Attention, LinearId, Middle, Model, SubLayer};
use crate::overlay::Overlay;
use crate::pass::{Pass, Sequence};
use crate::profile::{Operation, span};
use crate::rope::{Direction, Rotations};
use crate::run::Run;
use crate::saved::{GROUPS, INPUTS, MEMORY, OUTPUT, Rounded, Saved, grow, keep, restore};
use crate::spec::Function;
use crate::workspace::Temporary;

/// Where a sub-layer leaves what its backward reads.
pub(crate) struct Kept<'a> {
    pub saved: &'a mut Saved,
    /// The same rounded, where that is what lasts.
    pub rounded: Option<&'a mut Rounded>,
}

impl SubLayer {
    /// Runs the sub-layer on `x: [T, D]` and fills `kept`; writes `y: [T, D]` unless the sub-layer is only run again for its backward.
    pub fn forward(
        &self,
        run: Run,
        x: &[f32],
        Kept { saved, mut rounded }: Kept,
        t: &mut Temporary,
        y: Option<&mut [f32]>,
        cache: Option<Continued<Cache>>,
    ) {
        let tokens = run.pass.tokens();
        let d = run.model.spec.hidden_size;
        // What lasts is rounded where it comes into being: it is in the cache then.
        keep(x, rounded.as_mut().map(|rounded| &mut rounded.x));
        let norm = &mut t.norm[..tokens * d];
        self.norm.forward(run, x, norm);
        let inner = &mut saved.inner[..tokens * self.inner];
        let keep_inputs = group_keep(&mut saved.u, &mut saved.unscaled, rounded.as_deref_mut(), INPUTS);
        linear::forward(run, &self.inputs, norm, To::Columns(&mut *inner), keep_inputs, &mut t.linear);
        let output = [self.output];
        let is_projected = y.is_some() || self.post_norm.is_some();
        // Even without output the backward needs what the output linear keeps.
        let change = run.overlay.change(self.output);
        let is_mixed = is_projected || !change.low_rank.is_empty() || change.output_scale.is_some();
        let mixed = match &self.middle {
            Middle::Attention(attention) => {
                if cache.as_ref().is_none_or(|of| of.texts.iter().any(|&text| of.cache.tokens(text) == 0)) {
                    attention.remember(run, saved, rounded.as_deref_mut(), t);
                }
                attention.forward(run, saved, rounded.as_deref_mut(), t, cache);
                let mixed = &saved.mixed[..tokens * self.mixed()];
                keep(mixed, rounded.as_mut().map(|rounded| &mut rounded.saved.mixed));
                mixed
            }
            Middle::Activation { .. } if !is_mixed => return,
            Middle::Activation { function, gated, width } => {
                let _span = span(Operation::Activation);
                let mixed = &mut t.mixed[..tokens * width];
                let kept = rounded.as_mut().map(|rounded| &mut rounded.saved.inner[..tokens * self.inner]);
                match gated {
                    true => glu::forward(inner, *width, *function, mixed, kept),
                    false => activation::forward(inner, *function, mixed, kept),
                }
                &*mixed
            }
        };
        let keep_output = group_keep(&mut saved.u, &mut saved.unscaled, rounded.as_deref_mut(), OUTPUT);
        match (&self.post_norm, y) {
            (None, None) => linear::forward(run, &output, mixed, To::Nowhere, keep_output, &mut t.linear),
            (None, Some(y)) => linear::forward(run, &output, mixed, To::Sum(y, x), keep_output, &mut t.linear),
            (Some(norm), y) => {
                let raw = &mut saved.raw_output[..tokens * d];
                linear::forward(run, &output, mixed, To::Columns(&mut *raw), keep_output, &mut t.linear);
                if let Some(rounded) = &mut rounded {
                    // The backward computes the norm's gradient from what is kept.
                    bf16::round_both(raw, &mut rounded.saved.raw_output[..tokens * d]);
                }
                if let Some(y) = y {
                    norm.forward(run, raw, y);
                    vector::add(y, x);
                }
            }
        }
        if let Some(rounded) = rounded {
            for ((u, to), len) in saved.u.iter().zip(&mut rounded.saved.u).zip(self.projected(run)) {
                keep(&u[..len], Some(to));
            }
        }
    }

    /// How many values the low-rank projections of each group of linears have in a pass.
    fn projected(&self, run: Run) -> [usize; GROUPS] {
        let (own, source) = (run.pass.tokens(), run.pass.source_tokens());
        let ranks = |group: &[LinearId]| run.overlay.ranks(group);
        [own * ranks(&self.inputs), own * ranks(&[self.output]), source * ranks(self.memory_linears())]
    }

    /// Turns the gradient of the output, in `t.dx: [T, D]`, into that of the input, and adds the gradients of what is trained to `grads`.
    /// What the forward saved is used up. What it kept rounded is put back in its place as it is needed, `x: [T, D]` too.
    ///
    /// `needs_input` says whether anything below this sub-layer is trained.
    pub fn backward(
        &self,
        run: Run,
        grads: &mut [f32],
        x: &mut [f32],
        Kept { saved, rounded }: Kept,
        t: &mut Temporary,
        needs_input: bool,
    ) {
        let tokens = run.pass.tokens();
        let d = run.model.spec.hidden_size;
        let rounded = rounded.as_deref();
        let output = [self.output];
        if let Some(rounded) = rounded {
            for ((u, from), len) in saved.u.iter_mut().zip(&rounded.saved.u).zip(self.projected(run)) {
                restore(&mut u[..len], Some(from));
            }
        }
        // The gradient of the output linear's output is that of the residual stream, but for a norm between them.
        let is_scaled = run.overlay.change(self.output).output_scale.is_some();
        let mut g = &t.dx[..tokens * d];
        if self.post_norm.is_some() || is_scaled {
            let draw = &mut t.draw_output[..tokens * d];
            if let Some(norm) = &self.post_norm {
                let raw = &mut saved.raw_output[..tokens * d];
                restore(raw, rounded.map(|rounded| &rounded.saved.raw_output));
                draw.fill(0.0);
                norm.backward(run, raw, g, draw, grads);
            }
            if is_scaled {
                let (dy, z) = (self.post_norm.is_none().then_some(g), unscaled_of(&saved.unscaled, rounded, OUTPUT));
                linear::unscale_gradients(run, &output, dy, draw, tokens, z, grads, &mut t.linear);
            }
            g = draw;
        }
        let gradient = Gradient { group: &output, g };
        let to_inputs = needs_input || run.overlay.trains_inputs(run.model, self);
        let below = to_inputs || run.overlay.trains_mix(run.model, self);
        let dmixed = &mut t.mixed[..tokens * self.mixed()];
        linear::project_gradients(run, gradient, tokens, &mut t.linear);
        if below || linear::needs_input_gradient(run, &output) {
            linear::input_gradient(run, gradient, tokens, &mut t.linear, below.then_some(&mut *dmixed));
        }
        match &self.middle {
            Middle::Activation { function, gated, width } => {
                let inner = &mut saved.inner[..tokens * self.inner];
                let kept = rounded.map(|rounded| &rounded.saved.inner[..tokens * self.inner]);
                activation_backward(*function, gated.then_some(*width), below, inner, kept, dmixed);
                // The activation has just been computed again, into the place of its gradient.
                let input = Input { x: dmixed, u: &saved.u[OUTPUT] };
                linear::parameter_gradients(run, gradient, grads, input, &mut t.linear);
            }
            Middle::Attention(attention) => {
                restore(&mut saved.mixed[..tokens * self.mixed()], rounded.map(|rounded| &rounded.saved.mixed));
                let input = Input { x: &saved.mixed[..tokens * self.mixed()], u: &saved.u[OUTPUT] };
                linear::parameter_gradients(run, gradient, grads, input, &mut t.linear);
                if below {
                    attention.backward(run, grads, saved, rounded, t);
                    attention.remember_backward(run, grads, saved, rounded, t);
                }
            }
        }
        if !to_inputs {
            return;
        }
        restore(x, rounded.map(|rounded| &rounded.x));
        let norm = &mut t.norm[..tokens * d];
        self.norm.forward(run, x, norm);
        let z = unscaled_of(&saved.unscaled, rounded, INPUTS);
        let dinner = match &self.middle {
            Middle::Attention(_) => &mut t.dinner[..tokens * self.inner],
            Middle::Activation { .. } => &mut saved.inner[..tokens * self.inner],
        };
        linear::unscale_gradients(run, &self.inputs, None, dinner, tokens, z, grads, &mut t.linear);
        let trains_norm = run.overlay.trains_norm(&self.norm);
        let to_norm = (needs_input || trains_norm).then_some(&mut t.dnorm[..tokens * d]);
        let gradient = Gradient { group: &self.inputs, g: dinner };
        linear::backward(run, gradient, grads, Input { x: norm, u: &saved.u[INPUTS] }, &mut t.linear, to_norm);
        if needs_input || trains_norm {
            self.norm.backward(run, x, &t.dnorm[..tokens * d], &mut t.dx[..tokens * d], grads);
        }
    }
}

/// Where a group of a sub-layer's linears leaves what its backward reads.
fn group_keep<'a>(
    u: &'a mut [Vec<f32>; GROUPS],
    unscaled: &'a mut [Vec<f32>; GROUPS],
    rounded: Option<&'a mut Rounded>,
    group: usize,
) -> Keep<'a> {
    let rounded = rounded.map(|rounded| &mut rounded.saved.unscaled[group][..]);
    Keep { u: &mut u[group], unscaled: &mut unscaled[group], rounded }
}

/// What was kept of a group's outputs before their scale.
fn unscaled_of<'a>(saved: &'a [Vec<f32>; GROUPS], rounded: Option<&'a Rounded>, group: usize) -> Unscaled<'a> {
    match rounded {
        None => Unscaled::Exact(&saved[group]),
        Some(rounded) => Unscaled::Rounded(&rounded.saved.unscaled[group]),
    }
}

/// Replaces the inputs of an activation by their gradients, and the gradient of its output, `dmixed`, by the output itself. Where nothing
/// below is trained (`below` is false) only the output is computed. A gated activation has a `width`. What was kept rounded is read from
/// there.
fn activation_backward(
    function: Function,
    gated: Option<usize>,
    below: bool,
    inner: &mut [f32],
    kept: Option<&[u16]>,
    dmixed: &mut [f32],
) {
    let _span = span(Operation::Activation);
    match (below, gated) {
        (true, Some(width)) => glu::backward(inner, width, function, dmixed, kept),
        (true, None) => activation::backward(inner, function, dmixed, kept),
        (false, gated) => {
            if let Some(kept) = kept {
                bf16::widen(kept, inner);
            }
            match gated {
                Some(width) => glu::forward(inner, width, function, dmixed, None),
                None => activation::forward(inner, function, dmixed, None),
            }
        }
    }
}

/// Fills in the segments of a pass for the attention: the queries of each row and the keys they may see, its own and those of its source.
pub(crate) fn fill_segments(pass: &Pass, t: &mut Temporary) {
    t.segments.clear();
    t.segments.extend(pass.sequences.iter().map(|s| Segment { queries: s.tokens.clone(), keys: s.keys.clone() }));
    t.cross_segments.clear();
    if let Some(source) = &pass.source {
        let rows = pass.sequences.iter().zip(&source.sequences);
        t.cross_segments.extend(rows.map(|(s, of)| Segment { queries: s.tokens.clone(), keys: of.tokens.clone() }));
    }
}

/// The keys (or values) of whole rows, from those of the prefix and of the pass's tokens.
fn whole_rows<'a>(pass: &Pass, prefix: Option<Heads>, tokens: Heads, memory: &'a mut Vec<f32>) -> Heads<'a> {
    let layout = HeadLayout::dense(tokens.layout.heads, tokens.layout.head_dim);
    let len = pass.keys() * layout.row;
    grow(memory, len);
    let whole = &mut memory[..len];
    if let Some(prefix) = prefix {
        rows::gather(prefix, &pass.key_rows, pass.prefix_rows(), whole);
    }
    rows::gather(tokens, &pass.key_rows, pass.token_rows(), whole);
    Heads { data: whole, layout }
}

impl Attention {
    fn heads<'a>(&self, data: &'a [f32], layout: HeadLayout) -> Heads<'a> {
        Heads { data, layout }
    }

    /// Where the keys and the values of a prefix lie, and where their rows are in the flat vector, if it precedes this attention.
    fn prefix_place(&self, model: &Model, overlay: &Overlay) -> Option<(Range<usize>, [HeadLayout; 2])> {
        let (prefix, number) = (overlay.prefix.as_ref()?, self.number?);
        let place = prefix.places.get(number).copied().unwrap_or(number);
        Some((prefix.values.clone(), model.prefix_places[place]))
    }

    /// The keys and the values that precede each row, if any do.
    pub fn prefix<'a>(&self, model: &Model, overlay: &Overlay, params: &'a [f32]) -> [Option<Heads<'a>>; 2] {
        match self.prefix_place(model, overlay) {
            Some((values, layouts)) => layouts.map(|layout| Some(Heads { data: &params[values.clone()], layout })),
            None => [None; 2],
        }
    }

    /// Whether keys and values of whole rows are laid out apart from those of the pass's tokens.
    fn lays_rows_whole(&self, pass: &Pass) -> bool {
        self.memory.is_none() && (pass.is_shared() || pass.prelude.prefix > 0)
    }

    /// How the scores are computed, with the biases by distance where it has some.
    fn scores<'a>(&self, biases: &'a Biases) -> Scores<'a> {
        Scores { distances: self.buckets.map(|_| biases.get()), ..self.scores.clone() }
    }

    /// Writes keys and values of the encoder's output to `saved.memory`, if it looks at that.
    fn remember(&self, run: Run, saved: &mut Saved, mut rounded: Option<&mut Rounded>, t: &mut Temporary) {
        let (Some(memory), Some(of_source)) = (&self.memory, run.of_source()) else { return };
        let tokens = of_source.pass.tokens();
        let inner = &mut saved.memory[..tokens * memory.row];
        let keep = group_keep(&mut saved.u, &mut saved.unscaled, rounded.as_deref_mut(), MEMORY);
        let x = &t.memory[..tokens * run.model.spec.hidden_size];
        linear::forward(of_source, &memory.linears, x, To::Columns(&mut *inner), keep, &mut t.linear);
        if let Some(rounded) = rounded {
            let _span = span(Operation::SavedActivations);
            bf16::round_both(inner, &mut rounded.saved.memory[..inner.len()]);
        }
    }

    /// Adds the gradients of the linears that made keys and values of the encoder's output to `grads`, and that of this output to
    /// `t.dmemory`, for the gradient of keys and values in `t.dmemory_inner`.
    fn remember_backward(
        &self,
        run: Run,
        grads: &mut [f32],
        saved: &Saved,
        rounded: Option<&Rounded>,
        t: &mut Temporary,
    ) {
        let (Some(memory), Some(of_source)) = (&self.memory, run.of_source()) else { return };
        let (tokens, group) = (of_source.pass.tokens(), &memory.linears[..]);
        let len = tokens * run.model.spec.hidden_size;
        let Temporary { memory: x, dmemory, dmemory_inner, dmemory_part, linear, .. } = t;
        let g = &mut dmemory_inner[..tokens * memory.row];
        let z = unscaled_of(&saved.unscaled, rounded, MEMORY);
        linear::unscale_gradients(of_source, group, None, g, tokens, z, grads, linear);
        let input = Input { x: &x[..len], u: &saved.u[MEMORY] };
        let part = run.overlay.trains_encoder(run.model).then_some(&mut dmemory_part[..len]);
        let is_wanted = part.is_some();
        linear::backward(of_source, Gradient { group, g }, grads, input, linear, part);
        if is_wanted {
            vector::add(&mut dmemory[..len], &dmemory_part[..len]);
        }
    }

    /// Where queries and keys lie once they are normalised and rotated apart from the inputs' output.
    fn turned_layouts(&self) -> [HeadLayout; 2] {
        let d = self.scores.head_dim;
        let row = (self.q.heads + self.k.heads) * d;
        let layout = |first: usize, heads: usize| HeadLayout { row, first, head: d, heads, head_dim: d };
        [layout(0, self.q.heads), layout(self.q.heads * d, self.k.heads)]
    }

    /// Normalises queries and keys, and rotates them, into `turned`.
    fn turn(&self, run: Run, inner: &[f32], turned: &mut [f32], rotations: &mut Rotations) {
        let Some(norms) = &self.qk_norm else { return };
        for ((norm, from), to) in norms.iter().zip([self.q, self.k]).zip(self.turned_layouts()) {
            norm.heads_forward(run, self.heads(inner, from), HeadsMut::new(turned, to));
            if let Some(rope) = self.rope {
                rotations.turn(rope, turned, to, run.pass, Direction::Forward);
            }
        }
        self.scale_queries(run.pass, turned, self.turned_layouts()[0]);
    }

    /// Multiplies queries, or their gradients, by what their positions say.
    fn scale_queries(&self, pass: &Pass, x: &mut [f32], layout: HeadLayout) {
        let Some(scale) = self.query_scale else { return };
        for (row, &position) in x.chunks_mut(layout.row).zip(&pass.positions) {
            let factor = scale.at(position);
            if factor != 1.0 {
                for head in 0..layout.heads {
                    let at = layout.first + head * layout.head;
                    row[at..at + layout.head_dim].iter_mut().for_each(|v| *v *= factor);
                }
            }
        }
    }

    /// Queries, keys and values as the attention reads them; `memory` is what was made of the encoder's output.
    fn read<'a>(&self, inner: &'a [f32], turned: &'a [f32], memory: &'a [f32]) -> [Heads<'a>; 3] {
        if self.memory.is_some() {
            return [self.heads(inner, self.q), self.heads(memory, self.k), self.heads(memory, self.v)];
        }
        let v = self.heads(inner, self.v);
        if self.qk_norm.is_none() {
            return [self.heads(inner, self.q), self.heads(inner, self.k), v];
        }
        let [q, k] = self.turned_layouts().map(|layout| self.heads(turned, layout));
        [q, k, v]
    }

    /// Keys and values of whole rows, from those of the pass's tokens: these themselves where nothing precedes the rows and they share
    /// nothing.
    fn whole<'a>(&self, run: Run<'a>, [k, v]: [Heads<'a>; 2], memory: &'a mut [Vec<f32>; 2]) -> [Heads<'a>; 2] {
        if !self.lays_rows_whole(run.pass) {
            return [k, v];
        }
        let ([keys, values], [first_k, first_v]) = (memory, self.prefix(run.model, run.overlay, run.params));
        [whole_rows(run.pass, first_k, k, keys), whole_rows(run.pass, first_v, v, values)]
    }

    /// Writes the attention's output to `saved.mixed`, from `saved.inner`.
    fn forward(
        &self,
        run: Run,
        saved: &mut Saved,
        mut rounded: Option<&mut Rounded>,
        t: &mut Temporary,
        cache: Option<Continued<Cache>>,
    ) {
        let tokens = run.pass.tokens();
        let inner = &mut saved.inner[..tokens * self.q.row];
        if self.qk_norm.is_none() {
            if let Some(rope) = self.rope {
                for layout in [self.q, self.k] {
                    t.rotations.turn(rope, inner, layout, run.pass, Direction::Forward);
                }
            }
            self.scale_queries(run.pass, inner, self.q);
        }
        if let Some(rounded) = &mut rounded {
            // The backward computes the probabilities again from the kept queries and keys, and their gradient from the kept values: they must
            // be those that the log-sum-exp and the output are of.
            let _span = span(Operation::SavedActivations);
            bf16::round_both(inner, &mut rounded.saved.inner[..inner.len()]);
        }
        let inner = &*inner;
        self.turn(run, inner, &mut t.turned, &mut t.rotations);
        let _span = span(Operation::Attention);
        let scores = self.scores(&t.distances);
        let [q, k, v] = self.read(inner, &t.turned, &saved.memory);
        let out = &mut saved.mixed[..tokens * self.scores.queries * self.scores.head_dim];
        let lse = &mut saved.lse[..tokens * self.scores.queries];
        match cache {
            None => {
                let [k, v] = self.whole(run, [k, v], &mut t.whole);
                let segments = if self.memory.is_some() { &t.cross_segments } else { &t.segments };
                attention::forward(&scores, segments, q, k, v, out, lse);
            }
            Some(Continued { cache, texts }) => {
                for (&text, sequence) in texts.iter().zip(&run.pass.sequences) {
                    match &self.memory {
                        None => cache.append(text, k, v, sequence.tokens.clone()),
                        // What is made of the encoder's output stays the same.
                        Some(_) if cache.tokens(text) == 0 => cache.append(text, k, v, 0..run.pass.source_tokens()),
                        Some(_) => {}
                    }
                }
                t.segments.clear();
                let rows = texts.iter().zip(&run.pass.sequences);
                let segment = |(&text, of): (&usize, &Sequence)| Segment {
                    queries: of.tokens.clone(),
                    keys: cache.stretch(text),
                };
                t.segments.extend(rows.map(segment));
                attention::forward(&scores, &t.segments, q, cache.keys(), cache.values(), out, lse);
            }
        }
        if let Some(rounded) = rounded {
            rounded.saved.lse[..lse.len()].copy_from_slice(lse);
        }
    }

    /// Writes the gradients of queries, keys and values to `t.dinner`, those of keys and values of the encoder's output to `t.dmemory_inner`,
    /// for the gradient of the output in `t.mixed`, and adds those of a prefix to `grads` and those of biases to `t.distances`.
    fn backward(&self, run: Run, grads: &mut [f32], saved: &mut Saved, rounded: Option<&Rounded>, t: &mut Temporary) {
        let tokens = run.pass.tokens();
        let source_row = self.memory.as_ref().map_or(0, |memory| memory.row);
        let source = run.pass.source_tokens() * source_row;
        restore(&mut saved.memory[..source], rounded.map(|rounded| &rounded.saved.memory));
        let inner = &mut saved.inner[..tokens * self.q.row];
        let lse = &mut saved.lse[..tokens * self.scores.queries];
        if let Some(rounded) = rounded {
            restore(inner, Some(&rounded.saved.inner));
            lse.copy_from_slice(&rounded.saved.lse[..lse.len()]);
        }
        let inner = &*inner;
        self.turn(run, inner, &mut t.turned, &mut t.rotations);
        let width = self.scores.queries * self.scores.head_dim;
        let (out, dout) = (&saved.mixed[..tokens * width], &t.mixed[..tokens * width]);
        let dinner = &mut t.dinner[..tokens * self.q.row];
        {
            let _span = span(Operation::AttentionBackward);
            let [q, k, v] = self.read(inner, &t.turned, &saved.memory);
            let [k, v] = self.whole(run, [k, v], &mut t.whole);
            let saved = attention::Saved { q, k, v, out, lse };
            let (distances, ddistances) = t.distances.with_gradients();
            let scores = Scores { distances: self.buckets.map(|_| distances), ..self.scores.clone() };
            let ddistances = self.buckets.map(|_| ddistances);
            if self.memory.is_some() {
                let dq = HeadsMut::new(&mut *dinner, self.q);
                let [dk, dv] = HeadsMut::in_one(&mut t.dmemory_inner[..source], [self.k, self.v]);
                let gradients = [dq, dk, dv];
                attention::backward(&scores, &t.cross_segments, &saved, dout, gradients, ddistances);
            } else if self.lays_rows_whole(run.pass) {
                let layout = HeadLayout::dense(self.k.heads, self.k.head_dim);
                let len = run.pass.keys() * layout.row;
                t.dwhole.iter_mut().for_each(|gradient| grow(gradient, len));
                let [dk, dv] = t.dwhole.each_mut().map(|gradient| &mut gradient[..len]);
                dinner.fill(0.0);
                let [dq, ..] = HeadsMut::in_one(&mut *dinner, [self.q, self.k, self.v]);
                let gradients = [dq, HeadsMut::new(&mut *dk, layout), HeadsMut::new(&mut *dv, layout)];
                attention::backward(&scores, &t.segments, &saved, dout, gradients, ddistances);
                let prefix = self.prefix_place(run.model, run.overlay);
                for (i, (whole, to)) in [(dk, self.k), (dv, self.v)].into_iter().enumerate() {
                    let key_rows = &run.pass.key_rows;
                    rows::scatter_add(whole, key_rows, run.pass.token_rows(), HeadsMut::new(&mut *dinner, to));
                    if let Some((values, layouts)) = &prefix {
                        let grads = HeadsMut::new(&mut grads[values.clone()], layouts[i]);
                        rows::scatter_add(whole, key_rows, run.pass.prefix_rows(), grads);
                    }
                }
            } else {
                let gradients = HeadsMut::in_one(&mut *dinner, [self.q, self.k, self.v]);
                attention::backward(&scores, &t.segments, &saved, dout, gradients, ddistances);
            }
        }
        self.scale_queries(run.pass, dinner, self.q);
        if let Some(rope) = self.rope {
            for layout in [self.q, self.k] {
                t.rotations.turn(rope, dinner, layout, run.pass, Direction::Backward);
            }
        }
        if let Some(norms) = &self.qk_norm {
            for (norm, layout) in norms.iter().zip([self.q, self.k]) {
                norm.heads_backward(run, self.heads(inner, layout), HeadsMut::new(&mut *dinner, layout), grads);
            }
        }
    }
}
