//! What one pass through the model computes: rows laid end to end, without padding, and what rows begin with in common only once.

use std::ops::Range;

/// Tokens that a row must have in common with another one to share them: copying keys of whole rows together for the attention costs something too.
const LEAST_SHARED: usize = 8;

/// One row of the data set inside a pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Its tokens in the pass, virtual ones included: all of the row, or what follows the tokens it shares with an earlier one.
    pub tokens: Range<usize>,
    /// All keys of the row, in [`Pass::key_rows`]: what its queries may see.
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

/// What stands before the tokens of every row, and takes the positions before theirs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prelude {
    /// Ids of virtual tokens, beyond those of the table: they are computed like any others.
    pub virtual_ids: Range<u32>,
    /// Number of keys and values that every attention finds before those of the row's tokens.
    pub prefix: usize,
    /// The id that rows begin with where each answers a text that an encoder reads, its source. Virtual tokens then stand before the
    /// tokens of sources.
    pub decoder_start: Option<u32>,
}

impl Prelude {
    /// How many positions virtual tokens and the prefix take.
    pub fn len(&self) -> usize {
        self.virtual_ids.len() + self.prefix
    }

    /// Whether it takes none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ids that are computed before a row's own.
    fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        self.virtual_ids.clone().chain(self.decoder_start)
    }

    /// Of the ids that follow, how many are not computed: where a row begins with a start, its last token predicts nothing.
    fn unread(&self) -> usize {
        usize::from(self.decoder_start.is_some())
    }
}

/// Rows laid end to end, each after the prelude. Positions restart with each row; the head runs on the tokens of `labels` alone.
///
/// With `share_prefixes` a row that begins like an earlier one (the same system prompt, the same instruction) has those tokens in common
/// with it. What a causal model computes for a token depends on what precedes it and on nothing else, so this changes results by the order
/// of sums alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pass {
    pub prelude: Prelude,
    pub share_prefixes: bool,
    pub ids: Vec<u32>,
    pub positions: Vec<u32>,
    pub sequences: Vec<Sequence>,
    pub labels: Vec<Label>,
    /// For each key of each row, all rows one after the other, where it comes from: [`Self::prefix_rows`] are the prefix's, and
    /// [`Self::token_rows`], after them, those of the pass's tokens.
    pub key_rows: Vec<u32>,
    /// What the rows answer, a row for each, where an encoder reads it.
    pub source: Option<Box<Pass>>,
}

/// How much a pass holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassSize {
    /// Tokens that are computed.
    pub tokens: usize,
    /// Keys of all rows, those they share counted for each.
    pub keys: usize,
    pub labels: usize,
    /// Labels of a pass that is scored and not trained on: in f32, whatever the others are computed in.
    pub scored_labels: usize,
    /// Whether rows share tokens.
    pub is_shared: bool,
    /// Tokens of the sources.
    pub source_tokens: usize,
}

impl PassSize {
    /// Rows that share nothing, with a label on every token, and sources of as many tokens (where there are sources).
    pub fn dense(tokens: usize) -> Self {
        Self { tokens, keys: tokens, labels: tokens, source_tokens: tokens, ..Self::default() }
    }

    /// The size of a pass that could hold either of two.
    pub fn max(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.max(other.tokens),
            keys: self.keys.max(other.keys),
            labels: self.labels.max(other.labels),
            scored_labels: self.scored_labels.max(other.scored_labels),
            is_shared: self.is_shared || other.is_shared,
            source_tokens: self.source_tokens.max(other.source_tokens),
        }
    }
}

impl Pass {
    /// An empty pass for rows after `prelude`, which is [`crate::overlay::Overlay::prelude`] of what the pass will run through. With
    /// `share_prefixes` rows will share what they begin with in common, unless each answers a source of its own.
    pub fn new(prelude: Prelude, share_prefixes: bool) -> Self {
        if prelude.decoder_start.is_none() {
            return Self { prelude, share_prefixes, ..Self::default() };
        }
        let of_source = Prelude { prefix: 0, decoder_start: None, ..prelude.clone() };
        let source = Some(Box::new(Self::new(of_source, false)));
        Self { prelude: Prelude { virtual_ids: 0..0, ..prelude }, source, ..Self::default() }
    }

