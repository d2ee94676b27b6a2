"""Makes the goldens of every PEFT method but plain LoRA, on bases that make_llama.py and make_families.py made. common.py says
what an adapter case holds.

    python goldens/make_methods.py [CASE ...]            (torch, transformers, peft, safetensors; all cases by default)

What is trained is where peft starts it plus a normal number of deviation 0.2, so that nothing is at its neutral value. Each
case names the warnings that peft gives, of making, saving and loading; another one is an error.

Soft prompts: labels and logits are those of the real tokens, and no sequence's first token is predicted. (peft predicts it
from the last virtual token where its label asks for it: `loss_with_first` and `first.<name>` are the loss and the gradients
then.) `grad.prompt_embeddings` is by the rows of the file. Where an encoder computes them, latent.safetensors holds
the encoder's parameters by peft's names, and latent_gradients.safetensors the gradients by these.

Initialisations that change the base: adapter/ is trained, start/ is the same before training, residual.safetensors holds the
base's changed weights (by the model's names), converted/ is the plain LoRA that peft makes of adapter/ and start/.
"""

import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import torch
from peft import (IA3Config, LoraConfig, MissConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig,
                  get_peft_model)
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from common import (GOLDENS, LENGTHS, adapter_case, batch, float64_inside, fresh, gradients, load, run, save_adapter, seed_of,
                    write)

ALL = "all-linear"
R = dict(r=2, lora_alpha=4)
SOFT = dict(num_virtual_tokens=6)  # one more than the windows of Gemma and Mistral
DORA = R | dict(use_dora=True)
CONV = dict(fan_in_fan_out=True)  # GPT-2's weights stand [in, out]

TABLES_SAVED = ["Setting `save_embedding_layers` to `True` as embedding layers found"]
NO_BIAS = ["has no bias. This means that merging LoRA weights won't be possible"]
BIAS_SHAPE = ["LoRA tensor\\(s\\) have invalid shape"]
CONVERTS = ["Could not find a config file in .* - will assume that the vocabulary was not modified"]
TIED = ["Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"]


@dataclass
class Case:
    base: str
    method: type
    settings: dict = field(default_factory=dict)
    warns: list = field(default_factory=list)
    save_embedding_layers: str | bool = False


