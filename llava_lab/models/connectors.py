"""Connectors: modules from vision features (B, P, F) to image tokens (B, Q, D), their registry, and their place in a config.

    CONNECTORS["avgpool"].truth
    build("avgpool", Sizes(vision=32, language=64, grid=(4, 4)), {"side": 2})

Layers are named ``linear_1``, ``linear_2``, ... as transformers names them, so that a hub mlp2x_gelu loads into
them unchanged. No module here has a buffer: what is not in the checkpoint is computed in the forward.

A model whose config.json says ``mm_projector_type`` (with ``mm_projector_options``) is built with `FromConfig` where the stock
model looks for its connector's class: class, model type, key conversions and ``generate`` stay stock, and what `save_pretrained`
writes loads again with no missing and no unexpected key. A config without the entry is a stock checkpoint and is never touched.
The place belongs to the whole process; `patched` puts it back. transformers' own mapping for this (``monkey_patching.py``) looks
through every name of every loaded module five times a load, two seconds in all, and leaves its class behind after an exception.

Sources: haotian-liu/LLaVA @ c121f04 ``multimodal_projector/builder.py``; TRI-ML/prismatic-vlms @ 874c5bb
``util/nn_utils.py`` (fused); DeCo, arXiv 2405.20985 (average pooling); khanrc/honeybee @ 68a8d84
``projectors/projectors.py`` (C-Abstractor); Flamingo, arXiv 2204.14198 (Perceiver resampler); nanoVLM @ 4e0c096
``models/modality_projector.py`` (pixel shuffle). The code is ours.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import isqrt
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaConfig
from transformers.models.llava import modeling_llava

from llava_lab.checks import held, undoing
from llava_lab.errors import OptionError
from llava_lab.options import by_our_names, nearest

TYPE, OPTIONS = "mm_projector_type", "mm_projector_options"  # in config.json; the first is LLaVA's own key, the second ours
STOCK = modeling_llava.LlavaMultiModalProjector
NEW_STD = 0.02  # standard deviation of fresh queries and position embeddings, as in ViT
SQUEEZE = 4  # a block's channel gate is this much narrower than the block
DEEPEST = 64  # layers; a config.json of a million would be built one by one
GROUP = 8  # channels that a block's 3x3 convolution mixes

_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")
_LOCK = threading.RLock()

Grid = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """What a connector stands between."""

    vision: int  # F, width of a vision feature (all chosen layers together)
    language: int  # D, width of the language model
    grid: Grid  # vision patches, rows and columns
    bias: bool = True


class Connector(nn.Module):
    """One of our connectors; `kind` and `options` rebuild it, `trained_with` says beside which models it learnt.

    >>> from llava_lab.models import Connector
    >>> isinstance(ll.new_connector(lab, "linear"), Connector)
    True
    """

    kind: str
    options: Mapping[str, Any] = MappingProxyType({})
    sizes: Sizes
    trained_with: dict[str, str] | None = None  # fingerprints of "language" and "vision"; {} has not been trained

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes


class Identity(Connector):
    """The features as they are; the two widths must agree."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        if sizes.vision != sizes.language:
            raise OptionError(
                f"connector 'identity' needs equal widths, got {sizes.vision} (vision) and {sizes.language} (language)"
            )

    def forward(self, image_features: Float[Tensor, "B P F"]) -> Float[Tensor, "B P F"]:
        return image_features


class Chain(Connector):
    """Linear layers ``linear_1`` to ``linear_N``, with or without GELU (the exact one) between them."""

    def __init__(self, sizes: Sizes, widths: Sequence[int], *, gelu: bool, bias: bool | None = None) -> None:
        """`widths` are those between the first layer's input and the last layer's output, both included."""
        super().__init__(sizes)
        self.count = len(widths) - 1
        for number, (given, made) in enumerate(pairwise(widths), 1):
            setattr(self, f"linear_{number}", nn.Linear(given, made, bias=sizes.bias if bias is None else bias))
        self.act = nn.GELU() if gelu else nn.Identity()

    def forward(self, image_features: Float[Tensor, "B P F"]) -> Float[Tensor, "B P D"]:
        for number in range(1, self.count + 1):
            image_features = getattr(self, f"linear_{number}")(image_features if number == 1 else self.act(image_features))
        return image_features


class Bottleneck(Chain):
    """Two layers with GELU; the hidden one is the widest that keeps to a count of parameters."""

    def __init__(self, sizes: Sizes, *, parameters: int | None) -> None:
        """`parameters` None is the linear connector's count."""
        given, made, bias = sizes.vision, sizes.language, int(sizes.bias)
        parameters = parameters or (given + bias) * made
        width = (parameters - bias * made) // (given + made + bias)
        if width < 1:
            least = given + made + bias + bias * made
            raise OptionError(f"parameters must be at least {least} for widths {given} and {made}, got {parameters}")
        super().__init__(sizes, (given, width, made), gelu=True)
        self.options = {"parameters": parameters}


