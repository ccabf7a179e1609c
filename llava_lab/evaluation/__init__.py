"""Evaluation: answering a data set, exact match with intervals, and the controls beside every score."""

from llava_lab.evaluation.answering import answer_all
from llava_lab.evaluation.items import Item, load_items
from llava_lab.evaluation.leaderboard import leaderboard
from llava_lab.evaluation.linearized import linear_effect
from llava_lab.evaluation.metrics import cluster_interval, exact_match
from llava_lab.evaluation.scoring import evaluate
from llava_lab.evaluation.shipped import shipped_ablation, shipped_leaderboard

__all__ = ["Item", "answer_all", "cluster_interval", "evaluate", "exact_match", "leaderboard", "load_items"]
__all__ += ["linear_effect", "plain_text_perplexity", "shipped_ablation", "shipped_leaderboard"]


def plain_text_perplexity() -> dict[str, float]:
    """Perplexity of `smol`'s language model on plain prose, ``{"before": ..., "after": ...}`` its training (`plain_text`)."""
    from llava_lab.evaluation.plain_text import before_and_after  # it is also a command, which must not be imported before

    return before_and_after()
