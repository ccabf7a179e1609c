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
import re
import stat
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeGuard, TypeVar, cast

import numpy as np
from tqdm.auto import tqdm

from llava_lab.errors import CheckpointError, DataError, LabError, OptionError, foreign_line, one_line
from llava_lab.options import by_our_names, nearest

if TYPE_CHECKING:
    from llava_lab.results import Run

PATIENCE = 2.0  # seconds before a progress bar appears
TURN = 0.002  # seconds until a thread that waits for its turn looks again
LARGEST = 2**63  # what torch and files keep a whole number in ends before it
AUTOCAST = ("cpu", "cuda", "mps")  # kinds of device a caller may have set to another precision

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """The one of `choices` that `value` is. Raises OptionError with the list of them."""
    for choice in _equal(value, choices):
        return choice
    raise OptionError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def known(kind: str, name: Any, names: Iterable[str]) -> Any:
    """`name` if it is one of `names`. Raises OptionError: "no method 'x'; the methods are a, b", with the one most like it."""
    names = tuple(names)
    for one in _equal(name, names):
        return one
    near = nearest(name, names) if isinstance(name, str) else None
    meant = f"; did you mean {near!r}?" if near else ""
    raise OptionError(f"no {kind} {shown(name)}; the {kind}s are {', '.join(names)}{meant}")


def _equal(value: Any, choices: Iterable[Any]) -> list[Any]:
    """Those of `choices` that `value` is; an array, which is compared value by value, is none."""
    return [] if getattr(value, "ndim", 0) else [choice for choice in choices if choice is value or choice == value]


def as_python(value: Any) -> Any:
    """Numbers and text of a class of their own as Python's own, which torch and files take; anything else as it is.

    A single value of numpy's or torch's, a member of an Enum, a Fraction.

    >>> from fractions import Fraction
    >>> from llava_lab.checks import as_python
    >>> as_python(Fraction(1, 2))
    0.5
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number, of any class; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, *, least: int = 0) -> int:
    """`value` as an int of at least `least`. Raises OptionError."""
    value = as_python(value)
    if not is_whole(value) or not least <= value < LARGEST:
        raise OptionError(f"{name} must be a whole number of at least {least}{_too_large(value)}, got {shown(value)}")
    return int(value)


def _too_large(value: Any) -> str:
    return " and below 2**63" if isinstance(value, Integral) and int(value) >= LARGEST else ""


def number(name: str, value: Any, *, least: float = 0.0) -> float:
    """`value` as a finite float of at least `least`. Raises OptionError."""
    value = as_python(value)
    if not _is_real(value) or value < least:
        raise OptionError(f"{name} must be a number of at least {least:g}, got {shown(value)}")
    return float(value)


def _is_real(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return (isinstance(value, float) or is_whole(value)) and abs(value) <= sys.float_info.max


def layer_window(layers: Any, count: int) -> tuple[int, int]:
    """``(start, stop)`` within a model of `count` layers; None is all of them. Raises OptionError."""
    if layers is None:
        return 0, count
    # range(2, 4) has two values too, and means another window than they say
    fine = is_list(layers) and not isinstance(layers, range) and len(layers) == 2 and all(map(is_whole, layers))
    if not fine or not 0 <= layers[0] < layers[1] <= count:
        raise OptionError(f"layers must be (start, stop) with 0 <= start < stop <= {count}, or None for all; got {shown(layers)}")
    return int(layers[0]), int(layers[1])


def patches_of(name: str, patches: Any, rows: int, cols: int) -> list[tuple[int, int]]:
    """Patches of a grid from (row, col) pairs in a list, a set or an array, or from a bool grid; in the order given.

    Raises OptionError for anything else, and for a patch outside the grid.
    """
    listed = patches.tolist() if hasattr(patches, "tolist") else patches
    if str(getattr(patches, "dtype", "")).endswith("bool"):
        if tuple(patches.shape) != (rows, cols):
            raise OptionError(f"{name} as a grid must be {rows}x{cols} bool, got shape {tuple(patches.shape)}")
        return [(row, col) for row in range(rows) for col in range(cols) if listed[row][col]]
    if not is_list(listed) and not isinstance(listed, (Set, Iterator)):
        raise OptionError(f"{name} must be a list of patches (row, col), or a bool grid of {rows}x{cols}; got {shown(patches)}")
    found = []
    for cell in listed:
        if not is_list(cell) or len(cell) != 2 or not all(map(is_whole, cell)):
            raise OptionError(f"{name}: a patch is (row, col), two whole numbers; got {shown(cell)}")
        if not (0 <= cell[0] < rows and 0 <= cell[1] < cols):
            raise OptionError(
                f"{name}: a patch is (row, col) with rows 0 to {rows - 1} and columns 0 to {cols - 1}, got {shown(cell)}"
            )
        found.append((int(cell[0]), int(cell[1])))
    return found


def array_of(name: str, value: Any, error: type[LabError] = OptionError) -> np.ndarray:
    """The values of an array, of a tensor wherever and however it is laid out, or of lists. Raises `error` for what has none."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu().resolve_conj().resolve_neg()
            if value.is_floating_point() and value.element_size() not in (4, 8):
                value = value.float()  # numpy knows no bfloat16
            value = value.numpy()
        return np.asarray(value)
    except Exception as reason:  # without values (meta), sparse, quantised, nested, of another library: each raises its own
        raise error(f"{name} has no plain values to read ({one_line(reason)}); give a numpy array") from None


