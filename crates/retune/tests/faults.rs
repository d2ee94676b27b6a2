//! A disk that fills, a folder that cannot be written and a kill, at each step of writing: nothing half written under its final name, sources
//! as they were, and the same command again gives what an undisturbed one does.
//!
//! Of the longest commands only some of the steps are tried, unless `RETUNE_FAULTS=all`: a small file takes twelve faults, so that every fifth is
//! each kind of it, in another file.
//!
//! `RETUNE_FAULT` (see `retune_formats::fault`) makes a step fail, which only builds with debug assertions know.

#![cfg(debug_assertions)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{ADAPTER, Folder, MODEL, NO_TOKENIZER, Output, Tree, golden, joined, refused, rows, run};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// The exit code of a run that a fault has killed.
const KILLED: i32 = 137;

/// A step of writing, as the program tells it.
struct Step {
    number: usize,
    kind: String,
    path: String,
}

/// The steps that an undisturbed run takes.
fn steps(output: &Output) -> Vec<Step> {
    let lines = output.stderr.lines().filter_map(|line| line.strip_prefix("step ")?.split_once(" of writing: "));
    lines
        .map(|(number, what)| {
            let (kind, path) = what.split_once(' ').unwrap();
            Step { number: number.parse().unwrap(), kind: kind.to_owned(), path: path.to_owned() }
        })
        .collect()
}

/// The faults to try: every kind at every step, but of a file's many writes at the first and the last, and a refusal where a name is made.
fn faults(steps: &[Step]) -> Vec<String> {
    let mut faults = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        let is_same =
            |other: Option<&Step>| other.is_some_and(|other| (&other.kind, &other.path) == (&step.kind, &step.path));
        let (before, after) = (at.checked_sub(1).and_then(|at| steps.get(at)), steps.get(at + 1));
        if step.kind == "Write" && is_same(before) && is_same(after) {
            continue;
        }
        let kinds = if ["Create", "Rename"].contains(&&*step.kind) {
            &["full", "kill", "read-only"][..]
        } else {
            &["full", "kill"]
        };
        faults.extend(kinds.iter().map(|kind| format!("{kind}:{}", step.number)));
    }
    assert!(faults.len() > 4, "few steps: is the program built with debug assertions?");
    faults
}

/// A command that writes.
struct Writer<'a> {
    folder: &'a Folder,
    args: &'a [&'a str],
    /// What is added to the arguments when it is run again.
    again: &'a [&'a str],
    /// What it makes: files or folders in the folder.
    makes: &'a [&'a str],
    /// What of two runs' results has to be equal.
    lasting: fn(&Path, &[u8]) -> Vec<u8>,
    /// Every how manieth of the faults is tried; `RETUNE_FAULTS=all` tries all.
    every: usize,
}

fn as_it_is(_: &Path, bytes: &[u8]) -> Vec<u8> {
    bytes.to_owned()
}

