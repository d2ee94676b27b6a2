#!/usr/bin/env bash
# PEFT: an adapter saved with two patterns that match the same layer is loaded with another scale.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.15.0.
#
# `alpha_pattern` of a LoraConfig gives single layers another alpha than `lora_alpha`. Its keys are regular expressions,
# and the first key that matches a layer, in the order in which the user wrote them, decides. So one writes the special
# case first and the general rule after it. `save_pretrained` writes adapter_config.json with sorted keys, and the order
# is lost: '.*_proj' sorts before 'layers.0.self_attn.q_proj'. When the adapter is loaded, the general rule decides for
# every layer.
#
# Why it matters: the layer was trained with one scale (alpha / r) and serves with another one. The tensors are right,
# nothing warns, and the answers are those of a model that nobody trained. A program that reads or writes this file
# has to keep the order of the keys while it trains, and cannot get it back from what peft saved. Until the order is
# kept, write patterns of which only one matches each layer.
#
# The script also puts the keys of the saved file back into the order of the training and loads it again: the logits are
# then those of the training, so the order alone makes the difference.
#
# Output seen:
#   peft 0.21.2, transformers 5.23.0, torch 2.15.0+cu132
#   Expected: a saved and loaded adapter has the scales it was trained with.
#   alpha_pattern given:   {"layers.0.self_attn.q_proj": 32, ".*_proj": 4}
#   alpha_pattern in file: {".*_proj": 4, "layers.0.self_attn.q_proj": 32}
#   scale of q_proj in layers 0 and 1: trained [8.0, 1.0], loaded [1.0, 1.0]
#   largest logit 0.3479, difference after loading 0.0469, warnings about it: 0
#   difference with the keys of the file in their first order: 0.0e+00

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.15.0 transformers==5.23.0 peft==0.21.2
cat > show.py <<'PYTHON'
import json
import sys
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)
torch.manual_seed(0)
torch.set_num_threads(1)
LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
)).save_pretrained("base")
ids = torch.arange(5, 15)[None]


def scales(model):
    modules = (model.base_model.model.model.layers[i].self_attn.q_proj for i in range(2))
    return [module.scaling["default"] for module in modules]


def base():
    return LlamaForCausalLM.from_pretrained("base")


@torch.no_grad()
def logits(model):
    return model.eval()(ids).logits


patterns = {"layers.0.self_attn.q_proj": 32, ".*_proj": 4}
# init_lora_weights=False gives a random B, as if the adapter had been trained.
trained = get_peft_model(base(), LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj"], alpha_pattern=dict(patterns), init_lora_weights=False))
trained.save_pretrained("adapter")
with open("adapter/adapter_config.json") as file:
    config = json.load(file)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(base(), "adapter")
told = [str(w.message) for w in caught if "pattern" in str(w.message) or "alpha" in str(w.message)]
difference = (logits(loaded) - logits(trained)).abs().max().item()
with open("adapter/adapter_config.json", "w") as file:
    json.dump(config | {"alpha_pattern": patterns}, file)
reordered = PeftModel.from_pretrained(base(), "adapter")
repaired = (logits(reordered) - logits(trained)).abs().max().item()

print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print("Expected: a saved and loaded adapter has the scales it was trained with.")
print(f"alpha_pattern given:   {json.dumps(patterns)}")
print(f"alpha_pattern in file: {json.dumps(config['alpha_pattern'])}")
print(f"scale of q_proj in layers 0 and 1: trained {scales(trained)}, loaded {scales(loaded)}")
print(f"largest logit {logits(trained).abs().max():.4f}, difference after loading {difference:.4f}, "
      f"warnings about it: {len(told)}")
print(f"difference with the keys of the file in their first order: {repaired:.1e}")
if scales(loaded) == scales(trained) or difference < 1e-3 or told or repaired > 1e-6:
    sys.exit("The behaviour is no longer there.")
PYTHON
venv/bin/python show.py
