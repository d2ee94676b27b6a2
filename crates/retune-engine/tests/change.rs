//! Everything that can stand on a linear, alone and together: what it computes and its gradients, held against the same model with
//! everything merged into its weights.

mod common;

use std::sync::Arc;

use common::{Case, encoder_decoder, everything, llama, pass, relative, row, values};
use retune_engine::calibrate::Integers;
use retune_engine::compute::Compute;
use retune_engine::generate::{Generation, Question, Sampling, Standing};
use retune_engine::model::Weights;
use retune_engine::overlay::{Factor, LowRank, OutputScale};
use retune_engine::pass::Pass;
use retune_engine::row_norms::row_norms;
use retune_engine::spec::ModelSpec;
use retune_engine::workspace::Workspace;
use retune_engine::{Run, Saving, Step};
use retune_kernels::random;

/// How a factor of a low-rank term is held.
#[derive(Clone, Copy, PartialEq)]
enum Held {
    Trained,
    /// Trained rows, [`TIMES`] times.
    Repeated,
    Frozen,
}
use Held::{Frozen, Repeated, Trained};

/// What stands on each linear.
#[derive(Clone, Copy, Default)]
struct Kind {
    /// A and B of each low-rank term.
    low_rank: &'static [[Held; 2]],
    weight: bool,
    input_scale: bool,
    plain: bool,
    over_norm: bool,
    /// Whether biases are trained too.
    bias: bool,
}

const NONE: Kind =
    Kind { low_rank: &[], weight: false, input_scale: false, plain: false, over_norm: false, bias: false };
const LOW_RANK: &[[Held; 2]] = &[[Trained, Trained]];

/// Every kind, with a name.
const KINDS: [(&str, Kind); 15] = [
    ("input scale", Kind { input_scale: true, ..NONE }),
    ("output scale", Kind { plain: true, ..NONE }),
    ("both scales", Kind { input_scale: true, plain: true, bias: true, ..NONE }),
    ("input scale over a low-rank term", Kind { input_scale: true, low_rank: LOW_RANK, ..NONE }),
    ("output scale over a low-rank term", Kind { plain: true, low_rank: LOW_RANK, bias: true, ..NONE }),
    ("both scales over a low-rank term", Kind { input_scale: true, plain: true, low_rank: LOW_RANK, ..NONE }),
    ("output scale over the norm", Kind { over_norm: true, low_rank: LOW_RANK, ..NONE }),
    ("output scale over the norm beside a bias", Kind { over_norm: true, low_rank: LOW_RANK, bias: true, ..NONE }),
    ("two terms, one frozen", Kind { low_rank: &[[Trained, Trained], [Frozen, Frozen]], ..NONE }),
    (
        "everything over the norm of two terms",
        Kind {
            over_norm: true,
            input_scale: true,
            low_rank: &[[Frozen, Frozen], [Trained, Trained]],
            bias: true,
            ..NONE
        },
    ),
    ("a frozen A", Kind { low_rank: &[[Frozen, Trained]], ..NONE }),
    ("a B that repeats itself", Kind { low_rank: &[[Frozen, Repeated]], ..NONE }),
    (
        "one beside others over the norm",
        Kind { low_rank: &[[Trained, Repeated], [Trained, Trained]], over_norm: true, ..NONE },
    ),
    ("a frozen B beside a frozen A", Kind { low_rank: &[[Trained, Frozen], [Frozen, Trained]], ..NONE }),
    ("a weight with all on it", Kind { weight: true, input_scale: true, over_norm: true, low_rank: LOW_RANK, ..NONE }),
];

/// How often a factor repeats itself.
const TIMES: usize = 4;

/// Ranks of terms, which differ so that no column can be taken for another.
const RANKS: [usize; 2] = [3, 2];

