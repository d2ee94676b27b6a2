"""Makes the goldens of bitsandbytes' storage: single matrices, and tiny directories as transformers saves them.

    python goldens/make_bitsandbytes.py     (bitsandbytes 0.50.2 on the CPU, torch, transformers, safetensors)

A value is code[index] * absmax[block], here in float32 by NumPy. bitsandbytes' own dequantize_4bit is held against it where a row is whole
blocks or has an odd length: elsewhere that version's CPU kernel starts a new block with every row, which its quantizer does not.

crates/retune-quant/tests/goldens/bitsandbytes.safetensors, for each case named by its quant_type first:
  <case>.weight, .absmax, .quant_map (and .nested_absmax, .nested_quant_map)   as a checkpoint holds them after the weight's name
  <case>.sizes             [4] int64: rows, columns, blocksize, nested_blocksize (0 where absmax is not quantized)
  <case>.nested_offset     [1] float32
  <case>.values            float32 [rows, columns], to be matched bit for bit
crates/retune-quant/tests/goldens/bitsandbytes_encoding.safetensors, made of matrices of all kinds (random, constant, tiny, huge, zero, values in
the middle of two codes; last blocks that are shorter), for each case and both codes:
  <case>.values            float32 or bfloat16 [rows, columns], what is quantized, in blocks of 64
  <case>.<code>.weight, .absmax                   what bitsandbytes makes of it
  <case>.nested.absmax, .nested_absmax, .offset   the same magnitudes with double quantization
  <case>.int8.weight, .int8.SCB                   LLM.int8() of the values in float16, where they are in its range
  magnitudes.absmax, .codes, .scales, .offset     4,100 magnitudes and what double quantization makes of them
crates/retune-model/tests/goldens/bnb_*/: config.json and model.safetensors as transformers saves them; golden.safetensors holds the values
of every matrix that is stored in 4 or 8 bits, under its name, as [out, in]; bases of adapters have none.
crates/retune-model/tests/goldens/nf4_*/: LoRA over such a base, as common.py says of adapter cases; the reference is peft over the plain
model that has the dequantized weights.
"""

import json
import sys
import tempfile

import numpy as np
import torch
from bitsandbytes.functional import (QuantState, dequantize_4bit, get_4bit_type, int8_vectorwise_quant, quantize_4bit,
                                     quantize_blockwise)
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from peft import LoraConfig
from transformers import (AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Gemma3TextConfig, GPT2Config, LlamaConfig)

from common import GOLDENS, adapter_case, float64_inside, fresh, seed_of

# case -> quant_type, rows, columns, blocksize, whether absmax is quantized
MATRICES = {
    "nf4": ("nf4", 6, 128, 64, False),
    "nf4_straddling": ("nf4", 9, 80, 64, False),
    "nf4_odd": ("nf4", 7, 33, 32, False),
    "nf4_nested": ("nf4", 24, 80, 64, True),
    "nf4_nested_twice": ("nf4", 97, 90, 32, True),  # 273 blocks: absmax has two blocks of its own
    "fp4": ("fp4", 5, 96, 32, False),
    "fp4_nested": ("fp4", 11, 70, 128, True),
}
SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             vocab_size=32, max_position_embeddings=64, rms_norm_eps=1e-5)
NF4 = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")
FP4 = NF4 | dict(bnb_4bit_quant_type="fp4")
DOUBLE = NF4 | dict(bnb_4bit_use_double_quant=True)
# case -> configuration, settings of the storage, number of matrices stored so
MODELS = {
    "bnb_nf4_double": (LlamaConfig(**SIZES), DOUBLE, 7),
    "bnb_fp4_in_bf16": (LlamaConfig(**SIZES), FP4 | dict(bnb_4bit_quant_storage=torch.bfloat16), 7),
    "bnb_int8": (LlamaConfig(**SIZES), dict(load_in_8bit=True), 7),
    "bnb_gpt2": (GPT2Config(n_embd=24, n_head=2, n_layer=1, n_positions=64, vocab_size=32), DOUBLE, 4),
    "bnb_llama": (LlamaConfig(**SIZES | dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, vocab_size=96)), DOUBLE, 14),
    "bnb_gemma3": (Gemma3TextConfig(**SIZES | dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, vocab_size=96),
                                    head_dim=16, sliding_window=5, layer_types=["sliding_attention", "full_attention"]), NF4, 14),
}
# case of an adapter -> its base
ADAPTERS = {"nf4_llama_lora": "bnb_llama", "nf4_gemma3_lora": "bnb_gemma3"}


