"""Interchange of a variable: is there a small subspace of a state that carries it, and it alone?

Distributed alignment search (DAS). Two pictures whose one thing differs in two variables, a *base* and a *source*, are asked the
same question. In the base's reading the state after some layers, at the thing's patches or at the prompt's last token, is given
the source's coordinates along k orthogonal directions and keeps its own along all others:

    h = base + (source - base) Q Q'

The directions are learnt by gradient on some pictures, so that the answer becomes what the source's value demands. On pictures
of other scenes it is counted how often the whole answer does (interchange intervention accuracy, IIA), and how often the answer
about the second variable, in which the source differs too, stays the base's. What carries the variable alone does both.

    found = interchange(lab, variable="color", position="last")
    found.table()

Beside it stand four placebos and bounds: a random subspace of the same size; the same search where the values asked for are
permuted among the pictures; the same search in the model with the values inside each weight in random order, which has learnt
nothing; and the whole state exchanged, which carries everything over. A search that succeeds where there is nothing to find has
found its own strength.

Measured on `tiny` (the call above, and ``position="thing", layers=[1]``; 24 scenes): at the prompt's last token the colour comes
late. The whole state carries nothing up to three layers, 0.17 after four and 0.88 after five; there 32 of 256 dimensions carry
0.79 and leave the kind alone in 0.83 (random and untrained 0.00, shuffled 0.17; the whole state leaves it in 0.08). At the thing
after one layer they carry 0.96 and leave the kind alone in 0.62 (0.00, 0.00, 0.21; the whole state in none). So the variables are
not cleanly apart; fewer scenes to learn from, or fewer dimensions, carry less and leave more alone.

States lie in the residual stream, `layers` l after l layers, 0 being what the first layer is given. Questions ask for a single
word and name the thing by its size; only what the model answers rightly is taken, and its own answers are the labels. A default
call takes a minute on one core, a layer at the thing a minute and a half by itself. Memory: keys and values of every picture up
to the first exchanged position, 2.4 MB a picture and question on `tiny`.

Sources: Geiger et al. 2023 (arXiv 2303.02536, distributed alignment search), 2021 (arXiv 2106.02997, IIA); Wu et al. 2024 (arXiv
2403.07809, pyvene); what placebos are for: Makelov et al. 2023 (arXiv 2311.17030), Sutter et al. 2025 (arXiv 2507.08802).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from llava_lab.capture import hooked, undisturbed
from llava_lab.capture.residual import watch_stream
from llava_lab.checks import Sweep, entry, made_by, number, one_of, whole_number
from llava_lab.errors import DataError, LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import is_offloaded, is_quantized, language_layers, read_connector
from llava_lab.models.weights import weights_put_back
from llava_lab.replay.prefix import embedded
from llava_lab.results import Interchange, Run
from llava_lab.stats import same_answer
from llava_lab.worlds.questions import SHORT
from llava_lab.worlds.twins import BESIDE, VARIABLES, crossed

POSITIONS = ("last", "thing")
LONGEST = 8  # tokens of an answer
TRIED = 4  # scenes drawn for each that is wanted
VARIANTS = 4  # pictures of one scene that are learnt on
BATCH = 8  # pictures read together
NO_TOKEN = -100  # behind a shorter answer's end; torch's own number for what has no loss


@entry
def interchange(
    lab: Lab,
    *,
    variable: str = "color",
    position: str = POSITIONS[0],
    layers: Sequence[int] | None = None,
    dim: int = 32,
    n: int = 16,
    held: int = 24,
    epochs: int = 8,
    rate: float = 0.03,
    seeds: int = 1,
    split: str = "test",
    seed: int = 0,
    progress: bool = True,
) -> Interchange:
    """Search a subspace of `dim` dimensions at `position` after each of `layers`, and exchange it in `held` other scenes.

    `variable`: "color", "kind", "place"; the second variable is the kind, of a kind the colour. `position`: "last", the prompt's
    last token, or "thing", the patches it touches, which share one subspace; a place is not exchanged there, since the source's
    thing stands elsewhere. `layers` None is all, from 0. Learnt in `n` scenes, each drawn in `VARIANTS` ways, `epochs` times, by
    Adam with `rate` falling to 0: at "last" any picture is the source of any other, at the thing those of its own scene.
    `seeds` searches from other beginnings. Ctrl-C gives the layers that are done.

    Raises OptionError for what cannot be, DataError where too few scenes are answered rightly.

    >>> found = ll.interchange(lab, layers=[5], n=2, held=2, epochs=1, progress=False)
    >>> found.iia.shape, found.ARMS
    ((1, 5), ('found', 'random', 'shuffled', 'untrained', 'whole'))
    """
    began = time.perf_counter()
    one_of("variable", variable, VARIABLES)
    one_of("position", position, POSITIONS)
    if (variable, position) == ("place", "thing"):
        raise OptionError("a place cannot be exchanged at the thing, which stands elsewhere in the source; use position='last'")
    n, held, seeds = (whole_number(name, value, least=1) for name, value in (("n", n), ("held", held), ("seeds", seeds)))
    epochs, rate = whole_number("epochs", epochs, least=1), number("rate", rate)
    count, width = len(language_layers(lab.model)), lab.model.get_input_embeddings().embedding_dim
    chosen = list(range(count)) if layers is None else sorted({whole_number("layers", layer) for layer in layers})
    if not chosen or chosen[-1] >= count:
        raise OptionError(f"layers must be numbers from 0 to {count - 1}, or None for all; got {layers}")
    if whole_number("dim", dim, least=1) > width:
        raise OptionError(f"dim must be at most the model's width of {width}, got {dim}")
    if is_quantized(lab.model) or is_offloaded(lab.model):
        raise OptionError(
            f"the untrained control mixes the weights, and those of {lab.name!r} are packed or wait off the device; load it "
            "without quantization, on a device that holds it whole"
        )
    drawn: dict[str, Any] = {"split": split, "seed": seed, "progress": progress}
    learnt_on = answered(lab, variable, n=n, count=VARIANTS, **drawn)
    judged_on = answered(lab, variable, n=held, count=2, begin=learnt_on[-1].index + 1, **drawn)
    lab.inputs(learnt_on[0].beside)  # refuses a model that sees a picture in several squares
    ending = sorted(lab.eos_ids)
    pictures = [run for family in learnt_on for run in family.runs]
    labels = label_rows(pictures, ending[0]).to(lab.device)
    demanded = label_rows([family.runs[1] for family in judged_on], ending[0]).to(lab.device)
    own = label_rows([family.beside for family in judged_on], ending[0]).to(lab.device)
    where = [family.patches for family in learnt_on for _ in family.runs] if position == "thing" else None
    where_judged = [family.patches for family in judged_on] if position == "thing" else None
    sources_of = _sources(learnt_on, position)
    changed, kept = np.full((2, len(chosen), len(Interchange.ARMS), seeds, held), np.nan, np.float32)

    def read(runs: Sequence[Run], at: Sequence[np.ndarray] | None) -> Readings:
        return Readings(lab, runs, at, chosen)

    def judged(question: int) -> tuple[Readings, Readings]:
        bases = [(family.runs[0], family.beside)[question] for family in judged_on]
        # the same question about the source
        sources = [replace(base, picture=family.runs[1].picture) for base, family in zip(bases, judged_on, strict=True)]
        return read(bases, where_judged), read(sources, where_judged)

    def search(learn: Readings, labels: Tensor, layer: int, draw: int) -> Tensor:
        rng = np.random.default_rng((draw, 97))

        def loss(batch: Batch, basis: Tensor) -> Tensor:
            sources = np.array([rng.choice(sources_of[number]) for number in batch.numbers])
            return batch.loss(labels[sources], layer, learn.at(layer, sources), basis)

        return find_subspace(
            [partial(loss, batch) for batch in learn.batches], width, dim, epochs=epochs, rate=rate, seed=draw, device=lab.device
        )

    def right(test: tuple[Readings, Readings], labels: Tensor, layer: int, basis: Tensor | None) -> np.ndarray:
        hits = np.zeros(held, np.float32)
        for batch in test[0].batches:
            states = test[1].at(layer, batch.numbers)
            hits[batch.numbers] = batch.right(labels[batch.numbers], layer, states, basis, ending).cpu().numpy()
        return hits

    draws = range(seed, seed + seeds)
    with (
        undisturbed(lab.model),
        Sweep("interchange", total=2 * len(chosen), unit="layer", show=progress, least=len(chosen) + 1) as sweep,
    ):
        with weights_put_back(seed) as shuffle:
            shuffle([parameter for parameter in lab.model.parameters() if parameter.is_floating_point()])
            learn, test = read(pictures, where), judged(0)
            for at, layer in enumerate(chosen):
                for turn, draw in enumerate(draws):
                    untrained = search(learn, labels, layer, draw)
                    changed[at, Interchange.ARMS.index("untrained"), turn] = right(test, demanded, layer, untrained)
                sweep.step()
        learn, test, others = read(pictures, where), judged(0), judged(1)
        for at, layer in enumerate(chosen):
            for turn, draw in enumerate(draws):
                mixed = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw)).to(lab.device)]
                bases = {
                    "found": search(learn, labels, layer, draw),
                    "random": random_subspace(width, dim, draw).to(lab.device),
                    "shuffled": search(learn, mixed, layer, draw),
                    "whole": None,
                }
                for name, basis in bases.items():
                    arm = Interchange.ARMS.index(name)
                    changed[at, arm, turn] = right(test, demanded, layer, basis)
                    kept[at, arm, turn] = right(others, own, layer, basis)
            sweep.step()
    done = sweep.count - len(chosen)
    notes = [f"Learnt on {len(pictures)} pictures of {n} scenes, judged in {held} others; searches a layer: {seeds}."]
    if sweep.interrupted:
        notes.append(f"Interrupted after {done} of {len(chosen)} layers.")
    return Interchange(
        layers=np.array(chosen[:done], np.int64),
        changed=changed[:done],
        kept=kept[:done],
        variable=variable,
        beside=BESIDE[variable],
        position=position,
        dim=dim,
        width=width,
        learnt_on=n,
        **made_by(lab, began),
        interrupted=sweep.interrupted,
        notes=tuple(notes),
    )


def _sources(families: Sequence[Family], position: str) -> list[list[int]]:
    """Of each picture, in the families' order, the numbers of those that may be its source."""
    groups: list[list[int]] = []
    for family in families:
        start = groups[-1][-1] + 1 if groups else 0
        groups.append(list(range(start, start + len(family.runs))))
    every = [number for group in groups for number in group]
    return [[n for n in (every if position == "last" else group) if n != number] for group in groups for number in group]


