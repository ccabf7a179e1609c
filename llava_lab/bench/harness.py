"""Measured ratios against a floor and against the peers' way, each in one run on one machine.

Absolute times drift from machine to machine and from hour to hour, so only ratios taken side by side
count. ``start``: how long from a started kernel to the first answer, beside the bare imports nobody
can avoid (the floor) and beside stock transformers used the usual way (the peer). Every measurement
is a process of its own; nothing is warmed up except the disk's cache.

The models a benchmark can run on: any that loads by name, and random ones of LLaVA-1.5's true token geometry.

Speed and memory depend on shapes, not on weights, so a random model of 576 image tokens (336 px in patches of 14)
measures what a trained one would. What a random model cannot tell is whether a map is any good.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llava_lab.errors import LabError, OptionError
from llava_lab.training.recipe import Architecture

if TYPE_CHECKING:
    from llava_lab.models import Lab

logger = logging.getLogger(__name__)

REPEATS, QUICK_REPEATS = 5, 3

QUESTION = "What color is the car?"
NEW_TOKENS = 16
SIDE = 288  # of the square test picture, pixels

# Each script is a fresh process. It times itself from its first line, as a started kernel would,
# and writes one JSON object after the clock has stopped.
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

_FLOOR = "import torch; from transformers import LlavaForConditionalGeneration, LlavaProcessor\nfacts = {}\n"

_OURS = """
import numpy as np, llava_lab as ll
from llava_lab.models.folders import find
lab = ll.load(model)
run = lab.ask(np.full((side, side, 3), 128, np.uint8), question, max_new_tokens=new)
facts = {"device": str(lab.device), "answer": run.answer, "logprobs": run.logprobs.tolist()}
facts |= {"prompt": run.prompt, "folder": str(find(model).path)}
"""

_PEER = """
import numpy as np, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(model)
network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
inputs = processor(text=prompt, images=np.full((side, side, 3), 128, np.uint8), return_tensors="pt")
out = network.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True)
said = out.sequences[0, inputs["input_ids"].shape[1]:]
answer = processor.decode(said, skip_special_tokens=True).strip()
facts = {"answer": answer, "logprobs": [float(step[0].log_softmax(-1)[token]) for step, token in zip(out.logits, said)]}
"""


@dataclass(frozen=True)
class Bench:
    """One benchmark: what it shows in a sentence, and the function that measures it."""

    what: str
    measure: Callable[..., dict[str, Any]]  # (model, repeats) -> the result


def run(name: str, *, model: str = "tiny", quick: bool = False, layers: int | None = None) -> dict[str, Any]:
    """Measure one benchmark: {"device", "threads", "rows", "floor", "peak_flops_fraction"}.

    "floor" is the floor's seconds. A row has "name", "seconds", "ratio_to_floor", "ratio_to_peer", "extra_mb"
    (peak memory above the floor's) and "max_error" (against the peer's numbers); None where it does not
    apply. `quick` takes the median of 3 instead of 5. `layers` is for the benchmark "scale" alone.
    """
    if name not in BENCHES:
        raise OptionError(f"bench must be one of {', '.join(BENCHES)}, got {name!r}")
    if layers is not None and name != "scale":
        raise OptionError(f"layers belong to bench scale, not to bench {name}")
    given = {} if layers is None else {"layers": layers}
    return BENCHES[name].measure(model, QUICK_REPEATS if quick else REPEATS, **given)


def measure_start(model: str, repeats: int) -> dict[str, Any]:
    """Seconds to the first answer of `model`, ours and the peer's, over the bare imports."""
    floors, ours, peers = [], [], []
    for number in range(repeats):  # side by side, so that a drifting machine drifts for all three
        floors.append(_child(_FLOOR))
        ours.append(_child(_OURS, model=model))
        peers.append(_child(_PEER, model=ours[-1]["folder"], prompt=ours[-1]["prompt"]))
        logger.info("start %d of %d: floor %.2f s, ours %.2f s", number + 1, repeats, floors[-1]["seconds"], ours[-1]["seconds"])
    floor, mine, peer = (_median(runs, "seconds") for runs in (floors, ours, peers))
    error = _max_difference(ours[-1], peers[-1])
    return {
        "device": ours[-1]["device"],
        "threads": ours[-1]["threads"],
        "rows": [
            _row("bare imports: torch and the llava classes", floor, floor, floor / peer, 0.0, None),
            _row("first answer, llava_lab", mine, floor, mine / peer, _extra(ours, floors), error),
            _row("first answer, transformers' Auto classes and generate", peer, floor, 1.0, _extra(peers, floors), 0.0),
        ],
        "floor": floor,
        "peak_flops_fraction": None,
    }


