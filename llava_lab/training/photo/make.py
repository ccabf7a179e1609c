"""Trains `photo`: a net that saw photographs and a language model that read text, and LLaVA's two stages between them.

The connector starts in the space of word embeddings (`words`): for every patch the tower's own classifier says which of
ImageNet's classes it would be, and the connector learns to give the mean embedding of their names, and a little of "top" or
"bottom" and of "left" or "right" for where the patch lies. That takes minutes and no language model. Then LLaVA's stages:
`align` trains the connector alone, `instruct` the connector and LoRA on every linear layer of the language model; every step of
both reads some patches of `words` too, so that the connector goes on naming what no question is about, and some of `instruct`'s
read texts the untouched model wrote and stay near what it expects next, so that it keeps its ability with text.

What a step costs is the length of its sequences. So most steps pass on a random quarter or half of the patches of two or four
times the pictures (the idea of FLIP, Li et al. 2023, arXiv 2212.00794); a patch says itself where it lies
(`efficientnet.place_code`) and keeps its position in the sequence (`spread_out`). How many are passed on says nothing of what is
shown: photographs alone and scenes take turns.

A thousand photographs are soon known by heart. So half of the pictures are small cuts, named by the tower's classifier where it
is sure (`cuts`), and a fifth of each picture's features is hidden: what is learned is to read the tower, not the photographs. The
classifier can name any features at all, so `words` also reads such as no photograph of these has: two patches mixed, channel by
channel, and moved towards a class (`Patches`); and its hidden units start as the classifier's own rows (`start_at_classes`).

    train_photo("photographs", "runs/photo")  # hours on a processor; runs/photo/weights is what ``ll.load`` reads

Any folder of photographs named by what they show will do (`llava_lab.worlds.photo_names.read_photos`). A picture is read once for
about ten questions, as for `smol` (`training.smol.batches`). Sources: LLaVA-1.5, arXiv 2310.03744; sizes and rates are our own.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.cluster import hierarchy
from torch import Tensor, nn
from torch.utils.data import Dataset

from llava_lab.errors import OptionError, one_line
from llava_lab.models import layout
from llava_lab.models.formats import efficientnet, photo
from llava_lab.results import whole_file
from llava_lab.training import loop
from llava_lab.training.recipe import Stage
from llava_lab.training.smol.batches import Batch, Chat, many_texts, texts_batch
from llava_lab.training.smol.make import adapt, answered, compiled, distance, loss_of, quick_numbers, write_weights
from llava_lab.worlds.photo_names import Photo, Thing, classes, read_photos
from llava_lab.worlds.photo_scenes import absent, draw_scene, opened, present, talk_about

log = logging.getLogger(__name__)

POOL = 2400  # pictures whose patches `words` learns from, every other one a collage
# How sure the classifier is made of each patch, and how far its names stand from the mean of all. As they come (1 and 1), the
# untouched language model tells a picture's name from another's by 0.20 nats a token; so by 0.41 (zero-shot, 48 photographs).
SHARP, STRETCH = 2.0, 3.0
WORDS_OF_PLACES = ("top", "bottom", "left", "right")
AXES = (efficientnet.HEAD, efficientnet.HEAD + photo.PLACES // 2)  # channels with half a wave down and across
MOVED = 8.0  # how far features are moved towards a class, at most; photographs' own have a length of 2 to 31
RARE = 0.95  # a hidden unit starts to answer where its classes are likelier than in this share of the patches
# How far "top" stands from "bottom" and "left" from "right" in the patches of the first and the last row and column, in units of
# the words' own distance. The order of the tokens tells rows but not columns: with 1 and 1, of 120 places asked for in collages,
# 43 were right, 25 the neighbour's in the same row and none that in the same column.
PLACE = (2.0, 4.0)
# Share of the cross-entropy of names in the loss of `words`, and the unit of angle. Squared error alone leaves 69% of kept-out
# photographs with their own name, with it 73% (quarters of collages 58% and 62%; 400 steps, one run each).
NAMED, ANGLE = 0.1, 0.1
# Patches of a picture that are passed on (0: all) and how many such pictures stand for one in a batch, in turn.
SHOWN = ((36, 4), (72, 2), (36, 4), (0, 1))
BLOCKS = {36: 5, 72: 8}  # texts about each of many pictures
HIDDEN = 0.2  # of a picture's features, another share in every step
CUTS, SURE = 4, 0.1  # cuts tried of each photograph, and how sure the classifier is of those it names
TEXT_EVERY, TEXTS, AGAIN = 8, 12, 4  # of so many steps of `instruct` one reads plain texts; how many; texts to each beginning
CHECKED, CHECK_EVERY = 16, 80

WORDS = Stage("words", ("connector",), steps=1500, batch=2048, rate=1e-3, matrix_rate=0.03, warmup=0.05)
ALIGN = Stage("align", ("connector",), steps=60, batch=2, rate=3e-4, warmup=0.1)
INSTRUCT = Stage("instruct", ("connector", "lora"), steps=750, batch=2, rate=1e-3)
ANCHOR = 256  # patches of `words` in every step of the later stages
NUMBERS = 7_450_000  # written, connector and adapters: 15 MB in bfloat16; what is over is left out where it matters least
CONNECTOR_RATE = 1e-4  # of `instruct`: what `words` learned of a thousand classes is not to be forgotten


@dataclass(frozen=True)
class PhotoRecipe:
    """The stages and the adapters."""

    seed: int = 0
    rank: int = 16
    scale: float = 2.0  # alpha / rank
    words: Stage = WORDS
    align: Stage = ALIGN
    instruct: Stage = INSTRUCT

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.words, self.align, self.instruct


PHOTO = PhotoRecipe()


def things_of(photos: Sequence[Photo]) -> list[Thing]:
    """What the photographs show, once each. Two things of one name (a crane that flies, one that lifts) stand in an order of
    their own too, so that every process asks the same questions."""
    return sorted({photo.thing for photo in photos}, key=lambda thing: (thing.name, thing.basic, thing.kind))


# -- pictures ------------------------------------------------------------------------------


def to_square(picture: Image.Image, side: int = photo.SIDE) -> np.ndarray:
    """Padded to a square with the tower's mean grey and resized, as the processor does it: uint8 (side, side, 3)."""
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), (127, 127, 127))
    square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class PhotoBatch(Batch):
    """A batch that passes on some patches of its pictures only, or some of their features, and brings patches of `words`."""

    shown: Tensor | None = None  # int64, places of the patches, in order; None: all
    kept: Tensor | None = None  # float32 (B, 1, 1280 + places), what the features are multiplied by; None: 1
    patches: tuple[Tensor, Tensor, Tensor] | None = None  # features, wanted tokens, shares of the classes


