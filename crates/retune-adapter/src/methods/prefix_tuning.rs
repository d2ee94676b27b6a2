//! Prefix tuning (Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation"): keys and values that stand before those of
//! every text, in each attention.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::{Overlay, Prefix};
use retune_engine::params::Reparameterisation;
use retune_engine::spec::{ModelSpec, Stack, SubLayer};
use retune_kernels::random;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::prompt_tuning::{OF_THE_MODEL, ROWS, check_virtual_tokens, soft_prompt_keys, virtual_tokens};
use crate::config::config_error;
use crate::encoder::{Activation, Encoder};
use crate::error::Error;
use crate::method::{self, Method, MethodInfo, Start};
use crate::peft_config::{self, LORA_ONLY};
use crate::targets::BaseModules;

pub static INFO: MethodInfo = MethodInfo {
    name: "prefix_tuning",
    peft_type: Some("PREFIX_TUNING"),
    what: "keys and values that stand before those of every text in each layer (prefix tuning)",
    learning_rate: 1e-2,
    read: method::read::<PrefixTuningConfig>,
    schema: Some(|generator| generator.subschema_for::<PrefixTuningConfig>()),
    from_peft,
};

/// The standard deviation of keys and values that start at random.
const DEVIATION: f64 = 0.02;

/// How keys and values start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PrefixInit {
    /// Normal with a standard deviation of 0.02.
    #[default]
    Random,
    /// Zeros: every query gives them a part of its attention, and they give back nothing.
    Zero,
    /// Those that the model has of `prefix_init_text`: it begins as if the text stood before every row.
    Text,
}

/// A prefix and how it starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixTuningConfig {
    /// Keys and values of each attention.
    pub num_virtual_tokens: usize,
    /// How they start: random, zero, or text, the best of them in PEFT's own benchmark. Not with `prefix_projection`, whose network starts at random.
    pub prefix_init: PrefixInit,
    /// The text whose keys and values they start from, such as the instruction. One of fewer tokens than `num_virtual_tokens` is repeated, one of more is cut. Only with `prefix_init` text.
    pub prefix_init_text: Option<String>,
    /// Whether a small network computes them in training, so that they move together.
    pub prefix_projection: bool,
    /// Width of that network's inner layer; that of a layer's keys when absent. Only with `prefix_projection`.
    pub encoder_hidden_size: Option<usize>,
}

impl Default for PrefixTuningConfig {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            prefix_init: PrefixInit::default(),
            prefix_init_text: None,
            prefix_projection: false,
            encoder_hidden_size: None,
        }
    }
}

fn from_peft(path: &Path, mut map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    let num_virtual_tokens = virtual_tokens(path, &mut map)?;
    // The file holds what a projection computed; only training it further needs the projection.
    let projects = map.get("prefix_projection") == Some(&Value::Bool(true));
    let (known, unused) = ("encoder_hidden_size", ["encoder_hidden_size", "init_weights"]);
    let known: &[&str] = if projects { &[known, "prefix_projection"] } else { &[] };
    let unused = if projects { &unused[1..] } else { &unused[..] };
    let mut fields = peft_config::known_fields(path, map, known, &[&OF_THE_MODEL[..], unused].concat())?;
    fields.insert("num_virtual_tokens".to_owned(), json!(num_virtual_tokens));
    Ok(Arc::new(peft_config::deserialize::<PrefixTuningConfig>(path, fields)?))
}

/// Whose keys and values each attention of a decoder that has an encoder reads. PEFT gives layer l of L those of layer 2·l mod L: where L is even,
/// those of the odd layers are read by none and the others by two. Files and numbers follow PEFT's.
///
/// # Errors
/// Sizes for which PEFT itself fails.
fn places_in_decoder(spec: &ModelSpec) -> Result<Vec<usize>, Error> {
    let layers = |stack: &Stack| stack.sub_layers().filter_map(SubLayer::attention).count();
    let (of_all, own) = (spec.stacks().map(layers).max().unwrap_or(0), layers(&spec.decoder));
    let width = spec.key_value_width() / (2 * own).max(1);
    if spec.stacks().map(layers).any(|of_stack| of_stack != of_all) {
        let problem =
            "has no meaning in PEFT for a model with more layers on one side than on the other; take another method";
        return config_error("prefix_tuning", problem.to_owned());
    }
    if width != spec.hidden_size {
        let problem = format!(
            "fails in PEFT for a model whose keys are {width} wide and whose hidden states {}; take another method",
            spec.hidden_size
        );
        return config_error("prefix_tuning", problem);
    }
    Ok((0..own).map(|layer| 2 * layer % own).collect())
}

