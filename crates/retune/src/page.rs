//! Pages that need nothing else, neither a network nor a script: what those of a comparison and of a run have in common.
//!
//! Every page extends `page/page.html`, which has the style, and takes the macros of `page/parts.html`; `page/plots.rs` draws.

pub mod plots;
pub mod run;

use std::path::Path;

use anyhow::{Context, Result};
use minijinja::value::Value as Html;
use minijinja::{AutoEscape, Environment, context};
use retune_train::data::{DataReport, LengthBin, Names};
use serde::Serialize;
use serde_json::Value;

use crate::commands::data::problems;
use crate::comparison::answer::{duration, grouped};
use crate::memory::human;
use crate::memory_plan::MemoryPlan;
use crate::metrics::Point;
use plots::{Axis, Bar, Shape, short};

/// What stands where there is nothing to say.
pub const NONE: &str = "–";

/// A page of a template that extends the common one.
///
/// # Errors
/// A template that does not fit what it is given: a slip in the program.
pub fn render(template: &str, page: impl Serialize) -> Result<String> {
    let mut environment = Environment::new();
    // Rows are anybody's words: nothing but the plots, whose texts are escaped where they are drawn, is taken as it is.
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    let common = [("page.html", include_str!("page/page.html")), ("parts.html", include_str!("page/parts.html"))];
    for (name, text) in common {
        environment.add_template(name, text).with_context(|| format!("the template {name} is broken"))?;
    }
    let template = environment.template_from_named_str("this.html", template).context("the template is broken")?;
    template.render(page).context("the page cannot be written")
}

/// A plot, as it is.
pub fn svg(text: String) -> Html {
    Html::from_safe_string(text)
}

/// A Hub id as it is, of a path the last part.
pub fn model_name(model: &str) -> String {
    let is_id = !Path::new(model).exists() && model.matches('/').count() == 1;
    let last = Path::new(model).file_name().filter(|_| !is_id);
    last.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}

/// A setting as people write it.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Null => NONE.to_owned(),
        other => other.to_string(),
    }
}

/// The settings that are set, by their paths.
pub fn flatten(prefix: &str, value: &Value, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&path, value, found);
            }
        }
        // What is not set is what it is for another that has no such key.
        Value::Null => {}
        value => found.push((prefix.to_owned(), plain(value))),
    }
}

/// Bytes at an axis.
pub fn bytes_label(bytes: f64) -> String {
    if bytes <= 0.0 { "0".to_owned() } else { human(bytes as u64) }
}

/// Seconds at an axis.
pub fn duration_label(seconds: f64) -> String {
    if seconds <= 0.0 { "0".to_owned() } else { duration(seconds) }
}

/// An axis of losses.
pub fn loss_axis(title: &str) -> Axis {
    Axis { title: title.to_owned(), format: short, logarithmic: false }
}

/// Losses against steps, tokens and time: `shapes` are what is drawn, with the places that it is told for each point.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn curves(shapes: impl Fn(&dyn Fn(&Point) -> f64) -> Vec<Shape>) -> Result<Vec<Html>> {
    type Place = fn(&Point) -> f64;
    let kinds: [(&str, plots::Format, Place); 3] = [
        ("steps", short, |point| point.step as f64),
        ("tokens", short, |point| point.tokens as f64),
        ("time in steps", duration_label, |point| point.seconds),
    ];
    let mut found = Vec::new();
    for (title, format, place) in kinds {
        let shapes = shapes(&place);
        if !shapes.is_empty() {
            let axis = Axis { title: title.to_owned(), format, logarithmic: false };
            found.push(svg(plots::plot(&axis, &loss_axis("loss"), &shapes, &[], false)?));
        }
    }
    Ok(found)
}

/// Memory by part, as planned when runs began, beside the most that each had: a bar for each run that has a plan.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn memory(runs: &[(&str, &MemoryPlan, Option<u64>)]) -> Result<Option<Html>> {
    if runs.is_empty() {
        return Ok(None);
    }
    let bars: Vec<Bar> = runs
        .iter()
        .map(|(name, plan, peak)| Bar {
            name: (*name).to_owned(),
            parts: plan.parts().iter().map(|(_, bytes)| *bytes as f64).collect(),
            mark: peak.map(|bytes| bytes as f64),
        })
        .collect();
    // What no run has is not worth a colour in the legend.
    let parts = MemoryPlan::default().parts();
    let is_there = |place: &usize| runs.iter().any(|(_, plan, _)| plan.parts()[*place].1 > 0);
    let places: Vec<usize> = (0..parts.len()).filter(is_there).collect();
    let legend: Vec<Html> =
        places.iter().map(|place| context! { colour => plots::css(*place), name => parts[*place].0 }).collect();
    let rows: Vec<Html> = runs
        .iter()
        .map(|(name, plan, peak)| {
            let cells: Vec<String> = places.iter().map(|place| bytes_label(plan.parts()[*place].1 as f64)).collect();
            context! { name, cells, planned => human(plan.total()), measured => peak.map_or_else(|| NONE.to_owned(), human) }
        })
        .collect();
    let titles: Vec<&str> = places.iter().map(|place| parts[*place].0).collect();
    let plot = svg(plots::bars(&bars, "memory", bytes_label)?);
    Ok(Some(context! { legend, titles, rows, plot }))
}

/// What is in a data file: its figures, what is wrong with it, and how long its rows are.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn data(title: &str, report: &DataReport) -> Result<Html> {
    let count = |count: usize| grouped(count as u64);
    let rows = vec![
        ("file", report.path.display().to_string()),
        ("format", report.format.to_string()),
        ("rows", format!("{}, {} of them used", count(report.rows), count(report.examples))),
        ("tokens", format!("{}, {} of them trained", count(report.tokens), count(report.trained_tokens))),
        ("longest row", format!("{} tokens", count(report.longest))),
    ];
    let bar = |bin: &LengthBin| Bar {
        name: format!("{} to {} tokens: {}", bin.from, bin.to, count(bin.examples)),
        parts: vec![bin.examples as f64],
        mark: None,
    };
    let lengths = svg(plots::bars(&report.lengths.iter().map(bar).collect::<Vec<_>>(), "rows", short)?);
    Ok(context! { title, rows, problems => problems(report, &Names::KEYS), lengths })
}
