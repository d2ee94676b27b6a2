//! Training stops at a number that is none, says where it came from, and leaves the parameters as they were.

use std::ops::Range;
use std::path::{Path, PathBuf};

use retune_adapter::{AdapterFile, InitLoraWeights, names};
use retune_model::adapter::AdapterPlan;
use retune_model::checkpoint::Checkpoint;
use retune_model::model::{Model, Trainable};
use retune_model::params::Vector;
use retune_model::pass::Pass;
use retune_model::workspace::{Keep, Workspace};
use retune_train::Error;
use retune_train::data::Example;
use retune_train::run_config::RunConfig;
use retune_train::trainer::{Passes, Trainer, fill_pass, held_out_loss};
use serde_json::json;

const HIDDEN_SIZE: usize = 32;
/// What every text advises: a checkpoint is taken up with the rate that led there alone.
const ANEW: &str = "start anew with a lower training.learning_rate (--overwrite)";
/// A token of the last row alone.
const RARE: u32 = 90;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../retune-model/tests/goldens")
}

/// Rows 40 to 45, of which a step takes three.
fn examples() -> Vec<Example> {
    let mut examples = Vec::new();
    for row in 40..46 {
        let ids = (0..5).map(|i| ((7 * row + 11 * i) % 80) as u32).collect();
        examples.push(Example { row, ids, trained: vec![false, true, true, true, true] });
    }
    examples[5].ids[1] = RARE;
    examples
}

fn config(checkpointing: &str) -> RunConfig {
    let run = json!({
        "model": "base",
        "output_dir": "out",
        "data": { "train": "train.jsonl", "max_length": 64 },
        "training": { "batch_size": 3, "activation_checkpointing": checkpointing },
    });
    RunConfig::parse(&run.to_string(), "the run", &[]).unwrap()
}

/// A model with trained adapters on all linears, and one that is trained whole, both of two layers.
fn adapted() -> (Model, Vec<f32>) {
    let checkpoint = Checkpoint::open(&goldens().join("llama_tied")).unwrap();
    let adapter = AdapterFile::read(&goldens().join("lora_all_linear/adapter")).unwrap();
    let plan = AdapterPlan::new(&adapter.config, &checkpoint).unwrap();
    let model = Model::load(&checkpoint, Trainable::Adapter(&plan)).unwrap();
    let params = model.params_from(&adapter.tensors).unwrap();
    (model, params)
}

fn whole() -> (Model, Vec<f32>) {
    let checkpoint = Checkpoint::open(&goldens().join("llama_untied_mha")).unwrap();
    let model = Model::load(&checkpoint, Trainable::Everything).unwrap();
    let params = model.initial_params(&checkpoint, &InitLoraWeights::Kaiming, 0).unwrap();
    (model, params)
}

/// Where a tensor lies in the flat vector.
fn range(model: &Model, tensor: &str) -> Range<usize> {
    let param = model.layout.params().iter().find(|param| param.name == tensor);
    param.unwrap_or_else(|| panic!("{tensor} is not trained")).range.clone()
}

