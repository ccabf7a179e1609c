"""How fast and how small the logit lens is, beside a plain forward and beside the obvious way.

The obvious way keeps every hidden state (`output_hidden_states`), takes the softmax over the whole vocabulary at every
image token and state, and then the top words and the entropy. Its last state is not normed again, so that its numbers
are right and can be compared. Every way is measured on the model asked for and on a random one of LLaVA-1.5-7B's width,
vocabulary and 576 image tokens with few layers (`WIDE`), where memory shows.

Each measurement is a process of its own; its memory is its peak above the loaded model's, less the plain forward's.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import _child, _median, _row
from llava_lab.bench.relevancy import QUESTION, SIDE, _memory
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.models import Lab
    from llava_lab.results import Run

logger = logging.getLogger(__name__)

WIDE = "7B shape, 2 layers"
VOCABULARY = 32064
TOP = 5
FLOOR = "plain forward"
OURS = "logit lens, every patch and state"
PEER = "output_hidden_states and a full softmax"

Top = np.ndarray  # (states, patches, top) probabilities, likeliest first


def measure(model: str, repeats: int) -> dict[str, Any]:
    """The rows of ``llava-lab bench probes``; the form is `llava_lab.bench.run`'s, the floor that of `model`."""
    tables = [rows(name, _measured(name, repeats)) for name in (model, WIDE)]
    return {**tables[0], "rows": [row for table in tables for row in table["rows"]]}


def rows(model: str, measured: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and ratios of what `measure_way` found, over and over, for each way of one model."""
    floor, peer = (_median(measured[name], "seconds") for name in (FLOOR, PEER))
    theirs = np.array(measured[PEER][-1]["top"])
    table = []
    for name, runs in measured.items():
        seconds, own = _median(runs, "seconds"), runs[-1]["top"]
        error = None if name == FLOOR else float(np.abs(np.array(own) - theirs).max())
        extra = None if runs[0]["peak_mb"] is None else _median(runs, "peak_mb") - _median(measured[FLOOR], "peak_mb")
        table.append(_row(f"{model}: {name}", seconds, floor, seconds / peer, extra, error))
    last = measured[FLOOR][-1]
    return {"device": last["device"], "threads": last["threads"], "rows": table, "floor": floor, "peak_flops_fraction": None}


def measure_way(model: str, way: str) -> dict[str, Any]:
    """Time and memory of one way, once, in this process: {"seconds", "peak_mb", "top", "device"}."""
    import llava_lab.probes  # noqa: F401  code is no part of what a way needs, nor are the weights

    if way not in WAYS:
        raise OptionError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    lab = probe_lab(model)
    assert lab.fingerprint  # which reads every weight, so that all of them are in memory
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    run = lab.ask(pixels, QUESTION, max_new_tokens=1)
    WAYS[FLOOR](lab, run)  # the first call pays for what is prepared once
    gc.collect()
    before = _memory(reset=True)
    start = time.perf_counter()
    top = WAYS[way](lab, run)
    seconds = time.perf_counter() - start
    after = _memory()
    return {
        "seconds": seconds,
        "peak_mb": None if before is None or after is None else max(after - before, 0.0),  # the kernel counts in batches
        "top": top[..., 0].tolist(),
        "device": str(lab.device),
    }


def probe_lab(name: str) -> Lab:
    """The Lab of a model's name, of a random shape, or of `WIDE`."""
    from llava_lab.bench.harness import bench_lab

    return _wide() if name == WIDE else bench_lab(name)


def _measured(model: str, repeats: int) -> dict[str, list[dict[str, Any]]]:
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    body = "from llava_lab.bench.probes import measure_way\nfacts = measure_way(model, way)\n"
    for number in range(repeats):  # side by side, so that a drifting machine drifts for all
        for name in WAYS:
            measured[name].append(_child(body, model=model, way=name))
            logger.info("%s, %s, %d of %d: %.2f s", model, name, number + 1, repeats, measured[name][-1]["seconds"])
    return measured


def _wide() -> Lab:
    """A random model with the language width, vocabulary and image tokens of LLaVA-1.5-7B, in its 16 bits; 1.4 GB."""
    import torch

    from llava_lab.bench.harness import SAMPLES
    from llava_lab.models import Lab
    from llava_lab.training.recipe import Architecture
    from llava_lab.training.tiny.model import build_config, build_model, build_processor, build_tokenizer

    sizes = {"image": 336, "patch": 14, "vision_width": 256, "vision_heads": 8, "vision_mlp": 1024, "vision_layers": 2}
    shape = Architecture(**sizes, hidden=4096, layers=2, heads=32, mlp=11008, vocabulary=640, context=4096)
    tokenizer = build_tokenizer(shape.vocabulary, samples=SAMPLES)
    config = build_config(shape, tokenizer)
    text: Any = config.text_config
    text.vocab_size = VOCABULARY
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = build_model(config, seed=0).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)
    return Lab(model, build_processor(config, tokenizer), name=WIDE)


def _plain(lab: Lab, run: Run) -> Top:
    from llava_lab.capture import undisturbed

    with undisturbed(lab.model):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    return np.zeros((0, 0, 1))


def _ours(lab: Lab, run: Run) -> Top:
    from llava_lab.probes import logit_lens

    return logit_lens(lab, run, top=TOP).top_probs


def _peer(lab: Lab, run: Run) -> Top:
    """All states, all logits, all probabilities; entropy and the top words from those."""
    import torch

    from llava_lab.replay.words import final_norm

    norm, image = final_norm(lab), slice(*run.segments["image"])
    with torch.no_grad():
        out = lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1, output_hidden_states=True)
        states = [norm(state[0, image]) for state in out.hidden_states[:-1]] + [out.hidden_states[-1][0, image]]
        probs = lab.model.get_output_embeddings()(torch.stack(states)).float().softmax(-1)
        torch.special.entr(probs).sum(-1)
        return probs.topk(TOP).values.cpu().numpy()


WAYS: Mapping[str, Callable[[Lab, Run], Top]] = MappingProxyType({FLOOR: _plain, OURS: _ours, PEER: _peer})
