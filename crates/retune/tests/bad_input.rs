//! Input that cannot be used: each gives exit code 1 and a text that says what was found and what to do, and changes no file.

mod common;

use std::fs;

use common::{ADAPTER, Folder, MODEL, NO_TOKENIZER, Random, golden, joined, refused, with_header};
use serde_json::{Value, json};

/// A safetensors file of f32 with NaN for its first value.
fn with_nan(mut bytes: Vec<u8>) -> Vec<u8> {
    let header = u64::from_le_bytes(*bytes.first_chunk::<8>().unwrap()) as usize;
    bytes[8 + header..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    bytes
}

/// The tiny GGUF model with NaN in the last value, of its last norm.
fn gguf_with_nan() -> Vec<u8> {
    let mut bytes = fs::read(golden(MODEL)).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    bytes
}

/// A folder with the model that has no tokenizer in `model`.
fn with_directory_model() -> Folder {
    let folder = Folder::with_run();
    folder.copy(NO_TOKENIZER, "model");
    folder
}

#[test]
fn a_truncated_model_is_refused() {
    let folder = with_directory_model();
    let gguf = fs::read(golden(MODEL)).unwrap();
    for length in [0, 3, 10, 100, 5000, gguf.len() / 2, gguf.len() - 1] {
        folder.write("model.gguf", &gguf[..length]);
        folder.refuses(&["inspect", "model.gguf"], &["model.gguf", "truncated or damaged", "download it again"]);
    }
    let words = ["model.gguf", "truncated or damaged"];
    folder.refuses(&["train", "run.yaml", "--set", "model=model.gguf"], &words);
    folder.refuses(&["eval", "--model", "model.gguf", "--data", "eval.jsonl"], &words);

    let safetensors = folder.read("model/model.safetensors");
    for length in [0, 7, 8, 100, safetensors.len() / 2, safetensors.len() - 1] {
        folder.write("model/model.safetensors", &safetensors[..length]);
        let words = ["model/model.safetensors", "truncated or damaged", "download it again"];
        folder.refuses(&["inspect", "model"], &words);
    }
}

#[test]
fn no_changed_bit_of_a_header_makes_the_program_panic() {
    let folder = with_directory_model();
    folder.copy(ADAPTER, "adapter");
    folder.write("model.gguf", fs::read(golden(MODEL)).unwrap());
    let tokens = ["--tokens", "1,2,3", "--out", "logits.safetensors"];
    let on_gguf = joined(&[&["logits", "--model", "model.gguf"], &tokens]);
    let on_directory = joined(&[&["logits", "--model", "model"], &tokens]);
    let with_adapter = joined(&[&["logits", "--model", "model", "--adapter", "adapter"], &tokens]);
    let tokenize = vec!["tokenize", "--chat", "--model", "model.gguf", "the sand of time"];
    let cases = [
        ("model.gguf", 9000, on_gguf),
        ("model.gguf", 9000, tokenize),
        ("model/model.safetensors", 2000, on_directory.clone()),
        ("model/config.json", usize::MAX, on_directory),
        ("adapter/adapter_config.json", usize::MAX, with_adapter.clone()),
        ("adapter/adapter_model.safetensors", 3000, with_adapter),
    ];
    let mut random = Random(11);
    let out = folder.path("logits.safetensors");
    for (name, header, args) in cases {
        let whole = folder.read(name);
        for _ in 0..40 {
            let bit = random.below(8 * header.min(whole.len()));
            let mut changed = whole.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            folder.write(name, &changed);
            let output = folder.retune(&args);
            if output.code != Some(0) {
                refused(&format!("bit {bit} of {name}"), &output, &[]);
                assert!(!out.exists(), "bit {bit} of {name}");
            } else if out.exists() {
                fs::remove_file(&out).unwrap();
            }
        }
        folder.write(name, &whole);
    }
}

#[test]
fn a_safetensors_header_that_contradicts_the_file_is_refused() {
    let folder = with_directory_model();
    let name = "model/model.safetensors";
    let whole = folder.read(name);
    let refuses = |bytes: Vec<u8>, words: &[&str]| {
        folder.write(name, bytes);
        folder.refuses(&["inspect", "model"], words);
    };
    let with_length = |length: u64| [&length.to_le_bytes()[..], &whole[8..]].concat();
    refuses(with_length(2 * whole.len() as u64), &[name, "the header ends at byte", "download it again"]);
    refuses(with_length(u64::MAX), &[name, "expected at most", "download it again"]);
    let norm = "model.norm.weight";
    let overflow = with_header(&whole, |header| header[norm]["shape"] = json!([1u64 << 33, 1u64 << 33]));
    refuses(overflow, &[name, "overflow", "download it again"]);
    let transposed = with_header(&whole, |header| header["model.embed_tokens.weight"]["shape"] = json!([32, 96]));
    refuses(transposed, &["model.embed_tokens.weight has shape [32, 96]", "needs [96, 32]", "different models"]);
    let integers = with_header(&whole, |header| header[norm]["dtype"] = json!("I32"));
    refuses(integers, &["model.norm.weight is stored as I32", "F32, F16 or BF16"]);
    let missing = with_header(&whole, |header| {
        let header = header.as_object_mut().unwrap();
        let norm = header.remove(norm).unwrap();
        header.insert("another".to_owned(), norm);
    });
    refuses(missing, &["1 tensor(s)", "missing, first of them model.norm.weight", "incomplete"]);
}

#[test]
fn a_gguf_header_that_contradicts_the_file_is_refused() {
    let folder = Folder::with_run();
    let whole = fs::read(golden(MODEL)).unwrap();
    let find = |name: &str| whole.windows(name.len()).position(|bytes| bytes == name.as_bytes()).unwrap();
    let refuses = |at: usize, bytes: &[u8], words: &[&str]| {
        let mut changed = whole.clone();
        changed[at..][..bytes.len()].copy_from_slice(bytes);
        folder.write("model.gguf", changed);
        folder.refuses(&["inspect", "model.gguf"], words);
    };
    refuses(0, b"GGML", &["model.gguf", "not a GGUF file", "\"GGML\""]);
    refuses(4, &9u32.to_le_bytes(), &["GGUF version 9", "convert the model again"]);
    refuses(8, &u64::MAX.to_le_bytes(), &["the list of tensors", "truncated or damaged"]);
    // After a tensor's name: the number of dimensions (u32), then each dimension (u64).
    let query = "blk.0.attn_q.weight";
    let dimensions = find(query) + query.len();
    let columns = dimensions + 4;
    refuses(dimensions, &77u32.to_le_bytes(), &[query, "77 dimensions", "1 to 4"]);
    refuses(columns, &(1u64 << 62).to_le_bytes(), &[query, "fits in memory", "download or convert it again"]);
    refuses(columns + 8, &(1u64 << 62).to_le_bytes(), &[query, "fits in memory", "download or convert it again"]);
    refuses(columns + 8, &(1u64 << 20).to_le_bytes(), &[query, "truncated or damaged", "download it again"]);
    refuses(columns + 8, &32u64.to_le_bytes(), &[query, "[32, 64]", "needs [64, 64]", "different models"]);
    refuses(find("output_norm.weight"), b"x", &["missing", "output_norm.weight"]);
}

#[test]
fn a_model_configuration_with_an_impossible_value_is_refused() {
    let folder = with_directory_model();
    let name = "model/config.json";
    let whole: Value = serde_json::from_slice(&folder.read(name)).unwrap();
    let cases = [
        ("num_hidden_layers", json!(1u64 << 40)),
        ("hidden_size", json!(0)),
        ("vocab_size", json!(1u64 << 62)),
        ("num_attention_heads", json!(3)),
        ("head_dim", json!(7)),
        ("rms_norm_eps", json!("x")),
        ("model_type", json!("bert")),
    ];
    for (key, value) in cases {
        let mut config = whole.clone();
        config[key] = value;
        folder.write(name, config.to_string());
        folder.refuses(&["inspect", "model"], &[name, key]);
    }
    folder.write(name, "{");
    folder.refuses(&["inspect", "model"], &[name, "not valid JSON", "download it again"]);
    fs::remove_file(folder.path(name)).unwrap();
    folder.refuses(&["inspect", "model"], &["config.json is missing", "download it"]);
}

#[test]
fn a_model_without_a_tokenizer_is_refused_by_what_needs_one() {
    let folder = with_directory_model();
    let words = ["model has no tokenizer.json", "copy it from the model's repository"];
    folder.refuses(&["tokenize", "--model", "model", "hello"], &words);
    folder.refuses(&["generate", "--model", "model", "hello"], &words);
    folder.refuses(&["eval", "--model", "model", "--data", "eval.jsonl"], &words);
    folder.refuses(&["data", "run.yaml", "--set", "model=model"], &words);
    folder.refuses(&["train", "run.yaml", "--set", "model=model"], &words);
}

#[test]
fn a_weight_that_is_not_a_number_is_refused() {
    let folder = Folder::with_run();
    folder.write("model.gguf", gguf_with_nan());
    folder.succeeds(&["train", "run.yaml", "--set", "training.max_steps=1"]);
    let adapter = "out/adapter";
    let words = ["model.norm.weight holds NaN at row 0, column 63", "every weight must be finite"];
    folder.refuses(&["train", "run.yaml", "--set", "model=model.gguf", "--set", "output_dir=on"], &words);
    folder.refuses(&["merge", "--model", "model.gguf", "--adapter", adapter, "--out", "merged"], &words);
}

#[test]
fn a_weight_that_is_not_a_number_is_refused_without_training() {
    let folder = with_directory_model();
    folder.write("model.gguf", gguf_with_nan());
    let words = ["model.norm.weight holds NaN", "every weight must be finite"];
    folder.refuses(&["eval", "--model", "model.gguf", "--data", "eval.jsonl"], &words);
    folder.refuses(&["generate", "--model", "model.gguf", "hello"], &words);
    let safetensors = with_nan(folder.read("model/model.safetensors"));
    folder.write("model/model.safetensors", safetensors);
    let logits = ["logits", "--model", "model", "--tokens", "1,2", "--out", "logits.safetensors"];
    folder.refuses(&logits, &["holds NaN", "every weight must be finite"]);
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let folder = Folder::with_run();
    let (model, adapter) = (golden(MODEL), golden(ADAPTER));
    let both = ["--model", &model, "--adapter", &adapter];
    let words = ["lora_A.weight` has shape [4, 48], expected [4, 96]", "another model", "llama_tied"];
    folder.refuses(&joined(&[&["eval", "--data", "eval.jsonl"], &both]), &words);
    folder.refuses(&joined(&[&["generate", "hello"], &both]), &words);
    folder.refuses(&joined(&[&["merge", "--out", "merged"], &both]), &words);
    folder.refuses(&joined(&[&["logits", "--tokens", "1", "--out", "l.safetensors"], &both]), &words);
    folder.refuses(&["train", "run.yaml", "--set", &format!("adapter_init={adapter}")], &words);
}

#[test]
fn a_damaged_adapter_is_refused() {
    let folder = with_directory_model();
    folder.copy(ADAPTER, "adapter");
    let logits = ["logits", "--model", "model", "--tokens", "1", "--out", "l.safetensors", "--adapter"];
    let merge = ["merge", "--model", "model", "--out", "merged", "--adapter"];
    let refuses = |words: &[&str]| {
        folder.refuses(&joined(&[&logits, &["adapter"]]), words);
        folder.refuses(&joined(&[&merge, &["adapter"]]), words);
    };
    let (weights, config) = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json");
    let whole = folder.read(weights);
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        folder.write(weights, &whole[..length]);
        refuses(&[weights, "not a valid safetensors file", "save the adapter again"]);
    }
    folder.write(weights, with_nan(whole.clone()));
    refuses(&["lora_A.weight` holds NaN at element 0", "must be finite"]);
    fs::remove_file(folder.path(weights)).unwrap();
    refuses(&[weights, "does not exist", "save the adapter again"]);
    folder.write(weights, whole);

    let whole = folder.read(config);
    let read: Value = serde_json::from_slice(&whole).unwrap();
    for (key, value) in
        [("use_qalora", json!(true)), ("peft_type", json!("LOHA")), ("r", json!(0)), ("bias", json!("x"))]
    {
        let mut changed = read.clone();
        changed[key] = value;
        folder.write(config, changed.to_string());
        refuses(&[config, key]);
    }
    folder.write(config, &whole[..whole.len() / 2]);
    refuses(&[config, "not valid JSON"]);
    folder.refuses(&joined(&[&logits, &["nowhere"]]), &["nowhere/adapter_config.json does not exist", "Expected"]);
}

