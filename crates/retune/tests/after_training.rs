//! What happens to adapters after training: combined, merged, taken out again, looked at.

mod common;

use std::fs;
use std::path::Path;

use common::{ADAPTER, Folder, MODEL, NO_TOKENIZER, golden, joined};
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
    assert!(notes(&of("nothing", &model)).contains("changes nothing yet"));
    assert!(notes(&folder.succeeds(&["inspect", "nothing", "--json"]).json()).contains("changes nothing yet"));

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

/// Trains an adapter for a step of no length in a folder of this name.
fn untrained(folder: &Folder, name: &str, more: &[&str]) {
    let output = format!("output_dir={name}");
    let short =
        ["--set", "training.max_steps=1", "--set", "training.learning_rate=1e-60", "--set", "data.eval_limit=1"];
    folder.succeeds(&joined(&[&["train", "run.yaml", "--set", &output], &short, more]));
}

#[test]
fn inspect_knows_of_every_method_whether_it_does_nothing_or_too_much() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let notes = |adapter: &str, more: &[&str]| {
        folder.succeeds(&joined(&[&["inspect", adapter, "--json"], more])).json()["notes"].to_string()
    };
    for (name, more) in [
        ("lora", vec![]),
        ("miss", vec!["--set", "method=miss", "--set", "adapter={r: 8}"]),
        ("ia3", vec!["--set", "method=ia3", "--set", "adapter=null"]),
        ("dora", vec!["--set", "adapter.use_dora=true"]),
    ] {
        untrained(&folder, name, &more);
        let adapter = format!("{name}/adapter");
        // Whether magnitudes change something only the base's weights say.
        let says = |text: &str| text.contains("changes nothing yet");
        assert_eq!(says(&notes(&adapter, &[])), name != "dora", "{name}");
        assert!(says(&notes(&adapter, &["--model", &model])), "{name}: {}", notes(&adapter, &["--model", &model]));
    }
    for name in ["dora", "ia3", "miss"] {
        let (adapter, base) = (golden(&format!("{name}/adapter")), golden(NO_TOKENIZER));
        let report = folder.succeeds(&["inspect", &adapter, "--model", &base, "--json"]).json();
        assert!(!report["notes"].to_string().contains("changes nothing"), "{name}: {report}");
        let modules = report["modules"].as_object().unwrap();
        let shares: Vec<f64> = modules.values().filter_map(|module| module["change_over_weight"].as_f64()).collect();
        assert!(!shares.is_empty() && shares.iter().all(|share| *share > 1e-3), "{name}: {report}");
        // What the plain LoRA of the same changes is found to do.
        let plain = format!("plain-{name}");
        let args = ["convert", &adapter, "--model", &base, "--to", "lora", "--energy", "1", "--out", &plain];
        folder.succeeds(&args);
        let plain = folder.succeeds(&["inspect", &plain, "--model", &base, "--json"]).json();
        for (module, of) in plain["modules"].as_object().unwrap() {
            let [ours, theirs] = [of, &modules[module]].map(|of| of["change_over_weight"].as_f64().unwrap());
            assert!((ours - theirs).abs() < 1e-3 * theirs, "{name}, {module}: {ours} and {theirs}");
        }
    }
    // A change of twice the weight.
    folder.copy("ia3/adapter", "strong");
    let bytes = folder.read("strong/adapter_model.safetensors");
    let start = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let strong = [&bytes[..start], &3.0f32.to_le_bytes().repeat((bytes.len() - start) / 4)].concat();
    folder.write("strong/adapter_model.safetensors", strong);
    let text = notes("strong", &["--model", &golden(NO_TOKENIZER)]);
    assert!(text.contains("larger than the weight itself in") && text.contains("2.0 times"), "{text}");
    // One that does not fit is looked at all the same.
    assert!(notes(&golden("ia3/adapter"), &["--model", &golden("llama_untied_mha")]).contains("another model"));
}

