//! The program on a model with an encoder and a decoder: data, training, going on after a stop, generation, merging, and what is refused.

mod common;

use common::{Folder, golden, joined};
use safetensors::SafeTensors;
use serde_json::json;

const MODEL: &str = "t5";

/// `train.jsonl`, `eval.jsonl` and `run.yaml` of a run on the model with a tokenizer.
fn with_run() -> Folder {
    let folder = Folder::with_run();
    let things = ["the lines", "a tool that counts words", "small tables of the library", "files and bytes"];
    let row = |i: usize| {
        let (thing, more) = (things[i % 4], ["tests", "tables", "words", "files"][i / 4]);
        format!("{}\n", json!({ "input": format!("summarize: {thing} {more}"), "output": thing }))
    };
    folder.write("train.jsonl", (0..12).map(row).collect::<String>());
    folder.write("eval.jsonl", (12..15).map(row).collect::<String>());
    let run = json!({
        "model": golden(MODEL),
        "output_dir": "out",
        "adapter": { "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear" },
        "data": { "train": "train.jsonl", "eval": "eval.jsonl", "max_length": 64 },
        "training": { "epochs": 2, "batch_size": 2, "save_steps": 3, "eval_steps": 6, "learning_rate": 0.01 },
    });
    folder.write("run.yaml", format!("{run:#}"));
    let mut whole = run;
    whole["method"] = json!("full");
    whole.as_object_mut().unwrap().remove("adapter");
    folder.write("full.yaml", format!("{whole:#}"));
    folder
}

#[test]
fn a_run_trains_and_its_adapter_answers() {
    let folder = with_run();
    let shown = folder.succeeds(&["data", "run.yaml", "--rows", "1"]).stdout;
    assert!(shown.contains("summarize: the lines tests</s>") && shown.contains("«the lines</s>»"), "{shown}");
    folder.succeeds(&["train", "run.yaml"]);
    let config: serde_json::Value = serde_json::from_slice(&folder.read("out/adapter/adapter_config.json")).unwrap();
    assert_eq!(config["task_type"], "SEQ_2_SEQ_LM");
    let model = golden(MODEL);
    let adapted = ["--model", &model, "--adapter", "out/adapter"];
    let loss = |args: &[&str]| {
        folder.succeeds(&joined(&[&["eval", "--data", "eval.jsonl", "--json"], args])).json()["loss"].as_f64().unwrap()
    };
    let trained = loss(&adapted);
    assert!(trained < loss(&adapted[..2]), "nothing was learnt");
    let answer = folder.succeeds(&joined(&[&["generate", "--json", "--max-new-tokens", "5"], &adapted, &["a tool"]]));
    assert!(answer.json()["generated_tokens"].as_u64().unwrap() > 0);

    // In 8 bits, and with other things kept for the backward.
    folder.succeeds(&["train", "run.yaml", "--set", "output_dir=int8", "--set", "base.compute=int8"]);
    assert!((loss(&["--model", &model, "--adapter", "int8/adapter"]) - trained).abs() < 0.05 * trained);
    let tensors = |saving: &str| {
        let output = format!("output_dir={saving}");
        let saving = format!("training.activation_checkpointing={saving}");
        let set = ["--set", &output, "--set", &saving, "--set", "base.compute=f32"];
        folder.succeeds(&joined(&[&["train", "run.yaml"], &set]));
        folder.read(&format!("{}/adapter/adapter_model.safetensors", &output[11..]))
    };
    assert!(tensors("layer") == tensors("none"));

    // Merged it is the same model.
    folder.succeeds(&joined(&[&["merge", "--out", "merged"], &adapted]));
    assert!((loss(&["--model", "merged"]) - trained).abs() < 1e-5);
    let logits = |args: &[&str]| {
        let tokens = ["logits", "--tokens", "5,9,12,1", "--labels", "7,-100,30,1", "--out", "logits.safetensors"];
        folder.succeeds(&joined(&[&tokens, args]));
        let bytes = folder.read("logits.safetensors");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("logits").unwrap();
        assert_eq!(logits.shape(), [4, 96]);
        assert!(args.len() < 4 || file.names().iter().any(|name| name.contains("EncDecAttention.k.lora_A")));
        logits.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<f32>>()
    };
    let difference =
        logits(&adapted).iter().zip(logits(&["--model", "merged"])).fold(0.0, |d: f32, (a, b)| d.max((a - b).abs()));
    assert!(difference < 1e-4, "{difference}");
    let inspected = folder.succeeds(&["inspect", "merged", "--json"]).json();
    assert_eq!((&inspected["layers"], &inspected["encoder_layers"]), (&json!(3), &json!(3)));
}

/// A GGUF file is used as a directory is, whichever kind of T5 it holds.
#[test]
fn a_gguf_file_trains_answers_and_becomes_a_directory() {
    let folder = with_run();
    let text = "summarize: a tool<extra_id_0>";
    for kind in ["t5", "flan_t5"] {
        let (model, adapter) = (golden(&format!("gguf_{kind}/model.gguf")), format!("{kind}/adapter"));
        let set = [format!("model={model}"), format!("output_dir={kind}")];
        folder.succeeds(&["train", "run.yaml", "--set", &set[0], "--set", &set[1]]);
        let adapted = ["--model", &model, "--adapter", &adapter];
        let loss = |args: &[&str]| {
            let output = folder.succeeds(&joined(&[&["eval", "--data", "eval.jsonl", "--json"], args]));
            output.json()["loss"].as_f64().unwrap()
        };
        let trained = loss(&adapted);
        assert!(trained < loss(&adapted[..2]), "{kind}: nothing was learnt");
        let merged = format!("merged-{kind}");
        folder.succeeds(&joined(&[&["merge", "--out", &merged], &adapted]));
        assert!((loss(&["--model", &merged]) - trained).abs() < 1e-5, "{kind}");
        let ids = |model: &str| {
            let json = folder.succeeds(&["tokenize", "--model", model, "--json", text]).json();
            let answer = ["generate", "--model", model, "--json", "--max-new-tokens", "9", "a tool that counts"];
            (json["ids"].clone(), folder.succeeds(&answer).json()["ids"].clone())
        };
        let (tokens, answer) = ids(&merged);
        assert_eq!(tokens, ids(&model).0, "{kind}");
        let of_adapted = ["generate", "--json", "--max-new-tokens", "9", "a tool that counts"];
        assert_eq!(answer, folder.succeeds(&joined(&[&of_adapted, &adapted])).json()["ids"], "{kind}");
        let inspected = folder.succeeds(&["inspect", &model, "--json"]).json();
        assert_eq!(inspected["tied_embeddings"], json!(kind == "t5"));
        assert!(inspected["notes"][0].as_str().unwrap().contains("relative_attention_max_distance"));
    }
}

