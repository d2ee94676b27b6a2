//! The fields of a `config.json`, with errors that name the field, what was found and what is expected.
//!
//! A family reads its configuration through [`Fields`] and states transformers' default beside each field. What no family implements and
//! would change the results is refused here by name; other unknown fields are ignored, as transformers does. The checks of sizes are here
//! too, once for all families.

use retune_engine::spec::{Function, ModelSpec};
use serde_json::{Map, Value};

use crate::error::Error;

/// No known model has a tenth of it; a hostile header could ask for billions.
const MAX_LAYERS: usize = 4096;

/// Fields that change the results of some model and that no family here implements, each with the value that changes nothing.
const NOT_IMPLEMENTED: [(&str, Harmless, &str); 19] = [
    ("num_experts", Harmless::Number(0.0), "dense models"),
    ("num_local_experts", Harmless::Number(0.0), "dense models"),
    ("n_routed_experts", Harmless::Number(0.0), "dense models"),
    ("use_parallel_residual", Harmless::Flag(false), "false"),
    ("parallel_attn", Harmless::Flag(false), "false"),
    ("alibi", Harmless::Flag(false), "false"),
    ("use_qk_norm", Harmless::Flag(false), "false"),
    ("add_cross_attention", Harmless::Flag(false), "false"),
    ("use_bidirectional_attention", Harmless::Flag(false), "false"),
    ("is_causal", Harmless::Flag(true), "true"),
    ("apply_residual_connection_post_layernorm", Harmless::Flag(false), "false"),
    ("clip_qkv", Harmless::Null, "null"),
    ("logit_scale", Harmless::Number(1.0), "1"),
    ("logits_scaling", Harmless::Number(1.0), "1"),
    ("residual_multiplier", Harmless::Number(1.0), "1"),
    ("embedding_multiplier", Harmless::Number(1.0), "1"),
    ("attention_multiplier", Harmless::Null, "null"),
    ("per_layer_config", Harmless::Null, "null"),
    ("rope_interleaved", Harmless::Flag(false), "false"),
];

/// The value with which a field changes nothing; null never does.
#[derive(Clone, Copy)]
enum Harmless {
    Null,
    Flag(bool),
    Number(f64),
}

impl Harmless {
    fn is(self, value: &Value) -> bool {
        match self {
            Harmless::Null => value.is_null(),
            Harmless::Flag(flag) => value.is_null() || *value == Value::Bool(flag),
            Harmless::Number(number) => value.is_null() || value.as_f64() == Some(number),
        }
    }
}

