//! ROUGE (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004) as Google's `rouge_score` 0.1.2 computes it.
//!
//! Words are runs of a to z and 0 to 9 of the text in lower case; everything else, letters with accents included, only separates them.

use serde::Serialize;

use crate::counts::Counts;
use crate::porter::stem;

/// Words of more letters than this are stemmed.
const LONGEST_UNSTEMMED: usize = 3;

/// How much of the prediction is in the reference, how much of the reference is in the prediction, and their harmonic mean; 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Score {
    pub precision: f64,
    pub recall: f64,
    pub fmeasure: f64,
}

impl Score {
    /// From `hits` words that both texts have, of `predicted` and of `wanted`; 0 where there are none.
    fn of(hits: usize, predicted: usize, wanted: usize) -> Self {
        if hits == 0 {
            return Self::default();
        }
        let (precision, recall) = (hits as f64 / predicted as f64, hits as f64 / wanted as f64);
        Self { precision, recall, fmeasure: 2.0 * precision * recall / (precision + recall) }
    }
}

/// The four scores that are usually reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rouge {
    /// Of single words.
    pub rouge1: Score,
    /// Of pairs of neighbouring words.
    pub rouge2: Score,
    /// Of the longest common subsequence of words.
    #[serde(rename = "rougeL")]
    pub rouge_l: Score,
    /// Of the common subsequences of lines, a line being a sentence.
    #[serde(rename = "rougeLsum")]
    pub rouge_lsum: Score,
}

impl Rouge {
    /// The scores of one prediction. With `stemmer`, words of the same stem are the same.
    pub fn of(reference: &str, prediction: &str, stemmer: bool) -> Self {
        let [reference, prediction] = [reference, prediction].map(|text| {
            let lines = text.split('\n').filter(|line| !line.is_empty());
            lines.map(|line| words(line, stemmer)).collect::<Vec<_>>()
        });
        let [wanted, predicted] = [&reference, &prediction].map(|lines| lines.concat());
        let subsequence = common_subsequence(&wanted, &predicted).count();
        Self {
            rouge1: of_runs(&wanted, &predicted, 1),
            rouge2: of_runs(&wanted, &predicted, 2),
            rouge_l: Score::of(subsequence, predicted.len(), wanted.len()),
            rouge_lsum: Score::of(hits_by_line(&reference, &prediction), predicted.len(), wanted.len()),
        }
    }

    /// The mean of each number over all pairs; zeros of no pairs.
    pub fn mean(scores: &[Self]) -> Self {
        let mean = |of: fn(&Self) -> Score| {
            let number = |of_score: fn(Score) -> f64| {
                scores.iter().map(|scores| of_score(of(scores))).sum::<f64>() / scores.len().max(1) as f64
            };
            Score {
                precision: number(|score| score.precision),
                recall: number(|score| score.recall),
                fmeasure: number(|score| score.fmeasure),
            }
        };
        Self {
            rouge1: mean(|scores| scores.rouge1),
            rouge2: mean(|scores| scores.rouge2),
            rouge_l: mean(|scores| scores.rouge_l),
            rouge_lsum: mean(|scores| scores.rouge_lsum),
        }
    }

    /// The scores under the names that they are known by.
    pub fn named(&self) -> [(&'static str, Score); 4] {
        [("rouge1", self.rouge1), ("rouge2", self.rouge2), ("rougeL", self.rouge_l), ("rougeLsum", self.rouge_lsum)]
    }
}

fn words(text: &str, stemmer: bool) -> Vec<String> {
    // In lower case first: the Kelvin sign becomes a k.
    let text = text.to_lowercase();
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit())).filter(|word| !word.is_empty());
    words.map(|word| if stemmer && word.len() > LONGEST_UNSTEMMED { stem(word) } else { word.to_owned() }).collect()
}

/// The score of runs of `length` words, each counted as often as both texts have it.
fn of_runs(wanted: &[String], predicted: &[String], length: usize) -> Score {
    let mut left: Counts<&[String]> = wanted.windows(length).collect();
    let hits = predicted.windows(length).filter(|run| left.take(run)).count();
    let runs = |words: &[String]| (words.len() + 1).saturating_sub(length);
    Score::of(hits, runs(predicted), runs(wanted))
}

/// The words of lines of the reference that are in a common subsequence with some line of the prediction, each counted no more often than
/// the prediction has it (the union of subsequences of section 3.2 of the paper).
fn hits_by_line(reference: &[Vec<String>], prediction: &[Vec<String>]) -> usize {
    let mut left: Counts<&String> = prediction.iter().flatten().collect();
    let mut hits = 0;
    for line in reference {
        let mut is_common = vec![false; line.len()];
        for other in prediction {
            common_subsequence(line, other).for_each(|at| is_common[at] = true);
        }
        let common = line.iter().zip(is_common).filter(|(_, is_common)| *is_common);
        hits += common.filter(|(word, _)| left.take(word)).count();
    }
    hits
}

/// How the longest common subsequence of two beginnings goes on towards their starts.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    /// Both last words are the same and belong to it.
    Both,
    /// It is that of the first text without its last word.
    First,
    /// It is that of the second text without its last word.
    Second,
}

/// The places in `a` of a longest common subsequence with `b`, the last first. Of several that are equally long it is the one that
/// `rouge_score` finds: from the ends, `a` is shortened unless shortening `b` keeps more.
fn common_subsequence(a: &[String], b: &[String]) -> impl Iterator<Item = usize> {
    let width = b.len();
    let mut steps = vec![Step::First; a.len() * width];
    let (mut above, mut row) = (vec![0u32; width + 1], vec![0u32; width + 1]);
    for (word, steps) in a.iter().zip(steps.chunks_exact_mut(width.max(1))) {
        for (j, (other, step)) in b.iter().zip(steps).enumerate() {
            (row[j + 1], *step) = match (word == other, row[j] > above[j + 1]) {
                (true, _) => (above[j] + 1, Step::Both),
                (false, true) => (row[j], Step::Second),
                (false, false) => (above[j + 1], Step::First),
            };
        }
        std::mem::swap(&mut above, &mut row);
    }
    let (mut i, mut j) = (a.len(), width);
    std::iter::from_fn(move || {
        while i > 0 && j > 0 {
            let step = steps[(i - 1) * width + j - 1];
            i -= usize::from(step != Step::Second);
            j -= usize::from(step != Step::First);
            if step == Step::Both {
                return Some(i);
            }
        }
        None
    })
}
