//! The report of a comparison: one page that needs nothing else, neither a network nor a script.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use minijinja::value::Value as Html;
use minijinja::{AutoEscape, Environment, context};
use retune_formats::atomic;
use retune_train::data::{Files, ReadOptions, read_rows};
use serde::Serialize;
use serde_json::Value;

use super::answer::{duration, grouped};
use super::folder::Folder;
use super::plots::{self, Axis, Level, Mark, Shape, short};
use super::results::{Results, Summary};
use super::scores::{self, Flips, Measure, RowScore};
use super::table::{self, NONE, with_interval};
use crate::memory::human;

const TEMPLATE: &str = include_str!("report.html");
/// Rows shown that got worse, and that got better.
const WORST: usize = 10;
const BEST: usize = 5;
/// Letters of a text that are shown.
const LONGEST: usize = 600;

/// Writes it.
///
/// # Errors
/// Files that cannot be read or written.
pub fn write(results: &Results, folder: &Folder) -> Result<()> {
    let questions = questions(folder)?;
    Ok(atomic::write(&folder.report(), render(results, &questions)?.as_bytes())?)
}

/// The page; `questions` are what the held-out rows ask, in their order.
fn render(results: &Results, questions: &[String]) -> Result<String> {
    let mut environment = Environment::new();
    // Rows are anybody's words: nothing but the plots, whose texts are escaped where they are drawn, is taken as it is.
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("report.html", TEMPLATE).context("the report's template is broken")?;
    let columns = table::columns(&results.variants);
    let titles: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
    let variants: Vec<Html> = results.variants.iter().enumerate().map(|(number, of)| {
        let cells: Vec<String> = columns.iter().map(|(_, text)| text(of)).collect();
        context! { number => number + 1, colour => plots::css(number), name => of.name, cells, chosen => of.name == results.answer.variant }
    }).collect();
    let page = context! {
        answer => results.answer,
        model => model_name(&results.provenance.model),
        held_out => results.data.held_out_in_words(),
        training_rows => grouped(results.data.training_rows as u64),
        titles,
        variants,
        left_out => results.decided.left_out,
        failed => results.failed,
        intervals => intervals(results)?,
        costs => costs(results)?,
        ranks => ranks(results)?,
        comparisons => comparisons(results, questions),
        flips_by => results.flips_by,
        curves => curves(results)?,
        settings => settings(results),
        provenance => provenance(results),
        command => results.provenance.command,
    };
    let template = environment.get_template("report.html")?;
    template.render(page).context("the report cannot be written")
}

/// A Hub id as it is, of a path the last part.
fn model_name(model: &str) -> String {
    let is_id = !Path::new(model).exists() && model.matches('/').count() == 1;
    let last = Path::new(model).file_name().filter(|_| !is_id);
    last.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}

/// What every held-out row asks.
fn questions(folder: &Folder) -> Result<Vec<String>> {
    let file = read_rows(&Files::from(&folder.held_out_rows()), &ReadOptions::AUTO)?;
    Ok(file.rows.iter().map(|row| row.text.question().unwrap_or_default()).collect())
}

fn svg(text: String) -> Html {
    Html::from_safe_string(text)
}

/// The differences from the base.
fn intervals(results: &Results) -> Result<Option<Html>> {
    let rows = results.variants.iter().enumerate().filter_map(|(number, of)| {
        let against = of.loss_against_base.as_ref()?;
        Some(plots::Row {
            number,
            name: of.name.clone(),
            estimate: against.estimate,
            low: against.low,
            high: against.high,
        })
    });
    let rows: Vec<plots::Row> = rows.collect();
    if rows.is_empty() {
        return Ok(None);
    }
    plots::intervals(&rows, "held-out loss, less the base's (further left is better)").map(svg).map(Some)
}

/// Levels of what has no cost to stand over.
fn untrained(results: &Results) -> Vec<Level> {
    let of = |of: &Summary| Level { y: of.loss, name: of.name.clone() };
    results.variants.iter().filter(|of| !of.trains()).map(of).collect()
}

fn loss_axis() -> Axis {
    Axis { title: "held-out loss".to_owned(), format: short, logarithmic: false }
}