    /// The prelude that the pass was made for.
    pub(crate) fn made_for(&self) -> Prelude {
        let virtual_ids = self.source.as_ref().map_or(&self.prelude, |source| &source.prelude).virtual_ids.clone();
        Prelude { virtual_ids, ..self.prelude.clone() }
    }

    /// Number of tokens that are computed.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of keys of all rows.
    pub fn keys(&self) -> usize {
        self.key_rows.len()
    }

    /// Keys of the longest row, by its positions.
    pub(crate) fn longest(&self) -> usize {
        self.positions.iter().max().map_or(0, |&position| position as usize + 1)
    }

    /// Number of tokens of all rows, virtual ones left out.
    pub fn row_tokens(&self) -> usize {
        self.keys() - self.sequences.len() * self.prelude.len()
    }

    /// How much it holds.
    pub fn size(&self) -> PassSize {
        let (tokens, keys, labels) = (self.tokens(), self.keys(), self.labels.len());
        let source_tokens = self.source_tokens();
        PassSize { tokens, keys, labels, scored_labels: 0, is_shared: self.is_shared(), source_tokens }
    }

    /// Number of tokens of the sources.
    pub fn source_tokens(&self) -> usize {
        self.source.as_ref().map_or(0, |source| source.tokens())
    }

    /// Whether a token is part of several rows.
    pub fn is_shared(&self) -> bool {
        self.keys() - self.sequences.len() * self.prelude.prefix > self.tokens()
    }

    /// The numbers in [`Self::key_rows`] of the prefix's keys.
    pub(crate) fn prefix_rows(&self) -> Range<u32> {
        0..self.prelude.prefix as u32
    }

    /// The numbers in [`Self::key_rows`] of the keys of the pass's tokens.
    pub(crate) fn token_rows(&self) -> Range<u32> {
        let first = self.prefix_rows().end;
        first..first + self.tokens() as u32
    }

