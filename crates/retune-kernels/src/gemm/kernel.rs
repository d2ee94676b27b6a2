//! The register tile of the matrix product, written once over a vector type and compiled for each instruction set.

use crate::isa::Isa;

/// Rows of a register tile.
pub const MR: usize = 6;
/// Vectors across a register tile: 6 × 4 accumulators leave room for the operands in 32 registers, 6 × 2 in 16.
const WIDE: usize = 4;
const NARROW: usize = 2;
/// Steps of a contraction from which it lasts longer than fetching the tile's target.
const LONG: usize = 64;
/// How many steps of a contraction ahead an operand that is not packed is fetched: each step may lie on a page of its own, where the machine
/// does not do so by itself.
pub(super) const AHEAD: usize = 16;

/// Steps of a contraction that are added between two steps of the operands' addresses, which would take turns with products on their ports.
pub(super) const TOGETHER: usize = 4;

/// A SIMD vector of f32.
pub(super) trait Vector: Copy {
    const LANES: usize;
    /// # Safety
    /// For every method: the machine has the instruction set, and pointers are valid for the lanes touched.
    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_first(from: *const f32, lanes: usize) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn store_first(self, to: *mut f32, lanes: usize);
    /// Stores past the caches, to an address that is a multiple of the vector's size.
    unsafe fn stream(self, to: *mut f32);
    /// `self + a * b`
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    unsafe fn times(self, other: Self) -> Self;
}

/// What a tile sums up: `A[mr, k] · B[k, cols]`.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Length of the contraction.
    pub k: usize,
    pub a: *const f32,
    pub a_row_stride: usize,
    pub a_k_stride: usize,
    /// Packed panel: `k` rows of `b_stride` elements, `cols` rounded up to whole vectors of them readable.
    pub b: *const f32,
    pub b_stride: usize,
}

/// Where a register tile `C[mr, cols]` goes.
#[derive(Clone, Copy)]
pub struct Target {
    pub c: *mut f32,
    pub stride: usize,
    /// What the product is added to, with the stride of C; null for nothing. It may be C itself.
    pub addend: *const f32,
    pub cols: usize,
    /// Whether C, whose tiles then begin at cache lines, is stored past the caches.
    pub streams: bool,
}

/// Elements of a vector.
pub fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 16,
        Isa::Avx2 | Isa::Portable => 8,
        Isa::Neon => 4,
    }
}

/// Columns of a packed panel of the right operand.
pub fn panel_width(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 16 * WIDE,
        Isa::Avx2 => 8 * NARROW,
        Isa::Portable => 8 * NARROW,
        Isa::Neon => 4 * WIDE,
    }
}

#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(segments: &[Segment], to: &Target) {
    // SAFETY: passed on from the caller.
    unsafe {
        if segments[0].k >= LONG {
            (0..ROWS).for_each(|row| fetch::<V, VECTORS>(to, row));
        }
        let mut acc = [[V::zero(); VECTORS]; ROWS];
        accumulate(&mut acc, segments);
        finish(acc, to);
    }
}

/// Has the cache line of an address fetched, where the machine can be asked to. Nothing is read: the address may be beyond the data.
#[inline(always)]
pub(super) fn prefetch(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint that never faults; every x86-64 machine has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    let _ = at;
}

/// Makes what was streamed visible to other threads before anything that this one does next.
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: every x86-64 machine has it.
        unsafe { std::arch::x86_64::_mm_sfence() };
    }
}

/// Has the cache lines of a row of a tile's target fetched, so that they are there when its sums are.
#[inline(always)]
pub(super) fn fetch<V: Vector, const VECTORS: usize>(to: &Target, row: usize) {
    if to.streams {
        return;
    }
    for j in 0..VECTORS {
        prefetch(to.c.wrapping_add(row * to.stride + j * V::LANES));
    }
}

/// Adds one step of a contraction.
#[inline(always)]
unsafe fn step<V: Vector, const ROWS: usize, const VECTORS: usize>(
    acc: &mut [[V; VECTORS]; ROWS],
    a: *const f32,
    a_row_stride: usize,
    b: *const f32,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        let mut columns = [V::zero(); VECTORS];
        for (j, column) in columns.iter_mut().enumerate() {
            *column = V::load(b.add(j * V::LANES));
        }
        for (i, row) in acc.iter_mut().enumerate() {
            let value = V::splat(*a.add(i * a_row_stride));
            for (sum, &column) in row.iter_mut().zip(&columns) {
                *sum = sum.add_product(value, column);
            }
        }
    }
}

