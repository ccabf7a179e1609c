"""The registry of connectors, their place in a config, and stock transformers classes built around them.

A model whose config.json says ``mm_projector_type`` (with ``mm_projector_options``) is built through transformers'
official patch mapping: class, model type, key conversions and ``generate`` stay stock, and what `save_pretrained`
writes loads again with no missing and no unexpected key. A config without the entry is a stock checkpoint and is
never touched. The mapping belongs to the whole process and transformers does not put it back after an exception;
`patched` does.

Source: transformers 5.x ``monkey_patching.py``; names after haotian-liu/LLaVA ``multimodal_projector/builder.py``.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isqrt
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import LlavaConfig, monkey_patching
from transformers.models.llava import modeling_llava

from llava_lab.errors import OptionError
from llava_lab.models import projector_parts as parts
from llava_lab.models.projector_parts import Connector, Sizes

STOCK = modeling_llava.LlavaMultiModalProjector
TYPE, OPTIONS = "mm_projector_type", "mm_projector_options"  # the first is LLaVA's own key, the second ours

_PATTERN = f"^{STOCK.__name__}$"  # anchored: VipLlava's class name ends in the same words
_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")
_LOCK = threading.RLock()

Grid = tuple[int, int]


@dataclass(frozen=True)
class Architecture:
    """One entry of the registry."""

    name: str
    truth: str  # what it is, in a line
    source: str
    make: Callable[[Sizes, dict[str, Any]], Connector]
    options: Mapping[str, Any] = field(default_factory=dict)  # with their defaults
    tokens: Callable[[Sizes, dict[str, Any]], Grid] = lambda sizes, options: sizes.grid
    mixes: bool = False  # a token is made from several patches
    placed: bool = True  # a token belongs to a place in the picture


def architecture(name: str) -> Architecture:
    """The registry's entry for a name; ``mlp{N}x_gelu`` for every N from 1. Raises OptionError for another name."""
    if name in CONNECTORS:
        return CONNECTORS[name]
    if match := _MLP.fullmatch(str(name)):
        return _mlp(int(match[1]))
    raise OptionError(f"a connector is one of {', '.join(CONNECTORS)} or mlp{{N}}x_gelu with N from 1, got {name!r}")


def build(kind: str, sizes: Sizes, options: Mapping[str, Any] | None = None) -> Connector:
    """The connector with torch's own fresh weights. Raises OptionError (one line) for what does not fit."""
    entry = architecture(kind)
    given = dict(options or {})
    if unknown := sorted(set(given) - set(entry.options)):
        takes = ", ".join(entry.options) or "no options"
        raise OptionError(f"connector {kind!r} takes {takes}; got {', '.join(unknown)}")
    chosen = {**entry.options, **given}
    for name, value in chosen.items():
        if not isinstance(value, bool) and value is not None and (not isinstance(value, int) or value < 1):
            raise OptionError(f"option {name} of connector {kind!r} must be a whole number from 1, got {value!r}")
    entry.tokens(sizes, chosen)  # refuses what does not divide the grid
    module = entry.make(sizes, chosen)
    module.kind, module.options = kind, chosen
    return module


def spec(config: Any) -> tuple[str, dict[str, Any]] | None:
    """(kind, options) of a config that names its connector; None is the stock one."""
    kind = getattr(config, TYPE, None)
    return None if kind is None else (kind, dict(getattr(config, OPTIONS, None) or {}))


def sizes_of(config: LlavaConfig) -> Sizes:
    """What a model's connector stands between. The class token, where one is kept, is not in the grid."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return Sizes(width, config.text_config.hidden_size, (side, side), config.multimodal_projector_bias)


def token_grid(config: LlavaConfig) -> Grid | None:
    """(rows, cols) of the image tokens where the connector sets their number; None where it keeps the tower's."""
    named = spec(config)
    if named is None or not architecture(named[0]).mixes:
        return None
    entry = architecture(named[0])
    return entry.tokens(sizes_of(config), {**entry.options, **named[1]})


def placed(config: LlavaConfig) -> bool:
    """Whether an image token belongs to a place in the picture; a resampler's do not."""
    named = spec(config)
    return named is None or architecture(named[0]).placed


class Chosen(nn.Module):
    """Stands for the stock projector class while a model is built: gives the connector that the config names."""

    def __new__(cls, config: LlavaConfig) -> Any:
        named = spec(config)
        return STOCK(config) if named is None else build(named[0], sizes_of(config), named[1])


@contextmanager
def patched() -> Iterator[None]:
    """Inside, LLaVA models are built with the connector their config names, by constructor or from_pretrained.

    Afterwards transformers' mapping and classes are what they were, also after an exception.
    """
    with _LOCK:
        before = monkey_patching.get_patch_mapping().get(_PATTERN)
        own = modeling_llava.LlavaMultiModalProjector
        monkey_patching.register_patch_mapping({_PATTERN: Chosen}, overwrite=True)
        try:
            with monkey_patching.apply_patches():
                yield
        finally:
            monkey_patching.unregister_patch_mapping([_PATTERN])
            if before is not None:
                monkey_patching.register_patch_mapping({_PATTERN: before})
            for module in list(sys.modules.values()):  # apply_patches leaves these behind when an exception passes it
                if getattr(module, "__name__", "").startswith("transformers") and vars(module).get(STOCK.__name__) is Chosen:
                    setattr(module, STOCK.__name__, own)