class Gated(Connector):
    """A hidden layer whose units are opened and shut by a second one: linear_2(linear_1(x) * GELU(linear_gate(x)))."""

    def __init__(self, sizes: Sizes, *, width: int | None) -> None:
        """`width` None is the language model's."""
        super().__init__(sizes)
        width = width or sizes.language
        self.linear_1 = nn.Linear(sizes.vision, width, bias=sizes.bias)
        self.linear_gate = nn.Linear(sizes.vision, width, bias=sizes.bias)
        self.linear_2 = nn.Linear(width, sizes.language, bias=sizes.bias)
        self.act = nn.GELU()

    def forward(self, image_features: Float[Tensor, "B P F"]) -> Float[Tensor, "B P D"]:
        return self.linear_2(self.linear_1(image_features) * self.act(self.linear_gate(image_features)))


class AveragePool(Chain):
    """Means over square windows of patches, then a chain on what is left."""

    def __init__(self, sizes: Sizes, *, side: int, layers: int) -> None:
        super().__init__(sizes, (sizes.vision, *[sizes.language] * layers), gelu=True)
        self.window = sizes.grid[0] // side

    def forward(self, image_features: Float[Tensor, "B P F"]) -> Float[Tensor, "B Q D"]:
        return super().forward(_flat(functional.avg_pool2d(_plane(image_features, self.sizes), self.window)))


