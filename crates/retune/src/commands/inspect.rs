//! `retune inspect`: what a model or an adapter is made of.

use std::fs;
use std::path::Path;

use anyhow::{Context, Error, Result, anyhow, bail};
use retune_adapter::files::{CONFIG_FILE, WEIGHTS_FILE};
use retune_adapter::names::{self, Key, Part};
use retune_adapter::{AdapterFile, BaseModules, Bias, count_matches, deltas};
use retune_engine::spec::{Attention, Mix, SubLayer};
use retune_model::checkpoint::{Checkpoint, CheckpointKind};
use retune_model::rope::GGUF_FACTORS;
use serde_json::{Map, Value, json};

use super::{changes, print_json};
use crate::args::InspectArgs;
use crate::memory::human;
use crate::run_folder::RunFolder;
use crate::{fetch, session};

/// Prints it for a person, or with `--json` for a program.
pub fn run(args: &InspectArgs) -> Result<()> {
    let path = Path::new(&args.path);
    // A run's folder stands for the adapter in it; one without is told what it is.
    let folder = session::adapter_folder(path).unwrap_or_else(|_| path.to_owned());
    let value = if folder.join(CONFIG_FILE).exists() {
        let base = args.model.as_deref().map(|model| Ok::<_, Error>(Checkpoint::open(&fetch::resolve(model)?)?));
        adapter(&folder, base.transpose()?.as_ref())?
    } else if args.model.is_some() {
        bail!("--model is the base of an adapter, and {} is no adapter: leave it out", args.path)
    } else {
        let found = fetch::resolve(&args.path)?;
        model(&Checkpoint::open(&found).map_err(|error| run_folder(path).unwrap_or_else(|| error.into()))?)
    };
    if args.json {
        print_json(&value)?;
    } else {
        print(&for_people(value), 0)?;
    }
    Ok(())
}

/// The error for the folder of a run without an adapter, which is no model but may hold one.
fn run_folder(path: &Path) -> Option<Error> {
    let run = RunFolder { root: path.to_owned() };
    let [_, model] = run.written();
    if !model.is_dir() {
        return session::adapter_folder(path).err();
    }
    let name = path.display();
    let of_run =
        anyhow!("{name} is the folder of a run, not a model: inspect {}, which the run wrote", model.display());
    run.is_run().then_some(of_run)
}

fn model(checkpoint: &Checkpoint) -> Value {
    let spec = &checkpoint.spec;
    let modules = BaseModules::of(spec);
    let attentions: Vec<&Attention> = spec.sub_layers().filter_map(SubLayer::attention).collect();
    let attention = attentions.first();
    let activation = spec.sub_layers().find(|sub_layer| matches!(sub_layer.mix, Mix::Activation { .. }));
    let windows: Vec<Option<usize>> = attentions.iter().map(|attention| attention.window).collect();
    let sliding = windows.iter().flatten().count();
    let mut storage = std::collections::BTreeMap::new();
    for name in checkpoint.names() {
        if let Ok(matrix) = checkpoint.tensor(name) {
            *storage.entry(matrix.storage()).or_insert(0u64) += matrix.bytes_len() as u64;
        }
    }
    let mut targets = Map::new();
    for (name, count) in count_matches(&modules) {
        let shape = modules.iter().find(|m| m.name.ends_with(&name)).map(|m| [m.out_features, m.in_features]);
        targets.insert(name, json!({ "modules": count, "shape": shape }));
    }
    let linear = modules.iter().filter(|m| !m.is_output_head).count();
    targets.insert("all-linear".to_owned(), json!({ "modules": linear }));
    json!({
        "model": checkpoint.path().display().to_string(),
        "family": spec.family,
        "format": match checkpoint.kind() {
            CheckpointKind::HuggingFace => "hugging_face",
            CheckpointKind::Gguf => "gguf",
        },
        "parameters": spec.parameters(),
        "file_size": checkpoint.file_bytes(),
        "storage": storage,
        "layers": spec.decoder.blocks.len(),
        "encoder_layers": spec.encoder.as_ref().map(|encoder| encoder.stack.blocks.len()),
        "hidden_size": spec.hidden_size,
        "intermediate_size": activation.map(|sub_layer| sub_layer.output.cols),
        "heads": attention.map(|attention| attention.queries),
        "key_value_heads": attention.map(|attention| attention.keys),
        "head_dim": attention.map(|attention| attention.head_dim),
        "vocab_size": spec.vocab_size,
        "context": spec.context,
        "rope": if spec.ropes.is_empty() { Value::Null } else { rope(checkpoint.config_json()) },
        "sliding_window": windows.iter().flatten().next(),
        "sliding_layers": Some(sliding).filter(|&sliding| sliding < windows.len() && sliding > 0),
        "tied_embeddings": spec.head.tied,
        "notes": checkpoint.notes(),
        "target_modules": targets,
    })
}

