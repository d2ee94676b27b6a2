//! The model in 8 bits: close to what it is in f32, the same for every packing and number of threads, and again as its file of choices
//! says.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::ThreadPoolBuilder;
use retune_adapter::{AdapterFile, names};
use retune_model::adapter::AdapterPlan;
use retune_model::calibration::{self, Choice};
use retune_model::checkpoint::Checkpoint;
use retune_model::model::{Model, Trainable};
use retune_model::params::Vector;
use retune_model::pass::Pass;
use retune_model::workspace::{Keep, Workspace};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::{Value, json};

/// No error is too large.
const ANY: f64 = f64::INFINITY;

/// Rows from one token, which has no label, to more than a block of attention's queries; those of up to four tokens are computed in
/// another way in f32.
const LENGTHS: [usize; 7] = [1, 17, 3, 70, 2, 8, 4];

/// A model with adapters on all linears: seven in each of two layers, and its head, can be computed in 8 bits.
const CASE: &str = "lora_all_linear";
const LINEARS: usize = 15;
/// One of its linears.
const LINEAR: &str = "model.layers.0.self_attn.o_proj";
/// Channels of that linear's input.
const CHANNELS: usize = 32;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// A base with an adapter trained by peft: with B at its first zeros A would have no gradient.
fn adapted(case: &str) -> (Model, Vec<f32>) {
    let dir = goldens().join(case);
    let base = fs::read_to_string(dir.join("base.txt")).unwrap();
    let checkpoint = Checkpoint::open(&goldens().join(base.trim())).unwrap();
    let adapter = AdapterFile::read(&dir.join("adapter")).unwrap();
    let plan = AdapterPlan::new(&adapter.config, &checkpoint).unwrap();
    let model = Model::load(&checkpoint, Trainable::Adapter(&plan)).unwrap();
    let params = model.params_from(&adapter.tensors).unwrap();
    (model, params)
}

/// The rows of a golden, in one pass.
fn golden_pass(case: &str) -> Pass {
    let bytes = fs::read(goldens().join(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let integers = |name: &str| -> Vec<i64> {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::I64);
        tensor.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
    };
    let ids: Vec<u32> = integers("input_ids").iter().map(|&id| id as u32).collect();
    let trained: Vec<bool> = integers("labels").iter().map(|&label| label != -100).collect();
    let (mut pass, mut start) = (Pass::default(), 0);
    for (row, &length) in integers("sequence_lengths").iter().enumerate() {
        let range = start..start + length as usize;
        start = range.end;
        pass.push(row as u64, &ids[range.clone()], &trained[range]);
    }
    pass
}

/// Random rows of `LENGTHS` tokens: all in one pass, and each in one of its own.
fn random_rows(vocab_size: usize) -> (Pass, Vec<Pass>) {
    let mut state = 7u64;
    let mut below = |end: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % end
    };
    let (mut packed, mut alone) = (Pass::default(), Vec::new());
    for (row, length) in LENGTHS.into_iter().enumerate() {
        let ids: Vec<u32> = (0..length).map(|_| below(vocab_size) as u32).collect();
        let trained: Vec<bool> = (0..length).map(|_| below(4) > 0).collect();
        let mut pass = Pass::default();
        for pass in [&mut packed, &mut pass] {
            pass.push(row as u64, &ids, &trained);
        }
        alone.push(pass);
    }
    (packed, alone)
}

/// ‖a − b‖ / ‖b‖
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    let norm: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    (difference / norm).sqrt()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The loss of each label, and the gradient of their sum over all passes.
fn gradient(model: &Model, params: &[f32], keep: Keep, passes: &[Pass]) -> (Vec<f32>, Vec<f32>) {
    let mut workspace = Workspace::new(model, keep);
    let (mut losses, mut grads) = (Vec::new(), vec![0.0; params.len()]);
    for pass in passes {
        model.loss_and_gradient(params, &mut grads, pass, None, &mut workspace);
        losses.extend_from_slice(&workspace.losses);
    }
    (losses, grads)
}

/// Asserts that two models compute the same losses and gradients to the last bit.
fn assert_same(ours: &Model, theirs: &Model, params: &[f32], pass: &Pass) {
    let [a, b] = [ours, theirs].map(|model| gradient(model, params, Keep::Activations, std::slice::from_ref(pass)));
    assert_eq!(bits(&a.0), bits(&b.0), "losses");
    assert!(bits(&a.1) == bits(&b.1), "the gradients differ");
}

