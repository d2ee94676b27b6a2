//! `retune fetch`: a model into the cache.

use anyhow::Result;

use crate::args::FetchArgs;
use crate::fetch;

/// Fetches the model and says where it is.
pub fn run(args: &FetchArgs) -> Result<()> {
    let path = fetch::fetch(&args.id, &|message| note!("{message}"))?;
    outln!("{}", path.display());
    Ok(())
}
