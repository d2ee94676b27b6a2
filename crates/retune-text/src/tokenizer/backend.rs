//! From the content of a `tokenizer.json` to a tokenizer of the `tokenizers` crate that can be trusted.
//!
//! The crate takes parts of the file at its word and indexes by it later, so what it does not check is checked here, and its
//! calls run guarded: a damaged file is an error, never a panic.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokenizers::models::bpe;
use tokenizers::models::unigram::Unigram;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};

/// No vocabulary in use comes near; ids above would only cost memory.
const MAX_ID: u64 = 1 << 24;

/// A checked tokenizer.
#[derive(Debug)]
pub(super) struct Backend {
    /// Without truncation, padding and post-processing: encoding gives the tokens of the text, all of them and no others,
    /// with their whole byte ranges (post-processing may cut the spaces off a range).
    pub(super) tokenizer: tokenizers::Tokenizer,
    /// Adds BOS and the like.
    pub(super) post_processor: Option<PostProcessorWrapper>,
    /// One more than the greatest id.
    pub(super) vocab_size: usize,
}

/// A token of the files beside `tokenizer.json`, to be recognised in texts even where `tokenizer.json` does not list it.
pub(super) struct ExtraToken {
    pub(super) token: AddedToken,
    /// The id it must have; a token without is taken only if the vocabulary has it.
    pub(super) id: Option<u32>,
}

thread_local! {
    /// Whether this thread is within a guarded call.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a call of the `tokenizers` crate; its errors and panics come back as text.
pub(super) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    // A panic that becomes an error is not to be printed as well. All others go where they went before.
    HOOK.call_once(|| {
        let previous = take_hook();
        set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                previous(info);
            }
        }));
    });
    let before = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(before);
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the tokenizer contradicts itself".to_owned()),
    }
}

/// A model as values: as JSON, a vocabulary of a quarter of a million tokens takes seconds and hundreds of megabytes.
pub(super) enum Model {
    Bpe(Bpe),
    Unigram {
        /// With their scores, in the order of ids.
        tokens: Vec<(String, f64)>,
        /// The id of what no token spells.
        unk: usize,
    },
}

/// A BPE model as values.
pub(super) struct Bpe {
    /// In the order of ids.
    pub(super) tokens: Vec<String>,
    pub(super) merges: Vec<(String, String)>,
    pub(super) unk_token: Option<String>,
    pub(super) fuse_unk: bool,
    pub(super) byte_fallback: bool,
    pub(super) ignore_merges: bool,
}

impl Model {
    fn build(self) -> tokenizers::Result<ModelWrapper> {
        match self {
            Model::Bpe(Bpe { tokens, merges, unk_token, fuse_unk, byte_fallback, ignore_merges }) => {
                let vocab: bpe::Vocab = tokens.into_iter().zip(0..).collect();
                let mut model = bpe::BPE::builder()
                    .vocab_and_merges(vocab, merges)
                    .fuse_unk(fuse_unk)
                    .byte_fallback(byte_fallback)
                    .ignore_merges(ignore_merges);
                if let Some(unk_token) = unk_token {
                    model = model.unk_token(unk_token);
                }
                Ok(model.build()?.into())
            }
            Model::Unigram { tokens, unk } => Ok(Unigram::from(tokens, Some(unk), false)?.into()),
        }
    }
}

/// Builds the tokenizer of a model and of `json`, a `tokenizer.json` without its model. Errors say what is wrong with it.
pub(super) fn build(model: Model, json: &Value) -> Result<Backend, String> {
    let tokenizer = guarded(|| {
        let mut tokenizer = tokenizers::Tokenizer::new(model.build()?);
        tokenizer.with_normalizer(part::<NormalizerWrapper>(json, "normalizer")?)?;
        tokenizer.with_pre_tokenizer(part::<PreTokenizerWrapper>(json, "pre_tokenizer")?);
        tokenizer.with_decoder(part::<DecoderWrapper>(json, "decoder")?);
        tokenizer.with_post_processor(part::<PostProcessorWrapper>(json, "post_processor")?);
        let added: Option<Vec<AddedToken>> = part(json, "added_tokens")?;
        tokenizer.add_tokens(added.unwrap_or_default())?;
        Ok(tokenizer)
    })?;
    finish(tokenizer, json, Vec::new())
}

