//! Answers to questions, several at a time, by the likeliest token each time.

use retune_engine::generate::{Generation, Question, Sampling, Standing};
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_text::tokenizer::Tokenizer;

/// Answers that are generated at once: the products then cost little more than for one, and caches stay small beside a model.
const AT_ONCE: usize = 16;

/// A model that answers.
pub struct Answerer<'a> {
    pub model: &'a Model,
    pub overlay: &'a Overlay,
    pub params: &'a [f32],
    pub tokenizer: &'a Tokenizer,
    /// Longest answer.
    pub max_new_tokens: usize,
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

impl Answerer<'_> {
    /// Answers prompts in f32. `on_answer` is called with the number of each and its answer, as they are done, until `go_on`, asked after
    /// each token, says no.
    pub fn answer_all(
        &self,
        prompts: impl IntoIterator<Item = Vec<u32>>,
        go_on: impl FnMut() -> bool,
        mut on_answer: impl FnMut(usize, Answer),
    ) {
        let questions: Vec<Question> = prompts.into_iter().map(|ids| Question { standing: 0, ids }).collect();
        let texts = AT_ONCE.min(questions.len());
        let standing = Standing { overlay: self.overlay, params: self.params };
        let mut generation = Generation::of_many(self.model, &[standing], texts, Sampling::GREEDY);
        let stop = self.tokenizer.eos_token_ids();
        generation.answer_all(&questions, self.max_new_tokens, stop, go_on, |number, ids| {
            let text = self.tokenizer.decode(&ids, true).trim().to_owned();
            on_answer(number, Answer { text, tokens: ids.len(), ended: ids.len() < self.max_new_tokens });
            true
        });
    }
}
