//! Between llama.cpp's way to describe a model and transformers': the header of a GGUF file becomes a `config.json`, which a family then
//! reads like any other.
//!
//! One table of key pairs and one of name pairs a family serve reading, writing and the `config.json` of a merged model. A header does not
//! say everything; what it leaves out is filled in as the published models have it, and noted.

use std::sync::LazyLock;

use retune_formats::gguf::{Gguf as File, TensorInfo};
use retune_quant::Matrix;
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::families::{FAMILIES, Family};
use crate::fields::{field_error, unsupported};
use crate::rope::{GGUF_FACTORS, scaling_of_factors};

/// How llama.cpp stores a family.
pub struct Gguf {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// The fields of the configuration.
    pub keys: &'static [&'static [Key]],
    /// Modules: transformers' name, in a layer what follows the layer's number, and llama.cpp's. The first that fits counts. Where there
    /// are several stacks of layers, the whole names with `*` for the number.
    pub names: &'static [&'static [(&'static str, &'static str)]],
    /// Flags of the configuration that say whether modules have biases, and llama.cpp's names of these modules.
    pub biases: &'static [(&'static str, &'static [&'static str])],
    /// Whether rows of queries and keys are stored as pairs of rotary dimensions, not as two halves.
    pub paired_rows: bool,
    /// Fills in what needs more than a table, and notes what the file does not say.
    pub complete: Complete,
}

/// Adds to the configuration what a header says in its own way, and to the notes what it does not say.
pub type Complete = fn(&Header<'_>, &mut Map<String, Value>, &mut Vec<String>) -> Result<(), Error>;

/// A field under both names.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// After the architecture: "block_count" of "llama.block_count".
    pub gguf: &'static str,
    /// The field of `config.json`.
    pub config: &'static str,
    pub kind: KeyKind,
    /// Whether no file goes without it.
    pub required: bool,
}

/// What a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// A size; 0 stands for none.
    Size,
    Number,
}

impl Key {
    pub const fn size(gguf: &'static str, config: &'static str) -> Self {
        Self { gguf, config, kind: KeyKind::Size, required: false }
    }

    pub const fn number(gguf: &'static str, config: &'static str) -> Self {
        Self { gguf, config, kind: KeyKind::Number, required: false }
    }

    pub const fn required(self) -> Self {
        Self { required: true, ..self }
    }
}

/// The fields of decoders of Llama's shape.
pub const KEYS: &[Key] = &[
    Key::size("block_count", "num_hidden_layers").required(),
    Key::size("context_length", "max_position_embeddings").required(),
    Key::size("embedding_length", "hidden_size").required(),
    Key::size("feed_forward_length", "intermediate_size").required(),
    Key::size("attention.head_count", "num_attention_heads").required(),
    Key::size("attention.head_count_kv", "num_key_value_heads"),
    Key::size("attention.key_length", "head_dim"),
    Key::number("attention.layer_norm_rms_epsilon", "rms_norm_eps").required(),
    Key::number(FREQ_BASE, ROPE_THETA),
];

/// The window of families whose files may give one.
pub const WINDOW: &[Key] = &[Key::size("attention.sliding_window", "sliding_window")];

/// The modules of decoders of Llama's shape.
pub const NAMES: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The norms over queries and keys.
pub const QK_NORMS: &[(&str, &str)] = &[("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")];

/// The biases of decoders of Llama's shape.
pub const BIASES: &[(&str, &[&str])] = &[
    ("attention_bias", &["attn_q", "attn_k", "attn_v", "attn_output"]),
    ("mlp_bias", &["ffn_gate", "ffn_up", "ffn_down"]),
];

const FREQ_BASE: &str = "rope.freq_base";
const ROPE_THETA: &str = "rope_theta";
const TABLE: &str = "token_embd.weight";
/// Missing where the table is the head as well.
pub const HEAD: &str = "output.weight";
pub const ROPE_FACTORS: &str = "rope_freqs.weight";
pub const LONG_FACTORS: &str = "rope_factors_long.weight";
pub const SHORT_FACTORS: &str = "rope_factors_short.weight";
/// Half of the largest head imaginable.
const MAX_ROPE_FACTORS: usize = 1 << 16;

