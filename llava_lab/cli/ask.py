"""What each ``llava-lab`` command does: call one public function, give back data and its text.

Heavy imports stand inside the commands, so that ``llava-lab --help`` answers at once. The shapes
of the data are promised to scripts (README, "What --json prints") and tested.

``llava-lab lens``: what the image tokens say, layer by layer, and where chosen words light up.

It declares its options, calls `llava_lab.probes`, and lays out what was found.

``llava-lab knockout``: cut attention and see what happens to the answer; with ``--sweep``, flow by flow and layer by layer.

It declares its options, calls `llava_lab.interventions`, and lays out what they found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava_lab.errors import LabError, OptionError
from llava_lab.remote import command as cli_endpoint

if TYPE_CHECKING:
    import numpy as np

    from llava_lab.models import Lab
    from llava_lab.results import Effect, FlowSweep, LogitLens, NearestWords, Relevance, Run

RUN_PY = Path(__file__).resolve().parent.parent / "run.py"  # there in a checkout, not in an installed package


@dataclass(frozen=True)
class Reply:
    """One command's outcome: for a script, for a person, and the exit code."""

    data: dict[str, Any] | None
    text: str = ""
    code: int = 0


def ask(args: argparse.Namespace) -> Reply:
    picture = _read_picture(args)
    run = _ask(args, _load(args), picture)
    if args.save:
        _write(run.save, args.save)
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

    options = read_options(args.option)
    if args.method not in ll.METHODS:
        raise OptionError(f"no method {args.method!r}; the methods are {', '.join(ll.METHODS)}")
    if "seed" in ll.METHODS[args.method].options:
        options.setdefault("seed", args.seed)
    ll.METHODS[args.method].with_defaults(options)  # a misspelt option is said before the model is loaded
    if cli_endpoint.is_closed(args):
        cli_endpoint.refuse_inside(args.method)  # before the question is paid for
    picture = _read_picture(args)
    lab = _load(args)
    run = _ask(args, lab, picture)
    target = read_targets(args.target)
    if cli_endpoint.is_closed(args):
        cli_endpoint.announce(cast(Any, lab), run, args.method, target, options)
    relevance = ll.attribute(lab, run, method=args.method, target=target, **options)
    if args.save:
        _write(relevance.save, args.save)
    if args.out:
        _draw(run, relevance, args.out)
    return Reply(_explanation(run, relevance), _describe(relevance))


