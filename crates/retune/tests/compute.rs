//! `base.compute` and `--compute`: what is computed in int8, what a run records of it, and that a resumed run keeps to that record.

mod common;

use std::fs;
use std::path::Path;

use common::{Folder, MODEL, golden, joined, run, with_header};
use retune_kernels::isa::{int8_isa, isa};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Four steps of which the second and the fourth are saved.
const TRAIN: [&str; 6] = ["train", "run.yaml", "--set", "training.max_steps=4", "--set", "training.save_steps=2"];
const INT8: [&str; 2] = ["--set", "base.compute=int8"];
const CALIBRATION: &str = "out/calibration.safetensors";
const LAST_CHECKPOINT: &str = "out/checkpoints/step-00000004.safetensors";
/// Linears of the tiny model, the head among them.
const LINEARS: usize = 15;
const LINEAR: &str = "model.layers.0.mlp.down_proj";

/// What is said of how a run computes, when the linears in `f32` are not in int8.
fn summary(f32: &[&str]) -> Value {
    json!({ "arithmetic": "int8", "int8_linears": LINEARS - f32.len(), "f32_for_their_error": f32 })
}

fn all_f32() -> Value {
    json!({ "arithmetic": "f32", "int8_linears": 0, "f32_for_their_error": [] })
}

/// What the adapter's own record says of it.
fn recorded(folder: &Folder) -> Value {
    let record: Value = serde_json::from_slice(&folder.read("out/adapter/retune.json")).unwrap();
    record["compute"].clone()
}

/// A finished run in int8 that has lost its last checkpoint, as if it had been killed before the last step; and its adapter.
fn unfinished() -> (Folder, common::Tree) {
    let folder = Folder::with_run();
    folder.succeeds(&joined(&[&TRAIN, &INT8]));
    let adapter = folder.adapter();
    fs::remove_file(folder.path(LAST_CHECKPOINT)).unwrap();
    (folder, adapter)
}

/// Goes on with that run; returns what it says.
fn resumed(folder: &Folder) -> String {
    let stderr = folder.succeeds(&joined(&[&TRAIN, &INT8, &["--resume"]])).stderr;
    assert!(stderr.contains("going on after step 2"), "{stderr}");
    stderr
}

/// A calibration file with what it says of the linears changed.
fn with_choices(file: &[u8], change: impl FnOnce(&mut Vec<Value>)) -> Vec<u8> {
    with_header(file, |header| {
        let text = &mut header["__metadata__"]["choices"];
        let mut choices: Vec<Value> = serde_json::from_str(text.as_str().unwrap()).unwrap();
        change(&mut choices);
        *text = json!(json!(choices).to_string());
    })
}

fn find<'a>(choices: &'a mut [Value], linear: &str) -> &'a mut Value {
    choices.iter_mut().find(|choice| choice["name"] == linear).unwrap()
}

#[test]
fn a_run_says_and_records_how_it_computes() {
    let folder = Folder::with_run();
    let output = folder.succeeds(&joined(&[&TRAIN, &INT8, &["--json"]]));
    assert!(output.stderr.contains("compute  int8 ("), "{}", output.stderr);
    assert!(output.stderr.contains("in 15 of 15 linears"), "{}", output.stderr);
    assert!(output.stderr.contains("largest relative error of an input gradient"), "{}", output.stderr);
    assert_eq!((&output.json()["compute"], recorded(&folder)), (&summary(&[]), summary(&[])));
    with_choices(&folder.read(CALIBRATION), |choices| {
        assert_eq!(choices.len(), LINEARS);
        assert!(choices.iter().all(|choice| choice["int8"] == true && choice["forward_error"].as_f64() > Some(0.0)));
    });

    let output = folder.succeeds(&joined(&[&TRAIN, &["--set", "base.compute=f32", "--json", "--overwrite"]]));
    assert!(output.stderr.contains("compute  f32\n"), "{}", output.stderr);
    assert_eq!((&output.json()["compute"], recorded(&folder)), (&all_f32(), all_f32()));
}

#[test]
fn auto_is_int8_where_the_machine_is_fast_at_it() {
    let folder = Folder::with_run();
    let compute_on = |isa: Option<&str>| {
        let mut command = folder.command(&joined(&[&TRAIN, &["--json", "--overwrite"]]));
        command.envs(isa.map(|isa| ("RETUNE_ISA", isa)));
        run(command).json()["compute"].clone()
    };
    assert_eq!(compute_on(None)["arithmetic"], if int8_isa().is_fast() { "int8" } else { "f32" });
    assert_eq!(compute_on(Some("portable")), all_f32());
}

#[test]
fn a_resumed_run_in_int8_gives_the_same_bytes() {
    let (folder, adapter) = unfinished();
    let calibration = folder.read(CALIBRATION);
    resumed(&folder);
    assert!(folder.adapter() == adapter);
    assert!(folder.read(CALIBRATION) == calibration);
}

