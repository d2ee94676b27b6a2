"""An encoder-decoder: steps of LoRA by retune and by PyTorch + peft in turn, on a T5 of FLAN-T5-small's shape with random weights.

    python bench/seq2seq.py [--steps 125] [--pairs 1] [--compute auto,f32] [--threads 2]

The model and a Unigram tokenizer of 32,128 pieces at most, trained on the bundled Debian synopses, are made first. Batches of 8 of the
synopses' rows in file order, cut to 256 tokens on both sides, LoRA r 16 on all linears from the same start, no dropout, rate 2e-4
throughout. Prints the seconds of the steps, the peak memory of the processes and the largest difference of the first 20 losses.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import comparison
import pytorch_common as common

BATCH, MAX_LENGTH, RATE = 8, 256, 2e-4
TRAIN = comparison.DATA / "debian-synopsis.train.jsonl"
METRICS = [("seconds", "seconds", 1, ".1f"), ("peak memory MB", "peak_rss_bytes", 1e-6, ".0f")]


def make(folder):
    """The model, its tokenizer, the rows and the first adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    rows = [{"prompt": f"{row['instruction']} {' '.join(row['input'].split())}", "completion": row["output"]} for row in rows]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=32_000, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([text for row in rows for text in row.values()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    short = lambda row: {key: fast.decode(fast(text).input_ids[:MAX_LENGTH - 8], skip_special_tokens=True) for key, text in row.items()}
    rows = [short(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    torch.manual_seed(0)
    config = T5Config(vocab_size=32_128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, dropout_rate=0.0,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    adapted.save_pretrained(folder / "adapter")


def torch_side(folder, steps, threads):
    """Prints what the steps took."""
    from time import perf_counter

    import torch
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=True)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    batches = [rows[i:i + BATCH] for i in range(0, len(rows), BATCH)][:steps]
    losses, tokens, start = [], 0, perf_counter()
    for batch in batches:
        source = tokenizer([row["prompt"] for row in batch], padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = tokenizer([row["completion"] for row in batch], padding=True, return_tensors="pt").input_ids
        labels[labels == tokenizer.pad_token_id] = -100
        loss = model(**source, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens += int(source.attention_mask.sum()) + int((labels != -100).sum())
    seconds = perf_counter() - start
    print(json.dumps({"losses": losses, "seconds": seconds, "tokens": tokens, "peak_rss_bytes": common.peak_rss_bytes()}))


def retune_side(args, folder, compute):
    config = {
        "model": str(folder / "model"), "output_dir": str(folder / "run"), "adapter_init": str(folder / "adapter"),
        "base": {"compute": compute},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 2 * MAX_LENGTH, "shuffle": False, "eval_fraction": 0},
        "training": {"epochs": 1, "max_steps": args.steps, "batch_size": BATCH, "learning_rate": RATE, "lr_scheduler_type": "constant",
                     "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 0.0, "save_steps": 1_000_000},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    result = comparison.run_retune(args, "train", folder / "run.yaml", "--overwrite")
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    return {"losses": [step["loss"] for step in steps], "seconds": sum(step["seconds"] for step in steps),
            "tokens": sum(step["tokens"] for step in steps), "peak_rss_bytes": result["peak_rss_bytes"]}


def main():
    options = comparison.retune_parser(__doc__)
    options.add_argument("--compute", type=comparison.compute_list, default="auto")
    options.add_argument("--steps", type=int, default=125)
    options.add_argument("--pairs", type=int, default=1)
    options.add_argument("--json")
    options.add_argument("--torch-side", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--allocator", default="tcmalloc", help=argparse.SUPPRESS)
    next(action for action in options._actions if action.dest == "model").required = False
    args = options.parse_args()
    if args.torch_side:
        common.preload(args)
        return torch_side(args.torch_side, args.steps, args.threads or common.os.cpu_count())
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        make(folder)
        threads = [] if args.threads is None else ["--threads", args.threads]
        command = [sys.executable, __file__, "--torch-side", folder, "--steps", args.steps, *threads]
        sides = {"torch": lambda: json.loads(comparison.run(command).splitlines()[-1])}
        sides |= {f"retune-{c}": (lambda c=c: retune_side(args, folder, c)) for c in args.compute}
        done = []
        for pair in comparison.pairs(args, sides):
            done.append(pair)
            comparison.print_pair(len(done), pair, METRICS)
            for name in comparison.retune_sides(pair["order"]):
                difference = comparison.largest_difference(pair[name]["losses"][:20], pair["torch"]["losses"][:20])
                print(f"  {name}: tokens {pair[name]['tokens']} of {pair['torch']['tokens']}, losses {pair[name]['losses'][0]:.4f} to "
                      f"{pair[name]['losses'][-1]:.4f} ({pair['torch']['losses'][-1]:.4f}), difference of the first 20 {difference:.1e}")
    comparison.finish(args, done, METRICS)


if __name__ == "__main__":
    main()