CASES = {
    # IA3: defaults of the family, what is scaled by what it reads, biases
    "ia3": Case("llama_tied", IA3Config),
    "ia3_modules": Case("llama_untied_mha", IA3Config, dict(
        target_modules=["q_proj", "o_proj", "gate_proj", "up_proj", "lm_head"], feedforward_modules=["o_proj", "gate_proj"])),
    "ia3_regex": Case("llama_gqa_head_dim", IA3Config, dict(
        target_modules=r".*\.(0\.self_attn\.[kv]|[12]\.mlp\.(up|down))_proj", feedforward_modules=r".*\.mlp\.down_proj")),
    "ia3_save_head": Case("llama_untied_mha", IA3Config, dict(modules_to_save=["lm_head"])),
    "ia3_biases": Case("llama_bias", IA3Config, dict(
        target_modules=["k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], feedforward_modules=["o_proj", "down_proj"])),
    "qwen2_ia3": Case("qwen2", IA3Config),
    "gpt2_ia3": Case("gpt2", IA3Config, CONV),
    "bloom_ia3": Case("bloom", IA3Config),
    "gemma3_ia3": Case("gemma3", IA3Config),
    # MiSS: ranks that divide the inputs and that do not, values that repeat over the outputs
    "miss": Case("llama_tied", MissConfig, dict(r=4, target_modules=ALL)),
    "miss_default": Case("llama_gqa_head_dim", MissConfig, dict(r=8)),
    "miss_uneven": Case("llama_untied_mha", MissConfig, dict(r=5, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])),
    "miss_mini": Case("llama_tied", MissConfig, dict(r=5, mini_r=8, init_weights="mini", target_modules=ALL)),
    "miss_random": Case("llama_tied", MissConfig, dict(r=4, init_weights=False, target_modules=["k_proj", "down_proj"],
                                                        layers_to_transform=[1])),
    "miss_biases": Case("llama_bias", MissConfig, dict(r=4, target_modules=["k_proj", "o_proj", "up_proj"], bias="all")),
    "bloom_miss": Case("bloom", MissConfig, dict(r=4, target_modules=ALL)),
    "gemma3_miss": Case("gemma3", MissConfig, dict(r=4, target_modules=["q_proj", "down_proj"])),
    # DoRA
    "dora": Case("llama_tied", LoraConfig, DORA | dict(target_modules=ALL)),
    "dora_patterns": Case("llama_untied_mha", LoraConfig, DORA | dict(
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], use_rslora=True,
        rank_pattern={"up_proj": 1, "layers.1.self_attn.v_proj": 5}, alpha_pattern={"down_proj": 9})),
    "dora_biases": Case("llama_bias", LoraConfig, DORA | dict(target_modules=["k_proj", "o_proj", "down_proj"], bias="lora_only")),
    "dora_embeddings": Case("llama_untied_mha", LoraConfig, DORA | dict(
        target_modules=["embed_tokens", "lm_head", "v_proj"])),
    "gpt2_dora_embeddings": Case("gpt2", LoraConfig, DORA | CONV | dict(target_modules=["wte", "wpe", "c_attn"])),
    "gemma3_dora_embeddings": Case("gemma3", LoraConfig, DORA | dict(target_modules=["embed_tokens", "v_proj"]), TIED),
    "gpt2_dora": Case("gpt2", LoraConfig, DORA | CONV | dict(target_modules=ALL)),
    "bloom_dora": Case("bloom", LoraConfig, DORA | dict(target_modules=ALL)),
    "gemma3_dora": Case("gemma3", LoraConfig, DORA | dict(target_modules=["q_proj", "o_proj", "down_proj"])),
    # LoRA: biases of B
    "lora_b_bias": Case("llama_bias", LoraConfig, R | dict(target_modules=["q_proj", "o_proj", "down_proj"], lora_bias=True),
                        BIAS_SHAPE),
    "lora_b_bias_all": Case("llama_bias", LoraConfig, R | dict(target_modules=["v_proj"], lora_bias=True, bias="all"), BIAS_SHAPE),
    "lora_b_bias_alone": Case("llama_tied", LoraConfig, R | dict(target_modules=["v_proj", "up_proj"], lora_bias=True),
                              NO_BIAS + BIAS_SHAPE),
    "gpt2_lora_b_bias": Case("gpt2", LoraConfig, R | CONV | dict(target_modules=["c_attn", "c_fc"], lora_bias=True), BIAS_SHAPE),
    # LoRA: tables
    "lora_embeddings": Case("llama_untied_mha", LoraConfig, R | dict(
        target_modules=["embed_tokens", "lm_head", "q_proj"], use_rslora=True), TABLES_SAVED, "auto"),
    "lora_embeddings_tied": Case("llama_tied", LoraConfig, R | dict(target_modules=["embed_tokens", "q_proj"]), TIED),
    "gpt2_lora_embeddings": Case("gpt2", LoraConfig, R | CONV | dict(target_modules=["wte", "wpe", "c_attn"])),
    "bloom_lora_embeddings": Case("bloom", LoraConfig, R | dict(target_modules=["word_embeddings"])),
    "gemma3_lora_embeddings": Case("gemma3", LoraConfig, R | dict(target_modules=["embed_tokens", "v_proj"]), TIED),
    # LoRA: rows of the table, of tokens that stand in the batch and one that does not
    "lora_tokens": Case("llama_tied", LoraConfig, R | dict(target_modules=["q_proj"], trainable_token_indices=[50, 20, 3])),
    "lora_tokens_untied": Case("llama_untied_mha", LoraConfig, R | dict(
        target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [80, 7, 62], "lm_head": [7, 9]})),
    "gpt2_lora_tokens": Case("gpt2", LoraConfig, R | CONV | dict(target_modules=["c_attn"], trainable_token_indices=[94, 5, 50])),
    "bloom_lora_tokens": Case("bloom", LoraConfig, R | dict(
        target_modules=["query_key_value"], trainable_token_indices=[89, 5, 9])),
    "gemma3_lora_tokens": Case("gemma3", LoraConfig, R | dict(target_modules=["q_proj"], trainable_token_indices=[50, 5, 9])),
    # LoRA: initialisations
    **{f"lora_{name}": Case("llama_tied", LoraConfig, R | dict(target_modules=["k_proj", "down_proj"], **settings), warns)
       for name, settings, warns in [
           ("gaussian", dict(init_lora_weights="gaussian"), []),
           ("pissa", dict(init_lora_weights="pissa"), CONVERTS + ["PiSSA changes the base weights"]),
           ("pissa_niter_4", dict(init_lora_weights="pissa_niter_4"), CONVERTS),
           ("pissa_rs", dict(init_lora_weights="pissa", use_rslora=True), CONVERTS + ["PiSSA changes the base weights"]),
           ("olora", dict(init_lora_weights="olora"), CONVERTS + ["OLoRA changes the base weights"])]},
    # soft prompts
    **{name: Case(base, PromptTuningConfig, SOFT) for name, base in {
        "prompt": "llama_tied", "gpt2_prompt": "gpt2", "bloom_prompt": "bloom", "gemma3_prompt": "gemma3"}.items()},
    **{name: Case(base, PromptEncoderConfig, SOFT) for name, base in {
        "p_tuning": "llama_tied", "gpt2_p_tuning": "gpt2", "bloom_p_tuning": "bloom", "gemma3_p_tuning": "gemma3"}.items()},
    "p_tuning_hidden": Case("llama_untied_mha", PromptEncoderConfig, SOFT | dict(encoder_hidden_size=20)),
    "p_tuning_lstm": Case("llama_tied", PromptEncoderConfig, SOFT | dict(
        encoder_reparameterization_type="LSTM", encoder_hidden_size=8)),
    **{name: Case(base, PrefixTuningConfig, SOFT) for name, base in {
        "prefix": "llama_tied", "prefix_head_dim": "llama_gqa_head_dim", "prefix_window": "mistral_window", "gpt2_prefix": "gpt2",
        "bloom_prefix": "bloom", "gemma3_prefix": "gemma3"}.items()},
    **{name: Case(base, PrefixTuningConfig, SOFT | dict(prefix_projection=True)) for name, base in {
        "prefix_projection": "llama_tied", "gpt2_prefix_projection": "gpt2", "bloom_prefix_projection": "bloom",
        "gemma3_prefix_projection": "gemma3"}.items()},
    **{f"phi3_longrope_{name}": Case("phi3_longrope", method, dict(num_virtual_tokens=12))  # alone 7 tokens have short factors
       for name, method in [("prompt", PromptTuningConfig), ("prefix", PrefixTuningConfig)]},
    "prefix_projection_hidden": Case("llama_gqa_head_dim", PrefixTuningConfig, SOFT | dict(
        prefix_projection=True, encoder_hidden_size=20)),
}


