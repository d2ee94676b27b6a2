//! Merged and trained models, written and loaded again: they must give the logits of base and adapter together.
//!
//! The expected logits are those of transformers and peft, from the fixtures of `goldens.rs`.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use retune_adapter::{AdapterFile, Full, LoraConfig, ModuleSelection, names};
use retune_engine::compute::Compute;
use retune_engine::overlay::{Factor, LowRank, OutputScale, Overlay};
use retune_engine::pass::Pass;
use retune_engine::row_norms::row_norms;
use retune_model::Error;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{self, ExportType, MergeOptions, MergeReport};
use retune_model::unmerge::inverse;
use retune_testing::{Case, Golden, Lcg, checkpoint, goldens, relative};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

const EMBEDDING: &str = "model.embed_tokens.weight";

/// The golden's rows as one pass, and the logits of all its tokens.
fn golden(case: &str) -> (Pass, Vec<f32>) {
    let mut golden = Golden::read(&goldens().join(case));
    let (_, logits) = golden.tensors.remove("logits").unwrap();
    (golden.passes(true).remove(0), logits)
}

/// The logits of a model with what stands on it.
fn logits(case: &Case, pass: &Pass) -> Vec<f32> {
    case.logits(&Compute::default(), pass)
}

fn logits_of(dir: &Path, pass: &Pass) -> Vec<f32> {
    logits(&Case::bare("written", Checkpoint::open(dir).unwrap()), pass)
}

/// A copy of a case's model with a tokenizer, which the fixtures do without.
fn base(case: &str) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(goldens().join(case).join(file), dir.path().join(file)).unwrap();
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
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

fn adapter(case: &str) -> AdapterFile {
    AdapterFile::read(&goldens().join(case).join("adapter")).unwrap()
}

fn base_of(case: &str) -> (TempDir, Checkpoint) {
    base(fs::read_to_string(goldens().join(case).join("base.txt")).unwrap().trim())
}

/// Writes a model with what stands on it.
fn written(case: &Case, out: &Path, options: &MergeOptions) -> Result<MergeReport, Error> {
    export::write(&case.checkpoint, &case.overlay, &case.params, out, options, &mut |_, _| {})
}

/// Writes a base with an adapter, unrounded.
/// The settings of a LoRA adapter.
fn settings(adapter: &AdapterFile) -> LoraConfig {
    serde_json::from_value(adapter.method.settings().unwrap()).unwrap()
}

fn merged(checkpoint: Checkpoint, adapter: &AdapterFile, out: &Path) -> (Case, MergeReport) {
    let case = Case::with_adapter("merged", checkpoint, adapter);
    let report = written(&case, out, &MergeOptions::default()).unwrap();
    (case, report)
}

/// Writes a base with nothing on it, unrounded.
fn copied(checkpoint: &Checkpoint, out: &Path) -> Result<MergeReport, Error> {
    let spec = &checkpoint.spec;
    let overlay = Overlay::of_sizes(spec.linears().count(), spec.vectors().len());
    export::write(checkpoint, &overlay, &[], out, &MergeOptions::default(), &mut |_, _| {})
}

fn json_of(dir: &Path, file: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.join(file)).unwrap()).unwrap()
}

/// All files of a directory by name.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// Numbers around zero.
fn numbers(count: usize) -> Vec<f32> {
    Lcg(7).small(count)
}

