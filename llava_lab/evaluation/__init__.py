"""Evaluation: answering a data set, exact match with intervals, the twelve benchmarks, and the controls beside every score."""

from llava_lab.evaluation.benchmarks import BENCHMARKS, benchmark, shipped_scores
from llava_lab.evaluation.hallucination import grained, hallucination
from llava_lab.evaluation.items import Item, load_items
from llava_lab.evaluation.perplexity import plain_text_perplexity
from llava_lab.evaluation.scoring import answer_all, evaluate
from llava_lab.stats import cluster_interval, exact_match

__all__ = [
    "BENCHMARKS",
    "Item",
    "answer_all",
    "benchmark",
    "cluster_interval",
    "evaluate",
    "exact_match",
    "grained",
    "hallucination",
    "load_items",
    "plain_text_perplexity",
    "shipped_scores",
]
