//! The examples of a file, and the report on what became of its rows.

use std::collections::HashSet;
use std::path::PathBuf;

use rayon::prelude::*;
use retune_text::tokenizer::Tokenizer;
use serde::Serialize;

use super::read::{DataFile, Row, RowFormat};
use super::render::{Dropped, Encoded, Encoder, Example};
use super::sample::marked_sample;
use crate::error::Error;

/// Lines named for each kind of remarkable row.
const LINES: usize = 5;
/// Bins of the length histogram at most, and their least width.
const BINS: usize = 16;
const LEAST_BIN: usize = 32;

/// The examples of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// In the file's order.
    pub examples: Vec<Example>,
    pub report: DataReport,
}

/// What a data file holds and what became of its rows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataReport {
    pub path: PathBuf,
    /// The format asked for or detected.
    pub format: RowFormat,
    /// Rows read.
    pub rows: usize,
    /// Rows that became examples.
    pub examples: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Tokens that are targets.
    pub trained_tokens: usize,
    /// Tokens of the longest example.
    pub longest: usize,
    /// Examples by length. The first bin starts at 1; there is no bin past the longest.
    pub lengths: Vec<LengthBin>,
    /// Examples cut off at the length allowed.
    pub truncated: RowCount,
    /// Tokens cut off them.
    pub tokens_cut: usize,
    /// Those of them that break off within an answer: without the token that ends it, the model is not taught to stop there.
    pub answers_cut: RowCount,
    /// Rows left out because they are too long.
    pub dropped_too_long: RowCount,
    /// Rows left out because nothing to train on is within the length allowed.
    pub dropped_cut_away: RowCount,
    /// Rows left out because they have no text.
    pub dropped_empty: RowCount,
    /// Rows with the content of an earlier row.
    pub duplicates: RowCount,
    /// Rows whose answer, or one of them, is blank: the model learns to say nothing.
    pub empty_answers: RowCount,
    /// Rows that give an encoder nothing to read.
    pub empty_inputs: RowCount,
    /// Rows with the text of BOS or of a token that ends generation within an answer: it is learnt as that token.
    pub special_in_answers: RowCount,
    /// Rows that are also among the held-out rows.
    pub overlap_with_held_out: RowCount,
    /// Rows whose prompt is also among the held-out rows, with another answer.
    pub prompts_held_out: RowCount,
}

/// How many rows, and the lines of the first few.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct RowCount {
    pub count: usize,
    pub first_lines: Vec<usize>,
}

impl RowCount {
    fn add(&mut self, row: &Row) {
        self.count += 1;
        if self.first_lines.len() < LINES {
            self.first_lines.push(row.line);
        }
    }
}

/// Examples of `from` to `to` tokens, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LengthBin {
    pub from: usize,
    pub to: usize,
    pub examples: usize,
}

impl Dataset {
    /// Encodes the rows of a file, in parallel, and counts. `held_out` are the rows to look for among them.
    ///
    /// # Errors
    /// The first row, in the file's order, that cannot be encoded; a file of which nothing is left to train on.
    pub fn build(file: &DataFile, encoder: &Encoder<'_>, held_out: Option<&DataFile>) -> Result<Dataset, Error> {
        // The first by itself, so that a chat template that runs too long on every row is refused after one of them.
        if let Some(row) = file.rows.first() {
            encoder.encode(row).map_err(|error| in_row(file, row, error))?;
        }
        let encoded: Vec<Result<Encoded, Error>> = file.rows.par_iter().map(|row| encoder.encode(row)).collect();
        let is_end = |id: &u32| encoder.tokenizer().eos_token_ids().contains(id);
        let nothing = encoder.options().has_encoder.then(|| encoder.ended("")).transpose()?;
        let mut report = DataReport::new(file);
        let mut examples = Vec::with_capacity(encoded.len());
        for (row, encoded) in file.rows.iter().zip(encoded) {
            match encoded.map_err(|error| in_row(file, row, error))? {
                Encoded::Kept { example, cut } => {
                    report.tokens += example.tokens();
                    report.trained_tokens += example.trained_tokens();
                    report.tokens_cut += cut;
                    if cut > 0 {
                        report.truncated.add(row);
                        if example.trained.last() == Some(&true) && !example.ids.last().is_some_and(is_end) {
                            report.answers_cut.add(row);
                        }
                    }
                    if nothing.as_ref() == Some(&example.source) {
                        report.empty_inputs.add(row);
                    }
                    examples.push(example);
                }
                Encoded::Dropped(Dropped::TooLong) => report.dropped_too_long.add(row),
                Encoded::Dropped(Dropped::CutAway) => report.dropped_cut_away.add(row),
                Encoded::Dropped(Dropped::Empty) => report.dropped_empty.add(row),
            }
        }
        if examples.is_empty() {
            return Err(nothing_to_train(file, encoder));
        }
        report.examples = examples.len();
        report.longest = examples.iter().map(Example::longest).max().unwrap_or(0);
        report.lengths = histogram(&examples, report.longest);
        report.compare(file, held_out, &special_texts(encoder.tokenizer()));
        Ok(Dataset { examples, report })
    }
}

