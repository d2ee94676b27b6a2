//! Whether an adapter fits a model: every tensor there, of the right shape, finite, and nothing beside.

use std::collections::BTreeMap;

use crate::config::LoraConfig;
use crate::error::Error;
use crate::files::AdapterFile;
use crate::names::{self, Key, Part, trained_biases};
use crate::targets::{BaseModules, LoraTarget, select};

/// How many tensors an error names before it only counts.
const NAMED: usize = 3;

/// The modules that an adapter adapts in this model, after checking that it fits.
///
/// Tensors of modules saved whole that are not linear (embeddings, norms) are checked for finite values only: their shapes are not known here.
///
/// # Errors
/// [`Error::Shape`], [`Error::Length`], [`Error::NotFinite`], [`Error::MissingTensors`], [`Error::UnexpectedTensors`], and what
/// [`select`] and the configuration's check say.
pub fn check_against(
    config: &LoraConfig,
    file: &AdapterFile,
    modules: &BaseModules<'_>,
) -> Result<Vec<LoraTarget>, Error> {
    config.check()?;
    let targets = select(config, modules)?;
    let required = required(config, modules, &targets)?;
    let mut unexpected = Vec::new();
    let mut saved: Vec<String> = Vec::new();
    for (key, (shape, values)) in &file.tensors {
        let expected = match required.get(key) {
            Some(expected) => Some(expected.clone()),
            None => match optional(config, modules, key) {
                Some((module, expected)) => {
                    saved.push(module);
                    expected
                }
                None => {
                    unexpected.push(key.as_str());
                    continue;
                }
            },
        };
        if let Some(expected) = expected
            && *shape != expected
        {
            let advice = shape_advice(file, key, shape, &expected);
            return Err(Error::Shape { name: key.clone(), found: shape.clone(), expected, advice });
        }
        check_values(key, shape, values)?;
    }
    if !unexpected.is_empty() {
        return Err(Error::UnexpectedTensors { keys: listed(&unexpected), advice: unexpected_advice(&unexpected) });
    }
    let mut missing: Vec<&str> =
        required.keys().filter(|key| !file.tensors.contains_key(*key)).map(String::as_str).collect();
    for entry in &config.modules_to_save {
        if !saved.iter().any(|module| module.ends_with(entry.as_str())) {
            missing.push(entry);
        }
    }
    if !missing.is_empty() {
        return Err(Error::MissingTensors { keys: listed(&missing) });
    }
    Ok(targets)
}

/// The tensors that must be there, with their shapes.
fn required(
    config: &LoraConfig,
    modules: &BaseModules<'_>,
    targets: &[LoraTarget],
) -> Result<BTreeMap<String, Vec<usize>>, Error> {
    let mut shapes = BTreeMap::new();
    for target in targets {
        if target.is_table {
            shapes.insert(names::embedding_a(&target.module), vec![target.r, target.in_features]);
            shapes.insert(names::embedding_b(&target.module), vec![target.out_features, target.r]);
        } else {
            shapes.insert(names::lora_a(&target.module), vec![target.r, target.in_features]);
            shapes.insert(names::lora_b(&target.module), vec![target.out_features, target.r]);
            if config.lora_bias {
                shapes.insert(names::lora_b_bias(&target.module), vec![target.out_features]);
            }
        }
        if config.use_dora {
            shapes.insert(names::lora_magnitude(&target.module), vec![target.out_features]);
        }
    }
    for (module, ids) in config.token_rows(modules)? {
        shapes.insert(names::token_rows(module), vec![ids.len(), modules.shape.hidden_size]);
    }
    for bias in trained_biases(config, modules, targets) {
        shapes.insert(bias.key, vec![bias.len]);
    }
    Ok(shapes)
}

/// For a tensor that may be there: its module, and its shape where that is known.
fn optional(config: &LoraConfig, modules: &BaseModules<'_>, key: &str) -> Option<(String, Option<Vec<usize>>)> {
    let Key::Part(module, part) = names::parse(key) else {
        return None;
    };
    if part.key(&module) != key {
        return None; // another spelling than the one that files are read into
    }
    let linear = modules.tables.iter().chain(&modules.linears).find(|linear| linear.name == module);
    let shape = match part {
        Part::Weight | Part::Bias => {
            config.selection().saved_by(&module)?;
            linear.map(|linear| match part {
                Part::Weight => linear.weight_shape(),
                _ => vec![linear.out_features],
            })
        }
        // The base's own weight beside an adapted head: of use only when it was resized, and then its shape tells.
        Part::BaseWeight => Some(linear?.weight_shape()),
        Part::LoraA
        | Part::LoraB
        | Part::LoraBBias
        | Part::Magnitude
        | Part::EmbeddingA
        | Part::EmbeddingB
        | Part::TokenRows => {
            return None;
        }
    };
    Some((module, shape))
}

