//! The model in 8 bits: close to what it is in f32, and the same for every packing and number of threads.

use rayon::ThreadPoolBuilder;
use retune_adapter::names;
use retune_engine::Saving;
use retune_engine::calibrate::{Choice, Integers};
use retune_engine::compute::Compute;
use retune_engine::pass::Pass;
use retune_kernels::isa::int8_isa;
use retune_testing::{Case, Lcg, bits, relative};

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

/// Random rows of `LENGTHS` tokens: all in one pass, and each in one of its own.
fn random_rows(vocab_size: usize) -> (Pass, Vec<Pass>) {
    let mut numbers = Lcg(7);
    let (mut packed, mut alone) = (Pass::default(), Vec::new());
    for (row, length) in LENGTHS.into_iter().enumerate() {
        let (ids, trained) = numbers.row(length, vocab_size);
        let mut pass = Pass::default();
        for pass in [&mut packed, &mut pass] {
            pass.push(row as u64, &ids, &trained);
        }
        alone.push(pass);
    }
    (packed, alone)
}

/// Measures a case on a pass, and computes in 8 bits what is within the limit.
fn calibrate(case: &Case, pass: &Pass, backward: bool, limit: f64) -> (Compute, Vec<Choice>) {
    Compute::calibrate(&case.model, &case.overlay, &case.params, pass, backward, limit, Integers::Kept)
}

fn find<'a>(choices: &'a mut [Choice], linear: &str) -> &'a mut Choice {
    choices.iter_mut().find(|choice| choice.name == linear).unwrap_or_else(|| panic!("nothing is said of {linear}"))
}

/// How much larger a step of the integers is here than that of 8 bits, for which bounds below are: products of 7 bits have half as many.
fn step() -> f64 {
    f64::from(127.0 / int8_isa().largest())
}

/// Asserts that two losses of a pass, and its logits, are close but not the same.
///
/// Rounding both operands of a product to 8 bits costs about 1% of its result: a row's largest value is some three times its typical one,
/// and half a step of 1/127 of that is at most 1.2%. The random weights of the goldens carry that on undamped through all layers.
fn check_closeness(case: &str, loss: f64, exact_loss: f64, logits: &[f32], exact_logits: &[f32]) {
    let error = relative(logits, exact_logits);
    assert!(error > 1e-3, "{case}: logits {error}: is it computed in int8 at all?");
    assert!(error < 0.06 * step(), "{case}: logits {error}");
    let error = (loss - exact_loss).abs() / exact_loss;
    assert!(error < 0.01 * step(), "{case}: loss {loss} instead of {exact_loss}");
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&loss| f64::from(loss)).sum()
}

#[test]
fn logits_and_loss_are_close_to_those_in_f32() {
    for name in [
        "llama_tied",
        "llama_bias",
        "mistral_window",
        "rope_llama3",
        "gguf_llama",
        "qwen2",
        "qwen3",
        "gemma3",
        "phi3",
        "gpt2",
        "bloom",
    ] {
        let case = Case::base(name);
        let pass = case.golden_pass();
        let exact = Compute::default();
        let (exact_loss, exact_logits) = (case.loss(&exact, &pass), case.logits(&exact, &pass));
        let (compute, choices) = calibrate(&case, &pass, false, ANY);
        assert_eq!(case.in_int8(&compute).len(), case.model.spec.linears().count(), "{name}");
        for Choice { name: linear, forward_error, backward_error, .. } in choices {
            assert!(forward_error > 0.0 && forward_error < 0.03 * step(), "{name}: output of {linear} {forward_error}");
            assert_eq!(backward_error, None, "{name}: {linear}");
        }
        let (loss, logits) = (case.loss(&compute, &pass), case.logits(&compute, &pass));
        println!("{name:16} logits {:.4}, loss {loss} of {exact_loss}", relative(&logits, &exact_logits));
        check_closeness(name, loss, exact_loss, &logits, &exact_logits);
    }
}

