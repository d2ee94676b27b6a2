//! `retune export`: a model or an adapter in the form that another program takes.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use retune_adapter::convert::{Conversion, Kept};
use retune_adapter::delta::{self, Deltas};
use retune_adapter::files::CONFIG_FILE;
use retune_adapter::{AdapterFile, BaseModules, gguf, mlx};
use retune_engine::overlay::Overlay;
use retune_formats::atomic::{self, Folder};
use retune_model::export;
use retune_text::go_template::Turns;
use serde_json::{Value, json};

use super::merge::{self, Bases, Merging, Written, is_gguf, write_gguf};
use super::print_json;
use crate::args::{ExportArgs, Program};
use crate::parity::{Parity, Sample, Side};
use crate::session::{self, Base};
use retune_model::export::refuse_occupied;

/// The ranks that vLLM has room for (`--max-lora-rank`).
const VLLM_RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
const MISTRAL_RS_RANK: usize = 256;
/// Families whose modules mlx-lm has under the names of transformers.
const MLX: [&str; 9] = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3"];

/// The name of the model in Ollama's folder.
const MODEL: &str = "model.gguf";
const MODELFILE: &str = "Modelfile";

/// Writes what the program takes, and says how far it is from what it was made of.
pub fn run(args: &ExportArgs) -> Result<()> {
    check(args)?;
    let folder = args.adapter.as_deref().map(session::adapter_folder).transpose()?;
    let bases = Bases::open(&args.model, folder.as_deref(), args.storage)?;
    let sample = Sample::of(&bases.into, folder.as_deref(), args.data.as_deref())?;
    match args.program {
        Program::LlamaCpp if args.adapter_only => lora_gguf(args, &bases.into, &sample),
        Program::LlamaCpp | Program::LmStudio | Program::Jan => merged(args, &bases, &sample),
        Program::Ollama => ollama(args, &bases, &sample),
        Program::Vllm | Program::MistralRs | Program::Peft | Program::Mlx => adapter(args, &bases.into, &sample),
    }
}

/// Refuses arguments that the program has no use for.
fn check(args: &ExportArgs) -> Result<()> {
    let program = args.program;
    let takes_gguf = matches!(program, Program::LlamaCpp | Program::LmStudio | Program::Jan);
    let takes_adapter = matches!(program, Program::Vllm | Program::MistralRs | Program::Peft | Program::Mlx);
    let out = args.out.display();
    if args.adapter_only && program == Program::Ollama {
        bail!(
            "Ollama takes no adapter: since 0.34.1 it refuses one in a Modelfile, and before that it ordered the rows of q and k of PEFT \
             adapters otherwise than the base's; leave out --adapter-only, and the merged model is written"
        );
    }
    if args.adapter_only && !takes_adapter && program != Program::LlamaCpp {
        bail!("{program} loads whole models only: leave out --adapter-only, and the merged model is written");
    }
    if (takes_adapter || args.adapter_only) && args.adapter.is_none() {
        bail!("{program} is given the adapter alone: say which, with --adapter");
    }
    for (flag, is_given) in [("--type", args.kind.is_some()), ("--storage", args.storage.is_some())] {
        if (takes_adapter || args.adapter_only) && is_given {
            bail!(
                "{flag} is of the weights of a merged model, and only the adapter is written for {program}: leave it out"
            );
        }
    }
    if takes_gguf && !is_gguf(&args.out) {
        bail!("{program} loads GGUF files, and {out} is named like none: give an --out that ends in .gguf");
    }
    if !takes_gguf && is_gguf(&args.out) {
        bail!("{program} takes a folder: give an --out that does not end in .gguf");
    }
    Ok(())
}

/// The adapter on its base, or the base alone.
fn lowered(args: &ExportArgs, base: &Base) -> Result<(Overlay, Vec<f32>)> {
    match &args.adapter {
        Some(directory) => session::adapted(base, directory).map(|(overlay, params, _)| (overlay, params)),
        None => Ok((Overlay::empty(&base.checkpoint.model()?), Vec::new())),
    }
}

fn write_merged(args: &ExportArgs, bases: &Bases, sample: &Sample, path: &Path) -> Result<Written> {
    let (overlay, params) = lowered(args, &bases.into)?;
    write_gguf(&Merging::of(bases, &overlay, &params, sample), path, args.kind)
        .with_context(|| format!("{} cannot be written for {}", args.model, args.program))
}

