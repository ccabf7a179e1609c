"""A closed model's options, what works with it, and what a call would cost: plain data and checks.

It sends nothing and knows no address; `llava_lab.models.black_box` does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_lab.errors import OptionError

PREFIX = "openai:"
WORKS = ("occlusion", "rise", "shapley", "kernel_shap", "random", "center", "edges")  # methods that need no inside
SCORINGS = ("auto", "top", "prefill", "agreement")


@dataclass(frozen=True)
class Estimate:
    """What a call will ask for, at most; str() is a line to read before it starts."""

    requests: int  # that will be sent, retries not counted
    known: int  # answered from what was kept
    left: int  # requests that may still be sent
    tokens: tuple[int, int] | None  # read and written; None where the server does not count
    cost: float | None  # in the currency of `price`

    def __str__(self) -> str:
        said = f"{self.requests} requests to send, {self.known} known already, {self.left} left of the budget"
        if self.tokens:
            said += f"; about {self.tokens[0]:,} tokens to read and {self.tokens[1]:,} to write"
        return said + (f", {self.cost:.4g} at the price given" if self.cost is not None else "")


def works() -> str:
    """What can be done with a closed model, for one-line refusals."""
    return f"with a closed model work ask, ask_without, faithfulness, and attribute with method {', '.join(WORKS)}"


def check_options(model: str, grid: Any, scoring: str, floor: float, price: Any, numbers: dict[str, int], timeout: float) -> None:
    """Raises OptionError on the first option out of its range."""
    if not model.strip():
        raise OptionError(f"expected {PREFIX}MODEL with the name the server knows, got {PREFIX + model!r}")
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) and 1 <= n <= 64 for n in grid)):
        raise OptionError(f"grid must be (rows, columns) of 1 to 64 cells each, got {grid!r}")
    if scoring not in SCORINGS:
        raise OptionError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if not -1000 <= floor < 0:
        raise OptionError(f"floor is the log-probability of what is not listed, below 0; got {floor!r}")
    if price is not None and not (
        isinstance(price, (tuple, list)) and len(price) == 2 and all(0 <= one < float("inf") for one in price)
    ):
        raise OptionError(f"price must be (per million tokens read, per million written), got {price!r}")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, got {number!r}")
    if not 0 < timeout < float("inf"):
        raise OptionError(f"timeout must be seconds above 0, got {timeout!r}")


def cache_folder(cache: str | os.PathLike | bool | None) -> Path | None:
    """Where replies are kept: the folder given, the user's own for None, nowhere for False."""
    if cache is False:
        return None
    if cache is None or cache is True:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "llava-lab" / "replies"
    return Path(cache).expanduser()
