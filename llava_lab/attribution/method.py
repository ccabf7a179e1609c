"""What every attribution method has in common: its card, its options with their checks, its answer.

A method is one function. What its numbers mean stands in `@method` above it, and its options are its keyword-only
arguments: the default is the argument's, the annotation says which values are fine. `attribute` checks them all before
the function starts, and refuses what the card says the method cannot do.

    @method(truth="...", source="...", cost="1 forward", blind_to="...")
    def brightness(lab: Lab, run: Run, targets: Targets, *, power: Count = 1, fusion: Fusion = "mean") -> Maps:
        ...

Nothing here runs a model.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np

from llava_lab.checks import as_python, number, one_of, whole_number
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models import layout
from llava_lab.options import by_our_names
from llava_lab.replay.fills import EVERY_FILL, FILLS, SQUARES
from llava_lab.replay.targets import Targets
from llava_lab.results import Run

Check = Callable[[str, Any], Any]  # (name of the option, value) -> the value; raises OptionError
Needs = Literal["gradients", "plain weights", "tower attention"]
Reach = Literal["pixels", "tokens", "inside"]


@dataclass(frozen=True)
class AtLeast:
    """Marks a number: ``Annotated[int, at_least(1)]`` is a whole one, ``Annotated[float, at_least(0)]`` any."""

    least: float


at_least = AtLeast


@dataclass(frozen=True)
class FillOf:
    """Marks the option that says what is put where something is hidden."""

    choices: tuple[str | None, ...]

    def __call__(self, name: str, value: Any) -> Any:
        return one_of(name, value, self.choices)


# How options are annotated.
Count = Annotated[int, at_least(1)]
Seed = Annotated[int, at_least(0)]
Fusion = Literal["mean", "max", "min"]  # over heads
Fill = Annotated[str, FillOf(EVERY_FILL)]
SquareFill = Annotated[str, FillOf(SQUARES)]  # one square, whatever is hidden
PlainFill = Annotated[str, FillOf(FILLS)]
Window = Sequence[int] | None  # layers (start, stop); checked against the model by `layer_window`
Heads = int | Sequence[Any] | None  # checked against the model by `choose_heads`
At = Literal["pixels", "vision", "projector"]  # where something is hidden
Scored = Literal["logodds", "logprob"]  # what a perturbation changes; `replay.score` says what they are


@dataclass(frozen=True)
class Maps:
    """What a method gives: one map per target, and what to know before reading them."""

    values: np.ndarray  # float32 (targets, rows, cols)
    passes: dict[str, int]  # {"forward": n, "backward": m}, one picture through the model counted once
    notes: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)  # JSON-able
    views: tuple[np.ndarray, ...] = ()  # float32 (targets, rows, cols) of each of the run's views, where it has several
    interrupted: bool = False  # Ctrl-C ended the work early: what is here is what was done until then


@dataclass(frozen=True)
class Method:
    """One way to say which patches mattered, and what it does not say."""

    name: str
    truth: str  # what the number is, in one sentence
    source: str
    cost: str  # in passes through the model
    blind_to: str  # what it cannot see
    function: Callable[..., Maps]  # (lab, run, targets, *, options)
    options: Mapping[str, Any]  # name -> default
    checks: Mapping[str, Check]  # of those options whose values need no model to be checked
    needs: Needs | None = None  # what the model must have
    # "pixels" also works on closed models, tiles and several pictures, "tokens" on the latter two, "inside" on none of these
    reach: Reach = "inside"
    contrast: bool = True  # whether it can tell two words apart that are predicted at one position
    control: bool = False  # a map to compare with, not an explanation
    equation: str = ""  # LaTeX; the symbols are those of lesson 02. Controls have none
    paper: str = ""  # its address
    economy: Mapping[str, Any] = field(default_factory=dict)  # cheaper options, where a map is one of hundreds
    mass: Mapping[str, Any] | None = None  # options under which its `mass` by segment is a share to be read; None: it has none
    streams: Mapping[str, Any] | None = None  # options that must keep this value to be made while answering; None: it cannot

    @property
    def link(self) -> str:
        """The name in Markdown, linked to the paper where there is one."""
        return f"[`{self.name}`]({self.paper})" if self.paper else f"`{self.name}`"

    @property
    def fill_options(self) -> tuple[str, ...]:
        """The options that say what is put where something is hidden."""
        return tuple(name for name, check in self.checks.items() if isinstance(check, FillOf))

    def with_defaults(self, given: Mapping[str, Any], beside: Sequence[str] = ()) -> dict[str, Any]:
        """`given`, checked, and filled up with the defaults. Raises OptionError on what is not known.

        `beside`: names that stand beside the options where they are given, and may have been misspelt.

        None stands for the default of a number that cannot be None; what an option takes as None, such as no filter, stays.
        """
        ours = {name: f"{name}={default!r}" for name, default in self.options.items()}
        given = by_our_names(f"method {self.name!r}", given, ours, beside=beside)
        given = {name: as_python(value) for name, value in given.items()}
        every = {**self.options, **{name: value for name, value in given.items() if not self._left_open(name, value)}}
        return {name: self.checks[name](name, value) if name in self.checks else value for name, value in every.items()}

    def _left_open(self, name: str, value: Any) -> bool:
        if value is not None or name not in self.checks or name in self.fill_options:
            return False
        try:
            self.checks[name](name, None)
        except OptionError:
            return True
        return False

    def refuse(self, lab: Any, targets: Targets) -> None:
        """Raise OptionError where the weights lack what the method needs, TargetError on a contrast it cannot tell."""
        of_weights = self.needs in ("gradients", "plain weights")
        packed = of_weights and layout.is_quantized(lab.model)
        if packed or (of_weights and layout.is_offloaded(lab.model)):
            has = "weights packed into 8 or 4 bits" if packed else "weights that wait off the device (device_map)"
            mend = "without quantization" if packed else "on a device that holds it whole"
            raise OptionError(
                f"method {self.name!r} needs {self.needs}, and {lab.name!r} has {has}; load it {mend}, or use method='occlusion'"
            )
        if self.needs == "tower attention":
            layout.require_tower_attention(lab.model, f"method {self.name!r}")
        if not self.contrast:
            refuse_contrast(self.name, targets)

    def compute(self, lab: Any, run: Run, targets: Targets, options: Mapping[str, Any]) -> Maps:
        """The maps of `targets` under `options`, everything checked first."""
        chosen = self.with_defaults(options)
        self.refuse(lab, targets)
        return self.function(lab, run, targets, **chosen)


REGISTERED: dict[str, Method] = {}  # every method whose file was imported; read it as `METHODS`


def method(
    *,
    truth: str,
    source: str,
    cost: str,
    blind_to: str,
    needs: Needs | None = None,
    reach: Reach = "inside",
    contrast: bool = True,
    control: bool = False,
    equation: str = "",
    paper: str = "",
    economy: Mapping[str, Any] | None = None,
    mass: Mapping[str, Any] | None = None,
    streams: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Maps]], Callable[..., Maps]]:
    """Make a function ``(lab, run, targets, *, options) -> Maps`` an attribution method of its own name; see `Method`."""

    def register(function: Callable[..., Maps]) -> Callable[..., Maps]:
        options, checks = _options_of(function)
        entry = Method(
            name=function.__name__,
            truth=truth,
            source=source,
            cost=cost,
            blind_to=blind_to,
            function=function,
            options=MappingProxyType(options),
            checks=MappingProxyType(checks),
            needs=needs,
            reach=reach,
            contrast=contrast,
            control=control,
            equation=equation,
            paper=paper,
            economy=MappingProxyType(dict(economy or {})),
            mass=mass,
            streams=streams,
        )
        REGISTERED[entry.name] = entry
        return function

    return register


def refuse_contrast(name: str, targets: Targets) -> None:
    """Attention at a position is the same whatever word is predicted there, so it cannot tell two words apart."""
    for target in targets:
        if target.kind == "contrast":
            raise TargetError(
                f"method {name!r} cannot tell {target.text!r}: attention is the same for every word predicted at a "
                "position; use method='occlusion' for a contrast, or explain the word alone"
            )


def captum_for(name: str) -> Any:
    """captum's attribution methods; imported where they are used, because it takes two seconds."""
    try:
        import captum.attr
    except ImportError:
        raise LabError(f"method {name!r} needs captum, which is not installed; `pip install captum` brings it") from None
    return captum.attr


