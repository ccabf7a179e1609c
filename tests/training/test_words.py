"""What the language stage reads: single facts are true, scenes retold stay the same scenes."""

from __future__ import annotations

import numpy as np

from llava_lab.training.tiny.language import statements
from llava_lab.training.tiny.pictures import OTHER_COLORS, OTHER_KINDS, retold
from llava_lab.worlds.picturebook import ask_about, scene
from llava_lab.worlds.questions import NUMBERS, RARE, place_of
from llava_lab.worlds.scenes import KIND_NAMES, Scene, Thing


def things_named(drawn: Scene, words: list[str]) -> list[Thing]:
    return [t for t in drawn.things if all(w in (t.kind, t.color, t.size, "thing") for w in words)]


def one_named(drawn: Scene, words: list[str]) -> Thing:
    found = things_named(drawn, words)
    assert len(found) == 1, f"{words} fits {found}"
    return found[0]


def test_single_facts_are_true_and_pick_out_one_thing() -> None:
    forms = set()
    for i in range(80):
        drawn = scene("train", i)
        for given, known in statements(drawn, np.random.default_rng(i), 12):
            words, value = given.split(), known.strip(" .").removeprefix("an ").removeprefix("a ")
            forms.add(words[0] + words[1])
            if given.startswith(" The number of"):
                many = [w.removesuffix("s") if w.removesuffix("s") in (*KIND_NAMES, "thing") else w for w in words[3:-1]]
                assert NUMBERS.index(value) == len(things_named(drawn, many))
            elif words[0] in ("Across", "Up"):
                start, split = words.index("from") + 2, words.index("the", words.index("from") + 2)
                other, thing = one_named(drawn, words[start:split]), one_named(drawn, words[split + 1 : -1])
                gap = thing.x - other.x if words[0] == "Across" else thing.y - other.y
                assert value == {"Across": ("left", "right"), "Up": ("above", "below")}[words[0]][gap > 0]
            else:
                hidden = words[1] if words[2] == "of" else "kind"
                thing = one_named(drawn, words[4:-1] if words[2] == "of" else words[1:-1])
                assert value == (place_of(thing) if hidden == "place" else getattr(thing, hidden))
    assert {"Theplace", "Thecolor", "Thesize", "Thenumber", "Acrossfrom", "Upor"} <= forms


def test_a_scene_retold_keeps_what_is_alike_and_never_makes_a_held_out_pair() -> None:
    new = set()
    for i in range(200):
        drawn = scene("train", i)
        other = retold(drawn, np.random.default_rng(i))
        for key in ("kind", "color"):
            old, names = ([getattr(t, key) for t in s.things] for s in (drawn, other))
            assert [[a == b for b in old] for a in old] == [[a == b for b in names] for a in names]
            new |= set(names)
        assert not any(t.held_out for t in other.things)
        assert [(t.x, t.y, t.size) for t in other.things] == [(t.x, t.y, t.size) for t in drawn.things]
    assert set(OTHER_KINDS) | set(OTHER_COLORS) <= new


def test_rare_comparisons_are_asked_on_purpose_with_the_answer_they_are_for() -> None:
    found: dict[str, set[str]] = {name: set() for name in RARE}
    for i in range(60):
        for name, answers in found.items():
            for question in ask_about(scene("train", i), np.random.default_rng(i), 2, (name,)):
                assert question.type == "comparison"
                answers.add(question.answer.split()[0] if "color" in name else question.short)
                if "color" in name:
                    one, two = (scene("train", i).things[thing].color for thing in question.deciding)
                    assert (one == two) == (question.short == "yes")
    assert found == {"same color": {"Yes,"}, "different color": {"No,"}, "unequal": {"yes", "no"}}