#[test]
fn without_a_copy_in_int8_the_results_are_the_same_and_a_run_goes_on_with_or_without() {
    let (folder, adapter) = unfinished();
    let stderr = folder.succeeds(&joined(&[&TRAIN, &INT8, &["--resume", "--set", "base.int8_copy=never"]])).stderr;
    assert!(stderr.contains("made again in every product (base.int8_copy: never)"), "{stderr}");
    assert!(stderr.contains("going on after step"), "{stderr}");
    assert!(folder.adapter() == adapter);
    let settings = ["--overwrite", "--set", "base.int8_copy=never"];
    folder.succeeds(&joined(&[&TRAIN, &INT8, &settings]));
    assert!(folder.adapter() == adapter);
}

#[test]
fn a_resumed_run_computes_as_its_file_says() {
    let (folder, adapter) = unfinished();
    let changed = with_choices(&folder.read(CALIBRATION), |choices| find(choices, LINEAR)["int8"] = json!(false));
    folder.write(CALIBRATION, &changed);
    let stderr = resumed(&folder);
    assert!(stderr.contains("in 14 of 15 linears") && stderr.contains(LINEAR), "{stderr}");
    assert_eq!(recorded(&folder), summary(&[LINEAR]));
    let weights = Path::new("adapter_model.safetensors");
    assert!(folder.adapter().get(weights) != adapter.get(weights), "it computed as before");
    assert!(folder.read(CALIBRATION) == changed, "the file was written anew");
}

#[test]
fn a_run_with_checkpoints_does_not_go_on_without_what_says_how_it_computes() {
    let (folder, adapter) = unfinished();
    for file in [CALIBRATION, "out/passes.json"] {
        let content = folder.read(file);
        fs::remove_file(folder.path(file)).unwrap();
        folder.refuses(&joined(&[&TRAIN, &INT8, &["--resume"]]), &[file, "is missing", "--overwrite"]);
        folder.write(file, content);
    }
    resumed(&folder);
    assert!(folder.adapter() == adapter);
}

#[test]
fn a_run_does_not_go_on_in_other_pieces_or_with_other_instructions() {
    let (folder, adapter) = unfinished();
    let args = joined(&[&TRAIN, &INT8, &["--resume"]]);
    let whole = folder.read("out/passes.json");
    let changed = |key: &str, value: Value| {
        let mut passes: Value = serde_json::from_slice(&whole).unwrap();
        assert_ne!(passes[key], value);
        passes[key] = value;
        passes.to_string().into_bytes()
    };
    for passes in
        [changed("keep", json!("nothing")), changed("keep", json!("activations")), changed("tokens", json!(100))]
    {
        folder.write("out/passes.json", passes);
        folder.refuses(&args, &["passes.json says", "this run computes with", "--overwrite"]);
    }
    folder.write("out/passes.json", &whole[..whole.len() / 2]);
    folder.refuses(&args, &["passes.json is damaged", "--overwrite"]);
    folder.write("out/passes.json", &whole);

    let here = isa().to_string();
    if here != "portable" {
        let mut command = folder.command(&args);
        command.env("RETUNE_ISA", "portable");
        let output = run(command);
        assert_eq!(output.code, Some(1), "{}", output.stderr);
        let words = format!("it computed with \"{here}\", now it would with \"portable\"");
        assert!(output.stderr.contains(&words), "{}", output.stderr);
    }
    resumed(&folder);
    assert!(folder.adapter() == adapter);
}

#[test]
fn a_run_started_anew_measures_anew() {
    let (folder, _) = unfinished();
    let changed = with_choices(&folder.read(CALIBRATION), |choices| find(choices, LINEAR)["int8"] = json!(false));
    folder.write(CALIBRATION, changed);
    folder.succeeds(&joined(&[&TRAIN, &INT8, &["--overwrite"]]));
    assert_eq!(recorded(&folder), summary(&[]));
}

#[test]
fn a_damaged_calibration_is_refused_with_what_to_do() {
    let (folder, adapter) = unfinished();
    let whole = folder.read(CALIBRATION);
    let args = joined(&[&TRAIN, &INT8, &["--resume"]]);
    let refuses = |bytes: &[u8], words: &[&str]| {
        folder.write(CALIBRATION, bytes);
        folder.refuses(&args, &joined(&[words, &["restore it, or start anew with --overwrite"]]));
    };
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        refuses(&whole[..length], &[CALIBRATION, "damaged"]);
    }
    refuses(b"{}", &[CALIBRATION, "damaged"]);
    refuses(&folder.read("out/adapter/adapter_model.safetensors"), &[CALIBRATION, "it has no choices"]);
    let stranger = |choices: &mut Vec<Value>| {
        let mut choice = find(choices, LINEAR).clone();
        choice["name"] = json!("model.layers.9.mlp.down_proj");
        choice["exponent"] = json!(0.0);
        choices.push(choice);
    };
    refuses(&with_choices(&whole, stranger), &["1 of its linears are not in the model"]);
    let f32 = Folder::with_run();
    f32.succeeds(&joined(&[&TRAIN, &["--set", "base.compute=f32"]]));
    folder.write(CALIBRATION, f32.read(CALIBRATION));
    folder.refuses(&args, &[CALIBRATION, "is of a run in f32", "start anew with --overwrite"]);
    let unsmoothed = with_choices(&whole, |choices| find(choices, LINEAR)["exponent"] = json!(0.0));
    refuses(&unsmoothed, &[CALIBRATION, "damaged", "are said to have some"]);
    folder.write(CALIBRATION, whole);
    resumed(&folder);
    assert!(folder.adapter() == adapter);
}

