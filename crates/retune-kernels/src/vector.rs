//! Elementwise arithmetic and reductions over slices that the operations share.

#[cfg(target_arch = "x86_64")]
use crate::isa::Isa;
use crate::multiversion;
use crate::parallel::{self, SharedMut};

/// Lanes of a reduction: a fixed number, so that a sum does not depend on the instruction set's width.
pub(crate) const LANES: usize = 16;

/// a · b + c, fused or not. What is not fused is two instructions, but fused without an instruction for it is a call.
#[inline(always)]
pub(crate) fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to about 2 units in the last place, written so that loops over it vectorise. Below −87 it gives 0, above 88 it saturates. `FMA`:
/// whether to use fused operations, as [`multiversion`](crate::multiversion) knows.
///
/// Cody and Waite range reduction to |r| ≤ ln 2 / 2, then a polynomial of degree 6 (Cephes `expf`).
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// 1.5 · 2²³: adding it rounds to an integer and leaves that integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.0 { -87.0 } else { clamped };
    let shifted = multiply_add::<FMA>(clamped, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = multiply_add::<FMA>(n, -LN2_LOW, multiply_add::<FMA>(n, -LN2_HIGH, clamped));
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = multiply_add::<FMA>(p, r, coefficient);
    }
    let value = multiply_add::<FMA>(p * r, r, r + 1.0);
    let exponent = (shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23;
    let result = value * f32::from_bits(exponent);
    // A NaN passes both comparisons unchanged and comes out as NaN, so that it is noticed further on.
    if x < -87.0 { 0.0 } else { result }
}

/// tanh x to about 3 units in the last place, written as [`exp`] is.
///
/// Near 0 an odd polynomial (Cephes `tanhf`), elsewhere 1 − 2 / (e^2|x| + 1).
#[inline(always)]
pub fn tanh<const FMA: bool>(x: f32) -> f32 {
    let magnitude = x.abs();
    let far = 1.0 - 2.0 / (exp::<FMA>(2.0 * magnitude) + 1.0);
    let square = x * x;
    let mut p = -5.704_988_7e-3;
    for coefficient in [2.063_908_8e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = multiply_add::<FMA>(p, square, coefficient);
    }
    let near = multiply_add::<FMA>(p * square, x, x);
    if magnitude < 0.625 { near } else { far.copysign(x) }
}

#[inline(always)]
pub(crate) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut sums = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Σ a ⊙ b over the shorter length. Written with intrinsics where there are any: of a sum over fixed lanes the compiler makes 128-bit code.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    match crate::isa::isa() {
        // SAFETY: `isa` returns a variant only when the machine has its features.
        Isa::Avx512 => return unsafe { x86::dot_avx512(a, b) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { x86::dot_avx2(a, b) },
        Isa::Portable | Isa::Neon => {}
    }
    let mut lanes = [0.0f32; LANES];
    let (a_blocks, b_blocks) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (x, y) in a_blocks.0.iter().zip(b_blocks.0) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    let done = a_blocks.0.len().min(b_blocks.0.len()) * LANES;
    sum_lanes(lanes) + a[done..].iter().zip(&b[done..]).map(|(x, y)| x * y).sum::<f32>()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
        let n = a.len().min(b.len());
        let mut sums = [_mm512_setzero_ps(); 4];
        let mut i = 0;
        // SAFETY: every load is below n, the masked one by its mask.
        unsafe {
            while i + 64 <= n {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let at = i + 16 * j;
                    *sum =
                        _mm512_fmadd_ps(_mm512_loadu_ps(a.as_ptr().add(at)), _mm512_loadu_ps(b.as_ptr().add(at)), *sum);
                }
                i += 64;
            }
            while i < n {
                let mask = if n - i >= 16 { u16::MAX } else { (1u16 << (n - i)) - 1 };
                let (x, y) =
                    (_mm512_maskz_loadu_ps(mask, a.as_ptr().add(i)), _mm512_maskz_loadu_ps(mask, b.as_ptr().add(i)));
                sums[0] = _mm512_fmadd_ps(x, y, sums[0]);
                i += 16;
            }
        }
        let [a, b, c, d] = sums;
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
        let n = a.len().min(b.len());
        let mut sums = [_mm256_setzero_ps(); 4];
        let mut i = 0;
        // SAFETY: every load is below n.
        unsafe {
            while i + 32 <= n {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let at = i + 8 * j;
                    *sum =
                        _mm256_fmadd_ps(_mm256_loadu_ps(a.as_ptr().add(at)), _mm256_loadu_ps(b.as_ptr().add(at)), *sum);
                }
                i += 32;
            }
        }
        let [w, x, y, z] = sums;
        let sum = _mm256_add_ps(_mm256_add_ps(w, x), _mm256_add_ps(y, z));
        let mut lanes = [0.0f32; 8];
        // SAFETY: eight elements.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        let rest: f32 = a[i..n].iter().zip(&b[i..n]).map(|(x, y)| x * y).sum();
        lanes.iter().sum::<f32>() + rest
    }
}

