//! What a person and a program see of a run while it trains: the progress bar with its chart, `metrics.jsonl`, and TensorBoard's event files.

use std::fs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use retune_formats::atomic::{self, Lines};
use retune_formats::tensorboard::{self, Events};
use retune_train::Error;
use retune_train::state::Progress as RunProgress;
use retune_train::trainer::{Evaluation, Observer, StepReport};
use serde_json::{Value, json};
use terminal_size::{Width, terminal_size_of};

use crate::chart::Chart;
use crate::comparison::answer::duration;
use crate::memory;
use crate::run_folder::RunFolder;

/// Set by Ctrl-C.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// A bar for bytes that are read or written, whose length is told later.
///
/// # Errors
/// None that can be met: the template is a fixed one.
pub fn bytes_bar() -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes}, {eta} left")?;
    Ok(ProgressBar::new(1).with_style(style))
}

/// Makes the first Ctrl-C stop the run after its current step or what it computes now of held-out rows, and a second one at once.
pub fn watch_interrupts() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        note!("\nstopping after what is computed now, with everything so far kept (Ctrl-C again stops at once)");
    })?;
    Ok(())
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Lines between two reports where there is no terminal to draw a bar on.
const LINES_EVERY: u64 = 10;

/// Shows a run on the terminal and appends it to its metrics file.
pub struct Progress {
    bar: Option<ProgressBar>,
    chart: Option<Chart>,
    metrics: Lines,
    tensorboard: Option<TensorBoard>,
    /// Seconds in steps alone: scoring held-out rows is not training.
    seconds_here: f64,
    steps_here: u64,
    tokens_here: usize,
    smoothed: Option<f64>,
}

/// What is shown of a run beside its bar, and written beside its metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shown {
    /// A chart of the loss, where there is a terminal to draw it on.
    pub chart: bool,
    /// TensorBoard's event files.
    pub tensorboard: bool,
}

impl Progress {
    /// Opens the metrics file of a run that has come so far; what was written beyond that, before a kill, is dropped.
    ///
    /// # Errors
    /// A metrics file that cannot be read or written.
    pub fn new(folder: &RunFolder, run: &RunProgress, shown: Shown) -> anyhow::Result<Self> {
        let &RunProgress { step, total_steps, owes_score, .. } = run;
        let path = folder.metrics();
        // A run is at the state of its newest checkpoint. A score that is still owed is computed, and written, again.
        let is_kept = |at: u64, is_score: bool| at <= step && step > 0 && !(owes_score && at == step && is_score);
        let is_terminal = std::io::stderr().is_terminal();
        let width = terminal_size_of(std::io::stderr()).map(|(Width(width), _)| usize::from(width));
        let width = width.filter(|_| shown.chart && is_terminal);
        let mut chart = width.and_then(|width| Chart::new(total_steps, width));
        if path.exists() {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}; move it away to go on without it", path.display()))?;
            let mut kept = String::new();
            for line in text.lines() {
                let Ok(value) = serde_json::from_str::<Value>(line) else { continue };
                let score = value["eval_loss"].as_f64();
                let Some(at) = value["step"].as_u64().filter(|at| is_kept(*at, score.is_some())) else { continue };
                kept += &format!("{line}\n");
                if let Some(chart) = &mut chart {
                    value["loss"].as_f64().into_iter().for_each(|loss| chart.loss(at, loss));
                    score.into_iter().for_each(|loss| chart.score(at, loss));
                }
            }
            atomic::write(&path, kept.as_bytes())?;
        }
        let metrics = Lines::open(&path)?;
        let tensorboard =
            shown.tensorboard.then(|| TensorBoard::new(folder.tensorboard(), run, is_kept)).transpose()?;
        let bar = is_terminal.then(|| {
            let bar = ProgressBar::new(total_steps);
            let above = if chart.is_some() { "{prefix}\n" } else { "" };
            let style =
                ProgressStyle::with_template(&format!("{above}{{wide_bar}} {{pos}}/{{len}}  {{msg}}  {{eta}} left"));
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_position(step);
            bar.reset_eta();
            bar
        });
        let (seconds_here, steps_here, tokens_here, smoothed) = (0.0, 0, 0, None);
        Ok(Self { bar, chart, metrics, tensorboard, seconds_here, steps_here, tokens_here, smoothed })
    }

    fn print(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => note!("{line}"),
        }
    }

    fn record(&mut self, value: &Value) -> Result<(), Error> {
        Ok(self.metrics.add(&value.to_string())?)
    }

    /// Draws the chart anew, where there is one.
    fn draw(&self) {
        if let (Some(bar), Some(chart)) = (&self.bar, &self.chart) {
            bar.set_prefix(chart.draw());
        }
    }

    /// Takes the bar away, and leaves the chart.
    pub fn finish(&self) {
        let Some(bar) = &self.bar else { return };
        if let Some(chart) = self.chart.as_ref().filter(|_| self.steps_here > 0) {
            bar.println(chart.draw());
        }
        bar.finish_and_clear();
    }
}

