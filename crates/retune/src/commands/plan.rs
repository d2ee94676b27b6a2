//! `retune plan`: what ways of training a model would take of memory and disk, and which of them fit.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use retune_adapter::{AdapterFile, Full, Method, by_name};
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_model::Error;
use retune_model::checkpoint::Checkpoint;
use retune_model::export::ExportType;
use retune_model::quantize;
use retune_train::data::Example;
use retune_train::optimizer::OptimizerName;
use retune_train::run_config::{
    ActivationCheckpointing, BaseConfig, Compute, MethodName, RunConfig, Settings, Storage,
};
use serde_json::{Value, json};

use super::print_json;
use crate::args::PlanArgs;
use crate::memory::{self, human};
use crate::memory_plan::{DiskPlan, MemoryPlan, Planned, RunMemory, free_disk};
use crate::run_data::RunData;
use crate::{compute, fetch, session};

/// Rows that are assumed at most: more than any pass holds.
const ASSUMED_ROWS: usize = 1 << 12;
/// What rows and ranks are cut to at the least where nothing fits.
const LEAST_LENGTH: usize = 128;
const LEAST_RANK: u64 = 4;

/// Prints the ways, and what to change where none fits.
pub fn run(args: &PlanArgs) -> Result<()> {
    let config = RunConfig::load(&args.run.path, &args.run.overrides)?;
    if args.memory_gb.is_some_and(|memory| memory.is_nan() || memory <= 0.0) {
        bail!("--memory-gb is {}; expected above 0", args.memory_gb.unwrap_or_default());
    }
    let checkpoint = open(&fetch::resolve(&config.model)?)?;
    let rows = Rows::of(&config, &checkpoint)?;
    let room = Room {
        memory: args.memory_gb.map(|memory| (memory * 1e9) as u64).or_else(memory::available),
        disk: free_disk(&config.output_dir),
    };
    let base = Planner { checkpoint: &checkpoint, model: &checkpoint.model()?, rows: &rows, room };
    let mut ways = vec![base.way("as the run file says", config.clone(), Vec::new())?];
    for (name, config, settings) in ladder(&config)? {
        // What is quantized already is taken as it is.
        if !config.base.storage.is_as_is() && is_quantized(&checkpoint)? {
            continue;
        }
        ways.push(base.way(&name, config, settings)?);
    }
    let advice = match ways.iter().any(|way| way.fits(room)) {
        true => None,
        false => ways.iter().min_by_key(|way| way.memory.total()).map(|way| base.advice(way)).transpose()?,
    };
    let shown = Shown { config: &config, checkpoint: &checkpoint, rows: &rows, room, ways: &ways, advice };
    if args.json { print_json(&shown.json()) } else { shown.print() }
}

/// Opens a model; where its weights are not there, its configuration.
fn open(path: &Path) -> Result<Checkpoint> {
    match Checkpoint::open(path) {
        Err(Error::NotAModel { .. }) if path.join("config.json").is_file() => {
            note!("{} has no weights: they are taken to be as its config.json says", path.display());
            Ok(Checkpoint::without_weights(path)?)
        }
        opened => Ok(opened?),
    }
}

