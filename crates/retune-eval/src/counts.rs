//! Things that are counted, and taken one by one.

use std::collections::HashMap;
use std::hash::Hash;

/// How many of each there are left.
pub(crate) struct Counts<K>(HashMap<K, usize>);

impl<K: Eq + Hash> FromIterator<K> for Counts<K> {
    fn from_iter<I: IntoIterator<Item = K>>(items: I) -> Self {
        let mut counts = HashMap::new();
        for item in items {
            *counts.entry(item).or_default() += 1;
        }
        Self(counts)
    }
}

impl<K: Eq + Hash> Counts<K> {
    /// Takes one of these, if there is one left.
    pub fn take(&mut self, item: K) -> bool {
        match self.0.get_mut(&item) {
            Some(count) if *count > 0 => {
                *count -= 1;
                true
            }
            _ => false,
        }
    }
}
