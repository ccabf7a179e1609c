"""The benchmarks LLaVA-1.5 was scored on: its prompts, its parsers, the published formulas, the servers' files."""

from llava_lab.evaluation.benchmarks.benchmark import Benchmark, Judge, Measure, Question
from llava_lab.evaluation.benchmarks.judged import by_rule
from llava_lab.evaluation.benchmarks.registry import BENCHMARKS, DIFFERENCES, PUBLISHED
from llava_lab.evaluation.benchmarks.run import (
    answer_benchmark,
    benchmark,
    load_questions,
    read_answers,
    score_benchmark,
    shipped_scores,
)

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "DIFFERENCES",
    "Judge",
    "Measure",
    "PUBLISHED",
    "Question",
    "answer_benchmark",
    "benchmark",
    "by_rule",
    "load_questions",
    "read_answers",
    "score_benchmark",
    "shipped_scores",
]
