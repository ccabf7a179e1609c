"""What stands above every public function: the caller's torch settings stay out, other libraries' exceptions stay in, threads
take turns."""

from __future__ import annotations

import contextlib
import enum
import gc
import inspect
import io
import itertools
import json
import random
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image, ImageFile

import llava_lab as ll
from llava_lab.capture import hooked, undisturbed
from llava_lab.capture.watch import random_states_kept
from llava_lab.checks import (
    Turn,
    array_of,
    as_python,
    entry,
    is_text,
    known,
    layer_window,
    number,
    one_of,
    patches_of,
    reading,
    whole_number,
)
from llava_lab.errors import LabError, OptionError, PictureError, WriteError
from llava_lab.models import pictures
from llava_lab.models.pictures import read_picture
from llava_lab.training import LLAVA_15_7B, Running
from tests.support.defaults import PROMISED, defaults
from tests.support.families import family
from tests.support.leftovers import PACKAGE, interrupted_at, state_of, torch_settings
from tests.support.public_calls import LONG, WRONG, public_calls
from tests.support.training_rows import write_rows
from widgets import LossPlot

THERE = {"torch": torch, "np": np, "Image": Image, "io": io, "json": json, "zlib": zlib, "jinja2": jinja2, "Path": Path}
THERE |= {"tokenizers": tokenizers}


def inside(expression: str) -> Callable[..., Any]:
    """A function that stands in llava_lab and does `expression`."""
    look = eval(f"lambda given=None: {expression}", {**THERE, "__name__": "llava_lab.look"})
    look.__name__ = look.__qualname__ = "look"
    return entry(look)


@contextmanager
def another_default_type() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default type": another_default_type,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@family("method", ["relevancy", "gradient_input", "gradcam", "rollout", "occlusion"], quick=("relevancy", "occlusion"))
def test_a_caller_s_torch_settings_change_no_bit(tiny_random: Any, picture: np.ndarray, method: str, setting: str) -> None:
    plain = tiny_random.ask(picture, "What is it?", max_new_tokens=3)
    with SETTINGS[setting]():
        before = torch_settings()
        run = tiny_random.ask(picture, "What is it?", max_new_tokens=3)
        values = ll.attribute(tiny_random, run, method=method).values
        assert torch_settings() == before
    assert run.logprobs.tobytes() == plain.logprobs.tobytes()
    assert values.tobytes() == ll.attribute(tiny_random, plain, method=method).values.tobytes()


@pytest.mark.parametrize("caller", ["nothing", *SETTINGS])
@pytest.mark.parametrize("left", SETTINGS)
def test_what_an_interrupted_block_leaves_set_is_as_the_caller_had_it(caller: str, left: str) -> None:
    """Torch's own context managers are left by hand here, as where an interrupt comes just before their exit."""

    def cut_short() -> None:
        torch.set_default_dtype(torch.float64) if left == "default type" else SETTINGS[left]().__enter__()
        raise KeyboardInterrupt

    with SETTINGS[caller]() if caller in SETTINGS else nullcontext():
        before = torch_settings()
        with pytest.raises(KeyboardInterrupt):
            entry(cut_short)()
        assert torch_settings() == before
        assert entry(lambda: (torch.is_grad_enabled(), torch.zeros(1).dtype))() == (True, torch.float32)


@family("caller", ["nothing", *SETTINGS], quick=("nothing", "inference_mode"))
def test_an_interrupt_at_any_line_of_the_guard_leaves_settings_states_and_the_turn(caller: str) -> None:
    lab = SimpleNamespace(model=torch.nn.Dropout(), turn=Turn(), ask=None)

    def look(lab: Any) -> None:
        with undisturbed(lab.model):
            assert not torch.is_grad_enabled()

    guarded = entry(look)
    with SETTINGS[caller]() if caller in SETTINGS else nullcontext():
        with interrupted_at(0) as count:
            guarded(lab)
        before, lines = torch_settings(), count[0]
        states = torch.get_rng_state(), random.getstate()
        for line in range(1, lines + 1):
            with pytest.raises(KeyboardInterrupt), interrupted_at(line):
                guarded(lab)
            assert torch_settings() == before, f"line {line} of {lines}"
            assert lab.model.training
            with ThreadPoolExecutor(1) as pool:  # another thread finds the model free
                assert pool.submit(lambda: guarded(lab)).result(10) is None
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
    assert lines > 50


def _cut_short(call: Callable[[], Any], line: int) -> KeyboardInterrupt | None:
    """What Ctrl-C at a line of contextlib raises, with all its frames."""
    try:
        with interrupted_at(line, contextlib.__file__):
            call()
    except KeyboardInterrupt as error:
        return error
    return None


