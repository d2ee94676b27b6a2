"""Reads a run's TensorBoard events with the tensorboard package, and compares them with the run's metrics.jsonl.

    python goldens/check_tensorboard.py RUN

RUN is the folder of a run with training.report_to: tensorboard. Exit code 1 where a step is missing, there twice, or has another number.
"""

import json
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "train/loss": "loss",
    "train/grad_norm": "gradient_norm",
    "train/learning_rate": "learning_rate",
    "eval/loss": "eval_loss",
}


def main():
    run = Path(sys.argv[1])
    # Without a limit: by default only some of the steps are kept.
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    missing = {*TAGS, "train/epoch", "train/num_input_tokens_seen"} - set(events.Tags()["scalars"])
    if missing:
        sys.exit(f"no {', '.join(sorted(missing))} among {events.Tags()['scalars']}")
    for tag, key in TAGS.items():
        expected = [(line["step"], line[key]) for line in lines if key in line]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        if [step for step, _ in found] != [step for step, _ in expected]:
            sys.exit(f"{tag} has the steps {[step for step, _ in found]}, metrics.jsonl {[step for step, _ in expected]}")
        for (step, value), (_, number) in zip(found, expected):
            if not math.isclose(value, number, rel_tol=1e-6, abs_tol=1e-12):
                sys.exit(f"{tag} of step {step} is {value}, in metrics.jsonl {number}")
        print(f"{tag}: {len(found)} steps are the same")
    seen = [event.value for event in events.Scalars("train/num_input_tokens_seen")]
    tokens = sum(line["tokens"] for line in lines if "tokens" in line)
    if not math.isclose(seen[-1], tokens, rel_tol=1e-6) or seen != sorted(seen):
        sys.exit(f"train/num_input_tokens_seen ends at {seen[-1]}, metrics.jsonl has {tokens}")


if __name__ == "__main__":
    main()
