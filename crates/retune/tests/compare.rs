//! `retune compare`: what it leaves, a run that fails, a kill in the middle, plans that are refused, and the report as a page.

mod common;

use common::{Folder, MODEL, golden, joined};
use serde_json::{Value, json};

const LABELS: [&str; 2] = ["on", "time"];

/// Rows that ask which of the labels stands in them.
fn labelled() -> String {
    let row = |n: usize| {
        let label = LABELS[n % 2];
        let words = ["the", "sand", "of"][n % 3];
        json!({ "prompt": format!("{words} {label} {n}:"), "completion": format!(" {label}") }).to_string() + "\n"
    };
    (0..40).map(row).collect()
}

/// A plan of two trained variants and a hard prompt, with `more` in the place of its other variants.
fn plan(more: &[Value]) -> Value {
    let mut variants = vec![
        json!({ "name": "LoRA r=4", "method": "lora", "adapter": { "r": 4, "lora_alpha": 8 } }),
        json!({ "name": "LoRA r=2", "method": "lora", "adapter": { "r": 2, "lora_alpha": 4 } }),
        json!({ "name": "hard prompt", "examples": 2 }),
    ];
    variants.extend_from_slice(more);
    json!({
        "model": golden(MODEL),
        "output_dir": "out",
        "data": { "train": "rows.jsonl", "eval_fraction": 0.3, "max_length": 128 },
        "training": { "max_steps": 12, "batch_size": 4, "learning_rate": 0.01, "save_steps": 2 },
        "variants": variants,
    })
}

fn folder(plan: &Value) -> Folder {
    let folder = Folder::with_run();
    folder.write("rows.jsonl", labelled());
    folder.write("plan.yaml", format!("{plan:#}"));
    folder
}

fn read(folder: &Folder, name: &str) -> Value {
    serde_json::from_slice(&folder.read(name)).unwrap()
}

