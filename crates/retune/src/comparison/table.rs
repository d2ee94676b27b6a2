//! A comparison as a table: in the terminal, and as CSV.

use anyhow::Result;
use retune_eval::bootstrap::Difference;
use retune_formats::atomic;
use std::path::Path;

use super::answer::{duration, grouped};
use super::results::{Results, Summary};
use crate::memory::human;
use crate::page::NONE;

/// A difference with its interval.
pub fn with_interval(difference: Option<&Difference>, digits: usize) -> String {
    let interval = |Difference { estimate, low, high, .. }: &Difference| {
        format!("{estimate:+.digits$} [{low:+.digits$}, {high:+.digits$}]")
    };
    difference.map_or_else(|| NONE.to_owned(), interval)
}

/// A column: its title, and its text for a variant.
pub type Column = (&'static str, Box<dyn Fn(&Summary) -> String>);

/// The columns that have anything to show.
pub fn columns(variants: &[Summary]) -> Vec<Column> {
    let share = |value: Option<f64>| value.map_or_else(|| NONE.to_owned(), |value| format!("{value:.3}"));
    let if_trained = |summary: &Summary, text: String| if summary.trains() { text } else { NONE.to_owned() };
    let mut columns: Vec<Column> = vec![
        ("held-out loss", Box::new(|of| format!("{:.4}", of.loss))),
        ("against base", Box::new(|of| with_interval(of.loss_against_base.as_ref(), 3))),
    ];
    let has = |value: fn(&Summary) -> Option<f64>| variants.iter().any(|of| value(of).is_some());
    if has(|of| of.accuracy) {
        columns.push(("accuracy", Box::new(move |of| share(of.accuracy))));
        columns.push(("against base", Box::new(|of| with_interval(of.accuracy_against_base.as_ref(), 3))));
    }
    // Of a label they say nothing more.
    if has(|of| of.rouge_l) && !has(|of| of.accuracy) {
        columns.push(("ROUGE-L", Box::new(move |of| share(of.rouge_l))));
        columns.push(("exact", Box::new(move |of| share(of.exact_match))));
    }
    columns.push(("trained", Box::new(move |of| if_trained(of, grouped(of.trainable_parameters)))));
    columns.push(("file", Box::new(move |of| if_trained(of, human(of.bytes)))));
    columns.push(("memory", Box::new(|of| of.peak_rss_bytes.map_or_else(|| NONE.to_owned(), human))));
    columns.push(("training", Box::new(move |of| if_trained(of, duration(of.seconds)))));
    columns
}

/// Prints the table; the variant that the answer names has a star.
///
/// # Errors
/// A standard output that cannot be written to.
pub fn print(results: &Results) -> Result<()> {
    let columns = columns(&results.variants);
    let titles = ["", "variant"].into_iter().chain(columns.iter().map(|(title, _)| *title)).map(str::to_owned);
    let mut lines: Vec<Vec<String>> = vec![titles.collect()];
    for summary in &results.variants {
        let star = if summary.name == results.answer.variant { "*" } else { "" };
        let texts = columns.iter().map(|(_, text)| text(summary));
        lines.push([star.to_owned(), summary.name.clone()].into_iter().chain(texts).collect());
    }
    let width = |at: usize| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len() + 2).map(width).collect();
    for line in &lines {
        let cells = line.iter().zip(&widths).enumerate().map(|(at, (text, width))| match at {
            0 | 1 => format!("{text:<width$}"),
            _ => format!("{text:>width$}"),
        });
        outln!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    Ok(())
}

/// Writes a line of each run, numbers as they are.
///
/// # Errors
/// What the system refuses.
pub fn write_csv(results: &Results, path: &Path) -> Result<()> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "name",
        "method",
        "seed",
        "loss",
        "perplexity",
        "accuracy",
        "macro_f1",
        "rouge_l",
        "exact_match",
        "neutral_loss",
        "loss_against_base",
        "loss_against_base_low",
        "loss_against_base_high",
        "trainable_parameters",
        "bytes",
        "steps",
        "peak_rss_bytes",
        "seconds",
    ])?;
    for summary in &results.variants {
        for run in &summary.runs {
            let of = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
            let against = |value: fn(&Difference) -> f64| of(summary.loss_against_base.as_ref().map(value));
            let training = run.training.as_ref();
            let count = |value: Option<u64>| value.map_or_else(String::new, |value| value.to_string());
            writer.write_record([
                run.name.clone(),
                summary.method.unwrap_or_default().to_owned(),
                run.seed.to_string(),
                run.scores.loss.to_string(),
                run.scores.perplexity.to_string(),
                of(run.scores.accuracy),
                of(run.scores.macro_f1),
                of(run.scores.rouge_l),
                of(run.scores.exact_match),
                of(run.scores.neutral_loss),
                // Of all seeds together.
                against(|difference| difference.estimate),
                against(|difference| difference.low),
                against(|difference| difference.high),
                count(training.map(|of| of.trainable_parameters)),
                count(training.map(|of| of.bytes)),
                count(training.map(|of| of.steps)),
                count(training.and_then(|of| of.peak_rss_bytes)),
                of(training.map(|of| of.seconds)),
            ])?;
        }
    }
    Ok(atomic::write(path, &writer.into_inner()?)?)
}