/// A part of a `tokenizer.json`; `None` where it is missing or null.
fn part<T: DeserializeOwned>(json: &Value, key: &str) -> tokenizers::Result<Option<T>> {
    Ok(json.get(key).filter(|value| !value.is_null()).map(|value| T::deserialize(value)).transpose()?)
}

/// Builds the tokenizer that `json`, the content of a `tokenizer.json`, describes. Errors say what is wrong with it.
pub(super) fn load(mut json: Value, extra: Vec<ExtraToken>) -> Result<Backend, String> {
    let root = json.as_object_mut().ok_or("it holds no JSON object")?;
    // Lengths are the data set's business, and dropout in merging would give other tokens every time.
    root.insert("truncation".to_owned(), Value::Null);
    root.insert("padding".to_owned(), Value::Null);
    let model = root.get_mut("model").and_then(Value::as_object_mut).ok_or("it has no \"model\" object")?;
    if model.contains_key("dropout") {
        model.insert("dropout".to_owned(), Value::Null);
    }
    if model.contains_key("merges") {
        check_merges(model)?;
    }
    let text = json.to_string();
    let tokenizer = guarded(|| text.parse::<tokenizers::Tokenizer>())?;
    drop(text);
    finish(tokenizer, &json, extra)
}

/// Checks what the crate does not, adds what stands beside `tokenizer.json`, and takes the post-processing apart.
fn finish(mut tokenizer: tokenizers::Tokenizer, json: &Value, extra: Vec<ExtraToken>) -> Result<Backend, String> {
    check_added_ids(&tokenizer, json)?;
    add_extra(&mut tokenizer, extra)?;
    let vocab_size = match tokenizer.get_vocab(true).into_values().max() {
        Some(id) if u64::from(id) < MAX_ID => id as usize + 1,
        Some(id) => return Err(format!("it has a token with id {id}, the greatest possible is {}", MAX_ID - 1)),
        None => return Err("its vocabulary is empty".to_owned()),
    };
    if let Some(processor) = json.get("post_processor") {
        check_post_processor(processor, vocab_size)?;
    }
    let post_processor = tokenizer.get_post_processor().cloned();
    tokenizer.with_post_processor(None::<PostProcessorWrapper>);
    Ok(Backend { tokenizer, post_processor, vocab_size })
}

/// Every merge must join two tokens of the vocabulary into a third.
fn check_merges(model: &serde_json::Map<String, Value>) -> Result<(), String> {
    let vocab = model.get("vocab").and_then(Value::as_object).ok_or("its model has merges but no \"vocab\" object")?;
    let merges = model.get("merges").and_then(Value::as_array).ok_or("its merges are not a list")?;
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or("");
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        if merge.as_str().is_some_and(|line| line.starts_with("#version")) {
            continue;
        }
        let (left, right) =
            merge_pair(merge).ok_or_else(|| format!("merge {rank}, {merge}, is not a pair of tokens"))?;
        let tail =
            right.get(prefix.len()..).ok_or_else(|| format!("merge {rank}, {merge}, lacks the prefix {prefix:?}"))?;
        joined.clear();
        joined.push_str(left);
        joined.push_str(tail);
        if let Some(unknown) = [left, right, joined.as_str()].into_iter().find(|token| !vocab.contains_key(*token)) {
            return Err(format!("merge {rank}, {merge}, needs the token {unknown:?}, which is not in its vocabulary"));
        }
    }
    Ok(())
}

/// A merge is `["a", "b"]`, in older files `"a b"`.
fn merge_pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(line) => line.split_once(' ').filter(|(_, right)| !right.contains(' ')),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(left), Value::String(right)] => Some((left, right)),
            _ => None,
        },
        _ => None,
    }
}