/// A model with `kind` on the linears that `on` chooses.
fn case(spec: &ModelSpec, kind: Kind, on: impl Fn(&str) -> bool) -> Case {
    let mut case = Case::bare(spec);
    let linears = case.model.linears().len();
    for id in 0..linears {
        let linear = &case.model.linears()[id];
        let (name, rows, cols) = (linear.name.clone(), linear.rows(), linear.cols());
        if !on(&name) {
            continue;
        }
        if kind.weight {
            let weight = linear.weight.to_f32();
            case.overlay.linears[id].weight = Some(case.add(&format!("{name}.weight"), vec![rows, cols], &weight));
        }
        for (t, held) in kind.low_rank.iter().enumerate() {
            let r = RANKS[t];
            let [a, b] = [("A", r, cols), ("B", rows, r)]
                .into_iter()
                .zip(held)
                .map(|((part, n, m), held)| {
                    let name = format!("{name}.{part}{t}");
                    let values = values(&name, n * m);
                    match held {
                        Frozen => Factor::Frozen(Arc::from(values)),
                        Trained => Factor::Trained(case.add(&name, vec![n, m], &values)),
                        Repeated => {
                            assert_eq!(n % TIMES, 0, "{name}");
                            Factor::Repeated(case.add(&name, vec![n / TIMES, m], &values[..n / TIMES * m]), TIMES)
                        }
                    }
                })
                .collect::<Vec<_>>()
                .try_into()
                .unwrap();
            let scale = 2.0 - 0.7 * t as f32;
            case.overlay.linears[id].low_rank.push(LowRank { a, b, r, scale, dropout: 0.0, key: (2 * id + t) as u64 });
        }
        let around_one = |name: &str, n: usize| values(name, n).iter().map(|v| 1.0 + 2.0 * v).collect::<Vec<f32>>();
        if kind.input_scale {
            let name = format!("{name}.i");
            case.overlay.linears[id].input_scale = Some(case.add(&name, vec![cols], &around_one(&name, cols)));
        }
        if kind.plain {
            let name = format!("{name}.o");
            let mut factors = around_one(&name, rows);
            // What was there cannot be had from what a zero leaves.
            factors[rows / 2] = 0.0;
            case.overlay.linears[id].output_scale = Some(OutputScale::Plain(case.add(&name, vec![rows], &factors)));
        }
        if kind.over_norm {
            let name = format!("{name}.m");
            let norms = row_norms(&case.model.linears()[id].weight, &case.overlay.linears[id], &case.params);
            let magnitudes: Vec<f32> = around_one(&name, rows).iter().zip(norms).map(|(v, norm)| v * norm).collect();
            case.overlay.linears[id].output_scale =
                Some(OutputScale::OverNorm(case.add(&name, vec![rows], &magnitudes)));
        }
    }
    if kind.bias {
        for id in 0..linears {
            let linear = &case.model.linears()[id];
            if let Some(bias) = linear.bias.filter(|_| on(&linear.name)) {
                let name = format!("{}.bias", linear.name);
                let Ok(values) = common::Random(spec).tensor(&name);
                case.overlay.vectors[bias.0] = Some(case.add(&name, vec![values.cols()], &values.to_f32()));
            }
        }
    }
    case.refresh();
    case
}

/// All of them.
fn everywhere(_: &str) -> bool {
    true
}

/// One linear and what stands on it, in f64.
struct Plain {
    rows: usize,
    cols: usize,
    /// W + Σ s·B·A, `[out, in]`.
    sum: Vec<f64>,
    input: Vec<f64>,
    /// o, or m / ‖W + Σ s·B·A‖.
    output: Vec<f64>,
    norms: Vec<f64>,
    /// What a bias is multiplied by.
    bias: Vec<f64>,
}

impl Plain {
    fn of(case: &Case, id: usize) -> Self {
        let (linear, change) = (&case.model.linears()[id], &case.overlay.linears[id]);
        let (rows, cols) = (linear.rows(), linear.cols());
        let of = |range: &std::ops::Range<usize>| to_f64(&case.params[range.clone()]);
        let mut sum = change.weight.as_ref().map_or_else(|| to_f64(&linear.weight.to_f32()), of);
        for term in &change.low_rank {
            let (a, b) = (term.a.values(&case.params), term.b.values(&case.params));
            for (i, value) in sum.iter_mut().enumerate() {
                let product: f64 =
                    (0..term.r).map(|j| f64::from(b[i / cols * term.r + j]) * f64::from(a[j * cols + i % cols])).sum();
                *value += f64::from(term.scale) * product;
            }
        }
        let norms: Vec<f64> = sum.chunks(cols).map(|row| row.iter().map(|v| v * v).sum::<f64>().sqrt()).collect();
        let input = change.input_scale.as_ref().map_or_else(|| vec![1.0; cols], of);
        let (output, bias) = match &change.output_scale {
            None => (vec![1.0; rows], vec![1.0; rows]),
            Some(OutputScale::Plain(range)) => (of(range), of(range)),
            Some(OutputScale::OverNorm(range)) => {
                (of(range).iter().zip(&norms).map(|(m, norm)| m / norm).collect(), vec![1.0; rows])
            }
        };
        Self { rows, cols, sum, input, output, norms, bias }
    }

