//! The tokenizer inside a GGUF file.
//!
//! GGUF keeps a vocabulary, merges or scores, and flags, but no `tokenizer.json`; one is put together here that gives the ids
//! of the model's original tokenizer. Keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Where the file is
//! silent, llama.cpp's defaults hold.

use std::collections::{HashMap, HashSet};

use retune_formats::gguf::Metadata;
use serde_json::{Value, json};
use tokenizers::normalizers::Precompiled;

use super::backend::{self, Bpe, guarded};
use super::pre_tokenizer::{DEFAULT, Rule, known_names};
use super::{Parts, Source, SpecialTokens};
use crate::error::Error;

/// Values of `tokenizer.ggml.token_type`.
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;

/// Texts of tokens that end or mark a turn, or a gap to be filled. Such a token is special whatever the file says of it, as in llama.cpp.
const ALWAYS_SPECIAL: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// Said of a file without `tokenizer.ggml.pre`.
const UNNAMED_PRE_TOKENIZER: &str = "the GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre), so texts are split by llama.cpp's \
     default rule; the model may have learned another: convert it again with a current llama.cpp";

/// Tokens of Phi-3 after which white space counts; after its other special tokens it does not.
const PHI3_KEEPS_SPACE_AFTER: &[&str] = &["<unk>", "<s>", "<|endoftext|>"];

/// transformers' T5Tokenizer adds so many tokens behind the pieces, `<extra_id_99>` to `<extra_id_0>`.
const SENTINELS: usize = 100;
const SENTINEL: &str = "<extra_id_";

const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";

/// SentencePiece never merges anything near this long; splitting longer entries in all ways would only take time.
const MAX_MERGED_BYTES: usize = 1024;

/// What a GGUF file says of its tokenizer.
#[derive(Default)]
pub(super) struct Vocabulary<'a> {
    /// `gpt2`: byte-level merges; `llama`: SentencePiece with scores; `t5`: SentencePiece's Unigram.
    pub(super) model: &'a str,
    pub(super) pre: Option<&'a str>,
    /// Empty entries have a stand-in name.
    pub(super) tokens: Vec<String>,
    pub(super) types: Vec<i32>,
    pub(super) scores: Option<Vec<f32>>,
    pub(super) merges: Option<Vec<&'a str>>,
    /// SentencePiece's rules of normalisation, in its own form.
    pub(super) charsmap: Option<Vec<u8>>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unk: Option<u32>,
    pub(super) pad: Option<u32>,
    /// End of turn and end of message, where the file names them.
    pub(super) turn_ends: Vec<u32>,
    pub(super) add_bos: Option<bool>,
    pub(super) add_eos: Option<bool>,
    pub(super) add_space_prefix: Option<bool>,
    pub(super) chat_template: Option<&'a str>,
    pub(super) context_length: Option<u64>,
    /// Special tokens take the white space that follows them: Phi-3's do, and its file does not say so.
    pub(super) is_phi3: bool,
}

/// How the kinds of model differ.
struct Kind {
    model: backend::Model,
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    adds_bos: bool,
    adds_eos: bool,
}

fn missing(key: &str) -> Error {
    retune_formats::Error::GgufMissingKey { key: key.to_owned() }.into()
}

fn invalid(key: &'static str, cause: String) -> Error {
    Error::GgufVocabulary { key, cause }
}

