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
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from llava_lab.errors import CheckpointError, OptionError, one_line
from llava_lab.models import connectors, folders, layout
from llava_lab.models import folders as families
from llava_lab.models import folders as processors
from llava_lab.models.card import make_card
from llava_lab.models.formats import compact, original
from llava_lab.models.formats import original as original_config
from llava_lab.models.lab import Lab
from llava_lab.models.placement import Placement, choose_device

if TYPE_CHECKING:
    from llava_lab.remote import BlackBox

logger = logging.getLogger(__name__)

# Names with a prefix belong to another room; it is imported when one is given, and its `open_black_box` opens the name.
ELSEWHERE = {"openai:": "llava_lab.remote"}
_LISTED = 5  # names shown of a long list


@overload
def load(
    name: str | os.PathLike = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "sdpa",
    vision: original.Place = None,
    base: original.Place = None,
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
) -> Lab: ...


@overload
def load(name: str, *, base_url: str, **options: Any) -> BlackBox: ...


def load(
    name: str | os.PathLike = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "sdpa",
    vision: original.Place = None,
    base: original.Place = None,
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
    base_url: str | None = None,
    **options: Any,
) -> Lab | BlackBox:
    """Load a LLaVA by name: "tiny" (shipped), "smol", a local folder, or a hub id such as "llava-hf/llava-1.5-7b-hf".

    "tiny-linear" and "tiny-mlp" are of the shipped comparison of connectors: one tower, one language model to start from,
    the same short training, another connector; they ship as bytes (`llava_lab.models.formats.compact`).
    `device` and `dtype` None are chosen for the machine and the model's size; the card says why. Folders of the original
    LLaVA (``llava_llama``, LoRA, projector only) are read directly; `vision` is then the folder or hub id of the CLIP
    tower and `base` that of the language model, None: as their config names them. `device_map` ("auto") and
    `quantization_config` (8 or 4 bits, with bitsandbytes) go to transformers as they are; methods that need gradients
    or plain weights say so before they start.
    "openai:MODEL" with `base_url` is a closed model behind a server; its options are those of `open_black_box`.
    Raises CheckpointError (one line) for anything that cannot be loaded exactly as it was saved, OptionError.
    """
    for prefix, room in ELSEWHERE.items():
        if str(name).startswith(prefix):
            if device is not None or dtype is not None:
                raise OptionError(f"device and dtype are the server's own for {name!r}; leave them out")
            box: BlackBox = import_module(room).open_black_box(str(name).removeprefix(prefix), base_url, **options)
            return box
    if base_url is not None or options:
        given = ", ".join(["base_url"] * (base_url is not None) + list(options))
        raise OptionError(f"{given} belong to a model behind a server, {' or '.join(ELSEWHERE)}MODEL; got {str(name)!r}")
    if name == "smol":  # put together from parts, see there
        from llava_lab.models.formats.smol import open_smol

        return open_smol(device, dtype, _known_attention(attention))
    folder = folders.find(name)
    how = _how(device, device_map, quantization_config)
    packed = compact.is_compact(folder.path)
    placement, model, processor, source = _parts(folder, device, dtype, attention, how, {"vision": vision, "base": base})
    lab = families.family(model.config.model_type, folder.path).lab_class()(model, processor, name=folder.name)
    lab.card = make_card(
        model,
        name=folder.name,
        source=source,
        fit=lab.preprocessing.own,
        why=placement.why + (f"; stored as {compact.FORMAT.split(',')[0]}, with the shipped tower" if packed else ""),
        attention=attention,
        folder=folder.path,
    )
    if lab.card.non_commercial:
        logger.warning("%s has a non-commercial licence: %s", folder.name, lab.card.licence)
    return lab


def _parts(
    folder: folders.Folder, device: Any, dtype: Any, attention: str, how: dict[str, Any], beside: dict[str, original.Place]
) -> tuple[Placement, LlavaForConditionalGeneration, LlavaProcessor, str]:
    """Placement, model, processor and where they came from; `beside` are the folders an original LLaVA leans on."""
    path = folder.path
    if original_config.is_original(folders.read_json(path / "config.json")):
        with quiet():
            made = original.assemble(path, **beside)
            placement = choose_device(device, dtype, parameters=made.parameters)
            return placement, build_original(path, made, placement, attention, how), made.processor, made.source
    family = families.family_of(path)
    if any(place is not None for place in beside.values()):
        raise OptionError(f"vision and base belong to a folder of the original LLaVA; {path} is whole")
    placement, model = _whole(path, device, dtype, attention, how)
    with quiet():
        return placement, model, processors.build_processor(path, model, family), folder.source


