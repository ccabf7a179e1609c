"""Lab: a loaded LLaVA and everything needed to ask it and to explain its answers.

    lab = ll.load("tiny")
    run = lab.ask("car.png", "What color is the car?")
    logits = lab.model(**lab.inputs(run)).logits

It asks (`ask`) and gives back the finished sequence as model input (`inputs`). The same code serves the shipped model and the 7B:
sizes are data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_lab.checks import entry, shown, whole_number
from llava_lab.errors import CheckpointError, OptionError, PictureError, one_line
from llava_lab.geometry import View
from llava_lab.models import layout, text
from llava_lab.models.card import Card, fingerprint, make_card
from llava_lab.models.formats import foreign
from llava_lab.models.generation import Generated, generate
from llava_lab.models.pictures import PictureLike, Preprocessing, read_picture
from llava_lab.models.swap import Swap, trained_beside
from llava_lab.models.text import History, Prompt, decode, finished, group_words
from llava_lab.results import Run


class Lab:
    """A LLaVA model with its processor, its card and its patch grid.

    >>> lab.ask(picture, "What is in the picture?", max_new_tokens=2).image_positions.shape
    (144,)
    """

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

    def __repr__(self) -> str:
        rows, cols = self.grid
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Lab({self.name!r}, {self.card.parameters / 1e6:.1f}M parameters, {rows}x{cols} patches, {dtype} on {self.device})"
        )

    @entry
    def ask(
        self,
        picture: PictureLike,
        question: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        prompt: str | None = None,
        fit: str | None = None,
        history: History = (),
        on_token: Callable[[str], None] | None = None,
    ) -> Run:
        """Ask about a picture and get the answer with every position, probability and the picture's map.

        `prompt`: None is the model's own form (`self.prompt`), else one of `text.PROMPTS`.
        `fit`: None is the checkpoint's own way, else "pad" or "crop". `history`: earlier (question, answer)
        pairs, or messages as chat formats hold them, about the same picture. `on_token` receives the answer's text as it
        grows, whole characters only. An option given as None has its default.
        Interrupting (KeyboardInterrupt) gives the answer so far, with ``options["stopped"] == "interrupted"``.
        """
        whole_number("max_new_tokens", max_new_tokens, least=1)
        if not 0 <= temperature < float("inf"):
            raise OptionError(f"temperature must be 0 (greedy) or a positive number, got {temperature!r}")
        prompt = prompt or self.prompt
        pixels = read_picture(picture)
        sequence = self.sequence(question, prompt=prompt, history=history, picture=pixels)
        limit = min(max_new_tokens, self.context - len(sequence.token_ids))
        if limit < 1:
            raise OptionError(
                f"the prompt has {len(sequence.token_ids)} tokens and the model's context is {self.context}; "
                "ask a shorter question or give less history"
            )
        stream = _Stream(self.tokenizer, on_token) if on_token else None
        generated = generate(
            self.model,
            torch.from_numpy(sequence.token_ids)[None].to(self.device),
            **self.shown(pixels, fit),
            limit=limit,
            eos=self.eos_ids,
            image_id=self.image_id,
            temperature=temperature,
            seed=seed,
            on_id=stream.add if stream else None,
        )
        if stream:
            stream.close()
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "prompt": prompt}
        options |= {"fit": self.preprocessing.mode(fit), "stopped": generated.stopped}
        return self._run(pixels, question.strip(), sequence, generated, seed, options)

    @entry
    def sequence(
        self, question: str, *, prompt: str | None = None, history: History = (), picture: PictureLike | None = None
    ) -> Prompt:
        """The prompt for a question as the model reads it, with its segments, before any answer.

        `picture` matters only where the number of image tokens depends on its shape.
        """
        prompt = prompt or self.prompt
        text.check_form(prompt)
        turns = text.turns(question, history)
        text.refuse_special_text(self.tokenizer, *(part for turn in turns for part in turn if part is not None))
        if prompt == "chat":
            whole = self._chat(question, history)
        else:
            marks = getattr(self.model.config, text.MARKED, None) or ()
            whole = text.marked(text.build_prompt(question, prompt, history), marks)
        return text.encode(
            self.tokenizer,
            whole,
            question.strip(),
            image_id=self.image_id,
            image_tokens=self.image_tokens(picture),
            history=len(turns) > 1,
        )

    @entry
    def inputs(self, run: Run, *, picture: np.ndarray | None = None, tiles: bool = False) -> dict[str, Tensor]:
        """The finished sequence as model input (teacher forcing): input_ids, attention_mask (1, T), pixel_values.

        `tiles`: whether the caller can tell several views of a picture apart (see `TiledLab`).
        `picture` stands in for the run's own, at the same size. Raises CheckpointError for another model's run.
        """
        mine = self.fingerprint
        if run.fingerprint != mine:
            raise CheckpointError(
                f"this run was answered by {run.model!r} with weights {run.fingerprint}; "
                f"{self.name!r} now has {mine}; ask again with this lab"
            )
        layout.image_span(run.token_ids, self.image_id, self.image_tokens(run.picture))
        if picture is not None and np.shape(picture) != run.picture.shape:
            raise PictureError(f"the other picture must be {run.picture.shape} like the run's, got {np.shape(picture)}")
        ids = torch.from_numpy(run.token_ids)[None].to(self.device)
        shown = self.shown(run.picture if picture is None else picture, run.map.mode)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shown}

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

    def _chat(self, question: str, history: History) -> str:
        if not self.processor.chat_template:
            raise OptionError(f"prompt='chat' needs a chat template and {self.name!r} has none; use 'llava-1.5' or 'hf'")
        messages = text.chat_messages(question, history)
        if self.foreign:
            marks = self.tokenizer.special_tokens_map
            return foreign.render(self.processor.chat_template, messages=messages, add_generation_prompt=True, **marks)
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program: it may raise anything
            raise CheckpointError(f"the chat template of {self.name!r} cannot write this question ({one_line(error)})") from None

    def _run(
        self, picture: np.ndarray, question: str, sequence: Prompt, generated: Generated, seed: int, options: dict[str, Any]
    ) -> Run:
        start = len(sequence.token_ids)
        token_ids = np.concatenate([sequence.token_ids, generated.token_ids])
        height, width = picture.shape[:2]
        return Run(
            picture=picture,
            question=question,
            answer=decode(self.tokenizer, generated.token_ids.tolist()).strip(),
            prompt=sequence.text,
            token_ids=token_ids,
            tokens=text.pieces(self.tokenizer, token_ids),
            segments={**sequence.segments, "answer": (start, len(token_ids))},
            words=group_words(self.tokenizer, generated.token_ids.tolist(), start),
            logprobs=generated.logprobs,
            map=self.preprocessing.map(width, height, options["fit"]),
            model=self.name,
            fingerprint=self.fingerprint,
            seed=seed,
            options=options,
            views=self.views(width, height, sequence.segments["image"]),
        )


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
