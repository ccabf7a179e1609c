"""The models a benchmark can run on: any that loads by name, and random ones of LLaVA-1.5's true token geometry.

Speed and memory depend on shapes, not on weights, so a random model of 576 image tokens (336 px in patches of 14)
measures what a trained one would. What a random model cannot tell is whether a map is any good.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from llava_lab.training.recipe import Architecture

if TYPE_CHECKING:
    from llava_lab.models import Lab

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
    from llava_lab.training.build import build_config, build_model, build_processor, build_tokenizer

    shape = SHAPES[name]
    tokenizer = build_tokenizer(shape.vocabulary, samples=SAMPLES)
    config = build_config(shape, tokenizer)
    model = build_model(config, seed=0).eval().requires_grad_(False)
    return Lab(model, build_processor(config, tokenizer), name=name)
