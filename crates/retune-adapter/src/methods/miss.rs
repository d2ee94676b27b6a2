//! MiSS (Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure"): a low-rank term whose A is
//! fixed. The input is cut into shards of r elements that are added up, so that A consists of identity matrices side by side, and only B is
//! trained. PEFT holds Bᵀ as `miss_block`, `[r, out]`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::{Factor, LowRank, Overlay};
use retune_engine::spec::ModelSpec;
use retune_kernels::dropout;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::{ModuleSelection, OneOrMany, check_dropout, check_rank};
use crate::error::Error;
use crate::method::{self, Method, MethodInfo, Start};
use crate::peft_config::{self, bad};
use crate::selection::Selection;
use crate::targets::BaseModules;
use crate::walk::{Saved, walk};

pub static INFO: MethodInfo = MethodInfo {
    name: "miss",
    peft_type: Some("MISS"),
    what: "low-rank terms on chosen linear modules of which only one factor is trained (MiSS)",
    learning_rate: 2e-4,
    read: method::read::<MissConfig>,
    schema: Some(|generator| generator.subschema_for::<MissConfig>()),
    from_peft,
};

/// The keys of `adapter_config.json` that mean the same here.
const FIELDS: [&str; 7] = [
    "r",
    "miss_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
];

/// How MiSS adapts a model: which linear modules get y = xWᵀ + (xAᵀ)Bᵀ with A fixed, and with what rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MissConfig {
    /// Rank of the update: B is [out, r], nothing else is trained.
    pub r: usize,
    /// Probability with which an input element of the adapter is dropped in training, in [0, 1).
    pub miss_dropout: f64,
    /// Modules to adapt: a list of name endings ("q_proj"), a regular expression for the whole name, or "all-linear" (every linear module but the output head).
    pub target_modules: ModuleSelection,
    /// Modules left out again: a list of name endings or a regular expression for the whole name.
    pub exclude_modules: Option<ModuleSelection>,
    /// Layers to adapt, by number; all when absent. Only with a list of target modules.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// Name of the list of layers ("layers"), when it cannot be told from the module names. Only with `layers_to_transform`.
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Modules trained and saved whole, by the end of their names ("lm_head", "embed_tokens").
    pub modules_to_save: Vec<String>,
}

impl Default for MissConfig {
    fn default() -> Self {
        Self {
            r: 64,
            miss_dropout: 0.0,
            target_modules: ModuleSelection::Pattern("all-linear".to_owned()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: Vec::new(),
        }
    }
}

impl MissConfig {
    fn selection(&self) -> Selection<'_> {
        Selection {
            target_modules: &self.target_modules,
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref(),
            modules_to_save: &self.modules_to_save,
        }
    }
}

fn from_peft(path: &Path, mut map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    match map.remove("init_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(other) => {
            let problem = format!(
                "is {other}: \"bat\" is no low-rank term, and \"mini\" repeats one block, and neither is available; merge the adapter into its \
                 base with PEFT and use the merged model"
            );
            return Err(bad(path, "init_weights", &problem));
        }
    }
    if map.get("bias").is_some_and(|bias| bias == "none") {
        map.remove("bias");
    }
    let fields = peft_config::known_fields(path, map, &FIELDS, &["mini_r"])?;
    if !fields.contains_key("target_modules") {
        return Err(bad(path, "target_modules", "is missing or empty; expected the list of modules that were adapted"));
    }
    Ok(Arc::new(peft_config::deserialize::<MissConfig>(path, fields)?))
}

/// A `[r, cols]`: element c of the input is added to sum c mod r.
fn shards(r: usize, cols: usize) -> Arc<[f32]> {
    (0..r).flat_map(|i| (0..cols).map(move |c| f32::from(u8::from(c % r == i)))).collect()
}

impl Method for MissConfig {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn settings(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }

    fn check(&self) -> Result<(), Error> {
        check_rank("r", self.r)?;
        check_dropout("miss_dropout", self.miss_dropout)?;
        self.selection().check()
    }

    fn lower(&self, spec: &ModelSpec, strict: bool) -> Result<Overlay, Error> {
        let modules = BaseModules::of(spec);
        let selection = self.selection();
        let selected = if strict { selection.resolve(&modules) } else { selection.select(&modules) }?;
        if strict {
            self.check_trainable(spec)?;
        }
        let saved = Saved::of(&selection, spec)?;
        // Modules that read as many elements share an A.
        let mut fixed = BTreeMap::<usize, Arc<[f32]>>::new();
        Ok(walk(
            spec,
            |module, tensor| saved.key(module, tensor),
            |overlay, id, linear| {
                let name = linear.name.as_str();
                if !selected.iter().any(|module| module.name == name) {
                    return;
                }
                let r = self.r;
                let a = fixed.entry(linear.cols).or_insert_with(|| shards(r, linear.cols)).clone();
                let key = format!("base_model.model.{name}.miss_block");
                let b = overlay.layout.add_transposed(key, vec![r, linear.rows], None);
                let term = LowRank {
                    a: Factor::Frozen(a),
                    b: Factor::Trained(b),
                    r,
                    scale: 1.0,
                    dropout: self.miss_dropout as f32,
                    key: dropout::module_key(name),
                };
                overlay.linears[id.0].low_rank.push(term);
            },
        ))
    }

    /// B is zero: the adapter starts without effect.
    fn initialise(&self, _: &ModelSpec, _: &Overlay, _: &Start<'_>, _: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    /// The head works on label tokens alone, where the masks of a row's tokens have no meaning.
    fn check_trainable(&self, spec: &ModelSpec) -> Result<(), Error> {
        let modules = BaseModules::of(spec);
        let head = &spec.head.linear.name;
        match self.miss_dropout > 0.0 && self.selection().select(&modules)?.iter().any(|module| module.name == head) {
            true => Err(Error::HeadDropout { field: "miss_dropout" }),
            false => Ok(()),
        }
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        let selection = self.selection();
        let names: Vec<&str> = selection.select(modules)?.iter().map(|module| module.name).collect();
        let mut keys = BTreeMap::new();
        peft_config::selection_keys(&selection, &names, modules, &mut keys)?;
        keys.insert("r", json!(self.r));
        keys.insert("miss_dropout", json!(self.miss_dropout));
        keys.insert("mini_r", json!(1));
        keys.insert("init_weights", json!(true));
        keys.insert("bias", json!("none"));
        Ok(keys)
    }

    fn compatibility_notes(&self) -> Vec<String> {
        vec![
            "vLLM and mistral.rs take LoRA adapters only; convert this one to LoRA, which is exact, or merge it"
                .to_owned(),
        ]
    }
}
