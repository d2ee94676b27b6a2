//! The model's logits, loss and every gradient against transformers and peft, on small random models of every family.
//!
//! `goldens/make_llama.py`, `make_families.py`, `make_t5.py`, `make_methods.py`, `make_gguf.py` and `make_families_gguf.py` make the fixtures; a
//! folder is a case.
//! "Relative" is ‖ours − theirs‖ / ‖theirs‖ per tensor.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use retune_adapter::{AdapterFile, BaseModules, METHODS};
use retune_engine::compute::Compute;
use retune_engine::generate::{Generation, Sampling};
use retune_engine::overlay::LowRank;
use retune_engine::params::ParamLayout;
use retune_engine::pass::Pass;
use retune_engine::workspace::Workspace;
use retune_engine::{Run, Saving, Step};
use retune_model::checkpoint::{Checkpoint, CheckpointKind};
use retune_model::families::FAMILIES;
use retune_testing::{Case, goldens, relative};
use safetensors::SafeTensors;

/// The largest relative error of a logit, a loss or a gradient.
const TOLERANCE: f64 = 1e-4;

/// The folders of goldens that hold what a reference computed: all but those that other tests read.
fn cases() -> Vec<String> {
    let mut cases: Vec<String> = fs::read_dir(goldens())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("golden.safetensors").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("bnb_"))
        .filter(|name| !STARTS_FROM_WEIGHTS.contains(&name.as_str()))
        .collect();
    cases.sort();
    cases
}

/// Adapters on a base that their start has changed: they are read by a test of their own.
const STARTS_FROM_WEIGHTS: [&str; 4] = ["lora_olora", "lora_pissa", "lora_pissa_niter_4", "lora_pissa_rs"];

fn is_gguf(case: &str) -> bool {
    goldens().join(case).join("model.gguf").exists()
}

fn is_adapter(case: &str) -> bool {
    goldens().join(case).join("adapter").exists()
}

/// The largest errors of a case.
#[derive(Clone, Copy, Debug, Default)]
struct Errors {
    logits: f64,
    loss: f64,
    gradients: f64,
    tensors: usize,
}

impl Errors {
    fn max(self, other: Self) -> Self {
        Self {
            logits: self.logits.max(other.logits),
            loss: self.loss.max(other.loss),
            gradients: self.gradients.max(other.gradients),
            tensors: self.tensors.max(other.tensors),
        }
    }
}

/// Runs a case's rows in one pass or each in one of its own, and measures everything that its golden holds.
fn measure(case: &Case, packed: bool, saving: Saving) -> Errors {
    let (golden, compute) = (case.golden(), Compute::default());
    let name = format!("{} (packed {packed}, {saving:?})", case.name);
    let mut workspace = Workspace::new(&case.model, saving);
    let mut grads = vec![0.0; case.params.len()];
    let (mut loss, mut labels, mut logits) = (0.0, 0, Vec::new());
    for pass in golden.passes(packed) {
        // The reference has no logits of virtual tokens.
        let vocabulary = case.model.spec.vocab_size;
        let all: Vec<u32> =
            (0..pass.tokens() as u32).filter(|&t| (pass.ids[t as usize] as usize) < vocabulary).collect();
        let run = case.run(&compute, &pass);
        logits.extend(run.logits(&all, &mut workspace));
        let sum = run.loss(&mut workspace);
        if !case.params.is_empty() {
            let again = run.loss_and_gradient(&mut grads, &mut workspace);
            assert_eq!(sum, again, "{name}: the loss with and without gradient");
        }
        loss += sum;
        labels += pass.labels.len();
    }
    let mut errors = Errors {
        logits: relative(&logits, &golden.tensors["logits"].1),
        loss: (loss / labels as f64 - golden.loss()).abs() / golden.loss(),
        ..Errors::default()
    };
    grads.iter_mut().for_each(|g| *g /= labels as f32);
    let ours = retune_adapter::tensors_of(&case.overlay, &grads);
    let mut worst = String::new();
    for (tensor, (shape, expected)) in golden.gradients() {
        let (our_shape, gradient) = ours.get(tensor).unwrap_or_else(|| panic!("{name}: {tensor} is not trained"));
        assert_eq!(our_shape, shape, "{name}: {tensor}");
        let error = relative(gradient, expected);
        if error > errors.gradients {
            (errors.gradients, worst) = (error, tensor.to_owned());
        }
        errors.tensors += 1;
    }
    assert_eq!(errors.tensors, ours.len(), "{name}: number of trained tensors");
    assert!(errors.logits < TOLERANCE, "{name}: logits {}", errors.logits);
    assert!(errors.loss < TOLERANCE, "{name}: loss {}", errors.loss);
    assert!(errors.gradients < TOLERANCE, "{name}: gradient of {worst} {}", errors.gradients);
    errors
}

