//! The register tile of the product of 8-bit integers, written once over a vector type and compiled for each instruction set. The sums
//! are exact, so they are equal on all of them that take integers of as many bits.

use super::kernel::{MR, Portable, Segment, TOGETHER, Target, Vector, accumulate, fetch, finish};
use crate::int8::GROUP;
use crate::isa::Int8Isa;

/// A vector of sums of 32 bits.
trait Sums: Copy {
    type Float: Vector;
    /// Four bytes of the left operand in every lane.
    type Left: Copy;
    /// Four bytes of the right operand for each lane.
    type Right: Copy;
    /// # Safety
    /// For every method: the machine has the instruction set, and pointers are valid for the lanes touched.
    ///
    /// `offsets`: what the left operand's offset adds to each sum, negated.
    unsafe fn start(offsets: *const i32) -> Self;
    unsafe fn left(from: *const u8) -> Self::Left;
    unsafe fn right(from: *const i8) -> Self::Right;
    unsafe fn add_dots(self, left: Self::Left, right: Self::Right) -> Self;
    /// Two groups at once.
    #[inline(always)]
    unsafe fn add_two_dots(self, left: [Self::Left; 2], right: [Self::Right; 2]) -> Self {
        // SAFETY: passed on from the caller.
        unsafe { self.add_dots(left[0], right[0]).add_dots(left[1], right[1]) }
    }
    unsafe fn to_float(self) -> Self::Float;
}

/// One register tile `C[mr, cols] = row_scales · (A[mr, 4·groups] · B[4·groups, cols]) · col_scales + segments (+ addend)`.
pub struct Int8Tile<'a> {
    /// Length of the contraction in groups of four.
    pub groups: usize,
    /// Rows with the offset of the instruction set.
    pub a: *const u8,
    pub a_stride: usize,
    pub row_scales: *const f32,
    pub row_scale_stride: usize,
    /// For each group the four bytes of each column, [`GROUP`] bytes from one to the next.
    pub b: *const i8,
    pub offsets: *const i32,
    pub col_scales: *const f32,
    /// What is added in f32.
    pub segments: &'a [Segment],
    pub to: Target,
}

/// Adds two groups of four of the contraction.
#[inline(always)]
unsafe fn add_two_groups<S: Sums, const ROWS: usize, const VECTORS: usize>(
    acc: &mut [[S; VECTORS]; ROWS],
    a: *const u8,
    a_stride: usize,
    b: *const i8,
) {
    // SAFETY: as in `tile`.
    unsafe {
        let mut columns = [[S::right(b); 2]; VECTORS];
        for (j, columns) in columns.iter_mut().enumerate() {
            let b = b.add(4 * j * S::Float::LANES);
            *columns = [S::right(b), S::right(b.add(GROUP))];
        }
        for (i, row) in acc.iter_mut().enumerate() {
            let a = a.add(i * a_stride);
            let values = [S::left(a), S::left(a.add(4))];
            for (sums, &columns) in row.iter_mut().zip(&columns) {
                *sums = sums.add_two_dots(values, columns);
            }
        }
    }
}

