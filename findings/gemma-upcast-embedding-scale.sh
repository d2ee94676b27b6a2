#!/usr/bin/env bash
# transformers: a Gemma 3 loaded in bf16 and turned to f32 is another model than the same file loaded in f32.
#
# Versions: transformers 5.23.0, torch 2.15.0.
#
# Gemma multiplies its embeddings by the square root of the hidden size. transformers rounds that number to the type of
# the weights: 25.298 becomes 25.25 in bf16 for the hidden size 640 (that of Gemma 3 270M). The number lives in a buffer
# that is not saved. `model.float()` after loading in bf16 changes the type of the buffer, not its rounded value. So two
# f32 models with bit for bit the same weights, from the same file, multiply by different numbers, and their logits
# differ far more than f32 arithmetic does. Saving the upcast model and loading it changes its logits as well.
#
# Why it matters: people upcast a bf16 model to train or evaluate it in f32, save it, and compare; the reloaded model
# gives other numbers than the one they trained. A re-implementation that computes in f32 has to choose: the square root
# agrees with a model loaded in f32, the rounded one with a model loaded in bf16 (the precision Gemma was published in).
# (That the number depends on the type is known: issue 38702 of huggingface/transformers.)
#
# Output seen:
#   transformers 5.23.0, torch 2.15.0+cu132
#   Expected: two f32 models with equal weights give equal logits, and saving and loading changes nothing.
#   all weights equal, bit for bit: True; both compute in torch.float32 and torch.float32
#   embeddings are multiplied by 25.2982 (loaded in f32) and 25.2500 (loaded in bf16, then .float())
#   largest logit 4.4140; difference of the two 6.7e-03; f32 rounding alone 9.5e-07
#   difference after saving and loading the upcast model: 6.7e-03

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
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
torch.set_num_threads(1)
config = Gemma3TextConfig(
    vocab_size=97, hidden_size=640, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64)
Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained("model")
ids = torch.arange(5, 25)[None]


def load(folder, dtype):
    return Gemma3ForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model(ids).logits


@torch.no_grad()
def scale(model):
    table = model.model.embed_tokens
    return (table(ids) / table.weight[ids]).median().item()


direct = load("model", torch.float32)
upcast = load("model", torch.bfloat16).float()
upcast.save_pretrained("saved")
reloaded = load("saved", torch.float32)
same_weights = all(torch.equal(a, b) for a, b in zip(direct.parameters(), upcast.parameters(), strict=True))
difference = (logits(direct) - logits(upcast)).abs().max().item()
saved = (logits(reloaded) - logits(upcast)).abs().max().item()
# The first ten tokens do not see the others, so computing them alone shows what f32 rounding does.
with torch.no_grad():
    alone = direct(ids[:, :10]).logits
noise = (logits(direct)[:, :10] - alone).abs().max().item()

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("Expected: two f32 models with equal weights give equal logits, and saving and loading changes nothing.")
print(f"all weights equal, bit for bit: {same_weights}; both compute in {direct.dtype} and {upcast.dtype}")
print(f"embeddings are multiplied by {scale(direct):.4f} (loaded in f32) "
      f"and {scale(upcast):.4f} (loaded in bf16, then .float())")
print(f"largest logit {logits(direct).abs().max():.4f}; difference of the two {difference:.1e}; "
      f"f32 rounding alone {noise:.1e}")
print(f"difference after saving and loading the upcast model: {saved:.1e}")
if not same_weights or scale(direct) == scale(upcast) or difference < 1e-5 or saved < 1e-5:
    sys.exit("The behaviour is no longer there.")
PYTHON
venv/bin/python show.py
