"""The Jacobian lens: what a state makes the model say later, to first order, on average over prompts with pictures.

The logit lens reads a state as if it were the last. A `JacobianLens` first carries it there by the mean derivative of the last
state (before the final norm) with respect to it, a matrix per state fitted once, and then reads it with the model's own norm
and output head: ``head(norm(J_l h))``. It tells what a change of the state would do to the words, not what the state looks
like; nothing is trained, and there is no bias.

Which derivative. V are the image tokens and the text after them, without the very last token of the sequence (nothing
follows it). For a source position t the effects on all later ones are added, itself included, and only sources and prompts
are averaged:

    J_l = mean over prompts, mean over t of  sum over t' >= t, t' in V, of  d last[t'] / d h_l[t]

There is one matrix for image tokens (t runs over them) and one for text. ``targets="later"`` is this sum, as the source has
it. ``targets="text"``, our default, lets t' run over text alone: nothing ever asked an image token to say anything at its own
place, and the effects of image tokens on one another, which are most of the sum, are then left out. For text it is the same.
The source leaves out the first 16 positions as attention sinks; here all before the picture are left out, where those are.

    runs = lab.ask_many(pictures, "What do you see?")
    lens = fit_jacobian(lab, runs)
    logit_lens(lab, run, fitted=lens)

A mean says nothing of one prompt: a gate that opens on half of the prompts counts half. How far the two halves of the prompts
agree stands in the result. And what a lens reads need not be what the model goes by.

Source: Gurnee et al. 2026, Verbalizable Representations Form a Global Workspace in Language Models
(transformer-circuits.pub/2026/workspace), on text; its code is anthropics/jacobian-lens. Image tokens, a matrix of their own
and ``targets="text"`` are ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from llava_lab.capture import hooked, undisturbed
from llava_lab.checks import Sweep, entry, made_by, one_of, whole_number
from llava_lab.errors import CheckpointError, LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.words import output_head, state_window
from llava_lab.results import Run, Saved, Table

TARGETS = ("text", "later")


@dataclass(frozen=True)
class JacobianLens(Saved):
    """One matrix per fitted state for image tokens and one for text; the last state is read as it is."""

    KIND: ClassVar[str] = "Jacobian lens"
    GAPS: ClassVar[tuple[str, ...]] = ("agreement",)

    states: tuple[int, ...]  # fitted, of 0 .. layers - 1
    image: Float32[np.ndarray, "states width width"]  # d last / d state: rows are the last state's directions
    text: Float32[np.ndarray, "states width width"]
    agreement: Float32[np.ndarray, "2 states"]  # cosine of the two halves of the prompts, for image and text; NaN for one prompt
    targets: str  # "later" | "text"
    layers: int  # of the model; state `layers` is the last
    prompts: int
    model: str
    fingerprint: str
    seconds: float
    interrupted: bool = False

    def translate(self, number: int, states: Tensor, *, source: str = "image") -> Tensor:
        """States (P, W) carried to the last layer by the matrix of `source`, in their own dtype; the last state is given back."""
        if number >= self.layers:
            return states
        if number not in self.states:
            fitted = f"{self.states[0]} to {self.states[-1]}"
            raise OptionError(f"this lens was fitted for states {fitted}, got {number}; read layers=({self.states[0]}, ...)")
        matrix = (self.image if source == "image" else self.text)[self.states.index(number)]
        return (states.float() @ torch.from_numpy(matrix).to(states.device).float().T).to(states.dtype)

    def table(self) -> Table:
        """A row for each state: how alike the two halves of the prompts are, and how far the lens is from the logit lens."""
        rows = []
        for i, state in enumerate(self.states):
            row = [str(state)]
            for which, matrix in enumerate((self.image[i], self.text[i])):
                size = float(np.linalg.norm(matrix)) or 1.0
                alike = float(np.trace(matrix)) / (size * len(matrix) ** 0.5)
                row += [f"{self.agreement[which, i]:.2f}", f"{alike:.2f}"]
            rows.append(tuple(row))
        names = ("state", "image: halves agree", "like the logit lens", "text: halves agree", "like the logit lens")
        about = "all later positions" if self.targets == "later" else "later text positions"
        title = f"effects on {about}, {self.prompts} prompts; cosines, 1 is the same matrix"
        return Table(names, tuple(rows), title=title)


@entry
def fit_jacobian(
    lab: Lab,
    runs: Sequence[Run],
    *,
    targets: str = "text",
    layers: Any = None,
    rows: int = 32,
    progress: bool = True,
) -> JacobianLens:
    """Fit a Jacobian lens on whole runs, prompt and answer; the model is not changed.

    `targets`: "text" adds a state's effects on all later text, "later" those on image tokens too. `layers`: the states to
    fit, as in `logit_lens`; the cost grows with the layers above the lowest. `rows` of the matrix are computed at a time, on
    as many copies of the sequence. Exact, one prompt at a time: a forward of `rows` copies and ``width / rows`` passes back
    through them, as much as `width` plain forwards. Gradients are in the model's own dtype; load it in float32. Ctrl-C gives
    the mean over the prompts done.

    Raises OptionError (no runs, unknown targets, a state out of range, a run without a picture), CheckpointError (another
    model's run).

    >>> lens = ll.fit_jacobian(lab, [run], layers=5, progress=False)
    >>> lens.states, lens.image.shape
    ((5,), (1, 256, 256))
    """
    begin = time.perf_counter()
    one_of("targets", targets, TARGETS)
    whole_number("rows", rows, least=1)
    if not len(runs):
        raise OptionError("expected runs to fit a lens on, got none; lab.ask_many gives some")
    count = len(language_layers(lab.model))
    start, stop = state_window(layers, count - 1)
    halves: list[list[np.ndarray]] = [[], []]  # of each half of the prompts: nothing yet, or its sum (2, states, W, W)
    with Sweep("Jacobians", total=len(runs), unit="prompt", show=progress) as sweep:
        for number, run in enumerate(runs):
            found = prompt_jacobian(lab, run, targets, start, stop, rows)
            half = halves[number % 2]
            half[:] = [half[0] + found] if half else [found]
            sweep.step()
    total = np.sum([half[0] for half in halves if half], 0) / sweep.count
    return JacobianLens(
        states=tuple(range(start, stop)),
        image=total[0].astype(np.float32),
        text=total[1].astype(np.float32),
        agreement=_agreement(halves),
        targets=targets,
        layers=count,
        prompts=sweep.count,
        **made_by(lab, begin),
        interrupted=sweep.interrupted,
    )


def prompt_jacobian(lab: Lab, run: Run, targets: str, start: int, stop: int, rows: int) -> Float[np.ndarray, "2 states W W"]:
    """One run's mean derivatives of the last state, float64: by states start .. stop - 1, at image tokens and at text."""
    inputs = lab.inputs(run)
    image = slice(*run.segments["image"])
    text = slice(image.stop, len(run.token_ids) - 1)
    if text.stop <= text.start:
        raise OptionError(f"expected text after the picture, got a run of {len(run.token_ids)} tokens that ends with it")
    reached = text if targets == "text" else slice(image.start, text.stop)
    width = output_head(lab).in_features
    out = np.zeros((2, stop - start, width, width))
    with undisturbed(lab.model), torch.enable_grad(), _states_of_copies(lab, start, min(rows, width)) as states:
        lab.model(**inputs, use_cache=False, logits_to_keep=1)
        *sources, last = (states[number] for number in (*range(start, stop), max(states)))
        for first in range(0, width, len(last)):
            # copy i asks for the gradient of direction first + i, summed over all positions it is looked for at
            wanted = torch.zeros_like(last)
            for copy in range(min(len(last), width - first)):
                wanted[copy, reached, first + copy] = 1
            slopes = torch.autograd.grad(last, sources, wanted, retain_graph=first + len(last) < width)
            for state, slope in enumerate(slopes):
                for source, positions in enumerate((image, text)):
                    mean = slope[: width - first, positions].double().mean(1)
                    out[source, state, first : first + len(mean)] = mean.cpu().numpy()
    return out


@contextmanager
def _states_of_copies(lab: Lab, start: int, copies: int) -> Iterator[dict[int, Tensor]]:
    """From layer `start` on the forward inside the block runs on `copies` of the sequence; its states (copies, S, W) by number.

    They have a graph down to state `start`, and nothing below has one: the picture is seen once.
    """
    layers = language_layers(lab.model)
    states: dict[int, Tensor] = {}

    def copy(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        stream = (args[0] if args else kwargs["hidden_states"]).detach()
        if len(stream) != 1:
            raise LabError(f"expected one sequence at a time, got a batch of {len(stream)}")
        states[start] = stream.expand(copies, -1, -1).clone().requires_grad_()
        return ((states[start], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states[start]})

    def keep(number: int, output: Any) -> None:
        states[number] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        stack.callback(states.clear)
        stack.enter_context(hooked(layers[start], before=copy, with_kwargs=True))
        for number, layer in enumerate(layers[start:], start + 1):
            stack.enter_context(hooked(layer, after=lambda _, args, output, number=number: keep(number, output)))
        yield states


def _agreement(halves: Sequence[Sequence[np.ndarray]]) -> Float32[np.ndarray, "2 states"]:
    """Cosine of two sums of matrices (2, states, W, W), state by state; NaN where there is but one."""
    if not all(halves):
        ((first,),) = [half for half in halves if half]
        return np.full(first.shape[:2], np.nan, np.float32)
    (one,), (two,) = halves
    size = np.linalg.norm(one, axis=(2, 3)) * np.linalg.norm(two, axis=(2, 3))
    return ((one * two).sum((2, 3)) / np.maximum(size, 1e-300)).astype(np.float32)


def check_lens(lab: Lab, fitted: Any) -> None:
    """Raise CheckpointError when a tuned or Jacobian lens is of other weights than the lab's."""
    if fitted is not None and fitted.fingerprint != lab.fingerprint:
        maker = "fit_jacobian" if isinstance(fitted, JacobianLens) else "train_lens"
        raise CheckpointError(f"this {fitted.KIND} was made for {fitted.model!r} with other weights; make it anew with `{maker}`")
