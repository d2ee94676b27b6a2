//! `retune export` and merging into a GGUF file: what each program takes, and what it is refused.

mod common;

use std::fs;

use common::{Folder, MODEL, golden, joined};
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;

const TOKENS: &str = "5,17,3,88,41,2,60";

fn logits(folder: &Folder, args: &[&str]) -> Vec<f32> {
    folder.succeeds(&joined(&[&["logits", "--tokens", TOKENS, "--out", "logits.safetensors"], args]));
    let bytes = folder.read("logits.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = file.tensor("logits").unwrap().data().as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word));
    values.collect()
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |largest, (a, b)| largest.max((a - b).abs()))
}

/// A folder with an adapter of a short run, `out/adapter`.
fn trained(flags: &[&str]) -> Folder {
    let folder = Folder::with_run();
    let short = ["train", "run.yaml", "--set", "training.epochs=1", "--set", "training.max_steps=4"];
    folder.succeeds(&joined(&[&short, flags]));
    folder
}

#[test]
fn a_merged_gguf_file_is_base_and_adapter() {
    let folder = trained(&[]);
    let model = golden(MODEL);
    let both = ["--model", &model, "--adapter", "out/adapter"];
    let (adapted, untouched) = (logits(&folder, &both), logits(&folder, &["--model", &model]));
    assert!(largest(&adapted, &untouched) > 1e-2);

    let merge = joined(&[&["merge", "--json"], &both]);
    let report = folder.succeeds(&joined(&[&merge, &["--out", "merged.gguf", "--type", "f32"]])).json();
    assert_eq!(report["type"], "f32");
    assert!(report["parity"]["largest_logit_difference"].as_f64().unwrap() < 1e-4, "{report}");
    assert_eq!(report["parity"]["same_top_1"], 1.0);
    assert!(largest(&logits(&folder, &["--model", "merged.gguf"]), &adapted) < 1e-4);
    folder.succeeds(&["generate", "--model", "merged.gguf", "--max-new-tokens", "4", "the sand"]);

    // Few bits show in what is printed.
    let export = joined(&[&["export", "--for", "llama.cpp"], &both]);
    let text = folder.succeeds(&joined(&[&export, &["--type", "q4_0", "--out", "a/few.gguf"]])).stdout;
    assert!(text.contains("q4_0") && text.contains("parity") && text.contains("llama-cli -m a/few.gguf"), "{text}");
    let difference = largest(&logits(&folder, &["--model", "a/few.gguf"]), &adapted);
    assert!(difference > 1e-2, "{difference}");
    // From a directory, which has lost the header.
    folder.succeeds(&joined(&[&merge, &["--out", "merged"]]));
    folder.succeeds(&["export", "--for", "lmstudio", "--model", "merged", "--type", "f32", "--out", "again.gguf"]);
    assert!(largest(&logits(&folder, &["--model", "again.gguf"]), &adapted) < 1e-4);

    folder.refuses(&joined(&[&merge, &["--out", "merged.gguf"]]), &["merged.gguf is there already", "--out"]);
    folder.refuses(&joined(&[&merge, &["--out", "x.gguf", "--dtype", "bf16"]]), &["--dtype", "--type"]);
    folder.refuses(&joined(&[&merge, &["--out", "x", "--type", "f16"]]), &["--type", ".gguf"]);
    folder.refuses(&joined(&[&export, &["--out", "x"]]), &["llama.cpp", ".gguf"]);
    assert!(!folder.path("x.gguf").exists() && !folder.path("x").exists());
}

