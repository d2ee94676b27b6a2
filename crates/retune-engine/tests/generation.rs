//! How the next token is chosen, and that a cache knows what the whole text would.

mod common;

use std::collections::BTreeMap;

use common::{Case, everything, llama, row};
use retune_engine::generate::{Generation, Sampling};
use retune_engine::pass::Pass;
use retune_engine::spec::{LongFrequencies, LongRope, frequencies};

const SAMPLING: Sampling = Sampling { temperature: 0.7, top_p: 1.0, top_k: 0, seed: 3 };

/// Logits of what follows a text.
fn next_logits(case: &Case, text: &[u32]) -> Vec<f32> {
    let mut pass = Pass::default();
    pass.push(0, text, &[]);
    let logits = case.logits(&pass);
    logits[logits.len() - case.model.spec.vocab_size..].to_vec()
}

/// Tokens from the most likely down, with their probabilities.
fn ranked(logits: &[f32], temperature: f32) -> Vec<(u32, f64)> {
    let weight = |logit: f32| (f64::from(logit) / f64::from(temperature)).exp();
    let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
    let mut tokens: Vec<(u32, f64)> = logits.iter().zip(0..).map(|(&logit, id)| (id, weight(logit) / total)).collect();
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
    tokens
}

fn generation(case: &Case, sampling: Sampling) -> Generation<'_> {
    Generation::new(&case.model, &case.overlay, &case.params, sampling)
}

/// How often each token is drawn after a text.
fn drawn(case: &Case, sampling: Sampling, text: &[u32], draws: usize) -> BTreeMap<u32, usize> {
    let mut generation = generation(case, sampling);
    generation.read(text);
    let mut counts = BTreeMap::new();
    (0..draws).for_each(|_| *counts.entry(generation.next_token()).or_default() += 1);
    counts
}

/// Asserts that the tokens of `kept` are drawn as often as their probabilities among themselves say, and no others.
fn check(case: &Case, sampling: Sampling, text: &[u32], kept: &[(u32, f64)]) {
    const DRAWS: usize = 4000;
    let counts = drawn(case, sampling, text, DRAWS);
    let total: f64 = kept.iter().map(|(_, p)| p).sum();
    for (id, p) in kept {
        let (expected, found) = (p / total, *counts.get(id).unwrap_or(&0) as f64 / DRAWS as f64);
        // Five times the deviation.
        let deviation = (expected * (1.0 - expected) / DRAWS as f64).sqrt();
        assert!((found - expected).abs() <= 5.0 * deviation, "{sampling:?}: {id} {found} instead of {expected}");
    }
    let others: Vec<&u32> = counts.keys().filter(|id| kept.iter().all(|(of_kept, _)| of_kept != *id)).collect();
    assert!(others.is_empty(), "{sampling:?}: {others:?} are drawn too");
}

#[test]
fn tokens_are_drawn_by_their_probabilities_among_those_that_are_kept() {
    let case = Case::bare(&llama(false));
    let text = row(1, 9);
    let ranked = ranked(&next_logits(&case, &text), SAMPLING.temperature);
    check(&case, SAMPLING, &text, &ranked);
    check(&case, Sampling { top_k: 3, ..SAMPLING }, &text, &ranked[..3]);
    check(&case, Sampling { top_k: 1000, ..SAMPLING }, &text, &ranked);
    // The smallest number of tokens that together have the probability.
    let reach = |of: &[(u32, f64)], top_p: f64| {
        let total: f64 = of.iter().map(|(_, p)| p).sum();
        let mut sum = 0.0;
        of.iter()
            .position(|(_, p)| {
                sum += p;
                sum >= top_p * total
            })
            .unwrap()
            + 1
    };
    let nucleus = reach(&ranked, 0.6);
    assert!(nucleus > 2 && nucleus < ranked.len() / 2, "{nucleus}");
    check(&case, Sampling { top_p: 0.6, ..SAMPLING }, &text, &ranked[..nucleus]);
    // Of both the second is of what the first has left.
    let both = reach(&ranked[..8], 0.6);
    assert!(both < nucleus && both < 8, "{both}");
    check(&case, Sampling { top_k: 8, top_p: 0.6, ..SAMPLING }, &text, &ranked[..both]);
}