/// The event files of a run.
struct TensorBoard {
    folder: PathBuf,
    /// Begun with the first numbers: a run that had ended has none.
    events: Option<Events>,
    /// The step that is taken next when the run begins or goes on.
    next_step: u64,
    /// Tokens trained on.
    tokens: u64,
}

impl TensorBoard {
    /// Of a run that has come so far; what was written beyond that, before a kill, is dropped.
    fn new(folder: PathBuf, run: &RunProgress, is_kept: impl Fn(u64, bool) -> bool) -> anyhow::Result<Self> {
        tensorboard::keep(&folder, |step, tags| is_kept(step, tags.iter().any(|tag| tag == EVAL_LOSS)))?;
        Ok(Self { folder, events: None, next_step: run.step + 1, tokens: run.tokens })
    }

    fn add(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), Error> {
        let events = match &mut self.events {
            Some(events) => events,
            none => none.insert(Events::create(&self.folder, self.next_step)?),
        };
        Ok(events.scalars(step, values)?)
    }

    fn step(&mut self, report: &StepReport) -> Result<(), Error> {
        self.tokens += report.tokens as u64;
        let values = [
            ("train/loss", report.loss),
            ("train/grad_norm", report.gradient_norm),
            ("train/learning_rate", report.learning_rate),
            ("train/epoch", report.epoch),
            ("train/num_input_tokens_seen", self.tokens as f64),
        ];
        self.add(report.step, &values)
    }
}

/// Under which a held-out loss stands; the names are those of transformers' callback.
const EVAL_LOSS: &str = "eval/loss";

impl Observer for Progress {
    fn step(&mut self, report: &StepReport) -> Result<(), Error> {
        self.steps_here += 1;
        self.tokens_here += report.tokens;
        let smoothed = self.smoothed.map_or(report.loss, |s| 0.9 * s + 0.1 * report.loss);
        self.smoothed = Some(smoothed);
        self.seconds_here += report.seconds;
        let speed = self.tokens_here as f64 / self.seconds_here;
        let resident = memory::resident().map_or_else(String::new, |bytes| format!("  {}", memory::human(bytes)));
        let message = format!("loss {smoothed:.3}  {speed:.0} tok/s{resident}");
        if let Some(chart) = &mut self.chart {
            chart.loss(report.step, report.loss);
        }
        self.draw();
        match &self.bar {
            Some(bar) => {
                bar.set_position(report.step);
                bar.set_message(message);
            }
            None if self.steps_here == 1
                || report.step.is_multiple_of(LINES_EVERY)
                || report.step == report.total_steps =>
            {
                let left = self.seconds_here / self.steps_here as f64 * (report.total_steps - report.step) as f64;
                note!("step {}/{}  {message}  {left:.0} s left", report.step, report.total_steps);
            }
            None => {}
        }
        self.record(&json!({
            "step": report.step,
            "loss": report.loss,
            "gradient_norm": report.gradient_norm,
            "learning_rate": report.learning_rate,
            "tokens": report.tokens,
            "label_tokens": report.label_tokens,
            "seconds": report.seconds,
            "peak_rss_bytes": memory::peak_resident(),
        }))?;
        self.tensorboard.as_mut().map_or(Ok(()), |tensorboard| tensorboard.step(report))
    }

    fn evaluation(&mut self, evaluation: &Evaluation) -> Result<(), Error> {
        let best = if evaluation.best { "  (best so far)" } else { "" };
        self.print(&format!("step {}: held-out loss {:.4}{best}", evaluation.step, evaluation.loss));
        if let Some(chart) = &mut self.chart {
            chart.score(evaluation.step, evaluation.loss);
        }
        self.draw();
        self.record(&json!({
            "step": evaluation.step,
            "eval_loss": evaluation.loss,
            "eval_label_tokens": evaluation.label_tokens,
        }))?;
        let values = [(EVAL_LOSS, evaluation.loss)];
        self.tensorboard.as_mut().map_or(Ok(()), |tensorboard| tensorboard.add(evaluation.step, &values))
    }

    fn interrupted(&self) -> bool {
        interrupted()
    }
}

/// Between two reports where there is no terminal to draw a bar on.
const REPORTED_EVERY: Duration = Duration::from_secs(5);

/// Shows how many rows are done, and how long the others will take.
pub struct RowProgress {
    bar: Option<ProgressBar>,
    what: &'static str,
    rows: usize,
    start: Instant,
    reported: Option<Instant>,
}