/// A bf16's bits, rounded to nearest, ties to even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[test]
fn a_fully_fine_tuned_model_keeps_the_type_of_its_base() {
    let folder = trained(&[]);
    let model = golden(MODEL);
    let merge = ["merge", "--model", &model, "--adapter", "out/adapter", "--dtype", "bf16", "--out", "base"];
    folder.succeeds(&merge);
    let full = |out: &str, more: &[&str]| {
        let output = format!("output_dir={out}");
        let run = ["train", "run.yaml", "--set", "method=full", "--set", "adapter=null", "--set", "model=base"];
        let short = ["--set", "training.max_steps=3", "--set", "training.learning_rate=1e-3", "--set", &output];
        folder.succeeds(&joined(&[&run, &short, more])).stderr
    };
    let said = full("kept", &[]);
    assert!(said.contains("written as bf16\n"), "{said}");
    full("wide", &["--set", "export.dtype=f32"]);
    let steps = "checkpoints/step-00000003.safetensors";
    assert!(folder.read(&format!("kept/{steps}")) == folder.read(&format!("wide/{steps}")), "the run is another");
    let config: Value = serde_json::from_slice(&folder.read("kept/model/config.json")).unwrap();
    assert_eq!(config["torch_dtype"], "bfloat16");

    let [kept, wide] = ["kept", "wide"].map(|run| folder.read(&format!("{run}/model/model.safetensors")));
    let [narrow, exact] = [&kept, &wide].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let mut rounded = 0;
    for (name, tensor) in narrow.tensors() {
        assert_eq!((tensor.dtype(), exact.tensor(&name).unwrap().dtype()), (Dtype::BF16, Dtype::F32), "{name}");
        let of_exact = exact.tensor(&name).unwrap().data().as_chunks::<4>().0.to_vec();
        for (bits, value) in tensor.data().as_chunks::<2>().0.iter().zip(of_exact) {
            let value = f32::from_le_bytes(value);
            assert_eq!(u16::from_le_bytes(*bits), bf16(value), "{name}: {value}");
            rounded += usize::from(value.to_bits() & 0xffff != 0);
        }
    }
    assert!(rounded > 10_000, "what was trained needed no rounding: {rounded} values");

    // A run that has ended is written otherwise without a step.
    full("wide", &["--resume", "--set", "export.dtype=bf16"]);
    assert!(folder.read("wide/model/model.safetensors") == kept);
    full("half", &["--set", "export.dtype=f16"]);
    let half = folder.read("half/model/model.safetensors");
    assert!(SafeTensors::deserialize(&half).unwrap().tensors().iter().all(|(_, t)| t.dtype() == Dtype::F16));
    // Blocks are no type of a trained weight.
    let said = full("blocks", &["--set", &format!("model={model}")]);
    assert!(said.contains("written as f32, since the base is in Q8_0"), "{said}");
    folder.refuses(&["train", "run.yaml", "--set", "export.dtype=f16"], &["export.dtype", "retune merge --dtype"]);
}