fn logits(model: &Model, params: &[f32], pass: &Pass) -> Vec<f32> {
    let all: Vec<u32> = (0..pass.tokens() as u32).collect();
    model.logits(params, pass, &all, &mut Workspace::new(model, Keep::Nothing))
}

fn find<'a>(choices: &'a mut [Choice], linear: &str) -> &'a mut Choice {
    choices.iter_mut().find(|choice| choice.name == linear).unwrap_or_else(|| panic!("nothing is said of {linear}"))
}

/// The linears of a model that are computed in 8 bits.
fn in_int8(model: &Model) -> Vec<&str> {
    let linears = model.layers.iter().flat_map(|layer| layer.linears()).chain([&model.head]);
    linears.filter(|linear| linear.int8.is_some()).map(|linear| linear.name.as_str()).collect()
}

/// Asserts that two losses of a pass, and its logits, are close but not the same.
///
/// Rounding both operands of a product to 8 bits costs about 1% of its result: a row's largest value is some three times its typical one,
/// and half a step of 1/127 of that is at most 1.2%. The random weights of the goldens carry that on undamped through all layers.
fn check_closeness(case: &str, loss: f64, exact_loss: f64, logits: &[f32], exact_logits: &[f32]) {
    let error = relative(logits, exact_logits);
    assert!(error > 1e-3, "{case}: logits {error}: is it computed in int8 at all?");
    assert!(error < 0.06, "{case}: logits {error}");
    let error = (loss - exact_loss).abs() / exact_loss;
    assert!(error < 0.01, "{case}: loss {loss} instead of {exact_loss}");
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&loss| f64::from(loss)).sum()
}

#[test]
fn logits_and_loss_are_close_to_those_in_f32() {
    for case in ["llama_tied", "llama_bias", "mistral_window", "rope_llama3", "gguf_llama"] {
        let dir = goldens().join(case);
        let gguf = dir.join("model.gguf");
        let checkpoint = Checkpoint::open(if gguf.exists() { &gguf } else { &dir }).unwrap();
        let mut model = Model::load(&checkpoint, Trainable::Nothing).unwrap();
        let pass = golden_pass(case);
        let run = |model: &Model| {
            let mut workspace = Workspace::new(model, Keep::Nothing);
            (model.loss(&[], &pass, &mut workspace), logits(model, &[], &pass))
        };
        let (exact_loss, exact_logits) = run(&model);
        let choices = model.calibrate(&[], &pass, false, ANY).unwrap();
        assert_eq!(in_int8(&model).len(), 7 * model.layers.len() + 1, "{case}");
        for Choice { name, forward_error, backward_error, .. } in choices {
            assert!(forward_error > 0.0 && forward_error < 0.03, "{case}: output of {name} {forward_error}");
            assert_eq!(backward_error, None, "{case}: {name}");
        }
        let (loss, logits) = run(&model);
        check_closeness(case, loss, exact_loss, &logits, &exact_logits);
    }
}

#[test]
fn gradients_are_close_to_those_in_f32() {
    // Of models whose gradients move by about 4% already when their weights are rounded to 8 bits and nothing else. (Those of `lora_rs`,
    // with attention that is all but saturated, move by 15%.)
    for case in [CASE, "lora_bias_all", "lora_save_head", "lora_save_embeddings"] {
        let (mut model, params) = adapted(case);
        let pass = golden_pass(case);
        let run = |model: &Model, keep: Keep| gradient(model, &params, keep, std::slice::from_ref(&pass));
        let (exact_losses, exact) = run(&model, Keep::Activations);
        let exact_logits = logits(&model, &params, &pass);

        let choices = model.calibrate(&params, &pass, true, ANY).unwrap();
        // A head that is trained stays in f32.
        let head = usize::from(case != "lora_save_head");
        assert_eq!((choices.len(), in_int8(&model).len()), (14 + head, 14 + head), "{case}");
        for Choice { name, int8, forward_error, backward_error, .. } in choices {
            assert!(int8 && forward_error < 0.03, "{case}: output of {name} {forward_error}");
            let measured = backward_error.unwrap_or(0.0);
            assert!(measured < 0.08, "{case}: input gradient of {name} {measured}");
            // Nothing below needs the input gradient of the first layer's attention, unless the embedding is trained.
            let first = name.starts_with("model.layers.0.self_attn.") && name != LINEAR;
            assert_eq!(backward_error.is_some(), !first || case == "lora_save_embeddings", "{case}: {name}");
        }

        for keep in [Keep::Activations, Keep::RoundedActivations, Keep::Inputs] {
            let (losses, grads) = run(&model, keep);
            let logits = logits(&model, &params, &pass);
            check_closeness(case, sum(&losses), sum(&exact_losses), &logits, &exact_logits);
            let error = relative(&grads, &exact);
            assert!(error > 1e-3 && error < 0.1, "{case} ({keep:?}): the whole gradient {error}");
            for param in model.layout.params() {
                let error = relative(&grads[param.range.clone()], &exact[param.range.clone()]);
                assert!(error < 0.2, "{case} ({keep:?}): gradient of {} {error}", param.name);
            }
        }
    }
}

