//! The tokenizer files of a Hugging Face model directory.

use std::path::Path;

use retune_formats::files::read_json;
use serde_json::Value;
use tokenizers::AddedToken;

use super::backend::ExtraToken;
use super::{Parts, Source, SpecialTokens};
use crate::error::Error;

pub(super) const TOKENIZER_FILE: &str = "tokenizer.json";
pub(super) const CONFIG_FILE: &str = "tokenizer_config.json";

/// What tokenizers are kept in where there is no `tokenizer.json`.
const OTHER_FILES: &[&str] =
    &["tokenizer.model", "tekken.json", "vocab.json", "spiece.model", "sentencepiece.bpe.model"];

/// transformers writes 1e30 for "no limit".
const NO_LIMIT: u64 = 1 << 40;

/// Reads the tokenizer files of `dir`. Errors name the file.
pub(super) fn read(dir: &Path) -> Result<Parts, Error> {
    let json = read_optional(dir, TOKENIZER_FILE)?.ok_or_else(|| missing(dir))?;
    let config = read_optional(dir, CONFIG_FILE)?.unwrap_or_default();
    let special_map = read_optional(dir, "special_tokens_map.json")?.unwrap_or_default();
    let generation = read_optional(dir, "generation_config.json")?.unwrap_or_default();
    let model = read_optional(dir, "config.json")?.unwrap_or_default();

    let named = |key: &str| config.get(key).and_then(token_text).or_else(|| special_map.get(key).and_then(token_text));
    let special = SpecialTokens {
        bos: named("bos_token"),
        eos: named("eos_token"),
        unk: named("unk_token"),
        pad: named("pad_token"),
    };
    let length = config.get("model_max_length").and_then(Value::as_u64).filter(|&length| length < NO_LIMIT);
    Ok(Parts {
        source: Source::Json(json, extra_tokens(&config, &special_map, &special)),
        special,
        stop_ids: [&generation, &model].into_iter().flat_map(stop_ids).collect(),
        chat_template: chat_template(dir, &config)?,
        model_max_length: length.or_else(|| model.get("max_position_embeddings").and_then(Value::as_u64)),
        note: None,
    })
}

fn read_optional(dir: &Path, name: &str) -> Result<Option<Value>, Error> {
    let path = dir.join(name);
    if path.exists() { Ok(Some(read_json(&path)?)) } else { Ok(None) }
}

fn missing(dir: &Path) -> Error {
    match OTHER_FILES.iter().find(|file| dir.join(file).exists()) {
        Some(file) => Error::TokenizerNotConverted { dir: dir.to_owned(), found: (*file).to_owned() },
        None => Error::TokenizerMissing { dir: dir.to_owned() },
    }
}

/// A token is its text, or an object that holds it.
fn token_text(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// Tokens that transformers recognises though `tokenizer.json` may not list them.
fn extra_tokens(config: &Value, special_map: &Value, special: &SpecialTokens) -> Vec<ExtraToken> {
    let mut extra = Vec::new();
    for (id, token) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        let (Ok(id), Some(content)) = (id.parse(), token_text(token)) else { continue };
        let flag = |key: &str, default: bool| token.get(key).and_then(Value::as_bool).unwrap_or(default);
        let is_special = flag("special", false);
        let token = AddedToken::from(content, is_special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !is_special));
        extra.push(ExtraToken { token, id: Some(id) });
    }
    let lists = [config, special_map].into_iter().filter_map(|json| json.get("additional_special_tokens")?.as_array());
    let SpecialTokens { bos, eos, unk, pad } = special;
    let named = [bos, eos, unk, pad].into_iter().flatten().cloned();
    for content in named.chain(lists.flatten().filter_map(token_text)) {
        if extra.iter().all(|other| other.token.content != content) {
            extra.push(ExtraToken { token: AddedToken::from(content, true), id: None });
        }
    }
    extra
}

