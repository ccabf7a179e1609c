"""What every intervention shares: measure before, touch, prove, measure after, do the same at random, answer again.

An intervention is a `Plan`: context managers that touch the model, and the first position they change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from llava_lab.attribution.base import Targets
from llava_lab.attribution.occlusion_cached import AGREE
from llava_lab.attribution.occlusion_levels import PATIENCE
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError
from llava_lab.interventions.tail import Tail
from llava_lab.models.generation import Generated, generate
from llava_lab.models.words import decode
from llava_lab.results import Run
from llava_lab.results_interventions import Effect

if TYPE_CHECKING:
    from llava_lab.models import Lab

Enter = Callable[[], AbstractContextManager[Any]]
DRAWS = 20


@dataclass(frozen=True)
class Plan:
    """One intervention, ready to be carried out."""

    name: str
    what: str
    options: dict[str, Any]
    start: int  # the first position it changes
    enter: Enter
    prove: Callable[[dict[str, float]], AbstractContextManager[Any]]  # the same, checked; fills the proof
    controls: Sequence[Enter] = ()
    control_name: str = "none"
    notes: tuple[str, ...] = ()
    side: Callable[[], dict[str, Any]] = field(default=dict)  # what it does to other questions


def carry_out(lab: Lab, run: Run, targets: Targets, plan: Plan, *, seed: int, answer: bool = True) -> Effect:
    """Measure a plan. Ctrl-C during the random controls or the answering keeps what is done; earlier it is raised."""
    began = time.perf_counter()
    proof: dict[str, float] = {}
    drawn: list[np.ndarray] = []
    side: dict[str, Any]
    said, side, stopped, answered = "", {}, False, False
    with undisturbed(lab.model):
        tail = Tail(lab, run, targets, plan.start)
        before = tail.score().cpu().numpy()
        with plan.prove(proof):
            after = tail.score().cpu().numpy()
        try:
            for control in tqdm(plan.controls, desc=f"{plan.name} at random", unit="draw", delay=PATIENCE, leave=False):
                with control():
                    drawn.append(tail.score().cpu().numpy() - before)
            if answer:
                said, stopped = answer_under(lab, run, plan.enter, proof)
                answered = not stopped
            side = {} if stopped else plan.side()
        except KeyboardInterrupt:
            stopped = True
    notes = plan.notes
    if stopped:
        notes = (*notes, f"Interrupted after {len(drawn)} of {len(plan.controls)} random controls.")
    return Effect(
        name=plan.name,
        what=plan.what,
        options=plan.options,
        targets=targets,
        before=before,
        after=after,
        control=np.array(drawn, np.float32).reshape(len(drawn), len(targets)),
        control_name=plan.control_name,
        answer_before=run.answer,
        answer_after=said,
        answered=answered,
        proof=proof,
        side=side,
        map=run.map,
        model=run.model,
        fingerprint=run.fingerprint,
        seed=seed,
        passes={"forward": tail.passes + 1},
        seconds=time.perf_counter() - began,
        interrupted=stopped,
        notes=notes,
    )


def answer_under(lab: Lab, run: Run, enter: Enter, proof: dict[str, float] | None = None) -> tuple[str, bool]:
    """The answer under an intervention, token by token on a cache, and whether Ctrl-C ended it.

    With `proof` the finished answer is also given back in one whole forward, and its log-probabilities must be those
    of the steps: an intervention that is lost while decoding is refused. Adds ``decode_error``.
    """
    inputs = lab.inputs(run)
    prompt = inputs["input_ids"][:, : run.segments["answer"][0]]
    limit = min(int(run.options.get("max_new_tokens", 64)), lab.context - prompt.shape[1])
    with enter():
        found = generate(
            lab.model,
            prompt,
            inputs["pixel_values"],
            limit=max(limit, 1),
            eos=lab.eos_ids,
            image_id=lab.image_id,
            temperature=float(run.options.get("temperature", 0.0)),
            seed=run.seed,
        )
        if proof is not None and len(found.token_ids):
            proof["decode_error"] = _decoding_error(lab, prompt, inputs["pixel_values"], found)
    return decode(lab.tokenizer, found.token_ids.tolist()).strip(), found.stopped == "interrupted"


def _decoding_error(lab: Lab, prompt: torch.Tensor, pixels: torch.Tensor, found: Generated) -> float:
    new = torch.from_numpy(found.token_ids)[None].to(prompt.device)
    ids = torch.cat([prompt, new[:, :-1]], 1)
    keep = torch.arange(prompt.shape[1] - 1, ids.shape[1], device=prompt.device)
    model: Any = lab.model
    logits = model(input_ids=ids, pixel_values=pixels, use_cache=False, logits_to_keep=keep).logits[0]
    whole = logits.float().log_softmax(-1).gather(1, new[0][:, None])[:, 0].cpu().numpy()
    error = float((np.abs(whole - found.logprobs) / np.maximum(np.abs(found.logprobs), 1)).max())
    if not error <= AGREE.get(lab.dtype, 1e-3):
        raise LabError(
            f"expected the same log-probabilities token by token and in one forward, got a difference of {error:.3g}; "
            "the intervention is lost while decoding with this model's cache"
        )
    return error
