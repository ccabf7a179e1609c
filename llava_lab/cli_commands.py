"""What each ``llava-lab`` command does: call one public function, give back data and its text.

Heavy imports stand inside the commands, so that ``llava-lab --help`` answers at once. The shapes
of the data are promised to scripts (README, "What --json prints") and tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava_lab import cli_endpoint
from llava_lab.errors import LabError, OptionError

if TYPE_CHECKING:
    import numpy as np

    from llava_lab.models import Lab
    from llava_lab.results import Relevance, Run

RUN_PY = Path(__file__).resolve().parent.parent / "run.py"  # there in a checkout, not in an installed package


@dataclass(frozen=True)
class Reply:
    """One command's outcome: for a script, for a person, and the exit code."""

    data: dict[str, Any] | None
    text: str = ""
    code: int = 0


def ask(args: argparse.Namespace) -> Reply:
    picture = _read_picture(args)
    run = _ask(args, _load(args), picture)
    if args.save:
        _write(run.save, args.save)
    data = {
        "answer": run.answer,
        "words": [word.text for word in run.words],
        "tokens": list(run.tokens),  # all of them; `segments` index into these, `logprobs` are of the answer's
        "logprobs": run.logprobs.tolist(),
        "segments": {name: list(span) for name, span in run.segments.items()},
        "model": run.model,
    }
    return Reply(data)


