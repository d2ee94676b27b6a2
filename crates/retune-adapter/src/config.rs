//! The LoRA configuration, with PEFT's names and meanings: what a user writes in a run's configuration and what an adapter's
//! `adapter_config.json` says.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::error::Error;
use crate::selection::Selection;
use crate::targets::Ranks;

/// The largest rank accepted; far above what is useful, it keeps sizes from overflowing.
pub const MAX_RANK: usize = 65_536;

/// Initialisations of PEFT that are not available here, refused by name.
const OTHER_INITIALISATIONS: [&str; 5] = ["loftq", "eva", "corda", "lora_ga", "orthogonal"];

/// Most passes over the weight that a randomised decomposition may make; few are enough.
const MAX_ITERATIONS: usize = 64;

/// How LoRA adapts a model (Hu et al. 2021): which linear modules get y = xWᵀ + s·(xAᵀ)Bᵀ, and with what rank and scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank of the update: A is [r, in], B is [out, r].
    pub r: usize,
    /// Numerator of the scale s = lora_alpha / r (or lora_alpha / sqrt(r) with `use_rslora`).
    pub lora_alpha: f64,
    /// Probability with which an input element of the adapter is dropped in training, in [0, 1).
    pub lora_dropout: f64,
    /// Modules to adapt: a list of name endings ("q_proj"), a regular expression for the whole name, or "all-linear" (every linear module but the output head).
    pub target_modules: ModuleSelection,
    /// Modules left out again: a list of name endings or a regular expression for the whole name.
    pub exclude_modules: Option<ModuleSelection>,
    /// Layers to adapt, by number; all when absent. Only with a list of target modules.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// Name of the list of layers ("layers"), when it cannot be told from the module names. Only with `layers_to_transform`.
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Ranks other than `r`, by name ending or regular expression; the first pattern that matches counts.
    pub rank_pattern: Patterns<usize>,
    /// Alphas other than `lora_alpha`, by name ending or regular expression; the first pattern that matches counts.
    pub alpha_pattern: Patterns<f64>,
    /// Modules trained and saved whole, by the end of their names ("lm_head", "embed_tokens").
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding are trained and saved whole, such as new special tokens: a list of token ids, or a list for each module that has such rows ("embed_tokens", and "lm_head" where it is not tied).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable_token_indices: Option<TokenIndices>,
    /// Which biases of the base model are trained.
    pub bias: Bias,
    /// Give B a bias, which is scaled as B is; for adapters that were cut out of a fine-tuned model with biases.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lora_bias: bool,
    /// Scale by lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).
    pub use_rslora: bool,
    /// How A and B start: true, false, "gaussian", "pissa" (from the weight's largest singular values), "pissa_niter_4" (the same, found fast and nearly) or "olora" (from its QR decomposition).
    pub init_lora_weights: InitLoraWeights,
    /// Train the lengths of the weight's rows apart from their directions, which A and B turn (DoRA, Liu et al. 2024): slower, and often better at a low rank.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub use_dora: bool,
    /// B and every vector that is trained (lengths of use_dora, biases) learn at this many times the learning rate of A (LoRA+, Hayou et al. 2024): 16 is usual, with a learning rate half as high.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_ratio: Option<f64>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: ModuleSelection::Pattern("all-linear".to_owned()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            modules_to_save: Vec::new(),
            trainable_token_indices: None,
            bias: Bias::None,
            lora_bias: false,
            use_rslora: false,
            init_lora_weights: InitLoraWeights::Kaiming,
            use_dora: false,
            loraplus_lr_ratio: None,
        }
    }
}

