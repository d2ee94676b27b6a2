"""Makes the goldens of every family but plain Llama's: small random models, PEFT adapters on them, and what transformers +
peft compute with them in float64. common.py says what a case holds.

    python goldens/make_families.py [CASE ...]            (torch, transformers, peft, safetensors; all cases by default)

A case's golden.safetensors also has `prompt` and `generated`, int64: the ids that follow when the likeliest token is taken 8
times. The likeliest is ahead of the second by more than MARGIN each time. Adapter cases are named after the model they
adapt: <case>_lora_all targets "all-linear". The file of gemma3_wrapped says `language_model.model.` where the gradients and
the adapter have transformers' own `model.language_model.`; its vision tower has no gradients.
"""

import json
import sys
import warnings
from dataclasses import dataclass, field

import torch
from transformers import (BloomConfig, Gemma2Config, Gemma3Config, Gemma3TextConfig, GemmaConfig, GPT2Config, LlamaConfig,
                          Ministral3Config, MinistralConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config,
                          SmolLM3Config)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from common import GOLDENS, batch, forward, fresh, load, make_adapter, random_model, run, seed_of, write

GENERATED = 8
MARGIN = 1e-2
TOKENS = dict(vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=None)  # transformers freezes a padding row
SIZES = TOKENS | dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=512)
SMALL = SIZES | dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
GEMMA = SIZES | dict(num_attention_heads=2, num_key_value_heads=1, head_dim=12, sliding_window=5, query_pre_attn_scalar=20)
GEMMA3_LAYERS = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
GPT2 = TOKENS | dict(n_positions=32, n_embd=32, n_head=4, n_inner=24)
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.3, 1.7],
                long_factor=[1.2, 2.5, 6.0, 11.0])
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=512)  # the ramp is 1 to 8 of 8


@dataclass
class Case:
    config: PreTrainedConfig
    adapters: dict = field(default_factory=dict)  # <case>_<key> -> LoraConfig's arguments
    prompt: int = 8  # its length
    dtype: torch.dtype = torch.float32  # of the file
    shard: str = "1GB"  # largest file
    file_config: dict = field(default_factory=dict)  # written over config.json


def lora(two, **more):
    """An adapter on everything, one on the linears named, and more."""
    settings = {"lora_all": dict(target_modules="all-linear"), "lora_two": dict(target_modules=two)} | more
    return {name: dict(r=2, lora_alpha=4) | arguments for name, arguments in settings.items()}


