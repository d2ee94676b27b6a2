//! `retune combine`: several adapters made one.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use retune_adapter::combine::{Combination, Settings, Source, combine, refuse_beside};
use retune_adapter::files::CONFIG_FILE;
use retune_adapter::{AdapterFile, Deltas, LoraConfig, Method as _, delta};
use retune_formats::atomic::{self, Folder};
use retune_model::export::refuse_occupied;
use retune_train::run_config::Storage;
use serde_json::{Map, Value, json};

use super::print_json;
use crate::args::{CombineArgs, WeightedAdapter};
use crate::card::Card;
use crate::session;

/// An adapter that was read.
struct Part<'a> {
    args: &'a WeightedAdapter,
    /// Where it lies.
    folder: PathBuf,
    name: String,
    file: AdapterFile,
    config: LoraConfig,
    deltas: Deltas,
}

/// Reads the adapters, combines them, and writes the result.
pub fn run(args: &CombineArgs) -> Result<()> {
    let settings = Settings {
        kind: args.kind,
        density: args.density,
        majority_sign: args.majority_sign,
        svd_rank: args.svd_rank,
        seed: args.seed,
    };
    settings.check()?;
    refuse_occupied(&args.out)?;
    let parts = args.adapters.iter().map(read).collect::<Result<Vec<_>>>()?;
    let mut record = common_origin(&parts)?;
    let sources: Vec<Source<'_>> =
        parts.iter().map(|part| Source { name: &part.name, deltas: &part.deltas, weight: part.args.weight }).collect();
    let combination = combine(&sources, &settings)?;
    let configs: Vec<_> = parts.iter().map(|part| &part.config).collect();
    let (config, tensors) = combination.adapter(&configs);
    for note in config.compatibility_notes() {
        note!("! {note}");
    }
    let base_model = parts.iter().find_map(|part| part.file.base_model.clone());
    let file = AdapterFile { method: Arc::new(config), base_model, tensors };
    let folder = Folder::create(&args.out, CONFIG_FILE)?;
    file.write(folder.path(), &delta::modules(&combination.deltas))?;
    let summary = summary(args, &parts, &combination);
    record.insert("combined".to_owned(), summary.clone());
    atomic::write(&folder.path().join(session::PROVENANCE), format!("{:#}\n", Value::Object(record)).as_bytes())?;
    let of = |part: &Part<'_>| {
        format!("{} of `{}`", part.args.weight, part.args.path.file_name().unwrap_or_default().to_string_lossy())
    };
    let rows = vec![
        ("combined of", parts.iter().map(of).collect::<Vec<_>>().join(", ")),
        ("kind", kind(args)),
        ("difference to the weighted sum of the changes", format!("{:.3}", combination.difference)),
    ];
    let summary_of_card = "It was made of several adapters by `retune combine`.".to_owned();
    Card { method: &*file.method, base_model: file.base_model.as_deref(), summary: summary_of_card, rows }
        .write(folder.path())?;
    folder.commit()?;
    if args.json { print_json(&summary) } else { print(args, &parts, &combination) }
}

fn read(args: &WeightedAdapter) -> Result<Part<'_>> {
    let folder = session::adapter_folder(&args.path)?;
    let name = folder.display().to_string();
    let file = AdapterFile::read(&folder)?;
    let method = file.method.info().name;
    let Some(config) = file.method.lora().cloned() else {
        if file.method.is_soft_prompt() {
            bail!(
                "{name} is an adapter of method {method}, which changes no weight: only LoRA adapters can be combined"
            );
        }
        let base = file.base_model.as_deref().map_or("MODEL", |base| base);
        bail!(
            "{name} is an adapter of method {method}: only LoRA adapters can be combined. Make it one first (retune convert {name} --to lora \
             --model {base} --out FOLDER), and combine that"
        );
    };
    refuse_beside(&name, &config, &file.tensors)?;
    let deltas = retune_adapter::deltas(&config, &file.tensors).with_context(|| name.clone())?;
    Ok(Part { args, folder, name, file, config, deltas })
}

