//! `retune eval`: loss and perplexity on a data file, the likeliest of its labels, and answers to its rows.

use std::time::Instant;

use anyhow::{Result, bail};
use retune_engine::compute::Compute;
use retune_engine::pass::Pass;
use retune_engine::workspace::Workspace;
use retune_engine::{Saving, calibrate::Choice};
use retune_eval::answers::{Answer, Answerer};
use retune_eval::labels::{self, Classification};
use retune_eval::questions::{Question, question, with_labels};
use retune_eval::rouge::Rouge;
use retune_eval::shots;
use retune_eval::squad::{exact_match, token_f1};
use retune_formats::atomic::Draft;
use retune_text::tokenizer::Tokenizer;
use retune_train::data::{
    ColumnMap, DataFile, DataReport, Dataset, Encoder, Example, Files, Names, Row, RowFormat, read_rows,
};
use retune_train::run_config::{DataConfig, Int8Copy};
use retune_train::trainer::{RowLoss, Trained, held_out_loss};
use serde_json::{Map, Value, json};

use super::data::problems;
use super::print_json;
use crate::End;
use crate::args::EvalArgs;
use crate::output::refuse_source;
use crate::progress::{RowProgress, interrupted, watch_interrupts};
use crate::session::{self, Session};
use crate::{compute, memory};

const TOKENS_PER_PASS: usize = 1024;
/// Rows whose labels are encoded at once.
const LABELLED_ROWS: usize = 32;
/// Longest answer where none is given, in tokens.
const MAX_NEW_TOKENS: usize = 128;

/// What settings of a data set are called here.
const FLAGS: Names = Names {
    rows: "--data",
    columns: "--columns",
    column: "--columns ",
    format: "--format",
    max_length: "--max-length",
    overlong: None,
    unknown_columns: None,
};

/// Scores the rows and prints the result; after Ctrl-C that of the rows done so far.
pub fn run(args: &EvalArgs) -> Result<End> {
    check(args)?;
    let config = data_config(args)?;
    let session = Session::open(&args.model)?;
    let tokenizer = session.base.tokenizer()?;
    let mut file = read_rows(&Files::from(&args.data), &config.read_options(&FLAGS))?;
    let labels = labels_of(args, &file)?;
    file.rows.truncate(args.limit.unwrap_or(usize::MAX));
    let given_answers = match (args.examples, &args.examples_from) {
        (Some(count), Some(path)) => {
            let from = read_rows(&Files::from(path), &config.read_options(&FLAGS))?;
            put_before(&mut file, &from, count, args.seed.unwrap_or(0), labels.as_deref(), tokenizer)?
        }
        _ => 0,
    };
    let has_encoder = session.model.spec.encoder.is_some();
    let encoder = |train_on_prompt| -> Result<Encoder> {
        let config = DataConfig { train_on_prompt, ..config.clone() };
        Ok(Encoder::new(tokenizer, config.encode_options(has_encoder, &FLAGS))?.after_answers(given_answers))
    };
    let data = Dataset::build(&file, &encoder(args.whole_text)?, None)?;
    for problem in problems(&data.report, &FLAGS) {
        note!("! {problem}");
    }
    let answering = encoder(false)?;
    let Session { model, overlay, params, .. } = &session;
    session::refuse_long_rows(&model.spec, overlay, &data.examples, "--max-length")?;
    let questions = if args.generate { questions(args, &session, &file, &answering)? } else { Vec::new() };
    if let Some(out) = &args.predictions {
        let model = session.base.checkpoint.path();
        let files = [args.examples_from.as_deref(), args.model.adapter.as_deref()];
        let sources = [Some(args.data.as_path()), Some(model)].into_iter().chain(files);
        refuse_source(out, &sources.flatten().collect::<Vec<_>>())?;
    }
    let predictions = args.predictions.as_deref().map(Draft::create).transpose()?;
    watch_interrupts()?;

    let pass = compute::calibration_pass(&overlay.prelude(&model.spec), &data.examples);
    let integers = compute::integers(
        model,
        overlay,
        Int8Copy::Auto,
        session.base.checkpoint.held_bytes() as usize,
        memory::available(),
    );
    let (compute, choices) = compute::choose(model, overlay, params, args.compute, integers, &pass, false);
    let mut scoring = Scoring::new(&session, &compute, &file);
    scoring.losses(&data.examples)?;
    if let Some(labels) = &labels {
        scoring.labels(&file.rows, &answering, labels)?;
        if scoring.overlong > 0 {
            let (count, all) = (scoring.overlong, file.rows.len());
            note!(
                "! in {count} of {all} rows no label was compared: with one of them the row is longer than the {} tokens that --max-length allows",
                answering.options().max_length
            );
        }
    }
    scoring.answers(&questions, args.max_new_tokens.unwrap_or(MAX_NEW_TOKENS))?;

    let found = Found { report: &data.report, labels: labels.as_deref(), choices: &choices, scoring: &scoring };
    if let Some(mut draft) = predictions {
        for line in found.predictions() {
            draft.write_all(format!("{line}\n").as_bytes())?;
        }
        draft.finish()?.commit()?;
    }
    if args.json {
        print_json(&found.json())?
    } else {
        found.print()?
    }
    Ok(if interrupted() { End::Interrupted } else { End::Done })
}

