//! An encoder and a decoder in training: the losses of transformers and peft, and what passes hold.

use retune_engine::compute::Compute;
use retune_engine::pass::Pass;
use retune_testing::{Case, Golden, goldens};
use retune_train::data::Example;
use retune_train::run_config::TrainingConfig;
use retune_train::schedule::SchedulerType;
use retune_train::trainer::{Passes, Trained, Trainer, fill_pass, largest_pass};

/// The rows of `t5_training`, and the losses of 20 steps over them.
fn rows() -> (Vec<Example>, Vec<f32>) {
    let golden = Golden::read_file(&goldens().join("t5_training/training.safetensors"));
    let sources = golden.rows("source_ids", "source_lengths").into_iter();
    let answers = golden.rows("input_ids", "sequence_lengths");
    let example = |(row, (source, ids)): (usize, (Vec<u32>, Vec<u32>))| Example {
        row,
        source,
        trained: vec![true; ids.len()],
        ids,
    };
    (sources.zip(answers).enumerate().map(example).collect(), golden.tensors["losses"].1.clone())
}

fn config(tokens_per_pass: Option<usize>) -> TrainingConfig {
    TrainingConfig {
        batch_size: 2,
        max_steps: Some(20),
        learning_rate: Some(0.01),
        lr_scheduler_type: SchedulerType::Constant,
        warmup_steps: Some(0),
        max_grad_norm: 0.0,
        weight_decay: 0.0,
        tokens_per_pass,
        ..TrainingConfig::default()
    }
}

#[test]
fn twenty_losses_equal_those_of_transformers_and_peft() {
    let (examples, expected) = rows();
    let longest = examples.iter().map(Example::longest).max().unwrap();
    let case = Case::load("t5_training");
    let compute = Compute::default();
    let trained = Trained { model: &case.model, overlay: &case.overlay, compute: &compute };
    // Both rows of a step in one pass, and each in one of its own.
    for tokens_per_pass in [None, Some(longest)] {
        let config = config(tokens_per_pass);
        let passes = Passes::resolve(&config, &case.model, &case.overlay, false, longest);
        assert!(!passes.share_prefixes, "no two rows answer the same source");
        let mut trainer = Trainer::new(trained, &config, passes, false, &examples, &[], case.params.clone());
        for (step, expected) in expected.iter().enumerate() {
            let loss = trainer.step().unwrap().loss;
            let error = (loss - f64::from(*expected)).abs() / f64::from(*expected);
            assert!(error < 1e-4, "step {step}: {loss} instead of {expected}");
        }
        assert_eq!(trainer.progress.step, 20);
    }
    assert_eq!(expected.len(), 20);
}

#[test]
fn both_sides_of_a_pass_are_held_to_its_tokens_and_planned_for() {
    let (examples, _) = rows();
    let case = Case::load("t5_training");
    let prelude = case.overlay.prelude(&case.model.spec);
    let config = TrainingConfig { batch_size: 8, ..config(Some(40)) };
    let longest = examples.iter().map(Example::longest).max().unwrap();
    let passes = Passes::resolve(&config, &case.model, &case.overlay, false, longest);
    let planned = largest_pass(&prelude, &config, passes, false, &examples, &[]);
    let (mut pass, mut next, mut most) = (Pass::new(prelude, true), 0, (0, 0));
    let all: Vec<usize> = (0..examples.len()).collect();
    while next < all.len() {
        let first = next;
        next = fill_pass(&mut pass, &examples, &all, next, passes.tokens);
        let (source, own) = (pass.source_tokens(), pass.tokens());
        assert!(source <= 40 && own <= 40);
        assert_eq!(source, examples[first..next].iter().map(|example| example.source.len()).sum::<usize>());
        most = (source.max(most.0), own.max(most.1));
    }
    assert!(most.0 > 24 && planned.source_tokens <= 40 && planned.source_tokens > 24, "{most:?} {planned:?}");
    // For more epochs than are looked through a bound holds.
    let many = TrainingConfig { max_steps: Some(1000), ..config };
    let bound = largest_pass(&case.overlay.prelude(&case.model.spec), &many, passes, true, &examples, &[]);
    assert!(
        bound.source_tokens >= planned.source_tokens && bound.source_tokens <= 40 && bound.tokens >= planned.tokens
    );
}
