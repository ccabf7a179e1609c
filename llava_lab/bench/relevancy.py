"""How fast and how small gradient-weighted relevancy is, beside plain answering and beside the peers' way.

Every way answers the same question with the same number of tokens first, and that is part of its time; the floor is
that answer alone. The peers' way is lvlm-interpret's, re-stated on today's transformers: eager attention, the
graph of every step kept, one backward per token over it, whole ``S x S`` products. It is measured as it is, with
weights that ask for gradients because nobody told them not to, and with that mistake mended.

Each measurement is a process of its own; its memory is its peak above the loaded model's, less the floor's.

Source of the peers' way: IntelLabs/lvlm-interpret @ e87dcf8 ``utils_model.py``, ``utils_relevancy.py``.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import _child, _median, _row
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lab.models import Lab
    from llava_lab.results import Run

logger = logging.getLogger(__name__)

QUESTION = "What color is the car?"
NEW_TOKENS = 32
SIDE = 336  # of the square test picture, pixels
FLOOR = "plain answer"
PEER = "lvlm-interpret's way, as it is"

Maps = np.ndarray  # (maps, patches)


def measure(model: str, repeats: int, *, new: int = NEW_TOKENS) -> dict[str, Any]:
    """The rows of ``llava-lab bench relevancy``; the form is `llava_lab.bench.run`'s."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for number in range(repeats):  # side by side, so that a drifting machine drifts for all
        for name in WAYS:
            body = "from llava_lab.bench.relevancy import measure_way\nfacts = measure_way(model, way, new)\n"
            measured[name].append(_child(body, model=model, way=name, new=new))
            logger.info("%s, %d of %d: %.2f s", name, number + 1, repeats, measured[name][-1]["seconds"])
    return rows(measured)


