"""Commands that look for causes inside the model: sinks and circuits.

llava-lab sinks car.png "What color is the car?"
llava-lab sinks --data picturebook --n 10 --model smol
llava-lab circuit --variable color
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply, positive
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    import numpy as np

    from llava_lab.results import Run


def add_commands(add: Add) -> None:
    command = add("sinks", sinks, "positions that draw attention for what they are: sinks and registers, by layer, with controls")
    command.add_argument("picture", nargs="?", help="an image file; without one, give --data")
    command.add_argument("question", nargs="?")
    common.add_asking(command)
    command.add_argument("--data", choices=("picturebook",), help="over many drawn pictures, a question each")
    command.add_argument("--split", default="test", help="of --data (default: test)")
    command.add_argument("--n", type=positive, default=10, help="pictures of --data (default: 10)")
    command.add_argument("--attended", type=float, default=4.0, help="times an even share (default: 4)")
    command.add_argument("--long", type=float, default=3.0, help="times the median patch's length (default: 3)")
    common.add_output(command, "--save", "keep the result in one .npz file")
    common.add_output(command, "--figure", "draw it by layer (.png, .svg, .pdf)")

    about = "which few edges carry a variable from the picture to the answer, and how faithfully alone, beside random circuits"
    command = add("circuit", circuit, about)
    command.add_argument("--variable", choices=("color", "kind", "place"), default="color", help="default: color")
    command.add_argument("--n", type=positive, default=6, help="pairs of pictures that edges are ranked on (default: 6)")
    command.add_argument("--held", type=positive, default=6, help="other pairs, on which circuits are judged (default: 6)")
    command.add_argument(
        "--steps", type=int, default=0, help="integrated gradients over so many steps (default: the plain slope)"
    )
    command.add_argument("--draws", type=int, default=3, help="random circuits of each size (default: 3)")
    command.add_argument("--checked", type=int, default=0, help="edges cut one by one, against the estimate (default: 0)")
    command.add_argument("--split", default="test", help="of the picture book (default: test)")
    common.add_output(command, "--save", "keep the result in one .npz file")
    common.add_output(command, "--figure", "draw faithfulness by size (.png, .svg, .pdf)")


def circuit(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    common.check_figure(args.figure)
    options = {name: getattr(args, name) for name in ("variable", "n", "held", "steps", "draws", "checked", "split", "seed")}
    result = ll.circuit(common.load(args), **options, progress=not args.json)
    common.save(result, args.save)
    if args.figure:
        from llava_lab.plots import inside as plots

        common.save_figure(plots.circuit(result).figure, args.figure)
    return Reply(result.to_dict(), str(result.table()), code=130 if result.interrupted else 0)


def sinks(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    picture = _one_or_data(args)
    common.check_figure(args.figure)
    lab = common.load(args)
    runs = drawn_runs(args, lab) if picture is None else [common.ask(args, lab, picture, show=False)]
    result = ll.sinks(lab, runs, attended=args.attended, long=args.long, seed=args.seed, progress=not args.json)
    common.save(result, args.save)
    if args.figure:
        from llava_lab.plots import inside as plots

        common.save_figure(plots.sinks(result).figure, args.figure)
    answer = {"answer": runs[0].answer} if picture is not None else {}
    return Reply({**answer, **result.to_dict()}, str(result.table()), code=130 if result.interrupted else 0)


def drawn_runs(args: argparse.Namespace, lab: Any) -> list[Run]:
    """A run for each of ``--n`` scenes of the picture book, one question each."""
    import numpy as np

    from llava_lab.worlds import picturebook

    runs = []
    for index in range(args.n):
        scene = picturebook.scene(args.split, index, seed=args.seed)
        rng = np.random.default_rng((picturebook.SPLITS[args.split], args.seed, index, 7))
        question = picturebook.ask_about(scene, rng, 1)[0].text
        runs.append(common.ask(args, lab, np.asarray(scene.picture()), show=False, question=question))
    return runs


def _one_or_data(args: argparse.Namespace) -> np.ndarray | None:
    """The picture, or None with ``--data``. Raises OptionError for both or neither."""
    if (args.picture is None) == (args.data is None) or (args.picture is not None and args.question is None):
        raise OptionError(f"{args.command} wants either a picture and a question, or --data picturebook")
    return None if args.picture is None else common.read_picture(args)
