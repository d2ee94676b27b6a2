//! What happens to adapters after training: combined, merged, taken out again, looked at.

mod common;

use std::fs;
use std::path::Path;

use common::{ADAPTER, Folder, NO_TOKENIZER, golden, joined};
use safetensors::SafeTensors;
use serde_json::Value;

const TOKENS: &str = "5,17,3,88,41,2,60";

/// An adapter that peft made for `NO_TOKENIZER`.
fn small(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../retune-adapter/tests/goldens/combine");
    folder.join(name).to_str().unwrap().to_owned()
}

fn tensor(bytes: &[u8], name: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    file.tensor(name).unwrap().data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn logits(folder: &Folder, args: &[&str]) -> Vec<f32> {
    folder.succeeds(&joined(&[&["logits", "--tokens", TOKENS, "--out", "logits.safetensors"], args]));
    tensor(&folder.read("logits.safetensors"), "logits")
}

/// A copy of the model of `NO_TOKENIZER` with a tokenizer, which writing a model needs.
fn base(folder: &Folder) {
    folder.copy(NO_TOKENIZER, "base");
    let tokenizer = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": {"type": "BPE", "dropout": null,
        "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
        "byte_fallback": false, "ignore_merges": false, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}"#;
    folder.write("base/tokenizer.json", tokenizer);
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |largest, (a, b)| largest.max((a - b).abs()))
}

#[test]
fn a_merged_combination_is_the_combination_and_unmerging_gives_the_base_back() {
    let folder = Folder::with_run();
    base(&folder);
    let (one, three) = (format!("{}=0.7", small("one")), format!("{}=-0.5", small("three")));
    let combined =
        folder.succeeds(&["combine", "--adapter", &one, "--adapter", &three, "--out", "both", "--json"]).json();
    assert_eq!((&combined["kind"], &combined["rank"], &combined["modules"]), (&"exact".into(), &10.into(), &3.into()));
    assert_eq!(combined["difference"], 0.0);
    assert_eq!(combined["adapters"][1]["weight"], -0.5);

    let untouched = logits(&folder, &["--model", "base"]);
    let both = logits(&folder, &["--model", "base", "--adapter", "both"]);
    assert!(largest(&untouched, &both) > 0.1);
    folder.succeeds(&["merge", "--model", "base", "--adapter", "both", "--out", "merged"]);
    assert!(largest(&logits(&folder, &["--model", "merged"]), &both) < 1e-4);
    // The same by one adapter after the other.
    folder.succeeds(&["combine", "--adapter", &one, "--out", "first"]);
    folder.succeeds(&["combine", "--adapter", &three, "--out", "second"]);
    folder.succeeds(&["merge", "--model", "base", "--adapter", "first", "--out", "half"]);
    folder.succeeds(&["merge", "--model", "half", "--adapter", "second", "--out", "whole"]);
    assert!(largest(&logits(&folder, &["--model", "whole"]), &both) < 1e-4);

    folder.succeeds(&["unmerge", "--model", "merged", "--adapter", "both", "--out", "again"]);
    let name = "model.layers.0.self_attn.q_proj.weight";
    let weights = |path: &str| tensor(&folder.read(&format!("{path}/model.safetensors")), name);
    assert!(largest(&weights("merged"), &weights("base")) > 0.1);
    assert!(largest(&weights("again"), &weights("base")) < 1e-6);
    assert!(largest(&logits(&folder, &["--model", "again"]), &untouched) < 1e-4);
}

#[test]
fn every_kind_can_be_asked_for_and_the_difference_is_printed() {
    let folder = Folder::with_run();
    let (one, two) = (format!("{}=0.7", small("one")), format!("{}=0.3", small("two")));
    for (kind, more) in [
        ("exact", vec![]),
        ("linear", vec![]),
        ("cat", vec![]),
        ("svd", vec!["--svd-rank", "2"]),
        ("ties", vec!["--density", "0.5", "--majority-sign", "frequency"]),
        ("ties_svd", vec!["--density", "0.5"]),
        ("dare_linear", vec!["--density", "0.5", "--seed", "3"]),
        ("dare_linear_svd", vec!["--density", "0.5"]),
        ("dare_ties", vec!["--density", "0.5"]),
        ("dare_ties_svd", vec!["--density", "0.5"]),
        ("magnitude_prune", vec!["--density", "0.5"]),
        ("magnitude_prune_svd", vec!["--density", "0.5"]),
    ] {
        let args = ["combine", "--adapter", &one, "--adapter", &two, "--kind", kind, "--out", kind];
        let text = folder.succeeds(&joined(&[&args, &more])).stdout;
        let is_exact = text.contains("difference    none");
        assert_eq!(is_exact, ["exact", "cat"].contains(&kind), "{kind}: {text}");
        assert!(is_exact || text.contains("of the weighted sum of the changes"), "{kind}: {text}");
        let record: Value = serde_json::from_slice(&folder.read(&format!("{kind}/retune.json"))).unwrap();
        assert_eq!(record["combined"]["kind"], kind);
        logits(&folder, &["--model", &golden(NO_TOKENIZER), "--adapter", kind]);
    }
}

