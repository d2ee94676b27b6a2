//! A run that trains what the overlay's values are computed from.

use std::path::Path;

use retune_engine::Saving;
use retune_engine::compute::Compute;
use retune_engine::overlay::VirtualTokens;
use retune_engine::params::{ParamLayout, Reparameterisation};
use retune_engine::pass::Pass;
use retune_engine::row_norms::RowNorms;
use retune_engine::workspace::Workspace;
use retune_testing::{Case, checkpoint};
use retune_train::Error;
use retune_train::data::Example;
use retune_train::run_config::{RunConfig, TrainingConfig};
use retune_train::state;
use retune_train::trainer::{
    Evaluation, Observer, Outcome, Passes, StepReport, Trained, Trainer, fill_pass, held_out_loss,
};
use serde_json::json;

const COUNT: usize = 4;
const INNER: usize = 3;

/// Stops after a number of steps.
struct StopAfter(u64, u64);

impl Observer for StopAfter {
    fn step(&mut self, report: &StepReport) -> Result<(), Error> {
        self.1 = report.step;
        Ok(())
    }

    fn evaluation(&mut self, _: &Evaluation) -> Result<(), Error> {
        Ok(())
    }

    fn interrupted(&self) -> bool {
        self.1 == self.0
    }
}

/// The values themselves.
struct Identity(ParamLayout);

impl Reparameterisation for Identity {
    fn layout(&self) -> &ParamLayout {
        &self.0
    }

    fn forward(&self, latent: &[f32], flat: &mut [f32]) {
        flat.copy_from_slice(latent);
    }

    fn backward(&self, _: &[f32], flat_gradient: &[f32], latent_gradient: &mut [f32]) {
        latent_gradient.iter_mut().zip(flat_gradient).for_each(|(to, from)| *to += from);
    }
}

/// Rows `z·W` of factors z `[count, inner]` and W `[inner, D]`.
struct Product {
    layout: ParamLayout,
    d: usize,
}

impl Product {
    fn new(d: usize) -> Self {
        let mut layout = ParamLayout::default();
        layout.add("z".to_owned(), vec![COUNT, INNER], None);
        layout.add("w".to_owned(), vec![INNER, d], None);
        Self { layout, d }
    }

    fn places(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let d = self.d;
        (0..COUNT * INNER * d).map(move |at| {
            let (i, k, j) = (at / (INNER * d), at / d % INNER, at % d);
            (i * d + j, i * INNER + k, COUNT * INNER + k * d + j)
        })
    }
}

impl Reparameterisation for Product {
    fn layout(&self) -> &ParamLayout {
        &self.layout
    }

    fn forward(&self, latent: &[f32], flat: &mut [f32]) {
        flat.fill(0.0);
        self.places().for_each(|(to, z, w)| flat[to] += latent[z] * latent[w]);
    }

    fn backward(&self, latent: &[f32], flat_gradient: &[f32], latent_gradient: &mut [f32]) {
        for (from, z, w) in self.places() {
            latent_gradient[z] += flat_gradient[from] * latent[w];
            latent_gradient[w] += flat_gradient[from] * latent[z];
        }
    }
}

fn examples(rows: std::ops::Range<usize>) -> Vec<Example> {
    let ids = |row: usize| (0..8).map(|i| ((7 * row + 11 * i) % 80) as u32).collect();
    rows.map(|row| Example { row, source: vec![], ids: ids(row), trained: (0..8).map(|i| i > 0).collect() }).collect()
}

fn config() -> TrainingConfig {
    let run = json!({
        "model": "base", "output_dir": "out", "data": { "train": "train.jsonl", "max_length": 16 },
        "training": { "batch_size": 2, "epochs": 2, "save_steps": 100, "save_total_limit": 9, "learning_rate": 0.1, "max_grad_norm": 0.0 },
    });
    RunConfig::parse(&run.to_string(), "the run", &[]).unwrap().training
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| 0.1 * ((i * 37 % 19) as f32 - 9.0)).collect()
}

/// A model with virtual tokens.
fn case() -> Case {
    let mut case = Case::bare("llama_tied", checkpoint("llama_tied"));
    let d = case.model.spec.hidden_size;
    let rows = case.overlay.layout.add("virtual tokens".to_owned(), vec![COUNT, d], None);
    case.overlay.virtual_tokens = Some(VirtualTokens { rows, count: COUNT });
    case.params = numbers(COUNT * d);
    case
}

