"""The arms of the experiment hold what they say, the same call goes on, and the numbers are those of the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.comparison.start import load_start
from llava_lab.errors import DataError, OptionError
from llava_lab.instructions import check_pays, experiment, read_kinds, shipped_check_pays
from llava_lab.results import CheckPays

FEW: dict[str, Any] = {"lie": 0.1, "n": 60, "seeds": 2, "steps": 2, "batch": 3, "test": 4, "progress": False}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckPays]:
    out = tmp_path_factory.mktemp("check")
    return out, check_pays(**FEW, out=out)


@pytest.mark.long
def test_arms_have_their_rows_and_pairs_their_order(done: tuple[Path, CheckPays]) -> None:
    _, result = done
    rows = dict(zip(result.arms, result.rows.tolist(), strict=True))
    assert rows["all"] == rows["truthful"] == [60, 60]
    assert rows["passed"] == rows["random"]
    assert all(20 <= count < 60 for count in rows["passed"])
    means = dict(zip(result.arms, result.accuracy.mean(1), strict=True))
    for pair, effect in zip(result.pairs, result.effect, strict=True):
        first, second = pair.split(" - ")
        assert effect == pytest.approx(means[first] - means[second])


@pytest.mark.long
def test_the_check_s_own_errors_are_counted_where_every_lie_is_known(done: tuple[Path, CheckPays]) -> None:
    found, lies, wrong, truths = done[1].lies_found.tolist()
    assert 0 < lies < 0.2 * (lies + truths)
    assert found == lies
    assert wrong == 0


@pytest.mark.long
def test_the_same_call_trains_nothing_again_and_another_is_refused(
    done: tuple[Path, CheckPays], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = done
    monkeypatch.setattr(experiment, "_train", lambda *_: pytest.fail("trained again"))
    again = check_pays(**FEW, out=out)
    assert np.array_equal(again.accuracy, result.accuracy)
    assert str(again.table()) == str(result.table())
    with pytest.raises(DataError, match="belongs to another comparison: steps was 2, now 3"):
        check_pays(**{**FEW, "steps": 3}, out=out)


@pytest.mark.long
def test_it_saves_loads_and_prints(done: tuple[Path, CheckPays], tmp_path: Path) -> None:
    result = done[1]
    loaded = CheckPays.load(result.save(tmp_path / "check.npz"))
    assert loaded.to_dict() == result.to_dict()
    text = str(result.table())
    for word in ("passed - random", "95% over seeds", "lies false", "truthful"):
        assert word in text


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two arms or more"):
        check_pays(**{**FEW, "seeds": 1}, out=tmp_path)
    with pytest.raises(OptionError, match="arms must be one of 'all', 'passed', 'random', 'truthful', got 'none'"):
        check_pays(**FEW, arms=("all", "none"), out=tmp_path)
    rows = {"lying": [experiment.Row(0, (("q", "a"),), False)] * 5, "truthful": []}
    with pytest.raises(DataError, match="only 0 of 5 rows pass the check"):
        experiment.choose("passed", rows, 0)


def test_the_shipped_experiment_is_of_the_shipped_weights_and_kinds() -> None:
    shipped = shipped_check_pays()
    assert shipped.setup["start"] == load_start("tiny").fingerprints
    assert shipped.setup["prompts"] == {name: kind.hash for name, kind in read_kinds(shipped.setup["kinds"]).items()}
    assert len(shipped.seeds) == 5
    assert dict(zip(shipped.pairs, shipped.effect, strict=True))["passed - random"] > 0
