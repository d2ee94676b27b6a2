//! A pass of several rows computes what its rows compute alone: none sees another, none counts more or less for its place, and what rows
//! begin with in common counts for each of them where it is computed once.

use std::path::{Path, PathBuf};

use retune_adapter::{AdapterFile, InitLoraWeights};
use retune_model::adapter::AdapterPlan;
use retune_model::checkpoint::Checkpoint;
use retune_model::model::{Model, Trainable};
use retune_model::pass::Pass;
use retune_model::workspace::{Keep, Workspace};

/// From one token to more than a block of attention's queries.
const LENGTHS: [usize; 5] = [1, 17, 3, 70, 8];
/// Sums of f32 in another order.
const TOLERANCE: f64 = 1e-5;
/// What bfloat16 makes of the gradients of these models, some of which move by a tenth: something in the wrong place moves them by several times.
const ROUNDING: f64 = 0.2;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// Ids and targets of the rows.
fn rows(vocab_size: usize) -> Vec<(Vec<u32>, Vec<bool>)> {
    let mut state = 7u64;
    let mut below = |end: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % end
    };
    let mut rows = Vec::new();
    for length in LENGTHS {
        let ids: Vec<u32> = (0..length).map(|_| below(vocab_size) as u32).collect();
        let trained: Vec<bool> = (0..length).map(|_| below(4) > 0).collect();
        rows.push((ids, trained));
    }
    // Rows that begin like others: with less than a block of attention's queries in common and with more, like one that does so itself, and
    // one that is the same to its end.
    for (row, shared, length) in [(1, 10, 30), (3, 66, 75), (5, 25, 26), (3, 66, 140), (6, 75, 75)] {
        let mut ids: Vec<u32> = rows[row].0[..shared].to_vec();
        ids.extend((shared..length).map(|_| below(vocab_size) as u32));
        let trained: Vec<bool> = (0..length).map(|_| below(4) > 0).collect();
        rows.push((ids, trained));
    }
    rows
}

/// ‖a − b‖ / ‖b‖
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    let norm: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    (difference / norm).sqrt()
}

/// The loss and the gradient of all passes together.
fn run(model: &Model, params: &[f32], keep: Keep, passes: &[Pass]) -> (f64, Vec<f32>) {
    let mut workspace = Workspace::new(model, keep);
    let mut grads = vec![0.0; params.len()];
    let mut loss = 0.0;
    for pass in passes {
        loss += model.loss_and_gradient(params, &mut grads, pass, None, &mut workspace);
    }
    (loss, grads)
}

fn check(name: &str, model: &Model, params: &[f32]) {
    let (mut packed, mut shared, mut alone) = (Pass::default(), Pass::sharing_prefixes(true), Vec::new());
    for (row, (ids, trained)) in rows(model.config.vocab_size).iter().enumerate() {
        packed.push(row as u64, ids, trained);
        shared.push(row as u64, ids, trained);
        let mut pass = Pass::default();
        pass.push(row as u64, ids, trained);
        alone.push(pass);
    }
    assert_eq!((packed.is_shared(), packed.tokens() - shared.tokens()), (false, 10 + 66 + 25 + 66 + 74));
    let (_, exact) = run(model, params, Keep::Activations, &alone);
    for keep in [Keep::Activations, Keep::RoundedActivations, Keep::Inputs] {
        let (expected_loss, expected) = run(model, params, keep, &alone);
        let error = relative(&expected, &exact);
        assert!(error < ROUNDING, "{name} ({keep:?}): the gradient is {error} from that of what is kept in f32");
        for param in model.layout.params() {
            let error = relative(&expected[param.range.clone()], &exact[param.range.clone()]);
            assert!(error < 2.0 * ROUNDING, "{name} ({keep:?}): gradient of {} {error} from it", param.name);
        }
        for (pass, tolerance) in [(&packed, TOLERANCE), (&shared, tolerance_shared(keep))] {
            let what = format!("{name} ({keep:?}, shared {})", pass.is_shared());
            let (loss, grads) = run(model, params, keep, std::slice::from_ref(pass));
            assert!((loss - expected_loss).abs() < TOLERANCE * expected_loss, "{what}: {loss} and {expected_loss}");
            for param in model.layout.params() {
                let (ours, theirs) = (&grads[param.range.clone()], &expected[param.range.clone()]);
                assert!(theirs.iter().any(|g| *g != 0.0), "{what}: {} has no gradient", param.name);
                let error = relative(ours, theirs);
                assert!(error < tolerance, "{what}: gradient of {} {error}", param.name);
            }
        }
    }
}

/// What blocks of queries begin elsewhere give is rounded to bfloat16 elsewhere too.
fn tolerance_shared(keep: Keep) -> f64 {
    if keep == Keep::RoundedActivations { 100.0 * TOLERANCE } else { TOLERANCE }
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_grouped_heads_and_a_window() {
    let checkpoint = Checkpoint::open(&goldens().join("mistral_window")).unwrap();
    assert!(checkpoint.config.sliding_window.is_some());
    assert!(checkpoint.config.num_key_value_heads < checkpoint.config.num_attention_heads);
    let model = Model::load(&checkpoint, Trainable::Everything).unwrap();
    let params = model.initial_params(&checkpoint, &InitLoraWeights::Kaiming, 0).unwrap();
    check("mistral_window", &model, &params);
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_adapters_on_all_linears() {
    for (case, base) in [("lora_all_linear", "llama_tied"), ("lora_rs", "llama_gqa_head_dim")] {
        let checkpoint = Checkpoint::open(&goldens().join(base)).unwrap();
        let adapter = AdapterFile::read(&goldens().join(case).join("adapter")).unwrap();
        let plan = AdapterPlan::new(&adapter.config, &checkpoint).unwrap();
        let model = Model::load(&checkpoint, Trainable::Adapter(&plan)).unwrap();
        // Trained values: with B at its first zeros A would have no gradient.
        let params = model.params_from(&adapter.tensors).unwrap();
        check(case, &model, &params);
    }
}
