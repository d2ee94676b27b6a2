//! Operands of a product written in the order in which its tiles read them.

use std::ops::Range;

use super::kernel::{self, AHEAD, MR, prefetch};
use super::{MatRef, Rhs};
#[cfg(target_arch = "x86_64")]
use crate::isa::Isa;
use crate::isa::isa;
use crate::scratch::{self, Purpose};

/// Elements from one packed row of a panel of `cols` columns to the next: the last panel is no wider than it must be.
pub(super) fn packed_width(cols: usize) -> usize {
    cols.next_multiple_of(kernel::lanes(isa()))
}

/// Writes the transpose of `n` rows of `k` values to `memory`, columns filled up with zeros to whole vectors; returns it and their number.
pub fn transpose_rows<'a>(rows: MatRef, n: usize, k: usize, memory: &'a mut [f32]) -> (MatRef<'a>, usize) {
    assert!(rows.covers(n, k), "fewer rows than [{n}, {k}]");
    let columns = packed_width(n);
    let to = &mut memory[..k * columns];
    pack_panel(rows.t(), n, columns, to);
    (MatRef::rows(to, columns), columns)
}

/// Values of a cache line.
const LINE: usize = 16;

/// Packs the rows `rows` and the steps `ks` of a left operand into tiles of [`MR`] rows, of which the last may be filled in part.
pub(super) fn pack_columns(a: MatRef, rows: Range<usize>, ks: Range<usize>, packed: &mut [f32]) {
    let (rows, first, k) = (rows.len(), rows.start * a.row_stride, ks.len());
    for (i, step) in ks.enumerate() {
        let start = first + step * a.col_stride;
        if a.row_stride == 1 {
            for value in (0..rows).step_by(LINE) {
                prefetch(a.data.as_ptr().wrapping_add(start + AHEAD * a.col_stride + value));
            }
            let source = &a.data[start..start + rows];
            let mut tiles = source.chunks_exact(MR);
            for (tile, values) in tiles.by_ref().enumerate() {
                let to = tile * MR * k + i * MR;
                packed[to..to + MR].copy_from_slice(values);
            }
            for (row, &value) in tiles.remainder().iter().enumerate() {
                packed[rows / MR * MR * k + i * MR + row] = value;
            }
        } else {
            for row in 0..rows {
                packed[row / MR * MR * k + i * MR + row % MR] = a.data[start + row * a.row_stride];
            }
        }
    }
}

/// Packs the rows `ks` and the columns `cols` of a term's right operand times `scale`: panels of `width` columns one after the other, the
/// last one as wide as [`packed_width`] says.
pub(super) fn pack_b(b: Rhs, scale: f32, ks: Range<usize>, cols: Range<usize>, width: usize, packed: &mut [f32]) {
    let k = ks.len();
    let fill = |packed: &mut [f32], start: usize, wide: usize, source: MatRef| {
        let stride = packed_width(wide);
        let to = &mut packed[(start - cols.start) * k..][..k * stride];
        pack_panel(source, wide, stride, to);
        if scale != 1.0 {
            to.iter_mut().for_each(|v| *v *= scale);
        }
    };
    let panels = cols.clone().step_by(width).map(|start| (start, width.min(cols.end - start)));
    match b {
        Rhs::View(view) => {
            for (start, wide) in panels {
                let offset = ks.start * view.row_stride + start * view.col_stride;
                fill(packed, start, wide, MatRef { data: &view.data[offset..], ..view });
            }
        }
        Rhs::Transposed(w) => match w.as_f32() {
            Some(values) => {
                for (start, wide) in panels {
                    fill(packed, start, wide, MatRef::rows(&values[start * w.cols() + ks.start..], w.cols()).t());
                }
            }
            None => {
                for (start, wide) in panels {
                    scratch::with(Purpose::Panel, wide * k, |decoded| {
                        w.panel_f32(start..start + wide, ks.clone(), decoded);
                        fill(packed, start, wide, MatRef::rows(decoded, k).t());
                    });
                }
            }
        },
        Rhs::Plain(w) => match w.as_f32() {
            Some(values) => {
                for (start, wide) in panels {
                    fill(packed, start, wide, MatRef::rows(&values[ks.start * w.cols() + start..], w.cols()));
                }
            }
            None => scratch::with(Purpose::Panel, cols.len() * k, |decoded| {
                w.panel_f32(ks.clone(), cols.clone(), decoded);
                for (start, wide) in panels {
                    fill(packed, start, wide, MatRef::rows(&decoded[start - cols.start..], cols.len()));
                }
            }),
        },
    }
}

