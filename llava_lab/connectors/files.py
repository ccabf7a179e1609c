"""A connector or a whole lab on disk: LLaVA's own projector files, our folders, and folders for stock transformers.

    ll.write_projector(lab, "mm_projector.bin")
    ll.connector(lab, "mm_projector.bin")
    ll.export(lab, "for-serving")  # loads with stock transformers

LLaVA's files are ``mm_projector.bin`` of stage 1 and ``non_lora_trainables.bin`` of a LoRA run. Both are a ``torch.save`` of a
dict whose keys hold ``mm_projector.`` behind any prefix, and after it torch's own names: ``weight`` and ``bias`` for linear,
``0.weight``, ``2.weight``, ... for an MLP in a Sequential. The format has no room for what it was trained with, so that
stands beside it in a small JSON file, which LLaVA does not read.

`save` keeps the connector's type in config.json; `llava_lab.load` reads it back bit for bit, stock transformers does not know the
type. `export` rewrites what can be said exactly in the stock connector's two layers: a linear map becomes its own first layer,
the second being the identity and the activation "linear", with more parameters. It is for sharing and serving, not for training.

Source: haotian-liu/LLaVA @ c121f04 ``llava/model/llava_arch.py`` (get_w), ``train/train.py``, ``model/builder.py``.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_lab.checks import entry, regular_file
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, connectors, folders
from llava_lab.models.connectors import Connector
from llava_lab.models.formats import foreign
from llava_lab.models.swap import swapped, trained_beside
from llava_lab.models.weights import require_finite
from llava_lab.options import nearest
from llava_lab.results import whole_file

MARK = "mm_projector."
PLAIN_PREFIX, LORA_PREFIX = "model.", "base_model.model.model."
LORA_FILE = "non_lora_trainables.bin"

_IN_LIST = re.compile(r"(\d+)\.(weight|bias)")
_IN_LAYER = re.compile(r"linear_(\d+)\.(weight|bias)")


@entry
def write_projector(lab: Lab, path: str | os.PathLike) -> Path:
    """Write `lab`'s connector as LLaVA does; a path named ``non_lora_trainables.bin`` gets the LoRA run's key prefix.

    ``linear`` and ``mlp{N}x_gelu`` are written in names that LLaVA reads; the others, which LLaVA does not have, keep our
    own. A ``.json`` of the same name records the connector's type and the models it stands between. Returns the path.

    >>> ll.write_projector(lab, tmp / "mm_projector.bin").name
    'mm_projector.bin'
    """
    path = Path(path)
    kind, options = connectors.spec(lab.model.config) or (_stock_kind(lab), {})
    prefix = (LORA_PREFIX if path.name == LORA_FILE else PLAIN_PREFIX) + MARK
    module = lab.connector
    require_finite(module.state_dict().items(), f"the connector of {lab.name!r}")
    tensors = {prefix + _original(name, kind): value.detach().cpu().clone() for name, value in module.state_dict().items()}
    record = {"mm_projector_type": kind, "mm_projector_options": options, "trained_with": trained_beside(lab.model)}
    # by way of memory: torch's own writer has no words for a full disk
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    with whole_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


@entry
def read_projector(lab: Lab, path: str | os.PathLike, *, kind: str | None = None, **options: Any) -> Connector:
    """The connector in a projector file, for `lab`'s widths; the lab is left as it is.

    `kind` None is read from the record beside the file, or told from its keys (linear and MLPs). Keys may carry any
    prefix before ``mm_projector.``; other tensors in the file are left alone. Raises CheckpointError (one line) where
    the file is none, holds no projector, or one of other widths than the model has.

    >>> ll.read_projector(lab, ll.write_projector(lab, tmp / "mm_projector.bin")).kind
    'mlp2x_gelu'
    """
    path = Path(path)
    if kind is None and options:
        near = nearest(next(iter(options)), ("path", "kind"))
        meant = f"; did you mean {near!r}?" if near else ""
        raise OptionError(f"{', '.join(options)}: options are those of a kind of connector; give kind=... too{meant}")
    stored = _tensors(path)
    record = _record(path.with_suffix(".json"))
    if kind is None and record:
        kind, options = record["mm_projector_type"], record.get("mm_projector_options") or {}
    kind = kind or _kind_of(stored, path)
    sizes = connectors.sizes_of(lab.model.config)
    if _has_layers(kind):
        sizes = replace(sizes, bias=any(name.endswith("bias") for name in stored))
    tensors = {_ours(name, kind): value for name, value in stored.items()}
    if (kind.startswith("mlp") or kind == "linear2x") and "width" not in options:
        options = {**options, **_width(tensors, sizes)}
    with torch.random.fork_rng(devices=[]):
        made = connectors.build(kind, sizes, options, beside=("kind",))
    require_finite(stored.items(), str(path))
    _check_fit(made, tensors, path, kind)
    made.load_state_dict(tensors)
    made.trained_with = record.get("trained_with") if record else None
    return made.to(lab.device, lab.dtype).eval().requires_grad_(False)


def _check_fit(made: Connector, tensors: dict[str, Tensor], path: Path, kind: str) -> None:
    wanted = made.state_dict()
    if set(tensors) != set(wanted):
        raise CheckpointError(
            f"{path} does not hold a {kind}: expected the tensors {', '.join(_original(n, kind) for n in wanted) or 'none'}, "
            f"got {', '.join(_original(n, kind) for n in tensors) or 'none'}"
        )
    for name, value in wanted.items():
        if tensors[name].shape != value.shape:
            raise CheckpointError(
                f"{path} is for other widths: expected {_original(name, kind)} of {tuple(value.shape)} "
                f"({made.sizes.vision} vision, {made.sizes.language} language), got {tuple(tensors[name].shape)}"
            )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        foreign.check_archive(regular_file(path, CheckpointError))
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no such projector file: {path}") from None
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle makes torch raise
        raise CheckpointError(f"{path} is not a file of tensors ({type(error).__name__}); expected an mm_projector.bin") from None
    tensors = {
        name.split(MARK, 1)[1]: value
        for name, value in (data.items() if isinstance(data, dict) else ())
        if isinstance(name, str) and MARK in name and isinstance(value, Tensor)
    }
    foreign.check_stored(tensors, path)
    foreign.check_learnt({name: foreign.kind_of(value) for name, value in tensors.items()}, path)
    if not tensors and data != {}:
        keys = ", ".join(map(str, list(data)[:3])) if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path} holds no projector: expected keys with {MARK!r} in them, got {keys}")
    return tensors


def _record(path: Path) -> dict[str, Any] | None:
    """What `write_projector` wrote beside the file; another JSON file (a config) is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and "mm_projector_type" in data and "trained_with" in data else None


