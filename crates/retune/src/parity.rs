//! How far what was written is from what it was made of: both are run on the same rows, such as were not trained on where these can be found.

use std::path::Path;

use anyhow::Result;
use retune_engine::compute::Compute;
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_engine::pass::Pass;
use retune_engine::row_norms::RowNorms;
use retune_engine::workspace::Workspace;
use retune_engine::{Run, Saving};
use retune_train::data::{Dataset, Example, Files, Names, ReadOptions, read_rows};
use retune_train::run_config::DataConfig;
use serde_json::{Value, json};

use crate::run_data::{self, HeldOut, rows_hash};
use crate::run_folder::ROWS_HASHES;
use crate::session::{self, Base};

/// Prose, a question, code, another language, numbers.
const TEXTS: [&str; 5] = [
    "The tide comes in twice a day here, and the boats that lie on the sand in the morning float by noon. Nobody in the village looks up when it does.",
    "Which of these is a mammal: the shark, the whale or the trout? Explain your answer in one sentence.",
    "def mean(values):\n    if not values:\n        return None\n    return sum(values) / len(values)\n\nprint(mean([3, 4, 5]))\n",
    "Au printemps, les marchés s'installent sur la place et l'on y vend du pain, du miel et des fleurs jusqu'à midi.",
    "{\"name\": \"sensor-12\", \"unit\": \"°C\", \"readings\": [18.4, 18.9, 19.3], \"ok\": true, \"taken\": \"2024-03-01\"}",
];
/// Tokens of one of these at most.
const TEXT_TOKENS: usize = 48;
/// Tokens of all rows at most: comparing takes seconds.
const MOST_TOKENS: usize = 512;
/// Rows that are looked at for some that fit.
const MOST_ROWS: usize = 64;
/// Labels of a row at most, since each has logits for the whole vocabulary.
const MOST_LABELS: usize = 128;

/// What settings of a file are called here.
const FLAGS: Names = Names {
    rows: "--data",
    columns: "the file's columns",
    column: "the file's column ",
    format: "format",
    max_length: "the length of a row",
    overlong: None,
    unknown_columns: None,
};

/// Rows on which models are compared.
pub struct Sample {
    rows: Vec<Example>,
    /// Where they are from, in words.
    from: String,
}

impl Sample {
    /// Rows of a file, if one is given; those that the adapter's run held out, where its record says which and the file is still there; or the
    /// bundled texts.
    ///
    /// # Errors
    /// A file that is given and cannot be read, a damaged record, a tokenizer that cannot take the rows.
    pub fn of(base: &Base, adapter: Option<&Path>, data: Option<&Path>) -> Result<Self> {
        if let Some(path) = data {
            let mut file = read_rows(&Files::from(path), &ReadOptions { names: &FLAGS, ..ReadOptions::AUTO })?;
            file.rows.truncate(MOST_ROWS);
            let config = DataConfig::new(Files::from(path));
            let rows = run_data::dataset(&file, &config, &FLAGS, base.tokenizer()?, &base.checkpoint.spec)?;
            return Ok(Self::chosen(rows.examples.iter(), format!("rows of {}", path.display())));
        }
        let record = adapter.map(session::provenance).transpose()?.flatten();
        match record.map(|record| held_out(base, &record)).transpose() {
            Ok(Some(Some((rows, files)))) => {
                Ok(Self::chosen(rows.iter(), format!("rows of {files} that the run held out")))
            }
            Ok(_) => Self::texts(base),
            Err(error) => {
                note!("! the rows that the adapter's run held out cannot be read: {error:#}");
                Self::texts(base)
            }
        }
    }

    /// Some of the rows that a run holds out; the bundled texts where it holds out none.
    ///
    /// # Errors
    /// A tokenizer that cannot take the texts.
    pub fn of_held_out(base: &Base, rows: &[Example]) -> Result<Self> {
        match rows {
            [] => Self::texts(base),
            rows => Ok(Self::chosen(rows.iter(), "held-out rows".to_owned())),
        }
    }

    /// The bundled texts.
    fn texts(base: &Base) -> Result<Self> {
        let tokenizer = base.tokenizer()?;
        let has_encoder = base.checkpoint.spec.encoder.is_some();
        let row = |(row, text): (usize, &&str)| -> Result<Example> {
            let mut ids = tokenizer.encode_with_special_tokens(text)?;
            ids.truncate(TEXT_TOKENS);
            let source = if has_encoder { ids.clone() } else { Vec::new() };
            Ok(Example { row, source, trained: vec![true; ids.len()], ids })
        };
        let rows = TEXTS.iter().enumerate().map(row).collect::<Result<_>>()?;
        Ok(Self { rows, from: "bundled texts".to_owned() })
    }

    /// The first rows that fit in beside each other; the shortest where none does.
    fn chosen<'a>(rows: impl Iterator<Item = &'a Example> + Clone, from: String) -> Self {
        let mut left = MOST_TOKENS;
        let fits = |row: &&Example| {
            let tokens = row.ids.len() + row.source.len();
            let fits = tokens <= left;
            left -= if fits { tokens } else { 0 };
            fits
        };
        let mut chosen: Vec<Example> = rows.clone().take(MOST_ROWS).filter(fits).cloned().collect();
        if chosen.is_empty() {
            chosen.extend(rows.min_by_key(|row| row.longest()).cloned());
        }
        Self { rows: chosen, from }
    }
}

