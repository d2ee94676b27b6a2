//! LoRA (Hu et al. 2021) and rsLoRA (Kalajdzievski 2023) with what PEFT lets them train beside: biases and whole modules.

use std::collections::BTreeMap;

use retune_engine::model::Weights;
use retune_engine::overlay::{Factor, LowRank, Overlay};
use retune_engine::spec::{ModelSpec, Module};
use retune_kernels::dropout;

use crate::check::check_against;
use crate::config::LoraConfig;
use crate::error::Error;
use crate::files::AdapterFile;
use crate::init::init_lora;
use crate::method::Method;
use crate::names::{self, trained_biases};
use crate::targets::{self, BaseModules, LoraTarget, resolve_modules_to_save};

/// How far, relative to its norm, a weight quantized to a few bits may lie from itself.
const QUANTIZED: f64 = 0.2;

impl Method for LoraConfig {
    fn lower(&self, spec: &ModelSpec) -> Result<Overlay, Error> {
        let targets = targets::resolve(self, &BaseModules::of(spec))?;
        refuse_head_dropout(self, spec, &targets)?;
        on_targets(self, spec, &targets)
    }

    fn initialise(&self, spec: &ModelSpec, overlay: &Overlay, seed: u64, params: &mut [f32]) {
        for (linear, change) in spec.linears().zip(&overlay.linears) {
            let [LowRank { a: Factor::Trained(a), b: Factor::Trained(b), r, .. }] = &change.low_rank[..] else {
                continue;
            };
            // B follows A.
            let (a, b) = params[a.start..b.end].split_at_mut(a.len());
            init_lora(&linear.name, *r, &self.init_lora_weights, seed, a, b);
        }
    }
}

impl AdapterFile {
    /// Lowers an adapter that exists already, as PEFT takes it: entries of its configuration that match nothing are passed over.
    ///
    /// # Errors
    /// An adapter that does not fit the model.
    pub fn lower(&self, spec: &ModelSpec) -> Result<Overlay, Error> {
        let targets = check_against(self, &BaseModules::of(spec))?;
        on_targets(&self.config, spec, &targets)
    }

    /// The same for training it further.
    ///
    /// # Errors
    /// An adapter that does not fit the model, or cannot be trained.
    pub fn lower_for_training(&self, spec: &ModelSpec) -> Result<Overlay, Error> {
        let targets = check_against(self, &BaseModules::of(spec))?;
        refuse_head_dropout(&self.config, spec, &targets)?;
        on_targets(&self.config, spec, &targets)
    }

    /// The flat vector of an overlay that holds this adapter's tensors.
    ///
    /// # Errors
    /// A trainable tensor that is missing or of another shape, or a tensor that belongs to nothing.
    pub fn params(&self, overlay: &Overlay) -> Result<Vec<f32>, Error> {
        let mut params = vec![0.0; overlay.layout.len()];
        for param in overlay.layout.params() {
            let Some((shape, values)) = self.tensors.get(&param.name) else {
                return Err(Error::TensorMissing { name: param.name.clone() });
            };
            if *shape != param.shape {
                let (name, found) = (param.name.clone(), shape.clone());
                return Err(Error::TensorShape { name, found, expected: param.shape.clone() });
            }
            param.read_file(values, &mut params);
        }
        // PEFT saves the base's own weight beside an adapted head; it is not the adapter's.
        let is_base_weight = |name: &str| matches!(names::parse(name), names::Key::Part(_, names::Part::BaseWeight));
        let belongs = |name: &str| overlay.layout.find(name).is_some() || is_base_weight(name);
        match self.tensors.keys().find(|name| !belongs(name)) {
            Some(name) => Err(Error::TensorUnknown { name: name.clone() }),
            None => Ok(params),
        }
    }
}

