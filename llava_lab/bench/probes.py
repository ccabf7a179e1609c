"""How fast and how small the logit lens is, beside a plain forward and beside the obvious way.

The obvious way keeps every hidden state (`output_hidden_states`), takes the softmax over the whole vocabulary at every
image token and state, and then the top words and the entropy. Its last state is not normed again, so that its numbers
are right and can be compared. Every way is measured on the model asked for and on a random one of LLaVA-1.5-7B's width,
vocabulary and 576 image tokens with few layers (`WIDE`), where memory shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import QUESTION, Call, Comparison, bench_lab, noise_picture, random_lab, side_by_side, table
from llava_lab.training.recipe import Architecture

if TYPE_CHECKING:
    from llava_lab.models import Lab
    from llava_lab.results import Run

WIDE = "7B shape, 2 layers"
VOCABULARY = 32064
TOP = 5
FLOOR = "plain forward"
OURS = "logit lens, every patch and state"
PEER = "output_hidden_states and a full softmax"

Best = np.ndarray  # (states, patches) probabilities of the likeliest word


def measure(model: str, repeats: int) -> dict[str, Any]:
    """The rows of ``llava-lab bench probes``, of `model` and of `WIDE`; the floor is that of `model`."""
    tables = [table(COMPARISON, side_by_side(COMPARISON, name, repeats), prefix=f"{name}: ") for name in (model, WIDE)]
    return {**tables[0], "rows": [row for made in tables for row in made["rows"]]}


def prepare(model: str, way: str) -> Call:
    """One answered question, and a plain forward done, which pays for what is prepared once."""
    # the code of our probes is no part of what a way needs, nor are the weights
    import llava_lab.probes  # noqa: F401

    lab = wide_lab() if model == WIDE else bench_lab(model)
    run = lab.ask(noise_picture(), QUESTION, max_new_tokens=1)
    _plain(lab, run)
    return Call(lab, (lab, run))


def wide_lab() -> Lab:
    """A random model with the language width, vocabulary and image tokens of LLaVA-1.5-7B, in its 16 bits; 1.4 GB."""
    import torch

    sizes = {"image": 336, "patch": 14, "vision_width": 256, "vision_heads": 8, "vision_mlp": 1024, "vision_layers": 2}
    shape = Architecture(**sizes, hidden=4096, layers=2, heads=32, mlp=11008, vocabulary=640, context=4096)
    return random_lab(shape, WIDE, vocabulary=VOCABULARY, dtype=torch.bfloat16)


def _plain(lab: Lab, run: Run) -> Best:
    from llava_lab.capture import undisturbed

    with undisturbed(lab.model):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    return np.zeros((0, 0))


def _ours(lab: Lab, run: Run) -> Best:
    from llava_lab.probes import logit_lens

    return logit_lens(lab, run, top=TOP).top_probs[..., 0]


def _peer(lab: Lab, run: Run) -> Best:
    """All states, all logits, all probabilities; entropy and the top words from those."""
    import torch

    from llava_lab.replay.words import final_norm

    norm, image = final_norm(lab), slice(*run.segments["image"])
    with torch.no_grad():
        out = lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1, output_hidden_states=True)
        states = [norm(state[0, image]) for state in out.hidden_states[:-1]] + [out.hidden_states[-1][0, image]]
        probs = lab.model.get_output_embeddings()(torch.stack(states)).float().softmax(-1)
        torch.special.entr(probs).sum(-1)
        return probs.topk(TOP).values[..., 0].cpu().numpy()


COMPARISON = Comparison(
    name="probes",
    ways={FLOOR: _plain, OURS: _ours, PEER: _peer},
    prepare=prepare,
    floor=FLOOR,
    peer=lambda way: PEER,
)