def passed_on(model: Any, batch: Batch) -> Tensor:
    """What the connector reads of a batch's pictures (B, P, 1280)."""
    assert batch.pictures is not None
    features = seen(model, batch.pictures)
    shown, kept = getattr(batch, "shown", None), getattr(batch, "kept", None)
    features = features if shown is None else features[:, shown]
    return features if kept is None else features * kept


def seen(model: Any, pictures: Tensor) -> Tensor:
    """uint8 (B, side, side, 3) -> the tower's features (B, P, 1280); its convolutions in bfloat16 where that is quicker."""
    pixels = (pictures.permute(0, 3, 1, 2).float() / 255 - efficientnet.MEAN) / efficientnet.STD
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=loop.quick_bfloat16()):
        return layout.vision_tower(model)(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state.float()


def spread_out(batch: Batch, places: Tensor, patches: int, image_id: int) -> Batch:
    """The batch with every patch at the position it has among all `patches`, and the text after the last of them.

    Some patches of a picture then stand where all of them will: passed on side by side, the patches of the top left would end
    where, among all, the first row is not over, and what was learned of places is wrong for whole pictures.
    """
    first = int(batch.ids[0].eq(image_id).nonzero()[0])
    position = batch.position.clone()
    position[:, first : first + len(places)] = first + places
    position[:, first + len(places) :] += patches - len(places)
    return replace(batch, position=position)


class PhotoData(Dataset):
    """Step number -> batch: photographs alone or scenes, with what is asked; `blind` shows grey, `texts` are plain ones."""

    def __init__(
        self, form: Chat, photos: Sequence[Photo], *, stage: Stage, number: int, seed: int, texts: Any = None, blind: bool = False
    ) -> None:
        self.form, self.photos, self.stage, self.number, self.seed = form, photos, stage, number, seed
        self.texts, self.blind = texts, blind
        self.patches: Patches | None = None
        self.things = things_of(photos)
        self.brief = {shown: Chat(form.tokenizer, shown) for shown in BLOCKS}

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, 47, self.number, step))
        if self.texts and step % TEXT_EVERY == TEXT_EVERY - 1:
            return texts_batch([self.texts[int(i)] for i in rng.integers(len(self.texts), size=TEXTS)])
        alone = self.stage.name == "align" or step % 2 == 0
        shown, crowd = SHOWN[step // 2 % len(SHOWN)]
        count = self.stage.batch * crowd
        scenes = [draw_scene(self.photos, rng, form="alone" if alone else None) for _ in range(count)]
        rows = [talk_about(scene, self.things, rng) for scene in scenes]
        squares = np.stack([to_square(scene.picture) for scene in scenes])
        if self.blind:
            squares = np.full_like(squares, 127)
        if shown:
            rows = [[blocks[int(i)] for i in rng.permutation(len(blocks))[: BLOCKS[shown]]] for blocks in rows]
        batch = self.brief.get(shown, self.form).batch(rows, squares)
        patches = (photo.SIDE // efficientnet.STRIDE) ** 2
        places = torch.from_numpy(np.sort(rng.permutation(patches)[:shown])) if shown else None
        if places is not None:
            batch = spread_out(batch, places, patches, self.form.image_id)
        kept = np.ones((count, 1, efficientnet.HEAD + photo.PLACES), np.float32)
        kept[..., : efficientnet.HEAD] = (rng.random((count, 1, efficientnet.HEAD)) >= HIDDEN) / (1 - HIDDEN)
        read = batch.ids, batch.labels, batch.block, batch.position, batch.pictures
        return PhotoBatch(*read, places, torch.from_numpy(kept), None if self.patches is None else self.patches[step])


# -- the start: what the tower would call each patch ----------------------------------------


def class_embeddings(model: Any, tokenizer: Any) -> Tensor:
    """(1000, D): the mean embedding of the words of each class's name, and of what one calls it."""
    table = model.get_input_embeddings().weight.detach().float()
    rows = []
    for thing, _ in classes().values():
        words = [f" {word}" for word in dict.fromkeys((thing.name, thing.basic)) if word]
        rows.append(
            torch.stack([table[tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0) for word in words]).mean(0)
        )
    return torch.stack(rows)


def place_directions(model: Any, tokenizer: Any) -> Tensor:
    """(2, D): half the way from "bottom" to "top" and from "right" to "left" among the word embeddings."""
    table = model.get_input_embeddings().weight.detach().float()
    top, bottom, left, right = (
        table[tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(0) for word in WORDS_OF_PLACES
    )
    return torch.stack([top - bottom, left - right]) / 2


def patch_pool(model: Any, photos: Sequence[Photo], *, seed: int, pictures: int) -> Tensor:
    """Features of every patch of photographs in new cuts and of collages (N, W), bfloat16; each photograph in its turn."""
    parts = []
    for first in range(0, pictures, 8):
        rng = np.random.default_rng((seed, 46, first))
        turn = [photos[i % len(photos)] for i in range(first, min(first + 8, pictures))]
        scenes = [
            draw_scene(photos, rng, form="quarters") if i % 2 else draw_scene([one], rng, form="alone")
            for i, one in enumerate(turn)
        ]
        squares = np.stack([to_square(scene.picture) for scene in scenes])
        parts.append(seen(model, torch.from_numpy(squares)).flatten(0, 1).to(torch.bfloat16))
    return torch.cat(parts)


@torch.no_grad()
def cuts(model: Any, photos: Sequence[Photo], file: Path, *, seed: int) -> list[Photo]:
    """Small parts of the photographs that the tower's classifier is sure of, with its names.

    They are kept in `file` for a resumed run, and made anew where it is damaged or of other photographs.
    """
    of = [photo.path.name for photo in photos]
    try:
        kept = json.loads(file.read_text())
        if kept["photographs"] == of and kept["seed"] == seed:
            return [Photo(photos[number].path, classes()[wnid][0], tuple(box)) for number, wnid, box in kept["cuts"]]
        log.warning("%s is of other photographs and is written anew", file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, LookupError) as error:
        log.warning("%s is damaged and is written anew (%s)", file, one_line(error))
    names, rows, found = list(classes()), [], []
    for number, whole in enumerate(photos):
        rng = np.random.default_rng((seed, 50, number))
        tried = [replace(whole, box=_small_box(rng)) for _ in range(CUTS)]
        squares = np.stack([to_square(opened(part)) for part in tried])
        logits = layout.vision_tower(model).classes(seen(model, torch.from_numpy(squares)).mean(1))
        for part, sure, at in zip(tried, *(best.tolist() for best in logits.softmax(-1).max(-1)), strict=True):
            if sure >= SURE:
                rows.append([number, names[at], part.box])
                found.append(replace(part, thing=classes()[names[at]][0]))
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps({"photographs": of, "seed": seed, "cuts": rows}))
    return found


def _small_box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A tenth to a half of the area, as shares of the sides."""
    area, stretch = np.exp(rng.uniform(np.log(0.1), np.log(0.5))), np.exp(rng.uniform(-0.3, 0.3))
    width, height = min(1.0, np.sqrt(area) * stretch), min(1.0, np.sqrt(area) / stretch)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return float(left), float(top), float(left + width), float(top + height)


class Names:
    """What a token says of a thousand classes: its angle with their names, seen from the mean of all, places left out."""

    def __init__(self, embeddings: Tensor, directions: Tensor) -> None:
        self.mean, self.places = embeddings.mean(0), torch.linalg.qr(directions.T).Q  # (D,), (D, 2)
        self.names = self._angle(embeddings)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(N, D) -> logits (N, 1000)."""
        return self._angle(tokens) @ self.names.T / ANGLE

    def _angle(self, tokens: Tensor) -> Tensor:
        tokens = tokens - self.mean
        return F.normalize(tokens - tokens @ self.places @ self.places.T, dim=-1)


class Patches(Dataset):
    """Step number -> (features, wanted tokens, share of every class) of a batch of patches.

    Half of them have some channels, none to all, from another patch; half are moved towards a class, as far as `MOVED`. Wanted is
    what the classifier says of the features as they then are. Photographs alone teach a connector little of other photographs: of
    the patches that the classifier is sure of (one class above a half) in 150 that were kept out, one of 576 units gave 41% the
    classifier's word as they come and with units as drawn, 51% from `start_at_classes`, 69% with both (300, 300, 600 steps).
    """

    def __init__(self, model: Any, pool: Tensor, embeddings: Tensor, directions: Tensor, *, batch: int, seed: int) -> None:
        self.tower, self.pool, self.embeddings, self.directions = layout.vision_tower(model), pool, embeddings, directions
        self.batch, self.seed = batch, seed
        rows = self.tower.head.weight.detach() - self.tower.head.weight.detach().mean(0)
        self.towards = rows / rows.norm(dim=1, keepdim=True)  # (1000, 1280)

    @torch.no_grad()
    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, 48, step))
        rows, others = rng.integers(len(self.pool), size=(2, self.batch))
        features, head = self.pool[torch.from_numpy(rows)].float(), efficientnet.HEAD
        share, moved = (torch.from_numpy(_for_half(rng, self.batch)) for _ in range(2))
        crossed = torch.from_numpy(rng.random((self.batch, head), np.float32)) < share
        features[:, :head] = torch.where(crossed, self.pool[torch.from_numpy(others), :head].float(), features[:, :head])
        features[:, :head] += MOVED * moved * self.towards[torch.from_numpy(rng.integers(len(self.towards), size=self.batch))]
        mean, likely = self.embeddings.mean(0), (SHARP * self.tower.classes(features)).softmax(-1)
        named = mean + STRETCH * (likely @ self.embeddings - mean)
        return features, named + features[:, list(AXES)] * torch.tensor(PLACE) @ self.directions, likely