impl Writer<'_> {
    fn run(&self, more: &[&str], fault: Option<&str>) -> Output {
        let mut command = self.folder.command(&joined(&[self.args, more]));
        command.env("RETUNE_CACHE", self.folder.path("cache"));
        if let Some(fault) = fault {
            command.env("RETUNE_FAULT", fault);
        }
        run(command)
    }

    fn is_made(&self, path: &Path) -> bool {
        self.makes.iter().any(|made| path.starts_with(made))
    }

    /// What is there that the command makes, and what else.
    fn trees(&self) -> (Tree, Tree) {
        self.folder.tree("").into_iter().partition(|(path, _)| self.is_made(path))
    }

    fn clear(&self) {
        for made in self.makes.iter().map(|made| self.folder.path(made)) {
            let _ = if made.is_dir() { fs::remove_dir_all(&made) } else { fs::remove_file(&made) };
        }
    }

    fn lasting(&self, tree: &Tree) -> Tree {
        let lasting = |path: &PathBuf, bytes: &Option<Vec<u8>>| bytes.as_ref().map(|bytes| (self.lasting)(path, bytes));
        tree.iter().map(|(path, bytes)| (path.clone(), lasting(path, bytes))).collect()
    }

    /// Tries every fault, each from the start.
    fn withstands_faults(&self) {
        // Once before, so that what is kept for the next time, in the cache, is there each time or never.
        self.clear();
        self.run(&[], None);
        self.clear();
        let output = self.run(&[], Some("none"));
        assert_eq!(output.code, Some(0), "{:?}: {}", self.args, output.stderr);
        let (made, before) = self.trees();
        let expected = self.lasting(&made);
        let every = if std::env::var("RETUNE_FAULTS").is_ok_and(|which| which == "all") { 1 } else { self.every };
        for fault in faults(&steps(&output)).into_iter().step_by(every) {
            let what = format!("{:?} with {fault}", self.args);
            self.clear();
            let output = self.run(&[], Some(&fault));
            let killed = fault.starts_with("kill");
            match output.code {
                Some(KILLED) if killed => {}
                // What is kept for the next time alone may fail without harm.
                Some(0) => assert!(output.stderr.contains("fault at step"), "{what}: {}", output.stderr),
                _ => refused(&what, &output, &["error: ", "cannot "]),
            }
            let (made, others) = self.trees();
            let is_temporary =
                |path: &Path| path.components().any(|part| is_temporary(&part.as_os_str().to_string_lossy()));
            for (path, bytes) in made.iter().filter(|(path, _)| !is_temporary(path)) {
                if let Some(bytes) = bytes {
                    assert_whole(&what, path, bytes);
                }
            }
            for (path, bytes) in &before {
                assert!(others.get(path) == Some(bytes), "{what}: {} has changed", path.display());
            }
            let litter: Vec<_> = made.keys().chain(others.keys()).filter(|path| is_temporary(path)).collect();
            // The runs of a comparison are ended with it.
            let is_ended =
                litter.iter().all(|path| ["out/runs", "out/predictions"].iter().any(|of| path.starts_with(of)));
            assert!(killed || is_ended, "{what} leaves {litter:?}");
            let strange = others.keys().find(|path| !before.contains_key(*path) && !is_temporary(path));
            assert_eq!(strange, None, "{what}");

            // The last step may fail, or be cut off, when the result has its name.
            if self.again.is_empty() && self.lasting(&made) == expected {
                continue;
            }
            let output = self.run(self.again, None);
            assert_eq!(output.code, Some(0), "{what}, again: {}", output.stderr);
            let (made, others) = self.trees();
            let found = self.lasting(&made);
            for path in found.keys().chain(expected.keys()) {
                assert!(found.get(path) == expected.get(path), "{what}, again: {} differs", path.display());
            }
            assert!(others == before, "{what}, again: {:?}", others.keys().collect::<Vec<_>>());
        }
    }
}

fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && (name.ends_with(".tmp") || name.ends_with(".partial"))
}

/// Asserts that a file can be read as what its name says it is.
fn assert_whole(what: &str, path: &Path, bytes: &[u8]) {
    let name = path.file_name().unwrap().to_string_lossy();
    let whole = match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("safetensors") => SafeTensors::deserialize(bytes).is_ok(),
        Some("json") => serde_json::from_slice::<Value>(bytes).is_ok(),
        // Lines are added one by one: the last may be half.
        Some("jsonl") if name == "metrics.jsonl" => {
            let lines: Vec<&[u8]> =
                bytes.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")).collect();
            lines.iter().all(|line| serde_json::from_slice::<Value>(line).is_ok())
        }
        Some("jsonl") => bytes
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .all(|line| serde_json::from_slice::<Value>(line).is_ok()),
        Some("gguf") => bytes.starts_with(b"GGUF") && bytes.len().is_multiple_of(32),
        Some("html") => bytes.ends_with(b"</html>\n") || bytes.ends_with(b"</html>"),
        _ => true,
    };
    assert!(whole, "{what}: {} is half written", path.display());
}

fn withstands_faults(folder: &Folder, args: &[&str], makes: &str) {
    Writer { folder, args, again: &[], makes: &[makes], lasting: as_it_is, every: 1 }.withstands_faults();
}

/// A folder with a copy of a model and of an adapter for it.
fn with_adapter() -> Folder {
    let folder = Folder::with_run();
    folder.copy(NO_TOKENIZER, "base");
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": [["a", "b"]],
        },
    });
    folder.write("base/tokenizer.json", tokenizer.to_string());
    folder.copy(ADAPTER, "adapter");
    folder
}

const ON: [&str; 4] = ["--model", "base", "--adapter", "adapter"];

#[test]
fn merged_models() {
    let folder = with_adapter();
    withstands_faults(&folder, &joined(&[&["merge"], &ON, &["--out", "merged"]]), "merged");
    withstands_faults(&folder, &["quantize", "base", "--to", "nf4-double", "--out", "nf4"], "nf4");
}

#[test]
fn merged_gguf_files() {
    let folder = Folder::with_run();
    folder.succeeds(&["train", "run.yaml", "--set", "training.max_steps=1"]);
    let model = golden(MODEL);
    let on = ["--model", &model, "--adapter", "out/adapter"];
    withstands_faults(&folder, &joined(&[&["merge"], &on, &["--out", "merged.gguf", "--type", "f16"]]), "merged.gguf");
    withstands_faults(
        &folder,
        &joined(&[&["export", "--for", "ollama"], &on, &["--type", "q8_0", "--out", "ollama"]]),
        "ollama",
    );
    let lora = ["export", "--for", "llama.cpp", "--adapter-only"];
    withstands_faults(&folder, &joined(&[&lora, &on, &["--out", "lora.gguf"]]), "lora.gguf");
}

