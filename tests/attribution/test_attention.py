"""Attention, attention weighed by values, and relative attention, each against eager attention and a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llava_lab.attribution import attribute
from llava_lab.attribution.attention import NEUTRAL, ask_instead, head_weights, output_projection
from llava_lab.capture import Full, fuse_heads, undisturbed, watch_attention
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers
from llava_lab.results import Relevance, Run
from tests.support.checkpoints import build_llama_model, build_processor, byte_tokenizer, llava_config
from tests.support.closeness import TERMS, close
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

# -- relative attention --------------------------------------------------------------------


QUESTION = "What color is the car?"


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", question=QUESTION)


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


def _rows(lab: Lab, run: Run, positions: list[int]) -> np.ndarray:
    with undisturbed(lab.model), watch_attention(language_layers(lab.model), Full()) as full:
        lab.model(**lab.inputs(run))
    mean = torch.stack([one[0].mean(0) for one in full.attention.values()]).mean(0)
    return mean[positions].mean(0)[slice(*run.segments["image"])].numpy()


@pytest.mark.parametrize("beside", ["cue", "answer"])
def test_equals_asking_the_neutral_thing_and_dividing(tiny_random: Lab, run: Run, beside: str) -> None:
    """The neutral side is asked for real, and made to give the same answer."""
    other = scripted_run(tiny_random, run.picture, "The car is blue.", question=NEUTRAL)
    rel = attribute(tiny_random, run, method="relative_attention", target=["blue", 0], beside=beside, floor=0)
    raised = attribute(tiny_random, run, method="relative_attention", target=["blue", 0], beside=beside)
    even = 1 / len(run.token_ids)
    assert rel.passes["forward"] == 2
    for i, target in enumerate(rel.targets):
        shift = other.segments["answer"][0] - run.segments["answer"][0]
        there = [position + shift for position in target.positions] if beside == "answer" else [other.segments["answer"][0] - 1]
        ours, theirs = _rows(tiny_random, run, list(target.positions)), _rows(tiny_random, other, there)
        np.testing.assert_allclose(rel.values[i].ravel(), ours / theirs, rtol=1e-4)
        np.testing.assert_allclose(raised.values[i].ravel(), (ours + even) / (theirs + even), rtol=1e-4)
    log = attribute(tiny_random, run, method="relative_attention", target=["blue", 0], beside=beside, scale="log")
    np.testing.assert_allclose(log.values, np.log(raised.values), atol=1e-5)


def test_the_same_question_beside_itself_is_one_everywhere(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="relative_attention", target="words", neutral=QUESTION, beside="answer")
    np.testing.assert_array_equal(rel.values, np.ones_like(rel.values))
    first = attribute(tiny_random, run, method="relative_attention", target=0, neutral=f"  {QUESTION} ")
    np.testing.assert_array_equal(first.values, np.ones_like(first.values))
    assert first.extras["neutral"] == QUESTION


def test_layers_and_heads_are_chosen_on_both_sides(tiny_random: Lab, run: Run) -> None:
    pair = {"heads": ((1, 2),), "neutral": QUESTION, "beside": "answer"}
    np.testing.assert_array_equal(attribute(tiny_random, run, method="relative_attention", **pair).values, 1)
    one = attribute(tiny_random, run, method="relative_attention", heads=((1, 2),)).values
    window = attribute(tiny_random, run, method="relative_attention", heads=2, layers=(1, 2)).values
    np.testing.assert_allclose(one, window, rtol=1e-5)
    assert not np.allclose(one, attribute(tiny_random, run, method="relative_attention").values)


def test_earlier_turns_stay_as_they_were(tiny_random: Lab, picture: np.ndarray) -> None:
    history = [("Is there a car?", "Yes."), (QUESTION, "Red.")]  # the question itself was asked before
    run = tiny_random.ask(picture, QUESTION, history=history, max_new_tokens=3)
    other = ask_instead(tiny_random, run, NEUTRAL)
    asked = tiny_random.ask(picture, NEUTRAL, history=history, max_new_tokens=1)
    assert other.prompt == asked.prompt
    before = asked.segments["answer"][0]
    np.testing.assert_array_equal(other.token_ids[:before], asked.token_ids[:before])
    np.testing.assert_array_equal(other.token_ids[before:], run.token_ids[slice(*run.segments["answer"])])
    assert {name: span for name, span in other.segments.items() if name != "answer"} == {
        name: span for name, span in asked.segments.items() if name != "answer"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neutral": " "}, "neutral must be an instruction in words, for example 'Describe the picture.'; got ' '"),
        ({"neutral": 3}, "neutral must be an instruction in words"),
        ({"neutral": "Describe <image>"}, "holds '<image>', a special token"),
    ],
)
def test_relative_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="relative_attention", **options)


def test_what_every_question_looks_at_alike_cancels(tiny_folder: Path, run: Run) -> None:
    """Without queries every row attends uniformly, early image tokens and all: nothing is left of it."""
    lab = load(str(tiny_folder))
    with torch.no_grad():
        for layer in language_layers(lab.model):
            layer.self_attn.q_proj.weight.zero_()
    blind = scripted_run(lab, run.picture, "The car is blue.", question=QUESTION)
    rel = attribute(lab, blind, method="relative_attention", target=0)
    # uniform rows of different lengths: the ratio is one number
    np.testing.assert_allclose(rel.values, rel.values.mean(), rtol=1e-4)


def test_heads_that_look_at_red_only_when_told_to_stand_out_against_another_instruction() -> None:
    """The planted model looks at red whatever is asked, so it is given a question that it listens to."""
    lab = planted_lab()
    picture = red_picture(96, 96, (12, 60, 36, 84))
    blue = lab.tokenizer.encode(" is", add_special_tokens=False)[0]
    with torch.no_grad():  # only the word "is" asks for red; every other token's query is nothing
        language: Any = lab.model.model.language_model
        language.embed_tokens.weight[:, 3] = 0.0
        language.embed_tokens.weight[blue, 3] = 1.0
        attention = language.layers[0].self_attn
        attention.q_proj.weight[:, 3] = attention.q_proj.weight[:, 1]
        attention.q_proj.weight[:, 1] = 0.0
    run = scripted_run(lab, picture, "The car is red.")
    rel = attribute(lab, run, method="relative_attention", target="red", layers=(0, 1), floor=0)
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    assert rel.values[0][covered == 1].min() > 10 * rel.values[0][covered == 0].max()


# -- attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"layers": (1, 2)}, {"heads": 2}, {"heads": (0, 3)}, {"fusion": "max"}], ids=str)
def test_attention_is_the_mean_row_of_eager_matrices(tiny_random: Lab, run: Run, options: dict[str, Any]) -> None:
    with undisturbed(tiny_random.model), watch_attention(language_layers(tiny_random.model), Full()) as full:
        tiny_random.model(**tiny_random.inputs(run))
    start, stop = options.get("layers", (0, 3))
    chosen = options.get("heads", (0, 1, 2, 3))
    stack = torch.stack([full.attention[i][0] for i in range(start, stop)])  # L H Q K
    stack = stack[:, [chosen] if isinstance(chosen, int) else list(chosen)]
    fused = stack.amax(1) / stack.amax(1).sum(-1, keepdim=True) if "fusion" in options else stack.mean(1)
    target = run.target("blue")
    row = fused.mean(0)[list(target.positions)].mean(0)
    rel = attribute(tiny_random, run, method="attention", target="blue", **options)
    image = row[slice(*run.segments["image"])]
    close(rel.values[0].ravel(), image.numpy(), terms=TERMS)
    close(rel.extras["image_share"][0], float(image.sum()), terms=TERMS)
    close(np.mean([layer[0] for layer in rel.extras["image_share_by_layer"]]), float(image.sum()), terms=TERMS)
    assert sum(rel.extras["mass"][0].values()) == pytest.approx(1, abs=1e-5)


# -- chosen heads and values ---------------------------------------------------------------


ANSWER = "The car is blue."


PAIRS = ((2, 3), (0, 1), (2, 0))


def _wide() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)


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


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_pairs_are_exactly_these_heads(tiny_random: Lab, run: Run, kept: Tensor, fusion: str) -> None:
    rel = attribute(tiny_random, run, method="attention", target=["answer", "blue"], heads=PAIRS, fusion=fusion)
    image = slice(*run.segments["image"])
    rows = fuse_heads(torch.stack([kept[layer, head] for layer, head in PAIRS])[None], fusion)[0]
    for i, target in enumerate(rel.targets):
        want = rows[list(target.positions)].mean(0)
        close(rel.values[i].ravel(), want[image].numpy(), terms=TERMS)
    shares = rel.extras["image_share_by_head"]
    assert [(one["layer"], one["head"]) for one in shares] == list(PAIRS)
    blue = list(rel.targets[1].positions)
    close(shares[0]["share"][1], float(kept[2, 3][blue][:, image].sum(1).mean()), terms=TERMS)
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
        close(rel.values[i].ravel(), image.numpy(), terms=TERMS)
        close(rel.extras["image_share"][i], float(image.sum() / want.sum()), terms=TERMS)
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
        close(head_weights(Packed(), value), weights, terms=TERMS)
    with pytest.raises(LabError, match="expected a linear output projection, got Identity"):
        head_weights(nn.Identity(), value)


def test_a_layer_without_an_output_projection_is_refused() -> None:
    attention, layer = nn.Module(), nn.Module()
    attention.config, layer.self_attn = object(), attention  # type: ignore[assignment]
    with pytest.raises(LabError, match="output projection named o_proj or out_proj, got Module without"):
        output_projection(layer)


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
