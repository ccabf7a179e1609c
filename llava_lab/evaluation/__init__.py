"""Evaluation: answering a data set, exact match with intervals, and the controls beside every score."""

from llava_lab.evaluation.answering import answer_all
from llava_lab.evaluation.items import Item, load_items
from llava_lab.evaluation.leaderboard import leaderboard
from llava_lab.evaluation.linearized import linear_effect
from llava_lab.evaluation.metrics import cluster_interval, exact_match
from llava_lab.evaluation.scoring import evaluate
from llava_lab.evaluation.shipped import shipped_ablation, shipped_leaderboard

__all__ = ["Item", "answer_all", "cluster_interval", "evaluate", "exact_match", "leaderboard", "load_items"]
__all__ += ["linear_effect", "shipped_ablation", "shipped_leaderboard"]
