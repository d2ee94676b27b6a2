//! Running independent pieces of an operation on the threads of the current rayon pool, without allocating.
//!
//! A piece writes memory that no other piece touches, and how work is cut never changes an element's arithmetic, so results do not
//! depend on the number of threads or on which of them runs what.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Calls `f(i)` for every `i` in `0..n`, on all threads of the pool. Threads take the next index as they become free, so the work is even
/// as long as the last pieces are small.
pub fn for_each(n: usize, f: impl Fn(usize) + Sync) {
    fn on_threads(threads: usize, work: &(impl Fn() + Sync)) {
        if threads <= 1 {
            work();
        } else {
            let half = threads / 2;
            rayon::join(|| on_threads(threads - half, work), || on_threads(half, work));
        }
    }
    let threads = rayon::current_num_threads().min(n);
    if threads <= 1 {
        return (0..n).for_each(f);
    }
    let next = AtomicUsize::new(0);
    on_threads(threads, &|| {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return;
            }
            f(i);
        }
    });
}

/// Searches for work in vain after which a thread that [`awake`] keeps up rests between them: about a millisecond of them.
const VAIN_SEARCHES: usize = 5_000;
/// How long it then rests at a time.
const REST: Duration = Duration::from_micros(100);

/// Calls `f` while the pool's other threads look for its pieces without going to sleep between two of them: a thread of rayon's sleeps
/// after some microseconds without work, waking it takes about 20 more, and a training step has thousands of pieces that last no longer.
pub fn awake<R>(f: impl FnOnce() -> R) -> R {
    /// Ends the search also when `f` panics.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let done = AtomicBool::new(false);
    let caller = rayon::current_thread_index();
    rayon::in_place_scope(|scope| {
        scope.spawn_broadcast(|_, context| {
            let mut vain = 0;
            while Some(context.index()) != caller && !done.load(Ordering::Relaxed) {
                if rayon::yield_now() == Some(rayon::Yield::Executed) {
                    vain = 0;
                } else if vain < VAIN_SEARCHES {
                    vain += 1;
                    std::hint::spin_loop();
                } else {
                    std::thread::sleep(REST);
                }
            }
        });
        let _done = Done(&done);
        f()
    })
}

/// Rows per piece so that `rows` rows make a few pieces per thread, each of at least `minimum` rows.
pub fn chunk_rows(rows: usize, minimum: usize) -> usize {
    rows.div_ceil(4 * rayon::current_num_threads()).max(minimum).max(1)
}

/// A mutable slice that several pieces write at once, each in a place of its own.
pub struct SharedMut<'a, T = f32> {
    pointer: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

impl<T> Clone for SharedMut<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<'_, T> {}

// SAFETY: the pointer comes from a `&mut [T]` borrowed for 'a; the callers of `slice` keep pieces disjoint.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    /// Takes the slice for as long as pieces write it.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { pointer: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// No two pieces that run at the same time may ask for overlapping ranges.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "piece outside the slice");
        // SAFETY: inside the slice by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}

impl<T> SharedMut<'_, T> {
    /// A pointer to the element `start`, for pieces that write rows of a matrix which interleave with another piece's.
    pub fn pointer(&self, start: usize) -> *mut T {
        assert!(start < self.len, "piece outside the slice");
        // SAFETY: inside the slice by the assertion.
        unsafe { self.pointer.add(start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_visited_once() {
        for n in [0, 1, 2, 3, 7, 64, 1001] {
            let visits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            for_each(n, |i| {
                visits[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(visits.iter().all(|v| v.load(Ordering::Relaxed) == 1), "n = {n}");
        }
    }

    #[test]
    fn threads_that_are_kept_awake_do_the_work_and_are_let_go() {
        for threads in 1..=4 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let visits = AtomicUsize::new(0);
            let count = |_| {
                visits.fetch_add(1, Ordering::Relaxed);
            };
            let nested = || {
                for_each(100, count);
                // Longer than they search before they rest.
                std::thread::sleep(Duration::from_millis(20));
                for_each(100, count);
                awake(|| for_each(100, count));
            };
            // From a thread of the pool, and from another one.
            assert_eq!(pool.install(|| awake(|| (nested(), 7))).1, 7);
            awake(nested);
            let panics = || pool.install(|| awake(|| panic!("expected")));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
            assert_eq!(visits.into_inner(), 600);
        }
    }
}
