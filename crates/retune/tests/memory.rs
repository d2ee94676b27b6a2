//! What a run takes of the machine's memory: the base as it is stored, and what the plan says.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Folder, MODEL, Output, Random, golden, joined};
use retune_quant::Format;
use serde_json::{Value, json};

/// Layers that take two hundred megabytes in f32, so that a base expanded to that would stand out; 28 in Q4_0.
const LAYERS: u64 = 8;
const HIDDEN_SIZE: u64 = 768;
const INTERMEDIATE_SIZE: u64 = 2048;
const HEADS: u64 = 12;
const KEY_VALUE_HEADS: u64 = 4;
const HEAD_DIM: u64 = 64;
/// That of the tiny model, whose tokenizer it has.
const VOCAB_SIZE: u64 = 288;

/// What the program may take beside the base and the plan's other parts.
const REST: f64 = 64e6;

/// Names of tensors with their sizes in GGUF's order, columns first.
fn tensors(layers: u64) -> Vec<(String, Vec<u64>)> {
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), vec![HIDDEN_SIZE, VOCAB_SIZE]),
        ("output_norm.weight".to_owned(), vec![HIDDEN_SIZE]),
    ];
    for layer in 0..layers {
        for (part, sizes) in [
            ("attn_norm", vec![HIDDEN_SIZE]),
            ("attn_q", vec![HIDDEN_SIZE, HEADS * HEAD_DIM]),
            ("attn_k", vec![HIDDEN_SIZE, KEY_VALUE_HEADS * HEAD_DIM]),
            ("attn_v", vec![HIDDEN_SIZE, KEY_VALUE_HEADS * HEAD_DIM]),
            ("attn_output", vec![HEADS * HEAD_DIM, HIDDEN_SIZE]),
            ("ffn_norm", vec![HIDDEN_SIZE]),
            ("ffn_gate", vec![HIDDEN_SIZE, INTERMEDIATE_SIZE]),
            ("ffn_up", vec![HIDDEN_SIZE, INTERMEDIATE_SIZE]),
            ("ffn_down", vec![INTERMEDIATE_SIZE, HIDDEN_SIZE]),
        ] {
            tensors.push((format!("blk.{layer}.{part}.weight"), sizes));
        }
    }
    tensors
}

/// Where `text` is in `bytes`.
fn find(bytes: &[u8], text: &[u8]) -> usize {
    bytes.windows(text.len()).position(|window| window == text).unwrap()
}

/// Matrices as random Q4_0 blocks of 32 values, vectors as ones in f32.
fn values(sizes: &[u64], random: &mut Random) -> Vec<u8> {
    /// 2⁻⁸ in half precision, for weights of about 0.02.
    const SCALE: u16 = 0x1c00;
    let count: u64 = sizes.iter().product();
    let mut bytes = Vec::new();
    if sizes.len() == 1 {
        (0..count).for_each(|_| bytes.extend_from_slice(&1f32.to_le_bytes()));
        return bytes;
    }
    for _ in 0..count / 32 {
        bytes.extend_from_slice(&SCALE.to_le_bytes());
        (0..16).for_each(|_| bytes.push(random.below(256) as u8));
    }
    bytes
}