impl LoraConfig {
    /// What selects the modules.
    pub fn selection(&self) -> Selection<'_> {
        Selection {
            target_modules: &self.target_modules,
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref(),
            modules_to_save: &self.modules_to_save,
        }
    }

    /// Checks everything that can be checked without a model: ranges, contradictions, regular expressions.
    ///
    /// # Errors
    /// [`Error::Config`] names the field; [`Error::Pattern`] the pattern that does not compile.
    pub fn check(&self) -> Result<(), Error> {
        check_rank("r", self.r)?;
        for (_, &rank) in self.rank_pattern.iter() {
            check_rank("rank_pattern", rank)?;
        }
        check_alpha("lora_alpha", self.lora_alpha)?;
        for (_, &alpha) in self.alpha_pattern.iter() {
            check_alpha("alpha_pattern", alpha)?;
        }
        check_dropout("lora_dropout", self.lora_dropout)?;
        self.check_tokens()?;
        if self.lora_bias && (self.use_dora || self.init_lora_weights != InitLoraWeights::Kaiming) {
            let problem = "is not available with use_dora, nor with another init_lora_weights than true, as in PEFT; remove one of them";
            return config_error("lora_bias", problem.to_owned());
        }
        if let Some(ratio) = self.loraplus_lr_ratio
            && !(ratio > 0.0 && ratio.is_finite())
        {
            return config_error("loraplus_lr_ratio", format!("{ratio} is out of range; expected above 0, usually 16"));
        }
        if self.init_lora_weights.is_of_the_weight() {
            // What is saved has twice the rank.
            for (field, rank) in
                [("r", &self.r)].into_iter().chain(self.rank_pattern.iter().map(|(_, rank)| ("rank_pattern", rank)))
            {
                if *rank > MAX_RANK / 2 {
                    let problem = format!(
                        "a rank of {rank} is out of range with such an init_lora_weights; expected 1 to {}",
                        MAX_RANK / 2
                    );
                    return config_error(field, problem);
                }
            }
        }
        if self.use_dora && self.init_lora_weights.is_of_the_weight() {
            let problem = "such a start takes its part away from the weight whose row norms DoRA keeps, and PEFT's files hold no adapter of both; \
                           use true or \"gaussian\" with use_dora";
            return config_error("init_lora_weights", problem.to_owned());
        }
        self.selection().check()?;
        Ranks::new(self)?;
        Ok(())
    }
}

impl LoraConfig {
    fn check_tokens(&self) -> Result<(), Error> {
        const FIELD: &str = "trainable_token_indices";
        let lists: Vec<&Vec<u32>> = match &self.trainable_token_indices {
            None => return Ok(()),
            Some(TokenIndices::List(ids)) => vec![ids],
            Some(TokenIndices::Map(map)) => map.values().collect(),
        };
        if lists.is_empty() || lists.iter().any(|ids| ids.is_empty()) {
            return config_error(FIELD, "a list is empty; give token ids, or remove it".to_owned());
        }
        for ids in lists {
            let mut sorted = ids.clone();
            sorted.sort_unstable();
            if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return config_error(FIELD, format!("token {} is named twice; name it once", twice[0]));
            }
        }
        Ok(())
    }
}

pub(crate) fn config_error<T>(field: &'static str, problem: String) -> Result<T, Error> {
    Err(Error::Config { field, problem })
}

pub(crate) fn check_rank(field: &'static str, rank: usize) -> Result<(), Error> {
    if rank == 0 || rank > MAX_RANK {
        return config_error(field, format!("a rank of {rank} is out of range; expected 1 to {MAX_RANK}"));
    }
    Ok(())
}

pub(crate) fn check_dropout(field: &'static str, dropout: f64) -> Result<(), Error> {
    if !(0.0..1.0).contains(&(dropout as f32)) {
        return config_error(field, format!("{dropout} is out of range; expected at least 0 and below 1"));
    }
    Ok(())
}

fn check_alpha(field: &'static str, alpha: f64) -> Result<(), Error> {
    let alpha = alpha as f32;
    if !alpha.is_finite() || alpha == 0.0 {
        return config_error(
            field,
            format!(
                "an alpha of {alpha} would leave the adapter without effect or without bounds; expected a finite number other than 0"
            ),
        );
    }
    Ok(())
}

