"""Results save to one file without pickle and come back exactly; targets resolve to predicting positions."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from llava_lab.errors import DataError, TargetError
from llava_lab.geometry import PictureMap
from llava_lab.results import Relevance, Run, Target, Word, save_npz


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


def test_run_round_trips_exactly(run: Run, tmp_path: Path) -> None:
    again = Run.load(run.save(tmp_path / "run.npz"))
    for name in ("picture", "token_ids", "logprobs"):
        one, two = getattr(run, name), getattr(again, name)
        assert one.dtype == two.dtype
        assert np.array_equal(one, two)
    for name in ("question", "answer", "prompt", "tokens", "segments", "words", "map", "model", "fingerprint", "seed", "options"):
        assert getattr(run, name) == getattr(again, name), name


def test_relevance_round_trips_exactly(relevance: Relevance, tmp_path: Path) -> None:
    again = Relevance.load(relevance.save(tmp_path / "map.npz"))
    assert np.array_equal(again.values, relevance.values)
    for name in ("targets", "method", "options", "map", "model", "fingerprint", "seconds", "passes", "notes", "extras"):
        assert getattr(again, name) == getattr(relevance, name), name


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


def test_targets_are_the_positions_before_their_tokens(run: Run) -> None:
    assert run.target("red") == Target("word", "red.", (10, 11), (11, 12))
    assert run.target("RED").positions == (10, 11)
    assert run.target(1) == Target("token", " car", (8,), (9,))
    assert run.target().positions == (7, 8, 9, 10, 11)
    assert run.target("answer") == run.target(None)
    assert [t.text for t in run.word_targets()] == ["The", "car", "is", "red."]
    assert run.image_positions.tolist() == [1, 2, 3, 4]


def test_missing_words_list_what_is_there(run: Run) -> None:
    with pytest.raises(TargetError, match="no word 'blue'.*'The', 'car', 'is', 'red.'"):
        run.target("blue")
    with pytest.raises(TargetError, match="run from 0 to 4, got 9"):
        run.target(9)
    with pytest.raises(TargetError, match="a pair of words"):
        run.target(("red", "blue"))


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


def test_relevance_refuses_a_wrong_shape(relevance: Relevance) -> None:
    with pytest.raises(DataError, match=r"\(1, 2, 2\)"):
        Relevance(relevance.values[0], relevance.targets, "x", {}, relevance.map, "m", "f", 0.0, {})


def test_top_patches_come_strongest_first(relevance: Relevance) -> None:
    assert [(r, c) for r, c, _ in relevance.top(2)] == [(1, 0), (0, 0)]
    assert relevance.on_picture().shape == (4, 6)
    assert relevance.with_notes("more").notes == ("a note", "more")
