"""Text: the prompt around a question, its tokens with every part's position, and answer tokens grouped into words.

    build_prompt("What color is the car?", "hf")  # "USER: <image>\\nWhat color is the car? ASSISTANT:"

Prompts. ``llava-1.5`` and ``hf`` differ in the system sentence only, and give different answers, so a run records which one it
had. ``chat`` is for relatives with another language model, whose own template is the right one; the processor writes it. One
``<image>`` stands for all image tokens.

Segments. The tokenizer's character offsets say where the question ends, and the image tokens are found by their id; nothing is
computed from lengths. Segments cover the sequence in order: ``system`` (everything before the picture), ``image``, ``history``
(earlier turns, only when given), ``question``, ``cue`` (what asks for the answer), and ``answer`` once there is one. Several
pictures stand in ``image`` one after the other, what the prompt writes between them included; without a picture it is empty
and stands where the first would.

Words. Byte-level BPE (``Ġred``) and SentencePiece (``▁red``) mark word starts differently, and both may spread one character over
several tokens. So nothing is read off the pieces: every prefix of the answer is decoded, which tells the characters each token
completed; words are then cut in the decoded text. A word is a run of letters and digits (with inner apostrophes, hyphens,
points, and with the marks that belong to a letter: accents written apart, the vowels of Hindi), a run of other signs, or one
character of a script written without spaces.

Source: haotian-liu/LLaVA @ c121f04 ``llava/conversation.py`` (``conv_vicuna_v1``).
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from llava_lab.checks import is_list, is_text, shown
from llava_lab.errors import CheckpointError, DataError, OptionError
from llava_lab.models import layout
from llava_lab.results import Span, Word

IMAGE = "<image>"
END_OF_TURN = "</s>"
CUE = "ASSISTANT:"  # the model answers after it; no space follows
AFTER = f" {CUE}"  # what stands behind the last question in our own forms
BEFORE = "USER: "  # what stands before it where turns were said before
STAND_IN = "the question stands here"  # to see what a chat template writes behind a question

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

PROMPTS = MappingProxyType(
    {
        "llava-1.5": "what LLaVA-1.5 was trained and evaluated with: Vicuna v1 turns after its system sentence",
        "hf": "the same turns without the system sentence, as the hub's template for LLaVA-1.5 writes them",
        "chat": "the checkpoint's own chat template",
    }
)

MARKED = "image_marks"  # config.json's entry for words that stand before and after every picture; ours, stock models ignore it

UNFINISHED = "\ufffd"  # what decoding shows for bytes that are not a whole character yet

HALF = re.compile("[\ud800-\udfff]")  # surrogates, which JSON can hold and no text is

_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
JOINERS = "\u200c\u200d"  # join, or keep apart, the letters on both sides
_LETTER = rf"[^\W{_SPACELESS}]"
_WORD = re.compile(rf"[{_SPACELESS}]|{_LETTER}+(?:['’.,:-]{_LETTER}+)*|[^\w\s]+")

History = Sequence[tuple[str, str]] | Sequence[Mapping[str, Any]] | Mapping[str, Any]  # see `read_history`


class Decoder(Protocol):
    """All that is asked of a tokenizer to read its words."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    text: str  # the exact text given to the tokenizer, one <image> a picture
    token_ids: np.ndarray  # int64 (T,), image tokens expanded
    segments: dict[str, Span]  # system, image, (history), question, cue


def build_prompt(question: str, form: str = "llava-1.5", history: History = (), pictures: int = 1) -> str:
    """The text given to the tokenizer: system, picture, earlier turns, question, and the cue to answer.

    `history` holds earlier (question, answer) pairs or messages about the same picture, oldest first (`read_history`);
    `pictures` says how many there are.
    Raises OptionError for an unknown form, an empty question, or text that holds ``<image>`` itself.

    >>> from llava_lab.models import build_prompt
    >>> build_prompt("Is it red?", "hf")
    'USER: <image>\\nIs it red? ASSISTANT:'
    """
    check_form(form)
    if form == "chat":
        raise OptionError("prompt='chat' is written by a checkpoint's own template; ask through a Lab")
    *earlier, (last, _) = turns(question, history)
    questions = [question for question, _ in earlier] + [last]
    shown = f"{IMAGE}\n" * pictures
    parts = [f"{BEFORE}{shown}{questions[0]} {CUE}"]
    parts += [f" {answer}{END_OF_TURN}{BEFORE}{after} {CUE}" for (_, answer), after in zip(earlier, questions[1:], strict=True)]
    return (f"{SYSTEM} " if form == "llava-1.5" else "") + "".join(parts)