/// The fields of one object of a `config.json`.
#[derive(Clone, Copy)]
pub struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The fields of a whole `config.json`.
    ///
    /// # Errors
    /// Anything but an object.
    pub fn of(config: &'a Value) -> Result<Self, Error> {
        config.as_object().map(Fields).ok_or_else(|| field_error("config.json", config, "an object"))
    }

    /// The fields of a part of it.
    pub fn new(object: &'a Map<String, Value>) -> Self {
        Fields(object)
    }

    /// The value of a field, null included.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name)
    }

    /// A field that may be missing or null.
    fn find<T>(
        &self,
        name: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| field_error(name, value, expected)),
        }
    }

    /// A size, if it is given.
    ///
    /// # Errors
    /// Anything but an integer from 1 to 4294967295.
    pub fn find_size(&self, name: &str) -> Result<Option<usize>, Error> {
        let size = self.find(name, "a size from 1 to 4294967295", Value::as_u64)?;
        size.map(|size| match u32::try_from(size) {
            Ok(0) | Err(_) => Err(field_error(name, size, "a size from 1 to 4294967295")),
            Ok(size) => Ok(size as usize),
        })
        .transpose()
    }

    /// A size, or its default where it is missing or null.
    ///
    /// # Errors
    /// As [`Self::find_size`].
    pub fn size(&self, name: &str, default: usize) -> Result<usize, Error> {
        Ok(self.find_size(name)?.unwrap_or(default))
    }

    /// A size that null takes away: the default holds only where the field is missing.
    ///
    /// # Errors
    /// As [`Self::find_size`].
    pub fn size_or_none(&self, name: &str, default: Option<usize>) -> Result<Option<usize>, Error> {
        if self.0.contains_key(name) { self.find_size(name) } else { Ok(default) }
    }

    /// The number of layers.
    ///
    /// # Errors
    /// As [`Self::find_size`]; more than any model has.
    pub fn layers(&self, name: &str, default: usize) -> Result<usize, Error> {
        let layers = self.size(name, default)?;
        if layers > MAX_LAYERS {
            return Err(field_error(name, layers, format!("at most {MAX_LAYERS}")));
        }
        Ok(layers)
    }

    /// A number, if it is given.
    ///
    /// # Errors
    /// Anything but a number.
    pub fn find_number(&self, name: &str) -> Result<Option<f64>, Error> {
        self.find(name, "a number", Value::as_f64)
    }

    /// A number that null takes away and that must be above 0: the default holds only where the field is missing.
    ///
    /// # Errors
    /// Anything but a number above 0.
    pub fn positive_or_none(&self, name: &str, default: Option<f32>) -> Result<Option<f32>, Error> {
        if !self.0.contains_key(name) {
            return Ok(default);
        }
        self.find_number(name)?.map(|value| positive(name, value, "a number above 0")).transpose()
    }

    /// The number that a norm adds to a variance.
    ///
    /// # Errors
    /// Anything but a number above 0.
    pub fn eps(&self, name: &str, default: f32) -> Result<f32, Error> {
        self.find_number(name)?.map_or(Ok(default), |eps| positive(name, eps, "a small number above 0"))
    }

    /// A flag, or its default where it is missing or null.
    ///
    /// # Errors
    /// Anything but true and false.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, Error> {
        Ok(self.find(name, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A text, if it is given.
    ///
    /// # Errors
    /// Anything but a string.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>, Error> {
        self.find(name, "a string", Value::as_str)
    }

    /// An object, if it is given.
    ///
    /// # Errors
    /// Anything but an object.
    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, Error> {
        self.find(name, "an object", Value::as_object)
    }

    /// A list, if it is given, of values that `convert` takes.
    ///
    /// # Errors
    /// Anything but a list of them.
    pub fn list<T>(
        &self,
        name: &str,
        expected: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        self.find(name, expected, |value| value.as_array()?.iter().map(&convert).collect())
    }

    /// Token ids, one or a list; none where the field is null or missing.
    ///
    /// # Errors
    /// Anything that is no token id.
    pub fn token_ids(&self, name: &str) -> Result<Vec<u32>, Error> {
        let id = |value: &Value| -> Option<u32> { value.as_u64()?.try_into().ok() };
        let ids = self.find(name, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// The activation, by transformers' name.
    ///
    /// # Errors
    /// An activation that is not supported.
    pub fn function(&self, name: &'static str, default: &str) -> Result<Function, Error> {
        let found = match self.0.get(name) {
            None | Some(Value::Null) => default,
            Some(Value::String(text)) => text,
            Some(other) => return Err(unsupported(name, other, ACTIVATIONS)),
        };
        activation(name, found)
    }

    /// For each layer whether it sees a window only, by `layer_types`, if the field is given.
    ///
    /// # Errors
    /// Other kinds of layers, and another number of them than the model has.
    pub fn sliding_layers(&self, layers: usize) -> Result<Option<Vec<bool>>, Error> {
        let Some(kinds) = self.list("layer_types", "a list of strings", |kind| kind.as_str().map(str::to_owned))?
        else {
            return Ok(None);
        };
        if kinds.len() != layers {
            let found = format!("a list of {}", kinds.len());
            return Err(field_error("layer_types", found, format!("one type for each of the {layers} layers")));
        }
        let is_sliding = |kind: &String| match kind.as_str() {
            "sliding_attention" => Ok(true),
            "full_attention" => Ok(false),
            other => Err(unsupported("layer_types", format!("{other:?}"), "full_attention, sliding_attention")),
        };
        kinds.iter().map(is_sliding).collect::<Result<_, _>>().map(Some)
    }

    /// Refuses a flag that this family does not have and that transformers ignores: whoever set it expects another model.
    ///
    /// # Errors
    /// The flag where it is true.
    pub fn refuse_flag(&self, name: &'static str) -> Result<(), Error> {
        match self.flag(name, false)? {
            true => Err(unsupported(name, true, "false, in models of this type")),
            false => Ok(()),
        }
    }

    /// Refuses what changes a model's results and is not implemented in any family.
    ///
    /// # Errors
    /// The first such field.
    pub fn refuse_unsupported(&self) -> Result<(), Error> {
        if let Some(quantization) = self.get("quantization_config").filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method");
            let is_bitsandbytes = method.is_none_or(|method| *method == "bitsandbytes");
            let in_bits =
                ["load_in_4bit", "load_in_8bit"].iter().any(|key| quantization.get(*key) == Some(&Value::Bool(true)));
            if !(is_bitsandbytes && in_bits) {
                let supported = "bitsandbytes with load_in_4bit or load_in_8bit, unquantized F32, F16 or BF16 weights, and GGUF files";
                return Err(unsupported("quantization_config", method.unwrap_or(quantization), supported));
            }
        }
        for (name, harmless, supported) in NOT_IMPLEMENTED {
            if let Some(value) = self.get(name).filter(|value| !harmless.is(value)) {
                return Err(unsupported(name, value, supported));
            }
        }
        Ok(())
    }
}

const ACTIVATIONS: &str = "silu, gelu, gelu_new, gelu_pytorch_tanh, relu";

/// The activation that transformers calls so, found in the field `name`.
///
/// # Errors
/// An activation that is not supported.
pub fn activation(name: &'static str, found: &str) -> Result<Function, Error> {
    match found {
        // transformers knows these by several names.
        "silu" | "swish" => Ok(Function::Silu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_python_tanh" => Ok(Function::GeluTanh),
        "gelu" | "gelu_python" => Ok(Function::Gelu),
        "relu" => Ok(Function::Relu),
        other => Err(unsupported(name, format!("{other:?}"), ACTIVATIONS)),
    }
}

fn positive(name: &str, value: f64, expected: &str) -> Result<f32, Error> {
    let rounded = value as f32;
    if rounded > 0.0 && rounded.is_finite() { Ok(rounded) } else { Err(field_error(name, value, expected)) }
}

/// The largest head imaginable: a rotation has a frequency for each two of its dimensions, computed before any tensor is looked at.
const MOST_HEAD_DIM: usize = 1 << 17;

/// The sizes that every family has, under the names its configuration gives them.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub names: SizeNames,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
}

/// What a family's configuration calls its sizes.
#[derive(Clone, Copy, Debug)]
pub struct SizeNames {
    pub hidden_size: &'static str,
    pub intermediate_size: &'static str,
    pub num_attention_heads: &'static str,
    pub num_key_value_heads: &'static str,
}

impl SizeNames {
    /// The names that nearly all families use.
    pub const COMMON: SizeNames = SizeNames {
        hidden_size: "hidden_size",
        intermediate_size: "intermediate_size",
        num_attention_heads: "num_attention_heads",
        num_key_value_heads: "num_key_value_heads",
    };
}

impl Sizes {
    /// Refuses sizes that contradict each other, and those whose products would overflow. A family calls it before it builds anything.
    ///
    /// # Errors
    /// The field that is amiss.
    pub fn check(&self) -> Result<(), Error> {
        let names = self.names;
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of {}, {}", names.num_attention_heads, self.num_attention_heads);
            return Err(field_error(names.num_key_value_heads, self.num_key_value_heads, expected));
        }
        let query_size = self.num_attention_heads.checked_mul(self.head_dim).filter(|&n| u32::try_from(n).is_ok());
        let Some(query_size) = query_size else {
            let expected = format!("a size whose product with {} is below 2^32", names.num_attention_heads);
            return Err(field_error("head_dim", self.head_dim, expected));
        };
        if self.head_dim > MOST_HEAD_DIM {
            return Err(field_error("head_dim", self.head_dim, format!("at most {MOST_HEAD_DIM}")));
        }
        for (name, rows) in [
            ("vocab_size", self.vocab_size),
            (names.intermediate_size, self.intermediate_size),
            ("head_dim", query_size),
        ] {
            if !fits(&[rows, self.hidden_size]) {
                return Err(field_error(name, rows, "a size whose matrices fit in memory"));
            }
        }
        Ok(())
    }
}

