//! The formats a matrix may be stored in: their names, their sizes, their numbers in a GGUF file.

use std::fmt;

use crate::blocks::{self, Stored};
use crate::error::Error;

/// How the values of a matrix are stored. Each row is a sequence of blocks of `block_len` values in `block_bytes` bytes.
///
/// The block formats are those of ggml (`ggml-common.h`). `Qn_0` and `Qn_1` are blocks of 32 values with one scale, and
/// with one scale and one offset. `QnK` are blocks of 256 values whose 8 or 16 parts have scales that are quantized too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    IQ4NL,
    IQ4XS,
    MXFP4,
}

impl Format {
    /// Every format there is.
    pub const ALL: [Format; 16] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2K,
        Format::Q3K,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
        Format::IQ4NL,
        Format::IQ4XS,
        Format::MXFP4,
    ];

    /// Name as ggml spells it ("Q4_K"), values in a block, bytes of a block, number of the ggml type.
    const fn facts(self) -> (&'static str, usize, usize, u32) {
        match self {
            Format::F32 => ("F32", 1, 4, 0),
            Format::F16 => ("F16", 1, 2, 1),
            Format::BF16 => ("BF16", 1, 2, 30),
            Format::Q4_0 => ("Q4_0", 32, 18, 2),
            Format::Q4_1 => ("Q4_1", 32, 20, 3),
            Format::Q5_0 => ("Q5_0", 32, 22, 6),
            Format::Q5_1 => ("Q5_1", 32, 24, 7),
            Format::Q8_0 => ("Q8_0", 32, 34, 8),
            Format::Q2K => ("Q2_K", 256, 84, 10),
            Format::Q3K => ("Q3_K", 256, 110, 11),
            Format::Q4K => ("Q4_K", 256, 144, 12),
            Format::Q5K => ("Q5_K", 256, 176, 13),
            Format::Q6K => ("Q6_K", 256, 210, 14),
            Format::IQ4NL => ("IQ4_NL", 32, 18, 20),
            Format::IQ4XS => ("IQ4_XS", 256, 136, 23),
            Format::MXFP4 => ("MXFP4", 32, 17, 39),
        }
    }

    /// The format's name as ggml spells it, for example "Q4_K".
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// Values in a block.
    pub const fn block_len(self) -> usize {
        self.facts().1
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.facts().2
    }

    /// The type's number in a GGUF file.
    pub const fn ggml_type(self) -> u32 {
        self.facts().3
    }

    /// The format of a GGUF tensor.
    ///
    /// # Errors
    /// A type that is not decoded here (most IQ*, TQ*, NVFP4, integers, ...) is refused by name, a number without a type as such.
    pub fn from_ggml_type(id: u32) -> Result<Self, Error> {
        match Self::ALL.into_iter().find(|format| format.ggml_type() == id) {
            Some(format) => Ok(format),
            None => Err(match unsupported_name(id) {
                Some(name) => Error::UnsupportedType { name, id },
                None => Error::UnknownType { id },
            }),
        }
    }

    /// Bytes of a matrix of `rows` x `cols`, or `None` when `cols` is no multiple of the block or the size overflows.
    pub fn bytes_for(self, rows: usize, cols: usize) -> Option<usize> {
        rows.checked_mul(cols)?;
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())?.checked_mul(rows)
    }

    /// Decodes the whole blocks of `src` into `dst`.
    ///
    /// # Panics
    /// Unless `src` has exactly the bytes of `dst.len()` values.
    pub fn decode_row(self, src: &[u8], dst: &mut [f32]) {
        assert_eq!(Some(src.len()), self.bytes_for(1, dst.len()), "bytes of {} values stored as {self}", dst.len());
        if !dst.is_empty() {
            let stored = Stored { bytes: src, row_bytes: src.len(), row_map: None };
            blocks::decode_panel(self, stored, 0..1, 0..dst.len(), dst);
        }
    }

    /// Encodes the whole blocks of `src` into `dst`; false where the format is only read.
    ///
    /// The codes of blocks of 32 are those of the `gguf` Python package; blocks of 256 are searched as llama.cpp does. Values must be finite,
    /// and no larger than half precision can say: scales are stored in that.
    ///
    /// # Panics
    /// Unless `dst` has exactly the bytes of `src.len()` values.
    pub fn encode_row(self, src: &[f32], dst: &mut [u8]) -> bool {
        assert_eq!(Some(dst.len()), self.bytes_for(1, src.len()), "bytes of {} values stored as {self}", src.len());
        blocks::encode(self, src, dst)
    }

    /// The names of all formats, for messages.
    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The name of a ggml type that no [`Format`] stands for, those that ggml has given up included.
fn unsupported_name(id: u32) -> Option<&'static str> {
    Some(match id {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        40 => "NVFP4",
        41 => "Q1_0",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_ggml_type_is_one_format_or_refused_by_name() {
        for format in Format::ALL {
            assert_eq!(Format::from_ggml_type(format.ggml_type()), Ok(format));
            assert_eq!(unsupported_name(format.ggml_type()), None);
        }
        assert!((0..=41).all(|id| !matches!(Format::from_ggml_type(id), Err(Error::UnknownType { .. }))));
        assert_eq!(Format::from_ggml_type(42), Err(Error::UnknownType { id: 42 }));
        let refused = Format::from_ggml_type(40).unwrap_err().to_string();
        assert!(refused.contains("NVFP4") && refused.contains("Q6_K"), "{refused}");
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(Format::Q4K.bytes_for(3, 512), Some(3 * 2 * 144));
        assert_eq!(Format::Q4K.bytes_for(3, 500), None);
        assert_eq!(Format::F16.bytes_for(7, 5), Some(70));
        assert_eq!(Format::F32.bytes_for(usize::MAX / 4 + 1, 1), None);
        assert_eq!(Format::Q2K.bytes_for(usize::MAX / 256 + 1, 256), None);
        assert_eq!(Format::F32.bytes_for(0, 4), Some(0));
    }

    #[test]
    fn names_are_ggmls_and_obey_the_width() {
        assert_eq!(Format::Q4K.to_string(), "Q4_K");
        assert_eq!(format!("{:>5}|{:<5}", Format::F16, Format::Q5_1), "  F16|Q5_1 ");
    }

    #[test]
    fn an_empty_row_is_decoded() {
        Format::Q6K.decode_row(&[], &mut []);
    }

    #[test]
    #[should_panic(expected = "bytes of 32 values stored as Q8_0")]
    fn a_row_of_another_length_is_refused() {
        Format::Q8_0.decode_row(&[0; 33], &mut [0.0; 32]);
    }
}
