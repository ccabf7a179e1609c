"""Connectors as modules: vision features (B, P, F) in, image tokens (B, P', D) out.

Layers are named ``linear_1``, ``linear_2``, ... as transformers names them, so that a hub checkpoint with an
mlp2x_gelu loads into them unchanged. No module here keeps a buffer: what is not in the checkpoint is computed
in the forward. Names, options and token counts are `llava_lab.models.projectors`' business.

Sources: haotian-liu/LLaVA @ c121f04 ``multimodal_projector/builder.py``; TRI-ML/prismatic-vlms @ 874c5bb
``util/nn_utils.py`` (fused); DeCo, arXiv 2405.20985 (average pooling); khanrc/honeybee @ 68a8d84
``projectors/projectors.py`` (C-Abstractor); Flamingo, arXiv 2204.14198 (Perceiver resampler); nanoVLM @ 4e0c096
``models/modality_projector.py`` (pixel shuffle). The code is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

NEW_STD = 0.02  # standard deviation of fresh queries and position embeddings, as in ViT
SQUEEZE = 4  # a block's channel gate is this much narrower than the block
GROUP = 8  # channels that a block's 3x3 convolution mixes


@dataclass(frozen=True)
class Sizes:
    """What a connector stands between."""

    vision: int  # F, width of a vision feature (all chosen layers together)
    language: int  # D, width of the language model
    grid: tuple[int, int]  # vision patches, rows and columns
    bias: bool = True


class Connector(nn.Module):
    """One of our connectors; `kind` and `options` rebuild it, `trained_with` says beside which models it learnt."""

    kind: str
    options: dict[str, Any]
    sizes: Sizes
    trained_with: dict[str, str] | None = None  # fingerprints of "language" and "vision"; {} has not been trained

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes


class Identity(Connector):
    """The features as they are; the two widths must agree."""

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


class Gated(Connector):
    """A hidden layer whose units are opened and shut by a second one: linear_2(linear_1(x) * GELU(linear_gate(x)))."""

    def __init__(self, sizes: Sizes, width: int) -> None:
        super().__init__(sizes)
        self.linear_1 = nn.Linear(sizes.vision, width, bias=sizes.bias)
        self.linear_gate = nn.Linear(sizes.vision, width, bias=sizes.bias)
        self.linear_2 = nn.Linear(width, sizes.language, bias=sizes.bias)
        self.act = nn.GELU()

    def forward(self, image_features: Float[Tensor, "B P F"]) -> Float[Tensor, "B P D"]:
        return self.linear_2(self.linear_1(image_features) * self.act(self.linear_gate(image_features)))


class AveragePool(Chain):
    """Means over square windows of patches, then a chain on what is left."""

    def __init__(self, sizes: Sizes, widths: Sequence[int], *, window: int) -> None:
        super().__init__(sizes, widths, gelu=True)
        self.window = window

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

    def __init__(self, sizes: Sizes, *, window: int, depth: int) -> None:
        super().__init__(sizes)
        rows, cols = sizes.grid
        self.window = window
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
        asked = self.norm_query(tokens)
        seen = torch.cat([self.norm_feature(features), asked], 1)
        parts = (self.q_proj(asked), self.k_proj(seen), self.v_proj(seen))
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