fn merged(args: &ExportArgs, bases: &Bases, sample: &Sample) -> Result<()> {
    let written = write_merged(args, bases, sample, &args.out)?;
    if args.json {
        return print_json(&written.json(&args.out));
    }
    merge::print("model", &written, &args.out)?;
    let out = args.out.display();
    match args.program {
        Program::LmStudio => outln!("try           lms import {out}"),
        Program::Jan => outln!("try           in Jan: Settings, Model Providers, Llama.cpp, Import"),
        _ => outln!("try           llama-cli -m {out}"),
    }
    Ok(())
}

/// The merged model and a Modelfile.
fn ollama(args: &ExportArgs, bases: &Bases, sample: &Sample) -> Result<()> {
    refuse_occupied(&args.out)?;
    let folder = Folder::create(&args.out, MODELFILE)?;
    let written = write_merged(args, bases, sample, &folder.path().join(MODEL))?;
    atomic::write(&folder.path().join(MODELFILE), modelfile(&bases.into)?.as_bytes())?;
    folder.commit()?;
    if args.json {
        return print_json(&written.json(&args.out));
    }
    merge::print("model", &written, &args.out)?;
    outln!("try           ollama create mine -f {}", args.out.join(MODELFILE).display());
    Ok(())
}

/// The chat template in Ollama's language and the tokens that end an answer.
fn modelfile(base: &Base) -> Result<String> {
    let tokenizer = base.tokenizer()?;
    let mut text = format!("FROM ./{MODEL}\n");
    // What is put before every text is not to be in the template as well.
    let first = |ids: Vec<u32>| ids.first().copied();
    let added = first(tokenizer.encode_with_special_tokens("a")?).filter(|id| tokenizer.bos_token_id() == Some(*id));
    let bos = added.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
    match tokenizer.chat_template().map(|template| Turns::of(template, &bos)) {
        Some(Some(turns)) => text += &format!("TEMPLATE \"\"\"{}\"\"\"\n", turns.go_template()),
        Some(None) => note!(
            "! the chat template does more than put texts around turns, and is not in the Modelfile: Ollama takes the one it knows for it, or \
             none; look at `ollama show --template`"
        ),
        None => note!("! the model has no chat template: Ollama gives it what is typed as it is"),
    }
    for &id in tokenizer.eos_token_ids() {
        if let Some(token) = tokenizer.id_to_token(id) {
            text += &format!("PARAMETER stop {}\n", Value::from(token));
        }
    }
    Ok(text)
}

/// The adapter alone, for llama.cpp.
fn lora_gguf(args: &ExportArgs, base: &Base, sample: &Sample) -> Result<()> {
    if args.out.exists() {
        bail!("{} is there already: give another --out, or remove it first", args.out.display());
    }
    let source = Source::open(args, base)?;
    let deltas = source.deltas(args, base)?;
    let linears = export::gguf_linears(&base.checkpoint)?;
    gguf::write_lora(&args.out, &linears, &deltas).with_context(|| way_out(args))?;
    let parity = source.parity(base, sample, &gguf::read_lora(&args.out, &linears)?)?;
    report(args, &parity, &format!("llama-cli -m BASE.gguf --lora {}", args.out.display()))
}

