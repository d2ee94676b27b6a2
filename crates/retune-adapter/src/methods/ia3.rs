//! (IA)³ (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3): learned
//! vectors that scale what chosen linear modules write, or read where they belong to the feed-forward part.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::{OutputScale, Overlay};
use retune_engine::spec::ModelSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::{ModuleSelection, config_error};
use crate::error::Error;
use crate::files::Tensors;
use crate::method::{self, Method, MethodInfo, Start};
use crate::peft_config::{self, LORA_ONLY};
use crate::selection::Selection;
use crate::targets::{BaseModules, LinearModule};
use crate::walk::{Saved, walk};

pub static INFO: MethodInfo = MethodInfo {
    name: "ia3",
    peft_type: Some("IA3"),
    what: "learned factors on what chosen linear modules read or write ((IA)³)",
    learning_rate: 5e-3,
    read: method::read::<Ia3Config>,
    schema: Some(|generator| generator.subschema_for::<Ia3Config>()),
    from_peft,
};

/// What the name of a module's factors ends with in an adapter's file.
const FACTORS: &str = ".ia3_l";

/// The keys of `adapter_config.json` that mean the same here.
const FIELDS: [&str; 4] = ["target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"];

/// How (IA)³ adapts a model: which linear modules are scaled, and which of them in their inputs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ia3Config {
    /// Modules to scale: a list of name endings or a regular expression for the whole name. When absent PEFT's choice for the model's family: keys (or queries), values and the last projection of the MLP.
    pub target_modules: Option<ModuleSelection>,
    /// Modules left out again: a list of name endings or a regular expression for the whole name.
    pub exclude_modules: Option<ModuleSelection>,
    /// Those of the target modules that are scaled in what they read; the others in what they write. When absent PEFT's choice for the model's family.
    pub feedforward_modules: Option<ModuleSelection>,
    /// Modules trained and saved whole, by the end of their names ("lm_head", "embed_tokens").
    pub modules_to_save: Vec<String>,
}

/// What PEFT 0.21.2 adapts where a configuration says nothing, by model type: the targets, the last of which is the feed-forward one.
const DEFAULTS: [(&str, [&str; 3]); 10] = [
    ("llama", ["k_proj", "v_proj", "down_proj"]),
    ("mistral", ["k_proj", "v_proj", "down_proj"]),
    ("qwen2", ["q_proj", "v_proj", "down_proj"]),
    ("qwen3", ["q_proj", "v_proj", "down_proj"]),
    ("gemma", ["q_proj", "v_proj", "down_proj"]),
    ("gemma2", ["q_proj", "v_proj", "down_proj"]),
    ("gemma3_text", ["q_proj", "v_proj", "down_proj"]),
    ("gpt2", ["c_attn", "c_attn", "mlp.c_proj"]),
    ("bloom", ["query_key_value", "query_key_value", "mlp.dense_4h_to_h"]),
    ("t5", ["k", "v", "wo"]),
];

fn from_peft(path: &Path, map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    // An empty list scales nothing in what it reads; a missing one stands for the family's default.
    let none = map.get("feedforward_modules").filter(|names| names.as_array().is_some_and(Vec::is_empty)).cloned();
    if map.get("target_modules").is_some_and(|names| names.as_array().is_some_and(Vec::is_empty)) {
        return Err(peft_config::bad(
            path,
            "target_modules",
            "is empty; expected the list of modules that were adapted",
        ));
    }
    let mut fields = peft_config::known_fields(path, map, &FIELDS, &["fan_in_fan_out", "init_ia3_weights"])?;
    fields.extend(none.map(|none| ("feedforward_modules".to_owned(), none)));
    Ok(Arc::new(peft_config::deserialize::<Ia3Config>(path, fields)?))
}

/// A configuration whose defaults are those of a family.
struct Chosen {
    targets: ModuleSelection,
    feedforward: ModuleSelection,
}