/// Writes 16 columns of 16 values at a time, as many of the first `wide` as there are whole ones, as rows `width` elements apart; returns how
/// many columns that were. The columns lie `stride` elements apart.
#[inline(always)]
fn turn_blocks(columns: &[f32], stride: usize, wide: usize, to: &mut [f32], width: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        let whole = wide / 16 * 16;
        assert!(whole == 0 || (whole - 1) * stride + 16 <= columns.len() && 15 * width + whole <= to.len());
        for column in (0..whole).step_by(16) {
            // SAFETY: the machine has the features, and by the assertion both blocks lie inside their slices.
            unsafe { turn_16(columns.as_ptr().add(column * stride), stride, to.as_mut_ptr().add(column), width) };
        }
        return whole;
    }
    let _ = (columns, stride, wide, to, width);
    0
}

/// Writes the transpose of 16 × 16 values.
///
/// # Safety
/// Both pointers are valid for 16 rows of 16 elements at their stride.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn turn_16(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    use std::arch::x86_64::*;
    // SAFETY (whole body): the caller promises that the pointers cover the blocks.
    unsafe {
        let mut rows = [_mm512_setzero_ps(); 16];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = _mm512_loadu_ps(from.add(i * from_stride));
        }
        // Pairs, then fours of rows inside each quarter of a vector, then the quarters.
        let mut pairs = [_mm512_setzero_ps(); 16];
        for i in (0..16).step_by(2) {
            pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        }
        let mut fours = [_mm512_setzero_ps(); 16];
        for i in (0..16).step_by(4) {
            let [a, b, c, d] = [pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]].map(|v| _mm512_castps_pd(v));
            fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        for i in 0..4 {
            let even = _mm512_shuffle_f32x4::<0x88>(fours[i], fours[i + 4]);
            let odd = _mm512_shuffle_f32x4::<0xdd>(fours[i], fours[i + 4]);
            let more_even = _mm512_shuffle_f32x4::<0x88>(fours[i + 8], fours[i + 12]);
            let more_odd = _mm512_shuffle_f32x4::<0xdd>(fours[i + 8], fours[i + 12]);
            _mm512_storeu_ps(to.add(i * to_stride), _mm512_shuffle_f32x4::<0x88>(even, more_even));
            _mm512_storeu_ps(to.add((i + 4) * to_stride), _mm512_shuffle_f32x4::<0x88>(odd, more_odd));
            _mm512_storeu_ps(to.add((i + 8) * to_stride), _mm512_shuffle_f32x4::<0xdd>(even, more_even));
            _mm512_storeu_ps(to.add((i + 12) * to_stride), _mm512_shuffle_f32x4::<0xdd>(odd, more_odd));
        }
    }
}

#[inline(always)]
fn copy_rows<const N: usize>(source: MatRef, to: &mut [f32]) {
    for (step, row) in to.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        if let Some(values) = source.data[step * source.row_stride..].first_chunk::<N>() {
            *row = *values;
        }
    }
}

crate::multiversion! {
    /// Copies `[k, wide]` of `source` into a panel `[k, width]`, the rest of each row zero.
    pub(super) fn pack_panel(source: MatRef<'_>, wide: usize, width: usize, to: &mut [f32]) {
        /// Rows transposed at a time: their cache lines stay in the first-level cache.
        const STEP: usize = 16;
        if source.col_stride == 1 {
            // Sizes the compiler knows: no call for each row.
            match (wide, width) {
                (64, 64) => return copy_rows::<64>(source, to),
                (16, 16) => return copy_rows::<16>(source, to),
                _ => {}
            }
            for (step, row) in to.chunks_exact_mut(width).enumerate() {
                let from = step * source.row_stride;
                row[..wide].copy_from_slice(&source.data[from..from + wide]);
                row[wide..].fill(0.0);
            }
            return;
        }
        for (block, rows) in to.chunks_mut(STEP * width).enumerate() {
            let steps = rows.len() / width;
            let from = block * STEP * source.row_stride;
            if wide < width {
                rows.fill(0.0);
            }
            if steps == STEP && source.row_stride == 1 {
                let turned = turn_blocks(&source.data[from..], source.col_stride, wide, rows, width);
                for column in turned..wide {
                    let start = from + column * source.col_stride;
                    let Some(values) = source.data[start..].first_chunk::<STEP>() else { return };
                    for (step, &value) in values.iter().enumerate() {
                        rows[step * width + column] = value;
                    }
                }
                continue;
            }
            for column in 0..wide {
                for step in 0..steps {
                    rows[step * width + column] =
                        source.data[from + step * source.row_stride + column * source.col_stride];
                }
            }
        }
    }
}