def _for_half(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 1), float32: between 0 and 1 for half of the rows, 0 for the others."""
    return (rng.random((count, 1)) * (rng.random((count, 1)) < 0.5)).astype(np.float32)


@torch.no_grad()
def start_at_classes(connector: Any, tower: Any, embeddings: Tensor, features: Tensor) -> None:
    """The first layer reads `features` (N, W) with the classifier's own rows; units that are left over stay as drawn.

    Each unit answers to one group of classes, alike in weights and in names (Ward's method), where they are likelier than in most
    patches (`RARE`); the last ones pass on where a patch lies. Raises OptionError for a first layer without room for both.
    """
    layer, weight = connector.linear_1, tower.head.weight
    if layer.out_features < 2 * photo.PLACES:
        raise OptionError(f"a connector of photographs wants {2 * photo.PLACES} hidden units or more, got {layer.out_features}")
    alike = torch.cat([F.normalize(embeddings - embeddings.mean(0)), F.normalize(weight)], 1)
    units = layer.out_features - photo.PLACES
    group = torch.from_numpy(hierarchy.fcluster(hierarchy.linkage(alike.numpy(), "ward"), units, "maxclust")) - 1
    mean = F.one_hot(group.long()).T.float()
    mean /= mean.sum(1, keepdim=True)
    found = tower.classes(features) @ mean.T
    layer.weight[: len(mean)] = F.pad(mean @ weight, (0, photo.PLACES))
    layer.bias[: len(mean)] = mean @ tower.head.bias - torch.from_numpy(np.quantile(found.numpy(), RARE, axis=0)).float()
    layer.weight[-photo.PLACES :] = torch.eye(photo.PLACES, layer.in_features).roll(efficientnet.HEAD, 1)
    layer.bias[-photo.PLACES :] = 0


@torch.no_grad()
def trimmed(lora: nn.ModuleDict, numbers: int) -> nn.ModuleDict:
    """The adapters in at most `numbers` weights (one component a layer stays in any case).

    Each layer's change is taken apart into singular components; of all layers' those stay that change most for what they take.
    """
    parts, worth = {}, []
    for name, pair in lora.items():
        up, down = (torch.linalg.qr(weight) for weight in (pair["up"].weight, pair["down"].weight.T))
        left, sizes, right = torch.linalg.svd(up.R @ down.R.T)
        parts[name] = up.Q @ left * sizes.sqrt(), sizes.sqrt()[:, None] * right @ down.Q.T
        takes = len(up.Q) + len(down.Q)
        worth += [(number == 0, float(size) ** 2 / takes, takes, name) for number, size in enumerate(sizes)]
    kept: Counter[str] = Counter()
    stays = 0.0
    for first, gain, takes, name in sorted(worth, reverse=True):
        numbers -= takes
        if first or numbers >= 0:
            kept[name] += 1
            stays += gain * takes
    share = stays / (sum(gain * takes for _, gain, takes, _ in worth) or 1.0)
    log.info("written: %d of the adapters' %d components, %.1f%% of their squared change", kept.total(), len(worth), 100 * share)
    made = nn.ModuleDict()
    for name, (up, down) in parts.items():
        rank = kept[name]
        made[name] = nn.ModuleDict(
            {"down": nn.Linear(down.shape[1], rank, bias=False), "up": nn.Linear(rank, up.shape[0], bias=False)}
        )
        made[name]["down"].weight.copy_(down[:rank])
        made[name]["up"].weight.copy_(up[:, :rank])
    return made


@torch.no_grad()
def fit_layer(layer: nn.Linear, read: Tensor, wanted: Tensor, *, ridge: float = 1e-2) -> None:
    """The layer that best gives `wanted` (N, D) of what it reads (N, W), by ridge regression.

    As the connector's last layer it makes training start below a loss of 1, and not at 1,000.
    """
    centre, mean = read.mean(0), wanted.mean(0)
    gram = (read - centre).T @ (read - centre)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, (read - centre).T @ (wanted - mean))
    layer.weight.copy_(weight.T)
    layer.bias.copy_(mean - centre @ weight)


def words_loss(
    connector: nn.Module, batch: tuple[Tensor, Tensor, Tensor], *, spread: Tensor, names: Names | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Squared error in units of the targets' own spread: 1 is a connector that says the same of every patch.

    With `names` some of the cross-entropy of the classes a token names is added (`NAMED`).
    """
    features, wanted, likely = batch
    made = connector(features[None])[0].float()
    loss = F.mse_loss(made, wanted) / spread
    if names is not None:
        with torch.autocast("cpu", enabled=False):
            loss = loss - NAMED * (likely * names(made).log_softmax(-1)).sum(-1).mean()
    return loss, {"patches": len(wanted)}


def anchored(loss_of_batch: loop.LossOf, words: loop.LossOf, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """A batch's loss and, where it brings patches, that of `words` on them."""
    loss, facts = loss_of_batch(batch)
    patches = getattr(batch, "patches", None)
    if patches is None:
        return loss, facts
    extra, _ = words(patches)
    return loss + extra, facts | {"words": round(extra.item(), 5)}


# -- the run -------------------------------------------------------------------------------


class Check:
    """Loss and share of exact greedy answers on scenes no step has drawn, with the right pictures and with each other's.

    The photographs are those of training in other cuts: this follows the training and is no measure of how good it is.
    """

    def __init__(self, model: Any, form: Chat, photos: Sequence[Photo]) -> None:
        self.model, self.image_id, self.batches = model, form.image_id, check_batches(form, photos, CHECKED)

    def __call__(self, step: int) -> dict[str, float]:
        wrong = [replace(batch, pictures=batch.pictures.roll(1, 0)) for batch in self.batches if batch.pictures is not None]
        return answered(self.model, self.batches, wrong, image_id=self.image_id, see=passed_on)


def check_batches(form: Chat, photos: Sequence[Photo], scenes: int) -> tuple[Batch, ...]:
    """`scenes` scenes no step draws and five questions about each, in batches of 8."""
    batches = []
    things = things_of(photos)
    for first in range(0, scenes, 8):
        rng = np.random.default_rng((9, 49, first))
        drawn = [draw_scene(photos, rng) for _ in range(min(8, scenes - first))]
        rows = [[b for b in (present(s, rng), absent(s, things, rng), *talk_about(s, things, rng)[:3]) if b] for s in drawn]
        batches.append(form.batch(rows, np.stack([to_square(scene.picture) for scene in drawn])))
    return tuple(batches)


def train_photo(
    pictures: str | os.PathLike,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    steps_scale: float = 1.0,
    recipe: PhotoRecipe = PHOTO,
    stages: Sequence[str] | None = None,
    blind: bool = False,
    fused: bool = False,
    parts: dict[str, Any] | None = None,
    texts: Sequence[Sequence[int]] | None = None,
) -> Path:
    """Train all stages on the photographs in `pictures` and write ``out/weights`` (connector, LoRA): 15 MB at most.

    What the adapters hold beyond that is left out where it changes least (`trimmed`); the log says how much.
    `parts` are `formats.photo.assemble`'s; `blind` trains on grey pictures, as a control; `fused` joins small operations
    with torch.compile (a quarter faster, wants a C++ compiler, rounds differently); `texts` (token ids) stand for the
    language model's own. Raises OptionError when `out` holds a run and `resume` is off, or for an unknown stage; DataError when
    `pictures` holds no named photograph.
    """
    folder, photos = Path(out), read_photos(Path(pictures))
    names = [stage.name for stage in recipe.stages]
    with loop.own_folder(folder, names, chosen=stages, steps_scale=steps_scale, resume=resume):
        log.info("%d photographs of %d things in %s", len(photos), len({p.thing.name for p in photos}), pictures)
        model, processor = photo.assemble(**(parts or {}))
        model.requires_grad_(False)
        language = layout.language_model(model)
        layout.vision_tower(model).to(memory_format=torch.channels_last)
        form, connector = Chat(processor.tokenizer, layout.image_token_count(model)), layout.connector_of(model)
        modules: dict[str, nn.Module] = {"connector": connector.requires_grad_(True)}
        embeddings = class_embeddings(model, processor.tokenizer)
        directions = place_directions(model, processor.tokenizer)
        quick_numbers(language)
        check = Check(model, form, photos)

        @cache
        def pool() -> Tensor:
            return patch_pool(model, photos, seed=recipe.seed, pictures=POOL)

        def patches(batch: int, number: int = 0) -> Patches:
            return Patches(model, pool(), embeddings, directions, batch=batch, seed=recipe.seed + number)

        @cache
        def spread() -> Tensor:
            unread = patches(recipe.words.batch)
            return torch.cat([unread[recipe.words.steps + i][1] for i in range(4)]).var(0).mean()

        def words_loss_of() -> loop.LossOf:
            return partial(words_loss, connector, spread=spread(), names=Names(embeddings, directions))

        for number, stage in enumerate(recipe.stages):
            if stages is not None and stage.name not in stages:
                continue
            if "lora" in stage.trains and "lora" not in modules:
                modules["lora"] = adapt(language, recipe.rank, recipe.scale, recipe.seed)
            if number:
                # what the stage before left; adapters it did not train start at nothing
                before = folder / f"{names[number - 1]}.pt"
                if not before.exists():
                    raise OptionError(f"{before} is missing; train stage {names[number - 1]} first")
                for name, state in loop.read_state(before)["modules"].items():
                    modules[name].load_state_dict(state)
            scaled = replace(stage, steps=max(1, round(stage.steps * steps_scale)))
            loop.remember_stage(
                folder, scaled, seed=recipe.seed, blind=blind, photographs=len(photos), bfloat16=loop.quick_bfloat16()
            )
            if stage.name == "words":
                state = folder / "words.pt"
                if state.exists() and loop.read_state(state)["step"] >= scaled.steps:
                    continue  # what it learned from takes minutes to make again
                words, some = patches(stage.batch), pool()[:: max(1, len(pool()) // 5000)].float()
                start_at_classes(connector, layout.vision_tower(model), embeddings, some)
                read = [words[stage.steps + 4 + i] for i in range(16)]
                features, wanted, _ = (torch.cat(rows) for rows in zip(*read, strict=True))
                fit_layer(connector.linear_2, F.gelu(connector.linear_1(features)).detach(), wanted)
                loop.train(scaled, modules, words, words_loss_of(), folder=folder, bf16=loop.quick_bfloat16())
                continue
            small = cuts(model, photos, folder / "cuts.json", seed=recipe.seed)
            if fused:
                compiled(language)
            shown = [*photos] * max(1, round(len(small) / len(photos))) + small  # about half of them whole
            options: dict[str, Any] = {"bf16": loop.quick_bfloat16(), "check": check, "check_every": CHECK_EVERY}
            data = PhotoData(form, shown, stage=stage, number=number, seed=recipe.seed, blind=blind)
            data.patches = patches(ANCHOR, number)
            stage_loss: loop.LossOf = partial(loss_of, model, image_id=form.image_id, see=passed_on)
            if "lora" in stage.trains:
                # the model as it was before any training
                teacher, _ = photo.assemble(**(parts or {}))
                quick_numbers(layout.language_model(teacher.requires_grad_(False)))
                data.texts = (
                    many_texts(teacher, processor.tokenizer, folder / "texts.json", again=AGAIN) if texts is None else texts
                )
                stage_loss = partial(distance, model, teacher, image_id=form.image_id, see=passed_on)
                options["rates"] = {"connector": CONNECTOR_RATE}
            loss = partial(anchored, stage_loss, words_loss_of())
            loop.train(scaled, modules, data, loss, folder=folder, workers=1, **options)
        lora = modules.get("lora")
        assert lora is None or isinstance(lora, nn.ModuleDict)
        if lora is not None:
            lora = trimmed(lora, NUMBERS - sum(value.numel() for value in connector.state_dict().values()))
        settings = {"rank": recipe.rank, "scale": recipe.scale, "seed": recipe.seed, "photographs": len(photos)}
        return write_weights(folder, photo.NAME, connector, lora, settings)