def test_an_interrupt_inside_python_s_own_stack_of_blocks_leaves_no_hook_and_no_turn() -> None:
    """Every line of contextlib, where a block's exit may be lost; the exception is held, as a notebook's is, so nothing is freed.

    Only of a block that the caller opened do some lines stand between Python's `with` and anything of ours: two at its exit.
    """
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    lab = SimpleNamespace(model=model, turn=Turn(), ask=None)

    def block(lab: Any) -> Iterator[None]:
        with undisturbed(lab.model), ExitStack() as stack:
            for part in lab.model:
                stack.enter_context(hooked(part, before=lambda *given: None))
                stack.enter_context(random_states_kept())
            random.random()
            yield

    def look(lab: Any) -> None:
        with contextmanager(block)(lab):
            random.random()

    def opened(lab: Any) -> None:
        with contextmanager(entry(block))(lab):
            random.random()

    def hooks() -> list[int]:
        return [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]

    gc.collect()
    gc.disable()  # a circle freed under the tracing would swallow the interrupt
    state, lost = random.getstate(), {}
    for call in (entry(look), opened):
        with interrupted_at(0, contextlib.__file__) as count:
            call(lab)
        lost[call.__name__] = 0
        for line in range(1, count[0] + 1):
            held = _cut_short(partial(call, lab), line)
            assert held is not None
            lost[call.__name__] += any(hooks())
            held = held if call is not opened else None  # frees what a block of the caller's held
            now = (hooks(), random.getstate() == state, torch.is_grad_enabled(), model.training, lab.turn._now)
            assert now == ([0, 0, 0], True, True, True, {}), f"{call.__name__}, line {line} of {count[0]}: {held!r}"
        assert count[0] > 100
    gc.enable()
    assert lost["look"] == 0
    assert lost["opened"] <= 4, lost


def test_an_interrupt_at_any_line_leaves_what_python_warns_of_and_how_pictures_are_read() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    read = entry(lambda: read_picture(buffer.getvalue()))
    files = (*(module.__file__ or "" for module in (contextlib, warnings)), PACKAGE)
    with interrupted_at(0, *files) as count:
        read()
    before = (warnings.filters, list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES)
    for line in range(1, count[0] + 1):
        with pytest.raises(KeyboardInterrupt) as error, interrupted_at(line, *files):
            read()
        now = (warnings.filters, list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES)
        assert now[0] is before[0], f"line {line} of {count[0]}: {error.value!r}"
        assert now == before
        with ThreadPoolExecutor(1) as other:  # no lock stays closed to another thread
            assert other.submit(pictures._DECODING.acquire, timeout=5).result(), f"line {line} of {count[0]}: {error.value!r}"
            other.submit(pictures._DECODING.release).result()
    assert count[0] > 50


def test_an_interrupt_at_any_line_closes_a_file_that_is_read(tmp_path: Path) -> None:
    opened: list[Any] = []

    class Noted(type(tmp_path)):  # type: ignore[misc]
        def open(self, *args: Any, **how: Any) -> Any:
            opened.append(super().open(*args, **how))
            return opened[-1]

    path = Noted(tmp_path / "words.txt")
    path.write_text("car", "utf-8")

    def look() -> str:
        with reading(path, "r", encoding="utf-8") as file:
            return str(file.read())

    files = (contextlib.__file__, PACKAGE)
    with interrupted_at(0, *files) as count:
        assert entry(look)() == "car"
    for line in range(1, count[0]):  # the last one is outside
        with suppress(KeyboardInterrupt), interrupted_at(line, *files):
            entry(look)()
        assert [file for file in opened if not file.closed] == [], f"line {line} of {count[0]}"
    assert count[0] > 30
    assert len(opened) > 10


