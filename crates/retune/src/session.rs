//! A model with an adapter on it, ready to run: what most commands begin with.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Error, Result, bail};
use retune_adapter::AdapterFile;
use retune_adapter::files::CONFIG_FILE;
use retune_engine::generate::{Generation, Sampling};
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_engine::spec::ModelSpec;
use retune_formats::stamp::{Stamp, StampFile};
use retune_model::checkpoint::Checkpoint;
use retune_text::tokenizer::Tokenizer;
use retune_train::data::Example;
use serde_json::{Value, json};

use crate::args::{ModelArgs, NO_ADAPTER, NamedAdapter};
use crate::run_folder::RunFolder;
use crate::{fetch, storage};

/// Where stamps are kept, within the cache. No model's folder begins with a dot.
pub const STAMPS: &str = ".stamps";

/// The file beside an adapter of ours that says where it comes from.
pub const PROVENANCE: &str = "retune.json";

/// A base model, opened, of which nothing is read twice: neither its tokenizer by one command, nor all its weights by one after another.
pub struct Base {
    pub checkpoint: Checkpoint,
    stamp: Option<StampFile>,
    tokenizer: OnceLock<Tokenizer>,
}

impl Base {
    /// Opens a model, and says what its files leave unsaid.
    pub fn open(path: &Path) -> Result<Self> {
        let base = Self::again(path)?;
        for text in base.checkpoint.notes() {
            note!("! {text}");
        }
        Ok(base)
    }

    /// Opens a model of which everything has been said.
    pub fn again(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let stamps = fetch::cache_dir().map(|cache| cache.join(STAMPS)).ok();
        let stamp = stamps.and_then(|folder| StampFile::of(&folder, checkpoint.files()));
        Ok(Self { checkpoint, stamp, tokenizer: OnceLock::new() })
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        if let Some(tokenizer) = self.tokenizer.get() {
            return Ok(tokenizer);
        }
        let tokenizer = self.checkpoint.tokenizer()?;
        Ok(self.tokenizer.get_or_init(|| tokenizer))
    }

    /// The token ids of a text with those that the tokenizer puts around it, for a method that starts from it.
    ///
    /// # Errors
    /// No tokenizer, or a text that it cannot take.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, retune_adapter::Error> {
        let failed = |error: Error| retune_adapter::Error::Base(format!("{error:#}"));
        self.tokenizer().map_err(failed)?.encode_with_special_tokens(text).map_err(|error| failed(error.into()))
    }

    /// The keys and values that the model has of tokens, for a method that starts from them.
    ///
    /// # Errors
    /// More tokens than a window of the model keeps; a model with an encoder.
    pub fn keys_and_values(model: &Model, ids: &[u32]) -> Result<Vec<f32>, retune_adapter::Error> {
        if model.spec.encoder.is_some() {
            let problem = "the decoder of a model with an encoder reads no text that a prefix could start from: set prefix_init to random or zero";
            return Err(retune_adapter::Error::Base(problem.to_owned()));
        }
        let nothing = Overlay::empty(model);
        let mut generation = Generation::new(model, &nothing, &[], Sampling::GREEDY);
        generation.read(ids);
        generation.keys_and_values().ok_or_else(|| {
            let count = ids.len();
            retune_adapter::Error::Base(format!(
                "a window of the model has let go of the first of {count} tokens, whose keys a prefix would start from: lower num_virtual_tokens"
            ))
        })
    }

    /// As [`Checkpoint::check_finite`], but reads the weights only if they have changed since it last did.
    pub fn check_finite(&self) -> Result<()> {
        let known = self.known();
        if !known.finite {
            self.checkpoint.check_finite()?;
            self.learn(&Stamp { finite: true, ..known });
        }
        Ok(())
    }

    /// As [`Checkpoint::content_hash`], but reads the weights only if they have changed since it last did.
    pub fn content_hash(&self) -> String {
        let known = self.known();
        if let Some(hash) = known.content_hash {
            return hash;
        }
        let hash = self.checkpoint.content_hash();
        self.learn(&Stamp { content_hash: Some(hash.clone()), ..known });
        hash
    }

    fn known(&self) -> Stamp {
        self.stamp.as_ref().map(StampFile::read).unwrap_or_default()
    }

    fn learn(&self, stamp: &Stamp) {
        if let Some(file) = &self.stamp {
            file.write(stamp);
        }
    }
}

