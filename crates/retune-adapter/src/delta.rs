//! The low-rank changes that an adapter makes to weights, module by module: what is left of it when its configuration has been read.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use retune_engine::overlay::{Change, LowRank, OutputScale, Overlay};
use retune_engine::spec::{Linear, ModelSpec};

use crate::config::{LoraConfig, ModuleSelection};
use crate::error::Error;
use crate::files::{AdapterFile, Tensors};
use crate::names::{self, Key, Part};
use crate::targets::{BaseModules, LinearModule, select};

/// The change `scale · B·A` of one weight, `[out_features, in_features]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraDelta {
    pub r: usize,
    pub in_features: usize,
    pub out_features: usize,
    /// alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub scale: f32,
    /// A, `[r, in_features]`, row-major.
    pub a: Vec<f32>,
    /// B, `[out_features, r]`, row-major.
    pub b: Vec<f32>,
}

/// The changes by the names of their modules.
pub type Deltas = BTreeMap<String, LoraDelta>;

/// The changes that the A and B of an adapter's file make under its configuration. Whatever else the file holds is passed over.
///
/// # Errors
/// A or B without the other, of another shape or rank than the rest says, with values that are not finite, or on a module that the
/// configuration does not select; patterns that do not compile.
pub fn deltas(config: &LoraConfig, tensors: &Tensors) -> Result<Deltas, Error> {
    let mut deltas = Deltas::new();
    for (key, (shape, a)) in tensors {
        let Key::Part(module, Part::LoraA) = names::parse(key) else { continue };
        let key_b = names::lora_b(&module);
        let Some((shape_b, b)) = tensors.get(&key_b) else { return Err(Error::TensorMissing { name: key_b }) };
        let [r, in_features] = matrix(key, shape, a)?;
        let [out_features, columns] = matrix(&key_b, shape_b, b)?;
        if columns != r {
            return Err(rank_mismatch(key_b, shape_b, vec![out_features, r]));
        }
        let (a, b) = (a.clone(), b.clone());
        deltas.insert(module, LoraDelta { r, in_features, out_features, scale: 1.0, a, b });
    }
    for key in tensors.keys() {
        if let Key::Part(module, Part::LoraB) = names::parse(key)
            && !deltas.contains_key(&module)
        {
            return Err(Error::TensorMissing { name: names::lora_a(&module) });
        }
    }
    if deltas.is_empty() {
        return Ok(deltas);
    }
    let targets = select(config, &modules(&deltas))?;
    for (module, delta) in &mut deltas {
        let Some(target) = targets.iter().find(|target| target.module == *module) else {
            let advice = "target_modules does not name them; save the adapter again";
            return Err(Error::UnexpectedTensors { keys: format!("`{}`", names::lora_a(module)), advice });
        };
        if target.r != delta.r {
            let shape = [delta.r, delta.in_features];
            return Err(rank_mismatch(names::lora_a(module), &shape, vec![target.r, delta.in_features]));
        }
        delta.scale = target.scaling;
    }
    Ok(deltas)
}

/// The modules that are changed, as far as the changes tell.
pub fn modules(deltas: &Deltas) -> BaseModules<'_> {
    let linears = deltas.iter().map(|(name, delta)| LinearModule {
        name,
        in_features: delta.in_features,
        out_features: delta.out_features,
        has_bias: false,
        is_output_head: false,
        is_table: false,
        is_transposed: false,
    });
    BaseModules { linears: linears.collect(), ..BaseModules::default() }
}

/// The changes of the linears under an overlay that consists of low-rank terms alone.
///
/// # Errors
/// What [`refuse_beside_weights`] refuses; a scale of what a linear reads or writes.
pub fn low_rank(spec: &ModelSpec, overlay: &Overlay, params: &[f32]) -> Result<Deltas, Error> {
    refuse_beside_weights(spec, overlay)?;
    let mut deltas = Deltas::new();
    for (linear, change) in spec.linears().zip(&overlay.linears).filter(|(_, change)| !change.is_empty()) {
        let Some(delta) = LoraDelta::of_terms(linear, change, params) else {
            return Err(Error::NotLowRank { what: format!("factors on what {} reads or writes", linear.name) });
        };
        deltas.insert(linear.name.clone(), delta);
    }
    Ok(deltas)
}

