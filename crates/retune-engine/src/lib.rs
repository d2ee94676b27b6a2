//! Runs any transformer that a [`spec::ModelSpec`] describes, forward, backward and for generation.
//!
//! The engine names no family and no method, and reads no file. A family lowers its configuration to a spec, a method lowers itself to an
//! [`overlay::Overlay`] on the spec's linears and vectors. [`model::Model`] is the frozen base, [`compute::Compute`] says in what arithmetic,
//! a [`pass::Pass`] which tokens; a [`run::Run`] joins them.

pub mod calibrate;
pub mod compute;
mod distances;
mod embed;
pub mod generate;
mod head;
mod linear;
pub mod model;
mod norm;
pub mod overlay;
pub mod params;
pub mod pass;
pub mod profile;
mod rope;
pub mod row_norms;
pub mod run;
mod saved;
pub mod spec;
mod sub_layer;
mod work;
pub mod workspace;

pub use run::{NonFinite, Run, Step};
pub use saved::Saving;
pub use work::{Work, work_of_step};
