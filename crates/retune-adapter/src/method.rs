//! What a method of fine-tuning is to the rest of the program: it lowers itself to an overlay on a model, and says how its parameters
//! start and how PEFT's files hold them. Everything else is the engine's.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use retune_engine::model::Weights;
use retune_engine::overlay::Overlay;
use retune_engine::params::Reparameterisation;
use retune_engine::spec::{Linear, ModelSpec};
use retune_kernels::PanelSource;
use retune_quant::Matrix;
use schemars::{Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::check::check_all_values;
use crate::config::LoraConfig;
use crate::error::Error;
use crate::files::{AdapterFile, Tensors};
use crate::methods::{full, ia3, lora, miss, p_tuning, partial, prefix_tuning, prompt_tuning};
use crate::names;
use crate::targets::BaseModules;

/// A method of fine-tuning, with its settings.
pub trait Method: fmt::Debug + Send + Sync {
    /// What the list of methods says of it.
    fn info(&self) -> &'static MethodInfo;

    /// The peak learning rate where none is given.
    fn learning_rate(&self) -> f64 {
        self.info().learning_rate
    }

    /// Its settings, as the section `adapter` of a run's configuration holds them.
    ///
    /// # Errors
    /// Settings that JSON cannot hold.
    fn settings(&self) -> Result<Value, serde_json::Error>;

    /// Checks everything that can be checked without a model: ranges, contradictions, regular expressions.
    ///
    /// # Errors
    /// [`Error::Config`] and others that begin with the key.
    fn check(&self) -> Result<(), Error>;

    /// Lowers the method to an overlay. `strict` is for a method that somebody wants to begin with: what has no effect is an error then. An
    /// adapter that exists already is taken as PEFT takes it.
    ///
    /// # Errors
    /// Settings that contradict themselves or the model, or have no effect.
    fn lower(&self, spec: &ModelSpec, strict: bool) -> Result<Overlay, Error>;

    /// Fills those parameters that do not take the place of the base's tensors.
    ///
    /// # Errors
    /// What the start reads of the base and cannot.
    fn initialise(
        &self,
        spec: &ModelSpec,
        overlay: &Overlay,
        start: &Start<'_>,
        params: &mut [f32],
    ) -> Result<(), Error>;

    /// Whether what it trains stands before the tokens, where no weight can hold it.
    fn is_soft_prompt(&self) -> bool {
        false
    }

    /// Takes up into the overlay what of the first parameters stays a part of the adapter while they are trained.
    fn keep_start(&self, _overlay: &mut Overlay, _first: &[f32]) {}

    /// Whether [`Method::keep_start`] does anything: a run that goes on needs its first parameters then.
    fn keeps_start(&self) -> bool {
        false
    }

    /// The adapter as it is saved, where that is another than the one that is trained: its method, and its tensors by name.
    fn exported(&self, _overlay: &Overlay, _params: &[f32]) -> Option<(Arc<dyn Method>, Tensors)> {
        None
    }

    /// What computes the parameters in training from others, and the first values of these; nothing where the parameters are trained
    /// themselves.
    fn reparameterisation(&self, _spec: &ModelSpec, _seed: u64) -> Option<(Box<dyn Reparameterisation>, Vec<f32>)> {
        None
    }

    /// The settings that say how parameters start, as far as they are not the defaults: without effect on an adapter that is trained further.
    fn start_settings(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// Refuses what can be used and not trained.
    ///
    /// # Errors
    /// The setting, and what to do.
    fn check_trainable(&self, _spec: &ModelSpec) -> Result<(), Error> {
        Ok(())
    }

    /// The keys of a file in the spelling that layouts use, where there are several; nothing for a copy of what the file holds elsewhere.
    fn spell(&self, keys: &[&str]) -> Vec<Option<String>> {
        keys.iter().map(|key| Some(names::plain(key))).collect()
    }

    /// Checks an adapter of this method against a model's modules, as far as the layout does not say it.
    ///
    /// # Errors
    /// Tensors that are not finite or not whole.
    fn check_file(&self, file: &AdapterFile, _modules: &BaseModules<'_>) -> Result<(), Error> {
        check_all_values(file)
    }

    /// Whether these tensors leave every model as it is, which an adapter does that was not trained.
    fn changes_nothing(&self, _tensors: &Tensors) -> bool {
        false
    }

    /// The keys of `adapter_config.json` beside those that every method has.
    ///
    /// # Errors
    /// Settings that select nothing of the modules, or that JSON cannot hold.
    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error>;

    /// The settings, where they are LoRA's: for what is done with pairs of A and B after training.
    fn lora(&self) -> Option<&LoraConfig> {
        None
    }

    /// What the servers in use would refuse in an adapter of this method, or compute otherwise; empty when all is well.
    fn compatibility_notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What a method may start from.
pub struct Start<'a> {
    /// The seed of everything random.
    pub seed: u64,
    /// A tensor of the base, by its name.
    pub tensor: &'a dyn Fn(&str) -> Result<Matrix, Error>,
    pub texts: &'a Texts<'a>,
}

/// What a method can know of a text that it starts from.
pub struct Texts<'a> {
    /// Its token ids, with those that the tokenizer puts around it.
    pub tokenize: &'a dyn Fn(&str) -> Result<Vec<u32>, Error>,
    /// The keys and values that the base has of tokens, as [`retune_engine::overlay::Prefix`] holds them.
    pub keys_and_values: &'a KeysAndValues<'a>,
}

/// Keys and values of tokens.
pub type KeysAndValues<'a> = dyn Fn(&[u32]) -> Result<Vec<f32>, Error> + 'a;

impl Start<'_> {
    /// The weight of one of the spec's linears; of a tied head the table's.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub(crate) fn weight(&self, spec: &ModelSpec, linear: &Linear) -> Result<Matrix, Error> {
        let is_table = spec.head.tied && linear.name == spec.head.linear.name;
        let module = if is_table { &spec.table.name } else { &linear.name };
        (self.tensor)(&format!("{module}.weight"))
    }
}

