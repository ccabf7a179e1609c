"""What a map for every token of an answer costs, beside the answer alone and beside the peers' way.

The floor is the plain answer with sdpa; stock ``generate`` stands beside it. The peers' way is eager attention with
everything kept (``output_attentions=True``), then the head mean: over layers, as VLM-Visualizer draws it (without its
removal of the first token, so that the numbers can be compared), or multiplied through the layers to a rollout. Ours
are the same maps taken while the answer is made, and by one more forward of the finished answer.

Each measurement is a process of its own; its memory is its peak above the loaded model's, less the floor's.

Source of the peers' way: zjysteven/VLM-Visualizer ``utils.py``.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import _child, _median, _row, bench_lab
from llava_lab.bench.relevancy import QUESTION, SIDE, _flops, _matmul_peak, _memory
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lab.models import Lab

logger = logging.getLogger(__name__)

NEW_TOKENS = 32
FLOOR = "plain answer, sdpa"
STOCK = "stock generate, sdpa"
KEPT = "all attention kept, then averaged"
ROLLED = "all attention kept, then rollout"
ROLLOUT: Mapping[str, Any] = MappingProxyType({"residual": 0.5, "null": "none"})  # as the peers' is defined

Maps = np.ndarray  # (tokens, patches)


def measure(model: str, repeats: int, *, new: int = NEW_TOKENS) -> dict[str, Any]:
    """The rows of ``llava-lab bench capture``; the form is `llava_lab.bench.run`'s, and each row's memory over the floor's."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for number in range(repeats):  # side by side, so that a drifting machine drifts for all
        for name in WAYS:
            body = "from llava_lab.bench.capture import measure_way\nfacts = measure_way(model, way, new)\n"
            measured[name].append(_child(body, model=model, way=name, new=new))
            logger.info("%s, %d of %d: %.2f s", name, number + 1, repeats, measured[name][-1]["seconds"])
    return rows(measured)


