"""The shipped scores of a shipped model on every drawn twin, and what changes how much it makes up, as one small file.

``python -m llava_lab.evaluation.benchmarks.ship tiny`` writes ``assets/tiny/benchmarks.json``; what the file holds already
of these weights is not asked again, so a run that was stopped goes on. Remove the file to ask everything anew.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from llava_lab.errors import DataError
from llava_lab.evaluation.benchmarks.registry import BENCHMARKS
from llava_lab.evaluation.benchmarks.run import benchmark
from llava_lab.models import Lab, load
from llava_lab.models.folders import ASSETS
from llava_lab.results import whole_file

PICTURES = 20
CHOICE = 5  # pictures, of multiple choice with every rotation


def shipped(name: str) -> dict[str, Any]:
    """What `make` wrote for a shipped model: its command, its date, its scores by benchmark.

    >>> from llava_lab.evaluation.benchmarks.ship import shipped
    >>> "pope" in shipped("tiny")["scores"]
    True
    """
    try:
        return dict(json.loads(_place(name).read_text("utf-8")))
    except FileNotFoundError:
        raise DataError(f"no benchmark scores ship with {name!r}; llava-lab evaluate --benchmark makes them") from None


def make(name: str, lab: Lab | None = None, *, n: int = PICTURES) -> Path:
    """Ask every twin about `n` pictures and the changes against making things up; the file is written after each."""
    from llava_lab.evaluation.hallucination import hallucination

    lab = lab or load(name)
    kept: dict[str, Any] = {"command": f"python -m llava_lab.evaluation.benchmarks.ship {name}", "model": name}
    kept |= {"date": time.strftime("%Y-%m-%d"), "fingerprint": lab.fingerprint, "scores": {}}
    if _place(name).is_file() and shipped(name)["fingerprint"] == lab.fingerprint:
        kept["scores"] = shipped(name)["scores"]
    asked = {one.name: partial(benchmark, lab, one.name, n=_pictures(one.name, n)) for one in BENCHMARKS.values() if one.twin}
    for title, ask in {**asked, "hallucination": partial(hallucination, lab, n=n)}.items():
        if title not in kept["scores"]:
            kept["scores"][title] = ask().to_dict()
            with whole_file(_place(name)) as temporary:
                temporary.write_text(json.dumps(kept) + "\n", "utf-8")
    return _place(name)


def _pictures(benchmark_name: str, n: int) -> int:
    return min(n, CHOICE) if benchmark_name.startswith("mmbench") else n


def _place(name: str) -> Path:
    return ASSETS / name / "benchmarks.json"


if __name__ == "__main__":
    sys.stdout.write(f"{make(sys.argv[1])}\n")
