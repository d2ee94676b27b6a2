"""What reduced arithmetic costs: the held-out loss after one epoch, computed in int8 (auto) and in f32, on real data.

    python bench/quality.py --model MODEL.gguf --data-dir DIR --json quality.jsonl [--compute auto | int8]
                            [--sets debian-synopsis,tweet-sentiment] [--seeds 1,2,3] [--limit ROWS]

For each data set and seed one `retune train` in f32 and one in --compute, alike in everything else: LoRA r 16 on all linears,
batches of 8, learning rate 2e-4, linear schedule with 5 warm-up steps; the seed chooses the initial adapter and the order of
the rows. Rows longer than the data set's limit are cut, in training and in scoring. Held-out rows are scored in f32 by both,
as other software would compute the adapter; the one trained in --compute is scored a second time in --compute. Each run is
appended to the --json file when it is done, and a run that is there already is not repeated: after an interruption, start the
same command again. Another build of retune needs another file. Prints a table of all runs and one of the means over the seeds.
The seconds are those of the training steps, with nothing done about a machine that slows down: compare.py and epoch.py measure
speed.
"""

import json
from itertools import islice, product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import comparison

# data set -> tokens of a row at most, training rows at most
SETS = {"debian-synopsis": (256, None), "tweet-sentiment": (256, None), "dolly-summaries": (512, 300)}


def is_there(folder, name):
    return all((folder / f"{name}.{part}.jsonl").is_file() for part in ("train", "eval"))


def first_rows(path, count, out):
    """Copies the first rows of a file, all of them if `count` is None."""
    with path.open(encoding="utf-8") as file:
        out.write_text("".join(islice(file, count)), encoding="utf-8")
    return str(out)


def data(args, name, folder):
    """The section `data` of a run file."""
    max_length, most = SETS[name]
    train, held_out = (args.data_dir / f"{name}.{part}.jsonl" for part in ("train", "eval"))
    limits = [limit for limit in (most, args.limit) if limit is not None]
    return {
        "train": first_rows(train, min(limits, default=None), folder / "train.jsonl"),
        "eval": first_rows(held_out, args.limit, folder / "eval.jsonl"),
        "max_length": max_length,
        "overlong": "truncate",
    }


def run_file(args, name, seed, compute, folder):
    """What retune is to do. JSON is YAML too."""
    return {
        "model": args.model,
        "output_dir": str(folder / "run"),
        "method": "lora",
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "base": {"compute": compute},
        "data": data(args, name, folder),
        "training": {
            "epochs": 1,
            "batch_size": 8,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "linear",
            "warmup_steps": 5,
            "seed": seed,
            "save_steps": 1_000_000,
            "save_total_limit": 1,
        },
    }


def measure(args, name, seed, compute, folder):
    """Trains once; how --compute itself scores what it trained is measured beside."""
    run = run_file(args, name, seed, compute, folder)
    path = folder / "run.yaml"
    path.write_text(json.dumps(run))
    result = comparison.run_retune(args, "train", path)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    scored_alike = result["held_out_loss_last"]
    if compute != "f32":
        score = comparison.run_retune(args, "eval", "--model", args.model, "--adapter", result["output"], "--compute", compute,
                                      "--data", run["data"]["eval"], "--max-length", run["data"]["max_length"])
        scored_alike = score["loss"]
    return {
        "held_out_loss_before": result["held_out_loss_before"],
        "held_out_loss": result["held_out_loss_last"],
        "held_out_loss_scored_alike": scored_alike,
        "seconds": sum(step["seconds"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "losses": [step["loss"] for step in steps],
        "peak_rss_bytes": result["peak_rss_bytes"],
    }


def key(line):
    """What makes two runs the same run."""
    return tuple(line[name] for name in ("model", "limit", "set", "seed", "compute"))


def read(path):
    """The runs done so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(line): line for line in map(json.loads, lines)}


def difference(loss, reference):
    return f"{100 * (loss / reference - 1):+.3f}%"


def print_tables(sets, seeds, compute, runs):
    """`runs` holds the results by (data set, seed, compute)."""
    print(f"\n| data set | seed | untouched | f32 | {compute} | difference | scored in {compute} | difference "
          f"| seconds, f32 | seconds, {compute} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, seed in product(sets, seeds):
        f32, other = runs[name, seed, "f32"], runs[name, seed, compute]
        loss, ours, alike = f32["held_out_loss"], other["held_out_loss"], other["held_out_loss_scored_alike"]
        print(f"| {name} | {seed} | {f32['held_out_loss_before']:.4f} | {loss:.5f} | {ours:.5f} | {difference(ours, loss)} "
              f"| {alike:.5f} | {difference(alike, loss)} | {f32['seconds']:.0f} | {other['seconds']:.0f} |")
    print(f"\n| data set, mean of {len(seeds)} seeds | f32 | {compute} | difference | scored in {compute} | difference "
          "| largest over smallest f32 |")
    print("|---|---|---|---|---|---|---|")
    for name in sets:
        of = lambda side, value: [runs[name, seed, side][value] for seed in seeds]
        losses = of("f32", "held_out_loss")
        loss, ours = mean(losses), mean(of(compute, "held_out_loss"))
        alike = mean(of(compute, "held_out_loss_scored_alike"))
        print(f"| {name} | {loss:.5f} | {ours:.5f} | {difference(ours, loss)} | {alike:.5f} | {difference(alike, loss)} "
              f"| {difference(max(losses), min(losses))} |")


def main():
    options = comparison.retune_parser(__doc__)
    options.add_argument("--compute", choices=["auto", "int8"], default="auto", help="what is held against f32")
    options.add_argument("--data-dir", type=Path, default=comparison.DATA,
                         help="holds NAME.train.jsonl and NAME.eval.jsonl; default: the bundled data, debian-synopsis alone")
    options.add_argument("--sets", help=f"some of {','.join(SETS)}; default: those that --data-dir holds")
    options.add_argument("--seeds", default="1,2,3")
    options.add_argument("--limit", type=int, help="first training rows and first held-out rows to use, to try the script out")
    options.add_argument("--json", type=Path, required=True, help="one line for each run; it is appended to and read again")
    args = options.parse_args()
    sets = [name for name in SETS if is_there(args.data_dir, name)] if args.sets is None else args.sets.split(",")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for name in sets:
        if name not in SETS or not is_there(args.data_dir, name):
            options.error(f"{name}: expected one of {', '.join(SETS)}, with both its files in {args.data_dir}")
    if not sets:
        options.error(f"{args.data_dir} holds no data set")
    if args.limit is not None and args.limit < 1:
        options.error("--limit must be at least 1")

    done, runs = read(args.json), {}
    for name, seed, compute in product(sets, seeds, ("f32", args.compute)):
        line = {"model": args.model, "limit": args.limit, "set": name, "seed": seed, "compute": compute}
        if key(line) not in done:
            with TemporaryDirectory() as folder:
                line |= measure(args, name, seed, compute, Path(folder))
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")
            done[key(line)] = line
        runs[name, seed, compute] = result = done[key(line)]
        loss, seconds = result["held_out_loss"], result["seconds"]
        print(f"{name}, seed {seed}, {compute}: held-out loss {loss:.5f}, {seconds:.0f} s", flush=True)
    print_tables(sets, seeds, args.compute, runs)


if __name__ == "__main__":
    main()
