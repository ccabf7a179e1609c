"""``llava-lab lens``: what the image tokens say, layer by layer, and where chosen words light up.

It declares its options, calls `llava_lab.probes`, and lays out what was found.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from llava_lab.cli_commands import Reply, _ask, _load, _read_picture, _table, _write
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.results_probes import LogitLens, NearestWords

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
        each = [[str(one["state"]), _pairs(one["top"])] for one in patch["states"]]
        lines += _table(("state", "words"), [*each, ["nearest", _pairs(patch["nearest"])]])
    near = data["nearest"]
    lines.append(
        f"nearest word is a whole word at {near['readable_share']:.0%} of patches, {near['random_share']:.0%} for random vectors"
    )
    return "\n".join([*lines, *data["notes"]])


def _said(said: list[dict[str, Any]]) -> str:
    return ", ".join(f"{one['text'].strip() or one['text']!r} {one['share']:.0%}" for one in said)


def _pairs(pairs: list[tuple[str, float]]) -> str:
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
