//! One file into a training part and a held-out part.

use std::collections::HashMap;

use super::order::{Purpose, Stream};
use super::read::{DataFile, Reading};

/// Splits a file into (training, held-out), about `fraction` of the rows in the second. The choice depends on `seed` and on
/// the rows; rows of the same content stay together, so nothing held out is trained on. Both parts keep the file's order.
///
/// With a fraction above 0 at least one row is held out, unless all rows are the same; at least one is left for training.
pub fn split(file: DataFile, fraction: f64, seed: u64) -> (DataFile, DataFile) {
    let held_out = held_out_rows(&file, fraction, seed);
    let DataFile { path, format, rows, files, reading } = file;
    let (mut training, mut evaluation) = (Vec::new(), Vec::new());
    for (row, held_out) in rows.into_iter().zip(held_out) {
        if held_out { evaluation.push(row) } else { training.push(row) }
    }
    let held_out =
        DataFile { path: path.clone(), format, rows: evaluation, files: files.clone(), reading: Reading::default() };
    (DataFile { path, format, rows: training, files, reading }, held_out)
}

/// For every row whether it is held out.
fn held_out_rows(file: &DataFile, fraction: f64, seed: u64) -> Vec<bool> {
    let mut numbers = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, row) in file.rows.iter().enumerate() {
        let number = *numbers.entry(&row.text).or_insert(groups.len());
        match groups.get_mut(number) {
            Some(group) => group.push(index),
            None => groups.push(vec![index]),
        }
    }
    let mut held_out = vec![false; file.rows.len()];
    if groups.len() < 2 || fraction <= 0.0 {
        return held_out;
    }
    let limit = ((file.rows.len() as f64 * fraction).round() as usize).clamp(1, file.rows.len() - 1);
    let mut chosen = 0;
    let order = Stream::new(Purpose::Split, seed, 0).permutation(groups.len());
    let in_order: Vec<&Vec<usize>> = order.iter().filter_map(|&number| groups.get(number)).collect();
    let mut mark = |group: &[usize]| group.iter().for_each(|&row| held_out[row] = true);
    for group in &in_order {
        if chosen + group.len() <= limit {
            mark(group);
            chosen += group.len();
        }
    }
    // Every group is larger than the part asked for: the smallest is nearest to it.
    if chosen == 0
        && let Some(group) = in_order.iter().min_by_key(|group| group.len())
    {
        mark(group);
    }
    held_out
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::columns::RowFormat;
    use super::super::row::{Row, RowText};
    use super::*;

    fn file(texts: impl IntoIterator<Item = usize>) -> DataFile {
        let rows = texts.into_iter().enumerate();
        let rows = rows.map(|(index, text)| Row { index, line: index + 1, text: RowText::Text(text.to_string()) });
        DataFile::new("rows.jsonl", RowFormat::Text, rows.collect())
    }

    fn indices(file: &DataFile) -> Vec<usize> {
        file.rows.iter().map(|row| row.index).collect()
    }

    #[test]
    fn the_parts_have_the_sizes_asked_for_and_the_files_order() {
        let (training, held_out) = split(file(0..1000), 0.05, 42);
        assert_eq!((training.rows.len(), held_out.rows.len()), (950, 50));
        assert!(indices(&training).is_sorted() && indices(&held_out).is_sorted());
        let all: HashSet<usize> = indices(&training).into_iter().chain(indices(&held_out)).collect();
        assert_eq!(all.len(), 1000);
        assert_eq!(indices(&split(file(0..1000), 0.05, 42).1), indices(&held_out));
        assert_ne!(indices(&split(file(0..1000), 0.05, 43).1), indices(&held_out));
    }

    #[test]
    fn rows_of_the_same_content_stay_together() {
        for seed in 0..20 {
            let (training, held_out) = split(file((0..300).map(|n| n % 70)), 0.2, seed);
            let texts: HashSet<_> = training.rows.iter().map(|row| &row.text).collect();
            assert!(held_out.rows.iter().all(|row| !texts.contains(&row.text)));
            assert!((50..=60).contains(&held_out.rows.len()), "{}", held_out.rows.len());
        }
    }

    #[test]
    fn small_files_keep_a_row_on_each_side() {
        let sizes = |texts: &[usize], fraction| {
            let (training, held_out) = split(file(texts.iter().copied()), fraction, 1);
            (training.rows.len(), held_out.rows.len())
        };
        assert_eq!(sizes(&[1, 2, 3], 0.05), (2, 1));
        assert_eq!(sizes(&[1, 2], 0.99), (1, 1));
        assert_eq!(sizes(&[1, 2, 3], 0.0), (3, 0));
        assert_eq!(sizes(&[1], 0.5), (1, 0));
        assert_eq!(sizes(&[1, 1, 1], 0.5), (3, 0));
        assert_eq!(sizes(&[1, 1, 1, 2, 2], 0.05), (3, 2));
        assert_eq!(sizes(&[], 0.5), (0, 0));
    }
}
