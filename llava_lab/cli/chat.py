"""``llava-lab chat PICTURE``: several questions about one picture, each with what was said before it.

    llava-lab chat car.png
    llava-lab chat car.png --json < questions.txt

A line is a question. ``/new`` forgets what was said, ``/picture FILE`` shows another picture (and forgets), ``/quit`` or the end
of the input leaves. A question that cannot be asked is said in one line and does not count.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply, say
from llava_lab.errors import LabError, OptionError

HELP = "/new forgets what was said, /picture FILE shows another picture, /quit leaves"


def add_commands(add: Add) -> None:
    command = add("chat", chat, f"ask several questions about a picture, one a line; {HELP}")
    command.add_argument("picture", help="an image file")
    common.add_asking(command)
    common.add_server(command)
    common.add_output(command, "--save", "keep the last run in one .npz file")


def chat(args: argparse.Namespace) -> Reply:
    """Ask line by line. Exit code 2 where a line of a script, not of a person, could not be asked."""
    picture = common.read_picture(args)
    lab = common.load(args)
    person = sys.stdin.isatty() and not args.json
    history: list[tuple[str, str]] = []
    turns: list[dict[str, Any]] = []
    run, refused = None, 0
    if person:
        say(f"Ask about {args.picture}; {HELP}.")
    while (line := _next(person)) is not None:
        try:
            word, _, rest = line.partition(" ")
            if word == "/quit":
                break
            if word in ("/new", "/picture"):
                if word == "/picture":
                    args.picture = rest.strip()
                    picture = common.read_picture(args)
                history = []
                continue
            if word.startswith("/"):
                raise OptionError(f"no command {word}; {HELP}")
            run = common.ask(args, lab, picture, show=True, question=line, history=tuple(history))
        except LabError as error:
            say(f"llava-lab: {' '.join(str(error).split())}", file=sys.stderr)
            refused += 1
            continue
        history.append((run.question, run.answer))
        turns.append({"picture": args.picture, **run.to_dict()})
    if run is not None:
        common.save(run, args.save)
    return Reply({"model": args.model, "turns": turns}, code=2 if refused and not person else 0)


def _next(person: bool) -> str | None:
    """The next line that is not empty; None at the end."""
    while True:
        if person:
            say("> ", end="")
        line = sys.stdin.readline()
        if not line:
            if person:
                say("")
            return None
        if line.strip():
            return line.strip()