#[test]
fn logits_loss_and_every_gradient_equal_transformers_and_peft() {
    // What each family gave, from a directory and from a GGUF file, trained whole and with LoRA.
    let mut table: BTreeMap<(String, &str, &str), Errors> = BTreeMap::new();
    for name in cases() {
        let case = if is_gguf(&name) { Case::base(&name) } else { Case::load(&name) };
        let mut errors = Errors::default();
        for (packed, saving) in [(true, Saving::Full), (false, Saving::Full), (true, Saving::BlockInputs)] {
            errors = errors.max(measure(&case, packed, saving));
        }
        let format = if is_gguf(&name) { "gguf" } else { "directory" };
        let method = match format {
            "gguf" => "base",
            _ if is_adapter(&name) => {
                AdapterFile::read(&goldens().join(&name).join("adapter")).unwrap().method.info().name
            }
            _ => "full",
        };
        let family = case.checkpoint.spec.family.to_owned();
        let of_table = table.entry((family, format, method)).or_default();
        *of_table = of_table.max(errors);
        println!(
            "{name:32} {:.1e} logits, {:.1e} loss, {:.1e} gradients",
            errors.logits, errors.loss, errors.gradients
        );
    }
    println!("{:12} {:10} {:14} {:>8} {:>8} {:>9}", "family", "format", "what", "logits", "loss", "gradients");
    for ((family, format, method), e) in &table {
        println!("{family:12} {format:10} {method:14} {:8.1e} {:8.1e} {:9.1e}", e.logits, e.loss, e.gradients);
    }
    for family in FAMILIES {
        for model_type in family.model_types {
            for (format, method) in [("directory", "full"), ("directory", "lora"), ("gguf", "base")] {
                // llama.cpp's converter knows no Ministral, and writes a Mistral as a Llama.
                if format == "gguf" && (family.gguf.is_none() || *model_type == "mistral") {
                    continue;
                }
                let name = (*model_type).to_owned();
                let found = table.keys().any(|(f, g, m)| *f == name && (*g, *m) == (format, method));
                assert!(found, "{model_type} has no golden: {format}, {method}");
            }
        }
    }
}

/// What is trained of a model has the gradients that it has where all is trained, and nothing else is.
#[test]
fn parts_of_a_model_have_the_gradients_of_the_whole() {
    let names = |tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>, keep: &dyn Fn(&str, &[usize]) -> bool| {
        let kept = tensors.iter().filter(|(name, (shape, _))| keep(name, shape));
        kept.map(|(name, _)| name.clone()).collect::<Vec<String>>()
    };
    let is_bias = |name: &str, _: &[usize]| name.ends_with(".bias");
    let in_last = |name: &str, _: &[usize]| name.contains("layers.1.") || name.contains("h.1.");
    type Keep<'a> = &'a dyn Fn(&str, &[usize]) -> bool;
    let cases: [(&str, serde_json::Value, Keep<'_>); 9] = [
        ("llama_bias", serde_json::json!({"biases": true}), &is_bias),
        ("gpt2", serde_json::json!({"biases": true}), &is_bias),
        ("llama_tied", serde_json::json!({"norms": true}), &|_, shape| shape.len() == 1),
        ("gemma3", serde_json::json!({"norms": true}), &|_, shape| shape.len() == 1),
        ("gpt2", serde_json::json!({"last_layers": 1}), &in_last),
        ("llama_tied", serde_json::json!({"last_layers": 1, "modules": ["embed_tokens"]}), &|name, shape| {
            in_last(name, shape) || name.contains("embed_tokens")
        }),
        ("llama_untied_mha", serde_json::json!({"modules": ".*(down_proj|lm_head)"}), &|name, _| {
            name.contains("down_proj") || name.contains("lm_head")
        }),
        ("t5", serde_json::json!({"last_layers": 1}), &|name, _| name.contains("decoder.block.2.")),
        ("flan_t5", serde_json::json!({"last_layers": 1}), &|name, _| name.contains("decoder.block.")),
    ];
    for (name, settings, keep) in cases {
        let method = (retune_adapter::by_name("partial").unwrap().read)(settings.clone()).unwrap();
        method.check().unwrap();
        let whole = Case::load(name);
        let part = Case::with_method(name, Checkpoint::open(&goldens().join(name)).unwrap(), &*method);
        let compute = Compute::default();
        let gradients = |case: &Case| {
            let gradient = case.gradient(&compute, Saving::Full, &case.golden().passes(true)).1;
            retune_adapter::tensors_of(&case.overlay, &gradient)
        };
        let (all, some) = (gradients(&whole), gradients(&part));
        assert_eq!(some.keys().cloned().collect::<Vec<_>>(), names(&all, keep), "{name} {settings}");
        for (tensor, (_, gradient)) in &some {
            assert!(relative(gradient, &all[tensor].1) < 1e-6, "{name} {settings}: {tensor}");
        }
        assert!(!some.is_empty() && some.len() < all.len(), "{name} {settings}");
    }
}

/// The tensors of an adapter that peft wrote, in the order of a layout.
fn params_of(layout: &ParamLayout, file: &Path) -> Vec<f32> {
    let content = fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&content).unwrap();
    let values = |name: &str| file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec();
    let bytes = layout.params().iter().flat_map(|param| values(&param.name)).collect::<Vec<u8>>();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// s·B·A of each linear that has a trained pair.
fn products(case: &Case, params: &[f32]) -> Vec<Vec<f32>> {
    let pairs = case.overlay.linears.iter().filter_map(|change| change.low_rank.first());
    let product = |term: &LowRank| {
        let (a, b) = (term.a.values(params), term.b.values(params));
        let cols = a.len() / term.r;
        let at = |i: usize, j: usize| (0..term.r).map(|k| b[i * term.r + k] * a[k * cols + j]).sum::<f32>();
        (0..b.len() / term.r).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| term.scale * at(i, j)).collect()
    };
    pairs.map(product).collect()
}