impl AdapterFile {
    /// Holds the base's own weights, which PEFT saves beside an adapted head or embedding and loads over the base's, against the base: what
    /// is quantized may differ, another table may not.
    ///
    /// # Errors
    /// A weight that is not the base's.
    pub fn check_base_weights<W: Weights>(&self, base: &W) -> Result<(), Error>
    where
        W::Error: std::fmt::Display,
    {
        for (key, (_, values)) in &self.tensors {
            let names::Key::Part(module, names::Part::BaseWeight) = names::parse(key) else { continue };
            let Ok(matrix) = base.tensor(&format!("{module}.weight")) else { continue };
            let ours = matrix.to_f32();
            let norm: f64 = ours.iter().map(|&v| f64::from(v).powi(2)).sum();
            let difference: f64 = ours.iter().zip(values).map(|(&a, &b)| f64::from(a - b).powi(2)).sum();
            if ours.len() != values.len() || difference > QUANTIZED.powi(2) * norm {
                return Err(Error::OtherBaseWeight { name: key.clone(), module });
            }
        }
        Ok(())
    }
}

/// The tensors of a flat vector (of parameters or of gradients) by name, as files hold them.
pub fn tensors_of(overlay: &Overlay, flat: &[f32]) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let params = overlay.layout.params().iter();
    params.map(|param| (param.name.clone(), (param.shape.clone(), param.to_file(flat)))).collect()
}

/// The head works on label tokens alone, where the masks of a row's tokens have no meaning.
fn refuse_head_dropout(config: &LoraConfig, spec: &ModelSpec, targets: &[LoraTarget]) -> Result<(), Error> {
    let head = &spec.head.linear.name;
    if config.lora_dropout > 0.0 && targets.iter().any(|target| target.module == *head) {
        return Err(Error::HeadDropout);
    }
    Ok(())
}

fn on_targets(config: &LoraConfig, spec: &ModelSpec, targets: &[LoraTarget]) -> Result<Overlay, Error> {
    let modules = BaseModules::of(spec);
    let biases = trained_biases(config, &modules, targets);
    let head = &spec.head.linear;
    let mut all = spec.modules();
    if spec.head.tied {
        all.push(Module::Linear(head));
    }
    let names: Vec<&str> = all.iter().map(Module::name).collect();
    let saved = resolve_modules_to_save(config, &names)?;
    let is_saved = |module: &str| saved.iter().any(|name| name == module);
    if spec.head.tied && is_saved(&head.name) {
        return Err(Error::TiedHeadSaved { head: head.name.clone() });
    }
    let mut overlay = Overlay::of_sizes(spec.linears().count(), spec.vectors().len());
    let (mut linear, mut vector) = (0, 0);
    for module in all {
        let name = module.name();
        let bias_key = if is_saved(name) {
            Some(names::saved_bias(name))
        } else {
            biases.iter().find(|bias| bias.module == name).map(|bias| bias.key.clone())
        };
        for (tensor, shape) in module.tensors() {
            if shape.len() == 2 {
                if !is_saved(name) {
                    continue;
                }
                let key = names::saved_weight(name);
                match module {
                    Module::Linear(of) if of.transposed => {
                        overlay.linears[linear].weight = Some(overlay.layout.add_transposed(key, shape, Some(tensor)));
                    }
                    Module::Linear(_) => {
                        overlay.linears[linear].weight = Some(overlay.layout.add(key, shape, Some(tensor)))
                    }
                    _ if name == spec.table.name => overlay.table = Some(overlay.layout.add(key, shape, Some(tensor))),
                    _ => overlay.positions = Some(overlay.layout.add(key, shape, Some(tensor))),
                }
                continue;
            }
            let is_bias = tensor.ends_with(".bias");
            let key = if is_bias { bias_key.clone() } else { is_saved(name).then(|| names::saved_weight(name)) };
            if let Some(key) = key {
                overlay.vectors[vector] = Some(overlay.layout.add(key, shape, Some(tensor)));
            }
            vector += 1;
        }
        if let Module::Linear(of) = module {
            if let Some(target) = targets.iter().find(|target| target.module == name) {
                let a = Factor::Trained(overlay.layout.add(names::lora_a(name), vec![target.r, of.cols], None));
                let b = Factor::Trained(overlay.layout.add(names::lora_b(name), vec![of.rows, target.r], None));
                let (r, scale, dropout) = (target.r, target.scaling, config.lora_dropout as f32);
                let key = dropout::module_key(name);
                overlay.linears[linear].low_rank.push(LowRank { a, b, r, scale, dropout, key });
            }
            linear += 1;
        }
    }
    Ok(overlay)
}