/// The results without times and memory, which no two runs have in common.
fn lasting(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let passing = |key: &str| key.contains("seconds") || ["peak_rss_bytes", "sentences"].contains(&key);
            let kept = map.into_iter().filter(|(key, _)| !passing(key));
            Value::Object(kept.map(|(key, value)| (key, lasting(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(lasting).collect()),
        other => other,
    }
}

#[test]
fn a_comparison_leaves_a_table_numbers_and_a_page() {
    let folder = folder(&plan(&[json!({ "name": "broken", "adapter": { "target_modules": ["no_such_module"] } })]));
    let output = folder.succeeds(&["compare", "plan.yaml"]);
    let text = &output.stdout;
    for words in [
        "held-out loss",
        "against base",
        "accuracy",
        "trained",
        "\n   base",
        "LoRA r=4",
        "hard prompt",
        "! broken, seed 42, failed: ",
        "no_such_module",
        "report   out/report.html",
    ] {
        assert!(text.contains(words), "{words} is not in: {text}");
    }
    assert!(output.stderr.contains("held out: 12 rows of rows.jsonl that no run trains on"), "{}", output.stderr);
    assert!(output.stderr.contains("run 5 of 5: broken, seed 42"), "{}", output.stderr);

    let results = read(&folder, "out/results.json");
    let names: Vec<&str> =
        results["variants"].as_array().unwrap().iter().map(|of| of["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "LoRA r=4", "LoRA r=2", "hard prompt"]);
    assert_eq!(results["failed"][0]["name"], "broken");
    assert_eq!(results["data"]["labels"], json!(LABELS));
    let (base, lora) = (&results["variants"][0], &results["variants"][1]);
    // What was trained has learnt, and the interval says so.
    let against = &lora["loss_against_base"];
    let number = |value: &Value| value.as_f64().unwrap();
    let difference = number(&lora["loss"]) - number(&base["loss"]);
    assert!((number(&against["estimate"]) - difference).abs() < 1e-4, "{against} and {difference}");
    assert!(number(&against["high"]) < 0.0 && number(&against["low"]) < number(&against["estimate"]), "{against}");
    assert!(number(&against["detectable"]) > 0.0);
    assert_eq!(base["loss_against_base"], Value::Null);
    let flips = &lora["flips_against_base"];
    let count = |key: &str| flips[key].as_u64().unwrap();
    assert_eq!(count("better") + count("worse") + count("equal"), 12);
    assert_eq!(lora["runs"][0]["training"]["steps"], 12);
    assert!(lora["trainable_parameters"].as_u64() > results["variants"][2]["trainable_parameters"].as_u64());
    assert!(lora["peak_rss_bytes"].as_u64() > Some(1 << 20) && lora["bytes"].as_u64() > Some(0));
    // The loss is what eval says of the same adapter on the same rows.
    let of =
        ["--model", &golden(MODEL), "--adapter", "out/runs/lora-r-4-42/adapter", "--data", "out/data/held-out.jsonl"];
    let found = folder.succeeds(&joined(&[&["eval", "--json", "--max-length", "128"], &of])).json();
    assert_eq!(found["loss"], lora["loss"]);
    assert_eq!(found["by_likelihood"]["accuracy"], lora["accuracy"]);
    // No row is both.
    let rows = |name: &str| String::from_utf8(folder.read(name)).unwrap();
    let (train, held_out) = (rows("out/data/train.jsonl"), rows("out/data/held-out.jsonl"));
    assert_eq!((train.lines().count(), held_out.lines().count()), (28, 12));
    assert!(held_out.lines().all(|row| !train.contains(row)));

    let csv = rows("out/results.csv");
    assert_eq!(csv.lines().count(), 5);
    assert!(csv.lines().all(|line| line.split(',').count() == 18), "{csv}");
    // Neutral text is scored where weights are others, on the base, and nowhere else.
    for (name, is_scored) in [("base-42", true), ("lora-r-4-42", true), ("hard-prompt-42", false)] {
        assert_eq!(folder.path(&format!("out/predictions/neutral/{name}.jsonl")).exists(), is_scored, "{name}");
        assert_eq!(rows(&format!("out/predictions/{name}.jsonl")).lines().count(), 12);
    }
    assert!(!folder.path("out/runs/lora-r-4-42/checkpoints").exists(), "what nobody goes on with takes room");

    let page = rows("out/report.html");
    common::assert_page(&page);
    // Of each cost, the differences, the ranks, what was learnt, what was forgotten, memory and lengths of rows: all are drawn.
    assert_eq!(page.matches("<svg ").count(), 12);
    let neutral = |of: &Value| number(&of["neutral_loss"]);
    let forgotten = number(&lora["neutral_against_base"]["estimate"]);
    assert!((neutral(lora) - neutral(base) - forgotten).abs() < 1e-4, "{forgotten}");
    assert_eq!((&results["training_data"]["rows"], &base["neutral_against_base"]), (&json!(28), &Value::Null));
    assert!(lora["runs"][0]["training"]["memory"]["base"].as_u64() > Some(0));
    for words in ["What is forgotten", "Memory", "Rows trained on"] {
        assert!(page.contains(words), "{words} is not in the page");
    }
    for words in ["Which method for", "Rows that changed", "Ranks and target modules", "compare plan.yaml", "adapter.r"]
    {
        assert!(page.contains(words), "{words} is not in the page");
    }
    for sentence in results["answer"]["sentences"].as_array().unwrap() {
        let sentence = sentence.as_str().unwrap();
        let start = sentence.split(['\'', '"', '&']).next().unwrap();
        assert!(!start.is_empty() && page.contains(start), "{sentence}");
    }
}

#[test]
fn a_hostile_row_is_text_on_the_page() {
    let mut plan = plan(&[]);
    plan["data"] = json!({ "train": "train.jsonl", "eval": "hostile.csv", "max_length": 192, "columns": { "prompt": "question" } });
    plan["variants"] = json!([{ "name": "<b>LoRA</b>", "adapter": { "r": 4, "lora_alpha": 8 } }]);
    plan["generate"] = json!({ "max_new_tokens": 0 });
    let folder = folder(&plan);
    // No labels, so that rows are compared by their loss, which training changes.
    folder.write("train.jsonl", common::rows(0..30).replace("\"prompt\"", "\"question\""));
    folder.write("hostile.csv", "question,completion\n<script>alert(1)</script> & \"\"\"',the sand </div> of time\n");
    folder.succeeds(&["compare", "plan.yaml"]);
    let page = String::from_utf8(folder.read("out/report.html")).unwrap();
    common::assert_page(&page);
    assert!(page.contains("&lt;script&gt;alert(1)"), "the row is not shown");
    assert!(page.contains("the sand &lt;") && page.contains("&lt;b&gt;LoRA&lt;"), "answer and name are not shown");
    assert!(!page.contains("<script") && !page.contains("<b>LoRA"));
}

#[test]
fn started_again_it_repeats_no_finished_run_and_says_the_same() {
    let whole = folder(&plan(&[]));
    whole.succeeds(&["compare", "plan.yaml"]);
    let expected = lasting(read(&whole, "out/results.json"));

    let stopped = folder(&plan(&[]));
    kill_in_the_middle(&stopped, "out/runs/lora-r-2-42/metrics.jsonl");
    assert!(!stopped.path("out/results.json").exists());
    let record = stopped.read("out/runs/lora-r-4-42.result.json");
    let output = stopped.succeeds(&["compare", "plan.yaml"]);
    assert!(output.stderr.contains("going on with the comparison in out"), "{}", output.stderr);
    assert!(!output.stderr.contains("LoRA r=4, seed 42"), "a finished run was repeated: {}", output.stderr);
    assert_eq!(stopped.read("out/runs/lora-r-4-42.result.json"), record);
    assert_eq!(lasting(read(&stopped, "out/results.json")), expected);

    // Once more, and nothing is run at all.
    let results = stopped.read("out/results.json");
    let output = stopped.succeeds(&["compare", "plan.yaml"]);
    assert!(!output.stderr.contains("\nrun "), "{}", output.stderr);
    assert!(stopped.read("out/results.json") == results);

    // Another plan is another comparison.
    let other = ["compare", "plan.yaml", "--set", "training.max_steps=3"];
    stopped.refuses(&other, &["out holds another comparison: plan.variants", "--overwrite"]);
    stopped.succeeds(&joined(&[&other, &["--overwrite"]]));
    assert_eq!(read(&stopped, "out/results.json")["variants"][1]["runs"][0]["training"]["steps"], 3);
}

/// Ends a comparison by SIGKILL as soon as a file is there.
#[cfg(unix)]
fn kill_in_the_middle(folder: &Folder, file: &str) {
    let mut child = folder.command(&["compare", "plan.yaml"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    while std::fs::metadata(folder.path(file)).map_or(0, |file| file.len()) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_between_steps_and_says_how_to_go_on() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;

    let mut plan = plan(&[]);
    plan["training"]["max_steps"] = json!(100_000);
    let folder = folder(&plan);
    let mut child =
        folder.command(&["compare", "plan.yaml"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("LoRA r=4, seed 42") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before it could be interrupted");
    }
    while !folder.path("out/runs/lora-r-4-42/metrics.jsonl").exists() {
        std::thread::yield_now();
    }
    // SAFETY: kill has no conditions on memory, and the child has not been waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    assert!(rest.contains("Go on with:\n  retune --threads 1 compare plan.yaml"), "{rest}");
    let log = String::from_utf8(folder.read("out/runs/lora-r-4-42.log")).unwrap();
    assert!(log.contains("everything is saved"), "{log}");
}

#[test]
fn minutes_decide_the_steps() {
    let mut plan = plan(&[]);
    plan["variants"] = json!([{ "name": "LoRA", "adapter": { "r": 2 } }, { "name": "full", "method": "full" }]);
    let folder = folder(&plan);
    // Far more than it takes: the plan's own steps are the most.
    folder.succeeds(&["compare", "plan.yaml", "--minutes", "600"]);
    let results = read(&folder, "out/results.json");
    assert_eq!(results["decided"]["steps"], 12);
    assert_eq!(results["decided"]["timings"].as_array().unwrap().len(), 2);
    let full = &results["variants"][2];
    assert_eq!((&full["method"], &full["runs"][0]["training"]["steps"]), (&json!("full"), &json!(12)));
    assert!(full["loss_against_full"].is_null() && !results["variants"][1]["loss_against_full"].is_null());
    assert!(!folder.path("out/runs/lora-42-timing").exists());
    // Far less: one step each.
    let output = folder.succeeds(&["compare", "plan.yaml", "--minutes", "0.001", "--out", "short"]);
    assert!(output.stderr.contains("0.001 minutes are little: 1 steps for each run"), "{}", output.stderr);
    assert_eq!(read(&folder, "short/results.json")["decided"]["steps"], 1);
}

#[test]
fn a_model_and_a_file_are_enough() {
    let folder = folder(&plan(&[]));
    let model = golden(MODEL);
    let short = ["--set", "training.max_steps=2", "--set", "data.max_length=128", "--set", "training.batch_size=2"];
    let output = folder.succeeds(&joined(&[&["compare", "--json", "--model", &model, "--data", "rows.jsonl"], &short]));
    let results = output.json();
    assert_eq!(results, read(&folder, "runs/compare-rows/results.json"));
    assert_eq!(results["variants"].as_array().unwrap().len(), 8, "{}", output.stderr);
    assert_eq!(results["data"]["held_out_rows"], 8, "a fifth of the rows");
    assert!(results["failed"].as_array().unwrap().is_empty());
}

#[test]
fn what_is_wrong_with_a_plan_is_told_before_anything_is_run() {
    let folder = folder(&plan(&[]));
    let refuses = |set: &str, words: &[&str]| folder.refuses(&["compare", "plan.yaml", "--set", set], words);
    refuses("varaints=[]", &["unknown key varaints; did you mean variants?"]);
    refuses("training.learning_rat=1", &["unknown key training.learning_rat; did you mean training.learning_rate?"]);
    refuses("variants=[{name: a, adapter: {rank: 3}}]", &["variant \"a\": unknown key adapter.rank"]);
    refuses("data.train=no.jsonl", &["no.jsonl"]);
    refuses("output_dir=.", &["exists and is not empty, but holds no comparison"]);
    folder.write("one.jsonl", "{\"text\": \"the sand\"}\n");
    refuses("data={train: one.jsonl}", &["of 1 rows none can be held out; give data.eval"]);
    let nothing = folder.retune(&["compare"]);
    assert_eq!(nothing.code, Some(2), "{}", nothing.stderr);
    let schema = folder.succeeds(&["schema", "plan"]).json();
    assert!(schema["properties"]["variants"].is_object());
}
