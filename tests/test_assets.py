"""The shipped model is what its card says: sizes, format, licence, and the scores written beside it."""

from __future__ import annotations

import json

import pytest

from llava_lab.evaluation import evaluate
from llava_lab.models import Lab, load
from llava_lab.shipped import ASSETS
from llava_lab.worlds.picturebook import TYPES

TINY = ASSETS / "tiny"
SAMPLE = 40  # pictures scored again here


@pytest.fixture(scope="module")
def tiny() -> Lab:
    return load("tiny")


@pytest.fixture(scope="module")
def scores() -> dict:
    return json.loads((TINY / "scores.json").read_text(encoding="utf-8"))


def test_tiny_has_the_promised_shape(tiny: Lab) -> None:
    assert 3_000_000 <= tiny.card.parameters <= 12_000_000
    assert tiny.grid[0] >= 12
    assert tiny.grid[1] >= 12
    assert tiny.card.connector == "mlp2x_gelu"
    assert tiny.model.config.vision_feature_layer == -2
    assert tiny.model.config.vision_feature_select_strategy == "default"
    assert type(tiny.model).__module__.startswith("transformers.")


def test_tiny_is_small_on_disk_and_safe_to_load() -> None:
    names = [path.name for path in TINY.iterdir()]
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 25_000_000
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_card_states_licence_and_how_it_was_made(tiny: Lab) -> None:
    assert "apache-2.0" in tiny.card.licence.lower()
    text = (TINY / "README.md").read_text(encoding="utf-8")
    for word in ("llava-lab train tiny", "seed", "steps", "blind", "shuffled", "majority", "compositions", "cannot"):
        assert word in text, f"the card does not mention {word!r}"


def test_any_text_encodes(tiny: Lab) -> None:
    for text in ("Où est la voiture? 🚗", "日本語", "x" * 50):
        assert tiny.tokenizer.decode(tiny.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_stored_scores_are_of_these_weights_and_complete(tiny: Lab, scores: dict) -> None:
    assert scores["fingerprint"] == tiny.fingerprint
    for split in ("test", "compositions"):
        part = scores[split]
        assert part["split"] == split
        assert set(part["by_type"]) == set(TYPES)
        assert set(part["controls"]) == {"blind", "shuffled", "majority"}


@pytest.mark.long
def test_a_fresh_sample_scores_as_written_and_far_above_every_control(tiny: Lab, scores: dict) -> None:
    fresh = evaluate(tiny, n=SAMPLE, progress=False)
    low, high = fresh["interval"]
    assert low - 0.04 <= scores["test"]["accuracy"] <= high + 0.04
    for name, control in fresh["controls"].items():
        assert fresh["accuracy"] > control["accuracy"] + 0.2, f"{name} scores {control['accuracy']}"
