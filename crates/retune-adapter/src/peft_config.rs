//! `adapter_config.json`: read from whatever PEFT wrote, written so that old and new versions of PEFT and the servers accept it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::config::{Bias, LoraConfig, ModuleSelection};
use crate::error::Error;
use crate::method::{METHODS, Method};
use crate::selection::Selection;
use crate::targets::{BaseModules, LoraTarget, last_component};

/// The keys that mean the same here.
const FIELDS: [&str; 15] = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "lora_bias",
    "use_rslora",
    "use_dora",
];

/// PEFT's names of what a decoder does, and what an encoder and a decoder do.
const CAUSAL_LM: &str = "CAUSAL_LM";
const SEQ_2_SEQ_LM: &str = "SEQ_2_SEQ_LM";

/// What the servers in use say of every other method.
pub(crate) const LORA_ONLY: &str = "vLLM and mistral.rs take LoRA adapters only";

/// Keys of every method that change nothing in a trained adapter, whatever their value.
const BOOKKEEPING: [&str; 4] = ["auto_mapping", "inference_mode", "peft_version", "revision"];

/// The same of LoRA on linear modules: bookkeeping, and how the training started.
const WITHOUT_EFFECT: [&str; 8] = [
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
];

/// Initialisations that leave the base model as it is: how the adapter started does not matter once it is trained.
const HARMLESS_INITIALISATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Reads a configuration and the name of the base model.
///
/// # Errors
/// [`Error::PeftType`], or [`Error::AdapterConfig`] naming the key: one that would change the mathematics, or one with a wrong value.
pub(crate) fn parse(path: &Path, value: Value) -> Result<(Arc<dyn Method>, Option<String>), Error> {
    let Value::Object(mut map) = value else {
        return Err(bad(path, "adapter_config.json", "is not a JSON object; copy or save the adapter again"));
    };
    let info = match map.remove("peft_type") {
        None => return Err(Error::PeftType { path: path.to_owned(), found: "missing".to_owned() }),
        Some(found) => {
            let known = METHODS.iter().find(|method| method.peft_type.is_some() && method.peft_type == found.as_str());
            known.ok_or_else(|| Error::PeftType { path: path.to_owned(), found: found.to_string() })?
        }
    };
    match map.remove("task_type") {
        None | Some(Value::Null) => {}
        Some(Value::String(task)) if task == CAUSAL_LM || task == SEQ_2_SEQ_LM => {}
        Some(other) => {
            let expected = format!("only {CAUSAL_LM} and {SEQ_2_SEQ_LM} adapters can be loaded");
            return Err(bad(path, "task_type", &format!("is {other}; {expected}")));
        }
    }
    let base_model = match map.remove("base_model_name_or_path") {
        Some(Value::String(name)) if !name.is_empty() => Some(name),
        _ => None,
    };
    map.retain(|key, _| !BOOKKEEPING.contains(&key.as_str()));
    let method = (info.from_peft)(path, map)?;
    method.check().map_err(|error| match error {
        Error::Config { field, problem } => bad(path, field, &problem),
        other => other,
    })?;
    Ok((method, base_model))
}

/// Reads the keys of LoRA. What a file does not say has PEFT's default, not ours (r 8, alpha 8).
pub(crate) fn lora(path: &Path, mut map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    check_initialisation(path, map.remove("init_lora_weights"))?;
    let mut fields = known_fields(path, map, &FIELDS, &WITHOUT_EFFECT)?;
    if !fields.contains_key("target_modules") {
        return Err(bad(path, "target_modules", "is missing or empty; expected the list of modules that were adapted"));
    }
    fields.entry("r").or_insert(json!(8));
    fields.entry("lora_alpha").or_insert(json!(8));
    Ok(Arc::new(deserialize::<LoraConfig>(path, fields)?))
}

/// The keys that are `known`, without those that say nothing.
///
/// # Errors
/// A key that is neither known nor among those `without_effect`, and says something.
pub(crate) fn known_fields(
    path: &Path,
    map: Map<String, Value>,
    known: &[&str],
    without_effect: &[&str],
) -> Result<Map<String, Value>, Error> {
    let mut fields = Map::new();
    for (key, value) in map {
        let is_known = known.contains(&key.as_str());
        if without_effect.contains(&key.as_str()) || is_inert(&value) && !(is_known && value.is_number()) {
            continue;
        }
        if !is_known {
            let problem = format!(
                "is {value}, which changes what the adapter computes and is not available yet; \
                 merge the adapter into its base with PEFT and use the merged model"
            );
            return Err(bad(path, &key, &problem));
        }
        fields.insert(key, value);
    }
    Ok(fields)
}