/// All steps of a segment whose right operand is packed.
#[inline(always)]
unsafe fn packed_steps<V: Vector, const ROWS: usize, const VECTORS: usize, const A_K_STRIDE: usize>(
    acc: &mut [[V; VECTORS]; ROWS],
    segment: &Segment,
) {
    let b_stride = VECTORS * V::LANES;
    let (mut a, mut b) = (segment.a, segment.b);
    // SAFETY: passed on from the caller.
    unsafe {
        for _ in 0..segment.k / TOGETHER {
            for i in 0..TOGETHER {
                step(acc, a.add(A_K_STRIDE * i), segment.a_row_stride, b.add(b_stride * i));
            }
            a = a.add(A_K_STRIDE * TOGETHER);
            b = b.add(b_stride * TOGETHER);
        }
        for _ in 0..segment.k % TOGETHER {
            step(acc, a, segment.a_row_stride, b);
            a = a.add(A_K_STRIDE);
            b = b.add(b_stride);
        }
    }
}

/// Adds the products of `segments` to a tile's sums.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(super) unsafe fn accumulate<V: Vector, const ROWS: usize, const VECTORS: usize>(
    acc: &mut [[V; VECTORS]; ROWS],
    segments: &[Segment],
) {
    // SAFETY (whole body): the caller of `run` promises that the segments' pointers cover the tile's shape.
    unsafe {
        for segment in segments {
            // Where the right operand is packed and the left one lies in rows, or is packed too, addresses are constants.
            match (segment.b_stride == VECTORS * V::LANES, segment.a_k_stride) {
                (true, 1) => packed_steps::<V, ROWS, VECTORS, 1>(acc, segment),
                (true, MR) => packed_steps::<V, ROWS, VECTORS, MR>(acc, segment),
                (packed, _) => {
                    let (mut a, mut b) = (segment.a, segment.b);
                    for _ in 0..segment.k {
                        if !packed {
                            for j in 0..VECTORS {
                                prefetch(b.wrapping_add(AHEAD * segment.b_stride + j * V::LANES));
                            }
                        }
                        step(acc, a, segment.a_row_stride, b);
                        a = a.add(segment.a_k_stride);
                        b = b.add(segment.b_stride);
                    }
                }
            }
        }
    }
}

