"""What a step of stage 1 costs for several connectors: ours beside frozen full forwards and the common mistake.

Every way takes one step (forward, backward, AdamW) of the same connectors on the same batch of random tokens, every answer
as long as the next, so that nobody pays for padding. Floor: transformers' own forward with `labels`, once for each
connector, everything frozen but the connector. Peer: the same with `requires_grad` left on everywhere, as a loaded
model has it, and only the connector in the optimiser. Ours: `training.lean_step`, with features from the cache or, in
the first epoch, from the tower once for all connectors. A row's `max_error` is its gradients' largest difference from
the floor's, as a share of the largest gradient of that connector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import Call, Comparison, bench_lab, child, median, side_by_side, table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llava_lab.bench.harness import Measured
    from llava_lab.models import Lab
    from llava_lab.training.together import LeanStep

KINDS = ("linear", "mlp2x_gelu", "linear2x", "bottleneck")
BATCH = 4
BEFORE, QUESTION, ANSWER = 36, 24, 10  # tokens of LLaVA's prompt before the picture and after it, and of the answer
SAMPLE = 512  # gradients of each connector that are compared
CURVE_STEPS, CURVE_RATE = 12, 1e-3
FLOOR = "frozen full forward, one connector after the other"
PEER = "the common mistake: everything with requires_grad"
SHARED = "frozen full forward, vision once for all connectors"
FIRST = "ours, first epoch: vision once, lean step"
OURS = "ours: cached features, lean step"
HALF = "ours in bfloat16"


@dataclass
class Setting:
    """What a way is given: the model, a batch of rows with one image id each, its pixels and features, the connectors."""

    lab: Lab
    rows: list[tuple[np.ndarray, np.ndarray]]  # (ids, labels), int64 (T,)
    pixels: Tensor  # (B, 3, S, S)
    features: Tensor  # (B, K, W)
    connectors: list[nn.Module]
    step: LeanStep

    @property
    def tokens(self) -> int:
        """Tokens of the batch with its pictures, times the connectors."""
        rows, cols = self.lab.grid
        return len(self.connectors) * sum(len(ids) - 1 + rows * cols for ids, _ in self.rows)


Gradients = list[list[float]]  # of each connector, SAMPLE entries at most


def measure(model: str, repeats: int) -> dict[str, Any]:
    """The rows of ``llava-lab bench connectors``.

    Rows also have "tokens_per_second" and "peak_flops_fraction"; "loss_curves" has a linear connector's losses over
    `CURVE_STEPS` steps in float32 and in bfloat16. The top's "peak_flops_fraction" is the lean step's.
    """
    made = result(side_by_side(COMPARISON, model, repeats))
    curves = child("from llava_lab.bench.connectors import loss_curves\nfacts = {'curves': loss_curves(model)}\n", model=model)
    return {**made, "loss_curves": curves["curves"]}


def result(measured: Measured) -> dict[str, Any]:
    """The table, each row with the tokens it took a second and its share of the machine's peak."""
    made = table(COMPARISON, measured)
    for row in made["rows"]:
        runs = measured[row["name"]]
        row["tokens_per_second"] = runs[0]["tokens"] / row["seconds"]
        row["peak_flops_fraction"] = median(runs, "peak_flops_fraction")
    return made


