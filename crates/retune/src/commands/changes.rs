//! What an adapter does to a base: how large its changes are, by themselves and beside the weights, and which words a soft prompt is near.

use std::collections::BTreeMap;

use anyhow::Result;
use rayon::prelude::*;
use retune_adapter::{Deltas, LoraDelta};
use retune_engine::overlay::{Overlay, TokenRows};
use retune_kernels::PanelSource;
use retune_model::checkpoint::Checkpoint;
use retune_model::merge::change_of;
use serde_json::{Map, Value, json};

/// A change larger than the weight it changes is more than fine-tuning does.
const TOO_LARGE: f64 = 1.0;

/// Less than what rounding leaves of a change of nothing.
const NOTHING: f64 = 1e-6;

/// Adds to each module of `modules` the norm of its low-rank change, and with a base that norm over its weight's. Returns what is to be said
/// of an adapter that does too much.
pub fn describe(deltas: &Deltas, base: Option<&Checkpoint>, modules: &mut Map<String, Value>) -> Vec<String> {
    let norms: BTreeMap<&String, f64> = deltas.iter().map(|(module, delta)| (module, delta.norm())).collect();
    for (module, norm) in &norms {
        if let Some(entry) = modules.get_mut(*module) {
            entry["norm_change"] = json!(norm);
        }
    }
    let Some(base) = base else { return Vec::new() };
    let mut notes = Vec::new();
    let mut missing = Vec::new();
    let mut shares = BTreeMap::new();
    for (module, delta) in deltas {
        match weight_norm(base, module, delta) {
            Some(weight) => drop(shares.insert(module.clone(), norms[module] / weight)),
            None => missing.push(module.as_str()),
        }
    }
    let model = base.path().display();
    match missing.first() {
        Some(_) if missing.len() == deltas.len() => {
            notes.push(format!("none of its modules is in {model}: this adapter was made for another model"));
        }
        Some(first) => {
            let (missing, all) = (missing.len(), deltas.len());
            notes.push(format!("{missing} of its {all} modules are not in {model} in this shape, {first} for one"));
        }
        None => {}
    }
    put(&shares, modules);
    notes.extend(too_large(&shares));
    notes
}

/// The same for what an adapter of any method does to the weights of linears.
///
/// # Errors
/// A weight that the base does not have.
pub fn describe_weights(
    base: &Checkpoint,
    overlay: &Overlay,
    params: &[f32],
    modules: &mut Map<String, Value>,
) -> Result<Vec<String>> {
    let changed: Vec<_> = base.spec.linears().zip(&overlay.linears).filter(|(_, change)| !change.is_empty()).collect();
    let norms = changed
        .par_iter()
        .map(|(linear, change)| {
            let weight = base.weight_of(linear)?;
            let norms = [norm(&change_of(change, params, &weight)), norm(&weight.to_f32())];
            Ok((linear.name.clone(), norms))
        })
        .collect::<Result<BTreeMap<_, _>>>()?;
    for (module, [change, _]) in &norms {
        modules.entry(module.clone()).or_insert_with(|| json!({}))["norm_change"] = json!(change);
    }
    let shares: BTreeMap<_, _> = norms
        .into_iter()
        .map(|(module, [change, weight])| (module, if change == 0.0 { 0.0 } else { change / weight }))
        .collect();
    put(&shares, modules);
    let is_all = overlay.layout.params().iter().all(|param| param.base.is_none());
    let does_nothing = !shares.is_empty() && is_all && shares.values().all(|share| *share < NOTHING);
    let nothing = does_nothing.then(|| "every weight stays as it is: this adapter changes nothing yet".to_owned());
    Ok(nothing.into_iter().chain(too_large(&shares)).collect())
}

/// Adds to each module of `modules` how far what was trained in the place of its vectors, of its table or of rows of tokens is from the base's.
///
/// # Errors
/// A tensor that the base does not have.
pub fn describe_replaced(
    base: &Checkpoint,
    overlay: &Overlay,
    params: &[f32],
    modules: &mut Map<String, Value>,
) -> Result<()> {
    let layout = &overlay.layout;
    let linears: Vec<_> = overlay.linears.iter().filter_map(|change| change.weight.as_ref()).collect();
    // The weights of linears are told with what stands on them.
    let replaced = layout.params().iter().filter(|param| !linears.contains(&&param.range));
    for (param, name) in replaced.filter_map(|param| Some((param, param.base.as_ref()?))) {
        let Some((module, tensor)) = name.rsplit_once('.') else { continue };
        put_change(modules, module, tensor == "bias", &params[param.range.clone()], &base.tensor(name)?.to_f32());
    }
    let spec = &base.spec;
    let head = overlay.head_rows.as_ref().filter(|_| !spec.head.tied).map(|rows| (rows, &spec.head.linear.name));
    for (TokenRows { ids, rows }, module) in overlay.table_rows.iter().map(|rows| (rows, &spec.table.name)).chain(head)
    {
        let table = base.tensor(&format!("{module}.weight"))?;
        let mut of_base = vec![0.0; rows.len()];
        for (&id, row) in ids.iter().zip(of_base.chunks_exact_mut(table.cols().max(1))) {
            table.panel_f32(id as usize..id as usize + 1, 0..table.cols(), row);
        }
        put_change(modules, module, false, &params[rows.clone()], &of_base);
    }
    Ok(())
}

