//! Every command on a tiny model: what it prints and writes, and that the commands agree with each other.

mod common;

use std::fs;

use common::{ADAPTER, Folder, MODEL, NO_TOKENIZER, STEPS, golden, joined};
use retune_formats::gguf::Gguf;
use retune_quant::SharedBytes;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

const SHORT: [&str; 6] =
    ["--set", "training.max_steps=4", "--set", "training.eval_steps=2", "--set", "training.save_steps=2"];

fn short_run(folder: &Folder, more: &[&str]) {
    folder.succeeds(&joined(&[&["train", "run.yaml"], &SHORT, more]));
}

fn names(bytes: &[u8]) -> Vec<String> {
    let mut names: Vec<_> = SafeTensors::deserialize(bytes).unwrap().names().into_iter().map(String::from).collect();
    names.sort();
    names
}

fn f32s(bytes: &[u8], name: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32);
    tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn i64s(bytes: &[u8], name: &str) -> Vec<i64> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::I64);
    tensor.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
}

/// The held-out loss that `retune eval` finds.
fn loss(folder: &Folder, args: &[&str]) -> f64 {
    let found = folder.succeeds(&joined(&[&["eval", "--data", "eval.jsonl", "--json"], args])).json();
    assert_eq!(found["rows"], 4);
    found["loss"].as_f64().unwrap()
}

#[test]
fn tokenize_gives_the_ids_that_transformers_gives() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let tokens = fs::read_to_string(golden("gguf_llama/tokens.jsonl")).unwrap();
    let mut texts = 0;
    for line in tokens.lines() {
        let expected: Value = serde_json::from_str(line).unwrap();
        let text = expected["text"].as_str().unwrap();
        if text.contains('\0') {
            continue; // which no argument can hold
        }
        let found = folder.succeeds(&["tokenize", "--model", &model, "--no-special-tokens", "--json", text]).json();
        assert_eq!(found["ids"], expected["ids"], "{text:?}");
        texts += 1;
    }
    assert!(texts > 2);
    let plain = folder.succeeds(&["tokenize", "--model", &model, "the sand of time"]);
    assert_eq!(plain.stdout, "86,259,286,67,267,278,260,75,79,71\n");
    let chat = folder.succeeds(&["tokenize", "--model", &model, "--chat", "--json", "the sand"]).json();
    let pieces: Vec<_> = chat["tokens"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(pieces[0], "<|im_start|>");
    assert_eq!(pieces.iter().filter(|piece| **piece == "<|im_start|>").count(), 2, "the answer's turn is open");
    assert_eq!(pieces.iter().filter(|piece| **piece == "<|im_end|>").count(), 1);

    let both = folder.retune(&["tokenize", "--model", &model, "--chat", "--no-special-tokens", "the sand"]);
    assert_eq!(both.code, Some(2), "{}", both.stderr);
    assert!(both.stderr.contains("cannot be used with"), "{}", both.stderr);
}

#[test]
fn logits_are_those_of_transformers() {
    let folder = Folder::with_run();
    let golden_file = fs::read(golden("gguf_llama/golden.safetensors")).unwrap();
    // The first of the fixture's sequences.
    let length = i64s(&golden_file, "sequence_lengths")[0] as usize;
    let ids = i64s(&golden_file, "input_ids");
    let tokens = ids[..length].iter().map(i64::to_string).collect::<Vec<_>>().join(",");
    folder.succeeds(&["logits", "--model", &golden(MODEL), "--tokens", &tokens, "--out", "l.safetensors"]);
    let ours = folder.read("l.safetensors");
    assert_eq!(names(&ours), ["logits"]);
    let (ours, theirs) = (f32s(&ours, "logits"), f32s(&golden_file, "logits"));
    assert_eq!(ours.len(), length * 288);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!((ours - theirs).abs() < 1e-3, "{ours} and {theirs}");
    }
}

