//! Ministral: Mistral with windows in some layers. Ministral 3: Mistral with extended context, and queries scaled by their position.

use retune_engine::spec::{Attention, ModelSpec, QueryScale};
use serde_json::{Map, Value, json};

use super::decoder::{Biases, Decoder, Defaults, windows};
use super::llama::MISTRAL_DEFAULTS;
use super::{DefaultTokens, Family};
use crate::error::Error;
use crate::fields::Fields;
use crate::translate::{Gguf, Header, KEYS, NAMES, WINDOW, shortest};

pub static MINISTRAL: Family = Family {
    models: "Ministral",
    model_types: &["ministral"],
    class: "MinistralForCausalLM",
    prefix: "model.",
    tokens: DefaultTokens { bos: Some(1), eos: Some(2), pad: None },
    unquantized: &[],
    describe: ministral,
    gguf: None,
};

pub static MINISTRAL3: Family = Family {
    models: "Ministral 3",
    model_types: &["ministral3"],
    class: "Ministral3ForCausalLM",
    prefix: "model.",
    tokens: DefaultTokens { bos: Some(1), eos: Some(2), pad: Some(11) },
    unquantized: &[],
    describe: ministral3,
    gguf: Some(Gguf {
        architecture: "mistral3",
        keys: &[KEYS, WINDOW],
        names: &[NAMES],
        biases: &[],
        paired_rows: true,
        complete,
    }),
};

fn ministral(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &MISTRAL_DEFAULTS)?;
    c.refuse_flag("attention_bias")?;
    c.refuse_flag("mlp_bias")?;
    let window = c.size_or_none("sliding_window", Some(4096))?;
    let windows = windows(c, m.sizes.num_hidden_layers, window, |_| window.is_some())?;
    let function = c.function("hidden_act", "silu")?;
    let rope = m.rotary().read(c)?;
    Ok(m.model("ministral", vec![rope], |l| {
        [m.attend(l, Biases::NONE, Attention { window: windows[l], ..m.attention() }), m.gated(l, false, function)]
    }))
}

fn ministral3(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let defaults = Defaults {
        vocab_size: 131_072,
        num_hidden_layers: 34,
        head_dim: Some(128),
        max_position_embeddings: 262_144,
        rms_norm_eps: 1e-5,
        ..MISTRAL_DEFAULTS
    };
    let m = Decoder::read(c, &defaults)?;
    c.refuse_flag("attention_bias")?;
    c.refuse_flag("mlp_bias")?;
    let window = c.find_size("sliding_window")?;
    let function = c.function("hidden_act", "silu")?;
    let mut parameters = m.rotary().parameters(c)?;
    if c.get("rope_parameters").is_none_or(Value::is_null) && c.get("rope_scaling").is_none_or(Value::is_null) {
        for (name, value) in [
            ("rope_type", json!("yarn")),
            ("rope_theta", json!(1e6)),
            ("factor", json!(16.0)),
            ("original_max_position_embeddings", json!(16_384)),
            ("mscale", json!(1.0)),
            ("mscale_all_dim", json!(1.0)),
            ("llama_4_scaling_beta", json!(0.1)),
        ] {
            parameters.entry(name).or_insert(value);
        }
    }
    let beta = Fields::new(&parameters).find_number("llama_4_scaling_beta")?.unwrap_or(0.0);
    let original = Fields::new(&parameters).size("original_max_position_embeddings", m.context)?;
    let query_scale = (beta != 0.0).then_some(QueryScale { beta: beta as f32, original });
    let rope = m.rotary().of(&parameters)?;
    Ok(m.model("ministral3", vec![rope], |l| {
        let mix = Attention { window, query_scale, ..m.attention() };
        [m.attend(l, Biases::NONE, mix), m.gated(l, false, function)]
    }))
}

/// llama.cpp calls the factors by other names.
fn complete(header: &Header<'_>, config: &mut Map<String, Value>, _: &mut Vec<String>) -> Result<(), Error> {
    // Left out, it would have a default.
    config.entry("rope_scaling").or_insert(json!({"rope_type": "default"}));
    let beta = header.number("attention.temperature_scale")?;
    let mscale = header.number("rope.scaling.yarn_log_multiplier")?;
    if let Some(Value::Object(scaling)) = config.get_mut("rope_scaling") {
        scaling.insert("llama_4_scaling_beta".to_owned(), shortest(beta.unwrap_or(0.0)));
        if let Some(mscale) = mscale {
            scaling.insert("mscale".to_owned(), shortest(mscale));
            scaling.insert("mscale_all_dim".to_owned(), shortest(mscale));
        }
    }
    Ok(())
}
