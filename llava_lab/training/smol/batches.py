"""Batches for `smol`: several texts about one picture in one sequence, each a first question of its own.

A sequence is the picture's prefix and then blocks; a block sees the prefix and itself, never another block, and its positions
go on from the prefix. So the picture is read once for ten questions, and every question is trained as it is asked at test
time. Everything random comes from the step's own number. Pictures are drawn as they are needed and never come twice.

    SmolData(Chat(tokenizer, 144), stage="align", batch=8, side=96, seed=0)[0].ids  # (8, tokens)

Plain texts are what the untouched language model wrote: read again in stage 2, they keep its ability with text. No foreign text
is needed: what a model says when it is sampled is drawn from exactly the distribution that must stay.

    own_texts(model, tokenizer, Path("runs/smol/texts.json"))  # lists of token ids
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava_lab.errors import one_line
from llava_lab.results.save import whole_file
from llava_lab.training.text import IGNORE, next_labels
from llava_lab.worlds.paraphrases import retell
from llava_lab.worlds.picturebook import REQUESTS, SHORT, TYPES, ask_about, caption, scene
from llava_lab.worlds.questions import Question
from llava_lab.worlds.scenes import Scene
from llava_lab.worlds.small_talk import DESCRIBE, account, chat

log = logging.getLogger(__name__)

Block = list[tuple[str, str]]  # one first question, or the turns of one conversation

EVENLY = (*TYPES, "unequal", "same color", "different color")
EVEN_STEPS = 248  # of stage 2; from then on what is looked up by place is asked more often than kinds, colours and sizes
HARD = (
    *("place", "place", "place", "relation", "relation", "relation", "existence", "existence", "count", "count"),
    *("comparison", "unequal", "same color", "different color", "kind", "color", "size"),
)
PRACTISED = (
    *("relation", "relation", "relation", "relation", "comparison", "comparison", "unequal", "unequal"),
    *("same color", "same color", "different color", "different color", "count", "count", "count"),
    *("place", "existence", "kind", "color", "size"),
)
FIRST = {"align": 0, "instruct": 5_000_000, "practice": 7_000_000, "recall": 8_000_000}  # the stage's first picture
GREY = (122, 116, 104)
TEXT_EVERY = {"instruct": 8, "practice": 8, "recall": 2}  # of so many steps one reads plain text
TEXTS = 12  # plain texts in such a step
LONGEST_TEXT = 96  # tokens


@dataclass(frozen=True)
class Batch:
    """Rows of equal length, padded at the end."""

    ids: Tensor  # int64 (B, S), the image id where a picture's tokens go
    labels: Tensor  # int64 (B, S), what the next token is; IGNORE where nothing is learned
    block: Tensor  # int64 (B, S), 0 for what all blocks share, 1, 2, ... and -1 for padding
    position: Tensor  # int64 (B, S)
    pictures: Tensor | None  # uint8 (B, side, side, 3)


class Chat:
    """ChatML in token ids; pieces are tokenised apart at places where no token of the whole text could straddle.

    Apart, and not by `training.text.encode`, because a picture's ten questions share most of their pieces, which are kept.
    """

    def __init__(self, tokenizer: Any, image_tokens: int) -> None:
        self.tokenizer, self.image_id = tokenizer, int(tokenizer.convert_tokens_to_ids("<image>"))
        self._known: dict[str, tuple[int, ...]] = {}
        start, end = self.ids("<|im_start|>user\n"), self.ids("\n")
        self.prefix = [*start, *[self.image_id] * image_tokens, *end]

    def ids(self, text: str) -> tuple[int, ...]:
        if text not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[text]

    def block(self, pairs: Block) -> tuple[list[int], list[bool]]:
        """Tokens of a block and which of them are learned: answers with the mark that ends them."""
        tokens: list[int] = []
        learned: list[bool] = []
        for number, (asked, answered) in enumerate(pairs):
            before = self.ids(("\n<|im_start|>user\n" if number else "") + f"{asked}<|im_end|>\n<|im_start|>assistant\n")
            answer = self.ids(f"{answered}<|im_end|>")
            tokens += [*before, *answer]
            learned += [False] * len(before) + [True] * len(answer)
        return tokens, learned

    def batch(self, rows: Sequence[Sequence[Block]], pictures: np.ndarray | None) -> Batch:
        """One row for each picture (or, without pictures, each text) with its blocks."""
        prefix = self.prefix if pictures is not None else []
        return padded([self._row(blocks, prefix) for blocks in rows], None if pictures is None else torch.from_numpy(pictures))

    def _row(self, blocks: Sequence[Block], prefix: list[int]) -> list[tuple[int, int, int, int]]:
        shared = len(prefix)
        row = [(token, IGNORE, 0, place) for place, token in enumerate(prefix)]
        for number, pairs in enumerate(blocks, 1):
            tokens, learned = self.block(pairs)
            nexts = next_labels(np.where(learned, tokens, IGNORE)).tolist()
            row += [(token, after, number, shared + i) for i, (token, after) in enumerate(zip(tokens, nexts, strict=True))]
        return row


def padded(rows: Sequence[Sequence[tuple[int, int, int, int]]], pictures: Tensor | None) -> Batch:
    """Rows of (id, next label, block, position) as one batch."""
    longest = -(-max(len(row) for row in rows) // 64) * 64  # few lengths, so few compilations
    table = np.zeros((4, len(rows), longest), np.int64)
    table[1], table[2] = IGNORE, -1
    for i, row in enumerate(rows):
        table[:, i, : len(row)] = np.array(row, np.int64).T
    ids, labels, block, position = torch.from_numpy(table)
    return Batch(ids, labels, block, position, pictures)


def texts_batch(texts: Sequence[Sequence[int]]) -> Batch:
    """Token ids of plain texts, every token after the first learned."""
    rows = []
    for tokens in texts:
        nexts = next_labels(np.array(tokens[:LONGEST_TEXT])).tolist()
        rows.append([(token, after, 1, i) for i, (token, after) in enumerate(zip(tokens[:LONGEST_TEXT], nexts, strict=True))])
    return padded(rows, None)


# -- what a step reads ---------------------------------------------------------------------


class SmolData(Dataset):
    """Step number -> batch. `texts` are the language model's own, for stage 2; `blind` shows grey instead of pictures."""

    def __init__(
        self, chat_form: Chat, *, stage: str, batch: int, side: int, seed: int, texts: Any = None, blind: bool = False
    ) -> None:
        self.form, self.stage, self.batch, self.side, self.seed = chat_form, stage, batch, side, seed
        self.texts, self.blind = texts, blind

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, 43, list(FIRST).index(self.stage), step))
        every = TEXT_EVERY.get(self.stage, 0)
        if every and self.texts and step % every == every - 1:
            return texts_batch([self.texts[int(i)] for i in rng.integers(len(self.texts), size=TEXTS)])
        scenes = [scene("train", FIRST[self.stage] + step * self.batch + i, seed=self.seed) for i in range(self.batch)]
        types = PRACTISED if self.stage in ("practice", "recall") else HARD if step >= EVEN_STEPS else EVENLY
        rows = [align_blocks(s, rng) if self.stage == "align" else instruct_blocks(s, rng, types) for s in scenes]
        return self.form.batch(rows, draw(scenes, self.side, blind=self.blind))


