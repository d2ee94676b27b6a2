//! `retune eval`: loss and perplexity on a data file.

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use retune_model::workspace::{Keep, Workspace};
use retune_train::data::{ColumnMap, DataFormat, Dataset, EncodeOptions, Encoder, Overlong, read_rows};
use retune_train::trainer::held_out_loss;
use serde_json::json;

use super::print_json;
use crate::args::EvalArgs;
use crate::compute;
use crate::session::Session;

const TOKENS_PER_PASS: usize = 1024;

/// Scores the rows and prints the result.
pub fn run(args: &EvalArgs) -> Result<()> {
    if args.limit == Some(0) || args.max_length < 2 {
        bail!("--limit must be at least 1 and --max-length at least 2");
    }
    let mut session = Session::open(&args.model)?;
    let tokenizer = session.tokenizer()?;
    let mut file = read_rows(&args.data, DataFormat::Auto, &ColumnMap::default())?;
    file.rows.truncate(args.limit.unwrap_or(usize::MAX));
    let options =
        EncodeOptions { max_length: args.max_length, overlong: Overlong::Truncate, train_on_prompt: args.whole_text };
    let data = Dataset::build(&file, &Encoder::new(&tokenizer, options)?, None)?;
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
    let (sum, labels) =
        held_out_loss(&session.model, &session.params, &data.examples, TOKENS_PER_PASS, &mut workspace, |done| {
            bar.set_position(done as u64)
        })?;
    bar.finish_and_clear();
    let loss = sum / labels.max(1) as f64;
    if args.json {
        print_json(&json!({
            "loss": loss,
            "perplexity": loss.exp(),
            "rows": data.examples.len(),
            "tokens": data.report.tokens,
            "label_tokens": labels,
            "truncated": data.report.truncated.count,
            "compute": compute::summary(&choices),
        }))?;
    } else {
        outln!("loss        {loss:.4}  (nats per label token)");
        outln!("perplexity  {:.3}", loss.exp());
        outln!("rows        {}, {} tokens, {labels} of them scored", data.examples.len(), data.report.tokens);
        if data.report.truncated.count > 0 {
            outln!("            {} rows were cut at {} tokens", data.report.truncated.count, args.max_length);
        }
    }
    Ok(())
}
