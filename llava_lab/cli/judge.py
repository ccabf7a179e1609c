"""``llava-lab compare``: every method side by side, on one picture or, with ``--data``, on hundreds.

It declares its options, calls `llava_lab.compare` or `llava_lab.leaderboard`, and lays out what they found.

``llava-lab sanity``: does a method's map change when the model, or the question, is not what it was?

It declares its options, calls `llava_lab.sanity`, and lays out the curves with what they mean.

``llava-lab report``: a saved run and what was saved about it, as one HTML file that opens anywhere.

This package computes and never imports the one that shows. The writer is found by the entry-point group
`GROUP`, which the distribution declares in pyproject.toml (``widgets.report:write``); where nothing offers one,
the command says how to install it. The writer is called as ``write(path, run, maps=, comparison=, heads=, title=,
versions=)`` and returns the path; what it refuses (a ValueError or TypeError) is the user's to mend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lab.cli.ask import Reply, _load, _table, _write, read_options, read_targets
from llava_lab.errors import LabError, OptionError

if TYPE_CHECKING:
    from llava_lab.results import Comparison, Leaderboard, Relevance, Sanity

ABOUT = "which map to trust: methods side by side, with scores, controls and cost"
FIGURES = (".png", ".svg", ".pdf")
BETTER = {True: "yes", False: "no"}


def add_options(parser: argparse.ArgumentParser, positive: Any) -> None:
    """What ``llava-lab compare`` takes beside the common options; `positive` reads a whole number from 1."""
    parser.add_argument("picture", nargs="?", help="an image file; without one, give --data")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--methods", default="all", help="all (default), or names with commas between them")
    parser.add_argument("--target", metavar="WHAT", help="a word of the answer, RED/BLUE, #N, or answer (default); one picture")
    parser.add_argument("--data", help="picturebook: score on many drawn pictures whose truth is known")
    parser.add_argument("--split", default="test", help="of --data (default: test)")
    parser.add_argument("--n", type=positive, default=200, help="pictures of --data (default: 200)")
    parser.add_argument("--out", metavar="FILE", help="with --data: one JSON line per finished picture; goes on where it ends")
    parser.add_argument("--steps", type=positive, help="steps of a deletion or insertion curve (default: 8, with --data 5)")
    parser.add_argument("--seeds", type=positive, help="random rankings per picture (default: 10, with --data 4)")
    parser.add_argument("--workers", type=positive, default=1, help="processes that share the pictures of --data (default: 1)")
    parser.add_argument("--save", metavar="FILE", help="keep the result in one .npz file")
    parser.add_argument("--save-run", metavar="FILE", help="keep the run as well, for `llava-lab report`; one picture")
    parser.add_argument("--figure", metavar="FILE", help="draw it (.png, .svg, .pdf)")


def compare(args: argparse.Namespace) -> Reply:
    if (args.picture is None) == (args.data is None):
        raise OptionError("compare wants either a picture and a question, or --data picturebook")
    if args.figure and not args.figure.lower().endswith(FIGURES):
        raise OptionError(f"--figure wants a file ending in {', '.join(FIGURES)}, got {args.figure!r}")
    return _many(args) if args.data is not None else _one(args)


def _one(args: argparse.Namespace) -> Reply:
    import llava_lab as ll
    from llava_lab.models import read_picture

    if args.question is None:
        raise OptionError("compare wants a question after the picture")
    if args.out:
        raise OptionError("--out keeps the lines of --data; use --save or --figure for one picture")
    methods = _methods(args.methods)
    picture = read_picture(args.picture)
    lab = _load(args)
    run = lab.ask(picture, args.question, seed=args.seed)
    if run.options.get("stopped") == "interrupted":
        raise KeyboardInterrupt
    settings: dict[str, Any] = {"seed": args.seed, **_given(args)}
    target = read_targets([args.target]) if args.target else None
    result = ll.compare(lab, run, methods, target=target, **settings)
    _keep(args, result)
    if args.save_run:
        _write(run.save, args.save_run)
    rows = result.rows()
    agreement: dict[str, Any] = {
        "methods": list(result.methods),
        "spearman": result.spearman,
        "overlap": result.overlap,
        "top": result.top,
    }
    data: dict[str, Any] = {"answer": run.answer, "target": result.targets[0].text, "rows": rows, "refused": result.refused}
    data |= {"agreement": agreement, "notes": list(result.notes), "seconds": result.seconds, "model": run.model}
    return Reply(data, _example_text(run.answer, result, rows), code=130 if result.interrupted else 0)


def _many(args: argparse.Namespace) -> Reply:
    import llava_lab as ll
    from llava_lab.judging.leaderboard import as_data

    if args.target:
        raise OptionError("--target is for one picture; with --data the word that answers each question is explained")
    settings: dict[str, Any] = {"data": args.data, "split": args.split, "n": args.n, "seed": args.seed, **_given(args)}
    settings["workers"] = args.workers
    if args.save_run:
        raise OptionError("--save-run is for one picture; with --data there is no one run to keep")
    methods, lab = _methods(args.methods), _load(args)
    board = ll.leaderboard(lab, methods=methods, out=args.out, **settings)
    _keep(args, board)
    return Reply(as_data(board), leaderboard_text(board), code=130 if board.about["interrupted"] else 0)


def _given(args: argparse.Namespace) -> dict[str, int]:
    """The numbers that were given; each function has its own defaults."""
    return {name: getattr(args, name) for name in ("steps", "seeds") if getattr(args, name) is not None}


def _methods(text: str) -> str | list[str]:
    """``--methods``, checked before a model is loaded."""
    import llava_lab as ll

    if text == "all":
        return text
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ll.METHODS:
            raise OptionError(f"no method {name!r}; the methods are {', '.join(ll.METHODS)}")
    if not names:
        raise OptionError(f"--methods wants all, or names with commas between them; the methods are {', '.join(ll.METHODS)}")
    return names


def _keep(args: argparse.Namespace, result: Comparison | Leaderboard) -> None:
    if args.save:
        _write(result.save, args.save)
    if args.figure:
        from llava_lab.plots import scores as plots_scores
        from llava_lab.results import Leaderboard

        Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
        figure = plots_scores.leaderboard(result) if isinstance(result, Leaderboard) else plots_scores.comparison(result)
        _write(lambda path: figure.savefig(path, dpi=150), args.figure)


def _example_text(answer: str, result: Comparison, rows: list[dict[str, Any]]) -> str:
    names = ("method", "gain", "deletion", "insertion", "beats random", "passes", "seconds")
    cells = [
        [row["method"], *(_number(row[part]) for part in ("gain", "deletion", "insertion")), BETTER[row["beats_random"]],
         str(sum(row["passes"].values())), f"{row['seconds']:.2f}"]
        for row in rows
    ]  # fmt: skip
    lines = [f"{answer}  (explained: {result.targets[0].text!r})", *_table(names, cells)]
    return "\n".join([*lines, *_refusals(result.refused), *result.notes])


def leaderboard_text(board: Leaderboard) -> str:
    """The table for a terminal: faithfulness first, the world's truth in columns of their own, then the gain by type."""
    about = board.about
    lines = [
        f"{about['model']} on {about['data']} {about['split']}: {about['explained']} of {about['pictures']} pictures "
        f"explained; {about['asked']} questions asked, {about['wrong']} answered wrong, {about['blind']} without the picture"
    ]
    measures = ("gain", "deletion", "insertion", "better", "object", "pointing", "mass", "auc", "iou", "seconds")
    names = ("method", "gain (95%)", *measures[1:])
    cells = [
        [name, _with_interval(board.at(name, "gain")), *(_number(board.at(name, part)["mean"]) for part in measures[1:])]
        for name in board.order("gain")
    ]
    lines += _table(names, cells)
    for measure in ("gain", "pointing"):
        by_type = [
            [name, *(_number(board.at(name, measure, kind)["mean"]) for kind in board.types)] for name in board.order("gain")
        ]
        lines += ["", *_table((measure, *board.types), by_type)]
    return "\n".join([*lines, *_refusals(board.refused)])


