//! f32 matrix product `C[m, n] (+)= Σ A·B` over one or several terms, the right operand read by panels whatever its storage.
//!
//! Several terms share one pass over C: a linear and its low-rank adapter are `[x, u]·[W, B]ᵀ`, and the input gradients of q, k and v
//! with their adapters are one product. The right operand is packed into panels as wide as a register tile, by the thread that uses them
//! next; the left one is read in place when its rows are contiguous and packed otherwise. M and N are cut among threads freely, K only at term ends and at multiples
//! of [`KC`], so every element is summed in the same order whatever the number of threads.
//!
//! Blocking after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).

mod gradient;
mod int8_kernel;
mod kernel;
mod pack;
mod small;

use std::ops::Range;

use crate::int8::{GROUP, Int8Matrix, Int8Rows, PANEL, runs};
use crate::isa::{int8_isa, isa};
use crate::panel::PanelSource;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};
use gradient::Gradient;
use int8_kernel::Int8Tile;
#[cfg(target_arch = "aarch64")]
pub(crate) use int8_kernel::sdot;
use kernel::{MR, Segment, Target};
pub use pack::transpose_rows;
use pack::{pack_b, pack_columns, pack_panel, packed_width};
use small::{PackedTerms, SmallTerms};

/// Rows of the left operand that a tile takes.
pub(crate) const TILE_ROWS: usize = MR;
/// Longest run of the contraction between two visits of a tile of C.
const KC: usize = 1536;
/// Rows of C up to which a right operand with contiguous columns is read in place: packing would cost a good part of the product.
const FEW_ROWS: usize = 8 * MR;
/// The same where the right operand is read as it lies, wherever that is: what is used of it stays in the first-level cache.
const IN_PLACE_KC: usize = 96;
/// Longest contraction of a term in f32 that is summed up with the term before it while a tile is in registers.
const SMALL_K: usize = 64;
/// Least number of columns that one piece of work packs and multiplies.
const GROUP_COLS: usize = 64;
/// The same where quantized rows of more than [`CACHED`] bytes would be read from memory again for each of those.
const WIDE_GROUP_COLS: usize = 256;
/// Bytes of a right operand that stay in a second-level cache while rows of the left one pass by.
const GROUP_BYTES: usize = 768 << 10;
/// Bytes of rows that stay in a second-level cache.
const CACHED: usize = 512 << 10;
/// The same of a weight in 8 bits, of a few runs.
const INT8_RUN_BYTES: usize = 1 << 20;
/// Elements of a result that is in no cache when it is read next, so that it is stored past them: the line of a target need not be fetched
/// to be overwritten. The logits of a large vocabulary are such a result.
const STREAMED: usize = 16 << 20;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Tiles of a run of quantized rows that stay in a second-level cache.
const INT8_TILES: usize = 96;

