//! Products with the transpose of a left operand of many columns: gradients of weights, `gᵀ·x`, contracted over tokens.
//!
//! A run of B's rows is packed, no more than a second-level cache holds, then a few columns of A at a time for the same run, and all of B passes by
//! a tile of them while that is in the first-level cache. So the packed form of A is never more than a few tiles: that of the gradient of
//! a head's logits would be as large again.

use std::ops::Range;

use super::kernel::{self, MR, Segment};
use super::pack::{pack_b, pack_columns, packed_width};
use super::{GROUP_BYTES, MatRef, Rhs, Shared};
use crate::isa::isa;
use crate::parallel;
use crate::scratch::{self, Purpose};

/// Tiles that a thread packs at once: 48 columns, three cache lines of a row.
const CHUNK: usize = 8;
/// Most columns of B that A's tiles are packed for, and rows of C that B is.
const MOST_COLUMNS: usize = 640;
const MOST_ROWS: usize = 3072;

/// `C[m, n] (+)= A·B` where A's columns and B's rows are contiguous.
pub(super) struct Gradient<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: MatRef<'a>,
    pub b: MatRef<'a>,
    pub scale: f32,
    pub c: Shared<'a>,
}

impl Gradient<'_> {
    /// Cuts C into blocks of columns and parts of rows. A thread packs both operands for its piece itself: what another one has packed would
    /// come from that one's cache.
    pub(super) fn run(&self) {
        let (threads, width) = (rayon::current_num_threads(), kernel::panel_width(isa()));
        let columns = self.n.div_ceil(self.n.div_ceil(MOST_COLUMNS)).next_multiple_of(width);
        let parts = threads * self.m.div_ceil(threads * MOST_ROWS);
        let rows = self.m.div_ceil(parts).next_multiple_of(CHUNK * MR);
        let (blocks, parts) = (self.n.div_ceil(columns), self.m.div_ceil(rows));
        parallel::for_each(blocks * parts, |piece| {
            let (start, row) = (piece % blocks * columns, piece / blocks * rows);
            self.piece(row..(row + rows).min(self.m), start..(start + columns).min(self.n), width);
        });
    }

    fn piece(&self, rows: Range<usize>, columns: Range<usize>, width: usize) {
        let most = GROUP_BYTES / (4 * columns.len());
        let depth = self.k.div_ceil(self.k.div_ceil(most));
        for k0 in (0..self.k).step_by(depth) {
            let k = depth.min(self.k - k0);
            scratch::with(Purpose::PackedB, columns.len().next_multiple_of(width) * k, |packed| {
                pack_b(Rhs::View(self.b), self.scale, k0..k0 + k, columns.clone(), width, packed);
                for first in rows.clone().step_by(CHUNK * MR) {
                    let rows = first..(first + CHUNK * MR).min(rows.end);
                    scratch::with(Purpose::PackedA, CHUNK * MR * k, |tiles| {
                        pack_columns(self.a, rows.clone(), k0..k0 + k, tiles);
                        for (row, tile) in rows.step_by(MR).zip(tiles.chunks_exact(MR * k)) {
                            for col in columns.clone().step_by(width) {
                                let cols = col..(col + width).min(columns.end);
                                let b = &packed[(col - columns.start) * k..][..packed_width(cols.len()) * k];
                                self.tile(tile, b, k, row, cols, k0 == 0);
                            }
                        }
                    });
                }
            });
        }
    }

    fn tile(&self, a: &[f32], b: &[f32], k: usize, row: usize, cols: Range<usize>, first: bool) {
        let product = Segment {
            k,
            a: a.as_ptr(),
            a_row_stride: 1,
            a_k_stride: MR,
            b: b.as_ptr(),
            b_stride: packed_width(cols.len()),
        };
        // SAFETY: pieces own disjoint rows of C, `gemm` checked the shapes, and both operands are packed for `k` steps of whole tiles.
        unsafe { kernel::run(isa(), &[product], &self.c.place(row, &cols, first), MR.min(self.m - row)) };
    }
}
