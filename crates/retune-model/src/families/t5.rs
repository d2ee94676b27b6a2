//! T5 and FLAN-T5: an encoder and a decoder that looks at its output, biases by distance in the place of positions, scores without a scale.

use retune_engine::spec::{
    Attention, Block, Buckets, CrossAttention, Encoder, Function, Head, Linear, Mix, ModelSpec, Norm, Order, Positions,
    Stack, SubLayer, Table,
};

use serde_json::{Map, Value};

use super::decoder::inverse_root;
use super::{DefaultTokens, Family};
use crate::error::Error;
use crate::fields::{Fields, SizeNames, Sizes, activation, field_error};
use crate::translate::{Gguf, Header, Key};

pub static T5: Family = Family {
    models: "T5, FLAN-T5",
    model_types: &["t5"],
    class: "T5ForConditionalGeneration",
    prefix: "",
    tokens: DefaultTokens { bos: None, eos: Some(1), pad: Some(0) },
    unquantized: &["wo"],
    describe: t5,
    gguf: Some(Gguf {
        architecture: "t5",
        keys: &[&[
            Key::size("block_count", "num_layers").required(),
            Key::size("decoder_block_count", "num_decoder_layers"),
            Key::size("context_length", "n_positions").required(),
            Key::size("embedding_length", "d_model").required(),
            Key::size("feed_forward_length", "d_ff").required(),
            Key::size("attention.head_count", "num_heads").required(),
            Key::size("attention.key_length", "d_kv").required(),
            Key::size("attention.relative_buckets_count", "relative_attention_num_buckets").required(),
            Key::number("attention.layer_norm_rms_epsilon", "layer_norm_epsilon").required(),
        ]],
        names: &[&[
            ("shared", "token_embd"),
            ("lm_head", "output"),
            ("encoder.final_layer_norm", "enc.output_norm"),
            ("encoder.block.*.layer.0.layer_norm", "enc.blk.*.attn_norm"),
            ("encoder.block.*.layer.0.SelfAttention.q", "enc.blk.*.attn_q"),
            ("encoder.block.*.layer.0.SelfAttention.k", "enc.blk.*.attn_k"),
            ("encoder.block.*.layer.0.SelfAttention.v", "enc.blk.*.attn_v"),
            ("encoder.block.*.layer.0.SelfAttention.o", "enc.blk.*.attn_o"),
            ("encoder.block.*.layer.0.SelfAttention.relative_attention_bias", "enc.blk.*.attn_rel_b"),
            ("encoder.block.*.layer.1.layer_norm", "enc.blk.*.ffn_norm"),
            ("encoder.block.*.layer.1.DenseReluDense.wi", "enc.blk.*.ffn_up"),
            ("encoder.block.*.layer.1.DenseReluDense.wi_0", "enc.blk.*.ffn_gate"),
            ("encoder.block.*.layer.1.DenseReluDense.wi_1", "enc.blk.*.ffn_up"),
            ("encoder.block.*.layer.1.DenseReluDense.wo", "enc.blk.*.ffn_down"),
            ("decoder.final_layer_norm", "dec.output_norm"),
            ("decoder.block.*.layer.0.layer_norm", "dec.blk.*.attn_norm"),
            ("decoder.block.*.layer.0.SelfAttention.q", "dec.blk.*.attn_q"),
            ("decoder.block.*.layer.0.SelfAttention.k", "dec.blk.*.attn_k"),
            ("decoder.block.*.layer.0.SelfAttention.v", "dec.blk.*.attn_v"),
            ("decoder.block.*.layer.0.SelfAttention.o", "dec.blk.*.attn_o"),
            ("decoder.block.*.layer.0.SelfAttention.relative_attention_bias", "dec.blk.*.attn_rel_b"),
            ("decoder.block.*.layer.1.layer_norm", "dec.blk.*.cross_attn_norm"),
            ("decoder.block.*.layer.1.EncDecAttention.q", "dec.blk.*.cross_attn_q"),
            ("decoder.block.*.layer.1.EncDecAttention.k", "dec.blk.*.cross_attn_k"),
            ("decoder.block.*.layer.1.EncDecAttention.v", "dec.blk.*.cross_attn_v"),
            ("decoder.block.*.layer.1.EncDecAttention.o", "dec.blk.*.cross_attn_o"),
            ("decoder.block.*.layer.2.layer_norm", "dec.blk.*.ffn_norm"),
            ("decoder.block.*.layer.2.DenseReluDense.wi", "dec.blk.*.ffn_up"),
            ("decoder.block.*.layer.2.DenseReluDense.wi_0", "dec.blk.*.ffn_gate"),
            ("decoder.block.*.layer.2.DenseReluDense.wi_1", "dec.blk.*.ffn_up"),
            ("decoder.block.*.layer.2.DenseReluDense.wo", "dec.blk.*.ffn_down"),
        ]],
        biases: &[],
        paired_rows: false,
        complete: lost,
    }),
};