#[test]
fn inspect_shows_the_words_that_a_soft_prompt_is_near() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let start = "adapter={num_virtual_tokens: 7, prompt_tuning_init: TEXT, prompt_tuning_init_text: the sand of time}";
    untrained(&folder, "soft", &["--set", "method=prompt_tuning", "--set", start]);
    let report = folder.succeeds(&["inspect", "soft/adapter", "--model", &model, "--json"]).json();
    let ids = folder.succeeds(&["tokenize", "--model", &model, "--json", "the sand of time"]).json()["ids"].clone();
    let ids: Vec<_> = ids.as_array().unwrap().iter().cycle().take(7).cloned().collect();
    let found = report["virtual_tokens"].as_object().unwrap();
    assert_eq!(found.values().map(|token| token["token"].clone()).collect::<Vec<_>>(), ids);
    assert!(found.values().all(|token| (token["cosine"].as_f64().unwrap() - 1.0).abs() < 1e-6), "{report}");
    let text: String = found.values().map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(text, "the sand of t");
    // A prefix is near no word, and without the base nothing is known.
    assert!(folder.succeeds(&["inspect", "soft/adapter", "--json"]).json()["virtual_tokens"].is_null());
    let prefix = folder.succeeds(&["inspect", &golden("prefix/adapter"), "--model", &golden(NO_TOKENIZER), "--json"]);
    assert!(prefix.json()["virtual_tokens"].is_null());
}

#[test]
fn a_card_says_what_the_run_was_and_is_left_alone_once_edited() {
    let folder = Folder::with_run();
    let short = ["--set", "training.max_steps=4", "--set", "training.save_steps=2"];
    let train = |more: &[&str]| folder.retune(&joined(&[&["train", "run.yaml", "--json"], &short, more]));
    let report = train(&[]).json();
    let card = || String::from_utf8(folder.read("out/adapter/README.md")).unwrap();
    let front = "---\nbase_model: model.gguf\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n\
                 - base_model:adapter:model.gguf\n- lora\n- transformers\n---\n";
    assert!(card().starts_with(front), "{}", card());
    let number = |key: &str| report[key].as_f64().unwrap();
    for row in [
        "| method | lora |".to_owned(),
        "| `r` | 4 |".to_owned(),
        "| `lora_alpha` | 8.0 |".to_owned(),
        "| data | `train.jsonl` |".to_owned(),
        "| steps | 4 of 2 rows |".to_owned(),
        "| learning rate | 0.01 at most (cosine) |".to_owned(),
        "| held out | `eval.jsonl`, 4 rows |".to_owned(),
        format!("| trained parameters | {} |", report["trainable_parameters"]),
        format!("| held-out loss before | {:.4} |", number("held_out_loss_before")),
        format!("| held-out loss after | {:.4}, at step {} |", number("held_out_loss_after"), report["best_step"]),
        format!("| seconds | {:.0} |", number("seconds")),
        format!("| made with | retune {} |", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(card().contains(&row), "{row} is not in {}", card());
    }
    assert!(card().contains("| peak memory | ") && card().contains(" rows |") && card().contains("| rows | 30 with "));
    assert!(!card().contains("goldens") && !card().contains(folder.path("").to_str().unwrap()), "{}", card());

    // As it was written it is written again, where there was something to train.
    let first = card();
    let go_on = || {
        fs::remove_file(folder.path("out/checkpoints/step-00000004.safetensors")).unwrap();
        train(&["--resume"])
    };
    assert_eq!(go_on().code, Some(0));
    assert!(card().contains("since the run was last resumed") && card() != first);
    let mine = format!("{}\nMine.\n", card());
    folder.write("out/adapter/README.md", &mine);
    let again = go_on();
    assert!(again.code == Some(0) && again.stderr.contains("README.md was edited"), "{}", again.stderr);
    assert_eq!(card(), mine);
    folder.refuses(&joined(&[&["train", "run.yaml", "--overwrite"], &short]), &["README.md was edited", "move it"]);
    fs::remove_file(folder.path("out/adapter/README.md")).unwrap();
    assert_eq!(train(&["--overwrite"]).code, Some(0));
    assert!(card().starts_with(front));

    folder.succeeds(&["combine", "--adapter", "out/adapter=0.5", "--out", "half"]);
    folder.succeeds(&["convert", "half", "--to", "lora", "--rank", "2", "--out", "plain"]);
    for (name, words) in [("half", ["0.5 of `adapter`", "| kind | exact |"]), ("plain", ["`half`", "| `r` | 2 |"])] {
        let card = String::from_utf8(folder.read(&format!("{name}/README.md"))).unwrap();
        assert!(card.starts_with(front), "{card}");
        words.iter().for_each(|word| assert!(card.contains(word), "{word}: {card}"));
    }
}

/// Converts a fixture's adapter, and asserts that the program then computes what it did, up to `error`.
fn converts(name: &str, more: &[&str], error: f32) -> Value {
    let folder = Folder::with_run();
    let base = fs::read_to_string(golden(&format!("{name}/base.txt"))).unwrap();
    let (model, adapter) = (golden(base.trim()), golden(&format!("{name}/adapter")));
    let args = ["convert", &adapter, "--model", &model, "--to", "lora", "--out", "plain", "--json"];
    let summary = folder.succeeds(&joined(&[&args, more])).json();
    let config: Value = serde_json::from_slice(&folder.read("plain/adapter_config.json")).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&summary["rank"], &summary["rank"]), "{name}");
    for key in ["use_rslora", "use_dora", "rank_pattern", "alpha_pattern"] {
        assert!(config.get(key).is_none(), "{name}: {config}");
    }
    let untouched = logits(&folder, &["--model", &model]);
    let before = logits(&folder, &["--model", &model, "--adapter", &adapter]);
    let after = logits(&folder, &["--model", &model, "--adapter", "plain"]);
    assert!(largest(&untouched, &before) > 0.01, "{name}");
    assert!(largest(&before, &after) < error, "{name}: {}", largest(&before, &after));
    summary
}

