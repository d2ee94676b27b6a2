//! The memory of a pass: what the forward keeps for the backward, and the buffers both work in. It is allocated for the largest pass and
//! reused, so a steady step allocates nothing.

use std::ops::Range;

use retune_kernels::attention::{self, Segment};
use retune_kernels::bf16;

use crate::distances::Biases;
use crate::linear::LinearScratch;
use crate::model::{LinearId, Model, Stack, SubLayer};
use crate::overlay::Overlay;
use crate::pass::PassSize;
use crate::rope::Rotations;
use crate::saved::{Rounded, Saved, Saving, Tokens, Widths, grow};

/// Most bytes of logits that exist at once: the head works through the label tokens in blocks of rows. In f32 each block decodes and packs
/// the whole head, so blocks are large; in 8 bits the head lies ready, and smaller ones cost nothing (where rows are
/// scored, which is in f32, there is one of each).
const LOGITS_BYTES: usize = 104 << 20;
const INT8_LOGITS_BYTES: usize = 52 << 20;
/// Rows of a block at the least, however large the vocabulary: each block reads the whole head.
const LEAST_ROWS: usize = 256;

/// Buffers and tables that sub-layers share. Buffers hold nothing between sub-layers, but for those of the encoder's output; T tokens, S of
/// the sources, D hidden, M the widest input of an output linear.
#[derive(Default)]
pub(crate) struct Temporary {
    /// A norm's output, `[T, D]`.
    pub norm: Vec<f32>,
    /// An activation's output, or the gradient of an output linear's input, `[T, M]`.
    pub mixed: Vec<f32>,
    /// Gradient of the residual stream, `[T, D]`.
    pub dx: Vec<f32>,
    /// Gradient of a norm's output, `[T, D]`.
    pub dnorm: Vec<f32>,
    /// Gradient of an output linear's output, where a norm follows it or it is scaled, `[T, D]`.
    pub draw_output: Vec<f32>,
    /// Gradient of an attention's queries, keys and values, where they lie in the inputs' output.
    pub dinner: Vec<f32>,
    /// Queries and keys normalised and rotated, where what is kept is before that.
    pub turned: Vec<f32>,
    /// Keys and values of whole rows, where rows share tokens or a prefix precedes them, and their gradients, `[Σ row, K]` each.
    pub whole: [Vec<f32>; 2],
    pub dwhole: [Vec<f32>; 2],
    pub linear: LinearScratch,
    pub segments: Vec<Segment>,
    /// The encoder's output, normalised, and its gradient, `[S, D]` each.
    pub memory: Vec<f32>,
    pub dmemory: Vec<f32>,
    /// Gradient of the keys and values that a sub-layer makes of it, and what that adds to `dmemory`.
    pub dmemory_inner: Vec<f32>,
    pub dmemory_part: Vec<f32>,
    /// Queries of each row, and the keys of its source.
    pub cross_segments: Vec<Segment>,
    /// The biases by distance of the stack that runs, where it has some.
    pub distances: Biases,
    pub rotations: Rotations,
}

/// Buffers of the head, for a block of R label tokens.
#[derive(Default)]
pub(crate) struct HeadBuffers {
    /// Rows of the last block's output, `[R, D]`.
    pub rows: Vec<f32>,
    /// The same, normalised, `[R, D]`.
    pub norm: Vec<f32>,
    /// Gradient of `norm`, then of `rows`, `[R, D]` each.
    pub dnorm: Vec<f32>,
    pub drows: Vec<f32>,
    /// `[R, V]`
    pub logits: Vec<f32>,
    pub targets: Vec<u32>,
    /// The gradient of each label's own logit, `[R]`, in 8 bits.
    pub label_gradients: Vec<f32>,
    /// The low-rank projection, where the head has one, `[R, r]`.
    pub u: Vec<f32>,
    /// The logits before their scale, where the head has one.
    pub unscaled: Vec<f32>,
}

/// Everything a pass works in.
pub struct Workspace {
    pub saving: Saving,
    pub(crate) encoder: Activations,
    pub(crate) decoder: Activations,
    pub(crate) temporary: Temporary,
    pub(crate) head: HeadBuffers,
    /// The loss of each label of the last pass.
    pub losses: Vec<f32>,
}

