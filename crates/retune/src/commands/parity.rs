//! How far what was written is from what it was made of: both are run on a few rows of text.

use anyhow::Result;
use retune_engine::compute::Compute;
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_engine::pass::Pass;
use retune_engine::row_norms::RowNorms;
use retune_engine::workspace::Workspace;
use retune_engine::{Run, Saving};
use retune_text::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// Prose, a question, code, another language, numbers.
const ROWS: [&str; 5] = [
    "The tide comes in twice a day here, and the boats that lie on the sand in the morning float by noon. Nobody in the village looks up when it does.",
    "Which of these is a mammal: the shark, the whale or the trout? Explain your answer in one sentence.",
    "def mean(values):\n    if not values:\n        return None\n    return sum(values) / len(values)\n\nprint(mean([3, 4, 5]))\n",
    "Au printemps, les marchés s'installent sur la place et l'on y vend du pain, du miel et des fleurs jusqu'à midi.",
    "{\"name\": \"sensor-12\", \"unit\": \"°C\", \"readings\": [18.4, 18.9, 19.3], \"ok\": true, \"taken\": \"2024-03-01\"}",
];
/// Tokens of a row at most.
const MOST_TOKENS: usize = 48;

/// A model with what stands on it.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    pub model: &'a Model,
    pub overlay: &'a Overlay,
    pub params: &'a [f32],
}

/// How far two models are apart.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parity {
    rows: usize,
    tokens: usize,
    /// Tokens after which both find the same token likeliest.
    agreed: usize,
    /// The largest difference of a logit, and the largest logit.
    difference: f32,
    logit: f32,
}

impl Parity {
    /// Runs both in f32.
    ///
    /// # Errors
    /// A tokenizer that cannot take the rows.
    pub fn of(tokenizer: &Tokenizer, ours: Side<'_>, written: Side<'_>) -> Result<Self> {
        let most = ours.overlay.most_tokens(&ours.model.spec).unwrap_or(usize::MAX).min(ours.model.spec.context);
        let vocab = ours.model.spec.vocab_size;
        let mut parity = Self::default();
        for text in ROWS {
            let mut ids = tokenizer.encode_with_special_tokens(text)?;
            ids.truncate(MOST_TOKENS.min(most));
            if ids.is_empty() {
                continue;
            }
            let [ours, theirs] = [ours, written].map(|side| side.logits(&ids));
            parity.rows += 1;
            parity.tokens += ids.len();
            for (a, b) in ours.chunks_exact(vocab).zip(theirs.chunks_exact(vocab)) {
                parity.agreed += usize::from(likeliest(a) == likeliest(b));
                for (a, b) in a.iter().zip(b) {
                    parity.difference = parity.difference.max((a - b).abs());
                    parity.logit = parity.logit.max(a.abs());
                }
            }
        }
        Ok(parity)
    }

    /// The line about it.
    pub fn line(&self) -> String {
        let Self { rows, tokens, agreed, difference, logit } = self;
        format!(
            "read back, its logits differ by at most {difference:.2e} (of at most {logit:.1}); {agreed} of {tokens} tokens of {rows} texts are \
             followed by the same likeliest token"
        )
    }

    pub fn json(&self) -> Value {
        json!({
            "rows": self.rows,
            "tokens": self.tokens,
            "largest_logit_difference": self.difference,
            "largest_logit": self.logit,
            "same_top_1": self.agreed as f64 / self.tokens.max(1) as f64,
        })
    }
}

impl Side<'_> {
    /// The logits after each token.
    fn logits(self, ids: &[u32]) -> Vec<f32> {
        let Side { model, overlay, params } = self;
        let mut pass = Pass::new(overlay.prelude(&model.spec), false);
        let trained = vec![false; ids.len()];
        match model.spec.encoder {
            Some(_) => pass.push_answer(0, ids, ids, &trained),
            None => pass.push(0, ids, &trained),
        }
        let (compute, norms) = (Compute::default(), RowNorms::of(model, overlay, params));
        let run = Run { model, overlay, params, norms: &norms, compute: &compute, pass: &pass, parts: &[], step: None };
        let all: Vec<u32> = pass.sequences.iter().flat_map(|sequence| pass.tokens_of(sequence)).collect();
        run.logits(&all, &mut Workspace::new(model, Saving::Full))
    }
}

/// The likeliest token, the first of several.
fn likeliest(logits: &[f32]) -> usize {
    let first = |best: (usize, f32), next: (usize, f32)| if next.1 > best.1 { next } else { best };
    logits.iter().copied().enumerate().fold((0, f32::NEG_INFINITY), first).0
}
