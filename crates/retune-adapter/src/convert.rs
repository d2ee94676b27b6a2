//! Changes of weights cut to the terms of a plain LoRA adapter.

use std::collections::BTreeMap;

use crate::config::{LoraConfig, MAX_RANK};
use crate::delta::{Deltas, LoraDelta, plain_lora};
use crate::error::Error;
use crate::files::Tensors;
use crate::svd::Svd;

/// How much of each change is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    /// The nearest change of at most this rank.
    Rank(usize),
    /// As many singular values, from the largest, as have this share of the sum of all squares.
    Energy(f64),
}

impl Keep {
    /// Checks the range.
    ///
    /// # Errors
    /// [`Error::Kept`].
    pub fn check(self) -> Result<(), Error> {
        let kept = |setting, found, expected| Err(Error::Kept { setting, found, expected });
        match self {
            Self::Rank(rank) if rank == 0 || rank > MAX_RANK => {
                kept("the rank", rank as f64, format!("1 to {MAX_RANK}"))
            }
            Self::Energy(share) if !(share > 0.0 && share <= 1.0) => {
                kept("the share of the energy", share, "a number above 0 and up to 1".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// The rank that is kept of these singular values, largest first.
    fn rank(self, singular_values: &[f64]) -> usize {
        match self {
            Self::Rank(rank) => rank.min(singular_values.len()).max(1),
            Self::Energy(share) => {
                let squares = singular_values.iter().map(|value| value.powi(2));
                let wanted = share * squares.clone().sum::<f64>();
                let mut sum = 0.0;
                let enough = squares.into_iter().position(|square| {
                    sum += square;
                    sum >= wanted
                });
                enough.map_or(singular_values.len(), |last| last + 1).max(1)
            }
        }
    }
}

/// What is kept of one module's change.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// Of scale 1.
    pub delta: LoraDelta,
    /// ‖change‖.
    pub norm: f64,
    /// ‖kept − change‖.
    pub away: f64,
}

/// A part of a norm; of a norm of zero nothing.
fn share(away: f64, norm: f64) -> f64 {
    if away == 0.0 { 0.0 } else { away / norm }
}

impl Kept {
    /// Of low-rank terms: all of it where nothing says otherwise, or nothing is to be cut.
    ///
    /// # Errors
    /// A change without a decomposition.
    pub fn of_terms(delta: LoraDelta, keep: Option<Keep>) -> Result<Self, Error> {
        let delta = delta.unscaled();
        let cuts = |keep: &Keep| !matches!(keep, Keep::Rank(rank) if *rank >= delta.r);
        let Some(keep) = keep.filter(cuts) else {
            return Ok(Self { norm: delta.norm(), away: 0.0, delta });
        };
        let LoraDelta { r, in_features, out_features, ref a, ref b, .. } = delta;
        let svd = Svd::of_product(out_features, in_features, r, b, a)?;
        let rank = keep.rank(svd.singular_values());
        let (b, a) = svd.factors(rank);
        let kept = LoraDelta { r: rank, in_features, out_features, scale: 1.0, a, b };
        Ok(Self { norm: delta.norm(), away: kept.distance(&delta), delta: kept })
    }

    /// Of a change `[out_features, in_features]`, row-major.
    ///
    /// # Errors
    /// A change without a decomposition.
    ///
    /// # Panics
    /// When the length does not fit.
    pub fn of_matrix(out_features: usize, in_features: usize, change: &[f32], keep: Keep) -> Result<Self, Error> {
        let svd = Svd::of_matrix(out_features, in_features, change)?;
        let r = keep.rank(svd.singular_values());
        let (b, a) = svd.factors(r);
        let delta = LoraDelta { r, in_features, out_features, scale: 1.0, a, b };
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value.powi(2)).sum::<f64>().sqrt();
        let away = norm(&mut delta.dense().iter().zip(change).map(|(&a, &b)| f64::from(a) - f64::from(b)));
        Ok(Self { delta, norm: norm(&mut change.iter().map(|&value| f64::from(value))), away })
    }

    /// ‖kept − change‖ / ‖change‖.
    pub fn error(&self) -> f64 {
        share(self.away, self.norm)
    }
}

/// Changes as a plain LoRA adapter holds them.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversion {
    /// The rank of every module: where less was kept, rows of A and columns of B are zero.
    pub r: usize,
    /// By the name of the module, not padded.
    pub modules: BTreeMap<String, Kept>,
}

impl Conversion {
    /// Of what is kept of each module.
    pub fn of(modules: BTreeMap<String, Kept>) -> Self {
        Self { r: modules.values().map(|kept| kept.delta.r).max().unwrap_or(1), modules }
    }

    /// ‖kept − change‖ / ‖change‖ over all modules together, and over what is left out beside them: the sum of its squares.
    pub fn error(&self, left_out: f64) -> f64 {
        let sum = |of: fn(&Kept) -> f64| self.modules.values().map(|kept| of(kept).powi(2)).sum::<f64>() + left_out;
        share(sum(|kept| kept.away).sqrt(), sum(|kept| kept.norm).sqrt())
    }