/// Modules chosen by a list of name endings or by a regular expression that the whole name must match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a list of module names, or one string: a regular expression or \"all-linear\"")]
pub enum ModuleSelection {
    /// Names, or ends of names after a dot.
    List(Vec<String>),
    /// A regular expression for the whole name, or "all-linear".
    Pattern(String),
}

impl ModuleSelection {
    /// Whether this is the shorthand for every linear module but the output head.
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Self::Pattern(text)
            if text.eq_ignore_ascii_case("all-linear") || text.eq_ignore_ascii_case("all_linear"))
    }
}

/// Tokens, of the token embedding or by module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a list of token ids, or a map from module names to such lists")]
pub enum TokenIndices {
    /// Rows of the token embedding.
    List(Vec<u32>),
    /// Rows by the end of a module's name.
    Map(BTreeMap<String, Vec<u32>>),
}

/// One value, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected one value or a list of values")]
pub enum OneOrMany<T> {
    /// A single value.
    One(T),
    /// Several values.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values, one or many.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// Which biases of the base model are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None of them.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// The biases of the adapted modules.
    LoraOnly,
}

impl Bias {
    /// The name in a configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }
}

/// How A and B start. Written as PEFT writes it: `true`, `false` or `"gaussian"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `true`: A uniform in ±1/sqrt(in), B zero; the adapter starts without effect.
    #[default]
    Kaiming,
    /// `"gaussian"`: A normal with standard deviation 1/r, B zero.
    Gaussian,
    /// `"pissa"` (Meng et al. 2024): B·A is the weight's best approximation of this rank, which is taken away from the weight, so that the
    /// adapter starts without effect. With a number of iterations (`"pissa_niter_4"`) the decomposition is a randomised one.
    Pissa(Option<usize>),
    /// `"olora"` (Büyükakyüz 2024): the same with the first columns of Q and rows of R of the weight's QR decomposition.
    Olora,
    /// `false`: both as a fresh linear layer, A uniform in ±1/sqrt(in), B in ±1/sqrt(r); the adapter changes the model from the start (for tests).
    LinearDefault,
}

impl InitLoraWeights {
    /// Whether what A and B start from is taken away from the weight.
    pub fn is_of_the_weight(&self) -> bool {
        matches!(self, Self::Pissa(_) | Self::Olora)
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Kaiming => serializer.serialize_bool(true),
            Self::LinearDefault => serializer.serialize_bool(false),
            Self::Gaussian => serializer.serialize_str("gaussian"),
            Self::Pissa(None) => serializer.serialize_str("pissa"),
            Self::Pissa(Some(iterations)) => serializer.collect_str(&format_args!("pissa_niter_{iterations}")),
            Self::Olora => serializer.serialize_str("olora"),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InitVisitor;

        impl Visitor<'_> for InitVisitor {
            type Value = InitLoraWeights;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, \"gaussian\", \"pissa\", \"pissa_niter_4\" or \"olora\"")
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Self::Value, E> {
                Ok(if value { InitLoraWeights::Kaiming } else { InitLoraWeights::LinearDefault })
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
                let name = value.to_ascii_lowercase();
                match (name.as_str(), name.strip_prefix("pissa_niter_").map(str::parse)) {
                    ("gaussian", _) => Ok(InitLoraWeights::Gaussian),
                    ("pissa", _) => Ok(InitLoraWeights::Pissa(None)),
                    ("olora", _) => Ok(InitLoraWeights::Olora),
                    (_, Some(Ok(iterations))) if iterations <= MAX_ITERATIONS => {
                        Ok(InitLoraWeights::Pissa(Some(iterations)))
                    }
                    (_, Some(_)) => Err(E::custom(format!(
                        "init_lora_weights `{value}`: expected a number of iterations up to {MAX_ITERATIONS}, as in \"pissa_niter_4\""
                    ))),
                    (name, _) => {
                        let is_known = OTHER_INITIALISATIONS.contains(&name);
                        let problem = if is_known { "is not available here" } else { "is no initialisation" };
                        Err(E::custom(format!(
                            "init_lora_weights `{value}` {problem}; use true, false, \"gaussian\", \"pissa\", \"pissa_niter_4\" or \"olora\""
                        )))
                    }
                }
            }
        }

        deserializer.deserialize_any(InitVisitor)
    }
}

