"""The text around a question, in the forms LLaVA is used with.

``llava-1.5`` and ``hf`` differ in the system sentence only, and give different answers, so a run
records which one it had. ``chat`` is for relatives with another language model, whose own template
is the right one; `llava_lab.models.lab` asks the processor for it.

It knows strings only; one ``<image>`` stands for all image tokens.
Source: haotian-liu/LLaVA @ c121f04 ``llava/conversation.py`` (``conv_vicuna_v1``).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from llava_lab.errors import OptionError

IMAGE = "<image>"
END_OF_TURN = "</s>"
CUE = "ASSISTANT:"  # the model answers after it; no space follows

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

History = Sequence[tuple[str, str]]


def build_prompt(question: str, form: str = "llava-1.5", history: History = ()) -> str:
    """The text given to the tokenizer: system, picture, earlier turns, question, and the cue to answer.

    `history` holds earlier (question, answer) pairs about the same picture, oldest first.
    Raises OptionError for an unknown form, an empty question, or text that holds ``<image>`` itself.
    """
    check_form(form)
    if form == "chat":
        raise OptionError("prompt='chat' is written by a checkpoint's own template; ask through a Lab")
    *earlier, (last, _) = turns(question, history)
    questions = [asked for asked, _ in earlier] + [last]
    parts = [f"USER: {IMAGE}\n{questions[0]} {CUE}"]
    parts += [f" {said}{END_OF_TURN}USER: {asked} {CUE}" for (_, said), asked in zip(earlier, questions[1:], strict=True)]
    return (f"{SYSTEM} " if form == "llava-1.5" else "") + "".join(parts)


def marked(text: str, marks: Sequence[str]) -> str:
    """The prompt with `marks` (before, after) around the picture, where a checkpoint was trained with them."""
    return text.replace(IMAGE, f"{marks[0]}{IMAGE}{marks[1]}") if marks else text


def chat_messages(question: str, history: History = ()) -> list[dict]:
    """The same turns as transformers' chat messages, the picture in the first."""
    messages: list[dict] = []
    for asked, said in turns(question, history):
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        if said is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


def turns(question: str, history: History = ()) -> list[tuple[str, str | None]]:
    """Checked (question, answer) pairs, oldest first; the last has no answer yet."""
    if isinstance(history, str) or any(isinstance(turn, str) or len(turn) != 2 for turn in history):
        raise OptionError("history must be a sequence of (question, answer) pairs, oldest first")
    earlier = [(_text(asked, "an earlier question"), _text(said, "an earlier answer")) for asked, said in history]
    return [*earlier, (_text(question, "the question"), None)]


def check_form(form: str) -> None:
    if form not in PROMPTS:
        raise OptionError(f"prompt must be one of {', '.join(PROMPTS)}, got {form!r}")


def _text(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise OptionError(f"{what} must be text, got {type(text).__name__}")
    if not text.strip():
        raise OptionError(f"{what} is empty; ask something, for example 'What is in the picture?'")
    for mark in (IMAGE, END_OF_TURN):
        if mark in text:
            raise OptionError(f"{what} holds {mark!r}, which the prompt adds itself; leave it out")
    return text.strip()
