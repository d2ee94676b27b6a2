//! What each variant made of each held-out row, and how two of them differ.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use retune_eval::bootstrap::{self, Difference, Pair};
use retune_eval::rouge::Rouge;
use serde::{Deserialize, Serialize};

/// Nats per token by which a row's loss must differ to count as better or worse.
const LOSS_MARGIN: f64 = 0.01;
/// The seed of all draws.
const SEED: u64 = 42;

/// A line of a file of predictions, as `retune eval` writes it.
#[derive(Clone, Debug, Deserialize)]
struct Line {
    row: usize,
    reference: Option<String>,
    /// The mean of a label token.
    loss: f64,
    label_tokens: usize,
    likeliest_label: Option<String>,
    prediction: Option<String>,
}

/// What a variant made of a row; numbers are means over its seeds.
#[derive(Clone, Debug, PartialEq)]
pub struct RowScore {
    pub reference: Option<String>,
    /// The answer of the first seed.
    answer: Option<String>,
    /// Its likeliest label.
    label: Option<String>,
    /// Summed over the label tokens.
    loss: f64,
    label_tokens: f64,
    /// Whether the likeliest label is the row's.
    right: Option<f64>,
    rouge_l: Option<f64>,
}

/// By the rows' numbers, from 1.
pub type RowScores = BTreeMap<usize, RowScore>;

/// How many rows a change made better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flips {
    pub better: usize,
    pub worse: usize,
    pub equal: usize,
}

/// What rows are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    Loss,
    /// Whether the likeliest label is the row's.
    Accuracy,
    RougeL,
}

impl Measure {
    /// What says whether a row got better: what a person would say of it where there is such a thing.
    pub fn of_flips(rows: &RowScores) -> Self {
        let has = |value: fn(&RowScore) -> Option<f64>| rows.values().any(|row| value(row).is_some());
        match (has(|row| row.right), has(|row| row.rouge_l)) {
            (true, _) => Self::Accuracy,
            (_, true) => Self::RougeL,
            _ => Self::Loss,
        }
    }

    /// In the words of the report.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Loss => "the loss of a row's answer, per token, where it differs by more than 0.01",
            Self::Accuracy => "whether the likeliest label is right",
            Self::RougeL => "ROUGE-L of the answer and the reference",
        }
    }

    /// The value of a row, and what it counts.
    fn value(self, row: &RowScore) -> Option<(f64, f64)> {
        match self {
            Self::Loss => Some((row.loss, row.label_tokens)),
            Self::Accuracy => Some((row.right?, 1.0)),
            Self::RougeL => Some((row.rouge_l?, 1.0)),
        }
    }

    /// How much better the second is than the first; 0 for what does not count.
    pub fn gain(self, first: &RowScore, second: &RowScore) -> Option<f64> {
        let ((a, weight), (b, _)) = (self.value(first)?, self.value(second)?);
        let gain = (b - a) / weight.max(1.0);
        Some(match self {
            Self::Loss if gain.abs() <= LOSS_MARGIN => 0.0,
            Self::Loss => -gain,
            _ => gain,
        })
    }
}

impl RowScore {
    /// What was said to the row, of which the measure speaks.
    pub fn output(&self, measure: Measure) -> Option<&str> {
        let (first, second) =
            if measure == Measure::Accuracy { (&self.label, &self.answer) } else { (&self.answer, &self.label) };
        first.as_ref().or(second.as_ref()).map(String::as_str)
    }

    /// The mean loss of a label token.
    pub fn mean_loss(&self) -> f64 {
        self.loss / self.label_tokens.max(1.0)
    }
}

/// Reads the predictions of a variant's seeds.
///
/// # Errors
/// A file that is missing or damaged.
pub fn read(files: &[impl AsRef<Path>]) -> Result<RowScores> {
    let mut found = RowScores::new();
    let count = files.len() as f64;
    for file in files {
        let path = file.as_ref();
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        for line in text.lines() {
            let line: Line = serde_json::from_str(line)
                .with_context(|| format!("{} is damaged; start anew with --overwrite", path.display()))?;
            let (number, score) = (line.row, RowScore::of(line, count));
            match found.get_mut(&number) {
                Some(sum) => sum.add(&score),
                None => drop(found.insert(number, score)),
            }
        }
    }
    Ok(found)
}

