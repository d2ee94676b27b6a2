//! What a run takes of memory and of the disk: what `train` says before it starts, and `plan` of several ways to train one model.

use std::path::Path;

use retune_adapter::Method;
use retune_engine::calibrate::Integers;
use retune_engine::compute::Compute;
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_engine::params::ParamLayout;
use retune_engine::workspace::Workspace;
use retune_model::export::ExportType;
use retune_train::data::Example;
use retune_train::run_config::{ActivationCheckpointing, Int8Copy, RunConfig};
use retune_train::trainer::{Passes, largest_pass, schedule};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::compute;
use crate::memory::human;

/// What the program takes beside weights, activations and optimizer: its own code, the tokenizer, the data.
const PROGRAM_BYTES: usize = 60 << 20;

/// A run, as far as what it takes depends on it.
pub struct Planned<'a> {
    pub config: &'a RunConfig,
    pub method: &'a dyn Method,
    pub model: &'a Model,
    pub overlay: &'a Overlay,
    /// Of what is optimised.
    pub layout: &'a ParamLayout,
    /// Bytes of the base as it is held.
    pub held_bytes: u64,
    /// Whether the base is computed in 8 bits.
    pub int8: bool,
    pub train: &'a [Example],
    pub eval: &'a [Example],
    /// Bytes of memory that may be taken, where that is known.
    pub free: Option<u64>,
}

/// What a run is planned to take, part by part, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// The base as it is stored.
    pub base: u64,
    /// Its linears in 8 bits, beside that.
    pub int8: u64,
    /// What is trained, with its gradient.
    pub trained: u64,
    pub optimizer: u64,
    pub activations: u64,
    /// The program's own code, the tokenizer, the data.
    pub program: u64,
}

/// That, and what it depends on.
#[derive(Clone, Copy, Debug)]
pub struct RunMemory {
    pub plan: MemoryPlan,
    /// What becomes of the base's integers, where it is computed in 8 bits.
    pub integers: Integers,
    /// Tokens of the largest pass.
    pub tokens: usize,
}

/// Bytes on the disk by what they are for.
#[derive(Clone, Copy, Debug)]
pub struct DiskPlan {
    /// The base as it is held, where it is quantized for the run and kept.
    pub base: u64,
    pub checkpoints: u64,
    /// The adapter, or the model.
    pub result: u64,
}

impl Planned<'_> {
    pub fn passes(&self) -> Passes {
        let longest = self.train.iter().chain(self.eval).map(Example::longest).max().unwrap_or(0);
        Passes::resolve(&self.config.training, self.model, self.overlay, self.int8, longest)
    }

    /// Values that a start which stays a part of the adapter takes.
    fn start(&self) -> usize {
        if self.method.keeps_start() { self.overlay.layout.len() } else { 0 }
    }

    pub fn memory(&self) -> RunMemory {
        let Self { config, model, overlay, layout, int8, train, eval, free, .. } = *self;
        let (training, parameters, passes) = (&config.training, layout.len(), self.passes());
        let size = largest_pass(&overlay.prelude(&model.spec), training, passes, config.data.shuffle, train, eval);
        let file = self.held_bytes as usize;
        // What is computed from the parameters lies beside them.
        let computed = if parameters == overlay.layout.len() { 0 } else { overlay.layout.len() };
        let trained = 4 * (2 * (parameters + computed) + self.start());
        let optimizer = training.optim.state_bytes(layout);
        let activations = Workspace::planned_bytes(model, overlay, passes.saving, int8, size);
        let around = trained + optimizer + activations + PROGRAM_BYTES;
        let integers = compute::integers(model, overlay, config.base.int8_copy, file + around, free);
        let (base, quantized) = if int8 && integers == Integers::Remade {
            (file, Compute::planned_int8_bytes(model, overlay, integers))
        } else if int8 {
            // Scoring reads the whole file beside what the steps keep; without it only the calibration does, before their memory is in use.
            let kept = if overlay.table.is_some() { 0 } else { model.table_bytes() };
            let stored = if eval.is_empty() { kept.max(file.saturating_sub(activations + optimizer)) } else { file };
            (stored, Compute::planned_int8_bytes(model, overlay, integers))
        } else {
            (file, 0)
        };
        let [base, int8, trained, optimizer, activations, program] =
            [base, quantized, trained, optimizer, activations, PROGRAM_BYTES].map(|bytes| bytes as u64);
        let plan = MemoryPlan { base, int8, trained, optimizer, activations, program };
        RunMemory { plan, integers, tokens: size.tokens }
    }

    /// What the run's folder and the cache will hold at most. `kept` are the bytes of the base that are kept quantized, `dtype` is the type of a
    /// model that is written.
    pub fn disk(&self, kept: u64, dtype: ExportType) -> DiskPlan {
        let Self { config, layout, overlay, .. } = *self;
        let parameters = 4 * layout.len() as u64;
        let checkpoint = parameters + config.training.optim.state_bytes(layout) as u64;
        // A new one is whole before the oldest goes.
        let steps = schedule(&config.training, self.train.len()).total_steps as u64;
        let saves = steps.div_ceil(config.training.save_steps.max(1) as u64).max(1);
        let count = (config.training.save_total_limit as u64).saturating_add(1).min(saves);
        let best = if self.eval.is_empty() { 0 } else { parameters };
        let checkpoints = count * checkpoint + best + 4 * self.start() as u64;
        let values = overlay.layout.len() as u64;
        let result = if config.method.saves_adapter() { 4 * values } else { dtype.bytes_for(values) };
        DiskPlan { base: kept, checkpoints, result }
    }

    /// What makes the run take less memory, in words.
    pub fn ways(&self) -> serde_json::Result<Vec<&'static str>> {
        let Self { config, method, int8, .. } = *self;
        let layer = config.training.activation_checkpointing == ActivationCheckpointing::Layer;
        let settings = method.settings()?;
        let has = |key: &str| settings.get(key).is_some();
        let adapter = config.method.saves_adapter();
        let ways = [
            (!layer).then_some("set training.activation_checkpointing=layer"),
            Some("lower training.tokens_per_pass or data.max_length"),
            (int8 && config.base.int8_copy == Int8Copy::Always).then_some("set base.int8_copy=never"),
            (adapter && config.base.storage.is_as_is()).then_some("set base.storage=nf4-double"),
            has("r").then_some("lower adapter.r"),
            has("num_virtual_tokens").then_some("lower adapter.num_virtual_tokens"),
            (!adapter).then_some("train an adapter (method: lora)"),
        ];
        Ok(ways.into_iter().flatten().collect())
    }
}