impl JsonSchema for InitLoraWeights {
    fn schema_name() -> Cow<'static, str> {
        "InitLoraWeights".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "How A and B start: true (A uniform, B zero), \"gaussian\" (A normal, B zero), false (both uniform), \"pissa\" or \"pissa_niter_N\" (the weight's largest singular values, exactly or by N randomised iterations), \"olora\" (its QR decomposition).",
            "anyOf": [
                { "enum": [true, false, "gaussian", "pissa", "olora"] },
                { "type": "string", "pattern": "^pissa_niter_[0-9]+$" }
            ]
        })
    }
}

/// Values by pattern, in the order they were written: the first pattern that matches a module counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patterns<T>(Vec<(String, T)>);

impl<T> Patterns<T> {
    /// Patterns and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().map(|(pattern, value)| (pattern.as_str(), value))
    }

    /// Whether there is no pattern.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> FromIterator<(String, T)> for Patterns<T> {
    fn from_iter<I: IntoIterator<Item = (String, T)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PatternsVisitor(PhantomData))
    }
}

struct PatternsVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for PatternsVisitor<T> {
    type Value = Patterns<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from module names or regular expressions to numbers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries: Vec<(String, T)> = Vec::new();
        while let Some((pattern, value)) = map.next_entry::<String, T>()? {
            if entries.iter().any(|(known, _)| *known == pattern) {
                return Err(de::Error::custom(format!("the pattern `{pattern}` is given twice")));
            }
            entries.push((pattern, value));
        }
        Ok(Patterns(entries))
    }
}

