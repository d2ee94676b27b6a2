//! `retune generate`: a text continued or a message answered.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use retune_model::chat_template::Message;
use retune_model::generate::{Generation, Sampling};
use retune_model::tokenizer::Tokenizer;
use serde_json::json;

use super::{print_json, text_or_stdin};
use crate::args::GenerateArgs;
use crate::session::Session;

/// Streams the answer to standard output.
pub fn run(args: &GenerateArgs) -> Result<()> {
    if args.temperature < 0.0 || !args.temperature.is_finite() {
        bail!("--temperature is {}; expected 0 (greedy) or more", args.temperature);
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        bail!("--top-p is {}; expected more than 0 and at most 1", args.top_p);
    }
    let session = Session::open(&args.model)?;
    let tokenizer = session.tokenizer()?;
    let text = text_or_stdin(args.prompt.as_deref(), "prompt")?;
    let prompt = if args.raw || tokenizer.chat_template().is_none() {
        tokenizer.encode_with_special_tokens(&text)?
    } else {
        chat_prompt(&tokenizer, args.system.as_deref(), &text)?
    };
    let limit = session.model.config.max_position_embeddings;
    if prompt.len().saturating_add(args.max_new_tokens) > limit {
        bail!(
            "{} tokens of prompt and {} to generate exceed the model's context of {limit}: shorten the prompt or lower --max-new-tokens",
            prompt.len(),
            args.max_new_tokens
        );
    }
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, top_k: args.top_k, seed: args.seed };
    let mut generation = Generation::new(&session.model, &session.params, sampling);
    let start = Instant::now();
    let mut stream = tokenizer.decode_stream();
    let mut stdout = std::io::stdout();
    let mut failed = None;
    let mut print = |text: Option<String>| {
        let Some(text) = text.filter(|_| !args.json) else { return true };
        let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        written.map_err(|error| failed = Some(error)).is_ok()
    };
    let ids = generation.run(&prompt, args.max_new_tokens, tokenizer.eos_token_ids(), |id| print(stream.push(id)));
    print(stream.finish());
    if let Some(error) = failed {
        return Err(error).context("cannot write to standard output");
    }
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

/// The ids of a conversation of one message that awaits its answer.
pub fn chat_prompt(tokenizer: &Tokenizer, system: Option<&str>, text: &str) -> Result<Vec<u32>> {
    let template = tokenizer.chat_template().context("the model has no chat template: use --raw")?;
    let message = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
    let mut messages: Vec<_> = system.map(|system| message("system", system)).into_iter().collect();
    messages.push(message("user", text));
    Ok(tokenizer.encode(&template.render(&messages, true)?)?)
}