#[test]
fn adapters_for_other_programs() {
    let folder = with_adapter();
    for program in ["peft", "vllm", "mistral.rs", "mlx"] {
        withstands_faults(&folder, &joined(&[&["export", "--for", program], &ON, &["--out", "made"]]), "made");
        fs::remove_dir_all(folder.path("made")).unwrap();
    }
}

#[test]
fn adapters_made_of_adapters() {
    let folder = with_adapter();
    withstands_faults(&folder, &["combine", "--adapter", "adapter=0.5", "--out", "half"], "half");
    withstands_faults(&folder, &["convert", "adapter", "--to", "lora", "--rank", "2", "--out", "small"], "small");
}

#[test]
fn files_of_numbers_and_answers() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    withstands_faults(
        &folder,
        &["logits", "--model", &model, "--tokens", "1,2,3", "--out", "logits.safetensors"],
        "logits.safetensors",
    );
    let eval = ["eval", "--model", &model, "--data", "eval.jsonl", "--max-length", "192", "--predictions", "p.jsonl"];
    withstands_faults(&folder, &eval, "p.jsonl");
    // The quantized base is kept in the cache.
    let quantized = joined(&[&eval, &["--storage", "nf4"]]);
    Writer {
        folder: &folder,
        args: &quantized,
        again: &[],
        makes: &["p.jsonl", "cache"],
        // A stamp says when files were changed.
        lasting: |path, bytes| if path.to_string_lossy().contains("stamps") { Vec::new() } else { bytes.to_owned() },
        every: 1,
    }
    .withstands_faults();
}

/// A value without times and memory, and without the size of a folder whose card says them.
fn lasting(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let passing = |key: &str| key.contains("second") || ["bytes", "peak_rss_bytes", "sentences"].contains(&key);
            let kept = map.into_iter().filter(|(key, _)| !passing(key));
            Value::Object(kept.map(|(key, value)| (key, lasting(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(lasting).collect()),
        other => other,
    }
}

/// What of a run's folder is the same each time: not how long it took.
fn lasting_of_run(path: &Path, bytes: &[u8]) -> Vec<u8> {
    match path.file_name().unwrap().to_str().unwrap() {
        "README.md" => Vec::new(),
        "metrics.jsonl" => {
            let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            let lines = lines.map(|line| format!("{}\n", lasting(serde_json::from_slice(line).unwrap())));
            lines.collect::<String>().into_bytes()
        }
        "result.json" => lasting(serde_json::from_slice(bytes).unwrap()).to_string().into_bytes(),
        _ => bytes.to_owned(),
    }
}

#[test]
fn training_runs() {
    // A checkpoint after each step, the second at the boundary of the epochs and the fourth at the end.
    let four_steps = ["--set", "training.epochs=2", "--set", "training.save_steps=1", "--set", "training.eval_steps=2"];
    for method in [&[][..], &["--set", "method=full", "--set", "adapter=null"]] {
        let folder = Folder::with_run();
        folder.write("train.jsonl", rows(0..4));
        folder.write("eval.jsonl", rows(100..101));
        Writer {
            folder: &folder,
            args: &joined(&[&["train", "run.yaml"], &four_steps, method]),
            again: &["--resume"],
            makes: &["out"],
            lasting: lasting_of_run,
            every: 5,
        }
        .withstands_faults();
    }
}

/// What of a comparison's folder is the same each time: not how long it took, nor what depends on that, nor what its runs said.
fn lasting_of_comparison(path: &Path, bytes: &[u8]) -> Vec<u8> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => lasting(serde_json::from_slice(bytes).unwrap()).to_string().into_bytes(),
        Some("jsonl") if path.ends_with("metrics.jsonl") => lasting_of_run(path, bytes),
        Some("log" | "html" | "csv" | "md") => Vec::new(),
        _ => bytes.to_owned(),
    }
}

#[test]
fn comparisons() {
    let folder = Folder::with_run();
    folder.write("rows.jsonl", rows(0..8));
    let plan = json!({
        "model": golden(MODEL), "output_dir": "out",
        "data": { "train": "rows.jsonl", "eval_fraction": 0.3, "max_length": 192 },
        "training": { "max_steps": 1, "batch_size": 2 },
        "generate": { "max_new_tokens": 0 },
        "variants": [{ "name": "LoRA", "adapter": { "r": 2 } }],
    });
    folder.write("plan.yaml", plan.to_string());
    Writer {
        folder: &folder,
        args: &["compare", "plan.yaml"],
        again: &[],
        makes: &["out"],
        lasting: lasting_of_comparison,
        every: 11,
    }
    .withstands_faults();
}
