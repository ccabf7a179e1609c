"""What every attribution method keeps to, whichever it is: one list of checks over `METHODS`.

A method added tomorrow is checked by these without a line of test; `test_a_method_added_as_the_readme_shows_conforms`
shows it. Each runs with its cheaper options (`Method.economy`) on one small random model. What a method's numbers are
is for the tests of its family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.attribution import METHODS, Maps, Method, attribute
from llava_lab.attribution.method import REGISTERED
from llava_lab.attribution.registry import FAMILIES
from llava_lab.errors import CheckpointError, LabError, OptionError, TargetError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers, used_vision_layers
from llava_lab.results import Relevance, Run
from tests.support.closeness import TERMS, close
from tests.support.endpoint_server import open_box, serving, weighing
from tests.support.families import family
from tests.support.leftovers import as_someone_who_trains_has_it, state_of
from tests.support.logit_cases import speaking_lab
from tests.support.next_folders import build_next
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

ANSWER = "Yes, the car is blue."


@dataclass
class Bench:
    """The small model, its run, and each method's first maps, made once."""

    lab: Any
    run: Run
    firsts: dict[str, Relevance] = field(default_factory=dict)

    def attribute(self, name: str, **options: Any) -> Relevance:
        return attribute(self.lab, self.run, method=name, **{**METHODS[name].economy, **options})

    def targets(self, name: str) -> list[Any]:
        """One of them a contrast, where the method, and the one it is made from, can tell it."""
        other = METHODS[name].options.get("of", name)
        return ["answer", "blue", ("blue", "green") if METHODS[name].contrast and METHODS[other].contrast else 0]

    def first(self, name: str) -> Relevance:
        """Three targets at once."""
        if name not in self.firsts:
            self.firsts[name] = self.attribute(name, target=self.targets(name))
        return self.firsts[name]


@pytest.fixture(scope="module")
def bench(tiny_random: Lab) -> Bench:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return Bench(tiny_random, scripted_run(tiny_random, wide, ANSWER))


SHIPPED = tuple(METHODS)


# -- the checks -----------------------------------------------------------------------------


def says_what_it_is(bench: Bench, name: str) -> None:
    entry = METHODS[name]
    assert entry.name == name
    assert all((entry.truth, entry.source, entry.cost, entry.blind_to))
    if name in SHIPPED:  # one that is added need not have a paper
        assert entry.control or (entry.equation and entry.paper.startswith("https://"))
    assert entry.equation.count("{") == entry.equation.count("}")
    assert "|" not in entry.equation  # it stands in tables
    assert entry.truth.endswith(".")
    assert entry.reach in ("pixels", "tokens", "inside")
    assert entry.with_defaults({}) == dict(entry.options)
    for other in (entry.economy, entry.mass or {}, entry.streams or {}):
        assert entry.with_defaults(other).keys() == entry.options.keys()


def gives_a_map_for_each_target(bench: Bench, name: str) -> None:
    rel = bench.first(name)
    assert rel.values.shape == (3, 4, 4)
    assert rel.values.dtype == np.float32
    assert np.isfinite(rel.values).all()
    assert np.ptp(rel.values, (1, 2)).min() > 0, "a map that is the same everywhere says nothing"
    assert rel.method == name
    assert set(rel.options) == set(METHODS[name].options)
    assert rel.notes
    assert rel.control == METHODS[name].control
    assert any("a control" in note for note in rel.notes) == rel.control
    if METHODS[name].mass is not None:
        assert all(set(mass) == set(bench.run.segments) for mass in rel.extras["mass"])


def shares_its_passes_among_targets(bench: Bench, name: str) -> None:
    together = bench.first(name)
    alone = bench.attribute(name, target="blue")
    if "order" in together.extras:  # a search of its own for each target; what they have in common is shared
        assert alone.passes["forward"] <= together.passes["forward"] < 3 * alone.passes["forward"]
    else:
        assert alone.passes == together.passes
    if not METHODS[name].control or name == "vision":  # a control may draw a new map for each target
        close(alone.values[0], together.values[1], of=bench.run.logprobs.sum(), terms=TERMS)


def repeats_itself_and_leaves_nothing_behind(bench: Bench, name: str) -> None:
    first, model = bench.first(name), bench.lab.model
    with as_someone_who_trains_has_it(bench.lab):
        before = state_of(bench.lab)
        again = bench.attribute(name, target=bench.targets(name))
        assert state_of(bench.lab) == before
    np.testing.assert_array_equal(again.values, first.values)
    assert (again.passes, again.extras) == (first.passes, first.extras)
    assert model.training is False


