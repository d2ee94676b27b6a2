//! Models written as GGUF files: those of llama.cpp's converter come out as it wrote them, and adapters merged on the way give the logits of
//! base and adapter.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use retune_adapter::{AdapterFile, delta, gguf};
use retune_engine::compute::Compute;
use retune_engine::overlay::Overlay;
use retune_engine::pass::Pass;
use retune_formats::gguf::Gguf;
use retune_model::Error;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{self, GgufType, MergeOptions, WrittenGguf};
use retune_quant::{Format, SharedBytes};
use retune_testing::{Case, checkpoint, goldens, relative};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The files of llama.cpp's converter that are f32 throughout.
const CONVERTED: [&str; 13] = [
    "gguf_bloom",
    "gguf_gemma",
    "gguf_gemma2",
    "gguf_gemma3",
    "gguf_gpt2",
    "gguf_llama_f32",
    "gguf_mistral",
    "gguf_phi3",
    "gguf_phi3_longrope",
    "gguf_phi3_window",
    "gguf_qwen2",
    "gguf_qwen3",
    "gguf_smollm3",
];

fn nothing(checkpoint: &Checkpoint) -> Overlay {
    Overlay::of_sizes(checkpoint.spec.linears().count(), checkpoint.spec.vectors().len())
}

fn write(case: &Case, path: &Path, kind: GgufType) -> Result<WrittenGguf, Error> {
    export::write_gguf(&case.checkpoint, &case.overlay, &case.params, path, kind, &mut |_, _| {})
}

fn copy(checkpoint: &Checkpoint, path: &Path, kind: GgufType) -> Result<WrittenGguf, Error> {
    export::write_gguf(checkpoint, &nothing(checkpoint), &[], path, kind, &mut |_, _| {})
}

fn parse(path: &Path) -> Gguf {
    Gguf::parse(SharedBytes::from_vec(fs::read(path).unwrap())).unwrap()
}

fn logits_of(path: &Path, pass: &Pass) -> Vec<f32> {
    Case::bare("written", Checkpoint::open(path).unwrap()).logits(&Compute::default(), pass)
}

/// A copy of a case's directory with a tokenizer that llama.cpp knows, and the factor on scores that it takes for Gemma's.
fn base(case: &str) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let weights = "model.safetensors";
    fs::copy(goldens().join(case).join(weights), dir.path().join(weights)).unwrap();
    let mut config: Value =
        serde_json::from_slice(&fs::read(goldens().join(case).join("config.json")).unwrap()).unwrap();
    if config.get("query_pre_attn_scalar").is_some() {
        config["query_pre_attn_scalar"] = config["head_dim"].clone();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
        },
    });
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

#[test]
fn a_converters_file_is_written_as_the_converter_wrote_it() {
    let dir = tempfile::tempdir().unwrap();
    for case in CONVERTED.into_iter().chain(["gguf_ministral3"]) {
        let path = dir.path().join(case);
        let written = copy(&checkpoint(case), &path, GgufType::F32).unwrap();
        assert_eq!((written.report.changed_modules, written.notes), (0, vec![]), "{case}");
        assert!(fs::read(&path).unwrap() == fs::read(goldens().join(case).join("model.gguf")).unwrap(), "{case}");
    }
}

#[test]
fn a_directory_is_written_as_the_converter_writes_it() {
    for case in CONVERTED.into_iter().filter(|case| *case != "gguf_smollm3") {
        let dir = tempfile::tempdir().unwrap();
        let (folder, path) = (dir.path().join("folder"), dir.path().join("model.gguf"));
        let source = checkpoint(case);
        export::write(&source, &nothing(&source), &[], &folder, &MergeOptions::default(), &mut |_, _| {}).unwrap();
        let directory = Checkpoint::open(&folder).unwrap();
        let written = copy(&directory, &path, GgufType::F32).unwrap();
        assert!(written.notes.is_empty(), "{case}: {:?}", written.notes);
        let (ours, theirs) = (parse(&path), parse(&goldens().join(case).join("model.gguf")));
        let tensors = |file: &Gguf| -> BTreeMap<String, (Vec<usize>, Format, Vec<f32>)> {
            let values = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|&word| f32::from_le_bytes(word)).collect();
            let of = |t: &retune_formats::gguf::TensorInfo| (t.name.clone(), (t.shape(), t.format, values(&t.bytes)));
            file.tensors.iter().map(of).collect()
        };
        let (ours_by_name, theirs_by_name) = (tensors(&ours), tensors(&theirs));
        assert!(ours_by_name.keys().eq(theirs_by_name.keys()), "{case}");
        for (name, (shape, format, values)) in &ours_by_name {
            let (their_shape, their_format, their_values) = &theirs_by_name[name];
            assert_eq!((shape, format), (their_shape, their_format), "{case} {name}");
            // 1 taken off a norm's weight and added again leaves the last digit open.
            let error = relative(values, their_values);
            assert!(error < if name.contains("norm") { 1e-7 } else { 1e-30 }, "{case} {name}: {error:e}");
        }
        compare_headers(case, &ours, &theirs);
        // And it is the model, with its tokenizer.
        let read = Checkpoint::open(&path).unwrap();
        let golden = Case::base(case);
        let expected = golden.golden().tensors.remove("logits").unwrap().1;
        assert!(relative(&logits_of(&path, &golden.golden_pass()), &expected) < 1e-4, "{case}");
        let (ours, theirs) = (read.tokenizer().unwrap(), source.tokenizer().unwrap());
        assert_eq!(ours.content_hash(), theirs.content_hash(), "{case}");
        for text in ["the sand of time", "I'll sing 12345 things\n\n  on", "a  b é"] {
            assert_eq!(
                ours.encode_with_special_tokens(text).unwrap(),
                theirs.encode_with_special_tokens(text).unwrap()
            );
        }
    }
}

