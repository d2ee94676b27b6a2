//! Generation with a key/value cache, greedy or sampled.

use retune_adapter::random;

use crate::model::Model;
use crate::pass::Pass;
use crate::workspace::{Keep, Workspace};

/// Tokens of a prompt that run through the layers at once.
const PROMPT_CHUNK: usize = 512;

/// Keys and values of the tokens so far, `[n, key heads · head_dim]` each.
#[derive(Default)]
pub(crate) struct LayerCache {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

impl LayerCache {
    pub fn append(&mut self, keys: &[f32], values: &[f32]) {
        self.keys.extend_from_slice(keys);
        self.values.extend_from_slice(values);
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

/// A text in the making: a model, its parameters, and what has been read and written so far.
pub struct Generation<'a> {
    model: &'a Model,
    params: &'a [f32],
    sampling: Sampling,
    workspace: Workspace,
    cache: Vec<LayerCache>,
    pass: Pass,
    logits: Vec<f32>,
    order: Vec<u32>,
    position: usize,
    drawn: u64,
}

impl<'a> Generation<'a> {
    /// Starts with nothing read.
    pub fn new(model: &'a Model, params: &'a [f32], sampling: Sampling) -> Self {
        Self {
            model,
            params,
            sampling,
            workspace: Workspace::new(model, Keep::Nothing),
            cache: model.layers.iter().map(|_| LayerCache::default()).collect(),
            pass: Pass::default(),
            logits: vec![0.0; model.config.vocab_size],
            order: Vec::new(),
            position: 0,
            drawn: 0,
        }
    }

    /// Reads tokens: the prompt, or the token generated last.
    pub fn read(&mut self, ids: &[u32]) {
        for chunk in ids.chunks(PROMPT_CHUNK) {
            self.pass.clear();
            self.pass.push(0, chunk, &[]);
            let first = self.position as u32;
            self.pass.positions.iter_mut().for_each(|p| *p += first);
            self.position += chunk.len();
            let cache = Some(self.cache.as_mut_slice());
            self.model.forward_layers(self.params, &self.pass, None, &mut self.workspace, false, cache);
            let last = [chunk.len() as u32 - 1];
            self.model.last_logits(self.params, &last, &mut self.workspace, &mut self.logits);
        }
    }

    /// Chooses the token that follows what was read.
    pub fn next_token(&mut self) -> u32 {
        let Sampling { temperature, top_p, top_k, seed } = self.sampling;
        let logits = &self.logits;
        let best = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        self.order.clear();
        self.order.extend(0..logits.len() as u32);
        if temperature <= 0.0 {
            return self.order.iter().copied().min_by(best).unwrap_or(0);
        }
        self.order.sort_unstable_by(best);
        if top_k > 0 {
            self.order.truncate(top_k);
        }
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

    /// Reads `prompt`, then generates up to `max_new_tokens` tokens, until one of `stop` comes (which is not returned) or `on_token`, called
    /// with each, says false.
    pub fn run(
        &mut self,
        prompt: &[u32],
        max_new_tokens: usize,
        stop: &[u32],
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Vec<u32> {
        let mut generated = Vec::new();
        if prompt.is_empty() {
            return generated;
        }
        self.read(prompt);
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

/// The uniform number in [0, 1) at a place of a seed's stream.
fn uniform(seed: u64, index: u64) -> f64 {
    (random::at(seed, index) >> 11) as f64 / (1u64 << 53) as f64
}