def _kind_of(stored: dict[str, Tensor], path: Path) -> str:
    if not stored:
        return "identity"
    if set(stored) <= {"weight", "bias"}:
        return "linear"
    numbers = sorted({int(match[1]) for name in stored if (match := _IN_LIST.fullmatch(name))})
    if all(_IN_LIST.fullmatch(name) for name in stored) and numbers == list(range(0, 2 * len(numbers), 2)):
        return f"mlp{len(numbers)}x_gelu"
    raise CheckpointError(
        f"{path} names its tensors {', '.join(sorted(stored)[:3])}; expected weight and bias (linear) or 0.weight, 2.weight, ... "
        "(mlp{N}x_gelu), else say kind=..."
    )


def _width(tensors: dict[str, Tensor], sizes: connectors.Sizes) -> dict[str, int]:
    """The option of layers that read what the tower gives, with another hidden width than the language model."""
    first = tensors.get("linear_1.weight")
    if first is None or first.ndim != 2 or first.shape[1] != sizes.vision or first.shape[0] == sizes.language:
        return {}
    return {"width": len(first)} if "linear_2.weight" in tensors else {}


def _has_layers(kind: str) -> bool:
    return kind == "linear" or kind.startswith("mlp")


def _original(name: str, kind: str) -> str:
    """``linear_2.weight`` as LLaVA has it: ``2.weight`` in a Sequential with activations, ``weight`` alone."""
    match = _IN_LAYER.fullmatch(name)
    if not _has_layers(kind) or match is None:
        return name
    return match[2] if kind == "linear" else f"{2 * (int(match[1]) - 1)}.{match[2]}"


