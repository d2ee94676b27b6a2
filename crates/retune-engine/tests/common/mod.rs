//! Small models made by hand, of no family, with weights that depend on their names alone.

#![allow(dead_code)] // each test file uses some of it

use std::convert::Infallible;

use retune_engine::compute::Compute;
use retune_engine::model::{Model, Weights};
use retune_engine::overlay::{Factor, LowRank, Overlay, Prefix, VirtualTokens};
use retune_engine::pass::Pass;
use retune_engine::row_norms::RowNorms;
use retune_engine::spec::{
    Attention, Block, Buckets, CrossAttention, Encoder, Function, Head, Linear, Mix, ModelSpec, Module, Norm, Order,
    Positions, QueryScale, Rope, Stack, SubLayer, Table, frequencies,
};
use retune_engine::workspace::Workspace;
use retune_engine::{Run, Saving, Step};
use retune_kernels::random;
use retune_quant::Matrix;

pub const HIDDEN: usize = 32;
pub const HEAD_DIM: usize = 8;
pub const QUERIES: usize = 4;
pub const KEYS: usize = 2;
pub const INTERMEDIATE: usize = 48;
pub const VOCAB: usize = 96;
pub const CONTEXT: usize = 64;
const EPS: f32 = 1e-5;

fn attention(positions: Positions) -> Attention {
    let (queries, keys, head_dim) = (QUERIES, KEYS, HEAD_DIM);
    let scale = 1.0 / (HEAD_DIM as f32).sqrt();
    let (order, qk_norm, query_scale, window, soft_cap) = (Order::Planes, None, None, None, None);
    let causal = true;
    Attention { queries, keys, head_dim, order, qk_norm, positions, query_scale, causal, window, scale, soft_cap }
}

/// A block of Llama's shape.
fn llama_block(block: usize) -> Block {
    let name = |of: &str| format!("{block}.{of}");
    let linear = |of: &str, rows, cols| Linear::new(name(of), rows, cols);
    let (q, k) = (QUERIES * HEAD_DIM, KEYS * HEAD_DIM);
    let attention = SubLayer {
        norm: Norm::rms(name("attention_norm"), HIDDEN, EPS),
        inputs: vec![linear("q", q, HIDDEN), linear("k", k, HIDDEN), linear("v", k, HIDDEN)],
        mix: Mix::Attention(attention(Positions::Rope(0))),
        output: linear("o", HIDDEN, q),
        post_norm: None,
    };
    let mlp = SubLayer {
        norm: Norm::rms(name("mlp_norm"), HIDDEN, EPS),
        inputs: vec![linear("gate", INTERMEDIATE, HIDDEN), linear("up", INTERMEDIATE, HIDDEN)],
        mix: Mix::Activation { function: Function::Silu, gated: true },
        output: linear("down", HIDDEN, INTERMEDIATE),
        post_norm: None,
    };
    Block { sub_layers: vec![attention, mlp] }
}

/// Two blocks of Llama's shape.
pub fn llama(tied: bool) -> ModelSpec {
    ModelSpec {
        family: "none",
        vocab_size: VOCAB,
        hidden_size: HIDDEN,
        context: CONTEXT,
        table: Table { name: "table".to_owned(), scale: 1.0, positions: None, norm: None },
        encoder: None,
        decoder: Stack::new((0..2).map(llama_block).collect(), Norm::rms("norm", HIDDEN, EPS)),
        ropes: vec![Rope::new(frequencies(10_000.0, HEAD_DIM))],
        head: Head { linear: Linear::new("head", VOCAB, HIDDEN), tied, scale: 1.0, soft_cap: None },
    }
}

