//! The logits of SmolLM2-135M-Instruct against transformers in f64, where the environment variable `RETUNE_TEST_MODELS` names a
//! directory that holds `SmolLM2-135M-Instruct.Q4_1.gguf`. The golden is of that file's dequantized weights, so that no other file
//! of the model will do; `goldens/make_smollm2.py` writes it.

mod common;

use retune_engine::Saving;
use retune_engine::compute::Compute;
use retune_engine::pass::Pass;
use retune_engine::workspace::Workspace;
use retune_model::checkpoint::Checkpoint;
use retune_testing::{Case, goldens};
use safetensors::SafeTensors;

#[test]
fn smollm2_gives_the_logits_of_transformers() {
    let Some(folder) = common::models() else { return };
    let Some(gguf) = common::gguf_in(&folder) else {
        println!("skipped: {} holds no {}", folder.display(), common::GGUF);
        return;
    };
    let bytes = std::fs::read(goldens().join("smollm2_logits.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let ids = golden.tensor("input_ids").unwrap();
    let ids: Vec<u32> = ids.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
    let logits = golden.tensor("logits").unwrap();
    let expected: Vec<f32> = logits.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let positions = logits.shape()[0];
    assert_eq!((ids.len(), logits.shape()), (48, &[8, 49152][..]));

    let case = Case::bare("smollm2", Checkpoint::open(&gguf).unwrap());
    let mut pass = Pass::default();
    pass.push(0, &ids, &[]);
    let last: Vec<u32> = (ids.len() - positions..ids.len()).map(|token| token as u32).collect();
    let compute = Compute::default();
    let ours = case.run(&compute, &pass).logits(&last, &mut Workspace::new(&case.model, Saving::None));
    assert_eq!(ours.len(), expected.len());
    // NaN is the largest of all in this order.
    let differences = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let worst = differences.max_by(f32::total_cmp).unwrap();
    assert!(worst < 1e-3, "the largest difference is {worst}");
}
