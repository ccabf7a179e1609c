"""Makes the shipped `tiny` from nothing: tower, language, align, instruct, then one transformers folder.

Every stage leaves its state, its log and the seconds it took in ``OUT``; a finished stage is not repeated, one that is
half done goes on where it stopped. The order to read this folder in: `pictures`, `tower` (stage 0a), `language` (0b),
`batches` and `streams` (questions about one picture in one pass), `sight` (stages 1 and 2), `model` (the untrained one).

    train("tiny", "runs/tiny")  # 90 minutes on two cores; then ll.load("runs/tiny/model")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from llava_lab.errors import OptionError
from llava_lab.models.folders import whole_folder
from llava_lab.training import loop
from llava_lab.training.recipe import TINY, Recipe, Stage
from llava_lab.training.tiny import streams
from llava_lab.training.tiny.language import LanguageData, Marks, language_loss
from llava_lab.training.tiny.model import build_config, build_model, build_processor, build_tokenizer
from llava_lab.training.tiny.pictures import Pool, default_workers, make_pool
from llava_lab.training.tiny.sight import AlignData, InstructData, make_check, sight_loss
from llava_lab.training.tiny.tower import TowerData, TowerHeads, tower_loss

log = logging.getLogger(__name__)

STAGES = tuple(stage.name for stage in TINY.stages)
RECIPES = {"tiny": TINY}
CHECK_COUNT = 1000  # validation pictures drawn for the running check


def train(
    name: str = "tiny",
    out: str | Path = "runs/tiny",
    *,
    stages: Sequence[str] | None = None,
    resume: bool = False,
    steps_scale: float = 1.0,
    seed: int | None = None,
    recipe: Recipe | None = None,
    fused: bool = False,
) -> Path:
    """Run a recipe's stages in order and save the model to ``OUT/model``; returns that folder.

    `stages` limits the work to some of them (the others must be finished in `out`).
    `steps_scale` multiplies every stage's steps, for rehearsals. `fused` joins small operations
    (torch.compile; wants a C++ compiler, 1.3 times as fast, last digits of the weights differ).
    Raises OptionError for an unknown name or stage, or when `out` holds a run and `resume` is off.
    """
    if recipe is None:
        if name not in RECIPES:
            raise OptionError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
        recipe = RECIPES[name]
    folder = Path(out)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    own = loop.own_folder(folder, STAGES, chosen=stages, steps_scale=steps_scale, resume=resume)
    with own, streams.fused(fused):
        work = Work(recipe, folder, steps_scale)
        for stage in recipe.stages:
            if stages is None or stage.name in stages:
                work.load(STAGES[: STAGES.index(stage.name)])
                work.run(stage)
        return work.finish()


class Work:
    """The model under way, the pool, and how each stage uses them."""

    def __init__(self, recipe: Recipe, folder: Path, scale: float) -> None:
        self.recipe, self.folder, self.scale = recipe, folder, scale
        arch, side = recipe.architecture, recipe.architecture.image
        self.tokenizer = tokenizer_of_run(folder / "tokenizer", arch.vocabulary)
        self.config = build_config(arch, self.tokenizer)
        self.model: LlavaForConditionalGeneration = build_model(self.config, seed=recipe.seed)
        # stock sdpa is slower than eager on a CPU when gradients are wanted
        self.model.set_attn_implementation("eager")
        count = max(1, round(recipe.pictures * min(1.0, scale)))
        draw = partial(make_pool, folder / "pool", side=side, grid=arch.grid, workers=default_workers())
        self.pool: Pool = draw(n=count)
        self.unseen: Pool = draw(n=min(count, CHECK_COUNT), split="validation")
        self.image_id = int(self.tokenizer.convert_tokens_to_ids("<image>"))

    def run(self, stage: Stage) -> list[float]:
        """Train one stage; its losses are returned and its state stands in the folder."""
        steps, early = (round(count * self.scale) for count in (stage.steps, stage.early))
        stage = replace(stage, steps=max(1, steps), early=early)
        torch.manual_seed(self.recipe.seed)
        loop.freeze_all_but(self.model, stage.trains)
        modules, data, loss = self._parts(stage)
        check = make_check(self.model, self.unseen, self.tokenizer) if stage.name == "instruct" else None
        loop.remember_stage(self.folder, stage, seed=self.recipe.seed)
        # one process reads ahead: drawing and tokenising a batch takes about as long as a step
        return loop.train(stage, modules, data, loss, folder=self.folder, workers=1, check=check)

    def _parts(self, stage: Stage) -> tuple[dict[str, nn.Module], Dataset, Callable[[Any], Any]]:
        model, recipe, grid = self.model, self.recipe, self.recipe.architecture.grid
        inner = model.model
        common = {"batch": stage.batch, "seed": recipe.seed}
        if stage.name == "tower":
            heads = TowerHeads(recipe.architecture.vision_width, len(self.tokenizer))
            data = TowerData(self.pool, self.tokenizer, grid=grid, **common)
            return {"tower": inner.vision_tower, "heads": heads}, data, partial(tower_loss, inner.vision_tower, heads)
        if stage.name == "language":
            marks = Marks(grid, recipe.architecture.hidden)
            words = LanguageData(self.pool, self.tokenizer, turns=stage.turns, early=stage.early, grid=grid, **common)
            loss = partial(language_loss, model, marks, image_id=self.image_id)
            return {"language": inner.language_model, "head": model.lm_head, "marks": marks}, words, loss
        loss = partial(sight_loss, model, image_id=self.image_id)
        if stage.name == "align":
            return {"projector": inner.multi_modal_projector}, AlignData(self.pool, self.tokenizer, **common), loss
        parts = {"projector": inner.multi_modal_projector, "language": inner.language_model, "head": model.lm_head}
        return parts, InstructData(self.pool, self.tokenizer, turns=stage.turns, **common), loss

    def load(self, stages: Sequence[str]) -> None:
        """Put the states of finished stages into the model, in order; a missing one is named."""
        places = {
            "tower": self.model.model.vision_tower,
            "projector": self.model.model.multi_modal_projector,
            "language": self.model.model.language_model,
            "head": self.model.lm_head,
        }
        for stage in stages:
            path = self.folder / f"{stage}.pt"
            if not path.exists():
                raise OptionError(f"{path} is missing; train stage {stage} first")
            saved = loop.read_state(path)["modules"]
            for name, module in places.items():
                if name in saved:
                    module.load_state_dict(saved[name])

    def finish(self) -> Path:
        """Save the model as an ordinary transformers folder, bfloat16."""
        if missing := [stage for stage in STAGES if not (self.folder / f"{stage}.pt").exists()]:
            log.info("no model saved yet; still to come: %s", ", ".join(missing))
            return self.folder
        self.load(STAGES)
        target = self.folder / "model"
        self.model.set_attn_implementation("sdpa")
        self.model.requires_grad_(True).to(torch.bfloat16)
        with whole_folder(target) as part:
            self.model.save_pretrained(part)
            build_processor(self.config, self.tokenizer).save_pretrained(part)
        log.info("saved %s", target)
        return target


def tokenizer_of_run(folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Built once for a run: a resumed run must not read its words by other numbers."""
    if not folder.exists():
        with whole_folder(folder) as part:
            build_tokenizer(vocabulary).save_pretrained(part)
    return PreTrainedTokenizerFast.from_pretrained(folder)