impl<'a> Vocabulary<'a> {
    /// Reads and checks the `tokenizer.*` keys. Every id it returns is below the number of tokens.
    pub(super) fn read(metadata: &'a Metadata) -> Result<Vocabulary<'a>, Error> {
        let model = metadata.get_str("tokenizer.ggml.model")?.ok_or_else(|| missing("tokenizer.ggml.model"))?;
        let tokens =
            metadata.get_str_array("tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
        let mut tokens: Vec<String> = tokens
            .into_iter()
            .enumerate()
            .map(|(id, token)| if token.is_empty() { format!("[EMPTY_{id}]") } else { token.to_owned() })
            .collect();
        let mut types =
            metadata.get_i32_array("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        let mut scores = metadata.get_f32_array("tokenizer.ggml.scores")?;
        if model == "t5" {
            drop_stand_ins(&mut tokens, &mut types, scores.as_mut());
        }
        let id = |key: &'static str, default: Option<u32>| -> Result<Option<u32>, Error> {
            let known = |id: u32| (id as usize) < tokens.len();
            match metadata.get_u32(key)? {
                Some(id) if known(id) => Ok(Some(id)),
                // Some files write -1 for none. llama.cpp takes its default there.
                _ => Ok(default.filter(|&id| known(id))),
            }
        };
        // llama.cpp's.
        let [bos, eos, unk, pad] = match model {
            "llama" => [Some(1), Some(2), Some(0), None],
            "t5" => [None, Some(1), Some(2), Some(0)],
            _ => [None; 4],
        };
        let turn_ends = [id("tokenizer.ggml.eot_token_id", None)?, id("tokenizer.ggml.eom_token_id", None)?];
        let architecture = metadata.get_str("general.architecture")?.unwrap_or("llama");
        let name = metadata.get_str("general.name")?.unwrap_or_default().to_lowercase();
        let is_phi3 = model == "llama" && (architecture == "phi3" || name.contains("phi-3") || name.contains("phi3"));
        let vocabulary = Vocabulary {
            model,
            pre: metadata.get_str("tokenizer.ggml.pre")?,
            bos: id("tokenizer.ggml.bos_token_id", bos)?,
            eos: id("tokenizer.ggml.eos_token_id", eos)?,
            unk: id("tokenizer.ggml.unknown_token_id", unk)?,
            pad: id("tokenizer.ggml.padding_token_id", pad)?,
            turn_ends: turn_ends.into_iter().flatten().collect(),
            add_bos: metadata.get_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.get_bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.get_bool("tokenizer.ggml.add_space_prefix")?,
            merges: metadata.get_str_array("tokenizer.ggml.merges")?,
            charsmap: metadata.get_u8_array(CHARSMAP)?,
            chat_template: metadata.get_str("tokenizer.chat_template")?,
            context_length: metadata.get_u64(&format!("{architecture}.context_length"))?,
            tokens,
            types,
            scores,
            is_phi3,
        };
        vocabulary.check()?;
        Ok(vocabulary)
    }

    fn check(&self) -> Result<(), Error> {
        let count = self.tokens.len();
        if self.types.len() != count {
            return Err(invalid(
                "tokenizer.ggml.token_type",
                format!("{} entries for {count} tokens", self.types.len()),
            ));
        }
        if let Some(scores) = self.scores.as_ref().filter(|scores| scores.len() != count) {
            return Err(invalid("tokenizer.ggml.scores", format!("{} entries for {count} tokens", scores.len())));
        }
        let mut seen = HashSet::with_capacity(count);
        match self.tokens.iter().find(|token| !seen.insert(token.as_str())) {
            Some(token) => Err(invalid("tokenizer.ggml.tokens", format!("the token {token:?} twice"))),
            None => Ok(()),
        }
    }

    /// Everything a tokenizer is made of.
    pub(super) fn into_parts(self) -> Result<Parts, Error> {
        let kind = match self.model {
            "gpt2" => self.byte_level()?,
            "llama" => self.sentence_piece()?,
            "t5" => self.unigram()?,
            other => return Err(Error::GgufTokenizerModel { model: other.to_owned() }),
        };
        let json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": kind.normalizer,
            "pre_tokenizer": kind.pre_tokenizer,
            "post_processor": self.post_processor(kind.adds_bos, kind.adds_eos)?,
            "decoder": kind.decoder,
        });
        let is_split_by_guess = self.model == "gpt2" && self.pre.is_none();
        Ok(Parts {
            source: Source::Model(kind.model, json),
            special: SpecialTokens {
                bos: self.text(self.bos),
                eos: self.text(self.eos),
                unk: self.text(self.unk),
                pad: self.text(self.pad),
            },
            stop_ids: self.turn_ends,
            chat_template: self.chat_template.map(str::to_owned),
            model_max_length: self.context_length,
            note: is_split_by_guess.then_some(UNNAMED_PRE_TOKENIZER),
        })
    }

