"""Makes the goldens of combined adapters in crates/retune-adapter/tests/goldens/combine: three LoRA adapters on one layer of the tiny
Llama (unequal ranks, alphas and modules, one of them rsLoRA), and what peft's `add_weighted_adapter` makes of them.

    python goldens/make_combine.py          (torch, transformers, peft, safetensors)

one/, two/, three/   the adapters as peft saves them
cases.json           a list of calls: adapters, weights, and add_weighted_adapter's arguments; `masks` names the masks that were drawn
golden.safetensors   <case>.<module>.lora_A.weight [r, in] and .lora_B.weight [out, r], as peft computed them in float32; their scale is 1
masks.safetensors    <masks>.<module>.<adapter>.<lora_A | lora_B | change>, uint8, for the kinds that drop at random
"""

import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from common import fresh, load, randomise, seed_of, sort_lists

BASE = "llama_tied"
FOLDER = Path(__file__).resolve().parent.parent / "crates" / "retune-adapter" / "tests" / "goldens" / "combine"

LAYER = dict(task_type="CAUSAL_LM", layers_to_transform=[0])
ADAPTERS = {
    "one": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "two": dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "three": dict(r=6, lora_alpha=5, use_rslora=True, target_modules=["k_proj", "q_proj"]),
}

PAIR, ALL, RSLORA_FIRST = ["one", "two"], ["one", "two", "three"], ["three", "one"]
# Adapters of equal rank, and those of any.
EQUAL = [(PAIR, [0.7, 0.3]), (PAIR, [1.0, -0.5]), (PAIR, [-1.0, -0.5])]
ANY = [(ALL, [0.5, 0.3, 0.4]), (ALL, [1.0, -0.5, 0.7]), (RSLORA_FIRST, [-0.8, 0.6])]
KINDS = [
    ("linear", EQUAL, {}),
    ("ties", EQUAL, dict(density=0.5)),
    ("ties", EQUAL, dict(density=0.3, majority_sign_method="frequency")),
    ("dare_linear", EQUAL, dict(density=0.4)),
    ("dare_ties", EQUAL, dict(density=0.6)),
    ("dare_ties", EQUAL, dict(density=0.6, majority_sign_method="frequency")),
    ("magnitude_prune", EQUAL, dict(density=0.35)),
    ("cat", ANY, {}),
    ("svd", ANY, {}),
    ("svd", ANY, dict(svd_rank=3)),
    ("ties_svd", ANY, dict(density=0.5)),
    ("ties_svd", ANY, dict(density=0.7, majority_sign_method="frequency", svd_rank=9)),
    ("dare_linear_svd", ANY, dict(density=0.5)),
    ("dare_ties_svd", ANY, dict(density=0.5)),
    ("magnitude_prune_svd", ANY, dict(density=0.3)),
]


def make_adapter(name, settings):
    model = get_peft_model(load(BASE), LoraConfig(**LAYER, **settings))
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad], seed_of(name))
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(FOLDER / name, save_embedding_layers=False)
    (FOLDER / name / "README.md").unlink()
    sort_lists(FOLDER / name / "adapter_config.json")


class FixedMasks:
    """Stands in for torch.bernoulli: the n-th mask of a call depends on its number and its density alone."""

    def __init__(self):
        self.drawn = []

    def __call__(self, probabilities):
        generator = torch.Generator().manual_seed(len(self.drawn))
        mask = (torch.rand(probabilities.shape, generator=generator) < probabilities).to(probabilities.dtype)
        self.drawn.append(mask)
        return mask


def masks_by_name(drawn, model, adapters, dense):
    """The masks of a call under their names: peft goes through the modules, and in each through the adapters, A before B."""
    drawn, named = iter(drawn), {}
    for module, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        present = [adapter for adapter in adapters if adapter in layer.lora_A]
        for part in ["change"] if dense else ["lora_A", "lora_B"]:
            named |= {f"{module}.{adapter}.{part}": next(drawn).to(torch.uint8) for adapter in present}
    assert next(drawn, None) is None
    return named


def run(number, kind, adapters, weights, settings):
    """One call of add_weighted_adapter: its description, its tensors, and the masks it drew."""
    first, *others = adapters
    model = PeftModel.from_pretrained(load(BASE), FOLDER / first, adapter_name=first)
    for name in others:
        model.load_adapter(FOLDER / name, adapter_name=name)
    masks = torch.bernoulli = FixedMasks()
    model.add_weighted_adapter(adapters, weights, "combined", combination_type=kind, **settings)
    tensors = {}
    for module, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and "combined" in layer.lora_A:
            tensors[f"{number}.{module}.lora_A.weight"] = layer.lora_A["combined"].weight.data.contiguous().clone()
            tensors[f"{number}.{module}.lora_B.weight"] = layer.lora_B["combined"].weight.data.contiguous().clone()
    case = dict(adapters=adapters, weights=weights, kind=kind, r=model.peft_config["combined"].r, **settings)
    if masks.drawn:
        dense = kind.endswith("_svd")
        case["masks"] = f"{'-'.join(adapters)}.{'change' if dense else 'factors'}.{settings['density']}"
        drawn = {f"{case['masks']}.{k}": v for k, v in masks_by_name(masks.drawn, model, adapters, dense).items()}
    else:
        drawn = {}
    return case, tensors, drawn


if __name__ == "__main__":
    fresh(FOLDER)
    for name, settings in ADAPTERS.items():
        make_adapter(name, settings)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)
    cases, tensors, masks = [], {}, {}
    for kind, calls, settings in KINDS:
        for adapters, weights in calls:
            case, made, drawn = run(len(cases), kind, adapters, weights, settings)
            cases.append(case)
            tensors |= made
            assert all(torch.equal(masks.get(k, v), v) for k, v in drawn.items())
            masks |= drawn
    lines = ",\n".join(json.dumps(case) for case in cases)
    (FOLDER / "cases.json").write_text(f"[\n{lines}\n]\n")
    save_file(tensors, FOLDER / "golden.safetensors")
    save_file(masks, FOLDER / "masks.safetensors")
    print(f"{len(cases)} cases, {len(tensors)} tensors, {len(masks)} masks")
