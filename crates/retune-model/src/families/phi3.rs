//! Phi-3, 3.5 and 4-mini: q, k, v in one linear, gate and up in another; part of a head rotated, by other factors in long rows.

use retune_engine::spec::{Attention, Linear, ModelSpec, SubLayer};

use super::decoder::{Biases, Decoder, Defaults, LLAMA};
use super::{DefaultTokens, Family};
use crate::error::Error;
use crate::fields::{Fields, unsupported};
use crate::translate::{Gguf, KEYS, NAMES, WINDOW, phi3_lost};

pub static PHI3: Family = Family {
    models: "Phi-3, Phi-3.5, Phi-4-mini",
    model_types: &["phi3"],
    class: "Phi3ForCausalLM",
    prefix: "model.",
    tokens: DefaultTokens { bos: Some(1), eos: Some(32_000), pad: Some(32_000) },
    unquantized: &[],
    describe: phi3,
    gguf: Some(Gguf {
        architecture: "phi3",
        keys: &[KEYS, WINDOW],
        names: &[&[("self_attn.qkv_proj", "attn_qkv"), ("mlp.gate_up_proj", "ffn_up")], NAMES],
        biases: &[],
        paired_rows: false,
        complete: phi3_lost,
    }),
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_064,
    hidden_size: 3072,
    intermediate_size: 8192,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    ..LLAMA
};

fn phi3(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &DEFAULTS)?;
    c.refuse_flag("attention_bias")?;
    c.refuse_flag("mlp_bias")?;
    let ((query, key), hidden, inner) = (m.rows(), m.sizes.hidden_size, m.sizes.intermediate_size);
    let window = c.find_size("sliding_window")?;
    let function = c.function("hidden_act", "silu")?;

    let mut parameters = m.rotary().parameters(c)?;
    // The length stands outside, and its default counts even where one is given inside.
    let original = c.size("original_max_position_embeddings", 4096)?;
    parameters.insert("original_max_position_embeddings".to_owned(), original.into());
    let kind = parameters.get("rope_type").or(parameters.get("type")).cloned().unwrap_or_default();
    match kind.as_str() {
        None | Some("default" | "longrope") => {}
        // Earlier names of it.
        Some("su" | "yarn") => {
            parameters.insert("rope_type".to_owned(), "longrope".into());
        }
        Some(other) => return Err(unsupported("rope_type", other, "default, longrope")),
    }
    let rope = m.rotary().of_part(&parameters)?;

    Ok(m.model("phi3", vec![rope], |l| {
        let qkv = Linear::new(Decoder::name(l, "self_attn.qkv_proj"), query + 2 * key, hidden);
        let gate_up = Linear::new(Decoder::name(l, "mlp.gate_up_proj"), 2 * inner, hidden);
        let attention = Attention { window, ..m.attention() };
        [
            SubLayer { inputs: vec![qkv], ..m.attend(l, Biases::NONE, attention) },
            SubLayer { inputs: vec![gate_up], ..m.gated(l, false, function) },
        ]
    }))
}
