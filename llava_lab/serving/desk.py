"""One model and the questions that wait for it: a bounded line, answered one at a time on a thread of its own.

    desk = Desk(lab, places=65)
    desk.start()
    with desk.place():
        job = desk.submit(chat, loop)
        event = await job.events.get()  # Piece, ..., then Done, Refused, or None where nobody listens any more

The server's loop never computes and the model never waits for a client: what it says goes into the job's own queue, which holds
an answer at most. A place is taken before a request is read and given back when it is answered, so that what waits is bounded,
pictures included. Who leaves (`leave`) is taken out of the line, or the answer ends with its next token. A map that is being
made is not stopped.

The lab has turns of its own (`Lab.turn`), so that a notebook may go on using the model that it serves.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_lab.attribution.registry import attribute
from llava_lab.errors import DataError, LabError, OptionError, PictureError, TargetError
from llava_lab.models.pictures import read_picture
from llava_lab.models.text import UNFINISHED
from llava_lab.serving.protocol import Chat, Listing, Refused

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lab.models import Lab
    from llava_lab.results import Relevance, Run

logger = logging.getLogger(__name__)

OF_THE_REQUEST = (DataError, OptionError, PictureError, TargetError)  # what a client can mend
STOPPING = "the server is stopping; ask it again when it is back"


@dataclass(frozen=True)
class Piece:
    """Some more of an answer's text, and the tokens that are new since the last piece."""

    text: str
    logprobs: dict[str, Any] | None


@dataclass(frozen=True)
class Done:
    """A whole answer; `logprobs` are of the tokens that no piece had."""

    run: Run
    logprobs: dict[str, Any] | None
    maps: Relevance | None


class Job:
    """One question in the line."""

    def __init__(self, chat: Chat, loop: asyncio.AbstractEventLoop) -> None:
        self.chat = chat
        self.events: asyncio.Queue[Piece | Done | Refused | None] = asyncio.Queue()
        self.left = threading.Event()  # nobody waits for the answer any more
        self._loop = loop

    def tell(self, event: Piece | Done | Refused | None) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop has ended, and who listened with it
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Desk:
    """The line before one lab; `places` is the most that may be inside, the one that is being answered included."""

    def __init__(self, lab: Lab, *, places: int) -> None:
        self.lab, self.places = lab, places
        self.inside = 0
        self.stopping = False
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="llava-lab serve", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for the length of the block; from the server's loop. Raises Refused where all are taken."""
        if self.stopping:
            raise Refused(STOPPING, 503, code="stopping")
        if self.inside >= self.places:
            raise Refused(f"{self.inside} requests are waiting, which is the most; try again in a moment", 429, code="queue_full")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def submit(self, chat: Chat, loop: asyncio.AbstractEventLoop) -> Job:
        """Put a question at the end of the line."""
        job = Job(chat, loop)
        with self._changed:
            if self.stopping:
                raise Refused(STOPPING, 503, code="stopping")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def leave(self, job: Job) -> None:
        """Nobody waits for this job any more; harmless after its end."""
        job.left.set()
        with self._changed, suppress(ValueError):
            self._jobs.remove(job)

    def stop(self) -> None:
        """Answer what is being answered, refuse the rest; from any thread."""
        with self._changed:
            self.stopping = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify()
        for job in waiting:
            job.tell(Refused(STOPPING, 503, code="stopping"))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self.stopping)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            job.tell(self._outcome(job))

    def _outcome(self, job: Job) -> Done | Refused | None:
        """An answer, or why there is none; no exception leaves here, or the line would stand still."""
        try:
            return self._answer(job)
        except OF_THE_REQUEST as error:
            return Refused(str(error), 400)
        except LabError as error:
            logger.warning("%s", error)
            return Refused(str(error), 500)
        except Exception:
            logger.exception("a question could not be answered")
            return Refused("this question could not be answered; the server's log says why", 500)

    def _answer(self, job: Job) -> Done | None:
        chat = job.chat
        listing = Listing(self.lab.tokenizer, chat.listed)
        pictures = [read_picture(address) for address in chat.pictures]

        def step(token: int, chances: Tensor) -> None:
            if job.left.is_set():
                raise KeyboardInterrupt
            listing.add(token, chances)

        def tell(text: str) -> None:
            job.tell(Piece(text, listing.take(last=text.endswith(UNFINISHED))))

        shown = None if not pictures else pictures[0] if len(pictures) == 1 else pictures
        told = tell if chat.stream else None
        asking: dict[str, Any] = {**chat.asking, "history": chat.history}
        run = self.lab.ask(shown, chat.question, on_token=told, on_step=step, **asking)
        if job.left.is_set():
            return None
        maps = None
        if chat.method is not None:
            maps = attribute(self.lab, run, method=chat.method, target=chat.target, **chat.options)
        return Done(run, listing.take(last=True), maps)
