//! `retune score` on files a person might have.

mod common;

use common::{Folder, joined};
use serde_json::json;

const COLUMNS: [&str; 4] = ["--reference", "right", "--prediction", "said"];

/// What the command finds in a file.
fn score(folder: &Folder, file: &str, more: &[&str]) -> serde_json::Value {
    folder.succeeds(&joined(&[&["score", "--file", file, "--json"], &COLUMNS, more])).json()
}

#[test]
fn rouge_of_rows_is_the_mean_of_their_scores() {
    let folder = Folder::with_run();
    let rows = [
        json!({ "right": "the cat\nsat on\nthe mat", "said": "the mat\nthe cat sat", "other": 1 }),
        json!({ "right": "dying skies news generously", "said": "die sky new generous" }),
    ];
    folder.write("rows.jsonl", rows.map(|row| row.to_string()).join("\n"));
    folder.write("rows.csv", "said,right\n\"the mat\nthe cat sat\",\"the cat\nsat on\nthe mat\"\ndie sky new generous,dying skies news generously\n");
    let found = score(&folder, "rows.jsonl", &["--metric", "rouge", "--stemmer"]);
    assert_eq!(found, score(&folder, "rows.csv", &["--metric", "rouge", "--stemmer"]));
    // rouge_score 0.1.2 has 10/11 and 3/4, 4/9 and 1/3, 6/11 and 3/4, 10/11 and 3/4.
    for (name, expected) in
        [("rouge1", [10.0 / 11.0, 0.75]), ("rougeL", [6.0 / 11.0, 0.75]), ("rougeLsum", [10.0 / 11.0, 0.75])]
    {
        let found = found[name]["fmeasure"].as_f64().unwrap();
        assert!((found - (expected[0] + expected[1]) / 2.0).abs() < 1e-12, "{name} {found}");
    }
    let keys: Vec<_> = found.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["rouge1", "rouge2", "rougeL", "rougeLsum"]);
    let keys: Vec<_> = found["rouge2"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["precision", "recall", "fmeasure"]);
    let plain = score(&folder, "rows.jsonl", &["--metric", "rouge"]);
    assert!(plain["rouge1"]["fmeasure"].as_f64() < found["rouge1"]["fmeasure"].as_f64(), "{plain}");
}

#[test]
fn labels_may_be_numbers_and_several_metrics_come_together() {
    let folder = Folder::with_run();
    let rows = [(1, "1"), (0, "1"), (0, "0"), (0, "the 0")];
    folder
        .write("rows.jsonl", rows.map(|(right, said)| json!({ "right": right, "said": said }).to_string()).join("\n"));
    let found = score(&folder, "rows.jsonl", &["--metric", "accuracy,macro-f1", "--metric", "exact-match,f1"]);
    // Of "the 0", a label of its own, the F1 is 0.
    let expected = json!({ "accuracy": 0.5, "macro_f1": (2.0 / 3.0 + 0.5) / 3.0, "exact_match": 0.75, "f1": 0.75 });
    for (name, expected) in expected.as_object().unwrap() {
        let difference = found[name].as_f64().unwrap() - expected.as_f64().unwrap();
        assert!(difference.abs() < 1e-12, "{name} in {found}");
    }
    let args = joined(&[&["score", "--file", "rows.jsonl", "--metric", "accuracy,rouge"], &COLUMNS]);
    let text = folder.succeeds(&args).stdout;
    assert!(text.contains("accuracy     0.5000\n") && text.contains("rows         4\n"), "{text}");
    assert!(text.contains("rouge1       precision 0.6250  recall 0.7500  fmeasure 0.6667\n"), "{text}");
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let folder = Folder::with_run();
    folder.write("rows.jsonl", "{\"right\": \"a\", \"sad\": \"a\"}\n");
    folder.write("nested.jsonl", "{\"right\": \"a\", \"said\": \"b\"}\n{\"right\": [\"a\"], \"said\": \"a\"}\n");
    folder.write("empty.jsonl", "\n");
    folder.write("rows.txt", "{}\n");
    let refuses = |file: &str, more: &[&str], words: &[&str]| {
        folder.refuses(&joined(&[&["score", "--file", file], &COLUMNS, more]), words);
    };
    refuses("rows.jsonl", &["--metric", "f1"], &["line 1: there is no column \"said\"", "Did you mean \"sad\"?"]);
    refuses("nested.jsonl", &["--metric", "f1"], &["line 2: column right is a list of 1", "a text or a number"]);
    refuses("empty.jsonl", &["--metric", "f1"], &["holds no rows"]);
    refuses("rows.txt", &["--metric", "f1"], &["rows.txt is not a data file by its name"]);
    refuses("rows.jsonl", &["--metric", "f1", "--stemmer"], &["--stemmer has no effect without --metric rouge"]);
}
