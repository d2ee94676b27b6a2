//! From a checkpoint to the engine's model.

use retune_engine::model::{Model, Weights};
use retune_quant::Matrix;

use crate::checkpoint::Checkpoint;
use crate::error::Error;

impl Weights for Checkpoint {
    type Error = Error;

    fn tensor(&self, name: &str) -> Result<Matrix, Error> {
        Checkpoint::tensor(self, name)
    }
}

impl Checkpoint {
    /// The model in memory. Matrices stay in the files, which are mapped.
    ///
    /// # Errors
    /// A tensor that is missing or cannot be read.
    pub fn model(&self) -> Result<Model, Error> {
        Model::load(self.spec.clone(), self)
    }
}