/// Stores a tile's sums of `cols` columns, plus the addend unless that is null.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(super) unsafe fn finish<V: Vector, const ROWS: usize, const VECTORS: usize>(
    mut acc: [[V; VECTORS]; ROWS],
    to: &Target,
) {
    let Target { c, stride, addend, cols, streams } = *to;
    // SAFETY (whole body): the caller promises that the pointers cover the tile's shape.
    unsafe {
        // Small loops with nothing to decide inside: they unroll, and the accumulators stay in registers throughout.
        let last = cols - (VECTORS - 1) * V::LANES;
        let full = last == V::LANES;
        let whole = if full { VECTORS } else { VECTORS - 1 };
        let one = V::splat(1.0);
        if !addend.is_null() {
            for (i, row) in acc.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    if j < VECTORS - 1 || full {
                        *sum = V::load(addend.add(i * stride + j * V::LANES)).add_product(*sum, one);
                    } else {
                        *sum = V::load_first(addend.add(i * stride + j * V::LANES), last).add_product(*sum, one);
                    }
                }
            }
        }
        if streams && full {
            for (i, row) in acc.iter().enumerate() {
                for (j, sum) in row.iter().enumerate() {
                    sum.stream(c.add(i * stride + j * V::LANES));
                }
            }
            return;
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                if j < whole {
                    sum.store(c.add(i * stride + j * V::LANES));
                } else {
                    sum.store_first(c.add(i * stride + j * V::LANES), last);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn rows<V: Vector, const VECTORS: usize>(segments: &[Segment], to: &Target, mr: usize) {
    // SAFETY: passed on from the caller.
    unsafe {
        match mr {
            1 => tile::<V, 1, VECTORS>(segments, to),
            2 => tile::<V, 2, VECTORS>(segments, to),
            3 => tile::<V, 3, VECTORS>(segments, to),
            4 => tile::<V, 4, VECTORS>(segments, to),
            5 => tile::<V, 5, VECTORS>(segments, to),
            _ => tile::<V, 6, VECTORS>(segments, to),
        }
    }
}

/// Computes one tile of `mr` ≤ [`MR`] rows and at most [`panel_width`] columns.
///
/// # Safety
/// `isa` is one this machine has; of each segment `a` covers `mr` rows and `k` steps at its strides and `b` covers `k` packed rows; `to.c`
/// and `to.addend`, unless null, cover `mr` rows of `to.cols` elements; `1 <= mr <= MR` and `1 <= to.cols <= panel_width(isa)`.
#[inline]
pub unsafe fn run(isa: Isa, segments: &[Segment], to: &Target, mr: usize) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the machine has the features, the caller promises the rest.
        Isa::Avx512 => unsafe { x86::avx512(segments, to, mr) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::avx2(segments, to, mr) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => unsafe { neon::run(segments, to, mr) },
        // SAFETY: as above.
        _ => unsafe {
            match to.cols.div_ceil(8) {
                1 => rows::<Portable, 1>(segments, to, mr),
                _ => rows::<Portable, 2>(segments, to, mr),
            }
        },
    }
}

#[derive(Clone, Copy)]
pub(super) struct Portable(pub [f32; 8]);

impl Vector for Portable {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 8])
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: eight readable elements, unaligned reads allowed.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, lanes: usize) -> Self {
        let mut values = [0.0; 8];
        for (i, value) in values.iter_mut().enumerate().take(lanes) {
            // SAFETY: `lanes` readable elements.
            *value = unsafe { *from.add(i) };
        }
        Self(values)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: eight writable elements, unaligned writes allowed.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, lanes: usize) {
        for (i, &value) in self.0.iter().enumerate().take(lanes) {
            // SAFETY: `lanes` writable elements.
            unsafe { *to.add(i) = value };
        }
    }

    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: eight writable elements.
        unsafe { self.store(to) }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        let mut sum = self.0;
        for ((sum, x), y) in sum.iter_mut().zip(a.0).zip(b.0) {
            *sum += x * y;
        }
        Self(sum)
    }

    #[inline(always)]
    unsafe fn times(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{Segment, Target, Vector, rows};
    use std::arch::aarch64::*;

    #[target_feature(enable = "neon")]
    pub unsafe fn run(segments: &[Segment], to: &Target, mr: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            match to.cols.div_ceil(4) {
                1 => rows::<float32x4_t, 1>(segments, to, mr),
                2 => rows::<float32x4_t, 2>(segments, to, mr),
                3 => rows::<float32x4_t, 3>(segments, to, mr),
                _ => rows::<float32x4_t, 4>(segments, to, mr),
            }
        }
    }

    // SAFETY: only reached from the function above, whose caller has checked the feature.
    impl Vector for float32x4_t {
        const LANES: usize = 4;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { vdupq_n_f32(0.0) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { vdupq_n_f32(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { vld1q_f32(from) }
        }

        #[inline(always)]
        unsafe fn load_first(from: *const f32, lanes: usize) -> Self {
            let mut values = [0.0; 4];
            unsafe {
                std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), lanes);
                vld1q_f32(values.as_ptr())
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { vst1q_f32(to, self) }
        }

        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, lanes: usize) {
            let mut values = [0.0; 4];
            unsafe {
                vst1q_f32(values.as_mut_ptr(), self);
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, lanes);
            }
        }

        #[inline(always)]
        unsafe fn stream(self, to: *mut f32) {
            unsafe { self.store(to) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { vfmaq_f32(self, a, b) }
        }

        #[inline(always)]
        unsafe fn times(self, other: Self) -> Self {
            unsafe { vmulq_f32(self, other) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Segment, Target, Vector, rows};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub unsafe fn avx512(segments: &[Segment], to: &Target, mr: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            match to.cols.div_ceil(16) {
                1 => rows::<__m512, 1>(segments, to, mr),
                2 => rows::<__m512, 2>(segments, to, mr),
                3 => rows::<__m512, 3>(segments, to, mr),
                _ => rows::<__m512, 4>(segments, to, mr),
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(segments: &[Segment], to: &Target, mr: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            match to.cols.div_ceil(8) {
                1 => rows::<__m256, 1>(segments, to, mr),
                _ => rows::<__m256, 2>(segments, to, mr),
            }
        }
    }

    // SAFETY (both impls): only reached from the functions above, whose callers have checked the features.
    impl Vector for __m512 {
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_first(from: *const f32, lanes: usize) -> Self {
            unsafe { _mm512_maskz_loadu_ps(((1u32 << lanes) - 1) as u16, from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, lanes: usize) {
            unsafe { _mm512_mask_storeu_ps(to, ((1u32 << lanes) - 1) as u16, self) }
        }

        #[inline(always)]
        unsafe fn stream(self, to: *mut f32) {
            unsafe { _mm512_stream_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }

        #[inline(always)]
        unsafe fn times(self, other: Self) -> Self {
            unsafe { _mm512_mul_ps(self, other) }
        }
    }

    #[inline(always)]
    unsafe fn first(lanes: usize) -> __m256i {
        unsafe {
            let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes as i32), index)
        }
    }

    impl Vector for __m256 {
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_first(from: *const f32, lanes: usize) -> Self {
            unsafe { _mm256_maskload_ps(from, first(lanes)) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, lanes: usize) {
            unsafe { _mm256_maskstore_ps(to, first(lanes), self) }
        }

        #[inline(always)]
        unsafe fn stream(self, to: *mut f32) {
            unsafe { _mm256_stream_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { _mm256_fmadd_ps(a, b, self) }
        }

        #[inline(always)]
        unsafe fn times(self, other: Self) -> Self {
            unsafe { _mm256_mul_ps(self, other) }
        }
    }
}