impl Ia3Config {
    /// The selections, with PEFT's for the family where there is none.
    fn chosen(&self, family: &str) -> Result<Chosen, Error> {
        let default = DEFAULTS.iter().find(|(of, _)| *of == family).map(|(_, names)| names);
        let missing = |field| {
            let problem =
                format!("is missing, and PEFT knows no default for a model of type {family}; name the modules");
            config_error(field, problem)
        };
        let targets = match (&self.target_modules, default) {
            (Some(targets), _) => targets.clone(),
            (None, Some(names)) => {
                let mut names = names.map(str::to_owned).to_vec();
                names.dedup();
                ModuleSelection::List(names)
            }
            (None, None) => return missing("target_modules"),
        };
        let feedforward = match (&self.feedforward_modules, default) {
            (Some(names), _) => names.clone(),
            (None, Some([.., last])) => ModuleSelection::List(vec![(*last).to_owned()]),
            (None, None) => return missing("feedforward_modules"),
        };
        Ok(Chosen { targets, feedforward })
    }

    fn selection<'a>(&'a self, targets: &'a ModuleSelection) -> Selection<'a> {
        Selection {
            target_modules: targets,
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: &self.modules_to_save,
        }
    }
}

/// Whether a module is scaled in what it reads. As in PEFT an entry of a list matches every name that ends with it, without a dot before it.
fn is_feedforward(selection: &ModuleSelection, module: &LinearModule<'_>) -> Result<bool, Error> {
    match selection {
        ModuleSelection::List(names) => Ok(names.iter().any(|name| module.name.ends_with(name.as_str()))),
        ModuleSelection::Pattern(source) => {
            crate::pattern::Pattern::full("feedforward_modules", source)?.is_match(module.name)
        }
    }
}

impl Method for Ia3Config {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn settings(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }

    fn check(&self) -> Result<(), Error> {
        if let Some(targets) = &self.target_modules {
            self.selection(targets).check()?;
        }
        if let (Some(ModuleSelection::List(targets)), Some(ModuleSelection::List(names))) =
            (&self.target_modules, &self.feedforward_modules)
            && let Some(stray) = names.iter().find(|name| !targets.contains(name))
        {
            return config_error(
                "feedforward_modules",
                format!("`{stray}` is not among target_modules; add it there, or take it out here"),
            );
        }
        Ok(())
    }

    fn lower(&self, spec: &ModelSpec, strict: bool) -> Result<Overlay, Error> {
        let modules = BaseModules::of(spec);
        let Chosen { targets, feedforward } = self.chosen(spec.family)?;
        let selection = self.selection(&targets);
        let selected = if strict { selection.resolve(&modules) } else { selection.select(&modules) }?;
        let mut scaled = Vec::new();
        for module in selected {
            scaled.push((module.name, is_feedforward(&feedforward, module)?));
        }
        let names_some = match &self.feedforward_modules {
            None => false,
            Some(ModuleSelection::List(names)) => !names.is_empty(),
            Some(ModuleSelection::Pattern(_)) => true,
        };
        if strict && names_some && scaled.iter().all(|(_, reads)| !reads) {
            return config_error(
                "feedforward_modules",
                "matches none of the target modules; correct it, or leave it out".to_owned(),
            );
        }
        let saved = Saved::of(&selection, spec)?;
        Ok(walk(
            spec,
            |module, tensor| saved.key(module, tensor),
            |overlay, id, linear| {
                let Some((name, reads)) = scaled.iter().find(|(name, _)| *name == linear.name) else { return };
                let shape = if *reads { vec![1, linear.cols] } else { vec![linear.rows, 1] };
                let place = overlay.layout.add(format!("base_model.model.{name}{FACTORS}"), shape, None);
                let change = &mut overlay.linears[id.0];
                if *reads {
                    change.input_scale = Some(place);
                } else {
                    change.output_scale = Some(OutputScale::Plain(place));
                }
            },
        ))
    }

