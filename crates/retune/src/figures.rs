//! What a run knows of itself when it begins, kept in its folder for the page about it: sizes, planned memory, and what is in its data.

use retune_train::data::DataReport;
use serde::{Deserialize, Serialize};

use crate::memory_plan::MemoryPlan;

/// The figures of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// What began it, without what is said once.
    pub command: String,
    /// Steps that are planned.
    pub steps: u64,
    pub base_parameters: u64,
    pub trainable_parameters: u64,
    /// As planned.
    pub memory: MemoryPlan,
    /// Tokens of a pass at most.
    pub pass_tokens: usize,
    pub train: DataReport,
    /// Of the held-out rows, where there are any.
    pub eval: Option<DataReport>,
}
