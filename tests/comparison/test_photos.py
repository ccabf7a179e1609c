"""Connectors compared between pretrained parts: the same start and batches, adapters put back, and one connector that stays."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llava_lab as ll
from llava_lab.comparison import photos
from llava_lab.comparison.photos import CLOSED_FORM, PHOTO_ABLATION, PhotoMaterial
from llava_lab.comparison.run import Job, train_run
from llava_lab.errors import DataError, OptionError
from llava_lab.models import Lab
from llava_lab.models.formats import photo, smol
from llava_lab.training.photo import make
from tests.support.little_language import llama, write_gguf

FEW = replace(
    PHOTO_ABLATION,
    pictures=8,
    rank=2,
    align=replace(PHOTO_ABLATION.align, steps=3, batch=256),
    instruct=replace(PHOTO_ABLATION.instruct, steps=2, batch=1),
)
NAMES = ("cat", "banjo", "pizza", "school_bus", "golden_retriever")


def folder_of_noise(root: Path, number: int) -> Path:
    rng = np.random.default_rng(number)
    for name in NAMES:
        noise = rng.integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC).save(root / f"{name}_{number}.png")
    return root


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(llama(), folder / "little.gguf")
    return {"language": smol.language_folder(folder / "little.gguf", cache=folder / "cache")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "pictures": folder_of_noise(tmp_path_factory.mktemp("train"), 1),
        "test_pictures": folder_of_noise(tmp_path_factory.mktemp("test"), 2),
    }


@pytest.fixture(scope="module")
def material(parts: dict[str, Any], folders: dict[str, Path]) -> PhotoMaterial:
    return photos.prepare(FEW, *folders.values(), validation=4, test=4, bf16=False, parts=parts)


@pytest.fixture
def little(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`photo`'s language model is a little one."""
    monkeypatch.setattr(photo, "assemble", partial(photo.assemble, **parts))


def first_loss(material: PhotoMaterial, connector: str) -> float:
    """Squared error at the start on patches it was not fitted on, 1 for the mean of all."""
    module = material.fresh(connector, 0)
    rows = zip(*(material.batches(FEW.align, 0)[i] for i in range(16)), strict=True)
    features, wanted, likely = (torch.cat(row) for row in rows)
    with torch.no_grad():
        return float(make.words_loss(module, (features, wanted, likely), spread=wanted.var(0).mean())[0])


def test_every_connector_starts_at_its_best_last_layer(material: PhotoMaterial) -> None:
    """The linear one's is the ridge solution, here by least squares with a row for each weight."""
    batches = material.batches(FEW.align, 0)
    read, wanted, _ = (torch.cat(rows).double() for rows in zip(*(batches[photos.FIT + i] for i in range(16)), strict=True))
    centre, mean = read.mean(0), wanted.mean(0)
    small = (1e-2 * ((read - centre) ** 2).sum(0).mean()).sqrt() * torch.eye(read.shape[1], dtype=torch.float64)
    rows, goals = torch.cat([read - centre, small]), torch.cat([wanted - mean, torch.zeros(len(small), wanted.shape[1])])
    best = torch.linalg.lstsq(rows, goals, driver="gelsd").solution
    features, asked, _ = (torch.cat(rows).double() for rows in zip(*(batches[i] for i in range(16)), strict=True))
    floor = float((((features - centre) @ best + mean - asked) ** 2).mean() / asked.var(0).mean())
    assert first_loss(material, "linear") == pytest.approx(floor, abs=1e-3)
    assert first_loss(material, "linear") == first_loss(material, CLOSED_FORM)
    assert first_loss(material, "mlp2x_gelu") < 0.9


@pytest.mark.long
def test_the_closed_form_stays_and_the_adapters_go_back(material: PhotoMaterial) -> None:
    start: Any = material.start
    before = material.fresh(CLOSED_FORM, 0).state_dict()
    seen: dict[str, Any] = {}
    real = material.sit

    def sit(self: PhotoMaterial, module: Any, name: str) -> Any:
        seen["connector"] = {key: value.clone() for key, value in module.state_dict().items()}
        seen["adapters"] = {key: value.clone() for key, value in start.adapters.state_dict().items()}
        return real(module, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhotoMaterial, "sit", sit)
        frozen = train_run(material, Job(CLOSED_FORM, 1e-3, 0, (0, 2), ("validation",)))
        assert all(torch.equal(value, seen["connector"][key]) for key, value in before.items())
        assert any(not torch.equal(value, start.saved[key]) for key, value in seen["adapters"].items())
        trained = train_run(material, Job("linear", 1e-3, 0, (3, 2), ("validation",)))
        assert any(not torch.equal(value, seen["connector"][key]) for key, value in before.items())
    assert all(torch.equal(value, start.adapters.state_dict()[key]) for key, value in start.saved.items())
    assert np.array_equal(frozen.order, trained.order[3:])  # stage 2 reads the same
    assert np.isfinite(frozen.loss).all()
    assert frozen.losses[0] != trained.losses[3]


