"""What the other benchmarks measure, at LLaVA-1.5-7B's true shape on the accelerator that is here, in one go of minutes.

The weights are random and drawn on the device; time and memory do not depend on them. Everything is measured in one process,
each way called once before its time counts where that is cheap. Where the device cannot hold all 32 layers in bfloat16
there are half as many, and the result says so; a way that does not fit, or for which no time is left, has a note in place of
its numbers. A ratio is to the first way of its group: the plain answer, one plain forward, frozen full forwards.

Nothing here names a device: what differs is asked of `torch.get_device_module`, which the processor has too. So every line runs
in the tests, on the processor, at a small shape.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench import capture, connectors, occlusion, probes, relevancy
from llava_lab.bench.harness import QUESTION, Comparison, child, flops, matmul_peak, memory, noise_picture, random_lab, row
from llava_lab.bench.scale import FULL, SIZES, VOCABULARY
from llava_lab.checks import undoing
from llava_lab.errors import LabError
from llava_lab.training.recipe import Architecture

if TYPE_CHECKING:
    import torch

    from llava_lab.models import Lab

logger = logging.getLogger(__name__)

NONE = "no accelerator: neither CUDA nor MPS is on this machine, nothing was measured"
FEWEST = 4  # layers of the language model; with fewer there is nothing to learn of 7B
NO_ROOM = "the device has no room for it"
KNOCKOUT = "ours: token_knockout"
NEW_TOKENS = 32  # of the answer whose tokens have a map each
SLOW = 5.0  # seconds of a first call after which no other is made
SWEEP = 60.0  # seconds that a sweep over patches may take; fewer patches are measured where all would take longer
SOME = 64  # patches that are enough where each is a forward of its own
LIMIT = 420.0  # seconds after which no new way is begun
PEAK = 8192  # side of the product that tells the device's peak


def measure(model: str, repeats: int) -> dict[str, Any]:
    """The table of ``llava-lab bench gpu``; the form is `llava_lab.bench.run`'s, with "layers", "dtype" and "note" beside it.

    `model` is not used. Without an accelerator "note" says so and there are no rows.
    """
    import torch

    from llava_lab.models import choose_device

    device = choose_device().device.type
    if device == "cpu":
        threads = torch.get_num_threads()
        return {"device": device, "threads": threads, "rows": [], "floor": None, "peak_flops_fraction": None, "note": NONE}
    body = "from llava_lab.bench.gpu import measure_on\nfacts = measure_on(device, layers, repeats)\n"
    layers = FULL
    while True:
        # a process of its own for each depth: what did not fit leaves nothing behind
        made = child(body, device=device, layers=layers, repeats=repeats)
        if made["fits"]:
            break
        if layers // 2 < FEWEST:
            raise LabError(f"expected a device with room for {FEWEST} layers of LLaVA-1.5-7B in bfloat16, got {made['device']}")
        layers //= 2
    return {key: value for key, value in made.items() if key not in ("fits", "seconds", "cpu_seconds", "peak_mb")}


def measure_on(
    device: str, layers: int, repeats: int, *, sizes: Architecture = SIZES, vocabulary: int = VOCABULARY, peak: int = PEAK
) -> dict[str, Any]:
    """All groups on one device, in this process; only {"fits": False, "device"} where the weights have no room."""
    import torch

    module, begin = torch.get_device_module(device), time.perf_counter()
    place = f"{device} ({module.get_device_name()})" if hasattr(module, "get_device_name") else device
    try:
        shape, dtype = replace(sizes, layers=layers), torch.bfloat16
        lab = random_lab(shape, "7B shape", vocabulary=vocabulary, dtype=dtype, device=device)
    except RuntimeError as error:
        if not _no_room(error):
            raise
        return {"fits": False, "device": place}
    lab.eos_ids = frozenset()  # the answer has a given length
    rows: list[dict[str, Any]] = []
    floor = fraction = None
    for name, make in GROUPS.items():
        try:
            group = make(lab)
        except RuntimeError as error:
            if not _no_room(error):
                raise
            rows.append(_left_out(name, NO_ROOM))
            continue
        done: dict[str, dict[str, Any]] = {}
        for way, work in group.works.items():
            late = time.perf_counter() - begin > LIMIT
            done[way] = {"note": f"no time was left of {LIMIT:g} seconds"} if late else _measured(lab.device, work, repeats)
            logger.info("%s: %s: %s", name, way, {key: value for key, value in done[way].items() if key != "values"})
        rows += group_rows(name, group, done)
        if name == "occlusion" and "seconds" in (plain := done[occlusion.FLOOR]):
            floor = plain["seconds"]
            count = flops(group.works[occlusion.FLOOR], attention=True)
            fraction = count / floor / matmul_peak(lab.device, lab.dtype, size=peak)
    return {
        "fits": True,
        "device": place,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "floor": floor,
        "peak_flops_fraction": fraction,
        "layers": layers,
        "dtype": str(lab.dtype).removeprefix("torch."),
        "note": None if layers == FULL else f"{layers} of {FULL} layers",
    }


def group_rows(name: str, group: Group, done: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way of a group, beside the group's floor and, where that was measured, the way's peer."""
    comparison, rows = group.comparison, []
    seconds = {way: one["seconds"] * group.scales.get(way, 1.0) for way, one in done.items() if "seconds" in one}
    for way, one in done.items():
        if way not in seconds:
            rows.append(_left_out(f"{name}: {way}", one["note"]))
            continue
        peer, error = comparison.peer(way), None
        exact = comparison.exact or peer
        if exact in seconds and way not in comparison.other_numbers:
            error = comparison.error(one["values"], done[exact]["values"])
        base = seconds.get(comparison.floor, np.nan)
        made = row(f"{name}: {way}", seconds[way], base, 0.0, one["peak_mb"], error)
        made["ratio_to_floor"] = None if np.isnan(base) else made["ratio_to_floor"]
        made["ratio_to_peer"] = seconds[way] / seconds[peer] if peer in seconds else None
        rows.append({**made, "note": group.notes.get(way)})
    return rows


