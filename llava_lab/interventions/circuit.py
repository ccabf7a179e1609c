"""Circuits: which few edges carry an answer from the picture to the word, and how faithfully they do it alone.

Edges of the language model are ranked by edge attribution patching on some pairs of pictures that differ in one variable. Then
only the best ones are kept, all others carrying the other picture's values, and on pairs that were not ranked on it is measured
how much of the score is left. Beside it: random circuits of equal size.

    found = circuit(lab, variable="color", n=6, held=6)
    found.cpr, found.cmd, found.random_cpr

As MIB scores circuits: f(k) is the circuit's score over the whole model's, both from the score with every edge cut; CPR is the
area under f over the share k of edges kept (1 is the whole model's from the start on, more is possible), CMD the area between f
and 1 (0 is best). MIB has text only; its weighting of edges is not used: an edge is an edge, at the image's positions or at the
text's. Edges are ranked by the size of their score, either sign.

Measured on `tiny` (colour, 2 pairs ranked, 2 judged, as in lesson 12): 1% of 6,628 edges keeps 0.66 of the difference of the
logits, 2% 0.87, 5% 0.96, and 20% at random 0.02; CPR 0.98 beside 0.41, CMD 0.02 beside 0.59 over the lesson's six sizes.

A *pair* is a clean and a corrupted reading of one sequence, what patching and attribution patching start from too: a run, another
picture, and what is scored: best the logit of what was said minus that of what would be said about the other picture, at the
first token where the two answers part. Everything else in the sequence is the same, so that what differs between the readings is
the picture alone.

    pairs = drawn_pairs(lab, "color", n=8)

The *graph* is what each head and feed-forward part hands to every later one, edge by edge. The residual stream is a sum, so what
a later part reads is the sum of what all earlier ones wrote. Each edge is one summand of one reader: from the tokens, a head or a
feed-forward part, to a head's query, to the keys or the values of a group of heads, to a feed-forward part, or to the output; at
the image's positions or at those of the text behind it. In `Graph.run` an edge that is kept carries what its sender gives in this
very run, and an edge that is cut carries what it gave for the corrupted picture.

    graph = Graph(lab, pair)
    graph.run(graph.all_edges()), graph.run(graph.no_edges())  # the clean score, the corrupted score

Llama's layer is done again here step by step (its attention in plain matrices); that the whole graph gives the model's own score
is checked for each pair. Memory: what every sender writes, senders x positions x width, 11 GB at LLaVA-1.5-7B.

Sources: Mueller et al. 2025 (arXiv 2504.13151, MIB); Syed et al. 2023 (arXiv 2310.10348, edge attribution patching); Hanna et al.
2024 (arXiv 2403.17806, with integrated gradients); minimal pairs of Zhang and Nanda 2023 (arXiv 2309.16042), there in text;
transformers' ``LlamaDecoderLayer``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from llava_lab.capture import undisturbed
from llava_lab.checks import Sweep, entry, is_list, made_by, whole_number
from llava_lab.errors import DataError, LabError, OptionError
from llava_lab.interventions.patching import corrupted_pixels
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers, language_model
from llava_lab.replay.prefix import Prefix, embedded, image_tokens
from llava_lab.replay.score import read_scores
from llava_lab.replay.targets import predicting_rows, resolve_targets
from llava_lab.results import Circuit, Run, Target
from llava_lab.stats import same_answer, spearman
from llava_lab.worlds.twins import Twins, twins

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of edges, MIB's
TOLD = 40  # edges named


@entry
def circuit(
    lab: Lab,
    pairs: Any = None,
    *,
    variable: str = "color",
    n: int = 6,
    held: int = 6,
    steps: int = 0,
    shares: Sequence[float] = SHARES,
    draws: int = 3,
    checked: int = 0,
    split: str = "test",
    seed: int = 0,
    progress: bool = True,
) -> Circuit:
    """Edges ranked on `n` pairs, and the faithfulness of the best of them on `held` others.

    `pairs`: a list of (run, other picture or run, metric), ranked on its first `n`; None draws pairs of the picture book that
    differ in `variable` ("color", "kind", "place") and that the model answers rightly. `steps` 0 ranks by the slope at the clean
    reading (EAP), above 0 by its mean along the line from the other picture's tokens (EAP-IG). `shares` of all edges are kept.
    `draws` random circuits of each size. With `checked`, so many random edges are cut one at a time in the first pair, and the
    rank correlation of what is lost with the estimate is kept. Ctrl-C gives the pairs that are done.

    Raises OptionError for pairs or shares that cannot be, DataError where too few pairs are answered rightly, LabError for a
    model whose layers are not Llama's.

    >>> found = ll.circuit(lab, n=1, held=1, shares=(0.05, 1.0), draws=1, progress=False)
    >>> found.faithfulness.shape, bool(abs(found.faithfulness[-1, 0] - 1) < 1e-3)
    ((2, 1), True)
    """
    began = time.perf_counter()
    n, held, draws = whole_number("n", n, least=1), whole_number("held", held, least=1), whole_number("draws", draws)
    steps, checked = whole_number("steps", steps), whole_number("checked", checked)
    sizes = sorted({float(share) for share in shares})
    if not sizes or not all(0 < share <= 1 for share in sizes):
        raise OptionError(f"shares must be numbers above 0 and at most 1, got {list(shares)}")
    every = (
        drawn_pairs(lab, variable, n=n + held, split=split, seed=seed, progress=progress)
        if pairs is None
        else _given(lab, pairs, seed)
    )
    if len(every) <= n:
        raise OptionError(f"pairs must be more than the n={n} that edges are ranked on, got {len(every)}")
    ranked, judged = every[:n], every[n : n + held]
    rng = np.random.default_rng((seed, 91))
    faithful: list[list[float]] = []
    by_chance: list[list[list[float]]] = []
    lost, guessed = [], []
    with (
        undisturbed(lab.model),
        Sweep("circuit", total=len(ranked) + len(judged), unit="pair", show=progress, least=n + 1) as sweep,
    ):
        total = None
        for pair in ranked:
            graph = Graph(lab, pair)
            scores = graph.scores(steps)
            total = scores if total is None else total + scores
            if pair is ranked[0] and checked:
                live = np.flatnonzero(graph.shape.live)
                for edge in rng.choice(live, min(checked, len(live)), replace=False):
                    kept = np.ones(len(scores), bool)
                    kept[edge] = False
                    lost.append(graph.clean - graph.run(kept))
                    guessed.append(scores[edge])
            sweep.step()
        assert total is not None
        shape = graph.shape
        live = np.flatnonzero(shape.live)
        order = live[np.argsort(-np.abs(total[live]), kind="stable")]
        counts = [max(1, round(share * len(live))) for share in sizes]
        chance = [[rng.permutation(live)[:count] for count in counts] for _ in range(draws)]
        for pair in judged:
            graph = Graph(lab, pair)

            def share_of(edges: np.ndarray, graph: Graph = graph) -> float:
                kept = np.zeros(len(shape.live), bool)
                kept[edges] = True
                return (graph.run(kept) - graph.corrupt) / (graph.clean - graph.corrupt)

            own = [share_of(order[:count]) for count in counts]
            random = [[share_of(edges) for edges in drawn] for drawn in chance]
            faithful.append(own)
            by_chance.append(random)
            sweep.step()
    way = f"EAP-IG, {steps} steps" if steps else "EAP"
    notes = [f"Ranked on {len(ranked)} pairs by {way}, judged on {len(faithful)} others."]
    if sweep.interrupted:
        notes.append(f"Interrupted after {len(faithful)} of {len(judged)} pairs.")
    top = order[:TOLD]
    in_image = np.zeros(len(shape.live), bool)
    for block in shape.in_blocks(in_image):
        block[..., GROUPS.index("image")] = True
    assert total is not None  # there is a pair
    return Circuit(
        shares=np.array(sizes),
        counts=np.array(counts, np.int64),
        faithfulness=np.array(faithful, np.float32).T,
        chance=np.array(by_chance, np.float32).transpose(1, 2, 0)
        if draws
        else np.zeros((0, len(sizes), len(faithful)), np.float32),
        image_share=np.array([in_image[order[:count]].mean() for count in counts], np.float32),
        edges=len(live),
        image_edges=int(in_image[live].sum()),
        names=tuple(shape.name(int(edge)) for edge in top),
        scores=(total[top] / len(ranked)).astype(np.float32),
        agreement=spearman(np.array(guessed), np.array(lost)) if len(lost) > 2 else 0.0,
        checked=len(lost),
        variable=variable if pairs is None else "given pairs",
        steps=steps,
        **made_by(lab, began),
        interrupted=sweep.interrupted,
        notes=tuple(notes),
    )


def _given(lab: Lab, pairs: Any, seed: int) -> list[Pair]:
    """Pairs of the user's own."""
    if not is_list(pairs) or not all(isinstance(one, tuple) and len(one) == 3 and isinstance(one[0], Run) for one in pairs):
        raise OptionError("pairs must be a list of (run, other picture or run, metric), or None for drawn ones")
    made = []
    for run, other, metric in pairs:
        lab.inputs(run)
        made.append(Pair(run, corrupted_pixels(lab, run, other, seed)[0], resolve_targets(lab, run, metric)[0]))
    return made


