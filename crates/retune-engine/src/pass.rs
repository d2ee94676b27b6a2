//! What one pass through the model computes: rows laid end to end, without padding, and what rows begin with in common only once.

use std::ops::Range;

/// Tokens that a row must have in common with another one to share them: copying keys of whole rows together for the attention costs something too.
const LEAST_SHARED: usize = 8;

/// One row of the data set inside a pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Its tokens in the pass: all of the row, or what follows the tokens it shares with an earlier one.
    pub tokens: Range<usize>,
    /// All tokens of the row, in [`Pass::key_tokens`]: what its queries may see.
    pub keys: Range<usize>,
    /// Its labels, in [`Pass::labels`].
    pub labels: Range<usize>,
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

/// Rows laid end to end. Positions restart with each row; the head runs on the tokens of `labels` alone.
///
/// With `share_prefixes` a row that begins like an earlier one (the same system prompt, the same instruction) has those tokens in common
/// with it. What a causal model computes for a token depends on what precedes it and on nothing else, so this changes results by the order
/// of sums alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pass {
    pub share_prefixes: bool,
    pub ids: Vec<u32>,
    pub positions: Vec<u32>,
    pub sequences: Vec<Sequence>,
    pub labels: Vec<Label>,
    /// For each key of each row, all rows one after the other, the token of the pass that it comes from.
    pub key_tokens: Vec<u32>,
}

/// How much a pass holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassSize {
    /// Tokens that are computed.
    pub tokens: usize,
    /// Tokens of all rows, those they share counted for each.
    pub row_tokens: usize,
    pub labels: usize,
    /// Labels of a pass that is scored and not trained on: in f32, whatever the others are computed in.
    pub scored_labels: usize,
    /// Whether rows share tokens.
    pub is_shared: bool,
}

impl PassSize {
    /// Rows that share nothing, with a label on every token.
    pub fn dense(tokens: usize) -> Self {
        Self { tokens, row_tokens: tokens, labels: tokens, ..Self::default() }
    }

    /// The size of a pass that could hold either of two.
    pub fn max(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.max(other.tokens),
            row_tokens: self.row_tokens.max(other.row_tokens),
            labels: self.labels.max(other.labels),
            scored_labels: self.scored_labels.max(other.scored_labels),
            is_shared: self.is_shared || other.is_shared,
        }
    }
}

impl Pass {
    /// An empty pass whose rows will share what they begin with in common.
    pub fn sharing_prefixes(share_prefixes: bool) -> Self {
        Self { share_prefixes, ..Self::default() }
    }

    /// Number of tokens that are computed.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of tokens of all rows.
    pub fn row_tokens(&self) -> usize {
        self.key_tokens.len()
    }

    /// How much it holds.
    pub fn size(&self) -> PassSize {
        let (tokens, row_tokens, labels) = (self.tokens(), self.row_tokens(), self.labels.len());
        PassSize { tokens, row_tokens, labels, scored_labels: 0, is_shared: self.is_shared() }
    }

    /// Whether a token is part of several rows.
    pub fn is_shared(&self) -> bool {
        self.row_tokens() > self.tokens()
    }

    /// The longest beginning that a row would share with one in the pass, as a range of [`Self::key_tokens`]; empty for none.
    fn shared(&self, ids: &[u32]) -> Range<usize> {
        let mut longest = 0..0;
        if self.share_prefixes {
            // A row keeps at least one token of its own.
            let ids = &ids[..ids.len().saturating_sub(1)];
            for keys in self.sequences.iter().map(|sequence| sequence.keys.clone()) {
                let tokens = self.key_tokens[keys.clone()].iter();
                let same = tokens.zip(ids).take_while(|&(&token, id)| self.ids[token as usize] == *id).count();
                if same >= LEAST_SHARED && same > longest.len() {
                    longest = keys.start..keys.start + same;
                }
            }
        }
        longest
    }

