"""What a loaded model is: where it came from, its licence, its sizes, and why it runs as it does.

A card is plain data; `describe` is the text a person reads. Nothing here loads anything.
Licences are read from the YAML head of the folder's README (the hub's model card).

A short name for the exact weights of a model, so that a run is explained by the model that gave it.

Names, shapes and up to `SAMPLES` evenly spread values of every parameter are hashed, as float32.
The same checkpoint gives the same name in every process and on every device; a swapped connector
or one training step gives another. It is not a proof against forgery.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_lab.errors import CheckpointError
from llava_lab.models import layout
from llava_lab.models.connectors import Connector, spec

NOT_STATED = "not stated"

_NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc($|[-_ \d])|non-?commercial|research-only", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """One model's facts. `why` is the reason for device and dtype, decided once at loading."""

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
    model: nn.Module, *, name: str, source: str, fit: str, why: str, attention: str, folder: Path | None = None
) -> Card:
    """The card of a loaded model; `folder` is where its README may state licence and origin."""
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
    )


def connector_name(model: nn.Module) -> str:
    """LLaVA's name of the connector in place, read from its modules: ``linear``, ``mlp2x_gelu``, ..."""
    part = layout.connector_of(model)
    if isinstance(part, Connector):
        options = ", ".join(f"{name}={value}" for name, value in part.options.items() if value is not None)
        return f"{part.kind}({options})" if options else part.kind
    linears = sum(isinstance(module, nn.Linear) for module in part.modules())
    if type(part).__name__ not in ("LlavaMultiModalProjector", "LlavaNextMultiModalProjector"):
        return "linear" if isinstance(part, nn.Linear) else type(part).__name__
    return f"mlp{linears}x_{model.config.projector_hidden_act}"


def readme_head(folder: Path) -> dict[str, str]:
    """The simple ``key: value`` entries of README.md's YAML head; a list gives its first item."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    match = re.match(r"---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    entries: dict[str, str] = {}
    key = ""
    for line in match.group(1).splitlines() if match else []:
        if item := re.match(r"\s*-\s+(.+)", line):
            entries[key] = entries.get(key) or item.group(1).strip(" '\"")
        elif pair := re.match(r"(\w+):\s*(.*)", line):
            key, value = pair.groups()
            entries[key] = value.strip(" '\"")
    return entries


SAMPLES = 32  # values per parameter; the first and the last are always among them


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits over the parameters' names, shapes and sampled values."""
    digest = hashlib.sha256()
    samples = []
    if (named := spec(getattr(model, "config", None))) and named != ("mlp2x_gelu", {}):
        digest.update(repr((named[0], sorted(named[1].items()))).encode())  # equal weights may be joined differently
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            samples.append(_sample(_waiting(model, name) if parameter.is_meta else parameter))
        values = torch.cat(samples) if samples else torch.zeros(0)
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _waiting(model: nn.Module, name: str) -> torch.Tensor:
    """A weight that ``device_map`` keeps in main memory or on the disk until its layer runs (accelerate's hooks)."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if (kept := getattr(one, "weights_map", None)) is not None:
            return kept[leaf]
    raise CheckpointError(f"the weight {name} is nowhere: it has a shape and no values")


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)
    step = max(1, (flat.numel() - 1) // (SAMPLES - 1))
    return torch.cat([flat[::step][:SAMPLES], flat[-1:]]).float().cpu()  # parts of one model may live on different devices