def regular_file(path: str | os.PathLike, error: type[LabError] = DataError) -> Path:
    """`path` if it is a regular file, or a link to one: a pipe would wait for ever and a device has no end.

    Raises `error` for anything else that is there, FileNotFoundError where nothing is.
    """
    try:
        path = Path(path)
        mode = path.stat().st_mode
    except TypeError:
        raise error(f"expected the path of a file, got {shown(path)}") from None
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
    """The fingerprint of the weights that made `run`, if `lab` holds them. Raises CheckpointError, OptionError without a picture.

    `lab` is anything with a `name` and a `fingerprint`; where it can `check` a run, what a changed file says is refused too.
    """
    has_picture(run)
    weights: str = lab.fingerprint
    if run.fingerprint != weights:
        raise CheckpointError(f"expected a run made by {lab.name!r}, got one by {run.model!r} with other weights; ask again")
    if hasattr(lab, "check"):
        lab.check(run)
    return weights


def made_by(of: Any, began: float) -> dict[str, Any]:
    """What every result tells of its making: the model and the weights of a lab or a run, and the seconds since `began`."""
    name = of.name if hasattr(of, "name") else of.model
    return {"model": name, "fingerprint": of.fingerprint, "seconds": time.perf_counter() - began}


def has_picture(run: Run) -> None:
    """Raises OptionError for a question that was asked without a picture: nothing there has a place on one."""
    if not run.picture.size:
        raise OptionError("this question was asked without a picture, so there is no map to make of it; ask it with one")


def one_picture(run: Run) -> None:
    """Raises OptionError for a question without a picture, or about several: for what was made for one block of image tokens."""
    has_picture(run)
    if run.others:
        raise OptionError(
            f"this question is about {len(run.pictures)} pictures, and this was made for one picture; with several work methods "
            "whose METHODS[name].reach is 'tokens' or 'pixels', and faithfulness and compare with these"
        )


# -- cleaning up -------------------------------------------------------------------------


@dataclass
class _Step:
    """What one `undoing` has to undo, and whether that is done."""

    undo: Callable[[], Any]
    done: bool = False

    def run(self) -> None:
        if not self.done:
            self.undo()
            self.done = True


