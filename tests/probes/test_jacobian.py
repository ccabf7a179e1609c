"""The Jacobian lens: known by hand for straight lines, by finite differences for a network; conserved, refused, undone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llava_lab.capture import hooked, undisturbed
from llava_lab.cli import main as cli
from llava_lab.errors import CheckpointError, DataError, OptionError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers
from llava_lab.probes import JacobianLens, fit_jacobian, jacobian, logit_lens, patch_labels
from llava_lab.probes.lens import lens_by_name
from llava_lab.results import NamingShare, Run
from llava_lab.worlds.picturebook import scene
from llava_lab.worlds.scenes import COLOR_NAMES
from tests.support.interrupts import interrupting
from tests.support.leftovers import state_of
from tests.support.logit_cases import grouped_lab
from tests.support.planted import scripted_run

WIDTH = 64


class StraightLayer(nn.Module):
    """h[t] -> A h[t] + B (h[0] + .. + h[t]): a layer whose derivative is the same everywhere."""

    def __init__(self, own: torch.Tensor, earlier: torch.Tensor) -> None:
        super().__init__()
        self.own, self.earlier = nn.Parameter(own), nn.Parameter(earlier)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states @ self.own.T + hidden_states.cumsum(1) @ self.earlier.T


def straight_lab(seed: int = 0) -> Lab:
    lab, generator = grouped_lab(), torch.Generator().manual_seed(seed)
    layers: Any = lab.model.model.language_model.layers
    for i in range(len(layers)):
        own, earlier = (torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH for _ in range(2))
        layers[i] = StraightLayer(own, earlier)
    lab.measure()
    return lab


def known(lab: Lab, run: Run, start: int, sources: range, targets: range) -> np.ndarray:
    """The sum over targets at or after each source, the mean over sources, of the product of all layers' derivatives.

    A layer is I x A + T x B, T the lower triangle of ones over positions; a product of such is a sum of T^k x M_k.
    """
    powers = [np.eye(WIDTH)]
    for layer in language_layers(lab.model)[start:]:
        own, earlier = (part.detach().double().numpy() for part in (layer.own, layer.earlier))
        powers = [sum(parts) for parts in zip([own @ m for m in powers] + [0], [0] + [earlier @ m for m in powers], strict=True)]
    triangle = np.tril(np.ones((len(run.token_ids),) * 2))
    counts = [np.linalg.matrix_power(triangle, k) for k in range(len(powers))]
    return sum(
        m * np.mean([sum(count[to, at] for to in targets) for at in sources]) for count, m in zip(counts, powers, strict=True)
    )


@pytest.fixture(scope="module")
def straight() -> tuple[Lab, Run]:
    lab = straight_lab()
    picture = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return lab, scripted_run(lab, picture, "It is red.")


@pytest.mark.parametrize("targets", ["later", "text"])
def test_the_lens_of_straight_layers_is_the_one_worked_out_by_hand(straight: tuple[Lab, Run], targets: str) -> None:
    lab, run = straight
    start, stop = run.segments["image"]
    text = range(stop, len(run.token_ids) - 1)
    reached = text if targets == "text" else range(start, len(run.token_ids) - 1)
    lens = fit_jacobian(lab, [run], targets=targets, rows=24, progress=False)  # 24 does not divide 64
    assert lens.states == (0, 1)
    for state in lens.states:
        for found, sources in ((lens.image, range(start, stop)), (lens.text, text)):
            truth = known(lab, run, state, sources, reached)
            np.testing.assert_allclose(found[state], truth, atol=2e-5 * np.abs(truth).max())
    # and it is not the derivative at the same position, nor that of all tokens of the prompt
    own = known(lab, run, 1, range(start, start + 1), range(start, start + 1))
    assert np.abs(lens.image[1] - own).max() > 0.1 * np.abs(lens.image[1]).max()


@contextmanager
def nudged(lab: Lab, state: int, positions: slice, by: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """`by` added to the stream before layer `state` at `positions`; the last state of each forward."""
    layers, last = language_layers(lab.model), []

    def push(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        stream = args[0].clone()
        stream[:, positions] += by
        return (stream, *args[1:]), kwargs

    keep = hooked(layers[-1], after=lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output))
    with undisturbed(lab.model), hooked(layers[state], before=push, with_kwargs=True), keep:
        yield last


def test_finite_differences_of_a_real_network_give_the_same_matrix(picture: np.ndarray) -> None:
    """All sources are pushed alike: what the targets move by in sum is the mean derivative times the number of sources."""
    lab = grouped_lab()
    lab.model.double()
    run = scripted_run(lab, picture, "It is red.")
    image = slice(*run.segments["image"])
    text = slice(image.stop, len(run.token_ids) - 1)
    lens = fit_jacobian(lab, [run], targets="later", progress=False)
    # norms are taken in float32 even here, so the step is no smaller
    toward, step = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).double(), 3e-3
    for state in lens.states:
        for matrix, sources in ((lens.image, image), (lens.text, text)):
            moved = []
            for sign in (1, -1):
                with nudged(lab, state, sources, sign * step * toward) as last:
                    lab.model(**lab.inputs(run), use_cache=False)
                moved.append(last[0][0, image.start : text.stop].sum(0))
            slope = ((moved[0] - moved[1]) / (2 * step)).numpy() / (sources.stop - sources.start)
            np.testing.assert_allclose(
                matrix[state] @ toward.numpy(), slope, rtol=2e-3, atol=2e-3 * np.abs(slope).max()
            )  # norms are taken in float32


def test_where_layers_add_nothing_the_lens_is_the_logit_lens(picture: np.ndarray) -> None:
    lab = grouped_lab()
    with torch.no_grad():
        for layer in language_layers(lab.model):
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.zero_()
                if part.bias is not None:
                    part.bias.zero_()
    lab.measure()
    run = scripted_run(lab, picture, "It is red.")
    lens = fit_jacobian(lab, [run], targets="later", progress=False)
    np.testing.assert_allclose(lens.image, np.broadcast_to(np.eye(WIDTH), lens.image.shape), atol=1e-6)
    plain, carried = logit_lens(lab, run), logit_lens(lab, run, fitted=lens)
    np.testing.assert_allclose(carried.top_probs, plain.top_probs, rtol=1e-4)
    assert (plain.lens, carried.lens) == ("logit", "jacobian")


@pytest.fixture(scope="module")
def runs(tiny_random: Lab) -> list[Run]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(3)]
    return [scripted_run(tiny_random, picture, "Yes, the car is blue.") for picture in pictures]


def test_later_effects_are_those_on_image_tokens_and_on_text_together(tiny_random: Lab, runs: list[Run]) -> None:
    later, text = (fit_jacobian(tiny_random, runs, targets=targets, progress=False) for targets in ("later", "text"))
    np.testing.assert_allclose(later.text, text.text, atol=1e-6)  # text has no image tokens behind it
    assert np.abs(later.image - text.image).max() > 0.1 * np.abs(later.image).max()
    each = [fit_jacobian(tiny_random, [run], targets="later", progress=False) for run in runs]
    np.testing.assert_allclose(later.image, np.mean([one.image for one in each], 0), atol=1e-6)
    assert np.isnan(each[0].agreement).all()
    halves = [each[0].image + each[2].image, each[1].image]
    cosine = (halves[0] * halves[1]).sum((1, 2)) / np.prod([np.linalg.norm(half, axis=(1, 2)) for half in halves], 0)
    np.testing.assert_allclose(later.agreement[0], cosine, rtol=1e-4)
    upper = fit_jacobian(tiny_random, runs, targets="later", layers=(2, 3), progress=False)
    np.testing.assert_allclose(upper.image[0], later.image[2], atol=1e-6)
    with pytest.raises(OptionError, match=r"fitted for states 2 to 2, got 0; read layers=\(2, \.\.\.\)"):
        logit_lens(tiny_random, runs[0], fitted=upper)
    assert logit_lens(tiny_random, runs[0], fitted=upper, layers=(2, 4)).states == (2, 3)


def test_the_last_state_is_read_as_it_is_and_the_file_gives_the_lens_back(
    tiny_random: Lab, runs: list[Run], tmp_path: Path
) -> None:
    lens = fit_jacobian(tiny_random, runs, progress=False)
    plain, carried = logit_lens(tiny_random, runs[0]), logit_lens(tiny_random, runs[0], fitted=lens)
    np.testing.assert_array_equal(plain.top_probs[-1], carried.top_probs[-1])
    assert np.abs(plain.top_probs[0] - carried.top_probs[0]).max() > 1e-4
    back = JacobianLens.load(lens.save(tmp_path / "lens.npz"))
    np.testing.assert_array_equal(back.image, lens.image)
    np.testing.assert_array_equal(logit_lens(tiny_random, runs[0], fitted=back).top_ids, carried.top_ids)
    assert back.table() == lens.table()
    assert len(lens.table().rows) == 3
    with pytest.raises(CheckpointError, match="this Jacobian lens was made for .* make it anew with `fit_jacobian`"):
        logit_lens(tiny_random, runs[0], fitted=replace(lens, fingerprint="other"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_even_when_stopped(
    tiny_random: Lab, runs: list[Run], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(tiny_random)

    def stop(*args: Any, **options: Any) -> None:
        raise error

    fit_jacobian(tiny_random, runs[:1], progress=False)
    assert state_of(tiny_random) == before
    monkeypatch.setattr(torch.autograd, "grad", stop)
    with pytest.raises(error):
        fit_jacobian(tiny_random, runs, progress=False)
    assert state_of(tiny_random) == before


def test_a_stopped_fit_is_the_mean_of_the_prompts_done(
    tiny_random: Lab, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit_jacobian(tiny_random, runs[:1], progress=False)
    monkeypatch.setattr(jacobian, "prompt_jacobian", interrupting(jacobian.prompt_jacobian, at=2))
    lens = fit_jacobian(tiny_random, runs, progress=False)
    assert (lens.interrupted, lens.prompts) == (True, 1)
    np.testing.assert_allclose(lens.image, whole.image, atol=1e-7)


def test_bad_input_is_refused_in_one_line(tiny_random: Lab, runs: list[Run]) -> None:
    with pytest.raises(OptionError, match="expected runs to fit a lens on, got none"):
        fit_jacobian(tiny_random, [])
    with pytest.raises(OptionError, match="targets must be one of 'text', 'later', got 'earlier'"):
        fit_jacobian(tiny_random, runs, targets="earlier")
    with pytest.raises(OptionError, match="layers must be a state from 0 .* to 2"):
        fit_jacobian(tiny_random, runs, layers=3)
    with pytest.raises(OptionError, match="rows must be a whole number of at least 1, got 0"):
        fit_jacobian(tiny_random, runs, rows=0)
    with pytest.raises(CheckpointError, match="ask again with this lab"):
        fit_jacobian(tiny_random, [replace(runs[0], fingerprint="other")])


def straight_through(lab: Lab) -> JacobianLens:
    """A lens that changes nothing."""
    same = np.tile(np.eye(256, dtype=np.float32), (6, 1, 1))
    agreement = np.ones((2, 6), np.float32)
    return JacobianLens(tuple(range(6)), same, same, agreement, "text", 6, 2, lab.name, lab.fingerprint, 0.1)


@pytest.mark.long
def test_the_command_reads_through_the_lens_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(straight_through(load("tiny")).save(tmp_path / "lens.npz"))
    shown = []
    for options in ([], ["--lens", file, "--save", str(tmp_path / "naming.npz")]):
        assert cli.main(["naming", "--n", "2", "--json", *options]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert [one["lens"] for one in shown] == ["logit", "jacobian"]
    assert shown[0]["shares"] == shown[1]["shares"]
    assert NamingShare.load(tmp_path / "naming.npz").lens == "jacobian"
    assert cli.main(["naming", "--n", "2", "--lens", "other"]) == 2
    assert "lens must be one of 'logit', 'tuned', 'jacobian', got 'other'" in capsys.readouterr().err


@pytest.mark.long
def test_a_lens_by_name_is_fitted_on_pictures_no_test_shows(tiny_random: Lab, outlined: Path) -> None:
    assert lens_by_name(tiny_random, "logit") is None
    lens = lens_by_name(tiny_random, "jacobian", prompts=1, progress=False)
    assert isinstance(lens, JacobianLens)
    run = tiny_random.ask(scene("train", 0).picture(), "What do you see?")
    np.testing.assert_allclose(lens.image, fit_jacobian(tiny_random, [run], progress=False).image, atol=1e-6)
    tuned = lens_by_name(tiny_random, "tuned", prompts=1, pictures=outlined, after=1, progress=False)
    assert tuned is not None
    assert tuned.KIND == "tuned lens"
    with pytest.raises(DataError, match="has 1 photographs behind the first 1; a lens on 2 needs more"):
        lens_by_name(tiny_random, "tuned", prompts=2, pictures=outlined, after=1)


@pytest.mark.long
def test_on_the_shipped_model_image_tokens_say_what_they_show_before_the_logit_lens_can_read_it() -> None:
    """One prompt about a picture of another split and two states are enough; the card has all of it."""
    lab = load("tiny")
    lens = fit_jacobian(lab, [lab.ask(scene("train", 0).picture(), "What do you see?")], layers=(4, 6), progress=False)
    shown = scene("test", 0)
    run = lab.ask(shown.picture(), "What do you see?", max_new_tokens=1)
    labels = patch_labels(lab, [shown], "color")[0].ravel()
    hits = []
    for fitted in (None, lens):
        read = logit_lens(lab, run, layers=(4, 6), fitted=fitted)
        said = [[read.at(4, *divmod(i, lab.grid[1])), COLOR_NAMES[labels[i]]] for i in np.flatnonzero(labels >= 0).tolist()]
        hits.append(np.mean([name in [text.strip().lower() for text, _ in words] for words, name in said]))
    assert hits[0] < 0.1
    assert hits[1] > 0.8
