"""Every result is one file that comes back exactly, and shows itself as text, JSON and HTML; targets resolve to positions."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab import results
from llava_lab.errors import DataError, OptionError, TargetError, WriteError
from llava_lab.geometry import PictureMap
from llava_lab.results import Comparison, GroundTruth, Relevance, Run, Saved, Table, Target, Word, load_npz, save_npz
from llava_lab.results.table import map_row, thumbnail
from tests.support import damaged
from tests.support.families import family
from tests.support.result_examples import NASTY, examples

EXAMPLES = examples()
KINDS: list[Any] = [
    kind for kind in vars(results).values() if isinstance(kind, type) and issubclass(kind, Saved) and kind is not Saved
]
OLD = Path(__file__).parent / "support" / "old_results"

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def same(one: Any, two: Any) -> bool:
    """Equal to the last bit, arrays with their types."""
    if isinstance(one, np.ndarray):
        return type(two) is type(one) and one.dtype == two.dtype and one.tobytes() == two.tobytes() and one.shape == two.shape
    if is_dataclass(one) and not isinstance(one, type):
        return type(one) is type(two) and all(same(getattr(one, f.name), getattr(two, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, tuple):
        return isinstance(two, tuple) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and (one == two or (one != one and two != two))


# -- every kind of result -------------------------------------------------------------------


@each_kind
def test_a_result_comes_back_exactly(kind: type[Saved], tmp_path: Path) -> None:
    result = EXAMPLES[kind]
    assert same(kind.load(result.save(tmp_path / "result.npz")), result)


@each_kind
def test_a_result_shows_itself(kind: type[Saved]) -> None:
    result = EXAMPLES[kind]
    line = repr(result)
    assert line.startswith(f"{kind.__name__}(")
    assert "\n" not in line
    assert len(line) < 160
    table = result.table()
    assert isinstance(table, Table)
    assert table.rows or table.below
    # strictly JSON: no array, no tuple that would come back as a list, nothing that is not finite
    data = result.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    shown = result._repr_html_()
    assert NASTY not in shown
    if NASTY in str(table):
        assert "&lt;b&gt;red &amp; &#x27;blue&#x27;&lt;/b&gt;" in shown


@pytest.mark.parametrize(("kind", "least"), [(Run, 1), (Relevance, 1), (results.Comparison, 1), (results.HeadMaps, 1)])
def test_what_has_pictures_shows_them_small_and_no_arrays(kind: type[Saved], least: int) -> None:
    """Above the table; every name in them is text."""
    result = EXAMPLES[kind]
    shown = result._repr_html_()
    assert shown.count("<img alt=") >= least
    assert shown.index("<img") < shown.index("<table")
    assert "[[" not in shown
    assert len(shown) < 60_000
    assert NASTY not in shown


def test_a_map_is_shown_in_the_colours_of_figures_and_a_flat_one_too() -> None:
    shown = map_row([(f"<{i}>", np.full((3, 3), float(i))) for i in range(10)])
    assert shown.count("<img") == 8
    assert "and 2 more" in shown
    assert "&lt;0&gt;" in shown
    assert map_row([]) == ""
    assert thumbnail(np.zeros((0, 0, 3), np.uint8), "none") == ""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "fingerprint" in {field.name for field in fields(kind)}])
def test_a_file_without_its_fingerprint_is_refused(kind: type[Saved], tmp_path: Path) -> None:
    """Or an explanation could be laid over another checkpoint's run."""
    path = EXAMPLES[kind].save(tmp_path / "result.npz")
    header, arrays = load_npz(path, kind.KIND)
    assert header.pop("fingerprint")
    save_npz(path, kind.KIND, {name: value for name, value in header.items() if name not in ("kind", "llava_lab")}, arrays)
    with pytest.raises(DataError, match="it lacks 'fingerprint'"):
        kind.load(path)


def test_what_a_result_must_have_has_no_default() -> None:
    """A default would stand in silently for what a file lost."""
    for kind in KINDS:
        for field in fields(kind):
            if field.name in ("fingerprint", "model", "map", "values", "targets"):
                assert field.default is MISSING, (kind, field.name)