/// What the configuration says of rotary embedding: `theta`, and `scaling` in the words of transformers' `rope_scaling`, which has none
/// for a factor per frequency. A model with several rotations has them under its own names.
fn rope(config: &Value) -> Value {
    let config = config.get("text_config").unwrap_or(config);
    let of = |key: &str| config.get(key).and_then(Value::as_object).filter(|object| !object.is_empty());
    let mut scaling = of("rope_scaling").or(of("rope_parameters")).cloned().unwrap_or_default();
    if scaling.values().any(Value::is_object) {
        return Value::Object(scaling);
    }
    let inside = scaling.remove("rope_theta");
    let theta = inside.or_else(|| config.get("rope_theta").cloned()).filter(Value::is_number);
    let kind = scaling.remove("type");
    let kind = scaling.get("rope_type").cloned().or(kind).unwrap_or(Value::Null);
    scaling.retain(|_, value| !value.is_null());
    if kind.is_null() || kind == "default" {
        return json!({ "theta": theta, "scaling": null });
    }
    scaling.insert("rope_type".to_owned(), if kind == GGUF_FACTORS { json!("factors") } else { kind });
    json!({ "theta": theta, "scaling": scaling })
}

fn adapter(path: &Path, base: Option<&Checkpoint>) -> Result<Value> {
    let file = AdapterFile::read(path)?;
    let weights = path.join(WEIGHTS_FILE);
    let size = fs::metadata(&weights).with_context(|| format!("cannot read {}", weights.display()))?.len();
    let mut modules = modules(&file);
    let mut notes = file.method.compatibility_notes();
    if let Some(config) = file.method.lora().filter(|config| !config.use_dora) {
        let is_of_table = |key: &String| matches!(names::parse(key), Key::Part(_, Part::EmbeddingA | Part::TokenRows));
        let is_beside = !config.modules_to_save.is_empty() || config.bias != Bias::None;
        let is_beside = is_beside || file.tensors.keys().any(is_of_table);
        match deltas(config, &file.tensors) {
            Ok(deltas) if deltas.is_empty() && !is_beside => {
                notes.push(
                    "no tensor is an A or a B under the names that PEFT gives: this adapter changes nothing".to_owned(),
                );
            }
            Ok(deltas) => notes.extend(changes::describe(&deltas, base, &mut modules)),
            Err(error) => notes.push(error.to_string()),
        }
    }
    if file.method.changes_nothing(&file.tensors) {
        notes.push("everything in it is as it is before training: this adapter changes nothing yet".to_owned());
    }
    let mut nearest = Value::Null;
    if let Some(base) = base {
        match on_base(&file, base, &mut modules) {
            Ok((more, tokens)) => {
                notes.extend(more);
                nearest = tokens;
            }
            // An adapter that does not fit is looked at all the same.
            Err(error) => notes.push(format!("{error:#}")),
        }
    }
    let record = session::provenance(path).ok().flatten().unwrap_or_default();
    let mut value = json!({
        "adapter": path.display().to_string(),
        "method": file.method.info().name,
        "base_model": file.base_model,
        "base_storage": record["run"]["base"]["storage"],
    });
    let rest = json!({
        "parameters": file.tensors.values().map(|(_, values)| values.len()).sum::<usize>(),
        "size": size,
        "notes": notes,
        "virtual_tokens": nearest,
        "modules": modules,
    });
    if let Some(value) = value.as_object_mut() {
        for part in [file.method.settings()?, rest] {
            // Patterns that there are none of say nothing.
            let said = |value: &Value| match value.as_object() {
                Some(map) if map.is_empty() => Value::Null,
                _ => value.clone(),
            };
            value.extend(part.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), said(value))));
        }
    }
    Ok(value)
}

