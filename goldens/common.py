"""Shared by the golden makers: a float64 reference run of small transformers models, and of PEFT adapters on them.

transformers casts to float32 inside its norms and its attention softmax whatever the model's type; `float64_inside` undoes
that, so that what is written is the mathematical result rounded once to float32. Only the rotary angles' cosines and sines
are computed in float32, as every user of transformers gets them.

A full fine-tuning case holds config.json, model.safetensors and golden.safetensors; an adapter case holds base.txt (the
name of the case whose model it adapts), adapter/ as peft saves it, and golden.safetensors:
  input_ids, labels   [tokens] int64, all sequences laid end to end; labels[t] is the token at t (-100: ignored)
  sequence_lengths    [n] int64; each sequence is run alone, positions from 0; its first token is never predicted
  logits              [tokens, vocab]
  loss                [1], summed cross-entropy of all predicted labels over their count
  grad.<name>         of that loss; the parameter's name in transformers, or its key in adapter_model.safetensors
"""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
import sys
import zlib
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

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
        for norm in vars(module).values():
            if isinstance(norm, type) and hasattr(norm, "_norm"):  # Gemma's, which call `.float()`
                norm.forward = lambda self, x: self._norm(x) * (1.0 + self.weight)


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


def randomise(parameters, seed, norm=1.0):
    """Normal values of deviation 0.2; norm weights around `norm`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = norm + noise if parameter.ndim == 1 and name.endswith("weight") else noise


def seed_of(name):
    """The same however many cases there are."""
    return zlib.crc32(name.encode())


def random_model(config, seed):
    """A model of the config's family, and float64 inside that family from here on."""
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    float64_inside(sys.modules[type(model).__module__])
    plus_one = any(hasattr(module, "_norm") for module in model.modules())
    randomise(model.named_parameters(), seed, norm=0.0 if plus_one else 1.0)
    return model


def load(case):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32, attn_implementation="eager")


def forward(model, ids):
    """Logits of one sequence, from the frequencies of a new model: "dynamic" ones stay at those of the longest one before.

    Not those of the virtual tokens that a soft prompt puts before it."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq, module.max_seq_len_cached = module.original_inv_freq, module.original_max_seq_len
    return model(input_ids=ids[None], use_cache=False).logits[0, -len(ids):]


def run(model, ids, labels, lengths=LENGTHS):
    """Logits [tokens, vocab] and mean cross-entropy over the predicted labels, each sequence run alone; fills `.grad`."""
    model.double().eval()
    logits = [forward(model, s) for s in ids.split(lengths)]
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


def write(path, ids, labels, logits, loss, grads=None, lengths=LENGTHS, **more):
    """golden.safetensors: the inputs, and the reference's results in float32; `more` as they are."""
    tensors = {"logits": logits, "loss": loss} | {f"grad.{k}": v for k, v in (grads or {}).items()}
    tensors = {k: v.float().contiguous().clone() for k, v in tensors.items()}
    tensors |= {"input_ids": ids, "labels": labels, "sequence_lengths": torch.tensor(lengths)} | more
    save_file(tensors, path)


def sort_lists(file):
    """peft writes its lists of modules in the order of a Python set, another one in each process."""
    order = lambda v: sorted(v) if isinstance(v, list) and all(isinstance(item, str) for item in v) else v
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: order(v) for k, v in config.items()}, indent=2) + "\n")


def save_adapter(model, folder, base, **arguments):
    """What peft saves of an adapter, on a base of that name."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, **dict(save_embedding_layers=False) | arguments)
    (folder / "README.md").unlink()
    sort_lists(folder / "adapter_config.json")


def gradients(model):
    """Of all that is trained, by the keys of adapter_model.safetensors."""
    if model.active_peft_config.is_prompt_learning:
        return {"prompt_embeddings": model.prompt_encoder["default"].embedding.weight.grad}
    trainable = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    grads = get_peft_model_state_dict(model, state_dict=model.state_dict() | trainable, save_embedding_layers=False)
    assert len(grads) == len(trainable), (sorted(grads), sorted(trainable))
    return grads


def adapter_case(case, base, config, seed, start=randomise, load=load, **arguments):
    """A case of an adapter whose parameters `start` sets; `arguments` are those of `save_pretrained`, `load` makes the base's model."""
    folder = fresh(GOLDENS / case)
    torch.manual_seed(seed)
    model = get_peft_model(load(base), config)
    start([(n, p) for n, p in model.named_parameters() if p.requires_grad], seed)
    save_adapter(model, folder / "adapter", base, **arguments)
    (folder / "base.txt").write_text(base + "\n")
    ids, labels = batch(model.config.get_text_config().vocab_size, seed)
    logits, loss = run(model, ids, labels)
    grads = gradients(model)
    write(folder / "golden.safetensors", ids, labels, logits, loss, grads)
    torch.manual_seed(seed)
    again, _ = run(PeftModel.from_pretrained(load(base), folder / "adapter"), ids, labels)
    untouched, _ = run(load(base), ids, labels)
    assert torch.equal(again, logits), f"{case}: peft reads back something else"
    assert (untouched - logits).abs().max() > 0.1
    print(f"{case}: loss {loss.item():.4f}, {len(grads)} tensors")


def make_adapter(case, base, settings, seed):
    """A case of a LoRA adapter with random values."""
    adapter_case(case, base, LoraConfig(task_type="CAUSAL_LM", **settings), seed)
