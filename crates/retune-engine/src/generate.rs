//! Generation with a key/value cache, greedy or sampled, of one text or of many at once.

use std::cmp::Ordering;
use std::ops::Range;

use retune_kernels::heads::{HeadLayout, Heads};
use retune_kernels::random;

use crate::compute::Compute;
use crate::model::{Attention, Model};
use crate::overlay::Overlay;
use crate::pass::{Pass, Prelude};
use crate::row_norms::RowNorms;
use crate::run::{Part, Run};
use crate::saved::Saving;
use crate::spec::{LongFrequencies, LongRope};
use crate::workspace::Workspace;

/// Tokens of a prompt that run through the layers at once.
const PROMPT_CHUNK: usize = 512;
/// Tokens that a text has room for in a cache at the least.
const LEAST_ROOM: usize = 64;

/// Keys and values of an attention for the tokens that later ones may see, of several texts, each in a stretch of its own: `room` rows of
/// `[key heads · head_dim]`, of which the first `lengths[text]` are held.
pub(crate) struct Cache {
    layout: HeadLayout,
    /// How many tokens back a query sees, itself included.
    window: Option<usize>,
    room: usize,
    lengths: Vec<usize>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Cache {
    fn new(attention: &Attention, texts: usize) -> Self {
        let layout = HeadLayout::dense(attention.scores.keys, attention.scores.head_dim);
        let (lengths, window) = (vec![0; texts], attention.scores.window);
        Self { layout, window, room: 0, lengths, keys: Vec::new(), values: Vec::new() }
    }

    /// Appends those of `tokens` to a text, and forgets those that none of them sees, once they are as many as the window.
    pub fn append(&mut self, text: usize, keys: Heads, values: Heads, tokens: Range<usize>) {
        let unseen = self.window.map_or(0, |window| (self.lengths[text] + 1).saturating_sub(window));
        if self.window.is_some_and(|window| unseen >= window) {
            let row = self.layout.row;
            let held = self.stretch(text);
            for of in [&mut self.keys, &mut self.values] {
                of.copy_within((held.start + unseen) * row..held.end * row, held.start * row);
            }
            self.lengths[text] -= unseen;
        }
        self.make_room(self.lengths[text] + tokens.len());
        let start = self.stretch(text).end * self.layout.row;
        for (from, to) in [(keys, &mut self.keys), (values, &mut self.values)] {
            let HeadLayout { row, first, head, heads, head_dim } = from.layout;
            let mut places = to[start..].chunks_exact_mut(head_dim);
            for token in tokens.clone() {
                for h in 0..heads {
                    let at = token * row + first + h * head;
                    if let Some(place) = places.next() {
                        place.copy_from_slice(&from.data[at..at + head_dim]);
                    }
                }
            }
        }
        self.lengths[text] += tokens.len();
    }

    /// Gives every text room for as many tokens as one needs.
    fn make_room(&mut self, needed: usize) {
        if needed <= self.room {
            return;
        }
        let (row, old) = (self.layout.row, self.room);
        self.room = needed.next_multiple_of(LEAST_ROOM).max(old * 2);
        for of in [&mut self.keys, &mut self.values] {
            of.resize(self.lengths.len() * self.room * row, 0.0);
            for (text, &length) in self.lengths.iter().enumerate().rev() {
                of.copy_within(text * old * row..(text * old + length) * row, text * self.room * row);
            }
        }
    }

    /// Forgets everything of a text but the keys and values that precede it.
    fn restart(&mut self, text: usize, prefix: [Option<Heads>; 2], count: usize) {
        self.lengths[text] = 0;
        if let [Some(keys), Some(values)] = prefix {
            self.append(text, keys, values, 0..count);
        }
    }

    /// Forgets what came after the first `count` tokens of a text.
    fn truncate(&mut self, text: usize, count: usize) {
        self.lengths[text] = self.lengths[text].min(count);
    }

    /// Tokens held of a text.
    pub fn tokens(&self, text: usize) -> usize {
        self.lengths[text]
    }

    /// The rows of a text, among those of all.
    pub fn stretch(&self, text: usize) -> Range<usize> {
        let start = text * self.room;
        start..start + self.lengths[text]
    }

    pub fn keys(&self) -> Heads<'_> {
        Heads { data: &self.keys, layout: self.layout }
    }

    pub fn values(&self) -> Heads<'_> {
        Heads { data: &self.values, layout: self.layout }
    }
}

/// The caches of a model's attentions, and which of their texts each row of a pass continues.
pub(crate) struct Continued<'a, T: ?Sized = [Cache]> {
    pub cache: &'a mut T,
    pub texts: &'a [usize],
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

