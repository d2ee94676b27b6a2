//! `retune score`: how good the answers in a file are.

use anyhow::{Result, bail};
use retune_eval::labels::Classification;
use retune_eval::rouge::Rouge;
use retune_eval::squad::{exact_match, token_f1};
use retune_train::data::read_columns;
use serde_json::{Map, Value, json};

use super::print_json;
use crate::args::{Metric, ScoreArgs};

/// Scores the rows and prints the means.
pub fn run(args: &ScoreArgs) -> Result<()> {
    if args.stemmer && !args.metrics.contains(&Metric::Rouge) {
        bail!("--stemmer has no effect without --metric rouge, which alone compares stems: leave it out");
    }
    let rows = read_columns(&args.file, [&args.reference, &args.prediction])?;
    let pairs = || rows.iter().map(|[reference, prediction]| (reference.as_str(), prediction.as_str()));
    let mean = |score: fn(&str, &str) -> f64| pairs().map(|(a, b)| score(a, b)).sum::<f64>() / rows.len() as f64;
    let of_labels = || Classification::of(pairs());
    let mut found = Map::new();
    let mut add = |name: &str, value: Value| found.insert(name.to_owned(), value);
    for metric in &args.metrics {
        match metric {
            Metric::Rouge => {
                let scores: Vec<Rouge> = pairs().map(|(a, b)| Rouge::of(a, b, args.stemmer)).collect();
                for (name, score) in Rouge::mean(&scores).named() {
                    add(name, json!(score));
                }
            }
            Metric::ExactMatch => {
                add("exact_match", json!(mean(|a, b| f64::from(u8::from(exact_match(a, b))))));
            }
            Metric::F1 => {
                add("f1", json!(mean(token_f1)));
            }
            Metric::Accuracy => {
                add("accuracy", json!(of_labels().accuracy));
            }
            Metric::MacroF1 => {
                add("macro_f1", json!(of_labels().macro_f1));
            }
        }
    }
    if args.json {
        return print_json(&Value::Object(found));
    }
    for (name, value) in &found {
        outln!("{name:<12} {}", in_words(value));
    }
    outln!("{:<12} {}", "rows", rows.len());
    Ok(())
}

/// A share, or the numbers of a score with their names.
fn in_words(value: &Value) -> String {
    match value {
        Value::Object(numbers) => {
            let numbers = numbers.iter().map(|(name, number)| format!("{name} {}", in_words(number)));
            numbers.collect::<Vec<_>>().join("  ")
        }
        share => format!("{:.4}", share.as_f64().unwrap_or_default()),
    }
}
