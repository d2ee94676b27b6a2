"""PyTorch counterpart of `cargo bench -p retune-kernels`: the products of linears in f32 and in 8 bits, on the same shapes.

    python bench/pytorch_products.py [--threads N] [--seconds 0.5] [--repeats 5] [--allocator default]

Prints a Markdown table of GFLOP/s, or GOP/s in 8 bits (a multiplication and an addition count as two): the median of the
repeats, each at least --seconds long. The columns:

    f32 forward, input gradient, weight gradient    torch.nn.functional.linear and its backward for one of its operands (MKL)
    int8 product                                    torch._int_mm (oneDNN): 8-bit operands, 32-bit sums, nothing else
    int8 forward                                    f32 in and out: the rows quantized, torch._int_mm, the sums scaled

The last is what retune's int8-forward does. Shapes with a few output features are an adapter's, which is never in 8 bits.
"""

import argparse
import os
import sys
from statistics import median
from time import perf_counter

import comparison
import pytorch_common as common

# tokens, input features, output features
SHAPES = [(tokens, 576, out) for tokens in (512, 2048) for out in (576, 192, 1536, 49152)]
SHAPES += [(2048, 1536, 576)]
SHAPES += [(2048, 2048, 2048), (2048, 2048, 8192), (2048, 4096, 4096), (2048, 4096, 14336)]
RANKS = (8, 16, 64)
LOW_RANK = [(tokens, width, rank) for tokens, width in [(512, 576), (2048, 576), (2048, 1536), (2048, 4096)] for rank in RANKS]
COLUMNS = ["f32 forward", "f32 input gradient", "f32 weight gradient", "int8 product", "int8 forward"]
TOLERANCE = 0.05  # relative error of the 8-bit linear, which is about 0.01 for normal values


def quantize(torch, rows):
    """Rows as 8-bit integers, and what each of them is to be multiplied by."""
    scales = rows.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(rows / scales).to(torch.int8), scales


def int8_linear(torch, x, weight, weight_scales):
    """x·Wᵀ for a weight [in, out] in 8 bits."""
    rows, scales = quantize(torch, x)
    return torch._int_mm(rows, weight).to(torch.float32).mul_(scales).mul_(weight_scales)


def operations_per_second(run, operations, args):
    """The median over the repeats."""
    run()
    start = perf_counter()
    run()
    calls = max(1, round(args.seconds / (perf_counter() - start)))
    rates = []
    for _ in range(args.repeats):
        start = perf_counter()
        for _ in range(calls):
            run()
        rates.append(operations * calls / (perf_counter() - start))
    return median(rates)


def products(torch, tokens, features, out, with_int8):
    """{column: function that computes the product once}."""
    linear, grad = torch.nn.functional.linear, torch.autograd.grad
    x = torch.randn(tokens, features, requires_grad=True)
    w = torch.randn(out, features, requires_grad=True)
    g = torch.randn(tokens, out)
    fixed_x, fixed_w = x.detach(), w.detach()
    # Each graph has one operand to differentiate by, so that the backward is one product; it is kept for the next call.
    of_x, of_w = linear(x, fixed_w), linear(fixed_x, w)
    runs = {
        "f32 forward": lambda: linear(fixed_x, fixed_w),
        "f32 input gradient": lambda: grad(of_x, x, g, retain_graph=True),
        "f32 weight gradient": lambda: grad(of_w, w, g, retain_graph=True),
    }
    if with_int8:
        rows, _ = quantize(torch, fixed_x)
        quantized, scales = quantize(torch, fixed_w)
        weight, scales = quantized.t(), scales.t()
        runs["int8 product"] = lambda: torch._int_mm(rows, weight)
        runs["int8 forward"] = lambda: int8_linear(torch, fixed_x, weight, scales)
        exact = linear(fixed_x, fixed_w)
        error = ((runs["int8 forward"]() - exact).norm() / exact.norm()).item()
        if not error < TOLERANCE:
            sys.exit(f"int8 forward of {tokens} x {features} x {out}: relative error {error:.3f}, expected below {TOLERANCE}")
    return runs


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--seconds", type=float, default=0.5, help="of a repeat, at least")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--allocator", choices=["tcmalloc", "default"], default="tcmalloc")
    args = options.parse_args()
    if args.threads < 1 or args.repeats < 1:
        options.error("--threads and --repeats must be at least 1")
    common.preload(args)

    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    gflops = [comparison.machine_gflops()]
    print(f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    header = ["tokens", "in", "out", *COLUMNS]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for shape in SHAPES + LOW_RANK:
        tokens, features, out = shape
        runs = products(torch, *shape, with_int8=shape in SHAPES)
        rates = [operations_per_second(runs[c], 2 * tokens * features * out, args) if c in runs else None for c in COLUMNS]
        cells = [*map(str, shape), *("" if rate is None else f"{rate / 1e9:.1f}" for rate in rates)]
        print(f"| {' | '.join(cells)} |", flush=True)
        gflops.append(comparison.machine_gflops())
    print(f"\nmachine {min(gflops):.1f} to {max(gflops):.1f} GFLOP/s (NumPy, all cores)", flush=True)
    if comparison.slowed(gflops):
        print(f"FLAGGED: the machine's speed changed by more than {comparison.SLOWER - 1:.0%}", flush=True)


if __name__ == "__main__":
    main()
