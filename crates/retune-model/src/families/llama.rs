//! Llama 1 to 3.x, and the many models that are Llama by another name (SmolLM2, TinyLlama); Mistral.

use retune_engine::spec::{Attention, ModelSpec};

use super::decoder::{Biases, Decoder, Defaults, LLAMA as DEFAULTS};
use super::{DefaultTokens, Family};
use crate::error::Error;
use crate::fields::Fields;
use crate::translate::{BIASES, Gguf, KEYS, NAMES, WINDOW, nothing_lost};

pub static LLAMA: Family = Family {
    models: "Llama 1 to 3.x, SmolLM2, TinyLlama",
    model_types: &["llama"],
    class: "LlamaForCausalLM",
    prefix: "model.",
    tokens: TOKENS,
    unquantized: &[],
    describe: llama,
    gguf: Some(Gguf {
        architecture: "llama",
        keys: &[KEYS],
        names: &[NAMES],
        biases: BIASES,
        paired_rows: true,
        complete: nothing_lost,
    }),
};

/// A GGUF file of a Mistral says that it is a Llama, unless it gives a window.
pub static MISTRAL: Family = Family {
    models: "Mistral",
    model_types: &["mistral"],
    class: "MistralForCausalLM",
    prefix: "model.",
    tokens: TOKENS,
    unquantized: &[],
    describe: mistral,
    gguf: Some(Gguf {
        architecture: "mistral",
        keys: &[KEYS, WINDOW],
        names: &[NAMES],
        biases: BIASES,
        paired_rows: true,
        complete: nothing_lost,
    }),
};

const TOKENS: DefaultTokens = DefaultTokens { bos: Some(1), eos: Some(2), pad: None };

/// Also Ministral's.
pub const MISTRAL_DEFAULTS: Defaults = Defaults {
    intermediate_size: 14_336,
    num_key_value_heads: Some(8),
    max_position_embeddings: 4096 * 32,
    ..DEFAULTS
};

fn llama(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &DEFAULTS)?;
    let (attention, mlp) = (Biases::all(c.flag("attention_bias", false)?), c.flag("mlp_bias", false)?);
    let function = c.function("hidden_act", "silu")?;
    let rope = m.rotary().read(c)?;
    Ok(m.model("llama", vec![rope], |l| [m.attend(l, attention, m.attention()), m.gated(l, mlp, function)]))
}

fn mistral(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &MISTRAL_DEFAULTS)?;
    c.refuse_flag("attention_bias")?;
    c.refuse_flag("mlp_bias")?;
    let window = c.size_or_none("sliding_window", Some(4096))?;
    let function = c.function("hidden_act", "silu")?;
    let rope = m.rotary().read(c)?;
    Ok(m.model("mistral", vec![rope], |l| {
        [m.attend(l, Biases::NONE, Attention { window, ..m.attention() }), m.gated(l, false, function)]
    }))
}
