"""Answers to held-out rows by generation: `retune eval --generate` against transformers' batched `generate`, in turn.

    python bench/generate.py --model MODEL.gguf --torch-model DIR --data F.jsonl [--rows 200] [--max-new-tokens 32] [--batches 8,16,32]

Greedy on both sides, the same prompts by the chat template. transformers pads on the left and is tried with each batch size, in f32 with
tcmalloc; its best counts. Prints seconds without loading, peak memory of the process, and how many answers are the same.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import pytorch_common as common

ROOT = Path(__file__).resolve().parent.parent


def theirs(args):
    """One batch size, in a process of its own."""
    common.preload(args)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.torch_model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.torch_model, dtype=torch.float32, attn_implementation="sdpa").eval()
    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:args.rows]
    users = [row["instruction"] + ("\n\n" + row["input"] if row["input"] else "") for row in rows]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True, return_dict=False)
               for user in users]
    answers, start = [], perf_counter()
    for i in range(0, len(prompts), args.batch):
        batch = prompts[i:i + args.batch]
        width = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, do_sample=False,
                                 pad_token_id=tokenizer.pad_token_id)
        answers += [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in out]
    print(json.dumps({"seconds": perf_counter() - start, "peak_rss_bytes": common.peak_rss_bytes(), "answers": answers}))


def ours(args):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.jsonl"
        command = [args.retune, "eval", "--model", args.model, "--data", args.data, "--limit", str(args.rows), "--generate",
                   "--max-new-tokens", str(args.max_new_tokens), "--predictions", str(out), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest child, and this is the first
        answers = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
        return {"seconds": json.loads(done.stdout)["generated"]["seconds"], "peak_rss_bytes": peak, "answers": answers}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--retune", default=str(ROOT / "target/release/retune"))
    options.add_argument("--model", required=True)
    options.add_argument("--torch-model", required=True)
    options.add_argument("--data", required=True)
    options.add_argument("--rows", type=int, default=200)
    options.add_argument("--max-new-tokens", type=int, default=32)
    options.add_argument("--batches", default="8,16,32")
    options.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--allocator", default="tcmalloc")
    args = options.parse_args()
    if args.batch:
        return theirs(args)
    mine = ours(args)
    print(f"retune: {mine['seconds']:.1f} s, {mine['peak_rss_bytes'] / 1e6:.0f} MB", flush=True)
    for batch in args.batches.split(","):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--batch", batch], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        same = sum(a == b for a, b in zip(mine["answers"], found["answers"]))
        print(f"transformers, batches of {batch}: {found['seconds']:.1f} s, {found['peak_rss_bytes'] / 1e6:.0f} MB; "
              f"{same} of {len(found['answers'])} answers the same; {found['seconds'] / mine['seconds']:.2f} times the time, "
              f"{mine['peak_rss_bytes'] / found['peak_rss_bytes']:.3f} of the memory here", flush=True)


if __name__ == "__main__":
    main()