def test_files_of_the_release_before_load(tmp_path: Path) -> None:
    """Written by the code that saved each class in its own way; `control` was not kept then."""
    run = Run.load(OLD / "run.npz")
    assert (run.answer, run.words, run.segments["image"], run.seed) == ("red", (Word("red", 3, 4),), (1, 3), 2)
    assert [view.name for view in run.views] == ["overview", "tiles"]
    assert run.views[1].tile_cols == (0, 1)
    relevance = Relevance.load(OLD / "relevance.npz")
    assert (relevance.targets, relevance.notes, relevance.control) == ((Target("word", "red", (2,), (3,)),), ("a note",), True)
    np.testing.assert_array_equal(relevance.view_values[1], 2 * relevance.values)
    heads = results.HeadMaps.load(OLD / "head_maps.npz")
    assert heads.values.dtype == np.float16
    assert (heads.map, heads.notes) == (run.map, ("n",))
    comparison = results.Comparison.load(OLD / "comparison.npz")
    assert (comparison.methods, comparison.refused, comparison.truth) == (("rollout",), {"x": "no"}, {})
    assert comparison.faithfulness["rollout"].beats_random[0]
    assert not comparison.maps["rollout"].control
    for old in (run, relevance, heads, comparison):
        assert same(type(old).load(old.save(tmp_path / "again.npz")), old)


# -- files ----------------------------------------------------------------------------------


@pytest.fixture
def run() -> Run:
    """BOS, 4 image tokens, two words of question, a cue, then: The car is red."""
    tokens = ("<s>", *["<image>"] * 4, "What", "?", "ASSISTANT:", " The", " car", " is", " red", ".")
    spans = {"system": (0, 1), "image": (1, 5), "question": (5, 7), "cue": (7, 8), "answer": (8, 13)}
    words = (Word("The", 8, 9), Word("car", 9, 10), Word("is", 10, 11), Word("red.", 11, 13))
    return Run(
        picture=np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3),
        question="What?",
        answer="The car is red.",
        prompt="<image>\nWhat? ASSISTANT:",
        token_ids=np.arange(13, dtype=np.int64),
        tokens=tokens,
        segments=spans,
        words=words,
        logprobs=np.linspace(-1, -0.1, 5, dtype=np.float32),
        map=PictureMap.make(6, 4, size=8, rows=2, cols=2, mode="pad"),
        model="m",
        fingerprint="f",
        seed=3,
        options={"prompt": "hf", "temperature": 0.5, "stopped": "eos"},
    )


@pytest.fixture
def relevance(run: Run) -> Relevance:
    values = np.array([[[0.1, -0.2], [3.0, 1e-7]]], np.float32)
    passes = {"forward": 1, "backward": 0}
    return Relevance(
        values, (run.target("red"),), "rollout", {"layers": None}, run.map, "m", "f", 0.1, passes, ("a note",), {"x": [1]}
    )


def test_saved_files_hold_no_pickle_and_no_half_file_stays(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path / "run.npz")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            head = archive.read(name)[:128]
            assert head.startswith(b"\x93NUMPY")
            assert b"|O" not in head
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_a_failing_save_leaves_the_old_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.save(tmp_path / "run.npz")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("llava_lab.results.save.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        run.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_foreign_files_are_refused_in_one_line(run: Run, relevance: Relevance, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Run.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="not a saved run"):
        Run.load(tmp_path / "text.npz")
    with pytest.raises(DataError, match="holds a relevance"):
        Run.load(relevance.save(tmp_path / "map.npz"))
    save_npz(tmp_path / "cut.npz", "run", {}, {})
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:40])
    with pytest.raises(DataError, match="not a saved run"):
        Run.load(tmp_path / "cut.npz")


def told(kind: type[Saved], path: Path) -> str:
    """Why a file is refused; "" where it is not, and all that its result shows of itself works."""
    try:
        result = kind.load(path)
    except DataError as error:
        return str(error)
    repr(result)
    result._repr_html_()
    json.dumps(result.to_dict(), allow_nan=False, ensure_ascii=False).encode()
    return ""


