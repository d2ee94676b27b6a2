"""Merges an adapter into a model that is larger than the memory there is: in a control group with a limit, where the kernel kills what takes more.

    python bench/merge_memory.py --retune target/release/retune --model DIR --adapter DIR --out DIR --limit-mb 512
    python bench/merge_memory.py --retune target/release/retune --model DIR --adapter DIR --out FILE.gguf --type q4_k --limit-mb 512

Needs root and a memory controller (version 1 or 2). Pages of mapped files count in the group as well: they are given back when it is
full, and what is left is the program's own (RssAnon), of which the most is printed. Models: bench/make_model.py.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def group(limit):
    """A new control group with a limit."""
    version_1 = (GROUPS / "memory" / "memory.limit_in_bytes").exists()
    made = (GROUPS / "memory" if version_1 else GROUPS) / f"merge-memory-{os.getpid()}"
    made.mkdir()
    (made / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit))
    return made


def size(path):
    files = [path] if path.is_file() else path.glob("*")
    return sum(file.stat().st_size for file in files)


def own_memory(pid):
    """Bytes that are of no file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return max((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), default=0)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--retune", required=True)
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--adapter", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--type")
parser.add_argument("--limit-mb", type=int, default=512)
args = parser.parse_args()

limit = args.limit_mb * 10**6
made = group(limit)
command = [args.retune, "merge", "--model", args.model, "--adapter", args.adapter, "--out", args.out]
command += ["--type", args.type] if args.type else []
start = time.time()
process = subprocess.Popen(command, preexec_fn=lambda: (made / "cgroup.procs").write_text(str(os.getpid())))
most = 0
while process.poll() is None:
    try:
        most = max(most, own_memory(process.pid))
    except OSError:
        pass
    time.sleep(0.01)
made.rmdir()
if process.returncode != 0:
    sys.exit(f"killed or refused ({process.returncode}) in {args.limit_mb} MB; its own memory reached {most / 1e6:.0f} MB")
print(f"model {size(args.model) / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB, own memory at most {most / 1e6:.0f} MB, "
      f"written {size(args.out) / 1e9:.2f} GB, {time.time() - start:.0f} s")
