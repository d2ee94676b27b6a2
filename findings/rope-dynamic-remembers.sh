#!/usr/bin/env bash
# transformers: with `dynamic` rope scaling, logits depend on which rows the process computed before.
#
# Versions: transformers 5.23.0, torch 2.15.0.
#
# `rope_type: dynamic` stretches the rotary frequencies for a row that is longer than `max_position_embeddings`. By its
# formula the frequencies depend on the length of the row. transformers keeps those of the longest row seen so far, and
# goes back only when a row comes that is shorter than `max_position_embeddings`. So after a row of 40 tokens, a row of
# 20 is computed with the frequencies of 40; after a row of 12 it is computed with its own ones again. A row of exactly
# `max_position_embeddings` tokens, which needs no stretching, does not go back either. The state is left by eval passes
# under no_grad too.
#
# Why it matters: the loss of a long row depends on the order of the data, an evaluation between two steps can change
# the steps after it, and a run that is resumed need not repeat the one that went through. Reference logits have to be
# made with a freshly loaded model for each row. An implementation that follows the formula agrees with the fresh ones.
# (The part about shrinking rows was discussed in pull requests 27033 and 27227 of huggingface/transformers.)
#
# Output seen:
#   transformers 5.23.0, torch 2.15.0+cu132
#   max_position_embeddings is 16. Expected: the loss of a row depends on the weights and the row alone.
#   loss of 20 tokens: fresh model 6.0654, after a row of 40 6.0317, after rows of 40 and 12 6.0654
#   loss of 16 tokens: fresh model 6.4080, after a row of 40 6.2844
#   loss of 12 tokens: fresh model 6.5671, after a row of 40 6.5671

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.15.0 transformers==5.23.0
cat > show.py <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
WINDOW = 16
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=WINDOW, rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0))
tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))


def fresh():
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # larger weights than the initial ones, so that attention is not uniform
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3)
    return model


@torch.no_grad()
def loss(model, length):
    row = tokens[:, :length]
    return model(input_ids=row, labels=row).loss.item()


def after(length, *before):
    """The loss of a row after rows of other lengths went through the same model."""
    model = fresh()
    for other in before:
        loss(model, other)
    return loss(model, length)


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"max_position_embeddings is {WINDOW}. Expected: the loss of a row depends on the weights and the row alone.")
alone, long_first, reset = after(20), after(20, 40), after(20, 40, 12)
print(f"loss of 20 tokens: fresh model {alone:.4f}, after a row of 40 {long_first:.4f}, "
      f"after rows of 40 and 12 {reset:.4f}")
full, full_after = after(WINDOW), after(WINDOW, 40)
print(f"loss of {WINDOW} tokens: fresh model {full:.4f}, after a row of 40 {full_after:.4f}")
short, short_after = after(12), after(12, 40)
print(f"loss of 12 tokens: fresh model {short:.4f}, after a row of 40 {short_after:.4f}")
changed = min(abs(alone - long_first), abs(full - full_after))
same = max(abs(alone - reset), abs(short - short_after))
if changed < 1e-3 or same > 1e-5:
    sys.exit("The behaviour is no longer there.")
PYTHON
venv/bin/python show.py
