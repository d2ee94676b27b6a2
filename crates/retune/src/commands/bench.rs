//! `retune bench`: speed and memory of training steps on this machine.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use retune_adapter::{AdapterFile, BaseModules, Texts, initial_params};
use retune_engine::{Work, profile, work_of_step};
use retune_formats::safetensors::{Tensor, Values, stage};
use retune_kernels::peak;
use retune_text::tokenizer::Tokenizer;
use retune_train::data::{Example, Files, ReadOptions, read_rows};
use retune_train::run_config::{MethodName, TrainingConfig};
use retune_train::schedule::SchedulerType;
use retune_train::trainer::{Passes, Trained, Trainer};
use serde_json::{Map, Value, json};

use super::print_json;
use crate::args::{BenchCommand, BenchTrainArgs};
use crate::session::Base;
use crate::{compute, fetch, memory, storage};

/// Bytes that no cache holds.
const STREAMED: usize = 256 << 20;
/// Steps that are not counted.
const WARM_UP: usize = 3;

/// Runs the benchmark named.
pub fn run(command: &BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Train(args) => train(args),
    }
}

/// The settings of the method that the arguments ask for.
fn settings(args: &BenchTrainArgs) -> Result<Value> {
    if let Some(settings) = &args.settings {
        if args.method.schema.is_none() {
            bail!("--settings is given, but method {} has no settings: leave it out", args.method.name);
        }
        return Ok(settings.clone());
    }
    if args.method != MethodName::default() {
        if args.rank.is_some() || args.targets.is_some() {
            bail!("--rank and --targets are those of LoRA; for method {} give --settings", args.method.name);
        }
        return Ok(json!({}));
    }
    let rank = args.rank.unwrap_or(16);
    let targets = match args.targets.as_deref() {
        None | Some("all-linear") => json!("all-linear"),
        Some(names) => names.split(',').collect(),
    };
    Ok(json!({ "r": rank, "lora_alpha": 2 * rank, "target_modules": targets }))
}

