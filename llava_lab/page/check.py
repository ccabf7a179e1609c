"""The graphs asked as the page asks them, and compared with the model they were made from.

    proof = agreement(lab, engine(graphs))
    proof.same, proof.logits  # every token the same; the largest difference of a logit

`Engine` is what the page's ``engine.js`` does, over any three functions: ONNX sessions, or the torch modules themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llava_lab.capture import undisturbed
from llava_lab.errors import LabError
from llava_lab.page.graphs import NEEDS, Read, Say, See
from llava_lab.worlds.picturebook import ask_about, scene

if TYPE_CHECKING:
    from llava_lab.models import Lab

LEAST = float(np.finfo(np.float32).min)
LIMIT = 48  # tokens of an answer
TOLERANCE = 2e-3  # of a logit between the page's arithmetic and torch's: weights are rounded and sums ordered otherwise
SCENES = 6

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Answer:
    """What the graphs gave for one question. S positions: the prompt's and the answer's tokens but the last."""

    ids: Int[np.ndarray, " n"]
    logits: Float[np.ndarray, "n V"]  # that each token was chosen from
    states: Float[np.ndarray, "states S D"]
    attention: list[np.ndarray]  # row after row, (L, positions up to its own)
    sizes: Float[np.ndarray, "L S 2"]  # attention output, residual stream
    distance: float


@dataclass(frozen=True)
class Agreement:
    """How the graphs' answers compare with the model's, over `questions` of the drawn world."""

    questions: int
    tokens: int
    same: bool
    logits: float  # largest absolute difference over every answer token's whole row


class Engine:
    """A picture seen once, then questions answered token by token from a growing cache."""

    def __init__(self, see: Callable[..., Arrays], say: Callable[..., Arrays], read: Callable[..., Arrays]) -> None:
        self.see, self.say, self.read = see, say, read

    def answer(
        self, pixels: Float[np.ndarray, "1 3 S S"], prompt: Int[np.ndarray, " T"], *, eos: frozenset[int], image_id: int,
        kept: tuple[int, ...], limit: int = LIMIT,
    ) -> Answer:  # fmt: skip
        """Greedy, as `llava_lab.models.generation.generate`; `kept` is the cache's shape for one position."""
        picture, distance = self.see(pixels)
        cache = np.zeros((0, *kept), np.float32)
        ids, answer, rows, seen, states, sizes = prompt, [], [], [], [], []
        while True:
            new, past = len(ids), len(cache)
            mask = np.triu(np.full((new, past + new), LEAST, np.float32), past + 1)
            state, fresh, attention, size = self.say(ids, picture, cache, mask)
            cache = np.concatenate([cache, fresh])
            states.append(state)
            sizes.append(size)
            seen += [attention[:, row, : past + row + 1] for row in range(new)]
            (logits,) = self.read(state[-1, -1:])
            allowed = logits[0].copy()
            allowed[image_id] = -np.inf
            token = int(allowed.argmax())
            if token in eos:
                break
            answer.append(token)
            rows.append(logits[0])
            if len(answer) == limit:
                break
            ids = np.array([token], np.int64)
        return Answer(
            np.array(answer, np.int64),
            np.array(rows),
            np.concatenate(states, 1),
            seen,
            np.concatenate(sizes, 1),
            float(distance[0]),
        )


def engine(graphs: Mapping[str, bytes]) -> Engine:
    """ONNX files as an `Engine`, on one thread as in a page. Raises LabError where onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise LabError(f"{NEEDS} ({error})") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def call(name: str) -> Callable[..., Arrays]:
        session = onnxruntime.InferenceSession(graphs[name], options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        return lambda *given: tuple(session.run(None, dict(zip(names, given, strict=True))))

    return Engine(call("see"), call("say"), call("read"))


def torch_engine(lab: Lab) -> Engine:
    """The modules that `export` writes, before they are written."""

    def call(module: Any) -> Callable[..., Arrays]:
        def run(*given: np.ndarray) -> Arrays:
            with undisturbed(lab.model):
                out = module(*(torch.from_numpy(part) for part in given))
            return tuple(part.numpy() for part in (out if isinstance(out, tuple) else (out,)))

        return run

    return Engine(call(See(lab)), call(Say(lab)), call(Read(lab)))


def agreement(lab: Lab, graphs: Engine, *, scenes: int = SCENES) -> Agreement:
    """Ask the first `scenes` of the test split two questions and for a caption each, both ways."""
    largest, tokens, questions, same = 0.0, 0, 0, True
    for index in range(scenes):
        drawn = scene("test", index)
        picture = np.asarray(drawn.picture())
        pixels = lab.pixels(picture)
        asked = ask_about(drawn, np.random.default_rng(index), 2)
        for question in [*(one.text for one in asked), "Describe the picture."]:
            run = lab.ask(picture, question, max_new_tokens=LIMIT)
            given = ask(lab, graphs, pixels, run.question)
            logits = logits_of(lab, run)
            questions, tokens = questions + 1, tokens + len(logits)
            same = same and given.ids.tolist() == run.token_ids[slice(*run.segments["answer"])].tolist()
            if given.logits.shape == logits.shape:
                largest = max(largest, float(np.abs(given.logits - logits).max()))
    return Agreement(questions, tokens, same, largest)


def ask(lab: Lab, graphs: Engine, pixels: Tensor, question: str) -> Answer:
    """One question about a square of pixels, in the model's own prompt."""
    prompt = lab.sequence(question).token_ids
    kept = Say(lab).kept
    return graphs.answer(pixels.numpy(), prompt, eos=lab.eos_ids, image_id=lab.image_id, kept=kept)


def logits_of(lab: Lab, run: Any) -> Float[np.ndarray, "n V"]:
    """The model's own logits for each token of the answer."""
    start, stop = run.segments["answer"]
    with undisturbed(lab.model):
        return lab.model(**lab.inputs(run)).logits[0, start - 1 : stop - 1].numpy()