#[test]
fn merged_models_give_the_logits_of_base_and_adapter() {
    for (case, modules) in [
        ("lora_all_linear", 14),
        ("lora_rs", 21),
        ("lora_patterns", 8),
        ("lora_regex", 4),
        ("lora_layers", 5),
        ("lora_save_head", 5),
        ("lora_save_embeddings", 5),
        ("lora_bias_all", 14),
        ("lora_bias_lora_only", 6),
        // Weights that are written as [in, out].
        ("gpt2_lora_all", 8),
        ("gpt2_lora_two", 4),
        ("bloom_lora_all", 8),
        ("bloom_lora_two", 4),
        // Queries, keys and values in one linear, gate and up in another.
        ("phi3_lora_all", 8),
        // Tied, with 1 added to the norms' weights.
        ("gemma3_lora_all", 42),
        ("gemma3_lora_two", 12),
        ("gemma3_wrapped_lora_two", 4),
        ("qwen2_lora_save_bias", 6),
        ("lora_b_bias", 6),
        ("lora_b_bias_all", 14),
        ("gpt2_lora_b_bias", 4),
        // Scales, norms and terms of which one factor is fixed.
        ("dora", 14),
        ("dora_patterns", 8),
        ("dora_biases", 6),
        ("gpt2_dora", 8),
        ("gemma3_dora", 18),
        ("ia3", 6),
        ("ia3_modules", 9),
        ("ia3_biases", 10),
        ("gpt2_ia3", 4),
        ("bloom_ia3", 4),
        ("miss", 14),
        ("miss_uneven", 8),
        ("miss_mini", 14),
        ("miss_biases", 14),
        ("gemma3_miss", 12),
        // Tables, and rows of them.
        ("lora_embeddings", 4),
        ("dora_embeddings", 4),
        ("gpt2_dora_embeddings", 4),
        ("gemma3_dora_embeddings", 7),
        ("lora_embeddings_tied", 3),
        ("gpt2_lora_embeddings", 4),
        ("bloom_lora_embeddings", 1),
        ("gemma3_lora_embeddings", 7),
        ("lora_tokens", 3),
        ("lora_tokens_untied", 4),
        ("gpt2_lora_tokens", 3),
        ("bloom_lora_tokens", 3),
        ("gemma3_lora_tokens", 7),
        // An encoder and a decoder, tied and not.
        ("t5_lora_all", 48),
        ("flan_t5_lora_all", 25),
        ("t5_dora", 33),
        ("flan_t5_dora", 18),
        ("t5_ia3", 24),
        ("t5_lora_tokens", 19),
        ("flan_t5_lora_tokens", 9),
    ] {
        let (_dir, checkpoint) = base_of(case);
        let tied = checkpoint.spec.head.tied;
        let out = tempfile::tempdir().unwrap();
        let (adapted, report) = merged(checkpoint, &adapter(case), out.path());
        let (pass, expected) = golden(case);
        let found = logits_of(out.path(), &pass);
        let error = relative(&found, &expected);
        assert!(error < 1e-4, "{case}: logits {error}");
        // Against what was merged there is only the order of the sums.
        let error = relative(&found, &logits(&adapted, &pass));
        assert!(error < 1e-5, "{case}: logits {error} from those of base and adapter");
        let saved_table = adapted.overlay.table.is_some() || adapted.overlay.table_term.is_some();
        assert_eq!(Checkpoint::open(out.path()).unwrap().spec.head.tied, tied && !saved_table, "{case}");
        assert!(report.largest_change > 0.0 && report.largest_change.is_finite(), "{case}: {report:?}");
        assert_eq!((report.changed_modules, report.shards), (modules, 1), "{case}");
        assert_eq!(report.bytes, fs::metadata(out.path().join("model.safetensors")).unwrap().len());
    }
}

#[test]
fn a_base_in_4_bits_is_written_as_plain_numbers() {
    let (_dir, checkpoint) = base("bnb_nf4_double");
    let out = tempfile::tempdir().unwrap();
    copied(&checkpoint, out.path()).unwrap();
    let again = Checkpoint::open(out.path()).unwrap();
    for name in checkpoint.names() {
        let (stored, written) = (checkpoint.tensor(name).unwrap(), again.tensor(name).unwrap());
        assert_eq!((written.storage(), written.to_f32()), ("F32", stored.to_f32()), "{name}");
    }
    assert!(json_of(out.path(), "config.json").get("quantization_config").is_none());
}

#[test]
fn what_a_killed_write_left_is_in_nobodys_way() {
    let (_dir, checkpoint) = base("llama_tied");
    let out = tempfile::tempdir().unwrap();
    let unfinished = out.path().join(".unfinished.tmp");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("model.safetensors"), "half").unwrap();
    copied(&checkpoint, out.path()).unwrap();
    assert!(!unfinished.exists());
    assert!(copied(&checkpoint, out.path()).is_err(), "a model is no leftover");
}

