"""Speed and memory of training steps: `retune bench train` and PyTorch + peft in turn, on the same tokens and initial adapter.

    python bench/compare.py --model MODEL.gguf --torch-model DIR [--compute auto,f32] [--method METHOD]
                            [--settings JSON] [--storage nf4] [--batch 4] [--seq 512] [--steps 15]

A pair is one run of PyTorch and one of retune for each --compute, each pair starting with another of them. Prints for each
pair and as a median: tokens a second (median step after three warm-ups), peak resident memory, and retune's values over
PyTorch's. A pair whose first three losses differ is void: they did not compute the same. A pair during which the machine's
speed changed is flagged. Exit code 1 if a pair is void.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import comparison

METRICS = [("tokens/s", "tokens_per_second", 1, ".1f"), ("peak memory MB", "peak_rss_bytes", 1e-6, ".0f")]


def main():
    options = comparison.parser(__doc__, pairs=5)
    options.add_argument("--batch", type=int, default=4, help="sequences of a step")
    options.add_argument("--seq", type=int, default=512, help="tokens of a sequence")
    options.add_argument("--steps", type=int, default=15, help="of which the first three are not counted")
    options.add_argument("--settings", help="the method's, as JSON (default for lora: r 16 on all linears)")
    args = comparison.parse(options)

    with TemporaryDirectory() as inputs:
        retune = ["bench", "train", "--model", args.model, "--method", args.method, "--learning-rate", args.learning_rate,
                  "--batch", args.batch, "--seq", args.seq, "--steps", args.steps,
                  "--data", comparison.DATA / "debian-synopsis.train.jsonl"]
        if args.storage != "as-is":
            retune += ["--storage", args.storage]
        if args.settings is not None:
            retune += ["--settings", args.settings]

        def run_retune(compute):  # The inputs are the same in every run; the very first, which is retune's, writes them.
            save = [] if any(Path(inputs).iterdir()) else ["--save-inputs", inputs]
            return comparison.run_retune(args, *retune, "--compute", compute, *save)

        def run_torch():
            return comparison.run_torch(args, "pytorch_train.py", "--inputs", inputs, "--steps", args.steps)

        sides = {f"retune-{compute}": partial(run_retune, compute) for compute in args.compute} | {"torch": run_torch}
        done = []
        for pair in comparison.pairs(args, sides):
            pair["void"] = comparison.disagreement(pair, args.dtype)
            done.append(pair)
            comparison.print_pair(len(done), pair, METRICS)
    comparison.finish(args, done, METRICS)


if __name__ == "__main__":
    main()
