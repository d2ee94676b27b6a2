//! `base.storage`, `--storage` and `quantize`: what is held quantized, what a run records of it, what is kept, and what is written.

mod common;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::{Folder, MODEL, NO_TOKENIZER, Output, golden, joined, run};
use serde_json::Value;

const TRAIN: [&str; 7] = ["train", "run.yaml", "--json", "--set", "training.max_steps=4", "--set", "base.compute=f32"];
const NF4: [&str; 2] = ["--set", "base.storage=nf4-double"];

fn loss(output: &Output, key: &str) -> f64 {
    output.json()[key].as_f64().unwrap()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-5 * b.abs()
}

#[test]
fn what_was_trained_on_a_quantized_base_is_used_on_it_again() {
    let folder = Folder::with_run();
    let report = folder.succeeds(&joined(&[&TRAIN, &NF4]));
    assert!(report.stderr.contains("14 linears held as nf4-double: 4."), "{}", report.stderr);
    assert_eq!(report.json()["storage"], "nf4-double");
    for record in ["out/run.json", "out/adapter/retune.json"] {
        let record: Value = serde_json::from_slice(&folder.read(record)).unwrap();
        let base = if record["base"].is_object() { &record["base"] } else { &record["run"]["base"] };
        assert_eq!(base["storage"], "nf4-double");
    }
    let card = String::from_utf8(folder.read("out/adapter/README.md")).unwrap();
    assert!(card.contains("held as nf4-double"), "{card}");
    let inspected = folder.succeeds(&["inspect", "out/adapter", "--json"]).json();
    assert_eq!(inspected["base_storage"], "nf4-double");

    let model = golden(MODEL);
    let on = ["--model", &model, "--adapter", "out/adapter"];
    let eval = ["eval", "--data", "eval.jsonl", "--json"];
    let trained = loss(&report, "held_out_loss_after");
    let same = folder.succeeds(&joined(&[&eval, &on]));
    assert!(same.stderr.contains("held as nf4-double, as when the adapter was trained"), "{}", same.stderr);
    assert!(close(loss(&same, "loss"), trained));
    let asked = folder.succeeds(&joined(&[&eval, &on, &["--storage", "nf4-double"]]));
    assert!(!asked.stderr.contains("as when") && loss(&asked, "loss") == loss(&same, "loss"));
    let other = loss(&folder.succeeds(&joined(&[&eval, &on, &["--storage", "as-is"]])), "loss");
    assert!(!close(other, trained), "{other}");

    // What is made of it keeps that, and is computed on that: also a direction, which depends on the base's weights.
    let dora = ["--set", "adapter.use_dora=true", "--set", "output_dir=dora"];
    let of_dora = loss(&folder.succeeds(&joined(&[&TRAIN, &NF4, &dora])), "held_out_loss_after");
    folder.succeeds(&["combine", "--adapter", "out/adapter=1", "--out", "combined"]);
    folder.succeeds(&[
        "convert",
        "dora/adapter",
        "--to",
        "lora",
        "--model",
        &model,
        "--out",
        "converted",
        "--energy",
        "1",
    ]);
    for (adapter, expected) in [("combined", trained), ("converted", of_dora)] {
        let made = loss(&folder.succeeds(&joined(&[&eval, &["--model", &model, "--adapter", adapter]])), "loss");
        assert!(close(made, expected), "{adapter}: {made}, expected {expected}");
    }
    let further = joined(&[
        &TRAIN,
        &["--set", "adapter=null", "--set", "adapter_init=out/adapter", "--set", "output_dir=further"],
    ]);
    let further = folder.succeeds(&further).stderr;
    assert!(further.contains("trained on a base held as \"nf4-double\""), "{further}");
    // Merged into what it was trained on it does what it did; into the base's own weights, what it does there.
    for (out, storage, expected) in [("merged", None, trained), ("merged-16", Some("as-is"), other)] {
        let asked: Vec<&str> = storage.iter().flat_map(|storage| ["--storage", storage]).collect();
        folder.succeeds(&joined(&[&["merge"], &on, &asked, &["--out", out]]));
        let merged = loss(&folder.succeeds(&joined(&[&eval, &["--model", out]])), "loss");
        assert!(close(merged, expected), "{out}: {merged}, expected {expected}");
    }
    folder.succeeds(&joined(&[&TRAIN, &["--set", "output_dir=plain"]]));
    let both = ["--adapter", "a=out/adapter", "--adapter", "b=plain/adapter", "--max-new-tokens", "2"];
    let several = folder.succeeds(&joined(&[&["generate", "hi", "--model", &model], &both]));
    assert!(several.stderr.contains("held in several ways"), "{}", several.stderr);
    for command in [&["generate", "hi", "--max-new-tokens", "2"][..], &["logits", "--tokens", "1,2", "--out", "logits"]]
    {
        let output = folder.succeeds(&joined(&[command, &on]));
        assert!(output.stderr.contains("held as nf4-double"), "{}", output.stderr);
    }
}

#[test]
fn a_run_that_is_resumed_keeps_its_storage() {
    let folder = Folder::with_run();
    let steps = ["--set", "training.save_steps=2"];
    let whole = folder.succeeds(&joined(&[&TRAIN, &NF4, &steps]));
    let adapter = folder.adapter();
    fs::remove_file(folder.path("out/checkpoints/step-00000004.safetensors")).unwrap();
    folder.refuses(&joined(&[&TRAIN, &steps, &["--resume"]]), &["base.storage was \"nf4-double\""]);
    let resumed = folder.succeeds(&joined(&[&TRAIN, &NF4, &steps, &["--resume"]]));
    assert!(resumed.stderr.contains("going on after step 2"), "{}", resumed.stderr);
    assert_eq!(loss(&resumed, "held_out_loss_after"), loss(&whole, "held_out_loss_after"));
    assert_eq!(folder.adapter(), adapter);
}