#[test]
fn a_base_alone_is_written_as_it_is() {
    for case in
        ["llama_tied", "llama_untied_mha", "llama_gqa_head_dim", "mistral_window", "gpt2", "bloom", "gemma3", "phi3"]
    {
        let (_dir, checkpoint) = base(case);
        let out = tempfile::tempdir().unwrap();
        let report = copied(&checkpoint, out.path()).unwrap();
        assert_eq!((report.changed_modules, report.largest_change), (0, 0.0));
        let again = Checkpoint::open(out.path()).unwrap();
        assert_eq!(again.content_hash(), checkpoint.content_hash());
        assert_eq!(again.spec, checkpoint.spec);
        assert_eq!(again.tokenizer().unwrap().content_hash(), checkpoint.tokenizer().unwrap().content_hash());
        let stored = fs::read(out.path().join("model.safetensors")).unwrap();
        let head = SafeTensors::deserialize(&stored).unwrap().tensor("lm_head.weight").is_ok();
        assert_ne!(head, checkpoint.spec.head.tied, "{case}");
        assert_eq!(json_of(out.path(), "generation_config.json"), json!({"bos_token_id": 1, "eos_token_id": 2}));
    }
}

#[test]
fn a_gguf_model_becomes_a_directory() {
    for case in ["gguf_llama", "gguf_t5", "gguf_flan_t5"] {
        let checkpoint = checkpoint(case);
        let out = tempfile::tempdir().unwrap();
        copied(&checkpoint, out.path()).unwrap();
        let (pass, expected) = golden(case);
        let error = relative(&logits_of(out.path(), &pass), &expected);
        assert!(error < 1e-4, "{case}: logits {error}");
        let text = "I'll sing 12345 things";
        let ids = |checkpoint: &Checkpoint| checkpoint.tokenizer().unwrap().encode(text).unwrap();
        assert_eq!(ids(&Checkpoint::open(out.path()).unwrap()), ids(&checkpoint));
        if checkpoint.spec.encoder.is_some() {
            // transformers generates with nothing but this file.
            let expected = json!({"eos_token_id": 1, "decoder_start_token_id": 0, "pad_token_id": 0});
            assert_eq!(json_of(out.path(), "generation_config.json"), expected);
            assert_eq!(json_of(out.path(), "config.json")["tie_word_embeddings"], json!(case == "gguf_t5"));
        }
    }
}

#[test]
fn shards_hold_the_same_model_and_the_same_input_gives_the_same_bytes() {
    let (_dir, checkpoint) = base("llama_tied");
    let case = Case::with_adapter("lora_all_linear", checkpoint, &adapter("lora_all_linear"));
    let written = |max_shard_bytes| {
        let out = tempfile::tempdir().unwrap();
        let options = MergeOptions { max_shard_bytes, ..MergeOptions::default() };
        let mut steps = Vec::new();
        let Case { checkpoint, overlay, params, .. } = &case;
        let report = export::write(checkpoint, overlay, params, out.path(), &options, &mut |done, total| {
            steps.push((done, total));
        });
        assert!(steps.is_sorted() && steps.last().is_some_and(|(done, total)| done == total));
        (out, report.unwrap())
    };
    let (whole, _) = written(u64::MAX);
    let (sharded, report) = written(10_000);
    assert!(report.shards > 3, "{report:?}");
    assert!(!sharded.path().join("model.safetensors").exists());
    let hash = |dir: &Path| Checkpoint::open(dir).unwrap().content_hash();
    assert_eq!(hash(sharded.path()), hash(whole.path()));

    let index = json_of(sharded.path(), "model.safetensors.index.json");
    let places = index["weight_map"].as_object().unwrap();
    let checkpoint = &case.checkpoint;
    assert_eq!(places.len(), checkpoint.names().count());
    let last = format!("model-{0:05}-of-{0:05}.safetensors", report.shards);
    assert_eq!(places["model.norm.weight"], json!(last));
    let values: usize = checkpoint.names().map(|name| checkpoint.tensor(name).unwrap().to_f32().len()).sum();
    assert_eq!(index["metadata"]["total_size"], json!(4 * values));
    let sizes = contents(sharded.path()).into_iter().filter(|(name, _)| name.ends_with(".safetensors"));
    assert_eq!(sizes.map(|(_, bytes)| bytes.len() as u64).sum::<u64>(), report.bytes);

    assert!(contents(sharded.path()) == contents(written(10_000).0.path()));
    assert!(contents(whole.path()) == contents(written(u64::MAX).0.path()));
}

