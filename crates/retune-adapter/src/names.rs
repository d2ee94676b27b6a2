//! The names of an adapter's tensors in `adapter_model.safetensors`, as PEFT writes and reads them.
//!
//! PEFT wraps the model twice, so every key starts with "base_model.model."; what follows is the module's own name.

use crate::config::{Bias, LoraConfig};
use crate::selection::Selection;
use crate::targets::{BaseModules, LoraTarget};

const PREFIX: &str = "base_model.model.";

/// Key of A, [r, in].
pub fn lora_a(module: &str) -> String {
    format!("{PREFIX}{module}.lora_A.weight")
}

/// Key of B, [out, r].
pub fn lora_b(module: &str) -> String {
    format!("{PREFIX}{module}.lora_B.weight")
}

/// Key of the bias of B, [out].
pub fn lora_b_bias(module: &str) -> String {
    format!("{PREFIX}{module}.lora_B.bias")
}

/// Key of DoRA's lengths of rows, [out].
pub fn lora_magnitude(module: &str) -> String {
    format!("{PREFIX}{module}.lora_magnitude_vector")
}

/// Key of A of a table, `[r, rows]`.
pub fn embedding_a(module: &str) -> String {
    format!("{PREFIX}{module}.lora_embedding_A")
}

/// Key of B of a table, `[hidden_size, r]`.
pub fn embedding_b(module: &str) -> String {
    format!("{PREFIX}{module}.lora_embedding_B")
}

/// Key of the rows of tokens that are trained, `[tokens, hidden_size]`.
pub fn token_rows(module: &str) -> String {
    format!("{PREFIX}{module}.token_adapter.trainable_tokens_delta")
}

/// Key of the weight of a module that is trained and saved whole.
pub fn saved_weight(module: &str) -> String {
    format!("{PREFIX}{module}.weight")
}

/// Key of a trained bias of the base model. That of an adapted module lies one level deeper, since PEFT has wrapped the module.
pub fn trained_bias(module: &str, adapted: bool) -> String {
    if adapted { format!("{PREFIX}{module}.base_layer.bias") } else { format!("{PREFIX}{module}.bias") }
}

/// Key of the bias of a module that is trained and saved whole.
pub fn saved_bias(module: &str) -> String {
    format!("{PREFIX}{module}.bias")
}

/// A bias of the base model that is trained beside the adapters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BiasTarget {
    /// Full name of the module.
    pub module: String,
    /// Number of values: the module's `out_features`, or a norm's width.
    pub len: usize,
    /// Key in the adapter's file.
    pub key: String,
}

/// The biases that LoRA trains beside its targets.
pub fn trained_biases(config: &LoraConfig, modules: &BaseModules<'_>, targets: &[LoraTarget]) -> Vec<BiasTarget> {
    let is_adapted = |module: &str| targets.iter().any(|target| target.module == module);
    biases_beside(config.bias, &config.selection(), modules, is_adapted)
}

/// The biases that are trained beside an adapter: the linears' in their order, then the norms'. A module saved whole keeps its bias in
/// itself.
pub(crate) fn biases_beside(
    bias: Bias,
    selection: &Selection<'_>,
    modules: &BaseModules<'_>,
    is_adapted: impl Fn(&str) -> bool,
) -> Vec<BiasTarget> {
    let linears = modules.linears.iter().filter(|module| module.has_bias).map(|m| (m.name, m.out_features));
    let mut biases = Vec::new();
    for (module, len) in linears.chain(modules.biased_norms.iter().copied()) {
        let adapted = is_adapted(module);
        let trained = match bias {
            Bias::None => false,
            Bias::LoraOnly => adapted,
            Bias::All => adapted || selection.saved_by(module).is_none(),
        };
        if trained {
            biases.push(BiasTarget { module: module.to_owned(), len, key: trained_bias(module, adapted) });
        }
    }
    biases
}

/// What a tensor of an adapter's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A, [r, in].
    LoraA,
    /// B, [out, r].
    LoraB,
    /// The bias of B, [out].
    LoraBBias,
    /// DoRA's lengths of rows, [out].
    Magnitude,
    /// A of a table, [r, rows].
    EmbeddingA,
    /// B of a table, [hidden_size, r].
    EmbeddingB,
    /// Rows of tokens, [tokens, hidden_size].
    TokenRows,
    /// The weight of a module saved whole.
    Weight,
    /// A bias.
    Bias,
    /// The base's own weight of an adapted module, which PEFT adds when the output head is adapted.
    BaseWeight,
}

