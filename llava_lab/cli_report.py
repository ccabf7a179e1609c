"""``llava-lab report``: a saved run and what was saved about it, as one HTML file that opens anywhere.

This package computes and never imports the one that shows. The writer is found by the entry-point group
`GROUP`, which the distribution declares in pyproject.toml (``widgets.report:write``); where nothing offers one,
the command says how to install it. The writer is called as ``write(path, run, maps=, comparison=, heads=, title=,
versions=)`` and returns the path; what it refuses (a ValueError or TypeError) is the user's to mend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lab.cli_commands import Reply, _write
from llava_lab.errors import LabError, OptionError

if TYPE_CHECKING:
    from llava_lab.results import Relevance

ABOUT = "a saved run and its maps as one HTML file: no server, no network"
GROUP = "llava_lab.report"
INSTALL = "`pip install 'llava-lab[lab]'` brings it, in a checkout `python3 run.py install`"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What ``llava-lab report`` takes beside the common options."""
    parser.add_argument("saved", metavar="RUN", help="a run kept by `llava-lab ask --save` or `llava-lab compare --save-run`")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="default: report.html")
    parser.add_argument("--maps", metavar="FILE", nargs="+", default=[], help="maps kept by `llava-lab explain --save`")
    parser.add_argument("--compare", metavar="FILE", help="a comparison kept by `llava-lab compare --save`")
    parser.add_argument("--heads", metavar="FILE", help="head maps kept by `llava_lab.head_maps(...).save(...)`")
    parser.add_argument("--title", help="of the page (default: the question)")


def report(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    if Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--out wants a file ending in .html, got {args.out!r}")
    writer = find_writer()
    run = ll.Run.load(args.saved)
    given = {
        "maps": by_name(ll.Relevance.load(path) for path in args.maps),
        "comparison": ll.Comparison.load(args.compare) if args.compare else None,
        "heads": ll.HeadMaps.load(args.heads) if args.heads else None,
    }
    versions = {"llava-lab": ll.__version__}
    try:
        path = _write(lambda out: writer(out, run, **given, title=args.title, versions=versions), args.out)
    except LabError:
        raise
    except (ValueError, TypeError) as error:
        raise LabError(str(error)) from None
    size = Path(path).stat().st_size
    data = {"out": str(path), "bytes": size, "question": run.question, "answer": run.answer, "model": run.model}
    return Reply(data, f"wrote {path}, {size / 1e6:.1f} MB; open it in any browser")


def find_writer() -> Callable[..., Any]:
    """The function that writes a report. Raises LabError where none is installed or it cannot be loaded."""
    offered = sorted(entry_points(group=GROUP), key=lambda point: point.value != "widgets.report:write")
    if not offered:
        raise LabError(f"nothing here can write a report (no entry point {GROUP!r}); {INSTALL}")
    try:
        return offered[0].load()
    except (ImportError, AttributeError) as error:
        raise LabError(f"the writer of reports cannot be loaded ({error}); {INSTALL}") from None


def by_name(maps: Iterable[Relevance]) -> dict[str, Relevance]:
    """Maps by their method's name, the second of a name as "rollout 2"."""
    named: dict[str, Relevance] = {}
    for rel in maps:
        name, count = rel.method, 2
        while name in named:
            name, count = f"{rel.method} {count}", count + 1
        named[name] = rel
    return named
