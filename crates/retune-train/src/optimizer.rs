//! AdamW over the flat parameter vector (Loshchilov and Hutter 2019), in PyTorch's form.

use retune_engine::params::ParamLayout;
use retune_engine::profile::{Operation, span};
use retune_kernels::multiversion;
use retune_kernels::parallel::{self, SharedMut};

/// Constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// The moments, one value each per trainable parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    pub options: AdamWOptions,
    /// Steps taken.
    pub steps: u64,
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

/// Factors of one step, for a piece of one tensor.
#[derive(Clone, Copy)]
struct Factors {
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
    fn update(factors: Factors, gradients: &mut [f32], parameters: &mut [f32], first: &mut [f32], second: &mut [f32]) {
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

impl AdamW {
    /// Moments of zero for `len` parameters.
    pub fn new(options: AdamWOptions, len: usize) -> Self {
        Self { options, steps: 0, first: vec![0.0; len], second: vec![0.0; len] }
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
        const PIECE: usize = 1 << 15;
        let _span = span(Operation::Optimizer);
        self.steps += 1;
        let AdamWOptions { beta1, beta2, epsilon, weight_decay } = self.options;
        let t = self.steps as f64;
        let factors = Factors {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            gain1: (1.0 - beta1) as f32,
            gain2: (1.0 - beta2) as f32,
            epsilon: epsilon as f32,
            rate: 0.0,
            second: (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
            keep: 1.0,
            scale,
        };
        let (p, m, v) = (SharedMut::new(parameters), SharedMut::new(&mut self.first), SharedMut::new(&mut self.second));
        let g = SharedMut::new(gradients);
        for param in layout.params() {
            let learning_rate = learning_rate * param.rate;
            let rate = (learning_rate / (1.0 - beta1.powf(t))) as f32;
            let keep = if param.decay { (1.0 - learning_rate * weight_decay) as f32 } else { 1.0 };
            let factors = Factors { rate, keep, ..factors };
            let len = param.range.len();
            parallel::for_each(len.div_ceil(PIECE), |piece| {
                let start = param.range.start + piece * PIECE;
                let n = PIECE.min(param.range.end - start);
                // SAFETY: pieces are disjoint.
                unsafe {
                    update(factors, g.slice(start, n), p.slice(start, n), m.slice(start, n), v.slice(start, n));
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_pytorch() {
        // torch.optim.AdamW(lr=0.1, weight_decay=0.5) on [1.0, -2.0] with the gradients below, three steps.
        let mut layout = ParamLayout::default();
        layout.add("w".into(), vec![1, 2], None);
        let options = AdamWOptions { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.5 };
        let mut optimizer = AdamW::new(options, 2);
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
        let options = AdamWOptions { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.5 };
        let after = |rate: f64, learning_rate: f64| {
            let mut layout = ParamLayout::default();
            layout.add("a".into(), vec![1, 2], None);
            layout.add("b".into(), vec![2, 1], None);
            layout.set_rate(rate, |param| param.name == "b");
            let mut p = [1.0, -2.0, 1.0, -2.0];
            AdamW::new(options, 4).step(&layout, learning_rate, 1.0, &mut [0.3, -1.5, 0.3, -1.5], &mut p);
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
        let options = AdamWOptions { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.5 };
        let mut p = [1.0, -2.0];
        AdamW::new(options, 2).step(&layout, 0.1, 1.0, &mut [0.0, 0.0], &mut p);
        assert_eq!(p, [1.0, -2.0]);
    }

    const EXPECTED: [([f32; 2], [f32; 2]); 3] =
        [([0.3, -1.5], [0.85, -1.8]), ([2.0, 0.25], [0.723974, -1.6561462]), ([-0.7, 0.01], [0.6476687, -1.5321312])];
}
