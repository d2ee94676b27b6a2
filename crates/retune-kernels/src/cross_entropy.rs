//! Softmax cross-entropy over a block of rows of logits, in place.
//!
//! The head calls it on blocks of the label tokens, so that the logits of a pass never exist as a whole.

use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::vector::{LANES, exp, sum_lanes, tanh};

multiversion! {
    /// The largest logit and the sum of `exp(logit − largest)`; the row is left holding those exponentials when `keep` is set.
    fn exponentials(row: &mut [f32], keep: bool) -> (f32, f32) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut blocks = row.chunks_exact(LANES);
        for block in blocks.by_ref() {
            for i in 0..LANES {
                // Not `f32::max`, which would drop a NaN.
                lanes[i] = if block[i] <= lanes[i] { lanes[i] } else { block[i] };
            }
        }
        let mut largest = f32::NEG_INFINITY;
        for &v in lanes.iter().chain(blocks.remainder()) {
            largest = if v <= largest { largest } else { v };
        }
        let mut sums = [0.0f32; LANES];
        let mut rest = 0.0;
        if keep {
            let mut blocks = row.chunks_exact_mut(LANES);
            for block in blocks.by_ref() {
                for i in 0..LANES {
                    block[i] = exp::<FMA>(block[i] - largest);
                    sums[i] += block[i];
                }
            }
            for v in blocks.into_remainder() {
                *v = exp::<FMA>(*v - largest);
                rest += *v;
            }
        } else {
            let mut blocks = row.chunks_exact(LANES);
            for block in blocks.by_ref() {
                for i in 0..LANES {
                    sums[i] += exp::<FMA>(block[i] - largest);
                }
            }
            for &v in blocks.remainder() {
                rest += exp::<FMA>(v - largest);
            }
        }
        (largest, sum_lanes(sums) + rest)
    }
}

multiversion! {
    fn scale(row: &mut [f32], factor: f32) {
        for v in row.iter_mut() {
            *v *= factor;
        }
    }
}

multiversion! {
    fn cap(row: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for v in row.iter_mut() {
            *v = cap * tanh::<FMA>(*v * inverse);
        }
    }
}

multiversion! {
    /// Turns capped logits into exp(logit − largest) · inverse_sum · (1 − (logit / cap)²): the probabilities, times the cap's derivatives.
    fn capped_gradient(row: &mut [f32], largest: f32, inverse_sum: f32, cap: f32) {
        let inverse = 1.0 / cap;
        for v in row.iter_mut() {
            let capped = *v * inverse;
            *v = exp::<FMA>(*v - largest) * inverse_sum * (1.0 - capped * capped);
        }
    }
}

/// Elements of a parallel piece of [`soft_cap`].
const PIECE: usize = 1 << 14;

/// Turns logits z into `limit · tanh(z / limit)`, on all threads.
pub fn soft_cap(logits: &mut [f32], limit: f32) {
    let len = logits.len();
    let shared = SharedMut::new(logits);
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        // SAFETY: pieces are disjoint.
        cap(unsafe { shared.slice(start, PIECE.min(len - start)) }, limit);
    });
}

/// For each row of `logits: [R, V]` writes the loss `logsumexp(row) − row[target]` to `losses: [R]`, and turns the row into the
/// gradient of the summed loss, `softmax(row) − onehot(target)`, when `gradient` is set (otherwise the logits stay as they are).
///
/// With `soft_cap` the loss is that of the logits `cap · tanh(z / cap)`, the gradient the one with respect to z, and logits that are not
/// turned into a gradient are left capped.
pub fn forward_backward(
    logits: &mut [f32],
    targets: &[u32],
    losses: &mut [f32],
    gradient: bool,
    soft_cap: Option<f32>,
) {
    let rows = targets.len();
    if rows == 0 {
        return;
    }
    let vocab = logits.len() / rows;
    let (logits, losses) = (SharedMut::new(logits), SharedMut::new(losses));
    parallel::for_each(rows, |row| {
        let target = targets[row] as usize;
        // SAFETY: one piece, one row.
        let (logits, loss) = unsafe { (logits.slice(row * vocab, vocab), losses.slice(row, 1)) };
        if let Some(limit) = soft_cap {
            cap(logits, limit);
        }
        let at_target = logits[target];
        // The cap's derivatives are computed from the capped logits: exponentials are not left in their place.
        let (largest, sum) = exponentials(logits, gradient && soft_cap.is_none());
        loss[0] = largest + sum.ln() - at_target;
        match soft_cap {
            _ if !gradient => {}
            None => {
                scale(logits, 1.0 / sum);
                logits[target] -= 1.0;
            }
            Some(limit) => {
                capped_gradient(logits, largest, 1.0 / sum, limit);
                logits[target] -= 1.0 - (at_target / limit).powi(2);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{numeric_gradient, random, relative_error, to_f64};

    fn reference(logits: &[f64], targets: &[u32]) -> Vec<f64> {
        let vocab = logits.len() / targets.len();
        logits
            .chunks(vocab)
            .zip(targets)
            .map(|(row, &t)| row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[t as usize])
            .collect()
    }

    #[test]
    fn loss_and_gradient_equal_the_reference() {
        for vocab in [2, 15, 16, 33, 100] {
            let targets = [1, 0, 1];
            let logits: Vec<f32> = random(1, 3 * vocab).iter().map(|v| v * 8.0).collect();
            let mut losses = vec![0.0; 3];
            let mut gradient = logits.clone();
            forward_backward(&mut gradient, &targets, &mut losses, true, None);
            assert!(relative_error(&losses, &reference(&to_f64(&logits), &targets)) < 1e-6);
            let expected = numeric_gradient(&to_f64(&logits), |x| reference(x, &targets).iter().sum());
            assert!(relative_error(&gradient, &expected) < 1e-5);
            let mut kept = logits.clone();
            let mut again = vec![0.0; 3];
            forward_backward(&mut kept, &targets, &mut again, false, None);
            assert!(kept == logits && again == losses);
        }
    }

    #[test]
    fn capped_loss_and_gradient_equal_the_reference() {
        for vocab in [2, 15, 16, 33, 100] {
            let (targets, limit) = ([1, 0, 1], 3.0);
            let logits: Vec<f32> = random(1, 3 * vocab).iter().map(|v| v * 8.0).collect();
            let capped = |x: &[f64]| x.iter().map(|z| 3.0 * (z / 3.0).tanh()).collect::<Vec<_>>();
            let mut losses = vec![0.0; 3];
            let mut gradient = logits.clone();
            forward_backward(&mut gradient, &targets, &mut losses, true, Some(limit));
            assert!(relative_error(&losses, &reference(&capped(&to_f64(&logits)), &targets)) < 1e-6);
            let expected = numeric_gradient(&to_f64(&logits), |x| reference(&capped(x), &targets).iter().sum());
            assert!(relative_error(&gradient, &expected) < 1e-5);
            let (mut left, mut again, mut alone) = (logits.clone(), vec![0.0; 3], logits.clone());
            forward_backward(&mut left, &targets, &mut again, false, Some(limit));
            soft_cap(&mut alone, limit);
            assert!(left == alone && again == losses);
            assert!(relative_error(&alone, &capped(&to_f64(&logits))) < 1e-6);
        }
    }

    #[test]
    fn a_nan_reaches_the_loss() {
        for soft_cap in [None, Some(5.0)] {
            let mut logits = random(1, 40);
            logits[7] = f32::NAN;
            let mut losses = vec![0.0; 1];
            forward_backward(&mut logits, &[3], &mut losses, true, soft_cap);
            assert!(losses[0].is_nan());
        }
    }
}
