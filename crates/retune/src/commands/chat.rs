//! `retune chat`: a conversation with a model whose adapter can change in the middle of it.
//!
//! Each adapter has a generation of its own, with a cache of what it has read so far: with the next message it reads what is new to it.
//! Switching reads nothing.

use std::io::{self, BufRead, IsTerminal};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use retune_adapter::combine::{Kind, Settings, Source, combine};
use retune_adapter::delta::{low_rank, plain_lora};
use retune_adapter::{AdapterFile, Deltas};
use retune_engine::generate::{Generation, Sampling};
use retune_engine::model::Model;
use retune_engine::overlay::Overlay;
use retune_text::chat_template::{ChatTemplate, Message};
use retune_text::tokenizer::Tokenizer;

use super::generate::answer;
use crate::args::{ChatArgs, NO_ADAPTER};
use crate::session::{Base, Loaded};
use crate::{fetch, storage};

/// Which of them answers.
enum Standing {
    /// The one of this number.
    One(usize),
    /// Their weighted sum.
    Sum { name: String, overlay: Box<Overlay>, params: Vec<f32> },
}

/// Reads messages and commands from standard input until its end.
pub fn run(args: &ChatArgs) -> Result<()> {
    let sampling = args.sampling.checked()?;
    let mut base = Base::open(&fetch::resolve(&args.model)?)?;
    base.check_finite()?;
    let held = storage::under_all(&base, &args.adapters, args.storage)?;
    storage::hold(&mut base, held)?;
    let model = base.checkpoint.model()?;
    let tokenizer = base.tokenizer()?;
    if model.spec.encoder.is_some() {
        bail!(
            "{} answers one text that its encoder reads, and knows no conversation of several turns: use `retune generate`",
            args.model
        );
    }
    let template = tokenizer.chat_template().with_context(|| {
        format!("{} has no chat template: use `retune generate --raw`, or an instruction-tuned model", args.model)
    })?;
    let mut loaded = vec![Loaded::nothing(&model)];
    loaded.extend(Loaded::all(&base, &model, &args.adapters)?);
    let mut chat = Chat { args, model: &model, tokenizer, template, loaded: &loaded, said: Vec::new() };
    chat.forget();
    chat.talk_by_turns(sampling, loaded.len().min(2) - 1)
}

/// A conversation.
struct Chat<'a> {
    args: &'a ChatArgs,
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    /// The base alone, then the adapters.
    loaded: &'a [Loaded],
    said: Vec<Message>,
}

impl<'a> Chat<'a> {
    /// Talks through one adapter after another, from that of number `first`.
    fn talk_by_turns(&mut self, sampling: Sampling, first: usize) -> Result<()> {
        let model = self.model;
        let new = |loaded: &'a Loaded| Generation::new(model, &loaded.overlay, &loaded.params, sampling);
        let mut generations: Vec<Generation<'_>> = self.loaded.iter().map(new).collect();
        let mut next = Some(Standing::One(first));
        while let Some(standing) = next {
            next = match &standing {
                Standing::One(number) => {
                    let Loaded { name, overlay, .. } = &self.loaded[*number];
                    self.talk(name, overlay, &mut generations[*number])?
                }
                Standing::Sum { name, overlay, params } => {
                    let mut generation = Generation::new(model, overlay, params, sampling);
                    self.talk(name, overlay, &mut generation)?
                }
            };
        }
        Ok(())
    }

    /// Talks until another adapter is asked for; nothing where the conversation ends.
    fn talk(&mut self, name: &str, overlay: &Overlay, generation: &mut Generation<'_>) -> Result<Option<Standing>> {
        let is_person = io::stdin().is_terminal();
        loop {
            if is_person {
                out!("[{name}] > ");
            }
            let mut line = String::new();
            if io::stdin().lock().read_line(&mut line).context("cannot read standard input")? == 0 {
                return Ok(None);
            }
            let line = line.trim();
            let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            match command {
                "" => {}
                "/adapter" if rest.trim().is_empty() => self.list(name)?,
                "/adapter" => match self.asked_for(rest) {
                    Ok(standing) => return Ok(Some(standing)),
                    Err(error) => note!("! {error:#}"),
                },
                "/new" => self.forget(),
                "/quit" => return Ok(None),
                _ if command.starts_with('/') => {
                    note!("! {command} is no command; there are /adapter, /new and /quit");
                }
                _ => self.turn(line, overlay, generation)?,
            }
        }
    }

    /// Begins anew.
    fn forget(&mut self) {
        self.said = self.args.system.iter().map(|system| Message::new("system", system)).collect();
    }

    fn list(&self, standing: &str) -> Result<()> {
        for Loaded { name, method, .. } in self.loaded {
            outln!("{} {name}  ({method})", if name == standing { '*' } else { ' ' });
        }
        if !self.loaded.iter().any(|loaded| loaded.name == standing) {
            outln!("* {standing}");
        }
        Ok(())
    }

    /// Answers a message. One that does not fit is not kept.
    fn turn(&mut self, text: &str, overlay: &Overlay, generation: &mut Generation<'_>) -> Result<()> {
        self.said.push(Message::new("user", text));
        let prompt = self.tokenizer.encode(&self.template.render(&self.said, true)?)?;
        let spec = &self.model.spec;
        let used = overlay.prelude(spec).len() + prompt.len();
        if used >= spec.context {
            self.said.pop();
            note!(
                "! the conversation has {used} tokens, the model's context is {}: begin anew with /new",
                spec.context
            );
            return Ok(());
        }
        generation.read_text(&prompt);
        let most = self.args.max_new_tokens.min(spec.context - used);
        let ids = answer(generation, self.tokenizer, most, true)?;
        outln!();
        self.said.push(Message::new("assistant", self.tokenizer.decode(&ids, true)));
        Ok(())
    }

    /// What `/adapter` asks for: a name, or names with weights.
    fn asked_for(&self, text: &str) -> Result<Standing> {
        let words: Vec<&str> = text.split_whitespace().collect();
        if let [name] = words[..]
            && !name.contains('=')
        {
            return Ok(Standing::One(self.number(name)?));
        }
        let wanted = "expected one adapter's name, or names with weights, such as /adapter a=0.5 b=0.5";
        let mut weighed: Vec<(usize, f64)> = Vec::new();
        for word in &words {
            let (name, weight) = word.split_once('=').with_context(|| format!("{word}: {wanted}"))?;
            let weight = weight.parse().ok().filter(|weight: &f64| weight.is_finite());
            let weight = weight.with_context(|| format!("{word}: the weight is no number; {wanted}"))?;
            let number = self.number(name)?;
            if weighed.iter().any(|(other, _)| *other == number) {
                bail!("{name} is there twice; {wanted}");
            }
            if number == 0 {
                bail!("{NO_ADAPTER} is the base alone, which a weight does not change; leave it out");
            }
            weighed.push((number, weight));
        }
        let (overlay, params) = self.sum(&weighed)?;
        Ok(Standing::Sum { name: words.join(" "), overlay: Box::new(overlay), params })
    }

    fn number(&self, name: &str) -> Result<usize> {
        let found = self.loaded.iter().position(|loaded| loaded.name == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = self.loaded.iter().map(|loaded| loaded.name.as_str()).collect();
            anyhow!("there is no adapter {name}; there are {}", names.join(", "))
        })
    }

    /// The exact weighted sum of what adapters change.
    fn sum(&self, weighed: &[(usize, f64)]) -> Result<(Overlay, Vec<f32>)> {
        let spec = &self.model.spec;
        let changes = |(number, weight): &(usize, f64)| -> Result<(&str, Deltas, f64)> {
            let Loaded { name, method, overlay, params } = &self.loaded[*number];
            let deltas = low_rank(spec, overlay, params).with_context(|| {
                format!("{name} ({method}) cannot be weighed: only low-rank changes add up, as LoRA's, rsLoRA's and MiSS's do")
            })?;
            Ok((name, deltas, *weight))
        };
        let changes = weighed.iter().map(changes).collect::<Result<Vec<_>>>()?;
        let sources: Vec<Source<'_>> =
            changes.iter().map(|(name, deltas, weight)| Source { name, deltas, weight: *weight }).collect();
        // All terms side by side: the least rank that holds the sum would take a decomposition of every module.
        let sum = combine(&sources, &Settings { kind: Kind::Cat, ..Settings::default() })?;
        let (config, tensors) = plain_lora(sum.r, &sum.deltas, sum.deltas.keys().cloned().collect());
        let file = AdapterFile { method: Arc::new(config), base_model: None, tensors };
        let overlay = file.lower(spec)?;
        let params = file.params(&overlay)?;
        Ok((overlay, params))
    }
}
