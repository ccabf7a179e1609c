"""Evaluation: answering a data set, exact match with intervals, and the controls beside every score."""

from llava_lab.evaluation.items import Item, load_items
from llava_lab.evaluation.scoring import answer_all, evaluate
from llava_lab.stats import cluster_interval, exact_match

__all__ = [
    "Item",
    "answer_all",
    "cluster_interval",
    "exact_match",
    "plain_text_perplexity",
    "evaluate",
    "load_items",
]


def plain_text_perplexity() -> dict[str, float]:
    """Perplexity of `smol`'s language model on plain prose, ``{"before": ..., "after": ...}`` its training (`plain_text`)."""
    from llava_lab.evaluation.plain_text import before_and_after  # it is also a command, which must not be imported before

    return before_and_after()
