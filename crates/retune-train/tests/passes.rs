//! How a run's rows are put into passes.

use std::convert::Infallible;

use retune_engine::Saving;
use retune_engine::compute::Compute;
use retune_engine::model::{Model, Weights};
use retune_engine::overlay::{Overlay, VirtualTokens};
use retune_engine::pass::{PassSize, Prelude};
use retune_engine::spec::ModelSpec;
use retune_quant::{Format, Matrix, SharedBytes};
use retune_testing::{Case, checkpoint};
use retune_train::data::Example;
use retune_train::run_config::{RunConfig, TrainingConfig};
use retune_train::trainer::{Passes, Trained, Trainer, largest_pass};
use serde_json::json;

#[test]
fn the_largest_pass_holds_the_fullest_of_training_and_scoring() {
    let example = |row, trained: usize| Example {
        row,
        source: vec![],
        ids: vec![1; 20],
        trained: (0..20).map(|i| i >= 20 - trained).collect(),
    };
    // Steps of three rows, passes of at most 60 tokens: rows 0 to 2, then 3 and 4.
    let train: Vec<Example> = [1, 2, 3, 9, 10].into_iter().enumerate().map(|(i, n)| example(i, n)).collect();
    let run = json!({
        "model": "base", "output_dir": "out", "adapter": {}, "data": { "train": "train.jsonl", "max_length": 60 },
        "training": { "batch_size": 3, "tokens_per_pass": 60 },
    });
    let config = RunConfig::parse(&run.to_string(), "the run", &[]).unwrap().training;
    let largest = |tokens, share_prefixes, eval: &[Example]| {
        let passes = Passes { tokens, saving: Saving::BlockInputs, share_prefixes };
        largest_pass(&Prelude::default(), &config, passes, false, &train, eval)
    };
    let size = |tokens, keys, labels, scored_labels| PassSize {
        tokens,
        keys,
        labels,
        scored_labels,
        is_shared: keys > tokens,
        source_tokens: 0,
    };
    assert_eq!(largest(60, false, &[]), size(60, 60, 19, 0));
    assert_eq!(largest(30, false, &[]), size(20, 20, 10, 0));
    // The rows are all alike: the second and third of a pass have one token of their own.
    assert_eq!(largest(30, true, &[]), size(22, 60, 19, 0));
    let eval = [example(0, 12), example(1, 11), example(2, 0), example(3, 1)];
    assert_eq!(largest(60, false, &eval), size(60, 60, 19, 23));
    // Scoring lays more than a step's rows together. What is attended to is limited too.
    let many: Vec<Example> = (0..40).map(|row| example(row, 1)).collect();
    assert_eq!(largest(60, true, &many), size(31, 4 * 60, 19, 12));
}

/// Weights of a spec that are all zero: pages that nobody touches take no memory.
struct Zeros(ModelSpec);

impl Weights for Zeros {
    type Error = Infallible;

    fn tensor(&self, name: &str) -> Result<Matrix, Infallible> {
        let tensors = self.0.tensors();
        let (_, shape) = tensors.iter().find(|(of_spec, _)| of_spec == name).unwrap();
        let (rows, cols) = if let [rows, cols] = shape[..] { (rows, cols) } else { (1, shape[0]) };
        let bytes = SharedBytes::from_vec(vec![0; 2 * rows * cols]);
        Ok(Matrix::new(Format::BF16, rows, cols, bytes).unwrap())
    }
}

/// A model of two layers whose MLPs are this wide.
fn with_intermediate_size(size: usize) -> Model {
    let mut spec = checkpoint("gguf_llama").spec;
    assert_eq!(spec.decoder.blocks.len(), 2);
    for block in &mut spec.decoder.blocks {
        let mlp = &mut block.sub_layers[1];
        mlp.inputs.iter_mut().for_each(|linear| linear.rows = size);
        mlp.output.cols = size;
    }
    Model::load(spec.clone(), &Zeros(spec)).unwrap()
}

/// Passes hold fewer tokens where what is kept of them would take more than 2 GB, but never less than the longest row.
#[test]
fn passes_are_smaller_where_activations_would_be_too_large() {
    let run = json!({
        "model": "base", "output_dir": "out", "adapter": {}, "data": { "train": "train.jsonl" },
    });
    let config = RunConfig::parse(&run.to_string(), "the run", &[]).unwrap().training;
    let tokens =
        |model: &Model, longest| Passes::resolve(&config, model, &Overlay::empty(model), false, longest).tokens;
    assert_eq!(tokens(&Case::base("gguf_llama").model, 60), 1280);
    // Two layers that keep gate and up: 1.6 MB a token.
    let wide = with_intermediate_size(100_000);
    assert_eq!((tokens(&wide, 60), tokens(&wide, 900)), (640, 900));
    assert_eq!(tokens(&with_intermediate_size(400_000), 60), 160);
}

/// A rotation that depends on the length of the row turns what rows begin with in common otherwise for each.
#[test]
fn rows_share_nothing_where_their_length_decides_the_rotation() {
    let run = json!({
        "model": "base", "output_dir": "out", "adapter": {}, "data": { "train": "train.jsonl" },
    });
    let config = RunConfig::parse(&run.to_string(), "the run", &[]).unwrap().training;
    for (name, shares) in [("phi3", true), ("phi3_longrope", false), ("llama_tied", true), ("rope_dynamic", false)] {
        let case = Case::base(name);
        let passes = Passes::resolve(&config, &case.model, &case.overlay, false, 60);
        assert_eq!(passes.share_prefixes, shares, "{name}");
    }
}

