//! The configuration of a model: what `config.json` or a GGUF header says, checked, with transformers' defaults filled in.
//!
//! Supported are llama and mistral models (SmolLM, TinyLlama and many others are llama models by another name). What would
//! change the results and is not implemented is refused by name; other unknown keys are ignored, as transformers does.

use retune_formats::gguf::{Gguf, Metadata};
use serde_json::{Map, Value, json};

use crate::error::Error;

mod rope;

pub use rope::{RopeConfig, RopeScaling};

/// No known model has a tenth of it; a hostile header could ask for billions.
const MAX_LAYERS: usize = 4096;

/// A llama or mistral model's sizes and constants, under the names of transformers' `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// "llama" or "mistral".
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Even. Not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub rope: RopeConfig,
    /// A token sees this many tokens, itself included; `None` sees all before it.
    pub sliding_window: Option<usize>,
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    pub max_position_embeddings: usize,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// Errors: a model type, activation, rotary scaling or quantization that is not supported, and impossible sizes.
    pub fn from_hf_json(config: &Value) -> Result<ModelConfig, Error> {
        let Some(fields) = config.as_object() else {
            return Err(field_error("config.json", config, "an object"));
        };
        let mistral = match fields.get("model_type") {
            Some(Value::String(name)) if name == "llama" => false,
            Some(Value::String(name)) if name == "mistral" => true,
            found => return Err(unsupported("model_type", found.unwrap_or(&Value::Null), "llama, mistral")),
        };
        refuse_unsupported(fields)?;

        let num_attention_heads = size(fields, "num_attention_heads")?.unwrap_or(32);
        let hidden_size = size(fields, "hidden_size")?.unwrap_or(4096);
        // Null means as many as query heads; a mistral config without the key means 8.
        let default_key_value_heads =
            if mistral && !fields.contains_key("num_key_value_heads") { 8 } else { num_attention_heads };
        let head_dim = match size(fields, "head_dim")? {
            Some(head_dim) => head_dim,
            None => divided_head_dim(hidden_size, num_attention_heads)?,
        };
        let default_window = if mistral && !fields.contains_key("sliding_window") { Some(4096) } else { None };
        let max_position_embeddings =
            size(fields, "max_position_embeddings")?.unwrap_or(if mistral { 4096 * 32 } else { 2048 });
        let checked = ModelConfig {
            model_type: if mistral { "mistral" } else { "llama" }.to_owned(),
            vocab_size: size(fields, "vocab_size")?.unwrap_or(32000),
            hidden_size,
            intermediate_size: size(fields, "intermediate_size")?.unwrap_or(if mistral { 14336 } else { 11008 }),
            num_hidden_layers: size(fields, "num_hidden_layers")?.unwrap_or(32),
            num_attention_heads,
            num_key_value_heads: size(fields, "num_key_value_heads")?.unwrap_or(default_key_value_heads),
            head_dim,
            rms_norm_eps: number(fields, "rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope: rope_from_json(fields, max_position_embeddings)?,
            sliding_window: if mistral { size(fields, "sliding_window")?.or(default_window) } else { None },
            tie_word_embeddings: flag(fields, "tie_word_embeddings")?,
            attention_bias: !mistral && flag(fields, "attention_bias")?,
            mlp_bias: !mistral && flag(fields, "mlp_bias")?,
            max_position_embeddings,
            bos_token_id: match fields.get("bos_token_id") {
                None => Some(1),
                Some(_) => token_ids(fields, "bos_token_id")?.first().copied(),
            },
            eos_token_ids: match fields.get("eos_token_id") {
                None => vec![2],
                Some(_) => token_ids(fields, "eos_token_id")?,
            },
        };
        checked.check()?;
        Ok(checked)
    }

    /// Reads the header of a GGUF file. `rope_factors` are the values of its `rope_freqs.weight`, when it has one.
    ///
    /// Errors: another architecture, mixtures of experts, layers of different sizes, rotary scaling that is not supported,
    /// missing keys, and impossible sizes.
    pub fn from_gguf(file: &Gguf, rope_factors: Option<Vec<f32>>) -> Result<ModelConfig, Error> {
        let metadata = &file.metadata;
        let architecture = required("general.architecture", metadata.get_str("general.architecture")?)?;
        if !matches!(architecture, "llama" | "mistral") {
            return Err(unsupported("general.architecture", architecture, "llama, mistral"));
        }
        let header = GgufHeader { metadata, architecture };
        header.refuse_unsupported()?;

        let num_attention_heads = header.required_size("attention.head_count")?;
        let num_key_value_heads = header.size("attention.head_count_kv")?.unwrap_or(num_attention_heads);
        let hidden_size = header.required_size("embedding_length")?;
        let head_dim = match header.size("attention.key_length")?.or(header.size("rope.dimension_count")?) {
            Some(head_dim) => head_dim,
            None => divided_head_dim(hidden_size, num_attention_heads)?,
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = header.size(key)?.filter(|&other| other != head_dim) {
                let supported = "the length of a key, head_dim";
                return Err(Error::Unsupported {
                    what: "a GGUF model whose",
                    found: format!("{key} is {other}"),
                    supported,
                });
            }
        }
        let has_tensor = |names: &[&str]| names.iter().any(|name| file.tensor(name).is_some());
        let vocab_size = match file.tensor("token_embd.weight").and_then(|tensor| tensor.dims.get(1)) {
            Some(&rows) => rows,
            None => return Err(Error::MissingTensors { count: 1, first: "token_embd.weight".to_owned() }),
        };
        let sliding_window = header.size("attention.sliding_window")?.filter(|&window| window > 0);
        let mistral = architecture == "mistral" || sliding_window.is_some();
        let attention_bias =
            has_tensor(&["blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.0.attn_v.bias", "blk.0.attn_output.bias"]);
        let mlp_bias = has_tensor(&["blk.0.ffn_gate.bias", "blk.0.ffn_up.bias", "blk.0.ffn_down.bias"]);
        if mistral && (attention_bias || mlp_bias) {
            return Err(unsupported("a GGUF mistral model with", "biases", "mistral models without biases"));
        }
        let checked = ModelConfig {
            model_type: if mistral { "mistral" } else { "llama" }.to_owned(),
            vocab_size,
            hidden_size,
            intermediate_size: header.required_size("feed_forward_length")?,
            num_hidden_layers: header.required_size("block_count")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: header.required_number("attention.layer_norm_rms_epsilon")?,
            rope: header.rope(head_dim, rope_factors)?,
            sliding_window,
            tie_word_embeddings: !has_tensor(&["output.weight"]),
            attention_bias,
            mlp_bias,
            max_position_embeddings: header.required_size("context_length")?,
            bos_token_id: metadata.get_u32("tokenizer.ggml.bos_token_id")?,
            eos_token_ids: metadata.get_u32("tokenizer.ggml.eos_token_id")?.into_iter().collect(),
        };
        checked.check()?;
        Ok(checked)
    }

    /// Rows of the query projection, and columns of the output projection.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Rows of the key projection and of the value projection.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// A `config.json` that transformers 4 and 5 load this model with.
    ///
    /// Errors: rotary factors that no scaling of transformers gives.
    pub fn to_hf_json(&self) -> Result<Value, Error> {
        let mistral = self.model_type == "mistral";
        let mut config = json!({
            "architectures": [if mistral { "MistralForCausalLM" } else { "LlamaForCausalLM" }],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            // The shortest decimal of the f32: 1e-5, not 9.999999747378752e-6.
            "rms_norm_eps": self.rms_norm_eps.to_string().parse().unwrap_or(f64::from(self.rms_norm_eps)),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.scaling_json(self.head_dim)?,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                several => json!(several),
            },
        });
        if mistral {
            config["sliding_window"] = json!(self.sliding_window);
        } else {
            config["attention_bias"] = json!(self.attention_bias);
            config["mlp_bias"] = json!(self.mlp_bias);
        }
        Ok(config)
    }

    /// Refuses sizes no model can have, and those whose products would overflow.
    fn check(&self) -> Result<(), Error> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ];
        for (name, value) in sizes {
            if value == 0 || u32::try_from(value).is_err() {
                return Err(field_error(name, value, "a size from 1 to 4294967295"));
            }
        }
        if self.num_hidden_layers > MAX_LAYERS {
            return Err(field_error("num_hidden_layers", self.num_hidden_layers, format!("at most {MAX_LAYERS}")));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads, {}", self.num_attention_heads);
            return Err(field_error("num_key_value_heads", self.num_key_value_heads, expected));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(field_error("head_dim", self.head_dim, "an even number, for rotary embedding"));
        }
        let query_size = self.num_attention_heads.checked_mul(self.head_dim).filter(|&n| u32::try_from(n).is_ok());
        let Some(query_size) = query_size else {
            return Err(field_error(
                "head_dim",
                self.head_dim,
                "a size whose product with num_attention_heads is below 2^32",
            ));
        };
        for (name, rows) in
            [("vocab_size", self.vocab_size), ("intermediate_size", self.intermediate_size), ("head_dim", query_size)]
        {
            let bytes = rows.checked_mul(self.hidden_size).and_then(|values| values.checked_mul(size_of::<f32>()));
            if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
                return Err(field_error(name, rows, "a size whose matrices fit in memory"));
            }
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps.is_finite()) {
            return Err(field_error("rms_norm_eps", self.rms_norm_eps, "a small number above 0"));
        }
        if !(self.rope.theta > 0.0 && self.rope.theta.is_finite()) {
            return Err(field_error("rope_theta", self.rope.theta, "a number above 0"));
        }
        Ok(())
    }
}

