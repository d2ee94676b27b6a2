"""Makes the goldens of T5, an encoder and a decoder: small random models of both kinds (tied and scaled with a plain relu MLP;
gated with a head of its own), PEFT adapters of every method on them, and what transformers + peft compute with them in float64.

    python goldens/make_t5.py [CASE ...]            (torch, transformers, peft, safetensors, sentencepiece; all cases by default)

Cases hold what common.py says, but a row is a source, which the encoder reads, and an answer: golden.safetensors also has
`source_ids` and `source_lengths`, `input_ids` are the answers', and the decoder reads the start token and then each answer
without its last token. Every token of an answer may be a label, the first too. Model cases also have `prompt` and
`generated` as make_families.py's, and for 50 more sources `more_sources`, `more_lengths` and `more_answers`, 8 ids each.
t5 also has a tokenizer, and texts.json: `texts`, their `ids` and these `decoded` without special tokens. make_families_gguf.py makes
GGUF files of such models with what is here.

t5_training holds adapter/ as peft starts it, with training.safetensors: `source_ids`, `source_lengths`, `input_ids` and
`sequence_lengths` of 40 rows, and `losses`, the mean loss of each of 20 steps of two rows in turn in float32, with AdamW at 0.01.

Soft prompts: the file of a prompt has as many rows again, which nothing reads and which have no gradient.
"""

import io
import json
import sys
import warnings
from dataclasses import dataclass, field

import sentencepiece
import torch
from peft import (IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig,
                  get_peft_model)
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForSeq2SeqLM, T5Config, T5Tokenizer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5 import modeling_t5
from transformers.utils import logging

from common import GOLDENS, batch, float64_inside, fresh, gradients, randomise, save_adapter, seed_of, write

LENGTHS = [7, 24, 1]
SOURCES = [24, 5, 9]
GENERATED, MARGIN, MORE = 8, 1e-2, 50
SIZES = dict(vocab_size=96, d_model=16, d_ff=24, num_heads=2, relative_attention_num_buckets=8,
             relative_attention_max_distance=12, decoder_start_token_id=0, dropout_rate=0.0)
MODELS = {
    # Attention as wide as the model, which a prefix needs, and three layers, whose prefixes lie in another order. flan_t5 has neither
    # that nor as many layers on both sides; flan_t5_wide has.
    "t5": T5Config(**SIZES, d_kv=8, num_layers=3, num_decoder_layers=3),
    "flan_t5": T5Config(**SIZES, d_kv=6, num_layers=2, num_decoder_layers=1, feed_forward_proj="gated-gelu",
                        tie_word_embeddings=False),
    "flan_t5_wide": T5Config(**SIZES, d_kv=8, num_layers=2, num_decoder_layers=2, feed_forward_proj="gated-gelu",
                             tie_word_embeddings=False),
}
R = dict(r=2, lora_alpha=4)
SOFT = dict(num_virtual_tokens=6)


@dataclass
class Case:
    base: str
    method: type
    settings: dict = field(default_factory=dict)


