//! What `retune compare` is to do: as a user writes it ([`RawPlan`], YAML) and checked ([`Plan`]).
//!
//! A plan has the sections of a run file, and a list of variants that each change some of them. A variant that trains is checked as the run file that
//! it stands for, and is one.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::{Names, read_text};
use crate::error::Error;
use crate::run_config::tree::{self, Schema};
use crate::run_config::{BaseConfig, DataConfig, MOST_THREADS, MethodName, RunConfig, TrainingConfig, method};

/// The name of the model as it is, which every comparison has.
pub const BASE: &str = "base";

/// A comparison of ways to adapt one model to one data set. Relative paths are relative to the directory it is started in.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RawPlan {
    /// The base model: a Hugging Face model directory, a GGUF file, or a Hub id (owner/name or owner/name/file.gguf).
    pub model: String,
    /// The directory that the comparison writes to: the report, the results, the runs.
    pub output_dir: PathBuf,
    /// How the frozen base model is computed in training.
    #[serde(default)]
    pub base: BaseConfig,
    /// What is learnt from, as in a run file. Where neither `eval` nor `eval_fraction` is given, a fifth of the rows is held out, 200 at most.
    pub data: DataConfig,
    /// How long, how fast and in what pieces is learnt, as in a run file, by all variants that do not say otherwise. Each has its method's own
    /// learning rate where none is given.
    #[serde(default)]
    pub training: TrainingConfig,
    /// Minutes for the whole comparison. A few steps of each variant are timed, and all train for as many steps as the time allows, no longer than
    /// `training` says.
    #[serde(default)]
    pub minutes: Option<f64>,
    /// The seeds with which each variant is trained, of its first weights, of the order of the rows and of the examples of a hard prompt; 42
    /// alone when absent.
    #[serde(default)]
    pub seeds: Option<Vec<u64>>,
    /// Whether and how held-out rows are answered. When absent they are where their answers are no labels and no minutes are given.
    #[serde(default)]
    pub generate: Option<GenerateConfig>,
    /// What is compared with the base; a usual choice when absent.
    #[serde(default)]
    pub variants: Option<Vec<RawVariant>>,
    /// Threads to compute with; all of the machine when absent. The result does not depend on it.
    #[serde(default)]
    pub threads: Option<usize>,
}

/// How held-out rows are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerateConfig {
    /// Longest answer, in tokens; 0 for no answers at all.
    pub max_new_tokens: usize,
}

/// One way to adapt the model: by training, or by examples in the prompt.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RawVariant {
    /// What it is called in the report.
    pub name: String,
    /// What is trained; lora when absent.
    #[serde(default)]
    pub method: Option<MethodName>,
    /// The settings of the method, in PEFT's terms; its defaults when absent. Not with method full.
    #[serde(default)]
    pub adapter: Option<Value>,
    /// How the frozen base is computed and held for this variant (`storage: nf4-double` is QLoRA), in place of the plan's `base`.
    #[serde(default)]
    pub base: Option<BaseConfig>,
    /// What this variant has otherwise than the plan's `training`.
    #[serde(default)]
    pub training: Option<TrainingConfig>,
    /// Examples put before each row in place of training: a hard prompt. Not with method, adapter, base and training.
    #[serde(default)]
    pub examples: Option<usize>,
    /// The seeds of this variant, in place of the plan's.
    #[serde(default)]
    pub seeds: Option<Vec<u64>>,
}

/// A checked plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    pub model: String,
    pub output_dir: PathBuf,
    pub data: DataConfig,
    /// The part that is held out, where the plan says it.
    pub held_out_fraction: Option<f64>,
    pub minutes: Option<f64>,
    pub generate: Option<GenerateConfig>,
    /// The base first.
    pub variants: Vec<Variant>,
    /// Whether the variants are the usual choice, of which what cannot be done is left out.
    pub usual: bool,
    pub threads: Option<usize>,
}

/// A checked variant.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Variant {
    pub name: String,
    pub kind: Kind,
    pub seeds: Vec<u64>,
}

/// What a variant does with the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Nothing.
    Base,
    /// Puts so many examples before each row.
    Examples(usize),
    /// Trains, as a run file with the plan's data says.
    Trained(Box<RunConfig>),
}

