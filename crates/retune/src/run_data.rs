//! The training and held-out examples of a run.

use anyhow::Result;
use retune_engine::spec::ModelSpec;
use retune_text::tokenizer::Tokenizer;
use retune_train::Error;
use retune_train::data::{Dataset, Encoder, Names, read_rows, split};
use retune_train::run_config::RunConfig;

/// Both data sets; no held-out one when none was asked for.
pub struct RunData {
    pub train: Dataset,
    pub eval: Option<Dataset>,
}

impl RunData {
    /// Reads the files a run names for a model of this spec. One file alone is split.
    pub fn load(config: &RunConfig, tokenizer: &Tokenizer, spec: &ModelSpec) -> Result<Self> {
        let data = &config.data;
        let rows = read_rows(&data.train, data.format, &data.columns, &Names::KEYS)?;
        let (rows, held_out) = match &data.eval {
            Some(path) => (rows, Some(read_rows(path, data.format, &data.columns, &Names::KEYS)?)),
            None if data.eval_fraction > 0.0 => {
                let (rows, held_out) = split(rows, data.eval_fraction, config.training.seed);
                (rows, Some(held_out).filter(|file| !file.rows.is_empty()))
            }
            None => (rows, None),
        };
        let encoder = Encoder::new(tokenizer, data.encode_options(spec.encoder.is_some(), &Names::KEYS))?;
        let train = Dataset::build(&rows, &encoder, held_out.as_ref())?;
        let eval = held_out.map(|mut file| {
            file.rows.truncate(data.eval_limit.unwrap_or(usize::MAX));
            match Dataset::build(&file, &encoder, None) {
                // Of the few rows that a split holds out, all may be too long; a file of held-out rows should not be.
                Err(Error::NothingToTrain { .. }) if data.eval.is_none() => Ok(None),
                built => built.map(Some),
            }
        });
        Ok(Self { train, eval: eval.transpose()?.flatten() })
    }
}