impl DataReport {
    fn new(file: &DataFile) -> Self {
        DataReport {
            path: file.path.clone(),
            format: file.format,
            rows: file.rows.len(),
            examples: 0,
            tokens: 0,
            trained_tokens: 0,
            longest: 0,
            lengths: Vec::new(),
            truncated: RowCount::default(),
            tokens_cut: 0,
            answers_cut: RowCount::default(),
            dropped_too_long: RowCount::default(),
            dropped_cut_away: RowCount::default(),
            dropped_empty: RowCount::default(),
            duplicates: RowCount::default(),
            empty_answers: RowCount::default(),
            empty_inputs: RowCount::default(),
            special_in_answers: RowCount::default(),
            overlap_with_held_out: RowCount::default(),
            prompts_held_out: RowCount::default(),
        }
    }

    /// Counts what rows have in common, with each other and with the held-out rows, and what is odd about answers; `special` are
    /// texts that do not belong into one.
    fn compare(&mut self, file: &DataFile, held_out: Option<&DataFile>, special: &[String]) {
        let held_out: HashSet<_> = held_out.into_iter().flat_map(|file| &file.rows).map(|row| &row.text).collect();
        let prompts: HashSet<_> = held_out.iter().filter_map(|text| text.prompt()).collect();
        let mut seen = HashSet::new();
        for row in &file.rows {
            if !seen.insert(&row.text) {
                self.duplicates.add(row);
            }
            if held_out.contains(&row.text) {
                self.overlap_with_held_out.add(row);
            } else if row.text.prompt().is_some_and(|prompt| prompts.contains(&prompt)) {
                self.prompts_held_out.add(row);
            }
            if row.text.has_empty_answer() {
                self.empty_answers.add(row);
            }
            if row.text.answers().into_iter().any(|answer| is_within(special, answer)) {
                self.special_in_answers.add(row);
            }
        }
    }
}

/// The texts that become a token that ends generation, or BOS, wherever they stand.
fn special_texts(tokenizer: &Tokenizer) -> Vec<String> {
    let ids = tokenizer.eos_token_ids().iter().copied().chain(tokenizer.bos_token_id());
    let text = |id: u32| {
        let text = tokenizer.id_to_token(id)?;
        (tokenizer.encode(&text).ok()? == [id]).then_some(text)
    };
    ids.filter_map(text).collect()
}

/// Whether one of the texts stands in an answer before its end, where an end token does no harm.
fn is_within(texts: &[String], answer: &str) -> bool {
    let before_end = texts.iter().find_map(|text| answer.strip_suffix(text.as_str())).unwrap_or(answer);
    texts.iter().any(|text| before_end.contains(text.as_str()))
}

fn in_row(file: &DataFile, row: &Row, error: Error) -> Error {
    Error::InRow { path: file.path.clone(), line: row.line, error: Box::new(error) }
}

/// The error for a file without any target, with its first row as the model would see it whole.
fn nothing_to_train(file: &DataFile, encoder: &Encoder<'_>) -> Error {
    let Some(row) = file.rows.first() else { return Error::NoRows { path: file.path.clone() } };
    match encoder.encode_whole(row) {
        Ok(example) => Error::NothingToTrain {
            path: file.path.clone(),
            rows: file.rows.len(),
            max_length: encoder.options().max_length,
            key: encoder.options().names.max_length,
            line: row.line,
            tokens: example.longest(),
            sample: marked_sample(encoder.tokenizer(), &example),
        },
        Err(error) => in_row(file, row, error),
    }
}