#[test]
fn adapters_that_start_from_the_weights_are_pefts() {
    for name in STARTS_FROM_WEIGHTS {
        let dir = goldens().join(name);
        let written: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("adapter/adapter_config.json")).unwrap()).unwrap();
        let keys = ["r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights"];
        let settings: serde_json::Map<_, _> =
            keys.iter().map(|key| ((*key).to_owned(), written[*key].clone())).collect();
        let method = (retune_adapter::by_name("lora").unwrap().read)(settings.into()).unwrap();
        let base = fs::read_to_string(dir.join("base.txt")).unwrap();
        let base = || Checkpoint::open(&goldens().join(base.trim())).unwrap();

        let ours = Case::with_method(name, base(), &*method);
        let layout = &ours.overlay.layout;
        let first = params_of(layout, &dir.join("start/adapter_model.safetensors"));
        let trained = params_of(layout, &dir.join("adapter/adapter_model.safetensors"));
        // The start: B·A is the same, whatever the signs of its rows, and the model is the base.
        let is_random = name.contains("niter");
        for (ours, theirs) in products(&ours, &ours.params).iter().zip(products(&ours, &first)) {
            // Two random subspaces of a matrix whose singular values are near each other have nothing in common but their size.
            let size = |of: &[f32]| of.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let (error, share) = (relative(ours, &theirs), size(ours) / size(&theirs));
            let is_near = if is_random { (0.9..1.1).contains(&share) } else { error < TOLERANCE };
            assert!(is_near, "{name}: the start is {error} away, {share} as large");
        }
        let compute = Compute::default();
        let pass = ours.golden_pass();
        let untouched = Case::bare(name, base()).logits(&compute, &pass);
        assert!(relative(&ours.logits(&compute, &pass), &untouched) < 1e-5, "{name}: the start changes the model");

        // What is trained, from peft's start.
        let case = Case::with_start(name, base(), &*method, &first, trained);
        let errors = measure(&case, true, Saving::Full);
        println!(
            "{name:32} {:.1e} logits, {:.1e} loss, {:.1e} gradients",
            errors.logits, errors.loss, errors.gradients
        );

        // What is saved is plain LoRA of twice the rank, as peft converts it.
        let saved = AdapterFile::of(&method, None, &case.overlay, &case.params);
        let converted = AdapterFile::read(&dir.join("converted")).unwrap();
        assert_eq!(saved.tensors.keys().collect::<Vec<_>>(), converted.tensors.keys().collect::<Vec<_>>());
        for (tensor, (shape, values)) in &saved.tensors {
            let (their_shape, theirs) = &converted.tensors[tensor];
            assert!(shape == their_shape && relative(values, theirs) < 1e-6, "{name}: {tensor}");
        }
        let (ours, theirs) = (saved.method.settings().unwrap(), converted.method.settings().unwrap());
        for key in ["r", "use_rslora", "init_lora_weights"] {
            assert_eq!(ours[key], theirs[key], "{name}: {key}");
        }
        let alphas = [&ours, &theirs].map(|settings| settings["lora_alpha"].as_f64().unwrap());
        assert!((alphas[0] - alphas[1]).abs() < 1e-12, "{name}: {alphas:?}");
        let as_saved = Case::with_adapter(name, base(), &saved).logits(&compute, &pass);
        assert!(relative(&as_saved, &case.golden().tensors["logits"].1) < TOLERANCE, "{name}: saved");
    }
}

