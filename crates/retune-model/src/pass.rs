//! What one pass through the model computes: rows laid end to end, without padding.

use std::ops::Range;

/// One row of the data set inside a pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Its tokens in the pass.
    pub tokens: Range<usize>,
    /// Its row in the data set: the key for dropout, so that a row is treated alike wherever it is packed.
    pub row: u64,
}

/// A token whose prediction is trained or scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The token that predicts, by its place in the pass.
    pub token: u32,
    /// The id that should come next.
    pub target: u32,
}

/// Rows laid end to end. Positions restart with each sequence; the head runs on the tokens of `labels` alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pass {
    pub ids: Vec<u32>,
    pub positions: Vec<u32>,
    pub sequences: Vec<Sequence>,
    pub labels: Vec<Label>,
}

impl Pass {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Appends a row; `trained[i]` says whether token i is a target (the first never is: nothing predicts it).
    pub fn push(&mut self, row: u64, ids: &[u32], trained: &[bool]) {
        let start = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        self.sequences.push(Sequence { tokens: start..start + ids.len(), row });
        let targets = ids.iter().zip(trained).enumerate().skip(1).filter(|(_, (_, trained))| **trained);
        self.labels.extend(targets.map(|(i, (&target, _))| Label { token: (start + i - 1) as u32, target }));
    }

    /// Empties the pass and keeps its memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.sequences.clear();
        self.labels.clear();
    }

    /// The sequence that holds a token.
    pub fn sequence_of(&self, token: usize) -> Option<&Sequence> {
        self.sequences.iter().find(|s| s.tokens.contains(&token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_laid_end_to_end_and_labels_point_one_back() {
        let mut pass = Pass::default();
        pass.push(7, &[10, 11, 12], &[true, false, true]);
        pass.push(3, &[20, 21], &[false, true]);
        assert_eq!(pass.positions, [0, 1, 2, 0, 1]);
        assert_eq!(pass.labels, [Label { token: 1, target: 12 }, Label { token: 3, target: 21 }]);
        assert_eq!(pass.sequence_of(4).map(|s| s.row), Some(3));
    }
}