/// The adapter alone, in a folder.
fn adapter(args: &ExportArgs, base: &Base, sample: &Sample) -> Result<()> {
    refuse_occupied(&args.out)?;
    let (out, model) = (args.out.display(), &args.model);
    let source = Source::open(args, base)?;
    let modules = BaseModules::of(&base.checkpoint.spec);
    let folder = Folder::create(&args.out, CONFIG_FILE)?;
    let (parity, how) = match args.program {
        Program::Peft => {
            let info = source.file.method.info();
            if !info.is_of_peft() {
                bail!("PEFT has no method like {}: merge the adapter into its base (retune merge)", info.name);
            }
            source.file.write(folder.path(), &modules)?;
            let read = AdapterFile::read(folder.path())?;
            let overlay = read.lower(&base.checkpoint.spec)?;
            let parity = source.parity_with(base, sample, &overlay, &read.params(&overlay)?)?;
            (parity, format!("PeftModel.from_pretrained(model, \"{out}\")"))
        }
        Program::Mlx => {
            let family = base.checkpoint.spec.family;
            if !MLX.contains(&family) {
                bail!("mlx-lm has no adapters that are known here for {family} models; known: {}", MLX.join(", "));
            }
            let deltas = source.deltas(args, base)?;
            let layers = base.checkpoint.spec.decoder.blocks.len();
            mlx::write(folder.path(), layers, source.file.base_model.as_deref(), &deltas)
                .with_context(|| way_out(args))?;
            let parity = source.parity(base, sample, &mlx::read(folder.path())?)?;
            (parity, format!("mlx_lm.generate --model {model} --adapter-path {out}"))
        }
        _ => {
            let conversion = conversion(&source.deltas(args, base)?)?;
            let r = conversion.r;
            let most = if args.program == Program::Vllm { VLLM_RANKS[VLLM_RANKS.len() - 1] } else { MISTRAL_RS_RANK };
            if r > most {
                bail!(
                    "{} takes adapters up to rank {most}, and this has rank {r}: cut it (retune convert --to lora --rank {most}), or merge it",
                    args.program
                );
            }
            let (config, tensors) = conversion.adapter();
            let base_model = source.file.base_model.clone();
            AdapterFile { method: Arc::new(config), base_model, tensors }.write(folder.path(), &modules)?;
            let read = AdapterFile::read(folder.path())?;
            let overlay = read.lower(&base.checkpoint.spec)?;
            let parity = source.parity_with(base, sample, &overlay, &read.params(&overlay)?)?;
            let room = VLLM_RANKS.into_iter().find(|&room| room >= r).unwrap_or(most);
            let how = match args.program {
                Program::Vllm => {
                    format!("vllm serve {model} --enable-lora --max-lora-rank {room} --lora-modules mine={out}")
                }
                _ => format!("give mistral.rs the folder {out} as a LoRA adapter of {model}"),
            };
            (parity, how)
        }
    };
    folder.commit()?;
    report(args, &parity, &how)
}

/// The adapter that is exported.
struct Source {
    overlay: Overlay,
    params: Vec<f32>,
    file: AdapterFile,
}

impl Source {
    fn open(args: &ExportArgs, base: &Base) -> Result<Self> {
        let Some(directory) = &args.adapter else { bail!("say which adapter, with --adapter") };
        let (overlay, params, file) = session::adapted(base, directory)?;
        Ok(Self { overlay, params, file })
    }

    /// What it changes, which must be all that it does.
    fn deltas(&self, args: &ExportArgs, base: &Base) -> Result<Deltas> {
        delta::of_adapter(&self.file, &base.checkpoint.spec, &self.overlay, &self.params).with_context(|| way_out(args))
    }

    /// Holds it against changes that were read back.
    fn parity(&self, base: &Base, sample: &Sample, read: &Deltas) -> Result<Parity> {
        let (config, tensors) = conversion(read)?.adapter();
        let file = AdapterFile { method: Arc::new(config), base_model: None, tensors };
        let overlay = file.lower(&base.checkpoint.spec)?;
        self.parity_with(base, sample, &overlay, &file.params(&overlay)?)
    }

    fn parity_with(&self, base: &Base, sample: &Sample, overlay: &Overlay, params: &[f32]) -> Result<Parity> {
        let model = base.checkpoint.model()?;
        let ours = Side { model: &model, overlay: &self.overlay, params: &self.params };
        Ok(Parity::of(sample, ours, Side { model: &model, overlay, params }))
    }
}

/// Changes under one rank and one scale.
fn conversion(deltas: &Deltas) -> Result<Conversion> {
    let kept = deltas.iter().map(|(module, delta)| Ok((module.clone(), Kept::of_terms(delta.clone(), None)?)));
    Ok(Conversion::of(kept.collect::<Result<_>>()?))
}

/// What to do with an adapter that a program cannot be given.
fn way_out(args: &ExportArgs) -> String {
    let merged = match args.program {
        Program::LlamaCpp => {
            "leave out --adapter-only to write the merged model, which holds changes of tables as well"
        }
        _ => "merge it into its base (retune merge)",
    };
    format!(
        "{} takes changes of weights of low rank and nothing else: make the adapter a plain LoRA (retune convert --to lora --model {} --rank 16), or {merged}",
        args.program, args.model
    )
}

fn report(args: &ExportArgs, parity: &Parity, how: &str) -> Result<()> {
    if args.json {
        return print_json(&json!({ "out": args.out, "parity": parity.json() }));
    }
    outln!("adapter       {}", args.out.display());
    parity.print("parity", "read back")?;
    outln!("try           {how}");
    Ok(())
}