    /// By how many tokens a row would make the pass longer.
    pub fn own_tokens(&self, ids: &[u32]) -> usize {
        ids.len() - self.shared(ids).len()
    }

    /// Appends a row; `trained[i]` says whether token i is a target (the first never is: nothing predicts it).
    pub fn push(&mut self, row: u64, ids: &[u32], trained: &[bool]) {
        let shared = self.shared(ids);
        let (start, first) = (self.ids.len(), self.key_tokens.len());
        let own = shared.len()..ids.len();
        let end = start + own.len();
        self.ids.extend_from_slice(&ids[own.clone()]);
        self.positions.extend(own.start as u32..own.end as u32);
        self.key_tokens.extend_from_within(shared);
        self.key_tokens.extend(start as u32..end as u32);
        let row_tokens = &self.key_tokens[first..];
        let targets = ids.iter().zip(trained).enumerate().skip(1).filter(|(_, (_, trained))| **trained);
        let first_label = self.labels.len();
        self.labels.extend(targets.map(|(i, (&target, _))| Label { token: row_tokens[i - 1], target }));
        let (keys, labels) = (first..self.key_tokens.len(), first_label..self.labels.len());
        self.sequences.push(Sequence { tokens: start..end, keys, labels, row });
    }

    /// Empties the pass and keeps its memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.sequences.clear();
        self.labels.clear();
        self.key_tokens.clear();
    }

    /// The sequence that a label is of.
    pub fn sequence_of_label(&self, label: usize) -> Option<&Sequence> {
        self.sequences.iter().find(|s| s.labels.contains(&label))
    }

    /// The sequence that holds a token, the first of them where rows share it.
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
        assert_eq!(pass.key_tokens, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_row_that_begins_like_another_has_its_own_end_alone() {
        let row = |shared: u32, end: &[u32]| -> Vec<u32> { (0..shared).chain(end.iter().copied()).collect() };
        let last = |ids: &[u32]| -> Vec<bool> { (0..ids.len()).map(|i| i + 1 == ids.len()).collect() };
        let mut pass = Pass::sharing_prefixes(true);
        // The third row has most in common with the second, which has nine tokens from the first; the fourth has too few, the last is
        // the first once more.
        for (i, ids) in [row(12, &[90]), row(9, &[50, 51, 52]), row(9, &[50, 51, 70]), row(7, &[60]), row(12, &[90])]
            .iter()
            .enumerate()
        {
            let before = pass.tokens();
            let own = pass.own_tokens(ids);
            pass.push(i as u64, ids, &last(ids));
            assert_eq!(pass.tokens() - before, own);
        }
        let tokens: Vec<_> = pass.sequences.iter().map(|s| s.tokens.clone()).collect();
        assert_eq!(tokens, [0..13, 13..16, 16..17, 17..25, 25..26]);
        assert_eq!(pass.ids[13..], [50, 51, 52, 70, 0, 1, 2, 3, 4, 5, 6, 60, 90]);
        assert_eq!(pass.positions[13..], [9, 10, 11, 11, 0, 1, 2, 3, 4, 5, 6, 7, 12]);
        let third = pass.sequences[2].keys.clone();
        assert_eq!(pass.key_tokens[third], [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 16]);
        let labels: Vec<_> = pass.labels.iter().map(|l| (l.token, l.target)).collect();
        assert_eq!(labels, [(11, 90), (14, 52), (14, 70), (23, 60), (11, 90)]);
        // Its token is the first row's.
        assert_eq!(pass.sequence_of_label(4).map(|s| s.row), Some(4));
        assert_eq!(pass.sequence_of(11).map(|s| s.row), Some(0));
        assert_eq!((pass.row_tokens(), pass.is_shared()), (13 + 12 + 12 + 8 + 13, true));
        let mut alone = Pass::default();
        [row(12, &[90]), row(12, &[91])].iter().for_each(|ids| alone.push(0, ids, &last(ids)));
        assert!(!alone.is_shared());
    }
}
