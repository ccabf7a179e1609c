"""A stranger's chat template and tokenizer, run in a process of their own; `foreign` starts it and reads what it says.

A script, not a module: it reads one job as JSON from standard input, does it under limits of time and memory, and writes
JSON to standard output. A template that never ends, or a tokenizer that takes its process down, takes down this one only.
Imports nothing of ours, so that it starts in a tenth of a second.

The environment of a template is that of transformers (``utils/chat_template_utils.py``): Jinja's sandbox, whose objects
cannot be changed, with the same trimming, extensions, filter and functions.
"""

import datetime
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MEMORY = 4 << 30  # bytes of address space
LONGEST = 4_000_000  # characters a template may write


def main() -> None:
    job = json.load(sys.stdin)
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits; the parent's patience is one everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        answer = {"value": render(**job["render"]) if "render" in job else encode(**job["encode"])}
    except Exception as error:  # whatever a stranger's file makes its library raise
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    json.dump(answer, sys.stdout)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text a chat template writes."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the model says; for the text it is nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    length, parts = 0, []
    for part in environment.from_string(template).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > LONGEST:
            raise ValueError(f"it writes more than {LONGEST:,} characters")
    return "".join(parts)


def encode(folder: str, texts: list[str]) -> list[int]:
    """How many tokens a folder's tokenizer makes of each text; each is decoded again too."""
    if (file := Path(folder, "tokenizer.json")).is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        coded = [tokenizer.encode(text).ids for text in texts]
        for ids in coded:
            tokenizer.decode(ids)
    elif (file := Path(folder, "tokenizer.model")).is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(file))
        coded = [pieces.encode(text) for text in texts]
    else:
        coded = []
    return [len(ids) for ids in coded]


if __name__ == "__main__":
    main()
