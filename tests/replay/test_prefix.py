"""One prefix computed once: what is kept changes the cost, never the numbers; a cache that lies is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation
from torch import Tensor, nn

from llava_lab.attribution import attribute
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError
from llava_lab.models import Lab, load
from llava_lab.models.layout import connector_of
from llava_lab.replay.alter import grouped, open_altered
from llava_lab.replay.prefix import Prefix
from llava_lab.results import Run
from tests.support.closeness import TERMS, close
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

TARGETS = ["answer", "blue", ("blue", "green")]


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


def _naive(lab: Lab, run: Run, at: str, change: Callable[[Tensor], None] | None) -> np.ndarray:
    """Scores of `TARGETS` by one whole forward in which `change` was applied to the picture's tokens."""
    model = lab.model

    def into(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        states = args[0].clone()
        change(states[0])  # type: ignore[misc]
        return (states,)

    def out(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        states = output.clone()
        change(states[0])  # type: ignore[misc]
        return states

    part = connector_of(model)
    handles = []
    if change is not None:
        handles = [part.register_forward_pre_hook(into) if at == "vision" else part.register_forward_hook(out)]
    try:
        with torch.no_grad():
            logprobs = model(**lab.inputs(run)).logits[0].float().log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    odds = torch.logit(logprobs.double().exp())
    start, stop = run.segments["answer"]
    word = run.word("blue")
    against = lab.tokenizer.encode(" green" if len(lab.tokenizer) < 32000 else "green", add_special_tokens=False)[0]
    said = [float(sum(odds[i - 1, run.token_ids[i]] for i in range(a, b))) for a, b in ((start, stop), (word.start, word.stop))]
    at_word = logprobs[word.start - 1]
    return np.array([*said, float(at_word[run.token_ids[word.start]] - at_word[against])])


def _hooks(lab: Lab) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in lab.model.modules()]


def _seen_by(lab: Lab, run: Run, at: str) -> Tensor:
    """The picture's tokens at that place, patches by width."""
    kept: list[Tensor] = []
    handle = connector_of(lab.model).register_forward_hook(lambda m, args, out: kept.append(args[0] if at == "vision" else out))
    with torch.no_grad():
        lab.model(**lab.inputs(run))
    handle.remove()
    return kept[0][0]


@pytest.mark.parametrize("at", ["vision", "projector"])
@pytest.mark.parametrize(("block", "stride", "batch"), [(1, None, 8), (1, None, 1), (2, 1, 3), (3, 2, 8)])
def test_equals_one_whole_forward_per_block(
    tiny_random: Lab, run: Run, at: str, block: int, stride: int | None, batch: int
) -> None:
    rel = attribute(
        tiny_random, run, method="occlusion", at=at, fill="mean", target=TARGETS, block=block, stride=stride, batch=batch
    )
    mean = _seen_by(tiny_random, run, at).mean(0)
    whole = _naive(tiny_random, run, at, None)
    total, count = np.zeros((3, 4, 4)), np.zeros((4, 4))
    for y in sorted({*range(0, 4 - block + 1, stride or block), 4 - block}):
        for x in sorted({*range(0, 4 - block + 1, stride or block), 4 - block}):
            patches = [row * 4 + col for row in range(y, y + block) for col in range(x, x + block)]
            drop = whole - _naive(tiny_random, run, at, lambda states, gone=patches: states.__setitem__(gone, mean))  # type: ignore[misc]
            total[:, y : y + block, x : x + block] += drop[:, None, None]
            count[y : y + block, x : x + block] += 1
    close(rel.values, total / count, of=whole, terms=TERMS)
    assert rel.passes["forward"] == 1 + {1: 16, 2: 9, 3: 4}[block]
    close(rel.extras["score"], whole, terms=TERMS)


def test_equals_captum_s_feature_ablation(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="occlusion", at="projector", fill="grey", target=["answer", "blue"])
    with undisturbed(tiny_random.model):
        targets = (run.target(), run.target("blue"))
        level: Any = open_altered(tiny_random, run, targets, at="projector", fill="grey")
        patches = torch.arange(16).view(1, 1, 4, 4)
        found = FeatureAblation(level.read).attribute(level.values, baselines=level.filling("grey"), feature_mask=patches)
    close(rel.values, found[:, 0].numpy(), of=rel.extras["score"], terms=TERMS)


@pytest.mark.parametrize("at", ["vision", "projector"])
@pytest.mark.parametrize("fill", ["grey", "blur", "noise", "neighbours"])
def test_every_fill_changes_only_the_hidden_patches(tiny_random: Lab, run: Run, at: str, fill: str) -> None:
    rel = attribute(tiny_random, run, method="occlusion", at=at, fill=fill, target=TARGETS)
    with undisturbed(tiny_random.model):
        level: Any = open_altered(tiny_random, run, (run.target(),), at=at, fill=fill)
        hidden = torch.zeros(1, 4, 4, dtype=torch.bool)
        hidden[0, 2, 1] = True
        filled = level.altered((~hidden).float())[0].flatten(1).T  # patches by width
    own = _seen_by(tiny_random, run, at)
    assert not torch.allclose(filled[9], own[9])
    kept = [i for i in range(16) if i != 9]
    close(filled[kept], own[kept], terms=TERMS)
    whole = _naive(tiny_random, run, at, None)
    gone = _naive(tiny_random, run, at, lambda states: states.__setitem__(9, filled[9]))
    close(rel.values[:, 2, 1], whole - gone, of=whole, terms=TERMS)


def test_grey_tokens_are_what_the_model_makes_of_a_grey_picture(tiny_random: Lab, run: Run) -> None:
    with undisturbed(tiny_random.model):
        level: Any = open_altered(tiny_random, run, (run.target(),), at="projector", fill="grey")
        black: Any = open_altered(tiny_random, run, (run.target(),), at="pixels", fill="grey")
    inputs = {**tiny_random.inputs(run), "pixel_values": black.filling("grey")}
    kept: list[Tensor] = []
    handle = connector_of(tiny_random.model).register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        tiny_random.model(**inputs)
    handle.remove()
    close(level.filling("grey")[0].flatten(1).T, kept[0][0], terms=TERMS)


def test_most_positions_are_not_computed_again(tiny_random: Lab, run: Run) -> None:
    extras = attribute(tiny_random, run, method="occlusion", at="projector").extras
    assert extras["positions"] < 0.5 * extras["positions_of_full_passes"]


def test_576_tokens_from_one_id_give_the_numbers_of_whole_forwards(llava15_folder: Path) -> None:
    lab = load(str(llava15_folder))
    run = scripted_run(
        lab, np.random.default_rng(1).integers(0, 255, (90, 160, 3), dtype=np.uint8), "The car is blue.", fit="pad"
    )
    rel = attribute(lab, run, method="occlusion", at="projector", fill="noise", block=12, target=TARGETS)
    assert run.map.coverage()[:5].max() == 0  # padded above and below; a block that holds some of it is still tried
    with undisturbed(lab.model):
        altered: Any = open_altered(lab, run, (run.target(),), at="projector", fill="noise")
    tokens = altered.filling("noise")[0].flatten(1).T
    whole = _naive(lab, run, "projector", None)
    block = [row * 24 + col for row in range(12, 24) for col in range(12)]
    gone = _naive(lab, run, "projector", lambda states: states.__setitem__(block, tokens[block]))
    close(rel.values[:, 18, 0], whole - gone, of=whole, terms=TERMS)


@pytest.mark.parametrize("at", ["vision", "projector"])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_planted_cause_is_found_behind_the_tower(at: str, fit: str) -> None:
    lab = planted_lab()
    picture = red_picture(120, 80, (60, 10, 80, 30))
    run = scripted_run(lab, picture, "The car is red.", fit=fit)
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    for target in ("red", ("red", "blue")):
        values = attribute(lab, run, method="occlusion", at=at, target=target).values[0]
        assert covered.ravel()[values.argmax()] > 0.99 * covered.max()
        assert values[covered == 1].min() > values[covered == 0].max()


def test_ctrl_c_gives_the_finished_part_from_below(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"method": "occlusion", "at": "projector", "batch": 2}
    whole = attribute(tiny_random, run, **options)
    calls, forward = 0, tiny_random.model.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # the plain forward, the kept one, then three passes of two
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    before = _hooks(tiny_random)
    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, **options)
    close(part.values[0].ravel()[10:], whole.values[0].ravel()[10:], terms=TERMS)
    assert (part.values[0].ravel()[:10] == 0).all()
    assert "Interrupted after 6 of 16 blocks; patches not reached are 0." in part.notes
    calls = 3
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, **options)
    assert _hooks(tiny_random) == before


