//! Combined adapters against those that peft makes, and against the sum of the changes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use retune_adapter::combine::{Combination, Kind, MajoritySign, MaskOf, Settings, Source, combine, combine_with};
use retune_adapter::{AdapterFile, Deltas, LoraDelta, deltas};
use retune_testing::{Golden, relative};
use safetensors::SafeTensors;
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/combine")
}

fn adapter(name: &str) -> Deltas {
    let file = AdapterFile::read(&folder().join(name)).unwrap();
    deltas(file.method.lora().unwrap(), &file.tensors).unwrap()
}

/// A call of peft's `add_weighted_adapter`.
struct Case {
    number: usize,
    names: Vec<String>,
    weights: Vec<f64>,
    settings: Settings,
    r: usize,
    masks: Option<String>,
}

fn cases() -> Vec<Case> {
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(folder().join("cases.json")).unwrap()).unwrap();
    cases.iter().enumerate().map(|(number, case)| read(number, case)).collect()
}

fn read(number: usize, case: &Value) -> Case {
    let kind = match case["kind"].as_str().unwrap() {
        "linear" => Kind::Linear,
        "cat" => Kind::Cat,
        "svd" => Kind::Svd,
        "ties" => Kind::Ties,
        "ties_svd" => Kind::TiesSvd,
        "dare_linear" => Kind::DareLinear,
        "dare_linear_svd" => Kind::DareLinearSvd,
        "dare_ties" => Kind::DareTies,
        "dare_ties_svd" => Kind::DareTiesSvd,
        "magnitude_prune" => Kind::MagnitudePrune,
        "magnitude_prune_svd" => Kind::MagnitudePruneSvd,
        other => panic!("{other}"),
    };
    let majority_sign = case["majority_sign_method"].as_str().map(|_| MajoritySign::Frequency);
    let svd_rank = case["svd_rank"].as_u64().map(|rank| rank as usize);
    let settings = Settings { kind, density: case["density"].as_f64(), majority_sign, svd_rank, seed: None };
    Case {
        number,
        names: serde_json::from_value(case["adapters"].clone()).unwrap(),
        weights: serde_json::from_value(case["weights"].clone()).unwrap(),
        settings,
        r: case["r"].as_u64().unwrap() as usize,
        masks: case["masks"].as_str().map(str::to_owned),
    }
}

/// The masks that were drawn when the golden was made.
fn mask(file: &SafeTensors<'_>, case: &Case, module: &str, source: usize, of: MaskOf) -> Vec<bool> {
    let part = match of {
        MaskOf::A => "lora_A",
        MaskOf::B => "lora_B",
        MaskOf::Change => "change",
    };
    let name = format!("{}.{module}.{}.{part}", case.masks.as_ref().unwrap(), case.names[source]);
    let tensor = file.tensor(&name).unwrap();
    tensor.data().iter().map(|&kept| kept == 1).collect()
}

/// All changes one after the other, [out, in] each.
fn dense(deltas: &Deltas) -> Vec<f32> {
    deltas.values().flat_map(LoraDelta::dense).collect()
}