def leaves_nothing_behind_when_stopped(bench: Bench, name: str) -> None:
    """Half-way through a forward, after some layers were seen."""
    if not bench.first(name).passes["forward"]:
        return
    parts = [language_layers(bench.lab.model)[-1].mlp, used_vision_layers(bench.lab.model)[-1].mlp]
    for kind in (RuntimeError, KeyboardInterrupt):
        stopped = False
        for part in parts:  # the tower's only where the language model does not run
            with as_someone_who_trains_has_it(bench.lab), pytest.MonkeyPatch.context() as patch:
                before = state_of(bench.lab)
                patch.setattr(part, "forward", lambda *args, kind=kind: (_ for _ in ()).throw(kind("stop")))
                try:
                    bench.attribute(name)
                except (RuntimeError, KeyboardInterrupt):
                    stopped = True
                patch.undo()
                assert state_of(bench.lab) == before
            if stopped:
                break
        assert stopped, "before anything is finished an interrupt is raised"


def keeps_what_is_done_when_interrupted(bench: Bench, name: str) -> None:
    """Ctrl-C at the model's last forward: what came before is given back and says so, or there was nothing to give."""
    model, calls, last = bench.lab.model, 0, 0
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", counted)
        whole = bench.attribute(name, target="blue")
        last, calls = calls, 0
        if last < 2:
            return
        try:
            part = bench.attribute(name, target="blue")
        except KeyboardInterrupt:
            return
    assert not whole.interrupted
    assert part.interrupted
    assert any(note.startswith("Interrupted after") for note in part.notes)
    assert part.passes["forward"] < whole.passes["forward"]
    assert np.isfinite(part.values).all()


def refuses_what_is_not_among_its_options(bench: Bench, name: str) -> None:
    entry = METHODS[name]
    listed = ", ".join(f"{option}={default!r}" for option, default in entry.options.items()) or "none"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.lab.model, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
        patch.setattr(bench.lab.model.model.vision_tower, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
        with pytest.raises(OptionError) as error:
            bench.attribute(name, size_of_nothing=1)
        assert str(error.value) == f"method {name!r} has no option 'size_of_nothing'; its options are {listed}"
        for option in entry.options:
            with pytest.raises(OptionError) as error:
                bench.attribute(name, **{option: object()})
            text = str(error.value)
            assert text.startswith(option) or option in text
            assert "\n" not in text


def refuses_a_run_by_other_weights(bench: Bench, name: str) -> None:
    with pytest.raises(CheckpointError, match="other weights; ask again"):
        attribute(bench.lab, replace(bench.run, fingerprint="0" * 16), method=name)


def refuses_a_contrast_it_cannot_tell(bench: Bench, name: str) -> None:
    if METHODS[name].contrast:
        return
    with pytest.raises(TargetError, match=f"method {name!r} cannot tell 'blue, not green': attention is the same for every word"):
        bench.attribute(name, target=("blue", "green"))


def refuses_weights_it_cannot_use(bench: Bench, name: str) -> None:
    needs, model = METHODS[name].needs, bench.lab.model
    if needs in (None, "tower attention"):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
        patch.setattr(model, "is_quantized", True, raising=False)
        with pytest.raises(OptionError, match=f"method {name!r} needs {needs}, and .*packed into 8 or 4 bits.*'occlusion'"):
            bench.attribute(name)


def refuses_numbers_that_are_not_finite(bench: Bench, name: str) -> None:
    if not bench.first(name).passes["forward"]:
        return  # it never looks at the model
    places = bench.lab.model.model.vision_tower, language_layers(bench.lab.model)[1]
    for part in places[: 1 if name == "vision" else 2]:
        weight = next(part.parameters())
        kept = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.view(-1)[0] = torch.nan
            run = replace(bench.run, fingerprint=bench.lab.fingerprint)
            with pytest.raises(LabError, match=r"^expected finite \S.*, got NaN or infinity in ") as error:
                attribute(bench.lab, run, method=name, target="blue", **METHODS[name].economy)
            assert "\n" not in str(error.value)
        finally:
            with torch.no_grad():
                weight.copy_(kept)


def comes_back_from_its_file(bench: Bench, name: str, folder: Path) -> None:
    rel = bench.first(name)
    back = Relevance.load(rel.save(folder / f"{name}.npz"))
    np.testing.assert_array_equal(back.values, rel.values)
    for part in ("method", "targets", "options", "map", "model", "fingerprint", "passes", "notes", "extras", "control"):
        assert getattr(back, part) == getattr(rel, part), part


CHECKS: tuple[Callable[..., None], ...] = (
    says_what_it_is,
    gives_a_map_for_each_target,
    shares_its_passes_among_targets,
    repeats_itself_and_leaves_nothing_behind,
    leaves_nothing_behind_when_stopped,
    keeps_what_is_done_when_interrupted,
    refuses_what_is_not_among_its_options,
    refuses_a_run_by_other_weights,
    refuses_a_contrast_it_cannot_tell,
    refuses_weights_it_cannot_use,
    refuses_numbers_that_are_not_finite,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_a_method(bench: Bench, name: str, check: Callable[[Bench, str], None]) -> None:
    check(bench, name)


@pytest.mark.parametrize("name", METHODS)
def test_a_map_comes_back_from_its_file(bench: Bench, name: str, tmp_path: Path) -> None:
    comes_back_from_its_file(bench, name, tmp_path)


# -- a method nobody wrote a test for -------------------------------------------------------


@pytest.fixture
def added() -> Iterator[str]:
    """The file of the README and of lesson 02, executed as it is written."""
    before = set(REGISTERED)
    path = Path(__file__).with_name("added_method.py")
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "added_method"})
    (name,) = set(REGISTERED) - before
    yield name
    del REGISTERED[name]