@pytest.mark.long
def test_a_whole_comparison_on_photographs(little: None, folders: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {**folders, "recipe": FEW, "seeds": 2, "rates": (3e-4, 1e-3, 3e-3), "budgets": ("samples",)}
    options |= {"stage1": (True,), "validation": 4, "test": 4, "bf16": False, "progress": False, "out": tmp_path / "out"}
    result = ll.compare_connectors([CLOSED_FORM, "linear", "mlp2x_gelu"], "photos", **options)
    assert result.data == "photos"
    assert set(result.types) >= {"naming", "presence", "collage: place", "collage: presence"}
    assert result.steps.tolist() == [[0, 2], [3, 2], [3, 2]]
    assert result.sweep_rates.tolist() == [3e-4, 1e-3, 3e-3]
    assert len(set(result.sweep_loss[0])) == 1  # what does not learn has no rate to choose
    assert len(set(result.sweep_loss[1])) == 3
    assert len(list((tmp_path / "out" / "runs").glob("*.npz"))) == 1 + 3 + 3 + 3 * 2
    assert result.row("mlp2x_gelu", "linear", budget="samples", stage1=True)["verdict"]
    again = ll.compare_connectors([CLOSED_FORM, "linear", "mlp2x_gelu"], "photos", **options)  # nothing is trained twice
    assert np.array_equal(again.right, result.right)


def test_a_connector_too_narrow_for_the_classes_is_refused_in_a_line(material: PhotoMaterial) -> None:
    with pytest.raises(OptionError, match="wants 32 hidden units or more, got 3"):
        material.fresh("bottleneck:parameters=5000", 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_pictures": None}, "wants two folders"),
        ({"start": "smol"}, "leave out start and language"),
        ({"fused": True}, "without fused operations; leave fused out"),
        ({"splits": ("compositions",)}, "has one split, 'test'"),
        ({"data": "picturebook"}, "belong to data 'photos'"),
        ({"data": "coco"}, "picturebook or photos, got data 'coco'"),
    ],
)
def test_mistakes_are_refused_in_a_line(folders: dict[str, Path], tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ll.compare_connectors(**{"data": "photos", **folders, "out": tmp_path / "out", **changed})


def test_a_test_photograph_that_was_trained_on_is_refused(little: None, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="photographs that training never sees"):
        ll.compare_connectors(
            data="photos", pictures=folders["pictures"], test_pictures=folders["pictures"], out=tmp_path / "out"
        )


def test_a_connector_that_mixes_patches_is_refused(material: PhotoMaterial) -> None:
    with pytest.raises(OptionError, match="gives each patch a token of its own"):
        material.fresh("c_abstractor", 0)


@pytest.mark.long
def test_the_best_line_is_asked_about_photographs_too(parts: dict[str, Any], folders: dict[str, Path]) -> None:
    lab = Lab(*photo.assemble(**parts), name="photo")
    lab.swap(ll.new_connector(lab, "linear", seed=1))
    fit = ll.linearize(lab, sorted(folders["pictures"].iterdir()), ridge=0)
    asked: dict[str, Any] = {"data": "photos", "pictures": folders["test_pictures"], "n": 4, "progress": False}
    effect = ll.linear_effect(lab, fit, **asked)
    assert effect.types == ("all", "collage: place", "collage: presence", "naming", "presence")
    assert effect.pictures == 5, "four photographs and their collage"
    assert not effect.flipped[0].any(), "the connector is a line"
    kl = dict(zip(effect.variants, effect.kl[:, 0], strict=True))
    assert kl["random"] > kl["linear"]
    with pytest.raises(DataError, match="pictures, a folder of named photographs, goes with data='photos'"):
        ll.linear_effect(lab, fit, data="photos", progress=False)
    with pytest.raises(DataError, match="pictures, a folder of named photographs, goes with data='photos'"):
        ll.linear_effect(lab, fit, pictures=folders["test_pictures"], progress=False)