/// A model, what stands on it (nothing without an adapter), and the flat vector of its values.
pub struct Session {
    pub base: Base,
    pub model: Model,
    pub overlay: Overlay,
    pub params: Vec<f32>,
}

impl Session {
    /// Opens what the arguments name.
    pub fn open(args: &ModelArgs) -> Result<Self> {
        let mut base = Base::open(&fetch::resolve(&args.model)?)?;
        base.check_finite()?;
        let held = storage::under(&base, args.adapter.as_deref(), args.storage)?;
        storage::hold(&mut base, held)?;
        let model = base.checkpoint.model()?;
        let (overlay, params) = match &args.adapter {
            None => (Overlay::empty(&model), Vec::new()),
            Some(directory) => {
                let (overlay, params, _) = adapted(&base, directory)?;
                (overlay, params)
            }
        };
        Ok(Self { base, model, overlay, params })
    }
}

/// What stands on a model under a name.
pub struct Loaded {
    pub name: String,
    /// The method, in words.
    pub method: &'static str,
    pub overlay: Overlay,
    pub params: Vec<f32>,
}

impl Loaded {
    /// The base alone.
    pub fn nothing(model: &Model) -> Self {
        let (overlay, params) = (Overlay::empty(model), Vec::new());
        Self { name: NO_ADAPTER.to_owned(), method: "the base alone", overlay, params }
    }

    /// Reads adapters for a base they fit.
    ///
    /// # Errors
    /// Two of the same name, and those of [`adapted`].
    pub fn all(base: &Base, model: &Model, adapters: &[NamedAdapter]) -> Result<Vec<Self>> {
        let mut names: Vec<&str> = adapters.iter().map(|adapter| adapter.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            bail!("two adapters have the name {}: give each its own", pair[0]);
        }
        let load = |NamedAdapter { name, path }: &NamedAdapter| {
            if name == NO_ADAPTER {
                return Ok(Self::nothing(model));
            }
            let (overlay, params, file) = adapted(base, path)?;
            Ok(Self { name: name.clone(), method: file.method.info().name, overlay, params })
        };
        adapters.iter().map(load).collect()
    }
}

/// Refuses rows that are longer than a model with learned positions has positions for, after what the overlay puts before them. `key` is
/// what bounds a row's length.
pub fn refuse_long_rows(spec: &ModelSpec, overlay: &Overlay, examples: &[Example], key: &str) -> Result<()> {
    let Some(most) = overlay.most_tokens(spec) else { return Ok(()) };
    let Some(example) = examples.iter().find(|example| example.ids.len() > most) else { return Ok(()) };
    let all = spec.most_positions().unwrap_or(most);
    if most == 0 {
        bail!(
            "the model has learned positions for {all} tokens, and what is put before each row takes them all: lower num_virtual_tokens"
        );
    }
    let after =
        if most < all { format!(" after the {} that are put before each row", all - most) } else { String::new() };
    bail!(
        "row {} has {} tokens, and the model has learned positions for {most}{after}: set {key} to {most} or less",
        example.row + 1,
        example.ids.len()
    )
}

/// The folder of the adapter that somebody means, as [`find_adapter`] finds it; says so where it is another.
///
/// # Errors
/// The folder of a run that has no adapter.
pub fn adapter_folder(directory: &Path) -> Result<PathBuf> {
    let found = find_adapter(directory)?;
    if found != directory {
        note!("{} is the folder of a run: taking {}", directory.display(), found.display());
    }
    Ok(found)
}

