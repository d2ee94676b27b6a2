//! A decoder that looks at an encoder's output: gradients, what is kept for them, where the backward stops, and generation.

mod common;

use common::{Case, encoder_decoder, relative, row};
use retune_engine::Saving;
use retune_engine::compute::Compute;
use retune_engine::generate::{Generation, Sampling};
use retune_engine::overlay::{Factor, OutputScale};
use retune_engine::spec::Buckets;
use retune_engine::workspace::Workspace;

/// Lengths of rows; their sources have others.
const LENGTHS: [usize; 4] = [5, 1, 9, 3];

#[test]
fn gradients_are_those_of_the_loss() {
    for tied in [false, true] {
        let mut case = Case::whole(&encoder_decoder(tied), false);
        let pass = case.pass(&LENGTHS);
        case.check_gradient(&pass);
    }
    let mut adapted = Case::adapted(&encoder_decoder(true), 2).with_virtual_tokens(3).with_prefix(2);
    // A scale of the output of one of the linears on the encoder's output.
    let memory = adapted.model.linears().iter().position(|linear| linear.name == "0.cross.k").unwrap();
    let scale = adapted.add("scale", vec![32], &[0.7; 32]);
    adapted.overlay.linears[memory].output_scale = Some(OutputScale::Plain(scale));
    let input_scale = adapted.add("input scale", vec![32], &[1.3; 32]);
    adapted.overlay.linears[memory + 1].input_scale = Some(input_scale);
    let pass = adapted.pass(&LENGTHS);
    adapted.check_gradient(&pass);
}

#[test]
fn two_attentions_may_read_the_same_prefix() {
    let mut case = Case::bare(&encoder_decoder(false)).with_prefix(3);
    if let Some(prefix) = &mut case.overlay.prefix {
        prefix.places = vec![1, 1];
    }
    let pass = case.pass(&LENGTHS);
    let gradient = case.gradient(&pass, Saving::Full);
    let (first, second): (Vec<f32>, Vec<f32>) = gradient.chunks(64).fold(Default::default(), |(mut a, mut b), row| {
        a.extend(&row[..32]);
        b.extend(&row[32..]);
        (a, b)
    });
    assert!(first.iter().all(|&g| g == 0.0) && second.iter().any(|&g| g != 0.0));
    // Keys and values of both attentions, moved together.
    let mut apart = Case::bare(&encoder_decoder(false)).with_prefix(3);
    for row in apart.params.chunks_mut(64) {
        let (first, second) = row.split_at_mut(32);
        first.copy_from_slice(second);
    }
    let of_both = apart.gradient(&pass, Saving::Full);
    let sums: Vec<f32> = of_both.chunks(64).flat_map(|row| (0..32).map(|i| row[i] + row[32 + i])).collect();
    let error = relative(&second, &sums);
    assert!(error < 1e-6, "{error}");
}

#[test]
fn what_is_kept_and_how_rows_are_packed_changes_nothing() {
    let case = Case::whole(&encoder_decoder(true), false);
    let pass = case.pass(&LENGTHS);
    let gradient = case.gradient(&pass, Saving::Full);
    assert!(case.gradient(&pass, Saving::BlockInputs) == gradient);
    let error = relative(&case.gradient(&pass, Saving::Bf16), &gradient);
    assert!(error > 0.0 && error < 0.02, "{error}");
    assert_eq!(
        case.loss(&pass),
        case.run(&Compute::default(), &pass).loss(&mut Workspace::new(&case.model, Saving::Full))
    );
    let mut alone = vec![0.0; gradient.len()];
    let mut workspace = Workspace::new(&case.model, Saving::Full);
    for (number, &length) in LENGTHS.iter().enumerate() {
        let mut pass = case.empty_pass(true);
        let source = row(100 + number as u64, 3 * length % 11 + 1);
        pass.push_answer(number as u64, &source, &row(number as u64, length), &vec![true; length]);
        case.run(&Compute::default(), &pass).loss_and_gradient(&mut alone, &mut workspace);
    }
    let error = relative(&alone, &gradient);
    assert!(error < 1e-5, "{error}");
}

#[test]
fn the_backward_reaches_what_is_trained_whatever_else_is() {
    let all = Case::adapted(&encoder_decoder(true), 2);
    let pass = all.pass(&LENGTHS);
    let gradient = all.gradient(&pass, Saving::Full);
    for name in ["encoder.1.down", "encoder.0.q", "0.cross.k", "1.cross.v", "1.cross.q", "1.down"] {
        let mut one = Case::adapted(&encoder_decoder(true), 2);
        let id = one.model.linears().iter().position(|linear| linear.name == name).unwrap();
        // The others keep their terms, which are trained no longer.
        for (_, change) in one.overlay.linears.iter_mut().enumerate().filter(|(other, _)| *other != id) {
            for term in &mut change.low_rank {
                let freeze = |factor: &Factor| Factor::Frozen(factor.values(&one.params).into());
                (term.a, term.b) = (freeze(&term.a), freeze(&term.b));
            }
        }
        let found = one.gradient(&pass, Saving::Full);
        for param in one.overlay.layout.params() {
            let is_of = param.name == format!("{name}.A") || param.name == format!("{name}.B");
            let (found, expected) = (&found[param.range.clone()], &gradient[param.range.clone()]);
            let is_right = if is_of { relative(found, expected) < 1e-5 } else { found.iter().all(|&g| g == 0.0) };
            assert!(is_right, "{name}: {}", param.name);
        }
    }
}

#[test]
fn a_cache_knows_what_the_whole_answer_would() {
    let bare = Case::bare(&encoder_decoder(true));
    let preceded = Case::adapted(&encoder_decoder(true), 2).with_virtual_tokens(3).with_prefix(2);
    for case in [bare, preceded] {
        let mut generation = Generation::new(&case.model, &case.overlay, &case.params, Sampling::GREEDY);
        for length in [7, 1, 20] {
            let source = row(length as u64, length);
            let answer = generation.run(&source, 12, &[], |_| true);
            assert_eq!(answer.len(), 12);
            let mut pass = case.empty_pass(false);
            pass.push_answer(0, &source, &answer, &[]);
            let logits = case.logits(&pass);
            for (token, logits) in answer.iter().zip(logits.chunks_exact(case.model.spec.vocab_size)) {
                let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                assert_eq!(best as u32, *token);
            }
        }
    }
}

/// By transformers' `T5Attention._relative_position_bucket`.
#[test]
fn buckets_are_exact_near_and_logarithmic_far() {
    let buckets = |count, max_distance, bidirectional| Buckets {
        name: String::new(),
        count,
        heads: 1,
        max_distance,
        bidirectional,
    };
    let both = buckets(32, 128, true);
    let of = |buckets: &Buckets, distances: &[isize]| distances.iter().map(|&d| buckets.bucket(d)).collect::<Vec<_>>();
    assert_eq!(of(&both, &[0, -1, -7, -8, -11, -12, -127, -500]), [0, 1, 7, 8, 8, 9, 15, 15]);
    assert_eq!(of(&both, &[1, 7, 8, 64, 127, 500]), [17, 23, 24, 30, 31, 31]);
    let back = buckets(32, 128, false);
    assert_eq!(of(&back, &[5, 0, -1, -15, -16, -18, -19, -127, -500]), [0, 0, 1, 15, 16, 16, 17, 31, 31]);
    // As many buckets as there are distances: nothing is out of range.
    for (count, bidirectional) in [(1, false), (2, true), (3, false), (8, true)] {
        let few = buckets(count, 20, bidirectional);
        assert!((-600..600).all(|distance| few.bucket(distance) < count));
    }
}
