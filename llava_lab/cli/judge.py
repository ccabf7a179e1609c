"""The commands that judge: methods side by side, sanity of one method, a model's score on a data set, and a report.

    llava-lab compare car.png "What color is the car?" --methods rollout,occlusion --save comparison.npz --save-run run.npz
    llava-lab compare --data picturebook --n 200 --out board.jsonl
    llava-lab prune --data picturebook --keep 9,18,36,72
    llava-lab sanity car.png "What color is the car?" --method rollout
    llava-lab evaluate --data picturebook
    llava-lab evaluate --benchmark pope --data playground/data/eval/pope
    llava-lab report run.npz --compare comparison.npz

This package computes and never imports the one that shows. What writes a report is found by the entry-point group
`GROUP`, which the distribution declares in pyproject.toml (``widgets.report:write``); where nothing offers one,
the command says how to install it. The writer is called as ``write(path, run, maps=, comparison=, heads=, title=,
versions=)`` and returns the path; what it refuses (a ValueError or TypeError) is the user's to mend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lab.bridge import offered
from llava_lab.cli import common
from llava_lab.cli.common import FIGURES, Add, Reply, positive
from llava_lab.errors import LabError, OptionError

if TYPE_CHECKING:
    from llava_lab.results import Comparison, Effect, Relevance, Run, Sanity

GROUP = "llava_lab.report"


def add_commands(add: Add) -> None:
    command = add("compare", compare, "which map to trust: methods side by side, with scores, controls and cost")
    command.add_argument("picture", nargs="?", help="an image file; without one, give --data")
    command.add_argument("question", nargs="?")
    command.add_argument("--methods", default="all", help="all (default), or names with commas between them")
    command.add_argument("--target", metavar="WHAT", help="a word of the answer, RED/BLUE, #N, or answer (default); one picture")
    command.add_argument("--data", help="score on many pictures whose truth is known: picturebook, or photos with --pictures")
    command.add_argument("--pictures", metavar="FOLDER", help="of --data photos: photographs with outlines and classes.txt")
    command.add_argument("--split", default="test", help="of --data (default: test)")
    command.add_argument("--n", type=positive, default=200, help="pictures of --data (default: 200)")
    command.add_argument("--out", metavar="FILE", help="with --data: one JSON line per finished picture; goes on where it ends")
    command.add_argument("--steps", type=positive, help="steps of a deletion or insertion curve (default: 8, with --data 5)")
    command.add_argument("--seeds", type=positive, help="random rankings per picture (default: 10, with --data 4)")
    command.add_argument("--workers", type=positive, default=1, help="processes that share the pictures of --data (default: 1)")
    common.add_output(command, "--save", "keep the result in one .npz file")
    common.add_output(command, "--save-run", "keep the run as well, for `llava-lab report`; one picture")
    common.add_output(command, "--figure", "draw it (.png, .svg, .pdf)")

    command = add(
        "prune", prune, "keep k image tokens by a map's ranking, or by FastV's or VisionZip's rule, and see what is left"
    )
    command.add_argument("picture", nargs="?", help="an image file; without one, give --data")
    command.add_argument("question", nargs="?")
    command.add_argument(
        "--keep", metavar="K[,K...]", help="image tokens kept (with --data by default 1/16, 1/8, 1/4 and 1/2 of them)"
    )
    command.add_argument("--by", metavar="NAMES", help="fastv, visionzip, truth (with --data), random, or methods, with commas")
    command.add_argument("--at", metavar="LAYER", default="2", help="layers that still see all, or projector (default: 2)")
    command.add_argument("--data", choices=("picturebook",), help="share of right answers on many drawn pictures")
    command.add_argument("--split", default="test", help="of --data (default: test)")
    command.add_argument("--n", type=positive, default=40, help="pictures of --data (default: 40)")
    common.add_output(command, "--save", "keep the result in one .npz file")
    common.add_output(command, "--figure", "draw it (.png, .svg, .pdf); with --data")

    about = "does a map change when the model or the question does: similarity curves with their controls"
    command = add("sanity", sanity, about)
    command.add_argument("picture", help="an image file")
    command.add_argument("question")
    common.add_method(command)
    command.add_argument("--target", metavar="WHAT", help="a word of the answer, RED/BLUE, #N, or answer (default)")
    command.add_argument("--groups", type=positive, default=8, help="steps the language model is randomised in (default: 8)")
    command.add_argument(
        "--ask", action="append", metavar="QUESTION", help="ask this instead (default: two of our own); repeatable"
    )
    common.add_output(command, "--save", "keep the result in one .npz file")
    common.add_output(command, "--figure", f"draw the curves ({', '.join(FIGURES)})")

    command = add("evaluate", evaluate, "score a model on a data set, beside its controls")
    command.add_argument("--data", default="picturebook", help="picturebook (default), easy-vqa, photos, or a LLaVA .json file")
    command.add_argument("--pictures", metavar="FOLDER", help="of --data photos: photographs named by what they show")
    command.add_argument("--split", default="test", help="default: test")
    command.add_argument("--n", type=positive, help="pictures (default: 2000; of a benchmark's files all, of its drawn twin 200)")
    command.add_argument("--normalised", action="store_true", help="compare after lower case, articles, full stop, numbers")
    command.add_argument("--no-controls", action="store_true", help="leave out blind, shuffled and majority")
    command.add_argument("--save", metavar="FILE", help="of --benchmark: keep the scores in one .npz file")
    command.add_argument("--benchmark", metavar="NAME", help="pope, mme, ... as LLaVA-1.5 was scored, on --data PATH; or: list")
    command.add_argument("--batch", type=positive, help="of --benchmark: questions at a time (default: 128)")
    command.add_argument("--answers", metavar="FILE", help="of --benchmark: keep the answers as LLaVA's jsonl")
    command.add_argument("--score", metavar="FILE", help="of --benchmark: score the answers in this jsonl, ask no model")
    command.add_argument("--submission", metavar="FILE", help="of --benchmark: what its server or script takes")
    command.add_argument("--judge", metavar="NAME", help="of free answers: a model's name at --judge-url, or rule (no model)")
    command.add_argument("--judge-url", metavar="ADDRESS", help="an OpenAI-compatible address, such as http://127.0.0.1:8000/v1")
    command.add_argument("--judge-key-variable", metavar="NAME", help="environment variable with its key (OPENAI_API_KEY)")
    command.add_argument("--max-requests", type=positive, help="to the judge, retries too (default: 500)")

    command = add("report", report, "a saved run and its maps as one HTML file: no server, no network", "nothing")
    command.add_argument("saved", metavar="RUN", help="a run kept by `llava-lab ask --save` or `llava-lab compare --save-run`")
    common.add_output(command, "--out", "default: report.html", "report.html")
    command.add_argument("--maps", metavar="FILE", nargs="+", default=[], help="maps kept by `llava-lab explain --save`")
    command.add_argument("--compare", metavar="FILE", help="a comparison kept by `llava-lab compare --save`")
    command.add_argument("--heads", metavar="FILE", help="head maps kept by `llava_lab.head_maps(...).save(...)`")
    command.add_argument("--title", help="of the page (default: the question)")


# -- compare --------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> Reply:
    if (args.picture is None) == (args.data is None):
        raise OptionError("compare wants either a picture and a question, or --data picturebook")
    common.check_figure(args.figure)
    return _compare_many(args) if args.data is not None else _compare_one(args)


def _compare_one(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    if args.question is None:
        raise OptionError("compare wants a question after the picture")
    if args.out:
        raise OptionError("--out keeps the lines of --data; use --save or --figure for one picture")
    methods = _read_methods(args.methods)
    picture = common.read_picture(args)
    lab = common.load(args)
    run = common.ask(args, lab, picture, show=False)
    result = ll.compare(lab, run, methods, target=common.read_target(args.target), seed=args.seed, **_numbers(args))
    common.save(run, args.save_run)
    told = {"answer": run.answer, "cut": run.cut, "model": run.model}
    return common.finished(args, result, lambda plots: plots.comparison(result), text=_under_answer(run, result), **told)


def _compare_many(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    if args.target:
        raise OptionError("--target is for one picture; with --data the word that answers each question is explained")
    if args.save_run:
        raise OptionError("--save-run is for one picture; with --data there is no one run to keep")
    methods, lab = _read_methods(args.methods), common.load(args)
    options: dict[str, Any] = {"data": args.data, "split": args.split, "n": args.n, "seed": args.seed, "workers": args.workers}
    options |= {"pictures": args.pictures} if args.pictures else {}
    board = ll.leaderboard(lab, methods=methods, out=args.out, **options, **_numbers(args))
    common.save(board, args.save)
    if args.figure:
        from llava_lab.plots import scores as plots

        common.save_figure(plots.leaderboard(board), args.figure)
    return Reply(board.to_dict(), str(board.table()), code=130 if board.about["interrupted"] else 0)


def _numbers(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers that were given; each function has its own defaults."""
    return {name: getattr(args, name) for name in ("steps", "seeds") if getattr(args, name) is not None}


