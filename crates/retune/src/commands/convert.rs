//! `retune convert`: an adapter, or the difference of two models, as a plain LoRA adapter.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use retune_adapter::convert::{Conversion, Keep, Kept};
use retune_adapter::delta::{self, LoraDelta};
use retune_adapter::files::CONFIG_FILE;
use retune_adapter::{AdapterFile, BaseModules, Method as _};
use retune_engine::spec::Linear;
use retune_formats::atomic::{self, Folder};
use retune_model::checkpoint::Checkpoint;
use retune_model::export::refuse_occupied;
use retune_model::merge::change_of;
use retune_quant::Matrix;
use serde_json::{Map, Value, json};

use super::print_json;
use crate::args::ConvertArgs;
use crate::card::Card;
use crate::fetch;
use crate::session::{self, Base};
use crate::storage;

/// What is to be written.
struct Converted {
    conversion: Conversion,
    /// The tensors that differ and are no weight of a linear, with the norm of their difference.
    left_out: BTreeMap<String, f64>,
    base_model: Option<String>,
    /// What the written adapter says of its tokenizer and its base.
    origin: Map<String, Value>,
}

/// Converts, writes the result, and says how far it is from what it was made of.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let keep = args.rank.map(Keep::Rank).or(args.energy.map(Keep::Energy));
    if let Some(keep) = keep {
        keep.check()?;
    }
    refuse_occupied(&args.out)?;
    let mut base = match &args.model {
        Some(model) => Some(Base::open(&fetch::resolve(model)?)?),
        None => None,
    };
    if let (Some(base), Some(adapter)) = (&mut base, &args.adapter) {
        // What some methods change depends on the weights that they were trained on.
        let storage = storage::under(base, Some(adapter), None)?;
        storage::hold(base, storage)?;
    }
    let converted = match (&args.adapter, &args.merged, &base) {
        (Some(adapter), _, base) => of_adapter(args, adapter, base.as_ref(), keep)?,
        (None, Some(merged), Some(base)) => of_models(args, base, merged, keep)?,
        _ => bail!("give an adapter to convert, or --merged with --model"),
    };
    let (config, tensors) = converted.conversion.adapter();
    for note in config.compatibility_notes() {
        note!("! {note}");
    }
    let changes = converted.conversion.modules.iter().map(|(name, kept)| (name.clone(), kept.delta.clone())).collect();
    let modules = base.as_ref().map_or_else(|| delta::modules(&changes), |base| BaseModules::of(&base.checkpoint.spec));
    let file = AdapterFile { method: Arc::new(config), base_model: converted.base_model.clone(), tensors };
    let folder = Folder::create(&args.out, CONFIG_FILE)?;
    file.write(folder.path(), &modules)?;
    let summary = summary(args, &converted);
    let mut record = converted.origin.clone();
    record.insert("converted".to_owned(), summary.clone());
    atomic::write(&folder.path().join(session::PROVENANCE), format!("{:#}\n", Value::Object(record)).as_bytes())?;
    let from = args.adapter.as_deref().or(args.merged.as_deref().map(Path::new)).and_then(Path::file_name);
    let from = from.unwrap_or_default().to_string_lossy();
    let what = if args.adapter.is_some() { "the adapter" } else { "the difference to its base of the model" };
    let rows = vec![("‖kept − change‖ / ‖change‖", shown(converted.error()))];
    let card = Card {
        method: &*file.method,
        base_model: file.base_model.as_deref(),
        summary: format!("It was made of {what} `{from}` by `retune convert`."),
        rows,
    };
    card.write(folder.path())?;
    folder.commit()?;
    if args.json { print_json(&summary) } else { print(args, &converted) }
}

