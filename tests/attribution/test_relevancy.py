"""Relevancy is rules 5 and 6 on kept matrices, and lvlm-interpret's own maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.attribution import METHODS
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers, used_vision_layers
from llava_lab.replay import resolve_targets
from llava_lab.results import Run
from tests.support.checkpoints import SENTENCES, build_llama_model, build_llava, build_processor, byte_tokenizer, llava_config
from tests.support.closeness import TERMS, close
from tests.support.gradients import compute, noise_run
from tests.support.leftovers import as_someone_who_trains_has_it, state_of
from tests.support.planted import RED, planted_lab, red_picture, scripted_run


def maps(lab: Lab, run: Run, target: Any = None, **options: Any) -> np.ndarray:
    """(targets, patches) of relevancy, without the registry."""
    values = compute(lab, run, "relevancy", target, **options).values
    return values.reshape(len(values), -1)


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return noise_run(tiny_random)


@pytest.fixture(scope="module")
def eager(tiny_folder: Path) -> Lab:
    """The same weights with eager attention, which keeps its matrices."""
    return load(str(tiny_folder), attention="eager")


def kept(lab: Lab, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits (S, V) and every attention (1, H, S, S) of the language model and of the used tower, all in one graph."""
    vision: list[Tensor] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda module, args, output: vision.append(output[1]))  # type: ignore[union-attr]
        for layer in used_vision_layers(lab.model)
    ]
    pixels = inputs["pixel_values"].clone().requires_grad_()  # so that everything after it has a graph
    try:
        out = lab.model(**{**inputs, "pixel_values": pixels}, output_attentions=True, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[0], list(out.attentions), vision


def rules(attentions: list[Tensor], gradients: tuple[Tensor, ...]) -> Tensor:
    """Rules 5 and 6 as the paper has them."""
    total = torch.eye(attentions[0].shape[-1])
    for attention, gradient in zip(attentions, gradients, strict=True):
        total = total + (attention[0] * gradient[0]).clamp_min(0).mean(0) @ total
    return total.detach()


def naive(lab: Lab, run: Run, target: Any, *, vision: bool = False) -> np.ndarray:
    """The map (patches,) of one target: one graph, one backward, whole matrices."""
    (one,) = resolve_targets(lab, run, target)
    logits, language, tower = kept(lab, lab.inputs(run))
    score = logits[list(one.positions), list(one.token_ids)].sum()
    if one.against_ids:
        score = score - logits[list(one.positions), list(one.against_ids)].sum()
    gradients = torch.autograd.grad(score, [*language, *(tower if vision else [])])
    image = rules(language, gradients[: len(language)])[list(one.positions)].mean(0)[slice(*run.segments["image"])]
    if not vision:
        return image.numpy()
    through = rules(tower, gradients[len(language) :])
    return (image @ through[1:])[1:].numpy()


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("target", [0, "blue", "answer", ("blue", "green")], ids=str)
def test_the_map_is_rules_5_and_6_on_kept_matrices(tiny_random: Lab, eager: Lab, run: Run, target: Any, vision: bool) -> None:
    expected = naive(eager, run, target, vision=vision)
    assert expected.max() > 1e-3
    close(maps(tiny_random, run, target, vision=vision)[0], expected, terms=TERMS)


@pytest.mark.parametrize("vision", [False, True])
def test_several_targets_share_the_passes_and_equal_single_ones(tiny_random: Lab, run: Run, vision: bool) -> None:
    wanted = ["answer", "blue", 0, ("blue", "green"), *range(6)]  # more than go through a layer together, some at one position
    targets = resolve_targets(tiny_random, run, wanted)
    options = METHODS["relevancy"].with_defaults({"vision": vision})
    together = METHODS["relevancy"].compute(tiny_random, run, targets, options)
    for number, target in enumerate(targets):
        alone = METHODS["relevancy"].compute(tiny_random, run, (target,), options)
        assert alone.passes == together.passes == {"forward": 2, "backward": 1}
        close(alone.values[0], together.values[number], terms=TERMS)
        close(alone.extras["image_share"][0], together.extras["image_share"][number], terms=TERMS)


def test_a_model_loaded_with_eager_attention_gives_the_same_map(tiny_random: Lab, eager: Lab, run: Run) -> None:
    close(maps(eager, run, "blue", vision=True), maps(tiny_random, run, "blue", vision=True), terms=TERMS)


def test_heads_that_share_keys_are_told_apart() -> None:
    tokenizer = byte_tokenizer(SENTENCES)
    sizes = {"image": 32, "patch": 8, "vision_width": 32, "vision_layers": 3, "hidden": 64, "layers": 3, "heads": 4}
    rest = {"feature_layer": -2, "feature_strategy": "default", "projector_bias": True, "context": 512}
    config = llava_config(tokenizer, **sizes, **rest, vocab=len(tokenizer))  # type: ignore[arg-type]
    config.text_config.num_key_value_heads = 2
    model = build_llama_model(config)
    lab = Lab(model, build_processor(config, tokenizer, do_pad=True))
    run = noise_run(lab)
    found = maps(lab, run, ["blue", "answer"])
    model.set_attn_implementation("eager")
    for number, target in enumerate(("blue", "answer")):
        close(found[number], naive(lab, run, target), terms=TERMS)


@pytest.mark.parametrize("feature_layer", [[-3, -2], -1, [0, -2]], ids=str)
def test_several_feature_layers_send_their_own_gradient(tmp_path: Path, feature_layer: Any) -> None:
    lab = load(str(build_llava(tmp_path / "model", feature_layer=feature_layer)), attention="eager")
    run = noise_run(lab)
    expected = naive(lab, run, "blue", vision=True)
    close(maps(lab, run, "blue", vision=True)[0], expected, terms=TERMS)


@pytest.mark.long
def test_576_image_tokens_and_both_fits_take_the_same_path(llava15_folder: Path) -> None:
    lab = load(str(llava15_folder), attention="eager")
    picture = np.random.default_rng(3).integers(0, 255, (120, 90, 3), dtype=np.uint8)
    for fit, vision in (("pad", False), ("crop", True)):
        run = scripted_run(lab, picture, "The car is blue.", fit=fit)
        found = maps(lab, run, "blue", vision=vision)
        assert found.shape == (1, 576)
        expected = naive(lab, run, "blue", vision=vision)
        np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-5 * expected.max())


