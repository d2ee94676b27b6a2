//! In what arithmetic a model is computed: which linears in 8 bits, beside the model and not inside it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use retune_kernels::int8::Int8Matrix;

use crate::model::{Linear, LinearId, Model};

/// The arithmetic of a run. The default computes everything in f32.
#[derive(Default)]
pub struct Compute {
    /// By [`LinearId`]: the weight in 8 bits where products are computed with that; shorter than the model's linears where none is.
    pub(crate) int8: Vec<Option<Arc<Int8Matrix>>>,
    /// Who sees what linears read and the gradients of what they write.
    pub(crate) watch: Option<Mutex<Box<dyn Watch>>>,
}

/// Sees each linear's input and the gradient of its output, for measuring.
pub trait Watch: Send {
    /// The input `x: [T, in]`.
    fn input(&mut self, id: LinearId, linear: &Linear, x: &[f32]);

    /// The gradient of the output: rows of `out` elements that start `row` elements apart.
    fn gradient(&mut self, id: LinearId, linear: &Linear, g: &[f32], row: usize);
}

impl Compute {
    /// Everything in f32, with somebody who watches.
    pub fn watched(watch: Box<dyn Watch>) -> Self {
        Self { int8: Vec::new(), watch: Some(Mutex::new(watch)) }
    }

    /// The weight of a linear in 8 bits, where it is computed with that.
    pub fn int8(&self, linear: LinearId) -> Option<&Int8Matrix> {
        self.int8.get(linear.0)?.as_deref()
    }

    /// Whether any linear is computed in 8 bits.
    pub fn uses_int8(&self) -> bool {
        self.int8.iter().any(Option::is_some)
    }

    /// Whether the head is computed in 8 bits.
    pub(crate) fn head_in_int8(&self, model: &Model) -> bool {
        self.int8(model.head).is_some()
    }

    pub(crate) fn watch(&self) -> Option<MutexGuard<'_, Box<dyn Watch>>> {
        // A watcher that panicked has ended the run already.
        self.watch.as_ref().map(|watch| watch.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
