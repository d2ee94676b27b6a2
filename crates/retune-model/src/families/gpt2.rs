//! GPT-2: weights stored as [in, out], q, k, v in one linear, learned positions, LayerNorm, a plain MLP.

use retune_engine::spec::{
    Attention, Block, Head, Linear, Mix, ModelSpec, Norm, Order, Positions, Stack, SubLayer, Table,
};

use serde_json::{Map, Value};

use super::{DefaultTokens, Family};
use crate::error::Error;
use crate::fields::{Fields, SizeNames, Sizes, divided_head_dim};
use crate::translate::{Gguf, Header, Key};

pub static GPT2: Family = Family {
    models: "GPT-2, DistilGPT-2",
    model_types: &["gpt2"],
    class: "GPT2LMHeadModel",
    prefix: "transformer.",
    tokens: DefaultTokens { bos: Some(50_256), eos: Some(50_256), pad: None },
    unquantized: &[],
    describe: gpt2,
    gguf: Some(Gguf {
        architecture: "gpt2",
        keys: &[&[
            Key::size("block_count", "n_layer").required(),
            Key::size("context_length", "n_positions").required(),
            Key::size("embedding_length", "n_embd").required(),
            Key::size("feed_forward_length", "n_inner").required(),
            Key::size("attention.head_count", "n_head").required(),
            Key::number("attention.layer_norm_epsilon", "layer_norm_epsilon").required(),
        ]],
        names: &[&[
            ("transformer.wte", "token_embd"),
            ("transformer.wpe", "position_embd"),
            ("transformer.ln_f", "output_norm"),
            ("lm_head", "output"),
            ("ln_1", "attn_norm"),
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            ("ln_2", "ffn_norm"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
        ]],
        biases: &[],
        paired_rows: false,
        complete: inner_size,
    }),
};

const SIZES: SizeNames = SizeNames {
    hidden_size: "n_embd",
    intermediate_size: "n_inner",
    num_attention_heads: "n_head",
    num_key_value_heads: "n_head",
};

/// llama.cpp's converter writes four times the hidden size whatever the MLP's size is; the tensor tells it.
fn inner_size(header: &Header<'_>, config: &mut Map<String, Value>, _: &mut Vec<String>) -> Result<(), Error> {
    if let Some(rows) = header.rows_of("blk.0.ffn_up.weight") {
        config.insert(SIZES.intermediate_size.to_owned(), rows.into());
    }
    Ok(())
}

fn gpt2(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    // transformers knows each of these sizes by two names.
    let size = |name: &str, other: &str, default| Ok::<_, Error>(c.find_size(name)?.unwrap_or(c.size(other, default)?));
    let hidden = size("n_embd", "hidden_size", 768)?;
    let heads = size("n_head", "num_attention_heads", 12)?;
    let layers = if c.get("n_layer").is_some() { "n_layer" } else { "num_hidden_layers" };
    let context = size("n_positions", "max_position_embeddings", 1024)?;
    let sizes = Sizes {
        names: SIZES,
        vocab_size: c.size("vocab_size", 50_257)?,
        hidden_size: hidden,
        intermediate_size: c.size("n_inner", 4 * hidden)?,
        num_hidden_layers: c.layers(layers, 12)?,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: divided_head_dim(SIZES, hidden, heads)?,
    };
    sizes.check()?;
    let Sizes { vocab_size, intermediate_size: inner, head_dim, .. } = sizes;
    let eps = c.eps("layer_norm_epsilon", 1e-5)?;
    let function = c.function("activation_function", "gelu_new")?;
    // `reorder_and_upcast_attn` changes the order of the arithmetic only.
    let scale = if c.flag("scale_attn_weights", true)? { (head_dim as f64).powf(-0.5) } else { 1.0 };
    let by_layer = c.flag("scale_attn_by_inverse_layer_idx", false)?;

    let block = |l: usize| {
        let name = |part: &str| format!("transformer.h.{l}.{part}");
        let linear = |part: &str, rows, cols| Linear::new(name(part), rows, cols).biased(true).transposed();
        let attention = Attention {
            queries: heads,
            keys: heads,
            head_dim,
            order: Order::Planes,
            qk_norm: None,
            positions: Positions::None,
            causal: true,
            window: None,
            scale: if by_layer { scale / (l + 1) as f64 } else { scale } as f32,
            soft_cap: None,
            query_scale: None,
        };
        let attend = SubLayer {
            norm: Norm::layer(name("ln_1"), hidden, eps),
            inputs: vec![linear("attn.c_attn", 3 * hidden, hidden)],
            mix: Mix::Attention(attention),
            output: linear("attn.c_proj", hidden, hidden),
            post_norm: None,
        };
        let mlp = SubLayer {
            norm: Norm::layer(name("ln_2"), hidden, eps),
            inputs: vec![linear("mlp.c_fc", inner, hidden)],
            mix: Mix::Activation { function, gated: false },
            output: linear("mlp.c_proj", hidden, inner),
            post_norm: None,
        };
        Block { sub_layers: vec![attend, mlp] }
    };
    Ok(ModelSpec {
        family: "gpt2",
        vocab_size,
        hidden_size: hidden,
        context,
        table: Table {
            name: "transformer.wte".to_owned(),
            scale: 1.0,
            positions: Some("transformer.wpe".to_owned()),
            norm: None,
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
