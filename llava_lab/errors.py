"""Errors a user can cause and mend. Each message is one line: expected, got, what to do.

All derive from ``ValueError`` through `LabError`, so `except ValueError` works and the
command line can turn any of them into exit code 2. Our own bugs stay `AssertionError`. What other libraries
raise is told from both by `foreign_line`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

OURS = ("llava_lab", "widgets")  # what computes and what shows
# What may raise for us: a picture that breaks off, a text no tokenizer reads, memory that a graphics card does not have.
LIBRARIES = frozenset(
    {
        *("PIL", "accelerate", "captum", "gguf", "huggingface_hub", "jinja2", "matplotlib", "numpy", "peft", "safetensors"),
        *("scipy", "sentencepiece", "tokenizers", "torch", "tqdm", "transformers"),
        *("anywidget", "ipywidgets", "traitlets"),
        *("beartype", "jaxtyping"),  # stand between ours and ours while tests run
    }
)

# What moves a terminal's cursor, colours or turns its text: control characters but tab and line end, marks that turn the
# direction of writing, and halves of characters that cannot be written at all.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ENDLESS = re.compile(r"\S{200,}")  # no word, but a file or a picture taken for a name


class LabError(ValueError):
    """Base of every mistake a user can make and mend. Its text is one printable line, whatever names and values stand in it."""

    def __str__(self) -> str:
        return readable(super().__str__())


class PictureError(LabError):
    """A picture that cannot be read, is empty, or is far too large."""


class CheckpointError(LabError):
    """A model name or folder that cannot be loaded exactly as it was saved."""


class OptionError(LabError):
    """An unknown option, or a value outside its range; the message lists the choices."""


class TargetError(LabError):
    """A target that does not occur in the answer; the message lists what does."""


class DataError(LabError):
    """A data file or world request that does not make sense."""


class EndpointError(LabError):
    """A server that cannot be reached, refuses, or answers with something that is not an answer."""


class WriteError(LabError, OSError):
    """A file that cannot be written: a full disk, a folder that is read-only, a name that is taken. Nothing was changed."""

    @classmethod
    def of(cls, path: object, error: Exception) -> WriteError:
        """The one line for what the system said of `path`; `errno` is kept."""
        told = cls(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
        told.errno = getattr(error, "errno", None)
        return told


class BudgetError(LabError):
    """More requests to a server than were allowed; nothing that was paid for is lost."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether main memory or a device's has run out: Python's own error, or one of torch's RuntimeErrors."""
    said = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(part in str(error) for part in said))


def one_line(error: BaseException) -> str:
    """Another library's error as one short line, for the message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def printable(text: str) -> str:
    """`text` for a terminal: what would steer it is written out as JSON writes it, an escape as backslash and ``u001b``."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def readable(message: str) -> str:
    """A message as one printable line, a name of thousands of letters cut short."""
    words = _ENDLESS.sub(lambda word: f"{word[0][:60]}...{word[0][-20:]}", " ".join(message.split()))
    return printable(words)


def foreign_line(error: Exception) -> str | None:
    """One line for an exception of another library or of the system; None for ours, for the caller's and for plain bugs.

    Told by who raised it. What a caller's own function raised (a callback, a connector of theirs) is the caller's. Of the
    rest, every class that a library made itself is foreign, and so are those of Python that say something of the input:
    a file, an encoding, a value, the machine. TypeError, AttributeError, KeyError and the like stay: they are our bugs.
    """
    homes = list(_homes(error))
    if isinstance(error, (LabError, MemoryError, BrokenPipeError)) or "" in homes:
        return None
    if is_out_of_memory(error):
        return f"the memory is not enough ({one_line(error)}); try a smaller model, picture or batch, or dtype='bfloat16'"
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename is not None else ""
        return f"cannot read or write{where} ({error.strerror})"
    raiser, maker = homes[-1] if homes else OURS[0], type(error).__module__.partition(".")[0]
    kinds = (OSError, EOFError, ValueError, RuntimeError, OverflowError, FloatingPointError)
    said_of_input = isinstance(error, kinds) or type(error) is Exception
    said_of_input |= "TextInputSequence" in str(error)  # a tokenizer's TypeError for text that cannot be encoded
    if raiser not in OURS:
        said_of_input |= isinstance(error, (ImportError, SyntaxError))
    if maker in LIBRARIES or (maker != "builtins" and maker in sys.stdlib_module_names) or said_of_input:
        return f"{'this input cannot be used' if raiser in OURS else f'{raiser} cannot go on'} ({one_line(error)})"
    return None


def _homes(error: BaseException) -> Iterator[str]:
    """For every frame an exception passed, the outermost first: our packages, a library's or Python's; "" for the caller's."""
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", "<generated>"))
        package = module.partition(".")[0]
        known = package in (*OURS, *LIBRARIES) or package in sys.stdlib_module_names or module.startswith("<")
        if package != "__main__" and known:
            yield package
        else:
            yield ""
        trace = trace.tb_next