/// Whether bitsandbytes has quantized the model.
fn is_quantized(checkpoint: &Checkpoint) -> Result<bool> {
    match quantize::weights(checkpoint) {
        Ok(_) => Ok(false),
        Err(Error::QuantizedAlready { .. }) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// What there is to be had.
#[derive(Clone, Copy)]
struct Room {
    memory: Option<u64>,
    disk: Option<u64>,
}

/// The rows of a run.
struct Rows {
    train: Vec<Example>,
    eval: Vec<Example>,
    /// Why they are assumed, if they are.
    assumed: Option<String>,
}

impl Rows {
    /// Those of the run's data, or rows of the greatest length.
    fn of(config: &RunConfig, checkpoint: &Checkpoint) -> Result<Self> {
        let data = &config.data;
        let missing = data.files().find(|path| !path.exists());
        let why = match (missing, checkpoint.tokenizer()) {
            (Some(path), _) => format!("{} is not there", path.display()),
            (None, Err(error)) => format!("there is no tokenizer ({error})"),
            (None, Ok(tokenizer)) => {
                let RunData { train, eval } = RunData::load(config, &tokenizer, &checkpoint.spec)?;
                let eval = eval.map_or_else(Vec::new, |eval| eval.examples);
                return Ok(Self { train: train.examples, eval, assumed: None });
            }
        };
        let training = &config.training;
        let count = training.batch_size.saturating_mul(training.gradient_accumulation_steps).min(ASSUMED_ROWS);
        let length = data.max_length;
        let source = if checkpoint.spec.encoder.is_some() { length } else { 0 };
        // Each begins with another token, so that none shares anything with another.
        let ids = |row: usize, length: usize| -> Vec<u32> { (0..length as u32).map(|at| at + row as u32).collect() };
        let row = |row| Example { row, source: ids(row, source), ids: ids(row, length), trained: vec![true; length] };
        let train: Vec<Example> = (0..count).map(row).collect();
        let eval = if data.eval.is_some() || data.eval_fraction > 0.0 { train.clone() } else { Vec::new() };
        Ok(Self { train, eval, assumed: Some(why) })
    }

    fn longest(&self) -> usize {
        self.train.iter().chain(&self.eval).map(Example::longest).max().unwrap_or(0)
    }
}

/// A row cut to a length.
fn cut(example: &Example, length: usize) -> Example {
    let Example { row, mut source, mut ids, mut trained } = example.clone();
    source.truncate(length);
    ids.truncate(length);
    trained.truncate(length);
    Example { row, source, ids, trained }
}

/// The ways from the one that takes most to the one that takes least, with the settings that ask for them.
fn ladder(config: &RunConfig) -> Result<Vec<(String, RunConfig, Vec<String>)>> {
    let full = by_name("full").map(MethodName).ok_or_else(|| anyhow!("there is no method full"))?;
    let base = BaseConfig::default();
    let whole = RunConfig { method: full, adapter: None, adapter_init: None, base, ..config.clone() };
    let (adapter, of_method) = match config.method.saves_adapter() {
        true => (config.clone(), Vec::new()),
        false => {
            let method = MethodName::default();
            let settings = Settings((method.read)(json!({}))?);
            let export = Default::default();
            let of_export = config.export.dtype.given().map(|_| "export.dtype=auto".to_owned());
            let adapter = RunConfig { method, adapter: Some(settings), export, ..config.clone() };
            (adapter, [format!("method={}", method.name)].into_iter().chain(of_export).collect())
        }
    };
    let of_full = match config.method.saves_adapter() {
        true => {
            // What is said of a frozen base has no place beside it.
            let differs = [
                (true, "method=full"),
                (true, "adapter=null"),
                (config.adapter_init.is_some(), "adapter_init=null"),
                (!config.base.storage.is_as_is(), "base.storage=as-is"),
                (config.base.compute == Compute::Int8, "base.compute=auto"),
            ];
            differs.into_iter().filter(|(differs, _)| *differs).map(|(_, setting)| setting.to_owned()).collect()
        }
        false => Vec::new(),
    };
    let mut ways = vec![("full fine-tuning".to_owned(), whole, of_full)];
    let name = adapter.method.name;
    for (storage, over) in [(Storage::AsIs, ""), (Storage::Nf4Double, " over nf4-double")] {
        for (compute, arithmetic) in [(Compute::F32, "f32"), (Compute::Int8, "8 bits")] {
            let way = RunConfig { base: BaseConfig { compute, storage, ..config.base }, ..adapter.clone() };
            let of_base = [("compute", json!(compute)), ("storage", json!(storage))];
            let of_base = of_base.map(|(key, value)| format!("base.{key}={}", value.as_str().unwrap_or_default()));
            ways.push((format!("{name}{over}, {arithmetic}"), way, [of_method.clone(), of_base.to_vec()].concat()));
        }
    }
    Ok(ways)
}

/// A way of training, and what it takes.
struct Way {
    name: String,
    config: RunConfig,
    /// The settings that make the run file ask for it.
    settings: Vec<String>,
    memory: RunMemory,
    disk: DiskPlan,
}

impl Way {
    fn fits(&self, room: Room) -> bool {
        let within = |total: u64, room: Option<u64>| room.is_none_or(|room| total <= room);
        within(self.memory.total(), room.memory) && within(self.disk.total(), room.disk)
    }

    /// The settings as flags.
    fn flags(&self) -> String {
        self.settings.iter().map(|setting| format!(" --set {setting}")).collect()
    }
}

/// What all ways have in common.
struct Planner<'a> {
    checkpoint: &'a Checkpoint,
    model: &'a Model,
    rows: &'a Rows,
    room: Room,
}

impl Planner<'_> {
    /// What is trained, and by which method.
    fn method(&self, config: &RunConfig) -> Result<(Arc<dyn Method>, Overlay)> {
        let spec = &self.checkpoint.spec;
        if let (None, Some(directory)) = (&config.adapter, &config.adapter_init) {
            let file = AdapterFile::read(&session::find_adapter(directory)?)?;
            let overlay = file.lower_for_training(spec)?;
            return Ok((file.method, overlay));
        }
        let method = config.adapter.as_ref().map_or_else(|| Arc::new(Full) as Arc<dyn Method>, |it| it.0.clone());
        let overlay = method.lower(spec, true).map_err(|error| anyhow!("adapter.{error}"))?;
        Ok((method, overlay))
    }

    fn way(&self, name: &str, config: RunConfig, settings: Vec<String>) -> Result<Way> {
        let Self { checkpoint, model, rows, room } = *self;
        let (method, overlay) = self.method(&config).with_context(|| name.to_owned())?;
        let latent = method.reparameterisation(&checkpoint.spec, config.training.seed);
        let layout = latent.as_ref().map_or(&overlay.layout, |(map, _)| map.layout());
        let [held_bytes, kept] = match config.base.storage.encoding() {
            None => [checkpoint.file_bytes(), 0],
            Some(encoding) => quantize::planned_bytes(checkpoint, encoding)?,
        };
        let length = config.data.max_length;
        let examples = |rows: &'_ [Example]| -> Vec<Example> { rows.iter().map(|row| cut(row, length)).collect() };
        let [train, eval]: [Cow<'_, [Example]>; 2] = match rows.longest() > length {
            true => [&rows.train, &rows.eval].map(|rows| Cow::Owned(examples(rows))),
            false => [&rows.train, &rows.eval].map(|rows| Cow::Borrowed(&rows[..])),
        };
        let planned = Planned {
            config: &config,
            method: &*method,
            model,
            overlay: &overlay,
            layout,
            held_bytes,
            int8: config.method.saves_adapter() && compute::limit(config.base.compute).is_some(),
            train: &train,
            eval: &eval,
            free: room.memory,
        };
        let dtype = config.export.dtype.given().map_or_else(|| ExportType::of(checkpoint), Ok)?;
        let (memory, disk) = (planned.memory(), planned.disk(kept, dtype));
        Ok(Way { name: name.to_owned(), config, settings, memory, disk })
    }

    /// What more to set, of the way that takes least, until it fits or nothing is left to set.
    fn advice(&self, least: &Way) -> Result<Way> {
        let mut way = self.way(&least.name, least.config.clone(), least.settings.clone())?;
        while !way.fits(self.room)
            && let Some((config, setting)) = smaller(&way.config)?
        {
            let key = setting.split_once('=').map_or(&*setting, |(key, _)| key);
            let others = way.settings.iter().filter(|other| !other.starts_with(key)).cloned();
            let settings = others.chain([setting.clone()]).collect();
            way = self.way(&way.name, config, settings)?;
        }
        Ok(way)
    }
}