#[test]
fn a_pass_of_several_rows_equals_its_rows() {
    for case in [CASE, "lora_rs"] {
        let (mut model, params) = adapted(case);
        let (packed, alone) = random_rows(model.config.vocab_size);
        model.calibrate(&params, &packed, true, ANY).unwrap();
        for keep in [Keep::Activations, Keep::RoundedActivations, Keep::Inputs] {
            let (losses, grads) = gradient(&model, &params, keep, std::slice::from_ref(&packed));
            let (expected_losses, expected) = gradient(&model, &params, keep, &alone);
            // Each row has scales of its own, and is computed in the same order. Were it not, the least difference would here and there
            // round to another integer, and the gradients below be far from equal.
            assert_eq!(bits(&losses), bits(&expected_losses), "{case} ({keep:?})");
            for param in model.layout.params() {
                let (ours, theirs) = (&grads[param.range.clone()], &expected[param.range.clone()]);
                assert!(theirs.iter().any(|g| *g != 0.0), "{case}: {} has no gradient", param.name);
                // Sums over tokens, of f32, in another order.
                let error = relative(ours, theirs);
                assert!(error < 1e-5, "{case} ({keep:?}): gradient of {} {error}", param.name);
            }
        }
    }
}

#[test]
fn one_thread_and_several_give_the_same_bytes() {
    let run = |threads: usize| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut model, params) = adapted(CASE);
            let (pass, _) = random_rows(model.config.vocab_size);
            let choices = model.calibrate(&params, &pass, true, ANY).unwrap();
            let (losses, grads) = gradient(&model, &params, Keep::Activations, &[pass]);
            (choices, bits(&losses), bits(&grads))
        })
    };
    let (choices, losses, grads) = run(1);
    for threads in [2, 3] {
        let other = run(threads);
        assert_eq!(other.0, choices, "{threads} threads");
        assert_eq!(other.1, losses, "{threads} threads");
        assert!(other.2 == grads, "{threads} threads: gradients");
    }
}

#[test]
fn where_no_error_is_allowed_all_stays_in_f32() {
    let (mut model, params) = adapted(CASE);
    let (f32_model, _) = adapted(CASE);
    let pass = golden_pass(CASE);
    let choices = model.calibrate(&params, &pass, true, 0.0).unwrap();
    assert_eq!(choices.len(), LINEARS);
    assert!(choices.iter().all(|choice| !choice.int8));
    assert!(in_int8(&model).is_empty());
    assert_same(&model, &f32_model, &params, &pass);
}

#[test]
fn linears_whose_error_is_over_the_limit_stay_in_f32() {
    let (mut model, params) = adapted(CASE);
    let pass = golden_pass(CASE);
    let error = |choice: &Choice| choice.forward_error.max(choice.backward_error.unwrap_or(0.0));
    let mut errors: Vec<f64> = model.calibrate(&params, &pass, true, ANY).unwrap().iter().map(error).collect();
    errors.sort_by(f64::total_cmp);
    let limit = errors[LINEARS / 2];

    let (mut model, _) = adapted(CASE);
    let choices = model.calibrate(&params, &pass, true, limit).unwrap();
    assert!(choices.iter().all(|choice| choice.int8 == (error(choice) <= limit)));
    let chosen: Vec<&str> = choices.iter().filter(|choice| choice.int8).map(|choice| choice.name.as_str()).collect();
    assert_eq!(in_int8(&model), chosen);
    assert_eq!(chosen.len(), LINEARS / 2 + 1);
}