/// Σ weight · change, in f64.
fn sum(sources: &[Source<'_>], like: &Deltas) -> Vec<f32> {
    let mut sum = Vec::new();
    for (module, delta) in like {
        let mut total = vec![0.0f64; delta.out_features * delta.in_features];
        for source in sources {
            let Some(delta) = source.deltas.get(module) else { continue };
            total.iter_mut().zip(delta.dense()).for_each(|(sum, value)| *sum += source.weight * f64::from(value));
        }
        sum.extend(total.into_iter().map(|value| value as f32));
    }
    sum
}

fn with_sources<T>(names: &[&str], weights: &[f64], then: impl FnOnce(&[Source<'_>]) -> T) -> T {
    let adapters: Vec<Deltas> = names.iter().map(|name| adapter(name)).collect();
    let parts = names.iter().zip(&adapters).zip(weights);
    let sources: Vec<Source<'_>> = parts.map(|((name, deltas), &weight)| Source { name, deltas, weight }).collect();
    then(&sources)
}

fn ranks(combination: &Combination) -> bool {
    combination.deltas.values().all(|delta| delta.r == combination.r && delta.scale == 1.0)
}

#[test]
fn every_kind_is_what_peft_makes() {
    let golden = Golden::read(&folder());
    let masks = fs::read(folder().join("masks.safetensors")).unwrap();
    let masks = SafeTensors::deserialize(&masks).unwrap();
    let mut kinds = BTreeMap::new();
    for case in cases() {
        let names: Vec<&str> = case.names.iter().map(String::as_str).collect();
        let found = with_sources(&names, &case.weights, |sources| {
            combine_with(sources, &case.settings, &|module, source, of, _| mask(&masks, &case, module, source, of))
        });
        let found = found.unwrap_or_else(|error| panic!("{:?}: {error}", case.settings));
        let mut expected = Deltas::new();
        for module in found.deltas.keys() {
            let tensor = |part| golden.tensors[&format!("{}.{module}.{part}.weight", case.number)].clone();
            let ((shape_a, a), (shape_b, b)) = (tensor("lora_A"), tensor("lora_B"));
            let [r, in_features] = shape_a[..] else { panic!("{shape_a:?}") };
            expected.insert(module.clone(), LoraDelta { r, in_features, out_features: shape_b[0], scale: 1.0, a, b });
        }
        assert_eq!(golden.tensors.keys().filter(|key| key.starts_with(&format!("{}.", case.number))).count(), {
            2 * expected.len()
        });
        for (module, delta) in &found.deltas {
            let away = relative(&delta.dense(), &expected[module].dense());
            assert!(away < 1e-5, "{:?} of {names:?}, {module}: {away}", case.settings);
        }
        assert!(found.r == case.r && ranks(&found), "{:?}: {} and {}", case.settings, found.r, case.r);
        *kinds.entry(format!("{:?}", case.settings.kind)).or_insert(0) += 1;
    }
    assert_eq!((kinds.len(), kinds.values().sum::<i32>()), (11, 45));
}

#[test]
fn exact_is_the_weighted_sum_at_the_least_rank() {
    for (names, weights, r) in [
        (vec!["one", "two", "three"], vec![0.5, 0.3, 0.4], 14),
        (vec!["one", "two", "three"], vec![1.0, -0.5, -3.0], 14),
        (vec!["three", "one"], vec![-0.8, 0.6], 10),
        (vec!["one", "two"], vec![0.7, 0.3], 8),
        (vec!["one"], vec![-2.5], 4),
        // What does not count, or is there twice, takes no rank.
        (vec!["one", "two"], vec![0.0, 1.5], 4),
        (vec!["three", "three"], vec![0.5, 0.25], 6),
        (vec!["three", "one", "three"], vec![0.5, 1.0, 0.25], 10),
    ] {
        with_sources(&names, &weights, |sources| {
            let found = combine(sources, &Settings::default()).unwrap();
            let away = relative(&dense(&found.deltas), &sum(sources, &found.deltas));
            assert!(away < 1e-6, "{names:?} {weights:?}: {away}");
            assert!(found.difference < 1e-6, "{names:?} {weights:?}: {}", found.difference);
            assert!(found.r == r && ranks(&found), "{names:?} {weights:?}: {}", found.r);
        });
    }
}

#[test]
fn adapters_that_cancel_leave_zeros() {
    with_sources(&["one", "one"], &[1.0, -1.0], |sources| {
        let found = combine(sources, &Settings::default()).unwrap();
        assert_eq!((found.r, found.difference), (1, 0.0));
        assert!(found.deltas.values().all(|delta| delta.norm() == 0.0));
        // What is kept of each at random does not cancel.
        let dare = Settings { kind: Kind::DareLinear, density: Some(0.5), ..Settings::default() };
        assert_eq!(combine(sources, &dare).unwrap().difference, f64::INFINITY);
    });
}

#[test]
fn the_difference_is_that_to_the_weighted_sum() {
    for (kind, most) in [(Kind::Linear, 2.0), (Kind::Cat, 1e-6), (Kind::Svd, 0.9)] {
        with_sources(&["one", "two"], &[0.7, 0.3], |sources| {
            let found = combine(sources, &Settings { kind, ..Settings::default() }).unwrap();
            let away = relative(&dense(&found.deltas), &sum(sources, &found.deltas));
            assert!((found.difference - away).abs() < 1e-5, "{kind:?}: {} and {away}", found.difference);
            assert!(found.difference < most && (kind == Kind::Cat || away > 0.1), "{kind:?}: {away}");
        });
    }
}

#[test]
fn dare_depends_on_its_seed_alone() {
    let dare = |seed, kind| {
        let settings = Settings { kind, density: Some(0.5), seed, ..Settings::default() };
        with_sources(&["one", "two"], &[0.7, 0.3], |sources| dense(&combine(sources, &settings).unwrap().deltas))
    };
    for kind in [Kind::DareLinear, Kind::DareTies, Kind::DareLinearSvd, Kind::DareTiesSvd] {
        assert_eq!(dare(Some(3), kind), dare(Some(3), kind));
        assert_eq!(dare(None, kind), dare(Some(0), kind));
        assert_ne!(dare(Some(3), kind), dare(Some(4), kind));
    }
    // Of A about half is kept, and doubled.
    let kept = |values: &[f32]| values.iter().filter(|value| **value != 0.0).count() as f64 / values.len() as f64;
    let settings = Settings { kind: Kind::DareLinear, density: Some(0.25), ..Settings::default() };
    let found = with_sources(&["one"], &[1.0], |sources| combine(sources, &settings).unwrap());
    let shares: Vec<f64> = found.deltas.values().map(|delta| kept(&delta.a)).collect();
    assert!(shares.iter().all(|share| (share - 0.25).abs() < 0.15), "{shares:?}");
}

#[test]
fn a_density_of_one_keeps_everything() {
    for (pruned, plain) in [(Kind::MagnitudePrune, Kind::Linear), (Kind::DareLinearSvd, Kind::Svd)] {
        with_sources(&["one", "two"], &[0.7, -0.3], |sources| {
            let all = Settings { kind: pruned, density: Some(1.0), ..Settings::default() };
            let pruned = combine(sources, &all).unwrap();
            let plain = combine(sources, &Settings { kind: plain, ..Settings::default() }).unwrap();
            assert!(relative(&dense(&pruned.deltas), &dense(&plain.deltas)) < 1e-5);
        });
    }
}

#[test]
fn what_cannot_be_combined_is_refused_with_the_reason() {
    let refused = |names: &[&str], weights: &[f64], settings: Settings| {
        with_sources(names, weights, |sources| combine(sources, &settings).unwrap_err().to_string())
    };
    let of = |kind| Settings { kind, ..Settings::default() };
    let both = ["one", "two"];
    let weights = [0.5, 0.5];
    for (names, settings, words) in [
        (["one", "three"], of(Kind::Linear), "q_proj has rank 4 in one and rank 6 in three"),
        (both, of(Kind::Ties), "density is missing"),
        (both, Settings { density: Some(0.0), ..of(Kind::Ties) }, "density is 0"),
        (both, Settings { density: Some(1.5), ..of(Kind::DareTies) }, "density is 1.5"),
        (both, Settings { density: Some(f64::NAN), ..of(Kind::DareTies) }, "density is NaN"),
        (both, Settings { density: Some(0.5), ..of(Kind::Exact) }, "density has no effect"),
        (both, Settings { svd_rank: Some(4), ..of(Kind::Cat) }, "svd_rank has no effect"),
        (both, Settings { svd_rank: Some(0), ..of(Kind::Svd) }, "svd_rank is 0"),
        (
            both,
            Settings { svd_rank: Some(60_000), ..of(Kind::Svd) },
            "svd_rank is 60000, and no change of these adapters has a rank above",
        ),
        (both, Settings { seed: Some(1), ..of(Kind::Svd) }, "seed has no effect"),
        (both, Settings { majority_sign: Some(MajoritySign::Total), ..of(Kind::Svd) }, "majority_sign has no effect"),
    ] {
        let text = refused(&names, &weights, settings);
        assert!(text.contains(words), "{text}");
    }
    assert!(refused(&[], &[], of(Kind::Exact)).contains("missing"));
    assert!(refused(&["one"], &[f64::INFINITY], of(Kind::Exact)).contains("of one is inf"));
    assert!(refused(&["one"], &[1e60], of(Kind::Exact)).contains("finite"));

    let one = adapter("one");
    let mut other = one.clone();
    for delta in other.values_mut() {
        *delta = LoraDelta { in_features: 16, r: 2 * delta.r, b: delta.b.repeat(2), ..delta.clone() };
    }
    let sources = [("one", &one), ("other", &other)].map(|(name, deltas)| Source { name, deltas, weight: 1.0 });
    let text = combine(&sources, &Settings::default()).unwrap_err().to_string();
    assert!(text.contains("different models") && text.contains("[32, 32] in one and [32, 16] in other"), "{text}");
}
