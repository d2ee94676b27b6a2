//! The one place that decides which instruction set the kernels use.
//!
//! The choice is made once per process: the best the machine has, or what `RETUNE_ISA` forces (`portable`, `avx2`, `avx512`, `neon`), so that
//! tests can run every path a machine offers.

use std::fmt;
use std::sync::OnceLock;

/// An instruction set with kernels of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, whatever the compiler makes of it.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512,
    /// AArch64 with NEON.
    Neon,
}

impl Isa {
    const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Neon];

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            _ => false,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        })
    }
}

/// The best instruction set of this machine.
pub fn detect() -> Isa {
    Isa::ALL.into_iter().rfind(|isa| isa.is_available()).unwrap_or(Isa::Portable)
}

/// Reads `RETUNE_ISA`.
///
/// # Errors
/// A name that is not an instruction set of ours, or one that this machine does not have.
pub fn from_env() -> Result<Isa, String> {
    let best = detect();
    let Some(name) = std::env::var_os("RETUNE_ISA") else {
        return Ok(best);
    };
    let Some(asked) = Isa::ALL.into_iter().find(|isa| name.to_str() == Some(&isa.to_string())) else {
        return Err(format!(
            "RETUNE_ISA is {name:?}; expected portable, avx2, avx512 or neon: unset it to let retune choose"
        ));
    };
    if !asked.is_available() {
        return Err(format!(
            "RETUNE_ISA asks for {asked}, but this machine offers {best} at most: unset it to let retune choose"
        ));
    }
    Ok(asked)
}

/// The instruction set in use. An unusable `RETUNE_ISA` falls back to the best one here; the binary refuses it at start with
/// [`from_env`].
#[inline]
pub fn isa() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| from_env().unwrap_or_else(|_| detect()))
}

/// The instructions that multiply 8-bit integers. Their results are equal on all of them that take integers of the same range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int8Isa {
    /// Plain Rust.
    Portable,
    /// 256-bit products of bytes, of which two are added in 16 bits before they are in 32: with values of 7 bits those cannot overflow.
    Avx2,
    /// 256-bit `vpdpbusd` (AVX-VNNI).
    AvxVnni,
    /// 512-bit `vpdpbusd` (AVX-512 VNNI).
    Avx512Vnni,
    /// 128-bit products of bytes in three steps (NEON).
    Neon,
    /// 128-bit `sdot` (AArch64's dot products).
    NeonDotprod,
}

impl Int8Isa {
    /// Each of them.
    pub const ALL: [Self; 6] =
        [Self::Portable, Self::Avx2, Self::AvxVnni, Self::Avx512Vnni, Self::Neon, Self::NeonDotprod];

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Int8Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Int8Isa::Avx2 => Isa::Avx2.is_available(),
            #[cfg(target_arch = "x86_64")]
            Int8Isa::AvxVnni => Isa::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Int8Isa::Avx512Vnni => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "aarch64")]
            Int8Isa::Neon => Isa::Neon.is_available(),
            #[cfg(target_arch = "aarch64")]
            Int8Isa::NeonDotprod => Isa::Neon.is_available() && std::arch::is_aarch64_feature_detected!("dotprod"),
            _ => false,
        }
    }

    /// Whether 8-bit products are clearly faster than f32's. A fixed rule, not a measurement, so that a run decides the same again.
    pub fn is_fast(self) -> bool {
        matches!(self, Int8Isa::Avx2 | Int8Isa::AvxVnni | Int8Isa::Avx512Vnni | Int8Isa::NeonDotprod)
    }

    /// Bits of the integers it multiplies. One operand is offset and so unsigned: four products of 7 bits are within 4 · 127 · 63 = 32,004, which
    /// 16 bits hold; two of 8 bits are not.
    pub fn bits(self) -> u32 {
        match self {
            Int8Isa::Avx2 => 7,
            _ => 8,
        }
    }

    /// What makes a signed value an unsigned one, as the products want their left operand.
    pub fn offset(self) -> u8 {
        1 << (self.bits() - 1)
    }

    /// Largest magnitude of a quantized value.
    pub fn largest(self) -> f32 {
        f32::from(self.offset() - 1)
    }
}

impl fmt::Display for Int8Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Int8Isa::Portable => "portable",
            Int8Isa::Avx2 => "avx2",
            Int8Isa::AvxVnni => "avx-vnni",
            Int8Isa::Avx512Vnni => "avx512-vnni",
            Int8Isa::Neon => "neon",
            Int8Isa::NeonDotprod => "neon-dotprod",
        })
    }
}

/// The instructions for 8-bit products that go with [`isa`].
#[inline]
pub fn int8_isa() -> Int8Isa {
    static CHOSEN: OnceLock<Int8Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let best_first: &[Int8Isa] = match isa() {
            Isa::Portable => &[],
            Isa::Avx2 => &[Int8Isa::AvxVnni, Int8Isa::Avx2],
            Isa::Avx512 => &[Int8Isa::Avx512Vnni, Int8Isa::AvxVnni, Int8Isa::Avx2],
            Isa::Neon => &[Int8Isa::NeonDotprod, Int8Isa::Neon],
        };
        best_first.iter().copied().find(|isa| isa.is_available()).unwrap_or(Int8Isa::Portable)
    })
}

/// Compiles a plain function once per instruction set and calls the version for [`isa`](crate::isa::isa). The compiler vectorises the
/// body; it must be written so that it can (fixed-width lanes for reductions, no calls that do not inline). In the body, `FMA` is a constant:
/// whether that version's instruction set has a fused multiplication and addition, for [`exp`](crate::vector::exp).
#[macro_export]
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
                match $crate::isa::isa() {
                    // SAFETY: `isa` returns a variant only when the machine has its features.
                    $crate::isa::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::isa::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::isa::Isa::Portable | $crate::isa::Isa::Neon => {}
                }
            }
            // NEON, fused operations among it, is part of what every AArch64 program is compiled for.
            #[cfg(target_arch = "aarch64")]
            if $crate::isa::isa() == $crate::isa::Isa::Neon {
                return body::<true>($($arg),*);
            }
            body::<false>($($arg),*)
        }
    };
}