def lvlm_interpret(lab: Lab, run: Run) -> np.ndarray:
    """(answer tokens, patches) by their way: generation with every step's graph kept, one backward per token."""
    inputs = lab.inputs(run)
    start, stop = run.segments["answer"]
    inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_()
    given = {**inputs, "input_ids": inputs["input_ids"][:, :start], "attention_mask": inputs["attention_mask"][:, :start]}
    steps = [lab.model(**given, output_attentions=True, use_cache=True)]
    for position in range(start, stop - 1):
        token = inputs["input_ids"][:, position : position + 1]
        steps.append(
            lab.model(input_ids=token, past_key_values=steps[-1].past_key_values, output_attentions=True, use_cache=True)
        )
    earlier: list[Tensor] = []
    rows = []
    for number, step in enumerate(steps):
        score = step.logits[0, -1, int(run.token_ids[start + number])]
        gradients = torch.autograd.grad(score, list(step.attentions), retain_graph=True)
        total = torch.eye(start + number)
        for layer, (attention, gradient) in enumerate(zip(step.attentions, gradients, strict=True)):
            cam = (attention[0] * gradient[0]).clamp_min(0).mean(0).detach()
            if number:
                cam = torch.cat([torch.nn.functional.pad(earlier[layer], (0, 1)), cam])
                earlier[layer] = cam
            else:
                earlier.append(cam)
            total = total + cam @ total
        row = (total - torch.eye(len(total)))[-1]
        rows.append((row / row.sum())[slice(*run.segments["image"])])
    return torch.stack(rows).numpy()


def test_the_variant_gives_lvlm_interpret_s_maps(tiny_random: Lab, eager: Lab, run: Run) -> None:
    expected = lvlm_interpret(eager, run)
    every = list(range(len(expected)))
    found = maps(tiny_random, run, every, variant="lvlm-interpret")
    close(found, expected, terms=TERMS)
    last = maps(tiny_random, run, every[2], variant="lvlm-interpret")
    close(last[0], expected[2], terms=TERMS)
    exact = maps(tiny_random, run, every)
    assert np.abs(exact[0] / exact[0].sum() - found[0] / found[0].sum()).max() < 1e-4, "the first token has no earlier one"
    assert np.abs(exact[3] / exact[3].sum() - found[3] / found[3].sum()).max() > 1e-4, "later ones reuse its rows"
    whole = maps(tiny_random, run, "answer", variant="lvlm-interpret")
    close(whole[0], expected.mean(0), terms=TERMS)