    fn text(&self, id: Option<u32>) -> Option<String> {
        id.and_then(|id| self.tokens.get(id as usize)).cloned()
    }

    /// Byte-level BPE, as GPT-2 and Llama 3 have it.
    fn byte_level(&self) -> Result<Kind, Error> {
        let name = self.pre.unwrap_or(DEFAULT);
        let rule = Rule::named(name)
            .ok_or_else(|| Error::GgufPreTokenizerUnknown { name: name.to_owned(), known: known_names() })?;
        let merges = self.file_merges()?.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
        let bpe = Bpe { ignore_merges: rule.ignore_merges, ..self.bpe(merges) };
        Ok(Kind {
            model: backend::Model::Bpe(bpe),
            normalizer: rule.normalizer(),
            pre_tokenizer: rule.pre_tokenizer(),
            decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            adds_bos: rule.adds_bos,
            adds_eos: false,
        })
    }

    /// SentencePiece's BPE, as Llama 2, TinyLlama and the first Mistral have it: spaces become `▁`, one is put before every
    /// stretch of text between special tokens, and what the vocabulary lacks falls back to bytes.
    fn sentence_piece(&self) -> Result<Kind, Error> {
        let merges = match (self.file_merges()?, &self.scores) {
            (Some(merges), _) => merges,
            (None, Some(scores)) => merges_from_scores(&self.tokens, scores),
            (None, None) => return Err(missing("tokenizer.ggml.scores")),
        };
        let bpe = Bpe { unk_token: self.text(self.unk), fuse_unk: true, byte_fallback: true, ..self.bpe(merges) };
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.add_space_prefix.unwrap_or(true) {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(Kind {
            model: backend::Model::Bpe(bpe),
            normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
            pre_tokenizer: Value::Null,
            decoder: json!({"type": "Sequence", "decoders": decoders}),
            adds_bos: true,
            adds_eos: false,
        })
    }

    /// SentencePiece's Unigram, as T5 has it: the pieces that spell a word with the greatest sum of scores. What stands around it is
    /// transformers' T5Tokenizer.
    fn unigram(&self) -> Result<Kind, Error> {
        let scores = self.scores.as_ref().ok_or_else(|| missing("tokenizer.ggml.scores"))?;
        if let Some(score) = scores.iter().find(|score| !score.is_finite()) {
            return Err(invalid("tokenizer.ggml.scores", score.to_string()));
        }
        // What is found in a text before it is cut to pieces competes with none.
        let score = |id: usize| if self.types[id] == USER_DEFINED { 0.0 } else { f64::from(scores[id]) };
        let tokens = self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), score(id))).collect();
        let unk = self.unk.ok_or_else(|| missing("tokenizer.ggml.unknown_token_id"))?;
        let normalizer = match self.charsmap.as_deref().filter(|charsmap| !charsmap.is_empty()) {
            Some(charsmap) => precompiled(charsmap).map_err(|cause| invalid(CHARSMAP, cause))?,
            None => Value::Null,
        };
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        Ok(Kind {
            model: backend::Model::Unigram { tokens, unk: unk as usize },
            normalizer,
            pre_tokenizer: json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}),
            decoder: metaspace,
            adds_bos: false,
            adds_eos: true,
        })
    }

    fn bpe(&self, merges: Vec<(&str, &str)>) -> Bpe {
        Bpe {
            tokens: self.tokens.clone(),
            merges: merges.into_iter().map(|(left, right)| (left.to_owned(), right.to_owned())).collect(),
            unk_token: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
        }
    }

    /// The merges of the file: each two tokens with a space between, which may itself start with one.
    fn file_merges(&self) -> Result<Option<Vec<(&'a str, &'a str)>>, Error> {
        let Some(merges) = &self.merges else { return Ok(None) };
        let pair = |merge: &'a str| -> Result<(&'a str, &'a str), Error> {
            let space = merge.char_indices().skip(1).find(|&(_, c)| c == ' ');
            space
                .and_then(|(at, _)| Some((merge.get(..at)?, merge.get(at + 1..)?)))
                .ok_or_else(|| invalid("tokenizer.ggml.merges", format!("{merge:?}, which is not two tokens")))
        };
        merges.iter().copied().map(pair).collect::<Result<Vec<_>, _>>().map(Some)
    }

    /// Control tokens are special; user-defined ones are matched in texts too, but print.
    fn added_tokens(&self) -> Vec<Value> {
        let is_named =
            |id: usize| [self.bos, self.eos, self.unk].into_iter().flatten().any(|named| named as usize == id);
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        tokens
            .filter_map(|(id, (token, &token_type))| {
                let special = match token_type {
                    UNKNOWN | CONTROL => true,
                    _ if is_named(id) || ALWAYS_SPECIAL.contains(&token.as_str()) => true,
                    USER_DEFINED if token.starts_with(SENTINEL) => true,
                    USER_DEFINED => false,
                    _ => return None,
                };
                let rstrip = self.is_phi3 && !PHI3_KEEPS_SPACE_AFTER.contains(&token.as_str());
                Some(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": rstrip,
                            "normalized": false, "special": special}))
            })
            .collect()
    }

    /// What is put around a text: BOS, EOS, both or nothing.
    fn post_processor(&self, adds_bos: bool, adds_eos: bool) -> Result<Value, Error> {
        let wanted = |add: bool, id: Option<u32>, key: &'static str| -> Result<Option<(u32, String)>, Error> {
            match (add, id, self.text(id)) {
                (false, _, _) => Ok(None),
                (true, Some(id), Some(text)) => Ok(Some((id, text))),
                (true, _, _) => Err(invalid(key, "nothing, though the tokenizer is to add that token".to_owned())),
            }
        };
        let bos = wanted(self.add_bos.unwrap_or(adds_bos), self.bos, "tokenizer.ggml.bos_token_id")?;
        let eos = wanted(self.add_eos.unwrap_or(adds_eos), self.eos, "tokenizer.ggml.eos_token_id")?;
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let around = |sequence: &str, type_id: u32| -> Vec<Value> {
            let special = |token: &Option<(u32, String)>| {
                token.as_ref().map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
            };
            let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            [special(&bos), Some(text), special(&eos)].into_iter().flatten().collect()
        };
        let mut special_tokens = serde_json::Map::new();
        for (id, text) in [&bos, &eos].into_iter().flatten() {
            special_tokens.insert(text.clone(), json!({"id": text, "ids": [id], "tokens": [text]}));
        }
        Ok(json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": ([around("A", 0), around("B", 1)].concat()),
            "special_tokens": special_tokens,
        }))
    }
}

