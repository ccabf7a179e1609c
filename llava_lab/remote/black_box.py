"""BlackBox: a vision model behind an OpenAI-compatible address, asked like a `Lab` and explained from outside.

    box = ll.load("openai:gpt-4o", base_url="https://api.openai.com/v1", max_requests=200)
    run = box.ask("picture.png", "What color is the car?")
    print(ll.estimate(box, run, method="occlusion", target="red"))
    relevance = ll.attribute(box, run, method="occlusion", target="red")

It speaks the chat completions of GPT-4's vision, vLLM, llama.cpp's server and Ollama. What is inside stays
unknown: no patches, no attention, no gradients. So the grid is ours, laid over all of the picture, and only the
methods that need nothing but altered pictures apply; everything that looks inside is refused in one line.

Pictures leave this machine, which is why the address is always given and never assumed. They are sent as PNG,
without loss, at most `longest` pixels on their longer side.

How altered pictures are scored is said in `llava_lab.remote.explain`.

`open_judge` opens such a model as a judge, for benchmarks with free answers. What was paid for is kept: the same prompt to the
same judge is answered from the cache, so a run that was stopped goes on.

    judge = open_judge("gpt-4o", "https://api.openai.com/v1", max_requests=200)
    benchmark(lab, "mm-vet", data="mm-vet", judge=judge)
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from llava_lab.attribution.registry import works_at
from llava_lab.checks import entry, is_list, number, one_of, shown, whole_number
from llava_lab.errors import BudgetError, CheckpointError, EndpointError, OptionError
from llava_lab.evaluation.benchmarks import Judge
from llava_lab.geometry import PictureMap
from llava_lab.models import text as prompts
from llava_lab.models.pictures import Shown, read_pictures
from llava_lab.options import by_our_names
from llava_lab.remote.client import Endpoint
from llava_lab.remote.replies import Reply, ReplyCache, token_id
from llava_lab.results import Run, cut_notes
from llava_lab.results.table import png_address

PREFIX = "openai:"
SCORINGS = ("auto", "top", "prefill", "agreement")
MOST_LISTED = 20  # tokens OpenAI and vLLM list at each place
LARGEST_GRID = 64  # cells a side
INSIDE = frozenset(  # what a Lab has and a closed model has not
    (
        *("model", "processor", "tokenizer", "connector", "preprocessing", "swap", "inputs", "sequence", "asked_instead"),
        *("pixels", "measure", "image_id", "eos_ids", "card", "dtype", "context"),
    )
)


@dataclass(frozen=True)
class Estimate:
    """What a call will ask for, at most; str() is a line to read before it starts."""

    requests: int  # that will be sent, retries not counted
    known: int  # answered from what was kept
    left: int  # requests that may still be sent
    tokens: tuple[int, int] | None  # read and written; None where the server does not count
    cost: float | None  # in the currency of `price`

    def __str__(self) -> str:
        line = f"{self.requests} requests to send, {self.known} known already, {self.left} left of the budget"
        if self.tokens:
            line += f"; about {self.tokens[0]:,} tokens to read and {self.tokens[1]:,} to write"
        return line + (f", {self.cost:.4g} at the price given" if self.cost is not None else "")


def works() -> str:
    """What can be done with a closed model, for one-line refusals."""
    return f"with a closed model work ask, ask_without, faithfulness, and attribute with method {', '.join(works_at('pixels'))}"


@dataclass(frozen=True)
class Look:
    """One request: a picture beside a conversation."""

    picture: np.ndarray  # uint8 (height, width, 3), as sent
    turns: tuple[tuple[str, str | None], ...]
    limit: int  # tokens
    temperature: float
    seed: int
    begun: str = ""  # the answer's beginning, for the server to go on from


class BlackBox:
    """A closed model, its address, its budget and what it has answered so far.

    >>> box = ll.BlackBox("a-model", "http://127.0.0.1:8000/v1", max_requests=10, cache=False)
    >>> box.endpoint.left
    10
    """

    @entry
    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        grid: tuple[int, int] = (12, 12),
        scoring: str = "auto",
        repeats: int = 1,
        floor: float = -10.0,
        max_requests: int = 500,
        price: tuple[float, float] | None = None,
        parallel: int = 4,
        cache: str | os.PathLike | bool | None = None,
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        longest: int = 768,
        system: str | None = None,
        detail: str | None = None,
    ) -> None:
        """`llava_lab.load("openai:MODEL", base_url=...)` is the way here, with these options.

        `grid`: rows and columns of cells. `scoring`: "auto" is "top" where the server lists log-probabilities and
        else "agreement", with `repeats` answers to each picture; "prefill" is for servers that go on from a given
        beginning (vLLM, llama.cpp); `floor` is the least a token may count (see `llava_lab.remote.explain`).
        `max_requests`: all that may ever be sent, retries included. `price`: per million tokens read, and written.
        `parallel`: requests at once. `cache`: a folder, None for the user's own
        (``~/.cache/llava-lab/replies``), False for none. `key_variable`: the environment variable that holds the
        key, ``OPENAI_API_KEY`` if it is not named. `timeout`: seconds for a whole reply. `longest`: pixels of the longer
        side as sent. `system`: a system text. `detail`: OpenAI's "low", "high" or "auto".
        """
        if not isinstance(model, str) or not model.strip():
            raise OptionError(f"expected {PREFIX}MODEL with the name the server knows, got {PREFIX + model!r}")
        self.model_name, self.name = model, f"{PREFIX}{model}"
        self.grid, self.scoring = _grid(grid), one_of("scoring", scoring, SCORINGS)
        self.floor = number("floor", floor, least=-1000)
        self.repeats, self.parallel = whole_number("repeats", repeats, least=1), whole_number("parallel", parallel, least=1)
        self.longest, self.price = whole_number("longest", longest, least=1), _price(price)
        if not -1000 <= self.floor < 0:
            raise OptionError(f"floor is the log-probability of what is not listed, below 0; got {floor!r}")
        self.system, self.detail = system, detail
        self.endpoint = Endpoint(base_url, max_requests=max_requests, key_variable=key_variable, timeout=timeout, retries=retries)
        self.cache = ReplyCache(cache_folder(cache))
        self.used = (0, 0)  # tokens read and written by requests sent
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        rows, cols = self.grid
        sent = f"{self.endpoint.requests} of {self.endpoint.max_requests} requests sent"
        return f"BlackBox({self.name!r}, at {self.endpoint.base_url}, {rows}x{cols} cells, {sent})"

    def __getattr__(self, name: str) -> NoReturn:
        if name in INSIDE:
            raise EndpointError(f"{self.name!r} is a black box and has no {name} to look at; {works()}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def fingerprint(self) -> str:
        """The name of what is asked: address, model and system text. The server may change the weights behind it."""
        return hashlib.sha256(repr((self.endpoint.base_url, self.model_name, self.system)).encode()).hexdigest()[:16]

    @property
    def max_requests(self) -> int:
        """The budget of this lab, in requests sent; it may be raised at any time."""
        return self.endpoint.max_requests

    @max_requests.setter
    def max_requests(self, number: int) -> None:
        self.endpoint.max_requests = whole_number("max_requests", number, least=1)

    @property
    def cost(self) -> float | None:
        """What the requests sent so far cost at `price`, by the server's own count of tokens."""
        return self._cost(self.used)

    @entry
    def ask(
        self,
        picture: Shown,
        question: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        history: prompts.History = (),
        on_token: Callable[[str], None] | None = None,
    ) -> Run:
        """Ask about a picture; one request, or none if this was asked before.

        The run's `tokens` and `logprobs` are the server's where it gives them, else words without (NaN). Its
        prompt is the question alone, since the server's own form is unknown; `on_token` gets the answer whole.
        Raises EndpointError, BudgetError, OptionError, PictureError.
        """
        limit, warm = whole_number("max_new_tokens", max_new_tokens, least=1), number("temperature", temperature)
        pictures = read_pictures(picture)
        if len(pictures) != 1:
            raise OptionError(f"a closed model is asked about one picture at a time, got {len(pictures) or 'none'}")
        (pixels,) = pictures
        turns = tuple(prompts.turns(question, history))
        reply = self.replies([Look(self.shrunk(pixels), turns, limit, warm, seed)])[0]
        if not reply.text:
            why = reply.silence or f"it stopped with {reply.stopped!r}; ask otherwise, or for more tokens"
            raise EndpointError(f"{self.name!r} gave no text: {why}")
        if on_token:
            on_token(reply.text)
        options = {"max_new_tokens": limit, "temperature": warm, "stopped": reply.stopped}
        return self._run(pixels, turns, reply, seed, options)

    def check(self, run: Run) -> None:
        """Raises CheckpointError for a run that another model, address or system text gave."""
        if run.fingerprint != self.fingerprint:
            raise CheckpointError(f"expected a run made by {self.name!r} at its address, got one by {run.model!r}; ask again")
        # what is asked again are the turns; a file that was changed may show another question
        turns = run.options.get("turns")
        asked = [turn[0] for turn in turns if is_list(turn) and len(turn) == 2] if is_list(turns) else []
        told, spelt = f"{prompts.IMAGE}\n{run.question}", run.token_ids[run.segments["question"][0]]
        if asked[-1:] != [run.question] or run.prompt != told or spelt != token_id(run.question.encode()):
            raise CheckpointError(f"this run is damaged: it did not ask {shown(run.question)}; ask again with this lab")

    def shrunk(self, picture: np.ndarray) -> np.ndarray:
        """The picture as it is sent: at most `longest` pixels on its longer side."""
        height, width = picture.shape[:2]
        if max(height, width) <= self.longest:
            return picture
        scale = self.longest / max(height, width)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))

    def replies(self, looks: Sequence[Look]) -> list[Reply]:
        """The answer to each look, `parallel` requests at a time; what was asked before is not asked again.

        On any error or Ctrl-C nothing more is sent, and every reply that came is kept.
        """
        keys = [self.key(look) for look in looks]
        new = {key: look for key, look in zip(keys, looks, strict=True) if key not in self.cache}
        stop = threading.Event()
        pool = ThreadPoolExecutor(max_workers=min(self.parallel, max(len(new), 1)))
        try:
            for future in as_completed([pool.submit(self._fetch, key, look, stop) for key, look in new.items()]):
                future.result()
        except BudgetError:
            pool.shutdown(wait=True)  # what is on its way is paid for
            raise
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return [reply for key in keys if (reply := self.cache.get(key)) is not None]

    def key(self, look: Look) -> str:
        """The name of a request by its content: address, model, words, settings and every pixel."""
        shape = "x".join(map(str, look.picture.shape))
        mark = f"{shape} {hashlib.sha256(np.ascontiguousarray(look.picture).tobytes()).hexdigest()}"
        text = json.dumps([self.endpoint.base_url, self._body(look, mark)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def estimate(self, requests: int, known: int, run: Run) -> Estimate:
        """The cost of `requests` like the one that `run` was."""
        used = run.options.get("used")
        tokens = None if used is None else (used[0] * requests, used[1] * requests)
        return Estimate(requests, known, self.endpoint.left, tokens, None if tokens is None else self._cost(tokens))

    def _fetch(self, key: str, look: Look, stop: threading.Event) -> None:
        try:
            reply = self.endpoint.ask(self._body(look, png_address(Image.fromarray(look.picture))), stop)
        except EndpointError:
            # told here, not by who waits: this thread would take the next request before the other hears of it
            stop.set()
            raise
        read, written = reply.used or (0, 0)
        with self._lock:
            self.used = self.used[0] + read, self.used[1] + written
            self.cache.put(key, reply)

    def _body(self, look: Look, address: str) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        place = {"url": address} | ({"detail": self.detail} if self.detail else {})
        for turn, (question, answer) in enumerate(look.turns):
            seen = [{"type": "image_url", "image_url": place}] if turn == 0 else []
            messages.append({"role": "user", "content": [*seen, {"type": "text", "text": question}]})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        if look.begun:
            messages.append({"role": "assistant", "content": look.begun})
        settings = {"max_tokens": look.limit, "temperature": look.temperature, "seed": look.seed}
        listed = {"logprobs": True, "top_logprobs": MOST_LISTED} if self.scoring != "agreement" else {}
        going_on = {"continue_final_message": True, "add_generation_prompt": False} if look.begun else {}  # vLLM's words
        return {"model": self.model_name, "messages": messages, **settings, **listed, **going_on}

    def _run(
        self, picture: np.ndarray, turns: tuple[tuple[str, str | None], ...], reply: Reply, seed: int, options: dict[str, Any]
    ) -> Run:
        if self.scoring in ("top", "prefill") and reply.tokens is None:
            raise EndpointError(
                f"{self.name!r} gives no log-probabilities, which scoring={self.scoring!r} needs; use 'agreement' or 'auto'"
            )
        rows, cols = self.grid
        tokens = reply.tokens if self.scoring != "agreement" else None
        scoring = "agreement" if tokens is None else "prefill" if self.scoring == "prefill" else "top"
        pieces = [token.piece for token in tokens] if tokens else prompts.cut(reply.text)
        ids = [token_id(piece) for piece in pieces]
        question = turns[-1][0]
        before = ["<image>"] * (rows * cols) + [str(turns[:-1])] * (len(turns) > 1) + [question]
        start, last = len(before), len(before) - 1
        segments = {"image": (0, rows * cols), "question": (last, start), "answer": (start, start + len(ids))}
        if len(turns) > 1:
            segments["history"] = (last - 1, last)
        height, width = picture.shape[:2]
        return Run(
            picture=picture,
            question=question,
            answer=reply.text,
            prompt=f"{prompts.IMAGE}\n{question}",
            token_ids=np.array([token_id(text.encode()) for text in before] + ids, np.int64),
            tokens=(*before, *(piece.decode("utf-8", "replace") for piece in pieces)),
            segments=segments,
            words=prompts.Spelt(dict(zip(ids, pieces, strict=True))).words(ids, start),
            logprobs=np.array([token.logprob for token in tokens] if tokens else [np.nan] * len(ids), np.float32),
            map=PictureMap.whole(width, height, rows=rows, cols=cols),
            model=self.name,
            fingerprint=self.fingerprint,
            seed=seed,
            options={
                **options,
                "scoring": scoring,
                "used": reply.used and list(reply.used),
                "turns": [list(turn) for turn in turns],
            },
            notes=cut_notes(options),
        )

    def _cost(self, tokens: tuple[int, int]) -> float | None:
        return None if self.price is None else (tokens[0] * self.price[0] + tokens[1] * self.price[1]) / 1e6


def open_black_box(model: str, base_url: str | None, **options: Any) -> BlackBox:
    """A `BlackBox` with its options; nothing is sent. Raises OptionError on a missing address or an unknown option."""
    parameters = inspect.signature(BlackBox).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    options = by_our_names("a closed model", options, {name: name for name in ("base_url", *known)})
    return BlackBox(model, base_url or "", **options)


def _grid(grid: Any) -> tuple[int, int]:
    fine = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not fine or not all(isinstance(cells, int) and 1 <= cells <= LARGEST_GRID for cells in grid):
        raise OptionError(f"grid must be (rows, columns) of 1 to {LARGEST_GRID} cells each, got {grid!r}")
    return int(grid[0]), int(grid[1])


def _price(price: Any) -> tuple[float, float] | None:
    fine = price is None or (isinstance(price, (tuple, list)) and len(price) == 2)
    if not fine or not all(0 <= part < float("inf") for part in price or ()):
        raise OptionError(f"price must be (per million tokens read, per million written), got {price!r}")
    return price


def cache_folder(cache: str | os.PathLike | bool | None) -> Path | None:
    """Where replies are kept: the folder given, the user's own for None, nowhere for False."""
    if cache is False:
        return None
    if cache is None or cache is True:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "llava-lab" / "replies"
    return Path(cache).expanduser()


# -- a judge --------------------------------------------------------------------------------


@entry
def open_judge(
    model: str,
    base_url: str,
    *,
    max_requests: int = 500,
    key_variable: str | None = None,
    cache: str | os.PathLike | bool | None = None,
    timeout: float = 120.0,
    retries: int = 4,
) -> Judge:
    """A `Judge` that asks `model` at `base_url`; at most `max_requests` are ever sent, retries too.

    The key is read from `key_variable` (``OPENAI_API_KEY``) for each request and kept nowhere. `cache`: a folder, None for
    ``~/.cache/llava-lab/replies``, False for none. Raises OptionError, and when it is asked EndpointError and BudgetError.

    >>> from llava_lab.remote import open_judge
    >>> open_judge("a-model", "http://127.0.0.1:8000/v1", cache=False).about["base_url"]
    'http://127.0.0.1:8000/v1'
    """
    if not model.strip():
        raise OptionError("a judge has a name, the one its server knows")
    endpoint = Endpoint(base_url, max_requests=max_requests, key_variable=key_variable, timeout=timeout, retries=retries)
    replies = ReplyCache(cache_folder(cache))

    def ask(system: str, text: str, temperature: float, tokens: int) -> str:
        turns = [("system", system), ("user", text)]
        messages = [{"role": role, "content": said} for role, said in turns if said]
        body = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": tokens}
        key = hashlib.sha256(json.dumps([endpoint.base_url, body], sort_keys=True).encode()).hexdigest()
        reply = replies.get(key)
        if reply is None:
            reply = endpoint.ask(body)
            if not reply.text and reply.silence:
                raise EndpointError(f"the judge gave no grade: {reply.silence}")
            replies.put(key, reply)
        return reply.text

    return Judge(model, ask, {"base_url": endpoint.base_url, "kind": "chat completions"})
