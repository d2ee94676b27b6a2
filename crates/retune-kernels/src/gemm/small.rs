//! Terms with a short contraction, what an adapter adds: they are summed up while a tile of the term before them is in registers.

use std::ops::Range;

use super::kernel::Segment;
use super::pack::{pack_b, packed_width};
use super::{MatRef, Rhs};

/// How many terms at most are summed up with one before them.
const MOST: usize = 2;

/// Terms in f32 with a short contraction, which are summed up with the one before them.
#[derive(Default)]
pub(super) struct SmallTerms<'a> {
    terms: [Option<(usize, MatRef<'a>, Rhs<'a>, f32)>; MOST],
    count: usize,
}

impl<'a> SmallTerms<'a> {
    pub(super) fn push(&mut self, k: usize, a: MatRef<'a>, b: Rhs<'a>, scale: f32) {
        self.terms[self.count] = Some((k, a, b, scale));
        self.count += 1;
    }

    pub(super) fn is_full(&self) -> bool {
        self.count == MOST
    }

    /// The contractions' lengths together.
    pub(super) fn depth(&self) -> usize {
        self.terms.iter().flatten().map(|(k, ..)| k).sum()
    }

    /// Packs the right operands' columns into panels of `panel`.
    pub(super) fn pack<'b>(&self, columns: Range<usize>, panel: usize, mut memory: &'b mut [f32]) -> PackedTerms<'b>
    where
        'a: 'b,
    {
        let mut terms = [None; MOST];
        for (term, to) in self.terms.iter().flatten().zip(&mut terms) {
            let (k, a, b, scale) = *term;
            let (packed, rest) = memory.split_at_mut(k * columns.len().next_multiple_of(panel));
            memory = rest;
            pack_b(b, scale, 0..k, columns.clone(), panel, packed);
            *to = Some((k, a, &*packed));
        }
        PackedTerms { terms, columns: columns.start }
    }
}

/// [`SmallTerms`] whose right operands are packed from the column `columns` on.
#[derive(Default)]
pub(super) struct PackedTerms<'a> {
    terms: [Option<(usize, MatRef<'a>, &'a [f32])>; MOST],
    columns: usize,
}

impl PackedTerms<'_> {
    /// What is summed up for the tile that starts at `row` and has the columns `cols`, after `first`, and how many they are.
    #[inline]
    pub(super) fn segments(
        &self,
        first: Option<Segment>,
        row: usize,
        cols: &Range<usize>,
    ) -> ([Segment; MOST + 1], usize) {
        let nothing =
            Segment { k: 0, a: std::ptr::null(), a_row_stride: 0, a_k_stride: 0, b: std::ptr::null(), b_stride: 0 };
        let (mut segments, mut count) = ([nothing; MOST + 1], 0);
        if let Some(first) = first {
            segments[0] = first;
            count = 1;
        }
        for (k, a, packed) in self.terms.iter().flatten() {
            segments[count] = Segment {
                k: *k,
                a: a.data[row * a.row_stride..].as_ptr(),
                a_row_stride: a.row_stride,
                a_k_stride: 1,
                b: packed[(cols.start - self.columns) * k..].as_ptr(),
                b_stride: packed_width(cols.len()),
            };
            count += 1;
        }
        (segments, count)
    }
}