def perturb(trainable, seed):
    """Away from the start by normal numbers of deviation 0.2."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in trainable:
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)


@contextmanager
def only_warns(name, expected):
    """Any warning that is not expected is an error, and so is an expected one that does not come."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)  # of one library to the other
        yield
    found = {str(w.message) for w in found}
    unexpected = [w for w in found if not any(re.search(e, w) for e in expected)]
    missing = [e for e in expected if not any(re.search(e, w) for w in found)]
    assert not unexpected and not missing, f"{name}: unexpected warnings {unexpected}, missing {missing}"


def make_initialisation(name, case, seed):
    """start/, residual.safetensors and converted/ of a case whose adapter/ is made."""
    folder, base = GOLDENS / name, load(case.base)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **case.settings))
    save_adapter(model, folder / "start", case.base)
    after = {n.replace(".base_layer.", "."): p.detach() for n, p in base.named_parameters() if ".lora_" not in n}
    changed = {n: w.contiguous() for n, w in after.items() if not torch.equal(w, before[n])}
    if not changed:
        return
    save_file(changed, folder / "residual.safetensors")
    perturb([(n, p) for n, p in model.named_parameters() if p.requires_grad], seed)
    with TemporaryDirectory() as temporary:  # peft writes `true` over the start's initialisation
        start = copytree(folder / "start", Path(temporary) / "start")
        save_adapter(model, folder / "converted", case.base, path_initial_model_for_weight_conversion=str(start))
    ids, labels = batch(base.config.vocab_size, seed)
    converted, _ = run(PeftModel.from_pretrained(load(case.base), folder / "converted"), ids, labels)
    logits = load_file(folder / "golden.safetensors")["logits"]
    assert (converted - logits).abs().max() < 1e-5, f"{name}: converted, it is another adapter"