/// The changes that an adapter makes to a base, which must be low-rank and all that it does.
///
/// # Errors
/// What [`low_rank`] refuses; what has no place in a plain LoRA.
pub fn of_adapter(file: &AdapterFile, spec: &ModelSpec, overlay: &Overlay, params: &[f32]) -> Result<Deltas, Error> {
    match file.method.lora().filter(|config| !config.use_dora) {
        Some(config) => {
            refuse_beside_weights(spec, overlay)?;
            deltas(config, &file.tensors)
        }
        None => low_rank(spec, overlay, params),
    }
}

/// Refuses an overlay that does more than change the weights of linears by what stands beside them.
///
/// # Errors
/// [`Error::NotLowRank`] says what it is.
pub fn refuse_beside_weights(spec: &ModelSpec, overlay: &Overlay) -> Result<(), Error> {
    // By name, so that whoever adds something to an overlay decides here.
    let Overlay {
        layout,
        table,
        positions: _,
        table_rows,
        head_rows,
        table_term,
        positions_term,
        linears,
        vectors: _,
        virtual_tokens,
        prefix,
    } = overlay;
    let refused = |what: String| Err(Error::NotLowRank { what });
    if virtual_tokens.is_some() || prefix.is_some() {
        return refused("a soft prompt or a prefix, which changes no weight".to_owned());
    }
    if table_term.is_some() || positions_term.is_some() {
        let table = if table_term.is_some() {
            &spec.table.name
        } else {
            spec.table.positions.as_ref().unwrap_or(&spec.table.name)
        };
        return refused(format!("a change of {table}, which is a table of rows and no linear"));
    }
    if table_rows.is_some() || head_rows.is_some() {
        let table = if table_rows.is_some() { &spec.table.name } else { &spec.head.linear.name };
        return refused(format!("rows of {table} that were trained in the base's place (trainable_token_indices)"));
    }
    let is_linear = |range: &Range<usize>| {
        table.as_ref() != Some(range) && linears.iter().any(|change| change.weight.as_ref() == Some(range))
    };
    let whole = layout.params().iter().find(|param| param.base.is_some() && !is_linear(&param.range));
    if let Some(tensor) = whole.and_then(|param| param.base.as_ref()) {
        return refused(format!("{tensor}, which was trained in the base's place and is no weight of a linear"));
    }
    let scales_bias =
        |linear: &Linear, change: &Change| linear.bias && matches!(change.output_scale, Some(OutputScale::Plain(_)));
    let beside_weight = spec.linears().zip(linears).find_map(|(linear, change)| {
        let name = &linear.name;
        let factors = || scales_bias(linear, change).then(|| format!("factors on the bias of {name}"));
        change.offset.as_ref().map(|_| format!("a bias beside {name}")).or_else(factors)
    });
    beside_weight.map_or(Ok(()), refused)
}

/// The configuration and the tensors of a LoRA adapter that makes these changes, all of rank `r` and scale 1: programs that serve adapters
/// take one rank and one scale for all modules.
pub fn plain_lora(r: usize, deltas: &Deltas, target_modules: Vec<String>) -> (LoraConfig, Tensors) {
    let config = LoraConfig {
        r,
        lora_alpha: r as f64,
        target_modules: ModuleSelection::List(target_modules),
        ..LoraConfig::default()
    };
    let mut tensors = Tensors::new();
    for (module, delta) in deltas {
        tensors.insert(names::lora_a(module), (vec![delta.r, delta.in_features], delta.a.clone()));
        tensors.insert(names::lora_b(module), (vec![delta.out_features, delta.r], delta.b.clone()));
    }
    (config, tensors)
}