    fn merged(&self) -> Vec<f32> {
        let value = |(i, v): (usize, &f64)| (self.output[i / self.cols] * v * self.input[i % self.cols]) as f32;
        self.sum.iter().enumerate().map(value).collect()
    }
}

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// The model that computes the same with nothing on it but its own tensors, all of them trained, the head's apart from the table's.
fn merged(spec: &ModelSpec, case: &Case) -> Case {
    let mut whole = Case::whole(spec, true);
    for id in 0..case.model.linears().len() {
        let plain = Plain::of(case, id);
        let range = whole.overlay.linears[id].weight.clone().unwrap();
        whole.params[range].copy_from_slice(&plain.merged());
        if let Some(bias) = whole.model.linears()[id].bias {
            let range = whole.overlay.vectors[bias.0].clone().unwrap();
            for (value, factor) in whole.params[range].iter_mut().zip(&plain.bias) {
                *value *= *factor as f32;
            }
        }
    }
    whole
}

/// The gradients of what stands on a case, from those of its merged weights and biases by the chain rule, the norms being constants.
fn expected_gradients(case: &Case, whole: &Case, grads: &[f32]) -> Vec<f32> {
    let mut expected = vec![0.0; case.params.len()];
    let mut put = |range: &std::ops::Range<usize>, values: Vec<f64>| {
        expected[range.clone()].iter_mut().zip(values).for_each(|(to, v)| *to = v as f32);
    };
    for id in 0..case.model.linears().len() {
        let (plain, change) = (Plain::of(case, id), &case.overlay.linears[id]);
        let Plain { rows, cols, sum, input, output, norms, .. } = &plain;
        let (rows, cols) = (*rows, *cols);
        let by_weight = to_f64(&grads[whole.overlay.linears[id].weight.clone().unwrap()]);
        // dL/d(W + Σ s·B·A)
        let by_sum: Vec<f64> =
            by_weight.iter().enumerate().map(|(i, g)| g * output[i / cols] * input[i % cols]).collect();
        if let Some(range) = &change.weight {
            put(range, by_sum.clone());
        }
        for term in &change.low_rank {
            let (a, b, r) = (term.a.values(&case.params), term.b.values(&case.params), term.r);
            let scale = f64::from(term.scale);
            if let Factor::Trained(range) = &term.a {
                let by_a = |i: usize| -> f64 {
                    let (j, k) = (i / cols, i % cols);
                    scale * (0..rows).map(|n| f64::from(b[n * r + j]) * by_sum[n * cols + k]).sum::<f64>()
                };
                put(range, (0..r * cols).map(by_a).collect());
            }
            if let Some(range) = term.b.trained() {
                let by_b = |i: usize| -> f64 {
                    let (n, j) = (i / r, i % r);
                    scale * (0..cols).map(|k| f64::from(a[j * cols + k]) * by_sum[n * cols + k]).sum::<f64>()
                };
                // What stands for several rows has the gradients of all.
                let by_rows: Vec<f64> = (0..rows * r).map(by_b).collect();
                put(range, (0..range.len()).map(|i| by_rows.iter().skip(i).step_by(range.len()).sum()).collect());
            }
        }
        if let Some(range) = &change.input_scale {
            let by_input =
                |k: usize| (0..rows).map(|n| by_weight[n * cols + k] * output[n] * sum[n * cols + k]).sum::<f64>();
            put(range, (0..cols).map(by_input).collect());
        }
        let bias = case.model.linears()[id].bias;
        let by_bias = bias.map(|bias| to_f64(&grads[whole.overlay.vectors[bias.0].clone().unwrap()]));
        let by_output =
            |n: usize| (0..cols).map(|k| by_weight[n * cols + k] * input[k] * sum[n * cols + k]).sum::<f64>();
        match &change.output_scale {
            None => {}
            Some(OutputScale::Plain(range)) => {
                let base = bias.map(|bias| match &case.overlay.vectors[bias.0] {
                    Some(range) => to_f64(&case.params[range.clone()]),
                    None => {
                        // The merged bias was made of the base's, which is the merged one without its factor.
                        let name = &case.model.vector_names()[bias.0];
                        let Ok(matrix) = common::Random(&case.model.spec).tensor(name);
                        to_f64(&matrix.to_f32())
                    }
                });
                let of_bias = |n: usize| match (&base, &by_bias) {
                    (Some(base), Some(by_bias)) => base[n] * by_bias[n],
                    _ => 0.0,
                };
                put(range, (0..rows).map(|n| by_output(n) + of_bias(n)).collect());
            }
            Some(OutputScale::OverNorm(range)) => put(range, (0..rows).map(|n| by_output(n) / norms[n]).collect()),
        }
        if let (Some(bias), Some(by_bias)) = (bias, by_bias)
            && let Some(range) = &case.overlay.vectors[bias.0]
        {
            put(range, by_bias.iter().zip(&plain.bias).map(|(g, factor)| g * factor).collect());
        }
    }
    expected
}

