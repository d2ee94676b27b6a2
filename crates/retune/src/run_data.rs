//! The training and held-out examples of a run.

use anyhow::Result;
use retune_engine::spec::ModelSpec;
use retune_text::tokenizer::Tokenizer;
use retune_train::Error;
use retune_train::data::{DataFile, Dataset, Encoder, Example, Names, read_rows, split};
use retune_train::run_config::{DataConfig, RunConfig};
use sha2::{Digest, Sha256};

/// Both data sets; no held-out one when none was asked for.
pub struct RunData {
    pub train: Dataset,
    pub eval: Option<Dataset>,
}

impl RunData {
    /// Reads the files a run names for a model of this spec.
    pub fn load(config: &RunConfig, tokenizer: &Tokenizer, spec: &ModelSpec) -> Result<Self> {
        let data = &config.data;
        let HeldOut { train, file } = HeldOut::read(data, config.training.seed)?;
        let encoder = Encoder::new(tokenizer, data.encode_options(spec.encoder.is_some(), &Names::KEYS))?;
        let train = Dataset::build(&train, &encoder, file.as_ref())?;
        let eval = file.map(|file| held_out(file, data, tokenizer, spec)).transpose()?.flatten();
        Ok(Self { train, eval })
    }
}

/// The rows of the files a run names.
pub struct HeldOut {
    pub train: DataFile,
    /// Those that are not trained on, if there are any.
    pub file: Option<DataFile>,
}

impl HeldOut {
    /// Reads them. One file alone is split.
    pub fn read(data: &DataConfig, seed: u64) -> Result<Self> {
        let rows = read_rows(&data.train, &data.read_options(&Names::KEYS))?;
        let (train, file) = match &data.eval {
            Some(path) => (rows, Some(read_rows(path, &data.read_options(&Names::KEYS))?)),
            None if data.eval_fraction > 0.0 => {
                let (rows, held_out) = split(rows, data.eval_fraction, seed);
                (rows, Some(held_out).filter(|file| !file.rows.is_empty()))
            }
            None => (rows, None),
        };
        Ok(Self { train, file })
    }
}

/// The examples of a file of rows, whose settings are called as `names` says.
pub fn dataset(
    file: &DataFile,
    data: &DataConfig,
    names: &Names,
    tokenizer: &Tokenizer,
    spec: &ModelSpec,
) -> Result<Dataset> {
    let encoder = Encoder::new(tokenizer, data.encode_options(spec.encoder.is_some(), names))?;
    Ok(Dataset::build(file, &encoder, None)?)
}

/// The examples of the first held-out rows, as many as are scored.
pub fn held_out(
    mut file: DataFile,
    data: &DataConfig,
    tokenizer: &Tokenizer,
    spec: &ModelSpec,
) -> Result<Option<Dataset>> {
    file.rows.truncate(data.eval_limit.unwrap_or(usize::MAX));
    match dataset(&file, data, &Names::KEYS, tokenizer, spec) {
        // Of the few rows that a split holds out, all may be too long; a file of held-out rows should not be.
        Err(error) if data.eval.is_none() && is_nothing(&error) => Ok(None),
        built => built.map(Some),
    }
}

fn is_nothing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Error::NothingToTrain { .. }))
}

/// A hash of the tokens trained on and of which of them are targets.
pub fn rows_hash(examples: &[Example]) -> String {
    let mut hash = Sha256::new();
    examples.iter().for_each(|example| hash_row(example, &mut hash));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A short one of one row.
pub fn row_hash(example: &Example) -> u32 {
    let mut hash = Sha256::new();
    hash_row(example, &mut hash);
    hash.finalize().iter().take(4).fold(0, |all, byte| all << 8 | u32::from(*byte))
}

fn hash_row(example: &Example, hash: &mut impl Digest) {
    if !example.source.is_empty() {
        hash.update((example.source.len() as u64).to_le_bytes());
        example.source.iter().for_each(|id| hash.update(id.to_le_bytes()));
    }
    hash.update((example.ids.len() as u64).to_le_bytes());
    example.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    example.trained.iter().for_each(|&trained| hash.update([u8::from(trained)]));
}