def _refusals(refused: Mapping[str, str]) -> list[str]:
    return [f"{name} refused: {reason}" for name, reason in refused.items()]


def _with_interval(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{_number(cell['mean'])} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "-"


ABOUT_CLI_SANITY = "does a map change when the model or the question does: similarity curves with their controls"


def add_options_cli_sanity(parser: argparse.ArgumentParser, positive: Any) -> None:
    """What ``llava-lab sanity`` takes beside the common options; `positive` reads a whole number from 1."""
    parser.add_argument("picture", help="an image file")
    parser.add_argument("question")
    parser.add_argument("--method", default="rollout", help="one of `llava-lab methods` (default: rollout)")
    parser.add_argument("--target", metavar="WHAT", help="a word of the answer, RED/BLUE, #N, or answer (default)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method; repeatable")
    parser.add_argument("--groups", type=positive, default=8, help="steps the language model is randomised in (default: 8)")
    parser.add_argument(
        "--ask", action="append", metavar="QUESTION", help="ask this instead (default: two of our own); repeatable"
    )
    parser.add_argument("--save", metavar="FILE", help="keep the result in one .npz file")
    parser.add_argument("--figure", metavar="FILE", help=f"draw the curves ({', '.join(FIGURES)})")


def sanity(args: argparse.Namespace) -> Reply:
    import llava_lab as ll
    from llava_lab.models import read_picture

    if args.figure and not args.figure.lower().endswith(FIGURES):
        raise OptionError(f"--figure wants a file ending in {', '.join(FIGURES)}, got {args.figure!r}")
    options = read_options(args.option)
    if args.method not in ll.METHODS:
        raise OptionError(f"no method {args.method!r}; the methods are {', '.join(ll.METHODS)}")
    if "seed" in ll.METHODS[args.method].options:
        options.setdefault("seed", args.seed)
    ll.METHODS[args.method].with_defaults(options)  # a misspelt option is said before the model is loaded
    picture = read_picture(args.picture)
    lab = _load(args)
    run = lab.ask(picture, args.question, seed=args.seed)
    if run.options.get("stopped") == "interrupted":
        raise KeyboardInterrupt
    target = read_targets([args.target]) if args.target else None
    settings: dict[str, Any] = {"groups": args.groups, "questions": args.ask, "seed": args.seed}
    result = ll.sanity(lab, run, args.method, target=target, options=options, **settings)
    if args.save:
        _write(result.save, args.save)
    if args.figure:
        _draw(result, args.figure)
    about = {"answer": run.answer, "notes": list(result.notes), "seconds": result.seconds, "model": run.model}
    # `model` is the model's name in every command's data; the two tests' curves stand side by side here
    found = result.to_dict()
    data = {name: found[name] for name in ("method", "targets", "passed", "verdict", "control")}
    data |= {"curves": {"model": found["model"], "question": found["question"]}, **about}
    return Reply(data, text(run.answer, result), code=130 if result.interrupted else 0)


def _draw(result: Sanity, path: str) -> None:
    from matplotlib.figure import Figure  # no pyplot: a command line has no windows

    from llava_lab.plots import scores as plots_scores

    figure = Figure(figsize=(6, 4), layout="constrained")
    plots_scores.sanity(result, ax=figure.subplots())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _write(lambda out: figure.savefig(out, dpi=150), path)


def text(answer: str, result: Sanity) -> str:
    """The curves as a table for a terminal, means over the targets, then the verdict."""
    curves = [
        *(("model", name, result.spearman[i], result.overlap[i]) for i, name in enumerate(result.steps)),
        *(("question", name, result.question_spearman[i], result.question_overlap[i]) for i, name in enumerate(result.questions)),
    ]
    cells = [[test, name, f"{rank.mean():.2f}", f"{top.mean():.2f}"] for test, name, rank, top in curves]
    table = _table(("test", "randomised so far, or asked instead", "rank correlation", f"same top {result.top}"), cells)
    control = (
        f"unrelated maps stay below a rank correlation of {result.limit.mean():.2f} and share {result.chance:.2f} of the top"
    )
    verdict = ", ".join(f"{test} {how}" for test, how in result.verdict.items())
    explained = ", ".join(repr(target.text) for target in result.targets)
    lines = [f"{answer}  ({result.method}, explained: {explained})", *table, control]
    lines.append(f"{'passed' if result.passed else 'not passed'}: {verdict}")
    return "\n".join([*lines, *result.notes])


ABOUT_CLI_REPORT = "a saved run and its maps as one HTML file: no server, no network"
GROUP = "llava_lab.report"
INSTALL = "`pip install 'llava-lab[lab]'` brings it, in a checkout `python3 run.py install`"


def add_options_cli_report(parser: argparse.ArgumentParser) -> None:
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
