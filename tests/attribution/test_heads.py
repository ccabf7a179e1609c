"""Chosen heads and values weighed in: each against eager attention and a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llava_lab.attribution import attribute
from llava_lab.attribution.attention import head_weights, output_projection
from llava_lab.capture import Full, fuse_heads, undisturbed, watch_attention
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.results import Relevance, Run
from tests.support.checkpoints import build_llama_model, build_processor, byte_tokenizer, llava_config
from tests.support.planted import planted_lab, red_picture, scripted_run

ANSWER = "The car is blue."
PAIRS = ((2, 3), (0, 1), (2, 0))


def _wide() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return scripted_run(tiny_random, _wide(), ANSWER)


@pytest.fixture(scope="module")
def kept(tiny_random: Lab, run: Run) -> Tensor:
    """Every attention weight, L H Q K."""
    with undisturbed(tiny_random.model), watch_attention(language_layers(tiny_random.model), Full()) as full:
        tiny_random.model(**tiny_random.inputs(run))
    return torch.stack([full.attention[i][0] for i in range(3)])


@pytest.fixture(scope="module", params=[4, 2], ids=["every head its own values", "values shared by two heads"])
def grouped(request: pytest.FixtureRequest) -> tuple[Lab, Run]:
    """A random model whose heads may share keys and values."""
    tokenizer = byte_tokenizer()
    sizes = {"image": 32, "patch": 8, "vision_width": 32, "vision_layers": 2, "hidden": 64, "layers": 3, "heads": 4}
    rest = {"feature_layer": -2, "feature_strategy": "default", "projector_bias": True, "context": 512}
    config = llava_config(tokenizer, vocab=len(tokenizer), **sizes, **rest)  # type: ignore[arg-type]
    config.text_config.num_key_value_heads = request.param
    lab = Lab(build_llama_model(config, seed=1), build_processor(config, tokenizer, do_pad=True), name="grouped")
    return lab, scripted_run(lab, _wide(), ANSWER)


# -- attention with (layer, head) pairs -----------------------------------------------------


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_pairs_are_exactly_these_heads(tiny_random: Lab, run: Run, kept: Tensor, fusion: str) -> None:
    rel = attribute(tiny_random, run, method="attention", target=["answer", "blue"], heads=PAIRS, fusion=fusion)
    image = slice(*run.segments["image"])
    rows = fuse_heads(torch.stack([kept[layer, head] for layer, head in PAIRS])[None], fusion)[0]
    for i, target in enumerate(rel.targets):
        want = rows[list(target.positions)].mean(0)
        np.testing.assert_allclose(rel.values[i].ravel(), want[image].numpy(), atol=1e-6)
    shares = rel.extras["image_share_by_head"]
    assert [(one["layer"], one["head"]) for one in shares] == list(PAIRS)
    blue = list(rel.targets[1].positions)
    assert shares[0]["share"][1] == pytest.approx(float(kept[2, 3][blue][:, image].sum(1).mean()), abs=1e-6)
    assert "L2H3, L0H1, L2H0" in rel.notes[0]


def test_pairs_survive_saving(tiny_random: Lab, run: Run, tmp_path: Path) -> None:
    rel = attribute(tiny_random, run, method="attention", heads=PAIRS)
    again = Relevance.load(rel.save(tmp_path / "map.npz"))
    assert again.options == rel.options
    assert rel.options["heads"] == [[2, 3], [0, 1], [2, 0]]
    np.testing.assert_array_equal(
        attribute(tiny_random, run, method="attention", heads=again.options["heads"]).values, rel.values
    )


@pytest.mark.parametrize("method", ["attention", "value_attention", "relative_attention"])
@pytest.mark.parametrize("heads", [((3, 0),), ((0, 4),), ((0, 1), 2), ((0, 1, 2),), ((-1, 0),), True, (True,)], ids=str)
def test_heads_nobody_has_are_refused(tiny_random: Lab, run: Run, method: str, heads: Any) -> None:
    forms = r"numbers from 0 to 3, or None for all, or \(layer, head\) pairs like .* with layers from 0 to 2; got"
    with pytest.raises(OptionError, match=forms):
        attribute(tiny_random, run, method=method, heads=heads)


def test_pairs_and_a_window_are_refused_together(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(OptionError, match=r"leave layers=None, got \(0, 2\)"):
        attribute(tiny_random, run, method="attention", heads=PAIRS, layers=(0, 2))


@pytest.mark.parametrize("method", ["value_attention", "localization_heads", "relative_attention", "attention_flow"])
def test_contrasts_are_refused(tiny_random: Lab, run: Run, method: str) -> None:
    with pytest.raises(TargetError, match=f"{method!r} cannot tell 'blue, not green'"):
        attribute(tiny_random, run, method=method, target=("blue", "green"))


# -- attention weighed by values ------------------------------------------------------------


def _eager_vectors(lab: Lab, run: Run) -> tuple[Tensor, Tensor]:
    """Attention L H Q K by eager, and every head's projected value L H K D, one after the other, in float64."""
    layers, values = language_layers(lab.model), []
    handles = [layer.self_attn.v_proj.register_forward_hook(lambda *call: values.append(call[2][0])) for layer in layers]
    lab.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = lab.model(**lab.inputs(run), output_attentions=True).attentions
    lab.model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    moved = []
    for layer, value in zip(layers, values, strict=True):
        weight, width = layer.self_attn.o_proj.weight.double(), layer.self_attn.head_dim
        group = 4 // (value.shape[1] // width)
        for head in range(4):
            own = value[:, (head // group) * width : (head // group + 1) * width].double()
            moved.append(own @ weight[:, head * width : (head + 1) * width].T)
    return torch.cat(attentions).double(), torch.stack(moved).reshape(len(layers), 4, *moved[0].shape)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "raw"},
        {"scale": "raw", "join": "vectors"},
        {},
        {"join": "vectors"},
        {"layers": (1, 3), "heads": (3, 1)},
        {"heads": 2, "join": "vectors", "scale": "raw"},
        {"heads": PAIRS, "scale": "raw"},
        {"heads": PAIRS, "join": "vectors"},
    ],
    ids=str,
)
def test_value_attention_equals_a_loop_over_eager_attention(grouped: tuple[Lab, Run], options: dict[str, Any]) -> None:
    lab, run = grouped
    attention, moved = _eager_vectors(lab, run)
    heads = options.get("heads", range(4))
    layers = range(*options.get("layers", (0, 3)))
    chosen = {layer: [heads] if isinstance(heads, int) else list(heads) for layer in layers}
    if heads == PAIRS:
        chosen = {0: [1], 2: [3, 0]}
    rows = []
    for layer, mine in chosen.items():
        pieces = torch.stack([attention[layer, h][:, :, None] * moved[layer, h][None] for h in mine])  # h Q K D
        row = pieces.sum(0).norm(dim=-1) if options.get("join") == "vectors" else pieces.norm(dim=-1).mean(0)
        rows.append(row if options.get("scale") == "raw" else row / row.sum(-1, keepdim=True))
    mean = torch.stack(rows).mean(0)
    rel = attribute(lab, run, method="value_attention", target=["answer", "blue"], **options)
    for i, target in enumerate(rel.targets):
        want = mean[list(target.positions)].mean(0)
        image = want[slice(*run.segments["image"])]
        np.testing.assert_allclose(rel.values[i].ravel(), image.numpy(), rtol=1e-4, atol=1e-6)
        assert rel.extras["image_share"][i] == pytest.approx(float(image.sum() / want.sum()), abs=1e-5)
    if options.get("scale") != "raw":
        assert sum(rel.extras["mass"][0].values()) == pytest.approx(1, abs=1e-5)