/// Refuses numbers that ask for nothing.
fn check(args: &EvalArgs) -> Result<()> {
    if args.limit == Some(0) {
        bail!("--limit is 0; expected at least 1: leave it out to score all rows");
    }
    if args.max_new_tokens == Some(0) {
        bail!("--max-new-tokens is 0; expected at least 1");
    }
    if args.examples == Some(0) {
        bail!("--examples is 0; expected at least 1: leave it out to score the rows alone");
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
        ..DataConfig::new(Files::from(&args.data))
    };
    config.check(&FLAGS)?;
    Ok(config)
}

/// The last answer of a row, without white space around it.
fn reference(row: &Row) -> Option<&str> {
    row.text.answers().last().map(|answer| answer.trim())
}

/// The labels that were given, or that the answers of the file are; `None` of rows that are answered in other ways.
fn labels_of(args: &EvalArgs, file: &DataFile) -> Result<Option<Vec<String>>> {
    let answers = file.rows.iter().filter_map(reference);
    if args.labels.is_empty() {
        return Ok(labels::told_by_answers(answers));
    }
    let given = labels::distinct(args.labels.iter().map(String::as_str));
    if given.len() < 2 || given.len() < args.labels.len() || given.iter().any(String::is_empty) {
        bail!("--labels is {:?}; expected at least two different ones, separated by commas", args.labels.join(","));
    }
    let is_other = |row: &&Row| !reference(row).is_some_and(|answer| given.iter().any(|label| label == answer));
    if let Some(row) = file.rows.iter().find(is_other) {
        let found = reference(row).map_or_else(|| "nothing".to_owned(), |answer| format!("{answer:?}"));
        let path = file.path.display();
        bail!(
            "{path}, line {}: the answer is {found}, none of --labels: name it there, or leave the row out",
            row.line
        );
    }
    Ok(Some(given))
}

/// Puts examples before every row; returns how many answers of a conversation they are.
fn put_before(
    file: &mut DataFile,
    from: &DataFile,
    count: usize,
    seed: u64,
    labels: Option<&[String]>,
    tokenizer: &Tokenizer,
) -> Result<usize> {
    let path = from.path.display();
    if from.format != file.format || file.format == RowFormat::Text {
        bail!(
            "{path} has rows of the format {}, and {} of {}: examples need rows of one format, with answers",
            from.format,
            file.path.display(),
            file.format
        );
    }
    let examples = shots::choose(&from.rows, count, seed, labels, &file.rows);
    if examples.len() < count {
        let of_labels = if labels.is_some() { " with one of the labels as their answer" } else { "" };
        bail!("{path} has {} rows{of_labels} that are not scored; --examples is {count}", examples.len());
    }
    let with_chat = tokenizer.chat_template().is_some();
    for row in &mut file.rows {
        row.text = shots::after(&examples, &row.text, with_chat);
    }
    Ok(shots::answers(&examples, with_chat))
}

/// What the rows ask; refuses prompts that leave no room for an answer.
fn questions(args: &EvalArgs, session: &Session, file: &DataFile, encoder: &Encoder) -> Result<Vec<Question>> {
    let questions = file.rows.iter().map(|row| question(encoder, row)).collect::<Result<Vec<_>, _>>()?;
    let questions: Vec<Question> = questions.into_iter().flatten().collect();
    if questions.is_empty() {
        let path = file.path.display();
        bail!(
            "--generate has nothing to answer: no row of {path} (format {}) has an answer within --max-length",
            file.format
        );
    }
    let spec = &session.model.spec;
    let own = session.overlay.prelude(spec).len();
    let most = args.max_new_tokens.unwrap_or(MAX_NEW_TOKENS);
    if let Some(context) = spec.context_limit()
        && let Some(question) = questions.iter().find(|q| (own + q.prompt.len()).saturating_add(most) > context)
    {
        bail!(
            "row {}: {} tokens before the answer and {most} to generate exceed the model's context of {context}: lower --max-new-tokens, \
             or --max-length to leave such rows out",
            question.row + 1,
            own + question.prompt.len()
        );
    }
    Ok(questions)
}

