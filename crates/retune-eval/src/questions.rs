//! What a row asks, and what it should be answered, in the tokens that a model was trained on.

use retune_train::data::{Encoder, Example, Row};
use retune_train::error::Error;

/// A row whose last answer is to be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The row's number in its file.
    pub row: usize,
    /// The tokens that stand before the answer in training, or that an encoder reads.
    pub prompt: Vec<u32>,
    /// The answer, without white space around it.
    pub reference: String,
}

/// The question of a row; `None` of a text, which asks nothing, and where the answer begins beyond the length allowed. The encoder must not
/// train on prompts.
///
/// # Errors
/// As [`Encoder::encode`].
pub fn question(encoder: &Encoder, row: &Row) -> Result<Option<Question>, Error> {
    let Some(reference) = row.text.answers().last().map(|answer| answer.trim().to_owned()) else { return Ok(None) };
    let Example { row, source, mut ids, trained } = encoder.encode_whole(row)?;
    ids.truncate(answer_start(&trained));
    let prompt = if source.is_empty() { ids } else { source };
    let fits = prompt.len() < encoder.options().max_length;
    Ok(fits.then_some(Question { row, prompt, reference }))
}

/// The row once with each label as its last answer; targets are the tokens by which these differ from the prompt. `None` where a row has no
/// answer, or a label would be cut at the length allowed. The encoder must not train on prompts.
///
/// # Errors
/// As [`Encoder::encode`].
pub fn with_labels(encoder: &Encoder, row: &Row, labels: &[String]) -> Result<Option<Vec<Example>>, Error> {
    let mut examples = Vec::with_capacity(labels.len());
    for label in labels {
        let Some(text) = row.text.with_answer(label) else { return Ok(None) };
        examples.push(encoder.encode_whole(&Row { text, ..*row })?);
    }
    // The last token of a prompt may go on into one label and not into another: all are compared from there.
    let start = examples.iter().map(|example| answer_start(&example.trained)).min().unwrap_or(0);
    for example in &mut examples {
        for (at, trained) in example.trained.iter_mut().enumerate() {
            *trained = at >= start;
        }
    }
    let most = encoder.options().max_length;
    Ok(examples.iter().all(|example| example.ids.len() <= most).then_some(examples))
}

/// The number of tokens before the last answer, with which a whole row ends.
fn answer_start(trained: &[bool]) -> usize {
    trained.iter().rposition(|trained| !trained).map_or(0, |last| last + 1)
}