# -- pairs ----------------------------------------------------------------------------------

LONGEST = 24  # tokens of an answer
TRIED = 3  # pairs drawn for each that is wanted


@dataclass(frozen=True)
class Pair:
    """A run, the pixels of another picture, and the score."""

    run: Run
    pixels: Float[Tensor, "1 3 S S"]
    target: Target
    twins: Twins | None = None
    other: Run | None = None


def drawn_pairs(
    lab: Lab, variable: str = "color", *, n: int, split: str = "test", seed: int = 0, begin: int = 0, progress: bool = False
) -> list[Pair]:
    """`n` twins of the picture book (`llava_lab.worlds.twins`) that the model answers rightly, both of each.

    The target is the first token where its two answers part. Raises DataError where too few are answered so.
    """
    pairs: list[Pair] = []
    tried = 0
    with Sweep(f"pairs that differ in {variable}", total=n, unit="pair", show=progress, least=n) as sweep:
        for twin in twins(variable, n=TRIED * n, split=split, seed=seed, begin=begin):
            tried += 1
            run, other = (
                lab.ask(np.asarray(one.picture()), twin.question.text, max_new_tokens=LONGEST) for one in (twin.scene, twin.other)
            )
            right = same_answer(run.answer, twin.question.answer) and twin.other_short in other.answer
            if right and (target := parting(run, other)) is not None:
                pairs.append(Pair(run, lab.pixels(other.picture, run.map.mode), target, twin, other))
                sweep.step()
            if len(pairs) == n:
                return pairs
    raise DataError(f"of {tried} twins that differ in {variable} the model answers {len(pairs)} rightly, and {n} were asked for")


