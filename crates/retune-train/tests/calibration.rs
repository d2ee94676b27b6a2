//! The record of how a run's linears are computed: written, read, and refused where it is damaged or of another model.

use std::collections::HashMap;
use std::fs;

use retune_engine::Saving;
use retune_engine::calibrate::{Choice, Integers};
use retune_engine::compute::Compute;
use retune_testing::{Case, bits, goldens};
use retune_train::{Error, calibration};
use safetensors::serialize;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// A model with adapters on all linears: seven in each of two layers, and its head, can be computed in 8 bits.
const CASE: &str = "lora_all_linear";
const LINEARS: usize = 15;
/// One of its linears.
const LINEAR: &str = "model.layers.0.self_attn.o_proj";
/// Channels of that linear's input.
const CHANNELS: usize = 32;

fn find<'a>(choices: &'a mut [Choice], linear: &str) -> &'a mut Choice {
    choices.iter_mut().find(|choice| choice.name == linear).unwrap_or_else(|| panic!("nothing is said of {linear}"))
}

#[test]
fn choices_that_were_written_and_read_compute_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("calibration.safetensors");
    let case = Case::load(CASE);
    let pass = case.golden_pass();
    let (measured, mut choices) =
        Compute::calibrate(&case.model, &case.overlay, &case.params, &pass, true, f64::INFINITY, Integers::Kept);
    let compute =
        |choices: &[Choice]| Compute::from_choices(&case.model, &case.overlay, choices, Integers::Kept).unwrap();
    // Whatever the measurement chose: one linear in f32, one with factors, and two with channels in f32, which changes what they compute.
    let before = case.loss(&measured, &pass);
    assert_eq!(case.loss(&compute(&choices), &pass).to_bits(), before.to_bits());
    for name in ["model.layers.0.mlp.down_proj", LINEAR] {
        find(&mut choices, name).outliers = vec![1, 5, 30];
    }
    assert_ne!(case.loss(&compute(&choices), &pass).to_bits(), before.to_bits());
    find(&mut choices, "model.layers.1.mlp.up_proj").int8 = false;
    let smoothed = find(&mut choices, LINEAR);
    smoothed.exponent = 0.3;
    smoothed.factors = Some((0..CHANNELS).map(|i| 0.1 + i as f32 / 7.0).collect());
    let ours = compute(&choices);
    assert_eq!(case.in_int8(&ours).len(), LINEARS - 1);

    calibration::write(&path, &choices).unwrap();
    let read = calibration::read(&path).unwrap();
    assert_eq!(read, choices);
    let again = compute(&read);
    assert_eq!(case.in_int8(&again), case.in_int8(&ours));
    let [a, b] = [&again, &ours].map(|compute| case.gradient(compute, Saving::Full, std::slice::from_ref(&pass)));
    assert_eq!(bits(&a.0), bits(&b.0), "losses");
    assert!(bits(&a.1) == bits(&b.1), "the gradients differ");

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
fn choices_of_another_model_say_what_to_do() {
    let case = Case::base("llama_tied");
    let error = Compute::from_choices(&case.model, &case.overlay, &[], Integers::Kept).err().expect("must be refused");
    let text = Error::from(error).to_string();
    assert!(text.contains("says nothing of model.layers.0") && text.contains("restore it"), "{text}");
}
