//! The modules of a model that can be adapted, and those that LoRA adapts, with what rank and scale.

use std::ops::Deref;

use retune_engine::spec::{Attention, ModelSpec, Module, Stack, SubLayer};

use crate::config::{Bias, LoraConfig};
use crate::error::Error;
use crate::names::trained_biases;
use crate::pattern::Pattern;
use crate::selection::{check_each_counts, did_you_mean, list_ends};

/// A linear module of a model: what can be adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearModule<'a> {
    /// Full name, as PEFT sees it: "model.layers.0.self_attn.q_proj".
    pub name: &'a str,
    /// Columns of its weight.
    pub in_features: usize,
    /// Rows of its weight.
    pub out_features: usize,
    /// Whether it has a bias.
    pub has_bias: bool,
    /// Whether it is the output head, which "all-linear" leaves out.
    pub is_output_head: bool,
    /// Whether it is no linear module but a table of rows, of tokens or positions, which is named to be adapted: its columns are what it
    /// looks up, its rows what it gives.
    pub is_table: bool,
    /// Whether files hold its weight as [in_features, out_features] (GPT-2's Conv1D).
    pub is_transposed: bool,
}

impl LinearModule<'_> {
    /// The shape of its weight in files.
    pub(crate) fn weight_shape(&self) -> Vec<usize> {
        if self.is_transposed {
            vec![self.in_features, self.out_features]
        } else {
            vec![self.out_features, self.in_features]
        }
    }
}

/// What a soft prompt's shape depends on, as PEFT's files say it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    pub hidden_size: usize,
    /// Query heads of an attention.
    pub heads: usize,
    /// Its heads of keys and values.
    pub key_value_heads: usize,
    pub head_dim: usize,
    /// Layers of the model, of its encoder where it has one.
    pub layers: usize,
    /// Whether an encoder reads what is answered.
    pub has_encoder: bool,
}

impl Shape {
    fn of(spec: &ModelSpec) -> Self {
        let attentions = || spec.stacks().take(1).flat_map(Stack::sub_layers).filter_map(SubLayer::attention);
        let first = attentions().next();
        let first = |of: fn(&Attention) -> usize| first.map_or(0, of);
        Self {
            hidden_size: spec.hidden_size,
            heads: first(|attention| attention.queries),
            key_value_heads: first(|attention| attention.keys),
            head_dim: first(|attention| attention.head_dim),
            layers: attentions().count(),
            has_encoder: spec.encoder.is_some(),
        }
    }
}

/// What of a base model an adapter can be about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BaseModules<'a> {
    /// The linear modules, in the order of the forward, the head last.
    pub linears: Vec<LinearModule<'a>>,
    /// The token embedding, and learned positions where there are any.
    pub tables: Vec<LinearModule<'a>>,
    /// Whether the head's weight is the token embedding's.
    pub is_tied: bool,
    /// The norms that have a bias, and its length.
    pub biased_norms: Vec<(&'a str, usize)>,
    /// The model's family: transformers' `model_type`.
    pub family: &'a str,
    /// What a soft prompt's shape depends on.
    pub shape: Shape,
}

impl<'a> BaseModules<'a> {
    /// Those of a model.
    pub fn of(spec: &'a ModelSpec) -> Self {
        let head = &spec.head.linear.name;
        let linears = spec.linears().map(|linear| LinearModule {
            name: &linear.name,
            in_features: linear.cols,
            out_features: linear.rows,
            has_bias: linear.bias,
            is_output_head: linear.name == *head,
            is_table: false,
            is_transposed: linear.transposed,
        });
        let tables = spec.modules().into_iter().filter_map(|module| match module {
            Module::Embedding { name, rows, cols } => Some(LinearModule {
                name,
                in_features: rows,
                out_features: cols,
                has_bias: false,
                is_output_head: false,
                is_table: true,
                is_transposed: true,
            }),
            _ => None,
        });
        let norms = spec.modules().into_iter().filter_map(|module| match module {
            Module::Norm(norm) if norm.has_bias() => Some((norm.name.as_str(), norm.width)),
            _ => None,
        });
        Self {
            linears: linears.collect(),
            tables: tables.collect(),
            is_tied: spec.head.tied,
            biased_norms: norms.collect(),
            family: spec.family,
            shape: Shape::of(spec),
        }
    }
}