/// The files of a folder, by their names.
fn tree(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let paths = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn values_computed_from_themselves_are_trained_as_they_are() {
    let (case, config, train, eval) = (case(), config(), examples(0..4), examples(10..12));
    let compute = Compute::default();
    let trained = Trained { model: &case.model, overlay: &case.overlay, compute: &compute };
    let passes = Passes::resolve(&config, &case.model, &case.overlay, false, 8);
    let new = || Trainer::new(trained, &config, passes, true, &train, &eval, case.params.clone());
    let identity = Identity(case.overlay.layout.clone());
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for (mut trainer, folder) in [new(), new().through(&identity, case.params.clone())].into_iter().zip(&folders) {
        assert_eq!(trainer.run(folder.path(), &mut StopAfter(0, 1)).unwrap(), Outcome::Finished);
        assert_ne!(trainer.params, case.params);
        assert_eq!(trainer.flat(), trainer.params);
    }
    let [direct, through] = folders.map(|folder| tree(folder.path()));
    assert!(direct.len() == 2 && direct == through, "checkpoints differ");
}

#[test]
fn what_is_trained_saved_and_taken_up_is_what_the_values_are_computed_from() {
    let (case, config, train, eval) = (case(), config(), examples(0..4), examples(10..12));
    let map = Product::new(case.model.spec.hidden_size);
    let compute = Compute::default();
    let trained = Trained { model: &case.model, overlay: &case.overlay, compute: &compute };
    let passes = Passes::resolve(&config, &case.model, &case.overlay, false, 8);
    let first = numbers(map.layout.len());
    let new = || {
        Trainer::new(trained, &config, passes, false, &train, &eval, case.params.clone()).through(&map, first.clone())
    };

    let norms = RowNorms::default();
    let mut flat = vec![0.0; case.params.len()];
    map.forward(&first, &mut flat);
    let mut trainer = new();
    assert_eq!(trainer.flat(), flat);
    // Held-out rows are scored with the values computed from it.
    let mut pass = Pass::new(case.overlay.prelude(&case.model.spec), false);
    let mut workspace = Workspace::new(&case.model, Saving::None);
    let scored = held_out_loss(trained, &flat, &eval, 100, &mut pass, &mut workspace, |_| true).unwrap();
    let evaluation = trainer.score_untrained(&StopAfter(9, 0)).unwrap().unwrap();
    assert!((evaluation.loss - scored.0 / scored.1 as f64).abs() < 1e-6);

    // The gradient is that of the latent vector, by the chain rule.
    fill_pass(&mut pass, &train, &[0, 1], 0, 100);
    let run = trained.run(&flat, &norms, &pass);
    let (mut gradient, mut latent_gradient) = (vec![0.0; flat.len()], vec![0.0; first.len()]);
    run.loss_and_gradient(&mut gradient, &mut Workspace::new(&case.model, Saving::Full));
    map.backward(&first, &gradient, &mut latent_gradient);
    let norm = latent_gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt() / pass.labels.len() as f64;
    let report = trainer.step().unwrap();
    assert!((report.gradient_norm - norm).abs() < 1e-5 * norm, "{} and {norm}", report.gradient_norm);
    map.forward(&trainer.params, &mut flat);
    assert_eq!(trainer.flat(), flat, "values are of the parameters before the step");
    // A second step's gradient is its own.
    fill_pass(&mut pass, &train, &[2, 3], 0, 100);
    let (mut gradient, mut latent_gradient) = (vec![0.0; flat.len()], vec![0.0; first.len()]);
    trained.run(&flat, &norms, &pass).loss_and_gradient(&mut gradient, &mut Workspace::new(&case.model, Saving::Full));
    map.backward(&trainer.params, &gradient, &mut latent_gradient);
    let norm = latent_gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt() / pass.labels.len() as f64;
    let report = trainer.step().unwrap();
    assert!((report.gradient_norm - norm).abs() < 1e-5 * norm, "{} and {norm}", report.gradient_norm);

    // A run that is stopped and taken up ends as one that was left alone.
    let [alone, folder] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut undisturbed = new();
    undisturbed.run(alone.path(), &mut StopAfter(0, 1)).unwrap();
    let outcome = new().run(folder.path(), &mut StopAfter(2, 0)).unwrap();
    assert_eq!(outcome, Outcome::Interrupted { step: 2 });
    let mut resumed = new();
    resumed.resume(&state::list(folder.path()).unwrap()[0]).unwrap();
    assert_eq!(resumed.run(folder.path(), &mut StopAfter(0, 1)).unwrap(), Outcome::Finished);
    assert_eq!(resumed.params, undisturbed.params);
    assert_eq!(resumed.flat(), undisturbed.flat());
    // What scored best is kept as it was trained.
    let mut best = vec![0.0; first.len()];
    state::read_best(folder.path(), resumed.progress.best_step, &mut best).unwrap();
    assert!(best.iter().any(|&v| v != 0.0));
}