#[test]
fn a_channel_of_outliers_is_moved_into_the_weight() {
    const OUTLIER: usize = 7;
    let (mut model, params) = adapted(CASE);
    let Vector::Frozen(norm) = &mut model.layers[0].input_norm else { panic!("the norm is trained") };
    norm[OUTLIER] = 60.0;
    // A limit so low that nothing cheap is exact enough.
    let mut choices = model.calibrate(&params, &golden_pass(CASE), true, 1e-3).unwrap();
    for part in ["q_proj", "k_proj", "v_proj"] {
        let choice = find(&mut choices, &format!("model.layers.0.self_attn.{part}"));
        assert!(choice.exponent > 0.0, "{choice:?}");
        let factors = choice.factors.as_ref().unwrap();
        let smallest = (0..factors.len()).min_by(|&a, &b| factors[a].total_cmp(&factors[b]));
        assert_eq!(smallest, Some(OUTLIER), "{choice:?}");
        assert!(choice.forward_error < 0.03, "{choice:?}");
    }
}

#[test]
fn values_that_are_not_finite_reach_the_loss() {
    let (mut model, params) = adapted(CASE);
    let pass = golden_pass(CASE);
    model.calibrate(&params, &pass, true, ANY).unwrap();
    let mut workspace = Workspace::new(&model, Keep::Nothing);
    assert!(model.loss(&params, &pass, &mut workspace).is_finite());
    for name in in_int8(&model).iter().filter(|name| **name != "lm_head") {
        let b = names::lora_b(name);
        let param = model.layout.params().iter().find(|param| param.name == b).unwrap();
        for value in [f32::NAN, f32::INFINITY] {
            // One channel of the linear's output: what reads it next is a product in 8 bits.
            let mut damaged = params.clone();
            damaged[param.range.start] = value;
            let loss = model.loss(&damaged, &pass, &mut workspace);
            assert!(!loss.is_finite(), "{value} in {name}: the loss is {loss}");
        }
    }
}

#[test]
fn choices_that_were_written_and_read_compute_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("calibration.safetensors");
    let (mut model, params) = adapted(CASE);
    let pass = golden_pass(CASE);
    let mut choices = model.calibrate(&params, &pass, true, ANY).unwrap();
    // Whatever the measurement chose: one linear in f32, one with factors, and two with channels in f32, which changes what they compute.
    let before = run_loss(&model, &params, &pass);
    for name in ["model.layers.0.mlp.down_proj", LINEAR] {
        find(&mut choices, name).outliers = vec![1, 5, 30];
    }
    model.compute_as(&choices).unwrap();
    assert_ne!(run_loss(&model, &params, &pass).to_bits(), before.to_bits());
    find(&mut choices, "model.layers.1.mlp.up_proj").int8 = false;
    let smoothed = find(&mut choices, LINEAR);
    smoothed.exponent = 0.3;
    smoothed.factors = Some((0..CHANNELS).map(|i| 0.1 + i as f32 / 7.0).collect());
    model.compute_as(&choices).unwrap();
    assert_eq!(in_int8(&model).len(), LINEARS - 1);

    calibration::write(&path, &choices).unwrap();
    let read = calibration::read(&path).unwrap();
    assert_eq!(read, choices);
    let (mut again, _) = adapted(CASE);
    again.compute_as(&read).unwrap();
    assert_eq!(in_int8(&again), in_int8(&model));
    assert_same(&again, &model, &params, &pass);

    // As a run in f32 writes it.
    calibration::write(&path, &[]).unwrap();
    assert!(calibration::read(&path).unwrap().is_empty());
}

#[test]
fn choices_that_cannot_be_written_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let text = calibration::write(&dir.path().join("absent/calibration.safetensors"), &[]).unwrap_err().to_string();
    assert!(text.starts_with("cannot write ") && text.contains("calibration.safetensors"), "{text}");
    assert!(!text.contains("restore it"), "there is nothing to restore: {text}");
}