/// Every key of the converter's that says something of the model or its tokenizer is there with its value.
fn compare_headers(case: &str, ours: &Gguf, theirs: &Gguf) {
    let (ours, theirs) = (&ours.metadata, &theirs.metadata);
    let architecture = theirs.get_str("general.architecture").unwrap().unwrap();
    for key in ["general.architecture", "general.type", "tokenizer.ggml.model"] {
        assert_eq!(ours.get_str(key).unwrap(), theirs.get_str(key).unwrap(), "{case} {key}");
    }
    let mut found = 0;
    for key in [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.layer_norm_epsilon",
        "attention.sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
    ] {
        let key = format!("{architecture}.{key}");
        // BLOOM's has been lost on the way by its configuration.
        if let Some(value) = theirs.get_f32(&key).unwrap().filter(|_| key != "bloom.context_length") {
            assert_eq!(ours.get_f32(&key).unwrap(), Some(value), "{case} {key}");
            found += 1;
        }
    }
    assert!(found > 5, "{case}");
    for key in ["tokens", "merges"] {
        let key = format!("tokenizer.ggml.{key}");
        assert_eq!(ours.get_str_array(&key).unwrap(), theirs.get_str_array(&key).unwrap(), "{case} {key}");
    }
    let types = "tokenizer.ggml.token_type";
    assert_eq!(ours.get_i32_array(types).unwrap(), theirs.get_i32_array(types).unwrap(), "{case}");
    for key in ["bos_token_id", "eos_token_id", "add_space_prefix", "general.file_type", "general.quantization_version"]
    {
        let key = if key.starts_with("general") { key.to_owned() } else { format!("tokenizer.ggml.{key}") };
        if let Ok(Some(value)) = theirs.get_f32(&key) {
            assert_eq!(ours.get_f32(&key).unwrap(), Some(value), "{case} {key}");
        }
    }
}

/// Adapters of every kind that merges, on directories.
fn adapters() -> Vec<(String, String)> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(goldens()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Ok(base) = fs::read_to_string(goldens().join(&name).join("base.txt")) {
            let base = base.trim().to_owned();
            if goldens().join(&base).join("model.safetensors").exists() {
                cases.push((name, base));
            }
        }
    }
    cases.sort();
    cases
}

#[test]
fn merged_adapters_give_the_logits_of_base_and_adapter() {
    let (mut written, mut refused) = (Vec::new(), Vec::new());
    for (name, base_name) in adapters() {
        let Ok(adapter) = AdapterFile::read(&goldens().join(&name).join("adapter")) else { continue };
        let (dir, checkpoint) = base(&base_name);
        let Ok(overlay) = adapter.lower(&checkpoint.spec) else { continue };
        let params = adapter.params(&overlay).unwrap();
        let path = dir.path().join("model.gguf");
        match export::write_gguf(&checkpoint, &overlay, &params, &path, GgufType::F32, &mut |_, _| {}) {
            Err(error) => {
                assert!(!path.exists() && fs::read_dir(dir.path()).unwrap().count() == 3, "{name}");
                refused.push((name, error.to_string()));
            }
            // A window that the file does not say.
            Ok(written) if !written.notes.is_empty() => assert!(base_name.contains("window"), "{name}"),
            Ok(_) => {
                let case = Case::with_adapter(&name, checkpoint, &adapter);
                let pass = case.golden_pass();
                let expected = case.logits(&Compute::default(), &pass);
                // What Gemma's embeddings are multiplied by is rounded to the type of a directory's weights alone.
                let error = relative(&logits_of(&path, &pass), &expected);
                assert!(error < if base_name.ends_with("bf16") { 1e-2 } else { 1e-4 }, "{name}: {error:e}");
                written.push(name);
            }
        }
    }
    assert!(written.len() > 60, "{written:?}");
    for name in [
        "lora_rs",
        "dora",
        "gpt2_lora_all",
        "bloom_dora",
        "bloom_ia3",
        "gemma3_miss",
        "phi3_lora_two",
        "lora_save_head",
    ] {
        assert!(written.iter().any(|written| written == name), "{name}: {refused:?}");
    }
    // Each is refused for what a file cannot hold.
    let reasons =
        ["soft prompt", "lora_bias", "only those are written", "none that is written so", "head is another matrix"];
    for (name, error) in &refused {
        // Its layers see all and a window in turn, and of Gemma 3 llama.cpp takes each sixth to see all.
        if name == "nf4_gemma3_lora" {
            assert!(error.contains("the attention of layer 1 is read as another"), "{name}: {error}");
            continue;
        }
        assert!(reasons.iter().any(|reason| error.contains(reason)), "{name}: {error}");
    }
}