/// What stands on the model, with the values of its parameters.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    pub overlay: &'a Overlay,
    pub params: &'a [f32],
}

/// The same with what is computed of it once.
struct Prepared<'a> {
    standing: Standing<'a>,
    norms: RowNorms,
    prelude: Prelude,
}

/// What was read and written of one text.
struct Text {
    /// Which of the overlays stands on the model for it.
    standing: usize,
    /// Everything read so far but for the source, virtual tokens first.
    ids: Vec<u32>,
    /// Of the token that follows.
    logits: Vec<f32>,
    /// How many numbers were drawn for it.
    drawn: u64,
}

/// Texts in the making: a model, what stands on it for each of them, and what each has read and written so far. Usually there is one, and
/// most functions are about that; [`Self::answer_all`] goes on with many at once, for which each weight of the base is read once.
pub struct Generation<'a> {
    model: &'a Model,
    nothing: Overlay,
    standings: Vec<Prepared<'a>>,
    compute: Compute,
    sampling: Sampling,
    workspace: Workspace,
    cache: Vec<Cache>,
    pass: Pass,
    /// What the encoder is to read with the next tokens.
    source: Option<Box<Pass>>,
    order: Vec<u32>,
    logits: Vec<f32>,
    texts: Vec<Text>,
}

/// A text to be answered by [`Generation::answer_all`].
#[derive(Clone, Debug)]
pub struct Question {
    /// Which of the overlays answers.
    pub standing: usize,
    /// The prompt, or the source where an encoder reads it.
    pub ids: Vec<u32>,
}

impl<'a> Generation<'a> {
    /// Starts one text, with nothing read; computes in f32.
    pub fn new(model: &'a Model, overlay: &'a Overlay, params: &'a [f32], sampling: Sampling) -> Self {
        Self::of_many(model, &[Standing { overlay, params }], 1, sampling)
    }

