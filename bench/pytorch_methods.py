"""PyTorch + peft counterpart of methods.py: trains on the same rows with the same settings, and leaves the adapter to be scored by the
same `retune eval`.

    python bench/pytorch_methods.py --model DIR --train F.jsonl --method lora | prompt_tuning --out DIR [--epochs 3] [--seed 1]

Settings are those of methods.py and retune's defaults: LoRA r 16, alpha 32 on all linears at 2e-4; prompt tuning with 16 virtual tokens
from the vocabulary at 3e-2; AdamW without decay, cosine schedule with a warm-up of 3%, clipping at 1, batches of 8 rows of at most 256
tokens, shuffled anew each epoch. Rows and labels as pytorch_epoch.py makes them, but in peft's own order and from peft's own start.
"""

import random
from time import perf_counter

import pytorch_common as common
from pytorch_epoch import collate, read

RATES = {"lora": 2e-4, "prompt_tuning": 3e-2}


def main():
    options = common.parser(__doc__)
    options.add_argument("--train", required=True)
    options.add_argument("--out", required=True)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--max-length", type=int, default=256)
    args = options.parse_args()
    common.preload(args)

    import torch
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = read(args.train, tokenizer, args.max_length)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    if args.method == "lora":
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        config = PromptTuningConfig(num_virtual_tokens=16, prompt_tuning_init="SAMPLE_VOCAB", tokenizer_name_or_path=args.model,
                                    task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATES[args.method], weight_decay=0.0, fused=True)
    shuffled, batches = random.Random(args.seed), []
    for _ in range(args.epochs):
        order = shuffled.sample(rows, len(rows))
        batches += [order[i:i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * len(batches)), len(batches))
    start, losses = perf_counter(), []
    for batch in batches:
        loss = model(**collate(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    seconds = perf_counter() - start
    model.save_pretrained(args.out)
    common.report(args, {"losses": losses, "seconds": seconds, "peak_rss_bytes": common.peak_rss_bytes(),
                         "trainable_parameters": sum(p.numel() for p in trainable)})


if __name__ == "__main__":
    main()
