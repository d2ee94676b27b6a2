//! Elementwise activations `h = f(x)`.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use crate::bf16::{rounded, widened};
use crate::multiversion;
use crate::parallel::{self, SharedMut};
use crate::vector::{exp, multiply_add};

/// An activation function, by what transformers computes under its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    GeluTanh,
    /// `x · Φ(x)`.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

/// A [`Function`] as a type, so that loops are compiled for each of them.
pub(crate) trait Activation {
    /// f(x).
    fn value<const FMA: bool>(x: f32) -> f32;

    /// g · f'(x), and f(x).
    fn gradient<const FMA: bool>(x: f32, g: f32) -> (f32, f32);
}

pub(crate) struct Silu;
pub(crate) struct GeluTanh;
pub(crate) struct Gelu;
pub(crate) struct Relu;

impl Activation for Silu {
    #[inline(always)]
    fn value<const FMA: bool>(x: f32) -> f32 {
        x / (1.0 + exp::<FMA>(-x))
    }

    #[inline(always)]
    fn gradient<const FMA: bool>(x: f32, g: f32) -> (f32, f32) {
        let sigma = 1.0 / (1.0 + exp::<FMA>(-x));
        (g * sigma * (1.0 + x * (1.0 - sigma)), x * sigma)
    }
}

impl GeluTanh {
    /// √(8/π): (1 + tanh y) / 2 is sigmoid(2y).
    const FACTOR: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;

    #[inline(always)]
    fn sigmoid<const FMA: bool>(x: f32) -> f32 {
        1.0 / (1.0 + exp::<FMA>(-Self::FACTOR * x * (1.0 + Self::CUBIC * x * x)))
    }
}

impl Activation for GeluTanh {
    #[inline(always)]
    fn value<const FMA: bool>(x: f32) -> f32 {
        x * Self::sigmoid::<FMA>(x)
    }

    #[inline(always)]
    fn gradient<const FMA: bool>(x: f32, g: f32) -> (f32, f32) {
        let sigma = Self::sigmoid::<FMA>(x);
        let inner = Self::FACTOR * x * (1.0 + 3.0 * Self::CUBIC * x * x);
        (g * sigma * (1.0 + inner * (1.0 - sigma)), x * sigma)
    }
}

/// Φ(x) and its derivative, the cumulative distribution and the density of the standard normal distribution, each to a few units in the
/// last place.
///
/// With u = |x| / √2: erf(u) is an odd polynomial up to 1, and beyond it erfc(u) is e^−u² / u times a polynomial in u⁻², one of two (Cephes
/// `erff` and `erfcf`).
#[inline(always)]
fn normal<const FMA: bool>(x: f32) -> (f32, f32) {
    #[inline(always)]
    fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
        coefficients.into_iter().fold(0.0, |p, coefficient| multiply_add::<FMA>(p, x, coefficient))
    }
    let u = x.abs() * FRAC_1_SQRT_2;
    let gauss = exp::<FMA>(-0.5 * x * x);
    let near = polynomial::<FMA, _>(
        u * u,
        [
            7.853_861_4e-5,
            -8.010_194e-4,
            5.188_327_6e-3,
            -2.685_381_2e-2,
            1.128_358_5e-1,
            -3.761_262_6e-1,
            FRAC_2_SQRT_PI,
        ],
    );
    let inverse = 1.0 / u;
    let square = inverse * inverse;
    let middle = polynomial::<FMA, _>(
        square,
        [
            2.326_82e-2,
            -1.387_039_4e-1,
            3.687_424_7e-1,
            -5.824_733e-1,
            6.210_005e-1,
            -4.944_515_3e-1,
            3.404_88e-1,
            -2.741_127e-1,
            5.638_259_4e-1,
        ],
    );
    let far = polynomial::<FMA, _>(
        square,
        [
            -1.047_766_4e1,
            1.297_72e1,
            -7.495_518_7,
            2.921_019,
            -1.015_265_3,
            4.218_463_4e-1,
            -2.820_767_4e-1,
            5.641_895e-1,
        ],
    );
    let tail = 0.5 * gauss * inverse * if u < 2.0 { middle } else { far };
    let tail = if u < 1.0 { 0.5 - 0.5 * u * near } else { tail };
    let cumulative = if x < 0.0 { tail } else { 1.0 - tail };
    (cumulative, gauss * (0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2))
}

impl Activation for Gelu {
    #[inline(always)]
    fn value<const FMA: bool>(x: f32) -> f32 {
        x * normal::<FMA>(x).0
    }

    #[inline(always)]
    fn gradient<const FMA: bool>(x: f32, g: f32) -> (f32, f32) {
        let (cumulative, density) = normal::<FMA>(x);
        (g * (cumulative + x * density), x * cumulative)
    }
}