/// What llama.cpp assumes of every T5: the distance up to which distances are told apart, and the MLP's function. Whether outputs are
/// scaled follows from the head, as in the published models: those that are tied to the table are.
fn lost(header: &Header<'_>, config: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<(), Error> {
    let max_distance = 128;
    let function = if header.has_tensor("enc.blk.0.ffn_gate.weight") { "gated-gelu" } else { "relu" };
    let start = header.size("decoder_start_token_id")?.unwrap_or(0);
    config.insert("is_encoder_decoder".to_owned(), true.into());
    config.insert("decoder_start_token_id".to_owned(), start.into());
    config.insert("feed_forward_proj".to_owned(), function.into());
    config.insert("relative_attention_max_distance".to_owned(), max_distance.into());
    notes.push(format!(
        "the file gives neither relative_attention_max_distance nor feed_forward_proj; {max_distance} and {function} are used, as \
         in the published models"
    ));
    Ok(())
}

const SIZES: SizeNames = SizeNames {
    hidden_size: "d_model",
    intermediate_size: "d_ff",
    num_attention_heads: "num_heads",
    num_key_value_heads: "num_heads",
};

/// The sizes and constants of a model.
struct T5Sizes {
    sizes: Sizes,
    eps: f32,
    function: Function,
    gated: bool,
    buckets: usize,
    max_distance: usize,
}

fn t5(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let heads = c.size(SIZES.num_attention_heads, 8)?;
    let layers = c.layers("num_layers", 6)?;
    let decoder_layers = c.layers("num_decoder_layers", layers)?;
    let sizes = Sizes {
        names: SIZES,
        vocab_size: c.size("vocab_size", 32_128)?,
        hidden_size: c.size(SIZES.hidden_size, 512)?,
        intermediate_size: c.size(SIZES.intermediate_size, 2048)?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: c.size("d_kv", 64)?,
    };
    sizes.check()?;
    let (function, gated) = feed_forward(c.text("feed_forward_proj")?.unwrap_or("relu"))?;
    let eps = c.eps("layer_norm_epsilon", 1e-6)?;
    let buckets = c.size("relative_attention_num_buckets", 32)?;
    let max_distance = c.size("relative_attention_max_distance", 128)?;
    // Of the exact buckets there must be one at the least, and distances beyond them.
    if buckets < 4 || max_distance <= buckets / 2 {
        let expected = "at least 4, and less than twice relative_attention_max_distance";
        return Err(field_error("relative_attention_num_buckets", buckets, expected));
    }
    // transformers 5 ties whatever `tie_word_embeddings` says, unless the file has a head of its own, and keeps what the key meant
    // for the scale under a key of its own.
    let scaled = c.flag("scale_decoder_outputs", c.flag("tie_word_embeddings", true)?)?;
    let start = c.token_ids("decoder_start_token_id")?.first().copied().unwrap_or(0);
    if start as usize >= sizes.vocab_size {
        let expected = format!("a token of the vocabulary of {}", sizes.vocab_size);
        return Err(field_error("decoder_start_token_id", start, expected));
    }
    let of = T5Sizes { sizes, eps, function, gated, buckets, max_distance };
    let Sizes { vocab_size, hidden_size, .. } = of.sizes;
    Ok(ModelSpec {
        family: "t5",
        vocab_size,
        hidden_size,
        context: c.size("n_positions", 512)?,
        table: Table { name: "shared".to_owned(), scale: 1.0, positions: None, norm: None },
        encoder: Some(Encoder { stack: of.stack("encoder", layers, false), decoder_start: start }),
        decoder: of.stack("decoder", decoder_layers, true),
        ropes: Vec::new(),
        head: Head {
            linear: Linear::new("lm_head", vocab_size, hidden_size),
            tied: true,
            scale: if scaled { inverse_root(hidden_size as f64) } else { 1.0 },
            soft_cap: None,
        },
    })
}

