//! How large an adapter's changes are: by themselves, and beside the weights of a base.

use std::collections::BTreeMap;

use retune_adapter::{Deltas, LoraDelta};
use retune_model::checkpoint::Checkpoint;
use serde_json::{Map, Value, json};

/// A change larger than the weight it changes is more than fine-tuning does.
const TOO_LARGE: f64 = 1.0;

/// Adds to each module of `modules` the norm of its change, and with a base that norm over its weight's. Returns what is to be said of
/// an adapter that does nothing, or too much.
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
    let mut large: Vec<(f64, &String)> = Vec::new();
    for (module, delta) in deltas {
        let Some(weight) = weight_norm(base, module, delta) else {
            missing.push(module.as_str());
            continue;
        };
        let share = norms[module] / weight;
        if let Some(entry) = modules.get_mut(module) {
            entry["change_over_weight"] = json!(share);
        }
        if share > TOO_LARGE {
            large.push((share, module));
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
    if let Some((share, module)) = large.iter().max_by(|a, b| a.0.total_cmp(&b.0)) {
        let count = large.len();
        notes.push(format!(
            "the change is larger than the weight itself in {count} modules, {share:.1} times in {module}: far more than fine-tuning \
             does; train with a lower learning rate, or give the adapter a lower weight (retune combine)"
        ));
    }
    notes
}

/// The norm of the weight that a change is for; none where the base has no such weight. A tied head is the embedding table.
fn weight_norm(base: &Checkpoint, module: &str, delta: &LoraDelta) -> Option<f64> {
    let spec = &base.spec;
    let is_tied_head = spec.head.tied && module == spec.head.linear.name;
    let linear = spec.linears().find(|linear| linear.name == module)?;
    if [linear.rows, linear.cols] != [delta.out_features, delta.in_features] {
        return None;
    }
    let name = if is_tied_head { &spec.table.name } else { &linear.name };
    let weight = base.tensor(&format!("{name}.weight")).ok()?.to_f32();
    Some(weight.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt())
}