FOREIGN = {
    "a picture that is none": "Image.open(io.BytesIO(b'GIF89a'))",
    "no such file": "open('/not/here')",
    "a folder read as a file": "Path('/').read_text()",
    "a null byte in a path": "Path('a\\0b').stat()",
    "broken JSON": "json.loads('{')",
    "half a surrogate": "'\\ud800'.encode()",
    "a broken template": "jinja2.Template('{% if %}')",
    "a template that asks for what is not there": "jinja2.Template('{{ a.b.c }}').render()",
    "a tokenizer that is none": "tokenizers.Tokenizer.from_str('{')",
    "shapes that do not fit": "torch.zeros(2, 3) @ torch.zeros(2, 3)",
    "an array of rows of two lengths": "np.array([[1], [2, 3]])",
    "no number": "int('three')",
    "damaged bytes": "zlib.decompress(b'abc')",
    "an array that ends early": "np.load(io.BytesIO(b'\\x93NUMPY'))",
}
OURS = {
    "an assertion": ("given.missing", AttributeError),
    "a wrong type": ("len(given)", TypeError),
    "a name": ("missing", NameError),
    "a key": ("{}[given]", KeyError),
    "a type inside a library": ("torch.zeros('a')", TypeError),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_another_library_s_exception_is_one_line_with_its_cause(what: str) -> None:
    with pytest.raises(LabError, match=r"^look: ") as error:
        inside(FOREIGN[what])()
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("what", OURS)
def test_a_bug_of_ours_stays_what_it_is(what: str) -> None:
    expression, kind = OURS[what]
    with pytest.raises(kind):
        inside(expression)()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), BrokenPipeError(), LabError("said"), ValueError("mine")])
def test_what_is_the_caller_s_passes(error: BaseException) -> None:
    def callback() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        inside("given()")(callback)
    assert raised.value is error


def test_a_block_is_the_caller_s_and_what_opens_it_is_guarded() -> None:
    steps: list[str] = []

    def block(path: str) -> Iterator[bool]:
        with open(path, "rb"):
            yield torch.is_grad_enabled()
        steps.append("closed")

    ours = FunctionType(block.__code__, {**THERE, "__name__": "llava_lab.look"}, "block", closure=block.__closure__)
    opened = contextmanager(entry(ours))
    with pytest.raises(LabError, match=r"^block: cannot read or write /not/here"), opened("/not/here"):
        steps.append("never")
    with torch.no_grad(), opened(__file__) as grad:
        assert grad
        assert not torch.is_grad_enabled()
    assert steps == ["closed"]
    with pytest.raises(RuntimeError, match="mine"), opened(__file__):
        raise RuntimeError("mine")


ENTRIES = [name for name in ll.__all__ if inspect.isfunction(getattr(ll, name))]


def test_every_public_function_is_an_entry() -> None:
    code = {guarded.__code__ for guarded in (entry(lambda: None), entry(_nothing))}
    bare = [name for name in ENTRIES if _until_entry(getattr(ll, name), code) is None]
    assert bare == [], "put @entry above them (below @contextmanager)"


def _nothing() -> Iterator[None]:
    yield


def _until_entry(function: Any, code: set[Any]) -> Any:
    while function is not None and function.__code__ not in code:
        function = getattr(function, "__wrapped__", None)
    return function


@pytest.fixture(scope="module")
def calls(tiny_random: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return public_calls(tiny_random, tmp_path_factory.mktemp("calls"))


SPOILT = [*ENTRIES, "Lab.ask", "Lab.sequence", "Lab.inputs", "Lab.swap"]
ON_A_LAB = [name for name in SPOILT if name.startswith("Lab.") or "lab" in inspect.signature(getattr(ll, name)).parameters]
# what the quick call leaves at a refusal, for the wrong values' sake
REAL: dict[str, dict[str, Any]] = {
    "leaderboard": {"data": "picturebook", "n": 1},
    "linear_effect": {"data": "picturebook", "n": 1},
    "positive_control": {"n": 1},
    "prune_sweep": {"n": 1},
    "sanity": {"groups": 1},
    "train_stage": {"stage": "align", "steps": 1, "running": Running(progress=False)},
}

# what reads, changes, trains, or opens a block: interrupted in every suite; the others with the long tests alone
OFTEN = ("Lab.ask", "Lab.swap", "attribute", "logit_lens", "knockout", "patch", "linear_probe", "train_stage")
OFTEN += ("knocked_out", "ablated", "steered", "erased", "connector")


def _called(lab: Any, name: str, call: dict[str, Any], asked: dict[str, Any], place: Path) -> Any:
    """What a public call gives; of a block, what the model answers inside."""
    places = {option: place for option in ("out", "folder") if isinstance(call.get(option), str)}
    opened = (getattr(lab, name[4:]) if name.startswith("Lab.") else getattr(ll, name))(**{**call, **places})
    if not isinstance(opened, AbstractContextManager) or isinstance(opened, Path):
        return opened
    with opened:
        return lab.ask(**{**asked, "max_new_tokens": 1})


def _interrupted(lab: Any, name: str, calls: dict[str, dict[str, Any]], folder: Path, lines: int) -> None:
    """A public call cut short at random lines, the same in every run: the lab and all that torch holds are as before."""
    call = {**calls[name], **REAL.get(name, {})}
    rng, before = random.Random(name), state_of(lab)
    weights = {key: value.clone() for key, value in lab.model.state_dict().items()}

    def work(attempt: int) -> None:
        _called(lab, name, call, calls["Lab.ask"], folder / f"{attempt}")

    with suppress(LabError), interrupted_at(0) as count:
        work(0)
    lab.model.load_state_dict(weights)  # a training was whole this once
    for attempt, line in enumerate(sorted(rng.randint(1, count[0]) for _ in range(lines)), 1):
        with suppress(KeyboardInterrupt, LabError), interrupted_at(line):
            work(attempt)
        if name == "train_stage":  # the part that trains is what it is when the interrupt comes
            trained = {key: value for key, value in weights.items() if "multi_modal_projector" in key}
            lab.model.load_state_dict({**lab.model.state_dict(), **trained})
        now = state_of(lab)
        assert [key for key in before if now[key] != before[key]] == [], f"{name} interrupted at line {line} of {count[0]}"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        *((name, 2) for name in OFTEN),  # the same two lines are among the fifty
        *(pytest.param(name, 50, marks=pytest.mark.long) for name in ON_A_LAB),
    ],
)
def test_a_call_interrupted_at_random_lines_leaves_everything_as_it_was(
    tiny_random: Any, calls: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lines: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["llava_lab.interventions.ablate"], "exact_match", lambda *given: True)
    _interrupted(tiny_random, name, calls, tmp_path, lines=lines)


