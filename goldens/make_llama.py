"""Makes the Llama-family goldens in crates/retune-model/tests/goldens: small random models, PEFT adapters, and what
transformers + peft compute with them in float64.

    python goldens/make_llama.py            (torch, transformers, peft, safetensors)

A full fine-tuning case holds config.json, model.safetensors and golden.safetensors; an adapter case holds base.txt (the
name of the case whose model it adapts), adapter/ as peft saves it, and golden.safetensors:
  input_ids, labels   [tokens] int64, all sequences laid end to end; labels[t] is the token at t (-100: ignored)
  sequence_lengths    [n] int64; each sequence is run alone, positions from 0; its first token is never predicted
  logits              [tokens, vocab]
  loss                [1], summed cross-entropy of all predicted labels over their count
  grad.<name>         of that loss; the parameter's name in transformers, or its key in adapter_model.safetensors
"""

import json
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from common import GOLDENS, batch, float64_inside, fresh, run, write

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=96, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
ONE_LAYER = SIZES | dict(num_hidden_layers=1)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=128)  # wavelengths 6.3 | 63 | 628 and up: all three branches

MODELS = {
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_untied_mha": LlamaConfig(**SIZES | dict(num_key_value_heads=4)),
    "llama_gqa_head_dim": LlamaConfig(**SIZES | dict(num_key_value_heads=1, head_dim=12, num_hidden_layers=3),
                                      tie_word_embeddings=True,
                                      rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
    "llama_bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "rope_linear": LlamaConfig(**ONE_LAYER, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    "rope_llama3": LlamaConfig(**ONE_LAYER, rope_parameters=LLAMA3 | dict(rope_theta=10000.0), tie_word_embeddings=True),
    "mistral_window": MistralConfig(**ONE_LAYER, sliding_window=5),
}

# rope settings as transformers 4 wrote them: file -> top-level keys in place of rope_parameters
OLD_CONFIGS = {
    "llama_tied/config.json": dict(rope_theta=10000.0, rope_scaling=None),
    "rope_linear/config_old.json": dict(rope_theta=10000.0, rope_scaling=dict(type="linear", factor=4.0)),
    "rope_llama3/config.json": dict(rope_theta=10000.0, rope_scaling=LLAMA3),
    "mistral_window/config.json": dict(rope_theta=10000.0),
}

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora_all_linear": ("llama_tied", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "lora_rs": ("llama_gqa_head_dim", dict(r=4, lora_alpha=8, use_rslora=True, target_modules=LINEAR)),
    "lora_patterns": ("llama_untied_mha", dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        rank_pattern={"up_proj": 2, "layers.1.self_attn.v_proj": 6}, alpha_pattern={"^model.layers.0.self_attn.q_proj": 3,
                                                                                   "down_proj": 20})),
    "lora_regex": ("llama_tied", dict(r=3, lora_alpha=6, target_modules=r".*\.(0\.self_attn\.[qk]|1\.mlp\.(gate|up))_proj")),
    "lora_layers": ("llama_untied_mha", dict(r=2, lora_alpha=8, target_modules=LINEAR, exclude_modules=["k_proj", "up_proj"],
                                             layers_to_transform=[1], layers_pattern="layers")),
    "lora_save_head": ("llama_untied_mha", dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"],
                                                modules_to_save=["lm_head"])),
    "lora_save_embeddings": ("llama_untied_mha", dict(r=2, lora_alpha=4, target_modules=["o_proj", "down_proj"],
                                                      modules_to_save=["embed_tokens"])),
    "lora_bias_all": ("llama_bias", dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], bias="all")),
    "lora_bias_lora_only": ("llama_bias", dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"],
                                               bias="lora_only")),
}


def randomise(parameters, seed):
    """Normal values of deviation 0.2; norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise if "norm" in name else noise


def make_model(case, config, seed):
    folder = fresh(GOLDENS / case)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model.named_parameters(), seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    ids, labels = batch(config.vocab_size, seed)
    logits, loss = run(model, ids, labels)
    write(folder / "golden.safetensors", ids, labels, logits, loss, {k: p.grad for k, p in model.named_parameters()})
    assert all(p.grad.abs().max() > 1e-5 for n, p in model.named_parameters() if "k_proj.bias" not in n)
    print(f"{case}: loss {loss.item():.4f}")


def make_old_config(file, keys):
    """The same config in the words of transformers 4; transformers must read both alike."""
    new = json.loads((GOLDENS / file).with_name("config.json").read_text())
    before = AutoConfig.from_pretrained((GOLDENS / file).parent)
    rope = new.pop("rope_parameters")
    assert rope["rope_theta"] == keys["rope_theta"]
    new["torch_dtype"] = new.pop("dtype")
    new["transformers_version"] = "4.46.0"
    text = json.dumps(dict(sorted((new | keys).items())), indent=2) + "\n"
    (GOLDENS / file).write_text(text)
    after = type(before)(**json.loads(text))
    assert before.rope_parameters.items() <= after.rope_parameters.items(), (after.rope_parameters, before.rope_parameters)


def load(case):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32, attn_implementation="eager")


def sort_lists(file):
    """peft writes its lists of modules in the order of a Python set, another one in each process."""
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: sorted(v) if isinstance(v, list) else v for k, v in config.items()}, indent=2) + "\n")


def make_adapter(case, base, settings, seed):
    folder = fresh(GOLDENS / case)
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    randomise(trainable, seed)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink()
    sort_lists(folder / "adapter" / "adapter_config.json")
    (folder / "base.txt").write_text(base + "\n")
    ids, labels = batch(model.config.vocab_size, seed)
    logits, loss = run(model, ids, labels)
    grads = model.state_dict() | {n: p.grad for n, p in trainable}
    grads = get_peft_model_state_dict(model, state_dict=grads, save_embedding_layers=False)
    assert len(grads) == len(trainable), (sorted(grads), [n for n, _ in trainable])
    write(folder / "golden.safetensors", ids, labels, logits, loss, grads)
    again, _ = run(PeftModel.from_pretrained(load(base), folder / "adapter"), ids, labels)
    untouched, _ = run(load(base), ids, labels)
    assert torch.equal(again, logits), f"{case}: peft reads back something else"
    assert (untouched - logits).abs().max() > 0.1
    print(f"{case}: loss {loss.item():.4f}, {len(trainable)} tensors")


if __name__ == "__main__":
    float64_inside(modeling_llama, modeling_mistral)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)
    for seed, (case, config) in enumerate(MODELS.items()):
        make_model(case, config, seed)
    for file, keys in OLD_CONFIGS.items():
        make_old_config(file, keys)
    for seed, (case, (base, settings)) in enumerate(ADAPTERS.items(), start=100):
        make_adapter(case, base, settings, seed)
