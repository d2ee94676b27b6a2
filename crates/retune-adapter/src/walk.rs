//! The walk over a model by which every method lays out what it trains.

use retune_engine::model::LinearId;
use retune_engine::overlay::Overlay;
use retune_engine::spec::{Linear, ModelSpec, Module};

use crate::config::config_error;
use crate::error::Error;
use crate::names;
use crate::selection::Selection;

/// The modules that are trained and saved whole.
pub(crate) struct Saved(Vec<String>);

impl Saved {
    /// Those of a selection.
    ///
    /// # Errors
    /// An entry that matches nothing; a head that is tied to the table.
    pub fn of(selection: &Selection<'_>, spec: &ModelSpec) -> Result<Self, Error> {
        let head = &spec.head.linear;
        let mut modules = spec.modules();
        if spec.head.tied {
            modules.push(Module::Linear(head));
        }
        let names: Vec<&str> = modules.iter().map(Module::name).collect();
        let saved = selection.resolve_modules_to_save(&names)?;
        if spec.head.tied && saved.contains(&head.name) {
            return Err(Error::TiedHeadSaved { head: head.name.clone() });
        }
        if saved.contains(&spec.table.name) {
            check_table("modules_to_save", spec)?;
        }
        Ok(Self(saved))
    }

    /// The key of a module's tensor, where the module is saved.
    pub fn key(&self, module: &str, tensor: &str) -> Option<String> {
        let is_bias = tensor.ends_with(".bias");
        let key = || if is_bias { names::saved_bias(module) } else { names::saved_weight(module) };
        self.0.iter().any(|name| name == module).then(key)
    }
}

/// Refuses an adapter on the table where PEFT's has no effect.
///
/// # Errors
/// A model with an encoder; `field` names the table.
pub(crate) fn check_table(field: &'static str, spec: &ModelSpec) -> Result<(), Error> {
    match &spec.encoder {
        None => Ok(()),
        Some(_) => config_error(
            field,
            format!(
                "in transformers the encoder and the decoder read copies of `{}`, so that what PEFT lays on it has no effect; leave it out",
                spec.table.name
            ),
        ),
    }
}

/// Goes through the modules in the order of the forward. `key` says under which name a tensor of a module is trained in the base's place, if it
/// is; `add` then adds what the method lays on a linear. A head that is tied to the table has no tensor of its own.
pub(crate) fn walk(
    spec: &ModelSpec,
    key: impl Fn(&str, &str) -> Option<String>,
    mut add: impl FnMut(&mut Overlay, LinearId, &Linear),
) -> Overlay {
    let mut overlay = Overlay::of_sizes(spec.linears().count(), spec.vectors().len());
    let (mut linear, mut vector) = (0, 0);
    for module in spec.modules() {
        for (tensor, shape) in module.tensors() {
            let is_matrix = module.is_matrix(&shape);
            if let Some(key) = key(module.name(), &tensor) {
                let is_transposed = matches!(module, Module::Linear(of) if of.transposed && is_matrix);
                let range = match is_transposed {
                    true => overlay.layout.add_transposed(key, shape, Some(tensor)),
                    false => overlay.layout.add(key, shape, Some(tensor)),
                };
                match module {
                    _ if !is_matrix => overlay.vectors[vector] = Some(range),
                    Module::Linear(_) => overlay.linears[linear].weight = Some(range),
                    _ if module.name() == spec.table.name => overlay.table = Some(range),
                    _ => overlay.positions = Some(range),
                }
            }
            vector += usize::from(!is_matrix);
        }
        if let Module::Linear(of) = module {
            add(&mut overlay, LinearId(linear), of);
            linear += 1;
        }
    }
    if spec.head.tied {
        add(&mut overlay, LinearId(linear), &spec.head.linear);
    }
    overlay
}

/// Lets a head that is tied to the table be trained with it: one place with two users, both adding to its gradient.
pub(crate) fn tie_head(overlay: &mut Overlay, spec: &ModelSpec) {
    if spec.head.tied {
        let table = overlay.table.clone();
        overlay.linears.last_mut().into_iter().for_each(|head| head.weight.clone_from(&table));
    }
}
