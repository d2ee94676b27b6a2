"""Whether runs that are killed and resumed end as one that is left alone: `retune train` under SIGKILL at random times.

    python bench/kills.py --model MODEL.gguf [--kills 20] [--seed 1] [--steps 12] [--compute auto] [--same-bytes]

A run over the bundled Debian synopses, batches of 4, saved after every step, nothing held out. It is left alone once and timed.
Then it is started over and over with --resume, each time killed after a part of that time, drawn evenly: while the model is
loaded, while it is measured for int8, while it trains, while a file is written. What ends before its time is compared with the
run that was left alone, and another run begins, until all kills are done; the last run is resumed to its end as well. With
--same-bytes a run on one thread and one on two are compared too. Prints a line for each kill and what it fell into, a line for
each run, and a verdict. Exit code 1 if a file of an adapter differs, a step is not in the metrics exactly once, something is
left over, or a run cannot be resumed.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

BENCH = Path(__file__).resolve().parent
TRAIN = BENCH.parent / "examples" / "data" / "debian-synopsis.train.jsonl"
MESSAGES = "messages.txt"


def run_file(args):
    """What retune is to do. JSON is YAML too."""
    return {
        "model": args.model,
        "output_dir": "out",
        "adapter": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "base": {"compute": args.compute},
        "data": {"train": str(TRAIN), "eval_fraction": 0.0, "max_length": 256, "overlong": "truncate"},
        "training": {"max_steps": args.steps, "batch_size": 4, "learning_rate": 2e-4, "save_steps": 1, "save_total_limit": 2},
    }


def begin(args, folder):
    """A folder for a run. Every run has the same file, with the same name for its output, and so the same record of itself."""
    folder.mkdir()
    (folder / "run.yaml").write_text(json.dumps(run_file(args)))
    return folder


def train(args, folder, seconds=None, threads=None):
    """Starts a run or goes on with it; whether it came to its end within the time it was given."""
    threads = threads or args.threads
    command = [args.retune, *(["--threads", str(threads)] if threads else []), "train", "run.yaml", "--resume"]
    with (folder / MESSAGES).open("w") as messages:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=messages)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"exit code {code} of: {' '.join(command)}\n{(folder / MESSAGES).read_text()}")
    return code == 0


def temporary_files(folder):
    """Files that do not have their final name yet."""
    return sorted(path.name for path in (folder / "out").rglob(".*"))


def place(args, folder):
    """What a kill fell into."""
    messages = (folder / MESSAGES).read_text()
    if "compute " not in messages:
        doing = "choosing the arithmetic" if "memory " in messages else "loading"
    else:
        doing = "ending" if f"step {args.steps}/{args.steps} " in messages else "training"
    saved = sorted((folder / "out" / "checkpoints").glob("step-*.safetensors"))
    step = int(saved[-1].stem.removeprefix("step-")) if saved else 0
    writing = "".join(f", {name} unfinished" for name in temporary_files(folder))
    return f"{doing}, {step} steps saved{writing}"


def adapter(folder):
    """The bytes of an adapter's files by name."""
    return {path.name: path.read_bytes() for path in sorted((folder / "out" / "adapter").iterdir())}


def faults(args, folder, expected):
    """What is not as it is in the run that was left alone."""
    found = adapter(folder)
    faults = [f"{name} differs" for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    if steps != list(range(1, args.steps + 1)):
        faults.append(f"the metrics have the steps {steps}")
    return faults + [f"{name} is left over" for name in temporary_files(folder)]


def judge(what, faults):
    """Prints how a run ended; whether it ended well."""
    print(f"{what}: {'; '.join(faults) if faults else 'the same bytes'}", flush=True)
    return not faults


def existing_path(name):
    """A path as the program sees it from another folder; anything else, such as the id of a model, as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, type=existing_path, help="a GGUF file or a Hugging Face directory")
    options.add_argument("--threads", type=int, help="default: all cores")
    options.add_argument("--retune", type=existing_path, default=str(BENCH.parent / "target" / "release" / "retune"),
                         help="the program")
    options.add_argument("--compute", choices=["auto", "int8", "f32"], default="auto")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=1, help="of the times at which runs are killed")
    options.add_argument("--same-bytes", action="store_true", help="compare a run on one thread and one on two as well")
    args = options.parse_args()
    if args.steps < 1 or args.kills < 0:
        options.error("--steps must be at least 1, --kills at least 0")

    times = random.Random(args.seed)
    good, kills, runs = True, 0, 0
    with TemporaryDirectory() as root:
        root = Path(root)
        alone = begin(args, root / "alone")
        start = perf_counter()
        train(args, alone)
        took = perf_counter() - start
        expected = adapter(alone)
        print(f"left alone: {took:.1f} s, an adapter of {sum(map(len, expected.values())) / 1e6:.1f} MB", flush=True)
        good &= judge("left alone", faults(args, alone, expected))
        for threads in (1, 2) if args.same_bytes else ():
            folder = begin(args, root / f"threads-{threads}")
            train(args, folder, threads=threads)
            good &= judge(f"threads {threads}", faults(args, folder, expected))
        while kills < args.kills:
            runs += 1
            folder = begin(args, root / f"run-{runs}")
            before, ended = kills, False
            while not ended:
                seconds = times.uniform(0, took) if kills < args.kills else None
                ended = train(args, folder, seconds)
                if not ended:
                    kills += 1
                    print(f"kill {kills:3} after {seconds:6.2f} s: {place(args, folder)}", flush=True)
            good &= judge(f"run {runs}, kills: {kills - before}", faults(args, folder, expected))
            shutil.rmtree(folder)
    print(f"{kills} kills in {runs} runs: {'every run ended with the same bytes' if good else 'NOT THE SAME'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
