//! Softmax cross-entropy over a block of rows of logits, in place.
//!
//! The head calls it on blocks of the label tokens, so that the logits of a pass never exist as a whole.

use crate::gemm::TILE_ROWS;
use crate::int8::{Int8Matrix, Int8Rows, Rounding};
use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::random;
use crate::vector::{LANES, exp, sum_lanes, tanh};

multiversion! {
    /// The largest logit.
    fn largest(row: &[f32]) -> f32 {
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
        largest
    }
}

multiversion! {
    /// The sum of `exp(logit − largest)`.
    fn sum_of_exponentials(row: &[f32], largest: f32) -> f32 {
        let mut sums = [0.0f32; LANES];
        let mut rest = 0.0;
        let mut blocks = row.chunks_exact(LANES);
        for block in blocks.by_ref() {
            for i in 0..LANES {
                sums[i] += exp::<FMA>(block[i] - largest);
            }
        }
        for &v in blocks.remainder() {
            rest += exp::<FMA>(v - largest);
        }
        sum_lanes(sums) + rest
    }
}

multiversion! {
    /// The same, and leaves the exponentials in the logits' place.
    fn exponentials(row: &mut [f32], largest: f32) -> f32 {
        let mut sums = [0.0f32; LANES];
        let mut rest = 0.0;
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
        sum_lanes(sums) + rest
    }
}