#[test]
fn an_adapter_of_one_side_of_a_tied_model_gives_the_file_a_head() {
    for case in ["lora_save_head", "lora_save_embeddings"] {
        let (dir, checkpoint) = base(fs::read_to_string(goldens().join(case).join("base.txt")).unwrap().trim());
        let tied = checkpoint.spec.head.tied;
        let adapter = AdapterFile::read(&goldens().join(case).join("adapter")).unwrap();
        let case = Case::with_adapter(case, checkpoint, &adapter);
        let path = dir.path().join("model.gguf");
        write(&case, &path, GgufType::F32).unwrap();
        let read = Checkpoint::open(&path).unwrap();
        assert!(!read.spec.head.tied && parse(&path).tensor("output.weight").is_some(), "tied before: {tied}");
    }
}

#[test]
fn types_are_those_of_llama_cpps_quantizer() {
    let dir = tempfile::tempdir().unwrap();
    let source = checkpoint("gguf_llama");
    let golden = Case::base("gguf_llama");
    let expected = golden.logits(&Compute::default(), &golden.golden_pass());
    // Rows of 64 and 96 values are whole blocks of 32 only.
    for (kind, matrices, head, bound) in [
        (GgufType::F16, Format::F16, Format::F16, 1e-2),
        (GgufType::BF16, Format::BF16, Format::BF16, 1e-1),
        (GgufType::Q8_0, Format::Q8_0, Format::Q8_0, 1e-1),
        (GgufType::Q6K, Format::Q8_0, Format::Q8_0, 1e-1),
        (GgufType::Q5K, Format::Q5_1, Format::Q8_0, 0.4),
        (GgufType::Q4K, Format::Q5_0, Format::Q8_0, 0.6),
        (GgufType::Q4_1, Format::Q4_1, Format::Q8_0, 0.8),
        (GgufType::Q4_0, Format::Q4_0, Format::Q8_0, 0.8),
    ] {
        let path = dir.path().join(kind.to_string());
        copy(&source, &path, kind).unwrap();
        let file = parse(&path);
        for tensor in &file.tensors {
            let expected = match tensor.name.as_str() {
                "token_embd.weight" => head,
                _ if tensor.dims.len() == 1 => Format::F32,
                _ => matrices,
            };
            assert_eq!(tensor.format, expected, "{kind} {}", tensor.name);
        }
        let error = relative(&logits_of(&path, &golden.golden_pass()), &expected);
        assert!(error > 1e-6 && error < bound, "{kind}: {error}");
    }
}

#[test]
fn what_stays_as_it_is_is_copied_and_the_rest_encoded() {
    let dir = tempfile::tempdir().unwrap();
    let source = goldens().join("gguf_llama/model.gguf");
    let path = dir.path().join("model.gguf");
    copy(&Checkpoint::open(&source).unwrap(), &path, GgufType::Q8_0).unwrap();
    let (ours, theirs) = (parse(&path), parse(&source));
    let mut copied = 0;
    for (ours, theirs) in ours.tensors.iter().zip(&theirs.tensors) {
        assert_eq!(ours.name, theirs.name);
        if theirs.format == ours.format {
            assert!(ours.bytes[..] == theirs.bytes[..], "{}", ours.name);
            copied += 1;
        }
    }
    assert!(copied > 5 && copied < ours.tensors.len());
    assert_eq!(ours.metadata.get_u32("general.file_type").unwrap(), Some(7));
    // The same input gives the same bytes.
    let again = dir.path().join("again.gguf");
    copy(&Checkpoint::open(&source).unwrap(), &again, GgufType::Q8_0).unwrap();
    assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap());
}

