//! The methods, a file each; [`crate::method::METHODS`] lists them.

pub mod full;
pub mod ia3;
pub mod lora;
pub mod miss;
pub mod p_tuning;
pub mod partial;
pub mod prefix_tuning;
pub mod prompt_tuning;
