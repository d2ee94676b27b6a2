//! Exact match and token F1, as SQuAD's evaluation has them (Rajpurkar et al. 2016; version 2.0 of the script, which also says what empty
//! answers are).
//!
//! Answers are compared in lower case, without ASCII punctuation, without the articles a, an and the, and whatever the white space. The script
//! prints percentages; here 1 is the best.

use crate::counts::Counts;

/// The words by which answers are compared.
fn words(text: &str) -> Vec<String> {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut kept = String::new();
    // An article is one wherever no letter or digit stands beside it.
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        let is_word = first.is_alphanumeric();
        let end = rest.find(|c: char| c.is_alphanumeric() != is_word).unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        kept.push_str(if matches!(run, "a" | "an" | "the") { " " } else { run });
        rest = after;
    }
    kept.split_whitespace().map(str::to_owned).collect()
}

/// Whether two answers are the same.
pub fn exact_match(reference: &str, prediction: &str) -> bool {
    words(reference) == words(prediction)
}

/// The harmonic mean of how many words of the prediction are in the reference, and of the reference in the prediction; 0 to 1. Of two answers
/// of which one is empty it is 1 if both are.
pub fn token_f1(reference: &str, prediction: &str) -> f64 {
    let (wanted, predicted) = (words(reference), words(prediction));
    if wanted.is_empty() || predicted.is_empty() {
        return f64::from(u8::from(wanted == predicted));
    }
    let mut left: Counts<&String> = wanted.iter().collect();
    let hits = predicted.iter().filter(|word| left.take(word)).count();
    2.0 * hits as f64 / (wanted.len() + predicted.len()) as f64
}