impl MemoryPlan {
    /// The parts, each with what people call it.
    pub fn parts(&self) -> [(&'static str, u64); 6] {
        [
            ("base", self.base),
            ("base in int8", self.int8),
            ("trained and gradient", self.trained),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("program", self.program),
        ]
    }

    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}

impl RunMemory {
    pub fn total(&self) -> u64 {
        self.plan.total()
    }

    /// A line about it; `what` is trained.
    pub fn line(&self, what: &str) -> String {
        let MemoryPlan { base, int8, trained, optimizer, activations, .. } = self.plan;
        format!(
            "{} planned: base {}, in int8 {}, {what} with its gradient {}, optimizer {}, activations {} for passes of {} tokens",
            human(self.total()),
            human(base),
            human(int8),
            human(trained),
            human(optimizer),
            human(activations),
            self.tokens,
        )
    }

    pub fn json(&self) -> Value {
        let MemoryPlan { base, int8, trained, optimizer, activations, program } = self.plan;
        json!({
            "base": base, "int8": int8, "trained_with_gradient": trained, "optimizer": optimizer, "activations": activations,
            "program": program, "tokens_per_pass": self.tokens, "total": self.total(),
        })
    }
}

impl DiskPlan {
    pub fn total(&self) -> u64 {
        self.base + self.checkpoints + self.result
    }

    pub fn json(&self) -> Value {
        json!({ "base": self.base, "checkpoints": self.checkpoints, "result": self.result, "total": self.total() })
    }
}

/// Bytes that can be written where a path is or will be, where the system tells.
#[cfg(unix)]
pub fn free_disk(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let absolute = std::path::absolute(path).ok()?;
    let there = absolute.ancestors().find(|path| path.exists())?;
    let name = std::ffi::CString::new(there.as_os_str().as_bytes()).ok()?;
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: both pointers are valid, the name ends in a zero, and a zeroed statvfs is a valid value.
    let found = unsafe {
        if libc::statvfs(name.as_ptr(), found.as_mut_ptr()) != 0 {
            return None;
        }
        found.assume_init()
    };
    #[allow(clippy::unnecessary_cast, reason = "the types differ from system to system")]
    let free = (found.f_bavail as u64).saturating_mul(found.f_frsize as u64);
    Some(free)
}

#[cfg(not(unix))]
pub fn free_disk(_: &Path) -> Option<u64> {
    None
}
