//! The report of a comparison.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use minijinja::context;
use minijinja::value::Value as Html;
use retune_eval::bootstrap::Difference;
use retune_formats::atomic;
use retune_train::data::{Files, ReadOptions, read_rows};
use serde::Serialize;
use serde_json::Value;

use super::answer::grouped;
use super::folder::Folder;
use super::results::{Results, Summary};
use super::scores::{self, Flips, Measure, RowScore};
use super::table::{self, with_interval};
use crate::page::plots::{self, Axis, Level, Mark, Shape, short};
use crate::page::{self, NONE, bytes_label, duration_label, flatten, loss_axis, model_name, plain, svg};

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
        intervals => intervals(results, "held-out loss, less the base's (further left is better)", |of| of.loss_against_base.as_ref())?,
        costs => costs(results)?,
        ranks => ranks(results)?,
        comparisons => comparisons(results, questions),
        flips_by => results.flips_by,
        curves => curves(results)?,
        memory => memory(results)?,
        forgetting => forgetting(results)?,
        data => data(results)?,
        settings => settings(results),
        provenance => provenance(results),
        command => results.provenance.command,
    };
    page::render(TEMPLATE, page)
}

/// What every held-out row asks.
fn questions(folder: &Folder) -> Result<Vec<String>> {
    let file = read_rows(&Files::from(&folder.held_out_rows()), &ReadOptions::AUTO)?;
    Ok(file.rows.iter().map(|row| row.text.question().unwrap_or_default()).collect())
}

/// The differences from the base, of one kind.
fn intervals(results: &Results, title: &str, of: fn(&Summary) -> Option<&Difference>) -> Result<Option<Html>> {
    let rows = results.variants.iter().enumerate().filter_map(|(number, summary)| {
        let &Difference { estimate, low, high, .. } = of(summary)?;
        Some(plots::Row { number, name: summary.name.clone(), estimate, low, high })
    });
    let rows: Vec<plots::Row> = rows.collect();
    if rows.is_empty() { Ok(None) } else { plots::intervals(&rows, title).map(svg).map(Some) }
}

/// What each forgot of the neutral text.
fn forgetting(results: &Results) -> Result<Option<Html>> {
    let title = "loss on neutral text, less the base's (further left is better)";
    let Some(plot) = intervals(results, title, |of| of.neutral_against_base.as_ref())? else { return Ok(None) };
    let scored = results.variants.iter().enumerate().filter_map(|(number, of)| Some((number, of, of.neutral_loss?)));
    let rows = scored.map(|(number, of, loss)| {
        let against = with_interval(of.neutral_against_base.as_ref(), 3);
        context! { number => number + 1, colour => plots::css(number), name => of.name, loss => format!("{loss:.4}"), against }
    });
    Ok(Some(context! { plot, rows => rows.collect::<Vec<Html>>() }))
}

/// What is in the training rows.
fn data(results: &Results) -> Result<Option<Html>> {
    let Some(report) = &results.training_data else { return Ok(None) };
    Ok(Some(page::data("Rows trained on", report)?))
}

/// Levels of what has no cost to stand over.
fn untrained(results: &Results) -> Vec<Level> {
    let of = |of: &Summary| Level { y: of.loss, name: of.name.clone() };
    results.variants.iter().filter(|of| !of.trains()).map(of).collect()
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
        let shapes: Vec<Shape> = marks.into_iter().map(Shape::Mark).collect();
        let axis = Axis { title: title.to_owned(), format, logarithmic };
        found.push(svg(plots::plot(&axis, &loss_axis("held-out loss"), &shapes, &untrained(results), true)?));
    }
    Ok(found)
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
        let shapes: Vec<Shape> = marks.into_iter().map(Shape::Mark).collect();
        let levels: Vec<Level> =
            results.full().map(|full| Level { y: full.loss, name: full.name.clone() }).into_iter().collect();
        let axis = Axis { title: "rank".to_owned(), format: short, logarithmic: true };
        Some(svg(plots::plot(&axis, &loss_axis("held-out loss"), &shapes, &levels, false)?))
    } else {
        None
    };
    Ok(Some(context! { rows, plot }))
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

/// Loss against steps, tokens and time.
fn curves(results: &Results) -> Result<Vec<Html>> {
    page::curves(|place| {
        let shapes = results.variants.iter().enumerate().filter_map(|(number, of)| {
            // One seed stands for all.
            let curve = &of.runs.first()?.training.as_ref()?.curve;
            let points = curve.iter().filter_map(|point| Some((place(point), point.loss?))).collect();
            let dots = curve.iter().filter_map(|point| Some((place(point), point.validation_loss?))).collect();
            Some(Shape::Line { number, points, dots })
        });
        shapes.collect()
    })
}

/// Memory by part of what was trained: of the seed that took the most.
fn memory(results: &Results) -> Result<Option<Html>> {
    let runs = results.variants.iter().filter_map(|of| {
        let trainings = of.runs.iter().filter_map(|run| run.training.as_ref());
        let training = trainings.max_by_key(|training| training.peak_rss_bytes)?;
        (training.memory.total() > 0).then_some((of.name.as_str(), &training.memory, training.peak_rss_bytes))
    });
    page::memory(&runs.collect::<Vec<_>>())
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
