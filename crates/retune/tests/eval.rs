//! `retune eval`: the likeliest label, generated answers, examples before each row, and what is left after Ctrl-C.

mod common;

use common::{Folder, MODEL, golden, joined};
use serde_json::{Value, json};

const LABELS: [&str; 2] = ["on", "time"];

/// Rows that ask which of the labels stands in them, by their numbers.
fn labelled(numbers: std::ops::Range<usize>) -> String {
    let label = |n: usize| LABELS[n % 2];
    let prompt = |n: usize| format!("{} {} {n}:", ["the", "sand", "of"][n % 3], label(n));
    let rows = numbers.map(|n| json!({ "prompt": prompt(n), "completion": format!(" {}", label(n)) }).to_string());
    rows.collect::<Vec<_>>().join("\n")
}

fn with_labels() -> Folder {
    let folder = Folder::with_run();
    folder.write("labelled.train.jsonl", labelled(0..40));
    folder.write("labelled.jsonl", labelled(100..112));
    folder
}

fn train(folder: &Folder, more: &[&str]) {
    let short =
        ["--set", "training.max_steps=40", "--set", "training.eval_steps=40", "--set", "training.save_steps=40"];
    let data = ["--set", "data.train=labelled.train.jsonl", "--set", "data.eval=labelled.jsonl"];
    folder.succeeds(&joined(&[&["train", "run.yaml"], &short, &data, more]));
}

fn eval(folder: &Folder, more: &[&str]) -> Value {
    folder.succeeds(&joined(&[&["eval", "--json"], more])).json()
}