CASES = {
    "t5_lora_all": Case("t5", LoraConfig, R | dict(target_modules="all-linear")),
    "t5_lora_qv": Case("t5", LoraConfig, R | dict(target_modules=["q", "v"])),
    "flan_t5_lora_all": Case("flan_t5", LoraConfig, R | dict(target_modules="all-linear")),
    "flan_t5_lora_qv": Case("flan_t5", LoraConfig, R | dict(target_modules=["q", "v"])),
    "flan_t5_lora_save": Case("flan_t5", LoraConfig, R | dict(
        target_modules=r"decoder.*EncDecAttention\.(k|v)", modules_to_save=["lm_head", "relative_attention_bias"])),
    # Rows of both sides' table and of the head, which it is; 0 begins every answer.
    "t5_lora_tokens": Case("t5", LoraConfig, R | dict(target_modules=["q", "v"], trainable_token_indices=[5, 0, 17])),
    "flan_t5_lora_tokens": Case("flan_t5", LoraConfig, R | dict(
        target_modules=["q", "v"], trainable_token_indices={"lm_head": [5, 17]})),
    "t5_dora": Case("t5", LoraConfig, R | dict(target_modules=["k", "v", "o", "wo"], use_dora=True)),
    "flan_t5_dora": Case("flan_t5", LoraConfig, R | dict(
        target_modules=["q", "v", "wi_0", "wi_1", "wo", "lm_head"], use_dora=True)),
    "t5_ia3": Case("t5", IA3Config),
    "flan_t5_ia3": Case("flan_t5", IA3Config, dict(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "t5_prompt": Case("t5", PromptTuningConfig, SOFT),
    "flan_t5_prompt": Case("flan_t5", PromptTuningConfig, SOFT),
    "t5_p_tuning": Case("t5", PromptEncoderConfig, SOFT | dict(encoder_hidden_size=8)),
    "flan_t5_p_tuning": Case("flan_t5", PromptEncoderConfig, SOFT | dict(encoder_hidden_size=8)),
    "t5_prefix": Case("t5", PrefixTuningConfig, SOFT),
    "t5_prefix_projection": Case("t5", PrefixTuningConfig, SOFT | dict(prefix_projection=True, encoder_hidden_size=8)),
    "flan_t5_prefix": Case("flan_t5_wide", PrefixTuningConfig, SOFT),
    "flan_t5_prefix_projection": Case(
        "flan_t5_wide", PrefixTuningConfig, SOFT | dict(prefix_projection=True, encoder_hidden_size=8)),
}


CORPUS = ["Write the one-line summary for this Debian package.", "a tool that counts lines, words and bytes of files",
          "summarize: the library reads and writes small tables.", "It's 3.14 times slower; 12 of 27 tests failed!"]
TEXTS = ["", " ", "a", "the line", "  The  lines of files ", "a\nb\tc", "e\u0301 \u00e9t\u00e9 \ufb01les", "x</s>y", "\u00bd 27",
         "summarize: a tool", "words\u00a0and bytes"]


def train_unigram(folder, corpus, size):
    """A Unigram vocabulary with rules of normalisation, as sentencepiece's own message."""
    file, rules = io.BytesIO(), folder / "rules.tsv"
    # What becomes what: a ligature, a letter and its accent, a space that does not break.
    rules.write_text("FB01\t66 69\n65 301\tE9\nA0\t20\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 3), model_writer=file, model_type="unigram", vocab_size=size, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, normalization_rule_tsv=str(rules), character_coverage=1.0, hard_vocab_limit=False, minloglevel=2)
    rules.unlink()
    return sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())


def tokenizer_of(proto, sentinels, extra_ids):
    """transformers' tokenizer of a Unigram vocabulary, with these tokens behind its pieces."""
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces] + [(token, 0.0) for token in sentinels]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    return T5Tokenizer(vocab=vocabulary, _spm_precompiled_charsmap=charsmap, extra_ids=extra_ids)


def write_texts(folder, tokenizer, proto, texts):
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    # sentencepiece splits at spaces alone, and knows no special tokens in a text.
    plain = [text for text in texts if not set("<\n\r\t\u3000") & set(text)]
    assert all(tokenizer.encode(text, add_special_tokens=False) == processor.encode(text) for text in plain)
    ids = [tokenizer.encode(text) for text in texts]
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    content = {"texts": texts, "ids": ids, "decoded": decoded}
    (folder / "texts.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def make_tokenizer(folder):
    """A vocabulary in the tokenizer's own form, and what it makes of TEXTS."""
    proto = train_unigram(folder, CORPUS, 80)
    assert len(proto.pieces) < SIZES["vocab_size"] - 2
    tokenizer = tokenizer_of(proto, [], 2)
    tokenizer.save_pretrained(folder)
    write_texts(folder, tokenizer, proto, TEXTS)


def perturb(parameters, seed):
    """Normal values of deviation 0.2 on top of where peft starts what it trains."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in parameters:
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)


def load(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForSeq2SeqLM.from_pretrained(GOLDENS / case, dtype=torch.float32, attn_implementation="eager")


def forward(model, source, answer):
    """Logits of an answer's tokens."""
    read = torch.cat([torch.tensor([0]), answer[:-1]])
    return model(input_ids=source[None], attention_mask=torch.ones_like(source[None]), decoder_input_ids=read[None],
                 use_cache=False).logits[0]


def run(model, sources, ids, labels):
    """Logits [tokens, vocab] and mean cross-entropy over the labels, each row run alone; fills `.grad`."""
    model.double().eval()
    logits = torch.cat([forward(model, s, a) for s, a in zip(sources.split(SOURCES), ids.split(LENGTHS))])
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    assert logits.dtype == torch.float64
    return logits.detach(), loss.detach().reshape(1)


def rows(seed, vocabulary=SIZES["vocab_size"]):
    sources, _ = batch(vocabulary, seed + 1, SOURCES)
    return (sources, *batch(vocabulary, seed, LENGTHS))


def write_golden(folder, sources, ids, labels, logits, loss, grads=None, **more):
    write(folder / "golden.safetensors", ids, labels, logits, loss, grads, LENGTHS, source_ids=sources,
          source_lengths=torch.tensor(SOURCES), **more)


@torch.no_grad()
def answer(model, source):
    """The likeliest answer, and by how much it is ahead of the second likeliest."""
    ids, margin = torch.tensor([0]), float("inf")
    encoded = BaseModelOutput(model.encoder(source[None]).last_hidden_state)
    for _ in range(GENERATED):
        best = model(encoder_outputs=encoded, decoder_input_ids=ids[None], use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids = torch.cat([ids, best.indices[:1]])
    return ids[1:], margin


def answers(model, seed):
    """Sources with clear answers: [source], [answer]."""
    generator, found = torch.Generator().manual_seed(seed), []
    model.generation_config.eos_token_id = None
    while len(found) <= MORE:
        length = int(torch.randint(1, 16, (1,), generator=generator))
        source = torch.randint(0, SIZES["vocab_size"], (length,), generator=generator)
        generated, margin = answer(model, source)
        if margin > MARGIN and len(set(generated.tolist())) > 2:
            cached = model.generate(source[None], max_new_tokens=GENERATED, do_sample=False)[0, 1:]
            assert torch.equal(cached, generated), "with the cache transformers generates something else"
            found.append((source, generated))
    return found


def random_model(config, seed):
    config._attn_implementation = "eager"
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    if not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    randomise(model.named_parameters(), seed)
    return model


def save_model(name, config):
    folder = fresh(GOLDENS / name)
    random_model(config, seed_of(name)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "t5":
        make_tokenizer(folder)


def make_model(name, config):
    folder, seed, model = GOLDENS / name, seed_of(name), load(name)
    assert (model.lm_head.weight is model.shared.weight) == config.scale_decoder_outputs
    sources, ids, labels = rows(seed)
    logits, loss = run(model, sources, ids, labels)
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(grad.abs().max() > 1e-6 for grad in grads.values())
    (prompt, generated), *more = answers(model, seed)
    write_golden(folder, sources, ids, labels, logits, loss, grads, prompt=prompt, generated=generated,
                 more_sources=torch.cat([s for s, _ in more]), more_lengths=torch.tensor([len(s) for s, _ in more]),
                 more_answers=torch.cat([a for _, a in more]))
    print(f"{name}: loss {loss.item():.4f}, {len(grads)} gradients, logits up to {logits.abs().max():.2f}")


def make_adapter(name, case):
    folder, seed = fresh(GOLDENS / name), seed_of(name)
    torch.manual_seed(seed)
    model = get_peft_model(load(case.base), case.method(task_type="SEQ_2_SEQ_LM", **case.settings))
    trainable = [(n.removeprefix("prompt_encoder.default."), p) for n, p in model.named_parameters() if p.requires_grad]
    perturb(trainable, seed)
    save_adapter(model, folder / "adapter", case.base)
    (folder / "base.txt").write_text(case.base + "\n")
    latent = {n: p.detach().clone() for n, p in trainable}
    sources, ids, labels = rows(seed)
    computed, loss = run(model, sources, ids, labels)
    soft = model.active_peft_config.is_prompt_learning
    read_back = PeftModel.from_pretrained(load(case.base), folder / "adapter")
    if soft:  # of the rows, which an encoder computes
        logits, loss = run(read_back, sources, ids, labels)
        grads = {k: v.clone() for k, v in gradients(read_back).items()}
    else:
        logits, grads = computed, gradients(model)
        again, _ = run(read_back, sources, ids, labels)
        assert torch.equal(again, logits)
    write_golden(folder, sources, ids, labels, logits, loss, grads)
    if soft and len(latent) > 1:
        save_file(latent, folder / "latent.safetensors")
        save_file({n: p.grad.float().contiguous() for n, p in trainable}, folder / "latent_gradients.safetensors")
    untouched, _ = run(load(case.base), sources, ids, labels)
    assert (computed - logits).abs().max() < 1e-5, f"{name}: peft reads back something else"
    assert (untouched - logits).abs().max() > 0.1
    print(f"{name}: loss {loss.item():.4f}, {len(grads)} tensors")


def make_training(name="t5_training"):
    folder, seed = fresh(GOLDENS / name), seed_of(name)
    torch.manual_seed(seed)
    model = get_peft_model(load("t5"), LoraConfig(task_type="SEQ_2_SEQ_LM", **R, target_modules="all-linear"))
    save_adapter(model, folder / "adapter", "t5")
    (folder / "base.txt").write_text("t5\n")
    generator = torch.Generator().manual_seed(seed)
    lengths = lambda most: torch.randint(1, most, (40,), generator=generator).tolist()
    sources, answers = lengths(24), lengths(12)
    ids = lambda lengths: [torch.randint(2, SIZES["vocab_size"], (n,), generator=generator) for n in lengths]
    end = lambda rows: [torch.cat([row, torch.tensor([1])]) for row in rows]
    sources, answers = end(ids(sources)), end(ids(answers))
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0), []
    model.float().train()  # the model has no dropout
    for step in range(20):
        of_step = range(2 * step, 2 * step + 2)
        logits = torch.cat([forward(model, sources[i], answers[i]) for i in of_step])
        loss = torch.nn.functional.cross_entropy(logits, torch.cat([answers[i] for i in of_step]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    length = lambda rows: torch.tensor([len(row) for row in rows])
    save_file({"source_ids": torch.cat(sources), "source_lengths": length(sources), "input_ids": torch.cat(answers),
               "sequence_lengths": length(answers), "losses": torch.tensor(losses)}, folder / "training.safetensors")
    print(f"{name}: losses {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    asked = sys.argv[1:] or [*MODELS, *CASES, "t5_training"]
    for name in [name for name in asked if name in MODELS]:
        save_model(name, MODELS[name])
    if "t5_training" in asked:
        make_training()
    float64_inside(modeling_t5)
    for name in asked:
        if name in MODELS:
            make_model(name, MODELS[name])
        elif name in CASES:
            make_adapter(name, CASES[name])
