"""``llava-lab``: the public functions from a terminal.

Parses, calls, prints; every decision is made in the functions it calls. `ask`, `judge`, `train` and `serve` beside this file
hold most commands; those that need no model of the user's are here. The shapes of the data are promised to scripts and tested.
A command has the options that act in it and no others; a file that is there is written over with ``--force`` alone.

With ``--json`` standard output holds exactly one JSON object and everything else goes to standard
error. Exit codes: 0 done, 2 a mistake the user can mend (one line on standard error), 130 Ctrl-C
(in `app` and `lab` also SIGTERM and a closed terminal).

    llava-lab ask car.png "What color is the car?" --json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llava_lab.cli import ask, judge, serve, train
from llava_lab.cli.common import Add, Reply, Uses, positive, program, refuse_overwriting, say
from llava_lab.errors import LabError, OptionError, foreign_line, is_out_of_memory, one_line, printable, readable
from llava_lab.options import instead_of, nearest
from llava_lab.shipped import MODELS

DEFAULT_MODEL = "tiny"
RUN_PY = Path(__file__).resolve().parents[2] / "run.py"  # there in a checkout, not in an installed package


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse leaves by SystemExit, with 0 for help and 2 for a mistake)."""
    try:
        args = build_parser().parse_args(argv)
        refuse_overwriting(args)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Printable("%(message)s"))
        logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, handlers=[handler])
        if args.json:
            with contextlib.redirect_stdout(sys.stderr):
                reply = args.run(args)
        else:
            reply = args.run(args)
        if args.json and reply.data is not None:
            from llava_lab.results.table import plain

            say(json.dumps(plain(reply.data), ensure_ascii=False, allow_nan=False))
        elif not args.json and reply.text:
            say(reply.text)
        sys.stdout.flush()
    except LabError as error:
        say(f"llava-lab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        _leave_output()
        return 0
    except OSError as error:  # a full disk behind our output, a file system that went away
        say(f"llava-lab: {one_line(error)}", file=sys.stderr)
        _leave_output()
        return 2
    except Exception as error:
        if is_out_of_memory(error):
            remedy = "try a smaller model, picture or batch, or --dtype bfloat16"
            say(f"llava-lab: the memory is not enough ({one_line(error)}); {remedy}", file=sys.stderr)
            return 2
        line = foreign_line(error)
        if line is None:
            raise
        say(f"llava-lab: {line}", file=sys.stderr)
        return 2
    return int(reply.code)


class _Printable(logging.Formatter):
    """What is logged goes to the terminal too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _leave_output() -> None:
    """Nothing more can be written to standard output; what is left in its buffer goes nowhere instead of failing at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all of ours."""

    # what stands below the help and costs an import to know
    below: Callable[[], str] | None = None

    def format_help(self) -> str:
        if self.below is not None:
            self.formatter_class, self.epilog = argparse.RawDescriptionHelpFormatter, self.below()
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses an option that a command does not have, with the one that was meant; argparse would name the option alone."""
        known, rest = super().parse_known_args(args, namespace)
        if rest and rest[0].startswith("--"):
            given = rest[0].partition("=")[0]
            name = given.removeprefix("--").replace("-", "_")
            ours = {option.removeprefix("--").replace("-", "_"): option for option in self._option_string_actions}
            if instead := instead_of(name, ours):
                here = re.sub(r"(\w+)=\.\.\.", lambda named: ours.get(named[1], named[0]), instead)
                self.error(f"no option {given}: {here}")
            if near := nearest(name, ours):
                self.error(f"no option {given}; did you mean {ours[near]}?")
        return known, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{readable(f'llava-lab: {message}; see `{self.prog} --help`')}\n")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; needs neither torch nor matplotlib."""
    parser = _Parser(prog="llava-lab", description="Ask LLaVA about a picture, and see where the answer came from.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Callable[[argparse.Namespace], Reply], about: str, uses: Uses = "lab") -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=about, description=about)
        _add_common(command, uses)
        command.set_defaults(run=run)
        return command

    ask.add_commands(add)
    serve.add_app(add)
    judge.add_commands(add)
    ask.add_inside(add)
    train.add_commands(add)
    serve.add_serve(add)
    serve.add_page(add)
    _add_commands(add)
    return parser


def _add_common(command: argparse.ArgumentParser, uses: Uses) -> None:
    """What commands share: ``--json`` and ``-v`` all of them, the rest where it acts (`Uses`)."""
    if uses in ("lab", "model and seed"):
        known = f"{', '.join(MODELS)}, a folder, or a hub name"
        command.add_argument("--model", default=DEFAULT_MODEL, help=f"{known} (default: {DEFAULT_MODEL})")
    if uses != "nothing":
        command.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: 0)")
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    if uses == "lab":
        command.add_argument("--device", help="cpu, cuda, mps (default: chosen, see `llava-lab doctor`)")
        command.add_argument("--dtype", help="float32, bfloat16, float16 (default: chosen)")
    command.add_argument("-v", "--verbose", action="store_true", help="say on standard error what is going on")


def _add_commands(add: Add) -> None:
    add("methods", methods, "list the attribution methods, each with its one-sentence truth", "nothing")

    measure = add("bench", bench, "measure speed and memory against a floor and a peer", "nothing")
    measure.add_argument("name", help="which measurement; they are listed below")
    measure.add_argument(
        "--model", default=DEFAULT_MODEL, help="a shipped model, a folder, or random-s, random-m (default: tiny)"
    )
    measure.add_argument("--quick", action="store_true", help="fewer repeats")
    measure.add_argument("--layers", type=positive, metavar="N", help="scale: layers of the language model (default: 4)")
    measure.below = _bench_names  # type: ignore[attr-defined]

    about = "versions, device, memory, usable parts; with --model, how it differs from LLaVA-1.5"
    examined = add("doctor", doctor, about, "nothing")
    examined.add_argument("--model", help=f"{', '.join(MODELS)}, a folder, or a hub name")

    jupyter = add("lab", lab, "open JupyterLab with the lessons", "nothing")
    jupyter.add_argument("--port", type=int, help="default: 8888, or the next free one")
    jupyter.add_argument("--no-browser", action="store_true", help="only print the address")
    jupyter.add_argument("--check", action="store_true", help="start, run the first lesson, stop")


def _bench_names() -> str:
    from llava_lab.bench import BENCHES

    width = max(map(len, BENCHES))
    return "\n".join(["measurements:", *(f"  {name:<{width}}  {about}" for name, about in BENCHES.items())])


def methods(args: argparse.Namespace) -> Reply:
    import llava_lab as ll
    from llava_lab.results.table import pairs

    fields = ("name", "truth", "equation", "source", "paper", "cost", "blind_to", "options")
    rows = [{field: getattr(method, field) for field in fields} for method in ll.METHODS.values()]
    text = [f"{row['name']}\n    {row['truth']}\n    options: {pairs(row['options'])}" for row in rows]
    return Reply({"methods": rows}, "\n".join(text))


def bench(args: argparse.Namespace) -> Reply:
    from llava_lab.bench import run
    from llava_lab.results.table import aligned

    result = run(args.name, model=args.model, quick=args.quick, layers=args.layers)
    if not result["rows"]:
        return Reply(result, result["note"])
    lines = [f"{args.name} on {result['device']}, {result['threads']} threads; floor: {_short(result['floor'])} s"]
    lines += [result["note"]] if result.get("note") else []
    names = ["name", "seconds", "ratio_to_floor", "ratio_to_peer", "extra_mb", "max_error"]
    names += [key for row in result["rows"][:1] for key in row if key not in names]  # what only this benchmark has
    lines += aligned(names, [[_short(row.get(name)) for name in names] for row in result["rows"]])
    return Reply(result, "\n".join(lines))


def doctor(args: argparse.Namespace) -> Reply:
    from llava_lab.doctor import examine, render

    if args.model is not None:
        from llava_lab.models.differences import examine_model, render_model

        compared = examine_model(args.model)
        return Reply(compared, render_model(compared))
    report = examine()
    return Reply(report, render(report))


def lab(args: argparse.Namespace) -> Reply:
    """JupyterLab by run.py where there is one; its own exit code and output are ours."""
    if RUN_PY.is_file():
        flags = {"--no-browser": args.no_browser, "--check": args.check, "--json": args.json}
        port = [f"--port={args.port}"] if args.port else []
        command = [sys.executable, str(RUN_PY), "lab", *port, *(flag for flag, on in flags.items() if on)]
    elif importlib.util.find_spec("jupyterlab") is None:
        raise LabError("JupyterLab is not installed; `pip install 'llava-lab[lab]'` brings it")
    elif args.check or args.json:
        raise OptionError("--check and --json belong to a checkout with its lessons; this is an installed package")
    else:
        port = [f"--ServerApp.port={args.port}"] if args.port else []
        command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", *port, *(["--no-browser"] * args.no_browser)]
    with program(command) as server:
        return Reply(None, code=server.wait())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
