//! The examples of a file, and the report on what became of its rows.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use rayon::prelude::*;
use retune_text::chat_template::Message;
use retune_text::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use super::columns::RowFormat;
use super::near::nearest;
use super::read::{Counted, DataFile, OnBadRow, Reading, count};
use super::render::{Dropped, Encoded, Encoder, Example, Written};
use super::row::{Row, RowText};
use super::sample::marked_sample;
use crate::error::{Error, shortened};

/// Characters shown of a text.
const SHOWN: usize = 120;
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Rows left out because nothing in them is a target.
    pub dropped_empty: RowCount,
    /// Rows with the content of an earlier row.
    pub duplicates: RowCount,
    /// Rows whose answer, or one of them, is blank: the model learns to say nothing.
    pub empty_answers: RowCount,
    /// Rows that give an encoder nothing to read.
    pub empty_inputs: RowCount,
    /// Rows with the text of BOS or of a token that ends generation within an answer: it is learnt as that token.
    pub special_in_answers: RowCount,
    /// Rows whose text spells out a special token of the model anywhere else: it is read as that token.
    pub special_in_texts: RowCount,
    /// Rows of which the chat template writes an answer otherwise than the row has it: cut or replaced.
    pub answers_changed: RowCount,
    /// The first such answer, and what the template wrote for it.
    pub first_changed: Option<(String, String)>,
    /// Rows of which the chat template trims white space around an answer.
    pub answers_trimmed: RowCount,
    /// What rows hand to the chat template that is not in the text it wrote.
    pub left_out_by_template: Vec<Counted>,
    /// What there is to say of the reading of the file.
    pub reading: Reading,
    /// Rows that are also among the held-out rows.
    pub overlap_with_held_out: RowCount,
    /// Rows whose prompt is also among the held-out rows, with another answer.
    pub prompts_held_out: RowCount,
    /// Rows that are neither, but nearly the same as a held-out row.
    pub near_held_out: RowCount,
    /// The first of them, and the row that is held out.
    pub first_near: Option<(String, String)>,
    /// Where there are few different answers, as classes are, how many rows have each; the most frequent first.
    pub classes: Vec<Class>,
}

/// How many rows, and the lines of the first few.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RowCount {
    pub count: usize,
    pub first_lines: Vec<usize>,
}

impl RowCount {
    pub(super) fn add(&mut self, line: usize) {
        self.count += 1;
        if self.first_lines.len() < LINES {
            self.first_lines.push(line);
        }
    }
}

/// An answer that many rows have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Class {
    pub answer: String,
    pub rows: usize,
}

/// The answers of rows where they are classes: few, and each of several rows on average.
fn classes(rows: &[Row]) -> Vec<Class> {
    const MOST: usize = 20;
    const ROWS_OF_EACH: usize = 3;
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for row in rows {
        let Some(answer) = row.text.answers().last().copied() else { return Vec::new() };
        *counts.entry(answer.trim()).or_default() += 1;
        if counts.len() > MOST {
            return Vec::new();
        }
    }
    if counts.len() < 2 || rows.len() < ROWS_OF_EACH * counts.len() {
        return Vec::new();
    }
    let mut classes: Vec<Class> =
        counts.into_iter().map(|(answer, rows)| Class { answer: answer.to_owned(), rows }).collect();
    classes.sort_by(|a, b| b.rows.cmp(&a.rows).then_with(|| a.answer.cmp(&b.answer)));
    classes
}