/// What is compared where a plan does not say it.
fn usual_variants() -> Value {
    json!([
        {"name": "hard prompt", "examples": 4},
        {"name": "LoRA r=16", "method": "lora", "adapter": {"r": 16, "lora_alpha": 32}},
        {"name": "LoRA r=4", "method": "lora", "adapter": {"r": 4, "lora_alpha": 8}},
        {"name": "MiSS r=16", "method": "miss", "adapter": {"r": 16}},
        {"name": "(IA)³", "method": "ia3"},
        {"name": "prompt tuning", "method": "prompt_tuning", "adapter": {"num_virtual_tokens": 16}},
        {"name": "full fine-tuning", "method": "full"},
    ])
}

impl Plan {
    /// Reads and checks a YAML (or JSON) file, or with none the overrides alone, which are of the form `training.epochs=2`.
    ///
    /// # Errors
    /// As [`RunConfig::load`]; those of a variant name it.
    pub fn load(path: Option<&Path>, overrides: &[String]) -> Result<Plan, Error> {
        match path {
            Some(path) => Plan::parse(&read_text(path)?, &path.display().to_string(), overrides),
            None => Plan::parse("", "the plan", overrides),
        }
    }

    /// As [`Plan::load`], from text; `origin` is what errors call it.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Plan, Error> {
        let mut tree = tree::parse(text, origin)?;
        if tree.is_null() {
            tree = Value::Object(Map::new());
        }
        for text in overrides {
            tree::set(&mut tree, text)?;
        }
        Schema::new(&schema(false)).check(&tree)?;
        let usual = tree.get("variants").is_none_or(Value::is_null);
        if usual && let Some(plan) = tree.as_object_mut() {
            plan.insert("variants".to_owned(), usual_variants());
        }
        let raw: RawPlan =
            serde_json::from_value(tree.clone()).map_err(|error| Error::Config { cause: error.to_string() })?;
        raw.data.check(&Names::KEYS)?;
        check_ranges(&raw)?;
        let seeds = raw.seeds.clone().unwrap_or_else(|| vec![raw.training.seed]);
        let first = seeds.iter().take(1).copied().collect();
        let mut variants = vec![Variant { name: BASE.to_owned(), kind: Kind::Base, seeds: first }];
        for (at, variant) in raw.variants.iter().flatten().enumerate() {
            let kind = kind_of(variant, &tree, at);
            let kind = kind.map_err(|error| Error::InVariant { name: variant.name.clone(), error: Box::new(error) })?;
            let seeds = variant.seeds.clone().unwrap_or_else(|| seeds.clone());
            variants.push(Variant { name: variant.name.clone(), kind, seeds });
        }
        check_names(&variants)?;
        let RawPlan { model, output_dir, data, minutes, generate, threads, .. } = raw;
        let held_out_fraction = tree.pointer("/data/eval_fraction").and_then(Value::as_f64);
        Ok(Plan { model, output_dir, data, held_out_fraction, minutes, generate, variants, usual, threads })
    }
}

/// What the variant at a place of the plan's list does, checked as the run file that it stands for.
fn kind_of(variant: &RawVariant, plan: &Value, at: usize) -> Result<Kind, Error> {
    if let Some(examples) = variant.examples {
        let trains = variant.method.is_some()
            || variant.adapter.is_some()
            || variant.base.is_some()
            || variant.training.is_some();
        if trains || examples == 0 {
            let found = if trains { "given with method, adapter, base or training".to_owned() } else { "0".to_owned() };
            return Err(key_value(
                "examples",
                found,
                "at least 1, alone",
                "Examples train nothing: make it two variants",
            ));
        }
        return Ok(Kind::Examples(examples));
    }
    let own = |key: &str| plan.pointer(&format!("/variants/{at}/{key}")).filter(|value| !value.is_null()).cloned();
    let mut run = Map::new();
    for key in ["model", "output_dir", "base", "data", "threads"] {
        run.extend(plan.get(key).map(|value| (key.to_owned(), value.clone())));
    }
    if variant.method.is_some_and(|method| !method.saves_adapter()) {
        // How the plan's base is frozen says nothing of one that is trained.
        run.remove("base");
    }
    for key in ["method", "adapter", "base"] {
        run.extend(own(key).map(|value| (key.to_owned(), value)));
    }
    let mut training = plan.get("training").and_then(Value::as_object).cloned().unwrap_or_default();
    training.extend(own("training").as_ref().and_then(Value::as_object).cloned().unwrap_or_default());
    run.insert("training".to_owned(), Value::Object(training));
    RunConfig::from_tree(Value::Object(run)).map(|config| Kind::Trained(Box::new(config)))
}

