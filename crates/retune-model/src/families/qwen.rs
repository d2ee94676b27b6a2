//! Qwen 2 and 2.5: Llama with biases on q, k and v. Qwen 3: without them, and queries and keys normalised.

use retune_engine::spec::{Attention, ModelSpec, Norm};

use super::decoder::{Biases, Decoder, Defaults, LLAMA, windows};
use super::{DefaultTokens, Family};
use crate::error::Error;
use crate::fields::Fields;
use crate::translate::{BIASES, Gguf, KEYS, NAMES, QK_NORMS, nothing_lost};

/// A GGUF file does not give the windows; none of the published models uses them.
pub static QWEN2: Family = Family {
    models: "Qwen 2, Qwen 2.5",
    model_types: &["qwen2"],
    class: "Qwen2ForCausalLM",
    prefix: "model.",
    tokens: TOKENS,
    unquantized: &[],
    describe: qwen2,
    gguf: Some(Gguf {
        architecture: "qwen2",
        keys: &[KEYS],
        names: &[NAMES],
        biases: &[],
        paired_rows: false,
        complete: nothing_lost,
    }),
};

pub static QWEN3: Family = Family {
    models: "Qwen 3",
    model_types: &["qwen3"],
    class: "Qwen3ForCausalLM",
    prefix: "model.",
    tokens: TOKENS,
    unquantized: &[],
    describe: qwen3,
    gguf: Some(Gguf {
        architecture: "qwen3",
        keys: &[KEYS],
        names: &[NAMES, QK_NORMS],
        biases: BIASES,
        paired_rows: false,
        complete: nothing_lost,
    }),
};

const TOKENS: DefaultTokens = DefaultTokens { bos: None, eos: None, pad: None };

const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    ..LLAMA
};

fn qwen2(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &DEFAULTS)?;
    c.refuse_flag("mlp_bias")?;
    let windows = qwen_windows(c, &m)?;
    let function = c.function("hidden_act", "silu")?;
    let rope = m.rotary().read(c)?;
    let biases = Biases { qkv: true, output: false };
    Ok(m.model("qwen2", vec![rope], |l| {
        [m.attend(l, biases, Attention { window: windows[l], ..m.attention() }), m.gated(l, false, function)]
    }))
}

fn qwen3(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &Defaults { head_dim: Some(128), ..DEFAULTS })?;
    c.refuse_flag("mlp_bias")?;
    let biases = Biases::all(c.flag("attention_bias", false)?);
    let windows = qwen_windows(c, &m)?;
    let function = c.function("hidden_act", "silu")?;
    let rope = m.rotary().read(c)?;
    let attention = |l| Attention { window: windows[l], qk_norm: Some(m.qk_norms(l, Norm::rms)), ..m.attention() };
    Ok(m.model("qwen3", vec![rope], |l| [m.attend(l, biases, attention(l)), m.gated(l, false, function)]))
}

/// The first `max_window_layers` layers see everything, and the others a window where `use_sliding_window` says so.
fn qwen_windows(c: &Fields<'_>, m: &Decoder) -> Result<Vec<Option<usize>>, Error> {
    let window = match c.flag("use_sliding_window", false)? {
        true => c.size_or_none("sliding_window", Some(4096))?,
        false => None,
    };
    // 0 is a number of layers here.
    let from = match c.get("max_window_layers").and_then(serde_json::Value::as_u64) {
        Some(0) => 0,
        _ => c.size("max_window_layers", 28)?,
    };
    windows(c, m.sizes.num_hidden_layers, window, |l| window.is_some() && l >= from)
}
