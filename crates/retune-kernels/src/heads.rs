//! Where the heads of queries, keys or values lie in the rows of a buffer that may hold more than them.

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
}

/// Heads that are read.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    pub data: &'a [f32],
    pub layout: HeadLayout,
}
