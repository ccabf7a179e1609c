"""Every default of every public function and command, as text, beside the list of those that were promised.

``python -m tests.support.defaults`` writes the list again, where a default is meant to change.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import llava_lab as ll
from llava_lab import plots
from llava_lab.cli.main import build_parser

PROMISED = Path(__file__).with_name("defaults.json")


def defaults() -> dict[str, dict[str, str]]:
    """By the function's or the command's name, by the option's, the default as Python writes it."""
    public = {name: getattr(ll, name) for name in ll.__all__} | {f"plots.{name}": getattr(plots, name) for name in plots.__all__}
    public |= {f"Lab.{name}": value for name, value in vars(ll.Lab).items() if not name.startswith("_")}
    found = {name: of_function(value) for name, value in public.items() if inspect.isfunction(value)}
    return {name: options for name, options in {**found, **of_commands()}.items() if options}


def of_function(function: object) -> dict[str, str]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {p.name: repr(p.default) for p in parameters if p.default is not p.empty}


def of_commands() -> dict[str, dict[str, str]]:
    choices = next(a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        f"llava-lab {name}": {a.dest: repr(a.default) for a in command._actions if a.option_strings and a.dest != "help"}
        for name, command in choices.items()
    }


if __name__ == "__main__":
    rows = (f" {json.dumps(name)}: {json.dumps(options)}" for name, options in defaults().items())
    PROMISED.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
