//! Answers to questions, one after another, by the likeliest token each time.

use retune_engine::generate::{Generation, Sampling};
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_text::tokenizer::Tokenizer;

/// A model that answers.
pub struct Answerer<'a> {
    generation: Generation<'a>,
    tokenizer: &'a Tokenizer,
    max_new_tokens: usize,
}

/// What it answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Without white space around it.
    pub text: String,
    pub tokens: usize,
    /// Whether it ended by itself, and not at the limit.
    pub ended: bool,
}

impl<'a> Answerer<'a> {
    /// Answers in f32, with up to `max_new_tokens` tokens.
    pub fn new(
        model: &'a Model,
        overlay: &'a Overlay,
        params: &'a [f32],
        tokenizer: &'a Tokenizer,
        max_new_tokens: usize,
    ) -> Self {
        let generation = Generation::new(model, overlay, params, Sampling::GREEDY);
        Self { generation, tokenizer, max_new_tokens }
    }

    /// Answers a prompt; `None` where `go_on`, asked after each token, says no.
    pub fn answer(&mut self, prompt: &[u32], go_on: impl Fn() -> bool) -> Option<Answer> {
        // Prompts with the same examples or instruction have their beginning in common, which is read once.
        self.generation.read_text(prompt);
        let stop = self.tokenizer.eos_token_ids();
        let ids = self.generation.go_on(self.max_new_tokens, stop, |_| go_on());
        let text = self.tokenizer.decode(&ids, true).trim().to_owned();
        go_on().then_some(Answer { text, tokens: ids.len(), ended: ids.len() < self.max_new_tokens })
    }
}
