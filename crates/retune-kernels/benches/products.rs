//! Speed of the products of a training step, and of what surrounds them, on the shapes of real models.
//!
//! An element of the printed throughput is one operation, a multiplication or an addition, so Gelem/s are GFLOP/s, or GOP/s in 8 bits;
//! where values are quantized it is one value. A shape is tokens x input features x output features. All threads of the pool work:
//! `RAYON_NUM_THREADS` of them, or one for each core.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use retune_kernels::allocator::Aligned;
use retune_kernels::attention::{self, Saved, Scores, Segment};
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::heads::{HeadLayout, Heads, HeadsMut};
use retune_kernels::int8::{Int8Matrix, Int8Rows, Rounding};
use retune_kernels::{F32Panel, PanelSource, peak};
use retune_quant::{Format, Matrix, SharedBytes};

#[global_allocator]
static ALLOCATOR: Aligned = Aligned;

/// Tokens, input features, output features: the linears and the head of SmolLM2-135M, then linears as wide as those of Llama-3.2-1B and
/// Llama-3.1-8B.
const SHAPES: [(usize, usize, usize); 13] = [
    (512, 576, 576),
    (512, 576, 192),
    (512, 576, 1536),
    (512, 576, 49152),
    (2048, 576, 576),
    (2048, 576, 192),
    (2048, 576, 1536),
    (2048, 576, 49152),
    (2048, 1536, 576),
    (2048, 2048, 2048),
    (2048, 2048, 8192),
    (2048, 4096, 4096),
    (2048, 4096, 14336),
];
/// Tokens and width of the rows that adapters and quantizing read.
const ROWS: [(usize, usize); 4] = [(512, 576), (2048, 576), (2048, 1536), (2048, 4096)];
const RANKS: [usize; 3] = [8, 16, 64];

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().build().unwrap();
    // Inside the pool, as in training: from outside, each call would have to wake a thread first.
    pool.install(|| {
        let mut criterion = Criterion::default()
            .without_plots()
            .sample_size(10)
            .nresamples(10_000)
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_secs(1))
            .configure_from_args();
        peak();
        f32_products(&mut criterion);
        #[cfg(target_arch = "x86_64")]
        x86::gemm_crate(&mut criterion);
        int8_products(&mut criterion);
        decode(&mut criterion);
        quantize_weight(&mut criterion);
        quantize_rows(&mut criterion);
        low_rank_products(&mut criterion);
        attention_passes(&mut criterion);
        criterion.final_summary();
    });
}

/// Prints what shares are counted against.
fn peak() {
    let print = |name: &str, speed: Option<f64>| match speed {
        Some(speed) => println!("peak of {name}, {} threads: {:.0} Gelem/s", rayon::current_num_threads(), speed / 1e9),
        None => println!("peak of {name}: unknown on this machine"),
    };
    print("f32 products", peak::f32_operations());
    print("8-bit products", peak::int8_operations());
}

fn start_group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    // Linear sampling would repeat the longest products 55 times.
    group.sampling_mode(SamplingMode::Flat);
    group
}

/// Measures `run` on what `prepare` makes. That is made once, and only when the filter on the command line lets this benchmark run.
fn measure<S>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: String,
    elements: usize,
    prepare: impl Fn() -> S,
    run: impl Fn(&mut S),
) {
    let mut state: Option<S> = None;
    group.throughput(Throughput::Elements(elements as u64));
    group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
        let state = state.get_or_insert_with(&prepare);
        bencher.iter(|| run(state));
    });
}

/// Values from −1 to 1.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect()
}

fn zeros(len: usize) -> Vec<f32> {
    vec![0.0; len]
}

/// Factors of columns, as calibration gives them: with them, rows are multiplied before they are quantized.
fn factors(len: usize) -> Vec<f32> {
    (0..len).map(|i| 0.5 + (i % 16) as f32 / 16.0).collect()
}