@contextmanager
def undoing(undo: Callable[[], Any]) -> Iterator[None]:
    """However the block is left, `undo` has run to its end: where an interrupt cuts it short, it runs anew before that goes on.

    Enter it before the first change, with an `undo` that may begin anew after any of its lines. An interrupt may also come
    between the block and this function, inside an ExitStack or contextlib; then the `entry` it is in undoes it (`settle`).
    """
    step, steps = _Step(undo), [] if _inside.steps is None else _inside.steps
    try:
        steps.append(step)
        try:
            yield
        finally:
            step.run()
    finally:
        while not step.done:
            try:
                step.run()
            except KeyboardInterrupt:  # the first one is on its way
                continue
        while steps and steps[-1].done:
            steps.pop()


def settle(steps: list[_Step], first: int = 0) -> None:
    """Undo what a block was left without undoing, the last first, and everything around it once more, in its order."""
    if not all(step.done for step in steps[first:]):
        for step in reversed(steps[first:]):
            step.undo()
            step.done = True
    del steps[first:]


class _Inside(threading.local):
    """How many entries this thread is in (only the outermost sets torch), and what the innermost has to undo."""

    depth = 0
    steps: list[_Step] | None = None


_inside = _Inside()


@contextmanager
def held(lock: Any) -> Iterator[None]:
    """Inside, this thread has `lock`, a `threading.RLock`; also an interrupt gives it back. Not to be entered again inside.

    ``with lock`` in a context manager of one's own does not: an interrupt inside contextlib leaves it closed to other threads.
    """

    def undo() -> None:
        with suppress(RuntimeError):  # this thread does not have it
            lock.release()

    with undoing(undo):
        lock.acquire()
        yield


@contextmanager
def reading(path: Path, mode: str = "rb", **how: Any) -> Iterator[Any]:
    """A file open to be read, closed when the block is left, also by an interrupt between any two lines.

    ``with path.open()`` leaves it then to Python, which closes it and warns of it.
    """
    files: list[Any] = []

    def undo() -> None:
        for file in files:
            file.close()

    with undoing(undo):
        files.append(path.open(mode, **how))
        yield files[0]


@contextmanager
def warnings_kept() -> Iterator[None]:
    """What Python warns of may be set inside the block; on leaving it is as the caller had it, also after an interrupt."""
    block, filters = warnings.catch_warnings(), warnings.filters

    def undo() -> None:
        if warnings.filters is not filters:
            # cut short on its way in, the block has changed the filters only, and puts them back first
            with suppress(AttributeError):
                block.__exit__(None, None, None)

    with undoing(undo):
        block.__enter__()
        yield


# -- one thread at a time on a model --------------------------------------------------------


@dataclass(frozen=True)
class _Holder:
    """Who has the turn on a model."""

    thread: int
    training: bool


class Turn:
    """Whose turn it is on one model. A thread that has it may enter again; the others wait, or are refused while it trains.

    Two threads on one model would meet each other's hooks, modes and connectors. Taken by every `entry` that is given a lab.
    It is an entry of a dictionary and not a lock, since a lock whose `with` is left by an interrupt stays closed for ever.
    """

    def __init__(self) -> None:
        self._now: dict[str, _Holder] = {}  # under "holder", and empty while it is nobody's turn

    @contextmanager
    def taken(self, *, training: bool = False) -> Iterator[None]:
        """Inside the block it is this thread's turn. Raises OptionError when another thread has it for a `training`."""
        thread = threading.get_ident()
        before = self._of(thread)
        wanted = _Holder(thread, training or (before is not None and before.training))

        def leave() -> None:
            if self._of(thread) is None:
                return  # a block entered earlier was left earlier too, and gave the turn away
            if before is None:
                del self._now["holder"]
            else:
                self._now["holder"] = before

        with undoing(leave):
            if before is not None:
                self._now["holder"] = wanted
            while (holder := self._now.setdefault("holder", wanted)) is not wanted:  # one step, whatever other threads do
                if holder.training:
                    raise OptionError(
                        "this model is being trained by another thread; wait for it to end, or load the model once more"
                    )
                time.sleep(TURN)
            yield

    def _of(self, thread: int) -> _Holder | None:
        holder = self._now.get("holder")
        return holder if holder is not None and holder.thread == thread else None


_turns: weakref.WeakKeyDictionary[Any, Turn] = weakref.WeakKeyDictionary()


