"""Compares what llama.cpp and retune answer with the same GGUF file, and with a LoRA file on it.

    python goldens/compare_llama_cpp.py --retune PROGRAM --gguf FILE [--lora FILE --adapter DIR] [--prompts N]   (llama-cpp-python 0.3.36)

Prints for how many prompts the tokens of a greedy answer are the same, and for each other one what llama.cpp's two likeliest tokens were apart
where the answers part. Without --lora both read the file as it is; with it retune reads --adapter beside --gguf.
"""

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
from llama_cpp import Llama

ROWS = Path(__file__).resolve().parent.parent / "examples" / "data" / "debian-synopsis.train.jsonl"
NEW_TOKENS = 16


def prompts(count):
    texts = []
    for line in ROWS.read_text().splitlines():
        text = next(value for value in json.loads(line).values() if isinstance(value, str) and len(value) > 60)
        texts.append(" ".join(text.split()[:14 + len(texts) % 9]))
        if len(texts) == count:
            return texts
    raise SystemExit(f"{ROWS} has fewer than {count} rows")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--retune", required=True)
    options.add_argument("--gguf", required=True)
    options.add_argument("--lora")
    options.add_argument("--adapter")
    options.add_argument("--prompts", type=int, default=50)
    args = options.parse_args()
    llama = Llama(args.gguf, n_ctx=256, n_threads=1, logits_all=True, verbose=False, lora_path=args.lora, type_k=0, type_v=0)
    same = 0
    for prompt in prompts(args.prompts):
        command = [args.retune, "generate", "--model", args.gguf, "--raw", "--json", "--max-new-tokens", str(NEW_TOKENS), prompt]
        command += ["--adapter", args.adapter] if args.adapter else []
        ours = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["ids"]
        ids = llama.tokenize(prompt.encode(), add_bos=llama.metadata.get("tokenizer.ggml.add_bos_token") == "true", special=True)
        llama.reset()
        llama.eval(ids)
        answer, margins = [], []
        for _ in range(NEW_TOKENS):
            logits = llama.scores[llama.n_tokens - 1]
            second, first = np.partition(logits, -2)[-2:]
            token = int(np.argmax(logits))
            margins.append(float(first - second))
            answer.append(token)
            if token == llama.token_eos():
                break
            llama.eval([token])
        if ours == answer:
            same += 1
            continue
        parts = next((i for i, (a, b) in enumerate(zip(ours, answer)) if a != b), min(len(ours), len(answer)) - 1)
        print(f"{prompt[:40]!r}: they part at token {parts} of the answer, where llama.cpp's margin is {margins[parts]:.4f}", flush=True)
    print(f"{Path(args.gguf).name}: {same} of {args.prompts} answers of {NEW_TOKENS} tokens are the same")


if __name__ == "__main__":
    main()
