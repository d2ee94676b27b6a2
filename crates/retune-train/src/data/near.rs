//! Rows that are nearly the same: they share most of their shingles, the runs of words that a text is made of (Broder 1997).

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use rayon::prelude::*;

use super::row::Row;

/// Words of a shingle.
const WORDS: usize = 3;
/// The part of all shingles of two rows that both have, from which on they are nearly the same.
const NEAR: f64 = 0.5;
/// Shingles that more held-out rows have than this are a form that rows are written in, and say nothing of these.
const MOST_ROWS: usize = 32;

/// For each row the held-out row that it is nearly the same as, the nearest one.
pub(super) fn nearest<'a>(rows: &[Row], held_out: &'a [Row]) -> Vec<Option<&'a Row>> {
    let mut of_shingle: HashMap<u64, Vec<usize>> = HashMap::new();
    for (at, row) in held_out.iter().enumerate() {
        for shingle in shingles(row) {
            of_shingle.entry(shingle).or_default().push(at);
        }
    }
    let common: HashSet<u64> =
        of_shingle.iter().filter(|(_, rows)| rows.len() > MOST_ROWS).map(|(shingle, _)| *shingle).collect();
    of_shingle.retain(|shingle, _| !common.contains(shingle));
    let mut sizes = vec![0; held_out.len()];
    for &at in of_shingle.values().flatten() {
        if let Some(size) = sizes.get_mut(at) {
            *size += 1;
        }
    }
    let nearest = |row: &Row| {
        let mut own = shingles(row);
        own.retain(|shingle| !common.contains(shingle));
        let mut shared: HashMap<usize, usize> = HashMap::new();
        for at in own.iter().filter_map(|shingle| of_shingle.get(shingle)).flatten() {
            *shared.entry(*at).or_default() += 1;
        }
        let likeness = |(at, shared): (usize, usize)| {
            let all = own.len() + sizes.get(at).copied().unwrap_or(0) - shared;
            (at, shared as f64 / all.max(1) as f64)
        };
        let near = shared.into_iter().map(likeness).filter(|(_, likeness)| *likeness >= NEAR);
        // The first of equals, so that the report is the same every time.
        let best = near.reduce(|best, next| if (next.1, best.0) > (best.1, next.0) { next } else { best });
        best.and_then(|(at, _)| held_out.get(at))
    };
    rows.par_iter().map(nearest).collect()
}

/// The shingles of a row, in lower case and without marks; of a row of few words there are none that say anything.
fn shingles(row: &Row) -> HashSet<u64> {
    let text = row.text.plain_text().to_lowercase();
    let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let hash = |words: &[&str]| {
        let mut hasher = DefaultHasher::new();
        words.hash(&mut hasher);
        hasher.finish()
    };
    if words.len() < 2 * WORDS { HashSet::new() } else { words.windows(WORDS).map(hash).collect() }
}

#[cfg(test)]
mod tests {
    use super::super::row::RowText;
    use super::*;

    fn rows(texts: &[&str]) -> Vec<Row> {
        texts
            .iter()
            .enumerate()
            .map(|(index, text)| Row { index, line: index + 1, text: RowText::Text((*text).into()) })
            .collect()
    }

    #[test]
    fn rows_that_differ_in_a_word_are_found_and_others_are_not() {
        let sentence = "the ship left the harbour at dawn with forty sailors and a goat that nobody had paid for";
        let other = "a train stopped in the valley at noon and three people with heavy bags stepped down from it";
        let held_out = rows(&[other, sentence]);
        let near = |text: &str| nearest(&rows(&[text]), &held_out)[0].map(|row| row.index);
        assert_eq!(near(&sentence.replace("goat", "dog")), Some(1));
        assert_eq!(near(&sentence.to_uppercase().replace(" AT", ", at")), Some(1));
        assert_eq!(
            near("the ship left the harbour at dawn, and then it rained for many days on the empty quays"),
            None
        );
        assert_eq!(near("the ship left"), None);
    }

    #[test]
    fn what_all_rows_begin_with_says_nothing() {
        let form = "write the one line summary for this package in plain words please and do not add a name";
        let of = |n: usize| format!("{form}: {n}a{n} {n}b{n} {n}c{n} {n}d{n} {n}e{n}");
        let held_out: Vec<String> = (0..100).map(of).collect();
        let held_out = rows(&held_out.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(nearest(&rows(&[&of(1000)]), &held_out), [None]);
    }
}
