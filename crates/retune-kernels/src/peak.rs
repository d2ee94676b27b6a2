//! What this machine could do at most: the instructions of the products' inner loops on registers alone, and copies of memory. The floors
//! and shares of benchmarks are counted against these.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::isa::{Int8Isa, Isa, int8_isa, isa};
use crate::parallel::{self, SharedMut};

/// How often a speed is measured; the best counts, since whatever else runs can only slow it down.
const ROUNDS: usize = 30;

/// The most that `run` did a second; it says how much it did.
fn rate(mut run: impl FnMut() -> usize) -> f64 {
    let mut round = || {
        let start = Instant::now();
        run() as f64 / start.elapsed().as_secs_f64().max(1e-9)
    };
    (0..ROUNDS).map(|_| round()).fold(0.0, f64::max)
}

/// What all threads of the pool did, each running `work`.
fn on_all_threads(work: impl Fn() -> usize + Sync) -> usize {
    let done = AtomicUsize::new(0);
    parallel::for_each(rayon::current_num_threads(), |_| {
        done.fetch_add(work(), Ordering::Relaxed);
    });
    done.into_inner()
}

/// Multiplications and additions of f32 a second, on all threads of the pool, by the instruction set in use; `None` where that has no
/// instruction of its own for them.
pub fn f32_operations() -> Option<f64> {
    let work: fn() -> usize = match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY (all): `isa` returns a variant only when the machine has its features.
        Isa::Avx512 => || unsafe { x86::fma_512() },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => || unsafe { x86::fma_256() },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => || unsafe { neon::fma() },
        _ => return None,
    };
    Some(rate(|| on_all_threads(work)))
}

/// The same in products of 8-bit integers.
pub fn int8_operations() -> Option<f64> {
    let work: fn() -> usize = match int8_isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY (all): `int8_isa` returns a variant only when the machine has its features.
        Int8Isa::Avx512Vnni => || unsafe { x86::dots_512() },
        #[cfg(target_arch = "x86_64")]
        Int8Isa::AvxVnni => || unsafe { x86::dots_256() },
        #[cfg(target_arch = "x86_64")]
        Int8Isa::Avx2 => || unsafe { x86::two_step_dots_256() },
        #[cfg(target_arch = "aarch64")]
        Int8Isa::NeonDotprod => || unsafe { neon::dots() },
        #[cfg(target_arch = "aarch64")]
        Int8Isa::Neon => || unsafe { neon::three_step_dots() },
        _ => return None,
    };
    Some(rate(|| on_all_threads(work)))
}

/// Bytes a second, those read and those written, of copying `bytes` bytes on all threads, over and over: what lies in a cache stays there.
pub fn copied_bytes(bytes: usize) -> f64 {
    const PIECE: usize = 1 << 13;
    let from = vec![1.0f32; (bytes / size_of::<f32>()).max(1)];
    let mut to = vec![0.0f32; from.len()];
    let once = 2 * size_of_val(&from[..]);
    let repeats = ((128 << 20) / once).max(1);
    rate(|| {
        for _ in 0..repeats {
            let shared = SharedMut::new(&mut to);
            parallel::for_each(from.len().div_ceil(PIECE), |piece| {
                let start = piece * PIECE;
                let n = PIECE.min(from.len() - start);
                // SAFETY: pieces are disjoint.
                unsafe { shared.slice(start, n) }.copy_from_slice(black_box(&from[start..start + n]));
            });
            black_box(&mut to);
        }
        once * repeats
    })
}

/// Long enough that starting the threads does not count.
const STEPS: usize = 1 << 18;

/// A loop over `SUMS` independent sums in registers; what it returns is how many operations it did, `$operations` an instruction.
macro_rules! register_loop {
    ($name:ident, $features:literal, $operations:literal, $start:expr, $operand:expr, $step:expr) => {
        #[target_feature(enable = $features)]
        pub fn $name() -> usize {
            // Unknown to the compiler and all different, so that it neither computes ahead nor merges sums.
            let mut sums: [_; SUMS] = std::array::from_fn(|i| $start(black_box(i as i32)));
            let (a, b) = ($operand(black_box(3)), $operand(black_box(5)));
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = $step(*sum, a, b);
                }
            }
            black_box(sums);
            $operations * SUMS * STEPS
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{STEPS, black_box};

    /// Independent sums: enough to hide the latency of two instructions a cycle, few enough for 16 registers.
    const SUMS: usize = 12;

    register_loop!(
        fma_512,
        "avx512f",
        32,
        |i| _mm512_set1_ps(i as f32),
        |i| _mm512_set1_ps(i as f32 / 16.0),
        |sum, a, b| _mm512_fmadd_ps(a, b, sum)
    );
    register_loop!(
        fma_256,
        "avx2,fma",
        16,
        |i| _mm256_set1_ps(i as f32),
        |i| _mm256_set1_ps(i as f32 / 16.0),
        |sum, a, b| _mm256_fmadd_ps(a, b, sum)
    );
    register_loop!(
        dots_512,
        "avx512f,avx512bw,avx512vnni",
        128,
        |i| _mm512_set1_epi32(i),
        |i| _mm512_set1_epi8(i as i8),
        |sum, a, b| _mm512_dpbusd_epi32(sum, a, b)
    );
    register_loop!(
        dots_256,
        "avx2,avxvnni",
        64,
        |i| _mm256_set1_epi32(i),
        |i| _mm256_set1_epi8(i as i8),
        |sum, a, b| _mm256_dpbusd_avx_epi32(sum, a, b)
    );
    // As the kernel does it: two products of bytes are added in 16 bits. Both depend on the sum, or the compiler would do them once.
    register_loop!(
        two_step_dots_256,
        "avx2",
        128,
        |i| _mm256_set1_epi32(i),
        |i| _mm256_set1_epi8(i as i8),
        |sum, a, b| {
            let [first, second] = [_mm256_maddubs_epi16(sum, b), _mm256_maddubs_epi16(a, sum)];
            _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1)))
        }
    );
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::{STEPS, black_box};
    use crate::gemm::sdot;

    /// Independent sums: enough to hide the latency of four instructions a cycle, few enough for 32 registers.
    const SUMS: usize = 24;

    register_loop!(fma, "neon", 8, |i| vdupq_n_f32(i as f32), |i| vdupq_n_f32(i as f32 / 16.0), |sum, a, b| vfmaq_f32(
        sum, a, b
    ));
    register_loop!(
        dots,
        "neon,dotprod",
        32,
        |i| vdupq_n_s32(i),
        |i| vdupq_n_s8(i as i8),
        // SAFETY: the function has the feature.
        |sum, a, b| unsafe { sdot(sum, a, b) }
    );
    // As the kernel does it, and one instruction more: the operands change, or the compiler would multiply once.
    register_loop!(three_step_dots, "neon", 32, |i| vdupq_n_s32(i), |i| vdupq_n_s8(i as i8), |sum, a, b| {
        let a = veorq_s8(a, vreinterpretq_s8_s32(sum));
        let (low, high) = (vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
        vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_positive_where_there_are_any() {
        assert!([f32_operations(), int8_operations()].into_iter().flatten().all(|speed| speed > 0.0));
        assert!(copied_bytes(1 << 16) > 0.0);
    }
}
