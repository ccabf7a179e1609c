"""A lab as a model of lmms-eval. Imported by the harness alone, which is in an extra.

    from lmms_eval.evaluator import simple_evaluate
    simple_evaluate(model=LlavaLab("tiny"), tasks=["pope"], limit=50, bootstrap_iters=0)

Written for lmms-eval 0.7.3 (``api/model.py``, ``api/task.py``): requests of a "simple" model are
(context, settings, pictures of, number, task, split), and loglikelihood's second is the continuation or gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from llava_lab.errors import OptionError
from llava_lab.evaluation.harness.asking import answer, continuation
from llava_lab.models import Lab, load


class LlavaLab(lmms):
    """`pretrained` is what `llava_lab.load` takes, or a loaded lab; one question at a time on one device."""

    is_simple = True

    def __init__(
        self,
        pretrained: str | Lab = "tiny",
        batch_size: Any = 1,
        device: str | None = None,
        dtype: str | None = None,
        **other: Any,
    ) -> None:
        super().__init__()
        if other:
            raise OptionError(f"no option {next(iter(other))!r}; the options are pretrained, device and dtype")
        self.lab = load(pretrained, device=device, dtype=dtype) if isinstance(pretrained, str) else pretrained
        self.batch_size_per_gpu = 1  # what the harness asks for changes no score

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """An answer to each request, in order."""
        found = []
        for request in tqdm(requests, desc="answering", disable=None):
            context, settings, pictures_of, number, task, split = request.args
            said, run = answer(self.lab, self._pictures(pictures_of, number, task, split), context, settings=settings)
            start, stop = run.segments["answer"]
            found.append(GenerationResult(said, TokenCounts(input_tokens=start, output_tokens=stop - start)))
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The mean loss of each continuation, the least of which the harness takes, and whether it would be said.

        Each pair in a `GenerationResult`: the evaluator of 0.7.3 makes a text of every other reply (`unwrap_generation_output`),
        which its multiple choice then cannot read.
        """
        found = []
        for request in tqdm(requests, desc="scoring", disable=None):
            context, given, pictures_of, number, task, split = request.args
            text = given(self.task_dict[task][split][number]) if callable(given) else given
            pair = continuation(self.lab, self._pictures(pictures_of, number, task, split), context, str(text))
            found.append(GenerationResult(pair))  # type: ignore[arg-type, unused-ignore]
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: what a round is differs from task to task."""
        raise OptionError("tasks of several rounds are not answered here; choose tasks of output_type generate_until")

    def _pictures(self, pictures_of: Any, number: int, task: str, split: str) -> list[Any]:
        pictures = pictures_of(self.task_dict[task][split][number]) or []
        return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
