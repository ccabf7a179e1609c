"""Checks that every entry shares, and the progress of long work.

A check gives the value back or raises one line that says what was expected and what came. `entry` stands above every
public function: it keeps the caller's torch settings out and other libraries' exceptions in. `Sweep` is the
progress bar of anything that may take seconds: it shows itself after two of them, and Ctrl-C ends the work
early but keeps what is done.

    from llava_lab.checks import Sweep, one_of

    one_of("fill", "grey", ("grey", "blur"))
    with Sweep("occlusion", total=9, unit="block") as done:
        for block in range(9):
            done.step()
    assert done.count == 9 and not done.interrupted
"""

from __future__ import annotations

import functools
import inspect
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from tqdm.auto import tqdm

from llava_lab.errors import CheckpointError, DataError, LabError, OptionError, foreign_line

if TYPE_CHECKING:
    from llava_lab.results import Run

PATIENCE = 2.0  # seconds before a progress bar appears
AUTOCAST = ("cpu", "cuda", "mps")  # kinds of device a caller may have set to another precision

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """`value` if it is one of `choices`. Raises OptionError with the list of them."""
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def known(kind: str, name: Any, names: Iterable[str]) -> Any:
    """`name` if it is one of `names`. Raises OptionError: "no method 'x'; the methods are a, b"."""
    names = tuple(names)
    if name not in names:
        raise OptionError(f"no {kind} {name!r}; the {kind}s are {', '.join(names)}")
    return name


def whole_number(name: str, value: Any, *, least: int = 0) -> int:
    """`value` as an int of at least `least`. Raises OptionError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def number(name: str, value: Any, *, least: float = 0.0) -> float:
    """`value` as a finite float of at least `least`. Raises OptionError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) < float("inf"):
        raise OptionError(f"{name} must be a number of at least {least:g}, got {value!r}")
    return float(value)


def layer_window(layers: Any, count: int) -> tuple[int, int]:
    """``(start, stop)`` within a model of `count` layers; None is all of them. Raises OptionError."""
    if layers is None:
        return 0, count
    fine = isinstance(layers, Sequence) and len(layers) == 2 and all(isinstance(end, Integral) for end in layers)
    if not fine or not 0 <= layers[0] < layers[1] <= count:
        raise OptionError(f"layers must be (start, stop) with 0 <= start < stop <= {count}, or None for all; got {layers!r}")
    return int(layers[0]), int(layers[1])


def regular_file(path: str | os.PathLike, error: type[LabError] = DataError) -> Path:
    """`path` if it is a regular file, or a link to one: a pipe would wait for ever and a device has no end.

    Raises `error` for anything else that is there, FileNotFoundError where nothing is.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except ValueError:
        raise error(f"{str(path)!r} is no name a file can have") from None
    if not stat.S_ISREG(mode):
        raise error(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; expected a file")
    return path


def not_finite(values: Any) -> int:
    """How many of a tensor's `values` are NaN or infinite: one sum where none is, a count where the sum is not finite.

    >>> import torch
    >>> from llava_lab.checks import not_finite
    >>> not_finite(torch.tensor([1.0, float("nan"), float("inf")]))
    2
    """
    values = values.detach()
    if isfinite(values.sum().item()):
        return 0
    return int(((values - values) != 0).sum())  # a number less itself is 0, NaN and infinity less themselves are NaN


def same_model(lab: Any, run: Run) -> str:
    """The fingerprint of the weights that made `run`, if `lab` holds them. Raises CheckpointError.

    `lab` is anything with a `name` and a `fingerprint`.
    """
    weights: str = lab.fingerprint
    if run.fingerprint != weights:
        raise CheckpointError(f"expected a run made by {lab.name!r}, got one by {run.model!r} with other weights; ask again")
    return weights


# -- cleaning up -------------------------------------------------------------------------


@contextmanager
def undoing(undo: Callable[[], Any]) -> Iterator[None]:
    """However the block is left, `undo` has run to its end: where an interrupt cuts it short, it runs once more.

    Enter it before the first change, with an `undo` that may begin anew after any of its lines.
    """
    done = False
    try:
        try:
            yield
        finally:
            undo()
            done = True
    finally:
        if not done:
            undo()


# -- what stands above every public function ------------------------------------------------


def entry(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Guard a public function; it keeps its name, signature and docstring.

    Inside, torch is as it is when nothing was set: a caller's ``inference_mode``, ``no_grad``, autocast, default type or
    default device changes no number. An exception of another library or of the system comes out as one line of ours, with
    the original behind it; our own bugs, Ctrl-C and errors in the caller's own code pass as they are (`foreign_line`).
    Below ``@contextmanager`` only what stands before the ``yield`` is guarded: the block is the caller's.
    """
    if inspect.isgeneratorfunction(function):
        opening = contextmanager(function)

        @functools.wraps(function)
        def opened(*args: Given.args, **options: Given.kwargs) -> Any:
            with ExitStack() as block:
                with _guard(function.__name__):
                    value = block.enter_context(opening(*args, **options))
                yield value

        return opened

    @functools.wraps(function)
    def guarded(*args: Given.args, **options: Given.kwargs) -> Answer:
        with _guard(function.__name__):
            return function(*args, **options)

    return guarded


class _Inside(threading.local):
    """How many entries this thread is in: only the outermost sets torch."""

    depth = 0


_inside = _Inside()


@contextmanager
def _guard(name: str) -> Iterator[None]:
    _inside.depth += 1
    try:
        if _inside.depth == 1 and "torch" in sys.modules:
            with _plain_torch():
                yield
        else:
            yield
    except Exception as error:
        line = foreign_line(error)
        if line is None:
            raise
        raise LabError(f"{name}: {line}") from error
    finally:
        _inside.depth -= 1


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Inside the block torch is as it is before anybody sets anything; the caller's settings come back."""
    import torch

    with ExitStack() as undo:
        if torch.is_inference_mode_enabled():
            undo.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            undo.enter_context(torch.enable_grad())
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                undo.enter_context(torch.autocast(device, enabled=False))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            undo.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            undo.enter_context(torch.device("cpu"))
        yield


# -- progress -------------------------------------------------------------------------------


class Sweep:
    """Progress of `total` steps. Ctrl-C inside the block ends it early once `least` steps are done, and is raised before.

    After the block, `count` says how far it came and `interrupted` whether it was ended early.
    """

    def __init__(self, what: str, *, total: int, unit: str = "step", least: int = 1, show: bool = True) -> None:
        self.count = 0
        self.interrupted = False
        self._least = least
        self._bar = tqdm(total=total, desc=what, unit=unit, delay=PATIENCE, leave=False, disable=not show)

    def step(self, steps: int = 1) -> None:
        """Say that `steps` more are done; what they gave must be kept by then."""
        self.count += steps
        self._bar.update(steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._bar.close()
        self.interrupted = kind is KeyboardInterrupt and self.count >= self._least
        return self.interrupted