/// For errors: the architectures of [`FAMILIES`], in their order.
fn architectures() -> &'static str {
    static NAMES: LazyLock<String> = LazyLock::new(|| {
        let names = FAMILIES.iter().filter_map(|family| Some(family.gguf.as_ref()?.architecture));
        names.collect::<Vec<_>>().join(", ")
    });
    &NAMES
}

impl Gguf {
    /// llama.cpp's name of a tensor that transformers names so, in a family whose names begin with `prefix`:
    /// "model.layers.3.mlp.up_proj.weight" is "blk.3.ffn_up.weight".
    pub fn name(&self, prefix: &str, name: &str) -> Option<String> {
        let (module, kind) = name.rsplit_once('.')?;
        let find = |module: &str| {
            self.names.iter().copied().flatten().find(|(theirs, _)| *theirs == module).map(|&(_, stored)| stored)
        };
        if let Some(stored) = find(module) {
            return Some(format!("{stored}.{kind}"));
        }
        // The first number in the name is the layer's.
        let is_number = |part: &&str| part.bytes().all(|byte| byte.is_ascii_digit());
        if let Some(number) = module.split('.').find(is_number)
            && let Some(stored) = find(&module.replacen(&format!(".{number}."), ".*.", 1))
        {
            return Some(format!("{}.{kind}", stored.replacen('*', number, 1)));
        }
        let in_layers = module.strip_prefix(prefix)?;
        let (layer, inner) = in_layers.strip_prefix("layers.").or(in_layers.strip_prefix("h."))?.split_once('.')?;
        find(inner).map(|stored| format!("blk.{layer}.{stored}.{kind}"))
    }
}

/// What the header of a GGUF file says, as a `config.json`.
pub struct Translation {
    pub family: &'static Family,
    pub gguf: &'static Gguf,
    /// As the file calls it: a Mistral may say that it is a Llama.
    architecture: String,
    pub config: Value,
    /// What the file does not say, and what is used instead.
    pub notes: Vec<String>,
}

impl Translation {
    /// Translates a header.
    ///
    /// # Errors
    /// Another architecture, mixtures of experts, layers of different sizes, rotary scaling that is not supported, missing keys.
    pub fn of(file: &File) -> Result<Translation, Error> {
        let architecture = required("general.architecture", file.metadata.get_str("general.architecture")?)?;
        let found = FAMILIES.iter().find_map(|family| {
            let gguf = family.gguf.as_ref().filter(|gguf| gguf.architecture == architecture)?;
            Some((*family, gguf))
        });
        let Some((mut family, mut gguf)) = found else {
            return Err(unsupported("general.architecture", architecture, architectures()));
        };
        let header = Header { file, architecture };
        header.refuse_unsupported()?;
        let mut config = header.fields(gguf)?;
        let mut notes = Vec::new();
        if let Some(window) = header.mistral_window(&config, &mut notes)? {
            config.insert("sliding_window".to_owned(), window.into());
            let mistral = FAMILIES.iter().find_map(|family| {
                let gguf = family.gguf.as_ref().filter(|gguf| gguf.architecture == "mistral")?;
                Some((*family, gguf))
            });
            (family, gguf) = mistral.unwrap_or((family, gguf));
        }
        if gguf.architecture == "mistral" {
            // Left out, it would have a default.
            config.entry("sliding_window").or_insert(Value::Null);
        }
        config.insert("architectures".to_owned(), json!([family.class]));
        config.insert("model_type".to_owned(), json!(family.model_types.first()));
        if config.contains_key(ROPE_THETA) {
            header.rotation(&mut config)?;
        }
        (gguf.complete)(&header, &mut config, &mut notes)?;
        let architecture = architecture.to_owned();
        Ok(Translation { family, gguf, architecture, config: Value::Object(config), notes })
    }

    /// Whether a tensor of the file is part of the configuration and not of the model.
    pub fn reads(&self, name: &str) -> bool {
        match self.gguf.architecture {
            "phi3" => [LONG_FACTORS, SHORT_FACTORS].contains(&name),
            _ => name == ROPE_FACTORS && self.config.get(ROPE_THETA).is_some(),
        }
    }

