//! Where the heads of queries, keys or values lie in the rows of a buffer that may hold more than them.

use crate::parallel::SharedMut;

/// Head `h` of row `t` begins at `t · row + first + h · head` and has `head_dim` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    /// Elements from one row to the next.
    pub row: usize,
    /// Where the first head of a row begins.
    pub first: usize,
    /// Elements from one head to the next.
    pub head: usize,
    /// Number of heads.
    pub heads: usize,
    pub head_dim: usize,
}

impl HeadLayout {
    /// Heads that lie side by side in rows that hold nothing else.
    pub fn dense(heads: usize, head_dim: usize) -> Self {
        Self { row: heads * head_dim, first: 0, head: head_dim, heads, head_dim }
    }

    /// Elements of all heads of a row.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Where a head of a row begins.
    pub fn at(&self, row: usize, head: usize) -> usize {
        row * self.row + self.first + head * self.head
    }

    /// The same elements in as few heads as possible: one, where they lie side by side.
    pub(crate) fn joined(self) -> Self {
        let joined = self.head == self.head_dim || self.heads == 1;
        if joined { Self { head: self.width(), heads: 1, head_dim: self.width(), ..self } } else { self }
    }

    /// The columns of a head.
    fn columns(&self, head: usize) -> std::ops::Range<usize> {
        let start = self.at(0, head);
        start..start + self.head_dim
    }

    /// Whether its heads lie in their row without touching each other.
    fn is_disjoint(&self) -> bool {
        self.heads == 0
            || (self.columns(self.heads - 1).end <= self.row && (self.heads == 1 || self.head >= self.head_dim))
    }

    /// Whether no head of one lies on a head of the other, in rows of the same length.
    fn is_apart_from(&self, other: &Self) -> bool {
        let apart = |a: std::ops::Range<usize>, b: std::ops::Range<usize>| {
            a.is_empty() || b.is_empty() || a.end <= b.start || b.end <= a.start
        };
        let all = |layout: &Self| match layout.heads {
            0 => 0..0,
            heads => layout.first..layout.columns(heads - 1).end,
        };
        apart(all(self), all(other))
            || (0..self.heads).all(|a| (0..other.heads).all(|b| apart(self.columns(a), other.columns(b))))
    }
}

/// Heads that are read.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    pub data: &'a [f32],
    pub layout: HeadLayout,
}

impl<'a> Heads<'a> {
    /// The heads of whole rows.
    pub fn new(data: &'a [f32], layout: HeadLayout) -> Self {
        Self { data, layout }
    }

    /// Number of whole rows.
    pub fn rows(&self) -> usize {
        self.data.len() / self.layout.row.max(1)
    }

    /// A head of a row.
    pub fn head(&self, row: usize, head: usize) -> &'a [f32] {
        let start = self.layout.at(row, head);
        &self.data[start..start + self.layout.head_dim]
    }
}

/// Heads that are written, by several pieces of work at once. What else the rows hold is left alone, so it may be written as other
/// [`HeadsMut`]. It is not `Clone`: no two of them hold the same element.
pub struct HeadsMut<'a> {
    data: SharedMut<'a, f32>,
    layout: HeadLayout,
}

impl<'a> HeadsMut<'a> {
    /// The heads of rows.
    ///
    /// # Panics
    /// When heads of the layout overlap or reach beyond their row.
    pub fn new(data: &'a mut [f32], layout: HeadLayout) -> Self {
        assert!(layout.is_disjoint(), "heads overlap: {layout:?}");
        Self { data: SharedMut::new(data), layout }
    }

    /// Several kinds of heads in the rows of one buffer: of queries, keys and values.
    ///
    /// # Panics
    /// When they overlap, or mean rows of different lengths.
    pub fn in_one<const N: usize>(data: &'a mut [f32], layouts: [HeadLayout; N]) -> [Self; N] {
        let is_row = |layout: &HeadLayout| layout.row == layouts[0].row && layout.is_disjoint();
        let is_apart = |(i, of): (usize, &HeadLayout)| layouts[i + 1..].iter().all(|other| of.is_apart_from(other));
        let is_right = layouts.iter().all(is_row) && layouts.iter().enumerate().all(is_apart);
        assert!(is_right, "heads overlap: {layouts:?}");
        let data = SharedMut::new(data);
        layouts.map(|layout| Self { data, layout })
    }

    /// Where the heads lie.
    pub fn layout(&self) -> HeadLayout {
        self.layout
    }

    /// A head of a row.
    ///
    /// # Safety
    /// No two pieces that run at the same time may ask for the same head of a row.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn head(&self, row: usize, head: usize) -> &'a mut [f32] {
        debug_assert!(head < self.layout.heads);
        // SAFETY: heads of a layout are disjoint from one another and from those of other layouts; the rest is the caller's promise.
        unsafe { self.data.slice(self.layout.at(row, head), self.layout.head_dim) }
    }

    /// As [`HeadsMut::head`], for the elements `start..start + len` of a row of joined heads' `head`.
    ///
    /// # Safety
    /// No two pieces that run at the same time may ask for overlapping elements.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, row: usize, head: usize, start: usize, len: usize) -> &'a mut [f32] {
        let joined = self.layout.joined();
        debug_assert!(head < joined.heads && start + len <= joined.head_dim);
        // SAFETY: inside heads of this layout; the rest is the caller's promise.
        unsafe { self.data.slice(joined.at(row, head) + start, len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Queries, keys and values one after the other, and those of each head in turn.
    fn planes_and_turns() -> [[HeadLayout; 3]; 2] {
        let plane = |first, heads| HeadLayout { row: 20, first, head: 3, heads, head_dim: 3 };
        let turn = |first| HeadLayout { row: 20, first, head: 9, heads: 2, head_dim: 3 };
        [[plane(0, 2), plane(6, 1), plane(9, 1)], [turn(0), turn(3), turn(6)]]
    }

    #[test]
    fn heads_of_one_buffer_are_written_apart() {
        for layouts in planes_and_turns() {
            let mut data = vec![0.0; 60];
            let kinds = HeadsMut::in_one(&mut data, layouts);
            for (kind, heads) in kinds.iter().enumerate() {
                for head in 0..heads.layout().heads {
                    // SAFETY: one thread, one head at a time.
                    unsafe { heads.head(1, head) }.fill((10 * kind + head) as f32 + 1.0);
                }
            }
            for (kind, layout) in layouts.into_iter().enumerate() {
                let heads = Heads::new(&data, layout);
                assert_eq!(heads.rows(), 3);
                for head in 0..layout.heads {
                    assert_eq!(heads.head(1, head), [(10 * kind + head) as f32 + 1.0; 3]);
                }
            }
            let written: usize = layouts.iter().map(HeadLayout::width).sum();
            assert_eq!(data.iter().filter(|&&v| v != 0.0).count(), written);
        }
    }

    #[test]
    fn heads_that_overlap_are_refused() {
        let [_, [q, k, v]] = planes_and_turns();
        let overlapping = [
            [q, k, k],
            [HeadLayout { first: 2, ..q }, k, v],
            [q, k, HeadLayout { row: 21, ..v }],
            [q, k, HeadLayout { first: 9, ..v }],
        ];
        for layouts in overlapping {
            let refused = std::panic::catch_unwind(|| HeadsMut::in_one(&mut [0.0; 63], layouts).len());
            assert!(refused.is_err(), "{layouts:?}");
        }
    }
}
