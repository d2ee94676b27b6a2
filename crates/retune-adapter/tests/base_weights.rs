//! The base's own weights in an adapter's file: taken where they are the base's, refused where they are others.

use retune_adapter::AdapterFile;
use retune_testing::{Case, goldens};

const KEY: &str = "base_model.model.lm_head.base_layer.weight";

#[test]
fn another_weight_of_the_base_is_refused() {
    let case = Case::load("lora_save_embeddings");
    let table = case.checkpoint.tensor("lm_head.weight").unwrap();
    let shape = vec![table.rows(), table.cols()];
    let with = |factor: f32| {
        let mut adapter = AdapterFile::read(&goldens().join("lora_save_embeddings/adapter")).unwrap();
        let values = table.to_f32().iter().map(|v| factor * v).collect();
        adapter.tensors.insert(KEY.to_owned(), (shape.clone(), values));
        adapter.check_base_weights(&case.checkpoint)
    };
    assert!(with(1.0).is_ok());
    // As far away as a weight in a few bits is from itself.
    assert!(with(1.05).is_ok());
    let text = with(1.5).unwrap_err().to_string();
    assert!(text.contains(KEY) && text.contains("lm_head"), "{text}");
}