def marked(text: str, marks: Sequence[str]) -> str:
    """The prompt with `marks` (before, after) around the picture, where a checkpoint was trained with them."""
    return text.replace(IMAGE, f"{marks[0]}{IMAGE}{marks[1]}") if marks else text


def chat_messages(question: str, history: History = (), pictures: int = 1) -> list[dict]:
    """The same turns as transformers' chat messages, the pictures in the first."""
    messages: list[dict] = []
    for text, answer in turns(question, history):
        messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"][:0] = [{"type": "image"} for _ in range(pictures)]
    return messages


def turns(question: str, history: Any = ()) -> list[tuple[str, str | None]]:
    """Checked (question, answer) pairs, oldest first; the last has no answer yet. `history` as `read_history` takes it."""
    pairs = read_history(history)
    earlier = [(_checked(text, "an earlier question"), _checked(answer, "an earlier answer")) for text, answer in pairs]
    return [*earlier, (_checked(question, "the question"), None)]


# -- conversations as people hold them ------------------------------------------------------

HUMAN, MODEL = ("human", "user"), ("gpt", "assistant", "model")  # LLaVA's names first, then those of chat formats
WRITERS, CONTENTS = ("from", "role"), ("value", "content")
LISTS = ("conversations", "messages")  # what holds the messages of a row
TEXT_PARTS, PICTURE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")


@dataclass(frozen=True)
class Message:
    """One message of a conversation, whatever form it came in."""

    human: bool
    text: str  # without what stood for a picture
    picture: bool  # whether it shows a picture: an <image> in its text, or a part that is one


def read_messages(messages: Any) -> list[Message]:
    """Messages in turn, the human's first: ``from`` and ``value`` as LLaVA has them, or ``role`` and ``content``.

    The content is text or a list of parts, as chat formats have it. What is meant is read from the names, never from how
    many there are. Raises OptionError that says which message is none.
    """
    if not is_list(messages) or not all(isinstance(message, Mapping) for message in messages):
        raise OptionError("a conversation must be a list of {'from': ..., 'value': ...} or {'role': ..., 'content': ...}")
    found: list[Message] = []
    for number, message in enumerate(messages):
        writer = _writer(message)
        expected = (HUMAN, MODEL)[number % 2]
        if writer is None:
            raise OptionError(
                f"turn {number} does not say who it is from: expected {' or '.join(WRITERS)} with {' or '.join(CONTENTS)}, "
                f"got {shown(list(message))}"
            )
        if writer not in expected:
            raise OptionError(
                f"turn {number} is from {shown(writer)}, expected {expected[0]!r}: human and gpt (user and assistant) must "
                "alternate, and what a system says is the prompt's own"
            )
        name = next((name for name in CONTENTS if name in message), CONTENTS[0])
        text, pictures = _content(message.get(name), f"turn {number}", name)
        if half := HALF.search(text):
            raise OptionError(f"turn {number} holds half a character (U+{ord(half[0]):04X}); take it out")
        found.append(Message(writer in HUMAN, text, pictures > 0))
    return found


def _content(content: Any, where: str, name: str) -> tuple[str, int]:
    """The text of a message without the marks of pictures, and how many pictures it shows."""
    parts = content if is_list(content) else [content]
    texts, pictures = [], 0
    for part in parts:
        kind = _name(part.get("type", "text")) if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind in PICTURE_PARTS:
            pictures += 1
        elif kind in TEXT_PARTS and isinstance(text, str):
            pictures += text.count(IMAGE)
            texts.append(text.replace(IMAGE, "").strip())
        elif kind in TEXT_PARTS:
            raise OptionError(f"{where} has no text in {name!r}")
        else:
            raise OptionError(f"{where} holds a part of type {shown(kind)}; expected text or image")
    return "\n".join(filter(None, texts)), pictures