fn field_error(field: &str, found: impl ToString, expected: impl Into<String>) -> Error {
    let found = found.to_string();
    let short = match found.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", found.get(..end).unwrap_or_default()),
        None => found,
    };
    Error::ConfigField { field: field.to_owned(), found: short, expected: expected.into() }
}

fn unsupported(what: &'static str, found: impl ToString, supported: &'static str) -> Error {
    Error::Unsupported { what, found: found.to_string(), supported }
}

/// The head size of a configuration that does not give it.
fn divided_head_dim(hidden_size: usize, num_attention_heads: usize) -> Result<usize, Error> {
    match hidden_size.checked_rem(num_attention_heads) {
        Some(0) => Ok(hidden_size / num_attention_heads),
        _ => Err(field_error(
            "hidden_size",
            hidden_size,
            format!("a multiple of num_attention_heads, {num_attention_heads}"),
        )),
    }
}

// config.json

/// A field that may be missing or null.
fn field<T>(
    fields: &Map<String, Value>,
    name: &str,
    expected: &str,
    convert: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, Error> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => convert(value).map(Some).ok_or_else(|| field_error(name, value, expected)),
    }
}

fn size(fields: &Map<String, Value>, name: &str) -> Result<Option<usize>, Error> {
    field(fields, name, "an integer of at least 0", |value| value.as_u64()?.try_into().ok())
}

