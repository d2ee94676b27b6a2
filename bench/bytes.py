"""Trains 20 steps of the example in every way this machine computes and prints a hash of each adapter.

    python bench/bytes.py --retune target/release/retune --model MODEL.gguf --json before.json
    python bench/bytes.py --retune target/release/retune --model MODEL.gguf --against before.json

A change that is meant to leave results alone must leave every hash alone: compare two builds on one machine. The ways are
f32 and int8, each instruction set of the machine, and each way of keeping activations (f32, bf16, the inputs of layers),
and full fine-tuning for a few steps. `--steps` makes it shorter.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEEPING = {
    "f32": ["training.saved_activations=f32"],
    "bf16": ["training.saved_activations=bf16"],
    "inputs": ["training.activation_checkpointing=layer"],
}


def instruction_sets():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = ["portable"]
    found += ["avx2"] if "avx2" in flags else []
    found += ["avx512"] if "avx512dq" in flags else []
    found += ["neon"] if "asimd" in flags else []
    return found


def ways(steps):
    # The fastest first.
    for isa in reversed(instruction_sets()):
        for compute in ["f32", "int8"]:
            for keeping, overrides in KEEPING.items():
                yield f"{isa} {compute} {keeping}", isa, [f"base.compute={compute}", f"training.max_steps={steps}", *overrides]
    best = instruction_sets()[-1]
    yield f"{best} f32 dropout", best, ["base.compute=f32", "adapter.lora_dropout=0.1", f"training.max_steps={steps}"]
    yield f"{best} full", best, ["method=full", "adapter=null", "training.max_steps=3", "training.learning_rate=1e-5"]


def hash_of(retune, model, isa, overrides, folder):
    command = [retune, "train", "examples/debian-synopsis.yaml", "--json", "--set", f"model={model}",
               "--set", f"output_dir={folder}", "--set", "data.eval_limit=8", "--set", "training.eval_steps=1000"]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"RETUNE_ISA": isa}, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    files = sorted(Path(folder).glob("*/*.safetensors"))
    files = [file for file in files if file.parent.name in ("adapter", "model")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest(), json.loads(done.stdout)["held_out_loss_after"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retune", default="target/release/retune")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="only the ways whose name contains this")
    parser.add_argument("--json", type=Path, help="write the hashes to this file")
    parser.add_argument("--against", type=Path, help="compare with the hashes of this file")
    args = parser.parse_args()
    retune, model = str(Path(args.retune).resolve()), str(Path(args.model).resolve())
    before = json.loads(args.against.read_text()) if args.against else {}
    hashes, changed = {}, []
    for name, isa, overrides in ways(args.steps):
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            hashes[name], loss = hash_of(retune, model, isa, overrides, folder)
        same = "" if name not in before else "same" if before[name] == hashes[name] else "CHANGED"
        changed += [name] if same == "CHANGED" else []
        if args.json:
            args.json.write_text(json.dumps(hashes, indent=2) + "\n")
        print(f"{name:24} {hashes[name][:16]}  held-out {loss:.5f}  {same}", flush=True)
    if changed:
        sys.exit(f"{len(changed)} of {len(hashes)} changed: {', '.join(changed)}")


if __name__ == "__main__":
    main()
