"""Makes the goldens of bitsandbytes' 4-bit storage: single matrices, and two tiny Llama directories as transformers saves them.

    python goldens/make_bitsandbytes.py     (bitsandbytes 0.50.2 on the CPU, torch, transformers, safetensors)

A value is code[index] * absmax[block], here in float32 by NumPy. bitsandbytes' own dequantize_4bit is held against it where a row is whole
blocks or has an odd length: elsewhere that version's CPU kernel starts a new block with every row, which its quantizer does not.

crates/retune-quant/tests/goldens/bitsandbytes.safetensors, for each case named by its quant_type first:
  <case>.weight, .absmax, .quant_map (and .nested_absmax, .nested_quant_map)   as a checkpoint holds them after the weight's name
  <case>.sizes             [4] int64: rows, columns, blocksize, nested_blocksize (0 where absmax is not quantized)
  <case>.nested_offset     [1] float32
  <case>.values            float32 [rows, columns], to be matched bit for bit
crates/retune-model/tests/goldens/bnb_*/: config.json and model.safetensors as transformers saves them; golden.safetensors holds the values
of every matrix that is stored in 4 bits, under its name.
"""

import json
import tempfile

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from common import GOLDENS, fresh

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
MODELS = {
    "bnb_nf4_double": dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb_fp4_in_bf16": dict(bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=torch.bfloat16),
}


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


def make_model(case, settings, seed):
    folder = fresh(GOLDENS / case)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise if "norm" in name else noise
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
        quantized = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32,
                                                         device_map={"": "cpu"})
        quantized.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert "tmp" not in (folder / "config.json").read_text()

    golden = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    states = [key for key in stored if ".quant_state." in key]
    for key in states:
        name = key.split(".quant_state.")[0]
        parts = {k.removeprefix(name + "."): v for k, v in stored.items() if k.startswith(name + ".")}
        description = json.loads(bytes(stored[key].tolist()))
        found = values(as_numpy(stored[name]).ravel(), QuantState.from_dict(parts, torch.device("cpu")))
        assert list(found.shape) == description["shape"]
        golden[name] = found
    assert len(golden) == 7, sorted(golden)
    save_file(golden, folder / "golden.safetensors")
    print(f"{case}: {description}")


if __name__ == "__main__":
    make_matrices()
    for seed, (case, settings) in enumerate(MODELS.items()):
        make_model(case, settings, seed)
