"""The same benchmarks on the picture book: prompts, scorers and files as for the real ones, so that each runs offline.

A twin is a test of the machinery and of models that know the world, never a stand-in for the benchmark's number. What it can
do and the real one cannot: its truth is exact.

- POPE: each scene's things (colour and kind) are asked for, and as many that are absent, drawn as POPE draws them: at random,
  the commonest of the data, those that stand most often beside what is there. Frequencies are counted on the training split.
- MME: pairs about existence, count, position and color, one answered yes and one no.
- Multiple choice: the right answer among others of its kind; MMBench with every rotation as a row.
- Free answers: the reference is the scene in words.
- CHAIR (no part of the twelve): a description is asked for; which kinds, and which colours of a kind, does it name in vain?

Sources: Li et al. 2023 (POPE's three samplings), Fu et al. 2023 (MME's pairs), Rohrbach et al. 2018 (CHAIR).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np

from llava_lab.evaluation.benchmarks.benchmark import SW, Measure, Question, Tally, question
from llava_lab.evaluation.benchmarks.choice import APART, SPLITS, mmbench_prompt, scienceqa_prompt
from llava_lab.evaluation.benchmarks.judged import VET_TASK, WILD_TASK
from llava_lab.evaluation.benchmarks.short import UNANSWERABLE, normalise
from llava_lab.evaluation.items import Drawn, scenes
from llava_lab.worlds import picturebook
from llava_lab.worlds.drawing import COLORS, KINDS
from llava_lab.worlds.questions import DIRECTIONS, MARGIN, NUMBERS, OPPOSITE, PLACES, article, names_for, plural

PEOPLE = 10  # who would all say the same of a drawn scene
COUNTED = 1000  # scenes of the training split whose things are counted
DESCRIBE = "Describe the picture."
LETTERS = "ABCD"

Thing = tuple[str, str]  # colour and kind


def _things(scene: picturebook.Scene) -> list[Thing]:
    return list(dict.fromkeys((thing.color, thing.kind) for thing in scene.things))


# -- POPE -----------------------------------------------------------------------------------


@cache
def frequencies() -> tuple[Counter[Thing], Counter[tuple[Thing, Thing]]]:
    """In how many training scenes each thing stands, and each two things together (in both orders)."""
    alone: Counter[Thing] = Counter()
    together: Counter[tuple[Thing, Thing]] = Counter()
    for index in range(COUNTED):
        things = _things(picturebook.scene("train", index))
        alone.update(things)
        for one, other in combinations(things, 2):
            together.update([(one, other), (other, one)])
    return alone, together


def pope(split: str, n: int, seed: int) -> list[Question]:
    """As many absent things as there are present ones, for each of the three samplings; the yes questions are the same."""
    alone, together = frequencies()
    every = sorted(alone)
    found: dict[str, list[Question]] = {name: [] for name in SPLITS}
    for scene, draw, rng in scenes(split, n, seed, 61):
        present = _things(scene)
        absent = [thing for thing in every if thing not in present]
        mixed = [absent[i] for i in rng.permutation(len(absent))]  # so that equal counts are in random order
        drawn = {
            "random": mixed,
            "popular": sorted(mixed, key=lambda thing: -alone[thing]),
            "adversarial": sorted(mixed, key=lambda thing: -max(together[one, thing] for one in present)),
        }
        for name, order in drawn.items():
            for thing, label in [(one, "yes") for one in present] + [(one, "no") for one in order[: len(present)]]:
                text = f"Is there {article(' '.join(thing))}?\n{SW}"
                key = f"{name}/{len(found[name]) + 1}"
                found[name].append(question(key, scene.name, draw, text, (label,), kind=name))
    return [one for name in SPLITS for one in found[name]]


# -- MME ------------------------------------------------------------------------------------


def mme(split: str, n: int, seed: int) -> list[Question]:
    """Up to four pairs about each scene."""
    found = []
    for scene, draw, rng in scenes(split, n, seed, 62):
        makers = {"existence": _existence, "count": _more, "position": _beside, "color": _color}
        for subtask, make in makers.items():
            pair = make(scene, rng)
            if pair is None:
                continue
            group = f"{subtask}/{scene.name}"
            for number, (asked, label) in enumerate(zip(pair, ("yes", "no"), strict=True), 1):
                extra = {"asked": f"{asked} Please answer yes or no.", "file": f"{scene.name}.txt"}
                more = {"kind": subtask, "group": group, "extra": extra}
                found.append(question(f"{group}#{number}", scene.name, draw, f"{asked}\n{SW}", (label,), **more))
    return found


Pair = tuple[str, str] | None  # answered yes, answered no


def _existence(scene: picturebook.Scene, rng: np.random.Generator) -> Pair:
    shown = sorted({thing.kind for thing in scene.things})
    others = [kind for kind in KINDS if kind not in shown]
    return tuple(f"Is there {article(str(rng.choice(kinds)))}?" for kinds in (shown, others))  # type: ignore[return-value]


def _color(scene: picturebook.Scene, rng: np.random.Generator) -> Pair:
    color, kind = _things(scene)[int(rng.integers(len(_things(scene))))]
    taken = {thing.color for thing in scene.things if thing.kind == kind}
    others = [name for name in COLORS if name not in taken and (name, kind) not in picturebook.HELD_OUT]
    return f"Is there {article(f'{color} {kind}')}?", f"Is there {article(f'{rng.choice(others)} {kind}')}?"


def _more(scene: picturebook.Scene, rng: np.random.Generator) -> Pair:
    counts = Counter(thing.kind for thing in scene.things)
    unequal = [(one, two) for one in sorted(counts) for two in sorted(counts) if counts[one] > counts[two]]
    if not unequal:
        return None
    most, fewest = (plural(kind) for kind in unequal[int(rng.integers(len(unequal)))])
    return f"Are there more {most} than {fewest}?", f"Are there more {fewest} than {most}?"


def _beside(scene: picturebook.Scene, rng: np.random.Generator) -> Pair:
    pairs = []
    for i, one in enumerate(scene.things):
        for j, other in enumerate(scene.things):
            for relation, (axis, sign) in DIRECTIONS.items():
                gap = ((one.x, one.y)[axis] - (other.x, other.y)[axis]) * sign
                if i != j and gap > MARGIN and (first := names_for(scene, i)) and (second := names_for(scene, j)):
                    pairs.append((first[0], relation, second[0]))
    if not pairs:
        return None
    one_name, said, other_name = pairs[int(rng.integers(len(pairs)))]
    return f"Is the {one_name} {said} the {other_name}?", f"Is the {one_name} {OPPOSITE[said]} the {other_name}?"


# -- short answers --------------------------------------------------------------------------


def _asked(split: str, n: int, seed: int, salt: int, types: tuple[str, ...] = ()) -> Iterator[tuple[Drawn, str, str, str, str]]:
    """Questions of the world: what was drawn, text, short answer, whole answer, type."""
    for drawn in scenes(split, n, seed, salt):
        for one in picturebook.ask_about(drawn[0], drawn[2], 2, types):
            yield drawn, one.text, one.short, one.answer, one.type


def gqa(split: str, n: int, seed: int) -> list[Question]:
    """Two questions about each scene, asked for a word or phrase."""
    found = []
    for number, ((scene, draw, _), text, short, _, _) in enumerate(_asked(split, n, seed, 63), 1):
        kind = "binary" if short in ("yes", "no") else "open"
        found.append(question(str(number), scene.name, draw, f"{text}\n{SW}", (short,), kind=kind))
    return found


def vqav2(split: str, n: int, seed: int) -> list[Question]:
    """The same questions, answered alike by ten people."""
    found = []
    for one in gqa(split, n, seed):
        short = one.accepted[0]  # people's answers are kept as the processor leaves them, numbers as digits
        kind = "yes/no" if short in ("yes", "no") else "number" if short in NUMBERS else "other"
        found.append(replace(one, accepted=(normalise(short),) * PEOPLE, kind=kind))
    return found


def vizwiz(split: str, n: int, seed: int) -> list[Question]:
    """One question that can be answered about each scene, and one for the colour of what is not there."""
    found = []
    for scene, draw, rng in scenes(split, n, seed, 64):
        asked = [(one.text, one.short, "answerable") for one in picturebook.ask_about(scene, rng, 1)]
        others = [kind for kind in KINDS if all(thing.kind != kind for thing in scene.things)]
        asked.append((f"What color is the {rng.choice(others)}?", "unanswerable", "unanswerable"))
        for text, short, kind in asked:
            key, text = f"{scene.name}-{kind}", f"{text}\n{UNANSWERABLE}\n{SW}"
            found.append(question(key, scene.name, draw, text, (normalise(short),) * PEOPLE, kind=kind))
    return found


# -- multiple choice ------------------------------------------------------------------------

POOLS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "kind": tuple(KINDS),
    "place": tuple(place for row in PLACES for place in row),
    "count": NUMBERS,
}


def _choices(split: str, n: int, seed: int, salt: int) -> Iterator[tuple[Drawn, str, list[str], int, str]]:
    """Question, four options, the place of the right one, and the type."""
    for drawn, text, short, _, kind in _asked(split, n, seed, salt, tuple(POOLS)):
        rng = drawn[2]
        wrong = [word for word in POOLS[kind] if word != short]
        options = [wrong[i] for i in rng.permutation(len(wrong))[: len(LETTERS) - 1]]
        place = int(rng.integers(len(LETTERS)))
        options.insert(place, short)
        yield drawn, text, options, place, kind


def scienceqa(split: str, n: int, seed: int) -> list[Question]:
    """Options in a line, in round brackets."""
    found = []
    for number, ((scene, draw, _), text, options, place, _) in enumerate(_choices(split, n, seed, 65), 1):
        prompt = scienceqa_prompt(text, options)
        found.append(question(str(number), scene.name, draw, prompt, (LETTERS[place],), options=tuple(options)))
    return found


def mmbench(split: str, n: int, seed: int, *, chinese: bool = False) -> list[Question]:
    """Every rotation of the options as a row, numbered as in the authors' table."""
    found = []
    for number, ((scene, draw, _), text, options, place, kind) in enumerate(_choices(split, n, seed, 66), 1):
        for turn in range(len(options)):
            turned, letter = options[turn:] + options[:turn], LETTERS[(place - turn) % len(options)]
            index = str(number + turn * APART)
            cells = {"index": index, "question": text, **dict(zip(LETTERS, turned, strict=True)), "answer": letter}
            more = {"kind": kind, "group": str(number), "options": tuple(turned), "extra": {"row": cells}}
            prompt = mmbench_prompt(text, turned, chinese=chinese)
            found.append(question(index, scene.name, draw, prompt, (letter,), **more))
    return found


def seed(split: str, n: int, seed: int) -> list[Question]:
    """Options in lines; all about pictures."""
    found = []
    for number, ((scene, draw, _), text, options, place, kind) in enumerate(_choices(split, n, seed, 67), 1):
        more = {"kind": "image", "group": kind, "options": tuple(options)}
        found.append(question(str(number), scene.name, draw, mmbench_prompt(text, options), (LETTERS[place],), **more))
    return found


# -- free answers ---------------------------------------------------------------------------


def wild(split: str, n: int, seed: int) -> list[Question]:
    """A question and a description for each scene; the reference is the world's own answer, the context its description."""
    found = []
    for scene, draw, rng in scenes(split, n, seed, 68):
        caption = picturebook.caption(scene)
        context = picturebook.description(scene, rng)
        asked = [(one.text, one.answer, "conv") for one in picturebook.ask_about(scene, rng, 1)]
        for text, reference, kind in [*asked, (DESCRIBE, caption, "detail")]:
            extra = {"context": context, "task": WILD_TASK}
            found.append(question(f"{scene.name}-{kind}", scene.name, draw, text, (reference,), kind=kind, extra=extra))
    return found


def vet(split: str, n: int, seed: int) -> list[Question]:
    """What is there, as a list with <AND>, and a question about places; skills are named as MM-Vet's."""
    found = []
    for scene, draw, rng in scenes(split, n, seed, 69):
        asked = [(DESCRIBE, "<AND>".join(" ".join(thing) for thing in _things(scene)), ["rec"])]
        for one in picturebook.ask_about(scene, rng, 1, ("place", "relation")):
            asked.append((one.text, one.short, ["rec", "spat"]))
        for number, (text, truth, skills) in enumerate(asked):
            extra = {"task": VET_TASK, "skills": skills}
            key, kind = f"v1_{scene.index}_{number}", ",".join(skills)
            found.append(question(key, scene.name, draw, text, (truth,), kind=kind, extra=extra))
    return found


