//! What a method of fine-tuning is to the rest of the program: it lowers itself to an overlay on a model, and says how its parameters
//! start. Everything after that is the engine's.

use retune_engine::model::Weights;
use retune_engine::overlay::Overlay;
use retune_engine::spec::ModelSpec;
use retune_kernels::PanelSource;

use crate::error::Error;

/// A method of fine-tuning, with its settings.
pub trait Method {
    /// Lowers the method to an overlay, strictly: for training.
    ///
    /// # Errors
    /// Settings that contradict themselves or the model, or have no effect.
    fn lower(&self, spec: &ModelSpec) -> Result<Overlay, Error>;

    /// Fills those parameters that start from nothing of the base.
    fn initialise(&self, spec: &ModelSpec, overlay: &Overlay, seed: u64, params: &mut [f32]);
}

/// What a list of methods says of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodInfo {
    /// Its name in a run's configuration.
    pub name: &'static str,
    /// Its name in PEFT's `adapter_config.json`; none for what PEFT makes no adapter of.
    pub peft_type: Option<&'static str>,
    /// In a few words, for people.
    pub what: &'static str,
}

/// All methods.
pub const METHODS: &[MethodInfo] = &[
    MethodInfo {
        name: "lora",
        peft_type: Some("LORA"),
        what: "low-rank adapters on chosen linear modules (LoRA, rsLoRA)",
    },
    MethodInfo { name: "full", peft_type: None, what: "every weight of the model" },
];

/// The first values of everything trainable, as one flat vector: the base's own for what takes the place of its tensors, the method's
/// for the rest.
///
/// # Errors
/// A tensor that cannot be read.
pub fn initial_params<W: Weights>(
    method: &dyn Method,
    spec: &ModelSpec,
    overlay: &Overlay,
    weights: &W,
    seed: u64,
) -> Result<Vec<f32>, W::Error> {
    let mut params = vec![0.0; overlay.layout.len()];
    for param in overlay.layout.params() {
        let Some(name) = &param.base else { continue };
        let matrix = weights.tensor(name)?;
        matrix.panel_f32(0..matrix.rows(), 0..matrix.cols(), &mut params[param.range.clone()]);
    }
    method.initialise(spec, overlay, seed, &mut params);
    Ok(params)
}