def share_of_largest(own: Gradients, theirs: Gradients) -> float:
    """Largest difference of gradients as a share of the connector's largest one."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(own, theirs, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def prepare(model: str, way: str) -> Call:
    """A batch and connectors, and one step taken for the first of them, which pays for what is prepared once."""
    import torch

    setting = new_setting(model, half=way == HALF)
    setting.lab.model.requires_grad_(way == PEER)
    COMPARISON.ways[way](replace(setting, connectors=setting.connectors[:1]))
    setting.lab.model.zero_grad(set_to_none=True)
    return Call(setting.lab, (setting,), dtype=torch.bfloat16 if way == HALF else None, facts={"tokens": setting.tokens})


def new_setting(model: str | Lab, *, half: bool = False) -> Setting:
    """A batch of `BATCH` rows of equal length with noise for pictures, and fresh connectors that train."""
    import torch

    from llava_lab.connectors import new_connector
    from llava_lab.training.features import tower_features
    from llava_lab.training.text import IGNORE
    from llava_lab.training.together import LeanStep

    lab, rng = bench_lab(model) if isinstance(model, str) else model, np.random.default_rng(0)
    lab.model.requires_grad_(False).eval()
    words = np.setdiff1d(np.arange(len(lab.tokenizer)), [lab.image_id])
    prompt, rows = rng.choice(words, BEFORE), []
    for _ in range(BATCH):
        ids = np.concatenate([prompt, [lab.image_id], rng.choice(words, QUESTION + ANSWER)]).astype(np.int64)
        rows.append((ids, np.where(np.arange(len(ids)) >= len(ids) - ANSWER, ids, IGNORE).astype(np.int64)))
    side = lab.model.config.vision_config.image_size
    pixels = torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(0)).to(lab.device, lab.dtype)
    connectors = [new_connector(lab, kind, seed=number).requires_grad_(True) for number, kind in enumerate(KINDS)]
    step = LeanStep(lab.model, dtype=torch.bfloat16 if half else None)
    return Setting(lab, rows, pixels, tower_features(lab.model, pixels), list(connectors), step)


def loss_curves(model: str, *, steps: int = CURVE_STEPS) -> dict[str, list[float]]:
    """Losses of the same linear connector over `steps` steps on one batch, in float32 and in bfloat16; nats per token."""
    import torch

    from llava_lab.training.together import texts

    curves = {}
    for name, half in (("float32", False), ("bfloat16", True)):
        setting = new_setting(model, half=half)
        words, connector = texts(setting.rows, setting.lab.image_id), setting.connectors[0]
        optimizer, losses = torch.optim.AdamW(connector.parameters(), lr=CURVE_RATE, weight_decay=0.0), []
        for _ in range(steps):
            loss = setting.step.loss(connector, words, setting.features) / words.count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        curves[name] = losses
    return curves


def _stock(setting: Setting, *, share: bool = False) -> Gradients:
    """transformers' own forward with labels, the connectors put in its place in turn."""
    import torch

    from llava_lab.models import layout
    from llava_lab.training.features import tower_features
    from llava_lab.training.trainer import reading_features

    lab = setting.lab
    count = lab.grid[0] * lab.grid[1]
    repeats = [np.where(ids == lab.image_id, count, 1) for ids, _ in setting.rows]
    ids, labels = (
        torch.from_numpy(np.stack([np.repeat(row[which], times) for row, times in zip(setting.rows, repeats, strict=True)]))
        for which in (0, 1)
    )
    inputs: dict[str, Any] = {"input_ids": ids.to(lab.device), "labels": labels.to(lab.device), "use_cache": False}
    own, gradients = layout.connector_of(lab.model), []
    features = tower_features(lab.model, setting.pixels) if share else None
    try:
        for connector in setting.connectors:
            layout.replace_connector(lab.model, connector)
            if features is None:
                loss = lab.model(**inputs, pixel_values=setting.pixels).loss
            else:
                with reading_features(lab.model, cached=True):
                    loss = lab.model(**inputs, pixel_values=features).loss
            gradients.append(_update(connector, loss))
    finally:
        layout.replace_connector(lab.model, own)
    return gradients


def _lean(setting: Setting, *, first: bool = False) -> Gradients:
    from llava_lab.training.features import tower_features
    from llava_lab.training.together import texts

    words = texts(setting.rows, setting.lab.image_id)
    features = tower_features(setting.lab.model, setting.pixels) if first else setting.features
    return [_update(connector, setting.step.loss(connector, words, features) / words.count) for connector in setting.connectors]


def _update(connector: nn.Module, loss: Tensor) -> list[float]:
    """Backward and AdamW's step, at rate 0 so that every call starts from the same weights; some of the gradients."""
    import torch

    optimizer = torch.optim.AdamW(connector.parameters(), lr=0.0)
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in connector.parameters() if p.grad is not None])
    some = flat[:: max(1, len(flat) // SAMPLE)].float().tolist()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return some


COMPARISON = Comparison(
    name="connectors",
    ways={
        FLOOR: _stock,
        PEER: _stock,
        SHARED: lambda setting: _stock(setting, share=True),
        FIRST: lambda setting: _lean(setting, first=True),
        OURS: _lean,
        HALF: _lean,
    },
    prepare=prepare,
    floor=FLOOR,
    peer=lambda way: PEER,
    exact=FLOOR,
    error=share_of_largest,
    counted=(OURS, FLOOR, PEER, SHARED, FIRST, HALF),
    count_attention=True,
)