#[test]
fn logits_with_labels_writes_a_gradient_for_every_tensor_of_the_adapter() {
    let folder = Folder::with_run();
    let (model, adapter) = (golden(NO_TOKENIZER), golden(ADAPTER));
    let args = ["logits", "--model", &model, "--adapter", &adapter, "--tokens", "5,6,7,8", "--labels=-100,6,-100,8"];
    let output = folder.succeeds(&joined(&[&args, &["--out", "l.safetensors"]]));
    assert!(output.stdout.contains("over 2 label tokens"), "{}", output.stdout);
    let written = folder.read("l.safetensors");
    let mut expected = names(&fs::read(golden("lora_all_linear/adapter/adapter_model.safetensors")).unwrap());
    expected.extend(["logits".to_owned(), "loss".to_owned()]);
    expected.sort();
    assert_eq!(names(&written), expected);

    // The loss is the mean over tokens 1 and 3, each predicted from the token before it.
    let (logits, loss) = (f32s(&written, "logits"), f32s(&written, "loss"));
    let vocab = logits.len() / 4;
    let row_loss = |row: usize, target: usize| {
        let row = &logits[row * vocab..][..vocab];
        let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        sum.ln() - f64::from(row[target])
    };
    let expected = (row_loss(0, 6) + row_loss(2, 8)) / 2.0;
    assert!((f64::from(loss[0]) - expected).abs() < 1e-4, "{} and {expected}", loss[0]);
}

#[test]
fn logits_refuses_labels_that_leave_nothing_to_predict() {
    let folder = Folder::with_run();
    let model = golden(NO_TOKENIZER);
    for labels in ["--labels=-100,-100,-100", "--labels=5,-100,-100"] {
        let args = ["logits", "--model", &model, "--tokens", "5,6,7", labels, "--out", "l.safetensors"];
        folder.refuses(&args, &["token 0 is never predicted", "give a later token its own id"]);
    }
}

#[test]
fn eval_says_what_became_of_every_row() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let short = json!({ "prompt": "hi", "completion": " on" });
    let long = json!({ "prompt": "the sand of time ".repeat(9), "completion": "on" });
    folder.write("two.jsonl", format!("{short}\n{long}\n"));
    let args = ["eval", "--model", &model, "--max-length", "8", "--data"];
    let output = folder.succeeds(&joined(&[&args, &["two.jsonl", "--json"]]));
    let found = output.json();
    assert_eq!((&found["rows"], &found["dropped"], &found["truncated"]), (&json!(1), &json!(1), &json!(0)));
    let dropped = "1 rows left out: the answer lies beyond --max-length (lines 2)";
    assert!(output.stderr.contains(dropped), "{}", output.stderr);
    let text = folder.succeeds(&joined(&[&args, &["two.jsonl"]])).stdout;
    assert!(text.contains("1 of 2"), "{text}");

    let cut = json!({ "prompt": "hi", "completion": "the sand of time sing things on" });
    folder.write("cut.jsonl", cut.to_string());
    let output = folder.succeeds(&joined(&[&args, &["cut.jsonl", "--json"]]));
    let found = output.json();
    assert_eq!((&found["rows"], &found["dropped"], &found["truncated"]), (&json!(1), &json!(0), &json!(1)));
    assert_eq!(found["tokens"], 8);
    let cut = format!("1 rows cut at --max-length, {} tokens lost (lines 1)", found["tokens_cut"]);
    assert!(output.stderr.contains(&cut), "{}", output.stderr);
}

#[test]
fn eval_takes_format_and_columns_as_run_files_do() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let rows = String::from_utf8(folder.read("eval.jsonl")).unwrap();
    folder.write("renamed.jsonl", rows.replace("\"prompt\"", "\"asked\"").replace("\"completion\"", "\"told\""));
    let args = ["eval", "--model", &model, "--data", "renamed.jsonl", "--json"];
    let with = |more: &[&str]| folder.succeeds(&joined(&[&args, more])).json();
    let named = with(&["--columns", "prompt=asked", "--columns", "completion=told"]);
    assert_eq!(named["loss"].as_f64(), Some(loss(&folder, &["--model", &model])));
    let text = with(&["--format", "text", "--columns", "text=told"]);
    assert!(text["tokens"].as_u64() < named["tokens"].as_u64(), "{text} and {named}");

    // What is wrong is told in this command's words.
    let unnamed = folder.retune(&args);
    assert!(unnamed.stderr.contains("names in --columns") && !unnamed.stderr.contains("data."), "{}", unnamed.stderr);
    let refuses = |more: &[&str], words: &[&str]| folder.refuses(&joined(&[&args, more]), words);
    refuses(&["--columns", "promt=question"], &["unknown key --columns promt", "did you mean --columns prompt?"]);
    refuses(&["--columns", "prompt"], &["--columns \"prompt\" has no `=`", "COLUMN=NAME"]);
    refuses(&["--columns", "text=question", "--columns", "text=answer"], &["--columns", "text twice"]);
    let unread = ["--format", "text", "--columns", "prompt=question"];
    refuses(&unread, &["--columns prompt is given", "choose another --format"]);
    refuses(&["--max-length", "1"], &["--max-length is 1", "expected 2 to"]);
    refuses(&["--limit", "0"], &["--limit is 0", "at least 1"]);
    let short = ["eval", "--model", &model, "--data", "eval.jsonl", "--max-length", "10"];
    folder.refuses(&short, &["none of the 4 rows", "within --max-length = 10"]);
    let help = folder.succeeds(&["eval", "--help"]).stdout;
    for word in ["--format", "data.format", "prompt_completion", "--columns", "data.columns", "data.max_length"] {
        assert!(help.contains(word), "{word} is not in: {help}");
    }
}