fn run_loss(model: &Model, params: &[f32], pass: &Pass) -> f64 {
    model.loss(params, pass, &mut Workspace::new(model, Keep::Nothing))
}

/// What the metadata says of a linear with factors.
fn said(linear: &str) -> Value {
    json!({ "name": linear, "int8": true, "outliers": [], "exponent": 0.5, "forward_error": 0.01, "backward_error": null })
}

/// A file with this text for its choices, and one tensor.
fn file(choices: &str, tensor: &str, dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(dtype, vec![values.len()], &bytes).unwrap();
    serialize([(tensor, view)], Some(HashMap::from([("choices".to_owned(), choices.to_owned())]))).unwrap()
}

#[test]
fn a_damaged_file_of_choices_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("calibration.safetensors");
    let refuses = |bytes: &[u8], words: &[&str]| {
        fs::write(&path, bytes).unwrap();
        let text = calibration::read(&path).unwrap_err().to_string();
        for word in ["calibration.safetensors is damaged", "restore it"].iter().chain(words) {
            assert!(text.contains(word), "`{word}` is not in: {text}");
        }
    };
    let text = json!([said(LINEAR)]).to_string();
    let ones = [1.0; CHANNELS];
    let whole = file(&text, LINEAR, Dtype::F32, &ones);
    fs::write(&path, &whole).unwrap();
    assert_eq!(calibration::read(&path).unwrap()[0].factors.as_deref(), Some(&ones[..]));

    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        refuses(&whole[..length], &[]);
    }
    refuses(&fs::read(goldens().join("llama_tied/model.safetensors")).unwrap(), &["it has no choices"]);
    refuses(&file("[{", LINEAR, Dtype::F32, &ones), &[]);
    refuses(&file(&text.replace("exponent", "power"), LINEAR, Dtype::F32, &ones), &["power"]);
    refuses(&file(&text, "model.layers.0.self_attn.q_proj", Dtype::F32, &ones), &[LINEAR, "not found"]);
    let mut without = said(LINEAR);
    without["exponent"] = json!(0.0);
    refuses(&file(&json!([without]).to_string(), LINEAR, Dtype::F32, &ones), &["factors of 1 linears, and 0"]);
    for factor in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let mut factors = ones;
        factors[CHANNELS - 1] = factor;
        refuses(&file(&text, LINEAR, Dtype::F32, &factors), &[LINEAR, "not positive numbers"]);
    }
    refuses(&file(&text, LINEAR, Dtype::I32, &ones), &[LINEAR, "in f32"]);

    fs::remove_file(&path).unwrap();
    let text = calibration::read(&path).unwrap_err().to_string();
    assert!(text.contains("cannot read") && text.contains("calibration.safetensors"), "{text}");
}

#[test]
fn choices_of_another_model_are_refused() {
    let (mut model, params) = adapted(CASE);
    let whole = model.calibrate(&params, &golden_pass(CASE), true, f64::INFINITY).unwrap();
    let mut refuses = |change: &dyn Fn(&mut Vec<Choice>), words: &str| {
        let mut choices = whole.clone();
        change(&mut choices);
        let text = model.compute_as(&choices).unwrap_err().to_string();
        assert!(text.contains(words) && text.contains("restore it"), "`{words}` is not in: {text}");
    };
    for factors in [0, CHANNELS - 1, CHANNELS + 1] {
        let words = format!("{LINEAR} has another number of channels");
        refuses(&|choices| find(choices, LINEAR).factors = Some(vec![1.0; factors]), &words);
    }
    refuses(&|choices| find(choices, LINEAR).outliers = vec![CHANNELS as u32], "another number of channels");
    refuses(&|choices| find(choices, LINEAR).outliers = vec![5, 5], &format!("outliers of {LINEAR} do not ascend"));
    refuses(&|choices| choices.retain(|choice| choice.name != LINEAR), &format!("says nothing of {LINEAR}"));
    refuses(&Vec::clear, "says nothing of");
    let stranger = |choices: &mut Vec<Choice>| {
        let copy = find(choices, LINEAR).clone();
        choices.push(Choice { name: "model.layers.9.self_attn.o_proj".to_owned(), ..copy });
    };
    refuses(&stranger, "1 of its linears are not in the model");
}