fn check_ranges(plan: &RawPlan) -> Result<(), Error> {
    if plan.output_dir.as_os_str().is_empty() {
        return Err(key_value("output_dir", "empty", "a path", "Name the directory to write to"));
    }
    if let Some(minutes) = plan.minutes
        && !(minutes > 0.0 && minutes <= 1e6)
    {
        return Err(key_value("minutes", minutes, "above 0", "Remove the key to train as long as training says"));
    }
    if let Some(threads) = plan.threads
        && !(1..=MOST_THREADS).contains(&threads)
    {
        let advice = "Remove the key to use all of the machine";
        return Err(key_value("threads", threads, &format!("1 to {MOST_THREADS}"), advice));
    }
    let lists = plan.seeds.iter().chain(plan.variants.iter().flatten().filter_map(|variant| variant.seeds.as_ref()));
    for seeds in lists {
        let different: HashSet<u64> = seeds.iter().copied().collect();
        if seeds.is_empty() || different.len() < seeds.len() {
            let advice = "Remove the key for one run of each variant";
            return Err(key_value("seeds", format!("{seeds:?}"), "at least one, each once", advice));
        }
    }
    Ok(())
}

/// Refuses names that are missing, taken, or the same as far as names of files go.
fn check_names(variants: &[Variant]) -> Result<(), Error> {
    let mut slugs: Vec<(String, &str)> = Vec::new();
    for Variant { name, .. } in variants {
        let slug = slug(name);
        let advice = "Give each variant a name of its own; base is the model as it is, which is always compared";
        if slug.is_empty() {
            return Err(key_value("name", format!("{name:?}"), "a name with letters or digits", advice));
        }
        if let Some((_, other)) = slugs.iter().find(|(known, _)| *known == slug) {
            let found = format!("{name:?}, as {other:?} is called but for signs");
            return Err(key_value("name", found, "another name", advice));
        }
        slugs.push((slug, name));
    }
    Ok(())
}

/// A name as a part of file names: letters and digits, with `-` between.
pub fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join("-")
}

fn key_value(key: &str, found: impl ToString, expected: &str, advice: &str) -> Error {
    let (key, found) = (key.to_owned(), found.to_string());
    Error::KeyValue { key, found, expected: expected.to_owned(), advice: advice.to_owned() }
}

/// The JSON schema of plans, for editors and as a reference.
pub fn json_schema() -> String {
    format!("{:#}", schema(true))
}

