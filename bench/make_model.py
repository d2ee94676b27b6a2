"""Makes a model of random weights in a well-known shape, for measuring speed and memory at sizes that nobody has to download.

    python bench/make_model.py --shape 1.1b --form bf16 --tokenizer DIR --out DIR
    python bench/make_model.py --shape 7b --form q8_0 --tokenizer MODEL.gguf --out FILE.gguf

Shapes: SmolLM2-360M, TinyLlama-1.1B and Llama-2-7B, all with SmolLM2's vocabulary, whose tokenizer is copied from --tokenizer:
a Hugging Face directory for the forms bf16 and f32 (safetensors), a GGUF file for q8_0 (GGUF, needs the gguf package). Weights
have deviation 0.02, norms are 1: losses start a little above that of guessing. No more than one tensor is in memory.
"""

import argparse
import json
import shutil
from math import prod
from pathlib import Path

import numpy

VOCABULARY = 49152
CONTEXT, ROPE_THETA, NORM_EPSILON = 8192, 100000.0, 1e-5
DEVIATION = 0.02
SHAPES = {
    "360m": dict(hidden=960, layers=32, heads=15, key_value_heads=5, mlp=2560, tied=True),
    "1.1b": dict(hidden=2048, layers=22, heads=32, key_value_heads=4, mlp=5632, tied=False),
    "7b": dict(hidden=4096, layers=32, heads=32, key_value_heads=32, mlp=11008, tied=False),
}
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
                   "chat_template.jinja"]
# transformers' name, llama.cpp's name
OUTER_NAMES = {"embed_tokens": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm"),
               "lm_head": ("lm_head", "output")}
LAYER_NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
               "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
               "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
CHUNK = 1 << 22  # values made at a time
BLOCK = numpy.dtype([("scale", "<f2"), ("values", "i1", 32)])  # of Q8_0
UNIFORM_DEVIATION = ((255**2 - 1) / 12) ** 0.5  # of whole numbers from -127 to 127


def tensors(shape):
    """(transformers' name, llama.cpp's name, [rows, cols] or [n]) of every tensor."""
    hidden, mlp = shape["hidden"], shape["mlp"]
    key_value = hidden // shape["heads"] * shape["key_value_heads"]
    sizes = {"q_proj": [hidden, hidden], "k_proj": [key_value, hidden], "v_proj": [key_value, hidden],
             "o_proj": [hidden, hidden], "gate_proj": [mlp, hidden], "up_proj": [mlp, hidden], "down_proj": [hidden, mlp]}
    outer = {"embed_tokens": [VOCABULARY, hidden], "norm": [hidden]}
    outer |= {} if shape["tied"] else {"lm_head": [VOCABULARY, hidden]}
    found = [(*OUTER_NAMES[name], size) for name, size in outer.items()]
    for layer in range(shape["layers"]):
        found += [(f"model.layers.{layer}.{theirs}", f"blk.{layer}.{stored}", sizes.get(theirs.split(".")[-1], [hidden]))
                  for theirs, stored in LAYER_NAMES.items()]
    return [(f"{theirs}.weight", f"{stored}.weight", size) for theirs, stored, size in found]


# safetensors


def bf16(values):
    """The upper halves of f32 values, rounded to nearest, ties to even."""
    bits = values.view(numpy.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(numpy.uint16)


def chunks(rng, size):
    """The values of a tensor in f32, a piece at a time: ones for a norm, normal values for a matrix."""
    for start in range(0, prod(size), CHUNK):
        count = min(CHUNK, prod(size) - start)
        if len(size) == 1:
            yield numpy.ones(count, numpy.float32)
        else:
            yield rng.standard_normal(count, numpy.float32) * numpy.float32(DEVIATION)


def write_hugging_face(shape, form, tokenizer, out):
    out.mkdir(parents=True)
    for file in TOKENIZER_FILES:
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, out / file)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "hidden_size": shape["hidden"], "intermediate_size": shape["mlp"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["key_value_heads"],
        "head_dim": shape["hidden"] // shape["heads"], "hidden_act": "silu", "rms_norm_eps": NORM_EPSILON,
        "max_position_embeddings": CONTEXT, "rope_theta": ROPE_THETA, "rope_scaling": None,
        "tie_word_embeddings": shape["tied"], "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "dtype": "bfloat16" if form == "bf16" else "float32",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, _, size in tensors(shape):
        start, end = end, end + prod(size) * (2 if form == "bf16" else 4)
        header[name] = {"dtype": form.upper(), "shape": size, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    rng = numpy.random.default_rng(0)
    with (out / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, _, size in tensors(shape):
            for values in chunks(rng, size):
                (bf16(values) if form == "bf16" else values).tofile(file)


# GGUF


def q8_0(rng, rows, cols):
    """The bytes of a random matrix, [rows, bytes of a row]: whole numbers from -127 to 127, one scale for all blocks."""
    blocks = numpy.empty((rows, cols // 32), BLOCK)
    blocks["scale"] = DEVIATION / UNIFORM_DEVIATION
    for some in blocks:
        some["values"] = rng.integers(-127, 128, (cols // 32, 32), numpy.int8)
    return blocks.view(numpy.uint8)


def write_gguf(shape, tokenizer, out):
    import gguf

    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(out.stem)
    writer.add_block_count(shape["layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape["hidden"])
    writer.add_feed_forward_length(shape["mlp"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["key_value_heads"])
    writer.add_rope_dimension_count(shape["hidden"] // shape["heads"])
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for field in gguf.GGUFReader(tokenizer).fields.values():
        if field.name.startswith("tokenizer."):
            kind, element = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), kind, element)
    # A matrix's sizes are told as those of its bytes.
    for _, name, size in tensors(shape):
        if len(size) == 1:
            writer.add_tensor_info(name, size, numpy.dtype(numpy.float32), 4 * size[0])
        else:
            row = size[1] // 32 * BLOCK.itemsize
            writer.add_tensor_info(name, [size[0], row], numpy.dtype(numpy.uint8), size[0] * row, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = numpy.random.default_rng(0)
    for _, _, size in tensors(shape):
        writer.write_tensor_data(numpy.ones(size, numpy.float32) if len(size) == 1 else q8_0(rng, *size))
    writer.close()


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=list(SHAPES), required=True)
    options.add_argument("--form", choices=["bf16", "f32", "q8_0"], required=True)
    options.add_argument("--tokenizer", type=Path, required=True, help="a Hugging Face directory, or for q8_0 a GGUF file")
    options.add_argument("--out", type=Path, required=True, help="a directory, or for q8_0 a file; must not exist yet")
    args = options.parse_args()
    shape = SHAPES[args.shape]
    if args.out.exists():
        options.error(f"{args.out} exists")
    needed = args.tokenizer if args.form == "q8_0" else args.tokenizer / "tokenizer.json"
    if not needed.is_file():
        options.error(f"{needed} is not a file")
    if args.form == "q8_0":
        write_gguf(shape, args.tokenizer, args.out)
        written = args.out
    else:
        write_hugging_face(shape, args.form, args.tokenizer, args.out)
        written = args.out / "model.safetensors"
    parameters = sum(prod(size) for _, _, size in tensors(shape))
    print(f"{args.out}: {parameters / 1e6:,.0f} M parameters, {written.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