impl<'a> BaseModules<'a> {
    /// Everything that LoRA can adapt.
    pub fn adaptable(&self) -> Vec<LinearModule<'a>> {
        self.tables.iter().chain(&self.linears).copied().collect()
    }
}

impl BaseModules<'_> {
    /// Whether files hold the weight of the linear module of this name as [in_features, out_features].
    pub(crate) fn is_transposed(&self, name: &str) -> bool {
        self.linears.iter().any(|module| module.name == name && module.is_transposed)
    }
}

impl<'a> Deref for BaseModules<'a> {
    type Target = [LinearModule<'a>];

    fn deref(&self) -> &Self::Target {
        &self.linears
    }
}

/// A module with a LoRA adapter: A is [r, in_features], B is [out_features, r].
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTarget {
    /// Full name of the module.
    pub module: String,
    /// Rank.
    pub r: usize,
    /// What B·A is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub scaling: f32,
    /// Columns of the module's weight.
    pub in_features: usize,
    /// Rows of the module's weight.
    pub out_features: usize,
    /// Whether the module is a table of rows.
    pub is_table: bool,
}

/// How many modules end in each name ("q_proj", 30), in the order the names first appear.
pub fn count_matches(modules: &[LinearModule<'_>]) -> Vec<(String, usize)> {
    count_ends(modules.iter().map(|module| module.name))
        .into_iter()
        .map(|(end, count)| (end.to_owned(), count))
        .collect()
}

pub(crate) fn last_component(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// LoRA's ranks and scales, with their patterns compiled.
pub(crate) struct Ranks {
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
    r: usize,
    alpha: f64,
    use_rslora: bool,
}

impl Ranks {
    /// # Errors
    /// [`Error::Pattern`] when a pattern does not compile.
    pub(crate) fn new(config: &LoraConfig) -> Result<Self, Error> {
        let ranks = config
            .rank_pattern
            .iter()
            .map(|(key, &rank)| Ok((Pattern::name_end("rank_pattern", key)?, rank)))
            .collect::<Result<_, Error>>()?;
        let alphas = config
            .alpha_pattern
            .iter()
            .map(|(key, &alpha)| Ok((Pattern::name_end("alpha_pattern", key)?, alpha)))
            .collect::<Result<_, Error>>()?;
        Ok(Self { ranks, alphas, r: config.r, alpha: config.lora_alpha, use_rslora: config.use_rslora })
    }

    fn target(&self, module: &LinearModule<'_>) -> Result<LoraTarget, Error> {
        let r = first_match(&self.ranks, module.name)?.unwrap_or(self.r);
        let alpha = first_match(&self.alphas, module.name)?.unwrap_or(self.alpha);
        let divisor = if self.use_rslora { (r as f64).sqrt() } else { r as f64 };
        Ok(LoraTarget {
            module: module.name.to_owned(),
            r,
            scaling: (alpha / divisor) as f32,
            in_features: module.in_features,
            out_features: module.out_features,
            is_table: module.is_table,
        })
    }

    fn targets(&self, modules: Vec<&LinearModule<'_>>) -> Result<Vec<LoraTarget>, Error> {
        modules.into_iter().map(|module| self.target(module)).collect()
    }
}

fn first_match<T: Copy>(patterns: &[(Pattern, T)], name: &str) -> Result<Option<T>, Error> {
    for (pattern, value) in patterns {
        if pattern.is_match(name)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// The modules that LoRA adapts, in the modules' order.
///
/// Stricter than PEFT, as [`Selection::resolve`] is: every pattern and `bias` must have an effect too.
///
/// # Errors
/// What [`LoraConfig::check`] and [`Selection::resolve`] find; [`Error::UnknownModule`] and [`Error::ShadowedPattern`] for patterns;
/// [`Error::NoBias`].
pub fn resolve(config: &LoraConfig, modules: &BaseModules<'_>) -> Result<Vec<LoraTarget>, Error> {
    config.check()?;
    let ranks = Ranks::new(config)?;
    let adaptable = modules.adaptable();
    let targets = ranks.targets(config.selection().resolve(&adaptable)?)?;
    check_patterns_used("rank_pattern", &ranks.ranks, &targets)?;
    check_patterns_used("alpha_pattern", &ranks.alphas, &targets)?;
    let has_effect = !trained_biases(config, modules, &targets).is_empty();
    check_bias(config.bias, config.bias.as_str(), modules, has_effect)?;
    Ok(targets)
}

/// The modules that LoRA adapts, by PEFT's own rules: entries without effect are passed over.
///
/// # Errors
/// [`Error::Pattern`]; [`Error::NoTarget`] when nothing at all is selected.
pub fn select(config: &LoraConfig, modules: &BaseModules<'_>) -> Result<Vec<LoraTarget>, Error> {
    Ranks::new(config)?.targets(config.selection().select(&modules.adaptable())?)
}

fn check_patterns_used<T>(field: &'static str, patterns: &[(Pattern, T)], targets: &[LoraTarget]) -> Result<(), Error> {
    let names: Vec<&str> = targets.iter().map(|target| target.module.as_str()).collect();
    check_each_counts(field, patterns.iter().map(|(pattern, _)| pattern), &names, |entry| {
        format!(
            "A pattern must match an adapted module from a dot (or the start) to the end. {}",
            did_you_mean(entry, names.iter().copied())
        )
    })
}

/// Refuses a `bias`, which a configuration calls `name`, that trains nothing.
pub(crate) fn check_bias(
    bias: Bias,
    name: &'static str,
    modules: &BaseModules<'_>,
    has_effect: bool,
) -> Result<(), Error> {
    const REMOVE: &str = "Set it to none, or remove it";
    if bias == Bias::None || has_effect {
        return Ok(());
    }
    let biased = list_ends(modules.iter().filter(|module| module.has_bias).map(|module| module.name));
    let (reason, advice) = if biased.is_empty() {
        ("no linear module of this model has a bias".to_owned(), REMOVE)
    } else if bias == Bias::LoraOnly {
        let reason = format!("none of the adapted modules has a bias; those that have one are {biased}");
        (reason, "Adapt one of these, set bias to none, or remove it")
    } else {
        (format!("modules_to_save trains every module with a bias ({biased}) whole"), REMOVE)
    };
    Err(Error::NoBias { bias: name, reason, advice })
}

pub(crate) fn count_ends<'a>(names: impl Iterator<Item = &'a str>) -> Vec<(&'a str, usize)> {
    let mut ends: Vec<(&str, usize)> = Vec::new();
    for name in names {
        let end = last_component(name);
        match ends.iter_mut().find(|(known, _)| *known == end) {
            Some((_, count)) => *count += 1,
            None => ends.push((end, 1)),
        }
    }
    ends
}

#[cfg(test)]
mod tests {
    //! The expected selections are what PEFT 0.21.2 selects on a Llama model of the same shape.
    use super::*;
    use crate::test_model::{MODULES, tiny_llama};
    use serde_json::json;

    fn config(value: serde_json::Value) -> LoraConfig {
        serde_json::from_value(value).unwrap()
    }

    fn selected(value: serde_json::Value) -> Vec<String> {
        let names = tiny_llama();
        select(&config(value), &names)
            .map(|targets| targets.into_iter().map(|t| t.module).collect())
            .unwrap_or_default()
    }

    fn refused(value: serde_json::Value) -> String {
        resolve(&config(value), &tiny_llama()).unwrap_err().to_string()
    }

    fn q(layer: usize) -> String {
        format!("model.layers.{layer}.self_attn.q_proj")
    }

    fn v(layer: usize) -> String {
        format!("model.layers.{layer}.self_attn.v_proj")
    }

    #[test]
    fn all_linear_is_every_module_but_the_head() {
        for text in ["all-linear", "All-Linear", "all_linear"] {
            let found = selected(json!({"target_modules": text}));
            assert_eq!(found.len(), 21);
            assert_eq!(found[0], q(0));
            assert!(!found.contains(&"lm_head".to_owned()));
        }
        assert_eq!(selected(json!({"target_modules": "all-linear", "exclude_modules": ["mlp.down_proj"]})).len(), 18);
        assert_eq!(selected(json!({"target_modules": "all-linear", "modules_to_save": ["q_proj"]})).len(), 18);
        assert_eq!(selected(json!({"target_modules": "all-linear", "modules_to_save": ["self_attn"]})).len(), 9);
    }

    #[test]
    fn lists_match_names_and_ends_of_names() {
        let six = vec![q(0), v(0), q(1), v(1), q(2), v(2)];
        assert_eq!(selected(json!({"target_modules": ["v_proj", "q_proj"]})), six);
        assert_eq!(selected(json!({"target_modules": ["proj"]})), Vec::<String>::new());
        assert_eq!(selected(json!({"target_modules": ["1.self_attn.q_proj"]})), [q(1)]);
        assert_eq!(selected(json!({"target_modules": ["q_proj", "nope"]})), [q(0), q(1), q(2)]);
        assert_eq!(
            selected(json!({"target_modules": ["q_proj", "lm_head"]})),
            [q(0), q(1), q(2), "lm_head".to_owned()]
        );
    }

    #[test]
    fn strings_are_expressions_for_the_whole_name() {
        let four = [q(0), v(0), q(2), v(2)];
        assert_eq!(selected(json!({"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj"})), four);
        assert!(selected(json!({"target_modules": "q_proj"})).is_empty());
        assert_eq!(selected(json!({"target_modules": ".*(q_proj|lm_head)"})).len(), 4);
        let excluding = json!({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"});
        assert_eq!(selected(excluding), four);
        let both =
            json!({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "v_proj"]});
        assert_eq!(selected(both), [q(0), q(2)]);
    }

    #[test]
    fn layers_are_chosen_by_number() {
        let on = |layers: serde_json::Value, pattern: serde_json::Value| {
            selected(
                json!({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": layers, "layers_pattern": pattern}),
            )
        };
        let one = [q(1), v(1)];
        assert_eq!(on(json!([0, 2]), json!(null)), [q(0), v(0), q(2), v(2)]);
        assert_eq!(on(json!(1), json!(null)), one);
        assert_eq!(on(json!([]), json!(null)).len(), 6);
        assert!(on(json!([9]), json!(null)).is_empty());
        for pattern in [json!("layers"), json!(["h", "layers"]), json!(""), json!("lay.rs")] {
            assert_eq!(on(json!([1]), pattern), one);
        }
        assert!(on(json!([1]), json!("h")).is_empty());
        // A full name is taken as it is, whatever its layer.
        let full = json!({"target_modules": [q(0)], "layers_to_transform": [1]});
        assert_eq!(selected(full), [q(0)]);
        // The first number counts: a layer's, not an expert's inside it.
        let expert = LinearModule { name: "model.layers.1.experts.0.w1", ..MODULES[0] };
        let moe = config(json!({"target_modules": ["w1"], "layers_to_transform": [1]}));
        assert_eq!(select(&moe, &BaseModules { linears: vec![expert], ..BaseModules::default() }).unwrap().len(), 1);
    }

    #[test]
    fn the_first_pattern_that_matches_gives_the_rank() {
        let ranks = |pattern: &str| -> Vec<usize> {
            let text = format!(r#"{{"target_modules": ["q_proj", "v_proj"], "r": 4, "rank_pattern": {pattern}}}"#);
            let config = serde_json::from_str(&text).unwrap();
            select(&config, &tiny_llama()).unwrap().iter().map(|t| t.r).collect()
        };
        assert_eq!(ranks(r#"{"q_proj": 2}"#), [2, 4, 2, 4, 2, 4]);
        assert_eq!(ranks(r#"{"layers.1.self_attn.q_proj": 2}"#), [4, 4, 2, 4, 4, 4]);
        assert_eq!(ranks(r#"{"^model.layers.1.self_attn.q_proj": 2}"#), [4, 4, 2, 4, 4, 4]);
        assert_eq!(ranks(r#"{".*\\.1\\..*": 2}"#), [4, 4, 2, 2, 4, 4]);
        assert_eq!(ranks(r#"{"proj": 2}"#), [4; 6]);
        assert_eq!(ranks(r#"{"model.layers.0.self_attn.q_proj": 3, "q_proj": 2}"#), [3, 4, 2, 4, 2, 4]);
        assert_eq!(ranks(r#"{"q_proj": 2, "model.layers.0.self_attn.q_proj": 3}"#), [2, 4, 2, 4, 2, 4]);
        assert_eq!(ranks(r#"{"self_attn.q_proj|v_proj": 5}"#), [5; 6]);
    }

    #[test]
    fn scaling_is_alpha_over_r_or_over_its_root() {
        let config =
            config(json!({"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16, "use_rslora": true,
            "alpha_pattern": {"v_proj": 32}, "rank_pattern": {"layers.0.self_attn.q_proj": 16}}));
        let targets = resolve(&config, &tiny_llama()).unwrap();
        let found: Vec<_> = targets.iter().map(|t| (t.r, t.scaling)).collect();
        let (q, v) = ((4, 8.0), (4, 16.0));
        assert_eq!(found, [(16, 4.0), v, q, v, q, v]);
        let plain = LoraConfig { use_rslora: false, ..config };
        assert_eq!(resolve(&plain, &tiny_llama()).unwrap()[0].scaling, 1.0);
        assert_eq!((targets[1].in_features, targets[1].out_features), (32, 16));
    }

    #[test]
    fn what_has_no_effect_is_refused_with_advice() {
        for (value, expected) in [
            (
                json!({"target_modules": ["q_proj", "q_porj"]}),
                "`q_porj` matches no module of this model. Did you mean `q_proj`",
            ),
            (json!({"target_modules": ["attn.q_proj"]}), "Did you mean `self_attn.q_proj`"),
            (json!({"target_modules": ["all-linear"]}), "a string of its own"),
            (json!({"target_modules": [".*q_proj"]}), "give a regular expression as one string"),
            (json!({"target_modules": ["embed_tokens"]}), "modules_to_save"),
            (json!({"target_modules": "q_proj"}), r#"write the list [q_proj], or ".*\.q_proj""#),
            (json!({"target_modules": "Q"}), "regular expression for the whole name"),
            (
                json!({"target_modules": "Q"}),
                "q_proj (3), k_proj (3), v_proj (3), o_proj (3), gate_proj (3), up_proj (3), down_proj (3), lm_head (1)",
            ),
            (json!({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}), "takes modules away"),
            (json!({"exclude_modules": ["q_pro"]}), "exclude_modules: `q_pro` matches no module"),
            (json!({"exclude_modules": "q_proj"}), "exclude_modules: `q_proj` matches no module"),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [0, 3]}),
                "layer 3 does not exist; the layers of this model are 0 to 2",
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"}),
                "layers_pattern: `h` matches no module of this model. Numbers follow `layers` in the names",
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "bogus"]}),
                "layers_pattern: `bogus` matches no module",
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "l.*s"]}),
                "Put `l.*s` before `layers`, or remove it",
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", ""]}),
                "layers_pattern: it or an entry of it is empty",
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_pattern": ""}),
                "layers_pattern: it or an entry of it is empty",
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": []}),
                "layers_to_transform: the list is empty, and every layer would be adapted",
            ),
            (json!({"rank_pattern": {"qproj": 4}}), "rank_pattern: `qproj` matches no module"),
            (json!({"alpha_pattern": {"lm_head": 4}}), "alpha_pattern: `lm_head` matches no module"),
            (
                json!({"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 8}}),
                "rank_pattern: `layers.0.self_attn.q_proj` has no effect: the first pattern that matches a module counts, and those \
                 before it leave none (`q_proj` takes `model.layers.0.self_attn.q_proj`)",
            ),
            (
                json!({"alpha_pattern": {"q_proj": 1, "v_proj": 2, "(q|v)_proj": 3}}),
                "alpha_pattern: `(q|v)_proj` has no effect",
            ),
            (json!({"modules_to_save": ["proj"]}), "`proj` also matches `model.layers.0.self_attn.q_proj`"),
            (json!({"r": 0}), "r: a rank of 0"),
        ] {
            let message = refused(value.clone());
            assert!(message.contains(expected), "{value}: {message}");
        }
    }

    #[test]
    fn what_counts_for_one_module_alone_is_accepted() {
        for pattern in [json!({"layers.0.self_attn.q_proj": 8, "q_proj": 4}), json!({"q_proj": 4, "(q|v)_proj": 8})] {
            let value = json!({"rank_pattern": pattern, "alpha_pattern": pattern});
            assert_eq!(resolve(&config(value), &tiny_llama()).unwrap().len(), 21);
        }
        let mut modules = tiny_llama();
        modules.linears.push(LinearModule { name: "model.h.0.attn.q_proj", ..MODULES[0] });
        let value = json!({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["layers", "h"]});
        assert_eq!(resolve(&config(value), &modules).unwrap().len(), 2);
    }

    #[test]
    fn a_bias_that_trains_none_is_refused() {
        let mut on_k = tiny_llama();
        on_k.linears.iter_mut().for_each(|module| module.has_bias = module.name.ends_with("k_proj"));
        let nowhere = "has no effect: no linear module of this model has a bias. Set it to none, or remove it";
        let elsewhere =
            "none of the adapted modules has a bias; those that have one are k_proj (3). Adapt one of these";
        let saved = "bias: all has no effect: modules_to_save trains every module with a bias (k_proj (3)) whole";
        for (value, modules, expected) in [
            (json!({"bias": "all"}), &tiny_llama(), nowhere),
            (json!({"bias": "lora_only"}), &tiny_llama(), nowhere),
            (json!({"bias": "lora_only", "target_modules": ["q_proj"]}), &on_k, elsewhere),
            (json!({"bias": "all", "target_modules": ["q_proj"], "modules_to_save": ["k_proj"]}), &on_k, saved),
        ] {
            let message = resolve(&config(value.clone()), modules).unwrap_err().to_string();
            assert!(message.contains(expected), "{value}: {message}");
        }
        for value in [
            json!({"bias": "all", "target_modules": ["q_proj"]}),
            json!({"bias": "lora_only", "target_modules": ["q_proj", "k_proj"]}),
        ] {
            assert!(resolve(&config(value), &on_k).is_ok());
        }
    }

    #[test]
    fn errors_begin_with_the_key_at_fault() {
        for (key, value) in [
            ("r", json!({"r": 0})),
            ("target_modules", json!({"target_modules": "(("})),
            ("target_modules", json!({"target_modules": "Q"})),
            ("exclude_modules", json!({"exclude_modules": ["Q"]})),
            ("modules_to_save", json!({"modules_to_save": ["proj"]})),
            ("layers_to_transform", json!({"target_modules": ["q_proj"], "layers_to_transform": 7})),
            ("rank_pattern", json!({"rank_pattern": {"q_proj": 4, ".*q_proj": 8}})),
            ("bias", json!({"bias": "all"})),
        ] {
            let message = refused(value);
            assert!(message.starts_with(&format!("{key}: ")), "{message}");
        }
    }

    #[test]
    fn modules_to_save_match_any_end_of_a_name() {
        let names = [
            "model.embed_tokens",
            "model.layers.0.input_layernorm",
            "model.layers.0.self_attn.q_proj",
            "model.norm",
            "lm_head",
        ];
        let saving = |entries: serde_json::Value| {
            config(json!({"modules_to_save": entries})).selection().resolve_modules_to_save(&names)
        };
        assert_eq!(saving(json!(["lm_head", "norm"])).unwrap(), [names[1], names[3], names[4]]);
        assert!(saving(json!([])).unwrap().is_empty());
        let message = saving(json!(["lm_hed"])).unwrap_err().to_string();
        assert!(message.contains("Did you mean `lm_head`"), "{message}");
    }

    #[test]
    fn modules_are_counted_by_their_last_name() {
        let counts = count_matches(&tiny_llama());
        assert_eq!(counts[0], ("q_proj".to_owned(), 3));
        assert_eq!(counts[7], ("lm_head".to_owned(), 1));
    }
}
