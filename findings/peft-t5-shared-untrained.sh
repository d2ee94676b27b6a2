#!/usr/bin/env bash
# peft: on T5 an adapter of the embedding, `shared`, is counted as trainable and saved, and never trained.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.15.0.
#
# T5 keeps its token embedding under three names: `shared`, `encoder.embed_tokens` and `decoder.embed_tokens` are one module.
# The name that the model's file has, and that a person reads there, is `shared`; but the encoder and the decoder look tokens
# up through their own. peft puts its layer in the place of `shared` alone (the same with `modules_to_save`), so that the
# forward never meets it: beside other targets training runs as usual, no gradient reaches it, and nothing warns. Alone it
# would at least fail, for want of anything to differentiate.
#
# Why it matters: whoever adapts the embedding for new words or another language gets an adapter without them. The count of
# trainable parameters and the file say otherwise.
#
# Output seen:
#   peft 0.21.2, transformers 5.23.0, torch 2.15.0+cu132
#   Expected: what is counted as trainable moves when the loss depends on it.
#   LoRA on q and shared: of 576 trainable parameters 384 moved in 5 steps; those of shared moved by 0.0e+00
#   LoRA on q, shared saved whole: of 2432 trainable parameters 384 moved in 5 steps; those of shared moved by 0.0e+00

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
from transformers import T5Config, T5ForConditionalGeneration

torch.set_num_threads(1)
source, labels = torch.tensor([[5, 9, 23, 1]]), torch.tensor([[7, 4, 1]])
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print("Expected: what is counted as trainable moves when the loss depends on it.")
stayed = []
for name, settings in [("LoRA on q and shared", dict(target_modules=["q", "shared"])),
                       ("LoRA on q, shared saved whole", dict(target_modules=["q"], modules_to_save=["shared"]))]:
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, init_lora_weights=False, **settings))
    assert not [w for w in found if issubclass(w.category, UserWarning)], found
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(5):
        model.train()(input_ids=source, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n: (p - start[n]).abs() for n, p in trained.items()}
    of_shared = max(m.max().item() for n, m in moved.items() if "shared" in n)
    count = sum(p.numel() for p in trained.values())
    print(f"{name}: of {count} trainable parameters {sum((m > 0).sum().item() for m in moved.values())} moved in 5 steps; "
          f"those of shared moved by {of_shared:.1e}")
    stayed.append(of_shared == 0.0)
if not all(stayed):
    sys.exit("The behaviour is no longer there.")
PYTHON
venv/bin/python show.py
