//! What is trained on and what is held out, as files of the comparison's own that every run reads.

use anyhow::{Result, bail};
use retune_eval::labels;
use retune_train::data::{DataFile, Names, RowFormat, read_rows, split, to_jsonl};
use retune_train::plan::Plan;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The part of the rows that is held out where nobody says which, and the most rows that this part is.
const HELD_OUT: (f64, usize) = (0.2, 200);
/// The seed of that choice: the rows are the same for all seeds of the variants.
const SPLIT_SEED: u64 = 42;

/// The rows of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rows {
    pub train_file: String,
    pub training_rows: usize,
    pub training_hash: String,
    /// The file that held-out rows come from, where it is another one.
    pub held_out_file: Option<String>,
    pub held_out_rows: usize,
    pub held_out_hash: String,
    pub format: String,
    /// The answers, where they are labels.
    pub labels: Option<Vec<String>>,
    /// Whether rows ask something.
    pub has_answers: bool,
}

impl Rows {
    /// Whether a hard prompt can be put before them: a text has no answers to show.
    pub fn take_examples(&self, plan: &Plan) -> bool {
        self.has_answers && !plan.data.train_on_prompt
    }

    /// Reads a plan's files and chooses; returns the files of rows to train on and to hold out as well.
    ///
    /// # Errors
    /// Files that cannot be read; too few rows to hold one out.
    pub fn choose(plan: &Plan) -> Result<(Self, [String; 2])> {
        let data = &plan.data;
        let file = read_rows(&data.train, &data.read_options(&Names::KEYS))?;
        let (format, all) = (file.format, file.rows.len());
        let (train, mut held_out) = match &data.eval {
            Some(path) => (file, read_rows(path, &data.read_options(&Names::KEYS))?),
            None => {
                let usual = HELD_OUT.0.min(HELD_OUT.1 as f64 / all.max(1) as f64);
                split(file, plan.held_out_fraction.unwrap_or(usual), SPLIT_SEED)
            }
        };
        held_out.rows.truncate(data.eval_limit.unwrap_or(usize::MAX));
        if held_out.rows.is_empty() || train.rows.is_empty() {
            bail!(
                "{}: of {all} rows none can be held out; give data.eval, a file of held-out rows, or more rows that differ",
                data.train
            );
        }
        let texts = [&train, &held_out].map(|file| to_jsonl(&file.rows));
        let hash = |text: &String| Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        let rows = Self {
            train_file: data.train.to_string(),
            training_rows: train.rows.len(),
            training_hash: hash(&texts[0]),
            held_out_file: data.eval.as_ref().map(|path| path.to_string()),
            held_out_rows: held_out.rows.len(),
            held_out_hash: hash(&texts[1]),
            format: format.to_string(),
            labels: labels_of(&train, &held_out),
            has_answers: format != RowFormat::Text,
        };
        Ok((rows, texts))
    }

    /// What is held out, in words.
    pub fn held_out_in_words(&self) -> String {
        match &self.held_out_file {
            Some(file) => format!("{} rows of {file}", self.held_out_rows),
            None => format!("{} rows of {} that no run trains on", self.held_out_rows, self.train_file),
        }
    }
}

/// The labels that the answers of all rows are; the command line, by which they are handed on, has no way to say some.
fn labels_of(train: &DataFile, held_out: &DataFile) -> Option<Vec<String>> {
    let rows = || train.rows.iter().chain(&held_out.rows);
    let labels = labels::told_by_answers(rows().filter_map(|row| row.text.answers().last().copied()))?;
    (!labels.iter().any(|label| label.contains(','))).then_some(labels)
}
