//! Rows of heads by number: copied together, and their gradients added up where they came from.

use crate::heads::{Heads, HeadsMut};
use crate::multiversion;
use crate::parallel::{self, SharedMut};

/// Writes the heads of the rows `tokens` of `from` to the dense rows `to: [n, heads · head_dim]`.
pub fn gather(from: Heads, tokens: &[u32], to: &mut [f32]) {
    let width = from.layout.width();
    // Heads that lie side by side are one copy.
    let layout = from.layout.joined();
    let from = Heads::new(from.data, layout);
    let rows = parallel::chunk_rows(tokens.len(), 8);
    let shared = SharedMut::new(to);
    parallel::for_each(tokens.len().div_ceil(rows), |piece| {
        let range = piece * rows..((piece + 1) * rows).min(tokens.len());
        for (i, &token) in range.clone().zip(&tokens[range]) {
            // SAFETY: one piece, its rows.
            let to = unsafe { shared.slice(i * width, width) };
            for (head, to) in to.chunks_exact_mut(layout.head_dim.max(1)).enumerate() {
                to.copy_from_slice(from.head(token as usize, head));
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

/// Adds the dense rows `from: [n, heads · head_dim]` to the heads of the rows `tokens` of `to`, in the order of tokens.
pub fn scatter_add(from: &[f32], tokens: &[u32], to: HeadsMut) {
    const COLUMNS: usize = 128;
    let width = to.layout().width();
    let layout = to.layout().joined();
    let parts = layout.head_dim.div_ceil(COLUMNS);
    // Cut by columns: the same row may come twice, and what is added to it must add up in one order.
    parallel::for_each(layout.heads * parts, |piece| {
        let (head, start) = (piece / parts, piece % parts * COLUMNS);
        let len = COLUMNS.min(layout.head_dim - start);
        for (i, &token) in tokens.iter().enumerate() {
            let from = &from[i * width + head * layout.head_dim + start..][..len];
            // SAFETY: pieces own disjoint columns, and one piece holds one row at a time.
            add_row(unsafe { to.part(token as usize, head, start, len) }, from);
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
            let (rows, width, tokens) = (5, layout.width(), [3, 0, 3, 4]);
            let data = random(1, rows * layout.row);
            let mut to = vec![f32::NAN; tokens.len() * width];
            gather(Heads::new(&data, layout), &tokens, &mut to);
            for (i, &token) in tokens.iter().enumerate() {
                for head in 0..layout.heads {
                    let expected = Heads::new(&data, layout).head(token as usize, head);
                    assert_eq!(to[i * width + head * layout.head_dim..][..layout.head_dim], *expected);
                }
            }
            let mut sums = vec![0.25; data.len()];
            scatter_add(&to, &tokens, HeadsMut::new(&mut sums, layout));
            let mut expected = vec![0.25; data.len()];
            for &token in &tokens {
                for head in 0..layout.heads {
                    let start = layout.at(token as usize, head);
                    (start..start + layout.head_dim).for_each(|at| expected[at] += data[at]);
                }
            }
            assert!(sums == expected);
        }
    }
}
