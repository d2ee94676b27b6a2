//! How good a model's answers are, and the scores that papers report.
//!
//! Of texts beside their references: `rouge.rs` has ROUGE and `porter.rs` its stemmer, `squad.rs` the exact match and the token F1 of SQuAD, `labels.rs`
//! accuracy and macro-F1; `bootstrap.rs` how sure the difference of two is. Of rows of data: `questions.rs` says what they ask, `shots.rs` puts examples before them, `answers.rs` answers them.

pub mod answers;
pub mod bootstrap;
mod counts;
pub mod labels;
mod porter;
pub mod questions;
pub mod rouge;
pub mod shots;
pub mod squad;
