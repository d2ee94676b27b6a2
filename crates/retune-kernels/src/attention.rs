//! Attention of sequences laid end to end, causal or to everything, with grouped heads and an optional sliding window.
//!
//! Queries are taken a block at a time against all the keys they see, so scores never exist beyond one block; the backward recomputes
//! them from the saved log-sum-exp (Dao et al. 2022, FlashAttention, section 3). Scores lie transposed, a row for each key and a column for
//! each query of the block: then keys, values and scores are multiplied where they lie, and what belongs to a query fills the lanes of vectors.

use std::ops::Range;
use std::sync::Arc;

use crate::gemm::{MatRef, Out, gemm_in_place, transpose_rows};
use crate::heads::{Heads, HeadsMut};
use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use crate::vector::{LANES, dot, exp, tanh};

/// Queries whose scores are held at once.
const BLOCK: usize = 64;

/// How a layer's scores are computed: products of queries and keys, times a factor, capped, with a bias, masked.
#[derive(Clone, Debug)]
pub struct Scores<'a> {
    /// Number of query heads.
    pub queries: usize,
    /// Key and value heads; each serves `queries / keys` query heads.
    pub keys: usize,
    pub head_dim: usize,
    /// Whether a query sees no key after its own position; otherwise it sees all keys of its segment.
    pub causal: bool,
    /// How many positions back a query sees, itself included. Only where it is causal.
    pub window: Option<usize>,
    /// Factor on the scores, usually 1 / sqrt(head_dim).
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)` (Bello et al. 2017, section 3.1).
    pub soft_cap: Option<f32>,
    /// For each query head, what each position between a key and the query takes from their score (Press et al. 2021, ALiBi).
    pub slopes: Option<Arc<[f32]>>,
    /// A bias for each distance between query and key. Not with a cap.
    pub distances: Option<Distances<'a>>,
}

/// A bias on the scores that depends on the query head and on how far apart query and key stand (Raffel et al. 2020, section 2.1).
#[derive(Clone, Copy, Debug)]
pub struct Distances<'a> {
    /// `[heads, Distances::row(most)]`: element `most − 1 + d` of a row is the bias where the query stands `d` positions after the key.
    /// What follows the distance `most − 1` is not used.
    pub values: &'a [f32],
    /// Keys of the longest segment.
    pub most: usize,
}

impl<'a> Distances<'a> {
    /// Elements of a head's row, for segments of up to `most` keys.
    pub fn row(most: usize) -> usize {
        // The last vector of queries reaches beyond the last query.
        2 * most + LANES
    }

    /// A head's row.
    fn of_head(&self, head: usize) -> &'a [f32] {
        let row = Self::row(self.most);
        &self.values[head * row..(head + 1) * row]
    }

    /// The element of a row for a block's first query and first key.
    fn first(&self, block: &Block) -> usize {
        self.most - 1 + block.position
    }
}

impl Scores<'_> {
    /// Causal attention without any of the options.
    pub fn new(queries: usize, keys: usize, head_dim: usize, scale: f32) -> Self {
        Self {
            queries,
            keys,
            head_dim,
            causal: true,
            window: None,
            scale,
            soft_cap: None,
            slopes: None,
            distances: None,
        }
    }

    fn slope(&self, head: usize) -> f32 {
        self.slopes.as_ref().map_or(0.0, |slopes| slopes[head])
    }

    /// Turns a block's products of queries and keys into its scores, up to the factor that is returned: without options it is `scale`,
    /// and no pass over the scores is needed.
    fn finish(&self, head: usize, block: &Block, products: &mut [f32]) -> f32 {
        let plain = self.soft_cap.is_none() && self.slopes.is_none();
        if !plain {
            cap_and_bias_columns(products, block, self.scale, self.soft_cap, self.slope(head));
        }
        let mut left = if plain { self.scale } else { 1.0 };
        if let Some(distances) = &self.distances {
            add_distance_columns(products, block, left, distances.of_head(head), distances.first(block));
            left = 1.0;
        }
        block.mask(self, products);
        left
    }
}

/// The slopes of ALiBi for any number of heads (Press et al. 2021): for 2ⁿ heads a geometric sequence that ends at 2⁻⁸, otherwise that of
/// the next lower power of two and then every second one of the next higher.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let power = if heads == 0 { 1 } else { 1 << heads.ilog2() };
    let sequence = |of: usize| (1..=of).map(move |i| (-8.0 * i as f64 / of as f64).exp2() as f32);
    sequence(power).chain(sequence(2 * power).step_by(2)).take(heads).collect()
}

/// A run of queries and the keys it sees: the last query stands where the last key does, each earlier one a key before, and sees no further
/// where attention is causal. Keys and values are prefix, cache and current tokens, or those of another text: they may be more than the
/// queries, and where all is seen also fewer.
#[derive(Clone, Debug)]
pub struct Segment {
    pub queries: Range<usize>,
    pub keys: Range<usize>,
}

impl Segment {
    fn blocks(&self) -> usize {
        self.queries.len().div_ceil(BLOCK)
    }
}

/// The block of queries a piece of work is about, and the keys it sees.
struct Block {
    /// Its first query, counted from the segment's first.
    first: usize,
    len: usize,
    /// First key seen by any query of the block, and one past the last.
    keys: Range<usize>,
    /// The key that the first query sees last, counted from the block's first key; beyond the last where all is seen.
    diagonal: usize,
    /// Where the first query stands, counted from the block's first key.
    position: usize,
}

impl Block {
    fn new(scores: &Scores, segment: &Segment, block: usize) -> Self {
        let first = block * BLOCK;
        let len = BLOCK.min(segment.queries.len() - first);
        if !scores.causal {
            let keys = segment.keys.len();
            let position = (keys + first).saturating_sub(segment.queries.len());
            return Self { first, len, keys: 0..keys, diagonal: keys, position };
        }
        let position = segment.keys.len() - segment.queries.len() + first;
        let low = scores.window.map_or(0, |w| (position + 1).saturating_sub(w));
        Self { first, len, keys: low..position + len, diagonal: position - low, position: position - low }
    }

    /// The keys in parts, and the first query whose scores with a part are computed: the later a part, the fewer queries see it, a vector
    /// of them less each time.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let parts = (0..self.len).step_by(LANES).map(|first| {
            let start = if first == 0 { 0 } else { self.diagonal + first };
            (start..self.seen(first / LANES), first)
        });
        // Where all is seen, the first part is all there is.
        parts.filter(|(keys, _)| !keys.is_empty())
    }

    /// How many keys the queries of a vector see.
    fn seen(&self, vector: usize) -> usize {
        (self.diagonal + (vector + 1) * LANES).min(self.keys.len())
    }

    /// Sets the scores of what a query does not see to −∞, among those that are computed.
    fn mask(&self, settings: &Scores, scores: &mut [f32]) {
        let window = settings.window.unwrap_or(usize::MAX);
        for (key, row) in scores.chunks_exact_mut(BLOCK).enumerate() {
            // Queries before the first do not reach this far; those from the end on no longer look back to it.
            let first = key.saturating_sub(self.diagonal);
            let end = key.saturating_add(window).saturating_sub(self.diagonal).min(self.len);
            row[first / LANES * LANES..first].fill(f32::NEG_INFINITY);
            row[end..self.len].fill(f32::NEG_INFINITY);
        }
    }
}

/// Where the queries of a vector stand, counted from the block's first key.
#[inline(always)]
fn query_positions(block: &Block, vector: usize) -> [f32; LANES] {
    std::array::from_fn(|i| (block.position + vector * LANES + i) as f32)
}

/// A block's scores `S: [keys, BLOCK]`, transposed: `K·Qᵀ` where `keys` are K's rows and `queries` the block's, unscaled. What no query of
/// a vector sees is left as it was.
fn transposed_product(keys: MatRef, queries: MatRef, block: &Block, d: usize, to: &mut [f32]) {
    scratch::with(Purpose::Heads, d * BLOCK, |memory| {
        let (queries, columns) = transpose_rows(queries, block.len, d, memory);
        for (part, first) in block.parts() {
            let to = Out::set(&mut to[part.start * BLOCK + first..], BLOCK);
            gemm_in_place(part.len(), columns - first, d, keys.from(part.start, 0), queries.from(0, first), to);
        }
    });
}

/// `Sᵀ·X: [block.len, d]` for a block's transposed scores and the rows `x: [keys, d]`.
fn scored_sum(scores: &[f32], x: MatRef, block: &Block, d: usize, to: &mut [f32]) {
    let scores = MatRef::rows(scores, BLOCK).t();
    for (part, first) in block.parts() {
        let to = &mut to[first * d..];
        let to = if first == 0 { Out::set(to, d) } else { Out::add(to, d) };
        gemm_in_place(block.len - first, d, part.len(), scores.from(first, part.start), x.from(part.start, 0), to);
    }
}

/// Adds `S·X: [keys, d]` for a block's transposed scores and the rows `x: [block.len, d]`.
fn add_scored_rows(scores: &[f32], x: MatRef, block: &Block, d: usize, to: &mut [f32]) {
    let scores = MatRef::rows(scores, BLOCK);
    for (part, first) in block.parts() {
        let to = Out::add(&mut to[part.start * d..], d);
        gemm_in_place(part.len(), d, block.len - first, scores.from(part.start, first), x.from(first, 0), to);
    }
}

multiversion! {
    /// Turns the products `[keys, BLOCK]` of a block's keys and queries into scaled, capped scores with a bias, which is 0 for the key at
    /// the query's own position: softmax is the same whatever constant is added for a query.
    fn cap_and_bias_columns(products: &mut [f32], block: &Block, scale: f32, cap: Option<f32>, slope: f32) {
        for vector in 0..block.len.div_ceil(LANES) {
            let products = &mut products[..block.seen(vector) * BLOCK];
            let positions = query_positions(block, vector);
            let into_cap = cap.map(|cap| (scale / cap, cap));
            for (key, row) in products.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                let row = &mut row.as_chunks_mut::<LANES>().0[vector];
                for i in 0..LANES {
                    let score = match into_cap {
                        Some((factor, cap)) => cap * tanh::<FMA>(factor * row[i]),
                        None => scale * row[i],
                    };
                    row[i] = score + slope * (key as f32 - positions[i]);
                }
            }
        }
    }
}

multiversion! {
    /// Turns the products `[keys, BLOCK]` of a block's keys and queries into scaled scores with a bias by distance: `biases` is a head's,
    /// and `first` its element for the first query and the first key.
    fn add_distance_columns(products: &mut [f32], block: &Block, scale: f32, biases: &[f32], first: usize) {
        for vector in 0..block.len.div_ceil(LANES) {
            let products = &mut products[..block.seen(vector) * BLOCK];
            for (key, row) in products.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                let row = &mut row.as_chunks_mut::<LANES>().0[vector];
                let start = first + vector * LANES - key;
                for (score, bias) in row.iter_mut().zip(&biases[start..start + LANES]) {
                    *score = scale * *score + bias;
                }
            }
        }
    }
}

multiversion! {
    /// Turns the scores `[keys, BLOCK]` of a block (and what fills their last vector) into exp(scale · (score − largest)), column by
    /// column; writes scale · largest and the sum of each.
    fn softmax_columns(scores: &mut [f32], block: &Block, scale: f32, largest: &mut [f32; BLOCK], sums: &mut [f32; BLOCK]) {
        for vector in 0..block.len.div_ceil(LANES) {
            let scores = &mut scores[..block.seen(vector) * BLOCK];
            let mut most = [f32::NEG_INFINITY; LANES];
            for row in scores.as_chunks::<BLOCK>().0 {
                let row = &row.as_chunks::<LANES>().0[vector];
                for i in 0..LANES {
                    most[i] = if row[i] <= most[i] { most[i] } else { row[i] };
                }
            }
            let mut sum = [0.0f32; LANES];
            for row in scores.as_chunks_mut::<BLOCK>().0 {
                let row = &mut row.as_chunks_mut::<LANES>().0[vector];
                for i in 0..LANES {
                    row[i] = exp::<FMA>(scale * (row[i] - most[i]));
                    sum[i] += row[i];
                }
            }
            largest.as_chunks_mut::<LANES>().0[vector] = most.map(|v| scale * v);
            sums.as_chunks_mut::<LANES>().0[vector] = sum;
        }
    }
}

multiversion! {
    fn scaled_copy(from: &[f32], factor: f32, to: &mut [f32]) {
        for (to, v) in to.iter_mut().zip(from) {
            *to = factor * v;
        }
    }
}

/// Calls `f` with every segment, query head and block of queries, on all threads; those with most keys first, so that threads end together.
fn for_each_block(scores: &Scores, segments: &[Segment], f: impl Fn(&Segment, usize, Block) + Sync) {
    let most = segments.iter().map(Segment::blocks).max().unwrap_or(0);
    let across = segments.len() * scores.queries;
    parallel::for_each(across * most, |piece| {
        let (block, piece) = (most - 1 - piece / across, piece % across);
        let (segment, head) = (&segments[piece / scores.queries], piece % scores.queries);
        if block < segment.blocks() {
            f(segment, head, Block::new(scores, segment, block));
        }
    });
}

/// The columns of rows that a block's matrix of queries, keys or values is: those of a head, from a row on.
fn matrix<'a>(heads: &Heads<'a>, row: usize, head: usize) -> MatRef<'a> {
    MatRef::rows(&heads.data[heads.layout.at(row, head)..], heads.layout.row)
}

/// Writes `out: [Tq, queries · head_dim]` and the log-sum-exp of each query's scores, `lse: [Tq, queries]`.
///
/// `q` has a row for each query, `k` and `v` one for each key; the segments cover all queries.
pub fn forward(
    settings: &Scores,
    segments: &[Segment],
    q: Heads,
    k: Heads,
    v: Heads,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (d, stride) = (settings.head_dim, settings.queries * settings.head_dim);
    let group = settings.queries / settings.keys;
    debug_assert!([q, k, v].iter().all(|heads| heads.layout.head_dim == d));
    let (out, lse) = (SharedMut::new(out), SharedMut::new(lse));
    for_each_block(settings, segments, |segment, head, block| {
        let token = segment.queries.start + block.first;
        let first_key = segment.keys.start + block.keys.start;
        let width = block.keys.len();
        scratch::with(Purpose::Scores, width * BLOCK, |scores| {
            transposed_product(matrix(&k, first_key, head / group), matrix(&q, token, head), &block, d, scores);
            let scale = settings.finish(head, &block, scores);
            let (mut largest, mut sums) = ([0.0; BLOCK], [0.0; BLOCK]);
            softmax_columns(scores, &block, scale, &mut largest, &mut sums);
            scratch::with(Purpose::Row, block.len * d, |result| {
                scored_sum(scores, matrix(&v, first_key, head / group), &block, d, result);
                for (i, row) in result.chunks_exact(d).enumerate() {
                    // SAFETY: one piece, one head of the block's tokens.
                    let (to, lse) = unsafe {
                        (
                            out.slice((token + i) * stride + head * d, d),
                            lse.slice((token + i) * settings.queries + head, 1),
                        )
                    };
                    scaled_copy(row, 1.0 / sums[i], to);
                    lse[0] = largest[i] + sums[i].ln();
                }
            });
        });
    });
}

/// What turns a block's scores into their gradients, besides the gradients of probabilities.
struct Softmax<'a> {
    /// Factor on the scores as they are given.
    given: f32,
    /// Factor on the products of queries and keys.
    scale: f32,
    slope: f32,
    lse: &'a [f32; BLOCK],
    /// Σ P ⊙ dP for each query, which is the product of its output and that one's gradient.
    delta: &'a [f32; BLOCK],
}

multiversion! {
    /// Adds the gradients P ⊙ (dP − D) of a block's scores to those of the biases by distance, where scores and gradients `[keys, BLOCK]`
    /// are still as they were given: `to` is a head's, and `first` its element for the first query and the first key.
    fn add_distance_gradients(scores: &[f32], gradients: &[f32], block: &Block, softmax: &Softmax, to: &mut [f32], first: usize) {
        for vector in 0..block.len.div_ceil(LANES) {
            let end = block.seen(vector) * BLOCK;
            let (lse, delta) = (softmax.lse.as_chunks::<LANES>().0[vector], softmax.delta.as_chunks::<LANES>().0[vector]);
            let queries = LANES.min(block.len - vector * LANES);
            let rows = scores[..end].as_chunks::<BLOCK>().0.iter().zip(gradients[..end].as_chunks::<BLOCK>().0);
            for (key, (s, g)) in rows.enumerate() {
                let (s, g) = (&s.as_chunks::<LANES>().0[vector], &g.as_chunks::<LANES>().0[vector]);
                let start = first + vector * LANES - key;
                for (i, to) in to[start..start + queries].iter_mut().enumerate() {
                    *to += exp::<FMA>(softmax.given * s[i] - lse[i]) * (g[i] - delta[i]);
                }
            }
        }
    }
}

multiversion! {
    /// P = exp(S − lse) and the gradient scale · P ⊙ (dP − D) of the products of queries and keys, in place, for a block's scores `[keys, BLOCK]`.
    fn gradient_columns(scores: &mut [f32], gradients: &mut [f32], block: &Block, softmax: &Softmax) {
        for vector in 0..block.len.div_ceil(LANES) {
            let end = block.seen(vector) * BLOCK;
            let (scores, gradients) = (&mut scores[..end], &mut gradients[..end]);
            let (lse, delta) = (softmax.lse.as_chunks::<LANES>().0[vector], softmax.delta.as_chunks::<LANES>().0[vector]);
            let (given, scale) = (softmax.given, softmax.scale);
            for (s, g) in scores.as_chunks_mut::<BLOCK>().0.iter_mut().zip(gradients.as_chunks_mut::<BLOCK>().0) {
                let (s, g) = (&mut s.as_chunks_mut::<LANES>().0[vector], &mut g.as_chunks_mut::<LANES>().0[vector]);
                for i in 0..LANES {
                    let p = exp::<FMA>(given * s[i] - lse[i]);
                    s[i] = p;
                    g[i] = scale * p * (g[i] - delta[i]);
                }
            }
        }
    }
}

multiversion! {
    /// The same for capped scores, where the cap's derivative 1 − (capped / cap)² is one more factor.
    fn capped_gradient_columns(scores: &mut [f32], gradients: &mut [f32], block: &Block, softmax: &Softmax, cap: f32) {
        for vector in 0..block.len.div_ceil(LANES) {
            let end = block.seen(vector) * BLOCK;
            let (scores, gradients) = (&mut scores[..end], &mut gradients[..end]);
            let (lse, delta) = (softmax.lse.as_chunks::<LANES>().0[vector], softmax.delta.as_chunks::<LANES>().0[vector]);
            let (scale, slope) = (softmax.scale, softmax.slope);
            let (positions, inverse) = (query_positions(block, vector), 1.0 / cap);
            let rows = scores.as_chunks_mut::<BLOCK>().0.iter_mut().zip(gradients.as_chunks_mut::<BLOCK>().0);
            for (key, (s, g)) in rows.enumerate() {
                let (s, g) = (&mut s.as_chunks_mut::<LANES>().0[vector], &mut g.as_chunks_mut::<LANES>().0[vector]);
                for i in 0..LANES {
                    let capped = (s[i] - slope * (key as f32 - positions[i])) * inverse;
                    // What is not seen has a score of −∞ and no gradient.
                    let capped = if s[i] == f32::NEG_INFINITY { 1.0 } else { capped };
                    let p = exp::<FMA>(s[i] - lse[i]);
                    s[i] = p;
                    g[i] = scale * (1.0 - capped * capped) * p * (g[i] - delta[i]);
                }
            }
        }
    }
}

/// What the backward reads: the forward's inputs and outputs.
pub struct Saved<'a> {
    pub q: Heads<'a>,
    pub k: Heads<'a>,
    pub v: Heads<'a>,
    pub out: &'a [f32],
    pub lse: &'a [f32],
}

/// In how many parts the blocks of a query head are worked on, each with gradients of keys and values of its own: a fixed number, so that
/// sums do not depend on the number of threads.
const PARTS: usize = 2;

/// Elements of memory that [`backward`] takes for each key and each of its `queries · head_dim`: gradients of keys and of values, head by head
/// and part by part.
pub const BACKWARD_SCRATCH: usize = 2 * PARTS;

/// Writes the gradients of queries, keys and values from the gradient `dout: [Tq, queries · head_dim]` of the output, and adds those of the
/// biases by distance to `ddistances`, which lie as [`Distances::values`] do. Keys that belong to no segment keep what their gradients held.
pub fn backward(
    settings: &Scores,
    segments: &[Segment],
    saved: &Saved,
    dout: &[f32],
    gradients: [HeadsMut; 3],
    ddistances: Option<&mut [f32]>,
) {
    let d = settings.head_dim;
    let group = settings.queries / settings.keys;
    debug_assert!(gradients.iter().all(|heads| heads.layout().head_dim == d));
    let [dq, dk, dv] = &gradients;
    let tokens = segments.iter().map(|s| s.keys.end).max().unwrap_or(0);
    let per_kind = tokens * settings.queries * d * BACKWARD_SCRATCH / 2;
    let pieces = settings.queries * PARTS;
    let distances = ddistances.as_ref().and(settings.distances).map_or(0, |distances| Distances::row(distances.most));
    let all_distances = segments.len() * pieces * distances;
    // Parts and query heads that share a key head add to the same gradient: each sums into a place of its own first.
    scratch::with(Purpose::HeadGradients, 2 * per_kind + all_distances, |own| {
        let (own_dk, own) = own.split_at_mut(per_kind);
        let (own_dv, own_distances) = own.split_at_mut(per_kind);
        let (own_dk, own_dv) = (SharedMut::new(own_dk), SharedMut::new(own_dv));
        let of_piece = SharedMut::new(&mut *own_distances);
        parallel::for_each(segments.len() * pieces, |piece| {
            let (segment, head, part) = (&segments[piece / pieces], piece % pieces / PARTS, piece % PARTS);
            let (start, len) = (own_start(settings, segment, head, part), segment.keys.len() * d);
            // SAFETY: one piece, one part of a head of the segment.
            let own = unsafe { [own_dk.slice(start, len), own_dv.slice(start, len)] };
            // SAFETY: one piece, its row.
            let ddistances = unsafe { of_piece.slice(piece * distances, distances) };
            part_backward(settings, segment, head, part, saved, dout, dq, own, ddistances);
        });
        if let Some(to) = ddistances.filter(|_| distances > 0) {
            let of_piece = own_distances.chunks_exact(distances);
            of_piece.enumerate().for_each(|(piece, from)| {
                let head = piece % pieces / PARTS;
                add_row(&mut to[head * distances..(head + 1) * distances], from);
            });
        }
        for segment in segments {
            let n = segment.keys.len();
            let rows = parallel::chunk_rows(n, 8);
            parallel::for_each(n.div_ceil(rows), |chunk| {
                for i in chunk * rows..((chunk + 1) * rows).min(n) {
                    let token = segment.keys.start + i;
                    for (to, from) in [(dk, own_dk), (dv, own_dv)] {
                        for key in 0..settings.keys {
                            // SAFETY: one piece, its tokens.
                            let to = unsafe { to.head(token, key) };
                            for shared in 0..group * PARTS {
                                let (head, part) = (key * group + shared / PARTS, shared % PARTS);
                                let start = own_start(settings, segment, head, part) + i * d;
                                // SAFETY: one piece, its tokens; the pieces above are done.
                                let from = unsafe { from.slice(start, d) };
                                if shared == 0 { to.copy_from_slice(from) } else { add_row(to, from) }
                            }
                        }
                    }
                }
            });
        }
    });
}

/// Where the gradient of a segment's keys by one part of a query head lies: `[keys, head_dim]` together.
fn own_start(settings: &Scores, segment: &Segment, head: usize, part: usize) -> usize {
    let keys = segment.keys.len();
    (segment.keys.start * settings.queries * PARTS + (head * PARTS + part) * keys) * settings.head_dim
}

/// Whether a block belongs to a part: 0 1 1 0 0 1 1 0 …, since later blocks see more keys.
fn belongs(block: usize, part: usize) -> bool {
    block.div_ceil(2) % PARTS == part
}

multiversion! {
    fn add_row(to: &mut [f32], from: &[f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t += f;
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn part_backward(
    settings: &Scores,
    segment: &Segment,
    head: usize,
    part: usize,
    saved: &Saved,
    dout: &[f32],
    dq: &HeadsMut,
    [own_dk, own_dv]: [&mut [f32]; 2],
    ddistances: &mut [f32],
) {
    let (d, stride) = (settings.head_dim, settings.queries * settings.head_dim);
    let group = settings.queries / settings.keys;
    own_dk.fill(0.0);
    own_dv.fill(0.0);
    ddistances.fill(0.0);
    for block in (0..segment.blocks()).filter(|&b| belongs(b, part)).map(|b| Block::new(settings, segment, b)) {
        let token = segment.queries.start + block.first;
        let first_key = segment.keys.start + block.keys.start;
        let start = token * stride + head * d;
        let width = block.keys.len();
        let (queries, out_gradients) = (matrix(&saved.q, token, head), MatRef::rows(&dout[start..], stride));
        let (keys, values) = (matrix(&saved.k, first_key, head / group), matrix(&saved.v, first_key, head / group));
        let (mut lse, mut delta) = ([0.0; BLOCK], [0.0; BLOCK]);
        for i in 0..block.len {
            let at = start + i * stride;
            delta[i] = dot(&dout[at..at + d], &saved.out[at..at + d]);
            lse[i] = saved.lse[(token + i) * settings.queries + head];
        }
        scratch::with(Purpose::Scores, width * BLOCK, |scores| {
            scratch::with(Purpose::ScoreGradients, width * BLOCK, |gradients| {
                transposed_product(keys, queries, &block, d, scores);
                transposed_product(values, out_gradients, &block, d, gradients);
                let (scale, slope) = (settings.scale, settings.slope(head));
                let given = settings.finish(head, &block, scores);
                let softmax = Softmax { given, scale, slope, lse: &lse, delta: &delta };
                if let Some(distances) = settings.distances.filter(|_| !ddistances.is_empty()) {
                    let first = distances.first(&block);
                    add_distance_gradients(scores, gradients, &block, &softmax, ddistances, first);
                }
                match settings.soft_cap {
                    None => gradient_columns(scores, gradients, &block, &softmax),
                    Some(cap) => capped_gradient_columns(scores, gradients, &block, &softmax, cap),
                }
                scratch::with(Purpose::Row, block.len * d, |rows| {
                    scored_sum(gradients, keys, &block, d, rows);
                    for (i, row) in rows.chunks_exact(d).enumerate() {
                        // SAFETY: one piece, one head of the block's tokens.
                        unsafe { dq.head(token + i, head) }.copy_from_slice(row);
                    }
                });
                let seen = block.keys.start * d..block.keys.end * d;
                add_scored_rows(gradients, queries, &block, d, &mut own_dk[seen.clone()]);
                add_scored_rows(scores, out_gradients, &block, d, &mut own_dv[seen]);
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heads::HeadLayout;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    fn reference(scores: &Scores, segments: &[Segment], q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let biases = scores.distances.map(|distances| to_f64(distances.values));
        biased_reference(scores, segments, [q, k, v], biases.as_deref())
    }

    fn biased_reference(
        scores: &Scores,
        segments: &[Segment],
        [q, k, v]: [&[f64]; 3],
        biases: Option<&[f64]>,
    ) -> Vec<f64> {
        let d = scores.head_dim;
        let biases = biases.zip(scores.distances.map(|distances| distances.most));
        let mut out = vec![0.0; q.len()];
        for segment in segments {
            for (i, t) in segment.queries.clone().enumerate() {
                let position = (segment.keys.len() + i).saturating_sub(segment.queries.len());
                let last = if scores.causal { position } else { segment.keys.len() - 1 };
                let first = scores.window.map_or(0, |w| (position + 1).saturating_sub(w));
                for h in 0..scores.queries {
                    let kv = h / (scores.queries / scores.keys);
                    let key = |j: usize, e: usize| ((segment.keys.start + j) * scores.keys + kv) * d + e;
                    let query = |e: usize| (t * scores.queries + h) * d + e;
                    let weight = |j: usize| {
                        let score = (0..d).map(|e| q[query(e)] * k[key(j, e)]).sum::<f64>() * f64::from(scores.scale);
                        let cap = scores.soft_cap.map(f64::from);
                        let score = cap.map_or(score, |cap| cap * (score / cap).tanh());
                        let slope = scores.slopes.as_ref().map_or(0.0, |slopes| slopes[h]);
                        let distance = biases
                            .map_or(0.0, |(biases, most)| biases[h * Distances::row(most) + most - 1 + position - j]);
                        (score + f64::from(slope) * j as f64 + distance).exp()
                    };
                    let weights: Vec<f64> = (first..=last).map(weight).collect();
                    let sum: f64 = weights.iter().sum();
                    for e in 0..d {
                        out[query(e)] = (first..=last).zip(&weights).map(|(j, w)| w / sum * v[key(j, e)]).sum();
                    }
                }
            }
        }
        out
    }

    /// The segments of sequences with these numbers of queries and keys, and how many there are in all.
    fn laid_end_to_end(lengths: &[(usize, usize)]) -> (Vec<Segment>, usize, usize) {
        let (mut segments, mut tq, mut tk) = (Vec::new(), 0, 0);
        for &(queries, keys) in lengths {
            segments.push(Segment { queries: tq..tq + queries, keys: tk..tk + keys });
            (tq, tk) = (tq + queries, tk + keys);
        }
        (segments, tq, tk)
    }

    /// Forward and backward on layouts of queries and of keys and values: the output, and the gradients.
    fn run(
        scores: &Scores,
        segments: &[Segment],
        [q, k, v]: [Heads; 3],
        dout: &[f32],
        gradients: [HeadsMut; 3],
    ) -> Vec<f32> {
        let mut out = vec![f32::NAN; dout.len()];
        let mut lse = vec![f32::NAN; dout.len() / scores.head_dim];
        forward(scores, segments, q, k, v, &mut out, &mut lse);
        backward(scores, segments, &Saved { q, k, v, out: &out, lse: &lse }, dout, gradients, None);
        out
    }

    fn check(scores: Scores, lengths: &[(usize, usize)]) {
        let (segments, tq, tk) = laid_end_to_end(lengths);
        let (wide, narrow) =
            (HeadLayout::dense(scores.queries, scores.head_dim), HeadLayout::dense(scores.keys, scores.head_dim));
        let (nq, nk) = (tq * wide.row, tk * narrow.row);
        let (q, k, v, dout) = (random(1, nq), random(2, nk), random(3, nk), random(4, nq));
        let (mut dq, mut dk, mut dv) = (vec![f32::NAN; nq], vec![f32::NAN; nk], vec![f32::NAN; nk]);
        let inputs = [Heads::new(&q, wide), Heads::new(&k, narrow), Heads::new(&v, narrow)];
        let gradients = [HeadsMut::new(&mut dq, wide), HeadsMut::new(&mut dk, narrow), HeadsMut::new(&mut dv, narrow)];
        let out = run(&scores, &segments, inputs, &dout, gradients);
        let (q64, k64, v64, g) = (to_f64(&q), to_f64(&k), to_f64(&v), to_f64(&dout));
        let error = relative_error(&out, &reference(&scores, &segments, &q64, &k64, &v64));
        assert!(error < 1e-5, "{scores:?} {lengths:?}: {error}");
        if nq + nk > 6000 {
            return;
        }
        let by_q = numeric_gradient(&q64, |q| dot(&reference(&scores, &segments, q, &k64, &v64), &g));
        let by_k = numeric_gradient(&k64, |k| dot(&reference(&scores, &segments, &q64, k, &v64), &g));
        let by_v = numeric_gradient(&v64, |v| dot(&reference(&scores, &segments, &q64, &k64, v), &g));
        for (name, ours, theirs) in [("dq", &dq, &by_q), ("dk", &dk, &by_k), ("dv", &dv, &by_v)] {
            let error = relative_error(ours, theirs);
            assert!(error < 2e-5, "{name} {scores:?} {lengths:?}: {error}");
        }
    }

    fn scores(queries: usize, keys: usize, head_dim: usize, window: Option<usize>) -> Scores<'static> {
        Scores { window, ..Scores::new(queries, keys, head_dim, 0.7) }
    }

    #[test]
    fn what_sees_everything_equals_the_reference() {
        let all = |scores: Scores<'static>| Scores { causal: false, ..scores };
        check(all(scores(1, 1, 2, None)), &[(1, 1)]);
        check(all(scores(4, 2, 6, None)), &[(5, 5), (1, 1), (17, 17)]);
        // Another text's keys, more and fewer than the queries.
        check(all(scores(2, 2, 5, None)), &[(3, 8), (9, 2), (1, 5), (40, 3)]);
        check(all(scores(1, 1, 4, None)), &[(80, 80), (70, 90), (90, 70)]);
        check(all(Scores { soft_cap: Some(0.8), ..scores(2, 1, 2, None) }), &[(150, 150)]);
    }

    #[test]
    fn biases_by_distance_and_their_gradients_equal_the_reference() {
        for (causal, lengths) in [
            (true, &[(5, 5), (1, 1), (17, 17)][..]),
            (false, &[(5, 5), (1, 1), (17, 17)]),
            // The queries are the last of the keys.
            (true, &[(3, 8), (1, 5)]),
            (true, &[(70, 70)]),
            (false, &[(70, 70)]),
        ] {
            for window in [None, Some(6)].into_iter().filter(|window| causal || window.is_none()) {
                let most = lengths.iter().map(|&(_, keys)| keys).max().unwrap();
                let values = random(9, 2 * Distances::row(most));
                let scores =
                    Scores { causal, distances: Some(Distances { values: &values, most }), ..scores(2, 1, 3, window) };
                check(scores.clone(), lengths);

                let (segments, tq, tk) = laid_end_to_end(lengths);
                let (wide, narrow) = (HeadLayout::dense(2, 3), HeadLayout::dense(1, 3));
                let (q, k, v, dout) = (random(1, tq * 6), random(2, tk * 3), random(3, tk * 3), random(4, tq * 6));
                let mut gradients = [vec![0.0; tq * 6], vec![0.0; tk * 3], vec![0.0; tk * 3]];
                let [dq, dk, dv] = &mut gradients;
                let gradients = [HeadsMut::new(dq, wide), HeadsMut::new(dk, narrow), HeadsMut::new(dv, narrow)];
                let [q, k, v] = [(&q, wide), (&k, narrow), (&v, narrow)].map(|(data, layout)| Heads::new(data, layout));
                let (mut out, mut lse) = (vec![0.0; tq * 6], vec![0.0; tq * 2]);
                forward(&scores, &segments, q, k, v, &mut out, &mut lse);
                // It is added to what is there.
                let mut ours = vec![0.5; values.len()];
                let saved = Saved { q, k, v, out: &out, lse: &lse };
                backward(&scores, &segments, &saved, &dout, gradients, Some(&mut ours));
                ours.iter_mut().for_each(|v| *v -= 0.5);
                let [q, k, v, g] = [q.data, k.data, v.data, &dout].map(to_f64);
                let by_values = numeric_gradient(&to_f64(&values), |values| {
                    dot(&biased_reference(&scores, &segments, [&q, &k, &v], Some(values)), &g)
                });
                let error = relative_error(&ours, &by_values);
                assert!(error < 2e-5, "{causal} {window:?} {lengths:?}: {error}");
            }
        }
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        check(scores(1, 1, 2, None), &[(1, 1)]);
        check(scores(4, 2, 6, None), &[(5, 5), (1, 1), (17, 17)]);
        check(scores(3, 1, 8, Some(3)), &[(9, 9), (2, 2)]);
        check(scores(2, 2, 5, None), &[(3, 8), (1, 5)]);
        check(scores(1, 1, 4, Some(10)), &[(80, 80)]);
        check(scores(2, 1, 2, None), &[(150, 150)]);
        check(scores(1, 1, 1, Some(70)), &[(140, 150)]);
        check(scores(2, 1, 300, None), &[(70, 75)]);
    }

    #[test]
    fn caps_and_biases_equal_the_reference() {
        for (soft_cap, biased) in [(Some(1.5), false), (None, true), (Some(0.8), true)] {
            let with = |scores: Scores<'static>| {
                let slopes = biased.then(|| alibi_slopes(scores.queries).into());
                Scores { soft_cap, slopes, ..scores }
            };
            check(with(scores(4, 2, 6, None)), &[(5, 5), (1, 1), (17, 17)]);
            check(with(scores(3, 1, 8, Some(3))), &[(9, 9), (2, 2)]);
            check(with(scores(2, 2, 5, None)), &[(3, 8), (1, 5)]);
            check(with(scores(1, 1, 4, Some(10))), &[(80, 80)]);
            check(with(scores(2, 1, 2, None)), &[(150, 150)]);
        }
    }

    #[test]
    fn heads_in_one_buffer_give_the_same_bits_as_heads_of_their_own() {
        for (queries, keys, d, in_turn) in [(4, 2, 6, false), (2, 2, 16, true), (3, 3, 5, true), (2, 1, 64, false)] {
            let (segments, tokens, _) = laid_end_to_end(&[(5, 5), (90, 90), (17, 17)]);
            // More columns than the heads take.
            let row = (queries + 2 * keys) * d + 7;
            let plane = |first, heads| HeadLayout { row, first, head: d, heads, head_dim: d };
            let turn = |first| HeadLayout { row, first, head: 3 * d, heads: queries, head_dim: d };
            let layouts = if in_turn {
                [turn(0), turn(d), turn(2 * d)]
            } else {
                [plane(3, queries), plane(3 + queries * d, keys), plane(3 + (queries + keys) * d, keys)]
            };
            let (inner, dout) = (random(1, tokens * row), random(2, tokens * queries * d));
            let taken = |from: &[f32], layout: HeadLayout| -> Vec<f32> {
                let heads = Heads::new(from, layout);
                (0..tokens).flat_map(|t| (0..layout.heads).flat_map(move |h| heads.head(t, h).to_vec())).collect()
            };
            let dense = layouts.map(|layout| HeadLayout::dense(layout.heads, d));
            let own = layouts.map(|layout| taken(&inner, layout));
            for options in [
                scores(queries, keys, d, None),
                scores(queries, keys, d, Some(20)),
                Scores { soft_cap: Some(2.0), ..scores(queries, keys, d, None) },
            ] {
                let mut own_gradients = own.clone().map(|own| vec![f32::NAN; own.len()]);
                let [dq, dk, dv] = &mut own_gradients;
                let gradients = [HeadsMut::new(dq, dense[0]), HeadsMut::new(dk, dense[1]), HeadsMut::new(dv, dense[2])];
                let inputs = std::array::from_fn(|i| Heads::new(&own[i], dense[i]));
                let expected = run(&options, &segments, inputs, &dout, gradients);

                let mut dinner = vec![0.5; tokens * row];
                let inputs = layouts.map(|layout| Heads::new(&inner, layout));
                let out = run(&options, &segments, inputs, &dout, HeadsMut::in_one(&mut dinner, layouts));
                assert!(out == expected);
                for (layout, expected) in layouts.into_iter().zip(&own_gradients) {
                    assert!(taken(&dinner, layout) == *expected, "{layout:?}");
                }
                let others = dinner.iter().filter(|&&v| v == 0.5).count();
                assert_eq!(others, 7 * tokens, "columns of others were written");
            }
        }
    }

    #[test]
    fn slopes_are_those_of_the_published_models() {
        assert_eq!(alibi_slopes(2), [0.0625, 0.003_906_25]);
        let expected: Vec<f32> = (1..=8).map(|i| 0.5f32.powi(i)).collect();
        assert_eq!(alibi_slopes(8), expected);
        let twelve = alibi_slopes(12);
        assert_eq!(twelve[..8], expected);
        for (slope, power) in twelve[8..].iter().zip([-0.5f32, -1.5, -2.5, -3.5]) {
            assert!((slope - power.exp2()).abs() < 1e-7);
        }
        assert!(alibi_slopes(0).is_empty() && alibi_slopes(1) == [0.003_906_25]);
    }
}
