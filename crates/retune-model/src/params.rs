//! The flat parameter vector: everything trainable lives in one contiguous f32 buffer, and its gradient in another of the same layout.

use std::ops::Range;

use retune_kernels::{F32Panel, PanelSource};
use retune_quant::Matrix;

/// One named tensor of the flat vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// The key under which it is saved: PEFT's for an adapter, transformers' for a whole model.
    pub name: String,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
    /// Whether weight decay applies: to matrices, not to norm weights and biases.
    pub decay: bool,
}

/// The names and places of all trainable tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParamLayout {
    params: Vec<Param>,
    len: usize,
}

impl ParamLayout {
    /// Appends a tensor and returns its place.
    pub fn add(&mut self, name: String, shape: Vec<usize>) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        let decay = shape.len() > 1;
        self.params.push(Param { name, shape, range: range.clone(), decay });
        range
    }

    /// The tensors, in the order of their places.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// Number of trainable parameters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is trainable.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tensor that holds the element `index`.
    pub fn at(&self, index: usize) -> Option<&Param> {
        self.params.iter().find(|p| p.range.contains(&index))
    }
}

/// A matrix of the model: frozen in its storage, or a place in the flat vector. A tied matrix is the same weight used twice.
#[derive(Clone)]
pub enum Weight {
    Frozen(Matrix),
    Trainable { range: Range<usize>, cols: usize },
}

impl Weight {
    /// The matrix as kernels read it.
    pub fn source<'a>(&'a self, params: &'a [f32]) -> WeightSource<'a> {
        match self {
            Weight::Frozen(matrix) => WeightSource::Frozen(matrix),
            Weight::Trainable { range, cols } => WeightSource::Trainable(F32Panel::new(&params[range.clone()], *cols)),
        }
    }

    /// Its place in the flat vector, where it is trained.
    pub fn range(&self) -> Option<Range<usize>> {
        match self {
            Weight::Frozen(_) => None,
            Weight::Trainable { range, .. } => Some(range.clone()),
        }
    }
}

/// A weight with the parameters it may live in.
pub enum WeightSource<'a> {
    Frozen(&'a Matrix),
    Trainable(F32Panel<'a>),
}

impl WeightSource<'_> {
    /// The matrix behind the interface that kernels take.
    pub fn panel(&self) -> &dyn PanelSource {
        match self {
            WeightSource::Frozen(matrix) => *matrix,
            WeightSource::Trainable(panel) => panel,
        }
    }
}

/// A vector of the model (norm weight or bias), decoded, or a place in the flat vector.
#[derive(Clone)]
pub enum Vector {
    Frozen(Vec<f32>),
    Trainable(Range<usize>),
}

impl Vector {
    /// Its values.
    pub fn values<'a>(&'a self, params: &'a [f32]) -> &'a [f32] {
        match self {
            Vector::Frozen(values) => values,
            Vector::Trainable(range) => &params[range.clone()],
        }
    }

    /// Its gradient, where it is trained.
    pub fn gradient<'a>(&self, grads: &'a mut [f32]) -> Option<&'a mut [f32]> {
        match self {
            Vector::Frozen(_) => None,
            Vector::Trainable(range) => Some(&mut grads[range.clone()]),
        }
    }

    /// Whether it is trained.
    pub fn is_trainable(&self) -> bool {
        matches!(self, Vector::Trainable(_))
    }
}
