"""A real run: one epoch over the bundled Debian synopses by retune and by PyTorch + peft, and the held-out loss of each.

    python bench/epoch.py --model MODEL.gguf --torch-model DIR [--compute auto,f32] [--method lora | full] [--steps N]
                          [--only retune | torch]

A pair is one run of PyTorch and one of retune for each --compute, each pair starting with another of them. Same rows in file
order, same initial adapter, batches of 8 rows of at most 256 tokens, linear schedule with 5 warm-up steps, AdamW without
decay, clipping at 1, no evaluation in between. --steps shortens the run and its schedule. Prints the seconds of training
(without loading, evaluation or saving), the loss on all held-out rows, peak memory of the whole process (scoring included,
and in retune's writing its checkpoint), and side by side the losses of the first 20 steps. A pair that saw other tokens, or
whose first three losses differ, is void; exit code 1.
"""

import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import comparison

TRAIN, EVAL = (comparison.DATA / f"debian-synopsis.{part}.jsonl" for part in ("train", "eval"))
BATCH_SIZE, MAX_LENGTH, WARMUP_STEPS = 8, 256, 5
SIDE_BY_SIDE = 20
METRICS = [
    ("seconds", "seconds", 1, ".1f"),
    ("tokens/s", "tokens_per_second", 1, ".1f"),
    ("held-out loss", "held_out_loss", 1, ".5f"),
    ("peak memory MB", "peak_rss_bytes", 1e-6, ".0f"),
]


def run_file(args, folder, compute):
    """What retune is to do. JSON is YAML too."""
    adapter = {"adapter_init": str(folder / "adapter")} if args.method == "lora" else {}
    return adapter | {
        "model": args.model,
        "output_dir": str(folder / "run"),
        "method": args.method,
        "base": {"compute": compute, "storage": args.storage},
        "data": {"train": str(TRAIN), "eval": str(EVAL), "max_length": MAX_LENGTH, "shuffle": False},
        "training": {
            "epochs": 1,
            "max_steps": args.steps,
            "batch_size": BATCH_SIZE,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": WARMUP_STEPS,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "tokens_per_pass": args.tokens_per_pass,
            "save_steps": 1_000_000,
            "save_total_limit": 1,
        },
    }


def run_retune(args, folder, compute):
    path = folder / "run.yaml"
    path.write_text(json.dumps(run_file(args, folder, compute)))
    result = comparison.run_retune(args, "train", path, "--overwrite")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    total = lambda key: sum(step[key] for step in steps)
    return {
        "losses": [step["loss"] for step in steps],
        "gradient_norms": [step["gradient_norm"] for step in steps],
        "held_out_loss_before": result["held_out_loss_before"],
        "held_out_loss": result["held_out_loss_last"],
        "seconds": total("seconds"),
        "tokens_per_second": total("tokens") / total("seconds"),
        "tokens": total("tokens"),
        "label_tokens": total("label_tokens"),
        "peak_rss_bytes": result["peak_rss_bytes"],
    }


def run_torch(args, folder):
    command = ["--train", TRAIN, "--eval", EVAL, "--batch-size", BATCH_SIZE, "--max-length", MAX_LENGTH,
               "--warmup-steps", WARMUP_STEPS]
    command += ["--adapter", folder / "adapter"] if args.method == "lora" else []
    command += [] if args.steps is None else ["--max-steps", args.steps]
    result = comparison.run_torch(args, "pytorch_epoch.py", *command)
    return result | {
        "tokens_per_second": result["tokens"] / result["seconds"],
        "peak_rss_bytes": result["peak_rss_bytes_with_scoring"],
        "peak_rss_bytes_without_scoring": result["peak_rss_bytes"],
    }


def void(pair, dtype):
    for name in comparison.retune_sides(pair["order"]):
        for key in ("tokens", "label_tokens"):
            if pair[name][key] != pair["torch"][key]:
                return f"{name} saw {pair[name][key]} {key}, torch {pair['torch'][key]}"
    return comparison.disagreement(pair, dtype)


def print_losses(pair):
    losses = {name: pair[name]["losses"][:SIDE_BY_SIDE] for name in sorted(pair["order"])}
    print("  step       " + "".join(f"{name:>14}" for name in losses))
    for step, row in enumerate(zip(*losses.values()), 1):
        print(f"  {step:4}       " + "".join(f"{loss:14.6f}" for loss in row))
    if "torch" in losses:
        for name in comparison.retune_sides(losses):
            difference = comparison.largest_difference(losses[name], losses["torch"])
            print(f"  largest relative difference of {name} {difference:.2e}", flush=True)


def main():
    options = comparison.parser(__doc__, pairs=1)
    options.add_argument("--steps", type=int, help="default: the whole epoch")
    options.add_argument("--tokens-per-pass", type=int, help="of retune; default: its own")
    options.add_argument("--only", choices=["retune", "torch"], help="run one side alone")
    args = comparison.parse(options)
    if args.steps is not None and args.steps < 1:
        options.error("--steps must be at least 1")

    with TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.method == "lora":
            comparison.run([sys.executable, comparison.BENCH / "init_adapter.py", "--model", args.torch_model,
                            "--out", folder / "adapter"])
        sides = {f"retune-{compute}": partial(run_retune, args, folder, compute) for compute in args.compute}
        sides |= {"torch": partial(run_torch, args, folder)}
        sides = {name: side for name, side in sides.items() if args.only is None or name.startswith(args.only)}
        done = []
        for pair in comparison.pairs(args, sides):
            pair["void"] = None if args.only else void(pair, args.dtype)
            done.append(pair)
            comparison.print_pair(len(done), pair, METRICS)
            if len(done) == 1:
                print_losses(pair)
    comparison.finish(args, done, METRICS)


if __name__ == "__main__":
    main()