def rows(measured: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and ratios of what `measure_way` found, over and over, for each way."""
    seconds = {name: _median(runs, "seconds") for name, runs in measured.items()}
    memory = None if measured[FLOOR][0]["peak_mb"] is None else _median(measured[FLOOR], "peak_mb")
    table = []
    for name, runs in measured.items():
        peer = KEPT if name == KEPT or ": attention" in name else ROLLED
        own, theirs = (np.array(measured[one][-1]["maps"]) for one in (name, peer))
        error = float(np.abs(own - theirs).max()) if own.size and name not in WITHOUT_PEER else None
        mine = None if memory is None else _median(runs, "peak_mb")
        extra = None if mine is None or memory is None else mine - memory
        row = _row(name, seconds[name], seconds[FLOOR], seconds[name] / seconds[peer], extra, error)
        table.append({**row, "memory_ratio": mine / memory if mine and memory else None})
    last = measured[FLOOR][-1]
    fraction = _median(measured[FLOOR], "peak_flops_fraction")
    head = {"device": last["device"], "threads": last["threads"], "rows": table}
    return {**head, "floor": seconds[FLOOR], "peak_flops_fraction": fraction}


def measure_way(model: str, way: str, new: int) -> dict[str, Any]:
    """Time and memory of one way, once, in this process: {"seconds", "peak_mb", "maps", "device", "peak_flops_fraction"}."""
    if way not in WAYS:
        raise OptionError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    lab = bench_lab(model)
    lab.model.set_attn_implementation("eager" if way in (KEPT, ROLLED) else "sdpa")
    import llava_lab.attribution  # noqa: F401  code is no part of what a way needs, nor are the weights

    assert lab.fingerprint  # which reads every weight, so that all of them are in memory
    gc.collect()
    before = _memory(reset=True)
    WAYS[way](lab, 2)  # the first call pays for what is prepared once
    start = time.perf_counter()
    maps = WAYS[way](lab, new)
    seconds = time.perf_counter() - start
    after = _memory()
    fraction = _flops(lambda: WAYS[way](lab, new)) / seconds / _matmul_peak(lab) if way == FLOOR else None
    return {
        "seconds": seconds,
        "peak_mb": None if before is None or after is None else max(after - before, 0.0),
        "maps": maps.tolist(),
        "device": str(lab.device),
        "peak_flops_fraction": fraction,
    }


def _picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)


def _generate(lab: Lab, new: int, **options: Any) -> Any:
    import torch

    ids = torch.from_numpy(lab.sequence(QUESTION).token_ids)[None].to(lab.device)
    with torch.no_grad():
        return lab.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=lab.pixels(_picture()),
            do_sample=False,
            min_new_tokens=new,  # every way is given the same number of tokens
            max_new_tokens=new,
            suppress_tokens=[lab.image_id],
            pad_token_id=0,
            **options,
        )


def _stock(lab: Lab, new: int) -> Maps:
    _generate(lab, new)
    return np.zeros((0, 0))


def _plain(lab: Lab, new: int) -> Maps:
    lab.ask(_picture(), QUESTION, max_new_tokens=new)
    return np.zeros((0, 0))


def _kept(lab: Lab, new: int) -> Maps:
    steps = _generate(lab, new, return_dict_in_generate=True, output_attentions=True).attentions
    image = slice(*lab.sequence(QUESTION).segments["image"])
    maps = [sum(layer[0].float().mean(0)[-1] for layer in step) / len(step) for step in steps]
    return np.stack([row[image].cpu().numpy() for row in maps])


def _rolled(lab: Lab, new: int) -> Maps:
    import torch

    steps = _generate(lab, new, return_dict_in_generate=True, output_attentions=True).attentions
    start, stop = lab.sequence(QUESTION).segments["image"]
    prompt = steps[0][0].shape[-1]
    size = prompt + new - 1
    total = torch.eye(size, device=lab.device)
    for layer in range(len(steps[0])):
        whole = _assembled([step[layer][0].float().mean(0) for step in steps], size)
        total = (0.5 * whole + 0.5 * torch.eye(size, device=lab.device)) @ total
    return total[prompt - 1 :, start:stop].cpu().numpy()


def _assembled(parts: list[Tensor], size: int) -> Tensor:
    """One square matrix from the prompt's rows and one row for each later step."""
    import torch

    return torch.cat([torch.nn.functional.pad(part, (0, size - part.shape[-1])) for part in parts])


def _during(method: str, **options: Any) -> Callable[[Lab, int], Maps]:
    def way(lab: Lab, new: int) -> Maps:
        from llava_lab.attribution import ask_and_attribute

        asked: dict[str, Any] = {"target": list(range(new)), "max_new_tokens": new}
        _, found = ask_and_attribute(lab, _picture(), QUESTION, method=method, options=options, **asked)
        return found.values.reshape(new, -1)

    return way


def _after(method: str, **options: Any) -> Callable[[Lab, int], Maps]:
    def way(lab: Lab, new: int) -> Maps:
        from llava_lab.attribution import attribute

        run = lab.ask(_picture(), QUESTION, max_new_tokens=new)
        return attribute(lab, run, method=method, target=list(range(new)), **options).values.reshape(new, -1)

    return way


DEFAULTS = "ours: rollout with its defaults, while answering"
WITHOUT_PEER = (FLOOR, STOCK, DEFAULTS)  # no map, or one the peers do not make
WAYS: Mapping[str, Callable[[Lab, int], Maps]] = MappingProxyType(
    {
        FLOOR: _plain,
        STOCK: _stock,
        KEPT: _kept,
        "ours: attention while answering": _during("attention"),
        "ours: attention by one more forward": _after("attention"),
        ROLLED: _rolled,
        "ours: rollout while answering": _during("rollout", **ROLLOUT),
        DEFAULTS: _during("rollout"),
        "ours: rollout by one more forward": _after("rollout", **ROLLOUT),
    }
)