fn number(fields: &Map<String, Value>, name: &str) -> Result<Option<f64>, Error> {
    field(fields, name, "a number", Value::as_f64)
}

fn object<'a>(fields: &'a Map<String, Value>, name: &str) -> Result<Option<&'a Map<String, Value>>, Error> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(other) => Err(field_error(name, other, "an object")),
    }
}

/// false when missing.
fn flag(fields: &Map<String, Value>, name: &str) -> Result<bool, Error> {
    Ok(field(fields, name, "true or false", Value::as_bool)?.unwrap_or(false))
}

fn token_ids(fields: &Map<String, Value>, name: &str) -> Result<Vec<u32>, Error> {
    let id = |value: &Value| -> Option<u32> { value.as_u64()?.try_into().ok() };
    let ids = field(fields, name, "a token id or a list of them", |value| match value {
        Value::Array(list) => list.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    })?;
    Ok(ids.unwrap_or_default())
}

/// Refuses what changes a model's results and is not implemented.
fn refuse_unsupported(fields: &Map<String, Value>) -> Result<(), Error> {
    if let Some(quantization) = fields.get("quantization_config").filter(|value| !value.is_null()) {
        let method = quantization.get("quant_method");
        let is_bitsandbytes = method.is_none_or(|method| *method == "bitsandbytes");
        if !(is_bitsandbytes && quantization.get("load_in_4bit") == Some(&Value::Bool(true))) {
            let supported = "bitsandbytes with load_in_4bit, unquantized F32, F16 or BF16 weights, and GGUF files";
            return Err(unsupported("quantization_config", method.unwrap_or(quantization), supported));
        }
    }
    match fields.get("hidden_act") {
        None | Some(Value::Null) => Ok(()),
        // transformers knows silu by both names.
        Some(Value::String(name)) if name == "silu" || name == "swish" => Ok(()),
        Some(other) => Err(unsupported("hidden_act", other, "silu")),
    }
}

