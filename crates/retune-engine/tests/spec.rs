//! A spec and the model made of it number the same linears and vectors in the same order, and a rotation knows the length of its row.

mod common;

use common::{Case, everything, llama};
use retune_engine::spec::{LongFrequencies, LongRope, ModelSpec, Module, Rope, frequencies};

fn specs() -> Vec<ModelSpec> {
    [true, false].into_iter().flat_map(|tied| [llama(tied), everything(tied)]).collect()
}

#[test]
fn linears_and_vectors_have_the_numbers_of_the_model() {
    for spec in specs() {
        let Case { model, .. } = Case::bare(&spec);
        let of_spec: Vec<_> = spec.linears().map(|linear| (linear.name.clone(), linear.rows, linear.cols)).collect();
        let of_model: Vec<_> =
            model.linears().iter().map(|linear| (linear.name.clone(), linear.rows(), linear.cols())).collect();
        assert_eq!(of_model, of_spec);
        assert_eq!(model.vector_names(), spec.vectors());
        for linear in model.linears() {
            let bias = linear.bias.map(|bias| model.vector_names()[bias.0].clone());
            let expected = spec.linears().find(|of_spec| of_spec.name == linear.name).unwrap();
            assert_eq!(bias, expected.bias.then(|| format!("{}.bias", linear.name)));
        }
    }
}

#[test]
fn modules_list_linears_and_vectors_in_the_same_order() {
    for spec in specs() {
        let modules = spec.modules();
        let mut linears: Vec<&str> =
            modules.iter().filter(|m| matches!(m, Module::Linear(_))).map(Module::name).collect();
        if spec.head.tied {
            linears.push(&spec.head.linear.name);
        }
        let numbered: Vec<&str> = spec.linears().map(|linear| &*linear.name).collect();
        assert_eq!(linears, numbered);
        assert_eq!(numbered.last(), Some(&"head"));
        let names: Vec<String> = spec.tensors().into_iter().map(|(name, _)| name).collect();
        let mut unique = names.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), names.len(), "a tensor stands twice in the list");
    }
    let spec = everything(true);
    let names: Vec<String> = spec.tensors().into_iter().map(|(name, _)| name).collect();
    let expected = [
        "table.weight",
        "positions.weight",
        "table_norm.weight",
        "table_norm.bias",
        "0.attention_norm.weight",
        "0.q.weight",
        "0.q.bias",
        "0.k.weight",
        "0.k.bias",
        "0.v.weight",
        "0.v.bias",
        "0.q_norm.weight",
        "0.k_norm.weight",
        "0.o.weight",
        "0.o.bias",
        "0.after_attention.weight",
        "0.after_attention.bias",
        "0.mlp_norm.weight",
        "0.gate.weight",
        "0.gate.bias",
        "0.up.weight",
        "0.up.bias",
        "0.down.weight",
        "0.down.bias",
        "0.after_mlp.weight",
        "1.attention_norm.weight",
        "1.attention_norm.bias",
        "1.qkv.weight",
        "1.qkv.bias",
        "1.o.weight",
        "1.mlp_norm.weight",
        "1.up.weight",
        "1.up.bias",
        "1.down.weight",
        "1.down.bias",
        "norm.weight",
        "norm.bias",
    ];
    assert_eq!(names, expected);
    // Files hold a transposed weight as [in, out].
    let shape = |name: &str| spec.tensors().into_iter().find(|(of_spec, _)| of_spec == name).unwrap().1;
    assert_eq!((shape("1.up.weight"), shape("0.up.weight")), (vec![32, 48], vec![48, 32]));
    assert_eq!(everything(false).tensors().last().unwrap(), &("head.weight".to_owned(), vec![96, 32]));
    let count: usize = spec.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(spec.parameters(), count);
}

#[test]
fn renaming_reaches_every_module() {
    let mut spec = everything(false);
    let before: Vec<String> = spec.tensors().into_iter().map(|(name, _)| format!("new.{name}")).collect();
    spec.rename(&|name| format!("new.{name}"));
    let after: Vec<String> = spec.tensors().into_iter().map(|(name, _)| name).collect();
    assert_eq!(after, before);
}

#[test]
fn a_rotation_has_other_frequencies_for_rows_beyond_its_limit() {
    let plain = frequencies(10_000.0, 8);
    assert_eq!(plain.len(), 4);
    for (found, expected) in plain.iter().zip([1.0, 0.1, 0.01, 0.001]) {
        assert!((found - expected).abs() < 1e-7 * expected, "{found} instead of {expected}");
        assert_eq!(*found, f64::from(*found as f32), "it is rounded to f32");
    }
    let usual = Rope::new(plain.clone());
    assert_eq!(&*usual.frequencies_at(1_000_000), &plain[..]);

    let of = |frequencies| Rope { long: Some(LongRope { beyond: 16, frequencies }), ..usual.clone() };
    let fixed = of(LongFrequencies::Fixed(vec![0.5, 0.25, 0.125, 0.0625]));
    assert_eq!(&*fixed.frequencies_at(16), &plain[..]);
    assert_eq!(&*fixed.frequencies_at(17), &[0.5, 0.25, 0.125, 0.0625]);

    let dynamic = of(LongFrequencies::Dynamic { theta: 10_000.0, factor: 4.0 });
    assert_eq!(&*dynamic.frequencies_at(16), &plain[..]);
    for length in [17, 64, 1000] {
        // theta · (4 · length / 16 − 3)^(8 / 6)
        let theta = 10_000.0 * (length as f64 / 4.0 - 3.0).powf(8.0 / 6.0);
        for (i, found) in dynamic.frequencies_at(length).iter().enumerate() {
            let expected = theta.powf(-(i as f64) / 4.0);
            assert!((found - expected).abs() < 1e-6 * expected, "{length}, {i}: {found} instead of {expected}");
        }
    }
}
