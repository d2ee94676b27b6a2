//! P-tuning (Liu et al. 2021, "GPT Understands, Too"): a soft prompt whose rows a small network computes while it is trained, so that they move
//! together.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::Overlay;
use retune_engine::params::Reparameterisation;
use retune_engine::spec::ModelSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::prompt_tuning::{
    OF_THE_MODEL, add_rows, check_virtual_tokens, rows_in_files, soft_prompt_keys, virtual_tokens,
};
use crate::config::config_error;
use crate::encoder::{Activation, Encoder};
use crate::error::Error;
use crate::method::{self, Method, MethodInfo, Start};
use crate::peft_config::{self, LORA_ONLY};
use crate::targets::BaseModules;

pub static INFO: MethodInfo = MethodInfo {
    name: "p_tuning",
    peft_type: Some("P_TUNING"),
    what: "a soft prompt whose rows a small network computes in training (P-tuning)",
    learning_rate: 1e-3,
    read: method::read::<PTuningConfig>,
    schema: Some(|generator| generator.subschema_for::<PTuningConfig>()),
    from_peft,
};

/// The network that computes the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum EncoderType {
    /// Three linear layers with ReLU between them.
    #[default]
    Mlp,
    /// A bidirectional LSTM under two linear layers. Its adapters are read; it cannot be trained here.
    Lstm,
}

/// A soft prompt and the network behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PTuningConfig {
    /// Rows of the soft prompt.
    pub num_virtual_tokens: usize,
    /// The network: MLP (LSTM is read, not trained).
    pub encoder_reparameterization_type: EncoderType,
    /// Width of the network's inner layers; the model's hidden size when absent.
    pub encoder_hidden_size: Option<usize>,
}

impl Default for PTuningConfig {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            encoder_reparameterization_type: EncoderType::default(),
            encoder_hidden_size: None,
        }
    }
}

fn from_peft(path: &Path, mut map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    let num_virtual_tokens = virtual_tokens(path, &mut map)?;
    let known = ["encoder_reparameterization_type", "encoder_hidden_size"];
    // The file holds the rows, whatever computed them.
    let trained = ["encoder_num_layers", "encoder_dropout", "init_weights"];
    let mut fields = peft_config::known_fields(path, map, &known, &[&OF_THE_MODEL[..], &trained].concat())?;
    fields.insert("num_virtual_tokens".to_owned(), json!(num_virtual_tokens));
    Ok(Arc::new(peft_config::deserialize::<PTuningConfig>(path, fields)?))
}

impl Method for PTuningConfig {
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
        if self.encoder_hidden_size.is_some_and(|size| size == 0 || size > 1 << 16) {
            return config_error("encoder_hidden_size", "is out of range; leave it out for the model's own".to_owned());
        }
        check_virtual_tokens(self.num_virtual_tokens)
    }

    fn lower(&self, spec: &ModelSpec, strict: bool) -> Result<Overlay, Error> {
        if strict {
            self.check_trainable(spec)?;
        }
        let mut overlay = Overlay::of_sizes(spec.linears().count(), spec.vectors().len());
        add_rows(&mut overlay, spec, self.num_virtual_tokens);
        Ok(overlay)
    }

    fn check_trainable(&self, _: &ModelSpec) -> Result<(), Error> {
        match self.encoder_reparameterization_type {
            EncoderType::Mlp => Ok(()),
            EncoderType::Lstm => config_error(
                "encoder_reparameterization_type",
                "LSTM can be used and not trained: a recurrent network over a few rows is slower than the MLP and no better; take MLP"
                    .to_owned(),
            ),
        }
    }

    /// The rows are what the network makes of its first values.
    fn initialise(&self, spec: &ModelSpec, _: &Overlay, start: &Start<'_>, params: &mut [f32]) -> Result<(), Error> {
        if let Some((map, latent)) = self.reparameterisation(spec, start.seed) {
            map.forward(&latent, params);
        }
        Ok(())
    }

    fn reparameterisation(&self, spec: &ModelSpec, seed: u64) -> Option<(Box<dyn Reparameterisation>, Vec<f32>)> {
        let (d, inner) = (spec.hidden_size, self.encoder_hidden_size.unwrap_or(spec.hidden_size));
        let rows = rows_in_files(spec, self.num_virtual_tokens);
        let encoder = Encoder::new(rows, &[d, inner, inner, d], "mlp_head", Activation::Relu);
        let latent = encoder.initial(seed);
        Some((Box::new(encoder), latent))
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        let mut keys = soft_prompt_keys(self.num_virtual_tokens, modules);
        keys.insert("encoder_reparameterization_type", json!(self.encoder_reparameterization_type));
        keys.insert("encoder_hidden_size", json!(self.encoder_hidden_size.unwrap_or(modules.shape.hidden_size)));
        keys.insert("encoder_num_layers", json!(2));
        keys.insert("encoder_dropout", json!(0.0));
        Ok(keys)
    }

    fn compatibility_notes(&self) -> Vec<String> {
        vec![format!("{LORA_ONLY}; a soft prompt cannot be merged")]
    }
}
