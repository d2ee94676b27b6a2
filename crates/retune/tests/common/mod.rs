//! What the tests of the program share: fixtures, a folder to work in, and runs of the program in it.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A random model of 80 thousand parameters with a tokenizer and a chat template.
pub const MODEL: &str = "gguf_llama/model.gguf";
/// A random model without a tokenizer, as transformers saves it.
pub const NO_TOKENIZER: &str = "llama_tied";
/// An adapter made by peft for `NO_TOKENIZER`.
pub const ADAPTER: &str = "lora_all_linear/adapter";
/// Steps of the run in `Folder`.
pub const STEPS: u64 = 30;

/// The methods with settings of their own, as flags of a run.
pub const METHODS: [&[&str]; 13] = [
    &["--set", "adapter.use_dora=true"],
    &["--set", "adapter.init_lora_weights=pissa"],
    &["--set", "adapter={target_modules: [q_proj], trainable_token_indices: [3, 50], loraplus_lr_ratio: 4}"],
    &["--set", "adapter={target_modules: [embed_tokens, q_proj]}"],
    &["--set", "method=partial", "--set", "adapter={norms: true, last_layers: 1}"],
    &["--set", "method=miss", "--set", "adapter={r: 8}"],
    &["--set", "method=ia3", "--set", "adapter=null"],
    &["--set", "method=prompt_tuning", "--set", "adapter={num_virtual_tokens: 5}"],
    &[
        "--set",
        "method=prompt_tuning",
        "--set",
        "adapter={num_virtual_tokens: 9, prompt_tuning_init: TEXT, prompt_tuning_init_text: the sand of time}",
    ],
    &["--set", "method=p_tuning", "--set", "adapter={num_virtual_tokens: 5}"],
    &["--set", "method=prefix_tuning", "--set", "adapter={num_virtual_tokens: 5}"],
    &[
        "--set",
        "method=prefix_tuning",
        "--set",
        "adapter={num_virtual_tokens: 9, prefix_init: text, prefix_init_text: the sand of time}",
    ],
    &["--set", "method=prefix_tuning", "--set", "adapter={num_virtual_tokens: 5, prefix_projection: true}"],
];

/// The path of a fixture.
pub fn golden(name: &str) -> String {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../retune-model/tests/goldens");
    goldens.join(name).to_str().expect("the sources lie under a UTF-8 path").to_owned()
}

/// Arguments in a row.
pub fn joined<'a>(parts: &[&[&'a str]]) -> Vec<&'a str> {
    parts.concat()
}

/// What is in a folder by path: files with their bytes, folders with none.
pub type Tree = BTreeMap<PathBuf, Option<Vec<u8>>>;