STRIDE = 13  # not a divisor of the wrong values' number, so that every one of them comes to some argument of some entry


def _spoilt(lab: Any, name: str, call: dict[str, Any], places: slice) -> list[str]:
    """Wrong values for the arguments of an entry, one at a time: what neither is taken nor refused in one line."""
    function = getattr(lab, name[4:]) if name.startswith("Lab.") else getattr(ll, name)
    before, faults = state_of(lab), []
    for option, (what, wrong) in list(itertools.product(call, WRONG.items()))[places]:
        if option in LONG and what in ("a large number", "None"):
            continue
        try:
            opened = function(**{**call, option: wrong})
            if isinstance(opened, AbstractContextManager) and not isinstance(opened, Path):  # a path is one too
                with opened:
                    pass
        except LabError as error:
            if "\n" in str(error) or len(str(error)) > 1000 or not is_text(str(error)):
                faults.append(f"{option}={what}: {str(error)[:200]!r}")
        except Exception as error:
            faults.append(f"{option}={what}: {type(error).__name__}: {error}"[:200])
    assert state_of(lab) == before
    return faults


@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_argument_is_refused_in_one_line_or_taken(
    tiny_random: Any, calls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A few of the wrong values for every argument of every entry, others for each."""
    monkeypatch.chdir(tmp_path)
    faults = _spoilt(tiny_random, name, calls[name], slice(len(name) % STRIDE, None, STRIDE))
    assert faults == [], "\n".join(faults)


@pytest.mark.long
@pytest.mark.parametrize("name", SPOILT)
def test_every_wrong_argument_is_refused_in_one_line_or_taken(
    tiny_random: Any, calls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Twenty wrong values for every argument of every entry: one line, or an answer where the value is none of the wrong."""
    monkeypatch.chdir(tmp_path)
    faults = _spoilt(tiny_random, name, calls[name], slice(None))
    assert faults == [], "\n".join(faults)


def test_every_default_is_the_promised_one() -> None:
    """Of public functions and commands; what each method's are is written in `tests/attribution/test_registry.py`."""
    promised, now = json.loads(PROMISED.read_text("utf-8")), defaults()
    changed = [name for name in promised if now.get(name) != promised[name]]
    assert changed + [name for name in now if name not in promised] == [], "is it meant? python -m tests.support.defaults"


def test_every_entry_has_a_call_that_works_to_be_spoilt(calls: dict[str, Any]) -> None:
    assert [name for name in ENTRIES if name not in calls] == []
    for name in ENTRIES:
        parameters = inspect.signature(getattr(ll, name)).parameters
        many = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = [parameter.name for parameter in parameters.values() if parameter.kind not in many]
        assert [option for option in named if option not in calls[name] and option != "recipe"] == [], name


# -- values of other libraries' kinds ---------------------------------------------------------


class Sizes(enum.IntEnum):
    ONE = 1
    TWO = 2


class Fits(enum.StrEnum):
    PAD = "pad"


PLAIN: dict[str, tuple[Any, Any]] = {
    "a whole number of numpy's": (np.uint8(3), 3),
    "an array of one value": (np.array(3), 3),
    "a tensor of one value": (torch.tensor(3), 3),
    "a bfloat16 of torch's": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "a float of numpy's": (np.float32(0.5), 0.5),
    "a long float": (np.longdouble(0.5), 0.5),
    "a Fraction": (Fraction(1, 2), 0.5),
    "a member of an IntEnum": (Sizes.TWO, 2),
    "a member of a StrEnum": (Fits.PAD, "pad"),
    "text of numpy's": (np.str_("pad"), "pad"),
    "an array of one text": (np.array("pad"), "pad"),
    "True of numpy's": (np.True_, True),
    "True of torch's": (torch.tensor(True), True),
    "minus zero": (np.float32(-0.0), -0.0),
    "a whole number without end": (10**400, 10**400),
}
AS_THEY_ARE: list[Any] = [None, 3, 0.5, "pad", True, b"x", (1, 2), Path("a"), Decimal(1), 3j, object(), str]


@pytest.mark.parametrize("what", PLAIN)
def test_a_number_or_text_of_a_class_of_its_own_becomes_python_s(what: str) -> None:
    given, wanted = PLAIN[what]
    got = as_python(given)
    assert (got, type(got)) == (wanted, type(wanted))


@pytest.mark.parametrize("value", AS_THEY_ARE)
def test_anything_else_is_left_as_it_is(value: Any) -> None:
    assert as_python(value) is value


@pytest.mark.parametrize("value", [np.int8(2), np.array(2), torch.tensor(2), Sizes.TWO, 2])
def test_a_whole_number_of_any_kind_is_taken(value: Any) -> None:
    assert type(whole_number("k", value)) is int
    assert type(number("k", value)) is float
    assert one_of("k", value, (1, 2)) == 2


WRONG_NUMBERS = [
    True,
    np.True_,
    10**400,
    -(10**400),
    float("nan"),
    float("inf"),
    Decimal(1),
    1j,
    "1",
    b"1",
    [1],
    np.ones(2),
    None,
]


@pytest.mark.parametrize("value", [*WRONG_NUMBERS, torch.ones(2)])
def test_what_is_no_finite_number_is_refused_in_a_short_line(value: Any) -> None:
    for check in (whole_number, number):
        with pytest.raises(OptionError, match="^k must be a (whole )?number of at least 0.*, got ") as error:
            check("k", value)
        assert len(str(error.value)) < 200


def test_a_number_of_an_entry_is_finite() -> None:
    @entry
    def look(share: float) -> float:
        return share

    numbers: list[Any] = [1, 0.5, Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)]
    assert [look(value) for value in numbers] == [1, 0.5, 0.5, 0.5, 0.5]
    wrong: list[Any] = [*WRONG_NUMBERS, torch.ones(2)]
    for value in wrong:
        with pytest.raises(OptionError, match=r"share must be a finite number, got "):
            look(value)


