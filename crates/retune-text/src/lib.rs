//! Text as models see it: tokenizers and chat templates.
//!
//! The heavy dependencies of both, the `tokenizers` crate and a Jinja engine, stop here.

pub mod chat_template;
pub mod date;
pub mod error;
pub mod go_template;
pub mod tokenizer;

pub use error::Error;
