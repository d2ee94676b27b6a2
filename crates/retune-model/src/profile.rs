//! Where a step's time goes: one counter per kind of operation, always on, read by `retune bench`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Embedding,
    Norm,
    Linear,
    LowRank,
    WeightGradient,
    Rope,
    Attention,
    AttentionBackward,
    Activation,
    Head,
    Optimizer,
}

/// All kinds, with the names they are reported under.
pub const OPERATIONS: [(Operation, &str); 11] = [
    (Operation::Linear, "linear"),
    (Operation::LowRank, "low_rank"),
    (Operation::WeightGradient, "weight_gradient"),
    (Operation::Attention, "attention"),
    (Operation::AttentionBackward, "attention_backward"),
    (Operation::Head, "head"),
    (Operation::Activation, "activation"),
    (Operation::Norm, "norm"),
    (Operation::Rope, "rope"),
    (Operation::Embedding, "embedding"),
    (Operation::Optimizer, "optimizer"),
];

static NANOSECONDS: [AtomicU64; OPERATIONS.len()] = [const { AtomicU64::new(0) }; OPERATIONS.len()];

/// Adds the time until it is dropped to an operation's counter.
pub struct Span {
    operation: Operation,
    start: Instant,
}

/// Starts counting.
pub fn span(operation: Operation) -> Span {
    Span { operation, start: Instant::now() }
}

impl Drop for Span {
    fn drop(&mut self) {
        let elapsed = self.start.elapsed().as_nanos() as u64;
        NANOSECONDS[self.operation as usize].fetch_add(elapsed, Ordering::Relaxed);
    }
}

/// Seconds counted so far, by operation name.
pub fn seconds() -> Vec<(&'static str, f64)> {
    let read = |op: Operation| NANOSECONDS[op as usize].load(Ordering::Relaxed) as f64 * 1e-9;
    OPERATIONS.iter().map(|&(op, name)| (name, read(op))).collect()
}

/// Sets all counters to zero.
pub fn reset() {
    NANOSECONDS.iter().for_each(|n| n.store(0, Ordering::Relaxed));
}