/// What is kept of an adapter's changes.
fn of_adapter(args: &ConvertArgs, path: &Path, base: Option<&Base>, keep: Option<Keep>) -> Result<Converted> {
    let path = &session::adapter_folder(path)?;
    let name = path.display();
    let file = AdapterFile::read(path)?;
    let method = file.method.info().name;
    let plain = file.method.lora().filter(|config| !config.use_dora);
    let modules = match (plain, base) {
        (Some(config), _) => {
            if let Some(base) = base {
                session::adapted(base, path)?;
            }
            retune_adapter::combine::refuse_beside(&name.to_string(), config, &file.tensors)?;
            let deltas = retune_adapter::deltas(config, &file.tensors).with_context(|| name.to_string())?;
            kept(deltas, |(module, delta)| Ok((module, Kept::of_terms(delta, keep)?)))?
        }
        (None, None) if file.method.is_soft_prompt() => bail!(
            "{name} is an adapter of method {method}: a soft prompt or a prefix changes no weight, and cannot become a LoRA; keep it as it is"
        ),
        (None, None) => bail!(
            "{name} is an adapter of method {method}{}: what it changes depends on the base's weights; give the base with --model{}",
            if file.method.lora().is_some() { " with use_dora" } else { "" },
            file.base_model.as_ref().map_or_else(String::new, |model| format!(" (the adapter names {model})")),
        ),
        (None, Some(base)) => {
            let (overlay, params, _) = session::adapted(base, path)?;
            let spec = &base.checkpoint.spec;
            delta::refuse_beside_weights(spec, &overlay)
                .with_context(|| format!("{name} cannot become a plain LoRA adapter"))?;
            let changed = spec.linears().zip(&overlay.linears).filter(|(_, change)| !change.is_empty());
            let changed: Vec<_> = changed.collect();
            kept(changed, |(linear, change)| {
                let kept = match LoraDelta::of_terms(linear, change, &params) {
                    Some(delta) => Kept::of_terms(delta, keep)?,
                    None => {
                        let keep = needed(keep, linear)?;
                        let change = change_of(change, &params, &base.checkpoint.weight_of(linear)?);
                        Kept::of_matrix(linear.rows, linear.cols, &change, keep)?
                    }
                };
                Ok((linear.name.clone(), kept))
            })?
        }
    };
    let mut origin = Map::new();
    if let Some(record) = session::provenance(path)? {
        for key in ["tokenizer_hash", "chat_template_hash"] {
            origin.extend(record.get(key).map(|value| (key.to_owned(), value.clone())));
        }
        if let Some(hash) = record.pointer("/run/base_content_hash") {
            let run = session::run_of(file.base_model.as_ref(), hash, record.pointer("/run/base/storage"));
            origin.insert("run".to_owned(), run);
        }
    }
    let base_model = file.base_model.clone().or_else(|| args.model.clone());
    Ok(Converted { conversion: Conversion::of(modules), left_out: BTreeMap::new(), base_model, origin })
}

/// What is kept of the difference of a model to its base.
fn of_models(args: &ConvertArgs, base: &Base, merged: &str, keep: Option<Keep>) -> Result<Converted> {
    let other = Base::open(&fetch::resolve(merged)?)?;
    base.check_finite()?;
    other.check_finite()?;
    let (from, to) = (&base.checkpoint, &other.checkpoint);
    let linears: Vec<&Linear> = from.spec.linears().filter(|linear| is_own(from, to, linear)).collect();
    if let Some(problem) = unequal(from, to) {
        bail!("{merged} is not {} with other weights: {problem}; give the base that it was made from", base_name(args));
    }
    let difference = |linear: &Linear| -> Result<Option<Vec<f32>>> {
        let change = minus(&to.weight_of(linear)?, &from.weight_of(linear)?);
        Ok(Some(change).filter(|change| change.iter().any(|&value| value != 0.0)))
    };
    let kept = linears
        .par_iter()
        .map(|linear| {
            let Some(change) = difference(linear)? else { return Ok(None) };
            let kept = Kept::of_matrix(linear.rows, linear.cols, &change, needed(keep, linear)?)?;
            Ok(Some((linear.name.clone(), kept)))
        })
        .collect::<Result<Vec<_>>>()?;
    let modules: BTreeMap<String, Kept> = kept.into_iter().flatten().collect();
    if modules.is_empty() {
        bail!("no weight of a linear of {merged} differs from the base's: there is nothing to convert");
    }
    let mut left_out = BTreeMap::new();
    for name in from.names().filter(|name| !linears.iter().any(|linear| format!("{}.weight", linear.name) == **name)) {
        let norm = norm(&minus(&to.tensor(name)?, &from.tensor(name)?));
        if norm > 0.0 {
            left_out.insert(name.to_owned(), norm);
        }
    }
    let mut origin = Map::new();
    if let Ok(tokenizer) = base.tokenizer() {
        origin.insert("tokenizer_hash".to_owned(), json!(tokenizer.content_hash()));
        origin
            .insert("chat_template_hash".to_owned(), json!(tokenizer.chat_template().map(|template| template.hash())));
    }
    origin.insert("run".to_owned(), json!({ "model": args.model, "base_content_hash": base.content_hash() }));
    Ok(Converted { conversion: Conversion::of(modules), left_out, base_model: args.model.clone(), origin })
}