fn matrix(name: &str, shape: &[usize], values: &[f32]) -> Result<[usize; 2], Error> {
    let [rows, cols] = match *shape {
        [rows, cols] if rows > 0 && cols > 0 => [rows, cols],
        _ => {
            let advice = "A and B of a linear module are matrices, and this one is none; save the adapter again";
            return Err(Error::UnexpectedTensors { keys: format!("`{name}` of shape {shape:?}"), advice });
        }
    };
    if rows.checked_mul(cols) != Some(values.len()) {
        return Err(Error::Length { name: name.to_owned(), shape: shape.to_vec(), found: values.len() });
    }
    match values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        Some((index, &value)) => Err(Error::NotFinite { name: name.to_owned(), index, value }),
        None => Ok([rows, cols]),
    }
}

fn rank_mismatch(name: String, found: &[usize], expected: Vec<usize>) -> Error {
    let advice = "The two files of the adapter do not agree about its rank: save it again".to_owned();
    Error::Shape { name, found: found.to_vec(), expected, advice }
}

impl LoraDelta {
    /// The low-rank terms of a change as one of scale 1: A's one below the other, and B's side by side, each with its scale. `None` where
    /// there is more than such terms.
    pub fn of_terms(linear: &Linear, change: &Change, params: &[f32]) -> Option<Self> {
        let Change { weight: None, low_rank, input_scale: None, output_scale: None, offset: None } = change else {
            return None;
        };
        let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
        for term in low_rank {
            all_a.extend_from_slice(&term.a.values(params));
        }
        let values: Vec<Cow<[f32]>> = low_rank.iter().map(|term| term.b.values(params)).collect();
        for row in 0..linear.rows {
            // Dropout belongs to training.
            for (LowRank { a: _, b: _, r, scale, dropout: _, key: _ }, b) in low_rank.iter().zip(&values) {
                let values = &b[row * r..(row + 1) * r];
                all_b.extend(values.iter().map(|value| scale * value));
            }
        }
        Some(Self {
            r: change.rank(),
            in_features: linear.cols,
            out_features: linear.rows,
            scale: 1.0,
            a: all_a,
            b: all_b,
        })
    }

    /// The same change with a scale of 1.
    pub fn unscaled(mut self) -> Self {
        self.b.iter_mut().for_each(|value| *value *= self.scale);
        self.scale = 1.0;
        self
    }

    /// The same change at a rank that is not lower: the new rows of A and columns of B are zero.
    pub fn padded(self, r: usize) -> Self {
        let Self { in_features, out_features, scale, .. } = self;
        let mut a = self.a;
        a.resize(r * in_features, 0.0);
        let mut b = vec![0.0; out_features * r];
        for (to, from) in b.chunks_exact_mut(r.max(1)).zip(self.b.chunks_exact(self.r.max(1))) {
            to[..from.len()].copy_from_slice(from);
        }
        Self { r, in_features, out_features, scale, a, b }
    }

    /// The Frobenius norm of the difference to another change of the same weight.
    pub fn distance(&self, other: &Self) -> f64 {
        let r = self.r + other.r;
        let rows = self.b.chunks_exact(self.r.max(1)).zip(other.b.chunks_exact(other.r.max(1)));
        let b = rows.flat_map(|(ours, theirs)| {
            let theirs = theirs.iter().map(|value| -other.scale * value);
            ours.iter().map(|value| self.scale * value).chain(theirs)
        });
        Self { r, scale: 1.0, a: [&self.a[..], &other.a].concat(), b: b.collect(), ..*self }.norm()
    }