# -- pictures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Crossed scenes that the model answers rightly, and what it says of them."""

    index: int  # of the scene
    runs: tuple[Run, ...]  # about the variable; the first is the base, the second its source
    beside: Run  # the first's, about the other variable
    patches: Bool[np.ndarray, "rows cols"]  # that the thing touches in any of them


def answered(
    lab: Lab, variable: str, *, n: int, count: int, split: str, seed: int, progress: bool, begin: int = 0
) -> list[Family]:
    """`n` families of at most `count` and at least two. Raises DataError where there are too few."""
    families: list[Family] = []
    tried = 0
    with Sweep(f"scenes that differ in {variable}", total=n, unit="scene", show=progress, least=n) as sweep:
        for some in crossed(variable, n=TRIED * n, count=count, split=split, seed=seed, begin=begin):
            tried += 1
            shown = [np.asarray(scene.picture()) for scene in some.scenes]
            asked = [f"{some.questions[number]}\n{SHORT}" for number in (1, *[0] * count)]
            runs = lab.ask_many([shown[0], *shown], asked, max_new_tokens=LONGEST, progress=False)
            words = (some.shorts[0][1], *(short for short, _ in some.shorts))
            right = [
                run.options["stopped"] == "eos" and same_answer(run.answer, word) for run, word in zip(runs, words, strict=True)
            ]
            if right[0] and right[1] and sum(right) > 2:
                kept = [number for number in range(count) if right[number + 1]]
                masks = [some.scenes[number].masks()[some.which] for number in kept]
                patches = runs[0].map.mask_to_patches(np.any(masks, 0)) > 0
                families.append(Family(some.scenes[0].index, tuple(runs[number + 1] for number in kept), runs[0], patches))
                sweep.step()
            if len(families) == n:
                return families
    raise DataError(
        f"of {tried} scenes drawn with another {variable} the model answers {len(families)} rightly, and {n} were asked for"
    )