/// Quality against each thing that it costs.
fn costs(results: &Results) -> Result<Vec<Html>> {
    type Cost = fn(&Summary) -> Option<f64>;
    let kinds: [(&str, plots::Format, bool, Cost); 4] = [
        ("trained parameters", short, true, |of| Some(of.trainable_parameters as f64)),
        ("time of training", |seconds| duration_label(seconds), false, |of| Some(of.seconds)),
        ("peak memory", bytes_label, false, |of| of.peak_rss_bytes.map(|bytes| bytes as f64)),
        ("file size", bytes_label, true, |of| Some(of.bytes as f64)),
    ];
    let mut found = Vec::new();
    for (title, format, logarithmic, cost) in kinds {
        let marks = results.variants.iter().enumerate().filter(|(_, of)| of.trains());
        let marks =
            marks.filter_map(|(number, of)| Some(Mark { number, x: cost(of)?, y: of.loss, on_frontier: false }));
        let mut marks: Vec<Mark> = marks.filter(|mark| mark.x > 0.0).collect();
        if marks.is_empty() {
            continue;
        }
        plots::mark_frontier(&mut marks);
        let shapes: Vec<Shape> = marks.iter().map(Shape::Mark).collect();
        let axis = Axis { title: title.to_owned(), format, logarithmic };
        found.push(svg(plots::plot(&axis, &loss_axis(), &shapes, &untrained(results), true)?));
    }
    Ok(found)
}

fn bytes_label(bytes: f64) -> String {
    if bytes <= 0.0 { "0".to_owned() } else { human(bytes as u64) }
}

fn duration_label(seconds: f64) -> String {
    if seconds <= 0.0 { "0".to_owned() } else { duration(seconds) }
}

/// Variants that have a rank, where several do: a table, and a plot where ranks differ.
fn ranks(results: &Results) -> Result<Option<Html>> {
    let rank = |of: &Summary| of.settings.pointer("/adapter/r").and_then(Value::as_u64);
    let ranked: Vec<(usize, &Summary, u64)> =
        results.variants.iter().enumerate().filter_map(|(number, of)| Some((number, of, rank(of)?))).collect();
    if ranked.len() < 2 {
        return Ok(None);
    }
    let rows: Vec<Html> = ranked.iter().map(|(number, of, rank)| {
        let targets = of.settings.pointer("/adapter/target_modules").map_or_else(|| "all-linear".to_owned(), plain);
        context! {
            number => number + 1, colour => plots::css(*number), name => of.name, rank, targets, loss => format!("{:.4}", of.loss),
            against => with_interval(of.loss_against_base.as_ref(), 3), parameters => grouped(of.trainable_parameters),
        }
    }).collect();
    let different: BTreeSet<u64> = ranked.iter().map(|(_, _, rank)| *rank).collect();
    let plot = if different.len() > 1 {
        let marks: Vec<Mark> = ranked
            .iter()
            .map(|(number, of, rank)| Mark { number: *number, x: *rank as f64, y: of.loss, on_frontier: false })
            .collect();
        let shapes: Vec<Shape> = marks.iter().map(Shape::Mark).collect();
        let levels: Vec<Level> =
            results.full().map(|full| Level { y: full.loss, name: full.name.clone() }).into_iter().collect();
        let axis = Axis { title: "rank".to_owned(), format: short, logarithmic: true };
        Some(svg(plots::plot(&axis, &loss_axis(), &shapes, &levels, false)?))
    } else {
        None
    };
    Ok(Some(context! { rows, plot }))
}

/// A setting as people write it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Null => NONE.to_owned(),
        other => other.to_string(),
    }
}

/// The rows that changed from the base, and from full fine-tuning, to the variant that the answer names, or to the best where that is the base.
fn comparisons(results: &Results, questions: &[String]) -> Vec<Html> {
    let best = || results.variants.iter().find(|of| of.name == results.answer.best);
    let Some(subject) = results.chosen().filter(|of| of.trains()).or_else(best) else { return Vec::new() };
    let others = [results.base(), results.full()].into_iter().flatten().filter(|other| other.name != subject.name);
    others.map(|other| comparison(other, subject, questions)).collect()
}

fn comparison(other: &Summary, subject: &Summary, questions: &[String]) -> Html {
    let measure = Measure::of_flips(&other.rows);
    let Flips { better, worse, equal } = scores::flips(measure, &other.rows, &subject.rows);
    let mut rows: Vec<(f64, usize, &RowScore, &RowScore)> = scores::both(&other.rows, &subject.rows)
        .filter_map(|(number, before, after)| Some((measure.gain(before, after)?, number, before, after)))
        .filter(|row| row.0 != 0.0)
        .collect();
    rows.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let shown = |&(gain, number, before, after): &(f64, usize, &RowScore, &RowScore)| {
        let question = number.checked_sub(1).and_then(|at| questions.get(at));
        context! {
            number,
            worse => gain < 0.0,
            question => question.map(|text| cut(text)),
            reference => after.reference.as_deref().map(cut),
            before => before.output(measure).map(cut),
            after => after.output(measure).map(cut),
            loss_before => format!("{:.3}", before.mean_loss()),
            loss_after => format!("{:.3}", after.mean_loss()),
        }
    };
    let worst: Vec<Html> = rows.iter().take_while(|row| row.0 < 0.0).take(WORST).map(shown).collect();
    let best: Vec<Html> = rows.iter().rev().take_while(|row| row.0 > 0.0).take(BEST).map(shown).collect();
    context! { other => other.name, subject => subject.name, better, worse, equal, worst, best }
}

