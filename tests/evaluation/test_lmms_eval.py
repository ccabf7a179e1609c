"""A drawn-world task through the real lmms-eval, found by its entry point. Needs the extra ``lmms-eval``; a job of its own:

python3 run.py install --with lmms-eval && python3 run.py test tests/evaluation/test_lmms_eval.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.worlds import picturebook

pytestmark = pytest.mark.harness

COUNT = 4
UTILS = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["picture"]).convert("RGB")]

def process(doc, results):
    return {"right": float(results[0].strip() == doc["said"])}
"""
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
"""
WORDS = """
task: drawn_words
output_type: generate_until
doc_to_target: "{{said}}"
generation_kwargs: {max_new_tokens: 16, temperature: 0, do_sample: false}
process_results: !function utils.process
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
"""
CHOICE = """
task: drawn_choice
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""
SCRIPT = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
asked = {"model": "llava_lab", "model_args": "pretrained=tiny", "tasks": ["drawn_words", "drawn_choice"]}
found = simple_evaluate(**asked, task_manager=manager, bootstrap_iters=0, batch_size=1)
known = MODEL_REGISTRY_V2.list_canonical_model_ids()
print(json.dumps({"results": found["results"], "known": "llava_lab" in known}, default=str))
"""


def test_drawn_tasks_run_through_the_harness_and_are_scored_as_the_lab_answers(tmp_path: Path) -> None:
    assert importlib.util.find_spec("lmms_eval"), "install the extra lmms-eval"
    lab, rows, colors = ll.load("tiny"), [], ("red", "blue", "green", "yellow")
    for number in range(COUNT):
        scene = picturebook.scene("test", number)
        scene.picture().save(tmp_path / f"{number}.png")
        asked = picturebook.ask_about(scene, np.random.default_rng(number), 1, ("color",))[0]
        run = lab.ask(tmp_path / f"{number}.png", asked.text, max_new_tokens=16)
        word = run.words[-2].text
        choices = [run.answer, *(run.answer.replace(word, color) for color in colors if color != word)][:3]
        # the second row claims a gold that the model does not say, so that a score of 1 is not all there can be
        row = {"picture": str(tmp_path / f"{number}.png"), "question": asked.text, "said": run.answer}
        rows.append({**row, "choices": choices[::-1], "gold": 0 if number == 1 else 2})
    rows[0]["said"] = "something else"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "utils.py").write_text(UTILS)
    common = COMMON.format(rows=tmp_path / "rows.json")
    for name, text in (("drawn_words", WORDS), ("drawn_choice", CHOICE)):
        (tmp_path / f"{name}.yaml").write_text(text + common)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)
    assert found["known"]
    assert found["results"]["drawn_words"]["right,none"] == pytest.approx(1 - 1 / COUNT)
    assert found["results"]["drawn_choice"]["acc,none"] == pytest.approx(1 - 1 / COUNT)
