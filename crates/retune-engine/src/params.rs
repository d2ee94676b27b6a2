//! The flat parameter vector: everything trainable lies in one contiguous f32 buffer, and its gradient in another of the same layout.

use std::ops::Range;

/// One named tensor of the flat vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// The key under which it is saved.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    pub range: Range<usize>,
    /// Whether weight decay applies: to matrices, not to norm weights and biases.
    pub decay: bool,
    /// Factor on the learning rate.
    pub rate: f64,
    /// The base's tensor whose values it starts from, where it replaces one.
    pub base: Option<String>,
    /// Whether files hold the transpose of what lies in the flat vector.
    pub transposed: bool,
}

impl Param {
    /// Its values of `flat`, in the order in which files hold them.
    pub fn to_file(&self, flat: &[f32]) -> Vec<f32> {
        let values = &flat[self.range.clone()];
        match *self.shape {
            [rows, cols] if self.transposed => transpose(values, cols, rows),
            _ => values.to_vec(),
        }
    }

    /// Puts values in the order of files into `flat`.
    pub fn read_file(&self, values: &[f32], flat: &mut [f32]) {
        let to = &mut flat[self.range.clone()];
        match *self.shape {
            [rows, cols] if self.transposed => to.copy_from_slice(&transpose(values, rows, cols)),
            _ => to.copy_from_slice(values),
        }
    }
}

/// The transpose of `values: [rows, cols]`.
fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|j| (0..rows).map(move |i| values[i * cols + j])).collect()
}

/// The names and places of all trainable tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParamLayout {
    params: Vec<Param>,
    len: usize,
}

impl ParamLayout {
    /// Appends a tensor that files hold as it is, and returns its place.
    pub fn add(&mut self, name: String, shape: Vec<usize>, base: Option<String>) -> Range<usize> {
        self.push(name, shape, base, false)
    }

    /// Appends a tensor of whose values files hold the transpose, in the shape of files, and returns its place.
    pub fn add_transposed(&mut self, name: String, shape: Vec<usize>, base: Option<String>) -> Range<usize> {
        self.push(name, shape, base, true)
    }

    fn push(&mut self, name: String, shape: Vec<usize>, base: Option<String>, transposed: bool) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        let decay = shape.len() > 1;
        self.params.push(Param { name, shape, range: range.clone(), decay, rate: 1.0, base, transposed });
        range
    }

    /// Gives the tensors that `of` chooses another factor on the learning rate.
    pub fn set_rate(&mut self, rate: f64, of: impl Fn(&Param) -> bool) {
        self.params.iter_mut().filter(|param| of(param)).for_each(|param| param.rate = rate);
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

    /// The tensor of this name.
    pub fn find(&self, name: &str) -> Option<&Param> {
        self.params.iter().find(|p| p.name == name)
    }
}

/// Computes the flat vector that an overlay's places are in from another one, the latent one, which is what is trained.
pub trait Reparameterisation: Send + Sync {
    /// Names and places of the latent vector's tensors.
    fn layout(&self) -> &ParamLayout;

    /// Writes the flat vector, all of it.
    fn forward(&self, latent: &[f32], flat: &mut [f32]);

    /// Adds to `latent_gradient` what the flat vector's gradient makes of it.
    fn backward(&self, latent: &[f32], flat_gradient: &[f32], latent_gradient: &mut [f32]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_tensor_goes_out_and_comes_in_as_files_hold_it() {
        let mut layout = ParamLayout::default();
        layout.add("first".to_owned(), vec![2], None);
        layout.add_transposed("c_fc.weight".to_owned(), vec![2, 3], None);
        let flat = [9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let param = layout.find("c_fc.weight").unwrap();
        // [3, 2] in memory, [2, 3] in files.
        assert_eq!(param.to_file(&flat), [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
        let mut again = [9.0; 8];
        param.read_file(&param.to_file(&flat), &mut again);
        assert_eq!(again, flat);
    }
}