/// Bins of one width, a power of two times the least, so that there are few.
fn histogram(examples: &[Example], longest: usize) -> Vec<LengthBin> {
    let mut width = LEAST_BIN;
    while longest > width.saturating_mul(BINS) {
        width = width.saturating_mul(2);
    }
    let mut bins: Vec<LengthBin> = (0..longest.div_ceil(width))
        .map(|bin| LengthBin { from: bin * width + 1, to: (bin + 1) * width, examples: 0 })
        .collect();
    for example in examples {
        if let Some(bin) = example.longest().checked_sub(1).and_then(|last| bins.get_mut(last / width)) {
            bin.examples += 1;
        }
    }
    bins
}

#[cfg(test)]
mod tests {
    use retune_text::chat_template::Message;

    use super::super::names::Names;
    use super::super::read::RowText;
    use super::super::render::{EncodeOptions, Overlong};
    use super::super::testing::tokenizer;
    use super::*;

    const OPTIONS: EncodeOptions = EncodeOptions {
        max_length: 100,
        overlong: Overlong::Truncate,
        train_on_prompt: false,
        has_encoder: false,
        names: Names::KEYS,
    };

    fn pair(prompt: &str, completion: &str) -> RowText {
        RowText::PromptCompletion { prompt: prompt.into(), completion: completion.into() }
    }

    /// A conversation that user and assistant take turns in.
    fn chat(turns: &[&str]) -> RowText {
        let roles = ["user", "assistant"].into_iter().cycle();
        let turns = roles.zip(turns).map(|(role, content)| Message { role: role.into(), content: content.to_string() });
        RowText::Chat(turns.collect())
    }

    /// Rows on every second line.
    fn file(rows: Vec<RowText>) -> DataFile {
        let rows = rows.into_iter().enumerate().map(|(index, text)| Row { index, line: 2 * index + 1, text });
        DataFile { path: "rows.jsonl".into(), format: RowFormat::PromptCompletion, rows: rows.collect() }
    }

    fn build(rows: Vec<RowText>, options: EncodeOptions) -> Result<Dataset, Error> {
        let tokenizer = tokenizer();
        Dataset::build(&file(rows), &Encoder::new(&tokenizer, options).unwrap(), None)
    }

    fn count(count: usize, first_lines: &[usize]) -> RowCount {
        RowCount { count, first_lines: first_lines.to_vec() }
    }

