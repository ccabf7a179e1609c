"""The naming share counts what it says it counts, beside controls that a planted lens and a naive loop agree with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.cli import main as cli
from llava_lab.errors import DataError, OptionError
from llava_lab.models import Lab, load
from llava_lab.probes import lens as naming
from llava_lab.probes import linear as labels
from llava_lab.probes import logit_lens
from llava_lab.probes.lens import QUESTION, naming_share
from llava_lab.replay.words import word_tokens
from llava_lab.results import NamingShare
from llava_lab.worlds.picturebook import scene
from llava_lab.worlds.scenes import COLOR_NAMES, KIND_NAMES

N = 3


@pytest.fixture(scope="module")
def tiny() -> Lab:
    return load("tiny")


def token(lab: Lab, word: str) -> int:
    return word_tokens(lab, word)[1][0]


def planted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """State 0 says nothing; state 1 says the kind of the thing at its patches; state 2 its colour everywhere it is."""
    scenes = iter([scene("test", i) for i in range(N)])
    nothing = lab.tokenizer.encode(",", add_special_tokens=False)[0]
    real = naming.logit_lens

    def lens(lab: Lab, run: Any, *, top: int) -> Any:
        shown = next(scenes)
        found = real(lab, run, top=top, layers=(0, 3))
        said = np.full_like(found.top_ids, nothing)
        for state, what, names in ((1, "kind", KIND_NAMES), (2, "color", COLOR_NAMES)):
            for patch, number in enumerate(labels.patch_labels(lab, [shown], what)[0].ravel()):
                if number >= 0:
                    said[state, patch, -1] = token(lab, names[number])
        return replace(found, top_ids=said)

    monkeypatch.setattr(naming, "logit_lens", lens)


def test_a_lens_that_names_everything_scores_one_and_its_background_nothing(tiny: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tiny, monkeypatch)
    found = naming_share(tiny, n=N, top=2, progress=False)
    assert found.of("object", "kind").tolist() == [0, 1, 0]
    assert found.of("object", "color").tolist() == [0, 0, 1]
    assert found.of("object").tolist() == [0, 1, 1]
    assert found.of("background").tolist() == [0, 0, 0]
    assert 0 <= found.of("shuffled", "kind")[1] < 1


def test_the_shuffled_control_tries_the_next_picture_s_things(tiny: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tiny, monkeypatch)
    expected, patches = 0.0, 0
    for i in range(N):
        mine = labels.patch_labels(tiny, [scene("test", i)], "kind")[0].ravel()
        others = [thing.kind for thing in scene("test", (i + 1) % N).things]
        expected += sum(others.count(KIND_NAMES[k]) / len(others) for k in mine[mine >= 0])
        patches += int((mine >= 0).sum())
    drawn = naming_share(tiny, n=N, top=2, progress=False).of("shuffled", "kind")[1]
    assert abs(drawn - expected / patches) < 4 * np.sqrt(0.25 / patches)  # a random thing of that picture each time


def test_on_the_shipped_model_a_naive_loop_gives_the_same_share(tiny: Lab) -> None:
    found = naming_share(tiny, n=2, progress=False)
    hit = count = 0
    for i in range(2):
        shown = scene("test", i)
        lens = logit_lens(tiny, tiny.ask(shown.picture(), QUESTION, max_new_tokens=1))
        table = labels.patch_labels(tiny, [shown], "color")[0]
        for (row, col), number in np.ndenumerate(table):
            if number >= 0:
                count += 1
                hit += any(text.strip().lower() == COLOR_NAMES[number] for text, _ in lens.at(lens.states[-1], row, col))
    assert found.patches[0] == count
    assert found.of("object", "color")[-1] == pytest.approx(hit / count)


def test_intervals_hold_the_share_and_the_file_gives_it_back(tiny: Lab, tmp_path: Path) -> None:
    found = naming_share(tiny, n=N, progress=False)
    assert (found.interval[..., 0] <= found.share + 1e-6).all()
    assert (found.share <= found.interval[..., 1] + 1e-6).all()
    back = NamingShare.load(found.save(tmp_path / "n.npz"))
    assert np.array_equal(back.share, found.share)
    assert back.table() == found.table()
    assert len(found.table().splitlines()) == len(found.states) + 1


def test_bad_calls_are_one_line(tiny: Lab) -> None:
    with pytest.raises(OptionError, match="n must be a whole number of at least 2, got 1"):
        naming_share(tiny, n=1)
    with pytest.raises(OptionError, match="top must be"):
        naming_share(tiny, n=2, top=0)
    with pytest.raises(DataError, match="split must be one of"):
        naming_share(tiny, n=2, split="moon")


def test_the_command_prints_what_the_function_finds(tiny: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["naming", "--n", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = naming_share(tiny, n=2, progress=False)
    assert [one["share"] for one in data["shares"]["object"]["either"]] == pytest.approx(found.of("object").tolist())
    assert data["patches"]["object"] == found.patches[0]
