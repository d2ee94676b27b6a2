//! The memory of vectors and matrices.

use std::alloc::{GlobalAlloc, Layout, System};

/// A cache line, which is also the widest vector.
const LINE: usize = 64;
/// Bytes from which an allocation is aligned. What is smaller is hardly a matrix.
const LARGE: usize = 1 << 10;

/// The system's allocator, with large allocations aligned to cache lines. As it is, it starts them 16 bytes into one, and every access to a
/// vector of 64 bytes touches two lines: with 8-bit products that took a tenth of a training step on an Intel Xeon. A program makes it its
/// `#[global_allocator]`.
pub struct Aligned;

fn aligned(layout: Layout) -> Layout {
    if layout.size() < LARGE { layout } else { layout.align_to(LINE).unwrap_or(layout) }
}

// SAFETY: every request goes on to the system's allocator, with an alignment that is a function of the layout alone: the same when the
// memory is given back. `realloc` and `alloc_zeroed` end in these two.
unsafe impl GlobalAlloc for Aligned {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps what the system's allocator asks for.
        unsafe { System.alloc(aligned(layout)) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above, and the pointer came from that allocator.
        unsafe { System.dealloc(pointer, aligned(layout)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_allocations_start_with_a_line_and_small_ones_are_as_they_were() {
        for size in [1, 1000, LARGE, LARGE + 4, 100_000, 10_000_000] {
            let layout = Layout::from_size_align(size, 4).unwrap();
            // SAFETY: the layout is not empty, and what was allocated is given back with it.
            let address = unsafe {
                let memory = Aligned.alloc(layout);
                Aligned.dealloc(memory, layout);
                memory.addr()
            };
            assert!(address != 0 && (size < LARGE || address.is_multiple_of(LINE)), "{size} bytes at {address:#x}");
        }
        let small = Layout::from_size_align(LARGE - 1, 4).unwrap();
        assert_eq!(aligned(small), small);
    }
}
