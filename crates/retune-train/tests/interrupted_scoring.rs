//! A run that is stopped while held-out rows are scored saves what it did, and goes on to the bytes of a run that was left alone.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;

use retune_adapter::{LoraConfig, Method, Texts, initial_params};
use retune_engine::compute::Compute;
use retune_model::checkpoint::Checkpoint;
use retune_train::Error;
use retune_train::data::Example;
use retune_train::run_config::{RunConfig, TrainingConfig};
use retune_train::state;
use retune_train::trainer::{Evaluation, Observer, Outcome, Passes, StepReport, Trained, Trainer};
use serde_json::json;

/// Says to stop when it has been asked so often.
struct Impatient {
    asked: Cell<usize>,
    limit: usize,
    steps: Vec<u64>,
    evaluations: Vec<(u64, f64)>,
}

impl Impatient {
    fn new(limit: usize) -> Self {
        Self { asked: Cell::new(0), limit, steps: Vec::new(), evaluations: Vec::new() }
    }
}

impl Observer for Impatient {
    fn step(&mut self, report: &StepReport) -> Result<(), Error> {
        self.steps.push(report.step);
        Ok(())
    }

    fn evaluation(&mut self, evaluation: &Evaluation) -> Result<(), Error> {
        self.evaluations.push((evaluation.step, evaluation.loss));
        Ok(())
    }

    fn interrupted(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.asked.get() > self.limit
    }
}

fn examples(rows: std::ops::Range<usize>) -> Vec<Example> {
    let ids = |row: usize| (0..8).map(|i| ((7 * row + 11 * i) % 80) as u32).collect();
    rows.map(|row| Example { row, source: vec![], ids: ids(row), trained: (0..8).map(|i| i > 0).collect() }).collect()
}

fn config() -> TrainingConfig {
    let run = json!({
        "model": "base", "output_dir": "out", "data": { "train": "train.jsonl", "max_length": 16 },
        "training": { "batch_size": 2, "eval_steps": 1, "save_steps": 100, "save_total_limit": 9, "learning_rate": 0.01 },
    });
    RunConfig::parse(&run.to_string(), "the run", &[]).unwrap().training
}

/// The files of a folder.
fn tree(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap()))
        .collect()
}

#[test]
fn a_run_stopped_anywhere_in_scoring_ends_with_the_same_bytes() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../retune-model/tests/goldens");
    let checkpoint = Checkpoint::open(&goldens.join("llama_tied")).unwrap();
    let model = checkpoint.model().unwrap();
    let adapter = LoraConfig { r: 4, ..LoraConfig::default() };
    let mut overlay = adapter.lower(&checkpoint.spec, true).unwrap();
    let texts = Texts { tokenize: &|_| unreachable!(), keys_and_values: &|_| unreachable!() };
    let first = initial_params(&adapter, &checkpoint.spec, &mut overlay, &checkpoint, &texts, 0).unwrap();
    let compute = Compute::default();
    let trained = Trained { model: &model, overlay: &overlay, compute: &compute };
    let (config, train, eval) = (config(), examples(0..4), examples(10..14));
    // Two steps, after each of which the held-out rows are scored in two passes.
    let passes = Passes { tokens: 16, ..Passes::resolve(&config, &model, &overlay, false, 8) };
    let new = || Trainer::new(trained, &config, passes, false, &train, &eval, first.clone());

    let alone = tempfile::tempdir().unwrap();
    let mut undisturbed = Impatient::new(usize::MAX);
    let mut trainer = new();
    assert_eq!(trainer.run(alone.path(), &mut undisturbed).unwrap(), Outcome::Finished);
    let expected = (trainer.params.clone(), trainer.progress.clone());
    // Before each of two passes and after the step, for each of two steps.
    assert_eq!(undisturbed.asked.get(), 6);

    for limit in 0..6 {
        let folder = tempfile::tempdir().unwrap();
        let mut observer = Impatient::new(limit);
        let mut trainer = new();
        let outcome = trainer.run(folder.path(), &mut observer).unwrap();
        let step = 1 + limit as u64 / 3;
        if limit == 5 {
            assert_eq!(outcome, Outcome::Finished, "after the last step there is nothing left to do");
            continue;
        }
        assert_eq!(outcome, Outcome::Interrupted { step }, "after {limit} questions");
        assert_eq!(trainer.progress.owes_score, limit % 3 < 2, "after {limit} questions");
        assert_eq!(observer.asked.get(), limit + 1, "nothing is computed any more");

        let saved = state::list(folder.path()).unwrap();
        let mut resumed = new();
        resumed.resume(saved.last().unwrap()).unwrap();
        let mut later = Impatient::new(usize::MAX);
        assert_eq!(resumed.run(folder.path(), &mut later).unwrap(), Outcome::Finished);
        assert_eq!((&resumed.params, &resumed.progress), (&expected.0, &expected.1), "after {limit} questions");
        let steps = [observer.steps, later.steps].concat();
        assert_eq!(
            (steps, [observer.evaluations, later.evaluations].concat()),
            (undisturbed.steps.clone(), undisturbed.evaluations.clone())
        );
        let (found, expected) = (tree(folder.path()), tree(alone.path()));
        for (name, bytes) in &expected {
            assert!(found.get(name) == Some(bytes), "{name} differs after {limit} questions");
        }
    }

    let mut trainer = new();
    assert_eq!(trainer.score_untrained(&Impatient::new(1)).unwrap(), None);
    assert_eq!(trainer.progress.initial_loss, None);
    assert!(trainer.score_untrained(&Impatient::new(2)).unwrap().is_some());
    assert!(trainer.progress.initial_loss.is_some());
}
