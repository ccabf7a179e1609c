"""The commands about one picture and one question: ask, explain, lens, knockout; and naming, the lens over many pictures.

``ask`` and ``explain`` also take a closed model, ``--model openai:NAME --base-url URL``. What explaining it will ask for
is said on standard error before it starts; the key is read from the environment.

    llava-lab explain car.png "What color is the car?" --target red --out map.png
    llava-lab lens car.png "What color is the car?" --word red
    llava-lab knockout car.png "What color is the car?" --sweep
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lab.cli import common
from llava_lab.cli.common import CLOSED, Add, Reply, positive, table
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.results import Effect, FlowSweep, LogitLens, NearestWords, Relevance, Run

SHOWN = 4  # words of a state in the table
PATCHES = re.compile(r"\d+,\d+(;\d+,\d+)*")


def add_commands(add: Add) -> None:
    command = add("ask", ask, "answer a question about a picture")
    common.add_question(command)
    _add_server(command)
    command.add_argument("--save", metavar="FILE", help="keep the run in one .npz file")

    command = add("explain", explain, "answer, and say which patches the answer came from")
    common.add_question(command)
    _add_server(command)
    common.add_method(command)
    command.add_argument(
        "--target",
        action="append",
        metavar="WHAT",
        help="words (default), answer, a word of the answer, RED/BLUE for a contrast, or #N for an answer token; repeatable",
    )
    command.add_argument("--out", metavar="FILE", help="draw the map on the picture (.png, .svg, .pdf)")
    command.add_argument("--save", metavar="FILE", help="keep the map in one .npz file")

    command = add("lens", lens, "what each image token would say at each layer, and the words nearest to it")
    common.add_question(command)
    command.add_argument("--word", action="append", default=[], metavar="WORD", help="where it lights up; repeatable")
    command.add_argument("--patch", metavar="ROW,COL", help="the words of one patch at every state")
    command.add_argument("--layers", metavar="N or A:B", help="one state, or A up to but without B (default: all)")
    command.add_argument("--top", type=positive, default=5, metavar="N", help="words kept per patch and state (default: 5)")
    command.add_argument("--space", default="input", help="nearest words by the input embeddings (default) or the output head")
    command.add_argument("--raw", action="store_true", help="nearest words by raw cosine instead of the centred one")
    command.add_argument("--save", metavar="FILE", help="keep the whole lens in one .npz file")

    about = "share of object patches whose top words name the thing or its colour, by layer, beside two controls"
    command = add("naming", naming, about)
    command.add_argument("--n", type=positive, default=60, metavar="N", help="pictures of the picture book (default: 60)")
    command.add_argument("--split", default="test", help="of the picture book (default: test)")
    command.add_argument("--top", type=positive, default=5, metavar="N", help="words looked at per patch and state (default: 5)")

    command = add("knockout", knockout, "cut attention between parts of the sequence, and see what happens to the answer")
    command.add_argument("picture", help="an image file")
    command.add_argument("question")
    places = "a segment (image, question, ...), last, all, or patches as ROW,COL;ROW,COL"
    command.add_argument("--source", default="image", metavar="WHERE", help=f"what may not be read: {places} (default: image)")
    command.add_argument("--to", default="last", metavar="WHERE", help="who may not read it, likewise (default: last)")
    command.add_argument("--layers", metavar="START:STOP", help="default: all layers")
    command.add_argument("--target", metavar="WHAT", help="what is scored: a word, RED/BLUE, #N, or answer (default)")
    command.add_argument("--draws", type=positive, default=20, help="random controls (default: 20)")
    command.add_argument("--sweep", action="store_true", help="a window of layers moved up the model, for three flows")
    command.add_argument("--width", type=positive, help="layers in the window of --sweep (default: nine of 32, in proportion)")
    command.add_argument("--save", metavar="FILE", help="keep the result in one .npz file")


def _add_server(command: argparse.ArgumentParser) -> None:
    """The options of a closed model; `common.load` refuses them with any other."""
    group = command.add_argument_group(f"a model behind a server (--model {CLOSED}NAME)")
    group.add_argument("--base-url", metavar="URL", help="where pictures are sent, e.g. http://127.0.0.1:8000/v1")
    group.add_argument("--max-requests", type=positive, metavar="N", help="all that may be sent (default: 500)")
    group.add_argument("--key-variable", metavar="NAME", help="environment variable with the key (default: OPENAI_API_KEY)")
    group.add_argument("--price", metavar="READ,WRITTEN", help="per million tokens, for the estimate")


# -- ask, explain ---------------------------------------------------------------------------


def ask(args: argparse.Namespace) -> Reply:
    picture = common.read_picture(args)
    run = common.ask(args, common.load(args), picture, show=True)
    common.save(run, args.save)
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

    options = common.read_method(args)
    if common.is_closed(args):
        from llava_lab.remote import refuse_inside

        refuse_inside(args.method)  # before the question is paid for
    picture = common.read_picture(args)
    lab = common.load(args)
    run = common.ask(args, lab, picture, show=True)
    targets = [common.read_target(text) for text in args.target or ["words"]]
    target = targets[0] if len(targets) == 1 else targets
    if common.is_closed(args):
        print(f"llava-lab: {ll.estimate(lab, run, method=args.method, target=target, **options)}", file=sys.stderr)
    relevance = ll.attribute(lab, run, method=args.method, target=target, **options)
    common.save(relevance, args.save)
    if args.out:
        _draw(run, relevance, args.out)
    where = relevance.map
    data = {
        "answer": run.answer,
        "words": [word.text for word in run.words],
        "targets": [target.text for target in relevance.targets],
        "grid": list(relevance.grid),
        "relevance": relevance.values.tolist(),
        "method": relevance.method,
        "options": relevance.options,
        "seconds": relevance.seconds,
        "notes": list(relevance.notes),
        "picture": {"width": where.width, "height": where.height, "mode": where.mode, "seen_box": list(where.seen_box)},
    }
    return Reply(data, _describe(relevance))


def _draw(run: Run, relevance: Relevance, path: str) -> None:
    from matplotlib.figure import Figure  # no pyplot: a command line has no windows

    from llava_lab.plots import maps as plots

    if len(relevance.targets) == 1:
        figure = Figure(figsize=(6, 6))
        plots.overlay(run, relevance, ax=figure.subplots())
    else:
        figure = plots.words_figure(run, relevance)
    endings = figure.canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in endings:
        raise OptionError(f"--out must end in one of {', '.join('.' + ending for ending in endings)}, got {path!r}")
    common.save_figure(figure, path, bbox_inches="tight")


def _describe(relevance: Relevance) -> str:
    lines = [f"{relevance.method} ({pairs(relevance.options)}), {relevance.seconds:.2f} s; strongest patches (row, column):"]
    for index, target in enumerate(relevance.targets):
        top = ", ".join(f"({row}, {col}) {value:.3g}" for row, col, value in relevance.top(3, index))
        lines.append(f"  {target.text}: {top}")
    return "\n".join(lines + [f"note: {note}" for note in relevance.notes])


def pairs(options: Mapping[str, Any]) -> str:
    """``name=value`` pairs in one line."""
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "none"


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
    result = logit_lens(lab, run, layers=layers, top=args.top, words=args.word)
    near = nearest_words(lab, run, space=args.space, centered=not args.raw, top=args.top, seed=args.seed)
    common.save(result, args.save)
    data: dict[str, Any] = {
        "answer": run.answer,
        "grid": list(lab.grid),
        "vocabulary": result.vocabulary,
        "states": [_state(result, number) for number in range(len(result.states))],
        "words": [_word(result, word) for word in result.words],
        "nearest": _nearest(near),
        "notes": [*result.notes, *near.notes],
        "model": run.model,
    }
    if patch:
        states = [{"state": state, "top": result.at(state, *patch)} for state in result.states]
        data["patch"] = {"row": patch[0], "col": patch[1], "states": states, "nearest": near.at(*patch)}
    return Reply(data, _lens_text(data))


def _state(result: LogitLens, number: int) -> dict[str, Any]:
    """How sure the patches are at one state, and the words most of them would say."""
    names = dict(zip(result.piece_ids.tolist(), result.pieces, strict=True))
    likeliest = Counter(result.top_ids[number, :, 0].tolist()).most_common(SHOWN)
    patches = result.top_ids.shape[1]
    return {
        "state": result.states[number],
        "entropy": float(result.entropy[number].mean()),
        "probability": float(result.top_probs[number, :, 0].mean()),
        "said": [{"text": names[token], "share": count / patches} for token, count in likeliest],
    }


def _word(result: LogitLens, word: str) -> dict[str, Any]:
    """Where a word is most probable, with its rank there."""
    index = result.words.index(word)
    probabilities = result.probs[:, :, index]
    number, patch = divmod(int(probabilities.argmax()), probabilities.shape[1])
    row, col = divmod(patch, result.map.cols)
    return {
        "word": word,
        "token": result.word_ids[index],
        "probability": float(probabilities.max()),
        "state": result.states[number],
        "row": row,
        "col": col,
        "rank": int(result.ranks[number, patch, index]),
        "by_state": probabilities.max(1),
    }


def _nearest(near: NearestWords) -> dict[str, Any]:
    return {
        "space": near.space,
        "centered": near.centered,
        "readable_share": near.readable_share,
        "random_share": float(near.random_shares.mean()),
        "vocabulary_share": near.vocabulary_share,
        "cosine": float(near.cosines[:, 0].mean()),
        "random_cosine": float(near.random_cosines.mean()),
        "common_direction": near.common_direction,
    }


def _lens_text(data: dict[str, Any]) -> str:
    rows = []
    for state in data["states"]:
        words = ", ".join(f"{word['text'].strip() or word['text']!r} {word['share']:.0%}" for word in state["said"])
        rows.append([str(state["state"]), f"{state['entropy']:.2f}", f"{state['probability']:.3f}", words])
    lines = table(("state", "entropy", "top probability", "said by most patches"), rows)
    for word in data["words"]:
        lines.append(
            f"{word['word']!r}: {word['probability']:.3f} at state {word['state']}, row {word['row']}, column {word['col']}, "
            f"rank {word['rank']} of {data['vocabulary']}"
        )
    if "patch" in data:
        patch = data["patch"]
        lines.append(f"patch row {patch['row']}, column {patch['col']}:")
        words_of = [(str(state["state"]), state["top"]) for state in patch["states"]] + [("nearest", patch["nearest"])]
        rows = [
            [name, ", ".join(f"{text.strip() or repr(text)} {value:.3f}" for text, value in words)] for name, words in words_of
        ]
        lines += table(("state", "words"), rows)
    near = data["nearest"]
    lines.append(
        f"nearest word is a whole word at {near['readable_share']:.0%} of patches, {near['random_share']:.0%} for random vectors"
    )
    return "\n".join([*lines, *data["notes"]])


def naming(args: argparse.Namespace) -> Reply:
    from llava_lab.probes import naming_share

    result = naming_share(common.load(args), n=args.n, split=args.split, top=args.top, seed=args.seed, progress=not args.json)
    shares = {
        group: {
            what: [
                {"share": float(share), "interval": [float(low), float(high)]}
                for share, (low, high) in zip(result.share[g, w], result.interval[g, w], strict=True)
            ]
            for w, what in enumerate(result.WHAT)
        }
        for g, group in enumerate(result.GROUPS)
    }
    data = {
        "states": list(result.states),
        "top": result.top,
        "split": result.split,
        "pictures": result.pictures,
        "patches": dict(zip(result.GROUPS, result.patches, strict=True)),
        "shares": shares,
        "notes": list(result.notes),
        "model": result.model,
    }
    return Reply(data, str(result.table()))


def _read_states(text: str | None) -> Any:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if not match:
        raise OptionError(f"--layers wants a state such as 3, or a window such as 2:5, got {text!r}")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


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
        sweep = interventions.knockout_sweep(lab, run, width=args.width, metric=metric)
        common.save(sweep, args.save)
        return Reply({"answer": run.answer, **_sweep_data(sweep)}, _sweep_text(sweep), code=130 if sweep.interrupted else 0)
    options: dict[str, Any] = {"layers": layers, "metric": metric, "draws": args.draws, "seed": args.seed}
    effect = interventions.knockout(lab, run, source=source, target=to, **options)
    common.save(effect, args.save)
    return Reply({"answer": run.answer, **effect.to_dict()}, _effect_text(effect), code=130 if effect.interrupted else 0)


def read_place(text: str) -> Any:
    """``image`` as it is, ``1,2;3,4`` as patches."""
    if PATCHES.fullmatch(text):
        return [tuple(map(int, cell.split(","))) for cell in text.split(";")]
    return text


def read_layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not colon or not start.isdecimal() or not stop.isdecimal():
        raise OptionError(f"--layers wants START:STOP, such as 0:8, got {text!r}")
    return int(start), int(stop)


def _effect_text(effect: Effect) -> str:
    cells = []
    for i, target in enumerate(effect.targets):
        percentile = float(effect.percentile[i])
        numbers = [f"{float(part[i]):.3f}" for part in (effect.before, effect.after, effect.change)]
        cells.append([target.text, *numbers, f"{percentile:.0f}" if percentile == percentile else "-"])
    return "\n".join(
        [
            effect.what,
            f"before: {effect.answer_before}",
            f"after:  {effect.answer_after}",
            *table(("target", "before", "after", "change", "percentile"), cells),
            f"control: {effect.control_name}; {len(effect.control)} draws",
            f"proof: {effect.proof.get('edges', 0):.0f} cut entries, largest weight {effect.proof.get('largest', 0):g}",
            *effect.notes,
        ]
    )


def _sweep_data(sweep: FlowSweep) -> dict[str, Any]:
    return {
        "flows": list(sweep.flows),
        "layers": sweep.windows,
        "targets": [target.text for target in sweep.targets],
        "before": sweep.before,
        "change": sweep.change,
        "relative": sweep.relative,
        "proof": sweep.proof,
        "interrupted": sweep.interrupted,
        "notes": list(sweep.notes),
        "model": sweep.model,
        "seconds": sweep.seconds,
    }


def _sweep_text(sweep: FlowSweep) -> str:
    """Change of the first target, a row for each window."""
    cells = [
        [f"{start} to {stop - 1}", *(f"{float(value):.3f}" for value in sweep.change[:, i, 0])]
        for i, (start, stop) in enumerate(sweep.windows.tolist())
    ]
    return "\n".join([f"change of {sweep.targets[0].text!r}", *table(("layers", *sweep.flows), cells), *sweep.notes])
