"""How fast and how small occlusion and what stands in for it are, beside plain forwards and beside captum.

The score is the log-probability of a given answer. The floor is one plain forward of the finished sequence, so a
ratio to it reads as "as many forwards". Peers are captum's FeatureAblation over the pixels, one patch at a time
and 16 at once, and for tokens its LayerFeatureAblation at the connector, which gives the numbers our exact sweep
gives. Sweeps are measured on at most `PATCHES` patches, spread evenly, and their time is scaled to all of them;
everything else is measured whole.

The exact sweep also runs with its matrix products in bfloat16 (`torch.autocast`), ranked against float32 like what stands in
for it. No method offers this: on processors with such products it is twice as fast at 576 tokens, and on `tiny` most of what it
tells apart is its own rounding.

How well each approximation ranks patches is told by Spearman's correlation with the exact sweep, on pictures
of the picture book; only a trained model can tell. Memory is told as it is, not less the floor's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import QUESTION, SHAPES, Call, Comparison, bench_lab, child, noise_picture, side_by_side, table
from llava_lab.stats import spearman

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lab.bench.harness import Measured
    from llava_lab.models import Lab
    from llava_lab.results import Run

NEW_TOKENS = 5
PATCHES = 144  # a sweep measures at most so many
PICTURES = 8  # that ranks are compared on
FLOOR = "plain forward"
PIXELS = "captum FeatureAblation at the pixels, one by one"
TOKENS = "captum LayerFeatureAblation at the connector, one by one"
EXACT = "ours: exact at the connector"
HALF = "ours: exact at the connector, products in bfloat16"
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


def measure(model: str, repeats: int) -> dict[str, Any]:
    """The rows of ``llava-lab bench occlusion``, each with its rank correlation where one exists."""
    measured = side_by_side(COMPARISON, model, repeats)
    ranks: dict[str, float] = {}
    if model not in SHAPES:
        body = "from llava_lab.bench.occlusion import measure_ranks\nfacts = {'ranks': measure_ranks(model, pictures)}\n"
        ranks = child(body, model=model, pictures=PICTURES)["ranks"]
    return result(measured, ranks)


def result(measured: Measured, ranks: Mapping[str, float]) -> dict[str, Any]:
    """The table, "rank_correlation" added."""
    made = table(COMPARISON, measured)
    for row in made["rows"]:
        row["rank_correlation"] = ranks.get(row["name"].removeprefix("ours: "))
    return made


def prepare(model: str, way: str) -> Call:
    """One answered question and the patches that are measured; the time of a sweep is scaled to all patches."""
    lab = bench_lab(model)
    run = lab.ask(noise_picture(), QUESTION, max_new_tokens=NEW_TOKENS)
    total = run.map.rows * run.map.cols
    chosen = np.unique(np.linspace(0, total - 1, min(PATCHES, total)).round().astype(int))
    return Call(lab, (lab, run, chosen), first=(lab, run, chosen[-1:]), scale=total / len(chosen) if way in SWEEPS else 1.0)


def measure_ranks(model: str, pictures: int) -> dict[str, float]:
    """Each stand-in's mean Spearman correlation with the exact sweep, over pictures of the picture book."""
    from llava_lab.attribution import attribute
    from llava_lab.evaluation.items import load_items
    from llava_lab.models import load

    lab = load(model)
    half = HALF.removeprefix("ours: ")
    correlations: dict[str, list[float]] = {name: [] for name in (half, *STAND_INS)}
    for item in load_items("picturebook", n=2 * pictures)[::5][:pictures]:  # one question each, of different types
        run = lab.ask(item.drawn(), item.question, max_new_tokens=16)
        exact = attribute(lab, run, method="occlusion", at="projector", fill="mean").values.ravel()
        correlations[half].append(spearman(SWEEPS[HALF](lab, run, np.arange(len(exact))), exact))
        for name, options in STAND_INS.items():
            correlations[name].append(spearman(attribute(lab, run, method=name, **options).values.ravel(), exact))
    # a flat map agrees with nothing
    return {name: float(np.nan_to_num(values).mean()) for name, values in correlations.items()}


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
        from llava_lab.replay.alter import Pixels

        with undisturbed(lab.model):
            here = Pixels(lab, run, (run.target(),), at="pixels", fill="mean")
            mask = _numbered(run, chosen).repeat_interleave(here.patch, 0).repeat_interleave(here.patch, 1)
            ablation = FeatureAblation(lambda pixels: here.read(pixels)[:, 0])
            drops = ablation.attribute(
                here.values, baselines=here.filling("mean"), feature_mask=mask[None, None], perturbations_per_eval=at_once
            )
        return drops[0, 0, :: here.patch, :: here.patch].flatten()[chosen].cpu().numpy()

    return way


