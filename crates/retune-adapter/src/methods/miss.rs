//! MiSS (Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure"): a low-rank term whose A is
//! fixed. The input is cut into shards of r elements that are added up, so that A consists of identity matrices side by side, and only B is
//! trained. PEFT holds Bᵀ as `miss_block`, `[r, out]`; in its variant "mini" only the first rows of B are there, and the others repeat them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::{Factor, LowRank, Overlay};
use retune_engine::spec::ModelSpec;
use retune_kernels::dropout;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::check::check_all_values;
use crate::config::{Bias, ModuleSelection, OneOrMany, check_dropout, check_rank, config_error};
use crate::error::Error;
use crate::files::{AdapterFile, Tensors};
use crate::method::{self, Method, MethodInfo, Start};
use crate::names::{BiasTarget, biases_beside};
use crate::peft_config::{self, LORA_ONLY, bad};
use crate::selection::Selection;
use crate::targets::{BaseModules, LinearModule, check_bias};
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
const FIELDS: [&str; 9] = [
    "r",
    "mini_r",
    "bias",
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
    /// How many rows of B are trained; the others repeat them, so that every module's number of outputs must be a multiple (PEFT's `init_weights: mini`). All of them when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mini_r: Option<usize>,
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
    /// Which biases of the base model are trained.
    #[serde(skip_serializing_if = "MissBias::is_none")]
    pub bias: MissBias,
}

/// Which biases of the base model are trained beside MiSS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MissBias {
    /// None of them.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// The biases of the adapted modules.
    #[serde(rename = "MiSS_only")]
    MissOnly,
}

impl MissBias {
    fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// The name in a configuration.
    fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::MissOnly => "MiSS_only",
        }
    }

    /// The same, of any method.
    fn of_any(self) -> Bias {
        match self {
            Self::None => Bias::None,
            Self::All => Bias::All,
            Self::MissOnly => Bias::LoraOnly,
        }
    }
}