def parting(run: Run, other: Run) -> Target | None:
    """The first token where two answers to one question part, as a contrast; None where one is the other's beginning."""
    start, stop = run.segments["answer"]
    begin, end = other.segments["answer"]
    if start != begin:
        return None
    for at, (one, two) in enumerate(zip(run.token_ids[start:stop].tolist(), other.token_ids[begin:end].tolist(), strict=False)):
        if one != two:
            text = f"{run.tokens[start + at].strip()}, not {other.tokens[begin + at].strip()}"
            return Target("contrast", text, (start + at - 1,), (one,), (two,))
    return None


# -- the graph ------------------------------------------------------------------------------

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

    def in_blocks(self, edges: np.ndarray) -> list[np.ndarray]:
        """Views of `edges`, one value for each, in the shape of every block."""
        ends = np.cumsum([np.prod(shape) for shape in self.blocks])
        return [part.reshape(shape) for part, shape in zip(np.split(edges, ends[:-1]), self.blocks, strict=True)]

    @property
    def live(self) -> np.ndarray:
        """Edges that can matter: not from the text's tokens, the same in both readings, nor to what no answer position reads."""
        every, last = np.ones(sum(map(np.prod, self.blocks)), bool), self.layers - 1
        for number, alive in enumerate(self.in_blocks(every)):
            alive[:, 0, 1] = False
            if number == 2 * last:
                alive[: self.heads, :, 0] = False  # queries of the last layer at image positions
            elif number > 2 * last:
                alive[..., 0] = False
        return every

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
        kept: list[Tensor] | None = None
        if edges is not None:
            kept = [torch.from_numpy(block.astype(np.float32)).to(self.clean_tokens) for block in self.shape.in_blocks(edges)]
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
