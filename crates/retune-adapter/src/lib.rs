//! The methods of fine-tuning: their configuration, how they lower themselves to an overlay, and an adapter's files and merging.
//!
//! Everything here follows the formats and rules of Hugging Face's `peft`, so that an adapter made by one is used by the other.
//! Nothing here runs a model. Matrices are row-major f32 slices.

pub mod check;
pub mod combine;
pub mod config;
pub mod delta;
pub mod error;
pub mod files;
pub mod init;
pub mod method;
pub mod methods;
pub mod names;
mod pattern;
mod peft_config;
pub mod svd;
pub mod targets;
#[cfg(test)]
mod test_model;

pub use check::check_against;
pub use config::{Bias, InitLoraWeights, LoraConfig, ModuleSelection, OneOrMany, Patterns};
pub use delta::{Deltas, LoraDelta, deltas};
pub use error::Error;
pub use files::AdapterFile;
pub use init::init_lora;
pub use method::{METHODS, Method, MethodInfo, initial_params};
pub use methods::full::Full;
pub use methods::lora::tensors_of;
pub use peft_config::compatibility_notes;
pub use targets::{BaseModules, LinearModule, LoraTarget, count_matches, resolve, resolve_modules_to_save, select};