/// The schema of plans, with the settings of all methods or with none: which those of a variant are its own check says.
fn schema(with_settings: bool) -> Value {
    let mut generator = SchemaGenerator::default();
    let settings = method::settings_schema(None, &mut generator);
    let mut schema = generator.into_root_schema_for::<RawPlan>().to_value();
    let adapter = schema.pointer_mut("/$defs/RawVariant/properties/adapter").and_then(Value::as_object_mut);
    if let (true, Some(adapter)) = (with_settings, adapter) {
        let mut rest = std::mem::take(adapter);
        adapter.insert("anyOf".to_owned(), settings);
        adapter.append(&mut rest);
    }
    schema
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_config::Compute;

    const LEAST: &str = "model: m\noutput_dir: out\ndata:\n  train: rows.jsonl\n";

    fn parse(overrides: &[&str]) -> Result<Plan, Error> {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        Plan::parse(LEAST, "plan.yaml", &overrides)
    }

    fn error(overrides: &[&str]) -> String {
        parse(overrides).unwrap_err().to_string()
    }

    fn run(plan: &Plan, name: &str) -> RunConfig {
        let variant = plan.variants.iter().find(|variant| variant.name == name).unwrap();
        match &variant.kind {
            Kind::Trained(config) => (**config).clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_least_plan_compares_the_usual_variants() {
        let plan = parse(&[]).unwrap();
        let names: Vec<&str> = plan.variants.iter().map(|variant| variant.name.as_str()).collect();
        assert_eq!(names[..3], ["base", "hard prompt", "LoRA r=16"]);
        assert_eq!(names.last(), Some(&"full fine-tuning"));
        assert!(plan.usual && plan.variants.iter().all(|variant| variant.seeds == [42]));
        assert_eq!((plan.held_out_fraction, plan.minutes, plan.generate), (None, None, None));
        // Each with the rate of its method.
        let rate = |name: &str| run(&plan, name).training.learning_rate;
        assert_eq!((rate("LoRA r=16"), rate("full fine-tuning")), (Some(2e-4), Some(2e-5)));
        assert_eq!(parse(&["data.eval_fraction=0.5"]).unwrap().held_out_fraction, Some(0.5));
    }

    #[test]
    fn variants_change_the_plans_training_key_by_key() {
        let variants = "variants=[{name: a, adapter: {r: 2}, training: {learning_rate: 1e-3}}, {name: b, method: full, seeds: [7]}]";
        let plan = parse(&[
            "training.batch_size=4",
            "training.learning_rate=5e-4",
            "seeds=[1, 2]",
            "base.compute=int8",
            variants,
        ])
        .unwrap();
        let (a, b) = (run(&plan, "a"), run(&plan, "b"));
        assert_eq!((a.training.batch_size, a.training.learning_rate), (4, Some(1e-3)));
        assert_eq!((b.training.batch_size, b.training.learning_rate), (4, Some(5e-4)));
        assert_eq!(plan.variants[1].seeds, [1, 2]);
        assert_eq!((a.base.compute, b.base.compute), (Compute::Int8, Compute::Auto));
        let of_its_own = parse(&["base.compute=int8", "variants=[{name: a, base: {compute: f32}}]"]).unwrap();
        assert_eq!(run(&of_its_own, "a").base.compute, Compute::F32);
        assert_eq!((plan.variants[0].seeds.as_slice(), plan.variants[2].seeds.as_slice()), (&[1][..], &[7][..]));
        assert!(!plan.usual);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let of = |variant: &str| error(&[&format!("variants=[{variant}]")]);
        assert!(error(&["varients=[]"]).contains("unknown key varients; did you mean variants?"));
        let text = error(&["training.epoch=2"]);
        assert!(text.contains("unknown key training.epoch; did you mean training.epochs?"), "{text}");
        assert!(of("{name: a, rank: 4}").starts_with("unknown key variants[0].rank"), "{}", of("{name: a, rank: 4}"));
        let text = of("{name: a, adapter: {rank: 4}}");
        assert!(text.starts_with("variant \"a\": unknown key adapter.rank"), "{text}");
        let text = of("{name: a, training: {learning_rate: 0}}");
        assert!(text.starts_with("variant \"a\": training.learning_rate is 0; expected above 0"), "{text}");
        assert!(of("{name: a, method: full, adapter: {r: 4}}").contains("adapter is given with method full"));
        assert!(of("{name: a, examples: 4, method: lora}").contains("examples is given with method"));
        assert!(of("{name: a, examples: 0}").contains("examples is 0; expected at least 1"));
        assert!(of("{name: Base}").contains("name is \"Base\", as \"base\" is called but for signs"));
        assert!(of("{name: a b}, {name: a-b}").contains("expected another name"));
        assert!(of("{name: '='}").contains("a name with letters or digits"));
        assert!(of("{examples: 4}").contains("variants[0].name is missing: What it is called"));
        assert!(error(&["minutes=0"]).contains("minutes is 0; expected above 0"));
        assert!(error(&["seeds=[]"]).contains("seeds is []; expected at least one"));
        assert!(error(&["seeds=[1, 1]"]).contains("seeds is [1, 1]"));
    }

    #[test]
    fn the_schema_in_the_repository_is_this_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../schema/plan.schema.json");
        let stored = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            stored.trim_end() == json_schema(),
            "the keys changed: run `retune schema plan > schema/plan.schema.json` and commit it"
        );
    }
}
