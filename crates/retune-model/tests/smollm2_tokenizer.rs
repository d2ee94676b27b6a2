//! Token ids and chat templates against transformers: on the small GGUF fixture always, and on SmolLM2-135M-Instruct where the
//! environment variable `RETUNE_TEST_MODELS` names a directory that holds `SmolLM2-135M-Instruct.Q4_1.gguf`, or is a Hugging Face
//! directory of the model, or holds one as `smollm2-hf/`. The goldens are written by `goldens/make_smollm2.py` and
//! `goldens/make_gguf.py`.

mod common;

use std::path::{Path, PathBuf};

use retune_model::checkpoint::Checkpoint;
use retune_text::chat_template::Message;
use retune_text::tokenizer::Tokenizer;
use serde::Deserialize;
use serde::de::DeserializeOwned;

#[derive(Deserialize)]
struct Tokens {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: String,
    ids: Vec<u32>,
}

fn goldens<T: DeserializeOwned>(name: &str) -> Vec<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    let lines = std::fs::read_to_string(path).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// SmolLM2's tokenizer from each form in which it is there; none, with a note, without the variable.
fn smollm2() -> Vec<(PathBuf, Tokenizer)> {
    common::models().map(|folder| tokenizers_in(&folder)).unwrap_or_default()
}

fn tokenizers_in(folder: &Path) -> Vec<(PathBuf, Tokenizer)> {
    let mut found = Vec::new();
    if let Some(gguf) = common::gguf_in(folder) {
        let tokenizer = Checkpoint::open(&gguf).unwrap().tokenizer().unwrap();
        found.push((gguf, tokenizer));
    }
    for directory in [folder.to_owned(), folder.join("smollm2-hf")] {
        if directory.join("tokenizer.json").is_file() {
            let tokenizer = Tokenizer::from_dir(&directory).unwrap();
            found.push((directory, tokenizer));
        }
    }
    assert!(
        !found.is_empty(),
        "RETUNE_TEST_MODELS is {}, which holds neither {} nor a tokenizer.json: set it to the folder of a fetched \
         HuggingFaceTB/SmolLM2-135M-Instruct",
        folder.display(),
        common::GGUF
    );
    found
}

fn assert_tokens(name: &str, tokenizer: &Tokenizer, goldens: &[Tokens]) {
    assert!(!goldens.is_empty());
    for Tokens { text, ids } in goldens {
        assert_eq!(&tokenizer.encode(text).unwrap(), ids, "{name}: {text:?}");
        let (with_ranges, ranges) = tokenizer.encode_with_offsets(text).unwrap();
        assert_eq!(&with_ranges, ids, "{name}: {text:?}");
        assert!(ranges.iter().all(|range| text.get(range.clone()).is_some()), "{name}: {text:?}");
    }
}

#[test]
fn the_small_gguf_fixture_encodes_as_transformers_does() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf_llama/model.gguf");
    let tokenizer = Checkpoint::open(&path).unwrap().tokenizer().unwrap();
    assert_tokens("gguf_llama", &tokenizer, &goldens("gguf_llama/tokens.jsonl"));
}

#[test]
fn a_hugging_face_directory_will_do_where_there_is_no_gguf_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf_llama/model.gguf");
    Checkpoint::open(&path).unwrap().tokenizer().unwrap().save(dir.path()).unwrap();
    let found = tokenizers_in(dir.path());
    assert_eq!(found.iter().map(|(path, _)| path.as_path()).collect::<Vec<_>>(), [dir.path()]);
}

#[test]
#[should_panic(expected = "which holds neither SmolLM2-135M-Instruct.Q4_1.gguf nor a tokenizer.json")]
fn a_folder_without_the_model_is_no_silent_success() {
    tokenizers_in(tempfile::tempdir().unwrap().path());
}

#[test]
fn smollm2_encodes_as_transformers_does() {
    let goldens: Vec<Tokens> = goldens("smollm2_tokens.jsonl");
    for (path, tokenizer) in smollm2() {
        assert_tokens(&path.display().to_string(), &tokenizer, &goldens);
    }
}

#[test]
fn smollm2_decodes_in_one_go_as_it_does_token_by_token() {
    let goldens: Vec<Tokens> = goldens("smollm2_tokens.jsonl");
    for (path, tokenizer) in smollm2() {
        for Tokens { text, ids } in &goldens {
            let mut stream = tokenizer.decode_stream();
            let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
            streamed.extend(stream.finish());
            assert_eq!(streamed, tokenizer.decode(ids, true), "{}: {text:?}", path.display());
        }
    }
}

#[test]
fn smollm2_chats_render_and_encode_as_transformers_does() {
    let goldens: Vec<Chat> = goldens("smollm2_chats.jsonl");
    for (path, tokenizer) in smollm2() {
        let template = tokenizer.chat_template().unwrap();
        for Chat { messages, add_generation_prompt, text, ids } in &goldens {
            let rendered = template.render(messages, *add_generation_prompt).unwrap();
            assert_eq!(&rendered, text, "{}", path.display());
            assert_eq!(&tokenizer.encode(&rendered).unwrap(), ids, "{}: {text:?}", path.display());
        }
    }
}

#[test]
fn smollm2_ends_generation_at_the_end_of_a_turn() {
    for (path, tokenizer) in smollm2() {
        let end = tokenizer.token_to_id("<|im_end|>").unwrap();
        assert_eq!(tokenizer.eos_token_ids().first(), Some(&end), "{}", path.display());
        assert_eq!(tokenizer.vocab_size(), 49152);
        assert_eq!(tokenizer.bos_token_id(), tokenizer.token_to_id("<|im_start|>"));
    }
}

#[test]
fn a_saved_smollm2_tokenizer_encodes_the_same() {
    let goldens: Vec<Tokens> = goldens("smollm2_tokens.jsonl");
    for (path, tokenizer) in smollm2() {
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        let saved = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(saved.content_hash(), tokenizer.content_hash(), "{}", path.display());
        assert_tokens("saved", &saved, &goldens);
    }
}
