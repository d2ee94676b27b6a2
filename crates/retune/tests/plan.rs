//! `retune plan`: what ways of training would take, without the weights.

mod common;

use std::fs;

use common::{Folder, joined};
use serde_json::{Value, json};

#[test]
fn a_plan_says_what_train_says() {
    let folder = Folder::with_run();
    for more in [&[][..], &["--set", "base.storage=nf4-double"], &["--set", "method=full", "--set", "adapter=null"]] {
        let short = ["run.yaml", "--set", "training.max_steps=1"];
        let planned = folder.succeeds(&joined(&[&["plan"], &short, more])).stdout;
        let messages = folder.succeeds(&joined(&[&["train", "--overwrite"], &short, more])).stderr;
        let row = planned.lines().find_map(|line| line.strip_prefix("as the run file says")).unwrap();
        let said = messages.lines().find_map(|line| line.strip_prefix("memory ")).unwrap();
        let columns: Vec<&str> = row.split("  ").map(str::trim).filter(|column| !column.is_empty()).collect();
        let [total, base, int8, trained, optimizer, activations, ..] = columns[..] else { panic!("{row}") };
        assert_eq!(said.trim().split(" planned").next().unwrap(), total, "{planned}\n{messages}");
        for part in [
            format!("base {base},"),
            format!("in int8 {int8},"),
            format!("with its gradient {trained},"),
            format!("optimizer {optimizer},"),
            format!("activations {activations} for"),
        ] {
            assert!(said.contains(&part), "{part}: {planned}\n{said}");
        }
    }
    assert!(folder.tree("plan").is_empty());
}

/// The shape of Llama 2 13B, without its weights.
fn shape(folder: &Folder) {
    let config = json!({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "torch_dtype": "float16", "tie_word_embeddings": false,
    });
    fs::create_dir(folder.path("shape")).unwrap();
    folder.write("shape/config.json", config.to_string());
}

#[test]
fn a_configuration_is_enough_to_plan_for_a_model() {
    let folder = Folder::with_run();
    shape(&folder);
    let args = ["plan", "run.yaml", "--set", "model=shape", "--set", "data.max_length=512"];
    let plan = |more: &[&str]| folder.succeeds(&joined(&[&args, more]));
    let report = plan(&["--json", "--memory-gb", "16"]).json();
    assert_eq!(report["parameters"], 13_015_864_320u64);
    assert_eq!(report["rows"]["longest"], 512);
    assert!(report["rows"]["assumed"].as_str().unwrap().contains("no tokenizer"), "{report}");
    let way = |name: &str| -> Value {
        let ways = report["ways"].as_array().unwrap();
        ways.iter().find(|way| way["name"] == name).unwrap_or_else(|| panic!("{name}: {report}")).clone()
    };
    let memory = |name: &str, part: &str| way(name)["memory"][part].as_f64().unwrap();
    // Weights in 16 bits; weight, gradient and two moments in f32; 4.13 bits of all linears but the head.
    assert_eq!(memory("lora, f32", "base"), 2.0 * 13_015_864_320.0);
    assert!(memory("full fine-tuning", "total") > 16.0 * 13.0e9);
    assert_eq!(memory("full fine-tuning", "optimizer"), 8.0 * 13_015_864_320.0);
    let nf4 = memory("lora over nf4-double, f32", "base");
    let expected = 12.69e9 * 4.127 / 8.0 + 2.0 * 2.0 * 32000.0 * 5120.0;
    assert!((nf4 / expected - 1.0).abs() < 0.01, "{nf4} and {expected}");
    let fits = |name: &str| way(name)["fits"].as_bool().unwrap();
    assert!(fits("lora over nf4-double, f32") && !fits("lora, f32") && !fits("full fine-tuning"), "{report}");
    assert!(report["advice"].is_null());
    let text = plan(&["--memory-gb", "16"]).stdout;
    assert!(text.contains("does: --set base.compute=f32 --set base.storage=nf4-double"), "{text}");

    // What would make it fit, and what nothing makes fit.
    let report = plan(&["--json", "--memory-gb", "9"]).json();
    let advice = &report["advice"];
    assert_eq!(advice["fits"], true, "{report}");
    let settings = advice["settings"].to_string();
    assert!(settings.contains("base.storage=nf4-double") && settings.contains("checkpointing=layer"), "{settings}");
    let text = plan(&["--memory-gb", "2"]).stdout;
    assert!(text.contains("none fits") && text.contains("take a smaller model"), "{text}");
    folder.refuses(&joined(&[&args, &["--memory-gb", "0"]]), &["--memory-gb is 0", "above 0"]);
    fs::remove_file(folder.path("shape/config.json")).unwrap();
    folder.refuses(&args, &["shape"]);
}
