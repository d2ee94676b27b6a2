//! No file that a person can hand over makes a reader panic, hang, or take memory beyond a bound.
//!
//! The stored corpus is replayed, and a number of changes of it, the same each time. `RETUNE_FUZZ_SECONDS=600` goes on for as long with each
//! target instead, with other changes each time; `RETUNE_FUZZ_TARGET` names one. `TMPDIR=/dev/shm` makes it
//! several times as fast.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use retune_testing::Lcg;
use retune_testing::hostile::{TARGETS, Target, changed, corpus};

/// Changed inputs of a target in a usual run.
const CHANGES: usize = 1000;
/// A template may take all the steps that it is allowed, six times, on a machine that does other things.
const MOST_TIME: Duration = Duration::from_secs(60);
/// Bytes in use at once while an input is read: so many, and so many for each of its own.
const BASE_BYTES: usize = 32 << 20;
const BYTES_PER_BYTE: usize = 256;

/// Counts what is in use, and the most that was.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn add(bytes: usize) {
    let now = IN_USE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MOST.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's promises are those that are asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(size);
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What reading an input took at most, of all inputs.
#[derive(Default)]
struct Worst {
    seconds: f64,
    bytes: usize,
}

/// Reads an input and holds it to the bounds. One that breaks them is kept.
fn read(target: &Target, name: &str, data: &[u8], worst: &mut Worst) {
    let before = IN_USE.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let begin = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.read)(data)));
    let (took, bytes) = (begin.elapsed(), MOST.load(Ordering::Relaxed).saturating_sub(before));
    let problem = match outcome {
        Err(_) => Some("panicked".to_owned()),
        Ok(()) if took > MOST_TIME => Some(format!("took {took:?}")),
        Ok(()) if bytes > BASE_BYTES + BYTES_PER_BYTE * data.len() => {
            Some(format!("had {bytes} bytes in use for {} bytes of input", data.len()))
        }
        Ok(()) => None,
    };
    if let Some(problem) = problem {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-failed", target.name));
        std::fs::write(&kept, data).unwrap();
        panic!("{}: {name} {problem}; the input is kept in {}", target.name, kept.display());
    }
    *worst = Worst { seconds: worst.seconds.max(took.as_secs_f64()), bytes: worst.bytes.max(bytes) };
}

#[test]
fn hostile_files_are_refused_in_bounded_time_and_memory() {
    let seconds =
        std::env::var("RETUNE_FUZZ_SECONDS").ok().map(|text| text.parse::<u64>().expect("a number of seconds"));
    let only = std::env::var("RETUNE_FUZZ_TARGET").ok();
    let current = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile-input");
    for target in TARGETS.iter().filter(|target| only.as_ref().is_none_or(|only| only == target.name)) {
        let corpus = corpus(target.name);
        assert!(!corpus.is_empty(), "{} has no corpus", target.name);
        let mut worst = Worst::default();
        // What is made once is nobody's input.
        (target.read)(&corpus[0].1);
        for (path, data) in &corpus {
            read(target, &path.display().to_string(), data, &mut worst);
        }
        let begin = Instant::now();
        let seed = seconds.map_or(1, |_| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64);
        let mut random = Lcg(seed);
        let mut count = 0;
        let goes_on = |count| match seconds {
            Some(seconds) => begin.elapsed() < Duration::from_secs(seconds),
            None => count < CHANGES,
        };
        while goes_on(count) {
            let (seed, other) = (&corpus[random.below(corpus.len())].1, &corpus[random.below(corpus.len())].1);
            let data = changed(seed, other, &mut random);
            if seconds.is_some() {
                // What ends the process, as an overflow of the stack does, leaves its input there.
                std::fs::write(&current, &data).unwrap();
            }
            read(target, "a changed input", &data, &mut worst);
            count += 1;
        }
        println!(
            "{}: {} stored and {count} changed inputs in {:.1?}; at most {:.2} s and {} KiB each",
            target.name,
            corpus.len(),
            begin.elapsed(),
            worst.seconds,
            worst.bytes >> 10
        );
    }
}
