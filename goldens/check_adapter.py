"""Loads a model and an adapter with peft, every warning an error, and compares logits with ours.

    python goldens/check_adapter.py --model DIR --adapter DIR --logits F.safetensors [--tolerance 1e-3]

The file holds `tokens` int64 [T], and `logits` [T, vocab] (or only the last rows of them). Prints the largest absolute difference and
||ours - theirs|| / ||theirs||; exit code 1 above the tolerance (on the latter), or where the adapter changes nothing.
"""

import argparse
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--adapter", required=True)
    options.add_argument("--logits", required=True)
    options.add_argument("--tolerance", type=float, default=1e-3)
    args = options.parse_args()

    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    warnings.simplefilter("error")  # peft only warns of keys that are missing
    warnings.simplefilter("ignore", FutureWarning)  # of one library to the other
    file = load_file(args.logits)
    tokens, ours = file["tokens"].long(), file["logits"].float()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        untouched = model(tokens[None]).logits[0, -len(ours):]
        model = PeftModel.from_pretrained(model, args.adapter)
        theirs = model(tokens[None]).logits[0, -len(ours):]
    relative = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"largest difference {(ours - theirs).abs().max().item():.3e}, relative {relative:.3e}, "
          f"adapter changes logits by {(untouched - theirs).abs().max().item():.3e}")
    if not relative <= args.tolerance:
        sys.exit("the logits differ")
    if torch.equal(untouched, theirs):
        sys.exit("the adapter changes nothing")


if __name__ == "__main__":
    main()