/// What is kept of each change. A thread has one whole change in memory at a time.
fn kept<T: Send>(
    changes: impl IntoParallelIterator<Item = T>,
    keep: impl Fn(T) -> Result<(String, Kept)> + Sync + Send,
) -> Result<BTreeMap<String, Kept>> {
    let modules: BTreeMap<String, Kept> = changes.into_par_iter().map(keep).collect::<Result<_>>()?;
    if modules.is_empty() {
        bail!("the adapter changes no weight of a linear: there is nothing to convert");
    }
    Ok(modules)
}

/// How much is to be kept of a change that has no low rank.
fn needed(keep: Option<Keep>, linear: &Linear) -> Result<Keep> {
    keep.with_context(|| {
        format!(
            "the change of {} may have any rank up to {}: say how much of it to keep, with --rank (16, say) or --energy (0.9, say)",
            linear.name,
            linear.rows.min(linear.cols)
        )
    })
}

/// Whether a linear has a weight that is not the table's, in one of two models.
fn is_own(from: &Checkpoint, to: &Checkpoint, linear: &Linear) -> bool {
    let is_tied = |model: &Checkpoint| model.spec.head.tied && linear.name == model.spec.head.linear.name;
    !(is_tied(from) && is_tied(to))
}

/// What two models of one shape do not have in common.
fn unequal(from: &Checkpoint, to: &Checkpoint) -> Option<String> {
    if from.spec.family != to.spec.family {
        return Some(format!("it is of the family {}, the base of {}", to.spec.family, from.spec.family));
    }
    from.names().find_map(|name| {
        let Ok(theirs) = to.tensor(name) else { return Some(format!("it has no {name}")) };
        let ours = from.tensor(name).ok()?;
        let [ours, theirs] = [&ours, &theirs].map(|matrix| [matrix.rows(), matrix.cols()]);
        (ours != theirs).then(|| format!("its {name} is {theirs:?}, the base's {ours:?}"))
    })
}

fn minus(of: &Matrix, base: &Matrix) -> Vec<f32> {
    let mut difference = of.to_f32();
    difference.iter_mut().zip(base.to_f32()).for_each(|(value, base)| *value -= base);
    difference
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

fn base_name(args: &ConvertArgs) -> &str {
    args.model.as_deref().unwrap_or("the base")
}

impl Converted {
    /// ‖kept − change‖ / ‖change‖ over everything.
    fn error(&self) -> f64 {
        self.conversion.error(self.left_out.values().map(|norm| norm.powi(2)).sum())
    }
}

fn summary(args: &ConvertArgs, converted: &Converted) -> Value {
    let module = |(name, kept): (&String, &Kept)| {
        let value = json!({ "rank": kept.delta.r, "norm_change": kept.norm, "error": kept.error() });
        (name.clone(), value)
    };
    json!({
        "out": args.out,
        "from": args.adapter.as_ref().map(|path| json!(path)).or_else(|| args.merged.as_ref().map(|model| json!(model))),
        "rank": converted.conversion.r,
        "energy": args.energy,
        "error": converted.error(),
        "left_out": converted.left_out,
        "modules": converted.conversion.modules.iter().map(module).collect::<Map<_, _>>(),
    })
}

fn print(args: &ConvertArgs, converted: &Converted) -> Result<()> {
    let modules = &converted.conversion.modules;
    let width = modules.keys().map(String::len).max().unwrap_or(0);
    outln!("{:width$}  {:>5}  {:>10}  {:>9}", "module", "rank", "change", "error");
    for (name, kept) in modules {
        outln!("{name:width$}  {:>5}  {:>10.4}  {:>9}", kept.delta.r, kept.norm, shown(kept.error()));
    }
    for (name, norm) in &converted.left_out {
        note!("! left out: {name}, which differs by {norm:.4} and is no weight of a linear");
    }
    outln!("\nconverted  {}  (rank {}, {} modules)", args.out.display(), converted.conversion.r, modules.len());
    outln!("error      {} of the whole change", shown(converted.error()));
    Ok(())
}

fn shown(error: f64) -> String {
    if error == 0.0 { "none".to_owned() } else { format!("{error:.2e}") }
}
