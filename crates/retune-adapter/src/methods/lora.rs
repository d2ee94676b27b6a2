//! LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024) with what PEFT lets them train beside: biases and whole modules.

use std::collections::{BTreeMap, BTreeSet};

use retune_engine::overlay::{Factor, LowRank, OutputScale, Overlay};
use retune_engine::row_norms::row_norms;
use retune_engine::spec::ModelSpec;
use retune_kernels::dropout;
use serde_json::Value;

use crate::check::check_against;
use crate::config::{InitLoraWeights, LoraConfig};
use crate::error::Error;
use crate::files::AdapterFile;
use crate::init::init_lora;
use crate::method::{self, Method, MethodInfo, Start};
use crate::names::{self, Key, Part, trained_biases};
use crate::peft_config;
use crate::targets::{self, BaseModules, LoraTarget};
use crate::walk::{Saved, walk};

pub static INFO: MethodInfo = MethodInfo {
    name: "lora",
    peft_type: Some("LORA"),
    what: "low-rank adapters on chosen linear modules (LoRA, rsLoRA, DoRA)",
    learning_rate: 2e-4,
    read: method::read::<LoraConfig>,
    schema: Some(|generator| generator.subschema_for::<LoraConfig>()),
    from_peft: peft_config::lora,
};

impl Method for LoraConfig {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn settings(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }

    fn check(&self) -> Result<(), Error> {
        LoraConfig::check(self)
    }

    fn lower(&self, spec: &ModelSpec, strict: bool) -> Result<Overlay, Error> {
        let modules = BaseModules::of(spec);
        let targets = if strict { targets::resolve(self, &modules) } else { targets::select(self, &modules) }?;
        if strict {
            self.check_trainable(spec)?;
        }
        on_targets(self, spec, &targets)
    }

    fn initialise(
        &self,
        spec: &ModelSpec,
        overlay: &Overlay,
        start: &Start<'_>,
        params: &mut [f32],
    ) -> Result<(), Error> {
        for (linear, change) in spec.linears().zip(&overlay.linears) {
            let [LowRank { a: Factor::Trained(a), b: Factor::Trained(b), r, .. }] = &change.low_rank[..] else {
                continue;
            };
            // B follows A.
            let (a, b) = params[a.start..b.end].split_at_mut(a.len());
            init_lora(&linear.name, *r, &self.init_lora_weights, start.seed, a, b);
            if let Some(OutputScale::OverNorm(magnitudes)) = &change.output_scale {
                let is_table = spec.head.tied && linear.name == spec.head.linear.name;
                let module = if is_table { &spec.table.name } else { &linear.name };
                let weight = (start.tensor)(&format!("{module}.weight"))?;
                // The norms as the engine computes them, so that a B of zeros changes nothing.
                let norms = row_norms(&weight, change, params);
                params[magnitudes.clone()].copy_from_slice(&norms);
            }
        }
        Ok(())
    }

    fn start_settings(&self) -> Vec<&'static str> {
        let is_default = self.init_lora_weights == InitLoraWeights::default();
        if is_default { Vec::new() } else { vec!["init_lora_weights"] }
    }

    /// The head works on label tokens alone, where the masks of a row's tokens have no meaning.
    fn check_trainable(&self, spec: &ModelSpec) -> Result<(), Error> {
        let targets = targets::select(self, &BaseModules::of(spec))?;
        let head = &spec.head.linear.name;
        if self.lora_dropout > 0.0 && targets.iter().any(|target| target.module == *head) {
            return Err(Error::HeadDropout { field: "lora_dropout" });
        }
        Ok(())
    }

    fn spell(&self, keys: &[&str]) -> Vec<Option<String>> {
        let adapted: BTreeSet<String> = keys
            .iter()
            .filter_map(|key| match names::parse(key) {
                Key::Part(module, Part::LoraA | Part::LoraB) => Some(module),
                _ => None,
            })
            .collect();
        let spelled = |key: &&str| match names::parse(key) {
            Key::Part(module, Part::Bias) => Some(names::trained_bias(&module, adapted.contains(&module))),
            Key::Part(module, part) => Some(part.key(&module)),
            Key::Copy => None,
            Key::Unknown => Some((*key).to_owned()),
        };
        keys.iter().map(spelled).collect()
    }

    fn check_file(&self, file: &AdapterFile, modules: &BaseModules<'_>) -> Result<(), Error> {
        check_against(self, file, modules).map(|_| ())
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        let targets = targets::select(self, modules)?;
        Ok(peft_config::lora_keys(self, &targets, modules)?)
    }

    fn lora(&self) -> Option<&LoraConfig> {
        Some(self)
    }

    fn compatibility_notes(&self) -> Vec<String> {
        peft_config::compatibility_notes(self)
    }
}

fn on_targets(config: &LoraConfig, spec: &ModelSpec, targets: &[LoraTarget]) -> Result<Overlay, Error> {
    let biases = trained_biases(config, &BaseModules::of(spec), targets);
    let saved = Saved::of(&config.selection(), spec)?;
    let bias = |module: &str, tensor: &str| {
        let trained = biases.iter().find(|bias| bias.module == module && tensor.ends_with(".bias"));
        trained.map(|bias| bias.key.clone())
    };
    let key = |module: &str, tensor: &str| saved.key(module, tensor).or_else(|| bias(module, tensor));
    Ok(walk(spec, key, |overlay, id, linear| {
        let name = linear.name.as_str();
        let Some(target) = targets.iter().find(|target| target.module == name) else { return };
        let a = Factor::Trained(overlay.layout.add(names::lora_a(name), vec![target.r, linear.cols], None));
        let b = Factor::Trained(overlay.layout.add(names::lora_b(name), vec![linear.rows, target.r], None));
        let (r, scale, dropout) = (target.r, target.scaling, config.lora_dropout as f32);
        overlay.linears[id.0].low_rank.push(LowRank { a, b, r, scale, dropout, key: dropout::module_key(name) });
        if config.use_dora {
            let magnitudes = overlay.layout.add(names::lora_magnitude(name), vec![linear.rows], None);
            overlay.linears[id.0].output_scale = Some(OutputScale::OverNorm(magnitudes));
        }
    }))
}