/// A GGUF file: the tiny model's metadata with the sizes above, and tensors to go with them.
fn q4_0_model(layers: u64) -> Vec<u8> {
    const ALIGNMENT: usize = 32;
    let tiny = fs::read(golden(MODEL)).unwrap();
    // Behind the metadata come the tensors' names, each after its length in eight bytes.
    let mut file = tiny[..find(&tiny, b"token_embd.weight") - 8].to_vec();
    for (key, size) in [
        ("llama.block_count", layers),
        ("llama.embedding_length", HIDDEN_SIZE),
        ("llama.feed_forward_length", INTERMEDIATE_SIZE),
        ("llama.attention.head_count", HEADS),
        ("llama.attention.head_count_kv", KEY_VALUE_HEADS),
        ("llama.rope.dimension_count", HEAD_DIM),
    ] {
        // Behind a key come the number of its type, 4 for u32, and its value.
        let key = [key.as_bytes(), &[4, 0, 0, 0]].concat();
        let at = find(&file, &key) + key.len();
        file[at..at + 4].copy_from_slice(&(size as u32).to_le_bytes());
    }
    let tensors = tensors(layers);
    file[8..16].copy_from_slice(&(tensors.len() as u64).to_le_bytes());
    let (mut data, mut random): (Vec<u8>, Random) = (Vec::new(), Random(1));
    for (name, sizes) in &tensors {
        file.extend_from_slice(&(name.len() as u64).to_le_bytes());
        file.extend_from_slice(name.as_bytes());
        file.extend_from_slice(&(sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|size| file.extend_from_slice(&size.to_le_bytes()));
        let format = if sizes.len() == 1 { Format::F32 } else { Format::Q4_0 };
        file.extend_from_slice(&format.ggml_type().to_le_bytes());
        file.extend_from_slice(&(data.len() as u64).to_le_bytes());
        data.extend_from_slice(&values(sizes, &mut random));
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
    }
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    file.extend_from_slice(&data);
    file
}

/// The bytes that the plan of a run gives for something: "activations 61 MB for passes".
fn planned(messages: &str, what: &str) -> f64 {
    let plan = messages.lines().find(|line| line.starts_with("memory ")).unwrap_or_else(|| panic!("{messages}"));
    let (_, rest) = plan.split_once(what).unwrap_or_else(|| panic!("{plan}"));
    let mut words = rest.split_whitespace();
    let (number, unit) = (words.next().unwrap(), words.next().unwrap().trim_end_matches(','));
    let unit = match unit {
        "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => panic!("{plan}"),
    };
    number.parse::<f64>().unwrap() * unit
}

/// A run of one step over a base in Q4_0: what it says, the most memory it took, and the size of the base.
fn one_step(layers: u64, compute: &str, data: Value) -> (Output, f64, f64) {
    let folder = Folder::with_run();
    let base = q4_0_model(layers);
    folder.write("base.gguf", &base);
    let run = json!({
        "model": "base.gguf",
        "output_dir": "out",
        "base": { "compute": compute },
        "adapter": { "r": 8 },
        "data": data,
        "training": { "max_steps": 1, "batch_size": 2 },
    });
    folder.write("run.yaml", run.to_string());
    let output = folder.succeeds(&["train", "run.yaml", "--json"]);
    let peak = output.json()["peak_rss_bytes"].as_f64().unwrap();
    (output, peak, base.len() as f64)
}

#[test]
fn a_quantized_base_is_never_expanded_as_a_whole() {
    let data = json!({ "train": "train.jsonl", "eval_fraction": 0.0, "max_length": 192 });
    let (output, peak, size) = one_step(LAYERS, "f32", data);
    let parts = ["base", "gradient", "optimizer", "activations"].map(|part| planned(&output.stderr, part));
    assert!((parts[0] - size).abs() < 0.05 * size, "the plan counts {} for a base of {size} bytes", parts[0]);
    let most = size + parts[1..].iter().sum::<f64>() + REST;
    assert!(peak < most, "{peak} bytes at most, more than {most}: {}", output.stderr);
}

/// In 8 bits the base is there twice while held-out rows are scored in f32: as it is stored and as integers, and the plan says so.
#[test]
fn a_base_in_8_bits_takes_a_byte_for_each_weight_beside_what_is_stored() {
    let data = json!({ "train": "train.jsonl", "eval": "eval.jsonl", "max_length": 192 });
    // Fewer layers: each weight is quantized nine times.
    let (output, peak, size) = one_step(2, "int8", data);
    let parts = ["base", "in int8", "gradient", "optimizer", "activations"].map(|part| planned(&output.stderr, part));
    let weights: u64 =
        tensors(2).iter().filter(|(_, sizes)| sizes.len() > 1).map(|(_, sizes)| sizes.iter().product::<u64>()).sum();
    let (weights, int8) = (weights as f64, parts[1]);
    assert!((parts[0] - size).abs() < 0.05 * size, "the plan counts {} for a base of {size} bytes", parts[0]);
    assert!(int8 > weights && int8 < 1.2 * weights, "the plan counts {int8} for {weights} weights");
    let most = parts.iter().sum::<f64>() + REST;
    assert!(peak < most, "{peak} bytes at most, more than {most}: {}", output.stderr);
}

/// The most memory of the program's own, mapped files left out, that was seen while a command ran.
fn anonymous_peak(mut command: Command) -> f64 {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0.0f64;
    let ended = loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        peak = peak.max(1024.0 * kilobytes.unwrap_or(0.0));
        match child.try_wait().unwrap() {
            Some(ended) => break ended,
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    assert!(ended.success());
    peak
}

/// Merging keeps panels of a tensor in memory: as much for a model of five times the layers, in a folder and in a file.
#[test]
fn merging_takes_no_more_memory_for_a_larger_model() {
    let folder = Folder::with_run();
    folder.write("small.gguf", q4_0_model(1));
    folder.write("large.gguf", q4_0_model(5));
    let run = json!({
        "model": "small.gguf", "output_dir": "out",
        "adapter": { "r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0] },
        "data": { "train": "eval.jsonl", "eval_fraction": 0.0, "max_length": 192 },
        "training": { "max_steps": 1, "batch_size": 1 },
    });
    folder.write("run.yaml", run.to_string());
    folder.succeeds(&["train", "run.yaml"]);
    // Four layers more: 100 MB in f32.
    for (out, more) in [("folder", &[][..]), ("file.gguf", &["--type", "f16"])] {
        let [small, large] = ["small", "large"].map(|model| {
            let (model, out) = (format!("{model}.gguf"), format!("{model}-{out}"));
            let merge = ["merge", "--adapter", "out/adapter", "--model", &model, "--out", &out];
            anonymous_peak(folder.command(&joined(&[&merge, more])))
        });
        assert!(small > 1e6 && large < small + 16e6, "{out}: {small} and {large} bytes");
    }
}
