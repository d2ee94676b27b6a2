"""Makes the GGUF goldens: single blocks of every supported type, read and written, and two tiny whole llama files.

    python goldens/make_gguf.py             (torch, transformers, gguf, safetensors)

crates/retune-quant/tests/goldens/gguf_blocks.safetensors: <TYPE>.bytes (uint8 [rows, bytes a row]) and <TYPE>.values
(float32 [rows, columns]) as the gguf package dequantizes them, to be matched bit for bit.
crates/retune-quant/tests/goldens/gguf_encoded.safetensors: values (float32 [rows, columns]) and <TYPE>.bytes, what the package makes of them.
crates/retune-model/tests/goldens/gguf_llama{,_rope_freqs}/: model.gguf, golden.safetensors (as make_llama.py's, without
gradients) computed by transformers on the dequantized weights, and tokens.jsonl ({"text", "ids"}).
"""

import json

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, LlamaFileType, TokenType, quants
from gguf.constants import GGML_QUANT_SIZES
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from common import GOLDENS, batch, float64_inside, fresh, run, write
from gguf_hf import bytes_to_unicode, build_tokenizer, permute, weights

# type -> offsets of the f16 scales in its block
SCALES = {Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0], Type.Q2_K: [80, 82],
          Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208], Type.IQ4_NL: [0], Type.IQ4_XS: [0], Type.MXFP4: []}
