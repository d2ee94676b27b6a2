//! Causal attention of sequences laid end to end, with grouped heads and an optional sliding window.
//!
//! Queries are taken a block at a time against all the keys they see, so scores never exist beyond one block of rows; the backward
//! recomputes them from the saved log-sum-exp (Dao et al. 2022, FlashAttention, section 3).

use std::ops::Range;

use crate::gemm::{self, MatRef, Out, Packed, Rhs, Term, gemm_serial};
use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use crate::vector::{LANES, dot, exp, sum_lanes};

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
    first: usize,
    len: usize,
    /// First key seen by any query of the block, aligned down to a panel.
    low: usize,
    /// One past the last key seen.
    high: usize,
    /// Key position of the first query of the block.
    position: usize,
}

impl Block {
    fn new(heads: &Heads, segment: &Segment, block: usize) -> Self {
        let first = block * BLOCK;
        let len = BLOCK.min(segment.queries.len() - first);
        let position = segment.keys.len() - segment.queries.len() + first;
        let low = heads.window.map_or(0, |w| (position + 1).saturating_sub(w));
        let panel = gemm::panel_width();
        Self { first, len, low: low / panel * panel, high: position + len, position }
    }

    fn width(&self) -> usize {
        self.high - self.low
    }

    /// Columns of the score block that row `i` sees.
    fn seen(&self, heads: &Heads, i: usize) -> Range<usize> {
        let end = self.position + i + 1;
        let low = heads.window.map_or(0, |w| end.saturating_sub(w));
        low.max(self.low) - self.low..end - self.low
    }
}

multiversion! {
    /// Turns scores into exp(scale · (score − largest)), zero outside `seen`; returns scale · largest and the sum.
    fn softmax_row(row: &mut [f32], seen_start: usize, seen_end: usize, scale: f32) -> (f32, f32) {
        row[..seen_start].fill(0.0);
        row[seen_end..].fill(0.0);
        let row = &mut row[seen_start..seen_end];
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
        let mut blocks = row.chunks_exact_mut(LANES);
        for block in blocks.by_ref() {
            for i in 0..LANES {
                block[i] = exp(scale * (block[i] - largest));
                sums[i] += block[i];
            }
        }
        for v in blocks.into_remainder() {
            *v = exp(scale * (*v - largest));
            rest += *v;
        }
        (scale * largest, sum_lanes(sums) + rest)
    }
}

multiversion! {
    fn scale_row(row: &mut [f32], factor: f32) {
        for v in row.iter_mut() {
            *v *= factor;
        }
    }
}