#[test]
fn types_are_rounded_and_named() {
    let (_dir, checkpoint) = base("llama_untied_mha");
    let case = Case::with_adapter("lora_patterns", checkpoint, &adapter("lora_patterns"));
    let (pass, expected) = golden("lora_patterns");
    for (dtype, name, tolerance) in
        [(ExportType::F32, "float32", 1e-4), (ExportType::F16, "float16", 1e-2), (ExportType::BF16, "bfloat16", 5e-2)]
    {
        let out = tempfile::tempdir().unwrap();
        let options = MergeOptions { dtype, ..MergeOptions::default() };
        written(&case, out.path(), &options).unwrap();
        let error = relative(&logits_of(out.path(), &pass), &expected);
        assert!(error < tolerance, "{dtype}: logits {error}");
        let config = json_of(out.path(), "config.json");
        assert_eq!((&config["dtype"], config.get("torch_dtype")), (&json!(name), None));
    }
    // The older spelling stays where it is used.
    let (_dir, checkpoint) = base("llama_tied");
    let out = tempfile::tempdir().unwrap();
    let options = MergeOptions { dtype: ExportType::BF16, ..MergeOptions::default() };
    written(&Case::bare("llama_tied", checkpoint), out.path(), &options).unwrap();
    let config = json_of(out.path(), "config.json");
    assert_eq!((&config["torch_dtype"], config.get("dtype")), (&json!("bfloat16"), None));
}

/// The merged model of a tied base has two tensors once only one of the pair was changed.
#[test]
fn embeddings_or_head_that_an_adapter_changes_are_untied() {
    let mut saved = adapter("lora_all_linear");
    saved.method = Arc::new(LoraConfig { modules_to_save: vec!["embed_tokens".to_owned()], ..settings(&saved) });
    saved.tensors.insert(names::saved_weight("model.embed_tokens"), (vec![96, 32], numbers(96 * 32)));
    let mut adapted = adapter("lora_all_linear");
    let mut config = settings(&adapted);
    let ModuleSelection::List(targets) = &mut config.target_modules else { panic!("a list") };
    targets.push("lm_head".to_owned());
    adapted.method = Arc::new(config);
    adapted.tensors.insert(names::lora_a("lm_head"), (vec![4, 32], numbers(4 * 32)));
    adapted.tensors.insert(names::lora_b("lm_head"), (vec![96, 4], numbers(96 * 4)));

    let (pass, plain) = golden("lora_all_linear");
    for adapter in [saved, adapted] {
        let (_dir, checkpoint) = base("llama_tied");
        let out = tempfile::tempdir().unwrap();
        let (case, _) = merged(checkpoint, &adapter, out.path());
        let expected = logits(&case, &pass);
        assert!(relative(&expected, &plain) > 1e-3, "the adapter's addition changes nothing");
        assert_eq!(json_of(out.path(), "config.json")["tie_word_embeddings"], json!(false));
        let error = relative(&logits_of(out.path(), &pass), &expected);
        assert!(error < 1e-4, "logits {error}");
    }
}

/// A model whose table or whose head alone is another one.
fn with_table(case: &mut Case) {
    let (rows, cols, name) = (case.model.spec.vocab_size, case.model.spec.hidden_size, &case.model.spec.table.name);
    let name = format!("{name}.weight");
    case.params = case.checkpoint.tensor(&name).unwrap().to_f32();
    case.params.iter_mut().zip(numbers(rows * cols)).for_each(|(value, change)| *value += change);
    case.overlay.table = Some(case.overlay.layout.add(name.clone(), vec![rows, cols], Some(name)));
}

fn with_head(case: &mut Case) {
    let (rows, cols, r) = (case.model.spec.vocab_size, case.model.spec.hidden_size, 4);
    let a = Factor::Trained(case.overlay.layout.add("A".to_owned(), vec![r, cols], None));
    let b = Factor::Trained(case.overlay.layout.add("B".to_owned(), vec![rows, r], None));
    case.params = numbers(r * (rows + cols)).into_iter().map(|value| 10.0 * value).collect();
    let head = case.overlay.linears.last_mut().unwrap();
    head.low_rank.push(LowRank { a, b, r, scale: 0.5, dropout: 0.0, key: 0 });
}