#[test]
fn rows_that_cannot_be_used_are_refused_with_their_line() {
    let folder = Folder::with_run();
    let good = String::from_utf8(folder.read("train.jsonl")).unwrap();
    let after_good = |row: &[u8]| [good.as_bytes(), row, b"\n"].concat();
    let long = format!("{{\"prompt\": \"{}\", \"completion\": \"x\"}}", "the sand ".repeat(200));
    let cases: [(&str, Vec<u8>, &[&str]); 14] = [
        ("rows.jsonl", vec![], &["rows.jsonl holds no rows", "expected at least one"]),
        ("rows.jsonl", b"\n\n".to_vec(), &["rows.jsonl holds no rows"]),
        ("rows.json", b"[]".to_vec(), &["rows.json holds no rows"]),
        ("rows.jsonl", after_good(b"{\"prompt\": ["), &["rows.jsonl, line 31", "expected one JSON object a line"]),
        ("rows.jsonl", after_good(b"17"), &["rows.jsonl, line 31", "the row is 17"]),
        ("rows.jsonl", after_good(b"{\"prompt\": \"\xff\xfe\"}"), &["rows.jsonl, line 31", "save the file as UTF-8"]),
        ("rows.jsonl", after_good(b"{\"prompt\": \"a\"}"), &["rows.jsonl, line 31", "no column \"completion\""]),
        (
            "rows.jsonl",
            after_good(b"{\"prompt\": 3, \"completion\": \"x\"}"),
            &["rows.jsonl, line 31", "column prompt is 3", "expected"],
        ),
        (
            "rows.jsonl",
            after_good(long.as_bytes()),
            &[
                "rows.jsonl, line 31",
                "tokens, data.max_length is 192",
                "raise it, shorten the row, or set data.overlong",
            ],
        ),
        (
            "rows.jsonl",
            b"{\"question\": \"a\"}".to_vec(),
            &["line 1", "no known format", "\"question\"", "data.columns"],
        ),
        (
            "rows.jsonl",
            b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}".to_vec(),
            &["rows.jsonl, line 1", "no turn of the role \"assistant\""],
        ),
        ("rows.jsonl", [&b"{\"text\":"[..], &[b'['; 100_000]].concat(), &["rows.jsonl, line 1", "recursion limit"]),
        ("rows.csv", b"prompt,completion\na,b,c\n".to_vec(), &["rows.csv, line 2", "3 fields", "header line"]),
        ("rows.parquet", good.clone().into_bytes(), &["rows.parquet", "no Parquet file", "cut off"]),
    ];
    for (name, bytes, words) in cases {
        folder.write(name, bytes);
        let data = format!("data.train={name}");
        folder.refuses(&["train", "run.yaml", "--set", "data.overlong=error", "--set", &data], words);
    }
    folder.refuses(&["train", "run.yaml", "--set", "data.train=nowhere.jsonl"], &["nowhere.jsonl", "readable file"]);
    folder.refuses(&["eval", "--model", &golden(MODEL), "--data", "rows.csv"], &["rows.csv, line 2"]);
}