@family("kind", KINDS, quick=8, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_in_one_line_and_what_loads_works(kind: type[Saved], tmp_path: Path) -> None:
    good, bad = EXAMPLES[kind].save(tmp_path / "good.npz"), tmp_path / "bad.npz"
    lines = []
    for what, raw in damaged.changes(good, 24, seed=KINDS.index(kind)):
        bad.write_bytes(raw)
        lines.append(told(kind, bad))
        assert "\n" not in lines[-1], what
        assert len(lines[-1]) < 600, what
    assert any(lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": np.linspace(-1, 0.5, 5, dtype=np.float32)}, "log-probabilities are at most 0, got 0.5"),
        ({"words": (Word("red", 10, 11), Word("car", 9, 10))}, "its words must stand in the order of the answer, got red, car"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(run: Run, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Run.load(replace(run, **changes).save(tmp_path / "run.npz"))


def test_hostile_files_are_refused_before_they_take_memory(run: Run, relevance: Relevance, tmp_path: Path) -> None:
    bad = tmp_path / "bad.npz"
    for what, raw in damaged.hostile(relevance.save(tmp_path / "good.npz")):
        bad.write_bytes(raw)
        tracemalloc.start()
        line = told(Relevance, bad)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000, what
        tracemalloc.stop()
        assert line.startswith(f"{bad} "), what
        assert "\n" not in line, what
        assert len(line) < 600, what


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("where", ["pipe", "folder", "/dev/zero", "no\0name"])
def test_only_regular_files_are_read(where: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no regular file|a folder|no name a file can have"):
        Run.load(where if where.startswith("/") else f"{tmp_path}/{where}")


def test_numbers_that_are_not_finite_are_not_saved(relevance: Relevance, tmp_path: Path) -> None:
    spoilt = replace(relevance, values=np.full_like(relevance.values, np.nan))
    with pytest.raises(DataError, match="values must be finite numbers, got 4 of 4"):
        spoilt.save(tmp_path / "map.npz")
    assert not list(tmp_path.iterdir())


# -- tables ---------------------------------------------------------------------------------


def test_a_table_is_aligned_text_and_escaped_html() -> None:
    inner = Table(("word", "place"), (("car", "3"),), title="", line="{0} at {1}")
    table = Table(("a", "longer"), (("wide cell", "<i>"), ("x", "")), title="above", below=(inner,), notes=("", "note & more"))
    assert str(table).splitlines() == ["above", "a          longer", "wide cell  <i>", "x", "", "car at 3", "", "note & more"]
    shown = table._repr_html_()
    assert "<th>longer</th>" in shown
    assert "<td>&lt;i&gt;</td>" in shown
    assert "note &amp; more" in shown
    assert str(table.titled(None)).startswith("a ")


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (results.Effect, {}, ("before: red", "proof: 288 cut entries, largest weight 0", "-0.250  -1.250  -1.000  100")),
        (results.Sanity, {}, ("rollout, explained: 'red'", "passed: model changed, question partly")),
        (results.Comparison, {"refused": {"rise": "why"}}, ("method   gain", "rise refused: why")),
        (results.Leaderboard, {}, ("tiny on picturebook test: 40 of 50 pictures explained", "gain       all    color")),
        (results.FlowSweep, {}, ("change of 'red.'", "1 to 2  -1.300")),
        (results.Relevance, {}, ("rollout (residual=0.5, fusion=mean), 0.21 s; strongest patches", "note: <b>red")),
        (results.Ablation, {}, ("5 seeds, rates chosen on validation", "McNemar on the pooled seeds: +3 -2, p = 0.5")),
        (results.NearestWords, {}, ("100% of patches, 10% for random vectors", "wheel         1")),
        (results.HallucinationCheck, {}, ("AUC 0.750 [0.500, 1.000] on 2 pictures",)),
    ],
)  # fmt: skip
def test_tables_say_what_the_command_line_says(kind: type[Any], change: dict[str, Any], words: tuple[str, ...]) -> None:
    text = str(replace(EXAMPLES[kind], **change).table())  # type: ignore[type-var]
    for part in words:
        assert part in text, text


def test_a_lens_s_table_has_its_words_and_one_patch() -> None:
    lens, near = EXAMPLES[results.LogitLens], EXAMPLES[results.NearestWords]
    lines = str(lens.table(patch=(8, 5), near=near)).splitlines()  # type: ignore[call-arg]
    assert lines[1] == "0      5.25     0.397            'grass' 99%, 'car' 1%"
    assert "'car': 0.900 at state 4, row 8, column 5, rank 1 of 1000" in lines
    assert "4        car 0.900, grass 0.225, of 0.112, sky 0.056" in lines
    assert "nearest  wheel 0.500, roof 0.250, sky -0.200" in lines
    assert lines[-1] == "Made by hand."


def test_a_lens_finds_words_as_they_read() -> None:
    lens: Any = EXAMPLES[results.LogitLens]
    # asked for: its own table; kept pieces: summed; " sky" and "sky" read alike; any case where none is spelt so
    assert lens.probability_of("car")[4, 101] == pytest.approx(0.9)
    np.testing.assert_allclose(lens.probability_of("sky")[0, :2], 0.2)
    assert lens.probability_of("sky")[4, 101] == pytest.approx(0.9 / 16)
    assert lens.knows("red")
    assert not lens.knows("blue")
    assert lens.matching(" ").size == 0
    assert lens.probability_of("blue").max() == 0


# -- targets --------------------------------------------------------------------------------


def test_targets_are_the_positions_before_their_tokens(run: Run) -> None:
    assert run.target("red") == Target("word", "red.", (10, 11), (11, 12))
    assert run.target("RED").positions == (10, 11)
    assert run.target(1) == Target("token", " car", (8,), (9,))
    assert run.target().positions == (7, 8, 9, 10, 11)
    assert run.target("answer") == run.target(None)
    assert [t.text for t in run.word_targets()] == ["The", "car", "is", "red."]
    assert run.image_positions.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", [Relevance, GroundTruth, Comparison])
def test_a_result_s_target_is_meant_by_number_or_by_its_text(kind: type[Any]) -> None:
    result: Any = EXAMPLES[kind]
    calls: dict[type, Any] = {
        Relevance: lambda target: (result.top(3, target=target), result.on_picture(target).tobytes()),
        GroundTruth: lambda target: result.value(result.measures[0], target),
        Comparison: lambda target: (
            result.rows(target),
            result.greyed(target),
            result.to_dict(target),
            str(result.table(target)),
        ),
    }
    last = len(result.targets) - 1
    for target in (-1, np.int64(last), result.targets[last].text):
        np.testing.assert_equal(calls[kind](target), calls[kind](last))
    for wrong in (len(result.targets), "no such target", 0.5, None, True, [0], -len(result.targets) - 1):
        with pytest.raises(TargetError, match="this result has .*; got"):
            calls[kind](wrong)


def test_confidence_is_the_least_certain_word_that_says_something(run: Run) -> None:
    assert run.probabilities == pytest.approx(np.exp([-1, -0.775, -0.55, -0.425]))
    assert run.confidence == pytest.approx(np.exp(-0.775))  # "The" is less certain and says nothing
    shy = replace(run, words=run.words[::2], answer="The is")
    assert shy.confidence == pytest.approx(np.exp(-1))
    assert np.isnan(replace(run, words=()).confidence)


def test_patches_and_positions_are_each_others(run: Run) -> None:
    assert run.positions([(0, 0), (1, 1), (0, 1)]).tolist() == [1, 4, 2]
    assert [run.patch(position) for position in (0, 1, 4, 5)] == [None, (0, 0), (1, 1), None]
    assert run.positions([]).tolist() == []
    mask: Any = np.array([[False, True], [False, False]])
    assert run.positions(mask).tolist() == [2]
    wrong: Any
    for wrong in ([(2, 0)], [(-1, 0)], [(True, False)], [(0.0, 1.0)], [0, 1], (0, 1), ["00"], None, np.eye(3, dtype=bool)):
        with pytest.raises(OptionError, match="^patches"):
            run.positions(wrong)


WORDS = {  # how a word of an answer may be asked for, whatever form it is in there
    "café": ["café", "cafe\u0301", "CAFÉ", "CAFE\u0301", " café ", "café.", '"café"', "Café!", np.str_("café")],
    "cafe\u0301": ["café", "cafe\u0301", "Café?"],
    "Straße": ["straße", "STRASSE", "strasse", "Straße,"],
    "İt": ["i\u0307t", "İT"],
    "ﬁsh": ["fish", "ﬁsh", "FISH"],
    ".": [".", " . "],
    "...": ["..."],
    "赤": ["赤"],
    "🦊": ["🦊", "🦊!"],
}


@pytest.mark.parametrize(("said", "asked"), [(said, asked) for said in WORDS for asked in WORDS[said]])
def test_a_word_is_found_without_case_signs_and_ways_to_write_an_accent(run: Run, said: str, asked: str) -> None:
    told = replace(run, words=(Word("The", 8, 9), Word(said, 9, 10)))
    assert told.word(asked) == told.words[1]


@pytest.mark.parametrize("asked", ["", " ", "!", "ca", "re", "car is", 3, None, b"car", ["car"], 1.5, "\ud800", True, "cär"])
def test_what_is_no_word_of_the_answer_is_refused_in_one_line(run: Run, asked: Any) -> None:
    with pytest.raises(TargetError, match="word") as error:
        run.word(asked)
    assert len(str(error.value)) < 200
    with pytest.raises(OptionError, match="occurrence must be a whole number"):
        run.word("car", occurrence=-1)


@pytest.mark.parametrize("what", [True, np.True_, 1.0, -1, 5, 2**70, b"red", range(2), {1}, str, 1j, np.arange(2), "", "re"])
def test_what_is_no_target_is_refused_in_one_line(run: Run, what: Any) -> None:
    with pytest.raises(TargetError) as error:
        run.target(what)
    assert len(str(error.value)) < 200
    ones: list[Any] = [np.array(1), np.int8(1)]
    assert [run.target(one) for one in ones] == [run.target(1)] * 2


CIRCLE: dict[str, Any] = {}
ODD: dict[str, dict[str, Any]] = {
    "a set": {"options": {"a": {1}}},
    "an array among options": {"options": {"a": np.arange(3)}},
    "a number of numpy's": {"options": {"a": np.int64(3)}},
    "a path": {"options": {"a": Path("a")}},
    "bytes": {"options": {"a": b"x"}},
    "a complex number": {"options": {"a": 1j}},
    "a pair for a name": {"options": {(1, 2): 3}},
    "a circle": {"options": CIRCLE},
    "a list too deep": {"options": {"a": json.loads("[" * 40 + "]" * 40)}},
    "half a character": {"answer": "\ud800"},
    "no answer": {"answer": None},
    "a number for text": {"model": 3},
    "a seed beyond 64 bits": {"seed": 2**70},
    "a seed of numpy's": {"seed": np.int64(3)},
    "segments of text": {"segments": {"image": "x"}},
    "a picture of floats": {"picture": np.zeros((4, 6, 3))},
    "a picture of another size": {"picture": np.zeros((5, 6, 3), np.uint8)},
    "an array of objects": {"token_ids": np.full(13, 3, object)},
    "lists for an array": {"token_ids": list(range(13))},
    "too few probabilities": {"logprobs": np.zeros(2, np.float32)},
}
CIRCLE["a"] = CIRCLE


@pytest.mark.parametrize("what", ODD)
def test_what_could_not_be_loaded_again_is_not_saved(run: Run, tmp_path: Path, what: str) -> None:
    with pytest.raises(DataError, match="^this run cannot be saved") as error:
        replace(run, **ODD[what]).save(tmp_path / "run.npz")
    assert len(str(error.value)) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, 3, b"run.npz", ["run.npz"], object(), 1.5])
def test_what_is_no_path_is_refused_in_one_line(run: Run, path: Any) -> None:
    with pytest.raises(WriteError, match="expected the path of a file to write, got "):
        run.save(path)
    with pytest.raises(DataError, match="expected the path of a file, got "):
        Run.load(path)


def test_maps_are_subtracted_averaged_and_masked(relevance: Relevance) -> None:
    double = replace(relevance, values=2 * relevance.values, method="b")
    less = relevance - double
    np.testing.assert_array_equal(less.values, -relevance.values)
    assert less.method == f"{relevance.method} - b"
    np.testing.assert_allclose(Relevance.mean([relevance, double]).values, 1.5 * relevance.values)
    np.testing.assert_allclose(np.abs(relevance.normalised().values).sum((1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose((relevance.normalised() - double.normalised()).values, 0, atol=1e-7)
    seen = relevance.map.patches(points=[(relevance.map.width / 2, relevance.map.height / 2)])
    inside = relevance.masked(points=[(relevance.map.width / 2, relevance.map.height / 2)])
    ((row, col),) = seen
    np.testing.assert_array_equal(inside.values[:, row, col], relevance.values[:, row, col])
    assert np.count_nonzero(inside.values) <= len(relevance.values)
    elsewhere = replace(
        relevance, map=PictureMap.make(50, 50, size=8, rows=relevance.map.rows, cols=relevance.map.cols, mode="pad")
    )
    two = replace(relevance, values=np.repeat(relevance.values, 2, 0), targets=relevance.targets * 2)
    for wrong in (elsewhere, two):
        with pytest.raises(OptionError, match="expected maps"):
            _ = relevance - wrong
    with pytest.raises(OptionError, match="at least one"):
        Relevance.mean([])


def test_missing_words_list_what_is_there(run: Run) -> None:
    with pytest.raises(TargetError, match="no word 'blue'.*'The', 'car', 'is', 'red.'"):
        run.target("blue")
    with pytest.raises(TargetError, match="run from 0 to 4, got 9"):
        run.target(9)
    with pytest.raises(TargetError, match="a pair of words"):
        run.target(("red", "blue"))


def test_relevance_refuses_a_wrong_shape(relevance: Relevance) -> None:
    with pytest.raises(DataError, match=r"\(1, 2, 2\)"):
        Relevance(relevance.values[0], relevance.targets, "x", {}, relevance.map, "m", "f", 0.0, {})


def test_top_patches_come_strongest_first(relevance: Relevance) -> None:
    assert [(r, c) for r, c, _ in relevance.top(2)] == [(1, 0), (0, 0)]
    assert relevance.on_picture().shape == (4, 6)
    assert relevance.with_notes("more").notes == ("a note", "more")