/// What there is to say of an adapter on its base, beyond what is said of LoRA's A and B; of a soft prompt the nearest tokens of the vocabulary.
fn on_base(file: &AdapterFile, base: &Checkpoint, modules: &mut Map<String, Value>) -> Result<(Vec<String>, Value)> {
    let is_told = file.method.lora().is_some_and(|config| !config.use_dora);
    let is_factor =
        |key: &String| matches!(names::parse(key), Key::Part(_, Part::LoraA | Part::LoraB | Part::BaseWeight));
    if is_told && file.tensors.keys().all(is_factor) {
        return Ok(Default::default());
    }
    let overlay = file.lower(&base.spec)?;
    let params = file.params(&overlay)?;
    changes::describe_replaced(base, &overlay, &params, modules)?;
    let notes = if is_told { Vec::new() } else { changes::describe_weights(base, &overlay, &params, modules)? };
    let Some(rows) = &overlay.virtual_tokens else { return Ok((notes, Value::Null)) };
    let tokenizer = base.tokenizer().ok();
    let token = |(id, cosine)| {
        let text = tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&[id], false));
        json!({ "token": id, "text": text, "cosine": cosine })
    };
    let nearest = changes::nearest_tokens(base, &params[rows.rows.clone()])?;
    let numbered = nearest.into_iter().enumerate().map(|(number, nearest)| ((number + 1).to_string(), token(nearest)));
    Ok((notes, numbered.collect()))
}

/// Rank and norms of each module that the file has tensors of; a tensor that is no part of a LoRA adapter stands under its own name.
fn modules(file: &AdapterFile) -> Map<String, Value> {
    let mut tensors: Vec<_> = file.tensors.iter().map(|(name, tensor)| (names::parse(name), name, tensor)).collect();
    // A first: the adapted modules lead, each with its rank in front.
    tensors.sort_by_key(|(key, _, _)| !matches!(key, Key::Part(_, Part::LoraA)));
    let mut modules = Map::new();
    for (key, name, (shape, values)) in tensors {
        let (module, norm) = match &key {
            Key::Part(module, Part::LoraA | Part::EmbeddingA) => (module, "norm_A"),
            Key::Part(module, Part::LoraB | Part::EmbeddingB) => (module, "norm_B"),
            Key::Part(module, Part::LoraBBias) => (module, "norm_B_bias"),
            Key::Part(module, Part::TokenRows) => (module, "norm_rows"),
            Key::Part(module, Part::Magnitude) => (module, "norm_magnitude"),
            Key::Part(module, Part::Weight) => (module, "norm_weight"),
            Key::Part(module, Part::Bias) => (module, "norm_bias"),
            Key::Part(module, Part::BaseWeight) => (module, "norm_base_weight"),
            Key::Copy | Key::Unknown => (name, "norm"),
        };
        let entry = modules.entry(module.clone()).or_insert_with(|| json!({}));
        match norm {
            "norm_A" => entry["r"] = json!(shape.first()),
            "norm_rows" => entry["tokens"] = json!(shape.first()),
            _ => {}
        }
        entry[norm] = json!(values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt());
    }
    modules
}

/// The same as people read it: sizes with units, long lists by their length.
fn for_people(mut value: Value) -> Value {
    let with_unit = |size: &mut Value| {
        if let Some(bytes) = size.as_u64() {
            *size = json!(human(bytes));
        }
    };
    for key in ["file_size", "size"] {
        if let Some(size) = value.get_mut(key) {
            with_unit(size);
        }
    }
    if let Some(storage) = value.get_mut("storage").and_then(Value::as_object_mut) {
        storage.values_mut().for_each(with_unit);
    }
    if let Some(factors) = value.pointer_mut("/rope/scaling/factors") {
        *factors = json!(factors.as_array().map_or(0, Vec::len));
    }
    value
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
                    .map(|(k, v)| format!("{} {}", k.replace('_', " "), plain(k, v)))
                    .collect();
                outln!("{indent}{key:width$}  {}", parts.join(", "));
            }
            Value::Object(_) => {
                outln!("{indent}{}:", key.replace('_', " "));
                print(value, depth + 1)?;
            }
            // Names of the model and of formats stand as they are, our own words as words.
            value if depth > 0 => outln!("{indent}{key:width$}  {}", plain(key, value)),
            value => outln!("{indent}{:width$}  {}", key.replace('_', " "), plain(key, value)),
        }
    }
    Ok(())
}

fn plain(key: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let separator = if key == "shape" { " × " } else { ", " };
            items.iter().map(|item| plain(key, item)).collect::<Vec<_>>().join(separator)
        }
        Value::Number(n) if n.is_f64() => {
            format!("{:.4}", n.as_f64().unwrap_or(0.0)).trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        value => value.to_string(),
    }
}
