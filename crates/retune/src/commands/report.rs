//! `retune report`: a page about one run.

use anyhow::Result;
use retune_formats::atomic;
use serde_json::json;

use super::print_json;
use crate::args::ReportArgs;
use crate::page::run::RunPage;
use crate::run_folder::RunFolder;

/// Writes the page, and says where.
pub fn run(args: &ReportArgs) -> Result<()> {
    let page = RunPage::read(&args.run)?.render()?;
    let out = args.out.clone().unwrap_or_else(|| RunFolder { root: args.run.clone() }.page());
    atomic::write(&out, page.as_bytes())?;
    if args.json {
        return print_json(&json!({ "report": out }));
    }
    outln!("report   {}", out.display());
    Ok(())
}
