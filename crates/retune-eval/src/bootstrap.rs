//! How sure a difference between two models is that were scored on the same rows: the paired bootstrap (Efron and Tibshirani 1993, chapter 13).
//!
//! Rows are drawn with replacement as often as there are rows, and each draw's difference is computed; the percentile interval is what the middle
//! of these differences spans. Both models' scores of a row stay together, so that what makes a row hard for both cancels out.

use retune_kernels::random;
use serde::Serialize;

/// Draws of which an interval is made.
pub const RESAMPLES: usize = 10_000;
/// The share of the draws that lies within an interval.
pub const CONFIDENCE: f64 = 0.95;
/// Standard errors that a difference must have to be found four times in five at the level of 5%: the normal distribution's 97.5% and 80% quantiles.
const DETECTABLE: f64 = 1.959_963_984_540_054 + 0.841_621_233_572_914_3;

/// One row, scored by both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// What the second has more than the first, summed over what counts of the row.
    pub difference: f64,
    /// How much counts: a row's label tokens for a loss, 1 for a share of rows.
    pub weight: f64,
}

/// A difference, and how sure it is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    pub estimate: f64,
    pub low: f64,
    pub high: f64,
    /// The smallest difference that these rows would show four times in five.
    pub detectable: f64,
}

impl Difference {
    /// Whether the interval leaves out 0.
    pub fn is_sure(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

/// The difference over all rows, with the interval of [`RESAMPLES`] draws by a seed. `None` of no rows, or where nothing counts.
pub fn paired(rows: &[Pair], seed: u64) -> Option<Difference> {
    let key = random::derive(random::hash("bootstrap"), seed);
    let bound = rows.len() as u128;
    let draw = |place: usize| ((u128::from(random::at(key, place as u64)) * bound) >> 64) as usize;
    let draws = (0..RESAMPLES).map(|number| (0..rows.len()).map(move |row| draw(number * rows.len() + row)));
    paired_by(rows, draws)
}

/// As [`paired`], by draws that are given: of each the numbers of its rows.
pub fn paired_by<D: IntoIterator<Item = usize>>(
    rows: &[Pair],
    draws: impl IntoIterator<Item = D>,
) -> Option<Difference> {
    let estimate = mean(rows.iter())?;
    let of_draw = |draw: D| mean(draw.into_iter().filter_map(|row| rows.get(row)));
    let mut found: Vec<f64> = draws.into_iter().filter_map(of_draw).collect();
    found.sort_unstable_by(f64::total_cmp);
    let outside = (1.0 - CONFIDENCE) / 2.0;
    let (low, high) = (quantile(&found, outside)?, quantile(&found, 1.0 - outside)?);
    let middle = found.iter().sum::<f64>() / found.len() as f64;
    let squares = found.iter().map(|value| (value - middle).powi(2)).sum::<f64>();
    let error = (squares / (found.len().max(2) - 1) as f64).sqrt();
    Some(Difference { estimate, low, high, detectable: DETECTABLE * error })
}

fn mean<'a>(rows: impl Iterator<Item = &'a Pair>) -> Option<f64> {
    let (sum, weight) = rows.fold((0.0, 0.0), |(sum, weight), row| (sum + row.difference, weight + row.weight));
    (weight > 0.0).then(|| sum / weight)
}

/// A quantile of sorted values, between two of them by their distance (numpy's `linear`).
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * (sorted.len().checked_sub(1)?) as f64;
    let (below, part) = (place.floor(), place.fract());
    let (low, high) = (sorted.get(below as usize)?, sorted.get(place.ceil() as usize)?);
    Some(low + part * (high - low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_have_no_difference_and_constant_ones_no_interval() {
        let same = [Pair { difference: 0.0, weight: 3.0 }; 5];
        let found = paired(&same, 1).unwrap();
        assert_eq!((found.estimate, found.low, found.high, found.is_sure()), (0.0, 0.0, 0.0, false));
        let half = [Pair { difference: 1.0, weight: 2.0 }; 5];
        let found = paired(&half, 1).unwrap();
        assert_eq!((found.estimate, found.low, found.high, found.is_sure()), (0.5, 0.5, 0.5, true));
        assert_eq!(paired(&[], 1), None);
        assert_eq!(paired(&[Pair { difference: 0.0, weight: 0.0 }], 1), None);
    }

    #[test]
    fn the_seed_decides_the_draws_and_more_rows_narrow_the_interval() {
        let rows = |count: usize| -> Vec<Pair> {
            (0..count).map(|row| Pair { difference: (row % 7) as f64 - 2.0, weight: 1.0 }).collect()
        };
        let few = rows(28);
        assert_eq!(paired(&few, 3), paired(&few, 3));
        assert_ne!(paired(&few, 3), paired(&few, 4));
        let (few, many) = (paired(&few, 3).unwrap(), paired(&rows(280), 3).unwrap());
        assert_eq!((few.estimate, many.estimate), (1.0, 1.0));
        // The standard error of the mean of 28 values with a standard deviation of 2.
        assert!((few.detectable / DETECTABLE - 2.0 / 28.0_f64.sqrt()).abs() < 0.01, "{few:?}");
        assert!(many.high - many.low < 0.4 * (few.high - few.low));
    }
}