/// llama.cpp's converter names the ids of a T5 that have no piece after themselves. The first hundred of them are T5's sentinels, which it
/// takes from a file that the published models do not have; behind these there is nothing.
fn drop_stand_ins(tokens: &mut Vec<String>, types: &mut Vec<i32>, scores: Option<&mut Vec<f32>>) {
    let is_stand_in = |(id, token): &(usize, &String)| token.starts_with("[PAD") && **token == format!("[PAD{id}]");
    let stand_ins = tokens.iter().enumerate().rev().take_while(is_stand_in).count();
    let mut count = tokens.len() - stand_ins;
    if stand_ins >= SENTINELS && !tokens.iter().any(|token| token.starts_with(SENTINEL)) {
        for (token, number) in tokens[count..].iter_mut().zip((0..SENTINELS).rev()) {
            *token = format!("{SENTINEL}{number}>");
        }
        types.iter_mut().skip(count).take(SENTINELS).for_each(|of| *of = USER_DEFINED);
        count += SENTINELS;
    }
    tokens.truncate(count);
    types.truncate(count);
    if let Some(scores) = scores {
        scores.truncate(count);
    }
}

/// SentencePiece's rules of normalisation: the size of a trie, the trie, texts.
fn precompiled(charsmap: &[u8]) -> Result<Value, String> {
    let (size, rest) = charsmap.split_first_chunk::<4>().ok_or("fewer than 4 bytes")?;
    let size = u32::from_le_bytes(*size);
    if rest.len() < size as usize {
        return Err(format!("a trie of {size} bytes in {}", rest.len()));
    }
    let rules = guarded(|| Ok(Precompiled::from(charsmap).map_err(|error| error.to_string())?))?;
    serde_json::to_value(rules).map_err(|error| error.to_string())
}

