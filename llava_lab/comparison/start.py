"""Where a comparison of connectors starts: a vision tower and a language model that every run gets anew.

The fair start is a language model that has read, but has never seen a picture: one that learnt beside a connector
favours that connector's kind. It comes from our own recipe's folder (``tower.pt``, ``language.pt``), or as the language
model of any checkpoint. What is given is read and copied, never changed.

    begun = load_start("runs/tiny")  # or load_start("tiny", language="folder of a language model")
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, connectors, layout, load
from llava_lab.models.card import fingerprint
from llava_lab.training.loop import read_state
from llava_lab.training.recipe import TINY
from llava_lab.training.tiny.model import build_config, build_model, build_processor
from llava_lab.training.tiny.tower import CLIP_MEAN, CLIP_STD

Given = Lab | str | os.PathLike

TUNED = "the start is a whole LLaVA: where its language model learnt beside a connector, it may favour that connector's kind"


@dataclass(frozen=True)
class Start:
    """A model of our own to train in, and the weights it goes back to before every run."""

    lab: Lab
    language: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    name: str
    fingerprints: dict[str, str]  # of "vision", "language" and "head"
    notes: tuple[str, ...] = ()

    def reset(self) -> None:
        """Put language model and head back to what they were."""
        layout.language_model(self.lab.model).load_state_dict(self.language)
        self.lab.model.get_output_embeddings().load_state_dict(self.head)


def load_start(start: Given = "tiny", language: Given | None = None) -> Start:
    """Tower and language model from `start`; with `language`, the language model from there instead.

    Each is a Lab, a checkpoint's name or folder, or a folder of our own recipe's training states; `language` may also be
    such a state (``language.pt``). Float32 on the processor. Raises CheckpointError for weights that do not fit,
    OptionError for a language model of another build than Llama's.
    """
    lab = _whole(start)
    from_recipe = not isinstance(start, Lab) and is_recipe(start)
    notes = () if from_recipe or language is not None else (TUNED,)
    if language is not None:
        _take_language(lab, language)
    _check(lab)
    model: Any = lab.model
    model.eval().requires_grad_(False)
    parts = {
        "vision": layout.vision_tower(model),
        "language": layout.language_model(model),
        "head": model.get_output_embeddings(),
    }
    saved = {name: {key: value.clone() for key, value in parts[name].state_dict().items()} for name in ("language", "head")}
    prints = {name: fingerprint(part) for name, part in parts.items()}
    return Start(lab, saved["language"], saved["head"], lab.name, prints, notes)


def is_recipe(place: str | os.PathLike) -> bool:
    """Whether a folder holds training states of our own recipe."""
    return (Path(place).expanduser() / "language.pt").is_file()


def _whole(start: Given) -> Lab:
    if isinstance(start, Lab):
        return _copied(start)
    return _from_recipe(Path(start).expanduser()) if is_recipe(start) else _copied(load(start, device="cpu", dtype="float32"))


def _copied(lab: Lab) -> Lab:
    """The same model in float32 on the processor; attention eager, which is faster there when gradients are wanted."""
    source: Any = lab.model
    config = copy.deepcopy(source.config)
    with torch.random.fork_rng(devices=[]), connectors.patched() if connectors.spec(config) else nullcontext():
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(source.state_dict())
    model.generation_config = copy.deepcopy(source.generation_config)
    return Lab(model, copy.deepcopy(lab.processor), name=lab.name)


def _from_recipe(folder: Path) -> Lab:
    if not (folder / "tokenizer").is_dir():
        raise CheckpointError(
            f"{folder} holds training states but no tokenizer folder; expected what `llava-lab train tiny` writes"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    finished = folder / "model"
    config = LlavaConfig.from_pretrained(finished) if finished.is_dir() else build_config(TINY.architecture, tokenizer)
    for key in (connectors.TYPE, connectors.OPTIONS):
        vars(config).pop(key, None)
    model: Any = build_model(config, seed=0).float()
    model.set_attn_implementation("eager")
    _put(layout.vision_tower(model), _state(folder / "tower.pt", "tower"), folder / "tower.pt")
    lab = Lab(model, build_processor(config, tokenizer), name=str(folder))
    _take_language(lab, folder)
    return lab


def _take_language(lab: Lab, language: Given) -> None:
    """The language model and head of `language` into `lab`. Raises CheckpointError where sizes or words differ."""
    model: Any = lab.model
    inner, head = layout.language_model(model), model.get_output_embeddings()
    if isinstance(language, Lab) or not (Path(language).is_file() or is_recipe(language)):
        other = language if isinstance(language, Lab) else load(language, device="cpu", dtype="float32")
        _same_words(lab, other.tokenizer, other.name)
        theirs: Any = other.model
        _put(inner, layout.language_model(theirs).state_dict(), other.name)
        _put(head, theirs.get_output_embeddings().state_dict(), other.name)
        return
    given = Path(language).expanduser()
    path = given / "language.pt" if given.is_dir() else given
    if (path.parent / "tokenizer").is_dir():
        _same_words(lab, PreTrainedTokenizerFast.from_pretrained(path.parent / "tokenizer"), str(path))
    _put(inner, _state(path, "language"), path)
    _put(head, _state(path, "head"), path)


def _same_words(lab: Lab, tokenizer: Any, name: str) -> None:
    if lab.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(
            f"the language model of {name} reads {len(tokenizer):,} pieces that are not the {len(lab.tokenizer):,} of "
            f"{lab.name!r}; start and language must share a tokenizer"
        )


def _state(path: Path, part: str) -> dict[str, Tensor]:
    """One module's weights from a training state ``{"modules": {name: state_dict}}``."""
    modules = read_state(path)["modules"]
    if part not in modules:
        raise CheckpointError(f"{path} holds {', '.join(modules)}; expected {part!r} among them")
    return modules[part]


def _put(module: nn.Module, state: Mapping[str, Tensor], source: Any) -> None:
    own = module.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise CheckpointError(
            f"the weights in {source} do not fit: {len(wrong)} missing, unexpected or misshapen, e.g. {wrong[0]}"
        )
    module.load_state_dict(state)


def _check(lab: Lab) -> None:
    config: Any = lab.model.config
    text, images = config.text_config, lab.processor.image_processor
    if text.model_type != "llama" or text.num_key_value_heads != text.num_attention_heads:
        raise OptionError(
            f"connectors are compared before a Llama with as many key heads as query heads, got {text.model_type!r}"
        )
    scaling = [tuple(map(float, values)) for values in (images.image_mean, images.image_std)]
    if any(
        max(abs(a - b) for a, b in zip(x, y, strict=True)) > 1e-6 for x, y in zip(scaling, (CLIP_MEAN, CLIP_STD), strict=True)
    ):
        raise OptionError(
            f"connectors are compared behind CLIP's scaling of pictures, got mean {scaling[0]} and std {scaling[1]}"
        )
    if config.vision_feature_select_strategy != "default":
        chosen = config.vision_feature_select_strategy
        raise OptionError(f"connectors are compared on patches alone, got vision_feature_select_strategy {chosen!r}")
