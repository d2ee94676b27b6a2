//! What matrices are quantized to: the storages of bitsandbytes.

use std::fmt;

use crate::encode;
use crate::four_bit::QuantType;

/// How the values of a matrix are to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Blocks of 64 values in 4 bits; with double quantization their magnitudes are in 8 bits.
    FourBit { quant_type: QuantType, double: bool },
    /// Rows in 8 bits.
    Int8,
}

impl Encoding {
    /// NF4 with magnitudes in f32.
    pub const NF4: Self = Encoding::FourBit { quant_type: QuantType::NF4, double: false };
    /// NF4 with double quantization.
    pub const NF4_DOUBLE: Self = Encoding::FourBit { quant_type: QuantType::NF4, double: true };
    /// FP4 with magnitudes in f32.
    pub const FP4: Self = Encoding::FourBit { quant_type: QuantType::FP4, double: false };

    /// Bytes that a matrix takes in it: what [`crate::Matrix::bytes_len`] will say.
    pub fn bytes_for(self, rows: usize, cols: usize) -> usize {
        let values = rows * cols;
        let scale = size_of::<f32>();
        match self {
            Encoding::FourBit { double, .. } => {
                let blocks = values.div_ceil(encode::BLOCKSIZE);
                let nested = blocks + scale * blocks.div_ceil(encode::NESTED_BLOCKSIZE);
                values.div_ceil(2) + if double { nested } else { scale * blocks }
            }
            Encoding::Int8 => values + scale * rows,
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Encoding::FourBit { quant_type, double } => {
                write!(f, "{}{}", quant_type.key(), if *double { "-double" } else { "" })
            }
            Encoding::Int8 => f.write_str("int8"),
        }
    }
}
