//! Where a step's time goes: one counter per kind of operation, always on, read by `retune bench`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Embedding,
    Norm,
    Linear,
    Quantize,
    LowRank,
    WeightGradient,
    Rope,
    Attention,
    AttentionBackward,
    Activation,
    Head,
    SavedActivations,
    Optimizer,
}

/// All kinds, with the names they are reported under.
pub const OPERATIONS: [(Operation, &str); 13] = [
    (Operation::Linear, "linear"),
    (Operation::Quantize, "quantize"),
    (Operation::LowRank, "low_rank"),
    (Operation::WeightGradient, "weight_gradient"),
    (Operation::Attention, "attention"),
    (Operation::AttentionBackward, "attention_backward"),
    (Operation::Head, "head"),
    (Operation::Activation, "activation"),
    (Operation::Norm, "norm"),
    (Operation::Rope, "rope"),
    (Operation::Embedding, "embedding"),
    (Operation::SavedActivations, "saved_activations"),
    (Operation::Optimizer, "optimizer"),
];

static NANOSECONDS: [AtomicU64; OPERATIONS.len()] = [const { AtomicU64::new(0) }; OPERATIONS.len()];

/// Whether an operation is being counted: what runs inside it (the head's product inside the head) is not counted again.
static COUNTING: AtomicBool = AtomicBool::new(false);

/// Adds the time until it is dropped to an operation's counter, unless it is part of another operation.
pub struct Span(Option<(Operation, Instant)>);

/// Starts counting. Operations follow each other on one thread, whatever they do in parallel inside.
pub fn span(operation: Operation) -> Span {
    Span((!COUNTING.swap(true, Ordering::Relaxed)).then(|| (operation, Instant::now())))
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some((operation, start)) = self.0 else { return };
        NANOSECONDS[operation as usize].fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        COUNTING.store(false, Ordering::Relaxed);
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