/// The same run with one more setting that makes it take less.
fn smaller(config: &RunConfig) -> Result<Option<(RunConfig, String)>> {
    let mut less = config.clone();
    let training = &mut less.training;
    if training.optim == OptimizerName::Adamw {
        training.optim = OptimizerName::Adamw8bit;
        return Ok(Some((less, "training.optim=adamw_8bit".to_owned())));
    }
    if training.activation_checkpointing == ActivationCheckpointing::None {
        training.activation_checkpointing = ActivationCheckpointing::Layer;
        return Ok(Some((less, "training.activation_checkpointing=layer".to_owned())));
    }
    if less.data.max_length >= 2 * LEAST_LENGTH {
        less.data.max_length /= 2;
        let setting = format!("data.max_length={}", less.data.max_length);
        return Ok(Some((less, setting)));
    }
    if let Some(Settings(method)) = &less.adapter {
        let mut settings = method.settings()?;
        if let Some(r) = settings["r"].as_u64().filter(|&r| r >= 2 * LEAST_RANK) {
            settings["r"] = json!(r / 2);
            less.adapter = Some(Settings((less.method.read)(settings)?));
            return Ok(Some((less, format!("adapter.r={}", r / 2))));
        }
    }
    Ok(None)
}

/// All that is shown.
struct Shown<'a> {
    config: &'a RunConfig,
    checkpoint: &'a Checkpoint,
    rows: &'a Rows,
    room: Room,
    ways: &'a [Way],
    /// The way that takes least, made smaller, where none fits.
    advice: Option<Way>,
}

