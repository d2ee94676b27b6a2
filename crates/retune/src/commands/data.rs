//! `retune data`: what the model will see of a run's data, and what is wrong with it.

use std::io::IsTerminal;

use anyhow::Result;
use retune_model::checkpoint::Checkpoint;
use retune_text::tokenizer::Tokenizer;
use retune_train::data::{
    Class, Counted, DataReport, Example, LengthBin, Names, Reading, RowCount, Taken, decoded_sample,
};
use retune_train::run_config::RunConfig;
use serde_json::{Value, json};

use super::print_json;
use crate::args::DataArgs;
use crate::fetch;
use crate::run_data::RunData;

/// Prints rendered rows and the report.
pub fn run(args: &DataArgs) -> Result<()> {
    let config = RunConfig::load(&args.run.path, &args.run.overrides)?;
    let checkpoint = Checkpoint::open(&fetch::resolve(&config.model)?)?;
    let tokenizer = checkpoint.tokenizer()?;
    let data = RunData::load(&config, &tokenizer, &checkpoint.spec)?;
    let shown = data.train.examples.iter().take(args.rows);
    if args.json {
        let rows: Vec<Value> = shown.map(|example| row(&tokenizer, example)).collect();
        let eval = data.eval.as_ref().map(|eval| &eval.report);
        return print_json(&json!({ "rows": rows, "train": data.train.report, "eval": eval }));
    }
    for example in shown {
        print_example(&tokenizer, example)?;
    }
    print_report("training rows", &data.train.report)?;
    if let Some(eval) = &data.eval {
        print_report("held-out rows", &eval.report)?;
    }
    Ok(())
}

/// The row for a program: its text, special tokens included, and for each of its tokens whether it is trained.
fn row(tokenizer: &Tokenizer, example: &Example) -> Value {
    let mut row = json!({
        "row": example.row + 1,
        "text": tokenizer.decode(&example.ids, false),
        "ids": example.ids,
        "trained": example.trained,
    });
    if !example.source.is_empty() {
        row["source"] = json!({ "text": tokenizer.decode(&example.source, false), "ids": example.source });
    }
    row
}

/// The row as text, the trained part green (or between «» where there are no colours).
fn print_example(tokenizer: &Tokenizer, example: &Example) -> Result<()> {
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (on, off) = if colours { ("\x1b[1;32m", "\x1b[0m") } else { ("«", "»") };
    outln!("row {}: {} tokens, {} trained", example.row + 1, example.tokens(), example.trained_tokens());
    for (text, trained) in decoded_sample(tokenizer, example) {
        if trained { out!("{on}{text}{off}") } else { out!("{text}") }
    }
    outln!("\n");
    Ok(())
}

fn print_report(title: &str, report: &DataReport) -> Result<()> {
    outln!("{title}: {} ({})", report.path.display(), report.format);
    outln!("  {} rows, {} used", report.rows, report.examples);
    outln!("  {} tokens, {} trained; the longest row has {}", report.tokens, report.trained_tokens, report.longest);
    if !report.classes.is_empty() {
        let class = |Class { answer, rows }: &Class| format!("{answer:?} {rows}");
        outln!("  answers: {}", report.classes.iter().map(class).collect::<Vec<_>>().join(", "));
    }
    let most = report.lengths.iter().map(|b| b.examples).max().unwrap_or(0);
    for LengthBin { from, to, examples } in &report.lengths {
        let bar = "#".repeat((examples * 40).div_ceil(most.max(1)));
        outln!("  {from:>6}–{to:<6} {examples:>6} {bar}");
    }
    for problem in problems(report, &Names::KEYS) {
        outln!("  ! {problem}");
    }
    outln!();
    Ok(())
}

/// What is wrong with a data set, or was decided about it, a line each; empty when there is nothing to say. Settings are called
/// as `names` says.
pub fn problems(report: &DataReport, names: &Names) -> Vec<String> {
    let mut lines = of_reading(&report.reading, names);
    lines.extend(of_template(report));
    lines.extend(of_rows(report, names));
    lines
}

