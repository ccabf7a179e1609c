"""``llava-lab ablate``: connectors trained side by side from the same start, and which of them answers better.

    llava-lab ablate --start runs/tiny --out runs/ablation --save ablation.npz

It declares its options, calls `llava_lab.compare_connectors`, and lays out what was found. The same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_lab.cli_commands import Reply, _table, _write
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.results_ablation import Ablation

ABOUT = "train connectors side by side and say which answers better, or that it cannot be told"
STAGES = {"with": (True,), "without": (False,), "both": (True, False)}


def add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """What ``llava-lab ablate`` takes beside the common options; `positive` reads a whole number from 1."""
    parser.add_argument(
        "--connector",
        action="append",
        metavar="NAME[:OPTION=N,...]",
        help="repeatable (default: linear, mlp2x_gelu, and their controls bottleneck and linear2x)",
    )
    parser.add_argument("--data", default="picturebook", help="picturebook (default)")
    parser.add_argument("--start", metavar="FOLDER", help="tower and language model, or our recipe's states (default: --model)")
    parser.add_argument("--language", metavar="FOLDER", help="another language model: a checkpoint, or language.pt of our recipe")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for features and finished runs; goes on where it ends"
    )
    parser.add_argument("--rates", metavar="R,R,R", help="rates to choose from on validation (default: 3e-4,1e-3,3e-3)")
    parser.add_argument("--seeds", type=positive, default=5, help="runs of each connector (default: 5)")
    parser.add_argument("--stage1", choices=STAGES, default="both", help="with or without alignment first (default: both)")
    parser.add_argument("--budget", choices=("samples", "flops", "both"), default="both", help="what is equal (default: both)")
    parser.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="times steps and pictures (default: 1)")
    parser.add_argument("--validation", type=positive, default=200, metavar="N", help="pictures to choose on (default: 200)")
    parser.add_argument("--test", type=positive, default=300, metavar="N", help="pictures of each test split (default: 300)")
    parser.add_argument("--no-keep", action="store_true", help="do not save the models of the first seed")
    parser.add_argument("--compile", action="store_true", help="fuse small operations (faster; needs a C++ compiler)")
    parser.add_argument("--save", metavar="FILE", help="keep the result in one .npz file")


def ablate(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    given: dict[str, Any] = {"rates": read_rates(args.rates)} if args.rates else {}
    if args.connector:
        given["connectors"] = args.connector
    if args.budget != "both":
        given["budgets"] = (args.budget,)
    result = ll.compare_connectors(
        data=args.data,
        start=args.start or args.model,
        language=args.language,
        out=args.out,
        seeds=args.seeds,
        stage1=STAGES[args.stage1],
        steps_scale=args.steps_scale,
        validation=args.validation,
        test=args.test,
        keep=not args.no_keep,
        fused=args.compile,
        seed=args.seed,
        **given,
    )
    if args.save:
        _write(result.save, args.save)
    return Reply(as_data(result), as_text(result))


def read_rates(text: str) -> tuple[float, ...]:
    """``3e-4,1e-3,3e-3`` as numbers. Raises OptionError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--rates wants numbers with commas between them, got {text!r}") from None


def as_data(result: Ablation) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "model": result.model,
        "seeds": list(result.seeds),
        "splits": {
            split: {
                "arms": result.scores(split=split),
                "comparisons": result.rows(split=split),
                "by_type": {type: result.rows(split=split, type=type) for type in result.types[1:]},  # noqa: A001
            }
            for split in result.splits
        },
        "sweep": {"rates": result.sweep_rates, "loss": result.sweep_loss, "accuracy": result.sweep_accuracy},
        "start": result.start,
        "seconds": result.seconds,
        "notes": list(result.notes),
    }


def as_text(result: Ablation) -> str:
    """Scores, then every comparison in a sentence, split by split."""
    lines = [f"{result.model}: {len(result.seeds)} seeds, rates chosen on validation, accuracies in percent"]
    names = ("connector", "budget", "stage 1", "parameters", "rate", "steps", "accuracy (95%)", "over seeds", *result.types[1:])
    for x, split in enumerate(result.splits):
        cells = [
            [
                row["connector"],
                row["budget"],
                "yes" if row["stage1"] else "no",
                f"{row['parameters']:,}",
                f"{row['rate']:g}",
                "+".join(map(str, row["steps"])),
                f"{_percent(row['accuracy'])} [{_percent(row['interval'][0])}, {_percent(row['interval'][1])}]",
                f"+-{_percent(row['sd'])}",
                *(_percent(value) for value in row["by_type"].values()),
            ]
            for row in result.scores(split=split)
        ]
        lines += ["", f"{split}: {int(result.questions[x, 0]):,} questions", *_table(names, cells), ""]
        for row in result.rows(split=split):
            lines.append(
                f"{row['text']}; McNemar on the pooled seeds: +{row['gained']} -{row['lost']}, p = {row['mcnemar_p']:.2g}"
            )
    return "\n".join([*lines, "", *result.notes])


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if value == value else "-"