/// The place of a tensor's element in the flat vector.
fn place(model: &Model, tensor: &str, element: usize) -> usize {
    range(model, tensor).start + element
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Asserts that the second step, before which an element was damaged, ends with an error that names `layer` and `row`.
fn check(model: &Model, params: &[f32], tensor: &str, element: usize, value: f32, layer: &str, row: u64) {
    for checkpointing in ["none", "layer"] {
        let (config, examples) = (config(checkpointing), examples());
        let mut trainer = Trainer::new(
            model,
            &config.training,
            Passes::resolve(&config.training, model, false, 60),
            false,
            &examples,
            &[],
            params.to_vec(),
        );
        trainer.step().unwrap();
        trainer.params[place(model, tensor, element)] = value;
        let before = bits(&trainer.params);
        let error = trainer.step().unwrap_err();
        let text = error.to_string();
        let Error::NonFiniteLoss { step: 2, row: found_row, layer: found_layer } = error else {
            panic!("{tensor}: {text}");
        };
        assert_eq!((found_row, found_layer.as_str()), (row, layer), "{tensor}: {text}");
        // As `retune data` counts rows.
        let number = row + 1;
        for word in ["step 2", &format!("row {number} "), layer, ANEW, &format!("--rows {number}`")] {
            assert!(text.contains(word), "{tensor}: `{word}` is not in: {text}");
        }
        assert!(bits(&trainer.params) == before, "{tensor}: the step changed parameters");
        assert_eq!(trainer.progress.step, 1, "{tensor}");
    }
}

#[test]
fn a_loss_that_is_not_finite_is_traced_to_the_layer_of_the_adapter() {
    let (model, params) = adapted();
    let b_of_first = names::lora_b("model.layers.0.mlp.down_proj");
    check(&model, &params, &b_of_first, 0, f32::INFINITY, "layer 0", 43);
    let b_of_second = names::lora_b("model.layers.1.self_attn.q_proj");
    check(&model, &params, &b_of_second, 0, f32::NAN, "layer 1", 43);
    let a_of_second = names::lora_a("model.layers.1.mlp.gate_proj");
    check(&model, &params, &a_of_second, 0, f32::NEG_INFINITY, "layer 1", 43);
}

#[test]
fn a_loss_that_is_not_finite_is_traced_to_the_layer_of_the_model() {
    let (model, params) = whole();
    check(&model, &params, "model.layers.0.input_layernorm.weight", 0, f32::NAN, "layer 0", 43);
    check(&model, &params, "model.layers.1.mlp.down_proj.weight", 0, f32::INFINITY, "layer 1", 43);
    check(&model, &params, "model.norm.weight", 0, f32::NAN, "the output head", 43);
    check(&model, &params, "lm_head.weight", 0, f32::NAN, "the output head", 43);
}

#[test]
fn a_loss_that_is_not_finite_is_traced_to_the_row_that_has_the_token() {
    let (model, params) = whole();
    let element = RARE as usize * HIDDEN_SIZE;
    check(&model, &params, "model.embed_tokens.weight", element, f32::NAN, "the token embedding", 45);
}

#[test]
fn a_held_out_loss_that_is_not_finite_is_traced_to_its_row() {
    let (model, mut params) = whole();
    params[place(&model, "model.embed_tokens.weight", RARE as usize * HIDDEN_SIZE)] = f32::NAN;
    let mut workspace = Workspace::new(&model, Keep::Nothing);
    let error =
        held_out_loss(&model, &params, &examples(), 64, &mut Pass::default(), &mut workspace, |_| {}).unwrap_err();
    assert!(matches!(error, Error::NonFiniteEvaluation { row: 45 }), "{error}");
    let text = error.to_string();
    assert!(text.contains("row 46 ") && text.contains(ANEW), "{text}");
}

/// Asserts that the first step ends with an error that names the gradient of `tensor`.
fn check_gradient(model: &Model, params: &[f32], tensor: &str) {
    let (config, examples) = (config("none"), examples());
    let mut trainer = Trainer::new(
        model,
        &config.training,
        Passes::resolve(&config.training, model, false, 60),
        false,
        &examples,
        &[],
        params.to_vec(),
    );
    let error = trainer.step().unwrap_err();
    let text = error.to_string();
    let Error::NonFiniteGradient { step: 1, tensor: found } = error else { panic!("{text}") };
    assert_eq!(found, tensor);
    assert!(text.contains("step 1") && text.contains(tensor) && text.contains(ANEW), "{text}");
    assert!(bits(&trainer.params) == bits(params), "the step changed parameters");
    assert_eq!(trainer.progress.step, 0);
}

#[test]
fn a_gradient_that_is_not_finite_is_traced_to_its_tensor() {
    let module = "model.layers.1.self_attn.v_proj";
    let checkpoint = Checkpoint::open(&goldens().join("llama_tied")).unwrap();
    let adapter = AdapterFile::read(&goldens().join("lora_all_linear/adapter")).unwrap();
    let mut plan = AdapterPlan::new(&adapter.config, &checkpoint).unwrap();
    // While B is zero the scaling is of no effect on the loss; the gradient of B is a multiple of it.
    plan.targets.iter_mut().find(|target| target.module == module).unwrap().scaling = f32::MAX;
    let model = Model::load(&checkpoint, Trainable::Adapter(&plan)).unwrap();
    let mut params = model.initial_params(&checkpoint, &InitLoraWeights::Kaiming, 0).unwrap();
    params[range(&model, &names::lora_a(module))].iter_mut().for_each(|value| *value *= 1e3);

    check_gradient(&model, &params, &names::lora_b(module));
}

#[test]
fn a_gradient_that_spoils_those_below_it_is_traced_to_where_it_arose() {
    let module = "model.layers.1.self_attn.v_proj";
    let checkpoint = Checkpoint::open(&goldens().join("llama_tied")).unwrap();
    let adapter = AdapterFile::read(&goldens().join("lora_all_linear/adapter")).unwrap();
    let mut plan = AdapterPlan::new(&adapter.config, &checkpoint).unwrap();
    plan.targets.iter_mut().find(|target| target.module == module).unwrap().scaling = 1e20;
    let mut model = Model::load(&checkpoint, Trainable::Adapter(&plan)).unwrap();
    // Large gradients of a loss that is finite.
    model.norm = Vector::Frozen(vec![1e10; HIDDEN_SIZE]);
    let mut params = model.params_from(&adapter.tensors).unwrap();
    // While A is zero this module is of no effect on the loss; what its scaled B makes of the gradient overflows, and goes on downwards.
    params[range(&model, &names::lora_a(module))].fill(0.0);
    params[range(&model, &names::lora_b(module))].fill(1e17);

    let (mut pass, mut grads) = (Pass::default(), vec![0.0; params.len()]);
    fill_pass(&mut pass, &examples(), &[0, 1, 2], 0, 64);
    let mut workspace = Workspace::new(&model, Keep::Activations);
    let loss = model.loss_and_gradient(&params, &mut grads, &pass, None, &mut workspace);
    assert!(loss.is_finite(), "{loss}");
    let spoilt = |name: &str| grads[range(&model, name)].iter().any(|value| !value.is_finite());
    assert!(spoilt(&names::lora_a("model.layers.0.self_attn.q_proj")), "the layer below is as it was");
    assert!(!spoilt(&names::lora_a("model.layers.1.self_attn.o_proj")), "the module above is not finite either");

    check_gradient(&model, &params, &names::lora_a(module));
}
