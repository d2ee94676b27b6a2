//! What stands before each row: virtual tokens that are computed like others, and keys and values that are found in every attention.

mod common;

use common::{Case, HIDDEN, VOCAB, everything, llama, relative, row};
use retune_engine::calibrate::Integers;
use retune_engine::compute::Compute;
use retune_engine::generate::{Generation, Sampling};
use retune_engine::pass::Pass;
use retune_engine::spec::{LongFrequencies, LongRope, ModelSpec, frequencies};
use retune_engine::workspace::Workspace;
use retune_engine::{Saving, work_of_step};

/// A model whose lowest sub-layer is no attention.
fn mlp_first() -> ModelSpec {
    let mut spec = llama(false);
    spec.decoder.blocks.iter_mut().for_each(|block| block.sub_layers.reverse());
    spec
}

/// Grouped heads with a rotation; and what no family has together, learned positions, a scaled and normalised table, a window of five, a cap,
/// normalised heads and a bias by distance among it.
fn specs() -> [ModelSpec; 3] {
    [llama(false), everything(false), mlp_first()]
}

/// The cases: more before each row than a window of `everything` sees, and both kinds together.
fn cases() -> Vec<Case> {
    let of = |spec: &ModelSpec| {
        [
            Case::bare(spec).with_virtual_tokens(7),
            Case::bare(spec).with_prefix(7),
            Case::adapted(spec, 3).with_virtual_tokens(2).with_prefix(3),
        ]
    };
    specs().iter().flat_map(of).collect()
}

/// Logits of the own tokens of the pass's only row.
fn row_logits(case: &Case, pass: &Pass) -> Vec<f32> {
    let tokens: Vec<u32> = pass.tokens_of(&pass.sequences[0]).collect();
    case.run(&Compute::default(), pass).logits(&tokens, &mut Workspace::new(&case.model, Saving::None))
}

fn logits_of(case: &Case, ids: &[u32]) -> Vec<f32> {
    let mut pass = case.empty_pass(false);
    pass.push(0, ids, &[]);
    row_logits(case, &pass)
}

#[test]
fn the_gradient_of_what_stands_before_rows_is_that_of_the_loss() {
    for mut case in cases() {
        let pass = case.pass(&[9, 14, 2]);
        case.check_gradient(&pass);
    }
    // With everything else trained as well.
    let mut case = Case::whole(&everything(true), false).with_virtual_tokens(3).with_prefix(4);
    let pass = case.pass(&[6, 11]);
    case.check_gradient(&pass);
}

/// Rows of which some begin alike, one by one, in one pass, and in one with what they have in common once.
#[test]
fn rows_in_one_pass_are_what_they_are_alone_in_every_mode_of_saving() {
    let beginning = row(1, 12);
    let rows: Vec<Vec<u32>> =
        vec![row(3, 9), [&beginning[..], &row(4, 5)].concat(), [&beginning[..], &row(5, 3)].concat(), row(6, 1)];
    let mut all = cases();
    all.push(Case::bare(&everything(false)).with_virtual_tokens(9).with_prefix(2));
    for case in &all {
        let [mut packed, mut shared] = [false, true].map(|share| case.empty_pass(share));
        let mut alone = Vec::new();
        for (number, ids) in rows.iter().enumerate() {
            let mut pass = case.empty_pass(false);
            for pass in [&mut packed, &mut shared, &mut pass] {
                pass.push(number as u64, ids, &vec![true; ids.len()]);
            }
            alone.push(pass);
        }
        assert!(shared.is_shared() && !packed.is_shared());
        let run = |saving, passes: &[&Pass]| {
            let mut workspace = Workspace::new(&case.model, saving);
            let mut grads = vec![0.0; case.params.len()];
            let compute = Compute::default();
            let losses =
                passes.iter().map(|pass| case.run(&compute, pass).loss_and_gradient(&mut grads, &mut workspace));
            (losses.sum::<f64>(), grads)
        };
        let (exact_loss, exact) = run(Saving::Full, &alone.iter().collect::<Vec<_>>());
        for saving in [Saving::Full, Saving::BlockInputs, Saving::Bf16] {
            for pass in [&packed, &shared] {
                let (loss, grads) = run(saving, &[pass]);
                let (of_loss, of_gradient) = if saving == Saving::Bf16 { (0.02, 0.1) } else { (1e-5, 2e-5) };
                assert!((loss - exact_loss).abs() < of_loss * exact_loss, "{saving:?}: {loss} and {exact_loss}");
                for param in case.overlay.layout.params() {
                    let error = relative(&grads[param.range.clone()], &exact[param.range.clone()]);
                    assert!(error < of_gradient, "{saving:?}, shared {}: {} {error}", pass.is_shared(), param.name);
                }
            }
        }
    }
}