def test_a_mask_that_leaks_is_refused(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants packed into one pass that can see each other give numbers that look like numbers."""
    honest = Prefix._mask

    def leaking(self: Prefix, count: int, *args: Any) -> Tensor:
        mask = honest(self, count, *args)
        return torch.zeros_like(mask) if count > 1 else mask

    monkeypatch.setattr(Prefix, "_mask", leaking)
    with pytest.raises(LabError, match="same score with and without the kept keys and values.*use at='pixels'"):
        attribute(tiny_random, run, method="occlusion", at="projector")


def test_a_connector_that_mixes_patches_is_refused(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    part = connector_of(tiny_random.model)
    forward = part.forward
    monkeypatch.setattr(part, "forward", lambda states: forward(states + 3 * states.mean(1, keepdim=True)))
    with pytest.raises(LabError, match="treats each patch by itself.*use at='projector'"):
        attribute(tiny_random, run, method="occlusion", at="vision", fill="noise")
    assert np.isfinite(attribute(tiny_random, run, method="occlusion", at="projector").values).all()


def test_groups_share_a_beginning_and_stay_small() -> None:
    groups = grouped([100, 400, 410, 402, 300, 100], 420, 3)
    assert groups == [[2, 3, 1], [4], [0], [5]]
    assert grouped([5], 1000, 8) == [[0]]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_does_not_matter(tiny_random: Lab, run: Run, implementation: str) -> None:
    want = attribute(tiny_random, run, method="occlusion", at="projector")
    tiny_random.model.set_attn_implementation(implementation)
    try:
        got = attribute(tiny_random, run, method="occlusion", at="projector").values
    finally:
        tiny_random.model.set_attn_implementation("sdpa")
    close(got, want.values, of=want.extras["score"], terms=TERMS)


def test_bfloat16_gives_nearly_the_same_numbers() -> None:
    lab = planted_lab()
    run = scripted_run(lab, red_picture(96, 96, (12, 60, 36, 84)), "The car is red.")
    options: dict[str, Any] = {"method": "occlusion", "at": "projector", "block": 4, "target": ("red", "blue")}
    exact = attribute(lab, run, **options).values
    lab.model.to(torch.bfloat16)
    rough = attribute(lab, replace(run, fingerprint=lab.fingerprint), **options).values
    np.testing.assert_allclose(rough, exact, atol=0.03 * np.abs(exact).max())