impl Activation for Relu {
    #[inline(always)]
    fn value<const FMA: bool>(x: f32) -> f32 {
        // A NaN stays one.
        if x < 0.0 { 0.0 } else { x }
    }

    #[inline(always)]
    fn gradient<const FMA: bool>(x: f32, g: f32) -> (f32, f32) {
        (if x > 0.0 { g } else { 0.0 }, Self::value::<FMA>(x))
    }
}

/// Calls a generic function with the type of a [`Function`] and the `FMA` of the version that it stands in.
macro_rules! by_function {
    ($function:expr, $name:ident, $($arg:expr),*) => {
        match $function {
            $crate::activation::Function::Silu => $name::<$crate::activation::Silu, FMA>($($arg),*),
            $crate::activation::Function::GeluTanh => $name::<$crate::activation::GeluTanh, FMA>($($arg),*),
            $crate::activation::Function::Gelu => $name::<$crate::activation::Gelu, FMA>($($arg),*),
            $crate::activation::Function::Relu => $name::<$crate::activation::Relu, FMA>($($arg),*),
        }
    };
}
pub(crate) use by_function;

/// Elements of a parallel piece.
const PIECE: usize = 1 << 14;

#[inline(always)]
fn values<A: Activation, const FMA: bool>(x: &[f32], h: &mut [f32]) {
    for (h, &x) in h.iter_mut().zip(x) {
        *h = A::value::<FMA>(x);
    }
}

#[inline(always)]
fn values_and_rounded<A: Activation, const FMA: bool>(x: &[f32], h: &mut [f32], kept: &mut [u16]) {
    for ((h, &x), kept) in h.iter_mut().zip(x).zip(kept) {
        *h = A::value::<FMA>(x);
        *kept = rounded(x);
    }
}

#[inline(always)]
fn gradients<A: Activation, const FMA: bool>(x: &mut [f32], dh: &mut [f32]) {
    for (x, g) in x.iter_mut().zip(dh) {
        (*x, *g) = A::gradient::<FMA>(*x, *g);
    }
}

#[inline(always)]
fn rounded_gradients<A: Activation, const FMA: bool>(kept: &[u16], x: &mut [f32], dh: &mut [f32]) {
    for ((x, g), kept) in x.iter_mut().zip(dh).zip(kept) {
        (*x, *g) = A::gradient::<FMA>(widened(*kept), *g);
    }
}

multiversion! {
    fn forward_piece(x: &[f32], function: Function, h: &mut [f32], kept: Option<&mut [u16]>) {
        match kept {
            None => by_function!(function, values, x, h),
            Some(kept) => by_function!(function, values_and_rounded, x, h, kept),
        }
    }
}

multiversion! {
    fn backward_piece(x: &mut [f32], function: Function, dh: &mut [f32], kept: Option<&[u16]>) {
        match kept {
            None => by_function!(function, gradients, x, dh),
            Some(kept) => by_function!(function, rounded_gradients, kept, x, dh),
        }
    }
}

/// Writes `h = f(x)`, and x rounded to bfloat16 to `kept`, where it lasts for the backward; all of one length.
pub fn forward(x: &[f32], function: Function, h: &mut [f32], kept: Option<&mut [u16]>) {
    let len = h.len();
    debug_assert!(x.len() == len && kept.iter().all(|kept| kept.len() == len));
    let (h, kept) = (SharedMut::new(h), kept.map(SharedMut::new));
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        let (h, kept) = unsafe { (h.slice(start, n), kept.map(|kept| kept.slice(start, n))) };
        forward_piece(&x[start..start + n], function, h, kept);
    });
}

