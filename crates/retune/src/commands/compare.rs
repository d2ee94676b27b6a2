//! `retune compare`: several ways to adapt one model, run one after another, scored on the same held-out rows, and told in a report.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use retune_formats::atomic;
use retune_train::plan::{Kind, Plan};
use serde_json::json;

use super::print_json;
use crate::args::CompareArgs;
use crate::comparison::answer::{duration, grouped};
use crate::comparison::decide::{Decided, Timing, steps_in_time};
use crate::comparison::folder::{Folder, read_json, write_json};
use crate::comparison::results::{Failure, Provenance, Results};
use crate::comparison::rows::Rows;
use crate::comparison::runs::{Job, Outcome, RunRecord, Runner};
use crate::comparison::{neutral, report, table};
use crate::progress::{JobProgress, interrupted, watch_interrupts};
use crate::report::command;
use crate::session::Base;
use crate::{End, fetch};

/// Compares; `threads` is what the command line says of them.
pub fn run(args: &CompareArgs, threads: Option<usize>) -> Result<End> {
    let begin = Instant::now();
    let plan = Plan::load(args.plan.as_deref(), &overrides(args))?;
    let path = fetch::resolve_or_fetch(&plan.model, &|message| note!("{message}"))?;
    let base = Base::open(&path)?;
    base.tokenizer()?;
    let (rows, texts) = Rows::choose(&plan)?;
    let folder = Folder { root: plan.output_dir.clone() };
    let provenance = provenance(&plan, &base, threads);
    let record = json!({
        "plan": plan,
        "rows": rows,
        "base_content_hash": provenance.base_content_hash,
        "retune": provenance.retune,
        "isa": provenance.isa,
    });
    let data = plan.data.files().map(PathBuf::as_path);
    let used: Vec<&Path> = [Some(path.as_path()), args.plan.as_deref()].into_iter().flatten().chain(data).collect();
    let _lock = folder.prepare(&record, args.overwrite, &used)?;
    for (file, text) in [folder.training_rows(), folder.held_out_rows()].iter().zip(&texts) {
        atomic::write(file, text.as_bytes())?;
    }
    atomic::write(&folder.neutral_rows(), neutral::rows().as_bytes())?;
    let decided = if folder.decided().exists() {
        read_json(&folder.decided())?
    } else {
        let decided = Decided::first(&plan, &rows, provenance.base_bytes, provenance.base_parameters);
        write_json(&folder.decided(), &decided)?;
        decided
    };
    let (context, reads_texts) = (base.checkpoint.spec.context, base.checkpoint.spec.encoder.is_none());
    // Runs have the memory to themselves.
    drop(base);
    print_start(&plan, &rows, &decided, &provenance);
    watch_interrupts()?;

    let mut comparison =
        Comparison { plan: &plan, folder: &folder, rows: &rows, decided, context, reads_texts, threads, begin };
    let Some((records, failed)) = comparison.run()? else {
        note!(
            "stopped; every finished run is kept, and the one at work as far as it was saved. Go on with:\n  {}",
            command()
        );
        return Ok(End::Interrupted);
    };
    let untrained = plan.variants.len() > 1 && records.iter().all(|record| record.name == retune_train::plan::BASE);
    if let (true, Some(failure)) = (untrained, failed.first()) {
        bail!("every run but the base's failed; {}: {}", failure.name, failure.error);
    }
    let results = Results::of(&plan, &folder, &rows, &comparison.decided, &records, failed, provenance)?;
    write_json(&folder.results(), &results)?;
    table::write_csv(&results, &folder.csv())?;
    report::write(&results, &folder)?;
    if args.json {
        print_json(&serde_json::to_value(&results)?)?;
    } else {
        print_end(&results, &folder)?;
    }
    Ok(End::Done)
}

/// The keys of a plan that flags stand for, then those that are overridden.
fn overrides(args: &CompareArgs) -> Vec<String> {
    let out = args.out.clone().or_else(|| {
        let stem = args.data.as_ref()?.file_stem()?.to_string_lossy().into_owned();
        Some(PathBuf::from("runs").join(format!("compare-{stem}")))
    });
    // JSON is YAML: whatever a path looks like, it stays a text.
    let of = |key: &str, value: Option<serde_json::Value>| value.map(|value| format!("{key}={value}"));
    let flags = [
        of("model", args.model.as_ref().map(|model| json!(model))),
        of("data.train", args.data.as_ref().map(|path| json!(path))),
        of("output_dir", out.map(|path| json!(path))),
        of("minutes", args.minutes.map(|minutes| json!(minutes))),
    ];
    flags.into_iter().flatten().chain(args.overrides.iter().cloned()).collect()
}

fn provenance(plan: &Plan, base: &Base, threads: Option<usize>) -> Provenance {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    Provenance {
        retune: env!("CARGO_PKG_VERSION"),
        isa: retune_kernels::isa::isa().to_string(),
        threads: threads.or(plan.threads).unwrap_or_else(all),
        model: plan.model.clone(),
        base_content_hash: base.content_hash(),
        base_parameters: base.checkpoint.spec.parameters(),
        base_bytes: base.checkpoint.file_bytes(),
        command: command(),
    }
}