#[test]
fn a_length_that_cuts_every_answer_away_is_refused() {
    let folder = Folder::with_run();
    let words =
        ["none of the 30 rows has a token to train on", "data.max_length = 10", "raise it or shorten the prompts"];
    folder.refuses(&["train", "run.yaml", "--set", "data.max_length=10"], &words);
    folder.refuses(&["data", "run.yaml", "--set", "data.max_length=10"], &words);
    let model = golden(MODEL);
    let eval = ["eval", "--model", &model, "--data", "eval.jsonl", "--max-length", "10"];
    folder.refuses(&eval, &["none of the 4 rows", "raise it"]);
}

#[test]
fn a_run_file_with_a_mistake_is_refused_with_the_key() {
    let folder = Folder::with_run();
    let cases: [(&str, &[&str]); 23] = [
        (
            "adapter.target_modules=[q_prj]",
            &["adapter.target_modules: `q_prj` matches no module", "Did you mean `q_proj`", "gate_proj"],
        ),
        (
            "adapter.target_modules='.*nix'",
            &["adapter.target_modules: \".*nix\" selects no linear module", "regular expression", "q_proj"],
        ),
        ("adapter.target_modules='(('", &["adapter.target_modules", "`((`", "regular expression"]),
        ("training.lerning_rate=1", &["unknown key training.lerning_rate", "did you mean training.learning_rate"]),
        ("adapter.rr=1", &["unknown key adapter.rr", "did you mean adapter.r?"]),
        ("epochs=1", &["unknown key epochs", "did you mean training.epochs"]),
        ("training.lr=1", &["unknown key training.lr; did you mean training.learning_rate? Keys of training"]),
        ("adapter.rank=8", &["unknown key adapter.rank; did you mean adapter.r?"]),
        ("lora_alpha=8", &["unknown key lora_alpha; did you mean adapter.lora_alpha?"]),
        ("val_set_size=0.1", &["unknown key val_set_size; did you mean data.eval_fraction?"]),
        ("load_in_4bit=true", &["unknown key load_in_4bit; did you mean base.storage?"]),
        (
            "data.separator=';'",
            &["unknown key data.separator: columns of a .csv file are separated by what its header"],
        ),
        ("training.zzz=1", &["unknown key training.zzz. Keys of training"]),
        ("training.epochs=many", &["training.epochs is the text \"many\"", "expected a number"]),
        ("training.epochs=0", &["training.epochs is 0", "above 0"]),
        ("training.lr_scheduler_type=cosin", &["lr_scheduler_type", "\"cosin\"", "Did you mean cosine"]),
        ("training.tokens_per_pass=10", &["training.tokens_per_pass is 10", "data.max_length, which is 192"]),
        ("adapter.lora_dropout=1.5", &["adapter.lora_dropout", "1.5"]),
        ("adapter.r=4000000000", &["adapter.r", "4000000000"]),
        ("adapter.bias=all", &["adapter.bias", "all"]),
        ("adapter={target_modules: [q_proj], layers_to_transform: []}", &["adapter.layers_to_transform"]),
        ("method=full", &["adapter is given with method full", "Remove it"]),
        ("training", &["\"training\" has no `=`", "KEY=VALUE"]),
    ];
    for (change, words) in cases {
        folder.refuses(&["train", "run.yaml", "--set", change], words);
    }
    folder.write("broken.yaml", "model: {a\n");
    folder.refuses(&["train", "broken.yaml"], &["broken.yaml is not valid YAML", "line 1"]);
    folder.write("short.yaml", "model: m\noutput_dir: out\ndata: {eval: eval.jsonl}\n");
    folder.refuses(&["data", "short.yaml"], &["the key data.train is missing"]);
    folder.refuses(&["train", "nowhere.yaml"], &["nowhere.yaml", "readable file"]);
}

