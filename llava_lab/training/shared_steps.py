"""Several connectors trained for stage 1 at once: one order of data, one set of features, one frozen language model.

Each connector has its own optimiser, rate and loss, and learns exactly what it would learn alone: nothing passes from
one to the other. What they share is read or computed once: the rows, what the frozen tower saw of their pictures
(`feature_cache`: once for every connector, epoch and seed) and what stands before the pictures (`lean_step`).
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llava_lab.errors import OptionError
from llava_lab.models import layout, projectors
from llava_lab.training.feature_cache import tower_features
from llava_lab.training.lean_step import LeanStep, texts
from llava_lab.training.llava_data import LlavaData, Problems, Source, Text
from llava_lab.training.mixing import Order, samples_per_epoch
from llava_lab.training.recipe import LLAVA_15_7B, LlavaStage
from llava_lab.training.two_stages import _rows

if TYPE_CHECKING:
    from llava_lab.models import Lab

OnStep = Callable[[int, dict[str, float]], None]  # step from 1, each connector's loss


@dataclass(frozen=True)
class SharedTrained:
    """What one connector did beside the others; the connector given now has its trained weights."""

    name: str
    rate: float  # AdamW's peak
    losses: tuple[float, ...]  # of every step, before its update; nats per labelled token
    steps: int  # done; fewer than asked for after an interrupt
    seconds: float  # of the whole call, for all connectors together
    skipped: tuple[str, ...] = ()  # file, row and reason


def train_connectors(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    data: str | os.PathLike | Source | Sequence[Source],
    *,
    recipe: LlavaStage | None = None,
    rates: Mapping[str, float] | None = None,
    steps: int | None = None,
    seed: int = 0,
    bf16: bool = False,
    device_batch: int | None = None,
    cache: str | os.PathLike | bool = True,
    skip_bad: bool = False,
    told: OnStep | None = None,
    progress: bool = True,
) -> dict[str, SharedTrained]:
    """Train connectors in place for stage 1 on the same batches; the lab, also its own connector, stays as it is.

    `connectors` by name, from `llava_lab.new_connector`; their token counts may differ. `rates` gives some another peak
    than the recipe's (default: LLaVA-1.5's). `bf16` runs a copy of the language model in bfloat16; connectors, their
    gradients and optimisers keep their own precision. `device_batch`: rows at a time; the batch is the recipe's still.
    `cache`, `steps` and `skip_bad` are `train_stage`'s. Interrupting keeps what is trained.
    Raises OptionError for what does not fit, DataError for bad data, before the first step.
    """
    recipe, begin = recipe or LLAVA_15_7B.align, time.monotonic()
    chosen = _check(lab, connectors, recipe, rates, steps, device_batch)
    sources = [data] if isinstance(data, Source) else [Source(data)] if isinstance(data, (str, os.PathLike)) else list(data)
    problems = Problems(skip=skip_bad)
    with tempfile.TemporaryDirectory() as folder:
        rows = _one_token_rows(lab, connectors, sources, Path(folder), problems, cache=cache, fit=recipe.fit, show=progress)
        if steps is None:
            weights = [source.weight for source in rows.sources]
            steps = math.ceil(samples_per_epoch(rows.sizes, weights) * recipe.epochs / recipe.batch)
        with training(lab.model, connectors.values()):
            losses = _run(
                lab,
                connectors,
                rows,
                recipe,
                chosen,
                steps,
                seed=seed,
                bf16=bf16,
                rows_at_once=device_batch or recipe.batch,
                cached=bool(cache),
                told=told,
                progress=progress,
            )
    seconds, skipped = time.monotonic() - begin, tuple(problems.named)
    return {
        name: SharedTrained(name, chosen[name], tuple(losses[name]), len(losses[name]), seconds, skipped) for name in connectors
    }


def _run(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    rows: LlavaData,
    recipe: LlavaStage,
    rates: Mapping[str, float],
    steps: int,
    *,
    seed: int,
    bf16: bool,
    rows_at_once: int,
    cached: bool,
    told: OnStep | None,
    progress: bool,
) -> dict[str, list[float]]:
    """Each connector's losses; all connectors take a step before the next batch is read."""
    from transformers import get_cosine_schedule_with_warmup

    step_of = LeanStep(lab.model, dtype=torch.bfloat16 if bf16 else None)
    optimizers, schedules = {}, {}
    for name, connector in connectors.items():
        optimizers[name] = torch.optim.AdamW(connector.parameters(), lr=rates[name], weight_decay=recipe.decay)
        schedules[name] = get_cosine_schedule_with_warmup(optimizers[name], math.ceil(recipe.warmup * steps), steps)
    weights = [source.weight for source in rows.sources]
    order = Order(
        rows.words, rows.sizes, weights, total=steps * recipe.batch, batch=recipe.batch, chunks=1, group=recipe.group, seed=seed
    )
    losses: dict[str, list[float]] = {name: [] for name in connectors}
    places = iter(order)
    try:
        for number in tqdm(range(1, steps + 1), desc="connectors", unit="step", disable=not progress):
            batch = [rows[next(places)] for _ in range(recipe.batch)]
            parts = list(_parts(lab, batch, rows_at_once, cached=cached))
            count = sum(words.count for words, _ in parts)
            if not count:
                raise OptionError(f"step {number} has no labelled token; use a larger batch than {recipe.batch}")
            for name, connector in connectors.items():
                total = 0.0
                for words, features in parts:
                    loss = step_of.loss(connector, words, features) / count
                    if loss.requires_grad:
                        loss.backward()
                    total += loss.item()
                torch.nn.utils.clip_grad_norm_(connector.parameters(), recipe.clip)
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
                schedules[name].step()
                losses[name].append(total)
            if told is not None:
                told(number, {name: found[-1] for name, found in losses.items()})
    except KeyboardInterrupt:
        pass
    return losses