def label_rows(runs: Sequence[Run], end: int) -> Int[Tensor, "B A"]:
    """Each run's answer and its `end`, `NO_TOKEN` behind a shorter one."""
    answers = [[*run.token_ids[slice(*run.segments["answer"])].tolist(), end] for run in runs]
    longest = max(map(len, answers))
    return torch.tensor([answer + [NO_TOKEN] * (longest - len(answer)) for answer in answers])


# -- the exchange -----------------------------------------------------------------------------


def exchange(
    base: Float[Tensor, "N D"], source: Float[Tensor, "N D"], basis: Float[Tensor, "D k"] | None
) -> Float[Tensor, "N D"]:
    """The base with the source's coordinates along the orthonormal columns of `basis`; None is all of them."""
    if basis is None:
        return source
    change = (source - base).to(basis.dtype) @ basis @ basis.T
    return base + change.to(base.dtype)


@contextmanager
def exchanging(
    lab: Lab, layer: int, inside: Bool[Tensor, "B T"], source: Float[Tensor, "N D"], basis: Float[Tensor, "D k"] | None
) -> Iterator[None]:
    """What layer number `layer` is given at the N positions `inside` is exchanged, in every forward of the block."""
    calls: list[int] = []

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        new = states.clone()
        new[inside] = exchange(states[inside], source, basis)
        calls.append(layer)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    with hooked(language_layers(lab.model)[layer], before=before, with_kwargs=True):
        yield
    if not calls:
        raise LabError("expected states to be exchanged, got no forward; run one inside the block")