/// What the program wrote of each row.
fn lines(folder: &Folder, file: &str) -> Vec<Value> {
    let text = String::from_utf8(folder.read(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-4
}

#[test]
fn the_loss_of_a_label_is_that_of_a_row_with_this_answer() {
    let folder = with_labels();
    let model = golden(MODEL);
    let args = ["--model", &model, "--predictions", "p.jsonl", "--data"];
    let found = eval(&folder, &joined(&[&args, &["labelled.jsonl"]]));
    assert_eq!(found["by_likelihood"]["rows"], 12);
    let rows = lines(&folder, "p.jsonl");
    assert_eq!(rows.len(), 12);
    for label in LABELS {
        // Every row with this answer.
        let text = String::from_utf8(folder.read("labelled.jsonl")).unwrap();
        let text =
            LABELS.iter().fold(text, |text, other| text.replace(&format!("\" {other}\""), &format!("\" {label}\"")));
        folder.write("one.jsonl", text);
        let of_one =
            eval(&folder, &joined(&[&["--model", &model, "--predictions", "one.p.jsonl", "--data", "one.jsonl"]]));
        assert_eq!(of_one["by_likelihood"], Value::Null, "one answer is no choice");
        for (row, same) in rows.iter().zip(lines(&folder, "one.p.jsonl")) {
            let expected = same["loss"].as_f64().unwrap() * same["label_tokens"].as_f64().unwrap();
            assert!(close(row["label_losses"][label].as_f64().unwrap(), expected), "{row} and {same}");
        }
    }
    // The likeliest is the one of the least loss, and the score that of these.
    let mut right = 0;
    for row in &rows {
        let [on, time] = LABELS.map(|label| row["label_losses"][label].as_f64().unwrap());
        assert_eq!(row["likeliest_label"], LABELS[usize::from(time < on)]);
        right += usize::from(row["likeliest_label"] == row["reference"]);
    }
    assert!(close(found["by_likelihood"]["accuracy"].as_f64().unwrap(), right as f64 / 12.0));
    let columns = ["--reference", "reference", "--prediction", "likeliest_label", "--metric", "accuracy,macro-f1"];
    let scored = folder.succeeds(&joined(&[&["score", "--json", "--file", "p.jsonl"], &columns])).json();
    for metric in ["accuracy", "macro_f1"] {
        assert_eq!(scored[metric], found["by_likelihood"][metric], "{metric}");
    }

    // Labels that are given are more to choose from.
    let given = joined(&[&args, &["labelled.jsonl", "--labels", "on,time,sand", "--limit", "5"]]);
    let found = eval(&folder, &given);
    assert_eq!(lines(&folder, "p.jsonl")[0]["label_losses"].as_object().unwrap().len(), 3);
    let scored = folder.succeeds(&joined(&[&["score", "--json", "--file", "p.jsonl"], &columns])).json();
    assert_eq!(scored["macro_f1"], found["by_likelihood"]["macro_f1"], "a label that no row has");
    assert_eq!((&found["by_likelihood"]["rows"], &found["rows"]), (&json!(5), &json!(5)));
    // The loss is the mean over rows' tokens, as before.
    let (mut sum, mut tokens) = (0.0, 0.0);
    for row in lines(&folder, "p.jsonl") {
        sum += row["loss"].as_f64().unwrap() * row["label_tokens"].as_f64().unwrap();
        tokens += row["label_tokens"].as_f64().unwrap();
    }
    assert!(close(found["loss"].as_f64().unwrap(), sum / tokens), "{found}");
}

#[test]
fn what_was_trained_tells_the_labels_by_likelihood_and_in_its_answers() {
    let folder = with_labels();
    train(&folder, &[]);
    let model = golden(MODEL);
    let args = ["--model", &model, "--data", "labelled.jsonl", "--generate", "--max-new-tokens", "9"];
    let adapted = eval(&folder, &joined(&[&args, &["--adapter", "out/adapter", "--predictions", "p.jsonl"]]));
    assert_eq!(adapted["by_likelihood"]["accuracy"], 1.0, "{adapted}");
    let generated = &adapted["generated"];
    assert_eq!(
        (&generated["rows"], &generated["cut"], &generated["exact_match"]),
        (&json!(12), &json!(0), &json!(1.0))
    );
    assert_eq!((&generated["labels"]["macro_f1"], &generated["rougeL"]["fmeasure"]), (&json!(1.0), &json!(1.0)));
    let base = eval(&folder, &args);
    assert!(base["generated"]["exact_match"].as_f64() < Some(0.5), "{base}");
    for row in lines(&folder, "p.jsonl") {
        assert_eq!(row["prediction"], row["reference"]);
    }
    let text = folder.succeeds(&joined(&[&["eval", "--adapter", "out/adapter"], &args])).stdout;
    for words in
        ["labels      accuracy 1.0000, macro-F1 1.0000: the likeliest of on, time in 12 rows", "exact match 1.0000"]
    {
        assert!(text.contains(words), "{words} is not in: {text}");
    }
}

#[test]
fn answers_are_those_of_generate_and_their_scores_those_of_score() {
    let folder = with_labels();
    let model = golden(MODEL);
    let text = String::from_utf8(folder.read("labelled.jsonl")).unwrap();
    let prompts: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let methods = [
        ("prompt_tuning", json!({ "num_virtual_tokens": 3 })),
        ("prefix_tuning", json!({ "num_virtual_tokens": 3 })),
        ("lora", json!({ "r": 4, "use_dora": true })),
        ("full", Value::Null),
    ];
    for (method, settings) in methods {
        let out = format!("output_dir={method}");
        let (method_key, settings) = (format!("method={method}"), format!("adapter={settings}"));
        let set = ["--set", &out, "--set", &method_key, "--set", &settings];
        train(&folder, &joined(&[&set, &["--set", "training.max_steps=2", "--set", "training.learning_rate=0.01"]]));
        let adapter = format!("{method}/adapter");
        let whole = format!("{method}/model");
        let of: Vec<&str> =
            if method == "full" { vec!["--model", &whole] } else { vec!["--model", &model, "--adapter", &adapter] };
        let args = ["--data", "labelled.jsonl", "--limit", "3", "--generate", "--max-new-tokens", "6"];
        let found = eval(&folder, &joined(&[&of, &args, &["--predictions", "p.jsonl"]]));
        let rows = lines(&folder, "p.jsonl");
        assert_eq!(rows.len(), 3);
        for (row, prompt) in rows.iter().zip(&prompts) {
            let prompt = prompt["prompt"].as_str().unwrap();
            let ask = ["generate", "--raw", "--json", "--max-new-tokens", "6", prompt];
            let answer = folder.succeeds(&joined(&[&ask, &of])).json();
            assert_eq!(row["prediction"], answer["text"].as_str().unwrap().trim(), "{method}");
        }
        let columns = ["--reference", "reference", "--prediction", "prediction", "--metric", "rouge,f1,exact-match"];
        let scored = folder.succeeds(&joined(&[&["score", "--json", "--file", "p.jsonl"], &columns])).json();
        for (name, score) in scored.as_object().unwrap() {
            assert_eq!(score, &found["generated"][name], "{method} {name}");
        }
    }
}

#[test]
fn examples_stand_before_each_row() {
    let folder = with_labels();
    let model = golden(MODEL);
    let data = ["--model", &model, "--max-length", "400", "--data"];
    // One example, so that there is one choice.
    folder.write("example.jsonl", json!({ "prompt": "of on:", "completion": " on" }).to_string());
    let with = |file: &str, more: &[&str]| eval(&folder, &joined(&[&data, &[file], more]));
    let one = ["--examples", "1", "--examples-from", "example.jsonl"];
    let found = with("labelled.jsonl", &one);
    let text = String::from_utf8(folder.read("labelled.jsonl")).unwrap();
    folder.write("by-hand.jsonl", text.replace("{\"prompt\":\"", "{\"prompt\":\"of on: on\\n\\n"));
    let by_hand = with("by-hand.jsonl", &[]);
    assert_eq!(found["loss"], by_hand["loss"]);
    assert_eq!(found["by_likelihood"], by_hand["by_likelihood"]);
    assert_ne!(found["loss"], with("labelled.jsonl", &[])["loss"]);

    // In a conversation they are turns, of which none is scored.
    let chat = |text: &str| -> String {
        let row = |line: &str| {
            let row: Value = serde_json::from_str(line).unwrap();
            json!({ "instruction": row["prompt"], "output": row["completion"] }).to_string() + "\n"
        };
        text.lines().map(row).collect()
    };
    folder.write("chat.jsonl", chat(&text));
    folder.write("chat.train.jsonl", chat(&labelled(0..40)));
    let (alone, four) =
        (with("chat.jsonl", &[]), with("chat.jsonl", &["--examples", "4", "--examples-from", "chat.train.jsonl"]));
    assert_eq!(alone["label_tokens"], four["label_tokens"]);
    assert!(four["tokens"].as_u64() > alone["tokens"].as_u64().map(|tokens| 3 * tokens), "{four}");
    assert_ne!(alone["loss"], four["loss"]);
    let seeded = |seed: &str| {
        with("chat.jsonl", &["--examples", "4", "--examples-from", "chat.train.jsonl", "--seed", seed])["loss"].clone()
    };
    assert_eq!(seeded("0"), four["loss"]);
    assert!((1..4).any(|seed| seeded(&seed.to_string()) != four["loss"]), "the seed is of no effect");
}

#[test]
fn rows_whose_labels_are_too_long_are_told() {
    let folder = with_labels();
    let model = golden(MODEL);
    let args = ["eval", "--model", &model, "--data", "labelled.jsonl", "--json", "--max-length"];
    let longest = (1..40).rev().map(|length| length.to_string()).find_map(|length| {
        let output = folder.retune(&joined(&[&args, &[&length, "--labels", "on,time,the sand of time"]]));
        (output.code == Some(0) && output.json()["by_likelihood"].is_null()).then_some(output)
    });
    let output = longest.expect("there is a length at which no row has all of its labels");
    assert!(output.stderr.contains("in 12 of 12 rows no label was compared"), "{}", output.stderr);
    assert_eq!(output.json()["labels_too_long"], 12);
}

#[test]
fn what_has_no_effect_or_no_answer_is_refused() {
    let folder = with_labels();
    let model = golden(MODEL);
    folder.write("text.jsonl", "{\"text\": \"the sand\"}\n{\"text\": \"of time\"}\n");
    let refuses = |file: &str, more: &[&str], words: &[&str]| {
        folder.refuses(&joined(&[&["eval", "--model", &model, "--data", file], more]), words);
    };
    refuses("text.jsonl", &["--generate"], &["--generate has nothing to answer", "format text"]);
    refuses("labelled.jsonl", &["--labels", "on"], &["--labels is \"on\"", "at least two different ones"]);
    refuses("labelled.jsonl", &["--labels", "on,on"], &["at least two different ones"]);
    refuses("labelled.jsonl", &["--labels", "on,sand"], &["line 2: the answer is \"time\", none of --labels"]);
    refuses("labelled.jsonl", &["--generate", "--max-new-tokens", "0"], &["--max-new-tokens is 0"]);
    let long = ["--generate", "--max-new-tokens", "600"];
    refuses("labelled.jsonl", &long, &["row 1: ", "600 to generate exceed the model's context of 512"]);
    refuses("labelled.jsonl", &["--predictions", "no/such/p.jsonl"], &["no/such/p.jsonl"]);
    let examples = |count: &'static str, file: &'static str| ["--examples", count, "--examples-from", file];
    refuses("labelled.jsonl", &examples("0", "labelled.train.jsonl"), &["--examples is 0"]);
    refuses("labelled.jsonl", &examples("1", "labelled.jsonl"), &["has 0 rows with one of the labels", "not scored"]);
    refuses("labelled.jsonl", &examples("1", "text.jsonl"), &["text.jsonl has rows of the format text"]);
    refuses("text.jsonl", &examples("1", "text.jsonl"), &["examples need rows of one format, with answers"]);
    let alone = ["eval", "--model", &model, "--data", "labelled.jsonl", "--max-new-tokens", "5"];
    assert_eq!(folder.retune(&alone).code, Some(2), "of no effect without --generate");
}

#[cfg(unix)]
#[test]
fn after_ctrl_c_there_is_what_was_done() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};

    let folder = with_labels();
    let model = golden(MODEL);
    // Longer than anybody waits.
    folder.write("many.jsonl", labelled(0..20_000));
    let args = ["eval", "--json", "--model", &model, "--data", "many.jsonl", "--predictions", "p.jsonl"];
    let mut command: Command = folder.command(&joined(&[&args, &["--generate", "--max-new-tokens", "100"]]));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("scored ") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before it could be interrupted");
    }
    assert!(line.contains("/20000 rows, ") && line.ends_with(" s left\n"), "{line}");
    // SAFETY: kill has no conditions on memory, and the child has not been waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{rest}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = found["rows"].as_u64().unwrap();
    assert!(found["interrupted"] == true && (1..20_000).contains(&rows), "{found}");
    assert!(found["loss"].as_f64().is_some_and(|loss| loss > 0.0), "{found}");
    assert_eq!(lines(&folder, "p.jsonl").len() as u64, rows);
}
