"""Whether an answer's probabilities are those of the model, by one forward over the finished sequence."""

from __future__ import annotations

from typing import Any

import torch

from llava_lab.models import Lab
from llava_lab.results import Run
from tests.support.closeness import close


def probabilities_check_out(lab: Lab, run: Run, **options: Any) -> None:
    """The log-probabilities of `run` are those of teacher forcing, but for rounding: there the answer came from a cache."""
    with torch.no_grad():
        logits = lab.model(**lab.inputs(run, **options)).logits[0].float()
    at = run.answer_positions
    text = lab.model.config.text_config
    close(run.logprobs, logits.log_softmax(-1)[at - 1, run.token_ids[at]], terms=text.hidden_size * text.num_hidden_layers)
