"""`train_photo` on a little language model: three stages, what is written is what was trained, a stopped run goes on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from llava_lab.cli import main as cli
from llava_lab.errors import DataError, OptionError
from llava_lab.models import layout
from llava_lab.models.formats import photo, smol
from llava_lab.training import loop
from llava_lab.training.photo import make
from llava_lab.training.photo.make import PHOTO, PhotoData, train_photo
from llava_lab.training.smol.batches import Chat
from llava_lab.worlds.photo_names import Photo, Thing, classes, read_photos
from tests.support.little_language import llama, write_gguf

RECIPE = replace(
    PHOTO,
    rank=2,
    words=replace(PHOTO.words, steps=30, batch=256),
    align=replace(PHOTO.align, steps=2, batch=2),
    instruct=replace(PHOTO.instruct, steps=3, batch=2),
)
TEXTS = [[9, 30, 12, 55, 7, 2]] * 3


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """A connector as narrow as the little language model; at its own width the few steps here end before Muon finds its way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo, "HIDDEN", 64)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat", "banjo", "pizza", "school_bus", "golden_retriever"):
        noise = rng.integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC).save(root / f"{name}_1.png")
    return root


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(llama(), folder / "little.gguf")
    return smol.language_folder(folder / "little.gguf", cache=folder / "cache")


@pytest.fixture(scope="module")
def run(language: Path, pictures: Path) -> Any:
    def go(out: Path, **options: Any) -> Path:
        return train_photo(pictures, out, **{"recipe": RECIPE, "parts": {"language": language}, "texts": TEXTS, **options})

    train = loop.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "POOL", 8)
        patch.setattr(make, "CHECKED", 8)
        patch.setattr(make, "TEXT_EVERY", 2)
        patch.setattr(loop, "train", lambda *args, **options: train(*args, **{**options, "workers": 0}))
        yield go


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "photo")


@pytest.mark.long
def test_the_first_stage_learns_what_the_tower_would_call_each_patch(whole: Path) -> None:
    losses = torch.load(whole.parent / "words.pt", weights_only=True)["losses"]
    knows_nothing = 1 + make.NAMED * math.log(1000)
    assert losses[0] < 0.7 * knows_nothing  # it starts from a closed form
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.long
def test_what_is_written_loads_and_holds_no_part_of_the_packages(whole: Path, language: Path) -> None:
    tensors = load_file(whole / "photo.safetensors")
    assert all(name.startswith(("connector.", "lora.")) for name in tensors)
    assert any(value.abs().sum() > 0 for name, value in tensors.items() if name.endswith(".up"))
    model, _ = photo.load_photo(torch.float32, whole, language=language)
    state = torch.load(whole.parent / "instruct.pt", weights_only=True)["modules"]["connector"]
    for name, value in layout.connector_of(model).state_dict().items():
        assert torch.equal(value, state[name].to(torch.bfloat16).float())


@pytest.mark.long
def test_a_run_stopped_in_any_stage_goes_on_to_the_same_bits(
    run: Callable[..., Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = PhotoData.__getitem__, []
    monkeypatch.setattr("llava_lab.training.loop.SAVE_EVERY", 0.0)

    def stops(self: PhotoData, step: int) -> Any:
        now = self.stage.name, step
        if now in (("align", 1), ("instruct", 2)) and now not in taken:
            taken.append(now)
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(PhotoData, "__getitem__", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "photo", resume=True)
    found = load_file(run(tmp_path / "photo", resume=True) / "photo.safetensors")
    assert len(taken) == 2
    assert all(torch.equal(value, found[name]) for name, value in load_file(whole / "photo.safetensors").items())


def test_some_patches_stand_where_all_of_them_will(language: Path, pictures: Path) -> None:
    """With 36 of 144 passed on, a patch's position and the text's are those they have when the whole picture is asked about."""
    _, processor = photo.assemble(language=language)
    rows = [[[("what", "a cat")]], [[("what", "a cat")], [("is it", "yes"), ("why", "so")]]]
    squares = np.zeros((2, 8, 8, 3), np.uint8)
    every = Chat(processor.tokenizer, 144).batch(rows, squares)
    places = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(144)[:36]))
    some = Chat(processor.tokenizer, 36)
    found = make.spread_out(some.batch(rows, squares), places, 144, some.image_id)
    for row in range(2):
        image = every.ids[row] == some.image_id
        kept = ~image
        kept[image.nonzero()[:, 0][places]] = True
        kept &= every.block[row] >= 0
        there = found.block[row] >= 0
        assert torch.equal(found.ids[row][there], every.ids[row][kept])
        assert torch.equal(found.position[row][there], every.position[row][kept])