#[test]
fn an_output_folder_with_something_else_in_it_is_refused() {
    let folder = Folder::with_run();
    fs::create_dir(folder.path("theirs")).unwrap();
    folder.write("theirs/notes.txt", "keep me");
    let args = ["train", "run.yaml", "--set", "training.max_steps=1", "--set", "output_dir=theirs"];
    folder.refuses(&args, &["theirs exists and is not empty", "set another output_dir", "--overwrite"]);
    folder.succeeds(&joined(&[&args, &["--overwrite"]]));
    assert_eq!(folder.read("theirs/notes.txt"), b"keep me");
    // What somebody has put beside what a run wrote is not the run's to remove.
    for name in ["theirs/adapter/mine.txt", "theirs/checkpoints/mine.safetensors"] {
        folder.write(name, "keep me");
    }
    fs::create_dir(folder.path("theirs/adapter/more")).unwrap();
    let output = folder.succeeds(&joined(&[&args, &["--overwrite", "--set", "training.seed=1"]]));
    let words = "theirs/adapter holds what the run did not write, which is left there: mine.txt, more";
    assert!(output.stderr.contains(words), "{}", output.stderr);
    for name in ["theirs/adapter/mine.txt", "theirs/checkpoints/mine.safetensors"] {
        assert_eq!(folder.read(name), b"keep me");
    }
    assert!(folder.path("theirs/adapter/more").is_dir());
    // A model that was merged there has no record of a run.
    folder.succeeds(&["merge", "--model", &golden(MODEL), "--adapter", "theirs/adapter", "--out", "theirs/model"]);
    let overwrite = joined(&[&args, &["--overwrite"]]);
    folder.refuses(&overwrite, &["theirs/model was not written by the run", "move it"]);
    fs::remove_dir_all(folder.path("theirs/model")).unwrap();
    let full = ["--set", "method=full", "--set", "adapter=null", "--overwrite"];
    folder.succeeds(&joined(&[&args, &full]));
    assert!(!folder.path("theirs/adapter/adapter_config.json").exists(), "an adapter of the earlier run");
    folder.write("theirs/model/mine.txt", "keep me");
    for more in ["--resume", "--overwrite"] {
        folder.succeeds(&joined(&[&args, &full[..4], &[more]]));
        assert_eq!(folder.read("theirs/model/mine.txt"), b"keep me");
        folder.succeeds(&["inspect", "theirs/model"]);
    }
    folder.refuses(&["train", "run.yaml", "--set", "output_dir=theirs/notes.txt"], &["cannot create theirs/notes.txt"]);
}

