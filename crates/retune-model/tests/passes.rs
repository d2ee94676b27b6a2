//! A pass of several rows computes what its rows compute alone: none sees another, none counts more or less for its place, and what rows
//! begin with in common counts for each of them where it is computed once.

use retune_engine::Saving;
use retune_engine::compute::Compute;
use retune_engine::pass::{Pass, Prelude};
use retune_engine::spec::{Attention, NormKind, Order, Positions, SubLayer};
use retune_testing::{Case, Lcg, relative};

/// From one token to more than a block of attention's queries.
const LENGTHS: [usize; 5] = [1, 17, 3, 70, 8];
/// Sums of f32 in another order.
const TOLERANCE: f64 = 1e-5;
/// What bfloat16 makes of the gradients of these models, some of which move by a tenth: something in the wrong place moves them by several times.
const ROUNDING: f64 = 0.2;

/// Ids and targets of a row.
type Row = (Vec<u32>, Vec<bool>);

/// The rows, of at most `longest` tokens, and how many of their tokens they share.
fn rows(vocab_size: usize, longest: usize) -> (Vec<Row>, usize) {
    let mut numbers = Lcg(7);
    let mut rows: Vec<Row> = LENGTHS.map(|length| numbers.row(length.min(longest), vocab_size)).into();
    let mut together = 0;
    // Rows that begin like others: with less than a block of attention's queries in common and with more, like one that does so itself, and
    // one that is the same to its end.
    for (row, shared, length) in [(1, 10, 30), (3, 66, 75), (5, 25, 26), (3, 66, 140), (6, 75, 75)] {
        let (is_whole, length) = (shared == length, length.min(longest));
        let shared = if is_whole { length } else { shared.min(length - 1) };
        let mut ids: Vec<u32> = rows[row].0[..shared].to_vec();
        ids.extend((shared..length).map(|_| numbers.below(vocab_size) as u32));
        rows.push((ids, numbers.targets(length)));
        // A row keeps at least one token of its own.
        together += shared.min(length - 1);
    }
    (rows, together)
}

/// The loss and the gradient of all passes together.
fn run(case: &Case, saving: Saving, passes: &[Pass]) -> (f64, Vec<f32>) {
    let (losses, grads) = case.gradient(&Compute::default(), saving, passes);
    (losses.iter().map(|&loss| f64::from(loss)).sum(), grads)
}

/// Compares rows in one pass, and with `shares` what they share computed once, with the same rows alone.
fn check(case: &Case, shares: bool) {
    let name = &case.name;
    let learned = case.model.spec.table.positions.is_some();
    let longest = if learned { case.model.spec.context } else { usize::MAX };
    let (mut packed, mut shared, mut alone) = (Pass::default(), Pass::new(Prelude::default(), true), Vec::new());
    let (rows, together) = rows(case.model.spec.vocab_size, longest);
    for (row, (ids, trained)) in rows.iter().enumerate() {
        packed.push(row as u64, ids, trained);
        shared.push(row as u64, ids, trained);
        let mut pass = Pass::default();
        pass.push(row as u64, ids, trained);
        alone.push(pass);
    }
    assert_eq!((packed.is_shared(), packed.tokens() - shared.tokens()), (false, together));
    let (_, exact) = run(case, Saving::Full, &alone);
    for saving in [Saving::Full, Saving::Bf16, Saving::BlockInputs] {
        let (expected_loss, expected) = run(case, saving, &alone);
        let error = relative(&expected, &exact);
        assert!(error < ROUNDING, "{name} ({saving:?}): the gradient is {error} from that of what is kept in f32");
        for param in case.overlay.layout.params() {
            let error = relative(&expected[param.range.clone()], &exact[param.range.clone()]);
            assert!(error < 2.0 * ROUNDING, "{name} ({saving:?}): gradient of {} {error} from it", param.name);
        }
        let passes = [(&packed, TOLERANCE), (&shared, tolerance_shared(saving))];
        for (pass, tolerance) in passes.into_iter().take(if shares { 2 } else { 1 }) {
            let what = format!("{name} ({saving:?}, shared {})", pass.is_shared());
            let (loss, grads) = run(case, saving, std::slice::from_ref(pass));
            assert!((loss - expected_loss).abs() < TOLERANCE * expected_loss, "{what}: {loss} and {expected_loss}");
            for param in case.overlay.layout.params() {
                let (ours, theirs) = (&grads[param.range.clone()], &expected[param.range.clone()]);
                assert!(theirs.iter().any(|g| *g != 0.0), "{what}: {} has no gradient", param.name);
                let error = relative(ours, theirs);
                assert!(error < tolerance, "{what}: gradient of {} {error}", param.name);
            }
        }
    }
}

