"""Shipping a comparison: what lands where, in one piece or not at all, and never with another run's models."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.comparison import ship as ablation_card
from llava_lab.comparison import ship as ablation_ship
from llava_lab.comparison.ship import CONNECTORS, Change, first_job, ship_ablation
from llava_lab.errors import CheckpointError, DataError, OptionError
from llava_lab.models import folders
from llava_lab.results import Ablation
from llava_lab.shipped import ABLATION, ASSETS
from tests.support.ablation_examples import example_ablation

shipped = importlib.import_module("llava_lab.judging.leaderboard")  # the module: its package gives the function of that name

CHANGE = Change(questions=12, same=11, right_before=9, right_after=8, logit=0.1, logit_rounded=0.05, logit_spread=1, of_result=12,
                bytes=5_100_000)  # fmt: skip


def untaught(**changes: Any) -> Ablation:
    """A result of models that learnt nothing, as the random ones here: no answer is right."""
    right = np.zeros_like(example_ablation(budgets=("samples", "flops")).right)
    return example_ablation(budgets=("samples", "flops"), right=right, **changes)


@pytest.fixture
def out(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished comparison's folder; both kept models are the random checkpoint, which counts as `tiny` too."""
    assets = tmp_path / "assets"
    names = {"tiny": tiny_folder, "tiny-linear": assets / "linear", "tiny-mlp": assets / "mlp2x_gelu"}
    monkeypatch.setattr(folders, "NAMES", MappingProxyType(names))
    monkeypatch.setattr(shipped, "COMPARISON", assets / "ablation.npz")
    result = untaught()
    result.save(tmp_path / "run" / "ablation.npz")
    (tmp_path / "run" / "models").mkdir()
    for name in CONNECTORS:
        (tmp_path / "run" / "models" / first_job(result, name).id).symlink_to(tiny_folder)
    return tmp_path / "run"


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipping without answering a question, for tests that look at files."""
    monkeypatch.setattr(ablation_ship, "measure", lambda *_, **__: CHANGE)


def test_the_folder_taken_is_the_first_seed_with_stage_1_at_equal_samples() -> None:
    result = example_ablation(budgets=("flops", "samples"), seeds=(7, 8, 9, 10, 11))
    assert first_job(result, "mlp2x_gelu").id == "test+compositions-mlp2x_gelu-rate0.003-steps80+100-seed7"
    only = replace(result, budgets=("flops",) * 12)
    with pytest.raises(OptionError, match="no arm 'linear' with budget samples"):
        first_job(only, "linear")


def test_a_shipped_comparison_opens_loads_and_says_what_bytes_changed(out: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no comparison of connectors ships at .*; make one with: llava-lab ablate"):
        ll.shipped_ablation()
    changes = ship_ablation(out, tmp_path / "assets", pictures=2, progress=False)
    found, saved = ll.shipped_ablation(), untaught()
    assert found.model == "runs/tiny"
    assert np.array_equal(found.right, saved.right)
    assert found.rows() == saved.rows()
    lab = ll.load("tiny-mlp")
    assert lab.card.licence == "apache-2.0"
    for name, change in changes.items():
        assert change.questions == change.of_result == 8, name  # two pictures, four questions each
        assert change.right_before == 0
        assert 0 <= change.same <= 8
        assert 0 < change.logit < change.logit_spread
        assert 0 < change.logit_rounded < change.logit_spread
    card = (tmp_path / "assets" / "README.md").read_text()
    assert changes["linear"].in_words() in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assets", "run"]  # no temporary names
    assert sorted(path.name for path in (tmp_path / "assets").iterdir()) == [
        "README.md",
        "ablation.npz",
        "linear",
        "mlp2x_gelu",
    ]


def test_a_folder_of_another_run_is_refused_and_nothing_is_left(out: Path, tmp_path: Path) -> None:
    other = replace(untaught(), right=np.ones_like(untaught().right))
    with pytest.raises(DataError, match="answers 0 of 8 test questions as the result says; it is of another run"):
        ship_ablation(out, tmp_path / "assets", result=other, pictures=2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("unmeasured")
def test_an_older_shipment_gives_way_and_a_strange_folder_does_not(out: Path, tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    ship_ablation(out, assets)
    (assets / "stale").write_text("x")
    ship_ablation(out, assets, start="elsewhere")
    assert Ablation.load(assets / "ablation.npz").model == "elsewhere"
    assert not (assets / "stale").exists()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "mine").write_text("x")
    with pytest.raises(OptionError, match="holds something that is not a shipped comparison"):
        ship_ablation(out, strange)
    assert (strange / "mine").is_file()


@pytest.mark.usefixtures("unmeasured")
def test_what_is_missing_is_said_before_anything_is_written(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "models" / first_job(untaught(), "linear").id).unlink()
    with pytest.raises(CheckpointError, match=r"linear-rate0.001-steps80\+100-seed0 is missing; run llava-lab ablate"):
        ship_ablation(out, tmp_path / "assets")
    (out / "ablation.npz").unlink()
    with pytest.raises(DataError, match=r"ablation.npz is missing; make it with: llava-lab ablate"):
        ship_ablation(out, tmp_path / "assets")
    monkeypatch.setattr(ablation_ship, "LARGEST", 100)
    with pytest.raises(CheckpointError, match="is missing"):
        ship_ablation(out, tmp_path / "assets", result=untaught())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("unmeasured")
def test_a_result_too_large_to_ship_is_refused(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_ship, "LARGEST", 100)
    with pytest.raises(DataError, match=r"the result takes [\d,]+ bytes and at most 100 ship"):
        ship_ablation(out, tmp_path / "assets")
    assert not (tmp_path / "assets").exists()


def test_the_card_has_command_scores_verdicts_rates_and_limits() -> None:
    result = replace(example_ablation(budgets=("samples", "flops")), model="runs/tiny")
    card = ablation_card.of_result(result, {"linear": CHANGE.in_words()}, fused=True)
    command = (
        "llava-lab ablate --start runs/tiny --out runs/ablation --connector linear --connector mlp2x_gelu --connector bottleneck"
    )
    command += " --rates 0.001,0.003,0.01 --seeds 5 --stage1 both --budget both --validation 200 --test 3 --seed 0 --compile"
    assert f"    {command} --save runs/ablation/ablation.npz\n" in card
    scores = [line for line in card.splitlines() if re.search(r"\| (samples|flops) \| (yes|no) \|", line)]
    assert len(scores) == 24  # every arm on both splits
    assert scores[0].startswith("| linear | samples | yes | 49,408 | 0.001 | 80+100 | **36.7%** (31.7% to 41.7%) | 2.0 |")
    verdicts = [
        line for line in card.splitlines() if "not distinguishable |" in line or "**better**" in line or "**worse**" in line
    ]
    assert len(verdicts) == 2 * len(result.pairs)
    assert "| +10.00 | +7.00 to +13.00 | +9.00 to +11.00 | 0.004 | **better** | 40 |" in verdicts[0]
    assert "| linear (samples, with stage 1) | **0.5000** | 0.6000 | 0.7000 |" in card
    for said in ("seeds (0, 1, 2, 3, 4)", "2,000 training pictures", "11 of 12 answers are the same", "- a note to read"):
        assert said in card
    assert card.startswith("---\nlicense: apache-2.0\n")


def on_photos(**changes: Any) -> Ablation:
    """The example as if it were of photographs."""
    recipe = {"name": "photo ablation", "align": {"steps": 200, "batch": 1024}, "instruct": {"steps": 20, "batch": 1}}
    return replace(example_ablation(), data="photos", pictures=(1000, 32, 3, 3), recipe=recipe, **changes)


def test_a_comparison_on_photographs_ships_as_numbers_and_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tmp_path / "assets"
    monkeypatch.setattr(shipped, "PHOTO_COMPARISON", assets)
    with pytest.raises(DataError, match="no comparison of connectors ships at .*ablate --data photos"):
        ll.shipped_ablation(data="photos")
    with pytest.raises(OptionError, match="picturebook and photos, got 'cats'"):
        ll.shipped_ablation(data="cats")
    with pytest.raises(DataError, match=r"nothing.npz is missing; make it with: llava-lab ablate --data photos --pictures"):
        ablation_ship.ship_photos(tmp_path / "nothing.npz", assets)
    with pytest.raises(DataError, match="a comparison on photos ships here, got one on picturebook"):
        ablation_ship.ship_photos(example_ablation(), assets)
    path = on_photos().save(tmp_path / "ablation.npz")
    assert ablation_ship.ship_photos(path, assets) == assets
    assert sorted(file.name for file in assets.iterdir()) == ["README.md", "ablation.npz"]
    assert ll.shipped_ablation(data="photos").rows() == on_photos().rows()
    (assets / "ablation.npz").unlink()
    with pytest.raises(OptionError, match="holds something that is not a shipped comparison"):
        ablation_ship.ship_photos(path, assets)


def test_the_card_on_photographs_has_its_command_and_verdicts_by_type() -> None:
    card = ablation_card.of_photos(on_photos())
    command = "llava-lab ablate --data photos --pictures train --test-pictures everyday --out runs/photos"
    command += " --connector linear --connector mlp2x_gelu --connector bottleneck --rates 0.001,0.003,0.01 --seeds 5"
    command += " --stage1 both --budget samples --validation 32 --test 3 --seed 0 --steps-scale 0.5"
    assert f"    {command} --save runs/photos/ablation.npz\n" in card
    scores, verdicts = card.split("## Verdicts by type of question")
    assert "| +10.00 | +7.00 to +13.00 | +9.00 to +11.00 | 0.004 | **better** | 40 |" in scores
    assert "better" not in verdicts.split("## Limits")[0], "only over all types is a pair told apart"
    assert verdicts.index("### color") < verdicts.index("### count") < verdicts.index("- a note to read")


def test_a_models_card_says_which_run_it_is() -> None:
    result = example_ablation()
    text = ablation_card.of_model(result, first_job(result, "mlp2x_gelu"))
    assert "Seed 0, peak rate 0.003 (chosen on validation), 80 steps of stage 1 and 100 steps of stage 2" in text
    assert "Right on test: 41.7%, compositions: 25.0% as trained" in text  # by hand: 5 and 3 of 12
    assert 'll.load("tiny-mlp")' in text


# -- what ships today


@pytest.mark.parametrize(("name", "connector"), [("tiny-linear", "linear"), ("tiny-mlp", "mlp2x_gelu")])
def test_a_shipped_model_is_the_connector_it_names(name: str, connector: str) -> None:
    lab = ll.load(name)
    assert lab.card.connector == connector
    assert "apache-2.0" in lab.card.licence
    job = first_job(ll.shipped_ablation(), connector)
    assert f"Seed {job.seed}, peak rate {job.rate:g}" in (ABLATION / connector / "README.md").read_text("utf-8")


def test_no_shipped_sentence_contradicts_itself() -> None:
    """Where 2 points take more seeds than there are, these find more than 2 points alone; else they find 2 points too."""
    result = ll.shipped_ablation()
    assert result.stated == 0.02
    rows = [row for split in result.splits for type in result.types for row in result.rows(split=split, type=type)]  # noqa: A001
    undecided = [row for row in rows if row["verdict"] == "not distinguishable"]
    assert len(undecided) > 100
    for row in undecided:
        found = re.search(
            r"these 5 seeds find a true difference of ([\d.]+) points or more, (so 2 points too|for 2 points .*)", row["text"]
        )
        assert found is not None
        least, told = float(found[1]), found[2]
        assert (least <= 2.0) == (told == "so 2 points too")
        if more := re.search(r"it would take about ([\d,]+)", told):
            assert int(more[1].replace(",", "")) > 5
        assert ("its seeds agree" in row["text"]) == (row["p_adjusted"] < 0.05)
        for pictures in re.findall(r"against the noise of (\d+) pictures it would take about ([\d,]+)", row["text"]):
            assert int(pictures[1].replace(",", "")) > int(pictures[0])
    assert "for 2 points it would take about 8" in result.row("mlp2x_gelu", "linear")["text"]


def test_what_ships_stays_small() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 60_000_000
    assert (ABLATION / "ablation.npz").stat().st_size < 2_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