impl Method for PrefixTuningConfig {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn is_soft_prompt(&self) -> bool {
        true
    }

    fn settings(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }

    fn check(&self) -> Result<(), Error> {
        if self.prefix_projection && self.prefix_init != PrefixInit::Random {
            let problem = "has no effect with prefix_projection, whose network starts at random; remove one of them";
            return config_error("prefix_init", problem.to_owned());
        }
        let text = self.prefix_init_text.as_deref().is_some_and(|text| !text.is_empty());
        match (self.prefix_init == PrefixInit::Text, text) {
            (true, false) => {
                let problem = "is missing or empty; give the text whose keys and values the prefix starts from, such as the instruction";
                return config_error("prefix_init_text", problem.to_owned());
            }
            (false, true) => {
                let problem = "has no effect without prefix_init text; set that, or remove the text";
                return config_error("prefix_init_text", problem.to_owned());
            }
            _ => {}
        }
        if self.encoder_hidden_size.is_some() && !self.prefix_projection {
            let problem = "has no effect without prefix_projection; set that, or remove it".to_owned();
            return config_error("encoder_hidden_size", problem);
        }
        if self.encoder_hidden_size.is_some_and(|size| size == 0 || size > 1 << 16) {
            return config_error("encoder_hidden_size", "is out of range; leave it out for the keys' own".to_owned());
        }
        check_virtual_tokens(self.num_virtual_tokens)
    }

    fn lower(&self, spec: &ModelSpec, _: bool) -> Result<Overlay, Error> {
        let places = if spec.encoder.is_some() { places_in_decoder(spec)? } else { Vec::new() };
        let mut overlay = Overlay::of_sizes(spec.linears().count(), spec.vectors().len());
        let count = self.num_virtual_tokens;
        let values = overlay.layout.add(ROWS.to_owned(), vec![count, spec.key_value_width()], None);
        overlay.prefix = Some(Prefix { values, count, places });
        Ok(overlay)
    }

    fn start_settings(&self) -> Vec<&'static str> {
        if self.prefix_init == PrefixInit::default() { Vec::new() } else { vec!["prefix_init"] }
    }

    fn initialise(&self, spec: &ModelSpec, _: &Overlay, start: &Start<'_>, params: &mut [f32]) -> Result<(), Error> {
        if let Some((map, latent)) = self.reparameterisation(spec, start.seed) {
            map.forward(&latent, params);
            return Ok(());
        }
        match self.prefix_init {
            PrefixInit::Zero => {}
            PrefixInit::Random => {
                let key = random::derive(random::derive(0, start.seed), random::hash(ROWS));
                let values = params.iter_mut().enumerate();
                values.for_each(|(i, v)| *v = (random::normal(key, i as u64) * DEVIATION) as f32);
            }
            PrefixInit::Text => {
                let text = (start.texts.tokenize)(self.prefix_init_text.as_deref().unwrap_or_default())?;
                if text.is_empty() {
                    return config_error("prefix_init_text", "has no tokens; give another text".to_owned());
                }
                let ids: Vec<u32> = text.into_iter().cycle().take(self.num_virtual_tokens).collect();
                params.copy_from_slice(&(start.texts.keys_and_values)(&ids)?);
            }
        }
        Ok(())
    }

    fn reparameterisation(&self, spec: &ModelSpec, seed: u64) -> Option<(Box<dyn Reparameterisation>, Vec<f32>)> {
        if !self.prefix_projection {
            return None;
        }
        let layers = spec.decoder.sub_layers().filter_map(SubLayer::attention).count();
        let keys = spec.key_value_width() / (2 * layers).max(1);
        let widths = [keys, self.encoder_hidden_size.unwrap_or(keys), spec.key_value_width()];
        let encoder = Encoder::new(self.num_virtual_tokens, &widths, "transform", Activation::Tanh);
        let latent = encoder.initial(seed);
        Some((Box::new(encoder), latent))
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        let mut keys = soft_prompt_keys(self.num_virtual_tokens, modules);
        let width = modules.shape.key_value_heads * modules.shape.head_dim;
        // PEFT means the keys' and values' heads here, and their width by the token's.
        keys.insert("token_dim", json!(width));
        keys.insert("num_attention_heads", json!(modules.shape.key_value_heads));
        keys.insert("encoder_hidden_size", json!(self.encoder_hidden_size.unwrap_or(width)));
        keys.insert("prefix_projection", json!(self.prefix_projection));
        Ok(keys)
    }

    fn compatibility_notes(&self) -> Vec<String> {
        vec![format!("{LORA_ONLY}; a prefix cannot be merged")]
    }
}
