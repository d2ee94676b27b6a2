//! The small networks that compute the rows of a soft prompt while it is trained: linear layers with an activation between them, over rows of
//! their own. Nothing of them is in an adapter's file: it holds what they computed.

use std::ops::Range;

use retune_engine::params::{ParamLayout, Reparameterisation};
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::{random, vector};

/// What stands between two layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    Relu,
    Tanh,
}

impl Activation {
    fn forward(self, x: &mut [f32]) {
        match self {
            Self::Relu => x.iter_mut().for_each(|v| *v = v.max(0.0)),
            Self::Tanh => x.iter_mut().for_each(|v| *v = v.tanh()),
        }
    }

    /// Multiplies a gradient by the derivative, which follows from the output.
    fn backward(self, output: &[f32], gradient: &mut [f32]) {
        for (g, y) in gradient.iter_mut().zip(output) {
            *g *= match self {
                Self::Relu => f32::from(u8::from(*y > 0.0)),
                Self::Tanh => 1.0 - y * y,
            };
        }
    }
}

/// A layer `x·Wᵀ + b`: W is [outputs, inputs].
struct Layer {
    inputs: usize,
    outputs: usize,
    weight: Range<usize>,
    bias: Range<usize>,
}

/// The network, whose last layer's output is the flat vector.
pub(crate) struct Encoder {
    layout: ParamLayout,
    /// Rows of the embedding.
    count: usize,
    rows: Range<usize>,
    layers: Vec<Layer>,
    activation: Activation,
}

impl Encoder {
    /// One of `count` rows as wide as the first of `widths`, and a layer from each width to the next; the layers are named `name.0`,
    /// `name.2` and so on, as PEFT names them.
    pub fn new(count: usize, widths: &[usize], name: &str, activation: Activation) -> Self {
        let mut layout = ParamLayout::default();
        let rows = layout.add("embedding.weight".to_owned(), vec![count, widths.first().copied().unwrap_or(0)], None);
        let layer = |(i, (&inputs, &outputs)): (usize, (&usize, &usize))| {
            let weight = layout.add(format!("{name}.{}.weight", 2 * i), vec![outputs, inputs], None);
            let bias = layout.add(format!("{name}.{}.bias", 2 * i), vec![outputs], None);
            Layer { inputs, outputs, weight, bias }
        };
        let layers = widths.iter().zip(widths.iter().skip(1)).enumerate().map(layer).collect();
        Self { layout, count, rows, layers, activation }
    }

    /// The first values: rows normal with standard deviation 1, layers as PyTorch's fresh linear layers, uniform in ±1/√inputs.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut latent = vec![0.0; self.layout.len()];
        let key = random::derive(random::derive(0, seed), random::hash("encoder"));
        for (i, v) in latent[self.rows.clone()].iter_mut().enumerate() {
            *v = random::normal(key, i as u64) as f32;
        }
        for (at, layer) in self.layers.iter().enumerate() {
            let bound = (1.0 / (layer.inputs as f64).sqrt()) as f32;
            let key = random::derive(key, 1 + at as u64);
            // The bias follows the weight.
            for (i, v) in latent[layer.weight.start..layer.bias.end].iter_mut().enumerate() {
                *v = random::symmetric(random::at(key, i as u64)) * bound;
            }
        }
        latent
    }

    /// The input of each layer, and the last one's output.
    fn activations(&self, latent: &[f32]) -> Vec<Vec<f32>> {
        let mut all = vec![latent[self.rows.clone()].to_vec()];
        for (at, layer) in self.layers.iter().enumerate() {
            let (n, k) = (layer.outputs, layer.inputs);
            let mut y = latent[layer.bias.clone()].repeat(self.count);
            if let Some(x) = all.last() {
                let weight = Rhs::View(MatRef::rows(&latent[layer.weight.clone()], k).t());
                gemm(self.count, n, &[Term::new(k, MatRef::rows(x, k), weight)], Out::add(&mut y, n));
            }
            if at + 1 < self.layers.len() {
                self.activation.forward(&mut y);
            }
            all.push(y);
        }
        all
    }
}

impl Reparameterisation for Encoder {
    fn layout(&self) -> &ParamLayout {
        &self.layout
    }

    fn forward(&self, latent: &[f32], flat: &mut [f32]) {
        if let Some(rows) = self.activations(latent).last() {
            flat.copy_from_slice(rows);
        }
    }

    fn backward(&self, latent: &[f32], flat_gradient: &[f32], latent_gradient: &mut [f32]) {
        let activations = self.activations(latent);
        let mut gradient = flat_gradient.to_vec();
        for (at, (layer, x)) in self.layers.iter().zip(&activations).enumerate().rev() {
            let (n, k) = (layer.outputs, layer.inputs);
            let g = MatRef::rows(&gradient, n);
            let product = Term::new(self.count, g.t(), Rhs::View(MatRef::rows(x, k)));
            gemm(n, k, &[product], Out::add(&mut latent_gradient[layer.weight.clone()], k));
            vector::add_column_sums(&gradient, n, self.count, &mut latent_gradient[layer.bias.clone()]);
            let mut dx = vec![0.0; self.count * k];
            let weight = Rhs::View(MatRef::rows(&latent[layer.weight.clone()], k));
            gemm(self.count, k, &[Term::new(n, g, weight)], Out::set(&mut dx, k));
            if at > 0 {
                self.activation.backward(x, &mut dx);
            }
            gradient = dx;
        }
        vector::add(&mut latent_gradient[self.rows.clone()], &gradient);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_of_every_latent_value_is_that_of_the_rows() {
        for (widths, activation) in [(&[5, 7, 6, 5][..], Activation::Relu), (&[4, 3, 10], Activation::Tanh)] {
            let encoder = Encoder::new(3, widths, "head", activation);
            let outputs = 3 * widths[widths.len() - 1];
            let mut latent = encoder.initial(7);
            let direction: Vec<f32> = (0..outputs as u64).map(|i| random::symmetric(random::at(5, i))).collect();
            let value = |latent: &[f32]| {
                let mut flat = vec![0.0; outputs];
                encoder.forward(latent, &mut flat);
                flat.iter().zip(&direction).map(|(v, d)| f64::from(v * d)).sum::<f64>()
            };
            let mut gradient = vec![0.0; latent.len()];
            encoder.backward(&latent, &direction, &mut gradient);
            assert_eq!(latent.len(), encoder.layout().len());
            let step = 1e-2;
            for i in 0..latent.len() {
                let before = latent[i];
                latent[i] = before + step;
                let above = value(&latent);
                latent[i] = before - step;
                let below = value(&latent);
                latent[i] = before;
                let expected = (above - below) / f64::from(2.0 * step);
                let error = (f64::from(gradient[i]) - expected).abs();
                assert!(error < 2e-3 * (1.0 + expected.abs()), "{activation:?} {i}: {} for {expected}", gradient[i]);
            }
        }
    }
}
