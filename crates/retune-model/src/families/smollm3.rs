//! SmolLM3: Llama in which every fourth layer has no rotation.

use retune_engine::spec::{Attention, ModelSpec, Positions};

use super::decoder::{Biases, Decoder, Defaults, LLAMA, windows};
use super::{DefaultTokens, Family};
use crate::error::Error;
use crate::fields::{Fields, field_error};
use crate::translate::{BIASES, Gguf, KEYS, NAMES, nothing_lost};

pub static SMOLLM3: Family = Family {
    models: "SmolLM3",
    model_types: &["smollm3"],
    class: "SmolLM3ForCausalLM",
    prefix: "model.",
    tokens: DefaultTokens { bos: Some(128_000), eos: Some(128_001), pad: Some(128_004) },
    unquantized: &[],
    describe: smollm3,
    gguf: Some(Gguf {
        architecture: "smollm3",
        keys: &[KEYS],
        names: &[NAMES],
        biases: BIASES,
        paired_rows: true,
        complete: nothing_lost,
    }),
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 128_256,
    hidden_size: 2048,
    num_hidden_layers: 36,
    num_attention_heads: 16,
    num_key_value_heads: Some(4),
    max_position_embeddings: 32_768,
    tie_word_embeddings: true,
    rope_theta: 2_000_000.0,
    ..LLAMA
};

fn smollm3(c: &Fields<'_>) -> Result<ModelSpec, Error> {
    let m = Decoder::read(c, &DEFAULTS)?;
    let layers = m.sizes.num_hidden_layers;
    let (attention, mlp) = (Biases::all(c.flag("attention_bias", false)?), c.flag("mlp_bias", false)?);
    let function = c.function("hidden_act", "silu")?;
    let rotated = rotated_layers(c, layers)?;
    let window = c.find_size("sliding_window")?;
    let by_default = c.flag("use_sliding_window", false)? && window.is_some();
    let windows = windows(c, layers, window, |l| by_default && !rotated[l])?;
    let rope = m.rotary().read(c)?;
    let mix = |l: usize| Attention {
        positions: if rotated[l] { Positions::Rope(0) } else { Positions::None },
        window: windows[l],
        ..m.attention()
    };
    Ok(m.model("smollm3", vec![rope], |l| [m.attend(l, attention, mix(l)), m.gated(l, mlp, function)]))
}

/// `no_rope_layers` says 1 of a layer that rotates.
fn rotated_layers(c: &Fields<'_>, layers: usize) -> Result<Vec<bool>, Error> {
    let name = "no_rope_layers";
    let expected = "a list of 0 and 1 for each layer";
    match c.list(name, expected, |value| value.as_u64().filter(|&flag| flag < 2).map(|flag| flag == 1))? {
        Some(rotated) if rotated.len() == layers => Ok(rotated),
        Some(rotated) => Err(field_error(name, format!("a list of {}", rotated.len()), expected)),
        None => {
            let interval = c.size("no_rope_layer_interval", 4)?;
            Ok((0..layers).map(|l| (l + 1) % interval != 0).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use retune_engine::spec::{SubLayer, frequencies};
    use serde_json::json;

    use super::*;
    use crate::families::describe;

    fn attentions(spec: &ModelSpec) -> Vec<&Attention> {
        spec.sub_layers().filter_map(SubLayer::attention).collect()
    }

    #[test]
    fn every_fourth_layer_is_not_rotated_and_may_slide() {
        let spec = describe(&json!({"model_type": "smollm3"})).unwrap().spec;
        assert_eq!(spec.ropes[0].frequencies, frequencies(2e6, 128));
        let rotated = |layer: usize| attentions(&spec)[layer].positions == Positions::Rope(0);
        assert_eq!([0, 1, 2, 3, 4].map(rotated), [true, true, true, false, true]);
        let sliding =
            json!({"model_type": "smollm3", "num_hidden_layers": 4, "use_sliding_window": true, "sliding_window": 7});
        let spec = describe(&sliding).unwrap().spec;
        assert!(attentions(&spec).iter().map(|a| a.window).eq([None, None, None, Some(7)]));
    }

    #[test]
    fn lists_of_layers_that_cannot_be_are_refused() {
        for (name, value) in [("no_rope_layers", json!([1, 0])), ("no_rope_layer_interval", json!(0))] {
            let mut config = json!({"model_type": "smollm3"});
            config[name] = value;
            let text = describe(&config).err().expect(name).to_string();
            assert!(text.contains(name), "{text}");
        }
    }
}
