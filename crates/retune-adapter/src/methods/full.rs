//! Full fine-tuning: every tensor of the model is trained in its place.

use retune_engine::model::{LinearId, VectorId};
use retune_engine::overlay::Overlay;
use retune_engine::spec::{ModelSpec, Module};

use crate::error::Error;
use crate::method::Method;

/// Full fine-tuning. It has no settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Full;

impl Method for Full {
    fn lower(&self, spec: &ModelSpec) -> Result<Overlay, Error> {
        let mut overlay = Overlay::of_sizes(spec.linears().count(), spec.vectors().len());
        let (mut linear, mut vector) = (0, 0);
        for module in spec.modules() {
            for (name, shape) in module.tensors() {
                if shape.len() == 1 {
                    overlay.vectors[VectorId(vector).0] = Some(overlay.layout.add(name.clone(), shape, Some(name)));
                    vector += 1;
                    continue;
                }
                let range = match module {
                    Module::Linear(of) if of.transposed => {
                        overlay.layout.add_transposed(name.clone(), shape, Some(name))
                    }
                    _ => overlay.layout.add(name.clone(), shape, Some(name)),
                };
                match module {
                    Module::Linear(_) => {
                        overlay.linears[LinearId(linear).0].weight = Some(range);
                        linear += 1;
                    }
                    _ if module.name() == spec.table.name => overlay.table = Some(range),
                    _ => overlay.positions = Some(range),
                }
            }
        }
        if spec.head.tied {
            // One place with two users, both adding to its gradient.
            overlay.linears[linear].weight = overlay.table.clone();
        }
        Ok(overlay)
    }

    fn initialise(&self, _: &ModelSpec, _: &Overlay, _: u64, _: &mut [f32]) {}
}
