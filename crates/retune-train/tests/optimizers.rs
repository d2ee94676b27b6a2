//! The optimizers that keep less than AdamW, against bitsandbytes' and transformers' (goldens/make_optimizers.py).

use std::collections::BTreeMap;

use retune_engine::params::ParamLayout;
use retune_quant::dynamic::dynamic_map;
use retune_testing::{bits, relative};
use retune_train::optimizer::{Optimizer, OptimizerName, Options};
use safetensors::SafeTensors;

const STEPS: u64 = 100;
const OPTIONS: Options = Options { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };

fn goldens() -> BTreeMap<String, Vec<u8>> {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/optimizers.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, tensor)| (name, tensor.data().to_vec())).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// As the script's.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let number = |i: u64| {
        let bits = ((i + seed * 1_000_003) as u32).wrapping_mul(2_654_435_761);
        let bits = (bits ^ (bits >> 15)).wrapping_mul(2_246_822_519);
        let bits = bits ^ (bits >> 13);
        let scale = 10f64.powi(-(((i / 512) % 3) as i32));
        ((f64::from(bits) / 2f64.powi(32) - 0.5) * scale) as f32
    };
    (0..count as u64).map(number).collect()
}

fn trained(name: OptimizerName, layout: &ParamLayout) -> (Optimizer, Vec<f32>) {
    let mut optimizer = Optimizer::new(name, OPTIONS, layout);
    let mut params = numbers(0, layout.len());
    for step in 1..=STEPS {
        let mut gradients = numbers(step, layout.len());
        gradients.iter_mut().for_each(|g| *g *= 2.0);
        optimizer.step(layout, 0.01, 0.5, &mut gradients, &mut params);
        assert!(gradients.iter().all(|&g| g == 0.0));
    }
    (optimizer, params)
}

#[test]
fn codes_are_those_of_bitsandbytes() {
    let goldens = goldens();
    for (name, signed) in [("signed_map", true), ("unsigned_map", false)] {
        assert_eq!(bits(&dynamic_map(signed)), bits(&floats(&goldens[name])), "{name}");
    }
}

#[test]
fn a_hundred_steps_in_8_bits_are_those_of_the_plain_scheme_and_near_bitsandbytes() {
    let goldens = goldens();
    let mut layout = ParamLayout::default();
    layout.add("w".into(), vec![70, 100], None);
    let (optimizer, params) = trained(OptimizerName::Adamw8bit, &layout);
    let state: BTreeMap<_, _> = optimizer.state().into_iter().collect();
    let codes = |name: &str| match state[name] {
        retune_formats::safetensors::Values::U8(codes) => codes.to_vec(),
        _ => panic!("{name}"),
    };
    let found = [codes("first_moment.codes"), codes("second_moment.codes")].concat();
    let far = |of: &str| {
        let pairs = found.iter().zip(&goldens[&format!("{of}.codes")]);
        pairs.filter(|(a, b)| a.abs_diff(**b) > 1).count() as f64 / found.len() as f64
    };
    let error = |of: &str| relative(&params, &floats(&goldens[&format!("{of}.parameters")]));
    println!("plain: {:.2e}, codes further than one {:.4}", error("adamw_8bit"), far("adamw_8bit"));
    println!("bitsandbytes: {:.2e}, codes further than one {:.4}", error("bitsandbytes"), far("bitsandbytes"));
    assert!(far("adamw_8bit") == 0.0 && error("adamw_8bit") < 1e-4);
    assert!(error("bitsandbytes") < 0.02);
    // 2 bytes a parameter, and a magnitude of 4 for each 256.
    assert_eq!(OptimizerName::Adamw8bit.state_bytes(&layout), 2 * (7000 + 4 * 28));
    assert_eq!(OptimizerName::Adamw.state_bytes(&layout), 8 * 7000);
}

#[test]
fn small_tensors_keep_their_moments_whole() {
    let mut layout = ParamLayout::default();
    layout.add("w".into(), vec![63, 65], None);
    layout.add("bias".into(), vec![65], None);
    let [plain, coded] = [OptimizerName::Adamw, OptimizerName::Adamw8bit].map(|name| trained(name, &layout).1);
    assert_eq!(plain, coded);
}

#[test]
fn what_has_no_gradient_stays_where_it_is_in_8_bits() {
    let mut layout = ParamLayout::default();
    layout.add("w".into(), vec![80, 64], None);
    let options = Options { weight_decay: 0.0, ..OPTIONS };
    let mut optimizer = Optimizer::new(OptimizerName::Adamw8bit, options, &layout);
    let mut params = vec![1.0; layout.len()];
    for step in 1..=STEPS {
        let mut gradients = numbers(step, layout.len());
        gradients.iter_mut().step_by(2).for_each(|g| *g = 0.0);
        optimizer.step(&layout, 0.01, 1.0, &mut gradients, &mut params);
    }
    assert!(params.iter().step_by(2).all(|&p| p == 1.0));
    assert!(params.iter().skip(1).step_by(2).all(|&p| p != 1.0));
}

#[test]
fn adafactor_is_that_of_transformers() {
    let mut layout = ParamLayout::default();
    layout.add("w".into(), vec![48, 20], None);
    layout.add("b".into(), vec![10], None);
    let (_, params) = trained(OptimizerName::Adafactor, &layout);
    let error = relative(&params, &floats(&goldens()["adafactor.parameters"]));
    println!("{error:.2e}");
    assert!(error < 1e-5, "{error}");
    assert_eq!(OptimizerName::Adafactor.state_bytes(&layout), 4 * (48 + 20 + 10));
}