impl RowScore {
    /// Of one of so many seeds.
    fn of(line: Line, seeds: f64) -> Self {
        let reference = line.reference.as_deref();
        let right = line.likeliest_label.as_deref().map(|label| f64::from(u8::from(Some(label) == reference)));
        let rouge = |answer: &str| Some(Rouge::of(reference?, answer, false).rouge_l.fmeasure);
        Self {
            loss: line.loss * line.label_tokens as f64 / seeds,
            label_tokens: line.label_tokens as f64 / seeds,
            right: right.map(|right| right / seeds),
            rouge_l: line.prediction.as_deref().and_then(rouge).map(|score| score / seeds),
            answer: line.prediction,
            label: line.likeliest_label,
            reference: line.reference,
        }
    }

    fn add(&mut self, other: &Self) {
        let sum = |a: Option<f64>, b: Option<f64>| Some(a? + b?);
        self.loss += other.loss;
        self.label_tokens += other.label_tokens;
        self.right = sum(self.right, other.right);
        self.rouge_l = sum(self.rouge_l, other.rouge_l);
    }
}

/// The rows that both have.
pub fn both<'a>(
    first: &'a RowScores,
    second: &'a RowScores,
) -> impl Iterator<Item = (usize, &'a RowScore, &'a RowScore)> {
    first.iter().filter_map(|(number, row)| Some((*number, row, second.get(number)?)))
}

/// What the second has more than the first, with its interval.
pub fn difference(measure: Measure, first: &RowScores, second: &RowScores) -> Option<Difference> {
    let pair = |(_, first, second): (usize, &RowScore, &RowScore)| {
        let ((a, weight), (b, _)) = (measure.value(first)?, measure.value(second)?);
        Some(Pair { difference: b - a, weight })
    };
    bootstrap::paired(&both(first, second).filter_map(pair).collect::<Vec<_>>(), SEED)
}

/// How many rows got better from the first to the second.
pub fn flips(measure: Measure, first: &RowScores, second: &RowScores) -> Flips {
    let mut flips = Flips::default();
    for gain in both(first, second).filter_map(|(_, first, second)| measure.gain(first, second)) {
        match gain {
            gain if gain > 0.0 => flips.better += 1,
            gain if gain < 0.0 => flips.worse += 1,
            _ => flips.equal += 1,
        }
    }
    flips
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(lines: &[&str]) -> RowScores {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<_> = (0..lines.len()).map(|at| folder.path().join(format!("{at}.jsonl"))).collect();
        files.iter().zip(lines).for_each(|(file, text)| fs::write(file, text).unwrap());
        read(&files).unwrap()
    }

    const FIRST: &str = "{\"row\": 1, \"reference\": \"yes\", \"loss\": 2.0, \"label_tokens\": 1, \"likeliest_label\": \"no\"}\n\
                         {\"row\": 3, \"reference\": \"no\", \"loss\": 1.0, \"label_tokens\": 3, \"likeliest_label\": \"no\"}\n";
    const SECOND: &str = "{\"row\": 1, \"reference\": \"yes\", \"loss\": 1.0, \"label_tokens\": 1, \"likeliest_label\": \"yes\"}\n\
                          {\"row\": 3, \"reference\": \"no\", \"loss\": 1.5, \"label_tokens\": 3, \"likeliest_label\": \"no\"}\n";

    #[test]
    fn losses_are_means_of_tokens_and_labels_of_rows() {
        let (first, second) = (scores(&[FIRST]), scores(&[SECOND]));
        let loss = difference(Measure::Loss, &first, &second).unwrap();
        // (1 + 4.5)/4 - (2 + 3)/4
        assert!((loss.estimate - 0.125).abs() < 1e-12, "{loss:?}");
        let accuracy = difference(Measure::Accuracy, &first, &second).unwrap();
        assert_eq!((accuracy.estimate, accuracy.low, accuracy.high), (0.5, 0.0, 1.0));
        assert_eq!(difference(Measure::RougeL, &first, &second), None);
        assert_eq!(Measure::of_flips(&first), Measure::Accuracy);
        assert_eq!(flips(Measure::Accuracy, &first, &second), Flips { better: 1, worse: 0, equal: 1 });
        assert_eq!(flips(Measure::Loss, &first, &second), Flips { better: 1, worse: 1, equal: 0 });
    }

    #[test]
    fn seeds_are_averaged_row_by_row() {
        let (first, second) = (scores(&[FIRST]), scores(&[FIRST, SECOND]));
        let row = &second[&1];
        assert_eq!((row.mean_loss(), row.right, row.output(Measure::Accuracy)), (1.5, Some(0.5), Some("no")));
        assert!((difference(Measure::Loss, &first, &second).unwrap().estimate - 0.0625).abs() < 1e-12);
    }
}
