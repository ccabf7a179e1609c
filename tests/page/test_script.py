"""The page's own JavaScript in a real Chromium, function by function, against what Python computes."""

from __future__ import annotations

import base64
import string
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

import llava_lab as ll
from llava_lab.geometry import PictureMap
from llava_lab.models import Lab
from llava_lab.models.scope import fold
from llava_lab.models.text import decode, group_words
from llava_lab.page.build import SCRIPTS, SIDES, shares, spec, words, world
from llava_lab.page.graphs import Answer, ask, torch_engine
from llava_lab.results import Run
from llava_lab.worlds.drawing import KINDS, PAPERS
from llava_lab.worlds.picturebook import ask_about, scene
from llava_lab.worlds.scenes import Scene, Thing
from tests.support.widget_page import WidgetPage
from widgets.base import bundle, sources
from widgets.pack import quantize

STRANGE = [
    "  \n\t",
    "\u00a0\u3000x",
    "naïve café",
    "日本の車は何色ですか",
    "🚗 + 🐟 = ?",
    "don't we're I'll",
    "a\u0085b\ufeffc",
    "1234 56,7",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def tiny() -> Lab:
    return ll.load("tiny")


@pytest.fixture(scope="module")
def script(chromium: Browser) -> Iterator[WidgetPage]:
    page = WidgetPage(chromium)
    page.module = bundle(*map(str, SCRIPTS))
    yield page
    page.close()


def run(script: WidgetPage, body: str, given: Any = None) -> Any:
    """`body` with the module as `m` and `given` as `x`."""
    return script.page.evaluate(f"async (x) => {{ const m = await import('/module.js'); {body} }}", given)


# bytes travel as text: a list of a million numbers takes the browser's protocol minutes
BYTES = "((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)))"
TEXT = "((bytes) => btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join('')))"


def packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def texts(count: int) -> list[str]:
    """Questions of the drawn world, then whatever a keyboard gives."""
    rng = np.random.default_rng(0)
    found = [question.text for index in range(count // 8) for question in ask_about(scene("train", index), rng, 4)]
    letters = list(string.printable + "äöüßéñ„“’…日本語кот🚗\u00a0\u2003")
    found += ["".join(rng.choice(letters, int(rng.integers(1, 60)))) for _ in range(count - len(found) - len(STRANGE))]
    return [*found, *STRANGE]


def test_no_name_is_defined_twice_and_nothing_enters_the_page_as_markup() -> None:
    names: dict[str, str] = {}
    for path in sources(*map(str, SCRIPTS)):
        for line in path.read_text("utf-8").splitlines():
            if line.startswith(" "):
                continue
            parts = line.removeprefix("export ").removeprefix("async ").split()
            if parts and parts[0] in ("const", "let", "class", "function"):
                name = parts[1].split("(")[0]
                assert name not in names, f"{name} is defined in {names[name]} and {path.name}"
                names[name] = path.name
        assert "innerHTML" not in path.read_text("utf-8")


def test_a_thousand_texts_have_python_s_tokens(script: WidgetPage, tiny: Lab) -> None:
    asked = texts(1000)
    assert len(asked) == 1000
    ids = run(script, "const t = new m.Tokenizer(x[0]); return x[1].map((text) => t.encode(text));", [words(tiny), asked])
    wrong = [text for text, got in zip(asked, ids, strict=True) if got != tiny.tokenizer(text)["input_ids"]]
    assert wrong == []


def test_prompts_are_python_s_and_what_would_be_read_as_a_mark_is_refused(script: WidgetPage, tiny: Lab) -> None:
    asked = [text for text in texts(200) if text.strip() and not any(mark in text for mark in ("<image>", "</s>"))]
    body = "const t = new m.Tokenizer(x[0]); return x[1].map((text) => t.prompt(text));"
    for text, got in zip(asked, run(script, body, [words(tiny), asked]), strict=True):
        tiny_scope, tiny.scope = tiny.scope, None  # folding is another matter
        try:
            prompt = tiny.sequence(text)
        finally:
            tiny.scope = tiny_scope
        assert got == {"ids": prompt.token_ids.tolist(), "image": list(prompt.segments["image"])}, text
    refusal = "const t = new m.Tokenizer(x[0]); return x[1].map((text) => t.refusal(text));"
    none, mark, fine = run(script, refusal, [words(tiny), [" \n ", "a <image> b", "Is it red?"]])
    assert "Ask something" in none
    assert "<image>" in mark
    assert fine == ""


def test_answers_are_spelt_and_cut_into_words_as_in_python(script: WidgetPage, tiny: Lab) -> None:
    rng = np.random.default_rng(1)
    said = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts(300)]
    said += [rng.integers(4, 731, 12).tolist() for _ in range(50)]  # bytes that are no characters among them
    said = [ids for ids in said if ids]
    body = "const t = new m.Tokenizer(x[0]); return x[1].map((ids) => [t.decode(ids), t.groupWords(ids)]);"
    for ids, (text, grouped) in zip(said, run(script, body, [words(tiny), said]), strict=True):
        assert text == decode(tiny.tokenizer, ids)
        assert grouped == [{"text": w.text, "start": w.start, "stop": w.stop} for w in group_words(tiny.tokenizer, ids)], text


def test_questions_are_folded_as_python_folds_them(script: WidgetPage, tiny: Lab) -> None:
    asked = [
        *(
            "hey, what colour's that big car",
            "whats the color of the tiny auto please",
            "Is the star red?",
            "pls count the stars!!",
        ),
        *("isn't there a mug over the ship", "IS THERE AN ITEM", "How big is the moon", "Is the star red?"),
    ]
    asked += [text for text in texts(300) if text.strip() and text.isascii() and "\n" not in text.strip()][:250]
    got = run(script, "return x[1].map((text) => m.foldQuestion(text, x[0]));", [spec(tiny)["reading"], asked])
    assert [(text, one) for text, one in zip(asked, got, strict=True) if one != fold(text)] == []
    assert run(script, "return m.unknownWords('Is there a dog?', x);", spec(tiny)["reading"]) == ["dog"]


@pytest.mark.parametrize("size", [(96, 96), (288, 288), (640, 427), (97, 333), (900, 601), (40, 60), (5, 3)])
def test_a_picture_becomes_the_very_square_that_python_makes(script: WidgetPage, tiny: Lab, size: tuple[int, int]) -> None:
    width, height = size
    rng = np.random.default_rng(width)
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC))
    picture = np.clip(picture + rng.integers(-20, 20, picture.shape), 0, 255).astype(np.uint8)
    given = {"data": packed(picture), "width": width, "height": height}
    body = f"return {TEXT}(new Uint8Array(m.normalised({{ ...x[0], data: {BYTES}(x[0].data) }}, x[1]).buffer));"
    got = np.frombuffer(base64.b64decode(run(script, body, [given, spec(tiny)["shape"]["square"]])), np.float32)
    np.testing.assert_allclose(got.reshape(1, 3, 96, 96), tiny.pixels(picture).numpy(), atol=2e-6)
    map_ = PictureMap.make(width, height, size=96, rows=12, cols=12, mode="pad")
    assert run(script, "return m.mapOf(x[0], x[1], 96, 12);", [width, height]) == pytest.approx(map_.to_dict())