NO_CHOICES: list[Any] = [np.array(["a", "b"]), np.array(["a"]), torch.ones(2), ["a"], {}, "A", " a", None, np.nan, b"a", object()]


@pytest.mark.parametrize("value", NO_CHOICES)
def test_a_choice_is_one_of_them_and_never_compared_value_by_value(value: Any) -> None:
    with pytest.raises(OptionError, match="^k must be one of 'a', True, got "):
        one_of("k", value, ("a", True))
    with pytest.raises(OptionError, match="^no method .*; the methods are a, b"):
        known("method", value, ("a", "b"))


def test_a_choice_comes_back_as_it_is_written() -> None:
    assert type(one_of("k", np.str_("a"), ("a", "b"))) is str
    assert type(known("k", Fits.PAD, ("pad",))) is str
    assert one_of("k", np.True_, (False, True)) is True
    assert one_of("k", 1, (False, True)) is True


@pytest.mark.parametrize("layers", [(1, 3), [1, 3], np.array([1, 3]), (np.int64(1), np.int8(3)), np.array([1, 3], np.uint8)])
def test_a_window_of_layers_is_two_whole_numbers(layers: Any) -> None:
    assert layer_window(layers, 4) == (1, 3)
    assert [type(end) for end in layer_window(layers, 4)] == [int, int]


NO_WINDOWS: list[Any] = [
    range(1, 3),
    slice(1, 3),
    (False, True),
    (True, 3),
    b"\1\3",
    "13",
    {1, 3},
    {1: 1, 3: 3},
    (1.0, 3.0),
    2,
    (2,),
    (),
]
NO_WINDOWS += [
    (1, 2, 3),
    (-2, -1),
    (3, 1),
    (1, 1),
    (0, 5),
    (0, 2**70),
    (None, 3),
    [[1, 3]],
    np.array([True, False]),
    np.eye(2),
    "1:3",
]


