"""Makes crates/retune-eval/tests/goldens/bootstrap.json: paired differences of two models' scores, with scipy's percentile intervals.

    python goldens/make_bootstrap.py            (scipy 1.16 or later, numpy)

Each case has rows (the loss of either model summed over the row, and how much of the row counts), the draws that scipy made, and what
scipy.stats.bootstrap says of them.
"""

import json
from pathlib import Path

import numpy as np
from scipy import stats

OUT = Path(__file__).resolve().parent.parent / "crates" / "retune-eval" / "tests" / "goldens" / "bootstrap.json"


def difference(first, second, weight, axis=-1):
    return (second - first).sum(axis=axis) / weight.sum(axis=axis)


def case(rows, resamples, weighted, seed):
    rng = np.random.default_rng(seed)
    weight = rng.integers(1, 40, rows).astype(float) if weighted else np.ones(rows)
    first = np.round(weight * rng.gamma(2.0, 0.8, rows), 4)
    second = np.round(first * rng.uniform(0.7, 1.2, rows), 4)
    options = {"paired": True, "vectorized": True, "n_resamples": resamples, "method": "percentile", "confidence_level": 0.95}
    found = stats.bootstrap((first, second, weight), difference, rng=np.random.default_rng(seed), **options)
    # scipy draws the numbers of rows, all at once.
    draws = np.random.default_rng(seed).integers(0, rows, (resamples, rows))
    again = difference(first[draws], second[draws], weight[draws])
    assert np.array_equal(np.sort(again), np.sort(found.bootstrap_distribution)), "these are not scipy's draws"
    return {
        "first": first.tolist(), "second": second.tolist(), "weight": weight.tolist(), "draws": draws.tolist(),
        "estimate": float(difference(first, second, weight)), "standard_error": float(found.standard_error),
        "low": float(found.confidence_interval.low), "high": float(found.confidence_interval.high),
    }


cases = [case(rows, resamples, weighted, seed) for rows, resamples, weighted, seed in
         [(30, 400, True, 1), (17, 251, False, 2), (2, 50, True, 3), (60, 99, True, 4)]]
OUT.write_text(json.dumps(cases, separators=(",", ":")) + "\n")