/// The forward x·Wᵀ, the input gradient g·W and the weight gradient gᵀ·x of a linear.
fn f32_products(criterion: &mut Criterion) {
    let mut group = start_group(criterion, "f32-forward");
    for (t, k, n) in SHAPES {
        measure(
            &mut group,
            format!("{t}x{k}x{n}"),
            2 * t * k * n,
            || (values(t * k), values(n * k), zeros(t * n)),
            |(x, w, y)| {
                let weight = F32Panel::new(w, k);
                gemm(t, n, &[Term::new(k, MatRef::rows(x, k), Rhs::Transposed(&weight))], Out::set(y, n));
            },
        );
    }
    group.finish();

    let mut group = start_group(criterion, "f32-input-gradient");
    for (t, k, n) in SHAPES {
        measure(
            &mut group,
            format!("{t}x{k}x{n}"),
            2 * t * k * n,
            || (values(t * n), values(n * k), zeros(t * k)),
            |(g, w, dx)| {
                let weight = F32Panel::new(w, k);
                gemm(t, k, &[Term::new(n, MatRef::rows(g, n), Rhs::Plain(&weight))], Out::set(dx, k));
            },
        );
    }
    group.finish();

    let mut group = start_group(criterion, "f32-weight-gradient");
    for (t, k, n) in SHAPES {
        measure(
            &mut group,
            format!("{t}x{k}x{n}"),
            2 * t * k * n,
            || (values(t * n), values(t * k), zeros(n * k)),
            |(g, x, dw)| {
                let x = Rhs::View(MatRef::rows(x, k));
                gemm(n, k, &[Term::new(t, MatRef::rows(g, n).t(), x)], Out::add(dw, k));
            },
        );
    }
    group.finish();
}

/// The forward and the input gradient in 8 bits. Quantizing the rows is part of both, as it is in training.
fn int8_products(criterion: &mut Criterion) {
    let weight = |n: usize, k: usize| Int8Matrix::new(&F32Panel::new(&values(n * k), k), Some(&factors(k)), &[]);

    let mut group = start_group(criterion, "int8-forward");
    for (t, k, n) in SHAPES {
        measure(
            &mut group,
            format!("{t}x{k}x{n}"),
            2 * t * k * n,
            || (values(t * k), Int8Rows::default(), weight(n, k), zeros(t * n)),
            |(x, rows, weight, y)| {
                rows.quantize_input(x, weight);
                gemm(t, n, &[Term::int8(rows, weight)], Out::set(y, n));
            },
        );
    }
    group.finish();

    let mut group = start_group(criterion, "int8-input-gradient");
    for (t, k, n) in SHAPES {
        measure(
            &mut group,
            format!("{t}x{k}x{n}"),
            2 * t * k * n,
            || (values(t * n), Int8Rows::default(), weight(n, k), zeros(t * k)),
            |(g, rows, weight, dx)| {
                rows.quantize_gradient(g, n, t, weight, Rounding::Nearest);
                gemm(t, k, &[Term::int8_plain(rows, weight)], Out::set(dx, k));
            },
        );
    }
    group.finish();
}

/// Quantizing a weight from the form of its file, which happens once for each, when a run starts. An element is a value.
fn quantize_weight(criterion: &mut Criterion) {
    for (name, format) in [("quantize-weight-q8_0", Format::Q8_0), ("quantize-weight-bf16", Format::BF16)] {
        let mut group = start_group(criterion, name);
        // Every weight once: the shapes of 512 tokens have none of their own.
        for (_, k, n) in SHAPES.into_iter().filter(|&(t, ..)| t == 2048) {
            measure(
                &mut group,
                format!("{k}x{n}"),
                n * k,
                || (stored(format, n, k), factors(k)),
                |(weight, factors)| drop(black_box(Int8Matrix::new(&*weight, Some(&factors[..]), &[]))),
            );
        }
        group.finish();
    }
}

/// Stored values made f32, a panel at a time, on one thread.
fn decode(criterion: &mut Criterion) {
    const PANEL: usize = 64;
    const COLUMNS: usize = 4096;
    let mut group = start_group(criterion, "decode");
    for format in Format::ALL {
        let prepare = || {
            // No bits that make a scale infinite or not a number.
            let bytes = vec![1; format.bytes_for(PANEL, COLUMNS).unwrap()];
            (Matrix::new(format, PANEL, COLUMNS, SharedBytes::from_vec(bytes)).unwrap(), zeros(PANEL * COLUMNS))
        };
        measure(&mut group, format.name().to_owned(), PANEL * COLUMNS, prepare, |(matrix, panel)| {
            matrix.panel_f32(0..PANEL, 0..COLUMNS, panel);
        });
    }
}

