"""What is sent to the page: small, exact where it says so, and refused where it would mislead."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llava_lab.errors import OptionError
from llava_lab.plots.palette import diverging, light, sequential
from llava_lab.results import Relevance, Target
from tests.support.widget_examples import example, make_relevance, make_run, many, spots
from widgets.pack import LEVELS, Packed, encode_picture, is_control, pack, probability, quantize


def decoded(packed: Packed, method: int) -> np.ndarray:
    """What the page reads: float (layers, targets, rows, cols)."""
    said = packed.spec["methods"][method]
    m = packed.spec["map"]
    count = len(said["layers"]) * said["targets"]
    cells = m["rows"] * m["cols"]
    first = said["first"]
    levels = np.frombuffer(packed.maps, np.uint8)[first * cells : (first + count) * cells].reshape(count, cells)
    scales = np.frombuffer(packed.scales, "<f4").reshape(-1, 2)[first : first + count]
    values = scales[:, :1] + scales[:, 1:] * levels
    return values.reshape(len(said["layers"]), said["targets"], m["rows"], m["cols"])


def test_every_map_comes_back_within_half_a_step() -> None:
    run, maps = example()
    packed = pack(run, maps)
    layers = np.stack([rel.values for _, rel in maps["rollout"]])
    for method, values in enumerate((layers, maps["occlusion"].values[None], maps["random"].values[None])):
        got = decoded(packed, method)
        reach = np.abs(values).max(axis=(-1, -2), keepdims=True)
        steps = LEVELS if values.min() >= 0 else 127
        assert got.shape == values.shape
        assert (np.abs(got - values) <= 0.51 * reach / steps + 1e-7).all()
        assert packed.spec["methods"][method]["hi"] == pytest.approx(np.abs(values).max())


def test_zero_stays_exactly_zero_in_signed_maps() -> None:
    values = np.array([[[0.0, 1.0], [-3.0, 0.0]]])
    levels, scale, lo, hi = quantize(values)
    back = scale[:, :1] + scale[:, 1:] * levels.reshape(1, -1)
    assert back[0, 0] == back[0, 3] == 0.0
    assert (lo, hi) == (-3.0, 3.0)


def test_flat_maps_do_not_divide_by_zero() -> None:
    levels, scale, lo, hi = quantize(np.full((2, 3, 3), 0.25))
    assert not levels.any()
    np.testing.assert_array_equal(scale, [[0.25, 0.0]] * 2)
    assert (lo, hi) == (0.25, 0.25)


def test_the_measuring_load_is_one_byte_per_value() -> None:
    packed = pack(*many())
    assert len(packed.maps) == 64 * 32 * 24 * 24
    assert len(packed.scales) == 64 * 32 * 8


def test_chips_are_the_words_then_what_else_is_explained() -> None:
    run, maps = example()
    contrast = Target("contrast", "red − blue", (160,), (1,), (2,))
    maps["difference"] = make_relevance(run, spots(run)[:1], [contrast])
    chips = pack(run, maps).spec["chips"]
    assert [(chip["text"], chip["kind"]) for chip in chips] == [
        ("The", "word"),
        ("car", "word"),
        ("is", "word"),
        ("red.", "word"),
        ("The car is red.", "answer"),
        ("red − blue", "contrast"),
    ]
    assert chips[3]["p"] == pytest.approx(0.81)
    assert chips[4]["p"] == pytest.approx(float(np.exp(run.logprobs.sum())))
    assert chips[5]["p"] is None


def test_methods_point_to_their_own_maps_or_say_they_have_none() -> None:
    run, maps = example()
    rollout, occlusion, control = pack(run, maps).spec["methods"]
    assert rollout["chips"] == [0, 1, 2, 3, -1]
    assert rollout["whole"] == -1
    assert occlusion["chips"] == [-1, 0, -1, 1, 2]
    assert occlusion["whole"] == 2
    assert [method["control"] for method in (rollout, occlusion, control)] == [False, False, True]
    assert occlusion["first"] == 6 * 4
    assert occlusion["caption"] == "occlusion · fill mean · block 1 · 145 forward passes · 3.4 s"


def test_a_word_said_twice_keeps_its_two_maps() -> None:
    run = make_run("red car red car")
    method = pack(run, {"rollout": make_relevance(run, spots(run))}).spec["methods"][0]
    assert method["chips"] == [0, 1, 2, 3]


def test_a_word_of_several_tokens_has_the_product_of_their_probabilities() -> None:
    run = make_run(probabilities=[0.5, 0.5, 0.8, 0.9])
    first = run.segments["answer"][0]
    assert probability(run, first, first + 2) == pytest.approx(0.25)
    assert probability(run, first + 9, first + 10) is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda rel: replace(rel, fingerprint="other"), "explains another checkpoint"),
        (lambda rel: replace(rel, map=replace(rel.map, offset_x=3.0)), "another picture geometry"),
        (lambda rel: replace(rel, values=np.full_like(rel.values, np.nan)), "not finite"),
        (lambda rel: [], "has no layers"),
        (lambda rel: [("0", rel), ("1", make_relevance(make_run(), rel.values[:1], rel.targets[:1]))], "different targets"),
    ],
)
def test_maps_that_would_mislead_are_refused(broken, message: str) -> None:  # type: ignore[no-untyped-def]
    run = make_run()
    rel: Relevance = make_relevance(run, spots(run))
    with pytest.raises(ValueError, match=message):
        pack(run, {"rollout": broken(rel)})


@pytest.mark.parametrize("given", [{}, None, 3])
def test_maps_come_by_name(given: object) -> None:
    with pytest.raises(OptionError, match="expected the maps by name"):
        pack(make_run(), given)  # type: ignore[arg-type]


def test_controls_of_old_files_are_known_by_their_method() -> None:
    run = make_run()
    made = {name: make_relevance(run, spots(run), method=name) for name in ("random", "center", "inverse", "vision", "rollout")}
    assert [name for name, rel in made.items() if is_control(rel)] == ["random", "center", "inverse", "vision"]


def test_a_drawing_travels_exactly_and_a_photograph_small() -> None:
    drawing = make_run().picture
    raw, kind = encode_picture(drawing)
    assert kind == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(raw))), drawing)
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1800, 3), dtype=np.uint8)
    raw, kind = encode_picture(noise)
    assert kind == "image/jpeg"
    assert Image.open(io.BytesIO(raw)).size == (1000, 667)


def test_sequential_scale_is_viridis() -> None:
    import matplotlib

    want = matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255
    assert np.abs(sequential()[:, :3] - want).max() < 4
    assert (np.diff(sequential()[:, 3].astype(int)) >= 0).all()


def test_diverging_scale_is_clear_at_zero_and_symmetric() -> None:
    alpha = diverging()[:, 3].astype(int)
    np.testing.assert_array_equal(alpha, alpha[::-1])
    assert alpha[127] < 12
    assert alpha[0] == 255


def test_spotlight_lifts_the_dark_as_values_rise() -> None:
    assert light(False)[-1, 3] == light(True)[-1, 3] == 0
    assert (light(True)[:128, 3] == light(True)[0, 3]).all()  # what speaks against stays dark