    /// An error about a field of the configuration, with the key of the file that it comes from.
    pub fn name_key(&self, error: Error) -> Error {
        match error {
            Error::ConfigField { field, found, expected } => {
                let key = self.gguf.keys.iter().copied().flatten().find(|key| key.config == field);
                let field = match key {
                    Some(key) => format!("{}.{} ({field})", self.architecture, key.gguf),
                    None => field,
                };
                Error::ConfigField { field, found, expected }
            }
            other => other,
        }
    }

    /// The `config.json` for transformers.
    ///
    /// # Errors
    /// Rotary factors that no scaling of transformers gives.
    pub fn hf_config(config: &Value) -> Result<Value, Error> {
        let scaling = config.get("rope_scaling");
        match scaling.filter(|scaling| scaling.get("rope_type").is_some_and(|kind| kind == GGUF_FACTORS)) {
            None => Ok(config.clone()),
            Some(scaling) => {
                let supported = "factors of a linear or llama3 scaling";
                let found = scaling.get("factors").unwrap_or(scaling);
                Err(unsupported("writing the rotary factors", found, supported))
            }
        }
    }
}

/// The keys of one architecture: "llama.block_count" is asked for as "block_count".
pub struct Header<'a> {
    file: &'a File,
    architecture: &'a str,
}

