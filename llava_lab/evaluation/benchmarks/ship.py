"""The shipped scores of a shipped model on every drawn twin, and what changes how much it makes up, as one small file.

``python -m llava_lab.evaluation.benchmarks.ship tiny`` asks everything anew and writes ``assets/tiny/benchmarks.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from llava_lab.errors import DataError
from llava_lab.evaluation.benchmarks.registry import BENCHMARKS
from llava_lab.evaluation.benchmarks.run import benchmark
from llava_lab.models import Lab, load
from llava_lab.models.folders import ASSETS
from llava_lab.results import whole_file

PICTURES = {"tiny": 100, "smol": 40}
CHOICE = 40  # pictures, of multiple choice with every rotation


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


def make(name: str, lab: Lab | None = None) -> Path:
    """Ask every twin and the changes against making things up, and write the file."""
    from llava_lab.evaluation.hallucination import hallucination

    lab, n = lab or load(name), PICTURES.get(name, 100)
    scores: dict[str, Any] = {}
    for chosen in BENCHMARKS.values():
        if chosen.twin is not None:
            pictures = min(n, CHOICE) if chosen.name.startswith("mmbench") else n
            scores[chosen.name] = benchmark(lab, chosen.name, n=pictures).to_dict()
    scores["hallucination"] = hallucination(lab, n=n).to_dict()
    about = {"command": f"python -m llava_lab.evaluation.benchmarks.ship {name}", "date": time.strftime("%Y-%m-%d")}
    with whole_file(_place(name)) as temporary:
        temporary.write_text(
            json.dumps({**about, "model": name, "fingerprint": lab.fingerprint, "scores": scores}) + "\n", "utf-8"
        )
    return _place(name)


def _place(name: str) -> Path:
    return ASSETS / name / "benchmarks.json"


if __name__ == "__main__":
    sys.stdout.write(f"{make(sys.argv[1])}\n")