/// The activations of a stack's sub-layers.
#[derive(Default)]
pub(crate) struct Activations {
    /// Inputs of the sub-layers and the output of the last, `[T, D]` each; which is where, [`Activations::input`] says.
    pub x: Vec<Vec<f32>>,
    pub saved: Vec<Saved>,
    pub rounded: Vec<Rounded>,
    /// Tokens of the largest pass so far.
    most_tokens: usize,
}

impl Workspace {
    /// An empty workspace; it grows to the largest pass it sees.
    pub fn new(model: &Model, saving: Saving) -> Self {
        Self::for_passes(model, saving, 0)
    }

    /// A workspace that is made for passes of `tokens` tokens when the first one comes.
    pub fn for_passes(model: &Model, saving: Saving, tokens: usize) -> Self {
        let of_stack = |stack| Activations::new(stack, saving, tokens);
        Self {
            saving,
            encoder: model.encoder.as_ref().map(of_stack).unwrap_or_default(),
            decoder: of_stack(&model.decoder),
            temporary: Temporary { rotations: Rotations::new(&model.spec.ropes), ..Temporary::default() },
            head: HeadBuffers::default(),
            losses: Vec::new(),
        }
    }

    /// Rows of logits that exist at once in a pass of `labels` labels: blocks of equal size.
    pub(crate) fn head_rows(model: &Model, int8: bool, labels: usize) -> usize {
        let most = Self::most_head_rows(model, int8);
        labels.div_ceil(labels.div_ceil(most).max(1)).max(1)
    }

    fn most_head_rows(model: &Model, int8: bool) -> usize {
        let bytes = if int8 { INT8_LOGITS_BYTES } else { LOGITS_BYTES };
        (bytes / (4 * model.spec.vocab_size)).max(LEAST_ROWS)
    }

    /// Makes every buffer hold a pass of so many tokens up to `positions` long.
    pub(crate) fn reserve(
        &mut self,
        model: &Model,
        overlay: &Overlay,
        tokens: Tokens,
        positions: usize,
        backward: bool,
    ) {
        let d = model.spec.hidden_size;
        self.temporary.rotations.grow(positions);
        let mut source = 0;
        if let Some(encoder) = model.encoder.as_ref().filter(|_| tokens.source > 0) {
            let tokens = Tokens { own: tokens.source, source: 0 };
            source = self.encoder.reserve(model, overlay, encoder, self.saving, tokens, backward);
        }
        let tokens = Tokens { own: tokens.own, source };
        let own = self.decoder.reserve(model, overlay, &model.decoder, self.saving, tokens, backward);
        let tokens = own.max(source);
        let widths = TemporaryWidths::of(model, overlay);
        let t = &mut self.temporary;
        grow(&mut t.norm, tokens * d);
        grow(&mut t.mixed, tokens * widths.mixed);
        grow(&mut t.turned, tokens * widths.turned);
        grow(&mut t.memory, source * d);
        if backward {
            grow(&mut t.dx, tokens * d);
            grow(&mut t.dnorm, tokens * d);
            grow(&mut t.draw_output, tokens * widths.draw_output);
            grow(&mut t.dinner, tokens * widths.dinner);
            grow(&mut t.dmemory, source * d);
            grow(&mut t.dmemory_part, source * d);
            grow(&mut t.dmemory_inner, source * widths.memory);
        }
    }