impl Shown<'_> {
    fn json(&self) -> Value {
        let Self { config, checkpoint, rows, room, ways, advice } = self;
        let way = |way: &Way| {
            json!({
                "name": way.name, "settings": way.settings, "memory": way.memory.json(), "disk": way.disk.json(),
                "fits": way.fits(*room),
            })
        };
        json!({
            "model": config.model,
            "parameters": checkpoint.spec.parameters(),
            "rows": { "train": rows.train.len(), "eval": rows.eval.len(), "longest": rows.longest(), "assumed": rows.assumed },
            "memory_available": room.memory,
            "disk_available": room.disk,
            "ways": ways.iter().map(way).collect::<Vec<_>>(),
            "advice": advice.as_ref().map(way),
        })
    }

    fn print(&self) -> Result<()> {
        let Self { config, checkpoint, rows, room, ways, advice } = self;
        let available = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), human);
        outln!("model      {} ({:.1} M parameters)", config.model, checkpoint.spec.parameters() as f64 / 1e6);
        match &rows.assumed {
            Some(why) => outln!("rows       assumed, of {} tokens each: {why}", rows.longest()),
            None => outln!("rows       {}, of {} tokens at most", rows.train.len() + rows.eval.len(), rows.longest()),
        }
        outln!("available  {} of memory, {} of disk", available(room.memory), available(room.disk));
        let width = ways.iter().map(|way| way.name.len()).max().unwrap_or(0);
        outln!(
            "\n{:width$}  {:>8} = {:>8} {:>8} {:>9} {:>9} {:>11}  {:>8}  fits",
            "",
            "memory",
            "base",
            "in int8",
            "trained",
            "optimizer",
            "activations",
            "disk"
        );
        for way in *ways {
            let MemoryPlan { base, int8, trained, optimizer, activations, .. } = way.memory.plan;
            outln!(
                "{:width$}  {:>8}   {:>8} {:>8} {:>9} {:>9} {:>11}  {:>8}  {}",
                way.name,
                human(way.memory.total()),
                human(base),
                human(int8),
                human(trained),
                human(optimizer),
                human(activations),
                human(way.disk.total()),
                if way.fits(*room) { "yes" } else { "no" }
            );
        }
        outln!();
        let (asked, first) = (&ways[0], ways[1..].iter().find(|way| way.fits(*room)));
        match (asked.fits(*room), first, advice) {
            (true, ..) => outln!("the run fits as it is"),
            (false, Some(way), _) => outln!("the run does not fit as it is; {} does:{}", way.name, way.flags()),
            (false, None, Some(way)) if way.fits(*room) => {
                outln!("none fits as it is; {} does, in {}, with{}", way.name, human(way.memory.total()), way.flags());
            }
            (false, None, Some(way)) => outln!(
                "none fits; {} takes {} even with{}: take a smaller model, or one in fewer bits, or more memory",
                way.name,
                human(way.memory.total()),
                way.flags()
            ),
            (false, None, None) => {}
        }
        Ok(())
    }
}
