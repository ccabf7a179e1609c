"""Connectors trained side by side: the same start and batches for all, nothing trained twice, nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.cli import main as cli
from llava_lab.comparison import compare as ablation
from llava_lab.comparison import plan as ablation_plan
from llava_lab.comparison import run as ablation_run
from llava_lab.comparison.plan import Arm, make_arms, make_pairs
from llava_lab.comparison.run import Job, Material, train_run
from llava_lab.comparison.start import load_start
from llava_lab.errors import DataError, LabError
from llava_lab.evaluation import load_items
from llava_lab.results import Ablation
from tests.support.training_rows import QUICK

FEW = replace(QUICK, pictures=24, align=replace(QUICK.align, steps=2, batch=4), instruct=replace(QUICK.instruct, steps=2))
OPTIONS: dict[str, Any] = {
    "recipe": FEW,
    "seeds": 2,
    "stage1": (True,),
    "splits": ("test",),
    "validation": 6,
    "test": 6,
    "progress": False,
    "keep": False,
}
SAME = ["linear", "mlp1x_gelu"]  # one function under two names


@pytest.fixture(scope="module")
def start(quick_run: Path) -> Path:
    """A tower and a language model that has seen no picture."""
    return quick_run


@pytest.fixture(scope="module")
def sat() -> list[str]:
    """The exams that the runs of `made` sat, one after the other."""
    return []


@pytest.fixture(scope="module")
def made(start: Path, tmp_path_factory: pytest.TempPathFactory, sat: list[str]) -> tuple[Path, Ablation]:
    out, real = tmp_path_factory.mktemp("out"), Material.sit

    def noted(self: Material, module: Any, name: str) -> Any:
        sat.append(name)
        return real(self, module, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Material, "sit", noted)
        return out, ll.compare_connectors(SAME, start=start, out=out, **OPTIONS)


def prepared(start: Path, out: Path) -> Material:
    """What the runs of a small comparison share, in float32."""
    counts = {"train": FEW.pictures, "validation": 6, "test": 6}
    return ablation.prepare(load_start(start), out, FEW, counts, bf16=False, fused=False, progress=False)


def test_one_function_under_two_names_is_not_distinguishable(made: tuple[Path, Ablation]) -> None:
    result = made[1]
    row = result.row("mlp1x_gelu", "linear", budget="samples", stage1=True)
    assert (row["effect"], row["gained"], row["lost"], row["verdict"]) == (0, 0, 0, "not distinguishable")
    assert np.array_equal(result.right[0], result.right[1])
    assert np.array_equal(result.losses[0], result.losses[1])
    assert "these 2 seeds find a true difference of 0.00 points or more, so 2 points too" in row["text"]  # they never differ


def test_questions_carry_the_picture_they_are_about_so_that_pictures_are_resampled(made: tuple[Path, Ablation]) -> None:
    pictures = np.array([item.picture for item in load_items("picturebook", split="test", n=6, seed=0)])
    labels = made[1].question_picture
    assert len(set(labels)) == 6 < len(labels)
    assert np.array_equal(labels[:, None] == labels, pictures[:, None] == pictures)


def test_equal_operations_reuse_the_runs_of_equal_samples_where_they_cost_the_same(made: tuple[Path, Ablation]) -> None:
    out, result = made
    assert result.budgets == ("samples", "samples", "flops", "flops")
    assert np.array_equal(result.right[0], result.right[2])
    assert len(list((out / "runs").glob("test-*.npz"))) == 4  # two connectors, two seeds, and no more


def test_the_sweep_reads_validation_and_the_seeds_it_never_uses(made: tuple[Path, Ablation]) -> None:
    jobs = [ablation_run.Finished.load(path).job for path in (made[0] / "runs").glob("*.npz")]
    swept = [job for job in jobs if job["exams"] == ["validation"]]
    assert len(swept) == 2 * 3
    assert {job["seed"] for job in swept}.isdisjoint({job["seed"] for job in jobs if job not in swept})
    assert {tuple(job["exams"]) for job in jobs} == {("validation",), ("test",)}


def test_the_same_call_again_trains_nothing(made: tuple[Path, Ablation], start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ablation, "train_run", never)
    again = ll.compare_connectors(SAME, start=start, out=made[0], **OPTIONS)
    assert np.array_equal(again.right, made[1].right)
    assert again.rows() == made[1].rows()


@pytest.mark.long
def test_interrupted_and_called_again_it_is_as_if_nothing_had_been(
    made: tuple[Path, Ablation], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Job] = []

    def few(material: Any, job: Job, **options: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(job)
        return train_run(material, job, **options)

    monkeypatch.setattr(ablation, "train_run", few)
    with pytest.raises(KeyboardInterrupt):
        ll.compare_connectors(SAME, start=start, out=tmp_path, **OPTIONS)
    monkeypatch.undo()
    assert len(list((tmp_path / "runs").glob("*.npz"))) == 3
    again = ll.compare_connectors(SAME, start=start, out=tmp_path, **OPTIONS)
    assert np.array_equal(again.right, made[1].right)
    assert np.array_equal(again.losses, made[1].losses)


def test_another_comparison_s_folder_is_refused(made: tuple[Path, Ablation], start: Path) -> None:
    other = OPTIONS | {"recipe": replace(FEW, instruct=replace(FEW.instruct, rate=9.0))}
    before = {path: path.stat().st_mtime_ns for folder in ("runs", "flops") for path in (made[0] / folder).iterdir()}
    with pytest.raises(DataError, match="belongs to another comparison: stages was .* choose another folder"):
        ll.compare_connectors(SAME, start=start, out=made[0], **other)
    assert {path: path.stat().st_mtime_ns for folder in ("runs", "flops") for path in (made[0] / folder).iterdir()} == before


def test_a_run_under_another_s_name_is_refused(made: tuple[Path, Ablation], tmp_path: Path) -> None:
    one, other = sorted((made[0] / "runs").glob("test-*.npz"))[:2]
    (tmp_path / one.name).write_bytes(other.read_bytes())
    found = ablation_run.Finished.load(one)
    job = Job(**{**found.job, "steps": tuple(found.job["steps"]), "exams": tuple(found.job["exams"])})
    assert ablation_run.read(one.parent, job, found.setup) is not None
    with pytest.raises(DataError, match="holds another run than its name says"):
        ablation_run.read(tmp_path, job, found.setup)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_start_comes_back_bit_for_bit(start: Path, tmp_path: Path, error: type[BaseException]) -> None:
    material = prepared(start, tmp_path)
    begun = material.start
    before = {name: value.clone() for name, value in begun.lab.model.state_dict().items()}
    job = Job("mlp2x_gelu", 1e-3, 0, (2, 2), ("test",))

    def stop(_: int) -> None:
        done.append(1)
        if len(done) == 3:  # inside stage 2, when the language model has moved
            raise error

    done: list[int] = []

    train_run(material, job)
    with pytest.raises(error):
        train_run(material, job, advance=stop)
    after = begun.lab.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in begun.lab.model.parameters())


def test_operations_are_counted_over_a_whole_cycle_of_batches(start: Path, tmp_path: Path) -> None:
    """The linear's own products, by hand, are what the MLP's first count lacks: everything else is the same."""
    material = prepared(start, tmp_path)
    begun = material.start
    linear, mlp = (ablation_plan.count_flops(material, name) for name in ("linear", "mlp2x_gelu"))
    config: Any = begun.lab.model.config
    patches = begun.lab.grid[0] * begun.lab.grid[1]
    hidden = config.text_config.hidden_size
    second = 2 * FEW.align.batch * patches * hidden * hidden  # the MLP's second layer, one product
    assert mlp[0] - linear[0] == pytest.approx(3 * second)  # forward, and backward to weights and to inputs


def test_budgets_follow_the_dearest_and_share_what_hardly_differs() -> None:
    flops = {"cheap": (1.0, 1.0), "near": (1.95, 1.95), "same": (1.98, 1.98), "dear": (2.0, 2.0)}
    recipe = replace(FEW, align=replace(FEW.align, steps=100), instruct=replace(FEW.instruct, steps=100))
    arms = make_arms(list(flops), flops, (recipe.align, recipe.instruct), budgets=("samples", "flops"), stage1=(True,))
    steps = {(arm.connector, arm.budget): arm.steps for arm in arms}
    swept = {(arm.connector, arm.budget): arm.sweep_steps for arm in arms}
    assert {steps[name, "samples"] for name in flops} == {(100, 100)}
    assert steps["cheap", "flops"] == swept["cheap", "flops"] == (200, 200)
    assert steps["near", "flops"] == (103, 103)
    assert swept["near", "flops"] == (100, 100)  # the rate is kept
    assert steps["same", "flops"] == (100, 100)  # 1% more would be 101: one run serves both budgets
    assert steps["dear", "flops"] == (100, 100)
    alone = make_arms(list(flops), flops, (recipe.align, recipe.instruct), budgets=("flops",), stage1=(True,))
    assert {arm.connector: arm.steps for arm in alone}["same"] == (101, 101)  # with nothing to share with, it is its own


def test_two_connectors_read_the_same_batches_and_a_run_that_did_not_is_found(start: Path, tmp_path: Path) -> None:
    material = prepared(start, tmp_path)
    jobs = [Job(name, 1e-3, 0, (2, 2), ("test",)) for name in ("linear", "mlp2x_gelu")]
    done = {job: train_run(material, job) for job in jobs}
    assert np.array_equal(done[jobs[0]].order, done[jobs[1]].order)
    assert not np.array_equal(done[jobs[0]].losses, done[jobs[1]].losses)
    ablation.check_same_batches(done)
    other = train_run(material, replace(jobs[1], seed=1))
    with pytest.raises(DataError, match="did not read the same batches"):
        ablation.check_same_batches({jobs[0]: done[jobs[0]], jobs[1]: other})


def test_the_sweep_never_sits_the_test_exam(made: tuple[Path, Ablation], sat: list[str]) -> None:
    assert sat == ["validation"] * 6 + ["test"] * 4


def test_pairs_are_judged_within_one_budget_and_stage() -> None:
    arms = [Arm(name, "samples", stage1, (1, 1), (1, 1), 1.0) for name in ("a", "b") for stage1 in (True, False)]
    pairs, families = make_pairs(arms)
    labels = {
        tuple(sorted((arms[i].connector, arms[j].connector))): family for (i, j), family in zip(pairs, families, strict=True)
    }
    assert len(pairs) == 4  # a and b with stage 1, a and b without, each with itself without
    assert labels["a", "a"] == labels["b", "b"]
    assert labels["a", "a"] not in {
        family for (i, j), family in zip(pairs, families, strict=True) if arms[i].connector != arms[j].connector
    }


def test_a_result_is_one_file_and_reads_from_both_sides(made: tuple[Path, Ablation], tmp_path: Path) -> None:
    result = made[1]
    result.save(tmp_path / "one.npz")
    again = Ablation.load(tmp_path / "one.npz")
    assert np.array_equal(again.right, result.right)
    there, back = result.row("mlp1x_gelu", "linear"), result.row("linear", "mlp1x_gelu")
    assert there["effect"] == -back["effect"]
    assert there["gained"] == back["lost"]
    for ask in (result.rows, result.scores):
        with pytest.raises(LabError, match="expected one of test and one of all"):
            ask(split="elsewhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"connectors": ["linear"]}, "a list of two connectors or more"),
        ({"connectors": ["linear", "linear"]}, "a connector is named twice"),
        ({"connectors": ["linear", "magic"]}, "a connector is one of"),
        ({"rates": (1e-3, 3e-3)}, "3 different rates or more"),
        ({"rates": (0, 1e-3, 3e-3)}, "rates must be above 0"),
        ({"seeds": 1}, "seeds must be 2 or more"),
        ({"budgets": ("hours",)}, "budgets are samples, flops"),
        ({"budgets": ("samples", "samples")}, "each once"),
        ({"splits": "test"}, "splits must be a list, each text"),
        ({"splits": ("test", "test")}, "each once"),
        ({"splits": ("train",)}, "splits must be held out from training"),
        ({"data": "coco"}, "compared on picturebook or photos"),
        ({"steps_scale": 0}, "must be above 0"),
    ],
)
def test_a_comparison_that_would_say_nothing_is_refused_in_one_line(
    start: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {"connectors": SAME, "start": start, "out": tmp_path} | OPTIONS | change
    with pytest.raises(LabError, match=said) as caught:
        ll.compare_connectors(**options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("runs/*"))


def test_the_command_prints_one_object_and_keeps_the_result(
    made: tuple[Path, Ablation], start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def given(**options: Any) -> Ablation:
        asked.update(options)
        return made[1]

    monkeypatch.setattr(ll, "compare_connectors", given)
    line = (
        f"ablate --start {start} --out {tmp_path} --seeds 2 --stage1 with --rates 1e-3,2e-3,5e-3 --save {tmp_path}/a.npz --json"
    )
    assert cli.main(line.split()) == 0
    printed = json.loads(capsys.readouterr().out)
    assert asked["rates"] == (1e-3, 2e-3, 5e-3)
    assert asked["stage1"] == (True,)
    assert len(printed["splits"]["test"]["arms"]) == 4
    assert np.array_equal(Ablation.load(tmp_path / "a.npz").right, made[1].right)
    assert cli.main(f"ablate --start {start} --out {tmp_path} --rates a,b".split()) == 2
    assert "--rates wants numbers" in capsys.readouterr().err