#[test]
fn what_has_a_low_rank_becomes_a_plain_lora_without_loss() {
    for name in ["lora_rs", "lora_patterns", "miss", "miss_uneven", "miss_mini"] {
        assert_eq!(converts(name, &[], 1e-5)["error"], 0.0, "{name}");
    }
    // LoRA's own files say all there is to know.
    let folder = Folder::with_run();
    folder.succeeds(&["convert", &golden("lora_rs/adapter"), "--to", "lora", "--out", "plain"]);
}

#[test]
fn what_has_none_is_cut_and_the_error_is_that_of_what_is_lost() {
    for name in ["dora", "ia3", "ia3_save_head", "miss"] {
        let of = |more: &[&str], error| converts(name, more, error);
        // All of it: the model is 32 wide.
        let all = of(&["--energy", "1"], 1e-3);
        assert!(all["error"].as_f64().unwrap() < 1e-5, "{name}: {all}");
        let (some, one) = (of(&["--energy", "0.9"], 10.0), of(&["--rank", "1"], 10.0));
        let [some_error, one_error] = [&some, &one].map(|summary| summary["error"].as_f64().unwrap());
        assert!(0.0 < some_error && some_error.powi(2) < 0.1 + 1e-6, "{name}: {some}");
        assert!(one["rank"] == 1 && one_error > 0.1, "{name}: {one}");
        // The whole is what the modules are together.
        let sum = |of: &dyn Fn(&Value) -> f64| one["modules"].as_object().unwrap().values().map(of).sum::<f64>();
        let norm = |module: &Value| module["norm_change"].as_f64().unwrap();
        let away = |module: &Value| (norm(module) * module["error"].as_f64().unwrap()).powi(2);
        let whole = (sum(&away) / sum(&|module| norm(module).powi(2))).sqrt();
        assert!((whole - one_error).abs() < 1e-9, "{name}: {whole} and {one_error}");
    }
}