def _later(module: str) -> Callable[..., dict[str, Any]]:
    """The `measure` of another module, imported when it is asked for."""
    return lambda model, repeats, **given: import_module(f"llava_lab.bench.{module}").measure(model, repeats, **given)


BENCHES: Mapping[str, Bench] = MappingProxyType(
    {
        "start": Bench("seconds from a started kernel to the first answer, over the bare imports", measure_start),
        "capture": Bench("a map for every token of an answer, beside plain answering and keeping everything", _later("capture")),
        "relevancy": Bench("gradient-weighted relevancy beside plain answering and lvlm-interpret's way", _later("relevancy")),
        "occlusion": Bench("occlusion and its stand-ins beside plain forwards and captum's FeatureAblation", _later("occlusion")),
        "probes": Bench("the logit lens beside a plain forward and the obvious way, here and at 7B width", _later("probes")),
        "scale": Bench("loading, answering and every method at LLaVA-1.5-7B's true widths, few layers", _later("scale")),
        "connectors": Bench(
            "a training step of four connectors beside frozen full forwards and the common mistake", _later("connectors")
        ),
    }
)


def _row(name: str, seconds: float, floor: float, to_peer: float, extra: float | None, error: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": seconds,
        "ratio_to_floor": seconds / floor,
        "ratio_to_peer": to_peer,
        "extra_mb": extra,
        "max_error": error,
    }


def _child(body: str, **values: Any) -> dict[str, Any]:
    """Run one script in a fresh interpreter and read the JSON object it prints last."""
    given = {"side": SIDE, "question": QUESTION, "new": NEW_TOKENS, **values}
    names = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    done = subprocess.run([sys.executable, "-c", _CLOCK + names + body + _SHOW], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(f"a benchmark process failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(measured[key] for measured in runs))


def _extra(runs: list[dict[str, Any]], floors: list[dict[str, Any]]) -> float | None:
    if runs[0]["peak_mb"] is None:
        return None
    return _median(runs, "peak_mb") - _median(floors, "peak_mb")


def _max_difference(mine: dict[str, Any], theirs: dict[str, Any]) -> float | None:
    """Largest difference of the answer's log-probabilities; None when the answers differ in length."""
    pairs = list(zip(mine["logprobs"], theirs["logprobs"], strict=False))
    if mine["answer"] != theirs["answer"] or not pairs:
        return None
    return max(abs(a - b) for a, b in pairs)


_GEOMETRY = {"image": 336, "patch": 14, "vision_heads": 8, "vocabulary": 640, "context": 4096}

SHAPES: Mapping[str, Architecture] = MappingProxyType(
    {
        "random-s": Architecture(
            **_GEOMETRY, vision_width=256, vision_layers=6, vision_mlp=1024, hidden=512, layers=8, heads=8, mlp=1376
        ),
        "random-m": Architecture(
            **_GEOMETRY, vision_width=512, vision_layers=12, vision_mlp=2048, hidden=1024, layers=16, heads=16, mlp=2752
        ),
        "random-s-2916": Architecture(  # about as many image tokens as LLaVA-NeXT's five tiles, 2,880
            **{**_GEOMETRY, "image": 756},
            vision_width=256,
            vision_layers=6,
            vision_mlp=1024,
            hidden=512,
            layers=8,
            heads=8,
            mlp=1376,
        ),
    }
)
SAMPLES = 50  # scenes the random model's tokenizer is made from; it only has to spell the question


def bench_lab(name: str) -> Lab:
    """The Lab of a model's name, or of one of `SHAPES`, that never ends an answer by itself."""
    if name in SHAPES:
        lab = _random(name)
    else:
        from llava_lab.models import load

        lab = load(name)
    lab.eos_ids = frozenset()  # every way is given the same number of tokens
    return lab


def _random(name: str) -> Lab:
    from llava_lab.models import Lab
    from llava_lab.training.tiny.model import build_config, build_model, build_processor, build_tokenizer

    shape = SHAPES[name]
    tokenizer = build_tokenizer(shape.vocabulary, samples=SAMPLES)
    config = build_config(shape, tokenizer)
    model = build_model(config, seed=0).eval().requires_grad_(False)
    return Lab(model, build_processor(config, tokenizer), name=name)