/// Reads a method from the keys of an `adapter_config.json`.
pub type FromPeft = fn(&Path, Map<String, Value>) -> Result<Arc<dyn Method>, Error>;

/// What the list of methods says of one.
pub struct MethodInfo {
    /// Its name in a run's configuration.
    pub name: &'static str,
    /// Its name in PEFT's `adapter_config.json`; none for what PEFT makes no adapter of.
    pub peft_type: Option<&'static str>,
    /// In a few words, for people.
    pub what: &'static str,
    /// The peak learning rate where none is given and the settings say nothing else.
    pub learning_rate: f64,
    /// Reads its settings from the section `adapter` of a run's configuration; an empty section stands for the defaults.
    pub read: fn(Value) -> Result<Arc<dyn Method>, serde_json::Error>,
    /// The schema of that section; none for a method without settings.
    pub schema: Option<fn(&mut SchemaGenerator) -> Schema>,
    /// Reads what `adapter_config.json`, whose path is for errors, says beside the keys that every method has.
    pub from_peft: FromPeft,
}

impl PartialEq for MethodInfo {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl fmt::Debug for MethodInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl MethodInfo {
    /// Whether PEFT loads its adapters.
    pub fn is_of_peft(&self) -> bool {
        self.peft_type.is_some_and(|name| !name.starts_with("RETUNE_"))
    }

    /// Whether its result is an adapter, and not a model of its own.
    pub fn saves_adapter(&self) -> bool {
        self.peft_type.is_some()
    }
}

/// All methods; the first is what a run's configuration means that names none.
pub const METHODS: &[&MethodInfo] = &[
    &lora::INFO,
    &miss::INFO,
    &ia3::INFO,
    &prompt_tuning::INFO,
    &p_tuning::INFO,
    &prefix_tuning::INFO,
    &partial::INFO,
    &full::INFO,
];

/// The method of this name in a run's configuration.
pub fn by_name(name: &str) -> Option<&'static MethodInfo> {
    METHODS.iter().copied().find(|method| method.name == name)
}

/// Reads settings by way of serde.
pub(crate) fn read<M: Method + DeserializeOwned + 'static>(value: Value) -> Result<Arc<dyn Method>, serde_json::Error> {
    Ok(Arc::new(serde_json::from_value::<M>(value)?))
}

/// The first values of everything trainable, as one flat vector: the base's own for what takes the place of its tensors, the method's
/// for the rest. What of them stays a part of the adapter is taken up into the overlay.
///
/// # Errors
/// A tensor that cannot be read; a text that cannot be tokenized, or whose keys the base does not keep.
pub fn initial_params<W: Weights>(
    method: &dyn Method,
    spec: &ModelSpec,
    overlay: &mut Overlay,
    weights: &W,
    texts: &Texts<'_>,
    seed: u64,
) -> Result<Vec<f32>, Error>
where
    W::Error: fmt::Display,
{
    let tensor = |name: &str| weights.tensor(name).map_err(|error| Error::Base(error.to_string()));
    let mut params = vec![0.0; overlay.layout.len()];
    for param in overlay.layout.params() {
        let Some(name) = &param.base else { continue };
        let matrix = tensor(name)?;
        matrix.panel_f32(0..matrix.rows(), 0..matrix.cols(), &mut params[param.range.clone()]);
    }
    method.initialise(spec, overlay, &Start { seed, tensor: &tensor, texts }, &mut params)?;
    method.keep_start(overlay, &params);
    Ok(params)
}
