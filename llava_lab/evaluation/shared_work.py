"""A function of a Lab over many numbered pieces of work, in this process or in several.

A small model's passes are too short to share between threads, so the pieces are shared between processes. Each
has a model of its own; results come back in any order, and an interrupt loses only pieces under way.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llava_lab.attribution.base import whole_number
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.models import Lab

Piece = Callable[["Lab", int], Any]

_here: dict[str, Any] = {}  # of a worker: what it works with


def spread(lab: Lab, piece: Piece, indices: Sequence[int], *, workers: int = 1) -> Iterator[tuple[int, Any]]:
    """(index, ``piece(lab, index)``) for each index, in any order; `piece` must be picklable when `workers` is above 1.

    Raises OptionError for no workers, or for several on a GPU, which one process fills.
    """
    if whole_number("workers", workers, least=1) > 1 and lab.device.type != "cpu":
        raise OptionError(f"workers above 1 are for a model on the processor; this one is on {lab.device}, so leave workers at 1")
    if workers == 1 or len(indices) < 2:
        yield from ((index, piece(lab, index)) for index in indices)
        return
    threads = max(1, torch.get_num_threads() // workers)
    level = logging.getLogger("llava_lab").level
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(indices)), initializer=_settle, initargs=(_packed(lab), piece, threads, level)) as pool:
        yield from pool.imap_unordered(_work, indices)
        pool.close()
        pool.join()


def _packed(lab: Lab) -> dict[str, Any]:
    """What a Lab is made of; the model itself cannot be pickled once transformers has hung its hooks on it."""
    model: Any = lab.model
    return {
        "config": model.config,
        "attention": model.config._attn_implementation,
        "dtype": model.dtype,
        "weights": model.state_dict(),
        "processor": lab.processor,
        "name": lab.name,
        "card": lab.card,
    }


def _unpacked(parts: dict[str, Any]) -> Lab:
    from transformers import LlavaForConditionalGeneration

    from llava_lab.models import Lab

    model = LlavaForConditionalGeneration._from_config(
        parts["config"], dtype=parts["dtype"], attn_implementation=parts["attention"]
    )
    model.load_state_dict(parts["weights"])
    return Lab(model.eval(), parts["processor"], name=parts["name"], card=parts["card"])


def _settle(parts: dict[str, Any], piece: Piece, threads: int, level: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    logging.getLogger("llava_lab").setLevel(level)
    _here.update(lab=_unpacked(parts), piece=piece)


def _work(index: int) -> tuple[int, Any]:
    return index, _here["piece"](_here["lab"], index)
