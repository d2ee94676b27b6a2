"""Makes LoRA files with llama.cpp's own converter, of adapters that other goldens hold.

    python goldens/make_gguf_lora.py [--llama-cpp DIR]   (torch, transformers, safetensors, gguf)

crates/retune-model/tests/goldens/<case>/adapter.gguf, f32. The converter says nothing of scales by module and swaps A and B of weights that
are stored as [in, out], so the cases have neither.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from common import GOLDENS
from make_families_gguf import llama_cpp

CASES = ["lora_all_linear", "bloom_lora_two", "qwen3_lora_two"]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--llama-cpp", type=Path)
    args = options.parse_args()
    with TemporaryDirectory() as folder:
        source = args.llama_cpp or llama_cpp(folder)
        for case in CASES:
            base = GOLDENS / (GOLDENS / case / "base.txt").read_text().strip()
            out = GOLDENS / case / "adapter.gguf"
            command = [sys.executable, source / "convert_lora_to_gguf.py", GOLDENS / case / "adapter", "--base", base, "--outfile", out,
                       "--outtype", "f32"]
            subprocess.run(command, check=True)
            print(f"{case}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