    /// Bytes that a training pass of this size will make the workspace take: the plan shown before training. `int8` says whether the
    /// base will be computed in 8 bits. Scratch memory of the kernels is included.
    pub fn planned_bytes(model: &Model, overlay: &Overlay, saving: Saving, int8: bool, size: PassSize) -> usize {
        let PassSize { tokens, keys, labels, scored_labels, is_shared, source_tokens } = size;
        let d = model.spec.hidden_size;
        let source = if model.encoder.is_some() { source_tokens } else { 0 };
        let encoder = model.encoder.as_ref().map_or(0, |encoder| {
            planned_activations(model, overlay, encoder, saving, Tokens { own: source, source: 0 })
        });
        let saved =
            encoder + planned_activations(model, overlay, &model.decoder, saving, Tokens { own: tokens, source });
        let widths = TemporaryWidths::of(model, overlay);
        let temporary = 3 * d + widths.mixed + widths.turned + widths.draw_output + widths.dinner;
        let memory = source * (3 * d + widths.memory);
        let attentions = || model.sub_layers().filter_map(|s| s.attention());
        let queries = attentions().map(|a| a.scores.queries * a.scores.head_dim).max().unwrap_or(0);
        let key_width = attentions().map(|a| a.scores.keys * a.scores.head_dim).max().unwrap_or(0);
        let attention = keys.max(source) * attention::BACKWARD_SCRATCH * queries;
        let whole = if is_shared || overlay.prefix.is_some() { keys * 4 * key_width } else { 0 };
        let int8 = int8 && !overlay.changes_linear(model, model.head);
        let rows = Self::most_head_rows(model, int8).min(labels);
        let scored_rows = Self::most_head_rows(model, false).min(scored_labels);
        let head = rows.max(scored_rows) * (4 * d + model.spec.vocab_size + overlay.unscaled(model, &[model.head]));
        // In 8 bits the head's gradient is quantized beside the logits.
        let quantized = if int8 { rows * model.spec.vocab_size / 4 } else { 0 };
        let tokens = tokens.max(source);
        let dropped = if overlay.has_dropout() { 2 * tokens * widths.mixed.max(d) } else { 0 };
        // What linears with an input scale read, and the gradients of that.
        let scaled_inputs = |group: &[LinearId]| {
            let features = group.first().map_or(0, |&id| model.linear(id).cols());
            let gradients = overlay.scaled_inputs(model, group);
            if gradients == 0 { 0 } else { features + gradients }
        };
        let groups =
            |s: &'_ SubLayer| [&s.inputs[..], std::slice::from_ref(&s.output), s.memory_linears()].map(scaled_inputs);
        let scaled = tokens * model.sub_layers().flat_map(groups).max().unwrap_or(0);
        let packing = 3 << 20;
        saved + 4 * (tokens * temporary + memory + attention + whole + head + quantized + dropped + scaled + packing)
    }
}

impl Activations {
    fn new(stack: &Stack, saving: Saving, tokens: usize) -> Self {
        let (n, places) = (stack.sub_layers.len(), stack.places());
        let inputs = match saving {
            Saving::Full => n + 1,
            // The inputs of blocks and the last output; within a block those of its other sub-layers.
            Saving::BlockInputs => stack.blocks() + places.max(1),
            // The last output is kept beside two in turn.
            Saving::Bf16 => 3,
            Saving::None => 2,
        };
        let saved = if saving == Saving::Full { n } else { places };
        let rounded = if saving == Saving::Bf16 { n } else { 0 };
        Self {
            x: (0..inputs.max(2)).map(|_| Vec::new()).collect(),
            saved: (0..saved).map(|_| Saved::default()).collect(),
            rounded: (0..rounded).map(|_| Rounded::default()).collect(),
            most_tokens: tokens,
        }
    }

    /// Where the input of sub-layer `s` is kept in a pass that will (`backward`) or will not be followed by its backward; the number of
    /// sub-layers stands for the last one's output.
    pub fn input(stack: &Stack, saving: Saving, s: usize, backward: bool) -> usize {
        let n = stack.sub_layers.len();
        match saving {
            Saving::Full if backward => s,
            Saving::Bf16 if backward && s == n => 2,
            Saving::BlockInputs if backward => match stack.sub_layers.get(s) {
                None => stack.blocks(),
                Some(sub_layer) if sub_layer.place == 0 => sub_layer.block,
                Some(sub_layer) => stack.blocks() + sub_layer.place,
            },
            _ => s % 2,
        }
    }

    /// The output of the last sub-layer.
    pub fn last(&self, stack: &Stack, saving: Saving, backward: bool) -> &[f32] {
        &self.x[Self::input(stack, saving, stack.sub_layers.len(), backward)]
    }

    /// Where what sub-layer `s` saves is kept.
    pub fn place(stack: &Stack, saving: Saving, s: usize, backward: bool) -> usize {
        if backward && saving == Saving::Full { s } else { stack.sub_layers[s].place }
    }

    /// Whether `range` of the input of block `b` of the last pass with a backward is finite; the number of blocks stands for the output
    /// of the last.
    pub fn block_input_is_finite(&self, stack: &Stack, saving: Saving, b: usize, range: Range<usize>) -> bool {
        let s = stack.sub_layers.iter().position(|s| s.block == b).unwrap_or(stack.sub_layers.len());
        match self.rounded.get(s) {
            Some(rounded) => rounded.x[range].iter().all(|&v| bf16::is_finite(v)),
            None => self.x[Self::input(stack, saving, s, true)][range].iter().all(|v| v.is_finite()),
        }
    }