/// On attentions and MLPs, fused, interleaved and transposed ones among them, and on the head.
fn specs() -> [ModelSpec; 3] {
    [llama(true), everything(false), everything(true)]
}

fn same(what: &str, found: &[f32], expected: &[f32], tolerance: f64) {
    let error = relative(found, expected);
    assert!(error < tolerance, "{what}: {error}");
}

#[test]
fn what_stands_on_linears_computes_what_their_merged_weights_do() {
    // Few rows are computed in another way.
    for pass in [pass(&[9, 14, 2]), pass(&[3])] {
        for (name, kind) in KINDS {
            for spec in specs() {
                let case = case(&spec, kind, everywhere);
                let bare = Case::bare(&spec).logits(&pass);
                let found = case.logits(&pass);
                assert!(relative(&found, &bare) > 0.05, "{name}: nothing has changed");
                same(name, &found, &merged(&spec, &case).logits(&pass), 1e-5);
            }
        }
    }
}

#[test]
fn gradients_are_those_of_the_merged_weights_by_the_chain_rule() {
    let pass = pass(&[9, 14, 2]);
    for (name, kind) in KINDS {
        for spec in specs() {
            let case = case(&spec, kind, everywhere);
            let whole = merged(&spec, &case);
            let expected = expected_gradients(&case, &whole, &whole.gradient(&pass, Saving::Full));
            let found = case.gradient(&pass, Saving::Full);
            for param in case.overlay.layout.params() {
                let range = param.range.clone();
                assert!(expected[range.clone()].iter().any(|&g| g != 0.0), "{name}: {} has no gradient", param.name);
                same(&format!("{name}: {}", param.name), &found[range.clone()], &expected[range], 2e-5);
            }
            assert!(case.gradient(&pass, Saving::BlockInputs) == found, "{name}");
            let rounded = case.gradient(&pass, Saving::Bf16);
            for param in case.overlay.layout.params() {
                let range = param.range.clone();
                same(&format!("{name}, rounded: {}", param.name), &rounded[range.clone()], &found[range], 0.05);
            }
        }
    }
}

/// What is below a linear, and whether anything there is trained, decides what its backward computes.
#[test]
fn gradients_of_one_linear_alone_are_the_same_as_among_all() {
    let pass = pass(&[9, 14, 2]);
    for (name, kind) in KINDS {
        let spec = everything(false);
        let linears: Vec<String> = Case::bare(&spec).model.linears().iter().map(|l| l.name.clone()).collect();
        for linear in linears {
            let case = case(&spec, kind, |name| name == linear);
            let whole = merged(&spec, &case);
            let expected = expected_gradients(&case, &whole, &whole.gradient(&pass, Saving::Full));
            for saving in [Saving::Full, Saving::BlockInputs] {
                same(&format!("{name} on {linear}"), &case.gradient(&pass, saving), &expected, 2e-5);
            }
        }
    }
}

