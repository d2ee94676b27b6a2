"""PyTorch + peft counterpart of `retune bench train`: the same tokens, the same initial adapter, step by step.

    python bench/pytorch_train.py --model DIR --method lora --inputs DIR --learning-rate 2e-4 [--steps N] [--threads 2]

--inputs holds tokens.safetensors (`tokens` int64 [steps, batch, sequence]) and, but for full, adapter/ (a PEFT directory: the
initial adapter). Labels on every token, AdamW without decay, no dropout, no clipping unless --max-grad-norm.
Prints JSON: tokens_per_second (batch x sequence over the median step after 3 warm-ups), peak_rss_bytes, losses,
trainable_parameters, step_seconds.
"""

from pathlib import Path
from statistics import median
from time import perf_counter

import pytorch_common as common

WARM_UPS = 3


def main():
    options = common.parser(__doc__)
    options.add_argument("--inputs", type=Path, required=True)
    options.add_argument("--steps", type=int, help="default: as many as the tokens file holds")
    options.add_argument("--max-grad-norm", type=float)
    args = options.parse_args()
    common.preload(args)

    import torch
    from safetensors.torch import load_file

    tokens = load_file(args.inputs / "tokens.safetensors")["tokens"]
    steps = len(tokens) if args.steps is None else args.steps
    if steps > len(tokens):
        options.error(f"--steps {steps}: the tokens file holds {len(tokens)}")
    model, trainable, optimizer = common.load(args, args.inputs / "adapter")
    step_model = torch.compile(model) if args.compile else model

    losses, seconds = [], []
    for ids in tokens[:steps]:
        start = perf_counter()
        loss = step_model(input_ids=ids, labels=ids).loss
        loss.backward()
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(perf_counter() - start)

    args.inputs = str(args.inputs)
    common.report(args, {
        "tokens_per_second": tokens[0].numel() / median(seconds[WARM_UPS:] or seconds[-1:]),
        "peak_rss_bytes": common.peak_rss_bytes(),
        "losses": losses,
        "trainable_parameters": sum(p.numel() for p in trainable),
        "step_seconds": seconds,
    })


if __name__ == "__main__":
    main()
