//! Gemma 1, 2 and 3: norms of 1 + w, embeddings scaled. 2 and 3 have norms before and after each half and windows in turn; 2 caps scores
//! and logits, 3 normalises queries and keys and turns them by two bases.

use retune_engine::spec::{Attention, Function, ModelSpec, Norm, Positions, Rope, SubLayer};
use serde_json::{Map, Value, json};

use super::decoder::{Biases, Decoder, Defaults, LLAMA, inverse_root, windows};
use super::{DefaultTokens, Family, VISION_PREFIX};
use crate::error::Error;
use crate::fields::{Fields, field_error};
use crate::rope::{Rotary, fill};
use crate::translate::{BIASES, Gguf, Header, KEYS, Key, NAMES, QK_NORMS, WINDOW, nothing_lost};

/// The norms around both halves.
const NORMS: &[(&str, &str)] = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

const CAPS: &[Key] = &[
    Key::number("attn_logit_softcapping", "attn_logit_softcapping"),
    Key::number("final_logit_softcapping", "final_logit_softcapping"),
];

pub static GEMMA: Family = Family {
    models: "Gemma 1",
    model_types: &["gemma"],
    class: "GemmaForCausalLM",
    prefix: "model.",
    tokens: TOKENS,
    unquantized: &[],
    describe: gemma,
    gguf: Some(Gguf {
        architecture: "gemma",
        keys: &[KEYS],
        names: &[NAMES],
        biases: BIASES,
        paired_rows: false,
        complete: nothing_lost,
    }),
};

pub static GEMMA2: Family = Family {
    models: "Gemma 2",
    model_types: &["gemma2"],
    class: "Gemma2ForCausalLM",
    prefix: "model.",
    tokens: TOKENS,
    unquantized: &[],
    describe: gemma2,
    gguf: Some(Gguf {
        architecture: "gemma2",
        keys: &[KEYS, WINDOW, CAPS],
        names: &[NORMS, NAMES],
        biases: BIASES,
        paired_rows: false,
        complete: gemma2_lost,
    }),
};

pub static GEMMA3: Family = Family {
    models: "Gemma 3, text",
    model_types: &["gemma3_text"],
    class: "Gemma3ForCausalLM",
    prefix: "model.",
    tokens: TOKENS,
    unquantized: &[],
    describe: gemma3,
    gguf: Some(Gguf {
        architecture: "gemma3",
        keys: &[KEYS, WINDOW, CAPS, &[Key::number("rope.freq_base_swa", "rope_local_base_freq")]],
        names: &[NORMS, NAMES, QK_NORMS],
        biases: BIASES,
        paired_rows: false,
        complete: gemma3_lost,
    }),
};

/// Gemma 3 from 4B on: the text model is `text_config`; what sees pictures is left out.
pub static GEMMA3_WITH_VISION: Family = Family {
    models: "Gemma 3 with vision, its text part",
    model_types: &["gemma3"],
    class: "Gemma3ForConditionalGeneration",
    prefix: VISION_PREFIX,
    tokens: TOKENS,
    unquantized: &[],
    describe: gemma3_with_vision,
    gguf: None,
};

const TOKENS: DefaultTokens = DefaultTokens { bos: Some(2), eos: Some(1), pad: Some(0) };

const DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 3072,
    intermediate_size: 24_576,
    num_hidden_layers: 28,
    num_attention_heads: 16,
    num_key_value_heads: Some(16),
    head_dim: Some(256),
    max_position_embeddings: 8192,
    tie_word_embeddings: true,
    ..LLAMA
};

const DEFAULTS_2: Defaults = Defaults {
    hidden_size: 2304,
    intermediate_size: 9216,
    num_hidden_layers: 26,
    num_attention_heads: 8,
    num_key_value_heads: Some(4),
    ..DEFAULTS
};

const DEFAULTS_3: Defaults = Defaults { vocab_size: 262_208, max_position_embeddings: 131_072, ..DEFAULTS_2 };

fn gemma(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &DEFAULTS)?;
    c.refuse_flag("mlp_bias")?;
    let biases = Biases::all(c.flag("attention_bias", false)?);
    // The first files said gelu and meant its approximation.
    let function = match c.function("hidden_act", "gelu_pytorch_tanh")? {
        Function::Gelu => Function::GeluTanh,
        function => function,
    };
    let rope = m.rotary().read(c)?;
    let plus_one = |sub_layer: SubLayer| {
        let norm = Norm::rms_plus_one(sub_layer.norm.name, sub_layer.norm.width, m.eps);
        SubLayer { norm, ..sub_layer }
    };
    let block = |l| [plus_one(m.attend(l, biases, m.attention())), plus_one(m.gated(l, false, function))];
    Ok(finish(&m, m.model("gemma", vec![rope], block)))
}

fn gemma2(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &DEFAULTS_2)?;
    let half = Half::read(c)?;
    let window = c.size_or_none("sliding_window", Some(4096))?;
    let windows = windows(c, m.sizes.num_hidden_layers, window, |l| l % 2 == 0)?;
    let soft_cap = c.positive_or_none("attn_logit_softcapping", Some(50.0))?;
    let attention = |l: usize| Attention { window: windows[l], scale: half.scale, soft_cap, ..m.attention() };
    let rope = m.rotary().read(c)?;
    let mut spec = finish(&m, m.model("gemma2", vec![rope], |l| half.sandwich(&m, l, attention(l))));
    spec.head.soft_cap = c.positive_or_none("final_logit_softcapping", Some(30.0))?;
    Ok(spec)
}

