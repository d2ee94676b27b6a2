//! Prompt tuning (Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning"): rows that stand before the tokens of every
//! text, trained in the place of words.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::{Overlay, VirtualTokens};
use retune_engine::spec::ModelSpec;
use retune_kernels::{PanelSource, random};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::config_error;
use crate::error::Error;
use crate::method::{self, Method, MethodInfo, Start};
use crate::peft_config::{self, LORA_ONLY, bad};
use crate::targets::BaseModules;

pub static INFO: MethodInfo = MethodInfo {
    name: "prompt_tuning",
    peft_type: Some("PROMPT_TUNING"),
    what: "a soft prompt: rows that stand before every text as words would (prompt tuning)",
    learning_rate: 3e-2,
    read: method::read::<PromptTuningConfig>,
    schema: Some(|generator| generator.subschema_for::<PromptTuningConfig>()),
    from_peft,
};

/// The name of the rows in an adapter's file.
pub(crate) const ROWS: &str = "prompt_embeddings";
/// More virtual tokens than any prompt has words: what is above is a slip.
pub(crate) const MOST_VIRTUAL_TOKENS: usize = 4096;

/// How the rows of a soft prompt start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptTuningInit {
    /// Rows of the embedding, of tokens drawn at random.
    #[default]
    SampleVocab,
    /// The rows of the tokens of `prompt_tuning_init_text`, repeated or cut to as many as there are.
    Text,
    /// Normal with standard deviation 1, which is far from any word: PEFT's default, and slow to learn from.
    Random,
}

/// A soft prompt and how it starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PromptTuningConfig {
    /// Rows of the soft prompt.
    pub num_virtual_tokens: usize,
    /// How they start: SAMPLE_VOCAB, TEXT or RANDOM.
    pub prompt_tuning_init: PromptTuningInit,
    /// The text whose tokens they start from. Only with prompt_tuning_init TEXT.
    pub prompt_tuning_init_text: Option<String>,
}

impl Default for PromptTuningConfig {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, prompt_tuning_init: PromptTuningInit::default(), prompt_tuning_init_text: None }
    }
}

pub(crate) fn check_virtual_tokens(count: usize) -> Result<(), Error> {
    if count == 0 || count > MOST_VIRTUAL_TOKENS {
        let problem = format!("{count} is out of range; expected 1 to {MOST_VIRTUAL_TOKENS}, 8 to 100 are usual");
        return config_error("num_virtual_tokens", problem);
    }
    Ok(())
}

/// The number of virtual tokens that a soft prompt's configuration names, after checking what all kinds of soft prompts have in common.
pub(crate) fn virtual_tokens(path: &Path, map: &mut Map<String, Value>) -> Result<usize, Error> {
    let parts = map.remove("num_transformer_submodules").filter(|parts| !parts.is_null());
    if let Some(parts) = parts.filter(|parts| *parts != 1 && *parts != 2) {
        let expected = "expected 1, as for a decoder, or 2, as for an encoder and a decoder";
        return Err(bad(path, "num_transformer_submodules", &format!("is {parts}; {expected}")));
    }
    let count = map.remove("num_virtual_tokens");
    match count.as_ref().and_then(Value::as_u64).and_then(|count| usize::try_from(count).ok()) {
        Some(count) => Ok(count),
        None => Err(bad(path, "num_virtual_tokens", "is missing or no whole number; expected the rows of the prompt")),
    }
}

/// Adds the rows of a soft prompt of `count` virtual tokens to a layout. For an encoder and a decoder PEFT's files hold as many rows again,
/// which nothing reads and which are never trained.
pub(crate) fn add_rows(overlay: &mut Overlay, spec: &ModelSpec, count: usize) {
    let all = overlay.layout.add(ROWS.to_owned(), vec![rows_in_files(spec, count), spec.hidden_size], None);
    let rows = all.start..all.start + count * spec.hidden_size;
    overlay.virtual_tokens = Some(VirtualTokens { rows, count });
}

/// Rows of a soft prompt in PEFT's files.
pub(crate) fn rows_in_files(spec: &ModelSpec, count: usize) -> usize {
    count * spec.stacks().count()
}

/// Keys of soft prompts that repeat what the model says.
pub(crate) const OF_THE_MODEL: [&str; 3] = ["token_dim", "num_attention_heads", "num_layers"];