/// Both spellings: `rope_scaling` beside a top-level `rope_theta` (transformers 4), and `rope_parameters` (transformers 5).
fn rope_from_json(fields: &Map<String, Value>, max_position_embeddings: usize) -> Result<RopeConfig, Error> {
    let empty = Map::new();
    let old = object(fields, "rope_scaling")?.filter(|object| !object.is_empty());
    let new = object(fields, "rope_parameters")?;
    // Where a file has both, transformers takes the older one.
    let parameters = old.or(new).unwrap_or(&empty);
    if let Some((name, value)) = parameters.iter().find(|(_, value)| value.is_object()) {
        let found = format!("{name}: {value}");
        return Err(unsupported("rotary embedding by layer type,", found, "one for all layers"));
    }
    for place in [parameters, fields] {
        if let Some(part) = number(place, "partial_rotary_factor")?.filter(|&part| part != 1.0) {
            return Err(unsupported("partial_rotary_factor", part, "1"));
        }
    }
    let theta = match number(parameters, "rope_theta")? {
        Some(theta) => theta,
        None => number(fields, "rope_theta")?.unwrap_or(10_000.0),
    };
    let kind = match parameters.get("rope_type").or(parameters.get("type")) {
        None | Some(Value::Null) => "default",
        Some(Value::String(kind)) => kind.as_str(),
        Some(other) => return Err(field_error("rope_type", other, "a string")),
    };
    let positive = |name: &str| match number(parameters, name)? {
        Some(value) if value > 0.0 => Ok(value),
        found => {
            let found = found.map_or("missing".to_owned(), |value| value.to_string());
            Err(field_error(name, found, format!("a number above 0, as rope_type {kind} needs")))
        }
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: positive("factor")? },
        "llama3" => {
            let original = "original_max_position_embeddings";
            let (low_freq_factor, high_freq_factor) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                return Err(field_error("high_freq_factor", high_freq_factor, "a number above low_freq_factor"));
            }
            let length = size(fields, original)?.or(size(parameters, original)?).unwrap_or(max_position_embeddings);
            RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: length,
            }
        }
        other => return Err(unsupported("rope_type", other, "default, linear, llama3")),
    };
    Ok(RopeConfig { theta, scaling })
}

// GGUF

fn required<T>(key: &str, value: Option<T>) -> Result<T, Error> {
    value.ok_or_else(|| retune_formats::Error::GgufMissingKey { key: key.to_owned() }.into())
}