def _parts(lab: Lab, batch: Sequence[Mapping[str, Any]], size: int, *, cached: bool) -> Iterator[tuple[Any, Tensor | None]]:
    """A batch in parts of `size` rows: their words, and the features of their pictures, computed here without a cache."""
    for start in range(0, len(batch), size):
        rows = batch[start : start + size]
        seen = [torch.as_tensor(row["picture"]) for row in rows if row["picture"] is not None]
        features = torch.stack(seen).to(lab.device) if seen else None
        if features is not None and not cached:
            features = tower_features(lab.model, features)
        yield texts([(row["ids"], row["labels"]) for row in rows], lab.image_id), features


def _one_token_rows(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    sources: Sequence[Source],
    folder: Path,
    problems: Problems,
    *,
    cache: str | os.PathLike | bool,
    fit: str | None,
    show: bool,
) -> LlavaData:
    """The rows with one image id for each picture, checked against the context that the longest connector leaves."""
    longest = max(_tokens(lab, connector) for connector in connectors.values())
    text = Text(lab.tokenizer, lab.image_id, 1, lab.context - longest + 1, "align")
    rows, _ = _rows(lab, list(sources), text, folder, problems, cache=cache, fit=fit, first=True, show=show)
    problems.refuse()
    return rows


def _tokens(lab: Lab, connector: Any) -> int:
    """Image tokens a connector makes."""
    kind = getattr(connector, "kind", None)
    if kind is None or not (entry := projectors.architecture(kind)).mixes:
        config: Any = lab.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side * side + (config.vision_feature_select_strategy != "default" and layout.has_class_token(lab.model))
    rows, cols = entry.tokens(projectors.sizes_of(lab.model.config), connector.options)
    return rows * cols


def _check(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    recipe: LlavaStage,
    rates: Mapping[str, float] | None,
    steps: int | None,
    device_batch: int | None,
) -> dict[str, float]:
    """Each connector's peak rate, when everything fits."""
    if not connectors:
        raise OptionError("no connectors: give at least one by name, for example from llava_lab.new_connector")
    if recipe.name != "align":
        raise OptionError(f"connectors are trained together in stage 'align' only, the recipe is for {recipe.name!r}")
    if steps is not None and steps < 1:
        raise OptionError(f"steps must be 1 or more, got {steps}")
    if device_batch is not None and device_batch < 1:
        raise OptionError(f"device_batch must be 1 or more, got {device_batch}")
    if unknown := sorted(set(rates or {}) - set(connectors)):
        raise OptionError(f"rates name {', '.join(unknown)}, the connectors are {', '.join(connectors)}")
    if len({id(connector) for connector in connectors.values()}) < len(connectors):
        raise OptionError("two names share one connector; each needs its own")
    expected = projectors.sizes_of(lab.model.config)
    for name, connector in connectors.items():
        if not any(True for _ in connector.parameters()):
            raise OptionError(f"connector {name!r} has no parameters, so nothing to train")
        sizes = getattr(connector, "sizes", expected)
        if replace(sizes, bias=True) != replace(expected, bias=True):
            raise OptionError(f"connector {name!r} is made for {sizes}, the model needs {expected}")
    return {name: (rates or {}).get(name, recipe.rate) for name in connectors}


@contextmanager
def training(model: Any, connectors: Any) -> Iterator[None]:
    """Within it the connectors train and nothing of the model does; flags and modes are put back afterwards."""
    own = list(connectors)
    parts = [model, *own]
    flags = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        model.requires_grad_(False).eval()
        for connector in own:
            connector.requires_grad_(True).train()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
