//! `retune eval`: loss and perplexity on a data file.

use std::fmt::Display;

use anyhow::{Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use retune_model::pass::Pass;
use retune_model::workspace::{Keep, Workspace};
use retune_train::data::{DataFormat, Dataset, Encoder, read_rows};
use retune_train::run_config::{DataConfig, RunConfig};
use retune_train::trainer::held_out_loss;
use serde_json::{Map, json};

use super::data::problems;
use super::print_json;
use crate::args::{EvalArgs, RowFormat};
use crate::compute;
use crate::session::Session;

const TOKENS_PER_PASS: usize = 1024;

/// What keys of a run file are called here; a longer key stands before the one it begins with.
const FLAGS: [(&str, &str); 4] = [
    ("data.columns.", "--columns "),
    ("data.columns", "--columns"),
    ("data.format", "--format"),
    ("data.max_length", "--max-length"),
];

impl From<RowFormat> for DataFormat {
    fn from(format: RowFormat) -> Self {
        match format {
            RowFormat::Auto => DataFormat::Auto,
            RowFormat::Messages => DataFormat::Messages,
            RowFormat::PromptCompletion => DataFormat::PromptCompletion,
            RowFormat::Alpaca => DataFormat::Alpaca,
            RowFormat::Text => DataFormat::Text,
        }
    }
}

/// Scores the rows and prints the result.
pub fn run(args: &EvalArgs) -> Result<()> {
    if args.limit == Some(0) {
        bail!("--limit is 0; expected at least 1: leave it out to score all rows");
    }
    let config = data_config(args)?;
    let mut session = Session::open(&args.model)?;
    let tokenizer = session.tokenizer()?;
    let mut file = read_rows(&args.data, config.format, &config.columns).map_err(|error| anyhow!(in_flags(error)))?;
    file.rows.truncate(args.limit.unwrap_or(usize::MAX));
    let encoder = Encoder::new(&tokenizer, config.encode_options())?;
    let data = Dataset::build(&file, &encoder, None).map_err(|error| anyhow!(in_flags(error)))?;
    let report = &data.report;
    for problem in problems(report) {
        note!("! {}", in_flags(problem));
    }
    let choices = compute::apply(
        &mut session.model,
        &session.params,
        args.compute.into(),
        &compute::calibration_pass(&data.examples),
        false,
    )?;
    let bar = ProgressBar::new(data.examples.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} rows, {eta} left")?);
    let mut workspace = Workspace::new(&session.model, Keep::Nothing);
    let (sum, labels) = held_out_loss(
        &session.model,
        &session.params,
        &data.examples,
        TOKENS_PER_PASS,
        &mut Pass::sharing_prefixes(true),
        &mut workspace,
        |done| bar.set_position(done as u64),
    )?;
    bar.finish_and_clear();
    let loss = sum / labels.max(1) as f64;
    if args.json {
        print_json(&json!({
            "loss": loss,
            "perplexity": loss.exp(),
            "rows": report.examples,
            "dropped": report.rows - report.examples,
            "tokens": report.tokens,
            "label_tokens": labels,
            "truncated": report.truncated.count,
            "tokens_cut": report.tokens_cut,
            "compute": compute::summary(&choices),
        }))?;
    } else {
        outln!("loss        {loss:.4}  (nats per label token)");
        outln!("perplexity  {:.3}", loss.exp());
        outln!("rows        {} of {}, {} tokens, {labels} of them scored", report.examples, report.rows, report.tokens);
    }
    Ok(())
}

/// What a run file's section `data` would say, so that it is checked as that is. A run's other keys have no part in it.
fn data_config(args: &EvalArgs) -> Result<DataConfig> {
    let mut columns = Map::new();
    for text in &args.columns {
        let Some((column, name)) = text.split_once('=') else {
            bail!("--columns {text:?} has no `=`; expected COLUMN=NAME, for example prompt=question");
        };
        if columns.insert(column.to_owned(), json!(name)).is_some() {
            bail!("--columns names the column {column} twice; give it one name");
        }
    }
    let run = json!({
        "model": "unused",
        "output_dir": "unused",
        "data": {
            "train": "unused",
            "format": DataFormat::from(args.format),
            "columns": columns,
            "max_length": args.max_length,
            "train_on_prompt": args.whole_text,
        },
    });
    // JSON is YAML.
    let config = RunConfig::parse(&run.to_string(), "the command line", &[]);
    Ok(config.map_err(|error| anyhow!(in_flags(error)))?.data)
}

/// A message about data with this command's flags in place of a run file's keys.
fn in_flags(message: impl Display) -> String {
    FLAGS.iter().fold(message.to_string(), |text, (key, flag)| text.replace(key, flag))
}