#[test]
fn weights_that_were_trained_in_their_place_are_cut_as_well() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let short =
        ["--set", "training.max_steps=3", "--set", "training.save_steps=3", "--set", "training.learning_rate=0.01"];
    let train = |name: &str, what: &str| {
        let (output, settings) = (format!("output_dir={name}"), format!("adapter={what}"));
        let args = ["train", "run.yaml", "--set", "method=partial", "--set", &settings, "--set", &output];
        folder.succeeds(&joined(&[&args, &short]));
    };
    train("part", "{modules: [down_proj]}");
    let card = String::from_utf8(folder.read("part/adapter/README.md")).unwrap();
    assert!(card.contains("library_name: retune") && !card.contains("PeftModel"), "{card}");
    let args = ["convert", "part/adapter", "--model", &model, "--to", "lora", "--out", "plain"];
    folder.succeeds(&joined(&[&args, &["--energy", "1"]]));
    let [before, after] = ["part/adapter", "plain"].map(|of| logits(&folder, &["--model", &model, "--adapter", of]));
    assert!(largest(&before, &after) < 1e-4 && largest(&before, &logits(&folder, &["--model", &model])) > 1e-2);
    train("norms", "{norms: true}");
    let args = ["convert", "norms/adapter", "--model", &model, "--to", "lora", "--rank", "4", "--out", "x"];
    folder.refuses(&args, &["trained in the base's place and is no weight of a linear"]);
}

/// A prefix that starts from a text is that text before every row, repeated or cut to as many tokens as the prefix has.
#[test]
fn a_prefix_that_starts_from_a_text_begins_as_the_text() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let ids = folder.succeeds(&["tokenize", "--model", &model, "--json", "the sand of time"]).json()["ids"].clone();
    let ids: Vec<u64> = ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    let row = "86,259,286,67,267,278";
    for count in [ids.len(), 2 * ids.len() + 3, 4] {
        let name = format!("prefix{count}");
        let start =
            format!("adapter={{num_virtual_tokens: {count}, prefix_init: text, prefix_init_text: the sand of time}}");
        untrained(&folder, &name, &["--set", "method=prefix_tuning", "--set", &start]);
        let text: Vec<String> = ids.iter().cycle().take(count).map(u64::to_string).collect();
        let of = |tokens: &str, more: &[&str]| {
            let args = ["logits", "--model", &model, "--tokens", tokens, "--out", "logits.safetensors"];
            folder.succeeds(&joined(&[&args, more]));
            tensor(&folder.read("logits.safetensors"), "logits")
        };
        let whole = of(&format!("{},{row}", text.join(",")), &[]);
        let after = of(row, &["--adapter", &format!("{name}/adapter")]);
        assert!(largest(&whole[whole.len() - after.len()..], &after) < 1e-4, "{count}");
        assert!(largest(&of(row, &[]), &after) > 0.01, "{count}");
    }
    let refuses = |settings: &str, words: &[&str]| {
        let settings = format!("adapter={settings}");
        folder.refuses(&["train", "run.yaml", "--set", "method=prefix_tuning", "--set", &settings], words);
    };
    refuses("{prefix_init: text}", &["adapter.prefix_init_text", "is missing or empty"]);
    refuses("{prefix_init_text: a}", &["adapter.prefix_init_text", "no effect without prefix_init text"]);
    refuses(
        "{prefix_init: text, prefix_init_text: a, prefix_projection: true}",
        &["adapter.prefix_init", "remove one"],
    );
    // Where a window forgets the beginning of so long a text, there are no keys to start from.
    let window = format!("model={}", golden("gguf_phi3_window/model.gguf"));
    let start = "adapter={num_virtual_tokens: 600, prefix_init: text, prefix_init_text: the sand of time}";
    let args = ["train", "run.yaml", "--set", &window, "--set", "method=prefix_tuning", "--set", start];
    folder.refuses(&args, &["a window of the model has let go of the first of 600 tokens", "num_virtual_tokens"]);
}

