"""The registry: names and defaults as they were promised, options read from a function's signature, clear refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from llava_lab.attribution import METHODS, Maps, attribute
from llava_lab.attribution.method import REGISTERED, AtLeast, Count, Fill, Fusion, Heads, Window, method
from llava_lab.attribution.registry import works_at
from llava_lab.errors import OptionError
from llava_lab.interventions.ablate import ask_without
from llava_lab.judging import compare, faithfulness
from llava_lab.models import Lab, load
from llava_lab.replay import fill_pixels
from llava_lab.results import Relevance, Run
from tests.support.closeness import close
from tests.support.families import family
from tests.support.planted import scripted_run

WINDOW: dict[str, Any] = {"layers": None}
HEADS: dict[str, Any] = {"layers": None, "heads": None}
GAME: dict[str, Any] = {"regions": 16, "shape": "color", "fill": "grey", "at": "pixels", "batch": 8, "seed": 0}

# Written out once, so that a default is not changed by accident.
DEFAULTS: dict[str, dict[str, Any]] = {
    "rollout": {
        "residual": "measured",
        **WINDOW,
        "fusion": "mean",
        "sinks": "keep",
        "null": "causal",
        "through_vision": False,
    },
    "attention": {**HEADS, "fusion": "mean"},
    "value_attention": {**HEADS, "join": "norms", "scale": "share"},
    "relative_attention": {
        "neutral": "Describe the picture.",
        **HEADS,
        "fusion": "mean",
        "beside": "cue",
        "floor": None,
        "scale": "ratio",
    },
    "localization_heads": {"top": 3, **HEADS, "threshold": None, "sigma": 1.0},
    "attention_flow": {**WINDOW, "fusion": "mean"},
    "occlusion": {"block": 1, "stride": None, "fill": "grey", "batch": 8, "at": "pixels", "score": "logodds", "seed": 0},
    "occlusion_coarse": {"first": None, "keep": 4, "fill": "grey", "batch": 8, "at": "pixels", "score": "logodds", "seed": 0},
    "rise": {"masks": 128, "cells": None, "shown": 0.5, "fill": "grey", "at": "pixels", "batch": 8, "seed": 0},
    "token_knockout": {"rows": "answer", "block": 1, "score": "logodds"},
    "shapley": {"orders": 8, **GAME},
    "kernel_shap": {"samples": 96, **GAME},
    "greedy": {"steps": None, **GAME},
    "gradient_input": {"at": "projector", "fill": None},
    "integrated_gradients": {"at": "projector", "fill": "grey", "steps": 16, "batch": 1, "rule": "gausslegendre"},
    "smoothgrad": {"at": "projector", "samples": 8, "noise": 0.15, "times_input": True, "batch": 1, "seed": 0},
    "gradcam": {"positive": True},
    "relevancy": {"vision": False, "variant": "chefer"},
    "direct_logit": {**HEADS, "centre": False},
    "logit_lens_map": {**WINDOW, "value": "probability", "reduce": "max"},
    "tam": {"correction": "context", "clip": True, "filter": 3},
    "vision": {"fusion": "mean"},
    "random": {"seed": 0},
    "center": {},
    "edges": {},
    "inverse": {"of": "rollout", "options": None},
}
CLOSED = ("occlusion", "rise", "shapley", "kernel_shap", "random", "center", "edges")
TILED = (*CLOSED, "rollout", "attention", "value_attention", "occlusion_coarse", "greedy", "inverse")


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


# -- the table ------------------------------------------------------------------------------


def test_names_defaults_and_their_order_are_the_promised_ones() -> None:
    assert next(iter(METHODS)) == "rollout"
    assert {name: list(entry.options.items()) for name, entry in METHODS.items()} == {
        name: list(options.items()) for name, options in DEFAULTS.items()
    }
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["rollout"]  # type: ignore[index]
    with pytest.raises(TypeError):
        METHODS["rollout"].options["fusion"] = "max"  # type: ignore[index]


def test_cards_say_what_other_rooms_ask() -> None:
    assert {name for name, entry in METHODS.items() if entry.control} == {"random", "center", "edges", "inverse", "vision"}
    assert set(works_at("pixels")) == set(CLOSED)
    assert set(works_at("tokens")) == set(TILED)
    assert {name: dict(entry.mass) for name, entry in METHODS.items() if entry.mass is not None} == {
        "attention": {},
        "rollout": {"null": "none"},
        "relevancy": {},
    }
    assert {name for name, entry in METHODS.items() if entry.streams is not None} == {"attention", "rollout"}
    assert {name: dict(entry.economy) for name, entry in METHODS.items() if entry.economy} == {
        "occlusion": {"block": 3, "stride": 2},
        "rise": {"masks": 64},
        "shapley": {"orders": 3},
        "kernel_shap": {"samples": 48},
        "greedy": {"steps": 3},
        "integrated_gradients": {"steps": 12},
        "smoothgrad": {"samples": 6},
    }
    assert METHODS["occlusion"].fill_options == METHODS["gradient_input"].fill_options == ("fill",)
    assert METHODS["smoothgrad"].fill_options == ()


def test_unknown_names_list_the_choices(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(OptionError, match="no method 'rollot'; the methods are rollout, attention, value_attention, .*, inverse"):
        attribute(tiny_random, run, method="rollot")
    with pytest.raises(OptionError, match="'center' has no option 'seed'; its options are none"):
        attribute(tiny_random, run, method="center", seed=1)


# -- a signature read -----------------------------------------------------------------------


@pytest.fixture
def mine() -> Iterator[str]:
    @method(truth="A number.", source="here", cost="none", blind_to="everything")
    def mine(
        lab: Any,
        run: Any,
        targets: Any,
        *,
        fusion: Fusion = "max",
        count: Count = 3,
        some: Count | None = None,
        share: Annotated[float, AtLeast(0.5)] = 1.0,
        odd: Annotated[int, lambda name, value: value] = 1,
        flag: bool = True,
        mode: Literal["a", 2] = "a",
        fill: Fill = "grey",
        layers: Window = None,
        heads: Heads = None,
        free=None,
    ) -> Maps:
        return Maps(np.full((1, 4, 4), count + share), {})

    yield "mine"
    del REGISTERED["mine"]


def test_options_and_their_checks_are_those_of_the_signature(mine: str) -> None:
    entry = METHODS[mine]
    assert list(entry.options) == ["fusion", "count", "some", "share", "odd", "flag", "mode", "fill", "layers", "heads", "free"]
    assert entry.with_defaults({"some": np.int64(4), "share": 1, "layers": (0, 1), "free": "anything"}) == {
        **entry.options,
        "some": 4,
        "share": 1.0,
        "layers": (0, 1),
        "free": "anything",
    }
    assert entry.fill_options == ("fill",)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("fusion", "sum", "fusion must be one of 'mean', 'max', 'min', got 'sum'"),
        ("count", 0, "count must be a whole number of at least 1, got 0"),
        ("count", True, "count must be a whole number of at least 1, got True"),
        ("some", 1.5, "some must be a whole number of at least 1, got 1.5"),
        ("share", 0.2, "share must be a number of at least 0.5, got 0.2"),
        ("share", float("nan"), "share must be a number of at least 0.5, got nan"),
        ("flag", "yes", "flag must be one of True, False, got 'yes'"),
        ("mode", "b", "mode must be one of 'a', 2, got 'b'"),
        ("fill", "red", "fill must be one of 'grey', 'mean', 'blur', 'noise', 'neighbours', got 'red'"),
    ],
)
def test_a_value_the_annotation_excludes_is_refused(mine: str, option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError) as error:
        METHODS[mine].with_defaults({option: value})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("method", "options", "kept"),
    [
        ("attention", {"layers": (np.int64(0), np.int8(2))}, [0, 2]),
        ("attention", {"layers": np.array([0, 2])}, [0, 2]),
        ("attention", {"heads": np.int64(1)}, 1),
        ("attention", {"heads": torch.tensor(1)}, 1),
        ("attention", {"heads": range(2)}, [0, 1]),
        ("attention", {"heads": [np.int64(1)]}, [1]),
        ("attention", {"heads": np.array([[0, 1]])}, [[0, 1]]),
        ("attention", {"fusion": np.str_("max")}, "max"),
        ("rollout", {"residual": Fraction(1, 2)}, 0.5),
        ("rollout", {"residual": np.float32(0.5)}, 0.5),
        ("rollout", {"residual": torch.tensor(0.5)}, 0.5),
        ("rollout", {"through_vision": np.False_}, False),
        ("rollout", {"through_vision": 0}, False),
        ("inverse", {"options": {"layers": (np.int64(0), 2)}}, {"layers": [0, 2]}),
    ],
)
def test_options_of_other_libraries_kinds_are_kept_as_python_s_and_saved(
    tiny_random: Lab, run: Run, tmp_path: Path, method: str, options: dict[str, Any], kept: Any
) -> None:
    relevance = attribute(tiny_random, run, method=method, **options)
    (name,) = options
    assert (relevance.options[name], type(relevance.options[name])) == (kept, type(kept))
    assert Relevance.load(relevance.save(tmp_path / "map.npz")).options == relevance.options


@pytest.mark.parametrize("value", [np.array([1, 2]), torch.ones(2), np.array(["grey"]), [1, 2], {}, object(), b"x", 3j])
def test_no_option_of_any_method_fails_on_an_array_or_an_object(value: Any) -> None:
    for card in METHODS.values():
        for name in card.options:
            with suppress(OptionError):
                card.with_defaults({name: value})


def test_an_option_without_a_default_is_a_mistake_of_who_wrote_it() -> None:
    def needy(lab: Any, run: Any, targets: Any, *, count: int) -> Maps:
        raise AssertionError

    with pytest.raises(TypeError, match="option 'count' of method 'needy' needs a default"):
        method(truth="A.", source="b", cost="c", blind_to="d")(needy)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rollout", {"residual": 1.5}, "residual is the weight of the identity, 0 to 1, or 'measured'; got 1.5"),
        ("rollout", {"residual": "half"}, "got 'half'"),
        ("rollout", {"layers": (2, 2)}, r"0 <= start < stop <= 3.*got \(2, 2\)"),
        ("rollout", {"layers": 4}, "or None for all; got 4"),
        ("smoothgrad", {"noise": -0.1}, "noise is a share of the values' range, 0 to 1, got -0.1"),
        ("gradient_input", {"fill": "black"}, "fill must be one of None, 'grey', 'mean', 'blur', got 'black'"),
        ("integrated_gradients", {"fill": None}, "fill must be one of 'grey', 'mean', 'blur', got None"),
        ("occlusion", {"block": 5}, "stride <= block <= 4, got block 5"),
        ("occlusion", {"block": 2, "stride": 3}, "got block 2 and stride 3"),
        ("occlusion_coarse", {"first": 5}, "first must be at most 4 for a grid of 4x4, got 5"),
        ("token_knockout", {"block": 5}, "block must be at most 4 .* got 5"),
        ("rise", {"cells": 5}, "cells must be at most 4 for a grid of 4x4, got 5"),
        ("rise", {"fill": "neighbours"}, "fill must be one of 'grey', 'mean', 'blur', 'noise', got 'neighbours'"),
        ("rise", {"shown": 1}, "shown is the share of the picture a mask shows, between 0 and 1; got 1"),
        ("rise", {"masks": 1}, "masks must be a whole number of at least 2, got 1"),
        ("kernel_shap", {"samples": 2}, "samples must be a whole number of at least 3, got 2"),
        ("greedy", {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ("relative_attention", {"floor": -0.1}, "floor must be a number of at least 0, got -0.1"),
        ("relevancy", {"variant": "chfer"}, "variant must be one of 'chefer', 'lvlm-interpret', got 'chfer'"),
        ("direct_logit", {"layers": (2, 9)}, "layers must be .start, stop. with 0 <= start < stop <= 3"),
        ("direct_logit", {"heads": 4}, "heads must be numbers from 0 to 3"),
        ("logit_lens_map", {"layers": 4}, "layers must be a state from 0 .connector output. to 3 .last layer., got 4"),
        ("logit_lens_map", {"layers": (0, 5)}, "layers must be .start, stop. with 0 <= start < stop <= 4"),
        ("tam", {"filter": 2}, "filter must be None or an odd window from 1 to 4 patches, got 2"),
        ("tam", {"filter": 7}, "filter must be None or an odd window from 1 to 4"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(
    tiny_random: Lab, run: Run, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as error:
        attribute(tiny_random, run, method=name, **options)
    assert "\n" not in str(error.value)


# -- weights that are packed, or elsewhere --------------------------------------------------


@pytest.mark.parametrize("sign", ["settings", "weights", "modules"])
def test_packed_weights_are_known_by_any_sign(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, sign: str) -> None:
    model = tiny_random.model
    if sign == "settings":
        settings = SimpleNamespace(quant_method="bitsandbytes")
        monkeypatch.setattr(model.config, "quantization_config", settings, raising=False)
    elif sign == "weights":
        packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
        monkeypatch.setitem(model.lm_head._parameters, "packed", packed)
    else:
        kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
        monkeypatch.setitem(model.lm_head._modules, "packed", kind(1, 1))
    with pytest.raises(OptionError, match="^method 'relevancy' needs gradients, and .* packed into 8 or 4 bits; load it without"):
        METHODS["relevancy"].refuse(tiny_random, ())
    METHODS["rollout"].refuse(tiny_random, ())


def test_weights_that_wait_elsewhere_are_said(tiny_folder: Path, picture: np.ndarray) -> None:
    lab = load(tiny_folder)
    run = lab.ask(picture, "What?", max_new_tokens=2)
    lab.model.lm_head.to("meta")
    with pytest.raises(OptionError, match="wait off the device"):
        attribute(lab, run, method="relevancy")


@pytest.fixture(scope="module")
def two(tiny_random: Lab) -> Run:
    """A question about two pictures of different shapes."""
    draw = np.random.default_rng(5)
    pictures = [draw.integers(0, 256, (*shape, 3), np.uint8) for shape in ((40, 60), (50, 30))]
    return tiny_random.ask(pictures, "What differs?", max_new_tokens=4)


@family("name", works_at("tokens"), quick=4)
def test_several_pictures_have_a_map_each_whichever_comes_first(tiny_random: Lab, two: Run, name: str) -> None:
    options = dict(METHODS[name].economy)
    rel = attribute(tiny_random, two, method=name, **options)
    assert rel.views == two.views
    assert [values.shape for values in rel.view_values] == [(1, 4, 4)] * 2
    assert np.array_equal(rel.values, rel.view_values[0])
    assert rel.on_picture(view="picture 2").shape == (50, 30)
    second = attribute(tiny_random, two.about(1), method=name, **options)
    assert second.map == two.views[1].map
    for one, other in zip(second.view_values, reversed(rel.view_values), strict=True):
        close(one, other, terms=64 * 3)


def test_a_map_of_several_pictures_says_what_the_model_does(tiny_random: Lab, two: Run) -> None:
    """Attention is the model's own at each picture's tokens; covering a patch of the second changes the score by its value."""
    attended = attribute(tiny_random, two, method="attention")
    covered = attribute(tiny_random, two, method="occlusion", fill="grey", score="logprob")
    target, inputs = two.target(), tiny_random.inputs(two, tiles=True)
    tiny_random.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = tiny_random.model(**inputs, output_attentions=True).attentions
    finally:
        tiny_random.model.set_attn_implementation("sdpa")
    rows = torch.stack(seen)[:, 0, :, list(target.positions)].mean((0, 1, 2)).numpy()
    for view, values in zip(two.views, attended.view_values, strict=True):
        close(values[0], rows[view.positions], terms=64 * 3)
    values, where = covered.view_values[1][0], two.views[1].map
    row, col = np.unravel_index(np.abs(values).argmax(), values.shape)
    patch = np.s_[:, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8]
    pixels = inputs["pixel_values"].clone()
    pixels[1][patch] = fill_pixels(tiny_random, pixels[1:], "grey", where)[0][patch]
    at = two.answer_positions
    with torch.no_grad():
        logits = tiny_random.model(**{**inputs, "pixel_values": pixels}).logits[0].log_softmax(-1)
    dropped = float(two.logprobs.sum()) - float(logits[at - 1, two.token_ids[at]].sum())
    assert values[row, col] == pytest.approx(dropped, abs=1e-4)
    assert abs(dropped) > 1e-3


def test_faithfulness_of_several_pictures_is_of_the_first(tiny_random: Lab, two: Run) -> None:
    second = two.about(1)
    score = faithfulness(tiny_random, second, attribute(tiny_random, second, method="occlusion"), steps=4, seeds=2)
    assert np.isfinite(score.deletion).all()
    found = compare(tiny_random, two, ["rollout", "random", "tam"], steps=4, seeds=2)
    assert set(found.maps) == {"rollout", "random"}
    assert "one picture" in found.refused["tam"]
    hidden = ask_without(tiny_random, second, [(0, 0), (1, 1)])
    assert hidden.number == 1
    assert np.array_equal(hidden.others[0], two.picture)
    assert not np.array_equal(hidden.picture, second.picture)
