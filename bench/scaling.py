"""How speed and memory of training steps change with sequence length, batch, rank and threads: `retune bench train` alone.

    python bench/scaling.py --model MODEL.gguf [--only seq,batch] [--compute auto,f32] [--steps 6] [--json FILE]

Everything is varied alone, from 4 sequences of 512 tokens, rank 16 on all linears, all threads; sequence lengths at 2,048
tokens a step (4,096: one sequence). Prints a Markdown table for each: tokens a second (median step after three warm-ups), peak
resident memory, and the part of a step's time that the products with the base's weights (linear), with the adapter (low rank),
attention, the head and the rest take. A row whose machine changed its speed while it was measured is marked with a star.
"""

import json
from argparse import Namespace
from pathlib import Path

import comparison

START = {"seq": 512, "batch": 4, "rank": 16, "threads": None}
SWEEPS = {
    "seq": [{"seq": seq, "batch": max(1, 2048 // seq)} for seq in (128, 256, 512, 1024, 2048, 4096)],
    "batch": [{"batch": batch} for batch in (1, 2, 4, 8)],
    "rank": [{"rank": rank} for rank in (1, 4, 16, 64, 256)],
    "threads": [{"threads": threads} for threads in (1, 2)],
}
# column -> the operations that it sums
SHARES = {"linear": ["linear"], "low rank": ["low_rank"], "attention": ["attention", "attention_backward"], "head": ["head"]}


def measure(args, point, compute):
    before = comparison.machine_gflops()
    result = comparison.run_retune(
        Namespace(retune=args.retune, threads=point["threads"]), "bench", "train", "--model", args.model, "--seq", point["seq"],
        "--batch", point["batch"], "--rank", point["rank"], "--steps", args.steps, "--compute", compute,
        "--data", comparison.DATA / "debian-synopsis.train.jsonl")
    gflops = [before, comparison.machine_gflops()]
    return point | {"compute": compute, "gflops": gflops, "slowed": comparison.slowed(gflops)} | {"result": result}


def print_row(columns, row):
    result = row["result"]
    shares = [sum(result["operations"][name]["share"] for name in names) for names in SHARES.values()]
    cells = [str(row[name]) for name in columns] + [row["compute"], f"{result['tokens_per_second']:.1f}{' *' * row['slowed']}"]
    cells += [f"{result['peak_rss_bytes'] / 1e6:,.0f}"] + [f"{share:.1%}" for share in [*shares, 1 - sum(shares)]]
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    options = comparison.retune_parser(__doc__)
    options.add_argument("--compute", type=comparison.compute_list, default="auto,f32",
                         help="auto, int8, f32, or several of them separated by commas")
    options.add_argument("--steps", type=int, default=6, help="of which the first three are not counted")
    options.add_argument("--only", default=",".join(SWEEPS), help="what to vary; default: everything, %(default)s")
    options.add_argument("--json", help="write everything measured to this file too")
    args = options.parse_args()
    names = args.only.split(",")
    if not set(names) <= set(SWEEPS):
        options.error(f"--only {args.only}: expected some of {', '.join(SWEEPS)}")

    rows = []
    for name in names:
        columns = list(SWEEPS[name][0])
        header = [*columns, "compute", "tokens/s", "peak MB", *SHARES, "rest"]
        print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
        for change in SWEEPS[name]:
            for compute in args.compute:
                point = START | {"threads": args.threads} | change
                # The point that everything starts from belongs to several tables and is measured once.
                known = [row for row in rows if row | point | {"compute": compute} == row]
                row = known[0] if known else measure(args, point, compute)
                rows += [] if known else [row]
                print_row(columns, row)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