/// What the adapters say, one like the other, of the tokenizer and the base they belong to. Adapters that say nothing agree with all.
///
/// # Errors
/// Different tokenizers, to which the same tokens mean other texts.
fn common_origin(parts: &[Part<'_>]) -> Result<Map<String, Value>> {
    let mut first: Map<String, Value> = Map::new();
    let mut models: Vec<&str> = parts.iter().filter_map(|part| part.file.base_model.as_deref()).collect();
    models.dedup();
    if models.len() > 1 {
        note!("! the adapters name different bases: {}", models.join(", "));
    }
    for part in parts {
        let Some(record) = session::provenance(&part.folder)? else { continue };
        for (key, path) in [
            ("tokenizer_hash", "/tokenizer_hash"),
            ("chat_template_hash", "/chat_template_hash"),
            ("base_content_hash", "/run/base_content_hash"),
            ("storage", "/run/base/storage"),
        ] {
            let as_is = (key == "storage" && record.pointer("/run").is_some()).then(|| json!(Storage::AsIs));
            let Some(value) = record.pointer(path).or(as_is.as_ref()) else { continue };
            let known = first.entry(key).or_insert_with(|| value.clone());
            match key {
                _ if known == value => {}
                "tokenizer_hash" => bail!(
                    "{} and {} were trained with different tokenizers, so that their token ids mean other texts: combine adapters of one base",
                    parts[0].name,
                    part.name
                ),
                "chat_template_hash" => note!("! the adapters were trained with different chat templates"),
                "storage" => {
                    note!(
                        "! the adapters were trained on a base that was held in several ways; --storage chooses one where the result is used"
                    );
                    *known = json!(Storage::AsIs);
                }
                _ => note!("! the adapters were trained on different base weights"),
            }
        }
    }
    // Where the record of a run has it.
    let storage = first.remove("storage");
    if let Some(hash) = first.remove("base_content_hash") {
        let model = parts.iter().find_map(|part| part.file.base_model.as_ref());
        first.insert("run".to_owned(), session::run_of(model, &hash, storage.as_ref()));
    }
    Ok(first)
}

fn kind(args: &CombineArgs) -> String {
    args.kind.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// The largest rank of an adapter's modules.
fn rank(deltas: &Deltas) -> usize {
    deltas.values().map(|delta| delta.r).max().unwrap_or(0)
}

fn summary(args: &CombineArgs, parts: &[Part<'_>], combination: &Combination) -> Value {
    let adapter = |part: &Part<'_>| {
        json!({
            "adapter": part.args.path,
            "weight": part.args.weight,
            "rank": rank(&part.deltas),
            "modules": part.deltas.len(),
        })
    };
    json!({
        "out": args.out,
        "kind": kind(args),
        "density": args.density,
        "majority_sign": args.majority_sign.and_then(|sign| Some(sign.to_possible_value()?.get_name().to_owned())),
        "seed": args.seed,
        "rank": combination.r,
        "modules": combination.deltas.len(),
        "difference": combination.difference,
        "adapters": parts.iter().map(adapter).collect::<Vec<_>>(),
    })
}

fn print(args: &CombineArgs, parts: &[Part<'_>], combination: &Combination) -> Result<()> {
    for part in parts {
        let (rank, modules) = (rank(&part.deltas), part.deltas.len());
        outln!("adapter       {} · {}  (rank {rank}, {modules} modules)", part.args.weight, part.name);
    }
    let (r, modules) = (combination.r, combination.deltas.len());
    outln!("combined      {}  ({}, rank {r}, {modules} modules)", args.out.display(), kind(args));
    match combination.difference {
        0.0 => outln!("difference    none: this is the weighted sum of the changes"),
        difference if difference.is_finite() => {
            outln!("difference    {difference:.3} of the weighted sum of the changes, which --kind exact gives");
        }
        _ => outln!("difference    without bounds: the weighted sum of the changes is zero"),
    }
    if combination.deltas.values().all(|delta| delta.norm() == 0.0) {
        note!("! the changes cancel each other: this adapter changes nothing");
    }
    Ok(())
}