class PixelShuffle(Chain):
    """Each window of ``factor x factor`` patches becomes one token with all their channels, then one linear layer."""

    def __init__(self, sizes: Sizes, *, factor: int, bias: bool) -> None:
        super().__init__(sizes, (sizes.vision * factor**2, sizes.language), gelu=False, bias=bias)
        self.factor = factor

    def forward(self, image_features: Float[Tensor, "B P F"]) -> Float[Tensor, "B Q D"]:
        rows, cols = self.sizes.grid
        windows = image_features.unflatten(1, (rows // self.factor, self.factor, cols // self.factor, self.factor))
        packed = windows.permute(0, 1, 3, 2, 4, 5)  # B, token row, token column, row in it, column in it, F
        return super().forward(packed.flatten(3).flatten(1, 2))


class CAbstractor(Connector):
    """Convolutions, average pooling, convolutions again, then two linear layers with SiLU between them."""

    def __init__(self, sizes: Sizes, *, side: int, depth: int) -> None:
        super().__init__(sizes)
        rows, cols = sizes.grid
        self.window = rows // side
        self.positions = nn.Parameter(NEW_STD * torch.randn(1, rows * cols, sizes.vision))
        self.before = nn.ModuleList(_Block(sizes.vision) for _ in range(depth))
        self.after = nn.ModuleList(_Block(sizes.vision) for _ in range(depth))
        self.linear_1 = nn.Linear(sizes.vision, sizes.language, bias=sizes.bias)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(sizes.language, sizes.language, bias=sizes.bias)

    def forward(self, image_features: Float[Tensor, "B P F"]) -> Float[Tensor, "B Q D"]:
        plane = _plane(image_features + self.positions, self.sizes)
        for block in self.before:
            plane = block(plane)
        plane = functional.avg_pool2d(plane, self.window)
        for block in self.after:
            plane = block(plane)
        return self.linear_2(self.act(self.linear_1(_flat(plane))))


class Resampler(Connector):
    """Learnt queries that read the features through cross-attention; their tokens have no place in the picture."""

    def __init__(self, sizes: Sizes, *, queries: int, layers: int, heads: int) -> None:
        super().__init__(sizes)
        width = sizes.language
        if width % heads:
            raise OptionError(f"heads must divide the language width {width}, got {heads}")
        self.linear_1 = nn.Linear(sizes.vision, width, bias=sizes.bias)
        self.queries = nn.Parameter(NEW_STD * torch.randn(1, queries, width))
        self.layers = nn.ModuleList(_Reader(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, image_features: Float[Tensor, "B P F"]) -> Float[Tensor, "B Q D"]:
        features = self.linear_1(image_features)
        tokens = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, features)
        return self.norm(tokens)


class _Block(nn.Module):
    """A residual bottleneck of 1x1, grouped 3x3 and 1x1 convolutions with a gate per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = width // GROUP if width % GROUP == 0 else 1
        self.narrow = nn.Conv2d(width, width, 1, bias=False)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.widen = nn.Conv2d(width, width, 1, bias=False)
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width) for _ in range(3))
        self.squeeze = nn.Linear(width, max(1, width // SQUEEZE))
        self.excite = nn.Linear(max(1, width // SQUEEZE), width)

    def forward(self, plane: Float[Tensor, "B F Y X"]) -> Float[Tensor, "B F Y X"]:
        inner = functional.silu(_over_channels(self.norm_1, self.narrow(plane)))
        inner = functional.silu(_over_channels(self.norm_2, self.mix(inner)))
        gate = torch.sigmoid(self.excite(functional.silu(self.squeeze(inner.mean((2, 3))))))
        inner = _over_channels(self.norm_3, self.widen(inner * gate[:, :, None, None]))
        return functional.silu(plane + inner)


class _Reader(nn.Module):
    """Queries attend to the features and to one another, then a feed-forward part; both are residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_feature, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Float[Tensor, "B Q D"], features: Float[Tensor, "B P D"]) -> Float[Tensor, "B Q D"]:
        queries = self.norm_query(tokens)
        context = torch.cat([self.norm_feature(features), queries], 1)
        parts = (self.q_proj(queries), self.k_proj(context), self.v_proj(context))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # B, H, N, E
        read = functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.o_proj(read.transpose(1, 2).flatten(2))
        return tokens + self.down(functional.gelu(self.up(self.norm_mlp(tokens))))


def _plane(features: Float[Tensor, "B P F"], sizes: Sizes) -> Float[Tensor, "B F Y X"]:
    return features.transpose(1, 2).unflatten(2, sizes.grid)


def _flat(plane: Float[Tensor, "B F Y X"]) -> Float[Tensor, "B Q F"]:
    return plane.flatten(2).transpose(1, 2)


def _over_channels(norm: nn.Module, plane: Float[Tensor, "B F Y X"]) -> Float[Tensor, "B F Y X"]:
    return norm(plane.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Architecture:
    """One entry of the registry; ``make(sizes, **options)`` gives the module.

    >>> dict(ll.CONNECTORS["avgpool"].options)
    {'side': 2, 'layers': 2}
    """

    name: str
    truth: str  # what it is, in a line
    source: str
    make: Callable[..., Connector]
    options: Mapping[str, Any] = field(default_factory=dict)  # with their defaults
    tokens: Callable[[Sizes, Mapping[str, Any]], Grid] = lambda sizes, options: sizes.grid
    mixes: bool = False  # a token is made from several patches
    placed: bool = True  # a token belongs to a place in the picture


def architecture(name: str) -> Architecture:
    """The registry's entry for a name; ``mlp{N}x_gelu`` for every N from 1 to 64. Raises OptionError for another name."""
    if name in CONNECTORS:
        return CONNECTORS[name]
    if (match := _MLP.fullmatch(str(name))) and len(match[1]) < 4 and int(match[1]) <= DEEPEST:
        return _mlp(int(match[1]))
    near = nearest(str(name)[:60], list(CONNECTORS))
    raise OptionError(
        f"a connector is one of {', '.join(CONNECTORS)} or mlp{{N}}x_gelu, N from 1 to {DEEPEST} layers, got {str(name)[:60]!r}"
        + (f"; did you mean {near!r}?" if near else "")
    )


def build(kind: str, sizes: Sizes, options: Mapping[str, Any] | None = None, *, beside: Collection[str] = ()) -> Connector:
    """The connector with torch's own fresh weights. Raises OptionError (one line) for what does not fit.

    `beside`: names that stand beside the options where they are given, and may have been misspelt.
    """
    entry = architecture(kind)
    ours = {name: f"{name}={default!r}" for name, default in entry.options.items()}
    options = {**entry.options, **by_our_names(f"connector {kind!r}", options or {}, ours, beside=beside)}
    for name, value in options.items():
        if not isinstance(value, bool) and value is not None and (not isinstance(value, int) or value < 1):
            raise OptionError(f"option {name} of connector {kind!r} must be a whole number from 1, got {value!r}")
        if name in ("layers", "depth") and value is not None and value > DEEPEST:
            raise OptionError(f"option {name} of connector {kind!r} must be at most {DEEPEST}, got {value!r}")
    entry.tokens(sizes, options)  # refuses what does not divide the grid
    module = entry.make(sizes, **options)
    if isinstance(module, Chain) and options.get("width", 0) is None:
        del options["width"]  # nothing to say: config.json and fingerprints are those of a model without the entry
    # a module may have put a number where None stood
    module.kind, module.options = kind, {**options, **module.options}
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


class FromConfig(nn.Module):
    """Stands for the stock class while a model is built: makes the connector that the config names."""

    def __new__(cls, config: LlavaConfig) -> Any:
        named = spec(config)
        return STOCK(config) if named is None else build(named[0], sizes_of(config), named[1])


@contextmanager
def patched() -> Iterator[None]:
    """Inside, LLaVA models are built with the connector their config names, by constructor or from_pretrained.

    Afterwards the stock class is back, also after an exception.
    """
    with held(_LOCK):
        own = modeling_llava.LlavaMultiModalProjector

        def undo() -> None:
            modeling_llava.LlavaMultiModalProjector = own

        with undoing(undo):
            modeling_llava.LlavaMultiModalProjector = FromConfig
            yield


def _side(sizes: Sizes, options: Mapping[str, Any]) -> Grid:
    (rows, cols), side = sizes.grid, options["side"]
    if rows % side or cols % side:
        fit = ", ".join(str(number) for number in range(1, rows + 1) if rows % number == 0 and cols % number == 0)
        raise OptionError(f"side must divide the {rows}x{cols} patches, so one of {fit}; got {side}")
    return side, side


def _shuffled(sizes: Sizes, options: Mapping[str, Any]) -> Grid:
    (rows, cols), factor = sizes.grid, options["factor"]
    if rows % factor or cols % factor:
        raise OptionError(f"factor must divide the {rows}x{cols} patches, got {factor}")
    return rows // factor, cols // factor


def _square(sizes: Sizes, options: Mapping[str, Any]) -> Grid:
    side = isqrt(options["queries"])
    if side**2 != options["queries"]:
        raise OptionError(f"queries must be a square number, such as 16, 64 or 144, got {options['queries']}")
    return side, side


def _mlp(layers: int) -> Architecture:
    truth = "One linear layer in a list." if layers == 1 else f"{layers} linear layers with GELU between them."
    return Architecture(f"mlp{layers}x_gelu", truth, "LLaVA-1.5 (N=2)", _chain(layers, gelu=True), {"width": None})


def _chain(layers: int, *, gelu: bool) -> Callable[..., Connector]:
    def make(sizes: Sizes, *, width: int | None) -> Connector:
        hidden = [width or sizes.language] * (layers - 1)
        return Chain(sizes, (sizes.vision, *hidden, sizes.language), gelu=gelu)

    return make


def _linear(sizes: Sizes) -> Connector:
    return Chain(sizes, (sizes.vision, sizes.language), gelu=False)


def _fused(sizes: Sizes) -> Connector:
    return Chain(sizes, (sizes.vision, 4 * sizes.vision, sizes.language, sizes.language), gelu=True)


_ALL = (
    Architecture("linear", "One linear layer.", "LLaVA", _linear),
    _mlp(2),
    Architecture("identity", "The vision features as they are.", "LLaVA", Identity),
    Architecture(
        "linear2x",
        "Two linear layers and nothing between them: the MLP's parameters, the linear's functions.",
        "control",
        _chain(2, gelu=False),
        {"width": None},
    ),
    Architecture(
        "bottleneck",
        "Two layers with GELU, as narrow as `parameters` asks (None: as many as the linear has).",
        "control",
        Bottleneck,
        {"parameters": None},
    ),
    Architecture("gated", "A hidden layer gated by a second one.", "Shazeer 2020 (GEGLU)", Gated, {"width": None}),
    Architecture("fused", "Three layers, the first four times as wide as the features.", "Prismatic (fused-gelu-mlp)", _fused),
    Architecture(
        "avgpool",
        "Means over windows of patches down to side x side tokens, then an MLP.",
        "DeCo",
        AveragePool,
        {"side": 2, "layers": 2},
        _side,
        mixes=True,
    ),
    Architecture(
        "c_abstractor",
        "Convolutions, pooling to side x side tokens, convolutions, an MLP.",
        "Honeybee",
        CAbstractor,
        {"side": 2, "depth": 3},
        _side,
        mixes=True,
    ),
    Architecture(
        "resampler",
        "Learnt queries read the features; their tokens have no place in the picture.",
        "Flamingo (Perceiver)",
        Resampler,
        {"queries": 64, "layers": 3, "heads": 8},
        _square,
        mixes=True,
        placed=False,
    ),
    Architecture(
        "pixel_shuffle",
        "factor x factor patches side by side in one token, then one linear layer.",
        "nanoVLM",
        PixelShuffle,
        {"factor": 2, "bias": False},
        _shuffled,
        mixes=True,
    ),
)

CONNECTORS: Mapping[str, Architecture] = MappingProxyType({entry.name: entry for entry in _ALL})
