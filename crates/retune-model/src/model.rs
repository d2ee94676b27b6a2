//! The model in memory: the block's parts, which of them are trained, and where the trained ones lie in the flat vector.

use std::ops::Range;

use retune_adapter::targets::LoraTarget;
use retune_adapter::{InitLoraWeights, init_lora};
use retune_adapter::{dropout, names};
use retune_kernels::PanelSource;
use retune_kernels::attention::Heads;
use retune_kernels::int8::Rounding;
use retune_quant::Matrix;

use crate::adapter::AdapterPlan;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::Error;
use crate::linear::{Linear, Lora};
use crate::params::{ParamLayout, Vector, Weight};

/// What is trained.
#[derive(Clone, Copy, Debug)]
pub enum Trainable<'a> {
    Nothing,
    /// Full fine-tuning.
    Everything,
    Adapter(&'a AdapterPlan),
}

/// Where a trainable tensor's first values come from.
#[derive(Clone, Debug)]
enum Initial {
    /// The base's tensor of this name.
    Base(String),
    /// A's and B's of a LoRA target, initialised together; B follows A.
    LoraA(LoraTarget),
    LoraB,
}

/// One transformer block.
#[derive(Clone)]
pub struct Layer {
    pub input_norm: Vector,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub post_norm: Vector,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl Layer {
    /// The block's linears in the order of the forward.
    pub fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// Which of them read the same input.
    pub(crate) const SHARED_INPUTS: [Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];

    /// The same, to change.
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }

    /// Whether anything in the attention half is trained.
    pub(crate) fn trains_attention(&self) -> bool {
        self.o.is_trainable() || self.trains_attention_input()
    }

    /// Whether anything before the attention itself is trained.
    pub(crate) fn trains_attention_input(&self) -> bool {
        self.input_norm.is_trainable() || [&self.q, &self.k, &self.v].iter().any(|l| l.is_trainable())
    }

    /// Whether anything in the block is trained.
    pub(crate) fn is_trainable(&self) -> bool {
        self.trains_attention()
            || self.post_norm.is_trainable()
            || [&self.gate, &self.up, &self.down].iter().any(|l| l.is_trainable())
    }
}

/// A decoder-only transformer of the Llama family.
#[derive(Clone)]
pub struct Model {
    pub config: ModelConfig,
    pub embedding: Weight,
    pub layers: Vec<Layer>,
    pub norm: Vector,
    /// The output head; its weight is the embedding's where they are tied.
    pub head: Linear,
    pub layout: ParamLayout,
    pub(crate) heads: Heads,
    initial: Vec<Initial>,
}

/// Collects the trainable tensors while the model is put together.
struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    trainable: Trainable<'a>,
    layout: ParamLayout,
    initial: Vec<Initial>,
}

impl Builder<'_> {
    fn saves(&self, module: &str) -> bool {
        matches!(self.trainable, Trainable::Adapter(plan) if plan.modules_to_save.contains(module))
    }

    /// The key of a tensor of `module` that is trained whole, if it is.
    fn trained_key(&self, module: &str, tensor: &str) -> Option<String> {
        match self.trainable {
            Trainable::Everything => Some(tensor.to_owned()),
            Trainable::Adapter(_) if self.saves(module) => Some(names::saved_weight(module)),
            _ => None,
        }
    }

    fn add(&mut self, key: String, shape: Vec<usize>, initial: Initial) -> std::ops::Range<usize> {
        self.initial.push(initial);
        self.layout.add(key, shape)
    }

    fn weight(&mut self, module: &str) -> Result<Weight, Error> {
        let name = format!("{module}.weight");
        let matrix = self.checkpoint.tensor(&name)?;
        Ok(match self.trained_key(module, &name) {
            Some(key) => {
                let shape = vec![matrix.rows(), matrix.cols()];
                Weight::Trainable { range: self.add(key, shape, Initial::Base(name)), cols: matrix.cols() }
            }
            None => Weight::Frozen(matrix),
        })
    }

    fn vector(&mut self, name: String, key: Option<String>) -> Result<Vector, Error> {
        let values = self.checkpoint.tensor(&name)?.to_f32();
        Ok(match key {
            Some(key) => Vector::Trainable(self.add(key, vec![values.len()], Initial::Base(name))),
            None => Vector::Frozen(values),
        })
    }

    fn norm(&mut self, module: &str) -> Result<Vector, Error> {
        let name = format!("{module}.weight");
        let key = self.trained_key(module, &name);
        self.vector(name, key)
    }

    fn target(&self, module: &str) -> Option<LoraTarget> {
        match self.trainable {
            Trainable::Adapter(plan) => plan.targets.iter().find(|t| t.module == module).cloned(),
            _ => None,
        }
    }

    fn linear(&mut self, module: &str) -> Result<Linear, Error> {
        let weight = self.weight(module)?;
        self.finish_linear(module, weight)
    }

    fn finish_linear(&mut self, module: &str, weight: Weight) -> Result<Linear, Error> {
        let (out_features, in_features) = match &weight {
            Weight::Frozen(matrix) => (matrix.rows(), matrix.cols()),
            Weight::Trainable { range, cols } => (range.len() / cols, *cols),
        };
        let target = self.target(module);
        let bias_name = format!("{module}.bias");
        let bias = if self.checkpoint.has(&bias_name) {
            let key = self.trained_key(module, &bias_name).or_else(|| match self.trainable {
                Trainable::Adapter(plan) if plan.biases.contains(module) => {
                    Some(names::trained_bias(module, target.is_some()))
                }
                _ => None,
            });
            Some(self.vector(bias_name, key)?)
        } else {
            None
        };
        let lora = target.map(|target| {
            let (r, scaling) = (target.r, target.scaling);
            let a = self.add(names::lora_a(module), vec![r, in_features], Initial::LoraA(target));
            let b = self.add(names::lora_b(module), vec![out_features, r], Initial::LoraB);
            let dropout = match self.trainable {
                Trainable::Adapter(plan) => plan.lora_dropout,
                _ => 0.0,
            };
            Lora { a, b, r, scaling, dropout, module: dropout::module_key(module) }
        });
        Ok(Linear {
            name: module.to_owned(),
            in_features,
            out_features,
            weight,
            bias,
            lora,
            int8: None,
            gradient_rounding: Rounding::Nearest,
        })
    }
}

