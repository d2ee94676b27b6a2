//! Directories with weights in bitsandbytes' 4 bits, as transformers saves them (`goldens/make_bitsandbytes.py` makes them).

use std::fs;

use retune_model::checkpoint::Checkpoint;
use retune_testing::{checkpoint, goldens};
use safetensors::SafeTensors;

const QUERY: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn every_weight_has_the_values_of_bitsandbytes() {
    // NF4 with double quantization; FP4 without, its bytes declared as bf16; LLM.int8(); linears that GPT-2 has as [in, out], quantized as
    // [out, in].
    for (case, storage, count) in
        [("bnb_nf4_double", "NF4", 7), ("bnb_fp4_in_bf16", "FP4", 7), ("bnb_int8", "INT8", 7), ("bnb_gpt2", "NF4", 4)]
    {
        let checkpoint = checkpoint(case);
        checkpoint.check_finite().unwrap();
        let file = fs::read(goldens().join(case).join("golden.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(expected.len(), count);
        for (name, values) in expected.tensors() {
            let matrix = checkpoint.tensor(&name).unwrap();
            assert_eq!(matrix.storage(), storage, "{case}: {name}");
            assert_eq!([matrix.rows(), matrix.cols()], values.shape(), "{case}: {name}");
            let bytes: Vec<u8> = matrix.to_f32().iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(bytes, values.data(), "{case}: {name}");
        }
        for name in checkpoint.names().filter(|name| expected.tensor(name).is_err()) {
            assert_eq!(checkpoint.tensor(name).unwrap().storage(), "F32", "{case}: {name}");
        }
    }
}

/// A copy of a fixture whose weights' file has been changed.
fn changed(case: &str, change: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(goldens().join(case).join("config.json"), dir.path().join("config.json")).unwrap();
    let mut bytes = fs::read(goldens().join(case).join("model.safetensors")).unwrap();
    change(&mut bytes);
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    dir
}

/// Where the data of a tensor begins in the file.
fn data_of(bytes: &[u8], name: &str) -> usize {
    let (header, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    8 + header + metadata.info(name).unwrap().data_offsets.0
}

#[test]
fn the_hash_covers_every_part_of_a_weight() {
    let case = "bnb_nf4_double";
    let whole = checkpoint(case).content_hash();
    for part in ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"] {
        let dir = changed(case, |bytes| {
            let at = data_of(bytes, &format!("{QUERY}{part}"));
            bytes[at] ^= 1;
        });
        assert_ne!(Checkpoint::open(dir.path()).unwrap().content_hash(), whole, "{part}");
    }
}

#[test]
fn what_is_missing_or_damaged_is_named() {
    let refusal = |change: &dyn Fn(&mut Vec<u8>)| {
        let dir = changed("bnb_nf4_double", change);
        Checkpoint::open(dir.path()).err().expect("must be refused").to_string()
    };
    let text = refusal(&|bytes| {
        let key = format!("{QUERY}.absmax");
        let at = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
        bytes[at + key.len() - 3..at + key.len()].copy_from_slice(b"min");
    });
    assert!(text.contains(&format!("{QUERY}.absmax")) && text.contains("missing"), "{text}");
    let description = format!("{QUERY}.quant_state.bitsandbytes__nf4");
    let text = refusal(&|bytes| {
        let at = data_of(bytes, &description);
        bytes[at] = b'[';
    });
    assert!(text.contains(&description) && text.contains("is not valid"), "{text}");
    let other_format = changed("bnb_int8", |bytes| {
        let at = data_of(bytes, "model.layers.0.self_attn.q_proj.weight_format");
        bytes[at] = 2;
    });
    let text = Checkpoint::open(other_format.path()).err().expect("must be refused").to_string();
    assert!(text.contains("weight_format") && text.contains("[2]"), "{text}");
    let text = refusal(&|bytes| bytes.truncate(bytes.len() - 1));
    assert!(text.contains("model.safetensors") && text.contains("truncated"), "{text}");
}
