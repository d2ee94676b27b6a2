//! What a model's files leave unsaid, or what of them is not used, is told by the commands that compute with it.

mod common;

use common::{Folder, golden};

#[test]
fn what_was_filled_in_for_a_gguf_file_is_told() {
    let folder = Folder::with_run();
    let model = golden("gguf_gemma2/model.gguf");
    let output = folder.succeeds(&["logits", "--model", &model, "--tokens", "1,2", "--out", "logits.safetensors"]);
    let note = "! the file does not give query_pre_attn_scalar; 8 is used";
    assert!(output.stderr.contains(note), "{}", output.stderr);
}

#[test]
fn what_is_left_out_of_a_model_is_told() {
    let folder = Folder::with_run();
    let model = golden("gemma3_wrapped");
    let output = folder.succeeds(&["logits", "--model", &model, "--tokens", "1,2", "--out", "logits.safetensors"]);
    assert!(output.stderr.contains("! what sees pictures is left out: 23 tensors"), "{}", output.stderr);
}
