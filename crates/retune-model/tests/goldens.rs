//! The model's logits, loss and every gradient against transformers and peft, on small random models.
//!
//! `goldens/make_llama.py` and `goldens/make_gguf.py` make the fixtures. "Relative" is ‖ours − theirs‖ / ‖theirs‖ per tensor.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use retune_adapter::{AdapterFile, InitLoraWeights};
use retune_model::adapter::{AdapterPlan, Tensors};
use retune_model::checkpoint::Checkpoint;
use retune_model::model::{Model, Trainable};
use retune_model::pass::Pass;
use retune_model::workspace::{Keep, Workspace};
use safetensors::{Dtype, SafeTensors};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

struct Golden {
    integers: BTreeMap<String, Vec<i64>>,
    tensors: Tensors,
}

fn read_golden(case: &Path) -> Golden {
    let bytes = fs::read(case.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (mut integers, mut tensors) = (BTreeMap::new(), Tensors::new());
    for (name, tensor) in file.tensors() {
        match tensor.dtype() {
            Dtype::I64 => {
                let values = tensor.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b));
                integers.insert(name, values.collect());
            }
            _ => {
                let values = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                tensors.insert(name, (tensor.shape().to_vec(), values.collect()));
            }
        }
    }
    Golden { integers, tensors }
}

/// ‖a − b‖ / ‖b‖, or ‖a‖ · 1000 where b is zero, so that 1e-4 allows 1e-7.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    let norm: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    if norm == 0.0 { difference.sqrt() * 1e3 } else { (difference / norm).sqrt() }
}

/// The golden's sequences as one pass, or each as a pass of its own.
fn passes(golden: &Golden, packed: bool) -> Vec<Pass> {
    let ids: Vec<u32> = golden.integers["input_ids"].iter().map(|&id| id as u32).collect();
    let trained: Vec<bool> = golden.integers["labels"].iter().map(|&l| l != -100).collect();
    let (mut passes, mut start) = (vec![Pass::default()], 0);
    for (row, &length) in golden.integers["sequence_lengths"].iter().enumerate() {
        let range = start..start + length as usize;
        start = range.end;
        if !packed && row > 0 {
            passes.push(Pass::default());
        }
        passes.last_mut().unwrap().push(row as u64, &ids[range.clone()], &trained[range]);
    }
    passes
}

struct Case {
    name: String,
    model: Model,
    params: Vec<f32>,
    golden: Golden,
}

fn load(case: &str) -> Case {
    let dir = goldens().join(case);
    let golden = read_golden(&dir);
    let (model, params) = match fs::read_to_string(dir.join("base.txt")) {
        Err(_) => {
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let model = Model::load(&checkpoint, Trainable::Everything).unwrap();
            let params = model.initial_params(&checkpoint, &InitLoraWeights::Kaiming, 0).unwrap();
            (model, params)
        }
        Ok(base) => {
            let checkpoint = Checkpoint::open(&goldens().join(base.trim())).unwrap();
            let adapter = AdapterFile::read(&dir.join("adapter")).unwrap();
            let plan = AdapterPlan::new(&adapter.config, &checkpoint).unwrap();
            let model = Model::load(&checkpoint, Trainable::Adapter(&plan)).unwrap();
            let params = model.params_from(&adapter.tensors).unwrap();
            (model, params)
        }
    };
    Case { name: case.to_owned(), model, params, golden }
}

const CASES: [&str; 16] = [
    "llama_tied",
    "llama_untied_mha",
    "llama_gqa_head_dim",
    "llama_bias",
    "rope_linear",
    "rope_llama3",
    "mistral_window",
    "lora_all_linear",
    "lora_rs",
    "lora_patterns",
    "lora_regex",
    "lora_layers",
    "lora_save_head",
    "lora_save_embeddings",
    "lora_bias_all",
    "lora_bias_lora_only",
];

fn check(case: &Case, packed: bool, keep: Keep) {
    let Case { name, model, params, golden } = case;
    let name = format!("{name} (packed {packed}, {keep:?})");
    let mut workspace = Workspace::new(model, keep);
    let mut grads = vec![0.0; params.len()];
    let (mut loss, mut labels, mut logits) = (0.0, 0, Vec::new());
    for pass in passes(golden, packed) {
        let all: Vec<u32> = (0..pass.tokens() as u32).collect();
        logits.extend(model.logits(params, &pass, &all, &mut workspace));
        let sum = model.loss(params, &pass, &mut workspace);
        let again = model.loss_and_gradient(params, &mut grads, &pass, None, &mut workspace);
        assert_eq!(sum, again, "{name}: the loss with and without gradient");
        loss += sum;
        labels += pass.labels.len();
    }
    let error = relative(&logits, &golden.tensors["logits"].1);
    assert!(error < 1e-4, "{name}: logits {error}");
    let expected = f64::from(golden.tensors["loss"].1[0]);
    let loss = loss / labels as f64;
    assert!((loss - expected).abs() < 1e-4 * expected, "{name}: loss {loss} instead of {expected}");
    grads.iter_mut().for_each(|g| *g /= labels as f32);
    let ours = model.tensors_of(&grads);
    let theirs = golden.tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("grad.")?, tensor)));
    let mut count = 0;
    for (tensor, (shape, expected)) in theirs {
        let (our_shape, gradient) = ours.get(tensor).unwrap_or_else(|| panic!("{name}: {tensor} is not trained"));
        assert_eq!(our_shape, shape, "{name}: {tensor}");
        let error = relative(gradient, expected);
        assert!(error < 1e-4, "{name}: gradient of {tensor} {error}");
        count += 1;
    }
    assert_eq!(count, ours.len(), "{name}: number of trained tensors");
}

