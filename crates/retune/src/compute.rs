//! The arithmetic of the frozen base: what `base.compute` and `--compute` ask for, done to a model and put into words.

use retune_engine::calibrate::{Choice, ERROR_LIMIT, Integers};
use retune_engine::compute as engine;
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_engine::pass::{Pass, Prelude};
use retune_kernels::isa::int8_isa;
use retune_train::data::{Example, order};
use retune_train::run_config::{Compute, Int8Copy};
use retune_train::trainer::fill_pass;
use serde_json::{Value, json};

/// Tokens of the pass on which errors are measured.
const CALIBRATION_TOKENS: usize = 512;
/// Names listed of layers that stay in f32.
const LISTED: usize = 6;

/// The largest error of a linear in int8; `None` when all is computed in f32.
pub fn limit(compute: Compute) -> Option<f64> {
    match compute {
        Compute::F32 => None,
        Compute::Int8 => Some(f64::INFINITY),
        Compute::Auto => int8_isa().is_fast().then_some(ERROR_LIMIT),
    }
}

/// What becomes of the integers of weights in 8 bits, where all else takes `others` bytes: kept, if that fits into `free`.
pub fn integers(model: &Model, overlay: &Overlay, asked: Int8Copy, others: usize, free: Option<u64>) -> Integers {
    let kept = engine::Compute::planned_int8_bytes(model, overlay, Integers::Kept);
    match asked {
        Int8Copy::Always => Integers::Kept,
        Int8Copy::Never => Integers::Remade,
        Int8Copy::Auto if free.is_some_and(|free| (others + kept) as u64 > free) => Integers::Remade,
        Int8Copy::Auto => Integers::Kept,
    }
}

/// Rows from all over the data, for a file may be sorted; as many as a calibration looks at, and for the same data the same. Each comes after
/// `prelude`.
pub fn calibration_pass(prelude: &Prelude, examples: &[Example]) -> Pass {
    let mut pass = Pass::new(prelude.clone(), false);
    let rows = order(0, 0, examples.len(), true);
    fill_pass(&mut pass, examples, &rows, 0, CALIBRATION_TOKENS);
    pass
}

/// The arithmetic asked for, measured on `pass`, and how each linear is computed: nothing is said of f32.
pub fn choose(
    model: &Model,
    overlay: &Overlay,
    params: &[f32],
    compute: Compute,
    integers: Integers,
    pass: &Pass,
    backward: bool,
) -> (engine::Compute, Vec<Choice>) {
    match limit(compute) {
        Some(limit) => engine::Compute::calibrate(model, overlay, params, pass, backward, limit, integers),
        None => Default::default(),
    }
}

/// What was chosen, in lines.
pub fn describe(choices: &[Choice]) -> Vec<String> {
    let int8: Vec<&Choice> = choices.iter().filter(|choice| choice.int8).collect();
    if choices.is_empty() {
        return vec!["f32".to_owned()];
    }
    let mut lines = vec![if int8.is_empty() {
        format!("f32 in all {} linears", choices.len())
    } else {
        let isa = int8_isa();
        let bits = if isa.bits() == 8 { String::new() } else { format!(", {} bits", isa.bits()) };
        format!("int8 ({isa}{bits}) in {} of {} linears, the others in f32", int8.len(), choices.len())
    }];
    let largest = |error: fn(&Choice) -> Option<f64>| {
        let with = int8.iter().filter_map(|choice| Some((error(choice)?, &choice.name)));
        with.max_by(|a, b| a.0.total_cmp(&b.0))
    };
    let forward = largest(|choice| Some(choice.forward_error));
    for (what, found) in [("output", forward), ("input gradient", largest(|choice| choice.backward_error))] {
        if let Some((error, name)) = found {
            lines.push(format!("largest relative error of an {what}: {:.1}% ({name})", 100.0 * error));
        }
    }
    let others: Vec<&str> = choices.iter().filter(|choice| !choice.int8).map(|choice| choice.name.as_str()).collect();
    if !others.is_empty() {
        let more = if others.len() > LISTED { format!(" and {} more", others.len() - LISTED) } else { String::new() };
        lines.push(format!("in f32, for their error in int8: {}{more}", others[..others.len().min(LISTED)].join(", ")));
    }
    lines
}

/// The same for programs.
pub fn summary(choices: &[Choice]) -> Value {
    let f32: Vec<&str> = choices.iter().filter(|choice| !choice.int8).map(|choice| choice.name.as_str()).collect();
    json!({
        "arithmetic": if choices.iter().any(|choice| choice.int8) { "int8" } else { "f32" },
        "int8_linears": choices.len() - f32.len(),
        "f32_for_their_error": f32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_calibration_sees_rows_from_all_over_the_data() {
        let examples: Vec<Example> = (0..1000)
            .map(|row| Example { row, source: vec![], ids: vec![row as u32; 16], trained: vec![true; 16] })
            .collect();
        let rows = |pass: Pass| -> Vec<u64> { pass.sequences.iter().map(|sequence| sequence.row).collect() };
        let chosen = rows(calibration_pass(&Prelude::default(), &examples));
        assert_eq!(chosen.len(), CALIBRATION_TOKENS / 16);
        for quarter in 0..4 {
            let there = chosen.iter().filter(|&&row| row / 250 == quarter).count();
            assert!(there >= 2, "{there} of {chosen:?} in quarter {quarter}");
        }
        assert_eq!(rows(calibration_pass(&Prelude::default(), &examples)), chosen);
        assert_eq!(rows(calibration_pass(&Prelude::default(), &examples[..1])), [0]);
    }
}