CASES = {
    "qwen2": Case(
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        lora(["k_proj", "gate_proj"], lora_save_bias=dict(target_modules=["q_proj", "down_proj"], modules_to_save=["k_proj"]))),
    "qwen2_window": Case(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": Case(Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True), lora(["v_proj", "up_proj"])),
    "qwen3_untied": Case(Qwen3Config(**SMALL, head_dim=12, attention_bias=True)),
    "smollm3": Case(
        SmolLM3Config(**SIZES | dict(num_hidden_layers=4, intermediate_size=16), no_rope_layers=[1, 0, 1, 0],
                      use_sliding_window=True, sliding_window=5,
                      layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"]),
        lora(["q_proj", "up_proj"])),
    "gemma": Case(GemmaConfig(**{k: GEMMA[k] for k in [*SIZES, "head_dim"]}), lora(["o_proj", "down_proj"])),
    "gemma2": Case(Gemma2Config(**GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=4.0), lora(["q_proj", "gate_proj"])),
    "gemma3": Case(
        Gemma3TextConfig(**GEMMA | dict(num_hidden_layers=6, intermediate_size=16),
                         rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e6),
                                              sliding_attention=dict(rope_type="default", rope_theta=1e4))),
        lora(["k_proj", "up_proj"])),
    "gemma3_wrapped": Case(
        Gemma3Config(text_config=GEMMA | GEMMA3_LAYERS | dict(
            rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                                 sliding_attention=dict(rope_type="default", rope_theta=1e4))),
            vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14,
                               patch_size=14, vision_use_head=False),
            mm_tokens_per_image=1, boi_token_index=93, eoi_token_index=94, image_token_index=95),
        dict(lora_two=dict(r=2, lora_alpha=4, target_modules=r".*language_model.*\.(q|down)_proj"))),
    "phi3": Case(Phi3Config(**SIZES), lora(["qkv_proj", "down_proj"])),
    "phi3_window": Case(Phi3Config(**SMALL, sliding_window=5)),
    "phi3_longrope": Case(
        Phi3Config(**SIZES | dict(max_position_embeddings=64), original_max_position_embeddings=16, rope_parameters=LONGROPE),
        prompt=20),
    "phi3_partial": Case(
        Phi3Config(**SMALL | dict(max_position_embeddings=64), original_max_position_embeddings=16, tie_word_embeddings=True,
                   rope_parameters=LONGROPE | dict(partial_rotary_factor=0.75, short_factor=[1.0, 1.2, 1.5],
                                                   long_factor=[1.5, 4.0, 9.0]))),
    "gpt2": Case(GPT2Config(**GPT2, n_layer=2), lora(["c_attn", "c_fc"])),
    "gpt2_scaled": Case(GPT2Config(**GPT2, n_layer=2, scale_attn_by_inverse_layer_idx=True)),
    "bloom": Case(BloomConfig(**TOKENS, hidden_size=24, n_layer=2, n_head=12), lora(["query_key_value", "dense_4h_to_h"])),
    "ministral": Case(
        MinistralConfig(**SIZES, head_dim=12, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
        lora(["v_proj", "down_proj"])),
    "ministral3": Case(
        Ministral3Config(**SIZES | dict(max_position_embeddings=64), head_dim=12, rope_parameters=YARN | dict(
            original_max_position_embeddings=16, beta_fast=1.0, beta_slow=0.1, mscale=1.0, mscale_all_dim=1.0,
            llama_4_scaling_beta=0.1)),
        lora(["q_proj", "up_proj"]), prompt=20),
    "rope_yarn": Case(LlamaConfig(**SMALL | dict(max_position_embeddings=2048), head_dim=16, rope_parameters=YARN)),
    "rope_yarn_settings": Case(LlamaConfig(**SMALL | dict(max_position_embeddings=2048), head_dim=16, rope_parameters=YARN | dict(
        beta_fast=16.0, beta_slow=2.0, mscale=1.2, mscale_all_dim=0.8, truncate=False))),
    "rope_dynamic": Case(LlamaConfig(**SMALL | dict(max_position_embeddings=16), rope_parameters=dict(
        rope_type="dynamic", factor=4.0, rope_theta=10000.0))),
    "llama_tied_flag_untied_file": Case(LlamaConfig(**SMALL), file_config=dict(tie_word_embeddings=True)),
    "qwen2_bf16": Case(Qwen2Config(**SMALL), dtype=torch.bfloat16),
    "qwen2_f16": Case(Qwen2Config(**SMALL, tie_word_embeddings=True), dtype=torch.float16),
    "gemma3_bf16": Case(  # sqrt(40) in bf16 is 6.3125, off by 1.9e-3
        Gemma3TextConfig(**GEMMA | GEMMA3_LAYERS | dict(hidden_size=40)), dtype=torch.bfloat16),
    "qwen3_sharded": Case(Qwen3Config(**SMALL, head_dim=12), shard="8KB"),
}


def save_model(folder, case, seed):
    random_model(case.config, seed).to(case.dtype).save_pretrained(folder, max_shard_size=case.shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.file_config:
        config = json.loads((folder / "config.json").read_text()) | case.file_config
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def generate(model, seed, length):
    """A prompt, and what follows it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        ids = prompt = torch.randint(0, TOKENS["vocab_size"], (length,), generator=generator)
        margin = float("inf")
        for _ in range(GENERATED):
            best = forward(model, ids)[-1].topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            ids = torch.cat([ids, best.indices[:1]])
        generated = ids[length:]
        if margin > MARGIN and len(set(generated.tolist())) > 2:
            break
    else:
        raise AssertionError("no prompt gives a clear answer")
    model.generation_config.eos_token_id = None
    cached = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=GENERATED,
                            do_sample=False)[0]
    assert torch.equal(cached, ids), "with the cache transformers generates something else"
    return prompt, generated, margin


def make_case(name, case):
    folder, seed = fresh(GOLDENS / name), seed_of(name)
    save_model(folder, case, seed)
    model = load(name)
    for module in model.modules():
        if hasattr(module, "embed_scale"):  # transformers rounds it to the weights' type
            module.embed_scale = module.embed_scale.to(case.dtype)
    ids, labels = batch(TOKENS["vocab_size"], seed)
    logits, loss = run(model, ids, labels)
    grads = {n: p.grad for n, p in model.named_parameters() if "vision_tower" not in n and "multi_modal" not in n}
    assert all(grad.abs().max() > 1e-5 for grad in grads.values())
    prompt, generated, margin = generate(model, seed, case.prompt)
    write(folder / "golden.safetensors", ids, labels, logits, loss, grads, prompt=prompt, generated=generated)
    print(f"{name}: loss {loss.item():.4f}, {len(grads)} gradients, logits up to {logits.abs().max():.2f}, "
          f"margin {margin:.3f}, generated {generated.tolist()}")
    conv = any(isinstance(module, Conv1D) for module in model.modules())
    for key, arguments in case.adapters.items():
        make_adapter(f"{name}_{key}", name, arguments | dict(fan_in_fan_out=conv), seed_of(f"{name}_{key}"))


if __name__ == "__main__":
    logging.disable_progress_bar()
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)
    for name in sys.argv[1:] or CASES:
        make_case(name, CASES[name])