fn check_initialisation(path: &Path, value: Option<Value>) -> Result<(), Error> {
    match value {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(name)) if HARMLESS_INITIALISATIONS.contains(&name.to_lowercase().as_str()) => Ok(()),
        Some(other) => Err(bad(
            path,
            "init_lora_weights",
            &format!(
                "is {other}: such an adapter belongs to a changed base model. Save it as plain LoRA first \
                 (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
            ),
        )),
    }
}

fn is_inert(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}

/// Deserializes, and when that fails finds the key at fault: every key can stand alone.
pub(crate) fn deserialize<M: DeserializeOwned>(path: &Path, fields: Map<String, Value>) -> Result<M, Error> {
    let error = match serde_json::from_value(Value::Object(fields.clone())) {
        Ok(config) => return Ok(config),
        Err(error) => error,
    };
    for (key, value) in fields {
        let alone = Value::Object(Map::from_iter([(key.clone(), value)]));
        if let Err(error) = serde_json::from_value::<M>(alone) {
            return Err(bad(path, &key, &unreadable(&error)));
        }
    }
    Err(bad(path, "adapter_config.json", &unreadable(&error)))
}

fn unreadable(error: &serde_json::Error) -> String {
    format!("{error}; correct it, or save the adapter again")
}

pub(crate) fn bad(path: &Path, key: &str, problem: &str) -> Error {
    Error::AdapterConfig { path: path.to_owned(), key: key.to_owned(), problem: problem.to_owned() }
}

/// The smallest file that says everything: keys that PEFT has known from its first versions, and others only where they are not default.
pub(crate) fn to_json(
    method: &dyn Method,
    base_model: Option<&str>,
    modules: &BaseModules<'_>,
) -> Result<String, Error> {
    let mut keys = method.peft_config(modules)?;
    keys.insert("peft_type", json!(method.info().peft_type));
    keys.insert("task_type", json!(if modules.shape.has_encoder { SEQ_2_SEQ_LM } else { CAUSAL_LM }));
    keys.insert("base_model_name_or_path", json!(base_model));
    keys.insert("inference_mode", json!(true));
    let mut text = serde_json::to_string_pretty(&keys)?;
    text.push('\n');
    Ok(text)
}

/// LoRA's keys.
pub(crate) fn lora_keys(
    config: &LoraConfig,
    targets: &[LoraTarget],
    modules: &BaseModules<'_>,
) -> Result<BTreeMap<&'static str, Value>, serde_json::Error> {
    let mut keys: BTreeMap<&str, Value> = BTreeMap::new();
    keys.insert("r", json!(config.r));
    keys.insert("lora_alpha", number(config.lora_alpha));
    keys.insert("lora_dropout", json!(config.lora_dropout));
    keys.insert("bias", json!(config.bias.as_str()));
    // PEFT wants to be told that the adapted weights are stored as [in, out].
    let is_transposed = |target: &LoraTarget| !target.is_table && modules.is_transposed(&target.module);
    keys.insert("fan_in_fan_out", json!(targets.iter().any(is_transposed)));
    let targets: Vec<&str> = targets.iter().map(|target| target.module.as_str()).collect();
    selection_keys(&config.selection(), &targets, modules, &mut keys)?;
    if !config.rank_pattern.is_empty() {
        keys.insert("rank_pattern", serde_json::to_value(&config.rank_pattern)?);
    }
    if !config.alpha_pattern.is_empty() {
        let alphas: Map<String, Value> =
            config.alpha_pattern.iter().map(|(pattern, &alpha)| (pattern.to_owned(), number(alpha))).collect();
        keys.insert("alpha_pattern", Value::Object(alphas));
    }
    if let Some(tokens) = &config.trainable_token_indices {
        keys.insert("trainable_token_indices", serde_json::to_value(tokens)?);
    }
    if config.lora_bias {
        keys.insert("lora_bias", json!(true));
    }
    if config.use_rslora {
        keys.insert("use_rslora", json!(true));
    }
    if config.use_dora {
        keys.insert("use_dora", json!(true));
    }
    Ok(keys)
}

