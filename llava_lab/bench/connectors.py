"""What a step of stage 1 costs for several connectors: ours beside frozen full forwards and the common mistake.

Every way takes one step (forward, backward, AdamW) of the same connectors on the same batch of random tokens, every answer
as long as the next, so that nobody pays for padding. Floor: transformers' own forward with `labels`, once for each
connector, everything frozen but the connector. Peer: the same with `requires_grad` left on everywhere, as a loaded
model has it, and only the connector in the optimiser. Ours: `training.lean_step`, with features from the cache or, in
the first epoch, from the tower once for all connectors. A row's `max_error` is its gradients' largest difference from
the floor's, as a share of the largest gradient of that connector.

Each measurement is a process of its own; its memory is its peak above the loaded model's, less the floor's.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import _child, _median, _row
from llava_lab.bench.relevancy import _flops, _matmul_peak, _memory
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llava_lab.models import Lab
    from llava_lab.training.together import LeanStep

logger = logging.getLogger(__name__)

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
    """The rows of ``llava-lab bench connectors``; the form is `llava_lab.bench.run`'s.

    Rows also have "tokens_per_second" and "peak_flops_fraction"; "loss_curves" has a linear connector's losses over
    `CURVE_STEPS` steps in float32 and in bfloat16. The top's "peak_flops_fraction" is the lean step's.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    body = "from llava_lab.bench.connectors import measure_way\nfacts = measure_way(model, way)\n"
    for number in range(repeats):  # side by side, so that a drifting machine drifts for all
        for name in WAYS:
            measured[name].append(_child(body, model=model, way=name))
            logger.info("%s, %d of %d: %.2f s", name, number + 1, repeats, measured[name][-1]["seconds"])
    curves = _child("from llava_lab.bench.connectors import loss_curves\nfacts = {'curves': loss_curves(model)}\n", model=model)
    return {**rows(measured), "loss_curves": curves["curves"]}


def rows(measured: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and ratios of what `measure_way` found, over and over, for each way."""
    floor, peer = (_median(measured[name], "seconds") for name in (FLOOR, PEER))
    theirs, table = measured[FLOOR][-1]["gradients"], []
    for name, runs in measured.items():
        seconds = _median(runs, "seconds")
        extra = None if runs[0]["peak_mb"] is None else _median(runs, "peak_mb") - _median(measured[FLOOR], "peak_mb")
        row = _row(name, seconds, floor, seconds / peer, extra, error_of(runs[-1]["gradients"], theirs))
        speed = {key: _median(runs, key) for key in ("tokens_per_second", "peak_flops_fraction")}
        table.append({**row, **speed})
    last, fraction = measured[FLOOR][-1], _median(measured[OURS], "peak_flops_fraction")
    return {"device": last["device"], "threads": last["threads"], "rows": table, "floor": floor, "peak_flops_fraction": fraction}


def error_of(mine: Gradients, theirs: Gradients) -> float:
    """Largest difference of gradients as a share of the connector's largest one."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(mine, theirs, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def measure_way(model: str, way: str) -> dict[str, Any]:
    """One way, once, in this process: seconds, peak_mb, gradients, tokens_per_second, peak_flops_fraction, device."""
    if way not in WAYS:
        raise OptionError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    setting = prepare(model, half=way == HALF)
    everything = setting.connectors
    if way == PEER:
        setting.lab.model.requires_grad_(True)
    setting.connectors = everything[:1]
    WAYS[way](setting)  # the first step pays for what is prepared once
    setting.lab.model.zero_grad(set_to_none=True)
    setting.connectors = everything
    gc.collect()
    before = _memory(reset=True)
    start = time.perf_counter()
    gradients = WAYS[way](setting)
    seconds = time.perf_counter() - start
    after = _memory()
    peak = _half_peak(setting.lab) if way == HALF else _matmul_peak(setting.lab)
    return {
        "seconds": seconds,
        "peak_mb": None if before is None or after is None else max(after - before, 0.0),  # the kernel counts in batches
        "gradients": gradients,
        "tokens_per_second": setting.tokens / seconds,
        "peak_flops_fraction": _work(lambda: WAYS[way](setting)) / seconds / peak,
        "device": str(setting.lab.device),
    }


def prepare(model: str, *, half: bool = False) -> Setting:
    """A batch of `BATCH` rows of equal length with noise for pictures, and fresh connectors that train."""
    import torch

    from llava_lab.bench.harness import bench_lab
    from llava_lab.connectors import new_connector
    from llava_lab.training.features import tower_features
    from llava_lab.training.text import IGNORE
    from llava_lab.training.together import LeanStep

    lab, rng = bench_lab(model), np.random.default_rng(0)
    lab.model.requires_grad_(False).eval()
    assert lab.fingerprint  # which reads every weight, so that all of them are in memory
    words = np.setdiff1d(np.arange(len(lab.tokenizer)), [lab.image_id])
    prompt, found = rng.choice(words, BEFORE), []
    for _ in range(BATCH):
        ids = np.concatenate([prompt, [lab.image_id], rng.choice(words, QUESTION + ANSWER)]).astype(np.int64)
        found.append((ids, np.where(np.arange(len(ids)) >= len(ids) - ANSWER, ids, IGNORE).astype(np.int64)))
    side = lab.model.config.vision_config.image_size
    pixels = torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(0)).to(lab.device, lab.dtype)
    made = [new_connector(lab, kind, seed=number).requires_grad_(True) for number, kind in enumerate(KINDS)]
    step = LeanStep(lab.model, dtype=torch.bfloat16 if half else None)
    return Setting(lab, found, pixels, tower_features(lab.model, pixels), list(made), step)


