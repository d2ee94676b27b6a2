//! Training: data sets, the run's configuration, the optimizer, the loop, and checkpoints.

pub mod calibration;
pub mod data;
pub mod error;
pub mod optimizer;
pub mod plan;
pub mod run_config;
pub mod schedule;
pub mod state;
pub mod trainer;

pub use error::Error;
