"""Sanity checks: destroy what a map should depend on, and see whether the map notices.

*Model*: the weights are shuffled from the top down, one group of layers after the other (language model from its
last layer to its first, then the connector, then the vision tower), and the map of the same answer is made
again. A map that survives shows the picture or the architecture, not what the model learned.
*Question*: the same answer is put after another question. A map that survives does not depend on what was asked;
whatever it shows, it cannot say why *this* question got this answer.

Similarity to an unrelated map is not 0 when maps are smooth, so two controls stand beside the curve: random
maps, and the map itself moved, mirrored and turned at random. Passing is necessary, not sufficient: it says that a
map depends on the model, not that it is right (`faithfulness` asks that).

Source: Adebayo et al. 2018 (arXiv 1810.03292); label randomisation there retrains the model on random labels, here
the question plays that part, because an answer means something else after another question.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from llava_lab.attribution import similarity
from llava_lab.attribution.base import Targets, whole_number
from llava_lab.attribution.registry import attribute
from llava_lab.attribution.shuffling import parts_from_top, weights_put_back
from llava_lab.attribution.targets import Wanted, resolve_targets
from llava_lab.errors import OptionError
from llava_lab.models.sequence import encode, pieces, refuse_special_text
from llava_lab.results import Relevance, Run
from llava_lab.scores_sanity import Sanity

if TYPE_CHECKING:
    from llava_lab.models import Lab

TESTS = ("model", "question")
OTHERS = ("How many things are there?", "What is the weather like?", "Who took this picture?")  # one is asked instead
TOP = 0.1  # share of the patches whose overlap is measured
DRAWS = 200  # control maps of each kind
PATIENCE = 2.0  # seconds before a progress bar appears
STOPPED = "Interrupted"  # how a map's note begins when Ctrl-C ended its sweep early


def sanity(
    lab: Lab,
    run: Run,
    method: str = "rollout",
    *,
    target: Wanted = None,
    options: Mapping[str, Any] | None = None,
    tests: Sequence[str] = TESTS,
    groups: int = 8,
    questions: Sequence[str] | None = None,
    structure: bool = False,
    seed: int = 0,
) -> Sanity:
    """Whether `method`'s map of this answer changes when the model is randomised and when the question is another.

    `options` are the method's own. `tests` may leave one of the two out. The language model is shuffled in at
    most `groups` steps. `questions` are asked instead of the run's; None takes its own words shuffled and one
    about something else. `structure` adds the structural similarity (SSIM). Cost: a map per step and question.
    Interrupting (KeyboardInterrupt) gives the finished part; the weights are put back bitwise in any case, from a
    copy in main memory (see `shuffling`).

    Raises OptionError, TargetError, CheckpointError as `attribute` does.
    """
    tests = _tests(tests)
    groups, seed = whole_number("groups", groups, least=1), whole_number("seed", seed)
    targets = resolve_targets(lab, run, target)
    start = time.perf_counter()
    how = {"method": method, **dict(options or {})}
    asked = _questions(run, questions, seed) if "question" in tests else ()
    others = [(text, *_instead(lab, run, targets, text)) for text in asked]
    steps = parts_from_top(lab.model, groups) if "model" in tests else []
    found = _Found(_map(lab, run, targets, how), len(others) + len(steps))
    with tqdm(total=found.wanted, desc=f"sanity of {method}", unit="map", delay=PATIENCE, leave=False) as progress:
        try:
            for text, other, moved in others:
                found.questions[text] = _map(lab, other, moved, how)
                progress.update()
            with weights_put_back(seed) as shuffle:
                for name, parameters in steps:
                    shuffle(parameters)
                    found.steps[name] = _map(lab, replace(run, fingerprint=lab.fingerprint), targets, how)
                    progress.update()
        except KeyboardInterrupt:
            if not found.done:
                raise
    return found.result(run, structure, seed, time.perf_counter() - start)


def with_question(lab: Lab, run: Run, question: str) -> Run:
    """The run with another question before the same answer. What the model thinks of it is not known: logprobs are NaN."""
    question = question.strip()
    if not question:
        raise OptionError("expected a question to ask instead, got empty text")
    refuse_special_text(lab.tokenizer, question)
    at = run.prompt.rfind(run.question)
    prompt = run.prompt[:at] + question + run.prompt[at + len(run.question) :]
    patches, earlier = run.map.rows * run.map.cols, "history" in run.segments
    sequence = encode(lab.tokenizer, prompt, question, image_id=lab.image_id, image_tokens=patches, history=earlier)
    start, stop = run.segments["answer"]
    token_ids = np.concatenate([sequence.token_ids, run.token_ids[start:stop]])
    moved = len(sequence.token_ids) - start
    return replace(
        run,
        question=question,
        prompt=prompt,
        token_ids=token_ids,
        tokens=pieces(lab.tokenizer, token_ids),
        segments={**sequence.segments, "answer": (start + moved, stop + moved)},
        words=tuple(replace(word, start=word.start + moved, stop=word.stop + moved) for word in run.words),
        logprobs=np.full_like(run.logprobs, np.nan),
    )


@dataclass
class _Found:
    """The maps so far."""

    first: Relevance
    wanted: int  # maps beside the first
    steps: dict[str, Relevance] = field(default_factory=dict)
    questions: dict[str, Relevance] = field(default_factory=dict)

    @property
    def done(self) -> int:
        return len(self.steps) + len(self.questions)

    def result(self, run: Run, structure: bool, seed: int, seconds: float) -> Sanity:
        first, seen = self.first.values, run.map.coverage() > 0
        maps, question_maps = (self._stack(found.values()) for found in (self.steps, self.questions))
        rng = np.random.default_rng((seed, DRAWS))  # not the numbers that the method `random` draws
        random = rng.random((DRAWS, *first.shape))
        moved = np.stack([[similarity.moved(values, rng) for values in first] for _ in range(DRAWS)])
        top = max(1, round(TOP * int(seen.sum())))
        every = [self.first, *self.steps.values(), *self.questions.values()]
        nothing = np.zeros((0, 0), np.float32)
        return Sanity(
            method=self.first.method,
            options=self.first.options,
            targets=self.first.targets,
            steps=tuple(self.steps),
            questions=tuple(self.questions),
            original=first,
            maps=maps,
            question_maps=question_maps,
            spearman=similarity.rank_likeness(first, maps, seen),
            overlap=similarity.top_likeness(first, maps, seen, top),
            ssim=similarity.structure_likeness(first, maps) if structure else nothing,
            question_spearman=similarity.rank_likeness(first, question_maps, seen),
            question_overlap=similarity.top_likeness(first, question_maps, seen, top),
            question_ssim=similarity.structure_likeness(first, question_maps) if structure else nothing,
            random_spearman=similarity.rank_likeness(first, random, seen),
            moved_spearman=similarity.rank_likeness(first, moved, seen),
            top=top,
            chance=top / int(seen.sum()),
            map=run.map,
            model=self.first.model,
            fingerprint=self.first.fingerprint,
            seed=seed,
            passes={name: sum(one.passes.get(name, 0) for one in every) for name in self.first.passes},
            seconds=seconds,
            interrupted=self.done < self.wanted,
            notes=tuple(self._notes(seen)),
        )

    def _stack(self, found: Iterable[Relevance]) -> np.ndarray:
        return np.array([one.values for one in found], np.float32).reshape(-1, *self.first.values.shape)

    def _notes(self, seen: np.ndarray) -> list[str]:
        notes = ["The answer stays the one that was given; it is put back into the model's mouth each time."]
        if self.done < self.wanted:
            notes.append(f"{STOPPED} after {self.done} of {self.wanted} maps.")
        if any(not np.ptp(values[seen]) for values in self.first.values):
            notes.append("A map without any differences cannot change: its similarities are 0 and say nothing.")
        return notes


def _map(lab: Lab, run: Run, targets: Targets, how: Mapping[str, Any]) -> Relevance:
    found = attribute(lab, run, target=list(targets), **how)
    if any(note.startswith(STOPPED) for note in found.notes):  # the method caught the Ctrl-C itself
        raise KeyboardInterrupt
    return found


def _instead(lab: Lab, run: Run, targets: Targets, question: str) -> tuple[Run, Targets]:
    """The run after another question, and the targets where they stand there."""
    other = with_question(lab, run, question)
    by = other.segments["answer"][0] - run.segments["answer"][0]
    return other, tuple(replace(target, positions=tuple(at + by for at in target.positions)) for target in targets)


def _questions(run: Run, given: Sequence[str] | None, seed: int) -> tuple[str, ...]:
    """What to ask instead: as given, or the run's own words shuffled and the least related of `OTHERS`."""
    if given is not None:
        texts = tuple(dict.fromkeys(text.strip() for text in ([given] if isinstance(given, str) else given)))
        if not texts or run.question in texts:
            raise OptionError(f"questions must be others than the run's own {run.question!r}, at least one; got {given!r}")
        return texts
    words = run.question.split()
    own = {word.strip(".,!?").casefold() for word in words}
    other = min(OTHERS, key=lambda text: (len(own & {word.strip("?").casefold() for word in text.split()}), OTHERS.index(text)))
    if len(set(words)) < 2:  # nothing to shuffle
        return (other,)
    rng, mixed = np.random.default_rng(seed), words
    while mixed == words:
        mixed = [words[i] for i in rng.permutation(len(words))]
    return " ".join(mixed), other


def _tests(tests: Sequence[str]) -> tuple[str, ...]:
    chosen = (tests,) if isinstance(tests, str) else tuple(tests)
    if not chosen or any(test not in TESTS for test in chosen):
        raise OptionError(f"tests must be some of {', '.join(map(repr, TESTS))}, got {tests!r}")
    return chosen