def turn_of(model: Any) -> Turn:
    """The one `Turn` of a model, whatever labs share it."""
    return _turns.setdefault(model, Turn())


# -- what stands above every public function ------------------------------------------------


def entry(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Guard a public function; it keeps its name, signature and docstring.

    Inside, torch is as it is when nothing was set: a caller's ``inference_mode``, ``no_grad``, autocast, default type or
    default device changes no number, and after it they are as the caller had them, also after an interrupt. An exception of
    another library or of the system comes out as one line of ours, with the original behind it; our own bugs, Ctrl-C and
    errors in the caller's own code pass as they are (`foreign_line`).
    Arguments are checked by their annotations, as far as `EXPECTED` knows them, and an option given as None has its default.
    One that is missing, or has a name that is not ours, is told in one line; the names of other libraries are taken
    (`by_our_names`). Below ``@contextmanager`` only what stands before the ``yield`` is guarded: the block is the caller's.

    Given a lab, it waits for its turn on the model (`Turn`); a context manager keeps it to the end of the block.
    """
    name = function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")
    checked = _arguments_of(function, name)
    if inspect.isgeneratorfunction(inspect.unwrap(function)):
        opening = contextmanager(cast("Callable[Given, Iterator[Any]]", function))

        @functools.wraps(function)
        def opened(*args: Given.args, **options: Given.kwargs) -> Any:
            outer = _inside.steps
            steps: list[_Step] = []
            try:
                _inside.steps = steps
                with _turn(*args, *options.values()):
                    first = len(steps)
                    try:
                        with ExitStack() as block:
                            with _guard(name):
                                args, options = checked(args, options)
                                value = block.enter_context(opening(*args, **options))
                            _inside.steps = outer
                            yield value
                    finally:
                        settle(steps, first)
            finally:
                if _inside.steps is steps:
                    _inside.steps = outer
                settle(steps)

        return opened

    @functools.wraps(function)
    def guarded(*args: Given.args, **options: Given.kwargs) -> Answer:
        outer = _inside.steps
        steps: list[_Step] = []
        try:
            _inside.steps = steps
            with _turn(*args, *options.values()):
                first = len(steps)
                try:
                    with _guard(name):
                        args, options = checked(args, options)
                        return function(*args, **options)
                finally:
                    settle(steps, first)
        finally:
            _inside.steps = outer
            settle(steps)

    return guarded


@contextmanager
def _turn(*given: Any) -> Iterator[None]:
    """The turn on every lab among these; always in the same order, so that two threads do not wait for each other."""
    turns = {id(turn): turn for value in given if isinstance(turn := getattr(value, "turn", None), Turn)}
    with ExitStack() as stack:
        for key in sorted(turns):
            stack.enter_context(turns[key].taken())
        yield


@contextmanager
def _guard(name: str) -> Iterator[None]:
    depth = _inside.depth
    with undoing(lambda: setattr(_inside, "depth", depth)):
        _inside.depth = depth + 1
        try:
            if not depth and "torch" in sys.modules:
                with _plain_torch():
                    yield
            else:
                yield
        except LabError:
            raise
        except Exception as error:
            line = foreign_line(error)
            if line is None:
                raise
            raise LabError(f"{name}: {line}") from error


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Inside the block torch is as it is before anybody sets anything; on leaving, everything a caller may set is as it was.

    Read and set back here, because torch's own context managers put nothing back where an interrupt comes between the last
    line of their block and their exit.
    """
    import torch

    grad, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    lower = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in AUTOCAST]
    cached, nested = torch.is_autocast_cache_enabled(), _autocast_depth()
    recording = torch.inference_mode(False)
    inference = torch.is_inference_mode_enabled()

    def undo() -> None:
        if torch.is_inference_mode_enabled() != inference:
            recording.__exit__(None, None, None)
        while torch.get_default_device() != device:
            torch.device("cpu").__exit__(None, None, None)  # takes the uppermost off torch's stack, whichever it is
        while _autocast_depth() > nested:
            if not torch.autocast_decrement_nesting():
                torch.clear_autocast_cache()
        for kind, enabled, precision in lower:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, precision)
        torch.set_autocast_cache_enabled(cached)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)

    with undoing(undo):
        if inference:
            recording.__enter__()
        torch.set_grad_enabled(True)
        for kind in AUTOCAST:
            torch.set_autocast_enabled(kind, False)
        torch.set_default_dtype(torch.float32)
        if device.type != "cpu":
            torch.device("cpu").__enter__()
        yield