    /// The adapter's configuration, which names every module, and its tensors.
    pub fn adapter(&self) -> (LoraConfig, Tensors) {
        let padded = |(name, kept): (&String, &Kept)| (name.clone(), kept.delta.clone().padded(self.r));
        let deltas: Deltas = self.modules.iter().map(padded).collect();
        plain_lora(self.r, &deltas, deltas.keys().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_kernels::random;

    fn values(count: usize, seed: u64) -> Vec<f32> {
        (0..count).map(|i| random::symmetric(random::at(seed, i as u64))).collect()
    }

    fn change(r: usize, scale: f32) -> LoraDelta {
        let (in_features, out_features) = (24, 16);
        LoraDelta { r, in_features, out_features, scale, a: values(r * 24, 1), b: values(16 * r, 2) }
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn terms_are_kept_as_they_are_where_nothing_is_cut() {
        let change = change(4, -1.5);
        for keep in [None, Some(Keep::Rank(4)), Some(Keep::Rank(9))] {
            let kept = Kept::of_terms(change.clone(), keep).unwrap();
            assert_eq!((kept.delta.r, kept.delta.scale, kept.away), (4, 1.0, 0.0));
            assert_eq!(kept.delta.a, change.a);
            assert!(distance(&kept.delta.dense(), &change.dense()) < 1e-6 * kept.norm);
        }
    }

    #[test]
    fn what_is_cut_is_the_error_of_terms_and_of_matrices() {
        let change = change(6, 2.0);
        let dense = change.dense();
        let norm = distance(&dense, &vec![0.0; dense.len()]);
        for keep in [Keep::Rank(1), Keep::Rank(3), Keep::Rank(5), Keep::Energy(0.5), Keep::Energy(0.9)] {
            let terms = Kept::of_terms(change.clone(), Some(keep)).unwrap();
            let matrix = Kept::of_matrix(16, 24, &dense, keep).unwrap();
            assert_eq!(terms.delta.r, matrix.delta.r, "{keep:?}");
            for kept in [&terms, &matrix] {
                let away = distance(&kept.delta.dense(), &dense);
                assert!((kept.norm - norm).abs() < 1e-5 * norm && (kept.away - away).abs() < 1e-4 * norm, "{keep:?}");
                assert!(kept.error() > 0.05, "{keep:?}: {}", kept.error());
                if let Keep::Energy(share) = keep {
                    assert!(kept.error().powi(2) <= 1.0 - share + 1e-9, "{keep:?}: {}", kept.error());
                }
            }
            // One rank less would not do.
            if let (Keep::Energy(share), true) = (keep, terms.delta.r > 1) {
                let less = Kept::of_terms(change.clone(), Some(Keep::Rank(terms.delta.r - 1))).unwrap();
                assert!(less.error().powi(2) > 1.0 - share, "{keep:?}");
            }
        }
        assert!(Kept::of_matrix(16, 24, &dense, Keep::Energy(1.0)).unwrap().error() < 1e-6);
    }

    #[test]
    fn a_change_of_nothing_has_no_error() {
        let zero = vec![0.0; 16 * 24];
        for keep in [Keep::Rank(2), Keep::Energy(0.9)] {
            let kept = Kept::of_matrix(16, 24, &zero, keep).unwrap();
            assert_eq!((kept.error(), kept.norm), (0.0, 0.0));
        }
    }

    #[test]
    fn all_modules_get_the_largest_rank() {
        let modules = [("a".to_owned(), 2), ("b".to_owned(), 5)];
        let kept = modules.map(|(name, r)| (name, Kept::of_terms(change(r, 0.5), None).unwrap()));
        let conversion = Conversion::of(kept.into_iter().collect());
        let (config, tensors) = conversion.adapter();
        assert_eq!((config.r, config.lora_alpha, config.use_rslora), (5, 5.0, false));
        let deltas = crate::deltas(&config, &tensors).unwrap();
        for (name, kept) in &conversion.modules {
            assert_eq!((deltas[name].r, deltas[name].scale), (5, 1.0));
            assert!(deltas[name].distance(&kept.delta) < 1e-6 * kept.norm);
        }
        assert_eq!(conversion.error(0.0), 0.0);
        assert_eq!(conversion.error(1e12).round(), 1.0);
    }

    #[test]
    fn ranges_are_checked() {
        for keep in [Keep::Rank(0), Keep::Rank(1 << 20), Keep::Energy(0.0), Keep::Energy(1.1), Keep::Energy(f64::NAN)] {
            assert!(keep.check().is_err(), "{keep:?}");
        }
        assert!(Keep::Rank(1).check().is_ok() && Keep::Energy(1.0).check().is_ok());
    }
}
