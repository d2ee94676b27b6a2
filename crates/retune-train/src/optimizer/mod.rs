//! What makes a step of a gradient: AdamW, the same with its moments in 8 bits, and Adafactor.

mod adafactor;
mod adamw;
mod adamw_8bit;

use retune_engine::params::ParamLayout;
use retune_engine::profile::{Operation, span};
use retune_formats::safetensors::Values;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use adafactor::Adafactor;
use adamw::AdamW;
use adamw_8bit::AdamW8bit;

/// An optimizer's name in a run's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerName {
    /// AdamW (Loshchilov and Hutter 2019): two moments in f32, 8 bytes a parameter.
    #[default]
    Adamw,
    /// AdamW whose moments are kept in 8 bits with a magnitude for each 256 (Dettmers et al. 2022): 2 bytes a parameter.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// Adafactor (Shazeer and Stern 2018) without a first moment, at the given rate: of a matrix it keeps a row and a column.
    Adafactor,
}

impl OptimizerName {
    /// Whether it is the one that runs of earlier versions do not name.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Bytes of what it keeps of the parameters.
    pub fn state_bytes(self, layout: &ParamLayout) -> usize {
        let of_param = |param: &_| match self {
            Self::Adamw => adamw::state_bytes(param),
            Self::Adamw8bit => adamw_8bit::state_bytes(param),
            Self::Adafactor => adafactor::state_bytes(param),
        };
        layout.params().iter().map(of_param).sum()
    }
}

/// Constants of the optimizers; Adafactor has of these the weight decay alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// One part of what an optimizer keeps, for a checkpoint to be read into.
pub enum StateMut<'a> {
    F32(&'a mut [f32]),
    U8(&'a mut [u8]),
}

/// An optimizer, and what it keeps from step to step.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    options: Options,
    /// Steps taken.
    pub steps: u64,
    state: State,
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    AdamW(AdamW),
    AdamW8bit(AdamW8bit),
    Adafactor(Adafactor),
}

impl Optimizer {
    /// One that has taken no step.
    pub fn new(name: OptimizerName, options: Options, layout: &ParamLayout) -> Self {
        let state = match name {
            OptimizerName::Adamw => State::AdamW(AdamW::new(layout)),
            OptimizerName::Adamw8bit => State::AdamW8bit(AdamW8bit::new(layout)),
            OptimizerName::Adafactor => State::Adafactor(Adafactor::new(layout)),
        };
        Self { options, steps: 0, state }
    }

    /// Takes one step with `scale · gradients`, and leaves zeros there for the sums of the next one: of a whole model's gradients every pass
    /// over the memory counts. Weight decay is decoupled and spares vectors (norm weights and biases).
    pub fn step(
        &mut self,
        layout: &ParamLayout,
        learning_rate: f64,
        scale: f32,
        gradients: &mut [f32],
        parameters: &mut [f32],
    ) {
        let _span = span(Operation::Optimizer);
        self.steps += 1;
        let step = Step { options: self.options, number: self.steps, learning_rate, scale };
        match &mut self.state {
            State::AdamW(state) => state.step(layout, step, gradients, parameters),
            State::AdamW8bit(state) => state.step(layout, step, gradients, parameters),
            State::Adafactor(state) => state.step(layout, step, gradients, parameters),
        }
    }

    /// What a checkpoint is to hold, by name; parts that are empty are left out.
    pub fn state(&self) -> Vec<(&'static str, Values<'_>)> {
        let parts = match &self.state {
            State::AdamW(state) => state.state(),
            State::AdamW8bit(state) => state.state(),
            State::Adafactor(state) => state.state(),
        };
        parts.into_iter().filter(|(_, values)| !values.is_empty()).collect()
    }

    /// The same parts, to be filled.
    pub fn state_mut(&mut self) -> Vec<(&'static str, StateMut<'_>)> {
        let parts = match &mut self.state {
            State::AdamW(state) => state.state_mut(),
            State::AdamW8bit(state) => state.state_mut(),
            State::Adafactor(state) => state.state_mut(),
        };
        let is_empty = |values: &StateMut| match values {
            StateMut::F32(values) => values.is_empty(),
            StateMut::U8(values) => values.is_empty(),
        };
        parts.into_iter().filter(|(_, values)| !is_empty(values)).collect()
    }
}

/// What a step is told.
#[derive(Clone, Copy)]
struct Step {
    options: Options,
    /// From 1.
    number: u64,
    learning_rate: f64,
    /// Of the gradients.
    scale: f32,
}
