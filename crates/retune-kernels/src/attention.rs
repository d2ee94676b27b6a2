//! Causal attention of sequences laid end to end, with grouped heads and an optional sliding window.
//!
//! Queries are taken a block at a time against all the keys they see, so scores never exist beyond one block; the backward recomputes
//! them from the saved log-sum-exp (Dao et al. 2022, FlashAttention, section 3). Scores lie transposed, a row for each key and a column for
//! each query of the block: then keys, values and scores are multiplied where they lie, and what belongs to a query fills the lanes of vectors.

use std::ops::Range;

use crate::gemm::{MatRef, Out, gemm_in_place, transpose_rows};
use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use crate::vector::{LANES, dot, exp};

/// Queries whose scores are held at once.
const BLOCK: usize = 64;

/// The heads of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub queries: usize,
    /// Key and value heads; each serves `queries / keys` query heads.
    pub keys: usize,
    pub head_dim: usize,
    /// How many positions back a query sees, itself included.
    pub window: Option<usize>,
    /// Factor on the scores, usually 1 / sqrt(head_dim).
    pub scale: f32,
}

/// A run of queries and the keys it sees: the last query sees the last key, each earlier one a key fewer. Keys and values are prefix,
/// cache and current tokens, so they may be more than the queries.
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
    /// The key that the first query sees last, counted from the block's first key.
    diagonal: usize,
}

impl Block {
    fn new(heads: &Heads, segment: &Segment, block: usize) -> Self {
        let first = block * BLOCK;
        let len = BLOCK.min(segment.queries.len() - first);
        let position = segment.keys.len() - segment.queries.len() + first;
        let low = heads.window.map_or(0, |w| (position + 1).saturating_sub(w));
        Self { first, len, keys: low..position + len, diagonal: position - low }
    }

    /// The keys in parts, and the first query whose scores with a part are computed: the later a part, the fewer queries see it, a vector
    /// of them less each time.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        (0..self.len).step_by(LANES).map(|first| {
            let start = if first == 0 { 0 } else { self.diagonal + first };
            (start..self.seen(first / LANES), first)
        })
    }

    /// How many keys the queries of a vector see.
    fn seen(&self, vector: usize) -> usize {
        (self.diagonal + (vector + 1) * LANES).min(self.keys.len())
    }

    /// Sets the scores of what a query does not see to −∞, among those that are computed.
    fn mask(&self, heads: &Heads, scores: &mut [f32]) {
        let window = heads.window.unwrap_or(usize::MAX);
        for (key, row) in scores.chunks_exact_mut(BLOCK).enumerate() {
            // Queries before the first do not reach this far; those from the end on no longer look back to it.
            let first = key.saturating_sub(self.diagonal);
            let end = key.saturating_add(window).saturating_sub(self.diagonal).min(self.len);
            row[first / LANES * LANES..first].fill(f32::NEG_INFINITY);
            row[end..self.len].fill(f32::NEG_INFINITY);
        }
    }
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
fn for_each_block(heads: &Heads, segments: &[Segment], f: impl Fn(&Segment, usize, Block) + Sync) {
    let most = segments.iter().map(Segment::blocks).max().unwrap_or(0);
    let across = segments.len() * heads.queries;
    parallel::for_each(across * most, |piece| {
        let (block, piece) = (most - 1 - piece / across, piece % across);
        let (segment, head) = (&segments[piece / heads.queries], piece % heads.queries);
        if block < segment.blocks() {
            f(segment, head, Block::new(heads, segment, block));
        }
    });
}

