"""Is a map any good? Faithfulness, ground truth, sanity, comparison and the leaderboard."""

from llava_lab.judging.compare import compare
from llava_lab.judging.faithfulness import faithfulness
from llava_lab.judging.ground_truth import ground_truth
from llava_lab.judging.leaderboard import leaderboard, shipped_ablation, shipped_leaderboard
from llava_lab.judging.prune import prune, prune_sweep, shipped_pruning
from llava_lab.judging.sanity import sanity, with_question

__all__ = [
    "compare",
    "faithfulness",
    "ground_truth",
    "leaderboard",
    "prune",
    "prune_sweep",
    "sanity",
    "shipped_ablation",
    "shipped_leaderboard",
    "shipped_pruning",
    "with_question",
]
