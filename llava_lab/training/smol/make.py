"""Trains `smol`: a frozen pretrained language model gets eyes, in LLaVA's two stages on the picture book.

Stage 1 (align) trains the connector alone, stage 2 (instruct) the connector and LoRA on every linear layer of the language
model; `practice` goes on with stage 2 at a fresh rate on the questions that come last: relations, comparisons, counts.
The frozen parts run in bfloat16 where the processor multiplies it, what trains is kept in float32. The layers are stock
transformers; blocks are kept apart by the attention mask (`batches`). The tower costs a three-hundredth of a step and runs in it.

So that the language model keeps its ability with text, a share of stage 2 reads texts the untouched model wrote itself. Few
texts, read often, are learnt by heart and do not help (perplexity on other prose rose ninefold); so `recall` reads many, half of
its steps, and stays near what the untouched model expects next at every word (`distance`).

    train_smol("runs/smol")  # hours on a processor; then runs/smol/weights is what the repository holds
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_lab.errors import OptionError
from llava_lab.models import layout
from llava_lab.models.formats import smol
from llava_lab.results import whole_file
from llava_lab.training import loop
from llava_lab.training.features import tower_features
from llava_lab.training.recipe import Stage
from llava_lab.training.smol.batches import Batch, Chat, SmolData, asked_blocks, draw, many_texts, own_texts
from llava_lab.training.text import IGNORE
from llava_lab.training.tiny.tower import normalise
from llava_lab.worlds.picturebook import scene

log = logging.getLogger(__name__)

CHECK_PICTURES, CHECK_EVERY = 24, 100

ALIGN = Stage("align", ("connector",), steps=350, batch=8, rate=2e-3, warmup=0.05)
INSTRUCT = Stage("instruct", ("connector", "lora"), steps=700, batch=8, rate=1e-3)
PRACTICE = Stage("practice", ("connector", "lora"), steps=600, batch=8, rate=8e-4)
RECALL = Stage("recall", ("connector", "lora"), steps=240, batch=8, rate=5e-4)


@dataclass(frozen=True)
class SmolRecipe:
    """The stages and the adapters."""

    seed: int = 0
    rank: int = 16
    scale: float = 2.0  # alpha / rank
    align: Stage = ALIGN
    instruct: Stage = INSTRUCT
    practice: Stage = PRACTICE
    recall: Stage = RECALL

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.align, self.instruct, self.practice, self.recall


SMOL = SmolRecipe()


# -- the model, ready to train -------------------------------------------------------------


def adapt(language: nn.Module, rank: int, scale: float, seed: int) -> nn.ModuleDict:
    """Put peft's LoRA beside every linear layer; gives the two matrices of each by layer name, with ``/`` for the points.

    They are kept and drawn in float32 (peft makes them in the layer's own precision): ``down`` by Kaiming, ``up`` at nothing.
    """
    names = [name for name, module in language.named_modules() if isinstance(module, nn.Linear)]
    pairs = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        config = LoraConfig(r=rank, lora_alpha=round(scale * rank), target_modules=names, bias="none")
        inject_adapter_in_model(config, language)
        torch.manual_seed(seed)
        for name in names:
            layer: Any = language.get_submodule(name)
            pair = nn.ModuleDict({"down": layer.lora_A["default"], "up": layer.lora_B["default"]}).float()
            nn.init.kaiming_uniform_(layer.lora_A["default"].weight, a=math.sqrt(5))
            pairs[name.replace(".", "/")] = pair
    return pairs


def quick_numbers(module: nn.Module) -> None:
    """Parameters in bfloat16 where that is quicker; buffers stay, for the rotary frequencies do not fit 16 bits."""
    if loop.quick_bfloat16():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)


@torch.no_grad()
def fit_start(model: Any, features: Tensor) -> None:
    """A fresh connector reads features as if standardised and writes tokens as long as the words' embeddings."""
    connector, words = layout.connector_of(model), model.get_input_embeddings().weight
    flat = features.flatten(0, 1).float()
    mean, spread = flat.mean(0), flat.std(0).clamp_min(1e-3)
    first, second = connector.linear_1, connector.linear_2
    first.weight.div_(spread)
    first.bias.sub_(first.weight @ mean)
    length = connector(features.float()).norm(dim=-1).mean()
    share = words.float().norm(dim=-1).mean() / length
    second.weight.mul_(share)
    second.bias.mul_(share)


def compiled(language: Any) -> None:
    """Compile every block of the language model in place; one compilation serves them all."""
    torch._dynamo.config.recompile_limit = 64
    for block in language.layers:
        block.compile(dynamic=False)


# -- the loss ------------------------------------------------------------------------------


def block_mask(block: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) block numbers -> (B, 1, S, S), 0 where a place may look: back, at what is shared and at its own block."""
    size = block.shape[1]
    seen = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    seen = seen & torch.ones(size, size, dtype=torch.bool).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


See = Callable[[Any, Batch], Tensor]  # the model and a batch with pictures -> what the connector reads of them (B, P, W)


def drawn_features(model: Any, batch: Batch) -> Tensor:
    """What the shipped tower sees in drawn pictures."""
    assert batch.pictures is not None
    return tower_features(model, normalise(batch.pictures))


def states(model: Any, batch: Batch, *, image_id: int, see: See = drawn_features) -> tuple[Tensor, Tensor]:
    """Normed states at the labelled places (n, D) and their labels (n,)."""
    language, table = layout.language_model(model), model.get_input_embeddings().weight
    embedded = F.embedding(batch.ids, table)
    if batch.pictures is not None:
        features = see(model, batch)
        tokens = layout.connector_of(model)(features).to(embedded.dtype)
        at = (batch.ids == image_id)[..., None]
        embedded = embedded.masked_scatter(at, tokens)
    mask = block_mask(batch.block, embedded.dtype)
    hidden = language(inputs_embeds=embedded, attention_mask=mask, position_ids=batch.position, use_cache=False).last_hidden_state
    where = batch.labels != IGNORE
    return hidden[where], batch.labels[where]


def loss_of(model: Any, batch: Batch, *, image_id: int, see: See = drawn_features) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy over labelled tokens, and what a log line says of the batch."""
    hidden, wanted = states(model, batch, image_id=image_id, see=see)
    loss = F.cross_entropy(model.get_output_embeddings()(hidden).float(), wanted)
    return loss, {"tokens": len(wanted), "text": float(batch.pictures is None)}


def distance(
    model: Any, teacher: Any, batch: Batch, *, image_id: int, see: See = drawn_features
) -> tuple[Tensor, dict[str, float]]:
    """`loss_of` for pictures; for plain texts the mean Kullback-Leibler divergence, in nats, from what `teacher` expects next."""
    if batch.pictures is not None:
        return loss_of(model, batch, image_id=image_id, see=see)
    hidden, wanted = states(model, batch, image_id=image_id)
    with torch.no_grad():
        expected, _ = states(teacher, batch, image_id=image_id)
        target = teacher.get_output_embeddings()(expected).float().log_softmax(-1)
    predicted = model.get_output_embeddings()(hidden).float().log_softmax(-1)
    loss = F.kl_div(predicted, target, log_target=True, reduction="batchmean")
    return loss, {"tokens": len(wanted), "text": 1.0}


# -- the run -------------------------------------------------------------------------------


class Check:
    """Loss and share of questions whose every token is the likeliest, with the right pictures and with each other's.

    Every token the likeliest is the same as: the greedy answer equals the expected one.
    """

    def __init__(self, model: Any, form: Chat, side: int, *, pictures: int = CHECK_PICTURES, batch: int = 8) -> None:
        self.model, self.image_id = model, form.image_id
        scenes = [scene("validation", i) for i in range(pictures)]
        rows = [asked_blocks(drawn, np.random.default_rng((2, 0, i, 5))) for i, drawn in enumerate(scenes)]
        drawings = draw(scenes, side)
        self.right = [form.batch(rows[i : i + batch], drawings[i : i + batch]) for i in range(0, pictures, batch)]
        self.wrong = [replace(b, pictures=b.pictures.roll(1, 0)) for b in self.right if b.pictures is not None]

    def __call__(self, step: int) -> dict[str, float]:
        return answered(self.model, self.right, self.wrong, image_id=self.image_id)


@torch.no_grad()
def graded(model: Any, batches: Sequence[Batch], *, image_id: int, see: See = drawn_features) -> tuple[Tensor, list[bool]]:
    """Losses of all labelled tokens, and for each question whether every token of its answer is the likeliest."""
    losses, exact = [], []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=loop.quick_bfloat16()):
            hidden, wanted = states(model, batch, image_id=image_id, see=see)
            logits = model.get_output_embeddings()(hidden).float()
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        place = (torch.arange(len(batch.block))[:, None] * 1000 + batch.block)[batch.labels != IGNORE]
        good = logits.argmax(-1) == wanted
        exact += [bool(good[place == question].all()) for question in place.unique()]
    return torch.cat(losses), exact