impl Header<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A size that is one number, or a list with the same number for every layer.
    ///
    /// # Errors
    /// Layers of different sizes, and what is no size.
    pub fn size(&self, name: &str) -> Result<Option<usize>, Error> {
        let key = self.key(name);
        let Some(values) = self.file.metadata.get_u64_array(&key)? else {
            return Ok(None);
        };
        match values.split_first() {
            Some((&first, rest)) if rest.iter().all(|&value| value == first) => {
                usize::try_from(first).map(Some).map_err(|_| field_error(&key, first, "a size"))
            }
            _ => Err(unsupported("layers of different sizes,", key, "the same sizes in every layer")),
        }
    }

    /// A size that no file goes without.
    ///
    /// # Errors
    /// As [`Self::size`]; a missing key.
    pub fn required_size(&self, name: &str) -> Result<usize, Error> {
        required(&self.key(name), self.size(name)?)
    }

    /// A number.
    ///
    /// # Errors
    /// Anything else.
    pub fn number(&self, name: &str) -> Result<Option<f32>, Error> {
        Ok(self.file.metadata.get_f32(&self.key(name))?)
    }

    /// The number of layers.
    ///
    /// # Errors
    /// A missing key.
    pub fn layers(&self) -> Result<usize, Error> {
        self.required_size("block_count")
    }

    /// Rows of a matrix of the file.
    pub fn rows_of(&self, tensor: &str) -> Option<usize> {
        self.file.tensor(tensor)?.dims.get(1).copied()
    }

    /// Whether the file has a tensor of this name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    fn refuse_unsupported(&self) -> Result<(), Error> {
        if let Some(experts) = self.size("expert_count")?.filter(|&experts| experts > 0) {
            return Err(unsupported("a mixture of experts, expert_count", experts, "dense models"));
        }
        if self.file.metadata.get_bool(&self.key("attention.causal"))? == Some(false) {
            return Err(unsupported("attention.causal", false, "causal models"));
        }
        Ok(())
    }

    /// What the tables say, and what all architectures have in common.
    fn fields(&self, gguf: &Gguf) -> Result<Map<String, Value>, Error> {
        let mut config = Map::new();
        for key in gguf.keys.iter().copied().flatten() {
            let value = match key.kind {
                KeyKind::Size => self.size(key.gguf)?.filter(|&size| size > 0 || key.required).map(Value::from),
                KeyKind::Number => match self.number(key.gguf)? {
                    // No JSON number, it would read as if it were missing.
                    Some(value) if !value.is_finite() => {
                        return Err(field_error(&self.key(key.gguf), value, "a finite number"));
                    }
                    value => value.map(shortest),
                },
            };
            match value {
                Some(value) => drop(config.insert(key.config.to_owned(), value)),
                None if key.required => return required(&self.key(key.gguf), None),
                // llama.cpp's default, which is not each family's in transformers.
                None if key.config == ROPE_THETA => drop(config.insert(key.config.to_owned(), json!(10_000.0))),
                None => {}
            }
        }
        // llama.cpp's default too is not each family's in transformers.
        if config.contains_key("num_attention_heads") && !config.contains_key("num_key_value_heads") {
            config.insert("num_key_value_heads".to_owned(), self.required_size("attention.head_count")?.into());
        }
        let Some(rows) = self.rows_of(TABLE) else {
            return Err(Error::MissingTensors { count: 1, first: TABLE.to_owned() });
        };
        config.insert("vocab_size".to_owned(), rows.into());
        config.insert("tie_word_embeddings".to_owned(), (!self.has_tensor(HEAD)).into());
        for (flag, modules) in gguf.biases {
            if modules.iter().any(|module| self.has_tensor(&format!("blk.0.{module}.bias"))) {
                config.insert((*flag).to_owned(), true.into());
            }
        }
        for (field, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            let id = self.file.metadata.get_u32(&format!("tokenizer.ggml.{key}_token_id"))?;
            config.insert(field.to_owned(), id.into());
        }
        Ok(config)
    }

    /// The window of a Mistral whose file says that it is a Llama: one it gives, or the one of Mistral 7B v0.1, which no file gives.
    fn mistral_window(&self, config: &Map<String, Value>, notes: &mut Vec<String>) -> Result<Option<usize>, Error> {
        if self.architecture != "llama" {
            return Ok(None);
        }
        if let Some(window) = self.size("attention.sliding_window")?.filter(|&window| window > 0) {
            return Ok(Some(window));
        }
        let is = |name: &str, value: f64| config.get(name).and_then(Value::as_f64) == Some(value);
        // Llama 3 8B has the same sizes but another base; later Mistrals too.
        let is_7b_v1 = is("hidden_size", 4096.0)
            && is("intermediate_size", 14_336.0)
            && is("num_hidden_layers", 32.0)
            && is("num_key_value_heads", 8.0)
            && is("max_position_embeddings", 32_768.0)
            && is(ROPE_THETA, 10_000.0);
        if is_7b_v1 {
            notes.push("the file does not give sliding_window; 4096 is used, as in Mistral 7B v0.1".to_owned());
        }
        Ok(is_7b_v1.then_some(4096))
    }

    /// Size of a head, how much of it is turned, and how.
    fn rotation(&self, config: &mut Map<String, Value>) -> Result<(), Error> {
        let is_phi3 = self.architecture == "phi3";
        let turned = self.size("rope.dimension_count")?;
        let head_dim = self.head_dim()?;
        let (hidden, heads) = (self.required_size("embedding_length")?, self.required_size("attention.head_count")?);
        if turned.is_some_and(|_| !is_phi3) || hidden.checked_rem(heads) == Some(0) {
            config.entry("head_dim").or_insert(head_dim.into());
        }
        for key in ["attention.value_length", "rope.dimension_count"] {
            let other = if is_phi3 && key == "rope.dimension_count" { None } else { self.size(key)? };
            if let Some(other) = other.filter(|&other| other != head_dim) {
                let supported = "the length of a key, head_dim";
                return Err(Error::Unsupported {
                    what: "a GGUF model whose",
                    found: format!("{key} is {other}"),
                    supported,
                });
            }
        }
        if !is_phi3 && let Some(scaling) = self.scaling(head_dim, config)? {
            config.insert("rope_scaling".to_owned(), Value::Object(scaling));
        }
        Ok(())
    }

    /// The size of a head, given or divided.
    ///
    /// # Errors
    /// Missing keys.
    pub fn head_dim(&self) -> Result<usize, Error> {
        let given = match self.size("attention.key_length")?.filter(|&size| size > 0) {
            None if self.architecture != "phi3" => self.size("rope.dimension_count")?.filter(|&size| size > 0),
            given => given,
        };
        match given {
            Some(head_dim) => Ok(head_dim),
            None => Ok(self.required_size("embedding_length")? / self.required_size("attention.head_count")?.max(1)),
        }
    }

    fn scaling(&self, head_dim: usize, config: &Map<String, Value>) -> Result<Option<Map<String, Value>>, Error> {
        let kind = self.file.metadata.get_str(&self.key("rope.scaling.type"))?;
        if kind != Some("yarn")
            && let Some(factor) = self.number("rope.scaling.attn_factor")?.filter(|&factor| factor != 1.0)
        {
            return Err(unsupported("rope.scaling.attn_factor", factor, "1"));
        }
        let factor = match kind {
            Some("none") => 1.0,
            // llama.cpp takes a factor without a type as linear, and 0 as none.
            None | Some("linear") => match self.number("rope.scaling.factor")?.or(self.number("rope.scale_linear")?) {
                None | Some(0.0) => 1.0,
                Some(factor) if factor > 0.0 && factor.is_finite() => factor,
                Some(other) => return Err(field_error(&self.key("rope.scaling.factor"), other, "a number above 0")),
            },
            Some("yarn") if self.has_tensor(ROPE_FACTORS) => {
                return Err(unsupported("rope.scaling.type yarn beside", ROPE_FACTORS, "one of the two"));
            }
            Some("yarn") => return self.yarn().map(Some),
            Some(other) => return Err(unsupported("rope.scaling.type", other, "none, linear, yarn")),
        };
        let Some(factors) = self.factors(ROPE_FACTORS)? else {
            let linear = json!({"rope_type": "linear", "type": "linear", "factor": shortest(factor)});
            return Ok(linear.as_object().filter(|_| factor != 1.0).cloned());
        };
        let valid = factors.iter().all(|&value| value > 0.0 && value.is_finite());
        if !valid || factors.len() != head_dim / 2 {
            let found = format!("{} values {factors:?}", factors.len());
            let expected = format!("head_dim / 2 = {} numbers above 0", head_dim / 2);
            return Err(field_error(ROPE_FACTORS, found, expected));
        }
        let factors: Vec<f32> = factors.into_iter().map(|value| value * factor).collect();
        let theta = config.get(ROPE_THETA).and_then(Value::as_f64).unwrap_or(10_000.0);
        if let Some(scaling) = scaling_of_factors(theta, &factors) {
            return Ok(Some(scaling));
        }
        let factors: Vec<Value> = factors.into_iter().map(shortest).collect();
        Ok(json!({"rope_type": GGUF_FACTORS, "factors": factors}).as_object().cloned())
    }

    fn yarn(&self) -> Result<Map<String, Value>, Error> {
        let mut scaling = Map::new();
        scaling.insert("rope_type".to_owned(), "yarn".into());
        let original = self.size("rope.scaling.original_context_length")?.map(Value::from);
        let number = |name: &str| Ok::<_, Error>(self.number(name)?.map(shortest));
        for (name, value) in [
            ("factor", number("rope.scaling.factor")?),
            ("original_max_position_embeddings", original),
            ("attention_factor", number("rope.scaling.yarn_attn_factor")?),
            ("beta_fast", number("rope.scaling.yarn_beta_fast")?),
            ("beta_slow", number("rope.scaling.yarn_beta_slow")?),
        ] {
            scaling.extend(value.map(|value| (name.to_owned(), value)));
        }
        Ok(scaling)
    }

    /// The values of a tensor with a factor for each frequency.
    fn factors(&self, name: &str) -> Result<Option<Vec<f32>>, Error> {
        self.file.tensor(name).map(factors_of).transpose()
    }
}