#[test]
fn no_row_is_too_long_for_distances_and_an_empty_input_is_told() {
    let folder = with_run();
    let long = "a tool that counts words and bytes of files ".repeat(60);
    let rows = [("", "words"), (&*long, "files")].map(|(input, output)| json!({ "input": input, "output": output }));
    folder.write("train.jsonl", format!("{}\n{}\n", rows[0], rows[1]));
    let set = ["run.yaml", "--set", "data.max_length=2000"];
    let told = "1 rows with an empty input: the encoder has nothing to read (lines 1)";
    assert!(folder.succeeds(&joined(&[&["data"], &set])).stdout.contains(told));
    let notes = folder.succeeds(&joined(&[&["train"], &set])).stderr;
    assert!(notes.contains(told) && !notes.contains("context"), "{notes}");
    let model = golden(MODEL);
    let answer = folder.succeeds(&["generate", "--model", &model, "--json", "--max-new-tokens", "2", &long]).json();
    assert!(answer["prompt_tokens"].as_u64().unwrap() > 512);
}

#[test]
fn a_run_that_goes_on_ends_with_the_bytes_of_one_left_alone() {
    let folder = with_run();
    for method in ["lora", "full", "prompt_tuning", "prefix_tuning", "ia3"] {
        let is_full = method == "full";
        let (file, set_method) = (if is_full { "full.yaml" } else { "run.yaml" }, format!("method={method}"));
        let run = |out: &str, more: &[&str]| {
            let output = format!("output_dir={out}");
            let mut flags = vec!["train", file, "--set", &output, "--set", &set_method];
            if method != "lora" && !is_full {
                flags.extend(["--set", "adapter={}"]);
            }
            folder.succeeds(&joined(&[&flags, more]));
        };
        let (whole, parts) = (format!("{method}-whole"), format!("{method}-parts"));
        run(&whole, &[]);
        run(&parts, &[]);
        // As if it had been stopped before its last checkpoint.
        std::fs::remove_dir_all(folder.path(&parts).join(if is_full { "model" } else { "adapter" })).unwrap();
        std::fs::remove_file(folder.path(&parts).join("checkpoints/step-00000012.safetensors")).unwrap();
        run(&parts, &["--resume"]);
        let name = if is_full { "model/model.safetensors" } else { "adapter/adapter_model.safetensors" };
        assert!(folder.read(&format!("{whole}/{name}")) == folder.read(&format!("{parts}/{name}")), "{method}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    let folder = with_run();
    folder.write("text.jsonl", "{\"text\": \"a tool\"}\n");
    folder
        .refuses(&["train", "run.yaml", "--set", "data.train=text.jsonl"], &["text.jsonl, line 1", "answers nothing"]);
    let turn = |role: &str| json!({ "role": role, "content": "a tool" });
    let turns = json!({ "messages": [turn("user"), turn("assistant"), turn("user"), turn("assistant")] });
    folder.write("chat.jsonl", format!("{turns}\n"));
    folder.refuses(&["train", "run.yaml", "--set", "data.train=chat.jsonl"], &["one question and its answer"]);
    folder.refuses(&["train", "run.yaml", "--set", "data.train_on_prompt=true"], &["prompts cannot be trained on"]);
    for set in ["adapter.target_modules=[shared]", "adapter.modules_to_save=[shared]"] {
        folder.refuses(&["train", "run.yaml", "--set", set], &["what PEFT lays on it has no effect"]);
    }
    let model = golden(MODEL);
    let logits = ["logits", "--model", &model, "--tokens", "5,9", "--out", "logits.safetensors"];
    folder.refuses(&logits, &["--labels, which are missing"]);
    folder.refuses(&joined(&[&logits, &["--labels", "-100"]]), &["nothing to predict"]);
    folder.refuses(&joined(&[&logits, &["--labels", "96"]]), &["outside the model's vocabulary of 96"]);
    folder.refuses(&["chat", "--model", &model], &["no conversation of several turns", "retune generate"]);
    folder.refuses(&["bench", "train", "--model", &model], &["which a model with an encoder does not read"]);
    let prefix = ["train", "run.yaml", "--set", "method=prefix_tuning", "--set", "adapter={}"];
    folder.copy("flan_t5", "flan");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        folder.write(&format!("flan/{file}"), std::fs::read(golden(&format!("{MODEL}/{file}"))).unwrap());
    }
    folder.refuses(&joined(&[&prefix, &["--set", "model=flan"]]), &["has no meaning in PEFT", "take another method"]);
    let rows = ["train", "run.yaml", "--set", "model=flan", "--set", "adapter.trainable_token_indices=[5]"];
    folder.refuses(&rows, &["names rows of shared", "that is a head of its own", "rows of lm_head alone"]);
}
