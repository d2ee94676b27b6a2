//! `retune generate`: a text continued or a message answered.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use retune_engine::generate::{Generation, Question, Sampling, Standing};
use retune_engine::model::Model;
use retune_text::chat_template::Message;
use retune_text::tokenizer::Tokenizer;
use serde_json::json;

use super::{print_json, text_or_stdin};
use crate::args::{GenerateArgs, SamplingArgs};
use crate::session::{Base, Loaded};
use crate::{fetch, storage};

/// Streams the answer to standard output.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let sampling = args.sampling.checked()?;
    let mut base = Base::open(&fetch::resolve(&args.model)?)?;
    base.check_finite()?;
    let held = storage::under_all(&base, &args.adapters, args.storage)?;
    storage::hold(&mut base, held)?;
    let model = base.checkpoint.model()?;
    let mut loaded = Loaded::all(&base, &model, &args.adapters)?;
    if loaded.is_empty() {
        loaded.push(Loaded::nothing(&model));
    }
    let tokenizer = base.tokenizer()?;
    if args.system.is_some() && tokenizer.chat_template().is_none() {
        bail!(
            "--system needs a chat template, which {} does not have: put its words into the prompt, or use an instruction-tuned model",
            args.model
        );
    }
    let text = text_or_stdin(args.prompt.as_deref(), "prompt")?;
    let prompt = if args.raw || tokenizer.chat_template().is_none() {
        tokenizer.encode_with_special_tokens(&text)?
    } else {
        chat_prompt(tokenizer, args.system.as_deref(), &text)?
    };
    // Of an empty text a tokenizer without BOS makes no tokens, and a chat template a message that says nothing.
    if text.is_empty() || prompt.is_empty() {
        bail!("the prompt is empty; expected a message to answer, or with --raw a text to continue");
    }
    let spec = &model.spec;
    for Loaded { name, overlay, .. } in &loaded {
        let own = overlay.prelude(spec).len();
        let needed = (own + prompt.len()).saturating_add(args.max_new_tokens);
        if let Some(limit) = spec.context_limit().filter(|limit| needed > *limit) {
            let of_adapter = if own == 0 { String::new() } else { format!(", {own} of the adapter {name}") };
            bail!(
                "{} tokens of prompt{of_adapter} and {} to generate exceed the model's context of {limit}: shorten the prompt or lower --max-new-tokens",
                prompt.len(),
                args.max_new_tokens
            );
        }
    }
    let [Loaded { overlay, params, .. }] = &loaded[..] else {
        return answer_side_by_side(args, &model, &loaded, tokenizer, &prompt);
    };
    let mut generation = Generation::new(&model, overlay, params, sampling);
    let start = Instant::now();
    generation.read_text(&prompt);
    let ids = answer(&mut generation, tokenizer, args.max_new_tokens, !args.json)?;
    if args.json {
        let seconds = start.elapsed().as_secs_f64();
        print_json(&json!({
            "text": tokenizer.decode(&ids, true),
            "ids": ids,
            "prompt_tokens": prompt.len(),
            "generated_tokens": ids.len(),
            "stopped": ids.len() < args.max_new_tokens,
            "seconds": seconds,
        }))?;
    } else {
        outln!();
    }
    Ok(())
}

