//! Models: reading them from disk, and running them forward, backward and for generation.
//!
//! A model on disk is a [`checkpoint::Checkpoint`], whatever its format. [`model::Model`] is the same in memory: frozen matrices stay in
//! their storage, what is trained lies in one flat vector. A [`pass::Pass`] is what goes through it.

pub mod adapter;
mod backward;
pub mod calibration;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod export;
mod forward;
pub mod generate;
mod linear;
pub mod model;
pub mod params;
pub mod pass;
pub mod profile;
mod work;
pub mod workspace;

pub use error::Error;
pub use linear::Dropout;
pub use work::Work;
