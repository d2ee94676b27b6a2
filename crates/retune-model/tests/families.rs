//! Models of every family, as transformers and llama.cpp's converter write them, are understood: `goldens/make_families.py` and
//! `goldens/make_families_gguf.py` make them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use retune_engine::spec::ModelSpec;
use retune_model::checkpoint::Checkpoint;
use retune_model::families::{FAMILIES, describe};
use safetensors::SafeTensors;
use serde_json::Value;

/// The cases that have all of these files.
fn cases(files: [&str; 2]) -> Vec<(String, PathBuf)> {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let dirs = fs::read_dir(goldens).unwrap().map(|entry| entry.unwrap().path());
    let has_all = |dir: &PathBuf| files.iter().all(|file| dir.join(file).is_file());
    dirs.filter(has_all).map(|dir| (dir.file_name().unwrap().to_string_lossy().into_owned(), dir)).collect()
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn the_spec_of_a_configuration_names_the_tensors_of_its_file() {
    let mut types = Vec::new();
    for (name, dir) in cases(["config.json", "model.safetensors"]) {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        types.push(checkpoint.spec.family);
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        // A weight in 4 or 8 bits is several tensors.
        let is_whole = |name: &str| ![".weight.", ".SCB", ".weight_format"].iter().any(|part| name.contains(part));
        let theirs: BTreeMap<String, Vec<usize>> = file
            .iter()
            .filter(|(name, _)| is_whole(name) && !name.contains("vision_tower") && !name.contains("multi_modal"))
            .map(|(name, tensor)| {
                (name.replace("language_model.model.", "model.language_model."), tensor.shape().to_vec())
            })
            .collect();
        let ours: BTreeMap<String, Vec<usize>> = checkpoint.spec.tensors().into_iter().collect();
        assert!(ours.keys().eq(theirs.keys()), "{name}");
        let is_plain = !name.starts_with("bnb");
        assert!(!is_plain || ours == theirs, "{name}");
        for (name, shape) in checkpoint.spec.tensors() {
            let matrix = checkpoint.tensor(&name).unwrap();
            assert_eq!(matrix.rows() * matrix.cols(), shape.iter().product::<usize>(), "{name}");
        }
        assert!(checkpoint.check_finite().is_ok(), "{name}");
    }
    for family in FAMILIES.iter().flat_map(|family| family.model_types) {
        assert!(types.contains(family), "{family}");
    }
}

#[test]
fn a_gguf_file_is_the_model_it_was_converted_from() {
    let mut types = Vec::new();
    for (name, dir) in cases(["config.json", "model.gguf"]) {
        let checkpoint = Checkpoint::open(&dir.join("model.gguf")).unwrap();
        let expected = describe(&config(&dir)).unwrap().spec;
        // A Mistral without a window is a Llama.
        let mut expected = match expected.family {
            "mistral" => ModelSpec { family: "llama", ..expected },
            _ => expected,
        };
        // A T5's configuration does not say whether its head is the table.
        expected.head.tied &= !checkpoint.has("lm_head.weight");
        // BLOOM's length is not always in the file, and bounds nothing.
        let context = if expected.family == "bloom" { checkpoint.spec.context } else { expected.context };
        assert_eq!(checkpoint.spec, ModelSpec { context, ..expected }, "{name}");
        types.push(checkpoint.spec.family);
        let written = describe(&checkpoint.hf_config_json().unwrap()).unwrap();
        let mut written_spec = written.spec;
        written_spec.head.tied &= checkpoint.spec.head.tied;
        assert_eq!(written_spec, checkpoint.spec, "{name}");
        assert_eq!(written.tokens, checkpoint.tokens, "{name}");
        assert!(checkpoint.check_finite().is_ok(), "{name}");
    }
    // A GGUF file of a Mistral says that it is a Llama.
    for family in FAMILIES.iter().filter(|family| family.gguf.is_some() && family.model_types != ["mistral"]) {
        assert!(family.model_types.iter().any(|name| types.contains(name)), "{}", family.models);
    }
}
