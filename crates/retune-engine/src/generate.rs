//! Generation with a key/value cache, greedy or sampled.

use std::cmp::Ordering;

use retune_kernels::heads::{HeadLayout, Heads};
use retune_kernels::random;

use crate::compute::Compute;
use crate::model::{Attention, Model};
use crate::overlay::Overlay;
use crate::pass::{Pass, Prelude};
use crate::row_norms::RowNorms;
use crate::run::Run;
use crate::saved::Saving;
use crate::spec::{LongFrequencies, LongRope};
use crate::workspace::Workspace;

/// Tokens of a prompt that run through the layers at once.
const PROMPT_CHUNK: usize = 512;

/// Keys and values of an attention for the tokens that later ones may see, `[n, key heads · head_dim]` each.
pub(crate) struct Cache {
    layout: HeadLayout,
    /// How many tokens back a query sees, itself included.
    window: Option<usize>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Cache {
    fn new(attention: &Attention) -> Self {
        let layout = HeadLayout::dense(attention.scores.keys, attention.scores.head_dim);
        Self { layout, window: attention.scores.window, keys: Vec::new(), values: Vec::new() }
    }

    /// Appends those of `tokens` tokens, and forgets those that none of them sees, once they are as many as the window.
    pub fn append(&mut self, keys: Heads, values: Heads, tokens: usize) {
        let unseen = self.window.map_or(0, |window| (self.tokens() + 1).saturating_sub(window));
        if self.window.is_some_and(|window| unseen >= window) {
            for of in [&mut self.keys, &mut self.values] {
                of.drain(..unseen * self.layout.row);
            }
        }
        for (from, to) in [(keys, &mut self.keys), (values, &mut self.values)] {
            let HeadLayout { row, first, head, heads, head_dim } = from.layout;
            for token in 0..tokens {
                for h in 0..heads {
                    let at = token * row + first + h * head;
                    to.extend_from_slice(&from.data[at..at + head_dim]);
                }
            }
        }
    }

    /// Forgets everything but the keys and values that precede every text.
    fn restart(&mut self, prefix: [Option<Heads>; 2], count: usize) {
        self.keys.clear();
        self.values.clear();
        if let [Some(keys), Some(values)] = prefix {
            self.append(keys, values, count);
        }
    }

    /// Forgets what came after the first `count` tokens.
    fn truncate(&mut self, count: usize) {
        self.keys.truncate(count * self.layout.row);
        self.values.truncate(count * self.layout.row);
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.keys.len() / self.layout.row
    }

    pub fn keys(&self) -> Heads<'_> {
        Heads { data: &self.keys, layout: self.layout }
    }

    pub fn values(&self) -> Heads<'_> {
        Heads { data: &self.values, layout: self.layout }
    }
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keeps the most likely tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
}

/// A text in the making: a model with what stands on it, and what has been read and written so far.
pub struct Generation<'a> {
    model: &'a Model,
    overlay: &'a Overlay,
    params: &'a [f32],
    norms: RowNorms,
    compute: Compute,
    sampling: Sampling,
    workspace: Workspace,
    cache: Vec<Cache>,
    pass: Pass,
    /// What the encoder is to read with the next tokens.
    source: Option<Box<Pass>>,
    logits: Vec<f32>,
    order: Vec<u32>,
    prelude: Prelude,
    /// Everything read so far but for the source, virtual tokens first.
    ids: Vec<u32>,
    drawn: u64,
}

impl<'a> Generation<'a> {
    /// Starts with nothing read; computes in f32.
    pub fn new(model: &'a Model, overlay: &'a Overlay, params: &'a [f32], sampling: Sampling) -> Self {
        let mut generation = Self {
            model,
            overlay,
            params,
            norms: RowNorms::of(model, overlay, params),
            compute: Compute::default(),
            sampling,
            workspace: Workspace::new(model, Saving::None),
            cache: attentions(model).map(Cache::new).collect(),
            pass: Pass::default(),
            source: None,
            logits: vec![0.0; model.spec.vocab_size],
            order: Vec::new(),
            prelude: overlay.prelude(&model.spec),
            ids: Vec::new(),
            drawn: 0,
        };
        generation.restart_caches();
        generation
    }