/// The folder of the adapter that somebody means: this one, or where it is a run's the one in it.
///
/// # Errors
/// The folder of a run that has no adapter.
pub fn find_adapter(directory: &Path) -> Result<PathBuf> {
    let is_adapter = |folder: &Path| folder.join(CONFIG_FILE).exists();
    let run = RunFolder { root: directory.to_owned() };
    if is_adapter(directory) || !run.is_run() {
        return Ok(directory.to_owned());
    }
    let [adapter, model] = run.written();
    let name = directory.display();
    if is_adapter(&adapter) {
        return Ok(adapter);
    }
    if model.is_dir() {
        bail!(
            "{name} is the folder of a run that trained a whole model: give --model {}, without an adapter",
            model.display()
        );
    }
    bail!("{name} is the folder of a run that has not written its adapter yet: let it end (retune train --resume)")
}

/// Reads an adapter for a base it fits: what it lays on the base, and its values.
pub fn adapted(base: &Base, directory: &Path) -> Result<(Overlay, Vec<f32>, AdapterFile)> {
    let directory = &adapter_folder(directory)?;
    let file = AdapterFile::read(directory)?;
    let checkpoint = &base.checkpoint;
    let lower = || -> Result<_> {
        let overlay = file.lower(&checkpoint.spec)?;
        let params = file.params(&overlay)?;
        file.check_base_weights(checkpoint)?;
        Ok((overlay, params))
    };
    check_provenance(base, directory)?;
    let (overlay, params) =
        lower().with_context(|| format!("{} does not fit {}", directory.display(), checkpoint.path().display()))?;
    Ok((overlay, params, file))
}

/// Holds what an adapter of ours says of its base against the base at hand, and warns of another chat template or other weights (training
/// on a quantized base and using it on the full one is legitimate).
///
/// # Errors
/// Another tokenizer, to which the adapter's tokens mean other texts; a damaged `retune.json`. An adapter without that file says nothing.
pub fn check_provenance(base: &Base, directory: &Path) -> Result<()> {
    let Some(record) = provenance(directory)? else { return Ok(()) };
    check_tokens(base, directory, &record)?;
    if record["run"]["base_content_hash"].as_str().is_some_and(|hash| hash != base.content_hash()) {
        let (adapter, model) = (directory.display(), base.checkpoint.path().display());
        note!("! {adapter} was trained on other weights than those of {model}");
    }
    Ok(())
}

/// What is kept of the run that made an adapter in the record of what is made of that adapter: its base, and how that was held.
pub fn run_of(model: Option<&String>, base_content_hash: &Value, storage: Option<&Value>) -> Value {
    let mut run = json!({ "model": model, "base_content_hash": base_content_hash });
    if let Some(storage) = storage {
        run["base"] = json!({ "storage": storage });
    }
    run
}

/// What an adapter of ours says of where it comes from.
///
/// # Errors
/// A damaged `retune.json`.
pub fn provenance(directory: &Path) -> Result<Option<Value>> {
    let path = directory.join(PROVENANCE);
    let Ok(text) = std::fs::read(&path) else { return Ok(None) };
    let record = serde_json::from_slice(&text);
    record
        .map(Some)
        .with_context(|| format!("{} is damaged; remove it to use the adapter without its history", path.display()))
}

/// The part of [`check_provenance`] that is about tokens, for a base whose weights are known to be others.
///
/// # Errors
/// Another tokenizer.
pub fn check_tokens(base: &Base, directory: &Path, record: &Value) -> Result<()> {
    let (adapter, model) = (directory.display(), base.checkpoint.path().display());
    // What needs a tokenizer says itself that there is none.
    if let Ok(tokenizer) = base.tokenizer() {
        if record["tokenizer_hash"].as_str().is_some_and(|hash| hash != tokenizer.content_hash()) {
            let trained_on = record["run"]["model"].as_str().unwrap_or("the base it was trained on");
            bail!(
                "{adapter} was trained with another tokenizer than that of {model}, so that its token ids mean other texts there; give it \
                 {trained_on}, or another model with that tokenizer"
            );
        }
        let template = json!(tokenizer.chat_template().map(|template| template.hash()));
        if record.get("chat_template_hash").is_some_and(|hash| *hash != template) {
            note!("! {adapter} was trained with another chat template than that of {model}");
        }
    }
    Ok(())
}