@pytest.mark.parametrize("layers", NO_WINDOWS)
def test_what_is_no_window_of_layers_is_refused(layers: Any) -> None:
    """Among them `range(1, 3)`: its two values are the layers 1 and 2, and as a window they would be layer 1 alone."""
    with pytest.raises(OptionError, match=r"layers must be \(start, stop\) with 0 <= start < stop <= 4"):
        layer_window(layers, 4)


GRID = np.array([[False, True, False], [False, False, True]])
PATCHES: dict[str, Any] = {
    "pairs": [(0, 1), (1, 2)],
    "lists": [[0, 1], [1, 2]],
    "a tuple": ((0, 1), (1, 2)),
    "an array": np.array([[0, 1], [1, 2]]),
    "an array of bytes": np.array([[0, 1], [1, 2]], np.uint8),
    "a tensor": torch.tensor([[0, 1], [1, 2]]),
    "numbers of numpy's": [(np.int64(0), np.int8(1)), (np.int64(1), np.int64(2))],
    "arrays": [np.array([0, 1]), np.array([1, 2])],
    "a generator": "made anew",
    "a dictionary's keys": {(0, 1): "a", (1, 2): "b"}.keys(),
    "a grid": GRID,
    "a grid of torch's": torch.from_numpy(GRID),
    "a grid seen from behind": GRID[::-1, ::-1][::-1, ::-1],
}
NO_PATCHES: list[Any] = [
    (0, 1),
    [0, 1],
    [(0, 1, 2)],
    [(0,)],
    ["01"],
    [b"01"],
    [(0.0, 1.0)],
    [(True, False)],
    [(None, 0)],
    [(0, float("nan"))],
]
NO_PATCHES += [
    [(-1, 0)],
    [(2, 0)],
    [(0, 3)],
    [(0, 2**70)],
    None,
    3,
    "00",
    {"a": 1},
    np.eye(3, dtype=bool),
    np.eye(2),
    GRID.tolist(),
    [[]],
]
NO_PATCHES += [np.array([True]), torch.tensor(3), object()]


@pytest.mark.parametrize("form", PATCHES)
def test_patches_are_read_from_pairs_and_grids(form: str) -> None:
    given = (cell for cell in [(0, 1), (1, 2)]) if form == "a generator" else PATCHES[form]
    found = patches_of("patches", given, 2, 3)
    assert found == [(0, 1), (1, 2)]
    assert {type(end) for cell in found for end in cell} == {int}


@pytest.mark.parametrize("given", NO_PATCHES)
def test_what_is_no_patch_of_the_grid_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(OptionError, match="^patches") as error:
        patches_of("patches", given, 2, 3)
    assert len(str(error.value)) < 300