#[test]
fn logits_loss_and_every_gradient_equal_transformers_and_peft() {
    for case in CASES {
        let case = load(case);
        for packed in [true, false] {
            check(&case, packed, Keep::Activations);
        }
        check(&case, true, Keep::Inputs);
    }
}

#[test]
fn old_and_new_spellings_of_rope_scaling_are_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let case = goldens().join("rope_linear");
    fs::copy(case.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    fs::copy(case.join("config_old.json"), dir.path().join("config.json")).unwrap();
    let (old, new) = (Checkpoint::open(dir.path()).unwrap(), Checkpoint::open(&case).unwrap());
    assert_eq!(old.config.rope, new.config.rope);
}

#[test]
fn gguf_models_give_the_logits_of_their_dequantized_weights() {
    for case in ["gguf_llama", "gguf_llama_rope_freqs"] {
        let dir = goldens().join(case);
        let golden = read_golden(&dir);
        let checkpoint = Checkpoint::open(&dir.join("model.gguf")).unwrap();
        let model = Model::load(&checkpoint, Trainable::Nothing).unwrap();
        let mut workspace = Workspace::new(&model, Keep::Nothing);
        let pass = &passes(&golden, true)[0];
        let all: Vec<u32> = (0..pass.tokens() as u32).collect();
        let logits = model.logits(&[], pass, &all, &mut workspace);
        let error = relative(&logits, &golden.tensors["logits"].1);
        assert!(error < 1e-4, "{case}: logits {error}");
        let loss = model.loss(&[], pass, &mut workspace) / pass.labels.len() as f64;
        let expected = f64::from(golden.tensors["loss"].1[0]);
        assert!((loss - expected).abs() < 1e-4 * expected, "{case}: loss {loss} instead of {expected}");
    }
}

#[test]
fn generation_with_a_cache_equals_running_the_whole_text() {
    use retune_model::generate::{Generation, Sampling};
    for case in ["llama_tied", "mistral_window", "lora_all_linear"] {
        let Case { model, params, .. } = load(case);
        let prompt = [5, 9, 33, 2, 71, 8, 8, 40];
        let generated = Generation::new(&model, &params, Sampling::GREEDY).run(&prompt, 6, &[], |_| true);
        let mut text = prompt.to_vec();
        let mut workspace = Workspace::new(&model, Keep::Nothing);
        for &token in &generated {
            let mut pass = Pass::default();
            pass.push(0, &text, &[]);
            let logits = model.logits(&params, &pass, &[text.len() as u32 - 1], &mut workspace);
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            assert_eq!(best as u32, token, "{case}");
            text.push(token);
        }
        assert_eq!(generated.len(), 6);
    }
}

/// What `kept` gives must not depend on how rows are packed into passes, dropout included.
#[test]
fn dropout_is_the_same_however_rows_are_packed() {
    let base = Checkpoint::open(&goldens().join("llama_tied")).unwrap();
    let adapter = AdapterFile::read(&goldens().join("lora_all_linear/adapter")).unwrap();
    let mut plan = AdapterPlan::new(&adapter.config, &base).unwrap();
    let golden = read_golden(&goldens().join("lora_all_linear"));
    let run = |plan: &AdapterPlan, packed: bool, keep: Keep| {
        let model = Model::load(&base, Trainable::Adapter(plan)).unwrap();
        let params = model.params_from(&adapter.tensors).unwrap();
        let mut workspace = Workspace::new(&model, keep);
        let mut grads = vec![0.0; params.len()];
        let mut loss = 0.0;
        for pass in passes(&golden, packed) {
            let dropout = retune_model::Dropout { seed: 3, step: 5, sequences: &pass.sequences };
            loss += model.loss_and_gradient(&params, &mut grads, &pass, Some(dropout), &mut workspace);
        }
        (loss, grads)
    };
    let without = run(&plan, true, Keep::Activations);
    plan.lora_dropout = 0.3;
    let (loss, grads) = run(&plan, true, Keep::Activations);
    assert!((loss - without.0).abs() > 1e-3, "dropout changes nothing");
    for (packed, keep) in [(false, Keep::Activations), (true, Keep::Inputs)] {
        let (other, other_grads) = run(&plan, packed, keep);
        assert!((loss - other).abs() < 1e-5 * loss, "{loss} and {other}");
        assert!(relative(&other_grads, &grads) < 1e-5);
    }
}