def loss_curves(model: str, *, steps: int = CURVE_STEPS) -> dict[str, list[float]]:
    """Losses of the same linear connector over `steps` steps on one batch, in float32 and in bfloat16; nats per token."""
    import torch

    from llava_lab.training.together import texts

    curves = {}
    for name, half in (("float32", False), ("bfloat16", True)):
        setting = prepare(model, half=half)
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

    lab = setting.lab
    count = lab.grid[0] * lab.grid[1]
    repeats = [np.where(ids == lab.image_id, count, 1) for ids, _ in setting.rows]
    ids, labels = (
        torch.from_numpy(np.stack([np.repeat(row[which], times) for row, times in zip(setting.rows, repeats, strict=True)]))
        for which in (0, 1)
    )
    given: dict[str, Any] = {"input_ids": ids.to(lab.device), "labels": labels.to(lab.device), "use_cache": False}
    own, gradients = layout.connector_of(lab.model), []
    features = _seen(setting) if share else None
    try:
        for connector in setting.connectors:
            layout.replace_connector(lab.model, connector)
            if features is None:
                loss = lab.model(**given, pixel_values=setting.pixels).loss
            else:
                loss = _with_features(lab, given, features)
            gradients.append(_update(connector, loss))
    finally:
        layout.replace_connector(lab.model, own)
    return gradients


def _with_features(lab: Lab, given: dict[str, Any], features: Tensor) -> Tensor:
    from llava_lab.training.trainer import reading_features

    with reading_features(lab.model, cached=True):
        return lab.model(**given, pixel_values=features).loss


def _seen(setting: Setting) -> Tensor:
    from llava_lab.training.features import tower_features

    return tower_features(setting.lab.model, setting.pixels)


def _lean(setting: Setting, *, first: bool = False) -> Gradients:
    from llava_lab.training.together import texts

    words = texts(setting.rows, setting.lab.image_id)
    features = _seen(setting) if first else setting.features
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


def _work(work: Callable[[], Any]) -> float:
    """Multiplications and additions in matrix products and in the CPU's attention kernel, which `_flops` does not count."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Attention(TorchDispatchMode):
        total = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._overloadpacket.__name__
            if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
                backward = name.endswith("backward")
                q, k = args[1:3] if backward else args[:2]
                batch, heads, rows, width = q.shape
                half = 0.5 if any(one is True for one in [*args, *(kwargs or {}).values()]) else 1.0  # causal: a triangle
                products = 5 if backward else 2
                self.total += half * products * 2 * batch * heads * rows * k.shape[2] * width
            return func(*args, **(kwargs or {}))

    with Attention() as counter:
        counted = _flops(work)
    return counted + counter.total


def _half_peak(lab: Lab) -> float:
    """The matmul peak in bfloat16."""
    from types import SimpleNamespace

    import torch

    return _matmul_peak(SimpleNamespace(device=lab.device, dtype=torch.bfloat16))  # type: ignore[arg-type]


WAYS: Mapping[str, Callable[[Setting], Gradients]] = MappingProxyType(
    {
        FLOOR: _stock,
        PEER: _stock,
        SHARED: lambda setting: _stock(setting, share=True),
        FIRST: lambda setting: _lean(setting, first=True),
        OURS: _lean,
        HALF: _lean,
    }
)
