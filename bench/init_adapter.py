"""Makes an initial LoRA adapter with peft (A Kaiming-uniform, B zero) for both sides of a comparison to start from.

    python bench/init_adapter.py --model DIR --out DIR [--r 16] [--alpha 32] [--targets all-linear | q_proj,v_proj] [--seed 0]
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--out", required=True)
    options.add_argument("--r", type=int, default=16)
    options.add_argument("--alpha", type=float, default=32.0)
    options.add_argument("--targets", default="all-linear")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    alpha = int(args.alpha) if args.alpha.is_integer() else args.alpha
    torch.manual_seed(args.seed)
    model = get_peft_model(model, LoraConfig(r=args.r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"))
    model.save_pretrained(args.out)
    model.print_trainable_parameters()


if __name__ == "__main__":
    main()