/// An adapter that is read and written again says the same as peft's own files.
#[test]
fn adapters_of_peft_go_out_as_they_came_in() {
    for name in ["miss_mini", "miss_biases", "miss_random", "dora_embeddings", "gpt2_dora_embeddings"] {
        let (theirs, out) = (goldens().join(name).join("adapter"), tempfile::tempdir().unwrap());
        let file = AdapterFile::read(&theirs).unwrap();
        let case = Case::load(name);
        file.write(out.path(), &BaseModules::of(&case.checkpoint.spec)).unwrap();
        let config = |dir: &Path| -> serde_json::Value {
            serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (written, theirs_config) = (config(out.path()), config(&theirs));
        for key in ["peft_type", "r", "bias", "mini_r", "use_dora"] {
            let said = |config: &serde_json::Value| config.get(key).filter(|value| !value.is_null()).cloned();
            if let Some(written) = said(&written) {
                assert_eq!(Some(written), said(&theirs_config), "{name}: {key}");
            }
        }
        // How a factor that is there already began is of no effect.
        let is_mini = |config: &serde_json::Value| config["init_weights"] == "mini";
        assert_eq!(is_mini(&written), is_mini(&theirs_config), "{name}");
        let weights = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let (ours, theirs) = (weights(out.path()), weights(&theirs));
        let [ours, theirs] = [&ours, &theirs].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        let mut names = [ours.names(), theirs.names()];
        names.iter_mut().for_each(|names| names.sort());
        assert_eq!(names[0], names[1], "{name}");
        for tensor in &names[0] {
            let [ours, theirs] = [&ours, &theirs].map(|file| file.tensor(tensor).unwrap());
            assert_eq!((ours.shape(), ours.data()), (theirs.shape(), theirs.data()), "{name}: {tensor}");
        }
    }
}

#[test]
fn the_networks_behind_soft_prompts_are_pefts() {
    let mut count = 0;
    for name in cases() {
        let dir = goldens().join(&name);
        let (Ok(latent), Ok(expected)) =
            (fs::read(dir.join("latent.safetensors")), fs::read(dir.join("latent_gradients.safetensors")))
        else {
            continue;
        };
        let case = Case::load(&name);
        let adapter = AdapterFile::read(&dir.join("adapter")).unwrap();
        if adapter.method.check_trainable(&case.checkpoint.spec).is_err() {
            continue; // an LSTM
        }
        let (map, _) = adapter.method.reparameterisation(&case.checkpoint.spec, 0).unwrap();
        let (latent, expected) =
            (SafeTensors::deserialize(&latent).unwrap(), SafeTensors::deserialize(&expected).unwrap());
        let values = |file: &SafeTensors, name: &str, shape: &[usize]| -> Vec<f32> {
            let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(tensor.shape(), shape, "{name}");
            tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        let params = map.layout().params();
        let start: Vec<f32> = params.iter().flat_map(|param| values(&latent, &param.name, &param.shape)).collect();
        let mut rows = vec![0.0; case.params.len()];
        map.forward(&start, &mut rows);
        let error = relative(&rows, &case.params);
        assert!(error < TOLERANCE, "{name}: rows {error}");
        let mut gradients = vec![0.0; start.len()];
        map.backward(&start, &case.golden().tensors["grad.prompt_embeddings"].1, &mut gradients);
        for param in params {
            let error = relative(&gradients[param.range.clone()], &values(&expected, &param.name, &param.shape));
            assert!(error < TOLERANCE, "{name}: gradient of {} {error}", param.name);
        }
        count += 1;
    }
    assert!(count >= 8, "{count} networks");
}

#[test]
fn greedy_generation_equals_transformers() {
    let mut count = 0;
    for name in cases() {
        if is_gguf(&name) || is_adapter(&name) {
            continue;
        }
        let case = Case::base(&name);
        let golden = case.golden();
        let (Some(prompt), Some(expected)) = (golden.integers.get("prompt"), golden.integers.get("generated")) else {
            continue;
        };
        let ids = |values: &[i64]| values.iter().map(|&id| id as u32).collect::<Vec<u32>>();
        let mut generation = Generation::new(&case.model, &case.overlay, &case.params, Sampling::GREEDY);
        let generated = generation.run(&ids(prompt), expected.len(), &[], |_| true);
        assert_eq!(generated, ids(expected), "{name}");
        count += 1;
    }
    assert!(count >= FAMILIES.len() - 2, "{count} models generated");
}

#[test]
fn answers_to_fifty_sources_equal_those_of_transformers() {
    for name in ["t5", "flan_t5", "flan_t5_wide"] {
        let case = Case::base(name);
        let golden = case.golden();
        let sources = golden.rows("more_sources", "more_lengths");
        let mut generation = Generation::new(&case.model, &case.overlay, &case.params, Sampling::GREEDY);
        for (source, expected) in sources.iter().zip(golden.integers["more_answers"].chunks_exact(8)) {
            let expected: Vec<u32> = expected.iter().map(|&id| id as u32).collect();
            assert_eq!(generation.run(source, expected.len(), &[], |_| true), expected, "{name} {source:?}");
        }
        assert_eq!(sources.len(), 50);
    }
}

#[test]
fn generation_with_a_cache_equals_running_the_whole_text() {
    for name in ["llama_tied", "mistral_window", "lora_all_linear", "gemma3", "bloom_lora_two"] {
        let case = Case::load(name);
        let prompt = [5, 9, 33, 2, 71, 8, 8, 40];
        let mut generation = Generation::new(&case.model, &case.overlay, &case.params, Sampling::GREEDY);
        let generated = generation.run(&prompt, 6, &[], |_| true);
        let mut text = prompt.to_vec();
        let mut workspace = Workspace::new(&case.model, Saving::None);
        for &token in &generated {
            let mut pass = Pass::default();
            pass.push(0, &text, &[]);
            let compute = Compute::default();
            let logits = case.run(&compute, &pass).logits(&[text.len() as u32 - 1], &mut workspace);
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            assert_eq!(best as u32, token, "{name}");
            text.push(token);
        }
        assert_eq!(generated.len(), 6);
    }
}

#[test]
fn old_and_new_spellings_of_rope_scaling_are_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let case = goldens().join("rope_linear");
    fs::copy(case.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    fs::copy(case.join("config_old.json"), dir.path().join("config.json")).unwrap();
    let (old, new) = (Checkpoint::open(dir.path()).unwrap(), Checkpoint::open(&case).unwrap());
    assert_eq!(old.spec.ropes, new.spec.ropes);
}

/// What a row gives must not depend on how rows are packed into passes, dropout included.
#[test]
fn dropout_is_the_same_however_rows_are_packed() {
    let mut case = Case::load("lora_all_linear");
    let golden = case.golden();
    let run = |case: &Case, packed: bool, saving: Saving| {
        let compute = Compute::default();
        let mut workspace = Workspace::new(&case.model, saving);
        let mut grads = vec![0.0; case.params.len()];
        let mut loss = 0.0;
        for pass in golden.passes(packed) {
            let run = Run { step: Some(Step { seed: 3, step: 5 }), ..case.run(&compute, &pass) };
            loss += run.loss_and_gradient(&mut grads, &mut workspace);
        }
        (loss, grads)
    };
    let without = run(&case, true, Saving::Full);
    for change in &mut case.overlay.linears {
        change.low_rank.iter_mut().for_each(|term| term.dropout = 0.3);
    }
    let (loss, grads) = run(&case, true, Saving::Full);
    assert!((loss - without.0).abs() > 1e-3, "dropout changes nothing");
    for (packed, saving) in [(false, Saving::Full), (true, Saving::BlockInputs)] {
        let (other, other_grads) = run(&case, packed, saving);
        assert!((loss - other).abs() < 1e-5 * loss, "{loss} and {other}");
        assert!(relative(&other_grads, &grads) < 1e-5);
    }
}

#[test]
fn every_family_and_method_is_known_by_its_name() {
    for family in FAMILIES {
        assert!(!family.model_types.is_empty() && family.class.ends_with(char::is_alphabetic));
        for model_type in family.model_types {
            let same = FAMILIES.iter().filter(|other| other.model_types.contains(model_type)).count();
            assert_eq!(same, 1, "{model_type} is of {same} families");
        }
    }
    for method in METHODS {
        assert_eq!(METHODS.iter().filter(|other| other.name == method.name).count(), 1, "{}", method.name);
    }
    let gguf = goldens().join("gguf_llama/model.gguf");
    assert_eq!(Checkpoint::open(&gguf).unwrap().kind(), CheckpointKind::Gguf);
}
