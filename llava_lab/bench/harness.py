"""Measured ratios against a floor and against the peers' way: the harness that every benchmark is declared over.

Absolute times drift from machine to machine and from hour to hour, so only ratios taken side by side count. A
benchmark is a `Comparison`: ways to do one thing, and which of them are the floor and the peer. Every measurement is a
process of its own, the ways take turns, and the table holds medians. Memory is a process's peak above the loaded
model's, less the floor's.

Speed and memory depend on shapes, not on weights, so a random model of LLaVA-1.5's token geometry (`SHAPES`: 576 image
tokens, 336 px in patches of 14) measures what a trained one would. It cannot tell whether a map is any good.

    from llava_lab.bench import run

    run("capture", model="random-s", quick=True)["rows"]
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.checks import one_of
from llava_lab.errors import LabError, OptionError
from llava_lab.training.recipe import Architecture

if TYPE_CHECKING:
    import torch

    from llava_lab.models import Lab

logger = logging.getLogger(__name__)

REPEATS, QUICK_REPEATS = 5, 3
QUESTION = "What color is the car?"
SIDE = 336  # of the square test picture, pixels
SAMPLES = 50  # scenes a random model's tokenizer is made from; it only has to spell the question

# name (and module of this folder) -> what it shows
BENCHES: Mapping[str, str] = MappingProxyType(
    {
        "start": "seconds from a started kernel to the first answer, over the bare imports",
        "capture": "a map for every token of an answer, beside plain answering and keeping everything",
        "relevancy": "gradient-weighted relevancy beside plain answering and lvlm-interpret's way",
        "occlusion": "occlusion and its stand-ins beside plain forwards and captum's FeatureAblation",
        "probes": "the logit lens beside a plain forward and the obvious way, here and at 7B width",
        "scale": "loading, answering and every method at LLaVA-1.5-7B's true widths, few layers",
        "serve": "requests a second of `llava-lab serve`, for 1, 8 and 64 clients, beside the same questions without it",
        "connectors": "a training step of four connectors beside frozen full forwards and the common mistake",
        "gpu": "capture, relevancy, occlusion, lens and connectors at LLaVA-1.5-7B's shape, on the CUDA or MPS device here",
    }
)

_GEOMETRY = {"image": 336, "patch": 14, "vision_heads": 8, "vocabulary": 640, "context": 4096}
_SMALL = {"vision_width": 256, "vision_layers": 6, "vision_mlp": 1024, "hidden": 512, "layers": 8, "heads": 8, "mlp": 1376}
_MIDDLE = {"vision_width": 512, "vision_layers": 12, "vision_mlp": 2048, "hidden": 1024, "layers": 16, "heads": 16, "mlp": 2752}
SHAPES: Mapping[str, Architecture] = MappingProxyType(
    {
        "random-s": Architecture(**_GEOMETRY, **_SMALL),
        "random-m": Architecture(**_GEOMETRY, **_MIDDLE),
        # about as many image tokens as LLaVA-NeXT's five tiles, 2,880
        "random-s-2916": Architecture(**{**_GEOMETRY, "image": 756}, **_SMALL),
    }
)


def run(name: str, *, model: str = "tiny", quick: bool = False, layers: int | None = None) -> dict[str, Any]:
    """Measure one benchmark: {"device", "threads", "rows", "floor", "peak_flops_fraction"}.

    "floor" is the floor's seconds. A row has "name", "seconds", "ratio_to_floor", "ratio_to_peer", "extra_mb"
    (peak memory above the floor's) and "max_error" (against the peer's numbers); None where it does not
    apply. `quick` takes the median of 3 instead of 5. `layers` is for the benchmark "scale" alone.

        run("start", quick=True)["rows"][1]["ratio_to_floor"]
    """
    if name not in BENCHES:
        raise OptionError(f"bench must be one of {', '.join(BENCHES)}, got {name!r}")
    if layers is not None and name != "scale":
        raise OptionError(f"layers belong to bench scale, not to bench {name}")
    options = {} if layers is None else {"layers": layers}
    return import_module(f"llava_lab.bench.{name}").measure(model, QUICK_REPEATS if quick else REPEATS, **options)


# -- ways beside one another ------------------------------------------------------------------


def largest_difference(own: Any, theirs: Any) -> float | None:
    """Of two arrays of one shape; None where there are no numbers, or others."""
    mine, other = np.array(own), np.array(theirs)
    return float(np.abs(mine - other).max()) if mine.size and mine.shape == other.shape else None


@dataclass(frozen=True)
class Call:
    """A way made ready in its own process: what it is called with."""

    lab: Lab
    arguments: tuple[Any, ...]
    first: tuple[Any, ...] | None = None  # arguments of a first call, which pays for what is prepared once
    scale: float = 1.0  # how many times as long the whole work takes, where only a part of it is measured
    dtype: torch.dtype | None = None  # of its matrix products; None is the model's
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else its process reports


@dataclass(frozen=True)
class Comparison:
    """Ways to do one thing. A way gives its numbers, an array or lists of them, so that ways can be compared."""

    name: str  # in `BENCHES`, and of the module that has this as its COMPARISON
    ways: Mapping[str, Callable[..., Any]]
    prepare: Callable[[str, str], Call]  # (model, way), in the process that measures it
    floor: str
    peer: Callable[[str], str]  # a way's name -> that of its peer
    exact: str | None = None  # the way whose numbers the others' errors are told by; None: the peer
    other_numbers: Collection[str] = ()  # ways whose numbers are another thing than the peer's
    counted: tuple[str, ...] = ()  # ways whose arithmetic is counted; the first one's share of the machine's peak is the table's
    count_attention: bool = False  # the CPU's attention kernel too
    first_call_counts: bool = False  # whether memory is measured from before the first call
    over_floor: bool = True  # whether a row's memory is told less the floor's
    error: Callable[[Any, Any], float | None] = largest_difference


Measured = Mapping[str, list[dict[str, Any]]]  # way -> what its processes report, one of each repeat


def side_by_side(comparison: Comparison, model: str, repeats: int) -> Measured:
    """Measure every way `repeats` times, each in a process of its own."""
    body = f"from llava_lab.bench.{comparison.name} import COMPARISON\nfrom llava_lab.bench.harness import measure_way\n"
    body += "facts = measure_way(COMPARISON, model, way)\n"
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in comparison.ways}
    # the ways take turns, so that a drifting machine drifts for all
    for number in range(repeats):
        for name, runs in measured.items():
            runs.append(child(body, model=model, way=name))
            logger.info("%s, %s, %d of %d: %.2f s", model, name, number + 1, repeats, runs[-1]["seconds"])
    return measured


def measure_way(comparison: Comparison, model: str, way: str) -> dict[str, Any]:
    """Time and memory of one way, once, in this process: {"seconds", "peak_mb", "values", "device", "peak_flops_fraction"}."""
    work = comparison.ways[one_of("way", way, tuple(comparison.ways))]
    call = comparison.prepare(model, way)
    if call.first is not None and not comparison.first_call_counts:
        work(*call.first)
    gc.collect()
    before = memory(reset=True)
    if call.first is not None and comparison.first_call_counts:
        work(*call.first)
    start = time.perf_counter()
    values = work(*call.arguments)
    seconds = time.perf_counter() - start
    peak = _above(before, memory())
    fraction = None
    if way in comparison.counted:
        count = flops(lambda: work(*call.arguments), attention=comparison.count_attention)
        fraction = count / seconds / matmul_peak(call.lab.device, call.dtype or call.lab.dtype)
    return {
        "seconds": seconds * call.scale,
        "peak_mb": peak,
        "values": values.tolist() if isinstance(values, np.ndarray) else values,
        "device": str(call.lab.device),
        "peak_flops_fraction": fraction,
        **call.facts,
    }


def table(comparison: Comparison, measured: Measured, *, prefix: str = "") -> dict[str, Any]:
    """Medians and ratios of what `measure_way` reported for each way, in the form of `run`."""
    seconds = {name: median(runs, "seconds") for name, runs in measured.items()}
    floor, floor_runs = seconds[comparison.floor], measured[comparison.floor]
    rows = []
    for name, runs in measured.items():
        peer = comparison.peer(name)
        error = None
        if name not in comparison.other_numbers:
            error = comparison.error(runs[-1]["values"], measured[comparison.exact or peer][-1]["values"])
        extra = extra_memory(runs, floor_runs if comparison.over_floor else None)
        rows.append(row(prefix + name, seconds[name], floor, seconds[name] / seconds[peer], extra, error))
    return {
        "device": floor_runs[-1]["device"],
        "threads": floor_runs[-1]["threads"],
        "rows": rows,
        "floor": floor,
        "peak_flops_fraction": median(measured[comparison.counted[0]], "peak_flops_fraction") if comparison.counted else None,
    }


def row(name: str, seconds: float, floor: float, to_peer: float, extra: float | None, error: float | None) -> dict[str, Any]:
    """One row of a table."""
    return {
        "name": name,
        "seconds": seconds,
        "ratio_to_floor": seconds / floor,
        "ratio_to_peer": to_peer,
        "extra_mb": extra,
        "max_error": error,
    }


def median(runs: list[dict[str, Any]], key: str) -> float:
    """The middle of what the processes report under `key`."""
    return float(statistics.median(measured[key] for measured in runs))


def extra_memory(runs: list[dict[str, Any]], floors: list[dict[str, Any]] | None) -> float | None:
    """Median peak in MB, less the floor's where that is given; None where the system does not tell."""
    if runs[0]["peak_mb"] is None:
        return None
    return median(runs, "peak_mb") - (median(floors, "peak_mb") if floors else 0.0)


