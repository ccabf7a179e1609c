"""Lab: a loaded LLaVA and everything needed to ask it and to explain its answers.

    lab = ll.load("tiny")
    run = lab.ask("car.png", "What color is the car?")
    logits = lab.model(**lab.inputs(run)).logits

It asks (`ask`, and `ask_many` a batch) and gives back the finished sequence as model input (`inputs`). The same code serves the
shipped model and the 7B: sizes are data.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_lab.checks import Sweep, Turn, entry, one_picture, shown, turn_of, whole_number
from llava_lab.errors import CheckpointError, LabError, OptionError, PictureError, one_line
from llava_lab.geometry import PictureMap, View
from llava_lab.models import layout, text
from llava_lab.models.card import NOT_STATED, Card, fingerprint, make_card
from llava_lab.models.formats import foreign
from llava_lab.models.generation import Generated, generate, generate_many
from llava_lab.models.pictures import PictureLike, Preprocessing, Shown, read_pictures
from llava_lab.models.scope import Scope
from llava_lab.models.swap import Swap, trained_beside
from llava_lab.models.text import History, Prompt, decode, finished, group_words
from llava_lab.results import Run, cut_notes

logger = logging.getLogger(__name__)

Question = str  # one; `ask_many` takes several
COLDEST = 1e-6  # temperature; logits divided by less may be no finite numbers


@dataclass(frozen=True)
class _Asked:
    """One question ready to be answered."""

    pictures: tuple[np.ndarray, ...]
    question: str
    sequence: Prompt
    limit: int  # tokens the answer may take
    notes: tuple[str, ...] = ()  # what is to be said of its words


class Lab:
    """A LLaVA model with its processor, its card and its patch grid.

    >>> lab.ask(picture, "What is in the picture?", max_new_tokens=2).image_positions.shape
    (144,)
    """

    one_square = True  # whether a picture is seen once, in one square

    @entry
    def __init__(
        self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, *, name: str = "model", card: Card | None = None
    ) -> None:
        """Wrap a model already in memory; `llava_lab.load` is the way from a name."""
        if not isinstance(model, nn.Module) or not hasattr(processor, "tokenizer"):
            raise OptionError(f"a Lab is made of a LLaVA model and its processor, got {shown(model)}; from a name use ll.load")
        self.name = name
        self.model = model
        self.processor = processor
        self.measure()
        self.image_id = _image_id(model, processor)
        self.eos_ids = _eos_ids(model, processor)
        layout.last_feature_state(model.config, model.config.vision_config.num_hidden_layers)  # none is outside the tower
        template = processor.chat_template
        # the form that stands when none is given: Vicuna's, or the model's own where its turns are others
        self.prompt = "chat" if isinstance(template, str) and text.CUE not in template else "llava-1.5"
        self.foreign = False  # a stranger's: its chat template runs in a process of its own
        self.scope: Scope | None = None  # of a shipped model: which words and pictures it was trained on
        self._pictures_noted: tuple[Any, ...] = ()  # the last picture asked about, and what is said of it
        self.card = card or make_card(
            model,
            name=name,
            source="in memory",
            fit=self.preprocessing.own,
            why="as the model was given",
            attention=str(model.config._attn_implementation),
        )

    def measure(self) -> None:
        """Read grid and picture transform from the model as it is now; a swapped connector may have changed them."""
        self.grid = layout.patch_grid(self.model)
        vision: Any = self.model.config.vision_config
        self.preprocessing = Preprocessing.of(
            self.processor.image_processor, image_size=vision.image_size, patch=layout.cell_pixels(self.model), grid=self.grid
        )
        self.processor.patch_size = layout.processor_patch(self.model)

    @property
    def connector(self) -> nn.Module:
        """The connector in place; it now carries a record of the models it works between (see `swap`)."""
        connector: Any = layout.connector_of(self.model)
        if getattr(connector, "trained_with", None) is None:
            connector.trained_with = trained_beside(self.model)
        return connector

    @entry
    def swap(self, connector: nn.Module) -> nn.Module:
        """Put another connector in and return the one that was there; config, grid, prompts and card follow.

        Swapping a connector for itself changes nothing. A run answered before is refused afterwards, because the
        fingerprint is another. `llava_lab.connector` does the same for the length of a ``with`` block.
        Raises OptionError where the widths differ; warns `ForeignConnector` where it learnt beside other weights.
        """
        before = self.connector
        Swap(self, connector).apply()
        return before

    @property
    def turn(self) -> Turn:
        """Whose turn it is on the model, among threads."""
        return turn_of(self.model)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def fingerprint(self) -> str:
        """The name of the weights as they are now; it changes when they do."""
        return fingerprint(self.model)

    @property
    def context(self) -> int:
        """The longest sequence the language model was made for, tokens."""
        return int(self.model.config.text_config.max_position_embeddings)

    def _repr_html_(self) -> str:
        return f"<p><code>{html.escape(repr(self))}</code></p><p>{html.escape(self.card.knows)}</p>"

    def __repr__(self) -> str:
        rows, cols = self.grid
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Lab({self.name!r}, {self.card.parameters / 1e6:.1f}M parameters, {rows}x{cols} patches, {dtype} on {self.device})"
        )

    @entry
    def ask(
        self,
        picture: Shown,
        question: Question,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        prompt: str | None = None,
        fit: str | None = None,
        history: History = (),
        on_token: Callable[[str], None] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Run:
        """Ask about a picture and get the answer with every position, probability and the picture's map.

        `picture` is anything that `models.pictures` reads: a path, bytes, a PIL image, an array, a tensor, ... A list of
        pictures shows them all, in order, before the question (see `Run.about`); None asks without one.
        `prompt`: None is the model's own form (`self.prompt`), else one of `text.PROMPTS`.
        `fit`: None is the checkpoint's own way, else "pad" or "crop". `history`: earlier (question, answer)
        pairs, or messages as chat formats hold them, about the same picture. `on_token` receives the answer's text as it
        grows, whole characters only; `on_step` each new token and the natural log-probabilities (V,) of all tokens at its
        place, before `on_token` hears of it. An option given as None has its default.
        Interrupting (KeyboardInterrupt) gives the answer so far, with ``options["stopped"] == "interrupted"``.
        """
        _check_asking(max_new_tokens, temperature)
        prompt = self.prompt if prompt is None else prompt
        asked = self._asked(read_pictures(picture), question, prompt, history, max_new_tokens)
        stream = _Stream(self.tokenizer, on_token) if on_token else None

        def step(token: int, chances: Tensor) -> None:
            if on_step:
                on_step(token, chances)
            if stream:
                stream.add(token)

        generated = self._generate(asked, fit, temperature, seed, on_step=step)
        if stream:
            stream.close()
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "prompt": prompt}
        return self._run(asked, generated, seed, options | {"fit": self.preprocessing.mode(fit)})

    @entry
    def ask_many(
        self,
        pictures: Shown | Sequence[Shown] | Iterator[Shown],
        questions: Question | Sequence[Question],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        prompt: str | None = None,
        fit: str | None = None,
        batch: int = 8,
        progress: bool = True,
    ) -> list[Run]:
        """Ask several questions, `batch` at a time: the runs that `ask` gives one by one, but for rounding, and sooner.

        `pictures`: a list with the picture of each question (None, or a list of several, where `ask` takes it), or one for
        all. `questions`: a list with one for each picture, or one for all. Questions in a row about the same picture have it
        seen once. All pictures and questions are read before the first is answered, so that a bad one costs nothing.
        A model that looks at pictures in tiles, and a question about several pictures, is answered by itself.
        Ctrl-C gives the runs finished until then, in order; before the first it is raised.

        >>> [run.question for run in lab.ask_many(picture, ["Is it red?", "What is it?"], max_new_tokens=2, progress=False)]
        ['Is it red?', 'What is it?']
        """
        _check_asking(max_new_tokens, temperature)
        whole_number("batch", batch, least=1)
        prompt = self.prompt if prompt is None else prompt
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "prompt": prompt}
        options |= {"fit": self.preprocessing.mode(fit)}
        todo = self._read_all(*_paired(pictures, questions), prompt, max_new_tokens)
        runs: list[Run] = []
        with Sweep("asking", total=len(todo), unit="question", show=progress) as done:
            for group in self._groups(todo, batch):
                answers = self._generate_group(group, fit, temperature, seed)
                runs += [self._run(one, answer, seed, options) for one, answer in zip(group, answers, strict=True)]
                done.step(len(group))
        if done.interrupted:
            logger.warning("interrupted after %d of %d questions; their runs are kept", len(runs), len(todo))
        return runs

    @entry
    def sequence(
        self,
        question: Question,
        *,
        prompt: str | None = None,
        history: History = (),
        picture: PictureLike | None = None,
        pictures: int = 1,
    ) -> Prompt:
        """The prompt for a question as the model reads it, with its segments, before any answer.

        `picture` matters only where the number of image tokens depends on its shape; `pictures` says how many there are.
        """
        prompt = self.prompt if prompt is None else prompt
        text.check_form(prompt)
        question, history = self.read_as(question), self._read_history(history)
        turns = text.turns(question, history)
        text.refuse_special_text(self.tokenizer, *(part for turn in turns for part in turn if part is not None))
        return text.encode(
            self.tokenizer,
            self._text(question, prompt, history, pictures),
            question.strip(),
            image_id=self.image_id,
            image_tokens=self.image_tokens(picture) if pictures else 0,
            pictures=pictures,
            beside="" if pictures else self._text(question, prompt, history, 1),
            history=len(turns) > 1,
            after=self._after_question(prompt),
        )

    def read_as(self, question: str) -> str:
        """A question as the model is given it: a small model's has common variants folded into its own wording (`Lab.scope`)."""
        return self.scope.read_as(question) if self.scope is not None and isinstance(question, str) else question

    def _read_history(self, history: History) -> History:
        if self.scope is None or not self.scope.words:
            return history
        return [(self.read_as(question), answer) for question, answer in text.read_history(history)]

    def asked_instead(self, run: Run, question: str) -> Prompt:
        """The prompt of `run` with another question as it is given. Raises OptionError for what cannot be asked."""
        text.refuse_special_text(self.tokenizer, question)
        after = self._after_question(run.options.get("prompt", self.prompt))
        at = text.question_start(run.prompt, run.question, after)
        if at < 0:
            raise CheckpointError("this run is damaged: its prompt does not hold its question; ask again with this lab")
        start, stop = run.segments["image"]
        return text.encode(
            self.tokenizer,
            run.prompt[:at] + question + run.prompt[at + len(run.question) :],
            question,
            image_id=self.image_id,
            image_tokens=stop - start,
            history="history" in run.segments,
            after=after,
        )

    def _text(self, question: str, prompt: str, history: History, pictures: int) -> str:
        if prompt == "chat":
            return self._chat(question, history, pictures)
        marks = getattr(self.model.config, text.MARKED, None) or ()
        return text.marked(text.build_prompt(question, prompt, history, pictures), marks)

    def _after_question(self, form: str) -> str:
        """What a prompt of this form writes behind its last question."""
        return self._around_chat_question[1] if form == "chat" else text.AFTER

    @cached_property
    def _around_chat_question(self) -> tuple[str, str]:
        """What the chat template writes between a picture and its question, and behind it."""
        before, _, after = self._chat(text.STAND_IN, (), 1).rpartition(text.STAND_IN)
        return before.rpartition(text.IMAGE)[2], after

    @entry
    def inputs(self, run: Run, *, picture: np.ndarray | None = None, tiles: bool = False) -> dict[str, Tensor]:
        """The finished sequence as model input (teacher forcing): input_ids, attention_mask (1, T), pixel_values.

        `tiles`: whether the caller can tell several views of a picture (see `TiledLab`), or several pictures, apart.
        `picture` stands in for the run's own (first), at the same size. Raises CheckpointError for another model's run,
        OptionError for one with several pictures or none without `tiles`.
        """
        if not tiles:
            one_picture(run)
        mine = self.fingerprint
        if run.fingerprint != mine:
            raise CheckpointError(
                f"this run was answered by {run.model!r} with weights {run.fingerprint}; "
                f"{self.name!r} now has {mine}; ask again with this lab"
            )
        self.check(run)
        if picture is not None and np.shape(picture) != run.picture.shape:
            raise PictureError(f"the other picture must be {run.picture.shape} like the run's, got {np.shape(picture)}")
        ids = torch.from_numpy(run.token_ids)[None].to(self.device)
        pictures = [picture if picture is not None and own is run.picture else own for own in run.pictures]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self._all_shown(pictures, run.map.mode)}

    def check(self, run: Run) -> None:
        """Raises CheckpointError for a run that cannot be this model's: its file was changed since it was saved."""
        count = self.image_tokens(run.picture) if run.pictures else 0
        spans = layout.image_spans(run.token_ids, self.image_id, count, len(run.pictures))
        most = self.model.get_input_embeddings().num_embeddings - 1
        least, largest = int(run.token_ids.min()), int(run.token_ids.max())
        if least < 0 or largest > most:
            wrong = f"token ids of 0 to {most}, got {least} to {largest}"
        elif spans and run.segments["image"] != (spans[0][0], spans[-1][1]):
            wrong = f"its image tokens at {spans[0][0]} to {spans[-1][1]}, got the segment {run.segments['image']}"
        elif spans and self.one_square and (run.map.rows, run.map.cols) != self.grid:
            wrong = f"a grid of {self.grid[0]}x{self.grid[1]} patches, got {run.map.rows}x{run.map.cols}"
        else:
            wrong = self._untrue(run, count)
        if wrong:
            raise CheckpointError(f"this run is damaged: expected {wrong}; ask again with this lab")

    def _untrue(self, run: Run, count: int) -> str:
        """What of a run's texts is not what its token ids say, which are all that is explained; empty where all is.

        A file can say one thing in words and another in ids, and only a tokenizer can tell. `count`: image tokens of a picture.
        """
        start, stop = run.segments["answer"]
        if run.prompt.count(text.IMAGE) != len(run.pictures):
            return f"a prompt with {len(run.pictures)} times {text.IMAGE}, got {run.prompt.count(text.IMAGE)}"
        short = np.array(text.tokenize(self.tokenizer, run.prompt)["input_ids"], np.int64)
        ids = layout.expand_image(short, self.image_id, count, len(run.pictures))
        if not np.array_equal(ids, run.token_ids[:start]):
            return f"the prompt that its token ids spell, got {shown(run.prompt)}"
        if not self._asks(run):
            return f"the question that its prompt asks, got {shown(run.question)}"
        answer = decode(self.tokenizer, run.token_ids[start:stop].tolist()).strip()
        if answer != run.answer.strip():
            return f"the answer that its token ids spell, {shown(answer)}, got {shown(run.answer)}"
        at = 0
        for word in run.words:
            at = answer.find(word.text, at)
            if at < 0:
                return f"the words of its answer, {shown(answer)}, got {shown(word.text)}"
            at += len(word.text)
        return ""

    def _asks(self, run: Run) -> bool:
        """Whether a run's prompt asks its question, and that whole: "the car?" too ends "What color is the car?"."""
        form = str(run.options.get("prompt", self.prompt))
        after = self._after_question(form)
        at = text.question_start(run.prompt, run.question, after)
        if at < 0 or not run.question or run.prompt[at + len(run.question) :] != after:
            return False
        before, first = run.prompt[:at], "history" not in run.segments
        if form == "chat":
            return not first or len(run.pictures) != 1 or before.endswith(text.IMAGE + self._around_chat_question[0])
        return before == self._text(run.question, form, (), len(run.pictures))[:at] if first else before.endswith(text.BEFORE)

    def pixels(self, picture: np.ndarray, fit: str | None = None) -> Tensor:
        """A picture as the vision tower takes it: (1, 3, size, size) in the model's dtype, on its device."""
        return self.preprocessing.pixels(picture, fit).to(self.device, self.dtype)

    def shown(self, picture: np.ndarray, fit: str | None = None) -> dict[str, Tensor]:
        """A picture as the model's arguments."""
        return {"pixel_values": self.pixels(picture, fit)}

    def image_tokens(self, picture: PictureLike | None) -> int:
        """How many image tokens stand in the sequence for a picture."""
        return layout.image_token_count(self.model)

    def views(self, width: int, height: int, span: tuple[int, int]) -> tuple[View, ...]:
        """How a picture is looked at, where that is more than once; `span` is where its tokens stand."""
        return ()

    def _chat(self, question: str, history: History, pictures: int) -> str:
        if not self.processor.chat_template:
            raise OptionError(f"prompt='chat' needs a chat template and {self.name!r} has none; use 'llava-1.5' or 'hf'")
        messages = text.chat_messages(question, history, pictures)
        if self.foreign:
            marks = self.tokenizer.special_tokens_map
            return foreign.render(self.processor.chat_template, messages=messages, add_generation_prompt=True, **marks)
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program: it may raise anything
            raise CheckpointError(f"the chat template of {self.name!r} cannot write this question ({one_line(error)})") from None

    def _asked(
        self, pictures: tuple[np.ndarray, ...], question: str, prompt: str, history: History, max_new_tokens: int
    ) -> _Asked:
        """A question with its pictures, checked. Raises OptionError where the context leaves no room for an answer."""
        self.check_pictures(len(pictures))
        first = pictures[0] if pictures else None
        sequence = self.sequence(question, prompt=prompt, history=history, picture=first, pictures=len(pictures))
        limit = min(max_new_tokens, self.context - len(sequence.token_ids))
        if limit < 1:
            raise OptionError(
                f"the prompt has {len(sequence.token_ids)} tokens and the model's context is {self.context}; "
                f"ask a shorter question, give less history{' or fewer pictures' if len(pictures) > 1 else ''}"
            )
        notes = self.scope.about_words(question) if self.scope is not None else ()
        return _Asked(pictures, self.read_as(question).strip(), sequence, limit, notes)

    def _about_pictures(self, pictures: Sequence[np.ndarray], fit: str) -> tuple[str, ...]:
        """What a reader should know of pictures; the last ones are remembered, as questions come in rows about one."""
        if self.scope is None or self.scope.pictures is None:
            return ()
        seen, notes = self._pictures_noted or ((), ())
        if len(seen) != len(pictures) + 1 or seen[-1] != fit or any(a is not b for a, b in zip(seen, pictures, strict=False)):
            found = [self.scope.about_picture(self.model, self.pixels(picture, fit)) for picture in pictures]
            notes = tuple(dict.fromkeys(note for some in found for note in some))
            self._pictures_noted = ((*pictures, fit), notes)
        return notes

    def check_pictures(self, count: int) -> None:
        """Raises OptionError where a question to this model cannot be about so many pictures."""

    def _read_all(self, pictures: list[Any], questions: list[Any], prompt: str, max_new_tokens: int) -> list[_Asked]:
        """Every question, read and checked; a picture that comes again is read once."""
        read: dict[Any, tuple[np.ndarray, ...]] = {}
        todo = []
        for number, (picture, question) in enumerate(zip(pictures, questions, strict=True), 1):
            try:
                key = picture if isinstance(picture, str) else id(picture)
                if key not in read:
                    read[key] = read_pictures(picture)
                todo.append(self._asked(read[key], question, prompt, (), max_new_tokens))
            except LabError as error:
                raise type(error)(f"question {number} of {len(questions)}: {error}") from None
        return todo

    def _groups(self, todo: list[_Asked], batch: int) -> Iterator[list[_Asked]]:
        """Questions in a row that can be answered together: all about one picture each, or all without."""
        window = getattr(self.model.config.text_config, "sliding_window", None)
        longest = max((len(one.sequence.token_ids) + one.limit for one in todo), default=0)
        most = batch if self.one_square and (window is None or longest <= window) else 1  # padding would move the window
        group: list[_Asked] = []
        for one in todo:
            if group and (len(group) == most or len(one.pictures) != len(group[0].pictures) or len(one.pictures) > 1):
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    def _generate_group(self, group: list[_Asked], fit: str | None, temperature: float, seed: int) -> list[Generated]:
        if len(group) == 1:
            alone = self._generate(group[0], fit, temperature, seed)
            if alone.stopped == "interrupted":
                raise KeyboardInterrupt
            return [alone]
        seen = {id(picture): picture for one in group for picture in one.pictures}
        return generate_many(
            self.model,
            [one.sequence.token_ids for one in group],
            torch.cat([self.pixels(picture, fit) for picture in seen.values()]) if seen else None,
            [list(seen).index(id(one.pictures[0])) for one in group if one.pictures],
            limits=[one.limit for one in group],
            eos=self.eos_ids,
            image_id=self.image_id,
            temperature=temperature,
            seed=seed,
        )

    def _generate(
        self,
        asked: _Asked,
        fit: str | None,
        temperature: float,
        seed: int,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Generated:
        return generate(
            self.model,
            torch.from_numpy(asked.sequence.token_ids)[None].to(self.device),
            **self._all_shown(asked.pictures, fit),
            limit=asked.limit,
            eos=self.eos_ids,
            image_id=self.image_id,
            temperature=temperature,
            seed=seed,
            on_step=on_step,
        )

    def _all_shown(self, pictures: Sequence[np.ndarray], fit: str | None) -> dict[str, Tensor]:
        """Pictures as the model's arguments, one after the other; nothing without any."""
        parts = [self.shown(picture, fit) for picture in pictures]
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def _maps(self, asked: _Asked, fit: str) -> tuple[PictureMap, tuple[View, ...]]:
        """Where the (first) picture's patches are, and every view where there are several."""
        maps = [self.preprocessing.map(picture.shape[1], picture.shape[0], fit) for picture in asked.pictures]
        if not maps:
            return PictureMap.nowhere(), ()
        if len(maps) == 1:
            return maps[0], self.views(maps[0].width, maps[0].height, asked.sequence.segments["image"])
        ids = asked.sequence.token_ids
        spans = layout.image_spans(ids, self.image_id, self.image_tokens(asked.pictures[0]), len(maps))
        places = enumerate(zip(spans, maps, strict=True), 1)
        return maps[0], tuple(View(f"picture {number}", start, False, where) for number, ((start, _), where) in places)

    def _run(self, asked: _Asked, generated: Generated, seed: int, options: dict[str, Any]) -> Run:
        sequence = asked.sequence
        start = len(sequence.token_ids)
        token_ids = np.concatenate([sequence.token_ids, generated.token_ids])
        where, views = self._maps(asked, options["fit"])
        told = options | {"stopped": generated.stopped}
        return Run(
            picture=asked.pictures[0] if asked.pictures else np.zeros((0, 0, 3), np.uint8),
            question=asked.question,
            answer=decode(self.tokenizer, generated.token_ids.tolist()).strip(),
            prompt=sequence.text,
            token_ids=token_ids,
            tokens=text.pieces(self.tokenizer, token_ids),
            segments={**sequence.segments, "answer": (start, len(token_ids))},
            words=group_words(self.tokenizer, generated.token_ids.tolist(), start),
            logprobs=generated.logprobs,
            map=where,
            model=self.name,
            fingerprint=self.fingerprint,
            seed=seed,
            options=told,
            views=views,
            others=asked.pictures[1:],
            notes=(*asked.notes, *self._about_pictures(asked.pictures, options["fit"]), *cut_notes(told)),
            knows="" if self.card.knows == NOT_STATED else self.card.knows,
        )


def _check_asking(max_new_tokens: int, temperature: float) -> None:
    whole_number("max_new_tokens", max_new_tokens, least=1)
    if temperature != 0 and temperature < COLDEST:
        raise OptionError(f"temperature must be 0 (greedy) or a positive number of at least {COLDEST:g}, got {temperature!r}")


def _paired(pictures: Any, questions: Any) -> tuple[list[Any], list[Any]]:
    """A picture and a question for each answer; one of either stands for all. Raises OptionError where the numbers differ."""
    one = isinstance(pictures, str | bytes | bytearray | memoryview) or getattr(pictures, "ndim", 0) in (2, 3)
    # an array of four axes is a batch of pictures, one of one axis a column of them
    several = not one and (isinstance(pictures, Sequence | Iterator) or getattr(pictures, "ndim", 0) in (1, 4))
    each = list(pictures) if several else None
    try:
        if isinstance(questions, bytes | Mapping | Set):  # numbers, names, and what has no order
            raise TypeError
        asked = [questions] if isinstance(questions, str) else list(questions)
    except TypeError:
        raise OptionError(f"questions must be a list of text, got {type(questions).__name__}") from None
    if each is None:
        return [pictures] * len(asked), asked
    if isinstance(questions, str):
        return each, asked * len(each)
    if len(each) != len(asked):
        raise OptionError(f"expected a picture for each question, got {len(each)} pictures and {len(asked)} questions")
    return each, asked


class _Stream:
    """Turns token ids into growing text and passes on whole characters only."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.sent = 0  # characters passed on

    def add(self, token: int) -> None:
        self.ids.append(token)
        self._pass_on(finished(decode(self.tokenizer, self.ids)))

    def close(self) -> None:
        """Bytes that never became a character are shown as they decode."""
        self._pass_on(decode(self.tokenizer, self.ids))

    def _pass_on(self, text: str) -> None:
        piece = text[self.sent :] if self.sent else text.lstrip()
        if piece:
            self.sent = len(text)
            self.on_text(piece)


def _image_id(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> int:
    """The image token's id, which the configuration and the tokenizer must agree on."""
    configured = int(model.config.image_token_index)
    spelled = processor.tokenizer.convert_tokens_to_ids(text.IMAGE)
    if configured != spelled:
        raise CheckpointError(
            f"config.json says image_token_index {configured}, the tokenizer's {text.IMAGE} is {spelled}; "
            "the two files of this checkpoint do not belong together"
        )
    return configured


def _eos_ids(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> frozenset[int]:
    """What ends an answer: the generation config's tokens, as in ``generate``, and the tokenizer's own."""
    ids: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), processor.tokenizer.eos_token_id):
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)