def draw(scenes: Sequence[Scene], side: int, *, blind: bool = False) -> np.ndarray:
    """Pictures as the processor reduces them, uint8 (n, side, side, 3)."""
    if blind:
        return np.broadcast_to(np.array(GREY, np.uint8), (len(scenes), side, side, 3)).copy()
    return np.stack([np.asarray(s.picture().resize((side, side), Image.Resampling.BICUBIC)) for s in scenes])


def align_blocks(drawn: Scene, rng: np.random.Generator) -> list[Block]:
    """Stage 1: a caption, an account, and questions, most of them for a single word."""
    blocks: list[Block] = [[(_pick(rng, REQUESTS), caption(drawn))], [(_pick(rng, DESCRIBE), account(drawn, rng))]]
    questions = ask_about(drawn, rng, 8)
    return blocks + [[_short(q)] if i % 4 else [(q.text, q.answer)] for i, q in enumerate(questions)]


def instruct_blocks(drawn: Scene, rng: np.random.Generator, types: tuple[str, ...] = HARD) -> list[Block]:
    """Stage 2: the world's questions in its words and in others, single words, free talk, conversations."""
    questions = ask_about(drawn, rng, 9, types)
    blocks: list[Block] = []
    for i, question in enumerate(questions):
        if i < 5:
            blocks.append([(question.text, question.answer)])
        elif i < 7:
            blocks.append([_short(question)])
        else:
            blocks.append([retell(question, rng)])
    blocks += [[pair] for pair in (chat(drawn, rng), chat(drawn, rng)) if pair]
    roll = rng.random()
    if roll < 0.3:
        blocks.append([(_pick(rng, REQUESTS), caption(drawn))])
    elif roll < 0.5 and len(questions) > 2:
        chosen = [questions[int(i)] for i in rng.permutation(len(questions))[:3]]
        blocks.append([retell(q, rng) if rng.random() < 0.5 else (q.text, q.answer) for q in chosen])
    return blocks


def asked_blocks(drawn: Scene, rng: np.random.Generator) -> list[Block]:
    """The questions an evaluation asks, each as it is."""
    return [[(q.text, q.answer)] for q in ask_about(drawn, rng, 4)]