/// A weight as a file holds it.
fn stored(format: Format, rows: usize, cols: usize) -> Matrix {
    /// 1/128 in 16 bits: the scale of every block of Q8_0.
    const SCALE: [u8; 2] = 0x2000u16.to_le_bytes();
    let mut bytes = vec![0u8; format.bytes_for(rows, cols).unwrap()];
    if format == Format::Q8_0 {
        for (i, block) in bytes.chunks_exact_mut(format.block_bytes()).enumerate() {
            let (scale, values) = block.split_at_mut(SCALE.len());
            scale.copy_from_slice(&SCALE);
            values.iter_mut().enumerate().for_each(|(j, value)| *value = (i + 7 * j) as u8);
        }
    } else {
        assert_eq!(format, Format::BF16, "a format that is not made here");
        for (two, value) in bytes.chunks_exact_mut(2).zip(values(rows * cols)) {
            two.copy_from_slice(&value.to_le_bytes()[2..]);
        }
    }
    Matrix::new(format, rows, cols, SharedBytes::from_vec(bytes)).unwrap()
}

/// Quantizing rows of activations or gradients alone. An element is a value.
fn quantize_rows(criterion: &mut Criterion) {
    let mut group = start_group(criterion, "quantize-rows");
    for (t, k) in ROWS {
        measure(
            &mut group,
            format!("{t}x{k}"),
            t * k,
            // Only the columns of the weight matter here.
            || {
                (
                    values(t * k),
                    Int8Matrix::new(&F32Panel::new(&values(k), k), Some(&factors(k)), &[]),
                    Int8Rows::default(),
                )
            },
            |(x, weight, rows)| rows.quantize_input(x, weight),
        );
    }
    group.finish();
}

/// The products of an adapter that are not part of a larger one: u = x·Aᵀ, v = g·B, and its gradients, dA = vᵀ·x and dBᵀ = uᵀ·g, which
/// have one shape. A width is that of x, or of g.
fn low_rank_products(criterion: &mut Criterion) {
    let shapes = || ROWS.into_iter().flat_map(|(t, k)| RANKS.map(|r| (t, k, r)));

    let mut group = start_group(criterion, "lora-forward");
    for (t, k, r) in shapes() {
        measure(
            &mut group,
            format!("{t}x{k}x{r}"),
            2 * t * k * r,
            || (values(t * k), values(r * k), zeros(t * r)),
            |(x, a, u)| {
                let a = Rhs::View(MatRef::rows(a, k).t());
                gemm(t, r, &[Term::new(k, MatRef::rows(x, k), a)], Out::set(u, r));
            },
        );
    }
    group.finish();

    let mut group = start_group(criterion, "lora-backward");
    for (t, n, r) in shapes() {
        measure(
            &mut group,
            format!("{t}x{n}x{r}"),
            2 * t * n * r,
            || (values(t * n), values(n * r), zeros(t * r)),
            |(g, b, v)| {
                let b = Rhs::View(MatRef::rows(b, r));
                gemm(t, r, &[Term::new(n, MatRef::rows(g, n), b)], Out::set(v, r));
            },
        );
    }
    group.finish();

    let mut group = start_group(criterion, "lora-weight-gradient");
    for (t, k, r) in shapes() {
        measure(
            &mut group,
            format!("{t}x{k}x{r}"),
            2 * t * k * r,
            || (values(t * r), values(t * k), zeros(r * k)),
            |(v, x, da)| {
                let x = Rhs::View(MatRef::rows(x, k));
                gemm(r, k, &[Term::new(t, MatRef::rows(v, r).t(), x)], Out::add(da, k));
            },
        );
    }
    group.finish();
}