    /// Starts so many texts, with nothing read: each answers a question at a time.
    ///
    /// # Panics
    /// When several overlays stand on the model and one of them does not [stand beside others](Overlay::stands_beside_others).
    pub fn of_many(model: &'a Model, standings: &[Standing<'a>], texts: usize, sampling: Sampling) -> Self {
        let is_fit = standings.len() == 1 || standings.iter().all(|of| of.overlay.stands_beside_others());
        assert!(is_fit, "an overlay changes more than linears and what precedes each row");
        let prepare = |&standing: &Standing<'a>| Prepared {
            standing,
            norms: RowNorms::of(model, standing.overlay, standing.params),
            prelude: standing.overlay.prelude(&model.spec),
        };
        let text = |_| Text { standing: 0, ids: Vec::new(), logits: vec![0.0; model.spec.vocab_size], drawn: 0 };
        let mut generation = Self {
            model,
            nothing: Overlay::empty(model),
            standings: standings.iter().map(prepare).collect(),
            compute: Compute::default(),
            sampling,
            workspace: Workspace::new(model, Saving::None),
            cache: attentions(model).map(|attention| Cache::new(attention, texts)).collect(),
            pass: Pass::default(),
            source: None,
            order: Vec::new(),
            logits: Vec::new(),
            texts: (0..texts).map(text).collect(),
        };
        (0..texts).for_each(|text| generation.restart(text));
        generation
    }

    /// Forgets what a text has read, and leaves in the caches what stands before its first token.
    fn restart(&mut self, text: usize) {
        self.texts[text].ids.clear();
        self.restart_caches(text);
    }

    fn restart_caches(&mut self, text: usize) {
        let Prepared { standing: Standing { overlay, params }, prelude, .. } =
            &self.standings[self.texts[text].standing];
        for (cache, attention) in self.cache.iter_mut().zip(attentions(self.model)) {
            cache.restart(text, attention.prefix(self.model, overlay, params), prelude.prefix);
        }
    }

    /// What stands before each row of a text.
    fn prelude(&self, text: usize) -> &Prelude {
        &self.standings[self.texts[text].standing].prelude
    }

    /// Gives the encoder the text that is to be answered, and forgets all that was read before.
    pub fn read_source(&mut self, ids: &[u32]) {
        self.read_source_of(0, ids);
    }

    fn read_source_of(&mut self, text: usize, ids: &[u32]) {
        self.restart(text);
        let prelude = Prelude { virtual_ids: self.prelude(text).virtual_ids.clone(), ..Prelude::default() };
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
        self.read_of(0, ids);
    }

    /// Whether a text that grows by so many tokens becomes long, and is rotated otherwise from its beginning.
    fn becomes_long(&self, text: usize, tokens: usize) -> bool {
        let first = self.prelude(text).prefix + self.texts[text].ids.len();
        let crosses = |long: &LongRope| first <= long.beyond && first + tokens > long.beyond;
        let mut long = self.model.spec.ropes.iter().filter_map(|rope| rope.long.as_ref());
        long.any(|long| matches!(long.frequencies, LongFrequencies::Fixed(_)) && crosses(long))
    }

    fn read_of(&mut self, text: usize, ids: &[u32]) {
        let Prelude { virtual_ids, prefix, decoder_start } = self.prelude(text).clone();
        let mut first = self.texts[text].ids.len();
        let mut new = ids.len();
        if first == 0 && decoder_start.is_none() {
            new += virtual_ids.len();
        }
        let becomes_long = self.becomes_long(text, new);
        let known = &mut self.texts[text].ids;
        if new > ids.len() {
            known.extend(virtual_ids);
        }
        known.extend_from_slice(ids);
        if becomes_long {
            self.restart_caches(text);
            first = 0;
        }
        // Where the length decides, all that is read at once is rotated by the length of all.
        let has_long = self.model.spec.ropes.iter().any(|rope| rope.long.is_some());
        let chunk = if has_long { usize::MAX } else { PROMPT_CHUNK };
        let Self { model, standings, compute, workspace, cache, pass, source, texts, .. } = self;
        let Text { standing, ids, logits, .. } = &mut texts[text];
        let Prepared { standing: Standing { overlay, params }, norms, .. } = &standings[*standing];
        for chunk in ids[first..].chunks(chunk) {
            pass.clear();
            pass.source = source.take();
            pass.push(0, chunk, &[]);
            pass.positions.iter_mut().for_each(|p| *p += (prefix + first) as u32);
            first += chunk.len();
            let run = Run { model, overlay, params, norms, compute, pass, step: None, parts: &[] };
            run.forward(workspace, false, Some(Continued { cache: &mut cache[..], texts: &[text] }));
        }
        // The tokens before the last are read for their keys and values alone.
        if !pass.ids.is_empty() {
            let last = [pass.tokens() as u32 - 1];
            let run = Run { model, overlay, params, norms, compute, pass, step: None, parts: &[] };
            run.last_logits(&last, workspace, logits);
        }
    }

    /// Reads one token for each of several texts, in one pass through the model.
    fn read_each(&mut self, next: &mut [(usize, u32)]) {
        let (long, mut next): (Vec<_>, Vec<_>) = next.iter().partition(|(text, _)| self.becomes_long(*text, 1));
        long.into_iter().for_each(|(text, token)| self.read_of(text, &[token]));
        if let [(text, token)] = next[..] {
            return self.read_of(text, &[token]);
        }
        // Tokens of the same overlay lie beside each other.
        next.sort_by_key(|(text, _)| (self.texts[*text].standing, *text));
        let Self { model, nothing, standings, compute, workspace, cache, pass, logits, texts, .. } = self;
        pass.clear();
        pass.source = None;
        for (row, &(text, token)) in next.iter().enumerate() {
            let Text { standing, ids, .. } = &mut texts[text];
            pass.push(row as u64, &[token], &[]);
            pass.positions[row] = (standings[*standing].prelude.prefix + ids.len()) as u32;
            ids.push(token);
        }
        let mut parts = Vec::new();
        for rows in next.chunk_by(|(a, _), (b, _)| texts[*a].standing == texts[*b].standing) {
            let first = parts.last().map_or(0, |part: &Part| part.tokens.end);
            let Prepared { standing: Standing { overlay, params }, norms, .. } = &standings[texts[rows[0].0].standing];
            parts.push(Part { tokens: first..first + rows.len(), overlay, params, norms });
        }
        let no_norms = RowNorms::default();
        let run = match &parts[..] {
            [] => return,
            // With one overlay for all, what it adds is part of the products.
            [Part { overlay, params, norms, .. }] => {
                Run { model, overlay, params, norms, compute, pass, step: None, parts: &[] }
            }
            parts => Run { model, overlay: nothing, params: &[], norms: &no_norms, compute, pass, step: None, parts },
        };
        let of_rows: Vec<usize> = next.iter().map(|(text, _)| *text).collect();
        run.forward(workspace, false, Some(Continued { cache: &mut cache[..], texts: &of_rows }));
        let v = model.spec.vocab_size;
        logits.resize(next.len() * v, 0.0);
        let rows: Vec<u32> = (0..next.len() as u32).collect();
        run.last_logits(&rows, workspace, logits);
        for (&text, logits) in of_rows.iter().zip(logits.chunks_exact(v)) {
            texts[text].logits.copy_from_slice(logits);
        }
    }

    /// Reads a text from its beginning. What it has in common at its beginning with what was read before is not read again, as long as the
    /// caches can go back to there: a window may have let go of what came before, and where a rotation depends on the length a text that
    /// becomes shorter is rotated otherwise. An encoder reads it whole, and the decoder its start.
    pub fn read_text(&mut self, ids: &[u32]) {
        self.read_text_of(0, ids);
    }

    fn read_text_of(&mut self, text: usize, ids: &[u32]) {
        let Prelude { virtual_ids, prefix, decoder_start } = self.prelude(text).clone();
        if let Some(start) = decoder_start {
            self.read_source_of(text, ids);
            return self.read_of(text, &[start]);
        }
        let known = &self.texts[text].ids;
        let own = virtual_ids.len().min(known.len());
        // The last token is read in any case, for the logits of what follows it.
        let rest = &ids[..ids.len().saturating_sub(1)];
        let mut common = known[own..].iter().zip(rest).take_while(|(known, id)| known == id).count();
        if own + common < known.len() {
            let read = known.len();
            let is_whole = self.cache.iter().all(|cache| cache.tokens(text) == prefix + read);
            if is_whole && self.model.spec.ropes.iter().all(|rope| rope.long.is_none()) {
                self.texts[text].ids.truncate(own + common);
                self.cache.iter_mut().for_each(|cache| cache.truncate(text, prefix + own + common));
            } else {
                common = 0;
                self.restart(text);
            }
        }
        self.read_of(text, &ids[common..]);
    }

    /// Keys and values of everything that the decoder read, as a [`crate::overlay::Prefix`] holds them: that prefix is to what follows what
    /// the text read is. `None` where a window has let go of some.
    pub fn keys_and_values(&self) -> Option<Vec<f32>> {
        let count = self.prelude(0).prefix + self.texts[0].ids.len();
        let row = self.model.spec.key_value_width();
        let mut all = vec![0.0; count * row];
        let mut column = 0;
        let caches = self.cache.iter().zip(attentions(self.model));
        for (cache, _) in caches.filter(|(_, attention)| attention.number.is_some()) {
            if cache.tokens(0) != count {
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
        self.next_token_of(0)
    }

    fn next_token_of(&mut self, text: usize) -> u32 {
        let Sampling { temperature, top_p, top_k, seed } = self.sampling;
        let Text { logits, drawn, .. } = &mut self.texts[text];
        let logits = &*logits;
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
        let mut left = uniform(seed, *drawn) * kept.min(total);
        *drawn += 1;
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
        match self.prelude(0).decoder_start {
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

    /// Answers questions, as many at once as there are texts: each with up to `max_new_tokens` tokens, until one of `stop` comes (which is
    /// not part of it). `on_answer` is called with a question's number and its answer, in the order in which they are done; when it says
    /// false, or `go_on`, asked after each step, the rest is left. An answer is the one that [`Self::run`] would give, up to the order of
    /// sums; the numbers that sampling draws are the same for each.
    pub fn answer_all(
        &mut self,
        questions: &[Question],
        max_new_tokens: usize,
        stop: &[u32],
        mut go_on: impl FnMut() -> bool,
        mut on_answer: impl FnMut(usize, Vec<u32>) -> bool,
    ) {
        // For each text the question that it answers, and the answer so far.
        let mut at_work: Vec<Option<(usize, Vec<u32>)>> = vec![None; self.texts.len()];
        let mut waiting = questions.iter().enumerate();
        let mut next = Vec::new();
        loop {
            for (text, work) in at_work.iter_mut().enumerate().filter(|(_, work)| work.is_none()) {
                let Some((number, Question { standing, ids })) = waiting.next() else { break };
                if self.texts[text].standing != *standing {
                    self.texts[text].standing = *standing;
                    self.restart(text);
                }
                self.texts[text].drawn = 0;
                self.read_text_of(text, ids);
                *work = Some((number, Vec::new()));
            }
            if at_work.iter().all(Option::is_none) {
                return;
            }
            next.clear();
            for (text, work) in at_work.iter_mut().enumerate() {
                let Some((number, answer)) = work else { continue };
                let token = (answer.len() < max_new_tokens).then(|| self.next_token_of(text));
                let token = token.filter(|token| !stop.contains(token));
                answer.extend(token);
                match token.filter(|_| answer.len() < max_new_tokens) {
                    Some(token) => next.push((text, token)),
                    None => {
                        if !on_answer(*number, std::mem::take(answer)) {
                            return;
                        }
                        *work = None;
                    }
                }
            }
            if !go_on() {
                return;
            }
            self.read_each(&mut next);
        }
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