/// Adds a group of four of the contraction.
#[inline(always)]
unsafe fn add_group<S: Sums, const ROWS: usize, const VECTORS: usize>(
    acc: &mut [[S; VECTORS]; ROWS],
    a: *const u8,
    a_stride: usize,
    b: *const i8,
) {
    // SAFETY: as in `tile`.
    unsafe {
        let mut columns = [S::right(b); VECTORS];
        for (j, column) in columns.iter_mut().enumerate() {
            *column = S::right(b.add(4 * j * S::Float::LANES));
        }
        for (i, row) in acc.iter_mut().enumerate() {
            let value = S::left(a.add(i * a_stride));
            for (sums, &column) in row.iter_mut().zip(&columns) {
                *sums = sums.add_dots(value, column);
            }
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Sums, const ROWS: usize, const VECTORS: usize>(t: &Int8Tile) {
    // SAFETY (whole body): the caller of `run` promises that the tile's pointers cover its shape.
    unsafe {
        let lanes = S::Float::LANES;
        let mut acc = [[S::start(t.offsets); VECTORS]; ROWS];
        for row in &mut acc {
            for (j, sums) in row.iter_mut().enumerate() {
                *sums = S::start(t.offsets.add(j * lanes));
            }
        }
        // A tile's target is fetched a row at a time: all of it at once would fill what the core keeps of lines on their way.
        let (mut a, mut b) = (t.a, t.b);
        let steps = t.groups / TOGETHER;
        for row in 0..ROWS {
            fetch::<S::Float, VECTORS>(&t.to, row);
            for _ in row * steps / ROWS..(row + 1) * steps / ROWS {
                for group in (0..TOGETHER).step_by(2) {
                    add_two_groups(&mut acc, a.add(4 * group), t.a_stride, b.add(GROUP * group));
                }
                a = a.add(4 * TOGETHER);
                b = b.add(GROUP * TOGETHER);
            }
        }
        for _ in 0..t.groups % TOGETHER {
            add_group(&mut acc, a, t.a_stride, b);
            a = a.add(4);
            b = b.add(GROUP);
        }
        let mut scales = [S::Float::zero(); VECTORS];
        for (j, scale) in scales.iter_mut().enumerate() {
            *scale = S::Float::load(t.col_scales.add(j * lanes));
        }
        let mut values = [[S::Float::zero(); VECTORS]; ROWS];
        for (i, (values, sums)) in values.iter_mut().zip(&acc).enumerate() {
            let row_scale = S::Float::splat(*t.row_scales.add(i * t.row_scale_stride));
            for ((value, sum), &scale) in values.iter_mut().zip(sums).zip(&scales) {
                *value = sum.to_float().times(scale).times(row_scale);
            }
        }
        accumulate(&mut values, t.segments);
        finish(values, &t.to);
    }
}

#[inline(always)]
unsafe fn rows<S: Sums, const VECTORS: usize>(t: &Int8Tile, mr: usize) {
    // SAFETY: passed on from the caller.
    unsafe {
        match mr {
            1 => tile::<S, 1, VECTORS>(t),
            2 => tile::<S, 2, VECTORS>(t),
            3 => tile::<S, 3, VECTORS>(t),
            4 => tile::<S, 4, VECTORS>(t),
            5 => tile::<S, 5, VECTORS>(t),
            _ => tile::<S, MR, VECTORS>(t),
        }
    }
}

/// Columns of a register tile.
pub fn tile_width(isa: Int8Isa) -> usize {
    match isa {
        Int8Isa::Avx512Vnni => 64,
        Int8Isa::AvxVnni | Int8Isa::Avx2 | Int8Isa::NeonDotprod | Int8Isa::Neon | Int8Isa::Portable => 16,
    }
}

/// Computes one tile of `mr` ≤ [`MR`] rows and at most [`tile_width`] columns.
///
/// # Safety
/// `isa` is one this machine has; `t.a` covers `mr` rows of `4 · t.groups` bytes, `t.b` covers `t.groups` groups, `t.offsets` and
/// `t.col_scales` cover `t.to.cols` rounded up to whole vectors, `t.row_scales` covers `mr` rows; `t.segments` and `t.to` are as
/// [`super::kernel::run`] wants them; `1 <= mr <= MR` and `1 <= t.to.cols <= tile_width(isa)`.
#[inline]
pub unsafe fn run(isa: Int8Isa, t: &Int8Tile, mr: usize) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the machine has the features, the caller promises the rest.
        Int8Isa::Avx512Vnni => unsafe { x86::avx512_vnni(t, mr) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Int8Isa::AvxVnni => unsafe { x86::avx_vnni(t, mr) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Int8Isa::Avx2 => unsafe { x86::avx2(t, mr) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Int8Isa::NeonDotprod => unsafe { neon::dotprod(t, mr) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Int8Isa::Neon => unsafe { neon::plain(t, mr) },
        // SAFETY: as above.
        _ => unsafe {
            match t.to.cols.div_ceil(8) {
                1 => rows::<[i32; 8], 1>(t, mr),
                _ => rows::<[i32; 8], 2>(t, mr),
            }
        },
    }
}

impl Sums for [i32; 8] {
    type Float = Portable;
    type Left = [u8; 4];
    type Right = [[i8; 4]; 8];

    #[inline(always)]
    unsafe fn start(offsets: *const i32) -> Self {
        // SAFETY: eight readable elements, unaligned reads allowed.
        unsafe { offsets.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn left(from: *const u8) -> Self::Left {
        // SAFETY: four readable bytes.
        unsafe { from.cast::<Self::Left>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn right(from: *const i8) -> Self::Right {
        // SAFETY: 32 readable bytes.
        unsafe { from.cast::<Self::Right>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn add_dots(self, left: Self::Left, right: Self::Right) -> Self {
        let mut sums = self;
        for (sum, four) in sums.iter_mut().zip(right) {
            for (a, b) in left.iter().zip(four) {
                *sum += i32::from(*a) * i32::from(b);
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn to_float(self) -> Portable {
        Portable(self.map(|v| v as f32))
    }
}

#[cfg(target_arch = "aarch64")]
pub use neon::sdot;

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{Int8Tile, Sums, rows};
    use std::arch::aarch64::*;
    use std::arch::asm;

    #[target_feature(enable = "neon,dotprod")]
    pub unsafe fn dotprod(t: &Int8Tile, mr: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            match t.to.cols.div_ceil(4) {
                1 => rows::<Four<true>, 1>(t, mr),
                2 => rows::<Four<true>, 2>(t, mr),
                3 => rows::<Four<true>, 3>(t, mr),
                _ => rows::<Four<true>, 4>(t, mr),
            }
        }
    }

    #[target_feature(enable = "neon")]
    pub unsafe fn plain(t: &Int8Tile, mr: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            match t.to.cols.div_ceil(4) {
                1 => rows::<Four<false>, 1>(t, mr),
                2 => rows::<Four<false>, 2>(t, mr),
                3 => rows::<Four<false>, 3>(t, mr),
                _ => rows::<Four<false>, 4>(t, mr),
            }
        }
    }

    /// Adds the products of four neighbouring bytes each to four sums. The function for it, `vdotq_s32`, is not stable yet.
    ///
    /// # Safety
    /// The machine has dot products.
    #[inline(always)]
    pub unsafe fn sdot(mut sums: int32x4_t, left: int8x16_t, right: int8x16_t) -> int32x4_t {
        // SAFETY: nothing but registers is touched.
        unsafe {
            asm!(
                "sdot {sums:v}.4s, {left:v}.16b, {right:v}.16b",
                sums = inout(vreg) sums,
                left = in(vreg) left,
                right = in(vreg) right,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sums
    }

    /// Four sums, added to by one instruction or by several.
    #[derive(Clone, Copy)]
    struct Four<const DOTPROD: bool>(int32x4_t);

    // SAFETY: only reached from the functions above, whose callers have checked the features.
    impl<const DOTPROD: bool> Sums for Four<DOTPROD> {
        type Float = float32x4_t;
        /// Signed: the instructions take two of them.
        type Left = int8x16_t;
        type Right = int8x16_t;

        #[inline(always)]
        unsafe fn start(_offsets: *const i32) -> Self {
            unsafe { Self(vdupq_n_s32(0)) }
        }

        #[inline(always)]
        unsafe fn left(from: *const u8) -> Self::Left {
            unsafe {
                let offset = vreinterpretq_s8_u32(vdupq_n_u32(from.cast::<u32>().read_unaligned()));
                veorq_s8(offset, vdupq_n_s8(i8::MIN))
            }
        }

        #[inline(always)]
        unsafe fn right(from: *const i8) -> Self::Right {
            unsafe { vld1q_s8(from) }
        }

        #[inline(always)]
        unsafe fn add_dots(self, left: Self::Left, right: Self::Right) -> Self {
            unsafe {
                if DOTPROD {
                    return Self(sdot(self.0, left, right));
                }
                let low = vmull_s8(vget_low_s8(left), vget_low_s8(right));
                let high = vmull_high_s8(left, right);
                Self(vaddq_s32(self.0, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))))
            }
        }

        #[inline(always)]
        unsafe fn to_float(self) -> float32x4_t {
            unsafe { vcvtq_f32_s32(self.0) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Int8Tile, Sums, rows};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    pub unsafe fn avx512_vnni(t: &Int8Tile, mr: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            match t.to.cols.div_ceil(16) {
                1 => rows::<__m512i, 1>(t, mr),
                2 => rows::<__m512i, 2>(t, mr),
                3 => rows::<__m512i, 3>(t, mr),
                _ => rows::<__m512i, 4>(t, mr),
            }
        }
    }

    #[target_feature(enable = "avxvnni,avx2,fma")]
    pub unsafe fn avx_vnni(t: &Int8Tile, mr: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            match t.to.cols.div_ceil(8) {
                1 => rows::<Vnni256, 1>(t, mr),
                _ => rows::<Vnni256, 2>(t, mr),
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(t: &Int8Tile, mr: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            match t.to.cols.div_ceil(8) {
                1 => rows::<Plain256, 1>(t, mr),
                _ => rows::<Plain256, 2>(t, mr),
            }
        }
    }

    #[derive(Clone, Copy)]
    struct Vnni256(__m256i);

    #[derive(Clone, Copy)]
    struct Plain256(__m256i);

    // SAFETY (all impls): only reached from the functions above, whose callers have checked the features.
    impl Sums for __m512i {
        type Float = __m512;
        type Left = __m512i;
        type Right = __m512i;

        #[inline(always)]
        unsafe fn start(offsets: *const i32) -> Self {
            unsafe { _mm512_loadu_si512(offsets.cast()) }
        }

        #[inline(always)]
        unsafe fn left(from: *const u8) -> Self::Left {
            unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn right(from: *const i8) -> Self::Right {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn add_dots(self, left: Self::Left, right: Self::Right) -> Self {
            unsafe { _mm512_dpbusd_epi32(self, left, right) }
        }

        #[inline(always)]
        unsafe fn to_float(self) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(self) }
        }
    }

    impl Sums for Vnni256 {
        type Float = __m256;
        type Left = __m256i;
        type Right = __m256i;

        #[inline(always)]
        unsafe fn start(offsets: *const i32) -> Self {
            unsafe { Self(_mm256_loadu_si256(offsets.cast())) }
        }

        #[inline(always)]
        unsafe fn left(from: *const u8) -> Self::Left {
            unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn right(from: *const i8) -> Self::Right {
            unsafe { _mm256_loadu_si256(from.cast()) }
        }

        #[inline(always)]
        unsafe fn add_dots(self, left: Self::Left, right: Self::Right) -> Self {
            unsafe { Self(_mm256_dpbusd_avx_epi32(self.0, left, right)) }
        }

        #[inline(always)]
        unsafe fn to_float(self) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(self.0) }
        }
    }

    impl Sums for Plain256 {
        type Float = __m256;
        type Left = __m256i;
        type Right = __m256i;

        #[inline(always)]
        unsafe fn start(offsets: *const i32) -> Self {
            unsafe { Self(_mm256_loadu_si256(offsets.cast())) }
        }

        #[inline(always)]
        unsafe fn left(from: *const u8) -> Self::Left {
            unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn right(from: *const i8) -> Self::Right {
            unsafe { _mm256_loadu_si256(from.cast()) }
        }

        #[inline(always)]
        unsafe fn add_dots(self, left: Self::Left, right: Self::Right) -> Self {
            unsafe {
                let pairs = _mm256_maddubs_epi16(left, right);
                Self(_mm256_add_epi32(self.0, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
            }
        }

        #[inline(always)]
        unsafe fn add_two_dots(self, left: [Self::Left; 2], right: [Self::Right; 2]) -> Self {
            unsafe {
                let [first, second] =
                    [_mm256_maddubs_epi16(left[0], right[0]), _mm256_maddubs_epi16(left[1], right[1])];
                let pairs = _mm256_add_epi16(first, second);
                Self(_mm256_add_epi32(self.0, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
            }
        }

        #[inline(always)]
        unsafe fn to_float(self) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(self.0) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::int8::PANEL;

    /// Every way that this machine can multiply, whatever `RETUNE_ISA` says.
    fn available() -> Vec<Int8Isa> {
        Int8Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Integers over the whole range of [−most, most], the ends more often than by chance: their products are what could saturate.
    fn integers(seed: u64, len: usize, most: i8) -> Vec<i8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u32
        };
        (0..len)
            .map(|_| match next() {
                v if v % 4 == 0 => most,
                v if v % 4 == 1 => -most,
                v => ((v / 4 % (2 * most as u32 + 1)) as i16 - i16::from(most)) as i8,
            })
            .collect()
    }

    #[test]
    fn sums_of_integers_are_exact_and_equal_on_every_instruction_set() {
        const DEPTH: usize = 3;
        const SHAPES: [(usize, usize, usize); 7] =
            [(1, 1, 1), (2, 7, 3), (3, 16, 5), (4, 17, 16), (5, 63, 144), (6, 64, 128), (6, 33, 2)];
        for isa in available() {
            let (offset, most) = (i32::from(isa.offset()), (isa.offset() - 1) as i8);
            for (mr, cols, groups) in SHAPES {
                let k = 4 * groups;
                let (a, b) = (integers(1, mr * k, most), integers(2, groups * GROUP, most));
                let at = |p: usize, j: usize| i64::from(b[p / 4 * GROUP + 4 * j + p % 4]);
                let rows: Vec<u8> = a.iter().map(|v| (i32::from(*v) + offset) as u8).collect();
                let offsets: Vec<i32> =
                    (0..PANEL).map(|j| -offset * (0..k).map(|p| at(p, j) as i32).sum::<i32>()).collect();
                let (row_scales, col_scales) = (vec![1.0f32; mr], vec![1.0f32; PANEL]);
                let sum = |i, j| (0..k).map(|p| i64::from(a[i * k + p]) * at(p, j)).sum::<i64>() as f32;
                // What is added in f32 are small integers: exact as well.
                let floats = |seed, len| integers(seed, len, 127).into_iter().map(f32::from).collect::<Vec<_>>();
                let (x, y) = (floats(3, mr * DEPTH), floats(4, DEPTH * PANEL));
                let more = |i, j| (0..DEPTH).map(|p| x[i * DEPTH + p] * y[p * PANEL + j]).sum::<f32>();
                let exact: Vec<f32> =
                    (0..mr * cols).map(|i| sum(i / cols, i % cols) + more(i / cols, i % cols)).collect();
                let mut c = vec![f32::NAN; mr * cols];
                for start in (0..cols).step_by(tile_width(isa)) {
                    let tile = Int8Tile {
                        groups,
                        a: rows.as_ptr(),
                        a_stride: k,
                        row_scales: row_scales.as_ptr(),
                        row_scale_stride: 1,
                        b: b[4 * start..].as_ptr(),
                        offsets: offsets[start..].as_ptr(),
                        col_scales: col_scales[start..].as_ptr(),
                        segments: &[Segment {
                            k: DEPTH,
                            a: x.as_ptr(),
                            a_row_stride: DEPTH,
                            a_k_stride: 1,
                            b: y[start..].as_ptr(),
                            b_stride: PANEL,
                        }],
                        to: Target {
                            c: c[start..].as_mut_ptr(),
                            stride: cols,
                            addend: std::ptr::null(),
                            cols: tile_width(isa).min(cols - start),
                            streams: false,
                        },
                    };
                    // SAFETY: the machine has the instruction set; operands are whole panels, C has `mr` rows of `cols`.
                    unsafe { run(isa, &tile, mr) };
                }
                assert!(c == exact, "{isa}: {mr} rows, {cols} columns, {groups} groups");
            }
        }
    }
}
