"""Two connectors and three ranks of a linear fit, made by hand for the bench's tests: no model anywhere."""

from __future__ import annotations

from tests.support.widget_examples import make_relevance, make_run, spots
from widgets.connector_bench import Seen, seen

RANKS = (1, 4, 16)


def one_seen(name: str = "mlp2x_gelu", answer: str = "The car is red.", place: int = 3, r2: float | None = None) -> Seen:
    run = make_run(answer)
    words = [[("red", 0.5), (f"p{patch}", 0.25)] for patch in range(run.map.rows * run.map.cols)]
    return seen(name, run, make_relevance(run, spots(run)), target=place, words=words, r2=r2)


def bench_example() -> tuple[Seen, Seen, dict[int, Seen]]:
    ranks = {k: one_seen(f"rank {k}", "The car is blue.", at, 1 - 1 / (k + 1)) for at, k in enumerate(RANKS)}
    return one_seen(), one_seen("linear", "The house is blue.", 1), ranks
