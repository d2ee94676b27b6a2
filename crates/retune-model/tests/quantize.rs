//! Quantizing a checkpoint's linears: held in memory, in a file of their own, and in a checkpoint that is read back.

use std::collections::BTreeMap;

use retune_formats::bitsandbytes::QuantizedWeight;
use retune_model::checkpoint::Checkpoint;
use retune_model::quantize;
use retune_quant::{Encoding, Matrix, encode};
use retune_testing::{bits, checkpoint, goldens};

const ENCODINGS: [Encoding; 4] = [Encoding::NF4, Encoding::NF4_DOUBLE, Encoding::FP4, Encoding::Int8];
const CASES: [&str; 6] = ["llama_tied", "qwen2_bf16", "gpt2", "gemma3_bf16", "flan_t5", "gguf_llama"];

fn values(weights: &BTreeMap<String, QuantizedWeight>) -> BTreeMap<&str, Vec<u32>> {
    weights.iter().map(|(name, weight)| (name.as_str(), bits(&weight.matrix.to_f32()))).collect()
}

/// What a matrix becomes as one sequence of values.
fn expected(matrix: &Matrix, encoding: Encoding) -> Option<Vec<u32>> {
    let Encoding::FourBit { quant_type, double: false } = encoding else { return None };
    let values = matrix.to_f32();
    let (mut indices, mut absmax) = (vec![0; values.len().div_ceil(2)], vec![0.0; values.len().div_ceil(64)]);
    encode::four_bit(quant_type, &values, &mut indices, &mut absmax);
    let code = quant_type.code();
    let value = |i: usize| code[usize::from(indices[i / 2] >> (4 * ((i + 1) % 2)) & 15)] * absmax[i / 64];
    Some((0..values.len()).map(|i| value(i).to_bits()).collect())
}

#[test]
fn a_file_of_quantized_weights_holds_what_is_quantized_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    for case in CASES {
        let checkpoint = checkpoint(case);
        for encoding in ENCODINGS {
            let held = quantize::in_memory(&checkpoint, encoding, &mut |_, _| {}).unwrap();
            let path = dir.path().join(format!("{case}-{encoding}"));
            let mut told = Vec::new();
            quantize::write_file(&checkpoint, encoding, &path, &mut |done, total| told.push((done, total))).unwrap();
            let kept = quantize::read_file(&checkpoint, encoding, &path).unwrap();
            assert_eq!(values(&held), values(&kept), "{case}, {encoding}");
            assert!(
                told.iter().all(|(done, total)| done <= total)
                    && told.last().is_some_and(|(done, total)| done == total)
            );
            for (name, weight) in &held {
                let stored = checkpoint.tensor(name).unwrap();
                if let Some(expected) = expected(&stored, encoding) {
                    assert_eq!(bits(&weight.matrix.to_f32()), expected, "{case}, {encoding}: {name}");
                }
                let (values, exact) = (weight.matrix.to_f32(), stored.to_f32());
                let largest = exact.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                let away = values.iter().zip(&exact).fold(0.0f32, |away, (a, b)| away.max((a - b).abs()));
                assert!(away < 0.25 * largest, "{case}, {encoding}: {name} is off by {away} of {largest}");
            }
            let spec = &checkpoint.spec;
            let is_left = |name: &str| name == spec.head.linear.name || (spec.family == "t5" && name.ends_with(".wo"));
            let linears: Vec<String> = spec
                .linears()
                .filter(|linear| !is_left(&linear.name))
                .map(|linear| format!("{}.weight", linear.name))
                .collect();
            assert!(linears.iter().all(|name| held.contains_key(name)) && linears.len() == held.len(), "{case}");
        }
    }
}

#[test]
fn what_is_held_quantized_is_what_the_model_computes_with_and_the_hash_stays() {
    let mut checkpoint = checkpoint("llama_tied");
    let (hash, bytes) = (checkpoint.content_hash(), checkpoint.held_bytes());
    let weights = quantize::in_memory(&checkpoint, Encoding::NF4_DOUBLE, &mut |_, _| {}).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let expected = weights[name].matrix.to_f32();
    checkpoint.replace(weights).unwrap();
    assert_eq!(checkpoint.tensor(name).unwrap().to_f32(), expected);
    assert_eq!(checkpoint.content_hash(), hash);
    assert!(checkpoint.held_bytes() < bytes / 2);
    let text = quantize::weights(&checkpoint).unwrap_err().to_string();
    assert!(text.contains("is stored as NF4 already"), "{text}");
}

#[test]
fn a_file_that_holds_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint("llama_tied");
    let path = dir.path().join("weights");
    quantize::write_file(&checkpoint, Encoding::NF4, &path, &mut |_, _| {}).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let refusal =
        |encoding| quantize::read_file(&checkpoint, encoding, &path).err().expect("must be refused").to_string();
    assert!(refusal(Encoding::FP4).contains("expected FP4"));
    assert!(quantize::read_file(&retune_testing::checkpoint("llama_untied_mha"), Encoding::NF4, &path).is_err());
    for length in (0..whole.len()).step_by(97) {
        std::fs::write(&path, &whole[..length]).unwrap();
        refusal(Encoding::NF4);
    }
    std::fs::remove_file(&path).unwrap();
    assert!(refusal(Encoding::NF4).contains("weights"));
}

#[test]
fn a_base_that_is_quantized_is_not_quantized_again() {
    let checkpoint = Checkpoint::open(&goldens().join("bnb_int8")).unwrap();
    let error = quantize::in_memory(&checkpoint, Encoding::NF4, &mut |_, _| {}).err().unwrap();
    assert!(error.to_string().contains("is stored as INT8 already"), "{error}");
}