/// The crate gives an added token that is new to the vocabulary the next free id, whatever id the file says.
fn check_added_ids(tokenizer: &tokenizers::Tokenizer, json: &Value) -> Result<(), String> {
    for token in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let stated = token.get("id").and_then(Value::as_u64);
        let Some(content) = token.get("content").and_then(Value::as_str).filter(|content| !content.is_empty()) else {
            continue;
        };
        let actual = tokenizer.token_to_id(content).map(u64::from);
        if stated != actual {
            let number = |id: Option<u64>| id.map_or("none".to_owned(), |id| id.to_string());
            return Err(format!(
                "it states id {} for the added token {content:?}, which its vocabulary has under id {}",
                number(stated),
                number(actual)
            ));
        }
    }
    Ok(())
}

fn add_extra(tokenizer: &mut tokenizers::Tokenizer, mut extra: Vec<ExtraToken>) -> Result<(), String> {
    extra.retain(|extra| {
        let added = tokenizer.get_added_vocabulary().get_vocab().contains_key(&extra.token.content);
        let in_vocabulary = tokenizer.token_to_id(&extra.token.content).is_some();
        !added && !extra.token.content.is_empty() && (in_vocabulary || extra.id.is_some())
    });
    extra.sort_by_key(|extra| extra.id);
    for ExtraToken { token, id } in extra {
        let content = token.content.clone();
        guarded(|| tokenizer.add_tokens([token]))?;
        let actual = tokenizer.token_to_id(&content);
        if id.is_some() && actual != id {
            return Err(format!(
                "tokenizer_config.json states id {} for {content:?}, which the vocabulary has under id {}",
                id.unwrap_or_default(),
                actual.unwrap_or_default()
            ));
        }
    }
    Ok(())
}