#[test]
fn resuming_does_not_put_a_run_into_a_folder_of_something_else() {
    let folder = Folder::with_run();
    fs::create_dir(folder.path("theirs")).unwrap();
    folder.copy(ADAPTER, "theirs/adapter");
    let args = ["train", "run.yaml", "--resume", "--set", "output_dir=theirs"];
    folder.refuses(&args, &["theirs", "set another output_dir"]);
}

#[test]
fn a_model_that_is_not_here_is_refused_with_what_to_do() {
    let folder = Folder::with_run();
    let unknown = ["cannot fetch someone/some-model", "HF_HUB_OFFLINE", "give the path as the model"];
    folder.refuses(&["train", "run.yaml", "--set", "model=someone/some-model"], &unknown);
    let known = ["train", "run.yaml", "--set", "model=HuggingFaceTB/SmolLM2-135M-Instruct"];
    folder.refuses(&known, &["the Python package", "cannot be run", "give the path as the model"]);
    let words = ["neither a path that exists nor a model", "retune fetch someone/some-model"];
    folder.refuses(&["eval", "--model", "someone/some-model", "--data", "eval.jsonl"], &words);
    folder.refuses(&["inspect", "some model"], &["neither a path that exists", "give a model directory, a .gguf file"]);
    folder.write("model.gguf", fs::read(golden(MODEL)).unwrap());
    folder.refuses(&["inspect", "modle.gguf"], &["did you mean `model.gguf`?"]);
    folder.refuses(&["fetch", "nonsense"], &["`nonsense` is not the id of a model", "owner/name"]);
}