/// `eos_token_id` is one id or a list of them.
fn stop_ids(config: &Value) -> Vec<u32> {
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The file of its own goes before the config's template, which is a text or a list of named ones; of these the default is
/// taken, or the only one.
fn chat_template(dir: &Path, config: &Value) -> Result<Option<String>, Error> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        return std::fs::read_to_string(&path).map(Some).map_err(|error| Error::Read { path, error });
    }
    let template = match config.get("chat_template") {
        Some(Value::Array(named)) => {
            let default = named.iter().find(|one| one.get("name").and_then(Value::as_str) == Some("default"));
            let only = named.first().filter(|_| named.len() == 1);
            default.or(only).and_then(|one| one.get("template"))
        }
        other => other,
    };
    Ok(template.and_then(Value::as_str).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::tokenizer::{Tokenizer, fixture};

    /// A directory with the byte-level fixture's `tokenizer.json` and the given other files.
    fn directory(files: &[(&str, Value)]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fixture::byte_level().save(dir.path()).unwrap();
        std::fs::remove_file(dir.path().join(CONFIG_FILE)).unwrap();
        for (name, json) in files {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
        dir
    }

    fn load(files: &[(&str, Value)]) -> Tokenizer {
        Tokenizer::from_dir(directory(files).path()).unwrap()
    }

    #[test]
    fn a_directory_without_a_tokenizer_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err();
        assert!(matches!(error, Error::TokenizerMissing { .. }), "{error}");
        std::fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err();
        assert!(
            error.to_string().contains("tokenizer.model") && error.to_string().contains("save_pretrained"),
            "{error}"
        );
    }

    #[test]
    fn damaged_files_are_named() {
        let dir = directory(&[]);
        let whole = std::fs::read(dir.path().join(TOKENIZER_FILE)).unwrap();
        for length in (0..whole.len()).step_by(whole.len() / 40) {
            std::fs::write(dir.path().join(TOKENIZER_FILE), &whole[..length]).unwrap();
            let error = Tokenizer::from_dir(dir.path()).unwrap_err();
            assert!(error.to_string().contains(TOKENIZER_FILE), "{error}");
        }
        std::fs::write(dir.path().join(TOKENIZER_FILE), "{\"model\": {}}").unwrap();
        assert!(Tokenizer::from_dir(dir.path()).unwrap_err().to_string().contains(TOKENIZER_FILE));
        let dir = directory(&[(CONFIG_FILE, json!({}))]);
        std::fs::write(dir.path().join(CONFIG_FILE), "{").unwrap();
        assert!(Tokenizer::from_dir(dir.path()).unwrap_err().to_string().contains(CONFIG_FILE));
    }

    #[test]
    fn special_tokens_come_as_text_or_as_objects_from_either_file() {
        let tokenizer = load(&[
            (
                CONFIG_FILE,
                json!({"bos_token": {"content": "<|im_start|>"}, "pad_token": null, "model_max_length": 1e30}),
            ),
            ("special_tokens_map.json", json!({"bos_token": "ab", "eos_token": "<|im_end|>", "unk_token": "<absent>"})),
        ]);
        assert_eq!(tokenizer.bos_token_id(), tokenizer.token_to_id("<|im_start|>"));
        assert_eq!(tokenizer.eos_token_ids(), [tokenizer.token_to_id("<|im_end|>").unwrap()]);
        assert!(tokenizer.special.unk.is_none() && tokenizer.special.pad.is_none());
        assert_eq!(tokenizer.model_max_length, None);
    }

    #[test]
    fn every_file_may_name_ids_that_end_generation() {
        let tokenizer = load(&[
            (CONFIG_FILE, json!({"eos_token": "<|im_end|>"})),
            ("generation_config.json", json!({"eos_token_id": [2, 0, 999999, -1, "x"]})),
            ("config.json", json!({"eos_token_id": 5, "max_position_embeddings": 64})),
        ]);
        assert_eq!(tokenizer.eos_token_ids(), [2, 0, 5]);
        assert_eq!(tokenizer.model_max_length, Some(64));
    }

    #[test]
    fn the_template_file_goes_before_the_configs_default() {
        let named =
            json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
        let dir = directory(&[(CONFIG_FILE, named)]);
        let source = || Tokenizer::from_dir(dir.path()).unwrap().chat_template().unwrap().source().to_owned();
        assert_eq!(source(), "d");
        std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
        assert_eq!(source(), "file");
        assert_eq!(load(&[(CONFIG_FILE, json!({"chat_template": "one"}))]).chat_template().unwrap().source(), "one");
        assert!(load(&[]).chat_template().is_none());
        let dir = directory(&[(CONFIG_FILE, json!({"chat_template": "{% if %}"}))]);
        assert!(Tokenizer::from_dir(dir.path()).unwrap_err().to_string().contains("chat template"));
    }

    #[test]
    fn tokens_of_the_config_are_recognised_in_texts() {
        let size = fixture::byte_level().vocab_size();
        let decoder = json!({"added_tokens_decoder": {
            size.to_string(): {"content": "<pad>", "special": true},
            "0": {"content": "<|endoftext|>", "special": true}
        }});
        let tokenizer = load(&[(CONFIG_FILE, decoder)]);
        assert_eq!(tokenizer.encode("a<pad>").unwrap()[1], size as u32);
        assert_eq!(tokenizer.vocab_size(), size + 1);
    }
}
