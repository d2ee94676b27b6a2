//! The families of models, a file each: what a `config.json` of theirs says becomes a [`ModelSpec`].
//!
//! A family is data and one function. Defaults, precedence and oddities are those of transformers' configuration classes, so that a field
//! that is left out means here what it means there. Beside this folder only `translate.rs` and `checkpoint.rs` name families, for the few
//! things in which their files are exceptions.

use std::sync::LazyLock;

use retune_engine::spec::ModelSpec;
use serde_json::{Value, json};

use crate::error::Error;
use crate::fields::{Fields, check_tensors, unsupported};
use crate::translate::Gguf;

mod bloom;
mod decoder;
mod gemma;
mod gpt2;
mod llama;
mod ministral;
mod phi3;
mod qwen;
mod smollm3;
mod t5;

/// A family of models that compute the same.
pub struct Family {
    /// The models that people know, as README lists them.
    pub models: &'static str,
    /// What transformers calls it in a `config.json`.
    pub model_types: &'static [&'static str],
    /// transformers' class with the head.
    pub class: &'static str,
    /// What stands before the name of each tensor but the head's, and what files may leave out.
    pub prefix: &'static str,
    /// The tokens that begin, end and pad a text where the configuration does not say.
    pub tokens: DefaultTokens,
    /// The last parts of the names of linears that transformers leaves as they are where it quantizes a model, beside the head (its
    /// `_keep_in_fp32_modules`).
    pub unquantized: &'static [&'static str],
    /// What the configuration says, as a spec.
    pub describe: fn(&Fields<'_>) -> Result<ModelSpec, Error>,
    /// How llama.cpp stores it.
    pub gguf: Option<Gguf>,
}

/// transformers' defaults of `bos_token_id`, `eos_token_id` and `pad_token_id`.
#[derive(Clone, Copy, Debug)]
pub struct DefaultTokens {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
}

/// The tokens that begin, end and pad a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenIds {
    pub bos: Option<u32>,
    /// Each of them ends a text.
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
}

/// All families that are read, those of one file together.
pub const FAMILIES: &[&Family] = &[
    &llama::LLAMA,
    &llama::MISTRAL,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &gemma::GEMMA3_WITH_VISION,
    &phi3::PHI3,
    &gpt2::GPT2,
    &bloom::BLOOM,
    &smollm3::SMOLLM3,
    &ministral::MINISTRAL,
    &ministral::MINISTRAL3,
    &t5::T5,
];

/// For errors: the model types of [`FAMILIES`], in their order.
fn model_types() -> &'static str {
    static NAMES: LazyLock<String> = LazyLock::new(|| {
        let names: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
        names.join(", ")
    });
    &NAMES
}

/// What a `config.json` describes.
#[derive(Clone)]
pub struct Description {
    pub family: &'static Family,
    pub spec: ModelSpec,
    pub tokens: TokenIds,
}

/// Reads a `config.json`.
///
/// # Errors
/// A model type, or anything else that changes the results, that is not supported; impossible sizes.
pub fn describe(config: &Value) -> Result<Description, Error> {
    let c = Fields::of(config)?;
    let family = match c.get("model_type") {
        Some(Value::String(name)) => FAMILIES.iter().find(|family| family.model_types.contains(&name.as_str())),
        _ => None,
    };
    let Some(&family) = family else {
        return Err(unsupported("model_type", c.get("model_type").unwrap_or(&Value::Null), model_types()));
    };
    c.refuse_unsupported()?;
    let spec = (family.describe)(&c)?;
    let has_encoder = spec.encoder.is_some();
    if c.flag("is_encoder_decoder", has_encoder)? != has_encoder {
        let supported = if has_encoder { "true, in models of this type" } else { "false, in models of this type" };
        return Err(unsupported("is_encoder_decoder", !has_encoder, supported));
    }
    check_tensors(&spec)?;
    Ok(Description { family, spec, tokens: token_ids(&c, family.tokens)? })
}

/// What stands before the names of a text model that is part of one that sees pictures.
pub const VISION_PREFIX: &str = "model.language_model.";

/// The `config.json` of the text model alone: the whole, or its part for text, with what stands outside of it.
pub fn text_config(config: &Value) -> Value {
    let Some(Value::Object(text)) = config.get("text_config").filter(|_| config["model_type"] == "gemma3") else {
        return config.clone();
    };
    let mut text = text.clone();
    text.insert("architectures".to_owned(), json!([gemma::GEMMA3.class]));
    text.insert("model_type".to_owned(), json!(gemma::GEMMA3.model_types.first()));
    for name in ["bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype"] {
        if let Some(value) = config.get(name) {
            text.insert(name.to_owned(), value.clone());
        }
    }
    Value::Object(text)
}

/// What the configuration says, or its part for text, or else the family's defaults.
fn token_ids(c: &Fields<'_>, defaults: DefaultTokens) -> Result<TokenIds, Error> {
    let inner = c.object("text_config")?.map(Fields::new);
    let ids = |name: &str, default: Option<u32>| {
        let places = [Some(*c), inner].into_iter().flatten();
        match places.into_iter().find(|place| place.get(name).is_some()) {
            // Old configurations mean none by -1.
            Some(place) if name == "pad_token_id" && place.get(name).and_then(Value::as_i64) == Some(-1) => Ok(vec![]),
            Some(place) => place.token_ids(name),
            None => Ok(default.into_iter().collect()),
        }
    };
    Ok(TokenIds {
        bos: ids("bos_token_id", defaults.bos)?.first().copied(),
        eos: ids("eos_token_id", defaults.eos)?,
        pad: ids("pad_token_id", defaults.pad)?.first().copied(),
    })
}

#[cfg(test)]
mod tests;