impl RowProgress {
    /// `what` is what is done to rows: "scored".
    pub fn new(what: &'static str, rows: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(rows as u64);
            let style = ProgressStyle::with_template("{wide_bar} {msg} {pos}/{len} rows, {eta} left");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what);
            bar
        });
        Self { bar, what, rows, start: Instant::now(), reported: None }
    }

    /// So many rows are done.
    pub fn set(&mut self, done: usize) {
        if let Some(bar) = &self.bar {
            return bar.set_position(done as u64);
        }
        if done < self.rows && self.reported.is_none_or(|at| at.elapsed() >= REPORTED_EVERY) {
            let left = self.start.elapsed().as_secs_f64() / done.max(1) as f64 * (self.rows - done) as f64;
            note!("{} {done}/{} rows, {left:.0} s left", self.what, self.rows);
            self.reported = Some(Instant::now());
        }
    }
}

impl Drop for RowProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Shows how many runs of a comparison are done, what the one at work says, and how long all will take.
pub struct JobProgress {
    bar: Option<ProgressBar>,
    jobs: usize,
    done: usize,
    /// Of runs that train, and of those that do not: how many are left, and the seconds of each that was done here.
    trained: (usize, Vec<f64>),
    others: (usize, Vec<f64>),
    title: String,
    start: Instant,
}

impl JobProgress {
    /// Of so many jobs, so many of which train.
    pub fn new(jobs: usize, trained: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(jobs as u64);
            let style = ProgressStyle::with_template("{spinner} {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self {
            bar,
            jobs,
            done: 0,
            trained: (trained, Vec::new()),
            others: (jobs - trained, Vec::new()),
            title: String::new(),
            start: Instant::now(),
        }
    }

    fn of_kind(&mut self, trains: bool) -> &mut (usize, Vec<f64>) {
        if trains { &mut self.trained } else { &mut self.others }
    }

    /// A job was done earlier.
    pub fn skip(&mut self, trains: bool) {
        self.done += 1;
        self.of_kind(trains).0 -= 1;
    }

    /// The seconds that are left, where there is something to tell them by; `expected` is what one that trains takes.
    fn left(&self, expected: Option<f64>) -> Option<f64> {
        let of = |(left, seconds): &(usize, Vec<f64>), expected: Option<f64>| {
            let mean = (!seconds.is_empty()).then(|| seconds.iter().sum::<f64>() / seconds.len() as f64);
            if *left == 0 { Some(0.0) } else { Some(*left as f64 * mean.or(expected)?) }
        };
        Some(of(&self.trained, expected)? + of(&self.others, None)?)
    }

    /// A job begins, which takes about so long.
    pub fn begin(&mut self, title: &str, expected: Option<f64>) {
        self.start = Instant::now();
        let left = self.left(expected).map_or_else(String::new, |left| format!(", about {} left", duration(left)));
        self.title = format!("run {} of {}: {title}{left}", self.done + 1, self.jobs);
        match &self.bar {
            Some(bar) => bar.set_message(self.title.clone()),
            None => note!("{}", self.title),
        }
    }

    /// What the job at work says.
    pub fn said(&self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {}", self.title, line.trim()));
        }
    }

    /// Something to keep.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => note!("{text}"),
        }
    }

    /// A job has ended, with this.
    pub fn end(&mut self, trains: bool, text: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        let (left, all) = self.of_kind(trains);
        *left -= 1;
        all.push(seconds);
        self.done += 1;
        match &self.bar {
            Some(bar) => bar.println(format!("{}: {text}", self.title)),
            None => note!("  {text}"),
        }
    }

    /// Takes the line away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_beyond_what_the_run_goes_on_from_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines = [
            r#"{"step":0,"eval_loss":3.0}"#,
            r#"{"step":1,"loss":2.0}"#,
            r#"{"step":2,"loss":1.5}"#,
            r#"{"step":2,"eval_loss":1.25}"#,
            r#"{"step":3,"loss":1.0}"#,
            r#"{"step":4,"lo"#,
        ];
        let kept = |run: RunProgress| {
            fs::write(&path, lines.join("\n")).unwrap();
            Progress::new(&RunFolder { root: folder.path().to_owned() }, &run, Shown::default()).unwrap();
            let text = fs::read_to_string(&path).unwrap();
            lines.map(|line| text.lines().any(|kept| kept == line))
        };
        let after = |step, owes_score| RunProgress { step, total_steps: 9, owes_score, ..RunProgress::default() };
        assert_eq!(kept(after(2, false)), [true, true, true, true, false, false]);
        // The score is computed again, and written again.
        assert_eq!(kept(after(2, true)), [true, true, true, false, false, false]);
        assert_eq!(kept(after(0, false)), [false; 6]);
    }
}