#[test]
fn gradients_are_close_to_those_in_f32() {
    // Of models whose gradients move by 2 to 6% already when their weights are rounded to 8 bits and nothing else. (Those of `lora_rs` and of
    // Gemma 3, with attention that is all but saturated, move by 10 and by 22%.)
    for name in [
        CASE,
        "lora_bias_all",
        "lora_save_head",
        "lora_save_embeddings",
        "qwen2_lora_all",
        "gemma2_lora_all",
        "phi3_lora_all",
        "gpt2_lora_all",
        "bloom_lora_all",
    ] {
        let case = Case::load(name);
        let pass = case.golden_pass();
        let run = |compute: &Compute, saving| case.gradient(compute, saving, std::slice::from_ref(&pass));
        let f32 = Compute::default();
        let (exact_losses, exact) = run(&f32, Saving::Full);
        let exact_logits = case.logits(&f32, &pass);

        let (compute, choices) = calibrate(&case, &pass, true, ANY);
        // A head that is trained stays in f32.
        let linears = case.model.spec.linears().count() - usize::from(name == "lora_save_head");
        assert_eq!((choices.len(), case.in_int8(&compute).len()), (linears, linears), "{name}");
        let lowest = &case.model.spec.decoder.blocks[0].sub_layers[0].inputs;
        for Choice { name: linear, int8, forward_error, backward_error, .. } in choices {
            assert!(int8 && forward_error < 0.03 * step(), "{name}: output of {linear} {forward_error}");
            let measured = backward_error.unwrap_or(0.0);
            assert!(measured < 0.08 * step(), "{name}: input gradient of {linear} {measured}");
            // Nothing below needs the input gradient of the first layer's attention, unless the embedding is trained.
            let first = lowest.iter().any(|of_lowest| of_lowest.name == linear);
            assert_eq!(backward_error.is_some(), !first || name == "lora_save_embeddings", "{name}: {linear}");
        }

        for saving in [Saving::Full, Saving::Bf16, Saving::BlockInputs] {
            let (losses, grads) = run(&compute, saving);
            let logits = case.logits(&compute, &pass);
            check_closeness(name, sum(&losses), sum(&exact_losses), &logits, &exact_logits);
            let error = relative(&grads, &exact);
            assert!(error > 1e-3 && error < 0.1 * step(), "{name} ({saving:?}): the whole gradient {error}");
            for param in case.overlay.layout.params() {
                let error = relative(&grads[param.range.clone()], &exact[param.range.clone()]);
                assert!(error < 0.2 * step(), "{name} ({saving:?}): gradient of {} {error}", param.name);
            }
        }
    }
}

#[test]
fn a_pass_of_several_rows_equals_its_rows() {
    for name in [CASE, "lora_rs", "gemma3_lora_all", "bloom_lora_all", "phi3_lora_all"] {
        let case = Case::load(name);
        let (packed, alone) = random_rows(case.model.spec.vocab_size);
        let (compute, _) = calibrate(&case, &packed, true, ANY);
        for saving in [Saving::Full, Saving::Bf16, Saving::BlockInputs] {
            let (losses, grads) = case.gradient(&compute, saving, std::slice::from_ref(&packed));
            let (expected_losses, expected) = case.gradient(&compute, saving, &alone);
            // Each row has scales of its own, and is computed in the same order. Were it not, the least difference would here and there
            // round to another integer, and the gradients below be far from equal.
            assert_eq!(bits(&losses), bits(&expected_losses), "{name} ({saving:?})");
            for param in case.overlay.layout.params() {
                let (ours, theirs) = (&grads[param.range.clone()], &expected[param.range.clone()]);
                assert!(theirs.iter().any(|g| *g != 0.0), "{name}: {} has no gradient", param.name);
                // Sums over tokens, of f32, in another order.
                let error = relative(ours, theirs);
                assert!(error < 1e-5, "{name} ({saving:?}): gradient of {} {error}", param.name);
            }
        }
    }
}

