//! The biases that a stack's buckets give to the distances between queries and keys, and back to the buckets' gradients.

use retune_kernels::attention::Distances;

use crate::model::Buckets;
use crate::run::Run;
use crate::saved::grow;

/// The biases of the stack that runs, by query head and distance, and their gradients, both as [`Distances`] has them.
#[derive(Default)]
pub(crate) struct Biases {
    /// Keys of the longest row.
    most: usize,
    values: Vec<f32>,
    gradients: Vec<f32>,
}

impl Biases {
    /// Looks the biases up for rows of up to `most` keys, and sets their gradients to zero.
    pub fn fill(&mut self, run: Run, buckets: &Buckets, most: usize, backward: bool) {
        let (spec, table) = (&buckets.spec, run.vector(buckets.table));
        let row = Distances::row(most);
        self.most = most;
        grow(&mut self.values, spec.heads * row);
        if backward {
            grow(&mut self.gradients, spec.heads * row);
            self.gradients[..spec.heads * row].fill(0.0);
        }
        for (at, bucket) in of_distances(buckets, most) {
            for (head, bias) in table[bucket * spec.heads..][..spec.heads].iter().enumerate() {
                self.values[head * row + at] = *bias;
            }
        }
    }

    /// What the attention reads.
    pub fn get(&self) -> Distances<'_> {
        Distances { values: &self.values, most: self.most }
    }

    /// What the attention reads, and where it adds the gradients.
    pub fn with_gradients(&mut self) -> (Distances<'_>, &mut [f32]) {
        (Distances { values: &self.values, most: self.most }, &mut self.gradients)
    }

    /// Adds the gradients of the buckets, which have gathered from all attentions of the stack, to `grads`.
    pub fn backward(&self, run: Run, buckets: &Buckets, grads: &mut [f32]) {
        let [Some(to)] = run.vector_gradients([buckets.table], grads) else { return };
        let (heads, row) = (buckets.spec.heads, Distances::row(self.most));
        for (at, bucket) in of_distances(buckets, self.most) {
            for (head, to) in to[bucket * heads..][..heads].iter_mut().enumerate() {
                *to += self.gradients[head * row + at];
            }
        }
    }
}

/// For each distance between tokens of rows of up to `most` keys, its place in a head's row and its bucket.
fn of_distances(buckets: &Buckets, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let last = most as isize - 1;
    (0..(2 * most).saturating_sub(1)).map(move |at| (at, buckets.spec.bucket(last - at as isize)))
}