/// The MLP's activation, and whether it is gated: "relu", "gated-gelu". That gelu has always been the one with tanh.
fn feed_forward(proj: &str) -> Result<(Function, bool), Error> {
    const NAME: &str = "feed_forward_proj";
    match proj.strip_prefix("gated-") {
        Some("gelu") => Ok((Function::GeluTanh, true)),
        Some(function) => Ok((activation(NAME, function)?, true)),
        None => Ok((activation(NAME, proj)?, false)),
    }
}

impl T5Sizes {
    fn stack(&self, side: &str, layers: usize, is_decoder: bool) -> Stack {
        let Sizes { hidden_size, num_attention_heads: heads, .. } = self.sizes;
        let block = |layer: usize| {
            let name = |part: usize| format!("{side}.block.{layer}.layer.{part}");
            let mut sub_layers = vec![self.attend(&name(0), is_decoder)];
            if is_decoder {
                sub_layers.push(self.attend_to_encoder(&name(1)));
            }
            sub_layers.push(self.mlp(&name(sub_layers.len())));
            Block { sub_layers }
        };
        let buckets = Buckets {
            name: format!("{side}.block.0.layer.0.SelfAttention.relative_attention_bias"),
            count: self.buckets,
            heads,
            max_distance: self.max_distance,
            bidirectional: !is_decoder,
        };
        let norm = Norm::rms(format!("{side}.final_layer_norm"), hidden_size, self.eps);
        Stack { blocks: (0..layers).map(block).collect(), norm, buckets: Some(buckets) }
    }

    fn linear(&self, module: &str, part: &str, rows: usize) -> Linear {
        Linear::new(format!("{module}.{part}"), rows, self.sizes.hidden_size)
    }

    fn sub_layer(&self, name: &str, inputs: Vec<Linear>, mix: Mix, output: String, mixed: usize) -> SubLayer {
        SubLayer {
            norm: Norm::rms(format!("{name}.layer_norm"), self.sizes.hidden_size, self.eps),
            inputs,
            mix,
            output: Linear::new(output, self.sizes.hidden_size, mixed),
            post_norm: None,
        }
    }

    fn attend(&self, name: &str, causal: bool) -> SubLayer {
        let Sizes { num_attention_heads: heads, head_dim, .. } = self.sizes;
        let (module, width) = (format!("{name}.SelfAttention"), heads * head_dim);
        let inputs = ["q", "k", "v"].map(|part| self.linear(&module, part, width)).to_vec();
        let attention = Attention {
            queries: heads,
            keys: heads,
            head_dim,
            order: Order::Planes,
            qk_norm: None,
            positions: Positions::Buckets,
            causal,
            window: None,
            scale: 1.0,
            soft_cap: None,
            query_scale: None,
        };
        self.sub_layer(name, inputs, Mix::Attention(attention), format!("{module}.o"), width)
    }

    fn attend_to_encoder(&self, name: &str) -> SubLayer {
        let Sizes { num_attention_heads: heads, head_dim, .. } = self.sizes;
        let (module, width) = (format!("{name}.EncDecAttention"), heads * head_dim);
        let memory = ["k", "v"].map(|part| self.linear(&module, part, width));
        let cross = CrossAttention { heads, head_dim, scale: 1.0, memory };
        let inputs = vec![self.linear(&module, "q", width)];
        self.sub_layer(name, inputs, Mix::Cross(cross), format!("{module}.o"), width)
    }

    fn mlp(&self, name: &str) -> SubLayer {
        let (module, inner) = (format!("{name}.DenseReluDense"), self.sizes.intermediate_size);
        let parts: &[&str] = if self.gated { &["wi_0", "wi_1"] } else { &["wi"] };
        let inputs = parts.iter().map(|part| self.linear(&module, part, inner)).collect();
        let mix = Mix::Activation { function: self.function, gated: self.gated };
        self.sub_layer(name, inputs, mix, format!("{module}.wo"), inner)
    }
}
