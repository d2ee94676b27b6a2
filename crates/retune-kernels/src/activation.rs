//! Elementwise activations.

/// An activation function, by what transformers computes under its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    GeluTanh,
    /// `x · Φ(x)`.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}