#[test]
fn the_difference_of_two_models_becomes_a_plain_lora() {
    let folder = Folder::with_run();
    base(&folder);
    let adapter = small("one");
    folder.succeeds(&["merge", "--model", "base", "--adapter", &adapter, "--out", "merged"]);
    let both = ["--merged", "merged", "--model", "base"];
    let summary =
        folder.succeeds(&joined(&[&["convert", "--to", "lora", "--rank", "4", "--out", "plain", "--json"], &both]));
    let summary = summary.json();
    assert!(summary["error"].as_f64().unwrap() < 1e-4 && summary["rank"] == 4, "{summary}");
    assert_eq!(summary["modules"].as_object().unwrap().len(), 2, "{summary}");
    assert_eq!(summary["left_out"].as_object().unwrap().len(), 0);
    let merged = logits(&folder, &["--model", "merged"]);
    let plain = logits(&folder, &["--model", "base", "--adapter", "plain"]);
    assert!(largest(&merged, &plain) < 1e-3, "{}", largest(&merged, &plain));

    // What is no weight of a linear is left out, and said.
    fs::create_dir(folder.path("normed")).unwrap();
    for entry in fs::read_dir(folder.path("merged")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path("normed").join(path.file_name().unwrap())).unwrap();
    }
    let bytes = folder.read("normed/model.safetensors");
    let start = common::offset(&bytes, "model.norm.weight");
    let mut changed = bytes.clone();
    changed[start..start + 4].copy_from_slice(&7.0f32.to_le_bytes());
    folder.write("normed/model.safetensors", changed);
    let args = ["convert", "--merged", "normed", "--model", "base", "--to", "lora", "--rank", "4", "--out", "cut"];
    let output = folder.succeeds(&args);
    assert!(output.stderr.contains("left out: model.norm.weight"), "{}", output.stderr);
    assert!(!output.stdout.contains("none of the whole change"), "{}", output.stdout);

    folder.refuses(&joined(&[&["convert", "--to", "lora", "--out", "x"], &both]), &["--rank", "--energy"]);
    let (none, other) = (["--merged", "base", "--model", "base"], golden("llama_untied_mha"));
    folder
        .refuses(&joined(&[&["convert", "--to", "lora", "--rank", "4", "--out", "x"], &none]), &["nothing to convert"]);
    let args = ["convert", "--to", "lora", "--rank", "4", "--out", "x", "--merged", "base", "--model", &other];
    folder.refuses(&args, &["other weights", "the base that it was made from"]);
}

#[test]
fn what_a_plain_lora_cannot_hold_is_refused() {
    let folder = Folder::with_run();
    let refuses = |name: &str, base: Option<&str>, more: &[&str], words: &[&str]| {
        let (adapter, model) = (golden(&format!("{name}/adapter")), base.map(golden));
        let mut args = vec!["convert", &adapter, "--to", "lora", "--out", "x"];
        args.extend(model.iter().flat_map(|model| ["--model", model]));
        folder.refuses(&joined(&[&args, more]), words);
    };
    refuses("dora", None, &["--rank", "4"], &["use_dora", "--model", "llama_tied"]);
    refuses("ia3", None, &["--rank", "4"], &["method ia3", "--model"]);
    refuses("dora", Some("llama_tied"), &[], &["any rank up to", "--energy"]);
    refuses("prompt", Some("llama_tied"), &[], &["soft prompt", "changes no weight"]);
    refuses("prefix", Some("llama_tied"), &[], &["soft prompt", "changes no weight"]);
    refuses("prefix", None, &[], &["method prefix_tuning", "changes no weight"]);
    refuses("ia3_save_head", Some("llama_untied_mha"), &[], &["any rank up to"]);
    refuses("lora_save_head", None, &[], &["modules that were trained whole"]);
    refuses("ia3_biases", Some("llama_bias"), &["--rank", "4"], &["factors on the bias of"]);
    refuses("lora_rs", None, &["--energy", "1.5"], &["share of the energy is 1.5"]);
    refuses("lora_rs", None, &["--rank", "0"], &["the rank is 0"]);
}
