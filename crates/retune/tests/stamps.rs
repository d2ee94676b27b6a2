//! Weights that were looked through once are not looked through again until their files change.

mod common;

use std::fs::File;
use std::time::{Duration, SystemTime};

use common::{Folder, MODEL, NO_TOKENIZER, golden, joined};

const WEIGHTS: &str = "model/model.safetensors";

/// Puts a NaN in the place of the last weight, and gives the file a time of change.
fn spoil(folder: &Folder, time: SystemTime) {
    let mut weights = folder.read(WEIGHTS);
    let end = weights.len();
    weights[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    folder.write(WEIGHTS, weights);
    touch(folder, time);
}

fn touch(folder: &Folder, time: SystemTime) {
    File::options().write(true).open(folder.path(WEIGHTS)).unwrap().set_modified(time).unwrap();
}

#[test]
fn weights_are_looked_through_once_until_they_change() {
    let folder = Folder::with_run();
    folder.copy(NO_TOKENIZER, "model");
    let now = SystemTime::now();
    let logits = ["logits", "--model", "model", "--tokens", "1,2", "--out", "logits.safetensors"];
    touch(&folder, now);
    folder.succeeds(&logits);
    spoil(&folder, now);
    folder.succeeds(&logits);
    touch(&folder, now + Duration::from_secs(1));
    folder.refuses(&logits, &["holds NaN"]);
    // What was refused is not taken for looked through.
    folder.refuses(&logits, &["holds NaN"]);
}

#[test]
fn a_cache_that_cannot_be_written_is_no_error() {
    let folder = Folder::with_run();
    folder.write("file", "");
    let mut command = folder.command(&["generate", "--model", &golden(MODEL), "--max-new-tokens", "1", "hi"]);
    command.env("RETUNE_CACHE", folder.path("file"));
    let output = common::run(command);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
}

#[test]
fn an_adapters_base_is_known_by_its_hash_after_a_change_too() {
    let folder = Folder::with_run();
    folder.write("base.gguf", std::fs::read(golden(MODEL)).unwrap());
    folder.succeeds(&["train", "run.yaml", "--set", "training.max_steps=1", "--set", "model=base.gguf"]);
    let eval = ["eval", "--data", "eval.jsonl", "--adapter", "out/adapter", "--model", "base.gguf"];
    let says = |what: &str| folder.succeeds(&joined(&[&eval])).stderr.contains(what);
    assert!(!says("other weights") && !says("other weights"));
    let mut model = folder.read("base.gguf");
    // The last byte is of a weight's mantissa or of its padding, and the header stays as it is.
    let at = model.len() - 64;
    model[at] ^= 1;
    folder.write("base.gguf", model);
    assert!(says("trained on other weights"));
}
