//! Taking an adapter out of a model again that it was merged into.

use retune_engine::overlay::{Change, LowRank, OutputScale, Overlay};

use crate::error::Error;

/// The overlay that takes out of a merged model what merging `overlay` has put in: the same terms with the other sign, for
/// [`crate::export::write`].
///
/// The result is the original up to rounding. In f32 that is a last digit of the larger of merged and original weight; a model that was
/// merged and is unmerged in 16 bits is rounded twice, by half a unit in the last place each.
///
/// # Errors
/// A tensor that was trained in the base's place, whose original values the merged model no longer has; a scale, by which they were multiplied.
pub fn inverse(overlay: &Overlay) -> Result<Overlay, Error> {
    if let Some(tensor) = overlay.layout.params().iter().find_map(|param| param.base.clone()) {
        return Err(Error::Irreversible { tensor });
    }
    let rows = overlay.table_rows.iter().chain(&overlay.head_rows).next();
    if let Some(param) = rows.and_then(|rows| overlay.layout.at(rows.rows.start)) {
        return Err(Error::Irreversible { tensor: param.name.clone() });
    }
    let scale = |change: &Change| match (&change.input_scale, &change.output_scale) {
        (Some(place), _) | (None, Some(OutputScale::Plain(place) | OutputScale::OverNorm(place))) => Some(place.start),
        (None, None) => None,
    };
    let of_tables = [&overlay.table_term, &overlay.positions_term].into_iter().flatten();
    let magnitudes = of_tables.filter_map(|term| Some(term.magnitudes.as_ref()?.start));
    let first = overlay.linears.iter().filter_map(scale).chain(magnitudes).next();
    if let Some(param) = first.and_then(|place| overlay.layout.at(place)) {
        return Err(Error::IrreversibleScale { tensor: param.name.clone() });
    }
    let mut inverse = overlay.clone();
    for LowRank { scale, .. } in inverse.linears.iter_mut().flat_map(|change| &mut change.low_rank) {
        *scale = -*scale;
    }
    for offset in inverse.linears.iter_mut().filter_map(|change| change.offset.as_mut()) {
        offset.scale = -offset.scale;
    }
    for term in [&mut inverse.table_term, &mut inverse.positions_term].into_iter().flatten() {
        term.scale = -term.scale;
    }
    Ok(inverse)
}