def _measured(device: torch.device, work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Median seconds, peak memory in MB above what stood before, and what the work gave last; a "note" where it had no room."""
    import torch

    module = torch.get_device_module(device)
    gc.collect()
    getattr(module, "empty_cache", lambda: None)()
    before, values = device_memory(device, reset=True), None
    seconds: list[float] = []
    try:
        while len(seconds) <= repeats and (not seconds or seconds[0] < SLOW):
            start = time.perf_counter()
            values = work()
            module.synchronize()
            seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        if not _no_room(error):
            raise
        return {"note": NO_ROOM}
    after = device_memory(device)
    extra = None if before is None or after is None else max(after - before, 0.0)
    # the first call pays for what is prepared once
    return {"seconds": float(np.median(seconds[1:] or seconds)), "peak_mb": extra, "values": values}


def device_memory(device: torch.device, *, reset: bool = False) -> float | None:
    """The device's peak memory in MB since the last reset; with `reset` what it holds now. None where it does not say."""
    import torch

    if device.type == "cpu":
        return memory(reset=reset)
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        return None
    if reset:
        module.reset_peak_memory_stats()
    return module.max_memory_allocated() / 2**20


def _no_room(error: RuntimeError) -> bool:
    return "out of memory" in str(error).lower()


def _left_out(name: str, note: str) -> dict[str, Any]:
    return {**dict.fromkeys(row("", 1.0, 1.0, 1.0, None, None)), "name": name, "note": note}


# -- the groups ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Ways of one of the other benchmarks, ready to be called."""

    comparison: Comparison
    works: Mapping[str, Callable[[], Any]]
    scales: Mapping[str, float] = field(default_factory=dict)  # how many times as long the whole work takes
    notes: Mapping[str, str] = field(default_factory=dict)


def _capture(lab: Lab) -> Group:
    def work(way: str) -> Any:
        with _eager(lab) if way in (capture.KEPT, capture.ROLLED) else nullcontext():
            return capture.COMPARISON.ways[way](lab, NEW_TOKENS)

    names = [way for way in capture.COMPARISON.ways if way != capture.STOCK and "one more forward" not in way]
    return Group(capture.COMPARISON, {way: partial(work, way) for way in names})


def _relevancy(lab: Lab) -> Group:
    names = (relevancy.FLOOR, relevancy.WHOLE, relevancy.EXACT)
    return Group(relevancy.COMPARISON, {way: partial(relevancy.COMPARISON.ways[way], lab, NEW_TOKENS) for way in names})


def _occlusion(lab: Lab) -> Group:
    """The sweeps on as many patches as `SWEEP` seconds allow, their time scaled to all patches."""
    ways = occlusion.COMPARISON.ways
    run = lab.ask(noise_picture(), QUESTION, max_new_tokens=occlusion.NEW_TOKENS)
    total = run.map.rows * run.map.cols
    plain = partial(ways[occlusion.FLOOR], lab, run, np.zeros(0))
    forwards = SWEEP / _measured(lab.device, plain, 1).get("seconds", SWEEP)
    # behind the connector a patch costs half a forward
    counts = {occlusion.EXACT: 2 * forwards, "ours: occlusion at the pixels": min(forwards, SOME), KNOCKOUT: total}
    works, scales, notes = {occlusion.FLOOR: plain}, {}, {}
    for way, most in counts.items():
        chosen = np.unique(np.linspace(0, total - 1, int(max(2, min(total, most)))).round().astype(int))
        works[way], scales[way] = partial(ways[way], lab, run, chosen), total / len(chosen)
        notes[way] = f"{len(chosen)} of {total} patches measured"
    return Group(occlusion.COMPARISON, works, scales, notes)


def _lens(lab: Lab) -> Group:
    run = lab.ask(noise_picture(), QUESTION, max_new_tokens=1)
    return Group(probes.COMPARISON, {way: partial(work, lab, run) for way, work in probes.COMPARISON.ways.items()})


def _connectors(lab: Lab) -> Group:
    setting, ways = connectors.new_setting(lab), connectors.COMPARISON.ways
    names = (connectors.FLOOR, connectors.FIRST, connectors.OURS)
    return Group(connectors.COMPARISON, {way: partial(ways[way], setting) for way in names})


GROUPS: Mapping[str, Callable[[Lab], Group]] = MappingProxyType(
    {"capture": _capture, "occlusion": _occlusion, "lens": _lens, "connectors": _connectors, "relevancy": _relevancy}
)


@contextmanager
def _eager(lab: Lab) -> Iterator[None]:
    """Eager attention inside, as who keeps all of it needs it."""
    with undoing(lambda: lab.model.set_attn_implementation("sdpa")):
        lab.model.set_attn_implementation("eager")
        yield