def explain(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    options = read_options(args.option)
    if args.method not in ll.METHODS:
        raise OptionError(f"no method {args.method!r}; the methods are {', '.join(ll.METHODS)}")
    if "seed" in ll.METHODS[args.method].options:
        options.setdefault("seed", args.seed)
    ll.METHODS[args.method].with_defaults(options)  # a misspelt option is said before the model is loaded
    if cli_endpoint.is_closed(args):
        cli_endpoint.refuse_inside(args.method)  # before the question is paid for
    picture = _read_picture(args)
    lab = _load(args)
    run = _ask(args, lab, picture)
    target = read_targets(args.target)
    if cli_endpoint.is_closed(args):
        cli_endpoint.announce(cast(Any, lab), run, args.method, target, options)
    relevance = ll.attribute(lab, run, method=args.method, target=target, **options)
    if args.save:
        _write(relevance.save, args.save)
    if args.out:
        _draw(run, relevance, args.out)
    return Reply(_explanation(run, relevance), _describe(relevance))


def methods(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    fields = ("name", "truth", "source", "cost", "blind_to", "options")
    rows = [{field: getattr(method, field) for field in fields} for method in ll.METHODS.values()]
    text = [f"{row['name']}\n    {row['truth']}\n    options: {_pairs(row['options'])}" for row in rows]
    return Reply({"methods": rows}, "\n".join(text))


def evaluate(args: argparse.Namespace) -> Reply:
    from llava_lab.evaluation import evaluate as score

    how = {"controls": not args.no_controls, "normalise": args.normalised}
    data = score(_load(args), data=args.data, split=args.split, n=args.n, seed=args.seed, **how)
    rows = [("all", data), *data["by_type"].items()]
    lines = [_score_line(name, row) for name, row in rows]
    lines += [_score_line(f"control: {name}", row) for name, row in data.get("controls", {}).items()]
    return Reply(data, "\n".join(lines))


def data(args: argparse.Namespace) -> Reply:
    from llava_lab.worlds.picturebook import write_dataset

    file = _write(lambda out: write_dataset(out, n=args.n, seed=args.seed, split=args.split), args.out)
    return Reply({"data": args.world, "file": str(file), "n": args.n, "split": args.split, "seed": args.seed}, f"wrote {file}")


def bench(args: argparse.Namespace) -> Reply:
    from llava_lab.bench import run

    result = run(args.name, model=args.model, quick=args.quick, layers=args.layers)
    lines = [f"{args.name} on {result['device']}, {result['threads']} threads; floor: {result['floor']:.2f} s"]
    names: tuple[str, ...] = ("name", "seconds", "ratio_to_floor", "ratio_to_peer", "extra_mb", "max_error")
    names += tuple(key for row in result["rows"][:1] for key in row if key not in names)  # what only this benchmark has
    lines += _table(names, [[_short(row.get(name)) for name in names] for row in result["rows"]])
    return Reply(result, "\n".join(lines))


def doctor(args: argparse.Namespace) -> Reply:
    from llava_lab.doctor import examine, render

    if args.model is not None:
        from llava_lab.doctor_model import examine_model, render_model

        compared = examine_model(args.model)
        return Reply(compared, render_model(compared))
    report = examine()
    return Reply(report, render(report))


def lab(args: argparse.Namespace) -> Reply:
    """JupyterLab by run.py where there is one; its own exit code and output are ours."""
    if RUN_PY.is_file():
        chosen = {"--no-browser": args.no_browser, "--check": args.check, "--json": args.json}
        port = [f"--port={args.port}"] if args.port else []
        command = [sys.executable, str(RUN_PY), "lab", *port, *(flag for flag, on in chosen.items() if on)]
    elif importlib.util.find_spec("jupyterlab") is None:
        raise LabError("JupyterLab is not installed; `pip install 'llava-lab[lab]'` brings it")
    elif args.check or args.json:
        raise OptionError("--check and --json belong to a checkout with its lessons; this is an installed package")
    else:
        port = [f"--ServerApp.port={args.port}"] if args.port else []
        command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", *port, *(["--no-browser"] * args.no_browser)]
    return Reply(None, code=subprocess.call(command))


# -- reading what was typed -----------------------------------------------------------------


def read_targets(texts: list[str] | None) -> Any:
    """``words``, ``answer``, a word, ``red/blue`` or ``#3`` as `llava_lab.attribute` wants them."""
    found = [_read_target(text) for text in texts or ["words"]]
    return found[0] if len(found) == 1 else found


def read_options(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; a value is JSON where it parses as such, otherwise text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier() or name in ("lab", "run", "method", "target"):
            raise OptionError(f"--option wants NAME=VALUE with an option of the method, got {pair!r}")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays and tuples as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _read_target(text: str) -> Any:
    said, slash, instead = text.partition("/")
    if slash and said and instead:
        return said, instead
    if text.startswith("#") and text[1:].isdecimal():
        return int(text[1:])
    return text


# -- doing and showing ----------------------------------------------------------------------


def _load(args: argparse.Namespace) -> Lab:
    import llava_lab as ll

    cli_endpoint.refuse(args)
    if cli_endpoint.is_closed(args):
        return cast("Lab", cli_endpoint.load(args))  # the same calls, as far as `ask` and `explain` go
    return ll.load(args.model, device=args.device, dtype=args.dtype)


def _read_picture(args: argparse.Namespace) -> np.ndarray:
    """The picture, before a large model is loaded: a mistyped path should not cost a minute."""
    from llava_lab.models import read_picture

    return read_picture(args.picture)


def _ask(args: argparse.Namespace, lab: Lab, picture: np.ndarray) -> Run:
    """Ask, and show a person the answer while it is made."""
    show = None if args.json else (lambda piece: print(piece, end="", flush=True))
    if cli_endpoint.is_closed(args):
        run = cli_endpoint.ask(args, cast(Any, lab), picture, show)
    else:
        names = ("max_new_tokens", "temperature", "seed", "prompt", "fit")
        run = lab.ask(picture, args.question, **{name: getattr(args, name) for name in names}, on_token=show)
    if show:
        print()
    if run.options.get("stopped") == "interrupted":  # ask gives what it has; a command that was stopped says so
        raise KeyboardInterrupt
    return run


def _write(action: Any, path: str) -> Any:
    """Do `action(path)`, and say in one line when the disk does not allow it."""
    try:
        return action(path)
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror or error}") from None


def _draw(run: Run, relevance: Relevance, path: str) -> None:
    from matplotlib.figure import Figure  # no pyplot: a command line has no windows

    from llava_lab import plots

    if len(relevance.targets) == 1:
        figure = Figure(figsize=(6, 6))
        plots.overlay(run, relevance, ax=figure.subplots())
    else:
        figure = plots.words_figure(run, relevance)
    known = figure.canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in known:
        raise OptionError(f"--out must end in one of {', '.join('.' + kind for kind in known)}, got {path!r}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _write(lambda out: figure.savefig(out, dpi=150, bbox_inches="tight"), path)


def _explanation(run: Run, relevance: Relevance) -> dict[str, Any]:
    where = relevance.map
    picture = {"width": where.width, "height": where.height, "mode": where.mode, "seen_box": list(where.seen_box)}
    return {
        "answer": run.answer,
        "words": [word.text for word in run.words],
        "targets": [target.text for target in relevance.targets],
        "grid": list(relevance.grid),
        "relevance": relevance.values.tolist(),
        "method": relevance.method,
        "options": relevance.options,
        "seconds": relevance.seconds,
        "notes": list(relevance.notes),
        "picture": picture,
    }


def _describe(relevance: Relevance) -> str:
    lines = [f"{relevance.method} ({_pairs(relevance.options)}), {relevance.seconds:.2f} s; strongest patches (row, column):"]
    for index, target in enumerate(relevance.targets):
        top = ", ".join(f"({row}, {col}) {value:.3g}" for row, col, value in relevance.top(3, index))
        lines.append(f"  {target.text}: {top}")
    return "\n".join(lines + [f"note: {note}" for note in relevance.notes])


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "none"


def _score_line(name: str, row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{name:<22} {row['accuracy']:6.1%}  [{low:.1%}, {high:.1%}]  n {row['n']}"


def _table(names: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [list(names), *rows]) for i in range(len(names))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [list(names), *rows]
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
