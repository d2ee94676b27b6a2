//! `retune report`: the page about a run that has ended, one that was stopped, and one that is at work.

mod common;

use std::fs::File;

use common::{Folder, assert_page, joined};
use serde_json::Value;

/// A run that is scored often.
const RUN: [&str; 4] = ["train", "run.yaml", "--set", "training.eval_steps=5"];

fn page(folder: &Folder) -> String {
    folder.succeeds(&["report", "out"]);
    let page = String::from_utf8(folder.read("out/report.html")).unwrap();
    assert_page(&page);
    page
}

/// The text that follows a heading of the list of figures.
fn figure<'a>(page: &'a str, name: &str) -> &'a str {
    let after = page.split(&format!("<dt>{name}</dt><dd>")).nth(1).unwrap_or_else(|| panic!("{name} is not in {page}"));
    after.split("</dd>").next().unwrap()
}

#[test]
fn a_finished_run_has_a_page_with_its_losses_memory_data_and_what_to_do_next() {
    let folder = Folder::with_run();
    folder.succeeds(&RUN);
    let page = page(&folder);
    assert!(page.contains("It is finished, after 30 steps."), "{page}");
    let record: Value = serde_json::from_slice(&folder.read("out/adapter/retune.json")).unwrap();
    let loss = |key: &str| format!("{:.4}", record[key].as_f64().unwrap());
    let (before, after) = (loss("held_out_loss_before"), loss("held_out_loss_after"));
    let best = format!("went from {before} to {after} at its best, after step {}", record["taken_from_step"]);
    assert!(page.contains(&best), "{best} is not in {page}");
    // Losses against steps, tokens and time, rate and gradient, memory, and the lengths of both files.
    assert_eq!(page.matches("<svg ").count(), 8);
    assert_eq!(figure(&page, "steps"), "30 of 2 rows");
    assert_eq!(figure(&page, "adapter.r"), "4");
    assert_eq!(figure(&page, "training.eval_steps"), "5");
    for words in
        ["Answers to held-out rows", "optimizer", "activations", "1 to ", "retune generate --model", "out&#x2f;adapter"]
    {
        assert!(page.contains(words), "{words} is not in {page}");
    }
    // What is as it is by default stands after what is not.
    assert!(page.find("training.weight_decay").unwrap() > page.find("As they are by default").unwrap());
    assert!(page.find("training.learning_rate").unwrap() < page.find("As they are by default").unwrap());
    // The run's folder stays one: it can be asked for again, and a new one takes the page away.
    folder.succeeds(&joined(&[&RUN, &["--resume"]]));
    folder.succeeds(&joined(&[&RUN, &["--overwrite", "--set", "training.max_steps=2"]]));
    assert!(!folder.path("out/report.html").exists(), "a page about another run was left");
}

#[test]
fn a_run_that_stopped_early_says_so_on_its_page() {
    let folder = Folder::with_run();
    let stops = ["--set", "training.early_stopping_patience=2", "--set", "training.early_stopping_threshold=50"];
    folder.succeeds(&joined(&[&RUN, &stops]));
    let page = page(&folder);
    assert!(
        page.contains("It stopped early at step 15 of 30 because none of the last 2 held-out scores was lower"),
        "{page}"
    );
}

#[test]
fn a_stopped_run_says_how_it_goes_on_and_one_at_work_how_long_it_takes() {
    let folder = Folder::with_run();
    folder.succeeds(&RUN);
    // As a kill leaves it in the middle of a line.
    let metrics = String::from_utf8(folder.read("out/metrics.jsonl")).unwrap();
    let until: Vec<&str> = metrics.split_inclusive('\n').take_while(|line| !line.contains("\"step\":18,")).collect();
    folder.write("out/metrics.jsonl", until.concat() + "{\"step\":18,\"lo");
    std::fs::remove_file(folder.path("out/result.json")).unwrap();
    for step in [27, 30] {
        std::fs::remove_file(folder.path(&format!("out/checkpoints/step-000000{step}.safetensors"))).unwrap();
    }
    let stopped = page(&folder);
    assert!(stopped.contains("It was stopped after step 17 of 30; no step is saved"), "{stopped}");
    assert!(
        stopped.contains("<pre>retune --threads 1 train run.yaml --set training.eval_steps=5 --resume\n</pre>"),
        "{stopped}"
    );

    let lock = File::open(folder.path("out")).unwrap();
    lock.lock().unwrap();
    let at_work = page(&folder);
    assert!(at_work.contains("It is at work, after step 17 of 30, about "), "{at_work}");
    drop(lock);

    // A run of which nothing has come yet, and of an earlier version, which wrote less.
    std::fs::remove_file(folder.path("out/metrics.jsonl")).unwrap();
    std::fs::remove_file(folder.path("out/figures.json")).unwrap();
    let nothing = page(&folder);
    assert!(
        nothing.contains("It was stopped after step 0; no step is saved") && !nothing.contains("<svg "),
        "{nothing}"
    );
}

#[test]
fn what_is_no_run_is_refused_and_a_hostile_one_is_text() {
    let folder = Folder::with_run();
    folder.refuses(&["report", "out"], &["out holds no run (run.json)", "output_dir"]);
    folder.succeeds(&joined(&[&RUN, &["--set", "training.max_steps=2"]]));
    let figures = String::from_utf8(folder.read("out/figures.json")).unwrap();
    folder.write("out/figures.json", figures.replace("train run.yaml", "<script>alert(1)</script>"));
    let page = page(&folder);
    assert!(page.contains("&lt;script&gt;alert(1)"), "{page}");
    folder.write("out/metrics.jsonl", "{\n{}\n");
    folder.refuses(&["report", "out"], &["out/metrics.jsonl is damaged"]);
    folder.write("out/run.json", "{");
    folder.refuses(&["report", "out"], &["run.json is damaged"]);
}
