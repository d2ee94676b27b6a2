"""Makes the GGUF goldens of the families: small random models, turned into GGUF by llama.cpp's own converter.

    python goldens/make_families_gguf.py [--llama-cpp DIR] [CASE ...]   (torch, transformers, safetensors, sentencepiece)

DIR is llama.cpp's source; without it, that of the llama-cpp-python source distribution is downloaded with pip.
crates/retune-model/tests/goldens/gguf_<case>/:
  model.gguf           f32, with a vocabulary of 288 tokens that covers every byte
  golden.safetensors   as common.py says, without gradients: what transformers computes with the model that was converted
  config.json          that model's
T5's have a golden as make_t5.py says, a Unigram vocabulary, and texts.json: `texts`, their `ids` by transformers, and these `decoded`
without special tokens. t5 names its sentinels in a file, as older transformers write; flan_t5 does not, as the published models.
"""

import argparse
import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (BloomConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config, LlamaConfig, Ministral3Config,
                          MistralConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config, SmolLM3Config, T5Config)
from transformers.models.t5 import modeling_t5
from transformers.utils import logging

import make_t5
from common import GOLDENS, batch, float64_inside, fresh, load, random_model, run, seed_of, write

PACKAGE = "llama-cpp-python==0.3.36"
LENGTHS = [5, 12, 1]
TOKENS = dict(vocab_size=288, bos_token_id=1, eos_token_id=2, pad_token_id=None)
PLAIN = TOKENS | dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                      max_position_embeddings=64)
PHI3 = PLAIN | dict(original_max_position_embeddings=8)
SIZES = PLAIN | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
GEMMA = SIZES | dict(query_pre_attn_scalar=8, sliding_window=5)  # llama.cpp takes the head's width for the first
# llama.cpp takes distances to be told apart up to 128.
T5 = dict(vocab_size=288, d_model=16, d_ff=24, num_heads=2, relative_attention_num_buckets=8, relative_attention_max_distance=128,
          decoder_start_token_id=0, dropout_rate=0.0)
SPM = None
UNIGRAM = "unigram"
SPM_PIECES = ["▁", "e", "t", "a", "o", "i", "n", "s", "r", "h", "d", "l", "u", "c", "m", "f", "g", "y", "▁t", "he", "▁the", "in",
              "re", "an", "▁a", "on", "er", "nd", "▁and"]


@dataclass
class Case:
    config: PreTrainedConfig  # what llama.cpp makes of the file, too
    pre: str | None  # name of the byte-level BPE's pre-tokenizer, SPM or UNIGRAM
    old: dict = field(default_factory=dict)  # keys that the converter wants, or that do not reach the GGUF file


CASES = {
    "llama_f32": Case(LlamaConfig(**SIZES), "llama-bpe"),
    "mistral": Case(MistralConfig(**SIZES, sliding_window=None), SPM, dict(sliding_window=5)),
    "qwen2": Case(Qwen2Config(**PLAIN, tie_word_embeddings=True), "qwen2"),
    "qwen3": Case(Qwen3Config(**SIZES, tie_word_embeddings=True), "qwen2"),
    "smollm3": Case(SmolLM3Config(**PLAIN | dict(num_hidden_layers=4)), "llama-bpe"),
    "gemma": Case(GemmaConfig(**SIZES), SPM),
    "gemma2": Case(Gemma2Config(**GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=4.0), SPM),
    "gemma3": Case(Gemma3TextConfig(**GEMMA | dict(num_hidden_layers=7, intermediate_size=16)), SPM),
    "phi3": Case(Phi3Config(**PHI3), SPM),
    "phi3_window": Case(Phi3Config(**PHI3, sliding_window=5), SPM),
    "phi3_longrope": Case(
        Phi3Config(**PHI3, rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.3, 1.7],
                                                long_factor=[1.2, 2.5, 6.0, 11.0])), SPM),
    "gpt2": Case(GPT2Config(**TOKENS, n_positions=32, n_embd=16, n_head=2, n_layer=2), "gpt-2", dict(n_ctx=32)),
    "bloom": Case(BloomConfig(**TOKENS, hidden_size=24, n_layer=2, n_head=6), "bloom", dict(seq_length=512)),
    "ministral3": Case(
        Ministral3Config(**SIZES, rope_parameters=dict(
            rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=8, beta_fast=1.0, beta_slow=0.1,
            mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)), "tekken"),
    "t5": Case(T5Config(**T5, d_kv=8, num_layers=2, num_decoder_layers=2), UNIGRAM),
    "flan_t5": Case(
        T5Config(**T5 | dict(vocab_size=192), d_kv=6, num_layers=2, num_decoder_layers=1, feed_forward_proj="gated-gelu",
                 tie_word_embeddings=False), UNIGRAM),
}


