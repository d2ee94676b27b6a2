//! Hostile files: for each format that is read, what is done with a file of it here, and changes that make hostile files of good ones.
//!
//! A target takes any bytes. It must return, whatever they are; where a file is taken, it asserts what the reader promises of it. The corpus of
//! each is in `fuzz/corpus`; `tests/hostile.rs` replays and changes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use retune_adapter::{AdapterFile, gguf};
use retune_formats::gguf::write::Linears;
use retune_formats::safetensors;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::gguf_linears;
use retune_quant::SharedBytes;
use retune_text::chat_template::{ChatTemplate, Message};
use retune_text::go_template::Turns;
use retune_text::tokenizer::Tokenizer;
use retune_train::plan::Plan;
use retune_train::run_config::RunConfig;
use tempfile::TempDir;

use crate::{Lcg, checkpoint};

/// A format that is read.
pub struct Target {
    /// That of its folder in the corpus.
    pub name: &'static str,
    /// Reads the bytes as a file of this format.
    pub read: fn(&[u8]),
}

/// All of them. Where a format is of two files they stand one after the other, with a zero byte between.
pub const TARGETS: [Target; 8] = [
    Target { name: "safetensors", read: safetensors_file },
    Target { name: "model", read: model_folder },
    Target { name: "gguf", read: gguf_file },
    Target { name: "adapter", read: adapter_folder },
    Target { name: "adapter_gguf", read: adapter_gguf },
    Target { name: "tokenizer", read: tokenizer_folder },
    Target { name: "chat_template", read: chat_template },
    Target { name: "run_file", read: run_file },
];

/// The target of this name.
pub fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("no target is called {name}"))
}

/// The stored inputs of a target, in the order of their names.
pub fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

/// Two files in one input.
fn parts(data: &[u8]) -> (&[u8], &[u8]) {
    match data.iter().position(|byte| *byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[]),
    }
}

/// Where files of this process lie that are read by their path.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    folder
}

fn safetensors_file(data: &[u8]) {
    let Ok(tensors) = safetensors::parse(&SharedBytes::from_vec(data.to_vec())) else { return };
    for (name, tensor) in &tensors {
        let values: usize = tensor.shape.iter().product();
        assert_eq!(values * tensor.dtype.bitsize(), 8 * tensor.bytes.len(), "{name}");
        if let Ok(read) = tensor.to_f32(name) {
            assert_eq!(read.len(), values, "{name}");
        }
    }
}

/// Reads all that a checkpoint holds.
fn read_all(checkpoint: &Checkpoint) {
    for name in checkpoint.names() {
        let matrix = checkpoint.tensor(name).unwrap();
        assert_eq!(matrix.to_f32().len(), matrix.rows() * matrix.cols(), "{name}");
    }
    let _ = checkpoint.check_finite();
    let _ = checkpoint.hf_config_json();
}

/// A `config.json` and its weights.
fn model_folder(data: &[u8]) {
    let (config, weights) = parts(data);
    let folder = folder(&[("config.json", config), (safetensors::SINGLE, weights)]);
    if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
        read_all(&checkpoint);
    }
}

fn gguf_file(data: &[u8]) {
    let folder = folder(&[("model.gguf", data)]);
    let Ok(checkpoint) = Checkpoint::open(&folder.path().join("model.gguf")) else { return };
    read_all(&checkpoint);
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        use_tokenizer(&tokenizer);
    }
}

/// The model that adapters are for.
static BASE: LazyLock<Checkpoint> = LazyLock::new(|| checkpoint("llama_tied"));
static LINEARS: LazyLock<Linears> = LazyLock::new(|| gguf_linears(&BASE).unwrap());

/// An `adapter_config.json` and its weights.
fn adapter_folder(data: &[u8]) {
    let (config, weights) = parts(data);
    let folder = folder(&[("adapter_config.json", config), ("adapter_model.safetensors", weights)]);
    let Ok(file) = AdapterFile::read(folder.path()) else { return };
    for (name, (shape, values)) in &file.tensors {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
    }
    let Ok(overlay) = file.lower(&BASE.spec) else { return };
    if let Ok(params) = file.params(&overlay) {
        assert_eq!(params.len(), overlay.layout.len());
    }
}

fn adapter_gguf(data: &[u8]) {
    let folder = folder(&[("lora.gguf", data)]);
    let Ok(deltas) = gguf::read_lora(&folder.path().join("lora.gguf"), &LINEARS) else { return };
    for (module, delta) in &deltas {
        assert_eq!(
            (delta.a.len(), delta.b.len()),
            (delta.r * delta.in_features, delta.out_features * delta.r),
            "{module}"
        );
    }
}

