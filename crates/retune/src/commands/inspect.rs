//! `retune inspect`: what a model or an adapter is made of.

use std::path::Path;

use anyhow::Result;
use retune_adapter::{AdapterFile, Bias, compatibility_notes, count_matches, names};
use retune_model::adapter::linear_modules;
use retune_model::checkpoint::{Checkpoint, expected_tensors};
use serde_json::{Value, json};

use super::print_json;
use crate::args::InspectArgs;
use crate::fetch;
use crate::memory::human;

/// Prints it for a person, or with `--json` for a program.
pub fn run(args: &InspectArgs) -> Result<()> {
    let path = Path::new(&args.path);
    let value = if path.join("adapter_config.json").exists() {
        adapter(path)?
    } else {
        model(&Checkpoint::open(&fetch::resolve(&args.path)?)?)
    };
    if args.json {
        print_json(&value)?;
    } else {
        print(&value, 0)?;
    }
    Ok(())
}

fn model(checkpoint: &Checkpoint) -> Value {
    let config = &checkpoint.config;
    let modules = checkpoint.linear_modules();
    let modules = linear_modules(&modules);
    let parameters: usize = expected_tensors(config).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let mut storage = std::collections::BTreeMap::new();
    for name in checkpoint.names() {
        if let Ok(matrix) = checkpoint.tensor(name) {
            *storage.entry(matrix.storage()).or_insert(0u64) += matrix.bytes_len() as u64;
        }
    }
    let storage: serde_json::Map<String, Value> =
        storage.into_iter().map(|(name, bytes)| (name.to_owned(), json!(human(bytes)))).collect();
    let mut targets = serde_json::Map::new();
    for (name, count) in count_matches(&modules) {
        let shape = modules.iter().find(|m| m.name.ends_with(&name)).map(|m| [m.out_features, m.in_features]);
        targets.insert(name, json!({ "modules": count, "shape": shape }));
    }
    let linear = modules.iter().filter(|m| !m.is_output_head).count();
    targets.insert("all-linear".to_owned(), json!({ "modules": linear }));
    json!({
        "model": checkpoint.path().display().to_string(),
        "family": config.model_type,
        "format": format!("{:?}", checkpoint.kind()),
        "parameters": parameters,
        "file_size": human(checkpoint.file_bytes()),
        "storage": storage,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        "rope": { "theta": config.rope.theta, "scaling": format!("{:?}", config.rope.scaling) },
        "sliding_window": config.sliding_window,
        "tied_embeddings": config.tie_word_embeddings,
        "target_modules": targets,
    })
}

fn adapter(path: &Path) -> Result<Value> {
    let file = AdapterFile::read(path)?;
    let mut modules = serde_json::Map::new();
    let norm = |name: &str| {
        let values = file.tensors.get(name).map(|(_, values)| values);
        values.map(|v| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt())
    };
    let mut parameters = 0;
    for (name, (shape, values)) in &file.tensors {
        parameters += values.len();
        let Some(module) = name.strip_prefix("base_model.model.").and_then(|n| n.strip_suffix(".lora_A.weight")) else {
            continue;
        };
        modules.insert(
            module.to_owned(),
            json!({ "r": shape.first(), "norm_A": norm(name), "norm_B": norm(&names::lora_b(module)) }),
        );
    }
    let unchanged = modules.values().all(|m| m["norm_B"].as_f64() == Some(0.0));
    let mut notes = compatibility_notes(&file.config);
    if unchanged && !modules.is_empty() {
        notes.push("every B is zero: this adapter changes nothing yet".to_owned());
    }
    let config = &file.config;
    Ok(json!({
        "adapter": path.display().to_string(),
        "method": if config.use_rslora { "LoRA (rank-stabilised)" } else { "LoRA" },
        "base_model": file.base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.target_modules,
        "modules_to_save": config.modules_to_save,
        "bias": if config.bias == Bias::None { Value::Null } else { json!(config.bias.as_str()) },
        "parameters": parameters,
        "size": human(4 * parameters as u64),
        "notes": notes,
        "modules": modules,
    }))
}

/// Prints a JSON object as indented lines; empty values are left out.
fn print(value: &Value, depth: usize) -> Result<()> {
    let Some(object) = value.as_object() else { return Ok(()) };
    let width = object.keys().map(String::len).max().unwrap_or(0);
    for (key, value) in object {
        let indent = "  ".repeat(depth);
        match value {
            Value::Null => {}
            Value::Array(items) if items.is_empty() => {}
            Value::Object(inner) if inner.values().all(|v| !v.is_object()) && depth > 0 => {
                let parts: Vec<_> = inner
                    .iter()
                    .filter(|(_, v)| !v.is_null())
                    .map(|(k, v)| format!("{} {}", k.replace('_', " "), plain(v)))
                    .collect();
                outln!("{indent}{key:width$}  {}", parts.join(", "));
            }
            Value::Object(_) => {
                outln!("{indent}{}:", key.replace('_', " "));
                print(value, depth + 1)?;
            }
            // Names of the model and of formats stand as they are, our own words as words.
            value if depth > 0 => outln!("{indent}{key:width$}  {}", plain(value)),
            value => outln!("{indent}{:width$}  {}", key.replace('_', " "), plain(value)),
        }
    }
    Ok(())
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) if items.iter().all(Value::is_number) => {
            items.iter().map(plain).collect::<Vec<_>>().join(" × ")
        }
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Number(n) if n.is_f64() => {
            format!("{:.4}", n.as_f64().unwrap_or(0.0)).trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        value => value.to_string(),
    }
}
