//! Merged and trained models, written and loaded again: they must give the logits of base and adapter together.
//!
//! The expected logits are those of transformers and peft, from the fixtures of `goldens.rs`.

use std::fs;
use std::path::{Path, PathBuf};

use retune_adapter::{AdapterFile, InitLoraWeights, ModuleSelection, names};
use retune_model::Error;
use retune_model::adapter::AdapterPlan;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::{ExportType, MergeOptions, MergeReport, merge, write_model};
use retune_model::model::{Model, Trainable};
use retune_model::pass::Pass;
use retune_model::workspace::{Keep, Workspace};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

const EMBEDDING: &str = "model.embed_tokens.weight";

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// The golden's rows as one pass, and the logits of all its tokens.
fn golden(case: &str) -> (Pass, Vec<f32>) {
    let bytes = fs::read(goldens().join(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let integers = |name: &str| -> Vec<u32> {
        let data = file.tensor(name).unwrap().data().as_chunks::<8>().0;
        data.iter().map(|bytes| i64::from_le_bytes(*bytes) as u32).collect()
    };
    let ids = integers("input_ids");
    let (mut pass, mut start) = (Pass::default(), 0);
    for (row, length) in integers("sequence_lengths").into_iter().enumerate() {
        let end = start + length as usize;
        pass.push(row as u64, &ids[start..end], &[]);
        start = end;
    }
    let logits = file.tensor("logits").unwrap();
    (pass, logits.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

fn logits(model: &Model, params: &[f32], pass: &Pass) -> Vec<f32> {
    let all: Vec<u32> = (0..pass.tokens() as u32).collect();
    model.logits(params, pass, &all, &mut Workspace::new(model, Keep::Nothing))
}

fn logits_of(dir: &Path, pass: &Pass) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    logits(&Model::load(&checkpoint, Trainable::Nothing).unwrap(), &[], pass)
}

/// ‖a − b‖ / ‖b‖
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    let norm: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    (difference / norm).sqrt()
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

fn merged(checkpoint: &Checkpoint, adapter: Option<&AdapterFile>, out: &Path) -> Result<MergeReport, Error> {
    merge(checkpoint, adapter, out, &MergeOptions::default(), &mut |_, _| {})
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
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.1
    };
    (0..count).map(|_| next()).collect()
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
    ] {
        let (_dir, checkpoint) = base_of(case);
        let out = tempfile::tempdir().unwrap();
        let report = merged(&checkpoint, Some(&adapter(case)), out.path()).unwrap();
        let (pass, expected) = golden(case);
        let error = relative(&logits_of(out.path(), &pass), &expected);
        assert!(error < 1e-4, "{case}: logits {error}");
        assert!(report.largest_change > 0.0 && report.largest_change.is_finite(), "{case}: {report:?}");
        assert_eq!((report.changed_modules, report.shards), (modules, 1), "{case}");
        assert_eq!(report.bytes, fs::metadata(out.path().join("model.safetensors")).unwrap().len());
    }
}

#[test]
fn a_base_in_4_bits_is_written_as_plain_numbers() {
    let (_dir, checkpoint) = base("bnb_nf4_double");
    let out = tempfile::tempdir().unwrap();
    merged(&checkpoint, None, out.path()).unwrap();
    let again = Checkpoint::open(out.path()).unwrap();
    for name in checkpoint.names() {
        let (stored, written) = (checkpoint.tensor(name).unwrap(), again.tensor(name).unwrap());
        assert_eq!((written.storage(), written.to_f32()), ("F32", stored.to_f32()), "{name}");
    }
    assert!(json_of(out.path(), "config.json").get("quantization_config").is_none());
}

#[test]
fn a_base_alone_is_written_as_it_is() {
    for case in ["llama_tied", "llama_untied_mha", "llama_gqa_head_dim", "mistral_window"] {
        let (_dir, checkpoint) = base(case);
        let out = tempfile::tempdir().unwrap();
        let report = merged(&checkpoint, None, out.path()).unwrap();
        assert_eq!((report.changed_modules, report.largest_change), (0, 0.0));
        let again = Checkpoint::open(out.path()).unwrap();
        assert_eq!(again.content_hash(), checkpoint.content_hash());
        assert_eq!(again.config, checkpoint.config);
        assert_eq!(again.tokenizer().unwrap().content_hash(), checkpoint.tokenizer().unwrap().content_hash());
        let stored = fs::read(out.path().join("model.safetensors")).unwrap();
        let head = SafeTensors::deserialize(&stored).unwrap().tensor("lm_head.weight").is_ok();
        assert_ne!(head, checkpoint.config.tie_word_embeddings, "{case}");
        assert_eq!(json_of(out.path(), "generation_config.json"), json!({"bos_token_id": 1, "eos_token_id": 2}));
    }
}

#[test]
fn a_gguf_model_becomes_a_directory() {
    let checkpoint = Checkpoint::open(&goldens().join("gguf_llama/model.gguf")).unwrap();
    let out = tempfile::tempdir().unwrap();
    merged(&checkpoint, None, out.path()).unwrap();
    let (pass, expected) = golden("gguf_llama");
    let error = relative(&logits_of(out.path(), &pass), &expected);
    assert!(error < 1e-4, "logits {error}");
    let text = "I'll sing 12345 things";
    let ids = |checkpoint: &Checkpoint| checkpoint.tokenizer().unwrap().encode(text).unwrap();
    assert_eq!(ids(&Checkpoint::open(out.path()).unwrap()), ids(&checkpoint));
}

#[test]
fn shards_hold_the_same_model_and_the_same_input_gives_the_same_bytes() {
    let (_dir, checkpoint) = base("llama_tied");
    let adapter = adapter("lora_all_linear");
    let written = |max_shard_bytes| {
        let out = tempfile::tempdir().unwrap();
        let options = MergeOptions { max_shard_bytes, ..MergeOptions::default() };
        let mut steps = Vec::new();
        let report = merge(&checkpoint, Some(&adapter), out.path(), &options, &mut |done, total| {
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
    let adapter = adapter("lora_patterns");
    let (pass, expected) = golden("lora_patterns");
    for (dtype, name, tolerance) in
        [(ExportType::F32, "float32", 1e-4), (ExportType::F16, "float16", 1e-2), (ExportType::BF16, "bfloat16", 5e-2)]
    {
        let out = tempfile::tempdir().unwrap();
        let options = MergeOptions { dtype, ..MergeOptions::default() };
        merge(&checkpoint, Some(&adapter), out.path(), &options, &mut |_, _| {}).unwrap();
        let error = relative(&logits_of(out.path(), &pass), &expected);
        assert!(error < tolerance, "{dtype}: logits {error}");
        let config = json_of(out.path(), "config.json");
        assert_eq!((&config["dtype"], config.get("torch_dtype")), (&json!(name), None));
    }
    // The older spelling stays where it is used.
    let (_dir, checkpoint) = base("llama_tied");
    let out = tempfile::tempdir().unwrap();
    let options = MergeOptions { dtype: ExportType::BF16, ..MergeOptions::default() };
    merge(&checkpoint, None, out.path(), &options, &mut |_, _| {}).unwrap();
    let config = json_of(out.path(), "config.json");
    assert_eq!((&config["torch_dtype"], config.get("dtype")), (&json!("bfloat16"), None));
}

/// The merged model of a tied base has two tensors once only one of the pair was changed.
#[test]
fn embeddings_or_head_that_an_adapter_changes_are_untied() {
    let (_dir, checkpoint) = base("llama_tied");
    let mut saved = adapter("lora_all_linear");
    saved.config.modules_to_save = vec!["embed_tokens".to_owned()];
    saved.tensors.insert(names::saved_weight("model.embed_tokens"), (vec![96, 32], numbers(96 * 32)));
    let mut adapted = adapter("lora_all_linear");
    let ModuleSelection::List(targets) = &mut adapted.config.target_modules else { panic!("a list") };
    targets.push("lm_head".to_owned());
    adapted.tensors.insert(names::lora_a("lm_head"), (vec![4, 32], numbers(4 * 32)));
    adapted.tensors.insert(names::lora_b("lm_head"), (vec![96, 4], numbers(96 * 4)));

    let (pass, plain) = golden("lora_all_linear");
    for adapter in [saved, adapted] {
        let plan = AdapterPlan::new(&adapter.config, &checkpoint).unwrap();
        let model = Model::load(&checkpoint, Trainable::Adapter(&plan)).unwrap();
        let expected = logits(&model, &model.params_from(&adapter.tensors).unwrap(), &pass);
        assert!(relative(&expected, &plain) > 1e-3, "the adapter's addition changes nothing");
        let out = tempfile::tempdir().unwrap();
        merged(&checkpoint, Some(&adapter), out.path()).unwrap();
        assert_eq!(json_of(out.path(), "config.json")["tie_word_embeddings"], json!(false));
        let error = relative(&logits_of(out.path(), &pass), &expected);
        assert!(error < 1e-4, "logits {error}");
    }
}

#[test]
fn a_trained_model_is_written_from_its_parameters() {
    for case in ["llama_tied", "llama_bias"] {
        let (_dir, checkpoint) = base(case);
        let model = Model::load(&checkpoint, Trainable::Everything).unwrap();
        let mut params = model.initial_params(&checkpoint, &InitLoraWeights::Kaiming, 0).unwrap();
        params.iter_mut().zip(numbers(10_000).iter().cycle()).for_each(|(param, change)| *param += change);
        let tensor = |name: &str| {
            let param = model.layout.params().iter().find(|param| param.name == name)?;
            Some(&params[param.range.clone()])
        };
        let out = tempfile::tempdir().unwrap();
        let write =
            |options: &MergeOptions, out: &Path| write_model(&checkpoint, &tensor, out, options, &mut |_, _| {});
        write(&MergeOptions::default(), out.path()).unwrap();
        let written = Checkpoint::open(out.path()).unwrap();
        assert_eq!(written.config.tie_word_embeddings, checkpoint.config.tie_word_embeddings);
        for param in model.layout.params() {
            assert_eq!(written.tensor(&param.name).unwrap().to_f32(), params[param.range.clone()], "{}", param.name);
        }
        let (pass, _) = golden(case);
        assert!(relative(&logits_of(out.path(), &pass), &logits(&model, &params, &pass)) < 1e-5);
    }
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

    let misfit = merged(&checkpoint, Some(&adapter("lora_bias_all")), &out);
    assert!(message(misfit).contains("no place in this model"));

    let mut resized = adapter("lora_all_linear");
    resized.config.modules_to_save = vec!["embed_tokens".to_owned()];
    let key = names::saved_weight("model.embed_tokens");
    resized.tensors.insert(key.clone(), (vec![97, 32], numbers(97 * 32)));
    let text = message(merged(&checkpoint, Some(&resized), &out));
    assert!(text.contains(&key) && text.contains("[97, 32]") && text.contains("[96, 32]"), "{text}");

    let write = |values: &[f32], dtype| {
        let tensor = |name: &str| (name == EMBEDDING).then_some(values);
        let options = MergeOptions { dtype, ..MergeOptions::default() };
        write_model(&checkpoint, &tensor, &out, &options, &mut |_, _| {})
    };
    let mut values = numbers(96 * 32);
    let text = message(write(&values[1..], ExportType::F32));
    assert!(text.contains(EMBEDDING) && text.contains("[96, 32]"), "{text}");
    values[33] = 7e4;
    let text = message(write(&values, ExportType::F16));
    assert!(text.contains(EMBEDDING) && text.contains("70000 at row 1, column 1"), "{text}");
    values[33] = f32::NAN;
    let text = message(write(&values, ExportType::F32));
    assert!(text.contains(EMBEDDING) && text.contains("NaN at row 1, column 1"), "{text}");

    // Nothing of all this is in the way of a good one.
    merged(&checkpoint, None, &out).unwrap();
    let text = merged(&checkpoint, None, &out).unwrap_err().to_string();
    assert!(text.contains("is not empty"), "{text}");
    let file = out.join("config.json");
    assert!(merged(&checkpoint, None, &file).unwrap_err().to_string().contains("config.json"));
    assert!(merged(&checkpoint, None, &file.join("below")).is_err());
}

#[test]
fn a_base_without_tokenizer_is_refused_before_anything_is_written() {
    let checkpoint = Checkpoint::open(&goldens().join("llama_tied")).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("merged");
    assert!(matches!(merged(&checkpoint, None, &out), Err(Error::TokenizerMissing { .. })));
    assert!(!out.exists());
}

/// Something takes the name of a file while the weights are written: its rename fails.
#[test]
fn a_write_that_fails_leaves_nothing_that_loads() {
    let (_dir, checkpoint) = base("llama_tied");
    let options = MergeOptions { max_shard_bytes: 10_000, ..MergeOptions::default() };
    for taken in [
        "config.json",
        "model.safetensors.index.json",
        "generation_config.json",
        "tokenizer.json",
        "model-00002-of-00010.safetensors",
        ".model-00002-of-00010.safetensors.tmp",
    ] {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("merged");
        let mut files = 0;
        let result = merge(&checkpoint, None, &out, &options, &mut |_, _| {
            fs::create_dir_all(out.join(taken)).unwrap();
            files = files.max(fs::read_dir(&out).unwrap().count());
        });
        assert!(result.is_err(), "{taken}");
        assert!(files > 1, "{taken}: nothing was being written");
        assert!(Checkpoint::open(&out).is_err(), "{taken}");
        assert!(out.join(taken).is_dir(), "{taken}");
        let names = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let temporary: Vec<String> = names.filter(|name| name.ends_with(".tmp") && name != taken).collect();
        assert!(temporary.is_empty(), "{taken}: {temporary:?}");
    }
}
