"""Checks retune on the real Gemma 3 270M against transformers and peft: logits, and an adapter's logits, loss and gradients.

    python goldens/check_gemma3.py --gguf gemma-3-270m.Q4_K_M.gguf [--write-torch-model DIR]

retune reads the GGUF file, transformers its weights dequantized to f32. --write-torch-model keeps that model as a Hugging Face
directory (without a tokenizer), for bench/compare.py, and stops there. Prints and exits as check_smollm2.py does.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.utils import logging

from check_smollm2 import (PROMPT, ROOT, TEXT, TOKENS, Checks, Retune, difference, forward, gradients, load, random_adapter,
                           worst_gradient)
from gguf_hf import field, weights


def write_model(reader, out):
    key = lambda name: field(reader, f"gemma3.{name}")
    theta = dict(full_attention=key("rope.freq_base"), sliding_attention=key("rope.freq_base_swa") or 10000.0)
    config = Gemma3TextConfig(
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")), hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"), num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"), num_key_value_heads=key("attention.head_count_kv"),
        head_dim=key("attention.key_length"), query_pre_attn_scalar=key("attention.key_length"), rms_norm_eps=1e-6,
        sliding_window=key("attention.sliding_window"), max_position_embeddings=key("context_length"),
        rope_parameters={kind: dict(rope_type="default", rope_theta=value) for kind, value in theta.items()},
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"), eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=field(reader, "tokenizer.ggml.padding_token_id"))
    model = Gemma3ForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights(reader), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.save_pretrained(out)


def encode(reader, text):
    """BOS, then the longest token at each place: close to the model's own tokens, and all that is needed here."""
    ids = {token: i for i, token in enumerate(field(reader, "tokenizer.ggml.tokens"))}
    text, out = text.replace(" ", "▁"), [field(reader, "tokenizer.ggml.bos_token_id")]
    while text:
        token = next(text[:n] for n in range(min(len(text), 24), 0, -1) if text[:n] in ids)
        out.append(ids[token])
        text = text[len(token):]
    return out


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gguf", required=True)
    options.add_argument("--write-torch-model", type=Path)
    options.add_argument("--retune", default=str(ROOT / "target" / "release" / "retune"))
    options.add_argument("--threads", type=int)
    args = options.parse_args()

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads or os.cpu_count())
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)
    reader = GGUFReader(args.gguf)
    if args.write_torch_model:
        write_model(reader, args.write_torch_model)
        return
    ids = torch.tensor(encode(reader, TEXT)[:TOKENS])
    labels = torch.where(torch.arange(len(ids)) < PROMPT, -100, ids)
    assert len(ids) == TOKENS
    checks = Checks()
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        write_model(reader, folder / "model")
        retune = Retune(args, ids.tolist(), labels.tolist(), folder)
        untouched = forward(load(folder / "model"), ids)
        loss = torch.nn.functional.cross_entropy(untouched[:-1], ids[1:]).item()
        checks.line("transformers reads English", loss, loss < 5, "loss below 5")
        checks.below("logits: retune on the GGUF file, transformers", difference(retune.logits()["logits"], untouched))

        adapter = folder / "adapter"
        random_adapter(folder / "model", adapter)
        model = PeftModel.from_pretrained(load(folder / "model"), adapter, is_trainable=True).eval()
        theirs = forward(model, ids)
        loss, grads = gradients(model, ids, labels)
        ours = retune.logits(adapter, gradients=True)
        ours_logits, ours_loss = ours.pop("logits"), ours.pop("loss").item()
        checks.below("adapter that peft wrote: retune, peft", difference(ours_logits, theirs))
        checks.above("adapter that peft wrote: changes logits by", difference(theirs, untouched))
        checks.below("adapter that peft wrote: loss, relative", abs(ours_loss - loss) / loss)
        checks.below(f"adapter that peft wrote: worst of {len(grads)} gradients, relative", worst_gradient(ours, grads))
    sys.exit(checks.failed)


if __name__ == "__main__":
    main()