/// A `tokenizer.json` and a `tokenizer_config.json`.
fn tokenizer_folder(data: &[u8]) {
    let (tokenizer, config) = parts(data);
    let mut files = vec![("tokenizer.json", tokenizer)];
    if !config.is_empty() {
        files.push(("tokenizer_config.json", config));
    }
    let folder = folder(&files);
    if let Ok(tokenizer) = Tokenizer::from_dir(folder.path()) {
        use_tokenizer(&tokenizer);
    }
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in ["", "the sand of time", " a<s>b\u{e9}\u{1f600}\0", "ab  abab 12,34"] {
        if let Ok((ids, ranges)) = tokenizer.encode_with_offsets(text) {
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()), "{ids:?}");
            assert!(ranges.iter().all(|range| range.end <= text.len()), "{ranges:?}");
            let _ = tokenizer.decode(&ids, false);
        }
        let _ = tokenizer.encode_with_special_tokens(text);
    }
    let _ = tokenizer.decode(&[0, 1, u32::MAX], true);
    let _ = tokenizer.content_hash();
    if let Some(template) = tokenizer.chat_template() {
        render(template);
    }
}

fn render(template: &ChatTemplate) {
    let message = |role: &str, content: &str| Message::new(role, content);
    let messages =
        [message("system", "Be brief."), message("user", "Name a <b>colour</b>."), message("assistant", "Red")];
    for messages in [&messages[..], &messages[1..2], &[]] {
        let rendered = template.render(messages, true);
        assert_eq!(rendered.is_ok(), template.render(messages, true).is_ok());
    }
    if let Some(turns) = Turns::of(template, "<s>") {
        turns.go_template();
    }
}

fn chat_template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    if let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") {
        render(&template);
    }
}

/// A run file, or the plan of a comparison.
fn run_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = RunConfig::parse(text, "run.yaml", &[]) {
        // What a run records of itself is a run file.
        let record = serde_json::to_string(&config).unwrap();
        let again = RunConfig::parse(&record, "run.json", &[]).unwrap_or_else(|error| panic!("{record}: {error}"));
        assert_eq!(serde_json::to_string(&again).unwrap(), record);
    }
    let _ = Plan::parse(text, "plan.yaml", &[]);
}

/// What lengths and counts are set to.
const EXTREMES: [u64; 12] =
    [0, 1, 2, 0x7f, 0xff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 40, 0x7fff_ffff_ffff_ffff, 1 << 63, u64::MAX];
/// What values in texts are set to.
const VALUES: [&str; 16] = [
    "0",
    "-1",
    "1e308",
    "1e-320",
    "4294967296",
    "18446744073709551615",
    "99999999999999999999",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "\"\\u0000\"",
    "NaN",
    "0.5",
    "\"a\"",
];
const NESTED: [&str; 6] = ["[", "{\"a\":", "(", "{% if true %}", "{{", "- "];

/// A changed input: `seed` with up to four changes. `other` is one whose parts may be taken.
pub fn changed(seed: &[u8], other: &[u8], random: &mut Lcg) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..=random.below(4) {
        change(&mut data, other, random);
    }
    data
}

fn change(data: &mut Vec<u8>, other: &[u8], random: &mut Lcg) {
    // Headers are at the start, where most of what can go wrong is.
    let reach = if random.below(2) == 0 { data.len().min(256) } else { data.len() };
    let at = random.below(reach + 1);
    let end = (at + 1 + random.below(16)).min(data.len());
    match random.below(11) {
        0 => data.truncate(at),
        1 if at < data.len() => data[at] ^= 1 << random.below(8),
        2 if at < data.len() => data[at] = [0, 0xff, b'"', b'\n', b'{'][random.below(5)],
        3 => {
            let bytes = EXTREMES[random.below(EXTREMES.len())].to_le_bytes();
            let width = [1, 4, 8][random.below(3)].min(data.len() - at);
            data[at..at + width].copy_from_slice(&bytes[..width]);
        }
        4 => drop(data.drain(at..end)),
        5 => {
            let piece = data[at..end].to_vec();
            data.splice(at..at, piece);
        }
        6 if !other.is_empty() => {
            let from = random.below(other.len());
            let piece = other[from..(from + 1 + random.below(64)).min(other.len())].to_vec();
            data.splice(at..end, piece);
        }
        7 | 8 => replace_value(data, at, VALUES[random.below(VALUES.len())]),
        9 => {
            let piece = NESTED[random.below(NESTED.len())].repeat([2, 200, 20_000][random.below(3)]);
            data.splice(at..at, piece.into_bytes());
        }
        _ => {
            let piece: Vec<u8> = (0..random.below(32)).map(|_| random.below(256) as u8).collect();
            data.splice(at..end, piece);
        }
    }
}

/// Puts another value in the place of the next one in a text.
fn replace_value(data: &mut Vec<u8>, at: usize, value: &str) {
    let is_value = |byte: &u8| byte.is_ascii_alphanumeric() || b"-+._\"".contains(byte);
    let Some(start) = data[at..].iter().position(|byte| b":=[, ".contains(byte)).map(|found| at + found + 1) else {
        return;
    };
    let Some(start) = data[start..].iter().position(|byte| *byte != b' ').map(|found| start + found) else { return };
    let length = data[start..].iter().position(|byte| !is_value(byte)).unwrap_or(data.len() - start);
    data.splice(start..start + length, value.bytes());
}
