//! Token ids of tiny vocabularies, read from GGUF bytes, against those of the libraries that such vocabularies come from. The goldens are
//! written by `goldens/make_tokenizers.py`.

use std::collections::BTreeMap;
use std::path::Path;

use retune_formats::gguf::Gguf;
use retune_formats::gguf::testing::GgufBytes;
use retune_quant::SharedBytes;
use retune_text::tokenizer::Tokenizer;
use serde::Deserialize;
use serde::de::DeserializeOwned;

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

#[derive(Deserialize)]
struct ByteLevel {
    tokens: Vec<String>,
    merges: Vec<String>,
    /// So many tokens at the front are special.
    special: usize,
    texts: Vec<String>,
    ids: BTreeMap<String, Vec<Vec<u32>>>,
}

#[derive(Deserialize)]
struct SentencePiece {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
    texts: Vec<String>,
    ids: BTreeMap<String, Vec<Vec<u32>>>,
}

fn golden<T: DeserializeOwned>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn strings(list: &[String]) -> Vec<&str> {
    list.iter().map(String::as_str).collect()
}

fn tokenizer(bytes: &GgufBytes) -> Tokenizer {
    let file = Gguf::parse(SharedBytes::from_vec(bytes.build())).unwrap();
    Tokenizer::from_gguf(&file.metadata).unwrap()
}

/// The tokenizer gives these ids, and so does one that is read from the files it writes.
fn assert_ids(name: &str, tokenizer: &Tokenizer, texts: &[String], ids: &[Vec<u32>]) {
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path()).unwrap();
    let saved = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(texts.len(), ids.len());
    for (text, ids) in texts.iter().zip(ids) {
        assert_eq!(&tokenizer.encode(text).unwrap(), ids, "{name}: {text:?}");
        assert_eq!(&saved.encode(text).unwrap(), ids, "{name}, saved: {text:?}");
    }
}

#[test]
fn every_named_rule_splits_as_the_models_own_tokenizer() {
    let golden: ByteLevel = golden("byte_level.json");
    let types: Vec<i32> =
        (0..golden.tokens.len()).map(|id| if id < golden.special { CONTROL } else { NORMAL }).collect();
    for (pre, ids) in &golden.ids {
        let bytes = GgufBytes::default()
            .str("tokenizer.ggml.model", "gpt2")
            .str("tokenizer.ggml.pre", pre)
            .str_array("tokenizer.ggml.tokens", &strings(&golden.tokens))
            .i32_array("tokenizer.ggml.token_type", &types)
            .str_array("tokenizer.ggml.merges", &strings(&golden.merges))
            .u32("tokenizer.ggml.bos_token_id", 0)
            .u32("tokenizer.ggml.eos_token_id", 0);
        assert_ids(pre, &tokenizer(&bytes), &golden.texts, ids);
    }
    let different: std::collections::BTreeSet<_> = golden.ids.values().collect();
    assert!(different.len() >= 12, "the goldens tell only {} rules apart", different.len());
}

#[test]
fn sentence_piece_vocabularies_give_sentence_pieces_ids() {
    let golden: SentencePiece = golden("sentence_piece.json");
    for (name, ids) in &golden.ids {
        let architecture = match name.as_str() {
            "gemma" => "gemma3",
            name => name,
        };
        let bytes = GgufBytes::default()
            .str("general.architecture", architecture)
            .str("tokenizer.ggml.model", "llama")
            .str("tokenizer.ggml.pre", "default")
            .str_array("tokenizer.ggml.tokens", &strings(&golden.tokens))
            .f32_array("tokenizer.ggml.scores", &golden.scores)
            .i32_array("tokenizer.ggml.token_type", &golden.types);
        let bytes = if name == "gemma" { bytes.bool("tokenizer.ggml.add_space_prefix", false) } else { bytes };
        let tokenizer = tokenizer(&bytes);
        assert_ids(name, &tokenizer, &golden.texts, ids);
        // llama.cpp's defaults where the file names no tokens and no flag: BOS is 1 and added.
        assert_eq!(tokenizer.encode_with_special_tokens("a").unwrap()[0], 1, "{name}");
    }
}

#[derive(Deserialize)]
struct Texts {
    texts: Vec<String>,
    /// With the token that the tokenizer puts after a text.
    ids: Vec<Vec<u32>>,
    /// The texts of the ids, without special tokens.
    decoded: Vec<String>,
}

/// `goldens/make_t5.py` and `make_families_gguf.py` make the tokenizers with sentencepiece, transformers and llama.cpp's converter.
#[test]
fn a_unigram_vocabulary_gives_the_ids_of_transformers() {
    for (name, texts) in [("t5", 11), ("gguf_t5", 100), ("gguf_flan_t5", 100)] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../retune-model/tests/goldens").join(name);
        let golden: Texts = serde_json::from_slice(&std::fs::read(dir.join("texts.json")).unwrap()).unwrap();
        assert!(golden.texts.len() >= texts, "{name}");
        let tokenizer = if name.starts_with("gguf") {
            let bytes = std::fs::read(dir.join("model.gguf")).unwrap();
            Tokenizer::from_gguf(&Gguf::parse(SharedBytes::from_vec(bytes)).unwrap().metadata).unwrap()
        } else {
            Tokenizer::from_dir(&dir).unwrap()
        };
        assert_eq!(tokenizer.eos_token_ids(), [1]);
        let plain: Vec<Vec<u32>> = golden.ids.iter().map(|ids| ids[..ids.len() - 1].to_vec()).collect();
        assert_ids(name, &tokenizer, &golden.texts, &plain);
        for ((text, ids), decoded) in golden.texts.iter().zip(&golden.ids).zip(&golden.decoded) {
            assert_eq!(&tokenizer.encode_with_special_tokens(text).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(&tokenizer.decode(ids, true), decoded, "{name}: {text:?}");
        }
    }
}
