//! Prefix tuning (Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation"): keys and values that stand before those of
//! every text, in each attention.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::{Overlay, Prefix};
use retune_engine::spec::ModelSpec;
use retune_kernels::random;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::prompt_tuning::{OF_THE_MODEL, ROWS, check_virtual_tokens, soft_prompt_keys, virtual_tokens};
use crate::error::Error;
use crate::method::{self, Method, MethodInfo, Start};
use crate::peft_config;
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
}

/// A prefix and how it starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixTuningConfig {
    /// Keys and values of each attention.
    pub num_virtual_tokens: usize,
    /// How they start: random or zero.
    pub prefix_init: PrefixInit,
}

impl Default for PrefixTuningConfig {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, prefix_init: PrefixInit::default() }
    }
}

fn from_peft(path: &Path, mut map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    let num_virtual_tokens = virtual_tokens(path, &mut map)?;
    // A projection is of no matter once the prefix is trained: the file holds what it computed.
    let trained = ["encoder_hidden_size", "prefix_projection", "init_weights"];
    peft_config::known_fields(path, map, &[], &[&OF_THE_MODEL[..], &trained].concat())?;
    Ok(Arc::new(PrefixTuningConfig { num_virtual_tokens, ..PrefixTuningConfig::default() }))
}

impl Method for PrefixTuningConfig {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn settings(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }

    fn check(&self) -> Result<(), Error> {
        check_virtual_tokens(self.num_virtual_tokens)
    }

    fn lower(&self, spec: &ModelSpec, _: bool) -> Result<Overlay, Error> {
        let mut overlay = Overlay::of_sizes(spec.linears().count(), spec.vectors().len());
        let count = self.num_virtual_tokens;
        let values = overlay.layout.add(ROWS.to_owned(), vec![count, spec.key_value_width()], None);
        overlay.prefix = Some(Prefix { values, count });
        Ok(overlay)
    }

    fn initialise(&self, _: &ModelSpec, _: &Overlay, start: &Start<'_>, params: &mut [f32]) -> Result<(), Error> {
        if self.prefix_init == PrefixInit::Random {
            let key = random::derive(random::derive(0, start.seed), random::hash(ROWS));
            let values = params.iter_mut().enumerate();
            values.for_each(|(i, v)| *v = (random::normal(key, i as u64) * DEVIATION) as f32);
        }
        Ok(())
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        let mut keys = soft_prompt_keys(self.num_virtual_tokens, modules);
        let width = modules.shape.key_value_heads * modules.shape.head_dim;
        // PEFT means the keys' and values' heads here, and their width by the token's.
        keys.insert("token_dim", json!(width));
        keys.insert("num_attention_heads", json!(modules.shape.key_value_heads));
        keys.insert("encoder_hidden_size", json!(width));
        keys.insert("prefix_projection", json!(false));
        Ok(keys)
    }

    fn compatibility_notes(&self) -> Vec<String> {
        vec!["vLLM and mistral.rs take LoRA adapters only; a prefix cannot be merged".to_owned()]
    }
}
