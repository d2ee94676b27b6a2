//! Merging what stands on a linear into its weight and bias, a panel of rows at a time.

use std::ops::Range;

use retune_engine::overlay::{Change, Offset, OutputScale, TableTerm, TokenRows};
use retune_kernels::vector;
use retune_quant::Matrix;

/// Columns summed at once; they fit a processor's registers.
const COLUMNS: usize = 64;

/// Turns rows of a linear's weight into those of a linear that computes the same with nothing on it: `W' = o ⊙ (W + Σ s·B·A) ⊙ i`, where an
/// output scale over a norm has `o = m / ‖W + Σ s·B·A‖`, 0 for a row of zeros.
///
/// `dst` holds the base's rows `rows`, [rows.len(), in_features]; `params` is the flat vector that the change's places are in.
///
/// # Panics
/// When a length does not fit, or `rows` goes beyond `out_features`.
pub fn merge_rows(
    change: &Change,
    params: &[f32],
    in_features: usize,
    out_features: usize,
    rows: Range<usize>,
    dst: &mut [f32],
) {
    if let Some(weight) = &change.weight {
        dst.copy_from_slice(&params[weight.clone()][rows.start * in_features..rows.end * in_features]);
    }
    for term in &change.low_rank {
        let (a, b) = (term.a.values(params), term.b.values(params));
        merged_delta(term.r, in_features, out_features, term.scale, &a, &b, rows.clone(), dst);
    }
    if let Some(scale) = &change.output_scale {
        let factors = &params[scale.range().clone()][rows];
        for (row, &factor) in dst.chunks_exact_mut(in_features.max(1)).zip(factors) {
            let factor = match scale {
                OutputScale::Plain(_) => factor,
                OutputScale::OverNorm(_) => match vector::sum_squares(row).sqrt() as f32 {
                    0.0 => 0.0,
                    norm => factor / norm,
                },
            };
            row.iter_mut().for_each(|value| *value *= factor);
        }
    }
    if let Some(scale) = &change.input_scale {
        for row in dst.chunks_exact_mut(in_features.max(1)) {
            row.iter_mut().zip(&params[scale.clone()]).for_each(|(value, factor)| *value *= factor);
        }
    }
}

/// What [`merge_rows`] adds to a linear's whole weight, `[out, in]`.
pub fn change_of(change: &Change, params: &[f32], weight: &Matrix) -> Vec<f32> {
    let base = weight.to_f32();
    let mut merged = base.clone();
    merge_rows(change, params, weight.cols(), weight.rows(), 0..weight.rows(), &mut merged);
    merged.iter_mut().zip(&base).for_each(|(value, base)| *value -= base);
    merged
}

/// Turns a linear's bias into that of a linear that computes the same with nothing on it: an output scale over a norm leaves it as it is.
pub fn merge_bias(change: &Change, params: &[f32], bias: &mut [f32]) {
    if let Some(OutputScale::Plain(scale)) = &change.output_scale {
        bias.iter_mut().zip(&params[scale.clone()]).for_each(|(value, factor)| *value *= factor);
    }
    if let Some(Offset { place, scale }) = &change.offset {
        bias.iter_mut().zip(&params[place.clone()]).for_each(|(value, offset)| *value += scale * offset);
    }
}

/// Turns rows of a table, `[rows.len(), cols]`, into those of one that gives the same rows with nothing on it. `factors` are those of its
/// columns, where the term has magnitudes.
///
/// # Panics
/// When a length does not fit.
pub fn merge_table_rows(
    replaced: Option<&TokenRows>,
    term: Option<(&TableTerm, Option<&[f32]>)>,
    params: &[f32],
    cols: usize,
    rows: Range<usize>,
    dst: &mut [f32],
) {
    let of_rows = rows.zip(dst.chunks_exact_mut(cols.max(1)));
    for (row, dst) in of_rows {
        if let Some(TokenRows { ids, rows }) = replaced
            && let Some(k) = ids.iter().position(|&id| id as usize == row)
        {
            dst.copy_from_slice(&params[rows.clone()][k * cols..(k + 1) * cols]);
        }
        if let Some((TableTerm { a, b, r, scale, magnitudes: _ }, factors)) = term {
            let (a, b) = (&params[a.clone()][row * r..(row + 1) * r], &params[b.clone()]);
            for (dst, b) in dst.iter_mut().zip(b.chunks_exact(*r)) {
                *dst += scale * a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            }
            if let Some(factors) = factors {
                dst.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
            }
        }
    }
}