/// Writes `out: [Tq, queries · head_dim]` and the log-sum-exp of each query's scaled scores, `lse: [Tq, queries]`.
///
/// `q: [Tq, queries · head_dim]`, `k` and `v`: `[Tkv, keys · head_dim]`; the segments cover all queries.
pub fn forward(heads: &Heads, segments: &[Segment], q: &[f32], k: &[f32], v: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let (d, q_stride, k_stride) = (heads.head_dim, heads.queries * heads.head_dim, heads.keys * heads.head_dim);
    let group = heads.queries / heads.keys;
    let (out, lse) = (SharedMut::new(out), SharedMut::new(lse));
    for_each_block(heads, segments, |segment, head, block| {
        let token = segment.queries.start + block.first;
        let start = token * q_stride + head * d;
        let key_start = (segment.keys.start + block.keys.start) * k_stride + head / group * d;
        let width = block.keys.len();
        scratch::with(Purpose::Scores, width * BLOCK, |scores| {
            let (keys, queries) = (MatRef::rows(&k[key_start..], k_stride), MatRef::rows(&q[start..], q_stride));
            transposed_product(keys, queries, &block, d, scores);
            block.mask(heads, scores);
            let (mut largest, mut sums) = ([0.0; BLOCK], [0.0; BLOCK]);
            softmax_columns(scores, &block, heads.scale, &mut largest, &mut sums);
            scratch::with(Purpose::Row, block.len * d, |result| {
                scored_sum(scores, MatRef::rows(&v[key_start..], k_stride), &block, d, result);
                for (i, row) in result.chunks_exact(d).enumerate() {
                    // SAFETY: one piece, one head of the block's tokens.
                    let (to, lse) = unsafe {
                        (out.slice(start + i * q_stride, d), lse.slice((token + i) * heads.queries + head, 1))
                    };
                    scaled_copy(row, 1.0 / sums[i], to);
                    lse[0] = largest[i] + sums[i].ln();
                }
            });
        });
    });
}

multiversion! {
    /// P = exp(scale · S − lse) and dS = scale · P ⊙ (dP − D), in place, for a block's scores `[keys, BLOCK]`.
    fn gradient_columns(scores: &mut [f32], gradients: &mut [f32], block: &Block, scale: f32, lse: &[f32; BLOCK], delta: &[f32; BLOCK]) {
        for vector in 0..block.len.div_ceil(LANES) {
            let end = block.seen(vector) * BLOCK;
            let (scores, gradients) = (&mut scores[..end], &mut gradients[..end]);
            let (lse, delta) = (lse.as_chunks::<LANES>().0[vector], delta.as_chunks::<LANES>().0[vector]);
            for (s, g) in scores.as_chunks_mut::<BLOCK>().0.iter_mut().zip(gradients.as_chunks_mut::<BLOCK>().0) {
                let (s, g) = (&mut s.as_chunks_mut::<LANES>().0[vector], &mut g.as_chunks_mut::<LANES>().0[vector]);
                for i in 0..LANES {
                    let p = exp::<FMA>(scale * s[i] - lse[i]);
                    s[i] = p;
                    g[i] = scale * p * (g[i] - delta[i]);
                }
            }
        }
    }
}

/// What the backward reads: the forward's inputs and outputs.
pub struct Saved<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub out: &'a [f32],
    pub lse: &'a [f32],
}

/// In how many parts the blocks of a query head are worked on, each with gradients of keys and values of its own: a fixed number, so that
/// sums do not depend on the number of threads.
const PARTS: usize = 2;

/// Elements of memory that [`backward`] takes for each key and each of its `queries · head_dim`: gradients of keys and of values, head by head
/// and part by part.
pub const BACKWARD_SCRATCH: usize = 2 * PARTS;

