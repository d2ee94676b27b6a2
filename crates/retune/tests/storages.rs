//! Every method over every storage of the base and in both arithmetics.

mod common;

use common::{Folder, METHODS, MODEL, golden, joined};
use serde_json::Value;

/// What the base is stored as: blocks of a GGUF file, f32 and bfloat16 in a directory; and f32 that is held in NF4.
const STORAGES: [&str; 4] = ["gguf", "f32", "bf16", "nf4"];

/// A folder with the base in each storage: the directories are written by merging an adapter that was trained for a step.
fn folder() -> Folder {
    let folder = Folder::with_run();
    folder.succeeds(&["train", "run.yaml", "--set", "training.max_steps=1", "--set", "output_dir=first"]);
    for dtype in ["f32", "bf16"] {
        let (model, out) = (golden(MODEL), ["--adapter", "first/adapter", "--dtype", dtype, "--out", dtype]);
        folder.succeeds(&joined(&[&["merge", "--model", &model], &out]));
    }
    folder
}

#[test]
fn every_method_learns_over_every_storage_in_f32_and_in_8_bits() {
    let folder = folder();
    let model = golden(MODEL);
    for method in METHODS {
        for storage in STORAGES {
            let (path, held): (_, &[&str]) = match storage {
                "gguf" => (model.as_str(), &[]),
                "nf4" => ("f32", &["--set", "base.storage=nf4-double"]),
                other => (other, &[]),
            };
            let model = format!("model={path}");
            for compute in ["base.compute=f32", "base.compute=int8"] {
                let run = ["train", "run.yaml", "--json", "--overwrite", "--set", &model, "--set", compute];
                let steps = ["--set", "training.max_steps=4", "--set", "training.eval_steps=100"];
                let report = folder.succeeds(&joined(&[&run, &steps, held, method])).json();
                let loss = |key: &str| report[key].as_f64().unwrap_or(f64::NAN);
                let (before, after) = (loss("held_out_loss_before"), loss("held_out_loss_after"));
                assert!(after < before, "{method:?}, {storage}, {compute}: {before} to {after}");
                let adapter = ["--model", path, "--adapter", "out/adapter", "--data", "eval.jsonl", "--json"];
                let scored: Value = folder.succeeds(&joined(&[&["eval"], &adapter])).json();
                let away = (scored["loss"].as_f64().unwrap() - after).abs();
                assert!(away < 1e-5 * after, "{method:?}, {storage}, {compute}: scored {scored}, trained to {after}");
            }
        }
    }
}
