//! An adapter on a model: what its configuration means for this base, and its tensors in and out of the flat vector.

use std::collections::{BTreeMap, BTreeSet};

use retune_adapter::config::LoraConfig;
use retune_adapter::names::{self, Key, Part};
use retune_adapter::targets::{self, LinearModule, LoraTarget};
use retune_adapter::{AdapterFile, check_against};

use crate::checkpoint::{Checkpoint, expected_tensors};
use crate::error::Error;
use crate::model::Model;

/// Named tensors with their shapes, as an adapter's file holds them.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// What an adapter trains, resolved against a base.
#[derive(Clone, Debug, Default)]
pub struct AdapterPlan {
    pub targets: Vec<LoraTarget>,
    pub lora_dropout: f32,
    /// Modules whose bias is trained.
    pub biases: BTreeSet<String>,
    /// Modules trained whole and saved with the adapter.
    pub modules_to_save: BTreeSet<String>,
}

impl AdapterPlan {
    /// Resolves a configuration against the modules of a base, strictly: for training.
    ///
    /// # Errors
    /// A configuration that contradicts itself, or has an entry without effect.
    pub fn new(config: &LoraConfig, checkpoint: &Checkpoint) -> Result<Self, Error> {
        let modules = checkpoint.linear_modules();
        let targets = targets::resolve(config, &linear_modules(&modules))?;
        Self::with_targets(config, checkpoint, targets)?.for_training()
    }

    /// Resolves an adapter that exists already for training it further: as [`Self::for_file`], but for what training cannot do.
    ///
    /// # Errors
    /// An adapter that does not fit the base, or cannot be trained.
    pub fn to_continue(file: &AdapterFile, checkpoint: &Checkpoint) -> Result<Self, Error> {
        Self::for_file(file, checkpoint)?.for_training()
    }

    fn for_training(self) -> Result<Self, Error> {
        if self.lora_dropout > 0.0 && self.targets.iter().any(|target| target.module == "lm_head") {
            return Err(Error::HeadDropout);
        }
        Ok(self)
    }

    /// Resolves an adapter that exists already, as peft does: entries of its configuration that match nothing are passed over.
    ///
    /// # Errors
    /// An adapter that does not fit the base.
    pub fn for_file(file: &AdapterFile, checkpoint: &Checkpoint) -> Result<Self, Error> {
        let modules = checkpoint.linear_modules();
        let targets = check_against(file, &linear_modules(&modules))?;
        Self::with_targets(&file.config, checkpoint, targets)
    }

    fn with_targets(config: &LoraConfig, checkpoint: &Checkpoint, targets: Vec<LoraTarget>) -> Result<Self, Error> {
        let modules = checkpoint.linear_modules();
        let biases = names::trained_biases(config, &linear_modules(&modules), &targets);
        let mut holders = module_names(checkpoint);
        let tied = checkpoint.config.tie_word_embeddings;
        if tied {
            holders.push("lm_head".to_owned());
        }
        let holders: Vec<&str> = holders.iter().map(String::as_str).collect();
        let saved = targets::resolve_modules_to_save(config, &holders)?;
        if tied && saved.iter().any(|module| module == "lm_head") {
            return Err(Error::TiedHeadSaved);
        }
        Ok(Self {
            targets,
            lora_dropout: config.lora_dropout as f32,
            biases: biases.into_iter().map(|b| b.module).collect(),
            modules_to_save: saved.into_iter().collect(),
        })
    }
}

/// The form in which target matching takes a checkpoint's linear modules.
pub fn linear_modules(modules: &[(String, usize, usize, bool, bool)]) -> Vec<LinearModule<'_>> {
    modules
        .iter()
        .map(|(name, in_features, out_features, has_bias, is_output_head)| LinearModule {
            name,
            in_features: *in_features,
            out_features: *out_features,
            has_bias: *has_bias,
            is_output_head: *is_output_head,
        })
        .collect()
}

/// All modules of a base that hold a weight.
fn module_names(checkpoint: &Checkpoint) -> Vec<String> {
    let weights = expected_tensors(&checkpoint.config).into_iter();
    weights.filter_map(|(name, _)| name.strip_suffix(".weight").map(str::to_owned)).collect()
}

impl Model {
    /// The flat vector that holds the given tensors.
    ///
    /// # Errors
    /// A trainable tensor that is missing or of another shape, or a tensor that belongs to nothing.
    pub fn params_from(&self, tensors: &Tensors) -> Result<Vec<f32>, Error> {
        let mut params = vec![0.0; self.layout.len()];
        for param in self.layout.params() {
            let Some((shape, values)) = tensors.get(&param.name) else {
                return Err(Error::AdapterTensorMissing { name: param.name.clone() });
            };
            if *shape != param.shape {
                return Err(Error::AdapterShape {
                    name: param.name.clone(),
                    found: shape.clone(),
                    expected: param.shape.clone(),
                });
            }
            params[param.range.clone()].copy_from_slice(values);
        }
        let known: BTreeSet<&str> = self.layout.params().iter().map(|p| p.name.as_str()).collect();
        // peft saves the base's own weight beside an adapted head; it is not the adapter's.
        let belongs = |name: &str| known.contains(name) || is_base_weight(name);
        match tensors.keys().find(|name| !belongs(name)) {
            Some(name) => Err(Error::AdapterTensorUnknown { name: name.clone() }),
            None => Ok(params),
        }
    }

    /// The tensors of the flat vector (of parameters or of gradients) by name.
    pub fn tensors_of(&self, values: &[f32]) -> Tensors {
        let tensor = |p: &crate::params::Param| (p.name.clone(), (p.shape.clone(), values[p.range.clone()].to_vec()));
        self.layout.params().iter().map(tensor).collect()
    }
}

fn is_base_weight(name: &str) -> bool {
    matches!(names::parse(name), Key::Part(_, Part::BaseWeight))
}
