"""``llava-lab compare``: every method side by side, on one picture or, with ``--data``, on hundreds.

It declares its options, calls `llava_lab.compare` or `llava_lab.leaderboard`, and lays out what they found.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lab.cli_commands import Reply, _load, _table, _write, read_targets
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.scores import Comparison, Leaderboard

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
    from llava_lab.evaluation.leaderboard_table import as_data

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
        from llava_lab import plots_scores
        from llava_lab.scores import Leaderboard

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
