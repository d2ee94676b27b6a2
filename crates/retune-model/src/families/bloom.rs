//! BLOOM and BLOOMZ: q, k, v of each head side by side, ALiBi, a norm after the embedding.

use retune_engine::spec::{
    Attention, Block, Function, Head, Linear, Mix, ModelSpec, Norm, Order, Positions, Stack, SubLayer, Table,
};

use serde_json::{Map, Value};

use super::decoder::inverse_root;
use super::{DefaultTokens, Family};
use crate::error::Error;
use crate::fields::{Fields, SizeNames, Sizes, divided_head_dim};
use crate::translate::{Gguf, Header, Key};

pub static BLOOM: Family = Family {
    models: "BLOOM, BLOOMZ",
    model_types: &["bloom"],
    class: "BloomForCausalLM",
    prefix: "transformer.",
    tokens: DefaultTokens { bos: Some(1), eos: Some(2), pad: None },
    unquantized: &[],
    describe: bloom,
    gguf: Some(Gguf {
        architecture: "bloom",
        keys: &[&[
            Key::size("block_count", "n_layer").required(),
            Key::size("context_length", "seq_length").required(),
            Key::size("embedding_length", "hidden_size").required(),
            Key::size("attention.head_count", "n_head").required(),
            Key::number("attention.layer_norm_epsilon", "layer_norm_epsilon").required(),
        ]],
        names: &[&[
            ("transformer.word_embeddings", "token_embd"),
            ("transformer.word_embeddings_layernorm", "token_embd_norm"),
            ("transformer.ln_f", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("self_attention.query_key_value", "attn_qkv"),
            ("self_attention.dense", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.dense_h_to_4h", "ffn_up"),
            ("mlp.dense_4h_to_h", "ffn_down"),
        ]],
        biases: &[],
        paired_rows: false,
        complete: context_lost,
    }),
};

const SIZES: SizeNames = SizeNames {
    hidden_size: "hidden_size",
    intermediate_size: "hidden_size",
    num_attention_heads: "n_head",
    num_key_value_heads: "n_head",
};

/// The length that BLOOM was trained on is in no recent configuration, and llama.cpp's converter writes the hidden size then. Positions
/// are unbounded either way.
fn context_lost(_: &Header<'_>, config: &mut Map<String, Value>, _: &mut Vec<String>) -> Result<(), Error> {
    if config.get("seq_length") == config.get("hidden_size") {
        config.remove("seq_length");
    }
    Ok(())
}

fn bloom(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    // Older files use the second name of each; `n_embed` wins where both are there.
    let hidden = c.find_size("n_embed")?.map_or_else(|| c.size("hidden_size", 64), Ok)?;
    let heads = c.find_size("n_head")?.map_or_else(|| c.size("num_attention_heads", 8), Ok)?;
    let layers = if c.get("n_layer").is_some() { "n_layer" } else { "num_hidden_layers" };
    let sizes = Sizes {
        names: SIZES,
        vocab_size: c.size("vocab_size", 250_880)?,
        hidden_size: hidden,
        intermediate_size: 4 * hidden,
        num_hidden_layers: c.layers(layers, 2)?,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: divided_head_dim(SIZES, hidden, heads)?,
    };
    sizes.check()?;
    let Sizes { vocab_size, intermediate_size: inner, head_dim, .. } = sizes;
    let eps = c.eps("layer_norm_epsilon", 1e-5)?;

    let block = |l: usize| {
        let name = |part: &str| format!("transformer.h.{l}.{part}");
        let linear = |part: &str, rows, cols| Linear::new(name(part), rows, cols).biased(true);
        let attention = Attention {
            queries: heads,
            keys: heads,
            head_dim,
            order: Order::Heads,
            qk_norm: None,
            positions: Positions::Alibi,
            causal: true,
            window: None,
            scale: inverse_root(head_dim as f64),
            soft_cap: None,
            query_scale: None,
        };
        let attend = SubLayer {
            norm: Norm::layer(name("input_layernorm"), hidden, eps),
            inputs: vec![linear("self_attention.query_key_value", 3 * hidden, hidden)],
            mix: Mix::Attention(attention),
            output: linear("self_attention.dense", hidden, hidden),
            post_norm: None,
        };
        let mlp = SubLayer {
            norm: Norm::layer(name("post_attention_layernorm"), hidden, eps),
            inputs: vec![linear("mlp.dense_h_to_4h", inner, hidden)],
            mix: Mix::Activation { function: Function::GeluTanh, gated: false },
            output: linear("mlp.dense_4h_to_h", hidden, inner),
            post_norm: None,
        };
        Block { sub_layers: vec![attend, mlp] }
    };
    Ok(ModelSpec {
        family: "bloom",
        vocab_size,
        hidden_size: hidden,
        context: c.size("seq_length", 2048)?,
        table: Table {
            name: "transformer.word_embeddings".to_owned(),
            scale: 1.0,
            positions: None,
            norm: Some(Norm::layer("transformer.word_embeddings_layernorm", hidden, eps)),
        },
        encoder: None,
        decoder: Stack::new(
            (0..sizes.num_hidden_layers).map(block).collect(),
            Norm::layer("transformer.ln_f", hidden, eps),
        ),
        ropes: Vec::new(),
        head: Head {
            linear: Linear::new("lm_head", vocab_size, hidden),
            tied: c.flag("tie_word_embeddings", true)?,
            scale: 1.0,
            soft_cap: None,
        },
    })
}