@pytest.mark.long
def test_every_thing_is_drawn_as_python_draws_it(script: WidgetPage) -> None:
    w = world()
    body = f"""const drawing = new m.Drawing(x[0], {BYTES}(x[1]));
      return x[2].map(({{ things, paper }}) => {TEXT}(drawing.picture(things, paper).data));"""
    cases = []
    for number, kind in enumerate(KINDS):
        color = list(w["colors"])[number % 8]
        cases.append([Thing(kind, color, "large", 0.3, 0.3, SIDES["large"] / 288, 1, number % 2 == 0),
                      Thing(kind, "pink", "small", 0.75, 0.71, SIDES["small"] / 288, 1, number % 3 == 0)])  # fmt: skip
    given = [
        {"paper": n % 7, "things": [{"kind": t.kind, "color": t.color, "size": t.size, "x": t.x * 288, "y": t.y * 288,
                                     "mirrored": t.mirrored} for t in things]}
        for n, things in enumerate(cases)
    ]  # fmt: skip
    pictures = run(script, body, [w, base64.b64encode(shares()).decode(), given])
    for n, (things, got) in enumerate(zip(cases, pictures, strict=True)):
        want = np.zeros((288, 288, 3), np.uint8)
        want[:] = PAPERS[n % 7]
        image = Image.fromarray(want)
        for thing in things:
            drawn, at = Scene._place(thing, 288)
            image.paste(drawn, at, drawn)
        off = np.abs(np.frombuffer(base64.b64decode(got), np.uint8).astype(int).reshape(288, 288, 3) - np.asarray(image, int))
        assert off.max() <= 2, f"{things[0].kind}: {off.max()} levels"


