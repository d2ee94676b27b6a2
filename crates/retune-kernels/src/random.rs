//! Counter-based random numbers: a value depends on its key and its place alone, never on what was drawn before or by which thread.
//!
//! The mixing function is that of SplitMix64 (Steele, Lea, Flood 2014), whose stream i-th value is `mix(key + (i + 1)·GAMMA)`.

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// A bijection of 64-bit words in which every input bit reaches every output bit.
#[inline(always)]
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The value at a place of the stream with this key.
#[inline(always)]
pub const fn at(key: u64, index: u64) -> u64 {
    mix(key.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA)))
}

/// A key made of a key and one more word.
pub const fn derive(key: u64, word: u64) -> u64 {
    mix(key.wrapping_add(GAMMA) ^ mix(word.wrapping_add(GAMMA)))
}

/// A word that stands for a text (FNV-1a, 64 bits).
pub const fn hash(text: &str) -> u64 {
    let bytes = text.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

/// Uniform in [-1, 1), in steps of 2⁻²³.
pub fn symmetric(word: u64) -> f32 {
    (word >> 40) as f32 * (1.0 / 8_388_608.0) - 1.0
}

/// Standard normal at a place of a stream: Marsaglia's polar method (1964), retried within the place's own stream.
///
/// Only additions, products, quotients and roots, which every machine rounds alike; a library's logarithm would not be.
pub fn normal(key: u64, index: u64) -> f64 {
    let own = at(key, index);
    let mut attempt = 0;
    loop {
        let word = at(own, attempt);
        let u = f64::from(word as u32) / 2_147_483_648.0 - 1.0;
        let v = f64::from((word >> 32) as u32) / 2_147_483_648.0 - 1.0;
        let s = u * u + v * v;
        if s > 0.0 && s < 1.0 {
            return u * (-2.0 * ln(s) / s).sqrt();
        }
        attempt += 1;
    }
}

/// Natural logarithm of a positive normal number: ln(m·2^e) with ln m = 2·artanh((m − 1)/(m + 1)) as a series, m in [√½, √2).
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i32 - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let t2 = t * t;
    let mut sum = 0.0;
    let mut k = 23;
    while k >= 1 {
        sum = sum * t2 + 1.0 / f64::from(k);
        k -= 2;
    }
    2.0 * t * sum + f64::from(exponent) * std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_splitmix64_and_the_hash_is_fnv1a() {
        // Published first values of SplitMix64 with seed 1234567, and of FNV-1a.
        assert_eq!(at(1_234_567, 0), 6_457_827_717_110_365_317);
        assert_eq!(at(1_234_567, 1), 3_203_168_211_198_807_973);
        assert_eq!(hash(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash("a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn the_logarithm_is_right_to_the_last_digits() {
        let mut x = 1e-19;
        while x < 1.0 {
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs() + 1e-16, "{x}");
            x *= 1.37;
        }
    }

    #[test]
    fn normals_have_the_moments_and_tails_of_the_normal_distribution() {
        let n = 200_000;
        let values: Vec<f64> = (0..n).map(|i| normal(7, i)).collect();
        let moment = |power: i32| values.iter().map(|v| v.powi(power)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 0.01);
        assert!((moment(2) - 1.0).abs() < 0.015);
        assert!(moment(3).abs() < 0.04);
        assert!((moment(4) - 3.0).abs() < 0.1);
        let beyond_two = values.iter().filter(|v| v.abs() > 2.0).count() as f64 / n as f64;
        assert!((beyond_two - 0.0455).abs() < 0.003);
    }

    #[test]
    fn symmetric_values_fill_their_interval() {
        assert_eq!(symmetric(0), -1.0);
        assert!(symmetric(u64::MAX) < 1.0);
        assert!(symmetric(u64::MAX) > 0.999_999);
    }
}