    /// The Frobenius norm of the change, of which no `[out, in]` matrix is made: ‖BA‖² is the sum of (BᵀB)∘(AAᵀ).
    pub fn norm(&self) -> f64 {
        let Self { r, in_features, out_features, ref a, ref b, scale } = *self;
        let mut sum = 0.0;
        for i in 0..r {
            for j in 0..=i {
                let aa: f64 = (0..in_features).map(|k| product(a[i * in_features + k], a[j * in_features + k])).sum();
                let bb: f64 = (0..out_features).map(|k| product(b[k * r + i], b[k * r + j])).sum();
                sum += if i == j { aa * bb } else { 2.0 * aa * bb };
            }
        }
        // Rounding can make the sum for a change of zero negative.
        f64::from(scale.abs()) * sum.max(0.0).sqrt()
    }

    /// The change itself, `[out_features, in_features]`.
    pub fn dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0f64; self.out_features * self.in_features];
        for (row, b) in dense.chunks_exact_mut(self.in_features.max(1)).zip(self.b.chunks_exact(self.r.max(1))) {
            for (&b, a) in b.iter().zip(self.a.chunks_exact(self.in_features.max(1))) {
                row.iter_mut().zip(a).for_each(|(sum, &a)| *sum += product(a, b));
            }
        }
        dense.into_iter().map(|sum| (f64::from(self.scale) * sum) as f32).collect()
    }
}

fn product(a: f32, b: f32) -> f64 {
    f64::from(a) * f64::from(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::{adapter, lora};
    use crate::test_model::tiny_llama;
    use serde_json::json;
    use std::sync::Arc;

    const Q0: &str = "model.layers.0.self_attn.q_proj";

    #[test]
    fn the_norm_is_that_of_the_product() {
        let file = adapter(json!({"target_modules": ["q_proj"], "r": 4, "lora_alpha": -6}), &tiny_llama());
        for delta in deltas(&lora(&file), &file.tensors).unwrap().values() {
            assert_eq!(delta.scale, -1.5);
            let dense: f64 = delta.dense().iter().map(|&v| product(v, v)).sum();
            assert!((delta.norm() - dense.sqrt()).abs() < 1e-6 * dense.sqrt());
        }
    }

    #[test]
    fn scales_and_ranks_are_those_of_the_patterns() {
        let config = json!({"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "use_rslora": true,
                            "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 12}});
        let file = adapter(config, &tiny_llama());
        let deltas = deltas(&lora(&file), &file.tensors).unwrap();
        assert_eq!((deltas[Q0].r, deltas[Q0].scale), (9, 4.0));
        let v = &deltas["model.layers.0.self_attn.v_proj"];
        assert_eq!((v.r, v.scale), (4, 4.0));
    }

    #[test]
    fn files_that_do_not_hold_together_are_refused() {
        let whole = adapter(json!({"target_modules": ["q_proj"], "r": 4}), &tiny_llama());
        let refused = |change: &dyn Fn(&mut crate::AdapterFile)| {
            let mut file = whole.clone();
            change(&mut file);
            deltas(&lora(&file), &file.tensors).unwrap_err().to_string()
        };
        let (a, b) = (names::lora_a(Q0), names::lora_b(Q0));
        assert!(refused(&|file| drop(file.tensors.remove(&a))).contains("lora_A"));
        assert!(refused(&|file| drop(file.tensors.remove(&b))).contains("lora_B"));
        assert!(refused(&|file| file.method = Arc::new(LoraConfig { r: 5, ..lora(file) })).contains("rank"));
        for shape in [vec![128], vec![0, 32], vec![4, 4, 8]] {
            assert!(refused(&|file| file.tensors.get_mut(&a).unwrap().0 = shape.clone()).contains("matrices"));
        }
        assert!(refused(&|file| file.tensors.get_mut(&a).unwrap().0 = vec![5, 32]).contains("holds 128 values"));
        assert!(refused(&|file| file.tensors.get_mut(&b).unwrap().1[3] = f32::NAN).contains("NaN"));
        let elsewhere = crate::ModuleSelection::List(vec!["1.self_attn.q_proj".to_owned()]);
        assert!(
            refused(&|file| {
                file.method = Arc::new(LoraConfig { target_modules: elsewhere.clone(), ..lora(file) });
            })
            .contains("target_modules")
        );
    }
}
