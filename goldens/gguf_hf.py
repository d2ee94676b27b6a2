"""What the GGUF goldens share: a GGUF file's weights (llama, gemma3) and tokenizer as transformers and tokenizers have them."""

import torch
from gguf import TokenType, quants
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

INNER = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GEMMA3_INNER = INNER | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
                        "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
                        "post_ffw_norm": "post_feedforward_layernorm"}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def permute(weight, heads):
    """Rows of q or k from transformers' order (halves) to llama.cpp's (interleaved), as its converter does."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight, heads):
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def field(reader, key, default=None):
    found = reader.get_field(key)
    return default if found is None else found.contents()


def weights(reader):
    """State dict of the LlamaForCausalLM or Gemma3ForCausalLM in the file, dequantized to float32 (a tied head is left out)."""
    gemma3 = field(reader, "general.architecture") == "gemma3"
    inner, heads = GEMMA3_INNER if gemma3 else INNER, {}
    if not gemma3:
        heads = {"attn_q": field(reader, "llama.attention.head_count"), "attn_k": field(reader, "llama.attention.head_count_kv")}
    state = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        if name == "rope_freqs":
            continue
        value = quants.dequantize(tensor.data, tensor.tensor_type)
        if name in OUTER:
            name = OUTER[name]
        else:
            _, layer, kind = name.split(".")
            value = unpermute(value, heads[kind]) if kind in heads else value
            name = f"model.layers.{layer}.{inner[kind]}"
        if gemma3 and name.endswith("norm"):  # llama.cpp's converter adds the 1 of 1 + weight
            value = value - 1
        state[f"{name}.weight"] = torch.from_numpy(value.copy())
    return state


def bytes_to_unicode():
    """GPT-2's printable stand-in of each byte, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return dict(zip(printable + rest, map(chr, printable + [256 + i for i in range(len(rest))])))


def build_tokenizer(reader):
    """Byte-level BPE with the pre-tokenizer that tokenizer.ggml.pre names, as the original tokenizer.json has it."""
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in field(reader, "tokenizer.ggml.merges")]
    pre = field(reader, "tokenizer.ggml.pre")
    llama3 = pre == "llama-bpe"
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=llama3))
    if llama3:
        first = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    else:
        assert pre == "smollm", pre
        first = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=not llama3)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    special = [t for t, kind in zip(tokens, types) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer
