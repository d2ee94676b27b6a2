//! Partial fine-tuning: chosen tensors of the model trained in their place, such as its biases alone (BitFit, Ben Zaken et al. 2022), its norms
//! alone, or its last layers. The result holds the trained tensors under their own names; PEFT has no such file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::Overlay;
use retune_engine::spec::{Block, Mix, ModelSpec, Module};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::{ModuleSelection, config_error};
use crate::error::Error;
use crate::method::{self, Method, MethodInfo, Start};
use crate::methods::full;
use crate::pattern::Pattern;
use crate::peft_config;
use crate::selection::{did_you_mean, is_name_or_end, list_ends};
use crate::targets::BaseModules;
use crate::walk::{tie_head, walk};

pub static INFO: MethodInfo = MethodInfo {
    name: "partial",
    peft_type: Some("RETUNE_PARTIAL"),
    what: "chosen parts of the model trained in their place: biases (BitFit), norms, the last layers",
    learning_rate: full::INFO.learning_rate,
    read: method::read::<PartialConfig>,
    schema: Some(|generator| generator.subschema_for::<PartialConfig>()),
    from_peft,
};

/// The peak learning rate where only vectors are trained, which are few and want larger steps.
const VECTORS_LEARNING_RATE: f64 = 1e-3;

const FIELDS: [&str; 4] = ["modules", "biases", "norms", "last_layers"];

/// What of the model is trained: everything that one of the settings names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PartialConfig {
    /// Modules trained whole: a list of name endings ("down_proj", "embed_tokens") or a regular expression for the whole name.
    pub modules: Option<ModuleSelection>,
    /// Train every bias (BitFit).
    pub biases: bool,
    /// Train every norm, with its bias where it has one.
    pub norms: bool,
    /// Train everything in this many of the last layers; of a model with an encoder these are the decoder's.
    pub last_layers: usize,
}

fn from_peft(path: &Path, map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    let fields = peft_config::known_fields(path, map, &FIELDS, &[])?;
    Ok(Arc::new(peft_config::deserialize::<PartialConfig>(path, fields)?))
}

/// Names of a layer's modules.
fn modules_of(block: &Block) -> impl Iterator<Item = &str> {
    block.sub_layers.iter().flat_map(|sub_layer| {
        let qk_norm = match &sub_layer.mix {
            Mix::Attention(attention) => attention.qk_norm.as_ref(),
            Mix::Cross(_) | Mix::Activation { .. } => None,
        };
        let norms = [&sub_layer.norm].into_iter().chain(qk_norm.into_iter().flatten()).chain(&sub_layer.post_norm);
        norms.map(|norm| norm.name.as_str()).chain(sub_layer.linears().map(|linear| linear.name.as_str()))
    })
}

impl PartialConfig {
    /// The names of the modules that `modules` names.
    fn named<'a>(&self, modules: &[Module<'a>], head: &str, tied: bool) -> Result<BTreeSet<&'a str>, Error> {
        let names: Vec<&str> = modules.iter().map(Module::name).collect();
        let mut found = BTreeSet::new();
        match &self.modules {
            None => {}
            Some(ModuleSelection::Pattern(source)) => {
                let pattern = Pattern::full("modules", source)?;
                for name in names {
                    if pattern.is_match(name)? {
                        found.insert(name);
                    }
                }
                if found.is_empty() {
                    return Err(Error::UnknownModule {
                        field: "modules",
                        entry: source.clone(),
                        advice: "A string is a regular expression for the whole name; for a name's end write a list."
                            .to_owned(),
                        available: list_ends(modules.iter().map(Module::name)),
                    });
                }
            }
            Some(ModuleSelection::List(entries)) => {
                for entry in entries {
                    let matched: Vec<&str> = names.iter().copied().filter(|name| is_name_or_end(name, entry)).collect();
                    if matched.is_empty() && tied && is_name_or_end(head, entry) {
                        let problem = format!(
                            "`{entry}` has no weight of its own: this model's head is its embedding table (tie_word_embeddings); name the table"
                        );
                        return config_error("modules", problem);
                    }
                    if matched.is_empty() {
                        return Err(Error::UnknownModule {
                            field: "modules",
                            entry: entry.clone(),
                            advice: did_you_mean(entry, names.iter().copied()),
                            available: list_ends(names.iter().copied()),
                        });
                    }
                    found.extend(matched);
                }
            }
        }
        Ok(found)
    }

    /// The names of the tensors that are trained.
    fn tensors(&self, spec: &ModelSpec) -> Result<BTreeSet<String>, Error> {
        let (modules, layers) = (spec.modules(), spec.decoder.blocks.len());
        if self.last_layers > layers {
            let of_decoder = if spec.encoder.is_some() { "'s decoder" } else { "" };
            let problem = format!("{} is more than the {layers} layers of this model{of_decoder}", self.last_layers);
            return config_error("last_layers", problem);
        }
        let mut whole = self.named(&modules, &spec.head.linear.name, spec.head.tied)?;
        whole.extend(spec.decoder.blocks[layers - self.last_layers..].iter().flat_map(modules_of));
        // They stand in the first layer.
        let buckets = spec.decoder.buckets.as_ref().filter(|_| self.last_layers == layers);
        whole.extend(buckets.map(|buckets| buckets.name.as_str()));
        let mut tensors = BTreeSet::new();
        let mut biases = 0;
        for module in &modules {
            let is_norm = matches!(module, Module::Norm(_));
            for (tensor, _) in module.tensors() {
                let is_bias = tensor.ends_with(".bias");
                biases += usize::from(is_bias);
                if whole.contains(module.name()) || is_norm && self.norms || is_bias && self.biases {
                    tensors.insert(tensor);
                }
            }
        }
        if self.biases && biases == 0 {
            let problem = "this model has no biases to train; set norms: true, or choose another method".to_owned();
            return config_error("biases", problem);
        }
        Ok(tensors)
    }

    /// Whether norm weights and biases are all that is trained.
    fn trains_vectors_alone(&self) -> bool {
        self.modules.is_none() && self.last_layers == 0
    }
}

impl Method for PartialConfig {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn learning_rate(&self) -> f64 {
        if self.trains_vectors_alone() { VECTORS_LEARNING_RATE } else { INFO.learning_rate }
    }

    fn settings(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }

    fn check(&self) -> Result<(), Error> {
        match &self.modules {
            Some(ModuleSelection::List(names)) if names.is_empty() || names.iter().any(String::is_empty) => {
                config_error("modules", "the list or an entry is empty; name modules, or remove it".to_owned())
            }
            Some(ModuleSelection::Pattern(source)) => Pattern::full("modules", source).map(|_| ()),
            None if !self.biases && !self.norms && self.last_layers == 0 => config_error(
                "modules",
                "nothing is chosen to be trained; set modules, biases: true, norms: true or last_layers, or train it all with method full"
                    .to_owned(),
            ),
            _ => Ok(()),
        }
    }

    fn lower(&self, spec: &ModelSpec, _: bool) -> Result<Overlay, Error> {
        let tensors = self.tensors(spec)?;
        let mut overlay = walk(spec, |_, tensor| tensors.contains(tensor).then(|| tensor.to_owned()), |_, _, _| {});
        tie_head(&mut overlay, spec);
        Ok(overlay)
    }

    /// Everything starts from the base's own values.
    fn initialise(&self, _: &ModelSpec, _: &Overlay, _: &Start<'_>, _: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    fn peft_config(&self, _: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        Ok(BTreeMap::from([
            ("modules", json!(self.modules)),
            ("biases", json!(self.biases)),
            ("norms", json!(self.norms)),
            ("last_layers", json!(self.last_layers)),
        ]))
    }

    fn compatibility_notes(&self) -> Vec<String> {
        vec!["PEFT, vLLM and mistral.rs know no file of single tensors; merge it, which gives a model".to_owned()]
    }
}