/// The row, and the numbers of two labels that make it the same tokens.
fn same_tokens(of_row: &[Example]) -> Option<(usize, [usize; 2])> {
    let mut pairs = (0..of_row.len()).flat_map(|b| (0..b).map(move |a| [a, b]));
    pairs.find(|&[a, b]| of_row[a].ids == of_row[b].ids).map(|pair| (of_row[pair[0]].row, pair))
}

/// What came of a row.
#[derive(Default)]
struct RowResult {
    reference: Option<String>,
    loss: Option<RowLoss>,
    /// The loss of each label, summed over its tokens.
    labels: Option<Vec<f64>>,
    answer: Option<Answer>,
}

/// The rows of a file being scored.
struct Scoring<'a> {
    session: &'a Session,
    compute: &'a Compute,
    pass: Pass,
    workspace: Workspace,
    /// By the rows' numbers.
    rows: Vec<RowResult>,
    /// Summed loss, and the number of label tokens.
    loss: (f64, usize),
    /// Rows that a label makes longer than is allowed.
    overlong: usize,
    /// Seconds in which answers were generated.
    seconds: f64,
}

impl<'a> Scoring<'a> {
    fn new(session: &'a Session, compute: &'a Compute, file: &DataFile) -> Self {
        let Session { model, overlay, .. } = session;
        let result = |row: &Row| RowResult { reference: reference(row).map(str::to_owned), ..RowResult::default() };
        Self {
            session,
            compute,
            pass: Pass::new(overlay.prelude(&model.spec), model.spec.may_share_prefixes()),
            workspace: Workspace::new(model, Saving::None),
            rows: file.rows.iter().map(result).collect(),
            loss: (0.0, 0),
            overlong: 0,
            seconds: 0.0,
        }
    }

    /// The loss of each example, told row by row.
    fn score(
        &mut self,
        examples: &[Example],
        mut done: impl FnMut(&mut [RowResult], &[RowLoss]),
    ) -> Result<(f64, usize)> {
        let Session { model, overlay, params, .. } = self.session;
        let trained = Trained { model, overlay, compute: self.compute };
        let Self { pass, workspace, rows, .. } = self;
        let found = held_out_loss(trained, params, examples, TOKENS_PER_PASS, pass, workspace, |losses| {
            done(rows, losses);
            !interrupted()
        })?;
        Ok(found)
    }

    /// Loss and perplexity.
    fn losses(&mut self, examples: &[Example]) -> Result<()> {
        let mut progress = RowProgress::new("scored", examples.len());
        let mut count = 0;
        self.loss = self.score(examples, |rows, losses| {
            for loss in losses {
                if let Some(row) = rows.get_mut(loss.row) {
                    row.loss = Some(*loss);
                }
            }
            count += losses.len();
            progress.set(count);
        })?;
        Ok(())
    }

    /// How likely each label is in each row: all labels of a row come one after the other, and share its prompt.
    fn labels(&mut self, rows: &[Row], encoder: &Encoder, labels: &[String]) -> Result<()> {
        let mut progress = RowProgress::new("labels compared of", rows.len());
        for some in rows.chunks(LABELLED_ROWS) {
            if interrupted() {
                break;
            }
            let of_rows = some.iter().map(|row| with_labels(encoder, row, labels)).collect::<Result<Vec<_>, _>>()?;
            self.overlong += of_rows.iter().filter(|of_row| of_row.is_none()).count();
            let of_rows: Vec<Vec<Example>> = of_rows.into_iter().flatten().collect();
            if let Some((row, [a, b])) = of_rows.iter().find_map(|of_row| same_tokens(of_row)) {
                bail!(
                    "row {}: the labels {:?} and {:?} are the same tokens to this model, so that none is likelier: give labels that differ",
                    row + 1,
                    labels[a],
                    labels[b]
                );
            }
            let examples: Vec<Example> = of_rows.into_iter().flatten().collect();
            let Session { model, overlay, .. } = self.session;
            session::refuse_long_rows(&model.spec, overlay, &examples, "--max-length")?;
            let mut all = Vec::with_capacity(examples.len());
            self.score(&examples, |_, losses| all.extend_from_slice(losses))?;
            // What Ctrl-C left of a row is no comparison.
            for of_row in all.chunks_exact(labels.len()) {
                if let Some(row) = of_row.first().and_then(|first| self.rows.get_mut(first.row)) {
                    row.labels = Some(of_row.iter().map(|label| label.loss).collect());
                }
            }
            progress.set(some.last().map_or(0, |row| row.index + 1));
        }
        Ok(())
    }