fn gemma3(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &DEFAULTS_3)?;
    let half = Half::read(c)?;
    let window = c.size_or_none("sliding_window", Some(4096))?;
    let pattern = c.size("sliding_window_pattern", 6)?;
    let windows = windows(c, m.sizes.num_hidden_layers, window, |l| (l + 1) % pattern != 0)?;
    // `attn_logit_softcapping` is a field that transformers' model does not read.
    let attention = |l: usize| Attention {
        window: windows[l],
        scale: half.scale,
        qk_norm: Some(m.qk_norms(l, Norm::rms_plus_one)),
        positions: Positions::Rope(usize::from(windows[l].is_some())),
        ..m.attention()
    };
    let ropes = two_ropes(c, m.rotary())?;
    let mut spec = finish(&m, m.model("gemma3_text", ropes.into(), |l| half.sandwich(&m, l, attention(l))));
    spec.head.soft_cap = c.positive_or_none("final_logit_softcapping", None)?;
    Ok(spec)
}

fn gemma3_with_vision(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let empty = Map::new();
    let text = Fields::new(c.object("text_config")?.unwrap_or(&empty));
    text.refuse_unsupported()?;
    let mut spec = gemma3(&text)?;
    spec.head.tied = c.flag("tie_word_embeddings", true)?;
    spec.family = "gemma3";
    spec.rename(&|name| match name.strip_prefix("model.") {
        Some(inner) => format!("{VISION_PREFIX}{inner}"),
        None => name.to_owned(),
    });
    Ok(spec)
}

/// What Gemma 2's and 3's halves have in common.
struct Half {
    biases: Biases,
    function: Function,
    scale: f32,
}

impl Half {
    fn read(c: &Fields<'_>) -> Result<Self, Error> {
        c.refuse_flag("mlp_bias")?;
        let scalar = c.find_number("query_pre_attn_scalar")?.unwrap_or(256.0);
        let scale = inverse_root(scalar);
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(field_error("query_pre_attn_scalar", scalar, "a number above 0"));
        }
        Ok(Self {
            biases: Biases::all(c.flag("attention_bias", false)?),
            function: c.function("hidden_activation", "gelu_pytorch_tanh")?,
            scale,
        })
    }

    /// Four norms around two halves.
    fn sandwich(&self, m: &Decoder, l: usize, attention: Attention) -> [SubLayer; 2] {
        let norm = |part: &str| Norm::rms_plus_one(Decoder::name(l, part), m.sizes.hidden_size, m.eps);
        [
            SubLayer {
                norm: norm("input_layernorm"),
                post_norm: Some(norm("post_attention_layernorm")),
                ..m.attend(l, self.biases, attention)
            },
            SubLayer {
                norm: norm("pre_feedforward_layernorm"),
                post_norm: Some(norm("post_feedforward_layernorm")),
                ..m.gated(l, false, self.function)
            },
        ]
    }
}

fn finish(m: &Decoder, mut spec: ModelSpec) -> ModelSpec {
    spec.table.scale = (m.sizes.hidden_size as f64).sqrt() as f32;
    spec.decoder.norm = Norm::rms_plus_one("model.norm", m.sizes.hidden_size, m.eps);
    spec
}

/// The rotation of layers that see everything, then that of layers that see a window.
///
/// Each has an object of its own in `rope_parameters`. The older `rope_scaling` adds to the first of them alone, and `rope_theta` and
/// `rope_local_base_freq` are what the objects lack.
fn two_ropes(c: &Fields<'_>, rotary: Rotary) -> Result<[Rope; 2], Error> {
    let empty = Map::new();
    let both = c.object("rope_parameters")?.unwrap_or(&empty);
    let kinds = ["full_attention", "sliding_attention"];
    if let Some(name) = both.keys().find(|name| !kinds.contains(&name.as_str())) {
        return Err(field_error(&format!("rope_parameters.{name}"), "given", "full_attention and sliding_attention"));
    }
    let rope = |kind: &str, scaling: Option<&Map<String, Value>>, theta: &str, default_theta: f64| {
        let mut parameters = Fields::new(both).object(kind)?.cloned().unwrap_or_default();
        parameters.extend(scaling.into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())));
        fill(&mut parameters, "rope_theta", c.get(theta));
        Rotary { default_theta, ..rotary }.of(&parameters)
    };
    Ok([
        rope(kinds[0], c.object("rope_scaling")?, "rope_theta", 1e6)?,
        rope(kinds[1], None, "rope_local_base_freq", 1e4)?,
    ])
}

/// What a file does not say: the scale on the scores, which differs from the head's size in the 27B model, and which layers see a window.
fn gemma2_lost(header: &Header<'_>, config: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<(), Error> {
    scale_lost(header, config, notes, 46)?;
    notes.push(
        "the file does not say which layers see a window only; every other layer does, from the first".to_owned(),
    );
    Ok(())
}

fn gemma3_lost(header: &Header<'_>, config: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<(), Error> {
    scale_lost(header, config, notes, 62)?;
    if config.contains_key("sliding_window") {
        notes.push("the file does not say which layers see everything; every sixth does".to_owned());
    } else {
        config.insert("layer_types".to_owned(), json!(vec!["full_attention"; header.layers()?]));
        config.insert("sliding_window".to_owned(), Value::Null);
    }
    Ok(())
}

/// The 27B models, known by their number of layers, divide by the hidden size over the heads; all others by the size of a head.
fn scale_lost(
    header: &Header<'_>,
    config: &mut Map<String, Value>,
    notes: &mut Vec<String>,
    layers_of_27b: usize,
) -> Result<(), Error> {
    let scalar = if header.layers()? == layers_of_27b {
        header.required_size("embedding_length")? / header.required_size("attention.head_count")?.max(1)
    } else {
        header.head_dim()?
    };
    config.insert("query_pre_attn_scalar".to_owned(), scalar.into());
    notes.push(format!("the file does not give query_pre_attn_scalar; {scalar} is used, as in the published models"));
    Ok(())
}