fn from_peft(path: &Path, mut map: Map<String, Value>) -> Result<Arc<dyn Method>, Error> {
    let num_virtual_tokens = virtual_tokens(path, &mut map)?;
    // How the rows started is of no matter once they are trained.
    let started =
        ["prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights"];
    peft_config::known_fields(path, map, &[], &[&OF_THE_MODEL[..], &started].concat())?;
    Ok(Arc::new(PromptTuningConfig { num_virtual_tokens, ..PromptTuningConfig::default() }))
}

/// The rows of tokens as the model reads them: scaled where it scales them.
pub(crate) fn rows_of(spec: &ModelSpec, start: &Start<'_>, ids: &[u32], to: &mut [f32]) -> Result<(), Error> {
    let table = (start.tensor)(&format!("{}.weight", spec.table.name))?;
    for (&id, row) in ids.iter().zip(to.chunks_exact_mut(spec.hidden_size)) {
        let id = id as usize;
        if id >= table.rows() {
            return Err(Error::Base(format!("token {id} is beyond the table's {} rows", table.rows())));
        }
        table.panel_f32(id..id + 1, 0..spec.hidden_size, row);
        row.iter_mut().for_each(|v| *v *= spec.table.scale);
    }
    Ok(())
}

impl Method for PromptTuningConfig {
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
        check_virtual_tokens(self.num_virtual_tokens)?;
        let text = self.prompt_tuning_init_text.as_deref().is_some_and(|text| !text.is_empty());
        match (self.prompt_tuning_init == PromptTuningInit::Text, text) {
            (true, false) => config_error(
                "prompt_tuning_init_text",
                "is missing or empty; give the text whose tokens the prompt starts from, such as the instruction"
                    .to_owned(),
            ),
            (false, true) => config_error(
                "prompt_tuning_init_text",
                "has no effect without prompt_tuning_init TEXT; set that, or remove the text".to_owned(),
            ),
            _ => Ok(()),
        }
    }

    fn lower(&self, spec: &ModelSpec, _: bool) -> Result<Overlay, Error> {
        let mut overlay = Overlay::of_sizes(spec.linears().count(), spec.vectors().len());
        add_rows(&mut overlay, spec, self.num_virtual_tokens);
        Ok(overlay)
    }

    fn start_settings(&self) -> Vec<&'static str> {
        let is_default = self.prompt_tuning_init == PromptTuningInit::default();
        if is_default { Vec::new() } else { vec!["prompt_tuning_init"] }
    }

    fn initialise(&self, spec: &ModelSpec, _: &Overlay, start: &Start<'_>, params: &mut [f32]) -> Result<(), Error> {
        let (count, key) = (self.num_virtual_tokens, random::derive(random::derive(0, start.seed), random::hash(ROWS)));
        let ids: Vec<u32> = match self.prompt_tuning_init {
            PromptTuningInit::Random => {
                params.iter_mut().enumerate().for_each(|(i, v)| *v = random::normal(key, i as u64) as f32);
                return Ok(());
            }
            PromptTuningInit::SampleVocab => {
                let drawn = (0..count as u64).map(|i| random::at(key, i) % spec.vocab_size as u64);
                drawn.map(|id| id as u32).collect()
            }
            PromptTuningInit::Text => {
                let text = (start.texts.tokenize)(self.prompt_tuning_init_text.as_deref().unwrap_or_default())?;
                if text.is_empty() {
                    return config_error("prompt_tuning_init_text", "has no tokens; give another text".to_owned());
                }
                text.into_iter().cycle().take(count).collect()
            }
        };
        rows_of(spec, start, &ids, params)
    }

    fn peft_config(&self, modules: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        Ok(soft_prompt_keys(self.num_virtual_tokens, modules)
            .into_iter()
            .chain([("prompt_tuning_init", json!("RANDOM")), ("prompt_tuning_init_text", Value::Null)])
            .collect())
    }

    fn compatibility_notes(&self) -> Vec<String> {
        vec![format!("{LORA_ONLY}; a soft prompt cannot be merged")]
    }
}

/// The keys that all kinds of soft prompts have.
pub(crate) fn soft_prompt_keys(count: usize, modules: &BaseModules<'_>) -> BTreeMap<&'static str, Value> {
    let shape = modules.shape;
    BTreeMap::from([
        ("num_virtual_tokens", json!(count)),
        ("num_transformer_submodules", json!(if shape.has_encoder { 2 } else { 1 })),
        ("token_dim", json!(shape.hidden_size)),
        ("num_attention_heads", json!(shape.heads)),
        ("num_layers", json!(shape.layers)),
    ])
}
