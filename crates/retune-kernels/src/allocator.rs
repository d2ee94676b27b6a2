//! The memory of vectors and matrices.

use std::alloc::{GlobalAlloc, Layout, System};

/// A cache line, which is also the widest vector.
const LINE: usize = 64;
/// Bytes from which an allocation is aligned. What is smaller is hardly a matrix.
const ALIGNED: usize = 1 << 10;
/// Bytes from which an allocation is mapped: what glibc maps before it has seen larger ones freed.
#[cfg(target_os = "linux")]
const MAPPED: usize = 128 << 10;

/// The system's allocator, with matrices aligned to cache lines. As it is, it starts them 16 bytes into one, and every access to a vector
/// of 64 bytes touches two lines: with 8-bit products that took a tenth of a training step on an Intel Xeon. A program makes it its
/// `#[global_allocator]`.
///
/// On Linux large ones are mapped: memory that is asked for zeroed is not touched before it is used, growing copies nothing, and what is
/// freed goes back to the system at once.
pub struct Aligned;

fn aligned(layout: Layout) -> Layout {
    if layout.size() < ALIGNED { layout } else { layout.align_to(LINE).unwrap_or(layout) }
}

#[cfg(target_os = "linux")]
mod map {
    use std::alloc::Layout;
    use std::ptr::null_mut;

    /// Whether memory of this layout is mapped. Pages are aligned to 4,096 bytes at least.
    pub fn holds(layout: Layout) -> bool {
        layout.size() >= super::MAPPED && layout.align() <= 4096
    }

    pub fn new(size: usize) -> *mut u8 {
        // SAFETY: a new private mapping, backed by no file.
        let memory = unsafe {
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(null_mut(), size, access, kind, -1, 0)
        };
        if memory == libc::MAP_FAILED { null_mut() } else { memory.cast() }
    }

    /// # Safety
    /// `memory` is a mapping of `size` bytes made here, and this its last use at this address.
    pub unsafe fn resize(memory: *mut u8, size: usize, new: usize) -> *mut u8 {
        // SAFETY: by the caller's promise.
        let memory = unsafe { libc::mremap(memory.cast(), size, new, libc::MREMAP_MAYMOVE) };
        if memory == libc::MAP_FAILED { null_mut() } else { memory.cast() }
    }

    /// # Safety
    /// `memory` is a mapping of `size` bytes made here, and not used any more.
    pub unsafe fn free(memory: *mut u8, size: usize) {
        // SAFETY: by the caller's promise. It cannot fail on a whole mapping.
        unsafe { libc::munmap(memory.cast(), size) };
    }
}

/// Where mapping is not built in, nothing is mapped.
#[cfg(not(target_os = "linux"))]
mod map {
    pub fn holds(_: std::alloc::Layout) -> bool {
        false
    }

    pub fn new(_: usize) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub unsafe fn resize(_: *mut u8, _: usize, _: usize) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub unsafe fn free(_: *mut u8, _: usize) {}
}

// SAFETY: whether memory is mapped, and its alignment otherwise, is a function of the layout alone: the same when it is given back.
unsafe impl GlobalAlloc for Aligned {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if map::holds(layout) {
            return map::new(layout.size());
        }
        // SAFETY: the caller keeps what the system's allocator asks for.
        unsafe { System.alloc(aligned(layout)) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if map::holds(layout) {
            // New pages are zero.
            return map::new(layout.size());
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(aligned(layout)) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from where memory of this layout comes from.
        unsafe {
            if map::holds(layout) {
                map::free(pointer, layout.size());
            } else {
                System.dealloc(pointer, aligned(layout));
            }
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises a valid size, and a pointer and layout that belong together.
        unsafe {
            let new_layout = Layout::from_size_align_unchecked(new_size, layout.align());
            if map::holds(layout) && map::holds(new_layout) {
                return map::resize(pointer, layout.size(), new_size);
            }
            let new = self.alloc(new_layout);
            if !new.is_null() {
                std::ptr::copy_nonoverlapping(pointer, new, layout.size().min(new_size));
                self.dealloc(pointer, layout);
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_kept_when_it_grows_and_shrinks() {
        let layout = |size| Layout::from_size_align(size, 4).unwrap();
        let sizes = [1, 1000, ALIGNED, 5000, 131_071, 131_072, 131_073, 1_000_000, 400_000, 200, 3];
        // SAFETY: no layout is empty, memory is given back with its last one, and only bytes inside it are touched.
        unsafe {
            for size in sizes {
                let memory = Aligned.alloc_zeroed(layout(size));
                assert!(std::slice::from_raw_parts(memory, size).iter().all(|&b| b == 0), "{size}");
                Aligned.dealloc(memory, layout(size));
            }
            let mut memory = Aligned.alloc(layout(sizes[0]));
            memory.write_bytes(7, sizes[0]);
            for pair in sizes.windows(2) {
                memory = Aligned.realloc(memory, layout(pair[0]), pair[1]);
                assert!(pair[1] < ALIGNED || memory.addr().is_multiple_of(LINE), "{pair:?} at {memory:?}");
                let kept = std::slice::from_raw_parts(memory, pair[0].min(pair[1]));
                assert!(kept.iter().all(|&b| b == 7), "{pair:?}");
                memory.write_bytes(7, pair[1]);
            }
            Aligned.dealloc(memory, layout(sizes[sizes.len() - 1]));
        }
    }
}