#[test]
fn generate_answers_the_same_every_time_and_stops_at_the_limit() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let args = ["generate", "--model", &model, "--json", "--max-new-tokens", "7", "hi"];
    let (first, second) = (folder.succeeds(&args).json(), folder.succeeds(&args).json());
    assert_eq!(first["ids"], second["ids"]);
    let ids = first["ids"].as_array().unwrap();
    assert!(ids.len() <= 7 && first["generated_tokens"] == ids.len());
    assert_eq!(first["stopped"], ids.len() < 7);
    let chat = folder.succeeds(&["tokenize", "--model", &model, "--chat", "--json", "hi"]).json();
    assert_eq!(first["prompt_tokens"], chat["ids"].as_array().unwrap().len());

    let sample = |seed: &str| {
        folder.succeeds(&joined(&[&args, &["--temperature", "1.5", "--seed", seed]])).json()["ids"].clone()
    };
    assert_eq!(sample("1"), sample("1"));
    assert!((2..8).any(|seed| sample(&seed.to_string()) != sample("1")), "the seed is of no effect");
    let streamed = folder.succeeds(&["generate", "--model", &model, "--max-new-tokens", "7", "hi"]);
    assert_eq!(streamed.stdout.trim_end_matches('\n'), first["text"].as_str().unwrap().trim_end_matches('\n'));
}

#[test]
fn generate_refuses_what_would_be_without_effect() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let args = ["generate", "--model", &model, "--max-new-tokens", "2", "hi"];
    for given in [["--top-p", "0.5"], ["--top-k", "3"], ["--seed", "0"]] {
        folder.refuses(&joined(&[&args, &given]), &[given[0], "needs --temperature above 0"]);
        folder.succeeds(&joined(&[&args, &given, &["--temperature", "1"]]));
    }
    folder.refuses(&["generate", "--model", &model, ""], &["the prompt is empty", "a message to answer"]);
    folder.refuses(&["generate", "--model", &model, "--raw", ""], &["the prompt is empty", "a text to continue"]);

    // The same model without its chat template: under this name nobody looks for it.
    let mut bytes = fs::read(&model).unwrap();
    let key = b"tokenizer.chat_template";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
    bytes[at + key.len() - 1] = b'X';
    folder.write("plain.gguf", bytes);
    let args = ["generate", "--model", "plain.gguf", "--max-new-tokens", "2", "hi"];
    folder.succeeds(&args);
    let words = ["--system needs a chat template, which plain.gguf does not have", "into the prompt"];
    folder.refuses(&joined(&[&args, &["--system", "Be brief."]]), &words);
}

#[test]
fn train_says_what_it_wrote_and_gained() {
    let folder = Folder::with_run();
    // In f32, as `eval` computes.
    let summary = folder.succeeds(&["train", "run.yaml", "--json", "--set", "base.compute=f32"]).json();
    assert_eq!(summary["output"], "out/adapter");
    assert_eq!(summary["steps"], STEPS);
    let (before, after) = (&summary["held_out_loss_before"], &summary["held_out_loss_after"]);
    assert!(after.as_f64().unwrap() < before.as_f64().unwrap() - 0.5, "{before}, then {after}");
    assert_eq!(summary["samples"].as_array().unwrap().len(), 3);
    for key in ["bytes", "trainable_parameters", "tokens", "best_step", "seconds", "peak_rss_bytes"] {
        assert!(summary[key].as_f64().is_some_and(|value| value > 0.0), "{key} is {}", summary[key]);
    }

    // What it says is what `eval` finds, and what `inspect` and the files say.
    let model = golden(MODEL);
    let found = loss(&folder, &["--model", &model]);
    assert!((found - before.as_f64().unwrap()).abs() < 1e-9, "{found}, {before}");
    let found = loss(&folder, &["--model", &model, "--adapter", "out/adapter"]);
    assert!((found - after.as_f64().unwrap()).abs() < 1e-9, "{found}, {after}");
    let adapter = folder.succeeds(&["inspect", "out/adapter", "--json"]).json();
    assert_eq!(adapter["parameters"], summary["trainable_parameters"]);
    assert_eq!((&adapter["r"], &adapter["lora_dropout"]), (&json!(4), &json!(0.1)));
    assert_eq!(adapter["base_model"], json!(model));
    assert_eq!(adapter["modules"].as_object().unwrap().len(), 14);
    let provenance: Value = serde_json::from_slice(&folder.read("out/adapter/retune.json")).unwrap();
    assert_eq!(provenance["steps"], STEPS);
    assert_eq!(&provenance["held_out_loss_after"], after);
    assert_eq!(provenance["taken_from_step"], summary["best_step"]);
}