/// As much of a text as is shown.
fn cut(text: &str) -> String {
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

/// Loss against steps, and against time.
fn curves(results: &Results) -> Result<Vec<Html>> {
    let mut found = Vec::new();
    let kinds: [(&str, plots::Format, bool); 2] = [("steps", short, false), ("time in steps", duration_label, true)];
    for (title, format, by_time) in kinds {
        let shapes = results.variants.iter().enumerate().filter_map(|(number, of)| {
            // One seed stands for all.
            let curve = &of.runs.first()?.training.as_ref()?.curve;
            let place = |point: &super::runs::Point| if by_time { point.seconds } else { point.step as f64 };
            let points = curve.iter().filter_map(|point| Some((place(point), point.loss?))).collect();
            let dots = curve.iter().filter_map(|point| Some((place(point), point.validation_loss?))).collect();
            Some(Shape::Line { number, points, dots })
        });
        let shapes: Vec<Shape> = shapes.collect();
        if shapes.is_empty() {
            continue;
        }
        let axis = Axis { title: title.to_owned(), format, logarithmic: false };
        let loss = Axis { title: "loss".to_owned(), ..loss_axis() };
        found.push(svg(plots::plot(&axis, &loss, &shapes, &[], false)?));
    }
    Ok(found)
}

/// A setting, and what each variant that trains has of it.
#[derive(Serialize)]
struct Setting {
    key: String,
    values: Vec<String>,
}

/// The settings in which variants differ, and those that all have.
fn settings(results: &Results) -> Html {
    let trained: Vec<&Summary> = results.variants.iter().filter(|of| of.trains()).collect();
    let mut keys: BTreeMap<String, Vec<Option<String>>> = BTreeMap::new();
    for (place, of) in trained.iter().enumerate() {
        let mut flat = vec![("method".to_owned(), of.method.unwrap_or_default().to_owned())];
        flatten("", &of.settings, &mut flat);
        for (key, value) in flat {
            if let Some(cell) = keys.entry(key).or_insert_with(|| vec![None; trained.len()]).get_mut(place) {
                *cell = Some(value);
            }
        }
    }
    let (same, different): (Vec<_>, Vec<_>) =
        keys.into_iter().partition(|(_, values)| values.windows(2).all(|pair| pair[0] == pair[1]));
    let value = |value: Option<String>| value.unwrap_or_else(|| NONE.to_owned());
    let different: Vec<Setting> = different
        .into_iter()
        .map(|(key, values)| Setting { key, values: values.into_iter().map(value).collect() })
        .collect();
    let same: Vec<String> =
        same.into_iter().filter_map(|(key, values)| Some(format!("{key}: {}", values.into_iter().next()??))).collect();
    let names: Vec<&str> = trained.iter().map(|of| of.name.as_str()).collect();
    context! { names, different, same => same.join(", ") }
}

fn flatten(prefix: &str, value: &Value, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&path, value, found);
            }
        }
        // What is not set is what it is for a variant that has no such key.
        Value::Null => {}
        value => found.push((prefix.to_owned(), plain(value))),
    }
}

/// Where it comes from, by name.
fn provenance(results: &Results) -> Vec<(&'static str, String)> {
    let of = &results.provenance;
    let mut found = vec![
        ("model", of.model.clone()),
        ("its parameters", grouped(of.base_parameters as u64)),
        ("its weights", of.base_content_hash.clone()),
        ("training rows", format!("{} of {}", results.data.training_rows, results.data.train_file)),
        ("their SHA-256", results.data.training_hash.clone()),
        ("held-out rows", results.data.held_out_in_words()),
        ("their SHA-256", results.data.held_out_hash.clone()),
        ("retune", of.retune.to_owned()),
        ("instruction set", of.isa.clone()),
        ("threads", of.threads.to_string()),
    ];
    if let Some(steps) = results.decided.steps {
        found.push(("steps of each run", format!("{steps}, by the minutes that were given")));
    }
    found
}
