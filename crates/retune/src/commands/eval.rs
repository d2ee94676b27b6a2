//! `retune eval`: loss and perplexity on a data file.

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use retune_engine::Saving;
use retune_engine::pass::Pass;
use retune_engine::workspace::Workspace;
use retune_train::data::{ColumnMap, Dataset, Encoder, Names, read_rows};
use retune_train::run_config::DataConfig;
use retune_train::trainer::{Trained, held_out_loss};
use serde_json::json;

use super::data::problems;
use super::print_json;
use crate::args::EvalArgs;
use crate::compute;
use crate::session::{self, Session};

const TOKENS_PER_PASS: usize = 1024;

/// What settings of a data set are called here.
const FLAGS: Names = Names {
    rows: "--data",
    columns: "--columns",
    column: "--columns ",
    format: "--format",
    max_length: "--max-length",
    overlong: None,
};

/// Scores the rows and prints the result.
pub fn run(args: &EvalArgs) -> Result<()> {
    if args.limit == Some(0) {
        bail!("--limit is 0; expected at least 1: leave it out to score all rows");
    }
    let config = data_config(args)?;
    let session = Session::open(&args.model)?;
    let tokenizer = session.base.tokenizer()?;
    let mut file = read_rows(&args.data, config.format, &config.columns, &FLAGS)?;
    file.rows.truncate(args.limit.unwrap_or(usize::MAX));
    let encoder = Encoder::new(tokenizer, config.encode_options(&FLAGS))?;
    let data = Dataset::build(&file, &encoder, None)?;
    let report = &data.report;
    for problem in problems(report, &FLAGS) {
        note!("! {problem}");
    }
    let Session { model, overlay, params, .. } = &session;
    session::refuse_long_rows(&model.spec, overlay, &data.examples, "--max-length")?;
    let prelude = overlay.prelude(&model.spec);
    let pass = compute::calibration_pass(&prelude, &data.examples);
    let (compute, choices) = compute::choose(model, overlay, params, args.compute, &pass, false);
    let bar = ProgressBar::new(data.examples.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} rows, {eta} left")?);
    let mut workspace = Workspace::new(model, Saving::None);
    let (sum, labels) = held_out_loss(
        Trained { model, overlay, compute: &compute },
        params,
        &data.examples,
        TOKENS_PER_PASS,
        &mut Pass::new(prelude, model.spec.may_share_prefixes()),
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

/// What a run file's section `data` would say, checked as that is.
fn data_config(args: &EvalArgs) -> Result<DataConfig> {
    let mut columns = ColumnMap::default();
    for text in &args.columns {
        let Some((column, name)) = text.split_once('=') else {
            bail!("--columns {text:?} has no `=`; expected COLUMN=NAME, for example prompt=question");
        };
        if columns.set(column, name, &FLAGS)?.is_some() {
            bail!("--columns names the column {column} twice; give it one name");
        }
    }
    let config = DataConfig {
        format: args.format,
        columns,
        max_length: args.max_length,
        train_on_prompt: args.whole_text,
        ..DataConfig::new(args.data.clone())
    };
    config.check(&FLAGS)?;
    Ok(config)
}