multiversion! {
    /// Σ values, over fixed lanes.
    pub fn sum(values: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let blocks = values.as_chunks::<LANES>();
        for block in blocks.0 {
            for i in 0..LANES {
                lanes[i] += block[i];
            }
        }
        sum_lanes(lanes) + blocks.1.iter().sum::<f32>()
    }
}

multiversion! {
    fn scale_piece(x: &mut [f32], factor: f32) {
        for v in x.iter_mut() {
            *v *= factor;
        }
    }
}

multiversion! {
    fn add_piece(to: &mut [f32], from: &[f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t += f;
        }
    }
}

multiversion! {
    fn sum_squares_piece(values: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let mut blocks = values.chunks_exact(LANES);
        for block in blocks.by_ref() {
            for i in 0..LANES {
                let v = f64::from(block[i]);
                lanes[i] += v * v;
            }
        }
        let rest: f64 = blocks.remainder().iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        lanes.iter().sum::<f64>() + rest
    }
}

/// Elements of a parallel piece; fixed, so that sums over pieces have one order.
const PIECE: usize = 1 << 15;

/// `to += from`, on all threads.
pub fn add(to: &mut [f32], from: &[f32]) {
    debug_assert_eq!(to.len(), from.len());
    let len = to.len();
    let shared = SharedMut::new(to);
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        add_piece(unsafe { shared.slice(start, n) }, &from[start..start + n]);
    });
}

/// `x *= factor`, on all threads.
pub fn scale(x: &mut [f32], factor: f32) {
    let len = x.len();
    let shared = SharedMut::new(x);
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        // SAFETY: pieces are disjoint.
        scale_piece(unsafe { shared.slice(start, PIECE.min(len - start)) }, factor);
    });
}

/// Σ v² in f64, over fixed pieces added up as a fixed tree, so that it does not depend on the number of threads.
pub fn sum_squares(values: &[f32]) -> f64 {
    if values.len() <= PIECE {
        return sum_squares_piece(values);
    }
    let (left, right) = values.split_at(values.len().div_ceil(PIECE) / 2 * PIECE);
    let (a, b) = rayon::join(|| sum_squares(left), || sum_squares(right));
    a + b
}

/// `to += scale · fromᵀ` for `to: [m, r]` and `from: [r, n]`, n being a multiple of m: row i of the transpose is added to row i mod m.
pub fn add_transposed(to: &mut [f32], from: &[f32], r: usize, scale: f32) {
    let (m, n) = (to.len() / r, from.len() / r);
    for first in (0..n).step_by(m.max(1)) {
        for (i, row) in to.chunks_exact_mut(r).enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                *v += scale * from[j * n + first + i];
            }
        }
    }
}

/// Adds the vector `bias: [n]` to the first n elements of `tokens` rows of `y`, which begin `row` elements apart.
pub fn add_bias(y: &mut [f32], row: usize, tokens: usize, bias: &[f32]) {
    let rows = parallel::chunk_rows(tokens, 16);
    let shared = SharedMut::new(y);
    parallel::for_each(tokens.div_ceil(rows), |piece| {
        for token in piece * rows..((piece + 1) * rows).min(tokens) {
            // SAFETY: pieces are disjoint.
            add_piece(unsafe { shared.slice(token * row, bias.len()) }, bias);
        }
    });
}