impl Model {
    /// Puts the model of a checkpoint together. Frozen matrices stay in their storage on disk, mapped into memory.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape.
    pub fn load(checkpoint: &Checkpoint, trainable: Trainable) -> Result<Self, Error> {
        let config = checkpoint.config.clone();
        let mut b = Builder { checkpoint, trainable, layout: ParamLayout::default(), initial: Vec::new() };
        let embedding = b.weight("model.embed_tokens")?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for l in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{l}.{part}");
            layers.push(Layer {
                input_norm: b.norm(&name("input_layernorm"))?,
                q: b.linear(&name("self_attn.q_proj"))?,
                k: b.linear(&name("self_attn.k_proj"))?,
                v: b.linear(&name("self_attn.v_proj"))?,
                o: b.linear(&name("self_attn.o_proj"))?,
                post_norm: b.norm(&name("post_attention_layernorm"))?,
                gate: b.linear(&name("mlp.gate_proj"))?,
                up: b.linear(&name("mlp.up_proj"))?,
                down: b.linear(&name("mlp.down_proj"))?,
            });
        }
        let norm = b.norm("model.norm")?;
        let mut head = if config.tie_word_embeddings {
            let weight = match trainable {
                // peft trains a copy of a saved module and leaves its twin as it was.
                Trainable::Adapter(_) => Weight::Frozen(checkpoint.tensor("model.embed_tokens.weight")?),
                _ => embedding.clone(),
            };
            b.finish_linear("lm_head", weight)?
        } else {
            b.linear("lm_head")?
        };
        // The gradient of the logits is a vocabulary of small probabilities.
        head.gradient_rounding = Rounding::Stochastic;
        let heads = Heads {
            queries: config.num_attention_heads,
            keys: config.num_key_value_heads,
            head_dim: config.head_dim,
            window: config.sliding_window,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };
        let Builder { layout, initial, .. } = b;
        Ok(Self { config, embedding, layers, norm, head, layout, heads, initial })
    }

    /// The first values of everything trainable, as one flat vector: the base's own for what is trained whole, `init` for LoRA.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn initial_params(
        &self,
        checkpoint: &Checkpoint,
        init: &InitLoraWeights,
        seed: u64,
    ) -> Result<Vec<f32>, Error> {
        let mut params = vec![0.0; self.layout.len()];
        for (i, (param, initial)) in self.layout.params().iter().zip(&self.initial).enumerate() {
            match initial {
                Initial::Base(name) => {
                    let matrix: Matrix = checkpoint.tensor(name)?;
                    matrix.panel_f32(0..matrix.rows(), 0..matrix.cols(), &mut params[param.range.clone()]);
                }
                Initial::LoraA(target) => {
                    let b_range = self.layout.params()[i + 1].range.clone();
                    let (a, b) = params[param.range.start..b_range.end].split_at_mut(param.range.len());
                    init_lora(target, init, seed, a, b);
                }
                Initial::LoraB => {}
            }
        }
        Ok(params)
    }

    /// The lowest layer that has something to train; `None` when only what comes after the layers has.
    pub(crate) fn lowest_trainable_layer(&self) -> Option<usize> {
        if self.embedding.range().is_some() && !self.layers.is_empty() {
            return Some(0);
        }
        self.layers.iter().position(Layer::is_trainable)
    }

    /// Whether adapters drop elements of their input in training.
    pub fn has_dropout(&self) -> bool {
        let drops = |linear: &Linear| linear.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0);
        self.layers.iter().any(|layer| layer.linears().into_iter().any(drops))
    }

    /// Number of parameters of the base.
    pub fn parameters(&self) -> usize {
        let matrix = |l: &Linear| l.in_features * l.out_features + l.bias.as_ref().map_or(0, |_| l.out_features);
        let (d, v) = (self.config.hidden_size, self.config.vocab_size);
        let blocks: usize =
            self.layers.iter().map(|l| l.linears().iter().map(|l| matrix(l)).sum::<usize>() + 2 * d).sum();
        let head = if self.config.tie_word_embeddings { 0 } else { matrix(&self.head) };
        v * d + blocks + d + head
    }
}