/// Examples of `from` to `to` tokens, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
        let on_bad_row = encoder.options().on_bad_row;
        if let Some(row) = file.rows.first().filter(|_| on_bad_row == OnBadRow::Stop) {
            encoder.encode(row).map_err(|error| in_row(file, row, error))?;
        }
        let encoded: Vec<Result<Encoded, Error>> = file.rows.par_iter().map(|row| encoder.encode(row)).collect();
        let is_end = |id: &u32| encoder.tokenizer().eos_token_ids().contains(id);
        let nothing = encoder.options().has_encoder.then(|| encoder.ended("")).transpose()?;
        let mut report = DataReport::new(file);
        let mut examples = Vec::with_capacity(encoded.len());
        for (row, encoded) in file.rows.iter().zip(encoded) {
            let encoded = match encoded.map_err(|error| in_row(file, row, error)) {
                Err(error) if on_bad_row == OnBadRow::Skip => {
                    report.reading.skip(row.line, &error);
                    continue;
                }
                encoded => encoded?,
            };
            match encoded {
                Encoded::Kept { example, cut, written } => {
                    report.note(row, written);
                    report.tokens += example.tokens();
                    report.trained_tokens += example.trained_tokens();
                    report.tokens_cut += cut;
                    if cut > 0 {
                        report.truncated.add(row.line);
                        if example.trained.last() == Some(&true) && !example.ids.last().is_some_and(is_end) {
                            report.answers_cut.add(row.line);
                        }
                    }
                    if nothing.as_ref() == Some(&example.source) {
                        report.empty_inputs.add(row.line);
                    }
                    examples.push(example);
                }
                Encoded::Dropped(Dropped::TooLong) => report.dropped_too_long.add(row.line),
                Encoded::Dropped(Dropped::CutAway) => report.dropped_cut_away.add(row.line),
                Encoded::Dropped(Dropped::Empty) => report.dropped_empty.add(row.line),
            }
        }
        if let (true, Some(first)) = (examples.is_empty(), &report.reading.first_skipped) {
            return Err(Error::AllSkipped { rows: report.reading.skipped.count, first: first.clone() });
        }
        if examples.is_empty() {
            return Err(nothing_to_train(file, encoder));
        }
        report.examples = examples.len();
        report.longest = examples.iter().map(Example::longest).max().unwrap_or(0);
        report.lengths = histogram(&examples, report.longest);
        report.compare(file, held_out, encoder.tokenizer());
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
            special_in_texts: RowCount::default(),
            answers_changed: RowCount::default(),
            first_changed: None,
            answers_trimmed: RowCount::default(),
            left_out_by_template: Vec::new(),
            reading: file.reading.clone(),
            overlap_with_held_out: RowCount::default(),
            prompts_held_out: RowCount::default(),
            near_held_out: RowCount::default(),
            first_near: None,
            classes: Vec::new(),
        }
    }

    /// Counts what a chat template did with a row.
    fn note(&mut self, row: &Row, written: Written) {
        if let Some((answer, text)) = written.changed {
            self.answers_changed.add(row.line);
            self.first_changed.get_or_insert_with(|| (shortened(&answer, SHOWN), shortened(&text, SHOWN)));
        }
        if written.trimmed {
            self.answers_trimmed.add(row.line);
        }
        for what in written.left_out {
            count(&mut self.left_out_by_template, &what, row.line);
        }
    }

    /// Counts what rows have in common, with each other and with the held-out rows, and what is odd about answers and texts.
    fn compare(&mut self, file: &DataFile, held_out: Option<&DataFile>, tokenizer: &Tokenizer) {
        let special = special_texts(tokenizer);
        let all_special = tokenizer.special_texts();
        let held_out_rows = held_out.map_or(&[][..], |file| &file.rows);
        let near = nearest(&file.rows, held_out_rows);
        self.classes = classes(&file.rows);
        let held_out: HashSet<_> = held_out_rows.iter().map(|row| &row.text).collect();
        let prompts: HashSet<_> = held_out.iter().filter_map(|text| text.prompt()).collect();
        let mut seen = HashSet::new();
        for (row, near) in file.rows.iter().zip(near) {
            if !seen.insert(&row.text) {
                self.duplicates.add(row.line);
            }
            if held_out.contains(&row.text) {
                self.overlap_with_held_out.add(row.line);
            } else if row.text.prompt().is_some_and(|prompt| prompts.contains(&prompt)) {
                self.prompts_held_out.add(row.line);
            } else if let Some(near) = near {
                self.near_held_out.add(row.line);
                let texts = [row, near].map(|row| shortened(row.text.plain_text().trim(), SHOWN));
                self.first_near.get_or_insert_with(|| texts.into());
            }
            if row.text.has_empty_answer() {
                self.empty_answers.add(row.line);
            }
            // A template ends an answer, whether the answer has its end already or not.
            let is_written_twice = |answer: &str| special.iter().any(|text| answer.contains(text.as_str()));
            let is_special = match &row.text {
                RowText::Chat(conversation) => conversation.answers().any(|turn| is_written_twice(turn.text())),
                text => text.answers().into_iter().any(|answer| is_within(&special, answer)),
            };
            if is_special {
                self.special_in_answers.add(row.line);
            } else if !matches!(row.text, RowText::Text(_)) && spells_out(&row.text, &all_special, &special) {
                self.special_in_texts.add(row.line);
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

/// Whether a row spells out one of the special tokens, other than the end of an answer at its end.
fn spells_out(text: &RowText, special: &[String], ends: &[String]) -> bool {
    let questions: Vec<&str> = match text {
        RowText::Chat(conversation) => conversation.messages.iter().map(Message::text).collect(),
        RowText::PromptCompletion { prompt, .. } => vec![prompt.as_str()],
        RowText::Instruction { instruction, input, .. } => vec![instruction.as_str(), input.as_str()],
        RowText::Text(text) => vec![text.as_str()],
    };
    let without_end = |answer| ends.iter().find_map(|end| str::strip_suffix(answer, end.as_str())).unwrap_or(answer);
    let answers = text.answers().into_iter().map(without_end);
    let mut pieces = questions.into_iter().chain(answers);
    pieces.any(|piece| special.iter().any(|token| piece.contains(token.as_str())))
}

/// Whether one of the texts stands in an answer before its end, where an end token does no harm.
fn is_within(texts: &[String], answer: &str) -> bool {
    let before_end = texts.iter().find_map(|text| answer.strip_suffix(text.as_str())).unwrap_or(answer);
    texts.iter().any(|text| before_end.contains(text.as_str()))
}

fn in_row(file: &DataFile, row: &Row, error: Error) -> Error {
    Error::InRow { path: file.file_of(row).to_owned(), line: row.line, error: Box::new(error) }
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
    use super::super::names::Names;
    use super::super::render::{EncodeOptions, Overlong};
    use super::super::testing::tokenizer;
    use super::*;

    const OPTIONS: EncodeOptions = EncodeOptions {
        max_length: 100,
        overlong: Overlong::Truncate,
        on_bad_row: OnBadRow::Stop,
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
        RowText::Chat(roles.zip(turns).map(|(role, content)| Message::new(role, *content)).collect::<Vec<_>>().into())
    }

    /// Rows on every second line.
    fn file(rows: Vec<RowText>) -> DataFile {
        let rows = rows.into_iter().enumerate().map(|(index, text)| Row { index, line: 2 * index + 1, text });
        DataFile::new("rows.jsonl", RowFormat::PromptCompletion, rows.collect())
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
    fn rows_nearly_held_out_are_shown_and_classes_counted() {
        let tokenizer = tokenizer();
        let encoder = Encoder::new(&tokenizer, OPTIONS).unwrap();
        let sentence =
            |animal: &str| format!("the ship left at dawn with forty sailors and a {animal} that nobody had paid for");
        let training = file(vec![
            pair(&sentence("goat"), "y"),
            pair("x", "n"),
            pair("z", "y "),
            pair("w", "n"),
            pair("v", "y"),
            pair("u", "y"),
        ]);
        let held_out = file(vec![pair(&sentence("dog"), "y")]);
        let report = Dataset::build(&training, &encoder, Some(&held_out)).unwrap().report;
        assert_eq!(report.near_held_out, count(1, &[1]));
        let (row, near) = report.first_near.unwrap();
        assert!(row.contains("goat") && near.contains("dog"), "{row} {near}");
        let classes: Vec<_> = report.classes.iter().map(|class| (class.answer.as_str(), class.rows)).collect();
        assert_eq!(classes, [("y", 4), ("n", 2)]);
        let few = vec![pair("x", "a"), pair("y", "b"), pair("z", "c")];
        assert!(build(few, OPTIONS).unwrap().report.classes.is_empty());
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
        let wrong = || chat(&["u"]);
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
