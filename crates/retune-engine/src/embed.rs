//! From token ids to the first hidden states, and back to the gradients of the tables.

use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use retune_kernels::{F32Panel, embedding, vector};

use crate::linear::Weight;
use crate::overlay::{Overlay, TableTerm, TokenRows};
use crate::profile::{Operation, span};
use crate::row_norms::Norms;
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
        if let Some(rows) = &self.overlay.table_rows {
            self.replace_rows(rows, x);
        }
        if let Some(term) = &self.overlay.table_term {
            self.add_term(term, self.norms.of_table(), &self.pass.ids, x);
        }
        if spec.table.scale != 1.0 {
            vector::scale(x, spec.table.scale);
        }
        if let Some(tokens) = &self.overlay.virtual_tokens {
            let rows = F32Panel::new(&self.params[tokens.rows.clone()], spec.hidden_size);
            embedding::forward(&rows, spec.vocab_size, &self.pass.ids, x);
        }
        if let Some(positions) = self.positions() {
            embedding::forward(positions.panel(), 0, &self.pass.positions, scratch);
            if let Some(term) = &self.overlay.positions_term {
                self.add_term(term, self.norms.of_positions(), &self.pass.positions, scratch);
            }
            vector::add(x, scratch);
        }
    }

    /// Puts trained rows in the place of the base's.
    fn replace_rows(&self, rows: &TokenRows, x: &mut [f32]) {
        let d = self.model.spec.hidden_size;
        let trained = &self.params[rows.rows.clone()];
        for (id, x) in self.pass.ids.iter().zip(x.chunks_exact_mut(d)) {
            if let Some(k) = rows.ids.iter().position(|of| of == id) {
                x.copy_from_slice(&trained[k * d..(k + 1) * d]);
            }
        }
    }

    /// The rows of A that a term looks up, `[T, r]`; zeros for tokens that the table does not have.
    fn term_rows(&self, term: &TableTerm, ids: &[u32]) -> Vec<f32> {
        let mut rows = vec![0.0; ids.len() * term.r];
        embedding::forward(&F32Panel::new(&self.params[term.a.clone()], term.r), 0, ids, &mut rows);
        rows
    }

    /// Adds a table's low-rank term to what was looked up in it, and multiplies that by what its magnitudes say.
    fn add_term(&self, term: &TableTerm, norms: Option<&Norms>, ids: &[u32], x: &mut [f32]) {
        self.add_product(term, ids, x);
        if let Some(norms) = norms.filter(|_| term.magnitudes.is_some()) {
            scale_columns(x, &norms.factors);
        }
    }

    /// Adds the product of a table's low-rank term.
    fn add_product(&self, term: &TableTerm, ids: &[u32], x: &mut [f32]) {
        let (rows, d, r) = (self.term_rows(term, ids), self.model.spec.hidden_size, term.r);
        let b = Rhs::View(MatRef::rows(&self.params[term.b.clone()], r).t());
        gemm(ids.len(), d, &[Term::scaled(r, MatRef::rows(&rows, r), b, term.scale)], Out::add(x, d));
    }

    /// Adds the gradients of a table's low-rank term and of its magnitudes.
    fn term_backward(
        &self,
        (table, term, norms): (Weight, &TableTerm, Option<&Norms>),
        ids: &[u32],
        dx: &[f32],
        grads: &mut [f32],
    ) {
        let (rows, d, r) = (self.term_rows(term, ids), self.model.spec.hidden_size, term.r);
        let tokens = ids.len();
        let mut unscaled = Vec::new();
        let mut dx = dx;
        if let (Some(magnitudes), Some(norms)) = (&term.magnitudes, norms) {
            // What was looked up once more, and then the gradient of it in its place.
            unscaled.resize(tokens * d, 0.0);
            embedding::forward(table.panel(), 0, ids, &mut unscaled);
            self.add_product(term, ids, &mut unscaled);
            let grads = &mut grads[magnitudes.clone()];
            for (row, dx) in unscaled.chunks_exact_mut(d).zip(dx.chunks_exact(d)) {
                for (j, (value, dx)) in row.iter_mut().zip(dx).enumerate() {
                    grads[j] += dx * *value * norms.inverse[j];
                    *value = dx * norms.factors[j];
                }
            }
            dx = &unscaled;
        }
        let b = Term::scaled(tokens, MatRef::rows(dx, d).t(), Rhs::View(MatRef::rows(&rows, r)), term.scale);
        gemm(d, r, &[b], Out::add(&mut grads[term.b.clone()], r));
        let mut of_rows = vec![0.0; tokens * r];
        let b = Rhs::View(MatRef::rows(&self.params[term.b.clone()], r));
        gemm(tokens, r, &[Term::scaled(d, MatRef::rows(dx, d), b, term.scale)], Out::set(&mut of_rows, r));
        embedding::backward(0, ids, &of_rows, r, &mut grads[term.a.clone()]);
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
        if let (Some(term), Some(table)) = (&self.overlay.positions_term, self.positions()) {
            self.term_backward((table, term, self.norms.of_positions()), &self.pass.positions, dx, grads);
        }
        if let Some(tokens) = &self.overlay.virtual_tokens {
            embedding::backward(self.model.spec.vocab_size, &self.pass.ids, dx, d, &mut grads[tokens.rows.clone()]);
        }
        let Overlay { table, table_rows, table_term, .. } = self.overlay;
        let scale = self.model.spec.table.scale;
        if scale != 1.0 && (table.is_some() || table_rows.is_some() || table_term.is_some()) {
            vector::scale(dx, scale);
        }
        if let Some(range) = table {
            embedding::backward(0, &self.pass.ids, dx, d, &mut grads[range.clone()]);
        }
        if let Some(rows) = table_rows {
            let grads = &mut grads[rows.rows.clone()];
            for (id, dx) in self.pass.ids.iter().zip(dx.chunks_exact(d)) {
                if let Some(k) = rows.ids.iter().position(|of| of == id) {
                    vector::add(&mut grads[k * d..(k + 1) * d], dx);
                }
            }
        }
        if let Some(term) = table_term {
            self.term_backward((self.table(), term, self.norms.of_table()), &self.pass.ids, dx, grads);
        }
    }
}

/// Multiplies each row of `x` by factors.
fn scale_columns(x: &mut [f32], factors: &[f32]) {
    for row in x.chunks_exact_mut(factors.len()) {
        row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
    }
}