class _Before(DynamicLayer):
    """Keys and values of what comes before; a pass reads them with its own behind, and leaves them as they are."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


@dataclass(frozen=True)
class Batch:
    """Prompts of one length; what comes before the first position that is exchanged is computed already."""

    lab: Lab
    numbers: list[int]  # of the pictures, among all
    start: int
    before: list[tuple[Tensor, Tensor]]  # keys and values up to `start`, of each layer
    rest: Float[Tensor, "B n D"]  # the prompt's end as the language model is given it
    inside: Bool[Tensor, "B n"]  # the positions that are exchanged

    def logits(
        self, labels: Int[Tensor, "B A"], layer: int, source: Float[Tensor, "N D"], basis: Float[Tensor, "D k"] | None
    ) -> Float[Tensor, "B A V"]:
        """Logits where the answer `labels` is predicted, with the states after `layer` layers exchanged."""
        model: Any = self.lab.model
        said = model.get_input_embeddings()(labels[:, :-1].clamp_min(0))
        rest = torch.cat([self.rest, said.to(self.rest.dtype)], 1)
        at = torch.arange(rest.shape[1], device=rest.device)
        cache = Cache(layers=[_Before(*both) for both in self.before]) if self.before else None
        with exchanging(self.lab, layer, torch.nn.functional.pad(self.inside, (0, said.shape[1])), source, basis):
            return model(
                inputs_embeds=rest,
                position_ids=(at + self.start)[None],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=at[-labels.shape[1] :],
            ).logits

    def loss(
        self, labels: Int[Tensor, "B A"], layer: int, source: Float[Tensor, "N D"], basis: Float[Tensor, "D k"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the answers, mean over their tokens."""
        logits = self.logits(labels, layer, source, basis).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_TOKEN)

    def right(
        self,
        labels: Int[Tensor, "B A"],
        layer: int,
        source: Float[Tensor, "N D"],
        basis: Float[Tensor, "D k"] | None,
        ending: Sequence[int],
    ) -> Bool[Tensor, " B"]:
        """Whether the model says the whole answer, and nothing more: any of the tokens `ending` ends it."""
        said = self.logits(labels, layer, source, basis).argmax(-1)
        said = torch.where(torch.isin(said, torch.tensor(ending, device=said.device)), ending[0], said)
        return ((said == labels) | (labels == NO_TOKEN)).all(-1)