def test_a_method_added_as_the_readme_shows_conforms(bench: Bench, added: str, tmp_path: Path) -> None:
    assert added in METHODS
    for check in CHECKS:
        check(bench, added)
    comes_back_from_its_file(bench, added, tmp_path)
    with pytest.raises(OptionError, match="fusion must be one of 'mean', 'max', 'min', got 'sum'"):
        bench.attribute(added, fusion="sum")


def test_a_method_that_does_not_conform_is_found_out(bench: Bench) -> None:
    """The checks can fail: a hook left behind, a map that is nowhere finite."""
    entry: Method = METHODS["center"]

    def leaky(lab: Lab, run: Run, targets: Any) -> Maps:
        lab.model.lm_head.register_forward_hook(lambda *args: None)
        return entry.function(lab, run, targets)

    def empty(lab: Lab, run: Run, targets: Any) -> Maps:
        return Maps(entry.function(lab, run, targets).values * np.nan, {})

    try:
        REGISTERED["leaky"] = replace(entry, name="leaky", function=leaky)
        with pytest.raises(AssertionError):
            repeats_itself_and_leaves_nothing_behind(bench, "leaky")
        REGISTERED["empty"] = replace(entry, name="empty", function=empty)
        with pytest.raises(LabError, match="expected finite values of method 'empty'"):
            gives_a_map_for_each_target(bench, "empty")
    finally:
        REGISTERED.pop("leaky"), REGISTERED.pop("empty", None)
        bench.lab.model.lm_head._forward_hooks.clear()


# -- where a method can run -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Run]:
    lab = load(str(build_next(tmp_path_factory.mktemp("tiled") / "next")))
    picture = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    return lab, lab.ask(picture, "What color is the car?", max_new_tokens=2)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_works_on_tiles_where_its_card_says_so(tiled: tuple[Any, Run], name: str) -> None:
    lab, run = tiled
    options = {"regions": 4} if "regions" in METHODS[name].options else {}
    if METHODS[name].reach == "inside":
        with pytest.raises(OptionError, match="whole and in tiles"):
            attribute(lab, run, method=name, **METHODS[name].economy)
        return
    rel = attribute(lab, run, method=name, **{**METHODS[name].economy, **options})
    assert rel.values.shape == (1, run.map.rows, run.map.cols)
    assert any("seen as" in note for note in rel.notes)


