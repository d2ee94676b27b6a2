//! Text to token ids and back, by the tokenizer that a model carries.
//!
//! Built on the `tokenizers` crate, whose file `tokenizer.json` is the common form: a Hugging Face directory has one
//! (`directory.rs`), a GGUF file's vocabulary is turned into one (`gguf.rs`), and [`Tokenizer::save`] writes one.

mod backend;
mod decode_stream;
mod directory;
#[cfg(test)]
pub(crate) mod fixture;
mod gguf;
mod pre_tokenizer;
mod to_gguf;

use std::ops::Range;
use std::path::Path;

use retune_formats::atomic::{self, io_error};
use retune_formats::gguf::Metadata;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::{Encoding, PostProcessor};

use crate::chat_template::ChatTemplate;
use crate::date::Date;
use crate::error::Error;
use backend::{Backend, ExtraToken, Model, guarded};
pub use decode_stream::DecodeStream;
pub use to_gguf::GgufVocabulary;

/// Tokens that end an assistant's turn in the chat templates in use. One that the vocabulary has and the template writes
/// ends generation, whether or not the files say so.
const TURN_ENDS: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eom_id|>", "<|return|>", "</s>"];

/// The files that [`Tokenizer::save`] writes.
pub const FILES: [&str; 2] = [directory::TOKENIZER_FILE, directory::CONFIG_FILE];

/// A model's tokenizer, with its chat template and the tokens that end generation.
#[derive(Debug)]
pub struct Tokenizer {
    backend: Backend,
    special: SpecialTokens,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
    chat_template: Option<ChatTemplate>,
    model_max_length: Option<u64>,
    /// Ids from this one on have no row in the model's embeddings.
    rows: usize,
    note: Option<&'static str>,
}

/// The texts of the tokens with a role.
#[derive(Debug, Default)]
struct SpecialTokens {
    bos: Option<String>,
    eos: Option<String>,
    unk: Option<String>,
    pad: Option<String>,
}

/// From what a tokenizer is built.
enum Source {
    /// The content of a `tokenizer.json`, and tokens of the files beside it.
    Json(Value, Vec<ExtraToken>),
    /// A model, and the content of a `tokenizer.json` without it.
    Model(Model, Value),
}

/// What a tokenizer is made of, whatever files it came from.
struct Parts {
    source: Source,
    special: SpecialTokens,
    /// Ids that end generation besides the EOS token.
    stop_ids: Vec<u32>,
    chat_template: Option<String>,
    model_max_length: Option<u64>,
    note: Option<&'static str>,
}

impl Tokenizer {
    /// Reads the tokenizer of a Hugging Face model directory: `tokenizer.json`, and beside it where present
    /// `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`, `generation_config.json`, `config.json`.
    ///
    /// # Errors
    /// No `tokenizer.json`, damaged files, a chat template that does not compile.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer, Error> {
        let file = dir.join(directory::TOKENIZER_FILE);
        Tokenizer::assemble(directory::read(dir)?).map_err(|error| match error {
            Error::TokenizerInvalid { .. } => error.at(&file),
            other => other.at(dir),
        })
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// No tokenizer in the file, a kind or a pre-tokenizer that is not known, contradictions.
    pub fn from_gguf(metadata: &Metadata) -> Result<Tokenizer, Error> {
        Tokenizer::assemble(gguf::Vocabulary::read(metadata)?.into_parts()?)
    }

    fn assemble(parts: Parts) -> Result<Tokenizer, Error> {
        let Parts { source, special, stop_ids, chat_template, model_max_length, note } = parts;
        let backend = match source {
            Source::Json(json, extra_tokens) => backend::load(json, extra_tokens),
            Source::Model(model, json) => backend::build(model, &json),
        };
        let backend = backend.map_err(|cause| Error::TokenizerInvalid { cause })?;
        // A token that the vocabulary lacks has no row in the embeddings: it cannot have a role.
        let known = |token: Option<String>| token.filter(|token| backend.tokenizer.token_to_id(token).is_some());
        let special = SpecialTokens {
            bos: known(special.bos),
            eos: known(special.eos),
            unk: known(special.unk),
            pad: known(special.pad),
        };
        let text = |token: &Option<String>| token.clone().unwrap_or_default();
        let chat_template = chat_template
            .map(|source| ChatTemplate::new(&source, &text(&special.bos), &text(&special.eos)))
            .transpose()?;
        let id = |token: &str| backend.tokenizer.token_to_id(token);
        let source = chat_template.as_ref().map_or("", ChatTemplate::source);
        let turn_ends = TURN_ENDS.iter().filter(|token| source.contains(**token)).filter_map(|token| id(token));
        let mut eos_token_ids: Vec<u32> = Vec::new();
        for id in special.eos.as_deref().and_then(id).into_iter().chain(stop_ids).chain(turn_ends) {
            if (id as usize) < backend.vocab_size && !eos_token_ids.contains(&id) {
                eos_token_ids.push(id);
            }
        }
        let bos_token_id = special.bos.as_deref().and_then(id);
        let rows = usize::MAX;
        Ok(Tokenizer { bos_token_id, eos_token_ids, backend, special, chat_template, model_max_length, rows, note })
    }

