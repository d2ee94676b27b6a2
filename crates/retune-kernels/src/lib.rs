//! Numeric operations on slices: the forward and backward of everything a transformer block is made of.
//!
//! One file holds one operation: its `forward`, its `backward`, and the plain `f64` reference both are tested against. Nothing here
//! knows of models, files or adapters. Shapes are row-major and written `[rows, columns]`; `T` is the number of tokens of a pass,
//! sequences being laid end to end. No operation allocates in a steady state: scratch memory is kept per thread and reused.

pub mod activation;
pub mod allocator;
pub mod attention;
pub mod bf16;
pub mod column_scale;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod gemm;
pub mod glu;
pub mod heads;
pub mod int8;
pub mod isa;
pub mod layer_norm;
pub mod matvec;
mod panel;
pub mod parallel;
pub mod peak;
pub mod random;
pub mod rms_norm;
pub mod rope;
pub mod row_squares;
pub mod rows;
pub mod scratch;
#[cfg(test)]
mod testing;
pub mod vector;

pub use panel::{F32Panel, PanelSource};