#[test]
fn held_out_rows_are_scored_in_f32_whatever_the_run_computes_in() {
    let folder = Folder::with_run();
    let scores = |compute: &str| {
        let result = folder.succeeds(&joined(&[&TRAIN, &["--set", compute, "--json", "--overwrite"]])).json();
        ["before", "last"].map(|when| result[format!("held_out_loss_{when}")].as_f64().unwrap())
    };
    let model = golden(MODEL);
    let eval = |compute: &str| {
        let adapter = ["--adapter", "out/adapter", "--data", "eval.jsonl", "--max-length", "192"];
        let args = joined(&[&["eval", "--model", &model, "--json", "--compute", compute], &adapter]);
        folder.succeeds(&args).json()["loss"].as_f64().unwrap()
    };
    let difference = |a: f64, b: f64| (a - b).abs() / b;
    let [untrained, _] = scores("base.compute=f32");
    let [before, after] = scores("base.compute=int8");
    // Rounding of sums that are taken over other passes is all that may differ.
    assert!(difference(before, untrained) < 1e-6, "{before} in a run in int8, {untrained} in one in f32");
    assert!(difference(after, eval("f32")) < 1e-6, "{after} in training, {} in f32 after it", eval("f32"));
    assert!(difference(after, eval("int8")) > 1e-5, "eval in int8 is in f32");
}

#[test]
fn weights_that_are_trained_are_not_computed_in_int8() {
    let folder = Folder::with_run();
    let mut run: Value = serde_json::from_slice(&folder.read("run.yaml")).unwrap();
    run["method"] = json!("full");
    run["adapter"] = Value::Null;
    folder.write("run.yaml", format!("{run:#}"));
    let words = ["base.compute is int8 with method full", "f32 or auto", "frozen base of an adapter"];
    folder.refuses(&joined(&[&TRAIN, &INT8]), &words);
    let summary = folder.succeeds(&joined(&[&TRAIN, &["--json"]])).json();
    assert_eq!(summary["compute"], all_f32(), "with auto");
}

#[test]
fn eval_in_int8_is_close_to_eval_in_f32() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let eval = |compute: &str| {
        let args = ["eval", "--model", &model, "--data", "eval.jsonl", "--json", "--compute", compute];
        let found = folder.succeeds(&args).json();
        (found["loss"].as_f64().unwrap(), found["compute"].clone())
    };
    let (exact, (loss, compute)) = (eval("f32"), eval("int8"));
    assert_eq!((exact.1, compute), (all_f32(), summary(&[])));
    let error = (loss - exact.0).abs() / exact.0;
    assert!(error > 0.0 && error < 0.01, "{loss} and {}", exact.0);
}

#[test]
fn logits_in_int8_are_close_to_those_in_f32() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let logits = |compute: &str| -> Vec<f32> {
        // "the sand of time sing", as the tiny model's tokenizer has it.
        let tokens = ["--tokens", "86,259,286,67,267,278,260,75,79,71", "--out", "l.safetensors"];
        folder.succeeds(&joined(&[&["logits", "--model", &model, "--compute", compute], &tokens]));
        let bytes = folder.read("l.safetensors");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let values = file.tensor("logits").unwrap().data().as_chunks::<4>().0;
        values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    let (exact, ours) = (logits("f32"), logits("int8"));
    let difference: f64 = ours.iter().zip(&exact).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let norm: f64 = exact.iter().map(|b| f64::from(*b).powi(2)).sum();
    let error = (difference / norm).sqrt();
    // Steps of 7 bits are twice those of 8.
    let step = f64::from(127.0 / int8_isa().largest());
    assert!(error > 1e-3 && error < 0.05 * step, "{error}");
}

#[test]
fn bench_reports_how_it_computed() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let bench = |more: &[&str]| {
        let sizes = ["--data", "train.jsonl", "--steps", "4", "--seq", "32", "--batch", "1", "--json"];
        folder.succeeds(&joined(&[&["bench", "train", "--model", &model], &sizes, more])).json()
    };
    assert_eq!(bench(&["--compute", "int8"])["compute"], summary(&[]));
    assert_eq!(bench(&["--compute", "f32"])["compute"], all_f32());
    assert_eq!(bench(&["--compute", "int8", "--method", "full"])["compute"], all_f32());
}