/// The count with its lines and what they have in common; nothing of none.
fn line(count: &RowCount, what: &str) -> Option<String> {
    let lines: Vec<_> = count.first_lines.iter().map(usize::to_string).collect();
    let more = if count.count > lines.len() { ", …" } else { "" };
    (count.count > 0).then(|| format!("{} {what} (lines {}{more})", count.count, lines.join(", ")))
}

/// How columns were understood, and what was left unread.
fn of_reading(reading: &Reading, names: &Names) -> Vec<String> {
    let taken = reading.taken.iter().map(|Taken { column, taken_as }| {
        format!("the column {column:?} is taken as {taken_as}; {}{taken_as}=COLUMN takes another", names.column)
    });
    let rows = |counted: &[Counted], what: &dyn Fn(&str) -> String| -> Vec<String> {
        counted.iter().filter_map(|Counted { name, rows }| line(rows, &what(name))).collect()
    };
    let mut lines: Vec<String> = taken.collect();
    lines.extend(rows(&reading.columns_not_read, &|name| format!("rows have a column {name:?}, which is not read")));
    lines.extend(rows(&reading.keys_not_read, &|name| {
        format!("rows have messages with a key {name:?}, which is not read")
    }));
    lines.extend(rows(&reading.other_roles, &|name| {
        format!(
            "rows have turns of the role {name:?}: the chat template is given them as they are, and they are not learnt"
        )
    }));
    let first = reading.first_skipped.as_deref().unwrap_or_default();
    lines.extend(
        line(&reading.skipped, "rows left out, which cannot be read").map(|line| format!("{line}. The first: {first}")),
    );
    lines
}

/// What the chat template did with the words of rows.
fn of_template(report: &DataReport) -> Vec<String> {
    let (answer, text) =
        report.first_changed.as_ref().map_or(("", ""), |(answer, text)| (answer.as_str(), text.as_str()));
    let changed = line(&report.answers_changed, "rows have an answer that the chat template cuts or replaces");
    let changed = changed.map(|line| format!("{line}. The first: {answer:?} became {text:?}"));
    let trimmed =
        line(&report.answers_trimmed, "rows have white space around an answer, which the chat template removes");
    let left_out = report.left_out_by_template.iter().filter_map(|Counted { name, rows }| {
        line(rows, &format!("rows have {name} that the chat template does not write: they are not learnt, and the model is not told of them"))
    });
    changed.into_iter().chain(trimmed).chain(left_out).collect()
}

/// What is odd about the rows.
fn of_rows(report: &DataReport, names: &Names) -> Vec<String> {
    let Names { max_length, overlong, .. } = names;
    let cut = format!("rows cut at {max_length}, {} tokens lost", report.tokens_cut);
    let or_drop = overlong.map_or_else(String::new, |overlong| format!(" or {overlong}=drop"));
    let ends_cut =
        format!("answers lose their end: the model is not taught to stop there; set {max_length} higher{or_drop}");
    let (row, held_out) =
        report.first_near.as_ref().map_or(("", ""), |(row, held_out)| (row.as_str(), held_out.as_str()));
    let near = line(&report.near_held_out, "rows are nearly the same as a held-out row: the held-out loss may flatter")
        .map(|line| format!("{line}. The first: {row:?} beside {held_out:?}"));
    [
        line(&report.truncated, &cut),
        line(&report.answers_cut, &ends_cut),
        line(&report.special_in_answers, "answers hold the text of a token such as </s>: it is learnt as that token"),
        line(
            &report.special_in_texts,
            "rows hold the text of a special token such as <|im_start|>: it is read as that token",
        ),
        line(
            &report.prompts_held_out,
            "rows ask what a held-out row asks, with another answer: the held-out loss may flatter",
        ),
        near,
        line(&report.dropped_too_long, &format!("rows left out: longer than {max_length}")),
        line(&report.dropped_cut_away, &format!("rows left out: the answer lies beyond {max_length}")),
        line(&report.dropped_empty, "rows left out: they hold nothing to learn"),
        line(&report.duplicates, "rows repeat an earlier one"),
        line(&report.empty_answers, "rows with an empty answer: the model learns to say nothing"),
        line(&report.empty_inputs, "rows with an empty input: the encoder has nothing to read"),
        line(&report.overlap_with_held_out, "rows are held out as well: the held-out loss will flatter"),
    ]
    .into_iter()
    .flatten()
    .collect()
}