    /// Answers the questions.
    fn answers(&mut self, questions: &[Question], max_new_tokens: usize) -> Result<()> {
        let Session { base, model, overlay, params } = self.session;
        let answerer = Answerer { model, overlay, params, tokenizer: base.tokenizer()?, max_new_tokens };
        let mut progress = RowProgress::new("answered", questions.len());
        let start = Instant::now();
        let prompts = questions.iter().map(|question| question.prompt.clone());
        let mut done = 0;
        answerer.answer_all(
            prompts,
            || !interrupted(),
            |number, answer| {
                if let Some(row) = self.rows.get_mut(questions[number].row) {
                    row.answer = Some(answer);
                }
                done += 1;
                progress.set(done);
            },
        );
        self.seconds = start.elapsed().as_secs_f64();
        Ok(())
    }
}

/// What there is to say.
struct Found<'a> {
    report: &'a DataReport,
    labels: Option<&'a [String]>,
    choices: &'a [Choice],
    scoring: &'a Scoring<'a>,
}

impl Found<'_> {
    fn rows(&self) -> &[RowResult] {
        &self.scoring.rows
    }

    fn scored(&self) -> usize {
        self.rows().iter().filter(|row| row.loss.is_some()).count()
    }

    /// The mean loss of a label token; no number before any is scored.
    fn loss(&self) -> f64 {
        let (sum, labels) = self.scoring.loss;
        sum / labels as f64
    }

    /// The likeliest label of a row, the first of equals.
    fn likeliest(&self, row: &RowResult) -> Option<&str> {
        let losses = row.labels.as_ref()?.iter();
        let best = losses.zip(self.labels?).min_by(|a, b| a.0.total_cmp(b.0))?;
        Some(best.1)
    }

    fn by_likelihood(&self) -> Option<Classification> {
        let pair = |row| Some((RowResult::reference(row)?, self.likeliest(row)?));
        let pairs: Vec<(&str, &str)> = self.rows().iter().filter_map(pair).collect();
        (!pairs.is_empty()).then(|| Classification::of(pairs))
    }

    fn answers(&self) -> Option<Answers> {
        let pair = |row: &'_ RowResult| Some((row.reference.clone()?, row.answer.clone()?));
        let pairs: Vec<(String, Answer)> = self.rows().iter().filter_map(pair).collect();
        (!pairs.is_empty()).then(|| Answers::of(&pairs, self.labels.is_some(), self.scoring.seconds))
    }

    /// A line of each row that was scored.
    fn predictions(&self) -> Vec<Value> {
        let line = |(at, row): (usize, &RowResult)| {
            let loss = row.loss?;
            let mut line = Map::new();
            let mut add = |key: &str, value: Value| line.insert(key.to_owned(), value);
            add("row", json!(at + 1));
            add("reference", json!(row.reference));
            add("loss", json!(loss.loss / loss.label_tokens.max(1) as f64));
            add("label_tokens", json!(loss.label_tokens));
            if let (Some(losses), Some(labels)) = (&row.labels, self.labels) {
                add("likeliest_label", json!(self.likeliest(row)));
                let losses = labels.iter().zip(losses).map(|(label, loss)| (label.clone(), json!(loss)));
                add("label_losses", Value::Object(losses.collect()));
            }
            if let Some(answer) = &row.answer {
                add("prediction", json!(answer.text));
            }
            Some(Value::Object(line))
        };
        self.rows().iter().enumerate().filter_map(line).collect()
    }

    /// For a program.
    fn json(&self) -> Value {
        let report = self.report;
        let mut found = json!({
            "loss": self.loss(),
            "perplexity": self.loss().exp(),
            "rows": self.scored(),
            "dropped": report.rows - report.examples,
            "tokens": report.tokens,
            "label_tokens": self.scoring.loss.1,
            "truncated": report.truncated.count,
            "tokens_cut": report.tokens_cut,
            "compute": compute::summary(self.choices),
            "interrupted": interrupted(),
        });
        if self.labels.is_some() {
            found["labels_too_long"] = json!(self.scoring.overlong);
        }
        if let Some(labels) = self.by_likelihood() {
            found["by_likelihood"] = json!(labels);
        }
        if let Some(answers) = self.answers() {
            found["generated"] = answers.json();
        }
        found
    }

    /// For a person.
    fn print(&self) -> Result<()> {
        let (report, labels) = (self.report, self.scoring.loss.1);
        if interrupted() {
            outln!("stopped early; of the rows done so far:");
        }
        outln!("loss        {:.4}  (nats per label token)", self.loss());
        outln!("perplexity  {:.3}", self.loss().exp());
        outln!("rows        {} of {}, {} tokens, {labels} of them scored", self.scored(), report.rows, report.tokens);
        if let Some(found) = self.by_likelihood() {
            let Classification { accuracy, macro_f1, rows, .. } = found;
            let names = self.labels.unwrap_or_default().join(", ");
            outln!(
                "labels      accuracy {accuracy:.4}, macro-F1 {macro_f1:.4}: the likeliest of {names} in {rows} rows"
            );
        }
        if let Some(answers) = self.answers() {
            answers.print()?;
        }
        Ok(())
    }
}