def _side(sizes: Sizes, side: int) -> Grid:
    rows, cols = sizes.grid
    if rows % side or cols % side:
        fit = ", ".join(str(one) for one in range(1, rows + 1) if rows % one == 0 and cols % one == 0)
        raise OptionError(f"side must divide the {rows}x{cols} patches, so one of {fit}; got {side}")
    return side, side


def _shuffled(sizes: Sizes, options: dict[str, Any]) -> Grid:
    rows, cols = sizes.grid
    factor = options["factor"]
    if rows % factor or cols % factor:
        raise OptionError(f"factor must divide the {rows}x{cols} patches, got {factor}")
    return rows // factor, cols // factor


def _square(sizes: Sizes, options: dict[str, Any]) -> Grid:
    side = isqrt(options["queries"])
    if side**2 != options["queries"]:
        raise OptionError(f"queries must be a square number, such as 16, 64 or 144, got {options['queries']}")
    return side, side


def _mlp(layers: int) -> Architecture:
    def make(sizes: Sizes, options: dict[str, Any]) -> Connector:
        return parts.Chain(sizes, (sizes.vision, *[sizes.language] * layers), gelu=True)

    truth = "One linear layer in a list." if layers == 1 else f"{layers} linear layers with GELU between them."
    return Architecture(f"mlp{layers}x_gelu", truth, "LLaVA-1.5 (N=2)", make)


def _identity(sizes: Sizes, options: dict[str, Any]) -> Connector:
    if sizes.vision != sizes.language:
        raise OptionError(f"connector 'identity' needs equal widths, got {sizes.vision} (vision) and {sizes.language} (language)")
    return parts.Identity(sizes)


def _bottleneck(sizes: Sizes, options: dict[str, Any]) -> Connector:
    """The widest hidden layer that keeps the count; None is the linear connector's count."""
    given, made, bias = sizes.vision, sizes.language, int(sizes.bias)
    options["parameters"] = options["parameters"] or (given + bias) * made
    width = (options["parameters"] - bias * made) // (given + made + bias)
    if width < 1:
        least = given + made + bias + bias * made
        raise OptionError(f"parameters must be at least {least} for widths {given} and {made}, got {options['parameters']}")
    return parts.Chain(sizes, (given, width, made), gelu=True)


def _resampler(sizes: Sizes, options: dict[str, Any]) -> Connector:
    if sizes.language % options["heads"]:
        raise OptionError(f"heads must divide the language width {sizes.language}, got {options['heads']}")
    return parts.Resampler(sizes, **options)


_ALL = (
    Architecture(
        "linear", "One linear layer.", "LLaVA", lambda sizes, _: parts.Chain(sizes, (sizes.vision, sizes.language), gelu=False)
    ),
    _mlp(2),
    Architecture("identity", "The vision features as they are.", "LLaVA", _identity),
    Architecture(
        "linear2x",
        "Two linear layers and nothing between them: the MLP's parameters, the linear's functions.",
        "control",
        lambda sizes, _: parts.Chain(sizes, (sizes.vision, sizes.language, sizes.language), gelu=False),
    ),
    Architecture(
        "bottleneck",
        "Two layers with GELU, as narrow as `parameters` asks (None: as many as the linear has).",
        "control",
        _bottleneck,
        {"parameters": None},
    ),
    Architecture(
        "gated",
        "A hidden layer gated by a second one.",
        "Shazeer 2020 (GEGLU)",
        lambda sizes, options: parts.Gated(sizes, options["width"] or sizes.language),
        {"width": None},
    ),
    Architecture(
        "fused",
        "Three layers, the first four times as wide as the features.",
        "Prismatic (fused-gelu-mlp)",
        lambda sizes, _: parts.Chain(sizes, (sizes.vision, 4 * sizes.vision, sizes.language, sizes.language), gelu=True),
    ),
    Architecture(
        "avgpool",
        "Means over windows of patches down to side x side tokens, then an MLP.",
        "DeCo",
        lambda sizes, options: parts.AveragePool(
            sizes, (sizes.vision, *[sizes.language] * options["layers"]), window=sizes.grid[0] // options["side"]
        ),
        {"side": 2, "layers": 2},
        lambda sizes, options: _side(sizes, options["side"]),
        mixes=True,
    ),
    Architecture(
        "c_abstractor",
        "Convolutions, pooling to side x side tokens, convolutions, an MLP.",
        "Honeybee",
        lambda sizes, options: parts.CAbstractor(sizes, window=sizes.grid[0] // options["side"], depth=options["depth"]),
        {"side": 2, "depth": 3},
        lambda sizes, options: _side(sizes, options["side"]),
        mixes=True,
    ),
    Architecture(
        "resampler",
        "Learnt queries read the features; their tokens have no place in the picture.",
        "Flamingo (Perceiver)",
        _resampler,
        {"queries": 64, "layers": 3, "heads": 8},
        _square,
        mixes=True,
        placed=False,
    ),
    Architecture(
        "pixel_shuffle",
        "factor x factor patches side by side in one token, then one linear layer.",
        "nanoVLM",
        lambda sizes, options: parts.PixelShuffle(sizes, factor=options["factor"], bias=options["bias"]),
        {"factor": 2, "bias": False},
        _shuffled,
        mixes=True,
    ),
)

CONNECTORS: Mapping[str, Architecture] = MappingProxyType({entry.name: entry for entry in _ALL})