/// What a merge prints is measured on the run's held-out rows, where these are still there.
#[test]
fn a_merge_says_what_it_changes() {
    let folder = trained(&["--set", "base.storage=nf4"]);
    let model = golden(MODEL);
    let merge = |out: &str, more: &[&str]| {
        let args = ["merge", "--model", &model, "--adapter", "out/adapter", "--out", out];
        folder.succeeds(&joined(&[&args, more]))
    };
    let number = |report: &Value, key: &str| report[key].as_f64().unwrap();
    let report = merge("exact", &["--json"]).json();
    let (parity, own) = (&report["parity"], &report["parity_as_is"]);
    assert_eq!(parity["data"], "rows of eval.jsonl that the run held out");
    let loss = folder.succeeds(&["eval", "--model", "exact", "--data", "eval.jsonl", "--json"]).json();
    assert!((number(&loss, "loss") - number(parity, "loss_after")).abs() < 1e-4, "{loss} and {parity}");
    assert!((number(parity, "loss_before") - number(parity, "loss_after")).abs() < 1e-4, "{parity}");
    assert!(number(parity, "largest_logit_difference") < 1e-4 && number(parity, "same_top_1") == 1.0, "{parity}");
    // The other merge, which is no default, changes more, and is measured as it will be.
    assert!(number(own, "largest_logit_difference") > 1e-2, "{own}");
    let said = merge("own", &["--json", "--storage", "as-is"]);
    assert!(said.stderr.contains("merged into other weights than it was trained on"), "{}", said.stderr);
    let report = said.json();
    assert!(report["parity_as_is"].is_null(), "{report}");
    for key in ["loss_before", "loss_after", "largest_logit_difference", "same_top_1"] {
        let [ours, theirs] = [own, &report["parity"]].map(|parity| number(parity, key));
        assert!((ours - theirs).abs() < 1e-4, "{key}: {own} and {report}");
    }
    // A GGUF file is merged into the same weights.
    let text = merge("exact.gguf", &["--type", "f32"]).stdout;
    assert!(text.contains("loss ") && text.contains("or as-is"), "{text}");
    let export = ["export", "--for", "jan", "--model", &model, "--adapter", "out/adapter", "--type", "f32", "--json"];
    let report = folder.succeeds(&joined(&[&export, &["--out", "jan.gguf"]])).json();
    assert!(number(&report["parity"], "largest_logit_difference") < 1e-4, "{report}");

    // Other rows, and none.
    folder.write("other.jsonl", common::rows(200..202));
    let report = merge("again", &["--json", "--data", "other.jsonl"]).json();
    assert_eq!((&report["parity"]["data"], &report["parity"]["rows"]), (&"rows of other.jsonl".into(), &2.into()));
    fs::remove_file(folder.path("eval.jsonl")).unwrap();
    assert_eq!(merge("texts", &["--json"]).json()["parity"]["data"], "bundled texts");
    let args = ["merge", "--model", &model, "--adapter", "out/adapter", "--out", "x", "--data", "eval.jsonl"];
    folder.refuses(&args, &["eval.jsonl"]);
}