multiversion! {
    fn sum(values: &[f32]) -> f32 {
        let mut sums = [0.0f32; LANES];
        let mut blocks = values.chunks_exact(LANES);
        for block in blocks.by_ref() {
            for i in 0..LANES {
                sums[i] += block[i];
            }
        }
        sum_lanes(sums) + blocks.remainder().iter().sum::<f32>()
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

multiversion! {
    /// The probabilities of logits, exp(logit − largest) · inverse_sum; of capped ones times the cap's derivatives.
    fn probabilities(logits: &[f32], largest: f32, inverse_sum: f32, limit: Option<f32>, to: &mut [f32]) {
        for (to, v) in to.iter_mut().zip(logits) {
            *to = exp::<FMA>(*v - largest) * inverse_sum;
        }
        if let Some(limit) = limit {
            let inverse = 1.0 / limit;
            for (to, v) in to.iter_mut().zip(logits) {
                let capped = *v * inverse;
                *to *= 1.0 - capped * capped;
            }
        }
    }
}

/// The probability below which a run of the vocabulary is rare in a row. Runs of 640 of 262,144 tokens hold 0.0024 in the mean, and in most
/// rows nine tenths of them a thousandth of that.
const RARE: f32 = 1.0 / 1024.0;

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
        let largest = largest(logits);
        let sum = if gradient && soft_cap.is_none() {
            exponentials(logits, largest)
        } else {
            sum_of_exponentials(logits, largest)
        };
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

/// The same for a weight in 8 bits, whose input gradient is all that is wanted of the logits: quantizes the gradient but for the targets' own,
/// p − 1, which goes to `label_gradients: [R]` and is left out of `rows`. The logits are left as they are, or capped: a block of them is
/// larger than the caches, and writing probabilities in their place would cost as much as reading them.
///
/// The values are those of [`forward_backward`] followed by [`Int8Rows::quantize_gradient`], but for runs of the vocabulary that hold less
/// than [`RARE`] of a row's probability: most of them are left out, and the others stand for them, so that the mean is right.
pub fn forward_quantized(
    logits: &mut [f32],
    targets: &[u32],
    [losses, label_gradients]: [&mut [f32]; 2],
    soft_cap: Option<f32>,
    weight: &Int8Matrix,
    rows: &mut Int8Rows,
    rounding: Rounding,
) {
    /// A row of capped logits and what makes them probabilities.
    struct Row<'a> {
        logits: &'a [f32],
        /// The first row of its tile in the product that follows.
        first: &'a [f32],
        largest: f32,
        inverse_sum: f32,
        target: usize,
    }
    let vocab = weight.rows();
    if let Some(limit) = soft_cap {
        self::soft_cap(logits, limit);
    }
    let logits = &*logits;
    let (losses, labels) = (SharedMut::new(losses), SharedMut::new(label_gradients));
    let begin = |row: usize| {
        let target = targets[row] as usize;
        let of = |row: usize| &logits[row * vocab..][..vocab];
        let (first, logits) = (of(row / TILE_ROWS * TILE_ROWS), of(row));
        // SAFETY: one piece, its rows.
        let (loss, label) = unsafe { (losses.slice(row, 1), labels.slice(row, 1)) };
        let largest = largest(logits);
        let sum = sum_of_exponentials(logits, largest);
        loss[0] = largest + sum.ln() - logits[target];
        let inverse_sum = 1.0 / sum;
        probabilities(&logits[target..=target], largest, inverse_sum, soft_cap, label);
        label[0] -= soft_cap.map_or(1.0, |limit| 1.0 - (logits[target] / limit).powi(2));
        Row { logits, first, largest, inverse_sum, target }
    };
    rows.quantize_gradient_runs(targets.len(), weight, rounding, begin, |row, run, buffer| {
        let buffer = &mut buffer[..run.len()];
        probabilities(&row.logits[run.clone()], row.largest, row.inverse_sum, soft_cap, buffer);
        if run.contains(&row.target) {
            buffer[row.target - run.start] = 0.0;
        }
        // The draw is a hash of a logit, as that of stochastic rounding is: no state, no seed, another one at each step. Rows of a tile share it.
        let share = sum(buffer) / RARE;
        let draw = random::at(u64::from(row.first[run.start].to_bits()), run.start as u64);
        let weight = match 0.5 + 0.5 * random::symmetric(draw) {
            _ if share >= 1.0 || share.is_nan() => 1.0,
            draw if draw < share => 1.0 / share,
            _ => 0.0,
        };
        (buffer, weight)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::F32Panel;
    use crate::gemm::{Out, Term, gemm};
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
    fn the_quantized_gradient_is_that_of_the_gradient() {
        // Two runs, the second one with a target; weights with a scale for each row.
        let (vocab, k) = (1000, 24);
        let w = random(2, vocab * k);
        let weight = Int8Matrix::new(&F32Panel::new(&w, k), None, &[]);
        let targets = [3, 999, 511, 0, 640];
        let r = targets.len();
        let logits: Vec<f32> = random(1, r * vocab).iter().map(|v| v * 8.0).collect();
        for soft_cap in [None, Some(5.0)] {
            for rounding in [Rounding::Nearest, Rounding::Stochastic] {
                let product = |rows: &Int8Rows| {
                    let mut dx = vec![0.0; r * k];
                    gemm(r, k, &[Term::int8_plain(rows, &weight)], Out::set(&mut dx, k));
                    dx
                };
                let (mut gradient, mut losses, mut rows) = (logits.clone(), vec![0.0; r], Int8Rows::default());
                forward_backward(&mut gradient, &targets, &mut losses, true, soft_cap);
                let labels = gradient.chunks_mut(vocab).zip(targets);
                let labels: Vec<f32> = labels.map(|(row, t)| std::mem::take(&mut row[t as usize])).collect();
                rows.quantize_gradient(&gradient, vocab, r, &weight, rounding);
                let expected = product(&rows);
                let (mut read, mut again, mut label_gradients) = (logits.clone(), vec![0.0; r], vec![0.0; r]);
                let to = [&mut again[..], &mut label_gradients];
                forward_quantized(&mut read, &targets, to, soft_cap, &weight, &mut rows, rounding);
                assert!(again == losses && label_gradients == labels && product(&rows) == expected);
                assert!(expected.iter().any(|&v| v != 0.0));
            }
        }
    }

    #[test]
    fn of_rare_runs_a_few_stand_for_all() {
        // Ten runs: one holds nearly everything, each other one about a third of what is rare. All weights of a column are alike, so that a
        // row's product is its probability times one number.
        let (vocab, k, rows_of) = (6400, 4, 3000);
        let weight = Int8Matrix::new(&F32Panel::new(&vec![0.5; vocab * k], k), None, &[]);
        let targets = vec![7; rows_of];
        let mut logits: Vec<f32> = random(1, rows_of * vocab);
        for row in logits.chunks_mut(vocab) {
            row[..640].iter_mut().for_each(|v| *v += 8.0);
        }
        let (mut losses, mut labels, mut rows) = (vec![0.0; rows_of], vec![0.0; rows_of], Int8Rows::default());
        let to = [&mut losses[..], &mut labels];
        forward_quantized(&mut logits, &targets, to, None, &weight, &mut rows, Rounding::Stochastic);
        let (mut left_out, mut rare) = (0u32, 0u32);
        for row in 0..rows_of {
            for run in 1..10 {
                rare += 1;
                left_out += u32::from(rows.scales(row, run).0[0] == 0.0);
            }
            assert!(rows.scales(row, 0).0[0] > 0.0);
        }
        let share = 1.0 - f64::from(left_out) / f64::from(rare);
        assert!((0.2..0.5).contains(&share), "{share}");
        // Only what the rare runs add, in every row and in the mean.
        let mut dx = vec![0.0; rows_of * k];
        gemm(rows_of, k, &[Term::int8_plain(&rows, &weight)], Out::set(&mut dx, k));
        let (mut mean, mut expected) = (0.0, 0.0);
        for (row, dx) in logits.chunks(vocab).zip(dx.chunks(k)) {
            let most = largest(row);
            let sum = sum_of_exponentials(row, most);
            let first: f64 = (0..640).filter(|&i| i != 7).map(|i| f64::from((row[i] - most).exp() / sum)).sum();
            let others: f64 = (640..vocab).map(|i| f64::from((row[i] - most).exp() / sum)).sum();
            mean += f64::from(dx[0]) / 0.5 - first;
            expected += others;
        }
        assert!((mean / expected - 1.0).abs() < 0.05, "{} of what it should be", mean / expected);
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