/// A strided view of f32 values: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct MatRef<'a> {
    data: &'a [f32],
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// Row-major rows that start `stride` elements apart.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// What lies from a row and a column on.
    ///
    /// # Panics
    /// When that is beyond the data.
    pub fn from(self, row: usize, col: usize) -> Self {
        Self { data: &self.data[row * self.row_stride + col * self.col_stride..], ..self }
    }

    fn covers(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// The right operand `B[k, n]` of a term.
#[derive(Clone, Copy)]
pub enum Rhs<'a> {
    /// Values in memory.
    View(MatRef<'a>),
    /// A weight `W[n, k]`: the product is with Wᵀ (a linear's forward).
    Transposed(&'a dyn PanelSource),
    /// A weight `W[k, n]`: the product is with W (a linear's input gradient).
    Plain(&'a dyn PanelSource),
}

/// One term of a product.
#[derive(Clone, Copy)]
pub enum Term<'a> {
    /// `scale · A[m, k] · B[k, n]` in f32.
    F32 { k: usize, a: MatRef<'a>, b: Rhs<'a>, scale: f32 },
    /// Quantized rows with a weight in 8 bits.
    Int8 { a: &'a Int8Rows, w: &'a Int8Matrix, side: Side },
}

/// How a weight `W` in 8 bits is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The product is with Wᵀ (a linear's forward).
    Transposed,
    /// The product is with W (a linear's input gradient).
    Plain,
}

impl<'a> Term<'a> {
    /// `A[m, k] · B[k, n]`.
    pub fn new(k: usize, a: MatRef<'a>, b: Rhs<'a>) -> Self {
        Self::scaled(k, a, b, 1.0)
    }

    /// `scale · A[m, k] · B[k, n]`.
    pub fn scaled(k: usize, a: MatRef<'a>, b: Rhs<'a>, scale: f32) -> Self {
        Self::F32 { k, a, b, scale }
    }

    /// `x·Wᵀ`, the rows quantized by [`Int8Rows::quantize_input`].
    pub fn int8(rows: &'a Int8Rows, weight: &'a Int8Matrix) -> Self {
        Self::Int8 { a: rows, w: weight, side: Side::Transposed }
    }

    /// `g·W`, the rows quantized by [`Int8Rows::quantize_gradient`].
    pub fn int8_plain(rows: &'a Int8Rows, weight: &'a Int8Matrix) -> Self {
        Self::Int8 { a: rows, w: weight, side: Side::Plain }
    }

    /// Panics unless the operands cover a product of `m` rows and `n` columns.
    fn check(&self, m: usize, n: usize) {
        match *self {
            Self::F32 { k, a, b, .. } => {
                assert!(k > 0, "a term without a contraction");
                assert!(a.covers(m, k), "A is smaller than [{m}, {k}]");
                let fits = match b {
                    Rhs::View(view) => view.covers(k, n),
                    Rhs::Transposed(w) => w.rows() == n && w.cols() == k,
                    Rhs::Plain(w) => w.rows() == k && w.cols() == n,
                };
                assert!(fits, "B is not [{k}, {n}]");
            }
            Self::Int8 { a, w, side } => {
                let shape = match side {
                    Side::Transposed => (w.cols(), w.rows()),
                    Side::Plain => (w.rows(), w.cols()),
                };
                assert!(a.rows() == m && (a.cols(), n) == shape, "not a product of [{m}, {n}]");
            }
        }
    }

    /// How often each tile of C is visited for it.
    fn visits(&self) -> usize {
        match *self {
            Self::F32 { k, .. } => k.div_ceil(KC),
            Self::Int8 { a, .. } => runs(a.cols()).count(),
        }
    }

    /// Length of the contraction of a left operand that must be packed, 0 for others.
    fn packed_k(&self) -> usize {
        match *self {
            Self::F32 { k, a, .. } if a.col_stride != 1 => k,
            _ => 0,
        }
    }
}

/// Where a product's result goes: row-major, rows `stride` apart.
pub struct Out<'a> {
    data: &'a mut [f32],
    stride: usize,
    to: To<'a>,
}

/// What a product is added to.
#[derive(Clone, Copy)]
enum To<'a> {
    Nothing,
    Itself,
    Other(&'a [f32]),
}

impl<'a> Out<'a> {
    /// Overwrites rows that start `stride` elements apart.
    pub fn set(data: &'a mut [f32], stride: usize) -> Self {
        Self { data, stride, to: To::Nothing }
    }

    /// Adds to rows that start `stride` elements apart.
    pub fn add(data: &'a mut [f32], stride: usize) -> Self {
        Self { data, stride, to: To::Itself }
    }

    /// Overwrites rows with the product plus `addend`, which has the same stride.
    pub fn sum(data: &'a mut [f32], stride: usize, addend: &'a [f32]) -> Self {
        Self { data, stride, to: To::Other(addend) }
    }

    /// Puts the dense rows `values` of `width` elements (plus what was to be added to) in place; what follows is added to that.
    pub fn plus(self, values: &[f32], width: usize) -> Self {
        let Self { data, stride, to } = self;
        for (i, row) in values.chunks_exact(width).enumerate() {
            let range = i * stride..i * stride + width;
            for (j, v) in range.clone().zip(row) {
                let before = match to {
                    To::Nothing => 0.0,
                    To::Itself => data[j],
                    To::Other(addend) => addend[j],
                };
                data[j] = before + v;
            }
        }
        Self { data, stride, to: To::Itself }
    }

    /// The values.
    pub fn into_data(self) -> &'a mut [f32] {
        self.data
    }
}