/// The keys of one architecture: "llama.block_count" is asked for as "block_count".
struct GgufHeader<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl GgufHeader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A size that is one number, or a list with the same number for every layer.
    fn size(&self, name: &str) -> Result<Option<usize>, Error> {
        let key = self.key(name);
        let Some(values) = self.metadata.get_u64_array(&key)? else {
            return Ok(None);
        };
        match values.split_first() {
            Some((&first, rest)) if rest.iter().all(|&value| value == first) => {
                usize::try_from(first).map(Some).map_err(|_| field_error(&key, first, "a size"))
            }
            _ => Err(unsupported("layers of different sizes,", key, "the same sizes in every layer")),
        }
    }

    fn required_size(&self, name: &str) -> Result<usize, Error> {
        required(&self.key(name), self.size(name)?)
    }

    fn number(&self, name: &str) -> Result<Option<f32>, Error> {
        Ok(self.metadata.get_f32(&self.key(name))?)
    }

    fn required_number(&self, name: &str) -> Result<f32, Error> {
        required(&self.key(name), self.number(name)?)
    }

    fn refuse_unsupported(&self) -> Result<(), Error> {
        if let Some(experts) = self.size("expert_count")?.filter(|&experts| experts > 0) {
            return Err(unsupported("a mixture of experts, expert_count", experts, "dense models"));
        }
        if self.metadata.get_bool(&self.key("attention.causal"))? == Some(false) {
            return Err(unsupported("attention.causal", false, "causal models"));
        }
        if let Some(factor) = self.number("rope.scaling.attn_factor")?.filter(|&factor| factor != 1.0) {
            return Err(unsupported("rope.scaling.attn_factor", factor, "1"));
        }
        Ok(())
    }

    fn rope(&self, head_dim: usize, factors: Option<Vec<f32>>) -> Result<RopeConfig, Error> {
        let theta = f64::from(self.number("rope.freq_base")?.unwrap_or(10_000.0));
        let factor = match self.metadata.get_str(&self.key("rope.scaling.type"))? {
            Some("none") => 1.0,
            // llama.cpp takes a factor without a type as linear, and 0 as none.
            None | Some("linear") => match self.number("rope.scaling.factor")?.or(self.number("rope.scale_linear")?) {
                None | Some(0.0) => 1.0,
                Some(factor) if factor > 0.0 && factor.is_finite() => factor,
                Some(other) => return Err(field_error(&self.key("rope.scaling.factor"), other, "a number above 0")),
            },
            Some(other) => return Err(unsupported("rope.scaling.type", other, "none, linear")),
        };
        let scaling = match factors {
            Some(factors) => {
                let valid = factors.iter().all(|&value| value > 0.0 && value.is_finite());
                if !valid || factors.len() != head_dim / 2 {
                    let found = format!("{} values {factors:?}", factors.len());
                    let expected = format!("head_dim / 2 = {} numbers above 0", head_dim / 2);
                    return Err(field_error("rope_freqs.weight", found, expected));
                }
                RopeScaling::Factors(factors.into_iter().map(|value| value * factor).collect())
            }
            None if factor == 1.0 => RopeScaling::None,
            None => RopeScaling::Linear { factor: f64::from(factor) },
        };
        Ok(RopeConfig { theta, scaling })
    }
}

#[cfg(test)]
mod tests {
    use retune_quant::SharedBytes;

    use super::*;
    use retune_formats::gguf::testing::GgufBytes;

    fn read(config: Value) -> Result<ModelConfig, Error> {
        ModelConfig::from_hf_json(&config)
    }

    /// A small llama config with some fields replaced.
    fn with(changes: Value) -> Result<ModelConfig, Error> {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        read(config)
    }

    fn refusal(changes: Value) -> String {
        with(changes).expect_err("must be refused").to_string()
    }

    #[test]
    fn missing_fields_take_the_defaults_of_transformers() {
        let llama = read(json!({"model_type": "llama"})).unwrap();
        assert_eq!((llama.vocab_size, llama.intermediate_size, llama.num_key_value_heads), (32000, 11008, 32));
        assert_eq!((llama.head_dim, llama.max_position_embeddings, llama.rms_norm_eps), (128, 2048, 1e-6));
        assert_eq!((llama.bos_token_id, llama.eos_token_ids), (Some(1), vec![2]));
        assert_eq!(llama.rope, RopeConfig { theta: 10000.0, scaling: RopeScaling::None });
        assert!(!llama.tie_word_embeddings && !llama.attention_bias && llama.sliding_window.is_none());
        let mistral = read(json!({"model_type": "mistral", "attention_bias": true})).unwrap();
        assert_eq!(
            (mistral.intermediate_size, mistral.num_key_value_heads, mistral.sliding_window),
            (14336, 8, Some(4096))
        );
        assert!(!mistral.attention_bias);
    }

    #[test]
    fn null_is_not_the_same_as_missing() {
        let config = json!({"model_type": "mistral", "sliding_window": null, "num_key_value_heads": null, "head_dim": null,
            "bos_token_id": null, "eos_token_id": null});
        let mistral = read(config).unwrap();
        assert_eq!((mistral.sliding_window, mistral.num_key_value_heads, mistral.head_dim), (None, 32, 128));
        assert_eq!((mistral.bos_token_id, mistral.eos_token_ids), (None, vec![]));
    }