#[test]
fn gradients_are_those_of_the_loss() {
    let pass = pass(&[9, 14, 2]);
    for (name, kind) in KINDS {
        println!("{name}");
        case(&everything(true), kind, everywhere).check_gradient(&pass);
    }
}

/// Masks of terms differ, and apply to what an input scale leaves.
#[test]
fn gradients_are_those_of_the_loss_with_dropout() {
    let pass = pass(&[9, 14, 2]);
    let two = &[[Trained, Trained], [Frozen, Trained]];
    for kind in [
        Kind { low_rank: two, input_scale: true, plain: true, ..NONE },
        Kind { low_rank: two, over_norm: true, ..NONE },
        Kind { low_rank: two, ..NONE },
    ] {
        let mut case = case(&everything(true), kind, |name| name != "head");
        case.step = Some(Step { seed: 3, step: 5 });
        let without = case.loss(&pass);
        let dropouts = |case: &mut Case, of: [f32; 2]| {
            for change in &mut case.overlay.linears {
                change.low_rank.iter_mut().zip(of).for_each(|(term, dropout)| term.dropout = dropout);
            }
        };
        // One term reads what the other's mask hides.
        dropouts(&mut case, [0.3, 0.0]);
        let one = case.loss(&pass);
        dropouts(&mut case, [0.3, 0.5]);
        let both = case.loss(&pass);
        assert!((one - without).abs() > 1e-3 && (both - one).abs() > 1e-3, "{without}, {one}, {both}");
        case.check_gradient(&pass);
        dropouts(&mut case, [0.3, 0.0]);
        case.check_gradient(&pass);
    }
}

#[test]
fn rows_in_one_pass_add_up_to_what_each_gives_alone() {
    let lengths = [9, 14, 2];
    for (name, kind) in KINDS {
        let case = case(&everything(false), kind, everywhere);
        let together = case.gradient(&pass(&lengths), Saving::Full);
        let mut sum = vec![0.0; case.params.len()];
        for (number, &length) in lengths.iter().enumerate() {
            let mut pass = Pass::default();
            pass.push(number as u64, &row(number as u64, length), &vec![true; length]);
            sum.iter_mut().zip(case.gradient(&pass, Saving::Full)).for_each(|(sum, g)| *sum += g);
        }
        same(name, &together, &sum, 1e-5);
    }
}

#[test]
fn in_8_bits_all_is_close_to_what_it_is_in_f32() {
    let pass = pass(&[9, 14, 2, 17]);
    for (name, kind) in KINDS.into_iter().filter(|(_, kind)| !kind.weight) {
        for spec in [llama(true), everything(false)] {
            let case = case(&spec, kind, everywhere);
            let (compute, choices) = Compute::calibrate(
                &case.model,
                &case.overlay,
                &case.params,
                &pass,
                true,
                f64::INFINITY,
                Integers::Kept,
            );
            // A head on which anything stands is not computed in 8 bits.
            assert_eq!(choices.len(), case.model.linears().len() - 1, "{name}");
            let exact = case.gradient(&pass, Saving::Full);
            for saving in [Saving::Full, Saving::Bf16, Saving::BlockInputs] {
                let mut grads = vec![0.0; case.params.len()];
                case.run(&compute, &pass).loss_and_gradient(&mut grads, &mut Workspace::new(&case.model, saving));
                let error = relative(&grads, &exact);
                assert!(error > 1e-3 && error < 0.15, "{name} ({saving:?}): {error}");
            }
        }
    }
}