def _read_methods(text: str) -> str | list[str]:
    """``--methods``, checked before a model is loaded."""
    import llava_lab as ll
    from llava_lab.checks import known

    if text == "all":
        return text
    names = [known("method", name.strip(), ll.METHODS) for name in text.split(",") if name.strip()]
    if not names:
        raise OptionError(f"--methods wants all, or names with commas between them; the methods are {', '.join(ll.METHODS)}")
    return names


def _under_answer(run: Run, result: Comparison | Sanity | Effect) -> str:
    """The result's table, with the answer before its title."""
    table = result.table()
    return str(table.titled(f"{run.answer_shown}  ({table.title})"))


# -- sanity ---------------------------------------------------------------------------------


def sanity(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    common.check_figure(args.figure)
    options = common.read_method(args)
    picture = common.read_picture(args)
    lab = common.load(args)
    run = common.ask(args, lab, picture, show=False)
    settings: dict[str, Any] = {"groups": args.groups, "questions": args.ask, "seed": args.seed}
    result = ll.sanity(lab, run, args.method, target=common.read_target(args.target), options=options, **settings)
    common.save(result, args.save)
    if args.figure:
        from matplotlib.figure import Figure  # no pyplot: a command line has no windows

        from llava_lab.plots import scores as plots

        figure = Figure(figsize=(6, 4), layout="constrained")
        plots.sanity(result, ax=figure.subplots())
        common.save_figure(figure, args.figure)
    curves = result.to_dict()
    data = {
        "answer": run.answer,
        "cut": run.cut,
        **{name: curves[name] for name in ("method", "targets", "passed", "verdict", "control")},
        # `model` is the model's name in every command's data; the two tests' curves stand side by side here
        "curves": {"model": curves["model"], "question": curves["question"]},
        "notes": list(result.notes),
        "seconds": result.seconds,
        "model": run.model,
    }
    return Reply(data, _under_answer(run, result), code=130 if result.interrupted else 0)


# -- evaluate -------------------------------------------------------------------------------


PICTURES = 2000  # evaluated, without a benchmark
OF_BENCHMARK = ("save", "batch", "answers", "score", "submission", "judge", "judge_url", "judge_key_variable", "max_requests")


def evaluate(args: argparse.Namespace) -> Reply:
    if args.benchmark is not None:
        return _benchmark(args)
    if given := [name for name in OF_BENCHMARK if getattr(args, name) is not None]:
        raise OptionError(f"--{given[0].replace('_', '-')} belongs to --benchmark NAME")
    from llava_lab.evaluation import evaluate as score

    options: dict[str, Any] = {"controls": not args.no_controls, "normalise": args.normalised}
    options |= {"pictures": args.pictures} if args.pictures else {}
    data = score(common.load(args), data=args.data, split=args.split, n=args.n or PICTURES, seed=args.seed, **options)
    controls = {f"control: {name}": row for name, row in data.get("controls", {}).items()}
    lines = []
    ceiling = {f"tower alone: {name}": row for name, row in data.get("ceiling", {}).get("by_type", {}).items()}
    for name, row in {"all": data, **data["by_type"], **ceiling, **controls}.items():
        low, high = row["interval"]
        sure = row.get("calibration", {}).get("confidence")
        told = "" if sure is None else f"  confidence {sure:.0%}"
        lines.append(f"{name:<27} {row['accuracy']:6.1%}  [{low:.1%}, {high:.1%}]  n {row['n']}{told}")
    return Reply(data, "\n".join(lines))


def _benchmark(args: argparse.Namespace) -> Reply:
    from llava_lab.checks import known
    from llava_lab.evaluation import benchmarks
    from llava_lab.results.table import Table

    if args.benchmark == "list":
        fields = ("name", "title", "asks", "files", "source")
        rows = [{field: getattr(one, field) for field in fields} for one in benchmarks.BENCHMARKS.values()]
        table = Table(("name", "title", "what is asked"), tuple((row["name"], row["title"], row["asks"]) for row in rows))
        return Reply({"benchmarks": rows}, str(table))
    name = known("benchmark", args.benchmark, benchmarks.BENCHMARKS)
    if args.normalised or args.pictures:
        raise OptionError("--normalised and --pictures are of evaluate without --benchmark; a benchmark compares in its own way")
    judge, drawn = _read_judge(args), {"split": args.split, "seed": args.seed, "n": args.n}
    if args.score is not None:
        if args.answers or args.submission:
            raise OptionError("--answers and --submission keep what a model answered; with --score there is none")
        questions = benchmarks.load_questions(name, args.data, **drawn)
        said = benchmarks.read_answers(args.score, questions)
        result = benchmarks.score_benchmark(name, questions, said, judge=judge, seed=args.seed, data=args.data)
    else:
        kept = {option: getattr(args, option) for option in ("batch", "answers", "submission") if getattr(args, option)}
        controls = not args.no_controls
        result = benchmarks.benchmark(common.load(args), name, data=args.data, judge=judge, controls=controls, **drawn, **kept)
    return common.finished(args, result)


def _read_judge(args: argparse.Namespace) -> Any:
    """The judge of ``--judge``, if there is one. Raises OptionError for options that do not go together."""
    remote = {"judge_url": args.judge_url, "judge_key_variable": args.judge_key_variable, "max_requests": args.max_requests}
    if args.judge is None or args.judge == "rule":
        if given := [name for name, value in remote.items() if value is not None]:
            raise OptionError(f"--{given[0].replace('_', '-')} belongs to --judge NAME")
        if args.judge is None:
            return None
        from llava_lab.evaluation.benchmarks import by_rule

        return by_rule()
    if args.judge_url is None:
        raise OptionError(f"--judge {args.judge} needs --judge-url, the address it answers at; --judge rule needs none")
    from llava_lab.remote import open_judge

    limits = {} if args.max_requests is None else {"max_requests": args.max_requests}
    return open_judge(args.judge, args.judge_url, key_variable=args.judge_key_variable, **limits)


def prune(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    if (args.picture is None) == (args.data is None):
        raise OptionError("prune wants either a picture and a question, or --data picturebook")
    common.check_figure(args.figure)
    at: Any = args.at if args.at == "projector" else common.read_value(args.at)
    keeps, names = _whole_numbers(args.keep), tuple(args.by.split(",")) if args.by else None
    if args.data is not None:
        options: dict[str, Any] = {"n": args.n, "split": args.split, "at": at, "seed": args.seed, "progress": not args.json}
        options |= {"by": names} if names else {}
        result = ll.prune_sweep(common.load(args), keeps=keeps, **options)
        return common.finished(args, result, lambda plots: plots.pruning(result).figure)
    if args.question is None or keeps is None or len(keeps) != 1 or (names and len(names) != 1):
        raise OptionError("of one picture prune wants a question, one number after --keep, and one name after --by")
    picture = common.read_picture(args)
    lab = common.load(args)
    run = common.ask(args, lab, picture, show=False)
    effect = ll.prune(lab, run, keep=keeps[0], by=names[0] if names else "fastv", at=at, seed=args.seed)
    return common.finished(args, effect, text=_under_answer(run, effect), answer=run.answer)


def _whole_numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--keep wants whole numbers with commas between them, got {text!r}") from None


# -- report ---------------------------------------------------------------------------------


def report(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    if Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--out wants a file ending in .html, got {args.out!r}")
    writer = find_writer()
    run = ll.Run.load(args.saved)
    parts: dict[str, Any] = {
        "maps": _by_name(ll.Relevance.load(path) for path in args.maps),
        "comparison": ll.Comparison.load(args.compare) if args.compare else None,
        "heads": ll.HeadMaps.load(args.heads) if args.heads else None,
        "title": args.title,
        "versions": {"llava-lab": ll.__version__},
    }
    try:
        path = common.write(lambda out: writer(out, run, **parts), args.out)
    except LabError:
        raise
    except (ValueError, TypeError) as error:
        raise LabError(str(error)) from None
    size = Path(path).stat().st_size
    data = {"out": str(path), "bytes": size, "question": run.question, "answer": run.answer, "model": run.model}
    return Reply(data, f"wrote {path}, {size / 1e6:.1f} MB; open it in any browser")


def find_writer() -> Callable[..., Any]:
    """The function that writes a report. Raises LabError where none is installed or it cannot be loaded."""
    return offered(GROUP, "widgets.report:write", "write a report")


def _by_name(maps: Iterable[Relevance]) -> dict[str, Relevance]:
    """Maps by their method's name, the second of a name as "rollout 2"."""
    named: dict[str, Relevance] = {}
    for relevance in maps:
        name, count = relevance.method, 2
        while name in named:
            name, count = f"{relevance.method} {count}", count + 1
        named[name] = relevance
    return named