/// Refuses an adapter with a tensor that is not whole or not finite.
pub(crate) fn check_all_values(file: &AdapterFile) -> Result<(), Error> {
    file.tensors.iter().try_for_each(|(key, (shape, values))| check_values(key, shape, values))
}

/// Refuses a tensor that is not whole or not finite.
pub(crate) fn check_values(name: &str, shape: &[usize], values: &[f32]) -> Result<(), Error> {
    let count = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    if count != Some(values.len()) {
        return Err(Error::Length { name: name.to_owned(), shape: shape.to_vec(), found: values.len() });
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(Error::NotFinite {
            name: name.to_owned(),
            index,
            value: values.get(index).copied().unwrap_or(f32::NAN),
        }),
        None => Ok(()),
    }
}

fn shape_advice(file: &AdapterFile, key: &str, found: &[usize], expected: &[usize]) -> String {
    let rank_axis = match names::parse(key) {
        Key::Part(_, Part::LoraA | Part::EmbeddingA) => Some(0),
        Key::Part(_, Part::LoraB | Part::EmbeddingB) => Some(1),
        _ => None,
    };
    if let Some(axis) = rank_axis
        && found.len() == 2
        && found.get(1 - axis) == expected.get(1 - axis)
    {
        return "The rank differs from what adapter_config.json says (r, rank_pattern): the two files do not belong together".to_owned();
    }
    let made_for = match &file.base_model {
        Some(name) => format!(" (its configuration names {name})"),
        None => String::new(),
    };
    format!("This adapter was made for another model{made_for}: load it with the model it was trained on")
}

fn unexpected_advice(keys: &[&str]) -> &'static str {
    let mut whole = false;
    for key in keys {
        match names::parse(key) {
            Key::Part(_, Part::Weight | Part::Bias) => whole = true,
            Key::Part(_, Part::LoraBBias) => {
                return "These are biases of B, and adapter_config.json does not say lora_bias: the two files do not belong together";
            }
            Key::Part(_, Part::Magnitude) => {
                return "These are DoRA's, and adapter_config.json does not say use_dora: the two files do not belong together";
            }
            Key::Part(..) | Key::Copy => {}
            Key::Unknown => {
                return "These are not tensors of a LoRA adapter that is known here";
            }
        }
    }
    if whole {
        "Whole weights or biases belong to an adapter only when modules_to_save or bias says so; PEFT also writes embeddings whose size was changed, which is not available yet"
    } else {
        "Either target_modules does not name them, or this adapter was made for another model: check base_model_name_or_path"
    }
}

