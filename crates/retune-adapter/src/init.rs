//! How A and B start. Each element depends on the seed, the module's name and its place alone, so that the order of modules and the
//! number of threads do not matter, and a machine's mathematics library neither.

use rayon::prelude::*;
use retune_engine::overlay::{Factor, LowRank, Overlay};
use retune_engine::spec::ModelSpec;
use retune_kernels::{PanelSource, random};

use crate::config::InitLoraWeights;
use crate::error::Error;
use crate::method::Start;
use crate::svd::{Svd, qr_factors};

/// Fills A, [r, in], and B, [out, r], row-major, as PEFT initialises them (its random numbers are others).
///
/// # Panics
/// When `r` is 0.
pub fn init_lora(module: &str, r: usize, init: &InitLoraWeights, seed: u64, a: &mut [f32], b: &mut [f32]) {
    let in_features = a.len() / r;
    let module = random::derive(random::derive(0, seed), random::hash(module));
    let (key_a, key_b) = (random::derive(module, 0), random::derive(module, 1));
    match init {
        InitLoraWeights::Kaiming => {
            uniform(key_a, in_features, a);
            b.fill(0.0);
        }
        InitLoraWeights::Gaussian => {
            let deviation = 1.0 / r as f64;
            for (i, value) in a.iter_mut().enumerate() {
                *value = (random::normal(key_a, i as u64) * deviation) as f32;
            }
            b.fill(0.0);
        }
        InitLoraWeights::LinearDefault => {
            uniform(key_a, in_features, a);
            uniform(key_b, r, b);
        }
        // These start from the weight.
        InitLoraWeights::Pissa(_) | InitLoraWeights::Olora => {}
    }
}

/// Fills A and B of every linear from a decomposition of its weight, of which they are a part: s·B·A, s being the scale.
///
/// # Errors
/// A weight that cannot be read or decomposed.
pub(crate) fn of_the_weights(
    init: &InitLoraWeights,
    spec: &ModelSpec,
    overlay: &Overlay,
    start: &Start<'_>,
    params: &mut [f32],
) -> Result<(), Error> {
    let mut weights = Vec::new();
    for (linear, change) in spec.linears().zip(&overlay.linears) {
        if let [LowRank { a: Factor::Trained(a), b: Factor::Trained(b), r, scale, .. }] = &change.low_rank[..] {
            weights.push((linear.name.as_str(), start.weight(spec, linear)?, a, b, *r, *scale));
        }
    }
    let seed = random::derive(0, start.seed);
    // The weights are read one by one as they are decomposed: in f32 they may be more than the memory holds.
    let factors: Vec<_> = weights
        .par_iter()
        .map(|(name, weight, _, _, r, scale)| {
            let (rows, cols) = (weight.rows(), weight.cols());
            let mut values = vec![0.0; rows * cols];
            weight.panel_f32(0..rows, 0..cols, &mut values);
            let seed = random::derive(seed, random::hash(name));
            let svd = match init {
                InitLoraWeights::Olora => return qr_factors(rows, cols, &values, *r),
                InitLoraWeights::Pissa(Some(iterations)) => {
                    Svd::randomised(rows, cols, &values, *r, *iterations, seed)?
                }
                _ => Svd::of_matrix(rows, cols, &values)?,
            };
            let (mut b, mut a) = svd.factors(*r);
            // As in PEFT both have their share of the scale.
            let share = (1.0 / f64::from(*scale).abs().sqrt()) as f32;
            a.iter_mut().for_each(|v| *v *= share);
            b.iter_mut().for_each(|v| *v *= share.copysign(*scale));
            Ok((b, a))
        })
        .collect::<Result<_, Error>>()?;
    for ((_, _, a, b, ..), (of_b, of_a)) in weights.iter().zip(factors) {
        params[(*a).clone()].copy_from_slice(&of_a);
        params[(*b).clone()].copy_from_slice(&of_b);
    }
    Ok(())
}

/// Kaiming's uniform distribution with a = √5 (He et al. 2015), the default of PyTorch's linear layer: ±1/sqrt(fan_in).
fn uniform(key: u64, fan_in: usize, values: &mut [f32]) {
    let bound = (1.0 / (fan_in as f64).sqrt()) as f32;
    for (i, value) in values.iter_mut().enumerate() {
        *value = random::symmetric(random::at(key, i as u64)) * bound;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(module: &str, init: InitLoraWeights, seed: u64) -> (Vec<f32>, Vec<f32>) {
        let (mut a, mut b) = (vec![f32::NAN; 16 * 576], vec![f32::NAN; 192 * 16]);
        init_lora(module, 16, &init, seed, &mut a, &mut b);
        (a, b)
    }

    fn deviation(values: &[f32]) -> f64 {
        (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    }

    fn largest(values: &[f32]) -> f32 {
        values.iter().fold(0.0, |m, v| m.max(v.abs()))
    }

    #[test]
    fn the_default_is_uniform_a_and_zero_b() {
        let (a, b) = start("q_proj", InitLoraWeights::Kaiming, 1);
        let bound = 1.0 / 576f32.sqrt();
        assert!(largest(&a) <= bound && largest(&a) > 0.99 * bound);
        assert!((deviation(&a) - f64::from(bound) / 3f64.sqrt()).abs() < 0.02 * f64::from(bound));
        assert!(b.iter().all(|&v| v == 0.0));
    }

    #[test]
    fn gaussian_has_the_deviation_one_over_r() {
        let (a, b) = start("q_proj", InitLoraWeights::Gaussian, 1);
        assert!((deviation(&a) - 1.0 / 16.0).abs() < 0.002);
        assert!(largest(&a) > 3.0 / 16.0);
        assert!(b.iter().all(|&v| v == 0.0));
    }

    #[test]
    fn false_leaves_both_as_fresh_linear_layers() {
        // PyTorch draws B in ±1/sqrt(r), its fan-in being the rank.
        let (a, b) = start("q_proj", InitLoraWeights::LinearDefault, 1);
        assert!(largest(&a) <= 1.0 / 576f32.sqrt());
        assert!(largest(&b) <= 0.25 && largest(&b) > 0.249);
        assert_ne!(a[..64], b[..64]);
    }

    #[test]
    fn seed_and_name_decide_and_nothing_else() {
        let (one, _) = start("q_proj", InitLoraWeights::Kaiming, 1);
        assert_eq!(one, start("q_proj", InitLoraWeights::Kaiming, 1).0);
        assert_ne!(one, start("q_proj", InitLoraWeights::Kaiming, 2).0);
        assert_ne!(one, start("k_proj", InitLoraWeights::Kaiming, 1).0);
    }
}