def rows(measured: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and ratios of what `measure_way` found, over and over, for each way."""
    floor, peer = (_median(measured[name], "seconds") for name in (FLOOR, PEER))
    theirs = np.array(measured[PEER][-1]["maps"])
    table = []
    for name, runs in measured.items():
        seconds, own = _median(runs, "seconds"), runs[-1]["maps"]
        same = name.endswith("its maps") or name.startswith("lvlm-interpret")
        error = float(np.abs(np.array(own) - theirs).max()) if same else None
        extra = None if runs[0]["peak_mb"] is None else _median(runs, "peak_mb") - _median(measured[FLOOR], "peak_mb")
        table.append(_row(name, seconds, floor, seconds / peer, extra, error))
    last = measured[FLOOR][-1]
    fraction = _median(measured[WHOLE], "peak_flops_fraction")
    return {"device": last["device"], "threads": last["threads"], "rows": table, "floor": floor, "peak_flops_fraction": fraction}


def measure_way(model: str, way: str, new: int) -> dict[str, Any]:
    """Time and memory of one way, once, in this process: {"seconds", "peak_mb", "maps", "device", "peak_flops_fraction"}."""
    from llava_lab.bench.harness import bench_lab

    if way not in WAYS:
        raise OptionError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    lab = bench_lab(model)
    if way.startswith("lvlm-interpret"):
        lab.model.set_attn_implementation("eager")
        lab.model.requires_grad_(way == PEER)
    import llava_lab.attribution  # noqa: F401  code is no part of what a way needs, nor are the weights

    assert lab.fingerprint  # which reads every weight, so that all of them are in memory
    gc.collect()
    before = _memory(reset=True)
    WAYS[way](lab, 1)  # the first call pays for what is prepared once
    start = time.perf_counter()
    maps = WAYS[way](lab, new)
    seconds = time.perf_counter() - start
    after = _memory()
    flops, peak = (_flops(lambda: WAYS[way](lab, new)), _matmul_peak(lab)) if way == WHOLE else (None, None)
    return {
        "seconds": seconds,
        "peak_mb": None if before is None or after is None else max(after - before, 0.0),  # the kernel counts in batches
        "maps": maps.tolist(),
        "device": str(lab.device),
        "peak_flops_fraction": None if flops is None or peak is None else flops / seconds / peak,
    }


def _answer(lab: Lab, new: int) -> Run:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return lab.ask(pixels, QUESTION, max_new_tokens=new)


def _plain(lab: Lab, new: int) -> Maps:
    _answer(lab, new)
    return np.zeros((0, 0))


def _ours(target: Callable[[int], Any], **options: Any) -> Callable[[Lab, int], Maps]:
    def way(lab: Lab, new: int) -> Maps:
        from llava_lab.attribution import attribute

        run = _answer(lab, new)
        values = attribute(lab, run, method="relevancy", target=target(new), **options).values
        return values.reshape(len(values), -1)

    return way


def _peer(lab: Lab, new: int) -> Maps:
    """Generation with gradients, every step's attentions and graph kept; then a backward and a product per token."""
    import torch

    picture = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    ids = torch.from_numpy(lab.sequence(QUESTION).token_ids)[None].to(lab.device)
    start, stop = lab.sequence(QUESTION).segments["image"]
    given: dict[str, Any] = {"input_ids": ids, "pixel_values": lab.pixels(picture).requires_grad_()}
    steps, maps = [], []
    with torch.enable_grad():
        for _ in range(new):
            out = lab.model(**given, use_cache=True, output_attentions=True, logits_to_keep=1)
            for attention in out.attentions:
                attention.retain_grad()
            scores = out.logits[0, -1].float()
            token = scores.detach().index_fill(0, torch.tensor([lab.image_id]), -torch.inf).argmax()
            steps.append((scores[token], out.attentions))
            given = {"input_ids": token.view(1, 1), "past_key_values": out.past_key_values}
        earlier: list[Tensor] = []
        for score, attentions in steps:
            lab.model.zero_grad()
            score.backward(retain_graph=True)
            row = _their_rules(attentions, earlier)
            maps.append((row / row.sum())[start:stop].cpu().numpy())
    return np.stack(maps)


def _their_rules(attentions: tuple[Tensor, ...], earlier: list[Tensor]) -> Tensor:
    """Rules 5 and 6 over whole matrices, their upper rows from earlier steps; the last row, without its one."""
    import torch

    total = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for layer, attention in enumerate(attentions):
        assert attention.grad is not None
        cam = (attention.grad[0].float() * attention[0].detach().float()).clamp_min(0).mean(0)
        if len(earlier) > layer:
            cam = torch.cat([torch.nn.functional.pad(earlier[layer], (0, 1)), cam])
            earlier[layer] = cam
        else:
            earlier.append(cam)
        total += cam @ total
    row = total[-1].clone()
    row[-1] -= 1
    return row


WHOLE = "ours: one map for the whole answer"
WAYS: Mapping[str, Callable[[Lab, int], Maps]] = MappingProxyType(
    {
        FLOOR: _plain,
        WHOLE: _ours(lambda new: "answer"),
        "ours: one map per token, exact": _ours(lambda new: list(range(new))),
        "ours: one map per token, its maps": _ours(lambda new: list(range(new)), variant="lvlm-interpret"),
        PEER: _peer,
        "lvlm-interpret's way, weights frozen": _peer,
    }
)


def _flops(work: Callable[[], Any]) -> int:
    """Multiplications and additions in matrix products, by torch's own formulae; the CPU's attention kernel has none."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Count(TorchDispatchMode):  # FlopCounterMode also follows modules, with hooks that forbid a leaf inside a layer
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            formula = flop_registry.get(func._overloadpacket)
            self.total += int(formula(*args, **(kwargs or {}), out_val=out)) if formula else 0
            return out

    with Count() as counter:
        work()
    return counter.total


def _matmul_peak(lab: Lab, *, size: int = 1024, times: int = 7) -> float:
    """Multiplications and additions a second in a plain square product, in the model's dtype: the machine's own limit."""
    import torch

    one = torch.randn(size, size, device=lab.device, dtype=lab.dtype)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        (one @ one)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _memory(*, reset: bool = False) -> float | None:
    """The process's peak memory in MB since the last reset; with ``reset`` what it holds now. None where Linux does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    wanted = "VmRSS:" if reset else "VmHWM:"
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(wanted)), None)