/// Scales and a low-rank term on every linear but the head, and a bias that is trained beside one of them.
fn with_scales(case: &mut Case, over_norm: bool) {
    let r = 3;
    let numbers = |case: &mut Case, name: String, shape: Vec<usize>, middle: f32| {
        let seed = case.params.len();
        let values = numbers(seed + shape.iter().product::<usize>()).split_off(seed);
        case.params.extend(values.iter().map(|value| middle + 5.0 * value));
        case.overlay.layout.add(name, shape, None)
    };
    let linears: Vec<_> = case.model.linears().iter().map(|l| (l.name.clone(), l.rows(), l.cols(), l.bias)).collect();
    for (id, (name, rows, cols, _)) in linears[..linears.len() - 1].iter().enumerate() {
        let a = Factor::Trained(numbers(case, format!("{name}.A"), vec![r, *cols], 0.0));
        let b = Factor::Trained(numbers(case, format!("{name}.B"), vec![*rows, r], 0.0));
        let change = &mut case.overlay.linears[id];
        change.low_rank.push(LowRank { a, b, r, scale: 0.5, dropout: 0.0, key: 0 });
        let i = numbers(case, format!("{name}.i"), vec![*cols], 1.0);
        let o = numbers(case, format!("{name}.o"), vec![*rows], 1.0);
        if over_norm {
            let norms = row_norms(&case.model.linears()[id].weight, &case.overlay.linears[id], &case.params);
            case.params[o.clone()].iter_mut().zip(norms).for_each(|(value, norm)| *value *= norm);
        }
        let change = &mut case.overlay.linears[id];
        change.input_scale = Some(i);
        change.output_scale = Some(if over_norm { OutputScale::OverNorm(o) } else { OutputScale::Plain(o) });
    }
    if let Some((name, bias)) = linears.iter().find_map(|(name, .., bias)| Some((name, (*bias)?))) {
        let name = format!("{name}.bias");
        let values = case.checkpoint.tensor(&name).unwrap().to_f32();
        let range = case.overlay.layout.add(name.clone(), vec![values.len()], Some(name));
        case.params.extend(values.iter().map(|value| 0.1 + 2.0 * value));
        case.overlay.vectors[bias.0] = Some(range);
    }
    case.refresh();
}

#[test]
fn scales_are_merged_into_weights_and_biases() {
    for name in ["gemma3", "gpt2", "bloom", "qwen2", "t5"] {
        for over_norm in [false, true] {
            let (_dir, checkpoint) = base(name);
            let mut case = Case::bare(name, checkpoint);
            let (pass, _) = golden(name);
            let plain = logits(&case, &pass);
            with_scales(&mut case, over_norm);
            let expected = logits(&case, &pass);
            assert!(relative(&expected, &plain) > 0.1, "{name}: nothing has changed");
            let out = tempfile::tempdir().unwrap();
            written(&case, out.path(), &MergeOptions::default()).unwrap();
            let error = relative(&logits_of(out.path(), &pass), &expected);
            assert!(error < 1e-5, "{name}: logits {error}");
        }
    }
}

#[test]
fn tables_and_heads_of_other_families_are_untied_too() {
    for name in ["gemma3", "gpt2", "bloom", "qwen2", "t5"] {
        for change in [with_table, with_head] {
            let (_dir, checkpoint) = base(name);
            assert!(checkpoint.spec.head.tied, "{name}");
            let mut case = Case::bare(name, checkpoint);
            let (pass, _) = golden(name);
            let plain = logits(&case, &pass);
            change(&mut case);
            let expected = logits(&case, &pass);
            assert!(relative(&expected, &plain) > 1e-2, "{name}: nothing has changed");
            let out = tempfile::tempdir().unwrap();
            written(&case, out.path(), &MergeOptions::default()).unwrap();
            assert_eq!(json_of(out.path(), "config.json")["tie_word_embeddings"], json!(false), "{name}");
            let again = Checkpoint::open(out.path()).unwrap();
            assert!(!again.spec.head.tied, "{name}");
            let stored = |name: &str| again.tensor(&format!("{name}.weight")).unwrap().to_f32();
            let (table, head) = (stored(&again.spec.table.name), stored(&again.spec.head.linear.name));
            assert_ne!(table, head, "{name}");
            let base = case.checkpoint.tensor(&format!("{}.weight", again.spec.table.name)).unwrap().to_f32();
            assert!((table == base) != (head == base), "{name}: one of the two is the base's");
            let error = relative(&logits_of(out.path(), &pass), &expected);
            assert!(error < 1e-5, "{name}: logits {error}");
        }
    }
}

