//! A model with an adapter on it, ready to run: what most commands begin with.

use std::path::Path;

use anyhow::{Context, Result, bail};
use retune_adapter::AdapterFile;
use retune_model::adapter::AdapterPlan;
use retune_model::checkpoint::Checkpoint;
use retune_model::model::{Model, Trainable};
use retune_text::tokenizer::Tokenizer;

use serde_json::{Value, json};

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
        checkpoint.check_finite()?;
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
    check_provenance(checkpoint, directory)?;
    let (model, params) =
        put().with_context(|| format!("{} does not fit {}", directory.display(), checkpoint.path().display()))?;
    Ok((model, params, file))
}

/// Holds what an adapter of ours says of its base against the base at hand, and warns of another chat template or other weights (training
/// on a quantized base and using it on the full one is legitimate).
///
/// # Errors
/// Another tokenizer, to which the adapter's tokens mean other texts; a damaged `retune.json`. An adapter without that file says nothing.
pub fn check_provenance(checkpoint: &Checkpoint, directory: &Path) -> Result<()> {
    let path = directory.join("retune.json");
    let Ok(text) = std::fs::read(&path) else { return Ok(()) };
    let record: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is damaged; remove it to use the adapter without its history", path.display()))?;
    let (adapter, base) = (directory.display(), checkpoint.path().display());
    // What needs a tokenizer says itself that there is none.
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        if record["tokenizer_hash"].as_str().is_some_and(|hash| hash != tokenizer.content_hash()) {
            let trained_on = record["run"]["model"].as_str().unwrap_or("the base it was trained on");
            bail!(
                "{adapter} was trained with another tokenizer than that of {base}, so that its token ids mean other texts there; give it \
                 {trained_on}, or another model with that tokenizer"
            );
        }
        let template = json!(tokenizer.chat_template().map(|template| template.hash()));
        if record.get("chat_template_hash").is_some_and(|hash| *hash != template) {
            note!("! {adapter} was trained with another chat template than that of {base}");
        }
    }
    if record["run"]["base_content_hash"].as_str().is_some_and(|hash| hash != checkpoint.content_hash()) {
        note!("! {adapter} was trained on other weights than those of {base}");
    }
    Ok(())
}
