//! The methods of fine-tuning: their configuration, how they lower themselves to an overlay, and an adapter's files and merging.
//!
//! Everything here follows the formats and rules of Hugging Face's `peft`, so that an adapter made by one is used by the other.
//! Nothing here runs a model. Matrices are row-major f32 slices.

pub mod check;
pub mod combine;
pub mod config;
pub mod convert;
pub mod delta;
mod encoder;
pub mod error;
pub mod files;
pub mod gguf;
pub mod init;
pub mod method;
pub mod methods;
pub mod mlx;
pub mod names;
mod pattern;
mod peft_config;
pub mod selection;
pub mod svd;
pub mod targets;
#[cfg(test)]
mod test_model;
mod walk;

pub use config::{Bias, InitLoraWeights, LoraConfig, ModuleSelection, OneOrMany, Patterns};
pub use delta::{Deltas, LoraDelta, deltas};
pub use error::Error;
pub use files::{AdapterFile, Tensors, tensors_of};
pub use init::init_lora;
pub use method::{METHODS, Method, MethodInfo, Texts, by_name, initial_params};
pub use methods::full::Full;
pub use selection::Selection;
pub use targets::{BaseModules, LinearModule, LoraTarget, count_matches, resolve, select};