impl RowResult {
    fn reference(&self) -> Option<&str> {
        self.reference.as_deref()
    }
}

/// How good the generated answers are.
struct Answers {
    rows: usize,
    tokens: usize,
    /// Answers that did not end by themselves.
    cut: usize,
    seconds: f64,
    exact_match: f64,
    f1: f64,
    rouge: Rouge,
    labels: Option<Classification>,
}

impl Answers {
    fn of(pairs: &[(String, Answer)], are_labels: bool, seconds: f64) -> Self {
        let texts = || pairs.iter().map(|(reference, answer)| (reference.as_str(), answer.text.as_str()));
        let mean = |score: fn(&str, &str) -> f64| texts().map(|(a, b)| score(a, b)).sum::<f64>() / pairs.len() as f64;
        let rouge: Vec<Rouge> = texts().map(|(reference, answer)| Rouge::of(reference, answer, false)).collect();
        Self {
            rows: pairs.len(),
            tokens: pairs.iter().map(|(_, answer)| answer.tokens).sum(),
            cut: pairs.iter().filter(|(_, answer)| !answer.ended).count(),
            seconds,
            exact_match: mean(|a, b| f64::from(u8::from(exact_match(a, b)))),
            f1: mean(token_f1),
            rouge: Rouge::mean(&rouge),
            labels: are_labels.then(|| Classification::of(texts())),
        }
    }

    fn json(&self) -> Value {
        let mut found = json!({
            "rows": self.rows,
            "tokens": self.tokens,
            "cut": self.cut,
            "seconds": self.seconds,
            "exact_match": self.exact_match,
            "f1": self.f1,
        });
        for (name, score) in self.rouge.named() {
            found[name] = json!(score);
        }
        if let Some(labels) = &self.labels {
            found["labels"] = json!(labels);
        }
        found
    }

    fn print(&self) -> Result<()> {
        let Self { rows, tokens, cut, seconds, exact_match, f1, .. } = self;
        outln!("answers     {rows} rows, {tokens} tokens in {seconds:.1} s; {cut} cut at --max-new-tokens");
        outln!("            exact match {exact_match:.4}, token F1 {f1:.4}");
        if let Some(Classification { accuracy, macro_f1, .. }) = self.labels {
            outln!("            accuracy {accuracy:.4}, macro-F1 {macro_f1:.4}");
        }
        let rouge = self.rouge.named().map(|(name, score)| format!("{name} {:.4}", score.fmeasure));
        outln!("            {} (F)", rouge.join(", "));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_are_the_same_tokens_are_found() {
        let label = |ids: &[u32]| Example { row: 7, source: vec![], ids: ids.to_vec(), trained: vec![true; ids.len()] };
        assert_eq!(same_tokens(&[label(&[1, 2]), label(&[1, 3]), label(&[1])]), None);
        assert_eq!(same_tokens(&[label(&[1, 2]), label(&[1, 3]), label(&[1, 2])]), Some((7, [0, 2])));
        assert_eq!(same_tokens(&[]), None);
    }
}