/// A post-processor may only name tokens it defines, with ids of the vocabulary, and only the one sequence it is given.
fn check_post_processor(processor: &Value, vocab_size: usize) -> Result<(), String> {
    let known = |id: &Value| id.as_u64().is_some_and(|id| id < vocab_size as u64);
    let list = |key: &str| processor.get(key).and_then(Value::as_array).into_iter().flatten();
    for inner in list("processors") {
        check_post_processor(inner, vocab_size)?;
    }
    for key in ["cls", "sep"] {
        if let Some(id) = processor.get(key).and_then(|pair| pair.get(1)).filter(|id| !known(id)) {
            return Err(format!("its post-processor adds token {id}, which is not in its vocabulary"));
        }
    }
    let tokens = processor.get("special_tokens");
    for piece in list("single") {
        if piece.pointer("/Sequence/id").and_then(Value::as_str) == Some("B") {
            return Err("its post-processor asks for a second text where there is one".to_owned());
        }
        let Some(name) = piece.pointer("/SpecialToken/id").and_then(Value::as_str) else { continue };
        let ids =
            tokens.and_then(|tokens| tokens.get(name)).and_then(|token| token.get("ids")).and_then(Value::as_array);
        if !ids.is_some_and(|ids| ids.iter().all(known)) {
            return Err(format!("its post-processor adds {name:?} without an id of the vocabulary"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn valid() -> Value {
        json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "normalizer": null,
            "pre_tokenizer": null,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}
            },
            "decoder": null,
            "model": {
                "type": "BPE", "dropout": 0.9, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]]
            }
        })
    }

    /// `valid()` with the value at a JSON pointer replaced.
    fn with(pointer: &str, value: Value) -> Value {
        let mut json = valid();
        *json.pointer_mut(pointer).unwrap() = value;
        json
    }

    fn error(json: Value) -> String {
        load(json, Vec::new()).err().unwrap()
    }

    #[test]
    fn dropout_and_truncation_of_the_file_have_no_effect() {
        let backend = load(valid(), Vec::new()).unwrap();
        for _ in 0..20 {
            assert_eq!(backend.tokenizer.encode("abab", false).unwrap().get_ids(), [2, 2]);
        }
        assert_eq!(backend.vocab_size, 4);
        assert!(backend.post_processor.is_some());
    }

    #[test]
    fn merges_in_the_older_spelling_are_read() {
        let backend = load(with("/model/merges", json!(["#version: 0.2", "a b"])), Vec::new()).unwrap();
        assert_eq!(backend.tokenizer.encode("ab", false).unwrap().get_ids(), [2]);
    }

    #[test]
    fn merges_outside_the_vocabulary_are_refused() {
        assert!(error(with("/model/merges", json!([["ab", "ab"]]))).contains("\"abab\""));
        assert!(error(with("/model/merges", json!([["a", "c"]]))).contains("\"c\""));
        assert!(error(with("/model/merges", json!(["a b c"]))).contains("merge 0"));
        assert!(error(with("/model/merges", json!([["a"]]))).contains("merge 0"));
        assert!(error(with("/model/continuing_subword_prefix", json!("##"))).contains("##"));
    }

    #[test]
    fn added_tokens_must_have_the_ids_they_state() {
        assert!(error(with("/added_tokens/0/id", json!(7))).contains("id 7"));
        assert!(error(with("/added_tokens/0/content", json!("<new>"))).contains("id 3"));
    }

    #[test]
    fn ids_far_beyond_any_vocabulary_are_refused() {
        assert!(error(with("/model/vocab/b", json!(u32::MAX))).contains("4294967295"));
        assert!(load(with("/model/vocab/b", json!(-1)), Vec::new()).is_err());
    }

    #[test]
    fn a_post_processor_must_keep_to_the_vocabulary() {
        assert!(error(with("/post_processor/special_tokens", json!({}))).contains("<s>"));
        assert!(error(with("/post_processor/special_tokens/<s>/ids", json!([9]))).contains("<s>"));
        assert!(error(with("/post_processor/single/1/Sequence/id", json!("B"))).contains("second text"));
        let nested = json!({"type": "Sequence", "processors": [with("/post_processor/special_tokens", json!({}))["post_processor"]]});
        assert!(error(with("/post_processor", nested)).contains("<s>"));
        let roberta = json!({"type": "RobertaProcessing", "sep": ["<s>", 99], "cls": ["<s>", 3], "trim_offsets": true, "add_prefix_space": false});
        assert!(error(with("/post_processor", roberta)).contains("99"));
    }

    #[test]
    fn nonsense_is_refused() {
        for json in [json!(null), json!([]), json!({}), json!({"model": 1}), json!({"model": {"type": "BPE"}})] {
            assert!(load(json, Vec::new()).is_err());
        }
        assert!(load(with("/model/vocab", json!({})), Vec::new()).is_err());
        assert!(load(with("/model/type", json!("Unknown")), Vec::new()).is_err());
        assert!(
            load(
                with(
                    "/pre_tokenizer",
                    json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false})
                ),
                Vec::new()
            )
            .is_err()
        );
    }

    #[test]
    fn tokens_of_the_files_beside_are_recognised() {
        let extra = |content: &str, id| ExtraToken { token: AddedToken::from(content, true), id };
        let backend = load(valid(), vec![extra("<pad>", Some(4)), extra("ab", None), extra("<absent>", None)]).unwrap();
        assert_eq!(backend.tokenizer.encode("a<pad>b", false).unwrap().get_ids(), [0, 4, 1]);
        assert_eq!(backend.vocab_size, 5);
        assert!(backend.tokenizer.token_to_id("<absent>").is_none());
        assert!(load(valid(), vec![extra("<pad>", Some(9))]).err().unwrap().contains("id 9"));
    }

    #[test]
    fn a_panic_of_the_library_is_an_error() {
        assert!(guarded::<()>(|| panic!("index out of bounds")).is_err());
    }

    #[test]
    fn a_guarded_panic_is_not_printed_and_others_are() {
        const CHILD: &str = "RETUNE_TEST_PANICS";
        if std::env::var_os(CHILD).is_some() {
            assert!(guarded::<()>(|| panic!("panic-inside")).is_err());
            assert!(catch_unwind::<_, ()>(|| panic!("panic-outside")).is_err());
            return;
        }
        // In a process of its own, whose standard error is this test's alone.
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "tokenizer::backend::tests::a_guarded_panic_is_not_printed_and_others_are",
                "--exact",
                "--nocapture",
            ])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{printed}");
        assert!(printed.contains("panic-outside") && !printed.contains("panic-inside"), "{printed}");
    }
}
