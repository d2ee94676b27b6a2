//! Training stops at a number that is none, says where it came from, and leaves the parameters as they were.

use std::ops::Range;

use retune_adapter::{AdapterFile, names};
use retune_engine::Saving;
use retune_engine::compute::Compute;
use retune_engine::overlay::{LowRank, Overlay};
use retune_engine::pass::Pass;
use retune_engine::workspace::Workspace;
use retune_testing::{Case, bits, checkpoint, goldens};
use retune_train::Error;
use retune_train::data::Example;
use retune_train::run_config::RunConfig;
use retune_train::trainer::{Passes, Trained, Trainer, fill_pass, held_out_loss};
use serde_json::json;

const HIDDEN_SIZE: usize = 32;
/// What every text advises: a checkpoint is taken up with the rate that led there alone.
const ANEW: &str = "start anew with a lower training.learning_rate (--overwrite)";
/// A token of the last row alone.
const RARE: u32 = 90;

/// Rows 40 to 45, of which a step takes three.
fn examples() -> Vec<Example> {
    let mut examples = Vec::new();
    for row in 40..46 {
        let ids = (0..5).map(|i| ((7 * row + 11 * i) % 80) as u32).collect();
        examples.push(Example { row, source: vec![], ids, trained: vec![false, true, true, true, true] });
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
const ADAPTED: &str = "lora_all_linear";
const WHOLE: &str = "llama_untied_mha";

/// Where a tensor lies in the flat vector.
fn range(overlay: &Overlay, tensor: &str) -> Range<usize> {
    overlay.layout.find(tensor).unwrap_or_else(|| panic!("{tensor} is not trained")).range.clone()
}

/// The place of a tensor's element in the flat vector.
fn place(overlay: &Overlay, tensor: &str, element: usize) -> usize {
    range(overlay, tensor).start + element
}

/// A run over all examples that has not begun.
fn trainer<'a>(case: &'a Case, compute: &'a Compute, config: &'a RunConfig, examples: &'a [Example]) -> Trainer<'a> {
    let trained = Trained { model: &case.model, overlay: &case.overlay, compute };
    let passes = Passes::resolve(&config.training, &case.model, &case.overlay, false, 60);
    Trainer::new(trained, &config.training, passes, false, examples, &[], case.params.clone())
}

/// Asserts that the second step, before which an element was damaged, ends with an error that names `layer` and `row`.
fn check(case: &Case, tensor: &str, element: usize, value: f32, layer: &str, row: u64) {
    for checkpointing in ["none", "layer"] {
        let (config, compute, examples) = (config(checkpointing), Compute::default(), examples());
        let mut trainer = trainer(case, &compute, &config, &examples);
        trainer.step().unwrap();
        trainer.params[place(&case.overlay, tensor, element)] = value;
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
    let case = Case::load(ADAPTED);
    let b_of_first = names::lora_b("model.layers.0.mlp.down_proj");
    check(&case, &b_of_first, 0, f32::INFINITY, "layer 0", 43);
    let b_of_second = names::lora_b("model.layers.1.self_attn.q_proj");
    check(&case, &b_of_second, 0, f32::NAN, "layer 1", 43);
    let a_of_second = names::lora_a("model.layers.1.mlp.gate_proj");
    check(&case, &a_of_second, 0, f32::NEG_INFINITY, "layer 1", 43);
}

#[test]
fn a_loss_that_is_not_finite_is_traced_to_the_layer_of_the_model() {
    let case = Case::load(WHOLE);
    check(&case, "model.layers.0.input_layernorm.weight", 0, f32::NAN, "layer 0", 43);
    check(&case, "model.layers.1.mlp.down_proj.weight", 0, f32::INFINITY, "layer 1", 43);
    check(&case, "model.norm.weight", 0, f32::NAN, "the output head", 43);
    check(&case, "lm_head.weight", 0, f32::NAN, "the output head", 43);
}

#[test]
fn a_loss_that_is_not_finite_is_traced_to_the_row_that_has_the_token() {
    let case = Case::load(WHOLE);
    let element = RARE as usize * HIDDEN_SIZE;
    check(&case, "model.embed_tokens.weight", element, f32::NAN, "the token embedding", 45);
}

#[test]
fn a_held_out_loss_that_is_not_finite_is_traced_to_its_row() {
    let mut case = Case::load(WHOLE);
    let element = place(&case.overlay, "model.embed_tokens.weight", RARE as usize * HIDDEN_SIZE);
    case.params[element] = f32::NAN;
    let (compute, mut workspace) = (Compute::default(), Workspace::new(&case.model, Saving::None));
    let scored = Trained { model: &case.model, overlay: &case.overlay, compute: &compute };
    let error = held_out_loss(scored, &case.params, &examples(), 64, &mut Pass::default(), &mut workspace, |_| true);
    let error = error.unwrap_err();
    assert!(matches!(error, Error::NonFiniteEvaluation { row: 45 }), "{error}");
    let text = error.to_string();
    assert!(text.contains("row 46 ") && text.contains(ANEW), "{text}");
}

/// Asserts that the first step ends with an error that names the gradient of `tensor`.
fn check_gradient(case: &Case, tensor: &str) {
    let (config, compute, examples) = (config("none"), Compute::default(), examples());
    let mut trainer = trainer(case, &compute, &config, &examples);
    let error = trainer.step().unwrap_err();
    let text = error.to_string();
    let Error::NonFiniteGradient { step: 1, tensor: found } = error else { panic!("{text}") };
    assert_eq!(found, tensor);
    assert!(text.contains("step 1") && text.contains(tensor) && text.contains(ANEW), "{text}");
    assert!(bits(&trainer.params) == bits(&case.params), "the step changed parameters");
    assert_eq!(trainer.progress.step, 0);
}

/// The low-rank term on a linear.
fn term<'a>(case: &'a mut Case, module: &str) -> &'a mut LowRank {
    let number = case.model.linears().iter().position(|linear| linear.name == module).unwrap();
    case.overlay.linears[number].low_rank.first_mut().unwrap()
}

#[test]
fn a_gradient_that_is_not_finite_is_traced_to_its_tensor() {
    let module = "model.layers.1.self_attn.v_proj";
    let adapter = AdapterFile::read(&goldens().join(ADAPTED).join("adapter")).unwrap();
    let mut case = Case::with_method(ADAPTED, checkpoint("llama_tied"), &*adapter.method);
    // While B is zero the scaling is of no effect on the loss; the gradient of B is a multiple of it.
    term(&mut case, module).scale = f32::MAX;
    let a = range(&case.overlay, &names::lora_a(module));
    case.params[a].iter_mut().for_each(|value| *value *= 1e3);

    check_gradient(&case, &names::lora_b(module));
}

#[test]
fn a_gradient_that_spoils_those_below_it_is_traced_to_where_it_arose() {
    let module = "model.layers.1.self_attn.v_proj";
    let mut case = Case::load(ADAPTED);
    term(&mut case, module).scale = 1e20;
    // Large gradients of a loss that is finite.
    case.change_base("model.norm.weight", |norm| norm.fill(1e10));
    let (a, b) = (names::lora_a(module), names::lora_b(module));
    let [of_a, of_b] = [&a, &b].map(|name| range(&case.overlay, name));
    // While A is zero this module is of no effect on the loss; what its scaled B makes of the gradient overflows, and goes on downwards.
    case.params[of_a].fill(0.0);
    case.params[of_b].fill(1e17);

    let mut pass = Pass::default();
    fill_pass(&mut pass, &examples(), &[0, 1, 2], 0, 64);
    let (losses, grads) = case.gradient(&Compute::default(), Saving::Full, &[pass]);
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    let spoilt = |name: &str| grads[range(&case.overlay, name)].iter().any(|value| !value.is_finite());
    assert!(spoilt(&names::lora_a("model.layers.0.self_attn.q_proj")), "the layer below is as it was");
    assert!(!spoilt(&names::lora_a("model.layers.1.self_attn.o_proj")), "the module above is not finite either");

    check_gradient(&case, &a);
}