/// Writes the gradients `dq: [Tq, queries · head_dim]`, `dk` and `dv: [Tkv, keys · head_dim]` from the gradient `dout` of the output.
/// Keys that belong to no segment keep what their gradients held.
pub fn backward(
    heads: &Heads,
    segments: &[Segment],
    saved: &Saved,
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (d, k_stride) = (heads.head_dim, heads.keys * heads.head_dim);
    let group = heads.queries / heads.keys;
    let tokens = segments.iter().map(|s| s.keys.end).max().unwrap_or(0);
    let per_kind = tokens * heads.queries * d * BACKWARD_SCRATCH / 2;
    // Parts and query heads that share a key head add to the same gradient: each sums into a place of its own first.
    scratch::with(Purpose::HeadGradients, 2 * per_kind, |own| {
        let (own_dk, own_dv) = own.split_at_mut(per_kind);
        let (own_dk, own_dv, dq) = (SharedMut::new(own_dk), SharedMut::new(own_dv), SharedMut::new(dq));
        let pieces = heads.queries * PARTS;
        parallel::for_each(segments.len() * pieces, |piece| {
            let (segment, head, part) = (&segments[piece / pieces], piece % pieces / PARTS, piece % PARTS);
            let (start, len) = (own_start(heads, segment, head, part), segment.keys.len() * d);
            // SAFETY: one piece, one part of a head of the segment.
            let own = unsafe { [own_dk.slice(start, len), own_dv.slice(start, len)] };
            part_backward(heads, segment, head, part, saved, dout, dq, own);
        });
        let (dk, dv) = (SharedMut::new(dk), SharedMut::new(dv));
        for segment in segments {
            let n = segment.keys.len();
            let rows = parallel::chunk_rows(n, 8);
            parallel::for_each(n.div_ceil(rows), |chunk| {
                for i in chunk * rows..((chunk + 1) * rows).min(n) {
                    let token = segment.keys.start + i;
                    for (to, from) in [(dk, own_dk), (dv, own_dv)] {
                        // SAFETY: one piece, its tokens.
                        let to = unsafe { to.slice(token * k_stride, k_stride) };
                        for (key, to) in to.chunks_exact_mut(d).enumerate() {
                            for shared in 0..group * PARTS {
                                let (head, part) = (key * group + shared / PARTS, shared % PARTS);
                                let start = own_start(heads, segment, head, part) + i * d;
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
fn own_start(heads: &Heads, segment: &Segment, head: usize, part: usize) -> usize {
    let keys = segment.keys.len();
    (segment.keys.start * heads.queries * PARTS + (head * PARTS + part) * keys) * heads.head_dim
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
    heads: &Heads,
    segment: &Segment,
    head: usize,
    part: usize,
    saved: &Saved,
    dout: &[f32],
    dq: SharedMut,
    [own_dk, own_dv]: [&mut [f32]; 2],
) {
    let (d, q_stride, k_stride) = (heads.head_dim, heads.queries * heads.head_dim, heads.keys * heads.head_dim);
    let group = heads.queries / heads.keys;
    own_dk.fill(0.0);
    own_dv.fill(0.0);
    for block in (0..segment.blocks()).filter(|&b| belongs(b, part)).map(|b| Block::new(heads, segment, b)) {
        let token = segment.queries.start + block.first;
        let start = token * q_stride + head * d;
        let key_start = (segment.keys.start + block.keys.start) * k_stride + head / group * d;
        let width = block.keys.len();
        let (queries, out_gradients) =
            (MatRef::rows(&saved.q[start..], q_stride), MatRef::rows(&dout[start..], q_stride));
        let keys = MatRef::rows(&saved.k[key_start..], k_stride);
        let values = MatRef::rows(&saved.v[key_start..], k_stride);
        let (mut lse, mut delta) = ([0.0; BLOCK], [0.0; BLOCK]);
        for i in 0..block.len {
            let at = start + i * q_stride;
            delta[i] = dot(&dout[at..at + d], &saved.out[at..at + d]);
            lse[i] = saved.lse[(token + i) * heads.queries + head];
        }
        scratch::with(Purpose::Scores, width * BLOCK, |scores| {
            scratch::with(Purpose::ScoreGradients, width * BLOCK, |gradients| {
                transposed_product(keys, queries, &block, d, scores);
                transposed_product(values, out_gradients, &block, d, gradients);
                block.mask(heads, scores);
                gradient_columns(scores, gradients, &block, heads.scale, &lse, &delta);
                scratch::with(Purpose::Row, block.len * d, |rows| {
                    scored_sum(gradients, keys, &block, d, rows);
                    for (i, row) in rows.chunks_exact(d).enumerate() {
                        // SAFETY: one piece, one head of the block's tokens.
                        unsafe { dq.slice(start + i * q_stride, d).copy_from_slice(row) };
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
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    fn reference(heads: &Heads, segments: &[Segment], q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let d = heads.head_dim;
        let mut out = vec![0.0; q.len()];
        for segment in segments {
            for (i, t) in segment.queries.clone().enumerate() {
                let last = segment.keys.len() - segment.queries.len() + i;
                let first = heads.window.map_or(0, |w| (last + 1).saturating_sub(w));
                for h in 0..heads.queries {
                    let kv = h / (heads.queries / heads.keys);
                    let key = |j: usize, e: usize| ((segment.keys.start + j) * heads.keys + kv) * d + e;
                    let query = |e: usize| (t * heads.queries + h) * d + e;
                    let weights: Vec<f64> = (first..=last)
                        .map(|j| {
                            ((0..d).map(|e| q[query(e)] * k[key(j, e)]).sum::<f64>() * f64::from(heads.scale)).exp()
                        })
                        .collect();
                    let sum: f64 = weights.iter().sum();
                    for e in 0..d {
                        out[query(e)] = (first..=last).zip(&weights).map(|(j, w)| w / sum * v[key(j, e)]).sum();
                    }
                }
            }
        }
        out
    }

    fn check(heads: Heads, lengths: &[(usize, usize)]) {
        let (mut segments, mut tq, mut tk) = (Vec::new(), 0, 0);
        for &(queries, keys) in lengths {
            segments.push(Segment { queries: tq..tq + queries, keys: tk..tk + keys });
            (tq, tk) = (tq + queries, tk + keys);
        }
        let (nq, nk) = (tq * heads.queries * heads.head_dim, tk * heads.keys * heads.head_dim);
        let (q, k, v, dout) = (random(1, nq), random(2, nk), random(3, nk), random(4, nq));
        let (mut out, mut lse) = (vec![0.0; nq], vec![0.0; tq * heads.queries]);
        forward(&heads, &segments, &q, &k, &v, &mut out, &mut lse);
        let (q64, k64, v64, g) = (to_f64(&q), to_f64(&k), to_f64(&v), to_f64(&dout));
        let error = relative_error(&out, &reference(&heads, &segments, &q64, &k64, &v64));
        assert!(error < 1e-5, "{heads:?} {lengths:?}: {error}");
        if nq + nk > 6000 {
            return;
        }
        let (mut dq, mut dk, mut dv) = (vec![f32::NAN; nq], vec![f32::NAN; nk], vec![f32::NAN; nk]);
        let saved = Saved { q: &q, k: &k, v: &v, out: &out, lse: &lse };
        backward(&heads, &segments, &saved, &dout, &mut dq, &mut dk, &mut dv);
        let by_q = numeric_gradient(&q64, |q| dot(&reference(&heads, &segments, q, &k64, &v64), &g));
        let by_k = numeric_gradient(&k64, |k| dot(&reference(&heads, &segments, &q64, k, &v64), &g));
        let by_v = numeric_gradient(&v64, |v| dot(&reference(&heads, &segments, &q64, &k64, v), &g));
        for (name, ours, theirs) in [("dq", &dq, &by_q), ("dk", &dk, &by_k), ("dv", &dv, &by_v)] {
            let error = relative_error(ours, theirs);
            assert!(error < 2e-5, "{name} {heads:?} {lengths:?}: {error}");
        }
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        let heads = |queries, keys, head_dim, window| Heads { queries, keys, head_dim, window, scale: 0.7 };
        check(heads(1, 1, 2, None), &[(1, 1)]);
        check(heads(4, 2, 6, None), &[(5, 5), (1, 1), (17, 17)]);
        check(heads(3, 1, 8, Some(3)), &[(9, 9), (2, 2)]);
        check(heads(2, 2, 5, None), &[(3, 8), (1, 5)]);
        check(heads(1, 1, 4, Some(10)), &[(80, 80)]);
        check(heads(2, 1, 2, None), &[(150, 150)]);
        check(heads(1, 1, 1, Some(70)), &[(140, 150)]);
        check(heads(2, 1, 300, None), &[(70, 75)]);
    }
}