/// What a person reads at the end of a run, and the commands that it offers, pasted.
#[cfg(unix)]
#[test]
fn train_ends_with_what_was_gained_and_commands_that_work() {
    let folder = Folder::with_run();
    // A name that a shell would take apart.
    let output = folder.succeeds(&joined(&[&["train", "run.yaml"], &SHORT, &["--set", "output_dir=my run"]]));
    let (report, next) = output.stdout.split_once("Next:").unwrap();
    for words in
        ["held-out loss  ", " before, ", " after", "held-out row 1\n", "reference  ", "base       ", "trained    "]
    {
        assert!(report.contains(words), "`{words}` is not in: {report}");
    }
    assert_eq!(report.matches("held-out row ").count(), 3, "{report}");
    assert!(report.contains("adapter        my run/adapter (") && report.contains("peak memory"), "{report}");
    let commands: Vec<&str> = next.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(commands.len(), 4, "{next}");
    for command in commands {
        let mut shell = std::process::Command::new("/bin/sh");
        shell.args(["-c", command]).current_dir(folder.path("")).env("HF_HUB_OFFLINE", "1");
        let done = shell.output().unwrap();
        assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
    }
    assert!(folder.path("my run-merged").is_dir());
}

#[test]
fn a_merged_model_scores_as_base_and_adapter_do() {
    let folder = Folder::with_run();
    short_run(&folder, &[]);
    let model = golden(MODEL);
    let merge = ["merge", "--model", &model, "--adapter", "out/adapter", "--json"];
    let report = folder.succeeds(&joined(&[&merge, &["--out", "merged"]])).json();
    assert_eq!((&report["changed_modules"], &report["shards"]), (&json!(14), &json!(1)));
    assert!(report["largest_change"].as_f64().is_some_and(|change| change > 0.0));

    let adapted = loss(&folder, &["--model", &model, "--adapter", "out/adapter"]);
    let merged = loss(&folder, &["--model", "merged"]);
    assert!((merged - adapted).abs() < 1e-5, "{merged} and {adapted}");
    assert!((adapted - loss(&folder, &["--model", &model])).abs() > 1e-3, "the adapter is of no effect");
    let inspected = folder.succeeds(&["inspect", "merged", "--json"]).json();
    assert_eq!((&inspected["layers"], &inspected["vocab_size"]), (&json!(2), &json!(288)));

    folder.succeeds(&joined(&[&merge, &["--out", "half", "--dtype", "bf16"]]));
    let half = loss(&folder, &["--model", "half"]);
    assert!((half - adapted).abs() < 2e-2, "{half} and {adapted}");
    folder.refuses(&joined(&[&merge, &["--out", "merged"]]), &["merged is not empty", "another name"]);

    // As the help says.
    fs::create_dir(folder.path("empty")).unwrap();
    folder.succeeds(&joined(&[&merge, &["--out", "empty"]]));
    let help = folder.succeeds(&["merge", "--help"]).stdout;
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(help.contains("a folder that does not exist yet or is empty"), "{help}");
}

#[test]
fn inspect_tells_what_a_model_is_made_of() {
    let folder = Folder::with_run();
    let found = folder.succeeds(&["inspect", &golden(MODEL), "--json"]).json();
    let expected = json!({
        "family": "llama", "parameters": 80192, "layers": 2, "hidden_size": 64, "intermediate_size": 96, "heads": 4,
        "key_value_heads": 2, "head_dim": 16, "vocab_size": 288, "context": 512, "tied_embeddings": true,
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&found[key], value, "{key}");
    }
    assert_eq!(found["target_modules"]["k_proj"], json!({ "modules": 2, "shape": [32, 64] }));
    assert_eq!(found["target_modules"]["all-linear"]["modules"], 14);
    let text = folder.succeeds(&["inspect", &golden(ADAPTER)]).stdout;
    assert!(text.contains("llama_tied") && text.contains("q_proj"), "{text}");
}