fn factors_of(info: &TensorInfo) -> Result<Vec<f32>, Error> {
    match *info.dims {
        [len] if len <= MAX_ROPE_FACTORS => {
            let matrix = Matrix::new(info.format, 1, len, info.bytes.clone());
            Ok(matrix.map_err(|error| Error::Tensor { tensor: info.name.clone(), error })?.to_f32())
        }
        _ => Err(retune_formats::Error::GgufHeader {
            found: format!("tensor {} of shape {:?}", info.name, info.shape()),
            expected: "one factor for each pair of a head's dimensions".to_owned(),
        }
        .into()),
    }
}

/// The shortest decimal of an f32: 1e-5, not 9.999999747378752e-6.
pub fn shortest(value: f32) -> Value {
    value.to_string().parse::<f64>().unwrap_or(f64::from(value)).into()
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, Error> {
    value.ok_or_else(|| retune_formats::Error::GgufMissingKey { key: key.to_owned() }.into())
}

/// For architectures whose keys say everything.
pub fn nothing_lost(_: &Header<'_>, _: &mut Map<String, Value>, _: &mut Vec<String>) -> Result<(), Error> {
    Ok(())
}

/// Phi-3's rotation: a part of each head, and where there are two lists of factors, these.
pub fn phi3_lost(header: &Header<'_>, config: &mut Map<String, Value>, _: &mut Vec<String>) -> Result<(), Error> {
    let head_dim = header.head_dim()?;
    if let Some(turned) = header.size("rope.dimension_count")?.filter(|&turned| turned != head_dim && head_dim > 0) {
        config.insert("partial_rotary_factor".to_owned(), (turned as f64 / head_dim as f64).into());
    }
    let original = header.size("rope.scaling.original_context_length")?;
    if let Some(original) = original {
        config.insert("original_max_position_embeddings".to_owned(), original.into());
    }
    let (long, short) = (header.factors(LONG_FACTORS)?, header.factors(SHORT_FACTORS)?);
    let (Some(long), Some(short)) = (long, short) else { return Ok(()) };
    let list = |factors: Vec<f32>| factors.into_iter().map(shortest).collect::<Vec<_>>();
    let mut scaling = json!({"rope_type": "longrope", "type": "longrope", "long_factor": list(long),
        "short_factor": list(short)});
    if let Some(factor) = header.number("rope.scaling.attn_factor")? {
        // Left out where it follows from the lengths, as in the published configurations.
        let context = header.required_size("context_length")? as f64;
        let original = original.map_or(4096.0, |original| original as f64);
        let usual = if context > original { (1.0 + (context / original).ln() / original.ln()).sqrt() } else { 1.0 };
        if factor != usual as f32 {
            scaling["attention_factor"] = shortest(factor);
        }
    }
    config.insert("rope_scaling".to_owned(), scaling);
    Ok(())
}

#[cfg(test)]
mod tests {
    use retune_engine::spec::ModelSpec;
    use retune_formats::gguf::testing::GgufBytes;
    use retune_quant::SharedBytes;

    use super::*;
    use crate::families::{Description, describe};

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

    fn translate(bytes: &GgufBytes) -> Result<(Translation, Description), Error> {
        let file = File::parse(SharedBytes::from_vec(bytes.build())).unwrap();
        let translation = Translation::of(&file)?;
        let description = describe(&translation.config).map_err(|error| translation.name_key(error))?;
        Ok((translation, description))
    }

    fn spec(bytes: &GgufBytes) -> ModelSpec {
        translate(bytes).unwrap().1.spec
    }

    fn refusal(bytes: &GgufBytes) -> String {
        translate(bytes).err().expect("must be refused").to_string()
    }

    #[test]
    fn reads_gguf_headers() {
        let (translation, Description { spec: llama, family, tokens }) = translate(&header()).unwrap();
        assert_eq!((llama.vocab_size, llama.hidden_size, llama.decoder.blocks.len(), llama.context), (1, 32, 2, 512));
        let attention = llama.decoder.blocks[0].sub_layers[0].attention().unwrap();
        assert_eq!((attention.keys, attention.head_dim, llama.decoder.norm.eps), (4, 8, 1e-5));
        assert!(llama.head.tied && family.class == "LlamaForCausalLM" && translation.notes.is_empty());
        assert_eq!(tokens, Default::default());
        // The shortest decimal.
        assert_eq!(translation.config["rms_norm_eps"].to_string(), json!(1e-5).to_string());

        let window = header().u32("llama.attention.sliding_window", 16);
        let window = window.f32_tensor("output.weight", &[32, 1], &[0.0; 32]).u32("tokenizer.ggml.eos_token_id", 7);
        let (_, Description { spec: mistral, family, tokens }) = translate(&window).unwrap();
        assert_eq!(
            (mistral.decoder.blocks[0].sub_layers[0].attention().unwrap().window, mistral.family),
            (Some(16), "mistral")
        );
        assert!(!mistral.head.tied && family.class == "MistralForCausalLM" && tokens.eos == [7]);

        let linear = header().str("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 2.0);
        assert_eq!(spec(&linear).ropes[0].frequencies[0], 0.5);
        let both = linear.f32_tensor("rope_freqs.weight", &[4], &[1.0, 1.0, 2.0, 4.0]);
        let plain = spec(&header()).ropes[0].frequencies.clone();
        let expected: Vec<f64> =
            plain.iter().zip([2.0f32, 2.0, 4.0, 8.0]).map(|(plain, by)| f64::from(*plain as f32 / by)).collect();
        assert_eq!(spec(&both).ropes[0].frequencies, expected);
        let yarn = header().str("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4.0);
        let yarn = spec(&yarn.u32("llama.rope.scaling.original_context_length", 128));
        assert_eq!(yarn.ropes[0].factor, (0.1 * 4f64.ln() + 1.0) as f32);
    }

    #[test]
    fn refuses_gguf_models_of_other_kinds() {
        assert!(refusal(&header().u32("llama.expert_count", 8)).contains("experts"));
        assert!(refusal(&header().str("llama.rope.scaling.type", "longrope")).contains("longrope"));
        assert!(refusal(&header().str("llama.rope.scaling.type", "yarn")).contains("yarn"));
        assert!(refusal(&header().f32("llama.rope.scaling.attn_factor", 2.0)).contains("attn_factor"));
        let turned = header().u32("llama.rope.dimension_count", 4).u32("llama.attention.key_length", 8);
        assert!(refusal(&turned).contains("is 4"));
        let other = GgufBytes::default().str("general.architecture", "falcon");
        let text = refusal(&other);
        assert!(text.contains("falcon") && text.contains("llama, mistral, qwen2"), "{text}");
        assert!(refusal(&GgufBytes::default()).contains("general.architecture"));
        assert!(refusal(&header().without_tensor("token_embd.weight")).contains("token_embd.weight"));
        let uneven = [&4u32.to_le_bytes()[..], &2u64.to_le_bytes(), &4u32.to_le_bytes(), &2u32.to_le_bytes()].concat();
        assert!(refusal(&header().entry("llama.attention.head_count_kv", 9, &uneven)).contains("head_count_kv"));
        for factors in [vec![1.0f32; 3], vec![0.0; 4]] {
            let dims = [factors.len() as u64];
            assert!(refusal(&header().f32_tensor("rope_freqs.weight", &dims, &factors)).contains("rope_freqs.weight"));
        }
        let biased = header().u32("llama.attention.sliding_window", 16);
        assert!(refusal(&biased.f32_tensor("blk.0.attn_q.bias", &[32], &[0.0; 32])).contains("attention_bias"));
    }

    #[test]
    fn errors_name_the_key_of_the_file() {
        let text = refusal(&header().u32("llama.attention.head_count_kv", 3));
        assert!(text.contains("llama.attention.head_count_kv (num_key_value_heads) is 3"), "{text}");
        let missing = GgufBytes::default().str("general.architecture", "gpt2").u32("gpt2.block_count", 1);
        assert!(refusal(&missing).contains("gpt2.context_length"));
    }

    #[test]
    fn names_map_to_llama_cpp() {
        let of = |architecture: &str, name: &str| {
            let family = FAMILIES
                .iter()
                .find(|family| family.gguf.as_ref().is_some_and(|gguf| gguf.architecture == architecture));
            let family = family.unwrap();
            family.gguf.as_ref().unwrap().name(family.prefix, name)
        };
        for (architecture, theirs, stored) in [
            ("llama", "model.embed_tokens.weight", "token_embd.weight"),
            ("llama", "model.layers.12.self_attn.o_proj.bias", "blk.12.attn_output.bias"),
            ("llama", "model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("llama", "lm_head.weight", "output.weight"),
            ("gemma2", "model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
            ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("qwen3", "model.layers.3.self_attn.k_norm.weight", "blk.3.attn_k_norm.weight"),
            ("phi3", "model.layers.3.mlp.gate_up_proj.weight", "blk.3.ffn_up.weight"),
            ("gpt2", "transformer.h.3.attn.c_attn.bias", "blk.3.attn_qkv.bias"),
            ("bloom", "transformer.word_embeddings_layernorm.bias", "token_embd_norm.bias"),
            ("t5", "shared.weight", "token_embd.weight"),
            ("t5", "encoder.block.12.layer.1.layer_norm.weight", "enc.blk.12.ffn_norm.weight"),
            ("t5", "decoder.block.1.layer.1.layer_norm.weight", "dec.blk.1.cross_attn_norm.weight"),
            ("t5", "decoder.block.0.layer.2.DenseReluDense.wi_1.weight", "dec.blk.0.ffn_up.weight"),
        ] {
            assert_eq!(of(architecture, theirs).as_deref(), Some(stored));
        }
        assert_eq!(of("llama", "model.layers.0.other.weight"), None);
        assert_eq!(of("llama", "weight"), None);
    }

    /// The keys of a model of these sizes, in an architecture of Llama's kind.
    fn keys(architecture: &str, numbers: &[(&str, u32)], floats: &[(&str, f32)]) -> GgufBytes {
        let key = |name: &str| format!("{architecture}.{name}");
        let mut bytes = GgufBytes::default().str("general.architecture", architecture);
        bytes = bytes.f32(&key("attention.layer_norm_rms_epsilon"), 1e-6);
        for (name, number) in numbers {
            bytes = bytes.u32(&key(name), *number);
        }
        for (name, number) in floats {
            bytes = bytes.f32(&key(name), *number);
        }
        bytes.f32_tensor("token_embd.weight", &[1, 1], &[0.0])
    }

    /// What published models have and their files do not say.
    #[test]
    fn what_files_do_not_say_is_as_in_the_published_models() {
        let mistral = [
            ("block_count", 32),
            ("context_length", 32768),
            ("embedding_length", 4096),
            ("feed_forward_length", 14336),
            ("attention.head_count", 32),
            ("attention.head_count_kv", 8),
        ];
        let (translation, v1) = translate(&keys("llama", &mistral, &[("rope.freq_base", 10000.0)])).unwrap();
        assert_eq!(v1.spec.sub_layers().next().unwrap().attention().unwrap().window, Some(4096));
        assert!(v1.spec.family == "mistral" && translation.notes[0].contains("4096"));
        let (translation, v3) = translate(&keys("llama", &mistral, &[("rope.freq_base", 1e6)])).unwrap();
        assert!(v3.spec.family == "llama" && translation.notes.is_empty());

        let gemma = |layers: u32| {
            [
                ("block_count", layers),
                ("context_length", 8192),
                ("embedding_length", 4608),
                ("feed_forward_length", 64),
                ("attention.head_count", 32),
                ("attention.head_count_kv", 16),
                ("attention.key_length", 128),
                ("attention.sliding_window", 4096),
            ]
        };
        let scale = |spec: &ModelSpec| spec.decoder.blocks[0].sub_layers[0].attention().unwrap().scale;
        assert_eq!(scale(&spec(&keys("gemma2", &gemma(46), &[]))), (144f64.powf(-0.5)) as f32);
        assert_eq!(scale(&spec(&keys("gemma2", &gemma(42), &[]))), (128f64.powf(-0.5)) as f32);

        let (translation, gemma3) = translate(&keys("gemma3", &gemma(12), &[("rope.freq_base", 1e6)])).unwrap();
        let windows: Vec<bool> =
            gemma3.spec.decoder.blocks.iter().map(|b| b.sub_layers[0].attention().unwrap().window.is_some()).collect();
        assert_eq!(windows.iter().filter(|sliding| !**sliding).count(), 2);
        assert!(!windows[5] && !windows[11] && translation.notes.len() == 2);
        // Older files lack the base of layers that see a window.
        assert_eq!(gemma3.spec.ropes[1].frequencies, retune_engine::spec::frequencies(1e4, 128));
        assert_eq!(gemma3.spec.ropes[0].frequencies, retune_engine::spec::frequencies(1e6, 128));
    }
}
