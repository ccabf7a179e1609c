"""Connectors compared on photographs: a tower and a language model that others pretrained, and what is trained between them.

In the drawn world the tower was taught the answers patch by patch, so a line is enough there by construction. Here nothing was
made for anything: the tower of `photo` saw ImageNet, its language model read text (`models.formats.photo`). Every connector
starts as `photo`'s own does (hidden units at the classifier's rows, the last layer in closed form: `training.photo.make`), then
learns in two stages: `words`, the embeddings of what the tower's classifier calls each patch, without the language model;
and `instruct`, connector and LoRA on questions about photographs. Rates are chosen by the loss on training photographs in other
cuts; runs are examined on photographs that no training saw, with the questions of ``llava-lab evaluate --data photos``.

``closed_form`` is the linear connector that stays at its start: the language model's adapters learn, the connector does not.

    compare_connectors(["closed_form", *CONNECTORS], data="photos", pictures="train", test_pictures="everyday")
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llava_lab.comparison.run import Material, fresh
from llava_lab.errors import OptionError
from llava_lab.evaluation import answer_all
from llava_lab.evaluation.items import PHOTOS, Item, photo_items
from llava_lab.models import Lab, layout
from llava_lab.models.card import fingerprint
from llava_lab.models.connectors import Chain
from llava_lab.models.formats import photo
from llava_lab.stats import exact_match
from llava_lab.training import loop
from llava_lab.training.photo import make
from llava_lab.training.recipe import Stage
from llava_lab.training.smol.batches import Batch, Chat
from llava_lab.training.smol.make import adapt, graded, loss_of, quick_numbers
from llava_lab.worlds.photo_names import Photo, read_photos

CLOSED_FORM = "closed_form"
FIT = 10_000  # the first of the batches that the closed form is fitted on; training never gets so far
POOL = 800  # training pictures whose patches `words` learns from
ALIGN = replace(make.WORDS, steps=200, batch=1024, trains=("multi_modal_projector",))
INSTRUCT = replace(make.INSTRUCT, steps=40, batch=1, trains=("multi_modal_projector", "lora_A", "lora_B"))


@dataclass(frozen=True)
class PhotoRecipe:
    """Both stages of a run, far shorter than `training.photo.make.PHOTO`: there are some forty runs."""

    name: str = "photo ablation"
    seed: int = 0
    pictures: int = POOL
    rank: int = 16
    scale: float = 2.0
    align: Stage = ALIGN
    instruct: Stage = INSTRUCT


PHOTO_ABLATION = PhotoRecipe()


@dataclass(frozen=True)
class PhotoStart:
    """`photo`'s two ends as their packages have them, with adapters at nothing, and what those go back to before every run."""

    lab: Lab
    adapters: nn.ModuleDict
    saved: Mapping[str, Tensor]
    fingerprints: dict[str, str]
    name: str = "photo's parts"
    notes: tuple[str, ...] = (
        "The language model learns by LoRA alone; its adapters start alike in every run, connector and batches go by the seed.",
        "Rates are chosen on training photographs in other cuts; no photograph of the test was used to choose anything.",
    )

    def reset(self) -> None:
        self.adapters.load_state_dict(self.saved)


def load_photo_start(recipe: PhotoRecipe, parts: Mapping[str, Any] | None = None) -> PhotoStart:
    """Tower and language model from their packages (`parts` are `formats.photo.assemble`'s), frozen, with fresh adapters."""
    model, processor = photo.assemble(**(parts or {}))
    model.eval().requires_grad_(False)
    language, tower = layout.language_model(model), layout.vision_tower(model)
    prints = {"vision": fingerprint(tower), "language": fingerprint(language)}
    tower.to(memory_format=torch.channels_last)
    quick_numbers(language)
    adapters = adapt(language, recipe.rank, recipe.scale, recipe.seed)
    saved = {name: value.clone() for name, value in adapters.state_dict().items()}
    return PhotoStart(Lab(model, processor, name=photo.NAME), adapters, saved, prints)