#[test]
fn inspect_gives_programs_numbers_and_people_words() {
    let folder = Folder::with_run();
    let inspect = |model: &str| folder.succeeds(&["inspect", model, "--json"]).json();
    let model = golden(MODEL);
    let bytes = fs::metadata(&model).unwrap().len();
    let found = inspect(&model);
    assert_eq!((&found["format"], &found["file_size"]), (&json!("gguf"), &json!(bytes)));
    let storage = found["storage"].as_object().unwrap();
    let stored: u64 = storage.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert!(storage.len() > 1 && stored > 0 && stored < bytes, "{storage:?}");
    assert_eq!(found["rope"], json!({ "theta": 10000.0, "scaling": null }));
    let text = folder.succeeds(&["inspect", &model]).stdout;
    assert!(text.contains("77 kB") && text.contains("64 × 96") && !text.contains(&bytes.to_string()), "{text}");

    let linear = inspect(&golden("rope_linear"));
    assert_eq!(linear["format"], "hugging_face");
    assert_eq!(linear["rope"]["scaling"], json!({ "rope_type": "linear", "factor": 4.0 }));
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    });
    assert_eq!(inspect(&golden("rope_llama3"))["rope"]["scaling"], llama3);
    // llama.cpp stores the factors alone; those that are Llama 3's are named so.
    let with_factors = golden("gguf_llama_rope_freqs/model.gguf");
    let scaling = &inspect(&with_factors)["rope"]["scaling"];
    assert_eq!((&scaling["rope_type"], &scaling["high_freq_factor"]), (&json!("llama3"), &json!(4.0)));
    let mut bytes = fs::read(with_factors).unwrap();
    let file = Gguf::parse(SharedBytes::from_vec(bytes.clone())).unwrap();
    let factors = &file.tensor("rope_freqs.weight").unwrap().bytes;
    let at = bytes.windows(factors.len()).position(|window| *window == factors[..]).unwrap();
    bytes[at..at + 4].copy_from_slice(&1.5f32.to_le_bytes());
    folder.write("factors.gguf", bytes);
    let scaling = &inspect("factors.gguf")["rope"]["scaling"];
    let found: Vec<f64> = scaling["factors"].as_array().unwrap().iter().map(|f| f.as_f64().unwrap()).collect();
    assert_eq!((&scaling["rope_type"], found.len(), found[0]), (&json!("factors"), 8, 1.5));
}

#[test]
fn inspect_tells_what_an_adapter_is_made_of() {
    let folder = Folder::with_run();
    let inspect = |name: &str| folder.succeeds(&["inspect", &golden(name), "--json"]).json();
    let weights = |name: &str| golden(&format!("{name}/adapter_model.safetensors"));
    let (query, key) = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj");
    for (name, module, norm, tensor) in [
        (ADAPTER, query, "norm_A", "lora_A.weight"),
        (ADAPTER, query, "norm_B", "lora_B.weight"),
        ("lora_bias_all/adapter", query, "norm_bias", "base_layer.bias"),
        ("lora_bias_all/adapter", key, "norm_bias", "bias"),
        ("lora_save_head/adapter", "lm_head", "norm_weight", "weight"),
        ("lora_save_embeddings/adapter", "model.embed_tokens", "norm_weight", "weight"),
    ] {
        let found = inspect(name)["modules"][module][norm].as_f64().unwrap();
        let values = f32s(&fs::read(weights(name)).unwrap(), &format!("base_model.model.{module}.{tensor}"));
        let expected = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        assert!(expected > 0.0 && (found - expected).abs() < 1e-9, "{name} {module}: {found} and {expected}");
    }

    let adapter = inspect(ADAPTER);
    assert_eq!(adapter["size"], fs::metadata(weights(ADAPTER)).unwrap().len());
    assert_eq!((&adapter["modules"][query]["r"], &adapter["rank_pattern"]), (&json!(4), &Value::Null));
    let text = folder.succeeds(&["inspect", &golden(ADAPTER)]).stdout;
    assert!(text.contains("18 kB"), "{text}");
    let patterns = inspect("lora_patterns/adapter");
    assert_eq!(patterns["rank_pattern"], json!({ "up_proj": 2, "layers.1.self_attn.v_proj": 6 }));
    assert_eq!(patterns["modules"]["model.layers.1.self_attn.v_proj"]["r"], 6);
    assert_eq!(inspect("lora_layers/adapter")["layers_to_transform"], json!([1]));
}