ENCODED = [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
QUANT = GOLDENS.parents[2] / "retune-quant" / "tests" / "goldens"
EDGES = np.array([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 5.9e-5, 1.0, -1.0, 65504.0, -65504.0], np.float16)


def random_f16(rng, n):
    """Finite values of either sign and every magnitude, with zeros, subnormals and the largest among them."""
    values = rng.integers(0, 0x7C00, n).astype(np.uint16) | (rng.integers(0, 2, n) << 15).astype(np.uint16)
    edges = rng.integers(0, 4, n) == 0
    return np.where(edges, rng.choice(EDGES, n).view(np.uint16), values).view(np.float16)


def make_blocks():
    rng = np.random.default_rng(0)
    tensors = {}
    for kind, offsets in SCALES.items():
        columns, size = GGML_QUANT_SIZES[kind]
        rows, blocks = 6, 4 if columns == 32 else 2
        data = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
        for offset in offsets:
            data[:, offset:offset + 2] = random_f16(rng, len(data)).view(np.uint8).reshape(-1, 2)
        if kind == Type.MXFP4:
            data[:, 0] = np.minimum(data[:, 0], 250)  # beyond it twelve times the scale is infinite
            data[:3, 0] = [0, 1, 2]
        tensors[f"{kind.name}.bytes"] = data.reshape(rows, blocks * size)
    tensors["F16.bytes"] = random_f16(rng, 6 * 40).view(np.uint8).reshape(6, 80)
    bf16 = rng.integers(0, 0x7F80, 6 * 40).astype(np.uint16) | (rng.integers(0, 2, 6 * 40) << 15).astype(np.uint16)
    bf16[:4] = [0, 0x8000, 1, 0x807F]
    tensors["BF16.bytes"] = bf16.view(np.uint8).reshape(6, 80)
    for name, data in list(tensors.items()):
        kind = Type[name.split(".")[0]]
        values = quants.dequantize(data, kind)
        assert values.dtype == np.float32 and np.isfinite(values).all()
        tensors[f"{kind.name}.values"] = values
    QUANT.mkdir(parents=True, exist_ok=True)
    save_file(tensors, QUANT / "gguf_blocks.safetensors")


def make_encoded():
    """Rows as weights are, and rows that are not: constant, zero, tiny, huge, of one sign, with an outlier, with ties."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((40, 64), np.float32) * np.float32(0.05)
    rows[1] = 0
    rows[2] = 0.25
    rows[3] = -0.0
    rows[4] *= np.float32(1e-7)
    rows[5] *= np.float32(3e5)
    rows[6] = abs(rows[6])
    rows[7] = -abs(rows[7])
    rows[8, 17] = 9
    rows[9, 40] = -9
    rows[10] = np.arange(-32, 32)  # ties: the first of the greatest counts
    rows[11] = np.where(np.arange(64) % 2, 0.5, -0.5)
    rows[12] = np.arange(64) / 2
    rows[13, :32] = 0
    tensors = {f"{kind.name}.bytes": quants.quantize(rows, kind).view(np.uint8).reshape(len(rows), -1) for kind in ENCODED}
    save_file(tensors | {"values": rows}, QUANT / "gguf_encoded.safetensors")


SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=288,
             max_position_embeddings=512, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=128)
TYPES = {"token_embd": Type.Q8_0, "output": Type.BF16, "attn_q": Type.Q8_0, "attn_k": Type.Q4_1, "attn_v": Type.F16,
         "attn_output": Type.Q4_0, "ffn_gate": Type.Q4_1, "ffn_up": Type.Q5_0, "ffn_down": Type.Q5_1}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ t", "Ġt he", "i n", "r e", "o n", "Ġ a", "Ġa n", "n d", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "e r", "l l", "' s", "1 2",
          "12 3", "ç §", "Ġ o", "Ġo f", "in g", "a t", "i o", "io n", "t i", "ti on", "s t", "Ġ s", "Ġan d"]
TEXTS = ["", "the sand of time", "I'll sing 12345 things", "<|im_start|>user\nhe's\n\n    on<|im_end|>\n", "Ünïcode 私 🦀", "a\t\x00 b"]


def gguf_tensors(model):
    """llama.cpp's names and numpy values of a transformers llama, the rows of q and k permuted as its converter does."""
    config = model.config
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        name, value = name.removesuffix(".weight"), parameter.detach().numpy()
        if name in outer:
            yield outer[name], value
        else:
            _, _, layer, rest = name.split(".", 3)
            kind = inner[rest]
            yield f"blk.{layer}.{kind}", permute(value, heads[kind]) if kind in heads else value


def make_llama(case, config, pre, seed):
    folder = fresh(GOLDENS / case)
    rng = np.random.default_rng(seed)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        noise = torch.from_numpy(0.2 * rng.standard_normal(parameter.shape, np.float32))
        parameter.data = 1 + noise if "norm" in name else noise
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_type("model")
    writer.add_name(case)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    if not config.tie_word_embeddings:  # as newer converters do
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(2)
    tokens = SPECIAL + list(bytes_to_unicode().values()) + [m.replace(" ", "") for m in MERGES]
    assert len(tokens) == len(set(tokens)) == config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
                             "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    for name, value in gguf_tensors(model):
        kind = TYPES.get(name.split(".")[-1], Type.F32)
        writer.add_tensor(f"{name}.weight", quants.quantize(value, kind), raw_dtype=kind)
    if config.rope_parameters["rope_type"] == "llama3":
        plain = 10000.0 ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = plain / model.model.rotary_emb.inv_freq.double().numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
        print(f"{case}: rope_freqs {factors.round(4).tolist()}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = GGUFReader(folder / "model.gguf")
    model.load_state_dict(weights(reader), strict=not config.tie_word_embeddings)
    ids, labels = batch(config.vocab_size, seed)
    logits, loss = run(model, ids, labels)
    write(folder / "golden.safetensors", ids, labels, logits, loss)
    tokenizer = build_tokenizer(reader)
    lines = [json.dumps({"text": t, "ids": tokenizer.encode(t).ids}, ensure_ascii=False) for t in TEXTS]
    (folder / "tokens.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{case}: loss {loss.item():.4f}")


if __name__ == "__main__":
    float64_inside(modeling_llama)
    make_blocks()
    make_encoded()
    make_llama("gguf_llama", LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=True,
                                         attn_implementation="eager"), "smollm", 0)
    make_llama("gguf_llama_rope_freqs", LlamaConfig(**SIZES, num_hidden_layers=1, rope_parameters=LLAMA3,
                                                    attn_implementation="eager"), "llama-bpe", 1)
