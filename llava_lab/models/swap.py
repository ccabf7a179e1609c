"""Put another connector into a loaded model, with everything that must follow: config, grid, transform, card.

The module alone would not do: a model that says ``mlp2x_gelu`` and holds one linear layer saves a checkpoint that nobody can
load, and a pooled one would be asked with the wrong number of image tokens. `Swap` changes all of it together and takes all of it
back.

    with swapped(lab, connector):
        lab.ask(picture, question)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_lab.checks import undoing
from llava_lab.errors import OptionError
from llava_lab.models import connectors, layout
from llava_lab.models.card import connector_name, fingerprint
from llava_lab.models.connectors import Connector

if TYPE_CHECKING:
    from llava_lab.models.lab import Lab

_ENTRIES = (connectors.TYPE, connectors.OPTIONS, "image_seq_length", "projector_hidden_act", "multimodal_projector_bias")
_ACTS = ("gelu", "linear", "quick_gelu", "gelu_pytorch_tanh", "relu", "silu")


class ForeignConnector(UserWarning):
    """A connector meets a language model or vision tower it was not trained with, or it is not known whether it was.

    >>> issubclass(ll.ForeignConnector, UserWarning)
    True
    """


@contextmanager
def swapped(lab: Lab, module: nn.Module) -> Iterator[Lab]:
    """Inside the block `lab` has another connector; afterwards everything is as it was, also after an exception."""
    swap = Swap(lab, module)
    with undoing(swap.undo):
        swap.apply()
        yield lab


class Swap:
    """A connector change that can be taken back: `apply`, then `undo`."""

    def __init__(self, lab: Lab, module: nn.Module) -> None:
        """Check that `module` fits; nothing is changed yet. Raises OptionError (one line) where it does not."""
        self.lab, self.before = lab, layout.connector_of(lab.model)
        self.same = module is self.before
        self._check(module)
        self.module = module if self.same else _beside(module, self.before, lab)
        config = lab.model.config
        self._entries = {name: vars(config).get(name, ...) for name in _ENTRIES}
        self._lab = {name: getattr(lab, name) for name in ("grid", "preprocessing", "card")}
        self._patch_size = lab.processor.patch_size

    def apply(self) -> None:
        """Put the connector in. Where it meets another model than it learnt beside, say so (`ForeignConnector`)."""
        if self.same:
            return
        try:
            config: Any = self.lab.model.config
            layout.replace_connector(self.lab.model, self.module)
            for name, value in _entries(self.module).items():
                _set(config, name, value)
            config.image_seq_length = layout.image_token_count(self.lab.model)
            self.lab.measure()
            old, new = (sum(parameter.numel() for parameter in part.parameters()) for part in (self.before, self.module))
            self.lab.card = replace(
                self._lab["card"],
                connector=connector_name(self.lab.model),
                parameters=self._lab["card"].parameters - old + new,
                image_tokens=config.image_seq_length,
            )
            warn_if_foreign(self.lab, self.module)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Everything as it was before `apply`."""
        if self.same:
            return
        layout.replace_connector(self.lab.model, self.before)
        for name, value in self._entries.items():
            _set(self.lab.model.config, name, value)
        for name, value in self._lab.items():
            setattr(self.lab, name, value)
        self.lab.processor.patch_size = self._patch_size

    def _check(self, module: Any) -> None:
        if not isinstance(module, (Connector, connectors.STOCK)):
            raise OptionError(
                f"a connector is one of llava_lab's or the stock {connectors.STOCK.__name__}, got {type(module).__name__}; "
                "make one with llava_lab.new_connector"
            )
        want = connectors.sizes_of(self.lab.model.config)
        if isinstance(module, Connector):
            got, grid = (module.sizes.vision, module.sizes.language), module.sizes.grid
        else:
            got, grid = (module.linear_1.in_features, module.linear_2.out_features), want.grid
        if got != (want.vision, want.language):
            raise OptionError(
                f"expected a connector from width {want.vision} to width {want.language}, as {self.lab.name!r} has them; "
                f"got one from {got[0]} to {got[1]}"
            )
        if isinstance(module, Connector) and connectors.architecture(module.kind).mixes and grid != want.grid:
            raise OptionError(f"expected a connector for {want.grid[0]}x{want.grid[1]} patches, got one for {grid[0]}x{grid[1]}")


def trained_beside(model: nn.Module) -> dict[str, str]:
    """The fingerprints of the language model and the vision tower that a connector works between."""
    return {"language": fingerprint(layout.language_model(model)), "vision": fingerprint(layout.vision_tower(model))}


def warn_if_foreign(lab: Lab, module: nn.Module) -> None:
    """Warn where an ablation would be invalid: the connector learnt beside other weights, or it is not known beside which."""
    record = getattr(module, "trained_with", None)
    if record == {}:
        return
    if record is None:
        warnings.warn(
            f"nothing records which language model this connector was trained with, so it cannot be checked against "
            f"{lab.name!r}; a connector speaks to its own language model only",
            ForeignConnector,
            stacklevel=4,
        )
        return
    here = trained_beside(lab.model)
    names = {"language": "language model", "vision": "vision tower"}
    other = [f"another {names[part]} ({record[part]}, here {here[part]})" for part in names if record.get(part) != here[part]]
    if other:
        warnings.warn(
            f"this connector was trained with {' and '.join(other)}: what changes under it is not the connector's doing alone",
            ForeignConnector,
            stacklevel=4,
        )


def _entries(module: nn.Module) -> dict[str, Any]:
    """The config entries that describe a connector; ``...`` is an entry that must not be there."""
    if isinstance(module, Connector):
        return {
            connectors.TYPE: module.kind,
            connectors.OPTIONS: dict(module.options),
            "multimodal_projector_bias": module.sizes.bias,
        }
    from transformers.activations import ACT2FN

    act: Any = module.act
    name = next((name for name in _ACTS if type(ACT2FN[name]) is type(act) and repr(ACT2FN[name]) == repr(act)), None)
    if name is None:
        raise OptionError(f"the connector's activation must be one of {', '.join(_ACTS)}, got {type(act).__name__}")
    bias = module.linear_1.bias is not None  # type: ignore[union-attr]
    return {connectors.TYPE: ..., connectors.OPTIONS: ..., "projector_hidden_act": name, "multimodal_projector_bias": bias}


def _set(config: Any, name: str, value: Any) -> None:
    if value is ...:
        vars(config).pop(name, None)
    else:
        setattr(config, name, value)


def _beside(module: nn.Module, before: nn.Module, lab: Lab) -> nn.Module:
    """The module where the model is and in its type; a copy when it has to be moved, so that another model keeps its own."""
    place = next(before.parameters(), None)
    device, dtype = (lab.device, lab.dtype) if place is None else (place.device, place.dtype)
    if all(p.device == device and p.dtype == dtype for p in module.parameters()):
        return module
    with torch.no_grad():
        return copy.deepcopy(module).to(device=device, dtype=dtype)
