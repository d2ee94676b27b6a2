//! A tokenizer as a GGUF file holds it: what `gguf.rs` reads, the other way round.
//!
//! A file has a name for how texts are split, and flags for what is put around them; a tokenizer that these cannot say is refused. What is
//! said is what llama.cpp's converter says of such a tokenizer. One of SentencePiece's kind has a score for each token there; here it has
//! merges, whose order is the scores' order.

use std::collections::HashMap;

use serde_json::Value;

use super::Tokenizer;
use super::gguf::{CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use super::pre_tokenizer::Rule;
use crate::error::Error;

const BYTE: i32 = 6;

/// What the `tokenizer.*` keys of a GGUF file say.
#[derive(Debug)]
pub struct GgufVocabulary {
    /// "gpt2" or "llama".
    pub model: &'static str,
    pub pre: &'static str,
    /// As many as the model has rows.
    pub tokens: Vec<String>,
    pub types: Vec<i32>,
    pub scores: Option<Vec<f32>>,
    pub merges: Option<Vec<String>>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Another token that ends an answer.
    pub eot: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    pub add_bos: bool,
    pub add_eos: bool,
    pub add_space_prefix: Option<bool>,
    pub chat_template: Option<String>,
}

impl Tokenizer {
    /// What a GGUF file of a model with `rows` embeddings says of this tokenizer.
    ///
    /// # Errors
    /// A tokenizer that is no BPE, splits texts in a way that has no name in llama.cpp, or has more tokens than there are rows.
    pub fn to_gguf(&self, rows: usize) -> Result<GgufVocabulary, Error> {
        let json = self.to_json()?;
        let model = &json["model"];
        let unsupported = |cause: String| Error::NoGgufTokenizer { cause };
        if model["type"] != "BPE" {
            return Err(unsupported(format!("its model is {}, not BPE", model["type"])));
        }
        if self.vocab_size() > rows {
            let cause = format!("it has {} tokens, and the model {rows} embeddings", self.vocab_size());
            return Err(unsupported(cause));
        }
        let merges = merges(model);
        let (mut tokens, mut types) = self.tokens(&json, rows);
        let is_sentence_piece = model["byte_fallback"] == true;
        let (pre, scores, written_merges, add_space_prefix) = if is_sentence_piece {
            let prefixes = space_prefix(&json).map_err(unsupported)?;
            for (token, kind) in tokens.iter().zip(&mut types).filter(|(_, kind)| **kind == NORMAL) {
                if token.len() == 6 && token.starts_with("<0x") && token.ends_with('>') {
                    *kind = BYTE;
                }
            }
            if let Some(id) = self.special.unk.as_deref().and_then(|unk| self.token_to_id(unk)) {
                types[id as usize] = UNKNOWN;
            }
            ("default", Some(scores(&tokens, &merges)), None, Some(prefixes))
        } else {
            let Some(rule) = Rule::of(&json["normalizer"], &json["pre_tokenizer"], model["ignore_merges"] == true)
            else {
                return Err(unsupported(format!("it splits texts by {}", shortened(&json["pre_tokenizer"]))));
            };
            let joined = merges.iter().map(|(left, right)| format!("{} {}", spelled(left), spelled(right)));
            (rule.name(), None, Some(joined.collect()), None)
        };
        // llama.cpp looks for these in texts as they are written there.
        for (token, _) in tokens.iter_mut().zip(&types).filter(|(_, kind)| **kind == USER_DEFINED) {
            *token = token.replace('▁', " ");
        }
        let id = |token: &Option<String>| token.as_deref().and_then(|token| self.token_to_id(token));
        let eos = id(&self.special.eos).or(self.eos_token_ids.first().copied());
        let (plain, whole) = (self.encode("a")?, self.encode_with_special_tokens("a")?);
        let around = whole.len() - plain.len();
        let add_bos = around > 0 && whole.first().copied() == self.bos_token_id && self.bos_token_id.is_some();
        let add_eos = around > 0 && whole.last().copied() == eos && eos.is_some();
        if around != usize::from(add_bos) + usize::from(add_eos) {
            return Err(unsupported("it puts more around a text than the tokens that begin and end it".to_owned()));
        }
        Ok(GgufVocabulary {
            model: if is_sentence_piece { "llama" } else { "gpt2" },
            pre,
            tokens,
            types,
            scores,
            merges: written_merges,
            bos: self.bos_token_id,
            eos,
            eot: self.eos_token_ids.iter().copied().find(|&id| Some(id) != eos),
            unk: id(&self.special.unk),
            pad: id(&self.special.pad),
            add_bos,
            add_eos,
            add_space_prefix,
            chat_template: self.chat_template.as_ref().map(|template| template.source().to_owned()),
        })
    }

    /// The tokens by id, and what kind each is of.
    fn tokens(&self, json: &Value, rows: usize) -> (Vec<String>, Vec<i32>) {
        let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED; rows];
        for (token, id) in self.backend.tokenizer.get_vocab(true) {
            (tokens[id as usize], types[id as usize]) = (token, NORMAL);
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let Some(id) = added["id"].as_u64().map(|id| id as usize).filter(|&id| id < rows) else { continue };
            let is_control = added["special"] == true || looks_special(&tokens[id]);
            types[id] = if is_control { CONTROL } else { USER_DEFINED };
        }
        (tokens, types)
    }
}