def answered(
    model: Any, right: Sequence[Batch], wrong: Sequence[Batch], *, image_id: int, see: See = drawn_features
) -> dict[str, float]:
    """Loss and share of exact greedy answers of batches with their own pictures and, as ``_shuffled``, with each other's."""
    row: dict[str, float] = {}
    for name, batches in (("", right), ("_shuffled", wrong)):
        losses, exact = graded(model, batches, image_id=image_id, see=see)
        row |= {f"check{name}": round(float(losses.mean()), 4), f"exact{name}": round(float(np.mean(exact)), 4)}
    return row


def train_smol(
    out: str | os.PathLike,
    *,
    resume: bool = False,
    steps_scale: float = 1.0,
    recipe: SmolRecipe = SMOL,
    stages: Sequence[str] | None = None,
    blind: bool = False,
    fused: bool = False,
    parts: dict[str, Any] | None = None,
    texts: Sequence[Sequence[int]] | None = None,
) -> Path:
    """Train all stages in `out` and write ``out/weights`` (connector, LoRA), which is what the repository holds.

    `parts` are `smol.assemble`'s; `blind` trains on grey pictures, as a control; `fused` joins small operations with
    torch.compile (a third faster, wants a C++ compiler, rounds differently); `texts` (token ids) stand for the model's own.
    Raises OptionError when `out` holds a run and `resume` is off, or for an unknown stage.
    """
    folder = Path(out)
    names = [stage.name for stage in recipe.stages]
    with loop.own_folder(folder, names, chosen=stages, steps_scale=steps_scale, resume=resume):
        model, processor = smol.assemble(**(parts or {}))
        model.requires_grad_(False)
        quick_numbers(layout.language_model(model))
        side = model.config.vision_config.image_size
        form = Chat(processor.tokenizer, layout.image_token_count(model))
        connector = layout.connector_of(model)
        fit_start(model, tower_features(model, normalise(torch.from_numpy(draw([scene("train", i) for i in range(32)], side)))))
        few = texts
        if texts is None and {"instruct", "practice"} & set(stages or names):
            few = own_texts(model, processor.tokenizer, folder / "texts.json")
        check = Check(model, form, side)
        connector.requires_grad_(True)
        modules: dict[str, nn.Module] = {"connector": connector}
        for number, stage in enumerate(recipe.stages):
            if stages is not None and stage.name not in stages:
                continue
            if "lora" in stage.trains and "lora" not in modules:
                modules["lora"] = adapt(layout.language_model(model), recipe.rank, recipe.scale, recipe.seed)
            if number:
                # what the stage before left; adapters it did not train start at nothing
                before = folder / f"{names[number - 1]}.pt"
                if not before.exists():
                    raise OptionError(f"{before} is missing; train stage {names[number - 1]} first")
                for name, state in loop.read_state(before)["modules"].items():
                    modules[name].load_state_dict(state)
            if fused:
                compiled(layout.language_model(model))
            scaled = replace(stage, steps=max(1, round(stage.steps * steps_scale)))
            data = SmolData(form, stage=stage.name, batch=stage.batch, side=side, seed=recipe.seed, texts=few, blind=blind)
            loop.remember_stage(folder, scaled, seed=recipe.seed, blind=blind, bfloat16=loop.quick_bfloat16())
            stage_loss = partial(loss_of, model, image_id=form.image_id)
            if stage.name == "recall":
                # the model as it was before any training
                teacher, _ = smol.assemble(**(parts or {}))
                quick_numbers(layout.language_model(teacher.requires_grad_(False)))
                data.texts = many_texts(teacher, processor.tokenizer, folder / "many.json") if texts is None else texts
                stage_loss = partial(distance, model, teacher, image_id=form.image_id)
            options: dict[str, Any] = {"bf16": loop.quick_bfloat16(), "check": check, "check_every": CHECK_EVERY}
            loop.train(scaled, modules, data, stage_loss, folder=folder, workers=1, **options)
        lora = modules.get("lora")
        assert lora is None or isinstance(lora, nn.ModuleDict)
        settings = {"rank": recipe.rank, "scale": recipe.scale, "seed": recipe.seed}
        return write_weights(folder, smol.NAME, connector, lora, settings)


def write_weights(folder: Path, name: str, connector: nn.Module, lora: nn.ModuleDict | None, settings: dict[str, Any]) -> Path:
    """``folder/weights``: connector and LoRA in bfloat16, and the scale that goes with them."""
    target = folder / "weights"
    target.mkdir(exist_ok=True)
    tensors = {f"connector.{place}": value for place, value in connector.state_dict().items()}
    for place, value in (lora.state_dict() if lora is not None else {}).items():
        tensors[f"lora.{place.replace('/', '.').removesuffix('.weight')}"] = value
    with whole_file(target / f"{name}.safetensors") as temporary:
        save_file({place: value.to(torch.bfloat16).contiguous() for place, value in tensors.items()}, temporary)
    with whole_file(target / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(settings) + "\n")
    return target
