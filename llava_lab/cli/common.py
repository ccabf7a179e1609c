"""What the commands share: options of a question, loading a model, asking it, reading targets, writing files.

Each command is a function from its arguments to a `Reply`. Heavy imports stand inside functions, so that
``llava-lab --help`` answers at once.

    lab = load(args)
    run = ask(args, lab, read_picture(args), show=True)
    save(run, args.save)
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO, TypeVar

from llava_lab.errors import OptionError, WriteError, printable
from llava_lab.shipped import MODELS

if TYPE_CHECKING:
    import numpy as np

    from llava_lab.results import Run

Uses = Literal["lab", "model and seed", "seed", "nothing"]  # which of the shared options act in a command


class Add(Protocol):
    """Adds a command: its name, its function, what it is about, and which of the shared options act in it."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], Reply], about: str, uses: Uses = "lab"
    ) -> argparse.ArgumentParser: ...


Written = TypeVar("Written")
Draw = Callable[[Any], Any]  # given `llava_lab.plots`, a figure
CLOSED = "openai:"
PATIENCE = 20.0  # seconds that a program we started has to end in order
SERVER_OPTIONS = ("base_url", "max_requests", "key_variable", "price")
FIGURES = (".png", ".svg", ".pdf")


@contextmanager
def program(command: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program of its own, which does not outlive the block: inside, SIGTERM and a closed terminal (SIGHUP) are Ctrl-C."""
    from llava_lab.checks import undoing

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        ends = []  # signals are the main thread's
    before = {end: signal.getsignal(end) for end in ends}
    started: list[subprocess.Popen[bytes]] = []

    def end() -> None:
        for process in started:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)

    with undoing(end):
        for number in ends:
            signal.signal(number, signal.default_int_handler)
        started.append(subprocess.Popen(command, env=environment))
        yield started[0]


@dataclass(frozen=True)
class Reply:
    """One command's outcome: for a script, for a person, and the exit code."""

    data: dict[str, Any] | None
    text: str = ""
    code: int = 0


def say(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """The one place that prints: answers, servers and files may hold what would steer a terminal."""
    print(printable(text), end=end, file=file, flush=True)


# -- options --------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def add_output(command: argparse.ArgumentParser, flag: str, about: str, default: str | None = None) -> None:
    """An option that names a file to write; with the first of them comes ``--force`` (`refuse_overwriting`)."""
    written = command.get_default("outputs") or ()
    if not written:
        command.add_argument("--force", action="store_true", help="write over files that are there")
    action = command.add_argument(flag, metavar="FILE", default=default, help=about)
    command.set_defaults(outputs=(*written, action.dest))


def refuse_overwriting(args: argparse.Namespace) -> None:
    """Raises OptionError where a file to be written is there and ``--force`` was not given; before anything is done."""
    for name in getattr(args, "outputs", ()):
        path = getattr(args, name)
        if path and not args.force and os.path.isfile(path):  # also where no file can have that name
            option = name.replace("_", "-")
            raise OptionError(f"{path} is there already; give --{option} another name, or --force to write over it")


def add_question(command: argparse.ArgumentParser) -> None:
    """A picture, a question, and how it is asked."""
    command.add_argument("picture", help="an image file")
    command.add_argument("question")
    add_asking(command)


def add_asking(command: argparse.ArgumentParser) -> None:
    """How a question is asked."""
    command.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer (default: 64)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    command.add_argument("--prompt", help="form of the prompt: llava-1.5, hf, or chat (default: the model's own)")
    command.add_argument("--fit", help="how the picture becomes square: pad or crop (default: the model's own)")


def add_server(command: argparse.ArgumentParser) -> None:
    """The options of a closed model; `load` refuses them with any other."""
    group = command.add_argument_group(f"a model behind a server (--model {CLOSED}NAME)")
    group.add_argument("--base-url", metavar="URL", help="where pictures are sent, e.g. http://127.0.0.1:8000/v1")
    group.add_argument("--max-requests", type=positive, metavar="N", help="all that may be sent (default: 500)")
    group.add_argument("--key-variable", metavar="NAME", help="environment variable with the key (default: OPENAI_API_KEY)")
    group.add_argument("--price", metavar="READ,WRITTEN", help="per million tokens, for the estimate")


def add_method(command: argparse.ArgumentParser) -> None:
    """A method and its options."""
    command.add_argument("--method", default="rollout", help="one of `llava-lab methods` (default: rollout)")
    command.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method; repeatable"
    )


def read_method(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``--method``, checked before a model is loaded."""
    import llava_lab as ll
    from llava_lab.checks import known

    method, options = ll.METHODS[known("method", args.method, ll.METHODS)], read_options(args.option)
    if "seed" in method.options:
        options.setdefault("seed", args.seed)
    method.with_defaults(options)
    return options


def read_options(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; see `read_value`."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier() or name in ("lab", "run", "method", "target"):
            raise OptionError(f"--option wants NAME=VALUE with an option of the method, got {pair!r}")
        options[name] = read_value(text)
    return options


def read_value(text: str) -> Any:
    """A value as people write it in a shell: JSON, Python's own spelling (``(2,4)``, ``None``), a span ``2:4``, else text."""
    if span := re.fullmatch(r"(\d+):(\d+)", text):
        return [int(span[1]), int(span[2])]
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def read_target(text: str | None) -> Any:
    """``words``, ``answer``, a word, ``red/blue`` or ``#3`` as `llava_lab.attribute` wants them."""
    word, _, other = (text or "").partition("/")
    if word and other:
        return word, other
    if text and text.startswith("#") and text[1:].isdecimal():
        return int(text[1:])
    return text


def check_figure(path: str | None) -> None:
    """Raises OptionError where ``--figure`` has an ending that cannot be drawn."""
    if path and not path.lower().endswith(FIGURES):
        raise OptionError(f"--figure wants a file ending in {', '.join(FIGURES)}, got {path!r}")


# -- a model and its answer -----------------------------------------------------------------


def is_closed(args: argparse.Namespace) -> bool:
    """Whether ``--model`` names a model behind a server."""
    model: str = args.model
    return model.startswith(CLOSED)


def load(args: argparse.Namespace) -> Any:
    """The model of ``--model``. Raises OptionError for options that do not go together, before anything is loaded or sent."""
    import llava_lab as ll

    server = {name: getattr(args, name) for name in SERVER_OPTIONS if getattr(args, name, None) is not None}
    if not is_closed(args):
        if server:
            option = next(iter(server)).replace("_", "-")
            raise OptionError(f"--{option} belongs to --model {CLOSED}NAME, got --model {args.model}")
        lab = ll.load(args.model, device=args.device, dtype=args.dtype)
        if args.model in MODELS:
            say(f"{args.model}: {MODELS[args.model].knows}", file=sys.stderr)
        return lab
    if not hasattr(args, "base_url"):
        raise OptionError(f"{args.command} looks inside the model, and {args.model} is closed; use ask or explain")
    if args.prompt not in (None, "llava-1.5") or args.fit:
        raise OptionError("--prompt and --fit are the server's own with a closed model; leave them out")
    if args.device or args.dtype:
        raise OptionError(f"--device and --dtype are the server's own for {args.model}; leave them out")
    if "price" in server:
        server["price"] = read_price(server["price"])
    return ll.load(args.model, **{"base_url": "", **server})


def read_price(text: str) -> tuple[float, float]:
    """``2.5,10`` as numbers. Raises OptionError for anything else."""
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(
            f"--price wants two numbers, per million tokens read and written, such as 2.5,10; got {text!r}"
        ) from None
    return read, written


def read_picture(args: argparse.Namespace) -> np.ndarray:
    """The picture, before a large model is loaded: a mistyped path should not cost a minute."""
    from llava_lab.models import read_picture

    return read_picture(args.picture)


def ask(args: argparse.Namespace, lab: Any, picture: np.ndarray, *, show: bool, question: str | None = None, **more: Any) -> Run:
    """Ask; with `show` a person sees the answer while it is made. Raises KeyboardInterrupt where the answer was stopped.

    What the reader must know of the answer (`Run.notes`) goes to standard error. `question` None is the command's own.
    """
    question = args.question if question is None else question
    names = ["max_new_tokens", "temperature", "seed"] + ([] if is_closed(args) else ["prompt", "fit"])
    options: dict[str, Any] = {name: getattr(args, name) for name in names if hasattr(args, name)} | more
    if show and not args.json:
        run: Run = lab.ask(picture, question, **options, on_token=lambda piece: say(piece, end=""))
        say(run.answer_shown.removeprefix(run.answer))
    else:
        run = lab.ask(picture, question, **options, on_token=None)
    for note in run.notes:
        say(f"note: {note}", file=sys.stderr)
    if run.options.get("stopped") == "interrupted":  # ask gives what it has; a command that was stopped says so
        raise KeyboardInterrupt
    return run


# -- files ----------------------------------------------------------------------------------


def write(action: Callable[[str], Written], path: str) -> Written:
    """Do `action(path)`, and say in one line when the disk does not allow it."""
    try:
        return action(path)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError.of(path, error) from None


def save(result: Any, path: str | None) -> None:
    """Keep a result where ``--save`` says, if it does."""
    if path:
        write(result.save, path)


def finished(args: argparse.Namespace, result: Any, draw: Draw | None = None, *, text: str | None = None, **told: Any) -> Reply:
    """Keep a result where ``--save`` says and draw it where ``--figure`` does; `told` goes before what it says itself."""
    save(result, args.save)
    if draw is not None and args.figure:
        from llava_lab import plots

        save_figure(draw(plots), args.figure)
    code = 130 if getattr(result, "interrupted", False) else 0
    return Reply({**told, **result.to_dict()}, str(result.table()) if text is None else text, code)


def save_bytes(data: bytes, path: str) -> None:
    """Write a file, whole or not at all; folders on the way are made."""
    from llava_lab.results import whole_file

    with whole_file(path) as temporary:
        Path(temporary).write_bytes(data)


def save_figure(figure: Any, path: str, **options: Any) -> None:
    """Write a figure, whole or not at all; folders on the way are made."""
    from llava_lab.results import whole_file

    with whole_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".").lower(), dpi=150, **options)