# -- CHAIR ----------------------------------------------------------------------------------

_KIND = re.compile(rf"\b({'|'.join(KINDS)})(?:e?s)?\b")
_THING = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(KINDS)})(?:e?s)?\b")


def chair(split: str, n: int, seed: int) -> list[Question]:
    """A description of each scene; `accepted` are the things that stand there, "red car"."""
    return [
        question(scene.name, scene.name, draw, DESCRIBE, [" ".join(thing) for thing in _things(scene)])
        for scene, draw, _ in scenes(split, n, seed, 70)
    ]


def named(text: str) -> tuple[set[str], set[str]]:
    """The kinds a description names, and the things, a colour with its kind."""
    lower = text.lower()
    return set(_KIND.findall(lower)), {f"{color} {kind}" for color, kind in _THING.findall(lower)}


def score_chair(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """CHAIRi: named in vain of all named. CHAIRs: descriptions that name any in vain. Recall: named of all there are.

    For kinds, as on COCO, and for things, where a right kind in a wrong colour is in vain too.
    """
    tally, measures = Tally(questions), []
    for level, name in enumerate(("kinds", "things")):
        said = [named(answer)[level] for answer in answers]
        there = [{text.split()[-1] if name == "kinds" else text for text in one.accepted} for one in questions]
        vain = [len(words - truth) for words, truth in zip(said, there, strict=True)]
        right = [len(words & truth) for words, truth in zip(said, there, strict=True)]
        total, every = tally.sums([len(words) for words in said]), tally.sums([len(truth) for truth in there])
        measures += [
            tally.ratio(f"CHAIRi {name}", tally.sums(vain), total, count=len(questions)),
            tally.share(f"CHAIRs {name}", [count > 0 for count in vain]),
            tally.ratio(f"recall {name}", tally.sums(right), every, count=len(questions)),
        ]
    return measures
