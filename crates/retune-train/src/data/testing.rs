//! A small tokenizer for the tests of this folder: the 256 bytes, the merge of "a" and "b", four special tokens.

use retune_text::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// The chat template of [`tokenizer`].
pub(super) const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

pub(super) fn tokenizer() -> Tokenizer {
    tokenizer_with(Some(CHATML))
}

/// BOS is `<s>`, put before texts; EOS is `</s>`, and `<|im_end|>` where the chat template writes it.
pub(super) fn tokenizer_with(chat_template: Option<&str>) -> Tokenizer {
    const SPECIAL: [&str; 4] = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (256..).filter_map(char::from_u32);
    let bytes = (0..=255u8).filter(|&byte| prints(byte)).map(char::from).chain(others).take(256).map(String::from);
    let tokens = SPECIAL.map(str::to_owned).into_iter().chain(bytes).chain(["ab".to_owned()]);
    let vocab: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [["a", "b"]]
        }
    });
    let mut config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    if let Some(template) = chat_template {
        config["chat_template"] = template.into();
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_dir(dir.path()).unwrap()
}