/// An encoder whose attention sees everything, and a decoder that looks at its output: both with biases by distance.
pub fn encoder_decoder(tied: bool) -> ModelSpec {
    let mut spec = llama(tied);
    let buckets = |of: &str, bidirectional| Buckets {
        name: format!("{of}.buckets"),
        count: 8,
        heads: QUERIES,
        max_distance: 12,
        bidirectional,
    };
    let mut blocks = std::mem::take(&mut spec.decoder.blocks);
    for block in &mut blocks {
        if let Mix::Attention(attention) = &mut block.sub_layers[0].mix {
            attention.positions = Positions::Buckets;
        }
    }
    let mut encoder = Stack {
        blocks: blocks.clone(),
        norm: Norm::layer("norm", HIDDEN, EPS),
        buckets: Some(buckets("encoder", true)),
    };
    for block in &mut encoder.blocks {
        if let Mix::Attention(attention) = &mut block.sub_layers[0].mix {
            attention.causal = false;
        }
    }
    for (b, block) in blocks.iter_mut().enumerate() {
        let name = |of: &str| format!("{b}.cross.{of}");
        let q = QUERIES * HEAD_DIM;
        let memory = [Linear::new(name("k"), q, HIDDEN), Linear::new(name("v"), q, HIDDEN).biased(b == 1)];
        let (heads, head_dim, scale) = (QUERIES, HEAD_DIM, 0.5);
        let cross = SubLayer {
            norm: Norm::rms(name("norm"), HIDDEN, EPS),
            inputs: vec![Linear::new(name("q"), q, HIDDEN)],
            mix: Mix::Cross(CrossAttention { heads, head_dim, scale, memory }),
            output: Linear::new(name("o"), HIDDEN, q),
            post_norm: None,
        };
        block.sub_layers.insert(1, cross);
    }
    spec.decoder = Stack { blocks, buckets: Some(buckets("decoder", false)), ..spec.decoder };
    spec.head.scale = 0.5;
    // Names must differ between the stacks.
    spec.encoder = Some(Encoder { stack: encoder, decoder_start: 3 });
    let mut renamed = ModelSpec { decoder: Stack::new(Vec::new(), spec.decoder.norm.clone()), ..spec.clone() };
    renamed.rename(&|name| if name == "table" || name == "head" { name.to_owned() } else { format!("encoder.{name}") });
    spec.encoder = renamed.encoder;
    spec
}

/// What no family has together: a scaled table with positions and a norm; a block with norms of all kinds and everywhere, biases, two
/// rotations' worth of an attention with window and cap; and one with heads in turn, a bias by distance and a plain, transposed MLP.
pub fn everything(tied: bool) -> ModelSpec {
    let mut spec = llama(tied);
    spec.table.scale = 1.5;
    spec.table.positions = Some("positions".to_owned());
    spec.table.norm = Some(Norm::layer("table_norm", HIDDEN, EPS));
    spec.decoder.norm = Norm::layer("norm", HIDDEN, EPS);
    spec.head.soft_cap = Some(3.0);
    spec.ropes.insert(0, Rope { factor: 1.1, ..Rope::new(frequencies(100.0, HEAD_DIM / 2)) });
    let [first, second] = &mut spec.decoder.blocks[..] else { panic!("two blocks") };
    for (s, sub_layer) in first.sub_layers.iter_mut().enumerate() {
        sub_layer.norm = Norm::rms_plus_one(sub_layer.norm.name.clone(), HIDDEN, EPS);
        sub_layer.post_norm = Some(match s {
            0 => Norm::layer("0.after_attention", HIDDEN, EPS),
            _ => Norm::rms_plus_one("0.after_mlp", HIDDEN, EPS),
        });
        for linear in sub_layer.inputs.iter_mut().chain([&mut sub_layer.output]) {
            linear.bias = true;
        }
        if let Mix::Attention(attention) = &mut sub_layer.mix {
            let norms = [Norm::rms("0.q_norm", HEAD_DIM, EPS), Norm::rms_plus_one("0.k_norm", HEAD_DIM, EPS)];
            (attention.qk_norm, attention.window, attention.soft_cap) = (Some(norms), Some(5), Some(2.0));
            attention.query_scale = Some(QueryScale { beta: 0.3, original: 4 });
        }
    }
    let q = QUERIES * HEAD_DIM;
    let [attention, mlp] = &mut second.sub_layers[..] else { panic!("two sub-layers") };
    attention.norm = Norm::layer("1.attention_norm", HIDDEN, EPS);
    attention.inputs = vec![Linear::new("1.qkv", 3 * q, HIDDEN).biased(true)];
    let Mix::Attention(of) = &mut attention.mix else { panic!("an attention") };
    (of.keys, of.order, of.positions) = (QUERIES, Order::Heads, Positions::Alibi);
    mlp.inputs = vec![Linear::new("1.up", INTERMEDIATE, HIDDEN).biased(true).transposed()];
    mlp.output = Linear::new("1.down", HIDDEN, INTERMEDIATE).biased(true).transposed();
    mlp.mix = Mix::Activation { function: Function::GeluTanh, gated: false };
    spec
}

/// Weights of a spec: uniform numbers that depend on the tensor's name.
pub struct Random<'a>(pub &'a ModelSpec);