def _autocast_depth() -> int:
    """How many autocast blocks this thread is in: torch tells it only by counting up and down again."""
    import torch

    return min(torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())


# What an annotation says of a value, in words and as a test; a name counts before an annotation.
Kind = tuple[str, Callable[[Any], bool]]
# Results that are shown and judged: the class, what a saved file calls it, and what gives one.
GIVEN_BY = MappingProxyType(
    {
        "Ablation": ("connector ablation", "compare_connectors"),
        "Circuit": ("circuit", "circuit"),
        "Comparison": ("comparison", "compare"),
        "Faithfulness": ("faithfulness", "faithfulness"),
        "FlowSweep": ("flow sweep", "knockout_sweep"),
        "HeadMaps": ("head maps", "head_maps"),
        "Interchange": ("interchange", "interchange"),
        "Leaderboard": ("leaderboard", "leaderboard"),
        "LogitLens": ("logit lens", "logit_lens"),
        "NearestWords": ("nearest words", "nearest_words"),
        "PatchGrid": ("patch grid", "patch"),
        "Pruning": ("pruning", "prune_sweep"),
        "Sanity": ("sanity", "sanity"),
        "Sinks": ("sinks", "sinks"),
    }
)


def is_result(value: Any, saved_as: str) -> bool:
    """Whether it is a result of the kind that a saved file calls so, such as "run" or "flow sweep"."""
    return not isinstance(value, type) and getattr(value, "KIND", None) == saved_as


def _result_of(saved_as: str, maker: str) -> Kind:
    return f"a result of ll.{maker}", lambda value: is_result(value, saved_as)


def _are_axes(value: Any) -> bool:
    """Whether it is one Axes or an array or list of them, nested as ``pyplot.subplots`` gives them."""
    return all(map(_are_axes, value)) if is_list(value) else hasattr(value, "imshow") and hasattr(value, "figure")


def _is_range(value: Any) -> bool:
    return is_list(value) and len(value) == 2 and all(_is_real(as_python(end)) for end in value) and value[0] < value[1]


EXPECTED: Mapping[str, Kind] = MappingProxyType(
    {
        "lab": ("a loaded model (ll.load gives one)", lambda value: hasattr(value, "ask")),
        "Run": ("a run (lab.ask gives one)", lambda value: is_result(value, "run")),
        "Relevance": ("a map (ll.attribute gives one)", lambda value: is_result(value, "relevance")),
        "Linearized": (
            "a linear fit (ll.linearize gives one)",
            lambda value: hasattr(value, "weight") and hasattr(value, "full"),
        ),
        "TunedLens": ("a tuned lens (ll.train_lens gives one)", lambda value: hasattr(value, "biases")),
        "JacobianLens": ("a Jacobian lens (ll.fit_jacobian gives one)", lambda value: hasattr(value, "agreement")),
        "Scene": ("a scene of the picture book", lambda value: hasattr(value, "things")),
        **{name: _result_of(*given) for name, given in GIVEN_BY.items()},
        "PictureMap": ("the map of a picture (run.map is one)", lambda value: hasattr(value, "patch_box")),
        "Axes": ("Axes of matplotlib", lambda value: not is_list(value) and _are_axes(value)),
        "Sequence[Axes]": ("a list of Axes of matplotlib", _are_axes),
        "Scale": ("(lowest, highest), two finite numbers", _is_range),
        "np.ndarray": ("an array", lambda value: is_list(value)),
        "bool": ("True or False", lambda value: isinstance(value, (Integral, np.bool_)) and value in (0, 1)),
        "int": ("a whole number", lambda value: is_whole(value) and value < LARGEST),
        "float": ("a finite number", lambda value: _is_real(as_python(value))),
        "str": ("text", lambda value: isinstance(value, str) and is_text(value)),
        "os.PathLike": ("a path", lambda value: isinstance(value, os.PathLike) and is_text(str(value))),
        "Mapping": ("a dictionary", lambda value: isinstance(value, Mapping)),
        "Options": ("a dictionary", lambda value: isinstance(value, Mapping)),
        "dict": ("a dictionary", lambda value: isinstance(value, dict)),
        "torch.device": ("a torch.device", lambda value: type(value).__name__ == "device"),
        "torch.dtype": ("a torch.dtype", lambda value: type(value).__name__ == "dtype"),
        "Quantization": (
            "a configuration such as BitsAndBytesConfig(load_in_4bit=True), a dictionary",
            lambda value: hasattr(value, "quant_method") or isinstance(value, dict),
        ),
        "Callable": ("a function", callable),
        "None": ("None", lambda value: value is None),
    }
)
AT_LEAST = MappingProxyType({"seed": 0, "batch": 1, "per_picture": 1})  # whole numbers that mean the same everywhere
_INNER = re.compile(r"(Sequence|Mapping|Callable|dict)\[(.+)\]")


