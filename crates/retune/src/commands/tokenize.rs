//! `retune tokenize`: a text's token ids.

use anyhow::{Context, Result};
use retune_model::checkpoint::Checkpoint;
use retune_text::chat_template::Message;
use serde_json::json;

use super::{print_json, text_or_stdin};
use crate::args::TokenizeArgs;
use crate::fetch;

/// Prints the ids, or with `--json` ids and pieces.
pub fn run(args: &TokenizeArgs) -> Result<()> {
    let tokenizer = Checkpoint::open(&fetch::resolve(&args.model)?)?.tokenizer()?;
    let text = text_or_stdin(args.text.as_deref(), "text")?;
    let ids = if args.chat {
        let template = tokenizer.chat_template().context("the model has no chat template: leave out --chat")?;
        let message = Message::new("user", text);
        tokenizer.encode(&template.render(&[message], true)?)?
    } else if args.no_special_tokens {
        tokenizer.encode(&text)?
    } else {
        tokenizer.encode_with_special_tokens(&text)?
    };
    if args.json {
        let pieces: Vec<_> = ids.iter().map(|&id| tokenizer.id_to_token(id)).collect();
        print_json(&json!({ "ids": ids, "tokens": pieces }))?;
    } else {
        outln!("{}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
    }
    Ok(())
}
