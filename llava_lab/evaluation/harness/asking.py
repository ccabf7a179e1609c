"""What any harness asks of a lab: an answer under its settings, and how likely a given answer is.

said, run = answer(lab, [picture], "What is it?", settings={"max_new_tokens": 16, "until": ["\\n"]})
loss, greedy = continuation(lab, [picture], "What is it?", "a car")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from llava_lab.capture import evaluating
from llava_lab.checks import entry
from llava_lab.errors import OptionError
from llava_lab.models import Lab, layout
from llava_lab.models.generation import log_probs
from llava_lab.models.pictures import read_pictures
from llava_lab.models.text import IMAGE
from llava_lab.results import Run

# Settings of generation that change nothing at these values; others are refused, for a score made otherwise is another score.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"num_beams": (1,), "do_sample": (False, True), "use_cache": (True, False)}
TOKENS = 1024  # where a task names no limit, as the harnesses have it


@entry
def answer(lab: Lab, pictures: Sequence[Any], question: str, *, settings: Mapping[str, Any] | None = None) -> tuple[str, Run]:
    """The answer under a harness's `settings` (max_new_tokens, temperature, until, ...), and its run.

    Text from the first of `until` on is cut off, as harnesses do; `<image>` in the question is where the picture stands anyway.
    Raises OptionError for a setting that cannot be kept.

    >>> from llava_lab.evaluation.harness.asking import answer
    >>> answer(lab, [picture], "What color is the car?", settings={"max_new_tokens": 8, "until": ["red"]})[0]
    'The car is'
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    limit, temperature = given.pop("max_new_tokens", TOKENS), given.pop("temperature", 0)
    until, likeliest = given.pop("until", ()), given.pop("top_p", 1)
    for name, value in given.items():
        if value not in NEUTRAL.get(name, ()):
            raise OptionError(f"{name}={value!r} cannot be kept here; a task may set max_new_tokens, temperature and until")
    if not given.get("do_sample", True):
        temperature = 0
    if temperature and likeliest != 1:
        raise OptionError(f"top_p={likeliest!r} cannot be kept here; sample by temperature alone, or greedily")
    run = lab.ask(list(pictures) or None, _bare(question), max_new_tokens=limit, temperature=temperature)
    said = run.answer
    for mark in [until] if isinstance(until, str) else until:
        said = said.split(mark)[0] if mark else said
    return said.strip(), run


@entry
def continuation(lab: Lab, pictures: Sequence[Any], question: str, text: str) -> tuple[float, bool]:
    """The mean loss of `text` as the answer (nats a token, its tokens alone), and whether it is what the model would say.

    One forward. The end of the turn is no part of it.

    >>> from llava_lab.evaluation.harness.asking import continuation
    >>> loss, greedy = continuation(lab, [picture], "What color is the car?", "The car is red.")
    >>> loss < continuation(lab, [picture], "What color is the car?", "The car is blue.")[0], greedy
    (True, True)
    """
    if not text.strip():
        raise OptionError(f"expected an answer to score, got {text!r}")
    shown = read_pictures(list(pictures) or None)
    lab.check_pictures(len(shown))
    first = shown[0] if shown else None
    prompt = lab.sequence(_bare(question), picture=first, pictures=len(shown))
    space = "" if prompt.text[-1:].isspace() else " "
    whole, tokenizer = prompt.text + space + text.strip(), lab.tokenizer
    has_bos = bool(tokenizer.bos_token) and whole.startswith(tokenizer.bos_token)
    short = np.array(tokenizer(whole, add_special_tokens=not has_bos)["input_ids"], np.int64)
    ids = layout.expand_image(short, lab.image_id, lab.image_tokens(first) if shown else 0, len(shown))
    length = min(len(ids), len(prompt.token_ids))
    # where tokens grow together across the border, the first that differs is the answer's
    start = int(np.append(np.flatnonzero(ids[:length] != prompt.token_ids[:length]), length)[0])
    assert start < len(ids), (text, whole)
    if len(ids) > lab.context:
        raise OptionError(
            f"question and answer have {len(ids)} tokens and the model's context is {lab.context}; ask a shorter one"
        )
    parts = [lab.shown(picture) for picture in shown]
    seen = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    sequence = torch.from_numpy(ids)[None].to(lab.device)
    with evaluating(lab.model), torch.no_grad():
        logits = lab.model(input_ids=sequence, **seen, use_cache=False).logits[0, start - 1 : -1].float()
    own = sequence[0, start:]
    chances = log_probs(logits)
    loss = -float(chances.gather(1, own[:, None].to(chances.device)).mean())
    return loss, bool((logits.argmax(-1) == own).all())


def _bare(question: str) -> str:
    return question.replace(IMAGE, "").strip()
