//! From token ids to the first hidden states, and back to the gradients of the tables.

use retune_kernels::{F32Panel, embedding, vector};

use crate::linear::Weight;
use crate::profile::{Operation, span};
use crate::run::Run;
use crate::workspace::Temporary;

impl<'a> Run<'a> {
    fn table(&self) -> Weight<'a> {
        match &self.overlay.table {
            Some(range) => Weight::Trained(F32Panel::new(&self.params[range.clone()], self.model.table.cols())),
            None => Weight::Frozen(&self.model.table),
        }
    }

    fn positions(&self) -> Option<Weight<'a>> {
        let matrix = self.model.positions.as_ref()?;
        Some(match &self.overlay.positions {
            Some(range) => Weight::Trained(F32Panel::new(&self.params[range.clone()], matrix.cols())),
            None => Weight::Frozen(matrix),
        })
    }

    /// Writes the pass's rows of the table, scaled, and those of virtual tokens, both with positions, to `x: [T, D]`.
    fn look_up(&self, x: &mut [f32], scratch: &mut [f32]) {
        let spec = &self.model.spec;
        embedding::forward(self.table().panel(), 0, &self.pass.ids, x);
        if spec.table.scale != 1.0 {
            vector::scale(x, spec.table.scale);
        }
        if let Some(tokens) = &self.overlay.virtual_tokens {
            let rows = F32Panel::new(&self.params[tokens.rows.clone()], spec.hidden_size);
            embedding::forward(&rows, spec.vocab_size, &self.pass.ids, x);
        }
        if let Some(positions) = self.positions() {
            embedding::forward(positions.panel(), 0, &self.pass.positions, scratch);
            vector::add(x, scratch);
        }
    }

    /// Writes the first hidden states, `x: [T, D]`.
    pub(crate) fn embed(&self, x: &mut [f32], t: &mut Temporary) {
        let _span = span(Operation::Embedding);
        let scratch = &mut t.norm[..x.len()];
        match &self.model.table_norm {
            None => self.look_up(x, scratch),
            Some(norm) => {
                self.look_up(scratch, x);
                norm.forward(*self, scratch, x);
            }
        }
    }

    /// Adds the gradients of the tables, their norm and virtual tokens to `grads`, for the gradient of the first hidden states in `t.dx`.
    pub(crate) fn embed_backward(&self, grads: &mut [f32], t: &mut Temporary) {
        if !self.overlay.trains_embedding(self.model) {
            return;
        }
        let _span = span(Operation::Embedding);
        let d = self.model.spec.hidden_size;
        let len = self.pass.tokens() * d;
        let Temporary { norm: scratch, dx, dnorm, .. } = t;
        let (scratch, mut dx) = (&mut scratch[..len], &mut dx[..len]);
        if let Some(norm) = &self.model.table_norm {
            let before = &mut dnorm[..len];
            // The rows once more, then the gradient of them in the place of the gradient of what was normalised.
            let mut spare = vec![0.0; if self.model.positions.is_some() { len } else { 0 }];
            self.look_up(before, &mut spare);
            scratch.fill(0.0);
            norm.backward(*self, before, dx, scratch, grads);
            dx = scratch;
        }
        if let Some(range) = &self.overlay.positions {
            embedding::backward(0, &self.pass.positions, dx, d, &mut grads[range.clone()]);
        }
        if let Some(tokens) = &self.overlay.virtual_tokens {
            embedding::backward(self.model.spec.vocab_size, &self.pass.ids, dx, d, &mut grads[tokens.rows.clone()]);
        }
        if let Some(range) = &self.overlay.table {
            let scale = self.model.spec.table.scale;
            if scale != 1.0 {
                vector::scale(dx, scale);
            }
            embedding::backward(0, &self.pass.ids, dx, d, &mut grads[range.clone()]);
        }
    }
}
