"""``llava-lab knockout``: cut attention and see what happens to the answer; with ``--sweep``, flow by flow and layer by layer.

It declares its options, calls `llava_lab.interventions`, and lays out what they found.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from llava_lab.cli_commands import Reply, _load, _table, _write, read_targets
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.results_interventions import Effect, FlowSweep

ABOUT = "cut attention between parts of the sequence, and see what happens to the answer"
PATCHES = re.compile(r"\d+,\d+(;\d+,\d+)*")


def add_options(parser: argparse.ArgumentParser, positive: Any) -> None:
    """What ``llava-lab knockout`` takes beside the common options; `positive` reads a whole number from 1."""
    parser.add_argument("picture", help="an image file")
    parser.add_argument("question")
    places = "a segment (image, question, ...), last, all, or patches as ROW,COL;ROW,COL"
    parser.add_argument("--source", default="image", metavar="WHERE", help=f"what may not be read: {places} (default: image)")
    parser.add_argument("--to", default="last", metavar="WHERE", help="who may not read it, likewise (default: last)")
    parser.add_argument("--layers", metavar="START:STOP", help="default: all layers")
    parser.add_argument("--target", metavar="WHAT", help="what is scored: a word, RED/BLUE, #N, or answer (default)")
    parser.add_argument("--draws", type=positive, default=20, help="random controls (default: 20)")
    parser.add_argument("--sweep", action="store_true", help="a window of layers moved up the model, for three flows")
    parser.add_argument("--width", type=positive, help="layers in the window of --sweep (default: nine of 32, in proportion)")
    parser.add_argument("--save", metavar="FILE", help="keep the result in one .npz file")


def knockout(args: argparse.Namespace) -> Reply:
    source, to, layers = read_place(args.source), read_place(args.to), read_layers(args.layers)  # mistakes first
    if args.sweep and (layers is not None or (args.source, args.to) != ("image", "last")):
        raise OptionError("--sweep moves its own window over its own flows; leave out --source, --to and --layers")
    if args.width and not args.sweep:
        raise OptionError("--width belongs to --sweep; use --layers START:STOP for one knockout")
    from llava_lab import interventions
    from llava_lab.models import read_picture

    picture = read_picture(args.picture)
    lab = _load(args)
    run = lab.ask(picture, args.question, seed=args.seed)
    if run.options.get("stopped") == "interrupted":
        raise KeyboardInterrupt
    metric = read_targets([args.target]) if args.target else None
    if args.sweep:
        sweep = interventions.knockout_sweep(lab, run, width=args.width, metric=metric)
        if args.save:
            _write(sweep.save, args.save)
        return Reply({"answer": run.answer, **sweep_data(sweep)}, sweep_text(sweep), code=130 if sweep.interrupted else 0)
    given: dict[str, Any] = {"layers": layers, "metric": metric, "draws": args.draws, "seed": args.seed}
    effect = interventions.knockout(lab, run, source=source, target=to, **given)
    if args.save:
        _write(effect.save, args.save)
    return Reply({"answer": run.answer, **effect.to_dict()}, effect_text(effect), code=130 if effect.interrupted else 0)


def read_place(text: str) -> Any:
    """``image`` as it is, ``1,2;3,4`` as patches."""
    if PATCHES.fullmatch(text):
        return [tuple(int(one) for one in cell.split(",")) for cell in text.split(";")]
    return text


def read_layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not colon or not start.isdecimal() or not stop.isdecimal():
        raise OptionError(f"--layers wants START:STOP, such as 0:8, got {text!r}")
    return int(start), int(stop)


def effect_text(effect: Effect) -> str:
    lines = [effect.what, f"before: {effect.answer_before}", f"after:  {effect.answer_after}"]
    cells = [
        [target.text, *(f"{float(part[i]):.3f}" for part in (effect.before, effect.after, effect.change)), _percent(effect, i)]
        for i, target in enumerate(effect.targets)
    ]
    lines += _table(("target", "before", "after", "change", "percentile"), cells)
    lines.append(f"control: {effect.control_name}; {len(effect.control)} draws")
    lines.append(f"proof: {effect.proof.get('edges', 0):.0f} cut entries, largest weight {effect.proof.get('largest', 0):g}")
    return "\n".join([*lines, *effect.notes])


def sweep_data(sweep: FlowSweep) -> dict[str, Any]:
    about: dict[str, Any] = {"flows": list(sweep.flows), "layers": sweep.windows, "targets": [one.text for one in sweep.targets]}
    about |= {"before": sweep.before, "change": sweep.change, "relative": sweep.relative, "proof": sweep.proof}
    return about | {"interrupted": sweep.interrupted, "notes": list(sweep.notes), "model": sweep.model, "seconds": sweep.seconds}


def sweep_text(sweep: FlowSweep) -> str:
    """Change of the first target, a row for each window."""
    change = sweep.change[..., 0]
    cells = [
        [f"{start} to {stop - 1}", *(f"{float(value):.3f}" for value in change[:, i])]
        for i, (start, stop) in enumerate(sweep.windows.tolist())
    ]
    return "\n".join([f"change of {sweep.targets[0].text!r}", *_table(("layers", *sweep.flows), cells), *sweep.notes])


def _percent(effect: Effect, i: int) -> str:
    value = float(effect.percentile[i])
    return f"{value:.0f}" if value == value else "-"
