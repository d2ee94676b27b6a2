//! The scores are those of the programs that define them; goldens/make_rouge.py asked those.

use std::fs;
use std::path::Path;

use retune_eval::bootstrap::{Pair, paired_by};
use retune_eval::labels::Classification;
use retune_eval::rouge::Rouge;
use retune_eval::squad::{exact_match, token_f1};
use serde_json::Value;

fn golden(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)).unwrap()
}

fn lines(name: &str) -> Vec<Value> {
    golden(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn close(found: f64, expected: &Value) -> bool {
    (found - expected.as_f64().unwrap()).abs() < 1e-12
}

#[test]
fn rouge_is_that_of_rouge_score() {
    let pairs = lines("rouge.jsonl");
    assert!(pairs.len() > 250);
    for pair in &pairs {
        let [reference, prediction] = ["reference", "prediction"].map(|key| pair[key].as_str().unwrap());
        for (stemmer, name) in [(false, "plain"), (true, "stemmed")] {
            for (kind, score) in Rouge::of(reference, prediction, stemmer).named() {
                let (found, expected) = ([score.precision, score.recall, score.fmeasure], &pair[name][kind]);
                let is_equal = found.iter().zip(0..).all(|(number, at)| close(*number, &expected[at]));
                assert!(is_equal, "{kind} {name} of {pair}: {found:?}");
            }
        }
    }
    let changed = |pair: &&Value| pair["plain"] != pair["stemmed"];
    assert!(pairs.iter().filter(changed).count() > 20, "the stemmer has nothing to do");
}

#[test]
fn answers_are_compared_as_squad_does() {
    for line in lines("squad.jsonl") {
        let [reference, prediction] = [0, 1].map(|at| line[at].as_str().unwrap());
        assert_eq!(exact_match(reference, prediction), line[2], "{line}");
        assert!(close(token_f1(reference, prediction), &line[3]), "{line}");
    }
}

#[test]
fn labels_are_scored_as_scikit_learn_does() {
    let cases: Vec<Value> = serde_json::from_str(&golden("labels.json")).unwrap();
    let texts = |value: &Value| -> Vec<String> { serde_json::from_value(value.clone()).unwrap() };
    for case in cases {
        let [labels, references, predictions] = ["labels", "reference", "prediction"].map(|key| texts(&case[key]));
        let pairs = references.iter().map(String::as_str).zip(predictions.iter().map(String::as_str));
        let found = Classification::of(pairs);
        assert_eq!(found.labels.iter().map(|label| label.label.as_str()).collect::<Vec<_>>(), labels);
        assert!(close(found.accuracy, &case["accuracy"]) && close(found.macro_f1, &case["macro_f1"]), "{found:?}");
        for (found, expected) in found.labels.iter().zip(case["of_labels"].as_array().unwrap()) {
            let numbers = [found.precision, found.recall, found.f1, found.rows as f64];
            assert!(numbers.iter().zip(0..).all(|(number, at)| close(*number, &expected[at])), "{found:?}, {expected}");
        }
    }
}

#[test]
fn intervals_are_scipys_percentile_intervals_of_the_same_draws() {
    let cases: Vec<Value> = serde_json::from_str(&golden("bootstrap.json")).unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let [first, second, weight] =
            ["first", "second", "weight"].map(|key| serde_json::from_value::<Vec<f64>>(case[key].clone()).unwrap());
        let draws: Vec<Vec<usize>> = serde_json::from_value(case["draws"].clone()).unwrap();
        let rows = first.iter().zip(&second).zip(&weight);
        let rows: Vec<Pair> = rows.map(|((a, b), weight)| Pair { difference: b - a, weight: *weight }).collect();
        let found = paired_by(&rows, draws).unwrap();
        assert!(close(found.estimate, &case["estimate"]), "{found:?}");
        assert!(close(found.low, &case["low"]) && close(found.high, &case["high"]), "{found:?}");
        let error = found.detectable / 2.801_585_218_112_968;
        assert!(close(error, &case["standard_error"]), "{error} and {}", case["standard_error"]);
    }
}