@dataclass(frozen=True)
class PhotoExam:
    """Questions about photographs: `batches` are of training photographs in other cuts, `items` of photographs never seen."""

    types: tuple[str, ...]
    picture: np.ndarray  # int64 (Q,)
    batches: tuple[Batch, ...] = ()
    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class PhotoMaterial(Material):
    """The parts of `photo`, its training photographs, and both exams."""

    photos: tuple[Photo, ...] = ()
    embeddings: Tensor | None = None  # (1000, D), of the classes' names
    directions: Tensor | None = None  # (2, D), of places
    some: Tensor | None = None  # patches of the pool, which hidden units take their thresholds from

    DATA = PHOTOS
    CYCLE = (1, 4)

    def fresh(self, connector: str, seed: int) -> nn.Module:
        name = "linear" if connector == CLOSED_FORM else connector
        made: Any = fresh(self.start, name, seed)
        if not isinstance(made, Chain):
            raise OptionError(
                f"on photographs a connector gives each patch a token of its own, layer by layer; got {connector!r}"
            )
        self._begin(made, seed)
        return made

    @torch.no_grad()
    def _begin(self, connector: Any, seed: int) -> None:
        """The first layer at the classifier's rows, where it is not the only one; the last one in closed form."""
        if connector.count > 1:
            assert self.embeddings is not None
            assert self.some is not None
            make.start_at_classes(connector, layout.vision_tower(self.start.lab.model), self.embeddings, self.some)
        patches = self.batches(self.stages[0], seed)
        hidden, wanted, _ = (torch.cat(rows) for rows in zip(*(patches[FIT + i] for i in range(16)), strict=True))
        for number in range(1, connector.count):
            hidden = connector.act(getattr(connector, f"linear_{number}")(hidden))
        make.fit_layer(getattr(connector, f"linear_{connector.count}"), hidden, wanted)

    def tuned(self, connector: str) -> bool:
        return connector != CLOSED_FORM

    def parts(self, module: nn.Module) -> dict[str, nn.Module]:
        start: Any = self.start
        return {"connector": module, "lora": start.adapters}

    def batches(self, stage: Stage, seed: int) -> Any:
        if stage.name == ALIGN.name:
            assert self.embeddings is not None
            assert self.directions is not None
            model = self.start.lab.model
            return make.Patches(model, self.pool, self.embeddings, self.directions, batch=stage.batch, seed=seed)
        start: Any = self.start
        return make.PhotoData(_form(start), self.photos, stage=stage, number=2, seed=seed)

    def loss(self, module: nn.Module, item: Any) -> Tensor:
        if isinstance(item, Batch):
            return loss_of(self.start.lab.model, item, image_id=self.image_id, see=make.passed_on)[0]
        return make.words_loss(module, item, spread=item[1].var(0).mean())[0]

    def stamp(self, item: Any) -> int:
        if not isinstance(item, Batch):
            return zlib.crc32(item[0][:, :8].contiguous().numpy().tobytes())
        assert item.pictures is not None
        return zlib.crc32(item.ids.numpy().tobytes(), zlib.crc32(item.pictures[:, ::16, ::16].contiguous().numpy().tobytes()))

    def sit(self, module: nn.Module, name: str) -> tuple[np.ndarray, float]:
        exam, lab = self.exams[name], self.start.lab
        if exam.items:
            with torch.autocast("cpu", torch.bfloat16, enabled=loop.quick_bfloat16()):
                answers = answer_all(lab, exam.items, max_new_tokens=16, progress=False)
            return np.array([item.right(said, exact_match) for said, item in zip(answers, exam.items, strict=True)]), float("nan")
        losses, right = graded(lab.model, exam.batches, image_id=self.image_id, see=make.passed_on)
        return np.array(right), float(losses.mean())


def check_options(pictures: Any, test_pictures: Any, *, start: Any, language: Any, splits: Sequence[str], fused: bool) -> None:
    """Raises OptionError (one line) for what does not go with photographs."""
    if pictures is None or test_pictures is None:
        raise OptionError(
            f"data {PHOTOS!r} wants two folders: pictures to train on and test_pictures, photographs named by what they show"
        )
    if start not in ("tiny", photo.NAME) or language is not None:
        raise OptionError(f"data {PHOTOS!r} starts from the pretrained parts of {photo.NAME!r}; leave out start and language")
    if fused:
        raise OptionError(f"data {PHOTOS!r} is trained without fused operations; leave fused out")
    if tuple(splits) != ("test",):
        raise OptionError(f"data {PHOTOS!r} has one split, 'test'; got {', '.join(splits)}")


def prepare(
    recipe: PhotoRecipe,
    pictures: Any,
    test_pictures: Any,
    *,
    validation: int,
    test: int,
    bf16: bool,
    parts: Mapping[str, Any] | None = None,
) -> PhotoMaterial:
    """Parts, pool and exams, and what an `out` folder must agree in. Raises DataError for a folder without named photographs."""
    photos, unseen = read_photos(Path(pictures)), read_photos(Path(test_pictures))
    if {photo.path.name for photo in photos} & {photo.path.name for photo in unseen}:
        raise OptionError(f"{test_pictures} holds photographs of {pictures}; the test wants photographs that training never sees")
    start = load_photo_start(recipe, parts)
    model, tokenizer = start.lab.model, start.lab.tokenizer
    pool = make.patch_pool(model, photos, seed=recipe.seed, pictures=recipe.pictures)
    items = photo_items(unseen, test, recipe.seed)
    names = {name: number for number, name in enumerate(dict.fromkeys(item.picture for item in items))}
    asked = np.array([names[item.picture] for item in items])
    exams = {
        "test": PhotoExam(tuple(item.type for item in items), asked, items=tuple(items)),
        "validation": PhotoExam((), np.zeros(0, int), batches=make.check_batches(_form(start), photos, validation)),
    }
    stages = {stage.name: {k: v for k, v in asdict(stage).items() if k != "steps"} for stage in (recipe.align, recipe.instruct)}
    counts = {"train": len(photos), "validation": validation, "test": test}
    setup = {"start": start.fingerprints, "pictures": counts, "seed": recipe.seed, "bf16": bf16, "stages": stages}
    return PhotoMaterial(
        start,  # type: ignore[arg-type]
        recipe,  # type: ignore[arg-type]
        pool,
        exams,
        setup,
        bf16,
        photos=tuple(photos),
        embeddings=make.class_embeddings(model, tokenizer),
        directions=make.place_directions(model, tokenizer),
        some=pool[:: max(1, len(pool) // 5000)].float(),
    )


def _form(start: PhotoStart) -> Chat:
    return Chat(start.lab.tokenizer, layout.image_token_count(start.lab.model))
