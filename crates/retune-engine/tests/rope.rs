//! Rows of usual length and long ones, which are rotated otherwise, in one pass.

mod common;

use common::{Case, VOCAB, everything, llama, pass, relative};
use retune_engine::pass::Pass;
use retune_engine::spec::{LongFrequencies, LongRope, ModelSpec};
use retune_engine::{Saving, spec::frequencies};

const BEYOND: usize = 12;
const LENGTHS: [usize; 6] = [12, 13, 1, 30, 40, 5];

/// The specs with each of both kinds of long rotation.
fn specs() -> Vec<ModelSpec> {
    let mut specs = Vec::new();
    for spec in [llama(false), everything(false)] {
        let half = spec.ropes[0].frequencies.len();
        let fixed = LongFrequencies::Fixed(frequencies(300.0, 2 * half));
        for frequencies in [fixed, LongFrequencies::Dynamic { theta: 100.0, factor: 3.0 }] {
            let mut spec = spec.clone();
            spec.ropes[0].long = Some(LongRope { beyond: BEYOND, frequencies });
            specs.push(spec);
        }
    }
    specs
}

/// The logits of each row of a pass of all rows.
fn rows(case: &Case) -> Vec<Vec<f32>> {
    let pass = pass(&LENGTHS);
    let logits = case.logits(&pass);
    pass.sequences.iter().map(|s| logits[s.tokens.start * VOCAB..s.tokens.end * VOCAB].to_vec()).collect()
}

#[test]
fn each_row_is_rotated_by_its_own_length() {
    for spec in specs() {
        let case = Case::bare(&spec);
        let mut usual = spec.clone();
        usual.ropes[0].long = None;
        let together = rows(&case);
        for ((n, row), usual) in LENGTHS.iter().enumerate().zip(&together).zip(rows(&Case::bare(&usual))) {
            let mut alone = Pass::default();
            alone.push(n.0 as u64, &common::row(n.0 as u64, *n.1), &[]);
            let error = relative(row, &case.logits(&alone));
            assert!(error < 1e-5, "a row of {} tokens is {error} from what it is alone", n.1);
            let error = relative(row, &usual);
            match *n.1 > BEYOND {
                true => assert!(error > 1e-3, "a row of {} tokens is rotated as short ones: {error}", n.1),
                false => assert!(error < 1e-5, "a row of {} tokens is rotated as long ones: {error}", n.1),
            }
        }
    }
}

#[test]
fn the_gradient_of_rows_together_is_that_of_the_rows() {
    for spec in specs() {
        let case = Case::whole(&spec, false);
        let mut sum = vec![0.0; case.params.len()];
        for (n, &length) in LENGTHS.iter().enumerate() {
            let mut alone = Pass::default();
            alone.push(n as u64, &common::row(n as u64, length), &vec![true; length]);
            sum.iter_mut().zip(case.gradient(&alone, Saving::Full)).for_each(|(sum, g)| *sum += g);
        }
        for saving in [Saving::Full, Saving::BlockInputs] {
            let error = relative(&case.gradient(&pass(&LENGTHS), saving), &sum);
            assert!(error < 1e-5, "{saving:?}: {error}");
        }
    }
}
