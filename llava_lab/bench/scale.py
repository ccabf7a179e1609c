"""LLaVA-1.5-7B's true widths with few layers: what loading, answering and every method cost at the real size.

A random checkpoint is written once: the real vision tower, connector, vocabulary and language-model width, bfloat16,
few language-model layers. Time and memory of a method depend on shapes, not on weights. Everything is measured at that
depth and at half of it, in one process; what grows with depth and what does not follow from the two, and with them the
figures for 32 layers, which are marked as computed. Perturbation runs with few samples; its row says how many passes.

Sizes: huggingface.co/llava-hf/llava-1.5-7b-hf ``config.json`` (Vicuna 7B v1.5, CLIP ViT-L/14-336).
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import QUESTION, SAMPLES, child, noise_picture, timed
from llava_lab.errors import LabError, OptionError
from llava_lab.training.recipe import Architecture

if TYPE_CHECKING:
    from llava_lab.models import Lab

logger = logging.getLogger(__name__)

LAYERS, FULL = 4, 32
NEW_TOKENS = 8
SHARD = 10**9  # bytes of a weight file
SIZES = Architecture(
    image=336,
    patch=14,
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    vision_mlp=4096,
    hidden=4096,
    heads=32,
    mlp=11008,
    vocabulary=640,
    context=4096,
)
VOCABULARY = 32064  # rows of embedding and head; the tokenizer uses the first few
FLOOR = "one forward of the finished sequence"
# Perturbation at its defaults takes hundreds of passes; these show what one costs.
FEW: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "occlusion": {"block": 8},
        "occlusion_coarse": {"first": 12, "keep": 1},
        "rise": {"masks": 8},
        "shapley": {"orders": 1, "regions": 6},
        "kernel_shap": {"samples": 10, "regions": 6},
        "greedy": {"regions": 4, "steps": 1},
        "integrated_gradients": {"steps": 2},
        "smoothgrad": {"samples": 2},
        "token_knockout": {"block": 8},
    }
)


def measure(model: str, repeats: int, *, layers: int = LAYERS, sizes: Architecture = SIZES) -> dict[str, Any]:
    """The table of ``llava-lab bench scale``; the form is `llava_lab.bench.run`'s, with "load" beside it.

    `model` is not used: the checkpoint is random and written for the occasion. Raises OptionError below 2 layers or where the
    disk has no room.
    """
    if layers < 2:
        raise OptionError(f"layers must be 2 or more, so that two depths can be compared; got {layers}")
    with tempfile.TemporaryDirectory(prefix="llava-lab-scale-") as folder:
        written = write_checkpoint(Path(folder), layers=layers, sizes=sizes)
        load = child("from llava_lab.bench.scale import measure_load\nfacts = measure_load(folder)\n", folder=folder)
        body = "from llava_lab.bench.scale import measure_depths\nfacts = measure_depths(folder, repeats)\n"
        measured = child(body, folder=folder, repeats=repeats)
    weights = written / 2**20
    shown = {name: load[name] for name in ("load_seconds", "load_peak_mb")}
    return {
        "device": measured["device"],
        "threads": measured["threads"],
        "rows": rows(measured["depths"], layers),
        "floor": measured["depths"][str(layers)][FLOOR]["seconds"],
        "peak_flops_fraction": None,
        "layers": layers,
        "load": {**shown, "weights_mb": weights, "peak_to_weights": shown["load_peak_mb"] and shown["load_peak_mb"] / weights},
        "full": full_size(sizes),
    }


def write_checkpoint(folder: Path, *, layers: int, sizes: Architecture = SIZES, seed: int = 0) -> int:
    """A random checkpoint of these sizes in transformers' format, bfloat16 shards; gives its weights' bytes."""
    import torch
    from safetensors.torch import save_file

    from llava_lab.training.tiny.model import build_processor, build_tokenizer

    tokenizer = build_tokenizer(sizes.vocabulary, samples=SAMPLES)
    config = _config(sizes, layers, tokenizer)
    shapes = _shapes(config)
    total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if total > 0.9 * free:
        raise OptionError(
            f"the checkpoint needs {total / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free; take fewer layers"
        )
    config.save_pretrained(folder)
    build_processor(config, tokenizer).save_pretrained(folder)
    draw, places, shard, held = torch.Generator().manual_seed(seed), {}, 0, {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        scale = 1.0 if len(shape) < 2 else shape[-1] ** -0.5
        values = torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=draw) * scale
        held[name], places[name] = values.to(torch.bfloat16), shard
        if number == len(shapes) or sum(part.nbytes for part in held.values()) > SHARD:
            save_file(held, folder / f"model-{shard:05d}.safetensors", metadata={"format": "pt"})
            held, shard = {}, shard + 1
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: f"model-{at:05d}.safetensors" for name, at in places.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return total


def _config(sizes: Architecture, layers: int, tokenizer: Any) -> Any:
    from llava_lab.training.tiny.model import build_config

    config = build_config(sizes, tokenizer)
    config.text_config.num_hidden_layers = layers
    config.text_config.vocab_size = max(VOCABULARY, len(tokenizer)) if sizes is SIZES else len(tokenizer)
    config.vision_config.hidden_act = "quick_gelu"
    config.dtype = "bfloat16"
    return config


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every weight's shape, by the name transformers gives it; nothing is allocated."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def full_size(sizes: Architecture = SIZES, layers: int = FULL) -> dict[str, Any]:
    """Weights of the whole model, computed from its shapes: {"layers", "parameters", "bf16_mb"}."""
    from llava_lab.training.tiny.model import build_tokenizer

    shapes = _shapes(_config(sizes, layers, build_tokenizer(sizes.vocabulary, samples=SAMPLES)))
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    return {"layers": layers, "parameters": count, "bf16_mb": 2 * count / 2**20}


def measure_load(folder: str) -> dict[str, Any]:
    """Seconds and peak memory of `llava_lab.load`, in this process: {"load_seconds", "load_peak_mb"}."""
    from llava_lab.models import load

    def loaded() -> None:
        lab = load(folder, device="cpu", dtype="bfloat16")
        assert lab.fingerprint  # which reads every weight, so that all of them are in memory

    seconds, extra, _ = timed(loaded, 1)
    return {"load_seconds": seconds, "load_peak_mb": extra}


def measure_depths(folder: str, repeats: int) -> dict[str, Any]:
    """Every method at the checkpoint's depth and at half of it: {"device", "depths": {layers: {name: facts}}}."""
    from llava_lab.models import load

    lab = load(folder, dtype="bfloat16")
    lab.eos_ids = frozenset()  # the answer has a given length
    depths, depth = {}, lab.model.config.text_config.num_hidden_layers
    for layers in (depth, depth // 2):
        depths[str(layers)] = measure_methods(cut(lab, layers), repeats)
    return {"device": str(lab.device), "depths": depths}


def cut(lab: Lab, layers: int) -> Lab:
    """The same weights with the first `layers` of the language model only; `lab` is not to be used again deeper."""
    from llava_lab.models import Lab as Made
    from llava_lab.models.layout import language_model

    inner: Any = language_model(lab.model)
    inner.layers = inner.layers[:layers]
    lab.model.config.text_config.num_hidden_layers = layers
    made = Made(lab.model, lab.processor, name=lab.name)
    made.eos_ids = lab.eos_ids
    return made


def measure_methods(lab: Lab, repeats: int, names: tuple[str, ...] | None = None) -> dict[str, dict[str, Any]]:
    """Seconds, memory above what stood before, and passes of a forward, an answer and every method, in this process."""
    import torch

    from llava_lab.attribution import METHODS, attribute

    picture = noise_picture(288)

    def ask() -> Any:
        return lab.ask(picture, QUESTION, max_new_tokens=NEW_TOKENS)

    run = ask()
    inputs = lab.inputs(run)

    def forward() -> None:
        with torch.no_grad():
            lab.model(**inputs, use_cache=False, logits_to_keep=1)

    forward()  # what is prepared once is paid for here
    attribute(lab, run, method="attention", target="answer")
    facts = {FLOOR: _facts(forward, repeats), f"an answer of {NEW_TOKENS} tokens": _facts(ask, repeats)}
    for name in names or tuple(METHODS):
        try:
            options: dict[str, Any] = {"method": name, "target": "answer", **FEW.get(name, {})}
            facts[name] = _facts(partial(attribute, lab, run, **options), 1)
        except LabError as error:
            facts[name] = {"seconds": None, "extra_mb": None, "passes": None, "note": str(error)}
        logger.info("%d layers, %s: %s", lab.model.config.text_config.num_hidden_layers, name, facts[name])
    return facts


def _facts(work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    seconds, extra, result = timed(work, repeats)
    return {"seconds": seconds, "extra_mb": extra, "passes": dict(getattr(result, "passes", None) or {}) or None, "note": None}


def rows(depths: Mapping[str, Mapping[str, Mapping[str, Any]]], layers: int, full: int = FULL) -> list[dict[str, Any]]:
    """A row for each thing measured: at `layers`, per layer, and computed for `full` layers, each over one forward there."""
    deep, shallow = depths[str(layers)], depths[str(layers // 2)]
    floor = deep[FLOOR]["seconds"]
    whole = _at(deep[FLOOR], shallow[FLOOR], "seconds", layers, full)
    table = []
    for name, facts in deep.items():
        seconds, memory = (_at(facts, shallow[name], key, layers, full) for key in ("seconds", "extra_mb"))
        table.append(
            {
                "name": name,
                "seconds": facts["seconds"],
                "ratio_to_floor": facts["seconds"] and facts["seconds"] / floor,
                "ratio_to_peer": None,
                "extra_mb": facts["extra_mb"],
                "max_error": None,
                "passes": facts["passes"],
                "seconds_per_layer": _slope(facts, shallow[name], "seconds", layers),
                "extra_mb_per_layer": _slope(facts, shallow[name], "extra_mb", layers),
                f"computed_ratio_at_{full}": None if seconds is None or not whole else seconds / whole,
                f"computed_extra_mb_at_{full}": memory,
                "note": facts["note"],
            }
        )
    return table


def _slope(deep: Mapping[str, Any], shallow: Mapping[str, Any], key: str, layers: int) -> float | None:
    if deep[key] is None or shallow[key] is None:
        return None
    return max(deep[key] - shallow[key], 0.0) / (layers - layers // 2)  # noise must not make depth cheaper


def _at(deep: Mapping[str, Any], shallow: Mapping[str, Any], key: str, layers: int, full: int) -> float | None:
    """On the straight line through two depths."""
    slope = _slope(deep, shallow, key, layers)
    return None if slope is None else deep[key] + slope * (full - layers)
