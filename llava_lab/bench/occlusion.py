"""How fast and how small occlusion and what stands in for it are, beside plain forwards and beside captum.

The score is the log-probability of a given answer. The floor is one plain forward of the finished sequence, so a
ratio to it reads as "as many forwards". Peers are captum's FeatureAblation over the pixels, one patch at a time
and 16 at once, and for tokens its LayerFeatureAblation at the projector, which gives the numbers our exact sweep
gives. Sweeps are measured on at most `PATCHES` patches, spread evenly, and their time is scaled to all of them;
everything else is measured whole.

How well each approximation ranks patches is told by Spearman's correlation with the exact sweep, on pictures
of the picture book; only a trained model can tell. Each measurement is a process of its own.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import SHAPES, _child, _median, _row, bench_lab
from llava_lab.bench.relevancy import _flops, _matmul_peak, _memory
from llava_lab.errors import OptionError
from llava_lab.stats import spearman

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lab.models import Lab
    from llava_lab.results import Run

logger = logging.getLogger(__name__)

QUESTION = "What color is the car?"
NEW_TOKENS = 5
SIDE = 336  # of the square test picture, pixels
PATCHES = 144  # a sweep measures at most so many
PICTURES = 8  # that ranks are compared on
FLOOR = "plain forward"
PIXELS = "captum FeatureAblation at the pixels, one by one"
TOKENS = "captum LayerFeatureAblation at the projector, one by one"
EXACT = "ours: exact at the projector"
# Methods that stand in for the exact sweep, with the options they are compared under.
STAND_INS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "occlusion_coarse": {"at": "projector", "fill": "mean"},
        "token_knockout": {},
        "rise": {"at": "projector", "fill": "mean"},
        "shapley": {"at": "projector", "fill": "mean"},
        "kernel_shap": {"at": "projector", "fill": "mean"},
        "greedy": {"at": "projector", "fill": "mean"},
    }
)
WARM: Mapping[str, dict[str, Any]] = MappingProxyType(
    {"rise": {"masks": 8}, "shapley": {"orders": 1}, "kernel_shap": {"samples": 8}, "greedy": {"steps": 1}}
)

Values = np.ndarray  # (patches measured,)


def measure(model: str, repeats: int, *, patches: int = PATCHES) -> dict[str, Any]:
    """Rows of ``llava-lab bench occlusion``, in the form of `llava_lab.bench.run`; a rank correlation where one exists."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for number in range(repeats):  # side by side, so that a drifting machine drifts for all
        for name in WAYS:
            body = "from llava_lab.bench.occlusion import measure_way\nfacts = measure_way(model, way, patches)\n"
            measured[name].append(_child(body, model=model, way=name, patches=patches))
            logger.info("%s, %d of %d: %.2f s", name, number + 1, repeats, measured[name][-1]["seconds"])
    ranks: dict[str, float] = {}
    if model not in SHAPES:
        body = "from llava_lab.bench.occlusion import measure_ranks\nfacts = {'ranks': measure_ranks(model, pictures)}\n"
        ranks = _child(body, model=model, pictures=PICTURES)["ranks"]
    return rows(measured, ranks)


def rows(measured: Mapping[str, list[dict[str, Any]]], ranks: Mapping[str, float]) -> dict[str, Any]:
    """Medians and ratios of what `measure_way` found, over and over, for each way."""
    seconds = {name: _median(runs, "seconds") for name, runs in measured.items()}
    table = []
    for name, runs in measured.items():
        peer = PIXELS if name in (FLOOR, PIXELS) or "pixels" in name else TOKENS
        own, theirs = (np.array(measured[one][-1]["values"]) for one in (name, peer))
        error = float(np.abs(own - theirs).max()) if own.size and own.shape == theirs.shape else None
        extra = None if runs[0]["peak_mb"] is None else _median(runs, "peak_mb")
        row = _row(name, seconds[name], seconds[FLOOR], seconds[name] / seconds[peer], extra, error)
        table.append({**row, "rank_correlation": ranks.get(name.removeprefix("ours: "))})
    last = measured[FLOOR][-1]
    fraction = _median(measured[EXACT], "peak_flops_fraction")
    return {
        "device": last["device"],
        "threads": last["threads"],
        "rows": table,
        "floor": seconds[FLOOR],
        "peak_flops_fraction": fraction,
    }


def measure_way(model: str, way: str, patches: int) -> dict[str, Any]:
    """Time and memory of one way, once, in this process; a sweep's seconds are those of all patches."""
    if way not in WAYS:
        raise OptionError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    lab = bench_lab(model)
    picture = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    run = lab.ask(picture, QUESTION, max_new_tokens=NEW_TOKENS)
    total = run.map.rows * run.map.cols
    chosen = np.unique(np.linspace(0, total - 1, min(patches, total)).round().astype(int))
    WAYS[way](lab, run, chosen[-1:])  # the first call pays for what is loaded and compiled once
    gc.collect()
    before = _memory(reset=True)
    start = time.perf_counter()
    values = WAYS[way](lab, run, chosen)
    seconds = time.perf_counter() - start
    after = _memory()
    fraction = None
    if way == EXACT:
        fraction = _flops(lambda: WAYS[way](lab, run, chosen)) / seconds / _matmul_peak(lab)
    return {
        "seconds": seconds * (total / len(chosen) if len(values) else 1),
        "peak_mb": None if before is None or after is None else after - before,
        "values": values.tolist(),
        "device": str(lab.device),
        "peak_flops_fraction": fraction,
    }


