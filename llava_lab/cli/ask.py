"""The commands about one picture: ask, explain, lens, knockout, chat; and what looks inside over many: naming, sinks,
circuit, interchange.

``ask`` and ``explain`` also take a closed model, ``--model openai:NAME --base-url URL``. What explaining it will ask for
is said on standard error before it starts; the key is read from the environment.

    llava-lab explain car.png "What color is the car?" --target red --out map.png
    llava-lab lens car.png "What color is the car?" --word red
    llava-lab knockout car.png "What color is the car?" --sweep
    llava-lab sinks car.png "What color is the car?"
    llava-lab sinks --data picturebook --n 10 --model smol
    llava-lab circuit --variable color
    llava-lab interchange --variable color --position thing

``chat`` asks several questions about one picture, each with what was said before it:

    llava-lab chat car.png
    llava-lab chat car.png --json < questions.txt

A line is a question. ``/new`` forgets what was said, ``/picture FILE`` shows another picture (and forgets), ``/quit`` or the end
of the input leaves. A question that cannot be asked is said in one line and does not count.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply, positive, say
from llava_lab.errors import DataError, LabError, OptionError

if TYPE_CHECKING:
    import numpy as np

    from llava_lab.results import Effect, FlowSweep, Relevance, Run

PATCHES = re.compile(r"\d+,\d+(;\d+,\d+)*")


def add_commands(add: Add) -> None:
    command = add("ask", ask, "answer a question about a picture")
    common.add_question(command)
    common.add_server(command)
    common.add_output(command, "--save", "keep the run in one .npz file")

    command = add("explain", explain, "answer, and say which patches the answer came from")
    common.add_question(command)
    common.add_server(command)
    common.add_method(command)
    command.add_argument(
        "--target",
        action="append",
        metavar="WHAT",
        help="words (default), answer, a word of the answer, RED/BLUE for a contrast, or #N for an answer token; repeatable",
    )
    common.add_output(command, "--out", "draw the map on the picture (.png, .svg, .pdf; .gif moves from word to word)")
    common.add_output(command, "--save", "keep the map in one .npz file")

    command = add("lens", lens, "what each image token would say at each layer, and the words nearest to it")
    common.add_question(command)
    command.add_argument("--word", action="append", default=[], metavar="WORD", help="where it lights up; repeatable")
    command.add_argument("--patch", metavar="ROW,COL", help="the words of one patch at every state")
    command.add_argument("--layers", metavar="N or A:B", help="one state, or A up to but without B (default: all)")
    command.add_argument("--top", type=positive, default=5, metavar="N", help="words kept per patch and state (default: 5)")
    command.add_argument("--space", default="input", help="nearest words by the input embeddings (default) or the output head")
    command.add_argument("--raw", action="store_true", help="nearest words by raw cosine instead of the centred one")
    _add_lens(command)
    common.add_output(command, "--save", "keep the whole lens in one .npz file")

    about = "share of object patches whose top words name the thing or its colour, by layer, beside two controls"
    command = add("naming", naming, about)
    command.add_argument("--n", type=positive, default=60, metavar="N", help="pictures of the picture book (default: 60)")
    command.add_argument("--split", default="test", help="of the picture book (default: test)")
    command.add_argument("--pictures", metavar="FOLDER", help="photographs with outlines and classes.txt in its place")
    command.add_argument("--top", type=positive, default=5, metavar="N", help="words looked at per patch and state (default: 5)")
    _add_lens(command)
    common.add_output(command, "--save", "keep the shares in one .npz file")

    command = add("knockout", knockout, "cut attention between parts of the sequence, and see what happens to the answer")
    command.add_argument("picture", help="an image file")
    command.add_argument("question")
    places = "a segment (image, question, ...), last, all, or patches as ROW,COL;ROW,COL"
    command.add_argument("--source", default="image", metavar="WHERE", help=f"what may not be read: {places} (default: image)")
    command.add_argument("--to", default="last", metavar="WHERE", help="who may not read it, likewise (default: last)")
    command.add_argument("--layers", metavar="START:STOP", help="default: all layers")
    command.add_argument("--target", metavar="WHAT", help="what is scored: a word, RED/BLUE, #N, or answer (default)")
    command.add_argument("--score", choices=("logodds", "logprob"), default="logodds", help="of the target (default: logodds)")
    command.add_argument("--draws", type=positive, default=20, help="random controls (default: 20)")
    command.add_argument("--sweep", action="store_true", help="a window of layers moved up the model, for three flows")
    command.add_argument("--width", type=positive, help="layers in the window of --sweep (default: nine of 32, in proportion)")
    common.add_output(command, "--save", "keep the result in one .npz file")

    _add_chat(add)


def _add_lens(command: argparse.ArgumentParser) -> None:
    which = "logit (default), tuned or jacobian, fitted now on other pictures, or a file of --save-lens"
    command.add_argument("--lens", default="logit", metavar="LENS", help=which)
    command.add_argument("--prompts", type=positive, metavar="N", help="pictures it is fitted on (default: 40 tuned, 8 jacobian)")
    reach = "whose derivative the jacobian lens takes: later text (default), or every later position"
    command.add_argument("--targets", choices=("text", "later"), default="text", help=reach)
    common.add_output(command, "--save-lens", "keep the fitted lens in one .npz file")


# -- ask, explain ---------------------------------------------------------------------------


def ask(args: argparse.Namespace) -> Reply:
    picture = common.read_picture(args)
    run = common.ask(args, common.load(args), picture, show=True)
    common.save(run, args.save)
    return Reply(run.to_dict())


def explain(args: argparse.Namespace) -> Reply:
    import llava_lab as ll
    from llava_lab.attribution.registry import refuse_unable

    options = common.read_method(args)
    picture = common.read_picture(args)
    lab = common.load(args)
    refuse_unable(lab, ll.METHODS[args.method])  # before the question is paid for
    run = common.ask(args, lab, picture, show=True)
    targets = [common.read_target(text) for text in args.target or ["words"]]
    target = targets[0] if len(targets) == 1 else targets
    if common.is_closed(args):
        common.say(f"llava-lab: {ll.estimate(lab, run, method=args.method, target=target, **options)}", file=sys.stderr)
    relevance = ll.attribute(lab, run, method=args.method, target=target, **options)
    common.save(relevance, args.save)
    if args.out:
        _draw(run, relevance, args.out)
    told = {"answer": run.answer, "cut": run.cut, "words": [word.text for word in run.words]}
    data = {**told, **relevance.to_dict(), "notes": [*run.notes, *relevance.notes]}
    return Reply(data, str(relevance.table()), code=130 if relevance.interrupted else 0)


def _draw(run: Run, relevance: Relevance, path: str) -> None:
    if Path(path).suffix.lower() == ".gif":
        from llava_lab.plots.moving import moving_words

        common.save_bytes(moving_words(run, relevance), path)
        return
    from matplotlib.figure import Figure  # no pyplot: a command line has no windows

    from llava_lab.plots import maps as plots

    if len(relevance.targets) == 1:
        figure = Figure(figsize=(6, 6))
        plots.overlay(run, relevance, ax=figure.subplots())
    else:
        figure = plots.words_figure(run, relevance)
    endings = sorted({*figure.canvas.get_supported_filetypes(), "gif"})
    if Path(path).suffix.lstrip(".").lower() not in endings:
        raise OptionError(f"--out must end in one of {', '.join('.' + ending for ending in endings)}, got {path!r}")
    common.save_figure(figure, path, bbox_inches="tight")


# -- lens, naming ---------------------------------------------------------------------------


def lens(args: argparse.Namespace) -> Reply:
    layers, patch = _read_states(args.layers), _read_patch(args.patch)
    if args.space not in ("input", "output"):
        raise OptionError(f"--space must be input or output, got {args.space!r}")
    picture = common.read_picture(args)
    from llava_lab.probes import logit_lens, nearest_words

    lab = common.load(args)
    if patch and not (patch[0] < lab.grid[0] and patch[1] < lab.grid[1]):
        raise OptionError(f"--patch lies in a {lab.grid[0]}x{lab.grid[1]} grid, counted from 0; got {args.patch!r}")
    run = common.ask(args, lab, picture, show=True)
    result = logit_lens(lab, run, layers=layers, top=args.top, words=args.word, fitted=_fitted(args, lab))
    near = nearest_words(lab, run, space=args.space, centered=not args.raw, top=args.top, seed=args.seed)
    common.save(result, args.save)
    notes = [*run.notes, *result.notes, *near.notes]
    data = {"answer": run.answer, "cut": run.cut, **result.to_dict(), "nearest": near.to_dict(), "notes": notes}
    if patch:
        states = [{"state": state, "top": result.at(state, *patch)} for state in result.states]
        data["patch"] = {"row": patch[0], "col": patch[1], "states": states, "nearest": near.at(*patch)}
    return Reply(data, str(result.table(patch=patch, near=near)))


def naming(args: argparse.Namespace) -> Reply:
    from llava_lab.probes import naming_share

    options = {"n": args.n, "split": args.split, "top": args.top, "seed": args.seed, "pictures": args.pictures}
    lab = common.load(args)
    fitted = _fitted(args, lab, args.pictures, args.n)
    return common.finished(args, naming_share(lab, **options, fitted=fitted, progress=not args.json))


def _fitted(args: argparse.Namespace, lab: Any, pictures: str | None = None, after: int = 0) -> Any:
    """The lens that ``--lens`` asks for, from its file or fitted now; None is the logit lens."""
    from llava_lab.probes import JacobianLens, TunedLens
    from llava_lab.probes.lens import lens_by_name

    if args.lens.endswith(".npz"):
        try:
            return TunedLens.load(args.lens)
        except DataError:
            return JacobianLens.load(args.lens)
    options = {"prompts": args.prompts, "targets": args.targets, "seed": args.seed, "progress": not args.json}
    fitted = lens_by_name(lab, args.lens, pictures=pictures, after=after, **options)
    if fitted is not None:
        common.save(fitted, args.save_lens)
    return fitted


def _read_states(text: str | None) -> Any:
    if text is None:
        return None
    layers = common.read_value(text)
    if not _is_window(layers) and type(layers) is not int:
        raise OptionError(f"--layers wants a state such as 3, or a window such as 2:5, got {text!r}")
    return tuple(layers) if _is_window(layers) else layers


def _read_patch(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if not match:
        raise OptionError(f"--patch wants a row and a column from 0 with a comma between them, got {text!r}")
    return int(match[1]), int(match[2])


# -- knockout -------------------------------------------------------------------------------


def knockout(args: argparse.Namespace) -> Reply:
    source, to, layers = read_place(args.source), read_place(args.to), read_layers(args.layers)  # mistakes first
    if args.sweep and (layers is not None or (args.source, args.to) != ("image", "last")):
        raise OptionError("--sweep moves its own window over its own flows; leave out --source, --to and --layers")
    if args.width and not args.sweep:
        raise OptionError("--width belongs to --sweep; use --layers START:STOP for one knockout")
    picture = common.read_picture(args)
    from llava_lab import interventions

    lab = common.load(args)
    run = common.ask(args, lab, picture, show=False)
    metric = common.read_target(args.target)
    if args.sweep:
        result: Effect | FlowSweep = interventions.knockout_sweep(lab, run, width=args.width, metric=metric, score=args.score)
    else:
        options: dict[str, Any] = {"layers": layers, "metric": metric, "score": args.score}
        options |= {"draws": args.draws, "seed": args.seed}
        result = interventions.knockout(lab, run, source=source, target=to, **options)
    return common.finished(args, result, answer=run.answer, cut=run.cut)


def read_place(text: str) -> Any:
    """``image`` as it is, ``1,2;3,4`` as patches."""
    if PATCHES.fullmatch(text):
        return [tuple(map(int, cell.split(","))) for cell in text.split(";")]
    return text


def read_layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    layers = common.read_value(text)
    if not _is_window(layers):
        raise OptionError(f"--layers wants START:STOP, such as 0:8, got {text!r}")
    return layers[0], layers[1]


def _is_window(layers: Any) -> bool:
    return isinstance(layers, (list, tuple)) and [type(end) for end in layers] == [int, int]


# -- chat -----------------------------------------------------------------------------------

HELP = "/new forgets what was said, /picture FILE shows another picture, /quit leaves"


def _add_chat(add: Add) -> None:
    command = add("chat", chat, f"ask several questions about a picture, one a line; {HELP}")
    command.add_argument("picture", help="an image file")
    common.add_asking(command)
    common.add_server(command)
    common.add_output(command, "--save", "keep the last run in one .npz file")


def chat(args: argparse.Namespace) -> Reply:
    """Ask line by line. Exit code 2 where a line of a script, not of a person, could not be asked."""
    picture = common.read_picture(args)
    lab = common.load(args)
    person = sys.stdin.isatty() and not args.json
    history: list[tuple[str, str]] = []
    turns: list[dict[str, Any]] = []
    run, refused = None, 0
    if person:
        say(f"Ask about {args.picture}; {HELP}.")
    while (line := _next(person)) is not None:
        try:
            word, _, rest = line.partition(" ")
            if word == "/quit":
                break
            if word in ("/new", "/picture"):
                if word == "/picture":
                    args.picture = rest.strip()
                    picture = common.read_picture(args)
                history = []
                continue
            if word.startswith("/"):
                raise OptionError(f"no command {word}; {HELP}")
            run = common.ask(args, lab, picture, show=True, question=line, history=tuple(history))
        except LabError as error:
            say(f"llava-lab: {' '.join(str(error).split())}", file=sys.stderr)
            refused += 1
            continue
        history.append((run.question, run.answer))
        turns.append({"picture": args.picture, **run.to_dict()})
    if run is not None:
        common.save(run, args.save)
    return Reply({"model": args.model, "turns": turns}, code=2 if refused and not person else 0)


def _next(person: bool) -> str | None:
    """The next line that is not empty; None at the end."""
    while True:
        if person:
            say("> ", end="")
        line = sys.stdin.readline()
        if not line:
            if person:
                say("")
            return None
        if line.strip():
            return line.strip()


# -- sinks, circuit, interchange ------------------------------------------------------------


def add_inside(add: Add) -> None:
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

    about = "whether a small subspace of a state carries a variable, and it alone, by layer, beside placebos"
    command = add("interchange", interchange, about)
    command.add_argument("--variable", choices=("color", "kind", "place"), default="color", help="default: color")
    command.add_argument(
        "--position",
        choices=("last", "thing"),
        default="last",
        help="the prompt's last token or the thing's patches (default: last)",
    )
    command.add_argument("--layers", type=int, nargs="+", help="after so many layers, 0 is before the first (default: all)")
    command.add_argument("--dim", type=positive, default=32, help="dimensions of the subspace (default: 32)")
    command.add_argument("--n", type=positive, default=16, help="scenes it is learnt in (default: 16)")
    command.add_argument("--held", type=positive, default=24, help="other scenes, in which it is judged (default: 24)")
    command.add_argument("--epochs", type=positive, default=8, help="times through the pictures (default: 8)")
    command.add_argument("--seeds", type=positive, default=1, help="searches from other beginnings (default: 1)")
    command.add_argument("--split", default="test", help="of the picture book (default: test)")
    common.add_output(command, "--save", "keep the result in one .npz file")
    common.add_output(command, "--figure", "draw it by layer (.png, .svg, .pdf)")


def circuit(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    common.check_figure(args.figure)
    options = {name: getattr(args, name) for name in ("variable", "n", "held", "steps", "draws", "checked", "split", "seed")}
    result = ll.circuit(common.load(args), **options, progress=not args.json)
    return common.finished(args, result, lambda plots: plots.circuit(result).figure)


def interchange(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    common.check_figure(args.figure)
    names = ("variable", "position", "layers", "dim", "n", "held", "epochs", "seeds", "split", "seed")
    result = ll.interchange(common.load(args), **{name: getattr(args, name) for name in names}, progress=not args.json)
    return common.finished(args, result, lambda plots: plots.interchange(result).figure)


def sinks(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    picture = _one_or_data(args)
    common.check_figure(args.figure)
    lab = common.load(args)
    runs = drawn_runs(args, lab) if picture is None else [common.ask(args, lab, picture, show=False)]
    result = ll.sinks(lab, runs, attended=args.attended, long=args.long, seed=args.seed, progress=not args.json)
    answer = {"answer": runs[0].answer} if picture is not None else {}
    return common.finished(args, result, lambda plots: plots.sinks(result).figure, **answer)


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
