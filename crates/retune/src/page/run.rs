//! The page about a run: how its loss went, what it gained, what it took, what is in its data, and what to do next. It is made of what lies in the
//! run's folder, so that a run that is at work or was stopped has one as well.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use minijinja::context;
use minijinja::value::Value as Html;
use retune_train::run_config::RunConfig;
use retune_train::state;
use serde_json::{Map, Value, json};

use super::plots::{self, Axis, Mark, Shape, scientific, short};
use super::{NONE, curves, data, flatten, memory, model_name, render};
use crate::comparison::answer::{duration, grouped};
use crate::figures::Figures;
use crate::memory::human;
use crate::metrics::{self, Point};
use crate::report::next_commands;
use crate::run_folder::RunFolder;

const TEMPLATE: &str = include_str!("run.html");

/// The keys of a run's record that are its configuration.
const CONFIG: [&str; 8] = ["model", "output_dir", "method", "adapter", "adapter_init", "base", "data", "training"];
/// The others, in words.
const PROVENANCE: [(&str, &str); 8] = [
    ("base_content_hash", "weights of the model"),
    ("base_config_hash", "configuration of the model"),
    ("train_rows_hash", "rows trained on, as tokens"),
    ("eval_rows_hash", "held-out rows, as tokens"),
    ("adapter_init_hash", "adapter it began from"),
    ("retune", "retune"),
    ("isa", "instruction set"),
    ("threads", "threads"),
];

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Finished,
    AtWork,
    Stopped,
}

/// A run, as its folder has it.
pub struct RunPage {
    folder: RunFolder,
    record: Value,
    config: RunConfig,
    figures: Option<Figures>,
    outcome: Option<Value>,
    metrics: Vec<Value>,
    curve: Vec<Point>,
    state: State,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
}

impl RunPage {
    /// Reads a run's folder.
    ///
    /// # Errors
    /// A folder that holds no run, or one whose files are damaged.
    pub fn read(root: &Path) -> Result<Self> {
        let folder = RunFolder { root: root.to_owned() };
        let Some(record) = folder.record()? else {
            if root.join("plan.json").exists() && root.join("results.json").exists() {
                bail!(
                    "{0} holds a comparison, whose page is {0}/report.html; its runs are in {0}/runs",
                    root.display()
                );
            }
            bail!("{} holds no run (run.json): give the output_dir of a run", root.display());
        };
        let config: Map<String, Value> =
            CONFIG.iter().filter_map(|key| Some(((*key).to_owned(), record.get(*key)?.clone()))).collect();
        let name = root.join("run.json").display().to_string();
        let config = RunConfig::parse(&Value::Object(config).to_string(), &name, &[])
            .with_context(|| format!("{name} is not the record of a run of this version"))?;
        let metrics = if folder.metrics().exists() { metrics::read(&folder.metrics())? } else { Vec::new() };
        let outcome = folder.outcome()?;
        let state = match (folder.is_busy(), &outcome) {
            (true, _) => State::AtWork,
            (false, Some(_)) => State::Finished,
            (false, None) => State::Stopped,
        };
        let checkpoints = state::list(&folder.checkpoints())?;
        let saved = checkpoints.last().and_then(|path| state::step_of(path));
        let (figures, curve) = (folder.figures()?, metrics::curve(&metrics));
        Ok(Self { folder, record, config, figures, outcome, metrics, curve, state, saved })
    }

    /// The page.
    ///
    /// # Errors
    /// Plots that cannot be drawn.
    pub fn render(&self) -> Result<String> {
        let memory_plan = self.figures.as_ref().map(|figures| &figures.memory);
        let bars = memory_plan.map(|plan| ("this run", plan, metrics::peak_memory(&self.metrics)));
        let [changed, same] = self.settings();
        let page = context! {
            name => self.name(),
            subtitle => self.subtitle(),
            sentences => self.sentences(),
            facts => self.facts(),
            legend => self.legend(),
            curves => self.curves()?,
            rates => self.rates()?,
            samples => self.outcome.as_ref().map(|outcome| outcome["samples"].clone()),
            memory => memory(&bars.into_iter().collect::<Vec<_>>())?,
            data => self.data()?,
            changed,
            same,
            provenance => self.provenance(),
            next => self.next(),
        };
        render(TEMPLATE, page)
    }

    fn name(&self) -> String {
        let root = self.folder.root.canonicalize().unwrap_or_else(|_| self.folder.root.clone());
        root.file_name().map_or_else(|| NONE.to_owned(), |name| name.to_string_lossy().into_owned())
    }