fn train(args: &BenchTrainArgs) -> Result<()> {
    if args.steps <= WARM_UP || args.seq < 2 || args.batch == 0 {
        bail!("--steps must be more than {WARM_UP}, --seq at least 2, --batch at least 1");
    }
    let start = Instant::now();
    let mut base = Base::open(&fetch::resolve(&args.model)?)?;
    base.check_finite()?;
    if !args.storage.is_as_is() && !args.method.saves_adapter() {
        bail!("--storage quantizes a frozen base, and method {} trains it: leave it out", args.method.name);
    }
    if base.checkpoint.spec.encoder.is_some() {
        bail!(
            "bench measures steps on packed text, which a model with an encoder does not read; time `retune train` instead"
        );
    }
    let examples = sequences(base.tokenizer()?, &args.data, args.seq, args.batch * args.steps)?;
    storage::hold(&mut base, args.storage)?;
    let checkpoint = &base.checkpoint;
    let spec = &checkpoint.spec;
    let method =
        (args.method.read)(settings(args)?).with_context(|| format!("settings of method {}", args.method.name))?;
    method.check()?;
    let model = checkpoint.model()?;
    let mut overlay = method.lower(spec, true)?;
    let texts =
        Texts { tokenize: &|text| base.tokenize(text), keys_and_values: &|ids| Base::keys_and_values(&model, ids) };
    let params = initial_params(&*method, spec, &mut overlay, checkpoint, &texts, 0)?;
    if let Some(directory) = &args.save_inputs {
        save_inputs(directory, args, &examples)?;
        if args.method.saves_adapter() {
            let file = AdapterFile::of(&method, Some(args.model.clone()), &overlay, &params);
            file.write(&directory.join("adapter"), &BaseModules::of(spec))?;
        }
    }
    let pass = compute::calibration_pass(&overlay.prelude(spec), &examples);
    // In 8 bits the first forward is that of the calibration.
    let mut until_forward = start.elapsed().as_secs_f64();
    let (compute, choices) = match args.method.saves_adapter() {
        true => {
            let integers = compute::integers(
                &model,
                &overlay,
                args.int8_copy,
                checkpoint.held_bytes() as usize,
                memory::available(),
            );
            compute::choose(&model, &overlay, &params, args.compute, integers, &pass, true)
        }
        false => Default::default(),
    };
    checkpoint.release();
    let training = TrainingConfig {
        max_steps: Some(args.steps),
        batch_size: args.batch,
        learning_rate: Some(args.learning_rate),
        lr_scheduler_type: SchedulerType::Constant,
        warmup_steps: Some(0),
        max_grad_norm: 0.0,
        seed: 0,
        tokens_per_pass: args.tokens_per_pass,
        // Dense work: every token is computed.
        share_prefixes: false,
        ..TrainingConfig::default()
    };
    let passes = Passes::resolve(&training, &model, &overlay, compute.uses_int8(), args.seq);
    let trained = Trained { model: &model, overlay: &overlay, compute: &compute };
    let mut trainer = Trainer::new(trained, &training, passes, false, &examples, &[], params);
    let until_step = start.elapsed().as_secs_f64();
    if choices.is_empty() {
        until_forward = until_step;
    }
    let (mut losses, mut seconds) = (Vec::new(), Vec::new());
    for step in 0..args.steps {
        if step == WARM_UP {
            profile::reset();
        }
        let report = trainer.step()?;
        losses.push(report.loss);
        seconds.push(report.seconds);
    }
    let counted = &mut seconds[WARM_UP..];
    let measured: f64 = counted.iter().sum();
    let times: Vec<f64> = profile::seconds().into_iter().map(|(_, s)| s / counted.len() as f64).collect();
    let mean = measured / counted.len() as f64;
    counted.sort_by(f64::total_cmp);
    let middle = counted.len() / 2;
    let median = if counted.len() % 2 == 1 { counted[middle] } else { (counted[middle - 1] + counted[middle]) / 2.0 };
    let tokens_per_second = (args.seq * args.batch) as f64 / median;
    // Before the machine's own speed is measured, which takes memory too.
    let peak = memory::peak_resident();
    let speeds = Speeds::measure(passes.tokens * spec.hidden_size * size_of::<f32>());
    let work = work_of_step(&model, &overlay, &compute, &vec![args.seq; args.batch], passes.saving);
    let floors: Vec<Option<f64>> = work.iter().map(|(_, work)| speeds.floor(work)).collect();
    let products: Option<f64> = work.iter().map(|(_, work)| speeds.products(work)).sum();
    let roofline = products.map(|seconds| (args.seq * args.batch) as f64 / seconds);
    let operations = || work.iter().map(|(name, _)| *name).zip(times.iter().zip(&floors));
    if args.json {
        let operations: Map<String, Value> = operations()
            .map(|(name, (s, floor))| {
                (name.to_owned(), json!({ "seconds": s, "share": s / mean, "floor_seconds": floor }))
            })
            .collect();
        print_json(&json!({
            "tokens_per_second": tokens_per_second,
            "peak_rss_bytes": peak,
            "losses": losses,
            "trainable_parameters": overlay.layout.len(),
            "step_seconds": median,
            "seconds_to_first_forward": until_forward,
            "seconds_to_first_step": until_step,
            "operations": operations,
            "peak_f32_operations_per_second": speeds.f32,
            "peak_int8_operations_per_second": speeds.int8,
            "copied_bytes_per_second": speeds.copied,
            "streamed_bytes_per_second": speeds.streamed,
            "roofline_tokens_per_second": roofline,
            "tokens_per_pass": passes.tokens,
            "threads": rayon::current_num_threads(),
            "isa": retune_kernels::isa::isa().to_string(),
            "compute": compute::summary(&choices),
            "storage": args.storage,
        }))?;
        return Ok(());
    }
    outln!("{tokens_per_second:.1} tokens/s  (median of {} steps, {median:.3} s each)", counted.len());
    if let Some(line) = storage::describe(checkpoint, args.storage) {
        outln!("{line}");
    }
    for line in compute::describe(&choices) {
        outln!("{line}");
    }
    outln!("{until_forward:.2} s to the first forward, {until_step:.2} s to the first step");
    outln!("{} peak memory", peak.map_or_else(|| "unknown".to_owned(), memory::human));
    outln!("{} trainable parameters, loss {:.4} to {:.4}", overlay.layout.len(), losses[0], losses[losses.len() - 1]);
    if let Some(roofline) = roofline {
        outln!(
            "{roofline:.1} tokens/s if the products alone ran at this machine's peak: {:.0}% of that",
            100.0 * tokens_per_second / roofline
        );
    }
    outln!("  {:20} {:>10}  {:>6}  {:>10}", "operation", "seconds", "share", "floor");
    for (name, (s, floor)) in operations() {
        let floor = floor.map_or_else(|| "unknown".to_owned(), |floor| format!("{floor:.4}"));
        outln!("  {name:20} {s:10.4}  {:5.1}%  {floor:>10}", 100.0 * s / mean);
    }
    Ok(())
}

