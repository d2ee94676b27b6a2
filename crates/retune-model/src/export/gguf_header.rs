//! The header of a GGUF file: copied from the one that the model comes from, or made of what is known of a model and of its tokenizer, with
//! the keys of llama.cpp's converter.

use retune_engine::spec::{Attention, Mix, ModelSpec, frequencies};
use retune_formats::gguf::write::{Entry, Header};
use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::fields::{Fields, unsupported};
use crate::rope::Rotary;
use crate::translate::{Gguf, LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS};

/// Architectures whose headers are made; a model of another that is a GGUF file already keeps its own.
const MADE: [&str; 10] = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "bloom"];

/// The header for a model, without its tensors.
///
/// # Errors
/// A family or a tokenizer that is not written.
pub(super) fn of(checkpoint: &Checkpoint, gguf: &Gguf) -> Result<Header, Error> {
    let mut header = Header::default();
    if let Some(metadata) = checkpoint.gguf_metadata() {
        header.copy(metadata);
        return Ok(header);
    }
    if !MADE.contains(&gguf.architecture) {
        let what = format!("of {} models only those are written that come from a GGUF file", checkpoint.spec.family);
        return Err(Error::NoGguf { what });
    }
    let architecture = architecture(checkpoint, gguf)?;
    header.set("general.architecture", Entry::Text(&architecture));
    header.set("general.type", Entry::Text("model"));
    let path = checkpoint.path().canonicalize().unwrap_or_else(|_| checkpoint.path().to_owned());
    header.set("general.name", Entry::Text(&path.file_name().unwrap_or_default().to_string_lossy()));
    let config = Fields::of(checkpoint.config_json())?;
    Keys { header: &mut header, architecture: &architecture, config }.model(&checkpoint.spec)?;
    vocabulary(&mut header, checkpoint)?;
    Ok(header)
}

/// What the file calls the architecture.
///
/// # Errors
/// A damaged header.
pub(super) fn architecture(checkpoint: &Checkpoint, gguf: &Gguf) -> Result<String, Error> {
    if let Some(metadata) = checkpoint.gguf_metadata()
        && let Some(name) = metadata.get_str("general.architecture")?
    {
        return Ok(name.to_owned());
    }
    // llama.cpp knows Mistral as a Llama.
    Ok(if gguf.architecture == "mistral" { "llama" } else { gguf.architecture }.to_owned())
}

/// The keys of an architecture.
struct Keys<'a> {
    header: &'a mut Header,
    architecture: &'a str,
    config: Fields<'a>,
}

impl Keys<'_> {
    fn set(&mut self, key: &str, value: Entry<'_>) {
        self.header.set(&format!("{}.{key}", self.architecture), value);
    }

    fn size(&mut self, key: &str, value: usize) {
        self.set(key, Entry::U32(u32::try_from(value).unwrap_or(u32::MAX)));
    }

    fn model(&mut self, spec: &ModelSpec) -> Result<(), Error> {
        let attention = attention(spec)?;
        let inner = spec.sub_layers().find(|sub_layer| matches!(sub_layer.mix, Mix::Activation { .. }));
        self.size("block_count", spec.decoder.blocks.len());
        self.size("context_length", spec.context);
        self.size("embedding_length", spec.hidden_size);
        self.size("feed_forward_length", inner.map_or(0, |sub_layer| sub_layer.output.cols));
        self.size("attention.head_count", attention.queries);
        self.size("attention.head_count_kv", attention.keys);
        let eps = Entry::F32(spec.decoder.norm.eps);
        if ["gpt2", "bloom"].contains(&self.architecture) {
            self.set("attention.layer_norm_epsilon", eps);
            return Ok(());
        }
        self.set("attention.layer_norm_rms_epsilon", eps);
        self.size("attention.key_length", attention.head_dim);
        self.size("attention.value_length", attention.head_dim);
        let windows = spec.sub_layers().filter_map(|sub_layer| sub_layer.attention()?.window).min();
        match self.architecture {
            "llama" => {
                self.size("vocab_size", spec.vocab_size);
                self.size("rope.dimension_count", attention.head_dim);
            }
            "gemma2" | "gemma3" => {
                if let Some(window) = windows {
                    self.size("attention.sliding_window", window);
                }
                for (key, cap) in
                    [("attn_logit_softcapping", attention.soft_cap), ("final_logit_softcapping", spec.head.soft_cap)]
                {
                    if let Some(cap) = cap {
                        self.set(key, Entry::F32(cap));
                    }
                }
            }
            // 0 is what tells Phi-4-mini from the others.
            "phi3" => self.size("attention.sliding_window", windows.unwrap_or(0)),
            _ => {}
        }
        self.rotation(spec, attention)
    }

    fn rotation(&mut self, spec: &ModelSpec, attention: &Attention) -> Result<(), Error> {
        let number = |parameters: &Map<String, Value>, name: &str| parameters.get(name).and_then(Value::as_f64);
        if self.architecture == "gemma3" {
            let both = self.config.object("rope_parameters")?;
            let inside = |kind: &str| both.and_then(|both| both.get(kind)?.as_object());
            for (key, kind, outside, default) in [
                ("rope.freq_base", "full_attention", "rope_theta", 1e6),
                ("rope.freq_base_swa", "sliding_attention", "rope_local_base_freq", 1e4),
            ] {
                let theta = inside(kind).and_then(|parameters| number(parameters, "rope_theta"));
                let theta = theta.or(self.config.find_number(outside)?).unwrap_or(default);
                self.set(key, Entry::F32(theta as f32));
            }
            let old = self.config.object("rope_scaling")?.filter(|object| !object.is_empty());
            return old.or(inside("full_attention")).map_or(Ok(()), |parameters| self.scaling(parameters));
        }
        let parameters = rotary(spec, attention).parameters(&self.config)?;
        let theta = number(&parameters, "rope_theta").unwrap_or(DEFAULT_THETA);
        self.set("rope.freq_base", Entry::F32(theta as f32));
        if self.architecture == "phi3"
            && let [rope] = spec.ropes.as_slice()
        {
            self.size("rope.dimension_count", 2 * rope.frequencies.len());
            let original = self.config.size("original_max_position_embeddings", 4096)?;
            self.size("rope.scaling.original_context_length", original);
            if rope.long.is_some() {
                self.set("rope.scaling.attn_factor", Entry::F32(rope.factor));
            }
            return Ok(());
        }
        self.scaling(&parameters)
    }

    fn scaling(&mut self, parameters: &Map<String, Value>) -> Result<(), Error> {
        let c = Fields::new(parameters);
        let kind = c.text("rope_type")?.or(c.text("type")?).unwrap_or("default");
        match kind {
            // Llama 3's is a tensor.
            "default" | "llama3" => return Ok(()),
            "linear" | "yarn" => self.set("rope.scaling.type", Entry::Text(kind)),
            other => return Err(unsupported("in a GGUF file, rope_type", other, "default, linear, llama3, yarn")),
        }
        for (key, name) in [
            ("factor", "factor"),
            ("yarn_attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ] {
            if let Some(value) = c.find_number(name)? {
                self.set(&format!("rope.scaling.{key}"), Entry::F32(value as f32));
            }
        }
        if let Some(length) = c.find_size("original_max_position_embeddings")? {
            self.size("rope.scaling.original_context_length", length);
        }
        Ok(())
    }
}