impl<T: JsonSchema> JsonSchema for Patterns<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("Patterns_of_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let value = generator.subschema_for::<T>();
        json_schema!({ "type": "object", "additionalProperties": value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: serde_json::Value) -> Result<LoraConfig, String> {
        let config: LoraConfig = serde_json::from_value(value).map_err(|e| e.to_string())?;
        config.check().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn an_empty_configuration_is_the_default() {
        let config = parse(json!({})).unwrap();
        assert_eq!(config, LoraConfig::default());
        assert_eq!((config.r, config.lora_alpha), (16, 32.0));
        assert!(config.target_modules.is_all_linear());
    }

    #[test]
    fn every_field_is_read_under_pefts_name() {
        let config = parse(json!({
            "r": 8, "lora_alpha": 12.5, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
            "exclude_modules": ".*\\.1\\..*", "layers_to_transform": 2, "layers_pattern": ["h", "layers"],
            "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 16}, "modules_to_save": ["lm_head"],
            "bias": "lora_only", "use_rslora": true, "init_lora_weights": "gaussian"
        }))
        .unwrap();
        assert_eq!(config.layers_to_transform, Some(OneOrMany::One(2)));
        assert_eq!(config.bias, Bias::LoraOnly);
        assert_eq!(config.init_lora_weights, InitLoraWeights::Gaussian);
        assert_eq!(config.alpha_pattern.iter().next(), Some(("v_proj", &16.0)));
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<LoraConfig>(&text).unwrap(), config);
    }

    #[test]
    fn initialisations_are_written_as_peft_writes_them() {
        for (value, expected) in [
            (json!(true), InitLoraWeights::Kaiming),
            (json!(false), InitLoraWeights::LinearDefault),
            (json!("gaussian"), InitLoraWeights::Gaussian),
            (json!("pissa"), InitLoraWeights::Pissa(None)),
            (json!("pissa_niter_16"), InitLoraWeights::Pissa(Some(16))),
            (json!("olora"), InitLoraWeights::Olora),
        ] {
            let config = parse(json!({"init_lora_weights": value})).unwrap();
            assert_eq!(config.init_lora_weights, expected);
            assert_eq!(serde_json::to_value(expected).unwrap(), value);
        }
    }

    #[test]
    fn patterns_keep_their_order() {
        let config: LoraConfig = serde_json::from_str(r#"{"rank_pattern": {"z": 1, "a": 2, "m": 3}}"#).unwrap();
        let names: Vec<_> = config.rank_pattern.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["z", "a", "m"]);
        let twice = serde_json::from_str::<LoraConfig>(r#"{"rank_pattern": {"z": 1, "z": 2}}"#);
        assert!(twice.unwrap_err().to_string().contains("given twice"));
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_the_fields_name() {
        for (value, expected) in [
            (json!({"r": 0}), "r: a rank of 0"),
            (json!({"r": 100_000}), "r: a rank of 100000"),
            (json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern: a rank of 0"),
            (json!({"lora_alpha": 0}), "lora_alpha: an alpha of 0"),
            (json!({"lora_alpha": 1e300}), "lora_alpha: an alpha of inf"),
            (json!({"lora_dropout": 1.0}), "lora_dropout: 1"),
            (json!({"lora_dropout": -0.1}), "lora_dropout: -0.1"),
            (json!({"target_modules": []}), "the list is empty"),
            (json!({"target_modules": ["q_proj", ""]}), "entry is empty"),
            (json!({"target_modules": ""}), "expression is empty"),
            (json!({"target_modules": "(q_proj"}), "target_modules: `(q_proj`"),
            (json!({"target_modules": "a)|(b"}), "target_modules: `a)|(b`"),
            (json!({"exclude_modules": "["}), "exclude_modules: `[`"),
            (json!({"rank_pattern": {"(": 2}}), "rank_pattern: `(`"),
            (json!({"modules_to_save": [""]}), "modules_to_save"),
            (json!({"layers_to_transform": [0]}), "layers_to_transform: works only"),
            (json!({"layers_pattern": "h"}), "layers_pattern: works only"),
            (json!({"target_modules": ["q_proj"], "layers_pattern": "h"}), "layers_pattern: has no effect"),
            (json!({"trainable_token_indices": []}), "trainable_token_indices: a list is empty"),
            (json!({"trainable_token_indices": {"embed_tokens": [3, 4, 3]}}), "token 3 is named twice"),
            (json!({"trainable_token_indices": [-1]}), "a list of token ids"),
            (json!({"lora_bias": true, "use_dora": true}), "lora_bias: is not available with use_dora"),
            (json!({"loraplus_lr_ratio": 0}), "loraplus_lr_ratio: 0 is out of range"),
            (json!({"init_lora_weights": "loftq"}), "`loftq` is not available here"),
            (json!({"init_lora_weights": "pisa"}), "`pisa` is no initialisation"),
            (json!({"init_lora_weights": "pissa", "r": 40_000}), "r: a rank of 40000"),
            (json!({"init_lora_weights": "pissa_niter_x"}), "expected a number of iterations"),
            (json!({"init_lora_weights": "olora", "use_dora": true}), "init_lora_weights: such a start"),
            (json!({"target_modules": 3}), "a list of module names"),
            (json!({"rank": 3}), "unknown field `rank`"),
            (json!({"bias": "some"}), "unknown variant `some`"),
        ] {
            let message = parse(value.clone()).unwrap_err();
            assert!(message.contains(expected), "{value}: {message}");
        }
    }

    #[test]
    fn the_schema_names_every_field() {
        let schema = serde_json::to_value(schemars::schema_for!(LoraConfig)).unwrap();
        let fields = schema["properties"].as_object().unwrap();
        assert_eq!(fields.len(), 17);
        assert!(fields.contains_key("target_modules"));
    }
}