impl Part {
    /// The key under which this part of a module is kept.
    pub fn key(self, module: &str) -> String {
        match self {
            Self::LoraA => lora_a(module),
            Self::LoraB => lora_b(module),
            Self::LoraBBias => lora_b_bias(module),
            Self::Magnitude => lora_magnitude(module),
            Self::EmbeddingA => embedding_a(module),
            Self::EmbeddingB => embedding_b(module),
            Self::TokenRows => token_rows(module),
            Self::Weight => saved_weight(module),
            Self::Bias => trained_bias(module, false),
            Self::BaseWeight => format!("{PREFIX}{module}.base_layer.weight"),
        }
    }
}

/// What a key of a file means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// A part of a module.
    Part(String, Part),
    /// A copy of something that the file holds elsewhere, or of the base: not needed.
    Copy,
    /// Not a tensor of a LoRA adapter.
    Unknown,
}

/// A key as PEFT writes it, without the wrapper of torch.compile.
pub(crate) fn plain(key: &str) -> String {
    key.replace("_orig_mod.", "")
}

/// Reads a key, in any spelling that PEFT and the tools around it have used: without the prefix, with the adapter's name
/// ("lora_A.default.weight"), with the wrapper of torch.compile.
pub fn parse(key: &str) -> Key {
    let key = plain(key);
    let name = key.strip_prefix(PREFIX).unwrap_or(&key);
    for (marker, weight, bias) in [(".lora_A.", Part::LoraA, None), (".lora_B.", Part::LoraB, Some(Part::LoraBBias))] {
        if let Some((module, rest)) = name.rsplit_once(marker) {
            let name = |end| rest.strip_suffix(end).and_then(|name| name.strip_suffix('.'));
            let is = |end| rest == end || name(end).is_some_and(is_adapter_name);
            let part = if is("weight") { Some(weight) } else { bias.filter(|_| is("bias")) };
            return part.map_or(Key::Unknown, |part| part_of(module, part));
        }
    }
    for (end, part) in [
        (".lora_magnitude_vector", Part::Magnitude),
        (".lora_embedding_A", Part::EmbeddingA),
        (".lora_embedding_B", Part::EmbeddingB),
        (".token_adapter.trainable_tokens_delta", Part::TokenRows),
    ] {
        if let Some(module) = name.strip_suffix(end) {
            return part_of(module, part);
        }
    }
    if name.contains(".lora_") {
        return Key::Unknown;
    }
    if name.contains(".original_module.") || name.contains(".modules_to_save.") {
        // Beside a module saved whole PEFT writes these only for `bias: all`; the module itself is there under its own name.
        return Key::Copy;
    }
    if let Some(module) = name.strip_suffix(".base_layer.weight") {
        return part_of(module, Part::BaseWeight);
    }
    if let Some(module) = name.strip_suffix(".base_layer.bias").or_else(|| name.strip_suffix(".bias")) {
        return part_of(module, Part::Bias);
    }
    match name.strip_suffix(".weight") {
        Some(module) => part_of(module, Part::Weight),
        None => Key::Unknown,
    }
}

fn is_adapter_name(text: &str) -> bool {
    !text.is_empty() && !text.contains('.')
}

fn part_of(module: &str, part: Part) -> Key {
    if module.is_empty() { Key::Unknown } else { Key::Part(module.to_owned(), part) }
}

#[cfg(test)]
mod tests {
    //! The expected keys are those that PEFT 0.21.2 writes for the same configuration.
    use super::*;
    use crate::targets::resolve;
    use crate::test_model::{tiny_llama, tiny_llama_with_biases};

    fn part(module: &str, part: Part) -> Key {
        Key::Part(module.to_owned(), part)
    }

    #[test]
    fn keys_are_spelled_as_peft_spells_them() {
        assert_eq!(
            lora_a("model.layers.0.self_attn.q_proj"),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        );
        assert_eq!(lora_b("lm_head"), "base_model.model.lm_head.lora_B.weight");
        assert_eq!(saved_weight("model.norm"), "base_model.model.model.norm.weight");
        assert_eq!(trained_bias("a.k_proj", false), "base_model.model.a.k_proj.bias");
        assert_eq!(trained_bias("a.q_proj", true), "base_model.model.a.q_proj.base_layer.bias");
    }

