"""A comparison of connectors put together by hand: known answers, known differences, no model and no training."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_lab.results import Ablation

CONNECTORS = ("linear", "mlp2x_gelu", "bottleneck")
SEEDS, PICTURES, EACH = 5, 3, 4  # questions: 12 of each split
SPLITS, TYPES = ("test", "compositions"), ("all", "color", "count")
RATES = np.array([1e-3, 3e-3, 1e-2])


def example_ablation(*, budgets: tuple[str, ...] = ("samples",), **changes: Any) -> Ablation:
    """Three connectors with and without stage 1. On the first split: pair 0 (MLP against linear, with stage 1) is better by
    10 points, pair 1 not distinguishable at 2, pair 2 worse by 8; the pairs without stage 1 differ by 0."""
    count = len(CONNECTORS)
    arms = [(name, budget, aligned) for budget in budgets for aligned in (True, False) for name in CONNECTORS]
    right = np.zeros((len(arms), SEEDS, 2 * PICTURES * EACH), bool)
    for arm in range(len(arms)):
        for seed in range(SEEDS):
            right[arm, seed, : 4 + arm % count + seed % 2] = right[arm, seed, 12 : 15 + seed] = True
    starts = range(0, len(arms), count)
    pairs = [(i, j) for start in starts for i in range(start, start + count) for j in range(i + 1, start + count)]
    pairs += [(arm + count, arm) for start in starts[::2] for arm in range(start, start + count)]
    cells = (len(pairs), len(SPLITS), len(TYPES))
    accuracy = np.stack([[right[arm][:, 12 * x : 12 * x + 12].mean() for x in range(2)] for arm in range(len(arms))])
    accuracy = np.repeat(accuracy[:, :, None], len(TYPES), 2)
    fields: dict[str, Any] = {
        "connectors": tuple(name for name, _, _ in arms),
        "budgets": tuple(budget for _, budget, _ in arms),
        "stage1": np.array([aligned for _, _, aligned in arms]),
        "steps": np.array([(80 if aligned else 0, 100) for _, _, aligned in arms]),
        "rate": np.array([RATES[arm % count] for arm in range(len(arms))]),
        "parameters": np.array([49_408, 115_200, 49_400] * (len(arms) // count)),
        "flops": np.full(len(arms), 1e12),
        "sweep_rates": RATES,
        "sweep_loss": np.stack([0.5 + 0.1 * np.abs(np.arange(3) - arm % count) + 0.01 * arm for arm in range(len(arms))]),
        "sweep_accuracy": np.full((len(arms), 3), 0.5),
        "seeds": tuple(range(SEEDS)),
        "splits": SPLITS,
        "types": TYPES,
        "right": right,
        "question_split": np.repeat([0, 1], PICTURES * EACH),
        "question_type": np.tile([1, 2], PICTURES * EACH),
        "question_picture": np.tile(np.repeat(np.arange(PICTURES), EACH), 2),
        "losses": np.ones((len(arms), SEEDS, 180), np.float32),
        "accuracy": accuracy,
        "accuracy_sd": np.full(accuracy.shape, 0.02),
        "accuracy_interval": np.stack([accuracy - 0.05, accuracy + 0.05], -1),
        "questions": np.array([[12, 6, 6], [12, 6, 6]]),
        "pairs": np.array(pairs),
        "data": "picturebook",
        "pictures": (2000, 200, PICTURES, PICTURES),
        "seed": 0,
        "model": "somewhere/start",
        "start": {"vision": "0123", "language": "4567", "head": "89ab"},
        "recipe": {
            "name": "tiny ablation",
            "align": {"name": "align", "steps": 80, "batch": 16},
            "instruct": {"name": "instruct", "steps": 100, "batch": 12},
        },
        "seconds": 7200.0,
        "notes": ("a note to read",),
        "stated": 0.02,
    }
    return Ablation(**{**fields, **_differences(cells), **changes})


def _differences(cells: tuple[int, ...]) -> dict[str, Any]:
    """What pairs differ by, and how sure that is."""
    effect, verdict = np.zeros(cells), np.zeros(cells, np.int64)
    effect[:3, 0, 0], verdict[:3, 0, 0] = (0.10, 0.02, -0.08), (1, 0, -1)
    spread, needed = np.full(cells, 0.03), np.full(cells, 40.0)
    return {
        "effect": effect,
        "picture_interval": np.stack([effect - 0.01, effect + 0.01], -1),
        "seed_sd": spread,
        "seed_interval": np.stack([effect - spread, effect + spread], -1),
        "p": np.where(verdict != 0, 0.001, 0.4),
        "p_adjusted": np.where(verdict != 0, 0.004, 0.8),
        "gained": np.full(cells, 3),
        "lost": np.full(cells, 2),
        "mcnemar_p": np.full(cells, 0.5),
        "seeds_needed": needed,
        "pictures_needed": needed * 10,
        "detectable": np.full(cells, 0.04),
        "verdict": verdict,
    }
