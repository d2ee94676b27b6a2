"""Loads a model and an adapter of any method with peft, every warning an error, and compares with what retune computed.

    python goldens/check_adapter.py --model DIR --adapter DIR --logits F.safetensors [--tokens 1,2,3] [--labels=-100,2,3]
                                    [--allow REGEX ...] [--tolerance 1e-3]

The file holds `logits` [T, vocab] (or only the last rows of them), and `tokens` int64 [T] where --tokens does not say them. With
--labels the file is what `retune logits --labels` wrote: its `loss`, and the gradients by the adapter's keys, are compared too.
--allow names a warning of peft's that is expected. Prints the largest absolute difference and ||ours - theirs|| / ||theirs|| of
the logits, the loss and the worst gradient; exit code 1 above the tolerance (on the latter), or where the adapter changes
nothing.
"""

import argparse
import sys
import warnings


def integers(text):
    return [int(number) for number in text.split(",")]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--adapter", required=True)
    options.add_argument("--logits", required=True)
    options.add_argument("--tokens", type=integers)
    options.add_argument("--labels", type=integers)
    options.add_argument("--allow", action="append", default=[])
    options.add_argument("--tolerance", type=float, default=1e-3)
    args = options.parse_args()

    import torch
    from peft import PeftConfig, PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from common import forward, gradients

    warnings.simplefilter("error")  # peft only warns of keys that are missing
    warnings.simplefilter("ignore", FutureWarning)  # of one library to the other
    for text in args.allow:
        warnings.filterwarnings("ignore", message=f"(?s:.*)(?:{text})")
    file = load_file(args.logits)
    tokens = file.pop("tokens").long() if args.tokens is None else torch.tensor(args.tokens)
    ours = file.pop("logits").float()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        untouched = forward(model, tokens)[-len(ours):]
    soft = PeftConfig.from_pretrained(args.adapter).is_prompt_learning  # peft trains none that it loads, but has gradients
    model = PeftModel.from_pretrained(model, args.adapter, is_trainable=not soft).eval()
    logits = forward(model, tokens)
    theirs = logits[-len(ours):].detach()

    relative = lambda a, b: ((a - b).norm() / b.norm().clamp(min=1e-9)).item()
    worst = relative(ours, theirs)
    print(f"largest difference {(ours - theirs).abs().max().item():.3e}, relative {worst:.3e}, "
          f"adapter changes logits by {(untouched - theirs).abs().max().item():.3e}")
    if args.labels is not None:
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(args.labels)[1:], ignore_index=-100)
        loss.backward()
        of_loss, grads = relative(file.pop("loss").reshape(()), loss.detach()), gradients(model)
        if file.keys() != grads.keys():
            sys.exit(f"gradients of other tensors: {sorted(file.keys() ^ grads.keys())}")
        errors = {name: relative(file[name], grads[name]) for name in grads}
        name = max(errors, key=errors.get)
        print(f"loss {loss.item():.6f}, relative {of_loss:.3e}; worst of {len(errors)} gradients {errors[name]:.3e}, of {name}")
        worst = max(worst, of_loss, errors[name])
    if not worst <= args.tolerance:
        sys.exit("they differ")
    if torch.equal(untouched, theirs):
        sys.exit("the adapter changes nothing")


if __name__ == "__main__":
    main()