#[test]
fn one_token_that_is_kept_is_the_most_likely_one() {
    let case = Case::bare(&everything(false));
    let text = row(2, 9);
    let greedy = generation(&case, Sampling::GREEDY).run(&text, 8, &[], |_| true);
    assert_eq!(greedy.len(), 8);
    let mut read = text.clone();
    for &token in &greedy {
        assert_eq!(ranked(&next_logits(&case, &read), 1.0)[0].0, token);
        read.push(token);
    }
    for sampling in [Sampling { top_k: 1, ..SAMPLING }, Sampling { top_p: 1e-6, ..SAMPLING }] {
        assert_eq!(generation(&case, sampling).run(&text, 8, &[], |_| true), greedy, "{sampling:?}");
    }
    // It ends before a token that stops it, after the number asked for, and where it is told to.
    let stop = generation(&case, Sampling::GREEDY).run(&text, 8, &greedy[2..3], |_| true);
    assert!(greedy.starts_with(&stop) && stop.len() <= 2, "{stop:?}");
    let mut count = 0;
    let ended = generation(&case, Sampling::GREEDY).run(&text, 8, &[], |_| {
        count += 1;
        count < 3
    });
    assert_eq!(ended, greedy[..3]);
    assert!(generation(&case, Sampling::GREEDY).run(&[], 8, &[], |_| true).is_empty());
}

#[test]
fn a_seed_gives_the_same_text_again_and_another_seed_another() {
    let case = Case::bare(&llama(false));
    let text = row(1, 9);
    let run = |seed| generation(&case, Sampling { seed, ..SAMPLING }).run(&text, 20, &[], |_| true);
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

/// Prompts of more than a chunk, and texts that become long on the way: all of such a text is rotated by its length, as in training.
#[test]
fn a_cache_knows_what_the_whole_text_would() {
    let mut long = llama(false);
    long.ropes[0].long = Some(LongRope { beyond: 16, frequencies: LongFrequencies::Fixed(frequencies(300.0, 8)) });
    let mut beyond_a_chunk = long.clone();
    beyond_a_chunk.ropes[0].long.as_mut().unwrap().beyond = 515;
    let mut dynamic = long.clone();
    dynamic.ropes[0].long.as_mut().unwrap().frequencies = LongFrequencies::Dynamic { theta: 1e4, factor: 2.0 };
    // A dynamic rotation turns by the length so far, as transformers does: one token after the prompt is all there is to compare.
    for (spec, prompt, count) in [
        (llama(false), 600, 4),
        (everything(false), 20, 30),
        (long.clone(), 5, 20),
        (long, 600, 4),
        (beyond_a_chunk.clone(), 510, 10),
        (beyond_a_chunk, 600, 4),
        (dynamic.clone(), 600, 1),
        (dynamic, 10, 6),
    ] {
        let case = Case::bare(&spec);
        let mut text = row(5, prompt);
        let generated = generation(&case, Sampling::GREEDY).run(&text, count, &[], |_| true);
        for (n, &token) in generated.iter().enumerate() {
            let ranked = ranked(&next_logits(&case, &text), 1.0);
            assert_eq!(ranked[0].0, token, "token {n} after {prompt} of {:?}", spec.ropes);
            text.push(token);
        }
        assert_eq!(generated.len(), count);
    }
}

/// A conversation goes on, is changed at its end, and begins anew: a cache that goes back knows what the whole text would.
#[test]
fn a_text_that_begins_like_the_one_before_is_read_from_where_they_part() {
    let mut long = llama(false);
    long.ropes[0].long = Some(LongRope { beyond: 16, frequencies: LongFrequencies::Fixed(frequencies(300.0, 8)) });
    let cases = [
        Case::bare(&llama(false)),
        Case::bare(&everything(false)),
        Case::bare(&long),
        Case::bare(&llama(false)).with_virtual_tokens(3),
        Case::bare(&llama(false)).with_prefix(4),
    ];
    let first = row(3, 12);
    let texts = [
        first.clone(),
        [&first[..], &row(4, 7)].concat(),
        [&first[..9], &row(5, 3)].concat(),
        first[..5].to_vec(),
        first.clone(),
        row(6, 20),
        row(6, 20),
    ];
    for case in &cases {
        let mut kept = generation(case, Sampling::GREEDY);
        for (number, text) in texts.iter().enumerate() {
            kept.read_text(text);
            let mut new = generation(case, Sampling::GREEDY);
            new.read(text);
            let answers = [&mut kept, &mut new].map(|generation| generation.go_on(4, &[], |_| true));
            assert_eq!(answers[0], answers[1], "text {number}");
        }
    }
}
