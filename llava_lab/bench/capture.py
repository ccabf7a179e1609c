"""What a map for every token of an answer costs, beside the answer alone and beside the peers' way.

The floor is the plain answer with sdpa; stock ``generate`` stands beside it. The peers' way is eager attention with
everything kept (``output_attentions=True``), then the head mean: over layers, as VLM-Visualizer draws it (without its
removal of the first token, so that the numbers can be compared), or multiplied through the layers to a rollout. Ours
are the same maps taken while the answer is made, and by one more forward of the finished answer.

Source of the peers' way: zjysteven/VLM-Visualizer ``utils.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import QUESTION, Call, Comparison, bench_lab, extra_memory, noise_picture, side_by_side, table

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lab.bench.harness import Measured
    from llava_lab.models import Lab

NEW_TOKENS = 32
FLOOR = "plain answer, sdpa"
STOCK = "stock generate, sdpa"
KEPT = "all attention kept, then averaged"
ROLLED = "all attention kept, then rollout"
DEFAULTS = "ours: rollout with its defaults, while answering"
ROLLOUT: Mapping[str, Any] = MappingProxyType({"residual": 0.5, "null": "none"})  # as the peers' is defined

Maps = np.ndarray  # (tokens, patches)


def measure(model: str, repeats: int) -> dict[str, Any]:
    """The rows of ``llava-lab bench capture``, each with its memory as a multiple of the floor's."""
    return result(side_by_side(COMPARISON, model, repeats))


def result(measured: Measured) -> dict[str, Any]:
    """The table, "memory_ratio" added."""
    made, floor = table(COMPARISON, measured), extra_memory(measured[FLOOR], None)
    for row in made["rows"]:
        own = extra_memory(measured[row["name"]], None)
        row["memory_ratio"] = own / floor if own and floor else None
    return made


def prepare(model: str, way: str) -> Call:
    """A model whose attention is eager where the weights are kept."""
    # the code of our methods is no part of what a way needs, nor are the weights
    import llava_lab.attribution  # noqa: F401

    lab = bench_lab(model)
    lab.model.set_attn_implementation("eager" if way in (KEPT, ROLLED) else "sdpa")
    return Call(lab, (lab, NEW_TOKENS), first=(lab, 2))


def _generate(lab: Lab, new: int, **options: Any) -> Any:
    import torch

    ids = torch.from_numpy(lab.sequence(QUESTION).token_ids)[None].to(lab.device)
    with torch.no_grad():
        return lab.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=lab.pixels(noise_picture()),
            do_sample=False,
            min_new_tokens=new,  # every way is given the same number of tokens
            max_new_tokens=new,
            suppress_tokens=[lab.image_id],
            pad_token_id=0,
            **options,
        )


def _stock(lab: Lab, new: int) -> Maps:
    _generate(lab, new)
    return np.zeros((0, 0))


def plain_answer(lab: Lab, new: int) -> Maps:
    """The answer alone; no maps."""
    lab.ask(noise_picture(), QUESTION, max_new_tokens=new)
    return np.zeros((0, 0))


def _kept(lab: Lab, new: int) -> Maps:
    steps = _generate(lab, new, return_dict_in_generate=True, output_attentions=True).attentions
    image = slice(*lab.sequence(QUESTION).segments["image"])
    maps = [sum(layer[0].float().mean(0)[-1] for layer in step) / len(step) for step in steps]
    return np.stack([row[image].cpu().numpy() for row in maps])


def _rolled(lab: Lab, new: int) -> Maps:
    import torch

    steps = _generate(lab, new, return_dict_in_generate=True, output_attentions=True).attentions
    start, stop = lab.sequence(QUESTION).segments["image"]
    prompt = steps[0][0].shape[-1]
    size = prompt + new - 1
    total = torch.eye(size, device=lab.device)
    for layer in range(len(steps[0])):
        # one square matrix from the prompt's rows and one row for each later step
        rows: list[Tensor] = [step[layer][0].float().mean(0) for step in steps]
        whole = torch.cat([torch.nn.functional.pad(part, (0, size - part.shape[-1])) for part in rows])
        total = (0.5 * whole + 0.5 * torch.eye(size, device=lab.device)) @ total
    return total[prompt - 1 :, start:stop].cpu().numpy()


def _during(method: str, **options: Any) -> Callable[[Lab, int], Maps]:
    def way(lab: Lab, new: int) -> Maps:
        from llava_lab.attribution import ask_and_attribute

        asked: dict[str, Any] = {"target": list(range(new)), "max_new_tokens": new}
        _, maps = ask_and_attribute(lab, noise_picture(), QUESTION, method=method, options=options, **asked)
        return maps.values.reshape(new, -1)

    return way


def _after(method: str, **options: Any) -> Callable[[Lab, int], Maps]:
    def way(lab: Lab, new: int) -> Maps:
        from llava_lab.attribution import attribute

        run = lab.ask(noise_picture(), QUESTION, max_new_tokens=new)
        return attribute(lab, run, method=method, target=list(range(new)), **options).values.reshape(new, -1)

    return way


COMPARISON = Comparison(
    name="capture",
    ways={
        FLOOR: plain_answer,
        STOCK: _stock,
        KEPT: _kept,
        "ours: attention while answering": _during("attention"),
        "ours: attention by one more forward": _after("attention"),
        ROLLED: _rolled,
        "ours: rollout while answering": _during("rollout", **ROLLOUT),
        DEFAULTS: _during("rollout"),
        "ours: rollout by one more forward": _after("rollout", **ROLLOUT),
    },
    prepare=prepare,
    floor=FLOOR,
    peer=lambda way: KEPT if way == KEPT or ": attention" in way else ROLLED,
    other_numbers=(DEFAULTS,),  # with defaults that the peers do not have
    counted=(FLOOR,),
    first_call_counts=True,
)