/// Adds s·B·A to rows of a weight: `dst[o, i] += scaling · Σ_k b[o, k] · a[k, i]`.
///
/// `a` is [r, in_features], `b` is [out_features, r], `dst` holds the rows `rows` of the weight, [rows.len(), in_features], all row-major.
/// The sum over k is taken first, in f32 and in order, and added to the weight once: a result does not depend on how rows are cut into panels.
///
/// # Panics
/// When a length does not fit, or `rows` goes beyond `out_features`.
#[allow(clippy::too_many_arguments)] // the dimensions and the three matrices of one product
fn merged_delta(
    r: usize,
    in_features: usize,
    out_features: usize,
    scaling: f32,
    a: &[f32],
    b: &[f32],
    rows: Range<usize>,
    dst: &mut [f32],
) {
    assert_eq!(a.len(), r * in_features, "A");
    assert_eq!(b.len(), out_features * r, "B");
    assert!(rows.start <= rows.end && rows.end <= out_features, "rows {rows:?} of {out_features}");
    assert_eq!(dst.len(), rows.len() * in_features, "panel");
    if in_features == 0 {
        return;
    }
    for (row, dst_row) in rows.zip(dst.chunks_exact_mut(in_features)) {
        let b_row = &b[row * r..(row + 1) * r];
        for (block, dst_block) in dst_row.chunks_mut(COLUMNS).enumerate() {
            let first = block * COLUMNS;
            let mut sum = [0.0f32; COLUMNS];
            for (k, &factor) in b_row.iter().enumerate() {
                let start = k * in_features + first;
                for (sum, &a) in sum.iter_mut().zip(&a[start..start + dst_block.len()]) {
                    *sum += factor * a;
                }
            }
            for (dst, sum) in dst_block.iter_mut().zip(&sum) {
                *dst += scaling * sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        (0..n).map(|i| retune_kernels::random::symmetric(retune_kernels::random::at(seed, i as u64))).collect()
    }

    #[test]
    fn it_is_the_product_in_f64() {
        for (r, inputs, outputs) in [(1, 1, 1), (4, 63, 5), (16, 64, 7), (8, 130, 9)] {
            let (a, b) = (values(r * inputs, 1), values(outputs * r, 2));
            let weight = values(outputs * inputs, 3);
            let mut merged = weight.clone();
            merged_delta(r, inputs, outputs, 1.5, &a, &b, 0..outputs, &mut merged);
            for o in 0..outputs {
                for i in 0..inputs {
                    let delta: f64 = (0..r).map(|k| f64::from(b[o * r + k]) * f64::from(a[k * inputs + i])).sum();
                    let expected = f64::from(weight[o * inputs + i]) + 1.5 * delta;
                    assert!((f64::from(merged[o * inputs + i]) - expected).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn panels_give_the_bytes_of_the_whole() {
        let (r, inputs, outputs) = (5, 97, 11);
        let (a, b) = (values(r * inputs, 1), values(outputs * r, 2));
        let mut whole = values(outputs * inputs, 3);
        let mut panels = whole.clone();
        merged_delta(r, inputs, outputs, 0.5, &a, &b, 0..outputs, &mut whole);
        for rows in [0..4, 4..4, 4..5, 5..11] {
            let panel = &mut panels[rows.start * inputs..rows.end * inputs];
            merged_delta(r, inputs, outputs, 0.5, &a, &b, rows, panel);
        }
        assert_eq!(whole, panels);
    }

    #[test]
    fn a_zero_b_changes_nothing() {
        let weight = values(6, 3);
        let mut merged = weight.clone();
        merged_delta(2, 3, 2, 2.0, &values(6, 1), &[0.0; 4], 0..2, &mut merged);
        assert_eq!(weight, merged);
    }
}