impl Weights for Random<'_> {
    type Error = Infallible;

    fn tensor(&self, name: &str) -> Result<Matrix, Infallible> {
        let head = &self.0.head.linear;
        let modules = self.0.modules().into_iter().chain(self.0.head.tied.then_some(Module::Linear(head)));
        let [rows, cols] = modules
            .flat_map(|module| {
                let transposed = matches!(module, Module::Linear(linear) if linear.transposed);
                module.tensors().into_iter().map(move |(name, shape)| match shape[..] {
                    // The engine's order, whatever that of files.
                    [rows, cols] if transposed => (name, [cols, rows]),
                    [rows, cols] => (name, [rows, cols]),
                    _ => (name, [1, shape[0]]),
                })
            })
            .find_map(|(of_spec, shape)| (of_spec == name).then_some(shape))
            .unwrap_or_else(|| panic!("{name} is not asked for"));
        let key = random::hash(name);
        // Scores and activations of about 1, and norms of about 1.
        let (middle, width) = match rows {
            1 if name.ends_with("norm.weight") => (0.8, 0.4),
            1 => (0.0, 0.3),
            _ => (0.0, 1.5 / (cols as f32).sqrt()),
        };
        let values = (0..rows * cols).map(|i| middle + width * random::symmetric(random::at(key, i as u64)));
        Ok(Matrix::from_f32(rows, cols, values.collect()))
    }
}

/// A model with what stands on it.
pub struct Case {
    pub model: Model,
    pub overlay: Overlay,
    pub params: Vec<f32>,
    /// Of the parameters as they were when [`Case::refresh`] was called last.
    pub norms: RowNorms,
    /// The step that dropout is of.
    pub step: Option<Step>,
}

impl Case {
    /// Nothing on it.
    pub fn bare(spec: &ModelSpec) -> Self {
        let Ok(model) = Model::load(spec.clone(), &Random(spec));
        let overlay = Overlay::empty(&model);
        Self { model, overlay, params: Vec::new(), norms: RowNorms::default(), step: None }
    }

    /// Trains every tensor in its place. A tied head has one of its own, with the same values, where `apart`.
    pub fn whole(spec: &ModelSpec, apart: bool) -> Self {
        let mut case = Self::bare(spec);
        let (mut linear, mut vector) = (0, 0);
        for module in spec.modules() {
            for (name, shape) in module.tensors() {
                let Ok(matrix) = Random(spec).tensor(&name);
                let is_vector = !module.is_matrix(&shape);
                let range = case.add(&name, shape, &matrix.to_f32());
                match module {
                    _ if is_vector => {
                        case.overlay.vectors[vector] = Some(range);
                        vector += 1;
                    }
                    Module::Linear(_) => {
                        case.overlay.linears[linear].weight = Some(range);
                        linear += 1;
                    }
                    _ if module.name() == spec.table.name => case.overlay.table = Some(range),
                    _ => case.overlay.positions = Some(range),
                }
            }
        }
        if spec.head.tied {
            let table = case.overlay.table.clone().unwrap();
            let own = case.params[table.clone()].to_vec();
            let range = if apart { case.add("head.weight", vec![VOCAB, HIDDEN], &own) } else { table };
            case.overlay.linears[linear].weight = Some(range);
        }
        case
    }

    /// Puts low-rank terms on all linears but the head, both factors with values.
    pub fn adapted(spec: &ModelSpec, r: usize) -> Self {
        let mut case = Self::bare(spec);
        let linears = case.model.linears().len() - 1;
        for id in 0..linears {
            let linear = &case.model.linears()[id];
            let (name, rows, cols) = (linear.name.clone(), linear.rows(), linear.cols());
            let (a, b) = (values(&format!("{name}.A"), r * cols), values(&format!("{name}.B"), rows * r));
            let a = Factor::Trained(case.add(&format!("{name}.A"), vec![r, cols], &a));
            let b = Factor::Trained(case.add(&format!("{name}.B"), vec![rows, r], &b));
            case.overlay.linears[id].low_rank.push(LowRank { a, b, r, scale: 2.0, dropout: 0.0, key: 0 });
        }
        case
    }

    /// Takes the norms that output scales stand over from the parameters as they are.
    pub fn refresh(&mut self) {
        self.norms = RowNorms::of(&self.model, &self.overlay, &self.params);
    }

    /// The same with virtual tokens before each row.
    pub fn with_virtual_tokens(mut self, count: usize) -> Self {
        let values = numbers("virtual tokens", count * HIDDEN);
        let rows = self.add("virtual tokens", vec![count, HIDDEN], &values);
        self.overlay.virtual_tokens = Some(VirtualTokens { rows, count });
        self
    }

    /// The same with keys and values before those of each row.
    pub fn with_prefix(mut self, count: usize) -> Self {
        let width = self.model.spec.key_value_width();
        let values = numbers("prefix", count * width);
        let values = self.add("prefix", vec![count, width], &values);
        self.overlay.prefix = Some(Prefix { values, count, places: Vec::new() });
        self
    }

    /// An empty pass for it.
    pub fn empty_pass(&self, share_prefixes: bool) -> Pass {
        Pass::new(self.overlay.prelude(&self.model.spec), share_prefixes)
    }