/// The merges that a SentencePiece vocabulary implies: a token is made from any two others that spell it, the token with the
/// greatest score first. Ties go as in transformers' converter: longer parts first, then the order of the vocabulary.
fn merges_from_scores<'t>(tokens: &'t [String], scores: &[f32]) -> Vec<(&'t str, &'t str)> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges: Vec<(f32, usize, usize, &str, &str)> = Vec::new();
    for (token, &score) in tokens.iter().zip(scores).filter(|(token, _)| token.len() <= MAX_MERGED_BYTES) {
        let splits = token.char_indices().skip(1).filter_map(|(at, _)| {
            let (left, right) = token.split_at(at);
            Some((*ids.get(left)?, *ids.get(right)?, left, right))
        });
        let mut splits: Vec<_> = splits.collect();
        splits.sort_by_key(|&(left, right, ..)| (left, right));
        merges.extend(
            splits
                .into_iter()
                .map(|(_, _, left, right)| (score, left.chars().count(), right.chars().count(), left, right)),
        );
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    merges.into_iter().map(|(_, _, _, left, right)| (left, right)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{Tokenizer, fixture};

    fn build(vocabulary: Vocabulary) -> Result<Tokenizer, Error> {
        Tokenizer::assemble(vocabulary.into_parts()?)
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_refused_with_the_known_ones() {
        let error = build(Vocabulary { pre: Some("smolm"), ..fixture::byte_level_vocabulary() }).unwrap_err();
        assert!(error.to_string().contains("smolm") && error.to_string().contains("llama-bpe"), "{error}");
        let error = build(Vocabulary { model: "bert", ..fixture::byte_level_vocabulary() }).unwrap_err();
        assert!(matches!(error, Error::GgufTokenizerModel { model } if model == "bert"));
    }

    #[test]
    fn a_file_that_names_no_pre_tokenizer_gets_the_default_one_and_says_so() {
        let tokenizer = |pre| build(Vocabulary { pre, ..fixture::byte_level_vocabulary() }).unwrap();
        let text = "ab 1234 =`a";
        assert_eq!(tokenizer(None).encode(text).unwrap(), tokenizer(Some("default")).encode(text).unwrap());
        assert!(tokenizer(None).note().is_some_and(|note| note.contains("tokenizer.ggml.pre")));
        assert_eq!(tokenizer(Some("default")).note(), None);
    }

    #[test]
    fn tokens_that_end_a_turn_are_special_whatever_the_file_says() {
        let mut vocabulary = fixture::byte_level_vocabulary();
        let id = vocabulary.tokens.iter().position(|token| token == "<|im_end|>").unwrap();
        (vocabulary.types[id], vocabulary.pad) = (1, None);
        let tokenizer = build(vocabulary).unwrap();
        let ids = tokenizer.encode("ab<|im_end|>").unwrap();
        assert_eq!(ids[1], id as u32);
        assert_eq!(tokenizer.decode(&ids, true), "ab");
    }

    #[test]
    fn special_tokens_of_phi_3_take_the_space_that_follows() {
        let mut vocabulary = fixture::sentence_piece_vocabulary();
        vocabulary.tokens.extend(["<|end|>", "<|endoftext|>"].map(str::to_owned));
        vocabulary.types.extend([3, 3]);
        vocabulary.scores = vocabulary.scores.map(|scores| [scores, vec![0.0; 2]].concat());
        vocabulary.is_phi3 = true;
        let tokenizer = build(vocabulary).unwrap();
        let names = |text: &str| -> Vec<String> {
            tokenizer.encode(text).unwrap().into_iter().filter_map(|id| tokenizer.id_to_token(id)).collect()
        };
        assert_eq!(names("a<|end|>\n b"), ["▁a", "<|end|>", "▁", "b"]);
        assert_eq!(names("a<|endoftext|>\nb"), ["▁a", "<|endoftext|>", "▁", "<0x0A>", "b"]);
        assert_eq!(names("<s> b"), ["<s>", "▁", "▁", "b"]);
    }

    #[test]
    fn merges_must_be_pairs_of_the_vocabulary() {
        for merge in ["ab", "", " ", "a  b", "a zz"] {
            assert!(
                build(Vocabulary { merges: Some(vec![merge]), ..fixture::byte_level_vocabulary() }).is_err(),
                "{merge:?}"
            );
        }
        assert!(build(Vocabulary { merges: None, ..fixture::byte_level_vocabulary() }).is_err());
    }

    #[test]
    fn flags_say_what_is_put_around_a_text() {
        let plain = build(fixture::byte_level_vocabulary()).unwrap();
        let text = plain.encode("ab").unwrap();
        assert_eq!(plain.encode_with_special_tokens("ab").unwrap(), text);
        let both = Vocabulary { add_bos: Some(true), add_eos: Some(true), ..fixture::byte_level_vocabulary() };
        let (bos, eos) = (both.bos.unwrap(), both.eos.unwrap());
        let both = build(both).unwrap();
        assert_eq!(both.encode_with_special_tokens("ab").unwrap(), [vec![bos], text.clone(), vec![eos]].concat());
        assert_eq!(both.encode("ab").unwrap(), text);
        let unnamed = Vocabulary { add_bos: Some(true), bos: None, ..fixture::byte_level_vocabulary() };
        assert!(build(unnamed).unwrap_err().to_string().contains("bos_token_id"));
        let by_rule = build(Vocabulary { pre: Some("llama-bpe"), ..fixture::byte_level_vocabulary() }).unwrap();
        assert_eq!(by_rule.encode_with_special_tokens("ab").unwrap()[0], bos);
    }

    #[test]
    fn a_whole_piece_that_is_a_token_needs_no_merges_where_the_rule_says_so() {
        let vocabulary =
            |pre| Vocabulary { pre: Some(pre), merges: Some(Vec::new()), ..fixture::byte_level_vocabulary() };
        assert_eq!(build(vocabulary("llama-bpe")).unwrap().encode("ab").unwrap().len(), 1);
        assert_eq!(build(vocabulary("smollm")).unwrap().encode("ab").unwrap().len(), 2);
    }

    #[test]
    fn sentence_piece_prefixes_a_space_and_falls_back_to_bytes() {
        let tokenizer = fixture::sentence_piece();
        let names = |text: &str| -> Vec<String> {
            tokenizer.encode(text).unwrap().into_iter().filter_map(|id| tokenizer.id_to_token(id)).collect()
        };
        assert_eq!(names("ab ab"), ["▁ab", "▁ab"]);
        assert_eq!(names("abé"), ["▁ab", "<0xC3>", "<0xA9>"]);
        assert_eq!(names("a</s>b"), ["▁a", "</s>", "▁", "b"]);
        let bos = tokenizer.bos_token_id().unwrap();
        assert_eq!(tokenizer.encode_with_special_tokens("ab").unwrap()[0], bos);
        let ids = tokenizer.encode("ab é ab").unwrap();
        assert_eq!(tokenizer.decode(&ids, true), "ab é ab");
        let no_prefix = Vocabulary { add_space_prefix: Some(false), ..fixture::sentence_piece_vocabulary() };
        let no_prefix = build(no_prefix).unwrap();
        assert_eq!(no_prefix.decode(&no_prefix.encode(" ab").unwrap(), true), " ab");
    }

    #[test]
    fn unigram_takes_the_greatest_sum_of_scores_and_ends_a_text() {
        let tokenizer = build(fixture::unigram_vocabulary()).unwrap();
        assert_eq!(tokenizer.encode_with_special_tokens(" ab  a\nzz b</s>").unwrap(), [6, 3, 4, 3, 2, 3, 5, 1, 1]);
        assert_eq!(tokenizer.decode(&[6, 3, 4, 1], true), "ab a");
        let no_end = Vocabulary { add_eos: Some(false), ..fixture::unigram_vocabulary() };
        assert_eq!(build(no_end).unwrap().encode_with_special_tokens("a").unwrap(), [3, 4]);
    }

    #[test]
    fn a_damaged_unigram_vocabulary_is_refused() {
        let refusal = |vocabulary| build(vocabulary).unwrap_err().to_string();
        let of = |vocabulary: Vocabulary<'static>, key: &str| {
            let text = refusal(vocabulary);
            assert!(text.contains(key), "{text}");
        };
        of(Vocabulary { scores: None, ..fixture::unigram_vocabulary() }, "tokenizer.ggml.scores");
        of(Vocabulary { scores: Some(vec![f32::NAN; 7]), ..fixture::unigram_vocabulary() }, "NaN");
        of(Vocabulary { unk: None, ..fixture::unigram_vocabulary() }, "unknown_token_id");
        for charsmap in [&[1u8][..], &[255, 255, 255, 255, 0], &[0, 0, 0, 0, 255]] {
            of(Vocabulary { charsmap: Some(charsmap.to_vec()), ..fixture::unigram_vocabulary() }, CHARSMAP);
        }
        // A trie that points out of itself is found where a text meets it.
        let outside = [vec![4, 0, 0, 0], vec![255; 4], b"a\0".to_vec()].concat();
        let tokenizer = build(Vocabulary { charsmap: Some(outside), ..fixture::unigram_vocabulary() }).unwrap();
        assert!(tokenizer.encode("ab").is_err());
    }

    #[test]
    fn the_tokens_that_a_converter_left_out_are_t5s_sentinels() {
        let named = |stand_ins: usize, sentinel: bool| {
            let Vocabulary { mut tokens, mut types, scores, .. } = fixture::unigram_vocabulary();
            let mut scores = scores.unwrap();
            if sentinel {
                tokens[5] = "<extra_id_0>".to_owned();
            }
            tokens.extend((7..7 + stand_ins).map(|id| format!("[PAD{id}]")));
            types.resize(tokens.len(), 5);
            scores.resize(tokens.len(), -10_000.0);
            drop_stand_ins(&mut tokens, &mut types, Some(&mut scores));
            assert_eq!((tokens.len(), tokens.len()), (types.len(), scores.len()));
            tokens
        };
        let tokens = named(128, false);
        assert_eq!((tokens.len(), &*tokens[7], &*tokens[106]), (107, "<extra_id_99>", "<extra_id_0>"));
        assert_eq!((named(99, false).len(), named(128, true).len(), named(0, false).len()), (7, 7, 7));
    }

    #[test]
    fn the_greatest_score_merges_first() {
        let tokens: Vec<String> = ["a", "b", "c", "ab", "bc", "abc"].map(str::to_owned).to_vec();
        let merges = merges_from_scores(&tokens, &[0.0, 0.0, 0.0, -2.0, -1.0, -3.0]);
        assert_eq!(merges, [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]);
    }

    #[test]
    fn lists_of_different_lengths_and_repeated_tokens_are_refused() {
        let mut short = fixture::byte_level_vocabulary();
        short.types.pop();
        assert!(short.check().is_err());
        let mut twice = fixture::byte_level_vocabulary();
        twice.tokens[5] = twice.tokens[4].clone();
        assert!(twice.check().unwrap_err().to_string().contains("twice"));
        assert!(Vocabulary { scores: Some(Vec::new()), ..fixture::byte_level_vocabulary() }.check().is_err());
    }

    #[test]
    fn user_defined_tokens_are_found_in_texts_and_printed() {
        let mut vocabulary = fixture::byte_level_vocabulary();
        vocabulary.tokens.push("<think>".to_owned());
        vocabulary.types.push(USER_DEFINED);
        let id = vocabulary.tokens.len() as u32 - 1;
        let tokenizer = build(vocabulary).unwrap();
        let ids = tokenizer.encode("a<think>b").unwrap();
        assert_eq!(ids[1], id);
        assert_eq!(tokenizer.decode(&ids, true), "a<think>b");
    }
}
