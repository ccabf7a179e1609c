"""The targets' logits as a function one can differentiate: of the pixels, of the tower's output, of the image tokens.

Gradient methods explain the *logit* of what was said, summed over the target's tokens (for a contrast, the
difference of the two words' logits), not its log-probability: the softmax would mix in every other word.
Places and fills are occlusion's own, so that a gradient times a step is comparable with the real step.
A model whose weights are quantised is refused before anything runs. It knows nothing about maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.attribution.base import Targets, predicting_rows
from llava_lab.attribution.fills import FILLS
from llava_lab.attribution.occlusion_levels import PLACES, embedded, open_level
from llava_lab.errors import CheckpointError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

AT = ("projector", "vision", "pixels")
WORDS = PLACES  # how each place is called in a note
QUANTISED = (
    "bitsandbytes",
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torchao",
    "auto_gptq",
    "gptqmodel",
    "awq",
)

Scores = Callable[[Float[Tensor, "B C Y X"]], Float[Tensor, "B N"]]


@dataclass(frozen=True)
class Point:
    """The picture at one place in the model, float32, and the targets' logits from there on."""

    value: Float[Tensor, "1 C Y X"]
    fill: Float[Tensor, "1 C Y X"]
    scores: Scores
    patch: int  # side of a patch in `value`: pixels, or one token
    passes: int  # pictures through the tower or the model that made the two

    def to_patches(self, values: Float[Tensor, "N C Y X"], grid: tuple[int, int]) -> Float[Tensor, "N rows cols"]:
        """The sum of `values` over everything that belongs to a patch."""
        (rows, cols), side = grid, self.patch
        planes = values.sum(1)[:, : rows * side, : cols * side]
        return planes.reshape(-1, rows, side, cols, side).sum((2, 4))


def open_point(lab: Lab, run: Run, targets: Targets, *, at: str, fill: str | None = None) -> Point:
    """The run at ``pixels``, ``vision`` (what the projector reads) or ``projector`` (the image tokens it gives).

    `fill` is one of `FILLS`; without it `Point.fill` is zero. Call it, and its `scores`, inside `capture.undisturbed`.
    """
    level = open_level(lab, run, targets, at=at, fill=fill or "mean", fills=FILLS)  # the mean costs no pass
    where = predicting_rows(targets)
    inputs = inputs_until(lab, run, where)
    keep = torch.tensor(where, device=lab.device)
    model: Any = lab.model

    def scores(batch: Tensor) -> Tensor:
        given: dict[str, Tensor] = {"attention_mask": inputs["attention_mask"].expand(len(batch), -1)}
        batch = batch.to(level.whole.dtype)
        if at == "pixels":
            given |= {"input_ids": inputs["input_ids"].expand(len(batch), -1), "pixel_values": batch}
        else:
            given["inputs_embeds"] = embedded(lab, run, level.tokens(batch))[:, : where[-1] + 1]
        return target_logits(model(**given, logits_to_keep=keep, use_cache=False).logits, where, targets)

    assert level.fill is not None
    filled = level.fill.float() if fill else torch.zeros_like(level.whole, dtype=torch.float32)
    return Point(level.whole.float(), filled, scores, level.patch, level.passes)


def gradients(scores: Float[Tensor, "B N"], value: Tensor) -> Float[Tensor, "B N ..."]:
    """The gradient of every target's score at `value` (B, ...), one way back each through the same graph."""
    count = scores.shape[1]
    found = [
        torch.autograd.grad(scores[:, target].sum(), value, retain_graph=target + 1 < count)[0].float() for target in range(count)
    ]
    return torch.stack(found, 1)


def target_logits(logits: Float[Tensor, "B Q V"], at: Sequence[int], targets: Targets) -> Float[Tensor, "B N"]:
    """Each target's logits, summed over its tokens, minus those of the word not said; `at` names the rows' positions."""
    where = {position: i for i, position in enumerate(at)}
    logits = logits.float()
    columns = []
    for target in targets:
        rows = [where[position] for position in target.positions]
        said = logits[:, rows, list(target.token_ids)].sum(1)
        columns.append(said - logits[:, rows, list(target.against_ids)].sum(1) if target.against_ids else said)
    return torch.stack(columns, 1)


def inputs_until(lab: Lab, run: Run, at: Sequence[int]) -> dict[str, Tensor]:
    """The run as model input, up to the last of the positions `at`: what comes after cannot matter to them."""
    inputs = lab.inputs(run)
    stop = max(at) + 1
    return {name: value if name == "pixel_values" else value[:, :stop] for name, value in inputs.items()}


def refuse_quantised(lab: Lab, method: str) -> None:
    """Raise CheckpointError when the model's weights cannot carry a gradient."""
    kind = _quantisation(lab.model)
    if kind:
        raise CheckpointError(
            f"method {method!r} needs gradients and {lab.name!r} is quantised ({kind}); load it unquantised, for example with "
            "dtype='bfloat16', or use a method without gradients such as 'rollout' or 'occlusion'"
        )


def _quantisation(model: nn.Module) -> str:
    """What quantised the model's weights; empty when nothing did."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None or getattr(model, "hf_quantizer", None) is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        return str(getattr(method, "value", method) or "by transformers")
    odd = next((parameter.dtype for parameter in model.parameters() if not parameter.dtype.is_floating_point), None)
    if odd is not None:
        return str(odd).removeprefix("torch.")
    homes = (type(module).__module__ for module in model.modules())
    return next((home.split(".")[0] for home in homes if home.startswith(QUANTISED)), "")