/// Writes `out: [Tq, queries · head_dim]` and the log-sum-exp of each query's scaled scores, `lse: [Tq, queries]`.
///
/// `q: [Tq, queries · head_dim]`, `k` and `v`: `[Tkv, keys · head_dim]`; the segments cover all queries.
pub fn forward(heads: &Heads, segments: &[Segment], q: &[f32], k: &[f32], v: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let (d, q_stride, k_stride) = (heads.head_dim, heads.queries * heads.head_dim, heads.keys * heads.head_dim);
    let group = heads.queries / heads.keys;
    let (out, lse) = (SharedMut::new(out), SharedMut::new(lse));
    parallel::for_each(segments.len() * heads.queries, |piece| {
        let (segment, head) = (&segments[piece / heads.queries], piece % heads.queries);
        let n = segment.keys.len();
        let key_start = segment.keys.start * k_stride + head / group * d;
        let (keys_len, values_len) = (Packed::len(d, n), Packed::len(n, d));
        scratch::with(Purpose::Heads, keys_len + values_len, |memory| {
            let (for_keys, for_values) = memory.split_at_mut(keys_len);
            let keys = Packed::new(d, n, MatRef::rows(&k[key_start..], k_stride).t(), for_keys);
            let values = Packed::new(n, d, MatRef::rows(&v[key_start..], k_stride), for_values);
            for block in (0..segment.blocks()).map(|b| Block::new(heads, segment, b)) {
                let token = segment.queries.start + block.first;
                let start = token * q_stride + head * d;
                let width = block.width();
                scratch::with(Purpose::Scores, block.len * width, |scores| {
                    let queries = MatRef::rows(&q[start..], q_stride);
                    keys.product(block.len, 0..d, block.low..block.high, queries, Out::set(scores, width));
                    let mut inverse = [0.0; BLOCK];
                    for (i, row) in scores.chunks_exact_mut(width).enumerate() {
                        let seen = block.seen(heads, i);
                        let (largest, sum) = softmax_row(row, seen.start, seen.end, heads.scale);
                        inverse[i] = 1.0 / sum;
                        // SAFETY: one piece, one head of the segment's tokens.
                        unsafe { lse.slice((token + i) * heads.queries + head, 1)[0] = largest + sum.ln() };
                    }
                    scratch::with(Purpose::Row, block.len * d, |result| {
                        let probabilities = MatRef::rows(scores, width);
                        values.product(block.len, block.low..block.high, 0..d, probabilities, Out::set(result, d));
                        for (i, row) in result.chunks_exact_mut(d).enumerate() {
                            scale_row(row, inverse[i]);
                            // SAFETY: as above.
                            let to = unsafe { out.slice(start + i * q_stride, d) };
                            to.copy_from_slice(row);
                        }
                    });
                });
            }
        });
    });
}

