//! Taking an adapter out of a model again that it was merged into.

use retune_engine::overlay::{LowRank, Overlay};

use crate::error::Error;

/// The overlay that takes out of a merged model what merging `overlay` has put in: the same terms with the other sign, for
/// [`crate::export::write`].
///
/// The result is the original up to rounding. In f32 that is a last digit of the larger of merged and original weight; a model that was
/// merged and is unmerged in 16 bits is rounded twice, by half a unit in the last place each.
///
/// # Errors
/// A tensor that was trained in the base's place, whose original values the merged model no longer has.
pub fn inverse(overlay: &Overlay) -> Result<Overlay, Error> {
    if let Some(tensor) = overlay.layout.params().iter().find_map(|param| param.base.clone()) {
        return Err(Error::Irreversible { tensor });
    }
    let mut inverse = overlay.clone();
    for LowRank { scale, .. } in inverse.linears.iter_mut().filter_map(|change| change.low_rank.as_mut()) {
        *scale = -*scale;
    }
    Ok(inverse)
}
