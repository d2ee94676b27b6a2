//! The memory that is planned for a pass: what Llama with LoRA keeps, counted by hand.

mod common;

use common::{Case, llama};
use retune_engine::Saving;
use retune_engine::overlay::OutputScale;
use retune_engine::pass::PassSize;
use retune_engine::workspace::Workspace;

#[test]
fn a_plan_for_llama_with_lora_is_the_sum_by_hand() {
    let case = Case::adapted(&llama(true), 4);
    let planned =
        |case: &Case, saving, int8, size| Workspace::planned_bytes(&case.model, &case.overlay, saving, int8, size);
    let (tokens, labels) = (100, 90);
    let size = PassSize { tokens, keys: tokens, labels, ..PassSize::default() };
    // Each of two layers: x twice; q, k, v; attention; log-sum-exp; gate and up; u of q, k and v, of o, of gate and up, of down.
    let layer = 2 * 32 + (32 + 16 + 16) + 32 + 4 + 2 * 48 + (3 + 1 + 2 + 1) * 4;
    assert_eq!(layer, 288);
    // What a layer keeps for a moment, where it is not kept to the backward: the same without x.
    let one = layer - 2 * 32;
    // Output of a norm, its gradient and that of the residual stream; activation; gradients of q, k and v.
    let temporary = 3 * 32 + 48 + (32 + 16 + 16);
    // Gradients of keys and values by query head, twice.
    let attention = 4 * 32;
    // Rows, normalised rows, their gradients, logits.
    let head = 4 * 32 + 96;
    let packing = 3 << 20;
    let rest = 4 * (tokens * (temporary + attention) + labels * head + packing);

    // And the last output.
    assert_eq!(planned(&case, Saving::Full, false, size), 4 * tokens * (2 * layer + 32) + rest);
    // In two bytes all but the log-sum-exp; in four a layer's, two inputs in turn and the last output.
    let rounded = 2 * tokens * 2 * (layer - 4) + 4 * tokens * 2 * 4 + 4 * tokens * (one + 3 * 32);
    assert_eq!(planned(&case, Saving::Bf16, false, size), rounded + rest);
    // Inputs of the layers, the residual stream after an attention, the last output.
    assert_eq!(planned(&case, Saving::BlockInputs, false, size), 4 * tokens * (one + (2 + 2) * 32) + rest);
    assert_eq!(planned(&case, Saving::None, false, size), 4 * tokens * (one + 2 * 32) + rest);

    let full = planned(&case, Saving::Full, false, size);
    // Keys and values of whole rows, and their gradients.
    let shared = PassSize { keys: 150, is_shared: true, ..size };
    assert_eq!(planned(&case, Saving::Full, false, shared), full + 4 * (50 * attention + 150 * 4 * 16));
    // Logits in 8 bits beside those in f32.
    assert_eq!(planned(&case, Saving::Full, true, size), full + labels * 96);
    // Rows that are scored have more labels than those that are trained.
    let scored = PassSize { scored_labels: 95, ..size };
    assert_eq!(planned(&case, Saving::Full, false, scored), full + 4 * 5 * head);
    let mut dropping = Case::adapted(&llama(true), 4);
    dropping.overlay.linears[0].low_rank[0].dropout = 0.1;
    // The input without the elements dropped, and a gradient before that.
    assert_eq!(planned(&dropping, Saving::Full, false, size), full + 4 * 2 * tokens * 48);
    // Outputs before their scale: of an MLP's up, of an attention's output, whose gradient is turned into that before the scale in a buffer
    // of its own, and of the head.
    let mut scaled = Case::adapted(&llama(true), 4);
    for (id, rows) in [(5, 48), (3, 32), (14, 96)] {
        scaled.overlay.linears[id].output_scale = Some(OutputScale::Plain(0..rows));
    }
    assert_eq!(
        planned(&scaled, Saving::Full, false, size),
        full + 4 * tokens * (48 + 32) + 4 * tokens * 32 + 4 * labels * 96
    );
    // What an MLP's output reads scaled, and the gradient of that.
    let mut scaled = Case::adapted(&llama(true), 4);
    scaled.overlay.linears[6].input_scale = Some(0..48);
    assert_eq!(planned(&scaled, Saving::Full, false, size), full + 4 * 2 * tokens * 48);
    // Nothing on the model keeps no projections.
    let bare = Case::bare(&llama(true));
    assert_eq!(planned(&bare, Saving::Full, false, size), full - 4 * tokens * 2 * 7 * 4);
}

#[test]
fn a_plan_counts_the_keys_and_values_that_a_prefix_lays_whole() {
    let (bare, case) = (Case::bare(&llama(true)), Case::bare(&llama(true)).with_prefix(7));
    let planned = |case: &Case, size| Workspace::planned_bytes(&case.model, &case.overlay, Saving::Full, false, size);
    let (tokens, labels) = (100, 90);
    let size = PassSize { tokens, keys: tokens, labels, ..PassSize::default() };
    // Two rows: scratch of the attention's backward by key, and keys, values and their gradients.
    let with = PassSize { keys: tokens + 2 * 7, ..size };
    assert_eq!(planned(&case, with), planned(&bare, size) + 4 * (2 * 7 * 4 * 32 + (tokens + 2 * 7) * 4 * 16));
}