def _whole(
    folder: Path, device: Any, dtype: Any, attention: str, how: dict[str, Any]
) -> tuple[Placement, LlavaForConditionalGeneration]:
    """A folder in the transformers format, or one of ours stored as bytes."""
    if compact.is_compact(folder):
        placement = choose_device(device, dtype, parameters=compact.count(folder))
        with quiet():
            model = _model(folder, _config(folder), placement, attention, {**how, "state_dict": compact.read(folder)})
        if (folder / "generation_config.json").is_file():  # transformers reads it only where it reads the weights
            model.generation_config = GenerationConfig.from_dict(folders.read_json(folder / "generation_config.json"))
        return placement, model
    files = folders.weight_files(folder)
    _check_spelling(folder, files)
    placement = choose_device(device, dtype, parameters=folders.count_parameters(files))
    with quiet():
        given = {**how, "use_safetensors": files[0].suffix == ".safetensors"}
        return placement, _model(folder, _config(folder), placement, attention, given)


def build_original(
    folder: Path, made: original.Assembled, placement: Placement, attention: str, how: dict[str, Any] | None = None
) -> LlavaForConditionalGeneration:
    """The model of an assembled original LLaVA. Raises CheckpointError for a missing, unexpected or misshapen weight."""
    given = {**(how or {}), "state_dict": made.weights}
    return _model(folder, made.config, placement, attention, given)


def _config(folder: Path) -> LlavaConfig:
    try:
        config = families.family_of(folder).config_class().from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a LLaVA ({one_line(error)})") from None
    try:
        if named := connectors.spec(config):
            with torch.device("meta"):
                connectors.build(named[0], connectors.sizes_of(config), named[1])
    except OptionError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return config


def _how(device: Any, device_map: Any, quantization_config: Any) -> dict[str, Any]:
    """What goes to transformers as the user gave it."""
    if device_map is not None and device is not None:
        raise OptionError("device and device_map both say where the model goes; give one of them")
    given = {"device_map": device_map, "quantization_config": quantization_config}
    return {name: value for name, value in given.items() if value is not None}


def _check_spelling(folder: Path, files: list[Path]) -> None:
    """Refuse a folder whose names follow two generations of transformers: one of two tensors would be dropped."""
    names = folders.weight_names(files)
    new = sorted(name for name in names if name.startswith("model."))
    old = sorted(name for name in names if name.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")))
    if new and old:
        raise CheckpointError(f"the weights in {folder} mix two spellings, for example {new[0]} and {old[0]}; expected one")


def _model(
    folder: Path, config: LlavaConfig, placement: Placement, attention: str, how: dict[str, Any]
) -> LlavaForConditionalGeneration:
    implementation = _known_attention(attention)
    try:
        with connectors.patched() if connectors.spec(config) else nullcontext():
            model, info = (
                families.family(config.model_type, folder)
                .model_class()
                .from_pretrained(
                    None if "state_dict" in how else folder,
                    config=config,
                    dtype=placement.dtype,
                    attn_implementation=implementation,
                    weights_only=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,  # so that they are reported by name, below
                    output_loading_info=True,
                    **how,
                )
            )
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the weights in {folder} are damaged or hold more than weights ({one_line(error)})") from None
    except ImportError as error:
        if asked := sorted({"device_map", "quantization_config"} & set(how)):
            raise OptionError(f"{' and '.join(asked)} cannot be used here ({one_line(error)})") from None
        raise OptionError(f"attention={attention!r} cannot be used here ({one_line(error)})") from None
    except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
        raise CheckpointError(f"{folder} cannot be loaded ({one_line(error)})") from None
    _check_weights(folder, info)
    if not hasattr(model, "hf_device_map") and not layout.is_quantized(model):  # else it is where it belongs
        model = model.to(placement.device)
    return model.eval().requires_grad_(False)


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


@contextmanager
def quiet() -> Iterator[None]:
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