    /// All factors are one.
    fn initialise(&self, _: &ModelSpec, overlay: &Overlay, _: &Start<'_>, params: &mut [f32]) -> Result<(), Error> {
        for change in &overlay.linears {
            let output = match &change.output_scale {
                Some(OutputScale::Plain(place)) => Some(place),
                _ => None,
            };
            for place in [change.input_scale.as_ref(), output].into_iter().flatten() {
                params[place.clone()].fill(1.0);
            }
        }
        Ok(())
    }

    fn changes_nothing(&self, tensors: &Tensors) -> bool {
        let is_one = |(key, (_, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            key.ends_with(FACTORS) && values.iter().all(|value| *value == 1.0)
        };
        !tensors.is_empty() && tensors.iter().all(is_one)
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        let Chosen { targets, feedforward } = self.chosen(modules.family)?;
        let selection = self.selection(&targets);
        let selected = selection.select(modules)?;
        let names: Vec<&str> = selected.iter().map(|module| module.name).collect();
        let mut keys = BTreeMap::new();
        peft_config::selection_keys(&selection, &names, modules, &mut keys)?;
        let mut reading = BTreeSet::new();
        for module in selected {
            if is_feedforward(&feedforward, module)? {
                reading.insert(module.name);
            }
        }
        match keys.get("target_modules").and_then(Value::as_array) {
            None => keys.insert("feedforward_modules", json!(feedforward)),
            // PEFT wants entries of the targets here, and takes one for every name that ends with it.
            Some(targets) => {
                let of = |entry: &str| names.iter().filter(|name| name.ends_with(entry)).collect::<Vec<_>>();
                let entries: Vec<&str> = targets.iter().filter_map(Value::as_str).collect();
                let reads = |name: &&&str| reading.contains(**name);
                let is_one_kind = |entry: &&str| {
                    let of = of(entry);
                    of.iter().all(reads) || !of.iter().any(reads)
                };
                if entries.iter().all(is_one_kind) {
                    let chosen: Vec<&str> =
                        entries.into_iter().filter(|entry| of(entry).first().is_some_and(&reads)).collect();
                    keys.insert("feedforward_modules", json!(chosen))
                } else {
                    keys.insert("target_modules", json!(names));
                    keys.insert("feedforward_modules", json!(reading))
                }
            }
        };
        keys.insert("fan_in_fan_out", json!(names.iter().any(|name| modules.is_transposed(name))));
        keys.insert("init_ia3_weights", json!(true));
        Ok(keys)
    }

    fn compatibility_notes(&self) -> Vec<String> {
        vec![format!("{LORA_ONLY}; merge this one")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_model::tiny_llama;

    /// The keys of a configuration's `adapter_config.json`, which must read back.
    fn written(config: Value) -> (Value, Value) {
        let config: Ia3Config = serde_json::from_value(config).unwrap();
        config.check().unwrap();
        let text = peft_config::to_json(&config, None, &tiny_llama()).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        peft_config::parse(Path::new("adapter_config.json"), value.clone()).unwrap();
        (value["target_modules"].clone(), value["feedforward_modules"].clone())
    }

    #[test]
    fn feedforward_modules_are_written_as_entries_of_the_targets() {
        let all = json!(["down_proj", "k_proj", "v_proj"]);
        assert_eq!(written(json!({})), (all, json!(["down_proj"])));
        // The family's default is none of these targets.
        assert_eq!(written(json!({"target_modules": ["k_proj", "v_proj"]})), (json!(["k_proj", "v_proj"]), json!([])));
        // With a module left out names are written as far as they must be.
        let (targets, reading) =
            written(json!({"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]}));
        assert!(targets.as_array().unwrap().iter().any(|name| name == "q_proj"), "{targets}");
        assert_eq!(reading.as_array().unwrap().len(), 2, "{reading}");
        let none = json!({"target_modules": ["down_proj", "k_proj"], "feedforward_modules": []});
        assert_eq!(written(none).1, json!([]));
    }
}
