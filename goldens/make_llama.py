"""Makes the Llama-family goldens in crates/retune-model/tests/goldens: small random models, PEFT adapters, and what
transformers + peft compute with them in float64.

    python goldens/make_llama.py            (torch, transformers, peft, safetensors)
"""

import json
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from common import GOLDENS, batch, float64_inside, fresh, make_adapter, randomise, run, write

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
    "mistral_lora_all": ("mistral_window", dict(r=2, lora_alpha=4, target_modules="all-linear")),
}


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
