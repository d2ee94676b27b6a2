"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from its GGUF file, and the goldens that need the real model.

    python goldens/make_smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out DIR --data DIR

--data holds debian-synopsis.train.jsonl and tweet-sentiment.train.jsonl. transformers' own GGUF import drops the
pre-tokenizer that tokenizer.ggml.pre names (smollm splits digits), so the tokenizer is rebuilt here as the original
repository's tokenizer.json has it; its chat template and special tokens are the file's. Weights: dequantized to f32, tied.
Written to crates/retune-model/tests/goldens:
  smollm2_tokens.jsonl        {"text", "ids"}, 1,000 lines, no special tokens added
  smollm2_chats.jsonl         {"messages", "add_generation_prompt", "text", "ids"} of apply_chat_template
  smollm2_logits.safetensors  input_ids [48] int64, logits [8, vocab]: those of the last 8 positions
"""

import argparse
import json
import random
from pathlib import Path

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

from common import GOLDENS, float64_inside
from gguf_hf import build_tokenizer, field, weights

CODE = [
    "fn main() -> Result<(), Box<dyn Error>> {\n    let x: Vec<u8> = vec![0; 1_024];\n    println!(\"{x:?}\");\n}",
    "def f(x, *args, **kw):\n\treturn {k: v**2 for k, v in kw.items() if v != 0x1F}\n",
    "#include <stdio.h>\nint main(void) { printf(\"%5.2f\\n\", 3.14159e-10); return 0; }",
    "SELECT a.id, COUNT(*) FROM t AS a LEFT JOIN b ON a.id=b.id WHERE x <> 'O''Brien' GROUP BY 1;",
    "const g = async (a, b) => `${a ?? b}` // comment\r\n", "<div class=\"a b\">&nbsp;<br/></div>\n\n<!-- x -->",
    "main :: IO ()\nmain = mapM_ print $ filter (>3) [1..10]", "$ ls -la /usr/bin | grep '^d' > out.txt 2>&1 && echo $?",
    "{\"key\": [1, 2.50, -3e+7, null, true], \"päth\": \"C:\\\\dir\"}", "\\frac{\\partial^2 u}{\\partial x_{12}^2} = \\alpha\\beta",
    "package main\n\nfunc (s *S) Do(ctx context.Context) (n int, err error) {\n\tdefer s.mu.Unlock()\n}",
    "diff --git a/x b/y\n@@ -1,7 +1,8 @@\n-old\n+new\n", "%%time\nimport numpy as np; np.zeros((3,3))[:, ::-1]",
]
WORLD = [
    "👨‍👩‍👧‍👦 family", "🏳️‍🌈🏴‍☠️", "👍🏽👍🏿", "🇫🇷🇯🇵", "😀😃😄 ok 🤷🏼‍♀️", "私は学生です。日本語のテキスト１２３", "汉字漢字，标点符号！", "한국어 텍스트 ㄱㄴㄷ",
    "مرحبا بالعالم ١٢٣٤", "שלום עולם", "नमस्ते दुनिया १२३", "สวัสดีชาวโลก ๑๒๓", "Здравствуй, мир! Ёж", "Γειά σου Κόσμε", "Tiếng Việt có dấu",
    "İstanbul ıI", "Straße ﬁ ﬀ", "e\u0301 a\u0308 n\u0303 vs é ä ñ", "Z̷̢͝a̸l̶g̵o̴", "½ ² ³ ⅷ Ⅻ ① ٣ ۴ 𝟘𝟙", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒯", "‮rtl‬ override", "zero\u200bwidth\u2060join\ufeff",
    "non\u00a0breaking\u2003em\u3000ideographic", "line\u2028sep\u2029para\x85nel\x0bvt\x0cff", "“quotes” ‘it’s’ — – …", "ꦗꦮ ᠮᠣᠩᠭᠣᠯ", "𓀀𓂀 𒀀 \U000e0001 \U0010fffd", "\ud7ff\ue000\ufffd\uffff",
    "don't I'll you've we're he'd I'm it's DON'T I'LL ''s 't'", "x'tra 'sup 'llama 've", "100% €5,00 £3.50 #1 @me a_b-c+d=e", "H₂O x² → ∞ ≠ ∑∫√", "",
]
SPACE = ["", " ", "  ", "   ", " " * 7, " " * 33, "\t", "\t\t\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "  \n\n  x", "a  b", "a   b ", " a", "\n\n\n\nx\t \ty  ", "x \t\n"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
           "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
           "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>", "<|im_start|", "< |im_end|>", "<|IM_END|>"]


def texts(data, rng):
    """1,000 strings: lists above, every control character and byte length, then random mixtures and real rows."""
    rows = [json.loads(line) for name in ("debian-synopsis", "tweet-sentiment")
            for line in (data / f"{name}.train.jsonl").open(encoding="utf-8")]
    real = [row[key] for row in rows for key in ("input", "output")]
    out = CODE + WORLD + SPACE + SPECIAL + [chr(i) for i in range(256)] + [f"a{chr(i)}b" for i in range(32)]
    out += ["0", "007", "1234567890" * 4, "3.14159", "1,234,567.89", "-42", "0xDEADBEEF", "2024-12-31T23:59:59Z", "9" * 50, "v1.2.3rc4", "a1b22c333"]
    while len(out) < 700:
        pieces = rng.choices([CODE, WORLD, SPACE, SPECIAL, real], [1, 2, 3, 2, 2], k=rng.randint(2, 5))
        pieces = [rng.choice(p) for p in pieces]
        starts = [rng.randrange(max(1, len(p) - 30)) for p in pieces]
        out.append("".join(p[s:s + 40] for p, s in zip(pieces, starts)))
    while len(out) < 850:  # any characters, mostly of low planes
        out.append("".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x800), rng.randrange(0xD800), rng.randrange(0x1F000, 0x1FB00)]))
                           for _ in range(rng.randint(1, 24))))
    while len(out) < 1000:
        text = rng.choice(real)
        start = rng.randrange(max(1, len(text) - 160))
        out.append(text[start:start + 160])
    return out


def chats(data, rng):
    real = [json.loads(line) for line in (data / "debian-synopsis.train.jsonl").open(encoding="utf-8")]
    words = [w for w in WORLD + CODE + SPACE + SPECIAL] + [row["output"] for row in real[:60]]
    for n in range(40):
        messages = [{"role": "system", "content": rng.choice(words)}] if n % 3 == 1 else []
        for turn in range(1 + n % 5):
            messages.append({"role": ("user", "assistant")[turn % 2], "content": rng.choice(words)[:120]})
        yield messages, n % 2 == 0


def write_lines(name, rows):
    (GOLDENS / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_directory(reader, out):
    config = LlamaConfig(
        vocab_size=field(reader, "llama.vocab_size"), hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"), num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=field(reader, "llama.attention.head_count"), tie_word_embeddings=True, rms_norm_eps=1e-5,
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"), bos_token_id=1, eos_token_id=2, pad_token_id=2,
        max_position_embeddings=field(reader, "llama.context_length"),
        rope_parameters=dict(rope_type="default", rope_theta=field(reader, "llama.rope.freq_base")))
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights(reader), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.save_pretrained(out)
    names = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", pad_token="<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(reader), **names, model_max_length=config.max_position_embeddings,
                                        clean_up_tokenization_spaces=False, add_prefix_space=False)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    config = config | names | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": field(reader, "tokenizer.chat_template")}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = [t["content"] for t in json.loads((out / "tokenizer.json").read_text())["added_tokens"]]
    (out / "special_tokens_map.json").write_text(json.dumps(names | {"additional_special_tokens": special}, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    make_directory(GGUFReader(args.gguf), args.out)

    tokenizer, rng = AutoTokenizer.from_pretrained(args.out), random.Random(0)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode("123") == [tokenizer.convert_tokens_to_ids(d) for d in "123"]
    write_lines("smollm2_tokens.jsonl", [{"text": t, "ids": encode(t)} for t in texts(args.data, rng)])
    rows = []
    for messages, prompt in chats(args.data, rng):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        rows.append({"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids})
    write_lines("smollm2_chats.jsonl", rows)

    float64_inside(modeling_llama)
    model = AutoModelForCausalLM.from_pretrained(args.out, attn_implementation="eager", dtype=torch.float64)
    row = json.loads((args.data / "debian-synopsis.train.jsonl").open().readline())
    ids = torch.tensor(encode(f"<|im_start|>user\n{row['instruction']}\n\n{row['input']}")[:48])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, -8:]
    save_file({"input_ids": ids, "logits": logits.float().contiguous()}, GOLDENS / "smollm2_logits.safetensors")
    print("next token after the last position:", repr(tokenizer.decode(logits[-1].argmax())))


if __name__ == "__main__":
    main()
