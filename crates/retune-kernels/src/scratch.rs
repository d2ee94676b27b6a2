//! Scratch memory of the kernels: one growing buffer per thread and purpose, reused by every call, so that a steady step allocates
//! nothing.

use std::cell::RefCell;

/// What a scratch buffer is for. Two purposes never share memory, so an operation may hold several at once.
#[derive(Clone, Copy)]
pub enum Purpose {
    /// The packed right operand of a matrix product.
    PackedB,
    /// The packed left operand of a matrix product.
    PackedA,
    /// The packed right operands of terms that are summed up with another one.
    Small,
    /// A panel decoded from its storage.
    Panel,
    /// A block of attention scores.
    Scores,
    /// A block of attention score gradients.
    ScoreGradients,
    /// A row or column of an operation's own.
    Row,
    /// Integers of a weight that are turned while they are packed.
    Integers,
    /// Keys and values of one head, packed.
    Heads,
    /// Gradients of keys and values, head by query head.
    HeadGradients,
}

const PURPOSES: usize = 10;
/// Alignment of a buffer, in elements: one cache line.
const ALIGN: usize = 16;

thread_local! {
    static BUFFERS: [RefCell<Vec<f32>>; PURPOSES] = const { [const { RefCell::new(Vec::new()) }; PURPOSES] };
}

/// As [`with`], for `len` bytes.
pub fn with_bytes<R>(purpose: Purpose, len: usize, f: impl FnOnce(&mut [i8]) -> R) -> R {
    with(purpose, len.div_ceil(size_of::<f32>()), |elements| {
        // SAFETY: the elements are plain memory of at least `len` bytes, borrowed for as long as the bytes are.
        f(unsafe { std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast::<i8>(), len) })
    })
}

/// Calls `f` with `len` elements of scratch memory, aligned to a cache line. Their contents are whatever was left there.
pub fn with<R>(purpose: Purpose, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    BUFFERS.with(|buffers| {
        // A piece of parallel work may be stolen by a thread that waits inside another one with the same purpose: take the buffer out
        // for the time of the call, so that the nested call finds an empty one and grows its own.
        let mut buffer = buffers[purpose as usize].take();
        if buffer.len() < len + ALIGN {
            buffer = vec![0.0; len + ALIGN];
        }
        let offset = buffer.as_ptr().align_offset(ALIGN * size_of::<f32>()).min(ALIGN);
        let result = f(&mut buffer[offset..offset + len]);
        let mut slot = buffers[purpose as usize].borrow_mut();
        if slot.len() < buffer.len() {
            *slot = buffer;
        }
        result
    })
}
