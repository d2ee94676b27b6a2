//! AdamW over the flat parameter vector (Loshchilov and Hutter 2019), in PyTorch's form.

use retune_engine::params::{Param, ParamLayout};
use retune_formats::safetensors::Values;
use retune_kernels::multiversion;
use retune_kernels::parallel::{self, SharedMut};

use super::{Options, StateMut, Step};

/// The moments, one value each per trainable parameter.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AdamW {
    first: Vec<f32>,
    second: Vec<f32>,
}

/// Factors of one step, for a piece of one tensor.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    beta1: f32,
    beta2: f32,
    /// 1 − β₁ and 1 − β₂, subtracted before they are rounded.
    gain1: f32,
    gain2: f32,
    epsilon: f32,
    /// learning rate / (1 − β₁ᵗ)
    rate: f32,
    /// 1 / sqrt(1 − β₂ᵗ)
    second: f32,
    /// 1 − learning rate · weight decay
    keep: f32,
    /// Of the gradients.
    scale: f32,
}

multiversion! {
    pub(super) fn update(factors: Factors, gradients: &mut [f32], parameters: &mut [f32], first: &mut [f32], second: &mut [f32]) {
        let Factors { beta1, beta2, gain1, gain2, epsilon, rate, second: correction, keep, scale } = factors;
        for (((p, gradient), m), v) in parameters.iter_mut().zip(gradients).zip(first).zip(second) {
            let g = scale * *gradient;
            *gradient = 0.0;
            *m = beta1 * *m + gain1 * g;
            *v = beta2 * *v + gain2 * g * g;
            *p = *p * keep - rate * *m / (v.sqrt() * correction + epsilon);
        }
    }
}

/// Elements that are worked on at a time.
const PIECE: usize = 1 << 15;

/// Bytes of the moments of a tensor.
pub(super) fn state_bytes(param: &Param) -> usize {
    2 * size_of::<f32>() * param.range.len()
}

impl Factors {
    /// Those of a step for one tensor.
    pub fn of(step: Step, param: &Param) -> Self {
        let Options { beta1, beta2, epsilon, weight_decay } = step.options;
        let (t, learning_rate) = (step.number as f64, step.learning_rate * param.rate);
        Self {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            gain1: (1.0 - beta1) as f32,
            gain2: (1.0 - beta2) as f32,
            epsilon: epsilon as f32,
            rate: (learning_rate / (1.0 - beta1.powf(t))) as f32,
            second: (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
            keep: if param.decay { (1.0 - learning_rate * weight_decay) as f32 } else { 1.0 },
            scale: step.scale,
        }
    }
}

impl AdamW {
    /// Moments of zero.
    pub fn new(layout: &ParamLayout) -> Self {
        Self { first: vec![0.0; layout.len()], second: vec![0.0; layout.len()] }
    }

    pub fn step(&mut self, layout: &ParamLayout, step: Step, gradients: &mut [f32], parameters: &mut [f32]) {
        let (p, m, v) = (SharedMut::new(parameters), SharedMut::new(&mut self.first), SharedMut::new(&mut self.second));
        let g = SharedMut::new(gradients);
        for param in layout.params() {
            let factors = Factors::of(step, param);
            parallel::for_each(param.range.len().div_ceil(PIECE), |piece| {
                let start = param.range.start + piece * PIECE;
                let n = PIECE.min(param.range.end - start);
                // SAFETY: pieces are disjoint.
                unsafe {
                    update(factors, g.slice(start, n), p.slice(start, n), m.slice(start, n), v.slice(start, n));
                }
            });
        }
    }

    pub fn state(&self) -> Vec<(&'static str, Values<'_>)> {
        vec![("first_moment", Values::F32(&self.first)), ("second_moment", Values::F32(&self.second))]
    }

    pub fn state_mut(&mut self) -> Vec<(&'static str, StateMut<'_>)> {
        vec![("first_moment", StateMut::F32(&mut self.first)), ("second_moment", StateMut::F32(&mut self.second))]
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Optimizer, OptimizerName};
    use super::*;

    #[test]
    fn equals_pytorch() {
        // torch.optim.AdamW(lr=0.1, weight_decay=0.5) on [1.0, -2.0] with the gradients below, three steps.
        let mut layout = ParamLayout::default();
        layout.add("w".into(), vec![1, 2], None);
        let options = Options { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.5 };
        let mut optimizer = Optimizer::new(OptimizerName::Adamw, options, &layout);
        let mut p = [1.0, -2.0];
        for (mut gradients, expected) in EXPECTED {
            gradients.iter_mut().for_each(|g| *g *= 4.0);
            optimizer.step(&layout, 0.1, 0.25, &mut gradients, &mut p);
            assert_eq!(gradients, [0.0, 0.0]);
            for (p, e) in p.iter().zip(expected) {
                assert!((p - e).abs() < 2e-6, "{p} instead of {e}");
            }
        }
    }

    #[test]
    fn a_tensors_own_rate_is_that_of_a_run_with_it() {
        let options = Options { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.5 };
        let after = |rate: f64, learning_rate: f64| {
            let mut layout = ParamLayout::default();
            layout.add("a".into(), vec![1, 2], None);
            layout.add("b".into(), vec![2, 1], None);
            layout.set_rate(rate, |param| param.name == "b");
            let mut p = [1.0, -2.0, 1.0, -2.0];
            let mut optimizer = Optimizer::new(OptimizerName::Adamw, options, &layout);
            optimizer.step(&layout, learning_rate, 1.0, &mut [0.3, -1.5, 0.3, -1.5], &mut p);
            p
        };
        let (plain, faster, all) = (after(1.0, 0.01), after(16.0, 0.01), after(1.0, 0.16));
        assert_eq!((&faster[..2], &faster[2..]), (&plain[..2], &all[2..]));
        assert_ne!(plain, all);
    }

    #[test]
    fn vectors_do_not_decay() {
        let mut layout = ParamLayout::default();
        layout.add("norm".into(), vec![2], None);
        let options = Options { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.5 };
        let mut p = [1.0, -2.0];
        Optimizer::new(OptimizerName::Adamw, options, &layout).step(&layout, 0.1, 1.0, &mut [0.0, 0.0], &mut p);
        assert_eq!(p, [1.0, -2.0]);
    }

    const EXPECTED: [([f32; 2], [f32; 2]); 3] =
        [([0.3, -1.5], [0.85, -1.8]), ([2.0, 0.25], [0.723974, -1.6561462]), ([-0.7, 0.01], [0.6476687, -1.5321312])];
}
