//! What tests of several crates share: the goldens and how they are read, small random numbers, and the measure of an error.
//!
//! `goldens/` makes the fixtures with transformers and peft. A fault in a fixture is a panic: nothing here is for programs.

pub mod hostile;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use retune_adapter::{AdapterFile, Full, Method, Texts, initial_params};
use retune_engine::compute::Compute;
use retune_engine::model::{LinearId, Model, Weights};
use retune_engine::overlay::Overlay;
use retune_engine::pass::{Pass, Prelude};
use retune_engine::row_norms::RowNorms;
use retune_engine::workspace::Workspace;
use retune_engine::{Run, Saving};
use retune_model::Error;
use retune_model::checkpoint::Checkpoint;
use retune_quant::Matrix;
use safetensors::{Dtype, SafeTensors};

/// Named tensors: shape and values.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The folder of all goldens.
pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../retune-model/tests/goldens")
}

/// What a reference computed: its inputs as integers, its results in f32.
pub struct Golden {
    pub integers: BTreeMap<String, Vec<i64>>,
    pub tensors: Tensors,
    /// What stands before each sequence.
    pub prelude: Prelude,
}

impl Golden {
    /// Reads `golden.safetensors` of a case's folder; nothing of an adapter stands before its sequences.
    pub fn read(case: &Path) -> Self {
        Self::read_file(&case.join("golden.safetensors"))
    }

    /// Reads such a file.
    pub fn read_file(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (mut integers, mut tensors) = (BTreeMap::new(), Tensors::new());
        for (name, tensor) in file.tensors() {
            match tensor.dtype() {
                Dtype::I64 => {
                    let values = tensor.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b));
                    integers.insert(name, values.collect());
                }
                _ => {
                    let values = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                    tensors.insert(name, (tensor.shape().to_vec(), values.collect()));
                }
            }
        }
        // What answers a source begins with T5's start.
        let decoder_start = integers.contains_key("source_ids").then_some(0);
        Self { integers, tensors, prelude: Prelude { decoder_start, ..Prelude::default() } }
    }

    /// The sequences as one pass, or each as a pass of its own.
    pub fn passes(&self, packed: bool) -> Vec<Pass> {
        let ids: Vec<u32> = self.integers["input_ids"].iter().map(|&id| id as u32).collect();
        let trained: Vec<bool> = self.integers["labels"].iter().map(|&l| l != -100).collect();
        let sources = self.rows("source_ids", "source_lengths");
        let (mut passes, mut start) = (vec![Pass::new(self.prelude.clone(), false)], 0);
        for (row, &length) in self.integers["sequence_lengths"].iter().enumerate() {
            let range = start..start + length as usize;
            start = range.end;
            if !packed && row > 0 {
                passes.push(Pass::new(self.prelude.clone(), false));
            }
            let source = sources.get(row).map_or(&[][..], |source| source);
            passes.last_mut().unwrap().push_answer(row as u64, source, &ids[range.clone()], &trained[range]);
        }
        passes
    }

    /// Rows of ids that are laid end to end; none where the golden has none.
    pub fn rows(&self, ids: &str, lengths: &str) -> Vec<Vec<u32>> {
        let (Some(ids), Some(lengths)) = (self.integers.get(ids), self.integers.get(lengths)) else {
            return Vec::new();
        };
        let mut ids = ids.iter().map(|&id| id as u32);
        lengths.iter().map(|&length| ids.by_ref().take(length as usize).collect()).collect()
    }

    /// Mean loss over the labels: with virtual tokens, the last of which predicts a row's first token, over those too.
    pub fn loss(&self) -> f64 {
        let loss = self.tensors.get("loss_with_first").unwrap_or(&self.tensors["loss"]);
        f64::from(loss.1[0])
    }

    /// The gradients of that, by the names of what is trained.
    pub fn gradients(&self) -> impl Iterator<Item = (&str, &(Vec<usize>, Vec<f32>))> {
        let prefix = if self.tensors.contains_key("loss_with_first") { "first." } else { "grad." };
        self.tensors.iter().filter_map(move |(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)))
    }
}

/// A model with what stands on it.
pub struct Case {
    pub name: String,
    pub checkpoint: Checkpoint,
    pub model: Model,
    pub overlay: Overlay,
    pub params: Vec<f32>,
    /// Of the parameters as they were when the case was made.
    norms: RowNorms,
}

