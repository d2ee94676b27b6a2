//! The linear modules of a tiny Llama model, for the tests of this crate.

use crate::targets::{BaseModules, LinearModule};

const fn module(name: &'static str, in_features: usize, out_features: usize) -> LinearModule<'static> {
    LinearModule {
        name,
        in_features,
        out_features,
        has_bias: false,
        is_output_head: false,
        is_table: false,
        is_transposed: false,
    }
}

/// Three layers, hidden size 32, MLP of 48, keys and values of 16, a vocabulary of 64.
pub(crate) const MODULES: [LinearModule<'static>; 22] = [
    module("model.layers.0.self_attn.q_proj", 32, 32),
    module("model.layers.0.self_attn.k_proj", 32, 16),
    module("model.layers.0.self_attn.v_proj", 32, 16),
    module("model.layers.0.self_attn.o_proj", 32, 32),
    module("model.layers.0.mlp.gate_proj", 32, 48),
    module("model.layers.0.mlp.up_proj", 32, 48),
    module("model.layers.0.mlp.down_proj", 48, 32),
    module("model.layers.1.self_attn.q_proj", 32, 32),
    module("model.layers.1.self_attn.k_proj", 32, 16),
    module("model.layers.1.self_attn.v_proj", 32, 16),
    module("model.layers.1.self_attn.o_proj", 32, 32),
    module("model.layers.1.mlp.gate_proj", 32, 48),
    module("model.layers.1.mlp.up_proj", 32, 48),
    module("model.layers.1.mlp.down_proj", 48, 32),
    module("model.layers.2.self_attn.q_proj", 32, 32),
    module("model.layers.2.self_attn.k_proj", 32, 16),
    module("model.layers.2.self_attn.v_proj", 32, 16),
    module("model.layers.2.self_attn.o_proj", 32, 32),
    module("model.layers.2.mlp.gate_proj", 32, 48),
    module("model.layers.2.mlp.up_proj", 32, 48),
    module("model.layers.2.mlp.down_proj", 48, 32),
    LinearModule {
        name: "lm_head",
        in_features: 32,
        out_features: 64,
        has_bias: false,
        is_output_head: true,
        is_table: false,
        is_transposed: false,
    },
];

pub(crate) fn tiny_llama() -> BaseModules<'static> {
    BaseModules { linears: MODULES.to_vec(), family: "llama", ..BaseModules::default() }
}

/// The same model with a bias on every linear module but the head.
pub(crate) fn tiny_llama_with_biases() -> BaseModules<'static> {
    let biased = |module: &LinearModule<'static>| LinearModule { has_bias: !module.is_output_head, ..*module };
    BaseModules { linears: MODULES.iter().map(biased).collect(), family: "llama", ..BaseModules::default() }
}