    fn subtitle(&self) -> String {
        let data = &self.config.data;
        let held_out = match &data.eval {
            Some(files) => format!(", held out: {}", files.names()),
            None => String::new(),
        };
        format!(
            "{} with {}, trained on {}{held_out}.",
            model_name(&self.config.model),
            self.config.method.name,
            data.train.names()
        )
    }

    /// Steps done.
    fn step(&self) -> u64 {
        self.curve.last().map_or(0, |point| point.step)
    }

    fn planned(&self) -> Option<u64> {
        self.figures.as_ref().map(|figures| figures.steps)
    }

    /// The held-out loss before the first step.
    fn before(&self) -> Option<f64> {
        self.curve.iter().find(|point| point.step == 0)?.validation_loss
    }

    /// The score whose parameters are the result, or would be by now. That of the start counts where the run went on from an adapter.
    fn best(&self) -> Option<&Point> {
        let counts = |point: &&Point| point.step > 0 || self.config.adapter_init.is_some();
        let scores = self.curve.iter().filter(|point| point.validation_loss.is_some()).filter(counts);
        // The first of several that are equal.
        scores.min_by(|a, b| a.validation_loss.unwrap_or(f64::NAN).total_cmp(&b.validation_loss.unwrap_or(f64::NAN)))
    }

    /// What there is to say of it in a few sentences.
    fn sentences(&self) -> Vec<String> {
        let step = self.step();
        let of = self.planned().map_or_else(String::new, |planned| format!(" of {planned}"));
        let mut sentences = Vec::new();
        sentences.push(match (self.state, &self.outcome) {
            (State::Finished, Some(outcome)) => match outcome["stopped_early"].as_str() {
                Some(early) => format!("It {early}."),
                None => format!("It is finished, after {step} steps."),
            },
            (State::AtWork, _) => {
                let left = self.seconds_left().map_or_else(String::new, |left| format!(", about {} of steps left", duration(left)));
                format!("It is at work, after step {step}{of}{left}. This page shows it as it was when the page was written.")
            }
            _ => {
                let saved = match self.saved {
                    Some(saved) => format!("it goes on after step {saved}, the newest that is saved"),
                    None => "no step is saved, so that it begins anew".to_owned(),
                };
                format!("It was stopped after step {step}{of}; {saved}.")
            }
        });
        match (self.before(), self.best()) {
            (Some(before), Some(Point { step, validation_loss: Some(best), .. })) => {
                let (was, now) = (before.exp(), best.exp());
                sentences.push(format!(
                    "The loss on held-out rows went from {before:.4} to {best:.4} at its best, after step {step} (perplexity {was:.2} and {now:.2})."
                ));
                if *best >= before {
                    sentences.push("No step made it better: lower the learning rate, or look at the data.".to_owned());
                }
            }
            (Some(before), None) => {
                sentences.push(format!("The loss on held-out rows was {before:.4} before the first step."))
            }
            _ if self.curve.is_empty() => {}
            _ => sentences
                .push("No rows are held out, so that nothing says how it does on rows it has not seen.".to_owned()),
        }
        sentences
    }

    fn seconds_left(&self) -> Option<f64> {
        let last = self.curve.last().filter(|point| point.step > 0)?;
        Some(last.seconds / last.step as f64 * self.planned()?.checked_sub(last.step)? as f64)
    }