/// The keys by which a method selects the modules `targets`.
pub(crate) fn selection_keys(
    selection: &Selection<'_>,
    targets: &[&str],
    modules: &BaseModules<'_>,
    keys: &mut BTreeMap<&str, Value>,
) -> Result<(), serde_json::Error> {
    let saved = Some(selection.modules_to_save).filter(|names| !names.is_empty());
    keys.insert("modules_to_save", json!(saved));
    match (selection.target_modules, selection.exclude_modules) {
        (ModuleSelection::Pattern(source), None) if !selection.target_modules.is_all_linear() => {
            keys.insert("target_modules", json!(source));
        }
        (ModuleSelection::List(names), None) => {
            let mut names = names.clone();
            names.sort();
            names.dedup();
            keys.insert("target_modules", json!(names));
            if let Some(layers) = selection.layers_to_transform {
                keys.insert("layers_to_transform", serde_json::to_value(layers)?);
            }
            if let Some(pattern) = selection.layers_pattern {
                keys.insert("layers_pattern", serde_json::to_value(pattern)?);
            }
        }
        // PEFT learned `exclude_modules` late, and "all-linear" means another thing on another model: written out.
        _ => {
            keys.insert("target_modules", json!(shortest_names(targets, modules)));
        }
    }
    Ok(())
}

/// An alpha as an integer where it is one, as PEFT's own files have it.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

/// Names that select the targets and nothing else, sorted: the last component where all modules with it are targets, else the full name.
fn shortest_names(targets: &[&str], modules: &BaseModules<'_>) -> Vec<String> {
    // Beside the part that is read such a model has one that sees pictures, whose modules have the same ends.
    if targets.iter().any(|target| target.starts_with("model.language_model.")) {
        let mut names: Vec<String> = targets.iter().map(|target| (*target).to_owned()).collect();
        names.sort();
        return names;
    }
    let is_target = |name: &str| targets.contains(&name);
    let mut names: Vec<String> = targets
        .iter()
        .map(|target| {
            let end = last_component(target);
            let whole =
                modules.iter().filter(|module| last_component(module.name) == end).all(|module| is_target(module.name));
            if whole { end.to_owned() } else { (*target).to_owned() }
        })
        .collect();
    names.sort();
    names.dedup();
    names
}