    /// Makes every buffer hold a pass of so many tokens, or the largest one so far, and returns how many tokens that has.
    fn reserve(
        &mut self,
        model: &Model,
        overlay: &Overlay,
        stack: &Stack,
        saving: Saving,
        tokens: Tokens,
        backward: bool,
    ) -> usize {
        let d = model.spec.hidden_size;
        let tokens = Tokens { own: tokens.own.max(self.most_tokens), ..tokens };
        self.most_tokens = tokens.own;
        let inputs = match (backward, saving) {
            (true, Saving::Full | Saving::BlockInputs | Saving::Bf16) => self.x.len(),
            _ => 2,
        };
        self.x[..inputs].iter_mut().for_each(|x| grow(x, tokens.own * d));
        if backward && saving == Saving::Full {
            for (saved, sub_layer) in self.saved.iter_mut().zip(&stack.sub_layers) {
                saved.reserve(Widths::of(model, overlay, sub_layer), tokens);
            }
        } else {
            for (place, saved) in self.saved.iter_mut().enumerate() {
                saved.reserve(Widths::shared(model, overlay, stack, place), tokens);
            }
        }
        if backward {
            for (rounded, sub_layer) in self.rounded.iter_mut().zip(&stack.sub_layers) {
                let widths = Widths::of(model, overlay, sub_layer);
                grow(&mut rounded.x, tokens.own * widths.x);
                rounded.saved.reserve(widths, tokens);
            }
        }
        tokens.own
    }
}

/// Bytes that the activations of a stack take in a training pass of so many tokens.
fn planned_activations(model: &Model, overlay: &Overlay, stack: &Stack, saving: Saving, tokens: Tokens) -> usize {
    let d = model.spec.hidden_size;
    let all: Vec<Widths> = stack.sub_layers.iter().map(|s| Widths::of(model, overlay, s)).collect();
    let shared: Vec<Widths> = (0..stack.places()).map(|place| Widths::shared(model, overlay, stack, place)).collect();
    let one: usize = shared.iter().map(|w| w.rounded() + w.lse).sum();
    // Counted in units of two bytes.
    let own = match saving {
        Saving::Full => 2 * (all.iter().map(|w| w.x + w.rounded() + w.lse).sum::<usize>() + d),
        Saving::Bf16 => all.iter().map(|w| w.x + w.rounded() + 2 * w.lse).sum::<usize>() + 2 * (one + 3 * d),
        Saving::BlockInputs => 2 * (one + (stack.blocks() + stack.places()) * d),
        Saving::None => 2 * (one + 2 * d),
    };
    let memory = |widths: &[Widths]| widths.iter().map(Widths::rounded_memory).sum::<usize>();
    let source = match saving {
        Saving::Full => 2 * memory(&all),
        Saving::Bf16 => memory(&all) + 2 * memory(&shared),
        Saving::BlockInputs | Saving::None => 2 * memory(&shared),
    };
    2 * (tokens.own * own + tokens.source * source)
}

/// Widths of the buffers of [`Temporary`] that depend on the sub-layers.
struct TemporaryWidths {
    mixed: usize,
    turned: usize,
    draw_output: usize,
    dinner: usize,
    memory: usize,
}

impl TemporaryWidths {
    fn of(model: &Model, overlay: &Overlay) -> Self {
        let is_scaled = |s: &SubLayer| overlay.change(s.output).output_scale.is_some();
        let most = |f: &dyn Fn(&SubLayer) -> usize| model.sub_layers().map(f).max().unwrap_or(0);
        Self {
            mixed: most(&|s| s.mixed()),
            turned: most(&|s| {
                let normed = s.attention().filter(|a| a.qk_norm.is_some());
                normed.map_or(0, |a| (a.scores.queries + a.scores.keys) * a.scores.head_dim)
            }),
            draw_output: most(&|s| if s.post_norm.is_some() || is_scaled(s) { model.spec.hidden_size } else { 0 }),
            dinner: most(&|s| if s.attention().is_some() { s.inner } else { 0 }),
            memory: most(&|s| s.memory().map_or(0, |memory| memory.row)),
        }
    }
}
