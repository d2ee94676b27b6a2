//! Directories of every family that do not hold what their configuration says, or say what the family has not: each is refused with what
//! was found. And what transformers reads alike is read alike.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use retune_model::checkpoint::Checkpoint;
use retune_model::families::FAMILIES;
use retune_testing::goldens;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A directory's configuration and tensors, to be changed and written somewhere else.
struct Directory {
    config: Value,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Directory {
    fn read(case: &str) -> Self {
        let dir = goldens().join(case);
        let config = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter();
        let tensors = tensors.map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect();
        Self { config, tensors }
    }

    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        let views: Vec<(String, TensorView<'_>)> = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()))
            .collect();
        let none: Option<HashMap<String, String>> = None;
        fs::write(dir.path().join("model.safetensors"), serialize(views, none).unwrap()).unwrap();
        dir
    }

    /// A weight of the first layer.
    fn of_layer(&self) -> String {
        let is_wanted = |name: &&String| name.contains(".0.") && name.ends_with(".weight") && !name.contains("vision");
        self.tensors.keys().find(is_wanted).unwrap().clone()
    }

    /// The part of the configuration that is about text.
    fn text_config(&mut self) -> &mut Value {
        if self.config.get("text_config").is_some() { &mut self.config["text_config"] } else { &mut self.config }
    }
}

fn refusal(directory: &Directory) -> String {
    let dir = directory.write();
    match Checkpoint::open(dir.path()) {
        Ok(_) => panic!("it was opened: {}", directory.config),
        Err(error) => error.to_string(),
    }
}

/// A case of each model type.
fn cases() -> Vec<(&'static str, String)> {
    let case = |model_type: &'static str| match model_type {
        "llama" => "llama_untied_mha".to_owned(),
        "mistral" => "mistral_window".to_owned(),
        "gemma3_text" => "gemma3".to_owned(),
        "gemma3" => "gemma3_wrapped".to_owned(),
        other => other.to_owned(),
    };
    FAMILIES.iter().flat_map(|family| family.model_types).map(|model_type| (*model_type, case(model_type))).collect()
}

#[test]
fn a_missing_tensor_is_named() {
    for (model_type, case) in cases() {
        let mut directory = Directory::read(&case);
        let name = directory.of_layer();
        directory.tensors.remove(&name);
        let text = refusal(&directory);
        let inner = name.rsplit(".0.").next().unwrap();
        assert!(text.contains(inner) && text.contains("missing"), "{model_type}: {text}");
    }
}

#[test]
fn an_unused_tensor_is_named() {
    for (model_type, case) in cases() {
        let mut directory = Directory::read(&case);
        // A module that the configuration does not announce: another model.
        let known = directory.of_layer();
        let tensor = directory.tensors[&known].clone();
        directory.tensors.insert(known.replace(".weight", ".surprise.weight"), tensor);
        let text = refusal(&directory);
        assert!(text.contains("surprise"), "{model_type}: {text}");
    }
}

#[test]
fn leftovers_of_older_versions_are_passed_over() {
    for (case, name, shape) in [
        ("llama_tied", "model.layers.0.self_attn.rotary_emb.inv_freq", vec![4]),
        ("gpt2", "transformer.h.0.attn.bias", vec![1, 1, 8, 8]),
        ("gpt2", "transformer.h.0.attn.masked_bias", vec![1]),
    ] {
        let mut directory = Directory::read(case);
        let len = shape.iter().product::<usize>();
        directory.tensors.insert(name.to_owned(), (Dtype::F32, shape, vec![0; 4 * len]));
        let dir = directory.write();
        assert!(Checkpoint::open(dir.path()).is_ok(), "{case}: {name}");
    }
}

#[test]
fn a_vocabulary_that_does_not_fit_is_refused() {
    for (model_type, case) in cases() {
        let mut directory = Directory::read(&case);
        let config = directory.text_config();
        config["vocab_size"] = json!(config["vocab_size"].as_u64().unwrap() + 1);
        let text = refusal(&directory);
        assert!(text.contains("shape [96,") && text.contains("needs [97,"), "{model_type}: {text}");
    }
}

#[test]
fn a_field_that_the_family_has_not_is_named() {
    for (model_type, case) in cases() {
        for (field, value) in
            [("num_experts", json!(8)), ("num_local_experts", json!(4)), ("use_parallel_residual", json!(true))]
        {
            let mut directory = Directory::read(&case);
            directory.text_config()[field] = value;
            let text = refusal(&directory);
            assert!(text.contains(field), "{model_type}, {field}: {text}");
        }
    }
}

#[test]
fn a_family_that_is_not_there_is_named_with_those_that_are() {
    let mut directory = Directory::read("llama_tied");
    for model_type in ["gpt_neox", "bert", "mamba"] {
        directory.config["model_type"] = json!(model_type);
        let text = refusal(&directory);
        assert!(text.contains(model_type) && text.contains("llama, mistral, qwen2"), "{text}");
    }
}

fn tensors(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.names().map(|name| (name.to_owned(), checkpoint.tensor(name).unwrap().to_f32())).collect()
}

#[test]
fn names_may_lack_the_prefix_of_the_base() {
    for (model_type, case) in cases() {
        let family = FAMILIES.iter().find(|family| family.model_types.contains(&model_type)).unwrap();
        let whole = tensors(&goldens().join(&case));
        let mut directory = Directory::read(&case);
        let short = std::mem::take(&mut directory.tensors).into_iter();
        let strip = |name: String| name.strip_prefix(family.prefix).map_or(name.clone(), str::to_owned);
        directory.tensors = short.map(|(name, tensor)| (strip(name), tensor)).collect();
        let dir = directory.write();
        assert_eq!(tensors(dir.path()), whole, "{model_type}");
    }
}

#[test]
fn the_head_is_what_the_file_says() {
    // The configuration ties it, the file has another: used as it is.
    let own = Checkpoint::open(&goldens().join("llama_tied_flag_untied_file")).unwrap();
    assert!(!own.spec.head.tied);
    // A copy of the table is no head of its own.
    let mut directory = Directory::read("llama_tied");
    let table = directory.tensors["model.embed_tokens.weight"].clone();
    directory.tensors.insert("lm_head.weight".to_owned(), table.clone());
    let copied = Checkpoint::open(directory.write().path()).unwrap();
    assert!(copied.spec.head.tied);
    // The head alone is table and head.
    directory.tensors.remove("model.embed_tokens.weight");
    let dir = directory.write();
    let alone = Checkpoint::open(dir.path()).unwrap();
    assert!(alone.spec.head.tied && alone.tensor("model.embed_tokens.weight").is_ok());
    // Not tied, and no head: transformers would make a random one.
    let mut directory = Directory::read("llama_tied");
    directory.config["tie_word_embeddings"] = json!(false);
    let text = refusal(&directory);
    assert!(text.contains("lm_head"), "{text}");
}