#[test]
fn what_llama_cpp_would_compute_otherwise_is_refused_or_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let refusal = |change: &dyn Fn(&mut Value), case: &str| {
        let (folder, _) = base(case);
        let config = folder.path().join("config.json");
        let mut json: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        change(&mut json);
        fs::write(&config, json.to_string()).unwrap();
        copy(&Checkpoint::open(folder.path()).unwrap(), &path, GgufType::F32).map_err(|error| error.to_string())
    };
    let text = refusal(&|json| json["hidden_act"] = "gelu".into(), "llama_tied").unwrap_err();
    assert!(text.contains("computes") && text.contains("directory"), "{text}");
    let text = refusal(&|json| json["query_pre_attn_scalar"] = 3.into(), "gemma2").unwrap_err();
    assert!(text.contains("scores"), "{text}");
    let scaling = json!({"rope_type": "dynamic", "factor": 2.0});
    let text = refusal(&|json| json["rope_scaling"] = scaling.clone(), "llama_tied").unwrap_err();
    assert!(text.contains("dynamic"), "{text}");
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "something was left behind");
    // Mistral's window is not in its files.
    let written = refusal(&|_| {}, "mistral_window").unwrap();
    assert!(written.notes[0].contains("tokens"), "{:?}", written.notes);
}

#[test]
fn rotary_scalings_are_written() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["rope_linear", "rope_llama3", "rope_yarn", "rope_yarn_settings"] {
        let (_folder, checkpoint) = base(case);
        let path = dir.path().join(case);
        let golden = Case::base(case);
        match copy(&checkpoint, &path, GgufType::F32) {
            Ok(_) => {
                let expected = golden.golden().tensors.remove("logits").unwrap().1;
                let error = relative(&logits_of(&path, &golden.golden_pass()), &expected);
                assert!(error < 1e-4, "{case}: {error:e}");
            }
            // A setting that has no key.
            Err(error) => {
                assert!(case == "rope_yarn_settings" && error.to_string().contains("rotary"), "{case}: {error}")
            }
        }
    }
}

#[test]
fn lora_files_are_read_as_they_were_written_on_any_order_of_rows() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["lora_rs", "lora_patterns", "bloom_lora_all", "gpt2_lora_all", "phi3_lora_all", "gemma3_miss"] {
        let (_base, checkpoint) = base(fs::read_to_string(goldens().join(case).join("base.txt")).unwrap().trim());
        let file = AdapterFile::read(&goldens().join(case).join("adapter")).unwrap();
        let overlay = file.lower(&checkpoint.spec).unwrap();
        let params = file.params(&overlay).unwrap();
        let deltas = delta::of_adapter(&file, &checkpoint.spec, &overlay, &params).unwrap();
        let linears = export::gguf_linears(&checkpoint).unwrap();
        let path = dir.path().join(case);
        gguf::write_lora(&path, &linears, &deltas).unwrap();
        let read = gguf::read_lora(&path, &linears).unwrap();
        assert!(read.keys().eq(deltas.keys()), "{case}");
        for (module, delta) in &deltas {
            assert!(read[module].distance(delta) <= 1e-6 * delta.norm(), "{case} {module}");
        }
    }
}

/// `goldens/make_gguf_lora.py` makes the files.
#[test]
fn lora_files_are_those_of_llama_cpps_converter() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["lora_all_linear", "bloom_lora_two", "qwen3_lora_two"] {
        let checkpoint = checkpoint(fs::read_to_string(goldens().join(case).join("base.txt")).unwrap().trim());
        let file = AdapterFile::read(&goldens().join(case).join("adapter")).unwrap();
        let overlay = file.lower(&checkpoint.spec).unwrap();
        let params = file.params(&overlay).unwrap();
        let deltas = delta::of_adapter(&file, &checkpoint.spec, &overlay, &params).unwrap();
        let path = dir.path().join(case);
        gguf::write_lora(&path, &export::gguf_linears(&checkpoint).unwrap(), &deltas).unwrap();
        let (ours, theirs) = (parse(&path), parse(&goldens().join(case).join("adapter.gguf")));
        for key in ["general.architecture", "general.type", "adapter.type"] {
            assert_eq!(ours.metadata.get_str(key).unwrap(), theirs.metadata.get_str(key).unwrap(), "{case} {key}");
        }
        let alpha = "adapter.lora.alpha";
        assert_eq!(ours.metadata.get_f32(alpha).unwrap(), theirs.metadata.get_f32(alpha).unwrap(), "{case}");
        assert_eq!(ours.tensors.len(), theirs.tensors.len(), "{case}");
        for tensor in &ours.tensors {
            let expected = theirs.tensor(&tensor.name).unwrap_or_else(|| panic!("{case}: {}", tensor.name));
            assert_eq!((tensor.shape(), tensor.format), (expected.shape(), expected.format), "{case} {}", tensor.name);
            assert!(tensor.bytes[..] == expected.bytes[..], "{case} {}", tensor.name);
        }
    }
}