def make_soft(name, case, seed):
    folder = fresh(GOLDENS / name)
    torch.manual_seed(seed)
    model = get_peft_model(load(case.base), case.method(task_type="CAUSAL_LM", **case.settings))
    trainable = [(n.removeprefix("prompt_encoder.default."), p) for n, p in model.named_parameters() if p.requires_grad]
    perturb(trainable, seed)
    save_adapter(model, folder / "adapter", case.base)
    (folder / "base.txt").write_text(case.base + "\n")
    latent = {n: p.detach().clone() for n, p in trainable}
    ids, labels = batch(model.config.get_text_config().vocab_size, seed)
    computed, _ = run(model, ids, labels)
    rows = PeftModel.from_pretrained(load(case.base), folder / "adapter")
    logits, loss = run(rows, ids, labels)
    grads, more = {k: v.clone() for k, v in gradients(rows).items()}, {}
    if case.method is not PrefixTuningConfig:
        first = loss_with_first(rows, ids, labels)
        more = {"loss_with_first": first} | {f"first.{k}": v for k, v in gradients(rows).items()}
        more = {k: v.detach().float().contiguous() for k, v in more.items()}
    write(folder / "golden.safetensors", ids, labels, logits, loss, grads, **more)
    if len(latent) > 1:
        save_file(latent, folder / "latent.safetensors")
        save_file({n: p.grad.float().contiguous() for n, p in trainable}, folder / "latent_gradients.safetensors")
        assert all(p.grad.abs().max() > 1e-7 for _, p in trainable), [n for n, p in trainable if p.grad.abs().max() <= 1e-7]
    untouched, _ = run(load(case.base), ids, labels)
    assert (computed - logits).abs().max() < 1e-5, f"{name}: peft reads back something else"
    assert (untouched - logits).abs().max() > 0.1
    print(f"{name}: loss {loss.item():.4f}, rows {list(grads['prompt_embeddings'].shape)}, {len(latent)} parameters")


def loss_with_first(model, ids, labels):
    """The mean of peft's own loss over all labels, those of first tokens too; fills `.grad`."""
    total = 0.0
    for tokens, targets in zip(ids.split(LENGTHS), labels.split(LENGTHS)):
        count = (targets != -100).sum()
        if count > 0:
            total = total + count * model(input_ids=tokens[None], labels=targets[None], use_cache=False).loss
    loss = total / (labels != -100).sum()
    model.zero_grad()
    loss.backward()
    return loss.reshape(1)


def make(name, case):
    seed, soft = seed_of(name), case.method in (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)
    with only_warns(name, case.warns):
        if soft:
            make_soft(name, case, seed)
        else:
            config = case.method(task_type="CAUSAL_LM", **case.settings)
            adapter_case(name, case.base, config, seed, start=perturb, save_embedding_layers=case.save_embedding_layers)
            if case.settings.get("init_lora_weights"):
                make_initialisation(name, case, seed)


if __name__ == "__main__":
    logging.disable_progress_bar()
    for base in {case.base for case in CASES.values()}:
        float64_inside(sys.modules[type(load(base)).__module__])
    for name in sys.argv[1:] or CASES:
        make(name, CASES[name])
