//! What an adapter says of the base it was trained on, held against the base it is used on.

mod common;

use std::fs;

use common::{Folder, MODEL, golden, joined};

/// A folder with an adapter in `out/adapter`, and the model it was trained on, changed, in `other.gguf`: one text in place of another of
/// the same length.
fn trained(from: &str, to: &str) -> Folder {
    let folder = Folder::with_run();
    folder.succeeds(&["train", "run.yaml", "--set", "training.max_steps=1"]);
    let mut model = fs::read(golden(MODEL)).unwrap();
    assert_eq!(from.len(), to.len());
    let mut found = 0;
    for at in 0..model.len() - from.len() {
        if model[at..].starts_with(from.as_bytes()) {
            model[at..at + to.len()].copy_from_slice(to.as_bytes());
            found += 1;
        }
    }
    assert!(found > 0, "{from} is not in the model");
    folder.write("other.gguf", model);
    folder
}

const EVAL: [&str; 5] = ["eval", "--data", "eval.jsonl", "--adapter", "out/adapter"];

#[test]
fn an_adapter_on_its_own_base_is_used_without_a_word() {
    let folder = trained("<|endoftext|>", "<|endoftext|>");
    let model = golden(MODEL);
    for model in [model.as_str(), "other.gguf"] {
        let output = folder.succeeds(&joined(&[&EVAL, &["--model", model]]));
        assert!(!output.stderr.contains("was trained"), "{model}: {}", output.stderr);
    }
}

#[test]
fn an_adapter_of_another_tokenizer_is_refused() {
    let folder = trained("<|endoftext|>", "<|endofpage|>");
    let model = golden(MODEL);
    let words = ["out/adapter", "another tokenizer than that of other.gguf", "give it", &model, "with that tokenizer"];
    let on_other = ["--model", "other.gguf"];
    folder.refuses(&joined(&[&EVAL, &on_other]), &words);
    let adapter = ["--adapter", "out/adapter"];
    folder.refuses(&joined(&[&["generate", "hello"], &on_other, &adapter]), &words);
    folder.refuses(&joined(&[&["merge", "--out", "merged"], &on_other, &adapter]), &words);
    let more = ["--set", "model=other.gguf", "--set", "adapter_init=out/adapter", "--set", "output_dir=more"];
    folder.refuses(&joined(&[&["train", "run.yaml"], &more]), &words);
}

#[test]
fn an_adapter_of_another_chat_template_is_used_with_a_warning() {
    let folder = trained("assistant", "assistent");
    let output = folder.succeeds(&joined(&[&EVAL, &["--model", "other.gguf"]]));
    let warning = "out/adapter was trained with another chat template than that of other.gguf";
    assert!(output.stderr.contains(warning), "{}", output.stderr);
    assert_eq!(output.stderr.matches("was trained").count(), 1, "{}", output.stderr);
}
