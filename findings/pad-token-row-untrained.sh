#!/usr/bin/env bash
# transformers and PEFT: the embedding of the pad token is never trained, even where the token is no padding.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.15.0.
#
# Some models (SmolLM2-Instruct for one) name the token that ends a message as `pad_token_id` too. That token then
# stands in every message as text, with attention on it and a label. Llama, Qwen and Gemma pass `pad_token_id` to
# torch's `nn.Embedding` as `padding_idx`, and torch gives that row no gradient, whatever the attention mask says. GPT-2
# and BLOOM do not, and train the row. PEFT inherits it: `trainable_token_indices`, which trains the embeddings of named
# tokens only, reports the row as trainable, and the gradient is zero.
#
# Why it matters: whoever fine-tunes to teach a new chat format expects the end-of-message token to be learned. Its
# input embedding stays what it was (with tied embeddings, only the head moves it). A re-implementation that follows the
# formulas trains the row, and its gradients differ from transformers' in exactly this row. A pad token that is used for
# nothing else avoids it: in the second column below, `pad_token_id` is a token that does not occur.
#
# Output seen:
#   peft 0.21.2, transformers 5.23.0, torch 2.15.0+cu132
#   Expected: a token that stands in the text three times, attended to and with a label, gets a gradient.
#   Norm of the gradient of its input embedding, with pad_token_id the same token / another token:
#     Llama    0.0000 / 0.1483
#     Qwen 2   0.0000 / 0.1168
#     Gemma 3  0.0000 / 0.4837
#     GPT-2    0.1354 / 0.1354
#     BLOOM    0.1360 / 0.1360
#     Llama, PEFT trainable_token_indices=[2]: 0.0000 / 0.1483

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.15.0 transformers==5.23.0 peft==0.21.2
cat > show.py <<'PYTHON'
import sys
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2Config

transformers.utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=FutureWarning)
torch.set_num_threads(1)
END = 2  # ends each message, and is the pad token too
ids = torch.tensor([[1, 5, 6, END, 7, 8, 9, END, 10, 11, END]])
tokens = dict(vocab_size=97, bos_token_id=1, eos_token_id=END, tie_word_embeddings=False)
llama = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
configs = {
    "Llama": (LlamaConfig, llama),
    "Qwen 2": (Qwen2Config, llama),
    "Gemma 3": (Gemma3TextConfig, llama | dict(head_dim=8)),
    "GPT-2": (GPT2Config, dict(n_embd=32, n_layer=2, n_head=4)),
    "BLOOM": (BloomConfig, dict(hidden_size=32, n_layer=2, n_head=4)),
}


def make(name, pad):
    kind, shape = configs[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**tokens, **shape, pad_token_id=pad))
    with torch.no_grad():  # torch starts the row of padding_idx as zeros; in a trained model it is none
        model.get_input_embeddings().weight.normal_(0, 0.1)
    return model


def backward(model):
    # No padding at all: every token is attended to and has a label.
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()


def row_gradient(name, pad):
    model = make(name, pad)
    backward(model)
    return model.get_input_embeddings().weight.grad[END].norm().item()


def peft_gradient(pad):
    model = get_peft_model(make("Llama", pad), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[END]))
    backward(model)
    (delta,) = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n and p.requires_grad]
    return delta.grad.norm().item()


shared = {name: row_gradient(name, END) for name in configs}
own = {name: row_gradient(name, 0) for name in configs}
named, named_own = peft_gradient(END), peft_gradient(0)

print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print("Expected: a token that stands in the text three times, attended to and with a label, gets a gradient.")
print("Norm of the gradient of its input embedding, with pad_token_id the same token / another token:")
for name in configs:
    print(f"  {name:8} {shared[name]:.4f} / {own[name]:.4f}")
print(f"  Llama, PEFT trainable_token_indices=[{END}]: {named:.4f} / {named_own:.4f}")
stuck = [shared[name] for name in ("Llama", "Qwen 2", "Gemma 3")] + [named]
free = [shared[name] for name in ("GPT-2", "BLOOM")] + list(own.values()) + [named_own]
if max(stuck) > 0 or min(free) == 0:
    sys.exit("The behaviour is no longer there.")
PYTHON
venv/bin/python show.py
