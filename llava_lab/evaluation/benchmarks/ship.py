"""The shipped scores of a shipped model on every drawn twin, and what changes how much it makes up, as one small file.

``python -m llava_lab.evaluation.benchmarks.ship tiny`` writes ``assets/tiny/benchmarks.json``; what the file holds already
of these weights is not asked again, so a run that was stopped goes on. Remove the file to ask everything anew. A number behind
the name is how many pictures (20); what changes how much is made up is asked of a quarter more, under grain.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from llava_lab.evaluation.benchmarks.registry import BENCHMARKS
from llava_lab.evaluation.benchmarks.run import benchmark, shipped_place, shipped_scores
from llava_lab.models import Lab, load
from llava_lab.results import whole_file

COMMAND = "python -m llava_lab.evaluation.benchmarks.ship"
PICTURES = 20
CHOICE = 5  # pictures, of multiple choice with every rotation


def make(name: str, lab: Lab | None = None, *, n: int = PICTURES) -> Path:
    """Ask every twin about `n` pictures and the changes against making things up; the file is written after each."""
    from llava_lab.evaluation.hallucination import GRAIN, hallucination

    lab = lab or load(name)
    kept: dict[str, Any] = {"command": f"{COMMAND} {name}" + (f" {n}" if n != PICTURES else ""), "model": name}
    kept |= {"date": time.strftime("%Y-%m-%d"), "fingerprint": lab.fingerprint, "scores": {}}
    if shipped_place(name).is_file() and shipped_scores(name)["fingerprint"] == lab.fingerprint:
        kept["scores"] = shipped_scores(name)["scores"]
    asked = {one.name: partial(benchmark, lab, one.name, n=_pictures(one.name, n)) for one in BENCHMARKS.values() if one.twin}
    asked |= {"hallucination": partial(hallucination, lab, n=n + n // 4, grain=GRAIN)}
    for title, ask in asked.items():
        if title not in kept["scores"]:
            kept["scores"][title] = ask().to_dict()
            with whole_file(shipped_place(name)) as temporary:
                temporary.write_text(json.dumps(kept) + "\n", "utf-8")
    return shipped_place(name)


def _pictures(benchmark_name: str, n: int) -> int:
    return min(n, CHOICE) if benchmark_name.startswith("mmbench") else n


if __name__ == "__main__":
    sys.stdout.write(f"{make(sys.argv[1], n=int(sys.argv[2]) if sys.argv[2:] else PICTURES)}\n")