/// A head in 8 bits with nothing but frozen terms on it would lose them.
#[test]
fn frozen_terms_change_the_head_too() {
    let pass = pass(&[9, 14, 2]);
    let spec = llama(false);
    let mut case = case(&spec, Kind { low_rank: LOW_RANK, ..NONE }, |name| name != "head");
    let (rows, cols, r) = (common::VOCAB, common::HIDDEN, 2);
    let factor = |name: &str, n: usize| Factor::Frozen(Arc::from(values(name, n)));
    let term = LowRank { a: factor("A", r * cols), b: factor("B", rows * r), r, scale: 3.0, dropout: 0.0, key: 0 };
    case.overlay.linears.last_mut().unwrap().low_rank.push(term);
    let whole = merged(&spec, &case);
    same("logits", &case.logits(&pass), &whole.logits(&pass), 1e-5);
    let expected = expected_gradients(&case, &whole, &whole.gradient(&pass, Saving::Full));
    same("gradients", &case.gradient(&pass, Saving::Full), &expected, 2e-5);
    let (compute, _) =
        Compute::calibrate(&case.model, &case.overlay, &case.params, &pass, true, f64::INFINITY, Integers::Kept);
    let mut grads = vec![0.0; case.params.len()];
    case.run(&compute, &pass).loss_and_gradient(&mut grads, &mut Workspace::new(&case.model, Saving::Full));
    same("gradients in 8 bits", &grads, &expected, 0.1);
}

#[test]
fn a_cache_knows_what_the_whole_text_would() {
    for (name, kind) in KINDS {
        let case = case(&everything(false), kind, everywhere);
        let mut text = row(5, 20);
        let mut generation = Generation::new(&case.model, &case.overlay, &case.params, Sampling::GREEDY);
        for (n, token) in generation.run(&text, 12, &[], |_| true).into_iter().enumerate() {
            let mut pass = Pass::default();
            pass.push(0, &text, &[]);
            let logits = case.logits(&pass);
            let last = &logits[logits.len() - common::VOCAB..];
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]));
            assert_eq!(best, Some(token as usize), "{name}: token {n}");
            text.push(token);
        }
    }
}

/// What begins as its own norm changes nothing, to the last bit, and neither do scales of one.
#[test]
fn what_begins_as_the_identity_is_it() {
    let pass = pass(&[9, 14, 2]);
    let spec = everything(false);
    let bare = Case::bare(&spec).logits(&pass);
    for kind in [Kind { over_norm: true, low_rank: LOW_RANK, ..NONE }, Kind { input_scale: true, plain: true, ..NONE }]
    {
        let mut case = case(&spec, kind, everywhere);
        for id in 0..case.model.linears().len() {
            let change = case.overlay.linears[id].clone();
            for term in &change.low_rank {
                case.params[term.b.trained().unwrap().clone()].fill(0.0);
            }
            let ones = change.input_scale.iter().cloned();
            for range in ones.chain(change.output_scale.iter().map(|scale| scale.range().clone())) {
                case.params[range].fill(1.0);
            }
            if let Some(OutputScale::OverNorm(range)) = &change.output_scale {
                let norms = row_norms(&case.model.linears()[id].weight, &change, &case.params);
                case.params[range.clone()].copy_from_slice(&norms);
            }
        }
        case.refresh();
        assert!(case.logits(&pass) == bare);
    }
}

/// A row of zeros has no direction.
#[test]
fn a_row_of_zeros_stays_zero_under_its_norm() {
    let spec = llama(false);
    let mut case = case(&spec, Kind { weight: true, over_norm: true, ..NONE }, |name| name == "1.down");
    let change = case.overlay.linears.iter().find(|change| change.weight.is_some()).unwrap().clone();
    let start = change.weight.unwrap().start;
    case.params[start..start + common::INTERMEDIATE].fill(0.0);
    case.refresh();
    let logits = case.logits(&pass(&[5]));
    assert!(logits.iter().all(|v| v.is_finite()));
    let grads = case.gradient(&pass(&[5]), Saving::Full);
    assert!(grads.iter().all(|g| g.is_finite()));
    let m = change.output_scale.unwrap().range().start;
    assert_eq!(grads[m], 0.0);
    assert!(grads[m + 1] != 0.0);
}