def _ours(name: str, kind: str) -> str:
    if kind == "linear" and name in ("weight", "bias"):
        return f"linear_1.{name}"
    match = _IN_LIST.fullmatch(name)
    return f"linear_{int(match[1]) // 2 + 1}.{match[2]}" if _has_layers(kind) and match else name


def _stock_kind(lab: Lab) -> str:
    act = lab.model.config.projector_hidden_act
    if act == "linear":
        return "linear2x"
    if act != "gelu":
        raise OptionError(f"LLaVA's file format knows GELU between the layers only, {lab.name!r} has {act!r}")
    return "mlp2x_gelu"


EXPORTED = ("linear", "mlp1x_gelu", "mlp2x_gelu", "linear2x", "identity")


@entry
def save(lab: Lab, folder: str | os.PathLike) -> Path:
    """Write model, tokenizer and image processor; ``llava_lab.load(folder)`` gives them back bit for bit.

    Other files in `folder` stay; its own are replaced when all are written. Raises WriteError where they cannot be.

    >>> ll.load(ll.save(lab, tmp / "mine")).fingerprint == lab.fingerprint
    True
    """
    folder = Path(folder)
    require_finite(lab.model.state_dict().items(), repr(lab.name))
    with folders.whole_folder(folder, keep=True) as part:
        lab.model.save_pretrained(part)
        lab.processor.save_pretrained(part)
    return folder


@entry
def export(lab: Lab, folder: str | os.PathLike) -> Path:
    """Write a folder that stock ``LlavaForConditionalGeneration.from_pretrained`` loads, giving the same numbers.

    Possible for linear, mlp1x_gelu, mlp2x_gelu (as wide as the language model), linear2x and identity; raises OptionError for
    the others. The lab is left as it is.

    >>> sorted(path.suffix for path in ll.export(lab, tmp / "stock").glob("model*"))
    ['.safetensors']
    """
    module: Any = lab.connector
    if not isinstance(module, Connector):
        return save(lab, folder)
    if module.kind not in EXPORTED:
        raise OptionError(f"stock transformers has no {module.kind!r}; can be exported: {', '.join(EXPORTED)}")
    if width := module.options.get("width"):
        raise OptionError(
            f"stock transformers' connector has a hidden layer as wide as the language model, {module.sizes.language}; "
            f"this one has {width}; save keeps it"
        )
    stock = _as_stock(module, lab)
    stock.trained_with = {}  # type: ignore[assignment]
    with swapped(lab, stock):
        return save(lab, folder)


def _as_stock(module: Any, lab: Lab) -> nn.Module:
    """The stock connector with the same function."""
    config = copy.copy(lab.model.config)
    config.projector_hidden_act = "gelu" if module.kind == "mlp2x_gelu" else "linear"
    config.multimodal_projector_bias = module.sizes.bias
    with torch.random.fork_rng(devices=[]):
        stock: Any = connectors.STOCK(config)
    eye = torch.eye(module.sizes.language)
    with torch.no_grad():
        for number in (1, 2):
            mine, theirs = getattr(module, f"linear_{number}", None), getattr(stock, f"linear_{number}")
            theirs.weight.copy_(eye if mine is None else mine.weight)
            if theirs.bias is not None:
                theirs.bias.copy_(torch.zeros_like(theirs.bias) if mine is None else mine.bias)
    return stock.to(lab.device, lab.dtype).eval().requires_grad_(False)
