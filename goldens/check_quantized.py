"""Loads a checkpoint that `retune quantize` wrote with transformers and bitsandbytes, every matrix's storage as the config says, and
compares its logits with what retune computes over the same checkpoint.

    python goldens/check_quantized.py --model DIR --logits F.safetensors --tokens 1,2,3 [--tolerance 1e-3]

The file is what `retune logits --model DIR --tokens 1,2,3` wrote. Prints the largest absolute difference and ||ours - theirs|| / ||theirs||, and how
many linears are in 4 bits; exit code 1 above the tolerance (on the latter), or where none is. The reference computes in float32 over the
weights as `dequantize_4bit` gives them; where a row is no whole number of blocks, over the values that make_bitsandbytes.py has of them, since
bitsandbytes' kernel for AVX-512 begins a block with each row.
"""

import argparse
import sys


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--logits", required=True)
    options.add_argument("--tokens", required=True, type=lambda text: [int(number) for number in text.split(",")])
    options.add_argument("--tolerance", type=float, default=1e-3)
    args = options.parse_args()

    import bitsandbytes as bnb
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from common import forward
    from make_bitsandbytes import values

    ours = load_file(args.logits)["logits"].float()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager", device_map={"": "cpu"}).eval()
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    plain = 0
    for module in linears:
        module.compute_dtype = torch.float32
        module.compute_type_is_set = True
        module.support_avx512bf16_for_cpu = False  # which computes in bfloat16
        if module.in_features % module.weight.quant_state.blocksize:
            weight = torch.from_numpy(values(module.weight.numpy().ravel(), module.weight.quant_state))
            module.forward = lambda x, w=weight, b=module.bias: torch.nn.functional.linear(x, w, b)
            plain += 1
    kinds = sorted({(str(m.weight.quant_state.quant_type), m.weight.quant_state.nested) for m in linears})
    with torch.no_grad():
        theirs = forward(model, torch.tensor(args.tokens))[-len(ours):].float()
    relative = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-9)).item()
    print(f"largest difference {(ours - theirs).abs().max().item():.3e}, relative {relative:.3e}, {len(linears)} linears in 4 bits: "
          + ", ".join(f"{kind}{' with double quantization' if nested else ''}" for kind, nested in kinds)
          + f", {plain} of them with rows that are no whole blocks")
    sys.exit(0 if linears and relative <= args.tolerance else 1)


if __name__ == "__main__":
    main()