/// Norms follow the parameters, in the buffers they had.
#[test]
fn norms_are_those_of_the_parameters_they_were_refreshed_with() {
    for (_, kind) in KINDS.into_iter().filter(|(_, kind)| kind.over_norm) {
        let mut case = case(&everything(true), kind, everywhere);
        let pass = pass(&[9, 14, 2]);
        let mut norms = std::mem::take(&mut case.norms);
        for (i, value) in case.params.iter_mut().enumerate() {
            *value *= 1.0 + 0.2 * random::symmetric(random::at(7, i as u64));
        }
        norms.refresh(&case.model, &case.overlay, &case.params);
        case.refresh();
        let mut workspace = Workspace::new(&case.model, Saving::None);
        let compute = Compute::default();
        let fresh = case.run(&compute, &pass).loss(&mut workspace);
        let run = Run { norms: &norms, ..case.run(&compute, &pass) };
        assert_eq!(run.loss(&mut workspace), fresh);
    }
}

/// Everything that can stand beside something else: nothing, each kind on linears, and what precedes rows.
fn beside_others(spec: &ModelSpec) -> Vec<Case> {
    let mut cases = vec![Case::bare(spec), Case::adapted(spec, 2), Case::adapted(spec, 3).with_virtual_tokens(2)];
    cases.push(Case::bare(spec).with_prefix(3));
    cases.extend(KINDS.iter().filter(|(_, kind)| !kind.bias).map(|(_, kind)| case(spec, *kind, |_| true)));
    // On a part of a group alone.
    cases.push(case(spec, KINDS[6].1, |name| !name.ends_with('k') && !name.ends_with("up")));
    cases
}

#[test]
fn texts_with_different_overlays_are_answered_together_as_each_alone() {
    let (mut stopped, mut whole) = (0, 0);
    for spec in [llama(false), llama(true), everything(false), encoder_decoder(true)] {
        let cases = beside_others(&spec);
        let standings: Vec<Standing<'_>> =
            cases.iter().map(|case| Standing { overlay: &case.overlay, params: &case.params }).collect();
        // Prompts of all lengths, some with a beginning in common, and each overlay three times.
        let question = |i: usize| Question { standing: i * 7 % cases.len(), ids: row(i as u64 % 5, 1 + i * 5 % 13) };
        let questions: Vec<Question> = (0..3 * cases.len()).map(question).collect();
        for sampling in [Sampling::GREEDY, Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 5 }] {
            let alone = |Question { standing, ids }: &Question| {
                let Standing { overlay, params } = standings[*standing];
                Generation::new(&cases[0].model, overlay, params, sampling).run(ids, 9, &[7, 8], |_| true)
            };
            let expected: Vec<Vec<u32>> = questions.iter().map(alone).collect();
            let ended = expected.iter().filter(|answer| answer.len() < 9).count();
            (stopped, whole) = (stopped + ended, whole + expected.len() - ended);
            for texts in [1, 4, 50] {
                let mut generation = Generation::of_many(&cases[0].model, &standings, texts, sampling);
                let mut answers = vec![None; questions.len()];
                generation.answer_all(
                    &questions,
                    9,
                    &[7, 8],
                    || true,
                    |number, answer| {
                        assert!(answers[number].replace(answer).is_none());
                        true
                    },
                );
                for (number, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
                    assert_eq!(answer.as_ref(), Some(expected), "{number} of {texts} at once, {:?}", questions[number]);
                }
            }
        }
    }
    assert!(stopped > 20 && whole > 20, "{stopped}, {whole}");
}

#[test]
fn texts_are_left_where_that_is_asked_for() {
    let case = Case::bare(&llama(false));
    let standing = Standing { overlay: &case.overlay, params: &case.params };
    let questions: Vec<Question> = (0..6).map(|i| Question { standing: 0, ids: row(i, 4) }).collect();
    let mut generation = Generation::of_many(&case.model, &[standing], 2, Sampling::GREEDY);
    let mut answered = 0;
    generation.answer_all(
        &questions,
        3,
        &[],
        || true,
        |_, _| {
            answered += 1;
            answered < 3
        },
    );
    assert_eq!(answered, 3);
    let mut steps = 0;
    let stop_at_once = || {
        steps += 1;
        false
    };
    generation.answer_all(&questions, 3, &[], stop_at_once, |_, _| panic!("nothing is done yet"));
    assert_eq!(steps, 1);
}
