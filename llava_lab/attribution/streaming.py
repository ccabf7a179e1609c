"""Ask and explain in one go: maps taken from the forwards that make the answer, no pass of their own.

`attribute` explains any run, also a loaded one, with one more forward of the finished sequence. Where the map is
wanted anyway, `ask_and_attribute` takes it while the answer is made. The numbers are the same; what they cost is
measured by ``llava-lab bench capture``. A method can be made this way where its card has `Method.streams`.

`attention` needs the rows of the answer alone. `rollout` carries the prompt's product through its one forward
(`StreamedRollout`) and puts each new token's row on top. `rollout.Flow` carries a whole ``S x S`` product and needs the
finished sequence; here the product has only the columns that are asked for, the image's and one for each other segment
of the prompt, and each layer's is kept for the rows of the answer, which come later: below the diagonal only, 0.7 MB a
layer at 576 image tokens. For prompts over `EXACT` positions it is kept in half precision, 8.5 MB a layer at 2,916; that
rounding reaches an answer's map once, so each number is right to one part in 2,000. The running product itself is always
float32.

    run, relevance = ask_and_attribute(lab, "photo.jpg", "What color is the car?", target="words")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.attention import attention_notes
from llava_lab.attribution.heads import choose_heads
from llava_lab.attribution.method import Maps
from llava_lab.attribution.registry import METHODS, result_of
from llava_lab.attribution.rollout import BLOCK, FLOOR, TowerRollout, Weight, as_column, measured_residual, rollout_notes
from llava_lab.capture import AnswerRows, Norms, watch_attention
from llava_lab.checks import entry, known, layer_window
from llava_lab.errors import LabError, OptionError
from llava_lab.models.layout import language_layers
from llava_lab.replay.targets import Targets, Wanted, image_values, resolve_targets, segment_mass, target_rows
from llava_lab.results import Relevance, Run, Span

if TYPE_CHECKING:
    from llava_lab.models import Lab
    from llava_lab.models.pictures import Shown

EXACT = 1024  # positions of a prompt up to which what is kept is float32
SCALE = 2.0**15  # shares are at most 1, half precision ends at 65,504 and loses digits below 6e-5
LATER = "made by ll.attribute(lab, run, ...) after the answer"


@entry
def ask_and_attribute(
    lab: Lab,
    picture: Shown,
    question: str,
    *,
    method: str = "rollout",
    target: Wanted = "words",
    options: Mapping[str, Any] | None = None,
    **asking: Any,
) -> tuple[Run, Relevance]:
    """Ask as `Lab.ask` does (`asking` are its options), and explain the answer from the forwards that made it.

    `method`: ``rollout`` or ``attention``, with its own `options`. `target` as in `attribute`. Interrupted, it gives
    the answer so far with its maps.

    Raises OptionError (a method or option that needs the finished answer), TargetError, LabError.

    >>> run, relevance = ll.ask_and_attribute(lab, picture, "What is it?", target="answer", max_new_tokens=2)
    >>> relevance.values.shape
    (1, 12, 12)
    """
    card = METHODS[known("method", method, METHODS)]
    if card.streams is None:
        streaming = ", ".join(sorted(name for name, other in METHODS.items() if other.streams is not None))
        raise OptionError(f"while answering, method must be one of {streaming}, got {method!r}; its map is {LATER}")
    chosen = card.with_defaults(options or {})
    for name, value in card.streams.items():
        if chosen[name] != value:
            raise OptionError(f"while answering, {name} must be {value!r}, got {chosen[name]!r}; that map is {LATER}")
    if picture is None or isinstance(picture, list | tuple):
        held = "several pictures" if picture else "no picture"
        raise OptionError(f"while answering, a question has one picture, got {held}; a map of several is {LATER}")
    forms = {name: asking[name] for name in ("prompt", "history") if name in asking}
    sequence = lab.sequence(question, **forms)
    watching = WATCHING[method](lab, chosen, len(sequence.token_ids), sequence.segments)
    with watch_attention(watching.layers, watching.reducer, calls=None):
        run = lab.ask(picture, question, **asking)
    start = time.perf_counter()
    count = len(run.answer_positions)
    if not count and run.options["stopped"] == "interrupted":
        raise KeyboardInterrupt
    if watching.reducer.count(len(watching.layers)) < count:
        raise LabError(f"expected every layer to attend {count} times, got fewer; its map is {LATER}")
    targets = resolve_targets(lab, run, target)
    card.refuse(lab, targets)
    maps = watching.maps(run, targets, count)
    maps = replace(maps, notes=(*maps.notes, "Taken while the answer was made; the seconds are those after it."))
    seconds = time.perf_counter() - start
    return run, result_of(maps, card, chosen, run, targets, model=lab.name, weights=run.fingerprint, seconds=seconds)


class WatchedAttention:
    """`attention`, from the rows of the answer alone."""

    def __init__(self, lab: Lab, options: dict[str, Any], prompt: int, segments: Mapping[str, Span]) -> None:
        self._chosen = choose_heads(lab, options["layers"], None)
        self._fusion = options["fusion"]
        decoder = language_layers(lab.model)
        self.layers = [decoder[layer] for layer in self._chosen.layers]
        self.reducer = AnswerRows(prompt, fusion=self._fusion)

    def maps(self, run: Run, targets: Targets, count: int) -> Maps:
        at = range(self.reducer.first, self.reducer.first + count)
        parts = torch.stack([target_rows(self.reducer.picked(i, count), at, targets) for i in range(len(self.layers))])
        rows = torch.nn.functional.pad(parts.mean(0), (0, 1))  # the last token attends after everything was said
        shares = parts[..., slice(*run.segments["image"])].sum(-1)
        extras = {
            "mass": segment_mass(rows, run),
            "image_share": shares.mean(0).tolist(),
            "image_share_by_layer": shares.tolist(),
        }
        return Maps(image_values(rows, run), {}, attention_notes(self._chosen, self._fusion), extras)


class WatchedRollout:
    """`rollout`, its prompt's part folded while the prompt is read."""

    def __init__(self, lab: Lab, options: dict[str, Any], prompt: int, segments: Mapping[str, Span]) -> None:
        if options["fusion"] == "min":
            raise OptionError(f"while answering, fusion must be mean or max, got 'min'; that map is {LATER}")
        decoder = language_layers(lab.model)
        self._window = slice(*layer_window(options["layers"], len(decoder)))
        self.layers = decoder[self._window]
        null = options["null"] == "causal"
        self._tower = TowerRollout(causal=True, residual=options["residual"], null=null, fusion=options["fusion"])
        self._stream = StreamedRollout(prompt, segments, null=null, device=lab.device)
        measured = options["residual"] == "measured"
        self.reducer = AnswerRows(prompt, fusion=options["fusion"], fold=self._fold, norms=measured)

    def maps(self, run: Run, targets: Targets, count: int) -> Maps:
        def residual(layer: int) -> Weight:
            if self._tower.residual != "measured":
                return float(self._tower.residual)
            return measured_residual(self.reducer.row_norms(layer, count))[0]

        rows, uniform = self._stream.rows(count, lambda layer: self.reducer.picked(layer, count), residual)
        at = range(self.reducer.first, self.reducer.first + count)
        seen = target_rows(rows, at, targets)
        values: Tensor = self._stream.image(seen)
        extras: dict[str, Any] = {"mass": self._stream.mass(seen), "residual_by_layer": self._tower.kept}
        if uniform is not None:
            null = target_rows(uniform, at, targets)
            extras["null_mass"] = self._stream.mass(null)
            values = torch.log((values + FLOOR) / (self._stream.image(null) + FLOOR))
        grid = values.cpu().numpy().reshape(len(targets), run.map.rows, run.map.cols)
        return Maps(grid, {}, rollout_notes(self._window, self._tower, extras), extras)

    def _fold(self, layer: int, attention: Tensor, norms: Norms | None) -> None:
        self._stream.step(attention, self._tower.weight(norms))