def measure_ranks(model: str, pictures: int) -> dict[str, float]:
    """Each stand-in's mean Spearman correlation with the exact sweep, over pictures of the picture book."""
    from llava_lab.attribution import attribute
    from llava_lab.evaluation.items import load_items
    from llava_lab.models import load

    lab = load(model)
    found: dict[str, list[float]] = {name: [] for name in STAND_INS}
    for item in load_items("picturebook", n=2 * pictures)[::5][:pictures]:  # one question each, of different types
        run = lab.ask(item.draw(), item.question, max_new_tokens=16)
        exact = attribute(lab, run, method="occlusion", at="projector", fill="mean").values.ravel()
        for name, options in STAND_INS.items():
            found[name].append(spearman(attribute(lab, run, method=name, **options).values.ravel(), exact))
    # a flat map agrees with nothing
    return {name: float(np.nan_to_num(values).mean()) for name, values in found.items()}


# -- the ways -------------------------------------------------------------------------------


def _forward(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
    from llava_lab.capture import undisturbed
    from llava_lab.replay import target_score

    with undisturbed(lab.model):
        pixels, score = target_score(lab, run, (run.target(),))
        score(pixels)
    return np.zeros(0)


def _captum_pixels(at_once: int) -> Callable[[Lab, Run, np.ndarray], Values]:
    def way(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
        from captum.attr import FeatureAblation

        from llava_lab.capture import undisturbed
        from llava_lab.replay.alter import open_level

        with undisturbed(lab.model):
            level = open_level(lab, run, (run.target(),), at="pixels", fill="mean")
            mask = _numbered(run, chosen).repeat_interleave(level.patch, 0).repeat_interleave(level.patch, 1)
            ablation = FeatureAblation(lambda pixels: level.score(pixels)[:, 0])
            drops = ablation.attribute(
                level.whole, baselines=level.fill, feature_mask=mask[None, None], perturbations_per_eval=at_once
            )
        return drops[0, 0, :: level.patch, :: level.patch].flatten()[chosen].cpu().numpy()

    return way


def _captum_projector(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
    from captum.attr import LayerFeatureAblation

    from llava_lab.capture import undisturbed
    from llava_lab.models.layout import connector_of
    from llava_lab.replay.alter import open_level
    from llava_lab.replay.score import target_score

    with undisturbed(lab.model):
        level = open_level(lab, run, (run.target(),), at="projector", fill="mean")
        assert level.fill is not None
        pixels, score = target_score(lab, run, (run.target(),))
        ablation = LayerFeatureAblation(lambda picture: score(picture)[:, 0], connector_of(lab.model))
        mask = _numbered(run, chosen).reshape(1, -1, 1)
        drops = ablation.attribute(pixels, layer_baselines=level.tokens(level.fill), layer_mask=mask)
    return drops[0, chosen, 0].cpu().numpy()


def _captum_tokens(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
    from captum.attr import FeatureAblation

    from llava_lab.capture import undisturbed
    from llava_lab.replay.alter import open_level

    with undisturbed(lab.model):
        level = open_level(lab, run, (run.target(),), at="projector", fill="mean")
        ablation = FeatureAblation(lambda tokens: level.score(tokens)[:, 0])
        drops = ablation.attribute(level.whole, baselines=level.fill, feature_mask=_numbered(run, chosen)[None, None])
    return drops[0, 0].flatten()[chosen].cpu().numpy()


def _ours(at: str) -> Callable[[Lab, Run, np.ndarray], Values]:
    def way(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
        from llava_lab.attribution.occlusion import masks_of, sweep
        from llava_lab.capture import undisturbed
        from llava_lab.replay.alter import open_level
        from llava_lab.replay.prefix import sweep_tokens

        places = [divmod(int(patch), run.map.cols) for patch in chosen]
        blocks = [(slice(row, row + 1), slice(col, col + 1)) for row, col in places]
        targets = (run.target(),)
        with undisturbed(lab.model):
            level = open_level(lab, run, targets, at=at, fill="mean")
            if at == "pixels":
                drops, _ = sweep(level.whole, level.fill, blocks, level.score, patch=level.patch)
                return drops[:, 0].cpu().numpy()
            hidden = masks_of(blocks, level.grid).to(lab.device)
            drops, order, _, _ = sweep_tokens(lab, run, targets, level, hidden)
        return drops[np.argsort(order), 0].cpu().numpy()

    return way


def _method(name: str) -> Callable[[Lab, Run, np.ndarray], Values]:
    def way(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
        from llava_lab.attribution import attribute

        warming = len(chosen) == 1
        attribute(lab, run, method=name, **{**STAND_INS[name], **(WARM.get(name, {}) if warming else {})})
        return np.zeros(0)

    return way


def _numbered(run: Run, chosen: np.ndarray) -> Tensor:
    """Feature numbers over the grid: each chosen patch its own, all others one more together, if there are any."""
    import torch

    numbers = np.full(run.map.rows * run.map.cols, len(chosen))
    numbers[chosen] = np.arange(len(chosen))
    return torch.from_numpy(numbers.reshape(run.map.rows, run.map.cols))


WAYS: Mapping[str, Callable[[Lab, Run, np.ndarray], Values]] = MappingProxyType(
    {
        FLOOR: _forward,
        PIXELS: _captum_pixels(1),
        "captum FeatureAblation at the pixels, 16 at once": _captum_pixels(16),
        "ours: occlusion at the pixels": _ours("pixels"),
        TOKENS: _captum_projector,
        "captum FeatureAblation of the tokens, the tower run once": _captum_tokens,
        EXACT: _ours("projector"),
        **{f"ours: {name}": _method(name) for name in STAND_INS},
    }
)
