"""A lab inside other people's harnesses: what is asked of it, by hand and against the interfaces they declare."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import llava_lab as ll
from llava_lab.errors import OptionError
from llava_lab.evaluation.harness import vlmeval
from llava_lab.evaluation.harness.asking import answer, continuation
from llava_lab.models import Lab
from llava_lab.worlds import picturebook

QUESTION = "What is it?"


def test_the_shipped_model_s_answer_has_the_loss_of_its_run_and_another_word_has_more() -> None:
    # an oracle from another path: log-probabilities that came while the answer was made
    lab, scene = ll.load("tiny"), picturebook.scene("test", 5)
    asked = picturebook.ask_about(scene, np.random.default_rng(0), 1, ("color",))[0]
    run = lab.ask(scene.picture(), asked.text)
    loss, greedy = continuation(lab, [scene.picture()], asked.text, run.answer)
    assert greedy
    assert loss == pytest.approx(-float(run.logprobs.mean()), abs=1e-5)
    word = run.words[-2].text
    other = "blue" if word != "blue" else "red"
    assert continuation(lab, [scene.picture()], f"<image>\n{asked.text}", run.answer.replace(word, other)) > (loss + 1, False)


def test_a_continuation_is_scored_with_several_pictures_and_with_none(tiny_random: Lab, picture: np.ndarray) -> None:
    one, two, none = (continuation(tiny_random, shown, QUESTION, "a car")[0] for shown in ([picture], [picture] * 2, []))
    assert len({one, two, none}) == 3
    with pytest.raises(OptionError, match="expected an answer to score"):
        continuation(tiny_random, [picture], QUESTION, " ")
    with pytest.raises(OptionError, match="model's context"):
        continuation(tiny_random, [picture], QUESTION, "a car " * 2000)


def test_an_answer_keeps_a_harness_s_settings_or_refuses_them(tiny_random: Lab, picture: np.ndarray) -> None:
    run = tiny_random.ask(picture, QUESTION, max_new_tokens=5)
    known = {"max_new_tokens": 5, "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}
    assert answer(tiny_random, [picture], f"<image>\n{QUESTION}", settings=known)[0] == run.answer
    middle = run.answer[2]
    assert (
        answer(tiny_random, [picture], QUESTION, settings={**known, "until": [middle]})[0] == run.answer.split(middle)[0].strip()
    )
    for wrong in ({"num_beams": 4}, {"temperature": 1, "top_p": 0.5}, {"repetition_penalty": 2}):
        with pytest.raises(OptionError, match="cannot be kept here"):
            answer(tiny_random, [picture], QUESTION, settings=wrong)


def test_lmms_eval_is_told_where_the_model_is() -> None:
    """Without the harness: what its registry does with an entry point is to load it, call it, and import the class it names."""
    pyproject = (ll.__file__ or "").replace("llava_lab/__init__.py", "pyproject.toml")
    with open(pyproject, encoding="utf-8") as file:
        assert 'llava_lab = "llava_lab.evaluation.harness.lmms:manifest"' in file.read()
    entry = importlib.metadata.EntryPoint("llava_lab", "llava_lab.evaluation.harness.lmms:manifest", "lmms_eval.models")
    assert callable(entry.load())


def test_vlmevalkit_s_table_has_the_model_and_its_parts_reach_it(
    tiny_random: Lab, picture: np.ndarray, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BaseModel:
        """As VLMEvalKit's: `generate` checks the message and calls `generate_inner`."""

        generate_inner: Callable[..., str]

        def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            return self.generate_inner(message, dataset)

    modules: dict[str, Any] = {
        name: ModuleType(name) for name in ("vlmeval", "vlmeval.config", "vlmeval.vlm", "vlmeval.vlm.base")
    }
    modules["vlmeval.config"].supported_VLM = {}
    modules["vlmeval.vlm.base"].BaseModel = BaseModel
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert vlmeval.register(tiny_random, "small") == "llava-lab-small"
    model = modules["vlmeval.config"].supported_VLM["llava-lab-small"](max_new_tokens=4)
    Image.fromarray(picture).save(tmp_path / "a.png")
    said = [{"type": "image", "value": str(tmp_path / "a.png")}, {"type": "text", "value": QUESTION}]
    assert model.generate(said) == tiny_random.ask(picture, QUESTION, max_new_tokens=4).answer