    /// The tokenizer for a model of `rows` embeddings. Tokenizer files may know more tokens (padding, mostly); a text that needs one
    /// of those is an error then, instead of a row that is not there.
    pub fn with_rows(mut self, rows: usize) -> Tokenizer {
        self.rows = rows;
        self.eos_token_ids.retain(|&id| (id as usize) < rows);
        self
    }

    /// The tokenizer whose chat template prints `date` where it prints a date.
    pub fn with_date(mut self, date: Date) -> Tokenizer {
        self.chat_template = self.chat_template.map(|template| template.with_date(date));
        self
    }

    fn checked(&self, ids: &[u32]) -> Result<Vec<u32>, Error> {
        match ids.iter().find(|&&id| id as usize >= self.rows) {
            None => Ok(ids.to_vec()),
            Some(&id) => {
                let token = self.id_to_token(id).unwrap_or_default();
                let cause = format!("it holds token {id} ({token:?}), but the model has {} embeddings", self.rows);
                Err(Error::Encode { cause })
            }
        }
    }

    /// The tokens of `text` and nothing else, as Hugging Face's `tokenizer(text, add_special_tokens=False)`: the texts of
    /// special tokens become those tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.checked(self.encoding(text)?.get_ids())
    }

    /// The tokens of `text` with BOS and whatever else the tokenizer puts around a text, as Hugging Face's `tokenizer(text)`.
    /// One difference: a text that starts with the BOS token itself gets no second one.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.encoding(text)?;
        let Some(processor) = &self.backend.post_processor else { return self.checked(encoding.get_ids()) };
        let starts_with_bos = self.bos_token_id.is_some() && encoding.get_ids().first().copied() == self.bos_token_id;
        let whole = guarded(|| processor.process(encoding, None, true)).map_err(|cause| Error::Encode { cause })?;
        match whole.get_ids() {
            [first, rest @ ..] if starts_with_bos && rest.first() == Some(first) => self.checked(rest),
            ids => self.checked(ids),
        }
    }

    /// As [`Tokenizer::encode`], with the byte range of `text` that each token stands for. A token that is part of a
    /// character has the range of the whole character; a space put before the text by the tokenizer has none of its own.
    pub fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), Error> {
        let encoding = self.encoding(text)?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((self.checked(encoding.get_ids())?, ranges))
    }

    fn encoding(&self, text: &str) -> Result<Encoding, Error> {
        guarded(|| self.backend.tokenizer.encode(text, false)).map_err(|cause| Error::Encode { cause })
    }

    /// The text of `ids`; ids outside the vocabulary stand for nothing, bytes that are no UTF-8 for U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        guarded(|| self.backend.tokenizer.decode(ids, skip_special_tokens))
            .unwrap_or_else(|_| ids.iter().filter_map(|&id| self.id_to_token(id)).collect())
    }

    /// Decodes token by token, for showing text while it is generated. Special tokens are left out.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// One more than the greatest token id. The embeddings may have more rows, never fewer.
    pub fn vocab_size(&self) -> usize {
        self.backend.vocab_size
    }

    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_token_id
    }

    /// Every id that ends generation: first the tokenizer's EOS token, if it has one; then those of the generation config,
    /// of the model config, and the token that ends a turn in the chat template. Empty when nothing is known.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// The token as the vocabulary spells it, which is not text: see [`Tokenizer::decode`].
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.backend.tokenizer.id_to_token(id)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.backend.tokenizer.token_to_id(token)
    }

    /// The texts that become a special token wherever they stand, in no order.
    pub fn special_texts(&self) -> Vec<String> {
        let added = self.backend.tokenizer.get_added_tokens_decoder();
        added
            .into_values()
            .filter(|token| token.special && !token.content.is_empty())
            .map(|token| token.content)
            .collect()
    }

    /// What a user should know of the files: something they leave open was guessed.
    pub fn note(&self) -> Option<&'static str> {
        self.note
    }

    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into `dir`, which is created if need be: what transformers'
    /// `AutoTokenizer` and [`Tokenizer::from_dir`] load as this tokenizer.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        std::fs::create_dir_all(dir).map_err(io_error("create", dir))?;
        let [tokenizer, config] = FILES.map(|name| dir.join(name));
        write_json(&tokenizer, &self.to_json()?)?;
        write_json(&config, &self.config_json())
    }

    /// The content of this tokenizer's `tokenizer.json`.
    fn to_json(&self) -> Result<Value, Error> {
        let mut json = serde_json::to_value(&self.backend.tokenizer).map_err(|error| Error::Json { error })?;
        if let Some(root) = json.as_object_mut() {
            let processor =
                serde_json::to_value(&self.backend.post_processor).map_err(|error| Error::Json { error })?;
            root.insert("post_processor".to_owned(), processor);
        }
        Ok(json)
    }

    fn config_json(&self) -> Value {
        let mut config = serde_json::Map::new();
        config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
        let SpecialTokens { bos, eos, unk, pad } = &self.special;
        for (key, token) in [("bos_token", bos), ("eos_token", eos), ("unk_token", unk), ("pad_token", pad)] {
            if let Some(token) = token {
                config.insert(key.to_owned(), token.as_str().into());
            }
        }
        if let Some(length) = self.model_max_length {
            config.insert("model_max_length".to_owned(), length.into());
        }
        config.insert("clean_up_tokenization_spaces".to_owned(), false.into());
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".to_owned(), template.source().into());
        }
        Value::Object(config)
    }

    /// SHA-256, in hexadecimal, of the vocabulary and the merges: what decides whether an adapter trained with one tokenizer fits a
    /// model that comes with another copy, be it a directory or a GGUF file. The chat template has a hash of its own.
    pub fn content_hash(&self) -> String {
        let mut hash = Sha256::new();
        // Each part is preceded by its length, so that no two contents run together to the same bytes.
        let mut add = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        // llama.cpp's converter names ids without a token after themselves; a directory has nothing there.
        let is_stand_in = |token: &str, id: u32| token.starts_with("[PAD") && token == format!("[PAD{id}]");
        let tokens = self.backend.tokenizer.get_vocab(true).into_iter();
        let mut vocabulary: Vec<(String, u32)> = tokens.filter(|(token, id)| !is_stand_in(token, *id)).collect();
        vocabulary.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
        add(&(vocabulary.len() as u64).to_le_bytes());
        for (token, id) in &vocabulary {
            add(&id.to_le_bytes());
            add(token.as_bytes());
        }
        // A model is strings and numbers, which serialise; one without merges has none to hash.
        let model = serde_json::to_value(self.backend.tokenizer.get_model()).unwrap_or_default();
        add(model.get("merges").unwrap_or(&json!([])).to_string().as_bytes());
        format!("{:x}", hash.finalize())
    }
}