/// Computes the product on the threads of the pool, and gives its rows back.
///
/// # Panics
/// When an operand is too small for the shape: a fault of the caller, never of a file.
pub fn gemm<'a>(m: usize, n: usize, terms: &[Term], out: Out<'a>) -> &'a mut [f32] {
    let Out { data, stride, to } = out;
    if m == 0 || n == 0 {
        return data;
    }
    // Rows that overlap would be written by several threads at once.
    assert!(m == 1 || stride >= n, "rows of C overlap");
    let covered = (m - 1) * stride + n;
    assert!(covered <= data.len(), "C is smaller than [{m}, {n}]");
    if let To::Other(addend) = to {
        assert!(covered <= addend.len(), "the addend is smaller than [{m}, {n}]");
    }
    terms.iter().for_each(|term| term.check(m, n));
    // A vector that is streamed must be aligned, and a tile that is visited again is better found in a cache.
    let is_aligned = data.as_ptr().addr().is_multiple_of(LINE) && stride.is_multiple_of(LINE / size_of::<f32>());
    let is_visited_once = matches!(to, To::Nothing) && terms.iter().map(Term::visits).sum::<usize>() == 1;
    let streams = m * n >= STREAMED && is_aligned && is_visited_once;
    assert!(!terms.is_empty(), "a product of nothing");
    if let [Term::F32 { k, a, b: Rhs::View(b), scale }] = *terms
        && (a.row_stride, b.col_stride) == (1, 1)
        && m > FEW_ROWS
        && a.col_stride > 1
    {
        Gradient { m, n, k, a, b, scale, c: Shared { c: SharedMut::new(data), stride, to, streams: false } }.run();
        return data;
    }
    let packed_a: usize = terms.iter().map(Term::packed_k).sum();
    let m_padded = m.next_multiple_of(MR);
    scratch::with(Purpose::PackedA, packed_a * m_padded, |packed| {
        let mut from = 0;
        for term in terms {
            if let Term::F32 { k, a, .. } = *term
                && a.col_stride != 1
            {
                let to = from + k * m_padded;
                pack_columns(a, 0..m, 0..k, &mut packed[from..to]);
                from = to;
            }
        }
        Job { m, n, terms, packed_a: packed, c: Shared { c: SharedMut::new(data), stride, to, streams } }.run();
    });
    data
}

/// C, of which every thread writes tiles of its own.
struct Shared<'a> {
    c: SharedMut<'a>,
    stride: usize,
    to: To<'a>,
    /// Whether it is stored past the caches.
    streams: bool,
}

impl Shared<'_> {
    /// Where a tile goes and what it is added to: what was there at the `first` visit, or what an earlier one left.
    fn place(&self, row: usize, cols: &Range<usize>, first: bool) -> Target {
        let start = row * self.stride + cols.start;
        let c = self.c.pointer(start);
        let addend = match self.to {
            _ if !first => c.cast_const(),
            To::Nothing => std::ptr::null(),
            To::Itself => c.cast_const(),
            To::Other(addend) => addend[start..].as_ptr(),
        };
        Target { c, stride: self.stride, addend, cols: cols.len(), streams: self.streams }
    }
}

/// A product whose left operands are ready.
struct Job<'a> {
    m: usize,
    n: usize,
    terms: &'a [Term<'a>],
    packed_a: &'a [f32],
    c: Shared<'a>,
}

