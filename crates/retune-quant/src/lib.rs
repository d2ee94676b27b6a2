//! Stored matrices: the formats a frozen weight may be kept in, and their decoding to f32.
//!
//! A [`Matrix`] keeps the bytes of the file it comes from (usually a memory map, see [`SharedBytes`]) and decodes the
//! panel that a multiplication asks for, so that a model is never expanded as a whole. Values are bit for bit those of
//! the `gguf` Python package and of bitsandbytes, on every instruction set.

mod blocks;
mod bytes;
pub mod dynamic;
mod encoding;
mod error;
mod format;
mod four_bit;
mod int8_rows;
mod matrix;

pub use bytes::{ByteOwner, SharedBytes};
pub use encoding::Encoding;
pub use error::Error;
pub use format::Format;
pub use four_bit::{Absmax, FourBit, QuantType, encode};
pub use int8_rows::{Int8Rows, encode_row};
pub use matrix::Matrix;
