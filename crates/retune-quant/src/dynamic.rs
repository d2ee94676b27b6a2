//! Dynamic 8-bit codes: seven powers of ten, each with twice as many values as the one below it (Dettmers 2015, "8-Bit Approximations for
//! Parallelism in Deep Learning", section 2.2), as bitsandbytes keeps the moments of its 8-bit optimizers in them.

/// Elements that share a magnitude.
pub const BLOCK: usize = 256;

/// Places that the values of a code's range are sorted into to find it.
const PLACES: usize = 1 << 14;

/// The values of the 256 codes, rising, of both signs or none: `create_dynamic_map` in bitsandbytes' `functional.py`.
pub fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut map = [0.0; 256];
    map[255] = 1.0;
    let mut count = 0;
    for exponent in 0..7u32 {
        // The middles of so many equal parts of 0.1 to 1, with the roundings of `torch.linspace`, whose multiplications are fused.
        let parts = 1usize << (exponent + u32::from(!signed));
        let step = (1.0f32 - 0.1) / parts as f32;
        let bound = |i: usize| match i < parts.div_ceil(2) {
            true => step.mul_add(i as f32, 0.1),
            false => (-step).mul_add((parts - i) as f32, 1.0),
        };
        let power = 10f64.powi(exponent as i32 - 6) as f32;
        for i in 0..parts {
            let value = power * ((bound(i) + bound(i + 1)) / 2.0);
            map[count] = value;
            count += 1;
            if signed {
                map[count] = -value;
                count += 1;
            }
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// The codes of one kind, with what finds the nearest one to a value.
pub struct DynamicCodes {
    values: [f32; 256],
    /// Between each value and the next. A value in the middle takes the lower code.
    middles: [f32; 255],
    /// The code of the lowest value of each place.
    first: Vec<u8>,
    lowest: f32,
    /// The code of 0.
    zero: u8,
}

impl DynamicCodes {
    /// Those for values from -1 to 1, or from 0 to 1.
    pub fn new(signed: bool) -> Self {
        let values = dynamic_map(signed);
        let middles: [f32; 255] = std::array::from_fn(|i| 0.5 * (values[i] + values[i + 1]));
        let lowest = if signed { -1.0 } else { 0.0 };
        let nearest = |value: f32| middles.partition_point(|middle| *middle < value) as u8;
        let place_start = |place: usize| lowest + (1.0 - lowest) * place as f32 / PLACES as f32;
        let first = (0..=PLACES).map(|place| nearest(place_start(place))).collect();
        Self { values, middles, first, lowest, zero: nearest(0.0) }
    }

    /// The nearest code to a value of the range.
    fn nearest(&self, value: f32) -> u8 {
        let place = ((value - self.lowest) * (PLACES as f32 / (1.0 - self.lowest))) as usize;
        let mut code = self.first[place.min(PLACES)];
        // The place's number is rounded.
        while code > 0 && value <= self.middles[usize::from(code) - 1] {
            code -= 1;
        }
        while code < 255 && value > self.middles[usize::from(code)] {
            code += 1;
        }
        code
    }

    /// Writes the codes of a block and returns its magnitude: the largest of its values, by which they were divided. A block of zeros is
    /// decoded to zeros. Without signs nothing but zero becomes zero: what divides by the root of a mean of squares would make a leap of it.
    pub fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let magnitude = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let reciprocal = 1.0 / magnitude;
        if reciprocal.is_finite() {
            for (code, value) in codes.iter_mut().zip(values) {
                let least = u8::from(self.zero == 0 && *value > 0.0);
                *code = self.nearest(value * reciprocal).max(least);
            }
        } else {
            codes.fill(self.zero);
        }
        magnitude
    }

    /// Writes a block's values.
    pub fn decode(&self, codes: &[u8], magnitude: f32, values: &mut [f32]) {
        values.iter_mut().zip(codes).for_each(|(value, code)| *value = magnitude * self.values[usize::from(*code)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_takes_the_nearest_code() {
        for signed in [true, false] {
            let codes = DynamicCodes::new(signed);
            for code in 0..=255u8 {
                assert_eq!(codes.nearest(codes.values[usize::from(code)]), code);
            }
            let low = if signed { -1.0 } else { 0.0 };
            let values = (0..20_000).map(|i| low + (1.0 - low) * i as f32 / 20_000.0);
            let tiny = (0..2_000).map(|i| (low / 1e5) + (1.0 - low) / 1e5 * i as f32 / 2_000.0);
            for value in values.chain(tiny) {
                let found = codes.values[usize::from(codes.nearest(value))];
                let least = codes.values.iter().map(|of| (of - value).abs()).fold(f32::MAX, f32::min);
                assert!((found - value).abs() <= least * (1.0 + 1e-4), "{value}: {found}");
            }
        }
    }

    #[test]
    fn a_block_keeps_its_largest_value_and_zeros() {
        let codes = DynamicCodes::new(true);
        let values = [0.0, -3.0, 1e-9, 2.9, 0.3];
        let mut of_values = [0; 5];
        let magnitude = codes.encode(&values, &mut of_values);
        let mut back = [f32::NAN; 5];
        codes.decode(&of_values, magnitude, &mut back);
        assert_eq!((magnitude, back[0], back[2]), (3.0, 0.0, 0.0));
        // The lowest value of the signed codes is -0.993.
        assert!(
            (back[1] + 3.0).abs() < 0.03 && (back[3] - 2.9).abs() < 0.03 && (back[4] - 0.3).abs() < 0.005,
            "{back:?}"
        );
        let unsigned = DynamicCodes::new(false);
        let magnitude = unsigned.encode(&[1.0, 1e-12, 0.0], &mut of_values[..3]);
        unsigned.decode(&of_values[..3], magnitude, &mut back[..3]);
        assert!(back[1] > 0.0 && back[1] < 4e-7 && back[2] == 0.0, "{back:?}");
        for value in [0.0, f32::MIN_POSITIVE / 4.0] {
            let magnitude = codes.encode(&[value; 4], &mut of_values[..4]);
            codes.decode(&of_values[..4], magnitude, &mut back[..4]);
            assert_eq!(back[..4], [0.0; 4]);
        }
    }
}