/// What one attention layer reads and writes.
struct Attention {
    scores: Scores<'static>,
    segments: [Segment; 1],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    lse: Vec<f32>,
    dout: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Attention {
    /// One sequence, the forward computed.
    fn new(scores: &Scores<'static>, tokens: usize) -> Self {
        let (wide, narrow) = (tokens * scores.queries * scores.head_dim, tokens * scores.keys * scores.head_dim);
        let mut layer = Self {
            scores: scores.clone(),
            segments: [Segment { queries: 0..tokens, keys: 0..tokens }],
            q: values(wide),
            k: values(narrow),
            v: values(narrow),
            out: zeros(wide),
            lse: zeros(tokens * scores.queries),
            dout: values(wide),
            dq: zeros(wide),
            dk: zeros(narrow),
            dv: zeros(narrow),
        };
        layer.forward();
        layer
    }

    /// Where the heads of queries, and of keys and values, lie.
    fn layouts(&self) -> [HeadLayout; 2] {
        [self.scores.queries, self.scores.keys].map(|heads| HeadLayout::dense(heads, self.scores.head_dim))
    }

    fn forward(&mut self) {
        let [wide, narrow] = self.layouts();
        let Self { scores, segments, q, k, v, out, lse, .. } = self;
        let (q, k, v) = (Heads::new(q, wide), Heads::new(k, narrow), Heads::new(v, narrow));
        attention::forward(scores, segments, q, k, v, out, lse);
    }

    fn backward(&mut self) {
        let [wide, narrow] = self.layouts();
        let Self { scores, segments, q, k, v, out, lse, dout, dq, dk, dv } = self;
        let (q, k, v) = (Heads::new(q, wide), Heads::new(k, narrow), Heads::new(v, narrow));
        let gradients = [HeadsMut::new(dq, wide), HeadsMut::new(dk, narrow), HeadsMut::new(dv, narrow)];
        attention::backward(scores, segments, &Saved { q, k, v, out, lse }, dout, gradients, None);
    }
}

/// Causal attention with the heads of SmolLM2-135M. Only pairs of a query and a key that it sees count: two products of them forward,
/// five backward, of which one is the scores again. What is computed of a block beyond the diagonal and thrown away does not.
fn attention_passes(criterion: &mut Criterion) {
    let tokens = 512;
    let scores = Scores::new(9, 3, 64, 0.125);
    let pairs = scores.queries * tokens * (tokens + 1) / 2;
    let product = 2 * pairs * scores.head_dim;
    let name = || format!("{tokens}x{}x{}", scores.queries, scores.head_dim);

    let mut group = start_group(criterion, "attention-forward");
    measure(&mut group, name(), 2 * product, || Attention::new(&scores, tokens), Attention::forward);
    group.finish();

    let mut group = start_group(criterion, "attention-backward");
    measure(&mut group, name(), 5 * product, || Attention::new(&scores, tokens), Attention::backward);
    group.finish();
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use criterion::Criterion;

    use super::{SHAPES, measure, start_group, values, zeros};

    /// The forward by the `gemm` crate, which candle computes with.
    pub fn gemm_crate(criterion: &mut Criterion) {
        let mut group = start_group(criterion, "f32-forward-gemm-crate");
        for (t, k, n) in SHAPES {
            measure(
                &mut group,
                format!("{t}x{k}x{n}"),
                2 * t * k * n,
                || (values(t * k), values(n * k), zeros(t * n)),
                |(x, w, y)| multiply(t, k, n, x, w, y),
            );
        }
        group.finish();
    }

    /// y = x·Wᵀ. The crate wants the stride of columns before that of rows, and the factor of y before that of the product.
    fn multiply(t: usize, k: usize, n: usize, x: &[f32], w: &[f32], y: &mut [f32]) {
        assert!(x.len() == t * k && w.len() == n * k && y.len() == t * n);
        let (row, out_row) = (k as isize, n as isize);
        let threads = ::gemm::Parallelism::Rayon(rayon::current_num_threads());
        // SAFETY: the strides stay inside the slices, whose lengths were checked; y is borrowed mutably, so nothing else overlaps it.
        unsafe {
            ::gemm::gemm(
                t,
                n,
                k,
                y.as_mut_ptr(),
                1,
                out_row,
                false,
                x.as_ptr(),
                1,
                row,
                w.as_ptr(),
                row,
                1,
                0.0f32,
                1.0f32,
                false,
                false,
                false,
                threads,
            );
        }
    }
}
