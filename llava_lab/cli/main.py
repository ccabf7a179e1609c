"""``llava-lab``: the public functions from a terminal.

Parses, calls, prints; every decision is made in the functions it calls (`llava_lab.cli.ask`).
With ``--json`` standard output holds exactly one JSON object and everything else goes to standard
error. Exit codes: 0 done, 2 a mistake the user can mend (one line on standard error), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from llava_lab.cli import ask as cli_knockout
from llava_lab.cli import ask as cli_lens
from llava_lab.cli import ask as commands
from llava_lab.cli import judge as cli_compare
from llava_lab.cli import judge as cli_report
from llava_lab.cli import judge as cli_sanity
from llava_lab.cli import train as cli_ablate
from llava_lab.cli import train as cli_convert
from llava_lab.cli import train as cli_train
from llava_lab.errors import LabError
from llava_lab.remote import command as cli_endpoint

DEFAULT_MODEL = "tiny"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse leaves by SystemExit, with 0 for help and 2 for a mistake)."""
    try:
        args = build_parser().parse_args(argv)
        level = logging.INFO if args.verbose else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        if args.json:
            with contextlib.redirect_stdout(sys.stderr):
                reply = args.run(args)
        else:
            reply = args.run(args)
        _print(reply, as_json=args.json)
    except LabError as error:
        print(f"llava-lab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return reply.code


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"llava-lab: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; needs neither torch nor matplotlib."""
    parser = _Parser(prog="llava-lab", description="Ask LLaVA about a picture, and see where the answer came from.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Callable[..., Any], about: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=about, description=about, parents=[_common()])
        command.set_defaults(run=run)
        return command

    ask = add("ask", commands.ask, "answer a question about a picture")
    _question(ask)
    cli_endpoint.add_options(ask, _positive)
    ask.add_argument("--save", metavar="FILE", help="keep the run in one .npz file")

    explain = add("explain", commands.explain, "answer, and say which patches the answer came from")
    _question(explain)
    cli_endpoint.add_options(explain, _positive)
    explain.add_argument("--method", default="rollout", help="one of `llava-lab methods` (default: rollout)")
    explain.add_argument(
        "--target",
        action="append",
        metavar="WHAT",
        help="words (default), answer, a word of the answer, RED/BLUE for a contrast, or #N for an answer token; repeatable",
    )
    explain.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method; repeatable"
    )
    explain.add_argument("--out", metavar="FILE", help="draw the map on the picture (.png, .svg, .pdf)")
    explain.add_argument("--save", metavar="FILE", help="keep the map in one .npz file")

    add("methods", commands.methods, "list the attribution methods, each with its one-sentence truth")
    _add_data_commands(add)
    cli_compare.add_options(add("compare", cli_compare.compare, cli_compare.ABOUT), _positive)
    lens = add("lens", cli_lens.lens, cli_lens.ABOUT)
    _question(lens)
    cli_lens.add_options(lens, _positive)
    cli_lens.add_naming_options(add("naming", cli_lens.naming, cli_lens.NAMING), _positive)
    cli_sanity.add_options(add("sanity", cli_sanity.sanity, cli_sanity.ABOUT), _positive)
    cli_report.add_options(add("report", cli_report.report, cli_report.ABOUT))
    cli_knockout.add_options(add("knockout", cli_knockout.knockout, cli_knockout.ABOUT), _positive)
    bench = add("bench", commands.bench, "measure speed and memory against a floor and a peer")
    bench.add_argument("name", help="which measurement, e.g. start")
    bench.add_argument("--quick", action="store_true", help="fewer repeats")
    bench.add_argument("--layers", type=_positive, metavar="N", help="scale: layers of the language model (default: 4)")
    cli_convert.add_options(add("convert", cli_convert.convert, cli_convert.ABOUT))
    add(
        "doctor", commands.doctor, "versions, device, memory, usable parts; with --model, how it differs from LLaVA-1.5"
    ).set_defaults(model=None)
    lab = add("lab", commands.lab, "open JupyterLab with the lessons")
    lab.add_argument("--port", type=int, help="default: 8888, or the next free one")
    lab.add_argument("--no-browser", action="store_true", help="only print the address")
    lab.add_argument("--check", action="store_true", help="start, run the first lesson, stop")
    return parser


def _add_data_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    evaluate = add("evaluate", commands.evaluate, "score a model on a data set, beside its controls")
    evaluate.add_argument("--data", default="picturebook", help="picturebook (default), easy-vqa, or a LLaVA .json file")
    evaluate.add_argument("--split", default="test", help="default: test")
    evaluate.add_argument("--n", type=_positive, default=2000, help="pictures (default: 2000)")
    evaluate.add_argument("--normalised", action="store_true", help="compare after lower case, articles, full stop, numbers")
    evaluate.add_argument("--no-controls", action="store_true", help="leave out blind, shuffled and majority")

    data = add("data", commands.data, "write a data set in LLaVA's format")
    data.add_argument("world", choices=("picturebook",), help="which world to draw")
    data.add_argument("--n", type=_positive, required=True, help="pictures")
    data.add_argument("--split", default="train", help="default: train")
    data.add_argument("--out", required=True, metavar="DIR", help="folder to write to")

    cli_train.add_options(add("train", cli_train.train, cli_train.ABOUT), _positive)
    cli_ablate.add_options(add("ablate", cli_ablate.ablate, cli_ablate.ABOUT), _positive)


def _common() -> _Parser:
    """What every command takes, whether or not it loads a model, so that scripts can be uniform."""
    common = _Parser(add_help=False)
    common.add_argument("--model", default=DEFAULT_MODEL, help=f"tiny, a folder, or a hub name (default: {DEFAULT_MODEL})")
    common.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: 0)")
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    common.add_argument("--device", help="cpu, cuda, mps (default: chosen, see `llava-lab doctor`)")
    common.add_argument("--dtype", help="float32, bfloat16, float16 (default: chosen)")
    common.add_argument("-v", "--verbose", action="store_true", help="say on standard error what is going on")
    return common


def _question(command: argparse.ArgumentParser) -> None:
    command.add_argument("picture", help="an image file")
    command.add_argument("question")
    command.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="longest answer (default: 64)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    command.add_argument("--prompt", help="form of the prompt: llava-1.5, hf, or chat (default: the model's own)")
    command.add_argument("--fit", help="how the picture becomes square: pad or crop (default: the model's own)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def _print(reply: commands.Reply, *, as_json: bool) -> None:
    if as_json and reply.data is not None:
        print(json.dumps(commands.plain(reply.data), ensure_ascii=False, allow_nan=False))
    elif not as_json and reply.text:
        print(reply.text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
