"""``llava-lab sanity``: does a method's map change when the model, or the question, is not what it was?

It declares its options, calls `llava_lab.sanity`, and lays out the curves with what they mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lab.cli_commands import Reply, _load, _table, _write, read_options, read_targets
from llava_lab.cli_compare import FIGURES
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.scores_sanity import Sanity

ABOUT = "does a map change when the model or the question does: similarity curves with their controls"


def add_options(parser: argparse.ArgumentParser, positive: Any) -> None:
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

    from llava_lab import plots_scores

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
