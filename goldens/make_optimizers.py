"""Makes the goldens of the optimizers: bitsandbytes' AdamW8bit on the CPU, the same scheme with nearest codes (and no second
moment that becomes zero), transformers' Adafactor.

    python goldens/make_optimizers.py     (bitsandbytes 0.50.2, torch, transformers, numpy, safetensors)

Written to crates/retune-train/tests/goldens/optimizers.safetensors:
  signed_map, unsigned_map         float32 [256], `create_dynamic_map`
  adamw_8bit.parameters            float32 [7,000], after STEPS steps of the plain transcription below
  adamw_8bit.codes, .magnitudes    uint8 [2, 7000], float32 [2, 28]: both moments then
  bitsandbytes.parameters, .codes, .magnitudes    the same by `AdamW8bit`, whose CPU form takes codes from a table that is coarse near 0
  adafactor.parameters             float32 [48 * 20 + 10], after STEPS steps: a matrix and a vector

Gradients and first parameters are made of integers by `numbers`, which the test repeats.
"""

from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.functional import create_dynamic_map
from safetensors.numpy import save_file
from transformers.optimization import Adafactor

OUT = Path(__file__).resolve().parent.parent / "crates" / "retune-train" / "tests" / "goldens" / "optimizers.safetensors"
STEPS, BLOCK = 100, 256
RATE, DECAY, BETAS, EPSILON = 0.01, 0.1, (0.9, 0.999), 1e-8


def numbers(seed, count):
    """Numbers around 0, those of some blocks a hundred times as large as those of others, as float32."""
    i = np.arange(count, dtype=np.uint64)
    bits = ((i + np.uint64(seed * 1_000_003)) * np.uint64(2654435761)) % np.uint64(1 << 32)
    bits = ((bits ^ (bits >> np.uint64(15))) * np.uint64(2246822519)) % np.uint64(1 << 32)
    bits ^= bits >> np.uint64(13)
    scale = 10.0 ** -((i // 512) % 3).astype(np.float64)
    return ((bits / 2.0**32 - 0.5) * scale).astype(np.float32)


def nearest(code_map, x):
    middles = np.float32(0.5) * (code_map[:-1] + code_map[1:])
    return np.searchsorted(middles, x, side="left").astype(np.uint8)


def adamw_8bit(p, count):
    """Dettmers et al. 2022: decode, AdamW, encode, in float32."""
    maps = [create_dynamic_map(signed).numpy() for signed in (True, False)]
    blocks = -(-count // BLOCK)
    which = np.arange(count) // BLOCK
    codes, magnitudes = np.zeros((2, count), np.uint8), np.zeros((2, blocks), np.float32)
    f = np.float32
    for step in range(1, STEPS + 1):
        g = numbers(step, count)
        m, v = (magnitudes[k][which] * maps[k][codes[k]] for k in (0, 1))
        m = f(BETAS[0]) * m + f(1 - BETAS[0]) * g
        v = f(BETAS[1]) * v + f(1 - BETAS[1]) * g * g
        rate = f(RATE / (1 - BETAS[0]**step))
        correction = f(1 / np.sqrt(1 - BETAS[1]**step))
        p = p * f(1 - RATE * DECAY) - rate * m / (np.sqrt(v) * correction + f(EPSILON))
        for k, moment in enumerate((m, v)):
            for b in range(blocks):
                block = moment[b * BLOCK:(b + 1) * BLOCK]
                magnitudes[k, b] = np.abs(block).max()
                found = nearest(maps[k], block * (f(1) / magnitudes[k, b]))
                # A second moment that became zero would be divided by: the step would be a leap.
                codes[k, b * BLOCK:(b + 1) * BLOCK] = np.maximum(found, block > 0) if k else found
    return {"adamw_8bit.parameters": p, "adamw_8bit.codes": codes, "adamw_8bit.magnitudes": magnitudes}


def bitsandbytes(p, count):
    p = torch.nn.Parameter(torch.from_numpy(p.copy()).reshape(70, -1))
    optimizer = bnb.optim.AdamW8bit([p], lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    for step in range(1, STEPS + 1):
        p.grad = torch.from_numpy(numbers(step, count)).reshape(p.shape)
        optimizer.step()
    state = optimizer.state[p]
    stack = lambda *names: np.stack([state[name].numpy().ravel() for name in names])
    return {"bitsandbytes.parameters": p.detach().numpy().ravel(), "bitsandbytes.codes": stack("state1", "state2"),
            "bitsandbytes.magnitudes": stack("absmax1", "absmax2")}


def adafactor():
    sizes = [(48, 20), (10,)]
    start = numbers(0, 48 * 20 + 10)
    parts = np.split(start, [48 * 20])
    params = [torch.nn.Parameter(torch.from_numpy(part.copy()).reshape(size)) for part, size in zip(parts, sizes)]
    common = dict(lr=RATE, relative_step=False, scale_parameter=False, warmup_init=False)
    # retune spares vectors from weight decay.
    optimizer = Adafactor([{"params": [params[0]], "weight_decay": DECAY}, {"params": [params[1]], "weight_decay": 0.0}], **common)
    for step in range(1, STEPS + 1):
        gradients = np.split(numbers(step, len(start)), [48 * 20])
        for p, g in zip(params, gradients):
            p.grad = torch.from_numpy(g.copy()).reshape(p.shape)
        optimizer.step()
    return {"adafactor.parameters": np.concatenate([p.detach().numpy().ravel() for p in params])}


def main():
    count = 7000
    start = numbers(0, count)
    found = {"signed_map": create_dynamic_map(True).numpy(), "unsigned_map": create_dynamic_map(False).numpy()}
    found |= adamw_8bit(start, count) | bitsandbytes(start, count) | adafactor()
    ours, theirs = found["adamw_8bit.codes"].astype(int), found["bitsandbytes.codes"].astype(int)
    print("codes that differ by more than one:", (np.abs(ours - theirs) > 1).mean(axis=1))
    print("parameters:", np.abs(found["adamw_8bit.parameters"] - found["bitsandbytes.parameters"]).max())
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(values) for name, values in found.items()}, OUT)


if __name__ == "__main__":
    main()