/// The rows that a run held out, and their file; nothing where the record does not say, or the file is gone or another.
fn held_out(base: &Base, record: &Value) -> Result<Option<(Vec<Example>, Files)>> {
    let Ok(data) = serde_json::from_value::<DataConfig>(record["run"]["data"].clone()) else { return Ok(None) };
    let files = data.eval.clone().unwrap_or_else(|| data.train.clone());
    if !files.paths().iter().all(|path| path.is_file() || path.is_dir()) {
        return Ok(None);
    }
    let seed = record["run"]["training"]["seed"].as_u64().unwrap_or(0);
    let HeldOut { file: Some(file), .. } = HeldOut::read(&data, seed)? else { return Ok(None) };
    let rows = run_data::held_out(file, &data, base.tokenizer()?, &base.checkpoint.spec)?;
    // A file that has changed since is split otherwise, and rows that were trained on may be among these.
    let is_same = |rows: &Dataset| record["run"][ROWS_HASHES[1]].as_str() == Some(rows_hash(&rows.examples).as_str());
    Ok(rows.filter(is_same).map(|rows| (rows.examples, files)))
}

/// A model with what stands on it.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    pub model: &'a Model,
    pub overlay: &'a Overlay,
    pub params: &'a [f32],
}

/// How far two models are apart.
#[derive(Clone, Debug, Default)]
pub struct Parity {
    /// Where the rows are from, in words.
    from: String,
    rows: usize,
    /// Label tokens, whose predictions are compared.
    tokens: usize,
    /// Of them those for which both find the same token likeliest.
    agreed: usize,
    /// The largest difference of a logit, and the largest logit.
    difference: f32,
    logit: f32,
    /// The loss of each over all labels.
    losses: [f64; 2],
}

impl Parity {
    /// Runs both in f32. Rows are cut where the model has no more positions.
    pub fn of(sample: &Sample, ours: Side<'_>, written: Side<'_>) -> Self {
        let most = ours.overlay.most_tokens(&ours.model.spec).unwrap_or(usize::MAX).min(ours.model.spec.context);
        let vocab = ours.model.spec.vocab_size;
        let mut parity = Self { from: sample.from.clone(), ..Self::default() };
        let mut sides = [ours, written].map(|side| {
            let norms = RowNorms::of(side.model, side.overlay, side.params);
            (side, norms, Workspace::new(side.model, Saving::None))
        });
        for row in &sample.rows {
            let Some((pass, tokens, targets)) = labels(ours, row, most) else { continue };
            let [ours, theirs] = sides.each_mut().map(|(side, norms, workspace)| {
                let &mut Side { model, overlay, params } = side;
                let compute = Compute::default();
                let run = Run { model, overlay, params, norms, compute: &compute, pass: &pass, parts: &[], step: None };
                run.logits(&tokens, workspace)
            });
            parity.rows += 1;
            parity.tokens += tokens.len();
            for ((a, b), target) in ours.chunks_exact(vocab).zip(theirs.chunks_exact(vocab)).zip(targets) {
                parity.agreed += usize::from(likeliest(a) == likeliest(b));
                for (a, b) in a.iter().zip(b) {
                    parity.difference = parity.difference.max((a - b).abs());
                    parity.logit = parity.logit.max(a.abs());
                }
                for (loss, logits) in parity.losses.iter_mut().zip([a, b]) {
                    *loss += loss_of(logits, target as usize);
                }
            }
        }
        parity
    }

    /// The mean losses.
    fn means(&self) -> [f64; 2] {
        self.losses.map(|loss| loss / self.tokens.max(1) as f64)
    }

    /// Prints it under a label; `what` was run says the other.
    pub fn print(&self, label: &str, what: &str) -> Result<()> {
        let Self { from, rows, tokens, agreed, difference, logit, .. } = self;
        let [before, after] = self.means();
        outln!(
            "{label:<13} {what}: loss {before:.4} before, {after:.4} after ({tokens} label tokens of {rows} {from})"
        );
        outln!(
            "              logits differ by at most {difference:.2e} (of at most {logit:.1}); the likeliest token is the same for {agreed} of {tokens}"
        );
        Ok(())
    }

    pub fn json(&self) -> Value {
        let [before, after] = self.means();
        json!({
            "data": self.from,
            "rows": self.rows,
            "tokens": self.tokens,
            "loss_before": before,
            "loss_after": after,
            "largest_logit_difference": self.difference,
            "largest_logit": self.logit,
            "same_top_1": self.agreed as f64 / self.tokens.max(1) as f64,
        })
    }
}

/// A pass of a row, the tokens in it that predict labels, and the labels.
fn labels(side: Side<'_>, row: &Example, most: usize) -> Option<(Pass, Vec<u32>, Vec<u32>)> {
    let spec = &side.model.spec;
    let mut pass = Pass::new(side.overlay.prelude(spec), false);
    let [ids, source] = [&row.ids, &row.source].map(|ids| &ids[..ids.len().min(most)]);
    pass.push_answer(0, source, ids, &row.trained[..ids.len()]);
    let labels = pass.labels.iter().take(MOST_LABELS);
    let (tokens, targets): (Vec<u32>, Vec<u32>) = labels.map(|label| (label.token, label.target)).unzip();
    (!tokens.is_empty()).then_some((pass, tokens, targets))
}

/// The cross entropy of a token.
fn loss_of(logits: &[f32], target: usize) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    sum.ln() + f64::from(most) - f64::from(logits[target])
}

/// The likeliest token, the first of several.
fn likeliest(logits: &[f32]) -> usize {
    let first = |best: (usize, f32), next: (usize, f32)| if next.1 > best.1 { next } else { best };
    logits.iter().copied().enumerate().fold((0, f32::NEG_INFINITY), first).0
}
