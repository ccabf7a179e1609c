"""``llava-lab ask`` and ``explain`` with a closed model: ``--model openai:NAME --base-url URL``.

What such a call will ask for is said on standard error before it starts. The key is read from the environment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_lab.errors import OptionError

if TYPE_CHECKING:
    import numpy as np

    from llava_lab.remote.black_box import BlackBox
    from llava_lab.results import Run

PREFIX = "openai:"


def add_options(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of a closed model; they are refused with any other."""
    group = command.add_argument_group(f"a model behind a server (--model {PREFIX}NAME)")
    group.add_argument("--base-url", metavar="URL", help="where pictures are sent, e.g. http://127.0.0.1:8000/v1")
    group.add_argument("--max-requests", type=positive, metavar="N", help="all that may be sent (default: 500)")
    group.add_argument("--key-variable", metavar="NAME", help="environment variable with the key (default: OPENAI_API_KEY)")
    group.add_argument("--price", metavar="READ,WRITTEN", help="per million tokens, for the estimate")


def is_closed(args: argparse.Namespace) -> bool:
    return args.model.startswith(PREFIX)


def refuse(args: argparse.Namespace) -> None:
    """Raises OptionError for options that do not go together, before anything is loaded or sent."""
    given = {name: getattr(args, name, None) for name in ("base_url", "max_requests", "key_variable", "price")}
    if not is_closed(args):
        wrong = [name for name, value in given.items() if value is not None]
        if wrong:
            raise OptionError(f"--{wrong[0].replace('_', '-')} belongs to --model {PREFIX}NAME, got --model {args.model}")
        return
    if not hasattr(args, "base_url"):
        raise OptionError(f"{args.command} looks inside the model, and {args.model} is closed; use ask or explain")
    if args.prompt not in (None, "llava-1.5") or args.fit:
        raise OptionError("--prompt and --fit are the server's own with a closed model; leave them out")


def refuse_inside(method: str) -> None:
    """Raises OptionError for a method that a closed model does not allow."""
    from llava_lab.remote.explain import refuse_inside as refuse_method

    refuse_method(method)


def load(args: argparse.Namespace) -> BlackBox:
    """The closed model of the command line. Raises OptionError."""
    import llava_lab as ll

    options: dict[str, Any] = {"key_variable": args.key_variable, "price": _price(args.price)}
    if args.max_requests is not None:
        options["max_requests"] = args.max_requests
    if args.device or args.dtype:
        raise OptionError(f"--device and --dtype are the server's own for {args.model}; leave them out")
    return ll.load(args.model, base_url=args.base_url or "", **options)


def ask(args: argparse.Namespace, lab: BlackBox, picture: np.ndarray, on_token: Callable[[str], None] | None) -> Run:
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "seed")}
    return lab.ask(picture, args.question, **options, on_token=on_token)


def announce(lab: BlackBox, run: Run, method: str, target: Any, options: dict[str, Any]) -> None:
    """What the explanation will ask for, on standard error."""
    import llava_lab as ll

    print(f"llava-lab: {ll.estimate(lab, run, method=method, target=target, **options)}", file=sys.stderr)


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(
            f"--price wants two numbers, per million tokens read and written, such as 2.5,10; got {text!r}"
        ) from None
    return read, written
