//! The norms of a spec, forward and backward, with their vectors from the base or from the overlay.

use retune_kernels::heads::{Heads, HeadsMut};
use retune_kernels::{layer_norm, rms_norm};

use crate::model::Norm;
use crate::profile::{Operation, span};
use crate::run::Run;
use crate::spec::NormKind;

impl Norm {
    /// What is added to the weight before it is used.
    fn offset(&self) -> f32 {
        if self.kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 }
    }

    /// Writes the normalised rows of `x` to `y`.
    pub fn forward(&self, run: Run, x: &[f32], y: &mut [f32]) {
        let _span = span(Operation::Norm);
        let weight = run.vector(self.weight);
        match self.bias {
            Some(bias) => layer_norm::forward(x, weight, run.vector(bias), self.eps, y),
            None => rms_norm::forward(x, weight, self.offset(), self.eps, y),
        }
    }

    /// Adds the gradient of `x` to `dx`, and those of the norm's own vectors to `grads`, for the gradient `dy` of the output.
    pub fn backward(&self, run: Run, x: &[f32], dy: &[f32], dx: &mut [f32], grads: &mut [f32]) {
        let _span = span(Operation::Norm);
        let weight = run.vector(self.weight);
        match self.bias {
            Some(bias) => {
                let [dw, db] = run.vector_gradients([self.weight, bias], grads);
                layer_norm::backward(x, weight, self.eps, dy, dx, dw, db);
            }
            None => {
                let [dw] = run.vector_gradients([self.weight], grads);
                rms_norm::backward(x, weight, self.offset(), self.eps, dy, dx, dw);
            }
        }
    }

    /// Writes the heads of `x`, each normalised, to `to`.
    pub fn heads_forward(&self, run: Run, x: Heads, to: HeadsMut) {
        let _span = span(Operation::Norm);
        rms_norm::heads_forward(x, run.vector(self.weight), self.offset(), self.eps, to);
    }

    /// Turns the gradient of normalised heads into that of the heads `x` before, in place, and adds the weight's own to `grads`.
    pub fn heads_backward(&self, run: Run, x: Heads, gradient: HeadsMut, grads: &mut [f32]) {
        let _span = span(Operation::Norm);
        let [dw] = run.vector_gradients([self.weight], grads);
        rms_norm::heads_backward(x, run.vector(self.weight), self.offset(), self.eps, gradient, dw);
    }
}
