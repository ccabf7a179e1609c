"""Another connector in a loaded model: everything follows it, everything comes back, and what does not fit is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, monkey_patching
from transformers.models.llava import modeling_llava

import llava_lab as ll
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, connectors, layout
from llava_lab.models.swap import trained_beside
from tests.support.closeness import close

WIDTH = 64 * 9  # the longest sum in a connector here, a 3x3 convolution's among them
QUESTION = "What color is the car?"
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("mlp1x_gelu", {}),
    ("mlp2x_gelu", {}),
    ("mlp3x_gelu", {}),
    ("linear2x", {}),
    ("bottleneck", {}),
    ("mlp2x_gelu", {"width": 24}),
    ("linear2x", {"width": 24}),
    ("gated", {"width": 24}),
    ("fused", {}),
    ("avgpool", {"side": 2}),
    ("c_abstractor", {"side": 2, "depth": 1}),
    ("resampler", {"queries": 4, "layers": 1, "heads": 4}),
    ("pixel_shuffle", {"factor": 2}),
]


@pytest.fixture
def pixels(tiny_random: Lab, picture: np.ndarray) -> torch.Tensor:
    return tiny_random.pixels(picture)


def tokens(lab: Lab, pixels: torch.Tensor) -> torch.Tensor:
    config = lab.model.config
    with torch.no_grad():
        out = lab.model.get_image_features(
            pixel_values=pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
    return torch.stack(list(out.pooler_output))


def snapshot(lab: Lab) -> tuple[Any, ...]:
    config = lab.model.config
    return (layout.connector_of(lab.model), config.to_dict(), lab.grid, lab.preprocessing, lab.card, lab.fingerprint,
            lab.processor.patch_size)  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind for kind, _ in KINDS])
def test_every_connector_saves_and_loads_bit_for_bit(
    tiny_random: Lab, pixels: torch.Tensor, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    before = snapshot(tiny_random)
    with ll.connector(tiny_random, ll.new_connector(tiny_random, kind, seed=3, **options)) as lab:
        want, name, tower = tokens(lab, pixels), lab.fingerprint, lab.model.state_dict()
        ll.save(lab, tmp_path)
    again = ll.load(tmp_path)  # refuses missing, unexpected and misshapen weights
    close(tokens(again, pixels), want, terms=WIDTH)  # loaded weights may lie otherwise in memory, so no bits are promised here
    assert again.fingerprint == name
    assert again.model.config.image_seq_length == want.shape[1] == again.grid[0] * again.grid[1]
    assert again.card.connector.startswith(kind)
    assert type(again.model) is LlavaForConditionalGeneration
    assert all(torch.equal(value, tower[key]) for key, value in again.model.state_dict().items())
    assert snapshot(tiny_random) == before
    assert monkey_patching.get_patch_mapping() == {}
    assert modeling_llava.LlavaMultiModalProjector is connectors.STOCK


def test_a_wide_mlp_says_so_and_one_as_wide_as_the_language_model_says_nothing(tiny_random: Lab) -> None:
    """Its config.json and fingerprint are those from before there was a choice."""
    assert dict(ll.CONNECTORS["mlp2x_gelu"].options) == {"width": None}
    assert ll.new_connector(tiny_random, "mlp3x_gelu").options == {}
    wide = ll.new_connector(tiny_random, "mlp3x_gelu", width=24)
    sizes = connectors.sizes_of(tiny_random.model.config)
    assert [tuple(layer.weight.shape) for layer in wide.modules() if isinstance(layer, torch.nn.Linear)] == [
        (24, sizes.vision),
        (24, 24),
        (sizes.language, 24),
    ]
    with ll.connector(tiny_random, wide) as lab:
        assert lab.card.connector == "mlp3x_gelu(width=24)"
        assert lab.model.config.mm_projector_options == {"width": 24}
    with pytest.raises(OptionError, match="option width of connector 'mlp2x_gelu' must be a whole number from 1, got 0"):
        ll.new_connector(tiny_random, "mlp2x_gelu", width=0)


def test_a_hub_mlp_loads_into_ours_unchanged(tiny_random: Lab, pixels: torch.Tensor) -> None:
    stock = layout.connector_of(tiny_random.model)
    ours = connectors.build("mlp2x_gelu", connectors.sizes_of(tiny_random.model.config))
    assert not any(ours.load_state_dict(stock.state_dict()))
    ours.trained_with = trained_beside(tiny_random.model)
    want, name = tokens(tiny_random, pixels), tiny_random.fingerprint
    with ll.connector(tiny_random, ours) as lab:
        close(tokens(lab, pixels), want, terms=WIDTH)
        assert lab.fingerprint == name  # the same function of the same weights


def test_swapping_a_connector_for_itself_changes_no_bit(tiny_random: Lab, pixels: torch.Tensor, picture: np.ndarray) -> None:
    before, want = snapshot(tiny_random), tokens(tiny_random, pixels)
    run = tiny_random.ask(picture, QUESTION, max_new_tokens=2)
    with ll.connector(tiny_random, tiny_random) as lab:
        again = lab.ask(picture, QUESTION, max_new_tokens=2)
        assert torch.equal(tokens(lab, pixels), want)
    assert tiny_random.swap(tiny_random.connector) is before[0]
    assert snapshot(tiny_random) == before
    assert np.array_equal(run.logprobs, again.logprobs)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("vision", {}),
        ("gradcam", {}),
        ("occlusion", {"at": "vision"}),
        ("rollout", {"through_vision": True}),
        ("relevancy", {"vision": True}),
    ],
)
def test_what_looks_at_vision_patches_refuses_tokens_of_several(
    tiny_random: Lab, picture: np.ndarray, what: str, options: dict[str, Any]
) -> None:
    with ll.connector(tiny_random, ll.new_connector(tiny_random, "avgpool")) as lab:
        run = lab.ask(picture, QUESTION, max_new_tokens=2)
        with pytest.raises(OptionError, match=r"4x4 vision patches, and the connector makes 2x2 tokens of them; choose"):
            ll.attribute(lab, run, method=what, **options)
        with pytest.raises(OptionError, match="stage 'before' needs an image token for each"):
            ll.linear_probe(lab, [picture] * 6, [0, 1] * 3, at="before")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_everything_comes_back_after_an_exception(tiny_random: Lab, error: type[BaseException]) -> None:
    before, pooled = snapshot(tiny_random), ll.new_connector(tiny_random, "avgpool")

    def interrupted() -> None:
        with ll.connector(tiny_random, pooled):
            assert snapshot(tiny_random) != before
            raise error

    with pytest.raises(error):
        interrupted()
    assert snapshot(tiny_random) == before


def test_the_patched_classes_come_back_after_an_exception() -> None:
    def interrupted() -> None:
        with connectors.patched():
            assert modeling_llava.LlavaMultiModalProjector is connectors.FromConfig
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert modeling_llava.LlavaMultiModalProjector is connectors.STOCK
    assert monkey_patching.get_patch_mapping() == {}


def test_a_run_of_another_connector_is_refused(tiny_random: Lab, picture: np.ndarray) -> None:
    with ll.connector(tiny_random, ll.new_connector(tiny_random, "linear")) as lab:
        run = lab.ask(picture, QUESTION, max_new_tokens=2)
        lab.inputs(run)
    with pytest.raises(CheckpointError, match="ask again with this lab"):
        tiny_random.inputs(run)


def test_the_same_weights_joined_differently_have_another_fingerprint(tiny_random: Lab) -> None:
    mlp, straight = (ll.new_connector(tiny_random, kind, seed=1) for kind in ("mlp2x_gelu", "linear2x"))
    assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), straight.parameters(), strict=True))
    names = set()
    for module in (mlp, straight):
        with ll.connector(tiny_random, module) as lab:
            names.add(lab.fingerprint)
    assert len(names) == 2


def test_everything_downstream_follows_fewer_tokens(tiny_random: Lab, picture: np.ndarray) -> None:
    with ll.connector(tiny_random, ll.new_connector(tiny_random, "avgpool", side=2)) as lab:
        run = lab.ask(picture, QUESTION, max_new_tokens=3)
        assert (lab.grid, len(run.image_positions), lab.card.image_tokens) == ((2, 2), 4, 4)
        assert (run.map.rows, run.map.cols, run.map.size) == (2, 2, 32)
        left, top, right, bottom = run.map.patch_box(1, 0)
        whole = tiny_random.preprocessing.map(60, 40)
        assert (left, top, right, bottom) == pytest.approx((0, 20, 30, 50)), whole
        stock = lab.processor(images=picture, text="USER: <image>\nHi ASSISTANT:", return_tensors="pt", do_pad=True)
        assert int((stock["input_ids"] == lab.image_id).sum()) == 4
        for method in ("rollout", "occlusion", "attention"):
            relevance = ll.attribute(lab, run, method=method)
            assert relevance.values.shape == (1, 2, 2)
            assert np.isfinite(relevance.values).all()
            assert relevance.on_picture().shape == (40, 60)
    assert tiny_random.grid == (4, 4)


def test_pooling_is_the_mean_over_windows(tiny_random: Lab) -> None:
    pooled: Any = ll.new_connector(tiny_random, "avgpool", side=2, layers=1)
    given = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    mean = given[0, [2, 3, 6, 7]].mean(0)  # upper right window of 4x4
    close(pooled(given)[0, 1], pooled.linear_1(mean), terms=WIDTH)


def test_pixel_shuffle_keeps_every_number(tiny_random: Lab) -> None:
    shuffle: Any = ll.new_connector(tiny_random, "pixel_shuffle", factor=2)
    given = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    side_by_side = torch.cat([given[0, i] for i in (8, 9, 12, 13)])  # lower left window, row by row
    close(shuffle(given)[0, 2], shuffle.linear_1(side_by_side), terms=WIDTH)


@pytest.mark.parametrize(("count", "width"), [(None, 21), (5000, 50)])
def test_a_bottleneck_is_as_wide_as_its_parameters_allow(tiny_random: Lab, count: int | None, width: int) -> None:
    made: Any = ll.new_connector(tiny_random, "bottleneck", parameters=count)
    allowed = count or 33 * 64  # the linear connector's
    assert made.linear_1.out_features == width
    assert allowed - 97 < sum(p.numel() for p in made.parameters()) <= allowed


def test_identity_passes_features_on_and_needs_equal_widths(tiny_random: Lab) -> None:
    made = connectors.build("identity", connectors.Sizes(8, 8, (2, 2)))
    given = torch.randn(1, 4, 8)
    assert made(given) is given
    with pytest.raises(OptionError, match=r"equal widths, got 32 \(vision\) and 64"):
        ll.new_connector(tiny_random, "identity")


def test_the_two_initialisations_differ_as_they_should(tiny_random: Lab) -> None:
    state = torch.get_rng_state()
    llava: Any = ll.new_connector(tiny_random, "mlp2x_gelu", init="llava")
    stock: Any = ll.new_connector(tiny_random, "mlp2x_gelu", init="transformers")
    assert float(llava.linear_2.weight.std()) == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert float(stock.linear_2.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not stock.linear_1.bias.any()
    assert llava.linear_1.bias.any()
    again: Any = ll.new_connector(tiny_random, "mlp2x_gelu", init="llava")
    assert torch.equal(again.linear_1.weight, llava.linear_1.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qformer", {}, r"one of linear, mlp2x_gelu, .* or mlp\{N\}x_gelu, N from 1 to 64 layers, got 'qformer'"),
        ("mlp0x_gelu", {}, "got 'mlp0x_gelu'"),
        ("linear", {"side": 2}, "connector 'linear' has no option 'side'; its options are none"),
        ("avgpool", {"side": 3}, "side must divide the 4x4 patches, so one of 1, 2, 4; got 3"),
        ("avgpool", {"side": 0}, "whole number from 1, got 0"),
        ("pixel_shuffle", {"factor": 3}, "factor must divide the 4x4 patches, got 3"),
        ("resampler", {"queries": 5}, "square number"),
        ("resampler", {"queries": 4, "heads": 7}, "heads must divide the language width 64, got 7"),
        ("bottleneck", {"parameters": 9}, "parameters must be at least 161"),
        ("linear", {"init": "zeros"}, "init must be one of llava, transformers, got 'zeros'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tiny_random: Lab, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        ll.new_connector(tiny_random, kind, **options)
    assert "\n" not in str(caught.value)


def test_another_width_or_another_thing_is_not_plugged_in(tiny_random: Lab) -> None:
    before = snapshot(tiny_random)
    wide = connectors.build("linear", connectors.Sizes(16, 64, (4, 4)))
    with pytest.raises(OptionError, match="expected a connector from width 32 to width 64, .* got one from 16 to 64"):
        tiny_random.swap(wide)
    with pytest.raises(OptionError, match=r"got Linear; make one with llava_lab\.new_connector"):
        tiny_random.swap(torch.nn.Linear(32, 64))
    with pytest.raises(OptionError, match="'linear' is a name"), ll.connector(tiny_random, "linear"):
        pass
    grid = connectors.build("avgpool", connectors.Sizes(32, 64, (8, 8)))
    with pytest.raises(OptionError, match="4x4 patches, got one for 8x8"):
        tiny_random.swap(grid)
    assert snapshot(tiny_random) == before


def test_a_config_with_an_unknown_connector_is_refused(tiny_random: Lab, tmp_path: Path) -> None:
    with ll.connector(tiny_random, ll.new_connector(tiny_random, "linear")) as lab:
        ll.save(lab, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"mm_projector_type": "linear"', '"mm_projector_type": "qformer"'))
    with pytest.raises(CheckpointError, match=r"config\.json: a connector is one of linear"):
        ll.load(tmp_path)
    path.write_text(path.read_text().replace('"qformer"', '"mlp2x_gelu"'))
    with pytest.raises(CheckpointError, match="missing: .*linear_2"):
        ll.load(tmp_path)
    assert modeling_llava.LlavaMultiModalProjector is connectors.STOCK


def test_a_connector_of_another_language_model_is_plugged_in_with_a_warning(tiny_random: Lab) -> None:
    foreign = ll.new_connector(tiny_random, "linear")
    foreign.trained_with = {**trained_beside(tiny_random.model), "language": "0123456789abcdef"}
    with pytest.warns(ll.ForeignConnector, match="another language model .0123456789abcdef"), ll.connector(tiny_random, foreign):
        pass
    foreign.trained_with = None
    with pytest.warns(ll.ForeignConnector, match="cannot be checked"), ll.connector(tiny_random, foreign):
        pass
    foreign.trained_with = trained_beside(tiny_random.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ll.connector(tiny_random, foreign):
            pass