impl Case {
    /// A golden's model: trained whole, or its base with the adapter that peft made, as training with its configuration would begin.
    pub fn load(case: &str) -> Self {
        let dir = goldens().join(case);
        match fs::read_to_string(dir.join("base.txt")) {
            Ok(base) => {
                let adapter = AdapterFile::read(&dir.join("adapter")).unwrap_or_else(|e| panic!("{case}: {e}"));
                let checkpoint = checkpoint(base.trim());
                let is_trainable = adapter.method.check_trainable(&checkpoint.spec).is_ok();
                let overlay = adapter.method.lower(&checkpoint.spec, is_trainable);
                let overlay = overlay.unwrap_or_else(|e| panic!("{case}: {e}"));
                let params = adapter.params(&overlay).unwrap_or_else(|e| panic!("{case}: {e}"));
                Self::new(case, checkpoint, overlay, params)
            }
            Err(_) => Self::with_method(case, checkpoint(case), &Full),
        }
    }

    /// A golden's model with nothing on it, from its GGUF file where it has one.
    pub fn base(case: &str) -> Self {
        Self::bare(case, checkpoint(case))
    }

    /// A model with nothing on it.
    pub fn bare(name: &str, checkpoint: Checkpoint) -> Self {
        let overlay = Overlay::of_sizes(checkpoint.spec.linears().count(), checkpoint.spec.vectors().len());
        Self::new(name, checkpoint, overlay, Vec::new())
    }

    /// A model with a method's first parameters.
    pub fn with_method(name: &str, checkpoint: Checkpoint, method: &dyn Method) -> Self {
        let mut overlay = method.lower(&checkpoint.spec, true).unwrap_or_else(|e| panic!("{name}: {e}"));
        let none = || retune_adapter::Error::Base("there is no tokenizer".to_owned());
        let texts = Texts { tokenize: &|_| Err(none()), keys_and_values: &|_| Err(none()) };
        let params = initial_params(method, &checkpoint.spec, &mut overlay, &checkpoint, &texts, 0);
        let params = params.unwrap_or_else(|e| panic!("{name}: {e}"));
        Self::new(name, checkpoint, overlay, params)
    }

    /// The same with another start, `first`, and these parameters.
    pub fn with_start(
        name: &str,
        checkpoint: Checkpoint,
        method: &dyn Method,
        first: &[f32],
        params: Vec<f32>,
    ) -> Self {
        let mut overlay = method.lower(&checkpoint.spec, true).unwrap_or_else(|e| panic!("{name}: {e}"));
        method.keep_start(&mut overlay, first);
        Self::new(name, checkpoint, overlay, params)
    }

    /// A model with an adapter's tensors, as they are used: entries of its configuration that match nothing are passed over.
    pub fn with_adapter(name: &str, checkpoint: Checkpoint, adapter: &AdapterFile) -> Self {
        let overlay = adapter.lower(&checkpoint.spec).unwrap_or_else(|e| panic!("{name}: {e}"));
        let params = adapter.params(&overlay).unwrap_or_else(|e| panic!("{name}: {e}"));
        Self::new(name, checkpoint, overlay, params)
    }

    fn new(name: &str, checkpoint: Checkpoint, overlay: Overlay, params: Vec<f32>) -> Self {
        let model = checkpoint.model().unwrap_or_else(|e| panic!("{name}: {e}"));
        let norms = RowNorms::of(&model, &overlay, &params);
        Self { name: name.to_owned(), checkpoint, model, overlay, params, norms }
    }

    /// Takes the norms that output scales stand over from the parameters as they are.
    pub fn refresh(&mut self) {
        self.norms = RowNorms::of(&self.model, &self.overlay, &self.params);
    }

    /// What the reference computed.
    pub fn golden(&self) -> Golden {
        let prelude = self.overlay.prelude(&self.checkpoint.spec);
        Golden { prelude, ..Golden::read(&goldens().join(&self.name)) }
    }

    /// The golden's rows in one pass.
    pub fn golden_pass(&self) -> Pass {
        self.golden().passes(true).remove(0)
    }

