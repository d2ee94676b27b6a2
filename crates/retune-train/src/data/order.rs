//! The order in which rows are taken, and the stream of random words behind it and behind the split.
//!
//! What a stream gives depends on the seed and on what it is for, on no draw made elsewhere, so a resumed run finds its place without
//! replaying.

use retune_kernels::random;

/// What a stream is for, so that one seed gives unrelated streams.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    Order = 1,
    Split = 2,
}

/// A stream of pseudo-random words.
pub(super) struct Stream {
    key: u64,
    drawn: u64,
}

impl Stream {
    pub(super) fn new(purpose: Purpose, seed: u64, number: u64) -> Self {
        let key = [purpose as u64, seed, number].into_iter().fold(0, random::derive);
        Stream { key, drawn: 0 }
    }

    fn draw(&mut self) -> u64 {
        let word = random::at(self.key, self.drawn);
        self.drawn += 1;
        word
    }

    /// A number below `bound`; the bias, at most bound / 2⁶⁴, is of no matter.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.draw()) * bound as u128) >> 64) as usize
    }

    /// The numbers below `n` in an order of this stream (Fisher and Yates).
    pub(super) fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut items: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            items.swap(last, self.below(last + 1));
        }
        items
    }
}

/// The order of `n` examples in an epoch counted from 0: another one for every seed and epoch, or 0..n when `shuffle` is false.
pub fn order(seed: u64, epoch: usize, n: usize, shuffle: bool) -> Vec<usize> {
    if shuffle { Stream::new(Purpose::Order, seed, epoch as u64).permutation(n) } else { (0..n).collect() }
}

/// The steps of an epoch: each takes `batch_size` · `gradient_accumulation_steps` examples in order, the last one what is left.
/// Losses are divided by the step's count of label tokens, so accumulation is nothing but a bigger step.
pub fn batches(
    order: &[usize],
    batch_size: usize,
    gradient_accumulation_steps: usize,
) -> impl Iterator<Item = &[usize]> {
    order.chunks(rows_per_step(batch_size, gradient_accumulation_steps))
}

/// How many steps [`batches`] makes of `n` examples.
pub fn steps_per_epoch(n: usize, batch_size: usize, gradient_accumulation_steps: usize) -> usize {
    n.div_ceil(rows_per_step(batch_size, gradient_accumulation_steps))
}

fn rows_per_step(batch_size: usize, gradient_accumulation_steps: usize) -> usize {
    batch_size.saturating_mul(gradient_accumulation_steps).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_depends_on_seed_and_epoch_and_never_changes() {
        // By an independent implementation of the generator.
        assert_eq!(order(42, 0, 10, true), [2, 3, 4, 0, 8, 1, 9, 7, 6, 5]);
        assert_eq!(order(42, 1, 10, true), [9, 8, 2, 0, 1, 7, 5, 4, 6, 3]);
        assert_eq!(order(43, 0, 10, true), [9, 3, 1, 8, 0, 2, 4, 5, 7, 6]);
        assert_eq!(order(42, 0, 4, false), [0, 1, 2, 3]);
        assert!(order(42, 0, 0, true).is_empty());
    }

    #[test]
    fn every_row_comes_once_an_epoch_and_goes_everywhere() {
        let n = 97;
        let mut first = vec![0; n];
        for epoch in 0..2000 {
            let order = order(7, epoch, n, true);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            first[order[0]] += 1;
        }
        // 2000 / 97 ≈ 20.6 each, standard deviation 4.5.
        assert!(first.iter().all(|&count| (2..50).contains(&count)), "{first:?}");
    }

    #[test]
    fn a_short_last_batch_is_kept() {
        let order: Vec<usize> = (0..7).collect();
        let steps: Vec<&[usize]> = batches(&order, 3, 1).collect();
        assert_eq!(steps, [&[0, 1, 2][..], &[3, 4, 5], &[6]]);
        let steps: Vec<&[usize]> = batches(&order, 2, 2).collect();
        assert_eq!(steps, [&[0, 1, 2, 3][..], &[4, 5, 6]]);
        for n in 0..20 {
            let order: Vec<usize> = (0..n).collect();
            assert_eq!(batches(&order, 3, 2).count(), steps_per_epoch(n, 3, 2));
        }
    }
}