def _captum_connector(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
    from captum.attr import LayerFeatureAblation

    from llava_lab.capture import undisturbed
    from llava_lab.models.layout import connector_of
    from llava_lab.replay.alter import Tokens
    from llava_lab.replay.score import target_score

    with undisturbed(lab.model):
        here = Tokens(lab, run, (run.target(),), at="projector", fill="mean")
        pixels, score = target_score(lab, run, (run.target(),))
        ablation = LayerFeatureAblation(lambda picture: score(picture)[:, 0], connector_of(lab.model))
        mask = _numbered(run, chosen).reshape(1, -1, 1)
        drops = ablation.attribute(pixels, layer_baselines=here.tokens(here.filling("mean")), layer_mask=mask)
    return drops[0, chosen, 0].cpu().numpy()


def _captum_tokens(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
    from captum.attr import FeatureAblation

    from llava_lab.capture import undisturbed
    from llava_lab.replay.alter import Tokens

    with undisturbed(lab.model):
        here = Tokens(lab, run, (run.target(),), at="projector", fill="mean")
        ablation = FeatureAblation(lambda tokens: here.read(tokens)[:, 0])
        drops = ablation.attribute(here.values, baselines=here.filling("mean"), feature_mask=_numbered(run, chosen)[None, None])
    return drops[0, 0].flatten()[chosen].cpu().numpy()


def _ours(at: str, *, half: bool = False) -> Callable[[Lab, Run, np.ndarray], Values]:
    def way(lab: Lab, run: Run, chosen: np.ndarray) -> Values:
        import torch

        from llava_lab.replay import open_altered

        drops = np.zeros(len(chosen))
        with torch.autocast(lab.device.type, dtype=torch.bfloat16, enabled=half):
            altered = open_altered(lab, run, (run.target(),), at=at, fill="mean")
            masks = torch.zeros(len(chosen), *altered.grid, dtype=torch.bool)
            masks.flatten(1)[torch.arange(len(chosen)), torch.from_numpy(chosen)] = True
            for which, scores in altered.sweep(masks):
                drops[which] = (altered.whole - scores)[:, 0].numpy()
        return drops

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


SWEEPS: Mapping[str, Callable[[Lab, Run, np.ndarray], Values]] = MappingProxyType(
    {
        PIXELS: _captum_pixels(1),
        "captum FeatureAblation at the pixels, 16 at once": _captum_pixels(16),
        "ours: occlusion at the pixels": _ours("pixels"),
        TOKENS: _captum_connector,
        "captum FeatureAblation of the tokens, the tower run once": _captum_tokens,
        EXACT: _ours("projector"),
        HALF: _ours("projector", half=True),
    }
)
COMPARISON = Comparison(
    name="occlusion",
    ways={FLOOR: _forward, **SWEEPS, **{f"ours: {name}": _method(name) for name in STAND_INS}},
    prepare=prepare,
    floor=FLOOR,
    peer=lambda way: PIXELS if way == FLOOR or "pixels" in way else TOKENS,
    counted=(EXACT,),
    over_floor=False,
)