def methods(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    fields = ("name", "truth", "source", "cost", "blind_to", "options")
    rows = [{field: getattr(method, field) for field in fields} for method in ll.METHODS.values()]
    text = [f"{row['name']}\n    {row['truth']}\n    options: {_pairs(row['options'])}" for row in rows]
    return Reply({"methods": rows}, "\n".join(text))


def evaluate(args: argparse.Namespace) -> Reply:
    from llava_lab.evaluation import evaluate as score

    how = {"controls": not args.no_controls, "normalise": args.normalised}
    data = score(_load(args), data=args.data, split=args.split, n=args.n, seed=args.seed, **how)
    rows = [("all", data), *data["by_type"].items()]
    lines = [_score_line(name, row) for name, row in rows]
    lines += [_score_line(f"control: {name}", row) for name, row in data.get("controls", {}).items()]
    return Reply(data, "\n".join(lines))


def data(args: argparse.Namespace) -> Reply:
    from llava_lab.worlds.picturebook import write_dataset

    file = _write(lambda out: write_dataset(out, n=args.n, seed=args.seed, split=args.split), args.out)
    return Reply({"data": args.world, "file": str(file), "n": args.n, "split": args.split, "seed": args.seed}, f"wrote {file}")


def bench(args: argparse.Namespace) -> Reply:
    from llava_lab.bench import run

    result = run(args.name, model=args.model, quick=args.quick, layers=args.layers)
    lines = [f"{args.name} on {result['device']}, {result['threads']} threads; floor: {result['floor']:.2f} s"]
    names: tuple[str, ...] = ("name", "seconds", "ratio_to_floor", "ratio_to_peer", "extra_mb", "max_error")
    names += tuple(key for row in result["rows"][:1] for key in row if key not in names)  # what only this benchmark has
    lines += _table(names, [[_short(row.get(name)) for name in names] for row in result["rows"]])
    return Reply(result, "\n".join(lines))


def doctor(args: argparse.Namespace) -> Reply:
    from llava_lab.doctor import examine, render

    if args.model is not None:
        from llava_lab.models.differences import examine_model, render_model

        compared = examine_model(args.model)
        return Reply(compared, render_model(compared))
    report = examine()
    return Reply(report, render(report))


def lab(args: argparse.Namespace) -> Reply:
    """JupyterLab by run.py where there is one; its own exit code and output are ours."""
    if RUN_PY.is_file():
        chosen = {"--no-browser": args.no_browser, "--check": args.check, "--json": args.json}
        port = [f"--port={args.port}"] if args.port else []
        command = [sys.executable, str(RUN_PY), "lab", *port, *(flag for flag, on in chosen.items() if on)]
    elif importlib.util.find_spec("jupyterlab") is None:
        raise LabError("JupyterLab is not installed; `pip install 'llava-lab[lab]'` brings it")
    elif args.check or args.json:
        raise OptionError("--check and --json belong to a checkout with its lessons; this is an installed package")
    else:
        port = [f"--ServerApp.port={args.port}"] if args.port else []
        command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", *port, *(["--no-browser"] * args.no_browser)]
    return Reply(None, code=subprocess.call(command))


# -- reading what was typed -----------------------------------------------------------------


def read_targets(texts: list[str] | None) -> Any:
    """``words``, ``answer``, a word, ``red/blue`` or ``#3`` as `llava_lab.attribute` wants them."""
    found = [_read_target(text) for text in texts or ["words"]]
    return found[0] if len(found) == 1 else found


def read_options(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; a value is JSON where it parses as such, otherwise text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier() or name in ("lab", "run", "method", "target"):
            raise OptionError(f"--option wants NAME=VALUE with an option of the method, got {pair!r}")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays and tuples as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _read_target(text: str) -> Any:
    said, slash, instead = text.partition("/")
    if slash and said and instead:
        return said, instead
    if text.startswith("#") and text[1:].isdecimal():
        return int(text[1:])
    return text


# -- doing and showing ----------------------------------------------------------------------


def _load(args: argparse.Namespace) -> Lab:
    import llava_lab as ll

    cli_endpoint.refuse(args)
    if cli_endpoint.is_closed(args):
        return cast("Lab", cli_endpoint.load(args))  # the same calls, as far as `ask` and `explain` go
    return ll.load(args.model, device=args.device, dtype=args.dtype)


def _read_picture(args: argparse.Namespace) -> np.ndarray:
    """The picture, before a large model is loaded: a mistyped path should not cost a minute."""
    from llava_lab.models import read_picture

    return read_picture(args.picture)


def _ask(args: argparse.Namespace, lab: Lab, picture: np.ndarray) -> Run:
    """Ask, and show a person the answer while it is made."""
    show = None if args.json else (lambda piece: print(piece, end="", flush=True))
    if cli_endpoint.is_closed(args):
        run = cli_endpoint.ask(args, cast(Any, lab), picture, show)
    else:
        names = ("max_new_tokens", "temperature", "seed", "prompt", "fit")
        run = lab.ask(picture, args.question, **{name: getattr(args, name) for name in names}, on_token=show)
    if show:
        print()
    if run.options.get("stopped") == "interrupted":  # ask gives what it has; a command that was stopped says so
        raise KeyboardInterrupt
    return run


def _write(action: Any, path: str) -> Any:
    """Do `action(path)`, and say in one line when the disk does not allow it."""
    try:
        return action(path)
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror or error}") from None


def _draw(run: Run, relevance: Relevance, path: str) -> None:
    from matplotlib.figure import Figure  # no pyplot: a command line has no windows

    from llava_lab.plots import maps as plots

    if len(relevance.targets) == 1:
        figure = Figure(figsize=(6, 6))
        plots.overlay(run, relevance, ax=figure.subplots())
    else:
        figure = plots.words_figure(run, relevance)
    known = figure.canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in known:
        raise OptionError(f"--out must end in one of {', '.join('.' + kind for kind in known)}, got {path!r}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _write(lambda out: figure.savefig(out, dpi=150, bbox_inches="tight"), path)


def _explanation(run: Run, relevance: Relevance) -> dict[str, Any]:
    where = relevance.map
    picture = {"width": where.width, "height": where.height, "mode": where.mode, "seen_box": list(where.seen_box)}
    return {
        "answer": run.answer,
        "words": [word.text for word in run.words],
        "targets": [target.text for target in relevance.targets],
        "grid": list(relevance.grid),
        "relevance": relevance.values.tolist(),
        "method": relevance.method,
        "options": relevance.options,
        "seconds": relevance.seconds,
        "notes": list(relevance.notes),
        "picture": picture,
    }


def _describe(relevance: Relevance) -> str:
    lines = [f"{relevance.method} ({_pairs(relevance.options)}), {relevance.seconds:.2f} s; strongest patches (row, column):"]
    for index, target in enumerate(relevance.targets):
        top = ", ".join(f"({row}, {col}) {value:.3g}" for row, col, value in relevance.top(3, index))
        lines.append(f"  {target.text}: {top}")
    return "\n".join(lines + [f"note: {note}" for note in relevance.notes])


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "none"


def _score_line(name: str, row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{name:<22} {row['accuracy']:6.1%}  [{low:.1%}, {high:.1%}]  n {row['n']}"


def _table(names: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [list(names), *rows]) for i in range(len(names))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [list(names), *rows]
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


ABOUT = "what each image token would say at each layer, and the words nearest to it"
NAMING = "share of object patches whose top words name the thing or its colour, by layer, beside two controls"
SHOWN = 4  # words of a state in the table


def add_options(parser: argparse.ArgumentParser, positive: Any) -> None:
    """What ``llava-lab lens`` takes beside a question's options; `positive` reads a whole number from 1."""
    parser.add_argument("--word", action="append", default=[], metavar="WORD", help="where it lights up; repeatable")
    parser.add_argument("--patch", metavar="ROW,COL", help="the words of one patch at every state")
    parser.add_argument("--layers", metavar="N or A:B", help="one state, or A up to but without B (default: all)")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="words kept per patch and state (default: 5)")
    parser.add_argument("--space", default="input", help="nearest words by the input embeddings (default) or the output head")
    parser.add_argument("--raw", action="store_true", help="nearest words by raw cosine instead of the centred one")
    parser.add_argument("--save", metavar="FILE", help="keep the whole lens in one .npz file")


def lens(args: argparse.Namespace) -> Reply:
    layers, patch = _layers(args.layers), _patch(args.patch)
    if args.space not in ("input", "output"):
        raise OptionError(f"--space must be input or output, got {args.space!r}")
    picture = _read_picture(args)
    from llava_lab.probes import logit_lens, nearest_words

    lab = _load(args)
    if patch and not (patch[0] < lab.grid[0] and patch[1] < lab.grid[1]):
        raise OptionError(f"--patch lies in a {lab.grid[0]}x{lab.grid[1]} grid, counted from 0; got {args.patch!r}")
    run = _ask(args, lab, picture)
    found = logit_lens(lab, run, layers=layers, top=args.top, words=args.word)
    near = nearest_words(lab, run, space=args.space, centered=not args.raw, top=args.top, seed=args.seed)
    if args.save:
        _write(found.save, args.save)
    states = [_state(found, number) for number in range(len(found.states))]
    words = [_word(found, word) for word in found.words]
    data: dict[str, Any] = {"answer": run.answer, "grid": list(lab.grid), "vocabulary": found.vocabulary, "states": states}
    data |= {"words": words, "nearest": _nearest(near), "notes": [*found.notes, *near.notes], "model": run.model}
    if patch:
        each = [{"state": state, "top": found.at(state, *patch)} for state in found.states]
        data["patch"] = {"row": patch[0], "col": patch[1], "states": each, "nearest": near.at(*patch)}
    return Reply(data, _text(data))


def add_naming_options(parser: argparse.ArgumentParser, positive: Any) -> None:
    """What ``llava-lab naming`` takes."""
    parser.add_argument("--n", type=positive, default=60, metavar="N", help="pictures of the picture book (default: 60)")
    parser.add_argument("--split", default="test", help="of the picture book (default: test)")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="words looked at per patch and state (default: 5)")


def naming(args: argparse.Namespace) -> Reply:
    from llava_lab.probes import naming_share

    found = naming_share(_load(args), n=args.n, split=args.split, top=args.top, seed=args.seed, progress=not args.json)
    shares = {
        group: {
            what: [{"share": float(x), "interval": [float(low), float(high)]} for x, (low, high) in zip(a, b, strict=True)]
            for what, a, b in zip(found.WHAT, found.share[g], found.interval[g], strict=True)
        }
        for g, group in enumerate(found.GROUPS)
    }
    data = {"states": list(found.states), "top": found.top, "split": found.split, "pictures": found.pictures}
    data |= {"patches": dict(zip(found.GROUPS, found.patches, strict=True)), "shares": shares, "notes": list(found.notes)}
    return Reply({**data, "model": found.model}, "\n".join([found.table(), *found.notes]))


def _state(found: LogitLens, number: int) -> dict[str, Any]:
    """How sure the patches are at one state, and the words most of them would say."""
    names = dict(zip(found.piece_ids.tolist(), found.pieces, strict=True))
    counted = Counter(found.top_ids[number, :, 0].tolist()).most_common(SHOWN)
    patches = found.top_ids.shape[1]
    return {
        "state": found.states[number],
        "entropy": float(found.entropy[number].mean()),
        "probability": float(found.top_probs[number, :, 0].mean()),
        "said": [{"text": names[token], "share": count / patches} for token, count in counted],
    }


def _word(found: LogitLens, word: str) -> dict[str, Any]:
    """Where a word is most probable, with its rank there."""
    at = found.words.index(word)
    table = found.probs[:, :, at]
    number, patch = divmod(int(table.argmax()), table.shape[1])
    row, col = divmod(patch, found.map.cols)
    place = {"state": found.states[number], "row": row, "col": col, "rank": int(found.ranks[number, patch, at])}
    by_state = table.max(1)
    return {"word": word, "token": found.word_ids[at], "probability": float(table.max()), **place, "by_state": by_state}


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


def _text(data: dict[str, Any]) -> str:
    rows = [
        [str(one["state"]), f"{one['entropy']:.2f}", f"{one['probability']:.3f}", _said(one["said"])] for one in data["states"]
    ]
    lines = _table(("state", "entropy", "top probability", "said by most patches"), rows)
    for one in data["words"]:
        lines.append(
            f"{one['word']!r}: {one['probability']:.3f} at state {one['state']}, row {one['row']}, column {one['col']}, "
            f"rank {one['rank']} of {data['vocabulary']}"
        )
    if "patch" in data:
        patch = data["patch"]
        lines.append(f"patch row {patch['row']}, column {patch['col']}:")
        each = [[str(one["state"]), _pairs_cli_lens(one["top"])] for one in patch["states"]]
        lines += _table(("state", "words"), [*each, ["nearest", _pairs_cli_lens(patch["nearest"])]])
    near = data["nearest"]
    lines.append(
        f"nearest word is a whole word at {near['readable_share']:.0%} of patches, {near['random_share']:.0%} for random vectors"
    )
    return "\n".join([*lines, *data["notes"]])


def _said(said: list[dict[str, Any]]) -> str:
    return ", ".join(f"{one['text'].strip() or one['text']!r} {one['share']:.0%}" for one in said)


def _pairs_cli_lens(pairs: list[tuple[str, float]]) -> str:
    return ", ".join(f"{text.strip() or repr(text)} {value:.3f}" for text, value in pairs)


def _layers(text: str | None) -> Any:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if not found:
        raise OptionError(f"--layers wants a state such as 3, or a window such as 2:5, got {text!r}")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def _patch(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if not found:
        raise OptionError(f"--patch wants a row and a column from 0 with a comma between them, got {text!r}")
    return int(found[1]), int(found[2])


ABOUT_CLI_KNOCKOUT = "cut attention between parts of the sequence, and see what happens to the answer"
PATCHES = re.compile(r"\d+,\d+(;\d+,\d+)*")


def add_options_cli_knockout(parser: argparse.ArgumentParser, positive: Any) -> None:
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
