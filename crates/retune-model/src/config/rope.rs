//! Rotary position embedding: from a model's configuration to the frequencies its rotations are made of.

use serde_json::{Value, json};

use super::unsupported;
use crate::error::Error;

/// How positions become rotation angles.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths (`rope_theta`).
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Changes to the rotation frequencies of models whose context was extended.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies divided by `factor` (position interpolation).
    Linear {
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between blended (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// Each frequency divided by its own factor, `head_dim / 2` of them (GGUF's `rope_freqs.weight`).
    Factors(Vec<f32>),
}

impl RopeConfig {
    /// The `head_dim / 2` angles, in radians, that one step of position turns each pair of dimensions by.
    ///
    /// As transformers' `modeling_rope_utils` computes them, every intermediate result rounded to f32: at position 2,000 the
    /// rounding of a frequency shows in the fourth digit of the angle.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / head_dim as f32;
                let frequency = 1.0 / self.theta.powf(f64::from(exponent)) as f32;
                f64::from(self.scaling.apply(i, frequency))
            })
            .collect()
    }

    /// The `rope_scaling` field of a `config.json`.
    ///
    /// Errors: factors that no scaling of transformers gives.
    pub(super) fn scaling_json(&self, head_dim: usize) -> Result<Value, Error> {
        let scaling = match &self.scaling {
            RopeScaling::Factors(factors) => scaling_of_factors(self.theta, head_dim, factors)?,
            other => other.clone(),
        };
        Ok(match scaling {
            RopeScaling::None | RopeScaling::Factors(_) => Value::Null,
            RopeScaling::Linear { factor } => json!({"type": "linear", "rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                })
            }
        })
    }
}

impl RopeScaling {
    fn apply(&self, i: usize, frequency: f32) -> f32 {
        match *self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = original_max_position_embeddings as f64;
                let wavelength = (2.0 * std::f64::consts::PI) as f32 / frequency;
                if wavelength < (original / high_freq_factor) as f32 {
                    frequency
                } else if wavelength > (original / low_freq_factor) as f32 {
                    frequency / factor as f32
                } else {
                    let smooth = (original as f32 / wavelength - low_freq_factor as f32)
                        / (high_freq_factor - low_freq_factor) as f32;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
            RopeScaling::Factors(ref factors) => frequency / factors.get(i).copied().unwrap_or(1.0),
        }
    }
}

/// The scaling of transformers that gives these factors.
///
/// Llama 3's models all have low and high frequency factors 1 and 4; the original context length is searched among powers
/// of two.
fn scaling_of_factors(theta: f64, head_dim: usize, factors: &[f32]) -> Result<RopeScaling, Error> {
    let factor = factors.last().map_or(1.0, |&last| f64::from(last));
    let lengths = (4..32).map(|log2| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 1 << log2,
    });
    let wanted = RopeConfig { theta, scaling: RopeScaling::Factors(factors.to_vec()) }.inverse_frequencies(head_dim);
    [RopeScaling::None, RopeScaling::Linear { factor }]
        .into_iter()
        .chain(lengths)
        .find(|scaling| {
            let found = RopeConfig { theta, scaling: scaling.clone() }.inverse_frequencies(head_dim);
            found.iter().zip(&wanted).all(|(found, wanted)| (found / wanted - 1.0).abs() < 1e-5)
        })
        .ok_or_else(|| {
            unsupported("writing the rotary factors", format!("{factors:?}"), "factors of a linear or llama3 scaling")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-7, "{found} {expected}");
        }
    }

    /// Expected values: `inv_freq` of transformers 5.23.0's LlamaRotaryEmbedding.
    #[test]
    fn llama3_frequencies_are_those_of_transformers() {
        let rope = |theta, factor, original_max_position_embeddings| RopeConfig {
            theta,
            scaling: RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings,
            },
        };
        let small = [1.0, 0.04275117814540863, 0.0012499999720603228, 0.0001250000059371814];
        close(&rope(10000.0, 8.0, 128).inverse_frequencies(8), &small);
        let llama = rope(500000.0, 32.0, 8192).inverse_frequencies(64);
        let picked = [1, 8, 14, 15, 16, 17, 18, 31].map(|i| llama[i]);
        let expected = [
            0.663601279258728,
            0.03760603070259094,
            0.0032114461064338684,
            0.0012905480107292533,
            0.000429556705057621,
            9.708286233944818e-05,
            1.9461638657958247e-05,
            9.418306490260875e-08,
        ];
        close(&picked, &expected);
    }

    #[test]
    fn plain_linear_and_factor_frequencies() {
        let rope = |scaling| RopeConfig { theta: 10000.0, scaling }.inverse_frequencies(8);
        close(&rope(RopeScaling::None), &[1.0f32, 0.1, 0.01, 0.001].map(f64::from));
        close(&rope(RopeScaling::Linear { factor: 4.0 }), &[0.25f32, 0.025, 0.0025, 0.00025].map(f64::from));
        let halved = rope(RopeScaling::Factors(vec![1.0, 2.0, 1.0, 8.0]));
        close(&halved, &[1.0f32, 0.05, 0.01, 0.000125].map(f64::from));
    }
}