/// A virtual token whose row is that of a token, scaled as the table scales it, is that token.
#[test]
fn a_virtual_token_is_a_token_with_any_row() {
    let (first, ids) = ([90, 91, 92], row(2, 8).iter().map(|id| id % 90).collect::<Vec<u32>>());
    for spec in specs() {
        let plain = Case::whole(&spec, false);
        let table = plain.overlay.table.clone().unwrap();
        let mut case = Case::whole(&spec, false).with_virtual_tokens(first.len());
        let rows = case.overlay.virtual_tokens.clone().unwrap().rows;
        let scale = spec.table.scale;
        for (i, &id) in first.iter().enumerate() {
            let from = table.start + id as usize * HIDDEN;
            for j in 0..HIDDEN {
                case.params[rows.start + i * HIDDEN + j] = scale * plain.params[from + j];
            }
        }
        let text = [&first[..], &ids].concat();
        let mut whole = Pass::default();
        whole.push(0, &text, &[vec![false; 3], vec![true; ids.len()]].concat());
        let mut pass = case.empty_pass(false);
        pass.push(0, &ids, &vec![true; ids.len()]);
        let (ours, theirs) = (case.logits(&pass), plain.logits(&whole));
        assert!(relative(&ours, &theirs) < 1e-6, "{}", relative(&ours, &theirs));
        assert_eq!(row_logits(&case, &pass), ours[first.len() * VOCAB..]);
        let (ours, theirs) = (case.gradient(&pass, Saving::Full), plain.gradient(&whole, Saving::Full));
        // What stands for the whole row stands for each tensor, but that the table has no gradient where the virtual tokens stand.
        let of_first = table.start + first[0] as usize * HIDDEN..table.start + (first[2] as usize + 1) * HIDDEN;
        let of_rows: Vec<f32> = ours[rows.clone()].iter().map(|g| scale * g).collect();
        assert!(relative(&of_rows, &theirs[of_first.clone()]) < 1e-5);
        assert!(ours[of_first.clone()].iter().all(|&g| g == 0.0));
        for rest in [0..of_first.start, of_first.end..plain.params.len()] {
            assert!(relative(&ours[rest.clone()], &theirs[rest]) < 1e-5);
        }
    }
}

/// The keys and values that a text left, rotated, windowed and at their positions, are to what follows what the text is.
#[test]
fn a_prefix_of_a_texts_keys_and_values_is_that_text() {
    let (text, rest) = (row(7, 7), row(8, 12));
    for spec in specs() {
        let plain = Case::bare(&spec);
        let mut generation = Generation::new(&plain.model, &plain.overlay, &plain.params, Sampling::GREEDY);
        generation.read(&text);
        let mut case = Case::bare(&spec).with_prefix(text.len());
        case.params = generation.keys_and_values().unwrap();
        let whole = logits_of(&plain, &[&text[..], &rest].concat());
        let (ours, theirs) = (logits_of(&case, &rest), &whole[text.len() * VOCAB..]);
        assert!(relative(&ours, theirs) < 1e-5, "{}", relative(&ours, theirs));
        assert!(relative(&logits_of(&plain, &rest), theirs) > 0.05, "the text makes no difference");
        // A prefix of what was read after a prefix is both.
        let mut generation = Generation::new(&case.model, &case.overlay, &case.params, Sampling::GREEDY);
        generation.read(&rest[..2]);
        let mut longer = Case::bare(&spec).with_prefix(text.len() + 2);
        longer.params = generation.keys_and_values().unwrap();
        let (ours, theirs) = (logits_of(&longer, &rest[2..]), &theirs[2 * VOCAB..]);
        assert!(relative(&ours, theirs) < 1e-5, "{}", relative(&ours, theirs));
    }
}

#[test]
fn keys_and_values_that_a_window_let_go_of_are_no_prefix() {
    let case = Case::bare(&everything(false));
    let mut generation = Generation::new(&case.model, &case.overlay, &case.params, Sampling::GREEDY);
    row(7, 12).iter().for_each(|&id| generation.read(&[id]));
    assert_eq!(generation.keys_and_values(), None);
}