/// The head size of a configuration that does not give it.
///
/// # Errors
/// A hidden size that the heads do not divide.
pub fn divided_head_dim(names: SizeNames, hidden_size: usize, num_attention_heads: usize) -> Result<usize, Error> {
    match hidden_size.checked_rem(num_attention_heads) {
        Some(0) => Ok(hidden_size / num_attention_heads),
        _ => Err(field_error(
            names.hidden_size,
            hidden_size,
            format!("a multiple of {}, {num_attention_heads}", names.num_attention_heads),
        )),
    }
}

/// Refuses a model with a tensor that cannot be held in memory as f32: fused linears are larger than what [`Sizes::check`] sees.
///
/// # Errors
/// The first such tensor.
pub fn check_tensors(spec: &ModelSpec) -> Result<(), Error> {
    match spec.tensors().into_iter().find(|(_, shape)| !fits(shape)) {
        Some((name, shape)) => {
            Err(field_error(&format!("the shape of {name}"), format!("{shape:?}"), "one whose values fit in memory"))
        }
        None => Ok(()),
    }
}

fn fits(shape: &[usize]) -> bool {
    let bytes = shape.iter().try_fold(size_of::<f32>(), |bytes, &dim| bytes.checked_mul(dim));
    bytes.is_some_and(|bytes| isize::try_from(bytes).is_ok())
}

/// A field with an impossible value; a long one is cut.
pub fn field_error(field: &str, found: impl ToString, expected: impl Into<String>) -> Error {
    let found = found.to_string();
    let short = match found.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", found.get(..end).unwrap_or_default()),
        None => found,
    };
    Error::ConfigField { field: field.to_owned(), found: short, expected: expected.into() }
}

/// Something well-formed that is not implemented.
pub fn unsupported(what: &'static str, found: impl ToString, supported: &'static str) -> Error {
    Error::Unsupported { what, found: found.to_string(), supported }
}