#[test]
fn what_cannot_be_combined_is_refused_and_leaves_nothing() {
    let folder = Folder::with_run();
    let (one, three) = (format!("{}=0.7", small("one")), format!("{}=0.5", small("three")));
    let saved = format!("{}=1", golden("lora_save_head/adapter"));
    let biased = format!("{}=1", golden("lora_bias_all/adapter"));
    let other = format!("{}=1", golden("gpt2_lora_all/adapter"));
    folder.copy("lora_all_linear/adapter", "full");
    for (adapters, more, words) in [
        (vec![&one, &three], vec!["--kind", "linear"], vec!["rank 4", "rank 6", "exact"]),
        (vec![&one], vec!["--kind", "ties"], vec!["density"]),
        (vec![&one], vec!["--density", "0.5"], vec!["density", "no effect"]),
        (vec![&one, &saved], vec![], vec!["lora_save_head", "lm_head", "merge"]),
        (vec![&one, &biased], vec![], vec!["lora_bias_all", "bias"]),
    ] {
        let mut args = vec!["combine", "--out", "x"];
        adapters.iter().for_each(|adapter| args.extend(["--adapter", adapter]));
        args.extend(more);
        folder.refuses(&args, &words);
    }
    folder.refuses(&["combine", "--adapter", &one, "--out", "full"], &["not empty"]);
    folder.refuses(&["combine", "--adapter", "nowhere=1", "--out", "x"], &["nowhere", "does not exist"]);
    for bad in [small("one"), format!("{}=much", small("one")), "=1".to_owned(), format!("{}=inf", small("one"))] {
        let output = folder.retune(&["combine", "--adapter", &bad, "--out", "x"]);
        assert!(output.code == Some(2) && output.stderr.contains("such as runs/a/adapter=0.7"), "{}", output.stderr);
    }
    // Modules of two models beside each other are for none.
    folder.succeeds(&["combine", "--adapter", &one, "--adapter", &other, "--out", "mixed"]);
    folder.refuses(
        &["logits", "--model", &golden(NO_TOKENIZER), "--tokens", "1,2", "--adapter", "mixed", "--out", "y"],
        &["mixed"],
    );
}

#[test]
fn adapters_of_different_tokenizers_are_not_combined() {
    let folder = Folder::with_run();
    for (name, hash) in [("a", "one"), ("b", "one"), ("c", "two")] {
        folder.copy("lora_all_linear/adapter", name);
        let record = format!(
            r#"{{"tokenizer_hash": "{hash}", "chat_template_hash": null, "run": {{"base_content_hash": "{name}"}}}}"#
        );
        folder.write(&format!("{name}/retune.json"), record);
    }
    let same = folder.succeeds(&["combine", "--adapter", "a=1", "--adapter", "b=0.5", "--out", "same"]);
    assert!(same.stderr.contains("different base weights"), "{}", same.stderr);
    let record: Value = serde_json::from_slice(&folder.read("same/retune.json")).unwrap();
    assert_eq!((&record["tokenizer_hash"], &record["run"]["base_content_hash"]), (&"one".into(), &"a".into()));
    assert!(record.get("chat_template_hash").is_some_and(Value::is_null));
    folder.refuses(&["combine", "--adapter", "a=1", "--adapter", "c=0.5", "--out", "x"], &["different tokenizers"]);
}

#[test]
fn what_was_trained_whole_cannot_be_unmerged() {
    let folder = Folder::with_run();
    folder.copy("llama_untied_mha", "base");
    fs::remove_file(folder.path("base/golden.safetensors")).unwrap();
    let adapter = golden("lora_save_head/adapter");
    folder.refuses(
        &["unmerge", "--model", "base", "--adapter", &adapter, "--out", "x"],
        &["cannot be taken out of base", "lm_head.weight was trained whole"],
    );
}

#[test]
fn inspect_tells_adapters_that_do_nothing_and_those_that_do_too_much() {
    let folder = Folder::with_run();
    let (model, adapter) = (golden(NO_TOKENIZER), golden(ADAPTER));
    let of = |path: &str, model: &str| folder.succeeds(&["inspect", path, "--model", model, "--json"]).json();
    let notes = |report: &Value| report["notes"].to_string();
    let q = "model.layers.0.self_attn.q_proj";

    let report = of(&adapter, &model);
    let module = &report["modules"][q];
    let (change, share) = (module["norm_change"].as_f64().unwrap(), module["change_over_weight"].as_f64().unwrap());
    let bytes = fs::read(Path::new(&model).join("model.safetensors")).unwrap();
    let weight: f64 = tensor(&bytes, &format!("{q}.weight")).iter().map(|&value| f64::from(value).powi(2)).sum();
    assert!(change > 0.1 && (share - change / weight.sqrt()).abs() < 1e-6 * share);

    // The same a hundred times stronger, and not at all.
    folder.succeeds(&["combine", "--adapter", &format!("{adapter}=100"), "--out", "strong"]);
    assert!(
        notes(&of("strong", &model)).contains("larger than the weight itself in 14 modules"),
        "{}",
        of("strong", &model)
    );
    folder.succeeds(&["combine", "--adapter", &format!("{adapter}=0"), "--out", "nothing"]);
    assert!(notes(&of("nothing", &model)).contains("every B is zero"));
    assert!(notes(&folder.succeeds(&["inspect", "nothing", "--json"]).json()).contains("every B is zero"));

    assert!(notes(&of(&adapter, &golden("gpt2"))).contains("none of its modules"));
    folder.copy(ADAPTER, "strange");
    let bytes = folder.read("strange/adapter_model.safetensors");
    let renamed = common::with_header(&bytes, |header| {
        let entries = std::mem::take(header.as_object_mut().unwrap());
        header
            .as_object_mut()
            .unwrap()
            .extend(entries.into_iter().map(|(key, value)| (key.replace("lora_", "x_"), value)));
    });
    folder.write("strange/adapter_model.safetensors", renamed);
    let report = folder.succeeds(&["inspect", "strange", "--json"]).json();
    assert!(notes(&report).contains("no tensor is an A or a B"), "{report}");
    folder.refuses(&["inspect", &model, "--model", &model], &["is no adapter"]);
}