#[test]
fn arguments_out_of_their_range_are_refused() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let logits = ["logits", "--model", &model, "--out", "l.safetensors", "--tokens"];
    let refuses = |args: &[&str], words: &[&str]| folder.refuses(&joined(&[&logits, args]), words);
    refuses(&["1,288"], &["token 288 is outside the model's vocabulary of 288"]);
    // Learned positions end.
    let gpt2 = golden("gpt2");
    let long = vec!["1"; 33].join(",");
    let on_gpt2 = ["logits", "--model", &gpt2, "--out", "l.safetensors", "--tokens", &long];
    folder.refuses(&on_gpt2, &["33 tokens", "learned positions for 32"]);
    refuses(&["1,2", "--labels", "1"], &["1 labels for 2 tokens", "-100 where it is not trained"]);
    refuses(&["1,2", "--labels", "1,3"], &["label 1 is 3", "the token itself (2) or -100"]);
    let generate = ["generate", "--model", &model, "hello"];
    let refuses = |args: &[&str], words: &[&str]| folder.refuses(&joined(&[&generate, args]), words);
    refuses(&["--max-new-tokens", "512"], &["512 to generate", "the model's context of 512", "lower --max-new-tokens"]);
    refuses(&["--temperature", "nan"], &["--temperature is NaN", "expected 0 (greedy) or more"]);
    refuses(&["--top-p", "0"], &["--top-p is 0", "expected more than 0"]);
    let bench = ["bench", "train", "--model", &model, "--data", "train.jsonl", "--steps", "2"];
    folder.refuses(&bench, &["--steps must be more than 3"]);
    folder.refuses_command(folder.command_on(0, &["schema"]), &["--threads is 0", "expected 1 to"]);
    let elsewhere = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    let lacks = format!("RETUNE_ISA asks for {elsewhere}, but this machine offers");
    for (isa, words) in [
        ("nonsense", ["RETUNE_ISA is \"nonsense\"", "expected portable, avx2, avx512 or neon", "unset it"]),
        (elsewhere, [&lacks, "at most", "unset it"]),
    ] {
        let mut command = folder.command(&["schema"]);
        command.env("RETUNE_ISA", isa);
        folder.refuses_command(command, &words);
    }
}

#[test]
fn the_longest_answer_that_can_be_asked_for_does_not_overflow() {
    let folder = Folder::with_run();
    let limit = usize::MAX.to_string();
    let model = golden(MODEL);
    let generate = ["generate", "--model", &model, "hello", "--max-new-tokens", &limit];
    folder.refuses(&generate, &[&limit, "the model's context of 512"]);
}

#[test]
fn an_error_names_its_cause_once() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let eval = ["eval", "--model", &model, "--data", "eval.jsonl", "--predictions", "nowhere/p.jsonl"];
    let output = folder.retune(&eval);
    refused("eval", &output, &["cannot write nowhere/p.jsonl"]);
    assert_eq!(output.stderr.matches("os error 2").count(), 1, "{}", output.stderr);
}

#[test]
fn a_folder_that_is_not_there_is_named_before_anything_is_computed() {
    let folder = Folder::with_run();
    // Were the model opened first, that would be the error.
    let logits = ["logits", "--model", "no-model", "--tokens", "1", "--out", "nowhere/l.safetensors"];
    folder.refuses(&logits, &["nowhere/l.safetensors cannot be written: there is no folder nowhere"]);
}