/// What blocks of queries begin elsewhere give is rounded to bfloat16 elsewhere too.
fn tolerance_shared(saving: Saving) -> f64 {
    if saving == Saving::Bf16 { 100.0 * TOLERANCE } else { TOLERANCE }
}

/// Whether all sub-layers that have an attention have this of it.
fn attentions(case: &Case, has: impl Fn(&Attention) -> bool) -> bool {
    case.model.spec.sub_layers().filter_map(SubLayer::attention).all(has)
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_grouped_heads_and_a_window() {
    let case = Case::load("mistral_window");
    assert!(attentions(&case, |a| a.window.is_some() && a.keys < a.queries));
    check(&case, true);
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_adapters_on_all_linears() {
    // Trained values: with B at its first zeros A would have no gradient.
    for case in ["lora_all_linear", "lora_rs"] {
        check(&Case::load(case), true);
    }
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_norms_after_sub_layers_and_capped_scores() {
    let case = Case::load("gemma2");
    assert!(case.model.spec.sub_layers().all(|s| s.post_norm.is_some()));
    assert!(attentions(&case, |a| a.soft_cap.is_some()) && case.model.spec.head.soft_cap.is_some());
    // In one layer of the two.
    assert!(!attentions(&case, |a| a.window.is_some()) && !attentions(&case, |a| a.window.is_none()));
    check(&case, true);
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_norms_of_queries_and_keys_and_two_rotations() {
    let case = Case::load("gemma3");
    assert!(attentions(&case, |a| a.qk_norm.is_some()) && case.model.spec.ropes.len() == 2);
    check(&case, true);
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_learned_positions_and_layer_norms() {
    let case = Case::load("gpt2");
    assert!(case.model.spec.table.positions.is_some() && case.model.spec.decoder.norm.kind == NormKind::Layer);
    assert!(case.overlay.layout.params().iter().any(|param| param.transposed));
    check(&case, true);
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_heads_in_turn_and_a_bias_by_distance() {
    let case = Case::load("bloom");
    assert!(attentions(&case, |a| a.order == Order::Heads && a.positions == Positions::Alibi));
    assert!(case.model.spec.table.norm.is_some());
    check(&case, true);
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_all_inputs_in_one_linear() {
    let case = Case::load("phi3_window");
    assert!(case.model.spec.sub_layers().all(|s| s.inputs.len() == 1) && attentions(&case, |a| a.window.is_some()));
    check(&case, true);
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_queries_scaled_by_position() {
    let case = Case::load("ministral3");
    assert!(attentions(&case, |a| a.query_scale.is_some_and(|scale| scale.at(30) != scale.at(0))));
    check(&case, true);
}

#[test]
fn a_pass_of_several_rows_equals_its_rows_with_biases() {
    let case = Case::load("qwen2");
    assert!(case.model.spec.vectors().iter().any(|name| name.ends_with("q_proj.bias")));
    check(&case, true);
}

/// Their rotation depends on the length of the row, so that rows of different lengths have nothing in common: training shares nothing there.
#[test]
fn a_pass_of_several_rows_equals_its_rows_where_long_rows_are_rotated_otherwise() {
    for case in ["phi3_longrope", "rope_dynamic"] {
        let case = Case::load(case);
        let beyond = case.model.spec.ropes[0].long.as_ref().unwrap().beyond;
        assert!(LENGTHS.iter().any(|&n| n <= beyond) && LENGTHS.iter().any(|&n| n > beyond));
        check(&case, false);
    }
}