/// Tokens that mark something whatever their files say, as llama.cpp's converter sees it.
fn looks_special(token: &str) -> bool {
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&token)
        || [("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")]
            .iter()
            .any(|(a, b)| token.starts_with(a) && token.ends_with(b))
}

/// The merges of a model, in either spelling.
fn merges(model: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pair = |merge: &Value| match merge {
        Value::Array(pair) => Some((text(pair.first()?), text(pair.get(1)?))),
        Value::String(merge) => merge.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())),
        _ => None,
    };
    model["merges"].as_array().into_iter().flatten().filter_map(pair).collect()
}

/// A space within a part of a merge as byte-level vocabularies spell it.
fn spelled(part: &str) -> String {
    part.replace(' ', "Ġ")
}

/// A score for each token: tokens that are merged earlier have a higher one, and those that nothing is merged to the least of all.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let rank = |(id, token): (usize, &String)| ranks.get(token).copied().unwrap_or(merges.len() + id);
    tokens.iter().enumerate().map(|pair| -(rank(pair) as f32)).collect()
}

/// Whether a space is put before each text, in a tokenizer whose spaces become `▁`.
fn space_prefix(json: &Value) -> Result<bool, String> {
    let list = |value: &Value, of: &str| match &value[of] {
        Value::Array(parts) => parts.clone(),
        _ if value.is_null() => Vec::new(),
        _ => vec![value.clone()],
    };
    let (mut prefixes, mut replaces) = (false, false);
    for part in list(&json["normalizer"], "normalizers") {
        match part["type"].as_str() {
            Some("Prepend") if part["prepend"] == "▁" => prefixes = true,
            Some("Replace") if part["pattern"]["String"] == " " && part["content"] == "▁" => replaces = true,
            _ => return Err(format!("it changes texts by {}", shortened(&part))),
        }
    }
    for part in list(&json["pre_tokenizer"], "pretokenizers") {
        match part["type"].as_str() {
            Some("Metaspace") if part["replacement"] == "▁" => {
                replaces = true;
                prefixes = part["prepend_scheme"] != "never";
            }
            // Gemma's: there are no spaces any more.
            Some("Split") if part["pattern"]["String"] == " " && replaces => {}
            _ => return Err(format!("it splits texts by {}", shortened(&part))),
        }
    }
    if replaces { Ok(prefixes) } else { Err("it keeps spaces as they are".to_owned()) }
}

fn shortened(json: &Value) -> String {
    json.to_string().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fixture;
    use super::*;

    #[test]
    fn tokens_have_their_kinds_and_rows_without_one_a_name() {
        let tokenizer = fixture::byte_level();
        let size = tokenizer.vocab_size();
        let vocabulary = tokenizer.to_gguf(size + 2).unwrap();
        assert_eq!((vocabulary.model, vocabulary.tokens.len()), ("gpt2", size + 2));
        assert_eq!(vocabulary.tokens[size], format!("[PAD{size}]"));
        assert_eq!(vocabulary.types[size..], [UNUSED; 2]);
        let id = |token: &str| tokenizer.token_to_id(token).unwrap() as usize;
        assert_eq!((vocabulary.types[id("<|im_end|>")], vocabulary.types[id("ab")]), (CONTROL, NORMAL));
        assert!(vocabulary.merges.unwrap().contains(&"a b".to_owned()) && vocabulary.scores.is_none());
        assert!(tokenizer.to_gguf(size - 1).unwrap_err().to_string().contains("embeddings"));
    }

    #[test]
    fn scores_are_in_the_order_of_merges() {
        let tokens = ["a", "b", "bc", "abc", "c"].map(str::to_owned);
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let scores = scores(&tokens, &[pair("b", "c"), pair("a", "bc")]);
        assert_eq!(scores, [-2.0, -3.0, 0.0, -1.0, -6.0]);
    }

    #[test]
    fn spaces_are_put_before_texts_where_either_form_says_so() {
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        let of = |normalizer: Value, pre: Value| space_prefix(&json!({"normalizer": normalizer, "pre_tokenizer": pre}));
        let sequence = |parts: Vec<Value>| json!({"type": "Sequence", "normalizers": parts});
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme});
        assert_eq!(of(sequence(vec![prepend, replace.clone()]), Value::Null), Ok(true));
        assert_eq!(of(replace.clone(), json!({"type": "Split", "pattern": {"String": " "}})), Ok(false));
        assert_eq!(of(Value::Null, metaspace("first")), Ok(true));
        assert_eq!(of(Value::Null, metaspace("never")), Ok(false));
        assert!(of(Value::Null, Value::Null).is_err());
        assert!(of(json!({"type": "Lowercase"}), Value::Null).unwrap_err().contains("Lowercase"));
    }
}