    #[test]
    fn several_end_tokens_are_kept() {
        assert_eq!(with(json!({"eos_token_id": [128001, 128009]})).unwrap().eos_token_ids, [128001, 128009]);
        assert!(refusal(json!({"eos_token_id": [1, -1]})).contains("eos_token_id"));
    }

    #[test]
    fn old_and_new_rope_spellings_agree() {
        let old = with(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}})).unwrap();
        let new =
            with(json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000}})).unwrap();
        assert_eq!(old.rope, new.rope);
        assert_eq!(old.rope, RopeConfig { theta: 5e5, scaling: RopeScaling::Linear { factor: 4.0 } });
        let plain = with(json!({"rope_theta": 1e6, "rope_scaling": null, "rope_parameters": {"rope_type": "default"}}))
            .unwrap();
        assert_eq!(plain.rope, RopeConfig { theta: 1e6, scaling: RopeScaling::None });
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        assert!(refusal(json!({"model_type": "qwen2"})).contains("qwen2"));
        assert!(refusal(json!({"model_type": null})).contains("llama, mistral"));
        assert!(refusal(json!({"hidden_act": "gelu"})).contains("gelu"));
        assert!(
            refusal(json!({"quantization_config": {"quant_method": "gptq", "load_in_4bit": true}})).contains("gptq")
        );
        let in_8_bits = json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}});
        assert!(refusal(in_8_bits).contains("bitsandbytes with load_in_4bit"));
        for in_4_bits in [json!({"load_in_4bit": true}), json!({"load_in_4bit": true, "quant_method": "bitsandbytes"})]
        {
            assert!(with(json!({"quantization_config": in_4_bits})).is_ok());
        }
        assert!(refusal(json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})).contains("yarn"));
        assert!(
            refusal(json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}})).contains("full_attention")
        );
        assert!(refusal(json!({"partial_rotary_factor": 0.5})).contains("partial_rotary_factor"));
        assert!(with(json!({"something_new": {"a": 1}, "quantization_config": null})).is_ok());
    }

    #[test]
    fn impossible_values_are_refused_by_field() {
        let huge = 1u64 << 60;
        for (name, value) in [
            ("vocab_size", json!(0)),
            ("vocab_size", json!(huge)),
            ("vocab_size", json!(-1)),
            ("vocab_size", json!("many")),
            ("hidden_size", json!(1.5)),
            ("num_hidden_layers", json!(huge)),
            ("num_hidden_layers", json!(100_000)),
            ("num_key_value_heads", json!(3)),
            ("num_key_value_heads", json!(0)),
            ("head_dim", json!(7)),
            ("head_dim", json!(u32::MAX - 1)),
            ("rms_norm_eps", json!(0)),
            ("rope_theta", json!(-1)),
            ("rope_scaling", json!([])),
            ("tie_word_embeddings", json!("yes")),
        ] {
            let mut changes = json!({});
            changes[name] = value.clone();
            assert!(refusal(changes).contains(name), "{name} {value}");
        }
        assert!(refusal(json!({"num_attention_heads": 0})).contains("num_attention_heads"));
        assert!(
            refusal(json!({"vocab_size": u32::MAX, "hidden_size": u32::MAX - 3, "head_dim": 8})).contains("memory")
        );
        assert!(refusal(json!({"rope_scaling": {"type": "linear"}})).contains("factor"));
        assert!(read(json!([1])).is_err());
    }

    fn header() -> GgufBytes {
        GgufBytes::default()
            .str("general.architecture", "llama")
            .u32("llama.block_count", 2)
            .u32("llama.context_length", 512)
            .u32("llama.embedding_length", 32)
            .u32("llama.feed_forward_length", 48)
            .u32("llama.attention.head_count", 4)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .f32_tensor("token_embd.weight", &[32, 1], &[0.0; 32])
    }

    fn from_gguf(bytes: &GgufBytes, factors: Option<Vec<f32>>) -> Result<ModelConfig, Error> {
        let file = Gguf::parse(SharedBytes::from_vec(bytes.build())).unwrap();
        ModelConfig::from_gguf(&file, factors)
    }

    fn gguf_refusal(bytes: &GgufBytes) -> String {
        from_gguf(bytes, None).expect_err("must be refused").to_string()
    }

    #[test]
    fn reads_gguf_headers() {
        let config = from_gguf(&header(), None).unwrap();
        assert_eq!((config.vocab_size, config.hidden_size, config.num_hidden_layers, config.head_dim), (1, 32, 2, 8));
        assert_eq!((config.num_key_value_heads, config.rms_norm_eps), (4, 1e-5));
        assert!(config.tie_word_embeddings && config.model_type == "llama");
        let window =
            header().u32("llama.attention.sliding_window", 16).f32_tensor("output.weight", &[32, 1], &[0.0; 32]);
        let config = from_gguf(&window, None).unwrap();
        assert_eq!((config.sliding_window, config.model_type.as_str()), (Some(16), "mistral"));
        assert!(!config.tie_word_embeddings);
        let linear = header().str("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 2.0);
        assert_eq!(from_gguf(&linear, None).unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
        let both = from_gguf(&linear, Some(vec![1.0, 1.0, 2.0, 4.0])).unwrap();
        assert_eq!(both.rope.scaling, RopeScaling::Factors(vec![2.0, 2.0, 4.0, 8.0]));
    }

    #[test]
    fn refuses_gguf_models_of_other_kinds() {
        assert!(gguf_refusal(&header().u32("llama.expert_count", 8)).contains("experts"));
        assert!(gguf_refusal(&header().str("llama.rope.scaling.type", "yarn")).contains("yarn"));
        assert!(
            gguf_refusal(&header().u32("llama.rope.dimension_count", 4).u32("llama.attention.key_length", 8))
                .contains("is 4")
        );
        let other = GgufBytes::default().str("general.architecture", "gemma");
        assert!(gguf_refusal(&other).contains("gemma"));
        assert!(gguf_refusal(&GgufBytes::default()).contains("general.architecture"));
        assert!(gguf_refusal(&header().without_tensor("token_embd.weight")).contains("token_embd.weight"));
        let uneven = [&4u32.to_le_bytes()[..], &2u64.to_le_bytes(), &4u32.to_le_bytes(), &2u32.to_le_bytes()].concat();
        assert!(gguf_refusal(&header().entry("llama.attention.head_count_kv", 9, &uneven)).contains("head_count_kv"));
        assert!(from_gguf(&header(), Some(vec![1.0; 3])).is_err());
        assert!(from_gguf(&header(), Some(vec![0.0; 4])).is_err());
    }

    #[test]
    fn written_configs_read_back_the_same() {
        for changes in [
            json!({"tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true, "rms_norm_eps": 1e-5}),
            json!({"model_type": "mistral", "sliding_window": 5, "eos_token_id": [2, 3], "bos_token_id": null}),
            json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 128}}),
            json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 12}),
        ] {
            let config = with(changes).unwrap();
            assert_eq!(read(config.to_hf_json().unwrap()).unwrap(), config);
        }
        let eps = with(json!({"rms_norm_eps": 1e-5})).unwrap().to_hf_json().unwrap();
        assert_eq!(eps["rms_norm_eps"].to_string(), json!(1e-5).to_string());
    }

    #[test]
    fn rope_factors_are_written_as_the_scaling_they_come_from() {
        let config =
            with(json!({"head_dim": 64, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 32.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}))
            .unwrap();
        let plain = RopeConfig { theta: 5e5, scaling: RopeScaling::None }.inverse_frequencies(64);
        let scaled = config.rope.inverse_frequencies(64);
        let factors: Vec<f32> = plain.iter().zip(&scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect();
        let mut as_factors = config.clone();
        as_factors.rope.scaling = RopeScaling::Factors(factors);
        assert_eq!(as_factors.to_hf_json().unwrap(), config.to_hf_json().unwrap());
        as_factors.rope.scaling = RopeScaling::Factors((0..32).map(|i| 1.0 + i as f32).collect());
        assert!(as_factors.to_hf_json().is_err());
    }
}
