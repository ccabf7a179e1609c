"""load(name): a Lab from the shipped model, a folder, or a hub id, exactly as it was saved or not at all.

The concrete classes are used rather than the Auto ones, and the processor is put together from its
parts: starting is mostly importing. Nothing that comes with a checkpoint is executed: there is no
``trust_remote_code``, safetensors is preferred, and ``.bin`` is read with ``weights_only``.
Missing, unexpected and misshapen weights are errors; transformers itself only warns.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import compact, folders, layout, projectors
from llava_lab.models.card import make_card
from llava_lab.models.lab import Lab
from llava_lab.models.placement import Placement, choose_device

logger = logging.getLogger(__name__)

CLIP_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor")
LLAVA_PROCESSORS = ("LlavaImageProcessor",)

_LISTED = 5  # names shown of a long list


def load(
    name: str | os.PathLike = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "sdpa",
) -> Lab:
    """Load a LLaVA by name: "tiny" (shipped), a local folder, or a hub id such as "llava-hf/llava-1.5-7b-hf".

    "tiny-linear" and "tiny-mlp" are of the shipped comparison of connectors: one tower, one language model to start from,
    the same short training, another connector; they ship as bytes (`llava_lab.models.compact`).
    `device` and `dtype` None are chosen for the machine and the model's size; the card says why.
    Raises CheckpointError (one line) for anything that cannot be loaded exactly as it was saved.
    """
    folder = folders.find(name)
    _check_family(folder.path)
    packed = compact.is_compact(folder.path)
    files = [] if packed else folders.weight_files(folder.path)
    parameters = compact.count(folder.path) if packed else folders.count_parameters(files)
    placement = choose_device(device, dtype, parameters=parameters)
    with _quiet():
        config = _config(folder.path)
        if packed:
            model = _compact_model(folder.path, config, placement, attention)
        else:
            model = _model(folder.path, config, placement, attention, safetensors=files[0].suffix == ".safetensors")
        processor = build_processor(folder.path, model)
    lab = Lab(model, processor, name=folder.name)
    lab.card = make_card(
        model,
        name=folder.name,
        source=folder.source,
        fit=lab.preprocessing.own,
        why=placement.why + (f"; stored as {compact.FORMAT.split(',')[0]}, with the shipped tower" if packed else ""),
        attention=attention,
        folder=folder.path,
    )
    if lab.card.non_commercial:
        logger.warning("%s has a non-commercial licence: %s", folder.name, lab.card.licence)
    return lab


def build_processor(folder: Path, model: LlavaForConditionalGeneration) -> LlavaProcessor:
    """A LlavaProcessor from its parts: tokenizer.json, the PIL image processor, the chat template."""
    config: Any = model.config
    return LlavaProcessor(
        _image_processor(folder),
        _tokenizer(folder),
        patch_size=layout.processor_patch(model),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(layout.has_class_token(model)),
        chat_template=_chat_template(folder),
    )


def _check_family(folder: Path) -> None:
    config = folders.read_json(folder / "config.json")
    family = config.get("model_type")
    if "mm_vision_tower" in config:
        raise CheckpointError(
            f"{folder} is in the original LLaVA format (model_type {family!r}); "
            f"use its conversion for transformers, for example {folders.EXAMPLE!r}"
        )
    if family != "llava":
        raise CheckpointError(f"{folder} holds a model of type {family!r}; expected 'llava' (LlavaForConditionalGeneration)")


def _config(folder: Path) -> LlavaConfig:
    try:
        config = LlavaConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a LLaVA ({_one_line(error)})") from None
    try:
        if named := projectors.spec(config):
            with torch.device("meta"):
                projectors.build(named[0], projectors.sizes_of(config), named[1])
    except OptionError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return config


def _model(
    folder: Path,
    config: LlavaConfig,
    placement: Placement,
    attention: str,
    *,
    safetensors: bool,
    state: dict[str, torch.Tensor] | None = None,
) -> LlavaForConditionalGeneration:
    """The model of a folder; `state` are its weights where they do not lie there as transformers reads them."""
    implementation = _known_attention(attention)
    try:
        with projectors.patched() if projectors.spec(config) else nullcontext():
            model, info = LlavaForConditionalGeneration.from_pretrained(
                folder if state is None else None,
                config=config,
                state_dict=state,
                dtype=placement.dtype,
                attn_implementation=implementation,
                use_safetensors=safetensors,
                weights_only=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # so that they are reported by name, below
                output_loading_info=True,
            )
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the weights in {folder} are damaged or hold more than weights ({_one_line(error)})") from None
    except ImportError as error:
        raise OptionError(f"attention={attention!r} cannot be used here ({_one_line(error)})") from None
    except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
        raise CheckpointError(f"{folder} cannot be loaded ({_one_line(error)})") from None
    _check_weights(folder, info)
    return model.to(placement.device).eval().requires_grad_(False)


def _compact_model(folder: Path, config: LlavaConfig, placement: Placement, attention: str) -> LlavaForConditionalGeneration:
    model = _model(folder, config, placement, attention, safetensors=True, state=compact.read(folder))
    if (folder / "generation_config.json").is_file():  # transformers reads it only where it reads the weights
        model.generation_config = GenerationConfig.from_dict(folders.read_json(folder / "generation_config.json"))
    return model


def _check_weights(folder: Path, info: dict[str, Any]) -> None:
    """Refuse what transformers would load with only a warning: random, leftover or misshapen weights."""
    mismatched = [f"{name} {tuple(saved)} not {tuple(wanted)}" for name, saved, wanted in info["mismatched_keys"]]
    problems = [("missing", list(info["missing_keys"])), ("unexpected", list(info["unexpected_keys"])), ("misshapen", mismatched)]
    said = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems if names]
    if said or info.get("error_msgs"):
        said += [str(message) for message in info.get("error_msgs", [])]
        raise CheckpointError(f"the weights in {folder} do not fit its config.json; " + "; ".join(said))


def _known_attention(attention: str) -> str:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if attention not in known:
        raise OptionError(f"attention must be one of {', '.join(sorted(known))}, got {attention!r}")
    return attention


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer  # only a folder without tokenizer.json needs conversion

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({_one_line(error)})") from None


def _image_processor(folder: Path) -> Any:
    """The checkpoint's image processor in its Pillow form, which is what LLaVA itself used."""
    old = folder / "preprocessor_config.json"
    settings = folders.read_json(old) if old.is_file() else {}
    new = folder / "processor_config.json"
    if not settings and new.is_file():
        settings = folders.read_json(new).get("image_processor", {})
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    kind = kind.removesuffix("Pil").removesuffix("Fast")
    if not settings:
        raise CheckpointError(f"{folder} has no image processor settings; expected preprocessor_config.json")
    if kind in LLAVA_PROCESSORS:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
    elif kind in CLIP_PROCESSORS:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    else:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Processor.from_dict(settings)


def _chat_template(folder: Path) -> str | None:
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (template := folders.read_json(folder / name).get("chat_template")):
            return template
    jinja = folder / "chat_template.jinja"
    return jinja.read_text(encoding="utf-8") if jinja.is_file() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load report: what matters of them is raised as an error."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