def _short(question: Question) -> tuple[str, str]:
    return f"{question.text}\n{SHORT}", question.short


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


# -- plain texts ----------------------------------------------------------------------------

ASKED = (
    *("What is the capital of Italy?", "Write two sentences about the sea.", "How do I boil an egg?", "Tell me a short joke."),
    *("What is photosynthesis?", "Give me three tips for sleeping well.", "Who wrote Hamlet?", "Explain gravity to a child."),
    *("Write a short poem about winter.", "What is 7 plus 5?", "How does a bicycle stay upright?", "Name four animals that fly."),
    *("What is a good breakfast?", "Translate 'good morning' into French.", "Why is the sky blue?", "Describe a busy market."),
    *("What does a doctor do?", "Write a polite email asking for a day off.", "How do plants drink?", "What is a computer?"),
    *("Tell me about the Moon.", "What are the seasons?", "How can I learn a new language?", "Give me a riddle."),
)
CHATS = tuple(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n" for asked in ASKED)
OPENED = (
    *("The old man walked", "In the nineteenth century,", "To make bread, you", "The committee decided that"),
    *("She opened the letter and", "Scientists have found that", "When the rain stopped,", "A good teacher", "The city lies on"),
    *("My grandmother always said that", "The train was late, so", "In mathematics, a function", "Many people believe that"),
    *("The first thing to do is", "At night the forest", "Water freezes when", "The museum opened in", "He had never seen"),
    *("Children learn best when", "The price of coffee", "If you want to travel,", "The engine of a car"),
    *("Once there was a king who", "It is often said that"),
)
EACH, LENGTH, HEAT = 4, 64, 0.9
BEGUN = (  # single words, so that what follows is as varied as the model is
    *("The", "A", "In", "I", "When", "It", "We", "He", "She", "They", "My", "This", "There", "On", "After", "Before"),
    *("If", "As", "For", "At", "You", "What", "How", "Why", "One", "Two", "Some", "Most", "Every", "From", "By", "During"),
    *("Although", "While", "Once", "Our", "People", "Today", "Since", "Under", "Because", "Her", "His", "Each", "Then"),
    *("Yesterday", "Without", "Over"),
)
AGAIN, WARM, AT_ONCE = 12, 1.0, 264  # texts to each beginning for the last stage, their temperature, rows sampled together


def own_texts(model: Any, tokenizer: Any, file: Path, *, each: int = EACH, length: int = LENGTH) -> list[list[int]]:
    """Token ids of texts sampled from the language model as it is, kept in `file` so that a resumed run reads the same."""
    groups = [[text for text in texts for _ in range(each)] for texts in (CHATS, OPENED)]
    return _sampled(model, tokenizer, file, list(enumerate(groups)), length=length, heat=HEAT)


def many_texts(model: Any, tokenizer: Any, file: Path, *, again: int = AGAIN, length: int = LENGTH) -> list[list[int]]:
    """More of them, from more beginnings and at the model's own temperature, for a stage that reads them half of the time."""
    prompts = [text for text in (*CHATS, *OPENED, *BEGUN) for _ in range(again)]
    groups = [(100 + n, prompts[first : first + AT_ONCE]) for n, first in enumerate(range(0, len(prompts), AT_ONCE))]
    return _sampled(model, tokenizer, file, groups, length=length, heat=WARM)


def _sampled(
    model: Any, tokenizer: Any, file: Path, groups: Sequence[tuple[int, list[str]]], *, length: int, heat: float
) -> list[list[int]]:
    """Continuations of each group's prompts with its seed, from `file` where they are there."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s is damaged and is written anew (%s)", file, one_line(error))
    log.info("the language model writes %d texts of its own", sum(len(prompts) for _, prompts in groups))
    texts: list[list[int]] = []
    for seed, prompts in groups:
        ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        texts += sample(model, ids, length=length, end=tokenizer.eos_token_id, seed=seed, heat=heat)
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(texts))
    return texts


@torch.no_grad()
def sample(model: Any, prompts: list[list[int]], *, length: int, end: int, seed: int, heat: float = HEAT) -> list[list[int]]:
    """Continue prompts by sampling, all at a time; an end mark is kept and nothing comes after it."""
    random = torch.Generator().manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    image_id, language, head = model.config.image_token_index, model.model.language_model, model.get_output_embeddings()
    texts: list[list[int]] = [list(row) for row in prompts]
    open_rows, cache = set(range(len(prompts))), None
    for _ in range(length):
        place = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = language(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = head(out.last_hidden_state[:, -1]).float()
        logits[:, image_id] = -torch.inf
        ids = torch.multinomial((logits / heat).softmax(-1), 1, generator=random)
        for row in list(open_rows):
            texts[row].append(int(ids[row]))
            if texts[row][-1] == end:
                open_rows.remove(row)
        if not open_rows:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return texts
