//! Token ids against llama.cpp's own expectations. They run where the environment variable `RETUNE_TEST_VOCABULARIES` names the folder
//! `models` of llama.cpp's source, whose `ggml-vocab-*.gguf` lie beside texts (`.inp`) and ids (`.out`).

use std::path::{Path, PathBuf};

use retune_formats::files::map_file;
use retune_formats::gguf::Gguf;
use retune_text::tokenizer::Tokenizer;

const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

/// Where llama.cpp leaves letters and their accents apart, and transformers composes them first, as is done here.
const COMPOSED: &str = "qwen35";

/// What is refused by its name: vocabularies of other kinds than byte-level and SentencePiece BPE.
const REFUSED: &[&str] = &["bert-bge", "gemma-4", "nomic-bert-moe"];

fn vocabularies() -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os("RETUNE_TEST_VOCABULARIES") else {
        eprintln!("skipped: RETUNE_TEST_VOCABULARIES is not set");
        return Vec::new();
    };
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    found.sort();
    found
}

fn expectations(gguf: &Path) -> Option<Vec<(String, Vec<u32>)>> {
    let beside = |extension: &str| std::fs::read_to_string(format!("{}.{extension}", gguf.display())).ok();
    let (texts, ids) = (beside("inp")?, beside("out")?);
    let ids = ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect());
    Some(texts.split(SEPARATOR).map(str::to_owned).zip(ids).collect())
}

#[test]
fn llama_cpps_texts_get_llama_cpps_ids() {
    let mut wrong = 0;
    for path in vocabularies() {
        let name = path.file_stem().unwrap().to_string_lossy().replace("ggml-vocab-", "");
        let file = Gguf::parse(map_file(&path).unwrap()).unwrap();
        let tokenizer = match Tokenizer::from_gguf(&file.metadata) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                eprintln!("{name}: refused: {error}");
                assert!(REFUSED.contains(&name.as_str()), "{name}");
                continue;
            }
        };
        let Some(expected) = expectations(&path) else {
            eprintln!("{name}: loads; no expectations, {} tokens", tokenizer.vocab_size());
            continue;
        };
        let mut equal = 0;
        for (text, ids) in &expected {
            let ours = tokenizer.encode(text).unwrap();
            equal += usize::from(&ours == ids);
            if &ours != ids && !(name == COMPOSED && text.contains(['\u{300}', '\u{301}'])) {
                eprintln!("{name}: {text:?}: {ours:?}, expected {ids:?}");
                wrong += 1;
            }
        }
        eprintln!("{name}: {equal} of {} texts equal", expected.len());
    }
    assert_eq!(wrong, 0);
}