def test_a_method_works_on_a_closed_model_where_its_card_says_so(tmp_path: Path) -> None:
    plain = np.full((36, 36, 3), (220, 30, 30), np.uint8)
    weights = np.array([[0.0, 1.0], [0.5, 3.0]])
    with serving(weighing(weights, plain)) as server:
        box = open_box(server, tmp_path, grid=(2, 2))
        run = box.ask(plain, "What is it?")
        for name, entry in METHODS.items():
            if entry.reach == "pixels":
                small = {"block": 1, "stride": None, "masks": 8, "regions": 4, "samples": 12}
                options = {option: value for option, value in small.items() if option in entry.options}
                rel = attribute(box, run, method=name, target="red", **options)
                assert rel.values.shape == (1, 2, 2)
            else:
                with pytest.raises(OptionError, match=f"method {name!r} looks inside the model, which is closed"):
                    attribute(box, run, method=name)


# -- a cause that was planted ---------------------------------------------------------------

# What lights up where the only red square is, and with which options. On "speaking" image tokens themselves ask for "red".
DECIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("planted", {}),
    "value_attention": ("planted", {}),
    "localization_heads": ("planted", {}),
    "rollout": ("planted", {}),
    "attention_flow": ("planted", {}),
    "occlusion": ("planted", {}),
    "occlusion_coarse": ("planted", {"keep": 4}),
    "token_knockout": ("planted", {}),
    "gradient_input": ("planted", {"fill": "grey"}),
    "integrated_gradients": ("planted", {"steps": 4}),
    "smoothgrad": ("planted", {"noise": 0.01}),
    "relevancy": ("planted", {}),
    "direct_logit": ("planted", {}),
    "tam": ("speaking", {"filter": None}),
    "logit_lens_map": ("speaking", {}),
}
FITS = ("pad", "crop")


@pytest.fixture(scope="module")
def labs() -> dict[str, Lab]:
    return {"planted": planted_lab(), "speaking": speaking_lab()}


@family("fit", FITS, quick=("crop",))
@pytest.mark.parametrize(("width", "height", "box"), [(120, 80, (60, 10, 80, 30)), (80, 120, (10, 60, 30, 80))])
@pytest.mark.parametrize("name", DECIDING)
def test_the_red_square_lights_up_where_it_is(
    labs: dict[str, Lab], name: str, width: int, height: int, box: tuple[int, int, int, int], fit: str
) -> None:
    which, options = DECIDING[name]
    picture = red_picture(width, height, box)
    run = scripted_run(labs[which], picture, "The car is red.", fit=fit)
    rel = attribute(labs[which], run, method=name, target="red", **options)
    red = (picture == np.array(RED)).all(-1)
    painted = rel.on_picture()
    y, x = np.unravel_index(np.nanargmax(painted), painted.shape)
    assert red[y, x], f"brightest at ({x}, {y}), the red square is {box}"
    if fit == "crop":
        assert np.isnan(painted).any(), "what the crop left out must stay unpainted"


# -- other sizes and types, once for each family --------------------------------------------

LEADERS = [
    next(name for name, entry in METHODS.items() if entry.function.__module__ == family.__name__)
    for family in FAMILIES
]  # fmt: skip


@pytest.fixture(scope="module")
def big(llava15_folder: Path) -> tuple[Lab, Run]:
    lab = load(str(llava15_folder))
    picture = np.random.default_rng(3).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    return lab, scripted_run(lab, picture, "The car is blue.")


@family("name", LEADERS, quick=4)
def test_576_image_tokens_take_the_same_path(big: tuple[Lab, Run], name: str) -> None:
    lab, run = big
    larger = {"block": 6, "stride": 6} if name == "occlusion" else {"orders": 1, "regions": 4} if name == "shapley" else {}
    rel = attribute(lab, run, method=name, target=0, **larger)
    assert rel.values.shape == (1, 24, 24)
    assert np.isfinite(rel.values).all()
    assert np.ptp(rel.values) > 0


# a log-probability in bfloat16 does not resolve what one of several red patches does to it
@pytest.mark.parametrize("name", [name for name in LEADERS if name in DECIDING and METHODS[name].reach != "pixels"])
def test_bfloat16_weights_find_the_same_patch(labs: dict[str, Lab], name: str) -> None:
    which, options = DECIDING[name]
    lab, picture = labs[which], red_picture(96, 96, (12, 60, 36, 84))
    before = {part: value.clone() for part, value in lab.model.state_dict().items()}
    lab.model.to(torch.bfloat16)
    try:
        run = scripted_run(lab, picture, "The car is red.")
        rel = attribute(lab, run, method=name, target="red", **options)
    finally:
        lab.model.to(torch.float32).load_state_dict(before)
    assert rel.values.dtype == np.float32
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    assert covered.ravel()[rel.values[0].argmax()] > 0.99