/// The program with a cache of its own in the folder.
fn cached(folder: &Folder, args: &[&str]) -> Command {
    let mut command = folder.command(args);
    command.env("RETUNE_CACHE", folder.path("cache"));
    command
}

fn kept(folder: &Folder) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder.path("cache/.quantized")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[test]
fn a_quantized_base_is_kept_until_it_or_the_base_changes() {
    let folder = Folder::with_run();
    folder.copy(NO_TOKENIZER, "model");
    let args = ["logits", "--model", "model", "--tokens", "1,2,3", "--out", "logits", "--storage", "nf4"];
    let logits = || {
        let output = run(cached(&folder, &args));
        assert_eq!(output.code, Some(0), "{}", output.stderr);
        folder.read("logits")
    };
    let first = logits();
    let files = kept(&folder);
    let [file] = &files[..] else { panic!("{files:?}") };
    let whole = fs::read(file).unwrap();
    let modified = || fs::metadata(file).unwrap().modified().unwrap();
    let made = modified();
    assert_eq!((logits(), modified()), (first.clone(), made), "mapped the second time");
    let spoilt: [&dyn Fn(); 3] = [
        &|| {
            let mut bytes = whole.clone();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x55;
            fs::write(file, bytes).unwrap();
        },
        &|| fs::write(file, &whole[..whole.len() / 2]).unwrap(),
        &|| fs::remove_file(file).unwrap(),
    ];
    for (way, spoil) in spoilt.iter().enumerate() {
        spoil();
        assert_eq!(logits(), first, "way {way}");
        assert_eq!(fs::read(file).unwrap(), whole, "way {way}");
    }
    // Another base in the place of the first.
    let mut weights = folder.read("model/model.safetensors");
    let end = weights.len();
    weights[end - 4..].copy_from_slice(&2.5f32.to_le_bytes());
    folder.write("model/model.safetensors", weights);
    let later = SystemTime::now() + Duration::from_secs(2);
    File::options().write(true).open(folder.path("model/model.safetensors")).unwrap().set_modified(later).unwrap();
    let changed = logits();
    let in_memory = folder.succeeds(&args);
    assert!(!in_memory.stderr.contains('!'));
    assert_eq!(folder.read("logits"), changed);
    assert_eq!(kept(&folder), files);
}

#[test]
fn a_cache_that_cannot_be_written_costs_time_only() {
    let folder = Folder::with_run();
    folder.write("file", "");
    let args = ["logits", "--model", &golden(NO_TOKENIZER), "--tokens", "1,2", "--storage", "fp4", "--out"];
    folder.succeeds(&joined(&[&args, &["with"]]));
    let mut command = folder.command(&joined(&[&args, &["without"]]));
    command.env("RETUNE_CACHE", folder.path("file"));
    let output = run(command);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    assert_eq!(folder.read("with"), folder.read("without"));
}

#[test]
fn a_quantized_model_is_the_base_as_it_is_held() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    for (to, bits) in [("nf4", 4.5), ("nf4-double", 4.1), ("fp4", 4.5)] {
        let report = folder.succeeds(&["quantize", &model, "--to", to, "--out", to, "--dtype", "f32", "--json"]).json();
        assert_eq!(report["linears"], 14);
        let found = report["bits_per_parameter"].as_f64().unwrap();
        // Tables and descriptions weigh something on so small a model.
        assert!(found > bits && found < bits + 4.0, "{to}: {found}");
        let logits = ["logits", "--tokens", "1,2,3,4,5", "--out"];
        folder.succeeds(&joined(&[&logits, &["held", "--model", &model, "--storage", to]]));
        folder.succeeds(&joined(&[&logits, &["written", "--model", to]]));
        assert_eq!(folder.read("held"), folder.read("written"), "{to}");
        let inspected = folder.succeeds(&["inspect", to, "--json"]).json();
        let storage = inspected["storage"].as_object().unwrap();
        assert!(storage.contains_key(&to[..3].to_uppercase()) && storage.contains_key("F32"), "{storage:?}");
    }
    let written = folder.succeeds(&["quantize", &model, "--to", "nf4", "--out", "again"]);
    assert!(
        written.stdout.contains("14 in nf4, ") && written.stdout.contains("bits a parameter"),
        "{}",
        written.stdout
    );
    folder.refuses(&["quantize", &model, "--to", "nf4", "--out", "again"], &["again is not empty"]);
    folder.refuses(&["quantize", "nf4", "--to", "fp4", "--out", "twice"], &["is stored as NF4 already"]);
}

#[test]
fn storages_that_cannot_be_are_refused() {
    let folder = Folder::with_run();
    let full = ["train", "run.yaml", "--set", "method=full", "--set", "adapter=null"];
    folder.refuses(&joined(&[&full, &NF4]), &["base.storage is a quantized one with method full; expected as-is"]);
    let bench = ["bench", "train", "--model", &golden(MODEL), "--method", "full", "--storage", "nf4"];
    folder.refuses(&bench, &["--storage quantizes a frozen base"]);
    let logits = ["logits", "--model", &golden("bnb_int8"), "--tokens", "1", "--out", "logits", "--storage", "nf4"];
    folder.refuses(&logits, &["cannot be held as nf4", "is stored as INT8 already"]);
}