TABLE = np.array([[0.0, 0.5], [1.0, 0.25]])
LAID_OUT: dict[str, Any] = {
    "lists": TABLE.tolist(),
    "a tensor": torch.from_numpy(TABLE),
    "with a gradient": torch.from_numpy(TABLE).requires_grad_(),
    "a parameter": torch.nn.Parameter(torch.from_numpy(TABLE)),
    "bfloat16": torch.from_numpy(TABLE).bfloat16(),
    "float16": torch.from_numpy(TABLE).half(),
    "float8": torch.from_numpy(TABLE).to(torch.float8_e4m3fn),
    "conjugate": torch.from_numpy(TABLE).to(torch.complex64).conj().real,
    "negative": -torch.from_numpy(-TABLE),
    "negative, not yet carried out": torch.from_numpy(TABLE * -1j).conj().imag,
    "transposed": torch.from_numpy(TABLE.T.copy()).T,
    "expanded": torch.from_numpy(TABLE)[None].expand(3, 2, 2)[1],
    "backwards": TABLE[::-1][::-1],
    "another byte order": TABLE.astype(">f4"),
    "by columns": np.asfortranarray(TABLE),
    "masked": np.ma.masked_array(TABLE, mask=TABLE > 9),
}
NO_VALUES: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.empty(2, 2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse by rows": lambda: torch.eye(2).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.rand(2, 2), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "rows of two lengths": lambda: [[1], [2, 3]],
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_values_are_read_however_they_are_laid_out(layout: str) -> None:
    got = array_of("k", LAID_OUT[layout])
    assert type(got) is np.ndarray
    assert np.array_equal(got, TABLE)


@pytest.mark.filterwarnings("ignore")  # torch's of what it means to drop
@pytest.mark.parametrize("layout", NO_VALUES)
def test_what_has_no_plain_values_is_one_line(layout: str) -> None:
    with pytest.raises(PictureError, match="^k has no plain values to read .*; give a numpy array$"):
        array_of("k", NO_VALUES[layout](), PictureError)


@pytest.mark.parametrize(
    "name", ["\ud800", "a\nb", "\x1b[31mred", "\u202eevil", "a" * 5000, "\x00", "\r", "\x9b2J", "tab\t", "é", "📷", "\u2066"]
)
def test_every_error_of_ours_is_one_printable_line_whoever_raises_it(name: str) -> None:
    for error in (
        LabError(f"no such file: {name}"),
        WriteError(f"cannot write {name}"),
        WriteError.of(name, OSError(28, "full")),
    ):
        text = str(error)
        assert "\n" not in text
        assert len(text) < 200
        assert text.encode()
        assert text.replace("\t", "").isprintable()


# -- several threads on one lab -------------------------------------------------------------


def _with_block(block: Any, lab: Any, picture: np.ndarray) -> np.ndarray:
    with block:
        return lab.ask(picture, "What is it?", max_new_tokens=3).logprobs


SIDE_BY_SIDE: dict[str, Callable[[Any, Any, np.ndarray], Any]] = {
    "ask": lambda lab, run, picture: lab.ask(picture, "What is it?", max_new_tokens=4).logprobs,
    "sampled": lambda lab, run, picture: lab.ask(picture, "Why?", max_new_tokens=4, temperature=1.0, seed=2).logprobs,
    "rollout": lambda lab, run, picture: ll.attribute(lab, run, method="rollout").values,
    "gradcam": lambda lab, run, picture: ll.attribute(lab, run, method="gradcam").values,
    "relevancy": lambda lab, run, picture: ll.attribute(lab, run, method="relevancy").values,
    "occlusion": lambda lab, run, picture: ll.attribute(lab, run, method="occlusion").values,
    "logit_lens": lambda lab, run, picture: ll.logit_lens(lab, run).entropy,
    "knockout": lambda lab, run, picture: ll.knockout(lab, run, source="image", target="last", draws=1).after,
    "patch": lambda lab, run, picture: ll.patch(lab, run).scores,
    "steered": lambda lab, run, picture: _with_block(ll.steered(lab, run, direction=np.arange(64), alpha=3.0), lab, picture),
    "avgpool": lambda lab, run, picture: _with_block(ll.connector(lab, ll.new_connector(lab, "avgpool", side=2)), lab, picture),
    "knocked_out": lambda lab, run, picture: _with_block(ll.knocked_out(lab, run, source="image", target="last"), lab, picture),
}


@pytest.mark.long
def test_threads_on_one_lab_get_what_each_gets_alone_and_leave_it_as_it_was(tiny_random: Any, picture: np.ndarray) -> None:
    lab, run = tiny_random, tiny_random.ask(picture, "What is it?", max_new_tokens=3)
    alone = {name: np.asarray(call(lab, run, picture)) for name, call in SIDE_BY_SIDE.items()}
    before, interval = state_of(lab), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(SIDE_BY_SIDE)) as pool:
            waiting = [(name, pool.submit(call, lab, run, picture)) for _ in range(3) for name, call in SIDE_BY_SIDE.items()]
            together = [(name, np.asarray(future.result())) for name, future in waiting]
    finally:
        sys.setswitchinterval(interval)
    assert [name for name, values in together if values.tobytes() != alone[name].tobytes()] == []
    assert state_of(lab) == before


# what changes the model for good, by design, is refused beside others (below); this one opens a page and gives no values
SHARED = [name for name in ON_A_LAB if name not in ("train_stage", "compare_connectors", "explore", "Lab.swap")]


def _kept(value: Any) -> Any:
    """A result to its last bit, without the time it took and where it lies."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _kept(getattr(value, field.name)) for field in fields(value) if field.name != "seconds"}
    if isinstance(value, torch.nn.Module):
        return _kept(dict(value.state_dict()))
    if isinstance(value, torch.Tensor):
        return _kept(value.detach().float().numpy())
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, dict):
        return {key: _kept(inner) for key, inner in value.items() if key != "seconds"}
    if isinstance(value, (list, tuple)):
        return [_kept(inner) for inner in value]
    return value if isinstance(value, (str, int, float, type(None))) else type(value).__name__


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What each call gives when nothing else runs, as far as it was asked for."""
    return {}


