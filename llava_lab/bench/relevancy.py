"""How fast and how small gradient-weighted relevancy is, beside plain answering and beside the peers' way.

Every way answers the same question with the same number of tokens first, and that is part of its time; the floor is
that answer alone. The peers' way is lvlm-interpret's, re-stated on today's transformers: eager attention, the
graph of every step kept, one backward per token over it, whole ``S x S`` products. It is measured as it is, with
weights that ask for gradients because nobody told them not to, and with that mistake mended.

Source of the peers' way: IntelLabs/lvlm-interpret @ e87dcf8 ``utils_model.py``, ``utils_relevancy.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.capture import plain_answer
from llava_lab.bench.harness import QUESTION, Call, Comparison, bench_lab, noise_picture, side_by_side, table

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lab.models import Lab

NEW_TOKENS = 32
FLOOR = "plain answer"
WHOLE = "ours: one map for the whole answer"
EXACT = "ours: one map per token, exact"
PEER = "lvlm-interpret's way, as it is"

Maps = np.ndarray  # (maps, patches)


def measure(model: str, repeats: int) -> dict[str, Any]:
    """The rows of ``llava-lab bench relevancy``."""
    return table(COMPARISON, side_by_side(COMPARISON, model, repeats))


def prepare(model: str, way: str) -> Call:
    """A model with eager attention for the peers' way, and weights that ask for gradients where that is the mistake."""
    # the code of our methods is no part of what a way needs, nor are the weights
    import llava_lab.attribution  # noqa: F401

    lab = bench_lab(model)
    if way.startswith("lvlm-interpret"):
        lab.model.set_attn_implementation("eager")
        lab.model.requires_grad_(way == PEER)
    return Call(lab, (lab, NEW_TOKENS), first=(lab, 1))


def _ours(target: Callable[[int], Any], **options: Any) -> Callable[[Lab, int], Maps]:
    def way(lab: Lab, new: int) -> Maps:
        from llava_lab.attribution import attribute

        run = lab.ask(noise_picture(), QUESTION, max_new_tokens=new)
        values = attribute(lab, run, method="relevancy", target=target(new), **options).values
        return values.reshape(len(values), -1)

    return way


def _peer(lab: Lab, new: int) -> Maps:
    """Generation with gradients, every step's attentions and graph kept; then a backward and a product per token."""
    import torch

    ids = torch.from_numpy(lab.sequence(QUESTION).token_ids)[None].to(lab.device)
    start, stop = lab.sequence(QUESTION).segments["image"]
    inputs: dict[str, Any] = {"input_ids": ids, "pixel_values": lab.pixels(noise_picture()).requires_grad_()}
    steps, maps = [], []
    with torch.enable_grad():
        for _ in range(new):
            out = lab.model(**inputs, use_cache=True, output_attentions=True, logits_to_keep=1)
            for attention in out.attentions:
                attention.retain_grad()
            scores = out.logits[0, -1].float()
            token = scores.detach().index_fill(0, torch.tensor([lab.image_id], device=scores.device), -torch.inf).argmax()
            steps.append((scores[token], out.attentions))
            inputs = {"input_ids": token.view(1, 1), "past_key_values": out.past_key_values}
        earlier: list[Tensor] = []
        for score, attentions in steps:
            lab.model.zero_grad()
            score.backward(retain_graph=True)
            row = _their_rules(attentions, earlier)
            maps.append((row / row.sum())[start:stop].cpu().numpy())
    return np.stack(maps)


def _their_rules(attentions: tuple[Tensor, ...], earlier: list[Tensor]) -> Tensor:
    """Rules 5 and 6 over whole matrices, their upper rows from earlier steps; the last row, without its one."""
    import torch

    total = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for layer, attention in enumerate(attentions):
        assert attention.grad is not None
        cam = (attention.grad[0].float() * attention[0].detach().float()).clamp_min(0).mean(0)
        if len(earlier) > layer:
            cam = torch.cat([torch.nn.functional.pad(earlier[layer], (0, 1)), cam])
            earlier[layer] = cam
        else:
            earlier.append(cam)
        total += cam @ total
    row = total[-1].clone()
    row[-1] -= 1
    return row


COMPARISON = Comparison(
    name="relevancy",
    ways={
        FLOOR: plain_answer,
        WHOLE: _ours(lambda new: "answer"),
        EXACT: _ours(lambda new: list(range(new))),
        "ours: one map per token, its maps": _ours(lambda new: list(range(new)), variant="lvlm-interpret"),
        PEER: _peer,
        "lvlm-interpret's way, weights frozen": _peer,
    },
    prepare=prepare,
    floor=FLOOR,
    peer=lambda way: PEER,
    other_numbers=(WHOLE, EXACT),
    counted=(WHOLE,),
    first_call_counts=True,
)
