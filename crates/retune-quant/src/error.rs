//! What can be wrong with a stored matrix.

use crate::format::Format;

/// Why bytes are not a matrix that can be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A ggml type that exists but is not decoded here.
    #[error("tensor type {name} (ggml type {id}) is not supported; use a model stored as one of {}", Format::names())]
    UnsupportedType { name: &'static str, id: u32 },

    /// A number that names no ggml type.
    #[error(
        "{id} is not a known ggml tensor type; the file is damaged or newer than this program, which reads {}",
        Format::names()
    )]
    UnknownType { id: u32 },

    /// A row that does not end with a block.
    #[error(
        "a row of {cols} values cannot be {format}: its blocks hold {} values each, so a row must be a multiple of that; \
         the tensor's shape or type is wrong",
        .format.block_len()
    )]
    RowLength { format: Format, cols: usize },

    /// More values or bytes than an address can count.
    #[error(
        "a {storage} matrix of {rows} x {cols} is larger than this machine can address; the tensor's shape is wrong"
    )]
    TooLarge { storage: &'static str, rows: usize, cols: usize },

    /// The shape needs another number of bytes than there are.
    #[error(
        "a {storage} matrix of {rows} x {cols} takes {expected} bytes, but {found} are there; the file is cut short or the \
         tensor's shape is wrong"
    )]
    ByteCount { storage: &'static str, rows: usize, cols: usize, expected: usize, found: usize },

    /// A block size of 4-bit storage that does not exist.
    #[error(
        "blocks of {found} values; expected a power of two from 32 to 4096, as bitsandbytes writes them: the file is damaged"
    )]
    Blocksize { found: usize },

    /// Another number of block magnitudes than there are blocks.
    #[error(
        "{found} block magnitudes (absmax) for {values} values; in blocks of {blocksize} there must be {expected}: the file \
         is damaged, or its parts belong to different tensors"
    )]
    AbsmaxCount { values: usize, blocksize: usize, expected: usize, found: usize },

    /// Another number of scales than rows.
    #[error(
        "{found} row scales (SCB) for {expected} rows; there must be one for each: the file is damaged, or its parts belong to \
         different tensors"
    )]
    RowScales { expected: usize, found: usize },

    /// A row map that does not name each row once.
    #[error("a row map of {found} entries was given to a matrix of {expected} rows; give one entry for each row")]
    RowMapLength { expected: usize, found: usize },

    /// A row map that points outside of the matrix.
    #[error("row {row} is mapped to stored row {stored}, but the matrix has {rows} rows; entries must be below that")]
    RowMapEntry { row: usize, stored: u32, rows: usize },
}