def test_what_is_put_on_the_paper_keeps_the_rules_of_the_training(script: WidgetPage) -> None:
    w = world()
    scenes = run(script, "return [...Array(40).keys()].map((seed) => m.randomThings(x, m.seeded(seed)));", w)
    for things in scenes:
        assert 2 <= len(things) <= 4
        boxes = [(t["x"], t["y"], SIDES[t["size"]]) for t in things]
        for i, (x, y, side) in enumerate(boxes):
            assert min(x, y) - side / 2 >= 2
            assert max(x, y) + side / 2 <= 286
            for ox, oy, other in boxes[:i]:
                assert max(abs(x - ox), abs(y - oy)) >= (side + other) / 2 + 5
    first, second = ({"kind": "car", "color": "red", "size": "large", "x": x, "y": 80, "mirrored": False} for x in (80, 90))
    moved = run(script, "return m.settled(x[0], [x[1]], x[2]);", [w, first, second])
    assert run(script, "return [m.fits(x[0], [x[1]], x[2]), m.fits(x[0], [x[1]], x[3])];", [w, first, second, moved]) == [
        False,
        True,
    ]


@pytest.fixture(scope="module")
def asked(tiny: Lab) -> tuple[Run, Answer]:
    picture = np.asarray(scene("test", 4).picture())
    found = tiny.ask(picture, "Describe the picture.")
    return found, ask(tiny, torch_engine(tiny), tiny.pixels(picture), found.question)


def test_attention_and_rollout_are_python_s(script: WidgetPage, tiny: Lab, asked: tuple[Run, Answer]) -> None:
    found, given = asked
    layers = len(given.sizes)
    looked = {
        "rows": packed(np.concatenate([row.ravel() for row in given.attention]).astype(np.float32)),
        "sizes": given.sizes.transpose(1, 0, 2).tolist(),
        "image": list(found.segments["image"]),
        "prompt": found.segments["answer"][0],
    }
    start = found.segments["answer"][0]
    spans = [[w.start - start, w.stop - start] for w in found.words] + [[0, len(found.token_ids) - start]]
    body = f"""const flat = new Float32Array({BYTES}(x[0].rows).buffer); let at = 0;
      x[0].attention = x[0].sizes.map((_, i) => Array.from({{ length: {layers} }}, () => flat.subarray(at, (at += i + 1))));
      const n = x[1].at(-1)[1]; const a = m.attentionRows(x[0], n); const r = m.rolloutRows(x[0], n);
      return x[1].map(([s, e]) => [Array.from(m.meanRow(a, s, e)), Array.from(m.rolloutMap(r, s, e))]);"""
    maps = np.array(run(script, body, [looked, spans])).reshape(len(spans), 2, 12, 12)
    for column, method in enumerate(("attention", "rollout")):
        by_word = ll.attribute(tiny, found, method=method, target="words").values
        np.testing.assert_allclose(maps[:-1, column], by_word, atol=1e-4)
        np.testing.assert_allclose(maps[-1:, column], ll.attribute(tiny, found, method=method, target="answer").values, atol=1e-4)
    assert np.abs(maps[:, 1]).max() > 0.1


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_maps_are_packed_as_python_packs_them(script: WidgetPage, shift: float) -> None:
    values = np.random.default_rng(0).random((3, 4, 4)) - shift
    levels, scales, lo, hi = quantize(values)
    body = "const q = m.quantised(x); return [Array.from(q.levels), Array.from(q.scales), q.lo, q.hi];"
    got = run(script, body, values.reshape(3, -1).tolist())
    assert got[0] == levels.ravel().tolist()
    np.testing.assert_allclose(got[1], scales.ravel(), rtol=1e-6)
    assert got[2:] == pytest.approx([lo, hi])


def test_random_patches_are_others_and_always_the_same(script: WidgetPage) -> None:
    draws = run(
        script, "return [m.randomDraws(144, [3, 4, 5], 3), m.randomDraws(144, [3, 4, 5], 3), m.randomDraws(4, [0, 1, 2], 3)];"
    )
    assert draws[0] == draws[1]
    assert draws[2] == []  # not enough others
    for draw in draws[0]:
        assert len(set(draw)) == 3
        assert not {3, 4, 5} & set(draw)