multiversion! {
    /// P = exp(scale · S − lse) and dS = scale · P ⊙ (dP − D), in place, zero outside what is seen.
    fn gradient_row(scores: &mut [f32], gradients: &mut [f32], seen_start: usize, seen_end: usize, scale: f32, lse: f32, delta: f32) {
        for row in [&mut *scores, &mut *gradients] {
            row[..seen_start].fill(0.0);
            row[seen_end..].fill(0.0);
        }
        for (s, g) in scores[seen_start..seen_end].iter_mut().zip(&mut gradients[seen_start..seen_end]) {
            let p = exp(scale * *s - lse);
            *s = p;
            *g = scale * p * (*g - delta);
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
    let (d, q_stride, k_stride) = (heads.head_dim, heads.queries * heads.head_dim, heads.keys * heads.head_dim);
    let group = heads.queries / heads.keys;
    let tokens = segments.iter().map(|s| s.keys.end).max().unwrap_or(0);
    let per_kind = tokens * q_stride;
    // Query heads that share a key head add to the same gradient: each sums into a place of its own first.
    scratch::with(Purpose::HeadGradients, 2 * per_kind, |own| {
        let (own_dk, own_dv) = own.split_at_mut(per_kind);
        let (own_dk, own_dv, dq) = (SharedMut::new(own_dk), SharedMut::new(own_dv), SharedMut::new(dq));
        parallel::for_each(segments.len() * heads.queries, |piece| {
            let (segment, head) = (&segments[piece / heads.queries], piece % heads.queries);
            head_backward(heads, segment, head, saved, dout, dq, [own_dk, own_dv]);
        });
        let (dk, dv) = (SharedMut::new(dk), SharedMut::new(dv));
        for segment in segments {
            let n = segment.keys.len();
            parallel::for_each(n, |i| {
                let token = segment.keys.start + i;
                for (to, from) in [(dk, own_dk), (dv, own_dv)] {
                    // SAFETY: one piece, one token.
                    let to = unsafe { to.slice(token * k_stride, k_stride) };
                    for (key, to) in to.chunks_exact_mut(d).enumerate() {
                        for head in key * group..(key + 1) * group {
                            let start = own_start(heads, segment, head) + i * d;
                            // SAFETY: one piece, one token; the pieces above are done.
                            let from = unsafe { from.slice(start, d) };
                            if head == key * group { to.copy_from_slice(from) } else { add_row(to, from) }
                        }
                    }
                }
            });
        }
    });
}

/// Where a query head's own gradient of a segment's keys lies: `[keys, head_dim]` together.
fn own_start(heads: &Heads, segment: &Segment, head: usize) -> usize {
    (segment.keys.start * heads.queries + head * segment.keys.len()) * heads.head_dim
}

multiversion! {
    fn add_row(to: &mut [f32], from: &[f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t += f;
        }
    }
}

fn head_backward(
    heads: &Heads,
    segment: &Segment,
    head: usize,
    saved: &Saved,
    dout: &[f32],
    dq: SharedMut,
    own: [SharedMut; 2],
) {
    let (d, q_stride, k_stride) = (heads.head_dim, heads.queries * heads.head_dim, heads.keys * heads.head_dim);
    let n = segment.keys.len();
    let key_start = segment.keys.start * k_stride + head / (heads.queries / heads.keys) * d;
    let (across, along) = (Packed::len(d, n), Packed::len(n, d));
    // SAFETY: one piece, one head of the segment.
    let [own_dk, own_dv] = own.map(|own| unsafe { own.slice(own_start(heads, segment, head), n * d) });
    own_dk.fill(0.0);
    own_dv.fill(0.0);
    scratch::with(Purpose::Heads, 2 * across + along, |memory| {
        let (for_keys_t, rest) = memory.split_at_mut(across);
        let (for_values_t, for_keys) = rest.split_at_mut(across);
        let key_rows = MatRef::rows(&saved.k[key_start..], k_stride);
        let keys_t = Packed::new(d, n, key_rows.t(), for_keys_t);
        let values_t = Packed::new(d, n, MatRef::rows(&saved.v[key_start..], k_stride).t(), for_values_t);
        let keys = Packed::new(n, d, key_rows, for_keys);
        for block in (0..segment.blocks()).map(|b| Block::new(heads, segment, b)) {
            let token = segment.queries.start + block.first;
            let start = token * q_stride + head * d;
            let width = block.width();
            let size = block.len * width;
            scratch::with(Purpose::Scores, size, |scores| {
                scratch::with(Purpose::ScoreGradients, size, |gradients| {
                    let queries = MatRef::rows(&saved.q[start..], q_stride);
                    let out_gradients = MatRef::rows(&dout[start..], q_stride);
                    let columns = block.low..block.high;
                    keys_t.product(block.len, 0..d, columns.clone(), queries, Out::set(scores, width));
                    values_t.product(block.len, 0..d, columns.clone(), out_gradients, Out::set(gradients, width));
                    let rows = scores.chunks_exact_mut(width).zip(gradients.chunks_exact_mut(width));
                    for (i, (scores, gradients)) in rows.enumerate() {
                        let at = start + i * q_stride;
                        let delta = dot(&dout[at..at + d], &saved.out[at..at + d]);
                        let lse = saved.lse[(token + i) * heads.queries + head];
                        let seen = block.seen(heads, i);
                        gradient_row(scores, gradients, seen.start, seen.end, heads.scale, lse, delta);
                    }
                    scratch::with(Purpose::Row, block.len * d, |dq_rows| {
                        let ds = MatRef::rows(gradients, width);
                        keys.product(block.len, columns, 0..d, ds, Out::set(dq_rows, d));
                        for (i, row) in dq_rows.chunks_exact(d).enumerate() {
                            // SAFETY: one piece, one head of the segment's tokens.
                            unsafe { dq.slice(start + i * q_stride, d).copy_from_slice(row) };
                        }
                    });
                    let seen = block.low * d..block.high * d;
                    for (own, left, right) in
                        [(&mut *own_dk, &*gradients, queries), (&mut *own_dv, &*scores, out_gradients)]
                    {
                        let term = Term::new(block.len, MatRef::rows(left, width).t(), Rhs::View(right));
                        gemm_serial(width, d, &[term], Out::add(&mut own[seen.clone()], d));
                    }
                });
            });
        }
    });
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