/// Prompts of more than a chunk, and texts that become long on the way: what stands before them counts.
#[test]
fn generation_with_a_cache_is_what_the_whole_text_says() {
    let mut long = llama(false);
    long.ropes[0].long = Some(LongRope { beyond: 16, frequencies: LongFrequencies::Fixed(frequencies(300.0, 8)) });
    let mut dynamic = long.clone();
    dynamic.ropes[0].long.as_mut().unwrap().frequencies = LongFrequencies::Dynamic { theta: 1e4, factor: 2.0 };
    for (spec, prompt, count) in [
        (llama(false), 600, 3),
        (everything(false), 20, 25),
        (mlp_first(), 3, 8),
        // With seven before it the fourth token, or the one after it, makes it long.
        (long, 5, 12),
        (dynamic, 5, 4),
    ] {
        for case in [
            Case::bare(&spec).with_virtual_tokens(7),
            Case::bare(&spec).with_prefix(7),
            Case::bare(&spec).with_virtual_tokens(4).with_prefix(3),
        ] {
            let mut text = row(5, prompt);
            let mut generation = Generation::new(&case.model, &case.overlay, &case.params, Sampling::GREEDY);
            let generated = generation.run(&text, count, &[], |_| true);
            assert_eq!(generated.len(), count);
            for &token in &generated {
                let logits = logits_of(&case, &text);
                let last = &logits[logits.len() - VOCAB..];
                let best = (0..VOCAB).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
                assert_eq!(best as u32, token, "after {} of {:?}", text.len(), spec.ropes);
                text.push(token);
            }
        }
    }
}

#[test]
fn linears_in_8_bits_give_nearly_the_same() {
    for case in [
        Case::bare(&llama(false)).with_virtual_tokens(9).with_prefix(3),
        Case::adapted(&llama(false), 3).with_virtual_tokens(4),
    ] {
        let pass = case.pass(&[30, 25]);
        let calibrate =
            Compute::calibrate(&case.model, &case.overlay, &case.params, &pass, true, f64::INFINITY, Integers::Kept);
        let (compute, _) = calibrate;
        assert!(compute.uses_int8());
        let mut workspace = Workspace::new(&case.model, Saving::Bf16);
        let mut grads = vec![0.0; case.params.len()];
        let loss = case.run(&compute, &pass).loss_and_gradient(&mut grads, &mut workspace);
        let exact = case.loss(&pass);
        assert!((loss - exact).abs() < 0.01 * exact, "{loss} and {exact}");
        let error = relative(&grads, &case.gradient(&pass, Saving::Full));
        assert!(error < 0.1, "{error}");
    }
}

#[test]
fn positions_and_tokens_of_a_row_count_what_stands_before_it() {
    let case = Case::bare(&everything(false)).with_virtual_tokens(4).with_prefix(3);
    assert_eq!(case.overlay.most_tokens(&case.model.spec), Some(common::CONTEXT - 7));
    let case = Case::bare(&llama(false)).with_prefix(3);
    assert_eq!(case.overlay.most_tokens(&case.model.spec), None);
}

#[test]
#[should_panic(expected = "not made for this overlay")]
fn a_pass_for_another_overlay_is_refused() {
    let case = Case::bare(&llama(false)).with_virtual_tokens(4);
    case.loss(&common::pass(&[9]));
}

/// What a benchmark holds its times against: a prefix is attended to and nothing else, virtual tokens are computed.
#[test]
fn the_work_of_a_step_counts_what_stands_before_rows() {
    let spec = llama(false);
    let work = |case: &Case, lengths: &[usize], name: &str| {
        let all = work_of_step(&case.model, &case.overlay, &Compute::default(), lengths, Saving::Full);
        all.into_iter().find(|(of, _)| *of == name).unwrap().1.f32_operations
    };
    let plain = Case::adapted(&spec, 2);
    let (tokens, prefix) = (Case::adapted(&spec, 2).with_virtual_tokens(5), Case::adapted(&spec, 2).with_prefix(5));
    for name in ["attention", "attention_backward"] {
        assert!(work(&plain, &[10, 20], name) > 0.0, "{name}");
        assert_eq!(work(&tokens, &[10, 20], name), work(&plain, &[15, 25], name), "{name}");
    }
    // And the gradient of what the lowest q, k and v read, by their weights and low-rank terms.
    let lowest = 2 * 40 * HIDDEN * (32 + 16 + 16) + 3 * 2 * 40 * 2 * HIDDEN;
    assert_eq!(work(&tokens, &[10, 20], "linear"), work(&plain, &[15, 25], "linear") + lowest as f64);
    assert_eq!(work(&prefix, &[10, 20], "linear"), work(&plain, &[10, 20], "linear"));
    // Each of 30 queries sees five keys more, in each of two layers, in products for scores and for values.
    let more = work(&prefix, &[10, 20], "attention") - work(&plain, &[10, 20], "attention");
    assert_eq!(more, (2 * 4 * 30 * 5 * HIDDEN) as f64);
}