    /// The ids of a row after the prelude.
    fn row_ids<'a>(&self, ids: &'a [u32]) -> impl Iterator<Item = u32> + use<'a> {
        let read = ids.len().saturating_sub(self.prelude.unread());
        self.prelude.ids().chain(ids[..read].iter().copied())
    }

    /// The longest beginning that a row would share with one in the pass, as a range of [`Self::key_rows`]; empty for none.
    fn shared(&self, ids: &[u32]) -> Range<usize> {
        let mut longest = 0..0;
        if self.share_prefixes {
            let prefix = self.prelude.prefix;
            // A row keeps at least one token of its own.
            let most = (self.prelude.virtual_ids.len() + ids.len()).saturating_sub(1);
            for keys in self.sequences.iter().map(|sequence| sequence.keys.start + prefix..sequence.keys.end) {
                let rows = self.key_rows[keys.clone()].iter();
                let pairs = rows.zip(self.row_ids(ids).take(most));
                let same = pairs.take_while(|&(&row, id)| self.ids[row as usize - prefix] == id).count();
                if same >= LEAST_SHARED && same > longest.len() {
                    longest = keys.start..keys.start + same;
                }
            }
        }
        longest
    }

    /// By how many tokens a row would make the pass longer.
    pub fn own_tokens(&self, ids: &[u32]) -> usize {
        self.prelude.virtual_ids.len() + ids.len() - self.shared(ids).len()
    }

    /// By how many tokens a source would make the sources longer.
    pub fn own_source_tokens(&self, source: &[u32]) -> usize {
        self.source.as_ref().map_or(0, |of_source| of_source.own_tokens(source))
    }

    /// How many keys a row would have.
    pub fn row_keys(&self, ids: &[u32]) -> usize {
        self.prelude.len() + ids.len()
    }

    /// Appends a row that answers `source`, which is read where the pass has sources.
    pub fn push_answer(&mut self, row: u64, source: &[u32], ids: &[u32], trained: &[bool]) {
        if let Some(of_source) = &mut self.source {
            of_source.push(row, source, &[]);
        }
        self.push(row, ids, trained);
    }

    /// Appends a row; `trained[i]` says whether token i is a target (the first is none unless a virtual token or a start predicts it).
    pub fn push(&mut self, row: u64, ids: &[u32], trained: &[bool]) {
        let shared = self.shared(ids);
        let (before, prefix) = (self.prelude.ids().count(), self.prelude.prefix);
        let (start, first) = (self.ids.len(), self.key_rows.len());
        let own = shared.len()..before + ids.len().saturating_sub(self.prelude.unread());
        let end = start + own.len();
        let row_ids = self.row_ids(ids);
        self.ids.extend(row_ids.skip(own.start));
        self.positions.extend((prefix + own.start) as u32..(prefix + own.end) as u32);
        self.key_rows.extend(self.prefix_rows());
        self.key_rows.extend_from_within(shared);
        self.key_rows.extend((prefix + start) as u32..(prefix + end) as u32);
        let rows = &self.key_rows[first + prefix..];
        let targets = ids.iter().zip(trained).zip(before..).filter(|((_, trained), at)| **trained && *at > 0);
        let label = |((&target, _), at): (_, usize)| Label { token: rows[at - 1] - prefix as u32, target };
        let first_label = self.labels.len();
        self.labels.extend(targets.map(label));
        let (keys, labels) = (first..self.key_rows.len(), first_label..self.labels.len());
        self.sequences.push(Sequence { tokens: start..end, keys, labels, row });
    }

    /// The places in the pass of all tokens of a sequence's row, virtual ones left out.
    pub fn tokens_of(&self, sequence: &Sequence) -> impl Iterator<Item = u32> {
        let prefix = self.prelude.prefix as u32;
        self.key_rows[sequence.keys.clone()].iter().skip(self.prelude.len()).map(move |row| row - prefix)
    }

    /// Empties the pass and keeps its memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.sequences.clear();
        self.labels.clear();
        self.key_rows.clear();
        if let Some(source) = &mut self.source {
            source.clear();
        }
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
        assert_eq!(pass.key_rows, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_row_that_begins_like_another_has_its_own_end_alone() {
        let row = |shared: u32, end: &[u32]| -> Vec<u32> { (0..shared).chain(end.iter().copied()).collect() };
        let last = |ids: &[u32]| -> Vec<bool> { (0..ids.len()).map(|i| i + 1 == ids.len()).collect() };
        let mut pass = Pass::new(Prelude::default(), true);
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
        assert_eq!(pass.key_rows[third], [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 16]);
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

    #[test]
    fn virtual_tokens_begin_each_row_and_predict_its_first() {
        let prelude = Prelude { virtual_ids: 100..103, ..Prelude::default() };
        let mut pass = Pass::new(prelude, false);
        pass.push(0, &[10, 11], &[true, true]);
        pass.push(1, &[20], &[false]);
        assert_eq!(pass.ids, [100, 101, 102, 10, 11, 100, 101, 102, 20]);
        assert_eq!(pass.positions, [0, 1, 2, 3, 4, 0, 1, 2, 3]);
        assert_eq!(pass.labels, [Label { token: 2, target: 10 }, Label { token: 3, target: 11 }]);
        assert_eq!((pass.tokens(), pass.keys(), pass.row_tokens(), pass.is_shared()), (9, 9, 3, false));
        assert!(pass.tokens_of(&pass.sequences[0]).eq([3, 4]));
        assert_eq!(pass.sequences[1].tokens, 5..9);
    }

    #[test]
    fn virtual_tokens_are_shared_by_all_rows() {
        let mut pass = Pass::new(Prelude { virtual_ids: 100..108, ..Prelude::default() }, true);
        pass.push(0, &[10, 11], &[true, true]);
        assert_eq!((pass.own_tokens(&[20, 21]), pass.own_tokens(&[10, 12])), (2, 1));
        pass.push(1, &[20, 21], &[true, true]);
        pass.push(2, &[10, 12], &[true, true]);
        assert_eq!(pass.ids, [100, 101, 102, 103, 104, 105, 106, 107, 10, 11, 20, 21, 12]);
        assert_eq!(pass.positions[8..], [8, 9, 8, 9, 9]);
        let labels: Vec<_> = pass.labels.iter().map(|l| (l.token, l.target)).collect();
        assert_eq!(labels, [(7, 10), (8, 11), (7, 20), (10, 21), (7, 10), (8, 12)]);
        assert_eq!((pass.keys(), pass.row_tokens(), pass.is_shared()), (30, 6, true));
        assert!(pass.tokens_of(&pass.sequences[2]).eq([8, 12]));
    }

    #[test]
    fn answers_begin_with_the_start_and_their_sources_stand_beside_them() {
        let mut pass = Pass::new(Prelude { virtual_ids: 100..102, prefix: 3, decoder_start: Some(0) }, true);
        let made_for = pass.made_for();
        for row in 0..2 {
            pass.push_answer(row, &[10, 11, 12, 13, 14, 15, 16, 17, 18], &[20, 21, 1], &[true, false, true]);
        }
        // The last token predicts nothing, and nothing is shared.
        assert_eq!(pass.ids, [0, 20, 21, 0, 20, 21]);
        assert_eq!(pass.positions, [3, 4, 5, 3, 4, 5]);
        let labels: Vec<_> = pass.labels.iter().map(|l| (l.token, l.target)).collect();
        assert_eq!(labels, [(0, 20), (2, 1), (3, 20), (5, 1)]);
        assert_eq!((pass.keys(), pass.row_keys(&[20, 21, 1]), pass.row_tokens(), pass.is_shared()), (12, 6, 6, false));
        let source = pass.source.as_ref().unwrap();
        assert_eq!(source.ids[..4], [100, 101, 10, 11]);
        assert_eq!((source.tokens(), source.sequences[1].tokens.clone(), source.labels.len()), (22, 11..22, 0));
        assert_eq!((pass.size().source_tokens, pass.made_for()), (22, made_for));
        pass.clear();
        assert_eq!((pass.tokens(), pass.source_tokens()), (0, 0));
    }

    #[test]
    fn a_prefix_is_keys_and_positions_and_no_tokens() {
        let mut pass = Pass::new(Prelude { prefix: 2, ..Prelude::default() }, true);
        let row: Vec<u32> = (0..9).collect();
        pass.push(0, &row, &[true; 9]);
        pass.push(1, &[row.as_slice(), &[70]].concat(), &[true; 10]);
        assert_eq!((pass.tokens(), pass.keys(), pass.row_tokens(), pass.is_shared()), (10, 23, 19, true));
        assert_eq!(pass.positions, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(pass.key_rows[..11], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(pass.key_rows[11..], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        // Nothing predicts the first token: a prefix has no output.
        assert_eq!((pass.labels.len(), pass.labels[0]), (8 + 9, Label { token: 0, target: 1 }));
        assert_eq!(pass.labels[16], Label { token: 8, target: 70 });
        assert!(pass.tokens_of(&pass.sequences[1]).eq([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]));
        assert_eq!((pass.prefix_rows(), pass.token_rows()), (0..2, 2..12));
        let mut alone = Pass::new(Prelude { prefix: 2, ..Prelude::default() }, true);
        alone.push(0, &row, &[true; 9]);
        assert!(!alone.is_shared());
    }
}