    /// Rows of these lengths in one pass for it, every token that is predicted a target.
    pub fn pass(&self, lengths: &[usize]) -> Pass {
        let mut pass = self.empty_pass(false);
        push_rows(&mut pass, lengths);
        pass
    }

    /// Adds a tensor to the parameters.
    pub fn add(&mut self, name: &str, shape: Vec<usize>, values: &[f32]) -> std::ops::Range<usize> {
        self.params.extend_from_slice(values);
        self.overlay.layout.add(name.to_owned(), shape, None)
    }

    /// A pass through it in f32.
    pub fn run<'a>(&'a self, compute: &'a Compute, pass: &'a Pass) -> Run<'a> {
        let Self { model, overlay, params, norms, step, .. } = self;
        Run { model, overlay, params, norms, compute, pass, step: *step, parts: &[] }
    }

    pub fn logits(&self, pass: &Pass) -> Vec<f32> {
        let all: Vec<u32> = (0..pass.tokens() as u32).collect();
        self.run(&Compute::default(), pass).logits(&all, &mut Workspace::new(&self.model, Saving::None))
    }

    pub fn loss(&self, pass: &Pass) -> f64 {
        self.run(&Compute::default(), pass).loss(&mut Workspace::new(&self.model, Saving::None))
    }

    pub fn gradient(&self, pass: &Pass, saving: Saving) -> Vec<f32> {
        let mut grads = vec![0.0; self.params.len()];
        self.run(&Compute::default(), pass).loss_and_gradient(&mut grads, &mut Workspace::new(&self.model, saving));
        grads
    }

    /// Asserts that the gradient of every tensor is that of the loss: against central differences along a random direction in each, the norms
    /// under output scales held as they are. A tensor named `.m` is a factor over a norm.
    pub fn check_gradient(&mut self, pass: &Pass) {
        self.refresh();
        let grads = self.gradient(pass, Saving::Full);
        for param in self.overlay.layout.params().to_vec() {
            let gradient = &grads[param.range.clone()];
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 0.0, "{} has no gradient", param.name);
            // The gradient's own direction, a little turned: its loss moves well above the rounding of f32.
            let key = random::hash(&param.name);
            let wobble = |i: usize| f64::from(random::symmetric(random::at(key, i as u64)));
            let size = norm / (gradient.len() as f64).sqrt();
            let direction: Vec<f64> =
                gradient.iter().enumerate().map(|(i, &g)| f64::from(g) + size * wobble(i)).collect();
            let length = direction.iter().map(|d| d * d).sum::<f64>().sqrt();
            let slope: f64 = direction.iter().zip(gradient).map(|(d, &g)| d * f64::from(g)).sum::<f64>() / length;
            let step = 0.02 / slope.abs().max(2.0);
            let before = self.params[param.range.clone()].to_vec();
            let mut loss_at = |by: f64| {
                let values = self.params[param.range.clone()].iter_mut();
                values
                    .zip(&before)
                    .zip(&direction)
                    .for_each(|((p, b), d)| *p = (f64::from(*b) + by * d / length) as f32);
                if param.name.ends_with(".m") {
                    self.refresh();
                }
                self.loss(pass)
            };
            let difference = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            loss_at(0.0);
            let error = (difference - slope).abs() / slope.abs();
            assert!(error < 0.01, "{}: the loss moves by {difference}, the gradient says {slope}", param.name);
        }
    }
}

/// Numbers in [−0.2, 0.2] that depend on a name.
pub fn values(name: &str, n: usize) -> Vec<f32> {
    let key = random::hash(name);
    (0..n).map(|i| 0.2 * random::symmetric(random::at(key, i as u64))).collect()
}

/// A row of random ids.
pub fn row(seed: u64, length: usize) -> Vec<u32> {
    (0..length).map(|i| (random::at(seed, i as u64) % VOCAB as u64) as u32).collect()
}

/// Uniform numbers in [−1, 1) that depend on a name.
fn numbers(name: &str, len: usize) -> Vec<f32> {
    let key = random::hash(name);
    (0..len).map(|i| random::symmetric(random::at(key, i as u64))).collect()
}

fn push_rows(pass: &mut Pass, lengths: &[usize]) {
    for (number, &length) in lengths.iter().enumerate() {
        let source = row(100 + number as u64, 3 * length % 11 + 1);
        pass.push_answer(number as u64, &source, &row(number as u64, length), &vec![true; length]);
    }
}

/// Rows of these lengths in one pass, every token but the first a target.
pub fn pass(lengths: &[usize]) -> Pass {
    let mut pass = Pass::default();
    push_rows(&mut pass, lengths);
    pass
}

/// ‖a − b‖ / ‖b‖
pub fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    let norm: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    (difference / norm).sqrt()
}