def test_the_variant_refuses_what_that_tool_cannot_do(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(OptionError, match="vision=True belongs to variant='chefer'"):
        maps(tiny_random, run, variant="lvlm-interpret", vision=True)
    with pytest.raises(TargetError, match="explains tokens that were said, not the contrast 'blue, not green'"):
        maps(tiny_random, run, ("blue", "green"), variant="lvlm-interpret")


def test_mass_and_class_token_share_are_what_the_chain_leaves(tiny_random: Lab, eager: Lab, run: Run) -> None:
    targets = resolve_targets(tiny_random, run, "blue")
    plain = METHODS["relevancy"].compute(tiny_random, run, targets, METHODS["relevancy"].with_defaults({}))
    chained = METHODS["relevancy"].compute(tiny_random, run, targets, METHODS["relevancy"].with_defaults({"vision": True}))
    assert plain.extras["mass"] == chained.extras["mass"]
    mass = plain.extras["mass"][0]
    assert mass["image"] == pytest.approx(plain.values.sum(), rel=1e-5)
    close(plain.extras["image_share"][0], mass["image"] / sum(mass.values()), terms=TERMS)
    logits, language, tower = kept(eager, eager.inputs(run))
    (target,) = targets
    score = logits[list(target.positions), list(target.token_ids)].sum()
    close(plain.extras["score"][0], float(score.detach()), terms=TERMS)
    gradients = torch.autograd.grad(score, [*language, *tower])
    whole = rules(language, gradients[: len(language)])
    row = (whole - torch.eye(len(whole)))[list(target.positions)].mean(0)  # its own word is no relevance
    image = row[slice(*run.segments["image"])]
    for name, (start, stop) in run.segments.items():
        close(mass[name], float(row[start:stop].sum()), terms=TERMS)
    ended = image @ rules(tower, gradients[len(language) :])[1:]
    assert 0 < chained.extras["lost_to_cls"][0] == pytest.approx(float(ended[0] / ended.sum()), abs=1e-5)
    assert any("class token" in note for note in chained.notes)


@pytest.mark.parametrize("options", [{}, {"vision": True}, {"variant": "lvlm-interpret"}], ids=str)
def test_the_planted_red_square_lights_up(options: dict[str, Any]) -> None:
    lab = planted_lab()
    picture = red_picture(120, 80, (60, 10, 80, 30))
    run = scripted_run(lab, picture, "The car is red.")
    values = maps(lab, run, "red", **options)[0]
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1)).ravel()
    assert values[covered == 1].min() > values[covered == 0].max()


def test_a_head_that_is_not_norm_and_lm_head_is_refused(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    head = tiny_random.model.lm_head.forward
    scales: Iterator[float] = iter([1.0, 0.5])  # another answer the second time, as a soft cap after the head would give
    monkeypatch.setattr(tiny_random.model.lm_head, "forward", lambda states: head(states) * next(scales))
    with pytest.raises(LabError, match="the output head over the final norm, got others"):
        maps(tiny_random, run, "blue")


@pytest.mark.parametrize("at", ["the forward", "the way back", "nowhere"])
@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, at: str, how: type[BaseException]
) -> None:
    layer = language_layers(tiny_random.model)[1]
    plain, calls = layer.mlp.forward, []

    def stop(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == {"the forward": 1, "the way back": 2, "nowhere": 99}[at]:
            raise how("stop")
        return plain(*args)

    stopped = False
    with as_someone_who_trains_has_it(tiny_random):
        before = state_of(tiny_random)
        with monkeypatch.context() as patch:
            patch.setattr(layer.mlp, "forward", stop)
            try:
                maps(tiny_random, run, ["blue", "answer"], vision=True)
            except (RuntimeError, KeyboardInterrupt):
                stopped = True
        assert state_of(tiny_random) == before
    assert stopped == (at != "nowhere")
