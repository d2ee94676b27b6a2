"""What each method of fine-tuning learns and costs on one data set: `retune train`, then the accuracy on held-out rows by `retune eval`.

    python bench/methods.py --model MODEL.gguf --data-dir DATA [--set tweet-sentiment] [--epochs 3] [--only lora,full] [--seeds 1]
                            [--json results.jsonl]

DATA holds SET.train.jsonl and SET.eval.jsonl, rows whose answer is one of a few labels. The accuracy is that of the likeliest label. Each
method has its own default rate. Every finished run is a line of the --json file and is not repeated when the command is started again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # name: (method, settings, learning rate or None for the default)
    "lora": ("lora", {"r": 16, "lora_alpha": 32}, None),
    "dora": ("lora", {"r": 16, "lora_alpha": 32, "use_dora": True}, None),
    "miss": ("miss", {"r": 16}, None),
    "ia3": ("ia3", {}, None),
    "norms": ("partial", {"norms": True}, None),
    "last 4 layers": ("partial", {"last_layers": 4}, None),
    "prompt tuning": ("prompt_tuning", {"num_virtual_tokens": 16}, None),
    "p-tuning": ("p_tuning", {"num_virtual_tokens": 16}, None),
    "prefix tuning": ("prefix_tuning", {"num_virtual_tokens": 16}, None),
    "full": ("full", None, None),
}


def run(args, *command):
    done = subprocess.run([args.retune, *map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout)


def evaluate(args, *what):
    result = run(args, "eval", "--data", args.eval, "--json", "--labels", args.labels, *what)
    return result


def train(args, name, seed):
    method, settings, rate = METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = {"model": str(args.model), "output_dir": f"{folder}/run", "method": method, "adapter": settings,
                  "data": {"train": str(args.train), "max_length": 256},
                  "training": {"epochs": args.epochs, "batch_size": 8, "seed": seed, "eval_steps": 10**6, "save_steps": 10**6}
                  | ({"learning_rate": rate} if rate else {})}
        if method == "full":
            del config["adapter"]
        path = Path(folder) / "run.yaml"
        path.write_text(json.dumps(config))
        report = run(args, "train", path, "--json")
        saved = Path(report["output"])
        size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
        what = ["--model", saved] if method == "full" else ["--model", args.model, "--adapter", saved]
        return report, evaluate(args, *what), size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retune", default=str(ROOT / "target/release/retune"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--set", default="tweet-sentiment")
    parser.add_argument("--labels", default="positive,negative,neutral")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", default="1", help="separated by commas")
    parser.add_argument("--only", default=",".join(["base", "hard prompt", *METHODS]))
    parser.add_argument("--json", type=Path, default=Path("methods.jsonl"))
    args = parser.parse_args()
    args.train, args.eval = args.data_dir / f"{args.set}.train.jsonl", args.data_dir / f"{args.set}.eval.jsonl"
    done = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() else []
    print("| method | seed | accuracy | macro-F1 | held-out loss | trainable | bytes | peak MB | seconds |\n|---|---|---|---|---|---|---|---|---|")
    for name in args.only.split(","):
        for seed in map(int, args.seeds.split(",")):
            found = next((row for row in done if (row["name"], row["seed"]) == (name, seed)), None)
            if found is None:
                if name in ("base", "hard prompt"):
                    examples = ["--examples", 4, "--examples-from", args.train, "--seed", seed] if name != "base" else []
                    report, scored, size = {}, evaluate(args, "--model", args.model, *examples), 0
                else:
                    report, scored, size = train(args, name, seed)
                found = {"name": name, "seed": seed, "report": report, "eval": scored, "bytes": size}
                with args.json.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            report, scored = found["report"], found["eval"]
            label = scored["by_likelihood"]
            print(f"| {name} | {seed} | {label['accuracy']:.3f} | {label['macro_f1']:.3f} | {scored['loss']:.4f} | "
                  f"{report.get('trainable_parameters', 0):,} | {found['bytes']:,} | {report.get('peak_rss_bytes', 0) / 1e6:.0f} | "
                  f"{report.get('seconds', 0):.0f} |", flush=True)


if __name__ == "__main__":
    main()
