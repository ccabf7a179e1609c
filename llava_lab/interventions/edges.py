"""The language model as a graph: what each head and feed-forward part hands to every later one, edge by edge.

The residual stream is a sum, so what a later part reads is the sum of what all earlier ones wrote. Each edge is one summand of
one reader: from the tokens, a head or a feed-forward part, to a head's query, to the keys or the values of a group of heads, to a
feed-forward part, or to the output; at the image's positions or at those of the text behind it. In `Graph.run` an edge that is
kept carries what its sender gives in this very run, and an edge that is cut carries what it gave for the corrupted picture.

    graph = Graph(lab, pair)
    graph.run(graph.all_edges()), graph.run(graph.no_edges())  # the clean score, the corrupted score

Llama's layer is done again here step by step (its attention in plain matrices); that the whole graph gives the model's own score
is checked for each pair. Memory: what every sender writes, senders x positions x width, 11 GB at LLaVA-1.5-7B.

Sources: Syed et al. 2023 (arXiv 2310.10348, edge attribution patching); Hanna et al. 2024 (arXiv 2403.17806, with integrated
gradients); transformers' ``LlamaDecoderLayer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from llava_lab.errors import LabError, OptionError
from llava_lab.interventions.pairs import Pair
from llava_lab.models.layout import language_layers, language_model
from llava_lab.replay.prefix import Prefix, embedded, image_tokens
from llava_lab.replay.score import read_scores
from llava_lab.replay.targets import predicting_rows

if TYPE_CHECKING:
    from llava_lab.models import Lab

GROUPS = ("image", "text")  # where an edge runs; before the picture both readings are the same


@dataclass(frozen=True)
class Shape:
    """How many edges stand where: blocks of (readers, senders, groups), two a layer and one for the output."""

    layers: int
    heads: int
    groups: int  # of heads that share keys and values

    @property
    def senders(self) -> int:
        """The tokens, then each layer's heads and its feed-forward part."""
        return 1 + self.layers * (self.heads + 1)

    def before(self, layer: int) -> int:
        """Senders that a layer's attention can read."""
        return 1 + layer * (self.heads + 1)

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """Of each layer's attention (queries, keys, values), its feed-forward part, and the output."""
        shapes = []
        for layer in range(self.layers):
            shapes.append((self.heads + 2 * self.groups, self.before(layer), len(GROUPS)))
            shapes.append((1, self.before(layer) + self.heads, len(GROUPS)))
        return [*shapes, (1, self.senders, len(GROUPS))]

    @property
    def live(self) -> np.ndarray:
        """Edges that can matter: not from the text's tokens, the same in both readings, nor to what no answer position reads."""
        parts = []
        for number, shape in enumerate(self.blocks):
            alive = np.ones(shape, bool)
            alive[:, 0, 1] = False
            last = self.layers - 1
            if number == 2 * last:
                alive[: self.heads, :, 0] = False  # queries of the last layer at image positions
            elif number > 2 * last:
                alive[..., 0] = False
            parts.append(alive.ravel())
        return np.concatenate(parts)

    def name(self, edge: int) -> str:
        """An edge in words, by its number among all."""
        for number, shape in enumerate(self.blocks):
            size = int(np.prod(shape))
            if edge < size:
                reader, sender, group = (int(at) for at in np.unravel_index(edge, shape))
                return f"{self._sender(sender)} -> {self._reader(number, reader)}, {GROUPS[group]}"
            edge -= size
        raise OptionError("no edge of that number")

    def _sender(self, sender: int) -> str:
        if sender == 0:
            return "tokens"
        layer, node = divmod(sender - 1, self.heads + 1)
        return f"MLP {layer}" if node == self.heads else f"head {layer}.{node}"

    def _reader(self, number: int, reader: int) -> str:
        if number == 2 * self.layers:
            return "output"
        layer = number // 2
        if number % 2:
            return f"MLP {layer}"
        if reader < self.heads:
            return f"head {layer}.{reader} query"
        kind, group = divmod(reader - self.heads, self.groups)
        which = f"{layer}.{group}" if self.groups == self.heads else f"{layer}, group {group}"
        return f"head {which} {('key', 'value')[kind]}"


