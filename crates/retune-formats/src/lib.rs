//! The file formats that models, adapters and checkpoints are stored in: reading them with every length checked, writing them
//! so that no half-written file is found.
//!
//! Nothing here knows of models, adapters or training. Every file that is read is treated as hostile.

pub mod atomic;
pub mod bitsandbytes;
pub mod error;
mod fault;
pub mod files;
pub mod gguf;
pub mod safetensors;
pub mod stamp;
pub mod tensorboard;
pub mod weights;

pub use error::Error;