def values(packed, state):
    """The float32 values of a matrix, from the bytes of its indices and its QuantState."""
    absmax = state.absmax.numpy()
    if state.nested:
        blocks = np.arange(len(absmax)) // state.state2.blocksize
        absmax = state.state2.code.numpy()[absmax] * state.state2.absmax.numpy()[blocks] + state.offset.numpy()
    rows, columns = state.shape
    indices = np.stack([packed >> 4, packed & 15], 1).ravel()[:rows * columns]
    found = state.code.numpy()[indices] * absmax[np.arange(rows * columns) // state.blocksize]
    assert found.dtype == np.float32 and np.isfinite(found).all()
    return found.reshape(rows, columns)


def as_numpy(tensor):
    return tensor.contiguous().view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def make_matrices():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for case, (quant_type, rows, columns, blocksize, nested) in MATRICES.items():
        # Rows of different magnitude: a block taken for its neighbour shows.
        weight = torch.randn(rows, columns, generator=generator) * torch.linspace(0.1, 3, rows)[:, None]
        packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
        found = values(packed.numpy().ravel(), state)
        assert np.abs(found - weight.numpy()).max() < 0.3 * np.abs(weight.numpy()).max(), case
        if columns % blocksize == 0 or columns % 2:
            assert np.array_equal(dequantize_4bit(packed, state).numpy(), found), case
        for key, tensor in state.as_dict(packed=True).items():
            if not key.startswith("quant_state."):
                tensors[f"{case}.{key}"] = tensor.numpy()
        nested_blocksize = state.state2.blocksize if nested else 0
        tensors[f"{case}.sizes"] = np.array([rows, columns, blocksize, nested_blocksize])
        tensors[f"{case}.nested_offset"] = state.offset.numpy().reshape(1) if nested else np.zeros(1, np.float32)
        tensors[f"{case}.weight"] = packed.numpy()
        tensors[f"{case}.values"] = found
    folder = GOLDENS.parents[2] / "retune-quant" / "tests" / "goldens"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "bitsandbytes.safetensors")


def between():
    """Blocks that begin with 1 and go on with the values in the middle of two codes and their neighbours."""
    rows = []
    for quant_type in ("nf4", "fp4"):
        code = np.sort(get_4bit_type(quant_type, device="cpu").numpy())
        middles = ((code[1:] + code[:-1]) / np.float32(2)).astype(np.float32)
        values = [np.ones(1, np.float32)]
        values += [np.nextafter(middles, np.float32(towards)) for towards in (-2, 2)] + [middles]
        rows.append(np.pad(np.concatenate(values).astype(np.float32), (0, 64 - 46)))
    return torch.from_numpy(np.stack(rows))


def divided_or_multiplied():
    """A block that begins with its greatest magnitude and goes on with values whose code depends on whether they are divided by that or
    multiplied by its reciprocal."""
    generator = np.random.default_rng(0)
    middles = {}
    for quant_type in ("nf4", "fp4"):
        code = np.sort(get_4bit_type(quant_type, device="cpu").numpy())
        middles[quant_type] = ((code[1:] + code[:-1]) / np.float32(2)).astype(np.float32)
    while True:
        largest = np.float32(generator.uniform(0.5, 2))
        found = [largest]
        for bounds in middles.values():
            for start in (bounds * largest).astype(np.float32):
                for value in (start, np.nextafter(start, np.float32(9)), np.nextafter(start, np.float32(-9))):
                    divided, multiplied = value / largest, value * (np.float32(1) / largest)
                    if np.searchsorted(bounds, divided) != np.searchsorted(bounds, multiplied):
                        found.append(value)
        if len(found) > 4:
            return torch.from_numpy(np.array(found, np.float32))