/// Where rows share what they begin with in common, steps are the same but for rounding, and tokens are those of the rows.
#[test]
fn rows_share_their_beginnings_unless_told_otherwise_or_dropped() {
    let row = |row: usize| {
        let first = |i: usize| if row.is_multiple_of(2) && i < 20 { 0 } else { 31 * row };
        let ids = (0..40).map(|i| ((first(i) + 7 * i) % 288) as u32).collect();
        Example { row, source: vec![], ids, trained: (0..40).map(|i| i > 0).collect() }
    };
    let examples: Vec<Example> = (0..6).map(row).collect();
    let run = |share: bool, dropout: f64| {
        let run = json!({
            "model": "base", "output_dir": "out", "adapter": { "r": 4, "lora_dropout": dropout },
            "data": { "train": "train.jsonl", "max_length": 60 },
            "training": { "batch_size": examples.len(), "tokens_per_pass": 400, "share_prefixes": share },
        });
        let config = RunConfig::parse(&run.to_string(), "the run", &[]).unwrap();
        let case = Case::with_method("gguf_llama", checkpoint("gguf_llama"), &*config.adapter.as_ref().unwrap().0);
        let passes = Passes::resolve(&config.training, &case.model, &case.overlay, false, 60);
        assert_eq!(passes.share_prefixes, share && dropout == 0.0);
        let size = largest_pass(&Prelude::default(), &config.training, passes, false, &examples, &[]);
        let compute = Compute::default();
        let trained = Trained { model: &case.model, overlay: &case.overlay, compute: &compute };
        let mut trainer = Trainer::new(trained, &config.training, passes, false, &examples, &[], case.params.clone());
        (trainer.step().unwrap(), size)
    };
    let ((with, shared), (without, whole)) = (run(true, 0.0), run(false, 0.0));
    assert!(shared.is_shared && shared.tokens < whole.tokens && !whole.is_shared, "{shared:?} and {whole:?}");
    assert_eq!((with.tokens, with.label_tokens), (without.tokens, without.label_tokens));
    assert!((with.loss - without.loss).abs() < 1e-5 * without.loss, "{} and {}", with.loss, without.loss);
    let (a, b) = (with.gradient_norm, without.gradient_norm);
    assert!((a - b).abs() < 1e-4 * b, "{a} and {b}");
    run(true, 0.1);
}

/// Virtual tokens come on top of the rows' own, and all rows of a pass share them; tokens that are counted are those of the rows.
#[test]
fn rows_share_virtual_tokens_and_passes_have_room_for_them() {
    let examples: Vec<Example> = (0..4)
        .map(|row| Example {
            source: vec![],
            row,
            ids: (0..30).map(|i| ((31 * row + 7 * i) % 288) as u32).collect(),
            trained: (0..30).map(|i| i > 0).collect(),
        })
        .collect();
    let mut case = Case::base("gguf_llama");
    let d = case.model.spec.hidden_size;
    let rows = case.overlay.layout.add("virtual tokens".to_owned(), vec![10, d], None);
    case.overlay.virtual_tokens = Some(VirtualTokens { rows, count: 10 });
    case.params = (0..10 * d).map(|i| 0.01 * (i % 7) as f32 - 0.03).collect();
    let run = |share: bool| {
        let run = json!({
            "model": "base", "output_dir": "out", "adapter": {}, "data": { "train": "train.jsonl", "max_length": 30 },
            "training": { "batch_size": 4, "share_prefixes": share, "tokens_per_pass": 30 },
        });
        let training = RunConfig::parse(&run.to_string(), "the run", &[]).unwrap().training;
        let passes = Passes::resolve(&training, &case.model, &case.overlay, false, 30);
        // The longest row, and what stands before it.
        assert_eq!(passes.tokens, 40);
        let passes = Passes { tokens: 130, ..passes };
        let size = largest_pass(&case.overlay.prelude(&case.model.spec), &training, passes, false, &examples, &[]);
        let compute = Compute::default();
        let trained = Trained { model: &case.model, overlay: &case.overlay, compute: &compute };
        let mut trainer = Trainer::new(trained, &training, passes, false, &examples, &[], case.params.clone());
        (trainer.step().unwrap(), size)
    };
    let ((with, shared), (without, whole)) = (run(true), run(false));
    // Ten and four times thirty; three rows in each of their own.
    assert_eq!((shared.tokens, shared.keys, shared.is_shared), (130, 160, true));
    assert_eq!((whole.tokens, whole.keys, whole.is_shared), (120, 120, false));
    for report in [with, without] {
        assert_eq!((report.tokens, report.label_tokens), (120, 4 * 29));
    }
    assert!((with.loss - without.loss).abs() < 1e-5 * without.loss, "{} and {}", with.loss, without.loss);
    let (a, b) = (with.gradient_norm, without.gradient_norm);
    assert!((a - b).abs() < 1e-4 * b, "{a} and {b}");
    // Rows are scored in passes of as many tokens as a step of training has: four rows of forty.
    let training = TrainingConfig { batch_size: 4, ..TrainingConfig::default() };
    let passes = Passes { tokens: 1000, saving: Saving::Full, share_prefixes: false };
    let held_out: Vec<Example> = examples.iter().chain(&examples).cloned().collect();
    let prelude = case.overlay.prelude(&case.model.spec);
    let size = largest_pass(&prelude, &training, passes, false, &examples, &held_out);
    assert_eq!((size.tokens, size.scored_labels), (160, 4 * 29));
}
