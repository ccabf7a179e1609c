"""Which checkpoints can be loaded: BakLLaVA (Mistral) by LLaVA-1.5's path, others not at all and with what they would need."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

import llava_lab as ll
from llava_lab.errors import CheckpointError, LabError
from llava_lab.models import Lab
from llava_lab.models.folders import FAMILIES
from tests.support.checkpoints import build_llama_model, build_processor, byte_tokenizer

QUESTION = "What color is the car?"


def bakllava(folder: Path, window: int | None = None) -> Path:
    """BakLLaVA's form: `llava` with a Mistral whose heads share keys, and perhaps a sliding window."""
    tokenizer = byte_tokenizer()
    vision = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act="quick_gelu",
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=window,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    build_llama_model(config).save_pretrained(folder)
    build_processor(config, tokenizer, do_pad=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[None, 24], ids=["whole", "window"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return ll.load(bakllava(tmp_path_factory.mktemp("bakllava"), request.param))


def test_it_answers_and_its_log_probabilities_check_out(lab: Lab, picture: np.ndarray) -> None:
    assert lab.card.language.startswith("mistral")
    run = lab.ask(picture, QUESTION, max_new_tokens=6)
    with torch.no_grad():
        logits = lab.model(**lab.inputs(run)).logits[0]
    at = run.answer_positions
    assert np.abs(logits.log_softmax(-1)[at - 1, run.token_ids[at]].numpy() - run.logprobs).max() < 1e-4


def test_watched_attention_is_eager_attention(lab: Lab, picture: np.ndarray) -> None:
    run = lab.ask(picture, QUESTION, max_new_tokens=4)
    rel = ll.attribute(lab, run, method="attention")
    lab.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = lab.model(**lab.inputs(run), output_attentions=True).attentions
    finally:
        lab.model.set_attn_implementation("sdpa")
    rows = torch.stack(seen)[:, 0, :, list(run.target().positions)].mean((0, 1, 2)).numpy()
    start, stop = run.segments["image"]
    np.testing.assert_allclose(rel.values[0].ravel(), rows[start:stop], atol=1e-5)


METHODS = ("rollout", "relevancy", "occlusion", "gradient_input", "value_attention", "tam", "direct_logit")


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_on_shared_keys(lab: Lab, picture: np.ndarray, method: str) -> None:
    run = lab.ask(picture, QUESTION, max_new_tokens=3)
    rel = ll.attribute(lab, run, method=method, target=0)
    assert np.isfinite(rel.values).all()
    assert rel.values.std() > 0


def test_occlusion_behind_the_projector_uses_kept_keys_only_where_they_are_kept(lab: Lab, picture: np.ndarray) -> None:
    """A cache that slides forgets the beginning; its shortcut is found out and refused."""
    run = lab.ask(picture, QUESTION, max_new_tokens=3)
    if lab.model.config.text_config.sliding_window:
        with pytest.raises(LabError, match="does not keep a plain causal cache: use at='pixels'"):
            ll.attribute(lab, run, method="occlusion", at="projector", fill="mean")
        return
    one = ll.attribute(lab, run, method="occlusion", at="projector", fill="mean", batch=1).values
    many = ll.attribute(lab, run, method="occlusion", at="projector", fill="mean", batch=16).values
    np.testing.assert_allclose(one, many, atol=1e-4)


def test_a_cut_edge_carries_nothing(lab: Lab, picture: np.ndarray) -> None:
    run = lab.ask(picture, QUESTION, max_new_tokens=3)
    effect = ll.knockout(lab, run, source="image", target="question", layers=(0, 3))
    assert effect.proof["largest"] == 0
    assert effect.proof["edges"] > 0
    assert effect.proof["decode_error"] < 1e-3
    assert effect.before[0] == pytest.approx(float(run.logprobs.sum()), abs=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "video_llava", "idefics3", None])
def test_another_family_is_told_what_an_adapter_needs(tmp_path: Path, family: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} if family else {}))
    with pytest.raises(CheckpointError) as error:
        ll.load(tmp_path)
    said = str(error.value)
    assert "\n" not in said
    assert repr(family) in said
    assert "An adapter for it" in said
    assert all(repr(known) in said for known in FAMILIES)