def write_bpe(folder):
    from gguf_hf import bytes_to_unicode
    from make_gguf import MERGES, SPECIAL

    tokens = SPECIAL + list(bytes_to_unicode().values()) + [m.replace(" ", "") for m in MERGES]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=SPECIAL[1], eos_token=SPECIAL[2])
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def write_spm(folder):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    kinds = proto.SentencePiece
    pieces = [("<unk>", 0.0, kinds.UNKNOWN), ("<s>", 0.0, kinds.CONTROL), ("</s>", 0.0, kinds.CONTROL)]
    pieces += [(f"<0x{b:02X}>", 0.0, kinds.BYTE) for b in range(256)]
    pieces += [(piece, -float(i), kinds.NORMAL) for i, piece in enumerate(SPM_PIECES)]
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def texts_of(corpus):
    """The texts of the other makers, and pieces of their sentences: more than a hundred."""
    from make_tokenizers import TEXTS

    words = [line.split(" ") for line in corpus]
    parts = [" ".join(line[i:i + n]) for line in words for n in (2, 5) for i in range(0, len(line), 4)]
    more = ["<extra_id_0> words<extra_id_1>", "x <extra_id_1> y</s>", "\uff1cextra_id_0\uff1e"]
    return list(dict.fromkeys(make_t5.TEXTS + more + TEXTS + corpus + parts))


def write_unigram(base, folder, name):
    """The vocabulary as sentencepiece holds it, beside what transformers writes, and the ids of many texts."""
    from make_tokenizers import CORPUS

    corpus, size, count = (make_t5.CORPUS + CORPUS, 280, 2) if name == "t5" else (make_t5.CORPUS, 80, 100)
    proto = make_t5.train_unigram(base, corpus, size)
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(count))]
    tokenizer = make_t5.tokenizer_of(proto, sentinels, count)
    assert [tokenizer.convert_tokens_to_ids(token) for token in sentinels] == [len(proto.pieces) + i for i in range(count)]
    tokenizer.save_pretrained(base)
    (base / "spiece.model").write_bytes(proto.SerializeToString())
    if name == "t5":
        ids = {token: len(proto.pieces) + i for i, token in enumerate(sentinels)}
        (base / "added_tokens.json").write_text(json.dumps(ids))
    make_t5.write_texts(folder, tokenizer, proto, texts_of(make_t5.CORPUS + CORPUS))
    return len(tokenizer)


def convert(folder, family, pre, out):
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre  # known by a hash of the real vocabulary's ids
    kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    kind(folder, gguf.LlamaFileType.ALL_F32, out, model_name=family).write()


def make_t5_case(name, case):
    folder, seed = fresh(GOLDENS / f"gguf_{name}"), seed_of(f"gguf_{name}")
    float64_inside(modeling_t5)
    with TemporaryDirectory() as base:
        base = Path(base)
        make_t5.random_model(case.config, seed).save_pretrained(base)
        (folder / "config.json").write_text((base / "config.json").read_text() + "\n")
        sources, ids, labels = make_t5.rows(seed, case.config.vocab_size)
        logits, loss = make_t5.run(make_t5.load(base), sources, ids, labels)
        make_t5.write_golden(folder, sources, ids, labels, logits, loss)
        tokens = write_unigram(base, folder, name)
        convert(base, name, None, folder / "model.gguf")
    size = (folder / "model.gguf").stat().st_size
    print(f"{name}: loss {loss.item():.4f}, {tokens} tokens, {size} bytes")


def make_case(name, case):
    folder, seed = fresh(GOLDENS / f"gguf_{name}"), seed_of(f"gguf_{name}")
    with TemporaryDirectory() as base:
        base = Path(base)
        random_model(case.config, seed).save_pretrained(base)
        config = json.loads((base / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        ids, labels = batch(TOKENS["vocab_size"], seed, LENGTHS)
        logits, loss = run(load(base), ids, labels, LENGTHS)
        write(folder / "golden.safetensors", ids, labels, logits, loss, lengths=LENGTHS)
        (base / "config.json").write_text(json.dumps(config | case.old))
        (write_bpe if case.pre else write_spm)(base)
        convert(base, name, case.pre, folder / "model.gguf")
    print(f"{name}: loss {loss.item():.4f}, {(folder / 'model.gguf').stat().st_size} bytes")


def llama_cpp(folder):
    """The source, unpacked below `folder`."""
    command = ["pip", "download", "--no-deps", "--no-binary", ":all:", PACKAGE, "-d", folder]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (archive,) = Path(folder).glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(Path(folder).glob("*/vendor/llama.cpp"))


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--llama-cpp", type=Path)
    options.add_argument("cases", nargs="*")
    args = options.parse_args()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        source = args.llama_cpp or llama_cpp(folder)
        sys.path[:0] = [str(source), str(source / "gguf-py")]
        for name in args.cases or CASES:
            (make_t5_case if CASES[name].pre == UNIGRAM else make_case)(name, CASES[name])


if __name__ == "__main__":
    main()