/// Answers through each adapter at once, and prints one answer after the other, in the order of the adapters.
fn answer_side_by_side(
    args: &GenerateArgs,
    model: &Model,
    loaded: &[Loaded],
    tokenizer: &Tokenizer,
    prompt: &[u32],
) -> Result<()> {
    if let Some(Loaded { name, method, .. }) = loaded.iter().find(|loaded| !loaded.overlay.stands_beside_others()) {
        bail!(
            "the adapter {name} ({method}) changes more of the model than linears, so that it cannot answer beside others: give it alone"
        );
    }
    let standings: Vec<Standing<'_>> =
        loaded.iter().map(|Loaded { overlay, params, .. }| Standing { overlay, params }).collect();
    let question = |standing| Question { standing, ids: prompt.to_vec() };
    let questions: Vec<Question> = (0..loaded.len()).map(question).collect();
    let mut answers = vec![Vec::new(); loaded.len()];
    let start = Instant::now();
    let mut generation = Generation::of_many(model, &standings, loaded.len(), args.sampling.checked()?);
    let on_answer = |number: usize, ids| {
        answers[number] = ids;
        true
    };
    generation.answer_all(&questions, args.max_new_tokens, tokenizer.eos_token_ids(), || true, on_answer);
    if args.json {
        let of_adapter = |(loaded, ids): (&Loaded, &Vec<u32>)| {
            json!({
                "adapter": loaded.name,
                "text": tokenizer.decode(ids, true),
                "ids": ids,
                "generated_tokens": ids.len(),
                "stopped": ids.len() < args.max_new_tokens,
            })
        };
        let answers: Vec<_> = loaded.iter().zip(&answers).map(of_adapter).collect();
        let seconds = start.elapsed().as_secs_f64();
        return print_json(&json!({ "answers": answers, "prompt_tokens": prompt.len(), "seconds": seconds }));
    }
    for (loaded, ids) in loaded.iter().zip(&answers) {
        outln!("[{}] {}", loaded.name, tokenizer.decode(ids, true).trim());
    }
    Ok(())
}

/// Generates what follows the text read, and streams it to standard output where it is to be shown.
pub(super) fn answer(
    generation: &mut Generation<'_>,
    tokenizer: &Tokenizer,
    max_new_tokens: usize,
    is_shown: bool,
) -> Result<Vec<u32>> {
    let mut stream = tokenizer.decode_stream();
    let mut stdout = std::io::stdout();
    let mut failed = None;
    let mut print = |text: Option<String>| {
        let Some(text) = text.filter(|_| is_shown) else { return true };
        let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        written.map_err(|error| failed = Some(error)).is_ok()
    };
    let ids = generation.go_on(max_new_tokens, tokenizer.eos_token_ids(), |id| print(stream.push(id)));
    print(stream.finish());
    match failed {
        Some(error) => Err(error).context("cannot write to standard output"),
        None => Ok(ids),
    }
}

impl SamplingArgs {
    /// What they say.
    ///
    /// # Errors
    /// A value out of its range, or without effect: greedy generation looks at none but the temperature.
    pub fn checked(&self) -> Result<Sampling> {
        let Self { temperature, top_p, top_k, seed } = *self;
        if temperature < 0.0 || !temperature.is_finite() {
            bail!("--temperature is {temperature}; expected 0 (greedy) or more");
        }
        if let Some(top_p) = top_p
            && !(top_p > 0.0 && top_p <= 1.0)
        {
            bail!("--top-p is {top_p}; expected more than 0 and at most 1");
        }
        let given = [("--top-p", top_p.is_some()), ("--top-k", top_k.is_some()), ("--seed", seed.is_some())];
        let given: Vec<&str> = given.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag).collect();
        if temperature == 0.0 && !given.is_empty() {
            bail!(
                "{} given with --temperature 0, which always takes the likeliest token; sampling needs --temperature above 0",
                given.join(", ")
            );
        }
        Ok(Sampling { temperature, top_p: top_p.unwrap_or(1.0), top_k: top_k.unwrap_or(0), seed: seed.unwrap_or(0) })
    }
}

/// The ids of a conversation of one message that awaits its answer.
pub fn chat_prompt(tokenizer: &Tokenizer, system: Option<&str>, text: &str) -> Result<Vec<u32>> {
    let template = tokenizer.chat_template().context("the model has no chat template: use --raw")?;
    let mut messages: Vec<_> = system.map(|system| Message::new("system", system)).into_iter().collect();
    messages.push(Message::new("user", text));
    Ok(tokenizer.encode(&template.render(&messages, true)?)?)
}
