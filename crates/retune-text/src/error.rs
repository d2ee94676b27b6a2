//! The one error type of this crate. A variant per cause; each text says what was found, what was expected and what to do.

use std::path::{Path, PathBuf};

/// Everything that can go wrong with a tokenizer or a chat template.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another error, with the file it was found in.
    #[error("{}: {error}", .path.display())]
    InFile { path: PathBuf, error: Box<Error> },

    /// The operating system refused to read a file.
    #[error("cannot read {}: {error}", .path.display())]
    Read { path: PathBuf, error: std::io::Error },

    /// JSON that cannot be read or written.
    #[error("not valid JSON: {error}; the file is damaged: download it again")]
    Json { error: serde_json::Error },

    /// A model directory without any tokenizer.
    #[error("{} has no tokenizer.json; copy it from the model's repository, together with tokenizer_config.json", .dir.display())]
    TokenizerMissing { dir: PathBuf },

    /// A model directory whose tokenizer is in another form only.
    #[error("{} has {found} but no tokenizer.json, the only form that is read; write one with Python: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)", .dir.display())]
    TokenizerNotConverted { dir: PathBuf, found: String },

    /// A tokenizer whose parts contradict each other.
    #[error("the tokenizer cannot be used: {cause}; download or convert the model again, with all its files")]
    TokenizerInvalid { cause: String },

    /// A kind of tokenizer in a GGUF file that is not implemented.
    #[error(
        "GGUF tokenizer {model:?} is not supported; supported: gpt2 (byte-level BPE), llama (SentencePiece BPE) and t5 (SentencePiece Unigram): use the model's Hugging Face directory"
    )]
    GgufTokenizerModel { model: String },

    /// A way of splitting text that is not implemented.
    #[error(
        "pre-tokenizer {name:?} (tokenizer.ggml.pre) is not known; known: {known}: use the model's Hugging Face directory"
    )]
    GgufPreTokenizerUnknown { name: String, known: String },

    /// A GGUF vocabulary that contradicts itself.
    #[error("GGUF metadata {key:?} holds {cause}; the file is damaged: download or convert it again")]
    GgufVocabulary { key: &'static str, cause: String },

    /// A tokenizer that a GGUF file cannot hold.
    #[error(
        "a GGUF file cannot hold this model's tokenizer: {cause}; merge into a directory, and convert that with llama.cpp's convert_hf_to_gguf.py"
    )]
    NoGgufTokenizer { cause: String },

    /// A text that the tokenizer cannot encode.
    #[error("the text cannot be encoded: {cause}; the tokenizer lacks what it needs for this text")]
    Encode { cause: String },

    /// A chat template that is not valid Jinja.
    #[error("the chat template does not compile: line {line}: {cause}; correct it in the model's files")]
    ChatTemplateSyntax { line: usize, cause: String },

    /// A conversation that the chat template refuses, or cannot evaluate.
    #[error(
        "the chat template cannot render these messages: line {line}: {cause}; change the messages' roles or order, or the template"
    )]
    ChatTemplateRender { line: usize, cause: String },

    /// A file that cannot be read or written, or a GGUF header that is damaged.
    #[error(transparent)]
    Formats(#[from] retune_formats::Error),
}

impl Error {
    /// This error with the file it was found in.
    pub fn at(self, path: &Path) -> Error {
        Error::InFile { path: path.to_owned(), error: Box::new(self) }
    }
}