    /// Its figures, each with its name.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = Vec::new();
        if let Some(figures) = &self.figures {
            let share = 100.0 * figures.trainable_parameters as f64 / figures.base_parameters.max(1) as f64;
            facts.push(("trained parameters", format!("{} ({share:.2}%)", grouped(figures.trainable_parameters))));
        }
        let training = &self.config.training;
        let rows = training.batch_size * training.gradient_accumulation_steps;
        facts.push(("steps", format!("{} of {rows} rows", grouped(self.step()))));
        if let Some(last) = self.curve.last() {
            facts.push(("tokens trained on", grouped(last.tokens)));
            facts.push(("time in steps", duration(last.seconds)));
            if last.seconds > 0.0 {
                facts.push((
                    "speed",
                    format!("{} tokens a second", grouped((last.tokens as f64 / last.seconds) as u64)),
                ));
            }
        }
        let peak = self.outcome.as_ref().and_then(|outcome| outcome["peak_rss_bytes"].as_u64());
        if let Some(peak) = peak.max(metrics::peak_memory(&self.metrics)) {
            facts.push(("peak memory", human(peak)));
        }
        if let Some(outcome) = &self.outcome {
            if let Some(bytes) = outcome["bytes"].as_u64() {
                facts.push(("size of the result", human(bytes)));
            }
            if let Some(arithmetic) = outcome["compute"]["arithmetic"].as_str() {
                facts.push(("the base's products", arithmetic.to_owned()));
            }
        }
        facts
    }

    fn legend(&self) -> Vec<Html> {
        let is_scored = self.curve.iter().any(|point| point.validation_loss.is_some());
        let best = self.best().map(|best| format!("the best held-out loss, after step {}", best.step));
        let names = [
            Some("loss of the rows trained on, smoothed".to_owned()),
            is_scored.then(|| "held-out loss".to_owned()),
            best,
        ];
        let entry =
            |(number, name): (usize, String)| context! { number => number + 1, colour => plots::css(number), name };
        names.into_iter().enumerate().filter_map(|(number, name)| Some(entry((number, name?)))).collect()
    }

    fn curves(&self) -> Result<Vec<Html>> {
        let best = self.best();
        // A mark for each of the plots.
        let marks = |place: &dyn Fn(&Point) -> f64| {
            best.map(|best| Mark {
                number: 2,
                x: place(best),
                y: best.validation_loss.unwrap_or(f64::NAN),
                on_frontier: false,
            })
        };
        curves(|place| {
            let of = |loss: fn(&Point) -> Option<f64>| -> Vec<(f64, f64)> {
                self.curve.iter().filter_map(|point| Some((place(point), loss(point)?))).collect()
            };
            let (losses, scores) = (of(|point| point.loss), of(|point| point.validation_loss));
            let line = |number, points: Vec<(f64, f64)>, dots| {
                (!points.is_empty()).then_some(Shape::Line { number, points, dots })
            };
            let shapes = [line(0, losses, Vec::new()), line(1, scores.clone(), scores), marks(place).map(Shape::Mark)];
            shapes.into_iter().flatten().collect()
        })
    }

    /// Learning rate and gradient norm against steps.
    fn rates(&self) -> Result<Vec<Html>> {
        let mut found = Vec::new();
        for (key, title) in
            [("learning_rate", "learning rate"), ("gradient_norm", "norm of the gradient, before clipping")]
        {
            let steps: Vec<(f64, f64)> =
                self.metrics.iter().filter_map(|line| Some((line["step"].as_f64()?, line[key].as_f64()?))).collect();
            if !steps.is_empty() {
                let x = Axis { title: "steps".to_owned(), format: short, logarithmic: false };
                let y = Axis { title: title.to_owned(), format: scientific, logarithmic: false };
                found.push(super::svg(plots::plot(&x, &y, &[Shape::Course(steps)], &[], false)?));
            }
        }
        Ok(found)
    }

    fn data(&self) -> Result<Vec<Html>> {
        let Some(figures) = &self.figures else { return Ok(Vec::new()) };
        let mut found = vec![data("Rows trained on", &figures.train)?];
        if let Some(eval) = &figures.eval {
            found.push(data("Held-out rows", eval)?);
        }
        Ok(found)
    }

    /// The settings that are not as they would be by default, and the others.
    fn settings(&self) -> [Vec<(String, String)>; 2] {
        let settings_of = |config: &RunConfig| {
            let mut found = Vec::new();
            // What cannot be said has no settings to compare with.
            flatten("", &serde_json::to_value(config).unwrap_or_default(), &mut found);
            found
        };
        let RunConfig { model, output_dir, method, data, .. } = &self.config;
        let least =
            json!({ "model": model, "output_dir": output_dir, "method": method, "data": { "train": data.train } });
        let usual = RunConfig::parse(&least.to_string(), "defaults", &[]).map(|config| settings_of(&config));
        let usual: BTreeSet<(String, String)> = usual.unwrap_or_default().into_iter().collect();
        let given = ["model", "output_dir", "method", "data.train"];
        let is_usual = |setting: &(String, String)| usual.contains(setting) && !given.contains(&setting.0.as_str());
        let (same, changed) = settings_of(&self.config).into_iter().partition(is_usual);
        [changed, same]
    }

    fn provenance(&self) -> Vec<(&'static str, String)> {
        let of = |(key, name): &(&str, &'static str)| match self.record.get(*key)? {
            Value::Null => None,
            value => Some((*name, super::plain(value))),
        };
        let mut found: Vec<(&'static str, String)> = PROVENANCE.iter().filter_map(of).collect();
        if let Some(figures) = &self.figures {
            found.push(("begun with", figures.command.clone()));
        }
        found
    }

    /// What to do with it.
    fn next(&self) -> Vec<String> {
        match self.state {
            State::Finished => {
                let is_soft_prompt = self.config.adapter.as_ref().is_some_and(|settings| settings.0.is_soft_prompt());
                let result = self.folder.result(&self.config.method);
                next_commands(&self.config, is_soft_prompt, &result, "retune")
            }
            State::Stopped => self.figures.iter().map(|figures| format!("{} --resume", figures.command)).collect(),
            State::AtWork => Vec::new(),
        }
    }
}