    /// Leaves in the caches what stands before the first token.
    fn restart_caches(&mut self) {
        for (cache, attention) in self.cache.iter_mut().zip(attentions(self.model)) {
            cache.restart(attention.prefix(self.model, self.overlay, self.params), self.prelude.prefix);
        }
    }

    /// Gives the encoder the text that is to be answered, and forgets all that was read before.
    pub fn read_source(&mut self, ids: &[u32]) {
        self.ids.clear();
        self.restart_caches();
        let prelude = Prelude { virtual_ids: self.prelude.virtual_ids.clone(), ..Prelude::default() };
        let mut source = Pass::new(prelude, false);
        source.push(0, ids, &[]);
        self.source = Some(Box::new(source));
    }

    /// Reads tokens: the prompt, or the token generated last. A decoder beside an encoder reads no prompt, for which there is
    /// [`Self::read_text`].
    ///
    /// # Panics
    /// When there is an encoder and it has been given no source.
    pub fn read(&mut self, ids: &[u32]) {
        let mut first = self.ids.len();
        if first == 0 && self.prelude.decoder_start.is_none() {
            self.ids.extend(self.prelude.virtual_ids.clone());
        }
        self.ids.extend_from_slice(ids);
        let long: Vec<_> = self.model.spec.ropes.iter().filter_map(|rope| rope.long.as_ref()).collect();
        // A text that becomes long is rotated otherwise from its beginning.
        let prefix = self.prelude.prefix;
        let crosses = |long: &&LongRope| prefix + first <= long.beyond && prefix + self.ids.len() > long.beyond;
        if long.iter().any(|long| matches!(long.frequencies, LongFrequencies::Fixed(_)) && crosses(long)) {
            self.restart_caches();
            first = 0;
        }
        // Where the length decides, all that is read at once is rotated by the length of all.
        let chunk = if long.is_empty() { PROMPT_CHUNK } else { usize::MAX };
        for chunk in self.ids[first..].chunks(chunk) {
            self.pass.clear();
            self.pass.source = self.source.take();
            self.pass.push(0, chunk, &[]);
            self.pass.positions.iter_mut().for_each(|p| *p += (prefix + first) as u32);
            first += chunk.len();
            let Self { model, overlay, params, ref norms, ref compute, ref pass, .. } = *self;
            let run = Run { model, overlay, params, norms, compute, pass, step: None };
            run.forward(&mut self.workspace, false, Some(&mut self.cache));
        }
        // The tokens before the last are read for their keys and values alone.
        if !self.pass.ids.is_empty() {
            let last = [self.pass.tokens() as u32 - 1];
            let Self { model, overlay, params, ref norms, ref compute, ref pass, .. } = *self;
            let run = Run { model, overlay, params, norms, compute, pass, step: None };
            run.last_logits(&last, &mut self.workspace, &mut self.logits);
        }
    }

    /// Reads a text from its beginning. What it has in common at its beginning with what was read before is not read again, as long as the
    /// caches can go back to there: a window may have let go of what came before, and where a rotation depends on the length a text that
    /// becomes shorter is rotated otherwise. An encoder reads it whole, and the decoder its start.
    pub fn read_text(&mut self, ids: &[u32]) {
        if let Some(start) = self.prelude.decoder_start {
            self.read_source(ids);
            return self.read(&[start]);
        }
        let own = self.prelude.virtual_ids.len().min(self.ids.len());
        // The last token is read in any case, for the logits of what follows it.
        let rest = &ids[..ids.len().saturating_sub(1)];
        let mut common = self.ids[own..].iter().zip(rest).take_while(|(known, id)| known == id).count();
        if own + common < self.ids.len() {
            let (prefix, read) = (self.prelude.prefix, self.ids.len());
            let is_whole = self.cache.iter().all(|cache| cache.tokens() == prefix + read);
            if is_whole && self.model.spec.ropes.iter().all(|rope| rope.long.is_none()) {
                self.ids.truncate(own + common);
                self.cache.iter_mut().for_each(|cache| cache.truncate(prefix + own + common));
            } else {
                common = 0;
                self.ids.clear();
                self.restart_caches();
            }
        }
        self.read(&ids[common..]);
    }

