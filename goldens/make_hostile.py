"""Makes the corpus of hostile files: small good files of each format, to be changed into bad ones.

    python goldens/make_hostile.py RETUNE       (torch, transformers, tokenizers; RETUNE is the program, which writes the GGUF files)

fuzz/corpus/<target>/<name>, as crates/retune-testing/src/hostile.rs reads them: where a format is of two files, a zero byte stands between.
Inputs that once broke a reader are kept beside them, under names that begin with `was-`; this leaves those alone.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, BloomConfig, Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig,
                          Phi3Config, Qwen3Config, T5Config, T5ForConditionalGeneration)

GOLDENS = Path(__file__).resolve().parent.parent / "crates" / "retune-model" / "tests" / "goldens"
CORPUS = Path(__file__).resolve().parent.parent / "fuzz" / "corpus"

SIZES = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=None)
MODELS = {
    "llama": LlamaConfig(**SIZES, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                    original_max_position_embeddings=16)),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "gemma2": Gemma2Config(**SIZES, head_dim=4, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=4),
    "qwen3": Qwen3Config(**SIZES, head_dim=4, tie_word_embeddings=True),
    "phi3": Phi3Config(**SIZES, original_max_position_embeddings=16,
                       rope_scaling=dict(rope_type="longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 4.0])),
    "gpt2": GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=32, vocab_size=8, bos_token_id=1, eos_token_id=2),
    "bloom": BloomConfig(hidden_size=8, n_head=2, n_layer=1, vocab_size=8, bos_token_id=1, eos_token_id=2),
    "t5": T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, relative_attention_num_buckets=8,
                   decoder_start_token_id=0, dropout_rate=0.0),
}
QUANTIZED = ["bnb_nf4_double", "bnb_fp4_in_bf16", "bnb_int8"]
ADAPTERS = ["lora_embeddings_tied", "lora_gaussian", "lora_tokens", "lora_b_bias_alone", "lora_rs", "ia3", "miss_random", "prompt", "prefix",
            "p_tuning", "dora_biases"]
# GGUF files: the model, and the type of its weights
GGUF = [("llama", "f32"), ("qwen3", "f16"), ("bloom", "f32"), ("wide", "q4_0"), ("wide", "q8_0")]
CONVERTED = ["gguf_gemma", "gguf_t5"]  # for their vocabularies

TEMPLATES = {
    "turns": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
             "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "checked": "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content | trim -%}"
               "{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}"
               "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('order') }}{%- endif -%}"
               "[{{ m.role.upper() }}] {{ m.content.strip() }}{{ eos_token if loop.last }}{%- endfor -%}",
    "dated": "Today is {{ strftime_now('%d %b %Y') }}.{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
             "{% generation %}{{ ns.n }}: {{ m | tojson(indent=2) }}{% endgeneration %}{% endfor %}",
    "macros": "{% macro turn(role, text='') %}<{{ role }}>{{ text.split(' ')[0] | upper }}{% endmacro %}"
              "{% for m in messages if m.content is string %}{{ turn(m.role, m.content) }}{% else %}none{% endfor %}"
              "{{ range(3) | list | join(', ') }}{{ {'a': [1, 2.5, none, true]}['a'][::-1] }}{{ '%s' }}{{ tools is iterable }}",
}
RUNS = {
    "lora": "model: some/model\noutput_dir: runs/one\nadapter:\n  r: 16\n  lora_alpha: 32\n  target_modules: all-linear\n"
            "  rank_pattern: {q_proj: 8}\ndata:\n  train: train.jsonl\n  eval: eval.jsonl\n  max_length: 256\ntraining:\n  max_steps: 80\n"
            "  batch_size: 8\n  learning_rate: 5e-4\n  lr_scheduler_type: cosine\n  warmup_ratio: 0.1\n",
    "soft": "model: a/b\noutput_dir: out\nmethod: prefix_tuning\nadapter: {num_virtual_tokens: 9, prefix_init: text, prefix_init_text: the sand}\n"
            "data: {train: a.csv, columns: {prompt: q, completion: a}, train_on_prompt: true}\nthreads: 4\n",
    "full": "{\"model\": \"m\", \"output_dir\": \"o\", \"method\": \"full\", \"data\": {\"train\": \"t.json\"}, "
            "\"training\": {\"optim\": \"adamw_8bit\", \"epochs\": 2.5}, \"base\": {\"compute\": \"f32\"}}",
    "anchors": "common: &c {train: t.jsonl}\nmodel: 'm'\noutput_dir: \"o\\u0041\"\ndata:\n  <<: *c\n  eval_fraction: 0.1\nadapter: !!null ~\n",
    "plan": "model: a/b\noutput_dir: out\ndata: {train: rows.jsonl, eval_fraction: 0.3}\ntraining: {max_steps: 12}\nseeds: [1, 2]\nvariants:\n"
            "- {name: LoRA, method: lora, adapter: {r: 4}}\n- {name: hard prompt, examples: 2}\n",
}


def put(target, name, *parts):
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts))


def byte_level():
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2, "Ġ": 3, "ab": 4, "Ġa": 5}, merges=[("a", "b"), ("Ġ", "a")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "y")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.5), ("▁ab", -3.0)], unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]", max_input_chars_per_word=20))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" +"), "isolated")
    return tokenizer


def model_folder(folder, name, config):
    torch.manual_seed(0)
    make = T5ForConditionalGeneration if name == "t5" else AutoModelForCausalLM.from_config
    make(config).to(torch.bfloat16 if name == "qwen3" else torch.float32).save_pretrained(folder)
    # For a GGUF file: as many tokens as the table has rows.
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "Ġ": 5, "ab": 6, "Ġa": 7}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "t5":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.5), ("▁ab", -3.0), ("c", -4.0)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATES["turns"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main():
    program = sys.argv[1]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        wide = LlamaConfig(**SIZES | dict(hidden_size=32, intermediate_size=32, head_dim=16))
        for name, config in (MODELS | {"wide": wide}).items():
            folder = folders[name] = Path(temporary) / name
            model_folder(folder, name, config)
            if name == "wide":
                continue
            weights = (folder / "model.safetensors").read_bytes()
            put("model", name, json.dumps(json.loads((folder / "config.json").read_text())), weights)
            if name in ("llama", "gpt2"):
                put("safetensors", name, weights)
        for name in QUANTIZED:
            config, weights = ((GOLDENS / name / file).read_bytes() for file in ("config.json", "model.safetensors"))
            put("model", name, config, weights)
        put("safetensors", "none", (2).to_bytes(8, "little") + b"{}")
        for name in ADAPTERS:
            files = ((GOLDENS / name / "adapter" / file).read_bytes() for file in ("adapter_config.json", "adapter_model.safetensors"))
            put("adapter", name, *files)
        for name, kind in GGUF:
            out = Path(temporary) / f"{name}-{kind}.gguf"
            command = [program, "export", "--for", "llama.cpp", "--model", folders[name], "--type", kind, "--out", out]
            subprocess.run(command, check=True)
            put("gguf", f"{name}-{kind}", out.read_bytes())
        for name in CONVERTED:
            put("gguf", name, (GOLDENS / name / "model.gguf").read_bytes())
        base = Path(shutil.copytree(GOLDENS / "llama_tied", Path(temporary) / "base"))
        shutil.copy(folders["llama"] / "tokenizer.json", base)
        for name in ["lora_gaussian", "lora_regex"]:
            out = Path(temporary) / f"{name}.gguf"
            adapter = GOLDENS / name / "adapter"
            subprocess.run([program, "export", "--for", "llama.cpp", "--adapter-only", "--model", base, "--adapter", adapter, "--out", out],
                           check=True)
            put("adapter_gguf", name, out.read_bytes())
    template = dict(bos_token="<s>", added_tokens_decoder={"6": dict(content="<x>", special=True)}, model_max_length=64,
                    additional_special_tokens=["a"], chat_template=[dict(name="default", template=TEMPLATES["checked"])])
    put("tokenizer", "byte_level", byte_level().to_str(), json.dumps(template))
    put("tokenizer", "unigram", unigram().to_str())
    put("tokenizer", "word_piece", word_piece().to_str())
    for name, source in TEMPLATES.items():
        put("chat_template", name, source)
    for name, text in RUNS.items():
        put("run_file", name, text)


main()
