//! What decoders of Llama's shape share: the sizes and their names in `config.json`, and two sub-layers with q, k, v, o and gate, up,
//! down by the names that nearly all of them use.

use retune_engine::spec::{
    Attention, Block, Function, Head, Linear, Mix, ModelSpec, Norm, Order, Positions, Rope, Stack, SubLayer, Table,
};

use crate::error::Error;
use crate::fields::{Fields, SizeNames, Sizes, divided_head_dim};
use crate::rope::Rotary;

/// The defaults of a family's configuration class.
pub struct Defaults {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// As many as query heads, where none.
    pub num_key_value_heads: Option<usize>,
    /// The hidden size divided among the query heads, where none.
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub tie_word_embeddings: bool,
    pub rope_theta: f64,
}

/// Llama's, which others state their differences from.
pub const LLAMA: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: false,
    rope_theta: 10_000.0,
};

/// The sizes and constants of a model.
pub struct Decoder {
    pub sizes: Sizes,
    pub context: usize,
    pub eps: f32,
    pub tied: bool,
    rope_theta: f64,
}

/// Which linears of an attention have biases.
#[derive(Clone, Copy, Debug)]
pub struct Biases {
    pub qkv: bool,
    pub output: bool,
}

impl Biases {
    pub const NONE: Biases = Biases { qkv: false, output: false };

    /// All, or none.
    pub fn all(biased: bool) -> Self {
        Self { qkv: biased, output: biased }
    }
}

impl Decoder {
    /// Reads the sizes.
    ///
    /// # Errors
    /// Impossible ones.
    pub fn read(c: &Fields<'_>, defaults: &Defaults) -> Result<Self, Error> {
        let names = SizeNames::COMMON;
        let hidden_size = c.size(names.hidden_size, defaults.hidden_size)?;
        let num_attention_heads = c.size(names.num_attention_heads, defaults.num_attention_heads)?;
        // Null means as many as query heads.
        let num_key_value_heads =
            c.size_or_none(names.num_key_value_heads, defaults.num_key_value_heads)?.unwrap_or(num_attention_heads);
        let head_dim = match c.find_size("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None => divided_head_dim(names, hidden_size, num_attention_heads)?,
        };
        let sizes = Sizes {
            names,
            vocab_size: c.size("vocab_size", defaults.vocab_size)?,
            hidden_size,
            intermediate_size: c.size(names.intermediate_size, defaults.intermediate_size)?,
            num_hidden_layers: c.layers("num_hidden_layers", defaults.num_hidden_layers)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
        };
        sizes.check()?;
        Ok(Self {
            sizes,
            context: c.size("max_position_embeddings", defaults.max_position_embeddings)?,
            eps: c.eps("rms_norm_eps", defaults.rms_norm_eps)?,
            tied: c.flag("tie_word_embeddings", defaults.tie_word_embeddings)?,
            rope_theta: defaults.rope_theta,
        })
    }

    /// What the rotation depends on.
    pub fn rotary(&self) -> Rotary {
        Rotary { head_dim: self.sizes.head_dim, context: self.context, default_theta: self.rope_theta }
    }

    /// The name of a module of a layer.
    pub fn name(layer: usize, part: &str) -> String {
        format!("model.layers.{layer}.{part}")
    }

    /// Attention that turns by the first rotation and sees everything.
    pub fn attention(&self) -> Attention {
        Attention {
            queries: self.sizes.num_attention_heads,
            keys: self.sizes.num_key_value_heads,
            head_dim: self.sizes.head_dim,
            order: Order::Planes,
            qk_norm: None,
            positions: Positions::Rope(0),
            causal: true,
            window: None,
            scale: inverse_root(self.sizes.head_dim as f64),
            soft_cap: None,
            query_scale: None,
        }
    }

    /// The norms over each head of the queries and of the keys.
    pub fn qk_norms(&self, layer: usize, norm: fn(String, usize, f32) -> Norm) -> [Norm; 2] {
        ["self_attn.q_norm", "self_attn.k_norm"]
            .map(|part| norm(Self::name(layer, part), self.sizes.head_dim, self.eps))
    }

    /// Rows of the queries, and of the keys or values.
    pub fn rows(&self) -> (usize, usize) {
        let Sizes { num_attention_heads, num_key_value_heads, head_dim, .. } = self.sizes;
        (num_attention_heads * head_dim, num_key_value_heads * head_dim)
    }

    /// The sub-layer of an attention.
    pub fn attend(&self, layer: usize, biases: Biases, attention: Attention) -> SubLayer {
        let (query, key) = self.rows();
        let hidden = self.sizes.hidden_size;
        let name = |part: &str| Self::name(layer, part);
        let input = |part: &str, rows| Linear::new(name(part), rows, hidden).biased(biases.qkv);
        SubLayer {
            norm: Norm::rms(name("input_layernorm"), hidden, self.eps),
            inputs: vec![
                input("self_attn.q_proj", query),
                input("self_attn.k_proj", key),
                input("self_attn.v_proj", key),
            ],
            mix: Mix::Attention(attention),
            output: Linear::new(name("self_attn.o_proj"), hidden, query).biased(biases.output),
            post_norm: None,
        }
    }

    /// The sub-layer of a gated MLP.
    pub fn gated(&self, layer: usize, biased: bool, function: Function) -> SubLayer {
        let (hidden, inner) = (self.sizes.hidden_size, self.sizes.intermediate_size);
        let name = |part: &str| Self::name(layer, part);
        let input = |part: &str| Linear::new(name(part), inner, hidden).biased(biased);
        SubLayer {
            norm: Norm::rms(name("post_attention_layernorm"), hidden, self.eps),
            inputs: vec![input("mlp.gate_proj"), input("mlp.up_proj")],
            mix: Mix::Activation { function, gated: true },
            output: Linear::new(name("mlp.down_proj"), hidden, inner).biased(biased),
            post_norm: None,
        }
    }

    /// The model of these blocks.
    pub fn model(&self, family: &'static str, ropes: Vec<Rope>, block: impl Fn(usize) -> [SubLayer; 2]) -> ModelSpec {
        let Sizes { vocab_size, hidden_size, num_hidden_layers, .. } = self.sizes;
        let blocks = (0..num_hidden_layers).map(|layer| Block { sub_layers: block(layer).into() });
        ModelSpec {
            family,
            vocab_size,
            hidden_size,
            context: self.context,
            table: Table { name: "model.embed_tokens".to_owned(), scale: 1.0, positions: None, norm: None },
            encoder: None,
            decoder: Stack::new(blocks.collect(), Norm::rms("model.norm", hidden_size, self.eps)),
            ropes,
            head: Head {
                linear: Linear::new("lm_head", vocab_size, hidden_size),
                tied: self.tied,
                scale: 1.0,
                soft_cap: None,
            },
        }
    }
}

/// `x^(−1/2)`, in f64 as Python computes it.
pub fn inverse_root(x: f64) -> f32 {
    x.powf(-0.5) as f32
}

/// The window of each layer by `layer_types`, or by `otherwise` where the field is missing.
///
/// # Errors
/// Layers that see a window of no size.
pub fn windows(
    c: &Fields<'_>,
    layers: usize,
    window: Option<usize>,
    otherwise: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>, Error> {
    let sliding = c.sliding_layers(layers)?.unwrap_or_else(|| (0..layers).map(otherwise).collect());
    if window.is_none() && sliding.contains(&true) {
        let expected = "a size from 1 to 4294967295, as layers of type sliding_attention need";
        return Err(crate::fields::field_error("sliding_window", "null", expected));
    }
    Ok(sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect())
}