    /// Keys and values of everything that the decoder read, as a [`crate::overlay::Prefix`] holds them: that prefix is to what follows what
    /// the text read is. `None` where a window has let go of some.
    pub fn keys_and_values(&self) -> Option<Vec<f32>> {
        let count = self.prelude.prefix + self.ids.len();
        let row = self.model.spec.key_value_width();
        let mut all = vec![0.0; count * row];
        let mut column = 0;
        let caches = self.cache.iter().zip(attentions(self.model));
        for (cache, _) in caches.filter(|(_, attention)| attention.number.is_some()) {
            if cache.tokens() != count {
                return None;
            }
            let width = cache.layout.row;
            for of_text in [&cache.keys, &cache.values] {
                for (to, from) in all.chunks_exact_mut(row).zip(of_text.chunks_exact(width)) {
                    to[column..column + width].copy_from_slice(from);
                }
                column += width;
            }
        }
        Some(all)
    }

    /// Chooses the token that follows what was read.
    pub fn next_token(&mut self) -> u32 {
        let Sampling { temperature, top_p, top_k, seed } = self.sampling;
        let logits = &self.logits;
        let best =
            |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };
        if temperature <= 0.0 {
            return (0..logits.len() as u32).min_by(best).unwrap_or(0);
        }
        self.order.clear();
        self.order.extend(0..logits.len() as u32);
        if top_k > 0 && top_k < self.order.len() {
            self.order.select_nth_unstable_by(top_k - 1, best);
            self.order.truncate(top_k);
        }
        self.order.sort_unstable_by(best);
        let largest = logits[self.order[0] as usize];
        let weight = |id: &u32| f64::from((logits[*id as usize] - largest) / temperature).exp();
        let total: f64 = self.order.iter().map(weight).sum();
        let mut kept = 0.0;
        let enough = self.order.iter().position(|id| {
            kept += weight(id);
            kept >= f64::from(top_p) * total
        });
        self.order.truncate(enough.map_or(self.order.len(), |i| i + 1));
        let mut left = uniform(seed, self.drawn) * kept.min(total);
        self.drawn += 1;
        for id in &self.order {
            left -= weight(id);
            if left <= 0.0 {
                return *id;
            }
        }
        self.order[self.order.len() - 1]
    }

    /// Reads `prompt`, the encoder's source where there is one, then generates up to `max_new_tokens` tokens, until one of `stop` comes (which
    /// is not returned) or `on_token`, called with each, says false.
    pub fn run(
        &mut self,
        prompt: &[u32],
        max_new_tokens: usize,
        stop: &[u32],
        on_token: impl FnMut(u32) -> bool,
    ) -> Vec<u32> {
        if prompt.is_empty() {
            return Vec::new();
        }
        match self.prelude.decoder_start {
            None => self.read(prompt),
            Some(_) => self.read_text(prompt),
        }
        self.go_on(max_new_tokens, stop, on_token)
    }

    /// Generates what follows the text read, as [`Self::run`] does.
    pub fn go_on(&mut self, max_new_tokens: usize, stop: &[u32], mut on_token: impl FnMut(u32) -> bool) -> Vec<u32> {
        let mut generated = Vec::new();
        while generated.len() < max_new_tokens {
            let token = self.next_token();
            if stop.contains(&token) {
                break;
            }
            generated.push(token);
            if !on_token(token) || generated.len() == max_new_tokens {
                break;
            }
            self.read(&[token]);
        }
        generated
    }
}

/// The attentions of the decoder, each of which has a cache.
fn attentions(model: &Model) -> impl Iterator<Item = &Attention> {
    model.decoder.sub_layers.iter().filter_map(|s| s.attention())
}

/// The uniform number in [0, 1) at a place of a seed's stream.
fn uniform(seed: u64, index: u64) -> f64 {
    (random::at(seed, index) >> 11) as f64 / (1u64 << 53) as f64
}
