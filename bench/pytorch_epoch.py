"""PyTorch + peft counterpart of a real run: one epoch over alpaca rows, then the held-out loss.

    python bench/pytorch_epoch.py --model DIR --train F.jsonl --eval F.jsonl --method lora --adapter DIR

Rows {instruction, input, output}: the user's message is instruction + blank line + input (instruction alone if input is
empty), the assistant's is output. Chat template of the tokenizer (SmolLM2's adds its default system message). Labels on the
answer and its closing end-of-sequence token alone; the newline after that is dropped. A row longer than --max-length is cut
on its right, as plain trainers do: its answer suffers, and a row that loses all its labels is dropped.
Batches of rows in order, padded on the right; loss = summed cross-entropy over the batch's label tokens / their count;
AdamW without decay, transformers' linear schedule with warm-up (its first step has rate 0; --max-steps shortens the whole
schedule; 0 scores the untouched model), clipping. Prints JSON; seconds are the training loop's, without loading or scoring.
"""

import json
from pathlib import Path
from time import perf_counter

import pytorch_common as common


def encode(row, tokenizer, max_length):
    """Token ids and labels (-100: ignored) of one row."""
    user = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    start = next((i for i, (a, b) in enumerate(zip(ids, prompt)) if a != b), len(prompt))
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return ids[:end][:max_length], ([-100] * start + ids[start:end])[:max_length]


def read(path, tokenizer, max_length, order="file"):
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if order != "file":
        rows = [rows[i] for i in json.loads(Path(order).read_text())]
    encoded = [encode(row, tokenizer, max_length) for row in rows]
    return [(ids, labels) for ids, labels in encoded if any(label != -100 for label in labels)]


def collate(rows, pad):
    import torch

    width = max(len(ids) for ids, _ in rows)
    fill = lambda values, filler: torch.tensor([v + [filler] * (width - len(v)) for v in values])
    return {
        "input_ids": fill([ids for ids, _ in rows], pad),
        "labels": fill([labels for _, labels in rows], -100),
        "attention_mask": fill([[1] * len(ids) for ids, _ in rows], 0),
    }


def count_labels(rows):
    return sum(label != -100 for _, labels in rows for label in labels[1:])


def main():
    options = common.parser(__doc__)
    options.add_argument("--train", required=True)
    options.add_argument("--eval", required=True)
    options.add_argument("--adapter", help="PEFT directory: the initial adapter (lora)")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--max-length", type=int, default=256)
    options.add_argument("--warmup-steps", type=int, default=5)
    options.add_argument("--max-steps", type=int)
    options.add_argument("--max-grad-norm", type=float, default=1.0)
    options.add_argument("--order", default="file", help="'file', or a JSON file with a list of row numbers from 0")
    options.add_argument("--save", help="write the trained adapter or model to this directory")
    args = options.parse_args()
    if (args.method == "lora") != (args.adapter is not None):
        options.error("--adapter goes with --method lora, and with it alone")
    common.preload(args)

    import torch
    from transformers import AutoTokenizer, get_linear_schedule_with_warmup

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = read(args.train, tokenizer, args.max_length, args.order)
    held_out = read(args.eval, tokenizer, args.max_length)
    model, trainable, optimizer = common.load(args, args.adapter)
    step_model = torch.compile(model, dynamic=True) if args.compile else model

    batches = [train[i:i + args.batch_size] for i in range(0, len(train), args.batch_size)]
    if args.max_steps is not None:
        batches = batches[:args.max_steps]
    schedule = get_linear_schedule_with_warmup(optimizer, args.warmup_steps, len(batches))
    losses, norms, seconds, padded = [], [], [], 0
    for rows in batches:
        start = perf_counter()
        batch = collate(rows, tokenizer.pad_token_id)
        loss = step_model(**batch).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        padded += batch["input_ids"].numel()
        seconds.append(perf_counter() - start)
    peak = common.peak_rss_bytes()
    if args.save:
        model.save_pretrained(args.save)

    model.eval()
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(held_out), args.batch_size):
            rows = held_out[i:i + args.batch_size]
            total += model(**collate(rows, tokenizer.pad_token_id)).loss.item() * count_labels(rows)

    seen = [row for rows in batches for row in rows]
    common.report(args, {
        "losses": losses,
        "gradient_norms": norms,
        "held_out_loss": total / count_labels(held_out),
        "held_out_label_tokens": count_labels(held_out),
        "seconds": sum(seconds),
        "step_seconds": seconds,
        "peak_rss_bytes": peak,
        "peak_rss_bytes_with_scoring": common.peak_rss_bytes(),
        "rows": len(seen),
        "tokens": sum(len(ids) for ids, _ in seen),
        "padded_tokens": padded,
        "label_tokens": count_labels(seen),
        "trainable_parameters": sum(p.numel() for p in trainable),
    })


if __name__ == "__main__":
    main()