fn listed(keys: &[&str]) -> String {
    let named: Vec<String> = keys.iter().take(NAMED).map(|key| format!("`{key}`")).collect();
    match keys.len().checked_sub(NAMED) {
        None | Some(0) => named.join(", "),
        Some(more) => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::{adapter, lora};
    use crate::test_model::{tiny_llama, tiny_llama_with_biases};
    use serde_json::json;
    use std::sync::Arc;

    const Q0_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const Q0_B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

    fn check(file: &AdapterFile, modules: &BaseModules<'_>) -> Result<Vec<LoraTarget>, Error> {
        check_against(&lora(file), file, modules)
    }

    fn refused(file: &AdapterFile) -> String {
        check(file, &tiny_llama()).unwrap_err().to_string()
    }

    fn put(file: &mut AdapterFile, key: &str, shape: &[usize]) {
        file.tensors.insert(key.to_owned(), (shape.to_vec(), vec![0.5; shape.iter().product()]));
    }

    #[test]
    fn an_adapter_that_fits_gives_its_targets() {
        let file = adapter(json!({"target_modules": ["q_proj", "v_proj"], "r": 4}), &tiny_llama());
        let targets = check(&file, &tiny_llama()).unwrap();
        assert_eq!(targets.len(), 6);
        assert_eq!((targets[1].in_features, targets[1].out_features, targets[1].r), (32, 16, 4));
    }

    #[test]
    fn entries_without_effect_are_no_error_in_a_file() {
        let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
        for value in [
            json!({"r": 4, "target_modules": ["q_proj", "query_key_value"]}),
            json!({"r": 4, "target_modules": ["q_proj"], "bias": "all"}),
            json!({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": []}),
            json!({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 1, 2, 3], "layers_pattern": ["layers", "h"]}),
            json!({"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4, "0.self_attn.q_proj": 8}}),
        ] {
            file.method = Arc::new(serde_json::from_value::<LoraConfig>(value.clone()).unwrap());
            let targets = check(&file, &tiny_llama());
            assert_eq!(targets.map(|targets| targets.len()).map_err(|error| error.to_string()), Ok(3), "{value}");
        }
    }

    #[test]
    fn another_models_shapes_are_found_and_named() {
        let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
        put(&mut file, Q0_A, &[4, 64]);
        let message = refused(&file);
        assert!(message.contains("has shape [4, 64], expected [4, 32]"), "{message}");
        assert!(message.contains("made for another model (its configuration names some/base)"), "{message}");
    }

    #[test]
    fn a_rank_that_contradicts_the_configuration_is_told_from_another_model() {
        for (key, shape) in [(Q0_A, [8, 32]), (Q0_B, [32, 8]), (Q0_A, [0, 32])] {
            let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
            put(&mut file, key, &shape);
            assert!(refused(&file).contains("The rank differs"));
        }
    }

    #[test]
    fn half_an_adapter_is_refused() {
        for key in [Q0_A, Q0_B] {
            let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
            file.tensors.remove(key);
            assert!(refused(&file).contains(&format!("lacks `{key}`")));
        }
        let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
        file.tensors.clear();
        assert!(refused(&file).contains("and 3 more"));
    }

    #[test]
    fn tensors_without_a_place_are_refused() {
        for (key, expected) in [
            ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "made for another model"),
            ("base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", "target_modules does not name them"),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
            ("base_model.model.model.embed_tokens.weight", "modules_to_save"),
            ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", "bias says so"),
            ("model.layers.0.self_attn.q_proj.lora_A.weight", "no place"),
        ] {
            let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
            put(&mut file, key, &[4, 32]);
            let message = refused(&file);
            assert!(message.contains(key) && message.contains(expected), "{message}");
        }
    }

    #[test]
    fn values_that_are_not_finite_or_not_there_are_refused() {
        for value in [f32::NAN, f32::INFINITY] {
            let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
            file.tensors.get_mut(Q0_B).unwrap().1[5] = value;
            let message = refused(&file);
            assert!(message.contains(Q0_B) && message.contains("at element 5"), "{message}");
        }
        let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
        file.tensors.get_mut(Q0_B).unwrap().1.pop();
        assert!(refused(&file).contains("holds 127 values"));
    }

    #[test]
    fn modules_saved_whole_are_checked_where_their_shape_is_known() {
        let head = "base_model.model.lm_head.weight";
        let config = json!({"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head", "embed_tokens"]});
        let mut file = adapter(config, &tiny_llama());
        put(&mut file, head, &[64, 32]);
        assert!(refused(&file).contains("lacks `embed_tokens`"));
        put(&mut file, "base_model.model.model.embed_tokens.weight", &[64, 32]);
        assert!(check(&file, &tiny_llama()).is_ok());
        put(&mut file, head, &[66, 32]);
        assert!(refused(&file).contains("has shape [66, 32], expected [64, 32]"));
    }

    #[test]
    fn entries_that_save_the_same_module_are_both_satisfied() {
        let config = json!({"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["norm", "model.norm"]});
        let mut file = adapter(config, &tiny_llama());
        put(&mut file, "base_model.model.model.norm.weight", &[32]);
        assert!(check(&file, &tiny_llama()).is_ok());
    }

    #[test]
    fn the_copy_of_the_head_that_peft_adds_is_accepted_when_it_is_the_bases() {
        let key = "base_model.model.lm_head.base_layer.weight";
        let mut file = adapter(json!({"target_modules": ["lm_head"], "r": 4}), &tiny_llama());
        put(&mut file, key, &[64, 32]);
        assert!(check(&file, &tiny_llama()).is_ok());
        put(&mut file, key, &[70, 32]);
        assert!(refused(&file).contains("another model"));
    }

    #[test]
    fn trained_biases_belong_to_the_adapter() {
        let modules = tiny_llama_with_biases();
        let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4, "bias": "all"}), &modules);
        assert_eq!(file.tensors.len(), 6 + 21);
        assert_eq!(check(&file, &modules).unwrap().len(), 3);
        let key = "base_model.model.model.layers.2.mlp.down_proj.bias";
        put(&mut file, key, &[48]);
        let message = check(&file, &modules).unwrap_err().to_string();
        assert!(message.contains(key) && message.contains("expected [32]"), "{message}");
        file.method = Arc::new(LoraConfig { bias: crate::config::Bias::None, ..lora(&file) });
        assert!(check(&file, &modules).is_err());
    }
}