@pytest.mark.long
@pytest.mark.parametrize("name", SHARED)
def test_pairs_of_public_calls_on_one_lab_get_what_each_gets_alone(
    tiny_random: Any, calls: dict[str, Any], alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every call beside four others and beside itself, each pair begun at the same moment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["llava_lab.interventions.ablate"], "exact_match", lambda *given: True)
    start, places = threading.Barrier(2), itertools.count()

    def outcome(called: str, beside: bool) -> Any:
        place = tmp_path / str(next(places))
        if beside:
            start.wait(60)
        call = {**calls[called], **REAL.get(called, {})}
        try:
            return _kept(_called(tiny_random, called, call, calls["Lab.ask"], place))
        except LabError as error:
            return str(error).replace(str(place), "")

    others = [name, *random.Random(name).sample([other for other in SHARED if other not in REAL], 4)]
    for called in others:
        if called not in alone:
            alone[called] = outcome(called, beside=False)
    before, interval = state_of(tiny_random), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for other in others:
            with ThreadPoolExecutor(2) as pool:
                both = [(called, pool.submit(outcome, called, beside=True)) for called in (name, other)]
                wrong = [called for called, future in both if future.result() != alone[called]]
            assert wrong == [], f"{name} beside {other}"
            assert state_of(tiny_random) == before, f"{name} beside {other}"
    finally:
        sys.setswitchinterval(interval)


def test_blocks_left_in_the_order_they_were_entered_leave_the_model_free() -> None:
    turn = Turn()
    blocks = [turn.taken(), turn.taken()]
    for block in blocks:
        block.__enter__()
    for block in blocks:
        block.__exit__(None, None, None)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_taken_by_another, turn).result(10)


def _taken_by_another(turn: Turn) -> bool:
    with turn.taken(training=True):
        return True


def test_two_labs_in_two_orders_do_not_wait_for_each_other(tiny_random: Any, tiny_folder: Path) -> None:
    other = ll.load(str(tiny_folder))
    same = ll.Lab(tiny_random.model, tiny_random.processor)
    assert same.turn is tiny_random.turn is not other.turn

    def swap(pair: tuple[Any, Any]) -> int:
        for _ in range(20):
            with ll.connector(*pair):
                pass
        return 20

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(swap, [(tiny_random, other), (other, tiny_random), (same, other), (other, same)])) == [20] * 4


def test_a_training_is_not_disturbed_and_who_asks_meanwhile_is_told(tiny_folder: Path, tmp_path: Path, picture: Any) -> None:
    rows, losses = write_rows(tmp_path, text_every=0), []
    recipe = replace(LLAVA_15_7B.align, batch=4)
    for beside in (False, True):
        lab, begun, go_on = ll.load(str(tiny_folder)), threading.Event(), threading.Event()

        def told(row: Any, begun: Any = begun, go_on: Any = go_on, beside: bool = beside) -> None:
            begun.set()
            assert not beside or go_on.wait(60)

        plot = LossPlot()
        options: dict[str, Any] = {"recipe": recipe, "steps": 3, "cache": tmp_path / "c", "running": Running(progress=False)}
        done = plot.start(partial(ll.train_stage, lab, rows, "align", tmp_path / str(beside), told=told, **options))
        assert begun.wait(60)
        if beside:
            refused = pytest.raises(LabError, match="is being trained by another thread; wait for it to end")
            with refused:
                lab.ask(picture, "What?")
            with refused:
                ll.train_stage(lab, rows, "align", tmp_path / "x", **options)
            go_on.set()
        losses.append(done.result(60).losses)
        assert not any(module.training for module in lab.model.modules())
        assert len(lab.ask(picture, "What?", max_new_tokens=2).logprobs) <= 2
    assert losses[0] == losses[1]


def test_an_exercise_praises_hints_and_never_shows_a_traceback() -> None:
    def check(count: int) -> str:
        assert count != 12, "not yet: that is one side"
        if count != 144:
            raise AssertionError  # as a bare assert of a notebook does
        return f"Yes: {count:,}."

    assert ll.check_answer(check, 144) == "Yes: 144."
    assert ll.check_answer(check, 12) == "Not yet: that is one side"
    assert ll.check_answer(check, 7) == "Not yet: the answer does not hold"
    assert ll.check_answer(check).startswith("Not yet: with this answer the check stopped at TypeError: ")
    assert ll.check_answer(lambda yours: yours(1), lambda count: {}[count]) == (
        "Not yet: with this answer the check stopped at KeyError: 1"
    )
    with pytest.raises(KeyboardInterrupt):
        ll.check_answer(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
