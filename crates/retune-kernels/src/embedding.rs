//! Token embedding: rows of a table by id, and the sum of their gradients. Ids count through the rows of several tables, one after the
//! other; a call is about those of the table that begins at `first`.

use crate::multiversion;
use crate::panel::PanelSource;
use crate::parallel::{self, SharedMut};
use crate::scratch::{self, Purpose};

/// The row of a table of `rows` rows that an id means; `None` for an id of another table.
fn row_of(id: u32, first: usize, rows: usize) -> Option<usize> {
    (id as usize).checked_sub(first).filter(|&row| row < rows)
}

/// Writes the rows of `table: [V, D]` whose ids, `first..first + V`, are among `ids` to `y: [T, D]`. Rows of other ids are left alone.
pub fn forward(table: &dyn PanelSource, first: usize, ids: &[u32], y: &mut [f32]) {
    let (rows, d) = (table.rows(), table.cols());
    let shared = SharedMut::new(y);
    parallel::for_each(ids.len(), |t| {
        let Some(row) = row_of(ids[t], first, rows) else { return };
        // SAFETY: one token, one row of y.
        table.panel_f32(row..row + 1, 0..d, unsafe { shared.slice(t * d, d) });
    });
}

multiversion! {
    fn add_row(to: &mut [f32], from: &[f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t += f;
        }
    }
}

multiversion! {
    fn add_scaled(to: &mut [f32], row: &[f32], factor: f32) {
        for (t, r) in to.iter_mut().zip(row) {
            *t += factor * r;
        }
    }
}

/// Adds the rows `ids` of `table: [V, D]`, each times its factor, to `y: [T, D]`: the labels' part of a head's input gradient.
pub fn add_scaled_rows(table: &dyn PanelSource, ids: &[u32], factors: &[f32], y: &mut [f32]) {
    let d = table.cols();
    let shared = SharedMut::new(y);
    parallel::for_each(ids.len(), |t| {
        let row = ids[t] as usize;
        scratch::with(Purpose::Row, d, |decoded| {
            table.panel_f32(row..row + 1, 0..d, decoded);
            // SAFETY: one token, one row of y.
            add_scaled(unsafe { shared.slice(t * d, d) }, decoded, factors[t]);
        });
    });
}

/// Adds the rows of `dy: [T, D]` to those rows of `dtable: [V, D]` whose ids, `first..first + V`, they have, in token order.
pub fn backward(first: usize, ids: &[u32], dy: &[f32], d: usize, dtable: &mut [f32]) {
    const COLUMNS: usize = 128;
    let rows = dtable.len() / d.max(1);
    let shared = SharedMut::new(dtable);
    // Cut by columns: the same id may come twice, and its rows must add up in one order.
    parallel::for_each(d.div_ceil(COLUMNS), |piece| {
        let start = piece * COLUMNS;
        let width = COLUMNS.min(d - start);
        for (t, &id) in ids.iter().enumerate() {
            let Some(row) = row_of(id, first, rows) else { continue };
            let from = &dy[t * d + start..t * d + start + width];
            // SAFETY: pieces own disjoint columns, and one piece holds one row at a time.
            add_row(unsafe { shared.slice(row * d + start, width) }, from);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::F32Panel;
    use crate::testing::random;

    #[test]
    fn rows_come_out_and_gradients_add_up_where_ids_repeat() {
        let (v, d) = (5, 130);
        let table = random(1, v * d);
        let ids = [3, 0, 3, 4];
        let mut y = vec![0.0; ids.len() * d];
        forward(&F32Panel::new(&table, d), 0, &ids, &mut y);
        for (t, &id) in ids.iter().enumerate() {
            assert_eq!(y[t * d..(t + 1) * d], table[id as usize * d..(id as usize + 1) * d]);
        }
        let mut sum = y.clone();
        add_scaled_rows(&F32Panel::new(&table, d), &ids, &[-1.0, 1.0, 0.0, 0.5], &mut sum);
        for (sum, (y, factor)) in sum.chunks(d).zip(y.chunks(d).zip([0.0, 2.0, 1.0, 1.5])) {
            assert!(sum.iter().zip(y).all(|(s, v)| *s == factor * v));
        }
        let mut dtable = vec![0.0; v * d];
        backward(0, &ids, &y, d, &mut dtable);
        for j in 0..d {
            assert_eq!(dtable[3 * d + j], 2.0 * table[3 * d + j]);
            assert_eq!(dtable[d + j], 0.0);
        }
    }

    #[test]
    fn ids_of_another_table_are_left_alone() {
        let d = 3;
        let table = random(1, 2 * d);
        let ids = [6, 4, 7, 8];
        let mut y = vec![0.5; ids.len() * d];
        forward(&F32Panel::new(&table, d), 6, &ids, &mut y);
        assert_eq!((&y[..d], &y[2 * d..3 * d]), (&table[..d], &table[d..]));
        assert!(y[d..2 * d].iter().chain(&y[3 * d..]).all(|&v| v == 0.5));
        let mut dtable = vec![0.0; 2 * d];
        backward(6, &ids, &y, d, &mut dtable);
        assert_eq!(dtable, table);
    }
}
