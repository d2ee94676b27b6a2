//! The methods, a file each; [`crate::method::METHODS`] lists them.

pub mod full;
pub mod lora;
