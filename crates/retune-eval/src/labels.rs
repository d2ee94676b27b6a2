//! Accuracy and F1 of labels, as scikit-learn's `classification_report` defines them where it is not told the labels.

use serde::Serialize;

/// How well one label is told.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LabelScore {
    pub label: String,
    /// How many of those told to be it are; 0 of none.
    pub precision: f64,
    /// How many of those that are it are told so; 0 of none.
    pub recall: f64,
    /// Their harmonic mean; 0 where no row that is it is told so.
    pub f1: f64,
    /// Rows that are it.
    pub rows: usize,
}

/// How well labels are told.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Classification {
    /// Share of the rows whose label is told.
    pub accuracy: f64,
    /// Mean F1 of the labels, each counted alike however many rows it has (scikit-learn's `f1_score` with `average="macro"`).
    pub macro_f1: f64,
    pub rows: usize,
    /// Of each text that is a reference or a prediction, in the order of the alphabet: one that is only predicted has an F1 of 0.
    pub labels: Vec<LabelScore>,
}

impl Classification {
    /// Of (reference, prediction) pairs; texts are compared without the white space around them.
    pub fn of<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let pairs: Vec<(&str, &str)> = pairs.into_iter().map(|(a, b)| (a.trim(), b.trim())).collect();
        let count = |is: &dyn Fn(&(&str, &str)) -> bool| pairs.iter().filter(|pair| is(pair)).count();
        let share = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
        let score = |label: &String| {
            let label = label.as_str();
            let rows = count(&|pair| pair.0 == label);
            let told = count(&|pair| pair.1 == label);
            let right = count(&|pair| *pair == (label, label));
            LabelScore {
                label: label.to_owned(),
                precision: share(right, told),
                recall: share(right, rows),
                f1: share(2 * right, rows + told),
                rows,
            }
        };
        let labels = distinct(pairs.iter().flat_map(|&(a, b)| [a, b]));
        let scores: Vec<LabelScore> = labels.iter().map(score).collect();
        Self {
            accuracy: share(count(&|pair| pair.0 == pair.1), pairs.len()),
            macro_f1: scores.iter().map(|score| score.f1).sum::<f64>() / scores.len().max(1) as f64,
            rows: pairs.len(),
            labels: scores,
        }
    }
}

/// The different texts among these, without the white space around them, in the order of the alphabet.
pub fn distinct<'a>(texts: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut found: Vec<String> = texts.into_iter().map(|text| text.trim().to_owned()).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Most labels that data are taken to have.
const MOST: usize = 20;
/// Rows that each has on average, at least.
const LEAST_ROWS: usize = 4;

/// The labels of data whose answers are labels: 2 to 20 different answers, each of which four rows have on average. `None` of other data.
pub fn told_by_answers<'a>(answers: impl IntoIterator<Item = &'a str>) -> Option<Vec<String>> {
    let answers: Vec<&str> = answers.into_iter().collect();
    let labels = distinct(answers.iter().copied());
    let are_few = (2..=MOST).contains(&labels.len()) && labels.len() * LEAST_ROWS <= answers.len();
    (are_few && !labels.iter().any(String::is_empty)).then_some(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_answers_of_many_rows_are_labels() {
        let of = |answers: &[&str]| told_by_answers(answers.iter().copied());
        assert_eq!(of(&["yes", "no ", " yes", "no", "yes", "no", "yes", "no"]).unwrap(), ["no", "yes"]);
        assert_eq!(of(&["yes", "no", "yes", "no", "yes", "no", "yes"]), None, "fewer than four rows each");
        assert_eq!(of(&["yes"; 9]), None, "there is nothing to tell apart");
        assert_eq!(of(&["yes", "", "yes", "", "yes", "", "yes", ""]), None, "no answer is no label");
        let of_numbers = |labels: usize| {
            let answers: Vec<String> = (0..4 * labels).map(|row| (row % labels).to_string()).collect();
            told_by_answers(answers.iter().map(String::as_str)).map(|labels| labels.len())
        };
        assert_eq!((of_numbers(20), of_numbers(21)), (Some(20), None));
    }
}