fn print_start(plan: &Plan, rows: &Rows, decided: &Decided, provenance: &Provenance) {
    note!("model    {} ({:.1} M parameters)", plan.model, provenance.base_parameters as f64 / 1e6);
    note!("data     {} training rows; held out: {}", rows.training_rows, rows.held_out_in_words());
    if let Some(labels) = &rows.labels {
        note!("         the answers are labels: {}", labels.join(", "));
    }
    let names: Vec<&str> = decided.variants(plan).iter().map(|variant| variant.name.as_str()).collect();
    note!("compares {}", names.join(", "));
    for left_out in &decided.left_out {
        note!("         ! without {}: {}", left_out.name, left_out.reason);
    }
    match (plan.minutes, decided.steps) {
        (Some(minutes), None) => note!("time     {minutes} minutes: a few steps of each are timed first"),
        (Some(minutes), Some(steps)) => note!("time     {minutes} minutes: {steps} steps for each run"),
        (None, _) => {}
    }
}

/// The runs of a comparison.
struct Comparison<'a> {
    plan: &'a Plan,
    folder: &'a Folder,
    rows: &'a Rows,
    decided: Decided,
    context: usize,
    reads_texts: bool,
    threads: Option<usize>,
    begin: Instant,
}

/// What came of all runs.
type Found = (Vec<RunRecord>, Vec<Failure>);

impl Comparison<'_> {
    fn runner(&self) -> Runner<'_> {
        let &Self { plan, folder, rows, ref decided, context, reads_texts, threads, .. } = self;
        Runner { plan, folder, rows, decided, context, reads_texts, threads }
    }

    /// Runs what is not finished yet; `None` after Ctrl-C.
    fn run(&mut self) -> Result<Option<Found>> {
        let plan = self.plan;
        let mut jobs = Job::all(&self.decided.variants(plan));
        // What trains nothing is quick, and tells how long scoring takes.
        jobs.sort_by_key(Job::trains);
        let trained = jobs.iter().filter(|job| job.trains()).count();
        let mut progress = JobProgress::new(jobs.len(), trained);
        let (mut records, mut failed) = (Vec::new(), Vec::new());
        for job in &jobs {
            if let Some(record) = self.runner().finished(job)? {
                progress.skip(job.trains());
                records.push(record);
                continue;
            }
            if job.trains()
                && self.decided.steps.is_none()
                && let Some(minutes) = plan.minutes
            {
                let told = |text: &str| progress.said(text);
                let Some(decided) = steps_in_time(&self.runner(), &jobs, minutes, &records, self.begin, told)? else {
                    return Ok(None);
                };
                self.decided = decided;
                progress
                    .line(&format!("{minutes} minutes: {} steps for each run", self.decided.steps.unwrap_or_default()));
            }
            let scoring = records.iter().map(|record| record.scores.seconds).fold(0.0, f64::max);
            progress.begin(&job.title(), self.expected_seconds(job, scoring));
            let outcome = self.runner().perform(job, |line| progress.said(line))?;
            match outcome {
                Outcome::Done(record) => {
                    let training = record.training.as_ref();
                    let trained = training.map_or_else(String::new, |of| {
                        let count = grouped(of.trainable_parameters);
                        format!(", {count} parameters trained for {} steps in {}", of.steps, duration(of.seconds))
                    });
                    progress.end(job.trains(), &format!("held-out loss {:.4}{trained}", record.scores.loss));
                    records.push(*record);
                }
                Outcome::Interrupted => return Ok(None),
                Outcome::Failed(error) => {
                    if matches!(job.variant.kind, Kind::Base) {
                        bail!("the base cannot be scored: {error}");
                    }
                    progress.end(job.trains(), &format!("! failed: {error}"));
                    let (name, seed) = (job.variant.name.clone(), job.seed);
                    failed.push(Failure { name, seed, error });
                }
            }
            if interrupted() {
                return Ok(None);
            }
        }
        progress.finish();
        Ok(Some((records, failed)))
    }

    /// How long a training run will take, where its steps were timed.
    fn expected_seconds(&self, job: &Job, scoring: f64) -> Option<f64> {
        let of = |timing: &&Timing| timing.name == job.variant.name;
        let timing = self.decided.timings.iter().find(of)?;
        Some(timing.other_seconds + self.decided.steps? as f64 * timing.step_seconds + 2.0 * scoring)
    }
}

fn print_end(results: &Results, folder: &Folder) -> Result<()> {
    outln!();
    table::print(results)?;
    outln!();
    for failure in &results.failed {
        outln!("! {}, seed {}, failed: {}", failure.name, failure.seed, failure.error);
    }
    for sentence in results.answer.sentences.iter().filter(|sentence| !sentence.is_empty()) {
        outln!("{sentence}");
    }
    outln!("\nreport   {}", folder.report().display());
    outln!("numbers  {}, {}", folder.results().display(), folder.csv().display());
    Ok(())
}