class Graph:
    """One pair's two readings, and runs with any edges cut. Make it inside `capture.undisturbed`.

    Raises LabError for layers that are not Llama's, and where the graph does not give the model's own scores.
    """

    def __init__(self, lab: Lab, pair: Pair) -> None:
        layers = language_layers(lab.model)
        if not all(isinstance(layer, LlamaDecoderLayer) for layer in layers):
            raise LabError(f"circuits know Llama's layers, and this model has {type(layers[0]).__name__}; use attribution_patch")
        self._layers: list[Any] = list(layers)
        self._model: Any = lab.model
        config: Any = self._layers[0].self_attn.config
        self.shape = Shape(len(layers), config.num_attention_heads, config.num_key_value_heads)
        self._targets = (pair.target,)
        self._at = predicting_rows(self._targets)
        stop = self._at[-1] + 1
        run = pair.run
        start, end = run.segments["image"]
        self.clean_tokens = embedded(lab, run, image_tokens(lab, run))[0, :stop]
        self.corrupt_tokens = embedded(lab, run, image_tokens(lab, run, pair.pixels))[0, :stop]
        self._where = (slice(start, end), slice(end, stop))
        positions = torch.arange(stop, device=self.clean_tokens.device)[None]
        language: Any = language_model(lab.model)
        self._turn = language.rotary_emb(self.clean_tokens[None], positions)
        self._norm = language.norm
        self._corrupt: list[Tensor] = []  # what each sender gives for the corrupted picture
        with torch.no_grad():
            self.corrupt = float(self._forward(self.corrupt_tokens, keep=self._corrupt))
            self.clean = float(self._forward(self.clean_tokens))
            own = float(Prefix(lab, run, self._targets, start).score()[0])
        # half the digits of the type: the same sums in another order
        if abs(own - self.clean) > torch.finfo(lab.dtype).eps ** 0.5 * max(1.0, abs(own)):
            raise LabError(
                f"expected the model's own score {own:.5f} of the whole graph, got {self.clean:.5f}; use attribution_patch"
            )

    def run(self, edges: np.ndarray) -> float:
        """The score with `edges` (bool, one for each of `shape.live`) kept and all others carrying the corrupted reading."""
        with torch.no_grad():
            return float(self._forward(self.clean_tokens, edges=edges))

    def scores(self, steps: int = 0) -> np.ndarray:
        """Of each edge, float64: what the score would lose, by its slope, if the edge carried the corrupted reading instead.

        The slope at the clean reading, or its mean over `steps` middles of the line between the two readings' tokens.
        """
        clean: list[Tensor] = []
        with torch.no_grad():
            self._forward(self.clean_tokens, keep=clean)
        lost = torch.stack([one - two for one, two in zip(clean, self._corrupt, strict=True)])  # S T D
        total = np.zeros(len(self.shape.live))
        along = [(step + 0.5) / steps for step in range(steps)] or [1.0]
        for share in along:
            readers: list[Tensor] = []
            tokens = (self.corrupt_tokens + share * (self.clean_tokens - self.corrupt_tokens)).detach().requires_grad_()
            with torch.enable_grad():
                score = self._forward(tokens, readers=readers)
                slopes = torch.autograd.grad(score, readers)
            parts = []
            for slope, (_, senders, _) in zip(slopes, self.shape.blocks, strict=True):
                each = [torch.einsum("std,rtd->rs", lost[:senders, where], slope[:, where]) for where in self._where]
                parts.append(torch.stack(each, -1).flatten().double().cpu().numpy())
            total += np.concatenate(parts) / len(along)
        return np.where(self.shape.live, total, 0.0)

    def _forward(
        self,
        tokens: Float[Tensor, "T D"],
        *,
        edges: np.ndarray | None = None,
        keep: list[Tensor] | None = None,
        readers: list[Tensor] | None = None,
    ) -> Float[Tensor, ""]:
        """The score; `keep` gets what each sender gives, `readers` what each block of readers is given, (R, T, D)."""
        kept = None if edges is None else self._split(edges)
        stream, gave = tokens, [tokens]
        baseline = None if kept is None else self._corrupt[0]  # the corrupted reading's stream

        def read(number: int) -> Tensor:
            rows = self.shape.blocks[number][0]
            if kept is None:
                given = stream.expand(rows, -1, -1)
                if readers is not None:
                    given = given.clone()
                    readers.append(given)
                return given
            assert baseline is not None
            changes = torch.stack([one - two for one, two in zip(gave, self._corrupt, strict=False)])  # S T D
            given = baseline.expand(rows, -1, -1).clone()
            for group, where in enumerate(self._where):
                given[:, where] += torch.einsum("rs,std->rtd", kept[number][..., group], changes[:, where])
            return given

        for number, layer in enumerate(self._layers):
            new = self._attention(layer, read(2 * number))
            gave += list(new)
            stream = stream + new.sum(0)
            if baseline is not None:
                baseline = baseline + torch.stack(self._corrupt[len(gave) - len(new) : len(gave)]).sum(0)
            added = layer.mlp(layer.post_attention_layernorm(read(2 * number + 1)))[0]
            gave.append(added)
            stream = stream + added
            if baseline is not None:
                baseline = baseline + self._corrupt[len(gave) - 1]
        last = read(2 * len(self._layers))[0]
        if keep is not None:
            keep += [one.detach() for one in gave]
        logits = self._model.lm_head(self._norm(last[list(self._at)]))
        return read_scores(logits[None], self._at, self._targets)[0, 0]

    def _attention(self, layer: Any, given: Float[Tensor, "R T D"]) -> Float[Tensor, "H T D"]:
        """What each head adds to the stream, its query, key and value read from rows of their own."""
        part, heads, groups = layer.self_attn, self.shape.heads, self.shape.groups
        normed = layer.input_layernorm(given)
        width = part.q_proj.weight.shape[0] // heads

        def project(rows: Tensor, projection: Any, count: int) -> Tensor:
            weight = projection.weight.view(count, width, -1)
            made = torch.einsum("rtd,rwd->rtw", rows, weight)
            return made if projection.bias is None else made + projection.bias.view(count, 1, width)

        query = project(normed[:heads], part.q_proj, heads)
        key = project(normed[heads : heads + groups], part.k_proj, groups)
        value = project(normed[heads + groups :], part.v_proj, groups)
        query, key = (one[0] for one in apply_rotary_pos_emb(query[None], key[None], *self._turn))
        key, value = (one.repeat_interleave(heads // groups, 0) for one in (key, value))
        weights = query @ key.transpose(1, 2) * part.scaling
        future = torch.ones(weights.shape[1:], dtype=torch.bool, device=weights.device).triu(1)
        mixed = weights.masked_fill(future, torch.finfo(weights.dtype).min).softmax(-1) @ value
        return torch.einsum("htw,dhw->htd", mixed, part.o_proj.weight.view(-1, heads, width))

    def _split(self, edges: np.ndarray) -> list[Tensor]:
        parts, begin = [], 0
        for shape in self.shape.blocks:
            size = int(np.prod(shape))
            block = torch.from_numpy(edges[begin : begin + size].reshape(shape).astype(np.float32))
            parts.append(block.to(self.clean_tokens))
            begin += size
        return parts