#[test]
fn inspect_of_a_runs_folder_names_the_adapter_in_it() {
    let folder = Folder::with_run();
    folder.copy(ADAPTER, "out/adapter");
    folder.write("out/run.json", "{}");
    let adapter = folder.succeeds(&["inspect", "out/adapter", "--json"]).json();
    let run = folder.succeeds(&["inspect", "out", "--json"]);
    assert!(run.stderr.contains("out is the folder of a run: taking out/adapter"), "{}", run.stderr);
    assert_eq!(run.json(), adapter);
    fs::rename(folder.path("out/adapter"), folder.path("out/model")).unwrap();
    folder.refuses(&["inspect", "out"], &["out is the folder of a run", "inspect out/model"]);
    fs::rename(folder.path("out/model"), folder.path("elsewhere")).unwrap();
    folder.refuses(&["inspect", "out"], &["out is the folder of a run that has not written its adapter yet"]);
}

/// Wherever an adapter is read, the folder of a run stands for the one in it.
#[test]
fn the_folder_of_a_run_stands_for_its_adapter() {
    let folder = Folder::with_run();
    folder.copy(NO_TOKENIZER, "model");
    folder.copy("gguf_llama", "base");
    short_run(&folder, &[]);
    let model = golden(MODEL);
    let taken = "out is the folder of a run: taking out/adapter";
    let cases: [&[&str]; 6] = [
        &["eval", "--model", &model, "--adapter", "out", "--data", "eval.jsonl"],
        &["generate", "--model", &model, "--adapter", "out", "--max-new-tokens", "1", "hi"],
        &["merge", "--model", &model, "--adapter", "out", "--out", "merged"],
        &["unmerge", "--model", "merged", "--adapter", "out", "--out", "again"],
        &["combine", "--adapter", "out=1", "--out", "combined"],
        &["convert", "out", "--to", "lora", "--out", "plain"],
    ];
    for args in cases {
        let output = folder.succeeds(args);
        assert!(output.stderr.contains(taken), "{args:?}: {}", output.stderr);
    }
    let go_on =
        ["train", "run.yaml", "--set", "adapter_init=out", "--set", "output_dir=on", "--set", "training.max_steps=1"];
    assert!(folder.succeeds(&go_on).stderr.contains(taken));
    folder.succeeds(&[
        "train",
        "run.yaml",
        "--set",
        "method=full",
        "--set",
        "adapter=null",
        "--set",
        "output_dir=whole",
        "--set",
        "training.max_steps=1",
    ]);
    let args = ["eval", "--model", &model, "--adapter", "whole", "--data", "eval.jsonl"];
    folder.refuses(&args, &["whole is the folder of a run that trained a whole model", "--model whole/model"]);
}

/// A run that goes on from an adapter ends with that one where no step makes it better.
#[test]
fn the_adapter_a_run_began_from_may_be_its_best() {
    let folder = Folder::with_run();
    folder.succeeds(&["train", "run.yaml", "--set", "output_dir=learnt"]);
    let more =
        ["--set", "adapter_init=learnt/adapter", "--set", "training.learning_rate=1", "--set", "base.compute=f32"];
    let args = joined(&[&["train", "run.yaml", "--json", "--set", "training.warmup_steps=0"], &SHORT, &more]);
    let summary = folder.succeeds(&args).json();
    assert_eq!(summary["best_step"], 0, "{summary}");
    assert_eq!(summary["held_out_loss_before"], summary["held_out_loss_after"]);
    assert!(summary["held_out_loss_last"].as_f64() > summary["held_out_loss_before"].as_f64(), "{summary}");
    let weights = |of: &str| folder.read(&format!("{of}/adapter/adapter_model.safetensors"));
    assert!(weights("learnt") == weights("out"));
    let text = folder.succeeds(&joined(&[&args, &["--resume"]]));
    assert_eq!(text.json()["best_step"], 0);
    // Where nothing is held out, the last step is what there is.
    folder.succeeds(&joined(&[&args, &["--overwrite", "--set", "data.eval=null", "--set", "data.eval_fraction=0"]]));
    assert!(weights("learnt") != weights("out"));
}

