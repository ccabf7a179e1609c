"""The shipped comparison of connectors is whole: its numbers open, both models load strictly, all of it is small."""

from __future__ import annotations

import pytest

import llava_lab as ll
from llava_lab.comparison.ship import first_job
from llava_lab.models.folders import ABLATION, ASSETS


@pytest.mark.parametrize(("name", "connector"), [("tiny-linear", "linear"), ("tiny-mlp", "mlp2x_gelu")])
def test_a_shipped_model_is_the_connector_it_names(name: str, connector: str) -> None:
    lab = ll.load(name)
    assert lab.card.connector == connector
    assert "apache-2.0" in lab.card.licence
    job = first_job(ll.shipped_ablation(), connector)
    assert f"Seed {job.seed}, peak rate {job.rate:g}" in (ABLATION / connector / "README.md").read_text("utf-8")


def test_what_ships_stays_small() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 40_000_000
    assert (ABLATION / "ablation.npz").stat().st_size < 2_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
