#!/usr/bin/env bash
# bitsandbytes: on a CPU AdamW8bit moves parameters that have no gradient, and those with small gradients another way than the rest of
# their block.
#
# Versions: bitsandbytes 0.50.2, torch 2.15.0.
#
# AdamW divides each gradient by its own size, so that a parameter moves as far whether its gradients are large or small, and one without a
# gradient stays. The 8-bit form keeps both moments as codes that are relative to the largest of 256 neighbours. On a CPU a code is looked
# up in a table of 65,536 even steps, which is coarser than the codes are near zero: zero becomes a small number there, of the first moment
# as well as of the second. What has no gradient then drifts in one direction, and what has gradients a hundredth or a thousandth as large
# as its neighbours' moves too far or hardly at all. Rows of an embedding that seldom occur beside rows that often do are such parameters.
#
# Why it matters: whoever fine-tunes a whole model with 8-bit AdamW for its memory takes it for AdamW with some noise; this is a bias.
#
# Output seen:
#   bitsandbytes 0.50.2, torch 2.15.0+cu132
#   Expected: without a gradient a parameter stays, where nothing decays; with small ones it moves as far as its neighbours.
#   torch AdamW: no gradient +0.0e+00, a hundredth -0.396, a thousandth -0.399, others -0.400
#   bitsandbytes AdamW8bit: no gradient -2.6e-03, a hundredth -0.529, a thousandth -0.090, others -0.400

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.15.0 bitsandbytes==0.50.2 numpy
cat > show.py <<'PYTHON'
import sys

import bitsandbytes
import torch

torch.set_num_threads(1)
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
print("Expected: without a gradient a parameter stays, where nothing decays; with small ones it moves as far as its neighbours.")
torch.manual_seed(0)
scale = torch.ones(32, 256)
scale[:, 0], scale[:, 1], scale[:, 2] = 0.0, 1e-2, 1e-3
gradients = torch.randn(500, 32, 256).abs() * scale  # of one sign, so that there is a way to go
moved = {}
for name, make in {"torch AdamW": torch.optim.AdamW, "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit}.items():
    weight = torch.nn.Parameter(torch.zeros(32, 256))
    optimizer = make([weight], lr=1e-3, weight_decay=0.0)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    weight = weight.detach()
    none, hundredth, thousandth = (weight[:, k].mean().item() for k in range(3))
    others = weight[:, 3:].mean().item()
    moved[name] = none, hundredth / others, thousandth / others
    print(f"{name}: no gradient {none:+.1e}, a hundredth {hundredth:+.3f}, a thousandth {thousandth:+.3f}, others {others:+.3f}")

none, hundredth, thousandth = moved["torch AdamW"]
is_even = none == 0 and 0.98 < hundredth < 1.02 and 0.98 < thousandth < 1.02
none, hundredth, thousandth = moved["bitsandbytes AdamW8bit"]
sys.exit(0 if is_even and none < -1e-3 and hundredth > 1.2 and thousandth < 0.4 else "this is no longer so")
PYTHON
venv/bin/python show.py
