"""Loads a model and an adapter of any method with peft, every warning an error, and compares with what retune computed.

    python goldens/check_adapter.py --model DIR [--adapter DIR] --logits F.safetensors [--tokens 1,2,3] [--labels=-100,2,3]
                                    [--allow REGEX ...] [--tolerance 1e-3]

The file holds `logits` [T, vocab] (or only the last rows of them), and `tokens` int64 [T] where --tokens does not say them. With
--labels the file is what `retune logits --labels` wrote: its `loss`, and the gradients by the adapter's keys, are compared too.
Where the model has an encoder, --tokens are what it reads, and --labels the answer. Without --adapter a model that retune wrote is
compared, merged or trained whole.
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
    options.add_argument("--adapter")
    options.add_argument("--logits", required=True)
    options.add_argument("--tokens", type=integers)
    options.add_argument("--labels", type=integers)
    options.add_argument("--allow", action="append", default=[])
    options.add_argument("--tolerance", type=float, default=1e-3)
    args = options.parse_args()

    import torch
    from peft import PeftConfig, PeftModel
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from common import forward as forward_decoder, gradients

    warnings.simplefilter("error")  # peft only warns of keys that are missing
    warnings.simplefilter("ignore", FutureWarning)  # of one library to the other
    for text in args.allow:
        warnings.filterwarnings("ignore", message=f"(?s:.*)(?:{text})")
    file = load_file(args.logits)
    tokens = file.pop("tokens").long() if args.tokens is None else torch.tensor(args.tokens)
    ours = file.pop("logits").float()
    config = AutoConfig.from_pretrained(args.model)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    labels = None if args.labels is None else torch.tensor(args.labels)

    def forward(model, tokens):
        if not config.is_encoder_decoder:
            return forward_decoder(model, tokens)
        return model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None]), labels=labels[None],
                     use_cache=False).logits[0]

    with torch.no_grad():
        untouched = forward(model, tokens)[-len(ours):]
    if args.adapter is not None:
        soft = PeftConfig.from_pretrained(args.adapter).is_prompt_learning  # peft trains none that it loads, but has gradients
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=not soft).eval()
    logits = forward(model, tokens)
    theirs = logits[-len(ours):].detach()

    relative = lambda a, b: ((a - b).norm() / b.norm().clamp(min=1e-9)).item()
    worst = relative(ours, theirs)
    print(f"largest difference {(ours - theirs).abs().max().item():.3e}, relative {worst:.3e}, "
          f"adapter changes logits by {(untouched - theirs).abs().max().item():.3e}")
    if labels is not None:
        pairs = (logits, labels) if config.is_encoder_decoder else (logits[:-1], labels[1:])
        loss = torch.nn.functional.cross_entropy(*pairs, ignore_index=-100)
        loss.backward()
        of_loss = relative(file.pop("loss").reshape(()), loss.detach())
        grads = {} if args.adapter is None else gradients(model)
        if file.keys() != grads.keys():
            sys.exit(f"gradients of other tensors: {sorted(file.keys() ^ grads.keys())}")
        errors = {name: relative(file[name], grads[name]) for name in grads}
        name, error = max(errors.items(), key=lambda item: item[1], default=("none", 0.0))
        print(f"loss {loss.item():.6f}, relative {of_loss:.3e}; worst of {len(errors)} gradients {error:.3e}, of {name}")
        worst = max(worst, of_loss, error)
    if not worst <= args.tolerance:
        sys.exit("they differ")
    if args.adapter is not None and torch.equal(untouched, theirs):
        sys.exit("the adapter changes nothing")


if __name__ == "__main__":
    main()