    #[test]
    fn the_report_accounts_for_every_row() {
        let long = "x".repeat(200);
        let rows =
            vec![pair("x", "yz"), pair(&long, "y"), pair("x", &long), pair("", ""), pair("x", "yz"), pair("x", " ")];
        let data = build(rows.clone(), OPTIONS).unwrap();
        let report = &data.report;
        assert_eq!((report.rows, report.examples), (6, 4));
        assert_eq!(data.examples.iter().map(|example| example.row).collect::<Vec<_>>(), [0, 2, 4, 5]);
        // BOS, the bytes, EOS; the second is cut to 100.
        assert_eq!((report.tokens, report.trained_tokens), (5 + 100 + 5 + 4, 3 + 98 + 3 + 2));
        assert_eq!((report.longest, report.tokens_cut), (100, 103));
        assert_eq!(report.truncated, count(1, &[5]));
        assert_eq!(report.dropped_cut_away, count(1, &[3]));
        assert_eq!(report.dropped_empty, count(1, &[7]));
        assert_eq!(report.dropped_too_long, count(0, &[]));
        assert_eq!(report.duplicates, count(1, &[9]));
        assert_eq!(report.empty_answers, count(2, &[7, 11]));
        let report = build(rows, EncodeOptions { overlong: Overlong::Drop, ..OPTIONS }).unwrap().report;
        assert_eq!(report.dropped_too_long, count(2, &[3, 5]));
        assert_eq!(report.examples, 3);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["format"], "prompt_completion");
        assert_eq!(json["dropped_too_long"]["first_lines"], serde_json::json!([3, 5]));
    }

    #[test]
    fn rows_that_give_an_encoder_nothing_to_read_are_counted() {
        let rows = vec![pair("x", "y"), pair("", "y"), pair("", "")];
        let of = |has_encoder: bool| build(rows.clone(), EncodeOptions { has_encoder, ..OPTIONS }).unwrap().report;
        assert_eq!((of(true).empty_inputs, of(false).empty_inputs), (count(2, &[3, 5]), count(0, &[])));
    }

    #[test]
    fn only_the_first_lines_are_named() {
        let report = build(vec![pair("x", "y"); 20], OPTIONS).unwrap().report;
        assert_eq!(report.duplicates, count(19, &[3, 5, 7, 9, 11]));
    }

    #[test]
    fn rows_whose_answer_breaks_off_are_counted() {
        let long = "x".repeat(200);
        // The second is cut within a question, after an answer that has its end.
        let rows = vec![pair("x", &long), chat(&["u", "a", &long, "b"]), pair("x", "y"), chat(&["u", &long])];
        let report = build(rows, OPTIONS).unwrap().report;
        assert_eq!(report.truncated, count(3, &[1, 3, 7]));
        assert_eq!(report.answers_cut, count(2, &[1, 7]));
    }

    #[test]
    fn special_tokens_within_answers_are_counted() {
        let rows = vec![
            pair("x", "y</s>"),
            pair("x</s>", "y"),
            chat(&["<s>u", "a"]),
            RowText::Text("a</s>b".into()),
            pair("x", "an <s>old</s> price"),
            chat(&["u", "a<|im_end|>b", "v", "b"]),
        ];
        assert_eq!(build(rows, OPTIONS).unwrap().report.special_in_answers, count(2, &[9, 11]));
    }

    #[test]
    fn rows_that_are_held_out_too_are_counted() {
        let tokenizer = tokenizer();
        let encoder = Encoder::new(&tokenizer, OPTIONS).unwrap();
        let training = vec![pair("x", "y"), pair("x", "z"), pair("x", "x"), pair("", "v"), chat(&["u", "a"])];
        let held_out = vec![pair("x", "z"), pair("", "w"), chat(&["u", "b"]), RowText::Text("t".into())];
        let (training, held_out) = (file(training), file(held_out));
        let report = Dataset::build(&training, &encoder, Some(&held_out)).unwrap().report;
        assert_eq!(report.overlap_with_held_out, count(1, &[3]));
        // An empty prompt is none.
        assert_eq!(report.prompts_held_out, count(3, &[1, 5, 9]));
        assert_eq!(Dataset::build(&training, &encoder, None).unwrap().report.overlap_with_held_out, count(0, &[]));
    }

    #[test]
    fn nothing_to_train_on_is_an_error_that_shows_a_row() {
        let error = build(vec![pair(&"x".repeat(200), "yz"); 3], OPTIONS).unwrap_err().to_string();
        assert!(error.contains("none of the 3 rows") && error.contains("Line 1 has 204 tokens"), "{error}");
        assert!(error.contains("x…x") && error.ends_with("«yz</s>»"), "{error}");
        assert!(matches!(build(vec![], OPTIONS), Err(Error::NoRows { .. })));
    }

    #[test]
    fn the_first_wrong_row_is_named_whatever_the_threads() {
        let wrong = || RowText::Chat(vec![Message { role: "user".into(), content: "u".into() }]);
        for _ in 0..20 {
            let mut rows = vec![pair("x", "y"); 300];
            rows[40] = wrong();
            rows[250] = wrong();
            let error = build(rows, OPTIONS).unwrap_err().to_string();
            assert!(error.starts_with("rows.jsonl, line 81: the conversation has no turn"), "{error}");
        }
    }

    #[test]
    fn bins_cover_all_lengths_and_are_few() {
        let examples = |lengths: &[usize]| -> Vec<Example> {
            lengths
                .iter()
                .map(|&n| Example { row: 0, source: vec![], ids: vec![0; n], trained: vec![true; n] })
                .collect()
        };
        let bin = |from, to, examples| LengthBin { from, to, examples };
        assert_eq!(histogram(&examples(&[1, 32, 33, 70]), 70), [bin(1, 32, 2), bin(33, 64, 1), bin(65, 96, 1)]);
        let bins = histogram(&examples(&[5, 512, 513]), 513);
        assert_eq!((bins.len(), bins[0].to), (9, 64));
        assert_eq!(bins.iter().map(|bin| bin.examples).collect::<Vec<_>>(), [1, 0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(histogram(&examples(&[512]), 512).len(), 16);
    }
}
