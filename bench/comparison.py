"""Shared by the benchmarks: programs run in turn, the machine checked before and after each, the pairs printed.

A pair is one run of PyTorch and one of retune for every --compute; its sides are named "torch", "retune-auto", "retune-f32".
This is the side that starts the programs; what runs inside the measured PyTorch process is in pytorch_common.py.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy

BENCH = Path(__file__).resolve().parent
DATA = BENCH.parent / "examples" / "data"
SLOWER = 1.15  # fastest over slowest check of a pair's machine beyond which the pair is flagged
LOSS_TOLERANCE = {"f32": 1e-3, "int8": 1e-2, "auto": 1e-2}  # of retune's sides, relative to PyTorch in float32
BFLOAT16_TOLERANCE = 2e-2  # of every side, where PyTorch computes in bfloat16


def compute_list(text):
    """--compute: "auto,f32" as a list."""
    names = text.split(",")
    if len(set(names)) < len(names) or not set(names) <= set(LOSS_TOLERANCE):
        raise argparse.ArgumentTypeError(f"{text!r}; expected some of {', '.join(LOSS_TOLERANCE)}, each once")
    return names


def retune_parser(doc):
    """The arguments that everything that runs retune takes."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="retune's: a GGUF file or a Hugging Face directory")
    options.add_argument("--threads", type=int, help="default: all cores")
    options.add_argument("--retune", default=str(BENCH.parent / "target" / "release" / "retune"), help="the program")
    return options


def parser(doc, pairs):
    """The arguments that both comparisons take."""
    options = retune_parser(doc)
    options.add_argument("--compute", type=compute_list, default="auto",
                         help="retune's: auto, int8, f32, or several of them separated by commas")
    options.add_argument("--torch-model", required=True, help="PyTorch's: a Hugging Face directory of the same weights")
    options.add_argument("--method", default="lora", help="lora, full, or another one of retune's that peft has")
    options.add_argument("--learning-rate", type=float, help="default: 2e-5 for full, 2e-4 for the others")
    options.add_argument("--storage", default="as-is", help="of the base's linears: as-is, nf4, nf4-double, fp4 or int8; PyTorch's by bitsandbytes")
    options.add_argument("--pairs", type=int, default=pairs)
    options.add_argument("--compile", action="store_true", help="PyTorch's: torch.compile")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="PyTorch's")
    options.add_argument("--allocator", choices=["tcmalloc", "default"], default="tcmalloc", help="PyTorch's")
    options.add_argument("--json", help="write everything measured to this file too")
    return options


def parse(options):
    args = options.parse_args()
    if args.pairs < 1:
        options.error("--pairs must be at least 1")
    if args.learning_rate is None:
        args.learning_rate = 2e-5 if args.method == "full" else 2e-4
    return args


def run(command):
    """Standard output of a program that must succeed; what it says on standard error is passed on."""
    quiet = os.environ | {"PYTHONWARNINGS": "ignore::FutureWarning"}
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, env=quiet)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode} of: {' '.join(map(str, command))}")
    return done.stdout


def run_retune(args, *command):
    """What `retune` prints with --json."""
    threads = [] if args.threads is None else ["--threads", args.threads]
    return json.loads(run([args.retune, *threads, *command, "--json"]))


def run_torch(args, script, *command):
    """What a PyTorch counterpart prints, on its last line."""
    command = [*command, "--model", args.torch_model, "--method", args.method, "--learning-rate", args.learning_rate]
    command += ["--dtype", args.dtype, "--allocator", args.allocator, "--storage", args.storage]
    command += [] if args.threads is None else ["--threads", args.threads]
    command += ["--compile"] if args.compile else []
    return json.loads(run([sys.executable, BENCH / script, *command]).splitlines()[-1])


def machine_gflops(seconds=1.0, size=1024):
    """Speed of one fixed matrix product, repeated for a while on all cores: it falls when the machine slows down."""
    a = numpy.random.default_rng(0).standard_normal((size, size), numpy.float32)
    out = a @ a
    start, products = perf_counter(), 0
    while (elapsed := perf_counter() - start) < seconds:
        numpy.matmul(a, a, out=out)
        products += 1
    return products * 2 * size**3 / elapsed / 1e9


def pairs(args, sides):
    """Runs the sides ({name: function}) in turn, --pairs times, each pair starting with another one.

    Yields {"order", "gflops": before, between and after, "slowed", and each side's result under its name}."""
    speed = machine_gflops()
    for number in range(args.pairs):
        first = number % len(sides)
        order = list(sides)[first:] + list(sides)[:first]
        pair = {"order": order, "gflops": [speed]}
        for name in order:
            pair[name] = sides[name]()
            speed = machine_gflops()
            pair["gflops"].append(speed)
        pair["slowed"] = slowed(pair["gflops"])
        yield pair


def slowed(gflops):
    """Whether the machine's speed changed between checks."""
    return max(gflops) > SLOWER * min(gflops)


def retune_sides(names):
    """Those of the sides that are retune's, in the order they are printed in."""
    return sorted(name for name in names if name.startswith("retune-"))


def largest_difference(ours, theirs):
    """Largest relative difference of two lists of losses; infinite if one of them is not a number."""
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs)]
    return max(d if d == d else float("inf") for d in differences)


def disagreement(pair, dtype):
    """Why the sides did not do the same work, judged by their first three losses; None if they did."""
    theirs = pair["torch"]["losses"][:3]
    for name in retune_sides(pair["order"]):
        ours = pair[name]["losses"][:3]
        tolerance = BFLOAT16_TOLERANCE if dtype == "bfloat16" else LOSS_TOLERANCE[name.removeprefix("retune-")]
        difference = largest_difference(ours, theirs)
        if difference > tolerance:
            return f"the first losses differ by {difference:.1e} relative: {name} {ours}, torch {theirs}"
    return None


def print_metric(label, values, pattern):
    """One line: the value of each side, and retune's over PyTorch's. `values` holds one {side: value} a pair."""
    cells = [f"  {label:15}"]
    cells += [f"{name} {median(v[name] for v in values):{pattern}}" for name in values[0]]
    if "torch" in values[0]:
        for name in retune_sides(values[0]):
            cells.append(f"{name}/torch {median(v[name] / v['torch'] for v in values):.3f}")
    print("   ".join(cells), flush=True)


def print_pair(number, pair, metrics):
    """`metrics` lists (label, key of the results, factor, number format)."""
    sides = sorted(pair["order"])
    gflops = ", ".join(f"{speed:.1f}" for speed in pair["gflops"])
    print(f"pair {number}: {' then '.join(pair['order'])}; machine {gflops} GFLOP/s")
    for label, key, factor, pattern in metrics:
        print_metric(label, [{name: factor * pair[name][key] for name in sides}], pattern)
    if pair["slowed"]:
        print(f"  FLAGGED: the machine's speed changed by more than {SLOWER - 1:.0%}")
    if pair.get("void"):
        print(f"  VOID: {pair['void']}", flush=True)


def finish(args, done, metrics):
    """Prints the medians over the pairs that are not void, writes --json, and exits with 1 if a pair was void."""
    valid = [pair for pair in done if not pair.get("void")]
    if valid:
        flagged = sum(pair["slowed"] for pair in valid)
        print(f"median of {len(valid)} pairs ({len(done) - len(valid)} more void, {flagged} of them flagged)")
        for label, key, factor, pattern in metrics:
            sides = sorted(valid[0]["order"])
            print_metric(label, [{name: factor * pair[name][key] for name in sides} for pair in valid], pattern)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "pairs": done}) + "\n")
    sys.exit(len(valid) < len(done))