#[test]
fn one_thread_and_several_give_the_same_bytes() {
    let run = |threads: usize| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let case = Case::load(CASE);
            let (pass, _) = random_rows(case.model.spec.vocab_size);
            let (compute, choices) = calibrate(&case, &pass, true, ANY);
            let (losses, grads) = case.gradient(&compute, Saving::Full, &[pass]);
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
    let case = Case::load(CASE);
    let pass = case.golden_pass();
    let (compute, choices) = calibrate(&case, &pass, true, 0.0);
    assert_eq!(choices.len(), LINEARS);
    assert!(choices.iter().all(|choice| !choice.int8));
    assert!(case.in_int8(&compute).is_empty() && !compute.uses_int8());
    let [a, b] = [&compute, &Compute::default()]
        .map(|compute| case.gradient(compute, Saving::Full, std::slice::from_ref(&pass)));
    assert_eq!(bits(&a.0), bits(&b.0), "losses");
    assert!(bits(&a.1) == bits(&b.1), "the gradients differ");
}

#[test]
fn linears_whose_error_is_over_the_limit_stay_in_f32() {
    let case = Case::load(CASE);
    let pass = case.golden_pass();
    let error = |choice: &Choice| choice.forward_error.max(choice.backward_error.unwrap_or(0.0));
    let mut errors: Vec<f64> = calibrate(&case, &pass, true, ANY).1.iter().map(error).collect();
    errors.sort_by(f64::total_cmp);
    let limit = errors[LINEARS / 2];

    let (compute, choices) = calibrate(&case, &pass, true, limit);
    assert!(choices.iter().all(|choice| choice.int8 == (error(choice) <= limit)));
    let chosen: Vec<&str> = choices.iter().filter(|choice| choice.int8).map(|choice| choice.name.as_str()).collect();
    assert_eq!(case.in_int8(&compute), chosen);
    assert_eq!(chosen.len(), LINEARS / 2 + 1);
}

#[test]
fn a_channel_of_outliers_is_moved_into_the_weight() {
    const OUTLIER: usize = 7;
    let mut case = Case::load(CASE);
    case.change_base("model.layers.0.input_layernorm.weight", |norm| norm[OUTLIER] = 60.0);
    // A limit so low that nothing cheap is exact enough.
    let (_, mut choices) = calibrate(&case, &case.golden_pass(), true, 1e-3);
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
    let mut case = Case::load(CASE);
    let pass = case.golden_pass();
    let (compute, _) = calibrate(&case, &pass, true, ANY);
    assert!(case.loss(&compute, &pass).is_finite());
    let linears: Vec<String> = case.in_int8(&compute).into_iter().map(str::to_owned).collect();
    assert_eq!(linears.len(), LINEARS);
    for name in linears.iter().filter(|name| *name != "lm_head") {
        let place = case.overlay.layout.find(&names::lora_b(name)).unwrap().range.start;
        for value in [f32::NAN, f32::INFINITY] {
            // One channel of the linear's output: what reads it next is a product in 8 bits.
            let before = std::mem::replace(&mut case.params[place], value);
            let loss = case.loss(&compute, &pass);
            assert!(!loss.is_finite(), "{value} in {name}: the loss is {loss}");
            case.params[place] = before;
        }
    }
}

#[test]
fn choices_of_another_model_are_refused() {
    let case = Case::load(CASE);
    let (_, whole) = calibrate(&case, &case.golden_pass(), true, ANY);
    let refuses = |change: &dyn Fn(&mut Vec<Choice>), words: &str| {
        let mut choices = whole.clone();
        change(&mut choices);
        let text = Compute::from_choices(&case.model, &case.overlay, &choices, Integers::Kept)
            .err()
            .expect("must be refused")
            .to_string();
        assert!(text.contains(words), "`{words}` is not in: {text}");
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