WATCHING: Mapping[str, Any] = {"attention": WatchedAttention, "rollout": WatchedRollout}


class StreamedRollout:
    """Feed it the prompt's layers in order (`step`), then the answer's rows of every layer (`rows`)."""

    def __init__(self, prompt: int, segments: Mapping[str, Span], *, null: bool, device: torch.device | str = "cpu") -> None:
        self.prompt, self._image = prompt, segments["image"]
        self.others = [name for name in segments if name not in ("image", "answer")]
        start, stop = self._image
        columns = torch.zeros(prompt, len(self.others) + stop - start, device=device)
        for number, name in enumerate(self.others):
            columns[slice(*segments[name]), number] = 1.0
        columns[range(start, stop), range(len(self.others), columns.shape[1])] = 1.0
        self._spans = [segments[name] for name in self.others]
        self.total: Float[Tensor, "S C"] = columns
        self.uniform: Float[Tensor, "S C"] | None = columns.clone() if null else None
        self._kept: list[list[tuple[slice, Tensor]]] = []  # a layer's input product, in blocks of rows; not the first's
        self._sums: list[Float[Tensor, " C"]] = []  # column sums of the uniform product, a layer's input
        self._precision = torch.float32 if prompt <= EXACT else torch.float16
        self._layers = 0

    def step(self, attention: Float[Tensor, "S S"], residual: Weight) -> None:
        """Put one more layer on top of the prompt's rows."""
        keep = as_column(residual, attention)
        kept = []
        for start in reversed(range(0, self.prompt, BLOCK)):  # a causal row only needs rows at or above it
            stop = min(start + BLOCK, self.prompt)
            rows, columns = slice(start, stop), self._columns(stop)
            if self._layers:
                kept.append((rows, (self.total[rows, :columns] * SCALE).to(self._precision)))
            mixed = attention[rows, :stop] @ self.total[:stop, :columns]
            self.total[rows, :columns] = torch.lerp(mixed, self.total[rows, :columns], keep[rows])
        self._kept.append(kept)
        if self.uniform is not None:
            self._sums.append(self.uniform.sum(0))
            above = torch.zeros_like(self.uniform[0])
            for start in range(0, self.prompt, BLOCK):
                rows = slice(start, min(start + BLOCK, self.prompt))
                part = self.uniform[rows]
                mixed = part.cumsum(0).add_(above)
                above = mixed[-1].clone()
                count = torch.arange(start + 1, rows.stop + 1, device=part.device)[:, None]
                self.uniform[rows] = torch.lerp(mixed.div_(count), part, keep[rows])
        self._layers += 1

    def rows(
        self, count: int, attention: Callable[[int], Float[Tensor, "N K"]], residual: Callable[[int], Weight]
    ) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N E"] | None]:
        """Rollout of the prompt's last position and of the `count` - 1 after it, and of uniform attention.

        ``attention(layer)`` and ``residual(layer)`` speak of those `count` rows. The last of their E columns is the answer's.
        """
        new = count - 1
        seen = torch.zeros(new, self.total.shape[1] + 1, device=self.total.device)
        seen[:, -1] = 1.0
        even = seen.clone()
        for layer in range(self._layers):
            weights = attention(layer)[1:]
            keep = as_column(residual(layer), seen.new_empty(count))[1:]
            mixed = weights[:, self.prompt :] @ seen
            mixed[:, :-1] += self._through_prompt(layer, weights[:, : self.prompt])
            seen = torch.lerp(mixed, seen, keep)
            if self.uniform is not None:
                mixed = even.cumsum(0)
                mixed[:, :-1] += self._sums[layer]
                at = torch.arange(self.prompt + 1, self.prompt + count, device=even.device)[:, None]
                even = torch.lerp(mixed / at, even, keep)
        first = torch.nn.functional.pad(self.total[-1:], (0, 1))
        if self.uniform is None:
            return torch.cat([first, seen]), None
        return torch.cat([first, seen]), torch.cat([torch.nn.functional.pad(self.uniform[-1:], (0, 1)), even])

    def image(self, rows: Float[Tensor, "N E"]) -> Float[Tensor, "N P"]:
        return rows[:, len(self.others) : -1]

    def mass(self, rows: Float[Tensor, "N E"]) -> list[dict[str, float]]:
        """Each row's share on each segment."""
        shares = {name: rows[:, number] for number, name in enumerate(self.others)}
        shares |= {"image": self.image(rows).sum(1), "answer": rows[:, -1]}
        return [{name: float(column[row]) for name, column in shares.items()} for row in range(len(rows))]

    def _columns(self, stop: int) -> int:
        """How many columns rows before `stop` can have anything in: image columns follow the diagonal."""
        start, end = self._image
        return len(self.others) + min(max(stop - start, 0), end - start)

    def _through_prompt(self, layer: int, weights: Float[Tensor, "N S"]) -> Float[Tensor, "N C"]:
        out = weights.new_zeros(len(weights), self.total.shape[1])
        if layer == 0:  # its input product is the identity
            for number, span in enumerate(self._spans):
                out[:, number] = weights[:, slice(*span)].sum(1)
            out[:, len(self.others) :] = weights[:, slice(*self._image)]
            return out
        for rows, block in self._kept[layer]:
            out[:, : block.shape[1]] += weights[:, rows] @ (block.float() / SCALE)
        return out