def test_heads_that_cancel_count_only_without_their_direction(grouped: tuple[Lab, Run]) -> None:
    lab, _ = grouped
    before = {name: value.clone() for name, value in lab.model.state_dict().items()}
    with torch.no_grad():
        for layer in language_layers(lab.model):
            mine = layer.self_attn
            width = mine.head_dim
            for part in (mine.q_proj, mine.k_proj, mine.v_proj):
                part.weight[width : 2 * width] = part.weight[:width]
            mine.o_proj.weight[:, width : 2 * width] = -mine.o_proj.weight[:, :width]
    again = scripted_run(lab, _wide(), ANSWER)
    found = {
        join: attribute(lab, again, method="value_attention", heads=(0, 1), join=join, scale="raw").values
        for join in ("norms", "vectors")
    }
    lab.model.load_state_dict(before)
    assert found["vectors"].max() < 1e-3 * found["norms"].max()


def test_packed_projections_are_read_by_what_they_do() -> None:
    plain = nn.Linear(12, 7)

    class Packed(nn.Module):
        in_features = 12
        weight = torch.zeros(42, 1, dtype=torch.uint8)

        def forward(self, x: Tensor) -> Tensor:
            return plain(x)

    value = torch.zeros(1, 3, 5, 4)
    with torch.no_grad():
        weights = head_weights(plain, value)
        assert weights.shape == (3, 4, 7)
        torch.testing.assert_close(head_weights(Packed(), value), weights, atol=1e-6, rtol=0)
    with pytest.raises(LabError, match="expected a linear output projection, got Identity"):
        head_weights(nn.Identity(), value)


def test_a_layer_without_an_output_projection_is_refused() -> None:
    attention, layer = nn.Module(), nn.Module()
    attention.config, layer.self_attn = object(), attention  # type: ignore[assignment]
    with pytest.raises(LabError, match="output projection named o_proj or out_proj, got Module without"):
        output_projection(layer)


@pytest.mark.parametrize(("option", "value"), [("join", "sum"), ("scale", "log")])
def test_value_options_list_their_choices(tiny_random: Lab, run: Run, option: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"{option} must be one of '.*', got '{value}'"):
        attribute(tiny_random, run, method="value_attention", **{option: value})


def test_only_red_patches_have_values_to_fetch() -> None:
    lab = planted_lab()
    picture = red_picture(96, 96, (12, 60, 36, 84))
    run = scripted_run(lab, picture, "The car is red.")
    covered = run.map.mask_to_patches((picture == (220, 30, 30)).all(-1))
    rel = attribute(lab, run, method="value_attention", target="red", scale="raw")
    plain = attribute(lab, run, method="attention", target="red")
    # grey noise is nearly as red as it is green: it draws attention and is worth almost nothing
    assert rel.values[0][covered == 0].max() < 1e-3 * rel.values[0][covered == 1].min()
    assert plain.values[0][covered == 0].max() > 1e-3 * plain.values[0][covered == 1].min()