def test_pictures_are_squared_as_the_processor_squares_them() -> None:
    from llava_lab.models.pictures import Preprocessing

    noise = np.random.default_rng(1).integers(0, 255, (5, 9, 3), np.uint8)
    picture = Image.fromarray(noise).resize((270, 150), Image.Resampling.BICUBIC)
    wanted = Preprocessing.of(photo.image_processor(), image_size=photo.SIDE, patch=32, grid=(12, 12)).pixels(
        np.asarray(picture), None
    )[0]
    square = torch.from_numpy(make.to_square(picture).copy()).permute(2, 0, 1).float()
    assert ((square - 127) / 128 - wanted).abs().max() < 2 / 128


def test_how_many_patches_are_passed_on_says_nothing_of_what_is_shown(
    language: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where lone photographs alone came with few patches, a whole one was described as a collage."""
    _, processor = photo.assemble(language=language)
    forms: list[str] = []
    real = make.draw_scene

    def draws(*args: Any, **options: Any) -> Any:
        scene = real(*args, **options)
        forms.append("alone" if options.get("form") == "alone" else "scene")
        return scene

    monkeypatch.setattr(make, "draw_scene", draws)
    data = PhotoData(Chat(processor.tokenizer, 144), read_photos(pictures), stage=RECIPE.instruct, number=2, seed=0)
    found: Counter[tuple[str, int]] = Counter()
    for step in range(8):
        forms.clear()
        batch = data[step]
        assert isinstance(batch, make.PhotoBatch)
        assert len(set(forms)) == 1
        places = torch.arange(144) if batch.shown is None else batch.shown
        assert (batch.ids[0] == data.form.image_id).sum() == len(places) == len(places.unique())
        found[forms[0], len(places)] += 1
    assert found == {(form, count): 2 if count == 36 else 1 for form in ("alone", "scene") for count in (36, 72, 144)}


def test_a_share_of_a_picture_s_features_is_hidden_and_its_places_never(language: Path, pictures: Path) -> None:
    _, processor = photo.assemble(language=language)
    data = PhotoData(Chat(processor.tokenizer, 144), read_photos(pictures), stage=RECIPE.instruct, number=2, seed=0)
    kept, later = (getattr(data[step], "kept", None) for step in (0, 4))
    assert kept is not None
    assert later is not None
    assert kept.shape == (8, 1, 1296)
    assert kept.unique().tolist() == pytest.approx([0.0, 1.0, 1.25])
    assert (kept[..., 1280:] == 1).all()
    assert 0.18 < (kept[..., :1280] == 0).float().mean() < 0.22
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept, later)


@pytest.fixture(scope="module")
def assembled(language: Path) -> Any:
    return photo.assemble(language=language)


def _patches(assembled: Any, batch: int) -> make.Patches:
    model, processor = assembled
    pool = torch.randn(500, 1296, generator=torch.Generator().manual_seed(3)).abs().to(torch.bfloat16)
    words, places = make.class_embeddings(model, processor.tokenizer), make.place_directions(model, processor.tokenizer)
    return make.Patches(model, pool, words, places, batch=batch, seed=0)


def test_patches_are_mixed_and_moved_and_wanted_is_what_the_classifier_then_says(assembled: Any) -> None:
    tower, patches = layout.vision_tower(assembled[0]), _patches(assembled, 400)
    features, wanted, likely = patches[0]
    pool, head = patches.pool.float(), 1280
    rows = np.random.default_rng((0, 48, 0)).integers(500, size=(2, 400))
    own, other = pool[rows[0]], pool[rows[1]]
    assert torch.equal(features[:, head:], own[:, head:])  # where a patch lies stays
    changed = (features[:, :head] != own[:, :head]).float().mean(1)
    assert 0.15 < (changed == 0).float().mean() < 0.35  # a quarter neither mixed nor moved
    mixed = ((features == own) | (features == other))[:, :head].all(1)
    assert 0.4 < mixed.float().mean() < 0.6
    steps = (features - own)[:, :head][~mixed & (changed == 1)]
    alone = [step for step in steps if (step / step.norm() @ patches.towards.T).max() > 0.999]
    assert len(alone) > 40
    assert max(float(step.norm()) for step in alone) < make.MOVED
    torch.testing.assert_close(likely, (make.SHARP * tower.classes(features)).softmax(-1))
    said = likely @ patches.embeddings
    mean = patches.embeddings.mean(0)
    expected = mean + make.STRETCH * (said - mean) + features[:, list(make.AXES)] * torch.tensor(make.PLACE) @ patches.directions
    torch.testing.assert_close(wanted, expected)
    assert torch.equal(patches[0][0], features)
    assert not torch.equal(patches[1][0], features)


def test_a_hidden_unit_starts_with_the_rows_of_classes_alike(assembled: Any) -> None:
    model, _ = assembled
    tower, patches = layout.vision_tower(model), _patches(assembled, 8)
    connector = layout.connector_of(model)
    kept = {name: value.clone() for name, value in connector.state_dict().items()}
    some = patches.pool.float()
    make.start_at_classes(connector, tower, patches.embeddings, some)
    layer = connector.linear_1
    units = layer.out_features - 16
    found = layer(some)
    assert torch.equal(found[:, units:], some[:, 1280:])  # a patch's place
    answering = (found[:, :units] > 0).float().mean(0)
    assert answering.tolist() == pytest.approx([0.05] * units, abs=0.011)
    said = tower.classes(some)
    for unit in range(units):  # each is the mean of the classes that are its own
        share = torch.linalg.lstsq(tower.head.weight.T, layer.weight[unit, :1280, None]).solution[:, 0]
        own = share > 1e-4
        assert share[own].tolist() == pytest.approx([1 / int(own.sum())] * int(own.sum()), abs=1e-3)
        assert np.corrcoef(said[:, own].mean(1).detach().numpy(), found[:, unit].detach().numpy())[0, 1] > 0.999
    connector.load_state_dict(kept)


def test_where_there_is_room_every_class_has_a_unit_of_its_own(language: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo, "HIDDEN", 1024)
        model, processor = photo.assemble(language=language)
    tower, patches = layout.vision_tower(model), _patches((model, processor), 8)
    layer = layout.connector_of(model).linear_1
    drawn = layer.weight[1000:1008].clone()
    make.start_at_classes(layout.connector_of(model), tower, patches.embeddings, patches.pool.float())
    angle = torch.nn.functional.normalize(layer.weight[:1000, :1280]) @ torch.nn.functional.normalize(tower.head.weight).T
    assert sorted(angle.argmax(1).tolist()) == list(range(1000))
    assert angle.max(1).values.min() > 0.9999
    assert torch.equal(layer.weight[1000:1008], drawn)  # what is left over stays as drawn


def test_every_step_of_the_later_stages_reads_patches_too(assembled: Any, pictures: Path) -> None:
    model, processor = assembled
    data = PhotoData(Chat(processor.tokenizer, 144), read_photos(pictures), stage=RECIPE.instruct, number=2, seed=0)
    data.texts, data.patches = TEXTS, _patches(assembled, 8)
    connector = layout.connector_of(model).requires_grad_(True)
    batch, text = data[0], data[make.TEXT_EVERY - 1]
    assert isinstance(batch, make.PhotoBatch)
    assert batch.patches is not None
    given = torch.zeros((), requires_grad=True)
    words = partial(make.words_loss, connector, spread=torch.tensor(2.0))
    alone, _ = words(batch.patches)
    both, facts = make.anchored(lambda batch: (given + 1, {"tokens": 3}), words, batch)
    torch.testing.assert_close(both, alone + 1)
    assert facts == {"tokens": 3, "words": pytest.approx(alone.item(), abs=1e-5)}
    both.backward()
    assert connector.linear_1.weight.grad.abs().sum() > 0
    connector.requires_grad_(False).zero_grad()
    assert make.anchored(lambda batch: (given, {}), words, text) == (given, {})


def test_names_are_told_by_angle_and_not_by_place(assembled: Any) -> None:
    """A token at a class's name, however far it goes and wherever it lies, names that class; by hand for one pair."""
    patches = _patches(assembled, 8)
    embeddings, places = patches.embeddings, patches.directions
    names, mean = make.Names(embeddings, places), embeddings.mean(0)
    own = torch.tensor([3, 500, 998])
    tokens = mean + 3 * (embeddings[own] - mean) + torch.tensor([[4.0, 0], [0, -4], [2, 2]]) @ places
    logits = names(tokens)
    assert logits.shape == (3, 1000)
    assert logits.argmax(1).tolist() == own.tolist()
    torch.testing.assert_close(logits, names(embeddings[own]))

    def bare(token: Tensor) -> Tensor:
        token = token - mean
        return token - places.T @ torch.linalg.lstsq(places.T, token[:, None]).solution[:, 0]

    angle = torch.cosine_similarity(bare(embeddings[3]), bare(embeddings[7]), dim=0)
    torch.testing.assert_close(logits[0, 7], angle / make.ANGLE, atol=1e-3, rtol=1e-3)


def test_adapters_are_cut_where_it_matters_least(caplog: pytest.LogCaptureFixture) -> None:
    """One layer's change is of rank 2 and large, the other's of rank 1 and small; by hand."""
    draw = torch.Generator().manual_seed(0)
    lora, wanted = nn.ModuleDict(), {}
    for name, given in (("large", (5.0, 4.0, 0.1)), ("small", (1.0, 0.01, 0.001))):
        up, down = (torch.linalg.qr(torch.randn(width, 3, generator=draw)).Q for width in (6, 10))
        turn = torch.randn(3, 3, generator=draw)  # the same product in other factors
        pair = nn.ModuleDict({"down": nn.Linear(10, 3, bias=False), "up": nn.Linear(3, 6, bias=False)}).requires_grad_(False)
        pair["up"].weight.copy_(up * torch.tensor(given) @ turn)
        pair["down"].weight.copy_(torch.linalg.inv(turn) @ down.T)
        lora[name], wanted[name] = pair, (up, torch.tensor(given), down)

    def change(pair: Any) -> Tensor:
        return pair["up"].weight @ pair["down"].weight

    for room, ranks in ((6 * 16, (3, 3)), (5 * 16 + 15, (3, 2)), (3 * 16, (2, 1)), (2 * 16, (1, 1)), (0, (1, 1))):
        caplog.clear()
        with caplog.at_level("INFO", logger=make.__name__):
            cut: Any = make.trimmed(lora, room)
        squares = [
            (sizes[:rank].square().sum(), sizes.square().sum())
            for (_, sizes, _), rank in zip(wanted.values(), ranks, strict=True)
        ]
        share = sum(some for some, _ in squares) / sum(every for _, every in squares)
        assert f"{sum(ranks)} of the adapters' 6 components, {100 * share:.1f}%" in caplog.text
        for (name, (up, sizes, down)), rank in zip(wanted.items(), ranks, strict=True):
            assert cut[name]["up"].weight.shape == (6, rank)
            assert cut[name]["down"].weight.shape == (rank, 10)
            torch.testing.assert_close(change(cut[name]), (up[:, :rank] * sizes[:rank]) @ down[:, :rank].T, atol=2e-5, rtol=1e-4)


def test_naming_the_right_class_lowers_the_loss_of_words(assembled: Any) -> None:
    patches = _patches(assembled, 8)
    embeddings = patches.embeddings
    names = make.Names(embeddings, patches.directions)
    likely, zeros = torch.eye(1000)[:4], torch.zeros(4, 1)

    def loss(classes: list[int], **options: Any) -> float:
        said = embeddings[classes]
        connector: Any = lambda features: said[None]
        return float(make.words_loss(connector, (zeros, said, likely), spread=torch.tensor(1.0), **options)[0])

    assert loss([0, 1, 2, 3]) == loss([5, 6, 7, 8]) == 0
    assert loss([0, 1, 2, 3], names=names) < loss([0, 1, 2, 8], names=names) < loss([5, 6, 7, 8], names=names)
    cross = -names(embeddings[:4]).log_softmax(-1).diagonal().mean()
    assert loss([0, 1, 2, 3], names=names) == pytest.approx(make.NAMED * float(cross), rel=1e-5)


@pytest.mark.long
def test_cuts_are_named_as_the_tower_names_them_and_kept(language: Path, pictures: Path, tmp_path: Path) -> None:
    model, _ = photo.assemble(language=language)
    model.requires_grad_(False)
    photos, names = read_photos(pictures), [thing for thing, _ in classes().values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "SURE", 0.0)
        found = make.cuts(model, photos, tmp_path / "cuts.json", seed=0)
    assert len(found) == make.CUTS * len(photos)
    for cut in found[::5]:
        left, top, right, bottom = cut.box
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert 0.09 < (right - left) * (bottom - top) < 0.51
        with Image.open(cut.path) as file:
            picture = file.convert("RGB")
        wide, high = picture.size
        part = picture.crop((round(left * wide), round(top * high), round(right * wide), round(bottom * high)))
        features = make.seen(model, torch.from_numpy(make.to_square(part)[None].copy()))
        assert names[int(layout.vision_tower(model).classes(features).mean(1).argmax())] == cut.thing
    assert make.cuts(model, photos, tmp_path / "cuts.json", seed=0) == found  # read: made again, none would be sure enough
    cat = [photo for photo in photos if photo.path.name == "cat_1.png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "SURE", 0.0)
        alone = make.cuts(model, cat, tmp_path / "cat.json", seed=0)
    whole = (tmp_path / "cat.json").read_text()
    for damaged in (
        whole[:-9],
        "[]",
        "null",
        '{"photographs": 1}',
        whole.replace("cat_1.png", "dog_1.png"),
        whole.replace("n0", "x0"),
    ):
        (tmp_path / "cat.json").write_text(damaged)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(make, "SURE", 0.0)
            assert make.cuts(model, cat, tmp_path / "cat.json", seed=0) == alone
        assert (tmp_path / "cat.json").read_text() == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "SURE", 1.1)
        assert make.cuts(model, cat, tmp_path / "none.json", seed=0) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stages": ["tower"]}, OptionError, "stages are words, align, instruct"),
        ({"steps_scale": 0}, OptionError, "steps_scale must be above 0"),
        ({"stages": ["instruct"]}, OptionError, "align.pt is missing; train stage align first"),
    ],
)
def test_mistakes_are_refused_in_a_line(
    run: Callable[..., Path], tmp_path: Path, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "out", **options)


def test_the_command_wants_a_folder_of_named_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "photo", "--out", str(tmp_path / "a")]) == 2
    assert "give --pictures FOLDER" in capsys.readouterr().err
    assert cli.main(["train", "tiny", "--pictures", "x", "--out", str(tmp_path / "a")]) == 2
    with pytest.raises(DataError, match="no folder"):
        train_photo(tmp_path / "none", tmp_path / "b")


def test_what_photographs_show_stands_in_one_order_in_every_process() -> None:
    """Sets of words have another order in each process; things of one name are told apart by what else they are called."""
    kinds = [f"kind {number}" for number in range(40)]
    photos = [Photo(Path(f"{kind}.png"), Thing("crane", "", kind)) for kind in kinds]
    assert [thing.kind for thing in make.things_of(photos[::-1] + photos)] == sorted(kinds)