fn write_json(path: &Path, json: &Value) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(json).map_err(|error| Error::Json { error })?;
    text.push('\n');
    Ok(atomic::write(path, text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_in_the_text_are_recognised() {
        let tokenizer = fixture::byte_level();
        let ids = tokenizer.encode("<|im_start|>ab<|im_end|>").unwrap();
        let id = |token: &str| tokenizer.token_to_id(token).unwrap();
        assert_eq!(ids, [id("<|im_start|>"), id("ab"), id("<|im_end|>")]);
        assert_eq!(tokenizer.decode(&ids, true), "ab");
        assert_eq!(tokenizer.decode(&ids, false), "<|im_start|>ab<|im_end|>");
    }

    #[test]
    fn any_text_survives_and_its_ranges_cover_it() {
        let tokenizer = fixture::byte_level();
        let alphabet: Vec<char> = "ab <|im_end|> \n\t1２é私🦀'\u{301}".chars().collect();
        let mut state = 1u64;
        for _ in 0..300 {
            let mut text = String::new();
            for _ in 0..(state >> 33) % 24 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                text.push(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (ids, ranges) = tokenizer.encode_with_offsets(&text).unwrap();
            assert_eq!(ids, tokenizer.encode(&text).unwrap());
            assert_eq!(tokenizer.decode(&ids, false), text);
            let mut covered = 0;
            for range in ranges {
                assert!(range.start <= covered && covered <= range.end, "{text:?}: {range:?} after {covered}");
                assert!(text.get(range.clone()).is_some(), "{text:?}: {range:?} cuts a character");
                covered = range.end;
            }
            assert_eq!(covered, text.len(), "{text:?}");
        }
    }

    #[test]
    fn ranges_keep_the_spaces_of_their_tokens() {
        let (ids, ranges) = fixture::byte_level().encode_with_offsets("ab ab é").unwrap();
        assert_eq!(ids.len(), ranges.len());
        assert_eq!(ranges, [0..2, 2..3, 3..5, 5..6, 6..8, 6..8]);
    }

    #[test]
    fn bos_is_never_doubled() {
        let tokenizer = fixture::sentence_piece();
        let bos = tokenizer.bos_token_id().unwrap();
        let count =
            |text: &str| tokenizer.encode_with_special_tokens(text).unwrap().iter().filter(|&&id| id == bos).count();
        assert_eq!(count("ab"), 1);
        assert_eq!(count("<s>ab"), 1);
        assert_eq!(count(""), 1);
        assert_eq!(tokenizer.encode("<s>ab").unwrap()[0], bos);
        assert!(!tokenizer.encode("ab").unwrap().contains(&bos));
    }

    #[test]
    fn generation_ends_at_the_eos_token_first_then_at_the_end_of_the_templates_turn() {
        let tokenizer = fixture::byte_level();
        let ids: Vec<u32> = ["<|endoftext|>", "<|im_end|>"].iter().map(|t| tokenizer.token_to_id(t).unwrap()).collect();
        assert_eq!(tokenizer.eos_token_ids(), ids);
        assert_eq!(tokenizer.vocab_size(), tokenizer.token_to_id("ab").unwrap() as usize + 1);
    }

    #[test]
    fn a_saved_tokenizer_is_the_same_tokenizer() {
        let texts = ["ab ab", "<|im_start|>ab 12é🦀\n<|im_end|>", " <s>ab</s> é", ""];
        for tokenizer in [fixture::byte_level(), fixture::sentence_piece()] {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path().join("new/merged");
            tokenizer.save(&dir).unwrap();
            let saved = Tokenizer::from_dir(&dir).unwrap();
            for text in texts {
                assert_eq!(saved.encode(text).unwrap(), tokenizer.encode(text).unwrap(), "{text:?}");
                let whole = tokenizer.encode_with_special_tokens(text).unwrap();
                assert_eq!(saved.encode_with_special_tokens(text).unwrap(), whole, "{text:?}");
                assert_eq!(saved.decode(&whole, true), tokenizer.decode(&whole, true));
            }
            assert_eq!(saved.bos_token_id(), tokenizer.bos_token_id());
            assert_eq!(saved.eos_token_ids(), tokenizer.eos_token_ids());
            assert_eq!(saved.content_hash(), tokenizer.content_hash());
            let source = |tokenizer: &Tokenizer| tokenizer.chat_template().map(|t| t.source().to_owned());
            assert_eq!(source(&saved), source(&tokenizer));
            let files =
                |dir: &Path| ["tokenizer.json", "tokenizer_config.json"].map(|f| std::fs::read(dir.join(f)).unwrap());
            let again = tempfile::tempdir().unwrap();
            saved.save(again.path()).unwrap();
            assert_eq!(files(again.path()), files(&dir));
        }
    }

    #[test]
    fn the_hash_depends_on_vocabulary_and_merges_alone() {
        let hash = |vocabulary: gguf::Vocabulary| {
            Tokenizer::assemble(vocabulary.into_parts().unwrap()).unwrap().content_hash()
        };
        let original = hash(fixture::byte_level_vocabulary());
        assert_eq!(original, fixture::byte_level().content_hash());
        assert_ne!(original, hash(gguf::Vocabulary { merges: Some(Vec::new()), ..fixture::byte_level_vocabulary() }));
        assert_eq!(original, hash(gguf::Vocabulary { chat_template: None, ..fixture::byte_level_vocabulary() }));
        let mut padded = fixture::byte_level_vocabulary();
        padded.tokens.push(format!("[PAD{}]", padded.tokens.len()));
        padded.types.push(5);
        assert_eq!(original, hash(padded));
        let mut longer = fixture::byte_level_vocabulary();
        longer.tokens.push("[PAD]".to_owned());
        longer.types.push(5);
        assert_ne!(original, hash(longer));
        let mut swapped = fixture::byte_level_vocabulary();
        swapped.tokens.swap(10, 11);
        assert_ne!(original, hash(swapped));
    }
}
