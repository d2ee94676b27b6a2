//! Runs any transformer that a [`spec::ModelSpec`] describes.
//!
//! The engine names no family and no method, and reads no file. A family lowers its configuration to a spec, a method lowers itself to an
//! overlay on the spec's linears and vectors.

pub mod spec;