/// What is trained in the base's place is as far from the base as a low-rank change is told to be.
#[test]
fn inspect_tells_of_vectors_and_rows_of_tokens() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let train = |more: &[&str]| {
        folder.succeeds(&joined(&[&["train", "run.yaml", "--overwrite", "--set", "training.max_steps=2"], more]));
        folder.succeeds(&["inspect", "out/adapter", "--model", &model, "--json"]).json()["modules"].clone()
    };
    let is_number = |value: &Value| value.as_f64().is_some_and(|number| number > 0.0);
    let norms = train(&["--set", "method=partial", "--set", "adapter={norms: true}"]);
    for module in ["model.norm", "model.layers.0.input_layernorm"] {
        let entry = &norms[module];
        assert!(is_number(&entry["norm_change"]) && is_number(&entry["change_over_weight"]), "{module}: {entry}");
    }
    let rows = train(&["--set", "adapter={target_modules: [q_proj], r: 4, trainable_token_indices: [3, 50]}"]);
    let entry = &rows["model.embed_tokens"];
    assert_eq!(entry["tokens"], 2);
    assert!(is_number(&entry["norm_change"]) && is_number(&entry["change_over_weight"]), "{entry}");
    assert!(is_number(&rows["model.layers.0.self_attn.q_proj"]["change_over_weight"]), "{rows}");
}

/// PiSSA is saved as LoRA of twice the rank, and the card is of what is saved.
#[test]
fn a_card_says_the_rank_that_the_files_have() {
    let folder = Folder::with_run();
    short_run(&folder, &["--set", "adapter.init_lora_weights=pissa"]);
    let config: Value = serde_json::from_slice(&folder.read("out/adapter/adapter_config.json")).unwrap();
    assert_eq!(config["r"], 8);
    let card = String::from_utf8(folder.read("out/adapter/README.md")).unwrap();
    assert!(card.contains("| `r` | 8 |") && card.contains("| trained as |"), "{card}");
    assert!(card.contains("`init_lora_weights` `pissa`") && card.contains("`r` 4"), "{card}");
}

#[test]
fn data_says_how_columns_were_understood_and_what_was_left() {
    let folder = Folder::with_run();
    let row = r#"{"query": "the sand", "response": "the sea", "mood": "calm", "id": 3}"#;
    folder.write("one.jsonl", format!("{row}\n{row}\n{{\"query\": 4}}\n"));
    folder.write("two.csv", "query;response\nthe sand of time;the sea\n");
    let skip = ["--set", "data.on_bad_row=skip", "--set", "data.eval=null", "--set", "data.eval_fraction=0"];
    let data = ["data", "run.yaml", "--set", "data.train=[one.jsonl, two.csv]"];
    let text = folder.succeeds(&joined(&[&data, &skip])).stdout;
    for words in [
        "one.jsonl, two.csv (alpaca)",
        "3 rows, 3 used",
        "! the column \"query\" is taken as instruction; data.columns.instruction=COLUMN takes another",
        "! 2 rows have a column \"mood\", which is not read (lines 1, 2)",
        "! 1 rows left out, which cannot be read (lines 3). The first: one.jsonl, line 3: column query is 4",
    ] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    let report = folder.succeeds(&joined(&[&data, &skip, &["--json"]])).json();
    assert_eq!(report["train"]["reading"]["skipped"], json!({ "count": 1, "first_lines": [3] }));
    let refuse = ["--set", "data.unknown_columns=refuse"];
    folder.refuses(
        &joined(&[&data, &skip, &refuse]),
        &["one.jsonl, line 1: mood is not read", "data.unknown_columns=note"],
    );
    let help = folder.succeeds(&["help", "data"]).stdout;
    assert!(help.contains("{\"from\": \"human\""), "{help}");
}

#[test]
fn data_reports_what_a_run_will_see() {
    let folder = Folder::with_run();
    let twice = [folder.read("train.jsonl"), folder.read("eval.jsonl"), folder.read("eval.jsonl")].concat();
    folder.write("twice.jsonl", twice);
    let report = folder.succeeds(&["data", "run.yaml", "--json", "--set", "data.train=twice.jsonl"]).json();
    let train = &report["train"];
    assert_eq!(
        (&train["rows"], &train["examples"], &train["format"]),
        (&json!(38), &json!(38), &json!("prompt_completion"))
    );
    assert_eq!(train["duplicates"], json!({ "count": 4, "first_lines": [35, 36, 37, 38] }));
    assert_eq!(train["overlap_with_held_out"]["count"], 8);
    assert!(train["trained_tokens"].as_u64().unwrap() < train["tokens"].as_u64().unwrap());
    assert_eq!(report["eval"]["rows"], 4);

    let text = folder.succeeds(&["data", "run.yaml", "--rows", "1"]).stdout;
    let (prompt, rest) = text.split_once('«').unwrap();
    let (trained, _) = rest.split_once('»').unwrap();
    assert!(prompt.starts_with("row 1: ") && prompt.ends_with("tone the"), "{prompt}");
    assert!(trained.ends_with(" 0<|im_end|>"), "the answer ends in the token generation stops at: {trained}");
    assert!(!folder.path("out").exists(), "looking at data writes nothing");

    // The same row for a program.
    let report = folder.succeeds(&["data", "run.yaml", "--rows", "1", "--json"]).json();
    assert_eq!(report["rows"].as_array().unwrap().len(), 1);
    let row = &report["rows"][0];
    let (header, prompt) = prompt.split_once('\n').unwrap();
    assert_eq!(row["text"], format!("{prompt}{trained}"));
    let of_tokens = row["trained"].as_array().unwrap();
    let count = of_tokens.iter().filter(|trained| trained.as_bool() == Some(true)).count();
    assert_eq!(header, format!("row 1: {} tokens, {count} trained", of_tokens.len()));
    assert_eq!(row["ids"].as_array().unwrap().len(), of_tokens.len());
}

