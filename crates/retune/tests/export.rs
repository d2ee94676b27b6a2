//! `retune export` and merging into a GGUF file: what each program takes, and what it is refused.

mod common;

use std::fs;

use common::{Folder, MODEL, golden, joined};
use safetensors::SafeTensors;
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
    // PEFT takes DoRA; of methods of our own it knows nothing.
    folder.succeeds(&joined(&[&export, &["peft", "--out", "kept"]]));
    assert!(fs::read_dir(folder.path("kept")).unwrap().count() >= 2);
    let folder = trained(&["--set", "method=partial", "--set", "adapter={norms: true}"]);
    folder.refuses(&joined(&[&export, &["peft", "--out", "x"]]), &["partial", "merge"]);
    folder.succeeds(&joined(&[&export, &["llama.cpp", "--out", "x.gguf"]]));
    assert!(!folder.path("x").exists());
}
