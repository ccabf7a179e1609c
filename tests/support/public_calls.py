"""A quick call of every public function, on a small random model; and values that are wrong nearly anywhere.

calls = public_calls(lab, folder)
ll.knockout(**calls["knockout"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import llava_lab as ll
from llava_lab.instructions import RuleTeacher, World
from llava_lab.worlds import picturebook
from tests.support.training_rows import turn, write_json

WRONG: dict[str, Any] = {
    "None": None,
    "below zero": -1,
    "a large number": 2**70,
    "a fraction": 1.5,
    "a whole number of numpy's": np.int64(2),
    "a fraction of numpy's": np.float32(0.5),
    "not a number": float("nan"),
    "an empty text": "",
    "some text": "nonsense\n",
    "half a character": "\ud800",
    "a null byte": "a\0b",
    "a page of text": "a" * 1500,
    "bytes": b"x",
    "an empty list": [],
    "a list of nothing": [None],
    "a list of texts": ["a", ""],
    "three numbers": (2, 4, 6),
    "an array without numbers": np.full((2, 3), np.nan),
    "an empty tensor": torch.zeros(0),
    "a dictionary": {"a": 1},
    "a function": lambda *given: None,
    "an object": object(),
}
# 2**70 of these take years, and what stands where None is given takes seconds
LONG = frozenset({"n", "steps", "draws", "seeds", "orders", "shuffles", "validation", "test", "groups", "max_new_tokens", "held"})
LONG |= {"data", "task", "split", "steps_scale", "questions", "others"}


def public_calls(lab: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Every public function's arguments, by name, and those of the lab's own methods as ``Lab.name``."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (40, 60, 3), dtype=np.uint8) for _ in range(6)]
    run, other = (lab.ask(picture, "What is it?", max_new_tokens=3) for picture in pictures[:2])
    relevance = ll.attribute(lab, run)
    fit = ll.linearize(lab, pictures)
    scenes = [picturebook.scene("train", number) for number in range(2)]
    direction = np.ones(lab.model.config.text_config.hidden_size, np.float32)
    deciding = np.zeros((40, 60), bool)
    deciding[5:20, 5:20] = True
    rows = write_json(folder / "rows.json", [{"conversations": turn("What?", "A car.")}] * 2)
    asked: dict[str, Any] = {"lab": lab, "run": run}
    some: dict[str, Any] = {"lab": lab, "pictures": pictures}
    acting: dict[str, Any] = {**asked, "layers": None, "metric": None, "score": "logodds", "draws": 1, "seed": 0, "answer": False}
    cut: dict[str, Any] = {"source": "image", "target": "last", "keep_self": True}
    taken: dict[str, Any] = {"patches": [(0, 0)], "fill": "zero", "at": "projector", "pictures": None, "other": None, "seed": 0}
    pushed: dict[str, Any] = {"direction": direction, "layers": None, "where": "last"}
    judged: dict[str, Any] = {
        "fills": ["grey", "mean"],
        "steps": 2,
        "seeds": 1,
        "seed": 0,
        "scale": "probability",
        "things": None,
    }
    drawn: dict[str, Any] = {"split": "test", "n": 2, "seed": 0}
    projector = ll.write_projector(lab, folder / "projector.bin")
    return {
        "load": {"name": "tiny", "device": None, "dtype": None, "attention": "sdpa", "vision": None, "base": None}
        | {"device_map": None, "quantization_config": None, "revision": None, "base_url": None},
        "attribute": {**asked, "method": "rollout", "target": None, "sinks": "keep"},
        "ask_and_attribute": {"lab": lab, "picture": pictures[0], "question": "What?", "method": "rollout", "target": "words"}
        | {"options": None, "max_new_tokens": 2},
        "ask_without": {**asked, "patches": [(0, 0)], "fill": "grey", "history": ()},
        "explore": {"picture": pictures[0], "model": lab},
        "check_answer": {"check": str},
        "image_share": {**asked, "target": None, "fill": "grey", "orders": 1, "side": 2, "seed": 0, "batch": 8},
        "head_maps": {**asked, "target": "words"},
        "sanity": {**asked, "method": "rollout", "target": None, "options": None, "tests": ("question",), "groups": 2}
        | {"questions": ["What?"], "structure": False, "seed": 0},
        "faithfulness": {**asked, "rel": relevance, **judged, "batch": 8},
        "ground_truth": {"run": run, "rel": relevance, "deciding": deciding, "seeds": 3, "seed": 0},
        "compare": {**asked, "methods": ["rollout"], "target": None, "options": None, **judged, "deciding": None, "top": None}
        | {"batch": 8, "progress": False},
        "estimate": {**asked, "method": "occlusion", "target": None},
        "leaderboard": {
            "lab": lab,
            "data": "nothing",
            "pictures": None,
            **drawn,
            "methods": ["rollout"],
            "options": None,
            "steps": 2,
        }
        | {"seeds": 1, "scale": "probability", "batch": 8, "out": None, "workers": 1, "progress": False},
        "prune": {
            "lab": lab,
            "run": run,
            "keep": 5,
            "by": "random",
            "at": 1,
            "metric": None,
            "score": "logodds",
            "draws": 1,
            "seed": 0,
            "answer": False,
        },
        "prune_sweep": {"lab": lab, **drawn, "keeps": [5], "by": ["random"], "at": 1, "draws": 1, "progress": False},
        "shipped_ablation": {"data": "picturebook"},
        "shipped_leaderboard": {"lab": lab},
        "shipped_pruning": {"lab": lab},
        "logit_lens": {**asked, "layers": None, "top": 2, "words": (), "fitted": None},
        "activation_map": {**asked, "word": "car", "layers": None, "fitted": None},
        "hallucination_check": {"lab": lab, "runs": [run], "present": [["car"]], "absent": [["dog"]], "layers": None}
        | {"fitted": None, "seed": 0, "progress": False},
        "naming_share": {"lab": lab, **drawn, "pictures": None, "top": 2, "question": "What?"}
        | {"fitted": None, "progress": False},
        "fit_jacobian": {"lab": lab, "runs": [run], "targets": "text", "layers": None, "rows": 16, "progress": False},
        "train_lens": {**some, "question": "What?", "steps": 1, "rate": 1e-3, "per_picture": 4, "seed": 0, "progress": False},
        "nearest_words": {**asked, "space": "input", "centered": True, "top": 2, "draws": 2, "seed": 0},
        "linear_probe": {**some, "labels": [0, 1] * 3, "at": "after", "question": "What?", "folds": 2, "per_picture": 4}
        | {"shuffles": 1, "seed": 0, "progress": False},
        "token_geometry": {**some, "at": "after", "question": "What?", "per_picture": 4, "neighbours": 2, "seed": 0}
        | {"control": False, "progress": False},
        "sinks": {"lab": lab, "runs": [run, other], "attended": 4.0, "long": 3.0, "peak": 0.1, "control": True, "seed": 0}
        | {"progress": False},
        "patch_labels": {"lab": lab, "scenes": scenes, "what": "object", "most": 0.5},
        "knockout": {**acting, **cut},
        "knockout_sweep": {**asked, "flows": (("image", "last"),), "width": 1, "step": 1, "metric": None, "score": "logodds"},
        "ablate_tokens": {**asked, **taken, "metric": None, "score": "logodds", "draws": 1, "answer": False},
        "patch": {"lab": lab, "clean": run, "corrupt": "grey", "sites": ("last",), "components": ("residual",), "layers": None}
        | {"width": 1, "metric": None, "score": "logodds", "seed": 0},
        "attribution_patch": {"lab": lab, "clean": run, "corrupt": "grey", "sites": ("last",), "metric": None, "steps": 1}
        | {"seed": 0},
        "patch_nodes": {"lab": lab, "clean": run, "corrupt": "grey", "put": "clean", "sites": ("last",), "layers": [0]}
        | {"metric": None, "seed": 0, "progress": False},
        "circuit": {"lab": lab, "pairs": [(run, other, None)] * 2, "variable": "color", "n": 1, "held": 1, "steps": 1}
        | {"shares": (0.1, 1.0), "draws": 1, "checked": 1, "split": "test", "seed": 0, "progress": False},
        "interchange": {"lab": lab, "variable": "color", "position": "last", "layers": [0], "dim": 2, "n": 1, "held": 1}
        | {"epochs": 1, "rate": 0.01, "seeds": 1, "split": "test", "seed": 0, "progress": False},
        "steer": {**acting, **pushed, "alpha": 1.0, "others": ["What?"]},
        "erase": {**acting, **pushed, "strength": 1.0, "others": ["What?"]},
        "knocked_out": {**asked, **cut, "layers": None},
        "ablated": {**asked, **taken},
        "steered": {**asked, **pushed, "alpha": 1.0},
        "erased": {**asked, **pushed, "strength": 1.0},
        "mean_difference": {"lab": lab, "runs": [run], "others": [other], "layer": 1, "where": "last"},
        "positive_control": {"lab": lab, "task": "picturebook", **drawn, "fill": "zero", "at": "projector", "buffer": 0},
        "connector": {"lab": lab, "what": lab.connector},
        "new_connector": {"lab": lab, "kind": "linear", "init": "llava", "seed": 0},
        "linearize": {**some, "ridge": 1e-4, "rank": None, "held_out": 0.25, "ranks": None, "batch": 8, "seed": 0},
        "local_linearity": {**some, "fit": fit, "tokens": 2, "tolerance": 0.05, "held_out": 0.25, "batch": 8, "seed": 0},
        "read_projector": {"lab": lab, "path": str(projector), "kind": None},
        "write_projector": {"lab": lab, "path": "projector.bin"},
        "save": {"lab": lab, "folder": "saved"},
        "export": {"lab": lab, "folder": "exported"},
        "linear_effect": {"lab": lab, "fit": fit, "data": "nothing", **drawn, "pictures": None, "ranks": (), "controls": False}
        | {"prompt": None, "progress": False},
        "compare_connectors": {
            "pictures": None,
            "test_pictures": None,
            "connectors": ["linear", "mlp2x_gelu"],
            "data": "picturebook",
            "start": "nowhere",
            "language": None,
            "out": "out",
        }
        | {
            "rates": [1e-3, 2e-3, 4e-3],
            "seeds": 1,
            "stage1": [True],
            "budgets": ["samples"],
            "splits": ["test"],
            "validation": 1,
            "test": 1,
        }
        | {"steps_scale": 0.1, "keep": False, "bf16": False, "fused": False, "stated": 0.02, "seed": 0, "progress": False},
        "train_stage": {"lab": lab, "data": str(rows), "stage": "nothing", "out": "out", "recipe": None, "steps": 1}
        | {"resume": False, "skip_bad": False, "cut_long": False, "cache": False, "told": None, "running": None},
        "generate": {"contexts": World(1), "out": "rows", "teacher": RuleTeacher(), "kinds": ["detail"], "folder": None}
        | {"drop_false": False, "seed": 0, "progress": False},
        "Lab.ask": {"picture": pictures[0], "question": "What?", "max_new_tokens": 2, "temperature": 0.0, "seed": 0}
        | {"prompt": None, "fit": None, "history": (), "on_token": None, "on_step": None},
        "Lab.sequence": {"question": "What?", "prompt": None, "history": (), "picture": None},
        "Lab.inputs": {"run": run, "picture": None, "tiles": False},
        "Lab.swap": {"connector": lab.connector},
    }
