"""Makes tiny vocabularies of the kinds that GGUF files hold, and token ids from the libraries they were made for.

    python goldens/make_tokenizers.py             (tokenizers, transformers, sentencepiece)

crates/retune-text/tests/goldens/:
  byte_level.json      "tokens", "merges", "special" (the first tokens), "texts", and "ids": for each value of
                       tokenizer.ggml.pre the ids of all texts, by the tokenizers package with the parts that the
                       tokenizer.json of that name's model has. The merges were learned without any splitting, so that
                       every difference in splitting shows.
  sentence_piece.json  "tokens", "scores", "types", "texts", and "ids": "llama" with a space before every stretch of text,
                       "gemma" without, "phi3" with special tokens that take the white space after them; by sentencepiece.
"""

import io
import json
import re
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

OUT = Path(__file__).resolve().parent.parent / "crates" / "retune-text" / "tests" / "goldens"

CORPUS = [
    "The quick brown fox doesn't jump over 1234 lazy dogs; it's 3.14 times slower than they're willing to say.",
    "In 1999 we'd paid $1,000,000 (about 12,500 each) for FooBar's HTTPServer, and YOU'LL never see it again!",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0x1F}\n\n\nclass HTTPError(Exception):\n\tpass\n",
    "L'été dernier, j'ai mangé une crème brûlée à l'hôtel… où ça ? naïve café",
    "私は学生です。日本語のテキスト１２３、漢字カタカナひらがな。", "Привет, мир! Как дела? 100 рублей", "नमस्ते दुनिया। ٣٤٥ مرحبا،",
    "one two  three   four\t\ttabs\r\nnew line\n\n\nend   ", "🦀 👩‍🔬 ½ x² ¿por qué? «ja» — “no” ‘so’",
]
TEXTS = [
    "", " ", "  ", "a", "The fox", " The  fox   jumps", "it's they're we'd YOU'LL I'M don't", "1 12 123 1234 12345 a1b22c333",
    "3.14 1,000,000 $5 100%", "fooBar HTTPServer FooBARbaz iPhone's HTTP's", "(a.b) [c] {d}; e=`f` g->h, i!=j ... !!! ?!", "a\nb\n\nc\n \nd\r\ne",
    "\tx\t\ty \t z", "trailing  ", "  leading", "def f(x):\n    return x ** 2\n", "<html><b>x</b></html> a/b/c http://x.y/z?q=1&r=2",
    "été café naïve", "e\u0301te\u0301 cafe\u0301", "ÉTÉ Été élève", "L'été d'où qu'il", "私は学生です。１２３", "日本語、漢字", "Привет мир", "नमस्ते दुनिया। 1",
    "مرحبا، ٣٤٥", "🦀🦀 x👩‍🔬y", "½ x² ¼ Ⅷ", "«ja» — “no” ‘so’ don’t", "…a,b。c，d、e", "snake_case __init__ a_1", "a  1  b", "x\u00a0y\u3000z", "- a\n- b\n\t- c",
    "<|im_start|>user\nHi 12!<|im_end|>\n<|im_start|>assistant\n", "a <|endoftext|> b", "Γειά σου Κόσμε", "don''t 's 'S 've", "AbC1dE2 ABC abc", "a\u0300\u0301\u0302 b\u0323",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def words(suffix):
    return rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{suffix}"


TEKKEN = words("") + r"|\p{N}" + REST
GPT4O = words("(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + REST
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK3 = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
             r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def digits():
    return pre_tokenizers.Digits(individual_digits=True)


NFC = normalizers.NFC()
# tokenizer.ggml.pre -> normalizer, pre-tokenizers, whether a whole piece that is a token needs no merges
RULES = {
    "gpt-2": (None, [byte_level(True)], False),
    "smollm": (None, [digits(), byte_level(True)], False),
    "starcoder": (None, [digits(), byte_level(True)], False),
    "command-r": (NFC, [digits(), byte_level(True)], False),
    "mpt": (NFC, [byte_level(True)], False),
    "llama-bpe": (None, [split(LLAMA3), byte_level(False)], True),
    "smaug-bpe": (None, [split(LLAMA3), byte_level(False)], False),
    "qwen2": (NFC, [split(QWEN2), byte_level(False)], False),
    "tekken": (None, [split(TEKKEN), byte_level(False)], True),
    "gpt-4o": (None, [split(GPT4O), byte_level(False)], False),
    "bloom": (None, [split(BLOOM), byte_level(False)], False),
    "deepseek-v3": (None, [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), byte_level(False)], False),
    # llama.cpp's own, of no model.
    "default": (None, [split(p) for p in [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]] + [byte_level(False)],
                False),
    "falcon": (None, [pre_tokenizers.Punctuation("contiguous"), byte_level(True), split("[0-9][0-9][0-9]")], False),
}


def make_byte_level():
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = byte_level(False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    # Longer pieces than words, but not whole lines: every three words.
    lines = [" ".join(part) for line in CORPUS for part in zip(*(line.split(" ")[i:] for i in range(3)))]
    learner.train_from_iterator(lines + CORPUS + CORPUS, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    ids = {}
    for name, (normalizer, parts, ignore_merges) in RULES.items():
        tokenizer = Tokenizer(BPE(vocab=model["vocab"], merges=merges, ignore_merges=ignore_merges))
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
        ids[name] = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {"tokens": tokens, "merges": [" ".join(m) for m in merges], "special": len(SPECIAL), "texts": TEXTS, "ids": ids}


CONTROL = ["<|end|>", "<|endoftext|>"]
USER_DEFINED = ["<think>", "\n\n"]
SPM_TEXTS = [text for text in TEXTS if "<|" not in text and text] + [
    "<s>ab<|end|> cd", "a<|end|>\n b", "a<|endoftext|>\n b", "x<think> y <think>", "a\n\nb\n\n\nc", "1<|end|>  <|end|>2", "▁a ▁", "\u0007\ufeff",
]


def make_sentence_piece():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=file, model_type="bpe", vocab_size=560, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_by_whitespace=False, control_symbols=CONTROL, user_defined_symbols=USER_DEFINED, minloglevel=2)
    model = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())
    pieces = [(p.piece, p.score, p.type) for p in model.pieces]
    special = re.compile("(" + "|".join(map(re.escape, ["<s>", "</s>", "<unk>", *CONTROL, *USER_DEFINED])) + ")")
    ids = {}
    for name in ["llama", "gemma", "phi3"]:
        model.normalizer_spec.add_dummy_prefix = name != "gemma"
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        ids[name] = []
        for text in SPM_TEXTS:
            row, after = [], None
            for part in special.split(text):
                if special.fullmatch(part):
                    row.append(processor.piece_to_id(part))
                    after = part
                else:
                    if name == "phi3" and after not in [None, "<s>", "<unk>", "<|endoftext|>"]:
                        part = part.lstrip()
                    row += processor.encode(part) if part else []
            ids[name].append(row)
    tokens, scores, types = map(list, zip(*pieces))
    return {"tokens": tokens, "scores": scores, "types": types, "texts": SPM_TEXTS, "ids": ids}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for name, content in [("byte_level", make_byte_level()), ("sentence_piece", make_sentence_piece())]:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (OUT / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