#[test]
fn a_warm_up_leaves_something_to_train() {
    let folder = Folder::with_run();
    let metrics = |more: &[&str]| -> (String, Vec<f64>) {
        let args = ["train", "run.yaml", "--overwrite"];
        let output = folder.succeeds(&joined(&[&args, more]));
        let text = String::from_utf8(folder.read("out/metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        (output.stderr, lines.filter_map(|line| line["learning_rate"].as_f64()).collect())
    };
    // The usual part of one step would be all of it.
    assert_eq!(metrics(&["--set", "training.max_steps=1"]).1, [0.01]);
    let (said, rates) = metrics(&["--set", "training.max_steps=2", "--set", "training.warmup_steps=4"]);
    assert_eq!(rates, [0.0, 0.0025]);
    assert!(
        said.contains("training.warmup_steps is 4, and the run has 2 steps: the learning rate rises to 2.50e-3"),
        "{said}"
    );
    let args =
        ["train", "run.yaml", "--overwrite", "--set", "training.max_steps=1", "--set", "training.warmup_steps=5"];
    folder.refuses(&args, &["training.warmup_steps is 5, and the run has one step", "set it to 0"]);
}

#[test]
fn a_soft_prompt_that_fills_the_context_is_refused() {
    let folder = Folder::with_run();
    for method in ["prompt_tuning", "prefix_tuning"] {
        let method = format!("method={method}");
        let args = ["train", "run.yaml", "--set", &method, "--set", "adapter={num_virtual_tokens: 512}"];
        folder.refuses(
            &args,
            &["adapter.num_virtual_tokens is 512", "context of 512 tokens has no room for a row", "lower it"],
        );
    }
}

#[test]
fn columns_are_separated_as_the_header_says() {
    let folder = Folder::with_run();
    for separator in [";", "\t", "|"] {
        folder.write(
            "rows.csv",
            ["prompt,completion", "a, b,c", "d,e"].map(|line| line.replacen(',', separator, 1)).join("\n"),
        );
        let report = folder.succeeds(&["data", "run.yaml", "--json", "--set", "data.train=rows.csv"]).json();
        assert_eq!(report["train"]["format"], "prompt_completion", "{separator:?}");
    }
}

#[test]
fn what_cannot_be_combined_is_told_how_it_can() {
    let folder = Folder::with_run();
    folder.succeeds(&[
        "train",
        "run.yaml",
        "--set",
        "method=miss",
        "--set",
        "adapter={r: 8}",
        "--set",
        "training.max_steps=2",
    ]);
    let combine = ["combine", "--adapter", "out/adapter=1", "--out", "both"];
    let model = golden(MODEL);
    let advice = format!("retune convert out/adapter --to lora --model {model} --out FOLDER");
    folder.refuses(&combine, &["out/adapter is an adapter of method miss", &advice]);
    // What it says to do works.
    folder.succeeds(&["convert", "out/adapter", "--to", "lora", "--model", &model, "--out", "plain"]);
    folder.succeeds(&["combine", "--adapter", "plain=1", "--out", "both"]);
    for command in [
        &["combine", "--adapter", "plain=1", "--out", "both"][..],
        &["convert", "plain", "--to", "lora", "--out", "both"],
    ] {
        folder.refuses(command, &["both is not empty", "give another name"]);
    }
}

/// A pipe that nobody reads, as after `| head`.
#[cfg(unix)]
fn closed_pipe() -> std::io::PipeWriter {
    let (_, writer) = std::io::pipe().unwrap();
    writer
}

#[cfg(unix)]
#[test]
fn a_reader_that_has_seen_enough_ends_the_program_quietly() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    for args in [&["schema"][..], &["inspect", &model], &["data", "run.yaml"]] {
        let mut command = folder.command(args);
        command.stdout(closed_pipe());
        assert_eq!(common::run(command).stderr, "", "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_that_cannot_be_written_is_an_error() {
    let folder = Folder::with_run();
    let model = golden(MODEL);
    let tokenize = ["tokenize", "--model", &model, "hello"];
    for args in [&["schema"][..], &["inspect", &model], &["data", "run.yaml"], &tokenize] {
        let mut command = folder.command(args);
        command.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
        refused(&format!("{args:?}"), &common::run(command), &[]);
    }
}

/// A log on a full disk, or a pager that was closed, costs no training.
#[cfg(target_os = "linux")]
#[test]
fn messages_that_cannot_be_written_do_not_end_a_run() {
    let folder = Folder::with_run();
    let args = ["train", "run.yaml", "--overwrite", "--set", "training.max_steps=1"];
    let mut command = folder.command(&args);
    command.stderr(fs::File::options().write(true).open("/dev/full").unwrap());
    assert_eq!(common::run(command).code, Some(0), "on a full disk");
    let mut command = folder.command(&args);
    command.stderr(closed_pipe());
    assert_eq!(common::run(command).code, Some(0), "on a closed pipe");
}

/// A rename would replace what is there, be it `/dev/null`; a socket stands for what is no plain file.
#[cfg(unix)]
#[test]
fn what_is_no_plain_file_is_not_replaced_by_one() {
    use std::os::unix::fs::FileTypeExt;
    use std::os::unix::net::UnixListener;

    let folder = Folder::with_run();
    let socket = folder.path("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let output = folder.retune(&["logits", "--model", &golden(MODEL), "--tokens", "1", "--out", "socket"]);
    refused("logits", &output, &["cannot write socket"]);
    assert!(fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
}

#[test]
fn an_adapter_to_go_on_from_is_held_against_the_method() {
    let folder = Folder::with_run();
    let short = ["--set", "training.max_steps=1", "--set", "training.eval_steps=9"];
    let train = |more: &[&'static str]| joined(&[&["train", "run.yaml"], &short, more]);
    for (out, method) in [("output_dir=ia3", "method=ia3"), ("output_dir=p", "method=p_tuning")] {
        folder.succeeds(&train(&["--set", out, "--set", method, "--set", "adapter=null"]));
    }
    folder.succeeds(&train(&[
        "--set",
        "output_dir=prompt",
        "--set",
        "method=prompt_tuning",
        "--set",
        "adapter={num_virtual_tokens: 4}",
    ]));
    let go_on = |more: &[&'static str], words: &[&str]| folder.refuses(&train(more), words);
    go_on(
        &["--set", "method=miss", "--set", "adapter={r: 4}", "--set", "adapter_init=ia3/adapter"],
        &["adapter_init is an adapter of method ia3", "trains with method miss", "set method to ia3"],
    );
    go_on(
        &["--set", "method=p_tuning", "--set", "adapter=null", "--set", "adapter_init=p/adapter"],
        &["the network that computes the rows of method p_tuning is not in an adapter's file"],
    );
    go_on(
        &[
            "--set",
            "method=prompt_tuning",
            "--set",
            "adapter={num_virtual_tokens: 4, prompt_tuning_init: RANDOM}",
            "--set",
            "adapter_init=prompt/adapter",
        ],
        &["adapter.prompt_tuning_init says how an adapter starts", "remove one of them"],
    );
    // Without that it goes on.
    folder.succeeds(&train(&[
        "--set",
        "method=prompt_tuning",
        "--set",
        "adapter=null",
        "--set",
        "adapter_init=prompt/adapter",
    ]));
}

#[test]
fn settings_that_would_have_no_effect_or_cannot_be_saved_are_refused() {
    let folder = Folder::with_run();
    let refused = |adapter: &str, words: &[&str]| {
        folder.refuses(&["train", "run.yaml", "--set", &format!("adapter={adapter}")], words);
    };
    refused("{target_modules: [embed_tokens], lora_dropout: 0.2}", &["adapter.lora_dropout", "no effect on tables"]);
    refused("{target_modules: [embed_tokens], loraplus_lr_ratio: 16}", &["adapter.loraplus_lr_ratio", "no effect"]);
    refused("{target_modules: [k_proj], r: 100, init_lora_weights: olora}", &["adapter.r: a rank of 100 is more than"]);
    refused("{r: 40000, init_lora_weights: pissa}", &["r: a rank of 40000 is out of range"]);
    refused(
        "{target_modules: [q_proj], trainable_token_indices: {embed_tokens: [3], model.embed_tokens: [4]}}",
        &["adapter.trainable_token_indices: two entries mean model.embed_tokens"],
    );
    refused("{trainable_token_indices: [100000]}", &["there is no token 100000"]);
}

#[test]
fn rows_of_other_tokens_and_another_scale_of_a_table_are_no_start() {
    let folder = Folder::with_run();
    let train = |adapter: &str, more: &[&str]| {
        let adapter = format!("adapter={adapter}");
        folder.retune(&joined(&[&["train", "run.yaml", "--set", "training.max_steps=2", "--set", &adapter], more]))
    };
    let rows = "{target_modules: [q_proj], r: 4, trainable_token_indices: [3, 50]}";
    assert_eq!(train(rows, &[]).code, Some(0));
    let from = ["--set", "adapter_init=out/adapter", "--set", "output_dir=again"];
    let other = train(&rows.replace("[3, 50]", "[50, 3]"), &from);
    assert!(other.code == Some(1) && other.stderr.contains("tokens [3, 50], the run's of [50, 3]"), "{}", other.stderr);
    assert_eq!(train(rows, &from).code, Some(0));
    let table = "{target_modules: [embed_tokens], r: 4, lora_alpha: 8}";
    assert_eq!(train(table, &["--overwrite"]).code, Some(0));
    let from = ["--set", "adapter_init=out/adapter", "--set", "output_dir=third"];
    let other = train(&table.replace("lora_alpha: 8", "lora_alpha: 800"), &from);
    assert!(other.code == Some(1) && other.stderr.contains("it scales a table by 2"), "{}", other.stderr);
}

#[test]
fn a_result_does_not_replace_what_it_is_made_of() {
    let folder = Folder::with_run();
    let model = folder.path("model.gguf");
    fs::copy(golden(MODEL), &model).unwrap();
    let data = folder.read("eval.jsonl");
    let eval = ["eval", "--model", "model.gguf", "--data", "eval.jsonl", "--generate", "--max-new-tokens", "2"];
    folder.refuses(&joined(&[&eval, &["--predictions", "eval.jsonl"]]), &["eval.jsonl is what this reads"]);
    assert_eq!(folder.read("eval.jsonl"), data);
    let logits = ["logits", "--model", "model.gguf", "--tokens", "1,2", "--out", "model.gguf"];
    folder.refuses(&logits, &["model.gguf is what this reads"]);
    assert_eq!(fs::read(&model).unwrap(), fs::read(golden(MODEL)).unwrap());
}
