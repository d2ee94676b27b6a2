"""Checks retune on the real SmolLM2-135M against transformers and peft: logits, adapters both ways, merging, gradients.

    python goldens/check_smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --model DIR --adapter DIR

DIR of --model is what make_smollm2.py made of the GGUF file, DIR of --adapter an adapter that retune trained on it. retune
reads the GGUF file. Prints one line a check: largest absolute difference of logits (or worst relative error of a gradient),
and the tolerance; exit code 1 if one is above.
"""

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3
TOKENS, PROMPT = 64, 24
TEXT = ("Compared with other tools of its kind, this one reads its input once, keeps 3 to 4 lines in memory and writes what "
        "it found as it goes: names, sizes, and the date of the last change. It has no configuration file. What it cannot "
        "read it reports by name and line, and goes on with the next file until all of them were seen.")


class Retune:
    """The program, on one GGUF file and one list of tokens."""

    def __init__(self, args, ids, labels, folder):
        threads = [] if args.threads is None else ["--threads", str(args.threads)]
        self.program, self.gguf, self.folder = [args.retune, *threads], args.gguf, folder
        join = lambda values: ",".join(map(str, values))
        self.tokens, self.labels = [f"--tokens={join(ids)}"], [f"--labels={join(labels)}"]

    def run(self, *command):
        subprocess.run([*self.program, *map(str, command)], check=True, stdout=subprocess.DEVNULL)

    def logits(self, adapter=None, gradients=False):
        """Tensors by name: `logits` [tokens, vocab], and with gradients `loss` and those of the adapter's tensors."""
        out = self.folder / "logits.safetensors"
        extra = ["--adapter", adapter] if adapter else []
        self.run("logits", "--model", self.gguf, *self.tokens, *(self.labels if gradients else []), *extra, "--out", out)
        return load_file(out)

    def merge(self, adapter):
        out = self.folder / "merged"
        self.run("merge", "--model", self.gguf, "--adapter", adapter, "--out", out)
        return out


class Checks:
    """Prints results, and remembers whether all were good."""

    failed = False

    def line(self, name, value, good, limit):
        self.failed |= not good
        print(f"{'ok  ' if good else 'FAIL'}  {name:58} {value:.2e}  ({limit})", flush=True)

    def below(self, name, value):
        self.line(name, value, value < TOLERANCE, f"below {TOLERANCE:.0e}")

    def above(self, name, value):
        self.line(name, value, value > TOLERANCE, f"above {TOLERANCE:.0e}")


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def forward(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0]


def difference(a, b):
    return (a - b).abs().max().item()


def random_adapter(path, out):
    """An adapter that peft writes: rank 8 on all linear modules, A as peft starts it, B random instead of zero."""
    torch.manual_seed(0)
    model = get_peft_model(load(path), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(out)


def gradients(model, ids, labels):
    """Loss, and the gradients by PEFT's names of the saved tensors."""
    loss = model(ids[None], labels=labels[None]).loss
    loss.backward()
    named = {n.replace(".default.", "."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), named


def worst_gradient(ours, theirs):
    """Worst ||ours - theirs|| / ||theirs|| of a tensor; infinite if one is missing."""
    if ours.keys() != theirs.keys():
        return float("inf")
    return torch.stack([(ours[name] - theirs[name]).norm() / theirs[name].norm() for name in theirs]).max().item()


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gguf", required=True)
    options.add_argument("--model", required=True)
    options.add_argument("--adapter", required=True)
    options.add_argument("--retune", default=str(ROOT / "target" / "release" / "retune"))
    options.add_argument("--threads", type=int)
    args = options.parse_args()

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads or os.cpu_count())
    warnings.simplefilter("error")  # peft only warns of keys that are missing
    warnings.simplefilter("ignore", FutureWarning)  # of one library to the other
    ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(TEXT)["input_ids"][:TOKENS])
    labels = torch.where(torch.arange(len(ids)) < PROMPT, -100, ids)
    assert len(ids) == TOKENS
    checks = Checks()
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        retune = Retune(args, ids.tolist(), labels.tolist(), folder)

        base = load(args.model)
        untouched = forward(base, ids)
        checks.below("logits: retune on the GGUF file, transformers", difference(retune.logits()["logits"], untouched))

        theirs = forward(PeftModel.from_pretrained(base, args.adapter).eval(), ids)
        checks.below("adapter that retune trained: retune, peft", difference(retune.logits(args.adapter)["logits"], theirs))
        checks.above("adapter that retune trained: changes logits by", difference(theirs, untouched))

        adapter = folder / "adapter"
        random_adapter(args.model, adapter)
        model = PeftModel.from_pretrained(load(args.model), adapter, is_trainable=True).eval()
        theirs = forward(model, ids)
        loss, grads = gradients(model, ids, labels)
        ours = retune.logits(adapter, gradients=True)
        ours_logits, ours_loss = ours.pop("logits"), ours.pop("loss").item()
        checks.below("adapter that peft wrote: retune, peft", difference(ours_logits, theirs))
        checks.above("adapter that peft wrote: changes logits by", difference(theirs, untouched))
        checks.below("adapter that peft wrote: loss, relative", abs(ours_loss - loss) / loss)
        checks.below(f"adapter that peft wrote: worst of {len(grads)} gradients, relative", worst_gradient(ours, grads))

        merged = forward(load(retune.merge(adapter)), ids)
        checks.below("merged by retune: transformers, peft on the base", difference(merged, theirs))
    sys.exit(checks.failed)


if __name__ == "__main__":
    main()
