"""Shared by the golden makers: a float64 reference run of small transformers models.

transformers casts to float32 inside its norms and its attention softmax whatever the model's type; `float64_inside` undoes
that, so that what is written is the mathematical result rounded once to float32. Only the rotary angles' cosines and sines
are computed in float32, as every user of transformers gets them.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
GOLDENS = Path(__file__).resolve().parent.parent / "crates" / "retune-model" / "tests" / "goldens"
LENGTHS = [7, 24, 1]


class Float64Torch:
    """The torch module with float32 meaning float64, put in place of a modelling file's `torch`."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def float64_inside(*modules):
    for module in modules:
        module.torch = Float64Torch()


def fresh(path):
    """An empty directory at `path`."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def batch(vocab, seed, lengths=LENGTHS):
    """Token ids of all sequences laid end to end, and their labels: about a quarter ignored (-100)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (sum(lengths),), generator=generator)
    labels = torch.where(torch.rand(len(ids), generator=generator) < 0.25, -100, ids)
    return ids, labels


def run(model, ids, labels, lengths=LENGTHS):
    """Logits [tokens, vocab] and mean cross-entropy over the predicted labels, each sequence run alone; fills `.grad`."""
    model.double().eval()
    logits = [model(input_ids=s[None], use_cache=False).logits[0] for s in ids.split(lengths)]
    pairs = [(out[:-1], target[1:]) for out, target in zip(logits, labels.split(lengths))]
    loss = torch.nn.functional.cross_entropy(
        torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]), ignore_index=-100
    )
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    logits = torch.cat(logits).detach()
    assert logits.dtype == torch.float64
    return logits, loss.detach().reshape(1)


def write(path, ids, labels, logits, loss, grads=None, lengths=LENGTHS):
    """golden.safetensors: the inputs, and the reference's results in float32."""
    tensors = {"logits": logits, "loss": loss} | {f"grad.{k}": v for k, v in (grads or {}).items()}
    tensors = {k: v.float().contiguous().clone() for k, v in tensors.items()}
    tensors |= {"input_ids": ids, "labels": labels, "sequence_lengths": torch.tensor(lengths)}
    save_file(tensors, path)