/// Adds the sums of the first n columns of `tokens` rows of `g`, which begin `row` elements apart, to `db: [n]`: the gradient of a bias.
pub fn add_column_sums(g: &[f32], row: usize, tokens: usize, db: &mut [f32]) {
    const COLUMNS: usize = 64;
    let n = db.len();
    let shared = SharedMut::new(db);
    parallel::for_each(n.div_ceil(COLUMNS), |piece| {
        let start = piece * COLUMNS;
        let width = COLUMNS.min(n - start);
        // SAFETY: pieces are disjoint.
        let db = unsafe { shared.slice(start, width) };
        (0..tokens).for_each(|token| add_piece(db, &g[token * row + start..][..width]));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, to_f64};

    #[test]
    fn exp_is_close_everywhere_and_keeps_nan() {
        for exp in [exp::<false>, exp::<true>] {
            for i in -8800..8800 {
                let x = i as f32 * 0.01 + 0.003;
                let expected = f64::from(x).exp();
                let error = (f64::from(exp(x)) - expected).abs();
                assert!(error <= 3e-7 * expected || (x < -87.0 && exp(x) == 0.0), "exp({x}) = {}", exp(x));
            }
            assert_eq!(exp(0.0), 1.0);
            assert_eq!(exp(f32::NEG_INFINITY), 0.0);
            assert!(exp(f32::NAN).is_nan());
        }
    }

    #[test]
    fn tanh_is_close_everywhere_and_keeps_nan() {
        for tanh in [tanh::<false>, tanh::<true>] {
            let small = (-150..0).map(|i| 2f32.powi(i) * 1.3);
            for x in (0..20_000).map(|i| i as f32 * 0.001 + 0.0003).chain(small) {
                let expected = f64::from(x).tanh();
                assert!((f64::from(tanh(x)) - expected).abs() <= 4e-7 * expected, "tanh({x}) = {}", tanh(x));
                assert_eq!(tanh(-x), -tanh(x));
            }
            assert_eq!([tanh(0.0), tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)], [0.0, 1.0, -1.0]);
            assert!(tanh(f32::NAN).is_nan());
        }
    }

    #[test]
    fn reductions_equal_plain_sums() {
        for n in [0, 1, 15, 16, 63, 64, 65, 1000, 70_001] {
            let (a, b) = (random(1, n), random(2, n));
            let expected: f64 = to_f64(&a).iter().zip(to_f64(&b)).map(|(x, y)| x * y).sum();
            assert!((f64::from(dot(&a, &b)) - expected).abs() < 1e-5 * (n as f64 + 1.0).sqrt(), "n = {n}");
            let total: f64 = to_f64(&a).iter().sum();
            assert!((f64::from(sum(&a)) - total).abs() < 1e-6 * (n as f64 + 1.0), "n = {n}");
            let squares: f64 = to_f64(&a).iter().map(|x| x * x).sum();
            assert!((sum_squares(&a) - squares).abs() < 1e-9 * (squares + 1.0), "n = {n}");
        }
    }

    #[test]
    fn a_transpose_is_added() {
        let mut to = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        add_transposed(&mut to, &[10.0, 20.0, 30.0, 40.0, 50.0, 60.0], 2, 0.5);
        assert_eq!(to, [6.0, 22.0, 13.0, 29.0, 20.0, 36.0]);
    }

    #[test]
    fn bias_is_added_to_rows_and_its_gradient_sums_columns() {
        // Rows that hold nothing else, and rows that do.
        for (t, n, row) in [(37, 70, 70), (37, 70, 101)] {
            // The last row ends with the columns in question.
            let (mut y, bias) = (random(1, (t - 1) * row + n), random(2, n));
            let before = y.clone();
            add_bias(&mut y, row, t, &bias);
            for i in 0..y.len() {
                let added = if i % row < n { bias[i % row] } else { 0.0 };
                assert_eq!(y[i], before[i] + added);
            }
            let mut db = vec![1.0; n];
            add_column_sums(&before, row, t, &mut db);
            for (j, db) in db.iter().enumerate() {
                let expected = 1.0 + (0..t).map(|i| f64::from(before[i * row + j])).sum::<f64>();
                assert!((f64::from(*db) - expected).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn vectors_are_scaled_whole() {
        let before = random(1, PIECE + 5);
        let mut x = before.clone();
        scale(&mut x, 0.5);
        assert!(x.iter().zip(&before).all(|(x, before)| *x == 0.5 * before));
    }
}