def is_text(value: str) -> bool:
    """Whether a tokenizer and a file can hold it: half a surrogate pair, as a cut-off answer leaves one, cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _arguments_of(function: Callable[..., Any], who: str) -> Callable[[Any, Any], Any]:
    """What checks a call's arguments and gives them back; None where a default stands becomes the default."""
    parameters = inspect.signature(function).parameters
    kinds = {name: kind for name, parameter in parameters.items() if (kind := _kind(name, str(parameter.annotation)))}
    defaults = {name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty}
    order = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    def checked(name: str, value: Any) -> Any:
        if name not in kinds:
            return value
        value = as_python(value)
        if kinds[name][1](value):
            return value
        if value is None and name in defaults:
            return defaults[name]
        more = _too_large(value) if "whole" in kinds[name][0] else ""
        raise OptionError(f"{name} must be {kinds[name][0]}{more}, got {shown(value)}")

    named = _names_of(parameters, who)

    def check(args: Any, options: Any) -> Any:
        return (
            (*map(checked, order, args), *args[len(order) :]),
            {name: checked(name, value) for name, value in named(args, options).items()},
        )

    return check


def _names_of(parameters: Mapping[str, inspect.Parameter], who: str) -> Callable[[Any, Any], dict[str, Any]]:
    """What checks that a call gives each argument once and no other, and gives its options back by our names."""
    every = list(parameters.values())
    kinds = {parameter.kind for parameter in every}
    order = [parameter.name for parameter in every if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    itself = order[:1] == ["self"]
    by_name = [*order[itself:], *(parameter.name for parameter in every if parameter.kind is parameter.KEYWORD_ONLY)]
    ours = {name: name for name in by_name}
    needed = [name for name in by_name if parameters[name].default is inspect.Parameter.empty]

    def named(args: Any, options: Any) -> dict[str, Any]:
        placed = order[: len(args)]
        found = by_our_names(who, options, ours, before=placed, more=inspect.Parameter.VAR_KEYWORD in kinds)
        if twice := [name for name in placed if name in found]:
            raise OptionError(f"{who} was given {twice[0]} twice: by its place and as {twice[0]}=...; leave one out")
        if missing := [name for name in needed if name not in placed and name not in found]:
            others = ", ".join(name for name in found if name not in ours)
            got = f", got {others}" if others else ""
            raise OptionError(f"{who} needs {' and '.join(missing)}{got}; it is called as {who}({', '.join(needed)}, ...)")
        if len(args) > len(order) and inspect.Parameter.VAR_POSITIONAL not in kinds:
            rest = ", ".join(f"{name}=..." for name in by_name[len(order) - itself :]) or "nothing more"
            raise OptionError(
                f"{who} takes {', '.join(order[itself:]) or 'nothing'} by place and the rest by name, {rest}; "
                f"got {len(args) - itself} values without a name"
            )
        return found

    return named


def _kind(name: str, annotation: str) -> Kind | None:
    """What a parameter takes; None where its annotation has a part that is not known here."""
    if name in EXPECTED:
        return EXPECTED[name]
    kinds = [_one_kind(part, name) for part in re.split(r" \| (?![^\[]*\])", annotation)]
    if not all(kinds):
        return None
    words, tests = zip(*(kind for kind in kinds if kind), strict=True)
    return " or ".join(dict.fromkeys(words)), lambda value: any(test(value) for test in tests)


def _one_kind(part: str, name: str) -> Kind | None:
    if part == "int" and name in AT_LEAST:
        words, test = EXPECTED["int"]
        return f"{words} of at least {AT_LEAST[name]}", lambda value: test(value) and value >= AT_LEAST[name]
    if part in EXPECTED:
        return EXPECTED[part]
    holder, inner = match.groups() if (match := _INNER.fullmatch(part)) else ("", "")
    if holder == "Callable" and inner.startswith("["):
        return _function_of(inner[1:].partition("]")[0])
    if holder in ("Mapping", "dict"):
        words, fits = EXPECTED[holder]
        kind = _kind("", inner.partition(", ")[2])
        return (words, fits) if kind is None else _each_of(words, fits, kind)
    if holder != "Sequence":
        return EXPECTED.get(holder)
    if name == "pictures":
        return "a list of pictures", is_list
    if (kind := _kind("", inner)) is None:
        return None
    each, fits = kind
    return f"a list, each {each}", lambda value: is_list(value) and all(map(fits, value))


def _each_of(words: str, is_dictionary: Callable[[Any], bool], of: Kind) -> Kind:
    each, fits = of
    return f"{words}, each value {each}", lambda value: is_dictionary(value) and all(map(fits, value.values()))


def _function_of(arguments: str) -> Kind:
    """A function that can be called with these, as ``int, Tensor``; one that does not say what it takes is taken."""

    def takes(value: Any) -> bool:
        try:
            inspect.signature(value).bind(*filter(None, arguments.split(", ")))
        except TypeError:  # also of what is no function
            return False
        except ValueError:
            return callable(value)
        return True

    return f"a function that is called with ({arguments})", takes


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list, a tuple, an array or the like, and neither text nor a dictionary."""
    holds = hasattr(value, "__len__") and hasattr(value, "__getitem__") and getattr(value, "ndim", 1) > 0
    return holds and not isinstance(value, (str, bytes, Mapping))


def shown(value: Any) -> str:
    """A value in a message, on at most some 100 signs: what is short to write as it is written, else its type."""
    plain = isinstance(value, (str, bytes, Real, tuple, list, dict, type(None), type(Ellipsis)))
    text = str(value) if isinstance(value, os.PathLike) else repr(value) if plain else type(value).__name__
    return text if len(text) <= 160 else f"{text[:80]} ... {text[-20:]}"


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


# -- exercises of the lessons -----------------------------------------------------------------


@entry
def check_answer(check: Callable[..., str], *answer: Any) -> str:
    """What an exercise's check says of a reader's answer: its praise, or a hint in one line, never a traceback.

    `check` is called with `answer`; the message of its first failed ``assert`` is the hint. An answer that cannot be used
    at all (a wrong type, an error in the reader's own function) is told in the same way.

    >>> def check_patches(count):
    ...     assert count != 12, "that is one side"
    ...     return "Yes."
    >>> ll.check_answer(check_patches, 12)
    'Not yet: that is one side'
    """
    try:
        return check(*answer)
    except AssertionError as error:
        hint = str(error).partition("\n")[0].removeprefix("not yet: ")
        return f"Not yet: {hint or 'the answer does not hold'}"
    except Exception as error:  # the reader's own code, or a value of another kind than asked for
        return f"Not yet: with this answer the check stopped at {one_line(error)}"