/// The base of the rotation where a configuration gives none.
const DEFAULT_THETA: f64 = 1e4;

fn rotary(spec: &ModelSpec, attention: &Attention) -> Rotary {
    Rotary { head_dim: attention.head_dim, context: spec.context, default_theta: DEFAULT_THETA }
}

fn attention(spec: &ModelSpec) -> Result<&Attention, Error> {
    let found = spec.sub_layers().find_map(|sub_layer| sub_layer.attention());
    found.ok_or_else(|| Error::NoGguf { what: "it has no attention".to_owned() })
}

/// What the plain frequencies of a rotation are divided by, by the name of the tensor.
///
/// # Errors
/// A damaged configuration.
pub(super) fn factors(checkpoint: &Checkpoint) -> Result<Vec<(&'static str, Vec<f32>)>, Error> {
    let spec = &checkpoint.spec;
    let [rope] = spec.ropes.as_slice() else { return Ok(Vec::new()) };
    let parameters = rotary(spec, attention(spec)?).parameters(&Fields::of(checkpoint.config_json())?)?;
    let c = Fields::new(&parameters);
    if rope.long.is_some() {
        let list = |name: &str| c.list(name, "numbers", |value: &Value| value.as_f64().map(|value| value as f32));
        let named = [(LONG_FACTORS, "long_factor"), (SHORT_FACTORS, "short_factor")];
        return named.map(|(tensor, name)| Ok((tensor, list(name)?.unwrap_or_default()))).into_iter().collect();
    }
    if c.text("rope_type")?.or(c.text("type")?) != Some("llama3") {
        return Ok(Vec::new());
    }
    let plain = frequencies(c.find_number("rope_theta")?.unwrap_or(DEFAULT_THETA), 2 * rope.frequencies.len());
    let factors = plain.iter().zip(&rope.frequencies).map(|(plain, scaled)| (plain / scaled) as f32);
    Ok(vec![(ROPE_FACTORS, factors.collect())])
}

/// The `tokenizer.*` keys.
fn vocabulary(header: &mut Header, checkpoint: &Checkpoint) -> Result<(), Error> {
    let vocabulary = checkpoint.tokenizer()?.to_gguf(checkpoint.spec.vocab_size)?;
    header.set("tokenizer.ggml.model", Entry::Text(vocabulary.model));
    header.set("tokenizer.ggml.pre", Entry::Text(vocabulary.pre));
    header.set("tokenizer.ggml.tokens", Entry::Texts(&vocabulary.tokens));
    if let Some(scores) = &vocabulary.scores {
        header.set("tokenizer.ggml.scores", Entry::F32s(scores));
    }
    header.set("tokenizer.ggml.token_type", Entry::I32s(&vocabulary.types));
    if let Some(merges) = &vocabulary.merges {
        header.set("tokenizer.ggml.merges", Entry::Texts(merges));
    }
    for (key, id) in [
        ("bos", vocabulary.bos),
        ("eos", vocabulary.eos),
        ("eot", vocabulary.eot),
        ("unknown", vocabulary.unk),
        ("padding", vocabulary.pad),
    ] {
        if let Some(id) = id {
            header.set(&format!("tokenizer.ggml.{key}_token_id"), Entry::U32(id));
        }
    }
    header.set("tokenizer.ggml.add_bos_token", Entry::Bool(vocabulary.add_bos));
    header.set("tokenizer.ggml.add_eos_token", Entry::Bool(vocabulary.add_eos));
    if let Some(prefixes) = vocabulary.add_space_prefix {
        header.set("tokenizer.ggml.add_space_prefix", Entry::Bool(prefixes));
    }
    if let Some(template) = &vocabulary.chat_template {
        header.set("tokenizer.chat_template", Entry::Text(template));
    }
    Ok(())
}