/// What the servers in use would refuse in a LoRA adapter, or compute otherwise.
pub(crate) fn compatibility_notes(config: &LoraConfig) -> Vec<String> {
    let mut notes = Vec::new();
    let rank = config.rank_pattern.iter().map(|(_, &rank)| rank).fold(config.r, usize::max);
    if rank > 512 {
        notes.push(format!("rank {rank}: vLLM takes ranks up to 512, mistral.rs up to 256"));
    } else if rank > 256 {
        notes.push(format!("rank {rank}: mistral.rs takes ranks up to 256; vLLM needs --max-lora-rank {rank} or more"));
    } else if rank > 16 {
        notes
            .push(format!("rank {rank}: vLLM takes ranks up to 16 unless started with --max-lora-rank {rank} or more"));
    }
    if config.use_dora {
        notes.push("use_dora: vLLM and mistral.rs refuse DoRA; merge this one".to_owned());
    }
    if config.bias != Bias::None {
        notes.push(format!("bias {}: vLLM and mistral.rs refuse adapters with biases", config.bias.as_str()));
    }
    if !config.modules_to_save.is_empty() {
        notes
            .push("modules_to_save: vLLM and mistral.rs refuse adapters with whole modules; merge this one".to_owned());
    }
    if !config.rank_pattern.is_empty() || !config.alpha_pattern.is_empty() {
        notes.push(
            "rank_pattern, alpha_pattern: vLLM scales every module by lora_alpha / r and would compute otherwise"
                .to_owned(),
        );
    }
    match &config.target_modules {
        ModuleSelection::List(names) if names.iter().any(|name| last_component(name) == "lm_head") => {
            notes.push("target_modules: mistral.rs refuses adapters on lm_head".to_owned());
        }
        ModuleSelection::Pattern(_) if !config.target_modules.is_all_linear() && config.exclude_modules.is_none() => {
            notes.push("target_modules: older versions of mistral.rs take a list only".to_owned());
        }
        _ => {}
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OneOrMany;
    use crate::targets::{resolve, select};
    use crate::test_model::tiny_llama;

    fn read(value: Value) -> Result<(LoraConfig, Option<String>), Error> {
        let (method, base) = parse(Path::new("adapter_config.json"), value)?;
        Ok((serde_json::from_value(method.settings()?)?, base))
    }

    fn minimal(extra: Value) -> Value {
        let mut all = json!({"peft_type": "LORA", "target_modules": ["q_proj"]});
        if let (Some(all), Value::Object(extra)) = (all.as_object_mut(), extra) {
            all.extend(extra);
        }
        all
    }

    fn written(config: Value) -> Value {
        let config: LoraConfig = serde_json::from_value(config).unwrap();
        let modules = tiny_llama();
        resolve(&config, &modules).unwrap();
        let text = to_json(&config, Some("base"), &modules).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// As PEFT 0.21.2 writes it.
    fn newest() -> Value {
        json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "base_model_name_or_path": "some/model", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
            "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
            "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
            "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0,
            "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
            "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
            "rank_pattern": {}, "revision": null, "target_modules": ["v_proj", "q_proj"], "target_parameters": null,
            "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
            "use_qalora": false, "use_rslora": false, "velora_config": null
        })
    }

    #[test]
    fn the_newest_peft_is_read() {
        let (config, base) = read(newest()).unwrap();
        assert_eq!((config.r, config.lora_alpha), (4, 8.0));
        assert_eq!(base.as_deref(), Some("some/model"));
        assert_eq!(select(&config, &tiny_llama()).unwrap().len(), 6);
    }

    #[test]
    fn what_an_old_file_does_not_say_has_pefts_default() {
        let old = json!({
            "auto_mapping": null, "base_model_name_or_path": "m", "bias": "none", "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": true, "layers_pattern": null, "layers_to_transform": null,
            "lora_dropout": 0.05, "modules_to_save": null, "peft_type": "LORA", "revision": null,
            "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"
        });
        let (config, _) = read(old).unwrap();
        assert_eq!((config.r, config.lora_alpha, config.lora_dropout), (8, 8.0, 0.05));
        assert!(read(minimal(json!({"layers_pattern": "", "exclude_modules": []}))).is_ok());
    }

    #[test]
    fn a_key_that_would_change_the_result_is_refused_by_name() {
        for (value, expected) in [
            (json!({"use_qalora": true}), "`use_qalora`: is true"),
            (json!({"lora_bias": true, "use_dora": true}), "`lora_bias`: is not available with use_dora"),
            (json!({"layer_replication": [[0, 2]]}), "`layer_replication`"),
            (json!({"trainable_token_indices": [1, 1]}), "`trainable_token_indices`: token 1 is named twice"),
            (json!({"a_future_key": "x"}), "`a_future_key`: is \"x\""),
            (json!({"init_lora_weights": "pissa_niter_4"}), "`init_lora_weights`: is \"pissa_niter_4\""),
            (json!({"init_lora_weights": "olora"}), "plain LoRA first"),
            (json!({"task_type": "SEQ_CLS"}), "`task_type`: is \"SEQ_CLS\""),
            (json!({"peft_type": "LOHA"}), "peft_type is \"LOHA\""),
            (json!({"peft_type": null}), "peft_type is null"),
            (json!({"r": "8"}), "`r`: invalid type: string \"8\""),
            (json!({"r": 0}), "`r`: a rank of 0"),
            (json!({"r": 1e9}), "`r`: invalid type: floating point"),
            (json!({"lora_alpha": 0}), "`lora_alpha`"),
            (json!({"target_modules": null}), "`target_modules`: is missing"),
            (json!({"target_modules": {"a": 1}}), "`target_modules`"),
            (json!({"modules_to_save": "lm_head"}), "`modules_to_save`"),
            (json!({"rank_pattern": {"q_proj": -1}}), "`rank_pattern`"),
        ] {
            let message = read(minimal(value.clone())).unwrap_err().to_string();
            assert!(message.contains(expected), "{value}: {message}");
        }
        assert!(read(json!([])).unwrap_err().to_string().contains("not a JSON object"));
        assert!(read(json!({})).unwrap_err().to_string().contains("peft_type is missing"));
    }

    #[test]
    fn initialisations_that_leave_the_base_alone_are_read() {
        for init in [json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal"), json!(null)] {
            assert!(read(minimal(json!({ "init_lora_weights": init }))).is_ok());
        }
    }

    #[test]
    fn the_file_written_is_small_and_says_what_is_not_default() {
        let plain = written(json!({}));
        let expected = json!({
            "base_model_name_or_path": "base", "bias": "none", "fan_in_fan_out": false, "inference_mode": true, "lora_alpha": 32,
            "lora_dropout": 0.0, "modules_to_save": null, "peft_type": "LORA", "r": 16, "task_type": "CAUSAL_LM",
            "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        });
        assert_eq!(plain, expected);
        let full = written(json!({
            "target_modules": ["v_proj", "q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": "layers", "lora_alpha": 12.5,
            "rank_pattern": {"v_proj": 4, "q_proj": 2}, "alpha_pattern": {"q_proj": 8.0}, "use_rslora": true, "modules_to_save": ["lm_head"],
            "init_lora_weights": "gaussian"
        }));
        assert_eq!(full["target_modules"], json!(["q_proj", "v_proj"]));
        assert_eq!(full["layers_to_transform"], json!([0]));
        assert_eq!(full["lora_alpha"], json!(12.5));
        assert_eq!(full["alpha_pattern"], json!({"q_proj": 8}));
        assert_eq!(full["modules_to_save"], json!(["lm_head"]));
        // The order decides which pattern counts; the initialisation does not matter any more.
        assert_eq!(full["rank_pattern"].as_object().unwrap().keys().collect::<Vec<_>>(), ["v_proj", "q_proj"]);
        assert!(full.get("init_lora_weights").is_none());
    }

    #[test]
    fn what_is_excluded_is_written_out() {
        let modules = tiny_llama();
        for config in [
            json!({"exclude_modules": ["layers.1.mlp.up_proj", "down_proj"]}),
            json!({"exclude_modules": r".*\.1\..*"}),
            json!({"target_modules": ["q_proj", "v_proj"], "exclude_modules": "model.layers.0.*", "layers_to_transform": [0, 1]}),
            json!({"target_modules": ".*_proj", "exclude_modules": ["gate_proj"]}),
            json!({"modules_to_save": ["1.mlp.up_proj"]}),
        ] {
            let file = written(config.clone());
            assert!(file.get("exclude_modules").is_none());
            let original: LoraConfig = serde_json::from_value(config).unwrap();
            let (read_back, _) = read(file).unwrap();
            assert_eq!(select(&read_back, &modules).unwrap(), select(&original, &modules).unwrap());
        }
    }

    #[test]
    fn a_regular_expression_is_kept() {
        assert_eq!(written(json!({"target_modules": ".*q_proj"}))["target_modules"], json!(".*q_proj"));
    }

    #[test]
    fn servers_rules_are_told() {
        let notes = |value: Value| compatibility_notes(&serde_json::from_value(value).unwrap());
        assert!(notes(json!({})).is_empty());
        for (value, expected) in [
            (json!({"r": 32}), "--max-lora-rank 32"),
            (json!({"r": 300}), "mistral.rs takes ranks up to 256"),
            (json!({"rank_pattern": {"q_proj": 1024}}), "up to 512"),
            (json!({"bias": "all"}), "bias all"),
            (json!({"modules_to_save": ["lm_head"]}), "modules_to_save"),
            (json!({"alpha_pattern": {"q_proj": 8}}), "alpha_pattern"),
            (json!({"target_modules": ["lm_head"]}), "lm_head"),
            (json!({"target_modules": ".*q_proj"}), "a list only"),
        ] {
            let found = notes(value.clone());
            assert!(found.iter().any(|note| note.contains(expected)), "{value}: {found:?}");
        }
    }

    #[test]
    fn a_single_layer_may_be_a_number() {
        let (config, _) = read(minimal(json!({"layers_to_transform": 1}))).unwrap();
        assert_eq!(config.layers_to_transform, Some(OneOrMany::One(1)));
        let (config, _) = read(minimal(json!({"layers_to_transform": 0}))).unwrap();
        assert_eq!(config.layers_to_transform, Some(OneOrMany::One(0)));
    }
}
