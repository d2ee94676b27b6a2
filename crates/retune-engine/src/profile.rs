//! Where a step's time goes: one counter per kind of operation, always on, read by `retune bench`.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Embedding,
    Norm,
    Linear,
    Quantize,
    LowRank,
    Scale,
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
pub const OPERATIONS: [(Operation, &str); 14] = [
    (Operation::Linear, "linear"),
    (Operation::Quantize, "quantize"),
    (Operation::LowRank, "low_rank"),
    (Operation::Scale, "scale"),
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

thread_local! {
    /// Whether an operation of this thread is being counted: what runs inside it (the head's product inside the head) is not counted again.
    static COUNTING: Cell<bool> = const { Cell::new(false) };
}

/// Adds the time until it is dropped to an operation's counter, unless it is part of another operation.
pub struct Span(Option<(Operation, Instant)>);

/// Starts counting. Operations of a pass follow each other on one thread, whatever they do in parallel inside; passes on several threads
/// add up.
pub fn span(operation: Operation) -> Span {
    Span((!COUNTING.replace(true)).then(|| (operation, Instant::now())))
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some((operation, start)) = self.0 else { return };
        NANOSECONDS[operation as usize].fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        COUNTING.set(false);
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

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn what_runs_inside_is_not_counted_again_and_threads_do_not_hide_each_other() {
        let both = Barrier::new(2);
        let count = || {
            let outer = span(Operation::Rope);
            let inner = span(Operation::Quantize);
            both.wait();
            (outer.0.is_some(), inner.0.is_some())
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(count);
            assert_eq!(count(), (true, false));
            assert_eq!(other.join().unwrap(), (true, false));
        });
        assert!(span(Operation::Rope).0.is_some(), "what has ended still hides others");
    }
}
