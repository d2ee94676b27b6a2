//! A model with an adapter on it, ready to run: what most commands begin with.

use std::path::Path;

use anyhow::{Context, Result};
use retune_adapter::AdapterFile;
use retune_model::adapter::AdapterPlan;
use retune_model::checkpoint::Checkpoint;
use retune_model::model::{Model, Trainable};
use retune_model::tokenizer::Tokenizer;

use crate::args::ModelArgs;
use crate::fetch;

/// A model, its adapter and the flat vector of the adapter's values (empty without one).
pub struct Session {
    pub checkpoint: Checkpoint,
    pub model: Model,
    pub params: Vec<f32>,
}

impl Session {
    /// Opens what the arguments name.
    pub fn open(args: &ModelArgs) -> Result<Self> {
        let checkpoint = Checkpoint::open(&fetch::resolve(&args.model)?)?;
        let Some(directory) = &args.adapter else {
            let model = Model::load(&checkpoint, Trainable::Nothing)?;
            return Ok(Self { checkpoint, model, params: Vec::new() });
        };
        let (model, params, _) = adapted(&checkpoint, directory)?;
        Ok(Self { checkpoint, model, params })
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(self.checkpoint.tokenizer()?)
    }
}

/// Reads an adapter and puts it on a base it fits.
pub fn adapted(checkpoint: &Checkpoint, directory: &Path) -> Result<(Model, Vec<f32>, AdapterFile)> {
    let file = AdapterFile::read(directory)?;
    let put = || -> Result<_> {
        let plan = AdapterPlan::for_file(&file, checkpoint)?;
        let model = Model::load(checkpoint, Trainable::Adapter(&plan))?;
        let params = model.params_from(&file.tensors)?;
        Ok((model, params))
    };
    let (model, params) =
        put().with_context(|| format!("{} does not fit {}", directory.display(), checkpoint.path().display()))?;
    Ok((model, params, file))
}