#[test]
fn a_trained_model_is_written_from_its_parameters() {
    for name in ["llama_tied", "llama_bias", "gpt2", "bloom", "phi3", "gemma3", "t5", "flan_t5"] {
        let (_dir, checkpoint) = base(name);
        let mut case = Case::with_method(name, checkpoint, &Full);
        let (pass, plain) = golden(name);
        case.params.iter_mut().zip(numbers(10_000).iter().cycle()).for_each(|(param, change)| *param += change);
        let expected = logits(&case, &pass);
        assert!(relative(&expected, &plain) > 1e-2, "{name}: nothing has changed");
        let out = tempfile::tempdir().unwrap();
        written(&case, out.path(), &MergeOptions::default()).unwrap();
        let again = Checkpoint::open(out.path()).unwrap();
        assert_eq!(again.spec, case.checkpoint.spec, "{name}");
        let file = fs::read(out.path().join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(file.len(), case.overlay.layout.params().len(), "{name}");
        for param in case.overlay.layout.params() {
            // In memory as the engine has it, in the file as transformers does.
            let values = &case.params[param.range.clone()];
            assert_eq!(again.tensor(&param.name).unwrap().to_f32(), values, "{name}: {}", param.name);
            let stored = file.tensor(&case.checkpoint.exported_name(&param.name)).unwrap();
            let bytes: Vec<u8> = param.to_file(&case.params).iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!((stored.shape(), stored.data()), (&param.shape[..], &bytes[..]), "{name}: {}", param.name);
        }
        assert!(relative(&logits_of(out.path(), &pass), &expected) < 1e-5, "{name}");
    }
}

#[test]
fn what_does_not_fit_the_base_is_refused() {
    let case = Case::base("llama_tied");
    let spec = &case.checkpoint.spec;
    let text = adapter("lora_bias_all").lower(spec).unwrap_err().to_string();
    assert!(text.contains("no place in this model"), "{text}");

    let mut resized = adapter("lora_all_linear");
    resized.method = Arc::new(LoraConfig { modules_to_save: vec!["embed_tokens".to_owned()], ..settings(&resized) });
    let key = names::saved_weight("model.embed_tokens");
    resized.tensors.insert(key.clone(), (vec![97, 32], numbers(97 * 32)));
    let lowered = resized.lower(spec).and_then(|overlay| resized.params(&overlay));
    let text = lowered.unwrap_err().to_string();
    assert!(text.contains(&key) && text.contains("[97, 32]") && text.contains("[96, 32]"), "{text}");
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let (_dir, checkpoint) = base("llama_tied");
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("a/merged");
    let message = |result: Result<MergeReport, Error>| {
        assert!(!out.exists());
        result.unwrap_err().to_string()
    };

    let mut overlay = Case::base("llama_tied").overlay;
    overlay.table = Some(overlay.layout.add(EMBEDDING.to_owned(), vec![96, 32], Some(EMBEDDING.to_owned())));
    let write = |values: &[f32], dtype| {
        let options = MergeOptions { dtype, ..MergeOptions::default() };
        export::write(&checkpoint, &overlay, values, &out, &options, &mut |_, _| {})
    };
    let mut values = numbers(96 * 32);
    values[33] = 7e4;
    let text = message(write(&values, ExportType::F16));
    assert!(text.contains(EMBEDDING) && text.contains("70000 at row 1, column 1"), "{text}");
    values[33] = f32::NAN;
    let text = message(write(&values, ExportType::F32));
    assert!(text.contains(EMBEDDING) && text.contains("NaN at row 1, column 1"), "{text}");

    // Nothing of all this is in the way of a good one.
    copied(&checkpoint, &out).unwrap();
    let text = copied(&checkpoint, &out).unwrap_err().to_string();
    assert!(text.contains("is not empty"), "{text}");
    let file = out.join("config.json");
    assert!(copied(&checkpoint, &file).unwrap_err().to_string().contains("config.json"));
    assert!(copied(&checkpoint, &file.join("below")).is_err());
}

#[test]
fn a_base_without_tokenizer_is_refused_before_anything_is_written() {
    let checkpoint = checkpoint("llama_tied");
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("merged");
    assert!(matches!(copied(&checkpoint, &out), Err(Error::Text(retune_text::Error::TokenizerMissing { .. }))));
    assert!(!out.exists());
}

/// Something takes the name of a file while the weights are written: its rename fails.
#[test]
fn a_write_that_fails_leaves_nothing_that_loads() {
    let (_dir, checkpoint) = base("llama_tied");
    let Case { checkpoint, overlay, .. } = Case::bare("llama_tied", checkpoint);
    let options = MergeOptions { max_shard_bytes: 10_000, ..MergeOptions::default() };
    // Another program takes the name meanwhile.
    for taken in ["config.json", "tokenizer.json", "model-00002-of-00010.safetensors"] {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("merged");
        let result = export::write(&checkpoint, &overlay, &[], &out, &options, &mut |_, _| {
            fs::create_dir_all(out.join(taken)).unwrap();
        });
        assert!(result.is_err(), "{taken}");
        assert!(Checkpoint::open(&out).is_err(), "{taken}");
        assert!(out.join(taken).is_dir(), "{taken}");
        for folder in [parent.path(), &out] {
            assert_eq!(fs::read_dir(folder).unwrap().count(), 1, "{taken}");
        }
    }
}

/// A unit in the last place of a value as this type stores it.
fn ulp(value: f32, dtype: ExportType) -> f32 {
    match dtype {
        ExportType::BF16 => bf16::from_bits((bf16::from_f32(value.abs()).to_bits()) + 1).to_f32() - value.abs(),
        _ => f16::from_bits((f16::from_f32(value.abs()).to_bits()) + 1).to_f32() - value.abs(),
    }
}

#[test]
fn unmerging_gives_the_original_back() {
    for case in ["lora_all_linear", "lora_rs", "lora_patterns"] {
        for dtype in [ExportType::F32, ExportType::BF16, ExportType::F16] {
            let (_dir, checkpoint) = base_of(case);
            let folder = tempfile::tempdir().unwrap();
            let write = |from: &Checkpoint, overlay: &Overlay, params: &[f32], name: &str| {
                let (out, options) = (folder.path().join(name), MergeOptions { dtype, ..MergeOptions::default() });
                export::write(from, overlay, params, &out, &options, &mut |_, _| {}).unwrap();
                Checkpoint::open(&out).unwrap()
            };
            let nothing = Case::bare("original", checkpoint);
            let original = write(&nothing.checkpoint, &nothing.overlay, &[], "original");
            let with = Case::with_adapter(case, original, &adapter(case));
            let (overlay, params) = (&with.overlay, &with.params);
            let merged = write(&with.checkpoint, overlay, params, "merged");
            let again = write(&merged, &inverse(overlay).unwrap(), params, "again");
            let (mut changed, mut total) = (0, 0);
            for name in with.checkpoint.names() {
                let values = |of: &Checkpoint| of.tensor(name).unwrap().to_f32();
                let (original, merged, again) = (values(&with.checkpoint), values(&merged), values(&again));
                changed += original.iter().zip(&merged).filter(|(a, b)| a != b).count();
                total += original.len();
                if dtype == ExportType::F32 {
                    let away = relative(&again, &original);
                    assert!(away < 1e-6, "{case}, {name}: {away}");
                    continue;
                }
                for ((&original, &merged), &again) in original.iter().zip(&merged).zip(&again) {
                    let most = ulp(if merged.abs() > original.abs() { merged } else { original }, dtype);
                    assert!((again - original).abs() <= most, "{case}, {dtype}: {original}, {merged}, {again}");
                }
            }
            assert!(changed * 10 > total, "{case}: only {changed} of {total} weights were merged");
        }
    }
}

#[test]
fn what_was_trained_whole_cannot_be_taken_out() {
    let (_dir, checkpoint) = base_of("lora_save_head");
    let error = inverse(&Case::with_adapter("whole", checkpoint, &adapter("lora_save_head")).overlay).unwrap_err();
    assert!(matches!(&error, Error::Irreversible { tensor } if tensor == "lm_head.weight"), "{error}");
}