    /// Changes a tensor of the frozen base.
    pub fn change_base(&mut self, tensor: &str, change: impl Fn(&mut [f32])) {
        let weights = Changed { checkpoint: &self.checkpoint, tensor, change };
        self.model = Model::load(self.checkpoint.spec.clone(), &weights).unwrap_or_else(|e| panic!("{tensor}: {e}"));
    }

    /// A pass through it.
    pub fn run<'a>(&'a self, compute: &'a Compute, pass: &'a Pass) -> Run<'a> {
        let Self { model, overlay, params, norms, .. } = self;
        Run { model, overlay, params, norms, compute, pass, step: None, parts: &[] }
    }

    /// The logits of all tokens of a pass.
    pub fn logits(&self, compute: &Compute, pass: &Pass) -> Vec<f32> {
        let all: Vec<u32> = (0..pass.tokens() as u32).collect();
        self.run(compute, pass).logits(&all, &mut Workspace::new(&self.model, Saving::None))
    }

    /// The summed loss of a pass.
    pub fn loss(&self, compute: &Compute, pass: &Pass) -> f64 {
        self.run(compute, pass).loss(&mut Workspace::new(&self.model, Saving::None))
    }

    /// The loss of each label, and the gradient of their sum, of all passes together.
    pub fn gradient(&self, compute: &Compute, saving: Saving, passes: &[Pass]) -> (Vec<f32>, Vec<f32>) {
        let mut workspace = Workspace::new(&self.model, saving);
        let (mut losses, mut grads) = (Vec::new(), vec![0.0; self.params.len()]);
        for pass in passes {
            self.run(compute, pass).loss_and_gradient(&mut grads, &mut workspace);
            losses.extend_from_slice(&workspace.losses);
        }
        (losses, grads)
    }

    /// The linears that are computed in 8 bits, by their names.
    pub fn in_int8(&self, compute: &Compute) -> Vec<&str> {
        let linears = self.model.linears().iter().enumerate();
        linears.filter(|(id, _)| compute.int8(LinearId(*id)).is_some()).map(|(_, linear)| &*linear.name).collect()
    }
}

/// A checkpoint with one tensor changed.
struct Changed<'a, F> {
    checkpoint: &'a Checkpoint,
    tensor: &'a str,
    change: F,
}

impl<F: Fn(&mut [f32])> Weights for Changed<'_, F> {
    type Error = Error;

    fn tensor(&self, name: &str) -> Result<Matrix, Error> {
        let matrix = self.checkpoint.tensor(name)?;
        if name != self.tensor {
            return Ok(matrix);
        }
        let mut values = matrix.to_f32();
        (self.change)(&mut values);
        Ok(Matrix::from_f32(matrix.rows(), matrix.cols(), values))
    }
}

/// A golden's checkpoint, its GGUF file where it is no directory.
pub fn checkpoint(case: &str) -> Checkpoint {
    Checkpoint::open(&path(case)).unwrap_or_else(|e| panic!("{case}: {e}"))
}

fn path(case: &str) -> PathBuf {
    let dir = goldens().join(case);
    let gguf = dir.join("model.gguf");
    let is_directory = dir.join("config.json").exists();
    if gguf.exists() && !is_directory { gguf } else { dir }
}

/// ‖a − b‖ / ‖b‖, or ‖a‖ · 1000 where b is zero, so that 1e-4 allows 1e-7.
pub fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    let norm: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    if norm == 0.0 { difference.sqrt() * 1e3 } else { (difference / norm).sqrt() }
}

/// The bits of values, for equality that knows NaN and the sign of zero.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Numbers that are the same everywhere (Knuth's linear congruential generator).
pub struct Lcg(pub u64);

impl Lcg {
    /// The next number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % end
    }

    /// The ids of a row, and which of them are targets: three of four.
    pub fn row(&mut self, length: usize, vocab_size: usize) -> (Vec<u32>, Vec<bool>) {
        let ids = (0..length).map(|_| self.below(vocab_size) as u32).collect();
        (ids, self.targets(length))
    }

    /// Which tokens of a row are targets: three of four.
    pub fn targets(&mut self, length: usize) -> Vec<bool> {
        (0..length).map(|_| self.below(4) > 0).collect()
    }

    /// Numbers in [−0.1, 0.1).
    pub fn small(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.symmetric() * 0.1).collect()
    }

    /// The next number in [−1, 1).
    pub fn symmetric(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