impl Default for MissConfig {
    fn default() -> Self {
        Self {
            r: 64,
            mini_r: None,
            miss_dropout: 0.0,
            target_modules: ModuleSelection::Pattern("all-linear".to_owned()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: Vec::new(),
            bias: MissBias::None,
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

/// What the name of a module's B ends with in an adapter's file.
const BLOCK: &str = ".miss_block";

/// The key of a module's B.
fn block(module: &str) -> String {
    format!("base_model.model.{module}{BLOCK}")
}

impl MissConfig {
    /// How many rows B has that are trained, for a module of so many outputs.
    fn rows_of(&self, out_features: usize) -> usize {
        self.mini_r.unwrap_or(out_features)
    }

    /// The biases that are trained beside the selected modules.
    fn biases(&self, modules: &BaseModules<'_>, selected: &[&LinearModule<'_>]) -> Vec<BiasTarget> {
        let is_adapted = |name: &str| selected.iter().any(|module| module.name == name);
        biases_beside(self.bias.of_any(), &self.selection(), modules, is_adapted)
    }

    /// Refuses a module that PEFT does not take, which could read nothing of what is trained here.
    fn check_module(&self, module: &LinearModule<'_>) -> Result<(), Error> {
        let LinearModule { name, in_features, out_features, is_transposed, .. } = module;
        let rows = self.rows_of(*out_features);
        if rows == 0 || out_features % rows != 0 {
            let problem = format!(
                "{rows} does not divide the {out_features} outputs of {name}; give a divisor of all modules' outputs, or name other target_modules"
            );
            return config_error("mini_r", problem);
        }
        if *in_features < self.r {
            let problem = format!("{} is more than the {in_features} elements that {name} reads; lower it", self.r);
            return config_error("r", problem);
        }
        if *is_transposed {
            let problem =
                format!("{name} is a Conv1D, which PEFT's MiSS does not take; use another method for this model");
            return config_error("target_modules", problem);
        }
        Ok(())
    }
}

fn from_peft(path: &Path, mut map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    match map.remove("init_weights") {
        // PEFT reads `mini_r` in its variant "mini" alone, and writes it always.
        None | Some(Value::Null | Value::Bool(_)) => drop(map.remove("mini_r")),
        Some(Value::String(name)) if name == "mini" => {
            map.entry("mini_r").or_insert_with(|| json!(1));
        }
        Some(other) => {
            let problem = format!(
                "is {other}: of PEFT's variants \"bat\" multiplies the weight by what is trained and is no low-rank term, and others are not \
                 known; merge the adapter into its base with PEFT and use the merged model"
            );
            return Err(bad(path, "init_weights", &problem));
        }
    }
    // PEFT takes whatever ends like this.
    if map.get("bias").and_then(Value::as_str).is_some_and(|bias| bias.ends_with("_only")) {
        map.insert("bias".to_owned(), json!(MissBias::MissOnly.as_str()));
    }
    let fields = peft_config::known_fields(path, map, &FIELDS, &[])?;
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
        self.mini_r.map_or(Ok(()), |rows| check_rank("mini_r", rows))?;
        check_dropout("miss_dropout", self.miss_dropout)?;
        self.selection().check()
    }

    fn lower(&self, spec: &ModelSpec, strict: bool) -> Result<Overlay, Error> {
        let modules = BaseModules::of(spec);
        let selection = self.selection();
        let selected = if strict { selection.resolve(&modules) } else { selection.select(&modules) }?;
        selected.iter().try_for_each(|module| self.check_module(module))?;
        if strict {
            self.check_trainable(spec)?;
        }
        let biases = self.biases(&modules, &selected);
        if strict {
            check_bias(self.bias.of_any(), self.bias.as_str(), &modules, !biases.is_empty())?;
        }
        let saved = Saved::of(&selection, spec)?;
        let bias = |module: &str, tensor: &str| {
            let trained = biases.iter().find(|bias| bias.module == module && tensor.ends_with(".bias"));
            trained.map(|bias| bias.key.clone())
        };
        // Modules that read as many elements share an A.
        let mut fixed = BTreeMap::<usize, Arc<[f32]>>::new();
        Ok(walk(
            spec,
            |module, tensor| saved.key(module, tensor).or_else(|| bias(module, tensor)),
            |overlay, id, linear| {
                let name = linear.name.as_str();
                if !selected.iter().any(|module| module.name == name) {
                    return;
                }
                let r = self.r;
                let a = fixed.entry(linear.cols).or_insert_with(|| shards(r, linear.cols)).clone();
                let rows = self.rows_of(linear.rows);
                let b = overlay.layout.add_transposed(block(name), vec![r, rows], None);
                let b = if rows == linear.rows { Factor::Trained(b) } else { Factor::Repeated(b, linear.rows / rows) };
                let term = LowRank {
                    a: Factor::Frozen(a),
                    b,
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

    fn check_file(&self, file: &AdapterFile, modules: &BaseModules<'_>) -> Result<(), Error> {
        for module in self.selection().select(modules)? {
            self.check_module(module)?;
            let name = block(module.name);
            let expected = [self.r, self.rows_of(module.out_features)];
            match file.tensors.get(&name).map(|(shape, _)| shape) {
                None => return Err(Error::TensorMissing { name }),
                Some(shape) if *shape == expected => {}
                Some(shape) => {
                    return Err(Error::TensorShape { name, found: shape.clone(), expected: expected.to_vec() });
                }
            }
        }
        check_all_values(file)
    }

    fn changes_nothing(&self, tensors: &Tensors) -> bool {
        let is_zero = |(key, (_, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            key.ends_with(BLOCK) && values.iter().all(|value| *value == 0.0)
        };
        !tensors.is_empty() && tensors.iter().all(is_zero)
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        let selection = self.selection();
        let names: Vec<&str> = selection.select(modules)?.iter().map(|module| module.name).collect();
        let mut keys = BTreeMap::new();
        peft_config::selection_keys(&selection, &names, modules, &mut keys)?;
        keys.insert("r", json!(self.r));
        keys.insert("miss_dropout", json!(self.miss_dropout));
        keys.insert("mini_r", json!(self.mini_r.unwrap_or(1)));
        keys.insert("init_weights", self.mini_r.map_or(json!(true), |_| json!("mini")));
        keys.insert("bias", json!(self.bias.as_str()));
        Ok(keys)
    }

    fn compatibility_notes(&self) -> Vec<String> {
        vec![format!("{LORA_ONLY}; merge this one")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::adapter;
    use crate::test_model::tiny_llama;

    #[test]
    fn what_peft_does_not_take_and_files_of_another_shape_are_refused() {
        let mut file = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
        let check = |r: usize, shape: [usize; 2]| {
            let names: Vec<String> =
                file.tensors.keys().filter_map(|key| Some(key.strip_suffix(".lora_A.weight")?.to_owned())).collect();
            let tensors = names
                .iter()
                .map(|name| (format!("{name}.miss_block"), (shape.to_vec(), vec![0.5; shape[0] * shape[1]])));
            let method = MissConfig {
                r,
                target_modules: ModuleSelection::List(vec!["q_proj".to_owned()]),
                ..Default::default()
            };
            let file = AdapterFile { method: Arc::new(method), base_model: None, tensors: tensors.collect() };
            file.method.check_file(&file, &tiny_llama()).map_err(|error| error.to_string())
        };
        assert!(check(4, [4, 32]).is_ok());
        assert!(check(4, [3, 32]).unwrap_err().contains("[3, 32]"));
        let large = check(65_536, [4, 32]).unwrap_err();
        assert!(large.contains("65536 is more than the 32 elements"), "{large}");
        file.tensors.clear();
        let empty = AdapterFile { method: Arc::new(MissConfig::default()), ..file };
        assert!(
            empty.method.check_file(&empty, &tiny_llama()).unwrap_err().to_string().starts_with("r: 64 is more than")
        );
    }
}