class Readings:
    """Prompts in the model as it is now: batches to exchange states in, and the states to do it with.

    At the prompt's last token, or at the `patches` of each run. Make it inside `capture.undisturbed`.
    """

    def __init__(self, lab: Lab, runs: Sequence[Run], patches: Sequence[np.ndarray] | None, layers: Sequence[int]) -> None:
        self.batches: list[Batch] = []
        self._states: dict[int, dict[int, Float[Tensor, "P D"]]] = {layer: {} for layer in layers}
        by_length: dict[int, list[int]] = defaultdict(list)
        for at, run in enumerate(runs):
            by_length[run.segments["answer"][0]].append(at)
        for length, equal in by_length.items():
            for first in range(0, len(equal), BATCH):
                numbers = equal[first : first + BATCH]
                some = None if patches is None else [patches[number] for number in numbers]
                self._read(lab, numbers, [runs[number] for number in numbers], length, some)

    def _read(self, lab: Lab, numbers: list[int], runs: Sequence[Run], length: int, patches: Sequence[np.ndarray] | None) -> None:
        model: Any = lab.model
        inside = torch.zeros(len(runs), length, dtype=torch.bool, device=lab.device)
        if patches is None:
            inside[:, -1] = True
        else:
            for row, run, touched in zip(inside, runs, patches, strict=True):
                row[run.segments["image"][0] + np.flatnonzero(touched)] = True
        tokens = read_connector(model, torch.cat([lab.pixels(run.picture, run.map.mode) for run in runs]))[1]
        prompts = torch.cat([embedded(lab, run, row[None])[:, :length] for run, row in zip(runs, tokens, strict=True)])

        def keep(layer: int, states: Tensor) -> None:
            if layer in self._states:
                self._states[layer].update((number, row[at]) for number, row, at in zip(numbers, states, inside, strict=True))

        with watch_stream(language_layers(model), keep):
            cache = model(inputs_embeds=prompts, use_cache=True, logits_to_keep=1).past_key_values
        start = int(inside.any(0).nonzero()[0])
        before = [(layer.keys[:, :, :start].clone(), layer.values[:, :, :start].clone()) for layer in cache.layers]
        self.batches.append(Batch(lab, numbers, start, before if start else [], prompts[:, start:].clone(), inside[:, start:]))

    def at(self, layer: int, numbers: Sequence[int] | np.ndarray) -> Float[Tensor, "N D"]:
        """The states of these pictures after `layer` layers, one below the other."""
        return torch.cat([self._states[layer][int(number)] for number in numbers])


# -- the search -----------------------------------------------------------------------------


def random_subspace(width: int, dim: int, seed: int) -> Float[Tensor, "D k"]:
    """`dim` orthonormal columns in a random direction."""
    return torch.linalg.qr(torch.randn(width, dim, generator=torch.Generator().manual_seed(seed))).Q


def find_subspace(
    losses: Sequence[Callable[[Float[Tensor, "D k"]], Float[Tensor, ""]]],
    width: int,
    dim: int,
    *,
    epochs: int,
    rate: float,
    seed: int,
    device: torch.device | None = None,
) -> Float[Tensor, "D k"]:
    """Orthonormal columns that make the losses small, each the loss of one batch; from a random subspace on, a step a batch.

    What is learnt is a free matrix, and its columns made orthonormal (QR) span the subspace.
    """
    free = random_subspace(width, dim, seed).to(device).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=rate)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * len(losses)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(losses), generator=order).tolist():
            with torch.enable_grad():
                loss = losses[batch](torch.linalg.qr(free).Q)
                # of the subspace alone: the model's own parameters get no gradient
                (free.grad,) = torch.autograd.grad(loss, free)
            optimizer.step()
            falling.step()
    return torch.linalg.qr(free.detach()).Q