def read_row(row: Any) -> tuple[list[Message], str | None]:
    """A row of data as LLaVA and others hold it: its messages in turn, and its picture's name, None for text alone.

    Messages stand under ``conversations`` or ``messages``, the picture under ``image`` or ``images``, alone or in a list of
    one; an empty name or list is none. Raises DataError that says what of the row is not so; the caller adds its place.

    >>> from llava_lab.models.text import read_row
    >>> said = [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A car."}]
    >>> messages, picture = read_row({"image": ["a.jpg"], "conversations": said})
    >>> messages[0].text, picture
    ('What is it?', 'a.jpg')
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected an object with 'conversations', got {type(row).__name__}")
    said = row.get(next((name for name in LISTS if name in row), LISTS[0]))
    if is_list(said) and len(said) and isinstance(said[0], Mapping) and _writer(said[0]) not in HUMAN:
        said = said[1:]  # LLaVA skips a first turn that is not the human's
    try:
        messages = read_messages(said)
    except OptionError as error:
        raise DataError(str(error)) from None
    if not messages or messages[-1].human:
        raise DataError(
            f"the conversation has {len(messages)} turns; expected question and answer in turn, ending with an answer"
        )
    return messages, _picture_of(row, messages)


def _picture_of(row: Mapping[str, Any], messages: list[Message]) -> str | None:
    named = row.get("image") or row.get("images")
    names = list(named) if is_list(named) else [named]
    names = [name for name in names if name not in (None, "")]
    asked, answered = (sum(message.picture for message in messages if message.human == human) for human in (True, False))
    if len(names) > 1:
        raise DataError(f"the row names {len(names)} pictures; a row has one picture, or none")
    if not names:
        if asked or answered:
            raise DataError(f"the text has {IMAGE} but the row names no 'image'")
        return None
    if not isinstance(names[0], str):
        raise DataError(f"'image' must be the path of one picture, got {shown(names[0])}")
    if answered or not asked:
        raise DataError(f"a row with a picture has {IMAGE} in a question (and in no answer)")
    if asked > 1:
        raise DataError(f"{asked} questions hold {IMAGE} and the row names one picture; leave it in the question that shows it")
    return names[0]


def _writer(message: Mapping[str, Any]) -> str | None:
    return _name(next((message[name] for name in WRITERS if name in message), None))


def _name(value: Any) -> str | None:
    """What should be a name, as text that can be compared with names: an array would be compared value by value."""
    return value if value is None or isinstance(value, str) else shown(value)


def read_history(history: Any) -> list[tuple[Any, Any]]:
    """Earlier (question, answer) pairs, oldest first, from pairs or from messages as `read_messages` takes them.

    A picture that the earlier turns show is the one that is asked about: it stands before the first question, once.

    >>> from llava_lab.models.text import read_history
    >>> read_history([{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes."}])
    [('Is it red?', 'Yes.')]
    """
    if isinstance(history, Mapping) and (name := next((name for name in LISTS if name in history), None)):
        history = history[name]
    if history is None or (is_list(history) and not len(history)):
        return []
    if not is_list(history) or not all(isinstance(turn, Mapping) or _is_pair(turn) for turn in history):
        raise OptionError(
            "history must be a list of (question, answer) pairs, oldest first, or of messages with 'role' and 'content' or "
            f"'from' and 'value'; got {shown(history)}"
        )
    if not any(isinstance(turn, Mapping) for turn in history):
        return [(question, answer) for question, answer in history]
    messages = read_messages(history)
    if messages[-1].human:
        raise OptionError("history ends with a question that has no answer; leave it out there, and ask it as the question")
    if sum(message.picture for message in messages) > 1:
        raise OptionError("history shows more than one picture, and one picture is asked about; keep the mark of that one")
    return [(asked.text, answered.text) for asked, answered in zip(messages[::2], messages[1::2], strict=True)]


def _is_pair(turn: Any) -> bool:
    return is_list(turn) and len(turn) == 2 and not any(isinstance(part, Mapping) for part in turn)


def check_form(form: str) -> None:
    if form not in PROMPTS:
        raise OptionError(f"prompt must be one of {', '.join(PROMPTS)}, got {form!r}")


def _checked(text: str, what: str) -> str:
    if not isinstance(text, str) or not is_text(text):
        several = "; one question at a time here, lab.ask_many(pictures, questions) asks several" * isinstance(text, list | tuple)
        raise OptionError(f"{what} must be text, got {shown(text)}{several}")
    if not text.strip():
        mend = "ask something, for example 'What is in the picture?'" if "question" in what else "leave that turn out"
        raise OptionError(f"{what} is empty; {mend}")
    for mark in (IMAGE, END_OF_TURN):
        if mark in text:
            raise OptionError(f"{what} holds {mark!r}, which the prompt adds itself; leave it out")
    return text.strip()


def question_start(text: str, question: str, after: str = AFTER) -> int:
    """Where the last turn's question begins in a prompt that goes on with `after`: before that, not in it ("A", "ASSISTANT:")."""
    end = len(text) - len(after) if text.endswith(after) else len(text)
    return end - len(question) if text.endswith(question, 0, end) else text.rfind(question, 0, end)


def encode(
    tokenizer: Any,
    text: str,
    question: str,
    *,
    image_id: int,
    image_tokens: int,
    pictures: int = 1,
    beside: str = "",
    history: bool = False,
    after: str = AFTER,
) -> Prompt:
    """Tokenize `text`, expand its image token of each picture, and find the segments; `question` is the last turn's.

    `beside`: without a picture, the same prompt with one; where they part the picture would stand. `after` is what the
    prompt writes behind the question.
    """
    if text.count(IMAGE) != pictures:
        wanted = "once" if pictures == 1 else f"{pictures} times"
        wrote = text.count(IMAGE)
        raise CheckpointError(f"the prompt must hold {IMAGE} {wanted}, its template wrote it {wrote} times: {text!r}")
    first = question_start(text, question, after)
    if first < 0:
        raise CheckpointError(f"the chat template does not write the question as it is asked: {text!r}")
    coded = tokenize(tokenizer, text)
    short = np.array(coded["input_ids"], np.int64)
    ids = layout.expand_image(short, image_id, image_tokens, pictures)
    spans = layout.image_spans(ids, image_id, image_tokens, pictures)
    if spans:
        start, stop = spans[0][0], spans[-1][1]
    else:
        begin = _shared(text, beside)
        start = stop = next(i for i, (_, hi) in enumerate(coded["offset_mapping"]) if hi > begin)
    extra = len(ids) - len(short)  # how far expansion moved everything after the image
    ends = [(i + extra, lo, hi) for i, (lo, hi) in enumerate(coded["offset_mapping"]) if i + extra >= stop]
    # the first token that begins at or after the question's end, and the first that reaches beyond its beginning
    cue = next((i for i, lo, hi in ends if lo >= first + len(question) and hi > lo), len(ids))
    asked = next((i for i, _, hi in ends if hi > first), cue) if history else stop
    segments = {"system": (0, start), "image": (start, stop)}
    if history:
        segments["history"] = (stop, asked)
    segments |= {"question": (asked, cue), "cue": (cue, len(ids))}
    return Prompt(text, ids, segments)


def tokenize(tokenizer: Any, text: str) -> Any:
    """``input_ids`` and ``offset_mapping`` of a whole prompt, the token that begins a sequence in it once."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer(text, return_offsets_mapping=True, add_special_tokens=not has_bos)


def decode(tokenizer: Decoder, token_ids: Sequence[int]) -> str:
    """The text of `token_ids`, without special tokens and without tidying of spaces."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def finished(text: str) -> str:
    """`text` without a trailing character whose bytes have not all arrived."""
    return text.rstrip(UNFINISHED)


def token_ends(tokenizer: Decoder, token_ids: Sequence[int]) -> list[int]:
    """For each token, how many characters of the decoded answer are complete once it is there."""
    whole = decode(tokenizer, token_ids)
    # An unfinished character decodes to UNFINISHED, which differs from the whole answer at that place. A byte
    # fallback spoils the finished characters before it too, so what was complete once stays complete.
    shared = (_shared(decode(tokenizer, token_ids[: i + 1]), whole) for i in range(len(token_ids)))
    return list(accumulate(shared, max))


def group_words(tokenizer: Decoder, token_ids: Sequence[int], start: int = 0) -> tuple[Word, ...]:
    """The answer's words in order, each with the tokens [start, stop) that spell it.

    `start` is the answer's first position in the sequence. A token belongs to the word of its first
    visible character; white space and the first bytes of a character belong to the word that follows.
    A word without a token of its own (``red.`` as one token) is joined to the word before it.
    """
    text = decode(tokenizer, token_ids)
    ends = token_ends(tokenizer, token_ids)
    spans = _word_spans(text)
    begins = [0, *ends][:-1]  # where the character a token writes, or begins to write, stands
    stops = [stop for _, stop in spans]
    owned: dict[int, list[int]] = {}
    for i, at in enumerate(begins):
        owned.setdefault(bisect_right(stops, at), []).append(i)  # the first word that ends behind it
    words: list[Word] = []
    for number, (lo, hi) in enumerate(spans):
        tokens = owned.get(number, [])
        if tokens:
            words.append(Word(text[lo:hi], start + tokens[0], start + tokens[-1] + 1))
        elif words:
            last = words[-1]
            gap = text[spans[number - 1][1] : lo]
            words[-1] = Word(last.text + gap + text[lo:hi], last.start, last.stop)
    return tuple(words)


def _word_spans(text: str) -> list[Span]:
    """Where the words of a text are. A mark that belongs to a letter is read as that letter once more."""
    read = list(text)
    for i in range(1, 0 if text.isascii() else len(text)):
        is_mark = text[i] in JOINERS or unicodedata.category(text[i]).startswith("M")
        if is_mark and re.match(_LETTER, read[i - 1]):
            read[i] = read[i - 1]
    return [match.span() for match in _WORD.finditer("".join(read))]


def cut(text: str) -> list[bytes]:
    """A text without tokens, cut before each word: pieces that spell it and can stand in for tokens."""
    begins = [start for start, _ in _word_spans(text)][1:]
    begins = [len(text[:at].rstrip()) for at in begins]  # the space belongs to the word that follows
    edges = [0, *begins, len(text)]
    return [text[lo:hi].encode() for lo, hi in pairwise(edges) if hi > lo]


class Spelt:
    """A `Decoder` that knows its tokens' bytes, for answers that come without a tokenizer."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return b"".join(self.pieces[token] for token in token_ids).decode("utf-8", "replace")

    def words(self, token_ids: Sequence[int], start: int) -> tuple[Word, ...]:
        return group_words(self, token_ids, start)


def _shared(a: str, b: str) -> int:
    """Length of the common beginning of two strings, found by halves: letter by letter takes the square of a long answer."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def refuse_special_text(tokenizer: Any, *texts: str) -> None:
    """Raise OptionError when a user's text would be read as a special token instead of as text."""
    for text in texts:
        for mark in (*tokenizer.all_special_tokens, IMAGE, END_OF_TURN):
            if mark in text:
                raise OptionError(f"the text {text[:60]!r} holds {mark!r}, a special token of this model; leave it out")


def pieces(tokenizer: Any, token_ids: np.ndarray) -> tuple[str, ...]:
    """A readable text for every token, spaces kept; a part of a character shows as the tokenizer's own piece."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # decoders strip the first token's space
    before = len(_decode(tokenizer, anchor))
    shown: dict[int, str] = {}
    for token in {int(i) for i in token_ids}:
        name = tokenizer.convert_ids_to_tokens(token)
        text = _decode(tokenizer, [*anchor, token])[before:]
        shown[token] = text if text and UNFINISHED not in text else name or f"<{token}>"
    return tuple(shown[int(i)] for i in token_ids)


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