/// The norm of a change, and that over the norm of what is changed where that is not 0.
fn put_change(modules: &mut Map<String, Value>, module: &str, is_bias: bool, trained: &[f32], base: &[f32]) {
    let (of_change, of_base) = (norm_of_difference(trained, base), norm(base));
    let names = if is_bias { ["norm_bias_change", "change_over_bias"] } else { ["norm_change", "change_over_weight"] };
    let entry = modules.entry(module.to_owned()).or_insert_with(|| json!({}));
    entry[names[0]] = json!(of_change);
    if of_base > 0.0 {
        entry[names[1]] = json!(of_change / of_base);
    }
}

fn norm_of_difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

fn put(shares: &BTreeMap<String, f64>, modules: &mut Map<String, Value>) {
    for (module, share) in shares {
        if let Some(entry) = modules.get_mut(module) {
            entry["change_over_weight"] = json!(share);
        }
    }
}

/// What is to be said of changes that are larger than the weights they change.
fn too_large(shares: &BTreeMap<String, f64>) -> Option<String> {
    let count = shares.values().filter(|share| **share > TOO_LARGE).count();
    let (module, share) = shares.iter().filter(|(_, share)| **share > TOO_LARGE).max_by(|a, b| a.1.total_cmp(b.1))?;
    Some(format!(
        "the change is larger than the weight itself in {count} modules, {share:.1} times in {module}: far more than fine-tuning does; \
         train with a lower learning rate, or give the adapter a lower weight (retune combine)"
    ))
}

/// For each row of a soft prompt the token whose row of the table points in the most similar direction, and the cosine between them.
///
/// # Errors
/// A table that cannot be read.
pub fn nearest_tokens(base: &Checkpoint, rows: &[f32]) -> Result<Vec<(u32, f64)>> {
    const PANEL: usize = 256;
    let hidden = base.spec.hidden_size;
    let table = base.tensor(&format!("{}.weight", base.spec.table.name))?;
    let rows: Vec<&[f32]> = rows.chunks_exact(hidden).collect();
    let norms: Vec<f64> = rows.iter().map(|row| norm(row)).collect();
    let nothing = || vec![(0, f64::NEG_INFINITY); rows.len()];
    // Of tokens that are equally near the first counts, whatever the number of threads.
    let nearer = |a: (u32, f64), b: (u32, f64)| if b.1 > a.1 || b.1 == a.1 && b.0 < a.0 { b } else { a };
    let merge = |a: Vec<(u32, f64)>, b: Vec<(u32, f64)>| a.into_iter().zip(b).map(|(a, b)| nearer(a, b)).collect();
    let panels = (0..table.rows().div_ceil(PANEL)).into_par_iter().map(|panel| {
        let range = panel * PANEL..((panel + 1) * PANEL).min(table.rows());
        let mut values = vec![0.0; range.len() * hidden];
        table.panel_f32(range.clone(), 0..hidden, &mut values);
        let mut best = nothing();
        for (id, token) in range.zip(values.chunks_exact(hidden)) {
            let length = norm(token);
            for ((best, row), norm) in best.iter_mut().zip(&rows).zip(&norms) {
                let dot: f64 = row.iter().zip(token).map(|(a, b)| f64::from(a * b)).sum();
                let cosine = if dot == 0.0 { 0.0 } else { dot / (length * norm) };
                *best = nearer(*best, (id as u32, cosine));
            }
        }
        best
    });
    Ok(panels.reduce(nothing, merge))
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// The norm of the weight that a change is for; none where the base has no such weight. A tied head is the embedding table.
fn weight_norm(base: &Checkpoint, module: &str, delta: &LoraDelta) -> Option<f64> {
    let linear = base.spec.linears().find(|linear| linear.name == module)?;
    if [linear.rows, linear.cols] != [delta.out_features, delta.in_features] {
        return None;
    }
    Some(norm(&base.weight_of(linear).ok()?.to_f32()))
}
