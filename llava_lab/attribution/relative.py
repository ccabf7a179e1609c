"""Relative attention: the map for this question divided by the map for an instruction that asks for nothing special.

What draws attention whatever is asked (sinks, image tokens early in the sequence) is in both and cancels.
The second forward has the same picture and the same earlier turns, with the question replaced.

For the neutral side the authors read the position that predicts the answer's first token, and so does
``beside="cue"``; ``"answer"`` lets the model repeat this run's answer after the neutral instruction and
reads the very same words there, which also cancels what the answer's own words draw.

Where attention is sharp, most patches have next to none on either side, and the ratio of two such numbers
is noise that outshines everything. So both sides are first raised by `floor`: None is what each token would
get from uniform attention, and 0 is the authors' plain ratio.

Source: Zhang et al. 2025 (arXiv 2502.17422; saccharomycetes/mllms_know, ``rel_attention_llava``), which uses
the fifteenth of 32 layers, here ``layers=(14, 15)``, and the words "Write a general description of the image."
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.base import (
    Maps,
    Method,
    Targets,
    choose,
    number,
    predicting_rows,
    refuse_contrast,
    segment_mass,
    target_rows,
)
from llava_lab.attribution.heads import choose_heads, read_rows
from llava_lab.capture import FUSIONS
from llava_lab.errors import OptionError
from llava_lab.models.sequence import encode, refuse_special_text
from llava_lab.results import Run, Target

if TYPE_CHECKING:
    from llava_lab.models import Lab

NEUTRAL = "Describe the picture."
TINY = 1e-12  # added to both sides beside any floor; far below any attention that can matter


def ask_instead(lab: Lab, run: Run, neutral: str) -> Run:
    """`run` as if `neutral` had been asked and the same answer given; nothing is generated.

    For `Lab.inputs`: ids and segments are those of the new prompt, token texts and words stay the old ones.
    """
    if not isinstance(neutral, str) or not neutral.strip():
        raise OptionError(f"neutral must be an instruction in words, for example {NEUTRAL!r}; got {neutral!r}")
    neutral = neutral.strip()
    refuse_special_text(lab.tokenizer, neutral)
    at = run.prompt.rfind(run.question)
    assert at >= 0, (run.question, run.prompt)
    text = run.prompt[:at] + neutral + run.prompt[at + len(run.question) :]
    start, stop = run.segments["image"]
    sequence = encode(
        lab.tokenizer, text, neutral, image_id=lab.image_id, image_tokens=stop - start, history="history" in run.segments
    )
    first = len(sequence.token_ids)
    answer = run.token_ids[slice(*run.segments["answer"])]
    token_ids = np.concatenate([sequence.token_ids, answer])
    segments = {**sequence.segments, "answer": (first, len(token_ids))}
    return replace(run, question=neutral, prompt=text, token_ids=token_ids, segments=segments)


def ratio(rows: Float[Tensor, "N P"], beside: Float[Tensor, "N P"], floor: float) -> Float[Tensor, "N P"]:
    """One map over the other, both raised by `floor`, and safe where nobody looks."""
    return (rows + floor + TINY) / (beside + floor + TINY)


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    refuse_contrast("relative_attention", targets)
    chosen = choose_heads(lab, options["layers"], options["heads"])
    fusion = choose("fusion", options["fusion"], FUSIONS)
    same = choose("beside", options["beside"], ("cue", "answer")) == "answer"
    log = choose("scale", options["scale"], ("ratio", "log")) == "log"
    floor = 1 / len(run.token_ids) if options["floor"] is None else number("floor", options["floor"])
    other = ask_instead(lab, run, options["neutral"])
    at = predicting_rows(targets)
    rows = target_rows(read_rows(lab, lab.inputs(run), at, chosen, fusion).fused, at, targets)
    moved = tuple(_moved(target, run, other, same) for target in targets)
    there = predicting_rows(moved)
    beside = target_rows(read_rows(lab, lab.inputs(other), there, chosen, fusion).fused, there, moved)
    values = ratio(rows[:, slice(*run.segments["image"])], beside[:, slice(*other.segments["image"])], floor)
    extras = {"mass": segment_mass(rows, run), "neutral_mass": segment_mass(beside, other), "neutral": other.question}
    unit = "natural log of the ratio, 0 is" if log else "ratio, 1 is"
    where = "the same words of the answer" if same else "the first word of an answer"
    notes = (
        f"Attention of the predicting positions to {chosen}, {fusion} over heads, divided by the attention that predicts "
        f"{where} to {other.question!r}; {unit} no difference.",
        f"Both sides are raised by {floor:.1g} first, so that two patches nobody looks at do not make a ratio."
        if floor
        else "A patch that neither side looks at can have any ratio.",
    )
    shown = (torch.log(values) if log else values).cpu().numpy()
    return Maps(shown.reshape(len(targets), run.map.rows, run.map.cols), {"forward": 2}, notes, extras)


def _moved(target: Target, run: Run, other: Run, same: bool) -> Target:
    """The target's place in the neutral sequence."""
    first = other.segments["answer"][0]
    if not same:
        return replace(target, positions=(first - 1,))
    shift = first - run.segments["answer"][0]
    return replace(target, positions=tuple(position + shift for position in target.positions))


RELATIVE_ATTENTION = Method(
    name="relative_attention",
    truth="How much more the target's positions attend to each image token than they would under a neutral instruction.",
    source="Zhang et al. 2025, relative attention (mllms_know)",
    cost="2 forwards",
    blind_to="what any instruction would look at, what the values carry, and which word is predicted at a position",
    options={
        "neutral": NEUTRAL,
        "layers": None,
        "heads": None,
        "fusion": "mean",
        "beside": "cue",
        "floor": None,
        "scale": "ratio",
    },
    compute=_compute,
)