# -- one process ------------------------------------------------------------------------------

# A script times itself from its first line, as a started kernel would, and writes one JSON object after the clock stopped.
_CLOCK = "import time; begin = time.perf_counter()\n"
_SHOW = """
seconds, cpu_seconds = time.perf_counter() - begin, time.process_time()
import json, sys, torch
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
except ImportError:
    peak = None
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak, "threads": torch.get_num_threads(), **facts}))
"""


def child(body: str, **values: Any) -> dict[str, Any]:
    """Run one script in a fresh interpreter, `values` its variables, and read the JSON object it prints last.

    The script leaves ``facts``, a dictionary; seconds and peak memory of the whole process stand beside them.
    """
    names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    done = subprocess.run([sys.executable, "-c", _CLOCK + names + body + _SHOW], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(f"a benchmark process failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory(*, reset: bool = False) -> float | None:
    """The process's peak memory in MB since the last reset; with `reset` what it holds now. None where Linux does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    wanted = "VmRSS:" if reset else "VmHWM:"
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(wanted)), None)


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float | None, Any]:
    """Median seconds of `work`, its peak memory in MB above what stood before, and what it gave last; in this process."""
    gc.collect()
    before, seconds, result = memory(reset=True), [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), _above(before, memory()), result


def _above(before: float | None, after: float | None) -> float | None:
    # the kernel counts in batches, so a peak may seem to lie below what stood before
    return None if before is None or after is None else max(after - before, 0.0)


def flops(work: Callable[[], Any], *, attention: bool = False) -> float:
    """Multiplications and additions in matrix products, by torch's own formulae.

    The CPU's attention kernel has no formula there; with `attention` it is counted here.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    # torch's own FlopCounterMode also follows modules, with hooks that forbid a leaf inside a layer
    class Count(TorchDispatchMode):
        total = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            formula, name = flop_registry.get(func._overloadpacket), func._overloadpacket.__name__
            if formula:
                self.total += int(formula(*args, **(kwargs or {}), out_val=result))
            elif attention and name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
                backward = name.endswith("backward")
                q, k = args[1:3] if backward else args[:2]
                batch, heads, rows, width = q.shape
                causal = any(value is True for value in [*args, *(kwargs or {}).values()])
                products = (5 if backward else 2) * (0.5 if causal else 1.0)  # causal: a triangle
                self.total += products * 2 * batch * heads * rows * k.shape[2] * width
            return result

    with Count() as counter:
        work()
    return counter.total


def matmul_peak(device: torch.device, dtype: torch.dtype, *, size: int = 1024, times: int = 7) -> float:
    """Multiplications and additions a second in a plain square product: the machine's own limit."""
    import torch

    square = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        (square @ square)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


# -- what is measured on ------------------------------------------------------------------------


def bench_lab(name: str) -> Lab:
    """The Lab of a model's name, or of one of `SHAPES`; it never ends an answer by itself, and all its weights are in memory."""
    if name in SHAPES:
        lab = random_lab(SHAPES[name], name)
    else:
        from llava_lab.models import load

        lab = load(name)
    lab.eos_ids = frozenset()  # every way is given the same number of tokens
    assert lab.fingerprint  # which reads every weight
    return lab


def random_lab(
    shape: Architecture,
    name: str,
    *,
    vocabulary: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Lab:
    """A model of random weights, drawn where it is to live.

    `vocabulary` is the rows of embedding and head where they are more than the tokenizer's.
    """
    import torch

    from llava_lab.models import Lab
    from llava_lab.training.tiny.model import build_config, build_model, build_processor, build_tokenizer

    tokenizer = build_tokenizer(shape.vocabulary, samples=SAMPLES)
    config = build_config(shape, tokenizer)
    if vocabulary is not None:
        config.text_config.vocab_size = vocabulary
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or usual)
        with torch.device(device):
            model = build_model(config, seed=0).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)
    return Lab(model, build_processor(config, tokenizer), name=name)


def noise_picture(side: int = SIDE) -> np.ndarray:
    """The square picture every way is shown, uint8 (side, side, 3)."""
    return np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
