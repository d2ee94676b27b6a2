//! A step like those before it allocates nothing: what a step needs is kept from the first ones. No other test may be here: allocations of
//! the whole process are counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rayon::ThreadPoolBuilder;
use retune_engine::calibrate::Integers;
use retune_engine::compute::Compute;
use retune_engine::overlay::OutputScale;
use retune_engine::pass::Pass;
use retune_kernels::scratch::{self, Purpose};
use retune_testing::{Case, checkpoint};
use retune_train::data::{Example, steps_per_epoch};
use retune_train::run_config::RunConfig;
use retune_train::trainer::{Passes, Trained, Trainer, fill_pass};
use serde_json::json;

const ROWS_PER_STEP: usize = 3;
const TOKENS_PER_PASS: usize = 60;
/// More elements than any scratch buffer of the model below takes.
const SCRATCH: usize = 1 << 17;
const PURPOSES: [Purpose; 9] = [
    Purpose::PackedB,
    Purpose::PackedA,
    Purpose::Small,
    Purpose::Panel,
    Purpose::Scores,
    Purpose::ScoreGradients,
    Purpose::Row,
    Purpose::Heads,
    Purpose::HeadGradients,
];

/// The system's allocator, counting what all threads ask of it. What is zeroed or made larger is counted too: both end in `alloc` here.
struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every request goes on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Ordering::SeqCst) {
            ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: the caller keeps what the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above, and the pointer came from that allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A small model, and one of each kind whose sub-layers need other buffers: norms after them, norms of queries and keys, a bias by
/// distance, other rotations for long rows.
const MODEL: &str = "gguf_llama";
const OTHERS: [&str; 4] = ["gemma2", "gemma3", "bloom", "phi3_longrope"];

/// Rows whose steps are of one pass and of several, of a pass of two tokens too. Every other one begins with the same ids.
fn examples() -> Vec<Example> {
    let mut examples = Vec::new();
    for (row, length) in [60, 2, 60, 17, 33, 5, 9, 41, 24, 3, 58, 12].into_iter().enumerate() {
        let first = |i: usize| if row % 2 == 0 && i < 20 { 0 } else { 31 * row };
        let ids = (0..length).map(|i| ((first(i) + 7 * i) % 96) as u32).collect();
        examples.push(Example { row, source: vec![], ids, trained: (0..length).map(|i| i > 0).collect() });
    }
    examples
}

/// Puts scales on what all linears of the blocks read and write, every other one over the norms of its weight's rows.
fn scale_linears(case: &mut Case) {
    let linears = case.model.linears();
    for (id, linear) in linears[..linears.len() - 1].iter().enumerate() {
        let mut add = |part: &str, n: usize| {
            case.params.resize(case.params.len() + n, 1.0);
            case.overlay.layout.add(format!("{}.{part}", linear.name), vec![n], None)
        };
        let (input, output) = (add("input", linear.cols()), add("output", linear.rows()));
        let change = &mut case.overlay.linears[id];
        change.input_scale = Some(input);
        change.output_scale =
            Some(if id % 2 == 0 { OutputScale::OverNorm(output) } else { OutputScale::Plain(output) });
    }
    case.refresh();
}

/// How often a step allocates.
fn allocations(trainer: &mut Trainer) -> usize {
    ALLOCATIONS.store(0, Ordering::SeqCst);
    COUNTING.store(true, Ordering::SeqCst);
    let report = trainer.step();
    COUNTING.store(false, Ordering::SeqCst);
    report.unwrap();
    ALLOCATIONS.load(Ordering::SeqCst)
}

/// How often each step of a third epoch allocates.
fn third_epoch(
    model: &str,
    checkpointing: &str,
    saved: &str,
    int8: bool,
    dropout: f64,
    scales: bool,
    examples: &[Example],
) -> Vec<usize> {
    let run = json!({
        "model": "base",
        "output_dir": "out",
        "adapter": { "r": 4, "lora_dropout": dropout, "target_modules": "all-linear" },
        "data": { "train": "train.jsonl", "max_length": TOKENS_PER_PASS },
        "training": {
            "epochs": 3,
            "batch_size": ROWS_PER_STEP,
            "tokens_per_pass": TOKENS_PER_PASS,
            "activation_checkpointing": checkpointing,
            "saved_activations": saved,
        },
    });
    let config = RunConfig::parse(&run.to_string(), "the run", &[]).unwrap();
    let mut case = Case::with_method(model, checkpoint(model), &*config.adapter.as_ref().unwrap().0);
    if scales {
        scale_linears(&mut case);
    }
    let compute = if int8 {
        let mut pass = Pass::default();
        fill_pass(&mut pass, examples, &[0, 1], 0, TOKENS_PER_PASS);
        let (compute, choices) =
            Compute::calibrate(&case.model, &case.overlay, &case.params, &pass, true, f64::INFINITY, Integers::Kept);
        assert!(choices.iter().all(|choice| choice.int8));
        compute
    } else {
        Compute::default()
    };
    // Not shuffled, so that every epoch has the same passes.
    let mut trainer = Trainer::new(
        Trained { model: &case.model, overlay: &case.overlay, compute: &compute },
        &config.training,
        Passes::resolve(&config.training, &case.model, &case.overlay, int8, 60),
        false,
        examples,
        &[],
        case.params.clone(),
    );
    assert!(allocations(&mut trainer) > 0, "the first step makes its buffers: nothing is counted");
    let steps = steps_per_epoch(examples.len(), ROWS_PER_STEP, 1);
    for _ in 1..2 * steps {
        trainer.step().unwrap();
    }
    (0..steps).map(|_| allocations(&mut trainer)).collect()
}

#[test]
fn a_step_like_those_before_it_allocates_nothing() {
    let examples = examples();
    // Both pools live to the end: a thread that ends allocates.
    let pools = [1, 2].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    for pool in &pools {
        // Which thread takes the largest piece of an operation is chance, and may be another one in a later step.
        pool.broadcast(|_| PURPOSES.into_iter().for_each(|purpose| scratch::with(purpose, SCRATCH, |_| ())));
        // Without dropout rows share what they begin with in common.
        let ways = [
            ("none", "f32", false, 0.1),
            ("none", "f32", false, 0.0),
            ("none", "bf16", false, 0.1),
            ("layer", "auto", false, 0.1),
            ("none", "auto", true, 0.1),
            ("none", "auto", true, 0.0),
            ("layer", "auto", true, 0.0),
        ];
        let others = OTHERS.iter().flat_map(|model| [ways[1], ways[2], ways[6]].map(|way| (*model, way)));
        let others = others.map(|(model, way)| (model, way, false));
        let scaled = ways.map(|way| (MODEL, way, true));
        let all = ways.map(|way| (MODEL, way, false)).into_iter().chain(scaled).chain(others);
        for (model, (checkpointing, saved, int8, dropout), scales) in all {
            let counts = pool.install(|| third_epoch(model, checkpointing, saved, int8, dropout, scales, &examples));
            let threads = pool.current_num_threads();
            let what = format!(
                "{model}, {threads} threads, {checkpointing}, {saved}, int8 {int8}, dropout {dropout}, scales {scales}"
            );
            // The order of the rows is made anew for each epoch, by its first step.
            assert!(counts[0] <= 1, "{what}: {counts:?}");
            assert_eq!(counts[1..], [0, 0, 0], "{what}");
        }
    }
}