    #[test]
    fn every_spelling_in_use_is_read() {
        for (key, expected) in [
            ("base_model.model.model.layers.0.q.lora_A.weight", part("model.layers.0.q", Part::LoraA)),
            ("base_model.model.model.layers.0.q.lora_B.default.weight", part("model.layers.0.q", Part::LoraB)),
            ("model.layers.0.q.lora_A.default.weight", part("model.layers.0.q", Part::LoraA)),
            ("base_model.model._orig_mod.lm_head.lora_B.weight", part("lm_head", Part::LoraB)),
            ("base_model.model.lm_head.base_layer.weight", part("lm_head", Part::BaseWeight)),
            ("base_model.model.a.q.base_layer.bias", part("a.q", Part::Bias)),
            ("base_model.model.a.q.bias", part("a.q", Part::Bias)),
            ("base_model.model.model.norm.weight", part("model.norm", Part::Weight)),
            ("base_model.model.a.q.original_module.bias", Key::Copy),
            ("base_model.model.a.q.modules_to_save.bias", Key::Copy),
            ("base_model.model.a.q.lora_magnitude_vector", part("a.q", Part::Magnitude)),
            ("base_model.model.a.q.lora_B.bias", part("a.q", Part::LoraBBias)),
            ("a.q.lora_B.default.bias", part("a.q", Part::LoraBBias)),
            ("base_model.model.a.q.lora_A.bias", Key::Unknown),
            ("base_model.model.a.q.lora_A.xweight", Key::Unknown),
            ("base_model.model.model.embed_tokens.lora_embedding_A", part("model.embed_tokens", Part::EmbeddingA)),
            ("model.embed_tokens.lora_embedding_B", part("model.embed_tokens", Part::EmbeddingB)),
            ("base_model.model.lm_head.token_adapter.trainable_tokens_delta", part("lm_head", Part::TokenRows)),
            ("base_model.model.a.q.lora_A.x.y.weight", Key::Unknown),
            ("prompt_embeddings", Key::Unknown),
            ("base_model.model..weight", Key::Unknown),
            (".weight", Key::Unknown),
            ("", Key::Unknown),
        ] {
            assert_eq!(parse(key), expected, "{key}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for wanted in [
            Part::LoraA,
            Part::LoraB,
            Part::LoraBBias,
            Part::Magnitude,
            Part::EmbeddingA,
            Part::EmbeddingB,
            Part::TokenRows,
            Part::Weight,
            Part::Bias,
            Part::BaseWeight,
        ] {
            assert_eq!(parse(&wanted.key("model.layers.3.mlp.up_proj")), part("model.layers.3.mlp.up_proj", wanted));
        }
    }

    #[test]
    fn biases_are_those_of_the_model_or_of_the_adapted_modules() {
        let modules = tiny_llama_with_biases();
        let keys = |bias| {
            let config: LoraConfig =
                serde_json::from_value(serde_json::json!({"target_modules": ["q_proj"], "bias": bias})).unwrap();
            let targets = resolve(&config, &modules).unwrap();
            assert!(trained_biases(&config, &tiny_llama(), &targets).is_empty());
            trained_biases(&config, &modules, &targets)
        };
        assert!(keys("none").is_empty());
        let only = keys("lora_only");
        assert_eq!(only.len(), 3);
        assert_eq!(only[0].key, "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias");
        assert_eq!(only[0].len, 32);
        let all = keys("all");
        assert_eq!(all.len(), 21);
        assert_eq!(all[0].key, "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias");
        assert_eq!(all[1].key, "base_model.model.model.layers.0.self_attn.k_proj.bias");
    }

    #[test]
    fn a_module_saved_whole_keeps_its_own_bias() {
        let modules = tiny_llama_with_biases();
        let config: LoraConfig = serde_json::from_value(
            serde_json::json!({"target_modules": ["v_proj"], "bias": "all", "modules_to_save": ["q_proj"]}),
        )
        .unwrap();
        let targets = resolve(&config, &modules).unwrap();
        let biases = trained_biases(&config, &modules, &targets);
        assert_eq!(biases.len(), 18);
        assert!(biases.iter().all(|bias| !bias.module.ends_with("q_proj")));
    }
}