#[test]
fn ollama_gets_a_model_and_a_modelfile() {
    let folder = trained(&[]);
    let model = golden(MODEL);
    let export = ["export", "--for", "ollama", "--model", &model, "--adapter", "out/adapter"];
    let text = folder.succeeds(&joined(&[&export, &["--out", "mine"]])).stdout;
    assert!(text.contains("ollama create") && text.contains("parity"), "{text}");
    let modelfile = String::from_utf8(folder.read("mine/Modelfile")).unwrap();
    assert!(modelfile.starts_with("FROM ./model.gguf\nTEMPLATE \"\"\"{{ range $i, $_ := .Messages }}"), "{modelfile}");
    assert!(modelfile.contains(r#"{{ "<|im_start|>user\n" }}{{ .Content }}{{ "<|im_end|>\n" }}"#), "{modelfile}");
    assert!(modelfile.ends_with("PARAMETER stop \"<|im_end|>\"\n"), "{modelfile}");
    folder.refuses(&joined(&[&export, &["--out", "mine"]]), &["mine is not empty"]);
    folder
        .refuses(&joined(&[&export, &["--out", "x", "--adapter-only"]]), &["Ollama takes no adapter", "merged model"]);
}

#[test]
fn adapters_alone_keep_what_programs_would_pass_over() {
    let flags = [
        "--set",
        "adapter={r: 4, lora_alpha: 6, use_rslora: true, target_modules: all-linear, rank_pattern: {q_proj: 6}, alpha_pattern: {v_proj: 3}}",
    ];
    let folder = trained(&flags);
    let model = golden(MODEL);
    let adapted = logits(&folder, &["--model", &model, "--adapter", "out/adapter"]);
    let export = ["export", "--model", &model, "--adapter", "out/adapter", "--json", "--for"];
    for (program, out) in [("vllm", "x-vllm"), ("mistral.rs", "x-mistral"), ("peft", "x-peft"), ("mlx", "x-mlx")] {
        let report = folder.succeeds(&joined(&[&export, &[program, "--out", out]])).json();
        assert!(report["parity"]["largest_logit_difference"].as_f64().unwrap() < 1e-4, "{program}: {report}");
    }
    for out in ["x-vllm", "x-mistral"] {
        let config: Value = serde_json::from_slice(&folder.read(&format!("{out}/adapter_config.json"))).unwrap();
        assert_eq!((config["r"].as_u64(), config["lora_alpha"].as_f64()), (Some(6), Some(6.0)), "{config}");
        let is_left_out = |key: &str| config.get(key).is_none();
        assert!(["use_rslora", "rank_pattern", "alpha_pattern"].into_iter().all(is_left_out), "{config}");
        let exported = logits(&folder, &["--model", &model, "--adapter", out]);
        assert!(largest(&exported, &adapted) < 1e-4);
    }
    let lora = folder.succeeds(&joined(&[&export, &["llama.cpp", "--adapter-only", "--out", "lora.gguf"]])).json();
    assert!(lora["parity"]["largest_logit_difference"].as_f64().unwrap() < 1e-4, "{lora}");

    // mlx-lm's layout: A as [in, r], B as [r, out].
    let bytes = folder.read("x-mlx/adapters.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let shape = |name: &str| file.tensor(name).unwrap().shape().to_vec();
    assert_eq!(shape("model.layers.0.self_attn.k_proj.lora_a"), [64, 6]);
    assert_eq!(shape("model.layers.0.self_attn.k_proj.lora_b"), [6, 32]);
    let config: Value = serde_json::from_slice(&folder.read("x-mlx/adapter_config.json")).unwrap();
    assert_eq!((&config["num_layers"], &config["lora_parameters"]["rank"]), (&2.into(), &6.into()));
    assert_eq!(config["lora_parameters"]["keys"].as_array().unwrap().len(), 7);
}

#[test]
fn what_a_program_does_not_take_is_refused_with_the_way_out() {
    let folder = trained(&["--set", "adapter.use_dora=true"]);
    let model = golden(MODEL);
    let export = ["export", "--model", &model, "--adapter", "out/adapter", "--for"];
    for (program, more) in
        [("llama.cpp", &["--adapter-only", "--out", "x.gguf"][..]), ("vllm", &["--out", "x"]), ("mlx", &["--out", "x"])]
    {
        let words = ["convert --to lora", "plain LoRA", "merge"];
        folder.refuses(&joined(&[&export, &[program], more]), &words);
    }
    for (args, words) in [
        (&["jan", "--adapter-only", "--out", "x.gguf"][..], &["Jan", "whole models", "--adapter-only"][..]),
        (&["vllm", "--out", "x", "--type", "f16"], &["--type", "leave it out"]),
        (&["peft", "--out", "x.gguf"], &["folder"]),
    ] {
        folder.refuses(&joined(&[&export, args]), words);
    }
    folder.refuses(&["export", "--model", &model, "--for", "vllm", "--out", "x"], &["--adapter"]);
    // What no program takes in an adapter of linears is named.
    for (settings, words) in [
        ("{target_modules: [embed_tokens, q_proj]}", ["a change of model.embed_tokens", "leave out --adapter-only"]),
        (
            "{target_modules: [q_proj], trainable_token_indices: [3]}",
            ["rows of model.embed_tokens", "trainable_token_indices"],
        ),
    ] {
        let folder = trained(&["--set", &format!("adapter={settings}")]);
        let args = joined(&[&export, &["llama.cpp", "--adapter-only", "--out", "x.gguf"]]);
        folder.refuses(&args, &words);
        folder.succeeds(&joined(&[&export, &["llama.cpp", "--out", "merged.gguf"]]));
    }
    // PEFT takes DoRA; of methods of our own it knows nothing.
    folder.succeeds(&joined(&[&export, &["peft", "--out", "kept"]]));
    assert!(fs::read_dir(folder.path("kept")).unwrap().count() >= 2);
    let folder = trained(&["--set", "method=partial", "--set", "adapter={norms: true}"]);
    folder.refuses(&joined(&[&export, &["peft", "--out", "x"]]), &["partial", "merge"]);
    folder.succeeds(&joined(&[&export, &["llama.cpp", "--out", "x.gguf"]]));
    assert!(!folder.path("x").exists());
}