/// What the program left behind.
pub struct Output {
    /// `None` when a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn of(output: process::Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

/// Runs a command to its end.
pub fn run(mut command: Command) -> Output {
    Output::of(command.output().unwrap())
}

/// A folder with `train.jsonl` (30 rows), `eval.jsonl` (4 rows) and `run.yaml`, a run of `STEPS` steps that writes to `out`.
pub struct Folder {
    root: TempDir,
    cache: TempDir,
}

impl Folder {
    pub fn with_run() -> Self {
        let folder = Self { root: tempfile::tempdir().unwrap(), cache: tempfile::tempdir().unwrap() };
        folder.write("train.jsonl", rows(0..30));
        folder.write("eval.jsonl", rows(100..104));
        // JSON is YAML.
        let run = json!({
            "model": golden(MODEL),
            "output_dir": "out",
            "adapter": { "r": 4, "lora_alpha": 8, "lora_dropout": 0.1 },
            "data": { "train": "train.jsonl", "eval": "eval.jsonl", "max_length": 192 },
            "training": { "epochs": 2, "batch_size": 2, "save_steps": 3, "eval_steps": 10, "learning_rate": 0.01 },
        });
        folder.write("run.yaml", format!("{run:#}"));
        folder
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Copies the files of a fixture's folder to a folder of this name.
    pub fn copy(&self, fixture: &str, name: &str) {
        let to = self.path(name);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(golden(fixture)).unwrap() {
            let from = entry.unwrap().path();
            fs::write(to.join(from.file_name().unwrap()), fs::read(&from).unwrap()).unwrap();
        }
    }

    /// Everything in a folder of this name, hidden files included; nothing when it is not there.
    pub fn tree(&self, name: &str) -> Tree {
        let mut tree = Tree::new();
        let root = self.path(name);
        if root.exists() {
            list(&root, &root, &mut tree);
        }
        tree
    }

    /// The files of the run's adapter, but for the model card, which says how long the run took.
    pub fn adapter(&self) -> Tree {
        let mut tree = self.tree("out/adapter");
        assert!(tree.remove(Path::new("README.md")).is_some(), "there is no model card");
        tree
    }

    /// The program in this folder, without a network and without other programs.
    pub fn command_on(&self, threads: usize, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_retune"));
        command.arg("--threads").arg(threads.to_string()).args(args).current_dir(self.root.path());
        command.env("RETUNE_CACHE", self.cache.path()).env("HF_HUB_OFFLINE", "1").env("PATH", "");
        command.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        command
    }

    pub fn command(&self, args: &[&str]) -> Command {
        self.command_on(1, args)
    }

    pub fn retune(&self, args: &[&str]) -> Output {
        run(self.command(args))
    }

    pub fn succeeds(&self, args: &[&str]) -> Output {
        let output = self.retune(args);
        assert_eq!(output.code, Some(0), "{args:?}: {}", output.stderr);
        output
    }

    /// The program says no: exit code 1, an error that has all of `words`, no panic, and nothing in the folder has changed.
    pub fn refuses(&self, args: &[&str], words: &[&str]) {
        self.refuses_command(self.command(args), words);
    }

    pub fn refuses_command(&self, command: Command, words: &[&str]) {
        let what = format!("{:?}", command.get_args().collect::<Vec<_>>());
        let before = self.tree("");
        refused(&what, &run(command), words);
        let after = self.tree("");
        let changed: Vec<_> = after.keys().filter(|path| before.get(*path) != after.get(*path)).collect();
        assert!(changed.is_empty() && before.len() == after.len(), "{what} changed {changed:?}");
    }
}

/// Asserts that a run ended with an error that has all of `words`.
pub fn refused(what: &str, output: &Output, words: &[&str]) {
    let stderr = &output.stderr;
    assert_eq!(output.code, Some(1), "{what}: {stderr}");
    assert!(stderr.lines().any(|line| line.starts_with("error: ")), "{what}: {stderr}");
    assert!(!stderr.contains("panicked"), "{what}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{what}: `{word}` is not in: {stderr}");
    }
}

fn list(folder: &Path, root: &Path, tree: &mut Tree) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = if path.is_dir() { None } else { Some(fs::read(&path).unwrap()) };
        if bytes.is_none() {
            list(&path, root, tree);
        }
        tree.insert(path.strip_prefix(root).unwrap().to_owned(), bytes);
    }
}

/// A safetensors file with its JSON header changed.
pub fn with_header(bytes: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    change(&mut header);
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Where the values of a tensor begin in a safetensors file.
pub fn offset(bytes: &[u8], name: &str) -> usize {
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let length = u64::from_le_bytes(*length) as usize;
    let header: Value = serde_json::from_slice(&rest[..length]).unwrap();
    8 + length + header[name]["data_offsets"][0].as_u64().unwrap() as usize
}

/// Rows of about 110 tokens, no two the same.
pub fn rows(numbers: Range<usize>) -> String {
    const WORDS: [&str; 12] =
        ["the", "sand", "of", "time", "sing", "things", "on", "he's", "user", "song", "rest", "tone"];
    let row = |i: usize| {
        let prompt: Vec<_> = (1..25).map(|j| WORDS[(i * j + j) % WORDS.len()]).collect();
        let completion: Vec<_> = (0..20).map(|j| WORDS[(i + j * j) % WORDS.len()]).collect();
        let row = json!({ "prompt": prompt.join(" "), "completion": format!("{} {i}", completion.join(" ")) });
        format!("{row}\n")
    };
    numbers.map(row).collect()
}

/// A small generator (Knuth's MMIX), so that every run of a test makes the same choices.
pub struct Random(pub u64);

impl Random {
    /// A number from 0 to `end - 1`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % end
    }
}

/// The elements of a page: every one that is opened is closed, in order, but for those that need no end.
pub fn assert_well_formed(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("it begins as a page does");
    // Styles are no elements.
    let (before, style) = rest.split_once("<style>").unwrap();
    let (_, after) = style.split_once("</style>").unwrap();
    let whole = format!("{before}{after}");
    rest = &whole;
    while let Some((_, tag)) = rest.split_once('<') {
        let (tag, after) = tag.split_once('>').expect("a tag has an end");
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed out of order before {:.60}", after);
        } else if !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().unwrap());
        }
    }
    assert!(open.is_empty(), "{open:?} are left open");
}

/// A page is well formed, and needs nothing but itself: no script, no address.
pub fn assert_page(page: &str) {
    assert_well_formed(page);
    let own = page.replace("http://www.w3.org/2000/svg", "");
    for word in ["<script", "http:", "https:", "src=", "@import", "url(", "javascript"] {
        assert!(!own.contains(word), "{word} is in the page");
    }
}
