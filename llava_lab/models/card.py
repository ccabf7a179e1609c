"""What a loaded model is: where it came from, its licence, its sizes, why it runs as it does, and a short name for its weights.

A card is plain data; `describe` is the text a person reads. Licence and origin come from the YAML head of the folder's README
(the hub's model card).

    print(ll.load("tiny").card.describe())

The fingerprint names the exact weights, so that a run is explained by the model that gave it. Names, shapes and up to `SAMPLES`
evenly spread values of every parameter are hashed, as float32. The same checkpoint gives the same name in every process and on
every device; a swapped connector or one training step gives another. It is not a proof against forgery.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_lab.checks import reading
from llava_lab.errors import CheckpointError
from llava_lab.models import layout
from llava_lab.models.connectors import Connector, spec

HEAD = 65_536  # characters of a README in which its head must end
NOT_STATED = "not stated"
SAMPLES = 32  # values per parameter in a fingerprint; the first and the last are always among them
STOCK_SPEC: tuple[str, dict[str, Any]] = ("mlp2x_gelu", {})  # what the stock connector is called where it is named

_NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc($|[-_ \d])|non-?commercial|research-only", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """One model's facts. `why` is the reason for device and dtype, decided once at loading.

    >>> lab.card.image_tokens
    144
    """

    name: str
    source: str  # folder, or hub id with its revision
    licence: str
    origin: str  # what it was made from, as its own card says
    parameters: int
    vision: str
    connector: str  # LLaVA's own name: linear, mlp2x_gelu, ...
    language: str
    image_tokens: int
    fit: str  # the checkpoint's own way to make a square
    device: str
    dtype: str
    why: str
    attention: str
    # one sentence: what it was trained on, in which languages, for which kinds of questions
    knows: str = NOT_STATED

    @property
    def non_commercial(self) -> bool:
        return bool(_NON_COMMERCIAL.search(self.licence))

    def describe(self) -> str:
        """One fact a line, aligned, for a terminal."""
        rows = {name.replace("_", " "): value for name, value in self.to_dict().items()}
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}"
                         for name, value in rows.items())  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_card(
    model: nn.Module,
    *,
    name: str,
    source: str,
    fit: str,
    why: str,
    attention: str,
    folder: Path | None = None,
    knows: str | None = None,
) -> Card:
    """The card of a loaded model; `folder` is where its README may state licence, origin and what it `knows`."""
    config: Any = model.config
    head = readme_head(folder) if folder else {}
    vision, text = config.vision_config, config.text_config
    parameter = next(model.parameters())
    return Card(
        name=name,
        source=source,
        licence=" ".join(filter(None, (head.get("license"), head.get("license_name")))) or NOT_STATED,
        origin=head.get("base_model") or NOT_STATED,
        parameters=sum(p.numel() for p in model.parameters()),
        vision=f"{vision.model_type}, {vision.num_hidden_layers} layers x {vision.hidden_size}, "
        f"{vision.image_size} px in patches of {vision.patch_size}, feature layer {config.vision_feature_layer}",
        connector=connector_name(model),
        language=f"{text.model_type}, {text.num_hidden_layers} layers x {text.hidden_size}, "
        f"{text.num_attention_heads} heads, {text.vocab_size} words",
        image_tokens=layout.image_token_count(model),
        fit=fit,
        device=str(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        why=why,
        attention=attention,
        knows=knows or head.get("knows") or NOT_STATED,
    )


def connector_name(model: nn.Module) -> str:
    """LLaVA's name of the connector in place, read from its modules: ``linear``, ``mlp2x_gelu``, ..."""
    connector = layout.connector_of(model)
    if isinstance(connector, Connector):
        options = ", ".join(f"{name}={value}" for name, value in connector.options.items() if value is not None)
        return f"{connector.kind}({options})" if options else connector.kind
    linears = sum(isinstance(module, nn.Linear) for module in connector.modules())
    if type(connector).__name__ not in ("LlavaMultiModalProjector", "LlavaNextMultiModalProjector"):
        return "linear" if isinstance(connector, nn.Linear) else type(connector).__name__
    return f"mlp{linears}x_{model.config.projector_hidden_act}"


def readme_head(folder: Path) -> dict[str, str]:
    """The simple ``key: value`` entries of README.md's YAML head; a list gives its first item."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    with reading(readme, "r", encoding="utf-8", errors="replace") as file:
        first, *lines = file.read(HEAD).splitlines() or [""]
    stop = next((number for number, line in enumerate(lines) if line.startswith("---")), 0)
    entries: dict[str, str] = {}
    key = ""
    for line in lines[:stop] if first.rstrip() == "---" else []:
        if item := re.match(r"\s*-\s+(.+)", line):
            entries[key] = entries.get(key) or item.group(1).strip(" '\"")
        elif pair := re.match(r"(\w+):\s*(.*)", line):
            key, value = pair.groups()
            entries[key] = value.strip(" '\"")
    return entries


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits over the names, shapes and sampled values of a model's parameters, and its connector's kind."""
    named = spec(getattr(model, "config", None))
    # equal weights may be joined differently; the stock connector has no entry, and ours of the same kind is the same
    kind = "" if named in (None, STOCK_SPEC) else repr((named[0], sorted(named[1].items())))
    parameters = ((name, _waiting(model, name) if value.is_meta else value) for name, value in model.named_parameters())
    return _digest(parameters, kind)


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """The same over weights by name, without a model."""
    return _digest(sorted(weights.items()), "")


def _digest(parameters: Iterable[tuple[str, Tensor]], kind: str) -> str:
    digest = hashlib.sha256(kind.encode())
    samples = [torch.zeros(0)]
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, (flat.numel() - 1) // (SAMPLES - 1))
        # parts of one model may live on different devices
        samples.append(torch.cat([flat[::step][:SAMPLES], flat[-1:]]).float().cpu())
    digest.update(torch.cat(samples).numpy().tobytes())
    return digest.hexdigest()[:16]


def _waiting(model: nn.Module, name: str) -> Tensor:
    """A weight that ``device_map`` keeps in main memory or on the disk until its layer runs (accelerate's hooks)."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if (weights := getattr(part, "weights_map", None)) is not None:
            return weights[leaf]
    raise CheckpointError(f"the weight {name} is nowhere: it has a shape and no values")
