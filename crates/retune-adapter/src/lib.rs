//! PEFT's LoRA on slices: configuration, choice of modules, names, files, initialisation, dropout and merging.
//!
//! Everything here follows the formats and rules of Hugging Face's `peft`, so that an adapter made by one is used by the other;
//! nothing here knows of models or training. Matrices are row-major f32 slices.

pub mod check;
pub mod config;
pub mod dropout;
pub mod error;
pub mod files;
pub mod init;
pub mod merge;
pub mod names;
mod pattern;
mod peft_config;
pub mod random;
pub mod targets;
#[cfg(test)]
mod test_model;

pub use check::check_against;
pub use config::{Bias, InitLoraWeights, LoraConfig, ModuleSelection, OneOrMany, Patterns};
pub use error::Error;
pub use files::AdapterFile;
pub use init::init_lora;
pub use merge::merged_delta;
pub use peft_config::compatibility_notes;
pub use targets::{LinearModule, LoraTarget, count_matches, resolve, resolve_modules_to_save, select};
