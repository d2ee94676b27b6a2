//! Rows of heads by number: copied together, and their gradients added up where they came from. Numbers count through the rows of several
//! buffers, one after the other; a call is about those of one buffer.

use std::ops::Range;

use crate::heads::{Heads, HeadsMut};
use crate::multiversion;
use crate::parallel::{self, SharedMut};

/// Writes to the dense rows `to: [n, heads · head_dim]`, for which there is a number each, the heads of those rows whose numbers lie in
/// `range`: it is that of the rows of `from`. Other rows are left alone.
pub fn gather(from: Heads, numbers: &[u32], range: Range<u32>, to: &mut [f32]) {
    let width = from.layout.width();
    // Heads that lie side by side are one copy.
    let layout = from.layout.joined();
    let from = Heads::new(from.data, layout);
    let rows = parallel::chunk_rows(numbers.len(), 8);
    let shared = SharedMut::new(to);
    parallel::for_each(numbers.len().div_ceil(rows), |piece| {
        let of_piece = piece * rows..((piece + 1) * rows).min(numbers.len());
        for (i, &number) in of_piece.clone().zip(&numbers[of_piece]).filter(|(_, number)| range.contains(number)) {
            // SAFETY: one piece, its rows.
            let to = unsafe { shared.slice(i * width, width) };
            for (head, to) in to.chunks_exact_mut(layout.head_dim.max(1)).enumerate() {
                to.copy_from_slice(from.head((number - range.start) as usize, head));
            }
        }
    });
}

multiversion! {
    fn add_row(to: &mut [f32], from: &[f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t += f;
        }
    }
}

/// Adds the dense rows `from: [n, heads · head_dim]` whose numbers lie in `range` to the heads of the rows of `to`, which have these
/// numbers, in the order of `from`.
pub fn scatter_add(from: &[f32], numbers: &[u32], range: Range<u32>, to: HeadsMut) {
    const COLUMNS: usize = 128;
    let width = to.layout().width();
    let layout = to.layout().joined();
    let parts = layout.head_dim.div_ceil(COLUMNS);
    // Cut by columns: the same row may come twice, and what is added to it must add up in one order.
    parallel::for_each(layout.heads * parts, |piece| {
        let (head, start) = (piece / parts, piece % parts * COLUMNS);
        let len = COLUMNS.min(layout.head_dim - start);
        for (i, &number) in numbers.iter().enumerate().filter(|(_, number)| range.contains(number)) {
            let from = &from[i * width + head * layout.head_dim + start..][..len];
            // SAFETY: pieces own disjoint columns, and one piece holds one row at a time.
            add_row(unsafe { to.part((number - range.start) as usize, head, start, len) }, from);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heads::HeadLayout;
    use crate::testing::random;

    #[test]
    fn rows_come_out_and_gradients_add_up_where_they_repeat() {
        let side_by_side = HeadLayout { row: 300, first: 7, head: 70, heads: 3, head_dim: 70 };
        let apart = HeadLayout { row: 500, first: 2, head: 145, heads: 3, head_dim: 140 };
        for layout in [HeadLayout::dense(2, 5), side_by_side, apart] {
            // Numbers 10 to 14 are the buffer's rows; the others are another's.
            let (rows, width, numbers) = (5, layout.width(), [13, 10, 9, 13, 15, 14]);
            let own = || numbers.iter().enumerate().filter(|(_, number)| (10..15).contains(*number));
            let data = random(1, rows * layout.row);
            let mut to = vec![f32::INFINITY; numbers.len() * width];
            gather(Heads::new(&data, layout), &numbers, 10..15, &mut to);
            for (i, &number) in own() {
                for head in 0..layout.heads {
                    let expected = Heads::new(&data, layout).head(number as usize - 10, head);
                    assert_eq!(to[i * width + head * layout.head_dim..][..layout.head_dim], *expected);
                }
            }
            let left = to.chunks_exact(width).filter(|row| row.iter().all(|&v| v == f32::INFINITY));
            assert_eq!(left.count(), 2, "rows of another buffer were written");
            let mut sums = vec![0.25; data.len()];
            scatter_add(&to, &numbers, 10..15, HeadsMut::new(&mut sums, layout));
            let mut expected = vec![0.25; data.len()];
            for (_, &number) in own() {
                for head in 0..layout.heads {
                    let start = layout.at(number as usize - 10, head);
                    (start..start + layout.head_dim).for_each(|at| expected[at] += data[at]);
                }
            }
            assert!(sums == expected);
        }
    }
}