/// Replaces `x` by its gradient, and the gradient `dh` of the output by the output itself, which the caller needs next and would
/// otherwise recompute. With `kept`, what the forward rounded, that is read in place of `x`.
pub fn backward(x: &mut [f32], function: Function, dh: &mut [f32], kept: Option<&[u16]>) {
    let len = dh.len();
    debug_assert!(x.len() == len && kept.iter().all(|kept| kept.len() == len));
    let (x, dh) = (SharedMut::new(x), SharedMut::new(dh));
    parallel::for_each(len.div_ceil(PIECE), |piece| {
        let start = piece * PIECE;
        let n = PIECE.min(len - start);
        // SAFETY: pieces are disjoint.
        let (x, dh) = unsafe { (x.slice(start, n), dh.slice(start, n)) };
        backward_piece(x, function, dh, kept.map(|kept| &kept[start..start + n]));
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::{dot, numeric_gradient, random, relative_error, to_f64};

    pub const FUNCTIONS: [Function; 4] = [Function::Silu, Function::GeluTanh, Function::Gelu, Function::Relu];

    /// The error function by its series (DLMF 7.6.2), which converges for every argument and whose terms are all positive.
    fn erf(x: f64) -> f64 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 1.0;
            term *= 2.0 * x * x / (2.0 * n + 1.0);
            sum += term;
        }
        2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
    }

    pub fn reference(function: Function, x: f64) -> f64 {
        match function {
            Function::Silu => x / (1.0 + (-x).exp()),
            Function::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }
            Function::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
            Function::Relu => x.max(0.0),
        }
    }

    #[test]
    fn forward_and_backward_equal_the_reference() {
        for function in FUNCTIONS {
            for n in [1, 7, 100] {
                let x: Vec<f32> = random(1, n).iter().map(|v| v * 6.0).collect();
                let dh = random(3, n);
                let mut h = vec![0.0; n];
                forward(&x, function, &mut h, None);
                let f = |x: &[f64]| x.iter().map(|&x| reference(function, x)).collect::<Vec<_>>();
                let (x64, g) = (to_f64(&x), to_f64(&dh));
                assert!(relative_error(&h, &f(&x64)) < 1e-6, "{function:?}");
                let (mut dx, mut again) = (x.clone(), dh.clone());
                backward(&mut dx, function, &mut again, None);
                assert!(relative_error(&dx, &numeric_gradient(&x64, |x| dot(&f(x), &g))) < 1e-5, "{function:?}");
                assert!(relative_error(&again, &f(&x64)) < 1e-6, "{function:?}");
            }
        }
    }

    #[test]
    fn every_function_is_close_everywhere() {
        let x: Vec<f32> = (-9000..=9000).map(|i| i as f32 * 1e-3).collect();
        let mut h = vec![0.0; x.len()];
        for function in FUNCTIONS {
            forward(&x, function, &mut h, None);
            for (&x, &h) in x.iter().zip(&h) {
                let expected = reference(function, f64::from(x));
                let error = (f64::from(h) - expected).abs();
                assert!(error <= 2e-7 * f64::from(x).abs(), "{function:?}({x}) = {h}, not {expected}");
            }
        }
    }

    #[test]
    fn the_normal_distribution_keeps_its_digits_in_the_tail() {
        // Published values of Φ.
        for (x, expected) in [(-1.0, 0.158_655_253_931_457), (-3.0, 1.349_898_031_630_1e-3), (-5.0, 2.866_515_718_8e-7)]
        {
            for (cumulative, _) in [normal::<false>(x), normal::<true>(x)] {
                assert!((f64::from(cumulative) - expected).abs() < 2e-6 * expected, "{x}: {cumulative}");
            }
        }
    }

    #[test]
    fn extreme_values_stay_what_they_are() {
        for function in FUNCTIONS {
            let x = [-1e4, 1e4, -90.0, 90.0, 0.0, f32::NAN];
            let mut h = vec![0.0; 6];
            forward(&x, function, &mut h, None);
            assert_eq!((h[1], h[3], h[4]), (1e4, 90.0, 0.0), "{function:?}");
            assert!(h[0].abs() < 1e-30 && h[2].abs() < 1e-30 && h[5].is_nan(), "{function:?}: {h:?}");
            let (mut dx, mut dh) = (x, [1.0; 6]);
            backward(&mut dx, function, &mut dh, None);
            assert_eq!((dx[1], dx[3]), (1.0, 1.0), "{function:?}");
            assert!(dx[0].abs() < 1e-25 && dx[2].abs() < 1e-25, "{function:?}: {dx:?}");
            assert!(dh[..5].iter().zip(&h).all(|(a, b)| (a - b).abs() < 1e-30), "{function:?}: {dh:?}");
        }
    }

    #[test]
    fn what_is_kept_rounded_is_what_the_backward_reads() {
        for function in FUNCTIONS {
            let n = PIECE + 7;
            let (x, dh) = (random(1, n), random(3, n));
            let (mut h, mut plain, mut kept) = (vec![0.0; n], vec![0.0; n], vec![0; n]);
            forward(&x, function, &mut plain, None);
            forward(&x, function, &mut h, Some(&mut kept));
            assert!(h == plain && kept == x.iter().map(|&v| rounded(v)).collect::<Vec<_>>());
            let (mut expected, mut again) = (kept.iter().map(|&v| widened(v)).collect::<Vec<f32>>(), dh.clone());
            backward(&mut expected, function, &mut again, None);
            let (mut dx, mut own) = (vec![f32::NAN; n], dh);
            backward(&mut dx, function, &mut own, Some(&kept));
            assert!(dx == expected && own == again);
        }
    }
}