def _options_of(function: Callable[..., Maps]) -> tuple[dict[str, Any], dict[str, Check]]:
    """Defaults and checks of a function's keyword-only arguments."""
    inner = inspect.unwrap(function)
    options: dict[str, Any] = {}
    checks: dict[str, Check] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.default is parameter.empty:
            raise TypeError(f"option {name!r} of method {function.__name__!r} needs a default")
        options[name] = parameter.default
        hint = parameter.annotation
        if isinstance(hint, str):
            hint = eval(hint, inner.__globals__)  # the annotation as written: `from __future__ import annotations` makes it text
        check = _check_of(hint, parameter.default)
        if check is not None:
            checks[name] = check
    return options, checks


def _check_of(hint: Any, default: Any) -> Check | None:
    """What an annotation says of a value; None where it says nothing that can be checked without a model."""
    if hint is bool:
        return lambda name, value: one_of(name, value, (default, not default))
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return lambda name, value: one_of(name, value, parts)
    if origin in (Union, types.UnionType) and type(None) in parts:
        rest = [_check_of(part, default) for part in parts if part is not type(None)]
        if len(rest) == 1 and rest[0] is not None:
            inner = rest[0]
            return lambda name, value: None if value is None else inner(name, value)
    if origin is Annotated:
        marker = parts[1]
        if isinstance(marker, AtLeast):
            if parts[0] is int:
                return lambda name, value: whole_number(name, value, least=int(marker.least))
            return lambda name, value: number(name, value, least=marker.least)
        return marker
    return None