def make_encodings():
    generator = torch.Generator().manual_seed(1)

    def random(rows, columns):
        return torch.randn(rows, columns, generator=generator) * torch.linspace(0.1, 3, rows)[:, None]

    kinds = [0.05 * torch.ones(64), torch.zeros(64), 1e-39 * torch.randn(64, generator=generator),
             torch.full((64,), 1e-45), 3e38 * (2 * torch.rand(64, generator=generator) - 1), -0.3 * torch.ones(64)]
    tensors = {}
    for case, weight in {
        "random": random(6, 128), "straddling": random(9, 80), "odd": random(7, 33), "short": random(3, 5),
        "one": random(1, 1), "kinds": torch.stack(kinds), "kinds_short": torch.cat([*kinds, torch.zeros(7)])[None],
        "tiny_short": torch.cat([torch.ones(64), torch.full((9,), 1e-45)])[None], "between": between(),
        "divided": torch.cat([torch.ones(64), divided_or_multiplied()])[None],
        "multiplied": torch.nn.functional.pad(divided_or_multiplied(), (0, 64))[:64][None],
        "constant": 0.05 * torch.ones(8, 64), "zero": torch.zeros(8, 64), "wide": random(97, 110).bfloat16(),
    }.items():
        tensors[f"{case}.values"] = weight
        for quant_type in ("nf4", "fp4"):
            packed, state = quantize_4bit(weight, blocksize=64, quant_type=quant_type)
            tensors |= {f"{case}.{quant_type}.weight": packed, f"{case}.{quant_type}.absmax": state.absmax}
        if "kinds" not in case:  # whose values no float16 holds
            tensors[f"{case}.int8.weight"], tensors[f"{case}.int8.SCB"], _ = int8_vectorwise_quant(weight.half())
        nested = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
        assert torch.equal(nested.offset, state.absmax.mean()) and nested.state2.blocksize == 256
        tensors |= {f"{case}.nested.absmax": nested.absmax, f"{case}.nested.nested_absmax": nested.state2.absmax,
                    f"{case}.nested.offset": nested.offset.reshape(1)}
    absmax = torch.rand(4100, generator=generator)
    codes, state = quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    distances = ((absmax - absmax.mean()) / state.absmax.repeat_interleave(256)[:4100])[:, None] - state.code
    assert (codes != distances.abs().argmin(1)).any(), "codes that are not the nearest are wanted"
    tensors |= {"magnitudes.absmax": absmax, "magnitudes.codes": codes, "magnitudes.scales": state.absmax,
                "magnitudes.offset": absmax.mean().reshape(1)}
    folder = GOLDENS.parents[2] / "retune-quant" / "tests" / "goldens"
    save_torch({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "bitsandbytes_encoding.safetensors")


def stored_tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def dequantized(stored):
    """The values of the matrices that are stored in 4 or 8 bits, by their names."""
    found = {}
    for key in stored:
        if ".quant_state." in key:
            name = key.split(".quant_state.")[0]
            parts = {k.removeprefix(name + "."): v for k, v in stored.items() if k.startswith(name + ".")}
            description = json.loads(bytes(stored[key].tolist()))
            found[name] = values(as_numpy(stored[name]).ravel(), QuantState.from_dict(parts, torch.device("cpu")))
            assert list(found[name].shape) == description["shape"]
        elif key.endswith(".SCB"):
            name = key.removesuffix("SCB") + "weight"
            # As bitsandbytes multiplies them (`int8_vectorwise_dequant`).
            found[name] = (stored[name] * stored[key].view(-1, 1) * 7.874015718698502e-3).numpy()
            assert found[name].dtype == np.float32
    return found


def make_model(case, config, settings, count, seed):
    folder = fresh(GOLDENS / case)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = (0 if "gemma" in case else 1) + noise if "norm" in name or "ln_" in name else noise
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        quantized = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**settings),
                                                         dtype=torch.float32, device_map={"": "cpu"})
        quantized.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert "tmp" not in (folder / "config.json").read_text()
    golden = dequantized(stored_tensors(folder))
    assert len(golden) == count, sorted(golden)
    if case not in ADAPTERS.values():
        save_file({name: np.ascontiguousarray(found) for name, found in golden.items()}, folder / "golden.safetensors")
    print(f"{case}: {sorted(golden)}")


def load_dequantized(case):
    """The plain model of the values that a base's matrices stand for."""
    config = AutoConfig.from_pretrained(GOLDENS / case)
    del config.quantization_config
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    float64_inside(sys.modules[type(model).__module__])
    stored = stored_tensors(GOLDENS / case)
    found = {name: torch.from_numpy(np.array(found)) for name, found in dequantized(stored).items()}
    plain = {name: tensor for name, tensor in stored.items() if name in model.state_dict() and name not in found}
    missing, unexpected = model.load_state_dict(found | plain, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


if __name__ == "__main__":
    make_matrices()
    make_encodings()
    for seed, (case, (config, settings, count)) in enumerate(MODELS.items()):
        make_model(case, config, settings, count, seed)
    for case, base in ADAPTERS.items():
        config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules="all-linear")
        adapter_case(case, base, config, seed_of(case), load=load_dequantized)
