//! `retune data`: what the model will see of a run's data, and what is wrong with it.

use std::io::IsTerminal;

use anyhow::Result;
use retune_model::checkpoint::Checkpoint;
use retune_text::tokenizer::Tokenizer;
use retune_train::data::{DataReport, Example, LengthBin, Names, RowCount, decoded_sample};
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

/// What is wrong with a data set, a line each; empty when nothing is. Settings are called as `names` says.
pub fn problems(report: &DataReport, names: &Names) -> Vec<String> {
    let Names { max_length, overlong, .. } = names;
    let line = |count: &RowCount, what: &str| {
        let lines: Vec<_> = count.first_lines.iter().map(usize::to_string).collect();
        let more = if count.count > lines.len() { ", …" } else { "" };
        (count.count > 0).then(|| format!("{} {what} (lines {}{more})", count.count, lines.join(", ")))
    };
    let cut = format!("rows cut at {max_length}, {} tokens lost", report.tokens_cut);
    let or_drop = overlong.map_or_else(String::new, |overlong| format!(" or {overlong}=drop"));
    let ends_cut =
        format!("answers lose their end: the model is not taught to stop there; set {max_length} higher{or_drop}");
    [
        line(&report.truncated, &cut),
        line(&report.answers_cut, &ends_cut),
        line(&report.special_in_answers, "answers hold the text of a token such as </s>: it is learnt as that token"),
        line(
            &report.prompts_held_out,
            "rows ask what a held-out row asks, with another answer: the held-out loss may flatter",
        ),
        line(&report.dropped_too_long, &format!("rows left out: longer than {max_length}")),
        line(&report.dropped_cut_away, &format!("rows left out: the answer lies beyond {max_length}")),
        line(&report.dropped_empty, "rows left out: no text"),
        line(&report.duplicates, "rows repeat an earlier one"),
        line(&report.empty_answers, "rows with an empty answer: the model learns to say nothing"),
        line(&report.empty_inputs, "rows with an empty input: the encoder has nothing to read"),
        line(&report.overlap_with_held_out, "rows are held out as well: the held-out loss will flatter"),
    ]
    .into_iter()
    .flatten()
    .collect()
}
