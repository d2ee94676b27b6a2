"""Two builds of retune in turn: tokens a second and peak memory of training steps, the second over the first.

    python bench/builds.py --before OLD/retune --after target/release/retune --model MODEL.gguf [--rounds 2]
                           [--cases 1x512,4x512,1x2048,4x2048] [--compute auto,f32] [--steps 6]

A round runs both builds on each case, each round beginning with another of them. Prints for each case the median of each
build over the rounds and the ratio of the medians, and whether losses are the same to the last digit. A change of structure
should keep tokens a second above 0.97 and memory below 1.03.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(program, model, batch, seq, compute, steps):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as data:
        # As plain text, which every build takes for the same tokens.
        rows = map(json.loads, (ROOT / "examples/data/debian-synopsis.train.jsonl").read_text().splitlines())
        data.writelines(json.dumps({"text": f"{row['input']}\n{row['output']}\n"}) + "\n" for row in rows)
        data.flush()
        command = [program, "bench", "train", "--json", "--model", model, "--batch", batch, "--seq", seq, "--compute",
                   compute, "--steps", steps, "--data", data.name]
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", default="target/release/retune")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", default="1x512,4x512,1x2048,4x2048", help="batch x sequence")
    parser.add_argument("--compute", default="auto,f32")
    parser.add_argument("--steps", type=int, default=6, help="of which the first three are not counted")
    args = parser.parse_args()
    builds = [str(Path(args.before).resolve()), str(Path(args.after).resolve())]
    model = str(Path(args.model).resolve())
    cases = [tuple(map(int, case.split("x"))) for case in args.cases.split(",")]
    print(f"{'batch':>5} {'seq':>5} {'compute':>7} {'before':>9} {'after':>9} {'ratio':>6} {'MB':>6} {'MB':>6} {'ratio':>6}  losses")
    for batch, seq in cases:
        for compute in args.compute.split(","):
            results = ([], [])
            for round_ in range(args.rounds):
                for side in [0, 1] if round_ % 2 == 0 else [1, 0]:
                    results[side].append(run(builds[side], model, batch, seq, compute, args.steps))
            speed = [statistics.median(r["tokens_per_second"] for r in side) for side in results]
            memory = [statistics.median(r["peak_rss_bytes"] for r in side) / 1e6 for side in results]
            same = "same" if results[0][0]["losses"] == results[1][0]["losses"] else "DIFFER"
            print(f"{batch:5} {seq:5} {compute:>7} {speed[0]:9.1f} {speed[1]:9.1f} {speed[1] / speed[0]:6.3f} "
                  f"{memory[0]:6.0f} {memory[1]:6.0f} {memory[1] / memory[0]:6.3f}  {same}", flush=True)


if __name__ == "__main__":
    main()