/// What this machine can do at most.
struct Speeds {
    /// Operations a second; `None` where there is nothing to measure them with.
    f32: Option<f64>,
    int8: Option<f64>,
    /// Bytes a second of copying a tensor of a pass, and of copying what no cache holds.
    copied: f64,
    streamed: f64,
}

impl Speeds {
    fn measure(tensor_bytes: usize) -> Self {
        Self {
            f32: peak::f32_operations(),
            int8: peak::int8_operations(),
            copied: peak::copied_bytes(tensor_bytes),
            streamed: peak::copied_bytes(STREAMED),
        }
    }

    /// Seconds that the products of some work take at the least.
    fn products(&self, work: &Work) -> Option<f64> {
        let at = |operations: f64, speed: Option<f64>| match speed {
            _ if operations == 0.0 => Some(0.0),
            Some(speed) => Some(operations / speed),
            None => None,
        };
        Some(at(work.f32_operations, self.f32)? + at(work.int8_operations, self.int8)?)
    }

    /// Seconds that some work takes at the least.
    fn floor(&self, work: &Work) -> Option<f64> {
        Some(self.products(work)? + work.bytes / self.copied + work.streamed_bytes / self.streamed)
    }
}

/// Real text, joined and cut into sequences with a label on every token; it starts again from the front when it is used up.
fn sequences(tokenizer: &Tokenizer, data: &Path, length: usize, count: usize) -> Result<Vec<Example>> {
    let file = read_rows(&Files::from(data), &ReadOptions::AUTO)
        .context("--data names the text to train on; run from the project's folder or give a file")?;
    let mut ids = Vec::new();
    for row in &file.rows {
        ids.extend(tokenizer.encode(&row.text.plain_text())?);
        if ids.len() >= length * count {
            break;
        }
    }
    if ids.len() < length {
        bail!("{} holds {} tokens, fewer than one sequence of {length}", data.display(), ids.len());
    }
    let mut cycle = ids.iter().copied().cycle();
    let sequence =
        |row| Example { row, source: vec![], ids: cycle.by_ref().take(length).collect(), trained: trained(length) };
    Ok((0..count).map(sequence).collect())
}

fn trained(length: usize) -> Vec<bool> {
    (0..length).map(|i| i > 0).collect()
}

/// Writes the ids of all steps as `tokens.safetensors`: `tokens` [steps, batch, seq], int64.
fn save_inputs(directory: &Path, args: &BenchTrainArgs, examples: &[Example]) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let ids: Vec<i64> = examples.iter().flat_map(|e| &e.ids).map(|&id| i64::from(id)).collect();
    let shape = [args.steps, args.batch, args.seq];
    let tokens = Tensor { name: "tokens", shape: &shape, values: Values::I64(&ids) };
    Ok(stage(&directory.join("tokens.safetensors"), &[], &[tokens])?.commit()?)
}
