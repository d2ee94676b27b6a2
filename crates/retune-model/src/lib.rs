//! Models on disk: which families there are, what a configuration means, and reading and writing the tensors.
//!
//! A model on disk is a [`checkpoint::Checkpoint`], whatever its format and family: a [`retune_engine::spec::ModelSpec`] and its tensors
//! under transformers' names. A family is a file of [`families`].

pub mod checkpoint;
pub mod error;
pub mod export;
pub mod families;
pub mod fields;
mod load;
pub mod merge;
pub mod quantize;
pub mod rope;
mod translate;
pub mod unmerge;

pub use error::Error;