#[test]
fn full_fine_tuning_writes_a_model_that_eval_accepts() {
    let folder = Folder::with_run();
    let text = String::from_utf8(folder.read("run.yaml")).unwrap();
    let mut run: Value = serde_json::from_str(&text).unwrap();
    run["method"] = json!("full");
    run["adapter"] = Value::Null;
    folder.write("full.yaml", format!("{run:#}"));
    let args = ["train", "full.yaml", "--json", "--set", "training.learning_rate=1e-3"];
    let summary = folder.succeeds(&joined(&[&args, &SHORT])).json();
    assert_eq!(summary["output"], "out/model");
    assert_eq!(summary["trainable_parameters"], 80192);
    let after = summary["held_out_loss_after"].as_f64().unwrap();
    assert!(after < summary["held_out_loss_before"].as_f64().unwrap());
    let found = loss(&folder, &["--model", "out/model"]);
    assert!((found - after).abs() < 1e-6, "{found} and {after}");
    folder.succeeds(&["generate", "--model", "out/model", "--max-new-tokens", "2", "hi"]);
}

#[test]
fn a_run_goes_on_from_an_adapter() {
    let folder = Folder::with_run();
    short_run(&folder, &[]);
    let first = loss(&folder, &["--model", &golden(MODEL), "--adapter", "out/adapter"]);
    let exact = ["--set", "base.compute=f32"];
    let args = ["train", "run.yaml", "--json", "--set", "adapter_init=out/adapter", "--set", "output_dir=on"];
    let summary = folder.succeeds(&joined(&[&args, &exact, &SHORT])).json();
    let before = summary["held_out_loss_before"].as_f64().unwrap();
    assert!((before - first).abs() < 1e-9, "{before} and {first}");
    assert!(summary["held_out_loss_after"].as_f64().unwrap() < before);

    let another_rank = joined(&[&args, &["--set", "adapter.r=8", "--set", "output_dir=other"]]);
    folder.refuses(&another_rank, &["out/adapter", "another `adapter`"]);
}

#[test]
fn the_schema_of_run_files_is_json() {
    let folder = Folder::with_run();
    let schema = folder.succeeds(&["schema"]).json();
    for key in ["model", "output_dir", "adapter", "data", "training"] {
        assert!(schema["properties"][key].is_object(), "{key}");
    }
}

#[test]
fn a_run_that_made_the_model_worse_says_so_and_a_soft_prompt_is_not_to_be_merged() {
    let folder = Folder::with_run();
    let train = |more: &[&str]| {
        let run =
            ["train", "run.yaml", "--overwrite", "--set", "training.max_steps=3", "--set", "training.warmup_steps=0"];
        folder.succeeds(&joined(&[&run, more])).stdout
    };
    // One that has learnt, and a rate that throws it off.
    folder.succeeds(&["train", "run.yaml", "--set", "output_dir=learnt"]);
    let worse = train(&["--set", "adapter_init=learnt/adapter", "--set", "training.learning_rate=1"]);
    assert!(worse.contains("no step made it better: what is saved is the adapter that the run began from"), "{worse}");
    assert!(worse.contains(" merge "), "{worse}");
    let worse = train(&["--set", "method=full", "--set", "adapter=null", "--set", "training.learning_rate=1"]);
    assert!(worse.contains("it is worse than before"), "{worse}");
    let prompt = train(&["--set", "method=prompt_tuning", "--set", "adapter={num_virtual_tokens: 4}"]);
    assert!(!prompt.contains("it is worse") && !prompt.contains(" merge "), "{prompt}");
}