impl Job<'_> {
    /// Cuts C into groups of columns. A piece packs the right operand for its group, a run of K at a time, into the second-level cache,
    /// and passes all rows by it. Groups that would leave threads without work are cut by rows as well.
    fn run(&self) {
        let width = kernel::panel_width(isa());
        let block = |term: &Term| match term {
            Term::F32 { b: Rhs::Plain(w), .. } if w.as_f32().is_none() => w.block_cols(),
            _ => 1,
        };
        let threads = rayon::current_num_threads();
        let int8_bytes = |term: &Term| if let Term::Int8 { a, .. } = term { self.m * a.cols() } else { 0 };
        let most = self.terms.iter().map(int8_bytes).fold(0, usize::max);
        let depth = |term: &Term| if let Term::F32 { k, .. } = term { KC.min(*k) } else { 0 };
        let least = if most == 0 {
            let packed = GROUP_BYTES / (4 * self.terms.iter().map(depth).fold(1, usize::max));
            // No fewer than two for each thread.
            (packed.min(self.n / (2 * threads)) / GROUP_COLS * GROUP_COLS).max(GROUP_COLS)
        } else if most > CACHED && self.n >= 2 * WIDE_GROUP_COLS {
            WIDE_GROUP_COLS
        } else {
            GROUP_COLS
        };
        // A multiple of the panels of weights in 8 bits as well.
        let columns = self.terms.iter().map(block).fold(least, usize::max).next_multiple_of(width.max(PANEL));
        let groups = self.n.div_ceil(columns);
        let tiles = self.m.div_ceil(MR);
        let whole = groups / threads * threads;
        let parts = threads.min(tiles);
        parallel::for_each(whole + (groups - whole) * parts, |piece| {
            let (group, rows) = if piece < whole {
                (piece, 0..tiles)
            } else {
                let part = (piece - whole) % parts;
                (whole + (piece - whole) / parts, part * tiles / parts..(part + 1) * tiles / parts)
            };
            let start = group * columns;
            self.group(start..(start + columns).min(self.n), width, rows);
            if self.c.streams {
                kernel::fence();
            }
        });
    }

    fn group(&self, columns: Range<usize>, width: usize, tiles: Range<usize>) {
        let mut packed_a = self.packed_a;
        let (mut terms, mut first) = (self.terms, true);
        while let [term, rest @ ..] = terms {
            terms = rest;
            let mut small = SmallTerms::default();
            if let Term::Int8 { a, w, side: Side::Transposed } = *term
                && w.outlier_count() > 0
            {
                let (count, weights) = w.outliers();
                let x = MatRef::rows(a.outliers(count), count);
                small.push(count, x, Rhs::View(MatRef::rows(weights, count).t()), 1.0);
            }
            while let [Term::F32 { k, a, b, scale }, rest @ ..] = terms
                && *k <= SMALL_K
                && a.col_stride == 1
                && !small.is_full()
            {
                small.push(*k, *a, *b, *scale);
                terms = rest;
            }
            let panel = if let Term::Int8 { .. } = term { int8_kernel::tile_width(int8_isa()) } else { width };
            scratch::with(Purpose::Small, small.depth() * columns.len().next_multiple_of(panel), |packed| {
                let small = small.pack(columns.clone(), panel, packed);
                match *term {
                    Term::F32 { k, a, b, scale } => {
                        let a = if a.col_stride == 1 { Left::Rows(a) } else { Left::Packed { data: packed_a, k } };
                        self.f32_term(k, a, b, scale, columns.clone(), width, tiles.clone(), first, &small);
                    }
                    Term::Int8 { a, w, side } => {
                        self.int8_term(a, w, side, columns.clone(), tiles.clone(), first, &small);
                    }
                }
            });
            first = false;
            packed_a = &packed_a[term.packed_k() * self.m.next_multiple_of(MR)..];
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn f32_term(
        &self,
        depth: usize,
        a: Left,
        b: Rhs,
        scale: f32,
        columns: Range<usize>,
        width: usize,
        tiles: Range<usize>,
        first: bool,
        small: &PackedTerms,
    ) {
        for k0 in (0..depth).step_by(KC) {
            let (k, first) = (KC.min(depth - k0), first && k0 == 0);
            let none = PackedTerms::default();
            let small = if k0 + k == depth { small } else { &none };
            if let Some(view) = self.in_place(b, scale, &columns) {
                for start in columns.clone().step_by(width) {
                    let cols = start..(start + width).min(columns.end);
                    let b = &view.data[k0 * view.row_stride + start..];
                    for tile in tiles.clone() {
                        self.tile(a, k0, k, tile * MR, cols.clone(), b, view.row_stride, first, small);
                    }
                }
                continue;
            }
            scratch::with(Purpose::PackedB, columns.len().next_multiple_of(width) * k, |packed_b| {
                pack_b(b, scale, k0..k0 + k, columns.clone(), width, packed_b);
                for tile in tiles.clone() {
                    for start in columns.clone().step_by(width) {
                        let cols = width.min(columns.end - start);
                        let b = &packed_b[(start - columns.start) * k..];
                        let columns = start..start + cols;
                        self.tile(a, k0, k, tile * MR, columns, b, packed_width(cols), first, small);
                    }
                }
            });
        }
    }

    /// The right operand of a term, where it can be multiplied as it lies: few rows to multiply it with, whole vectors of columns.
    fn in_place<'b>(&self, b: Rhs<'b>, scale: f32, columns: &Range<usize>) -> Option<MatRef<'b>> {
        match b {
            Rhs::View(view)
                if self.m <= FEW_ROWS
                    && view.col_stride == 1
                    && scale == 1.0
                    && columns.len().is_multiple_of(kernel::lanes(isa())) =>
            {
                Some(view)
            }
            _ => None,
        }
    }

    #[allow(clippy::too_many_arguments)]
    #[inline]
    fn tile(
        &self,
        a: Left,
        k0: usize,
        k: usize,
        row: usize,
        cols: Range<usize>,
        b: &[f32],
        b_stride: usize,
        first: bool,
        small: &PackedTerms,
    ) {
        let mr = MR.min(self.m - row);
        let (a, a_row_stride, a_k_stride) = match a {
            Left::Rows(a) => (&a.data[row * a.row_stride + k0..], a.row_stride, 1),
            Left::Packed { data, k } => (&data[row * k + k0 * MR..], 1, MR),
        };
        let product = Segment { k, a: a.as_ptr(), a_row_stride, a_k_stride, b: b.as_ptr(), b_stride };
        let (segments, count) = small.segments(Some(product), row, &cols);
        debug_assert!(b.len() >= (k - 1) * b_stride + cols.len());
        // SAFETY: pieces own disjoint tiles of C, and `gemm` checked that every operand covers its shape.
        unsafe { kernel::run(isa(), &segments[..count], &self.c.place(row, &cols, first), mr) };
    }

    /// A weight in 8 bits lies ready for the product with its transpose; for the other one panels of its columns are turned first. Some rows
    /// of A pass by all panels of a few runs before the next ones do, so that a run of them, and the sums, are in the second-level cache.
    #[allow(clippy::too_many_arguments)]
    fn int8_term(
        &self,
        a: &Int8Rows,
        w: &Int8Matrix,
        side: Side,
        columns: Range<usize>,
        tiles: Range<usize>,
        first: bool,
        small: &PackedTerms,
    ) {
        let none = PackedTerms::default();
        let starts = || columns.clone().step_by(PANEL);
        // Every run but the last is as long as the first.
        let longest = runs(a.cols()).next().map_or(0, |run| run.len());
        let panel_bytes = longest.next_multiple_of(PANEL) / 4 * GROUP;
        let run_bytes = starts().len() * panel_bytes;
        let together = (INT8_RUN_BYTES / run_bytes.max(1)).max(1);
        let count = runs(a.cols()).count();
        for group in (0..count).step_by(together).map(|index| index..(index + together).min(count)) {
            let runs = || group.clone().zip(runs(a.cols()).skip(group.start));
            let lies_ready = side == Side::Transposed && w.is_kept();
            let packed_bytes = if lies_ready { 0 } else { group.len() * run_bytes };
            scratch::with_bytes(Purpose::PackedB, packed_bytes, |packed| {
                for ((_, run), packed) in runs().zip(packed.chunks_exact_mut(run_bytes)) {
                    match side {
                        Side::Plain => w.cols_panels(run, columns.clone(), panel_bytes, packed),
                        Side::Transposed => {
                            let used = run.len().next_multiple_of(PANEL) / 4 * GROUP;
                            for (start, to) in starts().zip(packed.chunks_exact_mut(panel_bytes)) {
                                w.integers(start, run.clone(), &mut to[..used]);
                            }
                        }
                    }
                }
                for part in tiles.clone().step_by(INT8_TILES) {
                    let part = part..(part + INT8_TILES).min(tiles.end);
                    for (place, (index, run)) in runs().enumerate() {
                        let small = if run.end == a.cols() { small } else { &none };
                        for (panel, start) in starts().enumerate() {
                            let epilogue = match side {
                                Side::Transposed => w.rows_epilogue(start, index),
                                Side::Plain => w.cols_epilogue(start, index),
                            };
                            let kept = if lies_ready { w.kept_rows(start, run.start) } else { None };
                            let b = kept.unwrap_or_else(|| &packed[place * run_bytes + panel * panel_bytes..]);
                            let cols = start..(start + PANEL).min(columns.end);
                            let first = first && index == 0;
                            self.int8_tiles(a, index, run.clone(), b, epilogue, cols, part.clone(), first, small);
                        }
                    }
                }
            });
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn int8_tiles(
        &self,
        a: &Int8Rows,
        index: usize,
        run: Range<usize>,
        b: &[i8],
        (col_scales, offsets): (&[f32], &[i32]),
        columns: Range<usize>,
        tiles: Range<usize>,
        first: bool,
        small: &PackedTerms,
    ) {
        let isa = int8_isa();
        let width = int8_kernel::tile_width(isa);
        let groups = run.len().div_ceil(4);
        assert!(b.len() >= groups * GROUP, "B is smaller than the run");
        for start in columns.clone().step_by(width) {
            let within = start - columns.start;
            let cols = width.min(columns.end - start);
            let whole = cols.next_multiple_of(PANEL.min(width));
            assert!(
                col_scales.len() >= within + whole && offsets.len() >= within + whole,
                "factors of a part of the panel"
            );
            for tile in tiles.clone() {
                let row = tile * MR;
                let (values, (row_scales, row_scale_stride)) = (a.values(row, run.start), a.scales(row, index));
                let mr = MR.min(self.m - row);
                let cols = start..start + cols;
                let (segments, count) = small.segments(None, row, &cols);
                let adds_nothing = || (0..mr).all(|i| row_scales[i * row_scale_stride] == 0.0);
                if !first && count == 0 && adds_nothing() {
                    continue;
                }
                let t = Int8Tile {
                    groups,
                    a: values.as_ptr(),
                    a_stride: a.stride(),
                    row_scales: row_scales.as_ptr(),
                    row_scale_stride,
                    b: b[4 * within..].as_ptr(),
                    offsets: offsets[within..].as_ptr(),
                    col_scales: col_scales[within..].as_ptr(),
                    segments: &segments[..count],
                    to: self.c.place(row, &cols, first),
                };
                // SAFETY: pieces own disjoint tiles of C, `gemm` checked the shapes, and both operands are filled up to whole panels.
                unsafe { int8_kernel::run(isa, &t, mr) };
            }
        }
    }
}

/// The left operand of a term in f32: rows as they lie, or packed by [`pack_a`] for a contraction of `k`.
#[derive(Clone, Copy)]
enum Left<'a> {
    Rows(MatRef<'a>),
    Packed { data: &'a [f32], k: usize },
}

/// `C[m, n] (+)= A[m, k] · B[k, n]` on the calling thread, for small operands that are read where they lie, whatever the strides of A. B's
/// rows are contiguous; only columns that do not fill a vector are packed.
///
/// # Panics
/// As [`gemm`].
pub fn gemm_in_place(m: usize, n: usize, k: usize, a: MatRef, b: MatRef, out: Out) {
    assert!(m > 0 && n > 0 && k > 0, "an empty product");
    assert!(a.covers(m, k) && b.covers(k, n) && b.col_stride == 1, "operands of another product than [{m}, {k}, {n}]");
    assert!(m == 1 || out.stride >= n, "rows of C overlap");
    let covered = (m - 1) * out.stride + n;
    assert!(covered <= out.data.len(), "C is smaller than [{m}, {n}]");
    let c = out.data.as_mut_ptr();
    let addend = match out.to {
        To::Nothing => std::ptr::null(),
        To::Itself => c.cast_const(),
        To::Other(addend) => {
            assert!(covered <= addend.len(), "the addend is smaller than [{m}, {n}]");
            addend.as_ptr()
        }
    };
    let width = kernel::panel_width(isa());
    for start in (0..n).step_by(width) {
        let cols = width.min(n - start);
        let stride = packed_width(cols);
        for k0 in (0..k).step_by(IN_PLACE_KC) {
            let k = IN_PLACE_KC.min(k - k0);
            let panel = MatRef { data: &b.data[k0 * b.row_stride + start..], ..b };
            let tiles = |b: &[f32], b_stride: usize| {
                for row in (0..m).step_by(MR) {
                    let at = row * out.stride + start;
                    let c = c.wrapping_add(at);
                    let addend = match k0 {
                        0 if addend.is_null() => addend,
                        0 => addend.wrapping_add(at),
                        _ => c.cast_const(),
                    };
                    let product = Segment {
                        k,
                        a: a.data[row * a.row_stride + k0 * a.col_stride..].as_ptr(),
                        a_row_stride: a.row_stride,
                        a_k_stride: a.col_stride,
                        b: b.as_ptr(),
                        b_stride,
                    };
                    let to = Target { c, stride: out.stride, addend, cols, streams: false };
                    // SAFETY: the shapes were checked above, and B's columns are whole vectors.
                    unsafe { kernel::run(isa(), &[product], &to, MR.min(m - row)) };
                }
            };
            if stride == cols {
                tiles(panel.data, b.row_stride);
            } else {
                scratch::with(Purpose::PackedB, k * stride, |packed| {
                    pack_panel(panel, cols, stride, packed);
                    tiles(packed, stride);
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::F32Panel;
    use crate::testing::{random, relative_error};

    /// A source that is not stored as f32, so that the decoding paths run.
    struct Hidden<'a>(F32Panel<'a>);

    impl PanelSource for Hidden<'_> {
        fn rows(&self) -> usize {
            self.0.rows()
        }
        fn cols(&self) -> usize {
            self.0.cols()
        }
        fn panel_f32(&self, rows: Range<usize>, cols: std::ops::Range<usize>, dst: &mut [f32]) {
            self.0.panel_f32(rows, cols, dst);
        }
    }

    #[test]
    fn a_result_that_is_stored_past_the_caches_is_that_of_its_rows() {
        // A last tile of few rows, and a last one of few columns, which is stored as usual.
        let (m, n, stride, k) = (253, 66_505, 66_512, 9);
        let (a, b) = (random(1, m * k), random(2, n * k));
        let w = Int8Matrix::new(&F32Panel::new(&b, k), None, &[]);
        let mut memory = vec![f32::NAN; m * stride + LINE];
        let first = memory.as_ptr().align_offset(LINE);
        let c = &mut memory[first..first + m * stride];
        assert!(m * n >= STREAMED && c.as_ptr().addr().is_multiple_of(LINE));
        let (mut rows, mut few) = (Int8Rows::default(), Int8Rows::default());
        rows.quantize_input(&a, &w);
        for int8 in [false, true] {
            fn term<'t>(
                int8: Option<(&'t Int8Rows, &'t Int8Matrix)>,
                k: usize,
                a: &'t [f32],
                b: &'t [f32],
            ) -> Term<'t> {
                match int8 {
                    Some((rows, w)) => Term::int8(rows, w),
                    None => Term::new(k, MatRef::rows(a, k), Rhs::View(MatRef::rows(b, k).t())),
                }
            }
            gemm(m, n, &[term(int8.then_some((&rows, &w)), k, &a, &b)], Out::set(c, stride));
            // A multiple of a tile's rows: otherwise the portable kernel may sum up in another order.
            const ROWS: usize = 10 * MR;
            for (a, c) in a.chunks(ROWS * k).zip(c.chunks(ROWS * stride)) {
                few.quantize_input(a, &w);
                let m = a.len() / k;
                let mut expected = vec![0.0; m * n];
                gemm(m, n, &[term(int8.then_some((&few, &w)), k, a, &b)], Out::set(&mut expected, n));
                assert!(c.chunks(stride).zip(expected.chunks(n)).all(|(c, expected)| c[..n] == *expected));
                assert!(c.chunks(stride).all(|row| row.len() < stride || row[n..].iter().all(|v| v.is_nan())));
            }
        }
    }

    fn reference(
        m: usize,
        n: usize,
        k: usize,
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Vec<f64> {
        let mut c = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                c[i * n + j] = (0..k).map(|p| f64::from(a(i, p)) * f64::from(b(p, j))).sum();
            }
        }
        c
    }

    const SHAPES: [(usize, usize, usize); 14] = [
        (60, 700, 40),
        (6200, 5, 3),
        (1, 1, 1),
        (5, 3, 2),
        (6, 64, 16),
        (7, 65, 17),
        (13, 16, 576),
        (100, 16, 33),
        (3, 300, 1030),
        (64, 130, 2050),
        (257, 192, 96),
        (11, 129, 40),
        (130, 31, 257),
        (2, 515, 64),
    ];

    #[test]
    fn every_layout_equals_the_reference() {
        for (m, n, k) in SHAPES {
            let a = random(1, m * k);
            let b = random(2, k * n);
            let weight = F32Panel::new(&b, k);
            let plain = F32Panel::new(&b, n);
            let transposed = reference(m, n, k, |i, p| a[i * k + p], |p, j| b[j * k + p]);
            let straight = reference(m, n, k, |i, p| a[i * k + p], |p, j| b[p * n + j]);
            let from_columns = reference(m, n, k, |i, p| a[p * m + i], |p, j| b[p * n + j]);
            let rows = MatRef::rows(&a, k);
            let columns = MatRef::rows(&a, m).t();
            for (name, lhs, rhs, expected) in [
                ("x·Wᵀ", rows, Rhs::Transposed(&weight), &transposed),
                ("x·Wᵀ decoded", rows, Rhs::Transposed(&Hidden(weight)), &transposed),
                ("x·Wᵀ view", rows, Rhs::View(MatRef::rows(&b, k).t()), &transposed),
                ("g·W", rows, Rhs::Plain(&plain), &straight),
                ("g·W decoded", rows, Rhs::Plain(&Hidden(plain)), &straight),
                ("gᵀ·x", columns, Rhs::View(MatRef::rows(&b, n)), &from_columns),
            ] {
                let mut c = vec![f32::NAN; m * n];
                gemm(m, n, &[Term::new(k, lhs, rhs)], Out::set(&mut c, n));
                let error = relative_error(&c, expected);
                assert!(error < 1e-6 * (k as f64).sqrt(), "{name} {m} {n} {k}: {error}");
            }
        }
    }

    #[test]
    fn terms_are_summed_and_scaled_and_c_is_kept_outside_the_columns() {
        let (m, n, k, r, stride) = (19, 70, 1100, 5, 90);
        let (x, w, u, b) = (random(1, m * k), random(2, n * k), random(3, m * r), random(4, n * r));
        let start = random(5, m * stride);
        let mut c = start.clone();
        let weight = F32Panel::new(&w, k);
        let terms = [
            Term::new(k, MatRef::rows(&x, k), Rhs::Transposed(&weight)),
            Term::scaled(r, MatRef::rows(&u, r), Rhs::View(MatRef::rows(&b, r).t()), 0.5),
        ];
        gemm(m, n, &terms, Out::add(&mut c, stride));
        let main = reference(m, n, k, |i, p| x[i * k + p], |p, j| w[j * k + p]);
        let low = reference(m, n, r, |i, p| u[i * r + p], |p, j| b[j * r + p]);
        for i in 0..m {
            for j in 0..stride {
                let mut expected = f64::from(start[i * stride + j]);
                if j < n {
                    expected += main[i * n + j] + 0.5 * low[i * n + j];
                    assert!((f64::from(c[i * stride + j]) - expected).abs() < 1e-3);
                } else {
                    assert_eq!(c[i * stride + j], start[i * stride + j], "column {j} is not C's");
                }
            }
        }
    }

    #[test]
    fn gradients_of_weights_are_scaled_and_added_and_the_same_on_any_number_of_threads() {
        let (m, n, k) = (301, 130, 1500);
        let (g, x, before) = (random(1, k * m), random(2, k * n), random(3, m * n));
        let term = Term::scaled(k, MatRef::rows(&g, m).t(), Rhs::View(MatRef::rows(&x, n)), 0.5);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut c = before.clone();
            pool.install(|| _ = gemm(m, n, &[term], Out::add(&mut c, n)));
            c
        };
        let one = run(1);
        let product = reference(m, n, k, |i, p| g[p * m + i], |p, j| x[p * n + j]);
        let expected: Vec<f64> = product.iter().zip(&before).map(|(p, &b)| 0.5 * p + f64::from(b)).collect();
        assert!(relative_error(&one, &expected) < 1e-5);
        for threads in [2, 3, 5] {
            assert!(one == run(threads), "{threads} threads");
        }
    }

    #[test]
    fn an_addend_is_added_once() {
        let (m, n, k) = (9, 70, 1500);
        let (a, b, addend) = (random(1, m * k), random(2, n * k), random(3, m * n));
        let weight = F32Panel::new(&b, k);
        let term = Term::new(k, MatRef::rows(&a, k), Rhs::Transposed(&weight));
        let (mut sum, mut plain) = (vec![f32::NAN; m * n], addend.clone());
        gemm(m, n, &[term], Out::sum(&mut sum, n, &addend));
        gemm(m, n, &[term], Out::add(&mut plain, n));
        assert_eq!(sum, plain);
    }

    #[test]
    fn one_thread_and_several_give_the_same_bytes() {
        let (m, n, k) = (301, 200, 700);
        let (a, b) = (random(1, m * k), random(2, n * k));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut c = vec![0.0; m * n];
            let weight = F32Panel::new(&b, k);
            pool.install(|| {
                gemm(m, n, &[Term::new(k, MatRef::rows(&a, k), Rhs::Transposed(&weight))], Out::set(&mut c, n));
            });
            c
        };
        let one = run(1);
        for threads in [2, 3, 5] {
            assert!(one == run(threads), "{threads} threads");
        }
    }
}
